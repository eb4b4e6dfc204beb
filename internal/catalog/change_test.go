package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func testCompaction(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 200)
	inputs := e.add(t, ids[:100]...)
	revision, err := e.Change(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"},
		catalog.SegmentChange{Drop: ids[:59], Add: e.segments(ids[100:101])})
	if err != nil {
		t.Fatalf("60 inputs and outputs: %v", err)
	}
	want := append(slices.Clone(ids[59:100]), ids[100])
	if got := e.scan(t, revision); !slices.Equal(got, want) {
		t.Errorf("after: %v, want %v", got, want)
	}
	if got := e.scan(t, revision-1); !slices.Equal(got, ids[:100]) {
		t.Errorf("before: %v, want %v", got, ids[:100])
	}
	units := e.units(t)
	if got := unitIDs(units); !slices.Equal(got, ids[:59]) {
		t.Errorf("units: %v, want %v", got, ids[:59])
	}
	// The unit says what it was, files included.
	rec := units[ids[0]].GetSegment()
	rec.State = uint32(inputs[0].State)
	change := func(swap catalog.SegmentChange) func() error { return func() error { return e.change(ctx, swap) } }
	e.refused(t, "61 inputs and outputs", catalog.ErrInvalid,
		change(catalog.SegmentChange{Drop: append(slices.Clone(ids[59:100]), ids[100]), Add: e.segments(ids[110:129])}))
	e.refused(t, "an input that is gone", catalog.ErrSegmentNotFound,
		change(catalog.SegmentChange{Drop: ids[58:60], Add: e.segments(ids[101:102])}))
	e.refused(t, "an input that never was", catalog.ErrSegmentNotFound,
		change(catalog.SegmentChange{Drop: ids[150:151], Add: e.segments(ids[101:102])}))
	e.refused(t, "an input twice", catalog.ErrInvalid, change(catalog.SegmentChange{Drop: []int64{ids[60], ids[60]}}))
	e.refused(t, "an input that is updated", catalog.ErrInvalid,
		change(catalog.SegmentChange{Drop: ids[60:61], Update: []catalog.Update{{Segment: ids[60]}}}))
	e.refused(t, "an output that is an input", catalog.ErrInvalid,
		change(catalog.SegmentChange{Drop: ids[60:61], Add: e.segments(ids[60:61])}))
	e.refused(t, "an output that is there", catalog.ErrSegmentExists,
		change(catalog.SegmentChange{Drop: ids[60:61], Add: e.segments(ids[61:62])}))
	e.refused(t, "an output that was dropped", catalog.ErrSegmentExists,
		change(catalog.SegmentChange{Drop: ids[60:61], Add: e.segments(ids[:1])}))
	e.refused(t, "an output with an unallocated id", catalog.ErrIDNotAllocated,
		change(catalog.SegmentChange{Drop: ids[60:61], Add: e.segments([]int64{1 << 50})}))
	e.refused(t, "no such collection", catalog.ErrCollectionNotFound, func() error {
		_, err := e.Change(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "none"}, catalog.SegmentChange{Drop: ids[60:61]})
		return err
	})
	// An output that is registered, or dropped, between the check and the write.
	hooked := open(&beforeTxn{KV: kv, do: func() {
		if _, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[130:131])); err != nil {
			t.Error(err)
		}
	}})
	if _, err := hooked.Change(ctx, request.Token{}, e.ref,
		catalog.SegmentChange{Drop: ids[60:61], Add: e.segments(ids[130:131])}); !errors.Is(err, catalog.ErrSegmentExists) {
		t.Errorf("output registered meanwhile: %v", err)
	}
	hooked = open(&beforeTxn{KV: kv, do: func() {
		if _, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[131:132])); err != nil {
			t.Error(err)
		}
		if _, err := e.DropSegments(ctx, e.ref, ids[131:132]); err != nil {
			t.Error(err)
		}
	}})
	if _, err := hooked.Change(ctx, request.Token{}, e.ref,
		catalog.SegmentChange{Drop: ids[60:61], Add: e.segments(ids[131:132])}); !errors.Is(err, catalog.ErrSegmentExists) {
		t.Errorf("output registered and dropped meanwhile: %v", err)
	}
	if err := e.change(ctx, catalog.SegmentChange{Drop: ids[60:61]}); err != nil {
		t.Errorf("the input was touched: %v", err)
	}
}

// A reader at one revision sees the parents or the child, never a mix, while
// compactions run and compete.
func testCompactionIsAtomic(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	const rounds, width = 30, 4
	ids := e.ids(t, rounds*width*2+width)
	e.add(t, ids[:width]...)
	var mu sync.Mutex
	legal := map[string]bool{fmt.Sprint(ids[:width]): true}
	seen := map[string]bool{}
	done := make(chan struct{})
	var readers sync.WaitGroup
	var reads atomic.Int64
	for range 2 {
		readers.Go(func() {
			c := open(kv)
			for {
				select {
				case <-done:
					return
				default:
				}
				var got []int64
				if _, err := c.ScanSegments(ctx, e.col.ID, 0, func(batch []segment.Segment) error {
					for i := range batch {
						got = append(got, batch[i].ID)
					}
					return nil
				}); err != nil {
					t.Error(err)
					return
				}
				reads.Add(1)
				mu.Lock()
				seen[fmt.Sprint(got)] = true
				mu.Unlock()
			}
		})
	}
	live, next := ids[:width], ids[width:]
	for range rounds {
		// Two compactions of the same inputs compete: one wins.
		swaps := [][]int64{next[:width], next[width : 2*width]}
		next = next[2*width:]
		mu.Lock()
		for _, out := range swaps {
			legal[fmt.Sprint(out)] = true
		}
		mu.Unlock()
		won := make([]bool, 2)
		var wg sync.WaitGroup
		for i, out := range swaps {
			c := open(kv)
			wg.Go(func() {
				_, err := c.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{Drop: live, Add: e.segments(out)})
				won[i] = err == nil
				if err != nil && !errors.Is(err, catalog.ErrSegmentNotFound) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if won[0] == won[1] {
			t.Fatalf("of two compactions won: %v", won)
		}
		if won[0] {
			live = swaps[0]
		} else {
			live = swaps[1]
		}
	}
	close(done)
	readers.Wait()
	for got := range seen {
		if !legal[got] {
			t.Errorf("a reader saw %s", got)
		}
	}
	if reads.Load() == 0 {
		t.Error("no read")
	}
	if got := e.scan(t, 0); !slices.Equal(got, live) {
		t.Errorf("in the end %v, want %v", got, live)
	}
}

func testUpdate(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 20)
	s := e.makeSegment(ids[0], 3)
	s.State = segment.Growing
	if _, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s}); err != nil {
		t.Fatal(err)
	}
	_, revision, err := e.Segment(ctx, e.ref, s.ID)
	if err != nil {
		t.Fatal(err)
	}
	rows, sorted, data := int64(5), false, []byte("new")
	dml := segment.Position{Timestamp: 99, Opaque: []byte("p")}
	gone := []segment.File{s.Files[0], s.Files[2]}
	fresh := segment.File{Kind: "new", Path: "new/1", Size: 5}
	at, err := e.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{Update: []catalog.Update{{
		Segment: s.ID, Revision: revision, State: segment.Flushed, Rows: &rows, DML: &dml, Sorted: &sorted, EngineData: &data,
		RemoveFiles: []catalog.FilePath{{Path: gone[0].Path}, {Path: gone[1].Path}}, AddFiles: []segment.File{fresh},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	want := s
	want.State, want.Rows, want.DML, want.Sorted, want.EngineData = segment.Flushed, rows, dml, sorted, data
	want.Files = []segment.File{s.Files[1], fresh}
	got, revision, err := e.Segment(ctx, e.ref, s.ID)
	if err != nil || revision != at {
		t.Fatalf("at %d, want %d: %v", revision, at, err)
	}
	sameSegments(t, want, got)

	units := e.units(t)
	if len(units) != 1 {
		t.Fatalf("units: %v", units)
	}
	for id, u := range units {
		if u.GetKind() != 3 || u.GetSegmentId() != s.ID || id == s.ID {
			t.Errorf("unit %d: %v", id, u)
		}
		if _, ok, err := e.Allocated(ctx, id); err != nil || !ok {
			t.Errorf("unit %d has an unallocated id", id)
		}
		part, err := catalog.DecodeSegment(e.col.ID, meta.KeyValue{
			Key:   keys.Segment(e.col.ID, u.GetSegmentId()),
			Value: mustEncode(u.GetSegment()),
		})
		if err != nil {
			t.Fatal(err)
		}
		sameSegments(t, segment.Segment{
			ID: s.ID, Partition: s.Partition, Channel: s.Channel, State: segment.Dropped,
			Files: gone,
		}, part)
	}

	update := func(u catalog.Update) func() error {
		u.Segment = s.ID
		return func() error { return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{u}}) }
	}
	negative := int64(-1)
	e.refused(t, "an old revision", catalog.ErrRevisionChanged, update(catalog.Update{Revision: revision - 1}))
	e.refused(t, "a file that is not there", catalog.ErrFileNotFound,
		update(catalog.Update{RemoveFiles: []catalog.FilePath{{Path: gone[0].Path}}}))
	e.refused(t, "a file of another root", catalog.ErrFileNotFound,
		update(catalog.Update{RemoveFiles: []catalog.FilePath{{Root: 1, Path: fresh.Path}}}))
	e.refused(t, "a file that is there", catalog.ErrFileExists, update(catalog.Update{AddFiles: []segment.File{fresh}}))
	e.refused(t, "a file removed and added", catalog.ErrFileExists, update(catalog.Update{
		RemoveFiles: []catalog.FilePath{{Path: fresh.Path}}, AddFiles: []segment.File{fresh},
	}))
	e.refused(t, "negative rows", catalog.ErrInvalid, update(catalog.Update{Rows: &negative}))
	e.refused(t, "a file that escapes", catalog.ErrInvalid,
		update(catalog.Update{AddFiles: []segment.File{{Kind: "k", Path: "../x"}}}))
	e.refused(t, "no such segment", catalog.ErrSegmentNotFound, func() error {
		return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: ids[9]}}})
	})
	e.refused(t, "one twice", catalog.ErrInvalid, func() error {
		return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID}, {Segment: s.ID}}})
	})
	e.refused(t, "an empty change", nil, func() error {
		at, err := e.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{})
		if err == nil && at < revision {
			t.Errorf("at %d, want at least %d", at, revision)
		}
		return err
	})
}

// Every pair of states, against the table.
// TestFlushedWithoutFiles has a swap leave rows without a file that holds them: no
// snapshot would have these.
func TestFlushedWithoutFiles(t *testing.T) {
	e := newEnv(t, memory.New(memory.Options{}))
	ids := e.ids(t, 6)
	whole, growing := e.makeSegment(ids[0], 1), e.makeSegment(ids[1], 1)
	growing.State, growing.Files = segment.Growing, nil
	if _, _, err := e.AddSegments(t.Context(), e.col.ID, []segment.Segment{whole, growing}); err != nil {
		t.Fatal(err)
	}
	all := func(s *segment.Segment) (paths []catalog.FilePath) {
		for _, f := range s.Files {
			paths = append(paths, catalog.FilePath{Root: f.Root, Path: f.Path})
		}
		return paths
	}
	none := int64(0)
	bare := e.makeSegment(ids[2], 1)
	bare.Files = nil
	flushed := catalog.Update{Segment: growing.ID, State: segment.Flushed}
	for name, swap := range map[string]catalog.SegmentChange{
		"flushes":                   {Update: []catalog.Update{flushed}},
		"removes its files":         {Update: []catalog.Update{{Segment: whole.ID, RemoveFiles: all(&whole)}}},
		"compacts to one with none": {Drop: []int64{whole.ID}, Add: []segment.Segment{bare}},
	} {
		e.refused(t, name, catalog.ErrInvalid, func() error { return e.change(t.Context(), swap) })
	}
	flushedNow := e.makeSegment(ids[1], 1)
	flushed.AddFiles = flushedNow.Files
	for name, swap := range map[string]catalog.SegmentChange{
		"flushes with its files": {Update: []catalog.Update{flushed}},
		"removes its files and its rows": {Update: []catalog.Update{{
			Segment: whole.ID, RemoveFiles: all(&whole),
			Rows: &none,
		}}},
	} {
		if err := e.change(t.Context(), swap); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSegmentStates(t *testing.T) {
	ctx := t.Context()
	e := newEnv(t, memory.New(memory.Options{}))
	type move struct{ from, to segment.State }
	legal := map[move]bool{
		{segment.Growing, segment.Sealed}: true, {segment.Growing, segment.Flushed}: true,
		{segment.Sealed, segment.Flushed}: true, {segment.Importing, segment.Flushed}: true,
	}
	for from := segment.Growing; from <= segment.Importing; from++ {
		for to := segment.State(-1); to <= segment.Dropped+1; to++ {
			id := e.ids(t, 1)[0]
			s := e.makeSegment(id, 1)
			s.State = from
			if _, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s}); err != nil {
				t.Fatal(err)
			}
			swap := catalog.SegmentChange{Update: []catalog.Update{{Segment: id, State: to}}}
			if want := to; to == 0 || to == from || legal[move{from, to}] {
				if to == 0 { // no change
					want = from
				}
				if err := e.change(ctx, swap); err != nil {
					t.Errorf("%v to %v: %v", from, to, err)
				}
				if got, _, err := e.Segment(ctx, e.ref, id); err != nil || got.State != want {
					t.Errorf("%v to %v: %v, %v", from, to, got.State, err)
				}
				continue
			}
			e.refused(t, fmt.Sprintf("%v to %v", from, to), catalog.ErrSegmentState, func() error { return e.change(ctx, swap) })
		}
	}
}

func testBuilds(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	x, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "i"})
	if err != nil {
		t.Fatal(err)
	}
	y, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "j"})
	if err != nil {
		t.Fatal(err)
	}
	ids := e.ids(t, 30)
	e.add(t, ids[0], ids[1])
	build := func(id, index int64) segment.Build {
		return segment.Build{
			ID: id, Index: index, Field: 101, Params: map[string]string{"M": "1"},
			Files: []segment.File{
				{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/0", id), Size: 9, LogID: id},
				{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/1", id)},
			},
		}
	}
	update := func(u catalog.Update) func() error {
		u.Segment = ids[0]
		return func() error { return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{u}}) }
	}
	first, second, third := build(ids[2], x.ID), build(ids[3], x.ID), build(ids[4], y.ID)
	for _, b := range []segment.Build{first, third, second} { // the second takes the place of the first
		if err := update(catalog.Update{AddBuilds: []segment.Build{b}})(); err != nil {
			t.Fatal(err)
		}
	}
	got, _, err := e.Segment(ctx, e.ref, ids[0])
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]segment.Build{third, second}, got.Builds, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	units := e.units(t)
	u := units[first.ID]
	if len(units) != 1 || u.GetKind() != 2 || u.GetSegmentId() != ids[0] {
		t.Fatalf("units: %v", units)
	}
	part, err := catalog.DecodeSegment(e.col.ID, meta.KeyValue{
		Key:   keys.Segment(e.col.ID, ids[0]),
		Value: mustEncode(u.GetSegment()),
	})
	if err != nil || len(part.Files) != 0 {
		t.Fatalf("%v, %v", part, err)
	}
	if diff := cmp.Diff([]segment.Build{first}, part.Builds, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("unit (-want +got):\n%s", diff)
	}

	e.refused(t, "a build that is there", catalog.ErrIndexBuildExists,
		update(catalog.Update{AddBuilds: []segment.Build{second}}))
	e.refused(t, "a build that was replaced", catalog.ErrIndexBuildExists,
		update(catalog.Update{AddBuilds: []segment.Build{first}}))
	e.refused(t, "a build removed and added", catalog.ErrIndexBuildExists,
		update(catalog.Update{RemoveBuilds: []int64{second.ID}, AddBuilds: []segment.Build{second}}))
	e.refused(t, "two of one index", catalog.ErrInvalid,
		update(catalog.Update{AddBuilds: []segment.Build{build(ids[5], x.ID), build(ids[6], x.ID)}}))
	e.refused(t, "a build that is not there", catalog.ErrIndexNotFound,
		update(catalog.Update{RemoveBuilds: []int64{ids[9]}}))
	e.refused(t, "an index that is not there", catalog.ErrIndexNotFound,
		update(catalog.Update{AddBuilds: []segment.Build{build(ids[5], 1<<40)}}))
	e.refused(t, "an unallocated id", catalog.ErrIDNotAllocated,
		update(catalog.Update{AddBuilds: []segment.Build{build(1<<50, x.ID)}}))
	e.refused(t, "the id of a segment", catalog.ErrIndexBuildExists,
		update(catalog.Update{AddBuilds: []segment.Build{build(ids[1], x.ID)}}))
	// The files of what is replaced will be deleted, so none may live on.
	again := build(ids[7], x.ID)
	again.Files[0].Path = second.Files[0].Path
	e.refused(t, "a file of the build it replaces", catalog.ErrFileExists,
		update(catalog.Update{AddBuilds: []segment.Build{again}}))
	e.refused(t, "a file of a build that is removed", catalog.ErrFileExists, update(catalog.Update{
		RemoveBuilds: []int64{second.ID}, AddFiles: []segment.File{{Kind: "k", Path: second.Files[0].Path}},
	}))

	e.refused(t, "a build of another segment", catalog.ErrIndexBuildExists, func() error {
		return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
			Segment:   ids[1],
			AddBuilds: []segment.Build{build(ids[3], x.ID)},
		}}})
	})
	e.refused(t, "a segment with the id of a build", catalog.ErrSegmentExists, func() error {
		_, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[3:4]))
		return err
	})
	e.refused(t, "a segment whose build has the id of a segment", catalog.ErrIndexBuildExists, func() error {
		s := e.makeSegment(ids[11], 1)
		s.Builds = []segment.Build{build(ids[1], x.ID)}
		_, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s})
		return err
	})
	// Dropped, the segment takes its builds with it.
	if err := update(catalog.Update{RemoveBuilds: []int64{second.ID}})(); err != nil {
		t.Fatal(err)
	}
	if n, err := e.DropSegments(ctx, e.ref, ids[:2]); err != nil || n != 2 {
		t.Errorf("%d, %v", n, err)
	}
	if got := unitIDs(e.units(t)); !slices.Equal(got, ids[:4]) {
		t.Errorf("units %v, want %v", got, ids[:4])
	}
}

func testCheckpoints(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 3)
	e.add(t, ids[0])
	at := func(shard int, ts segment.Timestamp, opaque string) catalog.Checkpoint {
		return catalog.Checkpoint{Shard: shard, Position: segment.Position{Timestamp: ts, Opaque: []byte(opaque)}}
	}
	set := func(list ...catalog.Checkpoint) func() error {
		return func() error {
			_, err := e.SetCheckpoints(ctx, e.ref, list)
			return err
		}
	}
	if got, err := e.Checkpoints(ctx, e.ref); err != nil || len(got) != 0 {
		t.Errorf("none yet: %v, %v", got, err)
	}
	first, err := e.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{at(1, 100, "a")})
	if err != nil {
		t.Fatal(err)
	}
	before := dump(t, kv)
	again, err := e.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{at(1, 100, "a")})
	if err != nil || again < first {
		t.Errorf("the same again: at %d, %v; want at least %d", again, err, first)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("the same again wrote:\n%s", diff)
	}
	if view, err := e.At(ctx, e.col.ID, again); err != nil || view.Checkpoints[1].Position.Timestamp != 100 {
		t.Errorf("at %d: %v, %v", again, view.Checkpoints, err)
	}
	e.refused(t, "back", catalog.ErrCheckpointRegression, set(at(1, 99, "z")))
	e.refused(t, "one forward, one back", catalog.ErrCheckpointRegression, set(at(0, 5, ""), at(1, 99, "")))
	e.refused(t, "no such shard", catalog.ErrInvalid, set(at(2, 5, "")))
	e.refused(t, "a negative shard", catalog.ErrInvalid, set(at(-1, 5, "")))
	e.refused(t, "a shard twice", catalog.ErrInvalid, set(at(0, 5, ""), at(0, 6, "")))
	if err := set(at(0, 50, ""), at(1, 100, "b"))(); err != nil { // another handle for the same place
		t.Fatal(err)
	}
	want := []catalog.Checkpoint{at(0, 50, ""), at(1, 100, "b")}
	want[0].Channel, want[1].Channel = "ch0", "ch1"
	got, err := e.Checkpoints(ctx, e.ref)
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}

	// A checkpoint moves at the revision of the segments that it covers.
	rows := int64(1)
	moved, err := e.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{
		Update: []catalog.Update{{Segment: ids[0], Rows: &rows}}, Add: e.segments(ids[1:2]),
		Checkpoints: []catalog.Checkpoint{at(0, 60, "")},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, revision := range []int64{moved - 1, moved} {
		view, err := e.At(ctx, e.col.ID, revision)
		if err != nil {
			t.Fatal(err)
		}
		if has, reached := slices.Contains(e.scan(t, revision),
			ids[1]), view.Checkpoints[0].Position.Timestamp == 60; has != reached || has != (revision == moved) {
			t.Errorf("at %d: segment %v, checkpoint %v", revision, has, reached)
		}
	}
	e.refused(t, "back, with a segment", catalog.ErrCheckpointRegression, func() error {
		return e.change(ctx, catalog.SegmentChange{
			Add:         e.segments(ids[2:3]),
			Checkpoints: []catalog.Checkpoint{at(0, 59, "")},
		})
	})
	if err := set(at(0, segment.MaxTimestamp, ""))(); err != nil {
		t.Error(err)
	}

	// A collection without channels has one, that is always reached.
	s := spec("streamless")
	s.Channels = nil
	col, err := e.CreateCollection(ctx, request.Token{}, s)
	if err != nil {
		t.Fatal(err)
	}
	view, err := e.At(ctx, col.ID, 0)
	if err != nil || len(view.Checkpoints) != 1 || view.Checkpoints[0].Position.Timestamp != segment.MaxTimestamp {
		t.Errorf("%v, %v", view.Checkpoints, err)
	}
}

// What the checkpoints that stay were compared with must still stand at the
// revision that SetCheckpoints returns.
func TestCheckpointRace(t *testing.T) {
	ctx := t.Context()
	kv := memory.New(memory.Options{})
	e := newEnv(t, kv)
	set := func(c *catalog.Catalog, ts0, ts1 segment.Timestamp) (int64, error) {
		return c.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{
			{Shard: 0, Position: segment.Position{Timestamp: ts0}}, {Shard: 1, Position: segment.Position{Timestamp: ts1}},
		})
	}
	if _, err := set(e.Catalog, 10, 10); err != nil {
		t.Fatal(err)
	}
	hooked := open(&beforePut{KV: kv, prefix: "/catalog/channel/", do: func() {
		if _, err := set(e.Catalog, 20, 10); err != nil {
			t.Error(err)
		}
	}})
	if at, err := set(hooked, 10, 15); !errors.Is(err, catalog.ErrCheckpointRegression) {
		t.Errorf("shard 0 was at 20 already: %d, %v", at, err)
	}
}

// Checkpoints only move forward, whatever the caller.
func TestCheckpointsRise(t *testing.T) {
	ctx := t.Context()
	e := newEnv(t, memory.New(memory.Options{}))
	done := make(chan struct{})
	var reader, writers sync.WaitGroup
	reader.Go(func() {
		last := segment.Timestamp(0)
		for {
			select {
			case <-done:
				return
			default:
			}
			view, err := e.At(ctx, e.col.ID, 0)
			if err != nil {
				t.Error(err)
				return
			}
			if got := view.Checkpoints[0].Position.Timestamp; got < last {
				t.Errorf("from %d back to %d", last, got)
			} else {
				last = got
			}
		}
	})
	for worker := range 4 {
		c := open(e.kv)
		writers.Go(func() {
			for i := range 30 {
				position := segment.Position{Timestamp: segment.Timestamp(4*i + worker)}
				_, err := c.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{{Position: position}})
				if err != nil && !errors.Is(err, catalog.ErrCheckpointRegression) {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	close(done)
	reader.Wait()
	if got, err := e.Checkpoints(ctx, e.ref); err != nil || len(got) != 1 || got[0].Position.Timestamp != 4*29+3 {
		t.Errorf("in the end %v, %v", got, err)
	}
}

// beforePut does something once, before the first transaction that puts a key.
type beforePut struct {
	meta.KV
	prefix string
	do     func()
	once   sync.Once
}

func (b *beforePut) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut && len(op.From) > len(b.prefix) && op.From[:len(b.prefix)] == b.prefix
	}) {
		b.once.Do(b.do)
	}
	return b.KV.Txn(ctx, t)
}

// Changes that race for one segment all happen, one after another.
func testChangeRace(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	id := e.ids(t, 1)[0]
	s := e.add(t, id)[0]
	var wg sync.WaitGroup
	const workers, each = 4, 8
	var done atomic.Int64
	for worker := range workers {
		c := open(kv)
		wg.Go(func() {
			for i := range each {
				f := segment.File{Kind: "k", Path: fmt.Sprintf("%d/%d", worker, i)}
				for {
					_, err := c.Change(ctx, request.Token{}, e.ref,
						catalog.SegmentChange{Update: []catalog.Update{{Segment: id, AddFiles: []segment.File{f}}}})
					if errors.Is(err, meta.ErrConflict) {
						continue // nothing was written
					}
					if err != nil {
						t.Error(err)
						return
					}
					break
				}
				done.Add(1)
			}
		})
	}
	wg.Wait()
	got, revision, err := e.Segment(ctx, e.ref, id)
	if err != nil || done.Load() != workers*each || len(got.Files) != len(s.Files)+workers*each {
		t.Errorf("%d files after %d changes, %v", len(got.Files), done.Load(), err)
	}
	// Of those who name a revision one wins.
	var won atomic.Int64
	for worker := range 8 {
		c := open(kv)
		wg.Go(func() {
			rows := int64(worker)
			_, err := c.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{Update: []catalog.Update{{
				Segment:  id,
				Revision: revision, Rows: &rows,
			}}})
			if err == nil {
				won.Add(1)
			} else if !errors.Is(err, catalog.ErrRevisionChanged) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d won, want 1", won.Load())
	}
}

func testChangeTokens(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 10)
	e.add(t, ids[:4]...)
	swap := catalog.SegmentChange{
		Drop: ids[:2], Add: e.segments(ids[4:5]), Update: []catalog.Update{{
			Segment:  ids[2],
			AddFiles: []segment.File{{Kind: "k", Path: "p"}},
		}},
		Checkpoints: []catalog.Checkpoint{{Position: segment.Position{Timestamp: 5}}},
	}
	// The same request many times at once: one effect, one answer.
	revisions := make([]int64, 8)
	var wg sync.WaitGroup
	for i := range revisions {
		c := open(kv)
		wg.Go(func() {
			var err error
			if revisions[i], err = c.Change(ctx, token("swap"), e.ref, swap); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if revisions[0] == 0 || len(slices.Compact(revisions)) != 1 {
		t.Errorf("revisions %v", revisions)
	}
	if got := e.scan(t, revisions[0]); !slices.Equal(got, ids[2:5]) {
		t.Errorf("scan: %v", got)
	}
	other := token("swap")
	other.Hash = []byte("other")
	e.refused(t, "the token of another", request.ErrReused, func() error {
		_, err := e.Change(ctx, other, e.ref, catalog.SegmentChange{Drop: ids[2:3]})
		return err
	})
	// A repeat that comes between another's commit and its own decision.
	hooked := open(&afterFind{KV: kv, key: token("late").Key(), do: func() {
		if _, err := e.Change(ctx, token("late"), e.ref, catalog.SegmentChange{Drop: ids[2:3]}); err != nil {
			t.Error(err)
		}
	}})
	if at, err := hooked.Change(ctx, token("late"), e.ref, catalog.SegmentChange{Drop: ids[2:3]}); err != nil || at == 0 {
		t.Errorf("repeat: %d, %v", at, err)
	}
}

// afterFind does something once, after a key was not found.
type afterFind struct {
	meta.KV
	key  string
	do   func()
	once sync.Once
}

func (a *afterFind) Get(ctx context.Context, key string) (meta.KeyValue, bool, int64, error) {
	kv, found, revision, err := a.KV.Get(ctx, key)
	if key == a.key {
		a.once.Do(a.do)
	}
	return kv, found, revision, err
}

func TestChangeFaults(t *testing.T) {
	var ids []int64
	var index int64
	sweep(t, func(e *env) error {
		_, err := e.Change(t.Context(), token("swap"), e.ref, catalog.SegmentChange{
			Drop: ids[:2], Add: e.segments(ids[4:5]),
			Update: []catalog.Update{{
				Segment: ids[2], AddFiles: []segment.File{{
					Kind: "k",
					Path: "p",
				}}, RemoveFiles: []catalog.FilePath{{Path: e.makeSegment(ids[2], 3).Files[0].Path}},
				AddBuilds: []segment.Build{{ID: ids[6], Index: index}},
			}},
			Checkpoints: []catalog.Checkpoint{{Position: segment.Position{Timestamp: 5}}},
		})
		return err
	}, func(t *testing.T, e *env) {
		x, err := e.CreateIndex(t.Context(), request.Token{}, e.ref, catalog.Index{Name: "i"})
		if err != nil {
			t.Fatal(err)
		}
		index, ids = x.ID, e.ids(t, 10)
		list := e.segments(ids[:4])
		list[2].Builds = []segment.Build{{ID: ids[5], Index: index}}
		if _, _, err := e.AddSegments(t.Context(), e.col.ID, list); err != nil {
			t.Fatal(err)
		}
	}, func(t *testing.T, e *env) {
		if got := e.scan(t, 0); !slices.Equal(got, ids[2:5]) {
			t.Errorf("scan: %v, want %v", got, ids[2:5])
		}
		got, _, err := e.Segment(t.Context(), e.ref, ids[2])
		if err != nil || len(got.Files) != 3 || got.Files[2].Path != "p" || got.Builds[0].ID != ids[6] {
			t.Errorf("%v, %v", got, err)
		}
		if units := e.units(t); len(units) != 4 || units[ids[0]] == nil || units[ids[1]] == nil || units[ids[5]] == nil {
			t.Errorf("units: %v", unitIDs(units))
		}
	})
}

func testTimeTravel(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 1500)
	e.add(t, ids...)
	view, err := e.At(ctx, e.col.ID, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "later"}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.DropSegments(ctx, e.ref, ids[:100]); err != nil {
		t.Fatal(err)
	}
	if _, err := e.DropCollection(ctx, request.Token{}, e.ref, 0); err != nil {
		t.Fatal(err)
	}
	then, err := e.At(ctx, e.col.ID, view.Revision)
	if diff := cmp.Diff(view, then); err != nil || diff != "" {
		t.Errorf("%v (-then +again):\n%s", err, diff)
	}
	if got := e.scan(t, view.Revision); !slices.Equal(got, ids) {
		t.Errorf("%d segments then, want %d", len(got), len(ids))
	}
	if now, err := e.At(ctx, e.col.ID, 0); err != nil || now.Collection.State != catalog.Dropping ||
		len(now.Partitions) != 1 {
		t.Errorf("now: %v, %v", now, err)
	}
	stop := errors.New("stop")
	if _, err := e.ScanSegments(ctx, e.col.ID, 0, func([]segment.Segment) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("err = %v, want %v", err, stop)
	}
	if _, err := e.At(ctx, 1<<50, 0); !errors.Is(err, catalog.ErrCollectionNotFound) {
		t.Errorf("err = %v", err)
	}
	if m, ok := kv.(*memory.Store); ok {
		if err := m.Compact(ctx, view.Revision+1); err != nil {
			t.Fatal(err)
		}
		if _, err := e.At(ctx, e.col.ID, view.Revision); !errors.Is(err, meta.ErrCompacted) {
			t.Errorf("err = %v, want %v", err, meta.ErrCompacted)
		}
		if _, err := e.ScanSegments(ctx, e.col.ID, view.Revision,
			func([]segment.Segment) error { return nil }); !errors.Is(err, meta.ErrCompacted) {
			t.Errorf("err = %v, want %v", err, meta.ErrCompacted)
		}
	}
}

// Whatever is done to a collection, its segments and units are those of a model
// in a few lines, and every file is in a segment or in one unit.
func TestModel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		e := newEnv(t, memory.New(memory.Options{}))
		ids := e.ids(t, 60)
		live, dropped := map[int64]bool{}, map[int64]bool{}
		files := map[string]bool{} // ever registered
		note := func(list []segment.Segment) {
			for i := range list {
				for _, f := range list[i].Files {
					files[f.Path] = true
				}
			}
		}
		pick := func(set map[int64]bool, name string) []int64 {
			var list []int64
			for _, id := range ids {
				if set[id] {
					list = append(list, id)
				}
			}
			if len(list) == 0 {
				return nil
			}
			return rapid.SliceOfNDistinct(rapid.SampledFrom(list), 0, min(4, len(list)), rapid.ID[int64]).Draw(rt, name)
		}
		for range rapid.IntRange(1, 15).Draw(rt, "steps") {
			some := rapid.SliceOfNDistinct(rapid.SampledFrom(ids), 1, 5, rapid.ID[int64]).Draw(rt, "some")
			again := slices.ContainsFunc(some, func(id int64) bool { return dropped[id] })
			switch rapid.SampledFrom([]string{"add", "drop", "compact", "replace"}).Draw(rt, "step") {
			case "add":
				_, _, err := e.AddSegments(t.Context(), e.col.ID, e.segments(some))
				taken := again || slices.ContainsFunc(some, func(id int64) bool {
					s, _, err := e.Segment(t.Context(), e.ref, id)
					return err == nil && !cmp.Equal(e.makeSegment(id, 3), s, cmpopts.EquateEmpty())
				})
				if taken != errors.Is(err, catalog.ErrSegmentExists) || !taken && err != nil {
					rt.Fatalf("add %v: %v; taken %v", some, err, taken)
				}
				if err == nil {
					for _, id := range some {
						live[id] = true
					}
					note(e.segments(some))
				}
			case "drop":
				in := pick(live, "drop")
				if n, err := e.DropSegments(t.Context(), e.ref, append(in, pick(dropped, "again")...)); err != nil || n != len(in) {
					rt.Fatalf("drop %v: %d, %v", in, n, err)
				}
				for _, id := range in {
					delete(live, id)
					dropped[id] = true
				}
			case "compact":
				in := pick(live, "inputs")
				some = some[:1]
				if slices.Contains(in, some[0]) {
					continue
				}
				err := e.change(t.Context(), catalog.SegmentChange{Drop: in, Add: e.segments(some)})
				if taken := live[some[0]] || dropped[some[0]]; taken != errors.Is(err,
					catalog.ErrSegmentExists) || !taken && err != nil {
					rt.Fatalf("compact %v into %v: %v", in, some, err)
				}
				if err == nil {
					for _, id := range in {
						delete(live, id)
						dropped[id] = true
					}
					live[some[0]] = true
					note(e.segments(some))
				}
			case "replace":
				for _, id := range pick(live, "replace") {
					s, revision, err := e.Segment(t.Context(), e.ref, id)
					if err != nil {
						rt.Fatal(err)
					}
					f := segment.File{Kind: "k", Path: fmt.Sprintf("%d/at/%d", id, revision)}
					if err := e.change(t.Context(), catalog.SegmentChange{Update: []catalog.Update{{
						Segment: id, RemoveFiles: []catalog.FilePath{{Path: s.Files[0].Path}}, AddFiles: []segment.File{f},
					}}}); err != nil {
						rt.Fatal(err)
					}
					files[f.Path] = true
				}
			}
		}
		found := map[string]int{}
		got := map[int64]bool{}
		if _, err := e.ScanSegments(t.Context(), e.col.ID, 0, func(batch []segment.Segment) error {
			for i := range batch {
				got[batch[i].ID] = true
				for f := range batch[i].AllFiles() {
					found[f.Path]++
				}
			}
			return nil
		}); err != nil {
			rt.Fatal(err)
		}
		if diff := cmp.Diff(live, got, cmpopts.EquateEmpty()); diff != "" {
			rt.Fatalf("segments (-want +got):\n%s", diff)
		}
		for id, u := range e.units(t) {
			if u.GetKind() == 1 && !dropped[id] {
				rt.Fatalf("unit %d was not dropped", id)
			}
			part, err := catalog.DecodeSegment(e.col.ID, meta.KeyValue{
				Key:   keys.Segment(e.col.ID, u.GetSegmentId()),
				Value: mustEncode(u.GetSegment()),
			})
			if err != nil {
				rt.Fatal(err)
			}
			for f := range part.AllFiles() {
				found[f.Path]++
			}
		}
		for path := range files {
			if found[path] != 1 {
				rt.Fatalf("file %s is in %d places, want 1", path, found[path])
			}
		}
	})
}
