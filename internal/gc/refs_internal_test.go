package gc

import (
	"math"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

func genIDs() *rapid.Generator[[]int64] {
	id := rapid.OneOf(rapid.Int64Range(1, 50), rapid.Int64Range(1, math.MaxInt64), rapid.Int64Range(math.MaxUint32, math.MaxUint32+50),
		rapid.SampledFrom([]int64{1, 2, math.MaxUint32, math.MaxUint32 + 1, math.MaxUint32 + 2, math.MaxInt64}))
	return rapid.Custom(func(t *rapid.T) []int64 {
		ids := rapid.SliceOfN(id, 0, 30).Draw(t, "ids")
		slices.Sort(ids)
		return slices.Compact(ids)
	})
}

// A set holds what it was made of and nothing else, however far apart that is.
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

// Counts are those of what was added and not taken away, and never too low while
// something is being counted; nothing is left of what is gone.
func TestHeldCounts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h, model := newHeld(map[uint64]int32{}), map[int64]int{}
		var there []*snapshotRefs
		for range rapid.IntRange(1, 20).Draw(t, "steps") {
			if len(there) > 0 && rapid.Bool().Draw(t, "drop") {
				at := rapid.IntRange(0, len(there)-1).Draw(t, "which")
				h.count(there[at], -1, func() {})
				for i := range there[at].segments.len() {
					model[there[at].segments.at(i)]--
				}
				there = slices.Delete(there, at, at+1)
			} else {
				ids := genIDs().Draw(t, "ids")
				r := newSnapshotRefs(&manifest.Refs{Segments: ids, Builds: ids, Files: []uint64{uint64(len(ids))}})
				h.count(r, 1, func() {})
				for _, id := range ids {
					model[id]++
				}
				there = append(there, r)
			}
			counted := 0
			for id, n := range model {
				if h.of(wanted{segment: id}) != n || h.of(wanted{build: id}) != n {
					t.Fatalf("%d is counted %d and %d times, want %d", id, h.of(wanted{segment: id}), h.of(wanted{build: id}), n)
				}
				if n > 0 {
					counted++
				}
				if _, known := model[id+1]; !known && id < math.MaxInt64 && h.of(wanted{segment: id + 1}) != 0 {
					t.Fatalf("%d is counted", id+1)
				}
			}
			if h.segments.ids != counted || h.builds.ids != counted {
				t.Fatalf("%d and %d are counted, want %d", h.segments.ids, h.builds.ids, counted)
			}
		}
		for _, r := range there {
			h.count(r, -1, func() {})
		}
		if len(h.segments.pages)+len(h.builds.pages)+len(h.files)+h.segments.ids+h.builds.ids > 0 {
			t.Fatalf("left %+v", h)
		}
	})
}

// The lock is let go every few thousand things.
func TestCountPauses(t *testing.T) {
	ids := make([]int64, 3*countPart+1)
	for i := range ids {
		ids[i] = int64(i + 1)
	}
	h, pauses := newHeld(map[uint64]int32{}), 0
	h.count(newSnapshotRefs(&manifest.Refs{Segments: ids, Builds: ids}), 1, func() { pauses++ })
	if pauses != 5 && pauses != 6 {
		t.Errorf("%d pauses, want one for each %d", pauses, countPart)
	}
}
