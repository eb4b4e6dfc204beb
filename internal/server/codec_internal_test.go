package server

import (
	"errors"
	"runtime"
	"strconv"
	"testing"

	"buf.build/go/protovalidate"
	"go.uber.org/zap"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// receive decodes and validates m as the server does. It returns the error and the
// allocated bytes.
//
//nolint:revive,staticcheck // the error is the result
func receive(t *testing.T, m proto.Message) (err error, bytes uint64) {
	t.Helper()
	validator, err := newValidator()
	if err != nil {
		t.Fatal(err)
	}
	s := &Server{log: zap.NewNop(), validator: validator}
	wire, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	got := m.ProtoReflect().New().Interface()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, got); err != nil {
		t.Fatal(err)
	}
	err = s.validate(got)
	runtime.ReadMemStats(&after)
	return err, after.TotalAlloc - before.TotalAlloc
}

// updateOf returns an update that adds files.
func updateOf(files int, f *pb.File) *pb.UpdateSegmentsRequest {
	u := &pb.SegmentUpdate{SegmentId: 1}
	for range files {
		u.AddFiles = append(u.AddFiles, f)
	}
	return &pb.UpdateSegmentsRequest{
		Collection: &pb.CollectionRef{Ref: &pb.CollectionRef_Id{Id: 1}},
		Updates:    []*pb.SegmentUpdate{u},
	}
}

// TestManyElementsAreRefusedCheaply refuses a message of a million nested elements without
// decoding it, and one of many elements at the first violation.
func TestManyElementsAreRefusedCheaply(t *testing.T) {
	many := updateOf(1_000_000, &pb.File{})
	many.Updates = append(many.Updates, many.Updates[0]) // the position of the elements must not matter
	if err, bytes := receive(t, many); !errors.Is(err, errTooMany) || bytes > 1<<20 {
		t.Errorf("a million: %v, %d bytes", err, bytes)
	}
	var broken *protovalidate.ValidationError
	err, bytes := receive(t, updateOf(100_000, &pb.File{}))
	if !errors.As(err, &broken) || len(broken.Violations) != 1 || bytes > 64<<20 {
		t.Errorf("a hundred thousand: %v, %d bytes", err, bytes)
	}
	if err, _ := receive(t, updateOf(3, &pb.File{})); !errors.As(err, &broken) || len(broken.Violations) < 3 {
		t.Errorf("three: %v", err)
	}
	page := &pb.Collection{Properties: map[string]string{}}
	for i := range 2 * maxElements {
		page.Properties[strconv.Itoa(i)] = ""
	}
	if err, _ := receive(t, page); !errors.Is(err, errTooMany) {
		t.Errorf("a map: %v", err)
	}
	ids := &pb.CompactSegmentsRequest{Inputs: make([]int64, maxElements+1)}
	if err, _ := receive(t, ids); !errors.Is(err, errTooMany) {
		t.Errorf("a packed list: %v", err)
	}
}

// TestCountOnTheWire counts the same elements in the encoded and in the decoded message.
func TestCountOnTheWire(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		strings := func(name string) []string { return rapid.SliceOfN(rapid.StringN(0, 5, -1), 0, 9).Draw(t, name) }
		seg := &pb.Segment{Id: 7, Attributes: map[string]string{}, StartPosition: &pb.Position{Timestamp: 3}}
		for _, s := range strings("attributes") {
			seg.Attributes[s] = s
		}
		for _, s := range strings("files") {
			seg.Files = append(seg.Files, &pb.File{Path: s})
		}
		for _, s := range strings("builds") {
			seg.IndexBuilds = append(seg.IndexBuilds, &pb.IndexBuild{Id: 1, Files: []*pb.File{{Path: s}, {}}})
		}
		for _, m := range []proto.Message{
			&pb.CompactSegmentsRequest{Inputs: rapid.SliceOf(rapid.Int64()).Draw(t, "inputs"), Outputs: []*pb.Segment{seg, seg}},
			&pb.CreateCollectionRequest{Channels: strings("channels"), Properties: seg.GetAttributes()},
			&pb.ListSnapshotsRequest{States: make([]pb.Snapshot_State, rapid.IntRange(0, 9).Draw(t, "states"))},
		} {
			wire, err := proto.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			d := m.ProtoReflect().Descriptor()
			if onWire, decoded := countEncoded(1000, wire, d, 0), countDecoded(1000, m.ProtoReflect()); onWire != decoded {
				t.Fatalf("%s: %d left on the wire, %d decoded", d.Name(), onWire, decoded)
			}
			got := m.ProtoReflect().New()
			if err := newCodec().Unmarshal(mem.BufferSlice{mem.SliceBuffer(wire)}, got.Interface()); err != nil ||
				!proto.Equal(m, got.Interface()) {
				t.Fatalf("decoded: %v, %v", got, err)
			}
		}
	})
}

// FuzzCountEncoded counts the elements of any bytes.
func FuzzCountEncoded(f *testing.F) {
	wire, err := proto.Marshal(updateOf(2, &pb.File{Path: "p"}))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Fuzz(func(t *testing.T, b []byte) {
		m := &pb.CompactSegmentsRequest{}
		left := countEncoded(1<<20, b, m.ProtoReflect().Descriptor(), 0)
		if left > 1<<20 || left < 1<<20-len(b) {
			t.Errorf("%d left of %d bytes", left, len(b))
		}
		if proto.Unmarshal(b, m) == nil && countDecoded(1<<20, m.ProtoReflect()) < left {
			t.Errorf("more elements than counted: %v", m)
		}
	})
}
