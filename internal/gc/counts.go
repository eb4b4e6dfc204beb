package gc

import (
	"context"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Counts has the number of committed snapshots of a collection that reference a
// segment, an index build or a unit.
type Counts struct {
	refs       *refs.Index
	collection int64
	history    int64 // of the metadata store
}

// Counts returns the counts of a collection, of all snapshots that were committed
// before the call. It waits for references that are being read.
func (g *GC) Counts(ctx context.Context, collection int64) (Counts, error) {
	history, err := g.Ready(ctx, collection)
	if err != nil {
		return Counts{}, err
	}
	return Counts{g.refs, collection, history}, nil
}

// Ready waits until the references of all snapshots of a collection that were committed
// before the call are known, and returns the history of the metadata store. The error is
// ErrLoading or ErrUnreadable when they are not.
func (g *GC) Ready(ctx context.Context, collection int64) (history int64, err error) {
	res, err := g.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.Generation(collection)), meta.Get(keys.Epoch)}})
	if err != nil {
		return 0, fmt.Errorf("read the generation of collection %d: %w", collection, err)
	}
	return epoch.History(res.Ranges[1]), g.refs.Ready(ctx, collection, res.Revision, generationOf(res.Ranges[0]))
}

// Segment returns the number of snapshots that reference the segment.
func (c Counts) Segment(id int64) int { return c.refs.Count(c.collection, refs.Query{Segment: id}) }

// Build returns the number of snapshots that reference the index build.
func (c Counts) Build(id int64) int { return c.refs.Count(c.collection, refs.Query{Build: id}) }

// Unit returns the number of snapshots that hold the unit through its id or its
// segment's.
func (c Counts) Unit(u *catalog.Unit) int {
	return c.refs.Count(c.collection, HeadQuery(u.Kind, u.ID, u.Segment.ID, u.Revision, c.history))
}
