package copyjob

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestLimiter checks admission, cancellation, and the changes of the limit.
func TestLimiter(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		ctx := t.Context()
		g := newLimiter(8)
		enter := func() {
			t.Helper()
			if err := g.acquire(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for range 8 {
			enter()
		}
		waiting, cancel := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for range 4 { // canceled while they wait
			wg.Go(func() {
				if err := g.acquire(waiting); !errors.Is(err, context.Canceled) {
					t.Errorf("err = %v", err)
				}
			})
		}
		virtual.Wait()
		cancel()
		g.release(nil)
		wg.Wait()
		over, cancel := context.WithCancel(ctx)
		cancel()
		for range 20 {
			if err := g.acquire(over); !errors.Is(err, context.Canceled) {
				t.Errorf("err = %v", err)
			}
		}
		enter() // the free place is not lost

		for _, want := range []int{4, 2, 1, 1} { // halved
			g.release(object.ErrUnavailable)
			if g.limit != want {
				t.Errorf("limit %d, want %d", g.limit, want)
			}
		}
		for range 4 {
			g.release(object.ErrNotFound) // no sign of overload
		}
		if g.limit != 1 || g.inUse != 0 {
			t.Errorf("limit %d, in use %d", g.limit, g.inUse)
		}
		rounds := 0
		for ; g.limit < 8; rounds++ {
			enter()
			g.release(nil)
		}
		if rounds != 1+2+3+4+5+6+7 {
			t.Errorf("recovered after %d copies", rounds)
		}
		for range 100 {
			enter()
			g.release(nil)
		}
		if g.limit != 8 || g.inUse != 0 {
			t.Errorf("limit %d, in use %d", g.limit, g.inUse)
		}
	})
}
