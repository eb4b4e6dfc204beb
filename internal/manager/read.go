package manager

import (
	"context"
	"errors"
	"fmt"

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
		if now, err := m.reader.Record(ctx, s.ID); err == nil && (now == nil || now.State != snapshot.Committed) {
			return nil, fmt.Errorf("describe snapshot %s: %w", s, snapshot.ErrExpiredOrDropped)
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
	md, err := m.reader.Metadata(ctx, s)
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
		return nil, fmt.Errorf("%w: %q", object.ErrStoreNotFound, s.Store)
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

// Segments calls fn with a committed snapshot's segments in id order, starting at
// ordinal from, until fn returns false. Its memory is bounded by one manifest.
func (m *Manager) Segments(ctx context.Context, ref Ref, from int64, fn func(*snapshot.Segment) bool) error {
	s, err := m.committed(ctx, ref)
	if err != nil {
		return fmt.Errorf("segments of snapshot %s: %w", ref, err)
	}
	md, err := m.reader.Metadata(ctx, s)
	if err != nil {
		return fmt.Errorf("segments of snapshot %s: %w", s, err)
	}
	for i := range md.Manifests {
		mf := &md.Manifests[i]
		if mf.FirstOrdinal+mf.Segments <= from {
			continue
		}
		more, err := m.reader.Segments(ctx, s, mf, max(0, from-mf.FirstOrdinal), fn)
		if err != nil {
			return fmt.Errorf("segments of snapshot %s: %w", s, err)
		}
		if !more {
			return nil
		}
	}
	return nil
}
