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
type manifestCache struct {
	source Source

	mu      sync.Mutex
	entries []*cachedManifest // the latest last
}

// decoded is a manifest on its way into memory, or there.
type cachedManifest struct {
	snapshot int64
	number   int
	ready    chan struct{}
	segments []segment.Segment
	builds   []int64 // the number in the snapshot of the first build of each
	err      error
}

func newManifestCache(s Source) *manifestCache { return &manifestCache{source: s} }

// item is one segment of a snapshot with its place there. It is shared and must
// not be changed.
type sourceSegment struct {
	*segment.Segment
	ordinal    int64
	firstBuild int64
}

// items returns the segments of a snapshot with ordinals from to to.
func (c *manifestCache) segments(ctx context.Context, snapshot int64, md *manifest.Metadata, from, to int64) ([]sourceSegment, error) {
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
		return nil, fmt.Errorf("%w: %d segments from ordinal %d on, want %d", errMapping, len(list), from, to-from)
	}
	return list, nil
}

func (c *manifestCache) manifest(ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile) (*cachedManifest, error) {
	for {
		m, err := c.load(ctx, snapshot, number, mf)
		interrupted := errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
		if !interrupted || ctx.Err() != nil {
			return m, err
		}
		// Whoever read it for us was interrupted, we are not.
	}
}

func (c *manifestCache) load(ctx context.Context, snapshot int64, number int, mf *manifest.ManifestFile) (*cachedManifest, error) {
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
	if m.segments, m.err = c.source.Manifest(ctx, snapshot, number); m.err == nil {
		m.err = m.numberBuilds(mf)
	}
	if m.err != nil { // the next one tries again
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

// count numbers the builds.
func (m *cachedManifest) numberBuilds(mf *manifest.ManifestFile) error {
	next := mf.FirstBuild
	m.builds = make([]int64, len(m.segments))
	for i := range m.segments {
		m.builds[i] = next
		next += int64(len(m.segments[i].Builds))
	}
	if int64(len(m.segments)) != mf.Segments || next != mf.FirstBuild+mf.Builds {
		return fmt.Errorf("%w: %s holds %d segments and %d builds, want %d and %d", ErrSource, mf.File,
			len(m.segments), next-mf.FirstBuild, mf.Segments, mf.Builds)
	}
	return nil
}
