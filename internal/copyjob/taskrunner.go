package copyjob

import (
	"context"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// hands are the tasks that a worker has. It is the handler of its assignments.
type taskRunner struct {
	worker *worker
	ctx    context.Context //nolint:containedctx // of the worker's round: tasks end with it
	group  *errgroup.Group

	mu    sync.Mutex
	tasks map[string]*runningTask // by assignment key
}

// hand is one task that is worked on.
type runningTask struct {
	job    int64
	create int64 // of the assignment
	cancel context.CancelFunc
}

// Reset implements follow.Handler.
func (r *taskRunner) Reset(kvs []meta.KeyValue, _ int64) {
	there := map[string]bool{}
	for _, kv := range kvs {
		there[kv.Key] = true
		r.start(kv)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, t := range r.tasks {
		if !there[key] {
			t.cancel()
		}
	}
}

// Apply implements follow.Handler.
func (r *taskRunner) Apply(events []meta.Event, _ int64) {
	for _, e := range events {
		if !e.Deleted {
			r.start(e.KV)
			continue
		}
		r.mu.Lock()
		if t := r.tasks[e.KV.Key]; t != nil && t.create < e.KV.ModRevision {
			t.cancel()
		}
		r.mu.Unlock()
	}
}

// take begins with a task, unless it has begun.
func (r *taskRunner) start(kv meta.KeyValue) {
	job, number, err := keys.LastTwo(kv.Key)
	rec := &storagev1.Assignment{}
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		r.worker.o.Log.Error("assignment is left alone", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.tasks[kv.Key]; old != nil {
		if old.create == kv.CreateRevision {
			return
		}
		old.cancel() // it gives way to the new one
	}
	ctx, cancel := context.WithCancel(r.ctx)
	t := &runningTask{job: job, create: kv.CreateRevision, cancel: cancel}
	r.tasks[kv.Key] = t
	r.group.Go(func() error {
		defer cancel()
		a := &attempt{
			worker: r.worker, jobID: job, number: number, attempt: rec.GetAttempt(),
			assignment: meta.SameKey(kv.Key, kv.CreateRevision), key: kv.Key,
		}
		err := a.run(ctx)
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.tasks[kv.Key] == t {
			delete(r.tasks, kv.Key)
		}
		return err
	})
}

// watchJobs ends the tasks of jobs that are no longer in phase copy.
func (r *taskRunner) watchJobs(ctx context.Context) error {
	for {
		moved := r.worker.table.nextChange()
		r.mu.Lock()
		jobs := map[int64]bool{}
		for _, t := range r.tasks {
			jobs[t.job] = true
		}
		for id := range jobs {
			if job := r.worker.table.job(id); job != nil && (job.State.Ended() || job.Phase == RollBack) {
				for _, t := range r.tasks {
					if t.job == id {
						t.cancel()
					}
				}
			}
		}
		r.mu.Unlock()
		select {
		case <-ctx.Done():
			return nil
		case <-moved:
		}
	}
}
