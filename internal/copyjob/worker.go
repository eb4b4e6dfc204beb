package copyjob

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// maxBudgets is how many jobs' budgets are kept.
const maxBudgets = 100

// progressEvery is how often a task says how far it has come, at most.
const progressEvery = time.Second

// worker is a replica's part in the copying. It lives round after round: in each
// it is somebody else, with an id and a lease of its own; when the lease is lost,
// all its tasks end, and another round begins.
type worker struct {
	o         *Options
	table     *jobTable
	limiter   *limiter
	manifests *manifestCache

	refusals atomic.Int64 // attempts that a store refused

	mu      sync.Mutex
	budgets map[int64]*budget // by job
	warned  map[int64]bool    // jobs whose first refusal is in the log
}

func newWorker(o *Options, table *jobTable) *worker {
	return &worker{
		o: o, table: table, limiter: newLimiter(o.CopyInFlight), manifests: newManifestCache(o.Source), budgets: map[int64]*budget{},
		warned: map[int64]bool{},
	}
}

func (w *worker) run(ctx context.Context) {
	for _, ready := range w.o.Ready {
		select {
		case <-ctx.Done():
			return
		case <-ready:
		}
	}
	backoff := meta.Backoff{Rand: w.o.Jitter}
	failing := lasting.New(time.Now).Add(w.o.Log, "worker", "working on restores failed and begins again", "")
	ready := func() {
		backoff.Reset()
		failing.Passed()
	}
	for {
		err := w.serve(ctx, ready)
		if ctx.Err() != nil {
			return
		}
		failing.Failed(err)
		if backoff.Wait(ctx) != nil {
			return
		}
	}
}

// round is the life of one worker. It calls good once the worker is there.
func (w *worker) serve(ctx context.Context, ready func()) error {
	id, err := w.newID()
	if err != nil {
		return err
	}
	start := time.Now() // before the grant, so that we never believe in a lease for longer than the store does
	lease, err := w.o.KV.Grant(ctx, w.o.WorkerTTL)
	if err != nil {
		return err
	}
	defer func() {
		// So that nobody waits for what will not come.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = w.o.KV.Revoke(ctx, lease) // else it ends by itself
	}()
	value := record.Encode(&storagev1.Worker{Format: record.Format, Replica: w.o.Replica, Slots: uint32(w.o.Slots)})
	res, err := w.o.KV.Txn(ctx, meta.Txn{
		Name: "restore.worker",
		If:   []meta.Cond{meta.Absent(keys.Worker(id))},
		Then: []meta.Op{meta.PutLeased(keys.Worker(id), value, lease)},
	})
	if err != nil {
		return err
	}
	if !res.Succeeded {
		return fmt.Errorf("worker %d is somebody else", id)
	}
	ready()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.keepAlive(ctx, lease, start) })
	runner := &taskRunner{worker: w, ctx: ctx, group: group, tasks: map[string]*runningTask{}}
	from, to := meta.Prefix(keys.AssignmentPrefix(id))
	follower := follow.New(follow.Options{KV: w.o.KV, From: from, To: to, Handler: runner, Log: w.o.Log, Rand: w.o.Jitter})
	group.Go(func() error { return follower.Run(ctx) })
	group.Go(func() error { return runner.watchJobs(ctx) })
	return group.Wait()
}

// newID makes an id at random: workers come and go, and nothing is named after
// one.
func (w *worker) newID() (int64, error) {
	b := make([]byte, 8)
	if _, err := io.ReadFull(w.o.Rand, b); err != nil {
		return 0, fmt.Errorf("make a worker's id: %w", err)
	}
	return int64(binary.BigEndian.Uint64(b)>>1) | 1, nil //nolint:gosec // 63 bits
}

// keepAlive renews the lease, and ends with an error when it may be lost: some
// time before the store ends it, so that what the worker began to copy is over
// when others take its assignments for gone. The lease was granted, or asked
// for, at began.
func (w *worker) keepAlive(ctx context.Context, lease meta.LeaseID, granted time.Time) error {
	lasts, every := w.o.WorkerTTL*4/5, w.o.WorkerTTL/4
	until := granted.Add(lasts)
	timer := time.NewTimer(every)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		granted := time.Now()
		if !granted.Before(until) {
			return errors.New("the worker's lease may be lost: it was not renewed in time")
		}
		err := w.renew(ctx, lease, granted.Add(min(every, until.Sub(granted))))
		switch {
		case err == nil:
			until = granted.Add(lasts)
		case errors.Is(err, meta.ErrLeaseNotFound):
			return fmt.Errorf("the worker's lease is lost: %w", err)
		}
		timer.Reset(min(time.Until(granted.Add(every)), time.Until(until)))
	}
}

func (w *worker) renew(ctx context.Context, lease meta.LeaseID, until time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	return w.o.KV.KeepAlive(ctx, lease)
}

// budget is what a job may use here.
func (w *worker) budget(job int64) *budget {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.budgets[job]
	if b == nil {
		if len(w.budgets) >= maxBudgets { // of jobs that have ended, most of them
			clear(w.budgets)
		}
		b = newBudget(func() Limits { return w.table.rateShare(job) })
		w.budgets[job] = b
	}
	return b
}

// logFailure logs how an attempt ended. A refusal that may pass is counted, and the
// first one of each job is a warning.
func (w *worker) logFailure(log *zap.Logger, job int64, err error) {
	if !isRefused(err) {
		log.Warn("a task of a restore failed", zap.Error(err))
		return
	}
	w.refusals.Add(1)
	w.mu.Lock()
	again := w.warned[job]
	if len(w.warned) >= maxBudgets { // of jobs that have ended, most of them
		clear(w.warned)
	}
	w.warned[job] = true
	w.mu.Unlock()
	if again {
		log.Debug("the object store refuses a task of a restore again", zap.Error(err))
		return
	}
	log.Warn("the object store refuses a task of a restore: it is tried again, and further refusals of this restore are counted only",
		zap.Duration("for", w.o.RefusalTimeout), zap.Error(err))
}

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

// attempt is one run of a task.
type attempt struct {
	worker     *worker
	jobID      int64
	number     int64
	attempt    uint32
	assignment meta.Cond
	key        string
	job        *Job
	task       *task
	progress   *progress // nil before it has begun to copy
}

// run works on the task until it is done or has failed, says so, and gives the
// assignment back. When that cannot be said it returns an error, which ends the
// worker: its lease ends the assignment, which nobody would look at any more.
func (a *attempt) run(ctx context.Context) error {
	err := a.read(ctx)
	if err == nil {
		err = a.copy(ctx)
	}
	if err == nil {
		return nil
	}
	w := a.worker
	log := w.o.Log.With(zap.Int64("job", a.jobID), zap.Int64("task", a.number), zap.Uint32("attempt", a.attempt))
	if ctx.Err() == nil && !errors.Is(err, errChanged) {
		w.logFailure(log, a.jobID, err)
	}
	if a.task == nil && !errors.Is(err, errChanged) {
		_ = meta.Pause(ctx, pauseStep(maxPauseStep)) // what cannot be read now is asked for again, but not at once
	}
	// The context may be over: the job was given up, or the replica stops.
	reportCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), writeTimeout)
	defer cancel()
	for try := 0; ; try++ {
		done, reportErr := a.release(reportCtx, ctx.Err() != nil, err)
		if done {
			return nil
		}
		log.Warn("an assignment is not given back yet", zap.Error(reportErr))
		if meta.Pause(reportCtx, pauseStep(try+1)) != nil {
			return fmt.Errorf("give task %d of job %d back: %w", a.number, a.jobID, reportErr)
		}
	}
}

// read reads the job and the task, which must be this attempt's.
func (a *attempt) read(ctx context.Context) error {
	res, err := a.worker.o.KV.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Get(keys.Job(a.jobID)), meta.Get(keys.Task(a.jobID, a.number)),
	}})
	if err != nil {
		return err
	}
	if len(res.Ranges[0]) == 0 || len(res.Ranges[1]) == 0 {
		return errChanged
	}
	if a.job, err = DecodeJob(res.Ranges[0][0]); err != nil {
		return err
	}
	if a.task, err = decodeTask(res.Ranges[1][0]); err != nil {
		return err
	}
	if a.job.State != Executing || a.job.Phase != Copy || a.task.state != TaskRunning || a.task.attempt != a.attempt {
		return errChanged
	}
	return nil
}

// giveBack ends the assignment. A task that failed goes back with why, one that
// was interrupted is left for another attempt.
func (a *attempt) release(ctx context.Context, interrupted bool, cause error) (bool, error) {
	txn := meta.Txn{Name: "restore.giveback", If: []meta.Cond{a.assignment}, Then: []meta.Op{meta.Delete(a.key)}}
	if !interrupted && a.task != nil && !errors.Is(cause, errChanged) {
		op, err := record.NewOp(a.worker.o.Rand)
		if err != nil {
			return false, err
		}
		next := a.task.afterAttempt(cause, a.progress, a.worker.o.Clock.Display(), a.worker.o)
		txn.If = append(txn.If, a.job.unchanged(), meta.Unchanged(a.task.key(), a.task.revision))
		txn.Then = append(txn.Then, meta.Put(a.task.key(), next.encode(op)))
	}
	res, err := a.worker.o.KV.Txn(ctx, txn)
	if err != nil {
		return false, err
	}
	if res.Succeeded || len(txn.If) == 1 {
		return true, nil // gone, by us or before
	}
	// The job has moved on: all that is left to do is to let go.
	return a.release(ctx, true, cause)
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

// maxPause is the try from which on the pause, of more than a second, is always
// the same.
const maxPauseStep = 6

// patience is the attempt that try is to [meta.Pause]: the first has to wait 40 ms,
// each that follows twice as long.
func pauseStep(try int) int { return 10 << min(try, maxPauseStep) }

// register writes the target's segments and completes the task. All transactions
// compare the job and the very assignment; the last one is all that counts, for a
// RESTORING collection shows its segments to nobody.
func (a *attempt) register(ctx context.Context, result *taskResult) error {
	op, err := record.NewOp(a.worker.o.Rand)
	if err != nil {
		return err
	}
	var ops []meta.Op
	for i := range result.segments {
		puts, err := catalog.SegmentOps(a.job.Target, &result.segments[i], op)
		if err != nil {
			return err
		}
		ops = append(ops, puts...)
	}
	next := *a.task
	next.state, next.totals, next.reason, next.message = TaskDone, result.totals, "", ""
	next.waits, next.finished, next.finishTime = 0, result.totals.Files, a.worker.o.Clock.Display()
	next.refusals, next.refuseSince = 0, time.Time{}
	last := []meta.Op{
		meta.Put(a.task.key(), next.encode(op)), meta.Delete(a.key), meta.Delete(keys.Progress(a.jobID, a.number)),
	}
	parts := batches(ops)
	if len(parts) == 0 {
		parts = [][]meta.Op{nil}
	}
	for i, part := range parts {
		txn := meta.Txn{Name: "restore.register", If: []meta.Cond{a.job.unchanged(), a.assignment}, Then: part}
		if i == len(parts)-1 {
			txn.Name = "restore.done"
			txn.If = append(txn.If, meta.Unchanged(a.task.key(), a.task.revision))
			txn.Then = append(txn.Then, last...)
		}
		res, err := a.worker.o.KV.Txn(ctx, txn)
		if err != nil {
			return err
		}
		if !res.Succeeded {
			return errChanged
		}
	}
	return nil
}
