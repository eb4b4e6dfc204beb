package copyjob

import (
	"testing"
	"time"
)

// TestUploadCutoff checks that an upload of a worker from before the job's end is aborted,
// also when the leader's clock was behind the store's, and that a recent one stays.
func TestUploadCutoff(t *testing.T) {
	end := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) // by the leader
	for name, c := range map[string]struct {
		started time.Duration // after end, by the store's clock
		now     time.Duration // likewise
		abort   bool
	}{
		"long before":                      {-time.Hour, 48 * time.Hour, true},
		"the leader is behind":             {90 * time.Second, 48 * time.Hour, true},
		"of a worker that was stopped":     {16 * time.Minute, 48 * time.Hour, true},
		"of an engine":                     {time.Hour, 48 * time.Hour, false},
		"recent, and the job is not kept":  {-time.Minute, time.Minute, false},
		"an hour old, the job is not kept": {-time.Minute, time.Hour, true},
	} {
		if got := end.Add(c.started).Before(uploadCutoff(end, end.Add(c.now))); got != c.abort {
			t.Errorf("%s: got %v", name, got)
		}
	}
}
