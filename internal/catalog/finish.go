package catalog

import (
	"context"
	"errors"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// What follows ends what was dropped: a drop is one change of state, and the
// rest comes here, in steps that can be repeated. No leader is needed: every
// premise is compared, and that the metadata store has not gone back in time.

// Part names a partition or an index.
type Part struct {
	Collection, ID int64
	Name           string
	Index          bool // it is an index, else a partition
}

func (p Part) String() string {
	if p.Index {
		return fmt.Sprintf("index %s (%d) of collection %d", p.Name, p.ID, p.Collection)
	}
	return fmt.Sprintf("partition %s (%d) of collection %d", p.Name, p.ID, p.Collection)
}

// DroppedParts returns the partitions and indexes that were dropped and are not
// finished, of one collection, or of all when that is 0. Records that cannot be
// read are left out, and unreadable has their errors.
func (c *Catalog) DroppedParts(ctx context.Context, collection int64) (parts []Part, unreadable []error, err error) {
	partitions, indexes := keys.AllPartsPrefix, keys.AllIndexesPrefix
	if collection > 0 {
		partitions, indexes = keys.PartitionPrefix(collection), keys.IndexPrefix(collection)
	}
	scan := func(prefix string, decode func(meta.KeyValue) (Part, State, error)) error {
		from, to := meta.Prefix(prefix)
		_, err := c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				p, state, err := decode(kv)
				if err == nil {
					p.Collection, _, err = keys.LastTwo(kv.Key)
				}
				switch {
				case err != nil:
					unreadable = append(unreadable, err)
				case state == Dropping:
					parts = append(parts, p)
				}
			}
			return nil
		})
		return err
	}
	err = scan(partitions, func(kv meta.KeyValue) (Part, State, error) {
		p, err := decodePartition(kv)
		return Part{ID: p.ID, Name: p.Name}, p.State, err
	})
	if err == nil {
		err = scan(indexes, func(kv meta.KeyValue) (Part, State, error) {
			x, err := decodeIndex(kv)
			return Part{ID: x.ID, Name: x.Name, Index: true}, x.State, err
		})
	}
	if err != nil {
		return nil, nil, fmt.Errorf("look for dropped partitions and indexes: %w", err)
	}
	return parts, unreadable, nil
}

// FinishPart drops what is left of a dropped partition or index, its segments or
// builds, and then removes its record. It returns how many units that made. The
// collection must be ACTIVE.
func (c *Catalog) FinishPart(ctx context.Context, p Part) (units int, err error) {
	// No segment and no build can join it any more: what a read from now on does
	// not show will not come.
	key := keys.Partition(p.Collection, p.ID)
	if p.Index {
		key = keys.Index(p.Collection, p.ID)
	}
	kv, found, revision, err := c.kv.Get(ctx, key)
	if err != nil || !found {
		return 0, err
	}
	var drop []int64
	var update []Update
	flush := func(least int) error {
		if n := len(drop); n > 0 && n >= least {
			dropped, err := c.dropThese(ctx, p.Collection, drop)
			if err != nil {
				return err
			}
			units, drop = units+dropped, drop[:0]
		}
		if n := len(update); n > 0 && n >= least {
			if err := c.removeBuilds(ctx, p.Collection, update); err != nil {
				return err
			}
			units, update = units+n, update[:0]
		}
		return nil
	}
	_, err = c.ScanSegments(ctx, p.Collection, revision, func(batch []segment.Segment) error {
		for i := range batch {
			s := &batch[i]
			if !p.Index {
				if s.Partition == p.ID {
					drop = append(drop, s.ID)
				}
				continue
			}
			for b := range s.Builds {
				if s.Builds[b].Index == p.ID {
					update = append(update, Update{Segment: s.ID, RemoveBuilds: []int64{s.Builds[b].ID}})
				}
			}
		}
		return flush(MaxSwap)
	})
	if err == nil {
		err = flush(1)
	}
	if err != nil {
		return units, fmt.Errorf("finish %s: %w", p, err)
	}
	_, err = c.kv.Txn(ctx, meta.Txn{
		Name: "collect.part",
		If:   []meta.Cond{meta.Unchanged(key, kv.ModRevision), meta.Absent(keys.Behind)},
		Then: []meta.Op{meta.Delete(key)},
	})
	if err != nil {
		return units, fmt.Errorf("finish %s: %w", p, err)
	}
	return units, nil
}

// dropThese drops segments, less those that somebody else has dropped and that
// are reclaimed already.
func (c *Catalog) dropThese(ctx context.Context, collection int64, ids []int64) (int, error) {
	n, err := c.DropSegments(ctx, Ref{ID: collection}, ids)
	switch {
	case !errors.Is(err, ErrSegmentNotFound): // which comes before anything is written
		return n, err
	case len(ids) == 1:
		return 0, nil
	}
	first, err := c.dropThese(ctx, collection, ids[:len(ids)/2])
	if err != nil {
		return first, err
	}
	second, err := c.dropThese(ctx, collection, ids[len(ids)/2:])
	return first + second, err
}

// removeBuilds takes index builds from their segments, as many in one step as
// fit. What was gone before is no error.
func (c *Catalog) removeBuilds(ctx context.Context, collection int64, updates []Update) error {
	if len(updates) == 0 {
		return nil
	}
	_, err := c.Change(ctx, request.Token{}, Ref{ID: collection}, Swap{Update: updates[:min(len(updates), MaxSwap)]})
	switch {
	case err == nil:
		return c.removeBuilds(ctx, collection, updates[min(len(updates), MaxSwap):])
	case len(updates) == 1 && (errors.Is(err, ErrSegmentNotFound) || errors.Is(err, ErrIndexNotFound)):
		return nil
	case len(updates) == 1 && errors.Is(err, ErrPartitionNotFound):
		// Its partition was dropped as well, for good: the segment goes as a whole,
		// its builds with it, as when the partition is finished.
		_, err := c.dropThese(ctx, collection, []int64{updates[0].Segment})
		return err
	case len(updates) == 1:
		return err
	case errors.Is(err, ErrTooLarge), errors.Is(err, meta.ErrTooLarge), errors.Is(err, ErrSegmentNotFound), errors.Is(err, ErrIndexNotFound),
		errors.Is(err, ErrPartitionNotFound):
		if err := c.removeBuilds(ctx, collection, updates[:len(updates)/2]); err != nil {
			return err
		}
		return c.removeBuilds(ctx, collection, updates[len(updates)/2:])
	}
	return err
}

// FinishCollection removes the record of a dropped collection, and all that is
// left under it, when none of its segments, units and tombstones are left, and no
// snapshot of it is being created. It says whether it did.
func (c *Catalog) FinishCollection(ctx context.Context, col *Collection) (bool, error) {
	txn := meta.Txn{
		Name: "collect.collection",
		If:   []meta.Cond{meta.Unchanged(keys.Collection(col.ID), col.Revision), meta.Absent(keys.Behind)},
		Then: append(append(ContentRanges(col.ID), ReleaseRoots(col.ID, col.Roots)...),
			meta.DeleteRange(meta.Prefix(keys.AllReplacedPrefix(col.ID))),
			meta.Delete(keys.Generation(col.ID)), meta.Delete(keys.Collection(col.ID))),
	}
	if col.State != Dropping {
		return false, fmt.Errorf("%w: %s is not dropped", ErrCollectionNotActive, col)
	}
	for _, prefix := range []string{
		keys.SegmentPrefix(col.ID), keys.UnitPrefix(col.ID), keys.TombPrefix(col.ID), keys.PendingPrefix(col.ID),
	} {
		txn.If = append(txn.If, meta.RangeAbsent(meta.Prefix(prefix)))
	}
	res, err := c.kv.Txn(ctx, txn)
	if err != nil {
		return false, fmt.Errorf("finish collection %s: %w", col, err)
	}
	return res.Succeeded, nil
}
