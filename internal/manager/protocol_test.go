package manager

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestCaptureFollowsThePendingKey drops and reclaims a segment after the call of a
// create and before its pending key exists: the segment must not be captured.
func TestCaptureFollowsThePendingKey(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		gone, kept := e.segment(b, col, 0, 1, 20), e.segment(b, col, 0, 1, 20)
		e.addWritten(b, col, gone, kept)
		e.checkpoint(b, col, 100, 100)
		settle()
		dropped := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGrant && !dropped { // of the create's lease
				dropped = true
				e.granted(e.reclaim(b, col, gc.BySnapshotd, e.dropSegments(b, col, gone.ID)...))
			}
			return meta.NoFault
		})
		s := e.create(r, col, "x")
		r.kv.Hook(nil)
		if !dropped {
			t.Fatal("nothing was dropped in between")
		}
		list := e.segments(r, s)
		if len(list) != 1 || list[0].ID != kept.ID {
			t.Errorf("the snapshot has %v, want segment %d alone", list, kept.ID)
		}
	})
}

// TestRollBackAbortsUploads checks that the rollback of a restore ends after the
// uploads of its copies were aborted.
func TestRollBackAbortsUploads(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		before := e.contents()
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpCopy || c.Op == object.OpAbort {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		job := e.restore(r, restoreSpecOf(s))
		time.Sleep(time.Second)
		st, err := r.Jobs.Get(t.Context(), job.ID)
		if err != nil || st.Job.Phase != copyjob.Copy {
			t.Fatalf("%+v, err = %v", st.Job, err)
		}
		if _, err := r.Jobs.Cancel(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		settle()
		st, err = r.Jobs.Get(t.Context(), job.ID)
		if err != nil || st.Job.State != copyjob.Executing || st.Job.Phase != copyjob.RollBack {
			t.Fatalf("while no upload can be aborted the job is %+v, err = %v", st.Job, err)
		}
		r.store.Plan(nil)
		if end := e.waitEnded(r, job.ID).Job; end.State != copyjob.Canceled {
			t.Errorf("it ended as %v, %s", end.State, end.Message)
		}
		e.checkNoTraces(before)
	})
}
