package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestEveryFieldOfASegment registers, reads, exports and updates a segment with all fields.
func TestEveryFieldOfASegment(t *testing.T) {
	e := newEnv(t)
	col := e.collection(t, "c")
	part := must[*pb.CreatePartitionResponse](t)(e.catalog.CreatePartition(t.Context(), &pb.CreatePartitionRequest{
		Collection: byID(col.GetId()), Name: "p", Attributes: map[string]string{"a": "b"},
	})).GetPartition()
	requireAllSet(t, part)
	index := must[*pb.CreateIndexResponse](t)(e.catalog.CreateIndex(t.Context(), &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 101, TypeParams: map[string]string{"dim": "8"},
		IndexParams: map[string]string{"index_type": "HNSW"}, Attributes: map[string]string{"a": "b"},
	})).GetIndex()
	requireAllSet(t, index)
	id := e.ids(t, 2)
	want := fullSegment(id, part.GetId(), index.GetId())
	requireAllSet(t, want)
	if got := e.addSegments(t, byName("c"), want); got.GetAdded() != 1 || got.GetCollectionId() != col.GetId() {
		t.Errorf("got %v", got)
	}
	if got := e.addSegments(t, byName("c"), want); got.GetPresent() != 1 {
		t.Errorf("got %v", got)
	}
	got := must[*pb.GetSegmentResponse](t)(e.catalog.GetSegment(t.Context(),
		&pb.GetSegmentRequest{Collection: byName("c"), SegmentId: id}))
	if diff := cmp.Diff(want, got.GetSegment(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	export, err := e.catalog.ExportSegments(t.Context(), &pb.ExportSegmentsRequest{Collection: byName("c")})
	if err != nil {
		t.Fatal(err)
	}
	msg := must[*pb.ExportSegmentsResponse](t)(export.Recv())
	if diff := cmp.Diff([]*pb.Segment{want}, msg.GetSegments(), protocmp.Transform()); diff != "" ||
		msg.GetCatalogRevision() == 0 {
		t.Error(msg.GetCatalogRevision(), diff)
	}

	update := must[*pb.UpdateSegmentsResponse](t)(e.catalog.UpdateSegments(t.Context(), &pb.UpdateSegmentsRequest{
		Collection: byName("c"),
		Updates: []*pb.SegmentUpdate{{
			SegmentId: id, ExpectedRevision: got.GetRevision(), State: pb.Segment_STATE_FLUSHED, Rows: new(int64(8)),
			DmlPosition: &pb.Position{Timestamp: 12}, Sorted: new(false),
			RemoveFiles: []*pb.FilePath{{Path: want.GetFiles()[0].GetPath()}},
			AddFiles:    []*pb.File{{Path: "new", Kind: "insert"}}, RemoveIndexBuilds: []int64{id + 1}, EngineData: []byte{},
		}},
	}))
	if update.GetCatalogRevision() <= got.GetRevision() {
		t.Errorf("revision %d", update.GetCatalogRevision())
	}
	after := must[*pb.GetSegmentResponse](t)(e.catalog.GetSegment(t.Context(),
		&pb.GetSegmentRequest{Collection: byName("c"), SegmentId: id})).GetSegment()
	changed := proto.CloneOf(want)
	changed.State, changed.Rows, changed.Sorted = pb.Segment_STATE_FLUSHED, 8, false
	changed.DmlPosition = &pb.Position{Timestamp: 12}
	changed.Files = []*pb.File{want.GetFiles()[1], {Path: "new", Kind: "insert"}}
	changed.IndexBuilds, changed.EngineData = nil, nil
	if diff := cmp.Diff(changed, after, protocmp.Transform(),
		protocmp.SortRepeatedFields(&pb.Segment{}, "files")); diff != "" {
		t.Error(diff)
	}
}

// TestPageBytes has segments of which fewer fit into a page than requested.
func TestPageBytes(t *testing.T) {
	e := newEnv(t)
	col := e.collection(t, "c")
	const n = 200
	first := e.ids(t, n)
	var segments []*pb.Segment
	for i := range int64(n) {
		segments = append(segments, &pb.Segment{
			Id: first + i, EngineData: make([]byte, 16<<10),
			Files: []*pb.File{{Path: fmt.Sprint(i), Kind: "insert"}},
		})
	}
	e.addSegments(t, byID(col.GetId()), segments...)
	must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(t.Context(),
		&pb.CreateSnapshotRequest{Collection: byName("c"), Name: "s"}))
	got, pages := 0, 0
	req := &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s"), PageSize: 1000}
	for {
		page := must[*pb.ListSnapshotSegmentsResponse](t)(e.snapshots.ListSnapshotSegments(t.Context(), req))
		if size := proto.Size(page); size > 2<<20+1024 || len(page.GetSegments()) == 0 {
			t.Errorf("page of %d bytes, %d segments", size, len(page.GetSegments()))
		}
		got, pages = got+len(page.GetSegments()), pages+1
		if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
			break
		}
	}
	if got != n || pages != 2 {
		t.Errorf("%d segments in %d pages", got, pages)
	}
	export, err := e.catalog.ExportSegments(t.Context(), &pb.ExportSegmentsRequest{Collection: byName("c")})
	if err != nil {
		t.Fatal(err)
	}
	got = 0
	for {
		msg, err := export.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if size := proto.Size(msg); size > 2<<20+1024 {
			t.Errorf("message of %d bytes", size)
		}
		got += len(msg.GetSegments())
	}
	if got != n {
		t.Errorf("exported %d segments", got)
	}
}

// TestUnreadExports has clients start exports without reading them: their number is
// bounded, and the end of one allows another.
func TestUnreadExports(t *testing.T) {
	e := newEnv(t)
	col := e.collection(t, "c")
	const n, times, limit = 200, 6, 8 // more data than a client buffers
	for range times {
		first := e.ids(t, n)
		var segments []*pb.Segment
		for i := range int64(n) {
			segments = append(segments, &pb.Segment{
				Id: first + i, EngineData: make([]byte, 16<<10),
				Files: []*pb.File{{Path: fmt.Sprint(first + i), Kind: "insert"}},
			})
		}
		e.addSegments(t, byID(col.GetId()), segments...)
	}
	begin := func() (context.CancelFunc, error) {
		ctx, cancel := context.WithCancel(t.Context())
		export, err := e.catalog.ExportSegments(ctx, &pb.ExportSegmentsRequest{Collection: byName("c")})
		if err == nil {
			_, err = export.Recv()
		}
		return cancel, err
	}
	var ends []context.CancelFunc
	for range limit {
		end, err := begin()
		defer end()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	end, err := begin()
	defer end()
	if status.Code(err) != codes.ResourceExhausted || reason(err) != "OVERLOADED" {
		t.Errorf("one more: got %v", err)
	}
	ends[0]()
	end, err = begin()
	defer end()
	if err != nil {
		t.Errorf("after one has ended: %v", err)
	}
}
