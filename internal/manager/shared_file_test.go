package manager

import (
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
)

// An id in a path may be that of a field: a segment with that id does not get
// hold of a file of another one, in whatever order the two are registered.
func TestFileOfTwoSegments(t *testing.T) {
	for name, ownerFirst := range map[string]bool{"the owner first": true, "the owner last": false} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, func(t *testing.T, w *world) {
				r := w.start("a")
				col, _, _ := w.collection(r, "c")
				owner := w.segment(r, col, 0, 1, 20) // its file is of field 100
				taker := w.segment(r, col, 0, 1, 20)
				for taker.ID != 100 {
					taker.ID = w.newID(r)
				}
				taker.Files[0].Path = owner.Files[0].Path
				if ownerFirst {
					w.add(r, col, owner)
					_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{taker})
					wantError(t, err, catalog.ErrFileExists)
					return
				}
				w.add(r, col, taker)
				w.add(r, col, owner)
				w.checkpoint(r, col, 100, 100)
				if _, err := r.catalog.DropSegments(t.Context(), catalog.Ref{ID: col.ID}, []int64{taker.ID}); err != nil {
					t.Fatal(err)
				}
				for _, deleter := range []gc.Deleter{gc.BySnapshotd, gc.ByCaller} {
					answers, err := r.GC().Reclaim(t.Context(), catalog.Ref{ID: col.ID}, []gc.Ask{{Segment: taker.ID}}, deleter, "tester")
					if err != nil || answers[0].State != gc.Dropped || answers[0].Holders != 1 || answers[0].LiveIn != owner.ID {
						t.Errorf("%+v, err = %v", answers, err)
					}
				}
			})
		})
	}
}
