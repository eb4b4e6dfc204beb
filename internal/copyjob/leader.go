package copyjob

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// Limits of the leader.
const (
	stepsInFlight = 16              // concurrent steps, one per job
	batchOps      = 100             // operations per transaction
	batchBytes    = 768 << 10       // bytes per transaction
	assignBatch   = 20              // tasks assigned per transaction
	writeTimeout  = 5 * time.Second // of a transaction inside the loop
	deleteSpan    = 5000            // segment records deleted per transaction
)

// leader advances jobs. Its loop never waits for an object store: long steps run beside
// it, one step of a job at a time.
type leader struct {
	*Jobs
	fence meta.Cond

	wake              chan struct{} // size one; woken at the end of a step
	steps             errgroup.Group
	assignedRevisions map[int64]map[int64]int64 // by job and task: revision before assignment; the loop's alone

	mu sync.Mutex
	// All by job; times are elapsed times.
	busy            map[int64]bool          // a step is running
	handledRevision map[int64]int64         // revision whose step has succeeded
	attempts        map[int64]int           // consecutive failed steps
	failures        map[int64]int           // consecutive failed steps that no store caused
	retryAt         map[int64]time.Duration // earliest time of the next step
	unansweredSince map[int64]time.Duration // first step that a store did not answer
	refusedSince    map[int64]time.Duration // first step that a store refused
}

func newLeader(j *Jobs, term election.Term) *leader {
	l := &leader{Jobs: j, fence: term.Fence(), wake: make(chan struct{}, 1)}
	l.busy, l.handledRevision, l.assignedRevisions = map[int64]bool{}, map[int64]int64{}, map[int64]map[int64]int64{}
	l.attempts, l.failures = map[int64]int{}, map[int64]int{}
	l.retryAt, l.unansweredSince = map[int64]time.Duration{}, map[int64]time.Duration{}
	l.refusedSince = map[int64]time.Duration{}
	l.steps.SetLimit(stepsInFlight)
	return l
}

func (l *leader) run(ctx context.Context) error {
	defer func() { _ = l.steps.Wait() }() // steps return nothing
	defer l.assigning.Passed()            // the next leader assigns
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-l.wake:
		case <-l.table.wake:
		}
		timer.Reset(l.pass(ctx))
	}
}

// pass starts the next step of every job, and returns the time until the next pass if
// nothing changes.
func (l *leader) pass(ctx context.Context) time.Duration {
	now := l.o.Clock.Elapsed()
	trusted, _ := l.o.Clock.Peek()
	list, next := l.table.decide(moment{trusted, now})
	slots := l.table.slots()
	var errs []error // of assignments
	for _, d := range list {
		if wait := l.nextAttempt(d.job, now); wait > 0 {
			next = min(next, wait)
			continue
		} else if wait < 0 {
			continue // running, or done and not in the table yet
		}
		if d.step == stepAssign {
			var err error
			if slots, err = l.assign(ctx, d, slots); err != nil {
				next = min(next, time.Second)
				errs = append(errs, fmt.Errorf("job %d: %w", d.job.ID, err))
			}
			continue
		}
		delete(l.assignedRevisions, d.job.ID) // not in phase copy
		l.mu.Lock()
		l.busy[d.job.ID] = true
		l.mu.Unlock()
		d = l.abortIfExhausted(d, now)
		started := l.steps.TryGo(func() error {
			err := l.execute(ctx, d)
			l.finishStep(ctx, d, err)
			return nil
		})
		if !started { // limit reached: the end of another step wakes the loop
			l.mu.Lock()
			delete(l.busy, d.job.ID)
			l.mu.Unlock()
		}
	}
	if ctx.Err() == nil {
		l.assigning.Note(errors.Join(errs...))
	}
	return next
}

// maxStepFailures bounds the consecutive failures of prepare and publish that no store
// caused. When a store does not answer, prepare waits as long as copies do; publish waits
// without a limit, since all the work is done.
const maxStepFailures = 20

// isLastAttempt reports whether err gives the job up if its step ends with it now.
func (l *leader) isLastAttempt(job int64, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if isRefused(err) {
		since, repeated := l.refusedSince[job]
		return repeated && l.o.Clock.Elapsed()-since >= l.o.RefusalTimeout
	}
	return l.failures[job]+1 >= maxStepFailures
}

// abortIfExhausted replaces d by stepGiveUp when its step failed too often or waited too
// long.
func (l *leader) abortIfExhausted(d decision, now time.Duration) decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	since, waits := l.unansweredSince[d.job.ID]
	next := decision{
		step: stepGiveUp, job: d.job, outcome: Failed, message: l.table.lastError(d.job.ID),
		done: d.done, retries: d.retries,
	}
	switch {
	case l.failures[d.job.ID] >= maxStepFailures && (d.step == stepPrepare || d.step == stepPublish):
		next.reason = "INTERNAL"
	case d.step == stepPrepare && waits && now-since >= l.o.StallTimeout:
		next.reason = reasonStalled
	default:
		return d
	}
	return next
}

// nextAttempt returns the wait before the next step of a job; negative: until something
// changes.
func (l *leader) nextAttempt(job *Job, now time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[job.ID] || l.handledRevision[job.ID] == job.Revision {
		return -1
	}
	return max(0, l.retryAt[job.ID]-now)
}

// errChanged means that a transaction's compare failed: the table will show the present
// state.
var errChanged = errors.New("changed")

// finishStep records the result of a step and wakes the loop.
func (l *leader) finishStep(ctx context.Context, d decision, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.busy, d.job.ID)
	switch {
	case err == nil:
		l.handledRevision[d.job.ID] = d.job.Revision
		delete(l.attempts, d.job.ID)
		delete(l.failures, d.job.ID)
		delete(l.retryAt, d.job.ID)
		delete(l.unansweredSince, d.job.ID)
		delete(l.refusedSince, d.job.ID)
		if d.step == stepForget {
			delete(l.handledRevision, d.job.ID)
		}
	case ctx.Err() != nil:
	case errors.Is(err, errTooRecent):
		l.retryAt[d.job.ID] = l.o.Clock.Elapsed() + stragglerGrace
	default:
		wait := 10 * time.Millisecond << min(l.attempts[d.job.ID], 10)
		l.attempts[d.job.ID]++
		l.retryAt[d.job.ID] = l.o.Clock.Elapsed() + wait
		_, refusedAgain := l.refusedSince[d.job.ID]
		if refusedAgain = refusedAgain && isRefused(err); !refusedAgain && !errors.Is(err, errChanged) {
			delete(l.refusedSince, d.job.ID)
		}
		switch {
		case errors.Is(err, errChanged):
		case isRefused(err):
			if !refusedAgain {
				l.refusedSince[d.job.ID] = l.o.Clock.Elapsed()
			}
			delete(l.unansweredSince, d.job.ID)
		case !isUnanswered(err):
			l.failures[d.job.ID]++
			delete(l.unansweredSince, d.job.ID)
		default:
			if _, waits := l.unansweredSince[d.job.ID]; !waits {
				l.unansweredSince[d.job.ID] = l.o.Clock.Elapsed()
			}
		}
		if !errors.Is(err, errChanged) {
			level := zap.WarnLevel
			if refusedAgain { // the first one is logged, the last one is in the job's status
				level = zap.DebugLevel
			}
			l.log.Log(level, "restore step failed, retrying", zap.Int64("job", d.job.ID),
				zap.Stringer("phase", d.job.Phase), zap.Error(err))
			l.table.setLastError(d.job.ID, err)
		}
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// execute runs one step of a job.
func (l *leader) execute(ctx context.Context, d decision) error {
	switch d.step {
	case stepBegin:
		next := *d.job
		next.State, next.Phase, next.StartTime = Executing, Prepare, l.o.Clock.Display()
		return l.replace(ctx, "restore.begin", d.job, &next)
	case stepPrepare:
		err := l.prepare(ctx, d.job)
		if reason, permanent := classify(err, l.isLastAttempt(d.job.ID, err)); permanent {
			d.outcome, d.reason, d.message = Failed, reason, err.Error()
			return l.replace(ctx, "restore.giveup", d.job, abortedJob(d, l.o.Clock.Display()))
		}
		return err
	case stepGiveUp:
		l.log.Warn("restore given up", zap.Int64("job", d.job.ID), zap.String("reason", d.reason),
			zap.String("message", d.message))
		return l.replace(ctx, "restore.giveup", d.job, abortedJob(d, l.o.Clock.Display()))
	case stepPublish:
		return l.publish(ctx, d)
	case stepRollBack:
		return l.rollBack(ctx, d.job)
	case stepForget:
		return l.forget(ctx, d.job)
	case stepNone, stepAssign: // handled by pass
	}
	return nil
}

// abortedJob returns the job's record in phase roll back.
func abortedJob(d decision, now time.Time) *Job {
	next := *d.job
	if next.StartTime.IsZero() {
		next.StartTime = now
	}
	next.State, next.Phase, next.Outcome = Executing, RollBack, d.outcome
	next.Reason, next.Message = d.reason, record.Clip(d.message, record.MaxText)
	next.Done, next.Retries = d.done, d.retries
	return &next
}

// write changes a job in one transaction, named step, which compares the job as read
// and the leader's election key. A failed compare is errChanged.
func (l *leader) write(ctx context.Context, step string, job *Job, conds []meta.Cond, ops []meta.Op) error {
	res, err := l.kv.Txn(ctx, meta.Txn{Name: step, If: append([]meta.Cond{job.unchanged(), l.fence}, conds...), Then: ops})
	if err == nil && !res.Succeeded {
		err = errChanged
	}
	if err != nil {
		return fmt.Errorf("job %s: %w", job, err)
	}
	return nil
}

// replace writes the job's record in a transaction named step.
func (l *leader) replace(ctx context.Context, step string, job, next *Job) error {
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	return l.write(ctx, step, job, nil, []meta.Op{meta.Put(keys.Job(job.ID), next.Encode(op))})
}

// batches splits ops into parts for one transaction each.
func batches(ops []meta.Op) [][]meta.Op {
	var parts [][]meta.Op
	from, bytes := 0, 0
	for i, op := range ops {
		n := len(op.From) + len(op.Value)
		if i > from && (i-from == batchOps || bytes+n > batchBytes) {
			parts, from, bytes = append(parts, ops[from:i:i]), i, 0
		}
		bytes += n
	}
	if from < len(ops) {
		parts = append(parts, ops[from:])
	}
	return parts
}
