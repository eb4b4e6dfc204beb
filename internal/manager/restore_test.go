package manager

import (
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestRestore restores a snapshot of three tasks.
func TestRestore(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col := e.filledCollection(r, "c", 70)
		s := e.create(r, col, "one")
		job, err := r.Restore(
			t.Context(),
			request.Token{},
			&RestoreSpec{Snapshot: Ref{ID: s.ID}, DB: "default", Name: "copy"},
		)
		if err != nil {
			t.Fatal(err)
		}
		end := e.waitEnded(r, job.ID)
		if end.Job.State != copyjob.Completed {
			t.Fatalf("%+v", end.Job)
		}
		target, err := r.catalog.Collection(t.Context(), catalog.Ref{DB: "default", Name: "copy"})
		if err != nil || target.ID != job.Target || target.State != catalog.Active {
			t.Fatalf("%+v, err = %v", target, err)
		}
		n, _, err := r.catalog.CountSegments(t.Context(), target.ID)
		if err != nil || n != 70 {
			t.Errorf("%d segments, err = %v", n, err)
		}
		for _, key := range e.keysUnder("/job/task/") {
			t.Errorf("%s is left", key)
		}
	})
}
