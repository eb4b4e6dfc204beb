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

// meaning is the classification of an error of the file system.
type meaning struct {
	errno unix.Errno
	kind  error
	text  string
}

// meanings lists the permanent errors. Any other error, such as a failing disk or too many
// open files, is an ErrUnavailable.
var meanings = []meaning{
	// The error is the same for missing space and missing inodes.
	{unix.ENOSPC, object.ErrFull, "no space or no inodes are left"},
	{unix.EDQUOT, object.ErrFull, "the disk quota is used up"},
	{unix.EROFS, object.ErrDenied, "the file system is read-only: mount it for writing, and see its log for disk errors"},
	{unix.EACCES, object.ErrDenied, "the user of this process lacks the permission: grant it the directory"},
	{unix.EPERM, object.ErrDenied, "the user of this process lacks the permission: grant it, and see the attributes"},
	{unix.ENAMETOOLONG, object.ErrInvalidKey, "an element is longer than the file system allows"},
	{unix.EILSEQ, object.ErrInvalidKey, "the file system refuses the characters of the name"},
	{unix.ELOOP, object.ErrInvalidKey, "a part of its path is a symbolic link"},
	{unix.EXDEV, object.ErrMisconfigured, "a subdirectory is on another file system: the store needs a single one"},
	{unix.EFBIG, object.ErrMisconfigured, "the file exceeds a limit of the file system or of the process"},
	{unix.EMLINK, object.ErrMisconfigured, "the file system allows no more directories in a directory"},
	{unix.ENOTSUP, object.ErrMisconfigured, "the file system lacks a required feature, such as hard links"},
	{unix.EOPNOTSUPP, object.ErrMisconfigured, "the file system lacks a required feature, such as hard links"},
	{unix.ENOSYS, object.ErrMisconfigured, "the file system lacks a required feature, such as hard links"},
}

// classify returns the error of the contract for err.
func (s *Store) classify(op, key string, err error) error {
	switch {
	case errors.Is(err, object.ErrInvalidKey), errors.Is(err, object.ErrExists), errors.Is(err, object.ErrNotFound),
		errors.Is(err, object.ErrSourceChanged), errors.Is(err, object.ErrUnavailable),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%s %s: %w", op, key, err)
	case escapes(err):
		return fmt.Errorf("%s %s: %w: a part of its path is a symbolic link that leads out of the store",
			op, key, object.ErrInvalidKey)
	}
	return fmt.Errorf("%s %s: %w", op, key, s.failed(err))
}

// failed returns the error for an error of the file system: one of meanings, else
// ErrUnavailable. It returns nil for nil.
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

// missing returns ErrNotFound for an error that means that the object does not exist.
// Symbolic links are not objects. If the store's directory was removed, its objects are
// unknown.
func (s *Store) missing(err error) error {
	if !isGone(err) && !errors.Is(err, unix.ELOOP) && !escapes(err) {
		return err
	}
	if lost := s.lost(); lost != nil {
		return lost
	}
	return object.ErrNotFound
}

// escapes reports whether err is the unnamed error of [os.Root] for a link that leads out of
// it.
func escapes(err error) bool {
	return err != nil && strings.HasSuffix(err.Error(), "path escapes from parent")
}
