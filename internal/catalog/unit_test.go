package catalog_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
)

// A unit owns the files whose path has its id for an element.
func TestOwned(t *testing.T) {
	u := catalog.Unit{Segment: segment.Segment{
		ID:    65,
		Files: []segment.File{{Path: "65"}, {Path: "a/65/b"}, {Path: "a/650"}, {Path: "a/165/b"}, {Path: "65a/b"}, {Path: "a/66/b"}},
		Builds: []segment.Build{
			{ID: 66, Files: []segment.File{{Path: "66/c"}, {Path: "65/c"}, {Path: "67/c"}, {Path: "c"}}},
			{ID: 67, Files: []segment.File{{Path: "67/d"}, {Path: "66/d"}}},
		},
	}}
	var got []string
	for f := range u.Owned() {
		got = append(got, f.Path)
	}
	if want := []string{"65", "a/65/b", "66/c", "65/c", "67/d"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	for stop := range len(got) {
		n := 0
		for range u.Owned() {
			if n++; n > stop {
				break
			}
		}
		if n != stop+1 {
			t.Errorf("%d files after a stop at %d", n, stop)
		}
	}
}

// A file is found with what it is part of, through all its life.
func TestFindOwner(t *testing.T) {
	r := newRig(t, memory.New(memory.Options{}))
	ids := r.ids(t, 4)
	list := r.add(t, ids[0], ids[1])
	// What it is looked for with: by the path's ids, or by the segment's.
	find := func(path string, under int64) string {
		t.Helper()
		owner, found, err := r.FindOwner(t.Context(), r.col.ID, catalog.FilePath{Path: path}, under)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%v %+v", found, owner)
	}
	none := fmt.Sprintf("false %+v", catalog.Owner{})
	live := fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Live: true})
	path := list[0].Files[0].Path
	if got := find(path, 0); got != live {
		t.Errorf("got %s, want %s", got, live)
	}
	if got := find(path+"0", ids[0]); got != none {
		t.Errorf("got %s", got)
	}
	other := segment.File{Path: "anywhere/at-all", Kind: "k"}
	if err := r.change(t.Context(), catalog.Swap{Update: []catalog.Update{{
		Segment: ids[0], RemoveFiles: []catalog.FilePath{{Path: path}}, AddFiles: []segment.File{other},
	}}}); err != nil {
		t.Fatal(err)
	}
	units := unitIDs(r.units(t))
	if len(units) != 1 {
		t.Fatalf("units %v", units)
	}
	if got, want := find(path, 0), fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Unit: units[0]}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := find(other.Path, 0); got != none {
		t.Errorf("got %s", got)
	}
	if got := find(other.Path, ids[0]); got != live {
		t.Errorf("got %s, want %s", got, live)
	}
	if err := r.change(t.Context(), catalog.Swap{Drop: ids[:1]}); err != nil {
		t.Fatal(err)
	}
	if got, want := find(other.Path, ids[0]), fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Unit: ids[0]}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := find(list[0].Files[1].Path, ids[1]); got != fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Unit: ids[0]}) {
		t.Errorf("got %s", got)
	}
}
