package copyjob

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestBudget checks that concurrent callers keep to a limit together, and to its changes.
func TestBudget(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		limits := Limits{Bytes: 1000}
		set := func(l Limits) {
			mu.Lock()
			defer mu.Unlock()
			limits = l
		}
		b := newBudget(func() Limits {
			mu.Lock()
			defer mu.Unlock()
			return limits
		})
		var spent int
		spender := func(ctx context.Context, bytes int64) {
			for b.spend(ctx, 1, bytes) == nil {
				mu.Lock()
				spent++
				mu.Unlock()
				time.Sleep(time.Millisecond)
			}
		}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() { spender(ctx, 10) })
		}
		during := func(d time.Duration) int {
			mu.Lock()
			from := spent
			mu.Unlock()
			time.Sleep(d)
			virtual.Wait()
			mu.Lock()
			defer mu.Unlock()
			return spent - from
		}
		about := func(what string, got, want int) {
			t.Helper()
			if got < want*95/100 || got > want*105/100 {
				t.Errorf("%s: %d, want %d", what, got, want)
			}
		}
		during(time.Second)
		about("1000 bytes", during(10*time.Second), 1000)
		set(Limits{Bytes: 100})
		during(time.Second)
		about("100 bytes", during(30*time.Second), 300)
		set(Limits{Requests: 3})
		during(time.Second)
		about("3 requests", during(100*time.Second), 300)
		set(Limits{Requests: 50, Bytes: 100})
		during(time.Second)
		about("both", during(30*time.Second), 300)
		set(Limits{Requests: 1 << 40, Bytes: 1 << 50})
		if n := during(time.Second); n < 40_000 {
			t.Errorf("%d with high limits", n)
		}
		set(Limits{Bytes: 1})
		during(time.Minute)
		set(Limits{})
		during(time.Second + time.Millisecond) // ends a wait for one byte
		if n := during(time.Second); n < 40_000 {
			t.Errorf("%d without limits", n)
		}
		cancel()
		wg.Wait()
		if err := b.spend(ctx, 1, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("err = %v", err)
		}
		// One file larger than the burst.
		set(Limits{Bytes: 10})
		began := time.Now()
		if err := b.spend(t.Context(), 1, 600); err != nil {
			t.Error(err)
		}
		if d := time.Since(began); d < 57*time.Second || d > 61*time.Second {
			t.Errorf("600 bytes at 10 a second took %v", d)
		}
	})
}
