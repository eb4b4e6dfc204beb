package copyjob

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// step is what the leader has to do for a job.
type step int

// The steps.
const (
	stepNone     step = iota
	stepBegin         // PENDING -> EXECUTING
	stepPrepare       // make partitions, indexes, checkpoints and tasks
	stepAssign        // give tasks to workers
	stepGiveUp        // into roll back
	stepPublish       // into COMPLETED
	stepRollBack      // remove all, then end
	stepForget        // remove the record
)

// decision is a step with what it needs.
type decision struct {
	step    step
	job     *Job
	tasks   []*task        // to assign, the first ones first
	outcome State          // of giving up
	reason  string         // of giving up
	message string         // of giving up
	done    segment.Totals // how far it has come
	retries int64
}

// stalled is the reason of a job that waited for a store for too long.
const reasonStalled = "STALLED"

// maxTaskAttempts is how often a task may be begun, less the attempts that got no
// answer. That a worker dies is no
// failure of the task, unless it is always so.
const maxTaskAttempts = 200

// moment is the time of a decision.
type moment struct {
	// judged is the time that deadlines are judged by; zero: the clock is not
	// trusted, and no deadline has come.
	now     time.Time
	elapsed time.Duration
}

// untrustedWait is between two looks at deadlines while the clock is not trusted.
const untrustedWait = 5 * time.Second

// decide looks at all jobs and says what is to be done, the jobs of the highest
// priority first, then the oldest, and how long there is nothing more unless
// something changes. It is a function of the board and the time.
func (jt *jobTable) decide(at moment) (list []decision, next time.Duration) {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	next = jt.o.Resync
	after := func(left time.Duration) bool {
		if left > 0 {
			next = min(next, left)
		}
		return left <= 0
	}
	until := func(t time.Time) bool {
		if at.now.IsZero() { // looked at again soon
			return after(untrustedWait)
		}
		return after(t.Sub(at.now))
	}
	for _, js := range jt.states {
		if js.job == nil {
			continue
		}
		if d := jt.decideJob(js, until, func(t *task) bool { return after(t.pause() - (at.elapsed - t.seen)) }); d.step != stepNone {
			list = append(list, d)
		}
	}
	slices.SortFunc(list, func(x, y decision) int {
		return cmp.Or(cmp.Compare(y.job.Priority, x.job.Priority), cmp.Compare(x.job.ID, y.job.ID))
	})
	return list, next
}

// decideJob decides for one job. until says whether a time has come, and ready
// whether a task that failed may be tried again.
func (jt *jobTable) decideJob(js *jobState, until func(time.Time) bool, ready func(*task) bool) decision {
	job := js.job
	d := decision{job: job}
	giveUp := func(reason, format string, args ...any) decision {
		d.step, d.outcome, d.reason, d.message = stepGiveUp, Failed, reason, fmt.Sprintf(format, args...)
		s := jt.status(js)
		d.done, d.retries = s.Done, s.Retries
		return d
	}
	switch {
	case job.State.Ended():
		if until(job.EndTime.Add(jt.o.Keep)) {
			d.step = stepForget
		}
		return d
	case job.Phase == RollBack:
		if !jt.hasAssignmentsLocked(job.ID) { // the workers have stopped
			d.step = stepRollBack
		}
		return d
	case !job.Deadline.IsZero() && until(job.Deadline):
		return giveUp("TIMEOUT", "the job had not ended by its deadline, %s", job.Deadline.Format(time.RFC3339))
	case job.State == Pending:
		d.step = stepBegin
		return d
	case job.Phase == Prepare:
		d.step = stepPrepare
		return d
	case job.State != Executing || job.Phase != Copy: // of a newer release
		return d
	}
	if since, d := js.stall(); d >= jt.o.StallTimeout {
		return giveUp(reasonStalled, "no file was finished for %v, from %s on, because a store does not answer: %s",
			d.Round(time.Second), since.Format(time.RFC3339), js.lastErr)
	}
	for _, t := range js.unfinished {
		switch {
		case t.state == TaskFailed:
			return giveUp(t.reason, "%s", t.message)
		case t.attempt-t.unanswered >= maxTaskAttempts:
			return giveUp("TOO_MANY_FAILURES", "gave up after %d attempts, of which %d said why they failed; its workers may have crashed",
				t.attempt-t.unanswered, t.failures)
		case int(t.failures) >= jt.o.MaxFailures:
			return giveUp("TOO_MANY_FAILURES", "gave up after %d failures, the last of which was: %s", t.failures, t.message)
		case t.state == TaskPending && ready(t),
			t.state == TaskRunning && !jt.isAssigned(t):
			d.tasks = append(d.tasks, t)
		}
	}
	switch {
	case int64(len(js.tasks)) == job.Tasks && len(js.unfinished) == 0:
		if js.done.Segments != job.Totals.Segments || js.done.Files != job.Totals.Files || js.done.Bytes != job.Totals.Bytes {
			return giveUp("INTERNAL", "%d segments, %d files and %d bytes were restored, not %d, %d and %d",
				js.done.Segments, js.done.Files, js.done.Bytes, job.Totals.Segments, job.Totals.Files, job.Totals.Bytes)
		}
		d.step, d.done, d.retries = stepPublish, js.done, jt.status(js).Retries
	case len(d.tasks) > 0:
		d.step = stepAssign
		slices.SortFunc(d.tasks, func(x, y *task) int { return cmp.Compare(x.number, y.number) })
	}
	return d
}
