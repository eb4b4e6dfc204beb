package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// listBytes bounds the records in one answer of List.
const listBytes = 4 << 20

// List returns up to limit tombstones in key order, after the tombstone with id after
// of collection afterCollection, and whether there are more. It returns fewer when
// their records are large, but at least one. A positive collection or deleter selects
// the tombstones of that one.
func (g *GC) List(
	ctx context.Context, collection int64, deleter Deleter, afterCollection, after int64, limit int,
) (list []*Tombstone, more bool, err error) {
	from, to := meta.Prefix(keys.AllTombstonesPrefix)
	if collection > 0 {
		from, to = meta.Prefix(keys.TombstonePrefix(collection))
	}
	if after > 0 {
		from = keys.Tombstone(afterCollection, after) + "\x00"
	}
	size := 0
	_, err = g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			t, err := DecodeTombstone(kv)
			if err != nil {
				return err
			}
			if deleter != 0 && t.Deleter != deleter {
				continue
			}
			if len(list) == limit || len(list) > 0 && size+len(kv.Value) > listBytes {
				more = true
				return errEnough
			}
			size += len(kv.Value)
			list = append(list, t)
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, false, fmt.Errorf("list tombstones: %w", err)
	}
	return list, more, nil
}

// Confirmation is the outcome of a confirm for one tombstone.
type Confirmation int

// The outcomes.
const (
	Confirmed Confirmation = iota + 1
	NoTombstone
	OwnedBySnapshotd // snapshotd deletes and confirms it
)

// Confirm removes the tombstones of a caller whose files it has all deleted. The
// answers are in the order of ids.
func (g *GC) Confirm(ctx context.Context, ref catalog.Ref, ids []int64) ([]Confirmation, error) {
	col, err := g.o.Catalog.Collection(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("confirm in collection %s: %w", ref, err)
	}
	answers := make([]Confirmation, len(ids))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(BatchInFlight)
	for at := 0; at < len(ids); at += BatchUnits {
		end := min(at+BatchUnits, len(ids))
		group.Go(func() error { return g.confirmBatch(groupCtx, col.ID, ids[at:end], answers[at:end]) })
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("confirm in collection %s: %w", ref, err)
	}
	return answers, nil
}

func (g *GC) confirmBatch(ctx context.Context, collection int64, ids []int64, answers []Confirmation) error {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		var gets []meta.Op
		for _, id := range ids {
			gets = append(gets, meta.Get(keys.Tombstone(collection, id)))
		}
		res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return err
		}
		var list []*pendingDelete
		for i, kvs := range res.Ranges {
			if len(kvs) == 0 {
				if answers[i] == 0 { // otherwise an earlier attempt confirmed it without an answer
					answers[i] = NoTombstone
				}
				continue
			}
			t, err := DecodeTombstone(kvs[0])
			if err != nil {
				return err
			}
			if t.Deleter != ByCaller {
				answers[i] = OwnedBySnapshotd
				continue
			}
			answers[i] = Confirmed
			list = append(list, &pendingDelete{tombstone: t, kv: kvs[0]})
		}
		changed := false
		for len(list) > 0 && !changed {
			n := removeBatch(list)
			if changed, err = g.removeTombstones(ctx, "reclaim.confirm", list[:n], nil); err != nil {
				return err
			}
			list = list[n:]
		}
		if !changed {
			return nil
		}
	}
	return fmt.Errorf("%w: gave up after %d attempts", meta.ErrConflict, maxAttempts)
}

// pendingDelete is a granted unit whose files are being deleted.
type pendingDelete struct {
	tombstone *Tombstone
	kv        meta.KeyValue // of the tombstone
	files     int64
	bytes     int64
	err       error // not nil: one of its files may still exist
}

// removeBatch returns the number of leading tombstones that one transaction removes.
func removeBatch(list []*pendingDelete) int {
	const conds, ops = 2, 2 // beyond those of the catalog: of the leader, and of each tombstone
	units := make([]*catalog.Unit, 0, len(list))
	for n, u := range list {
		units = append(units, &u.tombstone.Unit)
		c, o := catalog.ReleaseSize(units)
		if n > 0 && (c+conds+len(units) > meta.MaxTxnOps || o+ops*len(units) > meta.MaxTxnOps) {
			return n
		}
	}
	return len(list)
}

// removeTombstones removes tombstones whose files are deleted in one transaction named
// step, with the claims to the ids of their units, which are then gone. It returns true
// if a tombstone has changed; then none was removed.
func (g *GC) removeTombstones(
	ctx context.Context, step string, list []*pendingDelete, conds []meta.Cond,
) (changed bool, err error) {
	var units []*catalog.Unit
	txn := meta.Txn{Name: step, If: conds}
	for _, u := range list {
		units = append(units, &u.tombstone.Unit)
		txn.If = append(txn.If, meta.Unchanged(u.kv.Key, u.kv.ModRevision))
		txn.Else = append(txn.Else, meta.Get(u.kv.Key))
	}
	if _, ops := catalog.ReleaseSize(units); ops+2*len(list) > meta.MaxTxnOps { // a single unit of many index builds
		builds, rest := units[0].Split()
		units = []*catalog.Unit{rest}
		for part := range slices.Chunk(builds, BatchUnits) {
			if changed, err := g.releaseIDs(ctx, txn, list, part); changed || err != nil {
				return changed, err
			}
		}
	}
	for _, u := range list {
		txn.Then = append(txn.Then, u.tombstone.removal()...)
	}
	return g.releaseIDs(ctx, txn, list, units)
}

// releaseIDs executes a transaction on tombstones together with the operations that
// release the ids of units. It returns true if a tombstone has changed.
func (g *GC) releaseIDs(
	ctx context.Context, txn meta.Txn, list []*pendingDelete, units []*catalog.Unit,
) (changed bool, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, err
		}
		conds, ops, err := g.o.Catalog.Release(ctx, units)
		if err != nil {
			return false, err
		}
		full := meta.Txn{
			Name: txn.Name,
			If:   slices.Concat(txn.If, conds), Then: slices.Concat(txn.Then, ops), Else: txn.Else,
		}
		res, err := g.kv.Txn(ctx, full)
		if errors.Is(err, meta.ErrNoSpace) && len(txn.Then) > 0 {
			// A full store accepts only deletes. The claims stay, and keep the ids.
			full.Then = txn.Then
			res, err = g.kv.Txn(ctx, full)
		}
		if err != nil || res.Succeeded {
			return false, err
		}
		for i, u := range list {
			if len(res.Ranges[i]) == 0 || res.Ranges[i][0].ModRevision != u.kv.ModRevision {
				return true, nil
			}
		}
	}
	return true, nil // another replica leads, or ids of the same blocks go constantly: the next pass retries
}
