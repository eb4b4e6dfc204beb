package gc

import (
	"context"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
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
	history, now, err := g.History(ctx)
	if err != nil {
		return Counts{}, err
	}
	if err := g.refs.Ready(ctx, collection, now); err != nil {
		return Counts{}, err
	}
	return Counts{g.refs, collection, history}, nil
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
