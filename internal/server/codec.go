package server

import (
	"bytes"

	"google.golang.org/grpc/encoding"
	protoenc "google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// Limits on the elements of a message: the entries of its lists and maps, nested ones
// included. An element takes two bytes on the wire and some hundred in memory, so the
// size of a message bounds neither memory nor work.
const (
	maxElements = 150_000
	// maxElementsForAll is the number of elements up to which all violations of the
	// rules are reported; for a larger message only the first is.
	maxElementsForAll = 1_000
	// maxDepth is the maximum nesting of messages; the API has 5.
	maxDepth = 32
)

// countingCodec is gRPC's own codec, except for messages with more than maxElements: it
// marks these instead of decoding them, because a codec cannot refuse a message with a
// reason. See [Server.validate].
type countingCodec struct{ encoding.CodecV2 }

func newCodec() countingCodec { return countingCodec{encoding.GetCodecV2(protoenc.Name)} }

// tooManyElements marks a message that was not decoded: an unknown field that no message
// of the API has. A message of a client with this field is refused as well.
var tooManyElements = protowire.AppendString(protowire.AppendTag(nil, protowire.MaxValidNumber, protowire.BytesType),
	"too many elements")

// Unmarshal implements [encoding.CodecV2].
func (c countingCodec) Unmarshal(data mem.BufferSlice, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	whole := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer whole.Free()
	if countEncoded(maxElements, whole.ReadOnlyData(), m.ProtoReflect().Descriptor(), 0) < 0 {
		proto.Reset(m)
		m.ProtoReflect().SetUnknown(tooManyElements)
		return nil
	}
	return c.CodecV2.Unmarshal(mem.BufferSlice{whole}, v)
}

// hasTooManyElements reports whether a countingCodec has marked m.
func hasTooManyElements(m proto.Message) bool {
	return bytes.Equal(m.ProtoReflect().GetUnknown(), tooManyElements)
}

// countEncoded returns left minus the number of elements of the encoded message b of
// type d. It stops below 0 and at an encoding error, which the decoder reports.
func countEncoded(left int, b []byte, d protoreflect.MessageDescriptor, depth int) int {
	if depth > maxDepth {
		return -1
	}
	for len(b) > 0 && left >= 0 {
		number, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return left
		}
		b = b[n:]
		size := protowire.ConsumeFieldValue(number, kind, b)
		if size < 0 {
			return left
		}
		value := b[:size]
		b = b[size:]
		f := d.Fields().ByNumber(number)
		if f == nil {
			continue
		}
		message := f.Message()
		switch {
		case message != nil && kind == protowire.BytesType:
			if f.IsList() || f.IsMap() {
				left--
			}
			inner, _ := protowire.ConsumeBytes(value)
			left = countEncoded(left, inner, message, depth+1)
		case !f.IsList():
		case kind == protowire.BytesType && packable(f.Kind()):
			inner, _ := protowire.ConsumeBytes(value)
			left -= packed(inner, f.Kind())
		default:
			left--
		}
	}
	return left
}

// packable reports whether a list of k may be packed.
func packable(k protoreflect.Kind) bool {
	return k != protoreflect.StringKind && k != protoreflect.BytesKind
}

// packed returns the number of elements of a packed list.
func packed(b []byte, k protoreflect.Kind) int {
	switch k {
	case protoreflect.Fixed32Kind, protoreflect.Sfixed32Kind, protoreflect.FloatKind:
		return len(b) / 4
	case protoreflect.Fixed64Kind, protoreflect.Sfixed64Kind, protoreflect.DoubleKind:
		return len(b) / 8
	default: // each varint has one byte without the high bit
		n := 0
		for _, c := range b {
			if c < 0x80 {
				n++
			}
		}
		return n
	}
}

// hasMoreThan reports whether a decoded message has more elements than limit.
func hasMoreThan(limit int, m protoreflect.Message) bool { return countDecoded(limit, m) < 0 }

// countDecoded returns left minus the number of elements of m. It stops below 0.
func countDecoded(left int, m protoreflect.Message) int {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.IsMap():
			left -= v.Map().Len()
		case f.IsList():
			left -= v.List().Len()
			for i := 0; left >= 0 && f.Message() != nil && i < v.List().Len(); i++ {
				left = countDecoded(left, v.List().Get(i).Message())
			}
		case f.Message() != nil:
			left = countDecoded(left, v.Message())
		}
		return left >= 0
	})
	return left
}
