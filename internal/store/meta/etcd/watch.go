package etcd

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// watcher reads one watch of etcd's client, and opens it again behind the last
// revision it has delivered whenever it breaks.
//
// Each has streams of its own: a progress request is answered only when all
// watches of a stream have caught up, and a broken stream ends them all.
//
// A batch holds whole revisions because etcd's answers do: the server cuts a
// catch-up at the end of a revision only, and sends what one commit changed in
// one answer; an answer that is too long for one message comes in fragments,
// which the client joins before it hands them on. When it loses the connection
// in between it drops them, and resumes after the last whole answer.
type watcher struct {
	c        *Client
	ctx      context.Context //nolint:containedctx // the contract: a watch ends with the context it was opened with
	from, to string
	streams  clientv3.Watcher
	backoff  meta.Backoff

	// Of Next alone.
	ch   clientv3.WatchChan
	last int64 // all at or before it has been delivered
	err  error // final
}

// Watch implements [meta.KV].
func (c *Client) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	w := &watcher{
		c: c, ctx: ctx, from: from, to: to, last: max(after, 0),
		backoff: meta.Backoff{Max: time.Second},
	}
	if w.err = meta.CheckSpan(from, to); w.err != nil {
		return w
	}
	w.streams = clientv3.NewWatcher(c.etcd)
	ended, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(c.ctx, cancel) //nolint:contextcheck // ended follows both contexts
	context.AfterFunc(ended, func() {
		stop()
		_ = w.streams.Close() // it has no more to say than that it was ended
	})
	return w
}

// open returns the watch's channel.
func (w *watcher) open() clientv3.WatchChan {
	return w.streams.Watch(requireLeader(w.ctx), w.c.key(w.from),
		clientv3.WithRange(w.c.o.Root+w.to), clientv3.WithRev(w.last+1),
		clientv3.WithProgressNotify(), clientv3.WithFragment())
}

// Next implements [meta.Watcher].
func (w *watcher) Next() (meta.WatchBatch, error) {
	for {
		if err := w.ctx.Err(); err != nil {
			return meta.WatchBatch{}, fmt.Errorf("watch %s: %w", w.from, err)
		}
		if w.err != nil {
			return meta.WatchBatch{}, w.err
		}
		if w.ch == nil {
			w.ch = w.open()
		}
		resp, open := <-w.ch // closed when w.ctx ends
		if !open {
			w.broken(errors.New("closed"))
			continue
		}
		if err := resp.Err(); err != nil {
			w.broken(err)
			continue
		}
		w.backoff.Reset()
		b := meta.WatchBatch{Revision: resp.Header.GetRevision()}
		if n := len(resp.Events); n > 0 {
			// The header is ahead of the events while the watch catches up.
			b.Revision = resp.Events[n-1].Kv.ModRevision
			b.Events = make([]meta.Event, n)
			for i, ev := range resp.Events {
				b.Events[i] = meta.Event{Deleted: ev.Type == clientv3.EventTypeDelete, KV: w.c.kv(ev.Kv)}
			}
		}
		if b.Revision <= w.last {
			continue
		}
		w.last = b.Revision
		return b, nil
	}
}

// broken decides what an ended watch means: the end, or another try after a
// pause.
func (w *watcher) broken(err error) {
	w.ch = nil
	switch mapped := mapError(w.ctx, w.ctx, err); {
	case w.ctx.Err() != nil:
	case w.c.ctx.Err() != nil:
		w.err = fmt.Errorf("watch %s: %w: client closed", w.from, meta.ErrUnavailable)
	case errors.Is(mapped, meta.ErrCompacted):
		w.err = fmt.Errorf("watch %s after %d: %w", w.from, w.last, mapped)
	default:
		w.c.o.Log.Warn("watch broken, opening it again",
			zap.String("key", w.from), zap.Int64("revision", w.last), zap.String("err", err.Error()))
		_ = w.backoff.Wait(w.ctx) // Next looks at ctx
	}
}

// Progress implements [meta.Watcher].
func (w *watcher) Progress(ctx context.Context) error {
	if w.streams == nil {
		return fmt.Errorf("watch %s: %w", w.from, meta.ErrInvalid)
	}
	rctx, cancel := context.WithTimeout(ctx, w.c.o.RequestTimeout)
	defer cancel()
	// The same metadata as the watch: it picks the stream.
	if err := w.streams.RequestProgress(requireLeader(rctx)); err != nil {
		return fmt.Errorf("watch %s: ask for progress: %w", w.from, mapError(ctx, rctx, err))
	}
	return nil
}
