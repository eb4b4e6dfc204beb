package copyjob

import (
	"testing"
)

// TestListPrefix checks the prefix of a segment's or build's files.
func TestListPrefix(t *testing.T) {
	for _, c := range []struct {
		path, want string
		ids        []int64
	}{
		{"1/2/3/insert/100/4", "r/1/2/3/", []int64{3}},
		{"1/2/3/index/7/0-4", "r/1/2/3/", []int64{3, 7}},
		{"index_files/7/1/2/3/HNSW_0", "r/index_files/7/", []int64{3, 7}},
		{"3", "", []int64{3}}, // the file name
		{"a/3", "", []int64{3}},
		{"a/b", "", []int64{3}},
		{"03/x", "r/03/", []int64{3}},
		{"3/x", "r/3/", []int64{3}},
	} {
		if got := listPrefix("r/", c.path, c.ids...); got != c.want {
			t.Errorf("prefix of %s: %q, want %q", c.path, got, c.want)
		}
	}
}
