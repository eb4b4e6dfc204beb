package collect

import (
	"context"
	"fmt"
	"strings"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// rootOwners has the roots of all collections at a revision.
type rootOwners struct {
	revision    int64
	collections []catalog.Collection
	stores      map[string]string // ids of stores by alias; two aliases may name one store
}

// readRootOwners reads all collections. An unreadable one is an error: it may own the
// files.
func (c *Collector) readRootOwners(ctx context.Context) (*rootOwners, error) {
	o := &rootOwners{stores: map[string]string{}}
	for alias := range c.stores {
		kv, found, _, err := c.kv.Get(ctx, keys.Store(alias))
		if err != nil {
			return nil, fmt.Errorf("read the identity of store %s: %w", alias, err)
		}
		if found {
			o.stores[alias] = string(kv.Value)
		}
	}
	from, to := meta.Prefix(keys.CollectionPrefix)
	var err error
	o.revision, err = c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			col, err := catalog.DecodeCollection(kv)
			if err != nil {
				return err
			}
			col.Schema = catalog.Schema{}
			o.collections = append(o.collections, col)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read collections: %w", err)
	}
	return o, nil
}

// unchanged compares that no collection was made or changed since. A removed collection
// keeps its roots here, which only keeps files.
func (o *rootOwners) unchanged() meta.Cond {
	from, to := meta.Prefix(keys.CollectionPrefix)
	return meta.Cond{From: from, To: to, Target: meta.ModRevision, Op: meta.Less, Revision: o.revision + 1}
}

// sameStore reports whether two aliases name one store.
func (o *rootOwners) sameStore(a, b string) bool {
	return a == b || o.stores[a] != "" && o.stores[a] == o.stores[b]
}

// ownership relates an object to a collection with a root above it.
type ownership struct {
	col  *catalog.Collection
	root int
	path string // relative to the root
}

// of returns the ownerships of an object, one for each collection: its roots are not
// nested, unless two aliases name one store.
func (o *rootOwners) of(alias, key string) []ownership {
	var list []ownership
	for i := range o.collections {
		for n, root := range o.collections[i].Roots {
			if path, ok := strings.CutPrefix(key, root.Prefix); ok && path != "" && o.sameStore(root.Store, alias) {
				list = append(list, ownership{&o.collections[i], n, path})
			}
		}
	}
	return list
}
