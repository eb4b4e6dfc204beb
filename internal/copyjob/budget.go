package copyjob

import (
	"context"
	"errors"
	"slices"
	"sync"

	"golang.org/x/time/rate"

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

// budget holds a job to its limits in this replica.
type budget struct {
	rateShare       func() Limits
	requests, bytes rateLimiter
}

func newBudget(rateShare func() Limits) *budget {
	return &budget{rateShare: rateShare, requests: newRateLimiter(), bytes: newRateLimiter()}
}

// spend waits until the job may make n requests that move bytes.
func (b *budget) spend(ctx context.Context, n int, bytes int64) error {
	if err := b.requests.wait(ctx, int64(n), func() int64 { return b.rateShare().Requests }); err != nil {
		return err
	}
	return b.bytes.wait(ctx, bytes, func() int64 { return b.rateShare().Bytes })
}

// meter is one of the limits. One waits for it at a time, for a quarter of a
// second or for one token, and then looks at the limit again; the others wait
// behind. So a limit that changes is heeded soon, however much is waited for.
type rateLimiter struct {
	turn   chan struct{} // size one; full while somebody waits
	bucket *rate.Limiter // of the one who waits
}

func newRateLimiter() rateLimiter {
	return rateLimiter{turn: make(chan struct{}, 1), bucket: rate.NewLimiter(1, 1)}
}

// take waits for n tokens of so many a second as limit says at each moment, 0 no
// limit.
func (l *rateLimiter) wait(ctx context.Context, n int64, limit func() int64) error {
	if n == 0 || limit() == 0 {
		return ctx.Err()
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case l.turn <- struct{}{}:
	}
	defer func() { <-l.turn }()
	for n > 0 {
		perSecond := limit()
		if perSecond == 0 {
			break
		}
		burst := max(1, min(perSecond/4, 1<<30))
		if rate.Limit(perSecond) != l.bucket.Limit() {
			l.bucket.SetLimit(rate.Limit(perSecond))
			l.bucket.SetBurst(int(burst))
		}
		part := min(n, burst)
		if err := l.bucket.WaitN(ctx, int(part)); err != nil {
			return err
		}
		n -= part
	}
	return ctx.Err()
}
