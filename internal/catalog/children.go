package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// CreatePartition adds a partition of spec's Name, Attributes and, unless it is
// 0, ID.
func (c *Catalog) CreatePartition(
	ctx context.Context, tok request.Token, ref Ref, spec Partition,
) (Partition, error) {
	made, err := c.createChild(ctx, tok, ref, childSpec{
		kind: "partition", name: spec.Name, id: spec.ID, limit: MaxPartitions,
		errExists: ErrPartitionExists, errNotFound: ErrPartitionNotFound,
		prefix: keys.PartitionPrefix, nameKey: keys.PartitionName,
		encode: func(op string) []byte {
			spec.State, spec.CreateTime = Active, c.now()
			return record.Encode(encodePartition(&spec, op))
		},
	})
	if err != nil {
		return Partition{}, fmt.Errorf("create partition %s of %s: %w", spec.Name, ref, err)
	}
	return decodePartition(made)
}

// CreateIndex adds an index of spec's Name, Field, parameters, Attributes and,
// unless it is 0, ID.
func (c *Catalog) CreateIndex(ctx context.Context, tok request.Token, ref Ref, spec Index) (Index, error) {
	made, err := c.createChild(ctx, tok, ref, childSpec{
		kind: "index", name: spec.Name, id: spec.ID, limit: MaxIndexes,
		errExists: ErrIndexExists, errNotFound: ErrIndexNotFound,
		prefix: keys.IndexPrefix, nameKey: keys.IndexName,
		encode: func(op string) []byte {
			spec.State, spec.CreateTime = Active, c.now()
			return record.Encode(encodeIndex(&spec, op))
		},
	})
	if err != nil {
		return Index{}, fmt.Errorf("create index %s of %s: %w", spec.Name, ref, err)
	}
	return decodeIndex(made)
}

// childSpec describes a partition or an index that createChild creates.
type childSpec struct {
	kind, name string
	id         int64
	limit      int
	errExists,
	errNotFound error
	prefix  func(collection int64) string
	nameKey func(collection int64, name string) string
	encode  func(op string) []byte
}

// createChild creates a partition or an index and returns its record.
func (c *Catalog) createChild(ctx context.Context, tok request.Token, ref Ref, p childSpec) (meta.KeyValue, error) {
	if err := CheckName("name", p.name); err != nil {
		return meta.KeyValue{}, err
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		col, unchanged, err := c.active(ctx, &ref)
		if err != nil {
			return plan{}, err
		}
		name := p.nameKey(col.ID, p.name)
		if _, found, _, err := c.kv.Get(ctx, name); err != nil {
			return plan{}, err
		} else if found {
			return plan{}, fmt.Errorf("%w: %s", p.errExists, p.name)
		}
		prefix := p.prefix(col.ID)
		from, to := meta.Prefix(prefix)
		res, err := c.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true})
		if err != nil {
			return plan{}, err
		}
		// Not compared: concurrent creates may exceed the limit.
		if len(res.KVs) >= p.limit {
			return plan{}, fmt.Errorf("%w: a collection has at most %d, dropped ones included", ErrLimitExceeded, p.limit)
		}
		id, err := c.allocateOrCheck(ctx, p.kind, p.id)
		if err != nil {
			return plan{}, err
		}
		key := prefix + keys.ID(id)
		if slices.ContainsFunc(res.KVs, func(kv meta.KeyValue) bool { return kv.Key == key }) {
			return plan{}, fmt.Errorf("%w: id %d is taken; ids are never reused", p.errExists, id)
		}
		op, err := record.NewOp(c.rand)
		if err != nil {
			return plan{}, err
		}
		data := p.encode(op)
		if len(data) > maxChildBytes {
			return plan{}, fmt.Errorf("%w: the record takes %d bytes, at most %d", ErrLimitExceeded, len(data), maxChildBytes)
		}
		if err := c.checkChildrenBytes(ctx, col.ID, len(data)); err != nil {
			return plan{}, err
		}
		return plan{
			txn: meta.Txn{
				If: []meta.Cond{unchanged, meta.Absent(name), meta.Absent(key)},
				Then: []meta.Op{
					meta.Put(name, record.Encode(&storagev1.Name{Format: record.Format, Id: id})),
					meta.Put(key, data),
				},
			},
			id: id, result: data,
		}, nil
	})
	if err != nil {
		return meta.KeyValue{}, err
	}
	if len(out.result) > 0 {
		return meta.KeyValue{Key: "/" + keys.ID(out.id), Value: out.result}, nil
	}
	collection, err := c.Resolve(ctx, ref)
	if err != nil {
		return meta.KeyValue{}, err
	}
	kv, found, _, err := c.kv.Get(ctx, p.prefix(collection)+keys.ID(out.id))
	if err == nil && !found {
		err = fmt.Errorf("%w: %d was dropped since", p.errNotFound, out.id)
	}
	return kv, err
}

// checkChildrenBytes returns ErrLimitExceeded when a new record of a partition or index
// would bring those of its collection above maxChildrenBytes: captures and AddSegments
// read them together, and a snapshot's metadata holds them. A record of at most
// smallChildBytes costs no read, for the limit of the number bounds these. The size is
// not compared, like the number.
func (c *Catalog) checkChildrenBytes(ctx context.Context, collection int64, bytes int) error {
	if bytes <= smallChildBytes {
		return nil
	}
	sum := bytes
	for _, prefix := range []string{keys.PartitionPrefix(collection), keys.IndexPrefix(collection)} {
		from, to := meta.Prefix(prefix)
		_, err := c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				sum += len(kv.Value)
			}
			if sum > maxChildrenBytes {
				return errStopScan
			}
			return nil
		})
		if errors.Is(err, errStopScan) {
			return fmt.Errorf("%w: partitions and indexes of a collection take at most %d bytes in total, dropped ones "+
				"included, and those of at most %d bytes excepted; make attributes or parameters smaller",
				ErrLimitExceeded, maxChildrenBytes, smallChildBytes)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// DropPartition makes a partition DROPPING: later snapshots capture nothing of it. It
// returns the id, or 0 when there was none, which is success.
func (c *Catalog) DropPartition(ctx context.Context, tok request.Token, ref Ref, name string) (int64, error) {
	drop := func(kv meta.KeyValue, op string) ([]byte, error) {
		p, err := decodePartition(kv)
		p.State = Dropping
		return record.Encode(encodePartition(&p, op)), err
	}
	id, err := c.dropChild(ctx, tok, ref, name, keys.PartitionName, keys.Partition, drop)
	if err != nil {
		return 0, fmt.Errorf("drop partition %s of %s: %w", name, ref, err)
	}
	return id, nil
}

// DropIndex makes an index DROPPING: later snapshots capture no build of it. It returns
// the id, or 0 when there was none, which is success.
func (c *Catalog) DropIndex(ctx context.Context, tok request.Token, ref Ref, name string) (int64, error) {
	drop := func(kv meta.KeyValue, op string) ([]byte, error) {
		x, err := decodeIndex(kv)
		x.State = Dropping
		return record.Encode(encodeIndex(&x, op)), err
	}
	id, err := c.dropChild(ctx, tok, ref, name, keys.IndexName, keys.Index, drop)
	if err != nil {
		return 0, fmt.Errorf("drop index %s of %s: %w", name, ref, err)
	}
	return id, nil
}

// dropChild replaces the record of a partition or an index by that of dropped, and deletes
// its name. It returns the id, or 0 when there was none.
func (c *Catalog) dropChild(ctx context.Context, tok request.Token, ref Ref, name string,
	nameKey func(int64, string) string, idKey func(int64, int64) string,
	dropped func(meta.KeyValue, string) ([]byte, error),
) (int64, error) {
	if err := CheckName("name", name); err != nil {
		return 0, err
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		col, unchanged, err := c.active(ctx, &ref)
		if err != nil {
			return plan{}, err
		}
		nameKey := nameKey(col.ID, name)
		kv, found, _, err := c.kv.Get(ctx, nameKey)
		if err != nil || !found {
			return plan{}, err
		}
		rec := &storagev1.Name{}
		if err := record.Decode(kv, rec); err != nil {
			return plan{}, err
		}
		key := idKey(col.ID, rec.GetId())
		childKV, found, _, err := c.kv.Get(ctx, key)
		if err != nil || !found { // dropped in between: the compare below would fail
			return plan{}, err
		}
		op, err := record.NewOp(c.rand)
		if err != nil {
			return plan{}, err
		}
		data, err := dropped(childKV, op)
		if err != nil {
			return plan{}, err
		}
		return plan{
			txn: meta.Txn{
				If: []meta.Cond{
					unchanged, meta.Unchanged(nameKey, kv.ModRevision), meta.Unchanged(key, childKV.ModRevision),
				},
				Then: []meta.Op{
					meta.Delete(nameKey), meta.Put(key, data),
					// Breaks the compare of concurrent registrations of segments.
					meta.Put(keys.Collection(col.ID), record.Encode(encodeCollection(&col, op))),
				},
			},
			id: rec.GetId(),
		}, nil
	})
	return out.id, err
}
