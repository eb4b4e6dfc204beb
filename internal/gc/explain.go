package gc

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// ErrStoreNotFound means that no object store of an alias is configured.
var ErrStoreNotFound = errors.New("object store not found")

// Explanation says what an object is, and why it stays or goes.
type Explanation struct {
	Exists     bool
	Kept       bool   // nothing that runs by itself deletes it as things are
	What       string // for people, as is Reason
	Reason     string
	Collection int64            // that it belongs to; 0: none
	Snapshot   int64            // that it is an object of; 0: none
	Segment    int64            // that it is or was part of; 0: none
	Unit       int64            // that it was dropped with; 0: none
	Build      int64            // index build that it is or was part of; 0: none
	Snapshots  []SnapshotHolder // that hold it, a few of them, the newest first
	Holders    int              // how many hold it, snapshots and others
}

// Explain says what the object of a key is, whether it exists or not. It is
// advice: nobody may delete on it. It is ErrStoreNotFound for an alias that is not
// configured, and object.ErrInvalidKey for what is no key.
func (g *GC) Explain(ctx context.Context, store, key string) (Explanation, error) {
	s, ok := g.o.Stores[store]
	if !ok {
		return Explanation{}, fmt.Errorf("%w: %q", ErrStoreNotFound, store)
	}
	info, err := s.Head(ctx, key)
	if err != nil && !errors.Is(err, object.ErrNotFound) {
		return Explanation{}, fmt.Errorf("explain %s of store %s: %w", key, store, err)
	}
	e := Explanation{Exists: err == nil, Kept: true}
	if catalog.OwnKey(key) {
		err = g.explainOwn(ctx, s, info, key, &e)
	} else {
		err = g.explainFile(ctx, store, key, &e)
	}
	if err != nil {
		return Explanation{}, fmt.Errorf("explain %s of store %s: %w", key, store, err)
	}
	if !e.Exists {
		e.Reason = "There is no such object. If there were: " + e.Reason
	}
	return e, nil
}

// explainOwn is about an object under snapshotd's own prefixes.
func (g *GC) explainOwn(ctx context.Context, store object.Store, info object.Info, key string, e *Explanation) error {
	s := subjectOf(key)
	switch {
	case isNote(key):
		e.What, e.Reason = "note of how far the metadata store has come", "the newest two stay; they tell when the metadata store has gone back in time"
		return nil
	case s.own:
		e.What, e.Reason = "identity of the object store", "replicas compare it with what the metadata store says; it is never deleted"
		return nil
	case s.id == 0 && !strings.HasPrefix(key, snapshotsPrefix) && !strings.HasPrefix(key, gcPrefix):
		e.What, e.Reason = "probe of what the object store can do", "whoever made it deletes it"
		return nil
	case s.id == 0:
		e.What, e.Reason = "foreign object under a prefix of snapshotd's own", "not a name that snapshotd writes: left alone"
		return nil
	}
	e.Collection = s.collection
	switch {
	case s.unit:
		e.What, e.Unit = fmt.Sprintf("record of the parked unit %d", s.id), s.id
	case s.job:
		e.What = fmt.Sprintf("pinned ETags of source files of restore job %d", s.id)
	default:
		e.What, e.Snapshot = fmt.Sprintf("object of snapshot %d", s.id), s.id
		if said, err := g.explainSnapshot(ctx, s.id, e); said || err != nil {
			return err
		}
	}
	rec, err := g.readRecorded(ctx, []subject{s})
	if errors.Is(err, epoch.ErrRolledBack) {
		e.Reason = err.Error()
		return nil
	}
	if err != nil {
		return err
	}
	v, err := g.judge(ctx, s, rec)
	if err != nil {
		return err
	}
	e.Reason = v.reason
	if v.fate != dead {
		return nil
	}
	if g.o.CollectorOff {
		e.Reason += "; the collector is off, so it goes with `snapshotctl gc run --sweep`"
		return nil
	}
	if e.Exists {
		now, err := store.Now(ctx)
		if err != nil {
			return fmt.Errorf("read the clock of the store: %w", err)
		}
		if left := g.o.OrphanGrace - now.Sub(info.ModTime); left > 0 {
			e.Reason += fmt.Sprintf("; a sweep deletes it in %s", left.Round(time.Second))
			return nil
		}
	}
	e.Kept = false
	e.Reason += "; the next sweep deletes it"
	return nil
}

// explainSnapshot is about an object of a snapshot whose record there is.
func (g *GC) explainSnapshot(ctx context.Context, id int64, e *Explanation) (said bool, err error) {
	kv, found, _, err := g.kv.Get(ctx, keys.Snapshot(id))
	if err != nil || !found {
		return false, err
	}
	rec := &storagev1.Snapshot{}
	if err := record.Decode(kv, rec); err != nil {
		e.Reason = fmt.Sprintf("the record of the snapshot cannot be read, so it stays: %v", err)
		return true, nil
	}
	switch rec.GetState() {
	case pending:
		e.Reason = fmt.Sprintf("snapshot %q is being created", rec.GetName())
	case committed:
		e.Reason = fmt.Sprintf("snapshot %q is committed", rec.GetName())
	case deleting:
		e.Kept, e.Reason = false, fmt.Sprintf("snapshot %q was dropped, expired or given up, and is being deleted", rec.GetName())
		return true, nil
	default:
		e.Reason = fmt.Sprintf("snapshot %q is in state %d, of a newer release", rec.GetName(), rec.GetState())
	}
	e.Snapshots, e.Holders = []SnapshotHolder{{ID: id, Name: rec.GetName()}}, 1
	return true, nil
}

// explainFile is about an object that may be a file of a collection.
func (g *GC) explainFile(ctx context.Context, store, key string, e *Explanation) error {
	land, err := g.readTerritory(ctx)
	if err != nil {
		return err
	}
	claims := land.over(store, key)
	if len(claims) == 0 {
		e.What, e.Reason = "foreign object", "it lies under no root of a collection: left alone"
		return nil
	}
	for _, c := range claims {
		found, err := g.explainClaim(ctx, c, e)
		if err != nil || found {
			return err
		}
	}
	return g.explainUnknown(ctx, land, store, key, claims, e)
}

// explainClaim says what a collection has of a file, if it has it.
func (g *GC) explainClaim(ctx context.Context, c claim, e *Explanation) (found bool, err error) {
	path := catalog.FilePath{Root: c.root, Path: c.path}
	owner, found, err := g.o.Catalog.FindOwner(ctx, c.col.ID, path, 0)
	if err != nil || !found {
		return false, err
	}
	e.Collection, e.Segment, e.Unit = c.col.ID, owner.Segment, owner.Unit
	e.What = fmt.Sprintf("file of segment %d of collection %s", owner.Segment, c.col)
	if e.Build, err = g.buildOf(ctx, c, owner); err != nil {
		return false, err
	}
	if e.Build != 0 {
		e.What = fmt.Sprintf("file of index build %d of segment %d of collection %s", e.Build, owner.Segment, c.col)
	}
	a, unread, err := g.explainHolders(ctx, c.col, Ask{File: path, FileSegment: owner.Segment})
	if err != nil {
		return false, err
	}
	e.Snapshots, e.Holders = a.Snapshots, a.Holders
	switch a.State {
	case Live:
		e.Reason = "the segment lives"
	case Granted:
		e.Kept, e.Reason = false, fmt.Sprintf("the unit was granted at %s and is being deleted", a.Tombstone.GrantTime.Format(time.RFC3339))
		if a.Tombstone.Deleter == ByCaller {
			e.Reason = fmt.Sprintf("the unit was granted to %q at %s, who deletes it", a.Tombstone.Caller, a.Tombstone.GrantTime.Format(time.RFC3339))
		}
	case Dropped:
		since, err := g.droppedAt(ctx, c.col, owner)
		if err != nil {
			return false, err
		}
		if e.Holders > 0 {
			e.Reason = fmt.Sprintf("it was dropped%s and is held by %s", since, holdersText(&a))
		} else if unread != nil {
			e.Reason = fmt.Sprintf("it was dropped%s and stays until it can be told whether anything holds it", since)
		} else if e.Kept, e.Reason, err = g.taken(ctx, c.col); err != nil {
			return false, err
		} else {
			e.Reason = fmt.Sprintf("it was dropped%s and nothing holds it: %s", since, e.Reason)
		}
	case Unknown:
		e.Reason = "it is changing right now: ask again"
	}
	if unread != nil && a.State != Granted {
		e.Reason += fmt.Sprintf("; not all that hold it are known: %v", unread)
	}
	if !owner.Owned && a.State != Live {
		e.Kept = true
		e.Reason += "; but it does not lie at the place of that segment alone, so it is never deleted"
	}
	return true, nil
}

// explainHolders says what becomes of a file and who holds it. Where not all
// references can be read, unread says why: there may be more holders than it names.
func (g *GC) explainHolders(ctx context.Context, col *catalog.Collection, of Ask) (a Answer, unread, err error) {
	answers, err := g.decide(ctx, catalog.Ref{ID: col.ID}, []Ask{of}, nil)
	switch {
	case err == nil:
		return answers[0], nil, nil
	case !errors.Is(err, ErrLoading) && !errors.Is(err, ErrUnreadable):
		return Answer{}, nil, err
	}
	unread = err
	u, err := g.resolve(ctx, col, of)
	if err != nil {
		return Answer{}, nil, err
	}
	p, err := g.readPremises(ctx, col, []ask{u})
	if err != nil {
		return Answer{}, nil, err
	}
	return g.answer(col, u, p, &p.units[0]), unread, nil
}

// taken says whether the collector will not take by itself what was dropped from a
// collection and nothing holds, and what becomes of it.
func (g *GC) taken(ctx context.Context, col *catalog.Collection) (kept bool, reason string, err error) {
	if g.o.CollectorOff {
		return true, "the collector is off, so it goes with `snapshotctl gc run`, once the tolerance is over", nil
	}
	kv, found, _, err := g.kv.Get(ctx, keys.Round)
	if err != nil {
		return false, "", fmt.Errorf("read the last round: %w", err)
	}
	if found && col.State == catalog.Active {
		rec := &storagev1.Round{}
		if err := record.Decode(kv, rec); err != nil {
			return false, "", err
		}
		for _, stop := range rec.GetStops() {
			if stop.GetCollectionId() == col.ID {
				return true, fmt.Sprintf("but the last round stopped in this collection, in which %d of %d units and segments would go: see `snapshotctl gc status`, then `snapshotctl gc run`",
					stop.GetDue(), stop.GetTotal()), nil
			}
		}
	}
	return false, "the collector takes it once the tolerance is over", nil
}

// buildOf returns the index build that a file is or was part of, by the records of
// what has it; 0: none.
func (g *GC) buildOf(ctx context.Context, c claim, owner catalog.Owner) (int64, error) {
	s := &segment.Segment{}
	switch {
	case owner.Live:
		kv, found, _, err := g.kv.Get(ctx, keys.Segment(c.col.ID, owner.Segment))
		if err != nil || !found {
			return 0, err
		}
		live, err := catalog.DecodeSegment(c.col.ID, kv)
		if err != nil {
			return 0, err
		}
		s = &live
	case owner.Unit != owner.Segment:
		kv, found, _, err := g.kv.Get(ctx, keys.Unit(c.col.ID, owner.Unit))
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
			if f.Root == c.root && f.Path == c.path {
				return s.Builds[i].ID, nil
			}
		}
	}
	return 0, nil
}

// droppedAt says since when what an owner stands for is dropped, in words that
// follow a verb.
func (g *GC) droppedAt(ctx context.Context, col *catalog.Collection, owner catalog.Owner) (string, error) {
	at := col.DropTime
	if owner.Unit != 0 {
		kv, found, _, err := g.kv.Get(ctx, keys.Unit(col.ID, owner.Unit))
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

// holdersText names who holds a unit.
func holdersText(a *Answer) string {
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

// explainUnknown is about a file that no record was found of by its path: it is
// looked for in all of them.
func (g *GC) explainUnknown(ctx context.Context, land *territory, store, key string, claims []claim, e *Explanation) error {
	first := claims[0].col
	for _, c := range claims { // whose id it carries, if there is one
		if collection, _, _, ok := segment.NativePlace(c.path); ok && collection == c.col.ID {
			first = c.col
		}
	}
	e.Collection = first.ID
	s := &search{g: g, o: OrphanOptions{Grace: g.o.OrphanGrace}, col: *first, land: land, alias: store}
	s.kept = []suspect{{info: object.Info{Key: key}, claims: claims}}
	f, err := s.read(ctx)
	switch {
	case errors.Is(err, ErrLoading), errors.Is(err, ErrUnreadable), errors.Is(err, epoch.ErrRolledBack):
		e.What = fmt.Sprintf("object under a root of collection %s", first)
		e.Reason = fmt.Sprintf("it cannot be told whether anything needs it, so it stays: %v", err)
		return nil
	case err != nil:
		return err
	case f.known[0]:
		return g.explainElsewhere(ctx, claims, key, f.jobs[0], e)
	}
	e.What = fmt.Sprintf("orphan under a root of collection %s", first)
	reason, deletable, err := s.judge(ctx, &s.kept[0], f)
	if err != nil {
		return err
	}
	e.Reason = reason
	if deletable {
		e.Reason += "; nothing deletes it but a call to delete the orphans of the collection"
	}
	return nil
}

// explainElsewhere is about a file that something has under a path that does not
// lead to it, that a restore may be writing, or that lies where something has its
// files.
func (g *GC) explainElsewhere(ctx context.Context, claims []claim, key string, job int64, e *Explanation) error {
	for _, c := range claims {
		if list, n := g.refs.holders(c.col.ID, wanted{files: wantedOf(c, key)[0].files}); n > 0 {
			e.Collection, e.Snapshots, e.Holders = c.col.ID, list, n
			e.What = fmt.Sprintf("file of collection %s", c.col)
			if e.Reason = "1 snapshot references it"; n > 1 {
				e.Reason = fmt.Sprintf("%d snapshots reference it", n)
			}
			return nil
		}
		var owner int64
		from, to := meta.Prefix(keys.SegmentPrefix(c.col.ID))
		_, err := g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				seg, err := catalog.DecodeSegment(c.col.ID, kv)
				if err != nil {
					return err
				}
				for f := range seg.AllFiles() {
					if f.Root == c.root && f.Path == c.path {
						owner = seg.ID
						return errEnough
					}
				}
			}
			return nil
		})
		if err != nil && !errors.Is(err, errEnough) {
			return err
		}
		if owner != 0 {
			e.Collection, e.Segment, e.Holders = c.col.ID, owner, 1
			e.What = fmt.Sprintf("file of segment %d of collection %s", owner, c.col)
			e.Reason = "the segment lives"
			return nil
		}
	}
	e.What = fmt.Sprintf("object under a root of collection %s", claims[0].col)
	if job != 0 {
		e.Reason = fmt.Sprintf("restore job %d may be writing it: it stays as long as that runs", job)
		return nil
	}
	for _, c := range claims {
		for _, id := range segment.IDsIn(c.path) {
			if _, n := g.refs.holders(c.col.ID, wanted{segment: id}); n > 0 {
				e.Collection, e.Reason = c.col.ID, fmt.Sprintf(unregistered, id)
				return nil
			}
			if _, n := g.refs.holders(c.col.ID, wanted{build: id}); n > 0 {
				e.Collection = c.col.ID
				e.Reason = fmt.Sprintf("not registered; it lies where index build %d has its files, and stays as long as a snapshot of that does", id)
				return nil
			}
		}
	}
	e.Reason = "something that was dropped has it under another id: it stays"
	return nil
}
