package catalog_test

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// before is a catalog of two collections as a release left it that claimed no ids.
type before struct {
	*env
	other catalog.Collection
	ids   []int64
}

func (b *before) put(t *testing.T, ops ...meta.Op) {
	t.Helper()
	if _, err := b.kv.Txn(t.Context(), meta.Txn{Then: ops}); err != nil {
		t.Fatal(err)
	}
}

// segment puts a segment of a collection with files at paths.
func (b *before) segment(t *testing.T, collection, id int64, paths ...string) {
	t.Helper()
	s := segment.Segment{ID: id, Level: 1, State: segment.Flushed}
	for _, path := range paths {
		s.Files = append(s.Files, segment.File{Kind: "k", Path: path})
	}
	ops, err := catalog.SegmentOps(collection, &s, "op")
	if err != nil {
		t.Fatal(err)
	}
	b.put(t, ops[0])
}

func newBefore(t *testing.T, kv meta.KV) *before {
	b := &before{env: newEnv(t, kv)}
	var err error
	if b.other, err = b.CreateCollection(t.Context(), request.Token{}, spec("other")); err != nil {
		t.Fatal(err)
	}
	b.ids = b.ids0(t)
	a, o := b.col.ID, b.other.ID
	at := func(collection, id int64) string { return fmt.Sprintf("%d/0/%d/k/0/1", collection, id) }
	i := b.ids
	b.segment(t, a, i[0], at(a, i[0])) // in both
	b.segment(t, o, i[0], at(o, i[0]))
	b.segment(t, a, i[1], at(a, i[1])) // as it should be
	b.segment(t, a, i[2], at(a, i[2])) // the other collection has its file, too
	b.segment(t, o, i[3], at(o, i[3]), at(a, i[2]))
	b.segment(t, o, i[4], at(a, i[5])) // at the place of one that is not there
	for n, disputed := range map[int]string{6: at(a, i[6]), 7: at(o, i[7])} {
		s := segment.Segment{ID: i[n], Level: 1, State: segment.Flushed, Files: []segment.File{{Kind: "k", Path: disputed}}}
		collection := map[int]int64{6: a, 7: o}[n]
		ops, err := catalog.SegmentOps(collection, &s, "op")
		if err != nil {
			t.Fatal(err)
		}
		rec := &storagev1.Segment{}
		if err := record.Decode(meta.KeyValue{Value: ops[0].Value}, rec); err != nil {
			t.Fatal(err)
		}
		unit := &storagev1.Unit{Format: record.Format, Kind: 1, SegmentId: s.ID, Segment: rec}
		if n == 6 {
			b.put(t, meta.Put(keys.Unit(a, s.ID), record.Encode(unit)))
			continue
		}
		b.put(t, meta.Put(keys.Tombstone(o, s.ID), record.Encode(&storagev1.Tombstone{
			Format: record.Format, Unit: unit,
			Deleter: 1,
		})))
		b.segment(t, a, s.ID, at(a, s.ID)) // and it lives in another
	}
	return b
}

func (b *before) ids0(t *testing.T) []int64 { return b.env.ids(t, 10) }

// owned says of each segment whether its file is owned.
func (b *before) owned(t *testing.T) map[string]bool {
	t.Helper()
	got := map[string]bool{}
	for _, col := range []int64{b.col.ID, b.other.ID} {
		if _, err := b.ScanSegments(t.Context(), col, 0, func(batch []segment.Segment) error {
			for i := range batch {
				s := &batch[i]
				got[fmt.Sprintf("%d/%d", col, s.ID)] = catalog.Owns(col, s, s.Files[0].Path)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		for _, prefix := range []string{keys.UnitPrefix(col), keys.TombstonePrefix(col)} {
			from, to := meta.Prefix(prefix)
			res, err := b.kv.Range(t.Context(), meta.Range{From: from, To: to})
			if err != nil {
				t.Fatal(err)
			}
			for _, kv := range res.KVs {
				u, err := b.ReadUnit(t.Context(), col, kv)
				if err != nil {
					t.Fatal(err)
				}
				n := 0
				for range u.Owned() {
					n++
				}
				got[fmt.Sprintf("%d/%d unit", col, u.ID)] = n == 1
			}
		}
	}
	return got
}

// What was registered before ids were claimed gets its claims, whichever call of
// the upgrade fails; what two collections claim neither owns.
func TestClaimAll(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n := 0; ; n++ {
			f := meta.NewFaulty(memory.New(memory.Options{}))
			b := newBefore(t, f)
			a, o, i := b.col.ID, b.other.ID, b.ids
			f.FailNth(n, fault)
			disputes, err := b.ClaimAll(t.Context())
			fired := f.Fired() > 0
			f.Hook(nil)
			if err != nil && (!fired || !errors.Is(err, meta.ErrUnavailable)) {
				t.Fatalf("fault %d in call %d: %v", fault, n, err)
			}
			if err != nil {
				if disputes, err = b.ClaimAll(t.Context()); err != nil {
					t.Fatalf("fault %d in call %d: %v", fault, n, err)
				}
			}
			if !fired {
				want := []catalog.Dispute{
					{ID: i[0], Collections: []int64{a, o}},
					{ID: i[2], Collections: []int64{a, o}},
					{ID: i[5], Collections: []int64{o}},
					{ID: i[7], Collections: []int64{a, o}},
				}
				if diff := cmp.Diff(want, disputes); diff != "" {
					t.Errorf("disputes (-want +got):\n%s", diff)
				}
			}
			key := func(col int64, n int, what string) string { return fmt.Sprintf("%d/%d%s", col, i[n], what) }
			want := map[string]bool{
				key(a, 0, ""): false, key(o, 0, ""): false, key(a, 1, ""): true, key(a, 2, ""): false, key(o, 3, ""): true,
				key(o, 4, ""): false, key(a, 6, " unit"): true, key(o, 7, " unit"): false, key(a, 7, ""): false,
			}
			if diff := cmp.Diff(want, b.owned(t)); diff != "" {
				t.Errorf("fault %d in call %d: owned (-want +got):\n%s", fault, n, diff)
			}
			for _, id := range []int{0, 1, 2, 3, 4, 5, 6, 7} {
				s := b.makeSegment(i[id], 1)
				for _, col := range []int64{a, o} {
					s.Files[0].Path = catalog.NativePath(col, &s, &s.Files[0])
					_, _, err := b.AddSegments(t.Context(), col, []segment.Segment{s})
					if !errors.Is(err, catalog.ErrIDOwned) && !errors.Is(err, catalog.ErrSegmentExists) {
						t.Errorf("fault %d in call %d: segment %d may be registered in %d: %v", fault, n, id, col, err)
					}
				}
			}
			if again, err := b.ClaimAll(t.Context()); err != nil || len(again) > 0 {
				t.Errorf("again: %v, err = %v", again, err)
			}
			if t.Failed() || !fired {
				break
			}
		}
	}
}
