package server

import (
	"cmp"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// convert applies f to each element. It returns nil for nil.
func convert[A, B any](list []A, f func(A) B) []B {
	if list == nil {
		return nil
	}
	out := make([]B, len(list))
	for i, a := range list {
		out[i] = f(a)
	}
	return out
}

func timeToProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func timeFromProto(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// References.

func dbName(s string) string     { return cmp.Or(s, catalog.DefaultDB) }
func storeAlias(s string) string { return cmp.Or(s, catalog.DefaultStore) }

func collectionRef(r *pb.CollectionRef) catalog.Ref {
	if r == nil {
		return catalog.Ref{}
	}
	if name := r.GetName(); name != nil {
		return catalog.Ref{DB: dbName(name.GetDb()), Name: name.GetName()}
	}
	return catalog.Ref{ID: r.GetId()}
}

func snapshotRef(r *pb.SnapshotRef) manager.Ref {
	return manager.Ref{ID: r.GetId(), Name: r.GetName(), Collection: collectionRef(r.GetCollection())}
}

// Positions.

func positionFromProto(p *pb.Position) segment.Position {
	return segment.Position{Timestamp: segment.Timestamp(p.GetTimestamp()), Opaque: p.GetOpaque()}
}

func positionToProto(p segment.Position) *pb.Position {
	if p.Timestamp == 0 && len(p.Opaque) == 0 {
		return nil
	}
	return &pb.Position{Timestamp: uint64(p.Timestamp), Opaque: p.Opaque}
}

func checkpointFromProto(p *pb.ChannelPosition) catalog.Checkpoint {
	return catalog.Checkpoint{Shard: int(p.GetShard()), Position: positionFromProto(p.GetPosition())}
}

func checkpointToProto(c catalog.Checkpoint) *pb.ChannelPosition {
	return &pb.ChannelPosition{
		Shard: int32(c.Shard), Channel: c.Channel, //nolint:gosec // at most 64 shards
		Position: &pb.Position{Timestamp: uint64(c.Position.Timestamp), Opaque: c.Position.Opaque},
	}
}

// Collections.

func collectionToProto(c *catalog.Collection) *pb.Collection {
	out := &pb.Collection{
		Id: c.ID, Db: c.DB, Name: c.Name,
		Schema:   schemaToProto(c.Schema),
		Channels: c.Channels,
		Roots: convert(c.Roots, func(r catalog.Root) *pb.Root {
			return &pb.Root{
				Store:  r.Store,
				Prefix: r.Prefix,
			}
		}),
		Layout:           layoutToProto(c.Layout),
		ConsistencyLevel: c.Consistency,
		Properties:       c.Properties,
		Attributes:       c.Attributes,
		State:            collectionStateToProto(c.State),
		CreateTime:       timeToProto(c.CreateTime),
		Revision:         c.Revision,
		Catalog:          pb.CatalogMode_CATALOG_MODE_NATIVE,
	}
	if c.State == catalog.Dropping {
		out.Name = "" // another collection may have it
	}
	return out
}

func layoutToProto(l catalog.Layout) pb.Layout {
	if l == catalog.LayoutMilvus {
		return pb.Layout_LAYOUT_MILVUS
	}
	return pb.Layout_LAYOUT_NATIVE
}

func layoutFromProto(l pb.Layout) catalog.Layout {
	if l == pb.Layout_LAYOUT_MILVUS {
		return catalog.LayoutMilvus
	}
	return catalog.LayoutNative
}

func collectionStateToProto(s catalog.State) pb.Collection_State {
	switch s {
	case catalog.Active:
		return pb.Collection_STATE_ACTIVE
	case catalog.Restoring:
		return pb.Collection_STATE_RESTORING
	case catalog.Dropping:
		return pb.Collection_STATE_DROPPING
	}
	return pb.Collection_STATE_UNSPECIFIED
}

func collectionStateFromProto(s pb.Collection_State) catalog.State {
	switch s {
	case pb.Collection_STATE_RESTORING:
		return catalog.Restoring
	case pb.Collection_STATE_DROPPING:
		return catalog.Dropping
	default:
		return catalog.Active
	}
}

func schemaToProto(s catalog.Schema) *pb.Schema {
	return &pb.Schema{
		Fields: convert(s.Fields, func(f catalog.Field) *pb.Field {
			return &pb.Field{
				Id: f.ID, Name: f.Name, DataType: f.DataType, PrimaryKey: f.PrimaryKey, PartitionKey: f.PartitionKey,
				Nullable: f.Nullable, ElementType: f.ElementType, TypeParams: f.TypeParams, Attributes: f.Attributes,
			}
		}),
		SchemaFormat: s.Format, SchemaRaw: s.Raw,
	}
}

func schemaFromProto(s *pb.Schema) catalog.Schema {
	return catalog.Schema{
		Fields: convert(s.GetFields(), func(f *pb.Field) catalog.Field {
			return catalog.Field{
				ID: f.GetId(), Name: f.GetName(), DataType: f.GetDataType(), PrimaryKey: f.GetPrimaryKey(),
				PartitionKey: f.GetPartitionKey(), Nullable: f.GetNullable(), ElementType: f.GetElementType(),
				TypeParams: f.GetTypeParams(), Attributes: f.GetAttributes(),
			}
		}),
		Format: s.GetSchemaFormat(), Raw: s.GetSchemaRaw(),
	}
}

func collectionSpec(r *pb.CreateCollectionRequest) catalog.Collection {
	return catalog.Collection{
		ID: r.GetId(), DB: dbName(r.GetName().GetDb()), Name: r.GetName().GetName(),
		Schema: schemaFromProto(r.GetSchema()), Channels: r.GetChannels(),
		Roots: convert(r.GetRoots(), func(root *pb.Root) catalog.Root {
			return catalog.Root{Store: storeAlias(root.GetStore()), Prefix: root.GetPrefix()}
		}),
		Layout: layoutFromProto(r.GetLayout()), Consistency: r.GetConsistencyLevel(),
		Properties: r.GetProperties(), Attributes: r.GetAttributes(),
	}
}

func partitionToProto(p catalog.Partition) *pb.Partition {
	state := pb.Partition_STATE_ACTIVE
	if p.State == catalog.Dropping {
		state = pb.Partition_STATE_DROPPING
	}
	return &pb.Partition{
		Id: p.ID, Name: p.Name, Attributes: p.Attributes, State: state,
		CreateTime: timeToProto(p.CreateTime),
	}
}

func indexToProto(x catalog.Index) *pb.Index {
	state := pb.Index_STATE_ACTIVE
	if x.State == catalog.Dropping {
		state = pb.Index_STATE_DROPPING
	}
	return &pb.Index{
		Id: x.ID, Name: x.Name, FieldId: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams,
		Attributes: x.Attributes, State: state, CreateTime: timeToProto(x.CreateTime),
	}
}

// Segments.

func segmentStateFromProto(s pb.Segment_State) segment.State {
	switch s {
	case pb.Segment_STATE_GROWING:
		return segment.Growing
	case pb.Segment_STATE_SEALED:
		return segment.Sealed
	case pb.Segment_STATE_IMPORTING:
		return segment.Importing
	case pb.Segment_STATE_DROPPED:
		return segment.Dropped
	default:
		return segment.Flushed
	}
}

func segmentStateToProto(s segment.State) pb.Segment_State {
	switch s {
	case segment.Growing:
		return pb.Segment_STATE_GROWING
	case segment.Sealed:
		return pb.Segment_STATE_SEALED
	case segment.Flushed:
		return pb.Segment_STATE_FLUSHED
	case segment.Importing:
		return pb.Segment_STATE_IMPORTING
	case segment.Dropped:
		return pb.Segment_STATE_DROPPED
	}
	return pb.Segment_STATE_UNSPECIFIED
}

func levelFromProto(l pb.Segment_Level) int {
	switch l {
	case pb.Segment_LEVEL_L0:
		return 0
	case pb.Segment_LEVEL_L2:
		return 2
	default:
		return 1
	}
}

func levelToProto(level int) pb.Segment_Level {
	switch level {
	case 0:
		return pb.Segment_LEVEL_L0
	case 1:
		return pb.Segment_LEVEL_L1
	case 2:
		return pb.Segment_LEVEL_L2
	}
	return pb.Segment_LEVEL_UNSPECIFIED
}

func segmentFromProto(s *pb.Segment) segment.Segment {
	return segment.Segment{
		ID: s.GetId(), Partition: s.GetPartitionId(), Channel: int(s.GetShard()), Level: levelFromProto(s.GetLevel()),
		State: segmentStateFromProto(s.GetState()), Rows: s.GetRows(),
		Start: positionFromProto(s.GetStartPosition()), DML: positionFromProto(s.GetDmlPosition()),
		StorageVersion: s.GetStorageVersion(), Sorted: s.GetSorted(),
		CommitTimestamp: segment.Timestamp(s.GetCommitTimestamp()), RowCeiling: segment.Timestamp(s.GetRowCeiling()),
		Files: convert(s.GetFiles(), fileFromProto), Builds: convert(s.GetIndexBuilds(), buildFromProto),
		EngineData: s.GetEngineData(), Attributes: s.GetAttributes(),
	}
}

func segmentToProto(s *segment.Segment) *pb.Segment {
	return &pb.Segment{
		Id: s.ID, PartitionId: s.Partition, Shard: int32(s.Channel), //nolint:gosec // at most 64 shards
		Level: levelToProto(s.Level), State: segmentStateToProto(s.State), Rows: s.Rows,
		StartPosition: positionToProto(s.Start), DmlPosition: positionToProto(s.DML),
		StorageVersion: s.StorageVersion, Sorted: s.Sorted,
		CommitTimestamp: uint64(s.CommitTimestamp), RowCeiling: uint64(s.RowCeiling),
		Files: convert(s.Files, fileToProto), IndexBuilds: convert(s.Builds, buildToProto),
		EngineData: s.EngineData, Attributes: s.Attributes,
	}
}

func fileFromProto(f *pb.File) segment.File {
	return segment.File{
		Root: int(f.GetRoot()), Path: f.GetPath(), Kind: f.GetKind(), Size: f.GetSizeBytes(), ETag: f.GetEtag(),
		Checksum:     segment.Checksum{Type: f.GetChecksum().GetType(), Value: f.GetChecksum().GetValue()},
		MinTimestamp: segment.Timestamp(f.GetMinTimestamp()), MaxTimestamp: segment.Timestamp(f.GetMaxTimestamp()),
		Entries: f.GetEntries(), Field: f.GetFieldId(), LogID: f.GetLogId(), Attributes: f.GetAttributes(),
	}
}

func fileToProto(f segment.File) *pb.File {
	out := &pb.File{
		Root: int32(f.Root), Path: f.Path, Kind: f.Kind, SizeBytes: f.Size, Etag: f.ETag, //nolint:gosec // at most 16 roots
		MinTimestamp: uint64(f.MinTimestamp), MaxTimestamp: uint64(f.MaxTimestamp),
		Entries: f.Entries, FieldId: f.Field, LogId: f.LogID, Attributes: f.Attributes,
	}
	if f.Checksum.Type != "" {
		out.Checksum = &pb.Checksum{Type: f.Checksum.Type, Value: f.Checksum.Value}
	}
	return out
}

func buildFromProto(b *pb.IndexBuild) segment.Build {
	return segment.Build{
		ID: b.GetId(), Index: b.GetIndexId(), Field: b.GetFieldId(), Params: b.GetParams(),
		Files: convert(b.GetFiles(), fileFromProto),
	}
}

func buildToProto(b segment.Build) *pb.IndexBuild {
	return &pb.IndexBuild{
		Id: b.ID, IndexId: b.Index, FieldId: b.Field, Params: b.Params, Files: convert(b.Files, fileToProto),
	}
}

func updateFromProto(u *pb.SegmentUpdate) catalog.Update {
	out := catalog.Update{
		Segment: u.GetSegmentId(), Revision: u.GetExpectedRevision(), Rows: u.Rows, Sorted: u.Sorted,
		RemoveFiles: convert(u.GetRemoveFiles(), func(p *pb.FilePath) catalog.FilePath {
			return catalog.FilePath{Root: int(p.GetRoot()), Path: p.GetPath()}
		}),
		AddFiles:     convert(u.GetAddFiles(), fileFromProto),
		AddBuilds:    convert(u.GetAddIndexBuilds(), buildFromProto),
		RemoveBuilds: u.GetRemoveIndexBuilds(),
	}
	// In an update, no state means no change.
	if u.GetState() != pb.Segment_STATE_UNSPECIFIED {
		out.State = segmentStateFromProto(u.GetState())
	}
	if u.GetDmlPosition() != nil {
		p := positionFromProto(u.GetDmlPosition())
		out.DML = &p
	}
	if u.EngineData != nil {
		out.EngineData = &u.EngineData
	}
	return out
}

// Snapshots.

func snapshotToProto(s *snapshot.Record) *pb.Snapshot {
	return &pb.Snapshot{
		Id: s.ID, Name: s.Name,
		Collection:  &pb.CollectionInfo{Id: s.Collection, Db: s.DB, Name: s.CollectionName},
		Description: s.Description, Labels: s.Labels, State: snapshotStateToProto(s.State),
		CreateTime: timeToProto(s.CreateTime), CommitTime: timeToProto(s.CommitTime), ExpireTime: timeToProto(s.ExpireTime),
		Cuts: convert(s.Cuts, func(c snapshot.Cut) *pb.ChannelPosition {
			return &pb.ChannelPosition{
				Shard: int32(c.Shard), Channel: c.Channel, //nolint:gosec // at most 64 shards
				Position: &pb.Position{Timestamp: uint64(c.Timestamp)},
			}
		}),
		CatalogRevision: s.CatalogRevision, PartitionIds: s.Partitions,
		Totals: &pb.Totals{
			Segments: s.Totals.Segments, Rows: s.Totals.Rows, Files: s.Totals.Files, Bytes: s.Totals.Bytes,
			Builds: s.Totals.Builds, StraddlingSegments: s.Totals.Straddling,
		},
		Revision: s.Revision, ManifestBytes: s.ManifestBytes, Reason: s.Reason,
	}
}

func snapshotStateToProto(s snapshot.State) pb.Snapshot_State {
	switch s {
	case snapshot.Pending:
		return pb.Snapshot_STATE_PENDING
	case snapshot.Committed:
		return pb.Snapshot_STATE_COMMITTED
	case snapshot.Deleting:
		return pb.Snapshot_STATE_DELETING
	}
	return pb.Snapshot_STATE_UNSPECIFIED
}

func snapshotStateFromProto(s pb.Snapshot_State) snapshot.State {
	switch s {
	case pb.Snapshot_STATE_PENDING:
		return snapshot.Pending
	case pb.Snapshot_STATE_DELETING:
		return snapshot.Deleting
	default:
		return snapshot.Committed
	}
}

func createSpec(r *pb.CreateSnapshotRequest) manager.CreateSpec {
	spec := manager.CreateSpec{
		Collection: collectionRef(r.GetCollection()), Name: r.GetName(), Description: r.GetDescription(),
		Labels: r.GetLabels(),
		MinCut: convert(r.GetMinCut(), checkpointFromProto), RequireExact: r.GetRequireExact(), Verify: r.GetVerify(),
		NoWait:     r.Wait != nil && !r.GetWait(),
		ExpireTime: timeFromProto(r.GetExpireTime()),
	}
	if r.GetTtl() != nil {
		spec.TTL = r.GetTtl().AsDuration()
	}
	return spec
}

func updateSpec(r *pb.UpdateSnapshotRequest) manager.UpdateSpec {
	spec := manager.UpdateSpec{Revision: r.GetExpectedRevision()}
	for _, path := range r.GetUpdateMask().GetPaths() {
		switch path {
		case "description":
			spec.Description = new(r.GetDescription())
		case "labels":
			spec.Labels = new(r.GetLabels())
		case "expire_time":
			spec.ExpireTime = new(timeFromProto(r.GetExpireTime()))
		case "ttl":
			spec.TTL = new(r.GetTtl().AsDuration())
		}
	}
	return spec
}

func snapshotSegmentToProto(s *snapshot.Segment, files bool) *pb.SnapshotSegment {
	var totals segment.Totals
	totals.Add(&s.Segment)
	out := &pb.SnapshotSegment{Ordinal: s.Ordinal, Files: totals.Files, Bytes: totals.Bytes}
	basic := s.Segment
	if !files {
		basic.Files, basic.Builds = nil, nil
	}
	out.Segment = segmentToProto(&basic)
	return out
}

func descriptionToProto(d *manager.Description) *pb.DescribeSnapshotResponse {
	m := d.Metadata
	col := &pb.Collection{
		Id: m.Collection.ID, Db: m.Collection.DB, Name: m.Collection.Name,
		Schema: &pb.Schema{
			Fields: convert(m.Collection.Schema.Fields, func(f manifest.Field) *pb.Field {
				return &pb.Field{
					Id: f.ID, Name: f.Name, DataType: f.DataType, PrimaryKey: f.PrimaryKey, PartitionKey: f.PartitionKey,
					Nullable: f.Nullable, ElementType: f.ElementType, TypeParams: f.TypeParams, Attributes: f.Attributes,
				}
			}),
			SchemaFormat: m.Collection.Schema.Format, SchemaRaw: m.Collection.Schema.Raw,
		},
		Roots: convert(m.Roots, func(r manifest.Root) *pb.Root {
			return &pb.Root{
				Store:  r.Store,
				Prefix: r.Prefix,
			}
		}),
		Layout:           pb.Layout_LAYOUT_NATIVE,
		ConsistencyLevel: m.Collection.ConsistencyLevel,
		Properties:       m.Collection.Properties,
		Attributes:       m.Collection.Attributes,
		State:            pb.Collection_STATE_ACTIVE, // a create captures no other state
		Catalog:          pb.CatalogMode_CATALOG_MODE_NATIVE,
	}
	if m.Collection.Layout == catalog.LayoutMilvus.String() {
		col.Layout = pb.Layout_LAYOUT_MILVUS
	}
	for _, c := range m.Channels {
		if c.Name != "" { // the implicit channel has no name
			col.Channels = append(col.Channels, c.Name)
		}
	}
	return &pb.DescribeSnapshotResponse{
		Snapshot:   snapshotToProto(d.Snapshot),
		Collection: col,
		Store:      d.Snapshot.Store, Prefix: d.Prefix,
		FormatVersion: int32(m.FormatVersion), //nolint:gosec // a small number, checked by the decoder
	}
}

// describePage adds the partitions, indexes and manifests of a snapshot to resp until
// the page is full, from position from in the sequence of all three, and the number of
// each. It returns the position of the first element that is not on the page; 0: none is
// left.
func describePage(resp *pb.DescribeSnapshotResponse, m *manifest.Metadata, from int64, page *page) (next int64) {
	partitions, indexes, manifests := int64(len(m.Partitions)), int64(len(m.Indexes)), int64(len(m.Manifests))
	resp.PartitionCount, resp.IndexCount, resp.ManifestCount = partitions, indexes, manifests
	for n := from; n < partitions+indexes+manifests; n++ {
		if page.elements == 0 && page.size > page.bytes {
			return n // the head fills the page
		}
		switch {
		case n < partitions:
			p := &m.Partitions[n]
			out := &pb.Partition{Id: p.ID, Name: p.Name, Attributes: p.Attributes, State: pb.Partition_STATE_ACTIVE}
			if !page.add(out) {
				return n
			}
			resp.Partitions = append(resp.Partitions, out)
		case n < partitions+indexes:
			x := &m.Indexes[n-partitions]
			out := &pb.Index{
				Id: x.ID, Name: x.Name, FieldId: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams,
				Attributes: x.Attributes, State: pb.Index_STATE_ACTIVE,
			}
			if !page.add(out) {
				return n
			}
			resp.Indexes = append(resp.Indexes, out)
		default:
			f := &m.Manifests[n-partitions-indexes]
			out := &pb.Manifest{
				File: f.File, SizeBytes: f.Length, Sha256: f.SHA256[:], Segments: f.Segments, FirstOrdinal: f.FirstOrdinal,
			}
			if !page.add(out) {
				return n
			}
			resp.Manifests = append(resp.Manifests, out)
		}
	}
	return 0
}

// Pins.

func pinToProto(p *manager.Pin) *pb.Pin {
	out := &pb.Pin{
		Id: p.ID, SnapshotId: p.Snapshot, Owner: p.Owner, Reason: p.Reason,
		CreateTime: timeToProto(p.CreateTime), ExpireTime: timeToProto(p.ExpireTime), RestoreJobId: p.Job,
	}
	if p.TTL > 0 {
		out.Ttl = durationpb.New(p.TTL)
	}
	return out
}
