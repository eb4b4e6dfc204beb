package manager

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// watchProgress polls a job until its end, and checks that no number decreases.
func (e *env) watchProgress(r *testReplica, id int64) *copyjob.Status {
	e.t.Helper()
	var last *copyjob.Status
	for {
		s, err := r.Jobs.Get(e.t.Context(), id)
		if err != nil {
			e.t.Fatal(err)
		}
		if last != nil {
			a, b := last.Done, s.Done
			if b.Segments < a.Segments || b.Files < a.Files || b.Bytes < a.Bytes || b.Rows < a.Rows || b.Builds < a.Builds ||
				s.Fraction < last.Fraction || s.Retries < last.Retries || s.Job.Phase < last.Job.Phase {
				e.t.Errorf("from %+v to %+v", last, s)
			}
		}
		if s.Fraction < 0 || s.Fraction > 1 || (s.Fraction == 1) != (s.Job.State == copyjob.Completed) ||
			s.Done.Files > s.Job.Totals.Files || s.Done.Bytes > s.Job.Totals.Bytes || s.Done.Segments > s.Job.Totals.Segments {
			e.t.Errorf("%+v of %+v", s, s.Job)
		}
		if last = s; s.Job.State.Ended() {
			return s
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// TestRestoreWorkerDies makes a worker die, freeze or lose a store during its tasks: other
// workers continue with its copies, and the restore completes.
func TestRestoreWorkerDies(t *testing.T) {
	for name, c := range map[string]struct {
		hurt, heal func(r *testReplica)
		end        copyjob.State
	}{
		"stops":      {func(r *testReplica) { r.stop() }, func(*testReplica) {}, copyjob.Completed},
		"dies":       {func(r *testReplica) { kill(r) }, func(*testReplica) {}, copyjob.Completed},
		"freezes":    {freeze, thaw, copyjob.Completed},
		"loses etcd": {func(r *testReplica) { r.kv.Freeze() }, thaw, copyjob.Completed},
		"loses S3":   {func(r *testReplica) { r.store.Freeze() }, thaw, copyjob.Completed},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				one := func(o *testOptions) { o.Parts.CopyInFlight = 2 }
				a := e.start("a", one) // leader and worker
				settle()
				b := e.start("b", one)
				c0 := e.start("c", func(o *testOptions) { o.Parts.Slots = -1 }) // observer
				s := e.create(a, e.richCollection(a, "c", 96), "one")
				before := e.contents()
				sp := restoreSpecOf(s)
				settle()
				a.store.SetLatency(400 * time.Millisecond)
				b.store.SetLatency(400 * time.Millisecond)
				job := e.restore(c0, sp)
				go func() {
					time.Sleep(5 * time.Second)
					c.hurt(a)
					time.Sleep(40 * time.Second)
					c.heal(a)
				}()
				end := e.watchProgress(c0, job.ID)
				if end.Job.State != c.end {
					t.Errorf("%+v of %+v", end, end.Job)
				}
				if name != "loses S3" && end.Retries == 0 {
					t.Errorf("no task was tried again: %+v", end)
				}
				time.Sleep(5 * time.Minute) // for late copies
				settle()
				e.checkRestored(c0, before, end.Job, sp)
			})
		})
	}
}

func freeze(r *testReplica) {
	r.kv.Freeze()
	r.store.Freeze()
}

func thaw(r *testReplica) {
	r.kv.Thaw()
	r.store.Thaw()
}

// kill makes all further calls of r fail.
func kill(r *testReplica) {
	g := newKiller()
	g.failWrite(r, -1, meta.Before, true)
	g.mu.Lock()
	defer g.mu.Unlock()
	g.fire(true)
}

// TestRestoresShareWorkers checks that several jobs use all replicas.
func TestRestoresShareWorkers(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		var rs []*testReplica
		for _, name := range []string{"a", "b", "c"} {
			r := e.start(name, func(o *testOptions) { o.Parts.Slots = 2 })
			r.store.SetLatency(100 * time.Millisecond)
			rs = append(rs, r)
		}
		s := e.create(rs[0], e.richCollection(rs[0], "c", 140), "one")
		settle()
		for _, r := range rs {
			r.store.Plan(nil) // resets the counters
		}
		var jobs []*copyjob.Job
		var specs []*RestoreSpec
		for i := range 4 {
			sp := restoreSpecOf(s)
			sp.Name = fmt.Sprint("copy", i)
			specs = append(specs, sp)
			jobs = append(jobs, e.restore(rs[i%3], sp))
		}
		for _, job := range jobs {
			if end := e.watchProgress(rs[1], job.ID); end.Job.State != copyjob.Completed || end.Retries != 0 {
				t.Errorf("%+v of %+v", end, end.Job)
			}
		}
		for i, r := range rs {
			if n := r.store.Calls(object.OpCopy); n < 100 {
				t.Errorf("replica %d made %d copies", i, n)
			}
		}
		all := e.contents()
		for i, job := range jobs {
			e.checkRestored(rs[0], all, job, specs[i])
		}
	})
}

// TestRestoreRolling restarts the replicas in turn until the restore completes.
func TestRestoreRolling(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		few := func(o *testOptions) { o.Parts.CopyInFlight = 1 }
		rs := []*testReplica{e.start("r0", few), e.start("r1", few), e.start("r2", few)}
		s := e.create(rs[0], e.richCollection(rs[0], "c", 140), "one")
		before := e.contents()
		sp := restoreSpecOf(s)
		for _, r := range rs {
			r.store.SetLatency(300 * time.Millisecond)
		}
		job := e.restore(rs[0], sp)
		n := 0
		for ; !e.jobs()[0].State.Ended(); n++ {
			time.Sleep(4 * time.Second)
			rs[n%3].stop()
			rs[n%3] = e.start(fmt.Sprint("r", n+3), few)
			rs[n%3].store.SetLatency(300 * time.Millisecond)
			if n > 500 {
				t.Fatalf("does not end: %+v", e.jobs()[0])
			}
		}
		end := e.waitEnded(rs[0], job.ID)
		t.Logf("%d restarts, %d retries, %v", n, end.Retries, end.Job.EndTime.Sub(end.Job.StartTime))
		if end.Job.State != copyjob.Completed || n < 3 {
			t.Fatalf("after %d restarts: %+v: %s: %s", n, end.Job, end.Job.Reason, end.Job.Message)
		}
		settle()
		e.checkRestored(rs[0], before, end.Job, sp)
	})
}

// TestRestorePriority checks that the job of the highest priority gets workers first.
func TestRestorePriority(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Slots = 1 })
		s := e.create(r, e.richCollection(r, "c", 140), "one")
		r.store.SetLatency(100 * time.Millisecond)
		var jobs []*copyjob.Job
		for i, priority := range []int{0, 0, 7, -3, 7} {
			sp := restoreSpecOf(s)
			sp.Name, sp.Priority = fmt.Sprint("copy", i), priority
			jobs = append(jobs, e.restore(r, sp))
		}
		var ends []time.Time
		for _, job := range jobs {
			end := e.waitEnded(r, job.ID)
			if end.Job.State != copyjob.Completed {
				t.Errorf("%+v", end.Job)
			}
			ends = append(ends, end.Job.EndTime)
		}
		order := []int{2, 4, 0, 1, 3}
		for i := range order[1:] {
			if x, y := order[i], order[i+1]; !ends[x].Before(ends[y]) {
				t.Errorf("job %d ended at %v, job %d at %v", x, ends[x], y, ends[y])
			}
		}
	})
}

// TestRestoreLimits checks that jobs keep to their limits, and to a changed limit at once.
func TestRestoreLimits(t *testing.T) {
	for _, replicas := range []int{1, 2} {
		inEnv(t, func(t *testing.T, e *env) {
			var r *testReplica
			for i := range replicas {
				r = e.start(fmt.Sprint("r", i))
			}
			col, _, _ := e.collection(r, "c")
			for range 140 { // 140 KB
				seg := e.segment(r, col, 0, 1, 9)
				seg.Files[0].Size = 1000
				seg.Files[0].Path = catalog.NativePath(col.ID, &seg, &seg.Files[0])
				if _, err := e.objects.Put(t.Context(), "data/"+seg.Files[0].Path, []byte(strings.Repeat("x", 1000))); err != nil {
					t.Fatal(err)
				}
				e.add(r, col, seg)
			}
			e.checkpoint(r, col, 10, 10)
			s := e.create(r, col, "one")
			bytes := func(job *copyjob.Job) int {
				return len(e.objectsUnder(fmt.Sprintf("data/%d/", job.Target))) * 1000
			}
			// checkRate checks the copy rate of a job during a time.
			checkRate := func(job *copyjob.Job, rate int, over time.Duration) {
				t.Helper()
				settle()
				from := bytes(job)
				time.Sleep(over)
				settle()
				got := float64(bytes(job)-from) / over.Seconds()
				if got < 0.9*float64(rate) || got > 1.1*float64(rate) {
					t.Errorf("%d replicas: %.0f bytes a second, want %d", replicas, got, rate)
				}
			}
			sp := restoreSpecOf(s)
			sp.Limits = copyjob.Limits{Bytes: 400}
			job := e.restore(r, sp)
			time.Sleep(10 * time.Second)
			checkRate(job, 400, time.Minute)
			if _, err := r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{Bytes: 100}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(20 * time.Second)
			checkRate(job, 100, 2*time.Minute)
			if _, err := r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{Bytes: 2000}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Second)
			checkRate(job, 2000, 20*time.Second)
			// A tiny rate, and then no limit: waiting copies start at once.
			if _, err := r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{Bytes: 1, Requests: 1}); err != nil {
				t.Fatal(err)
			}
			time.Sleep(5 * time.Minute)
			st, err := r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{})
			if err != nil || st.Job.State != copyjob.Executing {
				t.Fatalf("%+v, err = %v", st, err)
			}
			began := time.Now()
			if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
				t.Errorf("%+v", end.Job)
			}
			if d := time.Since(began); d > 5*time.Second {
				t.Errorf("without a limit it took %v", d)
			}
			// Requests: 140 copies, and as many lists before and after, are 420.
			sp.Name, sp.Limits = "slow", copyjob.Limits{Requests: 10}
			job = e.restore(r, sp)
			began = time.Now()
			if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
				t.Errorf("%+v", end.Job)
			}
			if d := time.Since(began); d < 36*time.Second || d > 70*time.Second {
				t.Errorf("420 requests at 10 a second took %v", d)
			}
		})
	}
}

// TestLimitsBeforeTheJob checks that a worker that has tasks of a job, but not yet the job,
// keeps to the job's limits.
func TestLimitsBeforeTheJob(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("leader", func(o *testOptions) { o.Parts.Slots = -1 })
		col, _, _ := e.collection(r, "c")
		for range 40 {
			s := e.segment(r, col, 0, 1, 9)
			if _, err := e.objects.Put(t.Context(), "data/"+s.Files[0].Path, make([]byte, s.Files[0].Size)); err != nil {
				t.Fatal(err)
			}
			e.add(r, col, s)
		}
		e.checkpoint(r, col, 10, 10)
		s := e.create(r, col, "one")
		e.start("worker", func(o *testOptions) { o.KV = &withoutJobs{KV: e.kv} })
		settle() // it follows jobs, and the leader leads
		sp := restoreSpecOf(s)
		sp.Limits = copyjob.Limits{Requests: 10}
		job := e.restore(r, sp)
		began := time.Now()
		if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
			t.Errorf("%+v", end.Job)
		}
		// 40 copies, and as many lists before and after.
		if d := time.Since(began); d < 10*time.Second || d > 30*time.Second {
			t.Errorf("120 requests at 10 a second took %v", d)
		}
	})
}

// withoutJobs is a metadata store that sends no changes of restore jobs.
type withoutJobs struct{ meta.KV }

func (k *withoutJobs) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	return &watchWithoutJobs{k.KV.Watch(ctx, from, to, after)}
}

type watchWithoutJobs struct{ meta.Watcher }

func (w *watchWithoutJobs) Next() (meta.WatchBatch, error) {
	b, err := w.Watcher.Next()
	b.Events = slices.DeleteFunc(b.Events, func(e meta.Event) bool { return strings.HasPrefix(e.KV.Key, keys.JobPrefix) })
	return b, err
}

// TestRestoreAfterRestart counts the writes of a new leader that finds many running tasks.
func TestRestoreAfterRestart(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a", func(o *testOptions) { o.Parts.Slots = 64 })
		col, _, _ := e.collection(a, "c")
		const n = 64 * copyjob.TaskSegments
		ids, err := a.catalog.AllocateIDs(t.Context(), noToken, n)
		if err != nil {
			t.Fatal(err)
		}
		list := make([]segment.Segment, n)
		for i := range list {
			list[i] = segment.Segment{
				ID: ids.First + int64(i), Level: 1, State: segment.Flushed, Rows: 1, DML: segment.Position{Timestamp: 5},
				Files: []segment.File{{Kind: segment.KindInsert, Field: 100, LogID: 1, Size: 10, MinTimestamp: 1, MaxTimestamp: 4}},
			}
			e.putFiles(col.ID, &list[i])
		}
		e.add(a, col, list...)
		e.checkpoint(a, col, 10, 10)
		s := e.create(a, col, "one")
		before := e.contents()
		a.store.SetLatency(10 * time.Second) // no copy ends before the restart
		sp := restoreSpecOf(s)
		job := e.restore(a, sp)
		for e.jobs()[0].Phase != copyjob.Copy {
			time.Sleep(time.Second)
		}
		time.Sleep(time.Second)
		settle()
		if n := len(e.keysUnder(keys.AssignedPrefix)); n != 64 {
			t.Fatalf("%d tasks are assigned", n)
		}
		kill(a)
		a.stop()
		time.Sleep(time.Minute)
		settle()
		_, _, from, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		b := e.start("b", func(o *testOptions) { o.Parts.Slots = 64 })
		b.store.Freeze()
		time.Sleep(10 * time.Second)
		settle()
		_, _, to, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		if n := len(e.keysUnder(keys.AssignedPrefix)); n != 64 {
			t.Errorf("%d tasks are assigned again", n)
		}
		t.Logf("%d writes for 64 tasks", to-from)
		if to-from > 2*64 {
			t.Errorf("%d writes for 64 tasks", to-from)
		}
		b.store.Thaw()
		end := e.waitEnded(b, job.ID)
		if end.Job.State != copyjob.Completed || end.Retries != 64 {
			t.Errorf("%+v of %+v", end, end.Job)
		}
		e.checkRestored(b, before, end.Job, sp)
	})
}

// TestRestoreTwoLeaders freezes the leader at each of its writes until another leader has
// ended the job: the late write fails.
func TestRestoreTwoLeaders(t *testing.T) {
	for _, missing := range []bool{false, true} {
		forEachFault(t, 100, func(n int) bool {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				a := e.start("a")
				settle()
				b := e.start("b")
				s := e.create(b, e.richCollection(b, "c", 8), "one")
				if missing {
					list := e.segments(b, s)
					if err := e.objects.Delete(t.Context(), "data/"+list[7].Files[0].Path); err != nil {
						t.Fatal(err)
					}
				}
				before := e.contents()
				var mu sync.Mutex
				left := n
				thawed := make(chan struct{})
				a.kv.Hook(func(c meta.Call) meta.Fault {
					if c.Method != meta.MethodTxn {
						return meta.NoFault
					}
					mu.Lock()
					left--
					here := left == -1
					mu.Unlock()
					if here {
						fired = true
						freeze(a)
						<-thawed // the write itself is late too
					}
					return meta.NoFault
				})
				sp := restoreSpecOf(s)
				job := e.restore(b, sp)
				end := e.waitEnded(b, job.ID)
				want := copyjob.Completed
				if missing {
					want = copyjob.Failed
				}
				if end.Job.State != want {
					t.Errorf("%+v", end.Job)
				}
				close(thawed)
				thaw(a)
				time.Sleep(time.Minute)
				settle()
				if got := e.jobs(); len(got) != 1 || got[0].Revision != end.Job.Revision {
					t.Errorf("the job changed after its end: %+v", got[0])
				}
				e.checkOutcome(b, before, end, sp)
			})
			return fired
		})
	}
}

// TestRollBackWithLaggingTable checks that a leader whose table lacks the last assignments
// does not roll back while a worker runs a task.
func TestRollBackWithLaggingTable(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		lag := &laggingKV{}
		a := e.start("a", func(o *testOptions) {
			lag.KV = o.KV
			o.KV = lag
			o.Parts.Slots = -1
		})
		settle()
		b := e.start("b")
		settle()
		s := e.create(b, e.richCollection(b, "c", 12), "one")
		before := e.contents()
		b.store.SetLatency(time.Second)
		lag.hold()
		job := e.restore(b, restoreSpecOf(s))
		time.Sleep(500 * time.Millisecond) // copies are running
		if n := len(e.keysUnder(keys.AssignedPrefix)); n != 1 {
			t.Fatalf("%d tasks are assigned", n)
		}
		b.kv.Freeze() // delays the news that the job is given up
		if _, err := a.Jobs.Cancel(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(3500 * time.Millisecond)
		settle()
		if job := e.jobs()[0]; job.State.Ended() {
			t.Errorf("%v while a worker has a task", job.State)
		}
		b.kv.Thaw()
		lag.release()
		end := e.waitEnded(a, job.ID)
		if end.Job.State != copyjob.Canceled {
			t.Errorf("%+v", end.Job)
		}
		time.Sleep(time.Minute)
		settle()
		e.checkNoTraces(before)
	})
}

// TestRestoreWorkerCutOff checks that a worker without the metadata store stops copying
// before its assignments expire, so that no copy follows the roll back.
func TestRestoreWorkerCutOff(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a", func(o *testOptions) { o.Parts.Slots = -1 })
		settle()
		b := e.start("b", func(o *testOptions) { o.Parts.CopyInFlight = 1 })
		settle()
		s := e.create(a, e.richCollection(a, "c", 32), "one")
		before := e.contents()
		b.store.SetLatency(500 * time.Millisecond)
		job := e.restore(a, restoreSpecOf(s))
		e.waitAssigned()
		time.Sleep(20 * time.Second)
		b.kv.Freeze()
		for len(e.keysUnder(keys.AssignedPrefix)) > 0 {
			time.Sleep(10 * time.Millisecond)
			settle()
		}
		made := len(e.objectsUnder(""))
		time.Sleep(time.Minute)
		settle()
		if n := len(e.objectsUnder("")); n != made {
			t.Errorf("a worker without a lease made %d objects", n-made)
		}
		if _, err := a.Jobs.Cancel(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		if end := e.waitEnded(a, job.ID); end.Job.State != copyjob.Canceled {
			t.Errorf("%+v", end.Job)
		}
		b.kv.Thaw()
		time.Sleep(time.Minute)
		settle()
		e.checkNoTraces(before)
	})
}

// laggingKV delays watches of workers.
type laggingKV struct {
	meta.KV
	mu   sync.Mutex
	held chan struct{}
}

func (l *laggingKV) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.held = make(chan struct{})
}

func (l *laggingKV) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	close(l.held)
	l.held = nil
}

func (l *laggingKV) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	w := l.KV.Watch(ctx, from, to, after)
	if !strings.HasPrefix(from, "/worker/") {
		return w
	}
	return &lateWatch{w, l, ctx}
}

type lateWatch struct {
	meta.Watcher
	l   *laggingKV
	ctx context.Context //nolint:containedctx // that of the watch
}

func (w *lateWatch) Next() (meta.WatchBatch, error) {
	b, err := w.Watcher.Next()
	w.l.mu.Lock()
	held := w.l.held
	w.l.mu.Unlock()
	if held != nil {
		select {
		case <-held:
		case <-w.ctx.Done():
			return meta.WatchBatch{}, w.ctx.Err()
		}
	}
	return b, err
}
