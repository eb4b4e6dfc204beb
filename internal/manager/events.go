package manager

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// bookmarkEvery is how many revisions may pass without an event before the
// reader is told how far it has come.
const bookmarkEvery = 1000

// Watch tells fn what happens to collections and snapshots after revision after
// (0: from now on), in order, without gaps. The first call has no events and
// says from where on events will be told; later calls without events only move
// the revision. A positive collection restricts it to that collection and its
// snapshots, but removals, of which only ids are known, are always told. It
// ends with ctx, with fn's first error, or with ErrEventsCompacted.
func (m *Manager) Watch(ctx context.Context, after, collection int64, fn func(events []Event, revision int64) error) error {
	_, _, now, err := m.kv.Get(ctx, keys.Format)
	if err != nil {
		return fmt.Errorf("watch events: %w", err)
	}
	if after == 0 {
		after = now
	}
	if err := fn(nil, after); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	from, to := keys.All()
	w := m.kv.Watch(ctx, from, to, after)
	behind := after < now // the reader is told when it has caught up
	if behind {
		if err := w.Progress(ctx); err != nil {
			return fmt.Errorf("watch events: %w", err)
		}
	}
	told := after
	for {
		batch, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) {
			return fmt.Errorf("%w: revision %d is no longer kept; list what there is and watch from now on", ErrEventsCompacted, told)
		}
		if err != nil {
			return err
		}
		events, err := m.events(batch.Events, collection)
		if err != nil {
			return err
		}
		caughtUp := behind && batch.Revision >= now
		if len(events) == 0 && !caughtUp && batch.Revision-told < bookmarkEvery {
			continue
		}
		if len(events) > 0 {
			if err := fn(events, batch.Revision); err != nil {
				return err
			}
		}
		if len(events) == 0 || caughtUp {
			if err := fn(nil, batch.Revision); err != nil {
				return err
			}
		}
		behind = behind && !caughtUp
		told = batch.Revision
	}
}

// events picks what readers are told of.
func (m *Manager) events(changes []meta.Event, collection int64) ([]Event, error) {
	var list []Event
	for _, e := range changes {
		event := Event{Type: Updated, Revision: e.KV.ModRevision}
		switch {
		case e.Deleted:
			event.Type = Deleted
		case e.KV.CreateRevision == e.KV.ModRevision:
			event.Type = Created
		}
		switch {
		case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
			s := &Snapshot{}
			if e.Deleted {
				id, err := keys.LastID(e.KV.Key)
				if err != nil {
					return nil, err
				}
				s.ID = id
			} else {
				var err error
				if s, err = decode(e.KV); err != nil {
					m.log.Error("event is not told", zap.Error(err))
					continue
				}
				if collection > 0 && s.Collection != collection {
					continue
				}
			}
			event.Snapshot = s
		case strings.HasPrefix(e.KV.Key, keys.CollectionPrefix):
			id, err := keys.LastID(e.KV.Key)
			if err != nil {
				return nil, err
			}
			if collection > 0 && id != collection {
				continue
			}
			col := catalog.Collection{ID: id}
			if !e.Deleted {
				if col, err = catalog.DecodeCollection(e.KV); err != nil {
					m.log.Error("event is not told", zap.Error(err))
					continue
				}
				if col.State == catalog.Restoring {
					continue // told when it is published
				}
			}
			event.Collection = &col
		default:
			continue
		}
		list = append(list, event)
	}
	return list, nil
}
