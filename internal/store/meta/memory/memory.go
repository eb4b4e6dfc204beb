// Package memory implements [meta.KV] in memory with the semantics of etcd: the same
// revisions, history, leases, limits and errors. It is for tests and trials.
//
// One mutex guards all state. Each key keeps its versions, as in etcd, for reads at past
// revisions; a log of the events of each revision serves watches that begin in the past.
// Both grow until [Store.Compact]. Keys are a sorted slice, suitable for tens of thousands.
//
// The store starts no goroutine. Leases end by timers, so that a store in a synctest bubble
// uses the bubble's clock and does not outlive it.
package memory

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// scanBatch is the number of keys per batch of a scan, each read under the lock.
const scanBatch = 500

// Options configure a [Store].
type Options struct {
	// Now is the clock of leases; the default is time.Now. With another clock an
	// overdue lease ends at the next call of the store, or soon after.
	Now func() time.Time
}

// Store is a [meta.KV]. Make one with [New].
type Store struct {
	now func() time.Time

	mu        sync.Mutex
	revision  int64  // of the newest write
	compacted int64  // reads below it are refused
	keys      []*key // sorted by name; includes deleted keys with a history
	log       []commit
	watchers  []*watcher // in the order of their opening, which is the order of wake-ups
	leases    map[meta.LeaseID]*lease
	lastLease meta.LeaseID
	due       time.Time // no lease ends before; zero: no lease
	full      bool
	overtakes bool
}

var _ meta.KV = (*Store)(nil)

// key is the history of one key, oldest version first.
type key struct {
	name     string
	versions []version
}

// version is the state of a key at a revision. A create of 0 marks a delete.
type version struct {
	revision, create int64
	value            []byte
	lease            meta.LeaseID
}

// commit has the changes of one revision.
type commit struct {
	revision int64
	events   []meta.Event
}

type lease struct {
	id    meta.LeaseID
	ttl   time.Duration
	ends  time.Time
	timer *time.Timer
	keys  map[string]struct{}
}

// New returns an empty store at revision 1.
func New(o Options) *Store {
	if o.Now == nil {
		o.Now = time.Now
	}
	return &Store{
		now:      o.Now,
		revision: 1,
		leases:   make(map[meta.LeaseID]*lease),
	}
}

// lock locks s.mu for a call under ctx, and ends the leases that are due, so that no caller
// sees a key of an expired lease. On error the mutex is not locked.
func (s *Store) lock(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	s.mu.Lock()
	s.expireLocked()
	return nil
}

// SetFull sets or clears the space alarm. While it is set, lease grants and transactions with
// a put in either branch fail with [meta.ErrNoSpace].
func (s *Store) SetFull(full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.full = full
}

// Overtake makes each watch receive a progress report before the changes that it covers, as
// from a server that reorders them.
func (s *Store) Overtake(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.overtakes = on
}

// Compact removes the history before revision. A repeat is [meta.ErrCompacted]; running
// watches continue.
func (s *Store) Compact(ctx context.Context, revision int64) error {
	if err := s.lock(ctx); err != nil {
		return fmt.Errorf("compact at %d: %w", revision, err)
	}
	defer s.mu.Unlock()
	if err := s.readableLocked(revision); err != nil {
		return fmt.Errorf("compact at %d: %w", revision, err)
	}
	if revision <= s.compacted {
		return fmt.Errorf("compact at %d: %w", revision, meta.ErrCompacted)
	}
	s.compacted = revision
	s.log = slices.DeleteFunc(s.log, func(c commit) bool { return c.revision < revision })
	s.keys = slices.DeleteFunc(s.keys, func(k *key) bool {
		i := k.find(revision)
		if i >= 0 && k.versions[i].create == 0 {
			i++ // a deleted key is unreadable
		}
		if i > 0 {
			k.versions = slices.Delete(k.versions, 0, i)
		}
		return len(k.versions) == 0
	})
	return nil
}

// readableLocked returns an error if the store cannot be read at revision.
func (s *Store) readableLocked(revision int64) error {
	switch {
	case revision < s.compacted:
		return meta.ErrCompacted
	case revision > s.revision:
		return fmt.Errorf("%w: revision %d is in the future", meta.ErrUnavailable, revision)
	}
	return nil
}

// Get implements [meta.KV].
func (s *Store) Get(ctx context.Context, key string) (kv meta.KeyValue, found bool, revision int64, err error) {
	if err := meta.CheckRange(key, ""); err != nil {
		return meta.KeyValue{}, false, 0, err
	}
	if err := s.lock(ctx); err != nil {
		return meta.KeyValue{}, false, 0, fmt.Errorf("get %s: %w", key, err)
	}
	defer s.mu.Unlock()
	kvs, _ := s.readLocked(key, "", s.revision, 1)
	if len(kvs) == 0 {
		return meta.KeyValue{}, false, s.revision, nil
	}
	return kvs[0], true, s.revision, nil
}

// Range implements [meta.KV].
func (s *Store) Range(ctx context.Context, r meta.Range) (meta.RangeResult, error) {
	if err := meta.CheckRange(r.From, r.To); err != nil {
		return meta.RangeResult{}, err
	}
	if err := s.lock(ctx); err != nil {
		return meta.RangeResult{}, fmt.Errorf("range %s: %w", r.From, err)
	}
	defer s.mu.Unlock()
	at := s.revision
	if r.Revision > 0 {
		at = r.Revision
	}
	if err := s.readableLocked(at); err != nil {
		return meta.RangeResult{}, fmt.Errorf("range %s at %d: %w", r.From, at, err)
	}
	kvs, _ := s.readLocked(r.From, r.To, at, 0)
	count := len(kvs)
	if r.Limit > 0 {
		kvs = kvs[:min(r.Limit, count)]
	}
	if r.KeysOnly {
		for i := range kvs {
			kvs[i].Value = nil
		}
	}
	return meta.RangeResult{KVs: kvs, More: len(kvs) < count, Count: int64(count), Revision: s.revision}, nil
}

// Scan implements [meta.KV].
func (s *Store) Scan(ctx context.Context, from, to string, revision int64, fn func([]meta.KeyValue) error) (int64,
	error,
) {
	if err := meta.CheckSpan(from, to); err != nil {
		return 0, err
	}
	for {
		kvs, more, err := s.scanOnce(ctx, from, to, &revision)
		if err != nil {
			return 0, fmt.Errorf("scan %s at %d: %w", from, revision, err)
		}
		if len(kvs) > 0 {
			if err := fn(kvs); err != nil {
				return 0, err
			}
		}
		if !more {
			return revision, nil
		}
		from = kvs[len(kvs)-1].Key + "\x00"
	}
}

// scanOnce reads a batch. It sets an unset revision to the newest.
func (s *Store) scanOnce(
	ctx context.Context, from, to string, revision *int64,
) (kvs []meta.KeyValue, more bool, err error) {
	if err := s.lock(ctx); err != nil {
		return nil, false, err
	}
	defer s.mu.Unlock()
	if *revision <= 0 {
		*revision = s.revision
	}
	if err := s.readableLocked(*revision); err != nil {
		return nil, false, err
	}
	kvs, more = s.readLocked(from, to, *revision, scanBatch)
	return kvs, more, nil
}

// Txn implements [meta.KV].
func (s *Store) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if err := t.Check(); err != nil {
		return meta.TxnResult{}, err
	}
	if err := s.lock(ctx); err != nil {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w", err)
	}
	defer s.mu.Unlock()
	isPut := func(op meta.Op) bool { return op.Kind == meta.OpPut }
	if s.full && (slices.ContainsFunc(t.Then, isPut) || slices.ContainsFunc(t.Else, isPut)) {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w", meta.ErrNoSpace)
	}
	res := meta.TxnResult{Succeeded: !slices.ContainsFunc(t.If, func(c meta.Cond) bool { return !s.holdsLocked(c) })}
	ops := t.Else
	if res.Succeeded {
		ops = t.Then
	}
	for _, op := range ops { // before the first write: transactions are atomic
		if op.Kind == meta.OpPut && op.Lease != 0 && s.leases[op.Lease] == nil {
			return meta.TxnResult{}, fmt.Errorf("put %s under lease %x: %w", op.From, op.Lease, meta.ErrLeaseNotFound)
		}
	}
	next := s.revision + 1
	var events []meta.Event
	for _, op := range ops {
		switch op.Kind {
		case meta.OpPut:
			events = append(events, s.putLocked(op, next))
		case meta.OpDelete:
			events = append(events, s.deleteLocked(op.From, op.To, next)...)
		case meta.OpGet:
			kvs, _ := s.readLocked(op.From, op.To, next, 0)
			res.Ranges = append(res.Ranges, kvs)
		}
	}
	s.commitLocked(events)
	res.Revision = s.revision
	return res, nil
}

// holdsLocked evaluates one compare at the newest revision.
func (s *Store) holdsLocked(c meta.Cond) bool {
	kvs, _ := s.readLocked(c.From, c.To, s.revision, 0)
	if len(kvs) == 0 {
		kvs = []meta.KeyValue{{}}
	}
	return !slices.ContainsFunc(kvs, func(kv meta.KeyValue) bool {
		rev := kv.CreateRevision
		if c.Target == meta.ModRevision {
			rev = kv.ModRevision
		}
		switch c.Op {
		case meta.Equal:
			return rev != c.Revision
		case meta.Less:
			return rev >= c.Revision
		case meta.Greater:
			return rev <= c.Revision
		}
		panic("meta: unchecked compare")
	})
}

// putLocked writes op's key at the uncommitted revision.
func (s *Store) putLocked(op meta.Op, revision int64) meta.Event {
	i := s.search(op.From)
	if i == len(s.keys) || s.keys[i].name != op.From {
		s.keys = slices.Insert(s.keys, i, &key{name: op.From})
	}
	k := s.keys[i]
	v := version{revision: revision, create: revision, lease: op.Lease}
	if len(op.Value) > 0 {
		v.value = slices.Clone(op.Value)
	}
	if n := len(k.versions); n > 0 && k.versions[n-1].create != 0 {
		v.create = k.versions[n-1].create
		s.detachLocked(k.name, k.versions[n-1].lease)
	}
	if l := s.leases[op.Lease]; l != nil {
		l.keys[k.name] = struct{}{}
	}
	k.versions = append(k.versions, v)
	return meta.Event{KV: k.at(len(k.versions) - 1)}
}

// deleteLocked deletes the keys of a range at the uncommitted revision.
func (s *Store) deleteLocked(from, to string, revision int64) []meta.Event {
	var events []meta.Event
	for i := s.search(from); i < len(s.keys) && meta.InRange(s.keys[i].name, from, to); i++ {
		k := s.keys[i]
		last := k.versions[len(k.versions)-1]
		if last.create == 0 {
			continue
		}
		s.detachLocked(k.name, last.lease)
		k.versions = append(k.versions, version{revision: revision})
		events = append(events, meta.Event{Deleted: true, KV: meta.KeyValue{Key: k.name, ModRevision: revision}})
	}
	return events
}

func (s *Store) detachLocked(name string, id meta.LeaseID) {
	if l := s.leases[id]; l != nil {
		delete(l.keys, name)
	}
}

// commitLocked commits events, if any, as the next revision, and notifies the watchers.
func (s *Store) commitLocked(events []meta.Event) {
	if len(events) == 0 {
		return
	}
	s.revision++
	c := commit{s.revision, events}
	s.log = append(s.log, c)
	for _, w := range s.watchers {
		w.addLocked(c)
	}
}

// readLocked returns the keys of a range at revision, at most limit if it is positive, and
// whether more exist.
func (s *Store) readLocked(from, to string, revision int64, limit int) (kvs []meta.KeyValue, more bool) {
	for i := s.search(from); i < len(s.keys) && meta.InRange(s.keys[i].name, from, to); i++ {
		v := s.keys[i].find(revision)
		if v < 0 || s.keys[i].versions[v].create == 0 {
			continue
		}
		if limit > 0 && len(kvs) == limit {
			return kvs, true
		}
		kvs = append(kvs, s.keys[i].at(v))
	}
	return kvs, false
}

// search returns the index of the first key at or after name.
func (s *Store) search(name string) int {
	i, _ := slices.BinarySearchFunc(s.keys, name, func(k *key, name string) int { return strings.Compare(k.name, name) })
	return i
}

// find returns the index of k's version at revision, or -1.
func (k *key) find(revision int64) int {
	i, _ := slices.BinarySearchFunc(k.versions, revision+1, func(v version, r int64) int { return int(v.revision - r) })
	return i - 1
}

// at returns the i-th version of k.
func (k *key) at(i int) meta.KeyValue {
	v := k.versions[i]
	return meta.KeyValue{Key: k.name, Value: v.value, CreateRevision: v.create, ModRevision: v.revision, Lease: v.lease}
}

// Grant implements [meta.KV].
func (s *Store) Grant(ctx context.Context, ttl time.Duration) (meta.LeaseID, error) {
	if err := s.lock(ctx); err != nil {
		return 0, fmt.Errorf("grant lease: %w", err)
	}
	defer s.mu.Unlock()
	if s.full {
		return 0, fmt.Errorf("grant lease: %w", meta.ErrNoSpace)
	}
	ttl = max((ttl + time.Second - 1).Truncate(time.Second), time.Second)
	s.lastLease++
	l := &lease{id: s.lastLease, ttl: ttl, ends: s.now().Add(ttl), keys: make(map[string]struct{})}
	l.timer = time.AfterFunc(ttl, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.expireLocked()
		if s.leases[l.id] == l { // kept alive meanwhile, or Now differs from the timer's clock
			l.timer.Reset(l.ends.Sub(s.now()))
		}
	})
	s.leases[l.id] = l
	if s.due.IsZero() || l.ends.Before(s.due) {
		s.due = l.ends
	}
	return l.id, nil
}

// KeepAlive implements [meta.KV].
func (s *Store) KeepAlive(ctx context.Context, id meta.LeaseID) error {
	if err := s.lock(ctx); err != nil {
		return fmt.Errorf("keep lease %x alive: %w", id, err)
	}
	defer s.mu.Unlock()
	l := s.leases[id]
	if l == nil {
		return fmt.Errorf("keep lease %x alive: %w", id, meta.ErrLeaseNotFound)
	}
	l.ends = s.now().Add(l.ttl)
	return nil
}

// Revoke implements [meta.KV].
func (s *Store) Revoke(ctx context.Context, id meta.LeaseID) error {
	if err := s.lock(ctx); err != nil {
		return fmt.Errorf("revoke lease %x: %w", id, err)
	}
	defer s.mu.Unlock()
	if l := s.leases[id]; l != nil {
		s.endLocked(l)
	}
	return nil
}

// endLocked ends a lease and deletes its keys in one revision.
func (s *Store) endLocked(l *lease) {
	l.timer.Stop()
	delete(s.leases, l.id)
	var events []meta.Event
	for name := range l.keys {
		events = append(events, s.deleteLocked(name, "", s.revision+1)...)
	}
	slices.SortFunc(events, func(a, b meta.Event) int { return strings.Compare(a.KV.Key, b.KV.Key) })
	s.commitLocked(events)
}

// expireLocked ends every due lease, the oldest first.
func (s *Store) expireLocked() {
	now := s.now()
	if s.due.IsZero() || now.Before(s.due) {
		return
	}
	var expired []*lease
	s.due = time.Time{}
	for _, l := range s.leases {
		switch {
		case !now.Before(l.ends):
			expired = append(expired, l)
		case s.due.IsZero() || l.ends.Before(s.due):
			s.due = l.ends
		}
	}
	slices.SortFunc(expired, func(a, b *lease) int {
		if c := a.ends.Compare(b.ends); c != 0 {
			return c
		}
		return int(a.id - b.id)
	})
	for _, l := range expired {
		s.endLocked(l)
	}
}
