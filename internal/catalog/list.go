package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// ListFilter selects collections. Zero fields do not filter, except that no States
// selects ACTIVE ones only.
type ListFilter struct {
	DB     string
	States []State
}

// maxListBytes bounds one answer of ListCollections.
const maxListBytes = 2 << 20

// ListCollections returns up to limit collections in id order, from the first
// after id after, and whether there are more. It returns fewer when they are
// large, and leaves the engine's own schema out. Collections with unreadable records
// are skipped.
func (c *Catalog) ListCollections(
	ctx context.Context, f ListFilter, after int64, limit int,
) (list []Collection, more bool, err error) {
	if len(f.States) == 0 {
		f.States = []State{Active}
	}
	if f.DB != "" && !slices.Contains(f.States, Dropping) {
		return c.listNamed(ctx, f, after, limit)
	}
	_, end := meta.Prefix(keys.CollectionPrefix)
	from, revision, size := keys.Collection(after)+"\x00", int64(0), 0
	for {
		res, err := c.kv.Range(ctx, meta.Range{From: from, To: end, Limit: 16, Revision: revision})
		if err != nil {
			return nil, false, fmt.Errorf("list collections: %w", err)
		}
		revision = res.Revision
		for _, kv := range res.KVs {
			col, err := DecodeCollection(kv)
			if errors.Is(err, record.ErrUnreadable) {
				continue // a request for it by name or id gets the error
			}
			if err != nil {
				return nil, false, err
			}
			rawSize := len(col.Schema.Raw)
			if f.DB != "" && f.DB != col.DB || !slices.Contains(f.States, col.State) {
				continue
			}
			col.Schema.Raw = nil
			size += len(kv.Value) - rawSize
			if len(list) == limit || len(list) > 0 && size > maxListBytes {
				return list, true, nil
			}
			list = append(list, col)
		}
		if !res.More {
			return list, false, nil
		}
		from = res.KVs[len(res.KVs)-1].Key + "\x00"
	}
}

// listNamed is ListCollections of a database without its DROPPING collections, which have
// no name: it reads the names of the database, and then only the records of those.
func (c *Catalog) listNamed(
	ctx context.Context, f ListFilter, after int64, limit int,
) (list []Collection, more bool, err error) {
	var ids []int64
	from, to := meta.Prefix(keys.CollectionName(f.DB, ""))
	_, err = c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			rec := &storagev1.Name{}
			switch err := record.Decode(kv, rec); {
			case errors.Is(err, record.ErrUnreadable): // as below
			case err != nil:
				return err
			case rec.GetId() > after:
				ids = append(ids, rec.GetId())
			}
		}
		return nil
	})
	if err != nil {
		return nil, false, fmt.Errorf("list collections: %w", err)
	}
	slices.Sort(ids)
	size := 0
	for part := range slices.Chunk(ids, 16) {
		gets := make([]meta.Op, len(part))
		for i, id := range part {
			gets[i] = meta.Get(keys.Collection(id))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return nil, false, fmt.Errorf("list collections: %w", err)
		}
		for _, kvs := range res.Ranges {
			for _, kv := range kvs {
				col, err := DecodeCollection(kv)
				if errors.Is(err, record.ErrUnreadable) {
					continue // a request for it by name or id gets the error
				}
				if err != nil {
					return nil, false, err
				}
				if f.DB != col.DB || !slices.Contains(f.States, col.State) { // changed since
					continue
				}
				size += len(kv.Value) - len(col.Schema.Raw)
				col.Schema.Raw = nil
				if len(list) == limit || len(list) > 0 && size > maxListBytes {
					return list, true, nil
				}
				list = append(list, col)
			}
		}
	}
	return list, false, nil
}
