package manager

import (
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// captureFilter decides which part of each segment a snapshot holds. It is a pure
// function of the collection at one revision.
//
// A data timestamp t is in the snapshot if t < cut. A segment is therefore included
// if it holds data and starts before its channel's cut, whatever its state. A file is
// excluded if it begins at or after the cut. A segment that may hold rows on both sides
// gets a row ceiling. The cut is per channel: a single cut for all channels would lose
// rows of a channel that is ahead, or include rows of a lagging one twice.
type captureFilter struct {
	collection *catalog.Collection
	cuts       map[int]segment.Timestamp // by shard
	partitions map[int64]bool            // by id; true if not being dropped
	indexes    map[int64]bool            // by id; true if not being dropped
}

func newCaptureFilter(v *catalog.View) *captureFilter {
	c := &captureFilter{
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

// capturedSegment is the part of a segment that a snapshot holds.
type capturedSegment struct {
	segment.Segment
	included  bool // whether the snapshot holds any part
	straddles bool // whether the segment may hold rows at or after the cut
	// lacksFiles means that it is excluded because it has no files, although its state
	// requires all rows to be in files. Only earlier releases accepted such a segment.
	lacksFiles bool
}

// capture returns the part of s that is in the snapshot. It does not change s; the
// result may share its slices. A segment with data on a channel without a checkpoint is
// ErrCheckpointMissing.
func (c *captureFilter) capture(s segment.Segment) (capturedSegment, error) {
	if s.State == segment.Importing || s.State == segment.Dropped {
		return capturedSegment{}, nil
	}
	if s.Partition != 0 && !c.partitions[s.Partition] {
		return capturedSegment{}, nil
	}
	if !segment.HoldsData(s.Files) {
		return capturedSegment{lacksFiles: s.LacksFiles()}, nil
	}
	cut, ok := c.cuts[s.Channel]
	if !ok {
		return capturedSegment{}, fmt.Errorf(
			"%w: shard %d (%q) of %s has none, and segment %d has data; set it with SetCheckpoints",
			ErrCheckpointMissing, s.Channel, c.collection.Channel(s.Channel), c.collection, s.ID)
	}
	// All rows of an import have its commit timestamp; its deletes have their own.
	imported := s.CommitTimestamp != 0
	if imported && s.CommitTimestamp >= cut || !imported && s.Start.Timestamp >= cut {
		return capturedSegment{}, nil
	}
	got := capturedSegment{Segment: s, included: true}
	got.Builds = without(s.Builds, func(b *segment.Build) bool { return !c.indexes[b.Index] })
	got.Files = without(s.Files, func(f *segment.File) bool {
		switch {
		case imported && f.Kind != segment.KindDelta:
			return false
		case ranged(f) && f.MinTimestamp >= cut:
			// Files derived from all rows, such as an index, still contain its rows.
			got.straddles = got.straddles || holdsData(f) && f.Kind != segment.KindDelta
			return true
		}
		got.straddles = got.straddles || straddles(&s, f, cut)
		return false
	})
	if !segment.HoldsData(got.Files) {
		return capturedSegment{}, nil
	}
	if got.straddles && (s.RowCeiling == 0 || s.RowCeiling > cut) {
		got.RowCeiling = cut
	}
	return got, nil
}

// without returns list without the elements for which exclude is true, and list itself
// if there are none. It calls exclude once for each element, and does not change list.
func without[T any](list []T, exclude func(*T) bool) []T {
	result, copied := list, false
	for i := range list {
		switch excluded := exclude(&list[i]); {
		case excluded && !copied:
			result, copied = slices.Clone(list[:i]), true
		case !excluded && copied:
			result = append(result, list[i])
		}
	}
	return result
}

func holdsData(f *segment.File) bool { return !segment.Derived(f.Kind) }

// ranged reports whether the range of the file's timestamps is known.
func ranged(f *segment.File) bool { return f.MinTimestamp != 0 || f.MaxTimestamp != 0 }

// straddles reports whether f, of segment s, may hold rows or deletes at or after the
// cut. For a file without a known range, the segment's end position decides. That
// position bounds rows; it bounds deletes only in a segment that holds nothing else.
// Without an end position the answer is true: a row ceiling is always safe.
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

// addRefs adds the ids and files of s that the snapshot protects.
func addRefs(refs *manifest.Refs, col *catalog.Collection, s *segment.Segment) {
	refs.Segments = append(refs.Segments, s.ID)
	for b := range s.Builds {
		refs.Builds = append(refs.Builds, s.Builds[b].ID)
	}
	// A foreign file has a reference of its own: no id covers it.
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

// describe returns the metadata of a snapshot without its files and totals.
func describe(s *snapshot.Record, v *catalog.View, clusterID, release string) *manifest.Metadata {
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
				ID: x.ID, Name: x.Name, Field: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams,
				Attributes: x.Attributes,
			})
		}
	}
	for shard := range col.Shards() {
		cp := v.Checkpoints[shard] // without one the cut is 0: nothing of the shard is captured
		md.Channels = append(md.Channels, manifest.Channel{
			Shard: shard, Name: col.Channel(shard), Cut: cp.Position.Timestamp, Opaque: cp.Position.Opaque,
		})
	}
	return md
}
