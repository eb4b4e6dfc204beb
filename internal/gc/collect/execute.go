package collect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// execute executes the plan of one collection.
func (y *cycle) execute(ctx context.Context, p *plan) error {
	var spillErr error
	if len(p.unspilled) > 0 && y.spillConds != nil {
		var n int
		n, spillErr = y.c.gc.Spill(ctx, p.id, p.unspilled, y.spillConds)
		y.summary.Spilled += int64(n)
	}
	err := p.stopErr
	if err == nil {
		y.logStop(p)
		err = y.reportStop(p)
	}
	if err != nil || p.stopped {
		return errors.Join(spillErr, err)
	}
	granted, err := y.forBatches(ctx, p, y.grantBatch)
	if int64(len(p.eligible)+len(p.inPlace)) < p.reclaimable && granted > 0 {
		y.more = true
	}
	if err := errors.Join(spillErr, err); err != nil {
		return err
	}
	if !p.expired || p.units > 0 {
		return nil
	}
	return y.finishCollection(ctx, p)
}

// logStop logs a new or changed stop.
func (y *cycle) logStop(p *plan) {
	if !y.c.stops.update(p.stop, p.stopped) {
		return
	}
	y.c.log.Warn("gc cycle stopped in a collection: it would delete too much; "+
		"check with `snapshotctl gc run --collection NAME --dry-run`, then use --force",
		zap.Int64("collection", p.id), zap.String("name", p.name), zap.Int64("due", p.stop.Eligible),
		zap.Int64("total", p.stop.Total))
}

// reportStop counts and reports the stop of a plan, if it has one.
func (y *cycle) reportStop(p *plan) error {
	if !p.stopped {
		return nil
	}
	y.mu.Lock()
	y.summary.StopCount++
	y.summary.Stopped += p.stop.Eligible
	if len(y.summary.Stops) < maxStops {
		y.summary.Stops = append(y.summary.Stops, p.stop)
	}
	y.mu.Unlock()
	item := p.item()
	item.Action, item.DropTime = Stops, time.Time{}
	item.Reason = fmt.Sprintf("%d of %d units and segments are eligible, more than %s",
		p.stop.Eligible, p.stop.Total, percent(y.c.o.MaxShare))
	return y.report(item)
}

// batchFunc processes units of a plan. keyOf returns the keys of their records.
type batchFunc func(
	ctx context.Context, col *catalog.Collection, p *plan, units []gc.Target, keyOf gc.RecordKey,
) error

// forBatches calls fn with the units of a plan in batches, several at once, and returns
// the number of units that were counted as granted.
func (y *cycle) forBatches(ctx context.Context, p *plan, fn batchFunc) (granted int64, err error) {
	if len(p.eligible)+len(p.inPlace) == 0 {
		return 0, nil
	}
	col, err := y.c.catalog.Collection(ctx, catalog.Ref{ID: p.id})
	if err != nil {
		return 0, err
	}
	before := y.summary.Granted
	var errs []error // under y.mu
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(gc.BatchInFlight)
	for _, list := range []struct {
		units []gc.Target
		keyOf gc.RecordKey
	}{{p.eligible, keys.Unit}, {p.inPlace, keys.Segment}} {
		for part := range slices.Chunk(list.units, gc.BatchUnits) {
			group.Go(func() error {
				err := fn(groupCtx, &col, p, part, list.keyOf)
				if !errors.Is(err, record.ErrUnreadable) {
					return err
				}
				for i := range part { // an unreadable unit does not hold up the others
					err := fn(groupCtx, &col, p, part[i:i+1], list.keyOf)
					switch {
					case errors.Is(err, record.ErrUnreadable):
						y.mu.Lock()
						errs = append(errs, err)
						y.mu.Unlock()
					case err != nil:
						return err
					}
				}
				return nil
			})
		}
	}
	if err = group.Wait(); err == nil {
		err = gc.FirstError(errs)
	}
	return y.summary.Granted - before, err
}

// grantBatch grants the units without holders, and reports them.
func (y *cycle) grantBatch(
	ctx context.Context, col *catalog.Collection, _ *plan, units []gc.Target, keyOf gc.RecordKey,
) error {
	answers, err := y.c.gc.DecideBatch(ctx, col, units, keyOf,
		&gc.Grantee{Deleter: gc.BySnapshotd, Caller: "collector"})
	if err != nil {
		return err
	}
	var granted []int64
	for i := range answers {
		if answers[i].State == gc.Granted {
			granted = append(granted, units[i].Unit)
		}
		if item, eligible := y.countDecided(col, units[i].Unit, &answers[i]); eligible {
			if err := y.reportGranted(item); err != nil {
				return err
			}
		}
	}
	if len(granted) > 0 {
		y.c.log.Info("units without holders granted", zap.Int64("collection", col.ID), zap.Int("units", len(granted)),
			zap.Int64s("first", granted[:min(len(granted), maxLogged)]))
	}
	return nil
}

// countDecided returns the item of a unit with its files and bytes. eligible is false
// for a unit with holders, which it counts, and for a unit that is gone since the plan.
func (y *cycle) countDecided(col *catalog.Collection, id int64, answer *gc.Answer) (item Item, eligible bool) {
	unit := answer.Unit()
	if unit == nil {
		return Item{}, false
	}
	item = Item{Kind: ItemKind(unit.Kind), Collection: col.ID, ID: id, DropTime: unit.DropTime}
	if item.DropTime.IsZero() {
		item.DropTime = col.DropTime
	}
	if answer.State != gc.Granted && answer.Holders > 0 {
		y.mu.Lock()
		y.summary.Held++
		y.mu.Unlock()
		return item, false
	}
	for file := range unit.Owned() {
		item.Files++
		item.Bytes += file.Size
	}
	return item, true
}

// reportGranted counts and reports a unit that is granted, or would be.
func (y *cycle) reportGranted(item Item) error {
	y.mu.Lock()
	y.summary.Granted++
	y.summary.Files += item.Files
	y.summary.Bytes += item.Bytes
	y.mu.Unlock()
	item.Action, item.Reason = Deletes, y.droppedAgo(item.DropTime)+", and no snapshot holds it"
	return y.report(item)
}

// finishCollection removes a dropped collection of which nothing is left.
func (y *cycle) finishCollection(ctx context.Context, p *plan) error {
	col, err := y.c.catalog.Collection(ctx, catalog.Ref{ID: p.id})
	if err != nil {
		return err
	}
	if done, err := y.c.catalog.FinishCollection(ctx, &col); err != nil || !done {
		return err // without an error its last files are still being deleted
	}
	y.c.log.Info("dropped collection removed", zap.Int64("collection", p.id), zap.String("name", p.name))
	return y.reportRemoved(p, y.droppedAgo(p.drop)+", nothing of it is left")
}

// reportRemoved counts and reports a collection that is removed, or would be.
func (y *cycle) reportRemoved(p *plan, reason string) error {
	item := p.item()
	item.Action, item.Reason = Deletes, reason
	y.mu.Lock()
	y.summary.Removed++
	y.mu.Unlock()
	return y.report(item)
}
