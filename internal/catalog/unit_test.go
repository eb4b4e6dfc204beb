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

// A unit owns the files that lie at the place of its segment, and no other that has
// an equal number for an element.
func TestOwned(t *testing.T) {
	own := []string{
		"7/2/65/insert/100/1", "7/0/65/a", "insert_log/7/2/65/100/1", "delta_log/7/-1/65/9",
		"insert_log/7/2/65/_data/0.parquet",
	}
	ownOfBuild := []string{
		"7/2/65/index/66/100-1", "index_files/66/1/2/65/HNSW_0", "index_v1/7/2/65/66/1/a/b", "text_log/66/1/7/2/65/101/a",
		"json_stats/2/66/1/7/2/65/101/meta.json", "7/2/65/index/67/100-1",
	}
	foreign := []string{
		"65", "65/c", "a/65/b", "a/7/2/65/b", "7/65/b", "7/2/66/insert/65/65", "8/2/65/insert/100/1", "65/65/66/65/65/65",
		"7/2/65", "7/2/065/a", "07/2/65/a",
		"insert_log/7/2/66/65/65", "insert_log/8/2/65/100/1", "delta_log/7/65/66/65", "index_files/65/1/2/66/65",
		"index_v1/8/2/65/66/1/a",
		"insert_log/7/2/65", "insert_log/7/2/65/", "insert_log/7/2/lobs/65/1", "part_stats/7/2/65/1", "66/c", "7/index/66/f",
		"index/66/f",
	}
	u := catalog.Unit{Collection: 7, Segment: segment.Segment{ID: 65, Builds: []segment.Build{{ID: 66}, {ID: 68}}}}
	for _, path := range slices.Concat(own, foreign) {
		u.Segment.Files = append(u.Segment.Files, segment.File{Path: path})
	}
	for i, path := range slices.Concat(ownOfBuild, foreign) {
		b := &u.Segment.Builds[i%2]
		b.Files = append(b.Files, segment.File{Path: path})
	}
	var got []string
	for f := range u.Owned() {
		got = append(got, f.Path)
	}
	want := slices.Concat(own, ownOfBuild)
	slices.Sort(want)
	if got := slices.Sorted(slices.Values(got)); !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	disputed := u
	disputed.Segment.Disputed = true
	for f := range disputed.Owned() {
		t.Errorf("owns %s, though its id is disputed", f.Path)
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
	stub := &storagev1.Unit{
		Format: 1, Kind: 2, SegmentId: 65, DropTime: 7,
		Parked: &storagev1.Parked{Store: "default", Length: 3},
	}
	if _, err := catalog.UnitOf(1, 66, stub); !errors.Is(err, catalog.ErrSpilled) {
		t.Errorf("a stub: err = %v, want %v", err, catalog.ErrSpilled)
	}
	if _, err := catalog.UnitOf(1, 66, &storagev1.Unit{Format: 1, Kind: 2, SegmentId: 65}); !errors.Is(err,
		record.ErrUnreadable) {
		t.Errorf("a record of nothing: err = %v, want %v", err, record.ErrUnreadable)
	}
	u := catalog.StubOf(1, 66, stub)
	want := catalog.Unit{
		ID: 66, Collection: 1, Kind: catalog.UnitBuild, Segment: segment.Segment{
			ID:    65,
			State: segment.Dropped,
		}, DropTime: time.Unix(0, 7).UTC(), Spilled: true,
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
	e := newEnv(t, memory.New(memory.Options{}))
	ids := e.ids(t, 4)
	list := e.add(t, ids[0], ids[1])
	// What it is looked for with: by the path's ids, or by the segment's.
	find := func(path string, under int64) string {
		t.Helper()
		owner, found, err := e.FindOwner(t.Context(), e.col.ID, catalog.FilePath{Path: path}, under)
		if err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("%v %+v", found, owner)
	}
	none := fmt.Sprintf("false %+v", catalog.Owner{})
	live := fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Live: true, Owned: true})
	foreign := fmt.Sprintf("true %+v", catalog.Owner{Segment: ids[0], Live: true})
	path := list[0].Files[0].Path
	if got := find(path, 0); got != live {
		t.Errorf("got %s, want %s", got, live)
	}
	if got := find(path+"0", ids[0]); got != none {
		t.Errorf("got %s", got)
	}
	other := segment.File{Path: "anywhere/at-all", Kind: "k"}
	if err := e.change(t.Context(), catalog.SegmentChange{Update: []catalog.Update{{
		Segment: ids[0], RemoveFiles: []catalog.FilePath{{Path: path}}, AddFiles: []segment.File{other},
	}}}); err != nil {
		t.Fatal(err)
	}
	units := unitIDs(e.units(t))
	if len(units) != 1 {
		t.Fatalf("units %v", units)
	}
	if got, want := find(path, 0), fmt.Sprintf("true %+v",
		catalog.Owner{Segment: ids[0], Unit: units[0], Owned: true}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := find(other.Path, 0); got != none {
		t.Errorf("got %s", got)
	}
	if got := find(other.Path, ids[0]); got != foreign {
		t.Errorf("got %s, want %s", got, foreign)
	}
	if err := e.change(t.Context(), catalog.SegmentChange{Drop: ids[:1]}); err != nil {
		t.Fatal(err)
	}
	if got, want := find(other.Path, ids[0]), fmt.Sprintf("true %+v",
		catalog.Owner{Segment: ids[0], Unit: ids[0]}); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := find(list[0].Files[1].Path, ids[1]); got != fmt.Sprintf("true %+v",
		catalog.Owner{Segment: ids[0], Unit: ids[0], Owned: true}) {
		t.Errorf("got %s", got)
	}
}
