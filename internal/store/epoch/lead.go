package epoch

import (
	"context"
	"errors"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Lead runs the leader's work until ctx ends or a metadata rollback is detected. It
// checks and sends a heartbeat first, and then each interval; work starts after the
// first check has passed. On a rollback, also one that another replica detects, Lead
// cancels the context of work and waits for its return; after the recovery it checks
// again and restarts work. It returns when ctx ends, or else with the result of work.
func (e *Epoch) Lead(ctx context.Context, work func(ctx context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	changed := make(chan struct{}, 1)
	var group errgroup.Group
	group.Go(func() error { e.watch(ctx, changed); return nil })
	group.Go(func() error {
		defer cancel()
		return e.lead(ctx, changed, work)
	})
	return group.Wait()
}

func (e *Epoch) lead(ctx context.Context, changed <-chan struct{}, work func(ctx context.Context) error) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-changed:
		}
		wait := e.o.Interval
		err := e.checkAndHeartbeat(ctx)
		if err == nil {
			e.unknown.Passed()
			e.stops.Passed()
			err = e.runUntilRollback(ctx, changed, work)
			if !errors.Is(err, ErrRolledBack) {
				return err
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrRolledBack):
			e.stops.Failed(err)
		default:
			wait /= 10
			e.unknown.Failed(err)
		}
		timer.Reset(wait)
	}
}

// checkAndHeartbeat checks and sends a heartbeat. It reports a failed heartbeat, but
// returns its error only on an ErrRolledBack: a full metadata store accepts none, and the
// leader must work to free its space.
func (e *Epoch) checkAndHeartbeat(outer context.Context) error {
	ctx, cancel := context.WithTimeout(outer, e.o.Interval)
	defer cancel()
	if err := e.Check(ctx); err != nil {
		return err
	}
	err := e.Heartbeat(ctx)
	if err != nil && !errors.Is(err, ErrRolledBack) {
		if ctx.Err() == nil || outer.Err() == nil {
			e.heartbeats.Failed(err)
		}
		return nil
	}
	if err == nil {
		e.heartbeats.Passed()
	}
	return err
}

// runUntilRollback runs work, and cancels it with an ErrRolledBack on a rollback. It
// returns after work has returned.
func (e *Epoch) runUntilRollback(
	ctx context.Context, changed <-chan struct{}, work func(ctx context.Context) error,
) error {
	workCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- work(workCtx) }()
	ticker := time.NewTicker(e.o.Interval)
	defer ticker.Stop()
	for {
		var err error
		select {
		case err := <-done:
			return err
		case <-ticker.C:
			err = e.checkAndHeartbeat(ctx)
		case <-changed:
			var rolledBack error
			if rolledBack, err = RolledBack(ctx, e.o.KV); rolledBack != nil {
				err = rolledBack
			}
		}
		switch {
		case err == nil:
			e.leads.Passed()
		case ctx.Err() != nil: // the end of ctx ends work
		case errors.Is(err, ErrRolledBack):
			cancel()
			if workErr := <-done; workErr != nil && !errors.Is(workErr, context.Canceled) {
				e.o.Log.Warn("the leader's work ended with an error", zap.Error(workErr))
			}
			return err
		default:
			e.leads.Failed(err)
		}
	}
}

// watch signals changed when /behind may have been put or deleted, until ctx ends.
func (e *Epoch) watch(ctx context.Context, changed chan<- struct{}) {
	backoff := meta.Backoff{Rand: e.o.Jitter}
	for {
		_, _, revision, err := e.o.KV.Get(ctx, keys.RolledBack)
		if err == nil {
			e.watchFrom(ctx, revision, changed, &backoff)
		}
		if backoff.Wait(ctx) != nil {
			return
		}
	}
}

// watchFrom signals changed at the start and at each change of /behind after revision. It
// returns when its watch ends.
func (e *Epoch) watchFrom(ctx context.Context, revision int64, changed chan<- struct{}, backoff *meta.Backoff) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := e.o.KV.Watch(ctx, keys.RolledBack, keys.RolledBack+"\x00", revision)
	for {
		select { // also at the start: the key may have changed before
		case changed <- struct{}{}:
		default:
		}
		if _, err := w.Next(); err != nil {
			return
		}
		backoff.Reset()
	}
}
