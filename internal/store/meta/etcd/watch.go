package etcd

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// watcher reads one watch of etcd on a separate stream, and reopens the stream when it
// breaks. The stream is separate because etcd responds to a progress request only after all
// watches of the stream have caught up, and because a broken stream ends all of its watches.
//
// # Two revisions
//
// delivered is the revision of the last delivered event, or that of the start of the watch.
// announced is the highest revision that the server has reported as complete (progress).
// Next returns the greater of the two.
//
//	           event above both: delivered rises          progress above both: announced rises
//	running ----------------------------------> running ----------------------------------> running
//	  |  event at or below either of them                      |  stream breaks
//	  +-------> ended: ErrWatchBroken                          +------> reopened after delivered
//
// A server that responds to a progress request before it has sent the events up to that
// revision, as etcd before 3.4.25 and 3.5.8 does, is detected by the late event. Skipping
// that event as a duplicate, or reopening a broken stream after announced, would lose it, so
// the watcher does neither. etcd's own client does the latter; therefore the stream is read
// here.
//
//	event                                               | result
//	the stream breaks between early progress and event  | reopened after delivered; the event
//	                                                    | arrives at or below announced: ended
//	the stream breaks, the server is correct            | reopened after delivered: no event up to
//	                                                    | announced exists, no duplicates
//	the stream breaks, delivered is compacted           | ended: ErrCompacted. announced cannot be
//	                                                    | verified any more
//	a lagging member takes the stream over              | it sends nothing before it is past
//	                                                    | delivered; its lower progress is ignored
//	a partial response                                  | dropped with the stream, and sent again
//
// A correct server sends no duplicates: each stream begins after the last completely
// delivered event, and a server sends each revision of a stream once. A duplicate ends the
// watch as well.
//
// A batch has whole revisions because etcd's responses do: the server splits a catch-up only
// between revisions, and sends the changes of one commit in one response. A response that is
// too long for one message arrives in fragments, which are joined here.
type watcher struct {
	c        *Client
	ctx      context.Context //nolint:containedctx // the contract: a watch ends with the context it was opened with
	ended    context.Context //nolint:containedctx // ends with ctx, the client, or the watch
	end      context.CancelFunc
	from, to string
	backoff  meta.Backoff

	// Of Next alone.
	close     context.CancelFunc // of the stream
	delivered int64
	announced int64
	events    []*mvccpb.Event // of an incomplete response
	err       error           // final

	mu     sync.Mutex
	stream grpc.BidiStreamingClient[pb.WatchRequest, pb.WatchResponse] // nil while there is none
}

// Watch implements [meta.KV].
func (c *Client) Watch(ctx context.Context, from, to string, after int64) meta.Watcher {
	w := &watcher{
		c: c, ctx: ctx, from: from, to: to, delivered: max(after, 0),
		backoff: meta.Backoff{Max: time.Second},
	}
	if w.err = meta.CheckSpan(from, to); w.err != nil {
		return w
	}
	w.ended, w.end = context.WithCancel(ctx)
	stop := context.AfterFunc(c.ctx, w.end)       //nolint:contextcheck // ended follows both contexts
	context.AfterFunc(w.ended, func() { stop() }) //nolint:contextcheck // see above
	return w
}

// open opens a stream after the last event.
func (w *watcher) open() error {
	ctx, cancel := context.WithCancel(w.ended)
	stream, err := w.c.watches.Watch(requireLeader(ctx), grpc.MaxCallRecvMsgSize(math.MaxInt32))
	if err == nil {
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(w.c.key(w.from)), RangeEnd: []byte(w.c.key(w.to)), StartRevision: w.delivered + 1,
			ProgressNotify: true, Fragment: true,
		}}})
	}
	if err != nil {
		cancel()
		return err
	}
	w.close, w.events = cancel, nil
	w.mu.Lock()
	defer w.mu.Unlock()
	w.stream = stream
	return nil
}

// shut closes the stream, if any.
func (w *watcher) shut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stream != nil {
		w.close()
		w.stream = nil
	}
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
		b, whole, err := w.receive()
		switch {
		case err != nil:
			w.broken(err)
		case whole:
			return b, nil
		}
	}
}

// receive reads the next response. It returns whole true if the response completes a new
// batch.
func (w *watcher) receive() (b meta.WatchBatch, whole bool, err error) {
	if w.stream == nil { // only Next changes it
		if err := w.open(); err != nil {
			return b, false, err
		}
	}
	resp, err := w.stream.Recv()
	switch {
	case err != nil:
		return b, false, err
	case resp.GetCompactRevision() > 0:
		return b, false, fmt.Errorf("%w: up to %d", meta.ErrCompacted, resp.GetCompactRevision())
	case resp.GetCanceled():
		return b, false, errors.New(resp.GetCancelReason())
	}
	w.backoff.Reset()
	if resp.GetCreated() {
		return b, false, nil
	}
	w.events = append(w.events, resp.GetEvents()...)
	if resp.GetFragment() {
		return b, false, nil
	}
	events := w.events
	w.events = nil
	if len(events) == 0 {
		// A lagging server may report a lower revision.
		if revision := resp.GetHeader().GetRevision(); revision > max(w.delivered, w.announced) {
			w.announced = revision
			return meta.WatchBatch{Revision: revision}, true, nil
		}
		return b, false, nil
	}
	// The header is ahead of the events while the watch catches up.
	last := max(w.delivered, w.announced)
	b.Events = make([]meta.Event, len(events))
	for i, ev := range events {
		kv := ev.GetKv()
		if kv.GetModRevision() <= last || i > 0 && kv.GetModRevision() < events[i-1].GetKv().GetModRevision() {
			return meta.WatchBatch{}, false, fmt.Errorf("%w: a change at revision %d after the report up to %d",
				meta.ErrWatchBroken, kv.GetModRevision(), last)
		}
		b.Events[i] = meta.Event{Deleted: ev.GetType() == mvccpb.Event_DELETE, KV: w.c.kv(kv)}
	}
	b.Revision = b.Events[len(b.Events)-1].KV.ModRevision
	w.delivered = b.Revision
	return b, true, nil
}

// broken handles an ended stream: it ends the watch, or pauses before the next stream.
func (w *watcher) broken(err error) {
	w.shut()
	final := []error{meta.ErrCompacted, meta.ErrWatchBroken, meta.ErrDenied}
	mapped := err
	if !slices.ContainsFunc(final, func(f error) bool { return errors.Is(err, f) }) { // not made by receive
		mapped = mapError(w.ctx, w.ctx, err)
	}
	switch {
	case w.ctx.Err() != nil:
	case w.c.ctx.Err() != nil:
		w.err = fmt.Errorf("watch %s: %w: client closed", w.from, meta.ErrUnavailable)
	case slices.ContainsFunc(final, func(f error) bool { return errors.Is(mapped, f) }):
		w.err = fmt.Errorf("watch %s after %d: %w", w.from, w.delivered, mapped)
	default:
		w.c.o.Log.Warn("watch broken, reopening",
			zap.String("key", w.from), zap.Int64("revision", w.delivered), zap.String("err", err.Error()))
		_ = w.backoff.Wait(w.ended) // Next checks the contexts
		return
	}
	w.end()
}

// Progress implements [meta.Watcher].
func (w *watcher) Progress(ctx context.Context) error {
	if w.end == nil {
		return fmt.Errorf("watch %s: %w", w.from, meta.ErrInvalid)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("watch %s: request progress: %w", w.from, err)
	}
	if w.ended.Err() != nil {
		return fmt.Errorf("watch %s: request progress: %w: the watch has ended", w.from, meta.ErrUnavailable)
	}
	w.mu.Lock()
	stream := w.stream
	w.mu.Unlock()
	if stream == nil {
		return nil // dropped, as etcd may do
	}
	// Next sends nothing after the start. Next returns an error of this send as well.
	request := &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}
	_ = stream.Send(&pb.WatchRequest{RequestUnion: request})
	return nil
}
