package catalog

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Resolve returns the id of a Ref: its ID when positive, else that of its name. It fails
// with ErrCollectionNotFound when no collection has the name.
func (c *Catalog) Resolve(ctx context.Context, ref Ref) (int64, error) {
	if ref.ID > 0 {
		return ref.ID, nil
	}
	if err := CheckName("collection.name.db", ref.DB); err != nil {
		return 0, err
	}
	if err := CheckName("collection.name.name", ref.Name); err != nil {
		return 0, err
	}
	kv, found, _, err := c.kv.Get(ctx, keys.CollectionName(ref.DB, ref.Name))
	if err != nil {
		return 0, fmt.Errorf("read collection %s: %w", ref, err)
	}
	if !found {
		return 0, fmt.Errorf("%w: %s; ListCollections lists the collections", ErrCollectionNotFound, ref)
	}
	rec := &storagev1.Name{}
	if err := record.Decode(kv, rec); err != nil {
		return 0, err
	}
	return rec.GetId(), nil
}

// Collection returns a collection, whatever its state.
func (c *Catalog) Collection(ctx context.Context, ref Ref) (Collection, error) {
	for range maxAttempts {
		id, err := c.Resolve(ctx, ref)
		if err != nil {
			return Collection{}, err
		}
		kv, found, _, err := c.kv.Get(ctx, keys.Collection(id))
		if err != nil {
			return Collection{}, fmt.Errorf("read collection %s: %w", ref, err)
		}
		if !found {
			return Collection{}, fmt.Errorf("%w: %s", ErrCollectionNotFound, ref)
		}
		col, err := DecodeCollection(kv)
		if err != nil || ref.ID > 0 || col.DB == ref.DB && col.Name == ref.Name {
			return col, err
		}
		// Renamed since the name was read, which may be another collection's by now.
	}
	return Collection{}, fmt.Errorf("%w: collection %s keeps being renamed", meta.ErrConflict, ref)
}

// active returns an ACTIVE collection, and the compare that its record is unchanged. It
// puts the id into ref, so that a change resolves a name once, however often it is
// decided.
func (c *Catalog) active(ctx context.Context, ref *Ref) (Collection, meta.Cond, error) {
	col, err := c.Collection(ctx, *ref)
	if err != nil {
		return Collection{}, meta.Cond{}, err
	}
	ref.ID = col.ID
	if err := col.CheckActive(); err != nil {
		return Collection{}, meta.Cond{}, err
	}
	return col, col.unchanged(), nil
}

// CheckActive returns nil, or ErrCollectionNotActive with the state.
func (c *Collection) CheckActive() error {
	if c.State == Restoring {
		return fmt.Errorf("%w: %s is %v by job %d until that has ended", ErrCollectionNotActive, c, c.State, c.Job)
	}
	if c.State != Active {
		return fmt.Errorf("%w: %s is %v", ErrCollectionNotActive, c, c.State)
	}
	return nil
}

// unchanged returns the compare that the collection's record is as read, and that none of
// its partitions and indexes was dropped since.
func (c *Collection) unchanged() meta.Cond {
	return meta.Unchanged(keys.Collection(c.ID), c.Revision)
}

// CreateCollection creates an empty collection with spec's DB, Name, Schema, Channels,
// Roots, Layout, Consistency, Properties, Attributes, and ID unless it is 0.
func (c *Catalog) CreateCollection(ctx context.Context, tok request.Token, spec Collection) (Collection, error) {
	if err := c.checkSpec(&spec); err != nil {
		return Collection{}, err
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		name := keys.CollectionName(spec.DB, spec.Name)
		if _, found, _, err := c.kv.Get(ctx, name); err != nil {
			return plan{}, err
		} else if found {
			return plan{}, fmt.Errorf("%w: %s/%s; choose another name, or drop it first",
				ErrCollectionExists, spec.DB, spec.Name)
		}
		id, err := c.allocateOrCheck(ctx, "collection", spec.ID)
		if err != nil {
			return plan{}, err
		}
		if spec.ID != 0 {
			if _, found, _, err := c.kv.Get(ctx, keys.Collection(id)); err != nil {
				return plan{}, err
			} else if found {
				return plan{}, fmt.Errorf("%w: id %d is taken; ids are never reused", ErrCollectionExists, id)
			}
		}
		op, err := record.NewOp(c.rand)
		if err != nil {
			return plan{}, err
		}
		col := spec
		col.State, col.CreateTime = Active, c.now()
		data := record.Encode(encodeCollection(&col, op))
		if len(data) > MaxRecordBytes {
			return plan{}, fmt.Errorf("%w: the collection's record takes %d bytes, at most %d; "+
				"make schema, properties or attributes smaller", ErrLimitExceeded, len(data), MaxRecordBytes)
		}
		col.ID = id
		apart, roots, err := c.rootOps(ctx, &col)
		if err != nil {
			return plan{}, err
		}
		return plan{
			txn: meta.Txn{
				If: append(apart, meta.Absent(name), meta.Absent(keys.Collection(id))),
				Then: append(roots,
					meta.Put(name, record.Encode(&storagev1.Name{Format: record.Format, Id: id})),
					meta.Put(keys.Collection(id), data),
				),
			},
			id: id, result: data,
		}, nil
	})
	if err != nil {
		return Collection{}, fmt.Errorf("create collection %s/%s: %w", spec.DB, spec.Name, err)
	}
	return c.collectionResult(ctx, out)
}

func (c *Catalog) collectionResult(ctx context.Context, out outcome) (Collection, error) {
	if len(out.result) == 0 {
		return c.Collection(ctx, Ref{ID: out.id})
	}
	return DecodeCollection(meta.KeyValue{Key: keys.Collection(out.id), Value: out.result, ModRevision: out.revision})
}

func (c *Catalog) checkSpec(spec *Collection) error {
	if err := CheckName("name.db", spec.DB); err != nil {
		return err
	}
	if err := CheckName("name.name", spec.Name); err != nil {
		return err
	}
	if len(spec.Channels) > MaxChannels {
		return invalid("channels", "%d channels, at most %d", len(spec.Channels), MaxChannels)
	}
	if n := len(strings.Join(spec.Channels, "")); n > maxChannelBytes {
		return invalid("channels", "the names take %d bytes, at most %d in all", n, maxChannelBytes)
	}
	for i, name := range spec.Channels {
		if name == "" || slices.Contains(spec.Channels[:i], name) {
			return invalid(fmt.Sprintf("channels[%d]", i), "%q is empty or occurs twice", name)
		}
	}
	if err := checkSchema(&spec.Schema); err != nil {
		return err
	}
	if spec.Layout == 0 {
		spec.Layout = LayoutNative
	}
	return c.checkRoots(spec.Roots)
}

// Patch holds the new values of an UpdateCollection; nil fields stay.
type Patch struct {
	Properties  *map[string]string
	Attributes  *map[string]string
	Consistency *string
}

// UpdateCollection changes a collection. A positive revision must equal the
// collection's, else the error is ErrRevisionChanged.
func (c *Catalog) UpdateCollection(
	ctx context.Context, tok request.Token, ref Ref, revision int64, patch Patch,
) (Collection, error) {
	return c.rewrite(ctx, tok, ref, "update", func(_ context.Context, col *Collection) ([]meta.Cond, []meta.Op, error) {
		if revision > 0 && revision != col.Revision {
			return nil, nil, fmt.Errorf("%w: %s is at %d, not %d; read it again",
				ErrRevisionChanged, col, col.Revision, revision)
		}
		if patch.Properties != nil {
			col.Properties = *patch.Properties
		}
		if patch.Attributes != nil {
			col.Attributes = *patch.Attributes
		}
		if patch.Consistency != nil {
			col.Consistency = *patch.Consistency
		}
		return nil, nil, nil
	})
}

// RenameCollection gives a collection another name.
func (c *Catalog) RenameCollection(
	ctx context.Context, tok request.Token, ref Ref, db, name string,
) (Collection, error) {
	if err := CheckName("new_name.db", db); err != nil {
		return Collection{}, err
	}
	if err := CheckName("new_name.name", name); err != nil {
		return Collection{}, err
	}
	return c.rewrite(ctx, tok, ref, "rename", func(ctx context.Context, col *Collection) ([]meta.Cond, []meta.Op, error) {
		if col.DB == db && col.Name == name {
			return nil, nil, nil
		}
		from, to := keys.CollectionName(col.DB, col.Name), keys.CollectionName(db, name)
		if _, found, _, err := c.kv.Get(ctx, to); err != nil {
			return nil, nil, err
		} else if found {
			return nil, nil, fmt.Errorf("%w: %s/%s", ErrCollectionExists, db, name)
		}
		col.DB, col.Name = db, name
		return []meta.Cond{meta.Absent(to)}, []meta.Op{
			meta.Delete(from),
			meta.Put(to, record.Encode(&storagev1.Name{Format: record.Format, Id: col.ID})),
		}, nil
	})
}

// rewrite changes the record of an active collection.
func (c *Catalog) rewrite(ctx context.Context, tok request.Token, ref Ref, verb string,
	edit func(context.Context, *Collection) ([]meta.Cond, []meta.Op, error),
) (Collection, error) {
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		col, unchanged, err := c.active(ctx, &ref)
		if err != nil {
			return plan{}, err
		}
		conds, ops, err := edit(ctx, &col)
		if err != nil {
			return plan{}, err
		}
		op, err := record.NewOp(c.rand)
		if err != nil {
			return plan{}, err
		}
		data := record.Encode(encodeCollection(&col, op))
		if len(data) > MaxRecordBytes {
			return plan{}, fmt.Errorf("%w: the collection's record takes %d bytes, at most %d",
				ErrLimitExceeded, len(data), MaxRecordBytes)
		}
		return plan{
			txn: meta.Txn{
				If:   append(conds, unchanged),
				Then: append(ops, meta.Put(keys.Collection(col.ID), data)),
			},
			id: col.ID, result: data,
		}, nil
	})
	if err != nil {
		return Collection{}, fmt.Errorf("%s collection %s: %w", verb, ref, err)
	}
	return c.collectionResult(ctx, out)
}

// DropCollection makes a collection DROPPING: it loses its name and accepts no writes and
// no snapshots. It returns the id, or 0 when there was no such collection, which is
// success.
func (c *Catalog) DropCollection(ctx context.Context, tok request.Token, ref Ref, expected int64) (int64, error) {
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		col, err := c.Collection(ctx, ref)
		if isNotFound(err) {
			return plan{}, nil
		}
		if err != nil {
			return plan{}, err
		}
		if ref.ID > 0 && ref.Name != "" && (col.DB != ref.DB || col.Name != ref.Name) {
			return plan{}, nil // renamed since the name was resolved: no collection has it
		}
		ref.ID = col.ID // a name is resolved once
		if expected > 0 && expected != col.ID {
			return plan{}, fmt.Errorf("%w: %s is %d, not %d", ErrCollectionMismatch, ref, col.ID, expected)
		}
		switch col.State {
		case Dropping:
			return plan{id: col.ID}, nil
		case Restoring:
			return plan{}, fmt.Errorf("%w: %s is being restored; cancel job %d instead", ErrCollectionNotActive, &col, col.Job)
		case Active:
		}
		op, err := record.NewOp(c.rand)
		if err != nil {
			return plan{}, err
		}
		unchanged := meta.Unchanged(keys.Collection(col.ID), col.Revision)
		col.State = Dropping
		if col.DropTime, err = c.stamp(ctx); err != nil {
			return plan{}, fmt.Errorf("read the time of the drop: %w", err)
		}
		return plan{
			txn: meta.Txn{
				If: []meta.Cond{unchanged},
				Then: []meta.Op{
					meta.Put(keys.Collection(col.ID), record.Encode(encodeCollection(&col, op))),
					meta.Delete(keys.CollectionName(col.DB, col.Name)),
				},
			},
			id: col.ID,
		}, nil
	})
	if err != nil {
		return 0, fmt.Errorf("drop collection %s: %w", ref, err)
	}
	return out.id, nil
}
