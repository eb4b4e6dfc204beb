package manager

import (
	"fmt"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestManifestsOfChunks checks that a chunk without captured segments leaves a gap in
// the manifest numbers and writes no object.
func TestManifestsOfChunks(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var all, want []segment.Segment
		for i := range 3*chunkSegments + 10 {
			s := e.segment(r, col, 0, 1, 2)
			switch {
			case i/chunkSegments == 1: // after the cut
				s = e.segment(r, col, 0, 10, 11)
			case i == 5: // straddles the cut
				s = e.segment(r, col, 0, 1, 11)
			}
			all = append(all, s)
			if i == 5 {
				s.RowCeiling = 10
			}
			if i/chunkSegments != 1 {
				want = append(want, s)
			}
		}
		e.add(r, col, all...)
		e.checkpoint(r, col, 10, 10)
		snap := e.create(r, col, "x")
		if diff := cmp.Diff(want, e.segments(r, snap)); diff != "" {
			t.Errorf("segments (-want +got):\n%s", diff)
		}
		d, err := r.Describe(t.Context(), Ref{Name: "x"})
		if err != nil {
			t.Fatal(err)
		}
		var files []string
		for _, m := range d.Metadata.Manifests {
			files = append(files, fmt.Sprint(m.File, " ", m.FirstOrdinal, " ", m.Segments))
		}
		if diff := cmp.Diff([]string{"manifest-0.avro 0 2500", "manifest-2.avro 2500 2500", "manifest-3.avro 5000 10"},
			files); diff != "" {
			t.Errorf("manifests (-want +got):\n%s", diff)
		}
		if snap.Totals.Segments != int64(len(want)) || snap.Totals.Straddling != 1 {
			t.Errorf("totals %+v", snap.Totals)
		}

		// Verification checks the files of every chunk.
		for _, s := range want[:len(want)-1] {
			if _, err := e.objects.Put(t.Context(), "data/"+s.Files[0].Path, []byte("ten bytes.")); err != nil {
				t.Fatal(err)
			}
		}
		last := "data/" + want[len(want)-1].Files[0].Path
		sp := spec(col, "verified")
		sp.Verify = true
		_, err = r.Create(t.Context(), request.Token{}, sp)
		wantError(t, err, ErrFileMissing)
		if !strings.Contains(errText(err), last) {
			t.Errorf("%v does not name %s", err, last)
		}
		if _, err := e.objects.Put(t.Context(), last, []byte("ten bytes.")); err != nil {
			t.Fatal(err)
		}
		again, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(snap.Totals, again.Totals); diff != "" {
			t.Errorf("totals (-unverified +verified):\n%s", diff)
		}
		e.check(r)
	})
}
