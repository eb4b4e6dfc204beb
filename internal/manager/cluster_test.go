//go:build linux && !short

package manager

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdcluster"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

func TestMain(m *testing.M) {
	etcdcluster.Main()
	os.Exit(m.Run())
}

// clusterPatience bounds each wait of these tests.
const clusterPatience = 40 * time.Second

// enduring lets creates outlast the faults of etcd in these tests, and shortens the
// leader's retries.
func enduring(o *testOptions) {
	o.LeaseTTL, o.Parts.LeaderTTL, o.CleanInterval = 20*time.Second, 2*time.Second, 5*time.Second
}

// eventually waits for a condition in real time.
func eventually(t *testing.T, what string, done func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(clusterPatience); !done(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

// rest waits until no work is pending and n snapshots remain.
func (e *env) rest(n int) {
	e.t.Helper()
	count := func(prefix string) int {
		from, to := meta.Prefix(prefix)
		res, err := e.kv.Range(e.t.Context(), meta.Range{From: from, To: to, KeysOnly: true})
		if err != nil {
			return -1
		}
		return len(res.KVs)
	}
	eventually(e.t, fmt.Sprintf("%d snapshots at rest", n), func() bool {
		return count(pendingKeys) == 0 && count(keys.SnapshotPrefix) == n
	})
}

// unanswered reports whether an error leaves the outcome of the call open.
func unanswered(err error) bool {
	return errors.Is(err, meta.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrOverloaded)
}

// definite repeats a call, each time at the next replica, until its outcome is known.
func definite[T any](
	t *testing.T, replicas []*testReplica, call func(ctx context.Context, r *testReplica) (T, error),
) (T, error) {
	t.Helper()
	deadline := time.Now().Add(clusterPatience)
	for i := 0; ; i++ {
		_ = meta.Pause(t.Context(), min(i, 50))
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		got, err := call(ctx, replicas[i%len(replicas)])
		cancel()
		switch {
		case err == nil, errors.Is(err, ErrCreateAborted), !unanswered(err):
			return got, err
		case time.Now().After(deadline):
			return got, fmt.Errorf("no definite answer in time, last: %w", err)
		}
	}
}

func createDefinite(
	t *testing.T, replicas []*testReplica, tok request.Token, col catalog.Collection, name string,
) (*snapshot.Record, error) {
	t.Helper()
	return definite(t, replicas, func(ctx context.Context, r *testReplica) (*snapshot.Record, error) {
		return r.Create(ctx, tok, spec(col, name))
	})
}

// clusterWork creates and drops snapshots and records the acknowledged ones.
type clusterWork struct {
	t        *testing.T
	replicas []*testReplica
	col      catalog.Collection

	mu      sync.Mutex
	kept    map[string]int64 // by name
	dropped map[int64]string // by id
	aborted int

	lost atomic.Int64 // transactions without an answer
}

// lossy counts the transactions without an answer.
type lossy struct {
	meta.KV
	lost *atomic.Int64
}

// Txn implements [meta.KV].
func (l lossy) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	res, err := l.KV.Txn(ctx, t)
	if errors.Is(err, meta.ErrUnavailable) {
		l.lost.Add(1)
	}
	return res, err
}

func (c *clusterWork) create(replicas []*testReplica, tok request.Token, name string) (*snapshot.Record, error) {
	return definite(c.t, replicas, func(ctx context.Context, r *testReplica) (*snapshot.Record, error) {
		return r.Create(ctx, tok, spec(c.col, name))
	})
}

// make creates a snapshot of a new name and returns its id. An aborted create is
// followed by another with the name.
func (c *clusterWork) make(name string, replicas []*testReplica) (int64, bool) {
	for range 20 {
		tok := token(rand.Text(), name)
		s, err := c.create(replicas, tok, name)
		if errors.Is(err, ErrCreateAborted) {
			c.mu.Lock()
			c.aborted++
			c.mu.Unlock()
			continue
		}
		if err != nil {
			c.t.Errorf("create %s: %v", name, err)
			return 0, false
		}
		again, err := c.create(replicas[1:], tok, name)
		if err != nil || again.ID != s.ID {
			c.t.Errorf("the token of %s stands for %v, err = %v", s, again, err)
		}
		return s.ID, true
	}
	c.t.Errorf("create %s: aborted over and over", name)
	return 0, false
}

// round creates one snapshot that stays and one that is dropped, whose name the next
// round reuses.
func (c *clusterWork) round(worker, n int) {
	replicas := slices.Concat(c.replicas[worker%len(c.replicas):], c.replicas)
	name := fmt.Sprintf("kept-%d-%d", worker, n)
	if id, ok := c.make(name, replicas); ok {
		c.mu.Lock()
		c.kept[name] = id
		c.mu.Unlock()
	}
	name = fmt.Sprintf("dropped-%d", worker)
	id, ok := c.make(name, replicas)
	if !ok {
		return
	}
	tok := token(rand.Text(), name)
	tok.Method = "DropSnapshot"
	got, err := definite(c.t, replicas, func(ctx context.Context, r *testReplica) (int64, error) {
		return r.Drop(ctx, tok, Ref{Name: name}, id)
	})
	if err != nil || got != id {
		c.t.Errorf("drop %s, which is %d: got %d, err = %v", name, id, got, err)
		return
	}
	c.mu.Lock()
	c.dropped[id] = name
	c.mu.Unlock()
}

// during runs workers while storm runs. storm calls give to let them begin n more
// rounds.
func (c *clusterWork) during(workers int, storm func(give func(n int))) {
	c.t.Helper()
	turns := make(chan struct{})
	var group sync.WaitGroup
	defer group.Wait()
	defer close(turns)
	for worker := range workers {
		group.Go(func() {
			n := 0
			for range turns {
				c.round(worker, n)
				n++
			}
		})
	}
	storm(func(n int) {
		c.t.Helper()
		late := time.NewTimer(clusterPatience)
		defer late.Stop()
		for range n {
			select {
			case turns <- struct{}{}:
			case <-late.C:
				c.t.Fatal("the workers do not come on")
			}
		}
	})
}

// TestClusterLeaderKilled kills the leader of etcd while snapshots are created and
// dropped. Acknowledged results hold, a token returns one snapshot, and no create is
// given up.
func TestClusterLeaderKilled(t *testing.T) {
	c := etcdcluster.Start(t)
	root := "/" + rand.Text()
	e := inReality(t, c.KVAt(t, root))
	work := &clusterWork{t: t, kept: map[string]int64{}, dropped: map[int64]string{}}
	for _, name := range []string{"a", "b", "c"} {
		e.kv = lossy{c.KVAt(t, root), &work.lost} // a client per replica
		work.replicas = append(work.replicas, e.start(name, enduring))
	}
	r := work.replicas[0]
	work.col, _, _ = e.collection(r, "c")
	for i := range 3 {
		e.add(r, work.col, e.segment(r, work.col, i%2, 1, 20))
	}
	e.checkpoint(r, work.col, 10, 30)

	const workers = 8
	work.during(workers, func(give func(int)) {
		for _, kill := range []bool{true, true, false, true} {
			give(workers)
			i := c.Leader(t)
			if !kill {
				over := time.After(2 * time.Second)
				c.Pause(i)
				if c.Leader(t) == i {
					t.Errorf("member %d leads and is paused", i)
				}
				<-over
				c.Resume(i)
				continue
			}
			c.Kill(i)
			give(workers) // two members suffice once one of them leads
			c.Restart(t, i)
		}
	})
	if t.Failed() {
		return
	}
	e.rest(len(work.kept))
	for _, r := range work.replicas {
		there := map[string]int64{}
		for _, s := range e.check(r) {
			there[s.Name] = s.ID
			if name, ok := work.dropped[s.ID]; ok {
				t.Errorf("%s was dropped as %s, and is there", s, name)
			}
		}
		for name, id := range work.kept {
			if there[name] != id {
				t.Errorf("%s was created as %d, and is %d", name, id, there[name])
			}
		}
		if len(there) != len(work.kept) {
			t.Errorf("%d snapshots, want %d", len(there), len(work.kept))
		}
	}
	t.Logf("%d created, %d dropped, %d aborted; %d transactions got no answer",
		len(work.kept)+len(work.dropped), len(work.dropped),
		work.aborted, work.lost.Load())
	if work.aborted > 0 {
		t.Errorf("%d creates were given up", work.aborted)
	}
	if work.lost.Load() == 0 {
		t.Error("every transaction was answered: the faults did nothing")
	}
}

// TestClusterQuorumLost stops two of three etcd members: no unconfirmed answer is
// returned and nothing is deleted, and work continues with the quorum.
func TestClusterQuorumLost(t *testing.T) {
	c := etcdcluster.Start(t)
	e := inReality(t, c.KV(t))
	quick := func(o *testOptions) {
		o.LeaseTTL, o.Parts.LeaderTTL, o.CleanInterval = 6*time.Second, 2*time.Second, 5*time.Second
		o.CreateTimeout = 15 * time.Second
	}
	a, b := e.start("a", quick), e.start("b", quick)
	both := []*testReplica{a, b}
	col, _, _ := e.collection(a, "c")
	// With a token, so that the lost call below is the commit and not the lease
	// for its result.
	if _, err := a.Create(t.Context(), token("t0", "before"), spec(col, "before")); err != nil {
		t.Fatal(err)
	}
	a.store.Freeze()
	tok := token("t", "r")
	result := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), clusterPatience)
		defer cancel()
		_, err := a.Create(ctx, tok, spec(col, "x"))
		result <- err
	}()
	e.await("the create has begun", func() bool { return len(e.keysUnder(pendingKeys)) == 1 })
	before := e.objectsUnder("snapshots/")

	// The etcd leader is left, with entries that it could not replicate.
	leader := c.Leader(t)
	var killed []int
	for i := range etcdcluster.Members {
		if i != leader {
			c.Kill(i)
			killed = append(killed, i)
		}
	}
	a.store.Thaw()
	ctx, cancel := context.WithTimeout(t.Context(), clusterPatience)
	defer cancel()
	_, err := b.Get(ctx, Ref{Name: "before"})
	wantError(t, err, meta.ErrUnavailable)
	_, err = b.Create(ctx, request.Token{}, spec(col, "y"))
	wantError(t, err, meta.ErrUnavailable)
	if err := <-result; !errors.Is(err, meta.ErrUnavailable) || errors.Is(err, ErrCreateAborted) {
		t.Errorf("most of etcd is lost, and the create says %v", err)
	}
	after := e.objectsUnder("snapshots/")
	for _, key := range before {
		if !slices.Contains(after, key) {
			t.Errorf("object %s is gone", key)
		}
	}

	for _, i := range killed {
		c.Restart(t, i)
	}
	const want = 3
	s, err := createDefinite(t, both, tok, col, "x")
	first := err
	if err != nil {
		wantError(t, err, ErrCreateAborted) // else the commit took effect
		s, err = createDefinite(t, both, token("t2", "r"), col, "x")
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err = createDefinite(t, both, token("t3", "after"), col, "after"); err != nil {
		t.Fatal(err)
	}
	t.Logf("the create that got no answer: %v", first)
	e.rest(want)
	for _, r := range both {
		if list := e.check(r); len(list) != want ||
			!slices.ContainsFunc(list, func(l *snapshot.Record) bool { return l.ID == s.ID }) {
			t.Errorf("%v, want %d with %s", list, want, s)
		}
	}
}

// TestFullStore fills etcd: writes fail with the reason, reads continue, and writes
// resume once space is free.
func TestFullStore(t *testing.T) {
	server := etcdtest.Start(t)
	server.Stop(t)
	server.QuotaBytes = 4 << 20
	server.Restart(t)
	e := inReality(t, server.KV(t))
	r := e.start("a", enduring)
	col, _, _ := e.collection(r, "c")
	kept := e.create(r, col, "before")
	r.store.Freeze()
	tok := token("t", "r")
	result := make(chan error, 1)
	go func() {
		_, err := r.Create(t.Context(), tok, spec(col, "x"))
		result <- err
	}()
	e.await("the create has begun", func() bool { return len(e.keysUnder(pendingKeys)) == 1 })
	ctx := t.Context()
	for n := 0; ; n++ {
		_, err := e.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(fmt.Sprintf("/fill/%d", n), make([]byte, 64<<10))}})
		if errors.Is(err, meta.ErrNoSpace) {
			break
		}
		if err != nil || n == 1000 {
			t.Fatalf("not full after %d puts, err = %v", n, err)
		}
	}
	r.store.Thaw()
	if err := <-result; !errors.Is(err, meta.ErrNoSpace) && !errors.Is(err, ErrCreateAborted) {
		t.Errorf("etcd is full, and the create under way says %v", err)
	}
	_, err := r.Create(ctx, token("t2", "y"), spec(col, "y"))
	wantError(t, err, meta.ErrNoSpace)
	_, err = r.Drop(ctx, request.Token{}, Ref{Name: "before"}, 0)
	wantError(t, err, meta.ErrNoSpace)
	list, _, err := r.List(ctx, Filter{}, Place{}, 10)
	if err != nil || len(list) != 1 || list[0].ID != kept.ID {
		t.Errorf("list: %v, err = %v; want %s alone", list, err, kept)
	}
	if _, err := r.Describe(ctx, Ref{Name: "before"}); err != nil {
		t.Error(err)
	}
	_, err = r.Get(ctx, Ref{Name: "y"})
	wantError(t, err, ErrSnapshotNotFound)
	_, err = r.Describe(ctx, Ref{Name: "x"}) // its record remains until the leader removes it
	wantError(t, err, snapshot.ErrNotCommitted)

	from, to := meta.Prefix("/fill/")
	if _, err := e.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.DeleteRange(from, to)}}); err != nil {
		t.Fatal(err)
	}
	etcdcluster.Shrink(t, server.Endpoint())
	server.Disarm(t)
	e.rest(1)
	_, err = r.Create(ctx, tok, spec(col, "x"))
	wantError(t, err, ErrCreateAborted)
	e.create(r, col, "x")
	if _, err := r.Create(ctx, token("t2", "y"), spec(col, "y")); err != nil {
		t.Error(err)
	}
	if n := len(e.check(r)); n != 3 {
		t.Errorf("%d snapshots, want 3", n)
	}
}
