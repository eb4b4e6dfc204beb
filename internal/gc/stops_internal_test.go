package gc

import "testing"

// A stop is logged when it changes, and anew after it ended.
func TestKnownStops(t *testing.T) {
	var k knownStops
	a, b := Stop{Collection: 1, Due: 100, Total: 150}, Stop{Collection: 2, Due: 100, Total: 150}
	more := Stop{Collection: 1, Due: 101, Total: 150}
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
		if got := k.changes(step.stop, step.stopped); got != step.want {
			t.Errorf("step %d: got %v", i, got)
		}
	}
}
