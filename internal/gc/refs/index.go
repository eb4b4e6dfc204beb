// Package refs indexes the references of committed snapshots: which snapshots hold a
// segment, an index build or a file.
//
// The index follows the snapshot records by a watch. It reads the references of each
// snapshot once, from one object, refs.avro, whose digest is in the record. Where the
// record is of an earlier release, the digest is in the metadata object, which is
// read first. References of a collection that a call waits for are read before all
// others.
//
// # States of a snapshot
//
//	      record            references counted
//	none ---------> missing -------------------> known
//	  ^                |                           |
//	  +----------------+------ record dropped -----+
//
// While a snapshot of a collection is missing, the index answers nothing for that
// collection: [Index.Ready] waits, or fails.
//
// # Snapshots of earlier releases
//
// In earlier releases two collections could have one segment, whose files go with
// either of them, and snapshots outlive their collections. So a snapshot whose record
// is of an earlier release, without a history, holds its references in every
// collection, and while one is missing the index answers for no collection.
//
// # Failures
//
//	references unreadable       the snapshot stays missing: ErrUnreadable for its
//	                            collection; read again after the interval
//	store does not answer       ErrLoading, at once after a few attempts
//	record of a newer release   missing, unless its references are known already
//	record without a collection ErrUnreadable for all collections
package refs

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Errors of an index that cannot answer.
var (
	ErrLoading    = errors.New("references are still being read")
	ErrUnreadable = errors.New("references of a snapshot cannot be read")
)

// Options configure an Index.
type Options struct {
	KV     meta.KV
	Stores map[string]object.Store // by alias
	Now    func() time.Time
	Log    *zap.Logger
	// LoadWait is how long Ready waits for references that are being read. It must
	// be positive.
	LoadWait time.Duration
	// Interval is how long an unreadable reference is left alone.
	Interval time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
	// Ready is closed once references can be read. Nil: at once.
	Ready <-chan struct{}
	// Problems receives repeated failures. Default: a new list.
	Problems *lasting.Problems
}

// Index holds the references of all committed snapshots. It is safe for concurrent
// use. It answers while Run runs.
type Index struct {
	o        Options
	follower *follow.Follower
	work     chan struct{} // size one; references may be missing

	mu          sync.Mutex
	received    int64 // revision of the latest event or full read
	collections map[int64]*collection
	snapshots   map[int64]*entry  // by snapshot id
	missing     map[int64]*entry  // entries without references
	legacy      map[int64]*entry  // those of missing that are of earlier releases
	legacyRefs  refCounts         // of snapshots of earlier releases, over all collections; without files
	foreign     map[uint64]int32  // snapshots, of any collection, that have a file as a foreign one
	primed      []primed          // by creates of this replica, the latest last
	unparseable map[string]string // records without a readable collection, with the error
	awaited     map[int64]int     // calls that wait, by collection
	changed     chan struct{}     // closed and replaced when an entry becomes known, unreadable or is removed
}

// collection has the references of one collection's snapshots.
type collection struct {
	counts  refCounts
	entries []*entry         // newest first
	missing map[int64]*entry // entries without references
}

// entry is one committed snapshot.
type entry struct {
	id         int64
	collection int64
	name       string
	store      string
	metadata   manifest.Digest
	refsFile   manifest.RefsFile // of the record; zero: the metadata has it
	refs       *snapshotRefs     // nil: missing
	legacy     bool              // counted in legacyRefs
	closed     bool              // of a newer release: it stays missing
	began      int64             // revision of the transaction that began it
	history    int64             // of the metadata store, for began; 0: unknown
	loading    bool
	removed    bool      // while it was being loaded
	err        error     // of the last load
	retry      time.Time // not loaded before
	silent     int       // loads in a row without an answer of the store
}

func newestFirst(a, b *entry) int { return cmp.Compare(b.id, a.id) }

// New returns an Index.
func New(o Options) *Index {
	x := &Index{o: o, work: make(chan struct{}, 1), changed: make(chan struct{})}
	x.collections, x.snapshots, x.missing = map[int64]*collection{}, map[int64]*entry{}, map[int64]*entry{}
	x.awaited, x.legacy, x.legacyRefs = map[int64]int{}, map[int64]*entry{}, newRefCounts(nil)
	x.unparseable, x.foreign = map[string]string{}, map[uint64]int32{}
	from, to := meta.Prefix(keys.SnapshotPrefix)
	x.follower = follow.New(follow.Options{
		KV: o.KV, From: from, To: to, Handler: x, Log: o.Log, Rand: o.Jitter, Problems: o.Problems, Name: "references",
	})
	return x
}

// Reset implements follow.Handler. Known references stay: a snapshot's references
// never change.
func (x *Index) Reset(kvs []meta.KeyValue, revision int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.received = revision
	present := map[int64]bool{}
	x.unparseable = map[string]string{}
	for _, kv := range kvs {
		if id, ok := x.upsert(kv); ok {
			present[id] = true
		}
	}
	for id := range x.snapshots {
		if !present[id] {
			x.remove(id)
		}
	}
	x.notify()
}

// Apply implements follow.Handler.
func (x *Index) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.received = events[len(events)-1].KV.ModRevision
	for _, e := range events {
		delete(x.unparseable, e.KV.Key)
		if e.Deleted {
			if id, err := keys.LastID(e.KV.Key); err == nil {
				x.remove(id)
			}
		} else if id, protects := x.upsert(e.KV); !protects {
			x.remove(id)
		}
	}
	x.notify()
}

// upsert takes in a record, and returns whether its snapshot protects anything.
func (x *Index) upsert(kv meta.KeyValue) (id int64, protects bool) {
	rec := &storagev1.Snapshot{}
	id, err := keys.LastID(kv.Key)
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		// A record of a newer release has its collection in the same field.
		if proto.Unmarshal(kv.Value, rec) != nil || rec.GetCollectionId() <= 0 || id <= 0 {
			x.unparseable[kv.Key] = err.Error()
			x.o.Log.Error("snapshot record unreadable: nothing is reclaimed in any collection",
				zap.String("key", kv.Key), zap.Error(err))
			return id, false
		}
		x.o.Log.Error("snapshot record unreadable: nothing is reclaimed in its collection",
			zap.String("key", kv.Key), zap.Int64("collection", rec.GetCollectionId()), zap.Error(err))
		// Known references stay, whatever the record has now.
		e := x.ensure(id, rec)
		if e.history = 0; e.refs == nil {
			e.closed, e.err = true, err
		}
		return id, true
	}
	switch snapshot.State(rec.GetState()) { // only PENDING and DELETING are known not to protect
	case snapshot.Committed:
	case snapshot.Pending, snapshot.Deleting:
		return id, false
	default:
		e := x.ensure(id, rec)
		e.history = 0
		e.closed, e.err = true, fmt.Errorf("its state is %d, of a newer release", rec.GetState())
		return id, true
	}
	if e := x.snapshots[id]; e != nil && e.closed {
		if e.refs == nil {
			x.remove(id) // the fields of the former record need not have been right
		}
		e.closed = false
	}
	e := x.ensure(id, rec)
	if rec.GetHistory() == 0 && e.refs == nil {
		x.legacy[id] = e
	}
	e.began, e.history = rec.GetBeginRevision(), rec.GetHistory()
	if e.began != kv.CreateRevision {
		e.history = 0 // the record is a copy from another metadata store
	}
	return id, true
}

// ensure returns the entry of a snapshot that protects, and makes it if necessary.
func (x *Index) ensure(id int64, rec *storagev1.Snapshot) *entry {
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
		c = &collection{counts: newRefCounts(x.foreign), missing: map[int64]*entry{}}
		x.collections[e.collection] = c
	}
	at, _ := slices.BinarySearchFunc(c.entries, e, newestFirst)
	c.entries = slices.Insert(c.entries, at, e)
	c.missing[id] = e
	return e
}

// remove removes a snapshot, if the index has it.
func (x *Index) remove(id int64) {
	e := x.snapshots[id]
	if e == nil {
		return
	}
	delete(x.snapshots, id)
	delete(x.missing, id)
	delete(x.legacy, id)
	c := x.collections[e.collection]
	if at, found := slices.BinarySearchFunc(c.entries, e, newestFirst); found {
		c.entries = slices.Delete(c.entries, at, at+1)
	}
	e.removed = true
	if e.refs == nil {
		delete(c.missing, id)
	} else {
		if e.legacy {
			x.legacyRefs.countIDs(e.refs, -1, x.yieldLock)
		}
		c.counts.count(e.refs, -1, x.yieldLock)
	}
	if len(c.entries) == 0 {
		delete(x.collections, e.collection)
	}
}

// yieldLock lets other goroutines take the lock for a moment.
func (x *Index) yieldLock() {
	x.mu.Unlock()
	x.mu.Lock()
}

// notify wakes the loaders and the calls that wait. The lock must be held.
func (x *Index) notify() {
	close(x.changed)
	x.changed = make(chan struct{})
	select {
	case x.work <- struct{}{}:
	default:
	}
}
