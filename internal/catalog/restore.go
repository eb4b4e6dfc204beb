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

// What follows writes a collection that a restore makes. The restore job has the
// transactions: it compares its own record in each of them, and so is the only
// one that writes a RESTORING collection.

// RestorePrefix is what the keys of all objects begin with that a restore keeps
// for itself until its job is forgotten.
const RestorePrefix = "gc/restore/"

// RestoreDir is the prefix of the objects of one job.
func RestoreDir(job int64) string { return fmt.Sprintf("%s%d/", RestorePrefix, job) }

// PinsKey is an object that holds the ETags of files of a task.
func PinsKey(job, task int64, part int) string {
	return fmt.Sprintf("%spins-%d-%d.json", RestoreDir(job), task, part)
}

// CheckNew says whether a collection may be made of spec, and fills its defaults
// in.
func (c *Catalog) CheckNew(spec *Collection) error { return c.checkSpec(spec) }

// ClaimOps returns what makes the RESTORING collection of a job, and takes its
// name: it must compare that both are absent, and that its roots are apart from
// those of other collections.
func (c *Catalog) ClaimOps(ctx context.Context, col *Collection, op string) ([]meta.Cond, []meta.Op, error) {
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

// ContentOps returns what makes a restored collection's partitions, indexes and
// checkpoints.
func ContentOps(collection int64, partitions []Partition, indexes []Index, checkpoints []Checkpoint, now time.Time, op string) []meta.Op {
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

// SegmentOps returns what makes a restored segment, and claims its ids, which
// ClaimRange keeps from everybody else.
func SegmentOps(collection int64, s *segment.Segment, op string) ([]meta.Op, error) {
	rec := encodeSegment(collection, s, op)
	rec.RemovedWhole = true // it is new
	value := record.Encode(rec)
	if len(value) > MaxSegmentBytes {
		return nil, fmt.Errorf("%w: segment %d takes %d bytes, at most %d", ErrLimitExceeded, s.ID, len(value), MaxSegmentBytes)
	}
	owner := record.Encode(&storagev1.Owner{Format: record.Format, CollectionId: collection})
	ops := []meta.Op{meta.Put(keys.Segment(collection, s.ID), value)}
	for _, n := range newIDs(nil, s) {
		ops = append(ops, meta.Put(n.key(), owner))
	}
	return ops, nil
}

// PublishOp returns what makes a restored collection ACTIVE.
func PublishOp(col Collection, op string) meta.Op {
	col.State, col.Job = Active, 0
	rec := encodeCollection(&col, op)
	rec.Published = true
	return meta.Put(keys.Collection(col.ID), record.Encode(rec))
}

// ContentRanges are the key ranges of everything in a collection, less the
// collection itself: what is there of one that was never published is removed
// with them. Segments come first.
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

// WasPublished says whether the record was written by the transaction that made
// a restored collection ACTIVE: to everybody but its job it came into being then.
func WasPublished(kv meta.KeyValue) bool {
	rec := &storagev1.Collection{}
	return record.Decode(kv, rec) == nil && rec.GetPublished()
}
