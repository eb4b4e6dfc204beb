package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Describe returns the content of a committed snapshot without its segments, and checks
// that its own objects exist.
func (m *Manager) Describe(ctx context.Context, ref Ref) (*Description, error) {
	d, err := m.Captured(ctx, ref)
	if err != nil {
		return nil, err
	}
	s := d.Snapshot
	if d.Damage, d.DamageErr = m.findDamage(ctx, s, d.Metadata); len(d.Damage) > 0 {
		// A drop deletes the objects before the record.
		if now, err := m.read(ctx, s.ID); err == nil && (now == nil || now.State != snapshot.Committed) {
			return nil, fmt.Errorf("describe snapshot %s: %w", s, ErrExpiredOrDropped)
		}
	}
	return d, nil
}

// Captured returns the content of a committed snapshot without its segments.
func (m *Manager) Captured(ctx context.Context, ref Ref) (*Description, error) {
	s, err := m.committed(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("describe snapshot %s: %w", ref, err)
	}
	md, err := m.metadata(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("describe snapshot %s: %w", s, err)
	}
	return &Description{Snapshot: s, Metadata: md, Prefix: manifest.Dir(s.Collection, s.ID)}, nil
}

// maxDamage is the maximum number of damaged objects that a description names.
const maxDamage = 100

// findDamage lists a snapshot's own objects, and describes those that are missing or
// have another length. It reads the info of an object that the listing lacks.
func (m *Manager) findDamage(ctx context.Context, s *snapshot.Record, md *manifest.Metadata) ([]string, error) {
	store, ok := m.o.Stores[s.Store]
	if !ok {
		return nil, fmt.Errorf("%w: %q", ErrStoreNotFound, s.Store)
	}
	dir, sizes := manifest.Dir(s.Collection, s.ID), map[string]int64{}
	for info, err := range store.List(ctx, dir) {
		if err != nil {
			return nil, err
		}
		sizes[info.Key[len(dir):]] = info.Size
	}
	var list []string
	check := func(name string, want int64) error {
		size, ok := sizes[name]
		if !ok {
			info, err := store.Head(ctx, dir+name)
			if err != nil && !errors.Is(err, object.ErrNotFound) {
				return err
			}
			size, ok = info.Size, err == nil
		}
		switch {
		case !ok:
			list = append(list, name+" is missing")
		case size != want:
			list = append(list, fmt.Sprintf("%s has %d bytes, not %d", name, size, want))
		}
		return nil
	}
	err := check(manifest.MetadataName, s.Metadata.Length)
	if err == nil && md.Refs.Length > 0 {
		err = check(manifest.RefsName, md.Refs.Length)
	}
	for i := range md.Manifests {
		if err != nil || len(list) == maxDamage {
			break
		}
		err = check(md.Manifests[i].File, md.Manifests[i].Length)
	}
	return list, err
}

// metadata reads a snapshot's metadata and checks its digest against the record.
func (m *Manager) metadata(ctx context.Context, s *snapshot.Record) (*manifest.Metadata, error) {
	data, err := m.readCached(ctx, s, manifest.MetadataName, s.Metadata)
	if err != nil {
		return nil, err
	}
	md, err := manifest.DecodeMetadata(data)
	if errors.Is(err, manifest.ErrCorrupt) {
		return nil, fmt.Errorf("%w: %w", ErrSnapshotCorrupt, err)
	}
	return md, err
}

// readObject reads one of a snapshot's own objects and checks its digest.
func (m *Manager) readObject(
	ctx context.Context, s *snapshot.Record, name string, want manifest.Digest,
) ([]byte, error) {
	store, ok := m.o.Stores[s.Store]
	if !ok {
		return nil, fmt.Errorf("%w: the objects of snapshot %s are in %q, which is not configured here",
			ErrStoreNotFound, s, s.Store)
	}
	key, differed := manifest.Dir(s.Collection, s.ID)+name, false
	data, err := object.ReadVerified(ctx, store, key, want.Length, func(data []byte) error {
		err := want.Check(data)
		if err == nil {
			return nil
		}
		differed = true
		return fmt.Errorf("%w: %s/%s: %w: %w", ErrSnapshotCorrupt, s.Store, key, copyjob.ErrDigest, err)
	})
	if !differed && errors.Is(err, object.ErrNotFound) { // at the first read
		if now, readErr := m.read(ctx, s.ID); readErr == nil && (now == nil || now.State != snapshot.Committed) {
			return nil, fmt.Errorf("%w: %s", ErrExpiredOrDropped, s) // during this read
		}
		return nil, fmt.Errorf("%w: %s/%s is missing", ErrSnapshotCorrupt, s.Store, key)
	}
	return data, err
}

// Segments calls fn with a committed snapshot's segments in id order, starting at
// ordinal from, until fn returns false. Its memory is bounded by one manifest.
func (m *Manager) Segments(ctx context.Context, ref Ref, from int64, fn func(*Segment) bool) error {
	s, err := m.committed(ctx, ref)
	if err != nil {
		return fmt.Errorf("segments of snapshot %s: %w", ref, err)
	}
	md, err := m.metadata(ctx, s)
	if err != nil {
		return fmt.Errorf("segments of snapshot %s: %w", s, err)
	}
	for i := range md.Manifests {
		mf := &md.Manifests[i]
		if mf.FirstOrdinal+mf.Segments <= from {
			continue
		}
		more, err := m.manifestSegments(ctx, s, mf, max(0, from-mf.FirstOrdinal), fn)
		if err != nil {
			return fmt.Errorf("segments of snapshot %s: %w", s, err)
		}
		if !more {
			return nil
		}
	}
	return nil
}

// manifestSegments calls fn with the segments of one manifest after the first skip ones.
// more is false if fn returned false.
func (m *Manager) manifestSegments(
	ctx context.Context, s *snapshot.Record, mf *manifest.ManifestFile, skip int64, fn func(*Segment) bool,
) (more bool, err error) {
	data, err := m.readCached(ctx, s, mf.File, mf.Digest)
	if err != nil {
		return false, err
	}
	r, err := manifest.Open(data)
	if err == nil {
		err = r.Skip(int(skip))
	}
	for n := mf.FirstOrdinal + skip; err == nil; n++ {
		seg, nextErr := r.Next()
		switch {
		case errors.Is(nextErr, io.EOF):
			return true, nil
		case nextErr != nil:
			err = nextErr
		case !fn(&Segment{Ordinal: n, Segment: *seg}):
			return false, nil
		}
	}
	if errors.Is(err, manifest.ErrCorrupt) {
		return false, fmt.Errorf("%w: %s: %w", ErrSnapshotCorrupt, mf.File, err)
	}
	return false, err
}

// readCached is readObject with the cache.
func (m *Manager) readCached(
	ctx context.Context, s *snapshot.Record, name string, want manifest.Digest,
) ([]byte, error) {
	key := manifest.Dir(s.Collection, s.ID) + name
	if data := m.manifests.get(key); data != nil {
		return data, nil
	}
	data, err := m.readObject(ctx, s, name, want)
	if err == nil {
		m.manifests.put(cachedFile{s.ID, key, data}, m.view.has)
	}
	return data, err
}

// manifestCache keeps the files that were read and checked last, so that the pages of a
// manifest need one read. The content of a key never changes.
type manifestCache struct {
	mu      sync.Mutex
	entries []cachedFile // newest last
}

type cachedFile struct {
	snapshot int64
	key      string
	data     []byte
}

// maxCached is the maximum size of the cache, in bytes.
const maxCached = 32 << 20

func (c *manifestCache) get(key string) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e.key == key {
			return e.data
		}
	}
	return nil
}

// put adds a file, and removes files of snapshots that no longer exist and the oldest
// files beyond maxCached.
func (c *manifestCache) put(f cachedFile, lives func(snapshot int64) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries = slices.DeleteFunc(c.entries, func(e cachedFile) bool { return e.key == f.key || !lives(e.snapshot) })
	c.entries = append(c.entries, f)
	size := 0
	for i, e := range slices.Backward(c.entries) {
		if size += len(e.data); size > maxCached {
			c.entries = slices.Delete(c.entries, 0, i+1)
			break
		}
	}
}
