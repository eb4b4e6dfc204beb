package gc

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// How tombstones are worked off.
const (
	deletesInFlight = 8   // tombstones at once
	deleteBatch     = 500 // objects at a time
)

// tombs is which tombstones there are, kept current by a watch. What is done
// about one is decided by reading it.
type tombs struct {
	follower *follow.Follower
	log      *zap.Logger
	wake     chan struct{} // size one; there may be something to delete

	mu   sync.Mutex
	ours map[string]bool      // keys of those that snapshotd deletes
	his  map[string]time.Time // keys of those that callers delete, with when they were granted
}

func newTombs(o *Options) *tombs {
	t := &tombs{log: o.Log, wake: make(chan struct{}, 1), ours: map[string]bool{}, his: map[string]time.Time{}}
	from, to := meta.Prefix(keys.AllTombsPrefix)
	t.follower = follow.New(follow.Options{KV: o.KV, From: from, To: to, Handler: t, Log: o.Log})
	return t
}

// Reset implements follow.Handler.
func (t *tombs) Reset(kvs []meta.KeyValue, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ours, t.his = map[string]bool{}, map[string]time.Time{}
	for _, kv := range kvs {
		t.put(kv)
	}
}

// Apply implements follow.Handler.
func (t *tombs) Apply(events []meta.Event, _ int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, e := range events {
		if e.Deleted {
			delete(t.ours, e.KV.Key)
			delete(t.his, e.KV.Key)
		} else {
			t.put(e.KV)
		}
	}
}

func (t *tombs) put(kv meta.KeyValue) {
	rec := &storagev1.Tombstone{}
	if err := record.Decode(kv, rec); err != nil {
		t.log.Error("tombstone is left alone", zap.String("key", kv.Key), zap.Error(err))
		return
	}
	if Deleter(rec.GetDeleter()) == ByCaller {
		t.his[kv.Key] = time.Unix(0, rec.GetGrantTime())
		return
	}
	t.ours[kv.Key] = true
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

// work returns the keys of what snapshotd has to delete.
func (t *tombs) work() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	list := make([]string, 0, len(t.ours))
	for key := range t.ours {
		list = append(list, key)
	}
	return list
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
		if err := g.deletePass(ctx, fence); err != nil && ctx.Err() == nil {
			g.log.Warn("deleting what was reclaimed met trouble and will go on later", zap.Error(err))
			wait /= 10
		}
		if s := g.Stats(); s.Oldest > g.o.UnconfirmedAfter {
			g.log.Warn("granted units are not confirmed; their callers must delete them and call ConfirmReclaimed",
				zap.Int("tombstones", s.Unconfirmed), zap.Duration("oldest", s.Oldest))
		}
		timer.Reset(wait)
	}
}

// deletePass tries each of them once.
func (g *GC) deletePass(ctx context.Context, fence meta.Cond) error {
	work := g.tombs.work()
	errs := make([]error, len(work))
	var group errgroup.Group
	group.SetLimit(deletesInFlight)
	for i, key := range work {
		group.Go(func() error {
			if ctx.Err() == nil {
				errs[i] = g.deleteUnit(ctx, key, fence)
			}
			return nil
		})
	}
	_ = group.Wait() // each error has its place
	return firstOf(errs)
}

// firstOf returns the first error with how many there are: a store that is lost
// makes one for each tombstone.
func firstOf(errs []error) error {
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return fmt.Errorf("%w; and %d errors more", errs[0], len(errs)-1)
}

// deleteUnit deletes the files of a granted unit, and then its tombstone. The
// tombstone stays while a file may be there.
func (g *GC) deleteUnit(ctx context.Context, key string, fence meta.Cond) error {
	kv, found, _, err := g.kv.Get(ctx, key)
	if err != nil || !found {
		return err
	}
	t, err := DecodeTombstone(kv)
	if err != nil {
		return err
	}
	col, err := g.o.Catalog.Collection(ctx, catalog.Ref{ID: t.Collection})
	if err != nil {
		return fmt.Errorf("delete unit %d: %w", t.ID, err)
	}
	keysOf := map[string][]string{} // by store
	for root, f := range t.Files(col.Roots) {
		keysOf[root.Store] = append(keysOf[root.Store], root.Prefix+f.Path)
	}
	for alias, list := range keysOf {
		if err := g.deleteObjects(ctx, alias, list); err != nil {
			return fmt.Errorf("delete unit %d of collection %s: %w", t.ID, &col, err)
		}
	}
	res, err := g.kv.Txn(ctx, meta.Txn{If: []meta.Cond{meta.Unchanged(key, kv.ModRevision), fence}, Then: t.removal()})
	if err != nil {
		return fmt.Errorf("delete unit %d of collection %s: %w", t.ID, &col, err)
	}
	if res.Succeeded {
		g.log.Info("unit deleted", zap.Int64("collection", t.Collection), zap.Int64("unit", t.ID))
	}
	return nil
}

func (g *GC) deleteObjects(ctx context.Context, alias string, list []string) error {
	store, ok := g.o.Stores[alias]
	if !ok {
		return fmt.Errorf("%w: %q", errNoStore, alias)
	}
	for from := 0; from < len(list); from += deleteBatch {
		if err := store.Delete(ctx, list[from:min(from+deleteBatch, len(list))]...); err != nil {
			return err
		}
	}
	return nil
}
