package manager

import (
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// grave is where a replica goes that is killed at a write or a request: from
// then on nothing that it does has an effect. It is stopped by bury.
type killer struct {
	mu    sync.Mutex
	dead  bool
	fired int
	done  chan struct{} // closed when it is dead
}

func newKiller() *killer { return &killer{done: make(chan struct{})} }

func (g *killer) fire(kill bool) {
	g.fired++
	if kill && !g.dead {
		g.dead = true
		close(g.done)
	}
}

// atWrite has the n-th write from now on fail, and kills the replica with it if
// kill is true.
func (g *killer) failWrite(r *replica, n int, fault meta.Fault, kill bool) {
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

// atRequest has the n-th request to the object store from now on fail, n+1 and
// all that follow too if times is below 0, and kills the replica with it if kill
// is true.
func (g *killer) failRequest(r *replica, n int, fault object.Fault, times int, kill bool) {
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

func (g *killer) faults() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fired
}

// lift ends all faults.
func (r *replica) clearFaults() {
	r.kv.Hook(nil)
	r.store.Plan(nil)
}

// endedOrDead waits until the only job there is has ended, or the replica that
// works on it is dead. It is false when the latter.
func (w *testEnv) waitEndedOrDead(g *killer) bool {
	w.t.Helper()
	deadline := time.Now().Add(2 * time.Hour)
	for {
		settle()
		if g.isDead() {
			return false
		}
		if jobs := w.jobs(); len(jobs) > 0 && jobs[len(jobs)-1].State.Ended() {
			return true
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("the job does not end: %+v", w.jobs())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// eachOf counts up until fn says that there was nothing any more.
func forEachFault(t *testing.T, limit int, fn func(n int) bool) int {
	t.Helper()
	n := 0
	for ; fn(n); n++ {
		if t.Failed() {
			t.Fatalf("number %d went wrong", n)
		}
		if n == limit {
			t.Fatal("there is no end of them")
		}
	}
	return n
}

// writesFail has all transactions fail from now on.
func failAllWrites(g *killer, r *replica) {
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
