package meta

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff computes the pauses between attempts at an unavailable store. They double from
// Min to Max, and each is reduced by a random part of up to a half, so that replicas that
// failed together do not retry together. The zero value is ready to use. It is not safe for
// concurrent use.
type Backoff struct {
	Min  time.Duration  // default 50 ms
	Max  time.Duration  // default 5 s
	Rand func() float64 // in [0, 1); default [rand.Float64]

	attempts int
}

// Next returns the next pause.
func (b *Backoff) Next() time.Duration {
	lo, hi, random := b.Min, b.Max, b.Rand
	if lo <= 0 {
		lo = 50 * time.Millisecond
	}
	if hi <= 0 {
		hi = 5 * time.Second
	}
	if random == nil {
		random = rand.Float64
	}
	d := lo
	for range b.attempts {
		if d >= hi {
			break
		}
		d *= 2
	}
	b.attempts++
	d = min(d, hi)
	return d - time.Duration(random()*float64(d)/2)
}

// Reset makes the next pause the shortest one.
func (b *Backoff) Reset() { b.attempts = 0 }

// Wait pauses, or returns ctx's error as soon as ctx ends.
func (b *Backoff) Wait(ctx context.Context) error {
	timer := time.NewTimer(b.Next())
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}

// Pause waits before another attempt at a change whose preconditions failed: 2 ms for each
// earlier attempt, none before attempt 0. It returns ctx's error as soon as ctx ends, also
// without a wait.
func Pause(ctx context.Context, attempt int) error {
	if attempt == 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(time.Duration(attempt) * 2 * time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
