package manager

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
)

// pendingKeys is where creates show that they live.
const pendingKeys = "/snapshot/pending/"

// view is every snapshot's record in memory, in list order, kept current by a
// watch. It serves lists, and tells the cleaner what to look at; what is then
// done is decided by the compares of a transaction.
type view struct {
	follower *follow.Follower
	log      *zap.Logger
	changed  func()  // called after each change that may give the cleaner work
	pending  *topics // pending keys, for calls that wait until they are deleted

	mu         sync.RWMutex
	byID       map[int64]*Snapshot
	ordered    []*Snapshot      // newest first
	alive      map[string]int64 // pending keys, with their create revisions
	unreadable map[string]bool  // keys of records that this release cannot read
	pins       map[string]*Pin  // by key; of one that cannot be read the ids alone, or nil
	pinned     map[int64]int    // how many pins a snapshot has
}

func newView(kv meta.KV, log *zap.Logger, jitter func() float64, changed func()) *view {
	v := &view{log: log, changed: changed, pending: newTopics()}
	v.Reset(nil, 0)
	from, to := meta.Prefix("/snapshot/")
	v.follower = follow.New(follow.Options{KV: kv, From: from, To: to, Handler: v, Log: log, Rand: jitter})
	return v
}

func (v *view) run(ctx context.Context) error {
	defer v.pending.end()
	return v.follower.Run(ctx)
}

// sync waits until the view shows all that was written before the call.
func (v *view) sync(ctx context.Context) error {
	_, err := v.follower.Sync(ctx)
	return err
}

// Reset implements follow.Handler.
func (v *view) Reset(kvs []meta.KeyValue, _ int64) {
	v.mu.Lock()
	v.byID, v.ordered = map[int64]*Snapshot{}, nil
	v.alive, v.unreadable, v.pins = map[string]int64{}, map[string]bool{}, map[string]*Pin{}
	v.pinned = map[int64]int{}
	for _, kv := range kvs {
		switch {
		case strings.HasPrefix(kv.Key, keys.SnapshotPrefix):
			if s := v.decode(kv); s != nil {
				v.byID[s.ID] = s
				v.ordered = append(v.ordered, s)
			}
		case strings.HasPrefix(kv.Key, pendingKeys):
			v.alive[kv.Key] = kv.CreateRevision
		case strings.HasPrefix(kv.Key, keys.AllPinsPrefix):
			v.pin(kv)
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
		// A pin that goes sets a snapshot free, but one that comes or is renewed,
		// which can be often, is no work.
		work = work || e.Deleted || !strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix)
		switch {
		case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
			v.apply(e)
		case strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix):
			if e.Deleted {
				v.unpin(e.KV.Key)
			} else {
				v.pin(e.KV)
			}
		case strings.HasPrefix(e.KV.Key, pendingKeys):
			if e.Deleted {
				delete(v.alive, e.KV.Key)
				v.pending.changed(e.KV.Key)
			} else {
				v.alive[e.KV.Key] = e.KV.CreateRevision
			}
		}
	}
	v.mu.Unlock()
	if work {
		v.changed()
	}
}

// pin notes a pin that came or was renewed.
func (v *view) pin(kv meta.KeyValue) {
	p, _ := decodePin(kv) // what cannot be read keeps its snapshot all the same
	if _, known := v.pins[kv.Key]; !known {
		v.pinned[pinnedSnapshot(kv.Key)]++
	}
	v.pins[kv.Key] = p
}

// unpin notes that a pin went.
func (v *view) unpin(key string) {
	if _, known := v.pins[key]; !known {
		return
	}
	delete(v.pins, key)
	id := pinnedSnapshot(key)
	if v.pinned[id]--; v.pinned[id] <= 0 {
		delete(v.pinned, id)
	}
}

// pinnedSnapshot is the id in a pin's key; 0: there is none.
func pinnedSnapshot(key string) int64 {
	id, _, _ := strings.Cut(strings.TrimPrefix(key, keys.AllPinsPrefix), "/")
	n, err := strconv.ParseInt(id, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// endingPins returns the pins that end some time.
func (v *view) endingPins() []*Pin {
	v.mu.RLock()
	defer v.mu.RUnlock()
	var list []*Pin
	for _, p := range v.pins {
		if p != nil && !p.ExpireTime.IsZero() && p.Job == 0 {
			list = append(list, p)
		}
	}
	slices.SortFunc(list, func(a, b *Pin) int { return cmp.Or(cmp.Compare(a.Snapshot, b.Snapshot), cmp.Compare(a.ID, b.ID)) })
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

// decode reads a record; one that this release cannot read is left alone, said
// and counted.
func (v *view) decode(kv meta.KeyValue) *Snapshot {
	s, err := decode(kv)
	if err != nil {
		v.unreadable[kv.Key] = true
		v.log.Error("snapshot record is left alone", zap.String("key", kv.Key), zap.Error(err))
		return nil
	}
	return s
}

func newestFirst(a, b *Snapshot) int { return comparePlaces(b.place(), a.place()) }

func (s *Snapshot) place() Place { return Place{Order: s.Order, ID: s.ID} }

// comparePlaces orders places oldest first.
func comparePlaces(a, b Place) int {
	return cmp.Or(cmp.Compare(a.Order, b.Order), cmp.Compare(a.ID, b.ID))
}

// list returns up to limit snapshots that match, behind after. What it returns
// is shared and must not be changed.
func (v *view) list(f *Filter, after Place, limit int) (list []*Snapshot, more bool) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	start := 0
	if after != (Place{}) {
		start, _ = slices.BinarySearchFunc(v.ordered, after, func(s *Snapshot, after Place) int {
			if comparePlaces(s.place(), after) >= 0 {
				return -1 // newer, or the last one of the page before
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

// has says whether a snapshot is known.
func (v *view) has(id int64) bool {
	v.mu.RLock()
	defer v.mu.RUnlock()
	return v.byID[id] != nil
}

// count returns the number of snapshots by state, of unreadable records, and of
// pins.
func (v *view) count() (states map[State]int, unreadable, pins int) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	states = map[State]int{Pending: 0, Committed: 0, Deleting: 0}
	for _, s := range v.ordered {
		states[s.State]++
	}
	return states, len(v.unreadable), len(v.pins)
}

// work returns the snapshots that the cleaner has to look at: those that are
// being deleted, those that are PENDING without a pending key, and those that
// expire some time; apart from these the pinned ones, which do not expire before
// their last pin goes.
func (v *view) work() (deleting, dead, expiring, pinned []*Snapshot) {
	v.mu.RLock()
	defer v.mu.RUnlock()
	for _, s := range v.ordered {
		switch s.State {
		case Deleting:
			deleting = append(deleting, s)
		case Pending:
			if _, alive := v.alive[keys.Pending(s.Collection, s.ID)]; !alive {
				dead = append(dead, s)
			}
		case Committed:
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
