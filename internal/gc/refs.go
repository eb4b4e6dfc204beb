package gc

import (
	"math"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// idSet is a sorted set of ids: the first one, and how far each is from it. Sets
// that are wider than that holds, which no allocator makes, are kept in full.
type idSet struct {
	first   int64
	offsets []uint32
	wide    []int64
}

// newIDSet keeps ids, which must ascend.
func newIDSet(ids []int64) idSet {
	if len(ids) == 0 {
		return idSet{}
	}
	if ids[len(ids)-1]-ids[0] > math.MaxUint32 {
		return idSet{wide: ids}
	}
	s := idSet{first: ids[0], offsets: make([]uint32, len(ids))}
	for i, id := range ids {
		s.offsets[i] = uint32(id - s.first) //nolint:gosec // checked above
	}
	return s
}

func (s *idSet) len() int { return len(s.offsets) + len(s.wide) }

func (s *idSet) at(i int) int64 {
	if s.wide != nil {
		return s.wide[i]
	}
	return s.first + int64(s.offsets[i])
}

func (s *idSet) has(id int64) bool {
	if s.wide != nil {
		_, found := slices.BinarySearch(s.wide, id)
		return found
	}
	if len(s.offsets) == 0 || id < s.first || id-s.first > math.MaxUint32 {
		return false
	}
	_, found := slices.BinarySearch(s.offsets, uint32(id-s.first)) //nolint:gosec // checked before
	return found
}

// snapshotRefs is what one snapshot references.
type snapshotRefs struct {
	segments, builds idSet
	files            []uint64 // hashes of foreign files, ascending
}

func newSnapshotRefs(r *manifest.Refs) *snapshotRefs {
	return &snapshotRefs{segments: newIDSet(r.Segments), builds: newIDSet(r.Builds), files: r.Files}
}

// pageIDs is how many ids that lie side by side are counted side by side. The
// allocator gives ids in ranges, so that most of a page is in use, and a snapshot
// takes one look-up for many of its ids. A page with one id takes up to five times
// what a count alone would.
const pageIDs = 16

// counts tells how often each id was counted. Ids are positive.
type counts struct {
	pages map[int64][pageIDs]int32
	ids   int // that are counted at all
}

func newCounts() counts { return counts{pages: map[int64][pageIDs]int32{}} }

func (c *counts) of(id int64) int { return int(c.pages[id/pageIDs][id%pageIDs]) }

// add adds n to each id of set, calling step with the number of those that are
// done, where the counts are whole.
func (c *counts) add(set *idSet, n int32, step func(ids int)) {
	for i, end := 0, set.len(); i < end; {
		from, number := i, set.at(i)/pageIDs
		page := c.pages[number]
		for ; i < end; i++ {
			id := set.at(i)
			if id/pageIDs != number {
				break
			}
			count := &page[id%pageIDs]
			if *count == 0 {
				c.ids++
			}
			if *count += n; *count == 0 {
				c.ids--
			}
		}
		if page == [pageIDs]int32{} {
			delete(c.pages, number)
		} else {
			c.pages[number] = page
		}
		step(i - from)
	}
}

// held counts, for one collection, how many snapshots reference each thing, so
// that a look-up takes no longer when there are more snapshots.
type held struct {
	segments, builds counts
	// files are those of all collections: a path may lie under the roots of
	// several.
	files map[uint64]int32
}

func newHeld(files map[uint64]int32) held { return held{newCounts(), newCounts(), files} }

// of returns how many snapshots reference the segment or build.
func (h *held) of(w wanted) int {
	if w.build != 0 {
		return h.builds.of(w.build)
	}
	return h.segments.of(w.segment)
}

// countPart is how much of a snapshot is counted at a time, so that nobody waits
// for all of it.
const countPart = 4096

// everyPart returns a step that calls between after every few thousand things.
func everyPart(between func()) func(things int) {
	part := 0
	return func(things int) {
		if part += things; part >= countPart {
			part = 0
			between()
		}
	}
}

// countIDs is count without the files.
func (h *held) countIDs(r *snapshotRefs, n int32, between func()) {
	step := everyPart(between)
	h.segments.add(&r.segments, n, step)
	h.builds.add(&r.builds, n, step)
}

// count adds n, 1 or -1, for each thing that r references, calling between after
// every few thousand of them. Counts that are too high hold too much, never too
// little: to add comes before a snapshot counts as known, to subtract after it is
// known to be gone.
func (h *held) count(r *snapshotRefs, n int32, between func()) {
	step := everyPart(between)
	h.segments.add(&r.segments, n, step)
	h.builds.add(&r.builds, n, step)
	for _, file := range r.files {
		if c := h.files[file] + n; c != 0 {
			h.files[file] = c
		} else {
			delete(h.files, file)
		}
		step(1)
	}
}
