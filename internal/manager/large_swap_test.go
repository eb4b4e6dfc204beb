package manager

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// heavy registers n segments of many files, of which only the first of each exists, and
// returns their ids.
func (e *env) heavy(r *testReplica, col catalog.Collection, n, files int) []int64 {
	e.t.Helper()
	ids := make([]int64, n)
	for i := range ids {
		s := e.segment(r, col, 0, 1, 20)
		for j := range files {
			s.Files = append(s.Files, segment.File{
				Kind: segment.KindDelta, Path: fmt.Sprintf("%d/0/%d/delta/%d", col.ID, s.ID, j), Size: int64(j),
				ETag: fmt.Sprintf("%.16x", sha256.Sum256([]byte(fmt.Sprint(i, j)))),
			})
		}
		e.add(r, col, s)
		ids[i] = s.ID
	}
	return ids
}

func (e *env) compact(r *testReplica, col catalog.Collection, ids []int64) error {
	e.t.Helper()
	out := e.segment(r, col, 0, 1, 20)
	_, err := r.catalog.Change(e.t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
		catalog.SegmentChange{Drop: ids, Add: []segment.Segment{out}})
	return err
}

// TestLargeCompaction compacts segments whose records exceed one transaction while a
// snapshot holds them, drops the snapshot, and checks that all files are deleted.
func TestLargeCompaction(t *testing.T) {
	for _, c := range []struct{ segments, files int }{{50, 200}, {50, 800}, {59, 3000}, {6, 4000}} {
		t.Run(fmt.Sprintf("%d of %d files", c.segments, c.files), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
				col, _, _ := e.collection(r, "c")
				ids := e.heavy(r, col, c.segments, c.files)
				e.checkpoint(r, col, 100, 100)
				snap := e.create(r, col, "one")
				if err := e.compact(r, col, ids); err != nil {
					t.Fatal(err)
				}
				spilled := len(e.objectsUnder(catalog.SpillPrefix))
				if fits := c.segments*c.files < 25_000; (spilled == 0) != fits || spilled > c.segments {
					t.Errorf("%d of %d are spilled", spilled, c.segments)
				}
				if n := len(e.keysUnder("/catalog/unit/")); n != c.segments {
					t.Errorf("%d units of %d", n, c.segments)
				}
				settle()
				if _, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)}); sum.Granted != 0 ||
					sum.Held != int64(c.segments) {
					t.Errorf("%+v, while a snapshot holds them", sum)
				}
				got := e.segments(r, snap)
				if len(got) != c.segments || len(got[0].Files) != c.files+1 {
					t.Errorf("the snapshot has %d segments", len(got))
				}
				e.dropSnapshot(r, snap)
				time.Sleep(5 * time.Minute)
				settle()
				if _, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)}); sum.Granted != int64(c.segments) {
					t.Errorf("%+v, once nothing holds them", sum)
				}
				time.Sleep(30 * time.Minute)
				settle()
				for _, prefix := range []string{"/catalog/unit/", "/gc/tomb/"} {
					if left := e.keysUnder(prefix); len(left) > 0 {
						t.Errorf("%d keys are left, as %s", len(left), left[0])
					}
				}
				if left := e.objectsUnder(catalog.SpillPrefix); len(left) > 0 {
					t.Errorf("%d objects are left, as %s", len(left), left[0])
				}
			})
		})
	}
}

// TestLargeCompactionIsInterrupted fails both stores during a large compaction: it
// takes effect completely or not at all, and records spilled in vain stay only as long
// as their segment.
func TestLargeCompactionIsInterrupted(t *testing.T) {
	for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
			col, _, _ := e.collection(r, "c")
			ids := e.heavy(r, col, 50, 800)
			r.store.FailNth(object.OpPut, 3, fault)
			if err := e.compact(r, col, ids); err == nil {
				t.Fatal("it succeeded without all of its objects")
			}
			r.clearFaults()
			if n := len(e.keysUnder("/catalog/segment/")); n != 50 {
				t.Fatalf("%d segments", n)
			}
			left := e.objectsUnder(catalog.SpillPrefix)
			if len(left) == 0 {
				t.Fatal("nothing was spilled")
			}
			time.Sleep(48 * time.Hour)
			settle()
			if sum, err := r.Collector.Sweep(t.Context(), collect.SweepOptions{}); err != nil || sum.Deleted != 0 {
				t.Errorf("swept %+v, err = %v, while their segments live", sum, err)
			}
			if e, err := r.Collector.Explain(t.Context(), "default", left[0]); err != nil ||
				!strings.Contains(e.What, "record of the spilled unit") || !e.Kept {
				t.Errorf("%+v, err = %v", e, err)
			}
			// One segment changes meanwhile: the dropped content is spilled.
			e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: ids[0], Rows: new(int64(7))}}})
			if err := e.compact(r, col, ids); err != nil {
				t.Fatal(err)
			}
			_, sum := e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
			if sum.Granted != 50 {
				t.Errorf("%+v", sum)
			}
			time.Sleep(48 * time.Hour)
			settle()
			if _, err := r.Collector.Sweep(t.Context(), collect.SweepOptions{}); err != nil {
				t.Fatal(err)
			}
			if left := e.objectsUnder(catalog.SpillPrefix); len(left) > 0 {
				t.Errorf("%d objects are left, as %s", len(left), left[0])
			}
		})
	}
}

// TestLargestSegmentIsRestored registers ever larger segments until one is rejected.
// The largest accepted one is captured, restored, restored again from the target, and
// compacted.
func TestLargestSegmentIsRestored(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, x := e.collection(r, "c")
		var list []catalog.Index
		list = append(list, x)
		var last *segment.Segment
		for n := 1; ; n++ {
			s := e.segment(r, col, 0, 1, 9)
			for i := range n {
				if i == len(list) {
					ix, err := r.catalog.CreateIndex(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
						catalog.Index{Name: fmt.Sprint("x", i+1), Field: 100})
					if err != nil {
						t.Fatal(err)
					}
					list = append(list, ix)
				}
				b := segment.Build{ID: e.newID(r), Index: list[i].ID, Field: 100}
				for j := range 2000 {
					b.Files = append(b.Files,
						segment.File{Kind: segment.KindIndex, Path: fmt.Sprintf("%d/index/%d/%d", col.ID, b.ID, j), Size: 10})
				}
				s.Builds = append(s.Builds, b)
			}
			if _, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{s}); err != nil {
				wantError(t, err, catalog.ErrLimitExceeded)
				break
			}
			if last != nil {
				e.dropSegments(r, col, last.ID)
			}
			last = &s
		}
		if n := len(last.Builds); n < 7 || n > 12 {
			t.Errorf("the largest has %d builds", n)
		}
		for f := range last.AllFiles() {
			if _, err := e.objects.Put(t.Context(), "data/"+f.Path, tenBytes(f.Path)[:f.Size]); err != nil {
				t.Fatal(err)
			}
		}
		e.checkpoint(r, col, 10, 10)
		from := col
		for _, name := range []string{"first", "second"} {
			sp := restoreSpecOf(e.create(r, from, "of-"+name))
			sp.Name = name
			job := e.restore(r, sp)
			end := e.waitEnded(r, job.ID)
			if end.Job.State != copyjob.Completed {
				t.Fatalf("%s: it ended %v: %s: %s", name, end.Job.State, end.Job.Reason, end.Job.Message)
			}
			from = catalog.Collection{ID: job.Target}
		}
	})
}
