package copyjob

import (
	"testing"
	"time"
)

// An upload that a worker began before the job's end goes, also when the leader's
// clock was behind the store's; what is young stays.
func TestUploadCutoff(t *testing.T) {
	end := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC) // by the leader
	for name, c := range map[string]struct {
		begun time.Duration // after end, by the store
		now   time.Duration // likewise
		want  bool          // it goes
	}{
		"long before":                      {-time.Hour, 48 * time.Hour, true},
		"the leader is behind":             {90 * time.Second, 48 * time.Hour, true},
		"an engine's":                      {time.Hour, 48 * time.Hour, false},
		"young, and the job is not kept":   {-time.Minute, time.Minute, false},
		"an hour old, the job is not kept": {-time.Minute, time.Hour, true},
	} {
		if got := end.Add(c.begun).Before(uploadCutoff(end, end.Add(c.now))); got != c.want {
			t.Errorf("%s: got %v", name, got)
		}
	}
}
