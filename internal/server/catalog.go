package server

import (
	"context"
	"errors"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
)

// catalogs implements the CatalogService.
type catalogs struct {
	pb.UnimplementedCatalogServiceServer
	catalog *catalog.Catalog
	tokens  pageTokenCodec
	exports slots
}

// slots is a semaphore of concurrent calls: a value per running call.
type slots chan struct{}

// acquire waits for a slot and returns the function that frees it. Without a slot in
// time it returns errExports.
func (s slots) acquire(ctx context.Context, wait time.Duration) (release func(), err error) {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case s <- struct{}{}:
		return func() { <-s }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-timer.C:
		return nil, errExports
	}
}

//nolint:revive // name of the generated interface
func (s *catalogs) AllocateIds(ctx context.Context, req *pb.AllocateIdsRequest) (*pb.AllocateIdsResponse, error) {
	tok := requestToken(callOf(ctx).principal, "AllocateIds", req)
	if want := req.GetReserve(); want != nil {
		if err := s.catalog.ReserveIDs(ctx, tok,
			catalog.IDRange{First: want.GetFirst(), Count: want.GetCount()}); err != nil {
			return nil, err
		}
		return &pb.AllocateIdsResponse{Ids: &pb.IdRange{First: want.GetFirst(), Count: want.GetCount()}}, nil
	}
	if want := req.GetRelease(); want != nil {
		ids, err := s.catalog.ReleaseIDs(ctx, tok, catalog.IDRange{First: want.GetFirst(), Count: want.GetCount()})
		if err != nil {
			return nil, err
		}
		return &pb.AllocateIdsResponse{Ids: &pb.IdRange{First: ids.First, Count: ids.Count}}, nil
	}
	ids, err := s.catalog.AllocateIDs(ctx, tok, req.GetCount())
	if err != nil {
		return nil, err
	}
	return &pb.AllocateIdsResponse{Ids: &pb.IdRange{First: ids.First, Count: ids.Count}}, nil
}

func (s *catalogs) CreateCollection(
	ctx context.Context, req *pb.CreateCollectionRequest,
) (*pb.CreateCollectionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "CreateCollection", req)
	col, err := s.catalog.CreateCollection(ctx, tok, collectionSpec(req))
	if err != nil {
		return nil, err
	}
	return &pb.CreateCollectionResponse{Collection: collectionToProto(&col)}, nil
}

func (s *catalogs) GetCollection(ctx context.Context, req *pb.GetCollectionRequest) (*pb.GetCollectionResponse, error) {
	col, err := s.catalog.Collection(ctx, collectionRef(req.GetCollection()))
	if err != nil {
		return nil, err
	}
	return &pb.GetCollectionResponse{Collection: collectionToProto(&col)}, nil
}

func (s *catalogs) ListCollections(
	ctx context.Context, req *pb.ListCollectionsRequest,
) (*pb.ListCollectionsResponse, error) {
	const method = "ListCollections"
	filters := filterHash(req)
	var after int64
	if token := req.GetPageToken(); token != "" && !s.tokens.open(token, method, filters, &after) {
		return nil, errPageToken
	}
	f := catalog.ListFilter{DB: req.GetDb(), States: convert(req.GetStates(), collectionStateFromProto)}
	list, more, err := s.catalog.ListCollections(ctx, f, after, pageSize(req.GetPageSize()))
	if err != nil {
		return nil, err
	}
	resp, page := &pb.ListCollectionsResponse{}, newPage(req.GetPageSize())
	for i := range list {
		out := collectionToProto(&list[i])
		out.Schema.SchemaRaw = nil
		if !page.add(out) {
			more = true
			break
		}
		resp.Collections = append(resp.Collections, out)
	}
	if n := len(resp.GetCollections()); more && n > 0 {
		resp.NextPageToken = s.tokens.seal(method, filters, list[n-1].ID)
	}
	return resp, nil
}

func (s *catalogs) UpdateCollection(
	ctx context.Context, req *pb.UpdateCollectionRequest,
) (*pb.UpdateCollectionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "UpdateCollection", req)
	var patch catalog.Patch
	for _, path := range req.GetUpdateMask().GetPaths() {
		switch path {
		case "properties":
			patch.Properties = new(req.GetProperties())
		case "attributes":
			patch.Attributes = new(req.GetAttributes())
		case "consistency_level":
			patch.Consistency = new(req.GetConsistencyLevel())
		}
	}
	col, err := s.catalog.UpdateCollection(ctx, tok, collectionRef(req.GetCollection()), req.GetExpectedRevision(), patch)
	if err != nil {
		return nil, err
	}
	return &pb.UpdateCollectionResponse{Collection: collectionToProto(&col)}, nil
}

func (s *catalogs) RenameCollection(
	ctx context.Context, req *pb.RenameCollectionRequest,
) (*pb.RenameCollectionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "RenameCollection", req)
	to := req.GetNewName()
	col, err := s.catalog.RenameCollection(ctx, tok, collectionRef(req.GetCollection()), dbName(to.GetDb()), to.GetName())
	if err != nil {
		return nil, err
	}
	return &pb.RenameCollectionResponse{Collection: collectionToProto(&col)}, nil
}

func (s *catalogs) DropCollection(
	ctx context.Context, req *pb.DropCollectionRequest,
) (*pb.DropCollectionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "DropCollection", req)
	id, err := s.catalog.DropCollection(ctx, tok, collectionRef(req.GetCollection()), req.GetExpectedId())
	if err != nil {
		return nil, err
	}
	return &pb.DropCollectionResponse{CollectionId: id}, nil
}

func (s *catalogs) CreatePartition(
	ctx context.Context, req *pb.CreatePartitionRequest,
) (*pb.CreatePartitionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "CreatePartition", req)
	p, err := s.catalog.CreatePartition(ctx, tok, collectionRef(req.GetCollection()), catalog.Partition{
		ID: req.GetId(), Name: req.GetName(), Attributes: req.GetAttributes(),
	})
	if err != nil {
		return nil, err
	}
	return &pb.CreatePartitionResponse{Partition: partitionToProto(p)}, nil
}

func (s *catalogs) ListPartitions(
	ctx context.Context, req *pb.ListPartitionsRequest,
) (*pb.ListPartitionsResponse, error) {
	resp, page := &pb.ListPartitionsResponse{}, wholePage(req.GetPageSize())
	next, err := s.listPage(ctx, "ListPartitions", req, func(collection, after int64) (last int64, more bool, err error) {
		more, err = s.catalog.Partitions(ctx, collection, after, func(p catalog.Partition) bool {
			out := partitionToProto(p)
			if !page.add(out) {
				return false
			}
			last, resp.Partitions = p.ID, append(resp.Partitions, out)
			return true
		})
		return last, more, err
	})
	if err != nil {
		return nil, err
	}
	resp.NextPageToken = next
	notePartialList(ctx, req.GetPageSize(), req.GetPageToken(), next, "partitions of the collection")
	return resp, nil
}

// listPage implements ListPartitions and ListIndexes: read reads a page of a collection
// with the ids above after, and returns its last id and whether there are more. listPage
// returns the token of the next page.
func (s *catalogs) listPage(ctx context.Context, method string, req interface {
	proto.Message
	GetCollection() *pb.CollectionRef
	GetPageToken() string
}, read func(collection, after int64) (last int64, more bool, err error),
) (string, error) {
	filters := filterHash(req)
	ref := collectionRef(req.GetCollection())
	var after int64
	if token := req.GetPageToken(); token != "" {
		ref = catalog.Ref{} // the first page has resolved the name
		if !s.tokens.open(token, method, filters, &ref.ID, &after) {
			return "", errPageToken
		}
	}
	col, err := s.catalog.Collection(ctx, ref)
	if err != nil {
		return "", err
	}
	last, more, err := read(col.ID, after)
	if err != nil || !more {
		return "", err
	}
	return s.tokens.seal(method, filters, col.ID, last), nil
}

func (s *catalogs) DropPartition(ctx context.Context, req *pb.DropPartitionRequest) (*pb.DropPartitionResponse, error) {
	tok := requestToken(callOf(ctx).principal, "DropPartition", req)
	id, err := s.catalog.DropPartition(ctx, tok, collectionRef(req.GetCollection()), req.GetName())
	if err != nil {
		return nil, err
	}
	return &pb.DropPartitionResponse{PartitionId: id}, nil
}

func (s *catalogs) CreateIndex(ctx context.Context, req *pb.CreateIndexRequest) (*pb.CreateIndexResponse, error) {
	tok := requestToken(callOf(ctx).principal, "CreateIndex", req)
	x, err := s.catalog.CreateIndex(ctx, tok, collectionRef(req.GetCollection()), catalog.Index{
		ID: req.GetId(), Name: req.GetName(), Field: req.GetFieldId(), TypeParams: req.GetTypeParams(),
		IndexParams: req.GetIndexParams(), Attributes: req.GetAttributes(),
	})
	if err != nil {
		return nil, err
	}
	return &pb.CreateIndexResponse{Index: indexToProto(x)}, nil
}

func (s *catalogs) ListIndexes(ctx context.Context, req *pb.ListIndexesRequest) (*pb.ListIndexesResponse, error) {
	resp, page := &pb.ListIndexesResponse{}, wholePage(req.GetPageSize())
	next, err := s.listPage(ctx, "ListIndexes", req, func(collection, after int64) (last int64, more bool, err error) {
		more, err = s.catalog.Indexes(ctx, collection, after, func(x catalog.Index) bool {
			out := indexToProto(x)
			if !page.add(out) {
				return false
			}
			last, resp.Indexes = x.ID, append(resp.Indexes, out)
			return true
		})
		return last, more, err
	})
	if err != nil {
		return nil, err
	}
	resp.NextPageToken = next
	notePartialList(ctx, req.GetPageSize(), req.GetPageToken(), next, "indexes of the collection")
	return resp, nil
}

func (s *catalogs) DropIndex(ctx context.Context, req *pb.DropIndexRequest) (*pb.DropIndexResponse, error) {
	tok := requestToken(callOf(ctx).principal, "DropIndex", req)
	id, err := s.catalog.DropIndex(ctx, tok, collectionRef(req.GetCollection()), req.GetName())
	if err != nil {
		return nil, err
	}
	return &pb.DropIndexResponse{IndexId: id}, nil
}

func (s *catalogs) AddSegments(stream grpc.ClientStreamingServer[pb.AddSegmentsRequest, pb.AddSegmentsResponse]) error {
	ctx := stream.Context()
	resp := &pb.AddSegmentsResponse{}
	for {
		req, err := stream.Recv()
		if errors.Is(err, io.EOF) && resp.GetCollectionId() != 0 {
			return stream.SendAndClose(resp)
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		if resp.GetCollectionId() == 0 {
			if req.GetCollection() == nil {
				return &catalog.InvalidError{Field: "collection", Problem: "is required in the first message"}
			}
			// Resolved once: a rename during the stream changes nothing.
			if resp.CollectionId, err = s.catalog.Resolve(ctx, collectionRef(req.GetCollection())); err != nil {
				return err
			}
		}
		added, present, err := s.catalog.AddSegments(ctx, resp.GetCollectionId(),
			convert(req.GetSegments(), segmentFromProto))
		if err != nil {
			return err
		}
		resp.Added += int64(added)
		resp.Present += int64(present)
	}
}

func (s *catalogs) GetSegment(ctx context.Context, req *pb.GetSegmentRequest) (*pb.GetSegmentResponse, error) {
	seg, revision, err := s.catalog.Segment(ctx, collectionRef(req.GetCollection()), req.GetSegmentId())
	if err != nil {
		return nil, err
	}
	return &pb.GetSegmentResponse{Segment: segmentToProto(&seg), Revision: revision}, nil
}

func (s *catalogs) ExportSegments(
	req *pb.ExportSegmentsRequest, stream grpc.ServerStreamingServer[pb.ExportSegmentsResponse],
) error {
	ctx := stream.Context()
	release, err := s.exports.acquire(ctx, exportWait)
	if err != nil {
		return err
	}
	defer release()
	id, err := s.catalog.Resolve(ctx, collectionRef(req.GetCollection()))
	if err != nil {
		return err
	}
	view, err := s.catalog.At(ctx, id, 0)
	if err != nil {
		return err
	}
	if err := view.Collection.CheckActive(); err != nil {
		return err
	}
	msg, page := &pb.ExportSegmentsResponse{CatalogRevision: view.Revision}, newPage(maxPage)
	_, err = s.catalog.ScanSegments(ctx, id, view.Revision, func(batch []segment.Segment) error {
		for i := range batch {
			out := segmentToProto(&batch[i])
			if !page.add(out) {
				if err := stream.Send(msg); err != nil {
					return err
				}
				msg, page = &pb.ExportSegmentsResponse{CatalogRevision: view.Revision}, newPage(maxPage)
				page.add(out)
			}
			msg.Segments = append(msg.Segments, out)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return stream.Send(msg) // an empty message still has the revision
}

func (s *catalogs) UpdateSegments(
	ctx context.Context, req *pb.UpdateSegmentsRequest,
) (*pb.UpdateSegmentsResponse, error) {
	tok := requestToken(callOf(ctx).principal, "UpdateSegments", req)
	revision, err := s.catalog.Change(ctx, tok, collectionRef(req.GetCollection()), catalog.SegmentChange{
		Update:      convert(req.GetUpdates(), updateFromProto),
		Checkpoints: convert(req.GetCheckpoints(), checkpointFromProto),
	})
	if err != nil {
		return nil, err
	}
	return &pb.UpdateSegmentsResponse{CatalogRevision: revision}, nil
}

func (s *catalogs) CompactSegments(
	ctx context.Context, req *pb.CompactSegmentsRequest,
) (*pb.CompactSegmentsResponse, error) {
	tok := requestToken(callOf(ctx).principal, "CompactSegments", req)
	revision, err := s.catalog.Change(ctx, tok, collectionRef(req.GetCollection()), catalog.SegmentChange{
		Drop:   req.GetInputs(),
		Add:    convert(req.GetOutputs(), segmentFromProto),
		Update: convert(req.GetUpdates(), updateFromProto),
	})
	if err != nil {
		return nil, err
	}
	return &pb.CompactSegmentsResponse{CatalogRevision: revision}, nil
}

func (s *catalogs) DropSegments(ctx context.Context, req *pb.DropSegmentsRequest) (*pb.DropSegmentsResponse, error) {
	n, err := s.catalog.DropSegments(ctx, collectionRef(req.GetCollection()), req.GetSegmentIds())
	if err != nil {
		return nil, err
	}
	return &pb.DropSegmentsResponse{Dropped: int64(n)}, nil
}

func (s *catalogs) SetCheckpoints(
	ctx context.Context, req *pb.SetCheckpointsRequest,
) (*pb.SetCheckpointsResponse, error) {
	revision, err := s.catalog.SetCheckpoints(ctx, collectionRef(req.GetCollection()),
		convert(req.GetCheckpoints(), checkpointFromProto))
	if err != nil {
		return nil, err
	}
	return &pb.SetCheckpointsResponse{CatalogRevision: revision}, nil
}

func (s *catalogs) ListCheckpoints(
	ctx context.Context, req *pb.ListCheckpointsRequest,
) (*pb.ListCheckpointsResponse, error) {
	list, err := s.catalog.Checkpoints(ctx, collectionRef(req.GetCollection()))
	if err != nil {
		return nil, err
	}
	return &pb.ListCheckpointsResponse{Checkpoints: convert(list, checkpointToProto)}, nil
}
