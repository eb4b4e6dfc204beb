package manager

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
)

// pendingKeys is the prefix of the pending keys of creates.
const pendingKeys = "/snapshot/pending/"

// view mirrors all snapshot records in memory, in list order, by a watch. It serves
// lists and selects the work of the cleaner, whose transactions compare what they
// depend on.
type view struct {
	follower *follow.Follower
	log      *zap.Logger
	changed  func()  // called after each change that may give the cleaner work
	pending  *topics // pending keys, for calls that wait for their deletion

	mu          sync.RWMutex
	byID        map[int64]*snapshot.Record
	ordered     []*snapshot.Record // newest first
	pendingRevs map[string]int64   // pending keys, with their create revisions
	unreadable  map[string]bool    // keys of records that cannot be read
	pins        map[string]*Pin    // by key; of an unreadable one only the ids, or nil
	pinned      map[int64]int      // number of pins by snapshot
}

func newView(o *Options, changed func()) *view {
	v := &view{log: o.Log, changed: changed, pending: newTopics()}
	v.Reset(nil, 0)
	from, to := meta.Prefix("/snapshot/")
	v.follower = follow.New(follow.Options{
		KV: o.KV, From: from, To: to, Handler: v, Log: o.Log, Rand: o.Jitter, Problems: o.Problems, Name: "snapshots",
	})
	return v
}

func (v *view) run(ctx context.Context) error {
	defer v.pending.end()
	return v.follower.Run(ctx)
}

// sync waits until the view includes all writes before the call.
func (v *view) sync(ctx context.Context) error {
	_, err := v.follower.Sync(ctx)
	return err
}

// Reset implements follow.Handler.
func (v *view) Reset(kvs []meta.KeyValue, _ int64) {
	v.mu.Lock()
	v.byID, v.ordered = map[int64]*snapshot.Record{}, nil
	v.pendingRevs, v.unreadable, v.pins = map[string]int64{}, map[string]bool{}, map[string]*Pin{}
	v.pinned = map[int64]int{}
	for _, kv := range kvs {
		switch {
		case strings.HasPrefix(kv.Key, keys.SnapshotPrefix):
			if s := v.decode(kv); s != nil {
				v.byID[s.ID] = s
				v.ordered = append(v.ordered, s)
			}
		case strings.HasPrefix(kv.Key, pendingKeys):
			v.pendingRevs[kv.Key] = kv.CreateRevision
		case strings.HasPrefix(kv.Key, keys.AllPinsPrefix):
			v.addPin(kv)
		}
	}
	slices.SortFunc(v.ordered, newestFirst)
	v.mu.Unlock()
	v.pending.allChanged()
	v.changed()
}

// Apply implements follow.Handler.
func (v *view) Apply(events []meta.Event, _ int64) {
	v.mu.Lock()
	work := false
	for _, e := range events {
		// The removal of a pin may allow an expiry. A new or renewed pin, which can be
		// frequent, is no work.
		work = work || e.Deleted || !strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix)
		switch {
		case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
			v.apply(e)
		case strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix):
			if e.Deleted {
				v.removePin(e.KV.Key)
			} else {
				v.addPin(e.KV)
			}
		case strings.HasPrefix(e.KV.Key, pendingKeys):
			if e.Deleted {
				delete(v.pendingRevs, e.KV.Key)
				v.pending.changed(e.KV.Key)
			} else {
				v.pendingRevs[e.KV.Key] = e.KV.CreateRevision
			}
		}
	}
	v.mu.Unlock()
	if work {
		v.changed()
	}
}

// addPin adds a pin, or replaces one that was renewed.
func (v *view) addPin(kv meta.KeyValue) {
	p, _ := decodePin(kv) // an unreadable pin still protects its snapshot
	if _, known := v.pins[kv.Key]; !known {
		v.pinned[pinnedSnapshot(kv.Key)]++
	}
	v.pins[kv.Key] = p
}

// removePin removes a pin.
func (v *view) removePin(key string) {
	if _, known := v.pins[key]; !known {
		return
	}
	delete(v.pins, key)
	id := pinnedSnapshot(key)
	if v.pinned[id]--; v.pinned[id] <= 0 {
		delete(v.pinned, id)
	}
}

// pinnedSnapshot returns the snapshot id in a pin's key, 0 if there is none.
func pinnedSnapshot(key string) int64 {
	id, _, _ := strings.Cut(strings.TrimPrefix(key, keys.AllPinsPrefix), "/")
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// expiringPins returns the pins that have an expire time.
func (v *view) expiringPins() []*Pin {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var list []*Pin
	for _, p := range v.pins {
		if p != nil && !p.ExpireTime.IsZero() && p.Job == 0 {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *Pin) int {
		return cmp.Or(cmp.Compare(a.Snapshot, b.Snapshot), cmp.Compare(a.ID, b.ID))
	})
	return list
}

func (v *view) apply(e meta.Event) {
	delete(v.unreadable, e.KV.Key)
	id, err := keys.LastID(e.KV.Key)
	if err != nil {
		return // not a record
	}
	if old := v.byID[id]; old != nil {
		if i, ok := slices.BinarySearchFunc(v.ordered, old, newestFirst); ok {
			v.ordered = slices.Delete(v.ordered, i, i+1)
		}
		delete(v.byID, id)
	}
	if e.Deleted {
		return
	}
	if s := v.decode(e.KV); s != nil {
		v.byID[id] = s
		i, _ := slices.BinarySearchFunc(v.ordered, s, newestFirst)
		v.ordered = slices.Insert(v.ordered, i, s)
	}
}

// decode decodes a record. An unreadable one is logged and counted, and nil returned.
func (v *view) decode(kv meta.KeyValue) *snapshot.Record {
	s, err := snapshot.Decode(kv)
	if err != nil {
		v.unreadable[kv.Key] = true
		v.log.Error("snapshot record ignored: it cannot be read", zap.String("key", kv.Key), zap.Error(err))
		return nil
	}
	return s
}

func newestFirst(a, b *snapshot.Record) int { return comparePlaces(placeOf(b), placeOf(a)) }

func placeOf(s *snapshot.Record) Place { return Place{Order: s.Order, ID: s.ID} }

// comparePlaces orders places oldest first.
func comparePlaces(a, b Place) int {
	return cmp.Or(cmp.Compare(a.Order, b.Order), cmp.Compare(a.ID, b.ID))
}

// list returns up to limit matching snapshots that follow after. They are shared and
// must not be changed.
func (v *view) list(f *Filter, after Place, limit int) (list []*snapshot.Record, more bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	start := 0
	if after != (Place{}) {
		start, _ = slices.BinarySearchFunc(v.ordered, after, func(s *snapshot.Record, after Place) int {
			if comparePlaces(placeOf(s), after) >= 0 {
				return -1 // newer, or the last of the previous page
			}
			return 1
		})
	}
	for _, s := range v.ordered[start:] {
		if !f.match(s) {
			continue
		}
		if len(list) == limit {
			return list, true
		}
		list = append(list, s)
	}
	return list, false
}

// count returns the number of snapshots by state, of unreadable records, and of
// pins.
func (v *view) count() (states map[snapshot.State]int, unreadable, pins int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	states = map[snapshot.State]int{snapshot.Pending: 0, snapshot.Committed: 0, snapshot.Deleting: 0}
	for _, s := range v.ordered {
		states[s.State]++
	}
	return states, len(v.unreadable), len(v.pins)
}

// work returns the snapshots for the cleaner: DELETING ones, PENDING ones without a
// pending key, and COMMITTED ones with an expire time. Pinned ones among the latter,
// which do not expire before their last pin is removed, are returned separately.
func (v *view) work() (deleting, dead, expiring, pinned []*snapshot.Record) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, s := range v.ordered {
		switch s.State {
		case snapshot.Deleting:
			deleting = append(deleting, s)
		case snapshot.Pending:
			if _, alive := v.pendingRevs[keys.Pending(s.Collection, s.ID)]; !alive {
				dead = append(dead, s)
			}
		case snapshot.Committed:
			switch {
			case s.ExpireTime.IsZero():
			case v.pinned[s.ID] > 0:
				pinned = append(pinned, s)
			default:
				expiring = append(expiring, s)
			}
		}
	}
	return deleting, dead, expiring, pinned
}
