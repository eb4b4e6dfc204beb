package copyjob

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// jobState is a job with its tasks.
type jobState struct {
	job        *Job // nil until its record is seen
	tasks      map[int64]*task
	unfinished map[int64]*task          // tasks that are not done
	progress   map[int64]segment.Totals // files and bytes of unfinished tasks
	limits     Limits
	done       segment.Totals // sums of the done tasks
	reported   segment.Totals // highest totals ever reported
	lastErr    string
	lastFinish time.Time // when an attempt last finished a file that no attempt had finished
	samples    []sample
}

// setTask replaces the record of a task.
func (js *jobState) setTask(t *task) {
	if old := js.tasks[t.number]; old != nil && old.state == TaskDone {
		js.done = subtractTotals(js.done, old.totals)
	}
	js.tasks[t.number], js.unfinished[t.number] = t, t
	js.lastFinish = latest(js.lastFinish, t.finishTime)
	if t.state == TaskDone {
		js.done = addTotals(js.done, t.totals)
		delete(js.progress, t.number)
		delete(js.unfinished, t.number)
	}
	if t.message != "" {
		js.lastErr = t.message
	}
}

// setProgress records the progress of a task. A lower value is dropped: the next attempt
// counts again from the objects that exist.
func (js *jobState) setProgress(number int64, n segment.Totals) {
	if t := js.tasks[number]; t != nil && t.state == TaskDone {
		return
	}
	if n.Bytes >= js.progress[number].Bytes {
		js.progress[number] = n
	}
}

// stall returns when the job began to wait for a store that does not answer, and for how
// long it has waited, up to its last unanswered attempt. since is zero while no task
// waits.
func (js *jobState) stall() (since time.Time, d time.Duration) {
	for _, t := range js.unfinished {
		if t.waits == 0 || t.refusals > 0 { // a refusal counts as an answer
			continue
		}
		from := latest(t.waitSince, js.lastFinish)
		if since.IsZero() || from.Before(since) {
			since = from
		}
		d = max(d, t.waitTime.Sub(from))
	}
	return since, d
}

// refusedSince returns when a store began to refuse tasks of the job; zero: it refuses
// none.
func (js *jobState) refusedSince() (since time.Time) {
	for _, t := range js.unfinished {
		if t.refusals > 0 && (since.IsZero() || t.refuseSince.Before(since)) {
			since = t.refuseSince
		}
	}
	return since
}

// latest returns the later of two times.
func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
