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
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				col, _, _ := e.collection(r, "c")
				owner := e.segment(r, col, 0, 1, 20) // its file is of field 100
				taker := e.segment(r, col, 0, 1, 20)
				for taker.ID != 100 {
					taker.ID = e.newID(r)
				}
				taker.Files[0].Path = owner.Files[0].Path
				want := catalog.ErrPlaceOwned
				if ownerFirst {
					e.add(r, col, owner)
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
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		prod, _, _ := e.collection(r, "prod")
		clone, _, _ := e.collection(r, "clone")
		s := e.segment(r, prod, 0, 1, 20)
		e.addWritten(r, prod, s)
		e.checkpoint(r, prod, 100, 100)
		e.create(r, prod, "nightly")
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
		own := e.segment(r, clone, 0, 1, 20)
		fresh := own
		fresh.Files = s.Files
		refused("its path, under another id", catalog.ErrPlaceOwned, "default/prod", fresh)
		fresh.Files = []segment.File{{
			Kind: segment.KindInsert, Path: catalog.NativePath(prod.ID, &own, &own.Files[0]),
			Size: 10,
		}}
		refused("a path of the other collection with an id of its own", catalog.ErrPlaceOwned, "default/prod", fresh)
		unused := own
		unused.ID = e.newID(r)
		fresh.Files = []segment.File{{
			Kind: segment.KindInsert, Path: catalog.NativePath(clone.ID, &unused, &own.Files[0]),
			Size: 10,
		}}
		refused("a path of a segment that is not there", catalog.ErrPlaceOwned, "no collection", fresh)
		e.add(r, clone, own)
		_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: clone.ID}, catalog.SegmentChange{
			Update: []catalog.Update{{Segment: own.ID, AddFiles: s.Files}},
		})
		wantError(t, err, catalog.ErrPlaceOwned)

		e.drops(r, clone)
		e.dropSegments(r, prod, s.ID)
		e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		time.Sleep(10 * time.Minute)
		settle()
		if got := e.objectsUnder("data/"); !slices.Contains(got, "data/"+s.Files[0].Path) {
			t.Errorf("the file that snapshot nightly holds is gone: %v", got)
		}
	})
}

// TestEqualNumbers checks that an equal number in a path, such as a log id, does not
// make a file that of another segment.
func TestEqualNumbers(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		a, _, _ := e.collection(r, "a")
		b, _, _ := e.collection(r, "b")
		of := e.segment(r, a, 0, 1, 20)
		equal := e.segment(r, b, 0, 1, 20)
		// All numbers in the path of a's file outside its place equal b's segment id.
		of.Files[0].Field, of.Files[0].LogID = equal.ID, equal.ID
		of.Files[0].Path = catalog.NativePath(a.ID, &of, &of.Files[0])
		e.addWritten(r, a, of)
		equal.Files = append(equal.Files, of.Files[0])
		_, _, err := r.catalog.AddSegments(t.Context(), b.ID, []segment.Segment{equal})
		wantError(t, err, catalog.ErrPlaceOwned)
		equal.Files = equal.Files[:1]
		e.addWritten(r, b, equal)
		e.dropSegments(r, b, equal.ID)
		e.drops(r, b)
		e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		time.Sleep(10 * time.Minute)
		settle()
		if got, want := e.objectsUnder("data/"), "data/"+of.Files[0].Path; len(got) != 1 || got[0] != want {
			t.Errorf("left %v, want %s", got, want)
		}
	})
}

// TestIDsOfARestoreAreTaken checks that engines cannot use the ids of a restore while a
// late copy of it may arrive.
func TestIDsOfARestoreAreTaken(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col := e.richCollection(r, "c", 3)
		other, _, _ := e.collection(r, "other")
		job := e.restore(r, restoreSpecOf(e.create(r, col, "one")))
		try := func(id, of int64) error {
			s := e.segment(r, other, 0, 1, 20)
			s.ID = id
			s.Files[0].Path = catalog.NativePath(of, &s, &s.Files[0])
			_, _, err := r.catalog.AddSegments(t.Context(), other.ID, []segment.Segment{s})
			return err
		}
		wantError(t, try(job.FirstSegment, job.Target), catalog.ErrPlaceOwned)
		wantError(t, try(job.FirstSegment, other.ID), catalog.ErrIDOwned)
		wantError(t, try(job.FirstBuild, other.ID), catalog.ErrIDOwned)
		e.waitEnded(r, job.ID)
		wantError(t, try(job.FirstSegment, other.ID), catalog.ErrIDOwned)
		wantError(t, try(e.newID(r), job.Target), catalog.ErrPlaceOwned)
	})
}
