package manager

import (
	"context"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// filled makes a collection with n segments whose files are there.
func (w *testEnv) filledCollection(r *replica, name string, n int) catalog.Collection {
	w.t.Helper()
	col, part, index := w.collection(r, name)
	for i := range n {
		s := w.segment(r, col, i%2, 1, 9)
		if i%3 == 0 {
			s.Partition = part.ID
			s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
		}
		if i%4 == 1 {
			build := segment.Build{ID: w.newID(r), Index: index.ID, Field: 100}
			f := segment.File{Kind: segment.KindIndex, Field: 100, LogID: int64(i), Size: 10}
			f.Path = catalog.NativePath(col.ID, &s, &f)
			build.Files = []segment.File{f}
			s.Builds = []segment.Build{build}
		}
		for f := range s.AllFiles() {
			w.putFile(f.Path)
		}
		w.add(r, col, s)
	}
	w.checkpoint(r, col, 10, 10)
	return col
}

// putFile writes the ten bytes of a file, which tell its path apart.
func (w *testEnv) putFile(path string) {
	w.t.Helper()
	if _, err := w.objects.Put(w.t.Context(), "data/"+path, tenBytes(path)); err != nil {
		w.t.Fatal(err)
	}
}

func tenBytes(path string) []byte {
	sum := uint64(14695981039346656037)
	for _, c := range []byte(path) {
		sum = (sum ^ uint64(c)) * 1099511628211
	}
	b := make([]byte, 10)
	for i := range b {
		b[i] = 'a' + byte(sum>>(5*i)&15)
	}
	return b
}

func (w *testEnv) waitEnded(r *replica, id int64) *copyjob.Status {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), time.Hour)
	defer cancel()
	var last *copyjob.Status
	if err := r.jobs.Watch(ctx, id, time.Millisecond, func(s *copyjob.Status) error {
		last = s
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	return last
}

func TestRestore(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col := w.filledCollection(r, "c", 70)
		s := w.create(r, col, "one")
		job, err := r.Restore(t.Context(), request.Token{}, &RestoreSpec{Snapshot: Ref{ID: s.ID}, DB: "default", Name: "copy"})
		if err != nil {
			t.Fatal(err)
		}
		end := w.waitEnded(r, job.ID)
		if end.Job.State != copyjob.Completed {
			t.Fatalf("%+v", end.Job)
		}
		target, err := r.catalog.Collection(t.Context(), catalog.Ref{DB: "default", Name: "copy"})
		if err != nil || target.ID != job.Target || target.State != catalog.Active {
			t.Fatalf("%+v, err = %v", target, err)
		}
		n, _, err := r.catalog.CountSegments(t.Context(), target.ID)
		if err != nil || n != 70 {
			t.Errorf("%d segments, err = %v", n, err)
		}
		for _, key := range w.keysUnder("/job/task/") {
			t.Errorf("%s is left", key)
		}
	})
}
