package sim

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	trusted "github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// work is what callers and engines ask of the replicas. What is chosen is chosen
// by the scheduler's goroutine; each call runs in one of its own.
type work struct {
	s      *sim
	left   int // to be begun
	engine *member
	store  object.Store // as engines reach it
	flying sync.WaitGroup
	stop   context.CancelFunc
	ctx    context.Context //nolint:containedctx // of all calls, which the run ends

	mu    sync.Mutex
	n     int
	calls map[int]string // that are under way
	ended []ended
	ids   []int64 // that were handed out

	names    int
	creates  []*create
	restores []*restore
	pins     []*manager.Pin
}

// ended is a call that came back.
type ended struct {
	n     int
	m     *member
	text  string
	judge func()
}

// create is a request for a snapshot, which may be repeated.
type create struct {
	tok      request.Token
	spec     manager.CreateSpec
	began    int64 // revision at the first call
	open     int   // calls that have no answer yet
	unknown  bool  // one came back without an answer
	failed   string
	snapshot int64
}

// restore is a request for a restore, which may be repeated.
type restore struct {
	tok  request.Token
	spec manager.RestoreSpec
	job  int64
}

func newWork(s *sim) *work {
	w := &work{s: s, left: s.profile.ops, calls: map[int]string{}, engine: &member{index: 99, engine: true}}
	w.ctx, w.stop = context.WithCancel(never)
	w.store = &gatedStore{ledger: ledger{s.objects, s.oracle, w.engine}, g: s.gate, m: w.engine}
	return w
}

func (w *work) inFlight() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.calls)
}

func (w *work) underWay() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Sorted(maps.Values(w.calls))
}

// call has a replica do something. do returns what to judge when it is back.
func (w *work) call(m *member, what string, do func(ctx context.Context) (string, func())) {
	w.mu.Lock()
	w.n++
	n := w.n
	w.calls[n] = what
	w.mu.Unlock()
	w.s.note("ask %d of %v: %s", n, m, what)
	w.flying.Go(func() {
		ctx, cancel := context.WithTimeout(w.ctx, opTimeout)
		defer cancel()
		text, judge := do(ctx)
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.calls, n)
		w.ended = append(w.ended, ended{n, m, text, judge})
	})
}

// judge judges what has come back.
func (w *work) judge() {
	w.mu.Lock()
	list := w.ended
	w.ended = nil
	w.mu.Unlock()
	slices.SortFunc(list, func(a, b ended) int { return cmp.Compare(a.n, b.n) })
	for _, e := range list {
		if e.m.dead { // no caller received it
			w.s.note("no answer to %d", e.n)
			continue
		}
		w.s.note("answer to %d: %s", e.n, e.text)
		if e.judge != nil {
			e.judge()
		}
	}
}

// handed returns the ids that were handed out since the last time.
func (w *work) handed() []int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := w.ids
	w.ids = nil
	return list
}

// unknown says whether an error leaves open what happened.
func unknown(err error) bool {
	return slices.ContainsFunc([]error{
		meta.ErrUnavailable,
		object.ErrUnavailable,
		context.Canceled,
		context.DeadlineExceeded,
		manager.ErrStopping,
		gc.ErrLoading,
		meta.ErrConflict,
		trusted.ErrUntrusted,
	}, func(class error) bool { return errors.Is(err, class) })
}

func (w *work) name(kind string) string {
	w.names++
	return fmt.Sprint(kind, w.names)
}

func (w *work) token(method, value string) request.Token {
	h := sha256.Sum256([]byte(value))
	return request.Token{Principal: "local", Method: method, Value: value, Hash: h[:]}
}

// replica chooses one that answers.
func (w *work) replica() *member {
	list := w.s.calm()
	return list[w.s.rng.IntN(len(list))]
}

func pick[K cmp.Ordered, V any](s *sim, set map[K]V) (key K, ok bool) {
	if len(set) == 0 {
		return key, false
	}
	return slices.Sorted(maps.Keys(set))[s.rng.IntN(len(set))], true
}

// active chooses a collection that is ACTIVE, nil if there is none.
func (w *work) active() *collection {
	list := map[int64]bool{}
	for id, c := range w.s.oracle.cols {
		if c.state == catalog.Active {
			list[id] = true
		}
	}
	id, ok := pick(w.s, list)
	if !ok {
		return nil
	}
	return w.s.oracle.cols[id]
}

// steal registers in a collection what another one under the same root has: a segment
// as it is, or its files under another id. Nothing of that may succeed.
func (w *work) steal(m *member, c *collection) {
	other, ok := pick(w.s, w.s.oracle.cols)
	if !ok || other == c.id {
		return
	}
	id, ok := pick(w.s, w.s.oracle.cols[other].live)
	if !ok {
		return
	}
	s := w.s.oracle.cols[other].live[id]
	s.Partition, s.Channel, s.Builds = 0, 0, nil
	fresh := w.s.chance(0.5)
	w.call(
		m,
		fmt.Sprintf("register segment %d of %d in %d, under another id: %v", id, other, c.id, fresh),
		func(ctx context.Context) (string, func()) {
			var err error
			if fresh {
				s.ID, err = w.id(ctx, m)
			}
			if err != nil {
				return answer(err, "done"), nil
			}
			_, _, err = m.cat.AddSegments(ctx, c.id, []segment.Segment{s})
			return answer(err, "done"), func() {
				if err == nil {
					w.s.wrong("segment %d of collection %d is registered in collection %d as well", id, other, c.id)
				}
			}
		},
	)
}

func (w *work) activeCount() int {
	n := 0
	for _, c := range w.s.oracle.cols {
		if c.state != 0 {
			n++
		}
	}
	return n
}

func (w *work) standing() map[int64]*expectedSnapshot {
	list := map[int64]*expectedSnapshot{}
	for id, s := range w.s.oracle.snapshots {
		if !s.dropped {
			list[id] = s
		}
	}
	return list
}

// chores are what may be asked for, those that are asked for often several times.
var chores = []string{
	"add",
	"add",
	"add",
	"add",
	"drop",
	"drop",
	"compact",
	"compact",
	"rebuild",
	"update",
	"create",
	"create",
	"create",
	"create",
	"create again",
	"create again",
	"shared name",
	"expiring create",
	"drop snapshot",
	"drop snapshot",
	"drop snapshot",
	"pin",
	"unpin",
	"renew",
	"renew",
	"reclaim",
	"reclaim",
	"reclaim",
	"reclaim",
	"confirm",
	"confirm",
	"restore",
	"restore",
	"restore again",
	"cancel",
	"collect",
	"sweep",
	"list",
	"list",
	"read",
	"read",
	"drop partition",
	"drop index",
	"drop collection",
	"new collection",
	"compact history",
	"recover",
	"recover clock",
	"steal",
}

// focus is a kind of run: chores that meet, and what happens to their calls.
type focus struct {
	chores     []string
	slow, weak string  // as in a profile
	spoil      float64 // likewise
}

var focuses = []focus{
	{
		chores: []string{
			"add",
			"add",
			"create",
			"create",
			"drop",
			"drop",
			"drop",
			"compact",
			"rebuild",
			"reclaim",
			"collect",
		},
		slow: "object create ",
	},
	{
		chores: []string{
			"add",
			"add",
			"add",
			"create",
			"create",
			"restore",
			"restore",
			"restore",
			"restore again",
			"cancel",
			"cancel",
			"drop snapshot",
		},
		weak: copyName,
	},
	{
		chores: []string{"create", "pin", "pin", "renew", "renew", "renew", "unpin", "drop snapshot"},
		weak:   "txn put " + keys.AllPinsPrefix,
	},
	{chores: []string{"add", "create", "read", "read", "read", "restore"}, spoil: 0.1},
}

// begin asks for something.
func (w *work) begin() {
	w.left--
	list := chores
	if f := w.s.profile.focus; f != nil && w.s.chance(0.5) {
		list = f
	}
	chore := list[w.s.rng.IntN(len(list))]
	if w.activeCount() == 0 || w.activeCount() < 2 && w.s.chance(0.3) {
		chore = "new collection"
	}
	m, c := w.replica(), w.active()
	if slices.Contains([]string{"drop", "compact", "rebuild"}, chore) &&
		w.s.chance(0.5) { // under a create, if there is one
		for _, r := range w.creates {
			if busy := w.s.oracle.cols[r.spec.Collection.ID]; r.open > 0 && busy.state == catalog.Active && len(busy.live) > 0 {
				c = busy
			}
		}
	}
	if c == nil &&
		!slices.Contains([]string{"new collection", "list", "read", "sweep", "recover", "recover clock"}, chore) {
		return
	}
	switch chore {
	case "add",
		"drop",
		"compact",
		"rebuild",
		"update",
		"drop partition",
		"drop index",
		"drop collection",
		"new collection":
		w.write(chore, m, c)
	case "steal":
		w.steal(m, c)
	case "create", "shared name", "expiring create":
		r := &create{spec: manager.CreateSpec{Collection: catalog.Ref{ID: c.id}, Name: w.name("s")}, began: w.revision()}
		switch chore {
		case "shared name":
			r.spec.Name = fmt.Sprint("shared", w.s.rng.IntN(2))
		case "expiring create":
			r.spec.TTL = time.Duration(1+w.s.rng.IntN(300)) * time.Second
		}
		if w.s.chance(0.6) {
			r.tok = w.token("CreateSnapshot", w.name("t"))
		}
		w.creates = append(w.creates, r)
		w.create(m, r)
	case "create again":
		var list []*create
		for _, r := range w.creates {
			if r.tok.Value != "" {
				list = append(list, r)
			}
		}
		if len(list) > 0 {
			w.create(m, list[w.s.rng.IntN(len(list))])
		}
	case "drop snapshot":
		w.dropSnapshot(m)
	case "pin":
		w.pin(m)
	case "unpin":
		if len(w.pins) > 0 {
			i := w.s.rng.IntN(len(w.pins))
			p := w.pins[i]
			w.pins = slices.Delete(w.pins, i, i+1)
			w.call(m, fmt.Sprint("unpin ", p.ID), func(ctx context.Context) (string, func()) {
				return fmt.Sprint(m.Unpin(ctx, manager.Ref{ID: p.Snapshot}, p.ID)), nil
			})
		}
	case "renew":
		if len(w.pins) > 0 {
			p := w.pins[w.s.rng.IntN(len(w.pins))]
			for range 1 + w.s.rng.IntN(3) {
				w.renew(w.replica(), p, time.Duration(5+w.s.rng.IntN(120))*time.Second)
			}
		}
	case "reclaim":
		w.reclaim(m)
	case "confirm":
		w.confirm(m)
	case "restore":
		if id, ok := pick(w.s, w.standing()); ok && w.activeCount() < 6 {
			r := &restore{
				spec: manager.RestoreSpec{
					Snapshot:    manager.Ref{ID: id},
					DB:          "default",
					Name:        w.name("r"),
					SkipIndexes: w.s.chance(0.3),
				},
			}
			if w.s.chance(0.2) {
				r.spec.Timeout = time.Duration(1+w.s.rng.IntN(30)) * time.Second
			}
			if w.s.chance(0.6) {
				r.tok = w.token("RestoreSnapshot", w.name("t"))
			}
			w.restores = append(w.restores, r)
			w.restore(m, r)
		}
	case "restore again":
		var list []*restore
		for _, r := range w.restores {
			if r.tok.Value != "" {
				list = append(list, r)
			}
		}
		if len(list) > 0 {
			w.restore(m, list[w.s.rng.IntN(len(list))])
		}
	case "cancel":
		w.cancel(m)
	case "collect":
		o := collect.CycleOptions{DryRun: w.s.chance(0.1), Force: w.s.chance(0.3)}
		if w.s.chance(0.5) {
			o.Tolerance = new(time.Duration)
		}
		if w.s.chance(0.5) {
			o.Collection = catalog.Ref{ID: c.id}
		}
		w.call(m, "collect", func(ctx context.Context) (string, func()) {
			sum, err := m.Collect(ctx, o)
			return answer(err, "%d granted, %d held, %d waiting", sum.Granted, sum.Held, sum.Spilled), nil
		})
	case "sweep":
		w.call(m, "sweep", func(ctx context.Context) (string, func()) {
			sum, err := m.parts.Collector.Sweep(ctx, collect.SweepOptions{})
			return answer(err, "%d of %d deleted", sum.Deleted, sum.Objects), nil
		})
	case "list":
		w.list(m)
	case "read":
		w.read(m)
	case "compact history":
		w.s.note("compact history: %s", answer(w.s.kv.Compact(never, w.revision()), "ok"))
	case "recover":
		w.call(m, "recover", func(ctx context.Context) (string, func()) {
			was, _, _, err := m.Recover(ctx, false)
			return answer(err, "behind: %v", was), func() {
				if was {
					w.s.wrong("the metadata store is said to have gone back in time")
				}
			}
		})
	case "recover clock":
		w.call(m, "recover the clock", func(ctx context.Context) (string, func()) {
			was, _, err := m.RecoverClock(ctx)
			return answer(err, "stopped: %v", was), nil
		})
	default:
		w.s.wrong("no such chore: %s", chore)
	}
}

func (w *work) revision() int64 {
	_, _, revision, err := w.s.kv.Get(never, keys.Format)
	w.s.must(err)
	return revision
}

// id asks for an id.
func (w *work) id(ctx context.Context, m *member) (int64, error) {
	id, err := m.cat.NextID(ctx)
	if err == nil {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.ids = append(w.ids, id)
	}
	return id, err
}

// file writes a file, whose content is like no other's.
func (w *work) file(ctx context.Context, kind, path string) (segment.File, error) {
	f := segment.File{Kind: kind, Path: path, Entries: 1, Field: 100, LogID: 1}
	if kind != segment.KindIndex {
		f.MinTimestamp, f.MaxTimestamp = 1, 20
	}
	body := []byte("this is " + path)
	f.Size = int64(len(body))
	_, err := w.store.Put(ctx, keyOf(&f), body)
	return f, err
}

// shape is what a new segment is like.
type shape struct {
	partition, index       int64 // 0: none
	delta, shared, waiting bool
	layout                 int
}

func (w *work) shape(c *collection) shape {
	sh := shape{delta: w.s.chance(0.5), shared: w.s.chance(0.1), waiting: w.s.chance(0.5), layout: w.s.rng.IntN(2)}
	view, err := w.s.oracle.cat.At(never, c.id, 0)
	w.s.must(err)
	for _, p := range view.Partitions {
		if p.State == catalog.Active && w.s.chance(0.5) {
			sh.partition = p.ID
		}
	}
	for _, x := range view.Indexes {
		if x.State == catalog.Active && w.s.chance(0.6) {
			sh.index = x.ID
		}
	}
	return sh
}

func (w *work) segment(ctx context.Context, m *member, col int64, sh shape) (s segment.Segment, err error) {
	s = segment.Segment{
		Level:     1,
		State:     segment.Flushed,
		Rows:      1,
		DML:       segment.Position{Timestamp: 21},
		Partition: sh.partition,
	}
	if s.ID, err = w.id(ctx, m); err != nil {
		return s, err
	}
	if sh.waiting {
		s.EngineData = make([]byte, 500) // so that it is worthwhile to spill it
	}
	dir := fmt.Sprintf("%d/%d/%d/", col, s.Partition, s.ID)
	add := func(kind, path string) {
		if err != nil {
			return
		}
		var f segment.File
		if f, err = w.file(ctx, kind, path); err == nil {
			s.Files = append(s.Files, f)
		}
	}
	add(segment.KindInsert, dir+"insert/100/1")
	if sh.delta {
		add(segment.KindDelta, dir+"delta/0/1")
	}
	if sh.shared {
		add(segment.KindStats, fmt.Sprintf("%d/shared-%d", col, s.ID))
	}
	if sh.index != 0 && err == nil {
		var b segment.Build
		b, err = w.build(ctx, m, col, &s, sh)
		s.Builds = []segment.Build{b}
	}
	return s, err
}

func (w *work) build(
	ctx context.Context,
	m *member,
	col int64,
	s *segment.Segment,
	sh shape,
) (b segment.Build, err error) {
	b = segment.Build{Index: sh.index, Field: 100}
	if b.ID, err = w.id(ctx, m); err != nil {
		return b, err
	}
	path := fmt.Sprintf("%d/%d/%d/index/%d/f", col, s.Partition, s.ID, b.ID)
	if sh.layout == 1 {
		path = fmt.Sprintf("%d/index/%d/f", col, b.ID)
	}
	f, err := w.file(ctx, segment.KindIndex, path)
	b.Files = []segment.File{f}
	return b, err
}

// write is what an engine does to a collection. What came of it the oracle sees.
func (w *work) write(chore string, m *member, c *collection) {
	say := func(err error) (string, func()) { return answer(err, "done"), nil }
	if chore == "new collection" {
		if w.activeCount() < 4 {
			name := w.name("c")
			w.call(m, chore, func(ctx context.Context) (string, func()) { return say(w.newCollection(ctx, m, name)) })
		}
		return
	}
	ref := catalog.Ref{ID: c.id}
	sh := w.shape(c)
	id, ok := pick(w.s, c.live)
	old := c.live[id]
	other, _ := pick(w.s, c.live)
	var tok request.Token
	if w.s.chance(0.3) {
		tok = w.token("Change", w.name("t"))
	}
	fresh := w.name("n")
	change := func(ctx context.Context, swap catalog.SegmentChange) (string, func()) {
		_, err := m.cat.Change(ctx, tok, ref, swap)
		if err != nil && unknown(err) && tok.Value != "" {
			_, err = m.cat.Change(ctx, tok, ref, swap)
		}
		return say(err)
	}
	switch chore {
	case "add":
		w.call(m, fmt.Sprint("add to ", c.id), func(ctx context.Context) (string, func()) {
			s, err := w.segment(ctx, m, c.id, sh)
			if err == nil {
				_, _, err = m.cat.AddSegments(ctx, c.id, []segment.Segment{s})
			}
			return say(err)
		})
	case "drop":
		if ok {
			also := w.s.chance(0.6)
			w.call(m, fmt.Sprintf("drop segment %d, reclaim it: %v", id, also), func(ctx context.Context) (string, func()) {
				if _, err := m.cat.DropSegments(ctx, ref, []int64{id}); err != nil || !also {
					return say(err)
				}
				asks := []gc.Ask{{Segment: id}}
				answers, err := m.parts.GC.Reclaim(ctx, ref, asks, gc.BySnapshotd, "caller")
				return answer(err, "%v", states(answers)), func() { w.reclaimed(c, asks, answers) }
			})
		}
	case "compact":
		if ok {
			in := []int64{id}
			if other != id {
				in = append(in, other)
			}
			w.call(m, fmt.Sprint("compact ", in), func(ctx context.Context) (string, func()) {
				s, err := w.segment(ctx, m, c.id, sh)
				if err != nil {
					return say(err)
				}
				return change(ctx, catalog.SegmentChange{Drop: in, Add: []segment.Segment{s}})
			})
		}
	case "rebuild":
		if ok && sh.index != 0 {
			w.call(m, fmt.Sprint("rebuild the index of ", id), func(ctx context.Context) (string, func()) {
				b, err := w.build(ctx, m, c.id, &old, sh)
				if err != nil {
					return say(err)
				}
				return change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: id, AddBuilds: []segment.Build{b}}}})
			})
		}
	case "update":
		if ok && len(old.Files) > 0 {
			w.call(m, fmt.Sprint("replace files of ", id), func(ctx context.Context) (string, func()) {
				f, err := w.file(ctx, segment.KindInsert, fmt.Sprintf("%d/%d/%d/insert/100/%s", c.id, old.Partition, id, fresh))
				if err != nil {
					return say(err)
				}
				return change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
					Segment: id, AddFiles: []segment.File{f}, RemoveFiles: []catalog.FilePath{{Path: old.Files[0].Path}},
				}}})
			})
		}
	case "drop partition", "drop index":
		view, err := w.s.oracle.cat.At(never, c.id, 0)
		w.s.must(err)
		w.call(m, fmt.Sprint(chore, " of ", c.id), func(ctx context.Context) (string, func()) {
			var err error
			if chore == "drop partition" {
				for _, p := range view.Partitions {
					if p.State == catalog.Active && err == nil {
						_, err = m.cat.DropPartition(ctx, tok, ref, p.Name)
					}
				}
				if err == nil {
					_, err = m.cat.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{Name: fresh})
				}
				return say(err)
			}
			for _, x := range view.Indexes {
				if x.State == catalog.Active && err == nil {
					_, err = m.cat.DropIndex(ctx, tok, ref, x.Name)
				}
			}
			if err == nil {
				_, err = m.cat.CreateIndex(ctx, request.Token{}, ref, catalog.Index{Name: fresh, Field: 100})
			}
			return say(err)
		})
	case "drop collection":
		if w.s.profile.drop || w.s.chance(0.2) {
			w.call(m, fmt.Sprint("drop collection ", c.id), func(ctx context.Context) (string, func()) {
				_, err := m.cat.DropCollection(ctx, tok, ref, 0)
				return say(err)
			})
		}
	}
}

func (w *work) newCollection(ctx context.Context, m *member, name string) error {
	tok := w.token("CreateCollection", name)
	spec := catalog.Collection{
		DB:       "default",
		Name:     name,
		Channels: []string{"ch-0", "ch-1"},
		Roots:    []catalog.Root{{Store: "default", Prefix: "data/"}},
		Schema: catalog.Schema{
			Format: "test",
			Raw:    []byte{0},
			Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}},
		},
	}
	col, err := m.cat.CreateCollection(ctx, tok, spec)
	for range 3 {
		if err == nil || !unknown(err) || ctx.Err() != nil {
			break
		}
		col, err = m.cat.CreateCollection(ctx, tok, spec)
	}
	if err != nil {
		return err
	}
	ref := catalog.Ref{ID: col.ID}
	if _, err := m.cat.SetCheckpoints(ctx, ref, []catalog.Checkpoint{
		{Shard: 0, Position: segment.Position{Timestamp: 1000}}, {Shard: 1, Position: segment.Position{Timestamp: 1000}},
	}); err != nil {
		return err
	}
	if _, err := m.cat.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{Name: "p"}); err != nil {
		return err
	}
	_, err = m.cat.CreateIndex(ctx, request.Token{}, ref, catalog.Index{Name: "x", Field: 100})
	return err
}

func (w *work) create(m *member, r *create) {
	repeat := r.open > 0 || r.unknown || r.failed != "" || r.snapshot != 0
	if r.failed != "" {
		known, err := request.Find(never, w.s.kv, r.tok)
		w.s.must(err)
		if known == nil {
			r.failed = "" // it was not even begun, so it may be tried again
		}
	}
	r.open++
	began := w.revision()
	w.call(
		m,
		fmt.Sprintf("create snapshot %s of %v, again: %v", r.spec.Name, r.spec.Collection, repeat),
		func(ctx context.Context) (string, func()) {
			s, err := m.Create(ctx, r.tok, r.spec)
			return answer(
				err,
				"%v",
				s,
			), func() { w.created(r, s, err, began, repeat) } //nolint:contextcheck // judged when the call is over
		},
	)
}

// created judges the answer to a create.
func (w *work) created(r *create, s *snapshot.Record, err error, began int64, repeat bool) {
	r.open--
	switch {
	case err == nil:
		known := w.s.oracle.snapshots[s.ID]
		switch {
		case known == nil:
			w.s.wrong("the create of snapshot %v was acknowledged, and it was never committed", s)
		case known.name != r.spec.Name || s.State != snapshot.Committed:
			w.s.wrong("the create of %s was answered with %+v", r.spec.Name, s)
		case r.snapshot != 0 && r.snapshot != s.ID:
			w.s.wrong("the create of %s was answered with %d, and now with %d", r.spec.Name, r.snapshot, s.ID)
		case r.failed != "":
			w.s.wrong("the create of %s failed, and now it is acknowledged; it was: %s", r.spec.Name, r.failed)
		case !repeat && known.revision < began:
			w.s.wrong("snapshot %s was asked for at %d and captured at %d", r.spec.Name, began, known.revision)
		}
		r.snapshot = s.ID
		if repeat {
			w.s.reached.repeated++
		}
	case unknown(err):
		r.unknown = true
	case r.open > 0 && !w.decided(r): // it did not even begin, and the repeat may
	case errors.Is(err, manager.ErrCreateAborted), !r.unknown && r.open == 0:
		if r.snapshot != 0 {
			w.s.wrong("the create of %s was acknowledged, and now it failed: %v", r.spec.Name, err)
		}
		r.failed = err.Error()
		w.checkFailed(r.spec.Name)
	}
}

// decided says whether the token of a request knows how it has ended.
func (w *work) decided(r *create) bool {
	known, err := request.Find(never, w.s.kv, r.tok)
	w.s.must(err)
	return known != nil && known.Done
}

// checkFailed holds that a name of which all creates failed is not that of a
// snapshot.
func (w *work) checkFailed(name string) {
	why := ""
	for _, r := range w.creates {
		if r.spec.Name != name {
			continue
		}
		if r.failed == "" {
			return
		}
		why = r.failed
	}
	for _, s := range w.s.oracle.snapshots {
		if s.name == name && why != "" {
			w.s.wrong("snapshot %s (%d) is committed, and its create was said to have failed: %s", name, s.id, why)
		}
	}
}

func (w *work) dropSnapshot(m *member) {
	id, ok := pick(w.s, w.standing())
	if !ok {
		return
	}
	s := w.s.oracle.snapshots[id]
	s.dropping = true
	var tok request.Token
	if w.s.chance(0.4) {
		tok = w.token("DropSnapshot", w.name("t"))
	}
	w.call(m, fmt.Sprint("drop snapshot ", s.name), func(ctx context.Context) (string, func()) {
		_, err := m.Drop(ctx, tok, manager.Ref{ID: id}, 0)
		if err != nil && unknown(err) && tok.Value != "" {
			_, err = m.Drop(ctx, tok, manager.Ref{ID: id}, 0)
		}
		return answer(err, "dropped"), func() {
			if err == nil && !s.dropped {
				w.s.wrong("the drop of snapshot %s was acknowledged, and it is there", s.name)
			}
		}
	})
}

func (w *work) pin(m *member) {
	id, ok := pick(w.s, w.standing())
	if !ok {
		return
	}
	spec := manager.PinSpec{Owner: "o"}
	if w.s.chance(0.7) {
		spec.TTL = time.Duration(5+w.s.rng.IntN(120)) * time.Second
	}
	var tok request.Token
	if w.s.chance(0.5) {
		tok = w.token("Pin", w.name("t"))
	}
	w.call(m, fmt.Sprint("pin snapshot ", id), func(ctx context.Context) (string, func()) {
		p, err := m.Pin(ctx, tok, manager.Ref{ID: id}, spec)
		return answer(err, "pinned"), func() {
			if err == nil {
				w.pins = append(w.pins, p)
				w.lasts(p)
			}
		}
	})
}

func (w *work) renew(m *member, p *manager.Pin, ttl time.Duration) {
	w.call(
		m,
		fmt.Sprintf("renew pin %d of snapshot %d for %v", p.ID, p.Snapshot, ttl),
		func(ctx context.Context) (string, func()) {
			next, err := m.RenewPin(ctx, manager.Ref{ID: p.Snapshot}, p.ID, ttl)
			return answer(err, "renewed"), func() {
				if err == nil {
					w.s.reached.renewed++
					w.lasts(next)
				}
			}
		},
	)
}

// lasts holds that a pin was written as it was answered.
func (w *work) lasts(p *manager.Pin) {
	known := w.s.oracle.pins[keys.Pin(p.Snapshot, p.ID)]
	if known == nil {
		w.s.wrong("pin %d of snapshot %d was acknowledged, and there never was one", p.ID, p.Snapshot)
	}
	if expires, ok := known.expires[p.Revision]; !ok || expires != record.Nanos(p.ExpireTime) {
		w.s.wrong(
			"pin %d is said to end at %v since revision %d, and was written: %v",
			p.ID,
			p.ExpireTime,
			p.Revision,
			known.expires,
		)
	}
}

func (w *work) reclaim(m *member) {
	o := w.s.oracle
	id, ok := pick(w.s, o.cols)
	if !ok {
		return
	}
	c := o.cols[id]
	var asks []gc.Ask
	for _, unit := range slices.Sorted(maps.Keys(c.units)) {
		if u := c.units[unit]; u.Kind == catalog.UnitBuild {
			asks = append(asks, gc.Ask{Build: unit})
		} else {
			asks = append(asks, gc.Ask{Segment: unit})
		}
	}
	if live, ok := pick(w.s, c.live); ok {
		asks = append(asks, gc.Ask{Segment: live})
	}
	if len(asks) == 0 {
		return
	}
	deleter := gc.Deleter(1 + w.s.rng.IntN(2))
	w.call(
		m,
		fmt.Sprintf("reclaim %d units of %d by %d", len(asks), id, deleter),
		func(ctx context.Context) (string, func()) {
			answers, err := m.parts.GC.Reclaim(ctx, catalog.Ref{ID: id}, asks, deleter, "caller")
			return answer(err, "%v", states(answers)), func() { w.reclaimed(c, asks, answers) }
		},
	)
}

func states(answers []gc.Answer) []gc.State {
	list := make([]gc.State, len(answers))
	for i := range answers {
		list[i] = answers[i].State
	}
	return list
}

// reclaimed judges the answers to a reclaim.
func (w *work) reclaimed(c *collection, asks []gc.Ask, answers []gc.Answer) {
	for i := range answers {
		w.reclaimedOne(c, max(asks[i].Segment, asks[i].Build), &answers[i])
	}
}

func (w *work) reclaimedOne(c *collection, id int64, a *gc.Answer) {
	switch a.State {
	case gc.Granted:
		if g := c.tombs[a.Tombstone.ID]; g == nil || g.t.Revision != a.Tombstone.Revision ||
			g.t.Deleter != a.Tombstone.Deleter {
			w.s.wrong("unit %d is said to be granted as %+v, and the tombstone is %+v", id, a.Tombstone, g)
		}
	case gc.Dropped:
		if a.Holders == 0 {
			w.s.wrong("unit %d is not held, and not granted", id)
		}
		w.s.reached.heldBySnapshot += min(1, len(a.Snapshots))
		w.s.reached.heldByCreate += min(1, len(a.Creating))
	case gc.Unknown, gc.Live:
	}
}

// confirm is a caller that deletes the granted files and confirms it, or dies before.
func (w *work) confirm(m *member) {
	o := w.s.oracle
	for _, id := range slices.Sorted(maps.Keys(o.cols)) {
		c := o.cols[id]
		var list []int64
		var files []string
		for _, unit := range slices.Sorted(maps.Keys(c.tombs)) {
			if g := c.tombs[unit]; g.t.Deleter == gc.ByCaller && !g.gone {
				list = append(list, unit)
				files = append(files, g.files...)
			}
		}
		if len(list) == 0 {
			continue
		}
		dies := !w.s.calmed && w.s.chance(0.2)
		for _, unit := range list {
			c.tombs[unit].asked = c.tombs[unit].asked || !dies
		}
		w.call(
			m,
			fmt.Sprintf("delete %d files and confirm %v", len(files), list),
			func(ctx context.Context) (string, func()) {
				if err := w.store.Delete(ctx, files...); err != nil || dies {
					return answer(err, "dead"), nil
				}
				_, err := m.parts.GC.Confirm(ctx, catalog.Ref{ID: id}, list)
				return answer(err, "confirmed"), nil
			},
		)
	}
}

func (w *work) restore(m *member, r *restore) {
	w.call(m, fmt.Sprint("restore ", r.spec.Snapshot, " to ", r.spec.Name), func(ctx context.Context) (string, func()) {
		job, err := m.Restore(ctx, r.tok, &r.spec)
		if err != nil {
			return err.Error(), nil
		}
		return fmt.Sprint("job ", job.ID), func() {
			switch {
			case w.s.oracle.jobs[job.ID] == nil:
				w.s.wrong("job %d is acknowledged, and there never was one", job.ID)
			case r.job != 0 && r.job != job.ID:
				w.s.wrong("the restore to %s was answered with job %d, and now with %d", r.spec.Name, r.job, job.ID)
			case r.job != 0:
				w.s.reached.repeated++
			}
			r.job = job.ID
		}
	})
}

func (w *work) cancel(m *member) {
	open := map[int64]bool{}
	for id, job := range w.s.oracle.jobs {
		if !job.State.Ended() {
			open[id] = true
		}
	}
	if id, ok := pick(w.s, open); ok {
		w.call(m, fmt.Sprint("cancel job ", id), func(ctx context.Context) (string, func()) {
			_, err := m.parts.Jobs.Cancel(ctx, id)
			return answer(err, "canceled"), func() {
				if job := w.s.oracle.jobs[id]; err == nil &&
					(job.State == copyjob.Completed || job.Phase != copyjob.RollBack && !job.State.Ended()) {
					w.s.wrong("job %d is said to be canceled, and is %v in phase %v", id, job.State, job.Phase)
				}
			}
		})
	}
}

// list holds that a list shows all that was committed before, and nothing that
// was dropped before.
func (w *work) list(m *member) {
	before := w.standing()
	gone := map[int64]bool{}
	for id, s := range w.s.oracle.snapshots {
		if s.dropped {
			gone[id] = true
		}
	}
	w.call(m, "list", func(ctx context.Context) (string, func()) {
		got, _, err := m.List(ctx, manager.Filter{}, manager.Place{}, 10_000)
		return answer(err, "%d snapshots", len(got)), func() {
			if err != nil {
				return
			}
			w.s.reached.listed++
			there := map[int64]bool{}
			for _, s := range got {
				there[s.ID] = true
				if gone[s.ID] {
					w.s.wrong("a list shows snapshot %v, which was dropped before", s)
				}
			}
			for id, s := range before {
				if !there[id] && !s.dropped {
					w.s.wrong("a list does not show snapshot %s (%d), which was committed before", s.name, id)
				}
			}
		}
	})
}

// read holds that a snapshot can be read until it is dropped.
func (w *work) read(m *member) {
	id, ok := pick(w.s, w.standing())
	if !ok {
		return
	}
	s := w.s.oracle.snapshots[id]
	w.call(m, fmt.Sprint("read snapshot ", s.name), func(ctx context.Context) (string, func()) {
		n, files := 0, map[string]bool{}
		d, err := m.Describe(ctx, manager.Ref{ID: id})
		if err == nil {
			err = m.Segments(ctx, manager.Ref{ID: id}, 0, func(seg *snapshot.Segment) bool {
				n++
				for f := range seg.AllFiles() {
					files[keyOf(f)] = true
				}
				return true
			})
		}
		return answer(err, "%d segments", n), func() {
			switch {
			case err == nil && (n != s.segments || !maps.Equal(files, s.files)):
				w.s.wrong(
					"snapshot %s is read with %d segments and the files %v, and has %d and %v",
					s.name,
					n,
					files,
					s.segments,
					s.files,
				)
			case err == nil && gocmp.Diff(s.metadata, d.Metadata) != "":
				w.s.wrong(
					"snapshot %s is described with other metadata than it has: %s",
					s.name,
					gocmp.Diff(s.metadata, d.Metadata),
				)
			case err == nil:
				w.s.reached.read++
			case errors.Is(err, snapshot.ErrCorrupt) && m.misread > 0:
			case !unknown(err) && !s.dropped:
				w.s.wrong("snapshot %s cannot be read: %v", s.name, err)
			}
		}
	})
}
