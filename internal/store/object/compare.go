package object

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Likeness is the result of comparing an object with its record.
//
// An ETag names a version. It proves the content only if both ETags have the same layout. A
// copy by another tool keeps the content and may have another layout: another part size,
// encryption key, or kind of store.
//
//	size       checksums    ETags                          likeness
//	differs    any          any                            Altered
//	equal      differ       any                            Altered
//	equal      equal, or    equal                          Equal
//	           not compared
//	equal      equal        one is missing                 Equal
//	equal      not compared one is missing                 NotCompared
//	equal      equal        differ                         OtherLayout
//	equal      not compared two MD5s, or one part each     Altered
//	equal      not compared different layouts              OtherLayout
//	equal      not compared equal numbers of parts, two    NotKnown
//	                        directories, unknown layouts
//
// Checksums are compared if they have the same type. A registered MD5 is compared with an
// ETag that is an MD5.
type Likeness int

// The likenesses. The zero value is that of a record without evidence.
const (
	NotCompared Likeness = iota // record and store have no common property
	Equal                       // the recorded version
	OtherLayout                 // the ETags are not comparable, and no other property differs
	NotKnown                    // the ETags differ, with equal or other content
	Altered                     // other content
)

// String returns the likeness in words.
func (l Likeness) String() string {
	return [...]string{"not compared", "equal", "ETag of another layout", "not known", "altered"}[l]
}

// Refused reports whether the object must not be used as the recorded one: a property
// differs, even if that proves nothing.
func (l Likeness) Refused() bool { return l > Equal }

// Compare compares size, checksum and ETag of an object with its record, but not the keys.
// Reason describes the difference and the remedy; it is empty unless the likeness is
// [Likeness.Refused]. Only Head returns a checksum: without it, checksums are not compared.
//
// A recorded ETag of an object that is encrypted by KMS is treated as an MD5, since the
// record has no encryption.
func Compare(recorded, now Info) (l Likeness, reason string) {
	sums := compareSums(recorded, now)
	switch {
	case recorded.Size != now.Size:
		return Altered, fmt.Sprintf("it has %d bytes, not %d", now.Size, recorded.Size)
	case sums == sumsDiffer:
		return Altered, fmt.Sprintf("it has checksum %s, not %s", sumText(recorded, now), recorded.Checksum)
	case recorded.ETag == "" || now.ETag == "":
		if sums == sumsEqual {
			return Equal, ""
		}
		return NotCompared, ""
	case SameETag(recorded.ETag, now.ETag):
		return Equal, ""
	}
	was, is := layoutOf(recorded), layoutOf(now)
	etags := fmt.Sprintf("ETag %s, not %s", now.ETag, recorded.ETag)
	switch {
	case sums == sumsEqual || was != is:
		return OtherLayout, fmt.Sprintf("ETag of another layout: it has %s (%s), not %s (%s); size %d is equal, %s; %s",
			now.ETag, is, recorded.ETag, was, now.Size, sums.describe(recorded, now), was.remedy())
	case was.kind == layoutMD5, was.kind == layoutParts && was.parts == 1:
		return Altered, fmt.Sprintf("it has %s: its content was replaced", etags)
	case was.kind == layoutDirectory:
		return NotKnown, fmt.Sprintf("it has %s: it was written again, or copied without its modification time", etags)
	case was.kind == layoutParts:
		return NotKnown, fmt.Sprintf("it has %s: its content was replaced, or copied in parts of another size; %s",
			etags, sums.describe(recorded, now))
	}
	return NotKnown, fmt.Sprintf("it has %s: the content is equal or other; %s",
		etags, sums.describe(recorded, now))
}

// sums is the result of comparing two checksums.
type sums int

const (
	sumsUnknown sums = iota // not comparable
	sumsEqual
	sumsDiffer
)

func (s sums) describe(recorded, now Info) string {
	kind, _, _ := strings.Cut(recorded.Checksum, ":")
	switch {
	case s == sumsEqual:
		return "checksum " + kind + " is equal"
	case recorded.Checksum == "":
		return "no checksum was registered to compare"
	case now.Checksum == "":
		return "the store has no checksum of the whole object to compare with " + kind
	}
	other, _, _ := strings.Cut(now.Checksum, ":")
	return "checksums " + other + " and " + kind + " cannot be compared"
}

func compareSums(recorded, now Info) sums {
	kind, value, ok := strings.Cut(recorded.Checksum, ":")
	if !ok {
		return sumsUnknown
	}
	otherKind, other, ok := strings.Cut(sumText(recorded, now), ":")
	switch {
	case !ok || !strings.EqualFold(kind, otherKind):
		return sumsUnknown
	case value == other:
		return sumsEqual
	}
	return sumsDiffer
}

// sumText returns the checksum of now to compare with that of recorded.
func sumText(recorded, now Info) string {
	kind, _, _ := strings.Cut(recorded.Checksum, ":")
	if !strings.EqualFold(kind, "MD5") || !hasMD5ETag(now) {
		return now.Checksum
	}
	sum, err := hex.DecodeString(now.ETag)
	if err != nil {
		return now.Checksum
	}
	return kind + ":" + base64.StdEncoding.EncodeToString(sum)
}

type layoutKind int

const (
	layoutOther     layoutKind = iota // a private layout of the store
	layoutMD5                         // of the content
	layoutParts                       // a digest of the MD5s of parts, and their number
	layoutEncrypted                   // looks like an MD5 but is not
	layoutDirectory                   // size and modification time
)

// layout describes the composition of an ETag.
type layout struct {
	kind  layoutKind
	parts int
}

func (l layout) String() string {
	switch l.kind {
	case layoutMD5:
		return "an MD5 of the whole"
	case layoutParts:
		return l.pieces()
	case layoutEncrypted:
		return "of an encrypted object"
	case layoutDirectory:
		return "of a directory"
	default:
		return "of a private layout of the store"
	}
}

func (l layout) pieces() string {
	if l.parts == 1 {
		return "1 part"
	}
	return strconv.Itoa(l.parts) + " parts"
}

// remedy describes how to copy the object so that its ETag has the layout.
func (l layout) remedy() string {
	const original = "or use the store that it was copied from"
	switch l.kind {
	case layoutMD5:
		return "copy it again in one request, not in parts, " + original
	case layoutParts:
		return "copy it again in " + l.pieces() + " of the previous size, " + original
	case layoutEncrypted:
		return "use the store that it was copied from"
	case layoutDirectory:
		return "copy it to a directory with its modification time, " + original
	default:
		return "use a store of the kind that it was copied from"
	}
}

func layoutOf(info Info) layout {
	const md5Digits = 32
	sum, parts, composed := strings.Cut(withoutInode(info.ETag), "-")
	switch {
	case composed && isHex(sum) && len(sum) < md5Digits && isHex(parts):
		return layout{kind: layoutDirectory}
	case len(sum) != md5Digits || !isHex(sum):
		return layout{}
	case composed:
		n, err := strconv.ParseUint(parts, 10, 16)
		if err != nil || n == 0 || n > MaxParts {
			return layout{}
		}
		return layout{kind: layoutParts, parts: int(n)}
	case info.OpaqueETag:
		return layout{kind: layoutEncrypted}
	}
	return layout{kind: layoutMD5}
}

// isHex reports whether text is not empty and consists of lower-case hex digits.
func isHex(text string) bool {
	return text != "" && strings.Trim(text, "0123456789abcdef") == ""
}
