package manager

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestRestoreCanceled cancels in each phase.
func TestRestoreCanceled(t *testing.T) {
	for name, c := range map[string]struct {
		hold  func(leader *testReplica) // keeps the job in the phase
		phase copyjob.Phase
	}{
		"admit":   {func(l *testReplica) { l.kv.Freeze() }, copyjob.Admit},
		"prepare": {func(l *testReplica) { failWritesAfter(l, 1) }, copyjob.Prepare}, // begin passes
		"copy":    {failCopies, copyjob.Copy},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				leader := e.start("a")
				settle()
				r := e.start("b", func(o *testOptions) { o.Parts.Slots = -1 })
				s := e.create(r, e.richCollection(r, "c", 12), "one")
				before := e.contents()
				c.hold(leader)
				sp := restoreSpecOf(s)
				sp.Labels = map[string]string{"a": "b"}
				job := e.restore(r, sp)
				time.Sleep(time.Second)
				st, err := r.Jobs.Get(t.Context(), job.ID)
				if err != nil || st.Job.Phase != c.phase {
					t.Fatalf("%+v, err = %v", st.Job, err)
				}
				for range 3 { // repeats succeed
					if st, err = r.Jobs.Cancel(t.Context(), job.ID); err != nil || st.Job.Phase != copyjob.RollBack {
						t.Fatalf("%+v, err = %v", st, err)
					}
				}
				_, err = r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{Bytes: 1})
				wantError(t, err, copyjob.ErrEnded)
				leader.kv.Thaw()
				leader.clearFaults()
				end := e.waitEnded(r, job.ID)
				if end.Job.State != copyjob.Canceled || end.Job.Reason != "CANCELED" || end.Job.Labels["a"] != "b" {
					t.Errorf("%+v", end.Job)
				}
				e.checkNoTraces(before)
				if st, err = r.Jobs.Cancel(t.Context(), job.ID); err != nil || st.Job.State != copyjob.Canceled {
					t.Errorf("canceled again: %+v, err = %v", st, err)
				}
				e.checkNextRestore(r, before, sp)
				_, err = r.Jobs.Cancel(t.Context(), e.jobs()[1].ID)
				wantError(t, err, copyjob.ErrEnded)
				_, err = r.Jobs.SetLimits(t.Context(), e.jobs()[1].ID, copyjob.Limits{})
				wantError(t, err, copyjob.ErrEnded)
				canceled := copyjob.Filter{
					Labels: map[string]string{"a": "b"}, States: []copyjob.State{copyjob.Canceled},
				}
				list, more, err := r.Jobs.List(t.Context(), canceled, 0, 1)
				if err != nil || more || len(list) != 1 || list[0].Job.ID != job.ID {
					t.Errorf("%+v, more = %v, err = %v", list, more, err)
				}
			})
		})
	}
}

// failCopies makes all copies fail.
func failCopies(r *testReplica) {
	r.store.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpCopy {
			return object.FaultBefore
		}
		return object.FaultNone
	})
}

// failWritesAfter makes all transactions after the first n fail.
func failWritesAfter(r *testReplica, n int) {
	var mu sync.Mutex
	r.kv.Hook(func(c meta.Call) meta.Fault {
		mu.Lock()
		defer mu.Unlock()
		if c.Method != meta.MethodTxn {
			return meta.NoFault
		}
		if n--; n < 0 {
			return meta.Before
		}
		return meta.NoFault
	})
}

// TestRestoreCanceledBetweenWrites cancels before each write of the leader and its worker,
// which then takes effect or loses its answer. The job ends as the answer of the cancel
// says.
func TestRestoreCanceledBetweenWrites(t *testing.T) {
	outcomes := map[copyjob.State]int{}
	for _, fault := range []meta.Fault{meta.NoFault, meta.After} {
		forEachFault(t, 100, func(n int) bool {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				a := e.start("a")
				settle()
				b := e.start("b", func(o *testOptions) { o.Parts.Slots = -1 })
				s := e.create(b, e.richCollection(b, "c", 4), "one")
				before := e.contents()
				var mu sync.Mutex
				var cancelErr error
				left := n
				a.kv.Hook(func(c meta.Call) meta.Fault {
					if c.Method != meta.MethodTxn {
						return meta.NoFault
					}
					mu.Lock()
					left--
					here := left == -1
					mu.Unlock()
					if !here {
						return meta.NoFault
					}
					jobs := e.jobs()
					_, cancelErr = b.Jobs.Cancel(context.Background(), jobs[0].ID)
					fired = true
					return fault
				})
				sp := restoreSpecOf(s)
				job := e.restore(b, sp)
				end := e.waitEnded(b, job.ID)
				outcomes[end.Job.State]++
				switch {
				case !fired:
					if end.Job.State != copyjob.Completed {
						t.Errorf("%+v", end.Job)
					}
				case cancelErr == nil:
					if end.Job.State != copyjob.Canceled {
						t.Errorf("write %d: canceled, but %+v", n, end.Job)
					}
				case !errors.Is(cancelErr, copyjob.ErrEnded) || end.Job.State != copyjob.Completed:
					t.Errorf("write %d: cancel returned %v, but %+v", n, cancelErr, end.Job)
				}
				a.clearFaults()
				e.checkOutcome(b, before, end, sp)
				e.checkNeverActive(job, end)
			})
			return fired
		})
	}
	if outcomes[copyjob.Canceled] < 10 || outcomes[copyjob.Completed] < 2 {
		t.Errorf("outcomes %v", outcomes)
	}
}

// checkNeverActive checks that the target of a job that is not COMPLETED was never ACTIVE.
func (e *env) checkNeverActive(job *copyjob.Job, end *copyjob.Status) {
	e.t.Helper()
	if end.Job.State == copyjob.Completed {
		return
	}
	ctx, cancel := context.WithCancel(e.t.Context())
	defer cancel()
	_, _, last, err := e.kv.Get(ctx, keys.Format)
	if err != nil {
		e.t.Fatal(err)
	}
	watch := e.kv.Watch(ctx, keys.Collection(job.Target), "", 1)
	if watch != nil {
		watch = e.kv.Watch(ctx, keys.Collection(job.Target), keys.Collection(job.Target)+"\x00", 1)
	}
	if err := watch.Progress(ctx); err != nil {
		e.t.Fatal(err)
	}
	for {
		b, err := watch.Next()
		if err != nil {
			e.t.Fatal(err)
		}
		for _, ev := range b.Events {
			if ev.Deleted {
				continue
			}
			if col, err := catalog.DecodeCollection(ev.KV); err != nil || col.State != catalog.Restoring {
				e.t.Errorf("the target of a job that ended %v was %v, err = %v", end.Job.State, col.State, err)
			}
		}
		if b.Revision >= last {
			return
		}
	}
}

// TestRestoreCancelRaces cancels at random times while replicas freeze and slow down.
func TestRestoreCancelRaces(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	outcomes := map[copyjob.State]int{}
	for range 20 {
		run := random.Uint64()
		inEnv(t, func(t *testing.T, e *env) {
			rnd := rand.New(rand.NewPCG(run, 0))
			var rs []*testReplica
			for _, name := range []string{"a", "b", "c"} {
				rs = append(rs, e.start(name))
			}
			s := e.create(rs[0], e.richCollection(rs[0], "c", 40), "one")
			before := e.contents()
			for _, r := range rs {
				r.store.SetLatency(time.Duration(rnd.IntN(3000)) * time.Millisecond)
			}
			sp := restoreSpecOf(s)
			job := e.restore(rs[2], sp)
			frozen := rnd.IntN(3)
			time.Sleep(time.Duration(rnd.IntN(8000)) * time.Millisecond)
			switch rnd.IntN(3) {
			case 0:
				rs[frozen].kv.Freeze()
			case 1:
				rs[frozen].kv.Freeze()
				rs[frozen].store.Freeze()
			}
			time.Sleep(time.Duration(rnd.IntN([]int{12_000, 60_000}[rnd.IntN(2)])) * time.Millisecond)
			canceler := rs[(frozen+1)%3]
			_, cancelErr := canceler.Jobs.Cancel(t.Context(), job.ID)
			time.Sleep(time.Duration(rnd.IntN(30000)) * time.Millisecond)
			rs[frozen].kv.Thaw()
			rs[frozen].store.Thaw()
			end := e.waitEnded(canceler, job.ID)
			outcomes[end.Job.State]++
			want := copyjob.Completed
			if cancelErr == nil {
				want = copyjob.Canceled
			}
			if end.Job.State != want {
				t.Errorf("run %d: cancel returned %v, but %+v", run, cancelErr, end.Job)
			}
			time.Sleep(time.Minute)
			settle()
			for _, r := range rs {
				r.store.SetLatency(0)
			}
			e.checkOutcome(canceler, before, end, sp)
			e.checkNeverActive(job, end)
		})
	}
	t.Logf("%v", outcomes)
	if outcomes[copyjob.Canceled] == 0 || outcomes[copyjob.Completed] == 0 {
		t.Errorf("outcomes %v", outcomes)
	}
}

// TestRestoreDeadline checks that a job is given up at its deadline.
func TestRestoreDeadline(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		before := e.contents()
		sp := restoreSpecOf(s)
		sp.Timeout = time.Minute
		settle()                             // the clocks are compared
		r.store.SetLatency(45 * time.Second) // copy and verify take longer, removal does not matter
		began := time.Now()
		job := e.restore(r, sp)
		r.store.Plan(nil)
		for {
			st, err := r.Jobs.Get(t.Context(), job.ID)
			if err != nil {
				t.Fatal(err)
			}
			if st.Job.Phase == copyjob.RollBack {
				break
			}
			time.Sleep(time.Second)
		}
		if d := time.Since(began); d < time.Minute || d > 2*time.Minute {
			t.Errorf("given up after %v", d)
		}
		end := e.waitEnded(r, job.ID)
		if end.Job.State != copyjob.Failed || end.Job.Reason != "TIMEOUT" {
			t.Errorf("%+v", end.Job)
		}
		e.checkNoTraces(before)
		r.store.SetLatency(0)
		e.mustComplete(r, sp)
	})
}
