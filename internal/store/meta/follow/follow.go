// Package follow maintains a copy of a range of a [meta.KV], and reports when it is current
// enough for a read.
//
// A [Follower] reads the range at one revision, passes it to its [Handler], and then watches
// from that revision. If the watch ends, it repeats both. So the handler always has the
// whole range at one revision of the store, which only increases. The lag of the copy is
// unknown until [Follower.Sync] reads the newest revision from the store and waits for the
// handler to reach it. A read of the copy after Sync is as current as a read of the store at
// the call of Sync.
//
//	the watch ends with   | the copy                       | Sync
//	no reply, compacted   | stays valid at its revision    | waits for a newer revision
//	ErrWatchBroken        | lacks changes of its revision  | waits for the next full read
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

// progressInterval is the time between two progress requests.
const progressInterval = 50 * time.Millisecond

// Handler has the copy. Run calls its methods sequentially and waits for them. The handler
// synchronizes the readers of the copy.
type Handler interface {
	// Reset replaces the copy by kvs, in key order, at revision. The handler may keep the
	// slice.
	Reset(kvs []meta.KeyValue, revision int64)
	// Apply advances the copy to revision. events are whole revisions in order, and may
	// be empty.
	Apply(events []meta.Event, revision int64)
}

// Options configure a [Follower].
type Options struct {
	KV       meta.KV        // required
	From, To string         // the range
	Handler  Handler        // required
	Log      *zap.Logger    // default: none
	Rand     func() float64 // in [0, 1), spreads retries; default that of [meta.Backoff]
	// Problems receives repeated failures, as "follow" and Name. Default: a new list.
	Problems *lasting.Problems
	Name     string // of the range, unique among the followers with the same Problems
}

// Follower follows a range. Make one with [New].
type Follower struct {
	o       Options
	failing *lasting.Problem
	wake    chan struct{} // size one; a Sync waits for a revision that is not applied

	mu      sync.Mutex
	applied int64
	wanted  int64         // the highest revision that a Sync waits for
	changed chan struct{} // closed and replaced when applied changes or Run ends
	ended   bool
}

// New returns a follower, which is inactive until Run.
func New(o Options) *Follower {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.Problems == nil {
		o.Problems = lasting.New(time.Now)
	}
	return &Follower{
		o: o, wake: make(chan struct{}, 1), changed: make(chan struct{}),
		failing: o.Problems.Add(o.Log, "follow "+o.Name, "following failed, restarting", ""),
	}
}

// Run follows until ctx ends, and then returns nil. Errors are logged and retried after a
// pause. Run must be called once.
func (f *Follower) Run(ctx context.Context) error {
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ended = true
		close(f.changed)
		f.changed = make(chan struct{})
	}()
	backoff := meta.Backoff{Rand: f.o.Rand}
	succeeded := func() {
		backoff.Reset()
		f.failing.Passed()
	}
	for {
		err := f.follow(ctx, succeeded)
		if ctx.Err() != nil {
			return nil
		}
		f.failing.Failed(err, zap.String("key", f.o.From), zap.Int64("revision", f.Revision()))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

// follow reads the range once and then watches it until the watch fails. It calls succeeded
// after every applied batch.
func (f *Follower) follow(ctx context.Context, succeeded func()) error {
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
	kvs = nil // owned by the handler; must not be retained during the watch
	f.advance(revision)
	defer f.failing.Settle()() // an unchanged range has no batches

	w := f.o.KV.Watch(ctx, f.o.From, f.o.To, revision)
	var requests sync.WaitGroup
	defer requests.Wait()
	defer cancel()
	requests.Go(func() { f.requestProgress(ctx, w) })
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrWatchBroken) {
			f.advance(0) // the copy may lack changes: Sync must wait for the next full read
		}
		if err != nil {
			return err
		}
		f.o.Handler.Apply(b.Events, b.Revision)
		f.advance(b.Revision)
		succeeded()
	}
}

// requestProgress requests progress of w while a Sync waits for it.
func (f *Follower) requestProgress(ctx context.Context, w meta.Watcher) {
	timer := time.NewTimer(progressInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		case <-timer.C:
		}
		if !f.lagging() {
			continue // until the next Sync
		}
		// A failed or dropped request is repeated. Next returns the error of a broken
		// watch.
		_ = w.Progress(ctx)
		timer.Reset(progressInterval)
	}
}

func (f *Follower) lagging() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied < f.wanted
}

// advance records that the handler has reached revision.
func (f *Follower) advance(revision int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applied = revision
	close(f.changed)
	f.changed = make(chan struct{})
}

// Revision returns the revision that the handler has reached; 0 before the first Reset, and
// while the copy may lack changes.
func (f *Follower) Revision() int64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied
}

// Sync waits until the handler has reached at least the store's revision at the call, and
// returns the handler's revision. Before Run, and while the store cannot be watched, it
// waits until ctx ends. After the end of Run, and if the store is unavailable, the error
// wraps [meta.ErrUnavailable].
func (f *Follower) Sync(ctx context.Context) (revision int64, err error) {
	_, _, newest, err := f.o.KV.Get(ctx, f.o.From)
	if err != nil {
		return 0, fmt.Errorf("sync: %w", err)
	}
	for {
		f.mu.Lock()
		applied, changed, ended := f.applied, f.changed, f.ended
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
		case <-changed:
		case <-ctx.Done():
			return 0, fmt.Errorf("sync at %d, waiting for %d: %w", applied, newest, ctx.Err())
		}
	}
}
