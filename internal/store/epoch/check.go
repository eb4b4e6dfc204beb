package epoch

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Check compares the metadata store with the newest mark in the object store. On a
// rollback it puts /behind, logs, and returns an ErrRolledBack; it returns an
// ErrRolledBack as well if /behind exists. Any other error means that the check did not
// complete: a store is unavailable or a mark is damaged.
func (e *Epoch) Check(ctx context.Context) error {
	_, err := e.check(ctx)
	return err
}

// check implements Check. It returns the keys of superseded marks.
func (e *Epoch) check(ctx context.Context) ([]string, error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
		m, old, err := e.newest(ctx)
		if err != nil {
			return nil, err
		}
		s, err := e.read(ctx) // must follow the list
		if err != nil {
			return nil, err
		}
		if s.rolledBack != nil {
			return nil, s.rolledBack
		}
		if m == nil && s.epoch.GetBeat() > 0 {
			e.o.Log.Warn("the epoch objects are lost; "+
				"a restored metadata store goes undetected until the next heartbeat",
				zap.Int64("beat", s.epoch.GetBeat()), zap.String("prefix", Prefix))
		}
		reason := rollbackReason(s, m, e.o.Cluster)
		if reason == "" {
			return old, nil
		}
		rec := e.behindRecord(s, m)
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.mark",
			If:   []meta.Cond{s.epochIs, s.behindIs},
			Then: []meta.Op{meta.Put(keys.RolledBack, record.Encode(rec))},
		})
		if err != nil {
			return nil, fmt.Errorf("record the metadata rollback (%s): %w", reason, err)
		}
		if res.Succeeded {
			err := rollbackError(rec)
			e.o.Log.Error("metadata rollback detected: allocation and deletion are stopped; "+
				"stop all other users of the earlier store, then run `snapshotctl recover`",
				zap.String("seen", reason), zap.Int64("ceiling", m.IDLimit), zap.Error(err))
			return nil, err
		}
	}
	return nil, fmt.Errorf("check the epoch: %w: gave up after %d attempts", meta.ErrConflict, maxAttempts)
}

// Alarm puts /behind because snapshotd wrote the object earlier under an id that was
// allocated just now. The caller has proof of both, since /behind stops the whole
// cluster. Alarm returns an ErrRolledBack, or the error of the metadata store. Recover
// ends the state like any other rollback.
func (e *Epoch) Alarm(ctx context.Context, object string) error {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		s, err := e.read(ctx)
		if err != nil {
			return err
		}
		if s.rolledBack != nil {
			return s.rolledBack
		}
		rec := e.behindRecord(s, &mark{Number: s.epoch.GetBeat(), Revision: s.revision, IDLimit: s.ids.GetCeiling()})
		rec.Object = object
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.mark",
			If:   []meta.Cond{s.epochIs, s.behindIs},
			Then: []meta.Op{meta.Put(keys.RolledBack, record.Encode(rec))},
		})
		if err != nil {
			return fmt.Errorf("record that %s belongs to an earlier metadata store: %w", object, err)
		}
		if res.Succeeded {
			err := rollbackError(rec)
			e.o.Log.Error("an id was allocated twice: allocation and deletion are stopped; find out whether "+
				"the metadata store was restored from a backup, then run `snapshotctl recover`", zap.Error(err))
			return err
		}
	}
	return fmt.Errorf("record that %s belongs to an earlier metadata store: %w: gave up after %d attempts",
		object, meta.ErrConflict, maxAttempts)
}

// rollbackReason returns why the newest mark proves a rollback, or "" if it does not.
// The state must have been read after the mark.
func rollbackReason(s *state, m *mark, cluster string) string {
	if m == nil {
		return ""
	}
	done := s.epoch.GetBeat()
	intended := s.intent != nil && m.Number == done+1 && m.Nonce == s.intent.Nonce
	switch {
	case m.Number > done && !intended:
		return fmt.Sprintf("%s exists, but the metadata store has heartbeats up to %d", markKey(m.Number), done)
	case m.Number <= s.epoch.GetRecovered():
		return ""
	case m.Cluster != cluster:
		return fmt.Sprintf("%s belongs to cluster %s, this is cluster %s", markKey(m.Number), m.Cluster, cluster)
	case m.Revision > s.revision:
		return fmt.Sprintf("%s has revision %d, the metadata store has revision %d",
			markKey(m.Number), m.Revision, s.revision)
	}
	return ""
}

// behindRecord returns the record of /behind for a rollback that m proves.
func (e *Epoch) behindRecord(s *state, m *mark) *storagev1.Behind {
	return &storagev1.Behind{
		Format: record.Format, Beat: m.Number, OwnBeat: s.epoch.GetBeat(), Revision: m.Revision, OwnRevision: s.revision,
		Ceiling: m.IDLimit, Time: record.Nanos(e.o.Now()),
	}
}

// Recover ends the state after a rollback: it skips ids that may have been allocated
// before, and raises lostBelow above them. Without a rollback it does nothing, so a
// repeat is a success, unless force is set: a store that lost less than the interval
// between two heartbeats was rolled back undetected. It returns whether the store was
// rolled back, the lowest id of future allocations, and the lowest skipped id, which
// equals next if none was skipped. After an error the recovery may have happened; a
// repeat is safe.
func (e *Epoch) Recover(ctx context.Context, force bool) (wasRolledBack bool, next, skippedFrom int64, err error) {
	wasRolledBack, next, skippedFrom, err = e.recover(ctx, force)
	if err == nil && (wasRolledBack || force) {
		// Until this heartbeat the newest mark is that of the abandoned store.
		err = e.Heartbeat(ctx)
	}
	if err != nil {
		return false, 0, 0, fmt.Errorf("recover: %w", err)
	}
	return wasRolledBack, next, skippedFrom, nil
}

func (e *Epoch) recover(ctx context.Context, force bool) (wasRolledBack bool, next, skippedFrom int64, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, 0, 0, err
		}
		m, _, err := e.newest(ctx)
		if err != nil {
			return false, 0, 0, err
		}
		s, err := e.read(ctx)
		if err != nil {
			return false, 0, 0, err
		}
		wasRolledBack := s.rolledBack != nil || rollbackReason(s, m, e.o.Cluster) != ""
		skippedFrom := s.ids.GetNext()
		if !wasRolledBack && !force {
			return false, skippedFrom, skippedFrom, nil
		}
		op, err := record.NewOp(e.o.Rand)
		if err != nil {
			return false, 0, 0, err
		}
		applyRecovery(s, m)
		s.epoch.Op = op
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.recover",
			If:   []meta.Cond{s.epochIs, s.idsAre, s.behindIs},
			Then: []meta.Op{
				meta.Put(
					keys.Epoch,
					record.Encode(s.epoch),
				),
				meta.Put(keys.IDs, record.Encode(s.ids)),
				meta.Delete(keys.RolledBack),
			},
		})
		if err != nil {
			return false, 0, 0, err
		}
		if res.Succeeded {
			e.o.Log.Info("recovered", zap.Bool("was_behind", wasRolledBack), zap.Int64("beat", s.epoch.GetBeat()),
				zap.Int64("next_id", s.ids.GetNext()), zap.Int64("skipped_from", skippedFrom),
				zap.Int64("floor", s.epoch.GetFloor()))
			return wasRolledBack, s.ids.GetNext(), skippedFrom, nil
		}
	}
	return false, 0, 0, fmt.Errorf("%w: gave up after %d attempts", meta.ErrConflict, maxAttempts)
}

// applyRecovery changes the records in s for a recovery. It skips the number of an
// intended heartbeat: a late object with that number must not become the mark of another
// heartbeat. lostBelow exceeds all skipped ids: an object with such an id was written by
// the lost store or by another program. New records belong to the next history.
func applyRecovery(s *state, m *mark) {
	number, idLimit := s.epoch.GetBeat(), s.ids.GetCeiling()
	if s.intent != nil {
		number++
	}
	if m != nil {
		number, idLimit = max(number, m.Number), max(idLimit, m.IDLimit)
	}
	s.ids.Next = max(s.ids.GetNext(), idLimit, 1)
	s.ids.Ceiling = max(idLimit, s.ids.GetNext())
	s.epoch.Beat, s.epoch.Recovered, s.epoch.Intent = number, number, nil
	s.epoch.Floor = max(s.epoch.GetFloor(), s.ids.GetNext())
	s.epoch.History++
}
