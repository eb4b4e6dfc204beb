package record_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/allocated"
)

// What reading a record may take: fixedBytes, and so much for each byte that there
// is. An empty message in a list takes two bytes, and is a struct when it is read.
const (
	fixedBytes = 1 << 20
	perByte    = 200
)

// records are all types of records: the messages that have a format of theirs.
func records(f *testing.F) []protoreflect.MessageType {
	f.Helper()
	var types []protoreflect.MessageType
	messages := storagev1.File_snapshotd_storage_v1_storage_proto.Messages()
	for i := range messages.Len() {
		m, err := protoregistry.GlobalTypes.FindMessageByName(messages.Get(i).FullName())
		if err != nil {
			f.Fatal(err)
		}
		if _, ok := m.Zero().Interface().(record.Message); ok {
			types = append(types, m)
		}
	}
	return types
}

// full returns a record with all its fields set, and those of the messages in it.
func full(m protoreflect.Message, depth int) protoreflect.Message {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		switch f := fields.Get(i); {
		case f.IsMap():
			v := m.NewField(f).Map().NewValue()
			if f.MapValue().Kind() == protoreflect.MessageKind {
				full(v.Message(), depth-1)
			}
			m.Mutable(f).Map().Set(scalar(f.MapKey()).MapKey(), v)
		case f.IsList():
			list := m.Mutable(f).List()
			for range 2 {
				if f.Kind() == protoreflect.MessageKind {
					full(list.AppendMutable().Message(), depth-1)
				} else {
					list.Append(scalar(f))
				}
			}
		case f.Kind() == protoreflect.MessageKind:
			if depth > 0 {
				full(m.Mutable(f).Message(), depth-1)
			}
		case f.Name() == "format" && f.Kind() == protoreflect.Uint32Kind:
			m.Set(f, protoreflect.ValueOfUint32(record.Format))
		default:
			m.Set(f, scalar(f))
		}
	}
	return m
}

func scalar(f protoreflect.FieldDescriptor) protoreflect.Value {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString("text")
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{0, 1, 0xff})
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(true)
	case protoreflect.Int32Kind, protoreflect.Sint32Kind:
		return protoreflect.ValueOfInt32(-7)
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(7)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(1 << 63)
	default:
		return protoreflect.ValueOfInt64(1 << 62)
	}
}

// FuzzDecode reads anything as a record of any type. What is read is written to bytes
// that are read as the same, and are written again to the same bytes; anything else
// is unreadable, and the error says where it lies.
func FuzzDecode(f *testing.F) {
	types := records(f)
	for i, m := range types {
		f.Add(uint(i), []byte{8, record.Format})
		f.Add(uint(i), []byte{8, record.Format + 1})
		f.Add(uint(i), record.Encode(full(m.New(), 3).Interface().(record.Message)))
		// Empty messages, as many as there is room for, in each of its lists.
		for j := range m.Descriptor().Fields().Len() {
			if tag := m.Descriptor().Fields().Get(j).Number(); tag < 16 {
				f.Add(uint(i), slices.Concat([]byte{8, record.Format}, bytes.Repeat([]byte{byte(tag)<<3 | 2, 0}, 10_000)))
			}
		}
	}
	f.Fuzz(func(t *testing.T, kind uint, data []byte) {
		m := types[kind%uint(len(types))]
		name := m.Descriptor().FullName()
		kv := meta.KeyValue{Key: "/the/key", Value: slices.Clone(data)}
		got := m.New().Interface().(record.Message)
		var err error
		if took := allocated.Bytes(func() { err = record.Decode(kv, got) }); took > uint64(fixedBytes+perByte*len(data)) {
			t.Errorf("%s: %d bytes took %d bytes of memory", name, len(data), took)
		}
		if !bytes.Equal(kv.Value, data) {
			t.Fatalf("%s: the value was changed", name)
		}
		if err != nil {
			if !errors.Is(err, record.ErrUnreadable) || !strings.Contains(err.Error(), kv.Key) {
				t.Errorf("%s: err = %v, want %v that names the key", name, err, record.ErrUnreadable)
			}
			return
		}
		if got.GetFormat() != record.Format {
			t.Fatalf("%s of format %d was read", name, got.GetFormat())
		}
		written := record.Encode(got)
		again := m.New().Interface().(record.Message)
		if err := record.Decode(meta.KeyValue{Key: kv.Key, Value: written}, again); err != nil {
			t.Fatalf("%s: read what was written: %v", name, err)
		}
		if !proto.Equal(got, again) {
			t.Errorf("%s: %v became %v", name, got, again)
		}
		if twice := record.Encode(again); !bytes.Equal(written, twice) {
			t.Errorf("%s: equal records have different bytes", name)
		}
	})
}

// FuzzGaps turns ids into gaps and back.
func FuzzGaps(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{1, 2, 3, 4, 5, 6, 7, 8, 255, 255, 255, 255, 255, 255, 255, 127, 0, 0, 0, 0, 0, 0, 0, 128})
	f.Fuzz(func(t *testing.T, data []byte) {
		var ids []int64
		for ; len(data) >= 8; data = data[8:] {
			var id uint64
			for _, b := range data[:8] {
				id = id<<8 | uint64(b)
			}
			ids = append(ids, int64(id))
		}
		before := slices.Clone(ids)
		if got := record.Sums(record.Gaps(ids)); !slices.Equal(got, ids) {
			t.Errorf("%v became %v", ids, got)
		}
		if !slices.Equal(before, ids) {
			t.Error("the ids were changed")
		}
	})
}
