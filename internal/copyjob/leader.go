package copyjob

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// How the leader works.
const (
	stepsInFlight = 16              // jobs that are worked on at once
	batchOps      = 100             // of one transaction
	batchBytes    = 768 << 10       // of one transaction
	assignBatch   = 20              // tasks in one transaction
	writeTimeout  = 5 * time.Second // of a transaction that the loop waits for
	deleteSpan    = 5000            // segments' records in one transaction
)

// leader moves jobs on. Its loop never waits for an object store: what may take
// long is done beside it, one step of a job at a time.
type leader struct {
	*Jobs
	fence meta.Cond

	assignProblem     *lasting.Problem
	wake              chan struct{} // size one; a step has ended
	steps             errgroup.Group
	assignedRevisions map[int64]map[int64]int64 // by job and task: the revision of one that was assigned; the loop's alone

	mu              sync.Mutex
	busy            map[int64]bool          // jobs with a step under way
	handledRevision map[int64]int64         // the revision of a job that was moved on
	attempts        map[int64]int           // failed steps of a job in a row
	failures        map[int64]int           // those of them that no store was to blame for
	retryAt         map[int64]time.Duration // elapsed when the next of them may be tried
	unansweredSince map[int64]time.Duration // elapsed since a store has not answered a step of a job
	refusedSince    map[int64]time.Duration // elapsed since a store has refused a step of a job
}

func newLeader(j *Jobs, term election.Term) *leader {
	l := &leader{Jobs: j, fence: term.Fence(), wake: make(chan struct{}, 1)}
	l.busy, l.handledRevision, l.assignedRevisions = map[int64]bool{}, map[int64]int64{}, map[int64]map[int64]int64{}
	l.attempts, l.failures = map[int64]int{}, map[int64]int{}
	l.retryAt, l.unansweredSince = map[int64]time.Duration{}, map[int64]time.Duration{}
	l.refusedSince = map[int64]time.Duration{}
	l.assignProblem = lasting.New(j.o.Now).Add(j.o.Log, "assign", "tasks of a restore are not assigned yet", "")
	l.steps.SetLimit(stepsInFlight)
	return l
}

func (l *leader) run(ctx context.Context) error {
	defer func() { _ = l.steps.Wait() }() // steps return nothing
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

// pass looks at every job once, and returns how long there is nothing more to do
// unless something changes.
func (l *leader) pass(ctx context.Context) time.Duration {
	now := l.o.Clock.Elapsed()
	judged, _ := l.o.Clock.Peek()
	list, next := l.table.decide(moment{judged, now})
	slots := l.table.slots()
	for _, d := range list {
		if wait := l.nextAttempt(d.job, now); wait > 0 {
			next = min(next, wait)
			continue
		} else if wait < 0 {
			continue // under way, or done and not seen yet
		}
		if d.step == stepAssign {
			var err error
			if slots, err = l.assign(ctx, d, slots); err != nil && ctx.Err() == nil {
				next = min(next, time.Second)
			}
			if ctx.Err() == nil {
				l.assignProblem.Note(err, zap.Int64("job", d.job.ID))
			}
			continue
		}
		delete(l.assignedRevisions, d.job.ID) // no task is assigned any more, or not yet
		if !l.tryStart(d.job.ID) {
			continue
		}
		d = l.abortIfExhausted(d, now)
		started := l.steps.TryGo(func() error {
			err := l.execute(ctx, d)
			l.finishStep(ctx, d, err)
			return nil
		})
		if !started { // too many at once: one of them wakes us
			l.mu.Lock()
			delete(l.busy, d.job.ID)
			l.mu.Unlock()
		}
	}
	return next
}

// maxWrong is how often a step that goes wrong in itself is tried. When a store does
// not answer, prepare waits for as long as copies do; publishing waits for ever, for
// all the work is done.
const maxStepFailures = 20

// isLast says whether the job is given up if its step ends with err this time.
func (l *leader) isLastAttempt(job int64, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if isRefused(err) {
		since, again := l.refusedSince[job]
		return again && l.o.Clock.Elapsed()-since >= l.o.RefusalTimeout
	}
	return l.failures[job]+1 >= maxStepFailures
}

// orGiveUp is d, or that the job is given up when the step went wrong too often, or
// waited for too long.
func (l *leader) abortIfExhausted(d decision, now time.Duration) decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	since, waits := l.unansweredSince[d.job.ID]
	next := decision{
		step: stepGiveUp, job: d.job, outcome: Failed, message: l.table.lastError(d.job.ID), done: d.done, retries: d.retries,
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

// mayAct says how long to wait before a job may be acted on; below zero it is for
// something to change.
func (l *leader) nextAttempt(job *Job, now time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[job.ID] || l.handledRevision[job.ID] == job.Revision {
		return -1
	}
	return max(0, l.retryAt[job.ID]-now)
}

func (l *leader) tryStart(job int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[job] {
		return false
	}
	l.busy[job] = true
	return true
}

// errChanged means that what a transaction compared was not as it was read: the
// board will show what is now.
var errChanged = errors.New("changed")

// ended notes how a step ended.
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
			if refusedAgain { // the log has the first refusal, and the job's status the last
				level = zap.DebugLevel
			}
			l.log.Log(level, "a step of a restore failed and is tried again", zap.Int64("job", d.job.ID),
				zap.Stringer("phase", d.job.Phase), zap.Error(err))
			l.table.setLastError(d.job.ID, err)
		}
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// act carries out one step of a job.
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
		l.log.Warn("restore is given up", zap.Int64("job", d.job.ID), zap.String("reason", d.reason), zap.String("message", d.message))
		return l.replace(ctx, "restore.giveup", d.job, abortedJob(d, l.o.Clock.Display()))
	case stepPublish:
		return l.publish(ctx, d)
	case stepRollBack:
		return l.rollBack(ctx, d.job)
	case stepForget:
		// A store may have carried a copy out long after it was asked.
		if err := l.cleanupStragglers(ctx, d.job); err != nil {
			return err
		}
		if err := l.removePins(ctx, d.job); err != nil {
			return err
		}
		if d.job.State != Completed { // of a target that is in use each id goes with its last record
			if err := l.o.Catalog.GoneRange(ctx, d.job.FirstSegment, d.job.Segments+d.job.Builds, func(conds []meta.Cond, ops []meta.Op) error {
				return l.write(ctx, "restore.forget", d.job, conds, ops)
			}); err != nil {
				return err
			}
		}
		// Until now the ids of the job were kept from everybody else: a late copy could
		// have met what they had made of them.
		return l.write(ctx, "restore.forget", d.job, nil, append(
			catalog.ReleaseRange(d.job.FirstSegment, d.job.Segments+d.job.Builds), meta.Delete(keys.Job(d.job.ID))))
	case stepNone, stepAssign: // neither comes here
	}
	return nil
}

// givenUp is the job as giving it up leaves it.
func abortedJob(d decision, now time.Time) *Job {
	next := *d.job
	if next.StartTime.IsZero() {
		next.StartTime = now
	}
	next.State, next.Phase, next.Outcome = Executing, RollBack, d.outcome
	next.Reason, next.Message, next.Done, next.Retries = d.reason, record.Clip(d.message, record.MaxText), d.done, d.retries
	return &next
}

// write changes a job in one transaction, named step, which compares the job as it
// was read and that we lead.
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

// move replaces the job's record in a transaction named step.
func (l *leader) replace(ctx context.Context, step string, job, next *Job) error {
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	return l.write(ctx, step, job, nil, []meta.Op{meta.Put(keys.Job(job.ID), next.Encode(op))})
}

// batches cuts ops into parts for one transaction each.
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
