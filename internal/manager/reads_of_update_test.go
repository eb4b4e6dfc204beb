package manager

import (
	"crypto/sha256"
	"fmt"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestReadsOfAnUpdate repeatedly replaces an index build that a snapshot holds and the
// collector spills: the segment's record identifies earlier builds, so the number of
// reads does not grow.
func TestReadsOfAnUpdate(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, x := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s)
		e.checkpoint(r, col, 100, 100)
		var last segment.Build
		replace := func(n int, state string) {
			last = segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
			for j := range 20 {
				f := segment.File{
					Kind: segment.KindIndex,
					Path: fmt.Sprintf("%d/index/%d/f%x", col.ID, last.ID, sha256.Sum256([]byte{byte(j)})), Size: 5,
				}
				e.write("data/" + f.Path)
				last.Files = append(last.Files, f)
			}
			settle() // so that only the update makes calls
			calls, gets := r.kv.Calls(), r.store.Calls("")
			e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, AddBuilds: []segment.Build{last}}}})
			if calls, gets = r.kv.Calls()-calls, r.store.Calls("")-gets; calls > 16 || gets > 1 { // one reads the clock
				t.Fatalf("an update with %d %s builds makes %d metadata and %d object calls", n, state, calls, gets)
			}
		}
		for n := range 101 {
			replace(n, "replaced")
			e.create(r, col, fmt.Sprint("s", n))
		}
		time.Sleep(3 * time.Hour)
		settle()
		if n := len(e.objectsUnder(catalog.SpillPrefix)); n < 90 {
			t.Fatalf("%d units are spilled", n)
		}
		first := last
		replace(101, "spilled")
		// A path of a replaced build is rejected, whatever the state of the build.
		first.ID = e.newID(r)
		_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
			catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, AddBuilds: []segment.Build{first}}}})
		wantError(t, err, catalog.ErrFileExists)
	})
}
