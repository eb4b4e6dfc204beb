package manager

import (
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// killer kills a replica at a write or a request: from then on none of its calls has an
// effect.
type killer struct {
	mu    sync.Mutex
	dead  bool
	fired int           // faults so far
	done  chan struct{} // closed at the death
}

func newKiller() *killer { return &killer{done: make(chan struct{})} }

func (g *killer) fire(kill bool) {
	g.fired++
	if kill && !g.dead {
		g.dead = true
		close(g.done)
	}
}

// failWrite makes the n-th write from now on fail, and kills the replica at it if kill is
// true.
func (g *killer) failWrite(r *testReplica, n int, fault meta.Fault, kill bool) {
	r.kv.Hook(func(c meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case g.dead:
			return meta.Before
		case c.Method != meta.MethodTxn:
			return meta.NoFault
		}
		if n--; n != -1 {
			return meta.NoFault
		}
		g.fire(kill)
		return fault
	})
	r.store.Plan(func(object.Call) object.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return object.FaultBefore
		}
		return object.FaultNone
	})
}

// failRequest makes times requests to the object store fail from the n-th on (negative:
// all), and kills the replica at the first of them if kill is true.
func (g *killer) failRequest(r *testReplica, n int, fault object.Fault, times int, kill bool) {
	r.kv.Hook(func(meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return meta.Before
		}
		return meta.NoFault
	})
	r.store.Plan(func(object.Call) object.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return object.FaultBefore
		}
		if n--; n >= 0 || times == 0 {
			return object.FaultNone
		}
		times--
		g.fire(kill)
		return fault
	})
}

func (g *killer) isDead() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.dead
}

// faults returns the number of faults so far.
func (g *killer) faults() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fired
}

// clearFaults ends all faults of a replica.
func (r *testReplica) clearFaults() {
	r.kv.Hook(nil)
	r.store.Plan(nil)
}

// waitEndedOrDead waits until the last job has ended, and returns true, or until the
// replica is dead, and returns false.
func (e *env) waitEndedOrDead(g *killer) bool {
	e.t.Helper()
	deadline := time.Now().Add(2 * time.Hour)
	for {
		settle()
		if g.isDead() {
			return false
		}
		if jobs := e.jobs(); len(jobs) > 0 && jobs[len(jobs)-1].State.Ended() {
			return true
		}
		if time.Now().After(deadline) {
			e.t.Fatalf("the job does not end: %+v", e.jobs())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// forEachFault calls fn with 0, 1, 2, … until it returns false because its fault did not
// happen. It returns the number of faults.
func forEachFault(t *testing.T, limit int, fn func(n int) bool) int {
	t.Helper()
	n := 0
	for ; fn(n); n++ {
		if t.Failed() {
			t.Fatalf("fault %d failed", n)
		}
		if n == limit {
			t.Fatalf("more than %d faults", limit)
		}
	}
	return n
}

// failAllWrites makes all transactions fail from now on.
func failAllWrites(g *killer, r *testReplica) {
	r.kv.Hook(func(c meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.Method != meta.MethodTxn {
			return meta.NoFault
		}
		g.fire(false)
		return meta.Before
	})
}
