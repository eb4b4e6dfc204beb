package client_test

import (
	"context"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// The lists of the server have ten elements, in pages of three.
const pagedElements = 10

// pageAt returns the numbers on the page of a token and the next token.
func pageAt(token string) (numbers []int, next string) {
	from, _ := strconv.Atoi(token)
	for i := from; i < min(from+3, pagedElements); i++ {
		numbers = append(numbers, i)
	}
	if end := from + len(numbers); end < pagedElements {
		next = strconv.Itoa(end)
	}
	return numbers, next
}

func (s *server) ListPartitions(
	_ context.Context, req *snapshotdv1.ListPartitionsRequest,
) (*snapshotdv1.ListPartitionsResponse, error) {
	resp := &snapshotdv1.ListPartitionsResponse{}
	numbers, next := pageAt(req.GetPageToken())
	for _, n := range numbers {
		resp.Partitions = append(resp.Partitions, &snapshotdv1.Partition{Id: int64(n)})
	}
	resp.NextPageToken = next
	return resp, s.next()
}

func (s *server) ListIndexes(
	_ context.Context, req *snapshotdv1.ListIndexesRequest,
) (*snapshotdv1.ListIndexesResponse, error) {
	resp := &snapshotdv1.ListIndexesResponse{}
	numbers, next := pageAt(req.GetPageToken())
	for _, n := range numbers {
		resp.Indexes = append(resp.Indexes, &snapshotdv1.Index{Id: int64(n)})
	}
	resp.NextPageToken = next
	return resp, s.next()
}

// DescribeSnapshot has three partitions, three indexes and four manifests.
func (s *server) DescribeSnapshot(
	_ context.Context, req *snapshotdv1.DescribeSnapshotRequest,
) (*snapshotdv1.DescribeSnapshotResponse, error) {
	resp := &snapshotdv1.DescribeSnapshotResponse{}
	if req.GetPageToken() == "" {
		resp.Snapshot = &snapshotdv1.Snapshot{Id: 7}
	}
	numbers, next := pageAt(req.GetPageToken())
	for _, n := range numbers {
		switch {
		case n < 3:
			resp.Partitions = append(resp.Partitions, &snapshotdv1.Partition{Id: int64(n)})
		case n < 6:
			resp.Indexes = append(resp.Indexes, &snapshotdv1.Index{Id: int64(n)})
		default:
			resp.Manifests = append(resp.Manifests, &snapshotdv1.Manifest{FirstOrdinal: int64(n)})
		}
	}
	resp.NextPageToken = next
	return resp, s.next()
}

func (s *server) GetKey(_ context.Context, req *snapshotdv1.GetKeyRequest) (*snapshotdv1.GetKeyResponse, error) {
	resp := &snapshotdv1.GetKeyResponse{Key: req.GetKey()}
	switch req.GetKey() {
	case "/large":
		resp.Json = strings.Repeat("j", 5<<20)
		return resp, nil
	case "/exhausted":
		return nil, status.Error(codes.ResourceExhausted, "no more")
	}
	numbers, next := pageAt(req.GetPageToken())
	for _, n := range numbers {
		resp.Json += strconv.Itoa(n)
	}
	resp.NextPageToken = next
	return resp, s.next()
}

func TestAllPages(t *testing.T) {
	s := &server{}
	c := dial(t, s, client.Options{})
	ctx := t.Context()
	partitions, err := c.AllPartitions(ctx, &snapshotdv1.ListPartitionsRequest{PageSize: 1, PageToken: "9"})
	if err != nil || len(partitions.GetPartitions()) != pagedElements || partitions.GetPartitions()[9].GetId() != 9 ||
		partitions.GetNextPageToken() != "" {
		t.Errorf("partitions: %v, %v", partitions, err)
	}
	indexes, err := c.AllIndexes(ctx, &snapshotdv1.ListIndexesRequest{})
	if err != nil || len(indexes.GetIndexes()) != pagedElements || indexes.GetIndexes()[9].GetId() != 9 {
		t.Errorf("indexes: %v, %v", indexes, err)
	}
	d, err := c.DescribeWhole(ctx, &snapshotdv1.DescribeSnapshotRequest{})
	if err != nil || d.GetSnapshot().GetId() != 7 || len(d.GetPartitions()) != 3 || len(d.GetIndexes()) != 3 ||
		len(d.GetManifests()) != 4 ||
		d.GetNextPageToken() != "" {
		t.Errorf("description: %v, %v", d, err)
	}
	key, err := c.WholeKey(ctx, &snapshotdv1.GetKeyRequest{Key: "/k"})
	if err != nil || key.GetJson() != "0123456789" || key.GetKey() != "/k" || key.GetNextPageToken() != "" {
		t.Errorf("key: %v, %v", key, err)
	}
	// The call returns the error of a later page.
	s.errs = []error{nil, context.DeadlineExceeded}
	if _, err := c.AllPartitions(ctx, &snapshotdv1.ListPartitionsRequest{}); err == nil ||
		!strings.Contains(err.Error(), "deadline") {
		t.Errorf("a second page that fails: %v", err)
	}
}
