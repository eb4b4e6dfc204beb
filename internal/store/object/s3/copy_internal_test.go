package s3

import (
	"context"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestOutliveBy holds that what a server may carry out all the same is waited for,
// and not for ever.
func TestOutliveBy(t *testing.T) {
	const by = 10 * time.Second
	for name, c := range map[string]struct {
		ends time.Duration // of the context; 0: before the call; below: never
		want time.Duration // when the longer one is over; below 0: it is not, within an hour
	}{
		"it goes on":     {-1, -1},
		"it ends":        {3 * time.Second, 3*time.Second + by},
		"it ended early": {0, by},
	} {
		t.Run(name, func(t *testing.T) {
			virtual.Test(t, func(t *testing.T) {
				type key struct{}
				ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
				defer cancel()
				switch {
				case c.ends == 0:
					cancel()
				case c.ends > 0:
					time.AfterFunc(c.ends, cancel)
				}
				began := time.Now()
				longer, stop := outliveBy(ctx, by)
				defer stop()
				if longer.Err() != nil || longer.Value(key{}) != "value" {
					t.Errorf("err = %v, value %v", longer.Err(), longer.Value(key{}))
				}
				took := time.Duration(-1)
				select {
				case <-longer.Done():
					took = time.Since(began)
				case <-time.After(time.Hour):
				}
				if took != c.want {
					t.Errorf("over after %v, want %v", took, c.want)
				}
				stop()
				if longer.Err() == nil {
					t.Error("not over when it is given up")
				}
			})
		})
	}
}
