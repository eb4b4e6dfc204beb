package segment

import (
	"strconv"
	"strings"
)

// Carries reports whether one of the path's elements is the id. A file belongs to a segment
// or build only when its path carries the id.
func Carries(path string, id int64) bool {
	var digits [20]byte
	want := string(strconv.AppendInt(digits[:0], id, 10))
	for from := 0; ; {
		at := strings.Index(path[from:], want)
		if at < 0 {
			return false
		}
		start, end := from+at, from+at+len(want)
		if (start == 0 || path[start-1] == '/') && (end == len(path) || path[end] == '/') {
			return true
		}
		from = end
	}
}

// maxIDs bounds the ids that IDsIn returns.
const maxIDs = 16

// IDsIn returns the ids among the path's elements, in order: at most the first 16, which is
// more than any layout has.
func IDsIn(path string) []int64 {
	var ids []int64
	for element := range strings.SplitSeq(path, "/") {
		if element == "" || element[0] < '1' || element[0] > '9' {
			continue
		}
		if len(ids) == maxIDs {
			break
		}
		if id, err := strconv.ParseInt(element, 10, 64); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// Placed reports whether the path has the segment's id where layouts have it: directly after
// the id of its partition, which is 0 or -1 for all. Such a path belongs to this segment
// only. An equal number elsewhere may be the id of a field or a log.
func Placed(path string, partition, id int64) bool {
	want, before := strconv.FormatInt(id, 10), ""
	for element := range strings.SplitSeq(path, "/") {
		if element == want && before != "" {
			if before == strconv.FormatInt(partition, 10) || partition == 0 && before == "-1" {
				return true
			}
		}
		before = element
	}
	return false
}

// NativePlace returns the ids at the start of a path in the native layout:
// <collection>/<partition>/<segment>/ and more. ok is false for a path that does not start
// with three numbers, of which only the second may be 0.
func NativePlace(path string) (collection, partition, id int64, ok bool) {
	var ids [3]int64
	rest := path
	for i := range ids {
		element, behind, found := strings.Cut(rest, "/")
		n, err := strconv.ParseInt(element, 10, 64)
		if !found || behind == "" || err != nil || n < 0 || n == 0 && i != 1 || strconv.FormatInt(n, 10) != element {
			return 0, 0, 0, false
		}
		ids[i], rest = n, behind
	}
	return ids[0], ids[1], ids[2], true
}
