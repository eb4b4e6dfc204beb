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

// Calls that wait for a key to change share a watch of their replica: those that wait
// for a create to end share that of the view, those that wait for checkpoints one that
// begins with the first of them and lasts as long as the replica.
//
// A call joins a topic first and reads the key from the store after that, so every
// change that the read does not show wakes it:
//
//	the watch begins at a revision  all calls wake, for they may have read before it
//	a key of a topic changes        the topic's calls wake
//	watch lost                      it is opened again where it was
//	compacted, or the store         the watch begins at the newest revision: all
//	contradicts what it said        calls wake, and read again
//	replica ends                    the calls end: ErrStopping
//
// Waking is a hint: what a call waits for is decided by what it reads.

// topics are the waiting calls of a replica, by what they wait for.
type topics struct {
	ended chan struct{} // closed when nothing wakes calls any more

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

// join adds a call that waits for changes of topics. It must leave.
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

// wait returns when a topic may have changed since the call joined, or since wait last
// returned.
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

func (w *waiter) rouse() {
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
		w.rouse()
	}
}

// allChanged wakes all calls.
func (t *topics) allChanged() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, waiting := range t.waiting {
		for w := range waiting {
			w.rouse()
		}
	}
}

// end ends all calls. It must be called once.
func (t *topics) end() { close(t.ended) }

// cuts wakes the calls that wait for checkpoints of a collection, or for its end.
type cuts struct {
	*topics
	kv    meta.KV
	log   *zap.Logger
	rand  func() float64
	begin chan struct{} // size one; a call waits
}

func newCuts(kv meta.KV, log *zap.Logger, rand func() float64) *cuts {
	return &cuts{topics: newTopics(), kv: kv, log: log, rand: rand, begin: make(chan struct{}, 1)}
}

// await adds a call that waits for a change of the collection's checkpoints or its
// record. It must leave.
func (c *cuts) await(collection int64) *waiter {
	w := c.join(keys.ChannelPrefix(collection), keys.Collection(collection))
	select {
	case c.begin <- struct{}{}:
	default:
	}
	return w
}

// Run watches checkpoints and collections, from the first waiting call on until ctx
// ends. It must be called once.
func (c *cuts) Run(ctx context.Context) error {
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
		c.log.Warn("the watch of checkpoints ended and is opened again", zap.Error(err))
		if backoff.Wait(ctx) != nil {
			return nil
		}
	}
}

// follow watches the store until that fails, from after on, and moves after. It calls
// good for every step that worked.
func (c *cuts) follow(ctx context.Context, after *int64, good func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if *after == 0 {
		var err error
		if _, _, *after, err = c.kv.Get(ctx, keys.Format); err != nil {
			return err
		}
		c.allChanged()
	}
	// Nothing is between the keys of checkpoints and those of collections.
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
		good()
	}
}
