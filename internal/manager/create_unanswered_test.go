package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// lateKV is a KV that delays transactions: the sender gets no answer, and the
// transaction is applied when the test calls arrive.
type lateKV struct {
	meta.KV

	mu   sync.Mutex
	lose func(meta.Txn) bool
	lost []meta.Txn
}

// Txn implements [meta.KV].
func (l *lateKV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	l.mu.Lock()
	lost := l.lose != nil && l.lose(t)
	if lost {
		l.lost = append(l.lost, t)
	}
	l.mu.Unlock()
	if lost {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w: lost", meta.ErrUnavailable)
	}
	return l.KV.Txn(ctx, t)
}

// arrive applies the delayed transactions and returns how many succeeded. A transaction
// whose lease has ended fails.
func (l *lateKV) arrive(t *testing.T) (applied int) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, txn := range l.lost {
		res, err := l.KV.Txn(t.Context(), txn)
		if err != nil && !errors.Is(err, meta.ErrLeaseNotFound) {
			t.Fatal(err)
		}
		if err == nil && res.Succeeded {
			applied++
		}
	}
	l.lost = nil
	return applied
}

func puts(t meta.Txn, prefix string) bool {
	return slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut &&
			strings.HasPrefix(op.From, prefix)
	})
}

func isBegin(t meta.Txn) bool  { return puts(t, pendingKeys) }
func isCommit(t meta.Txn) bool { return puts(t, generation) }

// inLateEnv is inEnv with a collection, and delays the transactions of replica "a".
func inLateEnv(t *testing.T, fn func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection)) {
	t.Helper()
	inEnv(t, func(t *testing.T, e *env) {
		late := &lateKV{KV: e.memory}
		e.kv = late
		a := e.start("a")
		e.kv = e.memory
		col, _, _ := e.collection(a, "c")
		e.add(a, col, e.segment(a, col, 0, 1, 2))
		e.checkpoint(a, col, 10, 10)
		settle()
		fn(t, e, a, late, col)
	})
}

// TestCreateSurvivesMetadataStoreOutage stops the metadata store for a while from each
// call of a create, before and after the call's effect, like a change of etcd's leader.
// The create waits and is not given up.
func TestCreateSurvivesMetadataStoreOutage(t *testing.T) {
	for _, away := range []time.Duration{2 * time.Second, 30 * time.Second} {
		for _, fault := range []meta.Fault{meta.Before, meta.After} {
			t.Run(fmt.Sprint(away, fault), func(t *testing.T) {
				n := 0
				for awayFrom(t, n, away, fault) {
					n++
				}
				if n < 4 {
					t.Errorf("a create makes only %d calls after it has begun", n)
				}
			})
		}
	}
}

// awayFrom stops the store from the nth call after the create's begin.
func awayFrom(t *testing.T, n int, away time.Duration, fault meta.Fault) (fired bool) {
	inEnv(t, func(t *testing.T, e *env) {
		r, other := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true }), e.start("b")
		col, _, _ := e.collection(other, "c")
		e.add(other, col, e.segment(other, col, 0, 1, 2))
		e.checkpoint(other, col, 10, 10)
		settle()
		counted := []meta.Method{
			meta.MethodGet, meta.MethodRange, meta.MethodScan, meta.MethodTxn,
			meta.MethodGrant, meta.MethodKeepAlive,
		}
		var mu sync.Mutex
		var until time.Time
		granted := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case fired && time.Now().Before(until):
				return meta.Before
			case fired || !slices.Contains(counted, c.Method):
				return meta.NoFault
			case !granted: // the create's lease is the first grant
				granted = c.Method == meta.MethodGrant
				return meta.NoFault
			}
			if n--; n >= 0 {
				return meta.NoFault
			}
			fired, until = true, time.Now().Add(away)
			return fault
		})
		tok := token("t", "r")
		s, err := r.Create(t.Context(), tok, spec(col, "x"))
		r.kv.Hook(nil)
		if err != nil && !errors.Is(err, meta.ErrUnavailable) { // before begin it may fail
			t.Errorf("call %d: %v", n, err)
		}
		again, err := other.Create(t.Context(), tok, spec(col, "x"))
		if err != nil || again.State != snapshot.Committed || s != nil && again.ID != s.ID {
			t.Errorf("created %v, and the repeat says %v, %v", s, again, err)
		}
		settle()
		if list := e.check(other); len(list) != 1 {
			t.Errorf("%v, want one", list)
		}
	})
	return fired
}

// TestLateCommit applies delayed commits after they were repeated: exactly one takes
// effect.
func TestLateCommit(t *testing.T) {
	inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
		n := 0
		late.lose = func(txn meta.Txn) bool {
			if isCommit(txn) {
				n++
			}
			return isCommit(txn) && n <= 5
		}
		tok := token("t", "r")
		s, err := a.Create(t.Context(), tok, spec(col, "x"))
		if err != nil || n != 6 {
			t.Fatalf("%v after %d commits, err = %v", s, n, err)
		}
		_, _, before, err := e.kv.Get(t.Context(), keys.Snapshot(s.ID))
		if err != nil {
			t.Fatal(err)
		}
		if applied := late.arrive(t); applied != 0 {
			t.Errorf("%d commits were applied after the one that was answered", applied)
		}
		got, err := a.Get(t.Context(), Ref{ID: s.ID})
		if err != nil || got.Revision != s.Revision || got.Revision > before {
			t.Errorf("got %+v, err = %v; created %+v", got, err, s)
		}
		e.check(a)
	})
}

// TestLateCommitIsFound applies the first commit while repeats are sent: they fail, and
// the create succeeds.
func TestLateCommitIsFound(t *testing.T) {
	inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
		late.lose = isCommit
		done := make(chan *snapshot.Record, 1)
		tok := token("t", "r")
		go func() {
			s, err := a.Create(t.Context(), tok, spec(col, "x"))
			if err != nil {
				t.Error(err)
			}
			done <- s
		}()
		time.Sleep(3 * time.Minute) // three times as long as its lease
		if len(e.keysUnder(pendingKeys)) != 1 {
			t.Fatal("the create is not alive")
		}
		if applied := late.arrive(t); applied != 1 {
			t.Errorf("%d commits were applied", applied)
		}
		late.mu.Lock()
		late.lose = nil
		late.mu.Unlock()
		s := <-done
		again, err := a.Create(t.Context(), tok, spec(col, "x"))
		if err != nil || s == nil || again.ID != s.ID || again.Revision != s.Revision {
			t.Errorf("created %v, the repeat says %v, %v", s, again, err)
		}
		e.check(a)
	})
}

// TestCommitWithoutAnswerEndsAtTheTimeout delays every commit: the create fails at its
// timeout, and no commit that arrives later is applied.
func TestCommitWithoutAnswerEndsAtTheTimeout(t *testing.T) {
	inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
		late.lose = isCommit
		tok := token("t", "r")
		begin := time.Now()
		_, err := a.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		if took := time.Since(begin); took < 10*time.Minute || took > 11*time.Minute {
			t.Errorf("it took %v, want the create timeout", took)
		}
		if !strings.Contains(errText(err), "did not answer within 10m0s") {
			t.Errorf("it does not say why: %v", err)
		}
		if applied := late.arrive(t); applied != 0 {
			t.Errorf("%d commits were applied after the create had failed", applied)
		}
		_, err = a.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		settle()
		if list := e.check(a); len(list) != 0 {
			t.Errorf("left: %v", list)
		}
		late.lose = nil
		e.create(a, col, "x")
	})
}

// TestUndecidedCommit delays commits and give-ups: the call reports an unknown outcome,
// and the repeat a final one.
func TestUndecidedCommit(t *testing.T) {
	for _, arrives := range []bool{false, true} {
		inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
			b := e.start("b")
			late.lose = func(txn meta.Txn) bool { return isCommit(txn) || puts(txn, recs) && !isBegin(txn) }
			tok := token("t", "r")
			applied := 0
			done := make(chan error, 1)
			go func() {
				_, err := a.Create(t.Context(), tok, spec(col, "x"))
				done <- err
			}()
			if arrives {
				time.Sleep(a.o.CreateTimeout - time.Second)
				late.mu.Lock()
				late.lost = late.lost[:1]
				late.mu.Unlock()
				a.kv.Freeze()
				applied = late.arrive(t)
				time.Sleep(time.Minute)
				a.kv.Thaw()
			}
			err := <-done
			if err == nil || !errors.Is(err, meta.ErrUnavailable) || errors.Is(err, ErrCreateAborted) {
				if !arrives || err != nil {
					t.Errorf("arrives %v: %v", arrives, err)
				}
			}
			s, err := b.Create(t.Context(), tok, spec(col, "x"))
			if arrives && (applied != 1 || err != nil || s.State != snapshot.Committed) {
				t.Errorf("%d commits were applied, and the repeat says %v, %v", applied, s, err)
			}
			if !arrives {
				wantError(t, err, ErrCreateAborted)
				if applied := late.arrive(t); applied != 0 {
					t.Errorf("%d transactions were applied after the create had failed", applied)
				}
			}
			settle()
			if list := e.check(b); len(list) != map[bool]int{true: 1}[arrives] {
				t.Errorf("arrives %v: %v", arrives, list)
			}
		})
	}
}

// TestLateBegin applies delayed begins after they were repeated: exactly one takes
// effect, also if the snapshot was dropped since.
func TestLateBegin(t *testing.T) {
	for _, tok := range []request.Token{{}, token("t", "r")} {
		inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
			n := 0
			late.lose = func(txn meta.Txn) bool {
				if isBegin(txn) {
					n++
				}
				return isBegin(txn) && n <= 3
			}
			s, err := a.Create(t.Context(), tok, spec(col, "x"))
			if err != nil || n != 4 {
				t.Fatalf("%v after %d begins, err = %v", s, n, err)
			}
			lost := slices.Clone(late.lost)
			if applied := late.arrive(t); applied != 0 {
				t.Errorf("%d begins were applied after the one that was answered", applied)
			}
			e.check(a)
			e.dropSnapshot(a, s)
			settle()
			late.lost = lost
			if applied := late.arrive(t); applied != 0 {
				t.Errorf("%d begins were applied after the snapshot was dropped", applied)
			}
			if list := e.check(a); len(list) != 0 {
				t.Errorf("left: %v", list)
			}
		})
	}
}

// TestBeginWithoutAnswerEndsWithItsLease delays every begin: the caller gets an unknown
// outcome, and no begin that arrives later is applied.
func TestBeginWithoutAnswerEndsWithItsLease(t *testing.T) {
	inLateEnv(t, func(t *testing.T, e *env, a *testReplica, late *lateKV, col catalog.Collection) {
		late.lose = isBegin
		tok := token("t", "r")
		begin := time.Now()
		_, err := a.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, err, meta.ErrUnavailable)
		if took := time.Since(begin); took > 70*time.Second {
			t.Errorf("it took %v", took)
		}
		if applied := late.arrive(t); applied != 0 {
			t.Errorf("%d begins were applied", applied)
		}
		late.lose = nil
		s, err := a.Create(t.Context(), tok, spec(col, "x"))
		if err != nil {
			t.Fatal(err)
		}
		if list := e.check(a); len(list) != 1 || list[0].ID != s.ID {
			t.Errorf("%v, want %v", list, s)
		}
	})
}

// TestRepeatAbandonsADeadCreate stops a replica during a create while there is no
// leader: a repeat with the token abandons the create, waiting or not, once its lease
// has ended, and the name is free.
func TestRepeatAbandonsADeadCreate(t *testing.T) {
	for _, noWait := range []bool{false, true} {
		inEnv(t, func(t *testing.T, e *env) {
			// A write that the frozen creator had begun may take effect after the removal; the sweep deletes its object.
			long := func(o *testOptions) {
				o.Parts.LeaderTTL, o.Parts.Collector.OrphanGrace = 24*time.Hour, time.Hour
				o.Parts.Collector.SweepInterval = 30 * time.Minute
			}
			a := e.start("a", long)
			settle()
			b := e.start("b", long)
			col, _, _ := e.collection(a, "c")
			e.add(a, col, e.segment(a, col, 0, 1, 2))
			e.checkpoint(a, col, 10, 10)
			tok := token("t", "r")
			a.store.Freeze()
			done := make(chan error, 1)
			go func() {
				_, err := a.Create(t.Context(), tok, spec(col, "x"))
				done <- err
			}()
			settle()
			a.kv.Freeze()
			begin := time.Now()
			sp := spec(col, "x")
			if noWait {
				sp.NoWait = true
				if s, err := b.Create(t.Context(), tok, sp); err != nil || s.State != snapshot.Pending {
					t.Errorf("while its lease lasts: %v, err = %v", s, err)
				}
				time.Sleep(b.o.LeaseTTL)
			}
			_, err := b.Create(t.Context(), tok, sp)
			wantError(t, err, ErrCreateAborted)
			if took := time.Since(begin); took > b.o.LeaseTTL+time.Second {
				t.Errorf("the repeat took %v, with a lease of %v", took, b.o.LeaseTTL)
			}
			if b.Leading() {
				t.Error("b leads")
			}
			s, err := b.Create(t.Context(), token("t2", "r"), spec(col, "x"))
			if err != nil || s.State != snapshot.Committed {
				t.Errorf("with another token: %v, err = %v", s, err)
			}
			a.kv.Thaw()
			a.store.Thaw()
			wantError(t, <-done, ErrCreateAborted)
			time.Sleep(3 * time.Hour)
			settle()
			if list := e.check(b); len(list) != 1 || list[0].ID != s.ID {
				t.Errorf("%v, want %v", list, s)
			}
		})
	}
}

// TestCreateSurvivesObjectStoreOutage stops the object store for a while, for each kind
// of call.
func TestCreateSurvivesObjectStoreOutage(t *testing.T) {
	for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a")
			col, _, _ := e.collection(r, "c")
			s := e.segment(r, col, 0, 1, 2)
			e.addWritten(r, col, s)
			e.checkpoint(r, col, 10, 10)
			sp := spec(col, "x")
			sp.Verify = true
			until := time.Now().Add(3 * time.Minute)
			r.store.Plan(func(object.Call) object.Fault {
				if time.Now().Before(until) {
					return fault
				}
				return object.FaultNone
			})
			if got, err := r.Create(t.Context(), request.Token{}, sp); err != nil || got.State != snapshot.Committed {
				t.Errorf("%v, err = %v", got, err)
			}
			r.store.Plan(nil)
			settle()
			e.check(r)
		})
	}
}
