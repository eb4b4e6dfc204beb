package manager

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// The feed is the single watch of the metadata store that all event readers of a
// replica share. It starts with the first reader and lasts as long as the replica.
//
//	head      the feed has received everything up to this revision
//	ring      the newest events, of whole revisions, bounded in number and bytes
//	floor     every event after this revision, up to head, is in the ring
//
// A reader has a revision. It is
//
//	reading   its revision is below head: it reads its events from the ring
//	idle      it has all events up to head. Changes that do not concern it do not wake
//	          it, and its revision advances with head
//	late      its revision is below floor, because it resumes from an old revision or
//	          reads slowly: it reads from a watch of its own, a bounded number of
//	          events at a time, until it reaches floor. At most lateReaders readers
//	          do so at once
//
// The feed filters events before it wakes a reader: a reader that is restricted to one
// collection is not woken by events of others.
//
//	watch lost                  the store's client opens it again; if that fails, the
//	                            feed watches from head and keeps its ring
//	head was compacted          the ring is emptied and the feed starts at the newest
//	                            revision; each reader is late
//	store contradicts an        each reader ends, because events may be missing; the
//	earlier answer              feed starts at the newest revision
//	a late reader is compacted  its watch ends: ErrEventsCompacted
//	record is unreadable        it is logged, by each late reader again, and skipped
//	replica ends                each reader ends: the error wraps meta.ErrUnavailable

// Bounds of a feed.
const (
	ringEvents = 1024
	ringBytes  = 16 << 20 // of the records as stored
	// readEvents is the number of events that a reader takes at a time, or those of one
	// revision if they are more.
	readEvents = 512
	// lateReaders is the maximum number of readers with a watch of their own.
	lateReaders = 16
)

type feed struct {
	kv     meta.KV
	log    *zap.Logger
	rand   func() float64
	decode func([]meta.Event) []Event
	events int // bounds of the ring
	bytes  int

	begin chan struct{} // size one; signals the first reader
	ask   chan struct{} // size one; signals that wanted is above head
	late  chan struct{} // semaphore of late readers

	mu      sync.Mutex
	live    bool          // head and floor are valid
	ended   bool          // Run has ended
	changed chan struct{} // closed when live or ended changes
	head    int64
	floor   int64
	wanted  int64
	ring    []entry
	totals  entryTotals
	readers map[int64]map[*reader]struct{} // by collection; 0: all
	markAt  int64                          // minimum wakeAt of the idle readers
}

// entry holds the events of one batch of changes.
type entry struct {
	events   []Event
	revision int64 // of the batch; not below those of its events
	bytes    int
}

type entryTotals struct{ events, bytes int }

// reader is one reader of a feed.
type reader struct {
	collection int64         // 0: all
	wake       chan struct{} // size one

	// Guarded by feed.mu.
	at     int64 // its revision; while idle it is head if that is higher
	idle   bool
	wakeAt int64 // revision at which an idle reader is woken
	err    error // ends the reader
}

func newFeed(kv meta.KV, log *zap.Logger, rand func() float64, decode func([]meta.Event) []Event) *feed {
	return &feed{
		kv: kv, log: log, rand: rand, decode: decode, events: ringEvents, bytes: ringBytes,
		begin: make(chan struct{}, 1), ask: make(chan struct{}, 1), late: make(chan struct{}, lateReaders),
		changed: make(chan struct{}), readers: map[int64]map[*reader]struct{}{}, markAt: math.MaxInt64,
	}
}

// Run watches the store from the first reader until ctx ends. It must be called once.
func (f *feed) Run(ctx context.Context) error {
	defer f.end()
	select {
	case <-ctx.Done():
		return nil
	case <-f.begin:
	}
	backoff := meta.Backoff{Rand: f.rand}
	for {
		err := f.follow(ctx, backoff.Reset)
		if ctx.Err() != nil {
			return nil
		}
		f.log.Warn("watch of events failed, retrying", zap.Error(err))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

func (f *feed) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.signal()
	f.forEachReader(func(r *reader) { f.notify(r) })
}

// signal wakes the calls that wait for a change of live or ended. The lock must be held.
func (f *feed) signal() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// follow watches the store until the watch fails. It calls onProgress after each batch.
func (f *feed) follow(ctx context.Context, onProgress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	f.mu.Lock()
	live, head := f.live, f.head
	f.mu.Unlock()
	if !live {
		var err error
		if _, _, head, err = f.kv.Get(ctx, keys.Format); err != nil {
			return err
		}
		f.start(head)
	}
	from, to := keys.All()
	w := f.kv.Watch(ctx, from, to, head)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() { f.requestWanted(ctx, w) })
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) || errors.Is(err, meta.ErrWatchBroken) {
			f.empty(err)
		}
		if err != nil {
			return err
		}
		f.append(b)
		onProgress()
	}
}

// requestWanted requests the progress of the watch while wanted is above head.
func (f *feed) requestWanted(ctx context.Context, w meta.Watcher) {
	ticker := time.NewTicker(progressInterval)
	defer ticker.Stop()
	for {
		for f.isWanted() {
			// A failed or dropped request is repeated; a broken watch shows in Next.
			_ = w.Progress(ctx)
			select {
			case <-ctx.Done():
				return
			case <-f.ask:
			case <-ticker.C:
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-f.ask:
		}
	}
}

func (f *feed) isWanted() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.head < f.wanted
}

// start sets the feed to an empty ring at head.
func (f *feed) start(head int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live, f.head, f.floor = true, head, head
	f.signal()
}

// empty empties the ring and makes the feed start again, because it missed events after
// head. After ErrWatchBroken events before head may be missing too: the readers end.
func (f *feed) empty(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live, f.ring, f.totals = false, nil, entryTotals{}
	f.signal()
	f.forEachReader(func(r *reader) {
		if errors.Is(err, meta.ErrWatchBroken) {
			r.err = err
		}
		f.markReading(r, f.head)
		f.notify(r)
	})
}

// append adds a batch of changes to the ring and wakes the readers that it concerns.
func (f *feed) append(b meta.WatchBatch) {
	e := entry{events: f.decode(b.Events), revision: b.Revision}
	for i := range b.Events {
		e.bytes += len(b.Events[i].KV.Value)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	before := f.head
	f.head = b.Revision
	if len(e.events) > 0 {
		f.ring = append(f.ring, e)
		f.totals.events += len(e.events)
		f.totals.bytes += e.bytes
		f.trim()
		for collection := range f.affected(e.events) {
			for r := range f.readers[collection] {
				f.markReading(r, before)
				f.notify(r)
			}
		}
	}
	if f.head < f.markAt {
		return
	}
	f.markAt = math.MaxInt64
	f.forEachReader(func(r *reader) {
		switch {
		case r.idle && r.wakeAt <= f.head:
			f.notify(r)
		case r.idle:
			f.markAt = min(f.markAt, r.wakeAt)
		}
	})
}

// affected returns the collections whose readers get some of the events; 0 stands for
// unrestricted readers. The lock must be held.
func (f *feed) affected(events []Event) map[int64]struct{} {
	collections := map[int64]struct{}{0: {}}
	for i := range events {
		ids, all := events[i].concerns()
		if all {
			for collection := range f.readers {
				collections[collection] = struct{}{}
			}
			return collections
		}
		for _, id := range ids {
			collections[id] = struct{}{}
		}
	}
	return collections
}

// trim removes the oldest entries until the ring is within its bounds or has one entry.
// The lock must be held.
func (f *feed) trim() {
	n := 0
	for n < len(f.ring)-1 && (f.totals.events > f.events || f.totals.bytes > f.bytes) {
		f.totals.events -= len(f.ring[n].events)
		f.totals.bytes -= f.ring[n].bytes
		f.floor = f.ring[n].revision
		f.ring[n] = entry{}
		n++
	}
	f.ring = f.ring[n:]
}

// forEachReader calls fn with each reader. The lock must be held.
func (f *feed) forEachReader(fn func(*reader)) {
	for _, readers := range f.readers {
		for r := range readers {
			fn(r)
		}
	}
}

// markReading ends the idle state of r, whose revision becomes at least revision. The
// lock must be held.
func (f *feed) markReading(r *reader, revision int64) {
	if r.idle {
		r.idle, r.at = false, max(r.at, revision)
	}
}

func (f *feed) notify(r *reader) {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// join adds a reader that has everything up to revision after.
func (f *feed) join(after, collection int64) *reader {
	r := &reader{collection: max(collection, 0), wake: make(chan struct{}, 1), at: after}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.readers[r.collection] == nil {
		f.readers[r.collection] = map[*reader]struct{}{}
	}
	f.readers[r.collection][r] = struct{}{}
	select {
	case f.begin <- struct{}{}:
	default:
	}
	return r
}

func (f *feed) leave(r *reader) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.readers[r.collection], r)
	if len(f.readers[r.collection]) == 0 {
		delete(f.readers, r.collection)
	}
}

// wantProgress makes the feed request progress until it reaches revision.
func (f *feed) wantProgress(revision int64) {
	f.mu.Lock()
	f.wanted = max(f.wanted, revision)
	f.mu.Unlock()
	select {
	case f.ask <- struct{}{}:
	default:
	}
}

// next waits for events that concern r, and returns them with the new revision of r.
// Without events it returns once that revision is at least wakeAt.
func (f *feed) next(ctx context.Context, r *reader, wakeAt int64) ([]Event, int64, error) {
	for {
		f.mu.Lock()
		live, ended, changed := f.live, f.ended, f.changed
		if r.err != nil {
			f.mu.Unlock()
			return nil, 0, fmt.Errorf("watch events: %w", r.err)
		}
		if ended {
			f.mu.Unlock()
			return nil, 0, fmt.Errorf("watch events: %w: this replica is stopping", meta.ErrUnavailable)
		}
		if !live {
			f.mu.Unlock()
			select {
			case <-ctx.Done():
				return nil, 0, ctx.Err()
			case <-changed:
			}
			continue
		}
		f.markReading(r, f.head)
		if r.at < f.floor {
			f.mu.Unlock()
			return f.catchUp(ctx, r)
		}
		var events []Event
		events, r.at = f.take(r)
		if len(events) > 0 || r.at >= wakeAt {
			at := r.at
			f.mu.Unlock()
			return events, at, nil
		}
		r.idle, r.wakeAt = true, wakeAt
		f.markAt = min(f.markAt, wakeAt)
		f.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil, 0, ctx.Err()
		case <-r.wake:
		}
	}
}

// take returns events of the ring that concern r, and the new revision of r. The lock
// must be held.
func (f *feed) take(r *reader) (events []Event, at int64) {
	first := sort.Search(len(f.ring), func(i int) bool { return f.ring[i].revision > r.at })
	for i := first; i < len(f.ring); i++ {
		events = appendConcerning(events, f.ring[i].events, r)
		if len(events) >= readEvents {
			return events, f.ring[i].revision
		}
	}
	return events, max(r.at, f.head)
}

// appendConcerning appends the events that concern r and are after its revision: an
// entry of the ring may hold several revisions.
func appendConcerning(to, from []Event, r *reader) []Event {
	for i := range from {
		if from[i].Revision <= r.at {
			continue
		}
		if ids, all := from[i].concerns(); r.collection == 0 || all || slices.Contains(ids, r.collection) {
			to = append(to, from[i])
		}
	}
	return to
}

// catchUp reads events for a late reader from a watch of its own.
func (f *feed) catchUp(ctx context.Context, r *reader) ([]Event, int64, error) {
	select {
	case <-ctx.Done():
		return nil, 0, ctx.Err()
	case f.late <- struct{}{}:
	}
	defer func() { <-f.late }()
	f.mu.Lock()
	at, floor := r.at, f.floor
	f.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	from, to := keys.All()
	w := f.kv.Watch(ctx, from, to, at)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() { requestProgress(ctx, w) })
	var events []Event
	for at < floor && len(events) < readEvents {
		b, err := w.Next()
		if err != nil {
			return nil, 0, err
		}
		events = appendConcerning(events, f.decode(b.Events), r)
		at = b.Revision
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	r.at = at
	return events, at, nil
}

// concerns returns the collections whose readers get e; all means every reader.
func (e *Event) concerns() (ids []int64, all bool) {
	switch {
	case e.Collection != nil:
		return []int64{e.Collection.ID}, false
	case e.Snapshot != nil && e.Type != Deleted:
		return []int64{e.Snapshot.Collection}, false
	case e.Tombstone != nil:
		return []int64{e.Tombstone.Collection}, false
	case e.Restore != nil && e.Type != Deleted:
		return []int64{e.Restore.Source, e.Restore.Target}, false
	}
	return nil, true
}
