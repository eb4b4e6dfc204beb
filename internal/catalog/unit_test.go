package catalog_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
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

// Nothing that is not the whole record of a unit is taken for one without files.
func TestUnitOfStub(t *testing.T) {
	stub := &storagev1.Unit{Format: 1, Kind: 2, SegmentId: 65, DropTime: 7, Parked: &storagev1.Parked{Store: "default", Length: 3}}
	if _, err := catalog.UnitOf(1, 66, stub); !errors.Is(err, catalog.ErrParked) {
		t.Errorf("a stub: err = %v, want %v", err, catalog.ErrParked)
	}
	if _, err := catalog.UnitOf(1, 66, &storagev1.Unit{Format: 1, Kind: 2, SegmentId: 65}); !errors.Is(err, record.ErrUnreadable) {
		t.Errorf("a record of nothing: err = %v, want %v", err, record.ErrUnreadable)
	}
	u := catalog.StubOf(66, stub)
	want := catalog.Unit{
		ID: 66, Kind: catalog.UnitBuild, Segment: segment.Segment{ID: 65, State: segment.Dropped}, DropTime: time.Unix(0, 7).UTC(), Parked: true,
	}
	if diff := cmp.Diff(want, u); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	defer func() {
		if recover() == nil {
			t.Error("its files can be asked for")
		}
	}()
	u.Owned()
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
