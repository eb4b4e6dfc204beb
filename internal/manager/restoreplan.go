package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// maxMissing is the maximum number of missing files that a plan names.
const maxMissing = 100

// RestorePlan is the expected work of a restore.
type RestorePlan struct {
	Totals        segment.Totals
	Requests      int64
	EstimatedTime time.Duration
	Conflicts     []string
	Missing       []string // the first maxMissing
	MissingCount  int64
}

// restoreScope is a snapshot with the parts that a restore copies.
type restoreScope struct {
	snapshot   *snapshot.Record
	md         *manifest.Metadata
	partitions []int64 // ascending; none: all
	layout     layout.Layout
	parts      object.CopyParts
	totals     segment.Totals
	requests   int64
}

// checkRestore makes the checks of a restore that need no writes. If the target exists it
// returns a scope without parts and ErrCollectionExists.
func (m *Manager) checkRestore(ctx context.Context, ref Ref, spec *RestoreSpec) (*restoreScope, error) {
	for _, n := range []struct{ field, name string }{{"target.db", spec.DB}, {"target.name", spec.Name}} {
		if err := catalog.CheckName(n.field, n.name); err != nil {
			return nil, err
		}
	}
	if err := checkLabels(spec.Labels, maxJobLabels); err != nil {
		return nil, err
	}
	s, err := m.committed(ctx, ref)
	if err != nil {
		return nil, err
	}
	r := &restoreScope{snapshot: s}
	if r.md, err = m.reader.Metadata(ctx, s); err != nil {
		return nil, err
	}
	if _, found, _, err := m.kv.Get(ctx, keys.CollectionName(spec.DB, spec.Name)); err != nil {
		return nil, err
	} else if found {
		col, err := m.catalog.Collection(ctx, catalog.Ref{DB: spec.DB, Name: spec.Name})
		if err == nil && col.State == catalog.Restoring {
			return r, fmt.Errorf("%w: %s/%s is being restored by job %d; choose another name, or cancel that",
				catalog.ErrCollectionExists, spec.DB, spec.Name, col.Job)
		}
		return r, fmt.Errorf("%w: %s/%s; choose another name, or drop it first",
			catalog.ErrCollectionExists, spec.DB, spec.Name)
	}
	return r, m.selectParts(ctx, r, spec)
}

// errCopiesUnknown means that the probe of a store failed.
var errCopiesUnknown = errors.New("support of conditional copies is unknown")

// selectParts sets the partitions, layout and totals of a restore, and checks that the
// layout accepts every file.
func (m *Manager) selectParts(ctx context.Context, r *restoreScope, spec *RestoreSpec) error {
	named := 0
	for _, c := range r.md.Channels {
		if c.Name != "" {
			named++
		}
	}
	if len(spec.Channels) > 0 && len(spec.Channels) != named {
		return fmt.Errorf("%w: %d, and the snapshot has %d; they are mapped by shard",
			ErrChannelMismatch, len(spec.Channels), named)
	}
	for _, name := range spec.Partitions {
		at := slices.IndexFunc(r.md.Partitions, func(p manifest.Partition) bool { return p.Name == name })
		if at < 0 {
			return fmt.Errorf("%w: %q is not in the snapshot", catalog.ErrPartitionNotFound, name)
		}
		r.partitions = append(r.partitions, r.md.Partitions[at].ID)
	}
	slices.Sort(r.partitions)
	r.partitions = slices.Compact(r.partitions)
	r.layout = layout.Native
	if r.md.Collection.Layout == layout.Milvus.String() {
		r.layout = layout.Milvus
	}
	t := r.md.Totals
	r.totals = segment.Totals(t)
	r.requests = t.Files + t.Segments + 20
	if r.layout == layout.Native && len(r.partitions) == 0 && !spec.SkipIndexes {
		return nil
	}
	return m.countSegments(ctx, r, spec.SkipIndexes)
}

// checkStores rejects stores without conditional copies, and disables copies in parts
// for stores without them. With again it repeats a failed probe, which writes to the
// store.
func (m *Manager) checkStores(ctx context.Context, r *restoreScope, again bool) error {
	r.parts = object.CopyParts{}.WithDefaults()
	for _, root := range r.md.Roots {
		if m.o.Features == nil {
			continue
		}
		f, err := m.o.Features(ctx, root.Store, again)
		switch {
		case err != nil:
			return fmt.Errorf("%w of store %s: %w", errCopiesUnknown, root.Store, err)
		case !f.ConditionalCopy:
			return fmt.Errorf("%w: %s has no conditional copies; see AdminService.ProbeStore", ErrStoreUnfit, root.Store)
		case !f.MultipartCopy:
			r.parts.Threshold = object.MaxCopySize
		}
	}
	return nil
}

// countSegments sums the segments that are restored, and checks that the layout has a
// key for each of their files.
func (m *Manager) countSegments(ctx context.Context, r *restoreScope, skipIndexes bool) error {
	// The ids do not matter: only whether the layout has a path for each file.
	job := &copyjob.Job{
		Source: r.snapshot.Collection, Target: r.snapshot.Collection + 1, Partitions: r.partitions, Layout: r.layout,
		FirstPartition: 1, FirstSegment: 1 << 40, Segments: r.md.Totals.Segments,
		FirstBuild: 1 << 50, Builds: r.md.Totals.Builds,
	}
	mapping, err := job.Mapping(r.md)
	if err != nil {
		return err
	}
	r.totals = segment.Totals{}
	var builds int64
	var layoutErr error
	err = m.Segments(ctx, Ref{ID: r.snapshot.ID}, 0, func(s *snapshot.Segment) bool {
		first := builds
		builds += int64(len(s.Builds))
		if !job.WantsPartition(s.Partition) {
			return true
		}
		if skipIndexes {
			s.Builds = nil
		}
		if _, layoutErr = mapping.Paths(&s.Segment, s.Ordinal, first); layoutErr != nil {
			return false
		}
		r.totals.Add(&s.Segment)
		if s.RowCeiling != 0 {
			r.totals.Straddling++
		}
		return true
	})
	if layoutErr != nil {
		return fmt.Errorf("%w: %w", ErrLayoutRefused, layoutErr)
	}
	r.requests = r.totals.Files + r.totals.Segments + 20
	return err
}

// PlanRestore returns the expected work of a restore and changes nothing. With verify it
// checks every file in its store.
func (m *Manager) PlanRestore(ctx context.Context, spec *RestoreSpec, verify bool) (*RestorePlan, error) {
	plan := &RestorePlan{}
	r, err := m.checkRestore(ctx, spec.Snapshot, spec)
	if errors.Is(err, catalog.ErrCollectionExists) {
		plan.Conflicts = append(plan.Conflicts, err.Error())
		err = m.selectParts(ctx, r, spec)
	}
	switch {
	case errors.Is(err, ErrLayoutRefused):
		plan.Conflicts = append(plan.Conflicts, err.Error())
	case err != nil:
		return nil, fmt.Errorf("plan the restore of snapshot %s: %w", spec.Snapshot, err)
	}
	switch err := m.checkStores(ctx, r, false); {
	case errors.Is(err, errCopiesUnknown): // its text may contain addresses
		plan.Conflicts = append(plan.Conflicts,
			fmt.Sprintf("%v: the store accepts no writes at present; a restore probes it again", errCopiesUnknown))
	case err != nil:
		plan.Conflicts = append(plan.Conflicts, err.Error())
	}
	col := targetOf(r.md, spec)
	if err := m.catalog.CheckNew(&col); err != nil {
		plan.Conflicts = append(plan.Conflicts, err.Error())
	}
	plan.Totals, plan.Requests = r.totals, r.requests
	plan.EstimatedTime = estimate(r, spec.Limits)
	if verify {
		if err := m.findMissing(ctx, plan, r, spec.SkipIndexes); err != nil {
			return nil, fmt.Errorf("plan the restore of snapshot %s: %w", spec.Snapshot, err)
		}
	}
	return plan, nil
}

// Assumed rates of a store, for estimates.
const (
	usualRequests = 500       // a second
	usualBytes    = 200 << 20 // a second
)

// estimate returns the expected duration of a restore within its limits.
func estimate(r *restoreScope, l copyjob.Limits) time.Duration {
	requests, bytes := int64(usualRequests), int64(usualBytes)
	if l.Requests > 0 {
		requests = min(requests, l.Requests)
	}
	if l.Bytes > 0 {
		bytes = min(bytes, l.Bytes)
	}
	seconds := max(float64(r.requests)/float64(requests), float64(r.totals.Bytes)/float64(bytes))
	return time.Duration(seconds * float64(time.Second)).Round(time.Millisecond)
}

// findMissing checks the files of a plan in their stores.
func (m *Manager) findMissing(ctx context.Context, plan *RestorePlan, r *restoreScope, skipIndexes bool) error {
	wants := &copyjob.Job{Partitions: r.partitions}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(verifyInFlight)
	var mu sync.Mutex
	var failed atomic.Bool
	missing := func(format string, args ...any) {
		mu.Lock()
		defer mu.Unlock()
		if plan.MissingCount++; len(plan.Missing) < maxMissing {
			plan.Missing = append(plan.Missing, fmt.Sprintf(format, args...))
		}
	}
	err := m.Segments(ctx, Ref{ID: r.snapshot.ID}, 0, func(s *snapshot.Segment) bool {
		if !wants.WantsPartition(s.Partition) {
			return true
		}
		if skipIndexes {
			s.Builds = nil
		}
		for f := range s.AllFiles() {
			group.Go(func() error {
				err := m.checkFile(groupCtx, r.md, s.ID, f, missing)
				failed.Store(failed.Load() || err != nil)
				return err
			})
		}
		return !failed.Load()
	})
	return errors.Join(err, group.Wait())
}

// checkFile calls missing if a file does not exist as recorded.
func (m *Manager) checkFile(
	ctx context.Context, md *manifest.Metadata, id int64, f *segment.File, missing func(string, ...any),
) error {
	if f.Root >= len(md.Roots) {
		missing("%s of segment %d: it has no root", f.Path, id)
		return nil
	}
	root := md.Roots[f.Root]
	store, ok := m.o.Stores[root.Store]
	if !ok {
		missing("%s/%s of segment %d: the object store is not configured here", root.Store, root.Prefix+f.Path, id)
		return nil
	}
	info, err := store.Head(ctx, root.Prefix+f.Path)
	switch {
	case errors.Is(err, object.ErrNotFound):
		missing("%s/%s of segment %d", root.Store, root.Prefix+f.Path, id)
		return nil
	case err != nil:
		return err
	}
	if likeness, reason := compareFile(f, info); likeness.Refused() {
		missing("%s/%s of segment %d: %s", root.Store, root.Prefix+f.Path, id, reason)
	}
	return nil
}

// compareFile compares an object with the record of a file.
func compareFile(f *segment.File, now object.Info) (object.Likeness, string) {
	return object.Compare(object.Info{Size: f.Size, ETag: f.ETag, Checksum: f.Checksum.Text()}, now)
}
