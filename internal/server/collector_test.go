package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// all returns the messages of a stream, which may be nil with an error.
func all[M any](stream grpc.ServerStreamingClient[M], err error) ([]*M, error) {
	if err != nil {
		return nil, err
	}
	var list []*M
	for {
		msg, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return list, err
		}
		list = append(list, msg)
	}
}

// collect runs a round and returns its items in order and the summary, which only the
// last message has.
func collect(
	t *testing.T, c pb.CollectorServiceClient, req *pb.CollectRequest,
) ([]*pb.CollectItem, *pb.CollectSummary) {
	t.Helper()
	msgs, err := all(c.Collect(t.Context(), req))
	if err != nil {
		t.Fatal(err, status.Convert(err).Details())
	}
	var items []*pb.CollectItem
	for i, m := range msgs {
		if (m.GetSummary() != nil) != (i == len(msgs)-1) {
			t.Errorf("message %d of %d: summary %v", i+1, len(msgs), m.GetSummary())
		}
		if len(m.GetItems()) > 256 {
			t.Errorf("a message of %d items", len(m.GetItems()))
		}
		if len(m.GetItems()) > 1 && proto.Size(m) > 1<<20 {
			t.Errorf("a message of %d bytes", proto.Size(m))
		}
		items = append(items, m.GetItems()...)
	}
	return items, msgs[len(msgs)-1].GetSummary()
}

// put writes an object past snapshotd.
func (e *env) put(t *testing.T, key string, size int) {
	t.Helper()
	if _, err := e.objects.Put(t.Context(), key, make([]byte, size)); err != nil {
		t.Fatal(err)
	}
}

func (e *env) exists(t *testing.T, key string) bool {
	t.Helper()
	_, err := e.objects.Head(t.Context(), key)
	return err == nil
}

// setBehind records that the metadata store is behind.
func (e *env) setBehind(t *testing.T) {
	t.Helper()
	empty := []byte{1 << 3, 1} // a record of format 1
	if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(keys.RolledBack, empty)}}); err != nil {
		t.Fatal(err)
	}
}

func TestCollect(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	collector := pb.NewCollectorServiceClient(e.conn)
	col := e.collection(t, "c")
	of := byID(col.GetId())
	first := e.ids(t, 400)
	var free []int64
	for i := range int64(300) {
		path := fmt.Sprintf("%d/0/%d/x", of.GetId(), first+i)
		e.put(t, "data/c/"+path, 10)
		e.addSegments(t, of, &pb.Segment{Id: first + i, Files: []*pb.File{{Path: path, Kind: "insert", SizeBytes: 10}}})
		free = append(free, first+i)
	}
	held := free[0]
	e.snapshot(t, "s")
	must[*pb.DropSegmentsResponse](t)(e.catalog.DropSegments(ctx,
		&pb.DropSegmentsRequest{Collection: of, SegmentIds: []int64{held}}))
	must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx, &pb.DropSnapshotRequest{Snapshot: snapNamed("s")}))
	must[*pb.DropSegmentsResponse](t)(e.catalog.DropSegments(ctx,
		&pb.DropSegmentsRequest{Collection: of, SegmentIds: free[1:290]}))

	// All units are younger than the tolerance.
	_, sum := collect(t, collector, &pb.CollectRequest{})
	if sum.GetGranted() != 0 || sum.GetWaiting() != 290 || sum.GetReplica() != "r1" ||
		sum.GetEndTime().AsTime().Before(sum.GetStartTime().AsTime()) {
		t.Errorf("got %v", sum)
	}
	now := durationpb.New(0)
	// The round would delete more than half of the collection.
	items, sum := collect(t, collector, &pb.CollectRequest{DryRun: true, Tolerance: now})
	if sum.GetStopCount() != 1 || sum.GetGranted() != 0 || len(sum.GetStops()) != 1 ||
		sum.GetStops()[0].GetCollectionId() != col.GetId() ||
		sum.GetStops()[0].GetDue() != 290 || sum.GetStops()[0].GetTotal() != 300 {
		t.Errorf("got %v", sum)
	}
	if !slices.ContainsFunc(items, func(i *pb.CollectItem) bool { return i.GetAction() == pb.CollectItem_ACTION_STOP }) {
		t.Errorf("no item reports the stop: %v", items)
	}
	if n := len(items); n != 291 { // the collection and each unit
		t.Errorf("%d items of a dry run", n)
	}
	e.put(t, fmt.Sprintf("snapshots/%d/%d/metadata.json", col.GetId(), e.ids(t, 1)), 7)
	_, sum = collect(t, collector, &pb.CollectRequest{Sweep: true})
	if sum.GetSwept() != 0 { // the object is too young
		t.Errorf("got %v", sum)
	}
	_, err := all(collector.Collect(ctx, &pb.CollectRequest{Sweep: true, Collection: of}))
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("a sweep of a collection: %v", err)
	}
	items, sum = collect(t, collector, &pb.CollectRequest{Collection: of, DryRun: true, Tolerance: now, Force: true})
	if sum.GetGranted() != 290 || sum.GetFiles() != 290 || sum.GetBytes() != 2900 || sum.GetStopCount() != 0 {
		t.Errorf("got %v", sum)
	}
	units := 0
	for _, i := range items {
		if i.GetKind() != pb.CollectItem_KIND_SEGMENT {
			continue
		}
		units++
		if i.GetAction() != pb.CollectItem_ACTION_DELETE || i.GetReason() == "" || i.GetCollectionId() != col.GetId() ||
			i.GetDropTime() == nil ||
			len(i.GetObjects()) != 1 || i.GetObjects()[0].GetStore() != "default" ||
			i.GetObjects()[0].GetKey() != fmt.Sprintf("data/c/%d/0/%d/x", of.GetId(), i.GetId()) ||
			i.GetObjects()[0].GetSize() != 10 {
			t.Errorf("got %v", i)
		}
	}
	if units != 290 {
		t.Errorf("%d units reported", units)
	}
	if !e.exists(t, fmt.Sprintf("data/c/%d/0/%d/x", of.GetId(), first+1)) {
		t.Error("a dry run deleted an object")
	}
	_, sum = collect(t, collector, &pb.CollectRequest{Collection: byName("c"), Tolerance: now, Force: true, Wait: true})
	if sum.GetGranted() != 290 {
		t.Errorf("got %v", sum)
	}
	for i, id := range free {
		if there := e.exists(t, fmt.Sprintf("data/c/%d/0/%d/x", of.GetId(), id)); there != (i >= 290) {
			t.Errorf("file %d exists: %v", i, there)
		}
	}
	got := must[*pb.GetCollectorStatusResponse](t)(collector.GetCollectorStatus(ctx, &pb.GetCollectorStatusRequest{}))
	if !got.GetEnabled() || got.GetTolerance().AsDuration() != 3*time.Hour || got.GetMaxShare() != 0.5 ||
		got.GetDeleting() != 0 || got.GetBlocked() != "" {
		t.Errorf("got %v", got)
	}
}

// TestCollectWaits has a wait end with the call.
func TestCollectWaits(t *testing.T) {
	e := newEnv(t)
	collector := pb.NewCollectorServiceClient(e.conn)
	of := byID(e.collection(t, "c").GetId())
	id := e.ids(t, 1)
	e.addSegments(t, of, &pb.Segment{
		Id:    id,
		Files: []*pb.File{{Path: fmt.Sprintf("%d/0/%d/x", of.GetId(), id), Kind: "insert"}},
	})
	must[*pb.DropSegmentsResponse](t)(e.catalog.DropSegments(t.Context(),
		&pb.DropSegmentsRequest{Collection: of, SegmentIds: []int64{id}}))
	e.objects.Freeze()
	defer e.objects.Thaw()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	msgs, err := all(collector.Collect(ctx, &pb.CollectRequest{Tolerance: durationpb.New(0), Wait: true}))
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("got %v, %v", msgs, err)
	}
	if got := must[*pb.GetCollectorStatusResponse](t)(collector.GetCollectorStatus(t.Context(),
		&pb.GetCollectorStatusRequest{})); got.GetDeleting() != 1 {
		t.Errorf("got %v", got)
	}
}

func TestOrphans(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	collector := pb.NewCollectorServiceClient(e.conn)
	col := e.collection(t, "c")
	of := byID(col.GetId())
	const many = 600
	var want []string
	for i := range many {
		key := fmt.Sprintf("data/c/stray/%d", i)
		e.put(t, key, 7)
		want = append(want, key)
	}
	id := e.ids(t, 1)
	e.put(t, fmt.Sprintf("data/c/%d/0/%d/x", of.GetId(), id), 7)
	e.addSegments(t, of, &pb.Segment{
		Id:    id,
		Files: []*pb.File{{Path: fmt.Sprintf("%d/0/%d/x", of.GetId(), id), Kind: "insert", SizeBytes: 7}},
	})
	msgs, err := all(collector.ListOrphans(ctx, &pb.ListOrphansRequest{Collection: of}))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range msgs {
		if n := len(m.GetOrphans()); n == 0 || n > 256 {
			t.Errorf("a message of %d", n)
		}
		for _, o := range m.GetOrphans() {
			got = append(got, o.GetKey())
			if o.GetStore() != "default" || o.GetSize() != 7 || o.GetReason() == "" || o.GetModTime() == nil ||
				o.GetAge() == nil || o.GetCollectionId() != col.GetId() {
				t.Errorf("got %v", o)
			}
		}
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("got %d orphans, want %d", len(got), len(want))
	}
	// The orphans are too young.
	deleted, err := all(collector.DeleteOrphans(ctx,
		&pb.DeleteOrphansRequest{Collection: of, Grace: durationpb.New(time.Hour)}))
	if err != nil || len(deleted) != 0 || !e.exists(t, want[0]) {
		t.Errorf("got %v, err = %v", deleted, err)
	}
	if _, err := all(collector.ListOrphans(ctx, &pb.ListOrphansRequest{})); err != nil {
		t.Error(err)
	}
}

func TestExplainObject(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	collector := pb.NewCollectorServiceClient(e.conn)
	of := byID(e.collection(t, "c").GetId())
	id := e.ids(t, 1)
	key := fmt.Sprintf("data/c/%d/0/%d/x", of.GetId(), id)
	e.put(t, key, 7)
	e.addSegments(t, of, &pb.Segment{
		Id:    id,
		Files: []*pb.File{{Path: fmt.Sprintf("%d/0/%d/x", of.GetId(), id), Kind: "insert", SizeBytes: 7}},
	})
	s := e.snapshot(t, "s")
	got := must[*pb.ExplainObjectResponse](t)(collector.ExplainObject(ctx, &pb.ExplainObjectRequest{Key: key}))
	if !got.GetExists() || !got.GetKept() || got.GetWhat() == "" || got.GetReason() == "" ||
		got.GetCollectionId() != of.GetId() || got.GetSegmentId() != id {
		t.Errorf("got %v", got)
	}
	own := fmt.Sprintf("snapshots/%d/%d/metadata.json", of.GetId(), s.GetId())
	got = must[*pb.ExplainObjectResponse](t)(collector.ExplainObject(ctx,
		&pb.ExplainObjectRequest{Key: own, Store: "default"}))
	if !got.GetExists() || !got.GetKept() || got.GetSnapshotId() != s.GetId() || got.GetCollectionId() != of.GetId() {
		t.Errorf("got %v", got)
	}
	got = must[*pb.ExplainObjectResponse](t)(collector.ExplainObject(ctx, &pb.ExplainObjectRequest{Key: "else/where"}))
	if got.GetExists() || got.GetReason() == "" {
		t.Errorf("got %v", got)
	}
}

func TestRecover(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	collector := pb.NewCollectorServiceClient(e.conn)
	of := byID(e.collection(t, "c").GetId())
	got := must[*pb.RecoverResponse](t)(collector.Recover(ctx, &pb.RecoverRequest{}))
	if got.GetWasBehind() || got.GetNextId() == 0 {
		t.Errorf("got %v", got)
	}
	e.setBehind(t)
	if got := must[*pb.GetCollectorStatusResponse](t)(collector.GetCollectorStatus(ctx,
		&pb.GetCollectorStatusRequest{})); !strings.Contains(got.GetBlocked(), "snapshotctl recover") {
		t.Errorf("got %v", got)
	}
	if _, err := e.catalog.AllocateIds(ctx,
		&pb.AllocateIdsRequest{Want: &pb.AllocateIdsRequest_Count{Count: 1}}); reason(
		err) != "METADATA_BEHIND" || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
	if msgs, err := all(collector.Collect(ctx, &pb.CollectRequest{Collection: of})); reason(err) != "METADATA_BEHIND" {
		t.Errorf("got %v, err = %v", msgs, err)
	}
	got = must[*pb.RecoverResponse](t)(collector.Recover(ctx, &pb.RecoverRequest{}))
	if !got.GetWasBehind() || got.GetNextId() <= got.GetSkippedFrom() {
		t.Errorf("got %v", got)
	}
	if id := e.ids(t, 1); id < got.GetNextId() {
		t.Errorf("got id %d, want %d", id, got.GetNextId())
	}
	if again := must[*pb.RecoverResponse](t)(collector.Recover(ctx, &pb.RecoverRequest{})); again.GetWasBehind() {
		t.Errorf("got %v", again)
	}
}

func TestBadCollects(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	collector := pb.NewCollectorServiceClient(e.conn)
	col := byID(e.collection(t, "c").GetId())
	collect := func(req *pb.CollectRequest) error { _, err := all(collector.Collect(ctx, req)); return err }
	explain := func(req *pb.ExplainObjectRequest) error { _, err := collector.ExplainObject(ctx, req); return err }
	list := func(ref *pb.CollectionRef) error {
		_, err := all(collector.ListOrphans(ctx, &pb.ListOrphansRequest{Collection: ref}))
		return err
	}
	remove := func(ref *pb.CollectionRef, grace *durationpb.Duration) error {
		_, err := all(collector.DeleteOrphans(ctx, &pb.DeleteOrphansRequest{Collection: ref, Grace: grace}))
		return err
	}
	hours := func(n time.Duration) *durationpb.Duration { return durationpb.New(n * time.Hour) }
	for name, c := range map[string]struct {
		err   error
		code  codes.Code
		field string
	}{
		"force of all": {collect(&pb.CollectRequest{Force: true}), codes.InvalidArgument, "force"},
		"tolerance below 0": {
			collect(&pb.CollectRequest{Tolerance: durationpb.New(-1)}), codes.InvalidArgument,
			"tolerance",
		},
		"tolerance too long": {
			collect(&pb.CollectRequest{Tolerance: hours(100_000)}), codes.InvalidArgument,
			"tolerance",
		},
		"no collection at all": {
			collect(&pb.CollectRequest{Collection: &pb.CollectionRef{}}), codes.InvalidArgument,
			"collection.ref",
		},
		"collection 0":     {collect(&pb.CollectRequest{Collection: byID(0)}), codes.InvalidArgument, "collection.id"},
		"other collection": {collect(&pb.CollectRequest{Collection: byName("d")}), codes.NotFound, ""},
		"other id":         {collect(&pb.CollectRequest{Collection: byID(1 << 40)}), codes.NotFound, ""},
		"no key":           {explain(&pb.ExplainObjectRequest{}), codes.InvalidArgument, "key"},
		"long key": {
			explain(&pb.ExplainObjectRequest{Key: strings.Repeat("k", 1025)}), codes.InvalidArgument,
			"key",
		},
		"store name": {
			explain(&pb.ExplainObjectRequest{Key: "k", Store: "../x"}), codes.InvalidArgument,
			"store",
		},
		"other store":             {explain(&pb.ExplainObjectRequest{Key: "k", Store: "none"}), codes.NotFound, ""},
		"invalid key":             {explain(&pb.ExplainObjectRequest{Key: "/a//b/../"}), codes.InvalidArgument, "key"},
		"orphans of another":      {list(byName("d")), codes.NotFound, ""},
		"deleted of another":      {remove(byName("d"), hours(24)), codes.NotFound, ""},
		"deleted of none":         {remove(nil, hours(24)), codes.InvalidArgument, "collection"},
		"deleted without grace":   {remove(col, nil), codes.InvalidArgument, "grace"},
		"deleted with too little": {remove(col, durationpb.New(time.Hour-1)), codes.InvalidArgument, "grace"},
		"deleted with too much":   {remove(col, hours(100_000)), codes.InvalidArgument, "grace"},
	} {
		if status.Code(c.err) != c.code {
			t.Errorf("%s: got %v, want %v", name, c.err, c.code)
		}
		if c.field != "" && !slices.Contains(fields(c.err), c.field) {
			t.Errorf("%s: names %v, want %s", name, fields(c.err), c.field)
		}
	}
	for _, key := range []string{
		"..", "/", "a//b", "../../etc/passwd", "\x00", "%", "snapshots/", "snapshots/1/1/",
		"gc/held/x/y", "é\u202e",
	} {
		if err := explain(&pb.ExplainObjectRequest{Key: key}); err != nil && status.Code(err) != codes.InvalidArgument {
			t.Errorf("%q: got %v", key, err)
		}
	}
}
