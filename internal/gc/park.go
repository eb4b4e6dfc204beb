package gc

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Parking
//
// A unit that snapshots hold for long is parked: the bytes of its record go to
// the object gc/held/<collection>/<unit> of the snapshot store, and the metadata
// store keeps a stub, which is the same record without the segment, with where
// the bytes lie, their length and their SHA-256. So compaction under a thousand
// snapshots does not fill the metadata store.
//
//	      park              grant              confirm
//	full ------> parked ----------> tombstone ---------> gone
//	   |                                ^
//	   +------------- grant ------------+
//
// A swap whose inputs do not fit in one transaction parks some of them as it drops
// them: such a unit is never full, and its object's key ends with a part of its
// digest ([catalog.Catalog.Change] says how).
//
// There is no way back from parked to full: the grant puts the whole record into
// the tombstone. So an object is written while its unit is full, needed while it
// is parked, and dead as soon as there is no record of the unit, which is for
// good, as ids are never used twice.
//
// # Transactions
//
//	park     (the object is put) compares: unit as read, what the caller adds,
//	         such as the leader's election key
//	         puts: stub
//	grant    (the object is read, its length and digest are right) as ever:
//	         compares the stub as read; puts: tombstone with the whole unit;
//	         deletes: stub. Then the object is deleted, if that succeeds
//
// The transactions of park and grant compare the same record, and each changes
// it: of two at once one wins. A full record never changes, so whoever puts the
// object puts the same bytes, however late.
//
// Objects that nobody needs are found by a sweep. It may delete one only when
// there is no record of its unit, nor a segment of its id that may become one, at a
// revision read after the listing. One whose
// unit is full must stay: whoever has put it may be about to write the stub, and
// a delete that comes late would take what the stub of another refers to.
//
// # The revision of the drop
//
// A pending create that is younger than a unit's drop does not hold the unit, for
// it captures without it. To take a later revision than that of the drop for it is
// safe: creates that never saw the unit count as older, and hold it until they
// end. To take an earlier one is not: a create that has captured the unit would
// count as younger. Parking puts the record again, so the revision of its last
// write would be a later one, and each time that a unit is parked creates that are
// under way would hold it for nothing. The begin of a committed
// snapshot is compared with the same revision. Its create revision is exact: the
// transaction that drops a unit compares that its key is not there, and the key is
// deleted once, by the grant, and never put again.
//
// # Who holds
//
// That a snapshot has the unit by its id is seen by the stub. Only when nothing
// holds it by that is the record read: a file of it may be held as a foreign one,
// and the grant needs it. Everybody else who looks for files, in
// [catalog.Catalog.FindOwner] and where files are registered, reads it whole.
//
// # Failures
//
//	object cannot be put     the unit stays full. The put may come late: the
//	                         same bytes
//	put, and dies; compare   the object stays. The next one to park the unit puts
//	of park fails            it again; once the unit is granted a sweep deletes it
//	park: no answer          the unit is full, or parked with its object in place.
//	                         A repeat parks it, or finds that it is
//	old leader wakes up      its object is the one that is there, or one without a
//	                         record; its stub fails by the compare
//	object cannot be read    the unit is not granted, and what needs its files ends
//	                         with an error that names the object. Nothing is
//	                         deleted, and the stub stays
//	object is gone, and so   the unit was granted meanwhile: decided anew
//	is the stub
//	object is gone or other  as when it cannot be read, until somebody puts it
//	                         back. The unit never counts as one without files
//	grant: no answer,        the object stays for the sweep: without an answer
//	object not deleted       nobody may say that nothing needs it

const (
	parksInFlight = 8   // units that are parked, or read whole, at once
	parkAbove     = 256 // bytes: a smaller record stays where it is
)

// heldObject is where the record of a parked unit lies.
type heldObject struct {
	store, key string
	length     int64
}

// stubOf returns the stub of a unit whose record is full, and nil when it stays:
// it is one, or the record is too small for it to be worthwhile.
func stubOf(full []byte, rec *storagev1.Unit, store string) []byte {
	if rec.GetParked() != nil || len(full) <= parkAbove {
		return nil
	}
	sum := sha256.Sum256(full)
	stub := proto.CloneOf(rec)
	stub.Segment = nil
	stub.Parked = &storagev1.Parked{Store: store, Length: int64(len(full)), Sha256: sum[:]}
	data := record.Encode(stub)
	if len(data) >= len(full) {
		return nil
	}
	return data
}

// park moves the records of units to the object store, and returns of how many:
// those that it parked itself. Units that are gone, are parked, or whose records
// are small, do not count, and are no errors. conds are compared besides, in each
// transaction; a unit for which they or its record did not hold stays as it is.
// The error joins those of units, a few and how many more there are; it is of
// some units, and others may have been parked. A repeat is harmless.
func (g *GC) park(ctx context.Context, collection int64, units []int64, conds []meta.Cond) (n int, err error) {
	var parked atomic.Int64
	errs := make([]error, len(units))
	var group errgroup.Group
	group.SetLimit(parksInFlight)
	for i, unit := range units {
		if errs[i] = ctx.Err(); errs[i] != nil {
			break
		}
		group.Go(func() error {
			done, err := g.parkUnit(ctx, collection, unit, conds)
			if err != nil {
				errs[i] = fmt.Errorf("park unit %d of collection %d: %w", unit, collection, err)
			} else if done {
				parked.Add(1)
			}
			return nil
		})
	}
	_ = group.Wait() // each error has its place
	return int(parked.Load()), object.Join(errs...)
}

func (g *GC) parkUnit(ctx context.Context, collection, unit int64, conds []meta.Cond) (done bool, err error) {
	kv, found, _, err := g.kv.Get(ctx, keys.Unit(collection, unit))
	if err != nil || !found {
		return false, err
	}
	rec := &storagev1.Unit{}
	if err := record.Decode(kv, rec); err != nil {
		return false, err
	}
	stub := stubOf(kv.Value, rec, g.o.SnapshotStore)
	if stub == nil {
		return false, nil
	}
	store, ok := g.o.Stores[g.o.SnapshotStore]
	if !ok {
		return false, fmt.Errorf("%w: %q", errNoStore, g.o.SnapshotStore)
	}
	_, err = store.Put(ctx, catalog.HeldKey(collection, unit), kv.Value)
	if err != nil {
		return false, err
	}
	res, err := g.kv.Txn(ctx, meta.Txn{
		Name: "park.txn",
		If:   append([]meta.Cond{meta.Unchanged(kv.Key, kv.ModRevision)}, conds...),
		Then: []meta.Op{meta.Put(kv.Key, stub)},
	})
	return err == nil && res.Succeeded, err
}

// read takes up a unit from its record; of a parked one as much as the stub says.
func (s *unitState) read(collection, id int64, kv meta.KeyValue) error {
	rec := &storagev1.Unit{}
	if err := record.Decode(kv, rec); err != nil {
		return err
	}
	s.kv = kv
	parked := rec.GetParked()
	if parked == nil {
		return s.readWhole(collection, id, rec)
	}
	u := catalog.StubOf(collection, id, rec)
	u.Revision = kv.CreateRevision
	s.rec, s.unit = rec, &u
	s.held = &heldObject{store: parked.GetStore(), key: catalog.HeldKeyOf(collection, id, parked), length: parked.GetLength()}
	return nil
}

// readWhole takes up a unit from rec, which is whole.
func (s *unitState) readWhole(collection, id int64, rec *storagev1.Unit) error {
	u, err := catalog.UnitOf(collection, id, rec)
	if err != nil {
		return err
	}
	u.Revision = s.kv.CreateRevision
	s.rec, s.unit = rec, &u
	return nil
}

// size is how many bytes the unit takes in a tombstone, but for a few.
func (s *unitState) size() int {
	if s.held != nil {
		return int(s.held.length)
	}
	return len(s.kv.Value)
}

// readParked reads whole those of the parked units that nothing seems to hold,
// and answers for them anew, for one of their files may be held. It says when one
// of them is not any more as it was read: then all is to be decided anew.
func (g *GC) readParked(ctx context.Context, col *catalog.Collection, units []ask, p *premises, answers []Answer) (moved bool, err error) {
	var places []int
	for i := range units {
		if answers[i].State == Dropped && answers[i].Holders == 0 && p.units[i].unit.Parked {
			places = append(places, i)
		}
	}
	if len(places) == 0 {
		return false, nil
	}
	var gone atomic.Bool
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(parksInFlight)
	for _, i := range places {
		s := &p.units[i]
		group.Go(func() error {
			rec, err := g.o.Catalog.Whole(groupCtx, col.ID, s.unit.ID, s.rec)
			if err == nil {
				return s.readWhole(col.ID, s.unit.ID, rec)
			}
			now, found, _, getErr := g.kv.Get(groupCtx, s.kv.Key)
			if getErr != nil || found && now.ModRevision == s.kv.ModRevision {
				return err
			}
			gone.Store(true)
			return nil
		})
	}
	if err := group.Wait(); err != nil || gone.Load() {
		return gone.Load() && err == nil, err
	}
	for _, i := range places {
		answers[i] = g.answer(col, units[i], p, &p.units[i])
	}
	return false, nil
}

// deleteHeld deletes the objects of parked units that have been granted. What it
// cannot delete a sweep will find.
func (g *GC) deleteHeld(ctx context.Context, p *premises, granted []int) {
	list := map[string][]string{} // by store
	for _, i := range granted {
		if h := p.units[i].held; h != nil {
			list[h.store] = append(list[h.store], h.key)
		}
	}
	for alias, objects := range list {
		store, ok := g.o.Stores[alias]
		if !ok {
			continue // it was read from there, so this cannot be
		}
		err := store.Delete(ctx, objects...)
		if err != nil {
			g.log.Info("objects of units that were parked and are granted stay until they are swept",
				zap.String("store", alias), zap.Int("objects", len(objects)), zap.Error(err))
		}
	}
}
