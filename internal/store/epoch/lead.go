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

// Lead has work done by the leader for as long as the metadata store is not behind.
// It checks and beats first, and then each interval; work begins when the check has
// passed. When it finds the store behind,
// or another has, it ends the context of work and waits for it to return; once the
// store has recovered it checks again, and calls work anew. It returns when ctx
// ended, or with what work returned before that.
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
		err := e.pass(ctx)
		if err == nil {
			e.unknown.Passed()
			e.stops.Passed()
			err = e.whileFine(ctx, changed, work)
			if !errors.Is(err, ErrBehind) {
				return err
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrBehind):
			e.stops.Failed(err)
		default:
			wait /= 10
			e.unknown.Failed(err)
		}
		timer.Reset(wait)
	}
}

// pass checks and beats. That a beat failed is no error, unless for an ErrBehind: a
// store that is full takes none, and has to be cleaned.
func (e *Epoch) pass(outer context.Context) error {
	ctx, cancel := context.WithTimeout(outer, e.o.Interval)
	defer cancel()
	if err := e.Check(ctx); err != nil {
		return err
	}
	err := e.Beat(ctx)
	if err != nil && !errors.Is(err, ErrBehind) {
		if ctx.Err() == nil || outer.Err() == nil {
			e.beats.Failed(err)
		}
		return nil
	}
	if err == nil {
		e.beats.Passed()
	}
	return err
}

// whileFine calls work, and ends it with an ErrBehind when the store is found to be
// behind. It returns when work has.
func (e *Epoch) whileFine(ctx context.Context, changed <-chan struct{}, work func(ctx context.Context) error) error {
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
			err = e.pass(ctx)
		case <-changed:
			var behind error
			if behind, err = e.Behind(ctx); behind != nil {
				err = behind
			}
		}
		switch {
		case err == nil:
			e.leads.Passed()
		case ctx.Err() != nil: // the end of ctx ends work
		case errors.Is(err, ErrBehind):
			cancel()
			if ended := <-done; ended != nil && !errors.Is(ended, context.Canceled) {
				e.o.Log.Warn("the leader's work ended with an error", zap.Error(ended))
			}
			return err
		default:
			e.leads.Failed(err)
		}
	}
}

// watch tells changed when /behind may have come or gone, until ctx ends.
func (e *Epoch) watch(ctx context.Context, changed chan<- struct{}) {
	backoff := meta.Backoff{Rand: e.o.Jitter}
	for {
		_, _, revision, err := e.o.KV.Get(ctx, keys.Behind)
		if err == nil {
			e.watchFrom(ctx, revision, changed, &backoff)
		}
		if backoff.Wait(ctx) != nil {
			return
		}
	}
}

// watchFrom is watch until the watch ends.
func (e *Epoch) watchFrom(ctx context.Context, revision int64, changed chan<- struct{}, backoff *meta.Backoff) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	w := e.o.KV.Watch(ctx, keys.Behind, keys.Behind+"\x00", revision)
	for {
		select { // also at first: it may have changed before
		case changed <- struct{}{}:
		default:
		}
		if _, err := w.Next(); err != nil {
			return
		}
		backoff.Reset()
	}
}
