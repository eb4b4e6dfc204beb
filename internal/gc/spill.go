package gc

import (
	"context"
	"fmt"
	"sync/atomic"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Spilling
//
// A unit that snapshots hold is spilled: the bytes of its record go to the object
// gc/held/<collection>/<unit> of the snapshot store, and the metadata store keeps a
// stub. The stub is the record without the segment, and has the store of the object,
// its length and its SHA-256 (field `parked`). So compaction under a
// thousand snapshots does not fill the metadata store.
//
//	     spill               grant              confirm
//	full ------> spilled ---------> tombstone ---------> gone
//	   |                                ^
//	   +------------- grant ------------+
//
// A swap whose inputs do not fit in one transaction spills some of them as it drops
// them: such a unit is never full, and the key of its object ends with a part of its
// digest ([catalog.Catalog.Change] describes it).
//
// A spilled unit never becomes full again: the grant puts the full record into the
// tombstone. So an object is written while its unit is full, needed while the unit is
// spilled, and dead once the unit has no record. That is final, as ids are never used
// twice.
//
// # Transactions
//
//	spill    (the object is put) compares: unit as read, the caller's conditions,
//	         such as the leader's election key
//	         puts: stub
//	grant    (the object is read, its length and digest are right) as for a full
//	         unit: compares the stub as read; puts: tombstone with the full
//	         record; deletes: stub. Then the object is deleted, if that succeeds
//
// The transactions of spill and grant compare the same record, and each changes it:
// one of two concurrent ones wins. A full record never changes, so every put of the
// object has the same bytes, however late.
//
// A sweep finds objects that nothing needs. It may delete one only if, at a revision
// read after the listing, its unit has no record, and there is no segment of its id
// that may become a unit. The object of a full unit must stay: its writer may be about
// to write the stub, and a late delete would remove the object of another writer's
// stub.
//
// # The revision of the drop
//
// A pending create that is younger than a unit's drop does not hold the unit, for it
// captures without it. A revision later than the drop is safe: creates that never saw
// the unit count as older, and hold it until they end. An earlier one is not: a create
// that has captured the unit would count as younger. Spilling puts the record again,
// so the mod revision would be later, and each spill would make running creates hold
// the unit in vain. The begin of a committed snapshot is compared with the same
// revision. The create revision is exact: the transaction that drops a unit compares
// that its key does not exist, and the key is deleted once, by the grant, and never
// put again.
//
// # Holders
//
// The stub suffices to find a snapshot that has the unit by its id. Only without such
// a holder is the record read: a file of it may be held as a foreign one, and the
// grant needs it. Every other lookup of files, in [catalog.Catalog.FindOwner] and at
// the registration of files, reads the full record.
//
// # Failures
//
//	object cannot be put     the unit stays full. The put may come late, with the
//	                         same bytes
//	process dies after the   the object stays. The next spill of the unit puts it
//	put; compare of spill    again; once the unit is granted a sweep deletes it
//	fails
//	spill: no answer         the unit is full, or spilled with its object in place.
//	                         A repeat spills it, or finds that it is spilled
//	old leader wakes up      its object is the one in place, or one without a
//	                         record; its stub fails by the compare
//	object cannot be read    the unit is not granted, and calls that need its files
//	                         fail with an error that names the object. Nothing is
//	                         deleted, and the stub stays
//	object and stub are gone the unit was granted meanwhile: decided again
//	object is gone or        as when it cannot be read, until it is restored. The
//	altered                  unit never counts as one without files
//	grant: no answer,        the object stays for the sweep: without an answer
//	object not deleted       nothing proves that it is not needed

const (
	spillsInFlight = 8   // units that are spilled, or loaded, at once
	spillAbove     = 256 // bytes: a smaller record stays in the metadata store
)

// stubOf returns the stub of a unit with a full record. It is nil if the record is a
// stub, or too small to be spilled.
func stubOf(full []byte, rec *storagev1.Unit, store string) []byte {
	if rec.GetParked() != nil || len(full) <= spillAbove {
		return nil
	}
	stub := catalog.NewStub(full, rec)
	stub.Parked.Store = store
	data := record.Encode(stub)
	if len(data) >= len(full) {
		return nil
	}
	return data
}

// Spill moves the records of units to the object store, and returns the number that it
// moved. Units that are gone, already spilled or small do not count, and are no
// errors. Each transaction compares conds as well; a unit whose record or conds do not
// hold stays as it is. The error joins those of units, a few of them and the number of
// the others; other units may have been spilled. A repeat is harmless.
func (g *GC) Spill(ctx context.Context, collection int64, units []int64, conds []meta.Cond) (n int, err error) {
	var spilled atomic.Int64
	errs := make([]error, len(units))
	var group errgroup.Group
	group.SetLimit(spillsInFlight)
	for i, unit := range units {
		if errs[i] = ctx.Err(); errs[i] != nil {
			break
		}
		group.Go(func() error {
			done, err := g.spillUnit(ctx, collection, unit, conds)
			if err != nil {
				errs[i] = fmt.Errorf("spill unit %d of collection %d: %w", unit, collection, err)
			} else if done {
				spilled.Add(1)
			}
			return nil
		})
	}
	_ = group.Wait() // each error has its place
	return int(spilled.Load()), object.Join(errs...)
}

func (g *GC) spillUnit(ctx context.Context, collection, unit int64, conds []meta.Cond) (done bool, err error) {
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
	_, err = store.Put(ctx, catalog.SpillKey(collection, unit), kv.Value)
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

// loadSpilled loads the full records of the units at places, which are spilled. It
// returns true if one of them has changed since it was read: then everything must be
// decided again.
func (g *GC) loadSpilled(
	ctx context.Context, collection int64, p *preconditions, places []int,
) (changed bool, err error) {
	var gone atomic.Bool
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(spillsInFlight)
	for _, i := range places {
		s := &p.units[i]
		group.Go(func() error {
			rec, err := g.o.Catalog.LoadRecord(groupCtx, collection, s.unit.ID, s.rec)
			if err == nil {
				return s.setRecord(collection, s.unit.ID, rec)
			}
			now, found, _, getErr := g.kv.Get(groupCtx, s.kv.Key)
			if getErr != nil || found && now.ModRevision == s.kv.ModRevision {
				return err
			}
			gone.Store(true)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return false, err
	}
	return gone.Load(), nil
}

// deleteSpilled deletes the objects of spilled units that were granted. Objects that
// it cannot delete stay for a sweep.
func (g *GC) deleteSpilled(ctx context.Context, p *preconditions, granted []int) {
	list := map[string][]string{} // by store
	for _, i := range granted {
		if o := p.units[i].spilled; o != nil {
			list[o.store] = append(list[o.store], o.key)
		}
	}
	for alias, objects := range list {
		store, ok := g.o.Stores[alias]
		if !ok {
			continue // impossible: the record was read from it
		}
		err := store.Delete(ctx, objects...)
		if err != nil {
			g.log.Info("objects of granted spilled units not deleted, left for the sweep",
				zap.String("store", alias), zap.Int("objects", len(objects)), zap.Error(err))
		}
	}
}
