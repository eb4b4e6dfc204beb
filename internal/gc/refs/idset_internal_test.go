package refs

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

func genIDs() *rapid.Generator[[]int64] {
	id := rapid.OneOf(rapid.Int64Range(1, 50), rapid.Int64Range(1, math.MaxInt64),
		rapid.Int64Range(math.MaxUint32, math.MaxUint32+50),
		rapid.SampledFrom([]int64{1, 2, math.MaxUint32, math.MaxUint32 + 1, math.MaxUint32 + 2, math.MaxInt64}))
	return rapid.Custom(func(t *rapid.T) []int64 {
		ids := rapid.SliceOfN(id, 0, 30).Draw(t, "ids")
		slices.Sort(ids)
		return slices.Compact(ids)
	})
}

// A set has its ids and no others, at any distance.
func TestIDSet(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		ids := genIDs().Draw(t, "set")
		set := newIDSet(ids)
		if set.len() != len(ids) {
			t.Fatalf("%d of %d", set.len(), len(ids))
		}
		for i, id := range ids {
			if set.at(i) != id {
				t.Fatalf("at %d is %d, want %d", i, set.at(i), id)
			}
		}
		for _, id := range append(slices.Clone(ids), genIDs().Draw(t, "others")...) {
			for _, id := range []int64{id, id - 1, id + math.MaxUint32 + 1} {
				if _, want := slices.BinarySearch(ids, id); set.has(id) != want {
					t.Fatalf("%d: %v, want %v", id, set.has(id), want)
				}
			}
		}
	})
}

// Counts cover the added snapshots that were not removed. Nothing remains of removed
// ones.
func TestRefCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c, model := newRefCounts(map[uint64]int32{}), map[int64]int{}
		var present []*snapshotRefs
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			if len(present) > 0 && rapid.Bool().Draw(t, "drop") {
				at := rapid.IntRange(0, len(present)-1).Draw(t, "which")
				c.count(present[at], -1, func() {})
				for i := range present[at].segments.len() {
					model[present[at].segments.at(i)]--
				}
				present = slices.Delete(present, at, at+1)
			} else {
				ids := genIDs().Draw(t, "ids")
				r := newSnapshotRefs(&manifest.Refs{Segments: ids, Builds: ids, Files: []uint64{uint64(len(ids))}})
				c.count(r, 1, func() {})
				for _, id := range ids {
					model[id]++
				}
				present = append(present, r)
			}
			counted := 0
			for id, n := range model {
				if c.of(Query{Segment: id}) != n || c.of(Query{Build: id}) != n {
					t.Fatalf("%d is counted %d and %d times, want %d", id,
						c.of(Query{Segment: id}), c.of(Query{Build: id}), n)
				}
				if n > 0 {
					counted++
				}
				if _, known := model[id+1]; !known && id < math.MaxInt64 && c.of(Query{Segment: id + 1}) != 0 {
					t.Fatalf("%d is counted", id+1)
				}
			}
			if c.segments.ids != counted || c.builds.ids != counted {
				t.Fatalf("%d and %d are counted, want %d", c.segments.ids, c.builds.ids, counted)
			}
		}
		for _, r := range present {
			c.count(r, -1, func() {})
		}
		if len(c.segments.pages)+len(c.builds.pages)+len(c.files)+c.segments.ids+c.builds.ids > 0 {
			t.Fatalf("left %+v", c)
		}
	})
}

// A count yields the lock after each countPart references.
func TestCountPauses(t *testing.T) {
	ids := make([]int64, 3*countPart+1)
	for i := range ids {
		ids[i] = int64(i + 1)
	}
	c, pauses := newRefCounts(map[uint64]int32{}), 0
	c.count(newSnapshotRefs(&manifest.Refs{Segments: ids, Builds: ids}), 1, func() { pauses++ })
	if pauses != 5 && pauses != 6 {
		t.Errorf("%d pauses, want one for each %d", pauses, countPart)
	}
}
