package catalog_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// release makes ids gone, as the confirmation of their tombstones does.
func (e *env) release(t rapid.TB, c *catalog.Catalog, ids ...int64) {
	t.Helper()
	var units []*catalog.Unit
	for _, id := range ids {
		units = append(units, &catalog.Unit{
			ID: id, Collection: e.col.ID, Kind: catalog.UnitSegment,
			Segment: segment.Segment{ID: id},
		})
	}
	conds, ops, err := c.Release(context.Background(), units)
	if err != nil {
		t.Fatal(err)
	}
	if res, err := e.kv.Txn(context.Background(), meta.Txn{If: conds, Then: ops}); err != nil || !res.Succeeded {
		t.Fatalf("%v, err = %v", res.Succeeded, err)
	}
}

// Whatever ids go, in whatever order, those that went are gone and no others, until
// there are too many ranges of old ones; and then nothing above or below them is.
func TestGone(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const limit, age = 3, time.Hour
		now := time.Unix(1e9, 0)
		kv := memory.New(memory.Options{})
		c := catalog.New(catalog.Options{KV: kv, Now: func() time.Time { return now }, MaxGoneRanges: limit, GoneGapAge: age})
		e := &env{Catalog: c, kv: kv}
		const first, last = 4096 - 40, 4096 + 40 // of two blocks
		gone := map[int64]bool{}
		lowest, highest := map[int64]int64{}, map[int64]int64{}
		aged := false
		check := func() {
			var all []int64
			for id := int64(first); id <= last; id++ {
				all = append(all, id)
			}
			got, err := c.Gone(context.Background(), all)
			if err != nil {
				t.Fatal(err)
			}
			for _, id := range all {
				block := id / 4096
				between := lowest[block] != 0 && id > lowest[block] && id < highest[block]
				if got[id] != gone[id] && (!aged || !between || !got[id]) {
					t.Fatalf("%d is gone: %v, want %v; gone are %v", id, got[id], gone[id], gone)
				}
			}
		}
		for range rapid.IntRange(1, 40).Draw(t, "steps") {
			if rapid.IntRange(0, 9).Draw(t, "waits") == 0 {
				now, aged = now.Add(age), true
			}
			id := rapid.Int64Range(first, last).Draw(t, "id")
			e.release(t, c, id)
			gone[id] = true
			block := id / 4096
			highest[block] = max(highest[block], id)
			if lowest[block] == 0 {
				lowest[block] = id
			}
			lowest[block] = min(lowest[block], id)
			check()
		}
	})
}

// A replica whose stock of ids is so old that the gap which it lies in was closed takes
// fresh ones for the files that a segment loses.
func TestStockInAClosedGap(t *testing.T) {
	now := time.Unix(1e9, 0)
	kv := memory.New(memory.Options{})
	options := catalog.Options{
		KV: kv, Now: func() time.Time { return now }, Rand: rand.Reader, HasStore: func(string) bool { return true },
		MaxGoneRanges: 3, GoneGapAge: time.Hour,
	}
	other := catalog.New(options)
	e := &env{Catalog: catalog.New(options), kv: kv}
	before, err := other.AllocateIDs(t.Context(), request.Token{}, 10)
	if err != nil {
		t.Fatal(err)
	}
	if e.col, err = e.CreateCollection(t.Context(), request.Token{}, spec("c")); err != nil { // takes a stock
		t.Fatal(err)
	}
	e.ref = catalog.Ref{ID: e.col.ID}
	after, err := other.AllocateIDs(t.Context(), request.Token{}, 10)
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range []int64{before.First, before.First + 2, before.First + 4, after.First + 2, after.First + 4} {
		e.release(t, other, id)
	}
	now = now.Add(2 * time.Hour)
	e.release(t, other, after.First+6)
	id := after.First + 8
	s := e.add(t, id)[0]
	taken := catalog.FilePath{Root: s.Files[0].Root, Path: s.Files[0].Path}
	if err := e.change(t.Context(), catalog.SegmentChange{Update: []catalog.Update{{
		Segment:     id,
		RemoveFiles: []catalog.FilePath{taken},
	}}}); err != nil {
		t.Fatal(err)
	}
	units := unitIDs(e.units(t))
	if len(units) != 1 || units[0] <= id {
		t.Errorf("units %v, want one with a fresh id", units)
	}
	_, _, err = e.AddSegments(t.Context(), e.col.ID, e.segments([]int64{before.First + 1}))
	if !errors.Is(err, catalog.ErrIDUsed) {
		t.Errorf("an id of the caller's in the gap: %v", err)
	}
}

// The record of a block stays small, however its ids go.
func TestGoneIsSmall(t *testing.T) {
	kv := memory.New(memory.Options{})
	c := catalog.New(catalog.Options{KV: kv, Now: time.Now})
	e := &env{Catalog: c, kv: kv}
	for id := int64(4096); id < 8192; id += 2 * 50 {
		var ids []int64
		for i := id; i < min(id+100, 8192); i += 2 {
			ids = append(ids, i)
		}
		e.release(t, c, ids...)
	}
	kv1, _, _, err := kv.Get(t.Context(), keys.Gone(1))
	if err != nil || len(kv1.Value) > 8<<10 {
		t.Errorf("the worst block takes %d bytes, err = %v", len(kv1.Value), err)
	}
	for id := int64(4097); id < 8192; id += 2 * 50 {
		var ids []int64
		for i := id; i < min(id+100, 8192); i += 2 {
			ids = append(ids, i)
		}
		e.release(t, c, ids...)
	}
	if kv1, _, _, err = kv.Get(t.Context(), keys.Gone(1)); err != nil || len(kv1.Value) > 20 {
		t.Errorf("a block that is gone whole takes %d bytes, err = %v", len(kv1.Value), err)
	}
}

// A late repeat of a registration is refused, by each of the calls that register,
// while ids beside it may be registered in any order; a late repeat of a drop is
// success.
func TestLateRepeat(t *testing.T) {
	e := newEnv(t, memory.New(memory.Options{}))
	ids := e.ids(t, 10)
	e.add(t, ids[4], ids[6])
	for _, id := range []int64{ids[4], ids[6]} {
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Segment(e.col.ID, id))}}); err != nil {
			t.Fatal(err)
		}
	}
	e.release(t, e.Catalog, ids[4], ids[6])
	for _, id := range []int64{ids[4], ids[6]} {
		e.refused(t, fmt.Sprint("segment ", id), catalog.ErrIDUsed, func() error {
			_, _, err := e.AddSegments(t.Context(), e.col.ID, e.segments([]int64{id}))
			return err
		})
		e.refused(t, fmt.Sprint("output ", id), catalog.ErrIDUsed, func() error {
			return e.change(t.Context(), catalog.SegmentChange{Add: e.segments([]int64{id})})
		})
	}
	e.add(t, ids[9])
	e.add(t, ids[5], ids[0])
	if n, err := e.DropSegments(t.Context(), e.ref, []int64{ids[4], ids[5], ids[6]}); n != 1 || err != nil {
		t.Errorf("dropped %d, err = %v; want the one that is there", n, err)
	}
	if n, err := e.DropSegments(t.Context(), e.ref, []int64{ids[4]}); n != 0 || err != nil {
		t.Errorf("dropped %d, err = %v", n, err)
	}
	if _, err := e.DropSegments(t.Context(), e.ref, []int64{ids[4], ids[7]}); !errors.Is(err, catalog.ErrSegmentNotFound) {
		t.Errorf("one that never was: %v", err)
	}
}
