package keys_test

import (
	"cmp"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/keys"
)

// FuzzKeys reads the ids of any key. What can be read can be written, and leads to
// the same.
func FuzzKeys(f *testing.F) {
	for _, key := range []string{
		"", "/", "5", "5/", "/5", "5/6", "/a/5", "/a/5/6", "/a/5/6/", "//", "/a/-5/+6", "/a/05/6",
		"/a/9223372036854775808/6", "/a/1_0/2",
		keys.Task(7, 8), keys.Segment(1, 2), keys.Assignment(3, 4, 5), keys.Assignment(3, 4,
			5)[:20], keys.AssignedPrefix, keys.Worker(3),
		keys.CollectionName("db", "7"), keys.SnapshotName(7, "8"),
	} {
		f.Add(key, int64(1), int64(2))
	}
	f.Add("", int64(0), int64(1<<63-1))
	f.Fuzz(func(t *testing.T, key string, a, b int64) {
		last, err := keys.LastID(key)
		if err == nil {
			if again, err := keys.LastID("/a/" + keys.ID(max(last, 0))); err != nil || again != max(last, 0) {
				t.Errorf("id %d of %q is read as %d, %v", last, key, again, err)
			}
		}
		first, second, errTwo := keys.LastTwo(key)
		if errTwo == nil && (err != nil || second != last) {
			t.Errorf("LastTwo(%q) = %d, %d; LastID = %d, %v", key, first, second, last, err)
		}
		if _, err := keys.AssignedTo(key); err == nil && len(key) < len(keys.AssignmentPrefix(1))-1 {
			t.Errorf("AssignedTo(%q) read something", key)
		}
		if a < 0 || b < 0 {
			return
		}
		// What is made of ids is read back, and its order is theirs.
		if x, y, err := keys.LastTwo(keys.Task(a, b)); err != nil || x != a || y != b {
			t.Errorf("task %d/%d is read as %d/%d, %v", a, b, x, y, err)
		}
		if w, err := keys.AssignedTo(keys.Assignment(a, b, 1)); err != nil || w != a {
			t.Errorf("an assignment of %d is read as one of %d, %v", a, w, err)
		}
		if got, want := strings.Compare(keys.Snapshot(a), keys.Snapshot(b)), cmp.Compare(a, b); got != want {
			t.Errorf("the order of %d and %d is %d, that of their keys %d", a, b, want, got)
		}
		from, to := keys.Span(keys.SegmentPrefix(1), a, b)
		for _, id := range []int64{a, b} {
			if k := keys.Segment(1, id); a <= b && (k < from || k >= to) {
				t.Errorf("%d is not in the span %d to %d", id, a, b)
			}
		}
	})
}
