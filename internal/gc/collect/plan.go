package collect

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Limits of a cycle.
const (
	maxEligible    = 200_000   // units that one cycle grants in a collection
	maxEligibleAll = 1_000_000 // in all of them
	maxSpilled     = 10_000    // units that one cycle spills in a collection
	maxStops       = 64        // in a summary
	pageKeys       = 10_000    // of segments of a dropped collection
	maxLogged      = 20        // ids or keys in one line of the log
)

// StopUnits is the number of eligible units from which a cycle may stop.
const StopUnits = 100

// CycleOptions configure a cycle.
type CycleOptions struct {
	Collection catalog.Ref    // zero: all
	DryRun     bool           // change nothing, and report the decisions
	Tolerance  *time.Duration // nil: as configured
	Force      bool           // no limit on the share of the collection
	Sweep      bool           // sweep as well, see [Collector.Sweep]
	// Report gets each examined item, one after another; units that wait, have holders
	// or are kept by a stop only in a dry run. Its error ends the cycle. Nil: none.
	Report func(Item) error
}

// cycle is one pass over the dropped units.
type cycle struct {
	c          *Collector
	o          CycleOptions
	only       int64 // collection; 0: all
	tolerance  time.Duration
	spillConds []meta.Cond // compared when units are spilled; nil: none are
	now        time.Time
	history    int64 // of the metadata store, when the cycle began to read units

	mu       sync.Mutex // held while an item is reported
	summary  Summary
	budget   int   // units that may still be taken
	more     bool  // there are more units than one cycle takes
	clockErr error // the tolerance cannot be judged
	failed   error // the error of the summary
}

func (c *Collector) newCycle(ctx context.Context, o CycleOptions) (*cycle, error) {
	y := &cycle{c: c, o: o, tolerance: c.o.Tolerance, now: c.clock.Display(), budget: maxEligibleAll}
	y.summary = Summary{Replica: c.replica, Start: y.now}
	if o.Tolerance != nil {
		y.tolerance = *o.Tolerance
	}
	if y.tolerance > 0 {
		if now, err := c.clock.Judge(ctx); err != nil {
			y.clockErr = fmt.Errorf("nothing is collected: %w", err)
		} else {
			y.now = now
		}
	}
	if o.Collection != (catalog.Ref{}) {
		col, err := c.catalog.Collection(ctx, o.Collection)
		if err != nil {
			return nil, fmt.Errorf("collect: %w", err)
		}
		y.only = col.ID
	}
	return y, nil
}

// plan is the plan of a cycle for one collection.
type plan struct {
	id          int64
	name        string
	state       catalog.State
	drop        time.Time // of the collection
	units       int64
	reclaimable int64       // units without holders
	eligible    []gc.Target // those of them that the cycle takes, in key order
	inPlace     []gc.Target // likewise, segments of a dropped collection, which are units in place
	unspilled   []int64     // units with holders and full records
	err         error       // the cycle skips the collection
	refsKnown   bool
	expired     bool  // the collection was dropped longer ago than the tolerance
	stop        Stop  // of the eligible units
	stopped     bool  // the cycle stops here
	stopErr     error // it is unknown whether the cycle stops here
}

// item returns the item of the collection.
func (p *plan) item() Item {
	return Item{Kind: ItemCollection, Collection: p.id, ID: p.id, Name: p.name, DropTime: p.drop}
}

// planCollections returns an empty plan for each collection. RESTORING ones belong to
// their jobs.
func (y *cycle) planCollections(ctx context.Context) (plans map[int64]*plan, order []int64, errs []error, err error) {
	plans = map[int64]*plan{}
	from, to := meta.Prefix(keys.CollectionPrefix)
	if y.only != 0 {
		from, to = keys.Span(keys.CollectionPrefix, y.only, y.only)
	}
	_, err = y.c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			col, err := catalog.DecodeCollection(kv)
			if err != nil {
				errs = append(errs, fmt.Errorf("skip collection: %w", err))
				continue
			}
			if col.State == catalog.Active || col.State == catalog.Dropping {
				plans[col.ID] = &plan{id: col.ID, name: col.Name, state: col.State, drop: col.DropTime}
				order = append(order, col.ID)
			}
		}
		return nil
	})
	return plans, order, errs, err
}

// planUnits reads the heads of the dropped units into the plans.
func (y *cycle) planUnits(ctx context.Context, plans map[int64]*plan) error {
	from, to := meta.Prefix(keys.AllUnitsPrefix)
	if y.only != 0 {
		from, to = meta.Prefix(keys.UnitPrefix(y.only))
	}
	var err error
	if y.history, err = y.c.gc.History(ctx); err != nil {
		return err
	}
	rec := &storagev1.UnitHead{}
	_, err = y.c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			collection, id, err := keys.LastTwo(kv.Key)
			if err != nil {
				return err
			}
			p := plans[collection]
			if p == nil {
				continue // RESTORING, unreadable, or newer than the plans
			}
			if err := record.DecodeHead(kv, rec); err != nil {
				p.err = err
				continue
			}
			if err := y.planUnit(ctx, p, id, kv.CreateRevision, rec); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// planUnit plans one unit, which was dropped at a revision.
func (y *cycle) planUnit(ctx context.Context, p *plan, id, dropped int64, rec *storagev1.UnitHead) error {
	p.units++
	kind := ItemKind(rec.GetKind())
	item := Item{Kind: kind, Collection: p.id, ID: id, DropTime: record.Time(rec.GetDropTime())}
	if y.remaining(item.DropTime) > 0 {
		y.summary.Waiting++
		return y.reportDryRun(item, Waits, y.waitReason(item.DropTime))
	}
	if !y.checkRefs(ctx, p) {
		return nil
	}
	q := gc.HeadQuery(catalog.UnitKind(rec.GetKind()), id, rec.GetSegmentId(), dropped, y.history)
	if y.c.refs.Holds(p.id, q) {
		y.summary.Held++
		if rec.GetParked() != nil {
			y.summary.Spilled++
		} else if len(p.unspilled) < maxSpilled {
			p.unspilled = append(p.unspilled, id)
		}
		return y.reportHeld(item, q)
	}
	y.take(p, &p.eligible, gc.Target{Unit: id, Build: kind == ItemBuild})
	return nil
}

// planInPlace plans the segments of a dropped collection, which are units in place.
func (y *cycle) planInPlace(ctx context.Context, p *plan) error {
	from, to := meta.Prefix(keys.SegmentPrefix(p.id))
	for {
		res, err := y.c.kv.Range(ctx, meta.Range{From: from, To: to, Limit: pageKeys, KeysOnly: true})
		if err != nil {
			return err
		}
		if len(res.KVs) > 0 && !y.checkRefs(ctx, p) {
			return p.err
		}
		for _, kv := range res.KVs {
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return err
			}
			p.units++
			q := refs.Query{Segment: id}
			if !y.c.refs.Holds(p.id, q) {
				y.take(p, &p.inPlace, gc.Target{Unit: id})
				continue
			}
			y.summary.Held++
			if err := y.reportHeld(Item{Kind: ItemSegment, Collection: p.id, ID: id, DropTime: p.drop}, q); err != nil {
				return err
			}
		}
		if !res.More {
			return nil
		}
		from = res.KVs[len(res.KVs)-1].Key + "\x00"
	}
}

// planCollection completes the plan of one collection: the segments of an expired one,
// and whether the cycle stops.
func (y *cycle) planCollection(ctx context.Context, p *plan) error {
	p.expired = p.state == catalog.Dropping && y.remaining(p.drop) <= 0
	if p.expired {
		if err := y.planInPlace(ctx, p); err != nil {
			return err
		}
	} else if p.state == catalog.Dropping {
		if err := y.reportDryRun(p.item(), Waits, y.waitReason(p.drop)); err != nil {
			return err
		}
	}
	p.stopErr = y.planStop(ctx, p)
	return nil
}

// planStop decides whether the cycle would grant too much of a collection in use.
func (y *cycle) planStop(ctx context.Context, p *plan) error {
	p.stop = Stop{Collection: p.id, Eligible: p.reclaimable}
	if p.state != catalog.Active || y.o.Force || p.stop.Eligible < StopUnits {
		return nil
	}
	live, _, err := y.c.catalog.CountSegments(ctx, p.id)
	if err != nil {
		return err
	}
	p.stop.Total = live + p.units
	p.stopped = float64(p.stop.Eligible) > y.c.o.MaxShare*float64(p.stop.Total)
	return nil
}

// take adds a reclaimable unit to the plan, within the budget.
func (y *cycle) take(p *plan, list *[]gc.Target, t gc.Target) {
	if p.reclaimable++; y.budget > 0 && len(p.eligible)+len(p.inPlace) < maxEligible {
		y.budget--
		*list = append(*list, t)
	}
}

// checkRefs returns whether the references of the collection are known, and sets the
// error of the plan if not. A cycle over all collections does not wait for them; the
// next cycle finds them.
func (y *cycle) checkRefs(ctx context.Context, p *plan) bool {
	if p.err == nil && !p.refsKnown {
		// Each grant is decided again, in a transaction. This only excludes units with
		// holders.
		if y.only != 0 {
			p.err = y.c.refs.Ready(ctx, p.id, 0, 0)
		} else {
			p.err = y.c.refs.Known(p.id)
		}
		p.refsKnown = p.err == nil
	}
	return p.err == nil
}

// remaining returns the rest of the tolerance of a drop, by the clock that judges
// lifetimes. While that clock is not trusted it is never over.
func (y *cycle) remaining(drop time.Time) time.Duration {
	switch {
	case y.tolerance == 0:
		return 0
	case y.clockErr != nil:
		return y.tolerance
	}
	return drop.Add(y.tolerance).Sub(y.now)
}

func (y *cycle) droppedAgo(drop time.Time) string {
	if drop.IsZero() || drop.Unix() == 0 {
		return "dropped long ago"
	}
	return "dropped " + y.now.Sub(drop).Round(time.Second).String() + " ago"
}

func (y *cycle) waitReason(drop time.Time) string {
	return fmt.Sprintf("%s; the tolerance is %s", y.droppedAgo(drop), y.tolerance)
}

// errReport marks an error of the caller's Report, which ends the work.
var errReport = errors.New("report to the caller")

// report reports an item.
func (y *cycle) report(item Item) error {
	if y.o.Report == nil {
		return nil
	}
	y.mu.Lock()
	defer y.mu.Unlock()
	if err := y.o.Report(item); err != nil {
		return fmt.Errorf("%w: %w", errReport, err)
	}
	return nil
}

// reportDryRun reports an item in a dry run.
func (y *cycle) reportDryRun(item Item, action Action, reason string) error {
	if !y.o.DryRun {
		return nil
	}
	item.Action, item.Reason = action, reason
	return y.report(item)
}

// reportHeld reports a unit with holders in a dry run.
func (y *cycle) reportHeld(item Item, q refs.Query) error {
	if !y.o.DryRun {
		return nil
	}
	holders, n := y.c.refs.Holders(item.Collection, q)
	return y.reportDryRun(item, Keeps, heldReason(&gc.Answer{Snapshots: holders, Holders: n}))
}
