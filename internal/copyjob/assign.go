package copyjob

import (
	"context"
	"errors"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// assign assigns tasks to workers while there are slots, and returns the remaining slots.
func (l *leader) assign(ctx context.Context, d decision, slots []slot) ([]slot, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	assigned := l.assignedRevisions[d.job.ID]
	tasks := slices.DeleteFunc(d.tasks, func(t *task) bool { return assigned[t.number] == t.revision })
	for len(tasks) > 0 && len(slots) > 0 {
		w := &slots[0]
		even := (len(tasks) + len(slots) - 1) / len(slots)
		n := min(even, w.free, assignBatch)
		if err := l.assignTo(ctx, d.job, tasks[:n], w); err != nil {
			if errors.Is(err, errChanged) { // the table lags, or the worker is gone
				return slots[1:], nil
			}
			return slots, err
		}
		tasks = tasks[n:]
		if w.free -= n; w.free == 0 {
			slots = slots[1:]
		} else { // rotate, to spread tasks over the workers
			slots = append(slots[1:], *w)
		}
	}
	return slots, nil
}

// assignTo assigns tasks to one worker in one transaction.
func (l *leader) assignTo(ctx context.Context, job *Job, tasks []*task, w *slot) error {
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	conds := []meta.Cond{meta.SameKey(keys.Worker(w.id), w.create)}
	var ops []meta.Op
	for _, t := range tasks {
		next := *t
		next.state, next.attempt, next.worker = TaskRunning, t.attempt+1, w.id
		conds = append(conds, meta.Unchanged(t.key(), t.revision))
		if t.state == TaskRunning && t.worker != w.id {
			conds = append(conds, meta.Absent(keys.Assignment(t.worker, t.job, t.number)))
		}
		key := keys.Assignment(w.id, t.job, t.number)
		conds = append(conds, meta.Absent(key))
		rec := record.Encode(&storagev1.Assignment{Format: record.Format, Attempt: next.attempt})
		ops = append(ops, meta.Put(t.key(), next.encode(op)), meta.PutLeased(key, rec, w.lease))
	}
	err = l.write(ctx, "restore.assign", job, conds, ops)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		return errChanged
	}
	if err == nil {
		if l.assignedRevisions[job.ID] == nil {
			l.assignedRevisions[job.ID] = map[int64]int64{}
		}
		for _, t := range tasks {
			l.assignedRevisions[job.ID][t.number] = t.revision
		}
	}
	return err
}
