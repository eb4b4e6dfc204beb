package server

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/manager"
)

// watchEvery is the minimum time between two messages of WatchRestore.
const watchEvery = 250 * time.Millisecond

func (s *snapshots) RestoreSnapshot(
	ctx context.Context, req *pb.RestoreSnapshotRequest,
) (*pb.RestoreSnapshotResponse, error) {
	target := collectionRef(&pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: req.GetTarget()}})
	spec := &manager.RestoreSpec{
		Snapshot: snapshotRef(req.GetSnapshot()), DB: target.DB, Name: target.Name,
		Partitions: req.GetPartitions(), Properties: req.GetProperties(), Channels: req.GetChannels(),
		SkipIndexes: req.GetSkipIndexes(),
		Priority:    int(req.GetPriority()), Limits: limitsFromProto(req.GetLimits()), Timeout: req.GetTimeout().AsDuration(),
		Labels: req.GetLabels(),
	}
	if req.GetDryRun() {
		plan, err := s.manager.PlanRestore(ctx, spec, req.GetVerify())
		if err != nil {
			return nil, err
		}
		return &pb.RestoreSnapshotResponse{Plan: &pb.RestorePlan{
			Segments: plan.Totals.Segments, Files: plan.Totals.Files, Bytes: plan.Totals.Bytes, Requests: plan.Requests,
			EstimatedTime: durationpb.New(plan.EstimatedTime), Conflicts: convert(plan.Conflicts, clip),
			Missing:      convert(plan.Missing, clip),
			MissingCount: plan.MissingCount,
		}}, nil
	}
	tok := requestToken(callOf(ctx).principal, "RestoreSnapshot", req)
	job, err := s.manager.Restore(ctx, tok, spec)
	if err != nil {
		return nil, err
	}
	return &pb.RestoreSnapshotResponse{JobId: job.ID, CollectionId: job.Target}, nil
}

func (s *snapshots) GetRestoreState(
	ctx context.Context, req *pb.GetRestoreStateRequest,
) (*pb.GetRestoreStateResponse, error) {
	job, err := s.jobs.Get(ctx, req.GetJobId())
	if err != nil {
		return nil, s.noJob(ctx, req.GetJobId(), err)
	}
	return &pb.GetRestoreStateResponse{Job: jobStatusToProto(job)}, nil
}

// noJob replaces ErrJobNotFound by an error that distinguishes a job that was removed
// from one that never existed.
func (s *snapshots) noJob(ctx context.Context, id int64, err error) error {
	if !errors.Is(err, copyjob.ErrJobNotFound) {
		return err
	}
	return s.manager.NoJob(ctx, id)
}

func (s *snapshots) WatchRestore(
	req *pb.WatchRestoreRequest, stream grpc.ServerStreamingServer[pb.WatchRestoreResponse],
) error {
	ctx := stream.Context()
	err := s.jobs.Watch(ctx, req.GetJobId(), watchEvery, func(job *copyjob.Status) error {
		return stream.Send(&pb.WatchRestoreResponse{Job: jobStatusToProto(job)})
	})
	return s.noJob(ctx, req.GetJobId(), err)
}

func (s *snapshots) ListRestoreJobs(
	ctx context.Context, req *pb.ListRestoreJobsRequest,
) (*pb.ListRestoreJobsResponse, error) {
	const method = "ListRestoreJobs"
	filters := filterHash(req)
	var after int64
	if token := req.GetPageToken(); token != "" && !s.tokens.open(token, method, filters, &after) {
		return nil, errPageToken
	}
	list, more, err := s.jobs.List(ctx, copyjob.Filter{
		Snapshot: req.GetSnapshotId(), DB: req.GetDb(), Labels: req.GetLabels(),
		States: convert(req.GetStates(), func(state pb.RestoreJob_State) copyjob.State { return copyjob.State(state) }),
	}, after, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp, page := &pb.ListRestoreJobsResponse{}, newPage(req.GetPageSize())
	for _, job := range list {
		out := jobStatusToProto(job)
		if !page.add(out) {
			more = true
			break
		}
		resp.Jobs = append(resp.Jobs, out)
	}
	if n := len(resp.GetJobs()); more && n > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, list[n-1].Job.ID)
	}
	return resp, nil
}

func (s *snapshots) UpdateRestore(
	ctx context.Context, req *pb.UpdateRestoreRequest,
) (*pb.UpdateRestoreResponse, error) {
	job, err := s.jobs.SetLimits(ctx, req.GetJobId(), limitsFromProto(req.GetLimits()))
	if err != nil {
		return nil, s.noJob(ctx, req.GetJobId(), err)
	}
	return &pb.UpdateRestoreResponse{Job: jobStatusToProto(job)}, nil
}

func (s *snapshots) CancelRestore(
	ctx context.Context, req *pb.CancelRestoreRequest,
) (*pb.CancelRestoreResponse, error) {
	job, err := s.jobs.Cancel(ctx, req.GetJobId())
	if err != nil {
		return nil, s.noJob(ctx, req.GetJobId(), err)
	}
	return &pb.CancelRestoreResponse{Job: jobStatusToProto(job)}, nil
}

func limitsFromProto(l *pb.RestoreLimits) copyjob.Limits {
	return copyjob.Limits{Requests: l.GetRequestsPerSecond(), Bytes: l.GetBytesPerSecond()}
}

// jobToProto converts a job without its progress. The numbers of states and phases are
// those of the API.
func jobToProto(job *copyjob.Job) *pb.RestoreJob {
	if job.State == 0 { // removed
		return &pb.RestoreJob{Id: job.ID}
	}
	return &pb.RestoreJob{
		Id: job.ID, SnapshotId: job.Snapshot, SnapshotName: job.SnapshotName, SourceCollectionId: job.Source,
		Target: &pb.CollectionInfo{Id: job.Target, Db: job.DB, Name: job.Name},
		State:  pb.RestoreJob_State(job.State), Phase: pb.RestoreJob_Phase(job.Phase), Reason: job.Reason,
		Message:    job.Message,
		CreateTime: timeToProto(job.CreateTime), StartTime: timeToProto(job.StartTime), EndTime: timeToProto(job.EndTime),
		Deadline: timeToProto(job.Deadline), Labels: job.Labels, Partitions: job.PartitionNames, SkipIndexes: job.SkipIndexes,
		Priority: int32(job.Priority), //nolint:gosec // set from an int32
	}
}

// jobStatusToProto converts a job with its progress.
func jobStatusToProto(s *copyjob.Status) *pb.RestoreJob {
	out := jobToProto(s.Job)
	out.LastError, out.WaitingSince = clip(s.LastError), timeToProto(s.Waiting)
	out.RefusedSince = timeToProto(s.Refused)
	if s.Limits != (copyjob.Limits{}) {
		out.Limits = &pb.RestoreLimits{RequestsPerSecond: s.Limits.Requests, BytesPerSecond: s.Limits.Bytes}
	}
	total := s.Job.Totals
	out.Progress = &pb.RestoreProgress{
		SegmentsDone: s.Done.Segments, SegmentsTotal: total.Segments, FilesDone: s.Done.Files, FilesTotal: total.Files,
		BytesDone: s.Done.Bytes, BytesTotal: total.Bytes, BytesPerSecond: s.Rate, Fraction: s.Fraction, Retries: s.Retries,
	}
	if s.Remaining > 0 {
		out.Progress.Remaining = durationpb.New(s.Remaining)
	}
	return out
}
