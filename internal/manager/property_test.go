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
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/internal/testing/virtual"
)

// TestNothingNeededIsEverDeleted does random things to a cluster of three
// replicas, with every failure that there is, and has an oracle look on that
// knows nothing of how reclamation works: see course.
func TestNothingNeededIsEverDeleted(t *testing.T) {
	var reached reach
	// What must be reached is, whatever is drawn.
	runCourse(t, t, scripted, &reached)
	rapid.Check(t, func(rt *rapid.T) {
		runCourse(t, rt, rapid.SliceOfN(genStep, 10, 60).Draw(rt, "steps"), &reached)
	})
	t.Log(reached.String())
	for what, n := range reached.counts() {
		if n == 0 {
			t.Errorf("there never was: %s", what)
		}
	}
}

// reach counts what a run has exercised.
type reach struct {
	granted, heldBySnapshot, heldByCreate, compareFailed, again   atomic.Int64
	unreadable, deleted, confirmed, unanswered, reaped, committed atomic.Int64
}

func (r *reach) counts() map[string]int64 {
	return map[string]int64{
		"grant": r.granted.Load(), "hold by a snapshot": r.heldBySnapshot.Load(), "hold by a create": r.heldByCreate.Load(),
		"grant whose compares failed": r.compareFailed.Load(), "unit granted again": r.again.Load(),
		"refusal for unreadable references": r.unreadable.Load(), "unit deleted": r.deleted.Load(), "unit confirmed": r.confirmed.Load(),
		"reclaim without an answer": r.unanswered.Load(), "create given up": r.reaped.Load(), "commit": r.committed.Load(),
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

// step is one thing that is done; the numbers choose of what there is.
type step struct {
	Op      string
	A, B, C int
}

// ops are the steps, those that are done often several times.
var ops = []string{
	"add", "add", "add", "drop", "drop", "compact", "compact", "rebuild", "rebuild", "update", "update",
	"create", "create", "create", "slow create", "slow create", "faulty create", "faulty create", "dying create", "expiring create",
	"drop snapshot", "drop snapshot", "pin", "unpin",
	"reclaim", "reclaim", "reclaim", "reclaim", "reclaim file", "faulty reclaim", "raced reclaim", "begun reclaim", "late reclaim",
	"reclaim again", "confirm", "confirm",
	"crash", "zombie", "release", "thaw", "thaw", "corrupt", "repair", "compact history", "wait", "wait", "wait long",
	"drop collection",
}

var genStep = rapid.Custom(func(t *rapid.T) step {
	return step{rapid.SampledFrom(ops).Draw(t, "op"), rapid.IntRange(0, 999).Draw(t, "a"), rapid.IntRange(0, 999).Draw(t, "b"), rapid.IntRange(0, 999).Draw(t, "c")}
})

// scripted meets everything that a run must have met.
var scripted = []step{
	{"add", 0, 7, 0},
	{"add", 0, 7, 1},
	{"create", 0, 0, 0},
	{"drop", 0, 0, 0},
	{"reclaim", 0, 0, 0}, // held by a snapshot
	{"slow create", 0, 1, 0},
	{"drop", 0, 0, 0},
	{"reclaim", 0, 1, 0},      // held by a create
	{"late reclaim", 0, 0, 0}, // which commits after it was looked for, and before the grant
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
}

// errWrong is how a course ends that saw what must not be.
type errWrong string

func runCourse(t *testing.T, report rapid.TB, steps []step, reached *reach) {
	var wrong errWrong
	virtual.Test(t, func(t *testing.T) {
		kv := metamemory.New(metamemory.Options{Now: time.Now})
		w := &world{t: t, kv: kv, memory: kv, objects: objectmemory.New(objectmemory.Options{Now: time.Now}), now: time.Now}
		c := &course{w: w, reach: reached}
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

// course is one course of things, with an oracle. The oracle sees every change
// of the metadata store, in order, and keeps its own account: what each file
// holds, which segments there were at each revision and so what each snapshot
// captured, and what was granted.
type course struct {
	w     *world
	reach *reach
	now   string // what is being done

	cat      *catalog.Catalog // without faults, for the engine that writes the collections
	reader   *Manager         // without faults, and not run
	replicas [3]*member
	flying   sync.WaitGroup // calls of replicas

	mu     sync.Mutex
	events []meta.Event
	ended  []reclaimed

	cols      [2]*ledger
	names     atomic.Int64
	foreign   map[string]bool // keys of files that belong to nothing
	granted   map[string]bool // keys of all files that were ever granted
	snapshots map[int64]*taken
	pins      []*Pin
	corrupted map[int64][]byte // what the references were, by snapshot
}

// member is one replica with what can be done to it.
type member struct {
	*replica
	spy    *spy
	late   *lateDeletes
	frozen bool
}

// ledger is what the oracle knows of a collection.
type ledger struct {
	col     catalog.Collection
	index   int64
	history []state // by revision
	units   map[int64]catalog.Unit
	grants  map[int64]*granted
	dropped bool                      // the collection is
	orphans map[int64]segment.Segment // dropped with it, and not granted
}

// state is what a collection consisted of from a revision on.
type state struct {
	revision int64
	segments map[int64]segment.Segment
}

// taken is a snapshot that was committed.
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
	asked bool // somebody was about to confirm it
	gone  bool
}

// reclaimed is a call of Reclaim that has ended.
type reclaimed struct {
	col     *ledger
	asks    []gc.Ask
	known   map[int64]bool // units that there were before
	answers []gc.Answer
	err     error
}

// spy sees the transactions of a replica that grant something, and has things
// happen between the read and the grant.
type spy struct {
	meta.KV
	mu     sync.Mutex
	before func() // the next grant, once
	failed func()
}

func (s *spy) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	grants := slices.ContainsFunc(t.Then, func(op meta.Op) bool { return op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.AllTombsPrefix) })
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

// lateDeletes is a store whose deletes, while it is held, land late: whatever
// has become of the caller since.
type lateDeletes struct {
	object.Store
	mu   sync.Mutex
	gate chan struct{} // closed by release; nil when not held
}

func (l *lateDeletes) hold() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gate == nil {
		l.gate = make(chan struct{})
	}
}

func (l *lateDeletes) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gate != nil {
		close(l.gate)
		l.gate = nil
	}
}

func (l *lateDeletes) Delete(ctx context.Context, list ...string) error {
	l.mu.Lock()
	gate := l.gate
	l.mu.Unlock()
	if gate != nil {
		<-gate
		ctx = context.WithoutCancel(ctx)
	}
	return l.Store.Delete(ctx, list...)
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
	c.foreign, c.granted = map[string]bool{}, map[string]bool{}
	c.snapshots, c.corrupted = map[int64]*taken{}, map[int64][]byte{}
	requests := request.NewLeases(c.w.kv, c.w.now)
	for i := range c.replicas {
		c.start(i)
	}
	o := c.replicas[0].o
	o.KV, o.Requests, o.Stores = c.w.kv, requests, map[string]object.Store{"default": c.w.objects}
	o.Catalog = catalog.New(catalog.Options{KV: c.w.kv, Now: c.w.now, Rand: rand.Reader, Requests: requests, HasStore: func(string) bool { return true }})
	c.cat = o.Catalog
	var err error
	c.reader, err = New(o)
	c.must(err)
	for i := range c.cols {
		col, _, x := c.w.collection(c.replicas[0].replica, fmt.Sprint("c", i))
		c.w.checkpoint(c.replicas[0].replica, col, 1000, 1000)
		c.cols[i] = &ledger{
			col: col, index: x.ID, history: []state{{0, map[int64]segment.Segment{}}},
			units: map[int64]catalog.Unit{}, grants: map[int64]*granted{},
		}
	}
}

func (c *course) start(i int) {
	m := &member{}
	m.replica = c.w.start(fmt.Sprint("r", i), func(o *Options) {
		o.Log = zap.NewNop()
		o.MaxCreates = 4
		m.spy = &spy{KV: o.KV, failed: func() { c.reach.compareFailed.Add(1) }}
		m.late = &lateDeletes{Store: o.Stores["default"]}
		o.KV, o.Stores = m.spy, map[string]object.Store{"default": m.late}
	})
	c.replicas[i] = m
}

func (m *member) thaw() {
	m.kv.Thaw()
	m.store.Thaw()
	m.late.release()
}

func (m *member) heal() {
	m.kv.Hook(nil)
	m.store.Plan(nil)
	m.thaw()
	m.frozen = false
}

func (c *course) stopAll() {
	for _, m := range c.replicas {
		if m != nil {
			m.heal()
			m.stop()
		}
	}
}

// calm is a replica that answers.
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

// call has a replica do something for as long as that takes, for a while.
func (c *course) call(do func(ctx context.Context)) {
	c.flying.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		do(ctx)
	})
}

// rest lets d pass, and looks at everything.
func (c *course) rest(d time.Duration) {
	time.Sleep(d)
	settle()
	c.observe()
	c.lookAround()
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

// at is what there was at a revision.
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

func contentOf(key string) []byte { return []byte("this is " + key) }

// watch takes down all that changes.
func (c *course) watch(ctx context.Context) {
	from, to := keys.All()
	w := c.w.kv.Watch(ctx, from, to, 1)
	for {
		b, err := w.Next()
		if err != nil {
			if ctx.Err() == nil {
				c.w.t.Errorf("the oracle is blind: %v", err)
			}
			return
		}
		c.mu.Lock()
		c.events = append(c.events, b.Events...)
		c.mu.Unlock()
	}
}

// observe judges what has changed since the last time.
func (c *course) observe() {
	c.mu.Lock()
	events, ends := c.events, c.ended
	c.events, c.ended = nil, nil
	c.mu.Unlock()
	for _, e := range events {
		switch {
		case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
			c.sawSnapshot(e)
		case strings.HasPrefix(e.KV.Key, keys.AllTombsPrefix):
			c.sawTombstone(e)
		case strings.HasPrefix(e.KV.Key, "/catalog/unit/"):
			collection, id, err := keys.LastTwo(e.KV.Key)
			c.must(err)
			l := c.ledgerOf(collection)
			if e.Deleted {
				delete(l.units, id) // the tombstone comes in the same revision, see below
				continue
			}
			if l.grants[id] != nil {
				c.wrong("unit %d is back after its grant", id)
			}
			u, err := catalog.DecodeUnit(collection, e.KV)
			c.must(err)
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
	s, err := decode(e.KV)
	c.must(err)
	switch {
	case s.State == Deleting && old != nil:
		old.dropped = true
	case s.State == Deleting:
		c.reach.reaped.Add(1)
	case s.State == Committed && old == nil:
		c.reach.committed.Add(1)
		t := &taken{id: id, collection: s.Collection, name: s.Name, segments: c.ledgerOf(s.Collection).at(s.CatalogRevision), files: map[string]bool{}}
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
	c.reach.granted.Add(1)
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

// sawAnswers judges what Reclaim said.
func (c *course) sawAnswers(e *reclaimed) {
	if e.err != nil {
		switch {
		case errors.Is(e.err, gc.ErrUnreadable):
			c.reach.unreadable.Add(1)
		case errors.Is(e.err, meta.ErrUnavailable), errors.Is(e.err, gc.ErrLoading), errors.Is(e.err, context.DeadlineExceeded):
			c.reach.unanswered.Add(1)
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
				c.wrong("unit %d is said to be granted", a.Tombstone.ID)
			case id != 0 && a.Tombstone.ID != id:
				c.wrong("unit %d was asked for, %d was granted", id, a.Tombstone.ID)
			case a.Tombstone.Revision != g.tomb.Revision || a.Tombstone.Deleter != g.tomb.Deleter || a.Tombstone.Caller != g.tomb.Caller ||
				!a.Tombstone.GrantTime.Equal(g.tomb.GrantTime):
				c.wrong("the grant was %+v, now it is %+v", g.tomb, a.Tombstone)
			}
			if !e.known[a.Tombstone.ID] {
				c.reach.again.Add(1)
			}
		case gc.Dropped:
			if a.Holders == 0 {
				c.wrong("unit %d is held by nobody, and not granted", id)
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
	r, _, err := c.w.objects.Get(context.Background(), key, 0, -1)
	if err != nil {
		return nil, false
	}
	data, err := io.ReadAll(r)
	c.must(err)
	return data, true
}

// lookAround holds what must be true at every moment.
func (c *course) lookAround() {
	intact := func(key, what string) {
		if got, there := c.object(key); !there || !bytes.Equal(got, contentOf(key)) {
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
			if _, there, _, err := c.w.kv.Get(context.Background(), keys.Tomb(l.col.ID, id)); err != nil || there == g.gone {
				c.wrong("tombstone %d: there %v, gone %v, err = %v", id, there, g.gone, err)
			}
		}
		for id, s := range l.orphans {
			for f := range s.AllFiles() {
				intact(keyOf(f), fmt.Sprint("segment ", id, " is not granted"))
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

// change is what the engine does, for which the oracle keeps account.
func (c *course) change(l *ledger, swap catalog.Swap, next map[int64]segment.Segment) {
	revision, err := c.cat.Change(context.Background(), request.Token{}, catalog.Ref{ID: l.col.ID}, swap)
	c.must(err)
	l.history = append(l.history, state{revision, next})
}

func (c *course) id() int64 {
	id, err := c.cat.NextID(context.Background())
	c.must(err)
	return id
}

// write puts a file into the store.
func (c *course) write(kind, path string) segment.File {
	f := segment.File{Kind: kind, Path: path, Entries: 1, Field: 100, LogID: 1}
	if kind != segment.KindIndex {
		f.MinTimestamp, f.MaxTimestamp = 1, 20
	}
	body := contentOf(keyOf(&f))
	f.Size = int64(len(body))
	_, err := c.w.objects.Put(context.Background(), keyOf(&f), body)
	c.must(err)
	return f
}

func (c *course) newBuild(l *ledger, s *segment.Segment, layout int) segment.Build {
	b := segment.Build{ID: c.id(), Index: l.index, Field: 100}
	path := ""
	switch layout % 3 {
	case 0: // under both ids
		path = fmt.Sprintf("%d/0/%d/index/%d/f", l.col.ID, s.ID, b.ID)
	case 1: // under its own
		path = fmt.Sprintf("%d/index/%d/f", l.col.ID, b.ID)
	default: // under the segment's, so that its own does not cover it
		path = fmt.Sprintf("%d/0/%d/index/v%d", l.col.ID, s.ID, b.ID)
	}
	b.Files = []segment.File{c.write(segment.KindIndex, path)}
	return b
}

// newSegment makes a segment: with a build, more files, a foreign file.
func (c *course) newSegment(l *ledger, shape int) segment.Segment {
	s := segment.Segment{ID: c.id(), Channel: shape % 2, Level: 1, State: segment.Flushed, Rows: 1, DML: segment.Position{Timestamp: 21}}
	s.Files = []segment.File{c.write(segment.KindInsert, fmt.Sprintf("%d/0/%d/insert/100/1", l.col.ID, s.ID))}
	if shape&2 != 0 {
		s.Files = append(s.Files, c.write(segment.KindDelta, fmt.Sprintf("%d/0/%d/delta/0/1", l.col.ID, s.ID)))
	}
	if shape&4 != 0 {
		s.Builds = []segment.Build{c.newBuild(l, &s, shape)}
	}
	if shape&8 != 0 {
		f := c.write(segment.KindStats, fmt.Sprintf("%d/shared-%d", l.col.ID, s.ID))
		c.foreign[keyOf(&f)] = true
		s.Files = append(s.Files, f)
	}
	return s
}

func pickOf[K int64 | string, V any](set map[K]V, n int) (K, bool) {
	if len(set) == 0 {
		var none K
		return none, false
	}
	return slices.Sorted(maps.Keys(set))[n%len(set)], true
}

// committed are the snapshots there are.
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
		answers, err := m.GC().Reclaim(ctx, catalog.Ref{ID: l.col.ID}, asks, deleter, "caller")
		c.mu.Lock()
		defer c.mu.Unlock()
		c.ended = append(c.ended, reclaimed{l, asks, known, answers, err})
	})
}

// asks are units to ask for: dropped ones, and others.
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
	return append(list, gc.Ask{Segment: 1 << 40}, gc.Ask{File: catalog.FilePath{Path: "nobody/7/has/this"}}, gc.Ask{Build: 1 << 41})
}

func deleterOf(n int) gc.Deleter { return gc.Deleter(1 + n%2) }

func (c *course) do(s step) {
	ctx := context.Background()
	l, m := c.cols[s.A%2], c.replicas[s.B%3]
	live := maps.Clone(l.live())
	if l.dropped && (s.Op == "add" || s.Op == "drop collection") {
		return
	}
	switch s.Op {
	case "drop collection":
		if s.C%3 > 0 {
			return // too good a way to an end of it all
		}
		_, err := c.cat.DropCollection(ctx, request.Token{}, catalog.Ref{ID: l.col.ID}, 0)
		c.must(err)
		kv, _, _, err := c.w.kv.Get(ctx, keys.Collection(l.col.ID))
		c.must(err)
		l.dropped, l.orphans = true, live
		l.history = append(l.history, state{kv.ModRevision, map[int64]segment.Segment{}})
	case "add":
		seg := c.newSegment(l, s.B)
		live[seg.ID] = seg
		c.change(l, catalog.Swap{Add: []segment.Segment{seg}}, live)
	case "drop":
		if id, ok := pickOf(live, s.B); ok {
			delete(live, id)
			c.change(l, catalog.Swap{Drop: []int64{id}}, live)
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
			c.change(l, catalog.Swap{Drop: in, Add: []segment.Segment{out}}, live)
		}
	case "rebuild":
		if id, ok := pickOf(live, s.B); ok {
			seg := live[id]
			b := c.newBuild(l, &seg, s.C)
			seg.Builds = []segment.Build{b}
			live[id] = seg
			c.change(l, catalog.Swap{Update: []catalog.Update{{Segment: id, AddBuilds: []segment.Build{b}}}}, live)
		}
	case "update":
		if id, ok := pickOf(live, s.B); ok {
			seg := live[id]
			f := c.write(segment.KindInsert, fmt.Sprintf("%d/0/%d/insert/100/u%d", l.col.ID, id, c.id()))
			u := catalog.Update{Segment: id, AddFiles: []segment.File{f}, RemoveFiles: []catalog.FilePath{{Path: seg.Files[0].Path}}}
			seg.Files = append(slices.Clone(seg.Files[1:]), f)
			live[id] = seg
			c.change(l, catalog.Swap{Update: []catalog.Update{u}}, live)
		}
	case "create":
		c.create(c.calm(s.B), l, 0)
	case "expiring create":
		c.create(c.calm(s.B), l, time.Duration(1+s.C%90)*time.Second)
	case "slow create": // its store hangs, until it is thawed
		m = c.calm(s.B)
		m.store.Freeze()
		c.create(m, l, 0)
	case "dying create": // it is stopped, until it is thawed
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
			if p, err := c.calm(s.C).Pin(ctx, request.Token{}, Ref{ID: id}, PinSpec{Owner: "o", TTL: time.Duration(s.C%60) * time.Second}); err == nil {
				c.pins = append(c.pins, p)
			}
		}
	case "unpin":
		if len(c.pins) > 0 {
			p := c.pins[s.B%len(c.pins)]
			_ = c.calm(s.C).Unpin(ctx, Ref{ID: p.Snapshot}, p.ID) // or a planned fault met it
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
		m.heal()
		m.stop()
		c.start(s.B % 3)
	case "zombie": // whoever leads, most often
		for i, r := range c.replicas {
			if r.Stats().Leading && s.C%4 != 0 {
				m = c.replicas[i]
			}
		}
		m.late.hold()
		m.frozen = s.C%2 == 0
		if m.frozen {
			m.kv.Freeze()
		}
	case "release":
		for _, m := range c.replicas {
			m.late.release()
		}
	case "thaw":
		m.heal()
	case "corrupt":
		c.corrupt(s)
	case "repair":
		c.repair()
	case "compact history":
		_, _, revision, err := c.w.kv.Get(ctx, keys.Format)
		c.must(err)
		_ = c.w.memory.Compact(ctx, revision) // or it was just done
	case "wait":
		c.rest(time.Duration(1+s.B%40) * time.Second)
	case "wait long":
		c.rest(time.Duration(2+s.B%10) * time.Minute)
	default:
		c.wrong("no such step")
	}
}

// between has fn happen before the next grant of a replica.
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

// confirm is the caller that deletes what it was granted, and says so, unless
// it dies before.
func (c *course) confirm(m *member, l *ledger, dies bool) {
	var ids []int64
	for id, g := range l.grants {
		if g.tomb.Deleter == gc.ByCaller && !g.gone {
			ids = append(ids, id)
			for _, key := range g.files {
				c.must(c.w.objects.Delete(context.Background(), key))
			}
			g.asked = g.asked || !dies
		}
	}
	if dies || len(ids) == 0 {
		return
	}
	slices.Sort(ids)
	c.call(func(ctx context.Context) { _, _ = m.GC().Confirm(ctx, catalog.Ref{ID: l.col.ID}, ids) })
}

// corrupt damages the references of a snapshot, and has nobody know them.
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
	if t := c.snapshots[id]; !t.dropped { // it may have been meanwhile
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
			err = c.w.objects.Delete(context.Background(), key)
		} else {
			_, err = c.w.objects.Put(context.Background(), key, bad)
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
			_, err := c.w.objects.Put(context.Background(), manifest.RefsKey(t.collection, id), data)
			c.must(err)
		}
	}
	clear(c.corrupted)
}

// finish brings all to an end, after which there must be nothing left but what
// callers did not confirm.
func (c *course) finish() {
	ctx := context.Background()
	c.repair()
	for _, m := range c.replicas {
		m.heal()
		c.between(m, nil)
	}
	c.rest(15 * time.Minute) // leases run out, and what is in flight ends
	c.flying.Wait()
	c.rest(time.Minute)
	for id, s := range c.committed() { // the model is right
		files := 0
		err := c.reader.Segments(ctx, Ref{ID: id}, 0, func(seg *Segment) bool {
			want, ok := s.segments[seg.ID]
			if !ok || len(want.Files) != len(seg.Files) || len(want.Builds) != len(seg.Builds) {
				c.wrong("snapshot %s has segment %+v, and should %v: %+v", s.name, seg.Segment, ok, want)
			}
			for f := range seg.AllFiles() {
				files++
				if !s.files[keyOf(f)] {
					c.wrong("snapshot %s has %s", s.name, f.Path)
				}
			}
			return true
		})
		if err != nil || files != len(s.files) {
			c.wrong("snapshot %s has %d files, want %d; err = %v", s.name, files, len(s.files), err)
		}
	}
	// A creator that was stopped may write late, under an id without a record.
	for _, key := range c.w.objectsUnder("snapshots/") {
		id, err := strconv.ParseInt(strings.Split(key, "/")[2], 10, 64)
		c.must(err)
		if c.snapshots[id] == nil {
			c.must(c.w.objects.Delete(ctx, key))
		}
	}
	m := c.replicas[0]
	c.w.check(m.replica)
	for _, p := range c.pins {
		c.must(m.Unpin(ctx, Ref{ID: p.Snapshot}, p.ID))
	}
	for id := range c.committed() {
		_, err := m.Drop(ctx, request.Token{}, Ref{ID: id}, 0)
		c.must(err)
	}
	for i, l := range c.cols {
		if len(l.live()) > 0 {
			c.change(l, catalog.Swap{Drop: slices.Sorted(maps.Keys(l.live()))}, map[int64]segment.Segment{})
		}
		c.rest(0)
		c.reclaim(c.replicas[i], l, c.asks(l, 0), gc.BySnapshotd)
	}
	c.rest(3 * time.Minute)
	c.w.check(m.replica)
	left := map[string]bool{}
	for _, l := range c.cols {
		if len(l.units) > 0 {
			c.wrong("units are left: %v", l.units)
		}
		for id, g := range l.grants {
			if !g.gone && g.tomb.Deleter != gc.ByCaller {
				c.wrong("tombstone %d is left", id)
			}
			for _, key := range g.files {
				left[key] = !g.gone
			}
		}
		if got := c.w.keysUnder("/catalog/replaced/" + keys.ID(l.col.ID)); len(got) > 0 {
			unconfirmed := func(key string) bool {
				id, err := keys.LastID(key)
				return err == nil && l.grants[id] != nil && !l.grants[id].gone
			}
			if slices.ContainsFunc(got, func(key string) bool { return !unconfirmed(key) }) {
				c.wrong("keys are left: %v", got)
			}
		}
	}
	for _, key := range c.w.objectsUnder("data/") {
		if !left[key] && !c.foreign[key] {
			c.wrong("%s is left", key)
		}
	}
	s := m.GC().Stats()
	if s.Snapshots+s.Loading+s.Unreadable+s.Segments+s.Builds+s.Granted != 0 {
		c.wrong("all is gone, and there is %+v", s)
	}
}
