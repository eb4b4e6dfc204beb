package manager

import (
	"context"
	"errors"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Calls that wait for a key to change share a watch of their replica. Calls that wait
// for the end of a create share the view's watch. Calls that wait for checkpoints share
// one that starts with the first of them and lasts as long as the replica.
//
// A call first joins a topic and then reads the key from the store, so every change
// that the read does not include wakes it:
//
//	the watch starts at a revision  all calls wake: they may have read before it
//	a key of a topic changes        the topic's calls wake
//	watch lost                      it is opened again at the same revision
//	compacted, or the store         the watch starts at the newest revision: all
//	contradicts an earlier answer   calls wake and read again
//	replica ends                    the calls end: ErrStopping
//
// A wake-up is a hint: each call reads the key and decides.

// topics are the waiting calls of a replica by topic, which is a key or a prefix.
type topics struct {
	ended chan struct{} // closed when the watch has ended for good

	mu      sync.Mutex
	waiting map[string]map[*waiter]struct{}
}

// waiter is one waiting call.
type waiter struct {
	of   *topics
	on   []string
	wake chan struct{} // size one
}

func newTopics() *topics {
	return &topics{ended: make(chan struct{}), waiting: map[string]map[*waiter]struct{}{}}
}

// join adds a call that waits for changes of topics. The caller must call leave.
func (t *topics) join(on ...string) *waiter {
	w := &waiter{of: t, on: on, wake: make(chan struct{}, 1)}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, topic := range on {
		if t.waiting[topic] == nil {
			t.waiting[topic] = map[*waiter]struct{}{}
		}
		t.waiting[topic][w] = struct{}{}
	}
	return w
}

func (w *waiter) leave() {
	w.of.mu.Lock()
	defer w.of.mu.Unlock()
	for _, topic := range w.on {
		delete(w.of.waiting[topic], w)
		if len(w.of.waiting[topic]) == 0 {
			delete(w.of.waiting, topic)
		}
	}
}

// wait blocks until a topic may have changed since join or since wait last returned, or
// ctx or the replica ends.
func (w *waiter) wait(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-w.of.ended:
		return ErrStopping
	case <-w.wake:
		return nil
	}
}

func (w *waiter) notify() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

// changed wakes the calls of a topic.
func (t *topics) changed(topic string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for w := range t.waiting[topic] {
		w.notify()
	}
}

// allChanged wakes all calls.
func (t *topics) allChanged() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, waiting := range t.waiting {
		for w := range waiting {
			w.notify()
		}
	}
}

// end ends all calls with ErrStopping. It must be called once.
func (t *topics) end() { close(t.ended) }

// checkpointWatch wakes the calls that wait for checkpoints of a collection or for a
// change of its record.
type checkpointWatch struct {
	*topics
	kv    meta.KV
	log   *zap.Logger
	rand  func() float64
	begin chan struct{} // size one; signals the first waiting call
}

func newCheckpointWatch(kv meta.KV, log *zap.Logger, rand func() float64) *checkpointWatch {
	return &checkpointWatch{topics: newTopics(), kv: kv, log: log, rand: rand, begin: make(chan struct{}, 1)}
}

// await adds a call that waits for a change of the collection's checkpoints or record.
// The caller must call leave.
func (c *checkpointWatch) await(collection int64) *waiter {
	w := c.join(keys.ChannelPrefix(collection), keys.Collection(collection))
	select {
	case c.begin <- struct{}{}:
	default:
	}
	return w
}

// Run watches checkpoints and collections from the first waiting call until ctx ends. It
// must be called once.
func (c *checkpointWatch) Run(ctx context.Context) error {
	defer c.end()
	select {
	case <-ctx.Done():
		return nil
	case <-c.begin:
	}
	backoff := meta.Backoff{Rand: c.rand}
	for after := int64(0); ; {
		err := c.follow(ctx, &after, backoff.Reset)
		if ctx.Err() != nil {
			return nil
		}
		c.log.Warn("watch of checkpoints failed, retrying", zap.Error(err))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

// follow watches the store from revision *after until the watch fails, and advances
// *after. 0 means the newest revision. It calls onProgress after each batch.
func (c *checkpointWatch) follow(ctx context.Context, after *int64, onProgress func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if *after == 0 {
		var err error
		if _, _, *after, err = c.kv.Get(ctx, keys.Format); err != nil {
			return err
		}
		c.allChanged()
	}
	// No other keys are between those of checkpoints and those of collections.
	from, _ := meta.Prefix(keys.AllChannelsPrefix)
	_, to := meta.Prefix(keys.CollectionPrefix)
	w := c.kv.Watch(ctx, from, to, *after)
	for {
		b, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) || errors.Is(err, meta.ErrWatchBroken) {
			*after = 0
		}
		if err != nil {
			return err
		}
		topic := ""
		for i := range b.Events {
			next := b.Events[i].KV.Key
			if strings.HasPrefix(next, keys.AllChannelsPrefix) {
				next = next[:strings.LastIndex(next, "/")+1]
			}
			if next != topic {
				c.changed(next)
			}
			topic = next
		}
		*after = b.Revision
		onProgress()
	}
}
