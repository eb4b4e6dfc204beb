package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Usage is the storage that a snapshot holds in the object stores.
type Usage struct {
	ExclusiveFiles, ExclusiveBytes int64 // held only by the snapshot
	SharedFiles, SharedBytes       int64
}

// Usage counts the files of a committed snapshot. Exclusive are those that a drop would
// free now. Shared are the others: files of the current collection, files held by other
// snapshots, and files that are never deleted because they may have another owner. Its
// memory is bounded.
func (m *Manager) Usage(ctx context.Context, ref Ref) (*Usage, error) {
	s, err := m.committed(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("usage of snapshot %s: %w", ref, err)
	}
	counts, err := m.gc.Counts(ctx, s.Collection)
	if err != nil {
		return nil, fmt.Errorf("usage of snapshot %s: %w", s, err)
	}
	u := &Usage{}
	var part []segment.Segment
	var partErr error
	flush := func() bool {
		partErr = m.addUsage(ctx, u, s.Collection, part, counts)
		part = part[:0]
		return partErr == nil
	}
	err = m.Segments(ctx, Ref{ID: s.ID}, 0, func(seg *snapshot.Segment) bool {
		part = append(part, seg.Segment)
		return len(part) < chunkSegments || flush()
	})
	if err == nil && partErr == nil {
		flush()
	}
	if err == nil {
		err = partErr
	}
	if err != nil {
		return nil, fmt.Errorf("usage of snapshot %s: %w", s, err)
	}
	return u, nil
}

// addUsage adds the files of some of a snapshot's segments, which must be in id order.
func (m *Manager) addUsage(
	ctx context.Context, u *Usage, collection int64, segments []segment.Segment, counts gc.Counts,
) error {
	if len(segments) == 0 {
		return nil
	}
	col, err := m.catalog.Collection(ctx, catalog.Ref{ID: collection})
	gone := errors.Is(err, catalog.ErrCollectionNotFound) || err == nil && col.State == catalog.Dropping
	if err != nil && !gone {
		return err
	}
	live := map[int64]map[catalog.FilePath]bool{}
	if !gone { // the remains of a dropped collection hold no files
		if live, err = m.liveFiles(ctx, collection, segments); err != nil {
			return err
		}
	}
	parts, err := m.removedUnits(ctx, collection, segments, live, counts)
	if err != nil {
		return err
	}
	for i := range segments {
		s := &segments[i]
		_, isLive := live[s.ID]
		shared := counts.Segment(s.ID) > 1
		for j := range s.Files {
			f := &s.Files[j]
			path := catalog.FilePath{Root: f.Root, Path: f.Path}
			exclusive := !shared || parts[s.ID].exclusive(path, counts)
			u.add(f, exclusive && catalog.Owns(collection, s, f.Path) && !live[s.ID][path])
		}
		for b := range s.Builds {
			build := &s.Builds[b]
			// A build is reclaimed with its segment, unless it was removed from it before.
			buildShared := counts.Build(build.ID) > 1 || shared && !isLive && !parts[s.ID].hasBuild(build.ID)
			for j := range build.Files {
				f := &build.Files[j]
				path := catalog.FilePath{Root: f.Root, Path: f.Path}
				u.add(f, !buildShared && catalog.Owns(collection, s, f.Path) && !live[s.ID][path])
			}
		}
	}
	return nil
}

// segmentUnits are the units that were removed from one segment.
type segmentUnits []catalog.Unit

// exclusive reports whether the file belongs to a unit that only one snapshot holds.
func (p segmentUnits) exclusive(path catalog.FilePath, counts gc.Counts) bool {
	for i := range p {
		if p[i].Kind == catalog.UnitFiles && !p[i].Spilled && p[i].Has(path) {
			return counts.Unit(&p[i]) <= 1
		}
	}
	return false
}

func (p segmentUnits) hasBuild(id int64) bool {
	return slices.ContainsFunc(p, func(u catalog.Unit) bool { return u.Kind == catalog.UnitBuild && u.ID == id })
}

// removedUnits reads the units that were removed from those segments of which other
// snapshots may hold a different part. The holders of such a unit differ from those of
// its segment. The segments must be in id order.
func (m *Manager) removedUnits(
	ctx context.Context, collection int64, segments []segment.Segment, live map[int64]map[catalog.FilePath]bool,
	counts gc.Counts,
) (map[int64]segmentUnits, error) {
	var ids []int64
	for i := range segments {
		s := &segments[i]
		files, isLive := live[s.ID]
		whole := isLive && !slices.ContainsFunc(s.Files, func(f segment.File) bool {
			return !files[catalog.FilePath{Root: f.Root, Path: f.Path}]
		})
		if !whole && counts.Segment(s.ID) > 1 {
			ids = append(ids, s.ID)
		}
	}
	// The record of a spilled unit is in the object store. It is read only for files that
	// may be exclusive to the snapshot.
	parts := map[int64]segmentUnits{}
	err := m.catalog.Parts(ctx, collection, ids, func(u *catalog.Unit) bool {
		return u.Kind == catalog.UnitFiles && counts.Unit(u) <= 1
	}, func(u catalog.Unit) { parts[u.Segment.ID] = append(parts[u.Segment.ID], u) })
	return parts, err
}

func (u *Usage) add(f *segment.File, exclusive bool) {
	if exclusive {
		u.ExclusiveFiles++
		u.ExclusiveBytes += f.Size
	} else {
		u.SharedFiles++
		u.SharedBytes += f.Size
	}
}

// liveFiles returns the current files of those segments that are still in the
// collection, by segment id.
func (m *Manager) liveFiles(
	ctx context.Context, collection int64, segments []segment.Segment,
) (map[int64]map[catalog.FilePath]bool, error) {
	wanted := make(map[int64]bool, len(segments))
	for i := range segments {
		wanted[segments[i].ID] = true
	}
	live := map[int64]map[catalog.FilePath]bool{}
	from, to := keys.Span(keys.SegmentPrefix(collection), segments[0].ID, segments[len(segments)-1].ID)
	_, err := m.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return err
			}
			if !wanted[id] {
				continue
			}
			s, err := catalog.DecodeSegment(collection, kv)
			if err != nil {
				return err
			}
			live[id] = map[catalog.FilePath]bool{}
			for f := range s.AllFiles() {
				live[id][catalog.FilePath{Root: f.Root, Path: f.Path}] = true
			}
		}
		return nil
	})
	return live, err
}

// CheckDrop returns the id and the usage of the snapshot that Drop would drop, or 0 if
// there is none. It changes nothing. The errors are those of Drop.
func (m *Manager) CheckDrop(ctx context.Context, ref Ref, expected int64) (int64, *Usage, error) {
	s, txn, err := m.droppable(ctx, ref, expected)
	if err != nil {
		return 0, nil, fmt.Errorf("drop snapshot %s: %w", ref, err)
	}
	if s == nil || len(txn.Then) == 0 {
		return 0, nil, nil
	}
	u, err := m.Usage(ctx, Ref{ID: s.ID})
	return s.ID, u, err
}
