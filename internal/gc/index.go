package gc

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// The states of a snapshot, as its record has them. Only the first two of them
// are known not to protect.
const (
	pending   = 1
	deleting  = 3
	committed = 2
)

// loadsInFlight is how many snapshots' references are read at once.
const loadsInFlight = 32

// index knows what the committed snapshots reference. It follows their records;
// what each references is read from its refs.avro, once: one object for each
// snapshot, whose digest is in the record, and the metadata besides where the
// record is of an earlier release. Those of a collection that a call waits for are
// read before all others.
//
// In earlier releases two collections could have one segment, whose files go with
// either of them, and snapshots outlive their collections. So a snapshot whose record
// is of an earlier release, without a history, holds what it references in every
// collection, and nothing is said of any collection before it is known.
//
// A snapshot is first expected, by its record, then known, when its references
// are counted. While one of a collection is expected and not known, nothing can
// be said of that collection.
type index struct {
	o        *Options
	follower *follow.Follower
	work     chan struct{} // size one; there is something to load

	mu          sync.Mutex
	collections map[int64]*collection
	snapshots   map[int64]*entry  // by snapshot id
	missing     map[int64]*entry  // those whose references are not known
	foreign     map[uint64]int32  // how many snapshots, of any collection, have a file as a foreign one
	offered     []offer           // by creates of this replica, the latest last
	strays      map[string]string // records of which not even the collection is known, with why
	awaited     map[int64]int     // how many calls wait for a collection
	elders      map[int64]*entry  // those of missing that are of earlier releases
	elder       held              // what snapshots of earlier releases reference, of all collections; no files
	moved       chan struct{}     // closed and replaced when an entry becomes known, unreadable or is gone
}

// collection is what the snapshots of one collection reference.
type collection struct {
	held    held
	entries []*entry         // newest first
	missing map[int64]*entry // those whose references are not known
}

// offer is what a snapshot references, from the create that has just written it.
type offer struct {
	snapshot int64
	metadata manifest.Digest // of the very metadata that name these references
	refs     *snapshotRefs
}

// maxOffers bounds the offers that nobody has taken yet.
const maxOffers = 64

// offer saves the reading of what this replica is about to commit.
func (x *index) offer(snapshot int64, metadata manifest.Digest, refs *manifest.Refs) {
	o := offer{snapshot, metadata, newSnapshotRefs(refs)}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.offered = append(x.offered, o); len(x.offered) > maxOffers {
		x.offered = slices.Delete(x.offered, 0, 1)
	}
}

// take returns what was offered of a snapshot, nil when nothing was.
func (x *index) take(e *entry) *snapshotRefs {
	x.mu.Lock()
	defer x.mu.Unlock()
	at := slices.IndexFunc(x.offered, func(o offer) bool { return o.snapshot == e.id && o.metadata == e.metadata })
	if at < 0 {
		return nil
	}
	refs := x.offered[at].refs
	x.offered = slices.Delete(x.offered, at, at+1)
	return refs
}

// entry is one committed snapshot.
type entry struct {
	id         int64
	collection int64
	name       string
	store      string
	metadata   manifest.Digest
	refsFile   manifest.RefsFile // of the record; zero: the metadata has it
	refs       *snapshotRefs     // nil until known
	elder      bool              // it is counted as one of an earlier release
	closed     bool              // its record is of a newer release: it stays unknown
	began      int64             // revision of the transaction that began it
	history    int64             // of the metadata store, that began is of; 0: not known
	loading    bool
	gone       bool      // while it was being loaded
	err        error     // why it could not be read, the last time
	retry      time.Time // not to be tried before
	transient  int       // tries in a row that the store did not answer
}

func newestFirst(a, b *entry) int { return cmp.Compare(b.id, a.id) }

func newIndex(o *Options) *index {
	x := &index{o: o, work: make(chan struct{}, 1), moved: make(chan struct{})}
	x.collections, x.snapshots, x.missing = map[int64]*collection{}, map[int64]*entry{}, map[int64]*entry{}
	x.awaited, x.elders, x.elder = map[int64]int{}, map[int64]*entry{}, newHeld(nil)
	x.strays, x.foreign = map[string]string{}, map[uint64]int32{}
	from, to := meta.Prefix(keys.SnapshotPrefix)
	x.follower = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: x, Log: o.Log, Rand: o.Jitter})
	return x
}

func (x *index) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return x.follower.Run(ctx) })
	for range loadsInFlight {
		group.Go(func() error {
			x.loader(ctx)
			return nil
		})
	}
	return group.Wait()
}

// Reset implements follow.Handler. What is known already stays known: a
// snapshot's references never change.
func (x *index) Reset(kvs []meta.KeyValue, _ int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	there := map[int64]bool{}
	x.strays = map[string]string{}
	for _, kv := range kvs {
		if id, ok := x.put(kv); ok {
			there[id] = true
		}
	}
	for id := range x.snapshots {
		if !there[id] {
			x.drop(id)
		}
	}
	x.changed()
}

// Apply implements follow.Handler.
func (x *index) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	for _, e := range events {
		delete(x.strays, e.KV.Key)
		if e.Deleted {
			if id, err := keys.LastID(e.KV.Key); err == nil {
				x.drop(id)
			}
		} else if id, protects := x.put(e.KV); !protects {
			x.drop(id)
		}
	}
	x.changed()
}

// put takes a record, and says whether its snapshot protects anything.
func (x *index) put(kv meta.KeyValue) (id int64, protects bool) {
	rec := &storagev1.Snapshot{}
	id, err := keys.LastID(kv.Key)
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		// A record of a newer release tells its collection where ours does.
		if proto.Unmarshal(kv.Value, rec) != nil || rec.GetCollectionId() <= 0 || id <= 0 {
			x.strays[kv.Key] = err.Error()
			x.o.Log.Error("a snapshot record cannot be read: nothing at all is reclaimed", zap.String("key", kv.Key), zap.Error(err))
			return id, false
		}
		x.o.Log.Error("a snapshot record cannot be read: nothing of its collection is reclaimed",
			zap.String("key", kv.Key), zap.Int64("collection", rec.GetCollectionId()), zap.Error(err))
		// References that are known stay as they are, whatever it says now.
		e := x.expect(id, rec)
		if e.history = 0; e.refs == nil {
			e.closed, e.err = true, err
		}
		return id, true
	}
	switch rec.GetState() {
	case committed:
	case pending, deleting:
		return id, false
	default:
		e := x.expect(id, rec)
		e.history = 0
		e.closed, e.err = true, fmt.Errorf("its state is %d, of a newer release", rec.GetState())
		return id, true
	}
	if e := x.snapshots[id]; e != nil && e.closed {
		if e.refs == nil {
			x.drop(id) // what it said then need not have been right
		}
		e.closed = false
	}
	e := x.expect(id, rec)
	if rec.GetHistory() == 0 && e.refs == nil {
		x.elders[id] = e
	}
	e.began, e.history = rec.GetBeginRevision(), rec.GetHistory()
	if e.began != kv.CreateRevision {
		e.history = 0 // the record is a copy from another metadata store
	}
	return id, true
}

// expect makes sure that there is an entry for a snapshot that protects.
func (x *index) expect(id int64, rec *storagev1.Snapshot) *entry {
	if e := x.snapshots[id]; e != nil {
		e.name = rec.GetName()
		return e
	}
	e := &entry{id: id, collection: rec.GetCollectionId(), name: rec.GetName(), store: rec.GetStore()}
	e.metadata.Length = rec.GetMetadataLength()
	copy(e.metadata.SHA256[:], rec.GetMetadataSha256())
	e.refsFile = record.RefsFile(rec.GetReferences())
	x.snapshots[id] = e
	x.missing[id] = e
	c := x.collections[e.collection]
	if c == nil {
		c = &collection{held: newHeld(x.foreign), missing: map[int64]*entry{}}
		x.collections[e.collection] = c
	}
	at, _ := slices.BinarySearchFunc(c.entries, e, newestFirst)
	c.entries = slices.Insert(c.entries, at, e)
	c.missing[id] = e
	return e
}

// drop takes a snapshot out, if it is in.
func (x *index) drop(id int64) {
	e := x.snapshots[id]
	if e == nil {
		return
	}
	delete(x.snapshots, id)
	delete(x.missing, id)
	delete(x.elders, id)
	c := x.collections[e.collection]
	if at, found := slices.BinarySearchFunc(c.entries, e, newestFirst); found {
		c.entries = slices.Delete(c.entries, at, at+1)
	}
	e.gone = true
	if e.refs == nil {
		delete(c.missing, id)
	} else {
		if e.elder {
			x.elder.countIDs(e.refs, -1, x.breathe)
		}
		c.held.count(e.refs, -1, x.breathe)
	}
	if len(c.entries) == 0 {
		delete(x.collections, e.collection)
	}
}

// breathe lets others have the lock for a moment.
func (x *index) breathe() {
	x.mu.Unlock()
	x.mu.Lock()
}

// changed wakes the loaders and those who wait. The lock must be held.
func (x *index) changed() {
	close(x.moved)
	x.moved = make(chan struct{})
	select {
	case x.work <- struct{}{}:
	default:
	}
}

// loader reads references that are missing until ctx ends.
func (x *index) loader(ctx context.Context) {
	if x.o.Ready != nil {
		select {
		case <-ctx.Done():
			return
		case <-x.o.Ready:
		}
	}
	for {
		e, wait := x.next()
		if e == nil {
			if !x.idle(ctx, wait) {
				return
			}
			continue
		}
		refs, err := x.load(ctx, e)
		if ctx.Err() != nil {
			return
		}
		x.loaded(e, refs, err)
	}
}

// idle waits for work, or for as long as there is none that may be tried.
func (x *index) idle(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-x.work:
		return true
	case <-timer.C:
		return true
	}
}

// next takes a snapshot whose references are to be read, or says how long there
// is none.
func (x *index) next() (e *entry, wait time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	wait = x.o.Interval
	now := x.o.Now()
	pick := func(missing map[int64]*entry) bool {
		for _, candidate := range missing {
			if candidate.closed || candidate.loading {
				continue
			}
			if left := candidate.retry.Sub(now); left > 0 {
				wait = min(wait, left)
				continue
			}
			e = candidate
			return true
		}
		return false
	}
	found := false
	for id := range x.awaited {
		if c := x.collections[id]; c != nil && pick(c.missing) {
			found = true
			break
		}
	}
	if !found && !pick(x.missing) {
		return nil, wait
	}
	e.loading = true
	select { // there may be more for another loader
	case x.work <- struct{}{}:
	default:
	}
	return e, 0
}

// loaded notes how the reading of a snapshot's references ended.
func (x *index) loaded(e *entry, refs *snapshotRefs, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	defer x.changed()
	// Not before it is counted: others have the lock in between, and would count
	// it once more.
	defer func() { e.loading = false }()
	if e.gone {
		return
	}
	if err == nil {
		c := x.collections[e.collection]
		c.held.count(refs, 1, x.breathe)
		elder := x.elders[e.id] != nil
		if elder {
			x.elder.countIDs(refs, 1, x.breathe)
		}
		if e.gone { // while others had the lock
			c.held.count(refs, -1, func() {})
			if elder {
				x.elder.countIDs(refs, -1, func() {})
			}
			return
		}
		e.refs, e.elder, e.err = refs, elder, nil
		delete(x.missing, e.id)
		delete(x.elders, e.id)
		delete(c.missing, e.id)
		return
	}
	wait := x.o.Interval
	if passes(err) || object.IsPassing(err) {
		// As long as the store does not answer, or refuses, there is nothing wrong with
		// the snapshot.
		if e.transient++; e.transient < 6 {
			e.retry = x.o.Now().Add(50 * time.Millisecond << e.transient)
			return
		}
		wait /= 4
	}
	first := e.err == nil // then once for as long as it lasts
	if e.err, e.retry = err, x.o.Now().Add(wait); !first {
		return
	}
	x.o.Log.Error("the references of a snapshot cannot be read: nothing of its collection is reclaimed",
		zap.Int64("snapshot", e.id), zap.String("name", e.name), zap.Int64("collection", e.collection), zap.Error(err))
}

// load reads what a snapshot references. Nothing is parsed that is not what was
// written.
func (x *index) load(ctx context.Context, e *entry) (*snapshotRefs, error) {
	if refs := x.take(e); refs != nil {
		return refs, nil
	}
	store, ok := x.o.Stores[e.store]
	if !ok {
		return nil, fmt.Errorf("its objects lie in store %q, which is not configured here", e.store)
	}
	dir, file := manifest.Dir(e.collection, e.id), e.refsFile
	if file.Length == 0 {
		data, err := read(ctx, store, dir+manifest.MetadataName, e.metadata)
		if err != nil {
			return nil, err
		}
		md, err := manifest.DecodeMetadata(data)
		if err != nil {
			return nil, err
		}
		file = md.Refs
	}
	data, err := read(ctx, store, dir+manifest.RefsName, file.Digest)
	if err != nil {
		return nil, err
	}
	refs, err := manifest.DecodeRefs(data, file)
	if err != nil {
		return nil, err
	}
	return newSnapshotRefs(refs), nil
}

// read reads an object of the digest that it must have, twice when the first
// answer is another: the way may be to blame.
func read(ctx context.Context, store object.Store, key string, want manifest.Digest) ([]byte, error) {
	var last error
	for range 2 {
		data, err := object.ReadAll(ctx, store, key, want.Length)
		if err != nil {
			return nil, err
		}
		if last = want.Check(data); last == nil {
			return data, nil
		}
	}
	return nil, fmt.Errorf("read %s: %w", key, last)
}

// ready waits until the index has all references of a collection as they are at
// revision, or later. When it cannot say, the error is ErrUnreadable or
// ErrLoading. What it waits for has been asked of the store, so it waits a while.
func (x *index) ready(ctx context.Context, id, revision int64) error {
	ctx, cancel := context.WithTimeout(ctx, x.o.LoadWait)
	defer cancel()
	if at := x.follower.Revision(); at < revision {
		if _, err := x.follower.Sync(ctx); err != nil {
			return x.late(ctx, err)
		}
	}
	x.await(id, 1)
	defer x.await(id, -1)
	for {
		x.mu.Lock()
		err, moved := x.complete(id), x.moved
		x.mu.Unlock()
		if !errors.Is(err, ErrLoading) || errors.Is(err, errNoAnswer) {
			return err
		}
		select {
		case <-ctx.Done():
			return x.late(ctx, err)
		case <-moved:
		}
	}
}

// await counts a call that waits for a collection.
func (x *index) await(id int64, by int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.awaited[id] += by; x.awaited[id] == 0 {
		delete(x.awaited, id)
	}
}

// known is ready at the revision that the index is at, without waiting.
func (x *index) known(id int64) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.complete(id)
}

// late turns the end of our own patience into ErrLoading.
func (x *index) late(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) && !errors.Is(err, ErrLoading) {
		return fmt.Errorf("%w: %w", ErrLoading, err)
	}
	return err
}

// complete says whether all references of a collection are known. The lock must
// be held.
func (x *index) complete(id int64) error {
	for key, why := range x.strays {
		return fmt.Errorf("%w: record %s: %s", ErrUnreadable, key, why)
	}
	if err := x.eldersKnown(id); err != nil {
		return err
	}
	c := x.collections[id]
	if c == nil || len(c.missing) == 0 {
		return nil
	}
	var silent error
	for _, e := range c.entries {
		switch {
		case e.err == nil:
		case passes(e.err):
			silent = fmt.Errorf("%w (%w): snapshot %q (%d): %w; nothing of collection %d is reclaimed until the store answers",
				ErrLoading, errNoAnswer, e.name, e.id, toldOf(e.err), id)
		default:
			return fmt.Errorf("%w: snapshot %q (%d): %w; nothing of collection %d is reclaimed until it can be read or is dropped",
				ErrUnreadable, e.name, e.id, toldOf(e.err), id)
		}
	}
	if silent != nil {
		return silent
	}
	return fmt.Errorf("%w: of %d snapshots of collection %d", ErrLoading, len(c.missing), id)
}

// eldersKnown says whether the references of all snapshots of earlier releases are
// known, of collections other than id: in those releases two collections could have
// one segment. The lock must be held.
func (x *index) eldersKnown(id int64) error {
	n := 0
	var silent error
	for _, e := range x.elders {
		switch {
		case e.collection == id: // complete says so
		case e.err != nil && passes(e.err):
			silent = fmt.Errorf("%w (%w): snapshot %q (%d), of an earlier release: %w; nothing is reclaimed until the store answers",
				ErrLoading, errNoAnswer, e.name, e.id, toldOf(e.err))
		case e.err != nil:
			return fmt.Errorf("%w: snapshot %q (%d), of an earlier release: %w; nothing is reclaimed until it can be read or is dropped",
				ErrUnreadable, e.name, e.id, toldOf(e.err))
		default:
			n++
		}
	}
	if silent != nil {
		return silent
	}
	if n > 0 {
		return fmt.Errorf("%w: of %d snapshots of an earlier release", ErrLoading, n)
	}
	return nil
}

// errNoAnswer comes with an ErrLoading that a call need not wait for: the store has not
// answered for a while.
var errNoAnswer = errors.New("the store does not answer")

// passes says whether err is for a store that did not answer, which says nothing of
// the references that it holds.
func passes(err error) bool { return errors.Is(err, object.ErrUnavailable) || meta.Unusable(err) }

// toldOf is what a caller is told of err. What a store says may tell of addresses;
// the log has it.
func toldOf(err error) error {
	for _, class := range []error{object.ErrUnavailable, object.ErrFull, object.ErrDenied, object.ErrMisconfigured} {
		if errors.Is(err, class) {
			return class
		}
	}
	return err
}

// wanted is what a unit is held by.
type wanted struct {
	segment, build int64            // one of them, the other 0
	files          iter.Seq[uint64] // hashes of its files that another thing may have as foreign ones; nil: none
	// taken is the revision at which files were taken from segment, which lives on:
	// a snapshot that began after that has the segment without them. 0: it is the
	// whole segment or build.
	taken int64
	// history is that of the metadata store. A snapshot of an earlier history, or
	// of one that is not known, holds the files wherever it has the segment.
	history int64
}

// lackedBy says whether the snapshot certainly does not have the files that were
// taken from its segment: it began after that, in the same metadata store.
func (w *wanted) lackedBy(e *entry) bool {
	return w.taken > 0 && e.history > 0 && e.history == w.history && e.began > w.taken
}

// holders returns the snapshots of a collection that reference w, the newest
// first, a few of them, and how many there are. The index must be ready. A file
// that a snapshot of another collection has as a foreign one is held as well, by
// somebody who is not named; but for those the index need not be ready, and
// nothing is compared: a file is to be of one collection only.
func (x *index) holders(id int64, w wanted) (list []SnapshotHolder, total int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	// One of an earlier release may have the segment or build in another collection.
	// If it is of this one, it counts below as well.
	foreign := x.elder.of(w) > 0 || w.hasFile(len(x.foreign), func(hash uint64) bool { return x.foreign[hash] > 0 })
	c := x.collections[id]
	if c == nil {
		if foreign {
			total = 1
		}
		return nil, total
	}
	count := c.held.of(w)
	if count == 0 && !foreign {
		return nil, 0
	}
	known := count // how many there are, unless all have to be looked at
	if w.taken > 0 {
		known = 0
	}
	if !foreign {
		w.files = nil // none of them has one
	}
	for _, e := range c.entries {
		if e.refs == nil || !e.references(w) {
			continue
		}
		if total++; total <= maxHolders {
			list = append(list, SnapshotHolder{ID: e.id, Name: e.name})
		} else if !foreign && known > 0 {
			break // the count says the rest
		}
	}
	if foreign {
		total = max(total, 1)
	}
	// A count that is still being taken down holds until it is.
	return list, max(total, known)
}

// count returns how many snapshots of a collection hold w by their references of
// its segment or build. It takes longer for files that were taken from a segment:
// each snapshot is looked at.
func (x *index) count(id int64, w wanted) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	c := x.collections[id]
	if c == nil {
		return 0
	}
	n := c.held.of(w)
	if n == 0 || w.taken == 0 {
		return n
	}
	n = 0
	for _, e := range c.entries {
		if e.refs != nil && e.refersTo(&w) {
			n++
		}
	}
	return n
}

// holds says whether count is positive, and looks at no more snapshots than it
// takes to find one.
func (x *index) holds(id int64, w wanted) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	c := x.collections[id]
	if c == nil || c.held.of(w) == 0 {
		return false
	}
	return w.taken == 0 || slices.ContainsFunc(c.entries, func(e *entry) bool { return e.refs != nil && e.refersTo(&w) })
}

// refersTo says whether the snapshot holds w by its reference of the segment or
// build.
func (e *entry) refersTo(w *wanted) bool {
	if w.build != 0 && e.refs.builds.has(w.build) {
		return true
	}
	return w.segment != 0 && !w.lackedBy(e) && e.refs.segments.has(w.segment)
}

func (e *entry) references(w wanted) bool {
	if e.refersTo(&w) {
		return true
	}
	return w.hasFile(len(e.refs.files), func(hash uint64) bool {
		_, found := slices.BinarySearch(e.refs.files, hash)
		return found
	})
}

// hasFile says whether one of its files is among so many others. To hash them is
// what costs, and mostly there are no others.
func (w *wanted) hasFile(others int, among func(hash uint64) bool) bool {
	if others == 0 || w.files == nil {
		return false
	}
	for hash := range w.files {
		if among(hash) {
			return true
		}
	}
	return false
}

func (x *index) stats() Stats {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := Stats{Unreadable: len(x.strays)}
	for _, e := range x.snapshots {
		switch {
		case e.err != nil:
			s.Unreadable++
		case e.refs != nil:
			s.Snapshots++
		default:
			s.Loading++
		}
	}
	for _, c := range x.collections {
		s.Segments += c.held.segments.ids
		s.Builds += c.held.builds.ids
	}
	return s
}
