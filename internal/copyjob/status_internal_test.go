package copyjob

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestProgress checks that the reported progress never decreases.
func TestProgress(t *testing.T) {
	b := newTestTable()
	now := start
	b.o.Now = func() time.Time { return now }
	b.add(executing(Copy, 2))
	var last *Status
	check := func(files, bytes int64, retries int64) {
		t.Helper()
		now = now.Add(time.Second)
		s, _ := b.statusOf(1)
		if s.Done.Files != files || s.Done.Bytes != bytes || s.Retries != retries {
			t.Errorf("%+v; want %d files, %d bytes, %d retries", s, files, bytes, retries)
		}
		if last != nil && s.Fraction < last.Fraction || s.Fraction >= 1 && s.Job.State != Completed {
			t.Errorf("fraction %v", s.Fraction)
		}
		last = s
	}
	check(0, 0, 0)
	b.add(&task{job: 1, number: 0, state: TaskRunning, attempt: 1},
		&task{job: 1, number: 1, state: TaskRunning, attempt: 1})
	check(0, 0, 0)
	b.add(progressOf{1, 0, 5, 50})
	check(5, 50, 0)
	b.add(progressOf{1, 1, 1, 10}, progressOf{1, 0, 10, 60})
	check(11, 70, 0)
	if last.Rate <= 0 || last.Remaining <= 0 {
		t.Errorf("rate %d, remaining %v", last.Rate, last.Remaining)
	}
	b.add(&task{job: 1, number: 0, state: TaskPending, attempt: 1, failures: 1, message: "broke"})
	check(11, 70, 0)
	b.add(&task{job: 1, number: 0, state: TaskRunning, attempt: 2}, progressOf{1, 0, 1, 10})
	check(11, 70, 1)
	if last.LastError != "broke" {
		t.Errorf("last error %q", last.LastError)
	}
	b.add(doneTask(0))
	b.add(progressOf{1, 0, 1, 10}) // late
	check(21, 110, 0)
	b.add(removed(keys.Progress(1, 0)))
	check(21, 110, 0)
	// A reset of the table keeps the reported progress.
	kvs := []meta.KeyValue{{Key: keys.Job(1), Value: executing(Copy, 2).Encode("op"), ModRevision: 1}}
	(*jobHandler)(b.jobTable).Reset(kvs, 99)
	check(21, 110, 0)
	// A job that is given up keeps its progress.
	done := segment.Totals{Files: 21, Bytes: 110}
	b.add(with(executing(RollBack, 2), func(j *Job) { j.Done, j.Retries = done, 4 }),
		&task{job: 1, number: 0, state: TaskRunning, attempt: 5})
	check(21, 110, 4)
	b.add(removed(keys.Task(1, 0)),
		with(executing(RollBack, 2), func(j *Job) { j.State, j.Done, j.Retries = Failed, done, 4 }))
	check(21, 110, 4)
	b.add(with(executing(Publish, 2), func(j *Job) { j.State, j.Retries = Completed, 4 }))
	check(40, 200, 4)
	if last.Fraction != 1 {
		t.Errorf("COMPLETED, fraction %v", last.Fraction)
	}
	b.add(removed(keys.Job(1)))
	if s, _ := b.statusOf(1); s != nil {
		t.Errorf("%+v", s)
	}
}

// TestSamples checks that frequent calls need bounded memory and that the rate is that of
// half a minute.
func TestSamples(t *testing.T) {
	b := newTestTable()
	now := start
	b.o.Now = func() time.Time { return now }
	b.add(with(executing(Copy, 1000), func(j *Job) { j.Totals.Bytes = 1 << 40 }),
		&task{job: 1, number: 0, state: TaskRunning})
	for i := range int64(5000) {
		b.add(progressOf{1, 0, i, i * 100})
		now = now.Add(10 * time.Millisecond)
		b.statusOf(1)
	}
	s, _ := b.statusOf(1)
	if n := len(b.states[1].samples); n > 1001 {
		t.Errorf("%d samples", n)
	}
	if s.Rate < 9900 || s.Rate > 10100 {
		t.Errorf("%d bytes a second", s.Rate)
	}
}
