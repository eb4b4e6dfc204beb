package collect

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Explanation describes an object and the reason why it stays or goes.
type Explanation struct {
	Exists     bool
	Kept       bool   // no background work deletes it in the present state
	What       string // for humans, as is Reason
	Reason     string
	Collection int64               // that it belongs to; 0: none
	Snapshot   int64               // that it is an object of; 0: none
	Segment    int64               // that it is or was part of; 0: none
	Unit       int64               // that it was dropped with; 0: none
	Build      int64               // index build that it is or was part of; 0: none
	Snapshots  []gc.SnapshotHolder // the newest of its holders, newest first
	Holders    int                 // number of holders, snapshots and others
}

// Explain describes the object of a key, whether it exists or not. It is advice: callers
// must not delete on it. It is object.ErrStoreNotFound for an unknown alias, and
// object.ErrInvalidKey for an invalid key.
func (c *Collector) Explain(ctx context.Context, store, key string) (Explanation, error) {
	s, ok := c.stores[store]
	if !ok {
		return Explanation{}, fmt.Errorf("%w: %q", object.ErrStoreNotFound, store)
	}
	info, err := s.Head(ctx, key)
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		return Explanation{}, fmt.Errorf("explain %s of store %s: %w", key, store, err)
	}
	e := Explanation{Exists: err == nil, Kept: true}
	if catalog.OwnKey(key) {
		err = c.explainOwn(ctx, s, info, key, &e)
	} else {
		err = c.explainFile(ctx, store, key, &e)
	}
	if err != nil {
		return Explanation{}, fmt.Errorf("explain %s of store %s: %w", key, store, err)
	}
	if !e.Exists {
		e.Reason = "No such object. If it existed: " + e.Reason
	}
	return e, nil
}

// explainOwn explains an object under snapshotd's own prefixes.
func (c *Collector) explainOwn(
	ctx context.Context, store object.Store, info object.Info, key string, e *Explanation,
) error {
	s := subjectOf(key)
	switch {
	case isHeartbeat(key):
		e.What = "heartbeat of the metadata store"
		e.Reason = "the newest two heartbeats stay; they reveal a metadata rollback"
		return nil
	case s.own:
		e.What = "identity of the object store"
		e.Reason = "replicas compare it with the metadata store; it is never deleted"
		return nil
	case s.id == 0 && !strings.HasPrefix(key, snapshotsPrefix) && !strings.HasPrefix(key, gcPrefix):
		e.What, e.Reason = "probe of the object store", "the probing process deletes it"
		return nil
	case s.id == 0:
		e.What, e.Reason = "foreign object under a prefix of snapshotd's own", "not a name of snapshotd: not deleted"
		return nil
	}
	e.Collection = s.collection
	switch {
	case s.unit:
		e.What, e.Unit = fmt.Sprintf("record of the spilled unit %d", s.id), s.id
	case s.job:
		e.What = fmt.Sprintf("pinned ETags of source files of restore job %d", s.id)
	default:
		e.What, e.Snapshot = fmt.Sprintf("object of snapshot %d", s.id), s.id
		if done, err := c.explainSnapshot(ctx, s.id, e); done || err != nil {
			return err
		}
	}
	found, err := c.lookUp(ctx, []subject{s})
	if errors.Is(err, epoch.ErrRolledBack) {
		e.Reason = err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	v, err := c.judge(ctx, s, found)
	if err != nil {
		return err
	}
	e.Reason = v.reason
	if v.disposition != dead {
		return nil
	}
	if c.o.Off {
		e.Reason += "; the collector is off: `snapshotctl gc run --sweep` deletes it"
		return nil
	}
	if e.Exists {
		now, err := store.Now(ctx)
		if err != nil {
			return fmt.Errorf("read the clock of the object's store: %w", err)
		}
		if left := c.o.OrphanGrace - now.Sub(info.ModTime); left > 0 {
			e.Reason += fmt.Sprintf("; a sweep deletes it in %s", left.Round(time.Second))
			return nil
		}
	}
	e.Kept = false
	e.Reason += "; the next sweep deletes it"
	return nil
}

// explainSnapshot explains an object of a snapshot with a record. done is false without
// one.
func (c *Collector) explainSnapshot(ctx context.Context, id int64, e *Explanation) (done bool, err error) {
	kv, found, _, err := c.kv.Get(ctx, keys.Snapshot(id))
	if err != nil || !found {
		return false, err
	}
	s, err := snapshot.Decode(kv)
	if err != nil {
		e.Reason = fmt.Sprintf("the record of the snapshot is unreadable, the object stays: %v", err)
		return true, nil
	}
	switch s.State {
	case snapshot.Pending:
		e.Reason = fmt.Sprintf("snapshot %q is being created", s.Name)
	case snapshot.Committed:
		e.Reason = fmt.Sprintf("snapshot %q is committed", s.Name)
	case snapshot.Deleting:
		e.Kept = false
		e.Reason = fmt.Sprintf("snapshot %q was dropped, expired or abandoned; its deletion is in progress", s.Name)
		return true, nil
	default:
		e.Reason = fmt.Sprintf("snapshot %q is in state %d, of a newer release", s.Name, s.State)
	}
	e.Snapshots, e.Holders = []gc.SnapshotHolder{{ID: id, Name: s.Name}}, 1
	return true, nil
}

// explainFile explains an object that may be a file of a collection.
func (c *Collector) explainFile(ctx context.Context, store, key string, e *Explanation) error {
	roots, err := c.readRootOwners(ctx)
	if err != nil {
		return err
	}
	owners := roots.of(store, key)
	if len(owners) == 0 {
		e.What, e.Reason = "foreign object", "under no root of a collection: not deleted"
		return nil
	}
	for _, o := range owners {
		found, err := c.explainOwned(ctx, o, e)
		if err != nil || found {
			return err
		}
	}
	return c.explainUnknown(ctx, roots, store, key, owners, e)
}

// explainOwned explains a file of a collection. found is false if the collection does not
// have it.
func (c *Collector) explainOwned(ctx context.Context, o ownership, e *Explanation) (found bool, err error) {
	path := catalog.FilePath{Root: o.root, Path: o.path}
	owner, found, err := c.catalog.FindOwner(ctx, o.col.ID, path, 0)
	if err != nil || !found {
		return false, err
	}
	e.Collection, e.Segment, e.Unit = o.col.ID, owner.Segment, owner.Unit
	e.What = fmt.Sprintf("file of segment %d of collection %s", owner.Segment, o.col)
	if e.Build, err = c.buildOf(ctx, o, owner); err != nil {
		return false, err
	}
	if e.Build != 0 {
		e.What = fmt.Sprintf("file of index build %d of segment %d of collection %s", e.Build, owner.Segment, o.col)
	}
	a, unknown, err := c.gc.CheckKnown(ctx, o.col, gc.Ask{File: path, FileSegment: owner.Segment})
	if err != nil {
		return false, err
	}
	e.Snapshots, e.Holders = a.Snapshots, a.Holders
	switch a.State {
	case gc.Live:
		e.Reason = "the segment is live"
	case gc.Granted:
		granted := a.Tombstone.GrantTime.Format(time.RFC3339)
		e.Kept, e.Reason = false, fmt.Sprintf("the unit was granted at %s; the collector deletes it", granted)
		if a.Tombstone.Deleter == gc.ByCaller {
			e.Reason = fmt.Sprintf("the unit was granted to caller %q at %s, which deletes it", a.Tombstone.Caller, granted)
		}
	case gc.Dropped:
		if err := c.explainDropped(ctx, o.col, owner, &a, unknown, e); err != nil {
			return false, err
		}
	case gc.Unknown:
		e.Reason = "the unit is changing: retry"
	}
	if unknown != nil && a.State != gc.Granted {
		e.Reason += fmt.Sprintf("; some holders are unknown: %v", unknown)
	}
	if !owner.Owned && a.State != gc.Live {
		e.Kept = true
		e.Reason += "; its path is not unique to that segment: it is never deleted"
	}
	return true, nil
}

// explainDropped explains a file of a dropped unit. unknown is why not all holders are
// known, nil if they are.
func (c *Collector) explainDropped(
	ctx context.Context, col *catalog.Collection, owner catalog.Owner, a *gc.Answer, unknown error, e *Explanation,
) error {
	since, err := c.droppedAt(ctx, col, owner)
	if err != nil {
		return err
	}
	switch {
	case e.Holders > 0:
		e.Reason = fmt.Sprintf("dropped%s, held by %s", since, holdersText(a))
	case unknown != nil:
		e.Reason = fmt.Sprintf("dropped%s, stays until its holders are known", since)
	default:
		kept, reason, err := c.explainReclaim(ctx, col)
		if err != nil {
			return err
		}
		e.Kept, e.Reason = kept, fmt.Sprintf("dropped%s, without holders: %s", since, reason)
	}
	return nil
}

// explainReclaim explains when a unit without holders is reclaimed. kept is true if that
// needs a call.
func (c *Collector) explainReclaim(
	ctx context.Context, col *catalog.Collection,
) (kept bool, reason string, err error) {
	if c.o.Off {
		return true, "the collector is off: `snapshotctl gc run` deletes it after the tolerance", nil
	}
	kv, found, _, err := c.kv.Get(ctx, keys.Cycle)
	if err != nil {
		return false, "", fmt.Errorf("read the last cycle: %w", err)
	}
	if found && col.State == catalog.Active {
		rec := &storagev1.Round{}
		if err := record.Decode(kv, rec); err != nil {
			return false, "", err
		}
		for _, stop := range rec.GetStops() {
			if stop.GetCollectionId() == col.ID {
				return true, fmt.Sprintf("the last cycle stopped in this collection: %d of %d units and segments are "+
					"eligible; see `snapshotctl gc status`, then `snapshotctl gc run`", stop.GetDue(), stop.GetTotal()), nil
			}
		}
	}
	return false, "the collector deletes it after the tolerance", nil
}

// buildOf returns the index build that a file is or was part of, from the record of its
// owner; 0: none.
func (c *Collector) buildOf(ctx context.Context, o ownership, owner catalog.Owner) (int64, error) {
	s := &segment.Segment{}
	switch {
	case owner.Live:
		kv, found, _, err := c.kv.Get(ctx, keys.Segment(o.col.ID, owner.Segment))
		if err != nil || !found {
			return 0, err
		}
		live, err := catalog.DecodeSegment(o.col.ID, kv)
		if err != nil {
			return 0, err
		}
		s = &live
	case owner.Unit != owner.Segment:
		kv, found, _, err := c.kv.Get(ctx, keys.Unit(o.col.ID, owner.Unit))
		if err != nil || !found {
			return 0, err
		}
		rec := &storagev1.Unit{}
		if err := record.Decode(kv, rec); err != nil {
			return 0, err
		}
		if ItemKind(rec.GetKind()) == ItemBuild {
			return owner.Unit, nil
		}
	}
	for i := range s.Builds {
		for _, f := range s.Builds[i].Files {
			if f.Root == o.root && f.Path == o.path {
				return s.Builds[i].ID, nil
			}
		}
	}
	return 0, nil
}

// droppedAt returns " at " and the drop time of an owner's unit; empty: unknown.
func (c *Collector) droppedAt(ctx context.Context, col *catalog.Collection, owner catalog.Owner) (string, error) {
	at := col.DropTime
	if owner.Unit != 0 {
		kv, found, _, err := c.kv.Get(ctx, keys.Unit(col.ID, owner.Unit))
		if err != nil {
			return "", err
		}
		if found {
			rec := &storagev1.Unit{}
			if err := record.Decode(kv, rec); err != nil {
				return "", err
			}
			at = record.Time(rec.GetDropTime())
		}
	}
	if at.IsZero() {
		return "", nil
	}
	return " at " + at.Format(time.RFC3339), nil
}

// holdersText lists the holders of a unit.
func holdersText(a *gc.Answer) string {
	var names []string
	for _, s := range a.Snapshots {
		names = append(names, fmt.Sprintf("snapshot %q", s.Name))
	}
	for _, s := range a.Creating {
		names = append(names, fmt.Sprintf("snapshot %d, which is being created", s.ID))
	}
	if more := a.Holders - len(names); more > 0 {
		names = append(names, fmt.Sprintf("%d more", more))
	}
	return strings.Join(names, ", ")
}

// explainUnknown explains a file whose path leads to no record. It searches all records.
func (c *Collector) explainUnknown(
	ctx context.Context, roots *rootOwners, store, key string, owners []ownership, e *Explanation,
) error {
	first := owners[0].col
	for _, o := range owners { // the collection whose id is in the path, if any
		if collection, _, _, ok := segment.NativePlace(o.path); ok && collection == o.col.ID {
			first = o.col
		}
	}
	e.Collection = first.ID
	s := &search{c: c, o: OrphanOptions{Grace: c.o.OrphanGrace}, col: *first, owners: roots, alias: store}
	s.candidates = []candidate{{info: object.Info{Key: key}, owners: owners}}
	f, err := s.lookUp(ctx)
	switch {
	case errors.Is(err, gc.ErrLoading), errors.Is(err, gc.ErrUnreadable), errors.Is(err, epoch.ErrRolledBack):
		e.What = fmt.Sprintf("object under a root of collection %s", first)
		e.Reason = fmt.Sprintf("its holders are unknown, it stays: %v", err)
		return nil
	case err != nil:
		return err
	case f.known[0]:
		return c.explainElsewhere(ctx, owners, key, f.jobs[0], e)
	}
	e.What = fmt.Sprintf("orphan under a root of collection %s", first)
	reason, deletable, err := s.judge(ctx, &s.candidates[0], f)
	if err != nil {
		return err
	}
	e.Reason = reason
	if deletable {
		e.Reason += "; only a request to delete the orphans of the collection deletes it"
	}
	return nil
}

// explainElsewhere explains a file that a record has though its path does not lead there,
// that a restore may be writing, or that is at the place of other files.
func (c *Collector) explainElsewhere(
	ctx context.Context, owners []ownership, key string, job int64, e *Explanation,
) error {
	for _, o := range owners {
		if list, n := c.refs.Holders(o.col.ID, refs.Query{Files: fileQueries(o, key)[0].Files}); n > 0 {
			e.Collection, e.Snapshots, e.Holders = o.col.ID, list, n
			e.What = fmt.Sprintf("file of collection %s", o.col)
			if e.Reason = "1 snapshot references it"; n > 1 {
				e.Reason = fmt.Sprintf("%d snapshots reference it", n)
			}
			return nil
		}
		owner, err := c.findSegment(ctx, o)
		if err != nil {
			return err
		}
		if owner != 0 {
			e.Collection, e.Segment, e.Holders = o.col.ID, owner, 1
			e.What = fmt.Sprintf("file of segment %d of collection %s", owner, o.col)
			e.Reason = "the segment is live"
			return nil
		}
	}
	e.What = fmt.Sprintf("object under a root of collection %s", owners[0].col)
	if job != 0 {
		e.Reason = fmt.Sprintf("restore job %d may be writing it: it stays until the job ends", job)
		return nil
	}
	for _, o := range owners {
		for _, id := range segment.IDsIn(o.path) {
			if _, n := c.refs.Holders(o.col.ID, refs.Query{Segment: id}); n > 0 {
				e.Collection, e.Reason = o.col.ID, fmt.Sprintf(unregistered, id)
				return nil
			}
			if _, n := c.refs.Holders(o.col.ID, refs.Query{Build: id}); n > 0 {
				e.Collection = o.col.ID
				e.Reason = fmt.Sprintf("not registered, at the place of index build %d: "+
					"it stays as long as a snapshot of the build", id)
				return nil
			}
		}
	}
	e.Reason = "a dropped unit has it under another id: it stays"
	return nil
}

// errFound ends a scan.
var errFound = errors.New("found")

// findSegment returns the live segment that has a file, by reading all segments of the
// collection; 0: none.
func (c *Collector) findSegment(ctx context.Context, o ownership) (id int64, err error) {
	from, to := meta.Prefix(keys.SegmentPrefix(o.col.ID))
	_, err = c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			seg, err := catalog.DecodeSegment(o.col.ID, kv)
			if err != nil {
				return err
			}
			for f := range seg.AllFiles() {
				if f.Root == o.root && f.Path == o.path {
					id = seg.ID
					return errFound
				}
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, errFound) {
		return 0, err
	}
	return id, nil
}
