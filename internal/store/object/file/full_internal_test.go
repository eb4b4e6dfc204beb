//go:build unix

package file

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestFull has the file system refuse writes for want of space, inodes or quota:
// the error is no failure to answer, and names the directory.
func TestFull(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(dir, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	for _, errno := range []unix.Errno{unix.ENOSPC, unix.EDQUOT} {
		refused := &fs.PathError{Op: "write", Path: TempDir + "/x", Err: errno}
		for name, try := range map[string]func() error{
			"content": func() error {
				_, err := s.write(t.Context(), "put", "a/b", func(*os.File) error { return refused }, func(string) error { return nil })
				return err
			},
			"name": func() error {
				_, err := s.write(t.Context(), "put", "a/b", fillWith(nil), func(string) error { return refused })
				return err
			},
		} {
			err := try()
			full, ok := errors.AsType[*object.FullError](err)
			if !ok || !errors.Is(err, object.ErrFull) || errors.Is(err, object.ErrUnavailable) {
				t.Errorf("%v, %s: got %v", errno, name, err)
			} else if !strings.Contains(full.Error(), dir) {
				t.Errorf("%v, %s: %q does not name %s", errno, name, full, dir)
			}
		}
	}
	if err := s.failed(unix.EIO); !errors.Is(err, object.ErrUnavailable) || errors.Is(err, object.ErrFull) {
		t.Errorf("another error of the file system: got %v", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}
