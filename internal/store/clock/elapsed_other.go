//go:build !linux

package clock

import "time"

// elapsed is the time since the process started. Where the monotonic clock stops
// while the host sleeps, the sleep passes for a step.
func elapsed() time.Duration { return time.Since(started) }

var started = time.Now()
