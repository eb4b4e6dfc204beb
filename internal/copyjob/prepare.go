package copyjob

import (
	"context"
	"fmt"
	"maps"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// prepare writes the target's metadata and the tasks, reads them back, and moves the job
// to phase copy.
func (l *leader) prepare(ctx context.Context, job *Job) error {
	md, err := readMetadata(ctx, l.o.Snapshots, job.Snapshot)
	if err != nil {
		return err
	}
	if existing, err := l.existingObject(ctx, job); err != nil {
		return err
	} else if existing != "" {
		return l.replace(ctx, "restore.giveup", job, abortedJob(decision{
			job: job, outcome: Failed, reason: "TARGET_NOT_EMPTY",
			message: existing + " exists under a prefix of the target: another program uses ids of this cluster there;" +
				" nothing was changed",
		}, l.o.Clock.Display()))
	}
	op, err := record.NewOp(l.o.Rand)
	if err != nil {
		return err
	}
	partitions, indexes, checkpoints := targetContent(job, md)
	ops := catalog.ContentOps(job.Target, partitions, indexes, checkpoints, job.CreateTime, op)
	for n := range job.Tasks {
		t := &task{job: job.ID, number: n, state: TaskPending}
		ops = append(ops, meta.Put(t.key(), t.encode(op)))
	}
	for _, batch := range batches(ops) {
		if err := l.write(ctx, "restore.prepare", job, nil, batch); err != nil {
			return err
		}
	}
	if err := l.validate(ctx, job, len(partitions), len(indexes), len(checkpoints)); err != nil {
		return err
	}
	next := *job
	next.Phase, next.Copied = Copy, true
	return l.replace(ctx, "restore.prepared", job, &next)
}

// maxPrefixChecks bounds the target prefixes per root that are checked for existing
// objects.
const maxPrefixChecks = 64

// existingObject returns an object under the target's prefixes, which roll back would
// delete; empty: none was found. It is called before the first copy.
func (l *leader) existingObject(ctx context.Context, job *Job) (string, error) {
	m := job.cleanupMapping()
	if err := m.Check(); err != nil {
		return "", err
	}
	for _, root := range job.Roots {
		store, ok := l.o.Stores[root.Store]
		if !ok {
			return "", fmt.Errorf("%w: %q", errNoStore, root.Store)
		}
		checked := 0
		for prefix := range m.Prefixes() {
			if checked++; checked > maxPrefixChecks {
				break
			}
			for info, err := range store.List(ctx, root.Prefix+prefix) {
				if err != nil {
					return "", err
				}
				return root.Store + "/" + info.Key, nil
			}
		}
	}
	return "", nil
}

// targetContent returns the target's metadata without segments.
func targetContent(job *Job, md *manifest.Metadata) (
	partitions []catalog.Partition, indexes []catalog.Index, checkpoints []catalog.Checkpoint,
) {
	for i, p := range md.Partitions {
		if job.WantsPartition(p.ID) {
			partitions = append(partitions, catalog.Partition{
				ID: job.FirstPartition + int64(i), Name: p.Name, Attributes: p.Attributes,
			})
		}
	}
	for i, x := range md.Indexes {
		if job.SkipIndexes {
			break
		}
		params := maps.Clone(x.TypeParams)
		delete(params, "mmap.enabled") // a property of the source's load, not of the index
		indexes = append(indexes, catalog.Index{
			ID: job.FirstIndex + int64(i), Name: x.Name, Field: x.Field,
			TypeParams: params, IndexParams: x.IndexParams, Attributes: x.Attributes,
		})
	}
	for _, c := range md.Channels {
		// A channel without a checkpoint has none in the target; the implicit one needs none.
		if c.Cut > 0 && (c.Name != "" || c.Cut < segment.MaxTimestamp) {
			checkpoints = append(checkpoints, catalog.Checkpoint{
				Shard: c.Shard, Position: segment.Position{Timestamp: c.Cut, Opaque: c.Opaque},
			})
		}
	}
	return partitions, indexes, checkpoints
}

// validate reads back the writes of prepare.
func (l *leader) validate(ctx context.Context, job *Job, partitions, indexes, checkpoints int) error {
	view, err := l.o.Catalog.At(ctx, job.Target, 0)
	if err != nil {
		return err
	}
	from, to := meta.Prefix(keys.TaskPrefix(job.ID))
	tasks, err := l.kv.Range(ctx, meta.Range{From: from, To: to, Limit: 1, KeysOnly: true})
	if err != nil {
		return err
	}
	found := len(view.Checkpoints)
	if _, implicit := view.Checkpoints[0]; implicit && len(view.Collection.Channels) == 0 && checkpoints == 0 {
		found--
	}
	if len(view.Partitions) != partitions || len(view.Indexes) != indexes || found != checkpoints ||
		tasks.Count != job.Tasks {
		return fmt.Errorf("job %s: the target has %d partitions, %d indexes, %d checkpoints and %d tasks,"+
			" want %d, %d, %d and %d",
			job, len(view.Partitions), len(view.Indexes), found, tasks.Count, partitions, indexes, checkpoints, job.Tasks)
	}
	return nil
}
