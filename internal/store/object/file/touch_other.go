//go:build unix && !linux

package file

import (
	"crypto/rand"
	"os"

	"golang.org/x/sys/unix"
)

// touch sets the modification time of an open directory to the current time of its file
// system by creating and removing an entry.
func touch(dir *os.File) error {
	name := rand.Text()
	if err := unix.Mkdirat(int(dir.Fd()), name, dirMode); err != nil {
		return err
	}
	return unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR)
}
