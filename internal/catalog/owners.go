package catalog

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// OwnKey says whether a key lies under a prefix that snapshotd keeps for itself
// in every store. No file of a collection does.
func OwnKey(key string) bool {
	return slices.ContainsFunc(ownPrefixes, func(own string) bool { return strings.HasPrefix(key, own) })
}

// Owns decides whether a segment of a collection owns the file at path, which it
// or a part of it has: the file lies at the segment's own place, and the segment's
// id is not disputed. Every other file is foreign: it may be held by something
// else, and is never deleted. This is the one decision on ownership.
func Owns(collection int64, s *segment.Segment, path string) bool {
	if s.Disputed {
		return false
	}
	place, ok := layout.PlaceOf(path)
	return ok && place.Is(collection, s.ID)
}

// newID is an id that a change registers.
type newID struct {
	id   int64
	part bool // of a part of a segment: an index build, or files taken from it
}

func (n newID) key() string {
	if n.part {
		return keys.OwnerBuild(n.id)
	}
	return keys.OwnerSegment(n.id)
}

// claim returns what a transaction compares and writes that registers ids for a
// collection: that no collection claims any of them for anything, that no restore
// does, that none of them is gone, and the claims.
func (c *Catalog) claim(ctx context.Context, collection int64, ids []newID) (conds []meta.Cond, ops []meta.Op, err error) {
	if len(ids) == 0 {
		return nil, nil, nil
	}
	sorted := make([]int64, len(ids))
	for i, n := range ids {
		sorted[i] = n.id
		ops = append(ops, meta.Put(n.key(), record.Encode(&storagev1.Owner{Format: record.Format, CollectionId: collection})))
	}
	slices.Sort(sorted)
	restores, err := c.notRestored(ctx, sorted)
	if err != nil {
		return nil, nil, err
	}
	gone, err := c.notGone(ctx, sorted)
	if err != nil {
		return nil, nil, err
	}
	conds = append(append(conds, restores), gone...)
	for first, last := range runs(sorted) {
		conds = append(conds, meta.RangeAbsent(keys.OwnerSegments(first, last)), meta.RangeAbsent(keys.OwnerBuilds(first, last)))
	}
	return conds, ops, nil
}

// runs yields the runs of consecutive ids in a sorted list.
func runs(sorted []int64) iter.Seq2[int64, int64] {
	return func(yield func(first, last int64) bool) {
		for from := 0; from < len(sorted); {
			to := from
			for to+1 < len(sorted) && sorted[to+1] <= sorted[to]+1 {
				to++
			}
			if !yield(sorted[from], sorted[to]) {
				return
			}
			from = to + 1
		}
	}
}

// notRestored looks whether a restore claims one of the sorted ids, and returns
// the compare that no restore has come since.
func (c *Catalog) notRestored(ctx context.Context, sorted []int64) (meta.Cond, error) {
	from := keys.OwnerRange(sorted[0])
	_, to := meta.Prefix(keys.OwnerRangePrefix)
	res, err := c.kv.Range(ctx, meta.Range{From: from, To: to})
	if err != nil {
		return meta.Cond{}, fmt.Errorf("read the ids of restores: %w", err)
	}
	for _, kv := range res.KVs {
		rec := &storagev1.OwnerRange{}
		if err := record.Decode(kv, rec); err != nil {
			return meta.Cond{}, err
		}
		at, _ := slices.BinarySearch(sorted, rec.GetFirst())
		if at < len(sorted) && sorted[at]-rec.GetFirst() < rec.GetCount() {
			return meta.Cond{}, fmt.Errorf("%w: %d is of the restore that makes collection %d; get ids of your own from AllocateIds",
				ErrIDOwned, sorted[at], rec.GetCollectionId())
		}
	}
	return meta.Cond{From: from, To: to, Target: meta.CreateRevision, Op: meta.Less, Revision: res.Revision + 1}, nil
}

// ClaimRange returns what a transaction compares and writes that claims the ids of
// the segments and builds of a restore, first to first+count-1, for the collection
// that it makes: no collection claims any of them, and none will while the claim
// lasts. [ReleaseRange] ends it.
func ClaimRange(collection, first, count int64) (conds []meta.Cond, ops []meta.Op) {
	if count == 0 {
		return nil, nil
	}
	last := first + count - 1
	rec := &storagev1.OwnerRange{Format: record.Format, First: first, Count: count, CollectionId: collection}
	return []meta.Cond{meta.RangeAbsent(keys.OwnerSegments(first, last)), meta.RangeAbsent(keys.OwnerBuilds(first, last))},
		[]meta.Op{meta.Put(keys.OwnerRange(last), record.Encode(rec))}
}

// ReleaseRange returns what ends the claim of ClaimRange.
func ReleaseRange(first, count int64) []meta.Op {
	if count == 0 {
		return nil
	}
	return []meta.Op{meta.Delete(keys.OwnerRange(first + count - 1))}
}

// checkUnclaimed returns why ids cannot be claimed for a collection, nil when none
// of them is. It looks, and does not compare.
func (c *Catalog) checkUnclaimed(ctx context.Context, collection int64, ids []newID) error {
	for part := range slices.Chunk(ids, meta.MaxTxnOps/2) {
		var gets []meta.Op
		for _, n := range part {
			gets = append(gets, meta.Get(keys.OwnerSegment(n.id)), meta.Get(keys.OwnerBuild(n.id)))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return fmt.Errorf("read the owners of ids: %w", err)
		}
		for i, n := range part {
			for kind, kvs := range res.Ranges[2*i : 2*i+2] {
				for _, kv := range kvs {
					if err := c.claimed(ctx, collection, n, kind == 1, kv); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// claimed is the error of an id that kv claims, for a part of a segment or for a
// segment.
func (c *Catalog) claimed(ctx context.Context, collection int64, n newID, part bool, kv meta.KeyValue) error {
	rec := &storagev1.Owner{}
	if err := record.Decode(kv, rec); err != nil {
		return err
	}
	what := "a segment"
	if part {
		what = "an index build"
	}
	switch {
	case rec.GetCollectionId() == 0:
		return fmt.Errorf("%w: %d is disputed between collections; get ids of your own from AllocateIds", ErrIDOwned, n.id)
	case rec.GetCollectionId() != collection:
		return fmt.Errorf("%w: %d is %s of collection %s; get ids of your own from AllocateIds",
			ErrIDOwned, n.id, what, c.nameOf(ctx, rec.GetCollectionId()))
	case n.part && part:
		return fmt.Errorf("%w: %d; an id is never used twice", ErrIndexBuildExists, n.id)
	case n.part:
		return fmt.Errorf("%w: %d is the id of a segment", ErrIndexBuildExists, n.id)
	case part:
		return fmt.Errorf("%w: %d is the id of an index build; an id is never used twice", ErrSegmentExists, n.id)
	}
	return fmt.Errorf("%w: %d is a segment, or was one that was dropped; an id is never used twice", ErrSegmentExists, n.id)
}

// nameOf names a collection for people.
func (c *Catalog) nameOf(ctx context.Context, id int64) string {
	if col, err := c.Collection(ctx, Ref{ID: id}); err == nil {
		return col.String()
	}
	return fmt.Sprint(id)
}

// ids are those whose last record goes with the unit.
func (u *Unit) ids() []newID {
	if u.Kind != UnitSegment {
		return []newID{{u.ID, true}}
	}
	list := []newID{{u.ID, false}}
	for i := range u.Segment.Builds {
		list = append(list, newID{u.Segment.Builds[i].ID, true})
	}
	return list
}

// release returns what deletes the claims to the ids of a unit whose tombstone
// goes. The claim to a disputed id stays.
func (u *Unit) release() []meta.Op {
	if u.Segment.Disputed {
		return nil
	}
	var ops []meta.Op
	var parts []int64
	for _, n := range u.ids() {
		if n.part {
			parts = append(parts, n.id)
		} else {
			ops = append(ops, meta.Delete(n.key()))
		}
	}
	slices.Sort(parts)
	for first, last := range runs(parts) {
		ops = append(ops, meta.DeleteRange(keys.OwnerBuilds(first, last)))
	}
	return ops
}

// checkPlace refuses a file that lies at the place of something else. What has
// that place may delete what lies there.
// known has the collections that were looked for, and whether they are there.
func (c *Catalog) checkPlace(ctx context.Context, collection int64, cl *claim, known map[int64]bool) error {
	place, ok := layout.PlaceOf(cl.path.Path)
	if !ok || place.Is(collection, cl.segment) {
		return nil
	}
	if there, looked := known[place.Collection]; looked && !there && place.Segment == cl.segment {
		return nil
	}
	refuse := func(owner string) error {
		return fmt.Errorf("%w: %q, in %s, lies at the place of %s, %s; a file of segment %d of collection %d lies at its own place",
			ErrPlaceOwned, cl.path.Path, cl.field, place, owner, cl.segment, collection)
	}
	if place.Segment == cl.segment { // so it is the collection that is another
		other, err := c.Collection(ctx, Ref{ID: place.Collection})
		if errors.Is(err, ErrCollectionNotFound) {
			known[place.Collection] = false
			return nil // no place of anything, and never deleted
		}
		if err != nil {
			return err
		}
		return refuse("which is " + other.String())
	}
	kv, found, _, err := c.kv.Get(ctx, keys.OwnerSegment(place.Segment))
	if err != nil {
		return fmt.Errorf("read the owner of segment %d: %w", place.Segment, err)
	}
	if !found {
		return refuse("which no collection has")
	}
	rec := &storagev1.Owner{}
	if err := record.Decode(kv, rec); err != nil {
		return err
	}
	if rec.GetCollectionId() == 0 {
		return refuse("which is disputed")
	}
	return refuse("which collection " + c.nameOf(ctx, rec.GetCollectionId()) + " has")
}

// FindOwners is [Catalog.FindOwner] for many files at once: the owner of each by
// its place in paths, nil where there is none. A path in the native layout of the
// collection is looked for under its segment alone; any other under the ids that
// are its elements. A file that is registered under a path without an id of its
// segment is not found.
func (c *Catalog) FindOwners(ctx context.Context, collection int64, paths []FilePath) ([]*Owner, error) {
	var all []int64
	ids := make([][]int64, len(paths))
	for i, p := range paths {
		if placed, _, id, ok := segment.NativePlace(p.Path); ok && placed == collection {
			ids[i] = []int64{id}
		} else {
			ids[i] = segment.IDsIn(p.Path)
		}
		all = append(all, ids[i]...)
	}
	owners := make([]*Owner, len(paths))
	if len(all) == 0 {
		return owners, nil
	}
	holdings, err := c.holdings(ctx, collection, all, false)
	if err != nil {
		return nil, err
	}
	for i, p := range paths {
		for _, id := range ids[i] {
			if owner, found := holdings[id].find(collection, p); found {
				owners[i] = &owner
				break
			}
		}
	}
	return owners, nil
}
