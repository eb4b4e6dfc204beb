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

// The objects of a job are removed twice: by roll back, which removes all of them,
// and when the job's record is forgotten, a week after its end. By then a store may
// have executed copies of frozen workers. At that time all objects of a job that was
// given up are removed again.
//
// The target of a COMPLETED job is in use, and its segments come and go. There, an
// object is a straggler, a copy that arrived after the end, if its segment or build is
// in the job's id ranges and has no record at a revision read after the listing: ids
// are never used again. Files that an engine has written since then belong to other
// ids, or to a segment that has a record.
//
// Neither removal touches a file whose path the job cannot have made.

// Limits of the removal of objects.
const (
	removesInFlight = 16  // concurrent prefixes of a job
	removeBatch     = 500 // objects per request
	unitsPerRead    = 20  // units per transaction, of six keys each
)

// forEachPrefix calls fn with each prefix that may have objects of the job, several at
// once.
func (l *leader) forEachPrefix(
	ctx context.Context, job *Job, fn func(ctx context.Context, m *layout.Mapping, at targetPrefix) error,
) error {
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
			l.log.Warn("skip search for late copies of a restore: the object store is not configured here",
				zap.Int64("job", job.ID), zap.String("store", root.Store))
			continue
		}
		if !ok {
			_ = group.Wait() // this error takes precedence
			return fmt.Errorf("job %s: object store %q of root %d is not configured here", job, root.Store, number)
		}
		for prefix := range m.Prefixes() {
			if ctx.Err() != nil {
				break
			}
			at := targetPrefix{store: store, root: root.Prefix, prefix: root.Prefix + prefix}
			group.Go(func() error { return fn(ctx, m, at) })
		}
	}
	if err := group.Wait(); err != nil {
		return fmt.Errorf("job %s: %w", job, err)
	}
	return nil
}

// targetPrefix is a prefix in a store, with its root.
type targetPrefix struct {
	store        object.Store
	root, prefix string
}

// copiedObject is an object that a job may have made.
type copiedObject struct {
	info           object.Info
	segment, build int64 // of the target; build is 0 for files of the segment
}

// pages calls fn with pages of the objects that the job may have made, and returns the
// number of other objects. A page is valid until fn returns.
func (t targetPrefix) pages(
	ctx context.Context, m *layout.Mapping, fn func([]copiedObject) error,
) (foreign int64, err error) {
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

// deleteObjects deletes objects and counts them.
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

// removeObjects deletes all objects that a job may have made and aborts its open uploads.
// It returns the number of other objects under its prefixes, which stay.
func (l *leader) removeObjects(ctx context.Context, job *Job) (foreign int64, err error) {
	var foreignTotal atomic.Int64
	err = l.forEachPrefix(ctx, job, func(ctx context.Context, m *layout.Mapping, at targetPrefix) error {
		if _, err := at.store.AbortUploads(ctx, at.prefix, time.Time{}); err != nil {
			return err
		}
		n, err := at.pages(ctx, m, func(page []copiedObject) error {
			return l.deleteObjects(ctx, at.store, page)
		})
		foreignTotal.Add(n)
		return err
	})
	return foreignTotal.Load(), err
}
