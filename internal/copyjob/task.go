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

// TaskState is the state of a task. Stored: append only.
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
	seen        time.Duration // elapsed time when this replica first saw the record
	reason      string
	message     string
	totals      segment.Totals // set when it is done
	unanswered  uint32         // attempts that ended without an answer of a store, or with a refusal
	waits       uint32         // consecutive ones of them that finished no file
	waitSince   time.Time      // end of the first of these
	waitTime    time.Time      // end of the last of these
	refusals    uint32         // consecutive attempts that a store refused, without a finished file
	refuseSince time.Time      // end of the first of these
	finished    int64          // most files that any attempt finished
	finishTime  time.Time      // when that number last grew
	revision    int64
}

// pause is the time between a failed or unanswered attempt and the next one. The leader
// measures it from its first sight of the record, so no two clocks are compared.
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
		totals: totalsOf(r.GetTotals()), unanswered: r.GetUnanswered(), waits: r.GetWaits(),
		waitSince: record.Time(r.GetWaitSince()), waitTime: record.Time(r.GetWaitTime()),
		finished: r.GetFinished(), finishTime: record.Time(r.GetFinishTime()),
		refusals: r.GetRefusals(), refuseSince: record.Time(r.GetRefuseSince()),
		revision: kv.ModRevision,
	}, nil
}

// afterAttempt returns the task after an attempt that ended at now with cause.
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

// putBack makes the task PENDING after an attempt that ended at now without an answer, or
// with a refusal.
func (t *task) putBack(cause error, now time.Time) {
	if t.waits == 0 {
		t.waitSince = now
	}
	t.unanswered, t.waits, t.waitTime = t.unanswered+1, t.waits+1, now
	t.reason, _ = classify(cause, false)
	t.state, t.message = TaskPending, record.Clip(cause.Error(), record.MaxText)
	t.notBefore = now.Add(pauseAfter(t.waits))
}
