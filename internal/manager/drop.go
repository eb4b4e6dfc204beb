package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Drop drops a snapshot: when it returns, the name is free and the snapshot protects
// nothing; its own objects are deleted in the background. With expected > 0 the
// snapshot must have that id. It returns the id, or 0 if the snapshot does not exist,
// which is success.
func (m *Manager) Drop(ctx context.Context, tok request.Token, ref Ref, expected int64) (int64, error) {
	id := int64(0)
	known, err := request.Do(ctx, m.kv, tok, func(ctx context.Context) (request.Commit, error) {
		s, txn, err := m.droppable(ctx, ref, expected)
		if err != nil {
			return nil, err
		}
		id = 0
		if s != nil {
			id, ref.ID = s.ID, s.ID // a name is resolved once
		}
		return func(ctx context.Context) (bool, error) {
			if len(txn.Then) == 0 && !tok.IsSet() {
				return true, nil
			}
			txn.Name = "drop.txn"
			won, _, err := m.commitWith(ctx, tok, id, nil, txn)
			if err == nil && won && len(txn.Then) > 0 {
				m.log.Info("snapshot dropped", zap.Int64("snapshot", id), zap.String("name", s.Name))
			}
			return won, err
		}, nil
	})
	switch {
	case err != nil:
		return 0, fmt.Errorf("drop snapshot %s: %w", ref, err)
	case known != nil:
		return known.ID, nil
	}
	return id, nil
}

// droppable returns the snapshot of ref, nil if it does not exist, and the transaction
// that drops it, empty if the snapshot is already being deleted.
func (m *Manager) droppable(
	ctx context.Context, ref Ref, expected int64,
) (s *snapshot.Record, txn meta.Txn, err error) {
	s, err = m.get(ctx, ref, expected == 0)
	switch {
	case errors.Is(err, ErrSnapshotNotFound), errors.Is(err, snapshot.ErrExpiredOrDropped),
		errors.Is(err, snapshot.ErrNeverExisted):
		return nil, meta.Txn{}, nil
	case err != nil:
		return nil, meta.Txn{}, err
	case expected > 0 && expected != s.ID:
		return nil, meta.Txn{}, fmt.Errorf("%w: it is %d, not %d", ErrSnapshotMismatch, s.ID, expected)
	}
	switch s.State {
	case snapshot.Pending:
		return nil, meta.Txn{}, fmt.Errorf("%w: %s, since %s; wait for it to end",
			ErrSnapshotPending, s, s.CreateTime.Format(time.RFC3339))
	case snapshot.Committed:
		if err := m.checkPins(ctx, s); err != nil {
			return nil, meta.Txn{}, err
		}
		txn, err = m.dropTxn(s)
	case snapshot.Deleting: // already dropped
	}
	return s, txn, err
}

// dropTxn returns the transaction that drops a committed snapshot.
func (m *Manager) dropTxn(s *snapshot.Record) (meta.Txn, error) {
	op, err := record.NewOp(m.o.Rand)
	if err != nil {
		return meta.Txn{}, err
	}
	return meta.Txn{
		If: []meta.Cond{
			meta.Unchanged(keys.Snapshot(s.ID), s.Revision),
			meta.RangeAbsent(meta.Prefix(keys.PinPrefix(s.ID))),
		},
		Then: []meta.Op{
			meta.Put(keys.Snapshot(s.ID), snapshot.Encode(s.WithState(snapshot.Deleting, ""), op)),
			meta.Delete(keys.SnapshotName(m.scope(s.Collection), s.Name)),
		},
	}, nil
}

// checkPins returns an error that names the pins of a snapshot, if it has any, after
// it removed expired ones. The transaction that drops the snapshot compares that no
// pin exists.
func (m *Manager) checkPins(ctx context.Context, s *snapshot.Record) error {
	from, to := meta.Prefix(keys.PinPrefix(s.ID))
	var res meta.RangeResult
	for range maxAttempts {
		var err error
		if res, err = m.kv.Range(ctx, meta.Range{From: from, To: to, Limit: pinsAtOnce}); err != nil {
			return err
		}
		var expired []*Pin
		for _, kv := range res.KVs {
			if p, err := decodePin(kv); err == nil && m.pinExpired(ctx, p) {
				expired = append(expired, p)
			}
		}
		if len(expired) == 0 {
			break
		}
		if err := m.removeExpiredPins(ctx, expired); err != nil {
			return err
		}
	}
	if len(res.KVs) == 0 {
		return nil
	}
	res.KVs = res.KVs[:min(len(res.KVs), pinsNamed)]
	remedy := "remove the pins first"
	for _, kv := range res.KVs {
		if p, err := decodePin(kv); err == nil && p.Job != 0 {
			remedy = fmt.Sprintf("wait for restore job %d to end, or cancel it", p.Job)
		}
	}
	return fmt.Errorf("%w by %s; %s", ErrSnapshotPinned, describePins(res.KVs, res.Count), remedy)
}
