package gc

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Deleter is the component that deletes the files of a unit. Stored: append only.
type Deleter int

// The deleters.
const (
	BySnapshotd Deleter = iota + 1
	ByCaller
)

// Tombstone is a granted unit.
type Tombstone struct {
	ID         int64
	Collection int64
	Unit       catalog.Unit
	Deleter    Deleter
	Caller     string
	GrantTime  time.Time
	Revision   int64 // of the grant
}

// DecodeTombstone reads a tombstone's record.
func DecodeTombstone(kv meta.KeyValue) (*Tombstone, error) {
	collection, id, err := keys.LastTwo(kv.Key)
	if err != nil {
		return nil, err
	}
	rec := &storagev1.Tombstone{}
	if err := record.Decode(kv, rec); err != nil {
		return nil, err
	}
	t := &Tombstone{
		ID: id, Collection: collection, Deleter: Deleter(rec.GetDeleter()), Caller: rec.GetCaller(),
		GrantTime: time.Unix(0, rec.GetGrantTime()).UTC(), Revision: kv.CreateRevision,
	}
	t.Unit, err = catalog.UnitOf(collection, id, rec.GetUnit())
	return t, err
}

// Files yields the files to delete of a tombstone, each with its root.
func (t *Tombstone) Files(roots []catalog.Root) func(yield func(catalog.Root, *segment.File) bool) {
	return func(yield func(catalog.Root, *segment.File) bool) {
		for f := range t.Unit.Owned() {
			if f.Root < len(roots) && !yield(roots[f.Root], f) {
				return
			}
		}
	}
}

// removal returns the deletes that remove a tombstone whose files are deleted.
func (t *Tombstone) removal() []meta.Op {
	ops := []meta.Op{meta.Delete(keys.Tombstone(t.Collection, t.ID))}
	if t.Unit.Kind != catalog.UnitSegment {
		ops = append(ops, meta.Delete(keys.Replaced(t.Collection, t.Unit.Segment.ID, t.ID)))
	}
	return ops
}

// cachedBytes bounds the records that tombstones caches.
const cachedBytes = 32 << 20

// tombstones mirrors the tombstone keys by a watch, and caches as many records as fit.
// A cached record is revalidated before use. It is safe for concurrent use.
type tombstones struct {
	follower *follow.Follower
	log      *zap.Logger
	wakeups  chan struct{} // size one; there may be files to delete

	mu          sync.Mutex
	owned       map[string]ownedTombstone // by key, those that snapshotd deletes
	size        int                       // bytes of their cached records
	callerOwned map[string]time.Time      // grant times by key, of those that callers delete
	unreadable  map[string]error          // by key; they are skipped
}

// ownedTombstone is a tombstone that snapshotd deletes.
type ownedTombstone struct {
	kv      meta.KeyValue // with a nil value if it is not cached
	granted int64         // Unix nanoseconds
}

func newTombstones(o *Options) *tombstones {
	t := &tombstones{log: o.Log, wakeups: make(chan struct{}, 1)}
	t.clear()
	from, to := meta.Prefix(keys.AllTombstonesPrefix)
	t.follower = follow.New(follow.Options{
		KV: o.KV, From: from, To: to, Handler: t, Log: o.Log, Rand: o.Jitter, Problems: o.Problems, Name: "tombstones",
	})
	return t
}

func (t *tombstones) clear() {
	t.owned, t.size = map[string]ownedTombstone{}, 0
	t.callerOwned, t.unreadable = map[string]time.Time{}, map[string]error{}
}

// Reset implements follow.Handler.
func (t *tombstones) Reset(kvs []meta.KeyValue, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clear()
	for _, kv := range kvs {
		t.put(kv)
	}
}

// Apply implements follow.Handler.
func (t *tombstones) Apply(events []meta.Event, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range events {
		t.size -= len(t.owned[e.KV.Key].kv.Value)
		delete(t.owned, e.KV.Key)
		delete(t.callerOwned, e.KV.Key)
		delete(t.unreadable, e.KV.Key)
		if !e.Deleted {
			t.put(e.KV)
		}
	}
}

func (t *tombstones) put(kv meta.KeyValue) {
	rec := &storagev1.TombstoneHead{}
	if err := record.DecodeHead(kv, rec); err != nil {
		t.skipLocked(kv.Key, err)
		return
	}
	if Deleter(rec.GetDeleter()) == ByCaller {
		t.callerOwned[kv.Key] = time.Unix(0, rec.GetGrantTime())
		return
	}
	if t.size+len(kv.Value) > cachedBytes {
		kv.Value = nil
	}
	t.size += len(kv.Value)
	t.owned[kv.Key] = ownedTombstone{kv, rec.GetGrantTime()}
	t.wake()
}

// skip excludes an unreadable tombstone until it changes.
func (t *tombstones) skip(key string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.skipLocked(key, err)
}

func (t *tombstones) skipLocked(key string, err error) {
	t.log.Error("tombstone unreadable, skipped", zap.String("key", key), zap.Error(err))
	t.size -= len(t.owned[key].kv.Value)
	delete(t.owned, key)
	t.unreadable[key] = err
}

// unreadableErr returns the errors of unreadable tombstones, nil without any.
func (t *tombstones) unreadableErr() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(t.unreadable)) {
		errs = append(errs, t.unreadable[key])
	}
	return FirstError(errs)
}

// wake starts a delete pass of the leader.
func (t *tombstones) wake() {
	select {
	case t.wakeups <- struct{}{}:
	default:
	}
}

// stats returns the number of tombstones by deleter, and the age of the oldest one
// that a caller deletes.
func (t *tombstones) stats(now time.Time) (owned, callerOwned int, oldest time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, granted := range t.callerOwned {
		oldest = max(oldest, now.Sub(granted))
	}
	return len(t.owned), len(t.callerOwned), oldest
}

// untried returns the keys of owned tombstones that are not in tried, in key order.
func (t *tombstones) untried(tried map[string]bool) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []string
	for key := range t.owned {
		if !tried[key] {
			list = append(list, key)
		}
	}
	slices.Sort(list)
	return list
}

// cached returns the records of tombstones, nil if one of them is not cached.
func (t *tombstones) cached(list []string) []meta.KeyValue {
	t.mu.Lock()
	defer t.mu.Unlock()
	kvs := make([]meta.KeyValue, len(list))
	for i, key := range list {
		if kvs[i] = t.owned[key].kv; kvs[i].Value == nil {
			return nil
		}
	}
	return kvs
}

// hasOwned reports whether there are owned tombstones that were granted up to a time,
// in one collection or, with 0, in all. An unreadable tombstone is an error.
func (t *tombstones) hasOwned(collection int64, until time.Time) (bool, error) {
	prefix := keys.AllTombstonesPrefix
	if collection > 0 {
		prefix = keys.TombstonePrefix(collection)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, err := range t.unreadable {
		if strings.HasPrefix(key, prefix) {
			return true, err
		}
	}
	for key, o := range t.owned {
		if o.granted <= until.UnixNano() && strings.HasPrefix(key, prefix) {
			return true, nil
		}
	}
	return false, nil
}
