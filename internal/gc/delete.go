package gc

import (
	"context"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// Limits of a delete pass.
const (
	deletesInFlight = 8  // batches at once
	deleteUnits     = 80 // tombstones in a batch, which one or two transactions remove
	recordsPerRead  = 20 // tombstones that are read at once
	recordBytes     = 8 << 20
	// batchLinger is how long an incomplete batch waits for more tombstones while others
	// are in flight.
	batchLinger = 50 * time.Millisecond
)

// The time between polls of the tombstones in AwaitDeleted doubles from firstPoll to
// maxPoll.
const (
	firstPoll = 20 * time.Millisecond
	maxPoll   = 500 * time.Millisecond
)

// AwaitDeleted waits until the files of all units are deleted that were granted to
// snapshotd up to a time, in one collection or, with the zero Ref, in all. It includes
// the grants of other calls, and does not end while a file cannot be deleted: the end of
// ctx ends it, with the error of ctx. An unreadable tombstone is a record.ErrUnreadable.
func (g *GC) AwaitDeleted(ctx context.Context, ref catalog.Ref, granted time.Time) error {
	var collection int64
	if ref != (catalog.Ref{}) {
		var err error
		if collection, err = g.o.Catalog.Resolve(ctx, ref); err != nil {
			return err
		}
	}
	if _, err := g.tombstones.follower.Sync(ctx); err != nil {
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for wait := firstPoll; ; wait = min(2*wait, maxPoll) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if found, err := g.tombstones.hasOwned(collection, granted); err != nil || !found {
			return err
		}
		timer.Reset(wait)
	}
}

// DeleteError returns the error of the last delete pass, or of unreadable tombstones;
// empty: there is none.
func (g *GC) DeleteError() string {
	if text := g.deleteError.Load(); text != nil && *text != "" {
		return *text
	}
	if err := g.tombstones.unreadableErr(); err != nil {
		return record.Clip(err.Error(), record.MaxText)
	}
	return ""
}

// Lead deletes the files of units that were granted to snapshotd, until ctx ends.
// Errors are logged and the deletes tried again.
func (g *GC) Lead(ctx context.Context, term election.Term) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-g.tombstones.wakeups:
		}
		wait := g.o.Interval
		err := g.deletePass(ctx, term.Fence())
		g.deleteError.Store(nil)
		if err != nil && ctx.Err() == nil {
			text := record.Clip(err.Error(), record.MaxText)
			g.deleteError.Store(&text)
			wait /= 10
		}
		if ctx.Err() == nil {
			g.deletes.Note(err)
		}
		var unconfirmed error
		if _, n, oldest := g.tombstones.stats(g.o.Clock.Display()); oldest > g.o.UnconfirmedAfter {
			unconfirmed = fmt.Errorf("%d tombstones, the oldest for %v", n, oldest.Round(time.Minute))
		}
		g.unconfirmed.Note(unconfirmed)
		timer.Reset(wait)
	}
}

// deletePass tries each owned tombstone once, in batches, including those that arrive
// during the pass. A batch starts while slow ones are in flight. Tombstones that a
// batch leaves are tried with another.
func (g *GC) deletePass(ctx context.Context, fence meta.Cond) error {
	type result struct {
		left []string
		err  error
	}
	var (
		errs     []error
		queue    []string // untried, those of one collection side by side
		tried    = map[string]bool{}
		inFlight int
		results  = make(chan result)
		group    errgroup.Group
	)
	linger := time.NewTimer(0)
	defer linger.Stop()
	lingered := true // an incomplete batch may start
	for {
		if len(queue) < deleteUnits {
			had := len(queue)
			queue = g.tombstones.untried(tried)
			if had == 0 && len(queue) > 0 && inFlight > 0 {
				lingered = false
				linger.Reset(batchLinger)
			}
		}
		for inFlight < deletesInFlight && ctx.Err() == nil &&
			(len(queue) >= deleteUnits || lingered && len(queue) > 0) {
			part := queue[:min(deleteUnits, len(queue))]
			queue = queue[len(part):]
			for _, key := range part {
				tried[key] = true
			}
			inFlight++
			group.Go(func() error {
				left, err := g.deleteUnits(ctx, part, fence)
				results <- result{left, err}
				return nil
			})
		}
		if inFlight == 0 && (len(queue) == 0 || ctx.Err() != nil) {
			return FirstError(errs)
		}
		select {
		case r := <-results:
			if inFlight--; r.err != nil {
				errs = append(errs, r.err)
			}
			for _, key := range r.left {
				delete(tried, key)
			}
			lingered = lingered || inFlight == 0
		case <-linger.C:
			lingered = true
		case <-g.tombstones.wakeups:
		}
	}
}

// deleteUnits deletes the files of granted units, and then the tombstones of units
// without remaining files. A tombstone stays while one of its files may exist. left
// has the keys of large tombstones that it has not read.
func (g *GC) deleteUnits(ctx context.Context, list []string, fence meta.Cond) (left []string, err error) {
	units, left, errs, err := g.readPending(ctx, list)
	if err != nil {
		return nil, fmt.Errorf("delete units: %w", err)
	}
	for alias, targets := range g.filesByStore(ctx, units) {
		for part := range slices.Chunk(targets, deleteBatch) {
			objects := make([]string, len(part))
			for i := range part {
				objects[i] = part[i].key
			}
			err := g.DeleteObjects(ctx, alias, objects)
			if err == nil {
				continue
			}
			failed := FailedKeys(err)
			for i := range part {
				if keyErr, ok := failed[part[i].key]; ok {
					part[i].unit.err = keyErr
				} else if len(failed) == 0 {
					part[i].unit.err = err
				}
			}
		}
	}
	var deleted []*pendingDelete
	for _, u := range units {
		if u.err != nil {
			errs = append(errs, fmt.Errorf("delete unit %d of collection %d: %w", u.tombstone.ID, u.tombstone.Collection, u.err))
			continue
		}
		deleted = append(deleted, u)
	}
	if err := g.removeDeleted(ctx, deleted, fence); err != nil {
		errs = append(errs, err)
	}
	return left, FirstError(errs)
}

// fileTarget is an object to delete, with its unit.
type fileTarget struct {
	key  string
	unit *pendingDelete
}

// filesByStore returns the files of units by the alias of their store. A unit whose
// collection cannot be read gets the error.
func (g *GC) filesByStore(ctx context.Context, units []*pendingDelete) map[string][]fileTarget {
	byStore := map[string][]fileTarget{}
	roots := map[int64][]catalog.Root{}
	unreadable := map[int64]error{} // collections
	for _, u := range units {
		t := u.tombstone
		if _, known := roots[t.Collection]; !known && unreadable[t.Collection] == nil {
			col, err := g.o.Catalog.Collection(ctx, catalog.Ref{ID: t.Collection})
			if err != nil {
				unreadable[t.Collection] = err
			}
			roots[t.Collection] = col.Roots
		}
		if u.err = unreadable[t.Collection]; u.err != nil {
			continue
		}
		for root, f := range t.Files(roots[t.Collection]) {
			byStore[root.Store] = append(byStore[root.Store], fileTarget{root.Prefix + f.Path, u})
			u.files, u.bytes = u.files+1, u.bytes+f.Size
		}
	}
	return byStore
}

// readPending returns the tombstones of a batch that still exist. unreadable has the
// errors of those that cannot be read. When the records are large, the last ones are
// left.
func (g *GC) readPending(
	ctx context.Context, list []string,
) (units []*pendingDelete, left []string, unreadable []error, err error) {
	kvs, err := g.cachedRecords(ctx, list)
	if err != nil {
		return nil, nil, nil, err
	}
	if kvs == nil {
		size := 0
		for part := range slices.Chunk(list, recordsPerRead) {
			if size > recordBytes {
				left = append(left, part...)
				continue
			}
			read, err := readMany(ctx, g.kv, part)
			if err != nil {
				return nil, nil, nil, err
			}
			for _, kv := range read {
				size += len(kv.Value)
			}
			kvs = append(kvs, read...)
		}
	}
	for _, kv := range kvs {
		if kv.Key == "" { // removed
			continue
		}
		t, err := DecodeTombstone(kv)
		if err != nil {
			g.tombstones.skip(kv.Key, err)
			unreadable = append(unreadable, err)
			continue
		}
		units = append(units, &pendingDelete{tombstone: t, kv: kv})
	}
	return units, left, unreadable, nil
}

// cachedRecords returns the records of tombstones if all are cached and current, nil
// otherwise.
func (g *GC) cachedRecords(ctx context.Context, list []string) ([]meta.KeyValue, error) {
	kvs := g.tombstones.cached(list)
	if kvs == nil {
		return nil, nil
	}
	var check meta.Txn
	for _, kv := range kvs {
		check.If = append(check.If, meta.Unchanged(kv.Key, kv.ModRevision))
	}
	res, err := g.kv.Txn(ctx, check)
	if err != nil || !res.Succeeded {
		return nil, err
	}
	return kvs, nil
}

// readMany reads records by their keys, which are in order and fit into one
// transaction. A missing record is left empty. Records are mostly adjacent, and one
// range costs the store less than many gets; records beyond its limit, because of
// others in between, are read one by one.
func readMany(ctx context.Context, kv meta.KV, wanted []string) ([]meta.KeyValue, error) {
	found := make([]meta.KeyValue, len(wanted))
	last := wanted[len(wanted)-1]
	span, err := kv.Range(ctx, meta.Range{From: wanted[0], To: last + "\x00", Limit: len(wanted)})
	if err != nil {
		return nil, err
	}
	for _, kv := range span.KVs {
		if at, ok := slices.BinarySearch(wanted, kv.Key); ok {
			found[at] = kv
		}
	}
	if !span.More {
		return found, nil
	}
	end := span.KVs[len(span.KVs)-1].Key
	rest, _ := slices.BinarySearch(wanted, end+"\x00")
	gets := make([]meta.Op, 0, len(wanted)-rest)
	for _, key := range wanted[rest:] {
		gets = append(gets, meta.Get(key))
	}
	res, err := kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, err
	}
	for i, kvs := range res.Ranges {
		for _, kv := range kvs {
			found[rest+i] = kv
		}
	}
	return found, nil
}

// removeDeleted removes tombstones whose files are deleted: in batches, and one by one
// where a tombstone of a batch has changed.
func (g *GC) removeDeleted(ctx context.Context, units []*pendingDelete, fence meta.Cond) error {
	for len(units) > 0 {
		n := removeBatch(units)
		changed, err := g.removeTombstones(ctx, "reclaim.tombs", units[:n], []meta.Cond{fence})
		if err != nil {
			return fmt.Errorf("remove %d tombstones: %w", n, err)
		}
		switch {
		case !changed:
			var files, bytes int64
			for _, u := range units[:n] {
				files, bytes = files+u.files, bytes+u.bytes
			}
			g.counters.Add(ByUnit, files, bytes)
			g.log.Info("units deleted", zap.Int("units", n), zap.Int64("files", files), zap.Int64("bytes", bytes),
				zap.Int64("collection", units[0].tombstone.Collection), zap.Int64("first", units[0].tombstone.ID))
		case n > 1: // one was removed by another replica
			for _, u := range units[:n] {
				if err := g.removeDeleted(ctx, []*pendingDelete{u}, fence); err != nil {
					return err
				}
			}
		}
		units = units[n:]
	}
	return nil
}

// DeleteObjects deletes objects of a store at the configured rate.
func (g *GC) DeleteObjects(ctx context.Context, alias string, list []string) error {
	store, ok := g.o.Stores[alias]
	if !ok {
		return fmt.Errorf("%w: %q", errNoStore, alias)
	}
	if err := g.rate.WaitN(ctx, len(list)); err != nil {
		return err
	}
	return store.Delete(ctx, list...)
}
