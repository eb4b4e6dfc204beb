package clock

import (
	"time"

	"golang.org/x/sys/unix"
)

// elapsed returns the time since the host started, including sleep.
func elapsed() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Since(started) // kernels before 2.6.39 only
	}
	return time.Duration(ts.Nano())
}

var started = time.Now()
