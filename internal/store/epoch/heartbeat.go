package epoch

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// Heartbeat writes the next high-water mark to the object store, after finishing a
// heartbeat under way. It returns an ErrRolledBack, and writes no mark, when the
// metadata store was rolled back. After any other error the mark may exist; a repeat
// continues.
func (e *Epoch) Heartbeat(ctx context.Context) error {
	if err := e.heartbeat(ctx, 0); err != nil {
		return fmt.Errorf("epoch heartbeat: %w", err)
	}
	return nil
}

// RaiseIDLimit writes marks until the id limit is at least limit, and then exceeds it
// by [Headroom]. It does nothing if the allocator's record has such a limit already.
// Errors are those of Heartbeat.
func (e *Epoch) RaiseIDLimit(ctx context.Context, limit int64) error {
	if err := e.heartbeat(ctx, limit); err != nil {
		return fmt.Errorf("raise the id limit to %d: %w", limit, err)
	}
	return nil
}

// heartbeat writes one mark, or with a positive minLimit as many as it takes until the
// id limit is at least minLimit.
func (e *Epoch) heartbeat(ctx context.Context, minLimit int64) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-e.turn:
	}
	defer func() { e.turn <- struct{}{} }()
	// The number that this call intended, and the nonce of the mark whose object exists.
	var own int64
	var created string
	done := func(s *state) bool {
		if minLimit > 0 {
			return s.ids.GetCeiling() >= minLimit
		}
		return own > 0 && s.epoch.GetBeat() >= own
	}
	for conflicts := 0; conflicts < maxAttempts; {
		if err := meta.Pause(ctx, conflicts); err != nil {
			return err
		}
		s, err := e.read(ctx)
		switch {
		case err != nil:
			return err
		case s.rolledBack != nil:
			return s.rolledBack
		case done(s):
			return nil
		}
		var applied bool
		if s.intent == nil {
			applied, err = e.intend(ctx, s, minLimit)
			if applied {
				own = s.epoch.GetBeat() + 1
			}
		} else {
			if created != s.intent.Nonce {
				old, ok, err := e.create(ctx, s)
				if err != nil {
					return err
				}
				if !ok {
					conflicts++
					continue
				}
				created = s.intent.Nonce
				defer e.deleteOld(ctx, old)
			}
			if applied, err = e.finish(ctx, s); applied && done(s) {
				return nil
			}
		}
		if err != nil {
			return err
		}
		if !applied {
			conflicts++
		}
	}
	return fmt.Errorf("%w: gave up after %d attempts", meta.ErrConflict, maxAttempts)
}

// intend puts the intent of the next heartbeat. It returns whether the preconditions
// held.
func (e *Epoch) intend(ctx context.Context, s *state, minLimit int64) (bool, error) {
	op, err := record.NewOp(e.o.Rand)
	if err != nil {
		return false, err
	}
	m := mark{
		FormatVersion: formatVersion, Cluster: e.o.Cluster, Number: s.epoch.GetBeat() + 1, Nonce: op,
		Revision: s.revision, IDLimit: nextIDLimit(s.ids.GetCeiling(), s.ids.GetNext(), minLimit), Time: e.o.Now().UTC(),
	}
	if s.epoch.Intent, err = encode(&m); err != nil {
		return false, err
	}
	s.epoch.Op = op
	res, err := e.o.KV.Txn(ctx, meta.Txn{
		Name: "epoch.intend",
		If:   []meta.Cond{s.epochIs, meta.Absent(keys.RolledBack)},
		Then: []meta.Op{meta.Put(keys.Epoch, record.Encode(s.epoch))},
	})
	return err == nil && res.Succeeded, err
}

// nextIDLimit returns the id limit of a mark. It is not below current, exceeds minLimit
// by Headroom if current is below minLimit, and is far enough above next that few
// allocations wait for a heartbeat.
func nextIDLimit(current, next, minLimit int64) int64 {
	if minLimit > current {
		current = saturatingAdd(minLimit, Headroom)
	}
	if current < saturatingAdd(next, Headroom/2) {
		current = saturatingAdd(next, Headroom)
	}
	return current
}

// saturatingAdd returns a + b, or the largest int64 on overflow.
func saturatingAdd(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// create creates the intended object and checks for a rollback. It returns ok false if
// another replica has finished this heartbeat meanwhile. old are the keys of superseded
// marks.
func (e *Epoch) create(ctx context.Context, s *state) (old []string, ok bool, err error) {
	name, body := markKey(s.intent.Number), s.epoch.GetIntent()
	_, err = e.o.Store.Create(ctx, name, body)
	if errors.Is(err, object.ErrExists) {
		var existing []byte
		existing, err = object.ReadAll(ctx, e.o.Store, name, maxMarkBytes)
		switch {
		case errors.Is(err, object.ErrNotFound): // superseded and deleted meanwhile
			return nil, false, nil
		case err == nil:
			ok = bytes.Equal(existing, body)
		}
	} else {
		ok = err == nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("write epoch object: %w", err)
	}
	old, err = e.check(ctx)
	return old, ok && err == nil, err
}

// finish completes the heartbeat whose object exists, in s as well. It returns whether
// the preconditions held.
func (e *Epoch) finish(ctx context.Context, s *state) (bool, error) {
	s.epoch.Beat, s.epoch.Intent, s.epoch.Op = s.intent.Number, nil, s.intent.Nonce
	txn := meta.Txn{
		Name: "epoch.done",
		If:   []meta.Cond{s.epochIs, meta.Absent(keys.RolledBack)},
		Then: []meta.Op{meta.Put(keys.Epoch, record.Encode(s.epoch))},
	}
	if s.intent.IDLimit > s.ids.GetCeiling() {
		s.ids.Ceiling = s.intent.IDLimit
		txn.If = append(txn.If, s.idsAre)
		txn.Then = append(txn.Then, meta.Put(keys.IDs, record.Encode(s.ids)))
	}
	res, err := e.o.KV.Txn(ctx, txn)
	return err == nil && res.Succeeded, err
}

// deleteOld deletes superseded marks. The next heartbeat retries what fails.
func (e *Epoch) deleteOld(ctx context.Context, old []string) {
	if len(old) == 0 || ctx.Err() != nil {
		return
	}
	err := e.o.Store.Delete(ctx, old...)
	if ctx.Err() == nil {
		e.deletes.Note(err)
	}
}
