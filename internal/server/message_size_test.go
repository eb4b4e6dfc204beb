package server_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
)

const (
	grpcLimit = 4 << 20        // bytes of a message that a gRPC client accepts by default
	pageLimit = 2<<20 + 64<<10 // bytes of a page of several elements, with its other fields
)

// responseSizes records the largest message of each method, in bytes.
type responseSizes struct {
	mu      sync.Mutex
	largest map[string]int
}

func (a *responseSizes) record(method string, m any) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.largest[method] = max(a.largest[method], proto.Size(m.(proto.Message)))
}

func (a *responseSizes) unary(
	ctx context.Context, method string, req, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	// The largest calls take longer than the default minute under the race detector.
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	err := invoke(ctx, method, req, reply, conn, opts...)
	if err == nil {
		a.record(method, reply)
	}
	return err
}

func (a *responseSizes) stream(
	ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer,
	opts ...grpc.CallOption,
) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, conn, method, opts...)
	return &recordedStream{s, a, method}, err
}

type recordedStream struct {
	grpc.ClientStream
	sizes  *responseSizes
	method string
}

func (s *recordedStream) RecvMsg(m any) error {
	err := s.ClientStream.RecvMsg(m)
	if err == nil || errors.Is(err, io.EOF) { // io.EOF may follow the message
		s.sizes.record(s.method, m)
	}
	return err
}

// withPlainClient returns env with a client without size options, and the sizes of its
// responses.
func (e *env) withPlainClient(t *testing.T) (*env, *responseSizes) {
	t.Helper()
	a := &responseSizes{largest: map[string]int{}}
	conn, err := grpc.NewClient("passthrough:///plain", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return e.listener.DialContext(ctx)
		}),
		grpc.WithUnaryInterceptor(a.unary), grpc.WithStreamInterceptor(a.stream))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	p := *e
	p.conn = conn
	p.snapshots, p.catalog = pb.NewSnapshotServiceClient(conn), pb.NewCatalogServiceClient(conn)
	p.events, p.admin = pb.NewEventServiceClient(conn), pb.NewAdminServiceClient(conn)
	return &p, a
}

// long returns a unique name of n bytes for a number.
func long(n, number int) string { return fmt.Sprintf("n%0*d", n-1, number) }

// pairs returns n pairs with keys of so many bytes.
func pairs(n, key int, value string) map[string]string {
	out := make(map[string]string, n)
	for i := range n {
		out[long(key, i)] = value
	}
	return out
}

// pagesOf returns the elements of all pages, and checks the size of each page.
func pagesOf[T proto.Message](
	t *testing.T, elements string, fetch func(token string) (page proto.Message, list []T, next string),
) []T {
	t.Helper()
	var all []T
	token := ""
	for pages := 1; ; pages++ {
		page, list, next := fetch(token)
		if size := proto.Size(page); size > pageLimit && len(list) > 1 || len(list) == 0 && next != "" {
			t.Errorf("%s: page %d has %d bytes and %d elements", elements, pages, size, len(list))
		}
		all = append(all, list...)
		if token = next; token == "" {
			t.Logf("%s: %d in %d pages", elements, len(all), pages)
			return all
		}
	}
}

// TestEveryAnswerIsBounded makes every call of the API with the largest records that can
// be registered, with a client that accepts gRPC's default of 4 MiB. It fails for a
// method that it does not call.
func TestEveryAnswerIsBounded(t *testing.T) { //nolint:maintidx // one sequence of many steps
	store := long(255, 1)
	plain, got := newEnv(t, store).withPlainClient(t)
	b := &largeEnv{env: plain, t: t, store: store}
	reclaims, collectors := pb.NewReclaimServiceClient(plain.conn), pb.NewCollectorServiceClient(plain.conn)
	ctx := t.Context()

	token := b.firstToken()
	b.many = must[*pb.CreateCollectionResponse](t)(b.catalog.CreateCollection(ctx, &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Db: long(255, 1), Name: long(255, 0)}, Roots: []*pb.Root{{Prefix: "many/"}},
		Channels: b.channels(),
	})).GetCollection().GetId()
	for i := range catalog.MaxPartitions {
		must[*pb.CreatePartitionResponse](t)(b.catalog.CreatePartition(ctx,
			&pb.CreatePartitionRequest{Collection: byID(b.many), Name: long(255, i)}))
	}
	b.collections()
	b.segments()
	b.describe()
	b.manySnapshots()
	b.pins()
	b.restores()
	b.reclaim(reclaims)
	b.collector(collectors)
	b.getKey()
	b.watch(token)
	must[*pb.GetServerInfoResponse](t)(b.admin.GetServerInfo(ctx, &pb.GetServerInfoRequest{}))
	must[*pb.ProbeStoreResponse](t)(b.admin.ProbeStore(ctx, &pb.ProbeStoreRequest{}))
	must[*pb.DropPartitionResponse](t)(b.catalog.DropPartition(ctx,
		&pb.DropPartitionRequest{Collection: byID(b.wide), Name: long(255, 1000)}))
	must[*pb.DropIndexResponse](t)(b.catalog.DropIndex(ctx,
		&pb.DropIndexRequest{Collection: byID(b.wide), Name: long(255, 1000)}))
	must[*pb.DropCollectionResponse](t)(b.catalog.DropCollection(ctx, &pb.DropCollectionRequest{Collection: byID(b.wide)}))

	for _, service := range []*grpc.ServiceDesc{
		&pb.SnapshotService_ServiceDesc, &pb.CatalogService_ServiceDesc, &pb.EventService_ServiceDesc,
		&pb.ReclaimService_ServiceDesc, &pb.CollectorService_ServiceDesc, &pb.AdminService_ServiceDesc,
	} {
		var methods []string
		for _, m := range service.Methods {
			methods = append(methods, m.MethodName)
		}
		for _, s := range service.Streams {
			methods = append(methods, s.StreamName)
		}
		for _, name := range methods {
			method := "/" + service.ServiceName + "/" + name
			if _, called := got.largest[method]; !called {
				t.Errorf("%s was not called: add it here, with the largest possible request", method)
			}
			delete(got.largest, method)
		}
	}
	for _, service := range slices.Sorted(maps.Keys(got.largest)) {
		t.Errorf("%s belongs to a service that is not in the list", service)
	}
}

// largeEnv is an environment with the largest possible records.
type largeEnv struct {
	*env
	t     *testing.T
	store string // longest alias

	wide, many  int64 // collections
	large       []*pb.Segment
	jobs        []int64
	lastDropped []int64
}

func (b *largeEnv) firstToken() string {
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	stream, err := b.events.WatchEvents(ctx, &pb.WatchEventsRequest{})
	if err != nil {
		b.t.Fatal(err)
	}
	return must[*pb.WatchEventsResponse](b.t)(stream.Recv()).GetResumeToken()
}

func (b *largeEnv) channels() []string {
	var list []string
	for i := range catalog.MaxChannels {
		list = append(list, long(64, i))
	}
	return list
}

func (b *largeEnv) collections() {
	t, ctx := b.t, b.t.Context()
	var fields []*pb.Field
	for i := range 1024 {
		fields = append(fields, &pb.Field{Id: int64(i + 1), Name: long(255, i)})
	}
	roots := []*pb.Root{{Store: b.store, Prefix: long(511, 0) + "/"}, {Prefix: "r/"}}
	for i := range 14 {
		roots = append(roots, &pb.Root{Store: b.store, Prefix: long(511, i+1) + "/"})
	}
	// The properties are set last: each change of the collection reads them.
	b.wide = must[*pb.CreateCollectionResponse](t)(b.catalog.CreateCollection(ctx, &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Db: long(255, 1), Name: long(255, 98)}, Roots: roots, Channels: b.channels(),
		ConsistencyLevel: long(255, 0),
	})).GetCollection().GetId()
	b.children()
	for i := range 9 {
		must[*pb.CreateCollectionResponse](t)(b.catalog.CreateCollection(ctx, &pb.CreateCollectionRequest{
			Name: &pb.CollectionName{Db: long(255, 0), Name: long(255, i)}, Roots: roots, Channels: b.channels(),
			Schema:           &pb.Schema{Fields: fields, SchemaFormat: long(255, 0), SchemaRaw: make([]byte, 230<<10)},
			ConsistencyLevel: long(255, 0), Properties: pairs(50, 128, long(4096, 0)),
		}))
	}
	ref := byID(b.wide)
	must[*pb.UpdateCollectionResponse](t)(b.catalog.UpdateCollection(ctx, &pb.UpdateCollectionRequest{
		Collection: ref, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"properties"}},
		Properties: pairs(175, 128, long(4096, 0)),
	}))
	must[*pb.RenameCollectionResponse](t)(b.catalog.RenameCollection(ctx, &pb.RenameCollectionRequest{
		Collection: ref, NewName: &pb.CollectionName{Db: long(255, 1), Name: long(255, 99)},
	}))
	must[*pb.GetCollectionResponse](t)(b.catalog.GetCollection(ctx, &pb.GetCollectionRequest{Collection: ref}))
	list := pagesOf(t, "collections", func(token string) (proto.Message, []*pb.Collection, string) {
		page := must[*pb.ListCollectionsResponse](t)(b.catalog.ListCollections(ctx, &pb.ListCollectionsRequest{
			Db: long(255, 0), PageSize: 1000, PageToken: token,
		}))
		return page, page.GetCollections(), page.GetNextPageToken()
	})
	if len(list) != 9 {
		t.Errorf("%d collections listed", len(list))
	}

	var positions []*pb.ChannelPosition
	for i := range catalog.MaxChannels {
		positions = append(positions, &pb.ChannelPosition{
			Shard: int32(i), Position: &pb.Position{Timestamp: 1 << 63, Opaque: make([]byte, 1024)}, //nolint:gosec // few
		})
	}
	for _, id := range []int64{b.wide, b.many} {
		must[*pb.SetCheckpointsResponse](t)(b.catalog.SetCheckpoints(ctx,
			&pb.SetCheckpointsRequest{Collection: byID(id), Checkpoints: positions}))
	}
	must[*pb.ListCheckpointsResponse](t)(b.catalog.ListCheckpoints(ctx, &pb.ListCheckpointsRequest{Collection: ref}))
}

// children creates the maximum number of partitions and indexes, some of maximum size.
func (b *largeEnv) children() {
	t, ctx, ref := b.t, b.t.Context(), byID(b.wide)
	value := long(4096, 0)
	for i := range catalog.MaxPartitions {
		req := &pb.CreatePartitionRequest{Collection: ref, Name: long(255, i)}
		if i%50 == 0 {
			req.Attributes = pairs(64, 128, value)
		}
		must[*pb.CreatePartitionResponse](t)(b.catalog.CreatePartition(ctx, req))
	}
	for i := range catalog.MaxIndexes {
		req := &pb.CreateIndexRequest{Collection: ref, Name: long(255, i), FieldId: 1}
		if i%80 == 0 {
			req.TypeParams, req.IndexParams = pairs(64, 128, value), pairs(56, 128, value)
		}
		must[*pb.CreateIndexResponse](t)(b.catalog.CreateIndex(ctx, req))
	}

	partitions := pagesOf(t, "partitions", func(token string) (proto.Message, []*pb.Partition, string) {
		page := must[*pb.ListPartitionsResponse](t)(b.catalog.ListPartitions(ctx, &pb.ListPartitionsRequest{
			Collection: ref, PageSize: 1000, PageToken: token,
		}))
		if len(page.GetPartitions()) > 1000 {
			t.Errorf("a page of %d partitions", len(page.GetPartitions()))
		}
		return page, page.GetPartitions(), page.GetNextPageToken()
	})
	indexes := pagesOf(t, "indexes", func(token string) (proto.Message, []*pb.Index, string) {
		page := must[*pb.ListIndexesResponse](t)(b.catalog.ListIndexes(ctx,
			&pb.ListIndexesRequest{Collection: ref, PageSize: 1000, PageToken: token}))
		return page, page.GetIndexes(), page.GetNextPageToken()
	})
	b.wantNames("partitions", convertNames(partitions))
	b.wantNames("indexes", convertNames(indexes))

	// A caller that asks for no pages gets the elements that fit, and a note.
	var header metadata.MD
	whole := must[*pb.ListPartitionsResponse](t)(b.catalog.ListPartitions(ctx, &pb.ListPartitionsRequest{Collection: ref},
		grpc.Header(&header)))
	if len(header.Get("snapshotd-note")) != 1 || whole.GetNextPageToken() == "" || proto.Size(whole) < 3<<20 {
		t.Errorf("a page of %d bytes, notes %q", proto.Size(whole), header.Get("snapshotd-note"))
	}
	small := must[*pb.ListPartitionsResponse](t)(b.catalog.ListPartitions(ctx,
		&pb.ListPartitionsRequest{Collection: byID(b.many)}, grpc.Header(&header)))
	if len(header.Get("snapshotd-note")) != 0 || small.GetNextPageToken() != "" ||
		len(small.GetPartitions()) != catalog.MaxPartitions {
		t.Errorf("%d partitions, notes %q, want all without a note", len(small.GetPartitions()), header.Get("snapshotd-note"))
	}
	for _, bad := range []*pb.ListPartitionsRequest{
		{Collection: byID(b.many), PageToken: whole.GetNextPageToken()}, {Collection: ref, PageToken: "x"},
	} {
		if _, err := b.catalog.ListPartitions(ctx, bad); reason(err) != "INVALID_PAGE_TOKEN" {
			t.Errorf("a token of another request: %v", err)
		}
	}
	if _, err := b.catalog.ListIndexes(ctx,
		&pb.ListIndexesRequest{Collection: ref, PageToken: whole.GetNextPageToken()}); reason(err) != "INVALID_PAGE_TOKEN" {
		t.Errorf("another list's token: %v", err)
	}
}

func convertNames[T interface{ GetName() string }](list []T) []string {
	var names []string
	for _, x := range list {
		names = append(names, x.GetName())
	}
	return names
}

// wantNames checks that each of 1024 names is listed once, in order.
func (b *largeEnv) wantNames(elements string, names []string) {
	b.t.Helper()
	if len(names) != 1024 || !slices.IsSorted(names) || len(slices.Compact(names)) != 1024 {
		b.t.Errorf("%d %s, in order: %v", len(names), elements, slices.IsSorted(names))
	}
}

// segment registers a segment with the maximum number of files with paths of so many bytes.
func (b *largeEnv) segment(root int32, path int) *pb.Segment {
	t := b.t
	var created *pb.Segment
	low, high := 1, 4096 // numbers of files: accepted, refused
	for high-low > 40 {
		n := (low + high + 1) / 2
		id := b.ids(t, 1)
		dir := fmt.Sprintf("%d/0/%d/", b.wide, id)
		seg := &pb.Segment{Id: id, State: pb.Segment_STATE_FLUSHED, Rows: 1}
		for i := range n {
			seg.Files = append(seg.Files, &pb.File{
				Root: root, Path: dir + long(path-len(dir), i), Kind: long(64, 1), SizeBytes: 1 << 40, Entries: 1 << 60,
				FieldId: 1 << 60, LogId: 1 << 60,
				Etag: strconv.Itoa(i) + "-1", Checksum: &pb.Checksum{Type: long(32, 1), Value: make([]byte, 32)},
			})
		}
		_, err := b.tryAdd(t.Context(), &pb.AddSegmentsRequest{Collection: byID(b.wide), Segments: []*pb.Segment{seg}})
		switch reason(err) {
		case "":
			if err != nil {
				t.Fatal(err)
			}
			if created != nil {
				must[*pb.DropSegmentsResponse](t)(b.catalog.DropSegments(t.Context(), &pb.DropSegmentsRequest{
					Collection: byID(b.wide), SegmentIds: []int64{created.GetId()},
				}))
				b.lastDropped = append(b.lastDropped, created.GetId())
			}
			created, low = seg, n
		case "LIMIT_EXCEEDED", "MESSAGE_TOO_LARGE":
			high = n
		default:
			t.Fatal(err)
		}
	}
	t.Logf("a segment of %d files, %d bytes", len(created.GetFiles()), proto.Size(created))
	return created
}

func (b *largeEnv) segments() {
	t, ctx, ref := b.t, b.t.Context(), byID(b.wide)
	for _, s := range []struct {
		root int32
		path int
	}{{0, 512}, {1, 1022}, {1, 60}} {
		seg := b.segment(s.root, s.path)
		b.large = append(b.large, seg)
		// Updates add files up to the limit.
		for i := 0; ; i++ {
			update := &pb.SegmentUpdate{SegmentId: seg.GetId()}
			for n := range 8 {
				path := fmt.Sprintf("%d/0/%d/%s", b.wide, seg.GetId(), long(100, 8*i+n))
				update.AddFiles = append(update.AddFiles, &pb.File{Root: s.root, Path: path, Kind: "insert"})
			}
			_, err := b.catalog.UpdateSegments(ctx,
				&pb.UpdateSegmentsRequest{Collection: ref, Updates: []*pb.SegmentUpdate{update}})
			if reason(err) == "LIMIT_EXCEEDED" || reason(err) == "INVALID_REQUEST" {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		must[*pb.GetSegmentResponse](t)(b.catalog.GetSegment(ctx,
			&pb.GetSegmentRequest{Collection: ref, SegmentId: seg.GetId()}))
	}
	export, err := b.catalog.ExportSegments(ctx, &pb.ExportSegmentsRequest{Collection: ref})
	if err != nil {
		t.Fatal(err)
	}
	exported := 0
	for {
		msg, err := export.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		exported += len(msg.GetSegments())
	}
	if exported != len(b.large) {
		t.Errorf("%d segments exported", exported)
	}
	first := b.ids(t, 2)
	b.addSegments(t, ref, &pb.Segment{Id: first, State: pb.Segment_STATE_GROWING})
	must[*pb.CompactSegmentsResponse](t)(b.catalog.CompactSegments(ctx, &pb.CompactSegmentsRequest{
		Collection: ref, Inputs: []int64{first}, Outputs: []*pb.Segment{{Id: first + 1, State: pb.Segment_STATE_GROWING}},
	}))
}

func (b *largeEnv) describe() {
	t, ctx := b.t, b.t.Context()
	name := long(255, 0)
	snap := must[*pb.CreateSnapshotResponse](t)(b.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
		Collection: byID(b.wide), Name: name, Description: long(1024, 0), Labels: pairs(15, 63, long(200, 0)),
	})).GetSnapshot()
	must[*pb.GetSnapshotResponse](t)(b.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed(name)}))
	must[*pb.UpdateSnapshotResponse](t)(b.snapshots.UpdateSnapshot(ctx, &pb.UpdateSnapshotRequest{
		Snapshot: snapNamed(name), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description"}},
		Description: long(1024, 1),
	}))

	for _, size := range []int32{0, 1000} {
		req := &pb.DescribeSnapshotRequest{Snapshot: snapNamed(name), IncludeUsage: true, PageSize: size}
		var partitions, indexes []string
		manifests := 0
		for pages := 0; ; pages++ {
			var header metadata.MD
			page := must[*pb.DescribeSnapshotResponse](t)(b.snapshots.DescribeSnapshot(ctx, req, grpc.Header(&header)))
			if page.GetPartitionCount() != 1024 || page.GetIndexCount() != 1024 || page.GetManifestCount() == 0 {
				t.Errorf("page %d: %d partitions, %d indexes, %d manifests in all", pages, page.GetPartitionCount(),
					page.GetIndexCount(), page.GetManifestCount())
			}
			first := pages == 0
			if (page.GetSnapshot() != nil) != first || (page.GetCollection() != nil) != first ||
				(page.GetUsage() != nil) != first {
				t.Errorf("page %d has a snapshot: %v", pages, page.GetSnapshot() != nil)
			}
			if noted := len(header.Get("snapshotd-note")) > 0; noted != (first && size == 0) {
				t.Errorf("page %d of %d has a note: %v", pages, size, noted)
			}
			partitions = append(partitions, convertNames(page.GetPartitions())...)
			indexes = append(indexes, convertNames(page.GetIndexes())...)
			if manifests += len(page.GetManifests()); page.GetNextPageToken() == "" {
				if manifests != int(page.GetManifestCount()) {
					t.Errorf("%d manifests", manifests)
				}
				t.Logf("description: %d pages", pages+1)
				break
			}
			req.PageToken = page.GetNextPageToken()
		}
		b.wantNames("partitions of the snapshot", partitions)
		b.wantNames("indexes of the snapshot", indexes)
		req.Snapshot = snapID(snap.GetId())
		if _, err := b.snapshots.DescribeSnapshot(ctx, req); reason(err) != "INVALID_PAGE_TOKEN" {
			t.Errorf("a token of another request: %v", err)
		}
	}
	segments := pagesOf(t, "segments of the snapshot", func(token string) (proto.Message, []*pb.SnapshotSegment, string) {
		page := must[*pb.ListSnapshotSegmentsResponse](t)(b.snapshots.ListSnapshotSegments(ctx,
			&pb.ListSnapshotSegmentsRequest{
				Snapshot: snapNamed(name), View: pb.SegmentView_SEGMENT_VIEW_FILES, PageSize: 1000, PageToken: token,
			}))
		return page, page.GetSegments(), page.GetNextPageToken()
	})
	if len(segments) != len(b.large) {
		t.Errorf("%d segments listed", len(segments))
	}
}

func (b *largeEnv) manySnapshots() {
	t, ctx := b.t, b.t.Context()
	create := func(i int) string {
		name := long(255, 1000+i)
		must[*pb.CreateSnapshotResponse](t)(b.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
			Collection: byID(b.many), Name: name, Description: long(1024, 0), Labels: pairs(15, 63, long(200, 0)),
		}))
		return name
	}
	const snapshots = 400
	var want []string
	for i := range snapshots {
		want = append(want, create(i))
	}
	slices.Reverse(want) // the newest first
	pages := 0
	list := pagesOf(t, "snapshots", func(token string) (proto.Message, []*pb.Snapshot, string) {
		page := must[*pb.ListSnapshotsResponse](t)(b.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{
			Collection: byID(b.many), PageSize: 1000, PageToken: token,
		}))
		if pages++; pages == 1 {
			create(snapshots) // newer than the rest of the list
		}
		return page, page.GetSnapshots(), page.GetNextPageToken()
	})
	if !slices.Equal(convertNames(list), want) {
		t.Errorf("%d snapshots listed, want %d", len(list), len(want))
	}
	if bytes := len(list) * proto.Size(list[0]); bytes < grpcLimit {
		t.Errorf("the snapshots have %d bytes, less than the limit", bytes)
	}
	must[*pb.DropSnapshotResponse](t)(b.snapshots.DropSnapshot(ctx,
		&pb.DropSnapshotRequest{Snapshot: snapNamed(want[0]), DryRun: true}))
	must[*pb.DropSnapshotResponse](t)(b.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed(want[0])}))
}

func (b *largeEnv) pins() {
	t, ctx := b.t, b.t.Context()
	const perSnapshot = 1000 // the limit
	names := []string{long(255, 1000), long(255, 1001)}
	var pin *pb.Pin
	for _, name := range names {
		for range perSnapshot {
			pin = must[*pb.PinSnapshotResponse](t)(b.snapshots.PinSnapshot(ctx, &pb.PinSnapshotRequest{
				Snapshot: snapNamed(name), Owner: long(255, 0), Reason: long(256, 0), Ttl: durationpb.New(time.Hour),
			})).GetPin()
		}
	}
	list := pagesOf(t, "pins", func(token string) (proto.Message, []*pb.Pin, string) {
		page := must[*pb.ListPinsResponse](t)(b.snapshots.ListPins(ctx,
			&pb.ListPinsRequest{PageSize: 1000, PageToken: token}))
		return page, page.GetPins(), page.GetNextPageToken()
	})
	if len(list) != len(names)*perSnapshot {
		t.Errorf("%d pins listed", len(list))
	}
	ref := snapNamed(names[len(names)-1])
	must[*pb.RenewPinResponse](t)(b.snapshots.RenewPin(ctx, &pb.RenewPinRequest{Snapshot: ref, PinId: pin.GetId()}))
	if _, err := b.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: ref}); reason(err) != "SNAPSHOT_PINNED" {
		t.Errorf("a drop under a thousand pins: %v", err)
	}
	must[*pb.UnpinSnapshotResponse](t)(b.snapshots.UnpinSnapshot(ctx,
		&pb.UnpinSnapshotRequest{Snapshot: ref, PinId: pin.GetId()}))
}

func (b *largeEnv) restores() {
	t, ctx := b.t, b.t.Context()
	plan := must[*pb.RestoreSnapshotResponse](t)(b.snapshots.RestoreSnapshot(ctx, &pb.RestoreSnapshotRequest{
		Snapshot: snapNamed(long(255, 0)), Target: &pb.CollectionName{Db: long(255, 0), Name: long(255, 5)}, DryRun: true,
		Verify: true,
	})).GetPlan()
	if len(plan.GetMissing()) != 100 || len(plan.GetConflicts()) == 0 {
		t.Errorf("a plan with %d missing files, conflicts %.100q", len(plan.GetMissing()), plan.GetConflicts())
	}
	var partitions []string
	for i := range catalog.MaxPartitions {
		partitions = append(partitions, long(255, i))
	}
	const jobs = 17
	for i := range jobs {
		id := must[*pb.RestoreSnapshotResponse](t)(b.snapshots.RestoreSnapshot(ctx, &pb.RestoreSnapshotRequest{
			Snapshot: snapNamed(long(255, 1000)), Target: &pb.CollectionName{Db: long(255, 2), Name: long(255, i)},
			Partitions: partitions, Labels: pairs(4, 63, long(190, 0)),
		})).GetJobId()
		b.jobs = append(b.jobs, id)
		_, updateErr := b.snapshots.UpdateRestore(ctx,
			&pb.UpdateRestoreRequest{JobId: id, Limits: &pb.RestoreLimits{BytesPerSecond: 1 << 60}})
		if updateErr != nil && reason(updateErr) != "RESTORE_ENDED" { // a job without files may have ended
			t.Error(updateErr)
		}
		_, cancelErr := b.snapshots.CancelRestore(ctx, &pb.CancelRestoreRequest{JobId: id})
		if cancelErr != nil && reason(cancelErr) != "RESTORE_ENDED" {
			t.Error(cancelErr)
		}
	}
	if msgs := b.watchJob(t, b.jobs[0]); len(msgs[0].GetPartitions()) != catalog.MaxPartitions {
		t.Errorf("a job of %d partitions", len(msgs[0].GetPartitions()))
	}
	must[*pb.GetRestoreStateResponse](t)(b.snapshots.GetRestoreState(ctx, &pb.GetRestoreStateRequest{JobId: b.jobs[0]}))
	list := pagesOf(t, "jobs", func(token string) (proto.Message, []*pb.RestoreJob, string) {
		page := must[*pb.ListRestoreJobsResponse](t)(b.snapshots.ListRestoreJobs(ctx,
			&pb.ListRestoreJobsRequest{PageSize: 1000, PageToken: token}))
		return page, page.GetJobs(), page.GetNextPageToken()
	})
	if len(list) != jobs {
		t.Errorf("%d jobs listed", len(list))
	}
}

func (b *largeEnv) reclaim(c pb.ReclaimServiceClient) {
	t, ctx, ref := b.t, b.t.Context(), byID(b.wide)
	must[*pb.DropSegmentsResponse](t)(b.catalog.DropSegments(ctx,
		&pb.DropSegmentsRequest{Collection: ref, SegmentIds: []int64{b.large[0].GetId()}}))
	// The snapshot holds the first; the others were dropped before its creation.
	const units = 10_000
	req := &pb.CheckReferencesRequest{Collection: ref}
	for i := range units {
		id := b.large[0].GetId()
		if i%2 == 0 {
			id = b.lastDropped[i/2%len(b.lastDropped)]
		}
		req.Units = append(req.Units, segmentUnit(id))
	}
	if got := must[*pb.CheckReferencesResponse](t)(c.CheckReferences(ctx, req)); len(got.GetUnits()) != units {
		t.Errorf("%d units", len(got.GetUnits()))
	}
	results := must[*pb.ReclaimResponse](t)(c.Reclaim(ctx,
		&pb.ReclaimRequest{Collection: ref, Units: req.GetUnits(), Deleter: pb.Deleter_DELETER_CALLER}))
	if len(results.GetResults()) != units || results.GetResults()[0].GetOutcome() != pb.ReclaimResult_OUTCOME_GRANTED {
		t.Errorf("%d results, the first is %v", len(results.GetResults()), results.GetResults()[0])
	}
	tombstones := pagesOf(t, "tombstones", func(token string) (proto.Message, []*pb.Tombstone, string) {
		page := must[*pb.ListTombstonesResponse](t)(c.ListTombstones(ctx,
			&pb.ListTombstonesRequest{PageSize: 1000, PageToken: token}))
		return page, page.GetTombstones(), page.GetNextPageToken()
	})
	if len(tombstones) != len(b.lastDropped) {
		t.Errorf("%d tombstones, %d granted", len(tombstones), len(b.lastDropped))
	}
	for _, tomb := range tombstones {
		if int(tomb.GetFileCount()) != len(tomb.GetFiles()) || len(tomb.GetFiles()) == 0 {
			t.Errorf("%d files of %d", len(tomb.GetFiles()), tomb.GetFileCount())
		}
	}
	confirm := &pb.ConfirmReclaimedRequest{Collection: ref, TombstoneIds: []int64{tombstones[0].GetId()}}
	for i := int64(1); len(confirm.GetTombstoneIds()) < units; i++ {
		confirm.TombstoneIds = append(confirm.TombstoneIds, 1<<61+i)
	}
	must[*pb.ConfirmReclaimedResponse](t)(c.ConfirmReclaimed(ctx, confirm))
}

func (b *largeEnv) collector(c pb.CollectorServiceClient) {
	t, ctx := b.t, b.t.Context()
	// Dropped segments with all their files.
	for _, s := range []struct {
		root int32
		path int
	}{{0, 512}, {1, 1022}} {
		b.lastDropped = nil
		seg := b.segment(s.root, s.path)
		must[*pb.DropSegmentsResponse](t)(b.catalog.DropSegments(ctx,
			&pb.DropSegmentsRequest{Collection: byID(b.wide), SegmentIds: []int64{seg.GetId()}}))
	}
	items, _ := collect(t, c, &pb.CollectRequest{
		DryRun: true, Tolerance: durationpb.New(0), Collection: byID(b.wide),
		Force: true,
	})
	maxObjects := 0
	for _, item := range items {
		maxObjects = max(maxObjects, len(item.GetObjects()))
	}
	if maxObjects < 1000 {
		t.Errorf("%d items with at most %d objects", len(items), maxObjects)
	}
	must[*pb.GetCollectorStatusResponse](t)(c.GetCollectorStatus(ctx, &pb.GetCollectorStatusRequest{}))
	must[*pb.ExplainObjectResponse](t)(c.ExplainObject(ctx, &pb.ExplainObjectRequest{Store: b.store, Key: long(1024, 0)}))
	const orphans = 5000
	for i := range orphans {
		b.put(t, "r/"+long(1000, i), 1)
	}
	list, err := all(c.ListOrphans(ctx, &pb.ListOrphansRequest{Collection: byID(b.wide)}))
	if err != nil || len(list) < 2 {
		t.Errorf("orphans in %d messages, %v", len(list), err)
	}
	// All are too young.
	_, err = all(c.DeleteOrphans(ctx, &pb.DeleteOrphansRequest{
		Collection: byID(b.wide),
		Grace:      durationpb.New(time.Hour),
	}))
	if err != nil {
		t.Error(err)
	}
	must[*pb.RecoverResponse](t)(c.Recover(ctx, &pb.RecoverRequest{}))
}

// getKey reads records whose text is several times longer than the record.
func (b *largeEnv) getKey() {
	t, ctx := b.t, b.t.Context()
	col := must[*pb.CreateCollectionResponse](t)(b.catalog.CreateCollection(ctx, &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Name: "control"}, Roots: []*pb.Root{{Prefix: "control/"}},
		Properties: pairs(180, 128, strings.Repeat("\x01", 4096)),
	})).GetCollection()
	for _, key := range []string{
		fmt.Sprintf("/catalog/collection/%d", col.GetId()), fmt.Sprintf("/catalog/segment/%d/%d", b.wide, b.large[1].GetId()),
	} {
		req, text := &pb.GetKeyRequest{Key: key}, ""
		for pages := 1; ; pages++ {
			page := must[*pb.GetKeyResponse](t)(b.admin.GetKey(ctx, req))
			if text += page.GetJson(); page.GetNextPageToken() == "" {
				t.Logf("%s: %d bytes in %d pages", key, len(text), pages)
				break
			}
			req.PageToken = page.GetNextPageToken()
		}
		if !strings.HasPrefix(text, "{") || !strings.HasSuffix(text, "}") || len(text) < 1<<18 {
			t.Errorf("%s has %d bytes of %.40q", key, len(text), text)
		}
		if req.PageToken != "" {
			req.Key = "/format"
			if _, err := b.admin.GetKey(ctx, req); reason(err) != "INVALID_PAGE_TOKEN" {
				t.Errorf("another key's token: %v", err)
			}
		}
	}
	// All pages are of the same revision of the record.
	req := &pb.GetKeyRequest{Key: fmt.Sprintf("/catalog/collection/%d", col.GetId())}
	first := must[*pb.GetKeyResponse](t)(b.admin.GetKey(ctx, req))
	must[*pb.UpdateCollectionResponse](t)(b.catalog.UpdateCollection(ctx, &pb.UpdateCollectionRequest{
		Collection: byID(col.GetId()), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"properties"}},
	}))
	req.PageToken = first.GetNextPageToken()
	second := must[*pb.GetKeyResponse](t)(b.admin.GetKey(ctx, req))
	if second.GetModRevision() != first.GetModRevision() || !strings.HasSuffix(second.GetJson(), "}") {
		t.Errorf("pages of revisions %d and %d", first.GetModRevision(), second.GetModRevision())
	}
}

// watch reads all events of the restores.
func (b *largeEnv) watch(token string) {
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	stream, err := b.events.WatchEvents(ctx, &pb.WatchEventsRequest{ResumeToken: token})
	if err != nil {
		b.t.Fatal(err)
	}
	for restores := map[int64]bool{}; len(restores) < len(b.jobs); {
		msg := must[*pb.WatchEventsResponse](b.t)(stream.Recv())
		if job := msg.GetRestore().GetJob(); job != nil {
			restores[job.GetId()] = true
		}
	}
}

// TestErrorsFitIntoTrailers has errors with the longest names and texts. An error is sent
// in trailers, of which gRPC clients in Java, C and Python accept 8 KiB by default.
func TestErrorsFitIntoTrailers(t *testing.T) {
	const limit = 7 << 10
	e := newEnv(t)
	ctx := t.Context()
	e.collection(t, "c")
	e.snapshot(t, "s")
	for range 20 {
		must[*pb.PinSnapshotResponse](t)(e.snapshots.PinSnapshot(ctx, &pb.PinSnapshotRequest{
			Snapshot: snapNamed("s"), Owner: strings.Repeat("é", 127), Reason: strings.Repeat("é", 128),
		}))
	}
	ids := make([]int64, 9_000)
	long := strings.Repeat("é", 1<<20)
	labels := map[string]string{}
	for i := range 30 {
		labels[fmt.Sprintf("é%d%s", i, strings.Repeat("%", 40<<10))] = strings.Repeat("v", 300)
	}
	for name, call := range map[string]func(...grpc.CallOption) error{
		"a drop under pins": func(o ...grpc.CallOption) error {
			_, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}, o...)
			return err
		},
		"a long key of a map": func(o ...grpc.CallOption) error {
			_, err := e.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
				Collection: byName("c"), Name: "x", Labels: map[string]string{long: ""},
			}, o...)
			return err
		},
		"long keys of a map": func(o ...grpc.CallOption) error {
			_, err := e.snapshots.CreateSnapshot(ctx,
				&pb.CreateSnapshotRequest{Collection: byName("c"), Name: "x", Labels: labels}, o...)
			return err
		},
		"many violations": func(o ...grpc.CallOption) error {
			_, err := e.catalog.DropSegments(ctx, &pb.DropSegmentsRequest{Collection: byName("c"), SegmentIds: ids}, o...)
			return err
		},
		"a long key": func(o ...grpc.CallOption) error {
			_, err := e.admin.GetKey(ctx, &pb.GetKeyRequest{Key: "/" + strings.Repeat("é", 511)}, o...)
			return err
		},
	} {
		var header, trailer metadata.MD
		err := call(grpc.Header(&header), grpc.Trailer(&trailer))
		if reason(err) == "" {
			t.Errorf("%s: no reason: %.200v", name, err)
		}
		if len(fields(err)) == 0 && status.Code(err) == codes.InvalidArgument {
			t.Errorf("%s: no field", name)
		}
		// gRPC removes its own entries from the trailer.
		st := status.Convert(err)
		encoded, marshalErr := proto.Marshal(st.Proto())
		if marshalErr != nil {
			t.Fatal(marshalErr)
		}
		size := base64.StdEncoding.EncodedLen(len(encoded))
		for _, b := range []byte(st.Message()) {
			if size++; b < ' ' || b > '~' || b == '%' {
				size += 2
			}
		}
		for _, md := range []metadata.MD{header, trailer} {
			for k, values := range md {
				if k == "grpc-status-details-bin" {
					continue
				}
				for _, v := range values {
					size += len(k) + len(v) + 32
				}
			}
		}
		if size > limit {
			t.Errorf("%s: %d bytes of trailers", name, size)
		}
	}
}
