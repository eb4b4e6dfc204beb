package manager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// maxJobLabels is the maximum size of a job's labels, in bytes.
const maxJobLabels = 1024

// RestoreSpec specifies a restore.
type RestoreSpec struct {
	Snapshot    Ref
	DB, Name    string            // of the target collection
	Partitions  []string          // of the snapshot; none: all
	Properties  map[string]string // changes to the snapshot's; an empty value removes one
	Channels    []string          // of the target, in shard order; none: the snapshot's
	SkipIndexes bool
	Priority    int
	Limits      copyjob.Limits
	Timeout     time.Duration // 0: none
	Labels      map[string]string
}

// Restore makes a restore job durable and returns it. If the store does not answer, the
// error wraps meta.ErrUnavailable, and a call with the same token returns the job if it
// was made.
func (m *Manager) Restore(ctx context.Context, tok request.Token, spec *RestoreSpec) (*copyjob.Job, error) {
	job, err := m.restore(ctx, tok, spec)
	if err != nil {
		return nil, fmt.Errorf("restore snapshot %s: %w", spec.Snapshot, err)
	}
	return job, nil
}

func (m *Manager) restore(ctx context.Context, tok request.Token, spec *RestoreSpec) (*copyjob.Job, error) {
	ref := spec.Snapshot
	var job *copyjob.Job
	known, err := request.Do(ctx, m.kv, tok, func(ctx context.Context) (request.Commit, error) {
		planned, txn, err := m.planJob(ctx, tok, &ref, spec)
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) (done bool, err error) {
			job, err = m.admit(ctx, planned, txn)
			return job != nil, err
		}, nil
	})
	if err != nil { // a concurrent call with the token may have caused it
		known, err = request.Resolve(ctx, m.kv, tok, err)
	}
	switch {
	case err != nil:
		return nil, err
	case known != nil:
		return m.recordedJob(ctx, known)
	}
	return job, nil
}

// recordedJob returns the job that an earlier call with the token made.
func (m *Manager) recordedJob(ctx context.Context, known *request.Record) (*copyjob.Job, error) {
	if known.Done { // the job's own record may already be removed
		return copyjob.DecodeJob(meta.KeyValue{Key: keys.Job(known.ID), Value: known.Result, ModRevision: known.Revision})
	}
	s, err := m.jobs.Get(ctx, known.ID)
	switch {
	case errors.Is(err, copyjob.ErrJobNotFound):
		return nil, m.NoJob(ctx, known.ID)
	case err != nil:
		return nil, err
	}
	return s.Job, nil
}

// planJob checks a restore, and returns its job and the transaction that makes the job, its
// claims and its pin. It allocates the ids of the job.
func (m *Manager) planJob(
	ctx context.Context, tok request.Token, ref *Ref, spec *RestoreSpec,
) (*copyjob.Job, meta.Txn, error) {
	r, err := m.checkRestore(ctx, *ref, spec)
	if err == nil {
		err = m.checkStores(ctx, r, true)
	}
	if err != nil {
		return nil, meta.Txn{}, err
	}
	ref.ID = r.snapshot.ID // the name is resolved once
	job, err := m.newJob(ctx, tok, r, spec)
	if err != nil {
		return nil, meta.Txn{}, err
	}
	txn, err := m.admitTxn(ctx, tok, r, spec, job)
	return job, txn, err
}

// admit makes a job by its transaction, and returns it, or nil when a compare failed.
func (m *Manager) admit(ctx context.Context, job *copyjob.Job, txn meta.Txn) (*copyjob.Job, error) {
	res, err := m.kv.Txn(ctx, txn)
	switch {
	case meta.Refused(err):
		return nil, err
	case err != nil: // the job exists if the transaction was applied; if not, it may still be
		readCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), readBackTimeout)
		defer cancel()
		if kv, found, _, readErr := m.kv.Get(readCtx, keys.Job(job.ID)); readErr == nil && found {
			return copyjob.DecodeJob(kv)
		}
		return nil, err
	case !res.Succeeded:
		return nil, nil //nolint:nilnil // the restore is decided again
	}
	job.Revision = res.Revision
	m.log.Info("restore admitted", zap.Int64("job", job.ID), zap.Int64("snapshot", job.Snapshot),
		zap.Int64("collection", job.Target), zap.String("name", job.DB+"/"+job.Name))
	return job, nil
}

// newJob returns a job with newly allocated ids.
func (m *Manager) newJob(
	ctx context.Context, tok request.Token, r *restoreScope, spec *RestoreSpec,
) (*copyjob.Job, error) {
	md := r.md
	partitions, indexes := int64(len(md.Partitions)), int64(len(md.Indexes))
	ids, err := m.catalog.AllocateRange(ctx, 3+partitions+indexes+md.Totals.Segments+md.Totals.Builds)
	if err != nil {
		return nil, err
	}
	now := m.clock.Display()
	if spec.Timeout > 0 {
		if now, err = m.clock.Stamp(ctx); err != nil {
			return nil, fmt.Errorf("start of the timeout: %w", err)
		}
	}
	job := &copyjob.Job{
		ID: ids.First, Snapshot: r.snapshot.ID, SnapshotName: r.snapshot.Name, Source: r.snapshot.Collection,
		Target: ids.First + 1, Pin: ids.First + 2, DB: spec.DB, Name: spec.Name,
		State: copyjob.Pending, Phase: copyjob.Admit,
		Partitions: r.partitions, PartitionNames: spec.Partitions, SkipIndexes: spec.SkipIndexes, Priority: spec.Priority,
		Labels: spec.Labels, Layout: r.layout,
		FirstPartition: ids.First + 3, FirstIndex: ids.First + 3 + partitions,
		FirstSegment: ids.First + 3 + partitions + indexes, Segments: md.Totals.Segments,
		FirstBuild: ids.First + 3 + partitions + indexes + md.Totals.Segments, Builds: md.Totals.Builds,
		Parts: r.parts, TaskSegments: copyjob.TaskSegments,
		Tasks:  (md.Totals.Segments + copyjob.TaskSegments - 1) / copyjob.TaskSegments,
		Totals: r.totals, CreateTime: now, RequestKey: tok.Key(), PinStore: m.o.SnapshotStore,
	}
	if spec.Timeout > 0 {
		job.Deadline = now.Add(spec.Timeout)
	}
	return job, nil
}

// admitTxn returns the transaction that makes the job, its claims and its pin, and sets
// the roots of the job.
func (m *Manager) admitTxn(
	ctx context.Context, tok request.Token, r *restoreScope, spec *RestoreSpec, job *copyjob.Job,
) (meta.Txn, error) {
	col := targetOf(r.md, spec)
	job.Roots = col.Roots
	col.ID, col.Job, col.CreateTime, col.Layout = job.Target, job.ID, job.CreateTime, catalog.Layout(r.layout)
	if err := m.catalog.CheckNew(&col); err != nil {
		return meta.Txn{}, err
	}
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return meta.Txn{}, err
	}
	conds, ops, err := m.catalog.RestoringOps(ctx, &col, op)
	if err != nil {
		return meta.Txn{}, err
	}
	free, claims := catalog.ClaimRange(job.Target, job.FirstSegment, job.Segments+job.Builds)
	conds, ops = append(conds, free...), append(ops, claims...)
	pin := &Pin{
		Snapshot: job.Snapshot, ID: job.Pin, Owner: "snapshotd", CreateTime: job.CreateTime, Job: job.ID, op: op,
		Reason: fmt.Sprintf("restore job %d to %s/%s", job.ID, spec.DB, spec.Name),
	}
	pin.Reason = fmt.Sprintf("%.*s", maxPinReason, pin.Reason)
	putPin := meta.Put(keys.Pin(job.Snapshot, job.Pin), encodePin(pin))
	unchanged := []meta.Cond{meta.Unchanged(keys.Snapshot(r.snapshot.ID), r.snapshot.Revision)}
	txn := meta.Txn{
		Name: "restore.admit",
		If:   slices.Concat(unchanged, conds, tok.Unused()),
		Then: slices.Concat(ops, []meta.Op{meta.Put(keys.Job(job.ID), job.Encode(op)), putPin}, tok.Begin(job.ID)),
	}
	if spec.Limits != (copyjob.Limits{}) {
		txn.Then = append(txn.Then, copyjob.LimitsOp(job.ID, spec.Limits))
	}
	return txn, nil
}

// targetOf returns the target collection of a restore without its ids.
func targetOf(md *manifest.Metadata, spec *RestoreSpec) catalog.Collection {
	src := &md.Collection
	col := catalog.Collection{
		DB: spec.DB, Name: spec.Name, Channels: spec.Channels, Consistency: src.ConsistencyLevel,
		Properties: maps.Clone(src.Properties), Attributes: src.Attributes,
		Schema: catalog.Schema{Format: src.Schema.Format, Raw: src.Schema.Raw},
	}
	for _, f := range src.Schema.Fields {
		col.Schema.Fields = append(col.Schema.Fields, catalog.Field(f))
	}
	for k, v := range spec.Properties {
		if v == "" {
			delete(col.Properties, k)
			continue
		}
		if col.Properties == nil {
			col.Properties = map[string]string{}
		}
		col.Properties[k] = v
	}
	if len(col.Channels) == 0 {
		for _, c := range md.Channels {
			if c.Name != "" {
				col.Channels = append(col.Channels, c.Name)
			}
		}
	}
	for _, root := range md.Roots {
		col.Roots = append(col.Roots, catalog.Root{Store: root.Store, Prefix: root.Prefix})
	}
	return col
}

// NoJob returns the error for a missing restore job: ErrJobForgotten if the id was
// allocated, else ErrJobNeverExisted.
func (m *Manager) NoJob(ctx context.Context, id int64) error {
	_, ok, err := m.catalog.Allocated(ctx, id)
	switch {
	case err != nil:
		return err
	case ok:
		return fmt.Errorf("%w: %d", ErrJobForgotten, id)
	}
	return fmt.Errorf("%w: %d", ErrJobNeverExisted, id)
}
