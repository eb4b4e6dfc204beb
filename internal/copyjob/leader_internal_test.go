package copyjob

import (
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
)

// TestAbortIfExhausted checks that a job is given up after too many failures or too long a
// wait of its step, and not before.
func TestAbortIfExhausted(t *testing.T) {
	done := segment.Totals{Files: 3}
	for name, c := range map[string]struct {
		step     step
		waits    time.Duration // for a store that does not answer; 0: no wait
		failures int
		reason   string // empty: it continues
	}{
		"prepare, first attempt":           {stepPrepare, 0, 0, ""},
		"prepare, unanswered for long":     {stepPrepare, 24*time.Hour - 1, 0, ""},
		"prepare, unanswered for too long": {stepPrepare, 24 * time.Hour, 0, "STALLED"},
		"prepare, many failures":           {stepPrepare, 0, maxStepFailures - 1, ""},
		"prepare, too many failures":       {stepPrepare, 0, maxStepFailures, "INTERNAL"},
		"prepare, both":                    {stepPrepare, 24 * time.Hour, maxStepFailures, "INTERNAL"},
		"publish, unanswered":              {stepPublish, 240 * time.Hour, 0, ""},
		"publish, many failures":           {stepPublish, 0, maxStepFailures - 1, ""},
		"publish, too many failures":       {stepPublish, 0, maxStepFailures, "INTERNAL"},
		"begin has no limit":               {stepBegin, 240 * time.Hour, 10 * maxStepFailures, ""},
		"give up has no limit":             {stepGiveUp, 240 * time.Hour, 10 * maxStepFailures, ""},
		"roll back has no limit":           {stepRollBack, 240 * time.Hour, 10 * maxStepFailures, ""},
		"forget has no limit":              {stepForget, 240 * time.Hour, 10 * maxStepFailures, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newTestTable()
			b.add(executing(Copy, 1), &task{job: 1, state: TaskPending, message: "the last error"})
			l := newLeader(&Jobs{o: *b.o, table: b.jobTable}, election.Term{})
			if l.failures[1] = c.failures; c.waits > 0 {
				l.unansweredSince[1] = -c.waits
			}
			l.unansweredSince[2], l.failures[2] = -240*time.Hour, 10*maxStepFailures // another job's
			d := decision{step: c.step, job: b.job(1), done: done, retries: 5, tasks: nil}
			want := d
			if c.reason != "" {
				want = decision{
					step: stepGiveUp, job: d.job, outcome: Failed, reason: c.reason, message: "the last error",
					done: done, retries: 5,
				}
			}
			got := l.abortIfExhausted(d, 0)
			sameJob := cmp.Comparer(func(x, y *Job) bool { return x == y })
			if diff := cmp.Diff(want, got, cmp.AllowUnexported(decision{}), sameJob); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// TestBatches checks that batches keep to the limits of a transaction.
func TestBatches(t *testing.T) {
	put := func(size int) meta.Op { return meta.Put("/k", make([]byte, size)) }
	for name, c := range map[string]struct {
		sizes []int
		want  []int
	}{
		"none":      {nil, nil},
		"one":       {[]int{1}, []int{1}},
		"many":      {slices.Repeat([]int{1}, 250), []int{100, 100, 50}},
		"large":     {slices.Repeat([]int{batchBytes / 2}, 3), []int{1, 1, 1}},
		"one large": {[]int{1, 2 * batchBytes, 1}, []int{1, 1, 1}},
		"halves":    {slices.Repeat([]int{batchBytes/2 - 10}, 5), []int{2, 2, 1}},
	} {
		var ops []meta.Op
		for _, size := range c.sizes {
			ops = append(ops, put(size))
		}
		var got []int
		all := 0
		for _, part := range batches(ops) {
			got = append(got, len(part))
			all += len(part)
		}
		if !slices.Equal(got, c.want) || all != len(ops) {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
