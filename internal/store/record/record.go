// Package record turns records of the metadata store into bytes and back.
package record

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Format is the format that this release writes, and the only one it reads.
const Format = 1

// ErrUnreadable means that a record is damaged or of a format that this release
// does not know. What it stands for must be left alone.
var ErrUnreadable = errors.New("unreadable record")

// Message is a record.
type Message interface {
	proto.Message
	GetFormat() uint32
}

// Encode returns the bytes of m, the same for equal records. It panics when m
// has no format or cannot be encoded, which only a mistake in this program can
// bring about.
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
	if err := proto.Unmarshal(kv.Value, m); err != nil {
		return fmt.Errorf("%w at %s: %w", ErrUnreadable, kv.Key, err)
	}
	if m.GetFormat() != Format {
		return fmt.Errorf("%w at %s: format %d, this release reads %d", ErrUnreadable, kv.Key, m.GetFormat(), Format)
	}
	return nil
}
