package copyjob

import (
	"slices"
	"testing"
	"time"
)

// TestDecide checks the next step of a job in each state.
func TestDecide(t *testing.T) {
	short := doneTask(1)
	short.totals.Bytes--
	for name, c := range map[string]struct {
		things []any
		step   step
		tasks  []int64
		reason string
		next   time.Duration
	}{
		"empty":       {nil, stepNone, nil, "", time.Minute},
		"admitted":    {[]any{&Job{ID: 1, State: Pending, Phase: Admit}}, stepBegin, nil, "", time.Minute},
		"to prepare":  {[]any{executing(Prepare, 1)}, stepPrepare, nil, "", time.Minute},
		"no job":      {[]any{doneTask(0)}, stepNone, nil, "", time.Minute},
		"no tasks":    {[]any{executing(Copy, 0)}, stepPublish, nil, "", time.Minute},
		"one unknown": {[]any{executing(Copy, 2), doneTask(0)}, stepNone, nil, "", time.Minute},
		"all done":    {[]any{executing(Copy, 2), doneTask(0), doneTask(1)}, stepPublish, nil, "", time.Minute},
		"sums differ": {[]any{executing(Copy, 2), doneTask(0), short}, stepGiveUp, nil, "INTERNAL", time.Minute},
		"worker's clock was ahead": {
			[]any{
				executing(Copy, 2), doneTask(0),
				&task{job: 1, number: 1, state: TaskPending, notBefore: start.Add(time.Hour)},
			},
			stepAssign,
			[]int64{1},
			"", time.Minute,
		},
		"two pending": {
			[]any{
				executing(Copy, 3), &task{job: 1, number: 2, state: TaskPending}, doneTask(0),
				&task{job: 1, number: 1, state: TaskPending},
			},
			stepAssign,
			[]int64{1, 2},
			"", time.Minute,
		},
		"running": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskRunning, worker: 7, attempt: 1}, assignmentOf{7, 1, 0}},
			stepNone, nil, "", time.Minute,
		},
		"worker is gone": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskRunning, worker: 7, attempt: 1}, assignmentOf{8, 1, 0}},
			stepAssign,
			[]int64{0},
			"", time.Minute,
		},
		"failed permanently": {
			[]any{executing(Copy, 2), &task{job: 1, state: TaskFailed, reason: "R", message: "M"}, doneTask(1)},
			stepGiveUp, nil, "R", time.Minute,
		},
		"failed too often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, failures: 3, message: "M"}},
			stepGiveUp, nil, "TOO_MANY_FAILURES", time.Minute,
		},
		"5000 unanswered attempts": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, attempt: 5001, unanswered: 5000, waits: 900,
				waitSince: start.Add(-24 * time.Hour), waitTime: start.Add(-1),
			}},
			stepAssign,
			[]int64{0},
			"", time.Minute,
		},
		"unanswered for a day": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, attempt: 900, unanswered: 900, waits: 900,
				waitSince: start.Add(-24 * time.Hour), waitTime: start, message: "M",
			}},
			stepGiveUp, nil, "STALLED", time.Minute,
		},
		"unanswered for a day, and another task finished a file": {
			[]any{
				executing(Copy, 2),
				&task{job: 1, number: 1, state: TaskPending, waits: 9, waitSince: start.Add(-24 * time.Hour), waitTime: start},
				&task{job: 1, state: TaskRunning, worker: 7, attempt: 1, finished: 1, finishTime: start.Add(-23 * time.Hour)},
				assignmentOf{7, 1, 0},
			},
			stepAssign,
			[]int64{1},
			"", time.Minute,
		},
		"unanswered two days ago, then without a worker": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, waits: 9, waitSince: start.Add(-50 * time.Hour), waitTime: start.Add(-48 * time.Hour),
			}},
			stepAssign,
			[]int64{0},
			"", time.Minute,
		},
		"workers died too often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, attempt: 700, unanswered: 500}},
			stepGiveUp, nil, "TOO_MANY_FAILURES", time.Minute,
		},
		"failed often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, failures: 2}}, stepAssign, []int64{0}, "", time.Minute,
		},
		"deadline is over": {
			[]any{with(executing(Copy, 1), func(j *Job) { j.Deadline = start }), doneTask(0)},
			stepGiveUp, nil, "TIMEOUT", time.Minute,
		},
		"deadline is over before begin": {
			[]any{&Job{ID: 1, State: Pending, Phase: Admit, Deadline: start.Add(-1)}}, stepGiveUp, nil, "TIMEOUT", time.Minute,
		},
		"before its deadline": {
			[]any{with(executing(Prepare, 1), func(j *Job) { j.Deadline = start.Add(9 * time.Second) })},
			stepPrepare, nil, "", 9 * time.Second,
		},
		"roll back, deadline is over": {
			[]any{with(executing(RollBack, 1), func(j *Job) { j.Deadline = start })}, stepRollBack, nil, "", time.Minute,
		},
		"roll back, running": {[]any{executing(RollBack, 1), assignmentOf{7, 1, 0}}, stepNone, nil, "", time.Minute},
		"roll back, another job is running": {
			[]any{executing(RollBack, 1), assignmentOf{7, 2, 0}}, stepRollBack, nil, "", time.Minute,
		},
		"ended": {
			[]any{&Job{ID: 1, State: Failed, Phase: RollBack, EndTime: start.Add(-50 * time.Minute)}},
			stepNone, nil, "", time.Minute,
		},
		"ended, forgotten soon": {
			[]any{&Job{ID: 1, State: Completed, Phase: Publish, EndTime: start.Add(time.Second - time.Hour)}},
			stepNone, nil, "", time.Second,
		},
		"ended long ago": {
			[]any{&Job{ID: 1, State: Canceled, Phase: RollBack, EndTime: start.Add(-time.Hour)}},
			stepForget, nil, "", time.Minute,
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestTable()
			b.add(c.things...)
			list, next := b.decide(muchLater)
			if next != c.next {
				t.Errorf("next in %v, want %v", next, c.next)
			}
			if c.step == stepNone {
				if len(list) != 0 {
					t.Errorf("%+v", list)
				}
				return
			}
			if len(list) != 1 || list[0].step != c.step || list[0].reason != c.reason {
				t.Fatalf("%+v, want step %v, reason %q", list, c.step, c.reason)
			}
			var tasks []int64
			for _, task := range list[0].tasks {
				tasks = append(tasks, task.number)
			}
			if !slices.Equal(tasks, c.tasks) && c.step == stepAssign {
				t.Errorf("tasks %v, want %v", tasks, c.tasks)
			}
		})
	}
}

// TestDecideRetry checks that a failed task waits from the leader's first sight of the
// failure, longer each time.
func TestDecideRetry(t *testing.T) {
	for failures, wait := range map[uint32]time.Duration{0: 0, 1: 200 * time.Millisecond, 2: 400 * time.Millisecond} {
		b := newTestTable()
		b.add(executing(Copy, 1), &task{job: 1, state: TaskPending, failures: failures})
		if list, next := b.decide(moment{start, wait - 1}); wait > 0 && (len(list) != 0 || next != 1) {
			t.Errorf("%d failures, too early: %+v, next in %v", failures, list, next)
		}
		if list, _ := b.decide(moment{start, wait}); len(list) != 1 || list[0].step != stepAssign {
			t.Errorf("%d failures: %+v after %v", failures, list, wait)
		}
	}
}

// TestDecideWithoutClock checks that without a trusted clock no deadline is over, and all
// other steps continue.
func TestDecideWithoutClock(t *testing.T) {
	b := newTestTable()
	b.add(with(executing(Prepare, 1), func(j *Job) { j.Deadline = start.Add(-time.Hour) }),
		&Job{ID: 2, State: Failed, Phase: RollBack, EndTime: start.Add(-time.Hour)})
	list, next := b.decide(moment{elapsed: time.Hour})
	if len(list) != 1 || list[0].step != stepPrepare || next != untrustedWait {
		t.Errorf("%+v, next in %v", list, next)
	}
}

// TestDecideOrder checks that steps are ordered by priority and age.
func TestDecideOrder(t *testing.T) {
	b := newTestTable()
	for id, priority := range map[int64]int{1: 0, 2: 5, 3: -1, 4: 5, 5: 0} {
		b.add(&Job{ID: id, State: Pending, Priority: priority})
	}
	var ids []int64
	list, _ := b.decide(muchLater)
	for _, d := range list {
		ids = append(ids, d.job.ID)
	}
	if want := []int64{2, 4, 1, 5, 3}; !slices.Equal(ids, want) {
		t.Errorf("order %v, want %v", ids, want)
	}
}
