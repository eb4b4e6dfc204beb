package server_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
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

// panicKey is a key whose read panics, like an error in a handler.
const panicKey = "/panic"

// store is a store in memory that can panic or be down.
type store struct {
	*memkv.Store
	down atomic.Bool
}

func (s *store) Get(ctx context.Context, key string) (meta.KeyValue, bool, int64, error) {
	if key == panicKey {
		panic("handler error")
	}
	if s.down.Load() {
		return meta.KeyValue{}, false, 0, fmt.Errorf("%w: dial 10.9.8.7", meta.ErrUnavailable)
	}
	return s.Store.Get(ctx, key)
}

// env is a server with its stores in memory, and clients.
type env struct {
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

// newEnv starts a server with the store "default" and further ones under aliases.
func newEnv(t *testing.T, aliases ...string) *env {
	t.Helper()
	core, logs := observer.New(zap.DebugLevel)
	log := zap.New(core)
	e := &env{kv: &store{Store: memkv.New(memkv.Options{})}, logs: logs, registry: prometheus.NewRegistry()}
	e.objects = object.NewFaulty(memobject.New(memobject.Options{}))
	objects := map[string]object.Store{"default": e.objects}
	for _, alias := range aliases {
		objects[alias] = memobject.New(memobject.Options{})
	}
	c, err := cluster.Open(t.Context(), e.kv, cluster.Options{Release: "test", Now: time.Now, Rand: rand.Reader})
	if err != nil {
		t.Fatal(err)
	}
	requests := request.NewLeases(e.kv, time.Now, nil)
	history := epoch.New(epoch.Options{KV: e.kv, Store: e.objects, Cluster: c.ID, Now: time.Now, Rand: rand.Reader})
	cat := catalog.New(catalog.Options{
		KV: e.kv, Now: time.Now, Rand: rand.Reader, Requests: requests, RaiseIDs: history.RaiseIDLimit,
		HasStore:    func(alias string) bool { return objects[alias] != nil },
		ReadSpilled: catalog.ReadSpilled(objects),
	})
	r, err := replica.New(replica.Options{Shared: replica.Shared{
		KV: e.kv, Catalog: cat, Stores: objects, SnapshotStore: "default", Requests: requests, Epoch: history,
		Replica: "r1", Now: time.Now, Rand: rand.Reader, Log: zap.NewNop(),
	}})
	if err != nil {
		t.Fatal(err)
	}
	m := manager.New(manager.Options{
		Shared: r.Shared, Snapshots: r.Snapshots, GC: r.GC, Collector: r.Collector, Jobs: r.Jobs,
		Cluster: c, Release: "test",
	})
	e.server, err = server.New(server.Options{
		Manager: m, GC: r.GC, Collector: r.Collector, Jobs: r.Jobs,
		Catalog: cat, Cluster: c, KV: e.kv, Log: log, Registry: e.registry,
		Version: "v1", Replica: "r1", Stores: append([]string{"default"}, aliases...), SnapshotStore: "default",
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ran, served := make(chan error, 1), make(chan error, 1)
	l := bufconn.Listen(1 << 20)
	e.listener = l
	go func() { ran <- r.Run(ctx, m) }()
	clockWritten := func() bool {
		_, found, _, err := e.kv.Get(ctx, keys.Clock)
		return found || err != nil
	}
	for r.Jobs.Stats().Workers == 0 || !clockWritten() { // the writes of the start
		runtime.Gosched()
	}
	go func() { served <- e.server.Serve(l) }()
	e.server.SetServing(true)
	e.conn, err = grpc.NewClient("passthrough:///test", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallSendMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = e.conn.Close()
		grace, done := context.WithTimeout(context.Background(), 10*time.Second)
		defer done()
		e.server.Stop(grace)
		cancel()
		if err := errors.Join(<-served, <-ran); err != nil {
			t.Error(err)
		}
	})
	e.snapshots, e.catalog = pb.NewSnapshotServiceClient(e.conn), pb.NewCatalogServiceClient(e.conn)
	e.events, e.admin = pb.NewEventServiceClient(e.conn), pb.NewAdminServiceClient(e.conn)
	return e
}

func byName(name string) *pb.CollectionRef {
	return &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: name}}}
}

func byID(id int64) *pb.CollectionRef { return &pb.CollectionRef{Ref: &pb.CollectionRef_Id{Id: id}} }

func snapNamed(name string) *pb.SnapshotRef {
	return &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: name}}
}

func snapID(id int64) *pb.SnapshotRef { return &pb.SnapshotRef{Ref: &pb.SnapshotRef_Id{Id: id}} }

// must returns the response of a call. An error ends the test.
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

func (e *env) collection(t *testing.T, name string) *pb.Collection {
	t.Helper()
	return must[*pb.CreateCollectionResponse](t)(e.catalog.CreateCollection(t.Context(), &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Name: name}, Roots: []*pb.Root{{Prefix: "data/" + name + "/"}},
	})).GetCollection()
}

func (e *env) ids(t *testing.T, n int64) int64 {
	t.Helper()
	return must[*pb.AllocateIdsResponse](t)(e.catalog.AllocateIds(t.Context(), &pb.AllocateIdsRequest{
		Want: &pb.AllocateIdsRequest_Count{Count: n},
	})).GetIds().GetFirst()
}

func (e *env) addSegments(t *testing.T, ref *pb.CollectionRef, segments ...*pb.Segment) *pb.AddSegmentsResponse {
	t.Helper()
	resp, err := e.tryAdd(t.Context(), &pb.AddSegmentsRequest{Collection: ref, Segments: segments})
	return must[*pb.AddSegmentsResponse](t)(resp, err)
}

func (e *env) tryAdd(ctx context.Context, msgs ...*pb.AddSegmentsRequest) (*pb.AddSegmentsResponse, error) {
	stream, err := e.catalog.AddSegments(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range msgs {
		if stream.Send(m) != nil {
			break // CloseAndRecv returns the error
		}
	}
	return stream.CloseAndRecv()
}

// fullSegment returns a segment of collection 1 with every field set.
func fullSegment(id, partition, index int64) *pb.Segment {
	file := func(path, kind string) *pb.File {
		return &pb.File{
			Path: path, Kind: kind, SizeBytes: 100, Etag: "e-1",
			Checksum:     &pb.Checksum{Type: "CRC32C", Value: []byte{1, 2, 3, 4}},
			MinTimestamp: 5, MaxTimestamp: 9, Entries: 7, FieldId: 101, LogId: 33, Attributes: map[string]string{"a": "b"},
		}
	}
	return &pb.Segment{
		Id: id, PartitionId: partition, Level: pb.Segment_LEVEL_L2, State: pb.Segment_STATE_SEALED, Rows: 7,
		StartPosition:  &pb.Position{Timestamp: 5, Opaque: []byte("s")},
		DmlPosition:    &pb.Position{Timestamp: 10, Opaque: []byte("d")},
		StorageVersion: 3, Sorted: true, CommitTimestamp: 6, RowCeiling: 11,
		Files: []*pb.File{
			file(fmt.Sprintf("1/%d/%d/x", partition, id), "insert"),
			file(fmt.Sprintf("1/%d/%d/y", partition, id), "own-kind"),
		},
		IndexBuilds: []*pb.IndexBuild{{
			Id: id + 1, IndexId: index, FieldId: 101, Params: map[string]string{"k": "v"},
			Files: []*pb.File{file(fmt.Sprintf("1/%d/%d/i", partition, id), "index")},
		}},
		EngineData: []byte("engine"), Attributes: map[string]string{"c": "d"},
	}
}

// requireAllSet fails for an unset field of m or of a nested message. It finds fields that
// a test lacks.
func requireAllSet(t *testing.T, m proto.Message) {
	t.Helper()
	var check func(m protoreflect.Message)
	check = func(m protoreflect.Message) {
		for i := range m.Descriptor().Fields().Len() {
			f := m.Descriptor().Fields().Get(i)
			name := string(f.FullName())
			if !m.Has(f) && name != "snapshotd.v1.Segment.shard" && name != "snapshotd.v1.File.root" &&
				name != "snapshotd.v1.Pin.restore_job_id" &&
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

// pin pins a snapshot; ttl 0: without an end.
func (e *env) pin(t *testing.T, name string, ttl time.Duration) *pb.Pin {
	t.Helper()
	req := &pb.PinSnapshotRequest{Snapshot: snapNamed(name), Owner: "job", Reason: "night"}
	if ttl > 0 {
		req.Ttl = durationpb.New(ttl)
	}
	return must[*pb.PinSnapshotResponse](t)(e.snapshots.PinSnapshot(t.Context(), req)).GetPin()
}

func (e *env) snapshot(t *testing.T, name string) *pb.Snapshot {
	t.Helper()
	return must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{
		Collection: byName("c"), Name: name,
	})).GetSnapshot()
}

// revision returns the revision of the newest write, except writes of the election.
func (e *env) revision(t *testing.T) int64 {
	t.Helper()
	var newest int64
	from, to := keys.All()
	if _, err := e.kv.Scan(t.Context(), from, to, 0, func(kvs []meta.KeyValue) error {
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
