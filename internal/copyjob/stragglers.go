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

// lateGrace is how old, by the store's clock, a copy that came late must be to be
// removed. While one is younger, its job is not forgotten.
const stragglerGrace = time.Hour

// errYoung means that there are late copies that are too young.
var errTooRecent = errors.New("late copies are too young to be removed")

// sweepLate removes what was copied after the job had ended. It is errYoung when
// some of it has to wait.
func (l *leader) cleanupStragglers(ctx context.Context, job *Job) error {
	if job.State != Completed {
		_, err := l.removeObjects(ctx, job)
		return err
	}
	// Ages are by the stores' clocks, which may step with that of the host.
	if _, trusted := l.o.Clock.Peek(); !trusted {
		return fmt.Errorf("job %s: the clock is not trusted: %w", job, errTooRecent)
	}
	var removed, recent atomic.Int64
	err := l.forEachPrefix(ctx, job, func(ctx context.Context, m *layout.Mapping, at targetPrefix) error {
		now, err := at.store.Now(ctx)
		if err != nil {
			return err
		}
		if _, err := at.store.AbortUploads(ctx, at.prefix, uploadCutoff(job.EndTime, now)); err != nil {
			return err
		}
		_, err = at.pages(ctx, m, func(page []copiedObject) error {
			stragglers, err := l.stragglers(ctx, job, page)
			if err != nil {
				return err
			}
			n := len(stragglers)
			stragglers = slices.DeleteFunc(stragglers, func(c copiedObject) bool { return now.Sub(c.info.ModTime) < stragglerGrace })
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
		l.log.Info("copies were removed that came after the restore had ended", zap.Int64("job", job.ID), zap.Int64("objects", n))
	}
	if n := recent.Load(); n > 0 {
		return fmt.Errorf("job %s: %d: %w", job, n, errTooRecent)
	}
	return nil
}

// endMargin is how far the time that a job ended at, a reading of the leader's, may
// be behind the clock of a store.
const endMargin = 2 * clock.Bound

// lateUploads is before when, by the store's clock, which says now, the unfinished
// uploads of a job were begun that has COMPLETED at end: an engine begins none
// before that. The end may be behind the store's clock by endMargin; so one
// that an engine begins in the minutes after the end counts as the job's, if it is
// still open when the job is forgotten.
func uploadCutoff(end, now time.Time) time.Time {
	end, now = end.Add(endMargin), now.Add(-stragglerGrace)
	if end.Before(now) {
		return end
	}
	return now
}

// late returns those of the listed objects that nothing knows any more. It reads
// the records that tell, all after the listing.
func (l *leader) stragglers(ctx context.Context, job *Job, page []copiedObject) ([]copiedObject, error) {
	type unit struct{ segment, build int64 }
	dead := map[unit]bool{}
	var order []unit
	for _, c := range page {
		u := unit{c.segment, c.build}
		if _, seen := dead[u]; !seen {
			dead[u] = false
			order = append(order, u)
		}
	}
	for part := range slices.Chunk(order, unitsPerRead) {
		var gets []meta.Op
		for _, u := range part {
			// The id is the build's, or else the segment's: both are ids of units.
			id := u.build
			if id == 0 {
				id = u.segment
			}
			gets = append(gets, meta.Get(keys.Segment(job.Target, u.segment)), meta.Get(keys.Unit(job.Target, u.segment)),
				meta.Get(keys.Tomb(job.Target, u.segment)), meta.Get(keys.Unit(job.Target, id)), meta.Get(keys.Tomb(job.Target, id)),
				meta.GetRange(meta.Prefix(keys.ReplacedPrefix(job.Target, u.segment))))
		}
		res, err := l.kv.Txn(ctx, meta.Txn{If: []meta.Cond{l.fence, job.unchanged(), meta.Absent(keys.Behind)}, Then: gets})
		if err != nil {
			return nil, fmt.Errorf("read segments: %w", err)
		}
		if !res.Succeeded {
			return nil, errChanged
		}
		for i, u := range part {
			if dead[u], err = isStraggler(job, u.build, res.Ranges[6*i:6*i+6]); err != nil {
				return nil, err
			}
		}
	}
	var list []copiedObject
	for _, c := range page {
		if dead[unit{c.segment, c.build}] {
			list = append(list, c)
		}
	}
	return list, nil
}

// isLate decides on the files of a segment, or of a build of it (0: none), by its records:
// that of the segment, the unit and tombstone of the segment and of the build, and
// the keys of units that were parts of the segment.
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
	for f := range s.AllFiles() { // that it has in another way
		if segment.Carries(f.Path, build) {
			return false, nil
		}
	}
	return true, nil
}
