package manager

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// TestStragglers checks that late copies of frozen workers are deleted before the job is
// forgotten, and the target's own files are not.
func TestStragglers(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.KeepRestores = 24 * time.Hour })
		s := e.create(r, e.richCollection(r, "c", 12), "one")
		job := e.waitEnded(r, e.restore(r, restoreSpecOf(s)).ID).Job
		if job.State != copyjob.Completed {
			t.Fatalf("%+v", job)
		}
		col, err := r.catalog.Collection(t.Context(), catalog.Ref{ID: job.Target})
		if err != nil {
			t.Fatal(err)
		}
		var segments []segment.Segment
		if _, err := r.catalog.ScanSegments(t.Context(), col.ID, 0, func(batch []segment.Segment) error {
			segments = append(segments, batch...)
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		// One segment is reclaimed, one dropped and held, and a build replaced.
		gone, held := segments[0], segments[2]
		at := slices.IndexFunc(segments, func(s segment.Segment) bool { return len(s.Builds) > 0 })
		built := segments[at]
		build := built.Builds[0]
		e.granted(e.reclaim(r, col, gc.BySnapshotd, e.dropSegments(r, col, gone.ID)...))
		e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: built.ID, RemoveBuilds: []int64{build.ID}}}})
		e.granted(e.reclaim(r, col, gc.BySnapshotd, gc.Ask{Build: build.ID}))
		e.create(r, col, "holder")
		e.dropSegments(r, col, held.ID)
		time.Sleep(10 * time.Minute)
		settle()
		before := e.objectsUnder("data/")
		dir := fmt.Sprintf("data/%d/", col.ID)
		kept := []string{
			dir + "README", // foreign
			dir + fmt.Sprintf("0/%d/insert/100/77", e.newID(r)),     // of an engine
			dir + fmt.Sprintf("0/%d/insert/100/77", segments[1].ID), // of a registered segment
		}
		late := []string{"data/" + gone.Files[0].Path, "data/" + build.Files[0].Path}
		for _, key := range late {
			if slices.Contains(before, key) {
				t.Fatalf("%s is not deleted", key)
			}
		}
		e.write(slices.Concat(kept, late)...)
		time.Sleep(23*time.Hour + 30*time.Minute)
		e.write(late[0]) // again, shortly before the end
		time.Sleep(30 * time.Minute)
		if n := len(e.keysUnder(keys.JobPrefix)); n != 1 {
			t.Errorf("%d jobs while a late copy is recent", n)
		}
		time.Sleep(2 * time.Hour)
		settle()
		want := slices.Sorted(slices.Values(slices.Concat(before, kept)))
		if diff := cmp.Diff(want, e.objectsUnder("data/")); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if got := e.keysUnder(keys.JobPrefix); len(got) > 0 {
			t.Errorf("left %v", got)
		}
		if n, _ := r.GC.Counters().Of(gc.ByRestore); n != 2 {
			t.Errorf("counted %d objects", n)
		}
	})
}

// uploadStore is a store with one open upload.
type uploadStore struct {
	object.Store
	mu    sync.Mutex
	key   string
	began time.Time // zero: the upload was aborted
}

func (s *uploadStore) AbortUploads(_ context.Context, prefix string, before time.Time) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.began.IsZero() || !strings.HasPrefix(s.key, prefix) || !before.IsZero() && !s.began.Before(before) {
		return 0, nil
	}
	s.began = time.Time{}
	return 1, nil
}

func (s *uploadStore) OldestUpload(_ context.Context, prefix string) (time.Time, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !strings.HasPrefix(s.key, prefix) {
		return time.Time{}, nil
	}
	return s.began, nil
}

// TestUploadAfterTheEnd checks that a job stays until an upload that a worker began after
// the job's end is old enough to be aborted, and that an upload of the engine does not hold it.
func TestUploadAfterTheEnd(t *testing.T) {
	for name, c := range map[string]struct {
		after time.Duration // the end
		holds bool
	}{"of a worker": {16 * time.Minute, true}, "of an engine": {18 * time.Minute, false}} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				uploads := &uploadStore{Store: e.objects}
				e.objects = uploads
				r := e.start("a", func(o *testOptions) { o.Parts.KeepRestores = time.Hour })
				job := e.waitEnded(r, e.restore(r, restoreSpecOf(e.create(r, e.richCollection(r, "c", 4), "one"))).ID).Job
				time.Sleep(c.after)
				uploads.mu.Lock()
				uploads.key, uploads.began = fmt.Sprintf("data/%d/x", job.Target), time.Now()
				uploads.mu.Unlock()
				time.Sleep(time.Hour - c.after + 5*time.Minute)
				if n := len(e.keysUnder(keys.JobPrefix)); (n == 1) != c.holds {
					t.Errorf("%d jobs while the upload is recent", n)
				}
				time.Sleep(2 * time.Hour)
				settle()
				if n := len(e.keysUnder(keys.JobPrefix)); n != 0 {
					t.Errorf("left %d jobs", n)
				}
				uploads.mu.Lock()
				defer uploads.mu.Unlock()
				if uploads.began.IsZero() != c.holds {
					t.Errorf("the upload was begun %v", uploads.began)
				}
			})
		})
	}
}

// TestStragglersOfDroppedTarget checks that late copies are deleted after the target was
// dropped.
func TestStragglersOfDroppedTarget(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			o.Parts.KeepRestores = 24 * time.Hour
			o.Parts.Collector.Tolerance = time.Minute
		})
		s := e.create(r, e.richCollection(r, "c", 4), "one")
		before := e.objectsUnder("data/")
		job := e.waitEnded(r, e.restore(r, restoreSpecOf(s)).ID).Job
		dir := fmt.Sprintf("data/%d/", job.Target)
		copies := e.objectsUnder(dir)
		if _, err := r.catalog.DropCollection(t.Context(), token("x", "y"), catalog.Ref{ID: job.Target}, 0); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		if got := e.objectsUnder(dir); len(got) > 0 || len(copies) == 0 {
			t.Fatalf("left %v of %d", got, len(copies))
		}
		e.write(copies...)
		time.Sleep(26 * time.Hour)
		settle()
		if diff := cmp.Diff(before, e.objectsUnder("data/")); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
	})
}

// TestRollBackKeepsForeignFiles checks that roll back deletes the job's objects and no
// others.
func TestRollBackKeepsForeignFiles(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.KeepRestores = 24 * time.Hour })
		s := e.create(r, e.richCollection(r, "c", 40), "one")
		before := e.objectsUnder("")
		r.store.SetLatency(time.Second)
		job := e.restore(r, restoreSpecOf(s))
		time.Sleep(10 * time.Second)
		dir := fmt.Sprintf("data/%d/", job.Target)
		foreign := []string{
			dir + "README", dir + fmt.Sprintf("0/%d/insert/100/1", job.FirstSegment+job.Segments),
			dir + fmt.Sprintf("0/%d/notes", job.FirstSegment),
		}
		e.write(foreign...)
		if _, err := r.Jobs.Cancel(t.Context(), job.ID); err != nil {
			t.Fatal(err)
		}
		if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Canceled {
			t.Fatalf("%+v", end.Job)
		}
		want := slices.Sorted(slices.Values(slices.Concat(before, foreign)))
		if diff := cmp.Diff(want, e.objectsUnder("")); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		e.write(dir + fmt.Sprintf("0/%d/insert/100/1", job.FirstSegment)) // late
		time.Sleep(25 * time.Hour)
		settle()
		if diff := cmp.Diff(want, e.objectsUnder("")); diff != "" {
			t.Errorf("forgotten (-want +got):\n%s", diff)
		}
		if got := e.keysUnder(keys.JobPrefix); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}
