package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// TestBadInput sends invalid requests to many methods. Each is refused and writes
// nothing.
func TestBadInput(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	col := e.collection(t, "c")
	id := e.ids(t, 100)
	e.addSegments(t, byID(col.GetId()), &pb.Segment{Id: id})

	type call struct {
		name  string
		send  func() error
		code  codes.Code
		field string // first violated field; empty: not checked
	}
	create := func(name string) func() error {
		return func() error {
			_, err := e.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{Collection: byID(col.GetId()), Name: name})
			return err
		}
	}
	createCollection := func(edit func(*pb.CreateCollectionRequest)) func() error {
		return func() error {
			req := &pb.CreateCollectionRequest{Name: &pb.CollectionName{Name: "n"}, Roots: []*pb.Root{{Prefix: "n/"}}}
			edit(req)
			_, err := e.catalog.CreateCollection(ctx, req)
			return err
		}
	}
	add := func(s *pb.Segment) func() error {
		return func() error {
			_, err := e.tryAdd(ctx, &pb.AddSegmentsRequest{Collection: byID(col.GetId()), Segments: []*pb.Segment{s}})
			return err
		}
	}
	var calls []call
	for _, name := range []string{
		"", " ", " a", "a ", "a/b", "..", ".", "-a", "a\x00", "a\nb", "ａ", "é", "e\u0301", "a\u200bb", "\u202ea", "😀",
		"%2e%2e", `a\b`,
		strings.Repeat("a", 256), strings.Repeat("a", 1<<20),
	} {
		label := fmt.Sprintf("%.20q", name)
		calls = append(calls,
			call{"snapshot name " + label, create(name), codes.InvalidArgument, "name"},
			call{
				"collection name " + label, createCollection(func(r *pb.CreateCollectionRequest) { r.Name.Name = name }),
				codes.InvalidArgument, "name.name",
			},
			call{"partition name " + label, func() error {
				_, err := e.catalog.CreatePartition(ctx, &pb.CreatePartitionRequest{Collection: byID(col.GetId()), Name: name})
				return err
			}, codes.InvalidArgument, "name"},
			call{"new name " + label, func() error {
				_, err := e.catalog.RenameCollection(ctx,
					&pb.RenameCollectionRequest{Collection: byID(col.GetId()), NewName: &pb.CollectionName{Name: name}})
				return err
			}, codes.InvalidArgument, "new_name.name"},
			call{"get snapshot " + label, func() error {
				_, err := e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapNamed(name)})
				return err
			}, codes.InvalidArgument, "snapshot.name"},
		)
		if name != "" {
			calls = append(calls, call{
				"db " + label,
				createCollection(func(r *pb.CreateCollectionRequest) { r.Name.Db = name }), codes.InvalidArgument, "name.db",
			})
		}
	}
	for _, id := range []int64{0, -1, -1 << 63} {
		calls = append(calls,
			call{fmt.Sprint("snapshot id ", id), func() error {
				_, err := e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: snapID(id)})
				return err
			}, codes.InvalidArgument, "snapshot.id"},
			call{fmt.Sprint("drop id ", id), func() error {
				_, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapID(id)})
				return err
			}, codes.InvalidArgument, "snapshot.id"},
			call{fmt.Sprint("collection id ", id), func() error {
				_, err := e.catalog.DropCollection(ctx, &pb.DropCollectionRequest{Collection: byID(id)})
				return err
			}, codes.InvalidArgument, "collection.id"},
			call{fmt.Sprint("segment id ", id), add(&pb.Segment{Id: id}), codes.InvalidArgument, "segments[0].id"},
			call{fmt.Sprint("ids ", id), func() error {
				_, err := e.catalog.AllocateIds(ctx, &pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: id}})
				return err
			}, codes.InvalidArgument, "count"},
			call{fmt.Sprint("drop segment ", id), func() error {
				_, err := e.catalog.DropSegments(ctx,
					&pb.DropSegmentsRequest{Collection: byID(col.GetId()), SegmentIds: []int64{id}})
				return err
			}, codes.InvalidArgument, "segment_ids[0]"},
		)
	}
	inputs := make([]int64, 61)
	for i := range inputs {
		inputs[i] = id + int64(i)
	}
	calls = append(calls,
		call{
			"no snapshot", func() error { _, err := e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{}); return err },
			codes.InvalidArgument, "snapshot",
		},
		call{"empty ref", func() error {
			_, err := e.snapshots.GetSnapshot(ctx, &pb.GetSnapshotRequest{Snapshot: &pb.SnapshotRef{}})
			return err
		}, codes.InvalidArgument, "snapshot.ref"},
		call{"negative page", func() error {
			_, err := e.snapshots.ListSnapshots(ctx, &pb.ListSnapshotsRequest{PageSize: -1})
			return err
		}, codes.InvalidArgument, "page_size"},
		call{"61 inputs", func() error {
			_, err := e.catalog.CompactSegments(ctx, &pb.CompactSegmentsRequest{Collection: byID(col.GetId()), Inputs: inputs})
			return err
		}, codes.InvalidArgument, ""},
		call{"60 inputs and an output", func() error {
			_, err := e.catalog.CompactSegments(ctx, &pb.CompactSegmentsRequest{
				Collection: byID(col.GetId()), Inputs: inputs[:60], Outputs: []*pb.Segment{{Id: id + 90}},
			})
			return err
		}, codes.InvalidArgument, ""},
		call{"unknown field in mask", func() error {
			_, err := e.snapshots.UpdateSnapshot(ctx,
				&pb.UpdateSnapshotRequest{Snapshot: snapNamed("s"), UpdateMask: &fieldmaskpb.FieldMask{Paths: []string{"name"}}})
			return err
		}, codes.InvalidArgument, "update_mask"},
		call{"token with space", func() error {
			_, err := e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s"), RequestToken: "a b"})
			return err
		}, codes.InvalidArgument, "request_token"},
		call{
			"unknown store", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Store = "elsewhere" }),
			codes.InvalidArgument, "roots[0].store",
		},
		call{
			"own prefix", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Prefix = "snapshots/" }),
			codes.InvalidArgument, "roots[0].prefix",
		},
		call{
			"absolute prefix", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots[0].Prefix = "/x/" }),
			codes.InvalidArgument, "roots[0].prefix",
		},
		call{
			"unknown layout", createCollection(func(r *pb.CreateCollectionRequest) { r.Layout = 77 }),
			codes.InvalidArgument, "layout",
		},
		call{
			"no roots", createCollection(func(r *pb.CreateCollectionRequest) { r.Roots = nil }), codes.InvalidArgument,
			"roots",
		},
		call{"expiry in the past", func() error {
			_, err := e.snapshots.CreateSnapshot(ctx, &pb.CreateSnapshotRequest{
				Collection: byID(col.GetId()), Name: "s",
				Expiry: &pb.CreateSnapshotRequest_ExpireTime{ExpireTime: timestamppb.New(time.Unix(1, 0))},
			})
			return err
		}, codes.InvalidArgument, "expire_time"},
		call{
			"no collection in a stream", func() error { _, err := e.tryAdd(ctx, &pb.AddSegmentsRequest{}); return err },
			codes.InvalidArgument, "collection",
		},
		call{"an empty stream", func() error { _, err := e.tryAdd(ctx); return err }, codes.InvalidArgument, "collection"},
		call{"unallocated id", add(&pb.Segment{Id: 1 << 50}), codes.FailedPrecondition, ""},
		call{"duplicate id", add(&pb.Segment{Id: id, Rows: 5, State: pb.Segment_STATE_GROWING}), codes.AlreadyExists, ""},
		call{"rows without a file", add(&pb.Segment{Id: id + 1, Rows: 5}), codes.InvalidArgument, "segments[0].files"},
		call{"unknown shard", add(&pb.Segment{Id: id + 1, Shard: 1}), codes.InvalidArgument, "segments[0].shard"},
		call{
			"dropped state", add(&pb.Segment{Id: id + 1, State: pb.Segment_STATE_DROPPED}), codes.InvalidArgument,
			"segments[0].state",
		},
		call{
			"negative size", add(&pb.Segment{Id: id + 1, Files: []*pb.File{{Path: "x", Kind: "insert", SizeBytes: -1}}}),
			codes.InvalidArgument, "segments[0].files[0].size_bytes",
		},
		call{"a message too large", func() error {
			_, err := e.catalog.CreateCollection(ctx,
				&pb.CreateCollectionRequest{ConsistencyLevel: strings.Repeat("x", 5<<20)})
			return err
		}, codes.ResourceExhausted, ""},
		call{"a message too large in a stream", func() error {
			_, err := e.tryAdd(ctx, &pb.AddSegmentsRequest{Segments: []*pb.Segment{{EngineData: make([]byte, 5<<20)}}})
			return err
		}, codes.ResourceExhausted, ""},
		call{"metadata too large", func() error {
			_, err := e.admin.GetServerInfo(metadata.AppendToOutgoingContext(ctx, "x", strings.Repeat("y", 10<<20)),
				&pb.GetServerInfoRequest{})
			return err
		}, codes.Internal, ""}, // from gRPC itself
		call{
			"key without slash", func() error { _, err := e.admin.GetKey(ctx, &pb.GetKeyRequest{Key: "x"}); return err },
			codes.InvalidArgument, "key",
		},
		call{
			"unknown key", func() error { _, err := e.admin.GetKey(ctx, &pb.GetKeyRequest{Key: "/x"}); return err },
			codes.NotFound, "",
		},
	)
	for _, path := range []string{
		"/abs", "../x", "a/../b", "a//b", "a/", `a\b`, "a\x00b", "a\nb", ".",
		strings.Repeat("x", 1025),
	} {
		calls = append(calls, call{
			fmt.Sprintf("path %.20q", path), add(&pb.Segment{Id: id + 1, Files: []*pb.File{{Path: path, Kind: "insert"}}}),
			codes.InvalidArgument, "segments[0].files[0].path",
		})
	}
	for _, c := range calls {
		t.Run(c.name, func(t *testing.T) {
			before := e.revision(t)
			err := c.send()
			if c.name == "metadata too large" && err != nil {
				return // the error of gRPC varies
			}
			if status.Code(err) != c.code || err == nil {
				t.Errorf("got %v, want %v", err, c.code)
			}
			if reason(err) == "" {
				t.Error("no reason")
			}
			if got := fields(err); c.field != "" && (len(got) == 0 || got[0] != c.field) {
				t.Errorf("fields %q of %v, want %q", got, err, c.field)
			}
			if n := len(status.Convert(err).Message()); n > 3000 {
				t.Errorf("%d bytes of message", n)
			}
			if after := e.revision(t); after != before {
				t.Errorf("written: revision %d, before %d", after, before)
			}
		})
	}
}

// TestMalformed sends messages that gRPC itself refuses.
func TestMalformed(t *testing.T) {
	e := newEnv(t)
	before := e.revision(t)
	for _, data := range [][]byte{{0x12, 2, 0xff, 0xfe}, {0x0a, 0x7f}, make([]byte, 20<<20)} {
		raw := &rawMessage{data: data}
		err := e.conn.Invoke(t.Context(), pb.SnapshotService_CreateSnapshot_FullMethodName, raw,
			&pb.CreateSnapshotResponse{}, grpc.ForceCodec(raw))
		if code := status.Code(err); code != codes.Internal && code != codes.ResourceExhausted {
			t.Errorf("got %v", err)
		}
	}
	if after := e.revision(t); after != before {
		t.Errorf("written: revision %d, before %d", after, before)
	}
}

// rawMessage sends bytes unchanged.
type rawMessage struct{ data []byte }

func (m *rawMessage) Marshal(any) ([]byte, error) { return m.data, nil }

func (m *rawMessage) Unmarshal(b []byte, v any) error { return proto.Unmarshal(b, v.(proto.Message)) }

func (m *rawMessage) Name() string { return "proto" }

// TestReserveNotAllowed refuses to reserve ids unless the configuration allows it.
func TestReserveNotAllowed(t *testing.T) {
	e := newEnv(t)
	for _, want := range []*pb.AllocateIdsRequest{
		{Want: &pb.AllocateIdsRequest_Reserve{Reserve: &pb.IdRange{First: 1000, Count: 10}}},
		{Want: &pb.AllocateIdsRequest_Release{Release: &pb.IdRange{First: 1000, Count: 10}}},
	} {
		if _, err := e.catalog.AllocateIds(t.Context(), want); reason(err) != "RESERVE_NOT_ALLOWED" ||
			status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%v: %v", want, err)
		}
	}
}

// TestTooManyElements refuses a message with too many nested elements with a reason, also
// in a stream.
func TestTooManyElements(t *testing.T) {
	e := newEnv(t)
	seg := &pb.Segment{Id: 1}
	for range 1_000_000 {
		seg.Files = append(seg.Files, &pb.File{})
	}
	ref := byID(1)
	_, unaryErr := e.catalog.CompactSegments(t.Context(),
		&pb.CompactSegmentsRequest{Collection: ref, Inputs: []int64{1}, Outputs: []*pb.Segment{seg}})
	_, streamErr := e.tryAdd(t.Context(), &pb.AddSegmentsRequest{Collection: ref, Segments: []*pb.Segment{seg}})
	for _, err := range []error{unaryErr, streamErr} {
		if reason(err) != "MESSAGE_TOO_LARGE" || status.Code(err) != codes.ResourceExhausted {
			t.Errorf("%v", err)
		}
	}
}
