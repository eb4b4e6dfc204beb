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

// Beat notes in the object store how far the metadata store has come. It finishes
// a beat that is under way first. It is an ErrBehind when the store is behind, and
// then nothing was noted. After any other error it may have happened; a repeat
// goes on.
func (e *Epoch) Beat(ctx context.Context) error {
	if err := e.beat(ctx, 0); err != nil {
		return fmt.Errorf("beat: %w", err)
	}
	return nil
}

// Raise notes a ceiling that is above to by [Headroom], and puts it into the
// allocator's record, unless the ceiling there is not below to. Errors are those of
// Beat.
func (e *Epoch) Raise(ctx context.Context, to int64) error {
	if err := e.beat(ctx, to); err != nil {
		return fmt.Errorf("raise the id ceiling to %d: %w", to, err)
	}
	return nil
}

// beat makes a beat of its own, or with a positive raise as many as it takes until
// the ceiling is not below raise.
func (e *Epoch) beat(ctx context.Context, raise int64) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-e.turn:
	}
	defer func() { e.turn <- struct{}{} }()
	// The beat that was intended here, and the one whose object is known to be made.
	var own int64
	var made string
	enough := func(s *state) bool {
		if raise > 0 {
			return s.ids.GetCeiling() >= raise
		}
		return own > 0 && s.epoch.GetBeat() >= own
	}
	for lost := 0; lost < maxAttempts; {
		if err := meta.Pause(ctx, lost); err != nil {
			return err
		}
		s, err := e.read(ctx)
		switch {
		case err != nil:
			return err
		case s.behind != nil:
			return s.behind
		case enough(s):
			return nil
		}
		var won bool
		if s.intent == nil {
			won, err = e.intend(ctx, s, raise)
			if won {
				own = s.epoch.GetBeat() + 1
			}
		} else {
			if made != s.intent.Nonce {
				old, ok, err := e.create(ctx, s)
				if err != nil {
					return err
				}
				if !ok {
					lost++
					continue
				}
				made = s.intent.Nonce
				defer e.forget(ctx, old)
			}
			if won, err = e.finish(ctx, s); won && enough(s) {
				return nil
			}
		}
		if err != nil {
			return err
		}
		if !won {
			lost++
		}
	}
	return fmt.Errorf("%w: gave up after %d attempts", ErrConflict, maxAttempts)
}

// intend puts the intent of the next beat, and says whether the premises held.
func (e *Epoch) intend(ctx context.Context, s *state, raise int64) (bool, error) {
	op, err := record.NewOp(e.o.Rand)
	if err != nil {
		return false, err
	}
	n := note{
		FormatVersion: formatVersion, Cluster: e.o.Cluster, Beat: s.epoch.GetBeat() + 1, Nonce: op,
		Revision: s.revision, Ceiling: ceiling(s.ids.GetCeiling(), s.ids.GetNext(), raise), Time: e.o.Now().UTC(),
	}
	if s.epoch.Intent, err = encode(&n); err != nil {
		return false, err
	}
	s.epoch.Op = op
	res, err := e.o.KV.Txn(ctx, meta.Txn{
		Name: "epoch.intend",
		If:   []meta.Cond{s.epochIs, meta.Absent(keys.Behind)},
		Then: []meta.Op{meta.Put(keys.Epoch, record.Encode(s.epoch))},
	})
	return err == nil && res.Succeeded, err
}

// ceiling decides the ceiling of a beat: never below the one before, well above
// what was asked for, and so far ahead of the next id that few allocations have to
// wait for one.
func ceiling(have, next, raise int64) int64 {
	if raise > have {
		have = plus(raise, Headroom)
	}
	if have < plus(next, Headroom/2) {
		have = plus(next, Headroom)
	}
	return have
}

// plus is a + b, or the largest number when that is beyond.
func plus(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

// create makes the object that is intended, and looks whether it is the newest. It
// is not ok when others have come further meanwhile. The keys are those of notes
// that are kept no longer.
func (e *Epoch) create(ctx context.Context, s *state) (old []string, ok bool, err error) {
	name, body := key(s.intent.Beat), s.epoch.GetIntent()
	_, err = e.o.Store.Create(ctx, name, body)
	if errors.Is(err, object.ErrExists) {
		var has []byte
		has, err = object.ReadAll(ctx, e.o.Store, name, maxNoteBytes)
		switch {
		case errors.Is(err, object.ErrNotFound): // it was finished long ago
			return nil, false, nil
		case err == nil:
			ok = bytes.Equal(has, body)
		}
	} else {
		ok = err == nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("write epoch object: %w", err)
	}
	old, err = e.look(ctx)
	return old, ok && err == nil, err
}

// finish ends the beat whose object is made, in s as well, and says whether the
// premises held.
func (e *Epoch) finish(ctx context.Context, s *state) (bool, error) {
	s.epoch.Beat, s.epoch.Intent, s.epoch.Op = s.intent.Beat, nil, s.intent.Nonce
	txn := meta.Txn{
		Name: "epoch.done",
		If:   []meta.Cond{s.epochIs, meta.Absent(keys.Behind)},
		Then: []meta.Op{meta.Put(keys.Epoch, record.Encode(s.epoch))},
	}
	if s.intent.Ceiling > s.ids.GetCeiling() {
		s.ids.Ceiling = s.intent.Ceiling
		txn.If = append(txn.If, s.idsAre)
		txn.Then = append(txn.Then, meta.Put(keys.IDs, record.Encode(s.ids)))
	}
	res, err := e.o.KV.Txn(ctx, txn)
	return err == nil && res.Succeeded, err
}

// forget deletes notes that are kept no longer. What is left the next beat finds.
func (e *Epoch) forget(ctx context.Context, old []string) {
	if len(old) == 0 || ctx.Err() != nil {
		return
	}
	err := e.o.Store.Delete(ctx, old...)
	if ctx.Err() == nil {
		e.forgets.Note(err)
	}
}
