package copyjob

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// attempt is one run of a task.
type attempt struct {
	worker     *worker
	jobID      int64
	number     int64
	attempt    uint32
	assignment meta.Cond
	key        string
	job        *Job
	limits     Limits // as read with the job
	task       *task
	progress   *progress // nil until the copies start
}

// run executes the task until it is done or has failed, records the result, and releases
// the assignment. When the result cannot be recorded it returns an error, which ends the
// worker: its lease ends the assignment too, so that the task is assigned again.
func (a *attempt) run(ctx context.Context) error {
	err := a.read(ctx)
	if err == nil {
		err = a.copy(ctx)
	}
	if err == nil {
		return nil
	}
	w := a.worker
	log := w.o.Log.With(zap.Int64("job", a.jobID), zap.Int64("task", a.number), zap.Uint32("attempt", a.attempt))
	if ctx.Err() == nil && !errors.Is(err, errChanged) {
		w.logFailure(log, a.jobID, err)
	}
	if a.task == nil && !errors.Is(err, errChanged) {
		_ = meta.Pause(ctx, pauseStep(maxPauseStep)) // so that the task is not assigned again at once
	}
	// ctx may be over: the job was given up, or the replica stops.
	reportCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	for try := 0; ; try++ {
		done, reportErr := a.release(reportCtx, ctx.Err() != nil, err)
		if done {
			return nil
		}
		log.Warn("release of assignment failed, retrying", zap.Error(reportErr))
		if meta.Pause(reportCtx, pauseStep(try+1)) != nil {
			return fmt.Errorf("release task %d of job %d: %w", a.number, a.jobID, reportErr)
		}
	}
}

// read reads the job, its limits and the task. It returns errChanged unless this attempt
// still owns the task.
func (a *attempt) read(ctx context.Context) error {
	res, err := a.worker.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Get(keys.Job(a.jobID)), meta.Get(keys.Task(a.jobID, a.number)), meta.Get(keys.JobLimits(a.jobID)),
	}})
	if err != nil {
		return err
	}
	if len(res.Ranges[0]) == 0 || len(res.Ranges[1]) == 0 {
		return errChanged
	}
	if a.job, err = DecodeJob(res.Ranges[0][0]); err != nil {
		return err
	}
	if a.task, err = decodeTask(res.Ranges[1][0]); err != nil {
		return err
	}
	for _, kv := range res.Ranges[2] {
		if a.limits, err = decodeLimits(kv); err != nil {
			return err
		}
	}
	if a.job.State != Executing || a.job.Phase != Copy || a.task.state != TaskRunning || a.task.attempt != a.attempt {
		return errChanged
	}
	return nil
}

// release deletes the assignment. A failed task is written back with its error; an
// interrupted one keeps its record for another attempt. done is true once the assignment
// is gone.
func (a *attempt) release(ctx context.Context, interrupted bool, cause error) (done bool, err error) {
	txn := meta.Txn{Name: "restore.giveback", If: []meta.Cond{a.assignment}, Then: []meta.Op{meta.Delete(a.key)}}
	if !interrupted && a.task != nil && !errors.Is(cause, errChanged) {
		op, err := record.NewOp(a.worker.o.Rand)
		if err != nil {
			return false, err
		}
		next := a.task.afterAttempt(cause, a.progress, a.worker.o.Clock.Display(), a.worker.o)
		txn.If = append(txn.If, a.job.unchanged(), meta.Unchanged(a.task.key(), a.task.revision))
		txn.Then = append(txn.Then, meta.Put(a.task.key(), next.encode(op)))
	}
	res, err := a.worker.o.KV.Txn(ctx, txn)
	if err != nil {
		return false, err
	}
	if res.Succeeded || len(txn.If) == 1 {
		return true, nil // deleted, by this call or before it
	}
	// The job or the task has changed: only the assignment is deleted.
	return a.release(ctx, true, cause)
}

// register writes the target's segments and completes the task. All transactions compare
// the job and the assignment. The last one decides: the segments of a RESTORING collection
// are not visible.
func (a *attempt) register(ctx context.Context, result *taskResult) error {
	op, err := record.NewOp(a.worker.o.Rand)
	if err != nil {
		return err
	}
	var ops []meta.Op
	for i := range result.segments {
		puts, err := catalog.SegmentOps(a.job.Target, &result.segments[i], op)
		if err != nil {
			return err
		}
		ops = append(ops, puts...)
	}
	next := *a.task
	next.state, next.totals, next.reason, next.message = TaskDone, result.totals, "", ""
	next.waits, next.finished, next.finishTime = 0, result.totals.Files, a.worker.o.Clock.Display()
	next.refusals, next.refuseSince = 0, time.Time{}
	last := []meta.Op{
		meta.Put(a.task.key(), next.encode(op)), meta.Delete(a.key), meta.Delete(keys.Progress(a.jobID, a.number)),
	}
	parts := batches(ops)
	if len(parts) == 0 {
		parts = [][]meta.Op{nil}
	}
	for i, part := range parts {
		txn := meta.Txn{Name: "restore.register", If: []meta.Cond{a.job.unchanged(), a.assignment}, Then: part}
		if i == len(parts)-1 {
			txn.Name = "restore.done"
			txn.If = append(txn.If, meta.Unchanged(a.task.key(), a.task.revision))
			txn.Then = append(txn.Then, last...)
		}
		res, err := a.worker.o.KV.Txn(ctx, txn)
		if err != nil {
			return err
		}
		if !res.Succeeded {
			return errChanged
		}
	}
	return nil
}

// maxPauseStep is the retry from which on the pause, of more than a second, stays the
// same.
const maxPauseStep = 6

// pauseStep returns the argument of [meta.Pause] for a retry: 40 ms for the first, then
// twice as long each time.
func pauseStep(try int) int { return 10 << min(try, maxPauseStep) }
