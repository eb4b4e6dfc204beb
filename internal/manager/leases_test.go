package manager

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// revokeAll revokes every lease that has keys, and returns the number.
func (e *env) revokeAll() (n int) {
	e.t.Helper()
	res, err := e.kv.Range(e.t.Context(), meta.Range{From: "/", To: "0"})
	if err != nil {
		e.t.Fatal(err)
	}
	seen := map[meta.LeaseID]bool{0: true}
	for _, kv := range res.KVs {
		if seen[kv.Lease] {
			continue
		}
		seen[kv.Lease] = true
		n++
		if err := e.kv.Revoke(e.t.Context(), kv.Lease); err != nil {
			e.t.Fatal(err)
		}
	}
	return n
}

// TestLeasesRevoked repeatedly revokes all leases during creates and restores: leaders,
// creates, workers and tokens lose them. Every call succeeds or has no effect.
func TestLeasesRevoked(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	aborted, made := 0, 0
	for range 3 {
		inEnv(t, func(t *testing.T, e *env) {
			soon := func(o *testOptions) {
				o.Parts.Collector.OrphanGrace, o.Parts.Collector.SweepInterval = time.Hour, 30*time.Minute
			}
			rs := []*testReplica{e.start("a", soon), e.start("b", soon), e.start("c", soon)}
			col := e.richCollection(rs[0], "c", 40)
			s := e.create(rs[0], col, "first")
			for _, r := range rs {
				r.store.SetLatency(300 * time.Millisecond)
			}
			before := e.contents()
			sp := restoreSpecOf(s)
			job := e.restore(rs[1], sp)
			terms := map[int64]bool{}
			var mu sync.Mutex
			var creates sync.WaitGroup
			there := map[string]bool{"first": true}
			for i := range 20 {
				creates.Go(func() {
					name := fmt.Sprint("s", i)
					_, err := rs[i%3].Create(t.Context(), token(name, name), spec(col, name))
					mu.Lock()
					defer mu.Unlock()
					switch {
					case err == nil:
						made++
						there[name] = true
					case errors.Is(err, ErrCreateAborted):
						aborted++
					default:
						t.Errorf("create %s: %v", name, err)
					}
				})
				time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
				if i%4 == 0 {
					if kv, found, _, err := e.kv.Get(t.Context(), keys.Leader); err == nil && found {
						terms[kv.CreateRevision] = true
					}
					e.revokeAll()
				}
			}
			creates.Wait()
			end := e.waitEnded(rs[0], job.ID)
			if len(terms) < 3 {
				t.Errorf("%d terms: the leader did not lose its lease", len(terms))
			}
			for _, r := range rs {
				r.store.SetLatency(0)
			}
			time.Sleep(3 * time.Hour) // writes of creates without a lease are swept
			settle()
			for _, got := range e.check(rs[2]) {
				if !there[got.Name] {
					t.Errorf("snapshot %s is there, and its create returned ABORTED", got)
				}
				delete(there, got.Name)
				if got.ID != s.ID {
					e.dropSnapshot(rs[1], got)
				}
			}
			if len(there) > 0 {
				t.Errorf("not there: %v", there)
			}
			settle()
			if end.Job.State != copyjob.Completed {
				t.Errorf("%+v", end.Job)
			}
			e.checkRestored(rs[0], before, end.Job, sp)
		})
	}
	if aborted == 0 || made == 0 {
		t.Errorf("%d creates were aborted, %d made", aborted, made)
	}
}

// TestConstantCompaction continuously compacts the metadata store to its newest
// revision while a cluster executes every operation.
func TestConstantCompaction(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		done := make(chan struct{})
		var compacts sync.WaitGroup
		compacts.Go(func() {
			tick := time.NewTicker(300 * time.Millisecond)
			defer tick.Stop()
			for {
				select {
				case <-done:
					return
				case <-tick.C:
				}
				_, _, now, err := e.kv.Get(t.Context(), keys.Format)
				if err != nil {
					t.Errorf("read: %v", err)
				}
				if err := e.memory.Compact(t.Context(), now); err != nil && !errors.Is(err, meta.ErrCompacted) {
					t.Errorf("compact: %v", err)
				}
			}
		})
		e.live()
		close(done)
		compacts.Wait()
		r := e.start("last")
		col, _, _ := e.collection(r, "after")
		s := e.create(r, col, "after")
		if got, err := r.Get(t.Context(), Ref{Name: "after"}); err != nil || got.ID != s.ID {
			t.Errorf("got %v, err = %v", got, err)
		}
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Error(err)
		}
	})
}
