package copyjob

import (
	"context"
	"errors"
	"slices"
	"sync"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// limiter bounds the concurrent copies of a replica over all jobs, first come, first
// served. The limit is halved when the store does not keep up (ErrUnavailable), and grows
// by one after as many successes in a row as the limit is.
type limiter struct {
	mu        sync.Mutex
	limit     int // current, at most max
	max       int
	inUse     int
	successes int             // successful copies since the limit last changed
	queue     []chan struct{} // waiters, oldest first; closed on admission
}

func newLimiter(limit int) *limiter { return &limiter{limit: limit, max: limit} }

// acquire waits for a place. Each successful call needs one release.
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
	} else { // admitted while ctx ended
		l.inUse--
		l.admit()
	}
	return ctx.Err()
}

// admit admits waiters while there are free places. The lock must be held.
func (l *limiter) admit() {
	for l.inUse < l.limit && len(l.queue) > 0 {
		close(l.queue[0])
		l.queue = l.queue[1:]
		l.inUse++
	}
}

// release frees a place; err is the result of the copy.
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
