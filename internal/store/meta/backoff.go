package meta

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff gives the pauses between attempts at a store that does not answer.
// They double from Min to Max, and each is cut by up to a half at random, so
// that replicas which failed together do not come back together. The zero value
// is ready; it is not safe for concurrent use.
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

// Reset makes the next pause the shortest again.
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

// Pause waits a little before an attempt at a change whose premises changed: 2 ms
// for each attempt before it, so not at all before attempt 0. It returns ctx's
// error as soon as ctx ends, also when it does not wait.
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
