package gc

import (
	"context"
	"fmt"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Limits of one decision.
const (
	BatchUnits    = 40 // units per transaction: up to three reads, three compares and two writes each
	BatchInFlight = 8
	batchBytes    = 768 << 10 // of records in one transaction
	maxAttempts   = 16
)

// Ask names a unit: one of its fields is set.
type Ask struct {
	Segment int64
	Build   int64
	File    catalog.FilePath
	// FileSegment is the segment that File is or was part of; 0: found by the
	// path.
	FileSegment int64
}

// Target is a resolved Ask.
type Target struct {
	Unit        int64 // id of the unit that it is or would be; 0: the catalog does not have the file
	Build       bool  // the Ask names an index build
	LiveSegment int64 // the segment that has the file
}

// resolveAll resolves asks, and looks up several files at once.
func (g *GC) resolveAll(ctx context.Context, col *catalog.Collection, asks []Ask) ([]Target, error) {
	targets := make([]Target, len(asks))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(BatchInFlight)
	for i, a := range asks {
		switch {
		case a.Segment > 0:
			targets[i] = Target{Unit: a.Segment}
		case a.Build > 0:
			targets[i] = Target{Unit: a.Build, Build: true}
		default:
			group.Go(func() (err error) {
				targets[i], err = g.resolveFile(ctx, col, a)
				return err
			})
		}
	}
	return targets, group.Wait()
}

// resolveFile looks up the owner of a file.
func (g *GC) resolveFile(ctx context.Context, col *catalog.Collection, a Ask) (Target, error) {
	owner, found, err := g.o.Catalog.FindOwner(ctx, col.ID, a.File, a.FileSegment)
	switch {
	case err != nil:
		return Target{}, err
	case !found:
		return Target{}, nil
	case owner.Live && col.State == catalog.Dropping:
		return Target{Unit: owner.Segment}, nil
	case owner.Live:
		return Target{LiveSegment: owner.Segment}, nil
	}
	return Target{Unit: owner.Unit}, nil
}

// preconditions are the facts that a decision depends on, all read at one revision.
type preconditions struct {
	revision   int64
	generation int64 // 0: no snapshot was ever committed
	history    int64 // of the metadata store; 0: unknown
	pending    []meta.KeyValue
	units      []unitState
	rolledBack error // not nil: the metadata store has gone back in time, nothing is granted
}

// unitState is the state of one unit in the metadata store.
type unitState struct {
	live      bool          // it is a segment of the collection
	unit      *catalog.Unit // of a spilled unit the fields of its stub, until its record is loaded
	kv        meta.KeyValue // of the unit
	rec       *storagev1.Unit
	tombstone *Tombstone
	spilled   *spilledObject // of a spilled unit
}

// spilledObject is the object with the record of a spilled unit.
type spilledObject struct {
	store, key string
	length     int64
}

// commonReads are the reads of a decision, without those of the units.
func commonReads(collection int64) []meta.Op {
	from, to := meta.Prefix(keys.PendingPrefix(collection))
	return []meta.Op{
		meta.Get(keys.Generation(collection)), meta.GetRange(from, to), meta.Get(keys.RolledBack), meta.Get(keys.Epoch),
	}
}

// newPreconditions returns the preconditions for n units from the results of
// commonReads.
func newPreconditions(res *meta.TxnResult, n int) *preconditions {
	p := &preconditions{revision: res.Revision, pending: res.Ranges[1], units: make([]unitState, n)}
	p.generation = generationOf(res.Ranges[0])
	p.rolledBack = epoch.Blocked(res.Ranges[2])
	p.history = epoch.History(res.Ranges[3])
	return p
}

// generationOf returns the generation of a collection, from the result of a get of its key.
func generationOf(found []meta.KeyValue) int64 {
	if len(found) == 0 {
		return 0
	}
	return found[0].ModRevision
}

// readPreconditions reads the preconditions of a decision on targets.
func (g *GC) readPreconditions(ctx context.Context, col *catalog.Collection, targets []Target) (*preconditions, error) {
	collection := col.ID
	gets := commonReads(collection)
	first := len(gets)
	for _, t := range targets {
		gets = append(gets, meta.Get(keys.Unit(collection, t.Unit)), meta.Get(keys.Tombstone(collection, t.Unit)),
			meta.Get(keys.Segment(collection, t.Unit)))
	}
	res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, fmt.Errorf("read units: %w", err)
	}
	p := newPreconditions(&res, len(targets))
	for i := range targets {
		s, got := &p.units[i], res.Ranges[first+3*i:]
		s.live = len(got[2]) > 0
		for _, kv := range got[0] {
			if err := s.readUnit(collection, targets[i].Unit, kv); err != nil {
				return nil, err
			}
		}
		for _, kv := range got[1] {
			if s.tombstone, err = DecodeTombstone(kv); err != nil {
				return nil, err
			}
		}
		if s.live && col.State == catalog.Dropping && s.unit == nil && s.tombstone == nil {
			if err := s.readSegment(col, got[2][0]); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// RecordKey returns the key of a unit's record: keys.Unit, or keys.Segment for a
// segment of a dropped collection.
type RecordKey func(collection, id int64) string

// readKnownUnits reads the preconditions of a grant of units whose record keys are
// known, without their tombstones and without other records of their ids. The grant
// compares that there are none.
func (g *GC) readKnownUnits(
	ctx context.Context, col *catalog.Collection, targets []Target, keyOf RecordKey,
) (*preconditions, error) {
	gets := commonReads(col.ID)
	first := len(gets)
	for _, t := range targets {
		gets = append(gets, meta.Get(keyOf(col.ID, t.Unit)))
	}
	res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, fmt.Errorf("read units: %w", err)
	}
	p := newPreconditions(&res, len(targets))
	for i := range targets {
		s := &p.units[i]
		for _, kv := range res.Ranges[first+i] {
			if kv.Key == keys.Unit(col.ID, targets[i].Unit) {
				err = s.readUnit(col.ID, targets[i].Unit, kv)
			} else if col.State == catalog.Dropping {
				err = s.readSegment(col, kv)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// readSegment reads a segment that was dropped with its collection as a unit. The
// segment's record, which never changes any more, replaces that of a unit.
func (s *unitState) readSegment(col *catalog.Collection, kv meta.KeyValue) error {
	seg := &storagev1.Segment{}
	if err := record.Decode(kv, seg); err != nil {
		return err
	}
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return err
	}
	seg.State = uint32(segment.Dropped)
	s.kv = kv
	s.rec = &storagev1.Unit{Format: record.Format, Kind: uint32(catalog.UnitSegment), SegmentId: id, Segment: seg}
	u, err := catalog.UnitOf(col.ID, id, s.rec)
	if err != nil {
		return err
	}
	u.Revision, s.unit, s.live = col.Revision, &u, false
	return nil
}

// readUnit reads a unit from its record; of a spilled unit only the fields of the stub.
func (s *unitState) readUnit(collection, id int64, kv meta.KeyValue) error {
	rec := &storagev1.Unit{}
	if err := record.Decode(kv, rec); err != nil {
		return err
	}
	s.kv = kv
	stub := rec.GetParked()
	if stub == nil {
		return s.setRecord(collection, id, rec)
	}
	u := catalog.StubOf(collection, id, rec)
	u.Revision = kv.CreateRevision
	s.rec, s.unit = rec, &u
	s.spilled = &spilledObject{
		store: stub.GetStore(), key: catalog.SpillKeyOf(collection, id, stub), length: stub.GetLength(),
	}
	return nil
}

// setRecord sets the unit from its full record.
func (s *unitState) setRecord(collection, id int64, rec *storagev1.Unit) error {
	u, err := catalog.UnitOf(collection, id, rec)
	if err != nil {
		return err
	}
	u.Revision = s.kv.CreateRevision
	s.rec, s.unit = rec, &u
	return nil
}

// size is the approximate number of bytes of the unit in a tombstone.
func (s *unitState) size() int {
	if s.spilled != nil {
		return int(s.spilled.length)
	}
	return len(s.kv.Value)
}

// unitQuery returns the references that hold a unit, in a history of the metadata
// store. It has no files for a spilled unit, whose record is loaded only if no
// snapshot holds it through its id.
func unitQuery(col *catalog.Collection, u *catalog.Unit, history int64) refs.Query {
	q := HeadQuery(u.Kind, u.ID, u.Segment.ID, u.Revision, history)
	if u.Spilled {
		return q
	}
	q.Files = func(yield func(uint64) bool) {
		for f := range u.Owned() {
			if f.Root >= len(col.Roots) {
				continue
			}
			root := col.Roots[f.Root]
			if !yield(manifest.FileHash(root.Store, root.Prefix+f.Path)) {
				return
			}
		}
	}
	return q
}

// HeadQuery returns the references that hold a unit through its id or its segment's,
// from the head of the unit's record and the record's create revision.
func HeadQuery(kind catalog.UnitKind, unit, segment, dropped, history int64) refs.Query {
	switch kind {
	case catalog.UnitBuild:
		return refs.Query{Build: unit}
	case catalog.UnitFiles:
		return refs.Query{Segment: segment, RemovedAt: dropped, History: history}
	case catalog.UnitSegment:
	}
	return refs.Query{Segment: segment}
}

// History returns the history of the metadata store.
func (g *GC) History(ctx context.Context) (int64, error) {
	res, err := g.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch)}})
	if err != nil {
		return 0, fmt.Errorf("read the history of the metadata store: %w", err)
	}
	return epoch.History(res.Ranges[0]), nil
}
