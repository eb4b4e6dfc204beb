package file

import (
	"os"

	"golang.org/x/sys/unix"
)

// touch sets the modification time of an open directory to the current time of its file
// system.
func touch(dir *os.File) error {
	now := unix.Timespec{Nsec: unix.UTIME_NOW}
	return unix.UtimesNanoAt(int(dir.Fd()), ".", []unix.Timespec{now, now}, unix.AT_SYMLINK_NOFOLLOW)
}
