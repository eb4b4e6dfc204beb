package server_test

import (
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// snapshotOf creates a collection of segments with their files, and a snapshot of it.
func (e *env) snapshotOf(t *testing.T, name string) *pb.Snapshot {
	t.Helper()
	col := e.collection(t, name)
	part := must[*pb.CreatePartitionResponse](t)(e.catalog.CreatePartition(t.Context(), &pb.CreatePartitionRequest{
		Collection: byID(col.GetId()), Name: "p",
	})).GetPartition()
	first := e.ids(t, 4)
	for i := range int64(4) {
		path := fmt.Sprintf("%d/%d/%d/insert/100/1", col.GetId(), part.GetId(), first+i)
		if _, err := e.objects.Put(t.Context(), "data/"+name+"/"+path, []byte("ten bytes.")); err != nil {
			t.Fatal(err)
		}
		e.addSegments(t, byID(col.GetId()), &pb.Segment{
			Id: first + i, PartitionId: part.GetId(), State: pb.Segment_STATE_FLUSHED, Level: pb.Segment_LEVEL_L1, Rows: 1,
			Files: []*pb.File{{Path: path, Kind: "insert", SizeBytes: 10, FieldId: 100, LogId: 1}},
		})
	}
	return must[*pb.CreateSnapshotResponse](t)(e.snapshots.CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{
		Collection: byID(col.GetId()), Name: name + "-1",
	})).GetSnapshot()
}

func target(name string) *pb.CollectionName { return &pb.CollectionName{Name: name} }

// watchJob returns the messages about a job until its end.
func (e *env) watchJob(t *testing.T, id int64) []*pb.RestoreJob {
	t.Helper()
	stream, err := e.snapshots.WatchRestore(t.Context(), &pb.WatchRestoreRequest{JobId: id})
	if err != nil {
		t.Fatal(err)
	}
	var list []*pb.RestoreJob
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return list
		}
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, msg.GetJob())
	}
}

func wantReason(t *testing.T, err error, code codes.Code, want string) {
	t.Helper()
	if status.Code(err) != code || reason(err) != want {
		t.Errorf("%v: %v, reason %q; want %v, %q", err, status.Code(err), reason(err), code, want)
	}
}

func TestRestoreLife(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	s := e.snapshotOf(t, "c")
	req := &pb.RestoreSnapshotRequest{
		Snapshot: snapID(s.GetId()), Target: target("copy"), Mode: pb.RestoreSnapshotRequest_MODE_COPY,
		Partitions: []string{"p"},
		Properties: map[string]string{"k": "v"}, SkipIndexes: true, Priority: 3,
		Limits:  &pb.RestoreLimits{RequestsPerSecond: 1000, BytesPerSecond: 1000},
		Timeout: durationpb.New(time.Hour), Labels: map[string]string{"a": "b"}, RequestToken: "t", DryRun: true,
		Verify: true,
	}
	plan := must[*pb.RestoreSnapshotResponse](t)(e.snapshots.RestoreSnapshot(ctx, req))
	if p := plan.GetPlan(); plan.GetJobId() != 0 || p.GetSegments() != 4 || p.GetFiles() != 4 || p.GetBytes() != 40 ||
		p.GetRequests() == 0 ||
		p.GetEstimatedTime().AsDuration() <= 0 || len(p.GetConflicts()) != 0 || p.GetMissingCount() != 0 {
		t.Errorf("plan %v", plan)
	}
	req.DryRun, req.Verify = false, false
	made := must[*pb.RestoreSnapshotResponse](t)(e.snapshots.RestoreSnapshot(ctx, req))
	list := e.watchJob(t, made.GetJobId())
	end := list[len(list)-1]
	if end.GetState() != pb.RestoreJob_STATE_COMPLETED || end.GetPhase() != pb.RestoreJob_PHASE_PUBLISH ||
		end.GetProgress().GetFraction() != 1 ||
		end.GetProgress().GetFilesDone() != 4 || end.GetTarget().GetId() != made.GetCollectionId() ||
		end.GetTarget().GetName() != "copy" ||
		end.GetSnapshotName() != "c-1" || end.GetPriority() != 3 || end.GetLabels()["a"] != "b" || !end.GetSkipIndexes() ||
		end.GetPartitions()[0] != "p" || end.GetDeadline() == nil || end.GetStartTime() == nil || end.GetEndTime() == nil {
		t.Errorf("the job ended as %v", end)
	}
	again := must[*pb.RestoreSnapshotResponse](t)(e.snapshots.RestoreSnapshot(ctx, req))
	if again.GetJobId() != made.GetJobId() || again.GetCollectionId() != made.GetCollectionId() {
		t.Errorf("repeated: %v, first %v", again, made)
	}
	col := must[*pb.GetCollectionResponse](t)(e.catalog.GetCollection(ctx,
		&pb.GetCollectionRequest{Collection: byName("copy")})).GetCollection()
	if col.GetId() != made.GetCollectionId() || col.GetState() != pb.Collection_STATE_ACTIVE ||
		col.GetProperties()["k"] != "v" {
		t.Errorf("the target is %v", col)
	}
	export, err := e.catalog.ExportSegments(ctx, &pb.ExportSegmentsRequest{Collection: byName("copy")})
	if err != nil {
		t.Fatal(err)
	}
	if msg := must[*pb.ExportSegmentsResponse](t)(export.Recv()); len(msg.GetSegments()) != 4 {
		t.Errorf("segments %v", msg)
	}

	req.Labels = nil
	_, err = e.snapshots.RestoreSnapshot(ctx, req)
	wantReason(t, err, codes.InvalidArgument, "REQUEST_TOKEN_REUSED")
	req.RequestToken = ""
	_, err = e.snapshots.RestoreSnapshot(ctx, req)
	wantReason(t, err, codes.AlreadyExists, "COLLECTION_EXISTS")
	req.Target, req.Channels = target("other"), []string{"one"}
	_, err = e.snapshots.RestoreSnapshot(ctx, req)
	wantReason(t, err, codes.FailedPrecondition, "CHANNEL_MISMATCH")
	req.Channels, req.Partitions = nil, []string{"none"}
	_, err = e.snapshots.RestoreSnapshot(ctx, req)
	wantReason(t, err, codes.NotFound, "PARTITION_NOT_FOUND")
	req.Partitions, req.Snapshot = nil, snapNamed("none")
	_, err = e.snapshots.RestoreSnapshot(ctx, req)
	wantReason(t, err, codes.NotFound, "SNAPSHOT_NOT_FOUND")
	_, err = e.snapshots.CancelRestore(ctx, &pb.CancelRestoreRequest{JobId: made.GetJobId()})
	wantReason(t, err, codes.FailedPrecondition, "RESTORE_ENDED")
	_, err = e.snapshots.UpdateRestore(ctx,
		&pb.UpdateRestoreRequest{JobId: made.GetJobId(), Limits: &pb.RestoreLimits{}})
	wantReason(t, err, codes.FailedPrecondition, "RESTORE_ENDED")
	for _, c := range []struct {
		id     int64
		reason string
	}{{s.GetId(), "EXPIRED_OR_DROPPED"}, {1 << 50, "NEVER_EXISTED"}} {
		_, err = e.snapshots.GetRestoreState(ctx, &pb.GetRestoreStateRequest{JobId: c.id})
		wantReason(t, err, codes.NotFound, c.reason)
		_, err = e.snapshots.CancelRestore(ctx, &pb.CancelRestoreRequest{JobId: c.id})
		wantReason(t, err, codes.NotFound, c.reason)
		_, err = e.snapshots.UpdateRestore(ctx, &pb.UpdateRestoreRequest{JobId: c.id, Limits: &pb.RestoreLimits{}})
		wantReason(t, err, codes.NotFound, c.reason)
		stream, err := e.snapshots.WatchRestore(ctx, &pb.WatchRestoreRequest{JobId: c.id})
		if err == nil {
			_, err = stream.Recv()
		}
		wantReason(t, err, codes.NotFound, c.reason)
	}
}

// TestBlockedRestore reads a restore without progress through all calls, and cancels it.
func TestBlockedRestore(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	s := e.snapshotOf(t, "c")
	e.objects.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpCopy {
			return object.FaultBefore
		}
		return object.FaultNone
	})
	made := must[*pb.RestoreSnapshotResponse](t)(e.snapshots.RestoreSnapshot(ctx, &pb.RestoreSnapshotRequest{
		Snapshot: snapID(s.GetId()), Target: target("copy"),
	}))
	job := must[*pb.UpdateRestoreResponse](t)(e.snapshots.UpdateRestore(ctx, &pb.UpdateRestoreRequest{
		JobId: made.GetJobId(), Limits: &pb.RestoreLimits{BytesPerSecond: 7},
	})).GetJob()
	if job.GetLimits().GetBytesPerSecond() != 7 || job.GetState() == pb.RestoreJob_STATE_COMPLETED ||
		job.GetProgress().GetFraction() >= 1 {
		t.Errorf("the job is %v", job)
	}
	_, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapID(s.GetId())})
	wantReason(t, err, codes.FailedPrecondition, "SNAPSHOT_PINNED")
	pins := must[*pb.ListPinsResponse](t)(e.snapshots.ListPins(ctx,
		&pb.ListPinsRequest{Snapshot: snapID(s.GetId())})).GetPins()
	if len(pins) != 1 || pins[0].GetRestoreJobId() != made.GetJobId() {
		t.Fatalf("pins %v", pins)
	}
	_, err = e.snapshots.UnpinSnapshot(ctx,
		&pb.UnpinSnapshotRequest{Snapshot: snapID(s.GetId()), PinId: pins[0].GetId()})
	wantReason(t, err, codes.FailedPrecondition, "PIN_OF_RESTORE")
	for _, ref := range []*pb.CollectionRef{byName("copy"), byID(made.GetCollectionId())} {
		col := must[*pb.GetCollectionResponse](t)(e.catalog.GetCollection(ctx,
			&pb.GetCollectionRequest{Collection: ref})).GetCollection()
		if col.GetState() != pb.Collection_STATE_RESTORING {
			t.Errorf("%v", col)
		}
		_, err = e.catalog.GetSegment(ctx, &pb.GetSegmentRequest{Collection: ref, SegmentId: 1})
		wantReason(t, err, codes.FailedPrecondition, "COLLECTION_NOT_ACTIVE")
		stream, err := e.catalog.ExportSegments(ctx, &pb.ExportSegmentsRequest{Collection: ref})
		if err == nil {
			_, err = stream.Recv()
		}
		wantReason(t, err, codes.FailedPrecondition, "COLLECTION_NOT_ACTIVE")
	}
	// A second job, for two pages.
	two := must[*pb.RestoreSnapshotResponse](t)(e.snapshots.RestoreSnapshot(ctx, &pb.RestoreSnapshotRequest{
		Snapshot: snapID(s.GetId()), Target: &pb.CollectionName{Db: "db", Name: "two"}, Labels: map[string]string{"x": "y"},
	}))
	list := func(req *pb.ListRestoreJobsRequest) (ids []int64) {
		t.Helper()
		for {
			resp := must[*pb.ListRestoreJobsResponse](t)(e.snapshots.ListRestoreJobs(ctx, req))
			for _, job := range resp.GetJobs() {
				ids = append(ids, job.GetId())
			}
			if req.PageToken = resp.GetNextPageToken(); req.GetPageToken() == "" {
				return ids
			}
		}
	}
	both := fmt.Sprint([]int64{two.GetJobId(), made.GetJobId()})
	second := fmt.Sprint([]int64{two.GetJobId()})
	for want, reqs := range map[string][]*pb.ListRestoreJobsRequest{
		both:   {{}, {PageSize: 1}, {SnapshotId: s.GetId(), PageSize: 2}},
		second: {{Db: "db"}, {Labels: map[string]string{"x": "y"}}},
		"[]": {
			{SnapshotId: 1 << 40},
			{States: []pb.RestoreJob_State{pb.RestoreJob_STATE_COMPLETED, pb.RestoreJob_STATE_FAILED}},
			{Labels: map[string]string{"x": "z"}},
		},
	} {
		for _, req := range reqs {
			if got := fmt.Sprint(list(req)); got != want {
				t.Errorf("%v: %s, want %s", req, got, want)
			}
		}
	}
	_, err = e.snapshots.ListRestoreJobs(ctx, &pb.ListRestoreJobsRequest{PageToken: "?"})
	wantReason(t, err, codes.InvalidArgument, "INVALID_PAGE_TOKEN")

	for _, id := range []int64{made.GetJobId(), two.GetJobId()} {
		for range 2 {
			job = must[*pb.CancelRestoreResponse](t)(e.snapshots.CancelRestore(ctx,
				&pb.CancelRestoreRequest{JobId: id})).GetJob()
			if job.GetPhase() != pb.RestoreJob_PHASE_ROLL_BACK || job.GetReason() != "CANCELED" {
				t.Errorf("%v", job)
			}
		}
		jobs := e.watchJob(t, id)
		if end := jobs[len(jobs)-1]; end.GetState() != pb.RestoreJob_STATE_CANCELED || end.GetEndTime() == nil {
			t.Errorf("the job ended as %v", end)
		}
	}
	_, err = e.catalog.GetCollection(ctx, &pb.GetCollectionRequest{Collection: byName("copy")})
	wantReason(t, err, codes.NotFound, "COLLECTION_NOT_FOUND")
	if _, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapID(s.GetId())}); err != nil {
		t.Error(err)
	}
}
