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

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

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
