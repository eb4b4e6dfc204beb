package manager

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestAwaitDeleted checks that a wait ends with the last delete granted before it, and
// ignores later units, other collections and units of callers.
func TestAwaitDeleted(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		ctx := t.Context()
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		other, _, _ := e.collection(r, "other")
		col, _, _ := e.collection(r, "c")
		of := catalog.Ref{ID: col.ID}
		var free []gc.Ask
		for range 3 {
			s := e.segment(r, col, 0, 1, 20)
			e.addWritten(r, col, s)
			free = append(free, e.dropSegments(r, col, s.ID)...)
		}
		foreign := e.segment(r, other, 0, 1, 20)
		e.addWritten(r, other, foreign)
		foreigns := e.dropSegments(r, other, foreign.ID)
		e.reclaim(r, col, gc.ByCaller, free[0])
		e.reclaim(r, col, gc.BySnapshotd, free[1])
		if err := r.GC.AwaitDeleted(ctx, of, e.now()); err != nil {
			t.Errorf("what can be deleted: %v", err)
		}
		if n := r.GC.Stats().Granted; n != 0 {
			t.Errorf("%d left", n)
		}

		r.store.Freeze()
		e.reclaim(r, other, gc.BySnapshotd, foreigns...)
		if err := r.GC.AwaitDeleted(ctx, of, e.now()); err != nil {
			t.Errorf("of another collection: %v", err)
		}
		if err := r.GC.AwaitDeleted(ctx, catalog.Ref{}, e.now().Add(-time.Second)); err != nil {
			t.Errorf("granted later: %v", err)
		}
		short, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		if err := r.GC.AwaitDeleted(short, catalog.Ref{}, e.now()); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("what cannot be deleted: got %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- r.GC.AwaitDeleted(ctx, catalog.Ref{}, e.now()) }()
		time.Sleep(time.Hour)
		select {
		case err := <-done:
			t.Errorf("ended before the files were gone: %v", err)
		default:
		}
		r.store.Thaw()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if n := r.GC.Stats().Granted; n != 0 {
			t.Errorf("%d left", n)
		}
		if err := r.GC.AwaitDeleted(ctx, catalog.Ref{Name: "none", DB: catalog.DefaultDB},
			e.now()); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("got %v", err)
		}
	})
}

// TestAwaitDeletedAmongLaterOnes checks that a wait finds its units among many later
// ones.
func TestAwaitDeletedAmongLaterOnes(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		var all []gc.Ask
		for range 110 {
			s := e.segment(r, col, 0, 1, 20)
			e.addWritten(r, col, s)
			all = append(all, e.dropSegments(r, col, s.ID)...)
		}
		r.store.Freeze()
		last := len(all) - 1
		e.reclaim(r, col, gc.BySnapshotd, all[last])
		granted := e.now()
		time.Sleep(time.Minute)
		e.reclaim(r, col, gc.BySnapshotd, all[:last]...)
		short, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := r.GC.AwaitDeleted(short, catalog.Ref{}, granted); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
		if err := r.GC.AwaitDeleted(t.Context(), catalog.Ref{}, granted.Add(-time.Minute)); err != nil {
			t.Errorf("all came later: %v", err)
		}
		r.store.Thaw()
		if err := r.GC.AwaitDeleted(t.Context(), catalog.Ref{}, e.now()); err != nil {
			t.Error(err)
		}
	})
}

// TestCollectorStatus checks that every replica reports the last round completely.
func TestCollectorStatus(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			o.Parts.Collector.Tolerance, o.Parts.Collector.MaxShare = time.Hour, 0.25
		})
		settle() // so that it leads
		other := e.start("b", func(o *testOptions) { o.Parts.Collector.Off = true })
		got, err := r.Collector.Status(t.Context())
		want := collect.Status{Tolerance: time.Hour, MaxShare: 0.25, StopUnits: collect.StopUnits, Enabled: true}
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("before the first round: %v\n%s", err, diff)
		}
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s)
		e.reclaim(r, col, gc.ByCaller, e.dropSegments(r, col, s.ID)...)
		s = e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s)
		e.dropSegments(r, col, s.ID)
		time.Sleep(2 * time.Minute)
		settle()
		got, err = other.Collector.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		last := r.Collector.LastCycle()
		want = collect.Status{
			LastRound: last, Unconfirmed: 1, Tolerance: 3 * time.Hour,
			MaxShare: 0.5, StopUnits: collect.StopUnits,
		}
		if last == nil || last.Waiting != 1 {
			t.Errorf("the round came to %+v", last)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(keys.Cycle, []byte("nonsense"))}}); err != nil {
			t.Fatal(err)
		}
		if _, err := other.Collector.Status(t.Context()); err == nil {
			t.Error("an unreadable record is read")
		}
	})
}

// TestCollectorStatusReportsHalts checks that every replica reports failures of the
// leader with their start, and that each is logged once. The report ends with the
// failure or with the leadership.
func TestCollectorStatusReportsHalts(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		core, logs := observer.New(zapcore.InfoLevel)
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off, o.Log = true, zap.New(core) })
		settle() // so that it leads
		other := e.start("b", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		began := time.Now()
		e.dropSnapshot(r, s)
		time.Sleep(10 * time.Minute)
		settle()
		for name, asked := range map[string]*testReplica{"the leader": r, "another": other} {
			got, err := asked.Collector.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if len(got.Halts) != 1 || got.LastRound != nil {
				t.Fatalf("%s says %+v", name, got)
			}
			h := got.Halts[0]
			if h.Name != "remove" || h.What != "removal of dropped snapshots" || h.Error == "" || h.Replica != "a" ||
				h.Since.Sub(began).Abs() > time.Minute || asked == r && h.Failures < 10 {
				t.Errorf("%s says %+v", name, h)
			}
		}
		if n := logs.FilterMessageSnippet("dropped snapshots not removed").Len(); n != 1 {
			t.Errorf("it is logged %d times", n)
		}
		r.store.Plan(nil)
		time.Sleep(2 * time.Minute)
		settle()
		for name, asked := range map[string]*testReplica{"the leader": r, "another": other} {
			if got, err := asked.Collector.Status(t.Context()); err != nil || len(got.Halts) > 0 {
				t.Errorf("afterwards %s says %+v, %v", name, got.Halts, err)
			}
		}
		if n := logs.FilterMessageSnippet("ended: ").Len(); n != 1 {
			t.Errorf("its end is logged %d times: %v", n, logs.All())
		}
	})
}
