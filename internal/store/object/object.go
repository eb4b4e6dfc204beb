// Package object is the contract for the store that holds segment files and
// manifests: a flat space of keys, each written whole.
//
// [Store] is what snapshotd needs of an S3 bucket and no more. There are
// implementations on a directory, on S3 and in memory; all pass the suite in
// objecttest. [Faulty] wraps any of them.
//
// A store cannot be fenced: a write or delete of a process thought dead may
// land at any later time. So snapshotd never uses a key for two contents, and
// never takes a decision to delete back.
package object

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"time"
	"unicode/utf8"
)

// MaxKeyBytes is the longest key, S3's own bound.
const MaxKeyBytes = 1024

// Errors that callers tell apart. Any other error wraps ErrUnavailable or the
// context's error. Those, ErrDenied and ErrMisconfigured leave the outcome of a
// write or delete unknown.
var (
	// ErrNotFound means that there is no object of that key.
	ErrNotFound = errors.New("object not found")
	// ErrExists means that a conditional create found an object of that key.
	// After a retry it may be the caller's own: read back and compare.
	ErrExists = errors.New("object already exists")
	// ErrInvalidKey means that a key or prefix breaks the rules of [CheckKey].
	ErrInvalidKey = errors.New("invalid object key")
	// ErrUnavailable means that the store did not answer, or not usefully.
	ErrUnavailable = errors.New("object store unavailable")
	// ErrDenied means that the store does not let these credentials do that. To
	// try again does not help until somebody changes the one or the other.
	ErrDenied = errors.New("access denied by the object store")
	// ErrMisconfigured means that the store is not what the configuration says,
	// such as one without that bucket, in another region or of another clock, or
	// that it lacks what is asked of it. To try again does not help.
	ErrMisconfigured = errors.New("object store misconfigured")
)

// Info describes an object.
type Info struct {
	Key     string
	Size    int64     // bytes
	ETag    string    // as the store gives it, without quotes; not a content hash
	ModTime time.Time // by the store's clock
}

// Store is a flat space of keys. All methods are safe for concurrent use. They
// refuse an invalid key before they look at anything else, and do nothing when
// their context is already over. No key may be another's directory, as "a" is
// of "a/b": some implementations refuse it, with ErrInvalidKey.
type Store interface {
	// Put writes body as key, replacing what was there. The object is durable
	// and whole when Put returns, and never visible in part. Body is not kept.
	Put(ctx context.Context, key string, body []byte) (Info, error)
	// Create is Put for a key that must not exist, else ErrExists. Of several
	// at once exactly one wins.
	Create(ctx context.Context, key string, body []byte) (Info, error)
	// Get opens the object for reading from offset on, length bytes or, when
	// length is negative, to its end. The caller closes the reader. An offset
	// past the end reads as empty, one below zero is an error. The Info is that
	// of the whole object, whatever part is read.
	Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Info, error)
	// Head describes the object.
	Head(ctx context.Context, key string) (Info, error)
	// List yields the objects whose keys begin with prefix, in key order.
	// The prefix is empty or ends in "/". An error ends the sequence. Writes and
	// deletes that returned before the first object was asked for are seen,
	// later ones may be.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]
	// Delete removes the objects; one that is not there counts as removed, and
	// trouble with one does not keep it from the others. The error joins one
	// *DeleteError per key that may still be there or is invalid.
	Delete(ctx context.Context, keys ...string) error
	// Now returns the time by the store's own clock, with a precision of a
	// second or better.
	Now(ctx context.Context) (time.Time, error)
}

// DeleteError says that one key could not be deleted.
type DeleteError struct {
	Key string
	Err error
}

func (e *DeleteError) Error() string { return fmt.Sprintf("delete %s: %v", e.Key, e.Err) }

// Unwrap returns the cause.
func (e *DeleteError) Unwrap() error { return e.Err }

// CheckKey says whether key may be used: 1 to MaxKeyBytes bytes of UTF-8
// without control characters or backslashes, relative, and in canonical form,
// that is without empty, "." or ".." elements. The error wraps ErrInvalidKey
// and says what is wrong.
func CheckKey(key string) error {
	switch {
	case key == "":
		return fmt.Errorf("%w: empty", ErrInvalidKey)
	case len(key) > MaxKeyBytes:
		return fmt.Errorf("%w: %d bytes, at most %d", ErrInvalidKey, len(key), MaxKeyBytes)
	case !utf8.ValidString(key):
		return fmt.Errorf("%w: not UTF-8", ErrInvalidKey)
	}
	for _, r := range key {
		if r < 0x20 || r == 0x7f || r == '\\' {
			return fmt.Errorf("%w %q: control character or backslash", ErrInvalidKey, key)
		}
	}
	for element := range strings.SplitSeq(key, "/") {
		switch element {
		case "":
			return fmt.Errorf("%w %q: starts or ends with a slash, or has two in a row", ErrInvalidKey, key)
		case ".", "..":
			return fmt.Errorf("%w %q: has an element %q", ErrInvalidKey, key, element)
		}
	}
	return nil
}

// CheckPrefix says whether prefix may be listed: empty, or a valid key
// followed by one slash.
func CheckPrefix(prefix string) error {
	if prefix == "" {
		return nil
	}
	trimmed, ok := strings.CutSuffix(prefix, "/")
	if !ok {
		return fmt.Errorf("%w: prefix %q does not end in a slash", ErrInvalidKey, prefix)
	}
	return CheckKey(trimmed)
}
