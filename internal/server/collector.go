package server

import (
	"cmp"
	"context"
	"errors"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Bounds on a message of a stream of items.
const (
	maxBatch      = 256
	maxBatchBytes = 1 << 20 // except for a single item
)

// batcher collects items and sends them in messages of a bounded size. It is not
// safe for concurrent use.
type batcher[T proto.Message] struct {
	send func([]T) error
	list []T
	size int
}

// add adds an item. It sends the collected items first if the item does not fit.
func (b *batcher[T]) add(item T) error {
	size := proto.Size(item) + elementBytes
	if len(b.list) == maxBatch || len(b.list) > 0 && b.size+size > maxBatchBytes {
		if err := b.flush(); err != nil {
			return err
		}
	}
	b.list, b.size = append(b.list, item), b.size+size
	return nil
}

// flush sends the collected items.
func (b *batcher[T]) flush() error {
	if len(b.list) == 0 {
		return nil
	}
	list := b.list
	b.list, b.size = nil, 0
	return b.send(list)
}

// collectors implements the CollectorService.
type collectors struct {
	pb.UnimplementedCollectorServiceServer
	manager       *manager.Manager
	gc            *gc.GC
	collector     *collect.Collector
	snapshotStore string // alias
}

func (s *collectors) Collect(req *pb.CollectRequest, stream grpc.ServerStreamingServer[pb.CollectResponse]) error {
	ctx := stream.Context()
	if req.GetForce() && req.GetCollection() == nil {
		return &catalog.InvalidError{Field: "force", Problem: "needs a collection: it applies to one at a time"}
	}
	if req.GetSweep() && req.GetCollection() != nil {
		return &catalog.InvalidError{
			Field: "sweep", Problem: "excludes a collection: it covers snapshotd's own prefixes in all stores",
		}
	}
	items := batcher[*pb.CollectItem]{send: func(list []*pb.CollectItem) error {
		return stream.Send(&pb.CollectResponse{Items: list})
	}}
	o := collect.CycleOptions{
		Collection: collectionRef(req.GetCollection()), DryRun: req.GetDryRun(), Force: req.GetForce(), Sweep: req.GetSweep(),
		Report: func(item collect.Item) error { return items.add(itemToProto(&item)) },
	}
	if req.GetTolerance() != nil {
		tolerance := req.GetTolerance().AsDuration()
		o.Tolerance = &tolerance
	}
	sum, err := s.manager.Collect(ctx, o)
	// The client also gets the items before an error.
	if flushErr := items.flush(); err == nil {
		err = flushErr
	}
	if err == nil && req.GetWait() && !req.GetDryRun() {
		err = s.gc.AwaitDeleted(ctx, o.Collection, sum.End)
	}
	if err != nil {
		return err
	}
	return stream.Send(&pb.CollectResponse{Summary: summaryToProto(&sum)})
}

func (s *collectors) GetCollectorStatus(
	ctx context.Context, _ *pb.GetCollectorStatusRequest,
) (*pb.GetCollectorStatusResponse, error) {
	now, err := s.collector.Status(ctx)
	if err != nil {
		return nil, err
	}
	return &pb.GetCollectorStatusResponse{
		LastRound: summaryToProto(now.LastRound), Deleting: int64(now.Deleting), Unconfirmed: int64(now.Unconfirmed),
		Tolerance: durationpb.New(now.Tolerance), MaxShare: now.MaxShare, StopUnits: int64(now.StopUnits),
		Enabled: now.Enabled, Blocked: clip(now.Blocked),
		ClockStopped: clip(now.Clock),
		Halts: convert(now.Halts, func(h collect.Halt) *pb.CollectorHalt {
			return &pb.CollectorHalt{
				Name: h.Name, What: h.What, Error: clip(h.Error), SinceTime: timeToProto(h.Since), Replica: h.Replica,
				Failures: h.Failures,
			}
		}),
	}, nil
}

func (s *collectors) ExplainObject(
	ctx context.Context, req *pb.ExplainObjectRequest,
) (*pb.ExplainObjectResponse, error) {
	e, err := s.collector.Explain(ctx, cmp.Or(req.GetStore(), s.snapshotStore), req.GetKey())
	switch {
	case errors.Is(err, object.ErrInvalidKey):
		return nil, &catalog.InvalidError{Field: "key", Problem: "is not a valid key of the store"}
	case err != nil:
		return nil, err
	}
	holders, err := (&holderList{}).add(&gc.Answer{Snapshots: e.Snapshots}, nil)
	if err != nil {
		return nil, err
	}
	return &pb.ExplainObjectResponse{
		Exists: e.Exists, What: clip(e.What), Kept: e.Kept, Reason: clip(e.Reason),
		CollectionId: e.Collection, SnapshotId: e.Snapshot, SegmentId: e.Segment, UnitId: e.Unit, IndexBuildId: e.Build,
		Holders: holders,
	}, nil
}

func (s *collectors) ListOrphans(
	req *pb.ListOrphansRequest, stream grpc.ServerStreamingServer[pb.ListOrphansResponse],
) error {
	return s.orphans(stream.Context(), collect.OrphanOptions{Collection: collectionRef(req.GetCollection())},
		func(list []*pb.Orphan) error {
			return stream.Send(&pb.ListOrphansResponse{Orphans: list})
		})
}

func (s *collectors) DeleteOrphans(
	req *pb.DeleteOrphansRequest, stream grpc.ServerStreamingServer[pb.DeleteOrphansResponse],
) error {
	o := collect.OrphanOptions{
		Collection: collectionRef(req.GetCollection()), Grace: req.GetGrace().AsDuration(),
		Delete: true,
	}
	return s.orphans(stream.Context(), o, func(list []*pb.Orphan) error {
		return stream.Send(&pb.DeleteOrphansResponse{Deleted: list})
	})
}

// orphans sends orphans as they are found or deleted, also those before an error.
func (s *collectors) orphans(ctx context.Context, o collect.OrphanOptions, send func([]*pb.Orphan) error) error {
	list := batcher[*pb.Orphan]{send: send}
	o.Report = func(x collect.Orphan) error { return list.add(orphanToProto(&x)) }
	err := s.collector.Orphans(ctx, o)
	if flushErr := list.flush(); err == nil {
		err = flushErr
	}
	return err
}

func (s *collectors) Recover(ctx context.Context, req *pb.RecoverRequest) (*pb.RecoverResponse, error) {
	if req.GetClock() {
		stopped, now, err := s.manager.RecoverClock(ctx)
		if err != nil {
			return nil, err
		}
		return &pb.RecoverResponse{ClockWasStopped: stopped, ClockTime: timeToProto(now)}, nil
	}
	behind, next, from, err := s.manager.Recover(ctx, req.GetForce())
	if err != nil {
		return nil, err
	}
	return &pb.RecoverResponse{WasBehind: behind, NextId: next, SkippedFrom: from}, nil
}

func orphanToProto(o *collect.Orphan) *pb.Orphan {
	return &pb.Orphan{
		Store: o.Store, Key: strings.ToValidUTF8(o.Key, "\uFFFD"), Size: o.Size, ModTime: timeToProto(o.ModTime),
		Age:    durationpb.New(o.Age),
		Reason: clip(o.Reason), Deletable: o.Deletable, CollectionId: o.Collection, Young: o.Young,
	}
}

var itemKinds = map[collect.ItemKind]pb.CollectItem_Kind{
	collect.ItemSegment:    pb.CollectItem_KIND_SEGMENT,
	collect.ItemBuild:      pb.CollectItem_KIND_INDEX_BUILD,
	collect.ItemFiles:      pb.CollectItem_KIND_FILES,
	collect.ItemPartition:  pb.CollectItem_KIND_PARTITION,
	collect.ItemIndex:      pb.CollectItem_KIND_INDEX,
	collect.ItemCollection: pb.CollectItem_KIND_COLLECTION,
	collect.ItemSnapshot:   pb.CollectItem_KIND_SNAPSHOT,
}

var actions = map[collect.Action]pb.CollectItem_Action{
	collect.Deletes: pb.CollectItem_ACTION_DELETE,
	collect.Keeps:   pb.CollectItem_ACTION_KEEP,
	collect.Waits:   pb.CollectItem_ACTION_WAIT,
	collect.Stops:   pb.CollectItem_ACTION_STOP,
}

func itemToProto(i *collect.Item) *pb.CollectItem {
	return &pb.CollectItem{
		Kind: itemKinds[i.Kind], Action: actions[i.Action], CollectionId: i.Collection, Id: i.ID, Name: i.Name,
		Reason:   clip(i.Reason),
		DropTime: timeToProto(i.DropTime), Files: i.Files, Bytes: i.Bytes,
		Objects: convert(i.Objects, func(o collect.Object) *pb.TombstoneFile {
			return &pb.TombstoneFile{Store: o.Store, Key: o.Key, Size: o.Size}
		}),
	}
}

func summaryToProto(s *collect.Summary) *pb.CollectSummary {
	if s == nil {
		return nil
	}
	return &pb.CollectSummary{
		Replica: s.Replica, StartTime: timeToProto(s.Start), EndTime: timeToProto(s.End),
		Granted: s.Granted, Files: s.Files, Bytes: s.Bytes, Waiting: s.Waiting, Held: s.Held, Parked: s.Spilled,
		Removed: s.Removed,
		Stops: convert(s.Stops, func(stop collect.Stop) *pb.CollectStop {
			return &pb.CollectStop{CollectionId: stop.Collection, Due: stop.Eligible, Total: stop.Total}
		}),
		StopCount: s.StopCount, Error: clip(s.Error), Swept: s.Swept, SweptBytes: s.SweptBytes,
	}
}
