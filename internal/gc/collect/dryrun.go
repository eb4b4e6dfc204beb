package collect

import (
	"context"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
)

// reportPlan reports the plan of one collection in a dry run, with the decision on each
// unit, also where the cycle stops.
func (y *cycle) reportPlan(ctx context.Context, p *plan) error {
	if p.stopErr != nil {
		return p.stopErr
	}
	if err := y.reportStop(p); err != nil {
		return err
	}
	granted, err := y.forBatches(ctx, p, y.reportBatch)
	if err != nil || p.stopped || !p.expired || granted < p.units {
		return err
	}
	reason := y.droppedAgo(p.drop) + ", nothing of it is left"
	if granted > 0 {
		reason = y.droppedAgo(p.drop) + "; removed after its last file"
	}
	return y.reportRemoved(p, reason)
}

// reportBatch decides on units without a grant, and reports each.
func (y *cycle) reportBatch(
	ctx context.Context, col *catalog.Collection, p *plan, units []gc.Target, _ gc.RecordKey,
) error {
	answers, err := y.c.gc.DecideBatch(ctx, col, units, nil, nil)
	if err != nil {
		return err
	}
	for i := range answers {
		if err := y.reportUnit(col, p, units[i].Unit, &answers[i]); err != nil {
			return err
		}
	}
	return nil
}

// reportUnit reports the decision on a unit, with its files if they would be deleted.
func (y *cycle) reportUnit(col *catalog.Collection, p *plan, id int64, answer *gc.Answer) error {
	item, eligible := y.countDecided(col, id, answer)
	switch {
	case item.Kind == 0: // gone since the plan
		return nil
	case !eligible:
		return y.reportDryRun(item, Keeps, heldReason(answer))
	}
	for file := range answer.Unit().Owned() {
		if file.Root < len(col.Roots) {
			root := col.Roots[file.Root]
			item.Objects = append(item.Objects, Object{Store: root.Store, Key: root.Prefix + file.Path, Size: file.Size})
		}
	}
	if p.stopped {
		return y.reportDryRun(item, Stops, y.droppedAgo(item.DropTime)+", and no snapshot holds it; deleted only with force")
	}
	return y.reportGranted(item)
}
