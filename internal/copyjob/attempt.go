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
	task       *task
	progress   *progress // nil before it has begun to copy
}

// run works on the task until it is done or has failed, says so, and gives the
// assignment back. When that cannot be said it returns an error, which ends the
// worker: its lease ends the assignment, which nobody would look at any more.
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
		_ = meta.Pause(ctx, pauseStep(maxPauseStep)) // what cannot be read now is asked for again, but not at once
	}
	// The context may be over: the job was given up, or the replica stops.
	reportCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	for try := 0; ; try++ {
		done, reportErr := a.release(reportCtx, ctx.Err() != nil, err)
		if done {
			return nil
		}
		log.Warn("an assignment is not given back yet", zap.Error(reportErr))
		if meta.Pause(reportCtx, pauseStep(try+1)) != nil {
			return fmt.Errorf("give task %d of job %d back: %w", a.number, a.jobID, reportErr)
		}
	}
}

// read reads the job and the task, which must be this attempt's.
func (a *attempt) read(ctx context.Context) error {
	res, err := a.worker.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Get(keys.Job(a.jobID)), meta.Get(keys.Task(a.jobID, a.number)),
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
	if a.job.State != Executing || a.job.Phase != Copy || a.task.state != TaskRunning || a.task.attempt != a.attempt {
		return errChanged
	}
	return nil
}

// giveBack ends the assignment. A task that failed goes back with why, one that
// was interrupted is left for another attempt.
func (a *attempt) release(ctx context.Context, interrupted bool, cause error) (bool, error) {
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
		return true, nil // gone, by us or before
	}
	// The job has moved on: all that is left to do is to let go.
	return a.release(ctx, true, cause)
}

// register writes the target's segments and completes the task. All transactions
// compare the job and the very assignment; the last one is all that counts, for a
// RESTORING collection shows its segments to nobody.
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

// maxPause is the try from which on the pause, of more than a second, is always
// the same.
const maxPauseStep = 6

// patience is the attempt that try is to [meta.Pause]: the first has to wait 40 ms,
// each that follows twice as long.
func pauseStep(try int) int { return 10 << min(try, maxPauseStep) }
