package object

import (
	"errors"
	"fmt"
	"strings"
)

// The bounds that S3 sets to a copy, which hold for every store so that what is
// right for one is right for all. In bytes.
const (
	// MaxCopySize is what one request copies at most.
	MaxCopySize = 5 << 30
	// MinPartSize and MaxPartSize bound the size of a part.
	MinPartSize = 5 << 20
	MaxPartSize = 5 << 30
	// MaxParts is how many parts an object may have.
	MaxParts = 10_000
)

// The defaults of [CopyParts], in bytes.
const (
	DefaultCopyThreshold = 256 << 20
	DefaultCopyPartSize  = 128 << 20
)

// CopyParts says how large objects are copied. The ETag of the target depends
// on it, so whoever may copy an object again keeps it.
type CopyParts struct {
	// Threshold is the size in bytes above which an object is copied in parts.
	// Default: DefaultCopyThreshold. One larger than MaxCopySize always is.
	Threshold int64
	// PartSize is the size of a part in bytes, MinPartSize to MaxPartSize. It
	// grows with objects of more than MaxParts parts. Default:
	// DefaultCopyPartSize.
	PartSize int64
}

// WithDefaults returns p with its defaults filled in.
func (p CopyParts) WithDefaults() CopyParts {
	if p.Threshold == 0 {
		p.Threshold = DefaultCopyThreshold
	}
	if p.PartSize == 0 {
		p.PartSize = DefaultCopyPartSize
	}
	return p
}

// Split returns in how many parts an object of size bytes is copied, and how
// large each but the last is; no parts: it is copied at once.
func (p CopyParts) Split(size int64) (parts int, partSize int64) {
	p = p.WithDefaults()
	if size <= min(p.Threshold, MaxCopySize) {
		return 0, 0
	}
	partSize = max(p.PartSize, (size+MaxParts-1)/MaxParts)
	return int((size + partSize - 1) / partSize), partSize
}

// CopyRequest says what [Store.Copy] copies.
type CopyRequest struct {
	// From and To are the keys, which must differ.
	From, To string
	// SourceETag is the ETag of the version of From that is meant.
	SourceETag string
	// Size is that version's, in bytes.
	Size int64
	// Parts says how it is copied when it is large.
	Parts CopyParts
	// InFlight is how many parts are copied at once. Default: 4.
	InFlight int
}

// Check says whether a store may be asked for the copy. An error about a key
// wraps ErrInvalidKey, as does that of a copy onto itself; any other is a
// mistake of the program.
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
		err = fmt.Errorf("%q is no ETag", r.SourceETag)
	case r.Size < 0:
		err = fmt.Errorf("negative size %d", r.Size)
	case r.InFlight < 0:
		err = fmt.Errorf("%d parts in flight", r.InFlight)
	case parts.Threshold < 0:
		err = fmt.Errorf("negative threshold %d", parts.Threshold)
	case parts.PartSize < MinPartSize || parts.PartSize > MaxPartSize:
		err = fmt.Errorf("part size %d, must be %d to %d", parts.PartSize, MinPartSize, int64(MaxPartSize))
	case r.Size > MaxParts*MaxPartSize:
		err = fmt.Errorf("%d bytes do not go into %d parts", r.Size, MaxParts)
	}
	if err != nil {
		return fmt.Errorf("copy %s to %s: %w", r.From, r.To, err)
	}
	return nil
}

// ProvedEqual says whether the target's bytes are surely those of the source.
// They are when the sizes agree and
//
//   - both have a checksum of one type, and it is the same one; or else
//   - both have the same ETag, which is an MD5; or else
//   - the target was copied in parts from an object of the source's ETag, as
//     [Store.Copy] has noted there.
//
// What it needs beyond size and ETag only Head delivers: with what List says it
// returns false more often, and never true by mistake. It does not look at the
// keys.
func ProvedEqual(source, target Info) bool {
	if source.Size != target.Size {
		return false
	}
	kind, _, ok := strings.Cut(source.Checksum, ":")
	if other, _, has := strings.Cut(target.Checksum, ":"); ok && has && kind == other {
		return source.Checksum == target.Checksum
	}
	if plain(source) && plain(target) && source.ETag == target.ETag {
		return true
	}
	return source.ETag != "" && target.SourceETag == source.ETag && strings.Contains(target.ETag, "-")
}

// plain says whether an object's ETag is the MD5 of its content.
func plain(info Info) bool {
	return len(info.ETag) == 32 && !info.OpaqueETag &&
		!strings.ContainsFunc(info.ETag, func(c rune) bool { return (c < '0' || c > '9') && (c < 'a' || c > 'f') })
}
