package segment_test

import (
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/segment"
)

func sample() *segment.Segment {
	return &segment.Segment{
		Rows: 10, RowCeiling: 5,
		Files: []segment.File{{Path: "a", Size: 1}, {Path: "b", Size: 2}},
		Builds: []segment.Build{
			{ID: 1},
			{ID: 2, Files: []segment.File{{Path: "c", Size: 4}}},
			{ID: 3, Files: []segment.File{{Path: "d", Size: 8}, {Path: "e", Size: 16}}},
		},
	}
}

func TestAllFiles(t *testing.T) {
	s := sample()
	var got []string
	for f := range s.AllFiles() {
		got = append(got, f.Path)
		f.Size++ // the file itself, not a copy
	}
	if want := []string{"a", "b", "c", "d", "e"}; !slices.Equal(got,
		want) || s.Files[0].Size != 2 || s.Builds[2].Files[1].Size != 17 {
		t.Errorf("got %v of %v, want %v", got, s, want)
	}
	for stop := range 5 {
		n := 0
		for range s.AllFiles() {
			if n++; n > stop {
				break
			}
		}
		if n != stop+1 {
			t.Errorf("%d files after a stop at %d", n, stop)
		}
	}
}

func TestTotals(t *testing.T) {
	var got segment.Totals
	got.Add(sample())
	got.Add(&segment.Segment{Rows: 1})
	if want := (segment.Totals{Segments: 2, Rows: 11, Files: 5, Bytes: 31, Builds: 3}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// An unknown kind is data.
func TestDerived(t *testing.T) {
	for kind, want := range map[string]bool{
		segment.KindInsert: false, segment.KindDelta: false, "": false, "lance": false,
		segment.KindStats: true, segment.KindBM25: true, segment.KindIndex: true, segment.KindText: true,
		segment.KindJSON: true,
	} {
		if got := segment.Derived(kind); got != want {
			t.Errorf("%q: got %v, want %v", kind, got, want)
		}
	}
}

func TestStates(t *testing.T) {
	for state, want := range []string{"UNKNOWN", "GROWING", "SEALED", "FLUSHED", "IMPORTING", "DROPPED", "UNKNOWN"} {
		if got := segment.State(state).String(); got != want {
			t.Errorf("%d: got %s, want %s", state, got, want)
		}
	}
}

func TestCarries(t *testing.T) {
	for _, tc := range []struct {
		path string
		id   int64
		want bool
	}{
		{"1/2/65/insert", 65, true},
		{"65/insert", 65, true},
		{"insert/65", 65, true},
		{"65", 65, true},
		{"165/65/x", 65, true},
		{"6565/65", 65, true},
		{"6565", 65, false},
		{"1/650/165/x65/65x", 65, false},
		{"1/2/3", 65, false},
		{"", 65, false},
		{"a/-5", 5, false},
		{"a/-5", -5, true},
		{"a/0/b", 0, true},
	} {
		if got := segment.Carries(tc.path, tc.id); got != tc.want {
			t.Errorf("Carries(%q, %d) = %v", tc.path, tc.id, got)
		}
	}
}

func TestNativePlace(t *testing.T) {
	type place struct {
		Collection, Partition, Segment int64
		OK                             bool
	}
	for path, want := range map[string]place{
		"1/2/3/insert/100/7": {1, 2, 3, true},
		"1/0/3/x":            {1, 0, 3, true},
		"1/2/3":              {},
		"1/2/3/":             {},
		"0/2/3/x":            {},
		"1/2/0/x":            {},
		"1/-1/3/x":           {},
		"01/2/3/x":           {},
		"a/1/2/3/x":          {},
		"insert_log/1/2/3/4": {},
		"":                   {},
	} {
		collection, partition, id, ok := segment.NativePlace(path)
		if got := (place{collection, partition, id, ok}); got != want {
			t.Errorf("%q: got %+v, want %+v", path, got, want)
		}
	}
}
