package layout

import (
	"slices"
	"strconv"
	"strings"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// Place has the ids of a path at the positions where its layout has ids. An equal number
// elsewhere, such as the id of a field or a log, does not count.
type Place struct {
	Collection int64 // 0: the form has none
	Segment    int64
	Build      int64 // 0: the form has none
}

// PlaceOf returns the place of a file from its path relative to its root: of the native
// layout,
//
//	<collection>/<partition>/<segment>/...
//
// or of a form of Milvus, whatever follows the ids. Every place has a segment, and a
// segment's id is unique, so a place belongs to one segment. A path of no layout has no
// place.
func PlaceOf(path string) (Place, bool) {
	if path == "" || path[0] >= '0' && path[0] <= '9' {
		collection, _, id, ok := segment.NativePlace(path)
		return Place{Collection: collection, Segment: id}, ok
	}
	folder, rest, _ := strings.Cut(path, "/")
	at := slices.IndexFunc(forms, func(f form) bool { return f[0] == folder })
	if at < 0 {
		return Place{}, false
	}
	var p Place
	last := lastID(forms[at])
	for _, name := range forms[at][1 : last+1] {
		element, behind, found := strings.Cut(rest, "/")
		if !found || behind == "" {
			return Place{}, false
		}
		n, ok := number(element)
		if !ok || n <= 0 && name != partitionID && name != "<version>" {
			return Place{}, false
		}
		switch name {
		case collectionID:
			p.Collection = n
		case segmentID:
			p.Segment = n
		case buildID:
			p.Build = n
		}
		rest = behind
	}
	return p, true
}

// lastID is the place of the last id in a form.
func lastID(f form) int {
	for i, name := range slices.Backward(f) {
		if name == segmentID || name == buildID {
			return i
		}
	}
	return 0
}

// Is says whether a place is that of a segment of a collection.
func (p Place) Is(collection, id int64) bool {
	return p.Segment == id && (p.Collection == collection || p.Collection == 0)
}

// String writes a place for people.
func (p Place) String() string {
	text := "segment " + strconv.FormatInt(p.Segment, 10)
	if p.Collection != 0 {
		text += " of collection " + strconv.FormatInt(p.Collection, 10)
	}
	return text
}
