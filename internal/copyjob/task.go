package copyjob

import (
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// TaskState is where a task is in its life. Stored: append only.
type TaskState int

// The states of a task.
const (
	TaskPending TaskState = iota + 1
	TaskRunning
	TaskDone
	TaskFailed
)

// task is a range of a job's segments.
type task struct {
	job, number int64
	state       TaskState
	attempt     uint32
	failures    uint32
	worker      int64
	notBefore   time.Time     // for leaders of an older release
	seen        time.Duration // elapsed when this replica first saw the record
	reason      string
	message     string
	totals      segment.Totals // once it is done
	unanswered  uint32         // attempts that ended because a store did not answer, or refused
	waits       uint32         // those of them in a row that finished no file
	waitSince   time.Time      // when the first of these ended
	waitTime    time.Time      // when the last of these ended
	refusals    uint32         // attempts in a row that a store refused, with no file finished
	refuseSince time.Time      // when the first of these ended
	finished    int64          // the most files that an attempt had finished when it ended
	finishTime  time.Time      // when an attempt last finished more files than any before
	revision    int64
}

// pause is how long a task waits before it is tried again, after a failure or after a
// store did not answer. The leader measures it from when it saw that, so no two
// clocks are compared.
func (t *task) pause() time.Duration {
	switch {
	case t.waits > 0:
		return pauseAfter(t.waits)
	case t.failures > 0:
		return pauseAfter(t.failures)
	}
	return 0
}

func (t *task) key() string { return keys.Task(t.job, t.number) }

func (t *task) encode(op string) []byte {
	return record.Encode(&storagev1.Task{
		Format: record.Format, State: uint32(t.state), Attempt: t.attempt, Failures: t.failures, Worker: t.worker,
		NotBefore: record.Nanos(t.notBefore), Reason: t.reason, Message: t.message, Totals: totalsRecord(t.totals), Op: op,
		Unanswered: t.unanswered, Waits: t.waits, WaitSince: record.Nanos(t.waitSince), WaitTime: record.Nanos(t.waitTime),
		Finished: t.finished, FinishTime: record.Nanos(t.finishTime),
		Refusals: t.refusals, RefuseSince: record.Nanos(t.refuseSince),
	})
}

func decodeTask(kv meta.KeyValue) (*task, error) {
	job, number, err := keys.LastTwo(kv.Key)
	if err != nil {
		return nil, err
	}
	r := &storagev1.Task{}
	if err := record.Decode(kv, r); err != nil {
		return nil, err
	}
	return &task{
		job: job, number: number, state: TaskState(r.GetState()), attempt: r.GetAttempt(), failures: r.GetFailures(),
		worker: r.GetWorker(), notBefore: record.Time(r.GetNotBefore()), reason: r.GetReason(), message: r.GetMessage(),
		totals: totalsOf(r.GetTotals()), unanswered: r.GetUnanswered(), waits: r.GetWaits(), waitSince: record.Time(r.GetWaitSince()),
		waitTime: record.Time(r.GetWaitTime()), finished: r.GetFinished(), finishTime: record.Time(r.GetFinishTime()),
		refusals: r.GetRefusals(), refuseSince: record.Time(r.GetRefuseSince()),
		revision: kv.ModRevision,
	}, nil
}

// after is the task as an attempt leaves it that ended now with cause.
func (t *task) afterAttempt(cause error, p *progress, now time.Time, o *Options) *task {
	next := *t
	if n, at := p.finished(); n > t.finished {
		next.finished, next.finishTime = n, at
		next.waits, next.refusals = 0, 0
	}
	switch {
	case isRefused(cause):
		if next.refusals++; next.refusals == 1 {
			next.refuseSince = now
		}
		if waited := refusedFor(next.refusals); waited >= o.RefusalTimeout {
			next.state, next.failures = TaskFailed, t.failures+1
			next.reason, _ = classify(cause, true)
			next.message = record.Clip(fmt.Sprintf("refused for %v: %v", waited.Round(time.Second), cause), record.MaxText)
			return &next
		}
		next.putBack(cause, now)
		return &next
	case isUnanswered(cause):
		next.refusals, next.refuseSince = 0, time.Time{}
		next.putBack(cause, now)
		return &next
	}
	next.failures, next.waits, next.waitSince, next.waitTime = t.failures+1, 0, time.Time{}, time.Time{}
	next.refusals, next.refuseSince = 0, time.Time{}
	reason, permanent := classify(cause, int(next.failures) >= o.MaxFailures)
	next.reason, next.message = reason, record.Clip(cause.Error(), record.MaxText)
	if next.state = TaskPending; permanent {
		next.state = TaskFailed
	} else {
		next.notBefore = now.Add(pauseAfter(next.failures))
	}
	return &next
}

// wait puts the task back after an attempt that was not answered, or was refused, and
// ended now.
func (t *task) putBack(cause error, now time.Time) {
	if t.waits == 0 {
		t.waitSince = now
	}
	t.unanswered, t.waits, t.waitTime = t.unanswered+1, t.waits+1, now
	t.reason, _ = classify(cause, false)
	t.state, t.message = TaskPending, record.Clip(cause.Error(), record.MaxText)
	t.notBefore = now.Add(pauseAfter(t.waits))
}
