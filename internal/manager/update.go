package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// maxLabels is the maximum size of a snapshot's labels, in bytes.
const maxLabels = 4096

// MaxRecordBytes is the maximum size of a snapshot's record.
const MaxRecordBytes = 16 << 10

// Update changes a committed snapshot's description, labels or expiry.
func (m *Manager) Update(ctx context.Context, tok request.Token, ref Ref, spec UpdateSpec) (*snapshot.Record, error) {
	if spec.Labels != nil {
		if err := checkLabels(*spec.Labels, maxLabels); err != nil {
			return nil, err
		}
	}
	var updated *snapshot.Record
	known, err := request.Do(ctx, m.kv, tok, func(ctx context.Context) (request.Commit, error) {
		s, err := m.updatable(ctx, ref, &spec)
		if err != nil {
			return nil, err
		}
		ref.ID = s.ID // the name is resolved once
		return func(ctx context.Context) (done bool, err error) {
			updated, done, err = m.tryUpdate(ctx, tok, s, &spec)
			return done, err
		}, nil
	})
	switch {
	case errors.Is(err, meta.ErrConflict):
		return nil, fmt.Errorf("update snapshot %s: %w", ref, err)
	case err != nil:
		return nil, err
	case known != nil:
		return snapshot.Decode(meta.KeyValue{Key: keys.Snapshot(known.ID), Value: known.Result, ModRevision: known.Revision})
	}
	return updated, nil
}

// tryUpdate writes the record of s as spec changes it. It is not done when s changed, the
// token was used or a lease was lost.
func (m *Manager) tryUpdate(
	ctx context.Context, tok request.Token, s *snapshot.Record, spec *UpdateSpec,
) (_ *snapshot.Record, done bool, err error) {
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return nil, false, err
	}
	next := *s
	next.CommitRevision = s.Order
	if spec.Description != nil {
		next.Description = *spec.Description
	}
	if spec.Labels != nil {
		next.Labels = *spec.Labels
	}
	if spec.ExpireTime != nil {
		next.ExpireTime = *spec.ExpireTime
	}
	if spec.TTL != nil {
		now, err := m.clock.Stamp(ctx)
		if err != nil {
			return nil, false, fmt.Errorf("update snapshot %s: read the clock for the ttl: %w", s, err)
		}
		next.ExpireTime = now.Add(*spec.TTL)
	}
	value := snapshot.Encode(&next, op)
	if err := checkRecordSize(value); err != nil {
		return nil, false, err
	}
	won, revision, err := m.commitWith(ctx, tok, s.ID, value, meta.Txn{
		If:   []meta.Cond{meta.Unchanged(keys.Snapshot(s.ID), s.Revision)},
		Then: []meta.Op{meta.Put(keys.Snapshot(s.ID), value)},
	})
	if err != nil {
		return nil, false, fmt.Errorf("update snapshot %s: %w", s, err)
	}
	next.Revision = revision
	return &next, won, nil
}

// updatable checks spec and returns the snapshot that it applies to.
func (m *Manager) updatable(ctx context.Context, ref Ref, spec *UpdateSpec) (*snapshot.Record, error) {
	if spec.ExpireTime != nil {
		if err := m.checkExpiry(ctx, *spec.ExpireTime); err != nil {
			return nil, err
		}
	}
	if spec.TTL != nil && (*spec.TTL <= 0 || *spec.TTL > maxExpiry) {
		return nil, &catalog.InvalidError{
			Field: "ttl", Problem: fmt.Sprintf("%v is not above 0 and up to 100 years", *spec.TTL),
		}
	}
	s, err := m.committed(ctx, ref)
	if err != nil {
		return nil, err
	}
	if spec.Revision > 0 && spec.Revision != s.Revision {
		return nil, fmt.Errorf("%w: %s is at revision %d, not %d; read it again",
			ErrRevisionChanged, s, s.Revision, spec.Revision)
	}
	return s, nil
}

// checkExpiry returns an error if a snapshot may not expire at t.
func (m *Manager) checkExpiry(ctx context.Context, t time.Time) error {
	if t.IsZero() {
		return nil
	}
	now, err := m.clock.Stamp(ctx)
	if err != nil {
		return fmt.Errorf("check expire_time: %w", err)
	}
	return checkExpiry(t, now)
}

// checkLabels returns an error if labels exceed limit, in bytes.
func checkLabels(labels map[string]string, limit int) error {
	size := 0
	for k, v := range labels {
		size += len(k) + len(v)
	}
	if size > limit {
		return &catalog.InvalidError{Field: "labels", Problem: fmt.Sprintf("%d bytes in all, at most %d", size, limit)}
	}
	return nil
}

func checkRecordSize(value []byte) error {
	if len(value) > MaxRecordBytes {
		return fmt.Errorf("%w: the snapshot's record takes %d bytes, at most %d; use fewer labels or a shorter description",
			catalog.ErrLimitExceeded, len(value), MaxRecordBytes)
	}
	return nil
}
