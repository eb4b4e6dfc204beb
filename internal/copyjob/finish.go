package copyjob

import (
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// publish makes the target visible and the job COMPLETED.
func (l *leader) publish(ctx context.Context, d decision) error {
	col, err := l.o.Catalog.Collection(ctx, catalog.Ref{ID: d.job.Target})
	if err != nil {
		return err
	}
	if col.State != catalog.Restoring || col.Job != d.job.ID {
		return fmt.Errorf("collection %s is %v of job %d, want RESTORING of job %d", &col, col.State, col.Job, d.job.ID)
	}
	next := *d.job
	next.State, next.Phase, next.EndTime = Completed, Publish, l.o.Clock.Display()
	next.Done, next.Retries = d.done, d.retries
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	err = l.endJob(ctx, "restore.publish", d.job, &next, op,
		[]meta.Cond{meta.Unchanged(keys.Collection(col.ID), col.Revision)},
		[]meta.Op{catalog.PublishOp(col, op)})
	if err == nil {
		l.log.Info("restore completed", zap.Int64("job", d.job.ID), zap.Int64("collection", col.ID),
			zap.String("name", col.Name), zap.Int64("files", d.done.Files), zap.Int64("bytes", d.done.Bytes))
	}
	return err
}

// endJob writes the job's final state, completes its token, and deletes its pin, limits,
// tasks and progress.
func (l *leader) endJob(
	ctx context.Context, step string, job, next *Job, op string, conds []meta.Cond, ops []meta.Op,
) error {
	// The pin ends by a release, not by expiry.
	unpin := record.Encode(&storagev1.Unpin{Format: record.Format, SnapshotId: job.Snapshot, PinId: job.Pin})
	ops = append(ops, meta.Put(keys.Job(job.ID), next.Encode(op)), meta.Delete(keys.JobLimits(job.ID)),
		meta.Delete(keys.Pin(job.Snapshot, job.Pin)), meta.Put(keys.Unpin, unpin))
	for _, prefix := range []string{keys.TaskPrefix(job.ID), keys.ProgressPrefix(job.ID)} {
		from, to := meta.Prefix(prefix)
		ops = append(ops, meta.DeleteRange(from, to))
	}
	var lease request.Lease
	if job.RequestKey != "" {
		kv, found, _, err := l.kv.Get(ctx, job.RequestKey)
		if err != nil {
			return err
		}
		if found {
			if lease, err = l.o.Requests.Get(ctx); err != nil {
				return err
			}
			rec, err := request.Complete(kv, lease, next.Encode(op))
			if err != nil {
				return err
			}
			conds = append(conds, meta.Unchanged(kv.Key, kv.ModRevision))
			ops = append(ops, rec)
		}
	}
	err := l.write(ctx, step, job, conds, ops)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		l.o.Requests.Forget(ctx, lease)
	}
	return err
}

// rollBack removes all objects and keys of the target, and ends the job. The workers have
// stopped; late copies of a frozen worker have keys of ids that are never used again.
func (l *leader) rollBack(ctx context.Context, job *Job) error {
	// The table may lack the last assignments. No assignment follows them.
	if _, err := l.table.workerFollower.Sync(ctx); err != nil {
		return err
	}
	if l.table.hasAssignments(job.ID) {
		return errChanged
	}
	foreign, err := l.removeObjects(ctx, job)
	if err != nil {
		return err
	}
	if err := l.removePins(ctx, job); err != nil {
		return err
	}
	for _, op := range l.deleteContentOps(job) {
		if err := l.write(ctx, "restore.content", job, nil, []meta.Op{op}); err != nil {
			return err
		}
	}
	next := *job
	next.State, next.EndTime = job.Outcome, l.o.Clock.Display()
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	err = l.endJob(ctx, "restore.end", job, &next, op, nil, append(catalog.ReleaseRoots(job.Target, job.Roots),
		meta.Delete(keys.Collection(job.Target)), meta.Delete(keys.CollectionName(job.DB, job.Name)),
	))
	if err == nil {
		l.log.Info("restore rolled back", zap.Int64("job", job.ID), zap.Stringer("state", next.State),
			zap.String("reason", job.Reason), zap.Int64("foreign_objects_left", foreign))
	}
	return err
}

// deleteContentOps returns the deletes of the target's keys, each small enough for one
// transaction.
func (l *leader) deleteContentOps(job *Job) []meta.Op {
	var ops []meta.Op
	for first := job.FirstSegment; first < job.FirstSegment+job.Segments; first += deleteSpan {
		last := min(first+deleteSpan, job.FirstSegment+job.Segments) - 1
		ops = append(ops, meta.DeleteRange(keys.Span(keys.SegmentPrefix(job.Target), first, last)),
			meta.DeleteRange(keys.OwnerSegments(first, last)))
	}
	for first := job.FirstBuild; first < job.FirstBuild+job.Builds; first += deleteSpan {
		last := min(first+deleteSpan, job.FirstBuild+job.Builds) - 1
		ops = append(ops, meta.DeleteRange(keys.OwnerBuilds(first, last)))
	}
	return append(ops, catalog.ContentRanges(job.Target)...)
}

// forget removes an ended job: its late copies, its pins, and then its record.
func (l *leader) forget(ctx context.Context, job *Job) error {
	// A store may have executed a copy long after its request.
	if err := l.cleanupStragglers(ctx, job); err != nil {
		return err
	}
	if err := l.removePins(ctx, job); err != nil {
		return err
	}
	if job.State != Completed { // in a target in use, each id ends with its last record
		err := l.o.Catalog.GoneRange(ctx, job.FirstSegment, job.Segments+job.Builds,
			func(conds []meta.Cond, ops []meta.Op) error { return l.write(ctx, "restore.forget", job, conds, ops) })
		if err != nil {
			return err
		}
	}
	// The job's record reserved its ids until now, so that a late copy could not
	// replace a file of another collection.
	return l.write(ctx, "restore.forget", job, nil, append(
		catalog.ReleaseRange(job.FirstSegment, job.Segments+job.Builds), meta.Delete(keys.Job(job.ID))))
}
