package catalog

import (
	"fmt"
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// Of the paths of files that were taken from a segment the newest are known, and a
// list that is read is not changed.
func TestWithRemoved(t *testing.T) {
	var files []segment.File
	var want []uint64
	for i := range maxRemoved + 10 {
		f := segment.File{Root: i % 2, Path: fmt.Sprint(i / 2)}
		files, want = append(files, f), append(want, pathHash(f.Root, f.Path))
	}
	sorted := slices.Sorted(slices.Values(want))
	if len(slices.Compact(sorted)) != len(files) {
		t.Fatal("two files have one hash")
	}
	var list []uint64
	for i := range 3 {
		from, to := i*len(files)/3, (i+1)*len(files)/3
		before := slices.Clone(list)
		next, all := withRemoved(list, (&segment.Segment{Files: files[from:to]}).AllFiles())
		if all != (to <= maxRemoved) {
			t.Errorf("after %d files: all = %v", to, all)
		}
		if !slices.Equal(list, before) || !slices.Equal(next, want[max(0, to-maxRemoved):to]) {
			t.Fatalf("after %d files: %d hashes", to, len(next))
		}
		list = next
	}
	if got, _ := withRemoved(list, (&segment.Segment{}).AllFiles()); !slices.Equal(got, list) {
		t.Error("no file was taken, and the list is another")
	}
}
