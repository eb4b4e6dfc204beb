package copyjob

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// gate bounds how many objects a replica copies at once, over all jobs: those who
// wait are let in one by one, in the order in which they came. When the store
// does not keep up, the bound is halved; with each round of copies that go well
// it grows by one again.
type limiter struct {
	mu        sync.Mutex
	limit     int // now
	max       int
	inUse     int
	successes int             // copies that went well since the limit last changed
	queue     []chan struct{} // the first to come first; closed when it is let in
}

func newLimiter(limit int) *limiter { return &limiter{limit: limit, max: limit} }

func (l *limiter) acquire(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	turn := make(chan struct{})
	l.mu.Lock()
	l.queue = append(l.queue, turn)
	l.admit()
	l.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if i := slices.Index(l.queue, turn); i >= 0 {
		l.queue = slices.Delete(l.queue, i, i+1)
	} else { // let in at the last moment
		l.inUse--
		l.admit()
	}
	return ctx.Err()
}

// admit lets in who has room. The lock must be held.
func (l *limiter) admit() {
	for l.inUse < l.limit && len(l.queue) > 0 {
		close(l.queue[0])
		l.queue = l.queue[1:]
		l.inUse++
	}
}

// leave ends what enter began; err is how the copy ended.
func (l *limiter) release(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.inUse--
	switch {
	case errors.Is(err, object.ErrUnavailable):
		l.limit, l.successes = max(1, l.limit/2), 0
	case err == nil && l.limit < l.max:
		if l.successes++; l.successes >= l.limit {
			l.limit, l.successes = l.limit+1, 0
		}
	}
	l.admit()
}
