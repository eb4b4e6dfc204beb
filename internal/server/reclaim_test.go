package server_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

func segmentUnit(id int64) *pb.Unit { return &pb.Unit{Unit: &pb.Unit_SegmentId{SegmentId: id}} }

func buildUnit(id int64) *pb.Unit { return &pb.Unit{Unit: &pb.Unit_IndexBuildId{IndexBuildId: id}} }

func fileUnit(path string, segment int64) *pb.Unit {
	return &pb.Unit{Unit: &pb.Unit_File{File: &pb.UnitFile{Path: path, SegmentId: segment}}}
}

// outcomes returns the outcomes and holders of results, in their order.
func outcomes(results []*pb.ReclaimResult) string {
	var list []string
	for _, r := range results {
		text := strings.TrimPrefix(r.GetOutcome().String(), "OUTCOME_")
		for _, h := range r.GetHolders() {
			switch h := h.GetHolder().(type) {
			case *pb.Holder_Snapshot:
				text += " " + h.Snapshot.GetName()
			case *pb.Holder_Creating:
				text += " creating"
			case *pb.Holder_Catalog:
				text += fmt.Sprint(" catalog ", h.Catalog.GetSegmentId())
			}
		}
		if (r.GetTombstone() != nil) != (r.GetOutcome() == pb.ReclaimResult_OUTCOME_GRANTED) {
			text += " with a tombstone or without"
		}
		if len(r.GetHolders()) != int(r.GetHolderCount()) {
			text += fmt.Sprint(" of ", r.GetHolderCount())
		}
		list = append(list, text)
	}
	return strings.Join(list, ", ")
}

// TestReferencesOfADroppedCollection checks the holders of a segment by the name of its
// dropped collection.
func TestReferencesOfADroppedCollection(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	col := e.collection(t, "c")
	index := must[*pb.CreateIndexResponse](t)(e.catalog.CreateIndex(ctx, &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 101,
	})).GetIndex()
	s := fullSegment(e.ids(t, 10), 0, index.GetId())
	s.RowCeiling, s.CommitTimestamp = 0, 0
	e.addSegments(t, byID(col.GetId()), s)
	e.snapshot(t, "s0")
	must[*pb.DropCollectionResponse](t)(e.catalog.DropCollection(ctx,
		&pb.DropCollectionRequest{Collection: byName("c")}))
	req := &pb.CheckReferencesRequest{Collection: byName("c"), Units: []*pb.Unit{segmentUnit(s.GetId())}}
	checked := must[*pb.CheckReferencesResponse](t)(pb.NewReclaimServiceClient(e.conn).CheckReferences(ctx,
		req)).GetUnits()
	if len(checked) != 1 || len(checked[0].GetHolders()) != 1 {
		t.Errorf("got %v", checked)
	}
}

func TestReclaim(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	reclaims := pb.NewReclaimServiceClient(e.conn)
	col := e.collection(t, "c")
	index := must[*pb.CreateIndexResponse](t)(e.catalog.CreateIndex(ctx, &pb.CreateIndexRequest{
		Collection: byID(col.GetId()), Name: "x", FieldId: 101,
	})).GetIndex()
	first := e.ids(t, 20)
	for i := range int64(3) {
		s := fullSegment(first+4*i, 0, index.GetId())
		s.RowCeiling, s.CommitTimestamp = 0, 0
		e.addSegments(t, byID(col.GetId()), s)
	}
	for i := range 10 {
		e.snapshot(t, fmt.Sprint("s", i))
	}
	must[*pb.DropSegmentsResponse](t)(e.catalog.DropSegments(ctx,
		&pb.DropSegmentsRequest{Collection: byID(col.GetId()), SegmentIds: []int64{first, first + 4}}))
	ask := func(deleter pb.Deleter, units ...*pb.Unit) []*pb.ReclaimResult {
		t.Helper()
		return must[*pb.ReclaimResponse](t)(reclaims.Reclaim(ctx,
			&pb.ReclaimRequest{Collection: byID(col.GetId()), Units: units, Deleter: deleter})).GetResults()
	}
	named := "s9 s8 s7 s6 s5 s4 s3 s2 of 10"
	got := outcomes(ask(pb.Deleter_DELETER_CALLER, segmentUnit(first), segmentUnit(1<<40), segmentUnit(first+8),
		buildUnit(first+9), segmentUnit(first)))
	want := fmt.Sprintf("HELD %[1]s, UNKNOWN, HELD catalog %[2]d s9 s8 s7 s6 s5 s4 s3 s2 of 11, HELD %[1]s, HELD %[1]s",
		named, first+8)
	if got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
	p := must[*pb.PinSnapshotResponse](t)(e.snapshots.PinSnapshot(ctx,
		&pb.PinSnapshotRequest{Snapshot: snapNamed("s9"), Owner: "job", Reason: "why"})).GetPin()
	checked := must[*pb.CheckReferencesResponse](t)(reclaims.CheckReferences(ctx, &pb.CheckReferencesRequest{
		Collection: byName("c"), Units: []*pb.Unit{
			segmentUnit(first), segmentUnit(first + 8), segmentUnit(1 << 40),
			buildUnit(first + 9),
		},
	})).GetUnits()
	for i, want := range []pb.UnitReferences_State{
		pb.UnitReferences_STATE_DROPPED, pb.UnitReferences_STATE_LIVE, pb.UnitReferences_STATE_UNKNOWN,
		pb.UnitReferences_STATE_UNKNOWN,
	} {
		if checked[i].GetState() != want {
			t.Errorf("unit %d is %v, want %v", i, checked[i].GetState(), want)
		}
	}
	if h := checked[0].GetHolders()[0].GetSnapshot(); h.GetName() != "s9" || len(h.GetPins()) != 1 ||
		h.GetPins()[0].GetId() != p.GetId() {
		t.Errorf("got %v", h)
	}
	must[*pb.UnpinSnapshotResponse](t)(e.snapshots.UnpinSnapshot(ctx,
		&pb.UnpinSnapshotRequest{Snapshot: snapNamed("s9"), PinId: p.GetId()}))
	for i := range 10 {
		must[*pb.DropSnapshotResponse](t)(e.snapshots.DropSnapshot(ctx,
			&pb.DropSnapshotRequest{Snapshot: snapNamed(fmt.Sprint("s", i))}))
	}
	results := ask(pb.Deleter_DELETER_CALLER, fileUnit(fmt.Sprintf("1/0/%d/x", first), 0), segmentUnit(first),
		fileUnit("unknown/path/7", first))
	if got := outcomes(results); got != "GRANTED, GRANTED, UNKNOWN" {
		t.Errorf("got %s", got)
	}
	tomb := results[1].GetTombstone()
	if tomb.GetId() != first || tomb.GetCollectionId() != col.GetId() || tomb.GetKind() != pb.Tombstone_KIND_SEGMENT ||
		tomb.GetSegmentId() != first ||
		tomb.GetDeleter() != pb.Deleter_DELETER_CALLER || tomb.GetCaller() == "" || tomb.GetGrantTime() == nil ||
		tomb.GetFileCount() != 3 ||
		tomb.GetBytes() != 300 || len(tomb.GetFiles()) != 0 {
		t.Errorf("got %v", tomb)
	}
	again := ask(pb.Deleter_DELETER_SNAPSHOTD, segmentUnit(first))[0].GetTombstone()
	if again.GetDeleter() != pb.Deleter_DELETER_CALLER ||
		!again.GetGrantTime().AsTime().Equal(tomb.GetGrantTime().AsTime()) {
		t.Errorf("got %v, want %v", again, tomb)
	}
	// The tombstone of snapshotd stays while deletes are blocked.
	e.objects.Freeze()
	defer e.objects.Thaw()
	if got := outcomes(ask(pb.Deleter_DELETER_SNAPSHOTD, segmentUnit(first+4))); got != "GRANTED" {
		t.Errorf("got %s", got)
	}
	listed := must[*pb.ListTombstonesResponse](t)(reclaims.ListTombstones(ctx, &pb.ListTombstonesRequest{}))
	if len(listed.GetTombstones()) != 2 || listed.GetNextPageToken() != "" ||
		len(listed.GetTombstones()[0].GetFiles()) != 3 {
		t.Errorf("got %v", listed)
	}
	f := listed.GetTombstones()[0].GetFiles()[0]
	if f.GetStore() != "default" || f.GetKey() != fmt.Sprintf("data/c/1/0/%d/x", first) || f.GetSize() != 100 {
		t.Errorf("got %v", f)
	}
	for deleter, want := range map[pb.Deleter]int64{
		pb.Deleter_DELETER_CALLER:    first,
		pb.Deleter_DELETER_SNAPSHOTD: first + 4,
	} {
		list := must[*pb.ListTombstonesResponse](t)(reclaims.ListTombstones(ctx,
			&pb.ListTombstonesRequest{Collection: byName("c"), Deleter: deleter}))
		if len(list.GetTombstones()) != 1 || list.GetTombstones()[0].GetId() != want {
			t.Errorf("got %v", list)
		}
	}
	confirmed := must[*pb.ConfirmReclaimedResponse](t)(reclaims.ConfirmReclaimed(ctx, &pb.ConfirmReclaimedRequest{
		Collection: byID(col.GetId()), TombstoneIds: []int64{first + 4, first, 1 << 40},
	})).GetResults()
	for i, want := range []pb.ConfirmResult_Outcome{
		pb.ConfirmResult_OUTCOME_FOREIGN, pb.ConfirmResult_OUTCOME_CONFIRMED,
		pb.ConfirmResult_OUTCOME_UNKNOWN,
	} {
		if confirmed[i].GetOutcome() != want || confirmed[i].GetTombstoneId() != []int64{first + 4, first, 1 << 40}[i] {
			t.Errorf("got %v, want %v", confirmed[i], want)
		}
	}
	if got := outcomes(ask(pb.Deleter_DELETER_CALLER, segmentUnit(first))); got != "UNKNOWN" {
		t.Errorf("got %s", got)
	}
}

// TestTombstonePages reads pages that are bounded by their bytes.
func TestTombstonePages(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	reclaims := pb.NewReclaimServiceClient(e.conn)
	e.objects.Freeze()
	defer e.objects.Thaw()
	var want []string
	for _, name := range []string{"a", "b"} {
		col := e.collection(t, name)
		first := e.ids(t, 3)
		var ids []int64
		for i := range int64(3) {
			s := &pb.Segment{Id: first + i}
			for n := range 1600 {
				s.Files = append(s.Files, &pb.File{Path: fmt.Sprintf("%d/0/%d/%s%d", col.GetId(), first+i,
					strings.Repeat("long/", 100), n), Kind: "insert"})
			}
			e.addSegments(t, byID(col.GetId()), s)
			ids = append(ids, s.GetId())
			want = append(want, fmt.Sprint(col.GetId(), "/", s.GetId()))
		}
		must[*pb.DropSegmentsResponse](t)(e.catalog.DropSegments(ctx,
			&pb.DropSegmentsRequest{Collection: byName(name), SegmentIds: ids}))
		units := convertIDs(ids)
		must[*pb.ReclaimResponse](t)(reclaims.Reclaim(ctx,
			&pb.ReclaimRequest{Collection: byName(name), Units: units, Deleter: pb.Deleter_DELETER_CALLER}))
	}
	for _, size := range []int32{0, 1, 1000} {
		var got []string
		pages := 0
		for req := (&pb.ListTombstonesRequest{PageSize: size}); ; pages++ {
			page := must[*pb.ListTombstonesResponse](t)(reclaims.ListTombstones(ctx, req))
			if n := len(page.GetTombstones()); n == 0 || n > 3 || size == 1 && n != 1 {
				t.Fatalf("%d tombstones on page %d", n, pages)
			}
			for _, tomb := range page.GetTombstones() {
				got = append(got, fmt.Sprint(tomb.GetCollectionId(), "/", tomb.GetId()))
				if len(tomb.GetFiles()) != 1600 || tomb.GetFileCount() != 1600 {
					t.Errorf("%d files", len(tomb.GetFiles()))
				}
			}
			if req.PageToken = page.GetNextPageToken(); req.GetPageToken() == "" {
				break
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
	}
	page := must[*pb.ListTombstonesResponse](t)(reclaims.ListTombstones(ctx,
		&pb.ListTombstonesRequest{PageSize: 1, Collection: byName("a")}))
	for name, req := range map[string]*pb.ListTombstonesRequest{
		"other filter": {PageSize: 1, Collection: byName("b"), PageToken: page.GetNextPageToken()},
		"no filter":    {PageSize: 1, PageToken: page.GetNextPageToken()},
		"deleter":      {Collection: byName("a"), Deleter: pb.Deleter_DELETER_CALLER, PageToken: page.GetNextPageToken()},
		"nonsense":     {PageToken: "AAAA"},
		"cut":          {Collection: byName("a"), PageToken: page.GetNextPageToken()[1:]},
	} {
		if _, err := reclaims.ListTombstones(ctx, req); reason(err) != "INVALID_PAGE_TOKEN" ||
			status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func convertIDs(ids []int64) []*pb.Unit {
	units := make([]*pb.Unit, len(ids))
	for i, id := range ids {
		units[i] = segmentUnit(id)
	}
	return units
}

func TestBadReclaims(t *testing.T) {
	e := newEnv(t)
	ctx := t.Context()
	reclaims := pb.NewReclaimServiceClient(e.conn)
	col := byID(e.collection(t, "c").GetId())
	many := func(n int) []*pb.Unit {
		list := make([]*pb.Unit, n)
		for i := range list {
			list[i] = segmentUnit(1)
		}
		return list
	}
	reclaim := func(req *pb.ReclaimRequest) error { _, err := reclaims.Reclaim(ctx, req); return err }
	units := func(list ...*pb.Unit) error {
		return reclaim(&pb.ReclaimRequest{Collection: col, Units: list, Deleter: pb.Deleter_DELETER_CALLER})
	}
	confirm := func(ids ...int64) error {
		_, err := reclaims.ConfirmReclaimed(ctx, &pb.ConfirmReclaimedRequest{Collection: col, TombstoneIds: ids})
		return err
	}
	for name, c := range map[string]struct {
		err   error
		code  codes.Code
		field string
	}{
		"no units":     {units(), codes.InvalidArgument, "units"},
		"10 001 units": {units(many(10_001)...), codes.InvalidArgument, "units"},
		"1 000 001 units": {
			units(slices.Repeat([]*pb.Unit{segmentUnit(1 << 20)}, 1_000_001)...), codes.ResourceExhausted,
			"",
		},
		"empty unit":      {units(&pb.Unit{}), codes.InvalidArgument, "units[0].unit"},
		"segment 0":       {units(segmentUnit(0)), codes.InvalidArgument, "units[0].segment_id"},
		"segment below 0": {units(segmentUnit(1), segmentUnit(-1<<63)), codes.InvalidArgument, "units[1].segment_id"},
		"build 0":         {units(buildUnit(0)), codes.InvalidArgument, "units[0].index_build_id"},
		"no path":         {units(fileUnit("", 0)), codes.InvalidArgument, "units[0].file.path"},
		"long path":       {units(fileUnit(strings.Repeat("p", 1025), 0)), codes.InvalidArgument, "units[0].file.path"},
		"file's segment":  {units(fileUnit("p", -1)), codes.InvalidArgument, "units[0].file.segment_id"},
		"root": {
			units(&pb.Unit{Unit: &pb.Unit_File{File: &pb.UnitFile{Root: 16, Path: "p"}}}),
			codes.InvalidArgument, "units[0].file.root",
		},
		"root below 0": {
			units(&pb.Unit{Unit: &pb.Unit_File{File: &pb.UnitFile{Root: -1, Path: "p"}}}),
			codes.InvalidArgument, "units[0].file.root",
		},
		"no deleter": {reclaim(&pb.ReclaimRequest{Collection: col, Units: many(1)}), codes.InvalidArgument, "deleter"},
		"other deleter": {
			reclaim(&pb.ReclaimRequest{Collection: col, Units: many(1), Deleter: 3}), codes.InvalidArgument,
			"deleter",
		},
		"no collection": {reclaim(&pb.ReclaimRequest{Units: many(1), Deleter: 1}), codes.InvalidArgument, "collection"},
		"other collection": {
			reclaim(&pb.ReclaimRequest{Collection: byName("d"), Units: many(1), Deleter: 1}),
			codes.NotFound, "",
		},
		"no tombstones": {confirm(), codes.InvalidArgument, "tombstone_ids"},
		"tombstone 0":   {confirm(0), codes.InvalidArgument, "tombstone_ids[0]"},
		"twice":         {confirm(1, 1), codes.InvalidArgument, "tombstone_ids"},
	} {
		if status.Code(c.err) != c.code {
			t.Errorf("%s: got %v, want %v", name, c.err, c.code)
		}
		if c.field != "" && !slices.Contains(fields(c.err), c.field) {
			t.Errorf("%s: names %v, want %s", name, fields(c.err), c.field)
		}
	}
	if err := units(many(10_000)...); err != nil {
		t.Error(err)
	}
	for _, path := range []string{
		"..", "/", "a//b", "../../etc/passwd", "\x00", "%", strings.Repeat("9", 1024),
		strings.Repeat("1/", 512), "é\u202e",
	} {
		resp, err := reclaims.Reclaim(ctx, &pb.ReclaimRequest{
			Collection: col, Units: []*pb.Unit{fileUnit(path, 1<<62)},
			Deleter: 1,
		})
		if err != nil || outcomes(resp.GetResults()) != "UNKNOWN" {
			t.Errorf("%.20q: got %v, err = %v", path, resp, err)
		}
	}
	if _, err := reclaims.ListTombstones(ctx,
		&pb.ListTombstonesRequest{Collection: byName("none")}); reason(err) != "COLLECTION_NOT_FOUND" {
		t.Errorf("got %v", err)
	}
	// An unreadable record.
	if _, err := e.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(keys.Snapshot(999), []byte("nonsense"))}}); err != nil {
		t.Fatal(err)
	}
	if err := units(many(1)...); reason(err) != "REFERENCES_UNREADABLE" || status.Code(err) != codes.FailedPrecondition {
		t.Errorf("got %v", err)
	}
}
