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

// Check looks whether the metadata store is behind its notes in the object store.
// When it is, Check puts /behind, logs, and returns an ErrBehind; it does the last
// as well when /behind was there. Any other error means that it could not be found
// out, because a store did not answer or a note is damaged.
func (e *Epoch) Check(ctx context.Context) error {
	_, err := e.look(ctx)
	return err
}

// look is Check; it returns the keys of notes that are kept no longer.
func (e *Epoch) look(ctx context.Context) ([]string, error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
		n, old, err := e.newest(ctx)
		if err != nil {
			return nil, err
		}
		s, err := e.read(ctx) // not before the list
		if err != nil {
			return nil, err
		}
		if s.behind != nil {
			return nil, s.behind
		}
		if n == nil && s.epoch.GetBeat() > 0 {
			e.o.Log.Warn("the object store has lost its epoch objects; a restored metadata store goes unnoticed until the next beat",
				zap.Int64("beat", s.epoch.GetBeat()), zap.String("prefix", Prefix))
		}
		why := judge(s, n, e.o.Cluster)
		if why == "" {
			return old, nil
		}
		rec := e.behind(s, n)
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.mark",
			If:   []meta.Cond{s.epochIs, s.behindIs},
			Then: []meta.Op{meta.Put(keys.Behind, record.Encode(rec))},
		})
		if err != nil {
			return nil, fmt.Errorf("note that the metadata store is behind (%s): %w", why, err)
		}
		if res.Succeeded {
			err := behindError(rec)
			e.o.Log.Error("the metadata store has gone back in time: nothing is allocated or deleted any more; "+
				"stop what still uses the store from before, then run `snapshotctl recover`",
				zap.String("seen", why), zap.Int64("ceiling", n.Ceiling), zap.Error(err))
			return nil, err
		}
	}
	return nil, fmt.Errorf("check the epoch: %w: gave up after %d attempts", ErrConflict, maxAttempts)
}

// Alarm puts /behind since an object was found that snapshotd wrote earlier under an
// id that was just handed out. The caller has proof of both: /behind stops the whole
// cluster. It returns an ErrBehind, or the error of the metadata store. Recover
// ends the state, as any other.
func (e *Epoch) Alarm(ctx context.Context, object string) error {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		s, err := e.read(ctx)
		if err != nil {
			return err
		}
		if s.behind != nil {
			return s.behind
		}
		rec := e.behind(s, &note{Beat: s.epoch.GetBeat(), Revision: s.revision, Ceiling: s.ids.GetCeiling()})
		rec.Object = object
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.mark",
			If:   []meta.Cond{s.epochIs, s.behindIs},
			Then: []meta.Op{meta.Put(keys.Behind, record.Encode(rec))},
		})
		if err != nil {
			return fmt.Errorf("note that %s is of an earlier store: %w", object, err)
		}
		if res.Succeeded {
			err := behindError(rec)
			e.o.Log.Error("an id was handed out a second time: nothing is allocated or deleted any more; "+
				"find out whether the metadata store was restored from a backup, then run `snapshotctl recover`", zap.Error(err))
			return err
		}
	}
	return fmt.Errorf("note that %s is of an earlier store: %w: gave up after %d attempts", object, ErrConflict, maxAttempts)
}

// judge says why the metadata store is behind its newest note; empty: it is not.
// The store was read after the note was.
func judge(s *state, n *note, cluster string) string {
	if n == nil {
		return ""
	}
	done := s.epoch.GetBeat()
	intended := s.intent != nil && n.Beat == done+1 && n.Nonce == s.intent.Nonce
	switch {
	case n.Beat > done && !intended:
		return fmt.Sprintf("%s is there, and the metadata store knows of beats up to %d", key(n.Beat), done)
	case n.Beat <= s.epoch.GetRecovered():
		return ""
	case n.Cluster != cluster:
		return fmt.Sprintf("%s is of cluster %s, and this is %s", key(n.Beat), n.Cluster, cluster)
	case n.Revision > s.revision:
		return fmt.Sprintf("%s notes revision %d, and the metadata store is at %d", key(n.Beat), n.Revision, s.revision)
	}
	return ""
}

func (e *Epoch) behind(s *state, n *note) *storagev1.Behind {
	return &storagev1.Behind{
		Format: record.Format, Beat: n.Beat, OwnBeat: s.epoch.GetBeat(), Revision: n.Revision, OwnRevision: s.revision,
		Ceiling: n.Ceiling, Time: record.Nanos(e.o.Now()),
	}
}

// Recover ends the state in which the metadata store is behind: ids that may have
// been handed out before it went back are passed over, and the floor rises above
// them. Where the store is not behind it does nothing, so a repeat is success,
// unless it is forced: a store that lost less than what lies between two beats is
// behind without anybody's noticing. It returns whether the store was
// behind, the lowest id that is handed out from now on, and the lowest that was
// passed over, equal to the other when none was. With an error it may have
// happened; a repeat finds out.
func (e *Epoch) Recover(ctx context.Context, force bool) (wasBehind bool, next, skippedFrom int64, err error) {
	wasBehind, next, skippedFrom, err = e.recover(ctx, force)
	if err == nil && (wasBehind || force) {
		// The newest note is that of the store which was given up, until this one.
		err = e.Beat(ctx)
	}
	if err != nil {
		return false, 0, 0, fmt.Errorf("recover: %w", err)
	}
	return wasBehind, next, skippedFrom, nil
}

func (e *Epoch) recover(ctx context.Context, force bool) (wasBehind bool, next, skippedFrom int64, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, 0, 0, err
		}
		n, _, err := e.newest(ctx)
		if err != nil {
			return false, 0, 0, err
		}
		s, err := e.read(ctx)
		if err != nil {
			return false, 0, 0, err
		}
		wasBehind := s.behind != nil || judge(s, n, e.o.Cluster) != ""
		skippedFrom := s.ids.GetNext()
		if !wasBehind && !force {
			return false, skippedFrom, skippedFrom, nil
		}
		op, err := record.NewOp(e.o.Rand)
		if err != nil {
			return false, 0, 0, err
		}
		settle(s, n)
		s.epoch.Op = op
		res, err := e.o.KV.Txn(ctx, meta.Txn{
			Name: "epoch.recover",
			If:   []meta.Cond{s.epochIs, s.idsAre, s.behindIs},
			Then: []meta.Op{
				meta.Put(keys.Epoch, record.Encode(s.epoch)), meta.Put(keys.IDs, record.Encode(s.ids)), meta.Delete(keys.Behind),
			},
		})
		if err != nil {
			return false, 0, 0, err
		}
		if res.Succeeded {
			e.o.Log.Info("recovered", zap.Bool("was_behind", wasBehind), zap.Int64("beat", s.epoch.GetBeat()),
				zap.Int64("next_id", s.ids.GetNext()), zap.Int64("skipped_from", skippedFrom), zap.Int64("floor", s.epoch.GetFloor()))
			return wasBehind, s.ids.GetNext(), skippedFrom, nil
		}
	}
	return false, 0, 0, fmt.Errorf("%w: gave up after %d attempts", ErrConflict, maxAttempts)
}

// settle decides what recovering makes of the records in s. The number of a beat
// that was under way is passed over: its object may still come, and must not be
// that of another beat. Where ids are passed over the floor is above them: what
// carries one was made by a store that is lost, or by another program. What is made
// from now on is of another history.
func settle(s *state, n *note) {
	beat, ceiling := s.epoch.GetBeat(), s.ids.GetCeiling()
	if s.intent != nil {
		beat++
	}
	if n != nil {
		beat, ceiling = max(beat, n.Beat), max(ceiling, n.Ceiling)
	}
	s.ids.Next = max(s.ids.GetNext(), ceiling, 1)
	s.ids.Ceiling = max(ceiling, s.ids.GetNext())
	s.epoch.Beat, s.epoch.Recovered, s.epoch.Intent = beat, beat, nil
	s.epoch.Floor = max(s.epoch.GetFloor(), s.ids.GetNext())
	s.epoch.History++
}
