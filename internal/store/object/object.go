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
// context's error. Those, ErrFull, ErrDenied and ErrMisconfigured leave the outcome
// of a write, copy or delete unknown.
var (
	// ErrNotFound means that there is no object of that key.
	ErrNotFound = errors.New("object not found")
	// ErrExists means that a conditional create found an object of that key.
	// After a retry it may be the caller's own: read back and compare.
	ErrExists = errors.New("object already exists")
	// ErrSourceChanged means that the source of a copy is not the version that was
	// asked for. To try again does not help.
	ErrSourceChanged = errors.New("source object changed")
	// ErrInvalidKey means that a key or prefix breaks the rules of [CheckKey].
	ErrInvalidKey = errors.New("invalid object key")
	// ErrUnavailable means that the store did not answer, or not usefully.
	ErrUnavailable = errors.New("object store unavailable")
	// ErrFull means that the store has no room for what is written. A [*FullError]
	// in its chain names the place.
	ErrFull = errors.New("object store full")
	// ErrDenied means that the store does not let these credentials do that. Where
	// IsPassing holds as well, the same request may succeed minutes later.
	ErrDenied = errors.New("access denied by the object store")
	// ErrMisconfigured means that the store is not what the configuration says,
	// such as one without that bucket, in another region or of another clock, or
	// that it lacks what is asked of it. To try again does not help, unless
	// IsPassing holds as well.
	ErrMisconfigured = errors.New("object store misconfigured")
)

// Passing returns kind, ErrDenied or ErrMisconfigured, with the same text and marked
// as a refusal that may pass: its cause is outside of the request and can end while
// the store is open. Examples are a token that has expired, a policy or a key of
// encryption that is being replaced, a clock that is being set, and a server behind
// the same address that does not know the bucket yet. A caller with much work behind
// it tries again for some minutes; one that has just begun reports the error.
func Passing(kind error) error { return passing{kind} }

// IsPassing reports whether err wraps an error that Passing returned.
func IsPassing(err error) bool {
	_, ok := errors.AsType[passing](err)
	return ok
}

type passing struct{ kind error }

func (p passing) Error() string { return p.kind.Error() }
func (p passing) Unwrap() error { return p.kind }

// Info describes an object.
type Info struct {
	Key     string
	Size    int64     // bytes
	ETag    string    // as the store gives it, without quotes; compare it with SameETag
	ModTime time.Time // by the store's clock

	// What follows Head alone delivers, and where the store knows it. Everywhere
	// else it is zero, in lists above all.

	// Checksum is that of the whole content: its type, a colon, and the store's
	// text of it, as "CRC64NVME:AAAAAAAAAAA=". Empty: the store keeps none, or one
	// of the parts alone.
	Checksum string
	// SourceETag is the ETag of the object of which this is a copy in parts, as
	// Copy has noted it. Empty: it is none.
	SourceETag string
	// OpaqueETag says that the ETag is no MD5 even if it looks like one, as that
	// of an object under a key of KMS.
	OpaqueETag bool
}

// SameETag reports whether two ETags, neither of them empty, name the same
// version of an object. All comparisons of a recorded ETag with one that a store
// returns go through it: ETags are equal as text, or are those of a directory
// store, whose earlier releases added the inode as a third part. That part is not
// compared, since a copy of the directory has other inodes.
func SameETag(a, b string) bool {
	return a == b || withoutInode(a) == withoutInode(b)
}

// withoutInode removes the inode from an ETag of the form size-mtime-inode, all
// in lower-case hex, and returns any other ETag as it is.
func withoutInode(etag string) string {
	parts := strings.Split(etag, "-")
	if len(parts) != 3 {
		return etag
	}
	for _, part := range parts {
		if part == "" || len(part) > 16 || strings.Trim(part, "0123456789abcdef") != "" {
			return etag
		}
	}
	return parts[0] + "-" + parts[1]
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
	// Head describes the object, with all that the store knows.
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
	// Copy makes To byte-equal to the version of From that the request pins,
	// replacing what was there, and moves the bytes within the store. To is whole
	// when Copy returns, never visible in part, and comes with the metadata and
	// tags of From. The Info is what the store answered: its ETag is that of To,
	// its Size the one that was asked for. The same request makes the same object,
	// and the same ETag where ETags follow from the content.
	//
	// It is ErrNotFound when From does not exist and ErrSourceChanged when it has
	// another ETag, by [SameETag]. Another size than the request says is ErrSourceChanged too, or
	// goes unnoticed when the ETag is right and the object is not copied in parts.
	//
	// After any other error To may have been written, and may yet be: a late copy
	// writes the same bytes. Copy again, or see [ProvedEqual]. Of several copies to
	// one key at once each succeeds or fails with ErrUnavailable. When Copy returns
	// no upload of its own is open, unless the store could not be told so or did
	// not tell of it; it takes up to half a minute more for that after its context
	// is over. What a process that died left open AbortUploads finds.
	Copy(ctx context.Context, r CopyRequest) (Info, error)
	// AbortUploads aborts the unfinished uploads to keys that begin with prefix,
	// empty or ending in "/", and that were begun before a time by the store's
	// clock, zero for all. It returns how many it has aborted, also with an error;
	// trouble with one does not keep it from the others. An upload that is being
	// completed may escape it; whoever loses one fails with ErrUnavailable, or
	// begins another. A store whose writes leave nothing unfinished does nothing.
	AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error)
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

// FullError is [ErrFull] with the place that is full. The text holds no address.
type FullError struct {
	Place string // such as "directory /var/lib/snapshotd/objects"
	Lacks string // such as "no space left on device", or a server's own words
}

func (e *FullError) Error() string { return fmt.Sprintf("%v: %s: %s", ErrFull, e.Place, e.Lacks) }

// Unwrap returns ErrFull.
func (e *FullError) Unwrap() error { return ErrFull }

// ParseFull reads the text of a [FullError].
func ParseFull(text string) (*FullError, bool) {
	rest, ok := strings.CutPrefix(text, ErrFull.Error()+": ")
	place, lacks, found := strings.Cut(rest, ": ")
	return &FullError{Place: place, Lacks: lacks}, ok && found
}

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
