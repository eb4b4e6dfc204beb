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

// OwnKey reports whether a key is under a prefix that snapshotd reserves in every store.
// No file of a collection is.
func OwnKey(key string) bool {
	return slices.ContainsFunc(ownPrefixes, func(own string) bool { return strings.HasPrefix(key, own) })
}

// Owns reports whether a segment of a collection owns the file at path, which is a file of
// the segment or of a part of it: the file is at the segment's own place, and the id is
// not disputed. Every other file is foreign: another owner may hold it, and it is never
// deleted. No other function decides on ownership.
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
	part bool // for a part of a segment: an index build, or files removed from it
}

func (n newID) key() string {
	if n.part {
		return keys.OwnerBuild(n.id)
	}
	return keys.OwnerSegment(n.id)
}

// claimOps returns the compares and writes that register ids for a collection: no
// collection and no restore claims any of them, none is gone, and the claims.
func (c *Catalog) claimOps(
	ctx context.Context, collection int64, ids []newID,
) (conds []meta.Cond, ops []meta.Op, err error) {
	if len(ids) == 0 {
		return nil, nil, nil
	}
	sorted := make([]int64, len(ids))
	for i, n := range ids {
		sorted[i] = n.id
		owner := &storagev1.Owner{Format: record.Format, CollectionId: collection}
		ops = append(ops, meta.Put(n.key(), record.Encode(owner)))
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
		conds = append(conds,
			meta.RangeAbsent(keys.OwnerSegments(first, last)), meta.RangeAbsent(keys.OwnerBuilds(first, last)))
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

// notRestored returns ErrIDOwned when a restore claims one of the sorted ids, else the
// compare that no restore has claimed ids since.
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
			return meta.Cond{}, fmt.Errorf("%w: %d belongs to the restore of collection %d; allocate ids with AllocateIds",
				ErrIDOwned, sorted[at], rec.GetCollectionId())
		}
	}
	return meta.Cond{From: from, To: to, Target: meta.CreateRevision, Op: meta.Less, Revision: res.Revision + 1}, nil
}

// ClaimRange returns the compares and writes that claim the ids of the segments and builds
// of a restore, first to first+count-1, for its collection: no collection claims any of
// them, before and while the claim exists. [ReleaseRange] removes it.
func ClaimRange(collection, first, count int64) (conds []meta.Cond, ops []meta.Op) {
	if count == 0 {
		return nil, nil
	}
	last := first + count - 1
	rec := &storagev1.OwnerRange{Format: record.Format, First: first, Count: count, CollectionId: collection}
	return []meta.Cond{meta.RangeAbsent(keys.OwnerSegments(first, last)), meta.RangeAbsent(keys.OwnerBuilds(first, last))},
		[]meta.Op{meta.Put(keys.OwnerRange(last), record.Encode(rec))}
}

// ReleaseRange returns the deletes of a claim of ClaimRange.
func ReleaseRange(first, count int64) []meta.Op {
	if count == 0 {
		return nil
	}
	return []meta.Op{meta.Delete(keys.OwnerRange(first + count - 1))}
}

// checkUnclaimed returns an error when one of ids is claimed already. It reads, and
// compares nothing.
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
					if err := c.claimedError(ctx, collection, n, kind == 1, kv); err != nil {
						return err
					}
				}
			}
		}
	}
	return nil
}

// claimedError returns the error of an id that kv claims, for a part of a segment or for
// a segment.
func (c *Catalog) claimedError(
	ctx context.Context, collection int64, n newID, part bool, kv meta.KeyValue,
) error {
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
		return fmt.Errorf("%w: %d is disputed between collections; allocate ids with AllocateIds", ErrIDOwned, n.id)
	case rec.GetCollectionId() != collection:
		return fmt.Errorf("%w: %d is %s of collection %s; allocate ids with AllocateIds",
			ErrIDOwned, n.id, what, c.nameOf(ctx, rec.GetCollectionId()))
	case n.part && part:
		return fmt.Errorf("%w: %d; ids are never reused", ErrIndexBuildExists, n.id)
	case n.part:
		return fmt.Errorf("%w: %d is the id of a segment", ErrIndexBuildExists, n.id)
	case part:
		return fmt.Errorf("%w: %d is the id of an index build; ids are never reused", ErrSegmentExists, n.id)
	}
	return fmt.Errorf("%w: %d is a segment or a dropped segment; ids are never reused", ErrSegmentExists, n.id)
}

// nameOf returns a collection's name and id for messages, or only the id when it cannot be
// read.
func (c *Catalog) nameOf(ctx context.Context, id int64) string {
	if col, err := c.Collection(ctx, Ref{ID: id}); err == nil {
		return col.String()
	}
	return fmt.Sprint(id)
}

// ids returns the ids whose last record is the unit's tombstone.
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

// release returns the deletes of the claims to a unit's ids, for the transaction that
// removes its tombstone. Claims to disputed ids stay.
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

// checkPlace returns ErrPlaceOwned for a file at the place of another segment, whose owner
// may delete it. known caches whether collections exist.
func (c *Catalog) checkPlace(
	ctx context.Context, collection int64, cl *fileClaim, known map[int64]bool,
) error {
	place, ok := layout.PlaceOf(cl.path.Path)
	if !ok || place.Is(collection, cl.segment) {
		return nil
	}
	if exists, cached := known[place.Collection]; cached && !exists && place.Segment == cl.segment {
		return nil
	}
	refuse := func(owner string) error {
		return fmt.Errorf("%w: %q, in %s, is at the place of %s, %s; "+
			"files of segment %d of collection %d must be at their own place", ErrPlaceOwned,
			cl.path.Path, cl.field, place, owner, cl.segment, collection)
	}
	if place.Segment == cl.segment { // so the collection differs
		other, err := c.Collection(ctx, Ref{ID: place.Collection})
		if errors.Is(err, ErrCollectionNotFound) {
			known[place.Collection] = false
			return nil // the place of no segment, so never deleted
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

// FindOwners is [Catalog.FindOwner] for many files: the owner of each by its index in
// paths, nil for none. A path in the native layout of the collection is searched under
// its segment only, any other path under the ids among its elements. It does not find
// files whose path has no id of their segment.
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
	found, err := c.readHoldings(ctx, collection, all, false)
	if err != nil {
		return nil, err
	}
	for i, p := range paths {
		for _, id := range ids[i] {
			if owner, ok := found[id].find(collection, p); ok {
				owners[i] = &owner
				break
			}
		}
	}
	return owners, nil
}
