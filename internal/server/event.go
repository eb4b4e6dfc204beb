package server

import (
	"cmp"
	"slices"

	"google.golang.org/grpc"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
)

// events implements the EventService.
type events struct {
	pb.UnimplementedEventServiceServer
	manager *manager.Manager
	catalog *catalog.Catalog
	tokens  pageTokenCodec
}

// eventPosition is the position of a stream of events. Within a revision events are
// sent in the order of kind and id, so that a stream can resume between two of them.
type eventPosition struct {
	revision int64
	kind, id int64 // of the last sent event; kind revisionDone: all are sent
}

// The kinds of events, in order. They are part of tokens: append only.
const (
	kindCollection = 1
	kindSnapshot   = 2
	kindPin        = 3
	kindTombstone  = 4
	kindRestore    = 5
	revisionDone   = 1 << 16
)

func positionOf(e manager.Event) eventPosition {
	switch {
	case e.Collection != nil:
		return eventPosition{e.Revision, kindCollection, e.Collection.ID}
	case e.Pin != nil:
		return eventPosition{e.Revision, kindPin, e.Pin.ID}
	case e.Tombstone != nil:
		return eventPosition{e.Revision, kindTombstone, e.Tombstone.ID}
	case e.Restore != nil:
		return eventPosition{e.Revision, kindRestore, e.Restore.ID}
	}
	return eventPosition{e.Revision, kindSnapshot, e.Snapshot.ID}
}

func (p eventPosition) compare(o eventPosition) int {
	return cmp.Or(cmp.Compare(p.revision, o.revision), cmp.Compare(p.kind, o.kind), cmp.Compare(p.id, o.id))
}

func (s *events) WatchEvents(
	req *pb.WatchEventsRequest, stream grpc.ServerStreamingServer[pb.WatchEventsResponse],
) error {
	const method = "WatchEvents"
	ctx := stream.Context()
	filters := filterHash(req)
	var at eventPosition
	var collection, after int64
	if token := req.GetResumeToken(); token != "" {
		// The token has the id that the first request resolved.
		if !s.tokens.open(token, method, filters, &at.revision, &at.kind, &at.id, &collection) {
			return errResumeToken
		}
		after = at.revision
		if at.kind != revisionDone {
			after-- // to read the rest of that revision
		}
	} else if req.GetCollection() != nil {
		var err error
		if collection, err = s.manager.ResolveCollection(ctx, collectionRef(req.GetCollection())); err != nil {
			return err
		}
	}
	send := func(to eventPosition, msg *pb.WatchEventsResponse) error {
		at = to
		msg.Revision = at.revision
		msg.ResumeToken = s.tokens.seal(method, filters, at.revision, at.kind, at.id, collection)
		return stream.Send(msg)
	}
	first := true
	return s.manager.Watch(ctx, after, collection, func(batch []manager.Event, revision int64) error {
		slices.SortFunc(batch, func(a, b manager.Event) int { return positionOf(a).compare(positionOf(b)) })
		for i, e := range batch {
			to := positionOf(e)
			if to.compare(at) <= 0 {
				continue // sent before the stream was resumed
			}
			if i == len(batch)-1 || batch[i+1].Revision != e.Revision {
				to.kind, to.id = revisionDone, 0
			}
			if err := send(to, eventToProto(e)); err != nil {
				return err
			}
		}
		to := eventPosition{revision, revisionDone, 0}
		if to.compare(at) < 0 {
			to = at
		}
		if first || len(batch) == 0 {
			first = false
			return send(to, &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Bookmark{Bookmark: &pb.Bookmark{}}})
		}
		return nil
	})
}

func eventToProto(e manager.Event) *pb.WatchEventsResponse {
	kind := pb.ChangeType_CHANGE_TYPE_UNSPECIFIED
	switch e.Type {
	case manager.Created:
		kind = pb.ChangeType_CHANGE_TYPE_CREATED
	case manager.Updated:
		kind = pb.ChangeType_CHANGE_TYPE_UPDATED
	case manager.Deleted:
		kind = pb.ChangeType_CHANGE_TYPE_DELETED
	}
	if e.Collection != nil {
		col := &pb.Collection{Id: e.Collection.ID}
		if e.Type != manager.Deleted {
			col = collectionToProto(e.Collection)
		}
		return &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Collection{
			Collection: &pb.CollectionEvent{Type: kind, Collection: col},
		}}
	}
	if e.Pin != nil {
		return &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Pin{
			Pin: &pb.PinEvent{Type: kind, Pin: pinToProto(e.Pin), Expired: e.Expired},
		}}
	}
	if e.Tombstone != nil {
		t := &pb.Tombstone{Id: e.Tombstone.ID, CollectionId: e.Tombstone.Collection}
		if e.Type != manager.Deleted {
			t = tombstoneToProto(e.Tombstone)
		}
		return &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Tombstone{
			Tombstone: &pb.TombstoneEvent{Type: kind, Tombstone: t},
		}}
	}
	if e.Restore != nil {
		return &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Restore{
			Restore: &pb.RestoreEvent{Type: kind, Job: jobToProto(e.Restore)},
		}}
	}
	snap := &pb.Snapshot{Id: e.Snapshot.ID}
	if e.Type != manager.Deleted {
		snap = snapshotToProto(e.Snapshot)
	}
	if e.Type == manager.Deleted && e.Snapshot.Collection != 0 {
		snap.Collection = &pb.CollectionInfo{Id: e.Snapshot.Collection}
	}
	return &pb.WatchEventsResponse{Event: &pb.WatchEventsResponse_Snapshot{
		Snapshot: &pb.SnapshotEvent{Type: kind, Snapshot: snap},
	}}
}
