package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// State is the state of a unit in the catalog.
type State int

// The states.
const (
	Unknown State = iota + 1 // not registered, or gone
	Live
	Dropped
	Granted
)

// SnapshotHolder is a snapshot that holds a unit.
type SnapshotHolder = refs.Holder

// Answer has the state and the holders of a unit.
type Answer struct {
	State     State
	Snapshots []SnapshotHolder // that reference it, newest first
	Creating  []SnapshotHolder // that may come to reference it
	LiveIn    int64            // when it is Live, the segment that it is or is part of
	Holders   int              // number of holders; only some snapshots are named
	Tombstone *Tombstone       // when it is Granted
	unit      *catalog.Unit    // when it is Dropped
}

// Unit returns the unit of a Dropped or Granted answer, nil otherwise.
func (a *Answer) Unit() *catalog.Unit {
	if a.Tombstone != nil {
		return &a.Tombstone.Unit
	}
	return a.unit
}

// Grantee is the deleter that a decision grants units to.
type Grantee struct {
	Deleter Deleter
	Caller  string
}

// Check returns the holders of units, in the order of asks. It is advice: callers must
// not delete on it.
func (g *GC) Check(ctx context.Context, ref catalog.Ref, asks []Ask) ([]Answer, error) {
	answers, err := g.decide(ctx, ref, asks, nil)
	if err != nil {
		return nil, fmt.Errorf("check references in collection %s: %w", ref, err)
	}
	return answers, nil
}

// Reclaim grants the units without holders to deleter, for caller. The answers are in
// the order of asks; a Granted unit may be deleted. An earlier grant stays as it was.
// It is an epoch.ErrRolledBack when there is a unit to grant and the metadata store has
// gone back in time.
func (g *GC) Reclaim(
	ctx context.Context, ref catalog.Ref, asks []Ask, deleter Deleter, caller string,
) ([]Answer, error) {
	answers, err := g.decide(ctx, ref, asks, &Grantee{Deleter: deleter, Caller: caller})
	if err != nil {
		return nil, fmt.Errorf("reclaim in collection %s: %w", ref, err)
	}
	return answers, nil
}

// decide answers asks, and grants the units without holders to a grantee unless it is
// nil.
func (g *GC) decide(ctx context.Context, ref catalog.Ref, asks []Ask, to *Grantee) ([]Answer, error) {
	col, err := g.o.Catalog.Collection(ctx, ref)
	if err != nil {
		return nil, err
	}
	targets, err := g.resolveAll(ctx, &col, asks)
	if err != nil {
		return nil, err
	}
	var order []Target // each once
	seen := map[Target]bool{}
	for _, t := range targets {
		if !seen[t] {
			seen[t] = true
			order = append(order, t)
		}
	}
	results := make([][]Answer, (len(order)+BatchUnits-1)/BatchUnits)
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(BatchInFlight)
	n := 0
	for part := range slices.Chunk(order, BatchUnits) {
		at := n
		n++
		group.Go(func() (err error) {
			results[at], err = g.DecideBatch(groupCtx, &col, part, nil, to)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	byTarget := make(map[Target]Answer, len(order))
	for i, t := range order {
		byTarget[t] = results[i/BatchUnits][i%BatchUnits]
	}
	answers := make([]Answer, len(asks))
	for i := range asks {
		answers[i] = byTarget[targets[i]]
	}
	return answers, nil
}

// CheckKnown is Check of the unit of one file, also with unknown references. If not all
// of them are known, unknown is the ErrLoading or ErrUnreadable, and there may be more
// holders than the answer names.
func (g *GC) CheckKnown(ctx context.Context, col *catalog.Collection, ask Ask) (a Answer, unknown, err error) {
	answers, err := g.decide(ctx, catalog.Ref{ID: col.ID}, []Ask{ask}, nil)
	switch {
	case err == nil:
		return answers[0], nil, nil
	case !errors.Is(err, ErrLoading) && !errors.Is(err, ErrUnreadable):
		return Answer{}, nil, err
	}
	unknown = err
	t, err := g.resolveFile(ctx, col, ask)
	if err != nil {
		return Answer{}, nil, err
	}
	p, err := g.readPreconditions(ctx, col, []Target{t})
	if err != nil {
		return Answer{}, nil, err
	}
	return g.decideUnit(col, t, p, &p.units[0]), unknown, nil
}

// DecideBatch decides on up to BatchUnits targets in one transaction, and grants the
// units without holders to a grantee unless it is nil. keyOf returns the record keys of
// units to grant; nil: they are unknown. It repeats the decision when a record changes
// meanwhile, and ends with meta.ErrConflict after a few attempts.
func (g *GC) DecideBatch(
	ctx context.Context, col *catalog.Collection, targets []Target, keyOf RecordKey, to *Grantee,
) ([]Answer, error) {
	for attempt := 0; attempt < maxAttempts; {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
		var p *preconditions
		var err error
		if keyOf != nil {
			p, err = g.readKnownUnits(ctx, col, targets, keyOf)
		} else {
			p, err = g.readPreconditions(ctx, col, targets)
		}
		if err != nil {
			return nil, err
		}
		keyOf = nil // another attempt reads all records
		// The generation was read before the references are examined.
		if err := g.refs.Ready(ctx, col.ID, p.revision, p.generation); err != nil {
			return nil, err
		}
		answers, changed, err := g.decideUnits(ctx, col, targets, p)
		if err != nil {
			return nil, err
		}
		if changed {
			attempt++
			continue
		}
		reclaimable, duplicates := split(targets, answers)
		if to == nil || len(reclaimable) == 0 {
			return answers, nil
		}
		granted, err := g.grant(ctx, col.ID, p, reclaimable, answers, to)
		switch {
		case err != nil:
			return nil, err
		case granted == len(reclaimable):
			for i, first := range duplicates {
				answers[i] = answers[first]
			}
			return answers, nil
		case granted == 0: // otherwise the attempt made progress
			attempt++
		}
	}
	return nil, fmt.Errorf("%w: gave up after %d attempts; what is granted stays granted", meta.ErrConflict, maxAttempts)
}

// split returns the places of units without holders, and those of targets that name
// one of them in another way, each with the place of the first.
func split(targets []Target, answers []Answer) (reclaimable []int, duplicates map[int]int) {
	duplicates = map[int]int{}
	for i := range targets {
		if answers[i].State != Dropped || answers[i].Holders > 0 {
			continue
		}
		same := func(j int) bool { return targets[j].Unit == targets[i].Unit }
		if at := slices.IndexFunc(reclaimable, same); at >= 0 {
			duplicates[i] = reclaimable[at]
		} else {
			reclaimable = append(reclaimable, i)
		}
	}
	return reclaimable, duplicates
}

// decideUnits decides on each target. If nothing holds a spilled unit by its ids, it loads
// the unit's record and decides again, because a snapshot may hold one of the files. It
// returns true if such a record has changed since it was read.
func (g *GC) decideUnits(
	ctx context.Context, col *catalog.Collection, targets []Target, p *preconditions,
) (answers []Answer, changed bool, err error) {
	answers = make([]Answer, len(targets))
	var spilled []int
	for i := range targets {
		answers[i] = g.decideUnit(col, targets[i], p, &p.units[i])
		if answers[i].State == Dropped && answers[i].Holders == 0 && p.units[i].unit.Spilled {
			spilled = append(spilled, i)
		}
	}
	if len(spilled) == 0 {
		return answers, false, nil
	}
	if changed, err = g.loadSpilled(ctx, col.ID, p, spilled); changed || err != nil {
		return nil, changed, err
	}
	for _, i := range spilled {
		answers[i] = g.decideUnit(col, targets[i], p, &p.units[i])
	}
	return answers, false, nil
}

// decideUnit decides on one unit. It is a function of the preconditions and of the
// references, which are at the same revision or later.
func (g *GC) decideUnit(col *catalog.Collection, t Target, p *preconditions, s *unitState) Answer {
	switch {
	case s.tombstone != nil && s.unit == nil:
		return Answer{State: Granted, Tombstone: s.tombstone}
	case s.unit != nil:
		answer := Answer{State: Dropped, unit: s.unit}
		if s.tombstone != nil {
			// Two units were registered under one id, which is an error of the engine.
			// The grant of the first does not cover the second, which waits for its end.
			answer.Holders++
		}
		var n int
		answer.Snapshots, n = g.refs.Holders(col.ID, unitQuery(col, s.unit, p.history))
		answer.Holders += n
		for _, kv := range p.pending {
			// A younger create captures after the drop: it does not see the unit.
			if kv.CreateRevision < s.unit.Revision {
				answer.Holders++
				if id, err := keys.LastID(kv.Key); err == nil && len(answer.Creating) < refs.MaxHolders {
					answer.Creating = append(answer.Creating, SnapshotHolder{ID: id})
				}
			}
		}
		return answer
	case t.LiveSegment != 0 || s.live && !t.Build:
		id := max(t.LiveSegment, t.Unit)
		answer := Answer{State: Live, LiveIn: id}
		answer.Snapshots, answer.Holders = g.refs.Holders(col.ID, refs.Query{Segment: id})
		answer.Holders++ // the collection itself
		return answer
	}
	// Not in the catalog, but a snapshot may have it: a live index build.
	answer := Answer{State: Unknown}
	if t.Build {
		answer.Snapshots, answer.Holders = g.refs.Holders(col.ID, refs.Query{Build: t.Unit})
	}
	return answer
}

// grant moves units without holders to their tombstones in one transaction, and
// returns their number: 0 if the preconditions did not hold any more. Units that
// exceed the size of one transaction are left for the next.
func (g *GC) grant(
	ctx context.Context, collection int64, p *preconditions, reclaimable []int, answers []Answer, to *Grantee,
) (int, error) {
	if p.rolledBack != nil {
		return 0, p.rolledBack
	}
	op, err := record.NewOp(g.o.Rand)
	if err != nil {
		return 0, err
	}
	now := g.o.Clock.Display()
	newest := p.units[reclaimable[0]].unit.Revision // of their drops
	txn := meta.Txn{
		Name: "reclaim.grant", If: []meta.Cond{generationIs(collection, p.generation), meta.Absent(keys.RolledBack)},
	}
	size, granted := 0, reclaimable[:0:0]
	for _, i := range reclaimable {
		s := &p.units[i]
		if size += s.size(); size > batchBytes && len(granted) > 0 {
			break
		}
		granted = append(granted, i)
		newest = max(newest, s.unit.Revision)
		key := keys.Tombstone(collection, s.unit.ID)
		rec := &storagev1.Tombstone{
			Format: record.Format, Unit: s.rec, Deleter: uint32(to.Deleter), Caller: to.Caller,
			GrantTime: now.UnixNano(), Op: op,
		}
		txn.If = append(txn.If, meta.Unchanged(s.kv.Key, s.kv.ModRevision), meta.Absent(key))
		if unitKey := keys.Unit(collection, s.unit.ID); unitKey != s.kv.Key { // a segment of a dropped collection
			txn.If = append(txn.If, meta.Absent(unitKey))
		}
		txn.Then = append(txn.Then, meta.Put(key, record.Encode(rec)), meta.Delete(s.kv.Key))
		answers[i] = Answer{State: Granted, Tombstone: &Tombstone{
			ID: s.unit.ID, Collection: collection, Unit: *s.unit, Deleter: to.Deleter, Caller: to.Caller, GrantTime: now,
		}}
	}
	from, end := meta.Prefix(keys.PendingPrefix(collection))
	if len(p.pending) == 0 {
		txn.If = append(txn.If, meta.RangeAbsent(from, end))
	} else { // all that exist, and will exist, are younger than the last drop
		txn.If = append(txn.If, meta.Cond{
			From: from, To: end, Target: meta.CreateRevision, Op: meta.Greater, Revision: newest,
		})
	}
	res, err := g.kv.Txn(ctx, txn)
	if err != nil || !res.Succeeded {
		return 0, err
	}
	for _, i := range granted {
		answers[i].Tombstone.Revision = res.Revision
	}
	g.deleteSpilled(ctx, p, granted)
	return len(granted), nil
}

// generationIs compares that no snapshot of the collection was committed since the
// generation was read.
func generationIs(collection, revision int64) meta.Cond {
	if revision == 0 {
		return meta.Absent(keys.Generation(collection))
	}
	return meta.Unchanged(keys.Generation(collection), revision)
}
