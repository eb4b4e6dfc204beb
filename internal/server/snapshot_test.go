package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/keys"
)

// TestSnapshotLifecycle creates, reads, updates and drops a snapshot.
func TestSnapshotLifecycle(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	req := &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Db: "db", Name: "c"}, Roots: []*pb.Root{{Store: "default", Prefix: "data/"}},
		Schema: &pb.Schema{Fields: []*pb.Field{{
			Id: 100, Name: "v", DataType: "FloatVector", PrimaryKey: true, PartitionKey: true, Nullable: true, ElementType: "e",
			TypeParams: map[string]string{"dim": "8"}, Attributes: map[string]string{"a": "b"},
		}}, SchemaFormat: "own", SchemaRaw: []byte("raw")},
		Channels: []string{"ch-0"}, Layout: pb.Layout_LAYOUT_MILVUS, ConsistencyLevel: "Bounded",
		Properties: map[string]string{"p": "q"}, Attributes: map[string]string{"a": "b"}, RequestToken: "t-1",
	}
	col := must[*pb.CreateCollectionResponse](t)(e.catalog.CreateCollection(ctx, req)).GetCollection()
	requireAllSet(t, col)
	again := must[*pb.CreateCollectionResponse](t)(e.catalog.CreateCollection(ctx, req)).GetCollection()
	if diff := cmp.Diff(col, again, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	reused := proto.CloneOf(req)
	reused.Name.Name = "d"
	if _, err := e.catalog.CreateCollection(ctx, reused); reason(err) != "REQUEST_TOKEN_REUSED" ||
		status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	index := must[*pb.CreateIndexResponse](t)(e.catalog.CreateIndex(ctx, &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 100, TypeParams: map[string]string{"dim": "8"},
		IndexParams: map[string]string{"i": "j"}, Attributes: map[string]string{"a": "b"},
	})).GetIndex()
	part := must[*pb.CreatePartitionResponse](t)(e.catalog.CreatePartition(ctx, &pb.CreatePartitionRequest{
		Collection: byID(col.GetId()), Name: "p", Attributes: map[string]string{"a": "b"},
	})).GetPartition()
	first := e.ids(t, 8)
	var segments []*pb.Segment
	for i := range int64(4) {
		s := fullSegment(first+2*i, part.GetId(), index.GetId())
		s.RowCeiling, s.CommitTimestamp = 0, 0
		segments = append(segments, s)
	}
	e.addSegments(t, byID(col.GetId()), segments...)
	must[*pb.SetCheckpointsResponse](t)(e.catalog.SetCheckpoints(ctx, &pb.SetCheckpointsRequest{
		Collection: byID(col.GetId()), Checkpoints: []*pb.ChannelPosition{{Position: &pb.Position{
			Timestamp: 20,
			Opaque:    []byte("o"),
		}}},
	}))
	cps := must[*pb.ListCheckpointsResponse](t)(e.catalog.ListCheckpoints(ctx,
		&pb.ListCheckpointsRequest{Collection: byID(col.GetId())}))
	if diff := cmp.Diff([]*pb.ChannelPosition{{
		Channel:  "ch-0",
		Position: &pb.Position{Timestamp: 20, Opaque: []byte("o")},
	}},
		cps.GetCheckpoints(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	expire := timestamppb.New(time.Now().Add(time.Hour).UTC())
	snap := must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
		Collection: byID(col.GetId()), Name: "s", Description: "d", Labels: map[string]string{"l": "m"},
		Expiry: &pb.CreateSnapshotRequest_ExpireTime{ExpireTime: expire}, RequestToken: "t-2",
	})).GetSnapshot()
	if snap.GetState() != pb.Snapshot_STATE_COMMITTED || snap.GetTotals().GetSegments() != 4 ||
		snap.GetTotals().GetFiles() != 12 ||
		snap.GetCollection().GetDb() != "db" || !proto.Equal(snap.GetExpireTime(), expire) {
		t.Errorf("got %v", snap)
	}
	got := must[*pb.GetSnapshotResponse](t)(e.snapshots.GetSnapshot(ctx,
		&pb.GetSnapshotRequest{Snapshot: snapNamed("s")})).GetSnapshot()
	if diff := cmp.Diff(snap, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	desc := must[*pb.DescribeSnapshotResponse](t)(e.snapshots.DescribeSnapshot(ctx,
		&pb.DescribeSnapshotRequest{Snapshot: snapID(snap.GetId())}))
	want := proto.CloneOf(col)
	want.CreateTime, want.Revision = nil, 0
	if diff := cmp.Diff(want, desc.GetCollection(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if len(desc.GetManifests()) != 1 || len(desc.GetIndexes()) != 1 || len(desc.GetPartitions()) != 1 ||
		desc.GetFormatVersion() == 0 ||
		desc.GetStore() != "default" || !strings.HasPrefix(desc.GetPrefix(), "snapshots/") {
		t.Errorf("got %v", desc)
	}

	var paged []*pb.Segment
	list := &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s"), View: pb.SegmentView_SEGMENT_VIEW_FILES, PageSize: 3}
	for {
		page := must[*pb.ListSnapshotSegmentsResponse](t)(e.snapshots.ListSnapshotSegments(ctx, list))
		for _, s := range page.GetSegments() {
			if s.GetOrdinal() != int64(len(paged)) || s.GetFiles() != 3 || s.GetBytes() != 300 {
				t.Errorf("got %v", s)
			}
			paged = append(paged, s.GetSegment())
		}
		if list.PageToken = page.GetNextPageToken(); list.GetPageToken() == "" {
			break
		}
	}
	if diff := cmp.Diff(segments, paged, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	basic := must[*pb.ListSnapshotSegmentsResponse](t)(e.snapshots.ListSnapshotSegments(ctx,
		&pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s")}))
	if len(basic.GetSegments()) != 4 || len(basic.GetSegments()[0].GetSegment().GetFiles()) != 0 ||
		basic.GetSegments()[0].GetFiles() != 3 {
		t.Errorf("got %v", basic)
	}

	updated := must[*pb.UpdateSnapshotResponse](t)(e.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{
		Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description", "expire_time"}},
		Description:      "new",
		ExpectedRevision: snap.GetRevision(),
	})).GetSnapshot()
	if updated.GetDescription() != "new" || updated.GetExpireTime() != nil || updated.GetLabels()["l"] != "m" {
		t.Errorf("got %v", updated)
	}
	_, err := e.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{
		Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels"}},
		ExpectedRevision: snap.GetRevision(),
	})
	if reason(err) != "REVISION_CHANGED" || status.Code(err) != codes.Aborted {
		t.Errorf("got %v", err)
	}

	key := must[*pb.GetKeyResponse](t)(e.admin.GetKey(ctx,
		&pb.GetKeyRequest{Key: fmt.Sprintf("/snapshot/rec/%d", snap.GetId())}))
	if key.GetKey() != keys.Snapshot(snap.GetId()) || key.GetType() != "snapshotd.storage.v1.Snapshot" ||
		!strings.Contains(key.GetJson(), `"description":"new"`) {
		t.Errorf("got %v", key)
	}

	drop := must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx,
		&pb.DropSnapshotRequest{Snapshot: snapNamed("s"), ExpectedId: snap.GetId()}))
	if drop.GetSnapshotId() != snap.GetId() {
		t.Errorf("got %v", drop)
	}
	drop = must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx,
		&pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
	if drop.GetSnapshotId() != 0 {
		t.Errorf("got %v", drop)
	}
	_, err = e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed("s")})
	if reason(err) != "SNAPSHOT_NOT_FOUND" || status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
	_, err = e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapID(1 << 60)})
	if reason(err) != "NEVER_EXISTED" {
		t.Errorf("got %v", err)
	}
}

// TestPages reads lists page by page, and refuses tokens of other requests.
func TestPages(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	col := e.collection(t, "c")
	var want []string
	for i := range 5 {
		name := fmt.Sprint("s", i)
		want = append([]string{name}, want...) // newest first
		must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(ctx,
			&pb.CreateSnapshotRequest{Collection: byName("c"), Name: name}))
		e.collection(t, fmt.Sprint("d", i))
	}
	var got []string
	req := &pb.ListSnapshotsRequest{Collection: byID(col.GetId()), PageSize: 2}
	var token string
	for {
		page := must[*pb.ListSnapshotsResponse](t)(e.snapshots.ListSnapshots(ctx, req))
		for _, s := range page.GetSnapshots() {
			got = append(got, s.GetName())
		}
		if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
			break
		}
		token = req.GetPageToken()
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	n := 0
	cols := &pb.ListCollectionsRequest{PageSize: 4, Db: "default"}
	for {
		page := must[*pb.ListCollectionsResponse](t)(e.catalog.ListCollections(ctx, cols))
		n += len(page.GetCollections())
		if cols.PageToken = page.GetNextPageToken(); cols.GetPageToken() == "" {
			break
		}
	}
	if n != 6 {
		t.Errorf("got %d collections", n)
	}
	// The page size may change between pages.
	must[*pb.ListSnapshotsResponse](t)(e.snapshots.ListSnapshots(ctx,
		&pb.ListSnapshotsRequest{Collection: byID(col.GetId()), PageToken: token}))
	for _, bad := range []*pb.ListSnapshotsRequest{
		{Collection: byID(col.GetId()), PageToken: "x"},
		{Collection: byID(col.GetId()), PageToken: token[1:]},
		{Collection: byID(col.GetId()), PageToken: token, NamePrefix: "s"},
		{PageToken: token},
	} {
		if _, err := e.snapshots.ListSnapshots(ctx, bad); reason(err) != "INVALID_PAGE_TOKEN" ||
			status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: got %v", bad, err)
		}
	}
	if _, err := e.catalog.ListCollections(ctx,
		&pb.ListCollectionsRequest{PageToken: token}); reason(err) != "INVALID_PAGE_TOKEN" {
		t.Errorf("got %v", err)
	}
	if _, err := e.snapshots.ListSnapshotSegments(ctx,
		&pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s1"), PageToken: token}); reason(err) != "INVALID_PAGE_TOKEN" {
		t.Errorf("got %v", err)
	}
	if _, err := e.snapshots.ListSnapshots(ctx,
		&pb.ListSnapshotsRequest{Collection: byName("none")}); reason(err) != "COLLECTION_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
}

// TestNameOfSeveralCollections lists the snapshots under a name of two dropped
// collections: those of the newer one, with one note.
func TestNameOfSeveralCollections(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	for _, name := range []string{"one", "two"} {
		e.collection(t, "c")
		must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(ctx,
			&pb.CreateSnapshotRequest{Collection: byName("c"), Name: name}))
		must[*pb.DropCollectionResponse](t)(e.catalog.DropCollection(ctx,
			&pb.DropCollectionRequest{Collection: byName("c")}))
	}
	var header metadata.MD
	list, err := e.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{Collection: byName("c")}, grpc.Header(&header))
	if err != nil || len(list.GetSnapshots()) != 1 || list.GetSnapshots()[0].GetName() != "two" {
		t.Errorf("got %v, err = %v", list, err)
	}
	if notes := header.Get("snapshotd-note"); len(notes) != 1 ||
		!strings.Contains(notes[0], "2 collections had the name default/c") {
		t.Errorf("notes %q", notes)
	}
	header = nil
	if _, err := e.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{}, grpc.Header(&header)); err != nil ||
		len(header.Get("snapshotd-note")) > 0 {
		t.Errorf("notes %q, err = %v", header.Get("snapshotd-note"), err)
	}
}
