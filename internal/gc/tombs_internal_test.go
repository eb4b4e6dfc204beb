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

// Records are found wherever they lie among others, and those that are not there
// are left empty.
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
					t.Errorf("at the place of %s is %s", wanted[i], kv.Key)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("each %dth from %d on: (-want +got)\n%s", step, first, diff)
			}
		}
	}
}

// granted3 grants three units to snapshotd, and returns the keys of their
// tombstones, in order.
func (l *lot) granted3() []string {
	l.t.Helper()
	var asks []Ask
	var list []string
	for range 3 {
		unit, _ := l.dropped()
		asks = append(asks, Ask{Segment: unit})
		list = append(list, keys.Tomb(l.col.ID, unit))
	}
	answers, err := l.replicas[0].Reclaim(l.t.Context(), l.ref, asks, BySnapshotd, "test")
	l.must(err)
	for _, a := range answers {
		if a.State != Granted {
			l.t.Fatalf("got %+v", a)
		}
	}
	virtual.Wait()
	return list
}

// doomedKeys are the tombstones that a batch is about.
func (l *lot) doomedKeys(list []string) (got []string) {
	l.t.Helper()
	units, _, unreadable, err := l.replicas[0].readDoomed(l.t.Context(), list)
	l.must(err)
	if len(unreadable) > 0 {
		l.t.Error(unreadable)
	}
	for _, u := range units {
		got = append(got, u.kv.Key)
		if u.tombstone.Unit.Segment.Files == nil {
			l.t.Errorf("%s has no files", u.kv.Key)
		}
	}
	return got
}

// The records of tombstones are kept, and not relied upon once they have changed.
func TestKeptTombstones(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		tombs := l.replicas[0].tombs
		list := l.granted3()
		if tombs.kept(list) == nil || tombs.size == 0 {
			t.Error("the records were not kept")
		}
		l.replicas[0].kv.FailNth(0, meta.Before, meta.MethodRange) // it must not be read
		if diff := cmp.Diff(list, l.doomedKeys(list)); diff != "" {
			t.Error(diff)
		}
		l.replicas[0].kv.Hook(nil)
		_, err := l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(list[1])}})
		l.must(err)
		if diff := cmp.Diff([]string{list[0], list[2]}, l.doomedKeys(list)); diff != "" {
			t.Error(diff)
		}
		virtual.Wait()
		_, err = l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(list[0]), meta.Delete(list[2])}})
		l.must(err)
		virtual.Wait()
		if tombs.size != 0 || len(tombs.ours) != 0 {
			t.Errorf("%d bytes of %d records are kept of nothing", tombs.size, len(tombs.ours))
		}
	})
}

// Where there is no room to keep them, the records are read.
func TestTombstonesThatAreNotKept(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		tombs := l.replicas[0].tombs
		tombs.mu.Lock()
		tombs.size = keptBytes
		tombs.mu.Unlock()
		list := l.granted3()
		if tombs.kept(list) != nil {
			t.Error("there was no room")
		}
		if diff := cmp.Diff(list, l.doomedKeys(list)); diff != "" {
			t.Error(diff)
		}
		for i, want := range []bool{true, false, false} {
			collection, until := l.col.ID, time.Now()
			switch i {
			case 1:
				until = until.Add(-time.Second)
			case 2:
				collection++
			}
			if waits, err := tombs.waiting(collection, until); waits != want || err != nil {
				t.Errorf("%d: waits %v, %v", i, waits, err)
			}
		}
		if n := l.replicas[0].Stats().Granted; n != len(list) || tombs.size != keptBytes {
			t.Errorf("%d granted, %d bytes", n, tombs.size)
		}
	})
}

// A round does not grant what has a tombstone of something else under its id.
func TestRoundAndForeignTombstone(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		unit, key := l.dropped()
		other, _ := l.dropped()
		tomb := keys.Tomb(l.col.ID, unit)
		before, _, _, err := l.kv.Get(t.Context(), key)
		l.must(err)
		rec := &storagev1.Unit{}
		l.must(record.Decode(before, rec))
		_, err = l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(tomb, record.Encode(&storagev1.Tombstone{
			Format: record.Format, Unit: rec, Deleter: uint32(ByCaller), GrantTime: 1,
		}))}})
		l.must(err)
		virtual.Wait()
		var none time.Duration
		s, err := l.replicas[0].Collect(t.Context(), CollectOptions{Collection: catalog.Ref{ID: l.col.ID}, Tolerance: &none})
		if err != nil || s.Granted != 1 || s.Held != 1 {
			t.Errorf("got %+v, %v", s, err)
		}
		after, found, _, err := l.kv.Get(t.Context(), key)
		if err != nil || !found || after.ModRevision != before.ModRevision {
			t.Errorf("the unit was touched: %v", err)
		}
		virtual.Wait()
		if got := l.replicas[0].tombs.work(nil); !slices.Equal(got, []string{keys.Tomb(l.col.ID, other)}) {
			t.Errorf("granted to snapshotd: %v", got)
		}
	})
}

// A tombstone that cannot be read is left alone, is told to who waits, and keeps no
// other from its end.
func TestUnreadableTombstones(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		list := l.granted3()
		kv, _, _, err := l.kv.Get(t.Context(), list[1])
		l.must(err)
		rec := &storagev1.Tombstone{}
		l.must(record.Decode(kv, rec))
		rec.Unit.Segment = nil // its head can be read, the unit cannot
		for _, value := range [][]byte{record.Encode(rec), []byte("x")} {
			_, err = l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(list[1], value)}})
			l.must(err)
			virtual.Wait()
			units, _, unreadable, err := r.readDoomed(t.Context(), list)
			l.must(err)
			if len(units) != 2 || len(unreadable) != 1 {
				t.Errorf("%d units, unreadable %v", len(units), unreadable)
			}
			if got := r.tombs.work(nil); !slices.Equal(got, []string{list[0], list[2]}) {
				t.Errorf("to be worked off: %v", got)
			}
			if err := r.AwaitDeleted(t.Context(), 0, time.Now()); !errors.Is(err, record.ErrUnreadable) || !strings.Contains(err.Error(), list[1]) && !strings.Contains(err.Error(), "unit") {
				t.Errorf("err = %v", err)
			}
		}
		_, err = l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(list[0]), meta.Delete(list[1]), meta.Delete(list[2])}})
		l.must(err)
		if err := r.AwaitDeleted(t.Context(), 0, time.Now()); err != nil || r.tombs.size != 0 {
			t.Errorf("%v, %d bytes", err, r.tombs.size)
		}
	})
}

// Large tombstones, whose records no batch reads at once, are all worked off in one
// pass.
func TestLargeTombstonesInOnePass(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		r.tombs.mu.Lock()
		r.tombs.size = keptBytes
		r.tombs.mu.Unlock()
		const n = 20
		for range n {
			for _, key := range l.granted3() {
				kv, _, _, err := l.kv.Get(t.Context(), key)
				l.must(err)
				rec := &storagev1.Tombstone{}
				l.must(record.Decode(kv, rec))
				rec.Unit.Segment.EngineData = make([]byte, doomedBytes/doomedReads+1)
				_, err = l.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, record.Encode(rec))}})
				l.must(err)
			}
		}
		virtual.Wait()
		if got := len(r.tombs.work(nil)); got != 3*n {
			t.Fatalf("%d tombstones, want %d", got, 3*n)
		}
		l.must(r.deletePass(t.Context(), meta.Absent("/none")))
		virtual.Wait()
		if left := r.tombs.work(nil); len(left) > 0 {
			t.Errorf("a pass left %d of %d tombstones: %v", len(left), 3*n, left)
		}
	})
}
