package copyjob

import (
	"slices"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestSlots checks the free slots of workers, the most first.
func TestSlots(t *testing.T) {
	b := newTestTable()
	b.add(workerInfo{id: 1, slots: 2}, workerInfo{id: 2, slots: 8},
		workerInfo{id: 3, slots: 8}, workerInfo{id: 4, slots: 1},
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
		t.Errorf("%d workers have tasks, want 3", n)
	}
	if b.workersOf(8) != 0 || !b.hasAssignments(9) || b.hasAssignments(8) {
		t.Error("assignments of jobs 8 and 9 are wrong")
	}
}

// TestRateShare checks that a job's limits are split among the workers that run its tasks.
func TestRateShare(t *testing.T) {
	b := newTestTable()
	b.add(executing(Copy, 2))
	if l := b.rateShare(1, Limits{7, 7}); l != (Limits{}) {
		t.Errorf("%+v", l)
	}
	limits := func(requests, bytes int64) {
		op := LimitsOp(1, Limits{requests, bytes})
		b.revision++
		b.apply(meta.Event{KV: meta.KeyValue{Key: op.From, Value: op.Value, ModRevision: b.revision}})
	}
	limits(10, 100)
	b.add(workerInfo{id: 1}, workerInfo{id: 2}, workerInfo{id: 3})
	for n, want := range []Limits{{10, 100}, {10, 100}, {5, 50}} { // by its workers
		if l := b.rateShare(1, Limits{7, 7}); l != want {
			t.Errorf("with %d workers %+v, want %+v", n, l, want)
		}
		b.add(assignmentOf{int64(n + 1), 1, int64(n)})
	}
	limits(1, 0)
	if l := b.rateShare(1, Limits{7, 7}); l != (Limits{1, 0}) {
		t.Errorf("%+v", l)
	}
	// A worker may read a job before its table has it.
	for _, read := range []Limits{{}, {4, 8}} {
		if l := b.rateShare(2, read); l != read {
			t.Errorf("unknown job with limits %+v: %+v", read, l)
		}
	}
}

// TestUnreadableRecords checks that unreadable records are skipped.
func TestUnreadableRecords(t *testing.T) {
	b := newTestTable()
	b.add(executing(Copy, 1))
	for _, key := range []string{
		keys.Job(2), keys.Task(1, 0), keys.Progress(1, 0), keys.JobLimits(1), "/job/rec/x", "/job/task/1/x",
	} {
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
