package manager

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestRestoreWithStoreDown takes the object store down in phase copy, for days and for a
// while.
func TestRestoreWithStoreDown(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		before := e.contents()
		down := func(ops ...object.Op) {
			r.store.Plan(func(c object.Call) object.Fault {
				if slices.Contains(ops, c.Op) {
					return object.FaultBefore
				}
				return object.FaultNone
			})
		}
		sp := restoreSpecOf(s)

		// For days: after one day the job is given up, and the claim stays until the store
		// answers deletes.
		down(object.OpCopy)
		job := e.restore(r, sp)
		settle() // until it is prepared
		down(object.OpCopy, object.OpDelete, object.OpList)
		time.Sleep(23 * time.Hour)
		st, err := r.Jobs.Get(t.Context(), job.ID)
		if err != nil || st.Job.State != copyjob.Executing || st.Job.Phase != copyjob.Copy || st.Waiting.IsZero() ||
			time.Since(st.Waiting) < 22*time.Hour || !strings.Contains(st.LastError, "injected fault") {
			t.Fatalf("%+v of %+v, err = %v", st, st.Job, err)
		}
		time.Sleep(time.Hour + 5*time.Minute)
		st, err = r.Jobs.Get(t.Context(), job.ID)
		if err != nil || st.Job.State != copyjob.Executing || st.Job.Phase != copyjob.RollBack ||
			st.Job.Reason != "STALLED" || !strings.Contains(st.LastError, "injected fault") || !st.Waiting.IsZero() {
			t.Fatalf("%+v of %+v, err = %v", st, st.Job, err)
		}
		if _, err := r.catalog.Collection(t.Context(), catalog.Ref{DB: sp.DB, Name: sp.Name}); err != nil {
			t.Errorf("the claim is gone: %v", err)
		}
		wantError(t, dropErr(r, s), ErrSnapshotPinned)
		down(object.OpCopy)
		end := e.waitEnded(r, job.ID)
		if end.Job.State != copyjob.Failed || end.Job.Reason != "STALLED" ||
			!strings.Contains(end.Job.Message, "injected fault") ||
			!strings.Contains(end.Job.Message, "no file was finished for 24h") {
			t.Errorf("%+v of %+v", end, end.Job)
		}
		e.checkNoTraces(before)

		// For a while: the restore completes.
		job = e.restore(r, sp)
		time.Sleep(3 * time.Second)
		settle()
		st, err = r.Jobs.Get(t.Context(), job.ID)
		if err != nil || st.Job.Phase != copyjob.Copy || st.Retries == 0 ||
			!strings.Contains(st.LastError, "injected fault") {
			t.Fatalf("%+v of %+v, err = %v", st, st.Job, err)
		}
		r.clearFaults()
		if end = e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed || end.Retries == 0 || end.LastError != "" {
			t.Errorf("%+v of %+v", end, end.Job)
		}
		e.checkRestored(r, before, job, sp)
	})
}

// TestRestoreOutlastsOutages takes the object store down before prepare or during the
// copies: finished copies stay, and the restore completes.
func TestRestoreOutlastsOutages(t *testing.T) {
	for _, outage := range []time.Duration{time.Minute, 4 * time.Minute, 10 * time.Minute, 5 * time.Hour, 23 * time.Hour} {
		for _, after := range []int{0, 30} { // copies
			t.Run(fmt.Sprintf("%v after %d copies", outage, after), func(t *testing.T) {
				inEnv(t, func(t *testing.T, e *env) {
					r := e.start("a", atLeisure, func(o *testOptions) { o.Parts.Collector.Off = true })
					s := e.create(r, e.richCollection(r, "c", 40), "one")
					copies, began := 0, time.Time{}
					r.store.Plan(func(c object.Call) object.Fault {
						if c.Op == object.OpCopy {
							copies++
						}
						prepares := c.Op == object.OpList && after == 0
						if (prepares || after > 0 && copies == after) && began.IsZero() {
							began = time.Now()
						}
						if !began.IsZero() && time.Since(began) < outage {
							return object.FaultBefore
						}
						return object.FaultNone
					})
					before := e.contents()
					job := e.restore(r, restoreSpecOf(s))
					time.Sleep(outage - time.Second)
					settle()
					if n := len(e.objectsUnder(fmt.Sprintf("data/%d/", job.Target))); n < after/2 {
						t.Errorf("%d objects of the target exist during the outage", n)
					}
					end := e.waitEnded(r, job.ID)
					if end.Job.State != copyjob.Completed {
						t.Fatalf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
					}
					e.checkRestored(r, before, end.Job, restoreSpecOf(s))
				})
			})
		}
	}
}

// mustFailAfter restores, and checks that the job fails after a time and not before.
func (e *env) mustFailAfter(r *testReplica, sp *RestoreSpec, after time.Duration, reason, names string) {
	e.t.Helper()
	before := e.contents()
	job := e.restore(r, sp)
	time.Sleep(after - time.Second)
	settle()
	st, err := r.Jobs.Get(e.t.Context(), job.ID)
	if err != nil || st.Job.State != copyjob.Executing || st.Job.Phase != copyjob.Copy {
		e.t.Fatalf("%+v, err = %v", st, err)
	}
	for n := 0; n < 100 && !e.jobs()[0].State.Ended(); n++ { // each finished file extends the wait
		time.Sleep(time.Hour)
		settle()
	}
	end := e.waitEnded(r, job.ID)
	if end.Job.State != copyjob.Failed || end.Job.Reason != reason || !strings.Contains(end.Job.Message, names) {
		e.t.Errorf("ended %v: %s: %s; want %s with %q", end.Job.State, end.Job.Reason, end.Job.Message, reason, names)
	}
	e.checkNoTraces(before)
}

// TestRestoreWaitsUntilItsDeadline checks that the job's deadline ends a wait for the
// store.
func TestRestoreWaitsUntilItsDeadline(t *testing.T) {
	inEnv(t, func(_ *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 4), "one")
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpCopy {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		sp := restoreSpecOf(s)
		sp.Timeout = 2 * time.Hour
		e.mustFailAfter(r, sp, 2*time.Hour, "TIMEOUT", "deadline")
	})
}

// TestRestoreStallsDespiteRepeats has one file that is never copied: repeated copies of
// the other files are no progress.
func TestRestoreStallsDespiteRepeats(t *testing.T) {
	inEnv(t, func(_ *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.StallTimeout = 2 * time.Hour })
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpCopy && strings.Contains(c.Keys[0], "/of-an-engine/") {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		e.mustFailAfter(r, restoreSpecOf(s), 2*time.Hour, "STALLED", "of-an-engine")
	})
}

// TestRestoreWithoutMetadataStore takes the metadata store down during the copies, for
// longer than the timeout of a transaction: the restore completes.
func TestRestoreWithoutMetadataStore(t *testing.T) {
	for _, down := range []time.Duration{
		time.Second, 3 * time.Second, 7 * time.Second, 30 * time.Second, 5 * time.Minute,
	} {
		t.Run(down.String(), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				s := e.create(r, e.richCollection(r, "c", 12), "one")
				before := e.contents()
				sp := restoreSpecOf(s)
				r.store.SetLatency(300 * time.Millisecond)
				job := e.restore(r, sp)
				e.waitAssigned()
				g := newKiller()
				g.fire(true) // all calls fail from now on
				g.failWrite(r, -1, 0, false)
				time.Sleep(down)
				r.clearFaults()
				time.Sleep(5 * time.Minute)
				end, err := r.Jobs.Get(t.Context(), job.ID)
				if err != nil || end.Job.State != copyjob.Completed {
					t.Fatalf("%+v, err = %v", end, err)
				}
				e.checkRestored(r, before, job, sp)
			})
		})
	}
}

// TestRestoreInterruptedByTheMetadataStore makes only transactions fail, so that the task
// cannot end and the worker keeps its lease.
func TestRestoreInterruptedByTheMetadataStore(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		before := e.contents()
		sp := restoreSpecOf(s)
		r.store.SetLatency(time.Second)
		job := e.restore(r, sp)
		e.waitAssigned()
		g := newKiller()
		failAllWrites(g, r)
		time.Sleep(time.Minute)
		r.clearFaults()
		time.Sleep(5 * time.Minute)
		end, err := r.Jobs.Get(t.Context(), job.ID)
		if err != nil || end.Job.State != copyjob.Completed {
			t.Fatalf("%+v of %+v, err = %v", end, end.Job, err)
		}
		e.checkRestored(r, before, job, sp)
	})
}
