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

// earned is what a success gives back to the budget.
const earned = 0.1

// budget bounds the retries of all calls together, so that a store in trouble
// is not beaten down by them. It is a bucket of tokens.
type budget struct {
	mu     sync.Mutex
	now    func() time.Time
	max    float64
	tokens float64
	at     time.Time // when tokens was right
}

func newBudget(size int, now func() time.Time) *budget {
	return &budget{now: now, max: float64(size), tokens: float64(size), at: now()}
}

// spend takes a retry out of the budget and says whether there was one.
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

// pause is how long to wait after so many attempts: any time up to a bound that
// doubles, so that callers who failed together do not come back together.
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

// retry calls try until it succeeds, fails for good, or may not be tried again,
// and returns its last failure. An answer that only asks for a lower rate is no
// failed attempt and costs no budget until ratePatience is over. A credential that
// the store refuses is read again.
func (s *Store) retry(ctx context.Context, op, key string, try func() *failure) *failure {
	var limited time.Time // when the store first asked for a lower rate
	refreshes := 0        // attempts that another credential may cure
	for attempt := 1; ; attempt++ {
		if f := over(ctx); f != nil {
			return f
		}
		used, _ := s.keys.retrieve(ctx) // an error shows in try
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
		if end := over(ctx); end != nil {
			return end
		}
		if !f.retry {
			return f
		}
		patient := false
		if f.status == http.StatusTooManyRequests {
			if limited.IsZero() {
				limited = time.Now()
			}
			patient = time.Since(limited) < ratePatience
		}
		if attempt >= s.o.MaxAttempts && !patient {
			f.detail = fmt.Sprintf("%d attempts, the last: %s", attempt, f.detail)
			return f
		}
		if !patient && !s.budget.spend() {
			f.detail = "no more retries for now, too many calls fail: " + f.detail
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
			return over(ctx)
		}
	}
}

// maxRefreshes is how often one call goes on with another credential.
const maxRefreshes = 3

// errTimeout ends an attempt, not the call.
var errTimeout = errors.New("attempt timed out")

// attempt makes one call of the SDK with the time that size bytes get.
func attempt[T any](ctx context.Context, s *Store, size int64, call func(context.Context) (T, error)) (T, *failure) {
	return attemptFor(ctx, s.timeout(size), call)
}

// attemptFor makes one call of the SDK with the time that it gets.
func attemptFor[T any](ctx context.Context, timeout time.Duration, call func(context.Context) (T, error)) (T, *failure) {
	ctx, cancel := context.WithTimeoutCause(ctx, timeout, errTimeout)
	defer cancel()
	v, err := call(ctx)
	return v, timedOut(ctx, judge(err), timeout)
}

// timedOut gives a failure that a timeout of ours has caused its own words.
func timedOut(ctx context.Context, f *failure, timeout time.Duration) *failure {
	if f != nil && f.status == 0 && errors.Is(context.Cause(ctx), errTimeout) {
		return &failure{kind: object.ErrUnavailable, retry: true, detail: fmt.Sprintf("no answer within %v", timeout)}
	}
	return f
}
