//go:build !short && linux

package embed_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/embed"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// onS3 returns the configuration of a store, with its secret in a file.
func onS3(t *testing.T, o s3.Options) embed.ObjectStore {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(string(o.SecretAccessKey)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return embed.ObjectStore{
		Type: "s3", Bucket: o.Bucket, Prefix: o.Prefix, Endpoint: o.Endpoint, PathStyle: true, AccessKeyID: o.AccessKeyID,
		SecretKeyFile: secret,
	}
}

// TestSnapshotOnS3 creates, reads and drops a snapshot on a bucket.
func TestSnapshotOnS3(t *testing.T) {
	o := s3test.Bucket(t)
	o.Prefix = "cluster-1/"
	bucket := s3test.Open(t, o)
	var log bytes.Buffer
	cfg := small(t)
	cfg.Log = zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()),
		zapcore.Lock(zapcore.AddSync(&log)), zapcore.DebugLevel))
	cfg.ObjectStores = map[string]embed.ObjectStore{"default": onS3(t, o)}
	s, err := embed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if strings.Contains(log.String(), "canary") {
			t.Errorf("credentials in the log: %s", log.String())
		}
	}()
	ctx := t.Context()
	catalog, snapshots := pb.NewCatalogServiceClient(s.Conn()), pb.NewSnapshotServiceClient(s.Conn())
	if err := createCollection(ctx, s.Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	ref := &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: "c"}}}
	const n = 3
	ids, err := catalog.AllocateIds(ctx, &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: n}})
	if err != nil {
		t.Fatal(err)
	}
	add := &pb.AddSegmentsRequest{Collection: ref}
	for i := range int64(n) {
		id := ids.GetIds().GetFirst() + i
		path := fmt.Sprintf("%d/data", id)
		if _, err := bucket.Create(ctx, "c/"+path, []byte("rows")); err != nil {
			t.Fatal(err)
		}
		add.Segments = append(add.Segments, &pb.Segment{
			Id: id, State: pb.Segment_STATE_FLUSHED, Rows: 1, StartPosition: &pb.Position{Timestamp: 1},
			DmlPosition: &pb.Position{Timestamp: 2},
			Files:       []*pb.File{{Path: path, Kind: "insert", SizeBytes: 4, Entries: 1, MinTimestamp: 1, MaxTimestamp: 1}},
		})
	}
	stream, err := catalog.AddSegments(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(add); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.CloseAndRecv(); err != nil {
		t.Fatal(err)
	}
	if _, err := catalog.SetCheckpoints(ctx, &pb.SetCheckpointsRequest{
		Collection: ref, Checkpoints: []*pb.ChannelPosition{{Position: &pb.Position{Timestamp: 10}}},
	}); err != nil {
		t.Fatal(err)
	}
	created, err := snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: ref, Name: "s", Verify: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := created.GetSnapshot().GetTotals().GetSegments(); got != n {
		t.Errorf("%d segments, want %d", got, n)
	}
	snap := &pb.SnapshotRef{Ref: &pb.SnapshotRef_Name{Name: "s"}}
	described, err := snapshots.DescribeSnapshot(ctx, &pb.DescribeSnapshotRequest{Snapshot: snap})
	if err != nil || len(described.GetManifests()) == 0 {
		t.Fatalf("got %v, %v", described, err)
	}
	count := func() (own int) {
		for info, err := range bucket.List(ctx, "") {
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasPrefix(info.Key, probe.Dir) {
				t.Errorf("the probe left %s", info.Key)
			}
			if strings.HasPrefix(info.Key, described.GetPrefix()) {
				own++
			}
		}
		return own
	}
	if count() < 3 { // metadata, references and a manifest
		t.Errorf("%d objects of the snapshot", count())
	}
	page, err := snapshots.ListSnapshotSegments(ctx,
		&pb.ListSnapshotSegmentsRequest{Snapshot: snap, View: pb.SegmentView_SEGMENT_VIEW_FILES})
	if err != nil || len(page.GetSegments()) != n || page.GetSegments()[0].GetSegment().GetFiles()[0].GetPath() == "" {
		t.Fatalf("got %v, %v", page, err)
	}
	// A create with verify fails for a missing file.
	if err := bucket.Delete(ctx, "c/"+add.Segments[0].Files[0].Path); err != nil {
		t.Fatal(err)
	}
	if _, err := snapshots.CreateSnapshot(ctx,
		&pb.CreateSnapshotRequest{
			Collection: ref, Name: "s2",
			Verify: true,
		}); err == nil || !strings.Contains(err.Error(), "data") {
		t.Errorf("a file is missing: %v", err)
	}
	if _, err := snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snap}); err != nil {
		t.Fatal(err)
	}
	deadline := time.NewTimer(30 * time.Second)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for count() > 0 {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("%d objects of the dropped snapshot are left", count())
		}
	}
}

// TestStartOnAnUnusableBucket has a start fail with the reason.
func TestStartOnAnUnusableBucket(t *testing.T) {
	o := s3test.Bucket(t)
	p := s3fault.New(t, o.Endpoint)
	for name, c := range map[string]struct {
		change func(*embed.ObjectStore)
		rules  []s3fault.Rule
		want   string
	}{
		"no condition": {
			rules: []s3fault.Rule{{
				Op: s3fault.PutObject, Times: -1,
				Action: s3fault.StripRequest("If-None-Match", o.AccessKeyID, string(o.SecretAccessKey)),
			}},
			want: "conditional create",
		},
		"denied": {rules: []s3fault.Rule{{
			Op: s3fault.PutObject, Times: -1,
			Action: s3fault.Status(403, "AccessDenied"),
		}}, want: "access denied"},
		"no bucket": {change: func(s *embed.ObjectStore) { s.Bucket = "missing-bucket" }, want: "NoSuchBucket"},
		"no endpoint": {
			change: func(s *embed.ObjectStore) { s.Endpoint = "http://127.0.0.1:1" },
			want:   "connection refused",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p.Plan(c.rules...)
			store := onS3(t, o)
			store.Endpoint = p.URL()
			if c.change != nil {
				c.change(&store)
			}
			cfg := small(t)
			cfg.ObjectStores = map[string]embed.ObjectStore{"default": store}
			s, err := embed.Start(t.Context(), cfg)
			if err == nil {
				err = errors.Join(errors.New("the server started"), s.Close())
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "object store default: ") {
				t.Errorf("got %v, want %s", err, c.want)
			}
			if strings.Contains(err.Error(), "canary") {
				t.Errorf("credentials in %v", err)
			}
			p.MustHaveFired(t)
		})
	}
}

// TestStartReadOnly restarts a replica while a policy allows only lists and reads: it
// answers calls that write nothing, and all others once the policy allows writes.
func TestStartReadOnly(t *testing.T) {
	o := s3test.Bucket(t)
	p := s3fault.New(t, o.Endpoint)
	store := onS3(t, o)
	store.Endpoint = p.URL()
	cfg := small(t)
	cfg.ObjectStores = map[string]embed.ObjectStore{"default": store}
	s := start(t, cfg)
	if err := createCollection(t.Context(), s.Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	if err := createSnapshot(t, s, "before"); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var rules []s3fault.Rule
	for _, op := range append(writeOps, s3fault.DeleteObjects, s3fault.DeleteObject) {
		rules = append(rules, s3fault.Rule{Op: op, Times: -1, Action: s3fault.Status(403, "AccessDenied")})
	}
	p.Plan(rules...)
	cfg.Version = "another release" // so that the store is probed
	s = start(t, cfg)
	snapshots := pb.NewSnapshotServiceClient(s.Conn())
	if _, err := snapshots.DescribeSnapshot(t.Context(),
		&pb.DescribeSnapshotRequest{Snapshot: snapshotRef("before")}); err != nil {
		t.Errorf("describe: %v", err)
	}
	if list, err := snapshots.ListSnapshots(t.Context(), &pb.ListSnapshotsRequest{}); err != nil ||
		len(list.GetSnapshots()) != 1 {
		t.Errorf("list: %v, %v", list, err)
	}
	plan, err := snapshots.RestoreSnapshot(t.Context(), &pb.RestoreSnapshotRequest{
		Snapshot: snapshotRef("before"), Target: &pb.CollectionName{Name: "d"}, DryRun: true,
	})
	if err != nil || len(plan.GetPlan().GetConflicts()) != 1 {
		t.Errorf("plan: %v, %v", plan, err)
	}
	if err := createSnapshot(t, s, "during"); client.Reason(err) != "OBJECT_STORE_DENIED" {
		t.Errorf("create: %v", err)
	}
	if _, err := snapshots.DropSnapshot(t.Context(),
		&pb.DropSnapshotRequest{Snapshot: snapshotRef("before")}); err != nil {
		t.Errorf("drop: %v", err)
	}
	p.Plan()
	eventually(t, "a create", func() bool { return createSnapshot(t, s, "after") == nil })
}

// TestStartWithoutTheBucket restarts a replica while its bucket does not answer: it
// answers reads, refuses changes with the reason, and accepts them once the bucket
// answers.
func TestStartWithoutTheBucket(t *testing.T) {
	o := s3test.Bucket(t)
	p := s3fault.New(t, o.Endpoint)
	store := onS3(t, o)
	store.Endpoint = p.URL()
	cfg := small(t)
	cfg.ObjectStores = map[string]embed.ObjectStore{"default": store}
	ref := &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: "c"}}}
	create := func(s *embed.Server, name string) error {
		_, err := pb.NewSnapshotServiceClient(s.Conn()).CreateSnapshot(t.Context(),
			&pb.CreateSnapshotRequest{Collection: ref, Name: name})
		return err
	}
	first, err := embed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := createCollection(t.Context(), first.Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	if _, err := pb.NewCatalogServiceClient(first.Conn()).SetCheckpoints(t.Context(), &pb.SetCheckpointsRequest{
		Collection: ref, Checkpoints: []*pb.ChannelPosition{{Position: &pb.Position{Timestamp: 10}}},
	}); err != nil {
		t.Fatal(err)
	}
	if err := create(first, "before"); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}

	p.Plan(s3fault.Rule{Times: -1, Action: s3fault.Reset()})
	s := start(t, cfg)
	if got := names(t, s.Conn()); got != "before" {
		t.Errorf("without the bucket listed %q", got)
	}
	ids := &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: 1}}
	_, idsErr := pb.NewCatalogServiceClient(s.Conn()).AllocateIds(t.Context(), ids)
	for _, err := range []error{create(s, "meanwhile"), createCollection(t.Context(), s.Conn(), "d"), idsErr} {
		if status.Code(err) != codes.Unavailable ||
			!strings.Contains(err.Error(), "has not answered since this replica started") {
			t.Errorf("a change without the bucket: got %v", err)
		}
	}
	metrics := "http://" + s.MetricsAddr()
	if code, body := get(t, metrics+"/healthz"); code != 200 || !strings.Contains(body, "without object store default") {
		t.Errorf("healthz: %d %q", code, body)
	}
	if _, body := get(t, metrics+"/metrics"); !strings.Contains(body, `snapshotd_object_store_ready{store="default"} 0`) {
		t.Errorf("metrics:\n%s", body)
	}
	p.MustHaveFired(t)

	p.Plan()
	deadline := time.NewTimer(time.Minute)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for err := create(s, "after"); err != nil; err = create(s, "after") {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("a create after the bucket answers again: %v", err)
		}
	}
	if code, body := get(t, metrics+"/healthz"); code != 200 || body != "ok\n" {
		t.Errorf("healthz: %d %q", code, body)
	}
}
