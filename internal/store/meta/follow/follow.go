// Package follow keeps a copy of a range of a [meta.KV] up to date, and tells
// when it is good enough to answer a read.
//
// A [Follower] reads the range at one revision and hands it to its [Handler],
// then watches from there. When the watch cannot go on it does both again. So
// the handler is always at some revision of the store, whole, and only ever goes
// forward; how far behind it may be nobody knows, unless they ask:
// [Follower.Sync] learns the newest revision from the store and waits for the
// handler to get there. What is read from the copy after that is as fresh as a
// read of the store itself would have been when Sync was called.
//
//	the watch ends with   | the copy                      | Sync
//	no answer, compacted  | stays as good as it was       | waits for what is newer
//	ErrWatchBroken        | lacks what it claims to have  | waits for the copy that is read next
package follow

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// askEvery is how long an unanswered request for progress is waited for.
const askEvery = 50 * time.Millisecond

// Handler holds the copy. Its methods are called one at a time, by Run, and hold
// it up while they run; readers of the copy are its own business.
type Handler interface {
	// Reset replaces the copy by kvs, in key order, as they are at revision. The
	// handler may keep the slice.
	Reset(kvs []meta.KeyValue, revision int64)
	// Apply takes the copy on to revision. events hold whole revisions, in
	// order, and may be empty.
	Apply(events []meta.Event, revision int64)
}

// Options configure a [Follower].
type Options struct {
	KV       meta.KV        // required
	From, To string         // the range
	Handler  Handler        // required
	Log      *zap.Logger    // default: none
	Rand     func() float64 // in [0, 1), spreads retries; default that of [meta.Backoff]
}

// Follower follows a range. Make one with [New].
type Follower struct {
	o    Options
	wake chan struct{} // size one; a Sync wants more than has been applied

	mu      sync.Mutex
	applied int64
	wanted  int64         // the highest that a Sync waits for
	moved   chan struct{} // closed and replaced when applied changes or Run ends
	ended   bool
}

// New returns a follower that does nothing until it is run.
func New(o Options) *Follower {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	return &Follower{o: o, wake: make(chan struct{}, 1), moved: make(chan struct{})}
}

// Run follows until ctx ends, and then returns nil. Trouble is logged, and
// followed by another try after a pause. Run must be called once.
func (f *Follower) Run(ctx context.Context) error {
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ended = true
		close(f.moved)
		f.moved = make(chan struct{})
	}()
	backoff := meta.Backoff{Rand: f.o.Rand}
	failing := lasting.New(time.Now).Add(f.o.Log, "follow", "following failed and starts over", "")
	good := func() {
		backoff.Reset()
		failing.Passed()
	}
	for {
		err := f.follow(ctx, good)
		if ctx.Err() != nil {
			return nil
		}
		failing.Failed(err, zap.String("key", f.o.From), zap.Int64("revision", f.Revision()))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

// follow reads the range once and then watches it until that fails. It calls
// good for every step that worked.
func (f *Follower) follow(ctx context.Context, good func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var kvs []meta.KeyValue
	revision, err := f.o.KV.Scan(ctx, f.o.From, f.o.To, 0, func(batch []meta.KeyValue) error {
		kvs = append(kvs, batch...)
		return nil
	})
	if err != nil {
		return err
	}
	f.o.Handler.Reset(kvs, revision)
	kvs = nil // the handler's; not to be held for as long as the watch goes on
	f.advance(revision)

	w := f.o.KV.Watch(ctx, f.o.From, f.o.To, revision)
	var asking sync.WaitGroup
	defer asking.Wait()
	defer cancel()
	asking.Go(func() { f.ask(ctx, w) })
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrWatchBroken) {
			f.advance(0) // what the copy may lack it lacks already: Sync waits for the next one
		}
		if err != nil {
			return err
		}
		f.o.Handler.Apply(b.Events, b.Revision)
		f.advance(b.Revision)
		good()
	}
}

// ask requests progress of w for as long as a Sync waits for it.
func (f *Follower) ask(ctx context.Context, w meta.Watcher) {
	timer := time.NewTimer(askEvery)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		}
		if !f.behind() {
			continue // until the next Sync wakes us
		}
		// A request that fails or is dropped is made again, and a watch that is
		// broken shows in Next.
		_ = w.Progress(ctx)
		timer.Reset(askEvery)
	}
}

func (f *Follower) behind() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied < f.wanted
}

// advance notes that the handler has got to revision.
func (f *Follower) advance(revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applied = revision
	close(f.moved)
	f.moved = make(chan struct{})
}

// Revision returns the revision that the handler has got to; 0 before the first
// Reset, and while the copy may lack something.
func (f *Follower) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied
}

// Sync returns when the handler has got to the revision that the store had when
// Sync was called, or beyond, and returns where it is. Before Run has begun, and
// while the store cannot be watched, it waits for as long as ctx allows. After
// Run has ended, and when the store does not answer, the error wraps
// [meta.ErrUnavailable].
func (f *Follower) Sync(ctx context.Context) (revision int64, err error) {
	_, _, newest, err := f.o.KV.Get(ctx, f.o.From)
	if err != nil {
		return 0, fmt.Errorf("sync: %w", err)
	}
	for {
		f.mu.Lock()
		applied, moved, ended := f.applied, f.moved, f.ended
		f.wanted = max(f.wanted, newest)
		f.mu.Unlock()
		switch {
		case applied >= newest:
			return applied, nil
		case ended:
			return 0, fmt.Errorf("sync: %w: following has ended", meta.ErrUnavailable)
		}
		select {
		case f.wake <- struct{}{}:
		default:
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return 0, fmt.Errorf("sync at %d, waiting for %d: %w", applied, newest, ctx.Err())
		}
	}
}
