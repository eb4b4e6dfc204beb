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

// The functions below complete drops: a drop only changes a state, and the removal of
// the content follows here, in repeatable steps. No leader is needed: the transactions
// compare every precondition, and that the metadata store was not rolled back.

// Child names a partition or an index.
type Child struct {
	Collection, ID int64
	Name           string
	Index          bool // it is an index, else a partition
}

func (p Child) String() string {
	if p.Index {
		return fmt.Sprintf("index %s (%d) of collection %d", p.Name, p.ID, p.Collection)
	}
	return fmt.Sprintf("partition %s (%d) of collection %d", p.Name, p.ID, p.Collection)
}

// DroppedChildren returns the DROPPING partitions and indexes of one collection, or of all
// when collection is 0. It omits unreadable records, and returns their errors in
// unreadable.
func (c *Catalog) DroppedChildren(
	ctx context.Context, collection int64,
) (children []Child, unreadable []error, err error) {
	partitions, indexes := keys.AllPartitionsPrefix, keys.AllIndexesPrefix
	if collection > 0 {
		partitions, indexes = keys.PartitionPrefix(collection), keys.IndexPrefix(collection)
	}
	scan := func(prefix string, decode func(meta.KeyValue) (Child, State, error)) error {
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
					children = append(children, p)
				}
			}
			return nil
		})
		return err
	}
	err = scan(partitions, func(kv meta.KeyValue) (Child, State, error) {
		p, err := decodePartition(kv)
		return Child{ID: p.ID, Name: p.Name}, p.State, err
	})
	if err == nil {
		err = scan(indexes, func(kv meta.KeyValue) (Child, State, error) {
			x, err := decodeIndex(kv)
			return Child{ID: x.ID, Name: x.Name, Index: true}, x.State, err
		})
	}
	if err != nil {
		return nil, nil, fmt.Errorf("find dropped partitions and indexes: %w", err)
	}
	return children, unreadable, nil
}

// FinishChild drops the segments of a DROPPING partition or the builds of a DROPPING
// index, and then removes its record. It returns the number of new units. The collection
// must be ACTIVE.
func (c *Catalog) FinishChild(ctx context.Context, p Child) (units int, err error) {
	// The drop excludes new segments and builds: a read from now on shows all of them.
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
	flush := func(minimum int) error {
		if n := len(drop); n > 0 && n >= minimum {
			dropped, err := c.dropExisting(ctx, p.Collection, drop)
			if err != nil {
				return err
			}
			units, drop = units+dropped, drop[:0]
		}
		if n := len(update); n > 0 && n >= minimum {
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
		return flush(MaxSegmentChange)
	})
	if err == nil {
		err = flush(1)
	}
	if err != nil {
		return units, fmt.Errorf("finish %s: %w", p, err)
	}
	_, err = c.kv.Txn(ctx, meta.Txn{
		Name: "collect.part",
		If:   []meta.Cond{meta.Unchanged(key, kv.ModRevision), meta.Absent(keys.RolledBack)},
		Then: []meta.Op{meta.Delete(key)},
	})
	if err != nil {
		return units, fmt.Errorf("finish %s: %w", p, err)
	}
	return units, nil
}

// dropExisting drops segments, without those that were dropped and reclaimed already.
func (c *Catalog) dropExisting(ctx context.Context, collection int64, ids []int64) (int, error) {
	n, err := c.DropSegments(ctx, Ref{ID: collection}, ids)
	switch {
	case !errors.Is(err, ErrSegmentNotFound): // nothing was written then
		return n, err
	case len(ids) == 1:
		return 0, nil
	}
	first, err := c.dropExisting(ctx, collection, ids[:len(ids)/2])
	if err != nil {
		return first, err
	}
	second, err := c.dropExisting(ctx, collection, ids[len(ids)/2:])
	return first + second, err
}

// removeBuilds removes index builds from their segments, as many in one transaction as
// fit. Missing ones are no error.
func (c *Catalog) removeBuilds(ctx context.Context, collection int64, updates []Update) error {
	if len(updates) == 0 {
		return nil
	}
	n := min(len(updates), MaxSegmentChange)
	_, err := c.Change(ctx, request.Token{}, Ref{ID: collection}, SegmentChange{Update: updates[:n]})
	switch {
	case err == nil:
		return c.removeBuilds(ctx, collection, updates[n:])
	case len(updates) == 1 && (errors.Is(err, ErrSegmentNotFound) || errors.Is(err, ErrIndexNotFound)):
		return nil
	case len(updates) == 1 && errors.Is(err, ErrPartitionNotFound):
		// The partition was dropped as well: drop the whole segment with its builds, as
		// FinishChild does for the partition.
		_, err := c.dropExisting(ctx, collection, []int64{updates[0].Segment})
		return err
	case len(updates) == 1:
		return err
	case errors.Is(err, ErrTooLarge), errors.Is(err, meta.ErrTooLarge), errors.Is(err, ErrSegmentNotFound),
		errors.Is(err, ErrIndexNotFound), errors.Is(err, ErrPartitionNotFound):
		if err := c.removeBuilds(ctx, collection, updates[:len(updates)/2]); err != nil {
			return err
		}
		return c.removeBuilds(ctx, collection, updates[len(updates)/2:])
	}
	return err
}

// FinishCollection removes the record of a DROPPING collection and its remaining keys,
// once it has no segments, units, tombstones and pending creates. It reports whether it
// did.
func (c *Catalog) FinishCollection(ctx context.Context, col *Collection) (bool, error) {
	txn := meta.Txn{
		Name: "collect.collection",
		If:   []meta.Cond{meta.Unchanged(keys.Collection(col.ID), col.Revision), meta.Absent(keys.RolledBack)},
		Then: append(append(ContentRanges(col.ID), ReleaseRoots(col.ID, col.Roots)...),
			meta.DeleteRange(meta.Prefix(keys.AllReplacedPrefix(col.ID))),
			meta.Delete(keys.Generation(col.ID)), meta.Delete(keys.Collection(col.ID))),
	}
	if col.State != Dropping {
		return false, fmt.Errorf("%w: %s is not dropped", ErrCollectionNotActive, col)
	}
	for _, prefix := range []string{
		keys.SegmentPrefix(col.ID), keys.UnitPrefix(col.ID), keys.TombstonePrefix(col.ID), keys.PendingPrefix(col.ID),
	} {
		txn.If = append(txn.If, meta.RangeAbsent(meta.Prefix(prefix)))
	}
	res, err := c.kv.Txn(ctx, txn)
	if err != nil {
		return false, fmt.Errorf("finish collection %s: %w", col, err)
	}
	return res.Succeeded, nil
}
