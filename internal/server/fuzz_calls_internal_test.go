package server

import (
	"context"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/inspect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	memkv "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	memobject "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// Bounds on one input.
const (
	maxCalls    = 24
	callTimeout = 20 * time.Second // of virtual time
)

// method is a method of the API.
type method struct {
	name   string // full
	input  protoreflect.MessageType
	unary  *grpc.MethodDesc
	stream *grpc.StreamDesc
}

var services = []*grpc.ServiceDesc{
	&pb.SnapshotService_ServiceDesc, &pb.CatalogService_ServiceDesc, &pb.EventService_ServiceDesc,
	&pb.ReclaimService_ServiceDesc, &pb.CollectorService_ServiceDesc, &pb.AdminService_ServiceDesc,
}

// methods returns all methods of the API, sorted by name.
func methods(t testing.TB) []method {
	t.Helper()
	var list []method
	for _, s := range services {
		for i := range s.Methods {
			list = append(list, method{name: "/" + s.ServiceName + "/" + s.Methods[i].MethodName, unary: &s.Methods[i]})
		}
		for i := range s.Streams {
			list = append(list, method{name: "/" + s.ServiceName + "/" + s.Streams[i].StreamName, stream: &s.Streams[i]})
		}
	}
	for i := range list {
		full := protoreflect.FullName(strings.ReplaceAll(strings.TrimPrefix(list[i].name, "/"), "/", "."))
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(full)
		if err != nil {
			t.Fatal(err)
		}
		if list[i].input, err = protoregistry.GlobalTypes.FindMessageByName(
			d.(protoreflect.MethodDescriptor).Input().FullName()); err != nil {
			t.Fatal(err)
		}
	}
	slices.SortFunc(list, func(a, b method) int { return strings.Compare(a.name, b.name) })
	return list
}

// FuzzCalls makes a sequence of calls to a server over stores in memory, in virtual time;
// the input selects the calls and their fields. No call panics or returns Internal, each
// error is in the errorTable, and all records stay readable.
func FuzzCalls(f *testing.F) {
	list := methods(f)
	for i := range list {
		f.Add([]byte{byte(i)})
		for fill := range byte(1 + i%2) { // different fields
			f.Add(slices.Concat([]byte{byte(i)}, slices.Repeat([]byte{1 + 2*fill, 5 + fill, 9, 3, 14 + fill, 7, 21, 2}, 12)))
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 16 {
		long := make([]byte, 400)
		for i := range long {
			long[i] = byte(r.Uint32())
		}
		f.Add(long)
	}
	validator := sync.OnceValues(newValidator)
	if _, err := validator(); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, input []byte) {
		if len(input) > 4096 {
			return
		}
		virtual.Test(t, func(t *testing.T) {
			v, err := validator()
			if err != nil {
				t.Fatal(err)
			}
			w := newCaller(t, &Server{log: zap.NewNop(), validator: v, stopping: t.Context()})
			w.prepare(list)
			from := &source{rest: input}
			for n := 0; len(from.rest) > 0 && n < maxCalls; n++ {
				m := &list[int(from.byte())%len(list)]
				msgs := []proto.Message{w.message(m.input, from)}
				for m.stream != nil && m.stream.ClientStreams && from.byte()%3 == 1 {
					msgs = append(msgs, w.message(m.input, from))
				}
				_, _ = w.call(m, msgs...) // call checks the error
			}
			w.check()
		})
	})
}

// TestValidCalls makes the valid calls that FuzzCalls varies.
func TestValidCalls(t *testing.T) {
	v, err := newValidator()
	if err != nil {
		t.Fatal(err)
	}
	list := methods(t)
	virtual.Test(t, func(t *testing.T) {
		w := newCaller(t, &Server{log: zap.NewNop(), validator: v, stopping: t.Context()})
		w.prepare(list)
		for i := range list {
			if name := list[i].input.Descriptor().Name(); slices.Contains(w.harmless, name) {
				if _, err := w.call(&list[i], w.valid[name]); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
		w.check()
	})
}

// caller makes calls, and remembers the ids and names in the responses for later calls.
type caller struct {
	t      *testing.T
	server *Server
	kv     *memkv.Store
	impl   map[string]any // by service
	store  object.Store
	valid  map[protoreflect.Name]proto.Message // valid requests
	// harmless are the valid requests that do not depend on each other's order.
	harmless []protoreflect.Name
	ids      []int64
	texts    []string
}

// newCaller starts a server with stores in memory until the end of the test.
func newCaller(t *testing.T, s *Server) *caller {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	kv, store := memkv.New(memkv.Options{Now: time.Now}), memobject.New(memobject.Options{Now: time.Now})
	random := rand.NewChaCha8([32]byte{}) // equal for each input
	objects := map[string]object.Store{"default": store}
	c, err := cluster.Open(ctx, kv, cluster.Options{Release: "test", Now: time.Now, Rand: random})
	if err != nil {
		t.Fatal(err)
	}
	locked := &lockedReader{r: random}
	requests := request.NewLeases(kv, time.Now, nil)
	age := epoch.New(epoch.Options{KV: kv, Store: store, Cluster: c.ID, Now: time.Now, Rand: locked})
	cat := catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Rand: locked, Requests: requests, RaiseIDs: age.RaiseIDLimit,
		HasStore: func(alias string) bool { return objects[alias] != nil }, ReadSpilled: catalog.ReadSpilled(objects),
	})
	r, err := replica.New(replica.Options{Shared: replica.Shared{
		KV: kv, Catalog: cat, Stores: objects, SnapshotStore: "default", Requests: requests, Epoch: age,
		Replica: "r1", Now: time.Now, Rand: locked, Log: zap.NewNop(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	m := manager.New(manager.Options{
		Shared: r.Shared, Snapshots: r.Snapshots, GC: r.GC, Collector: r.Collector, Jobs: r.Jobs,
		Cluster: c, Release: "test",
	})
	ran := make(chan error, 1)
	go func() { ran <- r.Run(ctx, m) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ran; err != nil {
			t.Error(err)
		}
	})
	virtual.Wait()
	s.manager = m
	tokens := pageTokenCodec{c.TokenKey}
	return &caller{
		t: t, server: s, kv: kv, store: store,
		impl: map[string]any{
			pb.SnapshotService_ServiceDesc.ServiceName: &snapshots{manager: m, jobs: r.Jobs, tokens: tokens},
			pb.CatalogService_ServiceDesc.ServiceName: &catalogs{
				catalog: cat, tokens: tokens,
				exports: make(slots, maxExports),
			},
			pb.EventService_ServiceDesc.ServiceName:   &events{manager: m, catalog: cat, tokens: tokens},
			pb.ReclaimService_ServiceDesc.ServiceName: &reclaims{manager: m, gc: r.GC, catalog: cat, tokens: tokens},
			pb.CollectorService_ServiceDesc.ServiceName: &collectors{
				manager: m, gc: r.GC, collector: r.Collector, snapshotStore: "default",
			},
			pb.AdminService_ServiceDesc.ServiceName: &admin{
				manager: m, cluster: c, kv: kv, version: "v1", replica: "r1", stores: []string{"default"}, snapshotStore: "default",
			},
		},
		ids: []int64{
			0, 1, -1, math.MaxInt64, math.MinInt64, 1000, math.MaxInt32, math.MaxUint32, 100, 315_576_000_000,
			253_402_300_799, -62_135_596_800,
		},
		texts: []string{
			"", "docs", "default", "s1", "other", "p0", "x0", "-", "data/docs/", "7/0", "7/1", "data/docs/7/0", "insert",
			"index", strings.Repeat("x", 255), strings.Repeat("y", 3000),
			"properties", "attributes", "consistency_level", "labels", "description", "expire_time", "expiration", "ttl", "*",
			"/", "../x", "a\x00b", "é\u2028", "/catalog/segment/1/1", "/format", "gc/epoch/", "snapshots/", "CRC32C", "key=",
			"0123456789abcdef0123456789abcdef",
		},
	}
}

// lockedReader is a source of random bytes for several goroutines.
type lockedReader struct {
	mu sync.Mutex
	r  io.Reader
}

func (l *lockedReader) Read(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.r.Read(p)
}

// prepare creates a collection with segments, a snapshot of it with a pin, a dropped and
// requested segment, and a restore, and sets a valid request for every method.
func (w *caller) prepare(list []method) {
	w.t.Helper()
	docs := &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: "docs"}}}
	s1 := &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: "s1"}}
	other := &pb.CollectionName{Name: "other"}
	file := func(path string, kind string) *pb.File {
		if _, err := w.store.Put(w.t.Context(), "data/docs/"+path, []byte("content")); err != nil {
			w.t.Fatal(err)
		}
		return &pb.File{Path: path, Kind: kind, SizeBytes: 7, Entries: 7, FieldId: 100, MinTimestamp: 5, MaxTimestamp: 9}
	}
	sealed := func(i int64) *pb.Segment {
		return &pb.Segment{
			Id: i, State: pb.Segment_STATE_SEALED, Rows: 7, StartPosition: &pb.Position{Timestamp: 5},
			DmlPosition: &pb.Position{Timestamp: 10},
			Files:       []*pb.File{file(fmt.Sprintf("%d/a", i), segment.KindInsert)},
		}
	}
	checkpoint := []*pb.ChannelPosition{{Position: &pb.Position{Timestamp: 20}}}
	w.valid = map[protoreflect.Name]proto.Message{}
	must := func(name string, msg proto.Message) proto.Message {
		w.t.Helper()
		i := slices.IndexFunc(list, func(m method) bool { return strings.HasSuffix(m.name, "/"+name) })
		resp, err := w.call(&list[i], msg)
		if err != nil {
			w.t.Fatalf("%s: %v", name, err)
		}
		w.valid[msg.ProtoReflect().Descriptor().Name()] = msg
		return resp
	}
	first := must("AllocateIds",
		&pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: 9}}).(*pb.AllocateIdsResponse).GetIds().GetFirst()
	var segments []*pb.Segment
	for i := range int64(9) {
		w.ids = append(w.ids, first+i)
		if i < 4 {
			segments = append(segments, sealed(first+i))
		}
	}
	segments[1].IndexBuilds = []*pb.IndexBuild{{
		Id: first + 6, FieldId: 100,
		Files: []*pb.File{file(fmt.Sprintf("%d/b", first+6), segment.KindIndex)},
	}}

	must("CreateCollection", &pb.CreateCollectionRequest{
		Name: docs.GetName(), Roots: []*pb.Root{{Store: "default", Prefix: "data/docs/"}}, Channels: []string{"a"},
		Schema:     &pb.Schema{Fields: []*pb.Field{{Id: 100, Name: "id", DataType: "Int64", PrimaryKey: true}}},
		Properties: map[string]string{"a": "b"},
	})
	must("CreatePartition", &pb.CreatePartitionRequest{Collection: docs, Name: "p0"})
	x := must("CreateIndex", &pb.CreateIndexRequest{Collection: docs, Name: "x0", FieldId: 100}).(*pb.CreateIndexResponse)
	segments[1].IndexBuilds[0].IndexId = x.GetIndex().GetId()
	must("AddSegments", &pb.AddSegmentsRequest{Collection: docs, Segments: segments})
	must("SetCheckpoints", &pb.SetCheckpointsRequest{Collection: docs, Checkpoints: checkpoint})
	must("UpdateSegments", &pb.UpdateSegmentsRequest{
		Collection: docs,
		Updates:    []*pb.SegmentUpdate{{SegmentId: first, State: pb.Segment_STATE_FLUSHED}},
	})
	must("CreateSnapshot", &pb.CreateSnapshotRequest{Collection: docs, Name: "s1", Labels: map[string]string{"a": "b"}})
	pin := must("PinSnapshot", &pb.PinSnapshotRequest{
		Snapshot: s1, Owner: "o",
		Ttl: durationpb.New(time.Hour),
	}).(*pb.PinSnapshotResponse).GetPin().GetId()
	must("DropSegments", &pb.DropSegmentsRequest{Collection: docs, SegmentIds: []int64{first}})
	must("CompactSegments", &pb.CompactSegmentsRequest{
		Collection: docs, Inputs: []int64{first + 2},
		Outputs: []*pb.Segment{sealed(first + 4)},
	})
	units := []*pb.Unit{
		{Unit: &pb.Unit_SegmentId{SegmentId: first}},
		{Unit: &pb.Unit_IndexBuildId{IndexBuildId: first + 6}},
	}
	must("Reclaim", &pb.ReclaimRequest{Collection: docs, Units: units, Deleter: pb.Deleter_DELETER_CALLER})
	job := must("RestoreSnapshot", &pb.RestoreSnapshotRequest{
		Snapshot: s1,
		Target:   other,
	}).(*pb.RestoreSnapshotResponse).GetJobId()
	// Requests that read or add.
	for _, msg := range []proto.Message{
		&pb.CreateCollectionRequest{
			Name:  &pb.CollectionName{Name: "third"},
			Roots: []*pb.Root{{Store: "default", Prefix: "data/third/"}},
		},
		&pb.CreatePartitionRequest{Collection: docs, Name: "p1"},
		&pb.CreateIndexRequest{Collection: docs, Name: "x1", FieldId: 100},
		&pb.CreateSnapshotRequest{Collection: docs, Name: "s2"},
		&pb.AddSegmentsRequest{Collection: docs, Segments: []*pb.Segment{sealed(first + 7)}},
		&pb.UpdateSegmentsRequest{
			Collection: docs,
			Updates:    []*pb.SegmentUpdate{{SegmentId: first + 4, State: pb.Segment_STATE_FLUSHED}},
		},
		&pb.CompactSegmentsRequest{Collection: docs, Inputs: []int64{first + 3}, Outputs: []*pb.Segment{sealed(first + 5)}},
		&pb.RestoreSnapshotRequest{Snapshot: s1, Target: &pb.CollectionName{Name: "fourth"}},
		&pb.CheckReferencesRequest{Collection: docs, Units: units},
		&pb.ConfirmReclaimedRequest{Collection: docs, TombstoneIds: []int64{first}},
		&pb.ListTombstonesRequest{Collection: docs},
		&pb.RenewPinRequest{Snapshot: s1, PinId: pin, Ttl: durationpb.New(2 * time.Hour)},
		&pb.GetSnapshotRequest{Snapshot: s1},
		&pb.DescribeSnapshotRequest{Snapshot: s1, IncludeUsage: true},
		&pb.ListSnapshotSegmentsRequest{Snapshot: s1, View: pb.SegmentView_SEGMENT_VIEW_FILES, PageSize: 1},
		&pb.ListSnapshotsRequest{Collection: docs, PageSize: 1},
		&pb.ListPinsRequest{Snapshot: s1, PageSize: 1},
		&pb.UpdateSnapshotRequest{
			Snapshot: s1, Description: "d",
			UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"description"}},
		},
		&pb.GetRestoreStateRequest{JobId: job},
		&pb.ListRestoreJobsRequest{PageSize: 1},
		&pb.GetCollectionRequest{Collection: docs},
		&pb.ListCollectionsRequest{PageSize: 1},
		&pb.UpdateCollectionRequest{
			Collection: docs, UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"properties"}},
			Properties: map[string]string{"c": "d"},
		},
		&pb.ListPartitionsRequest{Collection: docs},
		&pb.ListIndexesRequest{Collection: docs},
		&pb.GetSegmentRequest{Collection: docs, SegmentId: first + 1},
		&pb.ExportSegmentsRequest{Collection: docs},
		&pb.ListCheckpointsRequest{Collection: docs},
		&pb.CollectRequest{DryRun: true, Tolerance: durationpb.New(0)},
		&pb.GetCollectorStatusRequest{},
		&pb.ExplainObjectRequest{Key: segments[1].GetFiles()[0].GetPath()},
		&pb.ListOrphansRequest{Collection: docs},
		&pb.RecoverRequest{},
		&pb.GetServerInfoRequest{},
		&pb.GetKeyRequest{Key: "/format"},
		&pb.ProbeStoreRequest{},
	} {
		w.valid[msg.ProtoReflect().Descriptor().Name()] = msg
		w.harmless = append(w.harmless, msg.ProtoReflect().Descriptor().Name())
	}
	// Requests that remove records of the others, or do not end.
	for _, msg := range []proto.Message{
		&pb.DropSnapshotRequest{Snapshot: s1}, &pb.UnpinSnapshotRequest{Snapshot: s1, PinId: pin},
		&pb.CancelRestoreRequest{JobId: job}, &pb.WatchRestoreRequest{JobId: job},
		&pb.UpdateRestoreRequest{JobId: job, Limits: &pb.RestoreLimits{RequestsPerSecond: 1000}},
		&pb.RenameCollectionRequest{Collection: docs, NewName: &pb.CollectionName{Name: "renamed"}},
		&pb.DropCollectionRequest{Collection: docs},
		&pb.DropPartitionRequest{Collection: docs, Name: "p0"}, &pb.DropIndexRequest{Collection: docs, Name: "x0"},
		&pb.DeleteOrphansRequest{Collection: docs, Grace: durationpb.New(time.Hour)},
		&pb.WatchEventsRequest{Collection: docs},
	} {
		w.valid[msg.ProtoReflect().Descriptor().Name()] = msg
	}
	for _, m := range list {
		if w.valid[m.input.Descriptor().Name()] == nil {
			w.t.Fatalf("%s: no valid request", m.name)
		}
	}
}

// call makes a call as gRPC does, and checks the response, which is nil for a stream.
func (w *caller) call(m *method, msgs ...proto.Message) (proto.Message, error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	ctx, _ = newCall(ctx)
	service := w.impl[strings.Split(m.name, "/")[1]]
	var err error
	var answer proto.Message
	if m.unary != nil {
		decode := func(into any) error { proto.Merge(into.(proto.Message), msgs[0]); return nil }
		var resp any
		if resp, err = m.unary.Handler(service, ctx, decode, w.server.unary); err == nil {
			answer = resp.(proto.Message)
			w.learn(m, answer)
		}
	} else {
		stream := &fuzzedStream{caller: w, method: m, msgs: msgs}
		stream.ctx = ctx
		err = w.server.stream(service, stream,
			&grpc.StreamServerInfo{
				FullMethod: m.name, IsClientStream: m.stream.ClientStreams,
				IsServerStream: m.stream.ServerStreams,
			}, m.stream.Handler)
	}
	if err != nil {
		w.checkError(m, msgs, err)
	}
	return answer, err
}

// fuzzedStream is the server's end of a stream that receives msgs.
type fuzzedStream struct {
	fakeStream
	caller *caller
	method *method

	mu   sync.Mutex
	msgs []proto.Message
}

func (s *fuzzedStream) RecvMsg(into any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.msgs) == 0 {
		return io.EOF
	}
	proto.Merge(into.(proto.Message), s.msgs[0])
	s.msgs = s.msgs[1:]
	return nil
}

func (s *fuzzedStream) SendMsg(m any) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.caller.learn(s.method, m.(proto.Message))
	return nil
}

// learn checks that a message can be sent, and remembers its ids and names.
func (w *caller) learn(m *method, msg proto.Message) {
	data, err := proto.Marshal(msg)
	if err != nil {
		w.t.Errorf("%s: the response cannot be sent: %v", m.name, err)
	}
	if len(data) > maxSend {
		w.t.Errorf("%s: a response of %d bytes", m.name, len(data))
	}
	w.remember(msg.ProtoReflect())
}

func (w *caller) remember(m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() { // Range has no order
		f := fields.Get(i)
		if !m.Has(f) || f.IsMap() {
			continue
		}
		if !f.IsList() {
			w.rememberValue(f, m.Get(f))
			continue
		}
		for j := range min(m.Get(f).List().Len(), 4) {
			w.rememberValue(f, m.Get(f).List().Get(j))
		}
	}
}

func (w *caller) rememberValue(f protoreflect.FieldDescriptor, v protoreflect.Value) {
	switch f.Kind() { //nolint:exhaustive // other kinds hold no names
	case protoreflect.MessageKind:
		w.remember(v.Message())
	case protoreflect.Int64Kind:
		if len(w.ids) < 200 && !slices.Contains(w.ids, v.Int()) {
			w.ids = append(w.ids, v.Int())
		}
	case protoreflect.StringKind:
		if len(w.texts) < 200 && !slices.Contains(w.texts, v.String()) {
			w.texts = append(w.texts, v.String())
		}
	}
}

// checkError fails for an error of the server or of its stores, which have no faults.
func (w *caller) checkError(m *method, msgs []proto.Message, err error) {
	st := status.Convert(err)
	var reason string
	for _, d := range st.Details() {
		if info, ok := d.(*errdetails.ErrorInfo); ok && info.GetDomain() == domain {
			reason = info.GetReason()
		}
	}
	known := reason == "INVALID_REQUEST" ||
		slices.ContainsFunc(errorTable, func(c errorRow) bool { return c.reason == reason && c.code == st.Code() })
	bad := !known
	switch st.Code() { //nolint:exhaustive // other codes are errors of the caller
	case codes.OK, codes.Internal, codes.Unknown, codes.DataLoss, codes.Unimplemented,
		codes.Unauthenticated, codes.PermissionDenied:
		bad = true
	case codes.Unavailable:
		bad = bad || reason != "REFERENCES_LOADING"
	}
	if _, err := proto.Marshal(st.Proto()); err != nil {
		w.t.Errorf("%s: the error cannot be sent: %v", m.name, err)
	}
	if bad {
		var cause error
		if a, ok := err.(*statusError); ok { //nolint:errorlint // the result of toStatusError
			cause = a.cause
		}
		w.t.Errorf("%s: %v %s %q, of %v\nfor %v", m.name, st.Code(), reason, st.Message(), cause, msgs)
	}
}

// check reads all records.
func (w *caller) check() {
	w.t.Helper()
	ctx := w.t.Context()
	from, to := keys.All()
	res, err := w.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.GetRange(from, to)}})
	if err != nil {
		w.t.Fatal(err)
	}
	for _, kv := range res.Ranges[0] {
		if strings.HasPrefix(kv.Key, "/store/") { // an id
			continue
		}
		if kind, text := inspect.Describe(kv); kind == "" {
			w.t.Errorf("%s holds %s, not a record", kv.Key, text)
		}
	}
}

// source selects the calls and values. After its end it returns zeros.
type source struct{ rest []byte }

func (s *source) byte() byte {
	if len(s.rest) == 0 {
		return 0
	}
	b := s.rest[0]
	s.rest = s.rest[1:]
	return b
}

// message returns a message of type m: a changed valid one, one filled field by field, or
// one decoded from random bytes.
func (w *caller) message(m protoreflect.MessageType, from *source) proto.Message {
	msg := m.New()
	switch b := from.byte() % 16; {
	case b < 12:
		sound := proto.Clone(w.valid[m.Descriptor().Name()])
		for range b % 4 {
			w.vary(sound.ProtoReflect(), from, 4)
		}
		return sound
	case b == 15:
		n := min(int(from.byte()), len(from.rest))
		if proto.Unmarshal(from.rest[:n], msg.Interface()) == nil {
			from.rest = from.rest[n:]
			return msg.Interface()
		}
		msg = m.New() // gRPC refuses it
	}
	w.fill(msg, from, 5)
	return msg.Interface()
}

func (w *caller) fill(m protoreflect.Message, from *source, depth int) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		if b := int(from.byte()); b%3 != 0 {
			w.set(m, fields.Get(i), 1+b/3%3, from, depth)
		}
	}
}

// set sets a field; a list or map gets n more elements.
func (w *caller) set(m protoreflect.Message, f protoreflect.FieldDescriptor, n int, from *source, depth int) {
	switch {
	case f.IsMap():
		for range n {
			m.Mutable(f).Map().Set(w.scalar(f.MapKey(), from).MapKey(), w.scalar(f.MapValue(), from))
		}
	case f.IsList():
		for range n {
			if f.Kind() != protoreflect.MessageKind {
				m.Mutable(f).List().Append(w.scalar(f, from))
			} else if depth > 0 {
				w.fill(m.Mutable(f).List().AppendMutable().Message(), from, depth-1)
			}
		}
	case f.Kind() == protoreflect.MessageKind:
		if depth > 0 {
			w.fill(m.Mutable(f).Message(), from, depth-1)
		}
	default:
		m.Set(f, w.scalar(f, from))
	}
}

// vary changes a field of a message or of a nested one.
func (w *caller) vary(m protoreflect.Message, from *source, depth int) {
	fields := m.Descriptor().Fields()
	if fields.Len() == 0 {
		return
	}
	f, b := fields.Get(int(from.byte())%fields.Len()), from.byte()
	switch {
	case b%8 == 0:
		m.Clear(f)
	case b%8 < 5 && m.Has(f) && f.Kind() == protoreflect.MessageKind && f.IsList():
		w.vary(m.Mutable(f).List().Get(int(b)%m.Get(f).List().Len()).Message(), from, depth-1)
	case b%8 < 5 && m.Has(f) && f.Kind() == protoreflect.MessageKind && !f.IsMap():
		w.vary(m.Mutable(f).Message(), from, depth-1)
	default:
		w.set(m, f, 1, from, depth)
	}
}

// scalar returns a value, mostly a known id or name.
func (w *caller) scalar(f protoreflect.FieldDescriptor, from *source) protoreflect.Value {
	b := int(from.byte())
	number := w.ids[b%len(w.ids)]
	if b >= 200 {
		number = int64(from.byte())
	}
	switch f.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(b%2 == 1)
	case protoreflect.EnumKind:
		values := f.Enum().Values()
		if b%16 == 15 {
			return protoreflect.ValueOfEnum(protoreflect.EnumNumber(b - 100))
		}
		return protoreflect.ValueOfEnum(values.Get(b % values.Len()).Number())
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind:
		return protoreflect.ValueOfInt32(int32(number)) //nolint:gosec // any value
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind:
		return protoreflect.ValueOfUint32(uint32(number)) //nolint:gosec // any value
	case protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return protoreflect.ValueOfInt64(number)
	case protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return protoreflect.ValueOfUint64(uint64(number)) //nolint:gosec // any value
	case protoreflect.FloatKind:
		return protoreflect.ValueOfFloat32(float32(number))
	case protoreflect.DoubleKind:
		return protoreflect.ValueOfFloat64([]float64{0, 1, -1, math.NaN(), math.Inf(1), 0.5, float64(number)}[b%7])
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte(w.texts[b%len(w.texts)]))
	default:
		return protoreflect.ValueOfString(w.texts[b%len(w.texts)])
	}
}
