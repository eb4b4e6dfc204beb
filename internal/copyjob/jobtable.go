package copyjob

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// jobTable mirrors every job, task and worker by watches. Its content may lag: the
// compares of a transaction decide.
type jobTable struct {
	o              *Options
	jobFollower    *follow.Follower
	workerFollower *follow.Follower
	wake           chan struct{} // size one; wakes the leader

	mu          sync.Mutex
	states      map[int64]*jobState
	workers     map[int64]*workerInfo
	assignments map[string]bool // assignment keys
	changed     chan struct{}   // closed and replaced with every change
}

// workerInfo is a live worker.
type workerInfo struct {
	id     int64
	slots  int
	lease  meta.LeaseID
	create int64
}

func newJobTable(o *Options) *jobTable {
	jt := &jobTable{o: o, wake: make(chan struct{}, 1), changed: make(chan struct{}), states: map[int64]*jobState{}}
	jt.workers, jt.assignments = map[int64]*workerInfo{}, map[string]bool{}
	follower := func(name, prefix string, h follow.Handler) *follow.Follower {
		from, to := meta.Prefix(prefix)
		return follow.New(follow.Options{
			KV: o.KV, From: from, To: to, Handler: h, Log: o.Log, Rand: o.Jitter, Problems: o.Problems, Name: name,
		})
	}
	jt.jobFollower = follower("restores", "/job/", (*jobHandler)(jt))
	jt.workerFollower = follower("workers", "/worker/", (*workerHandler)(jt))
	return jt
}

func (jt *jobTable) run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return jt.jobFollower.Run(ctx) })
	group.Go(func() error { return jt.workerFollower.Run(ctx) })
	return group.Wait()
}

// sync waits until the table has every write of a job that precedes the call.
func (jt *jobTable) sync(ctx context.Context) error {
	_, err := jt.jobFollower.Sync(ctx)
	return err
}

// broadcast announces a change to all waiters. The lock must be held.
func (jt *jobTable) broadcast() {
	close(jt.changed)
	jt.changed = make(chan struct{})
	select {
	case jt.wake <- struct{}{}:
	default:
	}
}

// nextChange returns a channel that is closed at the next change.
func (jt *jobTable) nextChange() <-chan struct{} {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	return jt.changed
}

// jobHandler is the jobTable as the handler of job keys.
type jobHandler jobTable

// Reset implements follow.Handler.
func (h *jobHandler) Reset(kvs []meta.KeyValue, _ int64) {
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	old := jt.states
	jt.states = map[int64]*jobState{}
	for _, kv := range kvs {
		jt.put(kv)
	}
	for id, js := range jt.states { // reported progress never decreases
		if before := old[id]; before != nil {
			js.reported, js.samples = before.reported, before.samples
			for number, t := range js.tasks {
				if seen := before.tasks[number]; seen != nil && seen.revision == t.revision {
					t.seen = seen.seen
				}
			}
		}
	}
	jt.broadcast()
}

// Apply implements follow.Handler.
func (h *jobHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	for _, e := range events {
		if e.Deleted {
			jt.remove(e.KV.Key)
		} else {
			jt.put(e.KV)
		}
	}
	jt.broadcast()
}

// ensure returns the state of a job, which it adds if absent. The lock must be held.
func (jt *jobTable) ensure(id int64) *jobState {
	js := jt.states[id]
	if js == nil {
		js = &jobState{tasks: map[int64]*task{}, unfinished: map[int64]*task{}, progress: map[int64]segment.Totals{}}
		jt.states[id] = js
	}
	return js
}

// put applies the write of a key. The lock must be held.
func (jt *jobTable) put(kv meta.KeyValue) {
	var err error
	switch {
	case strings.HasPrefix(kv.Key, keys.JobPrefix):
		var job *Job
		if job, err = DecodeJob(kv); err == nil {
			jt.ensure(job.ID).job = job
		}
	case strings.HasPrefix(kv.Key, keys.AllTasksPrefix):
		var t *task
		if t, err = decodeTask(kv); err == nil {
			t.seen = jt.o.Clock.Elapsed()
			jt.ensure(t.job).setTask(t)
		}
	case strings.HasPrefix(kv.Key, keys.AllProgressPrefix):
		var job, number int64
		rec := &storagev1.TaskProgress{}
		if job, number, err = keys.LastTwo(kv.Key); err == nil {
			if err = record.Decode(kv, rec); err == nil {
				jt.ensure(job).setProgress(number, segment.Totals{Files: rec.GetFiles(), Bytes: rec.GetBytes()})
				jt.ensure(job).lastFinish = latest(jt.ensure(job).lastFinish, record.Time(rec.GetFinishTime()))
			}
		}
	default:
		var id int64
		var l Limits
		if id, err = keys.LastID(kv.Key); err == nil {
			if l, err = decodeLimits(kv); err == nil {
				jt.ensure(id).limits = l
			}
		}
	}
	if err != nil {
		jt.o.Log.Error("skip unreadable record of a restore", zap.String("key", kv.Key), zap.Error(err))
	}
}

// remove applies the deletion of a key. The lock must be held.
func (jt *jobTable) remove(key string) {
	switch {
	case strings.HasPrefix(key, keys.LimitsPrefix):
		if id, err := keys.LastID(key); err == nil && jt.states[id] != nil {
			jt.states[id].limits = Limits{}
		}
	case strings.HasPrefix(key, keys.JobPrefix):
		if id, err := keys.LastID(key); err == nil {
			delete(jt.states, id)
		}
	case strings.HasPrefix(key, keys.AllTasksPrefix):
		job, number, err := keys.LastTwo(key)
		if js := jt.states[job]; err == nil && js != nil {
			if t := js.tasks[number]; t != nil && t.state == TaskDone {
				js.done = subtractTotals(js.done, t.totals)
			}
			delete(js.tasks, number)
			delete(js.unfinished, number)
			delete(js.progress, number)
		}
	}
}

// workerHandler is the jobTable as the handler of workers and assignments.
type workerHandler jobTable

// Reset implements follow.Handler.
func (h *workerHandler) Reset(kvs []meta.KeyValue, _ int64) {
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	jt.workers, jt.assignments = map[int64]*workerInfo{}, map[string]bool{}
	for _, kv := range kvs {
		jt.putWorker(kv)
	}
	jt.broadcast()
}

// Apply implements follow.Handler.
func (h *workerHandler) Apply(events []meta.Event, _ int64) {
	if len(events) == 0 {
		return
	}
	jt := (*jobTable)(h)
	jt.mu.Lock()
	defer jt.mu.Unlock()
	for _, e := range events {
		switch {
		case !e.Deleted:
			jt.putWorker(e.KV)
		case strings.HasPrefix(e.KV.Key, keys.WorkerPrefix):
			if id, err := keys.LastID(e.KV.Key); err == nil {
				delete(jt.workers, id)
			}
		default:
			delete(jt.assignments, e.KV.Key)
		}
	}
	jt.broadcast()
}

func (jt *jobTable) putWorker(kv meta.KeyValue) {
	if strings.HasPrefix(kv.Key, keys.AssignedPrefix) {
		jt.assignments[kv.Key] = true
		return
	}
	rec := &storagev1.Worker{}
	id, err := keys.LastID(kv.Key)
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		jt.o.Log.Error("skip unreadable record of a worker", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	jt.workers[id] = &workerInfo{id: id, slots: int(rec.GetSlots()), lease: kv.Lease, create: kv.CreateRevision}
}

// job returns the cached job, nil if it is unknown.
func (jt *jobTable) job(id int64) *Job {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[id]; js != nil {
		return js.job
	}
	return nil
}

// setLastError records the last error of a job, for its status.
func (jt *jobTable) setLastError(job int64, err error) {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[job]; js != nil {
		js.lastErr = record.Clip(err.Error(), record.MaxText)
	}
}

// lastError returns the last error of a job.
func (jt *jobTable) lastError(job int64) string {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	if js := jt.states[job]; js != nil {
		return js.lastErr
	}
	return ""
}

// rateShare returns one worker's share of the job's limits, split evenly among the workers
// that run its tasks. read are the limits that the worker has read from the store: a task
// may begin before the table has its job.
func (jt *jobTable) rateShare(job int64, read Limits) Limits {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	l := read
	if js := jt.states[job]; js != nil && js.job != nil {
		l = js.limits
	}
	if l == (Limits{}) {
		return l
	}
	n := int64(max(1, jt.workersOf(job)))
	if l.Requests > 0 {
		l.Requests = max(1, l.Requests/n)
	}
	if l.Bytes > 0 {
		l.Bytes = max(1, l.Bytes/n)
	}
	return l
}

// isAssigned reports whether the worker of a running task still has its assignment. The
// lock must be held.
func (jt *jobTable) isAssigned(t *task) bool {
	return jt.assignments[keys.Assignment(t.worker, t.job, t.number)]
}

// hasAssignmentsLocked reports whether any worker has a task of the job. The lock must be
// held.
func (jt *jobTable) hasAssignmentsLocked(job int64) bool {
	for key := range jt.assignments {
		if id, _, err := keys.LastTwo(key); err == nil && id == job {
			return true
		}
	}
	return false
}

// hasAssignments reports whether any worker has a task of the job.
func (jt *jobTable) hasAssignments(job int64) bool {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	return jt.hasAssignmentsLocked(job)
}

// workersOf counts the workers that have tasks of the job. The lock must be held.
func (jt *jobTable) workersOf(job int64) int {
	workers := map[int64]bool{}
	for key := range jt.assignments {
		id, _, err := keys.LastTwo(key)
		if err != nil || id != job {
			continue
		}
		if worker, err := keys.AssignedTo(key); err == nil {
			workers[worker] = true
		}
	}
	return len(workers)
}

// slot is a worker with capacity for tasks.
type slot struct {
	*workerInfo
	free int
}

// slots returns the workers with capacity, those with the most first.
func (jt *jobTable) slots() []slot {
	jt.mu.Lock()
	defer jt.mu.Unlock()
	load := map[int64]int{}
	for key := range jt.assignments {
		if worker, err := keys.AssignedTo(key); err == nil {
			load[worker]++
		}
	}
	var list []slot
	for _, w := range jt.workers {
		if free := w.slots - load[w.id]; free > 0 {
			list = append(list, slot{w, free})
		}
	}
	slices.SortFunc(list, func(x, y slot) int { return cmp.Or(cmp.Compare(y.free, x.free), cmp.Compare(x.id, y.id)) })
	return list
}
