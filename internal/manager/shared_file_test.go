package manager

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestFileOfTwoSegments checks that a segment whose id equals a field id in a path does
// not own the file of another segment, in either order of registration.
func TestFileOfTwoSegments(t *testing.T) {
	for name, ownerFirst := range map[string]bool{"the owner first": true, "the owner last": false} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, w *testEnv) {
				r := w.start("a")
				col, _, _ := w.collection(r, "c")
				owner := w.segment(r, col, 0, 1, 20) // its file is of field 100
				taker := w.segment(r, col, 0, 1, 20)
				for taker.ID != 100 {
					taker.ID = w.newID(r)
				}
				taker.Files[0].Path = owner.Files[0].Path
				want := catalog.ErrPlaceOwned
				if ownerFirst {
					w.add(r, col, owner)
					want = catalog.ErrFileExists
				}
				_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{taker})
				wantError(t, err, want)
			})
		})
	}
}

// TestFileOfTwoCollections checks that a file under the place of a segment of one
// collection cannot be registered in another, whose drop would delete it.
func TestFileOfTwoCollections(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		prod, _, _ := w.collection(r, "prod")
		clone, _, _ := w.collection(r, "clone")
		s := w.segment(r, prod, 0, 1, 20)
		w.addWritten(r, prod, s)
		w.checkpoint(r, prod, 100, 100)
		w.create(r, prod, "nightly")
		refused := func(what string, want error, owner string, s segment.Segment) {
			t.Helper()
			_, _, err := r.catalog.AddSegments(t.Context(), clone.ID, []segment.Segment{s})
			_, swapErr := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: clone.ID},
				catalog.SegmentChange{Add: []segment.Segment{s}})
			if errors.Is(swapErr, catalog.ErrIDOwned) {
				swapErr = fmt.Errorf("%w: %w", want, swapErr) // checked first
			}
			for _, err := range []error{err, swapErr} {
				if wantError(t, err, want); err != nil && !strings.Contains(err.Error(), owner) {
					t.Errorf("%s: %v does not name %s", what, err, owner)
				}
			}
		}
		refused("the line of a segment as it is", catalog.ErrPlaceOwned, "default/prod", s)
		elsewhere := s
		elsewhere.Files = []segment.File{{
			Kind: segment.KindInsert, Path: "copy/1", MinTimestamp: 1,
			MaxTimestamp: 20, Size: 10,
		}}
		refused("its id, with another path", catalog.ErrIDOwned, "default/prod", elsewhere)
		own := w.segment(r, clone, 0, 1, 20)
		fresh := own
		fresh.Files = s.Files
		refused("its path, under another id", catalog.ErrPlaceOwned, "default/prod", fresh)
		fresh.Files = []segment.File{{
			Kind: segment.KindInsert, Path: catalog.NativePath(prod.ID, &own, &own.Files[0]),
			Size: 10,
		}}
		refused("a path of the other collection with an id of its own", catalog.ErrPlaceOwned, "default/prod", fresh)
		unused := own
		unused.ID = w.newID(r)
		fresh.Files = []segment.File{{
			Kind: segment.KindInsert, Path: catalog.NativePath(clone.ID, &unused, &own.Files[0]),
			Size: 10,
		}}
		refused("a path of a segment that is not there", catalog.ErrPlaceOwned, "no collection", fresh)
		w.add(r, clone, own)
		_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: clone.ID}, catalog.SegmentChange{
			Update: []catalog.Update{{Segment: own.ID, AddFiles: s.Files}},
		})
		wantError(t, err, catalog.ErrPlaceOwned)

		w.drops(r, clone)
		w.dropSegments(r, prod, s.ID)
		w.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		time.Sleep(10 * time.Minute)
		settle()
		if got := w.objectsUnder("data/"); !slices.Contains(got, "data/"+s.Files[0].Path) {
			t.Errorf("the file that snapshot nightly holds is gone: %v", got)
		}
	})
}

// TestEqualNumbers checks that an equal number in a path, such as a log id, does not
// make a file that of another segment.
func TestEqualNumbers(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		a, _, _ := w.collection(r, "a")
		b, _, _ := w.collection(r, "b")
		of := w.segment(r, a, 0, 1, 20)
		equal := w.segment(r, b, 0, 1, 20)
		// All numbers in the path of a's file outside its place equal b's segment id.
		of.Files[0].Field, of.Files[0].LogID = equal.ID, equal.ID
		of.Files[0].Path = catalog.NativePath(a.ID, &of, &of.Files[0])
		w.addWritten(r, a, of)
		equal.Files = append(equal.Files, of.Files[0])
		_, _, err := r.catalog.AddSegments(t.Context(), b.ID, []segment.Segment{equal})
		wantError(t, err, catalog.ErrPlaceOwned)
		equal.Files = equal.Files[:1]
		w.addWritten(r, b, equal)
		w.dropSegments(r, b, equal.ID)
		w.drops(r, b)
		w.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		time.Sleep(10 * time.Minute)
		settle()
		if got, want := w.objectsUnder("data/"), "data/"+of.Files[0].Path; len(got) != 1 || got[0] != want {
			t.Errorf("left %v, want %s", got, want)
		}
	})
}

// TestIDsOfARestoreAreTaken checks that engines cannot use the ids of a restore while a
// late copy of it may arrive.
func TestIDsOfARestoreAreTaken(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col := w.richCollection(r, "c", 3)
		other, _, _ := w.collection(r, "other")
		job := w.restore(r, restoreSpecOf(w.create(r, col, "one")))
		try := func(id, of int64) error {
			s := w.segment(r, other, 0, 1, 20)
			s.ID = id
			s.Files[0].Path = catalog.NativePath(of, &s, &s.Files[0])
			_, _, err := r.catalog.AddSegments(t.Context(), other.ID, []segment.Segment{s})
			return err
		}
		wantError(t, try(job.FirstSegment, job.Target), catalog.ErrPlaceOwned)
		wantError(t, try(job.FirstSegment, other.ID), catalog.ErrIDOwned)
		wantError(t, try(job.FirstBuild, other.ID), catalog.ErrIDOwned)
		w.waitEnded(r, job.ID)
		wantError(t, try(job.FirstSegment, other.ID), catalog.ErrIDOwned)
		wantError(t, try(w.newID(r), job.Target), catalog.ErrPlaceOwned)
	})
}
