package manager

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestNothingNeededIsEverDeleted applies random steps with all kinds of faults to a
// cluster of three replicas. An oracle that does not know the implementation of
// reclaims checks every change: see course.
func TestNothingNeededIsEverDeleted(t *testing.T) {
	var reached reach
	// The scripted course reaches the required events, whatever the random ones do.
	runCourse(t, t, scripted, &reached, true)
	rapid.Check(t, func(rt *rapid.T) {
		runCourse(t, rt, append(slices.Clone(prelude), rapid.SliceOfN(genStep, 10, 50).Draw(rt, "steps")...), &reached, false)
	})
	t.Log(reached.String())
	for what, n := range reached.counts() {
		if n == 0 {
			t.Errorf("there never was: %s", what)
		}
	}
}

// reach counts the events that a run has exercised.
type reach struct {
	granted, heldBySnapshot, heldByCreate, compareFailed, again   atomic.Int64
	unreadable, deleted, confirmed, unanswered, reaped, committed atomic.Int64
	spilled, restored, rolledBack, finished, swept, collected     atomic.Int64
	lateCopies, stolen                                            atomic.Int64
}

func (r *reach) counts() map[string]int64 {
	return map[string]int64{
		"grant": r.granted.Load(), "hold by a snapshot": r.heldBySnapshot.Load(), "hold by a create": r.heldByCreate.Load(),
		"grant whose compares failed": r.compareFailed.Load(), "unit granted again": r.again.Load(),
		"refusal for unreadable references": r.unreadable.Load(), "unit deleted": r.deleted.Load(),
		"unit confirmed":            r.confirmed.Load(),
		"reclaim without an answer": r.unanswered.Load(), "create given up": r.reaped.Load(), "commit": r.committed.Load(),
		"unit spilled": r.spilled.Load(), "restore": r.restored.Load(), "restore rolled back": r.rolledBack.Load(),
		"collection gone for good": r.finished.Load(), "object swept": r.swept.Load(),
		"grant to the collector": r.collected.Load(),
		"late copy removed":      r.lateCopies.Load(), "refusal of what is another's": r.stolen.Load(),
	}
}

func (r *reach) String() string {
	var list []string
	for what, n := range r.counts() {
		list = append(list, fmt.Sprintf("%s: %d", what, n))
	}
	slices.Sort(list)
	return strings.Join(list, "; ")
}

// step is one operation; the numbers select its subjects.
type step struct {
	Op      string
	A, B, C int
}

// ops are the kinds of steps; frequent ones occur several times.
var ops = []string{
	"add", "add", "add", "drop", "drop", "compact", "compact", "rebuild", "rebuild", "update", "update",
	"create", "create", "create", "slow create", "slow create", "faulty create", "faulty create", "dying create",
	"expiring create",
	"drop snapshot", "drop snapshot", "pin", "unpin",
	"reclaim", "reclaim", "reclaim", "reclaim", "reclaim file", "faulty reclaim", "raced reclaim", "begun reclaim",
	"late reclaim",
	"reclaim again", "confirm", "confirm",
	"crash", "zombie", "release", "thaw", "thaw", "corrupt", "repair", "compact history", "wait", "wait", "wait long",
	"drop collection", "new collection", "drop partition", "drop partition", "drop index",
	"restore", "restore", "slow restore", "late restore", "late restore", "faulty restore", "cancel", "cancel",
	"collect", "collect", "faulty collect", "foreign", "foreign", "wait hours", "steal", "steal", "steal",
}

var genStep = rapid.Custom(func(t *rapid.T) step {
	return step{
		rapid.SampledFrom(ops).Draw(t, "op"), rapid.IntRange(0, 999).Draw(t, "a"),
		rapid.IntRange(0, 999).Draw(t, "b"), rapid.IntRange(0, 999).Draw(t, "c"),
	}
})

// prelude is the start of each random course, which makes something to hold.
var prelude = []step{
	{"add", 0, 55, 0}, {"add", 0, 6, 1}, {"add", 1, 36, 0}, {"add", 1, 12, 0}, {"create", 0, 0, 0}, {"create", 1, 1, 0},
}

// scripted covers every event that a run must exercise.
var scripted = []step{
	{"add", 0, 7, 0},
	{"add", 0, 7, 1},
	{"steal", 1, 0, 0},
	{"steal", 1, 0, 1},
	{"steal", 1, 0, 2},
	{"create", 0, 0, 0},
	{"drop", 0, 0, 0},
	{"reclaim", 0, 0, 0}, // held by a snapshot
	{"slow create", 0, 1, 0},
	{"drop", 0, 0, 0},
	{"reclaim", 0, 1, 0},      // held by a create
	{"late reclaim", 0, 0, 0}, // the create commits between the read and the grant
	{"thaw", 0, 1, 0},
	{"drop snapshot", 0, 0, 0},
	{"drop snapshot", 0, 0, 0},
	{"drop snapshot", 0, 0, 0},
	{"add", 0, 1, 0},
	{"drop", 0, 0, 0},
	{"raced reclaim", 0, 0, 0}, // compares fail
	{"add", 0, 1, 0},
	{"drop", 0, 0, 0},
	{"begun reclaim", 0, 0, 0},
	{"reclaim again", 0, 0, 0},
	{"confirm", 0, 0, 0},
	{"wait long", 0, 0, 0},
	{"add", 0, 1, 0},
	{"drop", 0, 0, 0},
	{"faulty reclaim", 0, 0, 0},
	{"reclaim", 0, 0, 0},
	{"reclaim", 0, 1, 0},
	{"reclaim again", 0, 0, 0},
	{"confirm", 0, 0, 0},
	{"add", 0, 1, 0},
	{"create", 0, 0, 0},
	{"add", 0, 1, 0},
	{"drop", 0, 1, 0},
	{"corrupt", 0, 0, 0},
	{"reclaim", 0, 0, 0},
	{"repair", 0, 0, 0},
	{"wait long", 0, 0, 0},
	{"reclaim", 0, 0, 0},
	{"dying create", 0, 2, 0},
	{"wait long", 0, 0, 0},
	{"add", 0, 63, 0}, // in the partition, with a large record
	{"add", 0, 61, 0},
	{"add", 0, 7, 0},
	{"create", 0, 0, 0},
	{"restore", 0, 0, 1},
	{"wait", 0, 30, 0},
	{"drop partition", 0, 0, 0},
	{"drop index", 0, 0, 0},
	{"wait long", 0, 8, 0}, // the collector spills the units held by the snapshot
	{"slow restore", 0, 0, 0},
	{"wait", 0, 3, 0},
	{"cancel", 0, 0, 0},
	{"thaw", 0, 0, 0},
	{"thaw", 0, 1, 0},
	{"thaw", 0, 2, 0},
	{"wait", 0, 30, 0},
	{"late restore", 0, 1, 0}, // with 0 the pin would be delayed
	{"wait", 0, 3, 0},         // until it copies
	{"cancel", 0, 0, 0},
	{"wait", 0, 0, 0},
	{"release", 0, 0, 0},
	{"new collection", 0, 0, 0},
	{"drop collection", 1, 0, 0},
	{"wait hours", 0, 0, 0},
}

// errWrong ends a course that detected a violation.
type errWrong string

// runCourse executes steps and then ends everything. A long course waits as long as
// retained records are kept.
func runCourse(t *testing.T, report rapid.TB, steps []step, reached *reach, long bool) {
	var wrong errWrong
	virtual.Test(t, func(t *testing.T) {
		kv := metamemory.New(metamemory.Options{Now: time.Now})
		g := newGuard(kv, objectmemory.New(objectmemory.Options{Now: time.Now}))
		e := &env{t: t, kv: kv, memory: kv, objects: g, now: time.Now, foreign: g.isForeign}
		c := &course{env: e, reach: reached, guard: g, objects: g.Store, long: long}
		ctx, cancel := context.WithCancel(context.Background())
		var watching sync.WaitGroup
		defer func() {
			switch r := recover().(type) {
			case nil:
			case errWrong:
				wrong = r
			default:
				t.Errorf("steps %+v", steps)
				panic(r)
			}
			c.stopAll()
			c.flying.Wait()
			for _, m := range c.ever {
				m.late.flying.Wait()
			}
			cancel()
			watching.Wait()
			if t.Failed() {
				t.Errorf("steps %+v", steps)
			}
		}()
		c.setUp()
		watching.Go(func() { c.watch(ctx) })
		settle()
		for i, s := range steps {
			c.now = fmt.Sprintf("step %d, %+v", i, s)
			c.do(s)
			c.rest(200 * time.Millisecond)
		}
		c.now = "the end"
		c.finish()
	})
	if wrong != "" {
		report.Fatal(string(wrong))
	}
}

// course is one sequence of steps with an oracle. The oracle sees every change of the
// metadata store in order and keeps its own ledger: the content of each file, the
// segments at each revision and therefore the content of each snapshot, and the grants.
type course struct {
	env     *env
	reach   *reach
	guard   *guard
	objects object.Store // the guarded store, for the oracle and the engines
	long    bool
	ending  bool
	now     string // the current step

	cat      *catalog.Catalog // without faults, for the engine that writes the collections
	reader   *Manager         // without faults, and not run
	replicas [3]*member
	flying   sync.WaitGroup // calls of replicas

	mu     sync.Mutex
	events []meta.Event
	ended  []reclaimed

	cols      []*ledger
	finished  []*ledger // of cols, after the removal of their records
	names     atomic.Int64
	ever      []*member // all replicas so far
	jobs      map[int64]*copyjob.Job
	content   map[string][]byte // content of each data file and foreign file
	foreign   map[string]bool   // keys of foreign files
	granted   map[string]bool   // keys of all granted files so far
	snapshots map[int64]*taken
	pins      []*Pin
	corrupted map[int64][]byte // original references, by snapshot
}

// member is one replica with its fault injectors.
type member struct {
	*testReplica
	spy    *spy
	late   *tardy
	frozen bool
}

// ledger is the oracle's state of a collection.
type ledger struct {
	col     catalog.Collection
	index   catalog.Index
	part    catalog.Partition
	history []state // by revision
	units   map[int64]catalog.Unit
	grants  map[int64]*granted
	dropped bool                      // the collection is
	orphans map[int64]segment.Segment // dropped with it or its partition, and not granted
	builds  map[int64]segment.Build   // dropped with their index, and not granted
	stubs   map[int64]bool            // units that are spilled
}

// state is the content of a collection from a revision on.
type state struct {
	revision int64
	segments map[int64]segment.Segment
}

// taken is a committed snapshot.
type taken struct {
	id, collection int64
	name           string
	segments       map[int64]segment.Segment
	files          map[string]bool
	dropped        bool
}

// granted is a grant.
type granted struct {
	tomb  *gc.Tombstone
	files []string
	asked bool // a confirm was in flight
	gone  bool
}

// reclaimed is a call of Reclaim that has ended.
type reclaimed struct {
	col     *ledger
	asks    []gc.Ask
	known   map[int64]bool // units before the call
	answers []gc.Answer
	err     error
}

// spy observes the transactions of a replica that grant units, and calls hooks between
// the read and the grant.
type spy struct {
	meta.KV
	mu     sync.Mutex
	before func() // the next grant; called once
	failed func()
}

func (s *spy) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	grants := slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut &&
			strings.HasPrefix(op.From, keys.AllTombstonesPrefix)
	})
	if grants {
		s.mu.Lock()
		before := s.before
		s.before = nil
		s.mu.Unlock()
		if before != nil {
			before()
		}
	}
	res, err := s.KV.Txn(ctx, t)
	if grants && err == nil && !res.Succeeded {
		s.failed()
	}
	return res, err
}

// tardy is a store that delays its writes and deletes while it is held, also beyond the
// end of their callers.
type tardy struct {
	object.Store
	flying sync.WaitGroup // delayed calls
	mu     sync.Mutex
	gate   chan struct{} // closed by release; nil when not held
	pins   bool          // whether pins of a restore's files are delayed too, which precede its copies
}

func (l *tardy) hold() { l.holdAll(true) }

func (l *tardy) holdAll(pins bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pins = pins
	if l.gate == nil {
		l.gate = make(chan struct{})
	}
}

func (l *tardy) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gate != nil {
		close(l.gate)
		l.gate = nil
	}
}

// land executes do now or, if the store is held, after its release, when the caller may
// have given up.
func (l *tardy) land(ctx context.Context, do func(ctx context.Context) error) error {
	l.mu.Lock()
	gate := l.gate
	l.mu.Unlock()
	if gate == nil {
		return do(ctx)
	}
	done := make(chan error, 1)
	l.flying.Go(func() {
		<-gate
		done <- do(context.WithoutCancel(ctx))
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", object.ErrUnavailable, ctx.Err())
	}
}

func (l *tardy) Delete(ctx context.Context, list ...string) error {
	list = slices.Clone(list)
	return l.land(ctx, func(ctx context.Context) error { return l.Store.Delete(ctx, list...) })
}

func (l *tardy) Put(ctx context.Context, key string, body []byte) (info object.Info, err error) {
	body = slices.Clone(body)
	return l.write(ctx, func(ctx context.Context) (object.Info, error) { return l.Store.Put(ctx, key, body) })
}

func (l *tardy) Create(ctx context.Context, key string, body []byte) (info object.Info, err error) {
	body = slices.Clone(body)
	l.mu.Lock()
	pins := l.pins
	l.mu.Unlock()
	if !pins && strings.HasPrefix(key, catalog.RestorePrefix) {
		return l.Store.Create(ctx, key, body)
	}
	return l.write(ctx, func(ctx context.Context) (object.Info, error) { return l.Store.Create(ctx, key, body) })
}

func (l *tardy) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	return l.write(ctx, func(ctx context.Context) (object.Info, error) { return l.Store.Copy(ctx, r) })
}

func (l *tardy) write(ctx context.Context, do func(ctx context.Context) (object.Info, error)) (object.Info, error) {
	made := make(chan object.Info, 1)
	err := l.land(ctx, func(ctx context.Context) error {
		info, err := do(ctx)
		made <- info
		return err
	})
	if err != nil {
		return object.Info{}, err
	}
	return <-made, nil
}

func (c *course) wrong(format string, args ...any) {
	panic(errWrong(c.now + ": " + fmt.Sprintf(format, args...)))
}

func (c *course) must(err error) {
	if err != nil {
		c.wrong("%v", err)
	}
}

func (c *course) setUp() {
	c.foreign, c.granted, c.content = map[string]bool{}, map[string]bool{}, map[string][]byte{}
	c.snapshots, c.corrupted, c.jobs = map[int64]*taken{}, map[int64][]byte{}, map[int64]*copyjob.Job{}
	requests := request.NewLeases(c.env.kv, c.env.now, nil)
	for i := range c.replicas {
		c.start(i)
	}
	o := testOptions{Options: c.replicas[0].o}
	stores := map[string]object.Store{"default": c.objects}
	o.KV, o.Requests, o.Stores = c.env.kv, requests, stores
	o.Epoch = c.epoch(c.env.kv, c.objects)
	o.Catalog = catalog.New(catalog.Options{
		KV: c.env.kv, Now: c.env.now, Rand: rand.Reader, Requests: requests, HasStore: func(string) bool { return true },
		ReadSpilled: catalog.ReadSpilled(stores), RaiseIDs: o.Epoch.RaiseIDLimit,
	})
	c.cat = o.Catalog
	_, c.reader = c.env.make(o)
	c.guard.reader = c.reader
	c.must(identity.Check(context.Background(), c.env.kv, c.objects, "default", c.replicas[0].o.Cluster.ID, rand.Reader))
	for range 2 {
		c.newCollection()
	}
	for n := range foreignPlaces {
		c.putForeign(n, n)
	}
}

func (c *course) epoch(kv meta.KV, store object.Store) *epoch.Epoch {
	cl, err := cluster.Open(context.Background(), c.env.kv,
		cluster.Options{NameScope: cluster.ScopeCluster, Release: "test", Now: c.env.now, Rand: rand.Reader})
	c.must(err)
	return epoch.New(epoch.Options{
		KV: kv, Store: store, Cluster: cl.ID, Now: c.env.now,
		Rand: rand.Reader, Interval: 20 * time.Minute,
	})
}

func (c *course) newCollection() {
	ctx := context.Background()
	col, err := c.cat.CreateCollection(ctx, noToken, catalog.Collection{
		DB: "default", Name: fmt.Sprint("c", c.names.Add(1)), Channels: []string{"ch-0", "ch-1"},
		Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
		Schema: catalog.Schema{
			Format: "test", Raw: []byte{0},
			Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}},
		},
	})
	c.must(err)
	var list []catalog.Checkpoint
	for shard := range 2 {
		list = append(list, catalog.Checkpoint{Shard: shard, Position: segment.Position{Timestamp: 1000}})
	}
	_, err = c.cat.SetCheckpoints(ctx, catalog.Ref{ID: col.ID}, list)
	c.must(err)
	c.take(col, 0, map[int64]segment.Segment{})
}

// take starts a ledger for a collection.
func (c *course) take(col catalog.Collection, revision int64, segments map[int64]segment.Segment) {
	l := &ledger{
		col: col, history: []state{{0, map[int64]segment.Segment{}}, {revision, segments}},
		units: map[int64]catalog.Unit{}, grants: map[int64]*granted{},
		orphans: map[int64]segment.Segment{}, builds: map[int64]segment.Build{}, stubs: map[int64]bool{},
	}
	c.newPart(l)
	c.newIndex(l)
	c.cols = append(c.cols, l)
}

func (c *course) newPart(l *ledger) {
	var err error
	l.part, err = c.cat.CreatePartition(context.Background(), noToken, catalog.Ref{ID: l.col.ID},
		catalog.Partition{Name: fmt.Sprint("p", c.names.Add(1))})
	c.must(err)
}

func (c *course) newIndex(l *ledger) {
	var err error
	l.index, err = c.cat.CreateIndex(context.Background(), noToken, catalog.Ref{ID: l.col.ID},
		catalog.Index{Name: fmt.Sprint("x", c.names.Add(1)), Field: 100})
	c.must(err)
}

func (c *course) start(i int) {
	m := &member{}
	m.testReplica = c.env.start(fmt.Sprint("r", i), func(o *testOptions) {
		o.Log = zap.NewNop()
		o.MaxCreates = 4
		m.spy = &spy{KV: o.KV, failed: func() { c.reach.compareFailed.Add(1) }}
		m.late = &tardy{Store: o.Stores["default"]}
		stores := map[string]object.Store{"default": m.late}
		o.Epoch = c.epoch(o.KV, m.late)
		o.Catalog = catalog.New(catalog.Options{
			KV: o.KV, Now: o.Now, Rand: o.Rand, Requests: o.Requests, HasStore: func(a string) bool { return a == "default" },
			ReadSpilled: catalog.ReadSpilled(stores), RaiseIDs: o.Epoch.RaiseIDLimit,
		})
		o.KV, o.Stores = m.spy, stores
		// Swept objects are unused at once; the grace period is only a safety margin.
		o.Parts.Collector.Tolerance, o.Parts.Collector.OrphanGrace = 5*time.Minute, time.Second
		o.Parts.Collector.SweepInterval = 10 * time.Minute
		if !c.long {
			o.Parts.KeepRestores = 24 * time.Hour // longer than any delay
		}
		if c.ending { // longer intervals: many hours pass
			o.Parts.LeaderTTL, o.CleanInterval = time.Hour, 30*time.Minute
			o.Parts.Collector.Interval, o.Parts.Collector.SweepInterval = 10*time.Minute, time.Hour
		}
	})
	c.replicas[i] = m
	c.ever = append(c.ever, m)
}

func (m *member) thaw() {
	m.kv.Thaw()
	m.store.Thaw()
	m.late.release()
}

func (m *member) heal() {
	m.kv.Hook(nil)
	m.store.Plan(nil)
	m.store.SetLatency(0)
	m.thaw()
	m.frozen = false
}

func (c *course) stopAll() {
	for _, m := range c.ever { // calls of a stopped replica may still hang
		m.thaw()
	}
	for _, m := range c.replicas {
		if m != nil {
			m.heal()
			m.stop()
		}
	}
}

// calm returns a replica that answers.
func (c *course) calm(n int) *member {
	for i := range c.replicas {
		if m := c.replicas[(n+i)%len(c.replicas)]; !m.frozen {
			return m
		}
	}
	m := c.replicas[n%len(c.replicas)]
	m.heal()
	return m
}

// call executes do on a replica, for a limited time.
func (c *course) call(do func(ctx context.Context)) {
	c.flying.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		do(ctx)
	})
}

// rest lets d pass and checks everything.
func (c *course) rest(d time.Duration) {
	time.Sleep(d)
	settle()
	c.observe()
	c.lookAround()
	if text := c.guard.first(); text != "" {
		c.wrong("%s", text)
	}
}

func (c *course) ledgerOf(collection int64) *ledger {
	for _, l := range c.cols {
		if l.col.ID == collection {
			return l
		}
	}
	c.wrong("there is no collection %d", collection)
	return nil
}

// at returns the segments at a revision.
func (l *ledger) at(revision int64) map[int64]segment.Segment {
	for _, s := range slices.Backward(l.history) {
		if s.revision <= revision {
			return s.segments
		}
	}
	return nil
}

func (l *ledger) live() map[int64]segment.Segment { return l.history[len(l.history)-1].segments }

func keyOf(f *segment.File) string { return "data/" + f.Path }

// watch records all changes.
func (c *course) watch(ctx context.Context) {
	from, to := keys.All()
	w := c.env.kv.Watch(ctx, from, to, 1)
	for {
		b, err := w.Next()
		if err != nil {
			if ctx.Err() == nil {
				c.env.t.Errorf("the oracle is blind: %v", err)
			}
			return
		}
		c.mu.Lock()
		c.events = append(c.events, b.Events...)
		c.mu.Unlock()
	}
}

// observe checks the changes since the last call.
func (c *course) observe() {
	c.mu.Lock()
	events, ends := c.events, c.ended
	c.events, c.ended = nil, nil
	c.mu.Unlock()
	for _, e := range events {
		switch {
		case strings.HasPrefix(e.KV.Key, keys.JobPrefix):
			c.sawJob(e)
		case strings.HasPrefix(e.KV.Key, keys.CollectionPrefix) && e.Deleted:
			c.sawEnd(e)
		case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
			c.sawSnapshot(e)
		case strings.HasPrefix(e.KV.Key, keys.AllTombstonesPrefix):
			c.sawTombstone(e)
		case strings.HasPrefix(e.KV.Key, "/catalog/unit/"):
			collection, id, err := keys.LastTwo(e.KV.Key)
			c.must(err)
			l := c.ledgerOf(collection)
			if e.Deleted {
				delete(l.units, id) // the tombstone comes in the same revision, see below
				delete(l.stubs, id)
				continue
			}
			if l.grants[id] != nil {
				c.wrong("unit %d is back after its grant", id)
			}
			u, err := catalog.DecodeUnit(collection, e.KV)
			if errors.Is(err, catalog.ErrSpilled) {
				if _, was := l.units[id]; !was || l.stubs[id] {
					c.wrong("unit %d is spilled, and was not there, or spilled", id)
				}
				l.stubs[id] = true
				c.reach.spilled.Add(1)
				continue
			}
			c.must(err)
			if _, was := l.units[id]; was {
				c.wrong("unit %d is written again", id)
			}
			l.units[id] = u
		}
	}
	for _, e := range events {
		if strings.HasPrefix(e.KV.Key, "/catalog/unit/") && e.Deleted {
			collection, id, err := keys.LastTwo(e.KV.Key)
			c.must(err)
			if c.ledgerOf(collection).grants[id] == nil {
				c.wrong("unit %d is gone without a grant", id)
			}
		}
	}
	for i := range ends {
		c.sawAnswers(&ends[i])
	}
}

func (c *course) sawSnapshot(e meta.Event) {
	id, err := keys.LastID(e.KV.Key)
	c.must(err)
	old := c.snapshots[id]
	if e.Deleted {
		if old != nil && !old.dropped {
			c.wrong("snapshot %d is gone without a drop", id)
		}
		return
	}
	s, err := snapshot.Decode(e.KV)
	c.must(err)
	switch {
	case s.State == snapshot.Deleting && old != nil:
		old.dropped = true
	case s.State == snapshot.Deleting:
		c.reach.reaped.Add(1)
	case s.State == snapshot.Committed && old == nil:
		c.reach.committed.Add(1)
		t := &taken{
			id: id, collection: s.Collection, name: s.Name,
			segments: c.ledgerOf(s.Collection).at(s.CatalogRevision), files: map[string]bool{},
		}
		for _, seg := range t.segments {
			for f := range seg.AllFiles() {
				t.files[keyOf(f)] = true
			}
		}
		c.snapshots[id] = t
		for key := range t.files {
			if c.granted[key] {
				c.wrong("snapshot %s has %s, which was granted before it was committed", s, key)
			}
		}
	}
}

func (c *course) sawTombstone(e meta.Event) {
	collection, id, err := keys.LastTwo(e.KV.Key)
	c.must(err)
	l := c.ledgerOf(collection)
	g := l.grants[id]
	if e.Deleted {
		switch {
		case g == nil || g.gone:
			c.wrong("tombstone %d was not there and is gone", id)
		case g.tomb.Deleter == gc.ByCaller && !g.asked:
			c.wrong("tombstone %d is gone and was not confirmed", id)
		}
		g.gone = true
		for _, key := range g.files {
			if _, there := c.object(key); there {
				c.wrong("tombstone %d is gone, and %s is there", id, key)
			}
		}
		if g.tomb.Deleter == gc.BySnapshotd {
			c.reach.deleted.Add(1)
		} else {
			c.reach.confirmed.Add(1)
		}
		return
	}
	if g != nil {
		c.wrong("tombstone %d is written again", id)
	}
	t, err := gc.DecodeTombstone(e.KV)
	c.must(err)
	g = &granted{tomb: t}
	l.grants[id] = g
	delete(l.orphans, id)
	delete(l.builds, id)
	for _, b := range t.Unit.Segment.Builds { // an unfinished build is reclaimed with its segment
		delete(l.builds, b.ID)
	}
	c.reach.granted.Add(1)
	if t.Caller == "collector" {
		c.reach.collected.Add(1)
	}
	for f := range t.Unit.Owned() {
		g.files = append(g.files, keyOf(f))
	}
	for f := range t.Unit.Segment.AllFiles() {
		key := keyOf(f)
		for _, s := range c.snapshots {
			if !s.dropped && s.files[key] {
				c.wrong("unit %d was granted at %d, and snapshot %s (%d) has its file %s", id, t.Revision, s.name, s.id, key)
			}
		}
		for _, s := range l.at(t.Revision) {
			for f := range s.AllFiles() {
				if keyOf(f) == key {
					c.wrong("unit %d was granted, and segment %d has its file %s", id, s.ID, key)
				}
			}
		}
	}
	for _, key := range g.files {
		c.granted[key] = true
	}
	for snapshot := range c.corrupted {
		if s := c.snapshots[snapshot]; s.collection == collection && !s.dropped {
			c.wrong("unit %d was granted while the references of snapshot %s cannot be read", id, s.name)
		}
	}
}

// sawAnswers checks the answers of Reclaim.
func (c *course) sawAnswers(e *reclaimed) {
	if e.err != nil {
		switch {
		case errors.Is(e.err, gc.ErrUnreadable):
			c.reach.unreadable.Add(1)
		case errors.Is(e.err, meta.ErrUnavailable), errors.Is(e.err, gc.ErrLoading), errors.Is(e.err,
			context.DeadlineExceeded):
			c.reach.unanswered.Add(1)
		case errors.Is(e.err, catalog.ErrCollectionNotFound) && e.col.dropped: // and gone
		default:
			c.wrong("reclaim: %v", e.err)
		}
		return
	}
	for i, a := range e.answers {
		ask := e.asks[i]
		id := max(ask.Segment, ask.Build)
		switch a.State {
		case gc.Granted:
			g := e.col.grants[a.Tombstone.ID]
			switch {
			case g == nil:
				c.wrong("unit %d is reported as granted", a.Tombstone.ID)
			case id != 0 && a.Tombstone.ID != id:
				c.wrong("unit %d was asked for, %d was granted", id, a.Tombstone.ID)
			case a.Tombstone.Revision != g.tomb.Revision || a.Tombstone.Deleter != g.tomb.Deleter ||
				a.Tombstone.Caller != g.tomb.Caller ||
				!a.Tombstone.GrantTime.Equal(g.tomb.GrantTime):
				c.wrong("the grant was %+v, now it is %+v", g.tomb, a.Tombstone)
			}
			if !e.known[a.Tombstone.ID] {
				c.reach.again.Add(1)
			}
		case gc.Dropped:
			if a.Holders == 0 {
				c.wrong("unit %d has no holder and is not granted", id)
			}
			if len(a.Snapshots) > 0 {
				c.reach.heldBySnapshot.Add(1)
			}
			if len(a.Creating) > 0 {
				c.reach.heldByCreate.Add(1)
			}
			for _, h := range a.Snapshots {
				s := c.snapshots[h.ID]
				if s == nil || s.name != h.Name || s.collection != e.col.col.ID {
					c.wrong("unit %d is held by %+v, which there never was", id, h)
				}
				if u, ok := e.col.units[id]; ok && !references(s, &u) {
					c.wrong("unit %d is held by %+v, which does not reference it", id, h)
				}
			}
		case gc.Unknown:
			if _, still := e.col.units[id]; still && e.known[id] {
				c.wrong("unit %d is unknown", id)
			}
		case gc.Live:
		}
	}
}

func references(s *taken, u *catalog.Unit) bool {
	if u.Kind != catalog.UnitBuild {
		_, ok := s.segments[u.Segment.ID]
		return ok
	}
	return slices.ContainsFunc(s.segments[u.Segment.ID].Builds, func(b segment.Build) bool { return b.ID == u.ID })
}

func (c *course) object(key string) ([]byte, bool) {
	r, _, err := c.objects.Get(context.Background(), key, 0, -1)
	if err != nil {
		return nil, false
	}
	data, err := io.ReadAll(r)
	c.must(err)
	return data, true
}

// lookAround checks the invariants that hold at every moment.
func (c *course) lookAround() {
	intact := func(key, what string) {
		if got, there := c.object(key); !there || !bytes.Equal(got, c.content[key]) {
			c.wrong("%s, and %s holds %q", what, key, got)
		}
	}
	for _, s := range c.snapshots {
		if s.dropped {
			continue
		}
		for key := range s.files {
			intact(key, "snapshot "+s.name+" is committed")
		}
	}
	for _, l := range c.cols {
		for id, s := range l.live() {
			for f := range s.AllFiles() {
				intact(keyOf(f), fmt.Sprint("segment ", id, " lives"))
			}
		}
		for id, g := range l.grants {
			if _, there, _, err := c.env.kv.Get(
				context.Background(),
				keys.Tombstone(l.col.ID, id),
			); err != nil ||
				there == g.gone {
				c.wrong("tombstone %d: there %v, gone %v, err = %v", id, there, g.gone, err)
			}
		}
		for id, s := range l.orphans {
			for f := range s.AllFiles() {
				intact(keyOf(f), fmt.Sprint("segment ", id, " is not granted"))
			}
		}
		for id, b := range l.builds {
			for i := range b.Files {
				intact(keyOf(&b.Files[i]), fmt.Sprint("build ", id, " is not granted"))
			}
		}
		for id := range l.stubs {
			if key := catalog.SpillKey(l.col.ID, id); !c.guard.has(key) {
				c.wrong("unit %d is spilled, and %s is not there", id, key)
			}
		}
		for _, u := range l.units { // not granted
			for f := range u.Segment.AllFiles() {
				intact(keyOf(f), fmt.Sprint("unit ", u.ID, " is not granted"))
			}
		}
	}
	for key := range c.foreign {
		intact(key, "it belongs to nothing")
	}
}

// change is a change of the engine, which the oracle records.
func (c *course) change(l *ledger, swap catalog.SegmentChange, next map[int64]segment.Segment) {
	revision, err := c.cat.Change(context.Background(), request.Token{}, catalog.Ref{ID: l.col.ID}, swap)
	c.must(err)
	l.history = append(l.history, state{revision, next})
}

// revisionOf returns the revision of an existing record.
func (c *course) revisionOf(key string) int64 {
	kv, found, _, err := c.env.kv.Get(context.Background(), key)
	if err != nil || !found {
		c.wrong("%s: there %v, err = %v", key, found, err)
	}
	return kv.ModRevision
}

func (c *course) id() int64 {
	id, err := c.cat.NextID(context.Background())
	c.must(err)
	return id
}

// write writes a file to the store.
func (c *course) write(kind, path string) segment.File {
	f := segment.File{Kind: kind, Path: path, Entries: 1, Field: 100, LogID: 1}
	if kind != segment.KindIndex {
		f.MinTimestamp, f.MaxTimestamp = 1, 20
	}
	c.put(keyOf(&f))
	f.Size = int64(len(c.content[keyOf(&f)]))
	return f
}

// put writes a unique object.
func (c *course) put(key string) {
	c.content[key] = []byte("this is " + key)
	_, err := c.objects.Put(context.Background(), key, c.content[key])
	c.must(err)
}

func (c *course) newBuild(l *ledger, s *segment.Segment, layout int) segment.Build {
	b := segment.Build{ID: c.id(), Index: l.index.ID, Field: 100}
	path, foreign := "", false
	switch layout % 3 {
	case 0: // under both ids
		path = fmt.Sprintf("%d/%d/%d/index/%d/f", l.col.ID, s.Partition, s.ID, b.ID)
	case 1: // at no place of the layout of the layout
		path, foreign = fmt.Sprintf("%d/index/%d/f", l.col.ID, b.ID), true
	default: // under the segment's id, so that its own id does not cover it
		path = fmt.Sprintf("%d/%d/%d/index/v%d", l.col.ID, s.Partition, s.ID, b.ID)
	}
	f := c.write(segment.KindIndex, path)
	if foreign {
		c.foreign[keyOf(&f)] = true
		c.guard.leave(keyOf(&f))
	}
	b.Files = []segment.File{f}
	return b
}

// newSegment returns a segment with a build, further files or a foreign file.
func (c *course) newSegment(l *ledger, shape int) segment.Segment {
	s := segment.Segment{
		ID: c.id(), Channel: shape % 2, Level: 1, State: segment.Flushed,
		Rows: 1, DML: segment.Position{Timestamp: 21},
	}
	if shape&16 != 0 {
		s.Partition = l.part.ID
	}
	if shape&32 != 0 {
		s.EngineData = make([]byte, 500) // large enough to be spilled
	}
	s.Files = []segment.File{c.write(segment.KindInsert,
		fmt.Sprintf("%d/%d/%d/insert/100/1", l.col.ID, s.Partition, s.ID))}
	if shape&2 != 0 {
		s.Files = append(s.Files, c.write(segment.KindDelta, fmt.Sprintf("%d/%d/%d/delta/0/1", l.col.ID, s.Partition, s.ID)))
	}
	if shape&4 != 0 {
		s.Builds = []segment.Build{c.newBuild(l, &s, shape)}
	}
	if shape&8 != 0 {
		f := c.write(segment.KindStats, fmt.Sprintf("%d/shared-%d", l.col.ID, s.ID))
		c.foreign[keyOf(&f)] = true
		c.guard.leave(keyOf(&f))
		s.Files = append(s.Files, f)
	}
	return s
}

// steal lets an engine register segments of another or a removed collection in a
// collection, or their files under an own id that occurs in all non-id places of their
// paths.
func (c *course) steal(l *ledger, s step) {
	var of []segment.Segment
	for _, other := range c.cols {
		for _, id := range slices.Sorted(maps.Keys(other.live())) {
			if other != l {
				of = append(of, other.live()[id])
			}
		}
	}
	if l.dropped || len(of) == 0 {
		return
	}
	seg := of[s.B%len(of)]
	seg.Partition, seg.Builds = 0, nil
	switch s.C % 3 {
	case 0: // the segment itself
	case 1: // its files under another id
		seg.ID = c.id()
	case 2: // its id with a file elsewhere
		seg.Files = []segment.File{{Kind: segment.KindInsert, Path: fmt.Sprintf("stolen/%d/%d", seg.ID, seg.ID), Size: 1}}
	}
	_, _, err := c.cat.AddSegments(context.Background(), l.col.ID, []segment.Segment{seg})
	if !errors.Is(err, catalog.ErrIDOwned) && !errors.Is(err, catalog.ErrPlaceOwned) {
		c.wrong("segment %d of another collection, registered in collection %d (%d): err = %v", seg.ID, l.col.ID, s.C%3, err)
	}
	c.reach.stolen.Add(1)
}

func pickOf[K int64 | string, V any](set map[K]V, n int) (K, bool) {
	if len(set) == 0 {
		var none K
		return none, false
	}
	return slices.Sorted(maps.Keys(set))[n%len(set)], true
}

// committed returns the existing snapshots.
func (c *course) committed() map[int64]*taken {
	list := map[int64]*taken{}
	for id, s := range c.snapshots {
		if !s.dropped {
			list[id] = s
		}
	}
	return list
}

func (c *course) create(m *member, l *ledger, ttl time.Duration) {
	sp := spec(l.col, fmt.Sprint("s", c.names.Add(1)))
	sp.TTL = ttl
	c.call(func(ctx context.Context) { _, _ = m.Create(ctx, request.Token{}, sp) })
}

func (c *course) reclaim(m *member, l *ledger, asks []gc.Ask, deleter gc.Deleter) {
	known := map[int64]bool{}
	for id := range l.units {
		known[id] = true
	}
	c.call(func(ctx context.Context) {
		answers, err := m.GC.Reclaim(ctx, catalog.Ref{ID: l.col.ID}, asks, deleter, "caller")
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended = append(c.ended, reclaimed{l, asks, known, answers, err})
	})
}

// asks returns asks for dropped units and others.
func (c *course) asks(l *ledger, n int) []gc.Ask {
	var list []gc.Ask
	for id, u := range l.units {
		if u.Kind == catalog.UnitBuild {
			list = append(list, gc.Ask{Build: id}, gc.Ask{Segment: id})
		} else {
			list = append(list, gc.Ask{Segment: id})
		}
	}
	for id := range l.orphans {
		list = append(list, gc.Ask{Segment: id})
	}
	if id, ok := pickOf(l.live(), n); ok {
		list = append(list, gc.Ask{Segment: id})
		for _, b := range l.live()[id].Builds {
			list = append(list, gc.Ask{Build: b.ID})
		}
	}
	if id, ok := pickOf(l.grants, n); ok {
		list = append(list, gc.Ask{Segment: id})
	}
	slices.SortFunc(list, func(a, b gc.Ask) int { return int(max(a.Segment, a.Build) - max(b.Segment, b.Build)) })
	return append(list, gc.Ask{Segment: 1 << 40}, gc.Ask{File: catalog.FilePath{Path: "none/7/has/this"}},
		gc.Ask{Build: 1 << 41})
}

func deleterOf(n int) gc.Deleter { return gc.Deleter(1 + n%2) }

func (c *course) do(s step) {
	ctx := context.Background()
	l, m := c.cols[s.A%len(c.cols)], c.replicas[s.B%3]
	live := maps.Clone(l.live())
	if l.dropped && slices.Contains([]string{"add", "drop collection", "drop partition", "drop index"}, s.Op) {
		return
	}
	switch s.Op {
	case "drop collection":
		if s.C%3 > 0 {
			return // would end the course early
		}
		c.dropCollection(l)
	case "new collection":
		if live := slices.DeleteFunc(slices.Clone(c.cols), func(l *ledger) bool { return l.dropped }); len(live) < 3 &&
			len(c.cols) < 6 {
			c.newCollection()
		}
	case "drop partition":
		_, err := c.cat.DropPartition(ctx, noToken, catalog.Ref{ID: l.col.ID}, l.part.Name)
		c.must(err)
		revision := c.revisionOf(keys.Partition(l.col.ID, l.part.ID))
		for id, seg := range live {
			if seg.Partition == l.part.ID {
				l.orphans[id] = seg
				delete(live, id)
			}
		}
		l.history = append(l.history, state{revision, live})
		c.newPart(l)
	case "drop index":
		_, err := c.cat.DropIndex(ctx, noToken, catalog.Ref{ID: l.col.ID}, l.index.Name)
		c.must(err)
		revision := c.revisionOf(keys.Index(l.col.ID, l.index.ID))
		for id, seg := range live {
			seg.Builds = slices.Clone(seg.Builds)
			seg.Builds = slices.DeleteFunc(seg.Builds, func(b segment.Build) bool {
				if b.Index == l.index.ID {
					l.builds[b.ID] = b
				}
				return b.Index == l.index.ID
			})
			live[id] = seg
		}
		l.history = append(l.history, state{revision, live})
		c.newIndex(l)
	case "restore":
		c.restore(c.calm(s.B), s)
	case "slow restore": // the stores of all replicas are slow until thawed
		for _, m := range c.replicas {
			m.store.SetLatency(time.Second)
		}
		c.restore(c.calm(s.B), s)
	case "late restore": // its copies are delayed until release
		for _, m := range c.replicas {
			m.late.holdAll(s.B%16 == 0)
		}
		c.restore(c.calm(s.B), s)
	case "faulty restore":
		m.kv.FailNth(s.C%16, meta.Fault(1+s.C/16%2), meta.MethodTxn)
		if s.C%3 == 0 {
			m.store.FailNth(object.OpCopy, s.C/3%3, object.Fault(1+s.C/9%2))
		}
		c.restore(m, s)
	case "cancel":
		m = c.calm(s.C)
		if id, ok := pickOf(c.underWay(), s.B); ok {
			c.call(func(ctx context.Context) { _, _ = m.Jobs.Cancel(ctx, id) })
		}
	case "collect":
		c.collect(c.calm(s.B), s)
	case "faulty collect":
		m.kv.FailNth(s.C%8, meta.Fault(1+s.C/8%2), meta.MethodTxn)
		c.collect(m, s)
	case "foreign":
		c.putForeign(s.B, s.C)
	case "wait hours":
		c.rest(time.Duration(1+s.B%2) * time.Hour)
		c.release() // a copy delayed beyond the retention of jobs has no owner
	case "add":
		seg := c.newSegment(l, s.B)
		live[seg.ID] = seg
		c.change(l, catalog.SegmentChange{Add: []segment.Segment{seg}}, live)
	case "steal":
		c.steal(l, s)
	case "drop":
		if id, ok := pickOf(live, s.B); ok {
			delete(live, id)
			c.change(l, catalog.SegmentChange{Drop: []int64{id}}, live)
		}
	case "compact":
		var in []int64
		for range 1 + s.B%3 {
			if id, ok := pickOf(live, s.C); ok {
				in = append(in, id)
				delete(live, id)
			}
		}
		if len(in) > 0 {
			out := c.newSegment(l, s.B)
			live[out.ID] = out
			c.change(l, catalog.SegmentChange{Drop: in, Add: []segment.Segment{out}}, live)
		}
	case "rebuild":
		if id, ok := pickOf(live, s.B); ok {
			seg := live[id]
			b := c.newBuild(l, &seg, s.C)
			others := slices.DeleteFunc(slices.Clone(seg.Builds), func(old segment.Build) bool { return old.Index == b.Index })
			seg.Builds = append(others, b)
			live[id] = seg
			c.change(l, catalog.SegmentChange{Update: []catalog.Update{{Segment: id, AddBuilds: []segment.Build{b}}}}, live)
		}
	case "update":
		if id, ok := pickOf(live, s.B); ok {
			seg := live[id]
			f := c.write(segment.KindInsert, fmt.Sprintf("%d/%d/%d/insert/100/u%d", l.col.ID, seg.Partition, id, c.id()))
			u := catalog.Update{
				Segment: id, AddFiles: []segment.File{f},
				RemoveFiles: []catalog.FilePath{{Path: seg.Files[0].Path}},
			}
			seg.Files = append(slices.Clone(seg.Files[1:]), f)
			live[id] = seg
			c.change(l, catalog.SegmentChange{Update: []catalog.Update{u}}, live)
		}
	case "create":
		c.create(c.calm(s.B), l, 0)
	case "expiring create":
		c.create(c.calm(s.B), l, time.Duration(1+s.C%90)*time.Second)
	case "slow create": // its store hangs until thawed
		m = c.calm(s.B)
		m.store.Freeze()
		c.create(m, l, 0)
	case "dying create": // it is frozen until thawed
		m = c.calm(s.B)
		m.store.Freeze()
		c.create(m, l, 0)
		settle()
		m.frozen = true
		m.kv.Freeze()
	case "faulty create":
		m.kv.FailNth(s.C%8, meta.Fault(1+s.C/8%2), meta.MethodTxn, meta.MethodGrant)
		if s.C%3 == 0 {
			m.store.FailNth(object.OpCreate, s.C/3%3, object.Fault(1+s.C/9%2))
		}
		c.create(m, l, 0)
	case "drop snapshot":
		if id, ok := pickOf(c.committed(), s.B); ok {
			m = c.calm(s.C)
			c.call(func(ctx context.Context) { _, _ = m.Drop(ctx, request.Token{}, Ref{ID: id}, 0) })
		}
	case "pin":
		if id, ok := pickOf(c.committed(), s.B); ok {
			if p, err := c.calm(s.C).Pin(ctx, request.Token{}, Ref{ID: id},
				PinSpec{Owner: "o", TTL: time.Duration(s.C%60) * time.Second}); err == nil {
				c.pins = append(c.pins, p)
			}
		}
	case "unpin":
		if len(c.pins) > 0 {
			p := c.pins[s.B%len(c.pins)]
			_ = c.calm(s.C).Unpin(ctx, Ref{ID: p.Snapshot}, p.ID) // may fail by a planned fault
		}
	case "reclaim":
		c.reclaim(m, l, c.asks(l, s.C), deleterOf(s.C))
	case "reclaim file":
		if id, ok := pickOf(l.units, s.C); ok {
			var asks []gc.Ask
			u := l.units[id]
			for f := range u.Segment.AllFiles() {
				asks = append(asks, gc.Ask{File: catalog.FilePath{Path: f.Path}, FileSegment: u.Segment.ID})
			}
			c.reclaim(m, l, append(asks, gc.Ask{Segment: id}), deleterOf(s.C))
		}
	case "faulty reclaim": // the grant gets no answer
		m.kv.FailNth(1+s.C/2%2, meta.Fault(2-s.C%2), meta.MethodTxn)
		c.reclaim(m, l, c.asks(l, s.C), deleterOf(s.C))
	case "raced reclaim": // a snapshot is committed in between
		other := c.calm(s.B + 1)
		c.between(m, func() { c.commit(other, l) })
		c.reclaim(m, l, c.asks(l, s.C), gc.ByCaller)
	case "begun reclaim": // one begins in between
		other := c.calm(s.B + 1)
		c.between(m, func() {
			other.store.Freeze()
			c.create(other, l, 0)
			time.Sleep(time.Millisecond)
		})
		c.reclaim(m, l, c.asks(l, s.C), gc.ByCaller)
	case "late reclaim": // one that was slow is committed in between
		all := c.replicas
		c.between(m, func() {
			for _, m := range all {
				m.thaw()
			}
			time.Sleep(time.Millisecond)
		})
		c.reclaim(m, l, c.asks(l, s.C), deleterOf(s.C))
	case "reclaim again":
		if id, ok := pickOf(l.grants, s.C); ok {
			c.reclaim(c.calm(s.B), l, []gc.Ask{{Segment: id}, {Build: id}, {Segment: id}}, deleterOf(s.B))
		}
	case "confirm":
		c.confirm(m, l, s.C%4 == 3)
	case "crash":
		if s.C%2 == 0 { // else its calls are applied on release
			m.heal()
		}
		m.stop()
		c.start(s.B % 3)
	case "zombie": // the leader, in most cases
		for i, r := range c.replicas {
			if r.Leading() && s.C%4 != 0 {
				m = c.replicas[i]
			}
		}
		m.late.hold()
		m.frozen = s.C%2 == 0
		if m.frozen {
			m.kv.Freeze()
		}
	case "release":
		c.release()
	case "thaw":
		m.heal()
	case "corrupt":
		c.corrupt(s)
	case "repair":
		c.repair()
	case "compact history":
		_, _, revision, err := c.env.kv.Get(ctx, keys.Format)
		c.must(err)
		_ = c.env.memory.Compact(ctx, revision) // may already be compacted
	case "wait":
		c.rest(time.Duration(1+s.B%40) * time.Second)
	case "wait long":
		c.rest(time.Duration(2+s.B%10) * time.Minute)
	default:
		c.wrong("no such step")
	}
}

// release applies everything that is delayed.
func (c *course) release() {
	for _, m := range c.ever {
		m.late.release()
	}
}

// between calls fn before the next grant of a replica.
func (c *course) between(m *member, fn func()) {
	m.spy.mu.Lock()
	defer m.spy.mu.Unlock()
	m.spy.before = fn
}

func (c *course) commit(m *member, l *ledger) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	_, _ = m.Create(ctx, request.Token{}, spec(l.col, fmt.Sprint("s", c.names.Add(1))))
}

// confirm is the caller that deletes the granted files and confirms them, unless it
// dies before.
func (c *course) confirm(m *member, l *ledger, dies bool) {
	var ids []int64
	for id, g := range l.grants {
		if g.tomb.Deleter == gc.ByCaller && !g.gone {
			ids = append(ids, id)
			for _, key := range g.files {
				c.must(c.objects.Delete(context.Background(), key))
			}
			g.asked = g.asked || !dies
		}
	}
	if dies || len(ids) == 0 {
		return
	}
	slices.Sort(ids)
	c.call(func(ctx context.Context) { _, _ = m.GC.Confirm(ctx, catalog.Ref{ID: l.col.ID}, ids) })
}

// corrupt damages the references of a snapshot and removes them from all caches.
func (c *course) corrupt(s step) {
	id, ok := pickOf(c.committed(), s.B)
	if !ok || c.corrupted[id] != nil {
		return
	}
	for _, m := range c.replicas {
		m.heal()
		m.stop()
	}
	c.rest(time.Second)
	if t := c.snapshots[id]; !t.dropped { // it may have been dropped meanwhile
		key := manifest.RefsKey(t.collection, id)
		data, there := c.object(key)
		if !there {
			c.wrong("snapshot %d has no references", id)
		}
		c.corrupted[id] = data
		bad := slices.Clone(data)
		bad[len(bad)-1-s.C%len(bad)] ^= 1
		if s.C%5 == 0 {
			bad = bad[:len(bad)/2]
		}
		var err error
		if s.C%7 == 0 {
			err = c.objects.Delete(context.Background(), key)
		} else {
			_, err = c.objects.Put(context.Background(), key, bad)
		}
		c.must(err)
	}
	for i := range c.replicas {
		c.start(i)
	}
}

func (c *course) repair() {
	for id, data := range c.corrupted {
		if t := c.snapshots[id]; !t.dropped {
			_, err := c.objects.Put(context.Background(), manifest.RefsKey(t.collection, id), data)
			c.must(err)
		}
	}
	clear(c.corrupted)
}
