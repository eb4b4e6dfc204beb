package manager

import (
	"fmt"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
)

// TestReadsOfAnUpdate replaces an index build again and again: what was replaced
// before is read in batches.
func TestReadsOfAnUpdate(t *testing.T) {
	inWorld(t, func(t *testing.T, w *world) {
		r := w.start("a", func(o *Options) { o.CollectorOff = true })
		col, _, x := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s)
		for n := range 101 {
			b := segment.Build{ID: w.newID(r), Index: x.ID, Field: 100}
			b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("%d/index/%d/f", col.ID, b.ID), Size: 5}}
			settle() // so that the calls are those of the update alone
			before := r.kv.Calls()
			w.swap(r, col, catalog.Swap{Update: []catalog.Update{{Segment: s.ID, AddBuilds: []segment.Build{b}}}})
			if calls := r.kv.Calls() - before; calls > 25 {
				t.Fatalf("an update with %d replaced builds makes %d calls", n, calls)
			}
		}
	})
}
