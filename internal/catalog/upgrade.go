package catalog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Dispute is an id that several records have, from releases that claimed no ids.
type Dispute struct {
	ID          int64
	Part        bool    // the id of a part of a segment, else of a segment
	Collections []int64 // with the id, or with a file at its place
}

// ClaimAll writes the claims of all records of releases that claimed no ids, once in the
// life of a cluster: a repeat, and a concurrent replica, find the claims. It returns the
// disputed ids. No collection owns the files of a disputed id: its records have a flag,
// and nothing deletes the files.
//
// Before it has ended, nothing may be registered or granted. It reads all segments, units
// and tombstones.
func (c *Catalog) ClaimAll(ctx context.Context) ([]Dispute, error) {
	disputes, err := c.claimAll(ctx)
	if err != nil {
		return nil, fmt.Errorf("claim the ids of all segments: %w", err)
	}
	return disputes, nil
}

func (c *Catalog) claimAll(ctx context.Context) ([]Dispute, error) {
	if _, done, _, err := c.kv.Get(ctx, keys.Owners); err != nil || done {
		return nil, err
	}
	u := upgrade{c: c, misplaced: map[int64][]int64{}, disputed: map[newID][]int64{}}
	if err := u.restores(ctx); err != nil {
		return nil, err
	}
	var err error
	if u.nested, err = u.nestedRoots(ctx); err != nil {
		return nil, err
	}
	for _, prefix := range []string{keys.AllSegmentsPrefix, keys.AllUnitsPrefix, keys.AllTombstonesPrefix} {
		if err := u.scan(ctx, prefix); err != nil {
			return nil, err
		}
	}
	for id, collections := range u.misplaced {
		n := newID{id: id}
		u.disputed[n] = append(u.disputed[n], collections...)
		owner, err := u.ownerOf(ctx, n)
		if err != nil {
			return nil, err
		}
		if owner != 0 {
			u.disputed[n] = append(u.disputed[n], owner)
		}
	}
	var list []Dispute
	for n, collections := range u.disputed {
		slices.Sort(collections)
		collections = slices.DeleteFunc(slices.Compact(collections), func(id int64) bool { return id == 0 })
		if err := u.dispute(ctx, n, collections); err != nil {
			return nil, err
		}
		list = append(list, Dispute{ID: n.id, Part: n.part, Collections: collections})
	}
	slices.SortFunc(list, func(a, b Dispute) int { return cmp.Compare(a.ID, b.ID) })
	done := record.Encode(&storagev1.Owner{Format: record.Format})
	_, err = c.kv.Txn(ctx, meta.Txn{
		Name: "catalog.claimall", If: []meta.Cond{meta.Absent(keys.Owners)}, Then: []meta.Op{meta.Put(keys.Owners, done)},
	})
	return list, err
}

// upgrade is one run of ClaimAll.
type upgrade struct {
	c *Catalog
	// misplaced holds the ids of segments at whose place another segment has a file, with
	// the collections of the other segments.
	misplaced map[int64][]int64
	disputed  map[newID][]int64 // with the collections that have the id
	// nested holds the collections with nested roots.
	nested map[int64]bool
}

// recordID is an id of a record, with its collection.
type recordID struct {
	newID
	collection int64
}

// claim returns the write of the claim.
func (r recordID) claim() meta.Op {
	return meta.Put(r.key(), record.Encode(&storagev1.Owner{Format: record.Format, CollectionId: r.collection}))
}

// scan claims the ids of the records under prefix.
func (u *upgrade) scan(ctx context.Context, prefix string) error {
	from, to := meta.Prefix(prefix)
	_, err := u.c.kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
		units := make([]Unit, len(kvs))
		errs := make([]error, len(kvs))
		var reads errgroup.Group
		reads.SetLimit(2 * batchInFlight)
		for i, kv := range kvs {
			reads.Go(func() error {
				units[i], errs[i] = u.read(ctx, prefix, kv)
				return nil
			})
		}
		_ = reads.Wait() // each error has its place
		var list []recordID
		for i, unit := range units {
			collection := unit.Collection
			switch {
			case errors.Is(errs[i], record.ErrUnreadable):
				// Nothing deletes the files of an unreadable record. Its id stays taken.
				n := newID{id: unit.ID}
				u.disputed[n] = append(u.disputed[n], collection)
				continue
			case errs[i] != nil:
				return errs[i]
			}
			for _, n := range unit.ids() {
				list = append(list, recordID{n, collection})
				if u.nested[collection] {
					u.disputed[n] = append(u.disputed[n], collection)
				}
			}
			for f := range unit.Segment.AllFiles() {
				if place, ok := layout.PlaceOf(f.Path); ok && !place.Is(collection, unit.Segment.ID) {
					if of := u.misplaced[place.Segment]; !slices.Contains(of, collection) {
						u.misplaced[place.Segment] = append(of, collection)
					}
				}
			}
		}
		group, ctx := errgroup.WithContext(ctx)
		group.SetLimit(batchInFlight)
		results := make([][]recordID, (len(list)+batchIDs-1)/batchIDs)
		for i := range results {
			part := list[i*batchIDs : min(len(list), (i+1)*batchIDs)]
			group.Go(func() (err error) {
				results[i], err = u.claim(ctx, part)
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		for _, o := range slices.Concat(results...) {
			u.disputed[o.newID] = append(u.disputed[o.newID], o.collection)
		}
		return nil
	})
	return err
}

// read reads a segment, a unit or a tombstone as a unit. The ids are set even with an
// unreadable record.
func (u *upgrade) read(ctx context.Context, prefix string, kv meta.KeyValue) (Unit, error) {
	collection, id, err := keys.LastTwo(kv.Key)
	if err != nil {
		return Unit{}, err
	}
	unit := Unit{ID: id, Collection: collection, Kind: UnitSegment}
	if prefix == keys.AllSegmentsPrefix {
		unit.Segment, err = DecodeSegment(collection, kv)
		return unit, err
	}
	whole, err := u.c.ReadUnit(ctx, collection, kv)
	if err != nil {
		return unit, err
	}
	return whole, nil
}

// claim writes the claims of list, and returns the conflicting ones: the id as in list, and
// as claimed already.
func (u *upgrade) claim(ctx context.Context, list []recordID) (disputed []recordID, err error) {
	txn := meta.Txn{}
	once := map[recordID]bool{}
	for _, o := range list {
		if once[o] {
			continue
		}
		once[o] = true
		txn.If = append(txn.If, meta.Absent(keys.OwnerSegment(o.id)), meta.Absent(keys.OwnerBuild(o.id)))
		txn.Then = append(txn.Then, o.claim())
	}
	res, err := u.c.kv.Txn(ctx, txn)
	if err == nil && res.Succeeded {
		return nil, nil
	}
	if err != nil && !errors.Is(err, meta.ErrInvalid) { // ErrInvalid: a key is put twice
		return nil, err
	}
	for _, o := range list {
		res, err := u.c.kv.Txn(ctx, meta.Txn{
			If:   []meta.Cond{meta.Absent(keys.OwnerSegment(o.id)), meta.Absent(keys.OwnerBuild(o.id))},
			Then: []meta.Op{o.claim()},
			Else: []meta.Op{meta.Get(keys.OwnerSegment(o.id)), meta.Get(keys.OwnerBuild(o.id))},
		})
		if err != nil {
			return nil, err
		}
		for kind, kvs := range res.Ranges { // empty when it is claimed now
			for _, kv := range kvs {
				rec := &storagev1.Owner{}
				if err := record.Decode(kv, rec); err != nil {
					return nil, err
				}
				if rec.GetCollectionId() != o.collection || o.part != (kind == 1) {
					disputed = append(disputed, o, recordID{newID{o.id, kind == 1}, rec.GetCollectionId()})
				}
			}
		}
	}
	return disputed, nil
}

// ownerOf returns the collection that claims an id, 0 for none.
func (u *upgrade) ownerOf(ctx context.Context, n newID) (int64, error) {
	kv, found, _, err := u.c.kv.Get(ctx, n.key())
	if err != nil || !found {
		return 0, err
	}
	rec := &storagev1.Owner{}
	err = record.Decode(kv, rec)
	return rec.GetCollectionId(), err
}

// dispute assigns an id to no collection, and flags the records that have it.
func (u *upgrade) dispute(ctx context.Context, n newID, collections []int64) error {
	if !n.part {
		for _, collection := range collections {
			if err := u.mark(ctx, collection, n.id); err != nil {
				return err
			}
		}
	}
	owner := record.Encode(&storagev1.Owner{Format: record.Format})
	_, err := u.c.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(n.key(), owner)}})
	return err
}

// mark flags the records of a segment of a collection, and of its removed parts, as
// disputed.
func (u *upgrade) mark(ctx context.Context, collection, id int64) error {
	units := []int64{id}
	from, to := meta.Prefix(keys.ReplacedPrefix(collection, id))
	res, err := u.c.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true})
	if err != nil {
		return err
	}
	for _, kv := range res.KVs {
		part, err := keys.LastID(kv.Key)
		if err != nil {
			return err
		}
		units = append(units, part)
	}
	if err := u.rewrite(ctx, keys.Segment(collection, id), func(kv meta.KeyValue) (record.Message, error) {
		rec := &storagev1.Segment{}
		err := record.Decode(kv, rec)
		rec.Disputed = true
		return rec, err
	}); err != nil {
		return err
	}
	for _, unit := range units { // the record before the tombstone: a unit moves from the one to the other
		if err := u.rewrite(ctx, keys.Unit(collection, unit), func(kv meta.KeyValue) (record.Message, error) {
			rec := &storagev1.Unit{}
			err := record.Decode(kv, rec)
			rec.Disputed = rec.GetSegmentId() == id
			return rec, err
		}); err != nil {
			return err
		}
		if err := u.rewrite(ctx, keys.Tombstone(collection, unit), func(kv meta.KeyValue) (record.Message, error) {
			rec := &storagev1.Tombstone{}
			err := record.Decode(kv, rec)
			if rec.GetUnit().GetSegmentId() == id {
				rec.Unit.Disputed = true
			}
			return rec, err
		}); err != nil {
			return err
		}
	}
	return nil
}

// rewrite changes the record at key if it exists and is readable.
func (u *upgrade) rewrite(ctx context.Context, key string, edit func(meta.KeyValue) (record.Message, error)) error {
	for range maxAttempts {
		kv, found, _, err := u.c.kv.Get(ctx, key)
		if err != nil || !found {
			return err
		}
		rec, err := edit(kv)
		if errors.Is(err, record.ErrUnreadable) {
			return nil
		}
		if err != nil {
			return err
		}
		res, err := u.c.kv.Txn(ctx, meta.Txn{
			If:   []meta.Cond{meta.Unchanged(key, kv.ModRevision)},
			Then: []meta.Op{meta.Put(key, record.Encode(rec))},
		})
		if err != nil || res.Succeeded {
			return err
		}
	}
	return fmt.Errorf("%w: %s", meta.ErrConflict, key)
}

// restores writes the claims of all restore jobs.
func (u *upgrade) restores(ctx context.Context) error {
	from, to := meta.Prefix(keys.JobPrefix)
	_, err := u.c.kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			job := &storagev1.Job{}
			if err := record.Decode(kv, job); err != nil {
				return err
			}
			_, ops := ClaimRange(job.GetCollectionId(), job.GetFirstSegment(), job.GetSegments()+job.GetBuilds())
			if len(ops) == 0 {
				continue
			}
			txn := meta.Txn{If: []meta.Cond{meta.Unchanged(kv.Key, kv.ModRevision)}, Then: ops}
			if _, err := u.c.kv.Txn(ctx, txn); err != nil {
				return err
			}
		}
		return nil
	})
	return err
}
