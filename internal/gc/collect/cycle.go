package collect

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// Collect runs a cycle now and returns its result. Cycles may run at the same time. An
// error of one of several collections is in the summary; the error of the call concerns
// the whole cycle, or the only collection.
func (c *Collector) Collect(ctx context.Context, o CycleOptions) (Summary, error) {
	y, err := c.newCycle(ctx, o)
	if err != nil {
		return Summary{}, err
	}
	s, err := y.run(ctx)
	if err != nil || !o.Sweep {
		return s, err
	}
	swept, err := c.Sweep(ctx, SweepOptions{DryRun: o.DryRun})
	s.Swept, s.SweptBytes, s.End = swept.Deleted, swept.Bytes, c.clock.Display()
	if err != nil {
		if ctx.Err() != nil {
			return s, fmt.Errorf("collect: %w", err)
		}
		s.Error = record.Clip(strings.TrimPrefix(s.Error+"; "+err.Error(), "; "), record.MaxText)
	}
	return s, nil
}

// run plans the cycle and executes the plan. A dry run reports the plan instead.
func (y *cycle) run(ctx context.Context) (Summary, error) {
	plans, order, errs, err := y.planCollections(ctx)
	if err == nil {
		err = y.planUnits(ctx, plans)
	}
	if err == nil {
		for _, id := range order {
			p := plans[id]
			if p.err == nil {
				p.err = y.runCollection(ctx, p)
			}
			if p.err != nil {
				errs = append(errs, fmt.Errorf("collection %s (%d): %w", p.name, p.id, p.err))
			}
			if ctx.Err() != nil {
				err = ctx.Err()
				break
			}
		}
	}
	if err == nil {
		// Last, so that the units that it makes wait for the next cycle, and a dry run
		// reports the same units as a cycle.
		var more []error
		more, err = y.finishParts(ctx, plans)
		errs = append(errs, more...)
	}
	if y.clockErr != nil {
		errs = append(errs, y.clockErr)
	}
	y.summary.End = y.c.clock.Display()
	if err == nil && y.only != 0 {
		err = errors.Join(errs...)
	}
	if err == nil {
		err = firstOfKind(errs, errReport)
	}
	if err != nil {
		err = fmt.Errorf("collect: %w", err)
		errs = append(errs, err)
	}
	if err := gc.FirstError(errs); err != nil {
		y.summary.Error, y.failed = record.Clip(err.Error(), record.MaxText), err
	}
	return y.summary, err
}

func firstOfKind(errs []error, kind error) error {
	for _, err := range errs {
		if errors.Is(err, kind) {
			return err
		}
	}
	return nil
}

// runCollection completes the plan of one collection, and executes or reports it.
func (y *cycle) runCollection(ctx context.Context, p *plan) error {
	if err := y.planCollection(ctx, p); err != nil {
		return err
	}
	if y.o.DryRun {
		return y.reportPlan(ctx, p)
	}
	return y.execute(ctx, p)
}

// finishParts removes dropped partitions and indexes.
func (y *cycle) finishParts(ctx context.Context, plans map[int64]*plan) (errs []error, err error) {
	parts, errs, err := y.c.catalog.DroppedChildren(ctx, y.only)
	if err != nil {
		return errs, err
	}
	for _, part := range parts {
		p := plans[part.Collection]
		if p == nil || p.state != catalog.Active { // parts of a dropped collection go with it
			continue
		}
		item := Item{
			Kind: ItemPartition, Action: Deletes, Collection: part.Collection, ID: part.ID, Name: part.Name,
			Reason: "dropped; its segments become units with a tolerance of their own",
		}
		if part.Index {
			item.Kind, item.Reason = ItemIndex, "dropped; its builds become units with a tolerance of their own"
		}
		if !y.o.DryRun {
			units, err := y.c.catalog.FinishChild(ctx, part)
			if err != nil {
				errs = append(errs, err)
				continue
			}
			y.c.log.Info("dropped part removed", zap.Stringer("part", part), zap.Int("units", units))
		}
		y.summary.Removed++
		if err := y.report(item); err != nil {
			return errs, err
		}
	}
	return errs, nil
}
