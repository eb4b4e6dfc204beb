package copyjob

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

var start = time.Unix(1_000_000, 0).UTC()

// afterAll is start, long after all that is on a table was seen.
var muchLater = moment{now: start, elapsed: time.Hour}

// still is a clock that stands.
type fixedClock struct{}

func (fixedClock) Now() time.Time         { return start }
func (fixedClock) Elapsed() time.Duration { return 0 }

// table is a board that is filled by hand.
type testTable struct {
	*jobTable
	revision int64
}

func newTestTable() *testTable {
	return &testTable{jobTable: newJobTable(&Options{
		Now: fixedClock{}.Now, Clock: clock.New(clock.Options{Clock: fixedClock{}}), Log: zap.NewNop(), Resync: time.Minute, MaxFailures: 3, Keep: time.Hour,
		StallTimeout: 24 * time.Hour,
	})}
}

// has puts things on the board: jobs, tasks, workers and assignments.
func (tt *testTable) add(things ...any) {
	var kvs []meta.KeyValue
	var workers []meta.Event
	for _, thing := range things {
		tt.revision++
		kv := meta.KeyValue{CreateRevision: tt.revision, ModRevision: tt.revision}
		switch x := thing.(type) {
		case *Job:
			kv.Key, kv.Value = keys.Job(x.ID), x.Encode("op")
		case *task:
			kv.Key, kv.Value = x.key(), x.encode("op")
		case progressOf:
			kv.Key, kv.Value = keys.Progress(x.job, x.task), record.Encode(&storagev1.TaskProgress{Format: record.Format, Files: x.files, Bytes: x.bytes})
		case workerInfo:
			kv.Key, kv.Value = keys.Worker(x.id), record.Encode(&storagev1.Worker{Format: record.Format, Slots: uint32(x.slots)})
			kv.Lease = x.lease
			workers = append(workers, meta.Event{KV: kv})
			continue
		case assignmentOf:
			kv.Key, kv.Value = keys.Assignment(x.worker, x.job, x.task), record.Encode(&storagev1.Assignment{Format: record.Format})
			workers = append(workers, meta.Event{KV: kv})
			continue
		case removed:
			kv.Key = string(x)
			tt.apply(meta.Event{Deleted: true, KV: kv})
			continue
		}
		kvs = append(kvs, kv)
	}
	for _, kv := range kvs {
		tt.apply(meta.Event{KV: kv})
	}
	(*workerHandler)(tt.jobTable).Apply(workers, tt.revision)
}

func (tt *testTable) apply(e meta.Event) {
	if strings.HasPrefix(e.KV.Key, "/worker/") {
		(*workerHandler)(tt.jobTable).Apply([]meta.Event{e}, tt.revision)
		return
	}
	(*jobHandler)(tt.jobTable).Apply([]meta.Event{e}, tt.revision)
}

type (
	progressOf   struct{ job, task, files, bytes int64 }
	assignmentOf struct{ worker, job, task int64 }
	removed      string
)

func executing(phase Phase, tasks int64) *Job {
	return &Job{
		ID: 1, State: Executing, Phase: phase, Tasks: tasks, CreateTime: start,
		Totals: segment.Totals{Segments: 10 * tasks, Files: 20 * tasks, Bytes: 100 * tasks},
	}
}

func doneTask(n int64) *task {
	return &task{job: 1, number: n, state: TaskDone, attempt: 1, totals: segment.Totals{Segments: 10, Files: 20, Bytes: 100}}
}

func with(job *Job, change func(*Job)) *Job {
	change(job)
	return job
}

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
		"nothing":      {nil, stepNone, nil, "", time.Minute},
		"admitted":     {[]any{&Job{ID: 1, State: Pending, Phase: Admit}}, stepBegin, nil, "", time.Minute},
		"to prepare":   {[]any{executing(Prepare, 1)}, stepPrepare, nil, "", time.Minute},
		"tasks alone":  {[]any{doneTask(0)}, stepNone, nil, "", time.Minute},
		"no tasks":     {[]any{executing(Copy, 0)}, stepPublish, nil, "", time.Minute},
		"one not seen": {[]any{executing(Copy, 2), doneTask(0)}, stepNone, nil, "", time.Minute},
		"all done":     {[]any{executing(Copy, 2), doneTask(0), doneTask(1)}, stepPublish, nil, "", time.Minute},
		"sums differ":  {[]any{executing(Copy, 2), doneTask(0), short}, stepGiveUp, nil, "INTERNAL", time.Minute},
		"the clock of its worker was ahead": {
			[]any{executing(Copy, 2), doneTask(0), &task{job: 1, number: 1, state: TaskPending, notBefore: start.Add(time.Hour)}},
			stepAssign,
			[]int64{1},
			"", time.Minute,
		},
		"two are free": {
			[]any{executing(Copy, 3), &task{job: 1, number: 2, state: TaskPending}, doneTask(0), &task{job: 1, number: 1, state: TaskPending}},
			stepAssign,
			[]int64{1, 2},
			"", time.Minute,
		},
		"one is worked on": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskRunning, worker: 7, attempt: 1}, assignmentOf{7, 1, 0}}, stepNone, nil, "", time.Minute,
		},
		"its worker is gone": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskRunning, worker: 7, attempt: 1}, assignmentOf{8, 1, 0}}, stepAssign, []int64{0}, "", time.Minute,
		},
		"it failed for good": {
			[]any{executing(Copy, 2), &task{job: 1, state: TaskFailed, reason: "R", message: "M"}, doneTask(1)}, stepGiveUp, nil, "R", time.Minute,
		},
		"it failed too often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, failures: 3, message: "M"}}, stepGiveUp, nil, "TOO_MANY_FAILURES", time.Minute,
		},
		"it was not answered 5000 times": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, attempt: 5001, unanswered: 5000, waits: 900,
				waitSince: start.Add(-24 * time.Hour), waitTime: start.Add(-1),
			}},
			stepAssign,
			[]int64{0},
			"", time.Minute,
		},
		"it was not answered for a day": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, attempt: 900, unanswered: 900, waits: 900,
				waitSince: start.Add(-24 * time.Hour), waitTime: start, message: "M",
			}},
			stepGiveUp, nil, "STALLED", time.Minute,
		},
		"it was not answered for a day, and another finished a file": {
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
		"it was not answered two days ago, and then had no worker": {
			[]any{executing(Copy, 1), &task{
				job: 1, state: TaskPending, waits: 9, waitSince: start.Add(-50 * time.Hour), waitTime: start.Add(-48 * time.Hour),
			}},
			stepAssign,
			[]int64{0},
			"", time.Minute,
		},
		"its workers died too often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, attempt: 700, unanswered: 500}},
			stepGiveUp, nil, "TOO_MANY_FAILURES", time.Minute,
		},
		"it failed often": {
			[]any{executing(Copy, 1), &task{job: 1, state: TaskPending, failures: 2}}, stepAssign, []int64{0}, "", time.Minute,
		},
		"out of time": {
			[]any{with(executing(Copy, 1), func(j *Job) { j.Deadline = start }), doneTask(0)}, stepGiveUp, nil, "TIMEOUT", time.Minute,
		},
		"out of time before it began": {
			[]any{&Job{ID: 1, State: Pending, Phase: Admit, Deadline: start.Add(-1)}}, stepGiveUp, nil, "TIMEOUT", time.Minute,
		},
		"in time": {
			[]any{with(executing(Prepare, 1), func(j *Job) { j.Deadline = start.Add(9 * time.Second) })}, stepPrepare, nil, "", 9 * time.Second,
		},
		"given up, out of time": {
			[]any{with(executing(RollBack, 1), func(j *Job) { j.Deadline = start })}, stepRollBack, nil, "", time.Minute,
		},
		"given up, worked on": {[]any{executing(RollBack, 1), assignmentOf{7, 1, 0}}, stepNone, nil, "", time.Minute},
		"another is worked on": {
			[]any{executing(RollBack, 1), assignmentOf{7, 2, 0}}, stepRollBack, nil, "", time.Minute,
		},
		"ended":          {[]any{&Job{ID: 1, State: Failed, Phase: RollBack, EndTime: start.Add(-50 * time.Minute)}}, stepNone, nil, "", time.Minute},
		"ended, soon":    {[]any{&Job{ID: 1, State: Completed, Phase: Publish, EndTime: start.Add(time.Second - time.Hour)}}, stepNone, nil, "", time.Second},
		"ended long ago": {[]any{&Job{ID: 1, State: Canceled, Phase: RollBack, EndTime: start.Add(-time.Hour)}}, stepForget, nil, "", time.Minute},
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

// A task that failed waits from when the leader saw the failure, longer each time.
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

// While the clock is not trusted no deadline has come, and all else goes on.
func TestDecideWithoutClock(t *testing.T) {
	b := newTestTable()
	b.add(with(executing(Prepare, 1), func(j *Job) { j.Deadline = start.Add(-time.Hour) }),
		&Job{ID: 2, State: Failed, Phase: RollBack, EndTime: start.Add(-time.Hour)})
	list, next := b.decide(moment{elapsed: time.Hour})
	if len(list) != 1 || list[0].step != stepPrepare || next != untrustedWait {
		t.Errorf("%+v, next in %v", list, next)
	}
}

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

func TestSlots(t *testing.T) {
	b := newTestTable()
	b.add(workerInfo{id: 1, slots: 2}, workerInfo{id: 2, slots: 8}, workerInfo{id: 3, slots: 8}, workerInfo{id: 4, slots: 1},
		assignmentOf{1, 9, 0}, assignmentOf{2, 9, 1}, assignmentOf{4, 9, 2}, assignmentOf{5, 9, 3})
	check := func(want ...[2]int) {
		t.Helper()
		var got [][2]int
		for _, s := range b.slots() {
			got = append(got, [2]int{int(s.id), s.free})
		}
		if !slices.Equal(got, want) {
			t.Errorf("free %v, want %v", got, want)
		}
	}
	check([2]int{3, 8}, [2]int{2, 7}, [2]int{1, 1})
	b.add(removed(keys.Worker(3)), removed(keys.Assignment(4, 9, 2)))
	check([2]int{2, 7}, [2]int{1, 1}, [2]int{4, 1})
	if n := b.workersOf(9); n != 3 {
		t.Errorf("%d workers have tasks", n)
	}
	if b.workersOf(8) != 0 || !b.hasAssignments(9) || b.hasAssignments(8) {
		t.Error("who works on what is wrong")
	}
}

// TestProgress has what is told never go down, whatever the tasks do.
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
	b.add(&task{job: 1, number: 0, state: TaskRunning, attempt: 1}, &task{job: 1, number: 1, state: TaskRunning, attempt: 1})
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
	b.add(progressOf{1, 0, 1, 10}) // which comes late
	check(21, 110, 0)
	b.add(removed(keys.Progress(1, 0)))
	check(21, 110, 0)
	// A board that begins anew has told what it has told.
	kvs := []meta.KeyValue{{Key: keys.Job(1), Value: executing(Copy, 2).Encode("op"), ModRevision: 1}}
	(*jobHandler)(b.jobTable).Reset(kvs, 99)
	check(21, 110, 0)
	// What is given up keeps what it had.
	b.add(with(executing(RollBack, 2), func(j *Job) { j.Done, j.Retries = segment.Totals{Files: 21, Bytes: 110}, 4 }),
		&task{job: 1, number: 0, state: TaskRunning, attempt: 5})
	check(21, 110, 4)
	b.add(removed(keys.Task(1, 0)), with(executing(RollBack, 2), func(j *Job) { j.State, j.Done, j.Retries = Failed, segment.Totals{Files: 21, Bytes: 110}, 4 }))
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

// TestSamples asks for a job often: what it takes is bounded, and the rate is
// that of half a minute.
func TestSamples(t *testing.T) {
	b := newTestTable()
	now := start
	b.o.Now = func() time.Time { return now }
	b.add(with(executing(Copy, 1000), func(j *Job) { j.Totals.Bytes = 1 << 40 }), &task{job: 1, number: 0, state: TaskRunning})
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

func TestRateShare(t *testing.T) {
	b := newTestTable()
	b.add(executing(Copy, 2))
	if l := b.rateShare(1); l != (Limits{}) {
		t.Errorf("%+v", l)
	}
	limits := func(requests, bytes int64) {
		op := LimitsOp(1, Limits{requests, bytes})
		b.revision++
		b.apply(meta.Event{KV: meta.KeyValue{Key: op.From, Value: op.Value, ModRevision: b.revision}})
	}
	limits(10, 100)
	b.add(workerInfo{id: 1}, workerInfo{id: 2}, workerInfo{id: 3})
	for n, want := range []Limits{{10, 100}, {10, 100}, {5, 50}} { // by those that work on it
		if l := b.rateShare(1); l != want {
			t.Errorf("with %d workers %+v, want %+v", n, l, want)
		}
		b.add(assignmentOf{int64(n + 1), 1, int64(n)})
	}
	limits(1, 0)
	if l := b.rateShare(1); l != (Limits{1, 0}) {
		t.Errorf("%+v", l)
	}
	if l := b.rateShare(2); l != (Limits{}) {
		t.Errorf("of no job: %+v", l)
	}
}

// TestUnreadableRecords leaves alone what it cannot read.
func TestUnreadableRecords(t *testing.T) {
	b := newTestTable()
	b.add(executing(Copy, 1))
	for _, key := range []string{keys.Job(2), keys.Task(1, 0), keys.Progress(1, 0), keys.JobLimits(1), "/job/rec/x", "/job/task/1/x"} {
		b.apply(meta.Event{KV: meta.KeyValue{Key: key, Value: []byte("?")}})
		b.apply(meta.Event{Deleted: true, KV: meta.KeyValue{Key: "/job/task/x"}})
	}
	b.apply(meta.Event{KV: meta.KeyValue{Key: keys.Worker(2), Value: []byte("?")}})
	if list, _ := b.decide(muchLater); len(list) != 0 {
		t.Errorf("%+v", list)
	}
	if s, _ := b.statusOf(1); s == nil {
		t.Error("the job is gone")
	}
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err       error
		reason    string
		permanent bool
	}{
		{fmt.Errorf("%w: %w", ErrDigest, manifest.ErrCorrupt), "SNAPSHOT_CORRUPT", false}, // the way may be to blame
		{errSourceMissing, "SOURCE_OBJECT_MISSING", true},
		{errSourceAltered, "SOURCE_OBJECT_ALTERED", true},
		{fmt.Errorf("%w: %w", ErrSource, object.ErrUnavailable), "SNAPSHOT_CORRUPT", true},
		{errMapping, "INTERNAL", true},
		{errNoStore, "TASK_FAILED", false}, // another replica may have it
		{object.ErrFull, "STORE_FULL", false},
		{object.ErrDenied, "OBJECT_STORE_DENIED", true},
		{object.ErrMisconfigured, "OBJECT_STORE_MISCONFIGURED", true},
		{object.ErrInvalidKey, "LAYOUT_REFUSED", true},
		{&layout.RefusedError{Reason: errors.New("r")}, "LAYOUT_REFUSED", true},
		{catalog.ErrLimitExceeded, "LIMIT_EXCEEDED", true},
		{meta.ErrTooLarge, "LIMIT_EXCEEDED", true},
		{object.ErrUnavailable, "OBJECT_STORE_UNAVAILABLE", false},
		{object.ErrNotFound, "TASK_FAILED", false},
		{meta.ErrUnavailable, "METADATA_STORE_UNAVAILABLE", false},
		{meta.ErrNoSpace, "METADATA_STORE_UNAVAILABLE", false},
		{io.EOF, "TASK_FAILED", false},
		{errChanged, "TASK_FAILED", false},
		{nil, "TASK_FAILED", false},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("task: %w", err)
		}
		if reason, permanent := classify(err, false); reason != c.reason || permanent != c.permanent {
			t.Errorf("%v: %s, %v; want %s, %v", c.err, reason, permanent, c.reason, c.permanent)
		}
		last := c.permanent || errors.Is(c.err, ErrDigest) || errors.Is(c.err, object.ErrFull)
		if reason, permanent := classify(err, true); reason != c.reason || permanent != last {
			t.Errorf("%v, the last try: %s, %v; want %s, %v", c.err, reason, permanent, c.reason, last)
		}
	}
}

func TestListPrefix(t *testing.T) {
	for _, c := range []struct {
		path, want string
		ids        []int64
	}{
		{"1/2/3/insert/100/4", "r/1/2/3/", []int64{3}},
		{"1/2/3/index/7/0-4", "r/1/2/3/", []int64{3, 7}},
		{"index_files/7/1/2/3/HNSW_0", "r/index_files/7/", []int64{3, 7}},
		{"3", "", []int64{3}}, // the file itself
		{"a/3", "", []int64{3}},
		{"a/b", "", []int64{3}},
		{"03/x", "r/03/", []int64{3}},
		{"3/x", "r/3/", []int64{3}},
	} {
		if got := listPrefix("r/", c.path, c.ids...); got != c.want {
			t.Errorf("anchor of %s: %q, want %q", c.path, got, c.want)
		}
	}
}

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

// TestRecords reads what it wrote.
func TestRecords(t *testing.T) {
	job := &Job{
		ID: 1, Snapshot: 2, SnapshotName: "s", Source: 3, Target: 4, DB: "d", Name: "n", State: Executing, Phase: Copy, Outcome: Failed,
		Reason: "R", Message: "M", Partitions: []int64{3, 9}, PartitionNames: []string{"b", "a"}, SkipIndexes: true, Priority: -7,
		Labels: map[string]string{"a": "b"}, Layout: layout.Milvus, FirstPartition: 5, FirstIndex: 6, FirstSegment: 7, FirstBuild: 8,
		Segments: 9, Builds: 10, Parts: object.CopyParts{Threshold: 11, PartSize: 12}, Tasks: 13, TaskSegments: 14,
		Totals: segment.Totals{Segments: 1, Rows: 2, Files: 3, Bytes: 4, Builds: 5, Straddling: 6}, Done: segment.Totals{Segments: 1}, Retries: 15,
		CreateTime: start, StartTime: start.Add(1), EndTime: start.Add(2), Deadline: start.Add(3), RequestKey: "/request/x", Pin: 16,
		Revision: 17, op: "op",
	}
	got, err := DecodeJob(meta.KeyValue{Key: keys.Job(1), Value: job.Encode("op"), ModRevision: 17})
	if err != nil || fmt.Sprintf("%+v", *got) != fmt.Sprintf("%+v", *job) {
		t.Errorf("%+v became %+v, err = %v", *job, got, err)
	}
	tk := &task{
		job: 1, number: 2, state: TaskFailed, attempt: 3, failures: 4, worker: 5, notBefore: start, reason: "R", message: "M",
		totals: segment.Totals{Files: 1}, revision: 9,
	}
	gotTask, err := decodeTask(meta.KeyValue{Key: tk.key(), Value: tk.encode("op"), ModRevision: 9})
	if err != nil || *gotTask != *tk {
		t.Errorf("%+v became %+v, err = %v", tk, gotTask, err)
	}
}
