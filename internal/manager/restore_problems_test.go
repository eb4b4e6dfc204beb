package manager

import (
	"context"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// namedFaults is a KV that fails the transactions with a name.
type namedFaults struct {
	meta.KV
	name atomic.Value // string
}

func (kv *namedFaults) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if name, _ := kv.name.Load().(string); name != "" && t.Name == name {
		return meta.TxnResult{}, meta.ErrUnavailable
	}
	return kv.KV.Txn(ctx, t)
}

// TestRestoreProblems checks that workers that cannot register and tasks that cannot be
// assigned are in the list of problems, and end when nothing is left to assign.
func TestRestoreProblems(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		faults, problems := &namedFaults{}, lasting.New(time.Now)
		faults.name.Store("restore.worker")
		r := e.start("a", func(o *testOptions) {
			faults.KV = o.KV
			o.KV, o.Problems = faults, problems
		})
		failing := func(name string, want bool) {
			t.Helper()
			settle()
			list := problems.States()
			at := slices.IndexFunc(list, func(s lasting.State) bool { return s.Name == name })
			if at < 0 || (list[at].Error != "") != want {
				t.Errorf("problems %+v, want %s failing: %v", list, name, want)
			}
		}
		col := e.filledCollection(r, "c", 3)
		s := e.create(r, col, "x")
		time.Sleep(time.Minute)
		failing("restore worker", true)
		failing("election", false)
		faults.name.Store("")
		time.Sleep(time.Minute)
		failing("restore worker", false)

		restore := func(name string) *copyjob.Job {
			faults.name.Store("restore.assign")
			job := e.restore(r, &RestoreSpec{Snapshot: Ref{ID: s.ID}, DB: "default", Name: name})
			time.Sleep(time.Minute)
			failing("restore assignment", true)
			return job
		}
		completes := restore("completes")
		faults.name.Store("")
		if end := e.waitEnded(r, completes.ID); end.Job.State != copyjob.Completed {
			t.Errorf("ended %v: %s", end.Job.State, end.Job.Message)
		}
		failing("restore assignment", false)

		canceled := restore("canceled")
		if _, err := r.Jobs.Cancel(t.Context(), canceled.ID); err != nil {
			t.Fatal(err)
		}
		e.waitEnded(r, canceled.ID)
		failing("restore assignment", false)

		restore("continued") // by another leader
		r.stop()
		failing("restore assignment", false)
	})
}
