package manager

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// refuseCalls makes the store refuse the calls of op for which which returns true. which
// gets the number of the call, from zero, and the number of copies before it. refused
// returns the number of refused calls.
func refuseCalls(
	r *testReplica, op object.Op, fault object.Fault, which func(n, copies int) bool,
) (refused func() int) {
	var mu sync.Mutex
	n, count, copies := 0, 0, 0
	r.store.Plan(func(c object.Call) object.Fault {
		mu.Lock()
		defer mu.Unlock()
		if c.Op == object.OpCopy {
			copies++
		}
		if c.Op != op {
			return object.FaultNone
		}
		n++
		if !which(n-1, copies) {
			return object.FaultNone
		}
		count++
		return fault
	})
	return func() int {
		mu.Lock()
		defer mu.Unlock()
		return count
	}
}

// refusalMessage is part of the warning of a refused restore.
const refusalMessage = "object store refuses restore task"

// TestRestoreOutlastsRefusals makes the store refuse a call of a restore once or for
// minutes: the restore completes, and logs one warning.
func TestRestoreOutlastsRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		op     object.Op
		from   int           // first refused call of op
		copies int           // least number of copies before it
		lasts  time.Duration // zero: one call
		counts bool          // by the worker
	}{
		"the first copy once":            {object.OpCopy, 0, 0, 0, true},
		"one copy of many once":          {object.OpCopy, 27, 0, 0, true},
		"copies for four minutes":        {object.OpCopy, 27, 0, 4 * time.Minute, true},
		"all copies for four minutes":    {object.OpCopy, 0, 0, 4 * time.Minute, true},
		"the list before the first copy": {object.OpList, 0, 0, 0, false},
		"lists for four minutes":         {object.OpList, 0, 0, 4 * time.Minute, false},
		"the pins of sources":            {object.OpCreate, 0, 0, 0, true},
		"the lists that verify copies":   {object.OpList, 0, 100, 0, true},
		"the snapshot's own metadata":    {object.OpGet, 1, 0, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				core, logs := observer.New(zapcore.WarnLevel)
				r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off, o.Log = true, zap.New(core) })
				s := e.create(r, e.richCollection(r, "c", 40), "one")
				settle()
				var began time.Time
				refused := refuseCalls(r, c.op, object.FaultDenied, func(n, copies int) bool {
					first := n >= c.from && copies >= c.copies && began.IsZero()
					if first {
						began = time.Now()
					}
					return first || !began.IsZero() && time.Since(began) < c.lasts
				})
				before := e.contents()
				job := e.restore(r, restoreSpecOf(s))
				if c.lasts > 0 {
					time.Sleep(c.lasts - time.Second)
					settle()
					st, err := r.Jobs.Get(t.Context(), job.ID)
					if err != nil || st.Job.State != copyjob.Executing || !strings.Contains(st.LastError, "access denied") ||
						c.counts == st.Refused.IsZero() || !st.Waiting.IsZero() {
						t.Errorf("%+v of %+v, err = %v", st, st.Job, err)
					}
				}
				end := e.waitEnded(r, job.ID)
				if end.Job.State != copyjob.Completed {
					t.Fatalf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
				}
				if !end.Refused.IsZero() || refused() == 0 {
					t.Errorf("%d refused, %+v", refused(), end)
				}
				shared := c.op == object.OpGet // one read may serve several tasks
				if n := r.Jobs.Stats().Refusals; c.counts && n == 0 || n > int64(refused()) && !shared {
					t.Errorf("%d refusals are counted, of %d", n, refused())
				}
				if n := logs.FilterMessageSnippet(refusalMessage).Len(); c.counts && n != 1 {
					t.Errorf("%d warnings: %v", n, logs.All())
				}
				if n := logs.FilterMessageSnippet("restore step failed").Len(); n > 1 {
					t.Errorf("%d warnings of steps: %v", n, logs.All())
				}
				e.checkRestored(r, before, end.Job, restoreSpecOf(s))
			})
		})
	}
}

// TestRestoreRefusedPermanently makes the store refuse calls of a restore without end: the
// restore fails after the refusal timeout by the reason of the refusal, and leaves
// nothing.
func TestRestoreRefusedPermanently(t *testing.T) {
	for name, c := range map[string]struct {
		op     object.Op
		only   string // of the source's keys; empty: all
		within time.Duration
	}{
		"all copies":            {object.OpCopy, "", 2 * time.Minute},
		"the copies of one":     {object.OpCopy, "/of-an-engine/", 2 * time.Minute},
		"lists of the target's": {object.OpList, "", time.Minute},
	} {
		for _, lasts := range []time.Duration{time.Second, 5 * time.Minute, time.Hour} {
			t.Run(fmt.Sprintf("%s, %v", name, lasts), func(t *testing.T) {
				inEnv(t, func(t *testing.T, e *env) {
					r := e.start("a", func(o *testOptions) {
						o.Parts.Collector.Off = true
						if lasts != 5*time.Minute { // which is the default
							o.Parts.RefusalTimeout = lasts
						}
					})
					s := e.create(r, e.richCollection(r, "c", 40), "one")
					before := e.contents()
					began := time.Now()
					r.store.Plan(func(call object.Call) object.Fault {
						if call.Op == c.op && strings.Contains(call.Keys[0], c.only) {
							return object.FaultDenied
						}
						return object.FaultNone
					})
					job := e.restore(r, restoreSpecOf(s))
					for {
						settle()
						if j := e.jobs()[0]; j.Phase == copyjob.RollBack || j.State.Ended() {
							break
						}
						if time.Since(began) > 24*time.Hour {
							t.Fatalf("not given up: %+v", e.jobs()[0])
						}
						time.Sleep(100 * time.Millisecond)
					}
					if took := time.Since(began); took < lasts || took > lasts+c.within {
						t.Errorf("given up after %v", took)
					}
					r.clearFaults()
					end := e.waitEnded(r, job.ID)
					if end.Job.State != copyjob.Failed || end.Job.Reason != "OBJECT_STORE_DENIED" ||
						!strings.Contains(end.Job.Message, "access denied") {
						t.Errorf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
					}
					e.checkNoTraces(before)
				})
			})
		}
	}
}

// TestPermanentRefusalFailsAtOnce makes the store refuse one copy permanently.
func TestPermanentRefusalFailsAtOnce(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		began := time.Now()
		refuseCalls(r, object.OpCopy, object.FaultMisconfigured, func(n, _ int) bool { return n == 9 })
		e.mustFail(r, restoreSpecOf(s), "OBJECT_STORE_MISCONFIGURED", "injected fault")
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %v", took)
		}
	})
}

// TestRestoreRefusedThroughRestarts restarts the only replica repeatedly while the store
// refuses copies: the time of the refusals continues.
func TestRestoreRefusedThroughRestarts(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		deny := func(r *testReplica) {
			refuseCalls(r, object.OpCopy, object.FaultDenied, func(int, int) bool { return true })
		}
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 4), "one")
		before := e.contents()
		deny(r)
		job := e.restore(r, restoreSpecOf(s))
		began := time.Now()
		for n := range 20 {
			time.Sleep(90 * time.Second)
			settle()
			if e.jobs()[0].State.Ended() {
				break
			}
			r.stop()
			time.Sleep(time.Minute)
			r = e.start(fmt.Sprint("b", n))
			deny(r)
		}
		end := e.waitEnded(r, job.ID)
		if end.Job.State != copyjob.Failed || end.Job.Reason != "OBJECT_STORE_DENIED" {
			t.Errorf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
		}
		if took := time.Since(began); took < 5*time.Minute || took > 20*time.Minute {
			t.Errorf("given up after %v", took)
		}
		e.checkNoTraces(before)
	})
}

// TestRefusedAtAdmission makes the store refuse the reads of the admission: the call fails
// at once.
func TestRefusedAtAdmission(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		s := e.create(a, e.richCollection(a, "c", 4), "one")
		a.stop() // with its cache
		r := e.start("b")
		settle()
		before := e.contents()
		refuseCalls(r, object.OpGet, object.FaultDenied, func(int, int) bool { return true })
		began := time.Now()
		_, err := r.Restore(t.Context(), noToken, restoreSpecOf(s))
		wantError(t, err, object.ErrDenied)
		_, err = r.PlanRestore(t.Context(), restoreSpecOf(s), false)
		wantError(t, err, object.ErrDenied)
		if took := time.Since(began); took > time.Second {
			t.Errorf("it took %v", took)
		}
		if jobs := e.jobs(); len(jobs) > 0 {
			t.Errorf("%+v", jobs)
		}
		e.checkNoTraces(before)
	})
}

// TestCreateOutlastsARefusal makes the store refuse a few requests of a create that
// verifies all files, and then all requests.
func TestCreateOutlastsARefusal(t *testing.T) {
	for _, op := range []object.Op{object.OpHead, object.OpCreate} {
		t.Run(string(op), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
				col := e.richCollection(r, "c", 40)
				settle()
				refused := refuseCalls(r, op, object.FaultDenied, func(n, _ int) bool { return n == 0 || n == 20 })
				sp := spec(col, "one")
				sp.Verify = true
				if _, err := r.Create(t.Context(), noToken, sp); err != nil || refused() == 0 {
					t.Errorf("after %d refusals: %v", refused(), err)
				}
				began := time.Now()
				refuseCalls(r, op, object.FaultDenied, func(int, int) bool { return true })
				sp = spec(col, "two")
				sp.Verify = true
				_, err := r.Create(t.Context(), noToken, sp)
				wantError(t, err, object.ErrDenied)
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("it took %v", took)
				}
			})
		})
	}
}

// TestRefusedReferencesAreReadAgain makes the store refuse the first reads of a snapshot's
// references: they do not count as unreadable, and reclaim continues.
func TestRefusedReferencesAreReadAgain(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(a, "c")
		held := e.segment(a, col, 0, 1, 20)
		e.addWritten(a, col, held)
		e.checkpoint(a, col, 100, 100)
		e.create(a, col, "one")
		asks := e.dropSegments(a, col, held.ID)
		a.stop()
		var refused func() int
		b := e.start("b", func(o *testOptions) {
			o.Parts.Collector.Off = true
			store, ok := o.Stores["default"].(*object.Faulty)
			if !ok {
				t.Fatalf("the store is a %T", o.Stores["default"])
			}
			refused = refuseCalls(&testReplica{store: store}, object.OpGet, object.FaultDenied,
				func(n, _ int) bool { return n < 3 })
		})
		began := time.Now()
		_, err := b.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		if err != nil || refused() == 0 {
			t.Errorf("after %d refusals: %v", refused(), err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %v", took)
		}
	})
}
