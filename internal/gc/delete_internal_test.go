package gc

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// Records are found among others at any distance, and missing ones are left empty.
func TestReadMany(t *testing.T) {
	kv := metamemory.New(metamemory.Options{Now: time.Now})
	key := func(i int) string { return fmt.Sprintf("/k/%03d", i) }
	for from := 0; from < 200; from += 100 {
		var txn meta.Txn
		for i := from; i < from+100; i++ {
			if i%7 != 0 {
				txn.Then = append(txn.Then, meta.Put(key(i), []byte(strconv.Itoa(i))))
			}
		}
		if _, err := kv.Txn(t.Context(), txn); err != nil {
			t.Fatal(err)
		}
	}
	for _, step := range []int{1, 2, 5, 7, 40} {
		for first := range 3 {
			var wanted, want []string
			for i := first; i < 200 && len(wanted) < 60; i += step {
				wanted = append(wanted, key(i))
				if i%7 == 0 {
					want = append(want, "")
				} else {
					want = append(want, strconv.Itoa(i))
				}
			}
			kvs, err := readMany(t.Context(), kv, wanted)
			if err != nil {
				t.Fatal(err)
			}
			got := make([]string, len(kvs))
			for i, kv := range kvs {
				if got[i] = string(kv.Value); kv.Key != "" && kv.Key != wanted[i] {
					t.Errorf("place of %s: got %s", wanted[i], kv.Key)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("each %dth from %d on: (-want +got)\n%s", step, first, diff)
			}
		}
	}
}

// grantThree grants three units to snapshotd, and returns the keys of their tombstones,
// in order.
func (e *env) grantThree() []string {
	e.t.Helper()
	var asks []Ask
	var list []string
	for range 3 {
		unit, _ := e.dropped()
		asks = append(asks, Ask{Segment: unit})
		list = append(list, keys.Tombstone(e.col.ID, unit))
	}
	answers, err := e.replicas[0].Reclaim(e.t.Context(), e.ref, asks, BySnapshotd, "test")
	e.must(err)
	for _, a := range answers {
		if a.State != Granted {
			e.t.Fatalf("got %+v", a)
		}
	}
	virtual.Wait()
	return list
}

// pendingKeys returns the keys of the tombstones that a batch reads.
func (e *env) pendingKeys(list []string) (got []string) {
	e.t.Helper()
	units, _, unreadable, err := e.replicas[0].readPending(e.t.Context(), list)
	e.must(err)
	if len(unreadable) > 0 {
		e.t.Error(unreadable)
	}
	for _, u := range units {
		got = append(got, u.kv.Key)
		if u.tombstone.Unit.Segment.Files == nil {
			e.t.Errorf("%s has no files", u.kv.Key)
		}
	}
	return got
}

// The records of tombstones are cached, and not used after they have changed.
func TestCachedTombstones(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		mirror := e.replicas[0].tombstones
		list := e.grantThree()
		if mirror.cached(list) == nil || mirror.size == 0 {
			t.Error("the records are not cached")
		}
		e.replicas[0].kv.FailNth(0, meta.Before, meta.MethodRange) // no read expected
		if diff := cmp.Diff(list, e.pendingKeys(list)); diff != "" {
			t.Error(diff)
		}
		e.replicas[0].kv.Hook(nil)
		_, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(list[1])}})
		e.must(err)
		if diff := cmp.Diff([]string{list[0], list[2]}, e.pendingKeys(list)); diff != "" {
			t.Error(diff)
		}
		virtual.Wait()
		_, err = e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(list[0]), meta.Delete(list[2])}})
		e.must(err)
		virtual.Wait()
		if mirror.size != 0 || len(mirror.owned) != 0 {
			t.Errorf("%d bytes of %d removed records are cached", mirror.size, len(mirror.owned))
		}
	})
}

// Without space in the cache the records are read.
func TestUncachedTombstones(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		mirror := e.replicas[0].tombstones
		mirror.mu.Lock()
		mirror.size = cachedBytes
		mirror.mu.Unlock()
		list := e.grantThree()
		if mirror.cached(list) != nil {
			t.Error("cached beyond the limit")
		}
		if diff := cmp.Diff(list, e.pendingKeys(list)); diff != "" {
			t.Error(diff)
		}
		for i, want := range []bool{true, false, false} {
			collection, until := e.col.ID, time.Now()
			switch i {
			case 1:
				until = until.Add(-time.Second)
			case 2:
				collection++
			}
			if found, err := mirror.hasOwned(collection, until); found != want || err != nil {
				t.Errorf("%d: found %v, %v", i, found, err)
			}
		}
		if n := e.replicas[0].Stats().Granted; n != len(list) || mirror.size != cachedBytes {
			t.Errorf("%d granted, %d bytes", n, mirror.size)
		}
	})
}

// A batch with known record keys does not grant a unit with a tombstone of another unit
// under its id.
func TestDecideBatchForeignTombstone(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		unit, key := e.dropped()
		other, _ := e.dropped()
		tomb := keys.Tombstone(e.col.ID, unit)
		before, _, _, err := e.kv.Get(t.Context(), key)
		e.must(err)
		rec := &storagev1.Unit{}
		e.must(record.Decode(before, rec))
		_, err = e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(tomb, record.Encode(&storagev1.Tombstone{
			Format: record.Format, Unit: rec, Deleter: uint32(ByCaller), GrantTime: 1,
		}))}})
		e.must(err)
		virtual.Wait()
		answers, err := e.replicas[0].DecideBatch(t.Context(), &e.col, []Target{{Unit: unit}, {Unit: other}}, keys.Unit,
			&Grantee{Deleter: BySnapshotd, Caller: "test"})
		if err != nil || answers[0].State != Dropped || answers[0].Holders != 1 || answers[1].State != Granted {
			t.Errorf("got %+v, %v", answers, err)
		}
		after, found, _, err := e.kv.Get(t.Context(), key)
		if err != nil || !found || after.ModRevision != before.ModRevision {
			t.Errorf("the unit was changed: %v", err)
		}
		virtual.Wait()
		if got := e.replicas[0].tombstones.untried(nil); !slices.Equal(got, []string{keys.Tombstone(e.col.ID, other)}) {
			t.Errorf("granted to snapshotd: %v", got)
		}
	})
}

// An unreadable tombstone is skipped and reported to waiting calls, and does not hold up
// others.
func TestUnreadableTombstones(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		list := e.grantThree()
		kv, _, _, err := e.kv.Get(t.Context(), list[1])
		e.must(err)
		rec := &storagev1.Tombstone{}
		e.must(record.Decode(kv, rec))
		rec.Unit.Segment = nil // its head can be read, the unit cannot
		for _, value := range [][]byte{record.Encode(rec), []byte("x")} {
			_, err = e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(list[1], value)}})
			e.must(err)
			virtual.Wait()
			units, _, unreadable, err := r.readPending(t.Context(), list)
			e.must(err)
			if len(units) != 2 || len(unreadable) != 1 {
				t.Errorf("%d units, unreadable %v", len(units), unreadable)
			}
			if got := r.tombstones.untried(nil); !slices.Equal(got, []string{list[0], list[2]}) {
				t.Errorf("to be deleted: %v", got)
			}
			err = r.AwaitDeleted(t.Context(), catalog.Ref{}, time.Now())
			if !errors.Is(err, record.ErrUnreadable) ||
				!strings.Contains(err.Error(), list[1]) && !strings.Contains(err.Error(), "unit") {
				t.Errorf("err = %v", err)
			}
		}
		_, err = e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
			meta.Delete(list[0]), meta.Delete(list[1]), meta.Delete(list[2]),
		}})
		e.must(err)
		if err := r.AwaitDeleted(t.Context(), catalog.Ref{}, time.Now()); err != nil || r.tombstones.size != 0 {
			t.Errorf("%v, %d bytes", err, r.tombstones.size)
		}
	})
}

// Large tombstones, whose records no batch reads at once, are all deleted in one pass.
func TestLargeTombstonesInOnePass(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		r.tombstones.mu.Lock()
		r.tombstones.size = cachedBytes
		r.tombstones.mu.Unlock()
		const n = 20
		for range n {
			for _, key := range e.grantThree() {
				kv, _, _, err := e.kv.Get(t.Context(), key)
				e.must(err)
				rec := &storagev1.Tombstone{}
				e.must(record.Decode(kv, rec))
				rec.Unit.Segment.EngineData = make([]byte, recordBytes/recordsPerRead+1)
				_, err = e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, record.Encode(rec))}})
				e.must(err)
			}
		}
		virtual.Wait()
		if got := len(r.tombstones.untried(nil)); got != 3*n {
			t.Fatalf("%d tombstones, want %d", got, 3*n)
		}
		e.must(r.deletePass(t.Context(), meta.Absent("/none")))
		virtual.Wait()
		if left := r.tombstones.untried(nil); len(left) > 0 {
			t.Errorf("a pass left %d of %d tombstones: %v", len(left), 3*n, left)
		}
	})
}
