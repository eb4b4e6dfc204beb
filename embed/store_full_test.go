//go:build !short && linux

package embed_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/embed"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// writeOps are the operations that a full store refuses.
var writeOps = []s3fault.Op{
	s3fault.PutObject, s3fault.CopyObject, s3fault.CreateMultipartUpload, s3fault.UploadPart, s3fault.UploadPartCopy,
	s3fault.CompleteMultipartUpload,
}

// addSegment writes a file and registers a segment with it.
func addSegment(t *testing.T, s *embed.Server, bucket object.Store, name string) (id int64, key string) {
	t.Helper()
	catalog := pb.NewCatalogServiceClient(s.Conn())
	ids, err := catalog.AllocateIds(t.Context(), &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: 1}})
	if err != nil {
		t.Fatal(err)
	}
	id = ids.GetIds().GetFirst()
	path := fmt.Sprintf("1/0/%d/insert/100/1", id) // of the first collection, where the collector deletes
	if _, err := bucket.Create(t.Context(), name+"/"+path, []byte("rows")); err != nil {
		t.Fatal(err)
	}
	stream, err := catalog.AddSegments(t.Context())
	if err == nil {
		err = stream.Send(&pb.AddSegmentsRequest{Collection: collection(name), Segments: []*pb.Segment{{
			Id: id, State: pb.Segment_STATE_FLUSHED, Rows: 1,
			StartPosition: &pb.Position{Timestamp: 1}, DmlPosition: &pb.Position{Timestamp: 2},
			Files: []*pb.File{{
				Path: path, Kind: "insert", SizeBytes: 4, Entries: 1, MinTimestamp: 1, MaxTimestamp: 1, FieldId: 100, LogId: 1,
			}},
		}}})
	}
	if err == nil {
		_, err = stream.CloseAndRecv()
	}
	if err != nil {
		t.Fatal(err)
	}
	return id, name + "/" + path
}

func collection(name string) *pb.CollectionRef {
	return &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: name}}}
}

func snapshotRef(name string) *pb.SnapshotRef {
	return &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: name}}
}

func createSnapshot(t *testing.T, s *embed.Server, name string) error {
	t.Helper()
	req := &pb.CreateSnapshotRequest{Collection: collection("c"), Name: name}
	_, err := pb.NewSnapshotServiceClient(s.Conn()).CreateSnapshot(t.Context(), req)
	return err
}

// eventually waits for a condition over real connections.
func eventually(t *testing.T, condition string, done func() bool) {
	t.Helper()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("not within a minute: %s", condition)
		}
	}
}

// TestStartOnAFullBucket restarts a replica of a new release, which has not probed the
// bucket, while the bucket refuses writes: it reads, drops and collects, reports the
// store's error, and accepts writes once the store does.
func TestStartOnAFullBucket(t *testing.T) {
	for _, c := range []struct {
		name  string
		full  s3fault.Action
		words string
	}{
		{"507", s3fault.Status(507, "XMinioStorageFull"), "XMinioStorageFull"},
		{"quota", s3fault.Status(403, "QuotaExceeded"), "QuotaExceeded"},
	} {
		t.Run(c.name, func(t *testing.T) { startOnAFullBucket(t, c.full, c.words) })
	}
}

func startOnAFullBucket(t *testing.T, full s3fault.Action, words string) {
	o := s3test.Bucket(t)
	bucket := s3test.Open(t, o)
	p := s3fault.New(t, o.Endpoint)
	store := onS3(t, o)
	store.Endpoint = p.URL()
	cfg := small(t)
	cfg.ObjectStores = map[string]embed.ObjectStore{"default": store}
	cfg.CollectTolerance, cfg.CollectInterval = embed.Duration(time.Millisecond), embed.Duration(time.Second)
	first, err := embed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := createCollection(t.Context(), first.Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	_, kept := addSegment(t, first, bucket, "c")
	if err := createSnapshot(t, first, "kept"); err != nil {
		t.Fatal(err)
	}
	dropped, goes := addSegment(t, first, bucket, "c")
	if err := createSnapshot(t, first, "dropped"); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}

	var rules []s3fault.Rule
	for _, op := range writeOps {
		rules = append(rules, s3fault.Rule{Op: op, Times: -1, Action: full})
	}
	p.Plan(rules...)
	core, logs := observer.New(zapcore.WarnLevel)
	cfg.Log = zap.New(core)
	cfg.Version = "v99.0.0" // without a recorded probe
	s := start(t, cfg)
	snapshots, catalog := pb.NewSnapshotServiceClient(s.Conn()), pb.NewCatalogServiceClient(s.Conn())
	if got := names(t, s.Conn()); got != "dropped kept" && got != "kept dropped" {
		t.Errorf("listed %q", got)
	}
	described, err := snapshots.DescribeSnapshot(t.Context(), &pb.DescribeSnapshotRequest{Snapshot: snapshotRef("kept")})
	if err != nil || len(described.GetManifests()) == 0 {
		t.Errorf("described %v, %v", described, err)
	}
	err = createSnapshot(t, s, "meanwhile")
	if status.Code(err) != codes.ResourceExhausted || client.Reason(err) != "STORE_FULL" ||
		!strings.Contains(err.Error(), words) || !strings.Contains(err.Error(), o.Bucket) {
		t.Errorf("a create: %v, %q", err, client.Reason(err))
	}
	_, err = snapshots.DropSnapshot(t.Context(), &pb.DropSnapshotRequest{Snapshot: snapshotRef("dropped")})
	if err != nil {
		t.Errorf("a drop: %v", err)
	}
	drop := &pb.DropSegmentsRequest{Collection: collection("c"), SegmentIds: []int64{dropped}}
	if _, err := catalog.DropSegments(t.Context(), drop); err != nil {
		t.Errorf("a drop of a segment: %v", err)
	}
	eventually(t, "the file of the dropped segment is deleted", func() bool {
		for info, err := range bucket.List(t.Context(), "c/") {
			if err != nil {
				t.Fatal(err)
			}
			if info.Key == goes {
				return false
			}
		}
		return true
	})
	if _, err := bucket.Head(t.Context(), kept); err != nil {
		t.Errorf("a file that a snapshot holds: %v", err)
	}
	metrics := "http://" + s.MetricsAddr()
	code, health := get(t, metrics+"/healthz")
	if code != 200 || !strings.Contains(health, "object store default takes no writes") {
		t.Errorf("healthz: %d %q", code, health)
	}
	_, body := get(t, metrics+"/metrics")
	if !strings.Contains(body, `snapshotd_object_store_writable{store="default"} 0`) {
		t.Errorf("metrics:\n%s", body)
	}
	if n := logs.FilterMessageSnippet("writes").Len(); n == 0 || n > 2 {
		t.Errorf("%d warnings: %v", n, logs.All())
	}

	p.Plan()
	i := 0
	eventually(t, "creates succeed again",
		func() bool { i++; return createSnapshot(t, s, fmt.Sprintf("after%d", i)) == nil })
	if code, body := get(t, metrics+"/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %q", code, body)
	}
	if got := names(t, s.Conn()); !strings.Contains(got, "kept") || strings.Contains(got, "dropped") {
		t.Errorf("afterwards listed %q", got)
	}
}
