//go:build !short

package main

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/embed"
)

// oracle has all writes by channel, and so the expected rows of a snapshot: those
// before their channel's cut, without those deleted later and before the cut.
type oracle []map[api.Segment_Level][]Row

// at returns the rows at these cuts.
func (o oracle) at(cuts []uint64) (rows []Row) {
	for ch, written := range o {
		deleted := map[int64]uint64{} // the last time before the cut
		for _, r := range written[deletes] {
			if r.Time < cuts[ch] {
				deleted[r.ID] = r.Time
			}
		}
		for _, r := range written[inserts] {
			if r.Time < cuts[ch] && r.Time > deleted[r.ID] {
				rows = append(rows, r)
			}
		}
	}
	return rows
}

// snapshotOf is a snapshot and its expected rows.
type snapshotOf struct {
	name string
	cuts []uint64
	want []Row
}

// env is an engine with an oracle.
type env struct {
	t   *testing.T
	c   *client.Client
	dir string
	rnd *rand.Rand

	s           *Store
	oracle      oracle
	checkpoints []uint64
	growing     []int64 // growing segments
	nextID      int64
	taken       []snapshotOf // except dropped ones
	snapshots   int          // total taken

	straddling, captured, apart, deleted, ceilings int64 // counts of the cases under test
}

// serve runs snapshotd and returns a client and the object store.
func serve(t *testing.T) (c *client.Client, dir string) {
	t.Helper()
	dir = t.TempDir()
	cfg := embed.Default()
	cfg.DataDir, cfg.Listen, cfg.MetricsListen, cfg.LogLevel = dir, "127.0.0.1:0", "off", "error"
	srv, err := embed.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	if c, err = client.Dial(srv.Addr(), client.Options{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c, filepath.Join(dir, "objects")
}

// TestSnapshotsAgainstOracle runs random operations of the engine, including incomplete
// ones, takes and drops snapshots in between, and deletes granted files. At the end
// each remaining snapshot must match the oracle: no row before its channel's cut is
// missing, none at or after it is visible. The same holds for the collection restored
// from it, whatever happens to that afterwards.
func TestSnapshotsAgainstOracle(t *testing.T) {
	c, dir := serve(t)
	for seed := range uint64(4) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			name := fmt.Sprintf("shop-%d", seed)
			e := &env{
				t: t, c: c, dir: dir, rnd: rand.New(rand.NewPCG(seed, 1)), nextID: 1,
				oracle: oracle{{}, {}}, checkpoints: make([]uint64, 2),
			}
			e.must(Create(t.Context(), c, name))
			e.reopen(name)
			for range 120 {
				e.step(name)
			}
			e.snapshot(name)
			e.must(e.s.Compact(t.Context()))
			e.collect(t.Context())
			ref := e.s.collection
			_, err := c.Catalog.DropCollection(t.Context(), &api.DropCollectionRequest{Collection: ref})
			e.must(err)
			if _, _, err := Open(t.Context(), c, e.dir, name); client.Reason(err) != "COLLECTION_NOT_FOUND" {
				t.Errorf("open the dropped collection: got %v", err)
			}
			for _, snap := range e.taken {
				e.verify(snap)
				e.restore(snap)
			}
			e.goOn(e.taken[len(e.taken)-1])
			if e.straddling == 0 || e.captured == 0 || e.apart == 0 || e.deleted == 0 || e.ceilings == 0 {
				t.Errorf("too few cases: %d straddling segments, %d growing ones captured, "+
					"%d snapshots with cuts apart, %d files deleted, %d ceilings restored",
					e.straddling, e.captured, e.apart, e.deleted, e.ceilings)
			}
		})
	}
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// step runs one random operation.
func (e *env) step(name string) {
	ctx := e.t.Context()
	switch n := e.rnd.IntN(100); {
	case n < 40:
		for range 1 + e.rnd.IntN(30) {
			e.write(inserts, random(e.rnd.Uint64(), e.nextID))
			e.nextID++
		}
	case n < 60:
		for range 1 + e.rnd.IntN(8) {
			e.write(deletes, Row{ID: 1 + e.rnd.Int64N(e.nextID)})
		}
	case n < 75:
		e.flushPart(ctx)
	case n < 80:
		e.seal(ctx)
	case n < 84:
		e.must(e.s.Flush(ctx))
		copy(e.checkpoints, e.s.clocks)
	case n < 87:
		if segments, err := e.s.segments(ctx); err != nil || len(segments) > 0 {
			e.must(err)
			e.must(e.s.Compact(ctx))
			copy(e.checkpoints, e.s.clocks)
			e.growing = nil
		}
	case n < 90:
		e.reopen(name)
	case n < 92 && len(e.taken) > 0:
		at := e.rnd.IntN(len(e.taken))
		drop(e.t, e.c, e.taken[at].name)
		e.taken = slices.Delete(e.taken, at, at+1)
		fallthrough
	case n < 94:
		e.collect(ctx)
	default:
		e.snapshot(name)
	}
}

// write writes a row to the engine and the oracle.
func (e *env) write(what api.Segment_Level, r Row) {
	old := slices.Clone(e.s.clocks)
	e.s.Write(what, r)
	for ch, clock := range e.s.clocks {
		if clock != old[ch] {
			r.Time = old[ch]
			e.oracle[ch][what] = append(e.oracle[ch][what], r)
		}
	}
}

// flushPart writes the inserts or the deletes of one channel to files, as a growing
// segment, and advances the channel's checkpoint by less than possible.
func (e *env) flushPart(ctx context.Context) {
	ch := e.rnd.IntN(2)
	for what, rows := range e.s.growing[ch] {
		seg, err := e.s.write(ctx, int32(ch), what, rows)
		e.must(err)
		seg.State = api.Segment_STATE_GROWING
		files := seg.GetFiles()
		if e.rnd.IntN(2) == 0 { // its files are registered later
			seg.Files = nil
		}
		stream, err := e.c.Catalog.AddSegments(ctx)
		e.must(err)
		e.must(stream.Send(&api.AddSegmentsRequest{Collection: e.s.collection, Segments: []*api.Segment{seg}}))
		_, err = stream.CloseAndRecv()
		e.must(err)
		if seg.GetFiles() == nil {
			e.must(e.update(ctx, &api.SegmentUpdate{SegmentId: seg.GetId(), AddFiles: files}))
		}
		e.growing = append(e.growing, seg.GetId())
		delete(e.s.growing[ch], what)
		break
	}
	limit := e.s.clocks[ch]
	for _, rows := range e.s.growing[ch] {
		limit = min(limit, rows[0].Time)
	}
	from := max(e.checkpoints[ch], 1) // where clocks start
	to := from + e.rnd.Uint64N(limit-from+1)
	_, err := e.c.Catalog.SetCheckpoints(ctx, &api.SetCheckpointsRequest{
		Collection:  e.s.collection,
		Checkpoints: []*api.ChannelPosition{{Shard: int32(ch), Position: &api.Position{Timestamp: to}}},
	})
	e.must(err)
	e.checkpoints[ch] = to
}

// seal changes growing segments to flushed.
func (e *env) seal(ctx context.Context) {
	for _, id := range e.growing {
		e.must(e.update(ctx, &api.SegmentUpdate{SegmentId: id, State: api.Segment_STATE_FLUSHED}))
	}
	e.growing = nil
}

func (e *env) update(ctx context.Context, u *api.SegmentUpdate) error {
	_, err := e.c.Catalog.UpdateSegments(ctx, &api.UpdateSegmentsRequest{
		Collection: e.s.collection, Updates: []*api.SegmentUpdate{u}, RequestToken: client.NewRequestToken(),
	})
	return err
}

// reopen opens the collection again, as after a crash: the engine has no log, so rows
// in memory are lost. All others must exist.
func (e *env) reopen(name string) {
	if e.s != nil {
		for ch, memory := range e.s.growing {
			for what, rows := range memory {
				e.oracle[ch][what] = slices.DeleteFunc(e.oracle[ch][what], func(r Row) bool { return r.Time >= rows[0].Time })
			}
		}
	}
	s, rows, err := Open(e.t.Context(), e.c, e.dir, name)
	e.must(err)
	e.s = s
	e.same("opened", rows, e.oracle.at([]uint64{math.MaxUint64, math.MaxUint64}))
}

func (e *env) snapshot(name string) {
	ctx := e.t.Context()
	snap := snapshotOf{name: fmt.Sprintf("%s.%d", name, e.snapshots), cuts: slices.Clone(e.checkpoints)}
	resp, err := e.c.Snapshots.CreateSnapshot(ctx, &api.CreateSnapshotRequest{
		Collection: e.s.collection, Name: snap.name, RequestToken: client.NewRequestToken(),
	})
	if client.Reason(err) == "CHECKPOINT_MISSING" && slices.Contains(e.checkpoints, 0) {
		return
	}
	e.must(err)
	got := make([]uint64, 2)
	for _, p := range resp.GetSnapshot().GetCuts() {
		got[p.GetShard()] = p.GetPosition().GetTimestamp()
	}
	if !slices.Equal(got, snap.cuts) {
		e.t.Errorf("%s: got cuts %d, want %d", snap.name, got, snap.cuts)
	}
	snap.want = e.oracle.at(snap.cuts)
	e.taken = append(e.taken, snap)
	e.snapshots++
	e.straddling += resp.GetSnapshot().GetTotals().GetStraddlingSegments()
	if snap.cuts[0] != snap.cuts[1] {
		e.apart++
	}
	list, err := e.c.Snapshots.ListSnapshotSegments(ctx, &api.ListSnapshotSegmentsRequest{
		Snapshot: &api.SnapshotRef{Ref: &api.SnapshotRef_Id{Id: resp.GetSnapshot().GetId()}},
	})
	e.must(err)
	for _, x := range list.GetSegments() {
		if x.GetSegment().GetState() == api.Segment_STATE_GROWING {
			e.captured++
		}
	}
}

func (e *env) collect(ctx context.Context) {
	deleted, _, err := e.s.Collect(ctx)
	e.must(err)
	e.deleted += int64(deleted)
}

// verify compares the rows of a snapshot with the oracle.
func (e *env) verify(snap snapshotOf) {
	_, rows, err := OpenSnapshot(e.t.Context(), e.c, e.dir, snap.name)
	e.must(err)
	e.same(fmt.Sprintf("%s with cuts %d", snap.name, snap.cuts), rows, snap.want)
}

// restoredName is the name of the collection restored from a snapshot.
func restoredName(snap snapshotOf) string { return snap.name + ".restored" }

// restore restores a snapshot and compares the rows of the collection with the oracle.
func (e *env) restore(snap snapshotOf) {
	ctx := e.t.Context()
	started, err := e.c.Snapshots.RestoreSnapshot(ctx, restoreOf(snap.name, restoredName(snap)))
	e.must(err)
	job, err := client.WaitRestore(ctx, e.c.Snapshots, started.GetJobId())
	e.must(err)
	if job.GetState() != api.RestoreJob_STATE_COMPLETED {
		e.t.Fatalf("restore of %s: %v", snap.name, job)
	}
	s, rows, err := Open(ctx, e.c, e.dir, restoredName(snap))
	e.must(err)
	e.same(fmt.Sprintf("%s with cuts %d, restored", snap.name, snap.cuts), rows, snap.want)
	segments, err := s.segments(ctx)
	e.must(err)
	for _, seg := range segments {
		if seg.GetRowCeiling() != 0 {
			e.ceilings++
		}
		if seg.GetState() != api.Segment_STATE_FLUSHED {
			e.t.Errorf("segment %d of %s is %v", seg.GetId(), restoredName(snap), seg.GetState())
		}
	}
}

// goOn runs random operations on a restored collection, and compares its snapshots
// with an oracle.
func (e *env) goOn(snap snapshotOf) {
	name := restoredName(snap)
	for ch, written := range e.oracle {
		for what := range written {
			written[what] = slices.DeleteFunc(written[what], func(r Row) bool { return r.Time >= snap.cuts[ch] })
		}
	}
	e.s, e.checkpoints, e.growing, e.taken, e.snapshots = nil, slices.Clone(snap.cuts), nil, nil, 0
	e.reopen(name)
	for range 40 {
		e.step(name)
	}
	e.snapshot(name)
	for _, snap := range e.taken {
		e.verify(snap)
		e.restore(snap)
	}
}

func restoreOf(snapshot, target string) *api.RestoreSnapshotRequest {
	return &api.RestoreSnapshotRequest{
		Snapshot: &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: snapshot}}, Target: &api.CollectionName{Name: target},
		RequestToken: client.NewRequestToken(),
	}
}

// same compares rows in any order.
func (e *env) same(what string, got, want []Row) {
	e.t.Helper()
	if digest(got) == digest(want) {
		return
	}
	times := func(rows []Row) map[int64]uint64 {
		m := map[int64]uint64{}
		for _, r := range rows {
			m[r.ID] = r.Time
		}
		return m
	}
	has, wants := times(got), times(want)
	missing, extra := maps.Clone(wants), maps.Clone(has)
	maps.DeleteFunc(missing, func(id int64, _ uint64) bool { _, ok := has[id]; return ok })
	maps.DeleteFunc(extra, func(id int64, _ uint64) bool { _, ok := wants[id]; return ok })
	e.t.Errorf(
		"%s: got %d rows, want %d; missing, with their times: %v; unexpected: %v", what, len(got), len(want), missing, extra,
	)
}

func drop(t *testing.T, c *client.Client, name string) {
	t.Helper()
	_, err := c.Snapshots.DropSnapshot(t.Context(), &api.DropSnapshotRequest{
		Snapshot: &api.SnapshotRef{Ref: &api.SnapshotRef_Name{Name: name}}, RequestToken: client.NewRequestToken(),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// shop creates a collection of 100 rows and a snapshot of it, then deletes every tenth
// row and compacts.
func shop(t *testing.T) (s *Store, snapshot string) {
	t.Helper()
	c, dir := serve(t)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(Create(t.Context(), c, "shop"))
	s, _, err := Open(t.Context(), c, dir, "shop")
	must(err)
	for id := range int64(100) {
		s.Write(inserts, random(1, id+1))
	}
	must(s.Flush(t.Context()))
	_, err = c.Snapshots.CreateSnapshot(t.Context(), &api.CreateSnapshotRequest{
		Collection: s.collection, Name: "before", RequestToken: client.NewRequestToken(),
	})
	must(err)
	for id := int64(10); id <= 100; id += 10 {
		s.Write(deletes, Row{ID: id})
	}
	must(s.Compact(t.Context()))
	return s, "before"
}

// filesOf returns the files of a collection in the object store.
func filesOf(t *testing.T, s *Store) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(s.dir, root, "*", "*", "*", "*", "*", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return names
}

// collect calls Collect and compares its results.
func collect(t *testing.T, s *Store, deleted int, held map[string]int) {
	t.Helper()
	got, who, err := s.Collect(t.Context())
	if err != nil || got != deleted || !maps.Equal(who, held) {
		t.Fatalf("deleted %d files, held %v, error %v; want %d, %v", got, who, err, deleted, held)
	}
}

func TestCollect(t *testing.T) {
	s, snapshot := shop(t)
	before := len(filesOf(t, s))                         // rows and deletes of two channels, and their compacted segments
	collect(t, s, 2, map[string]int{snapshot: 2, "": 2}) // the deletes are in no snapshot
	if n := len(filesOf(t, s)); before != 6 || n != 4 {
		t.Errorf("%d files, then %d; want 6, 4", before, n)
	}
	if _, rows, err := OpenSnapshot(t.Context(), s.c, s.dir, snapshot); err != nil || len(rows) != 100 {
		t.Errorf("the snapshot has %d rows, error %v; want 100", len(rows), err)
	}
	collect(t, s, 0, map[string]int{snapshot: 2, "": 2})
	drop(t, s.c, snapshot)
	collect(t, s, 2, map[string]int{"": 2})
	collect(t, s, 0, map[string]int{"": 2})
	if _, rows, err := Open(t.Context(), s.c, s.dir, "shop"); err != nil || len(rows) != 90 || len(filesOf(t, s)) != 2 {
		t.Errorf("%d rows in %d files, error %v; want 90 in 2", len(rows), len(filesOf(t, s)), err)
	}
}

// TestCollectAfterCrash interrupts Collect; the next call continues, in any process.
func TestCollectAfterCrash(t *testing.T) {
	for _, deleted := range []int{0, 1, 2} { // files, before the crash
		s, snapshot := shop(t)
		drop(t, s.c, snapshot)
		units := make([]*api.Unit, 0, 6)
		for _, name := range filesOf(t, s) {
			path, err := filepath.Rel(filepath.Join(s.dir, root), name)
			if err != nil {
				t.Fatal(err)
			}
			units = append(units, &api.Unit{Unit: &api.Unit_File{File: &api.UnitFile{Path: path}}})
		}
		answer, err := s.c.Reclaim.Reclaim(t.Context(), &api.ReclaimRequest{
			Collection: s.collection, Units: units, Deleter: api.Deleter_DELETER_CALLER,
		})
		if err != nil {
			t.Fatal(err)
		}
		granted := 0
		for i, r := range answer.GetResults() {
			if r.GetOutcome() != api.ReclaimResult_OUTCOME_GRANTED {
				continue
			}
			if granted++; granted <= deleted {
				if err := os.Remove(filepath.Join(s.dir, root, units[i].GetFile().GetPath())); err != nil {
					t.Fatal(err)
				}
			}
		}
		if granted != 4 {
			t.Fatalf("%d files were granted, want 4", granted)
		}
		again, rows, err := Open(t.Context(), s.c, s.dir, "shop")
		if err != nil || len(rows) != 90 {
			t.Fatalf("%d rows, error %v; want 90", len(rows), err)
		}
		collect(t, again, 4, map[string]int{"": 2}) // deleted ones count, too
		list, err := s.c.Reclaim.ListTombstones(t.Context(), &api.ListTombstonesRequest{Collection: s.collection})
		if err != nil || len(list.GetTombstones()) != 0 || len(filesOf(t, s)) != 2 {
			t.Errorf(
				"%d tombstones and %d files are left, error %v; want 0 and 2", len(list.GetTombstones()), len(filesOf(t, s)), err,
			)
		}
	}
}

// TestAwait opens a restored collection on its event, after its source was dropped.
func TestAwait(t *testing.T) {
	out, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr := os.Stderr
	os.Stderr = in
	t.Cleanup(func() {
		os.Stderr = stderr
		_, _ = in.Close(), out.Close()
	})
	s, snapshot := shop(t)
	if _, err := s.c.Catalog.DropCollection(t.Context(), &api.DropCollectionRequest{
		Collection: s.collection,
	}); err != nil {
		t.Fatal(err)
	}
	opened := make(chan []Row)
	go func() {
		_, rows, err := Await(t.Context(), s.c, s.dir, "restored")
		if err != nil {
			t.Error(err)
		}
		opened <- rows
	}()
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "engine: waiting for restored\n" {
		t.Fatalf("got %q, %v", line, err)
	}
	if _, err := s.c.Snapshots.RestoreSnapshot(t.Context(), restoreOf(snapshot, "restored")); err != nil {
		t.Fatal(err)
	}
	_, want, err := OpenSnapshot(t.Context(), s.c, s.dir, snapshot)
	if err != nil {
		t.Fatal(err)
	}
	if rows := <-opened; len(rows) != 100 || digest(rows) != digest(want) {
		t.Errorf("got %d rows, want the %d of the snapshot", len(rows), len(want))
	}
}
