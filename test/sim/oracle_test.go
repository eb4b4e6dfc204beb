package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// reach counts what runs have exercised.
type reach struct {
	committed, reaped, dropped, expired, pinned                 int
	granted, spilled, unitsGone, restored, rolledBack, colsGone int
	before, after, late, crashed, frozen                        int
	repeated, heldBySnapshot, heldByCreate, swept, listed, read int
	spoiled, rotten, jumped, uploads, foreign, renewed          int
}

func (r *reach) counts() map[string]int {
	return map[string]int{
		"commit":                    r.committed,
		"create given up":           r.reaped,
		"snapshot dropped":          r.dropped,
		"snapshot expired":          r.expired,
		"pin":                       r.pinned,
		"grant":                     r.granted,
		"unit spilled":              r.spilled,
		"unit gone for good":        r.unitsGone,
		"restore":                   r.restored,
		"restore rolled back":       r.rolledBack,
		"collection gone for good":  r.colsGone,
		"call that failed before":   r.before,
		"call that failed after":    r.after,
		"call that landed late":     r.late,
		"crash":                     r.crashed,
		"freeze":                    r.frozen,
		"repeat that was answered":  r.repeated,
		"hold by a snapshot":        r.heldBySnapshot,
		"hold by a create":          r.heldByCreate,
		"object swept":              r.swept,
		"list":                      r.listed,
		"snapshot read":             r.read,
		"read that was spoiled":     r.spoiled,
		"object that was rotten":    r.rotten,
		"clock that jumped":         r.jumped,
		"upload left open":          r.uploads,
		"foreign object in the way": r.foreign,
		"pin renewed":               r.renewed,
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

// oracle records the present and past state of the stores, from the stores alone. Only
// the scheduler's goroutine uses it, except for what mu guards.
type oracle struct {
	s      *sim
	cat    *catalog.Catalog // without faults
	reader *manager.Manager // likewise, and not run

	mu     sync.Mutex
	events []meta.Event
	log    []meta.Event // all that there were

	content   map[string][]byte // what each object ever held
	engine    map[string]bool   // keys of files that engines wrote
	used      map[string]bool   // of those, that were part of a segment once
	shared    map[string]bool   // of those, that no unit owns
	ids       map[int64]string  // what each id stands for
	cols      map[int64]*collection
	snapshots map[int64]*expectedSnapshot
	jobs      map[int64]*copyjob.Job
	pins      map[string]*pinned
	granted   map[string]bool // keys of the files of all tombstones that there ever were

	states     map[int64]*storagev1.Snapshot // each snapshot's record as it was seen last
	recordGone map[int64]time.Time           // when each snapshot's record went
	tasks      map[string]*storagev1.Task
	wrote      map[string]*member   // who last wrote each snapshot's record
	rot        map[string]rot       // objects that are read with another content
	hidden     map[string]bool      // objects that a list has left out
	foreign    map[string]bool      // foreign objects
	uploads    map[string]time.Time // that are open, by the keys that they are to

	past *past // nil: the metadata store never went back in time
}

// pinned is the oracle's record of a pin.
type pinned struct {
	job     int64
	expires map[int64]int64 // by the revisions at which it was written
	gone    bool
}

// collection is the oracle's record of a collection.
type collection struct {
	id      int64
	name    string
	state   catalog.State
	live    map[int64]segment.Segment
	active  map[int64]bool // partitions and indexes by id, those that are not dropped
	history []version
	units   map[int64]catalog.Unit // not granted
	spilled map[int64]bool
	tombs   map[int64]*tomb
}

// version is the content of a collection from a revision on.
type version struct {
	revision int64
	segments map[int64]segment.Segment
	active   map[int64]bool
}

type tomb struct {
	t     *gc.Tombstone
	files []string
	asked bool // a caller was about to confirm it
	gone  bool
}

// expectedSnapshot is a committed snapshot.
type expectedSnapshot struct {
	id, collection int64
	name           string
	revision       int64 // at which it captured
	segments       int
	files          map[string]bool
	metadata       *manifest.Metadata
	dropping       bool // a drop was requested
	dropped        bool // its record says DELETING, or is gone
	expires        time.Time
}

func newOracle(s *sim) *oracle {
	o := &oracle{
		s:          s,
		content:    map[string][]byte{},
		engine:     map[string]bool{},
		used:       map[string]bool{},
		shared:     map[string]bool{},
		ids:        map[int64]string{},
		cols:       map[int64]*collection{},
		snapshots:  map[int64]*expectedSnapshot{},
		jobs:       map[int64]*copyjob.Job{},
		pins:       map[string]*pinned{},
		granted:    map[string]bool{},
		states:     map[int64]*storagev1.Snapshot{},
		recordGone: map[int64]time.Time{},
		tasks:      map[string]*storagev1.Task{},
		wrote:      map[string]*member{},
		rot:        map[string]rot{},
		hidden:     map[string]bool{},
		foreign:    map[string]bool{},
		uploads:    map[string]time.Time{},
	}
	stores := map[string]object.Store{"default": s.objects}
	random := newSeeded(s.seed, "oracle")
	o.cat = catalog.New(
		catalog.Options{
			KV:          s.kv,
			Now:         time.Now,
			Rand:        random,
			HasStore:    func(string) bool { return true },
			ReadSpilled: catalog.ReadSpilled(stores),
		},
	)
	mo := s.options(false)
	mo.KV, mo.Catalog, mo.Stores, mo.Rand = s.kv, o.cat, stores, random
	r, err := replica.New(mo)
	s.must(err)
	o.reader = s.manager(r, 0)
	return o
}

// ledger is the object store with the oracle beside it.
type ledger struct {
	object.Store
	o *oracle
	m *member
}

// keep records the content of a key, which must never change. After a rollback of the
// metadata store a unit may be dropped once more, with another record.
func (l ledger) keep(key string, body []byte) {
	was, there := l.o.content[key]
	again := l.o.past != nil && strings.HasPrefix(key, catalog.SpillPrefix)
	if there && !bytes.Equal(was, body) && !again {
		l.o.s.wrong(
			"%s is written by %v and holds another content than before: %d and %d bytes",
			key,
			l.m,
			len(body),
			len(was),
		)
	}
	l.o.content[key] = bytes.Clone(body)
	if l.m.engine {
		l.o.engine[key] = true
	}
}

func (l ledger) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	info, err := l.Store.Put(ctx, key, body)
	if err == nil {
		l.keep(key, body)
	}
	return info, err
}

func (l ledger) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	info, err := l.Store.Create(ctx, key, body)
	if err == nil {
		l.keep(key, body)
		l.m.read(key)
	}
	return info, err
}

func (l ledger) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	info, err := l.Store.Copy(ctx, r)
	if err == nil {
		l.keep(r.To, l.o.content[r.From])
		delete(l.o.uploads, r.To)
	}
	return info, err
}

func (l ledger) AbortUploads(_ context.Context, prefix string, before time.Time) (n int, _ error) {
	maps.DeleteFunc(l.o.uploads, func(key string, began time.Time) bool {
		if !strings.HasPrefix(key, prefix) || !before.IsZero() && !began.Before(before) {
			return false
		}
		n++
		return true
	})
	return n, nil
}

func (l ledger) OldestUpload(_ context.Context, prefix string) (oldest time.Time, _ error) {
	for key, began := range l.o.uploads {
		if strings.HasPrefix(key, prefix) && (oldest.IsZero() || began.Before(oldest)) {
			oldest = began
		}
	}
	return oldest, nil
}

func (l ledger) Delete(ctx context.Context, list ...string) error {
	if p := l.o.past; p != nil {
		p.judge(ctx, l.m, list)
		return l.Store.Delete(ctx, list...)
	}
	needed := l.o.needed()
	for _, key := range list {
		if why := l.o.judge(ctx, needed, key); why != "" {
			l.o.s.wrong("%v deletes %s: %s", l.m, key, why)
		}
	}
	return l.Store.Delete(ctx, list...)
}

func keyOf(f *segment.File) string { return "data/" + f.Path }

// needed returns the owners of each file that is needed now.
func (o *oracle) needed() map[string]string {
	needed := map[string]string{}
	add := func(s *segment.Segment, who string) {
		for f := range s.AllFiles() {
			needed[keyOf(f)] = who
		}
	}
	for _, s := range o.snapshots {
		if !s.dropped {
			for key := range s.files {
				needed[key] = "snapshot " + s.name + " has it"
			}
		}
	}
	for _, c := range o.cols {
		if job := o.jobOf(c.id); job == nil || job.Phase != copyjob.RollBack {
			for id, s := range c.live {
				add(&s, fmt.Sprint("segment ", id, " has it"))
			}
		}
		for id, u := range c.units {
			add(&u.Segment, fmt.Sprint("unit ", id, " has it and is not granted"))
		}
		for id := range c.spilled {
			needed[catalog.SpillKey(c.id, id)] = fmt.Sprint("unit ", id, " is spilled there")
		}
	}
	return needed
}

func (o *oracle) jobOf(target int64) *copyjob.Job {
	for _, job := range o.jobs {
		if job.Target == target {
			return job
		}
	}
	return nil
}

// judge returns why an object must not be deleted now; empty: it may.
func (o *oracle) judge(ctx context.Context, needed map[string]string, key string) string {
	path, data := strings.CutPrefix(key, "data/")
	switch {
	case needed[key] != "":
		return needed[key]
	case data && o.granted[key]:
		return ""
	case data:
		id, _, _, _ := segment.NativePlace(path)
		if job := o.jobOf(id); job != nil && (job.State.Ended() || job.Phase == copyjob.RollBack) {
			return ""
		}
		return "it was never granted, and is not of a restore that is given up or has ended"
	case strings.HasPrefix(key, catalog.SpillPrefix), strings.HasPrefix(key, epoch.Prefix):
		return ""
	case strings.HasPrefix(key, catalog.RestorePrefix):
		for _, job := range o.jobs {
			if strings.HasPrefix(key, catalog.RestoreDir(job.ID)) && !job.State.Ended() && job.Phase != copyjob.RollBack {
				return fmt.Sprint("job ", job.ID, " copies by it")
			}
		}
		return ""
	}
	_, id, ok := manifest.ParseKey(key)
	if !ok {
		return "it is foreign"
	}
	kv, found, _, err := o.s.kv.Get(ctx, keys.Snapshot(id))
	o.s.must(err)
	if !found {
		if !o.snapshotIs(id) {
			o.s.reached.swept++
		}
		return ""
	}
	if rec := o.decode(kv); snapshot.State(rec.GetState()) != snapshot.Deleting {
		return fmt.Sprintf("snapshot %d is %v", id, snapshot.State(rec.GetState()))
	}
	return ""
}

func (o *oracle) snapshotIs(id int64) bool { return o.snapshots[id] != nil }

func (o *oracle) decode(kv meta.KeyValue) *storagev1.Snapshot {
	rec := &storagev1.Snapshot{}
	o.s.must(record.Decode(kv, rec))
	return rec
}

// watch records all changes.
func (o *oracle) watch(ctx context.Context) {
	from, to := keys.All()
	w := o.s.kv.Watch(ctx, from, to, 0)
	for {
		b, err := w.Next()
		if err != nil {
			return
		}
		o.mu.Lock()
		o.events = append(o.events, b.Events...)
		o.mu.Unlock()
	}
}

// observe judges the changes since the last time, and the answers.
func (o *oracle) observe() {
	o.mu.Lock()
	events := o.events
	o.log = append(o.log, events...)
	o.events = nil
	o.mu.Unlock()
	for _, id := range o.s.work.handed() {
		if what, taken := o.ids[id]; taken {
			o.s.wrong("id %d is handed out, and stands for %s", id, what)
		}
		o.ids[id] = ofEngine
	}
	for len(events) > 0 { // revision by revision
		n := 1
		for n < len(events) && events[n].KV.ModRevision == events[0].KV.ModRevision {
			n++
		}
		o.sawRevision(events[:n])
		events = events[n:]
	}
	o.s.work.judge()
}

func (o *oracle) collection(id int64) *collection {
	c := o.cols[id]
	if c == nil {
		c = &collection{
			id:      id,
			live:    map[int64]segment.Segment{},
			units:   map[int64]catalog.Unit{},
			spilled: map[int64]bool{},
			tombs:   map[int64]*tomb{},
			active:  map[int64]bool{0: true},
			history: []version{{0, nil, nil}},
		}
		o.cols[id] = c
	}
	return c
}

// ofEngine is the use of ids that engines allocated.
const ofEngine = "what an engine makes"

// takeID checks that an id has one use.
func (o *oracle) takeID(id int64, what string) {
	if was, taken := o.ids[id]; taken && was != what {
		o.s.wrong("id %d is handed out twice: for %s and %s", id, was, what)
	}
	o.ids[id] = what
}

func (o *oracle) sawRevision(events []meta.Event) {
	changed := map[int64]bool{} // collections whose segments have changed
	revision := events[0].KV.ModRevision
	for pass := range 3 { // first what was granted, then segments, then what depends on them
		for _, e := range events {
			first := strings.HasPrefix(e.KV.Key, keys.AllTombstonesPrefix)
			second := strings.HasPrefix(e.KV.Key, "/catalog/")
			switch {
			case first && pass == 0 && !e.Deleted:
				o.sawGrant(e)
			case first && pass == 2 && e.Deleted:
				o.sawConfirmed(e)
			case second && pass == 1:
				o.sawCatalog(e, changed)
			case pass == 2:
				o.sawRest(e)
			}
		}
		if pass == 1 {
			for id := range changed {
				c := o.cols[id]
				c.history = append(c.history, version{revision, maps.Clone(c.live), maps.Clone(c.active)})
			}
		}
	}
	o.together(events)
}

func (o *oracle) sawCatalog(e meta.Event, changed map[int64]bool) {
	key := e.KV.Key
	ids := func() (collection, id int64) {
		collection, id, err := keys.LastTwo(key)
		o.s.must(err)
		return collection, id
	}
	switch {
	case strings.HasPrefix(key, "/catalog/segment/"):
		collection, id := ids()
		c := o.collection(collection)
		changed[collection] = true
		if e.Deleted {
			delete(c.live, id)
			return
		}
		seg, err := catalog.DecodeSegment(collection, e.KV)
		o.s.must(err)
		if e.KV.CreateRevision == e.KV.ModRevision && (o.ids[id] != ofEngine || c.state != catalog.Active) {
			o.takeID(id, fmt.Sprint("a segment of ", collection))
		}
		c.live[id] = seg
		for _, key := range sharedFiles(collection, &seg) {
			o.shared[key] = true
		}
		for f := range seg.AllFiles() {
			o.used[keyOf(f)] = true
			o.whole(keyOf(f), "segment %d has it", id)
			if o.granted[keyOf(f)] {
				o.s.wrong("segment %d has %s, which was granted", id, keyOf(f))
			}
		}
	case strings.HasPrefix(key, keys.AllUnitsPrefix):
		collection, id := ids()
		c := o.collection(collection)
		if e.Deleted {
			if c.tombs[id] == nil {
				o.s.wrong("unit %d is gone without a grant", id)
			}
			delete(c.units, id)
			delete(c.spilled, id)
			return
		}
		if c.tombs[id] != nil {
			o.s.wrong("unit %d is back after its grant", id)
		}
		u, err := catalog.DecodeUnit(collection, e.KV)
		if errors.Is(err, catalog.ErrSpilled) {
			o.s.reached.spilled++
			c.spilled[id] = true
			o.whole(catalog.SpillKey(collection, id), "unit %d is spilled there", id)
			return
		}
		o.s.must(err)
		c.units[id] = u
	case strings.HasPrefix(key, keys.AllPartitionsPrefix), strings.HasPrefix(key, keys.AllIndexesPrefix):
		collection, id := ids()
		c := o.collection(collection)
		changed[collection] = true
		if e.Deleted {
			delete(c.active, id)
			return
		}
		var state uint32
		if strings.HasPrefix(key, keys.AllPartitionsPrefix) {
			rec := &storagev1.Partition{}
			o.s.must(record.Decode(e.KV, rec))
			state = rec.GetState()
		} else {
			rec := &storagev1.Index{}
			o.s.must(record.Decode(e.KV, rec))
			state = rec.GetState()
		}
		if e.KV.CreateRevision == e.KV.ModRevision {
			o.takeID(id, key)
		}
		c.active[id] = state == 1
	case strings.HasPrefix(key, keys.CollectionPrefix):
		id, err := keys.LastID(key)
		o.s.must(err)
		c := o.collection(id)
		if e.Deleted {
			if n := len(c.live) + len(c.units); n > 0 {
				o.s.wrong("collection %d is gone, and has %d segments and units", id, n)
			}
			if c.state == catalog.Dropping {
				o.s.reached.colsGone++
			} else if job := o.jobOf(id); job == nil {
				o.s.wrong("collection %d is gone, and was not dropped", id)
			}
			c.state = 0
			return
		}
		col, err := catalog.DecodeCollection(e.KV)
		o.s.must(err)
		if e.KV.CreateRevision == e.KV.ModRevision {
			o.takeID(id, "collection "+col.Name)
		}
		c.state, c.name = col.State, col.Name
	}
}

func (o *oracle) sawRest(e meta.Event) {
	switch key := e.KV.Key; {
	case key == keys.RolledBack && !e.Deleted && o.past == nil:
		o.s.wrong("the metadata store is noted to be behind, and never went back: %q", e.KV.Value)
	case strings.HasPrefix(key, keys.SnapshotPrefix):
		o.sawSnapshot(e)
	case strings.HasPrefix(key, keys.JobPrefix):
		o.sawJob(e)
	case strings.HasPrefix(key, keys.AllPinsPrefix):
		o.sawPin(e)
	case strings.HasPrefix(key, keys.AllTasksPrefix):
		o.sawTask(e)
	}
}

// whole checks that an object exists with its content.
func (o *oracle) whole(key, why string, args ...any) {
	got, err := o.bytes(key)
	if want, known := o.content[key]; err != nil || !known || !bytes.Equal(got, want) {
		o.s.wrong("%s is not there or not what it was, and "+why+": err = %v", append(append([]any{key}, args...), err)...)
	}
}

func (o *oracle) bytes(key string) ([]byte, error) {
	r, _, err := o.s.objects.Get(never, key, 0, -1)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func (o *oracle) sawSnapshot(e meta.Event) {
	id, err := keys.LastID(e.KV.Key)
	o.s.must(err)
	s := o.snapshots[id]
	if e.Deleted {
		o.moved(id, nil, 0)
		o.recordGone[id] = time.Now()
		return
	}
	rec := o.decode(e.KV)
	o.moved(id, rec, e.KV.ModRevision)
	state := snapshot.State(rec.GetState())
	switch {
	case e.KV.CreateRevision == e.KV.ModRevision:
		o.takeID(id, "snapshot "+rec.GetName())
	case state == snapshot.Deleting && s == nil:
		o.s.reached.reaped++
	case state == snapshot.Deleting && !s.dropped:
		o.sawDrop(s)
	case state == snapshot.Committed && s == nil:
		o.s.reached.committed++
		o.sawCommit(e.KV, rec, id)
	case state == snapshot.Committed && s.dropped:
		o.s.wrong("snapshot %d is back", id)
	case state == snapshot.Committed:
		s.expires = record.Time(rec.GetExpireTime())
	}
}

func (o *oracle) sawDrop(s *expectedSnapshot) {
	s.dropped = true
	expired := !s.expires.IsZero() && o.due(s)
	switch {
	case s.dropping:
		o.s.reached.dropped++
	case expired:
		o.s.reached.expired++
	default:
		o.s.wrong("snapshot %s is dropped without a request, and it does not expire before %v", s.name, s.expires)
	}
	for key, p := range o.pins {
		if !p.gone && strings.HasPrefix(key, keys.PinPrefix(s.id)) {
			o.s.wrong("snapshot %s is dropped, and pinned by %s", s.name, key)
		}
	}
	for _, job := range o.jobs {
		if job.Snapshot == s.id && !job.State.Ended() {
			o.s.wrong("snapshot %s is dropped, and job %d restores it", s.name, job.ID)
		}
	}
}

// sawCommit judges a commit: the capture is correct, and its files exist.
func (o *oracle) sawCommit(kv meta.KeyValue, rec *storagev1.Snapshot, id int64) {
	s := &expectedSnapshot{
		id:         id,
		collection: rec.GetCollectionId(),
		name:       rec.GetName(),
		revision:   rec.GetCatalogRevision(),
		files:      map[string]bool{},
		expires:    record.Time(rec.GetExpireTime()),
	}
	o.snapshots[id] = s
	if s.revision < kv.CreateRevision {
		o.s.wrong("snapshot %s captured at %d and began at %d", s.name, s.revision, kv.CreateRevision)
	}
	for _, other := range o.snapshots {
		if other != s && !other.dropped && other.name == s.name {
			o.s.wrong("snapshots %d and %d have the name %s", id, other.id, s.name)
		}
	}
	want := o.captured(s.collection, s.revision)
	got := map[int64]map[string]bool{}
	err := o.reader.Segments(never, manager.Ref{ID: id}, 0, func(seg *snapshot.Segment) bool {
		s.segments++
		got[seg.ID] = map[string]bool{}
		for f := range seg.AllFiles() {
			s.files[keyOf(f)] = true
			got[seg.ID][keyOf(f)] = true
		}
		return true
	})
	if err != nil {
		o.s.wrong("snapshot %s is committed and cannot be read: %v", s.name, err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		o.s.wrong("snapshot %s captured at %d what was not so: %s", s.name, s.revision, diff)
	}
	for key := range s.files {
		o.whole(key, "snapshot %s (%d) is committed with it", s.name, id)
		if o.granted[key] {
			o.s.wrong("snapshot %s has %s, which was granted before it was committed", s.name, key)
		}
	}
	o.own(s)
	o.s.work.checkFailed(s.name)
}

// captured returns the files of each segment that a capture at a revision must see.
func (o *oracle) captured(id, revision int64) map[int64]map[string]bool {
	var v version
	for _, v = range slices.Backward(o.collection(id).history) {
		if v.revision <= revision {
			break
		}
	}
	want := map[int64]map[string]bool{}
	for _, s := range v.segments {
		if !v.active[s.Partition] {
			continue
		}
		want[s.ID] = map[string]bool{}
		for i := range s.Files {
			want[s.ID][keyOf(&s.Files[i])] = true
		}
		for _, b := range s.Builds {
			for i := range b.Files {
				if v.active[b.Index] {
					want[s.ID][keyOf(&b.Files[i])] = true
				}
			}
		}
	}
	return want
}

// own checks that a snapshot's own objects are whole.
func (o *oracle) own(s *expectedSnapshot) {
	d, err := o.reader.Describe(never, manager.Ref{ID: s.id})
	if err != nil {
		o.s.wrong("snapshot %s is committed and cannot be described: %v", s.name, err)
	}
	if s.metadata == nil {
		s.metadata = d.Metadata
	}
	if diff := cmp.Diff(s.metadata, d.Metadata); diff != "" {
		o.s.wrong("snapshot %s has other metadata than before: %s", s.name, diff)
	}
	key := manifest.RefsKey(s.collection, s.id)
	data, err := o.bytes(key)
	if err == nil {
		_, err = manifest.DecodeRefs(data, d.Metadata.Refs)
	}
	if err != nil {
		o.s.wrong("snapshot %s is committed, and %s: %v", s.name, key, err)
	}
	n := 0
	if err := o.reader.Segments(
		never,
		manager.Ref{ID: s.id},
		0,
		func(*snapshot.Segment) bool { n++; return true },
	); err != nil ||
		n != s.segments {
		o.s.wrong("snapshot %s has %d segments, had %d: %v", s.name, n, s.segments, err)
	}
}

func (o *oracle) sawGrant(e meta.Event) {
	collection, id, err := keys.LastTwo(e.KV.Key)
	o.s.must(err)
	c := o.collection(collection)
	if c.tombs[id] != nil {
		o.s.wrong("tombstone %d is written again", id)
	}
	t, err := gc.DecodeTombstone(e.KV)
	o.s.must(err)
	g := &tomb{t: t}
	c.tombs[id] = g
	o.s.reached.granted++
	for f := range t.Unit.Owned() {
		g.files = append(g.files, keyOf(f))
	}
	for f := range t.Unit.Segment.AllFiles() {
		key := keyOf(f)
		for _, s := range o.snapshots {
			if !s.dropped && s.files[key] {
				o.s.wrong("unit %d is granted, and snapshot %s (%d) has its file %s", id, s.name, s.id, key)
			}
		}
	}
	for _, key := range g.files {
		o.granted[key] = true
		for other, s := range c.live {
			for f := range s.AllFiles() {
				if other != id && keyOf(f) == key {
					o.s.wrong("unit %d is granted, and segment %d has its file %s", id, other, key)
				}
			}
		}
	}
}

func (o *oracle) sawConfirmed(e meta.Event) {
	collection, id, err := keys.LastTwo(e.KV.Key)
	o.s.must(err)
	g := o.collection(collection).tombs[id]
	switch {
	case g == nil || g.gone:
		o.s.wrong("tombstone %d was not there and is gone", id)
	case g.t.Deleter == gc.ByCaller && !g.asked:
		o.s.wrong("tombstone %d is gone and was not confirmed", id)
	}
	g.gone = true
	o.s.reached.unitsGone++
	for _, key := range g.files {
		if _, err := o.bytes(key); err == nil {
			o.s.wrong("tombstone %d is gone, and %s is there", id, key)
		}
	}
}

func (o *oracle) sawJob(e meta.Event) {
	id, err := keys.LastID(e.KV.Key)
	o.s.must(err)
	old := o.jobs[id]
	if e.Deleted {
		if old == nil || !old.State.Ended() {
			o.s.wrong("job %d is forgotten, and was %+v", id, old)
		}
		return
	}
	job, err := copyjob.DecodeJob(e.KV)
	o.s.must(err)
	if old == nil {
		o.takeID(id, fmt.Sprint("job ", id))
	}
	o.jobs[id] = job
	switch {
	case old != nil && old.State.Ended():
		o.s.wrong("job %d was %v, and is written again as %v", id, old.State, job.State)
	case old != nil && (job.Phase < old.Phase || job.State < old.State):
		o.s.wrong("job %d was %v in phase %v, and is %v in phase %v", id, old.State, old.Phase, job.State, job.Phase)
	case job.State == copyjob.Completed:
		o.s.reached.restored++
		if old != nil && old.Phase == copyjob.RollBack {
			o.s.wrong("job %d was rolled back and is COMPLETED", id)
		}
		o.sawRestored(job)
	case job.State.Ended():
		o.s.reached.rolledBack++
		o.sawRolledBack(job)
	}
}

// sawRestored judges that a restore's target has all that the snapshot has. The
// transaction that publishes may drop the snapshot's last pin, so what it had is
// known from the commit.
func (o *oracle) sawRestored(job *copyjob.Job) {
	c := o.collection(job.Target)
	if c.state != catalog.Active {
		o.s.wrong("job %d is COMPLETED, and its target is %v", job.ID, c.state)
	}
	src := o.snapshots[job.Snapshot]
	if src == nil {
		o.s.wrong("job %d restored snapshot %d, which there never was", job.ID, job.Snapshot)
	}
	want, got := map[string]int{}, map[string]int{}
	for key := range src.files {
		if !job.SkipIndexes || !strings.Contains(key, "/index/") {
			want[string(o.content[key])]++
		}
	}
	for _, s := range c.live {
		for f := range s.AllFiles() {
			o.whole(keyOf(f), "job %d is COMPLETED", job.ID)
			got[string(o.content[keyOf(f)])]++
			if src.files[keyOf(f)] {
				o.s.wrong("job %d is COMPLETED, and its target has the source's %s", job.ID, keyOf(f))
			}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" || len(c.live) != src.segments {
		o.s.wrong("job %d is COMPLETED with %d segments of %d, and has copied: %s", job.ID, len(c.live), src.segments, diff)
	}
}

// sawRolledBack judges that of a restore's target nothing is left in the catalog.
func (o *oracle) sawRolledBack(job *copyjob.Job) {
	for _, prefix := range []string{"/catalog/", "/gc/tomb/", keys.TaskPrefix(job.ID), keys.PinPrefix(job.Snapshot)} {
		from, to := meta.Prefix(prefix)
		res, err := o.s.kv.Range(never, meta.Range{From: from, To: to})
		o.s.must(err)
		for _, kv := range res.KVs {
			pin := strings.HasPrefix(kv.Key, keys.PinPrefix(job.Snapshot))
			if pin && !strings.HasSuffix(kv.Key, keys.ID(job.Pin)) {
				continue
			}
			if pin || strings.Contains(kv.Key, "/"+keys.ID(job.Target)) || prefix == keys.TaskPrefix(job.ID) {
				o.s.wrong("job %d is %v, and %s is there", job.ID, job.State, kv.Key)
			}
		}
	}
}

// lookAround checks the invariants of an idle moment: all needed files exist, and the
// snapshots' own objects are whole.
func (o *oracle) lookAround() {
	for key, who := range o.needed() {
		o.whole(key, "%s", who)
	}
	for _, s := range o.snapshots {
		if s.dropped {
			continue
		}
		o.own(s)
		got, err := o.reader.Get(never, manager.Ref{Name: s.name})
		if err != nil || got.ID != s.id || got.State != snapshot.Committed {
			o.s.wrong("the name of snapshot %s (%d) stands for %v, err = %v", s.name, s.id, got, err)
		}
	}
}

// nothingLeft checks that the stores have only the standing keys and objects.
func (o *oracle) nothingLeft() string {
	stands := map[string]bool{
		keys.Format:           true,
		keys.IDs:              true,
		keys.Epoch:            true,
		keys.Clock:            true,
		keys.Leader:           true,
		keys.Cycle:            true,
		keys.Store("default"): true,
		keys.Unpin:            true,
	}
	var left []string
	from, to := keys.All()
	_, err := o.s.kv.Scan(never, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			switch {
			case stands[kv.Key], strings.HasPrefix(kv.Key, keys.WorkerPrefix), strings.HasPrefix(kv.Key, keys.GonePrefix):
			case strings.HasPrefix(kv.Key, "/request/") && kv.Lease != 0: // it lasts for a day
			default:
				left = append(left, kv.Key)
			}
		}
		return nil
	})
	o.s.must(err)
	for info, err := range o.s.objects.List(never, "") {
		o.s.must(err)
		switch {
		case info.Key == identity.Key, strings.HasPrefix(info.Key, epoch.Prefix), o.hidden[info.Key]:
		case o.engine[info.Key] && (!o.used[info.Key] || o.shared[info.Key]): // the engine's own business
		default:
			left = append(left, info.Key)
		}
	}
	for key := range o.uploads {
		left = append(left, "upload to "+key)
	}
	slices.Sort(left)
	return strings.Join(left, "\n")
}
