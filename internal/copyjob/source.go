package copyjob

import (
	"context"
	"errors"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// readMetadata returns the metadata of a committed snapshot.
func readMetadata(ctx context.Context, r *snapshot.Reader, id int64) (*manifest.Metadata, error) {
	_, md, err := openSnapshot(ctx, r, id)
	return md, err
}

// readManifest returns the segments of one manifest of a committed snapshot.
func readManifest(ctx context.Context, r *snapshot.Reader, id int64, number int) ([]segment.Segment, error) {
	s, md, err := openSnapshot(ctx, r, id)
	if err != nil {
		return nil, err
	}
	mf := &md.Manifests[number]
	list := make([]segment.Segment, 0, mf.Segments)
	_, err = r.Segments(ctx, s, mf, 0, func(seg *snapshot.Segment) bool {
		list = append(list, seg.Segment)
		return true
	})
	return list, permanent(err)
}

func openSnapshot(ctx context.Context, r *snapshot.Reader, id int64) (*snapshot.Record, *manifest.Metadata, error) {
	s, err := r.Committed(ctx, id)
	if err != nil {
		return nil, nil, permanent(err)
	}
	md, err := r.Metadata(ctx, s)
	return s, md, permanent(err)
}

// permanent wraps errors of reading a snapshot that a retry cannot resolve with
// errUnreadable. A digest mismatch is not one: it may be a transfer error.
func permanent(err error) error {
	if errors.Is(err, snapshot.ErrDigest) {
		return err
	}
	for _, final := range []error{
		snapshot.ErrCorrupt, snapshot.ErrNotCommitted, snapshot.ErrExpiredOrDropped, snapshot.ErrNeverExisted,
		manifest.ErrNewerFormat,
	} {
		if errors.Is(err, final) {
			return fmt.Errorf("%w: %w", errUnreadable, err)
		}
	}
	return err
}
