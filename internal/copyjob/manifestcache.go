package copyjob

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
)

// maxManifests bounds the decoded manifests in the cache. Consecutive tasks mostly use the
// same one.
const maxManifests = 2

// readFunc reads the segments of one manifest of a snapshot.
type readFunc func(ctx context.Context, snapshot int64, number int) ([]segment.Segment, error)

// manifestCache reads the segments that tasks copy. Concurrent tasks share one read of a
// manifest.
type manifestCache struct {
	read readFunc

	mu      sync.Mutex
	entries []*cachedManifest // the newest last
}

// cachedManifest is a decoded manifest, or one that is being read.
type cachedManifest struct {
	snapshot int64
	number   int
	ready    chan struct{} // closed when the fields below are set
	segments []segment.Segment
	builds   []int64 // ordinal in the snapshot of the first build of each segment
	err      error
}

func newManifestCache(read readFunc) *manifestCache { return &manifestCache{read: read} }

// sourceSegment is a segment of a snapshot with its ordinals. It is shared and must not be
// changed.
type sourceSegment struct {
	*segment.Segment
	ordinal    int64
	firstBuild int64
}

// segments returns the segments of a snapshot with ordinals from (inclusive) to to
// (exclusive).
func (c *manifestCache) segments(
	ctx context.Context, snapshot int64, md *manifest.Metadata, from, to int64,
) ([]sourceSegment, error) {
	var list []sourceSegment
	for n := range md.Manifests {
		mf := &md.Manifests[n]
		if mf.FirstOrdinal+mf.Segments <= from || mf.FirstOrdinal >= to {
			continue
		}
		m, err := c.manifest(ctx, snapshot, n, mf)
		if err != nil {
			return nil, err
		}
		for i := max(0, from-mf.FirstOrdinal); i < min(mf.Segments, to-mf.FirstOrdinal); i++ {
			list = append(list, sourceSegment{&m.segments[i], mf.FirstOrdinal + i, m.builds[i]})
		}
	}
	if int64(len(list)) != to-from {
		return nil, fmt.Errorf("%w: %d segments at ordinal %d, want %d", errMapping, len(list), from, to-from)
	}
	return list, nil
}

// manifest returns a decoded manifest. When the shared read ends because the context of
// another caller is over, it reads again.
func (c *manifestCache) manifest(
	ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile,
) (*cachedManifest, error) {
	for {
		m, err := c.load(ctx, snapshot, number, mf)
		interrupted := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
		if !interrupted || ctx.Err() != nil {
			return m, err
		}
		// The context of the caller that read it is over; ours is not.
	}
}

// load returns the cached manifest, waits for a read under way, or reads it.
func (c *manifestCache) load(
	ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile,
) (*cachedManifest, error) {
	c.mu.Lock()
	for _, m := range c.entries {
		if m.snapshot == snapshot && m.number == number {
			c.mu.Unlock()
			select {
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-m.ready:
				return m, m.err
			}
		}
	}
	m := &cachedManifest{snapshot: snapshot, number: number, ready: make(chan struct{})}
	if c.entries = append(c.entries, m); len(c.entries) > maxManifests {
		c.entries = c.entries[1:]
	}
	c.mu.Unlock()
	if m.segments, m.err = c.read(ctx, snapshot, number); m.err == nil {
		m.err = m.numberBuilds(mf)
	}
	if m.err != nil { // not cached: the next call reads again
		c.mu.Lock()
		for i := range c.entries {
			if c.entries[i] == m {
				c.entries = append(c.entries[:i:i], c.entries[i+1:]...)
				break
			}
		}
		c.mu.Unlock()
	}
	close(m.ready)
	return m, m.err
}

// numberBuilds computes the ordinals of the builds and checks the counts of the manifest.
func (m *cachedManifest) numberBuilds(mf *manifest.ManifestFile) error {
	next := mf.FirstBuild
	m.builds = make([]int64, len(m.segments))
	for i := range m.segments {
		m.builds[i] = next
		next += int64(len(m.segments[i].Builds))
	}
	if int64(len(m.segments)) != mf.Segments || next != mf.FirstBuild+mf.Builds {
		return fmt.Errorf("%w: %s holds %d segments and %d builds, want %d and %d", errUnreadable, mf.File,
			len(m.segments), next-mf.FirstBuild, mf.Segments, mf.Builds)
	}
	return nil
}
