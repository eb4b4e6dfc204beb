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

// TestFull makes the file system refuse writes for lack of space, inodes or quota: the error
// is an ErrFull that names the directory.
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
				_, err := s.write(t.Context(), "put", "a/b", func(*os.File) error { return refused },
					func(string) error { return nil })
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
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}

// TestErrors is the table of file system errors and their kinds.
func TestErrors(t *testing.T) {
	s, err := Open(t.TempDir(), Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = s.Close() }()
	kinds := []error{
		object.ErrUnavailable, object.ErrFull, object.ErrDenied, object.ErrMisconfigured,
		object.ErrInvalidKey, object.ErrNotFound,
	}
	for _, c := range []struct {
		errno         unix.Errno
		write, remove error
		read          error
	}{
		{unix.ENOSPC, object.ErrFull, object.ErrFull, object.ErrFull},
		{unix.EDQUOT, object.ErrFull, object.ErrFull, object.ErrFull},
		{unix.EROFS, object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{unix.EACCES, object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{unix.EPERM, object.ErrDenied, object.ErrDenied, object.ErrDenied},
		{unix.ENAMETOOLONG, object.ErrInvalidKey, object.ErrInvalidKey, object.ErrInvalidKey},
		{unix.EILSEQ, object.ErrInvalidKey, object.ErrInvalidKey, object.ErrInvalidKey},
		{unix.ELOOP, object.ErrInvalidKey, object.ErrInvalidKey, object.ErrNotFound},
		{unix.ENOENT, object.ErrUnavailable, object.ErrUnavailable, object.ErrNotFound},
		{unix.ENOTDIR, object.ErrUnavailable, object.ErrUnavailable, object.ErrNotFound},
		{unix.EXDEV, object.ErrMisconfigured, object.ErrMisconfigured, object.ErrMisconfigured},
		{unix.EFBIG, object.ErrMisconfigured, object.ErrMisconfigured, object.ErrMisconfigured},
		{unix.EMLINK, object.ErrMisconfigured, object.ErrMisconfigured, object.ErrMisconfigured},
		{unix.ENOTSUP, object.ErrMisconfigured, object.ErrMisconfigured, object.ErrMisconfigured},
		{unix.ENOSYS, object.ErrMisconfigured, object.ErrMisconfigured, object.ErrMisconfigured},
		{unix.EMFILE, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.ENFILE, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.ENOMEM, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.EIO, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.ESTALE, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.ENOTCONN, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
		{unix.ETIMEDOUT, object.ErrUnavailable, object.ErrUnavailable, object.ErrUnavailable},
	} {
		cause := &fs.PathError{Op: "open", Path: "a/b", Err: c.errno}
		for name, got := range map[string]struct{ err, want error }{
			"write":  {s.classify("put", "a/b", cause), c.write},
			"delete": {s.classify("delete", "a/b", cause), c.remove},
			"read":   {s.classify("get", "a/b", s.missing(cause)), c.read},
		} {
			for _, kind := range kinds {
				if is := errors.Is(got.err, kind); is != errors.Is(kind, got.want) {
					t.Errorf("%s, %v: %v is %v: %v", name, c.errno, kind, is, got.err)
				}
			}
		}
	}
}
