// Package object defines the contract of the store for segment files and manifests: a flat
// space of keys, whose objects are written whole.
//
// [Store] is the subset of S3 that snapshotd needs. Implementations on a directory, on S3
// and in memory pass the suite in objecttest. [Faulty] decorates any of them.
//
// A store cannot be fenced: a write or delete of a process that counts as dead may take
// effect at any later time. Therefore snapshotd never uses a key for two contents, and never
// revokes a decision to delete.
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

// MaxKeyBytes is the maximum length of a key, the limit of S3.
const MaxKeyBytes = 1024

// Errors for callers to distinguish. Any other error wraps ErrUnavailable or the context's
// error. After those, ErrFull, ErrDenied and ErrMisconfigured the result of a write, copy or
// delete is unknown.
var (
	// ErrNotFound means that no object has the key.
	ErrNotFound = errors.New("object not found")
	// ErrExists means that a conditional create found an object with the key. After a
	// retry it may be the caller's own: read back and compare.
	ErrExists = errors.New("object already exists")
	// ErrSourceChanged means that the source of a copy is not the requested version. A
	// retry fails as well.
	ErrSourceChanged = errors.New("source object changed")
	// ErrInvalidKey means that a key or prefix violates the rules of [CheckKey].
	ErrInvalidKey = errors.New("invalid object key")
	// ErrUnavailable means that the store sent no response, or an unusable one.
	ErrUnavailable = errors.New("object store unavailable")
	// ErrFull means that the store has no space for the write. A [*FullError] in its
	// chain names the place.
	ErrFull = errors.New("object store full")
	// ErrDenied means that the credentials lack the permission. If IsPassing is true,
	// the same request may succeed minutes later.
	ErrDenied = errors.New("access denied by the object store")
	// ErrMisconfigured means that the store contradicts the configuration, for example
	// a missing bucket, another region or another clock, or that it lacks a feature. A
	// retry fails as well, unless IsPassing is true.
	ErrMisconfigured = errors.New("object store misconfigured")
)

// ErrStoreNotFound means that no object store of an alias is configured.
var ErrStoreNotFound = errors.New("object store not found")

// Passing returns kind, ErrDenied or ErrMisconfigured, with the same text and marked as a
// temporary refusal: its cause is outside of the request and can end while the store is
// open. Examples are an expired token, a policy or an encryption key that is being replaced,
// a clock that is being corrected, and one of several servers that does not know the bucket
// yet. Callers that have done much work retry for some minutes; callers that have just begun
// report the error.
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
	ETag    string    // as returned by the store, without quotes; compare it with SameETag
	ModTime time.Time // by the store's clock

	// Only Head sets the following fields, if the store knows them. Other methods, in
	// particular List, leave them zero.

	// Checksum is the checksum of the whole content: its type, a colon, and the store's
	// text, such as "CRC64NVME:AAAAAAAAAAA=". Empty: the store has none, or only one of
	// the parts.
	Checksum string
	// SourceETag is the ETag of the source of a copy in parts, as recorded by Copy.
	// Empty for any other object.
	SourceETag string
	// OpaqueETag is set if the ETag is not an MD5 although it looks like one, as for
	// objects encrypted by KMS.
	OpaqueETag bool
}

// SameETag reports whether two non-empty ETags name the same version of an object. All
// comparisons of a recorded ETag with one of a store use it: ETags are equal as text, or
// belong to a directory store, whose earlier releases added the inode as a third part. That
// part is ignored, since a copy of the directory has other inodes.
func SameETag(a, b string) bool {
	return a == b || withoutInode(a) == withoutInode(b)
}

// withoutInode removes the inode from an ETag of the form size-mtime-inode, all in
// lower-case hex, and returns any other ETag unchanged.
func withoutInode(etag string) string {
	parts := strings.Split(etag, "-")
	if len(parts) != 3 {
		return etag
	}
	for _, part := range parts {
		if len(part) > 16 || !isHex(part) {
			return etag
		}
	}
	return parts[0] + "-" + parts[1]
}

// Store is a flat space of keys. All methods are safe for concurrent use. They check keys
// before anything else, and do nothing if their context has ended. No key may be the
// directory of another, such as "a" of "a/b": some implementations refuse it with
// ErrInvalidKey.
type Store interface {
	// Put writes body as key, and replaces an existing object. The object is durable
	// and complete when Put returns, and never partially visible. Put does not keep
	// body.
	Put(ctx context.Context, key string, body []byte) (Info, error)
	// Create is Put for a key that must not exist, else ErrExists. Exactly one of
	// several concurrent creates succeeds.
	Create(ctx context.Context, key string, body []byte) (Info, error)
	// Get opens the object for reading length bytes from offset, or to the end if
	// length is negative. The caller closes the reader. An offset beyond the end reads
	// as empty, a negative one is an error. The Info is always that of the whole
	// object.
	Get(ctx context.Context, key string, offset, length int64) (io.ReadCloser, Info, error)
	// Head returns all that the store knows about the object.
	Head(ctx context.Context, key string) (Info, error)
	// List yields the objects whose keys begin with prefix, in key order. The prefix is
	// empty or ends in "/". An error ends the sequence. The list shows writes and
	// deletes that returned before its start, and may show later ones.
	List(ctx context.Context, prefix string) iter.Seq2[Info, error]
	// Delete deletes the objects. A missing object counts as deleted, and the failure
	// of one key does not affect the others. The error joins one *DeleteError per key
	// that is invalid or whose object may still exist.
	Delete(ctx context.Context, keys ...string) error
	// Copy makes To byte-equal to the requested version of From within the store, and
	// replaces an existing object. To is complete when Copy returns, never partially
	// visible, and has the metadata and tags of From. The Info has the ETag of To and
	// the requested Size. The same request makes the same object, with the same ETag
	// if ETags follow from the content.
	//
	// Copy returns ErrNotFound if From does not exist, and ErrSourceChanged if it has
	// another ETag by [SameETag]. Another size than the requested one is an
	// ErrSourceChanged too, or undetected if the ETag is right and the object is not
	// copied in parts.
	//
	// After any other error To may have been written, or be written later with the
	// same bytes. Repeat the copy, or see [ProvedEqual]. Each of several concurrent
	// copies to one key succeeds or fails with ErrUnavailable. When Copy returns, its
	// uploads are closed, unless the store did not respond; for that it may take up to
	// half a minute after the end of its context. AbortUploads closes the uploads of
	// dead processes.
	Copy(ctx context.Context, r CopyRequest) (Info, error)
	// AbortUploads aborts the incomplete uploads to keys with the prefix, which is
	// empty or ends in "/", that were begun before a time by the store's clock, zero
	// for all. It returns the number of aborted uploads, also with an error. The
	// failure of one does not affect the others. It may miss an upload that is being
	// completed. The writer of an aborted upload fails with ErrUnavailable, or begins
	// another. Stores without uploads do nothing.
	AbortUploads(ctx context.Context, prefix string, before time.Time) (int, error)
	// OldestUpload returns when, by the store's clock, the oldest incomplete upload to a
	// key with the prefix was begun; zero: there is none, or the store does not list
	// uploads or their times. The prefix is empty or ends in "/".
	OldestUpload(ctx context.Context, prefix string) (time.Time, error)
	// Now returns the time by the store's clock, with a precision of at least a
	// second.
	Now(ctx context.Context) (time.Time, error)
}

// DeleteError is the failure to delete one key.
type DeleteError struct {
	Key string
	Err error
}

func (e *DeleteError) Error() string { return fmt.Sprintf("delete %s: %v", e.Key, e.Err) }

// Unwrap returns the cause.
func (e *DeleteError) Unwrap() error { return e.Err }

// FullError is [ErrFull] with the place that is full. Its text has no address.
type FullError struct {
	Place string // such as "directory /var/lib/snapshotd/objects"
	Lacks string // such as "no space left on device", or a server's message
}

func (e *FullError) Error() string { return fmt.Sprintf("%v: %s: %s", ErrFull, e.Place, e.Lacks) }

// Unwrap returns ErrFull.
func (e *FullError) Unwrap() error { return ErrFull }

// ParseFull parses the text of a [FullError].
func ParseFull(text string) (*FullError, bool) {
	rest, ok := strings.CutPrefix(text, ErrFull.Error()+": ")
	place, lacks, found := strings.Cut(rest, ": ")
	return &FullError{Place: place, Lacks: lacks}, ok && found
}

// CheckKey validates a key: 1 to MaxKeyBytes bytes of UTF-8 without control characters or
// backslashes, relative, and in canonical form, that is without empty, "." or ".." elements.
// The error wraps ErrInvalidKey and names the violation.
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

// CheckPrefix validates a prefix: empty, or a valid key followed by one slash.
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
