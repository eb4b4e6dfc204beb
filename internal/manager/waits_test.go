package manager

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// manyWaiting is the number of concurrently waiting calls.
const manyWaiting = 500

// countWatches counts the watches that a replica opens from now on.
func countWatches(r *testReplica) *atomic.Int64 {
	var n atomic.Int64
	r.kv.Hook(func(c meta.Call) meta.Fault {
		if c.Method == meta.MethodWatch {
			n.Add(1)
		}
		return meta.NoFault
	})
	return &n
}

// waiting starts n concurrent calls and returns their errors.
func waiting(n int, call func(i int) error) chan error {
	ended := make(chan error, n)
	for i := range n {
		go func() { ended <- call(i) }()
	}
	settle()
	return ended
}

// all waits until n calls have ended with nil or with the error want.
func all(t *testing.T, ended chan error, n int, want error) {
	t.Helper()
	timer := time.NewTimer(time.Hour)
	defer timer.Stop()
	for i := range n {
		select {
		case err := <-ended:
			if !errors.Is(err, want) {
				t.Fatalf("a call ended with %v, want %v", err, want)
			}
		case <-timer.C:
			t.Fatalf("%d of %d calls ended", i, n)
		}
	}
}

// checkNoWaiters checks that no call is left in the replica's topics.
func checkNoWaiters(t *testing.T, r *testReplica) {
	t.Helper()
	for _, of := range []*topics{r.checkpoints.topics, r.view.pending} {
		of.mu.Lock()
		if len(of.waiting) != 0 {
			t.Errorf("calls are left that wait for %v", of.waiting)
		}
		of.mu.Unlock()
	}
}

// waitForCut20 waits until the first channel is at 20.
func waitForCut20(ctx context.Context, m *Manager, col catalog.Collection) error {
	want := []catalog.Checkpoint{{Shard: 0, Position: segment.Position{Timestamp: 20}}}
	return m.waitForCheckpoints(ctx, catalog.Ref{ID: col.ID}, want)
}

// TestWaitsForCutsShareAWatch checks that calls that wait for checkpoints share one
// watch, and that each ends when its own collection reaches the cut or is dropped.
func TestWaitsForCutsShareAWatch(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "other")
		e.checkpoint(r, col, 10, 10)
		e.checkpoint(r, other, 10, 10)
		settle()
		watches := countWatches(r)
		of := []catalog.Collection{col, other}
		ended := waiting(manyWaiting, func(i int) error { return waitForCut20(t.Context(), r.Manager, of[i%2]) })
		if n := watches.Load(); n != 1 {
			t.Errorf("%d watches", n)
		}
		if len(ended) != 0 {
			t.Fatalf("a call ended with %v", <-ended)
		}
		e.checkpoint(r, col, 19, 20)
		settle()
		if len(ended) != 0 {
			t.Fatalf("a call ended with %v", <-ended)
		}
		e.checkpoint(r, col, 20, 20)
		all(t, ended, manyWaiting/2, nil)
		settle()
		if len(ended) != 0 {
			t.Fatal("a checkpoint ended calls that wait for those of another collection")
		}
		if _, err := r.catalog.DropCollection(t.Context(), noToken, catalog.Ref{ID: other.ID}, 0); err != nil {
			t.Fatal(err)
		}
		all(t, ended, manyWaiting/2, catalog.ErrCollectionNotActive)
		if n := watches.Load(); n != 1 {
			t.Errorf("%d watches", n)
		}
		checkNoWaiters(t, r)
	})
}

// TestRepeatsShareTheWatchOfTheView checks that repeats of a create open no watch and
// end with the create, on its replica and on another.
func TestRepeatsShareTheWatchOfTheView(t *testing.T) {
	for _, dies := range []bool{false, true} {
		t.Run(fmt.Sprintf("dies=%v", dies), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				a := e.start("a")
				col, _, _ := e.collection(a, "c")
				e.add(a, col, e.segment(a, col, 0, 1, 2))
				e.checkpoint(a, col, 10, 10)
				settle()
				b := e.start("b")
				settle()
				create := func(r *testReplica) error {
					_, err := r.Create(t.Context(), token("t", "x"), spec(col, "x"))
					return err
				}
				a.store.Freeze()
				first := waiting(1, func(int) error { return create(a) })
				watches := countWatches(b)
				ended := waiting(manyWaiting, func(int) error { return create(b) })
				if n := watches.Load(); n != 0 {
					t.Errorf("%d watches", n)
				}
				if len(ended)+len(first) != 0 {
					t.Fatal("a call ended")
				}
				var want error
				if dies {
					a.kv.Freeze() // its lease ends
					want = ErrCreateAborted
				} else {
					a.store.Thaw()
				}
				all(t, ended, manyWaiting, want)
				checkNoWaiters(t, b)
				a.kv.Thaw()
				a.store.Thaw()
				all(t, first, 1, want)
			})
		})
	}
}

// TestWaitsOutliveTheirWatch checks that changes during a failed, broken or compacted
// watch wake the calls once the watch is open again.
func TestWaitsOutliveTheirWatch(t *testing.T) {
	for _, harm := range []string{"away", "compacted", "contradicted"} {
		t.Run(harm, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				a := e.start("a")
				col, _, _ := e.collection(a, "c")
				e.checkpoint(a, col, 10, 10)
				settle()
				b := e.start("b")
				settle()
				if harm != "contradicted" {
					b.kv.Hook(func(c meta.Call) meta.Fault {
						if c.Method == meta.MethodNext || c.Method == meta.MethodWatch {
							return meta.Before
						}
						return meta.NoFault
					})
				}
				a.store.Freeze()
				first := waiting(1, func(int) error {
					_, err := a.Create(t.Context(), token("t", "x"), spec(col, "x"))
					return err
				})
				cuts := waiting(5, func(int) error { return waitForCut20(t.Context(), b.Manager, col) })
				repeats := waiting(5, func(int) error {
					_, err := b.Create(t.Context(), token("t", "x"), spec(col, "x"))
					return err
				})
				if len(cuts)+len(repeats)+len(first) != 0 {
					t.Fatal("a call ended")
				}
				if harm == "contradicted" {
					e.memory.Overtake(true)
				}
				e.checkpoint(a, col, 20, 20)
				a.store.Thaw()
				all(t, first, 1, nil)
				settle()
				if harm == "compacted" {
					_, _, now, err := e.kv.Get(t.Context(), keys.Format)
					if err == nil {
						err = e.memory.Compact(t.Context(), now)
					}
					if err != nil {
						t.Fatal(err)
					}
				}
				if harm != "contradicted" && len(cuts) != 0 {
					t.Fatalf("without its watch a call ended with %v", <-cuts)
				}
				e.memory.Overtake(false)
				b.kv.Hook(nil)
				all(t, cuts, 5, nil)
				all(t, repeats, 5, nil)
				checkNoWaiters(t, b)
			})
		})
	}
}

// TestChangeBeforeTheFirstWatch checks that a checkpoint that changes after a call has
// read it and before the first watch starts is not missed.
func TestChangeBeforeTheFirstWatch(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.checkpoint(r, col, 10, 10)
		settle()
		r.checkpoints.kv = &movedKV{KV: r.checkpoints.kv, move: func() { e.checkpoint(r, col, 20, 20) }}
		ended := waiting(1, func(int) error { return waitForCut20(t.Context(), r.Manager, col) })
		all(t, ended, 1, nil)
	})
}

// movedKV makes a change between the read of the calls and the answer with the newest
// revision.
type movedKV struct {
	meta.KV
	move func()
}

func (k *movedKV) Get(ctx context.Context, key string) (meta.KeyValue, bool, int64, error) {
	time.Sleep(time.Second) // until the calls have read
	k.move()
	return k.KV.Get(ctx, key)
}

// TestWaitsEndWithTheReplica checks that waiting calls end when their replica stops.
func TestWaitsEndWithTheReplica(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		e.checkpoint(a, col, 10, 10)
		settle()
		a.store.Freeze()
		first := waiting(1, func(int) error {
			_, err := a.Create(t.Context(), token("t", "x"), spec(col, "x"))
			return err
		})
		ended := waiting(4, func(i int) error {
			if i%2 == 0 {
				return waitForCut20(t.Context(), b.Manager, col)
			}
			_, err := b.Create(t.Context(), token("t", "x"), spec(col, "x"))
			return err
		})
		if len(ended) != 0 {
			t.Fatalf("a call ended with %v", <-ended)
		}
		b.stop()
		all(t, ended, 4, ErrStopping)
		a.store.Thaw()
		all(t, first, 1, nil)
	})
}
