package copyjob

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Get returns a job with its progress, which includes all changes that precede the call.
// It is ErrJobNotFound when there is none.
func (j *Jobs) Get(ctx context.Context, id int64) (*Status, error) {
	if err := j.table.sync(ctx); err != nil {
		return nil, fmt.Errorf("restore job %d: %w", id, err)
	}
	s, _ := j.table.statusOf(id)
	if s == nil {
		return nil, fmt.Errorf("%w: %d", ErrJobNotFound, id)
	}
	return s, nil
}

// Watch calls fn with a job at each change of its record, and with its progress at most
// once per interval, until fn was called with its final state. It ends with ctx and with
// fn's first error.
func (j *Jobs) Watch(ctx context.Context, id int64, interval time.Duration, fn func(*Status) error) error {
	s, err := j.Get(ctx, id)
	if err != nil {
		return err
	}
	for {
		if err := fn(s); err != nil || s.Job.State.Ended() {
			return err
		}
		if s, err = j.waitForChange(ctx, s, interval); err != nil {
			return err
		}
	}
}

// waitForChange waits for a change that Watch reports.
func (j *Jobs) waitForChange(ctx context.Context, reported *Status, interval time.Duration) (*Status, error) {
	timer := time.NewTimer(interval)
	defer timer.Stop()
	waited := false
	for {
		s, changed := j.table.statusOf(reported.Job.ID)
		switch {
		case s == nil:
			return nil, fmt.Errorf("%w: %d", ErrJobNotFound, reported.Job.ID)
		case s.Job.Revision != reported.Job.Revision, waited && !s.sameProgress(reported):
			return s, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		case <-timer.C:
			waited = true
		}
	}
}

// Filter selects jobs. Zero fields do not filter.
type Filter struct {
	Snapshot int64
	DB       string
	States   []State
	Labels   map[string]string
}

func (f *Filter) match(job *Job) bool {
	for k, v := range f.Labels {
		if got, ok := job.Labels[k]; !ok || got != v {
			return false
		}
	}
	return (f.Snapshot == 0 || job.Snapshot == f.Snapshot) && (f.DB == "" || job.DB == f.DB) &&
		(len(f.States) == 0 || slices.Contains(f.States, job.State))
}

// List returns up to limit jobs that match, newest first, with ids below after (0: from
// the newest), and whether more exist.
func (j *Jobs) List(ctx context.Context, f Filter, after int64, limit int) (list []*Status, more bool, err error) {
	if err := j.table.sync(ctx); err != nil {
		return nil, false, fmt.Errorf("list restore jobs: %w", err)
	}
	jt := j.table
	jt.mu.Lock()
	defer jt.mu.Unlock()
	var states []*jobState
	for id, js := range jt.states {
		if js.job != nil && (after == 0 || id < after) && f.match(js.job) {
			states = append(states, js)
		}
	}
	slices.SortFunc(states, func(x, y *jobState) int { return cmp.Compare(y.job.ID, x.job.ID) })
	for _, js := range states {
		if len(list) == limit {
			return list, true, nil
		}
		list = append(list, jt.status(js))
	}
	return list, false, nil
}

// Cancel gives a job up. When it returns nil, the target never becomes visible; it is
// removed in the background. A job that is FAILED or CANCELED, or is rolled back, is
// unchanged. A COMPLETED one is ErrEnded.
func (j *Jobs) Cancel(ctx context.Context, id int64) (*Status, error) {
	_, err := request.Do(ctx, j.kv, request.Token{}, func(ctx context.Context) (request.Commit, error) {
		job, err := j.read(ctx, id)
		if err != nil {
			return nil, err
		}
		switch {
		case job.State == Completed:
			return nil, fmt.Errorf("%w: job %s is COMPLETED; drop the collection instead", ErrEnded, job)
		case job.State.Ended(), job.Phase == RollBack:
			return func(context.Context) (bool, error) { return true, nil }, nil
		}
		op, err := record.NewOp(j.o.Rand)
		if err != nil {
			return nil, err
		}
		d := decision{outcome: Canceled, reason: "CANCELED", message: "it was canceled", job: job}
		if s, _ := j.table.statusOf(id); s != nil {
			d.done, d.retries = s.Done, s.Retries
		}
		next := abortedJob(d, j.o.Clock.Display())
		return j.commit(job, "cancel restore job", meta.Txn{
			Name: "restore.cancel",
			If:   []meta.Cond{job.unchanged()},
			Then: []meta.Op{meta.Put(keys.Job(id), next.Encode(op))},
		}), nil
	})
	if errors.Is(err, meta.ErrConflict) {
		err = fmt.Errorf("cancel restore job %d: %w", id, err)
	}
	if err != nil {
		return nil, err
	}
	return j.Get(ctx, id)
}

// SetLimits changes the limits of a job. Its workers apply them at once.
func (j *Jobs) SetLimits(ctx context.Context, id int64, l Limits) (*Status, error) {
	_, err := request.Do(ctx, j.kv, request.Token{}, func(ctx context.Context) (request.Commit, error) {
		job, err := j.read(ctx, id)
		if err != nil {
			return nil, err
		}
		if job.State.Ended() || job.Phase == RollBack {
			return nil, fmt.Errorf("%w: job %s is %v, in phase %v", ErrEnded, job, job.State, job.Phase)
		}
		return j.commit(job, "change the limits of restore job", meta.Txn{
			If: []meta.Cond{job.unchanged()}, Then: []meta.Op{LimitsOp(id, l)},
		}), nil
	})
	if errors.Is(err, meta.ErrConflict) {
		err = fmt.Errorf("change the limits of restore job %d: %w", id, err)
	}
	if err != nil {
		return nil, err
	}
	return j.Get(ctx, id)
}

// commit returns the commit of a transaction on a job.
func (j *Jobs) commit(job *Job, action string, txn meta.Txn) request.Commit {
	return func(ctx context.Context) (bool, error) {
		res, err := j.kv.Txn(ctx, txn)
		if err != nil {
			err = fmt.Errorf("%s %s: %w", action, job, err)
		}
		return res.Succeeded, err
	}
}

// LimitsOp returns the write of a job's limits.
func LimitsOp(job int64, l Limits) meta.Op {
	rec := &storagev1.JobLimits{Format: record.Format, Requests: l.Requests, Bytes: l.Bytes}
	return meta.Put(keys.JobLimits(job), record.Encode(rec))
}

func decodeLimits(kv meta.KeyValue) (Limits, error) {
	rec := &storagev1.JobLimits{}
	if err := record.Decode(kv, rec); err != nil {
		return Limits{}, err
	}
	return Limits{Requests: rec.GetRequests(), Bytes: rec.GetBytes()}, nil
}

// read reads a job from the metadata store.
func (j *Jobs) read(ctx context.Context, id int64) (*Job, error) {
	kv, found, _, err := j.kv.Get(ctx, keys.Job(id))
	if err != nil {
		return nil, fmt.Errorf("read restore job %d: %w", id, err)
	}
	if !found {
		return nil, fmt.Errorf("%w: %d", ErrJobNotFound, id)
	}
	return DecodeJob(kv)
}

// Workers returns the total number of concurrent tasks of all live workers.
func (j *Jobs) Workers() (slots int) {
	j.table.mu.Lock()
	defer j.table.mu.Unlock()
	for _, w := range j.table.workers {
		slots += w.slots
	}
	return slots
}

// Stats has the numbers of restores, for metrics.
type Stats struct {
	Jobs    map[State]int
	Workers int
	Running int // assigned tasks
	// Refusals is the number of attempts of this replica that a store refused in a way
	// that may pass.
	Refusals int64
}

// Stats returns the numbers of restores in this replica's table.
func (j *Jobs) Stats() Stats {
	j.table.mu.Lock()
	defer j.table.mu.Unlock()
	s := Stats{
		Jobs:    map[State]int{Pending: 0, Executing: 0, Completed: 0, Failed: 0, Canceled: 0},
		Workers: len(j.table.workers), Running: len(j.table.assignments), Refusals: j.worker.refusals.Load(),
	}
	for _, js := range j.table.states {
		if js.job != nil {
			s.Jobs[js.job.State]++
		}
	}
	return s
}

// Holds reports whether a pin belongs to a job that has not ended.
func (j *Jobs) Holds(ctx context.Context, snapshot, pin int64) (bool, error) {
	if err := j.table.sync(ctx); err != nil {
		return false, err
	}
	j.table.mu.Lock()
	defer j.table.mu.Unlock()
	for _, js := range j.table.states {
		if js.job != nil && js.job.Snapshot == snapshot && js.job.Pin == pin && !js.job.State.Ended() {
			return true, nil
		}
	}
	return false, nil
}
