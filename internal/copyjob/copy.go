package copyjob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// requestsInFlight bounds the concurrent list and head requests of a task.
const requestsInFlight = 8

// minParts and maxParts bound the concurrent part copies of a large file.
const (
	minParts = 4
	maxParts = 16
)

// maxRefusedCopies is the number of refused copies after which an attempt starts no more.
// Until then the attempt copies the other files, so that one refusal does not interrupt
// large copies, and a file that stays refused is soon the only one left.
const maxRefusedCopies = 8

// taskResult is the result of an attempt.
type taskResult struct {
	segments []segment.Segment
	totals   segment.Totals
}

// fileCopy is one file to copy.
type fileCopy struct {
	file    *segment.File // of the target's segment; its ETag is set to that of the copy
	segment int64         // of the snapshot
	store   object.Store
	alias   string
	from    object.Info // as the snapshot recorded it; the ETag may be empty until it is pinned
	to      string
	source  location // lists from
	target  location // lists to
	parts   int      // concurrent part copies
}

// location is a prefix in a store that contains the files of one segment or build.
type location struct {
	alias  string
	prefix string // empty: no such prefix
}

// copy executes the task: it copies the files that are missing, verifies all of them
// against a listing of the target, and registers the target's segments.
func (a *attempt) copy(ctx context.Context) error {
	w := a.worker
	md, err := readMetadata(ctx, w.o.Snapshots, a.job.Snapshot)
	if err != nil {
		return err
	}
	mapping, err := a.job.Mapping(md)
	if err != nil {
		return fmt.Errorf("%w: %w", errMapping, err)
	}
	from, to := a.job.segmentRange(a.number)
	items, err := w.manifests.segments(ctx, a.job.Snapshot, md, from, to)
	if err != nil {
		return err
	}
	result := &taskResult{}
	indexes := a.job.targetIndexes(md)
	for _, it := range items {
		if !a.job.WantsPartition(it.Partition) {
			continue
		}
		target, err := a.job.targetSegment(it, mapping, indexes)
		if err != nil {
			return err
		}
		result.segments = append(result.segments, target)
		result.totals.Add(&result.segments[len(result.segments)-1])
		if target.RowCeiling != 0 {
			result.totals.Straddling++
		}
	}
	files, err := a.planCopies(md, items, result.segments)
	if err != nil {
		return err
	}
	if err := a.transfer(ctx, files); err != nil {
		return err
	}
	return a.register(ctx, result)
}

// targetSegment returns the target of a segment: the same rows, with other ids and paths.
func (j *Job) targetSegment(it sourceSegment, m *layout.Mapping, indexes map[int64]int64) (segment.Segment, error) {
	s := *it.Segment
	if j.SkipIndexes {
		s.Builds = nil
	}
	paths, err := m.Paths(&s, it.ordinal, it.firstBuild)
	if err != nil {
		return segment.Segment{}, err
	}
	partition, _ := m.Partition(s.Partition) // Paths has checked it
	s.ID, s.Partition, s.State = m.Segment(it.ordinal), partition, segment.Flushed
	s.Files = slices.Clone(s.Files)
	s.Builds = slices.Clone(s.Builds)
	for b := range s.Builds {
		build := &s.Builds[b]
		index, ok := indexes[build.Index]
		if !ok {
			return segment.Segment{}, fmt.Errorf("%w: build %d is of index %d, which the snapshot does not have",
				errUnreadable, build.ID, build.Index)
		}
		build.ID, build.Index = m.Build(it.firstBuild+int64(b)), index
		build.Files = slices.Clone(build.Files)
	}
	n := 0
	for f := range s.AllFiles() {
		f.Path = paths[n]
		n++
	}
	return s, nil
}

// planCopies lists the files to copy, each with its source and its target.
func (a *attempt) planCopies(
	md *manifest.Metadata, items []sourceSegment, targets []segment.Segment,
) ([]*fileCopy, error) {
	var files []*fileCopy
	next := 0
	for _, it := range items {
		if !a.job.WantsPartition(it.Partition) {
			continue
		}
		target := &targets[next]
		next++
		ids := []int64{target.ID}
		for b := range target.Builds {
			ids = append(ids, target.Builds[b].ID)
		}
		source := *it.Segment
		if a.job.SkipIndexes {
			source.Builds = nil
		}
		var sources []*segment.File
		for f := range source.AllFiles() {
			sources = append(sources, f)
		}
		n := 0
		for f := range target.AllFiles() {
			src := sources[n]
			n++
			if src.Root >= len(md.Roots) {
				return nil, fmt.Errorf("%w: file %q is under root %d of %d",
					errUnreadable, src.Path, src.Root, len(md.Roots))
			}
			root := md.Roots[src.Root]
			store, ok := a.worker.o.Stores[root.Store]
			if !ok {
				return nil, fmt.Errorf("%w: %q", errNoStore, root.Store)
			}
			files = append(files, &fileCopy{
				file: f, segment: it.ID, store: store, alias: root.Store,
				from:   object.Info{Key: root.Prefix + src.Path, Size: src.Size, ETag: src.ETag, Checksum: src.Checksum.Text()},
				to:     root.Prefix + f.Path,
				source: location{root.Store, listPrefix(root.Prefix, src.Path, it.ID)},
				target: location{root.Store, listPrefix(root.Prefix, f.Path, ids...)},
			})
		}
	}
	return files, nil
}

// listPrefix returns the prefix of the path up to the first directory that is named by one
// of ids. It contains the files of one segment or build, so a listing of it is cheap. It
// is empty when no directory matches.
func listPrefix(root, path string, ids ...int64) string {
	at := 0
	for element := range strings.SplitSeq(path, "/") {
		at += len(element) + 1
		if at > len(path) { // the last element is the file name
			break
		}
		if id, err := strconv.ParseInt(element, 10, 64); err == nil && slices.Contains(ids, id) {
			return root + path[:at]
		}
	}
	return ""
}

// transfer copies files, the largest first, and verifies them.
func (a *attempt) transfer(ctx context.Context, files []*fileCopy) error {
	budget := a.worker.budget(a.jobID, a.limits)
	if err := a.pinSources(ctx, budget, files); err != nil {
		return err
	}
	existing := map[location]map[string]object.Info{}
	if a.attempt > 1 { // an earlier attempt may have copied some
		var err error
		if existing, err = a.list(ctx, budget, files, func(f *fileCopy) location { return f.target }); err != nil {
			return err
		}
	}
	order := slices.Clone(files)
	slices.SortStableFunc(order, func(x, y *fileCopy) int { return cmp.Compare(y.from.Size, x.from.Size) })
	progress := &progress{attempt: a, last: a.worker.o.Clock.Elapsed()}
	a.progress = progress
	var refused refusedCopies
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(a.worker.o.CopyInFlight)
	for _, f := range order {
		// The fewer the files, the more parts of each are copied at once.
		f.parts = min(max(minParts, a.worker.o.CopyInFlight/len(files)), maxParts)
		group.Go(func() error {
			if refused.tooMany() {
				return nil
			}
			if err := a.copyFile(groupCtx, budget, f, existing); isRefused(err) {
				refused.add(err)
				return nil
			} else if err != nil {
				return err
			}
			progress.add(groupCtx, f.from.Size)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if refused.first != nil {
		return refused.first
	}
	return a.verify(ctx, budget, files)
}

// refusedCopies counts the copies of an attempt that the store refused.
type refusedCopies struct {
	mu    sync.Mutex
	n     int
	first error // nil: none
}

func (r *refusedCopies) add(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n++; r.first == nil {
		r.first = err
	}
}

func (r *refusedCopies) tooMany() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.n >= maxRefusedCopies
}

// forEach calls do for each of files, up to requestsInFlight at once, until one fails.
func forEach(ctx context.Context, files []*fileCopy, do func(context.Context, *fileCopy) error) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(requestsInFlight)
	for _, f := range files {
		group.Go(func() error { return do(ctx, f) })
	}
	return group.Wait()
}

// name returns the store, the key and the segment of the source, for errors.
func (f *fileCopy) name() string {
	return fmt.Sprintf("%s/%s of segment %d", f.alias, f.from.Key, f.segment)
}

// head requests the attributes of one object.
func (a *attempt) head(ctx context.Context, b *budget, f *fileCopy, key string) (object.Info, error) {
	if err := b.spend(ctx, 1, 0); err != nil {
		return object.Info{}, err
	}
	info, err := f.store.Head(ctx, key)
	if errors.Is(err, object.ErrNotFound) && key == f.from.Key {
		err = fmt.Errorf("%w: %s", errSourceMissing, f.name())
	}
	return info, err
}

// list lists each location of files once. Files without a location are skipped.
func (a *attempt) list(
	ctx context.Context, b *budget, files []*fileCopy, locate func(*fileCopy) location,
) (map[location]map[string]object.Info, error) {
	found := map[location]map[string]object.Info{}
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(requestsInFlight)
	for _, f := range files {
		p := locate(f)
		if p.prefix == "" || found[p] != nil {
			continue
		}
		m := map[string]object.Info{}
		found[p] = m
		group.Go(func() error {
			if err := b.spend(groupCtx, 1, 0); err != nil {
				return err
			}
			for info, err := range f.store.List(groupCtx, p.prefix) {
				if err != nil {
					return err
				}
				m[info.Key] = info
			}
			return nil
		})
	}
	return found, group.Wait()
}

// copyFile copies one file, unless the target exists and is proved equal.
func (a *attempt) copyFile(
	ctx context.Context, b *budget, f *fileCopy, existing map[location]map[string]object.Info,
) error {
	if target, ok := existing[f.target][f.to]; ok {
		equal := object.ProvedEqual(f.from, target)
		if !equal && target.Size == f.from.Size { // a head returns more evidence than a listing
			info, err := a.head(ctx, b, f, f.to)
			if err != nil && !errors.Is(err, object.ErrNotFound) {
				return err
			}
			target, equal = info, err == nil && object.ProvedEqual(f.from, info)
		}
		if equal {
			f.file.ETag = target.ETag
			return nil
		}
	}
	parts, _ := a.job.Parts.Split(f.from.Size)
	if err := b.spend(ctx, 1+parts, f.from.Size); err != nil {
		return err
	}
	if err := a.worker.limiter.acquire(ctx); err != nil {
		return err
	}
	info, err := f.store.Copy(ctx, object.CopyRequest{
		From: f.from.Key, To: f.to, SourceETag: f.from.ETag, Size: f.from.Size, Parts: a.job.Parts, InFlight: f.parts,
	})
	a.worker.limiter.release(err)
	switch {
	case errors.Is(err, object.ErrNotFound):
		return fmt.Errorf("%w: %s", errSourceMissing, f.name())
	case errors.Is(err, object.ErrSourceChanged):
		return a.explainChange(ctx, b, f)
	case err != nil:
		return fmt.Errorf("copy %s: %w", f.name(), err)
	}
	f.file.ETag = info.ETag
	return nil
}

// explainChange returns the error of a copy that the store refused because the source
// changed: it requests the file's present attributes. If they are not available, the copy
// is tried again.
func (a *attempt) explainChange(ctx context.Context, b *budget, f *fileCopy) error {
	info, err := a.head(ctx, b, f, f.from.Key)
	if err != nil {
		return fmt.Errorf("check the present state of %s: %w", f.name(), err)
	}
	switch likeness, reason := object.Compare(f.from, info); {
	case likeness == object.OtherLayout:
		return fmt.Errorf("%w: %s: %s", errSourceLayout, f.name(), reason)
	case likeness.Refused():
		return fmt.Errorf("%w: %s: %s", errSourceAltered, f.name(), reason)
	}
	return fmt.Errorf("%w: %s did not have ETag %q and %d bytes during the copy",
		errSourceAltered, f.name(), f.from.ETag, f.from.Size)
}

// verify checks that every copy exists with the ETag that its copy returned.
func (a *attempt) verify(ctx context.Context, b *budget, files []*fileCopy) error {
	found, err := a.list(ctx, b, files, func(f *fileCopy) location { return f.target })
	if err != nil {
		return err
	}
	return forEach(ctx, files, func(ctx context.Context, f *fileCopy) error {
		info, ok := found[f.target][f.to]
		if !ok {
			var err error
			if info, err = a.head(ctx, b, f, f.to); err != nil {
				return fmt.Errorf("verify the copy of %s: %w", f.name(), err)
			}
		}
		switch {
		case !object.SameETag(info.ETag, f.file.ETag):
			return fmt.Errorf("verify the copy of %s: %s has ETag %q, not %q", f.name(), f.to, info.ETag, f.file.ETag)
		case info.Size != f.from.Size && f.from.ETag != "":
			return fmt.Errorf("%w: %s has %d bytes, not %d", errSourceAltered, f.name(), info.Size, f.from.Size)
		}
		return nil
	})
}
