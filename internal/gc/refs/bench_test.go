package refs

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// The size of the benchmarks: snapshots of one collection. Each shares 9 of 10
// segments with the one before it.
const (
	benchSnapshots  = 100
	benchSegments   = 10_000
	benchCollection = 1
)

// benchRefs returns the references of each snapshot, and the highest segment id.
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

// benchIndex returns an index with the snapshots.
func benchIndex(list []*snapshotRefs) *Index {
	x := New(Options{Log: zap.NewNop(), Now: time.Now, Interval: time.Minute})
	for i, refs := range list {
		x.mu.Lock()
		e := x.ensure(int64(i+1), &storagev1.Snapshot{CollectionId: benchCollection, State: uint32(snapshot.Committed)})
		x.mu.Unlock()
		x.loaded(e, refs, nil)
	}
	return x
}

// One operation adds and removes one snapshot.
func BenchmarkCount(b *testing.B) {
	list, _ := benchRefs()
	x := benchIndex(list)
	i := 0
	for b.Loop() {
		c := &x.collections[benchCollection].counts
		c.count(list[i%len(list)], 1, func() {})
		c.count(list[i%len(list)], -1, func() {})
		i++
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/(4*benchSegments), "ns/reference")
}

// One operation counts the holders of one segment; about 9 of 10 are referenced.
func BenchmarkSegment(b *testing.B) {
	list, last := benchRefs()
	x := benchIndex(list)
	r := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		x.Count(benchCollection, Query{Segment: 2 * (1 + r.Int64N(last/2))})
	}
}

// One operation lists the holders of one dropped segment, as Reclaim does.
func BenchmarkHolders(b *testing.B) {
	list, last := benchRefs()
	x := benchIndex(list)
	r := rand.New(rand.NewPCG(1, 2))
	for b.Loop() {
		x.Holders(benchCollection, Query{Segment: 2 * (1 + r.Int64N(last/2))})
	}
}
