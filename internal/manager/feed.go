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

// The feed is the one watch of the metadata store that all readers of events of a
// replica share. It begins with the first reader and lasts as long as the replica.
//
//	head      the feed has seen everything up to this revision
//	ring      the newest events, of whole revisions, bounded in number and bytes
//	floor     every event after this revision, up to head, is in the ring
//
// A reader stands at a revision. It is
//
//	reading   its revision is below head: it takes what concerns it from the ring
//	idle      it has all up to head. Changes that do not concern it do not wake it,
//	          and its revision moves with head
//	late      its revision is below floor, because it resumes from long ago or
//	          reads slowly: it reads on by a watch of its own, a bounded number of
//	          events at a time, until it is at floor. So many readers do that at
//	          once, for no longer than the store takes
//
// What concerns a reader is decided before it is woken: one that is restricted to a
// collection sleeps through the events of others.
//
//	watch lost                  the store's client opens it again; when that gives up,
//	                            the feed watches from head, with its ring
//	head was compacted          the ring is emptied and the feed begins at the newest
//	                            revision; each reader is late
//	the store contradicts what  each reader ends: what it got may lack events;
//	it said                     the feed begins at the newest revision
//	a late reader is compacted  its watch ends: ErrEventsCompacted
//	record is unreadable        it is logged, once, and left out
//	replica ends                each reader ends: the error wraps meta.ErrUnavailable

// Bounds of a feed.
const (
	ringEvents = 8192
	ringBytes  = 16 << 20 // of the records as stored
	// readEvents is how many events a reader takes at a time, or those of one
	// revision when they are more.
	readEvents = 512
	// lateReaders is how many readers watch the store themselves at once.
	lateReaders = 16
)

type feed struct {
	kv     meta.KV
	log    *zap.Logger
	rand   func() float64
	decode func([]meta.Event) []Event
	events int // bounds of the ring
	bytes  int

	begin chan struct{} // size one; there is a reader
	ask   chan struct{} // size one; wanted is above head
	late  chan struct{} // one for each late reader that reads

	mu      sync.Mutex
	live    bool          // head and floor stand
	ended   bool          // Run has ended
	changed chan struct{} // closed when one of these changes
	head    int64
	floor   int64
	wanted  int64
	ring    []entry
	held    entryTotals
	readers map[int64]map[*reader]struct{} // by collection; 0: all
	markAt  int64                          // the lowest wakeAt of idle readers
}

// entry is what one batch of changes holds that readers get.
type entry struct {
	events   []Event
	revision int64 // of the batch; the events' are not above it
	bytes    int
}

type entryTotals struct{ events, bytes int }

// reader is one reader of a feed.
type reader struct {
	collection int64         // 0: all
	wake       chan struct{} // size one

	// Under feed.mu.
	at     int64 // the revision it stands at; while idle, if that is higher, it is head
	idle   bool
	wakeAt int64 // an idle reader is woken at this revision
	err    error // ends it
}

func newFeed(kv meta.KV, log *zap.Logger, rand func() float64, decode func([]meta.Event) []Event) *feed {
	return &feed{
		kv: kv, log: log, rand: rand, decode: decode, events: ringEvents, bytes: ringBytes,
		begin: make(chan struct{}, 1), ask: make(chan struct{}, 1), late: make(chan struct{}, lateReaders),
		changed: make(chan struct{}), readers: map[int64]map[*reader]struct{}{}, markAt: math.MaxInt64,
	}
}

// Run follows the store, from the first reader on until ctx ends. It must be called
// once.
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
		f.log.Warn("the watch of events ended and is opened again", zap.Error(err))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

func (f *feed) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ended = true
	f.change()
	f.each(func(r *reader) { f.rouse(r) })
}

// change wakes those who wait for live or ended. The lock must be held.
func (f *feed) change() {
	close(f.changed)
	f.changed = make(chan struct{})
}

// follow watches the store until that fails. It calls good for every step that
// worked.
func (f *feed) follow(ctx context.Context, good func()) error {
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
	asking.Go(func() { f.askWanted(ctx, w) })
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) || errors.Is(err, meta.ErrWatchBroken) {
			f.empty(err)
		}
		if err != nil {
			return err
		}
		f.append(b)
		good()
	}
}

// askWanted asks how far the watch has come while a reader wants to know.
func (f *feed) askWanted(ctx context.Context, w meta.Watcher) {
	ticker := time.NewTicker(askEvery)
	defer ticker.Stop()
	for {
		for f.isWanted() {
			// A request that fails or is dropped is made again, and a watch that is
			// broken shows in Next.
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

// start has the feed begin at head.
func (f *feed) start(head int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live, f.head, f.floor = true, head, head
	f.change()
}

// empty has the feed begin again, for events after head are lost to it. After an
// ErrWatchBroken those before head may be as well, which ends its readers.
func (f *feed) empty(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.live, f.ring, f.held = false, nil, entryTotals{}
	f.change()
	f.each(func(r *reader) {
		if errors.Is(err, meta.ErrWatchBroken) {
			r.err = err
		}
		f.unsettle(r, f.head)
		f.rouse(r)
	})
}

// append takes the feed on by a batch of changes, and wakes the readers that it
// concerns.
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
		f.held.events += len(e.events)
		f.held.bytes += e.bytes
		f.trim()
		for collection := range f.concerned(e.events) {
			for r := range f.readers[collection] {
				f.unsettle(r, before)
				f.rouse(r)
			}
		}
	}
	if f.head < f.markAt {
		return
	}
	f.markAt = math.MaxInt64
	f.each(func(r *reader) {
		switch {
		case r.idle && r.wakeAt <= f.head:
			f.rouse(r)
		case r.idle:
			f.markAt = min(f.markAt, r.wakeAt)
		}
	})
}

// concerned returns whose readers events concern. The lock must be held.
func (f *feed) concerned(events []Event) map[int64]struct{} {
	whose := map[int64]struct{}{0: {}}
	for i := range events {
		ids, all := events[i].concerns()
		if all {
			for collection := range f.readers {
				whose[collection] = struct{}{}
			}
			return whose
		}
		for _, id := range ids {
			whose[id] = struct{}{}
		}
	}
	return whose
}

// trim keeps the ring within its bounds, but for the newest entry. The lock must be
// held.
func (f *feed) trim() {
	n := 0
	for n < len(f.ring)-1 && (f.held.events > f.events || f.held.bytes > f.bytes) {
		f.held.events -= len(f.ring[n].events)
		f.held.bytes -= f.ring[n].bytes
		f.floor = f.ring[n].revision
		f.ring[n] = entry{}
		n++
	}
	f.ring = f.ring[n:]
}

// each calls fn with each reader. The lock must be held.
func (f *feed) each(fn func(*reader)) {
	for _, readers := range f.readers {
		for r := range readers {
			fn(r)
		}
	}
}

// unsettle has r, if it is idle, stand at revision. The lock must be held.
func (f *feed) unsettle(r *reader, revision int64) {
	if r.idle {
		r.idle, r.at = false, max(r.at, revision)
	}
}

func (f *feed) rouse(r *reader) {
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

// want has the feed ask the store for progress until it is at revision.
func (f *feed) want(revision int64) {
	f.mu.Lock()
	f.wanted = max(f.wanted, revision)
	f.mu.Unlock()
	select {
	case f.ask <- struct{}{}:
	default:
	}
}

// next waits for events that concern r, and returns them with the revision up to
// which r then has everything. Without events it returns when that revision is
// wakeAt or more.
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
			return nil, 0, fmt.Errorf("watch events: %w: following has ended", meta.ErrUnavailable)
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
		f.unsettle(r, f.head)
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

// take returns events of the ring that concern r, and where r stands then. The lock
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

// appendConcerning appends the events that concern r and that it does not have: an
// entry of the ring may hold several revisions, and r stand at one of them.
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

// catchUp reads on for a reader that the ring is too new for.
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
	asking.Go(func() { askProgress(ctx, w) })
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

// concerns returns the collections whose readers get e, or that all are.
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
