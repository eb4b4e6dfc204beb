package record_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

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

func TestNewOp(t *testing.T) {
	rand := bytes.NewReader([]byte("abcdefghijklmnopqrst")) // 20 bytes are not enough for two
	if op, err := record.NewOp(rand); op != "6162636465666768696a6b6c" || err != nil {
		t.Errorf("%q, err = %v", op, err)
	}
	if op, err := record.NewOp(rand); op != "" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("%q, err = %v, want %v", op, err, io.ErrUnexpectedEOF)
	}
}

func TestGaps(t *testing.T) {
	for _, ids := range [][]int64{nil, {5}, {5, 6, 7}, {1, 1 << 40, 1<<62 + 1}} {
		if got := record.Sums(record.Gaps(ids)); !slices.Equal(got, ids) {
			t.Errorf("%v became %v", ids, got)
		}
	}
	if got := record.Gaps([]int64{100, 101, 103}); !slices.Equal(got, []int64{100, 1, 2}) {
		t.Errorf("gaps %v", got)
	}
}

func TestTimes(t *testing.T) {
	last := time.Unix(0, math.MaxInt64).UTC()
	for name, c := range map[string]struct {
		time time.Time
		ns   int64
		back time.Time
	}{
		"none":         {time.Time{}, 0, time.Time{}},
		"some":         {time.Unix(1, 2).UTC(), 1_000_000_002, time.Unix(1, 2).UTC()},
		"another zone": {time.Unix(1, 2).In(time.FixedZone("x", 3600)), 1_000_000_002, time.Unix(1, 2).UTC()},
		"the last":     {last, math.MaxInt64, last},
		"later":        {last.AddDate(1, 0, 0), math.MaxInt64, last},
	} {
		t.Run(name, func(t *testing.T) {
			ns := record.Nanos(c.time)
			if back := record.Time(ns); ns != c.ns || back != c.back {
				t.Errorf("%v became %d and %v, want %d and %v", c.time, ns, back, c.ns, c.back)
			}
		})
	}
}
