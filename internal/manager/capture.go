package manager

import (
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// cutter decides what of each segment a snapshot holds. It is a pure function
// of the collection at one revision.
//
// A data timestamp t is in the snapshot if t < cut. So a segment is in when it
// holds data and starts before its channel's cut, whatever its state; a file is
// out when it begins at or after the cut; and a segment that may hold rows on
// both sides gets a row ceiling. One cut for all channels would be the classic
// mistake: rows of the channel that is ahead would be lost, or rows of the one
// that lags would be in twice.
type cutter struct {
	collection *catalog.Collection
	cuts       map[int]segment.Timestamp // by shard
	partitions map[int64]bool            // that are not being dropped
	indexes    map[int64]bool            // that are not being dropped
}

func newCutter(v *catalog.View) *cutter {
	c := &cutter{
		collection: &v.Collection,
		cuts:       map[int]segment.Timestamp{}, partitions: map[int64]bool{}, indexes: map[int64]bool{},
	}
	for shard, cp := range v.Checkpoints {
		c.cuts[shard] = cp.Position.Timestamp
	}
	for _, p := range v.Partitions {
		c.partitions[p.ID] = p.State == catalog.Active
	}
	for _, x := range v.Indexes {
		c.indexes[x.ID] = x.State == catalog.Active
	}
	return c
}

// captured is what a snapshot holds of a segment.
type captured struct {
	segment.Segment
	in        bool // whether it holds anything
	straddles bool // whether there may be more on the other side of the cut
	// lacking means that it is out although all of its rows are said to be in files,
	// for it has none. Only releases before let such a segment in.
	lacking bool
}

// capture returns what of s is in the snapshot. It does not change s, whose lists
// the result may share. A segment
// with data on a channel without a checkpoint is ErrCheckpointMissing.
func (c *cutter) capture(s segment.Segment) (captured, error) {
	if s.State == segment.Importing || s.State == segment.Dropped {
		return captured{}, nil
	}
	if s.Partition != 0 && !c.partitions[s.Partition] {
		return captured{}, nil
	}
	if !segment.HoldsData(s.Files) {
		return captured{lacking: s.LacksFiles()}, nil
	}
	cut, ok := c.cuts[s.Channel]
	if !ok {
		return captured{}, fmt.Errorf("%w: shard %d (%q) of %s has none, and segment %d has data; set it with SetCheckpoints",
			ErrCheckpointMissing, s.Channel, c.collection.Channel(s.Channel), c.collection, s.ID)
	}
	// The rows of an import count by its commit, all alike; its deletes do not.
	imported := s.CommitTimestamp != 0
	if imported && s.CommitTimestamp >= cut || !imported && s.Start.Timestamp >= cut {
		return captured{}, nil
	}
	got := captured{Segment: s, in: true}
	got.Builds = without(s.Builds, func(b *segment.Build) bool { return !c.indexes[b.Index] })
	got.Files = without(s.Files, func(f *segment.File) bool {
		switch {
		case imported && f.Kind != segment.KindDelta:
			return false
		case ranged(f) && f.MinTimestamp >= cut:
			// What was made from all rows, such as an index, still knows its rows.
			got.straddles = got.straddles || holdsData(f) && f.Kind != segment.KindDelta
			return true
		}
		got.straddles = got.straddles || straddles(&s, f, cut)
		return false
	})
	if !segment.HoldsData(got.Files) {
		return captured{}, nil
	}
	if got.straddles && (s.RowCeiling == 0 || s.RowCeiling > cut) {
		got.RowCeiling = cut
	}
	return got, nil
}

// without returns list less what is to go, and list itself when nothing is. It
// asks once for each element, and does not change list.
func without[T any](list []T, goes func(*T) bool) []T {
	kept, copied := list, false
	for i := range list {
		switch gone := goes(&list[i]); {
		case gone && !copied:
			kept, copied = slices.Clone(list[:i]), true
		case !gone && copied:
			kept = append(kept, list[i])
		}
	}
	return kept
}

func holdsData(f *segment.File) bool { return !segment.Derived(f.Kind) }

// ranged says whether the timestamps of the file's rows are known.
func ranged(f *segment.File) bool { return f.MinTimestamp != 0 || f.MaxTimestamp != 0 }

// straddles says whether f, of segment s, may hold rows or deletes at or after
// the cut. Of a file that does not say, the segment's end position does; but that
// is the end of its rows, which says nothing of deletes unless the segment has
// nothing else. Without it there is no telling, and a row ceiling is never wrong.
func straddles(s *segment.Segment, f *segment.File, cut segment.Timestamp) bool {
	switch {
	case cut == segment.MaxTimestamp: // no stream
		return false
	case ranged(f):
		return f.MaxTimestamp >= cut
	case !holdsData(f):
		return false
	case f.Kind == segment.KindDelta && s.Level != 0:
		return true
	case s.DML.Timestamp != 0:
		return s.DML.Timestamp > cut
	}
	return true
}

// addRefs adds what protection must know of s.
func addRefs(refs *manifest.Refs, col *catalog.Collection, s *segment.Segment) {
	refs.Segments = append(refs.Segments, s.ID)
	for b := range s.Builds {
		refs.Builds = append(refs.Builds, s.Builds[b].ID)
	}
	// A foreign file is referenced by itself: no id covers it.
	for f := range s.AllFiles() {
		if !catalog.Owns(col.ID, s, f.Path) {
			root := col.Roots[f.Root]
			refs.Files = append(refs.Files, manifest.FileHash(root.Store, root.Prefix+f.Path))
		}
	}
}

func sortRefs(refs *manifest.Refs) {
	slices.Sort(refs.Segments)
	slices.Sort(refs.Builds)
	slices.Sort(refs.Files)
	refs.Segments = slices.Compact(refs.Segments)
	refs.Builds = slices.Compact(refs.Builds)
	refs.Files = slices.Compact(refs.Files)
}

// describe makes the metadata of a snapshot but for its files and totals.
func describe(s *Snapshot, v *catalog.View, clusterID, release string) *manifest.Metadata {
	col := &v.Collection
	md := &manifest.Metadata{
		FormatVersion: manifest.FormatVersion, ClusterID: clusterID, CreatedBy: release,
		Snapshot: manifest.SnapshotInfo{
			ID: s.ID, Name: s.Name, Description: s.Description, Labels: s.Labels, CreateTime: s.CreateTime,
		},
		Collection: manifest.CollectionInfo{
			ID: col.ID, DB: col.DB, Name: col.Name, Shards: col.Shards(), ConsistencyLevel: col.Consistency,
			Properties: col.Properties, Layout: col.Layout.String(), Attributes: col.Attributes,
			Schema: manifest.Schema{Format: col.Schema.Format, Raw: col.Schema.Raw},
		},
		CatalogRevision: v.Revision,
	}
	for _, f := range col.Schema.Fields {
		md.Collection.Schema.Fields = append(md.Collection.Schema.Fields, manifest.Field(f))
	}
	for i, r := range col.Roots {
		md.Roots = append(md.Roots, manifest.Root{Number: i, Store: r.Store, Prefix: r.Prefix})
	}
	for _, p := range v.Partitions {
		if p.State == catalog.Active {
			md.Partitions = append(md.Partitions, manifest.Partition{ID: p.ID, Name: p.Name, Attributes: p.Attributes})
		}
	}
	for _, x := range v.Indexes {
		if x.State == catalog.Active {
			md.Indexes = append(md.Indexes, manifest.Index{
				ID: x.ID, Name: x.Name, Field: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams, Attributes: x.Attributes,
			})
		}
	}
	for shard := range col.Shards() {
		cp := v.Checkpoints[shard] // without one the cut is 0: nothing of it is captured
		md.Channels = append(md.Channels, manifest.Channel{
			Shard: shard, Name: col.Channel(shard), Cut: cp.Position.Timestamp, Opaque: cp.Position.Opaque,
		})
	}
	return md
}
