package server

import (
	"context"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// maxHolderPins is the maximum number of reported pins per holder.
const maxHolderPins = 8

// reclaims implements the ReclaimService.
type reclaims struct {
	pb.UnimplementedReclaimServiceServer
	manager *manager.Manager
	gc      *gc.GC
	catalog *catalog.Catalog
	tokens  pageTokenCodec
}

func (s *reclaims) CheckReferences(
	ctx context.Context, req *pb.CheckReferencesRequest,
) (*pb.CheckReferencesResponse, error) {
	collection, err := s.manager.ResolveCollection(ctx, collectionRef(req.GetCollection()))
	if err != nil {
		return nil, err
	}
	answers, err := s.gc.Check(ctx, catalog.Ref{ID: collection}, convert(req.GetUnits(), unitFromProto))
	if err != nil {
		return nil, err
	}
	resp, list := &pb.CheckReferencesResponse{}, holderList{pins: map[int64][]*pb.Pin{}}
	for i := range answers {
		a := &answers[i]
		holders, err := list.add(a, func(snapshot int64) ([]*pb.Pin, error) {
			pins, _, err := s.manager.Pins(ctx, snapshot, manager.PinPlace{}, maxHolderPins)
			return convert(pins, pinToProto), err
		})
		if err != nil {
			return nil, err
		}
		resp.Units = append(resp.Units, &pb.UnitReferences{
			State: unitStates[a.State], Holders: holders, HolderCount: int64(a.Holders), Tombstone: grantToProto(a.Tombstone),
		})
	}
	return resp, nil
}

func (s *reclaims) Reclaim(ctx context.Context, req *pb.ReclaimRequest) (*pb.ReclaimResponse, error) {
	deleter := gc.BySnapshotd
	if req.GetDeleter() == pb.Deleter_DELETER_CALLER {
		deleter = gc.ByCaller
	}
	answers, err := s.gc.Reclaim(ctx, collectionRef(req.GetCollection()), convert(req.GetUnits(), unitFromProto),
		deleter, callOf(ctx).principal)
	if err != nil {
		return nil, err
	}
	resp, list := &pb.ReclaimResponse{}, holderList{}
	for i := range answers {
		a := &answers[i]
		holders, err := list.add(a, nil)
		if err != nil {
			return nil, err
		}
		out := &pb.ReclaimResult{
			Outcome: pb.ReclaimResult_OUTCOME_HELD, Holders: holders, HolderCount: int64(a.Holders),
			Tombstone: grantToProto(a.Tombstone),
		}
		switch {
		case a.State == gc.Granted:
			out.Outcome = pb.ReclaimResult_OUTCOME_GRANTED
		case a.State == gc.Unknown && a.Holders == 0:
			out.Outcome = pb.ReclaimResult_OUTCOME_UNKNOWN
		}
		resp.Results = append(resp.Results, out)
	}
	return resp, nil
}

func (s *reclaims) ConfirmReclaimed(
	ctx context.Context, req *pb.ConfirmReclaimedRequest,
) (*pb.ConfirmReclaimedResponse, error) {
	answers, err := s.gc.Confirm(ctx, collectionRef(req.GetCollection()), req.GetTombstoneIds())
	if err != nil {
		return nil, err
	}
	resp := &pb.ConfirmReclaimedResponse{}
	for i, id := range req.GetTombstoneIds() {
		resp.Results = append(resp.Results, &pb.ConfirmResult{TombstoneId: id, Outcome: confirmations[answers[i]]})
	}
	return resp, nil
}

func (s *reclaims) ListTombstones(
	ctx context.Context, req *pb.ListTombstonesRequest,
) (*pb.ListTombstonesResponse, error) {
	const method = "ListTombstones"
	filters := filterHash(req)
	var collection, afterCollection, after int64
	if token := req.GetPageToken(); token != "" {
		if !s.tokens.open(token, method, filters, &collection, &afterCollection, &after) {
			return nil, errPageToken
		}
	} else if req.GetCollection() != nil { // the first page resolves the name
		var err error
		if collection, err = s.manager.ResolveCollection(ctx, collectionRef(req.GetCollection())); err != nil {
			return nil, err
		}
	}
	list, more, err := s.gc.List(ctx, collection, deleters[req.GetDeleter()], afterCollection, after,
		pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp, page := &pb.ListTombstonesResponse{}, newPage(req.GetPageSize())
	roots := map[int64][]catalog.Root{}
	for _, t := range list {
		if _, known := roots[t.Collection]; !known {
			col, err := s.catalog.Collection(ctx, catalog.Ref{ID: t.Collection})
			if err != nil {
				return nil, err
			}
			roots[t.Collection] = col.Roots
		}
		out := tombstoneToProto(t)
		for root, f := range t.Files(roots[t.Collection]) {
			out.Files = append(out.Files, &pb.TombstoneFile{Store: root.Store, Key: root.Prefix + f.Path, Size: f.Size})
		}
		if !page.add(out) {
			more = true
			break
		}
		resp.Tombstones = append(resp.Tombstones, out)
	}
	if n := len(resp.GetTombstones()); more && n > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, collection, list[n-1].Collection, list[n-1].ID)
	}
	return resp, nil
}

func unitFromProto(u *pb.Unit) gc.Ask {
	file := u.GetFile()
	return gc.Ask{
		Segment: u.GetSegmentId(), Build: u.GetIndexBuildId(),
		File: catalog.FilePath{Root: int(file.GetRoot()), Path: file.GetPath()}, FileSegment: file.GetSegmentId(),
	}
}

// maxHoldersBytes bounds the holders of a response, in bytes.
const maxHoldersBytes = 1 << 20

// holderList counts the holders of one response.
type holderList struct {
	bytes int
	pins  map[int64][]*pb.Pin // by snapshot; nil without pinsOf
}

// add returns the holders of a unit, up to maxHoldersBytes in the response. With pinsOf
// the snapshots have their pins.
func (t *holderList) add(a *gc.Answer, pinsOf func(snapshot int64) ([]*pb.Pin, error)) ([]*pb.Holder, error) {
	var list []*pb.Holder
	appendHolder := func(h *pb.Holder) {
		if size := proto.Size(h); t.bytes+size <= maxHoldersBytes {
			t.bytes += size
			list = append(list, h)
		}
	}
	if a.LiveIn != 0 {
		appendHolder(&pb.Holder{Holder: &pb.Holder_Catalog{Catalog: &pb.CatalogHolder{SegmentId: a.LiveIn}}})
	}
	for _, s := range a.Snapshots {
		holder := &pb.SnapshotHolder{SnapshotId: s.ID, Name: s.Name}
		if pinsOf != nil && t.bytes < maxHoldersBytes {
			pins, known := t.pins[s.ID]
			if !known {
				var err error
				if pins, err = pinsOf(s.ID); err != nil {
					return nil, err
				}
				t.pins[s.ID] = pins
			}
			holder.Pins = pins
		}
		appendHolder(&pb.Holder{Holder: &pb.Holder_Snapshot{Snapshot: holder}})
	}
	for _, s := range a.Creating {
		appendHolder(&pb.Holder{Holder: &pb.Holder_Creating{Creating: &pb.SnapshotHolder{SnapshotId: s.ID, Name: s.Name}}})
	}
	return list, nil
}

var unitStates = map[gc.State]pb.UnitReferences_State{
	gc.Unknown: pb.UnitReferences_STATE_UNKNOWN,
	gc.Live:    pb.UnitReferences_STATE_LIVE,
	gc.Dropped: pb.UnitReferences_STATE_DROPPED,
	gc.Granted: pb.UnitReferences_STATE_GRANTED,
}

var confirmations = map[gc.Confirmation]pb.ConfirmResult_Outcome{
	gc.Confirmed:        pb.ConfirmResult_OUTCOME_CONFIRMED,
	gc.NoTombstone:      pb.ConfirmResult_OUTCOME_UNKNOWN,
	gc.OwnedBySnapshotd: pb.ConfirmResult_OUTCOME_FOREIGN,
}

var deleters = map[pb.Deleter]gc.Deleter{
	pb.Deleter_DELETER_SNAPSHOTD: gc.BySnapshotd,
	pb.Deleter_DELETER_CALLER:    gc.ByCaller,
}

// maxCaller bounds the caller of a grant, in bytes, in a response with 10 000 units.
const maxCaller = 128

// grantToProto is tombstoneToProto with a bounded caller.
func grantToProto(t *gc.Tombstone) *pb.Tombstone {
	out := tombstoneToProto(t)
	if out != nil {
		out.Caller = record.Clip(out.GetCaller(), maxCaller)
	}
	return out
}

// tombstoneToProto converts a tombstone without its files.
func tombstoneToProto(t *gc.Tombstone) *pb.Tombstone {
	if t == nil {
		return nil
	}
	out := &pb.Tombstone{
		Id: t.ID, CollectionId: t.Collection, Kind: unitKinds[t.Unit.Kind], SegmentId: t.Unit.Segment.ID,
		Deleter: pb.Deleter_DELETER_SNAPSHOTD, Caller: t.Caller, GrantTime: timestamppb.New(t.GrantTime),
	}
	if t.Deleter == gc.ByCaller {
		out.Deleter = pb.Deleter_DELETER_CALLER
	}
	for f := range t.Unit.Owned() {
		out.FileCount++
		out.Bytes += f.Size
	}
	return out
}

var unitKinds = map[catalog.UnitKind]pb.Tombstone_Kind{
	catalog.UnitSegment: pb.Tombstone_KIND_SEGMENT,
	catalog.UnitBuild:   pb.Tombstone_KIND_INDEX_BUILD,
	catalog.UnitFiles:   pb.Tombstone_KIND_FILES,
}

func usageToProto(u *manager.Usage) *pb.SnapshotUsage {
	if u == nil {
		return nil
	}
	return &pb.SnapshotUsage{
		ExclusiveFiles: u.ExclusiveFiles, ExclusiveBytes: u.ExclusiveBytes, SharedFiles: u.SharedFiles,
		SharedBytes: u.SharedBytes,
	}
}
