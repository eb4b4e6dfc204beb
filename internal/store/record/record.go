// Package record encodes and decodes the records of the metadata store. A record is a
// message of storagepb with a format, and a release reads the formats that it knows only:
// any other is ErrUnreadable, so that nothing is decided from fields that an older release
// does not know. The op of a record is a random id of the write; it shows whether a
// transaction without an answer took effect.
package record

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Format is the only format that this release writes and reads.
const Format = 1

// ErrUnreadable means that a record is damaged or has an unknown format. The thing that it
// describes must be left alone.
var ErrUnreadable = errors.New("unreadable record")

// Message is a record.
type Message interface {
	proto.Message
	GetFormat() uint32
}

// Encode returns the bytes of m, equal bytes for equal records. It panics when m has no
// format or cannot be encoded, which is a mistake of the program.
func Encode(m Message) []byte {
	if m.GetFormat() != Format {
		panic(fmt.Sprintf("record %T without its format", m))
	}
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("encode record %T: %v", m, err))
	}
	return data
}

// Decode reads kv into m. The error wraps ErrUnreadable and names the key.
func Decode(kv meta.KeyValue, m Message) error {
	return decode(kv, m, proto.UnmarshalOptions{})
}

// DecodeHead is Decode into a message with some of the record's fields. It skips the
// others.
func DecodeHead(kv meta.KeyValue, m Message) error {
	return decode(kv, m, proto.UnmarshalOptions{DiscardUnknown: true})
}

func decode(kv meta.KeyValue, m Message, o proto.UnmarshalOptions) error {
	if err := o.Unmarshal(kv.Value, m); err != nil {
		return fmt.Errorf("%w at %s: %w", ErrUnreadable, kv.Key, err)
	}
	if m.GetFormat() != Format {
		return fmt.Errorf("%w at %s: format %d, this release reads %d", ErrUnreadable, kv.Key, m.GetFormat(), Format)
	}
	return nil
}

// NewOp returns a random id of an operation. Every record has the id of the operation that
// wrote it. The error is rand's.
func NewOp(rand io.Reader) (string, error) {
	b := make([]byte, 12)
	if _, err := io.ReadFull(rand, b); err != nil {
		return "", fmt.Errorf("make an operation id: %w", err)
	}
	return hex.EncodeToString(b), nil
}

// Gaps returns the first of ascending ids and the differences between them, which are short
// when encoded; Sums is the inverse.
func Gaps(ids []int64) []int64 {
	out := slices.Clone(ids)
	for i := len(out) - 1; i > 0; i-- {
		out[i] -= out[i-1]
	}
	return out
}

// Sums returns the ids from which Gaps made gaps.
func Sums(gaps []int64) []int64 {
	out := slices.Clone(gaps)
	for i := 1; i < len(out); i++ {
		out[i] += out[i-1]
	}
	return out
}

// Nanos returns t in the form of records, in nanoseconds since 1970: 0 for the zero time,
// and the maximum for a time after 2262.
func Nanos(t time.Time) int64 {
	switch {
	case t.IsZero():
		return 0
	case t.After(time.Unix(0, math.MaxInt64)):
		return math.MaxInt64
	}
	return t.UnixNano()
}

// Time returns the time of Nanos, in UTC.
func Time(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns).UTC()
}
