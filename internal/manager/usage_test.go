package manager

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// kept is the model of a collection and its snapshots: live segments, units by drop,
// and the content of each snapshot.
type kept struct {
	t         *testing.T
	env       *env
	r         *testReplica
	col       catalog.Collection
	index     int64
	live      map[int64]segment.Segment
	units     []droppedUnit
	snapshots []*snapshot.Record
	has       map[int64]map[int64]segment.Segment // segments of a snapshot, by its id
	n         int
}

type droppedUnit struct {
	ask     gc.Ask
	segment int64
	build   int64 // 0: not a build
	taken   int   // 1 + number of snapshots that began before its removal; 0: the whole segment
	files   map[string]int64
}

// heldBy reports whether a snapshot holds the unit.
func (k *kept) heldBy(u *droppedUnit, id int64) bool {
	s, ok := k.has[id][u.segment]
	switch {
	case !ok:
		return false
	case u.build != 0:
		return slices.ContainsFunc(s.Builds, func(b segment.Build) bool { return b.ID == u.build })
	case u.taken > 0: // an older snapshot has the segment, but possibly not the file
		return slices.IndexFunc(k.snapshots, func(s *snapshot.Record) bool { return s.ID == id }) < u.taken-1
	}
	return true
}

// ownFiles adds the sizes of the files under the place of a segment.
func (k *kept) ownFiles(into map[string]int64, files []segment.File, id int64) {
	for _, f := range files {
		if strings.HasPrefix(f.Path, fmt.Sprintf("%d/0/%d/", k.col.ID, id)) {
			into[f.Path] = f.Size
		}
	}
}

func (k *kept) file(kind, path string, size int) segment.File {
	return segment.File{Kind: kind, Path: path, Size: int64(size), MinTimestamp: 1, MaxTimestamp: 5, Field: 100, LogID: 1}
}

func (k *kept) build(s int64, n int) segment.Build {
	b := segment.Build{ID: k.env.newID(k.r), Index: k.index, Field: 100}
	path := []string{
		"%[1]d/0/%[2]d/i/%[3]d/f", "%[1]d/i/%[3]d/f", "%[1]d/0/%[2]d/i/v%[3]d",
		"foreign/%[1]d-%[2]d-%[3]d",
	}[n%4]
	b.Files = []segment.File{k.file(segment.KindIndex, fmt.Sprintf(path, k.col.ID, s, b.ID), 1+n)}
	k.env.writeFiles(&segment.Segment{Builds: []segment.Build{b}})
	return b
}

func (k *kept) newSegment(n int) segment.Segment {
	s := segment.Segment{
		ID: k.env.newID(k.r), Level: 1, State: segment.Flushed, Rows: 1,
		DML: segment.Position{Timestamp: 6},
	}
	s.Files = []segment.File{k.file(segment.KindInsert, fmt.Sprintf("%d/0/%d/insert/100/1", k.col.ID, s.ID), 1+n)}
	if n%3 == 0 {
		s.Files = append(s.Files, k.file(segment.KindStats, fmt.Sprintf("foreign/%d", s.ID), 1+n))
	}
	k.env.writeFiles(&s)
	if n%2 == 0 {
		s.Builds = []segment.Build{k.build(s.ID, n/2)}
	}
	return s
}

func (k *kept) dropped(s *segment.Segment) {
	u := droppedUnit{ask: gc.Ask{Segment: s.ID}, segment: s.ID, files: map[string]int64{}}
	k.ownFiles(u.files, s.Files, s.ID)
	for _, b := range s.Builds {
		k.ownFiles(u.files, b.Files, s.ID)
	}
	k.units = append(k.units, u)
}

func (k *kept) do(s step) {
	id, ok := pickOf(k.live, s.A)
	seg := k.live[id]
	switch s.Op {
	case "add":
		seg := k.newSegment(s.A)
		k.env.add(k.r, k.col, seg)
		k.live[seg.ID] = seg
	case "drop":
		if ok {
			k.env.dropSegments(k.r, k.col, id)
			k.dropped(&seg)
			delete(k.live, id)
		}
	case "compact":
		if ok {
			out := k.newSegment(s.B)
			k.env.swap(k.r, k.col, catalog.SegmentChange{Drop: []int64{id}, Add: []segment.Segment{out}})
			k.dropped(&seg)
			delete(k.live, id)
			k.live[out.ID] = out
		}
	case "rebuild":
		if ok {
			b := k.build(id, s.B)
			k.env.swap(k.r, k.col, catalog.SegmentChange{Update: []catalog.Update{{Segment: id, AddBuilds: []segment.Build{b}}}})
			for _, old := range seg.Builds {
				u := droppedUnit{ask: gc.Ask{Build: old.ID}, segment: id, build: old.ID, files: map[string]int64{}}
				k.ownFiles(u.files, old.Files, id)
				k.units = append(k.units, u)
			}
			seg.Builds = []segment.Build{b}
			k.live[id] = seg
		}
	case "replace":
		if ok {
			k.n++
			f := k.file(segment.KindInsert, fmt.Sprintf("%d/0/%d/insert/100/r%d", k.col.ID, id, k.n), 1+s.B)
			k.env.writeFiles(&segment.Segment{Files: []segment.File{f}})
			old := seg.Files[0]
			path := catalog.FilePath{Path: old.Path}
			k.env.swap(k.r, k.col, catalog.SegmentChange{Update: []catalog.Update{{
				Segment:     id,
				RemoveFiles: []catalog.FilePath{path}, AddFiles: []segment.File{f},
			}}})
			u := droppedUnit{
				ask: gc.Ask{File: path, FileSegment: id}, segment: id, taken: 1 + len(k.snapshots),
				files: map[string]int64{},
			}
			k.ownFiles(u.files, []segment.File{old}, id)
			k.units = append(k.units, u)
			seg.Files = append(slices.Clone(seg.Files[1:]), f)
			k.live[id] = seg
		}
	case "snapshot":
		k.n++
		snap := k.env.create(k.r, k.col, fmt.Sprint("s", k.n))
		k.snapshots = append(k.snapshots, snap)
		k.has[snap.ID] = maps.Clone(k.live)
	}
}

// reclaimAll reclaims all free units.
func (k *kept) reclaimAll() {
	var asks []gc.Ask
	for _, u := range k.units {
		asks = append(asks, u.ask)
	}
	if len(asks) > 0 {
		k.env.reclaim(k.r, k.col, gc.BySnapshotd, asks...)
	}
	time.Sleep(2 * time.Minute)
	settle()
}

func (k *kept) bytes() (n int64) {
	for info, err := range k.env.objects.List(k.t.Context(), "data/") {
		if err != nil {
			k.t.Fatal(err)
		}
		n += info.Size
	}
	return n
}

// want computes the exclusive usage of a snapshot.
func (k *kept) want(id int64) (bytes, files int64) {
	for i := range k.units {
		u := &k.units[i]
		if slices.ContainsFunc(k.snapshots, func(s *snapshot.Record) bool { return s.ID != id && k.heldBy(u, s.ID) }) {
			continue
		}
		for _, s := range k.has[id] {
			for f := range s.AllFiles() {
				if size, ok := u.files[f.Path]; ok && s.ID == u.segment {
					bytes += size
					files++
				}
			}
		}
	}
	return bytes, files
}

// seenUsage counts bytes and files of each kind.
type seenUsage struct{ shared, exclusive, more atomic.Int64 }

func TestUsageIsWhatADropFrees(t *testing.T) {
	var seen seenUsage
	// Rare cases: an older build of a dropped segment, and files that
	// were added after the snapshot.
	rare := []step{
		{Op: "add"},
		{Op: "add", A: 1},
		{Op: "snapshot"},
		{Op: "rebuild"},
		{Op: "replace", A: 1},
		{Op: "snapshot"},
		{Op: "drop"},
		{Op: "drop"},
		{Op: "add"},
		{Op: "snapshot"},
		{Op: "replace"},
		{Op: "replace"},
		{Op: "drop"},
	}
	for which := range 4 {
		usageCourse(t, rare, which, &seen)
	}
	rapid.Check(t, func(rt *rapid.T) {
		ops := []string{"add", "add", "drop", "compact", "rebuild", "rebuild", "replace", "snapshot", "snapshot"}
		steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
			return step{
				Op: rapid.SampledFrom(ops).Draw(t, "op"), A: rapid.IntRange(0, 99).Draw(t, "a"),
				B: rapid.IntRange(0, 99).Draw(t, "b"),
			}
		}), 5, 40).Draw(rt, "steps")
		which := rapid.IntRange(0, 99).Draw(rt, "which")
		usageCourse(t, steps, which, &seen)
	})
	for what, n := range map[string]int64{
		"exclusive": seen.exclusive.Load(), "shared": seen.shared.Load(), "freed in addition": seen.more.Load(),
	} {
		if n == 0 {
			t.Errorf("there never was anything %s", what)
		}
	}
}

// usageCourse executes steps and compares the usage of each snapshot with the model,
// and the effect of one drop.
func usageCourse(t *testing.T, steps []step, which int, seen *seenUsage) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		kv := metamemory.New(metamemory.Options{Now: time.Now})
		e := &env{t: t, kv: kv, memory: kv, objects: objectmemory.New(objectmemory.Options{Now: time.Now}), now: time.Now}
		r := e.start("a", func(o *testOptions) { o.Log, o.MaxCreates = zap.NewNop(), 2 })
		col, _, x := e.collection(r, "c")
		e.checkpoint(r, col, 100, 100)
		k := &kept{
			t: t, env: e, r: r, col: col, index: x.ID, live: map[int64]segment.Segment{},
			has: map[int64]map[int64]segment.Segment{},
		}
		for _, s := range append(slices.Clone(steps), step{Op: "snapshot"}) {
			k.do(s)
		}
		for _, s := range k.snapshots {
			u, err := r.Usage(t.Context(), Ref{ID: s.ID})
			if err != nil {
				t.Fatal(err)
			}
			bytes, files := k.want(s.ID)
			if u.ExclusiveBytes != bytes || u.ExclusiveFiles != files ||
				u.ExclusiveBytes+u.SharedBytes != s.Totals.Bytes || u.ExclusiveFiles+u.SharedFiles != s.Totals.Files {
				t.Fatalf("steps %+v: %s uses %+v of %+v, want %d bytes in %d files", steps, s, u, s.Totals, bytes, files)
			}
			seen.shared.Add(u.SharedFiles)
			seen.exclusive.Add(u.ExclusiveFiles)
		}
		k.reclaimAll()
		s := k.snapshots[which%len(k.snapshots)]
		exact, _ := k.want(s.ID)
		id, u, err := r.CheckDrop(t.Context(), Ref{ID: s.ID}, 0)
		if err != nil || id != s.ID {
			t.Fatalf("check drop: %d, err = %v", id, err)
		}
		before := k.bytes()
		var goes int64
		for i := range k.units {
			unit := &k.units[i]
			if k.heldBy(unit, s.ID) &&
				!slices.ContainsFunc(k.snapshots, func(o *snapshot.Record) bool { return o != s && k.heldBy(unit, o.ID) }) {
				for _, size := range unit.files {
					goes += size
				}
			}
		}
		e.dropSnapshot(r, s)
		k.reclaimAll()
		freed := before - k.bytes()
		// A drop frees more than the usage if a unit has files added after the snapshot.
		if freed != goes || freed < exact || freed < u.ExclusiveBytes {
			t.Fatalf("steps %+v: the drop of %s freed %d, want %d; it had %d for itself, and its usage was %+v",
				steps, s, freed, goes, exact, u)
		}
		seen.more.Add(freed - exact)
		e.check(r)
	})
}

func TestUsageOfWhatIsNot(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(r, "c")
		e.checkpoint(r, col, 100, 100)
		_, err := r.Usage(t.Context(), Ref{Name: "none"})
		wantError(t, err, ErrSnapshotNotFound)
		id, u, err := r.CheckDrop(t.Context(), Ref{Name: "none"}, 0)
		if id != 0 || u != nil || err != nil {
			t.Errorf("got %d, %+v, err = %v", id, u, err)
		}
		b.store.Freeze()
		sp := spec(col, "pending")
		sp.NoWait = true
		if _, err := b.Create(t.Context(), request.Token{}, sp); err != nil {
			t.Fatal(err)
		}
		_, err = r.Usage(t.Context(), Ref{Name: "pending"})
		wantError(t, err, snapshot.ErrNotCommitted)
		_, _, err = r.CheckDrop(t.Context(), Ref{Name: "pending"}, 0)
		wantError(t, err, ErrSnapshotPending)
		b.store.Thaw()
		settle()
		s := e.create(r, col, "pinned")
		e.pin(r, s, 0)
		_, _, err = r.CheckDrop(t.Context(), Ref{ID: s.ID}, 0)
		wantError(t, err, ErrSnapshotPinned)
		if u, err := r.Usage(t.Context(), Ref{ID: s.ID}); err != nil || *u != (Usage{}) {
			t.Errorf("got %+v, err = %v", u, err)
		}
	})
}
