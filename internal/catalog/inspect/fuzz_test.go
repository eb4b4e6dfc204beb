package inspect_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/snapshotd/snapshotd/internal/catalog/inspect"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// allKeys has a key of each kind, and some that are of none.
var allKeys = []string{
	"", "/", keys.Format, keys.Format + "x", keys.IDs, keys.Leader, keys.Epoch, keys.RolledBack, keys.Clock, keys.Cycle,
	keys.Store("a"), keys.Verdict("a"), keys.Snapshot(1),
	keys.Pending(1, 2), keys.Pin(1, 2), keys.Unpin, keys.Job(1), keys.Task(1, 2), keys.Progress(1,
		2), keys.JobLimits(1), keys.Worker(1),
	keys.Assignment(1, 2, 3), keys.Generation(1), keys.Tombstone(1, 2), keys.CollectionName("a",
		"b"), keys.Collection(1), keys.Partition(1, 2),
	keys.Index(1, 2), keys.Channel(1, 2), keys.Segment(1, 2), keys.Unit(1, 2), keys.Replaced(1, 2, 3), keys.Request("p",
		"m", "t"),
	keys.OwnerSegment(1), keys.OwnerBuild(1), keys.OwnerRange(1), keys.Owners, keys.Gone(1),
}

// Whatever there is a record of is shown as that under one of the keys.
func TestEveryRecordIsShown(t *testing.T) {
	messages := storagev1.File_snapshotd_storage_v1_storage_proto.Messages()
	for i := range messages.Len() {
		name := messages.Get(i).FullName()
		m, err := protoregistry.GlobalTypes.FindMessageByName(name)
		if err != nil {
			t.Fatal(err)
		}
		rec, ok := m.New().Interface().(record.Message)
		if !ok || strings.HasSuffix(string(name), "Head") { // which is of another record
			continue
		}
		rec.ProtoReflect().Set(m.Descriptor().Fields().ByName("format"), protoreflect.ValueOfUint32(record.Format))
		if !slices.ContainsFunc(allKeys, func(key string) bool {
			kind, _ := inspect.Describe(meta.KeyValue{Key: key, Value: record.Encode(rec)})
			return kind == string(name)
		}) {
			t.Errorf("no key shows a %s", name)
		}
	}
	if kind, _ := inspect.Describe(meta.KeyValue{
		Key:   keys.Replaced(1, 2, 3),
		Value: record.Encode(&storagev1.Name{Format: record.Format, Id: 3}),
	}); kind == "" {
		t.Error("what leads from a segment to its parts is not shown")
	}
}

// FuzzDescribe shows anything that may lie under any key. What is shown as a record
// says as much as the record, what is not is all its bytes, and the key of the
// tokens is in neither.
func FuzzDescribe(f *testing.F) {
	name := record.Encode(&storagev1.Name{Format: record.Format, Id: 7})
	segment := record.Encode(&storagev1.Segment{Format: record.Format, Files: &storagev1.Files{
		Count: 1, Kind: []uint32{1}, Attributes: map[uint32]*storagev1.Attributes{0: {Pairs: map[string]string{"a": "b"}}},
	}})
	for _, key := range allKeys {
		f.Add(key, name)
		f.Add(key, segment)
		f.Add(key, []byte("\xff\x00text"))
	}
	f.Fuzz(func(t *testing.T, key string, value []byte) {
		kind, text := inspect.Describe(meta.KeyValue{Key: key, Value: slices.Clone(value)})
		if !utf8.ValidString(kind) || !utf8.ValidString(text) {
			t.Fatalf("%q: %q, %q: no message can hold it", key, kind, text)
		}
		switch {
		case kind == "" && strings.HasPrefix(key, keys.Format):
			if text != "" {
				t.Errorf("%q: %q may reveal a secret", key, text)
			}
		case kind == "":
			if got, err := base64.StdEncoding.DecodeString(text); err != nil || !bytes.Equal(got, value) {
				t.Errorf("%q: %q is not the value, err = %v", key, text, err)
			}
		case key == keys.Leader:
			if !json.Valid([]byte(text)) {
				t.Errorf("%q is no JSON", text)
			}
		default:
			checkShown(t, key, value, kind, text)
		}

		// Any other field of the cluster's record, in any place. Behind half
		// a field the key is not the key any more.
		if proto.Unmarshal(value, &storagev1.Cluster{}) != nil {
			return
		}
		secret := []byte("0123456789abcdefghijklmnopqrstuv")
		cluster := slices.Concat(value, []byte{6<<3 | 2, byte(len(secret))}, secret)
		_, text = inspect.Describe(meta.KeyValue{Key: keys.Format + strings.TrimPrefix(key, keys.Format), Value: cluster})
		if strings.Contains(text, string(secret)) || strings.Contains(text, base64.StdEncoding.EncodeToString(secret)[:40]) {
			t.Errorf("%q reveals the key of the tokens: %s", key, text)
		}
	})
}

// checkShown reads the text of a record, which says what its bytes do.
func checkShown(t *testing.T, key string, value []byte, kind, text string) {
	t.Helper()
	m, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName(kind))
	if err != nil {
		t.Fatal(err)
	}
	want, got := m.New().Interface(), m.New().Interface()
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(value, want); err != nil {
		t.Fatalf("%q: %s was shown: %v", key, kind, err)
	}
	if c, ok := want.(*storagev1.Cluster); ok {
		c.TokenKey = nil
	}
	if err := protojson.Unmarshal([]byte(text), got); err != nil {
		t.Fatalf("%q: %s: %v", key, text, err)
	}
	if !proto.Equal(want, got) {
		t.Errorf("%q: %v is shown as %s", key, want, text)
	}
}
