package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// elapsed is the time since the host started, including the time that it slept.
func elapsed() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Since(started) // no kernel since 2.6.39 gets here
	}
	return time.Duration(ts.Nano())
}

var started = time.Now()
