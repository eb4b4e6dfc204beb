package s3

import (
	"context"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestOutliveBy shows that the longer context ends later than its parent by the duration.
func TestOutliveBy(t *testing.T) {
	const by = 10 * time.Second
	for name, c := range map[string]struct {
		ends time.Duration // of the context; 0: before the call; negative: never
		want time.Duration // end of the longer one; negative: not within an hour
	}{
		"open":         {-1, -1},
		"ends":         {3 * time.Second, 3*time.Second + by},
		"ended before": {0, by},
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
					t.Errorf("ended after %v, want %v", took, c.want)
				}
				stop()
				if longer.Err() == nil {
					t.Error("not ended after stop")
				}
			})
		})
	}
}
