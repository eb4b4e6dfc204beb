package catalog

import (
	"context"
	"fmt"
	"strings"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Roots
//
// In one store the roots of two collections are equal or disjoint: none is nested in
// another. So an object has one path, whatever collection registers it, that path
// has at most one place, and a place belongs to one segment. With a nested root, one
// object would have two paths, and two segments could own it.
//
//	/catalog/root/<store>/<prefix>/<collection>   the collection has the root
//
//	create, admit  compares, for each root: another collection still has the same
//	               root; or none has it, and none has one above or below it
//	               puts: the keys of its roots, with the collection's record
//	finish, end    deletes: those keys, with the collection's record
//	upgrade        puts the keys for the records of releases without them; the ids
//	               of two collections with nested roots are disputed: neither owns
//	               a file
//
// Of two concurrent creates with nested roots, each compares the keys that the other
// puts, so one of them fails. Equal roots do not conflict.

// maxRootCompares bounds the compares for the roots of one collection.
const maxRootCompares = 64

// rootCompares returns the compares that no other root is above or below a root.
func rootCompares(r Root) []meta.Cond {
	below, _ := meta.Prefix(keys.RootPrefix(r.Store, r.Prefix))
	_, end := meta.Prefix(keys.RootPrefix(r.Store, r.Prefix))
	own, ownEnd := meta.Prefix(keys.RootPrefix(r.Store, r.Prefix) + "/")
	conds := []meta.Cond{meta.RangeAbsent(below, own), meta.RangeAbsent(ownEnd, end)}
	for at := range len(r.Prefix) {
		if at == 0 || r.Prefix[at-1] == '/' { // the prefix before at is a directory above
			conds = append(conds, meta.RangeAbsent(meta.Prefix(keys.RootPrefix(r.Store, r.Prefix[:at])+"/")))
		}
	}
	return conds
}

// rootOps returns the compares and writes of the roots of a new collection, or
// ErrRootNested, which names the other collection.
func (c *Catalog) rootOps(ctx context.Context, col *Collection) (conds []meta.Cond, ops []meta.Op, err error) {
	value := record.Encode(&storagev1.Name{Format: record.Format, Id: col.ID})
	for _, r := range col.Roots {
		disjoint, err := c.rootConds(ctx, r)
		if err != nil {
			return nil, nil, err
		}
		conds = append(conds, disjoint...)
		ops = append(ops, meta.Put(keys.Root(r.Store, r.Prefix, col.ID), value))
	}
	if len(conds) > maxRootCompares {
		return nil, nil, invalid("roots", "more than %d parent directories in total; use fewer or shorter roots",
			maxRootCompares)
	}
	return conds, ops, nil
}

// rootConds returns the compares that a root is equal to or disjoint from all others. When
// another collection has the same root, the compare of that key is enough.
func (c *Catalog) rootConds(ctx context.Context, r Root) ([]meta.Cond, error) {
	first := func(from, to string) (kv meta.KeyValue, found bool, err error) {
		res, err := c.kv.Range(ctx, meta.Range{From: from, To: to, Limit: 1})
		if err != nil || len(res.KVs) == 0 {
			return meta.KeyValue{}, false, err
		}
		return res.KVs[0], true, nil
	}
	equal, found, err := first(meta.Prefix(keys.RootPrefix(r.Store, r.Prefix) + "/"))
	if err != nil {
		return nil, fmt.Errorf("read roots: %w", err)
	}
	if found {
		return []meta.Cond{meta.Unchanged(equal.Key, equal.ModRevision)}, nil
	}
	conds := rootCompares(r)
	for _, cond := range conds {
		kv, found, err := first(cond.From, cond.To)
		if err != nil {
			return nil, fmt.Errorf("read roots: %w", err)
		}
		if !found {
			continue
		}
		rec := &storagev1.Name{}
		if err := record.Decode(kv, rec); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %q in store %s and %q, a root of collection %s; use the same root, or a disjoint one",
			ErrRootNested, r.Prefix, r.Store, rootOf(kv.Key, r.Store), c.nameOf(ctx, rec.GetId()))
	}
	return conds, nil
}

// ReleaseRoots returns the deletes of a collection's roots, for the transaction that
// removes its record.
func ReleaseRoots(collection int64, roots []Root) []meta.Op {
	ops := make([]meta.Op, len(roots))
	for i, r := range roots {
		ops[i] = meta.Delete(keys.Root(r.Store, r.Prefix, collection))
	}
	return ops
}

// rootOf returns the prefix of a root from its key.
func rootOf(key, store string) string {
	rest := strings.TrimPrefix(key, keys.RootPrefix(store, ""))
	return rest[:max(strings.LastIndexByte(rest, '/'), 0)]
}

// nestedRoots writes the root keys of all records, and returns the collections with nested
// roots.
func (u *upgrade) nestedRoots(ctx context.Context) (map[int64]bool, error) {
	type rooted struct {
		Root
		collection int64
	}
	var all []rooted
	from, to := meta.Prefix(keys.CollectionPrefix)
	_, err := u.c.kv.Scan(ctx, from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			col, err := DecodeCollection(kv)
			if err != nil {
				return err
			}
			txn := meta.Txn{If: []meta.Cond{meta.Unchanged(kv.Key, kv.ModRevision)}}
			value := record.Encode(&storagev1.Name{Format: record.Format, Id: col.ID})
			for _, r := range col.Roots {
				all = append(all, rooted{r, col.ID})
				txn.Then = append(txn.Then, meta.Put(keys.Root(r.Store, r.Prefix, col.ID), value))
			}
			if _, err := u.c.kv.Txn(ctx, txn); err != nil { // a changed record is read again at the next start
				return err
			}
		}
		return nil
	})
	nested := map[int64]bool{}
	for i, a := range all {
		for _, b := range all[:i] {
			inside := strings.HasPrefix(a.Prefix, b.Prefix) || strings.HasPrefix(b.Prefix, a.Prefix)
			if a.collection != b.collection && a.Store == b.Store && a.Prefix != b.Prefix && inside {
				nested[a.collection], nested[b.collection] = true, true
			}
		}
	}
	return nested, err
}
