package catalog

import (
	"context"
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// The functions below return the operations that write the collection of a restore. The
// restore job executes them, in transactions that compare its record, so that nothing
// else writes a RESTORING collection.

// RestorePrefix is the prefix of the objects that restores keep until their job's record
// is removed.
const RestorePrefix = "gc/restore/"

// RestoreDir returns the prefix of the objects of one job.
func RestoreDir(job int64) string { return fmt.Sprintf("%s%d/", RestorePrefix, job) }

// PinsKey returns the key of an object with the ETags of the sources that a task copies, so
// that a later attempt copies the same content. Such an ETag is a pinned one, and no pin.
func PinsKey(job, task int64, part int) string {
	return fmt.Sprintf("%spins-%d-%d.json", RestoreDir(job), task, part)
}

// CheckNew checks the spec of a new collection and sets its defaults.
func (c *Catalog) CheckNew(spec *Collection) error { return c.checkSpec(spec) }

// RestoringOps returns the compares and writes that create the RESTORING collection of a
// job with its name and roots: record and name are absent, and no root is nested with a
// root of another collection.
func (c *Catalog) RestoringOps(ctx context.Context, col *Collection, op string) ([]meta.Cond, []meta.Op, error) {
	name, key := keys.CollectionName(col.DB, col.Name), keys.Collection(col.ID)
	col.State = Restoring
	data := record.Encode(encodeCollection(col, op))
	if len(data) > MaxRecordBytes {
		return nil, nil, fmt.Errorf("%w: the collection's record takes %d bytes, at most %d; make properties smaller",
			ErrLimitExceeded, len(data), MaxRecordBytes)
	}
	conds, ops, err := c.rootOps(ctx, col)
	if err != nil {
		return nil, nil, err
	}
	return append(conds, meta.Absent(name), meta.Absent(key)), append(ops,
		meta.Put(name, record.Encode(&storagev1.Name{Format: record.Format, Id: col.ID})),
		meta.Put(key, data),
	), nil
}

// ContentOps returns the writes of a restored collection's partitions, indexes and
// checkpoints.
func ContentOps(
	collection int64, partitions []Partition, indexes []Index, checkpoints []Checkpoint, now time.Time, op string,
) []meta.Op {
	var ops []meta.Op
	for i := range partitions {
		p := &partitions[i]
		p.State, p.CreateTime = Active, now
		ops = append(ops,
			meta.Put(keys.PartitionName(collection, p.Name), record.Encode(&storagev1.Name{Format: record.Format, Id: p.ID})),
			meta.Put(keys.Partition(collection, p.ID), record.Encode(encodePartition(p, op))))
	}
	for i := range indexes {
		x := &indexes[i]
		x.State, x.CreateTime = Active, now
		ops = append(ops,
			meta.Put(keys.IndexName(collection, x.Name), record.Encode(&storagev1.Name{Format: record.Format, Id: x.ID})),
			meta.Put(keys.Index(collection, x.ID), record.Encode(encodeIndex(x, op))))
	}
	for _, cp := range checkpoints {
		ops = append(ops, meta.Put(keys.Channel(collection, cp.Shard),
			record.Encode(&storagev1.Channel{Format: record.Format, Checkpoint: positionRecord(cp.Position), Op: op})))
	}
	return ops
}

// SegmentOps returns the writes of a restored segment and of the claims to its ids, which
// ClaimRange has excluded from other claims.
func SegmentOps(collection int64, s *segment.Segment, op string) ([]meta.Op, error) {
	rec := encodeSegment(collection, s, op)
	rec.RemovedWhole = true // no path was removed yet
	value := record.Encode(rec)
	if len(value) > MaxSegmentBytes {
		return nil, fmt.Errorf("%w: segment %d takes %d bytes, at most %d",
			ErrLimitExceeded, s.ID, len(value), MaxSegmentBytes)
	}
	owner := record.Encode(&storagev1.Owner{Format: record.Format, CollectionId: collection})
	ops := []meta.Op{meta.Put(keys.Segment(collection, s.ID), value)}
	for _, n := range newIDs(nil, s) {
		ops = append(ops, meta.Put(n.key(), owner))
	}
	return ops, nil
}

// PublishOp returns the write that makes a restored collection ACTIVE.
func PublishOp(col Collection, op string) meta.Op {
	col.State, col.Job = Active, 0
	rec := encodeCollection(&col, op)
	rec.Published = true
	return meta.Put(keys.Collection(col.ID), record.Encode(rec))
}

// ContentRanges returns the deletes of all keys of a collection but its record, for the
// removal of a collection that was never published. Segments come first.
func ContentRanges(collection int64) []meta.Op {
	var ops []meta.Op
	for _, prefix := range []string{
		keys.SegmentPrefix(collection), keys.PartitionPrefix(collection), keys.PartitionName(collection, ""),
		keys.IndexPrefix(collection), keys.IndexName(collection, ""), keys.ChannelPrefix(collection),
	} {
		from, to := meta.Prefix(prefix)
		ops = append(ops, meta.DeleteRange(from, to))
	}
	return ops
}

// WasPublished reports whether the record was written by the transaction that published a
// restored collection, and so made it visible.
func WasPublished(kv meta.KeyValue) bool {
	rec := &storagev1.Collection{}
	return record.Decode(kv, rec) == nil && rec.GetPublished()
}
