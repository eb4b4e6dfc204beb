package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// round makes a round and waits for its deletes.
func (e *env) round(r *testReplica, o collect.CycleOptions) ([]collect.Item, collect.Summary) {
	e.t.Helper()
	var items []collect.Item
	o.Report = func(i collect.Item) error { items = append(items, i); return nil }
	s, err := r.Collect(e.t.Context(), o)
	if err != nil {
		e.t.Fatal(err)
	}
	settle()
	return items, s
}

// actionsOf returns the kinds and actions of items, in order.
func actionsOf(items []collect.Item) []string {
	var list []string
	for _, i := range items {
		list = append(list, fmt.Sprintf("%d %d %d", i.Kind, i.Action, i.ID))
	}
	slices.Sort(list)
	return list
}

func (e *env) drops(r *testReplica, col catalog.Collection) {
	e.t.Helper()
	if _, err := r.catalog.DropCollection(e.t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
		e.t.Fatal(err)
	}
}

// leftOf returns the keys of a collection that still exist.
func (e *env) leftOf(col catalog.Collection) []string {
	e.t.Helper()
	var list []string
	for _, key := range append(e.keysUnder("/catalog/"), e.keysUnder("/gc/")...) {
		if parts := strings.Split(key, "/"); len(parts) > 3 && parts[3] == keys.ID(col.ID) {
			list = append(list, key)
		}
	}
	return list
}

// TestCollectorWaits checks that the leader deletes dropped units after the tolerance
// and not before, and held units after the drop of their snapshot.
func TestCollectorWaits(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := e.collection(r, "c")
		free, held, lives := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 21, 40), e.segment(r, col, 0, 41, 60)
		e.addWritten(r, col, held, lives)
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "one")
		e.addWritten(r, col, free)
		e.dropSegments(r, col, free.ID, held.ID)
		before := e.objectsUnder("data/")
		time.Sleep(59 * time.Minute)
		settle()
		if diff := cmp.Diff(before, e.objectsUnder("data/")); diff != "" {
			t.Errorf("before the tolerance has passed:\n%s", diff)
		}
		time.Sleep(3 * time.Minute)
		settle()
		want := []string{"data/" + held.Files[0].Path, "data/" + lives.Files[0].Path}
		slices.Sort(want)
		if diff := cmp.Diff(want, e.objectsUnder("data/")); diff != "" {
			t.Errorf("after it:\n%s", diff)
		}
		e.dropSnapshot(r, s)
		time.Sleep(3 * time.Minute)
		settle()
		if diff := cmp.Diff([]string{"data/" + lives.Files[0].Path}, e.objectsUnder("data/")); diff != "" {
			t.Errorf("after the snapshot was dropped:\n%s", diff)
		}
		if left := append(e.keysUnder(keys.AllUnitsPrefix), e.keysUnder(keys.AllTombstonesPrefix)...); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		e.check(r)
	})
}

// TestCollectorAndDroppedCollection checks that all keys and files of a dropped
// collection are deleted, and that a snapshot of it can be restored before.
func TestCollectorAndDroppedCollection(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col := e.richCollection(r, "c", 6)
		s := e.create(r, col, "one")
		files := e.objectsUnder("data/")
		late := e.segment(r, col, 0, 1000, 1001) // not in the snapshot
		e.addWritten(r, col, late)
		e.drops(r, col)
		_, sum := e.round(r, collect.CycleOptions{})
		if sum.Granted != 0 || len(e.objectsUnder("data/")) != len(files)+1 {
			t.Errorf("before the tolerance: %+v", sum)
		}
		_, sum = e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		if sum.Granted != 1 || sum.Held != 6 || sum.Removed != 0 {
			t.Errorf("with a snapshot: %+v", sum)
		}
		if diff := cmp.Diff(files, e.objectsUnder("data/")); diff != "" {
			t.Errorf("files of the snapshot:\n%s", diff)
		}
		before := e.contents()
		sp := restoreSpecOf(s)
		e.checkRestored(r, before, e.mustComplete(r, sp), sp)

		e.dropSnapshot(r, s)
		settle()
		_, sum = e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		if sum.Granted != 6 {
			t.Errorf("without it: %+v", sum)
		}
		items, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		if sum.Removed != 1 || len(items) != 1 || items[0].Kind != collect.ItemCollection ||
			items[0].Action != collect.Deletes {
			t.Errorf("the collection itself: %+v, %+v", items, sum)
		}
		if left := e.leftOf(col); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		if _, err := r.catalog.Collection(t.Context(),
			catalog.Ref{ID: col.ID}); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("the collection: %v", err)
		}
	})
}

// TestCollectorFinishesPartitionsAndIndexes checks that a dropped partition drops its
// segments and a dropped index its builds.
func TestCollectorFinishesPartitionsAndIndexes(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, p, x := e.collection(r, "c")
		ref := catalog.Ref{ID: col.ID}
		var in, out []segment.Segment
		for i := range 70 {
			s := e.segment(r, col, 0, segment.Timestamp(i*10+1), segment.Timestamp(i*10+9))
			if i%2 == 0 {
				s.Partition = p.ID
			}
			s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
			b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
			b.Files = []segment.File{{
				Kind: segment.KindIndex,
				Path: fmt.Sprintf("%d/%d/%d/index/%d/f", col.ID, s.Partition, s.ID, b.ID), Size: 5,
			}}
			s.Builds = []segment.Build{b}
			if i%2 == 0 {
				in = append(in, s)
			} else {
				out = append(out, s)
			}
		}
		e.addWritten(r, col, append(slices.Clone(in), out...)...)
		e.checkpoint(r, col, 1000, 1000)
		s := e.create(r, col, "one")
		if _, err := r.catalog.DropPartition(t.Context(), request.Token{}, ref, "p0"); err != nil {
			t.Fatal(err)
		}
		if _, err := r.catalog.DropIndex(t.Context(), request.Token{}, ref, "x0"); err != nil {
			t.Fatal(err)
		}
		items, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration), DryRun: true})
		if diff := cmp.Diff([]string{fmt.Sprintf("4 1 %d", p.ID), fmt.Sprintf("5 1 %d", x.ID)},
			actionsOf(items)); diff != "" ||
			sum.Removed != 2 {
			t.Errorf("dry run: %+v\n%s", sum, diff)
		}
		if len(e.keysUnder(keys.PartitionPrefix(col.ID))) != 1 || len(e.keysUnder(keys.IndexPrefix(col.ID))) != 1 {
			t.Error("a dry run has changed something")
		}
		_, sum = e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		if sum.Removed != 2 || sum.Held != 0 || sum.Granted != 0 {
			t.Errorf("round: %+v", sum)
		}
		_, sum = e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		if sum.Removed != 0 || sum.Held != int64(len(in)+len(out)) || sum.Granted != 0 {
			t.Errorf("the next round: %+v", sum)
		}
		if len(e.keysUnder(keys.PartitionPrefix(col.ID))) != 0 || len(e.keysUnder(keys.IndexPrefix(col.ID))) != 0 {
			t.Error("the records stay")
		}
		e.dropSnapshot(r, s)
		settle()
		_, sum = e.round(r, collect.CycleOptions{Tolerance: new(time.Duration), Collection: ref, Force: true})
		if sum.Granted != int64(len(in)+len(out)) || sum.Files != int64(2*len(in)+len(out)) {
			t.Errorf("round: %+v", sum)
		}
		var want []string
		for _, s := range out {
			want = append(want, "data/"+s.Files[0].Path)
		}
		slices.Sort(want)
		if diff := cmp.Diff(want, e.objectsUnder("data/")); diff != "" {
			t.Errorf("files:\n%s", diff)
		}
	})
}

// TestCollectorStops checks that a round stops and reports it when it would delete too
// large a share of a collection in use, unless forced.
func TestCollectorStops(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "d")
		var ids []int64
		var list []segment.Segment
		for i := range 200 {
			s := e.segment(r, col, 0, segment.Timestamp(i*10+1), segment.Timestamp(i*10+9))
			list, ids = append(list, s), append(ids, s.ID)
		}
		e.addWritten(r, col, list...)
		small := e.segment(r, other, 0, 1, 2)
		e.addWritten(r, other, small)
		for part := range slices.Chunk(ids[:101], catalog.MaxSegmentChange) {
			e.dropSegments(r, col, part...)
		}
		e.dropSegments(r, other, small.ID)
		time.Sleep(62 * time.Minute)
		settle()
		if n := len(e.objectsUnder(fmt.Sprintf("data/%d/", col.ID))); n != 200 {
			t.Errorf("%d files are left of 200", n)
		}
		if n := len(e.objectsUnder(fmt.Sprintf("data/%d/", other.ID))); n != 0 {
			t.Error("it stopped in the other collection, too")
		}
		items, sum := e.round(r, collect.CycleOptions{})
		want := []collect.Stop{{Collection: col.ID, Eligible: 101, Total: 200}}
		if diff := cmp.Diff(want, sum.Stops); diff != "" || sum.StopCount != 1 || len(items) != 1 ||
			items[0].Action != collect.Stops {
			t.Errorf("%+v:\n%s", items, diff)
		}
		items, sum = e.round(r, collect.CycleOptions{DryRun: true})
		if diff := cmp.Diff(want, sum.Stops); diff != "" || sum.Granted != 0 || sum.Files != 0 ||
			sum.Stopped != 101 || len(items) != 102 {
			t.Errorf("a dry run: %d items, %+v:\n%s", len(items), sum, diff)
		}
		for _, i := range items {
			if i.Action != collect.Stops || i.Reason == "" || i.Kind != collect.ItemCollection &&
				(i.Files != 1 || len(i.Objects) != 1) {
				t.Errorf("a dry run reports %+v", i)
			}
		}
		if last := r.Collector.LastCycle(); last == nil || last.StopCount != 1 {
			t.Errorf("the leader's last round: %+v", last)
		}
		if _, sum = e.round(r, collect.CycleOptions{Collection: catalog.Ref{ID: col.ID}, Force: true}); sum.Granted != 101 {
			t.Errorf("with force: %+v", sum)
		}
		if n := len(e.objectsUnder(fmt.Sprintf("data/%d/", col.ID))); n != 99 {
			t.Errorf("%d files are left, want 99", n)
		}
	})
}

// TestCollectorDryRun checks that a dry run reports the action and reason for each unit
// and object, changes nothing, and matches the round that follows.
func TestCollectorDryRun(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		held, free, fresh := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 21, 40), e.segment(r, col, 0, 41, 60)
		e.addWritten(r, col, held, fresh)
		e.checkpoint(r, col, 100, 100)
		e.create(r, col, "before-sale")
		e.addWritten(r, col, free)
		e.dropSegments(r, col, held.ID, free.ID)
		time.Sleep(4 * time.Hour)
		e.dropSegments(r, col, fresh.ID)
		revision := func() int64 { _, _, rev, _ := e.kv.Get(t.Context(), keys.IDs); return rev }
		settle() // the leader records the time
		objects, before := e.objectsUnder("data/"), revision()
		items, sum := e.round(r, collect.CycleOptions{DryRun: true})
		if sum.Granted != 1 || sum.Held != 1 || sum.Waiting != 1 || sum.Files != 1 || sum.Bytes != 10 {
			t.Errorf("%+v", sum)
		}
		if diff := cmp.Diff(objects, e.objectsUnder("data/")); diff != "" || revision() != before {
			t.Errorf("a dry run has changed something:\n%s", diff)
		}
		reasons := map[int64]string{}
		for _, i := range items {
			reasons[i.ID] = fmt.Sprintf("%d: %s", i.Action, i.Reason)
			if i.Action != collect.Deletes {
				continue
			}
			if diff := cmp.Diff([]collect.Object{{Store: "default", Key: "data/" + free.Files[0].Path, Size: 10}},
				i.Objects); diff != "" {
				t.Errorf("objects:\n%s", diff)
			}
		}
		for id, want := range map[int64]string{
			free.ID:  "1: dropped 4h0m0s ago, and no snapshot holds it",
			held.ID:  "2: held by snapshot before-sale",
			fresh.ID: "3: dropped 0s ago; the tolerance is 3h0m0s",
		} {
			if !strings.HasPrefix(reasons[id], want) {
				t.Errorf("%d: %q, want %q", id, reasons[id], want)
			}
		}
		if _, sum = e.round(r, collect.CycleOptions{}); sum.Granted != 1 {
			t.Errorf("the round: %+v", sum)
		}
	})
}

// TestCollectSweeps checks that a round sweeps on request.
func TestCollectSweeps(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		dead := manifest.MetadataKey(col.ID, e.newID(r))
		e.write(dead)
		time.Sleep(25 * time.Hour)
		for _, o := range []collect.CycleOptions{{}, {Sweep: true, DryRun: true}, {Sweep: true}} {
			_, sum := e.round(r, o)
			want := int64(0)
			if o.Sweep {
				want = 1
			}
			if sum.Swept != want || (sum.SweptBytes > 0) != o.Sweep || sum.Error != "" {
				t.Errorf("%+v: %+v", o, sum)
			}
			if gone := len(e.objectsUnder(strings.TrimSuffix(dead, "metadata.json"))) == 0; gone != (o.Sweep && !o.DryRun) {
				t.Errorf("%+v: gone is %v", o, gone)
			}
		}
	})
}

// TestCollectorSurvivesEachFailedCall fails each call of a round, before and after its
// effect: held units stay, and eventually all free units are deleted.
func TestCollectorSurvivesEachFailedCall(t *testing.T) {
	scene := func(t *testing.T, fail func(r *testReplica, n int) func() bool) {
		for n := 0; ; n++ {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
				col, p, x := e.collection(r, "c")
				gone, _, _ := e.collection(r, "gone")
				held, free, part := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 21, 40), e.segment(r, col, 0, 41, 60)
				part.Partition = p.ID
				part.Files[0].Path = catalog.NativePath(col.ID, &part, &part.Files[0])
				b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
				b.Files = []segment.File{{
					Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, free.ID, b.ID),
					Size: 5,
				}}
				free.Builds = []segment.Build{b}
				e.addWritten(r, col, held, part)
				e.addWritten(r, gone, e.segment(r, gone, 0, 1, 2))
				e.checkpoint(r, col, 100, 100)
				s := e.create(r, col, "one")
				e.addWritten(r, col, free)
				e.dropSegments(r, col, held.ID)
				for _, err := range []error{
					second(r.catalog.DropPartition(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, "p0")),
					second(r.catalog.DropIndex(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, "x0")),
					second(r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: gone.ID}, 0)),
				} {
					if err != nil {
						t.Fatal(err)
					}
				}
				settle()
				done := fail(r, n)
				for range 2 {
					_, _ = r.Collect(t.Context(), collect.CycleOptions{Tolerance: new(time.Duration)}) // may fail
					settle()
				}
				fired = done()
				r.clearFaults()
				time.Sleep(5 * time.Minute) // failed deletes are retried
				for range 3 {
					e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
				}
				want := []string{"data/" + held.Files[0].Path, "data/" + free.Files[0].Path, "data/" + part.Files[0].Path}
				slices.Sort(want)
				if diff := cmp.Diff(want, e.objectsUnder("data/")); diff != "" {
					t.Fatalf("call %d, files:\n%s", n, diff)
				}
				if left := e.leftOf(gone); len(left) > 0 {
					t.Fatalf("call %d, left: %v", n, left)
				}
				if _, err := e.segments(r, s), e.check(r); err == nil {
					t.Fatal("the snapshot is gone")
				}
			})
			if !fired {
				if n < 1 {
					t.Error("no call failed")
				}
				return
			}
		}
	}
	methods := []meta.Method{meta.MethodGet, meta.MethodRange, meta.MethodScan, meta.MethodTxn}
	for name, fault := range map[string]meta.Fault{"before": meta.Before, "after": meta.After} {
		t.Run("metadata store "+name, func(t *testing.T) {
			scene(t, func(r *testReplica, n int) func() bool {
				r.kv.FailNth(n, fault, methods...)
				return func() bool { return r.kv.Fired() > 0 }
			})
		})
	}
	for name, fault := range map[string]object.Fault{"before": object.FaultBefore, "after": object.FaultAfter} {
		t.Run("object store "+name, func(t *testing.T) {
			scene(t, func(r *testReplica, n int) func() bool {
				r.store.FailNth("", n, fault)
				return func() bool { return r.store.Fired() > 0 }
			})
		})
	}
}

func second[T any](_ T, err error) error { return err }

// TestCollectorIdles checks that a round without work makes no object requests and no
// writes.
func TestCollectorIdles(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s, e.segment(r, col, 0, 21, 40))
		e.checkpoint(r, col, 100, 100)
		e.create(r, col, "one")
		e.dropSegments(r, col, s.ID)
		settle()
		r.store.Plan(nil) // resets the counts
		_, _, before, err := e.kv.Get(t.Context(), keys.IDs)
		if err != nil {
			t.Fatal(err)
		}
		if _, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)}); sum.Held != 1 || sum.Granted != 0 {
			t.Errorf("%+v", sum)
		}
		if n := r.store.Calls(""); n > 0 {
			t.Errorf("%d object requests", n)
		}
		if _, _, after, _ := e.kv.Get(t.Context(), keys.IDs); after != before {
			t.Errorf("it has written: revision %d, then %d", before, after)
		}
	})
}

// TestCollectorIsBlocked checks that unreadable references protect everything in their
// collection, and nothing in others.
func TestCollectorIsBlocked(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		bad, _, _ := e.collection(r, "bad")
		good, _, _ := e.collection(r, "good")
		one, two := e.segment(r, bad, 0, 1, 20), e.segment(r, good, 0, 1, 20)
		e.checkpoint(r, bad, 100, 100)
		s := e.create(r, bad, "empty")
		e.addWritten(r, bad, one)
		e.addWritten(r, good, two)
		e.dropSegments(r, bad, one.ID)
		e.dropSegments(r, good, two.ID)
		e.putObject(fmt.Sprintf("snapshots/%d/%d/refs.avro", bad.ID, s.ID), []byte("no"))
		r = e.forget(r, "b") // has loaded no references yet
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		sum, err := r.Collect(ctx, collect.CycleOptions{Tolerance: new(time.Duration)})
		if err != nil {
			t.Fatal(err)
		}
		settle()
		if sum.Granted != 1 || !strings.Contains(sum.Error, "bad") {
			t.Errorf("%+v", sum)
		}
		if diff := cmp.Diff([]string{"data/" + one.Files[0].Path}, e.objectsUnder("data/")); diff != "" {
			t.Errorf("files:\n%s", diff)
		}
		if _, err = r.Collect(ctx, collect.CycleOptions{
			Tolerance:  new(time.Duration),
			Collection: catalog.Ref{ID: bad.ID},
		}); !errors.Is(err, gc.ErrUnreadable) {
			t.Errorf("asked for that one: %v", err)
		}
	})
}
