//go:build !linux

package clock

import "time"

// elapsed returns the time since the process started. If the monotonic clock stops while the
// host sleeps, the sleep counts as a step.
func elapsed() time.Duration { return time.Since(started) }

var started = time.Now()
