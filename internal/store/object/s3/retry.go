package s3

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// earned is the number of tokens that a success returns to the budget.
const earned = 0.1

// budget bounds the retries of all calls together, so that retries do not overload a
// failing store. It is a token bucket.
type budget struct {
	mu     sync.Mutex
	now    func() time.Time
	max    float64
	tokens float64
	at     time.Time // of tokens
}

func newBudget(size int, now func() time.Time) *budget {
	return &budget{now: now, max: float64(size), tokens: float64(size), at: now()}
}

// spend takes a token, and returns false if none is left.
func (b *budget) spend() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	now := b.now()
	b.tokens = min(b.max, b.tokens+now.Sub(b.at).Seconds())
	b.at = now
	if b.tokens < 1 {
		return false
	}
	b.tokens--
	return true
}

func (b *budget) earn() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.tokens = min(b.max, b.tokens+earned)
}

// pause returns a random pause after the number of attempts, up to a bound that doubles:
// callers that failed together must not retry together.
func pause(base time.Duration, attempts int) time.Duration {
	bound := base
	for range attempts - 1 {
		if bound *= 2; bound >= maxPause {
			bound = maxPause
			break
		}
	}
	return rand.N(bound + 1)
}

// retry calls try until it succeeds, fails permanently, or attempts or budget are
// exhausted, and returns the last failure. Responses with HTTP 429 do not count as failed
// attempts and cost no budget until ratePatience has passed. Refused credentials are
// reloaded.
func (s *Store) retry(ctx context.Context, op, key string, try func() *failure) *failure {
	var throttledSince time.Time
	refreshes := 0 // attempts with refused credentials
	for attempt := 1; ; attempt++ {
		if f := contextEnd(ctx); f != nil {
			return f
		}
		used, _ := s.keys.retrieve(ctx) // try returns its error
		f := try()
		if f == nil {
			s.budget.earn()
			return nil
		}
		if age, stale := maxAge(f); stale && refreshes < maxRefreshes && s.keys.changedSince(ctx, used, age) {
			refreshes++
			attempt--
			continue
		}
		if end := contextEnd(ctx); end != nil {
			return end
		}
		if !f.retry {
			return f
		}
		throttled := false
		if f.status == http.StatusTooManyRequests {
			if throttledSince.IsZero() {
				throttledSince = time.Now()
			}
			throttled = time.Since(throttledSince) < ratePatience
		}
		if attempt >= s.o.MaxAttempts && !throttled {
			f.detail = fmt.Sprintf("%d attempts, the last: %s", attempt, f.detail)
			return f
		}
		if !throttled && !s.budget.spend() {
			f.detail = "retry budget exhausted, too many calls fail: " + f.detail
			return f
		}
		wait := max(pause(s.o.Backoff, attempt), f.after)
		s.o.Log.Debug("retry", zap.String("op", op), zap.String("key", key), zap.String("bucket", s.o.Bucket),
			zap.Int("attempt", attempt), zap.Duration("wait", wait), zap.String("err", f.detail))
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return contextEnd(ctx)
		}
	}
}

// maxRefreshes is the number of times that one call continues with new credentials.
const maxRefreshes = 3

// errTimeout is the cause of an attempt's end, not of the call's.
var errTimeout = errors.New("attempt timed out")

// attempt makes one call of the SDK with the timeout for size bytes.
func attempt[T any](
	ctx context.Context, s *Store, size int64, call func(context.Context) (T, error),
) (T, *failure) {
	return attemptFor(ctx, s.timeout(size), call)
}

// attemptFor makes one call of the SDK with the timeout.
func attemptFor[T any](
	ctx context.Context, timeout time.Duration, call func(context.Context) (T, error),
) (T, *failure) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTimeout)
	defer cancel()
	v, err := call(ctx)
	return v, timedOut(ctx, classify(err), timeout)
}

// timedOut returns the failure of an attempt that exceeded its timeout, else f.
func timedOut(ctx context.Context, f *failure, timeout time.Duration) *failure {
	if f != nil && f.status == 0 && errors.Is(context.Cause(ctx), errTimeout) {
		return &failure{kind: object.ErrUnavailable, retry: true, detail: fmt.Sprintf("no response within %v", timeout)}
	}
	return f
}
