package manager

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// faultCase is a restore with one fault.
type faultCase struct {
	segments int
	kill     bool // the replica dies at the fault; else it continues
	missing  bool // a file of the snapshot is missing, so the restore fails
	cancel   bool // the restore is canceled during its copies
	plan     func(g *killer, r *testReplica)
}

// run reports whether the fault happened.
func (d faultCase) run(t *testing.T, what string) (fired bool) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		col := e.richCollection(a, "c", d.segments)
		s := e.create(a, col, "one")
		if d.missing {
			list := e.segments(a, s)
			if err := e.objects.Delete(t.Context(), "data/"+list[len(list)-1].Files[0].Path); err != nil {
				t.Fatal(err)
			}
		}
		settle()
		before := e.contents()
		sp, tok := restoreSpecOf(s), token("t", "restore")
		if d.cancel {
			a.store.SetLatency(time.Second) // so that the cancel meets its copies
		}
		g := newKiller()
		d.plan(g, a)
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		job, err := a.Restore(ctx, tok, sp)
		cancel()
		if err == nil && d.cancel {
			time.Sleep(1500 * time.Millisecond)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			_, _ = a.Jobs.Cancel(ctx, job.ID) // repeated below
			cancel()
		}
		r := a
		if err != nil && !g.isDead() {
			e.mustRestore(a, tok, sp)
		}
		if g.isDead() || !e.waitEndedOrDead(g) {
			a.stop()
			r = e.start("b")
		}
		fired = g.faults() > 0
		a.clearFaults()
		job = e.mustRestore(r, tok, sp)
		ended := false // before the cancel
		if d.cancel {
			if _, err := r.Jobs.Cancel(t.Context(), job.ID); errors.Is(err, copyjob.ErrEnded) {
				ended = true
			} else if err != nil {
				t.Error(err)
			}
		}
		end := e.waitEnded(r, job.ID)
		settle()
		want := copyjob.Completed
		switch {
		case d.missing:
			want = copyjob.Failed
		case d.cancel && !ended:
			want = copyjob.Canceled
		}
		if end.Job.State != want {
			t.Errorf("%s: ended %v: %s: %s", what, end.Job.State, end.Job.Reason, end.Job.Message)
		}
		if n := len(e.jobs()); n != 1 {
			t.Errorf("%s: %d jobs", what, n)
		}
		e.checkOutcome(r, before, end, sp)
		if t.Failed() {
			t.Errorf("at %s", what)
		}
	})
	return fired
}

// TestReplicaDiesAtEachWrite kills the replica at each of its writes, before and after the
// write takes effect; another replica continues.
func TestReplicaDiesAtEachWrite(t *testing.T) {
	for _, d := range []faultCase{{segments: 40}, {segments: 4, missing: true}, {segments: 4, cancel: true}} {
		for _, fault := range []meta.Fault{meta.Before, meta.After} {
			n := forEachFault(t, 200, func(n int) bool {
				d.kill = true
				d.plan = func(g *killer, r *testReplica) { g.failWrite(r, n, fault, true) }
				return d.run(t, fmt.Sprintf("write %d, fault %v, %+v", n, fault, d))
			})
			t.Logf("%d writes", n)
			if n < 6 {
				t.Errorf("%+v: only %d writes", d, n)
			}
		}
	}
}

// TestRestoreWithFailedWrites fails each write, before and after it takes effect; the same
// replica continues.
func TestRestoreWithFailedWrites(t *testing.T) {
	for _, d := range []faultCase{{segments: 40}, {segments: 4, missing: true}, {segments: 4, cancel: true}} {
		for _, fault := range []meta.Fault{meta.Before, meta.After} {
			forEachFault(t, 200, func(n int) bool {
				d.plan = func(g *killer, r *testReplica) { g.failWrite(r, n, fault, false) }
				return d.run(t, fmt.Sprintf("write %d, fault %v, %+v", n, fault, d))
			})
		}
	}
}

// TestRestoreWithFailedRequests fails each request to the object store, before and after
// it takes effect, with and without the death of the replica.
func TestRestoreWithFailedRequests(t *testing.T) {
	for _, kill := range []bool{false, true} {
		for _, d := range []faultCase{{segments: 5}, {segments: 3, missing: true}, {segments: 3, cancel: true}} {
			for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
				n := forEachFault(t, 400, func(n int) bool {
					d.kill = kill
					d.plan = func(g *killer, r *testReplica) { g.failRequest(r, n, fault, 1, kill) }
					return d.run(t, fmt.Sprintf("request %d, fault %v, %+v", n, fault, d))
				})
				t.Logf("%d requests", n)
			}
		}
	}
}
