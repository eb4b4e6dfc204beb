package object

import (
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
)

// Likeness is what a record of an object proves about the object that a store has.
//
// An ETag names a version and is evidence of the content only where both ETags have
// the same layout. A copy by another tool keeps the content and may have another
// layout: parts of another size, another key of encryption, another kind of store.
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
//	equal      not compared of two layouts                 OtherLayout
//	equal      not compared of as many parts, of two       NotKnown
//	                        directories, of no known form
//
// Checksums are compared when both are of one type. A registered MD5 is compared
// with an ETag that is one.
type Likeness int

// The likenesses. The zero value is that of a record without evidence.
const (
	NotCompared Likeness = iota // the record has nothing that the store has too
	Equal                       // the version that was recorded
	OtherLayout                 // nothing speaks for another content, and the ETags cannot be compared
	NotKnown                    // the ETags differ, which may have either cause
	Altered                     // another content
)

// String returns a word for people.
func (l Likeness) String() string {
	return [...]string{"not compared", "equal", "ETag of another layout", "not known", "altered"}[l]
}

// Refused reports whether the object is not used in place of the recorded one:
// something of it differs, whatever that proves.
func (l Likeness) Refused() bool { return l > Equal }

// Compare compares an object with a record of it: size, checksum and ETag. Reason
// says for people what differs and what to do; it is empty unless the likeness is
// [Likeness.Refused]. A checksum is found by Head alone: of an Info without one a
// checksum is not compared. Compare does not look at keys.
//
// An ETag that was recorded of an object under a key of KMS is taken for an MD5,
// since the record does not say so.
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
			now.ETag, is, recorded.ETag, was, now.Size, sums.of(recorded, now), was.again())
	case was.kind == layoutMD5, was.kind == layoutParts && was.parts == 1:
		return Altered, fmt.Sprintf("it has %s: its content was replaced", etags)
	case was.kind == layoutDirectory:
		return NotKnown, fmt.Sprintf("it has %s: it was written again, or copied without its modification time", etags)
	case was.kind == layoutParts:
		return NotKnown, fmt.Sprintf("it has %s: its content was replaced, or copied in parts of another size; %s",
			etags, sums.of(recorded, now))
	}
	return NotKnown, fmt.Sprintf("it has %s, which does not say whether the content is another; %s",
		etags, sums.of(recorded, now))
}

// sums is what the checksums of two objects say.
type sums int

const (
	sumsUnknown sums = iota // they cannot be compared
	sumsEqual
	sumsDiffer
)

func (s sums) of(recorded, now Info) string {
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

// sumText returns the checksum of now that is compared with that of recorded.
func sumText(recorded, now Info) string {
	kind, _, _ := strings.Cut(recorded.Checksum, ":")
	if !strings.EqualFold(kind, "MD5") || !plain(now) {
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
	layoutOther     layoutKind = iota // a text of the store's own
	layoutMD5                         // of the content
	layoutParts                       // a digest of the MD5s of parts, and their number
	layoutEncrypted                   // looks like an MD5, and is none
	layoutDirectory                   // size and modification time
)

// layout is what an ETag is made of.
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
		return "of a form of the store's own"
	}
}

func (l layout) pieces() string {
	if l.parts == 1 {
		return "1 part"
	}
	return strconv.Itoa(l.parts) + " parts"
}

// again says how the object gets an ETag of the layout.
func (l layout) again() string {
	const original = "or use the store that it was copied from"
	switch l.kind {
	case layoutMD5:
		return "copy it again in one request, not in parts, " + original
	case layoutParts:
		return "copy it again in " + l.pieces() + " of the size that it had, " + original
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

// isHex reports whether text is of lower-case hex digits, and not empty.
func isHex(text string) bool {
	return text != "" && strings.Trim(text, "0123456789abcdef") == ""
}
