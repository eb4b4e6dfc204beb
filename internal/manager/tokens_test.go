package manager

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// atOnce makes n concurrent calls, on the replicas in turn, and returns their results.
func atOnce[T any](rs []*testReplica, n int, call func(r *testReplica) (T, error)) ([]T, []error) {
	results, errs := make([]T, n), make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { results[i], errs[i] = call(rs[i%len(rs)]) })
	}
	group.Wait()
	return results, errs
}

// TestOneTokenAtOnce makes each call that takes a token concurrently on three replicas:
// it has one effect, and all get the same answer. The token with another request is
// rejected, also concurrently.
func TestOneTokenAtOnce(t *testing.T) {
	const n = 64
	inEnv(t, func(t *testing.T, e *env) {
		ctx := t.Context()
		rs := []*testReplica{e.start("a"), e.start("b"), e.start("c")}
		col := e.richCollection(rs[0], "c", 4)
		for _, r := range rs {
			r.store.SetLatency(100 * time.Millisecond)
		}
		tok := token("create", "one")
		made, errs := atOnce(rs, n, func(r *testReplica) (*snapshot.Record, error) {
			return r.Create(ctx, tok, spec(col, "one"))
		})
		for i, s := range made {
			if errs[i] != nil || s.ID != made[0].ID || s.Revision != made[0].Revision || s.State != snapshot.Committed {
				t.Fatalf("call %d: %v, err = %v; the first %v", i, s, errs[i], made[0])
			}
		}
		if list := e.check(rs[1]); len(list) != 1 {
			t.Errorf("one token made %v", list)
		}
		_, errs = atOnce(rs, n,
			func(r *testReplica) (*snapshot.Record, error) {
				return r.Create(ctx, token("create", "two"), spec(col, "two"))
			})
		for _, err := range errs {
			wantError(t, err, request.ErrReused)
		}

		// Two different requests with one token: one succeeds, the other is rejected.
		var asked atomic.Int64
		won, errs := atOnce(rs, n, func(r *testReplica) (*snapshot.Record, error) {
			name := []string{"x", "y"}[asked.Add(1)%2]
			return r.Create(ctx, token("either", name), spec(col, name))
		})
		for i, err := range errs {
			if err != nil && !errors.Is(err, request.ErrReused) {
				t.Errorf("call %d: %v, err = %v", i, won[i], err)
			}
		}
		list := e.check(rs[2])
		if len(list) != 2 {
			t.Errorf("two tokens made %v", list)
		}

		// A restore and a drop.
		sp := restoreSpecOf(made[0])
		tok.Method, tok.Value = "RestoreSnapshot", "restore"
		before := e.contents()
		jobs, errs := atOnce(rs, n, func(r *testReplica) (*copyjob.Job, error) { return r.Restore(ctx, tok, sp) })
		for i, job := range jobs {
			if errs[i] != nil || job.ID != jobs[0].ID {
				t.Fatalf("call %d: %v, err = %v; the first %v", i, job, errs[i], jobs[0])
			}
		}
		if all := e.jobs(); len(all) != 1 {
			t.Errorf("one token made %v", all)
		}
		e.checkRestored(rs[0], before, e.waitEnded(rs[0], jobs[0].ID).Job, sp)
		tok.Method, tok.Value = "DropSnapshot", "drop"
		_, errs = atOnce(rs, n, func(r *testReplica) (int64, error) { return r.Drop(ctx, tok, Ref{Name: "one"}, 0) })
		for _, err := range errs {
			wantError(t, err, nil)
		}
		// The name is free; a repeat does not drop another snapshot of the name.
		again := e.create(rs[0], col, "one")
		if id, err := rs[1].Drop(ctx, tok, Ref{Name: "one"}, 0); err != nil || id != made[0].ID {
			t.Errorf("the repeat dropped %d, err = %v", id, err)
		}
		if got, err := rs[2].Get(ctx, Ref{Name: "one"}); err != nil || got.ID != again.ID {
			t.Errorf("got %v, err = %v", got, err)
		}

		// Allocation of ids.
		tok.Method, tok.Value = "AllocateIDs", "ids"
		ids, errs := atOnce(rs, n, func(r *testReplica) (catalog.IDRange, error) {
			return r.catalog.AllocateIDs(ctx, tok, 7)
		})
		for i := range ids {
			if errs[i] != nil || ids[i] != ids[0] {
				t.Errorf("call %d: %v, err = %v; the first %v", i, ids[i], errs[i], ids[0])
			}
		}
	})
}
