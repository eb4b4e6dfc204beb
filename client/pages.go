package client

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// pageElements is the requested number of elements per page. The server also bounds
// its bytes.
const pageElements = 1000

// AllPartitions is ListPartitions with all pages in one response. The request's
// paging is ignored.
func (c *Client) AllPartitions(
	ctx context.Context, req *snapshotdv1.ListPartitionsRequest, opts ...grpc.CallOption,
) (*snapshotdv1.ListPartitionsResponse, error) {
	req = proto.CloneOf(req)
	req.PageSize, req.PageToken = pageElements, ""
	all := &snapshotdv1.ListPartitionsResponse{}
	for {
		page, err := c.Catalog.ListPartitions(ctx, req, opts...)
		if err != nil {
			return nil, err
		}
		all.Partitions = append(all.Partitions, page.GetPartitions()...)
		if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
			return all, nil
		}
	}
}

// AllIndexes is ListIndexes with all pages in one response. The request's paging is
// ignored.
func (c *Client) AllIndexes(
	ctx context.Context, req *snapshotdv1.ListIndexesRequest, opts ...grpc.CallOption,
) (*snapshotdv1.ListIndexesResponse, error) {
	req = proto.CloneOf(req)
	req.PageSize, req.PageToken = pageElements, ""
	all := &snapshotdv1.ListIndexesResponse{}
	for {
		page, err := c.Catalog.ListIndexes(ctx, req, opts...)
		if err != nil {
			return nil, err
		}
		all.Indexes = append(all.Indexes, page.GetIndexes()...)
		if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
			return all, nil
		}
	}
}

// DescribeWhole is DescribeSnapshot with the partitions, indexes and manifests of
// all pages in one response. The request's paging is ignored.
func (c *Client) DescribeWhole(
	ctx context.Context, req *snapshotdv1.DescribeSnapshotRequest, opts ...grpc.CallOption,
) (*snapshotdv1.DescribeSnapshotResponse, error) {
	req = proto.CloneOf(req)
	req.PageSize, req.PageToken = pageElements, ""
	all, err := c.Snapshots.DescribeSnapshot(ctx, req, opts...)
	if err != nil {
		return nil, err
	}
	for all.GetNextPageToken() != "" {
		req.PageToken = all.GetNextPageToken()
		page, err := c.Snapshots.DescribeSnapshot(ctx, req, opts...)
		if err != nil {
			return nil, err
		}
		all.Partitions = append(all.Partitions, page.GetPartitions()...)
		all.Indexes = append(all.Indexes, page.GetIndexes()...)
		all.Manifests = append(all.Manifests, page.GetManifests()...)
		all.NextPageToken = page.GetNextPageToken()
	}
	return all, nil
}

// WholeKey is GetKey with the text of all pages in one response. The request's paging
// is ignored.
func (c *Client) WholeKey(
	ctx context.Context, req *snapshotdv1.GetKeyRequest, opts ...grpc.CallOption,
) (*snapshotdv1.GetKeyResponse, error) {
	req = proto.CloneOf(req)
	req.PageToken = ""
	all, err := c.Admin.GetKey(ctx, req, opts...)
	if err != nil {
		return nil, err
	}
	for all.GetNextPageToken() != "" {
		req.PageToken = all.GetNextPageToken()
		page, err := c.Admin.GetKey(ctx, req, opts...)
		if err != nil {
			return nil, err
		}
		all.Json += page.GetJson()
		all.NextPageToken = page.GetNextPageToken()
	}
	return all, nil
}
