package record_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func TestRoundTrip(t *testing.T) {
	want := &storagev1.Partition{Format: record.Format, Name: "p", Attributes: map[string]string{}}
	for i := range 50 {
		want.Attributes[fmt.Sprint(i)] = "v"
	}
	data := record.Encode(want)
	for range 20 {
		if string(record.Encode(want)) != string(data) {
			t.Fatal("equal records have different bytes")
		}
	}
	got := &storagev1.Partition{}
	if err := record.Decode(meta.KeyValue{Key: "/k", Value: data}, got); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestUnreadable(t *testing.T) {
	newer := record.Encode(&storagev1.Name{Format: record.Format, Id: 5})
	newer[1]++ // the format is the first field
	for _, value := range [][]byte{nil, {}, {0xff}, []byte("text"), newer, newer[:1]} {
		err := record.Decode(meta.KeyValue{Key: "/the/key", Value: value}, &storagev1.Name{})
		if !errors.Is(err, record.ErrUnreadable) || !strings.Contains(err.Error(), "/the/key") {
			t.Errorf("%x: err = %v, want %v that names the key", value, err, record.ErrUnreadable)
		}
	}
}

func TestEncodeWithoutFormat(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	record.Encode(&storagev1.Name{Id: 1})
}
