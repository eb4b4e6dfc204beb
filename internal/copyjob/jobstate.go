package copyjob

import (
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// row is a job with its tasks.
type jobState struct {
	job        *Job // nil while only parts of it were seen
	tasks      map[int64]*task
	unfinished map[int64]*task          // those that are not done
	progress   map[int64]segment.Totals // files and bytes of tasks that are not done
	limits     Limits
	done       segment.Totals // sums of the tasks that are done
	reported   segment.Totals // the most that was ever told
	lastErr    string
	lastFinish time.Time // when an attempt last finished a file that none had before
	samples    []sample
}

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

// setRunning notes how far a task has come. Another attempt begins with what it
// finds, so that nothing goes down.
func (js *jobState) setProgress(number int64, n segment.Totals) {
	if t := js.tasks[number]; t != nil && t.state == TaskDone {
		return
	}
	if n.Bytes >= js.progress[number].Bytes {
		js.progress[number] = n
	}
}

// stall returns since when the job has waited for a store that does not answer, and
// how long: up to the last attempt that got none. The time is zero while no task
// waits.
func (js *jobState) stall() (since time.Time, d time.Duration) {
	for _, t := range js.unfinished {
		if t.waits == 0 || t.refusals > 0 { // a refusal is an answer
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

// refusedSince returns since when a store has refused tasks of the job; zero: it
// refuses none.
func (js *jobState) refusedSince() (since time.Time) {
	for _, t := range js.unfinished {
		if t.refusals > 0 && (since.IsZero() || t.refuseSince.Before(since)) {
			since = t.refuseSince
		}
	}
	return since
}

func latest(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}
