package server_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"regexp"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/server"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	memkv "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	memobject "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// panicKey makes a read of it panic, as a mistake in a handler would.
const panicKey = "/panic"

// store is the memory twin with a mistake in it.
type store struct {
	*memkv.Store
	down atomic.Bool
}

func (s *store) Get(ctx context.Context, key string) (meta.KeyValue, bool, int64, error) {
	if key == panicKey {
		panic("a mistake")
	}
	if s.down.Load() {
		return meta.KeyValue{}, false, 0, fmt.Errorf("%w: dial 10.9.8.7", meta.ErrUnavailable)
	}
	return s.Store.Get(ctx, key)
}

// world is a server with all that is below it, and clients.
type world struct {
	kv        *store
	objects   *object.Faulty
	server    *server.Server
	logs      *observer.ObservedLogs
	registry  *prometheus.Registry
	snapshots pb.SnapshotServiceClient
	catalog   pb.CatalogServiceClient
	events    pb.EventServiceClient
	admin     pb.AdminServiceClient
	conn      *grpc.ClientConn
	listener  *bufconn.Listener
}

// start makes a world whose server has the store "default", and further ones under aliases.
func start(t *testing.T, aliases ...string) *world {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	log := zap.New(core)
	w := &world{kv: &store{Store: memkv.New(memkv.Options{})}, logs: logs, registry: prometheus.NewRegistry()}
	w.objects = object.NewFaulty(memobject.New(memobject.Options{}))
	objects := map[string]object.Store{"default": w.objects}
	for _, alias := range aliases {
		objects[alias] = memobject.New(memobject.Options{})
	}
	c, err := cluster.Open(t.Context(), w.kv, cluster.Options{Release: "test", Now: time.Now, Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	requests := request.NewLeases(w.kv, time.Now, nil)
	age := epoch.New(epoch.Options{KV: w.kv, Store: w.objects, Cluster: c.ID, Now: time.Now, Rand: rand.Reader})
	cat := catalog.New(catalog.Options{
		KV: w.kv, Now: time.Now, Rand: rand.Reader, Requests: requests, RaiseIDs: age.RaiseIDLimit,
		HasStore:    func(alias string) bool { return objects[alias] != nil },
		ReadSpilled: catalog.ReadSpilled(objects),
	})
	m, err := manager.New(manager.Options{
		KV: w.kv, Catalog: cat, Cluster: c, Stores: objects, SnapshotStore: "default", Requests: requests, Epoch: age,
		Replica: "r1", Release: "test", Now: time.Now, Rand: rand.Reader, Log: zap.NewNop(),
	})
	if err != nil {
		t.Fatal(err)
	}
	w.server, err = server.New(server.Options{
		Manager: m, Catalog: cat, Cluster: c, KV: w.kv, Log: log, Registry: w.registry,
		Version: "v1", Replica: "r1", Stores: append([]string{"default"}, aliases...), SnapshotStore: "default",
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran, served := make(chan error, 1), make(chan error, 1)
	l := bufconn.Listen(1 << 20)
	w.listener = l
	go func() { ran <- m.Run(ctx) }()
	noted := func() bool {
		_, found, _, err := w.kv.Get(ctx, keys.Clock)
		return found || err != nil
	}
	for m.Jobs().Stats().Workers == 0 || !noted() { // what is written by itself
		runtime.Gosched()
	}
	go func() { served <- w.server.Serve(l) }()
	w.server.SetServing(true)
	w.conn, err = grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = w.conn.Close()
		grace, done := context.WithTimeout(context.Background(), 10*time.Second)
		defer done()
		w.server.Stop(grace)
		cancel()
		if err := errors.Join(<-served, <-ran); err != nil {
			t.Error(err)
		}
	})
	w.snapshots, w.catalog = pb.NewSnapshotServiceClient(w.conn), pb.NewCatalogServiceClient(w.conn)
	w.events, w.admin = pb.NewEventServiceClient(w.conn), pb.NewAdminServiceClient(w.conn)
	return w
}

func byName(name string) *pb.CollectionRef {
	return &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: name}}}
}

func byID(id int64) *pb.CollectionRef { return &pb.CollectionRef{Ref: &pb.CollectionRef_Id{Id: id}} }

func snapNamed(name string) *pb.SnapshotRef {
	return &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: name}}
}

func snapID(id int64) *pb.SnapshotRef { return &pb.SnapshotRef{Ref: &pb.SnapshotRef_Id{Id: id}} }

// must returns a call's response, and ends the test without one.
func must[T any](t *testing.T) func(T, error) T {
	t.Helper()
	return func(resp T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err, status.Convert(err).Details())
		}
		return resp
	}
}

func reason(err error) string {
	for _, d := range status.Convert(err).Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

func fields(err error) []string {
	var list []string
	for _, d := range status.Convert(err).Details() {
		if bad, ok := d.(*errdetails.BadRequest); ok {
			for _, v := range bad.GetFieldViolations() {
				list = append(list, v.GetField())
			}
		}
	}
	return list
}

func (w *world) collection(t *testing.T, name string) *pb.Collection {
	t.Helper()
	return must[*pb.CreateCollectionResponse](t)(w.catalog.CreateCollection(t.Context(), &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Name: name}, Roots: []*pb.Root{{Prefix: "data/" + name + "/"}},
	})).GetCollection()
}

func (w *world) ids(t *testing.T, n int64) int64 {
	t.Helper()
	return must[*pb.AllocateIdsResponse](t)(w.catalog.AllocateIds(t.Context(), &pb.AllocateIdsRequest{
		Want: &pb.AllocateIdsRequest_Count{Count: n},
	})).GetIds().GetFirst()
}

func (w *world) addSegments(t *testing.T, ref *pb.CollectionRef, segments ...*pb.Segment) *pb.AddSegmentsResponse {
	t.Helper()
	resp, err := w.tryAdd(t.Context(), &pb.AddSegmentsRequest{Collection: ref, Segments: segments})
	return must[*pb.AddSegmentsResponse](t)(resp, err)
}

func (w *world) tryAdd(ctx context.Context, msgs ...*pb.AddSegmentsRequest) (*pb.AddSegmentsResponse, error) {
	stream, err := w.catalog.AddSegments(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		if stream.Send(m) != nil {
			break // the answer says why
		}
	}
	return stream.CloseAndRecv()
}

// full is a segment of collection 1 with every field set.
func full(id, partition, index int64) *pb.Segment {
	file := func(path, kind string) *pb.File {
		return &pb.File{
			Path: path, Kind: kind, SizeBytes: 100, Etag: "e-1", Checksum: &pb.Checksum{Type: "CRC32C", Value: []byte{1, 2, 3, 4}},
			MinTimestamp: 5, MaxTimestamp: 9, Entries: 7, FieldId: 101, LogId: 33, Attributes: map[string]string{"a": "b"},
		}
	}
	return &pb.Segment{
		Id: id, PartitionId: partition, Level: pb.Segment_LEVEL_L2, State: pb.Segment_STATE_SEALED, Rows: 7,
		StartPosition: &pb.Position{Timestamp: 5, Opaque: []byte("s")}, DmlPosition: &pb.Position{Timestamp: 10, Opaque: []byte("d")},
		StorageVersion: 3, Sorted: true, CommitTimestamp: 6, RowCeiling: 11,
		Files: []*pb.File{file(fmt.Sprintf("1/%d/%d/x", partition, id), "insert"), file(fmt.Sprintf("1/%d/%d/y", partition, id), "own-kind")},
		IndexBuilds: []*pb.IndexBuild{{
			Id: id + 1, IndexId: index, FieldId: 101, Params: map[string]string{"k": "v"},
			Files: []*pb.File{file(fmt.Sprintf("1/%d/%d/i", partition, id), "index")},
		}},
		EngineData: []byte("engine"), Attributes: map[string]string{"c": "d"},
	}
}

// set fails when a field of m, or of a message below it, is not set, so that a
// field that is added is added here too.
func set(t *testing.T, m proto.Message) {
	t.Helper()
	var check func(m protoreflect.Message)
	check = func(m protoreflect.Message) {
		for i := range m.Descriptor().Fields().Len() {
			f := m.Descriptor().Fields().Get(i)
			name := string(f.FullName())
			if !m.Has(f) && name != "snapshotd.v1.Segment.shard" && name != "snapshotd.v1.File.root" && name != "snapshotd.v1.Pin.restore_job_id" &&
				!strings.HasSuffix(name, ".nanos") {
				t.Errorf("%s is not set", name)
			}
			if f.Message() != nil && !f.IsMap() {
				if f.IsList() {
					for j := range m.Get(f).List().Len() {
						check(m.Get(f).List().Get(j).Message())
					}
				} else if m.Has(f) {
					check(m.Get(f).Message())
				}
			}
		}
	}
	check(m.ProtoReflect())
}

func TestEveryFieldOfASegment(t *testing.T) {
	w := start(t)
	col := w.collection(t, "c")
	part := must[*pb.CreatePartitionResponse](t)(w.catalog.CreatePartition(t.Context(), &pb.CreatePartitionRequest{
		Collection: byID(col.GetId()), Name: "p", Attributes: map[string]string{"a": "b"},
	})).GetPartition()
	set(t, part)
	index := must[*pb.CreateIndexResponse](t)(w.catalog.CreateIndex(t.Context(), &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 101, TypeParams: map[string]string{"dim": "8"},
		IndexParams: map[string]string{"index_type": "HNSW"}, Attributes: map[string]string{"a": "b"},
	})).GetIndex()
	set(t, index)
	id := w.ids(t, 2)
	want := full(id, part.GetId(), index.GetId())
	set(t, want)
	if got := w.addSegments(t, byName("c"), want); got.GetAdded() != 1 || got.GetCollectionId() != col.GetId() {
		t.Errorf("got %v", got)
	}
	if got := w.addSegments(t, byName("c"), want); got.GetPresent() != 1 {
		t.Errorf("got %v", got)
	}
	got := must[*pb.GetSegmentResponse](t)(w.catalog.GetSegment(t.Context(), &pb.GetSegmentRequest{Collection: byName("c"), SegmentId: id}))
	if diff := cmp.Diff(want, got.GetSegment(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	export, err := w.catalog.ExportSegments(t.Context(), &pb.ExportSegmentsRequest{Collection: byName("c")})
	if err != nil {
		t.Fatal(err)
	}
	msg := must[*pb.ExportSegmentsResponse](t)(export.Recv())
	if diff := cmp.Diff([]*pb.Segment{want}, msg.GetSegments(), protocmp.Transform()); diff != "" || msg.GetCatalogRevision() == 0 {
		t.Error(msg.GetCatalogRevision(), diff)
	}

	update := must[*pb.UpdateSegmentsResponse](t)(w.catalog.UpdateSegments(t.Context(), &pb.UpdateSegmentsRequest{
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
	after := must[*pb.GetSegmentResponse](t)(w.catalog.GetSegment(t.Context(), &pb.GetSegmentRequest{Collection: byName("c"), SegmentId: id})).GetSegment()
	changed := proto.CloneOf(want)
	changed.State, changed.Rows, changed.DmlPosition, changed.Sorted = pb.Segment_STATE_FLUSHED, 8, &pb.Position{Timestamp: 12}, false
	changed.Files = []*pb.File{want.GetFiles()[1], {Path: "new", Kind: "insert"}}
	changed.IndexBuilds, changed.EngineData = nil, nil
	if diff := cmp.Diff(changed, after, protocmp.Transform(), protocmp.SortRepeatedFields(&pb.Segment{}, "files")); diff != "" {
		t.Error(diff)
	}
}

func TestSnapshotLife(t *testing.T) {
	w := start(t)
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
	col := must[*pb.CreateCollectionResponse](t)(w.catalog.CreateCollection(ctx, req)).GetCollection()
	set(t, col)
	again := must[*pb.CreateCollectionResponse](t)(w.catalog.CreateCollection(ctx, req)).GetCollection()
	if diff := cmp.Diff(col, again, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	reused := proto.CloneOf(req)
	reused.Name.Name = "d"
	if _, err := w.catalog.CreateCollection(ctx, reused); reason(err) != "REQUEST_TOKEN_REUSED" || status.Code(err) != codes.InvalidArgument {
		t.Errorf("got %v", err)
	}
	index := must[*pb.CreateIndexResponse](t)(w.catalog.CreateIndex(ctx, &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 100, TypeParams: map[string]string{"dim": "8"},
		IndexParams: map[string]string{"i": "j"}, Attributes: map[string]string{"a": "b"},
	})).GetIndex()
	part := must[*pb.CreatePartitionResponse](t)(w.catalog.CreatePartition(ctx, &pb.CreatePartitionRequest{
		Collection: byID(col.GetId()), Name: "p", Attributes: map[string]string{"a": "b"},
	})).GetPartition()
	first := w.ids(t, 8)
	var segments []*pb.Segment
	for i := range int64(4) {
		s := full(first+2*i, part.GetId(), index.GetId())
		s.RowCeiling, s.CommitTimestamp = 0, 0
		segments = append(segments, s)
	}
	w.addSegments(t, byID(col.GetId()), segments...)
	must[*pb.SetCheckpointsResponse](t)(w.catalog.SetCheckpoints(ctx, &pb.SetCheckpointsRequest{
		Collection: byID(col.GetId()), Checkpoints: []*pb.ChannelPosition{{Position: &pb.Position{Timestamp: 20, Opaque: []byte("o")}}},
	}))
	cps := must[*pb.ListCheckpointsResponse](t)(w.catalog.ListCheckpoints(ctx, &pb.ListCheckpointsRequest{Collection: byID(col.GetId())}))
	if diff := cmp.Diff([]*pb.ChannelPosition{{Channel: "ch-0", Position: &pb.Position{Timestamp: 20, Opaque: []byte("o")}}},
		cps.GetCheckpoints(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}

	expire := timestamppb.New(time.Now().Add(time.Hour).UTC())
	snap := must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
		Collection: byID(col.GetId()), Name: "s", Description: "d", Labels: map[string]string{"l": "m"},
		Expiry: &pb.CreateSnapshotRequest_ExpireTime{ExpireTime: expire}, RequestToken: "t-2",
	})).GetSnapshot()
	if snap.GetState() != pb.Snapshot_STATE_COMMITTED || snap.GetTotals().GetSegments() != 4 || snap.GetTotals().GetFiles() != 12 ||
		snap.GetCollection().GetDb() != "db" || !proto.Equal(snap.GetExpireTime(), expire) {
		t.Errorf("got %v", snap)
	}
	got := must[*pb.GetSnapshotResponse](t)(w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed("s")})).GetSnapshot()
	if diff := cmp.Diff(snap, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	desc := must[*pb.DescribeSnapshotResponse](t)(w.snapshots.DescribeSnapshot(ctx, &pb.DescribeSnapshotRequest{Snapshot: snapID(snap.GetId())}))
	want := proto.CloneOf(col)
	want.CreateTime, want.Revision = nil, 0
	if diff := cmp.Diff(want, desc.GetCollection(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if len(desc.GetManifests()) != 1 || len(desc.GetIndexes()) != 1 || len(desc.GetPartitions()) != 1 || desc.GetFormatVersion() == 0 ||
		desc.GetStore() != "default" || !strings.HasPrefix(desc.GetPrefix(), "snapshots/") {
		t.Errorf("got %v", desc)
	}

	var paged []*pb.Segment
	list := &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s"), View: pb.SegmentView_SEGMENT_VIEW_FILES, PageSize: 3}
	for {
		page := must[*pb.ListSnapshotSegmentsResponse](t)(w.snapshots.ListSnapshotSegments(ctx, list))
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
	basic := must[*pb.ListSnapshotSegmentsResponse](t)(w.snapshots.ListSnapshotSegments(ctx, &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s")}))
	if len(basic.GetSegments()) != 4 || len(basic.GetSegments()[0].GetSegment().GetFiles()) != 0 || basic.GetSegments()[0].GetFiles() != 3 {
		t.Errorf("got %v", basic)
	}

	updated := must[*pb.UpdateSnapshotResponse](t)(w.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{
		Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description", "expire_time"}}, Description: "new",
		ExpectedRevision: snap.GetRevision(),
	})).GetSnapshot()
	if updated.GetDescription() != "new" || updated.GetExpireTime() != nil || updated.GetLabels()["l"] != "m" {
		t.Errorf("got %v", updated)
	}
	_, err := w.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{
		Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"labels"}}, ExpectedRevision: snap.GetRevision(),
	})
	if reason(err) != "REVISION_CHANGED" || status.Code(err) != codes.Aborted {
		t.Errorf("got %v", err)
	}

	key := must[*pb.GetKeyResponse](t)(w.admin.GetKey(ctx, &pb.GetKeyRequest{Key: fmt.Sprintf("/snapshot/rec/%d", snap.GetId())}))
	if key.GetKey() != keys.Snapshot(snap.GetId()) || key.GetType() != "snapshotd.storage.v1.Snapshot" || !strings.Contains(key.GetJson(), `"description":"new"`) {
		t.Errorf("got %v", key)
	}

	drop := must[*pb.DropSnapshotResponse](t)(w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s"), ExpectedId: snap.GetId()}))
	if drop.GetSnapshotId() != snap.GetId() {
		t.Errorf("got %v", drop)
	}
	drop = must[*pb.DropSnapshotResponse](t)(w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
	if drop.GetSnapshotId() != 0 {
		t.Errorf("got %v", drop)
	}
	_, err = w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed("s")})
	if reason(err) != "SNAPSHOT_NOT_FOUND" || status.Code(err) != codes.NotFound {
		t.Errorf("got %v", err)
	}
	_, err = w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapID(1 << 60)})
	if reason(err) != "NEVER_EXISTED" {
		t.Errorf("got %v", err)
	}
}

func TestPages(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	col := w.collection(t, "c")
	var want []string
	for i := range 5 {
		name := fmt.Sprint("s", i)
		want = append([]string{name}, want...) // newest first
		must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byName("c"), Name: name}))
		w.collection(t, fmt.Sprint("d", i))
	}
	var got []string
	req := &pb.ListSnapshotsRequest{Collection: byID(col.GetId()), PageSize: 2}
	var token string
	for {
		page := must[*pb.ListSnapshotsResponse](t)(w.snapshots.ListSnapshots(ctx, req))
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
		page := must[*pb.ListCollectionsResponse](t)(w.catalog.ListCollections(ctx, cols))
		n += len(page.GetCollections())
		if cols.PageToken = page.GetNextPageToken(); cols.GetPageToken() == "" {
			break
		}
	}
	if n != 6 {
		t.Errorf("got %d collections", n)
	}
	// Another page size is not another filter.
	must[*pb.ListSnapshotsResponse](t)(w.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{Collection: byID(col.GetId()), PageToken: token}))
	for _, bad := range []*pb.ListSnapshotsRequest{
		{Collection: byID(col.GetId()), PageToken: "x"},
		{Collection: byID(col.GetId()), PageToken: token[1:]},
		{Collection: byID(col.GetId()), PageToken: token, NamePrefix: "s"},
		{PageToken: token},
	} {
		if _, err := w.snapshots.ListSnapshots(ctx, bad); reason(err) != "INVALID_PAGE_TOKEN" || status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: got %v", bad, err)
		}
	}
	if _, err := w.catalog.ListCollections(ctx, &pb.ListCollectionsRequest{PageToken: token}); reason(err) != "INVALID_PAGE_TOKEN" {
		t.Errorf("got %v", err)
	}
	if _, err := w.snapshots.ListSnapshotSegments(ctx, &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s1"), PageToken: token}); reason(err) != "INVALID_PAGE_TOKEN" {
		t.Errorf("got %v", err)
	}
	if _, err := w.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{Collection: byName("none")}); reason(err) != "COLLECTION_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
}

// TestPageBytes has segments of which a page can hold fewer than are asked for.
func TestPageBytes(t *testing.T) {
	w := start(t)
	col := w.collection(t, "c")
	const n = 200
	first := w.ids(t, n)
	var segments []*pb.Segment
	for i := range int64(n) {
		segments = append(segments, &pb.Segment{Id: first + i, EngineData: make([]byte, 16<<10), Files: []*pb.File{{Path: fmt.Sprint(i), Kind: "insert"}}})
	}
	w.addSegments(t, byID(col.GetId()), segments...)
	must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{Collection: byName("c"), Name: "s"}))
	got, pages := 0, 0
	req := &pb.ListSnapshotSegmentsRequest{Snapshot: snapNamed("s"), PageSize: 1000}
	for {
		page := must[*pb.ListSnapshotSegmentsResponse](t)(w.snapshots.ListSnapshotSegments(t.Context(), req))
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
	export, err := w.catalog.ExportSegments(t.Context(), &pb.ExportSegmentsRequest{Collection: byName("c")})
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

// TestUnreadExports has clients begin exports and not read them: no more than a few
// are under way at once, and one that ends makes room for another.
func TestUnreadExports(t *testing.T) {
	w := start(t)
	col := w.collection(t, "c")
	const n, times, most = 200, 6, 8 // more than a client takes that does not read
	for range times {
		first := w.ids(t, n)
		var segments []*pb.Segment
		for i := range int64(n) {
			segments = append(segments, &pb.Segment{Id: first + i, EngineData: make([]byte, 16<<10), Files: []*pb.File{{Path: fmt.Sprint(first + i), Kind: "insert"}}})
		}
		w.addSegments(t, byID(col.GetId()), segments...)
	}
	begin := func() (context.CancelFunc, error) {
		ctx, cancel := context.WithCancel(t.Context())
		export, err := w.catalog.ExportSegments(ctx, &pb.ExportSegmentsRequest{Collection: byName("c")})
		if err == nil {
			_, err = export.Recv() // the last ones wait
		}
		return cancel, err
	}
	var ends []context.CancelFunc
	for range most {
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

func TestEvents(t *testing.T) {
	w := start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := w.events.WatchEvents(ctx, &pb.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func() *pb.WatchEventsResponse {
		t.Helper()
		for {
			msg := must[*pb.WatchEventsResponse](t)(stream.Recv())
			if msg.GetBookmark() == nil {
				return msg
			}
		}
	}
	mark := must[*pb.WatchEventsResponse](t)(stream.Recv())
	if mark.GetBookmark() == nil || mark.GetResumeToken() == "" || mark.GetRevision() == 0 {
		t.Fatalf("got %v, want a bookmark", mark)
	}
	col := w.collection(t, "c")
	must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byName("c"), Name: "s"}))
	describe := func(m *pb.WatchEventsResponse) string {
		if c := m.GetCollection(); c != nil {
			return fmt.Sprint("collection ", c.GetType(), c.GetCollection().GetState())
		}
		return fmt.Sprint("snapshot ", m.GetSnapshot().GetType(), m.GetSnapshot().GetSnapshot().GetState())
	}
	var got, tokens []string
	for range 3 {
		m := recv()
		got, tokens = append(got, describe(m)), append(tokens, m.GetResumeToken())
	}
	want := []string{
		"collection CHANGE_TYPE_CREATED STATE_ACTIVE",
		"snapshot CHANGE_TYPE_CREATED STATE_PENDING",
		"snapshot CHANGE_TYPE_UPDATED STATE_COMMITTED",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// Resuming behind each message tells what followed it.
	for i, token := range append([]string{mark.GetResumeToken()}, tokens[:2]...) {
		stream, err = w.events.WatchEvents(ctx, &pb.WatchEventsRequest{ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		if m := describe(recv()); m != want[i] {
			t.Errorf("resumed at %d: got %s, want %s", i, m, want[i])
		}
	}
	for _, req := range []*pb.WatchEventsRequest{
		{ResumeToken: "x"}, {ResumeToken: tokens[0], Collection: byID(col.GetId())}, {ResumeToken: tokens[0] + "A"},
	} {
		stream, err := w.events.WatchEvents(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Recv(); reason(err) != "INVALID_RESUME_TOKEN" {
			t.Errorf("%v: got %v", req, err)
		}
	}
	if err := w.kv.Compact(ctx, col.GetRevision()+1); err != nil {
		t.Fatal(err)
	}
	stream, err = w.events.WatchEvents(ctx, &pb.WatchEventsRequest{ResumeToken: mark.GetResumeToken()})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if reason(err) != "EVENTS_COMPACTED" || status.Code(err) != codes.OutOfRange {
		t.Errorf("got %v", err)
	}
}

// pin pins a snapshot; 0 is no ttl.
func (w *world) pin(t *testing.T, name string, ttl time.Duration) *pb.Pin {
	t.Helper()
	req := &pb.PinSnapshotRequest{Snapshot: snapNamed(name), Owner: "job", Reason: "night"}
	if ttl > 0 {
		req.Ttl = durationpb.New(ttl)
	}
	return must[*pb.PinSnapshotResponse](t)(w.snapshots.PinSnapshot(t.Context(), req)).GetPin()
}

func (w *world) snapshot(t *testing.T, name string) *pb.Snapshot {
	t.Helper()
	return must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{
		Collection: byName("c"), Name: name,
	})).GetSnapshot()
}

// TestNameOfSeveralCollections asks for the snapshots of a name that two collections
// had which were dropped: the answer is about the newest, and says so once.
func TestNameOfSeveralCollections(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	for _, name := range []string{"one", "two"} {
		w.collection(t, "c")
		must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byName("c"), Name: name}))
		must[*pb.DropCollectionResponse](t)(w.catalog.DropCollection(ctx, &pb.DropCollectionRequest{Collection: byName("c")}))
	}
	var header metadata.MD
	list, err := w.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{Collection: byName("c")}, grpc.Header(&header))
	if err != nil || len(list.GetSnapshots()) != 1 || list.GetSnapshots()[0].GetName() != "two" {
		t.Errorf("got %v, err = %v", list, err)
	}
	if notes := header.Get("snapshotd-note"); len(notes) != 1 || !strings.Contains(notes[0], "2 collections had the name default/c") {
		t.Errorf("notes %q", notes)
	}
	header = nil
	if _, err := w.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{}, grpc.Header(&header)); err != nil || len(header.Get("snapshotd-note")) > 0 {
		t.Errorf("notes %q, err = %v", header.Get("snapshotd-note"), err)
	}
}

func TestPins(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	w.collection(t, "c")
	snap := w.snapshot(t, "s")
	req := &pb.PinSnapshotRequest{
		Snapshot: snapNamed("s"), Owner: "backup-job", Reason: "nightly export", Ttl: durationpb.New(90500 * time.Millisecond), RequestToken: "t-1",
	}
	pin := must[*pb.PinSnapshotResponse](t)(w.snapshots.PinSnapshot(ctx, req)).GetPin()
	set(t, pin)
	if pin.GetSnapshotId() != snap.GetId() || pin.GetOwner() != "backup-job" || pin.GetReason() != "nightly export" ||
		pin.GetTtl().AsDuration() != 91*time.Second || pin.GetExpireTime().AsTime().Sub(pin.GetCreateTime().AsTime()) != 91*time.Second {
		t.Errorf("got %v", pin)
	}
	again := must[*pb.PinSnapshotResponse](t)(w.snapshots.PinSnapshot(ctx, req)).GetPin()
	if diff := cmp.Diff(pin, again, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	reused := proto.CloneOf(req)
	reused.Owner = "another"
	if _, err := w.snapshots.PinSnapshot(ctx, reused); reason(err) != "REQUEST_TOKEN_REUSED" {
		t.Errorf("got %v", err)
	}
	key := must[*pb.GetKeyResponse](t)(w.admin.GetKey(ctx, &pb.GetKeyRequest{Key: fmt.Sprintf("/snapshot/pin/%d/%d", snap.GetId(), pin.GetId())}))
	if !key.GetLeased() {
		t.Errorf("got %v", key)
	}
	_, err := w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")})
	if reason(err) != "SNAPSHOT_PINNED" || status.Code(err) != codes.FailedPrecondition ||
		!strings.Contains(err.Error(), fmt.Sprintf("pinned by %d (backup-job: nightly export until 2", pin.GetId())) {
		t.Errorf("got %v", err)
	}
	renewed := must[*pb.RenewPinResponse](t)(w.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId(), Ttl: durationpb.New(time.Hour)})).GetPin()
	want := proto.CloneOf(pin)
	want.Ttl, want.ExpireTime = durationpb.New(time.Hour), renewed.GetExpireTime()
	if diff := cmp.Diff(want, renewed, protocmp.Transform()); diff != "" || !renewed.GetExpireTime().AsTime().After(pin.GetExpireTime().AsTime()) {
		t.Error(renewed, diff)
	}
	list := must[*pb.ListPinsResponse](t)(w.snapshots.ListPins(ctx, &pb.ListPinsRequest{Snapshot: snapID(snap.GetId())}))
	if diff := cmp.Diff([]*pb.Pin{renewed}, list.GetPins(), protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	forever := w.pin(t, "s", 0)
	if forever.GetTtl() != nil || forever.GetExpireTime() != nil {
		t.Errorf("got %v", forever)
	}
	_, err = w.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: forever.GetId()})
	if reason(err) != "PIN_HAS_NO_TTL" || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
	for _, id := range []int64{pin.GetId(), pin.GetId(), forever.GetId()} { // twice is success
		must[*pb.UnpinSnapshotResponse](t)(w.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: id}))
	}
	_, err = w.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()})
	if reason(err) != "PIN_NOT_FOUND" || status.Code(err) != codes.NotFound || !strings.Contains(err.Error(), "pin it again") {
		t.Errorf("got %v", err)
	}
	must[*pb.DropSnapshotResponse](t)(w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
	must[*pb.UnpinSnapshotResponse](t)(w.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()}))
	_, err = w.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId()})
	if reason(err) != "PIN_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
	if _, err = w.snapshots.ListPins(ctx, &pb.ListPinsRequest{Snapshot: snapNamed("s")}); reason(err) != "SNAPSHOT_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
	if _, err = w.snapshots.PinSnapshot(ctx, &pb.PinSnapshotRequest{Snapshot: snapNamed("s"), Owner: "o"}); reason(err) != "SNAPSHOT_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
}

func TestPinPages(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	w.collection(t, "c")
	for _, name := range []string{"s", "r"} {
		w.snapshot(t, name)
	}
	var all, ofS []*pb.Pin
	for range 5 {
		p := w.pin(t, "s", time.Hour)
		all, ofS = append(all, p), append(ofS, p)
	}
	for range 5 {
		all = append(all, w.pin(t, "r", 0))
	}
	var token string
	for _, tc := range []struct {
		of   *pb.SnapshotRef
		want []*pb.Pin
	}{{nil, all}, {snapNamed("s"), ofS}} {
		var got []*pb.Pin
		req := &pb.ListPinsRequest{Snapshot: tc.of, PageSize: 2}
		for {
			page := must[*pb.ListPinsResponse](t)(w.snapshots.ListPins(ctx, req))
			if got = append(got, page.GetPins()...); len(page.GetPins()) > 2 {
				t.Errorf("a page of %d", len(page.GetPins()))
			}
			if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
			token = req.GetPageToken()
		}
		if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
			t.Error(diff)
		}
	}
	for _, bad := range []*pb.ListPinsRequest{{PageToken: token}, {Snapshot: snapNamed("r"), PageToken: token}, {Snapshot: snapNamed("s"), PageToken: token + "A"}, {PageToken: "x"}} {
		if _, err := w.snapshots.ListPins(ctx, bad); reason(err) != "INVALID_PAGE_TOKEN" || status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: got %v", bad, err)
		}
	}
}

func TestPinEvents(t *testing.T) {
	w := start(t)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w.collection(t, "c")
	w.collection(t, "other")
	w.snapshot(t, "s")
	stream, err := w.events.WatchEvents(ctx, &pb.WatchEventsRequest{Collection: byName("other")})
	if err != nil {
		t.Fatal(err)
	}
	mark := must[*pb.WatchEventsResponse](t)(stream.Recv())
	removed, expires := w.pin(t, "s", time.Hour), w.pin(t, "s", time.Second)
	must[*pb.UnpinSnapshotResponse](t)(w.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{Snapshot: snapNamed("s"), PinId: removed.GetId()}))
	ids := func(p *pb.Pin) *pb.Pin { return &pb.Pin{Id: p.GetId(), SnapshotId: p.GetSnapshotId()} }
	want := []*pb.PinEvent{
		{Type: pb.ChangeType_CHANGE_TYPE_CREATED, Pin: removed},
		{Type: pb.ChangeType_CHANGE_TYPE_CREATED, Pin: expires},
		{Type: pb.ChangeType_CHANGE_TYPE_DELETED, Pin: ids(removed)},
		{Type: pb.ChangeType_CHANGE_TYPE_DELETED, Pin: ids(expires), Expired: true},
	}
	token := mark.GetResumeToken()
	for i, e := range want {
		// Resumed behind each message, it tells what followed.
		stream, err := w.events.WatchEvents(ctx, &pb.WatchEventsRequest{Collection: byName("other"), ResumeToken: token})
		if err != nil {
			t.Fatal(err)
		}
		m := must[*pb.WatchEventsResponse](t)(stream.Recv())
		for m.GetBookmark() != nil {
			m = must[*pb.WatchEventsResponse](t)(stream.Recv())
		}
		if diff := cmp.Diff(e, m.GetPin(), protocmp.Transform()); diff != "" {
			t.Errorf("event %d: %s", i, diff)
		}
		token = m.GetResumeToken()
	}
	must[*pb.DropSnapshotResponse](t)(w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
}

// TestBadPins sends calls about pins that are refused, and write nothing.
func TestBadPins(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	w.collection(t, "c")
	w.snapshot(t, "s")
	w.snapshot(t, "other")
	w.snapshot(t, "deleting")
	pin := w.pin(t, "s", time.Hour)
	w.objects.Freeze()
	defer w.objects.Thaw()
	must[*pb.CreateSnapshotResponse](t)(w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byName("c"), Name: "pending", Wait: new(false)}))
	deleting := must[*pb.DropSnapshotResponse](t)(w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("deleting")})).GetSnapshotId()
	type call struct {
		name   string
		do     func() error
		code   codes.Code
		reason string
		field  string
	}
	create := func(name, why, field string, code codes.Code, edit func(*pb.PinSnapshotRequest)) call {
		return call{name, func() error {
			req := &pb.PinSnapshotRequest{Snapshot: snapNamed("s"), Owner: "o"}
			edit(req)
			_, err := w.snapshots.PinSnapshot(ctx, req)
			return err
		}, code, why, field}
	}
	renew := func(name, why, field string, code codes.Code, req *pb.RenewPinRequest) call {
		return call{name, func() error { _, err := w.snapshots.RenewPin(ctx, req); return err }, code, why, field}
	}
	const invalid, precondition = codes.InvalidArgument, codes.FailedPrecondition
	calls := []call{
		create("no snapshot", "INVALID_REQUEST", "snapshot", invalid, func(r *pb.PinSnapshotRequest) { r.Snapshot = nil }),
		create("no owner", "INVALID_REQUEST", "owner", invalid, func(r *pb.PinSnapshotRequest) { r.Owner = "" }),
		create("long owner", "INVALID_REQUEST", "owner", invalid, func(r *pb.PinSnapshotRequest) { r.Owner = strings.Repeat("é", 128) }),
		create("long reason", "INVALID_REQUEST", "reason", invalid, func(r *pb.PinSnapshotRequest) { r.Reason = strings.Repeat("r", 257) }),
		create("token with space", "INVALID_REQUEST", "request_token", invalid, func(r *pb.PinSnapshotRequest) { r.RequestToken = "a b" }),
		create("unknown", "SNAPSHOT_NOT_FOUND", "", codes.NotFound, func(r *pb.PinSnapshotRequest) { r.Snapshot = snapNamed("none") }),
		create("never there", "NEVER_EXISTED", "", codes.NotFound, func(r *pb.PinSnapshotRequest) { r.Snapshot = snapID(1 << 60) }),
		create("PENDING", "SNAPSHOT_NOT_COMMITTED", "", precondition, func(r *pb.PinSnapshotRequest) { r.Snapshot = snapNamed("pending") }),
		create("DELETING", "SNAPSHOT_NOT_COMMITTED", "", precondition, func(r *pb.PinSnapshotRequest) { r.Snapshot = snapID(deleting) }),
		renew("renew no pin", "INVALID_REQUEST", "pin_id", invalid, &pb.RenewPinRequest{Snapshot: snapNamed("s")}),
		renew("renew a negative pin", "INVALID_REQUEST", "pin_id", invalid, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: -1}),
		renew("renew an unknown pin", "PIN_NOT_FOUND", "", codes.NotFound, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId() + 1}),
		renew("renew a pin of another snapshot", "PIN_NOT_FOUND", "", codes.NotFound, &pb.RenewPinRequest{Snapshot: snapNamed("other"), PinId: pin.GetId()}),
		renew("renew of no snapshot", "PIN_NOT_FOUND", "", codes.NotFound, &pb.RenewPinRequest{Snapshot: snapNamed("none"), PinId: pin.GetId()}),
		{"remove no pin", func() error {
			_, err := w.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{Snapshot: snapNamed("s")})
			return err
		}, invalid, "INVALID_REQUEST", "pin_id"},
		{"remove without a snapshot", func() error {
			_, err := w.snapshots.UnpinSnapshot(ctx, &pb.UnpinSnapshotRequest{PinId: 5})
			return err
		}, invalid, "INVALID_REQUEST", "snapshot"},
		{"a negative page", func() error {
			_, err := w.snapshots.ListPins(ctx, &pb.ListPinsRequest{PageSize: -1})
			return err
		}, invalid, "INVALID_REQUEST", "page_size"},
		{"an empty reference", func() error {
			_, err := w.snapshots.ListPins(ctx, &pb.ListPinsRequest{Snapshot: &pb.SnapshotRef{}})
			return err
		}, invalid, "INVALID_REQUEST", "snapshot.ref"},
	}
	for _, ttl := range []*durationpb.Duration{
		{},
		{Nanos: 500_000_000},
		{Seconds: -1},
		{Seconds: 31 * 24 * 3600},
		{Seconds: 30 * 24 * 3600, Nanos: 1},
		{Seconds: 1<<63 - 1},
		{Seconds: -1 << 63},
		{Seconds: 1, Nanos: -1},
		{Seconds: 1, Nanos: -1 << 31},
	} {
		calls = append(calls,
			create(fmt.Sprint("ttl ", ttl), "INVALID_REQUEST", "ttl", invalid, func(r *pb.PinSnapshotRequest) { r.Ttl = ttl }),
			renew(fmt.Sprint("new ttl ", ttl), "INVALID_REQUEST", "ttl", invalid, &pb.RenewPinRequest{Snapshot: snapNamed("s"), PinId: pin.GetId(), Ttl: ttl}))
	}
	for _, c := range calls {
		t.Run(c.name, func(t *testing.T) {
			before := w.revision(t)
			err := c.do()
			if status.Code(err) != c.code || reason(err) != c.reason {
				t.Errorf("got %v (%s), want %v %s", err, reason(err), c.code, c.reason)
			}
			if got := fields(err); c.field != "" && (len(got) == 0 || got[0] != c.field) {
				t.Errorf("fields %q of %v, want %q", got, err, c.field)
			}
			if after := w.revision(t); after != before {
				t.Errorf("written: revision %d, before %d", after, before)
			}
		})
	}
	// What does not exist needs no removal.
	for _, req := range []*pb.UnpinSnapshotRequest{
		{Snapshot: snapNamed("none"), PinId: 5},
		{Snapshot: snapID(1 << 60), PinId: 5},
		{Snapshot: snapID(deleting), PinId: 5},
		{Snapshot: snapNamed("other"), PinId: pin.GetId()},
	} {
		must[*pb.UnpinSnapshotResponse](t)(w.snapshots.UnpinSnapshot(ctx, req))
	}
	if left := must[*pb.ListPinsResponse](t)(w.snapshots.ListPins(ctx, &pb.ListPinsRequest{})).GetPins(); len(left) != 1 {
		t.Errorf("left %v", left)
	}
}

// TestBadInput sends what no client should, over many methods. Each is refused,
// and nothing is written.
func TestBadInput(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	col := w.collection(t, "c")
	id := w.ids(t, 100)
	w.addSegments(t, byID(col.GetId()), &pb.Segment{Id: id})

	type call struct {
		name  string
		do    func() error
		code  codes.Code
		field string // the first that is named; empty: not checked
	}
	create := func(name string) func() error {
		return func() error {
			_, err := w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byID(col.GetId()), Name: name})
			return err
		}
	}
	createCollection := func(edit func(*pb.CreateCollectionRequest)) func() error {
		return func() error {
			req := &pb.CreateCollectionRequest{Name: &pb.CollectionName{Name: "n"}, Roots: []*pb.Root{{Prefix: "n/"}}}
			edit(req)
			_, err := w.catalog.CreateCollection(ctx, req)
			return err
		}
	}
	add := func(s *pb.Segment) func() error {
		return func() error {
			_, err := w.tryAdd(ctx, &pb.AddSegmentsRequest{Collection: byID(col.GetId()), Segments: []*pb.Segment{s}})
			return err
		}
	}
	var calls []call
	for _, name := range []string{
		"", " ", " a", "a ", "a/b", "..", ".", "-a", "a\x00", "a\nb", "ａ", "é", "e\u0301", "a\u200bb", "\u202ea", "😀", "%2e%2e", `a\b`,
		strings.Repeat("a", 256), strings.Repeat("a", 1<<20),
	} {
		label := fmt.Sprintf("%.20q", name)
		calls = append(calls,
			call{"snapshot name " + label, create(name), codes.InvalidArgument, "name"},
			call{"collection name " + label, createCollection(func(r *pb.CreateCollectionRequest) { r.Name.Name = name }), codes.InvalidArgument, "name.name"},
			call{"partition name " + label, func() error {
				_, err := w.catalog.CreatePartition(ctx, &pb.CreatePartitionRequest{Collection: byID(col.GetId()), Name: name})
				return err
			}, codes.InvalidArgument, "name"},
			call{"new name " + label, func() error {
				_, err := w.catalog.RenameCollection(ctx, &pb.RenameCollectionRequest{Collection: byID(col.GetId()), NewName: &pb.CollectionName{Name: name}})
				return err
			}, codes.InvalidArgument, "new_name.name"},
			call{"get snapshot " + label, func() error {
				_, err := w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed(name)})
				return err
			}, codes.InvalidArgument, "snapshot.name"},
		)
		if name != "" {
			calls = append(calls, call{"db " + label, createCollection(func(r *pb.CreateCollectionRequest) { r.Name.Db = name }), codes.InvalidArgument, "name.db"})
		}
	}
	for _, id := range []int64{0, -1, -1 << 63} {
		calls = append(calls,
			call{fmt.Sprint("snapshot id ", id), func() error {
				_, err := w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapID(id)})
				return err
			}, codes.InvalidArgument, "snapshot.id"},
			call{fmt.Sprint("drop id ", id), func() error {
				_, err := w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapID(id)})
				return err
			}, codes.InvalidArgument, "snapshot.id"},
			call{fmt.Sprint("collection id ", id), func() error {
				_, err := w.catalog.DropCollection(ctx, &pb.DropCollectionRequest{Collection: byID(id)})
				return err
			}, codes.InvalidArgument, "collection.id"},
			call{fmt.Sprint("segment id ", id), add(&pb.Segment{Id: id}), codes.InvalidArgument, "segments[0].id"},
			call{fmt.Sprint("ids ", id), func() error {
				_, err := w.catalog.AllocateIds(ctx, &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: id}})
				return err
			}, codes.InvalidArgument, "count"},
			call{fmt.Sprint("drop segment ", id), func() error {
				_, err := w.catalog.DropSegments(ctx, &pb.DropSegmentsRequest{Collection: byID(col.GetId()), SegmentIds: []int64{id}})
				return err
			}, codes.InvalidArgument, "segment_ids[0]"},
		)
	}
	inputs := make([]int64, 61)
	for i := range inputs {
		inputs[i] = id + int64(i)
	}
	calls = append(calls,
		call{"no snapshot", func() error { _, err := w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{}); return err }, codes.InvalidArgument, "snapshot"},
		call{"empty ref", func() error {
			_, err := w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: &pb.SnapshotRef{}})
			return err
		}, codes.InvalidArgument, "snapshot.ref"},
		call{"negative page", func() error {
			_, err := w.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{PageSize: -1})
			return err
		}, codes.InvalidArgument, "page_size"},
		call{"61 inputs", func() error {
			_, err := w.catalog.CompactSegments(ctx, &pb.CompactSegmentsRequest{Collection: byID(col.GetId()), Inputs: inputs})
			return err
		}, codes.InvalidArgument, ""},
		call{"60 inputs and an output", func() error {
			_, err := w.catalog.CompactSegments(ctx, &pb.CompactSegmentsRequest{
				Collection: byID(col.GetId()), Inputs: inputs[:60], Outputs: []*pb.Segment{{Id: id + 90}},
			})
			return err
		}, codes.InvalidArgument, ""},
		call{"unknown field in mask", func() error {
			_, err := w.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"name"}}})
			return err
		}, codes.InvalidArgument, "update_mask"},
		call{"token with space", func() error {
			_, err := w.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s"), RequestToken: "a b"})
			return err
		}, codes.InvalidArgument, "request_token"},
		call{"unknown store", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Store = "elsewhere" }), codes.InvalidArgument, "roots[0].store"},
		call{"own prefix", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Prefix = "snapshots/" }), codes.InvalidArgument, "roots[0].prefix"},
		call{"absolute prefix", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Prefix = "/x/" }), codes.InvalidArgument, "roots[0].prefix"},
		call{"unknown layout", createCollection(func(r *pb.CreateCollectionRequest) { r.Layout = 77 }), codes.InvalidArgument, "layout"},
		call{"no roots", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots = nil }), codes.InvalidArgument, "roots"},
		call{"expired already", func() error {
			_, err := w.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
				Collection: byID(col.GetId()), Name: "s", Expiry: &pb.CreateSnapshotRequest_ExpireTime{ExpireTime: timestamppb.New(time.Unix(1, 0))},
			})
			return err
		}, codes.InvalidArgument, "expire_time"},
		call{"no collection in a stream", func() error { _, err := w.tryAdd(ctx, &pb.AddSegmentsRequest{}); return err }, codes.InvalidArgument, "collection"},
		call{"an empty stream", func() error { _, err := w.tryAdd(ctx); return err }, codes.InvalidArgument, "collection"},
		call{"id that nobody has", add(&pb.Segment{Id: 1 << 50}), codes.FailedPrecondition, ""},
		call{"id again", add(&pb.Segment{Id: id, Rows: 5, State: pb.Segment_STATE_GROWING}), codes.AlreadyExists, ""},
		call{"rows in no file", add(&pb.Segment{Id: id + 1, Rows: 5}), codes.InvalidArgument, "segments[0].files"},
		call{"unknown shard", add(&pb.Segment{Id: id + 1, Shard: 1}), codes.InvalidArgument, "segments[0].shard"},
		call{"dropped state", add(&pb.Segment{Id: id + 1, State: pb.Segment_STATE_DROPPED}), codes.InvalidArgument, "segments[0].state"},
		call{"negative size", add(&pb.Segment{Id: id + 1, Files: []*pb.File{{Path: "x", Kind: "insert", SizeBytes: -1}}}), codes.InvalidArgument, "segments[0].files[0].size_bytes"},
		call{"a message too large", func() error {
			_, err := w.catalog.CreateCollection(ctx, &pb.CreateCollectionRequest{ConsistencyLevel: strings.Repeat("x", 5<<20)})
			return err
		}, codes.ResourceExhausted, ""},
		call{"a message too large in a stream", func() error {
			_, err := w.tryAdd(ctx, &pb.AddSegmentsRequest{Segments: []*pb.Segment{{EngineData: make([]byte, 5<<20)}}})
			return err
		}, codes.ResourceExhausted, ""},
		call{"metadata too large", func() error {
			_, err := w.admin.GetServerInfo(metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("y", 10<<20)), &pb.GetServerInfoRequest{})
			return err
		}, codes.Internal, ""}, // by gRPC itself, or its client
		call{"key without slash", func() error { _, err := w.admin.GetKey(ctx, &pb.GetKeyRequest{Key: "x"}); return err }, codes.InvalidArgument, "key"},
		call{"unknown key", func() error { _, err := w.admin.GetKey(ctx, &pb.GetKeyRequest{Key: "/x"}); return err }, codes.NotFound, ""},
	)
	for _, path := range []string{"/abs", "../x", "a/../b", "a//b", "a/", `a\b`, "a\x00b", "a\nb", ".", strings.Repeat("x", 1025)} {
		calls = append(calls, call{
			fmt.Sprintf("path %.20q", path), add(&pb.Segment{Id: id + 1, Files: []*pb.File{{Path: path, Kind: "insert"}}}),
			codes.InvalidArgument, "segments[0].files[0].path",
		})
	}
	for _, c := range calls {
		t.Run(c.name, func(t *testing.T) {
			before := w.revision(t)
			err := c.do()
			if c.name == "metadata too large" && err != nil {
				return // what gRPC says differs with the moment
			}
			if status.Code(err) != c.code || err == nil {
				t.Errorf("got %v, want %v", err, c.code)
			}
			if reason(err) == "" {
				t.Error("no reason")
			}
			if got := fields(err); c.field != "" && (len(got) == 0 || got[0] != c.field) {
				t.Errorf("fields %q of %v, want %q", got, err, c.field)
			}
			if n := len(status.Convert(err).Message()); n > 3000 {
				t.Errorf("%d bytes of message", n)
			}
			if after := w.revision(t); after != before {
				t.Errorf("written: revision %d, before %d", after, before)
			}
		})
	}
}

// revision is that of the newest write but for those of the election.
func (w *world) revision(t *testing.T) int64 {
	t.Helper()
	var newest int64
	from, to := keys.All()
	if _, err := w.kv.Scan(t.Context(), from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			if !strings.HasPrefix(kv.Key, "/election/") {
				newest = max(newest, kv.ModRevision)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return newest
}

// TestMalformed sends what gRPC itself refuses.
func TestMalformed(t *testing.T) {
	w := start(t)
	before := w.revision(t)
	for _, data := range [][]byte{{0x12, 2, 0xff, 0xfe}, {0x0a, 0x7f}, make([]byte, 20<<20)} {
		raw := &rawMessage{data: data}
		err := w.conn.Invoke(t.Context(), pb.SnapshotService_CreateSnapshot_FullMethodName, raw, &pb.CreateSnapshotResponse{}, grpc.ForceCodec(raw))
		if code := status.Code(err); code != codes.Internal && code != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
	}
	if after := w.revision(t); after != before {
		t.Errorf("written: revision %d, before %d", after, before)
	}
}

// rawMessage is bytes that are sent as they are.
type rawMessage struct{ data []byte }

func (m *rawMessage) Marshal(any) ([]byte, error)     { return m.data, nil }
func (m *rawMessage) Unmarshal(b []byte, v any) error { return proto.Unmarshal(b, v.(proto.Message)) }
func (m *rawMessage) Name() string                    { return "proto" }

func TestPanic(t *testing.T) {
	w := start(t)
	ctx := metadata.AppendToOutgoingContext(t.Context(), "x-request-id", "req-1")
	_, err := w.admin.GetKey(ctx, &pb.GetKeyRequest{Key: panicKey})
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "req-1") || strings.Contains(err.Error(), "mistake") {
		t.Errorf("got %v", err)
	}
	logged := w.logs.FilterMessage("panic").All()
	if len(logged) != 1 || !strings.Contains(fmt.Sprint(logged[0].ContextMap()["stack"]), "GetKey") {
		t.Errorf("logged %v", logged)
	}
	must[*pb.GetServerInfoResponse](t)(w.admin.GetServerInfo(t.Context(), &pb.GetServerInfoRequest{}))
}

func TestRequestIDs(t *testing.T) {
	w := start(t)
	for given, want := range map[string]string{
		"abc-1.2_3":             "^abc-1\\.2_3$",
		"":                      "^[A-Z0-9]{26}$",
		"a b":                   "^[A-Z0-9]{26}$",
		strings.Repeat("a", 65): "^[A-Z0-9]{26}$",
	} {
		ctx := t.Context()
		if given != "" {
			ctx = metadata.AppendToOutgoingContext(ctx, "x-request-id", given)
		}
		var header metadata.MD
		must[*pb.GetServerInfoResponse](t)(w.admin.GetServerInfo(ctx, &pb.GetServerInfoRequest{}, grpc.Header(&header)))
		got := header.Get("x-request-id")
		if len(got) != 1 || !regexp.MustCompile(want).MatchString(got[0]) {
			t.Errorf("%q: got %q", given, got)
			continue
		}
		if n := w.logs.FilterMessage("call").FilterField(zap.String("request_id", got[0])).Len(); n != 1 {
			t.Errorf("%q: %d lines", got, n)
		}
	}
}

func TestLogHoldsNoPayload(t *testing.T) {
	w := start(t)
	ctx := t.Context()
	col := w.collection(t, "col-canary")
	w.addSegments(t, byID(col.GetId()))
	_, _ = w.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed("canary-name")})
	_, _ = w.catalog.UpdateCollection(ctx, &pb.UpdateCollectionRequest{
		Collection: byID(col.GetId()), Properties: map[string]string{"k": "canary-value"}, RequestToken: "canary-token",
		UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"properties"}},
	})
	for _, e := range w.logs.All() {
		if line := fmt.Sprint(e.Message, e.ContextMap()); strings.Contains(line, "canary") {
			t.Error(line)
		}
	}
	found := w.logs.FilterMessage("call").FilterField(zap.String("reason", "SNAPSHOT_NOT_FOUND")).All()
	if len(found) != 1 {
		t.Fatalf("%d lines", len(found))
	}
	f := found[0].ContextMap()
	if f["method"] != pb.SnapshotService_GetSnapshot_FullMethodName || f["code"] != "NotFound" || f["principal"] != "local" || f["duration"] == nil {
		t.Errorf("got %v", f)
	}
}

func TestStoreAway(t *testing.T) {
	w := start(t)
	w.collection(t, "c")
	w.kv.down.Store(true)
	_, err := w.catalog.GetCollection(t.Context(), &pb.GetCollectionRequest{Collection: byName("c")})
	if status.Code(err) != codes.Unavailable || reason(err) != "STORE_UNAVAILABLE" || strings.Contains(err.Error(), "10.9.8.7") {
		t.Errorf("got %v", err)
	}
	lines := w.logs.FilterMessage("call").FilterField(zap.String("reason", "STORE_UNAVAILABLE")).All()
	if len(lines) != 1 || !strings.Contains(fmt.Sprint(lines[0].ContextMap()["err"]), "10.9.8.7") {
		t.Errorf("logged %v", lines)
	}
	w.kv.down.Store(false)
}

func TestServerInfo(t *testing.T) {
	w := start(t)
	info := must[*pb.GetServerInfoResponse](t)(w.admin.GetServerInfo(t.Context(), &pb.GetServerInfoRequest{}))
	info.Leader = "" // elected or not yet
	want := &pb.GetServerInfoResponse{
		Version: "v1", ClusterId: info.GetClusterId(), NameScope: pb.GetServerInfoResponse_NAME_SCOPE_CLUSTER,
		Replica: "r1", Stores: []string{"default"}, SnapshotStore: "default",
	}
	if diff := cmp.Diff(want, info, protocmp.Transform()); diff != "" || info.GetClusterId() == "" {
		t.Error(diff)
	}
	key := must[*pb.GetKeyResponse](t)(w.admin.GetKey(t.Context(), &pb.GetKeyRequest{Key: "/format"}))
	if !strings.Contains(key.GetJson(), info.GetClusterId()) || strings.Contains(key.GetJson(), "token") {
		t.Errorf("got %v", key)
	}
}

func TestHealthAndStop(t *testing.T) {
	w := start(t)
	check := func() (*healthpb.HealthCheckResponse, error) {
		return healthpb.NewHealthClient(w.conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
	}
	if got := must[*healthpb.HealthCheckResponse](t)(check()); got.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got %v", got)
	}
	watch, err := w.events.WatchEvents(t.Context(), &pb.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	must[*pb.WatchEventsResponse](t)(watch.Recv())
	// A watch would last for ever; Stop returns before its context ends.
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w.server.Stop(ctx)
	if ctx.Err() != nil {
		t.Error("the watch held up the end")
	}
	for err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unavailable || reason(err) != "STOPPING" {
		t.Errorf("got %v", err)
	}
}

func TestMetrics(t *testing.T) {
	w := start(t)
	w.collection(t, "c")
	families, err := w.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["grpc_method"] == "CreateCollection" && labels["grpc_code"] == "OK" && m.GetCounter().GetValue() == 1 {
				return
			}
		}
	}
	t.Error("the call was not counted")
}

// One call cannot use up the ids: reserving is off unless it is allowed.
func TestReserveIsOff(t *testing.T) {
	w := start(t)
	for _, want := range []*pb.AllocateIdsRequest{
		{Want: &pb.AllocateIdsRequest_Reserve{Reserve: &pb.IdRange{First: 1000, Count: 10}}},
		{Want: &pb.AllocateIdsRequest_Release{Release: &pb.IdRange{First: 1000, Count: 10}}},
	} {
		if _, err := w.catalog.AllocateIds(t.Context(), want); reason(err) != "RESERVE_NOT_ALLOWED" || status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%v: %v", want, err)
		}
	}
}

// A message of too many nested elements gets a reason, and so does each message of a
// stream.
func TestTooManyElements(t *testing.T) {
	w := start(t)
	seg := &pb.Segment{Id: 1}
	for range 1_000_000 {
		seg.Files = append(seg.Files, &pb.File{})
	}
	ref := byID(1)
	_, unaryErr := w.catalog.CompactSegments(t.Context(), &pb.CompactSegmentsRequest{Collection: ref, Inputs: []int64{1}, Outputs: []*pb.Segment{seg}})
	_, streamErr := w.tryAdd(t.Context(), &pb.AddSegmentsRequest{Collection: ref, Segments: []*pb.Segment{seg}})
	for _, err := range []error{unaryErr, streamErr} {
		if reason(err) != "MESSAGE_TOO_LARGE" || status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%v", err)
		}
	}
}
