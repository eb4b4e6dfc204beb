package bench

import (
	"context"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

const (
	writers       = 4   // concurrent calls
	batchSegments = 500 // in a message of AddSegments or DropSegments
)

// AddSegments registers new segments of a collection.
func AddSegments(
	ctx context.Context,
	c *client.Client,
	ref *snapshotdv1.CollectionRef,
	list []*snapshotdv1.Segment,
) error {
	group, groupCtx := errgroup.WithContext(ctx)
	for part := range slices.Chunk(list, max((len(list)+writers-1)/writers, 1)) {
		group.Go(func() error {
			stream, err := c.Catalog.AddSegments(groupCtx)
			if err != nil {
				return err
			}
			for m := range slices.Chunk(part, batchSegments) {
				if stream.Send(&snapshotdv1.AddSegmentsRequest{Collection: ref, Segments: m}) != nil {
					break // CloseAndRecv returns the cause
				}
			}
			resp, err := stream.CloseAndRecv()
			if err == nil && resp.GetAdded() != int64(len(part)) {
				err = fmt.Errorf("%d of %d segments were added", resp.GetAdded(), len(part))
			}
			return err
		})
	}
	return group.Wait()
}

// DropSegments drops segments of a collection. It fails if one is missing.
func DropSegments(ctx context.Context, c *client.Client, ref *snapshotdv1.CollectionRef, ids []int64) error {
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(writers)
	for part := range slices.Chunk(ids, batchSegments) {
		group.Go(func() error {
			resp, err := c.Catalog.DropSegments(groupCtx, &snapshotdv1.DropSegmentsRequest{Collection: ref, SegmentIds: part})
			if err == nil && resp.GetDropped() != int64(len(part)) {
				err = fmt.Errorf("%d of %d segments were dropped", resp.GetDropped(), len(part))
			}
			return err
		})
	}
	return group.Wait()
}
