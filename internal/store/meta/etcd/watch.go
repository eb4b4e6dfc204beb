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

// watcher reads one watch of etcd, on a stream of its own, and opens it again
// whenever it breaks. A stream of its own, for a progress request is answered only
// when all watches of a stream have caught up, and a broken stream ends them all.
//
// # Two revisions
//
// delivered is the revision of the last event that was delivered, or that at which
// the watch began; announced is the highest up to which the server has said that
// there is nothing more (progress). Next reports the higher of the two.
//
//	         event above both: delivered rises        progress above both: announced rises
//	going ----------------------------------> going ----------------------------------> going
//	  |  event at or below either of them                    |  stream breaks
//	  +-------> over: ErrWatchBroken                         +------> opened after delivered
//
// A server that answers a progress request before it has sent the events up to that
// revision, as etcd before 3.4.25 and 3.5.8 does, is found out by the event that
// comes late. To pass over that event as a repeat, or to open a broken stream after
// announced, would lose it for ever, so neither is done: etcd's own client does the
// latter, which is why the stream is read here.
//
//	what happens                                        | what comes of it
//	the stream breaks between early progress and event  | opened after delivered, the event
//	                                                    | comes, is at or below announced: over
//	the stream breaks, the server is right              | opened after delivered: no event up to
//	                                                    | announced exists, nothing comes twice
//	the stream breaks, delivered is compacted           | over: ErrCompacted. What announced said
//	                                                    | cannot be checked any more
//	a member that is behind takes the stream over       | it sends nothing before it is past
//	                                                    | delivered; its progress is below: ignored
//	an answer that came in part                         | dropped with the stream, and sent again
//
// So no event comes twice by right: each stream begins after the last event that
// was delivered whole, and a server sends each revision of a stream once. One that
// does come twice ends the watch as well.
//
// A batch holds whole revisions because etcd's answers do: the server cuts a
// catch-up at the end of a revision only, and sends what one commit changed in
// one answer; an answer that is too long for one message comes in fragments,
// which are joined here.
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
	events    []*mvccpb.Event // of an answer that has not come whole
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

// open opens a stream behind the last event.
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

// shut ends the stream, if there is one.
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

// receive takes the next answer, which is a batch when it is whole and new.
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
		// A server that is behind may say less than is known.
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
			return meta.WatchBatch{}, false, fmt.Errorf("%w: a change at revision %d after all up to %d was reported",
				meta.ErrWatchBroken, kv.GetModRevision(), last)
		}
		b.Events[i] = meta.Event{Deleted: ev.GetType() == mvccpb.Event_DELETE, KV: w.c.kv(kv)}
	}
	b.Revision = b.Events[len(b.Events)-1].KV.ModRevision
	w.delivered = b.Revision
	return b, true, nil
}

// broken decides what an ended stream means: the end, or another after a pause.
func (w *watcher) broken(err error) {
	w.shut()
	final := []error{meta.ErrCompacted, meta.ErrWatchBroken, meta.ErrDenied}
	mapped := err
	if !slices.ContainsFunc(final, func(f error) bool { return errors.Is(err, f) }) { // of our own making, above
		mapped = mapError(w.ctx, w.ctx, err)
	}
	switch {
	case w.ctx.Err() != nil:
	case w.c.ctx.Err() != nil:
		w.err = fmt.Errorf("watch %s: %w: client closed", w.from, meta.ErrUnavailable)
	case slices.ContainsFunc(final, func(f error) bool { return errors.Is(mapped, f) }):
		w.err = fmt.Errorf("watch %s after %d: %w", w.from, w.delivered, mapped)
	default:
		w.c.o.Log.Warn("watch broken, opening it again",
			zap.String("key", w.from), zap.Int64("revision", w.delivered), zap.String("err", err.Error()))
		_ = w.backoff.Wait(w.ended) // Next looks at the contexts
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
		return fmt.Errorf("watch %s: ask for progress: %w", w.from, err)
	}
	if w.ended.Err() != nil {
		return fmt.Errorf("watch %s: ask for progress: %w: the watch has ended", w.from, meta.ErrUnavailable)
	}
	w.mu.Lock()
	stream := w.stream
	w.mu.Unlock()
	if stream == nil {
		return nil // dropped, as etcd may
	}
	// Next has sent all that it sends. An error here shows in Next as well.
	_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
	return nil
}
