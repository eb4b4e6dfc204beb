package virtual_test

import (
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

// Under the race detector this crashes within a second where more than one
// processor runs it.
func TestTimersOfOneBubble(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		began := time.Now()
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for range 20_000 {
					<-time.After(0)
				}
				<-time.After(time.Hour)
			})
		}
		wg.Wait()
		if d := time.Since(began); d != time.Hour {
			t.Errorf("%s passed, want 1h", d)
		}
	})
}
