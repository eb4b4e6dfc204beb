package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// How snapshots are removed.
const (
	removesInFlight = 8   // snapshots removed concurrently
	removeBatch     = 500 // objects per delete call

	tokenInterval = time.Hour // between two passes over request tokens
	tokensAtOnce  = 100       // deleted in one transaction
)

// cleaner is the leader's loop over snapshots: it abandons creates that died, drops
// expired snapshots and removes dropped ones. A failure of one of the three does not
// stop the others. Removal runs last because it can take long.
type cleaner struct {
	m    *Manager
	wake chan struct{} // size one
	// nextTokens is when request tokens are next checked, on the clock's elapsed time.
	// Only Run uses it.
	nextTokens time.Duration

	reading, reaping, expiring, removing, tokenEnds *lasting.Problem
}

func newCleaner(m *Manager) *cleaner {
	add := func(name, text, stops string) *lasting.Problem { return m.o.Problems.Add(m.log, name, text, stops) }
	return &cleaner{
		m: m, wake: make(chan struct{}, 1),
		reading:   add("clean", "snapshots not read, retrying", "expiry and removal of snapshots"),
		reaping:   add("reap", "dead creates not abandoned, retrying", "removal of creates that died"),
		expiring:  add("expire", "snapshots and pins not expired, retrying", "expiry of snapshots and pins"),
		removing:  add("remove", "dropped snapshots not removed, retrying", "removal of dropped snapshots"),
		tokenEnds: add("tokens", "expired request tokens not removed, retrying", ""),
	}
}

// Wake makes Run start a pass soon. It never blocks.
func (c *cleaner) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run makes a pass at once, then after each Wake, at the next expiry, and after each
// interval, until ctx ends. Errors are logged and retried in a later pass.
func (c *cleaner) Run(ctx context.Context, term election.Term) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	c.nextTokens = c.m.clock.Elapsed() + c.m.o.CleanInterval
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-c.wake:
		}
		next, err := c.Pass(ctx, term.Fence())
		if c.m.clock.Elapsed() >= c.nextTokens {
			c.nextTokens = c.m.clock.Elapsed() + tokenInterval
			err = errors.Join(err, observe(ctx, c.tokenEnds, c.expireTokens(ctx, term.Fence())))
		}
		if err != nil && ctx.Err() == nil {
			if !errors.Is(err, clock.ErrUntrusted) { // recovery takes an operator or a day
				next = min(next, c.m.o.CleanInterval/10)
			}
		}
		timer.Reset(next)
	}
}

// Pass handles every snapshot once, and returns the time until the next pass. Every
// write compares fence.
func (c *cleaner) Pass(ctx context.Context, fence meta.Cond) (next time.Duration, err error) {
	if err := observe(ctx, c.reading, c.m.view.sync(ctx)); err != nil {
		return c.m.o.CleanInterval, err
	}
	deleting, dead, expiring, _ := c.m.view.work()
	var reaped []error
	for _, s := range dead {
		reaped = append(reaped, c.reap(ctx, s, fence))
	}
	pinsNext, pinsErr := c.expirePins(ctx, c.m.view.expiringPins(), fence)
	next, err = c.expire(ctx, expiring, fence)
	return min(next, pinsNext), object.Join(
		observe(ctx, c.reaping, object.Join(reaped...)),
		observe(ctx, c.expiring, object.Join(pinsErr, err)),
		observe(ctx, c.removing, object.Join(c.removeAll(ctx, deleting, fence)...)),
	)
}

// observe records err in p unless ctx has ended, and returns err.
func observe(ctx context.Context, p *lasting.Problem, err error) error {
	if ctx.Err() == nil {
		p.Note(err)
	}
	return err
}

// reap abandons a create whose pending key expired with its lease.
func (c *cleaner) reap(ctx context.Context, s *snapshot.Record, fence meta.Cond) error {
	err := c.m.abandon(ctx, s, fence)
	switch {
	case errors.Is(err, errChanged): // it is alive or has ended: the view will show it
		return nil
	case err != nil:
		return fmt.Errorf("reap snapshot %s: %w", s, err)
	}
	c.m.log.Info("snapshot abandoned: its creator is gone", zap.Int64("snapshot", s.ID), zap.String("name", s.Name))
	return nil
}

// expirePins removes the pins that expired but whose leases still exist, and returns
// the time until the next expiry.
func (c *cleaner) expirePins(ctx context.Context, pins []*Pin, fence meta.Cond) (time.Duration, error) {
	next := c.m.o.CleanInterval
	if len(pins) == 0 {
		return next, nil
	}
	now, err := c.m.clock.Judge(ctx)
	if err != nil {
		return next, fmt.Errorf("pins expire only with their leases: %w", err)
	}
	var expired []*Pin
	for _, p := range pins {
		if left := p.ExpireTime.Sub(now); left > 0 {
			next = min(next, max(left, time.Second))
		} else {
			expired = append(expired, p)
		}
	}
	return next, c.m.removeExpiredPins(ctx, expired, fence)
}

// expireTokens removes the records of request tokens that expired but whose leases still
// exist. It reads all of them, page by page, and therefore runs rarely.
func (c *cleaner) expireTokens(ctx context.Context, fence meta.Cond) error {
	now, err := c.m.clock.Judge(ctx)
	if err != nil {
		return fmt.Errorf("request tokens expire only with their leases: %w", err)
	}
	removed := 0
	from, to := meta.Prefix(keys.RequestPrefix)
	_, err = c.m.kv.Scan(ctx, from, to, 0, func(page []meta.KeyValue) error {
		var expired []meta.KeyValue
		for _, kv := range page {
			if is, err := request.Expired(kv, now); err == nil && is { // an unreadable one expires with its lease
				expired = append(expired, kv)
			}
		}
		for part := range slices.Chunk(expired, tokensAtOnce) {
			txn := meta.Txn{If: []meta.Cond{fence}}
			for _, kv := range part {
				txn.If = append(txn.If, meta.Unchanged(kv.Key, kv.ModRevision))
				txn.Then = append(txn.Then, meta.Delete(kv.Key))
			}
			res, err := c.m.kv.Txn(ctx, txn)
			if err != nil {
				return err
			}
			if res.Succeeded { // else the lease of one expired: the next pass removes the others
				removed += len(part)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove expired request tokens: %w", err)
	}
	if removed > 0 {
		c.m.log.Info("expired request tokens removed", zap.Int("tokens", removed))
	}
	return nil
}

// expire drops the snapshots that expired by the trusted reading, and returns the time
// until the next expiry.
func (c *cleaner) expire(ctx context.Context, snapshots []*snapshot.Record, fence meta.Cond) (time.Duration, error) {
	next := c.m.o.CleanInterval
	if len(snapshots) == 0 {
		return next, nil
	}
	now, err := c.m.clock.Judge(ctx)
	if err != nil {
		return next, fmt.Errorf("nothing expires: %w", err)
	}
	var errs []error
	for _, s := range snapshots {
		if left := s.ExpireTime.Sub(now); left > 0 {
			next = min(next, max(left, time.Second))
			continue
		}
		txn, err := c.m.dropTxn(s)
		if err != nil {
			return next, err
		}
		txn.If = append(txn.If, fence)
		txn.Name = "drop.expire"
		res, err := c.m.kv.Txn(ctx, txn)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("expire snapshot %s: %w", s, err))
		case res.Succeeded:
			c.m.log.Info("snapshot expired", zap.Int64("snapshot", s.ID), zap.String("name", s.Name))
		} // else it is pinned, it changed, or another replica leads: the next pass decides
	}
	return next, object.Join(errs...)
}

// removeAll removes snapshots, removesInFlight concurrently, for at most one interval:
// a store that hangs does not delay the next pass further. The errors are by snapshot.
func (c *cleaner) removeAll(ctx context.Context, snapshots []*snapshot.Record, fence meta.Cond) []error {
	ctx, cancel := context.WithTimeout(ctx, c.m.o.CleanInterval)
	defer cancel()
	errs := make([]error, len(snapshots))
	var group errgroup.Group
	group.SetLimit(removesInFlight)
	for i, s := range snapshots {
		group.Go(func() error {
			errs[i] = c.remove(ctx, s, fence)
			return nil
		})
	}
	_ = group.Wait() // always nil: the errors are in errs
	return errs
}

// remove deletes a dropped snapshot's own objects and then its record. The record stays
// while any of them may exist. Foreign objects under the same prefix are kept.
func (c *cleaner) remove(ctx context.Context, s *snapshot.Record, fence meta.Cond) error {
	store, ok := c.m.o.Stores[s.Store]
	if !ok {
		return fmt.Errorf("remove snapshot %s: its objects are in store %q, which is not configured here", s, s.Store)
	}
	foreign, err := c.removeObjects(ctx, store, s)
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", s, err)
	}
	res, err := c.m.kv.Txn(ctx, meta.Txn{
		Name: "drop.record",
		If:   []meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision), fence},
		Then: []meta.Op{meta.Delete(keys.Snapshot(s.ID))},
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", s, err)
	}
	if res.Succeeded {
		c.m.log.Info("snapshot removed", zap.Int64("snapshot", s.ID), zap.String("name", s.Name),
			zap.Int("foreign_objects_left", foreign))
	}
	return nil
}

// removeObjects deletes the objects with names that snapshotd assigns, and returns the
// number of others.
func (c *cleaner) removeObjects(ctx context.Context, store object.Store, s *snapshot.Record) (foreign int, err error) {
	var batch []string
	var bytes int64
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		err := store.Delete(ctx, batch...)
		if err != nil {
			return err
		}
		c.m.gc.Counters().Add(gc.BySnapshot, int64(len(batch)), bytes)
		batch, bytes = batch[:0], 0
		return nil
	}
	dir := manifest.Dir(s.Collection, s.ID)
	for info, err := range store.List(ctx, dir) {
		if err != nil {
			return 0, err
		}
		if !manifest.IsFileName(info.Key[len(dir):]) {
			foreign++
			continue
		}
		batch, bytes = append(batch, info.Key), bytes+info.Size
		if len(batch) < removeBatch {
			continue
		}
		if err := flush(); err != nil {
			return 0, err
		}
	}
	return foreign, flush()
}
