package copyjob

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// stragglerGrace is the least age, by the store's clock, at which a straggler is deleted.
// While a younger one exists, or an upload of the job that is too recent to be aborted, the
// job is not forgotten.
const stragglerGrace = time.Hour

// errTooRecent means that stragglers are too young to be deleted.
var errTooRecent = errors.New("late copies are too recent to be removed")

// cleanupStragglers deletes copies that arrived after the job's end. It returns
// errTooRecent when some of them have to wait.
func (l *leader) cleanupStragglers(ctx context.Context, job *Job) error {
	if job.State != Completed {
		_, err := l.removeObjects(ctx, job)
		return err
	}
	// Ages are by the stores' clocks, which may step with the host's.
	if _, trusted := l.o.Clock.Peek(); !trusted {
		return fmt.Errorf("job %s: the clock is not trusted: %w", job, errTooRecent)
	}
	var removed, recent atomic.Int64
	err := l.forEachPrefix(ctx, job, func(ctx context.Context, m *layout.Mapping, at targetPrefix) error {
		now, err := at.store.Now(ctx)
		if err != nil {
			return err
		}
		last, cutoff := job.EndTime.Add(endMargin), uploadCutoff(job.EndTime, now)
		if _, err := at.store.AbortUploads(ctx, at.prefix, cutoff); err != nil {
			return err
		}
		if cutoff.Before(last) { // an upload of the job may be too recent
			oldest, err := at.store.OldestUpload(ctx, at.prefix)
			if err != nil {
				return err
			}
			if !oldest.IsZero() && oldest.Before(last) {
				recent.Add(1)
			}
		}
		_, err = at.pages(ctx, m, func(page []copiedObject) error {
			stragglers, err := l.stragglers(ctx, job, page)
			if err != nil {
				return err
			}
			n := len(stragglers)
			stragglers = slices.DeleteFunc(stragglers, func(c copiedObject) bool {
				return now.Sub(c.info.ModTime) < stragglerGrace
			})
			recent.Add(int64(n - len(stragglers)))
			removed.Add(int64(len(stragglers)))
			return l.deleteObjects(ctx, at.store, stragglers)
		})
		return err
	})
	if err != nil {
		return err
	}
	if n := removed.Load(); n > 0 {
		l.log.Info("late copies of an ended restore removed", zap.Int64("job", job.ID), zap.Int64("objects", n))
	}
	if n := recent.Load(); n > 0 {
		return fmt.Errorf("job %s: %d: %w", job, n, errTooRecent)
	}
	return nil
}

// endMargin bounds how long after a job's end time an upload of its workers may start. The
// end time is a reading of the leader, which may be behind the clock of a store. A worker
// that was stopped may send a request that it signed before the end; S3 accepts signatures
// for 15 minutes.
const endMargin = 2*clock.Bound + 15*time.Minute

// uploadCutoff returns the start time before which an unfinished upload, of a job that was
// COMPLETED at end, is the job's; now is the store's time. An engine starts no upload
// there before the end. An upload that an engine starts within endMargin after the end
// counts as the job's if it is still open when the job is forgotten.
func uploadCutoff(end, now time.Time) time.Time {
	end, now = end.Add(endMargin), now.Add(-stragglerGrace)
	if end.Before(now) {
		return end
	}
	return now
}

// stragglers returns the listed objects that have no record. It reads the records after
// the listing.
func (l *leader) stragglers(ctx context.Context, job *Job, page []copiedObject) ([]copiedObject, error) {
	type unit struct{ segment, build int64 }
	late := map[unit]bool{}
	var order []unit
	for _, c := range page {
		u := unit{c.segment, c.build}
		if _, seen := late[u]; !seen {
			late[u] = false
			order = append(order, u)
		}
	}
	for part := range slices.Chunk(order, unitsPerRead) {
		var gets []meta.Op
		for _, u := range part {
			// The unit's id is the build's, or else the segment's.
			id := u.build
			if id == 0 {
				id = u.segment
			}
			gets = append(gets, meta.Get(keys.Segment(job.Target, u.segment)),
				meta.Get(keys.Unit(job.Target, u.segment)), meta.Get(keys.Tombstone(job.Target, u.segment)),
				meta.Get(keys.Unit(job.Target, id)), meta.Get(keys.Tombstone(job.Target, id)),
				meta.GetRange(meta.Prefix(keys.ReplacedPrefix(job.Target, u.segment))))
		}
		res, err := l.kv.Txn(
			ctx,
			meta.Txn{If: []meta.Cond{l.fence, job.unchanged(), meta.Absent(keys.RolledBack)}, Then: gets},
		)
		if err != nil {
			return nil, fmt.Errorf("read segments: %w", err)
		}
		if !res.Succeeded {
			return nil, errChanged
		}
		for i, u := range part {
			if late[u], err = isStraggler(job, u.build, res.Ranges[6*i:6*i+6]); err != nil {
				return nil, err
			}
		}
	}
	var list []copiedObject
	for _, c := range page {
		if late[unit{c.segment, c.build}] {
			list = append(list, c)
		}
	}
	return list, nil
}

// isStraggler decides whether the files of a segment, or of a build of it (0: none), have
// no record. found has the segment's record, the unit and tombstone of the segment and of
// the build, and the unit keys of parts of the segment.
func isStraggler(job *Job, build int64, found [][]meta.KeyValue) (bool, error) {
	for _, kvs := range found[1:] {
		if len(kvs) > 0 {
			return false, nil
		}
	}
	if len(found[0]) == 0 {
		return true, nil
	}
	if build == 0 {
		return false, nil
	}
	s, err := catalog.DecodeSegment(job.Target, found[0][0])
	if err != nil {
		return false, err
	}
	for i := range s.Builds {
		if s.Builds[i].ID == build {
			return false, nil
		}
	}
	for f := range s.AllFiles() { // files of the build outside of its list
		if segment.Carries(f.Path, build) {
			return false, nil
		}
	}
	return true, nil
}
