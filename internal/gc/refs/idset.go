package refs

import (
	"math"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// idSet is a sorted set of ids: the first id, and the distance of each id from it. A
// set that is wider than a distance can express, which no allocator produces, is kept
// in full.
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

// snapshotRefs holds the references of one snapshot.
type snapshotRefs struct {
	segments, builds idSet
	files            []uint64 // hashes of foreign files, ascending
}

func newSnapshotRefs(r *manifest.Refs) *snapshotRefs {
	return &snapshotRefs{segments: newIDSet(r.Segments), builds: newIDSet(r.Builds), files: r.Files}
}

// pageIDs is the number of adjacent ids that share a page of counts. Ids are allocated
// in ranges, so most of a page is in use, and a snapshot needs one map lookup for many
// of its ids. A page with one id takes up to five times the space of a single count.
const pageIDs = 16

// counts holds the number of times that each id was counted. Ids are positive.
type counts struct {
	pages map[int64][pageIDs]int32
	ids   int // ids with a count other than 0
}

func newCounts() counts { return counts{pages: map[int64][pageIDs]int32{}} }

func (c *counts) of(id int64) int { return int(c.pages[id/pageIDs][id%pageIDs]) }

// add adds n to each id of set. Between pages, where the counts are consistent, it
// calls step with the number of ids that it has counted since the last call.
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

// refCounts counts, for one collection, the snapshots that reference each segment,
// build and foreign file. The time of a lookup does not depend on the number of
// snapshots.
type refCounts struct {
	segments, builds counts
	// files has those of all collections: a path may be under the roots of several.
	files map[uint64]int32
}

func newRefCounts(files map[uint64]int32) refCounts {
	return refCounts{newCounts(), newCounts(), files}
}

// of returns the number of snapshots that reference the segment or build.
func (c *refCounts) of(q Query) int {
	if q.Build != 0 {
		return c.builds.of(q.Build)
	}
	return c.segments.of(q.Segment)
}

// countPart is the number of references after which a count yields the lock.
const countPart = 4096

// everyPart returns a step that calls between after each countPart references.
func everyPart(between func()) func(refs int) {
	part := 0
	return func(refs int) {
		if part += refs; part >= countPart {
			part = 0
			between()
		}
	}
}

// countIDs is count without the files.
func (c *refCounts) countIDs(r *snapshotRefs, n int32, between func()) {
	step := everyPart(between)
	c.segments.add(&r.segments, n, step)
	c.builds.add(&r.builds, n, step)
}

// count adds n, 1 or -1, for each reference of r, and calls between after each
// countPart of them. A count that is too high holds too much, never too little:
// callers add before a snapshot counts as known, and subtract after its end is known.
func (c *refCounts) count(r *snapshotRefs, n int32, between func()) {
	step := everyPart(between)
	c.segments.add(&r.segments, n, step)
	c.builds.add(&r.builds, n, step)
	for _, file := range r.files {
		if total := c.files[file] + n; total != 0 {
			c.files[file] = total
		} else {
			delete(c.files, file)
		}
		step(1)
	}
}
