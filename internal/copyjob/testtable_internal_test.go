package copyjob

import (
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

var start = time.Unix(1_000_000, 0).UTC()

// muchLater is at start, an hour of elapsed time after every record was first seen.
var muchLater = moment{now: start, elapsed: time.Hour}

// fixedClock is a clock that stands still.
type fixedClock struct{}

func (fixedClock) Now() time.Time { return start }

func (fixedClock) Elapsed() time.Duration { return 0 }

// testTable is a jobTable that tests fill.
type testTable struct {
	*jobTable
	revision int64
}

func newTestTable() *testTable {
	return &testTable{jobTable: newJobTable(&Options{
		Now: fixedClock{}.Now, Clock: clock.New(clock.Options{Clock: fixedClock{}}), Log: zap.NewNop(),
		Problems: lasting.New(fixedClock{}.Now),
		Resync:   time.Minute, MaxFailures: 3, Keep: time.Hour, StallTimeout: 24 * time.Hour,
	})}
}

// add applies writes of jobs, tasks, progress, workers and assignments, and deletes.
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
			kv.Key = keys.Progress(x.job, x.task)
			kv.Value = record.Encode(&storagev1.TaskProgress{Format: record.Format, Files: x.files, Bytes: x.bytes})
		case workerInfo:
			kv.Key = keys.Worker(x.id)
			kv.Value = record.Encode(&storagev1.Worker{Format: record.Format, Slots: uint32(x.slots)})
			kv.Lease = x.lease
			workers = append(workers, meta.Event{KV: kv})
			continue
		case assignmentOf:
			kv.Key = keys.Assignment(x.worker, x.job, x.task)
			kv.Value = record.Encode(&storagev1.Assignment{Format: record.Format})
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
	totals := segment.Totals{Segments: 10, Files: 20, Bytes: 100}
	return &task{job: 1, number: n, state: TaskDone, attempt: 1, totals: totals}
}

func with(job *Job, change func(*Job)) *Job {
	change(job)
	return job
}
