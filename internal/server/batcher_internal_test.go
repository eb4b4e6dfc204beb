package server

import (
	"errors"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestBatcher bounds the items and the bytes of a message, except for a single large item.
func TestBatcher(t *testing.T) {
	for name, tc := range map[string]struct {
		key  int // bytes
		n    int
		want []int // items in each message
	}{
		"nothing":         {1, 0, nil},
		"one message":     {1, maxBatch, []int{maxBatch}},
		"one more":        {1, maxBatch + 1, []int{maxBatch, 1}},
		"half a message":  {maxBatchBytes / 2, 3, []int{1, 1, 1}}, // plus overhead
		"a third of it":   {maxBatchBytes / 3, 4, []int{2, 2}},
		"a whole message": {maxBatchBytes, 2, []int{1, 1}},
	} {
		var got []int
		b := batcher[*pb.Orphan]{send: func(list []*pb.Orphan) error {
			got = append(got, len(list))
			if size := proto.Size(&pb.ListOrphansResponse{Orphans: list}); size > maxBatchBytes && len(list) > 1 {
				t.Errorf("%s: a message of %d bytes", name, size)
			}
			return nil
		}}
		for range tc.n {
			if err := b.add(&pb.Orphan{Key: strings.Repeat("k", tc.key)}); err != nil {
				t.Fatal(err)
			}
		}
		if err := b.flush(); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tc.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
	gone := errors.New("gone")
	b := batcher[*pb.Orphan]{send: func([]*pb.Orphan) error { return gone }}
	for range maxBatch {
		if err := b.add(&pb.Orphan{}); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.add(&pb.Orphan{}); !errors.Is(err, gone) {
		t.Errorf("got %v", err)
	}
}
