package manager

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// scanHook calls after with the start key of each scan that found keys.
type scanHook struct {
	meta.KV
	after func(from string)
}

func (h *scanHook) Scan(
	ctx context.Context, from, to string, rev int64, fn func([]meta.KeyValue) error,
) (int64, error) {
	return h.KV.Scan(ctx, from, to, rev, func(b []meta.KeyValue) error {
		if h.after != nil {
			h.after(from)
		}
		return fn(b)
	})
}

// dropMany registers n segments and drops some of them.
func (e *env) dropMany(r *testReplica, col catalog.Collection, n, drop int) {
	e.t.Helper()
	var ids []int64
	var list []segment.Segment
	for i := range n {
		s := e.segment(r, col, 0, segment.Timestamp(i*10+1), segment.Timestamp(i*10+9))
		list, ids = append(list, s), append(ids, s.ID)
	}
	e.addWritten(r, col, list...)
	for part := range slices.Chunk(ids[:drop], catalog.MaxSegmentChange) {
		e.dropSegments(r, col, part...)
	}
}

// TestFinishPartitionDuringConcurrentDrop checks that the concurrent drop and reclaim
// of one segment of a dropped partition does not leave the other segments.
func TestFinishPartitionDuringConcurrentDrop(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		hook := &scanHook{}
		r := e.start("a", func(o *testOptions) {
			o.Parts.Collector.Off = true
			hook.KV = o.KV
			o.KV = hook
			o.Catalog = catalog.New(catalog.Options{
				KV: hook, Now: e.now, Rand: o.Rand, Requests: o.Requests,
				HasStore: func(a string) bool { return a == "default" }, ReadSpilled: catalog.ReadSpilled(o.Stores),
			})
		})
		col, p, _ := e.collection(r, "c")
		var list []segment.Segment
		for i := range 10 {
			s := e.segment(r, col, 0, segment.Timestamp(i*10+1), segment.Timestamp(i*10+9))
			s.Partition = p.ID
			s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
			list = append(list, s)
		}
		e.addWritten(r, col, list...)
		if _, err := r.catalog.DropPartition(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, "p0"); err != nil {
			t.Fatal(err)
		}
		hook.after = func(from string) {
			if strings.HasPrefix(from, keys.SegmentPrefix(col.ID)) {
				hook.after = nil
				asks := e.dropSegments(r, col, list[3].ID)
				e.granted(e.reclaim(r, col, gc.ByCaller, asks...))
				if _, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{list[3].ID}); err != nil {
					t.Fatal(err)
				}
			}
		}
		for range 2 {
			e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		}
		if n := len(e.keysUnder(keys.SegmentPrefix(col.ID))); n > 0 {
			t.Errorf("%d live segments are left of the dropped partition, whose record is there %d times",
				n, len(e.keysUnder(keys.PartitionPrefix(col.ID))))
		}
	})
}

// TestFinishIndexOfADroppedPartition checks that an index is finished before a
// partition that was also dropped, and that the partition's remains do not hold it.
func TestFinishIndexOfADroppedPartition(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, p, x := e.collection(r, "c")
		var list []segment.Segment
		for i := range 10 {
			s := e.segment(r, col, 0, segment.Timestamp(i*10+1), segment.Timestamp(i*10+9))
			if i%2 == 0 {
				s.Partition = p.ID
				s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
			}
			b := segment.Build{ID: e.newID(r), Index: x.ID}
			b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/0", b.ID), Size: 7, LogID: 1}}
			s.Builds = []segment.Build{b}
			list = append(list, s)
		}
		e.addWritten(r, col, list...)
		ref := catalog.Ref{ID: col.ID}
		if _, err := r.catalog.DropPartition(t.Context(), request.Token{}, ref, "p0"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.catalog.DropIndex(t.Context(), request.Token{}, ref, "x0"); err != nil {
			t.Fatal(err)
		}
		n, err := r.catalog.FinishChild(t.Context(), catalog.Child{Collection: col.ID, ID: x.ID, Name: "x0", Index: true})
		if err != nil || n != 10 {
			t.Errorf("%d units, err = %v", n, err)
		}
		if n := len(e.keysUnder(keys.IndexPrefix(col.ID))); n != 0 {
			t.Errorf("%d records of indexes are left", n)
		}
		for range 2 {
			e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		}
		segs, parts := len(e.keysUnder(keys.SegmentPrefix(col.ID))),
			len(e.keysUnder(keys.PartitionPrefix(col.ID)))
		if segs != 5 || parts != 0 {
			t.Errorf("%d live segments and %d partitions, want 5 and 0", segs, parts)
		}
	})
}

// TestCollectorWithFastClock checks that a replica with a fast clock judges the
// tolerance by the object store's clock.
func TestCollectorWithFastClock(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		e.start("engine-side", func(o *testOptions) { o.Parts.Collector.Off = true }).stop()
		r := e.start("a", func(o *testOptions) { now := o.Now; o.Now = func() time.Time { return now().Add(4 * time.Hour) } })
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 9)
		e.addWritten(r, col, s)
		e.dropSegments(r, col, s.ID)
		time.Sleep(2 * time.Minute)
		settle()
		if n := e.objectsUnder("data/"); len(n) == 0 {
			t.Error("the files of a segment that was dropped two minutes ago are gone")
		}
		if last := r.Collector.LastCycle(); last == nil || last.Error != "" {
			t.Errorf("the round says %+v", last)
		}
		time.Sleep(3 * time.Hour)
		settle()
		if n := e.objectsUnder("data/"); len(n) != 0 {
			t.Errorf("the files of a segment that was dropped three hours ago are there: %v", n)
		}
	})
}

// TestCollectorAndUnreadableRecords checks that an unreadable record blocks only its
// own subject and is reported.
func TestCollectorAndUnreadableRecords(t *testing.T) {
	for name, damage := range map[string]func(e *env, r *testReplica, bad catalog.Collection, p catalog.Partition){
		"partition": func(e *env, _ *testReplica, bad catalog.Collection, p catalog.Partition) {
			e.put(keys.Partition(bad.ID, p.ID), []byte{0xff})
		},
		"collection": func(e *env, _ *testReplica, bad catalog.Collection, _ catalog.Partition) {
			e.put(keys.Collection(bad.ID), []byte{0xff})
		},
		"tombstone": func(e *env, r *testReplica, bad catalog.Collection, _ catalog.Partition) {
			e.put(keys.Tombstone(bad.ID, e.newID(r)), record.Encode(&storagev1.Tombstone{
				Format: record.Format, Deleter: 1, Unit: &storagev1.Unit{Format: record.Format, Kind: 1},
			}))
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
				bad, p, _ := e.collection(r, "bad")
				good, _, _ := e.collection(r, "good")
				one, two, three := e.segment(r, bad, 0, 1, 9), e.segment(r, good, 0, 1, 9), e.segment(r, good, 0, 11, 19)
				e.addWritten(r, bad, one)
				e.addWritten(r, good, two, three)
				r.store.Plan(func(c object.Call) object.Fault {
					if c.Op == object.OpDelete {
						return object.FaultBefore
					}
					return object.FaultNone
				})
				e.granted(e.reclaim(r, bad, gc.BySnapshotd, e.dropSegments(r, bad, one.ID)...))
				e.granted(e.reclaim(r, good, gc.BySnapshotd, e.dropSegments(r, good, two.ID)...))
				settle()
				damage(e, r, bad, p)
				r.store.Plan(nil)
				e.dropSegments(r, good, three.ID)
				time.Sleep(4 * time.Hour)
				settle()
				var want []string
				if name == "collection" { // the place of its files is unknown
					want = []string{"data/" + one.Files[0].Path}
				}
				if diff := cmp.Diff(want, e.objectsUnder("data/")); diff != "" {
					t.Errorf("files:\n%s", diff)
				}
				if l := r.Collector.LastCycle(); l.Error == "" {
					t.Error("the rounds say nothing of it")
				}
			})
		})
	}
}

// TestCollectorSpillsWhereItStops checks that units kept by a stop are spilled, so that
// etcd does not grow.
func TestCollectorSpillsWhereItStops(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := e.collection(r, "c")
		held := e.segment(r, col, 0, 1, 20)
		held.EngineData = bytes.Repeat([]byte{1}, 1000)
		e.addWritten(r, col, held)
		e.checkpoint(r, col, 100, 100)
		e.create(r, col, "one")
		e.dropSegments(r, col, held.ID)
		e.dropMany(r, col, 140, 120)
		time.Sleep(3 * time.Hour)
		settle()
		l := r.Collector.LastCycle()
		if l.Spilled != 1 {
			t.Errorf("stops %v, held %d, spilled %d", l.Stops, l.Held, l.Spilled)
		}
	})
}

// locked is a store with an object that cannot be deleted.
type locked struct {
	object.Store
	key atomic.Pointer[string]
}

func (l *locked) Delete(ctx context.Context, list ...string) error {
	held := l.key.Load()
	if held == nil {
		return l.Store.Delete(ctx, list...)
	}
	if err := l.Store.Delete(ctx,
		slices.DeleteFunc(slices.Clone(list), func(key string) bool { return key == *held })...); err != nil {
		return err
	}
	if slices.Contains(list, *held) {
		return &object.DeleteError{Key: *held, Err: object.ErrDenied}
	}
	return nil
}

// TestSweepAndLockedObject checks that an object that cannot be deleted does not stop a
// sweep.
func TestSweepAndLockedObject(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		var l *locked
		r := e.start("a", func(o *testOptions) {
			l = &locked{Store: o.Stores["default"]}
			o.Stores["default"] = l
		})
		var list []string
		for range 1200 {
			list = append(list, fmt.Sprintf("snapshots/5/%d/metadata.json", e.newID(r)))
		}
		list = append(list, catalog.SpillKey(5, e.newID(r)))
		for _, key := range list {
			e.putObject(key, []byte{1})
		}
		l.key.Store(&list[700])
		time.Sleep(26 * time.Hour)
		settle()
		if diff := cmp.Diff([]string{list[700]},
			append(e.objectsUnder("snapshots/"), e.objectsUnder("gc/held/")...)); diff != "" {
			t.Errorf("objects:\n%s", diff)
		}
		if text := r.Collector.SweepStats().Error; !strings.Contains(text, list[700]) {
			t.Errorf("the sweep says %q", text)
		}
	})
}
