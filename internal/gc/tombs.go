package gc

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// How tombstones are worked off.
const (
	deletesInFlight = 8  // batches at once
	deleteUnits     = 80 // tombstones in a batch, which one or two transactions remove
	doomedReads     = 20 // tombstones that are read at once
	doomedBytes     = 8 << 20
	keptBytes       = 32 << 20 // of records that are kept until their turn
	deleteBatch     = 1000     // objects at a time, as many as one request of S3 takes
	// batchLinger is how long a batch that is not full waits for more while others
	// are under way.
	batchLinger = 50 * time.Millisecond
)

// tombs is which tombstones there are, kept current by a watch, with the records
// of as many as fit. Before anything is done about one, it is looked whether it
// still is as it says.
type tombs struct {
	follower *follow.Follower
	log      *zap.Logger
	wake     chan struct{} // size one; there may be something to delete

	mu         sync.Mutex
	ours       map[string]granted   // by key, those that snapshotd deletes
	size       int                  // bytes of their records
	his        map[string]time.Time // keys of those that callers delete, with when they were granted
	unreadable map[string]error     // by key, what is left alone
}

// granted is a tombstone that snapshotd works off.
type granted struct {
	kv meta.KeyValue // its value is nil where there was no room for it
	at int64         // Unix nanoseconds of the grant
}

func newTombs(o *Options) *tombs {
	t := &tombs{log: o.Log, wake: make(chan struct{}, 1)}
	t.clear()
	from, to := meta.Prefix(keys.AllTombsPrefix)
	t.follower = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: t, Log: o.Log, Rand: o.Jitter})
	return t
}

func (t *tombs) clear() {
	t.ours, t.size, t.his, t.unreadable = map[string]granted{}, 0, map[string]time.Time{}, map[string]error{}
}

// Reset implements follow.Handler.
func (t *tombs) Reset(kvs []meta.KeyValue, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.clear()
	for _, kv := range kvs {
		t.put(kv)
	}
}

// Apply implements follow.Handler.
func (t *tombs) Apply(events []meta.Event, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range events {
		t.size -= len(t.ours[e.KV.Key].kv.Value)
		delete(t.ours, e.KV.Key)
		delete(t.his, e.KV.Key)
		delete(t.unreadable, e.KV.Key)
		if !e.Deleted {
			t.put(e.KV)
		}
	}
}

func (t *tombs) put(kv meta.KeyValue) {
	rec := &storagev1.TombstoneHead{}
	if err := record.DecodeHead(kv, rec); err != nil {
		t.leaveLocked(kv.Key, err)
		return
	}
	if Deleter(rec.GetDeleter()) == ByCaller {
		t.his[kv.Key] = time.Unix(0, rec.GetGrantTime())
		return
	}
	if t.size+len(kv.Value) > keptBytes {
		kv.Value = nil
	}
	t.size += len(kv.Value)
	t.ours[kv.Key] = granted{kv, rec.GetGrantTime()}
	t.again()
}

// leave leaves a tombstone alone until it changes: it cannot be read.
func (t *tombs) leave(key string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leaveLocked(key, err)
}

func (t *tombs) leaveLocked(key string, err error) {
	t.log.Error("tombstone is left alone", zap.String("key", key), zap.Error(err))
	t.size -= len(t.ours[key].kv.Value)
	delete(t.ours, key)
	t.unreadable[key] = err
}

// leftAlone is why tombstones are left alone, nil when none is.
func (t *tombs) leftAlone() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for _, key := range slices.Sorted(maps.Keys(t.unreadable)) {
		errs = append(errs, t.unreadable[key])
	}
	return firstOf(errs)
}

// again has the leader look at what there is.
func (t *tombs) again() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

func (t *tombs) stats(s *Stats, now time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s.Granted, s.Unconfirmed = len(t.ours), len(t.his)
	for _, granted := range t.his {
		s.Oldest = max(s.Oldest, now.Sub(granted))
	}
}

// work returns the keys of what snapshotd has to delete and has not tried, in key
// order.
func (t *tombs) work(tried map[string]bool) []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var list []string
	for key := range t.ours {
		if !tried[key] {
			list = append(list, key)
		}
	}
	slices.Sort(list)
	return list
}

// kept returns the records of tombstones, nil when one of them was not kept.
func (t *tombs) kept(list []string) []meta.KeyValue {
	t.mu.Lock()
	defer t.mu.Unlock()
	kvs := make([]meta.KeyValue, len(list))
	for i, key := range list {
		if kvs[i] = t.ours[key].kv; kvs[i].Value == nil {
			return nil
		}
	}
	return kvs
}

// waiting says whether files of a unit are still to be deleted that snapshotd was
// granted up to a time, in one collection or, with 0, in all. Of a tombstone that
// cannot be read nobody knows.
func (t *tombs) waiting(collection int64, until time.Time) (bool, error) {
	prefix := keys.AllTombsPrefix
	if collection > 0 {
		prefix = keys.TombPrefix(collection)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for key, err := range t.unreadable {
		if strings.HasPrefix(key, prefix) {
			return true, err
		}
	}
	for key, g := range t.ours {
		if g.at <= until.UnixNano() && strings.HasPrefix(key, prefix) {
			return true, nil
		}
	}
	return false, nil
}

// Looks at what is left to delete.
const (
	firstLook = 20 * time.Millisecond  // until the second
	maxLook   = 500 * time.Millisecond // between two
)

// AwaitDeleted waits until the files of all units are deleted that were granted
// to snapshotd up to a time, in one collection or, with 0, in all. It waits for
// what other calls were granted, too, and for ever when a file cannot be deleted:
// the end of ctx ends it, with the error of ctx. A tombstone that cannot be read is
// a record.ErrUnreadable.
func (g *GC) AwaitDeleted(ctx context.Context, collection int64, granted time.Time) error {
	if _, err := g.tombs.follower.Sync(ctx); err != nil {
		return err
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for look := firstLook; ; look = min(2*look, maxLook) {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		if waits, err := g.tombs.waiting(collection, granted); err != nil || !waits {
			return err
		}
		timer.Reset(look)
	}
}

// deleteGranted works off the tombstones that are snapshotd's, until ctx ends.
// Trouble is logged and met again later.
func (g *GC) deleteGranted(ctx context.Context, fence meta.Cond) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-g.tombs.wake:
		}
		wait := g.o.Interval
		err := g.deletePass(ctx, fence)
		g.trouble.Store(nil)
		if err != nil && ctx.Err() == nil {
			text := record.Clip(err.Error(), record.MaxText)
			g.trouble.Store(&text)
			wait /= 10
		}
		if ctx.Err() == nil {
			g.problems.deletes.Note(err)
		}
		var late error
		if s := g.Stats(); s.Oldest > g.o.UnconfirmedAfter {
			late = fmt.Errorf("%d tombstones, the oldest for %v", s.Unconfirmed, s.Oldest.Round(time.Minute))
		}
		g.problems.unconfirmed.Note(late)
		timer.Reset(wait)
	}
}

// deletePass tries each of them once, in batches, with those that come while it
// lasts: the next batch does not wait for the slowest of those under way. What a
// batch has left for another, it tries with another.
func (g *GC) deletePass(ctx context.Context, fence meta.Cond) error {
	type outcome struct {
		left []string
		err  error
	}
	var (
		errs   []error
		queue  []string // to be tried, those of one collection side by side
		tried  = map[string]bool{}
		flying int
		ended  = make(chan outcome)
		group  errgroup.Group
	)
	linger := time.NewTimer(0) // for how long a batch that is not full waits for more
	defer linger.Stop()
	ripe := true
	for {
		if len(queue) < deleteUnits {
			had := len(queue)
			queue = g.tombs.work(tried)
			if had == 0 && len(queue) > 0 && flying > 0 {
				ripe = false
				linger.Reset(batchLinger)
			}
		}
		for flying < deletesInFlight && ctx.Err() == nil && (len(queue) >= deleteUnits || ripe && len(queue) > 0) {
			part := queue[:min(deleteUnits, len(queue))]
			queue = queue[len(part):]
			for _, key := range part {
				tried[key] = true
			}
			flying++
			group.Go(func() error {
				left, err := g.deleteUnits(ctx, part, fence)
				ended <- outcome{left, err}
				return nil
			})
		}
		if flying == 0 && (len(queue) == 0 || ctx.Err() != nil) {
			return firstOf(errs)
		}
		select {
		case o := <-ended:
			if flying--; o.err != nil {
				errs = append(errs, o.err)
			}
			for _, key := range o.left {
				delete(tried, key)
			}
			ripe = ripe || flying == 0
		case <-linger.C:
			ripe = true
		case <-g.tombs.wake:
		}
	}
}

// firstOf returns the first error with how many there are: a store that is lost
// makes one for each batch.
func firstOf(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return fmt.Errorf("%w; and %d errors more", errs[0], len(errs)-1)
}

// doomed is a granted unit whose files are being deleted.
type doomed struct {
	tombstone *Tombstone
	kv        meta.KeyValue // of the tombstone
	files     int64
	bytes     int64
	err       error // why one of its files may be there
}

// deleteUnits deletes the files of granted units, and then the tombstones of
// those whose files are all gone. A tombstone stays while a file may be there.
// Those that it has not looked at it returns: the records are large.
func (g *GC) deleteUnits(ctx context.Context, tombs []string, fence meta.Cond) (left []string, err error) {
	units, left, errs, err := g.readDoomed(ctx, tombs)
	if err != nil {
		return nil, fmt.Errorf("delete units: %w", err)
	}
	type target struct { // an object, and whose it is
		key  string
		unit *doomed
	}
	byStore := map[string][]target{}
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
			byStore[root.Store] = append(byStore[root.Store], target{root.Prefix + f.Path, u})
			u.files, u.bytes = u.files+1, u.bytes+f.Size
		}
	}
	for alias, targets := range byStore {
		for part := range slices.Chunk(targets, deleteBatch) {
			list := make([]string, len(part))
			for i := range part {
				list[i] = part[i].key
			}
			err := g.deleteObjects(ctx, alias, list)
			if err == nil {
				continue
			}
			failed := failedKeys(err)
			for i := range part {
				if keyErr, ok := failed[part[i].key]; ok {
					part[i].unit.err = keyErr
				} else if len(failed) == 0 {
					part[i].unit.err = err
				}
			}
		}
	}
	var gone []*doomed
	for _, u := range units {
		if u.err != nil {
			errs = append(errs, fmt.Errorf("delete unit %d of collection %d: %w", u.tombstone.ID, u.tombstone.Collection, u.err))
			continue
		}
		gone = append(gone, u)
	}
	if err := g.removeTombs(ctx, gone, fence); err != nil {
		errs = append(errs, err)
	}
	return left, firstOf(errs)
}

// readDoomed returns the tombstones of a batch that are still there. Those that
// cannot be read are left out, and unreadable has their errors. When they are
// large, the last of them are left.
func (g *GC) readDoomed(ctx context.Context, tombs []string) (units []*doomed, left []string, unreadable []error, err error) {
	kvs, err := g.keptOf(ctx, tombs)
	if err != nil {
		return nil, nil, nil, err
	}
	if kvs == nil {
		size := 0
		for part := range slices.Chunk(tombs, doomedReads) {
			if size > doomedBytes {
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
		if kv.Key == "" { // it is gone
			continue
		}
		t, err := DecodeTombstone(kv)
		if err != nil {
			g.tombs.leave(kv.Key, err)
			unreadable = append(unreadable, err)
			continue
		}
		units = append(units, &doomed{tombstone: t, kv: kv})
	}
	return units, left, unreadable, nil
}

// keptOf returns the records of tombstones if they were kept and are current;
// nil: they are to be read.
func (g *GC) keptOf(ctx context.Context, tombs []string) ([]meta.KeyValue, error) {
	kvs := g.tombs.kept(tombs)
	if kvs == nil {
		return nil, nil
	}
	var look meta.Txn
	for _, kv := range kvs {
		look.If = append(look.If, meta.Unchanged(kv.Key, kv.ModRevision))
	}
	res, err := g.kv.Txn(ctx, look)
	if err != nil || !res.Succeeded {
		return nil, err
	}
	return kvs, nil
}

// readMany reads records by their keys, which are in order and fit into one
// transaction. Those that are not there are left empty. Records mostly lie side by
// side, and then a range costs the store less than as many gets; what it does not
// reach, for others lie between, is read one by one.
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

// removeTombs removes tombstones whose files are deleted, all or, where one was
// changed, each for itself.
func (g *GC) removeTombs(ctx context.Context, units []*doomed, fence meta.Cond) error {
	for len(units) > 0 {
		n := removable(units)
		changed, err := g.remove(ctx, "reclaim.tombs", units[:n], []meta.Cond{fence})
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
		case n > 1: // somebody else has removed one
			for _, u := range units[:n] {
				if err := g.removeTombs(ctx, []*doomed{u}, fence); err != nil {
					return err
				}
			}
		}
		units = units[n:]
	}
	return nil
}

// failedKeys returns the errors of single keys in an error of object.Store's
// Delete. It is empty when the error is about all of them.
func failedKeys(err error) map[string]error {
	failed := map[string]error{}
	var walk func(error)
	walk = func(err error) {
		if e, ok := err.(*object.DeleteError); ok { //nolint:errorlint // the walk unwraps
			failed[e.Key] = e
			return
		}
		switch e := err.(type) { //nolint:errorlint // the walk unwraps
		case interface{ Unwrap() []error }:
			for _, err := range e.Unwrap() {
				walk(err)
			}
		case interface{ Unwrap() error }:
			if err := e.Unwrap(); err != nil {
				walk(err)
			}
		}
	}
	walk(err)
	return failed
}

// deleteObjects deletes objects as fast as the rate allows.
func (g *GC) deleteObjects(ctx context.Context, alias string, list []string) error {
	store, ok := g.o.Stores[alias]
	if !ok {
		return fmt.Errorf("%w: %q", errNoStore, alias)
	}
	if err := g.rate.WaitN(ctx, len(list)); err != nil {
		return err
	}
	return store.Delete(ctx, list...)
}
