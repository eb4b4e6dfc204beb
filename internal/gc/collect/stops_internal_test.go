package collect

import "testing"

// A stop is logged when it changes, and again after it ended.
func TestLoggedStops(t *testing.T) {
	var l loggedStops
	a, b := Stop{Collection: 1, Eligible: 100, Total: 150}, Stop{Collection: 2, Eligible: 100, Total: 150}
	more := Stop{Collection: 1, Eligible: 101, Total: 150}
	for i, step := range []struct {
		stop    Stop
		stopped bool
		want    bool
	}{
		{a, true, true},
		{a, true, false},
		{b, true, true},
		{more, true, true},
		{more, true, false},
		{a, false, false},
		{b, true, false},
		{more, true, true},
	} {
		if got := l.update(step.stop, step.stopped); got != step.want {
			t.Errorf("step %d: got %v", i, got)
		}
	}
}
