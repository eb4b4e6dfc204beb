package election_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/test/virtual"
)

const key = "/election/leader"

// replica is a candidate with a faulty store.
type replica struct {
	name    string
	kv      *meta.Faulty
	elected chan leadership // one for each term
	stop    context.CancelFunc
	done    chan struct{} // closed when Run has returned
}

// leadership is a call of lead, which returns when its context ends or resign is closed.
type leadership struct {
	election.Term
	by     *replica
	ctx    context.Context //nolint:containedctx // for the test
	resign chan struct{}
}

// terms checks that terms are unique.
type terms struct {
	mu   sync.Mutex
	seen map[int64]string
}

func (ts *terms) add(t *testing.T, term election.Term) {
	ts.mu.Lock()
	defer ts.mu.Unlock()
	if other, twice := ts.seen[term.Create]; twice {
		t.Errorf("term %d belongs to %s and %s", term.Create, other, term.Name)
	}
	ts.seen[term.Create] = term.Name
}

// start runs a candidate on a store, which others may share.
func start(t *testing.T, name string, kv meta.KV, ttl time.Duration, elected chan leadership, ts *terms) *replica {
	ctx, cancel := context.WithCancel(t.Context())
	r := &replica{name: name, kv: meta.NewFaulty(kv), elected: elected, stop: cancel, done: make(chan struct{})}
	e := election.New(election.Options{KV: r.kv, Key: key, Name: name, TTL: ttl})
	go func() {
		defer close(r.done)
		err := e.Run(ctx, func(ctx context.Context, term election.Term) error {
			ts.add(t, term)
			l := leadership{term, r, ctx, make(chan struct{})}
			elected <- l
			select {
			case <-ctx.Done():
			case <-l.resign:
			}
			return nil
		})
		if err != nil {
			t.Errorf("%s: run: %v", name, err)
		}
	}()
	return r
}

// write writes with the fence of l, and returns whether the write was applied.
func (l leadership) write(t *testing.T, kv meta.KV) bool {
	t.Helper()
	res, err := kv.Txn(t.Context(), meta.Txn{
		If:   []meta.Cond{l.Fence()},
		Then: []meta.Op{meta.Put("/work", []byte(l.Name))},
	})
	if err != nil {
		t.Fatal(err)
	}
	return res.Succeeded
}

func TestElection(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		const ttl = 10 * time.Second
		store := memory.New(memory.Options{})
		elected := make(chan leadership, 100)
		ts := &terms{seen: map[int64]string{}}
		var replicas []*replica
		for _, name := range []string{"a", "b", "c"} {
			replicas = append(replicas, start(t, name, store, ttl, elected, ts))
		}
		// next returns the new leader, and checks that it is elected in time and is the
		// only one.
		next := func(within time.Duration) leadership {
			t.Helper()
			began := time.Now()
			l := <-elected
			if took := time.Since(began); took > within {
				t.Errorf("elected after %v, want within %v", took, within)
			}
			virtual.Wait()
			if n := len(elected); n > 0 {
				t.Fatalf("%d more were elected while %s leads", n, l.Name)
			}
			kv, _, _, err := store.Get(t.Context(), key)
			if err != nil || string(kv.Value) != l.Name || kv.CreateRevision != l.Create {
				t.Errorf("key is %v, error %v; want that of %s in term %d", kv, err, l.Name, l.Create)
			}
			if !l.write(t, store) {
				t.Error("the leader's fenced write was refused")
			}
			return l
		}
		l := next(0)

		// A leader stays while it renews.
		time.Sleep(24 * time.Hour)
		if l.ctx.Err() != nil || len(elected) > 0 {
			t.Errorf("leadership has changed: %v", context.Cause(l.ctx))
		}

		// The lease is lost.
		kv, _, _, err := store.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if err := store.Revoke(t.Context(), kv.Lease); err != nil {
			t.Fatal(err)
		}
		old := l
		l = next(time.Second)
		if !errors.Is(context.Cause(old.ctx), election.ErrLost) || old.write(t, store) {
			t.Errorf("a leader without a lease continues: %v", context.Cause(old.ctx))
		}

		// The key is lost.
		if _, err := store.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
			t.Fatal(err)
		}
		old, l = l, next(time.Second)
		if !errors.Is(context.Cause(old.ctx), election.ErrLost) || old.write(t, store) {
			t.Errorf("a leader without the key continues: %v", context.Cause(old.ctx))
		}

		// The leader freezes for longer than its TTL.
		frozen := l
		frozen.by.kv.Freeze()
		l = next(ttl)
		if l.by == frozen.by {
			t.Error("the frozen replica was elected")
		}
		if !errors.Is(context.Cause(frozen.ctx), election.ErrLost) {
			t.Errorf("frozen leader's context: %v, want lost", context.Cause(frozen.ctx))
		}
		frozen.by.kv.Thaw()
		if frozen.write(t, frozen.by.kv) {
			t.Error("the fenced write of the frozen leader was applied")
		}
		virtual.Wait()
		if l.ctx.Err() != nil {
			t.Errorf("the thawed replica has deposed the leader: %v", context.Cause(l.ctx))
		}

		// The leader freezes for less than its TTL, and stays.
		l.by.kv.Freeze()
		time.Sleep(ttl / 2)
		l.by.kv.Thaw()
		time.Sleep(2 * ttl)
		if l.ctx.Err() != nil {
			t.Errorf("deposed after half a TTL: %v", context.Cause(l.ctx))
		}

		// The leader resigns.
		close(l.resign)
		old, l = l, next(0)
		if l.by == old.by {
			t.Error("the resigned replica was reelected immediately")
		}

		// The leader is stopped.
		l.by.stop()
		<-l.by.done
		if err := context.Cause(l.ctx); errors.Is(err, election.ErrLost) {
			t.Errorf("stopped leader's context: %v", err)
		}
		old, l = l, next(0)
		if l.by == old.by {
			t.Error("the stopped replica was reelected")
		}

		for _, r := range replicas {
			r.stop()
			<-r.done
		}
		if _, found, _, err := store.Get(t.Context(), key); err != nil || found {
			t.Errorf("the key remains: found %v, error %v", found, err)
		}
	})
}

// For each failed call, before or after it took effect, a leader is elected, and its term is
// that of the store.
func TestAnyCallFails(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n, fired := 0, true; fired; n++ {
			t.Run(fmt.Sprintf("fault %d of call %d", fault, n), func(t *testing.T) {
				fired = false // a failed test ends the loop
				virtual.Test(t, func(t *testing.T) { fired = anyCallFails(t, n, fault) })
			})
		}
	}
}

func anyCallFails(t *testing.T, n int, fault meta.Fault) (fired bool) {
	const ttl = 10 * time.Second
	store := memory.New(memory.Options{})
	ctx := t.Context()
	// Another replica leads first, so that the test includes waiting.
	lease, err := store.Grant(ctx, 3*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Txn(ctx, meta.Txn{Then: []meta.Op{meta.PutLeased(key, nil, lease)}}); err != nil {
		t.Fatal(err)
	}
	faulty := meta.NewFaulty(store)
	faulty.FailNth(n, fault)
	elected := make(chan leadership, 100)
	r := start(t, "a", faulty, ttl, elected, &terms{seen: map[int64]string{}})
	l := <-elected
	if !l.write(t, store) {
		t.Error("the elected leader's fenced write is refused")
	}
	time.Sleep(2 * ttl) // renewals
	if l.ctx.Err() != nil {
		t.Errorf("leadership was lost: %v", context.Cause(l.ctx))
	}
	r.stop()
	<-r.done
	time.Sleep(2 * ttl) // unrevoked leases have ended
	if _, found, _, err := store.Get(ctx, key); err != nil || found {
		t.Errorf("the key remains: found %v, error %v", found, err)
	}
	return faulty.Fired() > 0
}

// A claim that took effect without a reply counts as won.
func TestAmbiguousClaim(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		faulty := meta.NewFaulty(store)
		faulty.FailNth(0, meta.After, meta.MethodTxn)
		elected := make(chan leadership, 100)
		r := start(t, "a", faulty, 10*time.Second, elected, &terms{seen: map[int64]string{}})
		l := <-elected
		if faulty.Fired() != 1 || l.Create != 2 {
			t.Errorf("after %d faults: term %d, want that of the first write, 2", faulty.Fired(), l.Create)
		}
		if !l.write(t, store) {
			t.Error("the leader's fenced write was refused")
		}
		r.stop()
		<-r.done
	})
}

// lead's context ends a TTL after the last renewal if the store is lost, not later: from then
// on another replica may be elected.
func TestLostStore(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		const ttl = 9 * time.Second
		elected := make(chan leadership, 100)
		r := start(t, "a", memory.New(memory.Options{}), ttl, elected, &terms{seen: map[int64]string{}})
		l := <-elected
		began := time.Now()
		r.kv.Hook(func(meta.Call) meta.Fault { return meta.Before })
		<-l.ctx.Done()
		if took := time.Since(began); took != ttl {
			t.Errorf("ended after %v, want %v", took, ttl)
		}
		r.kv.Hook(nil)
		if again := <-elected; again.Create <= l.Create {
			t.Errorf("next term %d, want one after %d", again.Create, l.Create)
		}
		r.stop()
		<-r.done
	})
}

// TestProblem checks that a candidate that fails is in the list of problems until it has led,
// or has seen a leader, for a minute. A leader that fails at each attempt is in the list.
func TestProblem(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		faulty := meta.NewFaulty(memory.New(memory.Options{}))
		problems := lasting.New(time.Now)
		e := election.New(election.Options{KV: faulty, Key: key, Name: "a", Problems: problems})
		failing := func(want bool) {
			t.Helper()
			virtual.Wait()
			list := problems.States()
			if len(list) != 1 || list[0].Name != "election" || (list[0].Error != "") != want {
				t.Errorf("problems %+v, want it failing: %v", list, want)
			}
		}
		failing(false)
		ctx, stop := context.WithCancel(t.Context())
		done, resign := make(chan error), make(chan error)
		lead := func(ctx context.Context, _ election.Term) error {
			select {
			case <-ctx.Done():
				return nil
			case err := <-resign:
				return err
			}
		}
		faulty.Hook(func(meta.Call) meta.Fault { return meta.Before })
		go func() { done <- e.Run(ctx, lead) }()
		time.Sleep(time.Hour)
		failing(true)
		faulty.Hook(nil)
		time.Sleep(59 * time.Second)
		failing(true)
		time.Sleep(10 * time.Second) // leads, after the pause between two attempts
		failing(false)
		for range 100 {
			resign <- errors.New("no work")
			time.Sleep(10 * time.Second)
			failing(true)
		}
		other := start(t, "b", faulty, 10*time.Second, make(chan leadership, 100), &terms{seen: map[int64]string{}})
		resign <- errors.New("no work")
		time.Sleep(59 * time.Second) // the other candidate leads
		failing(true)
		time.Sleep(10 * time.Second)
		failing(false)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
		other.stop()
		<-other.done
	})
}
