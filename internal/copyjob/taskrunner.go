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

// taskRunner runs the tasks of a worker. It is the handler of the worker's assignments.
type taskRunner struct {
	worker *worker
	ctx    context.Context //nolint:containedctx // of the registration: tasks end with it
	group  *errgroup.Group

	mu    sync.Mutex
	tasks map[string]*runningTask // by assignment key
}

// runningTask is a task with a running attempt.
type runningTask struct {
	job    int64
	create int64 // create revision of the assignment
	cancel context.CancelFunc
}

// Reset implements follow.Handler.
func (r *taskRunner) Reset(kvs []meta.KeyValue, _ int64) {
	present := map[string]bool{}
	for _, kv := range kvs {
		present[kv.Key] = true
		r.start(kv)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for key, t := range r.tasks {
		if !present[key] {
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

// start starts an attempt of an assigned task, unless it runs already.
func (r *taskRunner) start(kv meta.KeyValue) {
	job, number, err := keys.LastTwo(kv.Key)
	rec := &storagev1.Assignment{}
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		r.worker.o.Log.Error("skip unreadable assignment", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if old := r.tasks[kv.Key]; old != nil {
		if old.create == kv.CreateRevision {
			return
		}
		old.cancel() // replaced by the new one
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

// watchJobs cancels the tasks of jobs that have left phase copy.
func (r *taskRunner) watchJobs(ctx context.Context) error {
	for {
		changed := r.worker.table.nextChange()
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
		case <-changed:
		}
	}
}
