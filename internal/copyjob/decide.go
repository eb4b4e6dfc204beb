package copyjob

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// step is the next action of the leader for a job.
type step int

// The steps.
const (
	stepNone     step = iota
	stepBegin         // PENDING -> EXECUTING
	stepPrepare       // make partitions, indexes, checkpoints and tasks
	stepAssign        // assign tasks to workers
	stepGiveUp        // -> roll back
	stepPublish       // -> COMPLETED
	stepRollBack      // remove everything, then -> FAILED or CANCELED
	stepForget        // remove the record
)

// decision is a step with its arguments.
type decision struct {
	step    step
	job     *Job
	tasks   []*task        // to assign, ascending
	outcome State          // of stepGiveUp
	reason  string         // of stepGiveUp
	message string         // of stepGiveUp
	done    segment.Totals // progress
	retries int64
}

// reasonStalled is the reason of a job that waited too long for a store.
const reasonStalled = "STALLED"

// maxTaskAttempts bounds the attempts of a task, without those that got no answer. The
// death of a worker is no failure of the task unless it repeats this often.
const maxTaskAttempts = 200

// moment is the time of a decision.
type moment struct {
	// now is compared with deadlines; zero: the clock is not trusted, and no deadline
	// is over.
	now     time.Time
	elapsed time.Duration
}

// untrustedWait is the interval between checks of deadlines while the clock is not
// trusted.
const untrustedWait = 5 * time.Second

// decide returns the next step of each job, by descending priority and then by age, and
// the time until the next step if nothing changes. It depends on the table and the time
// alone.
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
		if at.now.IsZero() { // checked again soon
			return after(untrustedWait)
		}
		return after(t.Sub(at.now))
	}
	for _, js := range jt.states {
		if js.job == nil {
			continue
		}
		ready := func(t *task) bool { return after(t.pause() - (at.elapsed - t.seen)) }
		if d := jt.decideJob(js, until, ready); d.step != stepNone {
			list = append(list, d)
		}
	}
	slices.SortFunc(list, func(x, y decision) int {
		return cmp.Or(cmp.Compare(y.job.Priority, x.job.Priority), cmp.Compare(x.job.ID, y.job.ID))
	})
	return list, next
}

// decideJob decides for one job. until reports whether a time is over, and ready whether
// the pause of a task is over.
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
		if !jt.hasAssignmentsLocked(job.ID) { // all workers have stopped
			d.step = stepRollBack
		}
		return d
	case !job.Deadline.IsZero() && until(job.Deadline):
		return giveUp("TIMEOUT", "the job did not end before its deadline, %s", job.Deadline.Format(time.RFC3339))
	case job.State == Pending:
		d.step = stepBegin
		return d
	case job.Phase == Prepare:
		d.step = stepPrepare
		return d
	case job.State != Executing || job.Phase != Copy: // state of a newer release
		return d
	}
	if since, d := js.stall(); d >= jt.o.StallTimeout {
		return giveUp(reasonStalled, "no file was finished for %v since %s, because a store does not answer: %s",
			d.Round(time.Second), since.Format(time.RFC3339), js.lastErr)
	}
	for _, t := range js.unfinished {
		switch {
		case t.state == TaskFailed:
			return giveUp(t.reason, "%s", t.message)
		case t.attempt-t.unanswered >= maxTaskAttempts:
			return giveUp("TOO_MANY_FAILURES", "%d attempts, of which %d failed with an error; workers may have crashed",
				t.attempt-t.unanswered, t.failures)
		case int(t.failures) >= jt.o.MaxFailures:
			return giveUp("TOO_MANY_FAILURES", "%d failures, the last one: %s", t.failures, t.message)
		case t.state == TaskPending && ready(t),
			t.state == TaskRunning && !jt.isAssigned(t):
			d.tasks = append(d.tasks, t)
		}
	}
	switch {
	case int64(len(js.tasks)) == job.Tasks && len(js.unfinished) == 0:
		got, want := js.done, job.Totals
		if got.Segments != want.Segments || got.Files != want.Files || got.Bytes != want.Bytes {
			return giveUp("INTERNAL", "restored %d segments, %d files and %d bytes, want %d, %d and %d",
				got.Segments, got.Files, got.Bytes, want.Segments, want.Files, want.Bytes)
		}
		d.step, d.done, d.retries = stepPublish, js.done, jt.status(js).Retries
	case len(d.tasks) > 0:
		d.step = stepAssign
		slices.SortFunc(d.tasks, func(x, y *task) int { return cmp.Compare(x.number, y.number) })
	}
	return d
}
