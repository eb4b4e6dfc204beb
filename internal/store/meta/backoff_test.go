package meta_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestPause(t *testing.T) {
	for name, c := range map[string]struct {
		attempt int
		ends    time.Duration // of the context; 0: ended
		want    error
		took    time.Duration
	}{
		"first":        {0, time.Hour, nil, 0},
		"second":       {1, time.Hour, nil, 2 * time.Millisecond},
		"later":        {50, time.Hour, nil, 100 * time.Millisecond},
		"first, ended": {0, 0, context.DeadlineExceeded, 0},
		"later, ended": {5, 0, context.DeadlineExceeded, 0},
		"ends":         {50, 30 * time.Millisecond, context.DeadlineExceeded, 30 * time.Millisecond},
	} {
		t.Run(name, func(t *testing.T) {
			virtual.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), c.ends)
				defer cancel()
				began := time.Now()
				err := meta.Pause(ctx, c.attempt)
				if took := time.Since(began); !errors.Is(err, c.want) || took != c.took {
					t.Errorf("err = %v after %v, want %v after %v", err, took, c.want, c.took)
				}
			})
		})
	}
}
