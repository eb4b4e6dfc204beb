package catalog_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func testAddSegments(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 300)
	want := e.add(t, ids[:5]...)
	before := dump(t, kv)
	if added, present, err := open(kv).AddSegments(ctx, e.col.ID, want); err != nil || added != 0 || present != 5 {
		t.Errorf("again: %d, %d, %v", added, present, err)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("a repeat wrote:\n%s", diff)
	}
	if added, present, err := e.AddSegments(ctx, e.col.ID,
		e.segments(ids[3:7])); err != nil || added != 2 || present != 2 {
		t.Errorf("some again: %d, %d, %v", added, present, err)
	}
	if added, present, err := e.AddSegments(ctx, e.col.ID, nil); err != nil || added != 0 || present != 0 {
		t.Errorf("none: %d, %d, %v", added, present, err)
	}
	if got := e.scan(t, 0); !slices.Equal(got, ids[:7]) {
		t.Errorf("scan: %v, want %v", got, ids[:7])
	}
	got, revision, err := e.Segment(ctx, catalog.Ref{DB: "db", Name: "c"}, ids[0])
	if err != nil || revision == 0 {
		t.Fatalf("at %d: %v", revision, err)
	}
	if diff := cmp.Diff(want[0], got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if _, _, err := e.Segment(ctx, e.ref, ids[9]); !errors.Is(err, catalog.ErrSegmentNotFound) {
		t.Errorf("err = %v", err)
	}

	add := func(list ...segment.Segment) func() error {
		return func() error {
			_, _, err := e.AddSegments(ctx, e.col.ID, list)
			return err
		}
	}
	other := e.makeSegment(ids[0], 3)
	other.Rows++
	e.refused(t, "another content", catalog.ErrSegmentExists, add(other))
	twice := e.makeSegment(ids[10], 1)
	e.refused(t, "one id twice", catalog.ErrInvalid, add(twice, twice))
	e.refused(t, "an unallocated id", catalog.ErrIDNotAllocated, add(e.makeSegment(1<<50, 1)))
	if _, _, err := e.AddSegments(ctx, 1<<50, want); !errors.Is(err, catalog.ErrCollectionNotFound) {
		t.Errorf("err = %v", err)
	}

	// What was dropped never comes back, whatever became of its unit.
	if n, err := e.DropSegments(ctx, e.ref, ids[1:3]); err != nil || n != 2 {
		t.Fatalf("%d, %v", n, err)
	}
	e.refused(t, "a dropped one", catalog.ErrSegmentExists, add(want[1]))
	e.refused(t, "a dropped one among others", catalog.ErrSegmentExists, add(want[0], want[1], e.makeSegment(ids[11], 1)))
	e.grant(t, ids[1])
	e.refused(t, "a dropped one with a tombstone", catalog.ErrSegmentExists, add(want[1]))

	// Also when the drop comes between the check and the write.
	next := e.add(t, ids[20])
	hooked := open(&beforeTxn{KV: kv, do: func() {
		if _, err := e.DropSegments(ctx, e.ref, ids[20:21]); err != nil {
			t.Error(err)
		}
	}})
	if _, _, err := hooked.AddSegments(ctx, e.col.ID, next); !errors.Is(err, catalog.ErrSegmentExists) {
		t.Errorf("dropped meanwhile: %v", err)
	}
	// And a collection that is dropped between the check and the write.
	hooked = open(&beforeTxn{KV: kv, do: func() {
		if _, err := e.DropCollection(ctx, request.Token{}, e.ref, 0); err != nil {
			t.Error(err)
		}
	}})
	if _, _, err := hooked.AddSegments(ctx, e.col.ID, e.segments(ids[100:])); !errors.Is(err,
		catalog.ErrCollectionNotActive) {
		t.Errorf("collection dropped meanwhile: %v", err)
	}
	if got := e.scan(t, 0); !slices.Equal(got, []int64{ids[0], ids[3], ids[4], ids[5], ids[6]}) {
		t.Errorf("scan: %v", got)
	}
}

// grant moves a unit to its tombstone, as the collector does.
func (e *env) grant(t testing.TB, id int64) {
	t.Helper()
	key := keys.Unit(e.col.ID, id)
	unit, found, _, err := e.kv.Get(t.Context(), key)
	if err != nil || !found {
		t.Fatalf("unit %d: %v, %v", id, found, err)
	}
	if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
		meta.Delete(key), meta.Put(keys.TombstonePrefix(e.col.ID)+keys.ID(id), unit.Value),
	}}); err != nil {
		t.Fatal(err)
	}
}

func TestSegmentRules(t *testing.T) {
	ctx := t.Context()
	e := newEnv(t, memory.New(memory.Options{}))
	p, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	x, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "i"})
	if err != nil {
		t.Fatal(err)
	}
	ids := e.ids(t, 200)
	build := func(id int64) segment.Build {
		return segment.Build{ID: id, Index: x.ID, Files: []segment.File{{Kind: "k", Path: fmt.Sprintf("i/%d", id)}}}
	}
	path := func(s string) func(*segment.Segment) { return func(g *segment.Segment) { g.Files[0].Path = s } }
	inStore := func(s string) func(*segment.Segment) { // a root without a prefix
		return func(g *segment.Segment) { g.Files[0].Root, g.Files[0].Path = 1, s }
	}
	for i, c := range []struct {
		err   error
		field string
		edit  func(*segment.Segment)
	}{
		{nil, "", func(*segment.Segment) {}},
		{nil, "", func(s *segment.Segment) { s.Partition = p.ID }},
		{nil, "", func(s *segment.Segment) { s.Files, s.Rows = nil, 0 }},
		{nil, "", func(s *segment.Segment) { s.Files, s.State = nil, segment.Growing }},
		{nil, "", func(s *segment.Segment) { s.Files, s.State = nil, segment.Importing }},
		{catalog.ErrInvalid, "segments[0].files", func(s *segment.Segment) { s.Files = nil }},
		{catalog.ErrInvalid, "segments[0].files", func(s *segment.Segment) {
			s.Files = []segment.File{{Kind: segment.KindStats, Path: "stats"}}
		}},
		{nil, "", func(s *segment.Segment) { s.State = segment.Importing }},
		{nil, "", func(s *segment.Segment) { s.Files[0].Kind = "something new" }},
		{nil, "", func(s *segment.Segment) { s.Builds = []segment.Build{build(ids[150])} }},
		{nil, "", path("a/..b/c..")},
		{nil, "", path("snapshots/x")}, // under data/
		{nil, "", func(s *segment.Segment) { s.EngineData = make([]byte, 16<<10) }},
		{catalog.ErrInvalid, "segments[0].engine_data", func(s *segment.Segment) { s.EngineData = make([]byte, 16<<10+1) }},
		{catalog.ErrInvalid, "segments[0].id", func(s *segment.Segment) { s.ID = 0 }},
		{catalog.ErrInvalid, "segments[0].id", func(s *segment.Segment) { s.ID = -1 }},
		{catalog.ErrInvalid, "segments[0].shard", func(s *segment.Segment) { s.Channel = 2 }},
		{catalog.ErrInvalid, "segments[0].shard", func(s *segment.Segment) { s.Channel = -1 }},
		{catalog.ErrInvalid, "segments[0].rows", func(s *segment.Segment) { s.Rows = -1 }},
		{catalog.ErrInvalid, "segments[0].level", func(s *segment.Segment) { s.Level = 3 }},
		{catalog.ErrInvalid, "segments[0].level", func(s *segment.Segment) { s.Level = -1 }},
		{catalog.ErrInvalid, "segments[0].state", func(s *segment.Segment) { s.State = 0 }},
		{catalog.ErrInvalid, "segments[0].state", func(s *segment.Segment) { s.State = segment.Dropped }},
		{catalog.ErrPartitionNotFound, "", func(s *segment.Segment) { s.Partition = p.ID + 1000 }},
		{catalog.ErrPartitionNotFound, "", func(s *segment.Segment) { s.Partition = -1 }},
		{catalog.ErrInvalid, "segments[0].files[0].root", func(s *segment.Segment) { s.Files[0].Root = 2 }},
		{catalog.ErrInvalid, "segments[0].files[0].root", func(s *segment.Segment) { s.Files[0].Root = -1 }},
		{catalog.ErrInvalid, "segments[0].files[0].size_bytes", func(s *segment.Segment) { s.Files[0].Size = -1 }},
		{catalog.ErrInvalid, "segments[0].files[1]", func(s *segment.Segment) { s.Files[1].LogID = -1 }},
		{catalog.ErrInvalid, "segments[0].files[1]", func(s *segment.Segment) { s.Files[1].Field = -1 }},
		{catalog.ErrInvalid, "segments[0].files[1]", func(s *segment.Segment) { s.Files[1].Entries = -1 }},
		{catalog.ErrInvalid, "segments[0].files[0].kind", func(s *segment.Segment) { s.Files[0].Kind = "" }},
		{
			catalog.ErrInvalid, "segments[0].files[0].checksum.type",
			func(s *segment.Segment) { s.Files[0].Checksum.Value = []byte{1} },
		},
		{
			catalog.ErrInvalid, "segments[0].files[0].min_timestamp",
			func(s *segment.Segment) { s.Files[0].MinTimestamp = s.Files[0].MaxTimestamp + 1 },
		},
		{catalog.ErrInvalid, "segments[0].files", func(s *segment.Segment) { s.Files[0].Path = s.Files[1].Path }},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("/etc/passwd")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("..")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("../x")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a/../../x")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a/..")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("./a")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a//b")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a/")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a\\b")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a\x00b")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path("a\xffb")},
		{catalog.ErrInvalid, "segments[0].files[0].path", path(longName(1024))}, // with its root too long
		{catalog.ErrInvalid, "segments[0].files[0].path", inStore("snapshots/x")},
		{catalog.ErrInvalid, "segments[0].files[0].path", inStore("gc/x")},
		{catalog.ErrInvalid, "segments[0].files", func(s *segment.Segment) { s.Files = make([]segment.File, 4097) }},
		{catalog.ErrIndexNotFound, "", func(s *segment.Segment) {
			s.Builds = []segment.Build{{
				ID:    ids[151],
				Index: x.ID + 1000,
			}}
		}},
		{
			catalog.ErrInvalid, "segments[0].index_builds[0].id",
			func(s *segment.Segment) { s.Builds = []segment.Build{build(0)} },
		},
		{
			catalog.ErrInvalid, "segments[0].index_builds[1].index_id",
			func(s *segment.Segment) { s.Builds = []segment.Build{build(ids[151]), build(ids[152])} },
		},
		{catalog.ErrIDNotAllocated, "", func(s *segment.Segment) { s.Builds = []segment.Build{build(1 << 50)} }},
		{catalog.ErrInvalid, "segments[0].files", func(s *segment.Segment) {
			s.Builds = []segment.Build{build(ids[151])}
			s.Builds[0].Files[0].Path = s.Files[0].Path
		}},
		{catalog.ErrInvalid, "segments[0].index_builds[0].files[0].path", func(s *segment.Segment) {
			s.Builds = []segment.Build{build(ids[151])}
			s.Builds[0].Files[0].Path = "../x"
		}},
		{catalog.ErrInvalid, "id", func(s *segment.Segment) { s.Builds = []segment.Build{build(s.ID)} }},
		{catalog.ErrLimitExceeded, "", func(s *segment.Segment) {
			s.Attributes = map[string]string{"a": longName(catalog.MaxSegmentBytes)}
		}},
	} {
		s := e.makeSegment(ids[i], 2)
		c.edit(&s)
		what := fmt.Sprintf("case %d", i)
		if c.err == nil {
			if n, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s}); err != nil || n != 1 {
				t.Errorf("%s: %d, %v", what, n, err)
			}
			continue
		}
		e.refused(t, what, c.err, func() error {
			_, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s})
			var invalid *catalog.InvalidError
			if errors.As(err, &invalid) && invalid.Field != c.field {
				t.Errorf("%s: %v: field = %q, want %q", what, err, invalid.Field, c.field)
			}
			return err
		})
		e.refused(t, what+", as an output", c.err, func() error {
			return e.change(ctx,
				catalog.SegmentChange{Add: []segment.Segment{s}})
		})
	}
	// One build of two segments would hide one of them when both are dropped.
	a, b := e.makeSegment(ids[190], 1), e.makeSegment(ids[191], 1)
	a.Builds, b.Builds = []segment.Build{build(ids[192])}, []segment.Build{build(ids[192])}
	e.refused(t, "one build twice", catalog.ErrInvalid, func() error {
		_, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{a, b})
		return err
	})
	e.refused(t, "one build twice, as outputs", catalog.ErrInvalid, func() error {
		return e.change(ctx, catalog.SegmentChange{Add: []segment.Segment{a, b}})
	})
}

func testAddManySegments(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 10_000)
	half := e.segments(ids[:5_000])
	if added, present, err := e.AddSegments(ctx, e.col.ID, half); err != nil || added != 5_000 || present != 0 {
		t.Fatalf("%d, %d, %v", added, present, err)
	}
	all := e.segments(ids)
	if added, present, err := e.AddSegments(ctx, e.col.ID, all); err != nil || added != 5_000 || present != 5_000 {
		t.Fatalf("%d, %d, %v", added, present, err)
	}
	n := 0
	if _, err := e.ScanSegments(ctx, e.col.ID, 0, func(batch []segment.Segment) error {
		for i := range batch {
			if n%97 == 0 || batch[i].ID != ids[n] {
				sameSegments(t, all[n], batch[i])
			}
			n++
		}
		return nil
	}); err != nil || n != len(all) {
		t.Fatalf("%d segments, %v", n, err)
	}
	if n, err := e.DropSegments(ctx, e.ref, ids); err != nil || n != len(ids) {
		t.Errorf("dropped %d, %v", n, err)
	}
	if got := e.scan(t, 0); len(got) != 0 {
		t.Errorf("%d segments are left", len(got))
	}
	if n, err := e.DropSegments(ctx, e.ref, ids); err != nil || n != 0 {
		t.Errorf("dropped again %d, %v", n, err)
	}
}

// Large records make small transactions, to add and to drop.
func TestLargeSegments(t *testing.T) {
	ctx := t.Context()
	e := newEnv(t, memory.New(memory.Options{}))
	ids := e.ids(t, 70)
	list := e.segments(ids)
	for i := range list {
		list[i].Attributes = map[string]string{"a": longName(100 << 10)}
	}
	list[7].Attributes["a"] = longName(1<<20 - 1000) // near the limit
	if n, _, err := e.AddSegments(ctx, e.col.ID, list); err != nil || n != len(list) {
		t.Fatalf("added %d, %v", n, err)
	}
	e.refused(t, "a swap that is too large", catalog.ErrTooLarge,
		func() error { return e.change(ctx, catalog.SegmentChange{Drop: ids[:60]}) })
	if n, err := e.DropSegments(ctx, e.ref, ids); err != nil || n != len(ids) {
		t.Errorf("dropped %d, %v", n, err)
	}
	if got := unitIDs(e.units(t)); !slices.Equal(got, ids) {
		t.Errorf("units %v, want %v", got, ids)
	}
}

func TestAddSegmentsFaults(t *testing.T) {
	var ids []int64
	sweep(t, func(e *env) error {
		_, _, err := e.AddSegments(t.Context(), e.col.ID, e.segments(ids))
		return err
	}, func(t *testing.T, e *env) { ids = e.ids(t, 250) }, func(t *testing.T, e *env) {
		if got := e.scan(t, 0); !slices.Equal(got, ids) {
			t.Errorf("%d segments, want %d", len(got), len(ids))
		}
		if added, present, err := e.AddSegments(t.Context(), e.col.ID,
			e.segments(ids)); err != nil || added != 0 || present != 250 {
			t.Errorf("again: %d, %d, %v", added, present, err)
		}
	})
}

func testDropSegments(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 200)
	e.add(t, ids[:150]...)
	for _, unknown := range []int64{ids[199], 1 << 50, 0, -1} {
		e.refused(t, "an unknown id", catalog.ErrSegmentNotFound, func() error {
			_, err := e.DropSegments(ctx, e.ref, append(slices.Clone(ids[:100]), unknown))
			return err
		})
	}
	if n, err := e.DropSegments(ctx, e.ref, nil); err != nil || n != 0 {
		t.Errorf("none: %d, %v", n, err)
	}
	if n, err := e.DropSegments(ctx, e.ref, append(slices.Clone(ids[:70]), ids[:70]...)); err != nil || n != 70 {
		t.Errorf("each twice: %d, %v", n, err)
	}
	if n, err := e.DropSegments(ctx, e.ref, ids[60:100]); err != nil || n != 30 {
		t.Errorf("some again: %d, %v", n, err)
	}
	e.grant(t, ids[0])
	if n, err := e.DropSegments(ctx, e.ref, ids[:1]); err != nil || n != 0 {
		t.Errorf("one that is being reclaimed: %d, %v", n, err)
	}
	// Dropped by another meanwhile.
	hooked := open(&beforeTxn{KV: kv, do: func() {
		if n, err := e.DropSegments(ctx, e.ref, ids[100:103]); err != nil || n != 3 {
			t.Errorf("%d, %v", n, err)
		}
	}})
	if n, err := hooked.DropSegments(ctx, e.ref, ids[101:110]); err != nil || n != 7 {
		t.Errorf("dropped %d, %v; want 7", n, err)
	}
	if got := e.scan(t, 0); !slices.Equal(got, ids[110:150]) {
		t.Errorf("scan: %v", got)
	}
	units := e.units(t)
	if got := unitIDs(units); !slices.Equal(got, ids[1:110]) {
		t.Errorf("units: %v", got)
	}
	u := units[ids[1]]
	if u.GetKind() != 1 || u.GetSegmentId() != ids[1] || u.GetSegment().GetFiles().GetCount() != 3 ||
		u.GetSegment().GetState() != uint32(segment.Dropped) || u.GetOp() == "" {
		t.Errorf("unit: %v", u)
	}
}

func TestDropSegmentsFaults(t *testing.T) {
	var ids []int64
	sweep(t, func(e *env) error {
		_, err := e.DropSegments(t.Context(), e.ref, ids)
		return err
	}, func(t *testing.T, e *env) {
		ids = e.ids(t, 130)
		e.add(t, ids...)
	}, func(t *testing.T, e *env) {
		if got := e.scan(t, 0); len(got) != 0 {
			t.Errorf("%d segments left", len(got))
		}
		if got := unitIDs(e.units(t)); !slices.Equal(got, ids) {
			t.Errorf("%d units, want %d", len(got), len(ids))
		}
	})
}
