package copyjob

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// maxManifests is how many manifests are kept decoded. Tasks that follow each
// other are mostly of one.
const maxManifests = 2

// sources reads what tasks have to copy. A manifest is read and decoded once for
// all the tasks that need it at a time.
type sources struct {
	source Source

	mu    sync.Mutex
	cache []*decoded // the latest last
}

// decoded is a manifest on its way into memory, or there.
type decoded struct {
	snapshot int64
	number   int
	ready    chan struct{}
	segments []segment.Segment
	builds   []int64 // the number in the snapshot of the first build of each
	err      error
}

func newSources(s Source) *sources { return &sources{source: s} }

// item is one segment of a snapshot with its place there. It is shared and must
// not be changed.
type item struct {
	*segment.Segment
	ordinal    int64
	firstBuild int64
}

// items returns the segments of a snapshot with ordinals from to to.
func (s *sources) items(ctx context.Context, snapshot int64, md *manifest.Metadata, from, to int64) ([]item, error) {
	var list []item
	for n := range md.Manifests {
		mf := &md.Manifests[n]
		if mf.FirstOrdinal+mf.Segments <= from || mf.FirstOrdinal >= to {
			continue
		}
		d, err := s.manifest(ctx, snapshot, n, mf)
		if err != nil {
			return nil, err
		}
		for i := max(0, from-mf.FirstOrdinal); i < min(mf.Segments, to-mf.FirstOrdinal); i++ {
			list = append(list, item{&d.segments[i], mf.FirstOrdinal + i, d.builds[i]})
		}
	}
	if int64(len(list)) != to-from {
		return nil, fmt.Errorf("%w: %d segments from ordinal %d on, want %d", errMapping, len(list), from, to-from)
	}
	return list, nil
}

func (s *sources) manifest(ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile) (*decoded, error) {
	for {
		d, err := s.once(ctx, snapshot, number, mf)
		interrupted := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
		if !interrupted || ctx.Err() != nil {
			return d, err
		}
		// Whoever read it for us was interrupted, we are not.
	}
}

func (s *sources) once(ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile) (*decoded, error) {
	s.mu.Lock()
	for _, d := range s.cache {
		if d.snapshot == snapshot && d.number == number {
			s.mu.Unlock()
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-d.ready:
				return d, d.err
			}
		}
	}
	d := &decoded{snapshot: snapshot, number: number, ready: make(chan struct{})}
	if s.cache = append(s.cache, d); len(s.cache) > maxManifests {
		s.cache = s.cache[1:]
	}
	s.mu.Unlock()
	if d.segments, d.err = s.source.Manifest(ctx, snapshot, number); d.err == nil {
		d.err = d.count(mf)
	}
	if d.err != nil { // the next one tries again
		s.mu.Lock()
		for i := range s.cache {
			if s.cache[i] == d {
				s.cache = append(s.cache[:i:i], s.cache[i+1:]...)
				break
			}
		}
		s.mu.Unlock()
	}
	close(d.ready)
	return d, d.err
}

// count numbers the builds.
func (d *decoded) count(mf *manifest.ManifestFile) error {
	next := mf.FirstBuild
	d.builds = make([]int64, len(d.segments))
	for i := range d.segments {
		d.builds[i] = next
		next += int64(len(d.segments[i].Builds))
	}
	if int64(len(d.segments)) != mf.Segments || next != mf.FirstBuild+mf.Builds {
		return fmt.Errorf("%w: %s holds %d segments and %d builds, want %d and %d", ErrSource, mf.File,
			len(d.segments), next-mf.FirstBuild, mf.Segments, mf.Builds)
	}
	return nil
}
