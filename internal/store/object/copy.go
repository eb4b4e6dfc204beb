package object

import (
	"errors"
	"fmt"
	"strings"
)

// The limits of S3 for copies, in bytes. They hold for every store, so that a valid request
// is valid for all stores.
const (
	// MaxCopySize is the maximum size of a copy in one request.
	MaxCopySize = 5 << 30
	// MinPartSize and MaxPartSize bound the size of a part.
	MinPartSize = 5 << 20
	MaxPartSize = 5 << 30
	// MaxParts is the maximum number of parts of an object.
	MaxParts = 10_000
)

// The defaults of [CopyParts], in bytes.
const (
	DefaultCopyThreshold = 256 << 20
	DefaultCopyPartSize  = 128 << 20
)

// CopyParts defines how large objects are copied. The ETag of the target depends on it, so
// callers that may repeat a copy must keep it.
type CopyParts struct {
	// Threshold is the size in bytes above which an object is copied in parts.
	// Default: DefaultCopyThreshold. Objects above MaxCopySize are always copied in
	// parts.
	Threshold int64
	// PartSize is the size of a part in bytes, MinPartSize to MaxPartSize. Objects of
	// more than MaxParts parts get larger parts. Default: DefaultCopyPartSize.
	PartSize int64
}

// WithDefaults returns p with its defaults set.
func (p CopyParts) WithDefaults() CopyParts {
	if p.Threshold == 0 {
		p.Threshold = DefaultCopyThreshold
	}
	if p.PartSize == 0 {
		p.PartSize = DefaultCopyPartSize
	}
	return p
}

// Split returns the number of parts of a copy of size bytes, and the size of all parts
// except the last. The number is 0 for a copy in one request.
func (p CopyParts) Split(size int64) (parts int, partSize int64) {
	p = p.WithDefaults()
	if size <= min(p.Threshold, MaxCopySize) {
		return 0, 0
	}
	partSize = max(p.PartSize, (size+MaxParts-1)/MaxParts)
	return int((size + partSize - 1) / partSize), partSize
}

// CopyRequest is the argument of [Store.Copy].
type CopyRequest struct {
	// From and To are the keys, which must differ.
	From, To string
	// SourceETag is the ETag of the requested version of From.
	SourceETag string
	// Size is the size of that version in bytes.
	Size int64
	// Parts defines the parts of large copies.
	Parts CopyParts
	// InFlight is the number of parts that are copied in parallel. Default: 4.
	InFlight int
}

// Check validates the request. Errors of keys, also that of a copy onto itself, wrap
// ErrInvalidKey; other errors are bugs of the caller.
func (r CopyRequest) Check() error {
	if err := CheckKey(r.From); err != nil {
		return err
	}
	if err := CheckKey(r.To); err != nil {
		return err
	}
	if r.From == r.To {
		return fmt.Errorf("%w: copy of %q onto itself", ErrInvalidKey, r.From)
	}
	parts := r.Parts.WithDefaults()
	var err error
	switch {
	case r.SourceETag == "":
		err = errors.New("the source's ETag is missing")
	case strings.ContainsFunc(r.SourceETag, func(c rune) bool { return c < 0x20 || c == 0x7f || c == '"' }):
		err = fmt.Errorf("%q is not an ETag", r.SourceETag)
	case r.Size < 0:
		err = fmt.Errorf("negative size %d", r.Size)
	case r.InFlight < 0:
		err = fmt.Errorf("%d parts in flight", r.InFlight)
	case parts.Threshold < 0:
		err = fmt.Errorf("negative threshold %d", parts.Threshold)
	case parts.PartSize < MinPartSize || parts.PartSize > MaxPartSize:
		err = fmt.Errorf("part size %d, must be %d to %d", parts.PartSize, MinPartSize, int64(MaxPartSize))
	case r.Size > MaxParts*MaxPartSize:
		err = fmt.Errorf("%d bytes do not fit into %d parts", r.Size, MaxParts)
	}
	if err != nil {
		return fmt.Errorf("copy %s to %s: %w", r.From, r.To, err)
	}
	return nil
}

// ProvedEqual reports whether the content of the target is proved to be that of the source.
// It is if the sizes are equal and
//
//   - both have a checksum of one type, and the checksums are equal; or else
//   - both have the same ETag, which is an MD5; or else
//   - the target was copied in parts from an object with the source's ETag, as recorded by
//     [Store.Copy].
//
// Only Head returns all of these properties. With an Info of List the result is more often
// false, but never wrongly true. Keys are not compared.
func ProvedEqual(source, target Info) bool {
	if source.Size != target.Size {
		return false
	}
	kind, _, ok := strings.Cut(source.Checksum, ":")
	if other, _, has := strings.Cut(target.Checksum, ":"); ok && has && kind == other {
		return source.Checksum == target.Checksum
	}
	if hasMD5ETag(source) && hasMD5ETag(target) && source.ETag == target.ETag {
		return true
	}
	return source.ETag != "" && target.SourceETag == source.ETag && strings.Contains(target.ETag, "-")
}

// hasMD5ETag reports whether an object's ETag is the MD5 of its content.
func hasMD5ETag(info Info) bool {
	return len(info.ETag) == 32 && !info.OpaqueETag && isHex(info.ETag)
}
