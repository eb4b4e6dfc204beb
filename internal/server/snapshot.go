package server

import (
	"context"

	"google.golang.org/protobuf/proto"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/snapshot"
)

// snapshots implements the SnapshotService.
type snapshots struct {
	pb.UnimplementedSnapshotServiceServer
	manager *manager.Manager
	jobs    *copyjob.Jobs
	tokens  pageTokenCodec
}

func (s *snapshots) CreateSnapshot(
	ctx context.Context, req *pb.CreateSnapshotRequest,
) (*pb.CreateSnapshotResponse, error) {
	tok := requestToken(callOf(ctx).principal, "CreateSnapshot", req)
	snap, err := s.manager.Create(ctx, tok, createSpec(req))
	if err != nil {
		return nil, err
	}
	return &pb.CreateSnapshotResponse{Snapshot: snapshotToProto(snap)}, nil
}

func (s *snapshots) GetSnapshot(ctx context.Context, req *pb.GetSnapshotRequest) (*pb.GetSnapshotResponse, error) {
	snap, err := s.manager.Get(ctx, snapshotRef(req.GetSnapshot()))
	if err != nil {
		return nil, err
	}
	return &pb.GetSnapshotResponse{Snapshot: snapshotToProto(snap)}, nil
}

func (s *snapshots) DescribeSnapshot(
	ctx context.Context, req *pb.DescribeSnapshotRequest,
) (*pb.DescribeSnapshotResponse, error) {
	const method = "DescribeSnapshot"
	// Only the first page has the usage, so requests with and without it share tokens.
	filters := hashWithout(req, "page_size", "page_token", "include_usage")
	page := wholePage(req.GetPageSize())
	var resp *pb.DescribeSnapshotResponse
	var d *manager.Description
	var id, from int64
	if token := req.GetPageToken(); token != "" {
		if !s.tokens.open(token, method, filters, &id, &from) || from < 0 {
			return nil, errPageToken
		}
		var err error
		if d, err = s.manager.Captured(ctx, manager.Ref{ID: id}); err != nil {
			return nil, err
		}
		resp = &pb.DescribeSnapshotResponse{}
	} else { // the first page resolves the name
		var err error
		if d, err = s.manager.Describe(ctx, snapshotRef(req.GetSnapshot())); err != nil {
			return nil, err
		}
		if resp, err = s.describeHead(ctx, d, req.GetIncludeUsage()); err != nil {
			return nil, err
		}
		id = d.Snapshot.ID
		// The lists follow, on this page or the next.
		page.elements, page.size = 0, proto.Size(resp)
	}
	if next := describePage(resp, d.Metadata, from, page); next > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, id, next)
	}
	notePartialList(ctx, req.GetPageSize(), req.GetPageToken(), resp.GetNextPageToken(),
		"partitions, indexes and manifests of the snapshot")
	return resp, nil
}

// describeHead returns the first page of a description without its lists.
func (s *snapshots) describeHead(
	ctx context.Context, d *manager.Description, usage bool,
) (*pb.DescribeSnapshotResponse, error) {
	resp := descriptionToProto(d)
	resp.Damage = convert(d.Damage, clip)
	if d.DamageErr != nil {
		resp.DamageUnknown = toStatusError(d.DamageErr, callOf(ctx).id).Error()
	}
	if usage {
		usage, err := s.manager.Usage(ctx, manager.Ref{ID: d.Snapshot.ID})
		if err != nil {
			return nil, err
		}
		resp.Usage = usageToProto(usage)
	}
	return resp, nil
}

func (s *snapshots) ListSnapshotSegments(
	ctx context.Context, req *pb.ListSnapshotSegmentsRequest,
) (*pb.ListSnapshotSegmentsResponse, error) {
	const method = "ListSnapshotSegments"
	filters := filterHash(req)
	var id, from int64
	if token := req.GetPageToken(); token != "" {
		if !s.tokens.open(token, method, filters, &id, &from) {
			return nil, errPageToken
		}
	} else { // the first page resolves the name
		snap, err := s.manager.Get(ctx, snapshotRef(req.GetSnapshot()))
		if err != nil {
			return nil, err
		}
		id = snap.ID
	}
	resp := &pb.ListSnapshotSegmentsResponse{}
	page := newPage(req.GetPageSize())
	err := s.manager.Segments(ctx, manager.Ref{ID: id}, from, func(seg *snapshot.Segment) bool {
		out := snapshotSegmentToProto(seg, req.GetView() == pb.SegmentView_SEGMENT_VIEW_FILES)
		if !page.add(out) {
			resp.NextPageToken = s.tokens.seal(method, filters, id, seg.Ordinal)
			return false
		}
		resp.Segments = append(resp.Segments, out)
		return true
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

func (s *snapshots) ListSnapshots(
	ctx context.Context, req *pb.ListSnapshotsRequest,
) (*pb.ListSnapshotsResponse, error) {
	const method = "ListSnapshots"
	filters := filterHash(req)
	var after manager.Place
	if token := req.GetPageToken(); token != "" && !s.tokens.open(token, method, filters, &after.Order, &after.ID) {
		return nil, errPageToken
	}
	list, more, err := s.manager.List(ctx, manager.Filter{
		Collection: collectionRef(req.GetCollection()), DB: req.GetDb(), Partition: req.GetPartitionId(),
		Labels: req.GetLabels(), States: convert(req.GetStates(), snapshotStateFromProto), NamePrefix: req.GetNamePrefix(),
	}, after, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp, page := &pb.ListSnapshotsResponse{}, newPage(req.GetPageSize())
	for _, snap := range list {
		out := snapshotToProto(snap)
		if !page.add(out) {
			more = true
			break
		}
		resp.Snapshots = append(resp.Snapshots, out)
	}
	if n := len(resp.GetSnapshots()); more && n > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, list[n-1].Order, list[n-1].ID)
	}
	return resp, nil
}

func (s *snapshots) UpdateSnapshot(
	ctx context.Context, req *pb.UpdateSnapshotRequest,
) (*pb.UpdateSnapshotResponse, error) {
	tok := requestToken(callOf(ctx).principal, "UpdateSnapshot", req)
	snap, err := s.manager.Update(ctx, tok, snapshotRef(req.GetSnapshot()), updateSpec(req))
	if err != nil {
		return nil, err
	}
	return &pb.UpdateSnapshotResponse{Snapshot: snapshotToProto(snap)}, nil
}

func (s *snapshots) DropSnapshot(ctx context.Context, req *pb.DropSnapshotRequest) (*pb.DropSnapshotResponse, error) {
	if req.GetDryRun() {
		id, usage, err := s.manager.CheckDrop(ctx, snapshotRef(req.GetSnapshot()), req.GetExpectedId())
		if err != nil {
			return nil, err
		}
		return &pb.DropSnapshotResponse{SnapshotId: id, Usage: usageToProto(usage)}, nil
	}
	tok := requestToken(callOf(ctx).principal, "DropSnapshot", req)
	id, err := s.manager.Drop(ctx, tok, snapshotRef(req.GetSnapshot()), req.GetExpectedId())
	if err != nil {
		return nil, err
	}
	return &pb.DropSnapshotResponse{SnapshotId: id}, nil
}

func (s *snapshots) PinSnapshot(ctx context.Context, req *pb.PinSnapshotRequest) (*pb.PinSnapshotResponse, error) {
	tok := requestToken(callOf(ctx).principal, "PinSnapshot", req)
	pin, err := s.manager.Pin(ctx, tok, snapshotRef(req.GetSnapshot()), manager.PinSpec{
		Owner: req.GetOwner(), Reason: req.GetReason(), TTL: req.GetTtl().AsDuration(),
	})
	if err != nil {
		return nil, err
	}
	return &pb.PinSnapshotResponse{Pin: pinToProto(pin)}, nil
}

func (s *snapshots) RenewPin(ctx context.Context, req *pb.RenewPinRequest) (*pb.RenewPinResponse, error) {
	pin, err := s.manager.RenewPin(ctx, snapshotRef(req.GetSnapshot()), req.GetPinId(), req.GetTtl().AsDuration())
	if err != nil {
		return nil, err
	}
	return &pb.RenewPinResponse{Pin: pinToProto(pin)}, nil
}

func (s *snapshots) UnpinSnapshot(
	ctx context.Context, req *pb.UnpinSnapshotRequest,
) (*pb.UnpinSnapshotResponse, error) {
	if err := s.manager.Unpin(ctx, snapshotRef(req.GetSnapshot()), req.GetPinId()); err != nil {
		return nil, err
	}
	return &pb.UnpinSnapshotResponse{}, nil
}

func (s *snapshots) ListPins(ctx context.Context, req *pb.ListPinsRequest) (*pb.ListPinsResponse, error) {
	const method = "ListPins"
	filters := filterHash(req)
	var id int64
	var after manager.PinPlace
	if token := req.GetPageToken(); token != "" {
		if !s.tokens.open(token, method, filters, &id, &after.Snapshot, &after.ID) {
			return nil, errPageToken
		}
	} else if req.GetSnapshot() != nil { // the first page resolves the name
		snap, err := s.manager.Get(ctx, snapshotRef(req.GetSnapshot()))
		if err != nil {
			return nil, err
		}
		id = snap.ID
	}
	list, more, err := s.manager.Pins(ctx, id, after, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp, page := &pb.ListPinsResponse{}, newPage(req.GetPageSize())
	for _, pin := range list {
		out := pinToProto(pin)
		if !page.add(out) {
			more = true
			break
		}
		resp.Pins = append(resp.Pins, out)
	}
	if n := len(resp.GetPins()); more && n > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, id, list[n-1].Snapshot, list[n-1].ID)
	}
	return resp, nil
}
