package copyjob

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
)

// TestOrGiveUp gives a job up when its step went wrong too often, and not before.
func TestOrGiveUp(t *testing.T) {
	done := segment.Totals{Files: 3}
	for name, c := range map[string]struct {
		step         step
		tries, wrong int
		reason       string // empty: it goes on
	}{
		"prepare, the first time":              {stepPrepare, 0, 0, ""},
		"prepare, no answer for long":          {stepPrepare, maxTries - 1, 0, ""},
		"prepare, no answer too often":         {stepPrepare, maxTries, 0, "TOO_MANY_FAILURES"},
		"prepare, wrong for long":              {stepPrepare, maxWrong - 1, maxWrong - 1, ""},
		"prepare, wrong too often":             {stepPrepare, maxWrong, maxWrong, "INTERNAL"},
		"prepare, both":                        {stepPrepare, maxTries, maxWrong, "INTERNAL"},
		"publish, no answer":                   {stepPublish, 10 * maxTries, 0, ""},
		"publish, wrong for long":              {stepPublish, maxWrong - 1, maxWrong - 1, ""},
		"publish, wrong too often":             {stepPublish, maxWrong, maxWrong, "INTERNAL"},
		"to begin is tried for ever":           {stepBegin, 10 * maxTries, 10 * maxWrong, ""},
		"so is giving up":                      {stepGiveUp, 10 * maxTries, 10 * maxWrong, ""},
		"and rolling back":                     {stepRollBack, 10 * maxTries, 10 * maxWrong, ""},
		"what has ended is forgotten some day": {stepForget, 10 * maxTries, 10 * maxWrong, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTable()
			b.has(executing(Copy, 1), &task{job: 1, state: TaskPending, message: "the last error"})
			l := newLeader(&Jobs{o: *b.o, board: b.board}, election.Term{})
			l.tries[1], l.wrong[1] = c.tries, c.wrong
			l.tries[2], l.wrong[2] = 10*maxTries, 10*maxWrong // another job's
			d := decision{step: c.step, job: b.job(1), done: done, retries: 5, tasks: nil}
			want := d
			if c.reason != "" {
				want = decision{
					step: stepGiveUp, job: d.job, outcome: Failed, reason: c.reason, message: "the last error", done: done, retries: 5,
				}
			}
			if diff := cmp.Diff(want, l.orGiveUp(d), cmp.AllowUnexported(decision{}), cmp.Comparer(func(x, y *Job) bool { return x == y })); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
