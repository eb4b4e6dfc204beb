package catalog

import (
	"context"
	"slices"
	"strings"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// OwnKey says whether a key lies under a prefix that snapshotd keeps for itself
// in every store. No file of a collection does.
func OwnKey(key string) bool {
	return slices.ContainsFunc(ownPrefixes, func(own string) bool { return strings.HasPrefix(key, own) })
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
	holdings, err := c.holdings(ctx, collection, all)
	if err != nil {
		return nil, err
	}
	for i, p := range paths {
		for _, id := range ids[i] {
			if owner, found := holdings[id].find(p); found {
				owners[i] = &owner
				break
			}
		}
	}
	return owners, nil
}
