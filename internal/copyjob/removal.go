package copyjob

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// What a job has made is removed twice: by rolling back, which removes all of it,
// and when its record is forgotten, a week after it has ended. By then a store may
// have carried out copies of workers that were frozen. What a job that was given
// up finds then is removed like before.
//
// The target of a job that is COMPLETED is in use, and its segments come and go.
// There, a copy came late when it is of a segment or build of the job's id ranges
// that has no record at a revision read after the listing that showed it: ids
// never return. Files that an engine has written since belong to other ids, or to
// a segment that has a record.
//
// Neither touches a file that the job cannot have made by its path.

// How objects of jobs are removed.
const (
	removesInFlight = 16  // prefixes of a job at once
	removeBatch     = 500 // objects at a time
	unitsPerRead    = 20  // whose records one transaction reads, under six keys each
)

// places calls fn with each of the prefixes that objects of the job lie under,
// several at once.
func (l *leader) forEachPrefix(ctx context.Context, job *Job, fn func(ctx context.Context, m *layout.Mapping, at targetPrefix) error) error {
	if !job.Copied {
		return nil
	}
	m := job.cleanupMapping()
	if err := m.Check(); err != nil {
		return fmt.Errorf("job %s: %w", job, err)
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(removesInFlight)
	for number, root := range job.Roots {
		store, ok := l.o.Stores[root.Store]
		if !ok && job.State == Completed {
			l.log.Warn("late copies of a restore are not looked for: the object store is not configured here any more",
				zap.Int64("job", job.ID), zap.String("store", root.Store))
			continue
		}
		if !ok {
			_ = group.Wait() // this error comes first
			return fmt.Errorf("job %s: object store %q of root %d is not configured here", job, root.Store, number)
		}
		for prefix := range m.Prefixes() {
			if ctx.Err() != nil {
				break
			}
			group.Go(func() error {
				return fn(ctx, m, targetPrefix{store: store, root: root.Prefix, prefix: root.Prefix + prefix})
			})
		}
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("job %s: %w", job, err)
	}
	return nil
}

// target is a prefix in a store, and the root that it lies under.
type targetPrefix struct {
	store        object.Store
	root, prefix string
}

// copied is an object that a job may have made.
type copiedObject struct {
	info           object.Info
	segment, build int64 // of the target; no build: 0
}

// pages calls fn with the objects of a place that the job may have made, some at a
// time, and returns how many others there are. The page is fn's until it returns.
func (t targetPrefix) pages(ctx context.Context, m *layout.Mapping, fn func([]copiedObject) error) (foreign int64, err error) {
	var page []copiedObject
	for info, err := range t.store.List(ctx, t.prefix) {
		if err != nil {
			return 0, err
		}
		id, build, ok := m.Makes(info.Key[len(t.root):])
		if !ok {
			foreign++
			continue
		}
		if page = append(page, copiedObject{info, id, build}); len(page) < removeBatch {
			continue
		}
		if err := fn(page); err != nil {
			return 0, err
		}
		page = page[:0]
	}
	if len(page) > 0 {
		err = fn(page)
	}
	return foreign, err
}

// delete deletes objects of a place.
func (l *leader) deleteObjects(ctx context.Context, store object.Store, list []copiedObject) error {
	if len(list) == 0 {
		return nil
	}
	names := make([]string, len(list))
	var bytes int64
	for i := range list {
		names[i] = list[i].info.Key
		bytes += list[i].info.Size
	}
	err := store.Delete(ctx, names...)
	if err != nil {
		return err
	}
	l.o.Deleted(int64(len(list)), bytes)
	return nil
}

// removeObjects removes all objects that a job may have made, open uploads
// included, and returns how many others lie among them, which stay.
func (l *leader) removeObjects(ctx context.Context, job *Job) (foreign int64, err error) {
	var others atomic.Int64
	err = l.forEachPrefix(ctx, job, func(ctx context.Context, m *layout.Mapping, at targetPrefix) error {
		if _, err := at.store.AbortUploads(ctx, at.prefix, time.Time{}); err != nil {
			return err
		}
		n, err := at.pages(ctx, m, func(page []copiedObject) error { return l.deleteObjects(ctx, at.store, page) })
		others.Add(n)
		return err
	})
	return others.Load(), err
}
