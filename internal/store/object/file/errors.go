//go:build unix

package file

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// meaning is what an error of the file system stands for.
type meaning struct {
	errno unix.Errno
	kind  error
	text  string
}

// meanings holds the errors that do not pass by themselves. Any other one, such as a
// failing disk or too many open files, is an ErrUnavailable.
var meanings = []meaning{
	// The file system does not say whether space or inodes are short.
	{unix.ENOSPC, object.ErrFull, "no space or no inodes are left"},
	{unix.EDQUOT, object.ErrFull, "the disk quota is used up"},
	{unix.EROFS, object.ErrDenied, "the file system is mounted read-only: mount it for writing, and see its log for errors of the disk"},
	{unix.EACCES, object.ErrDenied, "the user of this process may not do that: grant it the directory"},
	{unix.EPERM, object.ErrDenied, "the user of this process may not do that: grant it the directory, and see its attributes"},
	{unix.ENAMETOOLONG, object.ErrInvalidKey, "an element is longer than the file system allows"},
	{unix.EILSEQ, object.ErrInvalidKey, "the file system refuses the characters of the name"},
	{unix.ELOOP, object.ErrInvalidKey, "a part of its path is a symbolic link"},
	{unix.EXDEV, object.ErrMisconfigured, "a directory below is of another file system: the store needs a single one"},
	{unix.EFBIG, object.ErrMisconfigured, "the file system, or a limit of the process, allows no file as large"},
	{unix.EMLINK, object.ErrMisconfigured, "the file system allows no more directories in a directory"},
	{unix.ENOTSUP, object.ErrMisconfigured, "the file system lacks what the store needs, such as hard links"},
	{unix.EOPNOTSUPP, object.ErrMisconfigured, "the file system lacks what the store needs, such as hard links"},
	{unix.ENOSYS, object.ErrMisconfigured, "the file system lacks what the store needs, such as hard links"},
}

// classify gives err the meaning that the contract asks for.
func (s *Store) classify(op, key string, err error) error {
	switch {
	case errors.Is(err, object.ErrInvalidKey), errors.Is(err, object.ErrExists), errors.Is(err, object.ErrNotFound),
		errors.Is(err, object.ErrSourceChanged), errors.Is(err, object.ErrUnavailable),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s %s: %w", op, key, err)
	case escapes(err):
		return fmt.Errorf("%s %s: %w: a part of its path is a symbolic link that leads out of the store", op, key, object.ErrInvalidKey)
	}
	return fmt.Errorf("%s %s: %w", op, key, s.failed(err))
}

// failed is the error for err, which the file system returned: one of meanings, or
// else ErrUnavailable. It is nil for nil.
func (s *Store) failed(err error) error {
	if err == nil {
		return nil
	}
	for _, m := range meanings {
		switch {
		case !errors.Is(err, m.errno):
		case errors.Is(m.kind, object.ErrFull):
			return fmt.Errorf("%w: %w", &object.FullError{Place: "directory " + s.path, Lacks: m.text}, err)
		default:
			return fmt.Errorf("%w: %w: %s", m.kind, err, m.text)
		}
	}
	return fmt.Errorf("%w: %w", object.ErrUnavailable, err)
}

// missing turns an error that means that there is no such object into ErrNotFound. A
// symbolic link is no object. Of a directory that was removed nothing is known.
func (s *Store) missing(err error) error {
	if !isGone(err) && !errors.Is(err, unix.ELOOP) && !escapes(err) {
		return err
	}
	if lost := s.lost(); lost != nil {
		return lost
	}
	return object.ErrNotFound
}

// escapes says whether err is that of [os.Root] for a link that leads out of it, which
// has no name.
func escapes(err error) bool {
	return err != nil && strings.HasSuffix(err.Error(), "path escapes from parent")
}
