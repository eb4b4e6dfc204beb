package gc

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # A round
//
// What was dropped is looked at in rounds. One costs a scan of the units and of
// the records of collections, partitions and indexes, and no object request; the
// segments that live are not read. For each collection, in this order:
//
//	partition, index  what is left of a dropped one is dropped: its segments or
//	                  builds become units. Then its record goes
//	unit              when it was dropped longer ago than the tolerance and no
//	                  snapshot holds it, it is granted to snapshotd, by the
//	                  transaction of Reclaim. One that is held is parked
//	collection        of one that was dropped longer ago than the tolerance the
//	                  segments are units where they lie. When nothing is left of
//	                  it, its record goes
//
// The files of granted units are deleted by the leader, see tombs.go.
//
// A round needs no leader: all that it writes compares what it was decided on.
// So a call makes one of its own, beside the leader's.
//
// A round that would grant more than a share of a collection that is in use, from
// StopUnits units on, stops there, and somebody has to look: a mistake of an engine
// looks like that. A dry run tells of each unit that a stop keeps. What a
// dropped collection leaves is exempt, for its drop was asked for by name.
//
// # Failures
//
//	one collection's references cannot be read
//	                  nothing of it is touched; the round goes on with others
//	one unit's record cannot be read
//	                  it stays; the round goes on with others
//	process dies      each step is a transaction; the next round goes on
//	grants outrun deletes
//	                  the tombstones wait, with the bytes that the units had

// Limits of a round.
const (
	maxDue    = 200_000   // units that one round grants in a collection
	maxDueAll = 1_000_000 // in all of them
	maxPark   = 10_000    // units that one round parks in a collection
	maxStops  = 64        // that are told
	pageKeys  = 10_000    // of segments of a dropped collection
)

// StopUnits is from how many units on a round stops: fewer never stop one.
const StopUnits = 100

// Collect makes a round now and says what it came to. It is safe to call while
// others do. Trouble with one of several collections is told in the summary; an
// error is about the round as a whole, or about the one collection that it was
// asked for.
func (g *GC) Collect(ctx context.Context, o CollectOptions) (Summary, error) {
	r, err := g.newRound(ctx, o)
	if err != nil {
		return Summary{}, err
	}
	s, err := r.run(ctx)
	if err != nil || !o.Sweep {
		return s, err
	}
	swept, err := g.Sweep(ctx, SweepOptions{DryRun: o.DryRun})
	s.Swept, s.SweptBytes, s.End = swept.Deleted, swept.Bytes, g.o.Clock.Display()
	if err != nil {
		if ctx.Err() != nil {
			return s, fmt.Errorf("collect: %w", err)
		}
		s.Error = record.Clip(strings.TrimPrefix(s.Error+"; "+err.Error(), "; "), record.MaxText)
	}
	return s, nil
}

// round is one look at what was dropped.
type round struct {
	g         *GC
	o         CollectOptions
	only      int64 // collection; 0: all
	tolerance time.Duration
	park      []meta.Cond // compared when units are parked; nil: none are
	now       time.Time
	history   int64 // of the metadata store, when the round began to read units

	mu      sync.Mutex // emits one at a time
	summary Summary
	room    int   // units that may still be taken up
	again   bool  // there is more than one round takes
	clock   error // why the tolerance cannot be judged
	failed  error // what the summary has as its error
}

func (g *GC) newRound(ctx context.Context, o CollectOptions) (*round, error) {
	r := &round{g: g, o: o, tolerance: g.o.Tolerance, now: g.o.Clock.Display(), room: maxDueAll}
	r.summary = Summary{Replica: g.o.Replica, Start: r.now}
	if o.Tolerance != nil {
		r.tolerance = *o.Tolerance
	}
	if r.tolerance > 0 {
		if now, err := g.o.Clock.Judge(ctx); err != nil {
			r.clock = fmt.Errorf("nothing is collected: %w", err)
		} else {
			r.now = now
		}
	}
	if o.Collection != (catalog.Ref{}) {
		col, err := g.o.Catalog.Collection(ctx, o.Collection)
		if err != nil {
			return nil, fmt.Errorf("collect: %w", err)
		}
		r.only = col.ID
	}
	return r, nil
}

// findings is what a round found of one collection.
type findings struct {
	id      int64
	name    string
	state   catalog.State
	drop    time.Time // of the collection
	units   int64
	free    int64   // units that no reference holds
	due     []ask   // those of them that the round takes up, in key order
	lying   []ask   // as due, of a dropped collection's segments, which are units where they lie
	held    []int64 // units that one does, and that are not parked
	waiting int64
	err     error // why nothing of it is touched
	ready   bool  // the references are known
	stopped bool  // the round stops here
}

// run makes the round.
func (r *round) run(ctx context.Context) (Summary, error) {
	collections, order, trouble, err := r.collections(ctx)
	if err == nil {
		err = r.units(ctx, collections)
	}
	if err == nil {
		for _, id := range order {
			f := collections[id]
			if f.err == nil {
				f.err = r.collection(ctx, f)
			}
			if f.err != nil {
				trouble = append(trouble, fmt.Errorf("collection %s (%d): %w", f.name, f.id, f.err))
			}
			if ctx.Err() != nil {
				err = ctx.Err()
				break
			}
		}
	}
	if err == nil {
		// Last, so that what becomes a unit by it waits for the next round, and a dry
		// run tells the truth.
		var more []error
		more, err = r.parts(ctx, collections)
		trouble = append(trouble, more...)
	}
	if r.clock != nil {
		trouble = append(trouble, r.clock)
	}
	r.summary.End = r.g.o.Clock.Display()
	if err == nil && r.only != 0 {
		err = errors.Join(trouble...)
	}
	if err == nil {
		err = firstOfKind(trouble, errEmit)
	}
	if err != nil {
		err = fmt.Errorf("collect: %w", err)
		trouble = append(trouble, err)
	}
	if err := firstOf(trouble); err != nil {
		r.summary.Error, r.failed = record.Clip(err.Error(), record.MaxText), err
	}
	return r.summary, err
}

// errEmit marks an error of the caller's Emit, which ends the round.
var errEmit = errors.New("tell the caller")

func firstOfKind(errs []error, kind error) error {
	for _, err := range errs {
		if errors.Is(err, kind) {
			return err
		}
	}
	return nil
}

// collections reads what collections there are. RESTORING ones are their jobs'.
func (r *round) collections(ctx context.Context) (found map[int64]*findings, order []int64, trouble []error, err error) {
	found = map[int64]*findings{}
	from, to := meta.Prefix(keys.CollectionPrefix)
	if r.only != 0 {
		from, to = keys.Span(keys.CollectionPrefix, r.only, r.only)
	}
	_, err = r.g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			col, err := catalog.DecodeCollection(kv)
			if err != nil {
				trouble = append(trouble, fmt.Errorf("nothing of a collection is collected: %w", err))
				continue
			}
			if col.State == catalog.Active || col.State == catalog.Dropping {
				found[col.ID] = &findings{id: col.ID, name: col.Name, state: col.State, drop: col.DropTime}
				order = append(order, col.ID)
			}
		}
		return nil
	})
	return found, order, trouble, err
}

// parts ends dropped partitions and indexes.
func (r *round) parts(ctx context.Context, collections map[int64]*findings) (trouble []error, err error) {
	parts, trouble, err := r.g.o.Catalog.DroppedParts(ctx, r.only)
	if err != nil {
		return trouble, err
	}
	for _, p := range parts {
		f := collections[p.Collection]
		if f == nil || f.state != catalog.Active { // a dropped collection takes them along
			continue
		}
		item := Item{
			Kind: ItemPartition, Action: Deletes, Collection: p.Collection, ID: p.ID, Name: p.Name,
			Reason: "dropped; its segments become units, each of which waits for itself",
		}
		if p.Index {
			item.Kind, item.Reason = ItemIndex, "dropped; its builds become units, each of which waits for itself"
		}
		if !r.o.DryRun {
			units, err := r.g.o.Catalog.FinishPart(ctx, p)
			if err != nil {
				trouble = append(trouble, err)
				continue
			}
			r.g.log.Info("what was dropped is finished", zap.Stringer("part", p), zap.Int("units", units))
		}
		r.summary.Removed++
		if err := r.emit(item); err != nil {
			return trouble, err
		}
	}
	return trouble, nil
}

// units reads the dropped units, and sorts them by what becomes of them.
func (r *round) units(ctx context.Context, collections map[int64]*findings) error {
	from, to := meta.Prefix(keys.AllUnitsPrefix)
	if r.only != 0 {
		from, to = meta.Prefix(keys.UnitPrefix(r.only))
	}
	var err error
	if r.history, _, err = r.g.readHistory(ctx); err != nil {
		return err
	}
	rec := &storagev1.UnitHead{}
	_, err = r.g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			collection, id, err := keys.LastTwo(kv.Key)
			if err != nil {
				return err
			}
			f := collections[collection]
			if f == nil {
				continue // RESTORING, unreadable, or newer than our look
			}
			if err := record.DecodeHead(kv, rec); err != nil {
				f.err = err
				continue
			}
			if err := r.unit(ctx, f, id, kv.CreateRevision, rec); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}

// unit sorts one unit, which was dropped at a revision.
func (r *round) unit(ctx context.Context, f *findings, id, dropped int64, rec *storagev1.UnitHead) error {
	f.units++
	kind := ItemKind(rec.GetKind())
	item := Item{Kind: kind, Collection: f.id, ID: id, DropTime: record.Time(rec.GetDropTime())}
	if left := r.left(item.DropTime); left > 0 {
		f.waiting++
		r.summary.Waiting++
		return r.tell(item, Waits, r.waits(item.DropTime))
	}
	if !r.known(ctx, f) {
		return nil
	}
	w := wantedOfKind(catalog.UnitKind(rec.GetKind()), id, rec.GetSegmentId(), dropped, r.history)
	if r.g.refs.holds(f.id, w) {
		r.summary.Held++
		if rec.GetParked() != nil {
			r.summary.Parked++
		} else if len(f.held) < maxPark {
			f.held = append(f.held, id)
		}
		if !r.o.DryRun {
			return nil
		}
		holders, n := r.g.refs.holders(f.id, w)
		return r.tell(item, Keeps, heldReason(&Answer{Snapshots: holders, Holders: n}))
	}
	r.add(f, &f.due, ask{unit: id, build: kind == ItemBuild})
	return nil
}

// add takes a unit up for this round, if there is room.
func (r *round) add(f *findings, list *[]ask, a ask) {
	if f.free++; r.room > 0 && len(f.due)+len(f.lying) < maxDue {
		r.room--
		*list = append(*list, a)
	}
}

// known says whether the references of the collection are known, and notes in f
// if not. A round of all collections does not wait for them: the next one finds
// them.
func (r *round) known(ctx context.Context, f *findings) bool {
	if f.err == nil && !f.ready {
		// What is granted is decided anew, in a transaction. This is to leave out
		// what is held.
		if r.only != 0 {
			f.err = r.g.refs.ready(ctx, f.id, 0)
		} else {
			f.err = r.g.refs.known(f.id)
		}
		f.ready = f.err == nil
	}
	return f.err == nil
}

// left is how long something dropped at a time has still to wait, by the reading
// that lifetimes are judged by. While the clock is not trusted everything waits.
func (r *round) left(drop time.Time) time.Duration {
	switch {
	case r.tolerance == 0:
		return 0
	case r.clock != nil:
		return r.tolerance
	}
	return drop.Add(r.tolerance).Sub(r.now)
}

func (r *round) ago(drop time.Time) string {
	if drop.IsZero() || drop.Unix() == 0 {
		return "dropped long ago"
	}
	return "dropped " + r.now.Sub(drop).Round(time.Second).String() + " ago"
}

func (r *round) waits(drop time.Time) string {
	return fmt.Sprintf("%s; the tolerance is %s", r.ago(drop), r.tolerance)
}

// emit tells the caller of an item.
func (r *round) emit(item Item) error {
	if r.o.Emit == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.o.Emit(item); err != nil {
		return fmt.Errorf("%w: %w", errEmit, err)
	}
	return nil
}

// tell emits what only a dry run tells.
func (r *round) tell(item Item, action Action, reason string) error {
	if !r.o.DryRun {
		return nil
	}
	item.Action, item.Reason = action, reason
	return r.emit(item)
}

// collection works off what was found of one collection.
func (r *round) collection(ctx context.Context, f *findings) error {
	dropped := f.state == catalog.Dropping
	over := dropped && r.left(f.drop) <= 0
	whole := Item{Kind: ItemCollection, Collection: f.id, ID: f.id, Name: f.name, DropTime: f.drop}
	if over {
		if err := r.leftBehind(ctx, f); err != nil {
			return err
		}
	} else if dropped {
		if err := r.tell(whole, Waits, r.waits(f.drop)); err != nil {
			return err
		}
	}
	var parkErr error
	if len(f.held) > 0 && r.park != nil && !r.o.DryRun {
		var n int
		n, parkErr = r.g.park(ctx, f.id, f.held, r.park)
		r.summary.Parked += int64(n)
	}
	err := r.stops(ctx, f)
	if err == nil && f.stopped && r.o.DryRun {
		_, err = r.grantAll(ctx, f) // which tells of each
	}
	if err != nil || f.stopped {
		return errors.Join(parkErr, err)
	}
	granted, err := r.grantAll(ctx, f)
	if int64(len(f.due)+len(f.lying)) < f.free && granted > 0 {
		r.again = true
	}
	if err := errors.Join(parkErr, err); err != nil {
		return err
	}
	if !over || f.units > 0 && !r.o.DryRun || r.o.DryRun && granted < f.units {
		return nil
	}
	whole.Action, whole.Reason = Deletes, r.ago(f.drop)+", and nothing is left of it"
	if !r.o.DryRun {
		col, err := r.g.o.Catalog.Collection(ctx, catalog.Ref{ID: f.id})
		if err != nil {
			return err
		}
		if done, err := r.g.o.Catalog.FinishCollection(ctx, &col); err != nil || !done {
			return err // else its last files are still being deleted
		}
		r.g.log.Info("dropped collection is gone", zap.Int64("collection", f.id), zap.String("name", f.name))
	} else if granted > 0 {
		whole.Reason = r.ago(f.drop) + "; goes when the last of its files is deleted"
	}
	r.mu.Lock()
	r.summary.Removed++
	r.mu.Unlock()
	return r.emit(whole)
}

// leftBehind takes up the segments of a dropped collection, which are units where
// they lie.
func (r *round) leftBehind(ctx context.Context, f *findings) error {
	from, to := meta.Prefix(keys.SegmentPrefix(f.id))
	for {
		res, err := r.g.kv.Range(ctx, meta.Range{From: from, To: to, Limit: pageKeys, KeysOnly: true})
		if err != nil {
			return err
		}
		if len(res.KVs) > 0 && !r.known(ctx, f) {
			return f.err
		}
		for _, kv := range res.KVs {
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return err
			}
			f.units++
			w := wanted{segment: id}
			if !r.g.refs.holds(f.id, w) {
				r.add(f, &f.lying, ask{unit: id})
				continue
			}
			r.summary.Held++
			if r.o.DryRun {
				holders, n := r.g.refs.holders(f.id, w)
				item := Item{Kind: ItemSegment, Collection: f.id, ID: id, DropTime: f.drop}
				if err := r.tell(item, Keeps, heldReason(&Answer{Snapshots: holders, Holders: n})); err != nil {
					return err
				}
			}
		}
		if !res.More {
			return nil
		}
		from = res.KVs[len(res.KVs)-1].Key + "\x00"
	}
}

// stops finds out whether the round would grant too much of a collection in use,
// and tells if so.
func (r *round) stops(ctx context.Context, f *findings) error {
	stop := Stop{Collection: f.id, Due: f.free}
	if f.state == catalog.Active && !r.o.Force && stop.Due >= StopUnits {
		live, _, err := r.g.o.Catalog.CountSegments(ctx, f.id)
		if err != nil {
			return err
		}
		stop.Total = live + f.units
		f.stopped = tooMuch(stop.Due, stop.Total, r.g.o.MaxShare)
	}
	if !r.o.DryRun && r.g.stopped.changes(stop, f.stopped) {
		r.g.log.Warn("a round would delete too much of a collection, and stops there: look with `snapshotctl gc run --collection NAME --dry-run`, then --force",
			zap.Int64("collection", f.id), zap.String("name", f.name), zap.Int64("due", stop.Due), zap.Int64("total", stop.Total))
	}
	if !f.stopped {
		return nil
	}
	r.mu.Lock()
	r.summary.StopCount++
	r.summary.Stopped += stop.Due
	if len(r.summary.Stops) < maxStops {
		r.summary.Stops = append(r.summary.Stops, stop)
	}
	r.mu.Unlock()
	return r.emit(Item{
		Kind: ItemCollection, Action: Stops, Collection: f.id, ID: f.id, Name: f.name,
		Reason: fmt.Sprintf("%d of %d units and segments would go, more than %s", stop.Due, stop.Total, percent(r.g.o.MaxShare)),
	})
}

// percent writes a share of one for people, to a tenth of a percent.
func percent(share float64) string {
	return strconv.FormatFloat(math.Round(share*1000)/10, 'f', -1, 64) + "%"
}

// knownStops are the stops that were logged, so that each is logged when it
// changes, not in each round. The zero value is ready. It is safe for concurrent
// use.
type knownStops struct {
	mu sync.Mutex
	of map[int64]Stop // by collection
}

// changes notes whether the rounds stop in a collection, and says whether that is
// a stop that was not noted yet.
func (k *knownStops) changes(s Stop, stopped bool) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !stopped {
		delete(k.of, s.Collection)
		return false
	}
	if k.of[s.Collection] == s {
		return false
	}
	if k.of == nil {
		k.of = map[int64]Stop{}
	}
	k.of[s.Collection] = s
	return true
}

// tooMuch decides whether due of total is more than a share.
func tooMuch(due, total int64, share float64) bool { return float64(due) > share*float64(total) }

// grantAll grants what was taken up, and says how much of it nobody holds. Where
// the round stops, it only tells of it.
func (r *round) grantAll(ctx context.Context, f *findings) (granted int64, err error) {
	if len(f.due)+len(f.lying) == 0 {
		return 0, nil
	}
	col, err := r.g.o.Catalog.Collection(ctx, catalog.Ref{ID: f.id})
	if err != nil {
		return 0, err
	}
	before := r.summary.Granted
	var trouble []error // under r.mu
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	for _, list := range []struct {
		units []ask
		lie   place
	}{{f.due, keys.Unit}, {f.lying, keys.Segment}} {
		for part := range slices.Chunk(list.units, batchUnits) {
			group.Go(func() error {
				err := r.grantBatch(groupCtx, &col, f, part, list.lie)
				if !errors.Is(err, record.ErrUnreadable) {
					return err
				}
				for i := range part { // one that cannot be read does not keep the others
					err := r.grantBatch(groupCtx, &col, f, part[i:i+1], list.lie)
					switch {
					case errors.Is(err, record.ErrUnreadable):
						r.mu.Lock()
						trouble = append(trouble, err)
						r.mu.Unlock()
					case err != nil:
						return err
					}
				}
				return nil
			})
		}
	}
	if err = group.Wait(); err == nil {
		err = firstOf(trouble)
	}
	return r.summary.Granted - before, err
}

// grantBatch decides on units whose records lie at a place, grants those that
// nobody holds unless it is a dry run, and tells of them.
func (r *round) grantBatch(ctx context.Context, col *catalog.Collection, f *findings, units []ask, lie place) error {
	var to *grant
	if r.o.DryRun {
		lie = nil
	} else {
		to = &grant{deleter: BySnapshotd, caller: "collector"}
	}
	answers, err := r.g.decideBatch(ctx, col, units, lie, to)
	if err != nil {
		return err
	}
	var granted []int64
	for i := range answers {
		if to != nil && answers[i].State == Granted {
			granted = append(granted, units[i].unit)
		}
		if err := r.decided(col, f, units[i], &answers[i]); err != nil {
			return err
		}
	}
	if len(granted) > 0 {
		r.g.log.Info("units are deleted: nothing holds them", zap.Int64("collection", col.ID), zap.Int("units", len(granted)),
			zap.Int64s("first", granted[:min(len(granted), maxLogged)]))
	}
	return nil
}

// decided counts and tells what was decided on a unit.
func (r *round) decided(col *catalog.Collection, f *findings, a ask, answer *Answer) error {
	unit := answer.unit
	if answer.Tombstone != nil {
		unit = &answer.Tombstone.Unit
	}
	if unit == nil { // gone since
		return nil
	}
	item := Item{Kind: ItemKind(unit.Kind), Collection: col.ID, ID: a.unit, DropTime: unit.DropTime}
	if item.DropTime.IsZero() {
		item.DropTime = col.DropTime
	}
	if answer.State != Granted && answer.Holders > 0 {
		r.mu.Lock()
		r.summary.Held++
		r.mu.Unlock()
		return r.tell(item, Keeps, heldReason(answer))
	}
	for file := range unit.Owned() {
		item.Files++
		item.Bytes += file.Size
		if r.o.DryRun && file.Root < len(col.Roots) {
			root := col.Roots[file.Root]
			item.Objects = append(item.Objects, Object{Store: root.Store, Key: root.Prefix + file.Path, Size: file.Size})
		}
	}
	if f.stopped {
		return r.tell(item, Stops, r.ago(item.DropTime)+", and no snapshot holds it; it would go with force")
	}
	r.mu.Lock()
	r.summary.Granted++
	r.summary.Files += item.Files
	r.summary.Bytes += item.Bytes
	r.mu.Unlock()
	item.Action, item.Reason = Deletes, r.ago(item.DropTime)+", and no snapshot holds it"
	return r.emit(item)
}

// heldReason says what holds a unit.
func heldReason(a *Answer) string {
	var parts []string
	named := 0
	for _, s := range a.Snapshots {
		if named++; named > 3 {
			break
		}
		parts = append(parts, fmt.Sprintf("snapshot %s (%d)", s.Name, s.ID))
	}
	for _, s := range a.Creating {
		parts = append(parts, fmt.Sprintf("snapshot %d, which is being created", s.ID))
	}
	if rest := a.Holders - len(parts); rest > 0 && len(parts) > 0 {
		parts = append(parts, fmt.Sprintf("%d more", rest))
	}
	if len(parts) == 0 {
		return "held"
	}
	return "held by " + strings.Join(parts, ", ")
}

// collectLoop makes rounds until ctx ends, and notes what each came to.
func (g *GC) collectLoop(ctx context.Context, fence meta.Cond) error {
	timer := time.NewTimer(g.o.CollectInterval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		r, err := g.newRound(ctx, CollectOptions{})
		if err != nil {
			return err
		}
		r.park = []meta.Cond{fence}
		s, err := r.run(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			err = r.failed
		}
		g.problems.round.Note(err)
		if text := g.trouble.Load(); s.Error == "" && text != nil {
			s.Error = *text // of the deletes
		}
		if err := g.tombs.leftAlone(); s.Error == "" && err != nil {
			s.Error = record.Clip(err.Error(), record.MaxText)
		}
		g.last.Store(&s)
		if err := g.note(ctx, &s, fence); ctx.Err() == nil {
			g.problems.note.Note(err)
		}
		wait := g.o.CollectInterval
		if r.again {
			wait = time.Millisecond
		}
		timer.Reset(wait)
	}
}

// note writes down what the leader's last round came to.
func (g *GC) note(ctx context.Context, s *Summary, fence meta.Cond) error {
	rec := &storagev1.Round{
		Format: record.Format, Replica: s.Replica, StartTime: record.Nanos(s.Start), EndTime: record.Nanos(s.End),
		Granted: s.Granted, Files: s.Files, Bytes: s.Bytes, Waiting: s.Waiting, Held: s.Held, Parked: s.Parked,
		Removed: s.Removed, StopCount: s.StopCount, Error: s.Error,
	}
	for _, stop := range s.Stops {
		rec.Stops = append(rec.Stops, &storagev1.Stop{CollectionId: stop.Collection, Due: stop.Due, Total: stop.Total})
	}
	g.setHalts(rec)
	_, err := g.kv.Txn(ctx, meta.Txn{
		Name: "collect.note", If: []meta.Cond{fence}, Then: []meta.Op{meta.Put(keys.Round, record.Encode(rec))},
	})
	return err
}
