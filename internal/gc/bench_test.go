package gc

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// The size of the benchmarks: snapshots of a collection, each of which has 9 of
// 10 segments in common with the one before it.
const (
	benchSnapshots  = 100
	benchSegments   = 10_000
	benchCollection = 1
)

// benchRefs returns what each of the snapshots references, and the ids of
// segments from the first to the last.
func benchRefs() (list []*snapshotRefs, last int64) {
	r := rand.New(rand.NewPCG(1, 1))
	live := make([]int64, benchSegments)
	for i := range live {
		last++
		live[i] = 2 * last
	}
	for range benchSnapshots {
		refs := &manifest.Refs{Segments: slices.Sorted(slices.Values(live))}
		for _, id := range refs.Segments {
			refs.Builds = append(refs.Builds, id+1)
		}
		list = append(list, newSnapshotRefs(refs))
		r.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
		for i := range benchSegments / 10 {
			last++
			live[i] = 2 * last
		}
	}
	return list, 2 * (last - benchSegments/10)
}

// benchIndex returns an index that knows the snapshots.
func benchIndex(list []*snapshotRefs) *index {
	x := newIndex(&Options{Log: zap.NewNop(), Now: time.Now, Interval: time.Minute})
	for i, refs := range list {
		x.mu.Lock()
		e := x.expect(int64(i+1), &storagev1.Snapshot{CollectionId: benchCollection, State: committed})
		x.mu.Unlock()
		x.loaded(e, refs, nil)
	}
	return x
}

// One operation is one snapshot, taken in and out again.
func BenchmarkCount(b *testing.B) {
	list, _ := benchRefs()
	x := benchIndex(list)
	i := 0
	for b.Loop() {
		h := &x.collections[benchCollection].held
		h.count(list[i%len(list)], 1, func() {})
		h.count(list[i%len(list)], -1, func() {})
		i++
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(4*benchSegments), "ns/reference")
}

// One operation is one segment, of which about 9 in 10 are referenced.
func BenchmarkSegment(b *testing.B) {
	list, last := benchRefs()
	c := Counts{refs: benchIndex(list), collection: benchCollection}
	r := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		c.Segment(2 * (1 + r.Int64N(last/2)))
	}
}

// One operation is one dropped segment that Reclaim asks about, and names the
// holders of.
func BenchmarkHolders(b *testing.B) {
	list, last := benchRefs()
	x := benchIndex(list)
	r := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		x.holders(benchCollection, wanted{segment: 2 * (1 + r.Int64N(last/2))})
	}
}
