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

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// worker runs tasks on this replica. Each registration has an id and a lease of its own;
// when the lease is lost, all its tasks end and the worker registers again.
type worker struct {
	o         *Options
	table     *jobTable
	limiter   *limiter
	manifests *manifestCache
	failing   *lasting.Problem

	refusals atomic.Int64 // attempts that a store refused

	mu      sync.Mutex
	budgets map[int64]*budget // by job
	warned  map[int64]bool    // jobs whose first refusal is logged
}

func newWorker(o *Options, table *jobTable) *worker {
	read := func(ctx context.Context, snapshot int64, number int) ([]segment.Segment, error) {
		return readManifest(ctx, o.Snapshots, snapshot, number)
	}
	return &worker{
		o: o, table: table, limiter: newLimiter(o.CopyInFlight), manifests: newManifestCache(read),
		budgets: map[int64]*budget{}, warned: map[int64]bool{},
		failing: o.Problems.Add(o.Log, "restore worker", "restore worker failed and registers again", ""),
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
	// The times of attempts are of Display: with the host's clock, a day behind, the second attempt
	// would seem to have waited for a day. A store that does not respond now does not stop the worker.
	_ = w.o.Clock.Ensure(ctx)
	backoff := meta.Backoff{Rand: w.o.Jitter}
	ready := func() {
		backoff.Reset()
		w.failing.Passed()
	}
	for {
		err := w.serve(ctx, ready)
		if ctx.Err() != nil {
			return
		}
		w.failing.Failed(err)
		if backoff.Wait(ctx) != nil {
			return
		}
	}
}

// serve registers a worker and runs its tasks until ctx ends or the lease may be lost. It
// calls ready once the worker is registered.
func (w *worker) serve(ctx context.Context, ready func()) error {
	id, err := w.newID()
	if err != nil {
		return err
	}
	start := time.Now() // before the grant: our view of the lease ends before the store's
	lease, err := w.o.KV.Grant(ctx, w.o.WorkerTTL)
	if err != nil {
		return err
	}
	defer func() {
		// The assignments end with the lease, so that others need not wait for its end.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = w.o.KV.Revoke(ctx, lease) // on failure it expires
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
		return fmt.Errorf("worker id %d is taken", id)
	}
	ready()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return w.keepAlive(ctx, lease, start) })
	runner := &taskRunner{worker: w, ctx: ctx, group: group, tasks: map[string]*runningTask{}}
	from, to := meta.Prefix(keys.AssignmentPrefix(id))
	follower := follow.New(follow.Options{
		KV: w.o.KV, From: from, To: to, Handler: runner, Log: w.o.Log, Rand: w.o.Jitter, Problems: w.o.Problems,
		Name: "assignments",
	})
	group.Go(func() error { return follower.Run(ctx) })
	group.Go(func() error { return runner.watchJobs(ctx) })
	return group.Wait()
}

// newID returns a random id.
func (w *worker) newID() (int64, error) {
	b := make([]byte, 8)
	if _, err := io.ReadFull(w.o.Rand, b); err != nil {
		return 0, fmt.Errorf("generate worker id: %w", err)
	}
	return int64(binary.BigEndian.Uint64(b)>>1) | 1, nil //nolint:gosec // 63 bits
}

// keepAlive renews the lease, and returns an error when it may be lost. It does so some
// time before the lease expires, so that the worker's copies are over when others see its
// assignments expire. granted is when the grant was requested.
func (w *worker) keepAlive(ctx context.Context, lease meta.LeaseID, granted time.Time) error {
	validFor, interval := w.o.WorkerTTL*4/5, w.o.WorkerTTL/4
	validUntil := granted.Add(validFor)
	timer := time.NewTimer(interval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		now := time.Now()
		if !now.Before(validUntil) {
			return errors.New("worker lease may be lost: not renewed in time")
		}
		err := w.renew(ctx, lease, now.Add(min(interval, validUntil.Sub(now))))
		switch {
		case err == nil:
			validUntil = now.Add(validFor)
		case errors.Is(err, meta.ErrLeaseNotFound):
			return fmt.Errorf("worker lease is lost: %w", err)
		}
		timer.Reset(min(time.Until(now.Add(interval)), time.Until(validUntil)))
	}
}

func (w *worker) renew(ctx context.Context, lease meta.LeaseID, until time.Time) error {
	ctx, cancel := context.WithDeadline(ctx, until)
	defer cancel()
	return w.o.KV.KeepAlive(ctx, lease)
}

// budget returns the budget of a job on this replica. read are its limits in the store.
func (w *worker) budget(job int64, read Limits) *budget {
	w.mu.Lock()
	defer w.mu.Unlock()
	b := w.budgets[job]
	if b == nil {
		if len(w.budgets) >= maxBudgets { // most are of ended jobs
			clear(w.budgets)
		}
		b = newBudget(func() Limits { return w.table.rateShare(job, read) })
		w.budgets[job] = b
	}
	return b
}

// logFailure logs the error of an attempt. A refusal that may pass is counted, and only
// the first one of each job is a warning.
func (w *worker) logFailure(log *zap.Logger, job int64, err error) {
	if !isRefused(err) {
		log.Warn("restore task failed", zap.Error(err))
		return
	}
	w.refusals.Add(1)
	w.mu.Lock()
	repeated := w.warned[job]
	if len(w.warned) >= maxBudgets { // most are of ended jobs
		clear(w.warned)
	}
	w.warned[job] = true
	w.mu.Unlock()
	if repeated {
		log.Debug("object store refuses restore task again", zap.Error(err))
		return
	}
	log.Warn("object store refuses restore task, retrying; further refusals of this restore are only counted",
		zap.Duration("for", w.o.RefusalTimeout), zap.Error(err))
}
