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
	removesInFlight = 8   // snapshots at once
	removeBatch     = 500 // objects at a time

	tokenInterval = time.Hour // between looks at request tokens
	tokensAtOnce  = 100       // in one transaction
)

// cleaner is the leader's work on snapshots: it reaps creates that died, drops
// what expired and removes what is being deleted. Each of the three goes on
// when the others meet trouble, and the first two come before the third, which
// can take long.
type cleaner struct {
	m    *Manager
	wake chan struct{} // size one
	// tokens is when records of request tokens are looked at next, as elapsed; Run's
	// alone.
	tokens time.Duration

	looks, reaps, expires, removes, ends *lasting.Problem
}

func newCleaner(m *Manager) *cleaner {
	add := func(name, text, stops string) *lasting.Problem { return m.o.Problems.Add(m.log, name, text, stops) }
	return &cleaner{
		m: m, wake: make(chan struct{}, 1),
		looks:   add("clean", "the snapshots could not be read; it is tried again", "expiry and removal of snapshots"),
		reaps:   add("reap", "creates that died could not be given up; it is tried again", "removal of creates that died"),
		expires: add("expire", "snapshots and pins do not expire; it is tried again", "expiry of snapshots and pins"),
		removes: add("remove", "dropped snapshots could not be removed; it is tried again", "removal of dropped snapshots"),
		ends:    add("tokens", "records of request tokens could not be removed; it is tried again", ""),
	}
}

// Wake makes Run pass soon. It never blocks.
func (c *cleaner) Wake() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Run makes a pass at once, then after each Wake, when something expires, and
// after each interval, until ctx ends. Trouble is logged and met again later.
func (c *cleaner) Run(ctx context.Context, term election.Term) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	c.tokens = c.m.clock.Elapsed() + c.m.o.CleanInterval
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-c.wake:
		}
		next, err := c.Pass(ctx, term.Fence())
		if c.m.clock.Elapsed() >= c.tokens {
			c.tokens = c.m.clock.Elapsed() + tokenInterval
			err = errors.Join(err, noted(ctx, c.ends, c.endTokens(ctx, term.Fence())))
		}
		if err != nil && ctx.Err() == nil {
			if !errors.Is(err, clock.ErrUntrusted) { // which takes an operator, or a day
				next = min(next, c.m.o.CleanInterval/10)
			}
		}
		timer.Reset(next)
	}
}

// Pass looks at every snapshot once, and returns how long there is nothing more
// to do. Every write compares fence.
func (c *cleaner) Pass(ctx context.Context, fence meta.Cond) (next time.Duration, err error) {
	if err := noted(ctx, c.looks, c.m.view.sync(ctx)); err != nil {
		return c.m.o.CleanInterval, err
	}
	deleting, dead, expiring, _ := c.m.view.work()
	var reaped []error
	for _, s := range dead {
		reaped = append(reaped, c.reap(ctx, s, fence))
	}
	pinsNext, pinsErr := c.endPins(ctx, c.m.view.endingPins(), fence)
	next, err = c.expire(ctx, expiring, fence)
	return min(next, pinsNext), object.Join(
		noted(ctx, c.reaps, object.Join(reaped...)),
		noted(ctx, c.expires, object.Join(pinsErr, err)),
		noted(ctx, c.removes, object.Join(c.removeAll(ctx, deleting, fence)...)),
	)
}

// noted returns err, and has p take note of it unless ctx ended.
func noted(ctx context.Context, p *lasting.Problem, err error) error {
	if ctx.Err() == nil {
		p.Note(err)
	}
	return err
}

// reap gives up a create that died: its pending key went with its lease.
func (c *cleaner) reap(ctx context.Context, s *Snapshot, fence meta.Cond) error {
	err := c.m.abandon(ctx, s, fence)
	switch {
	case errors.Is(err, errChanged): // it lives, or has ended: the view will say
		return nil
	case err != nil:
		return fmt.Errorf("reap snapshot %s: %w", s, err)
	}
	c.m.log.Info("snapshot given up: its creator is gone", zap.Int64("snapshot", s.ID), zap.String("name", s.Name))
	return nil
}

// endPins removes the pins that are over and whose leases are not, and returns how
// long the next one has.
func (c *cleaner) endPins(ctx context.Context, pins []*Pin, fence meta.Cond) (time.Duration, error) {
	next := c.m.o.CleanInterval
	if len(pins) == 0 {
		return next, nil
	}
	now, err := c.m.clock.Judge(ctx)
	if err != nil {
		return next, fmt.Errorf("pins end with their leases alone: %w", err)
	}
	var over []*Pin
	for _, p := range pins {
		if left := p.ExpireTime.Sub(now); left > 0 {
			next = min(next, max(left, time.Second))
		} else {
			over = append(over, p)
		}
	}
	return next, c.m.endPins(ctx, over, fence)
}

// endTokens removes the records of request tokens that are over and whose leases are
// not. It reads all of them, a page at a time, so it is done seldom.
func (c *cleaner) endTokens(ctx context.Context, fence meta.Cond) error {
	now, err := c.m.clock.Judge(ctx)
	if err != nil {
		return fmt.Errorf("request tokens end with their leases alone: %w", err)
	}
	removed := 0
	from, to := meta.Prefix(keys.RequestPrefix)
	_, err = c.m.kv.Scan(ctx, from, to, 0, func(page []meta.KeyValue) error {
		var over []meta.KeyValue
		for _, kv := range page {
			if is, err := request.Expired(kv, now); err == nil && is { // one that cannot be read ends with its lease
				over = append(over, kv)
			}
		}
		for part := range slices.Chunk(over, tokensAtOnce) {
			txn := meta.Txn{If: []meta.Cond{fence}}
			for _, kv := range part {
				txn.If = append(txn.If, meta.Unchanged(kv.Key, kv.ModRevision))
				txn.Then = append(txn.Then, meta.Delete(kv.Key))
			}
			res, err := c.m.kv.Txn(ctx, txn)
			if err != nil {
				return err
			}
			if res.Succeeded { // else one of them went with its lease: the next look finds the others
				removed += len(part)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove request tokens that are over: %w", err)
	}
	if removed > 0 {
		c.m.log.Info("request tokens ended that outlived their day", zap.Int("tokens", removed))
	}
	return nil
}

// expire drops the snapshots whose time has come by the reading that lifetimes are
// judged by, and returns how long the next one has.
func (c *cleaner) expire(ctx context.Context, snapshots []*Snapshot, fence meta.Cond) (time.Duration, error) {
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
		} // else it is pinned, changed, or not ours to drop: the next pass sees
	}
	return next, object.Join(errs...)
}

// removeAll removes what is being deleted, several at once. A store that hangs
// does not hold up the next pass for longer than an interval.
func (c *cleaner) removeAll(ctx context.Context, snapshots []*Snapshot, fence meta.Cond) []error {
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
	_ = group.Wait() // each error has its place
	return errs
}

// remove deletes a dropped snapshot's own objects, and then its record. The
// record stays while one of them may be there; what somebody else has put beside
// them is left where it is.
func (c *cleaner) remove(ctx context.Context, s *Snapshot, fence meta.Cond) error {
	store, ok := c.m.o.Stores[s.Store]
	if !ok {
		return fmt.Errorf("remove snapshot %s: its objects lie in store %q, which is not configured here", s, s.Store)
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
		c.m.log.Info("snapshot removed", zap.Int64("snapshot", s.ID), zap.String("name", s.Name), zap.Int("foreign_objects_left", foreign))
	}
	return nil
}

// removeObjects deletes the objects with names that snapshotd gives, and returns
// how many others there are.
func (c *cleaner) removeObjects(ctx context.Context, store object.Store, s *Snapshot) (foreign int, err error) {
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
