package copyjob

import (
	"context"

	"golang.org/x/time/rate"
)

// maxBudgets bounds the budgets that a worker caches.
const maxBudgets = 100

// budget enforces a job's limits on this replica.
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

// rateLimiter is a token bucket whose rate may change while callers wait. One caller waits
// at a time, for a quarter of a second or for one token, and then reads the limit again.
// So a new limit applies soon, whatever amount is waited for.
type rateLimiter struct {
	turn   chan struct{} // size one; full while a caller waits
	bucket *rate.Limiter // guarded by turn
}

func newRateLimiter() rateLimiter {
	return rateLimiter{turn: make(chan struct{}, 1), bucket: rate.NewLimiter(1, 1)}
}

// wait waits for n tokens, of which limit returns the current number per second; 0: no
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
