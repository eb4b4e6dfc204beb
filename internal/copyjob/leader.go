package copyjob

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// How the leader works.
const (
	stepsInFlight = 16              // jobs that are worked on at once
	batchOps      = 100             // of one transaction
	batchBytes    = 768 << 10       // of one transaction
	assignBatch   = 20              // tasks in one transaction
	writeTimeout  = 5 * time.Second // of a transaction that the loop waits for
	deleteSpan    = 5000            // segments' records in one transaction
)

// leader moves jobs on. Its loop never waits for an object store: what may take
// long is done beside it, one step of a job at a time.
type leader struct {
	*Jobs
	fence meta.Cond

	assignProblem     *lasting.Problem
	wake              chan struct{} // size one; a step has ended
	steps             errgroup.Group
	assignedRevisions map[int64]map[int64]int64 // by job and task: the revision of one that was assigned; the loop's alone

	mu              sync.Mutex
	busy            map[int64]bool          // jobs with a step under way
	handledRevision map[int64]int64         // the revision of a job that was moved on
	attempts        map[int64]int           // failed steps of a job in a row
	failures        map[int64]int           // those of them that no store was to blame for
	retryAt         map[int64]time.Duration // elapsed when the next of them may be tried
	unansweredSince map[int64]time.Duration // elapsed since a store has not answered a step of a job
	refusedSince    map[int64]time.Duration // elapsed since a store has refused a step of a job
}

func newLeader(j *Jobs, term election.Term) *leader {
	l := &leader{Jobs: j, fence: term.Fence(), wake: make(chan struct{}, 1)}
	l.busy, l.handledRevision, l.assignedRevisions = map[int64]bool{}, map[int64]int64{}, map[int64]map[int64]int64{}
	l.attempts, l.failures = map[int64]int{}, map[int64]int{}
	l.retryAt, l.unansweredSince = map[int64]time.Duration{}, map[int64]time.Duration{}
	l.refusedSince = map[int64]time.Duration{}
	l.assignProblem = lasting.New(j.o.Now).Add(j.o.Log, "assign", "tasks of a restore are not assigned yet", "")
	l.steps.SetLimit(stepsInFlight)
	return l
}

func (l *leader) run(ctx context.Context) error {
	defer func() { _ = l.steps.Wait() }() // steps return nothing
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-l.wake:
		case <-l.table.wake:
		}
		timer.Reset(l.pass(ctx))
	}
}

// pass looks at every job once, and returns how long there is nothing more to do
// unless something changes.
func (l *leader) pass(ctx context.Context) time.Duration {
	now := l.o.Clock.Elapsed()
	judged, _ := l.o.Clock.Peek()
	list, next := l.table.decide(moment{judged, now})
	slots := l.table.slots()
	for _, d := range list {
		if wait := l.nextAttempt(d.job, now); wait > 0 {
			next = min(next, wait)
			continue
		} else if wait < 0 {
			continue // under way, or done and not seen yet
		}
		if d.step == stepAssign {
			var err error
			if slots, err = l.assign(ctx, d, slots); err != nil && ctx.Err() == nil {
				next = min(next, time.Second)
			}
			if ctx.Err() == nil {
				l.assignProblem.Note(err, zap.Int64("job", d.job.ID))
			}
			continue
		}
		delete(l.assignedRevisions, d.job.ID) // no task is assigned any more, or not yet
		if !l.tryStart(d.job.ID) {
			continue
		}
		d = l.abortIfExhausted(d, now)
		started := l.steps.TryGo(func() error {
			err := l.execute(ctx, d)
			l.finishStep(ctx, d, err)
			return nil
		})
		if !started { // too many at once: one of them wakes us
			l.mu.Lock()
			delete(l.busy, d.job.ID)
			l.mu.Unlock()
		}
	}
	return next
}

// maxWrong is how often a step that goes wrong in itself is tried. When a store does
// not answer, prepare waits for as long as copies do; publishing waits for ever, for
// all the work is done.
const maxStepFailures = 20

// isLast says whether the job is given up if its step ends with err this time.
func (l *leader) isLastAttempt(job int64, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if isRefused(err) {
		since, again := l.refusedSince[job]
		return again && l.o.Clock.Elapsed()-since >= l.o.RefusalTimeout
	}
	return l.failures[job]+1 >= maxStepFailures
}

// orGiveUp is d, or that the job is given up when the step went wrong too often, or
// waited for too long.
func (l *leader) abortIfExhausted(d decision, now time.Duration) decision {
	l.mu.Lock()
	defer l.mu.Unlock()
	since, waits := l.unansweredSince[d.job.ID]
	next := decision{
		step: stepGiveUp, job: d.job, outcome: Failed, message: l.table.lastError(d.job.ID), done: d.done, retries: d.retries,
	}
	switch {
	case l.failures[d.job.ID] >= maxStepFailures && (d.step == stepPrepare || d.step == stepPublish):
		next.reason = "INTERNAL"
	case d.step == stepPrepare && waits && now-since >= l.o.StallTimeout:
		next.reason = reasonStalled
	default:
		return d
	}
	return next
}

// mayAct says how long to wait before a job may be acted on; below zero it is for
// something to change.
func (l *leader) nextAttempt(job *Job, now time.Duration) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[job.ID] || l.handledRevision[job.ID] == job.Revision {
		return -1
	}
	return max(0, l.retryAt[job.ID]-now)
}

func (l *leader) tryStart(job int64) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.busy[job] {
		return false
	}
	l.busy[job] = true
	return true
}

// errChanged means that what a transaction compared was not as it was read: the
// board will show what is now.
var errChanged = errors.New("changed")

// ended notes how a step ended.
func (l *leader) finishStep(ctx context.Context, d decision, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.busy, d.job.ID)
	switch {
	case err == nil:
		l.handledRevision[d.job.ID] = d.job.Revision
		delete(l.attempts, d.job.ID)
		delete(l.failures, d.job.ID)
		delete(l.retryAt, d.job.ID)
		delete(l.unansweredSince, d.job.ID)
		delete(l.refusedSince, d.job.ID)
		if d.step == stepForget {
			delete(l.handledRevision, d.job.ID)
		}
	case ctx.Err() != nil:
	case errors.Is(err, errTooRecent):
		l.retryAt[d.job.ID] = l.o.Clock.Elapsed() + stragglerGrace
	default:
		wait := 10 * time.Millisecond << min(l.attempts[d.job.ID], 10)
		l.attempts[d.job.ID]++
		l.retryAt[d.job.ID] = l.o.Clock.Elapsed() + wait
		_, refusedAgain := l.refusedSince[d.job.ID]
		if refusedAgain = refusedAgain && isRefused(err); !refusedAgain && !errors.Is(err, errChanged) {
			delete(l.refusedSince, d.job.ID)
		}
		switch {
		case errors.Is(err, errChanged):
		case isRefused(err):
			if !refusedAgain {
				l.refusedSince[d.job.ID] = l.o.Clock.Elapsed()
			}
			delete(l.unansweredSince, d.job.ID)
		case !isUnanswered(err):
			l.failures[d.job.ID]++
			delete(l.unansweredSince, d.job.ID)
		default:
			if _, waits := l.unansweredSince[d.job.ID]; !waits {
				l.unansweredSince[d.job.ID] = l.o.Clock.Elapsed()
			}
		}
		if !errors.Is(err, errChanged) {
			level := zap.WarnLevel
			if refusedAgain { // the log has the first refusal, and the job's status the last
				level = zap.DebugLevel
			}
			l.log.Log(level, "a step of a restore failed and is tried again", zap.Int64("job", d.job.ID),
				zap.Stringer("phase", d.job.Phase), zap.Error(err))
			l.table.setLastError(d.job.ID, err)
		}
	}
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

// act carries out one step of a job.
func (l *leader) execute(ctx context.Context, d decision) error {
	switch d.step {
	case stepBegin:
		next := *d.job
		next.State, next.Phase, next.StartTime = Executing, Prepare, l.o.Clock.Display()
		return l.replace(ctx, "restore.begin", d.job, &next)
	case stepPrepare:
		err := l.prepare(ctx, d.job)
		if reason, permanent := classify(err, l.isLastAttempt(d.job.ID, err)); permanent {
			d.outcome, d.reason, d.message = Failed, reason, err.Error()
			return l.replace(ctx, "restore.giveup", d.job, abortedJob(d, l.o.Clock.Display()))
		}
		return err
	case stepGiveUp:
		l.log.Warn("restore is given up", zap.Int64("job", d.job.ID), zap.String("reason", d.reason), zap.String("message", d.message))
		return l.replace(ctx, "restore.giveup", d.job, abortedJob(d, l.o.Clock.Display()))
	case stepPublish:
		return l.publish(ctx, d)
	case stepRollBack:
		return l.rollBack(ctx, d.job)
	case stepForget:
		// A store may have carried a copy out long after it was asked.
		if err := l.cleanupStragglers(ctx, d.job); err != nil {
			return err
		}
		if err := l.removePins(ctx, d.job); err != nil {
			return err
		}
		if d.job.State != Completed { // of a target that is in use each id goes with its last record
			if err := l.o.Catalog.GoneRange(ctx, d.job.FirstSegment, d.job.Segments+d.job.Builds, func(conds []meta.Cond, ops []meta.Op) error {
				return l.write(ctx, "restore.forget", d.job, conds, ops)
			}); err != nil {
				return err
			}
		}
		// Until now the ids of the job were kept from everybody else: a late copy could
		// have met what they had made of them.
		return l.write(ctx, "restore.forget", d.job, nil, append(
			catalog.ReleaseRange(d.job.FirstSegment, d.job.Segments+d.job.Builds), meta.Delete(keys.Job(d.job.ID))))
	case stepNone, stepAssign: // neither comes here
	}
	return nil
}

// givenUp is the job as giving it up leaves it.
func abortedJob(d decision, now time.Time) *Job {
	next := *d.job
	if next.StartTime.IsZero() {
		next.StartTime = now
	}
	next.State, next.Phase, next.Outcome = Executing, RollBack, d.outcome
	next.Reason, next.Message, next.Done, next.Retries = d.reason, record.Clip(d.message, record.MaxText), d.done, d.retries
	return &next
}

// write changes a job in one transaction, named step, which compares the job as it
// was read and that we lead.
func (l *leader) write(ctx context.Context, step string, job *Job, conds []meta.Cond, ops []meta.Op) error {
	res, err := l.kv.Txn(ctx, meta.Txn{Name: step, If: append([]meta.Cond{job.unchanged(), l.fence}, conds...), Then: ops})
	if err == nil && !res.Succeeded {
		err = errChanged
	}
	if err != nil {
		return fmt.Errorf("job %s: %w", job, err)
	}
	return nil
}

// move replaces the job's record in a transaction named step.
func (l *leader) replace(ctx context.Context, step string, job, next *Job) error {
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	return l.write(ctx, step, job, nil, []meta.Op{meta.Put(keys.Job(job.ID), next.Encode(op))})
}

// prepare makes what the target needs before it gets segments, reads it back, and
// moves the job to phase copy.
func (l *leader) prepare(ctx context.Context, job *Job) error {
	md, err := l.o.Source.Metadata(ctx, job.Snapshot)
	if err != nil {
		return err
	}
	if existing, err := l.existingObject(ctx, job); err != nil {
		return err
	} else if existing != "" {
		return l.replace(ctx, "restore.giveup", job, abortedJob(decision{
			job: job, outcome: Failed, reason: "TARGET_NOT_EMPTY",
			message: existing + " is where the target's files would go: something else uses ids of this cluster there; nothing was touched",
		}, l.o.Clock.Display()))
	}
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	partitions, indexes, checkpoints := targetContent(job, md)
	ops := catalog.ContentOps(job.Target, partitions, indexes, checkpoints, job.CreateTime, op)
	for n := range job.Tasks {
		t := &task{job: job.ID, number: n, state: TaskPending}
		ops = append(ops, meta.Put(t.key(), t.encode(op)))
	}
	for _, batch := range batches(ops) {
		if err := l.write(ctx, "restore.prepare", job, nil, batch); err != nil {
			return err
		}
	}
	if err := l.validate(ctx, job, len(partitions), len(indexes), len(checkpoints)); err != nil {
		return err
	}
	next := *job
	next.Phase, next.Copied = Copy, true
	return l.replace(ctx, "restore.prepared", job, &next)
}

// maxLooks bounds the prefixes that are looked at for something that is there.
const maxPrefixChecks = 64

// alreadyThere returns an object that lies where only the target's may, and which
// rolling back would remove; empty: none was found. Nothing has been copied yet.
func (l *leader) existingObject(ctx context.Context, job *Job) (string, error) {
	m := job.cleanupMapping()
	if err := m.Check(); err != nil {
		return "", err
	}
	for _, root := range job.Roots {
		store, ok := l.o.Stores[root.Store]
		if !ok {
			return "", fmt.Errorf("%w: %q", errNoStore, root.Store)
		}
		looks := 0
		for prefix := range m.Prefixes() {
			if looks++; looks > maxPrefixChecks {
				break
			}
			for info, err := range store.List(ctx, root.Prefix+prefix) {
				if err != nil {
					return "", err
				}
				return root.Store + "/" + info.Key, nil
			}
		}
	}
	return "", nil
}

// content says what the target has besides segments.
func targetContent(job *Job, md *manifest.Metadata) (partitions []catalog.Partition, indexes []catalog.Index, checkpoints []catalog.Checkpoint) {
	for i, p := range md.Partitions {
		if job.WantsPartition(p.ID) {
			partitions = append(partitions, catalog.Partition{ID: job.FirstPartition + int64(i), Name: p.Name, Attributes: p.Attributes})
		}
	}
	for i, x := range md.Indexes {
		if job.SkipIndexes {
			break
		}
		params := maps.Clone(x.TypeParams)
		delete(params, "mmap.enabled") // how the source was loaded, not what it is
		indexes = append(indexes, catalog.Index{
			ID: job.FirstIndex + int64(i), Name: x.Name, Field: x.Field, TypeParams: params, IndexParams: x.IndexParams, Attributes: x.Attributes,
		})
	}
	for _, c := range md.Channels {
		// One that had no checkpoint has none here; the implicit one needs none.
		if c.Cut > 0 && (c.Name != "" || c.Cut < segment.MaxTimestamp) {
			checkpoints = append(checkpoints, catalog.Checkpoint{Shard: c.Shard, Position: segment.Position{Timestamp: c.Cut, Opaque: c.Opaque}})
		}
	}
	return partitions, indexes, checkpoints
}

// validate reads back what prepare wrote.
func (l *leader) validate(ctx context.Context, job *Job, partitions, indexes, checkpoints int) error {
	view, err := l.o.Catalog.At(ctx, job.Target, 0)
	if err != nil {
		return err
	}
	from, to := meta.Prefix(keys.TaskPrefix(job.ID))
	tasks, err := l.kv.Range(ctx, meta.Range{From: from, To: to, Limit: 1, KeysOnly: true})
	if err != nil {
		return err
	}
	found := len(view.Checkpoints)
	if _, implicit := view.Checkpoints[0]; implicit && len(view.Collection.Channels) == 0 && checkpoints == 0 {
		found--
	}
	if len(view.Partitions) != partitions || len(view.Indexes) != indexes || found != checkpoints || tasks.Count != job.Tasks {
		return fmt.Errorf("job %s: the target has %d partitions, %d indexes, %d checkpoints and %d tasks, not %d, %d, %d and %d",
			job, len(view.Partitions), len(view.Indexes), found, tasks.Count, partitions, indexes, checkpoints, job.Tasks)
	}
	return nil
}

// batches cuts ops into parts for one transaction each.
func batches(ops []meta.Op) [][]meta.Op {
	var parts [][]meta.Op
	from, bytes := 0, 0
	for i, op := range ops {
		n := len(op.From) + len(op.Value)
		if i > from && (i-from == batchOps || bytes+n > batchBytes) {
			parts, from, bytes = append(parts, ops[from:i:i]), i, 0
		}
		bytes += n
	}
	if from < len(ops) {
		parts = append(parts, ops[from:])
	}
	return parts
}

// assign gives tasks to workers as long as there is room, and returns the room
// that is left.
func (l *leader) assign(ctx context.Context, d decision, slots []slot) ([]slot, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	tasks := slices.DeleteFunc(d.tasks, func(t *task) bool { return l.assignedRevisions[d.job.ID][t.number] == t.revision })
	for len(tasks) > 0 && len(slots) > 0 {
		w := &slots[0]
		even := (len(tasks) + len(slots) - 1) / len(slots)
		n := min(even, w.free, assignBatch)
		if err := l.assignTo(ctx, d.job, tasks[:n], w); err != nil {
			if errors.Is(err, errChanged) { // the board is behind, or the worker is gone
				return slots[1:], nil
			}
			return slots, err
		}
		tasks = tasks[n:]
		if w.free -= n; w.free == 0 {
			slots = slots[1:]
		} else { // spread over the workers
			slots = append(slots[1:], *w)
		}
	}
	return slots, nil
}

func (l *leader) assignTo(ctx context.Context, job *Job, tasks []*task, w *slot) error {
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	conds := []meta.Cond{meta.SameKey(keys.Worker(w.id), w.create)}
	var ops []meta.Op
	for _, t := range tasks {
		next := *t
		next.state, next.attempt, next.worker = TaskRunning, t.attempt+1, w.id
		conds = append(conds, meta.Unchanged(t.key(), t.revision))
		if t.state == TaskRunning && t.worker != w.id {
			conds = append(conds, meta.Absent(keys.Assignment(t.worker, t.job, t.number)))
		}
		key := keys.Assignment(w.id, t.job, t.number)
		conds = append(conds, meta.Absent(key))
		ops = append(ops, meta.Put(t.key(), next.encode(op)),
			meta.PutLeased(key, record.Encode(&storagev1.Assignment{Format: record.Format, Attempt: next.attempt}), w.lease))
	}
	err = l.write(ctx, "restore.assign", job, conds, ops)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		return errChanged
	}
	if err == nil {
		if l.assignedRevisions[job.ID] == nil {
			l.assignedRevisions[job.ID] = map[int64]int64{}
		}
		for _, t := range tasks {
			l.assignedRevisions[job.ID][t.number] = t.revision
		}
	}
	return err
}

// publish makes the target visible, and ends the job.
func (l *leader) publish(ctx context.Context, d decision) error {
	col, err := l.o.Catalog.Collection(ctx, catalog.Ref{ID: d.job.Target})
	if err != nil {
		return err
	}
	if col.State != catalog.Restoring || col.Job != d.job.ID {
		return fmt.Errorf("collection %s is %v by job %d, not being restored by %d", &col, col.State, col.Job, d.job.ID)
	}
	next := *d.job
	next.State, next.Phase, next.EndTime, next.Done, next.Retries = Completed, Publish, l.o.Clock.Display(), d.done, d.retries
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	err = l.endJob(ctx, "restore.publish", d.job, &next, op,
		[]meta.Cond{meta.Unchanged(keys.Collection(col.ID), col.Revision)},
		[]meta.Op{catalog.PublishOp(col, op)})
	if err == nil {
		l.log.Info("restore is completed", zap.Int64("job", d.job.ID), zap.Int64("collection", col.ID), zap.String("name", col.Name),
			zap.Int64("files", d.done.Files), zap.Int64("bytes", d.done.Bytes))
	}
	return err
}

// end moves the job to its final state, with all that goes with it.
func (l *leader) endJob(
	ctx context.Context, step string, job, next *Job, op string, conds []meta.Cond, ops []meta.Op,
) error {
	ops = append(ops, meta.Put(keys.Job(job.ID), next.Encode(op)), meta.Delete(keys.JobLimits(job.ID)),
		meta.Delete(keys.Pin(job.Snapshot, job.Pin)),
		// So that nobody takes it for a pin that expired.
		meta.Put(keys.Unpin, record.Encode(&storagev1.Unpin{Format: record.Format, SnapshotId: job.Snapshot, PinId: job.Pin})))
	for _, prefix := range []string{keys.TaskPrefix(job.ID), keys.ProgressPrefix(job.ID)} {
		from, to := meta.Prefix(prefix)
		ops = append(ops, meta.DeleteRange(from, to))
	}
	var lease request.Lease
	if job.RequestKey != "" {
		kv, found, _, err := l.kv.Get(ctx, job.RequestKey)
		if err != nil {
			return err
		}
		if found {
			if lease, err = l.o.Requests.Get(ctx); err != nil {
				return err
			}
			rec, err := request.Ended(kv, lease, next.Encode(op))
			if err != nil {
				return err
			}
			conds = append(conds, meta.Unchanged(kv.Key, kv.ModRevision))
			ops = append(ops, rec)
		}
	}
	err := l.write(ctx, step, job, conds, ops)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		l.o.Requests.Forget(ctx, lease)
	}
	return err
}

// rollBack removes all that was made of the target, and ends the job. The workers
// have stopped; what one that was frozen may still copy lies under ids that are
// never used again.
func (l *leader) rollBack(ctx context.Context, job *Job) error {
	// The board may not show yet what was assigned last. From now on nothing is.
	if _, err := l.table.workerFollower.Sync(ctx); err != nil {
		return err
	}
	if l.table.hasAssignments(job.ID) {
		return errChanged
	}
	foreign, err := l.removeObjects(ctx, job)
	if err != nil {
		return err
	}
	if err := l.removePins(ctx, job); err != nil {
		return err
	}
	for _, op := range l.deleteContentOps(job) {
		if err := l.write(ctx, "restore.content", job, nil, []meta.Op{op}); err != nil {
			return err
		}
	}
	next := *job
	next.State, next.EndTime = job.Outcome, l.o.Clock.Display()
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	err = l.endJob(ctx, "restore.end", job, &next, op, nil, append(catalog.ReleaseRoots(job.Target, job.Roots),
		meta.Delete(keys.Collection(job.Target)), meta.Delete(keys.CollectionName(job.DB, job.Name)),
	))
	if err == nil {
		l.log.Info("restore is rolled back", zap.Int64("job", job.ID), zap.Stringer("state", next.State), zap.String("reason", job.Reason),
			zap.Int64("foreign_objects_left", foreign))
	}
	return err
}

// contentOf is what deletes the target's keys, in steps that are small enough.
func (l *leader) deleteContentOps(job *Job) []meta.Op {
	var ops []meta.Op
	for first := job.FirstSegment; first < job.FirstSegment+job.Segments; first += deleteSpan {
		last := min(first+deleteSpan, job.FirstSegment+job.Segments) - 1
		ops = append(ops, meta.DeleteRange(keys.Span(keys.SegmentPrefix(job.Target), first, last)),
			meta.DeleteRange(keys.OwnerSegments(first, last)))
	}
	for first := job.FirstBuild; first < job.FirstBuild+job.Builds; first += deleteSpan {
		last := min(first+deleteSpan, job.FirstBuild+job.Builds) - 1
		ops = append(ops, meta.DeleteRange(keys.OwnerBuilds(first, last)))
	}
	return append(ops, catalog.ContentRanges(job.Target)...)
}
