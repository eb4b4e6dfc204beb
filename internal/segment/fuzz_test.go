package segment_test

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// FuzzPath reads the ids in any path, and holds each of the four readers to what
// the path looks like when it is split.
func FuzzPath(f *testing.F) {
	for _, path := range []string{
		"", "/", "7", "/7", "7/", "7//7", "07/7", "17/71/7", "7/7/7", "-1/7", "0/7/x", "5/0/7/insert/100/1", "5/-1/7/x",
		"+5/0/7/x",
		"5/0/7", "5/0/7/", "05/0/7/x", "9223372036854775807/0/7/x", "9223372036854775808/0/7/x", "insert_log/5/6/7/100/1",
		"1/2/3/4/5/6/7/8/9/10/11/12/13/14/15/16/17/18", "77777777777777777777", "1_000/7", "\xff/7", "7\x00/7",
	} {
		f.Add(path, int64(0), int64(7))
	}
	f.Add("a/-1/-7/b", int64(0), int64(-7))
	f.Add("x/-9223372036854775808/7/7", int64(-9223372036854775808), int64(7))
	f.Fuzz(func(t *testing.T, path string, partition, id int64) {
		elements := strings.Split(path, "/")
		text := strconv.FormatInt(id, 10)
		if got, want := segment.Carries(path, id), slices.Contains(elements, text); got != want {
			t.Errorf("Carries(%q, %d) = %v, want %v", path, id, got, want)
		}

		ids := segment.IDsIn(path)
		if diff := cmp.Diff(idsOf(elements), ids); diff != "" {
			t.Errorf("IDsIn(%q) (-want +got):\n%s", path, diff)
		}
		for _, n := range ids {
			// An id with leading zeros is no id, so what is found is carried as it is.
			if n <= 0 || !segment.Carries(path, n) {
				t.Errorf("IDsIn(%q) has %d, which the path does not carry", path, n)
			}
		}

		placed := false
		for i := 1; i < len(elements); i++ {
			behind := elements[i-1] == strconv.FormatInt(partition, 10) || partition == 0 && elements[i-1] == "-1"
			placed = placed || behind && elements[i] == text
		}
		if got := segment.Placed(path, partition, id); got != placed {
			t.Errorf("Placed(%q, %d, %d) = %v, want %v", path, partition, id, got, placed)
		}

		c, p, s, ok := segment.NativePlace(path)
		if !ok {
			if c != 0 || p != 0 || s != 0 {
				t.Errorf("NativePlace(%q) = %d, %d, %d, false", path, c, p, s)
			}
			return
		}
		if c <= 0 || p < 0 || s <= 0 {
			t.Errorf("NativePlace(%q) = %d, %d, %d", path, c, p, s)
		}
		if rest, found := strings.CutPrefix(path, fmt.Sprintf("%d/%d/%d/", c, p, s)); !found || rest == "" {
			t.Errorf("NativePlace(%q) = %d, %d, %d, which it does not begin with", path, c, p, s)
		}
		if !segment.Placed(path, p, s) || !segment.Carries(path, s) {
			t.Errorf("%q: the native place of segment %d is not where layouts have it", path, s)
		}
	})
}

// idsOf is IDsIn, written the long way: elements that are the text of a positive
// number, the first 16.
func idsOf(elements []string) []int64 {
	var ids []int64
	for _, e := range elements {
		n, err := strconv.ParseInt(e, 10, 64)
		if err == nil && n > 0 && strconv.FormatInt(n, 10) == e && len(ids) < 16 {
			ids = append(ids, n)
		}
	}
	return ids
}
