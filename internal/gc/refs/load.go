package refs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// loadsInFlight is the number of snapshots whose references are read at once.
const loadsInFlight = 32

// primed has the references of a snapshot that this replica has just written.
type primed struct {
	snapshot int64
	metadata manifest.Digest // of the metadata object that names these references
	refs     *snapshotRefs
}

// maxPrimed bounds the primed references that no load has taken yet.
const maxPrimed = 64

// Prime supplies the references of a snapshot that this replica is about to commit
// with metadata of that digest, which saves reading them. refs must not change after
// the call.
func (x *Index) Prime(snapshot int64, metadata manifest.Digest, refs *manifest.Refs) {
	p := primed{snapshot, metadata, newSnapshotRefs(refs)}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.primed = append(x.primed, p); len(x.primed) > maxPrimed {
		x.primed = slices.Delete(x.primed, 0, 1)
	}
}

// takePrimed removes and returns the primed references of a snapshot, nil if there
// are none.
func (x *Index) takePrimed(e *entry) *snapshotRefs {
	x.mu.Lock()
	defer x.mu.Unlock()
	at := slices.IndexFunc(x.primed, func(p primed) bool { return p.snapshot == e.id && p.metadata == e.metadata })
	if at < 0 {
		return nil
	}
	refs := x.primed[at].refs
	x.primed = slices.Delete(x.primed, at, at+1)
	return refs
}

// Run keeps the index current until ctx ends. It must be called once.
func (x *Index) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return x.follower.Run(ctx) })
	for range loadsInFlight {
		group.Go(func() error {
			x.runLoader(ctx)
			return nil
		})
	}
	return group.Wait()
}

// runLoader reads missing references until ctx ends.
func (x *Index) runLoader(ctx context.Context) {
	if x.o.Ready != nil {
		select {
		case <-ctx.Done():
			return
		case <-x.o.Ready:
		}
	}
	for {
		e, wait := x.next()
		if e == nil {
			if !x.idle(ctx, wait) {
				return
			}
			continue
		}
		refs, err := x.load(ctx, e)
		if ctx.Err() != nil {
			return
		}
		x.loaded(e, refs, err)
	}
}

// idle waits for work, for wait at most. It returns false when ctx ends.
func (x *Index) idle(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-x.work:
		return true
	case <-timer.C:
		return true
	}
}

// next picks a snapshot to load and marks it as loading. Without one, wait is the
// time until a retry is due.
func (x *Index) next() (e *entry, wait time.Duration) {
	x.mu.Lock()
	defer x.mu.Unlock()
	wait = x.o.Interval
	now := x.o.Now()
	pick := func(missing map[int64]*entry) bool {
		for _, candidate := range missing {
			if candidate.closed || candidate.loading {
				continue
			}
			if left := candidate.retry.Sub(now); left > 0 {
				wait = min(wait, left)
				continue
			}
			e = candidate
			return true
		}
		return false
	}
	found := false
	for id := range x.awaited {
		if c := x.collections[id]; c != nil && pick(c.missing) {
			found = true
			break
		}
	}
	if !found && !pick(x.missing) {
		return nil, wait
	}
	e.loading = true
	select { // there may be more for another loader
	case x.work <- struct{}{}:
	default:
	}
	return e, 0
}

// loaded records the result of a load.
func (x *Index) loaded(e *entry, refs *snapshotRefs, err error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	defer x.notify()
	// The count yields the lock. Without loading another loader would take the entry
	// in between and count it once more.
	defer func() { e.loading = false }()
	if e.removed {
		return
	}
	if err == nil {
		x.countLoaded(e, refs)
		return
	}
	wait := x.o.Interval
	if storeUnavailable(err) || object.IsPassing(err) {
		// A store that does not answer, or refuses, proves nothing about the snapshot.
		if e.silent++; e.silent < 6 {
			e.retry = x.o.Now().Add(50 * time.Millisecond << e.silent)
			return
		}
		wait /= 4
	}
	first := e.err == nil // the error is logged once while it lasts
	if e.err, e.retry = err, x.o.Now().Add(wait); !first {
		return
	}
	x.o.Log.Error("snapshot references unreadable: nothing is reclaimed in its collection",
		zap.Int64("snapshot", e.id), zap.String("name", e.name), zap.Int64("collection", e.collection), zap.Error(err))
}

// countLoaded counts the references of a snapshot, and makes it known. The lock must
// be held; it is yielded.
func (x *Index) countLoaded(e *entry, refs *snapshotRefs) {
	c := x.collections[e.collection]
	c.counts.count(refs, 1, x.yieldLock)
	legacy := x.legacy[e.id] != nil
	if legacy {
		x.legacyRefs.countIDs(refs, 1, x.yieldLock)
	}
	if e.removed { // while the lock was yielded
		c.counts.count(refs, -1, func() {})
		if legacy {
			x.legacyRefs.countIDs(refs, -1, func() {})
		}
		return
	}
	e.refs, e.legacy, e.err = refs, legacy, nil
	delete(x.missing, e.id)
	delete(x.legacy, e.id)
	delete(c.missing, e.id)
}

// load reads the references of a snapshot. It parses only bytes with the expected
// digest.
func (x *Index) load(ctx context.Context, e *entry) (*snapshotRefs, error) {
	if refs := x.takePrimed(e); refs != nil {
		return refs, nil
	}
	store, ok := x.o.Stores[e.store]
	if !ok {
		return nil, fmt.Errorf("its objects are in store %q, which is not configured here", e.store)
	}
	dir, file := manifest.Dir(e.collection, e.id), e.refsFile
	if file.Length == 0 {
		data, err := read(ctx, store, dir+manifest.MetadataName, e.metadata)
		if err != nil {
			return nil, err
		}
		md, err := manifest.DecodeMetadata(data)
		if err != nil {
			return nil, err
		}
		file = md.Refs
	}
	data, err := read(ctx, store, dir+manifest.RefsName, file.Digest)
	if err != nil {
		return nil, err
	}
	refs, err := manifest.DecodeRefs(data, file)
	if err != nil {
		return nil, err
	}
	return newSnapshotRefs(refs), nil
}

// read reads an object with the digest.
func read(ctx context.Context, store object.Store, key string, want manifest.Digest) ([]byte, error) {
	return object.ReadVerified(ctx, store, key, want.Length, func(data []byte) error {
		if err := want.Check(data); err != nil {
			return fmt.Errorf("read %s: %w", key, err)
		}
		return nil
	})
}

// storeUnavailable reports whether err means that a store did not answer. Such an
// error proves nothing about the references in it.
func storeUnavailable(err error) bool {
	return errors.Is(err, object.ErrUnavailable) || meta.Unusable(err)
}
