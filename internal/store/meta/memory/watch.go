package memory

import (
	"context"
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// watcher queues the events for Next. As in etcd, the queue is unbounded, and a compaction
// does not remove events from it.
type watcher struct {
	store    *Store
	ctx      context.Context //nolint:containedctx // the contract: a watch ends with the context it was opened with
	from, to string
	wake     chan struct{} // size one; wakes Next

	// Under store.mu.
	err       error // final
	delivered int64 // the revision of Next's last batch
	pending   meta.WatchBatch
	overtaken bool // the pending revision precedes its events: the watch ends after it
}

// Watch implements [meta.KV].
func (s *Store) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	after = max(after, 0)
	w := &watcher{
		store: s, ctx: ctx, from: from, to: to, wake: make(chan struct{}, 1),
		delivered: after, pending: meta.WatchBatch{Revision: after},
	}
	if w.err = meta.CheckSpan(from, to); w.err != nil {
		return w
	}
	if w.err = s.lock(ctx); w.err != nil {
		return w
	}
	defer s.mu.Unlock()
	if after+1 < s.compacted {
		w.err = fmt.Errorf("watch %s after %d: %w", from, after, meta.ErrCompacted)
		return w
	}
	for _, c := range s.log {
		w.addLocked(c)
	}
	s.watchers = append(s.watchers, w)
	context.AfterFunc(ctx, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watchers = slices.DeleteFunc(s.watchers, func(other *watcher) bool { return other == w })
	})
	return w
}

// addLocked queues the changes of c in the watcher's range.
func (w *watcher) addLocked(c commit) {
	if c.revision <= w.pending.Revision || w.overtaken {
		return
	}
	inRange := func(ev meta.Event) bool { return meta.InRange(ev.KV.Key, w.from, w.to) }
	if w.store.overtakes && slices.ContainsFunc(c.events, inRange) {
		w.pending.Revision, w.overtaken = c.revision, true
		w.wakeUp()
		return
	}
	for _, ev := range c.events {
		if inRange(ev) {
			w.pending.Events = append(w.pending.Events, ev)
			w.pending.Revision = c.revision
		}
	}
	if w.pending.Revision == c.revision {
		w.wakeUp()
	}
}

func (w *watcher) wakeUp() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// Next implements [meta.Watcher].
func (w *watcher) Next() (meta.WatchBatch, error) {
	for {
		if err := w.ctx.Err(); err != nil {
			return meta.WatchBatch{}, fmt.Errorf("watch %s: %w", w.from, err)
		}
		if b, ok, err := w.take(); ok || err != nil {
			return b, err
		}
		select {
		case <-w.ctx.Done():
		case <-w.wake:
		}
	}
}

// take returns the pending batch, if any.
func (w *watcher) take() (b meta.WatchBatch, ok bool, err error) {
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	if w.err != nil {
		return meta.WatchBatch{}, false, w.err
	}
	if w.pending.Revision == w.delivered {
		if w.overtaken {
			w.err = fmt.Errorf("watch %s after %d: %w", w.from, w.delivered, meta.ErrWatchBroken)
		}
		return meta.WatchBatch{}, false, w.err
	}
	b = w.pending
	w.pending.Events = nil
	w.delivered = b.Revision
	return b, true, nil
}

// Progress implements [meta.Watcher].
func (w *watcher) Progress(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("watch %s: %w", w.from, err)
	}
	w.store.mu.Lock()
	defer w.store.mu.Unlock()
	w.store.expireLocked()
	if w.store.revision > w.pending.Revision && !w.overtaken {
		w.pending.Revision = w.store.revision
		w.wakeUp()
	}
	return nil
}
