package catalog

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/snapshotd/snapshotd/internal/segment"
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
	return Collection{}, fmt.Errorf("%w: collection %s keeps being renamed", ErrConflict, ref)
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

// View is a collection at one revision, without its segments.
type View struct {
	Revision    int64
	Collection  Collection
	Partitions  []Partition        // in id order
	Indexes     []Index            // in id order
	Checkpoints map[int]Checkpoint // by shard; a shard without one is missing
}

// At reads a collection at revision, or at the newest one when that is 0.
func (c *Catalog) At(ctx context.Context, collection, revision int64) (View, error) {
	from := keys.Collection(collection)
	res, err := c.kv.Range(ctx, meta.Range{From: from, Revision: revision})
	if err != nil {
		return View{}, fmt.Errorf("read collection %d: %w", collection, err)
	}
	if revision == 0 {
		revision = res.Revision
	}
	if len(res.KVs) == 0 {
		return View{}, fmt.Errorf("%w: %d", ErrCollectionNotFound, collection)
	}
	v := View{Revision: revision, Checkpoints: map[int]Checkpoint{}}
	if v.Collection, err = DecodeCollection(res.KVs[0]); err != nil {
		return View{}, err
	}
	if v.Partitions, err = readAll(ctx, c.kv, keys.PartitionPrefix(collection), revision, decodePartition); err != nil {
		return View{}, err
	}
	if v.Indexes, err = readAll(ctx, c.kv, keys.IndexPrefix(collection), revision, decodeIndex); err != nil {
		return View{}, err
	}
	checkpoints, err := readAll(ctx, c.kv, keys.ChannelPrefix(collection), revision, decodeCheckpoint)
	if err != nil {
		return View{}, err
	}
	for _, cp := range checkpoints {
		cp.Channel = v.Collection.Channel(cp.Shard)
		v.Checkpoints[cp.Shard] = cp
	}
	if _, set := v.Checkpoints[0]; !set && len(v.Collection.Channels) == 0 {
		// Without a stream, all registered rows are in files.
		v.Checkpoints[0] = Checkpoint{Position: segment.Position{Timestamp: segment.MaxTimestamp}}
	}
	return v, nil
}

// readAll reads a bounded set of records at one revision.
func readAll[T any](
	ctx context.Context, kv meta.KV, prefix string, revision int64, decode func(meta.KeyValue) (T, error),
) ([]T, error) {
	var list []T
	from, to := meta.Prefix(prefix)
	_, err := kv.Scan(ctx, from, to, revision, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			t, err := decode(kv)
			if err != nil {
				return err
			}
			list = append(list, t)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", prefix, err)
	}
	return list, nil
}

func decodeCheckpoint(kv meta.KeyValue) (Checkpoint, error) {
	shard, err := keys.LastID(kv.Key)
	if err != nil {
		return Checkpoint{}, err
	}
	rec := &storagev1.Channel{}
	if err := record.Decode(kv, rec); err != nil {
		return Checkpoint{}, err
	}
	return Checkpoint{Shard: int(shard), Position: positionOf(rec.GetCheckpoint())}, nil
}
