package manager

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// askEvery is how long an answer is waited for before progress is asked again.
const askEvery = 200 * time.Millisecond

// bookmarkEvery is how many revisions may pass without an event before the
// reader is told how far it has come.
const bookmarkEvery = 1000

// Watch tells fn what happens to collections, snapshots and pins after revision
// after (0: from now on), in order, without gaps. The first call has no events
// and says from where on events will be told; later calls without events only
// move the revision. A positive collection restricts it to that collection and
// its snapshots, but removals, of which only ids are known, and pins are always
// told. It ends with ctx, with fn's first error, or with ErrEventsCompacted.
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
	asking, stopAsking := context.WithCancel(ctx)
	var asker sync.WaitGroup
	defer asker.Wait()
	defer stopAsking()
	if behind {
		asker.Go(func() { askProgress(asking, w) })
	}
	told := after
	for {
		batch, err := w.Next()
		if errors.Is(err, meta.ErrCompacted) {
			return fmt.Errorf("%w: revision %d is no longer kept; list what there is and watch from now on", ErrEventsCompacted, told)
		}
		if errors.Is(err, meta.ErrWatchBroken) {
			return fmt.Errorf("%w: events up to revision %d may be missing; list what there is and watch from now on", ErrEventsCompacted, told)
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
		if caughtUp {
			stopAsking()
		}
		behind = behind && !caughtUp
		told = batch.Revision
	}
}

// askProgress asks how far the watch has come until ctx ends: a request may be
// dropped, and one that fails shows in Next.
func askProgress(ctx context.Context, w meta.Watcher) {
	ticker := time.NewTicker(askEvery)
	defer ticker.Stop()
	for {
		_ = w.Progress(ctx)
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// events picks what readers are told of.
func (m *Manager) events(changes []meta.Event, collection int64) ([]Event, error) {
	var list []Event
	unpinned := unpinnedIn(changes)
	rolledBack := rolledBackIn(changes)
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
				if catalog.WasPublished(e.KV) {
					event.Type = Created
				}
			} else if rolledBack[e.KV.ModRevision] == id {
				continue // nobody was told of it
			}
			event.Collection = &col
		case strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix):
			p, err := decodePin(e.KV)
			if p == nil || err != nil && !e.Deleted {
				m.log.Error("event is not told", zap.Error(err))
				continue
			}
			if e.Deleted {
				p = &Pin{Snapshot: p.Snapshot, ID: p.ID}
				event.Expired = unpinned[e.KV.ModRevision] != PinPlace{p.Snapshot, p.ID}
			}
			event.Pin = p
		case strings.HasPrefix(e.KV.Key, keys.AllTombsPrefix):
			t, err := tombstoneOf(e)
			if err != nil {
				m.log.Error("event is not told", zap.Error(err))
				continue
			}
			if collection > 0 && t.Collection != collection {
				continue
			}
			event.Tombstone = t
		case strings.HasPrefix(e.KV.Key, keys.JobPrefix):
			job, err := jobOf(e)
			if err != nil {
				m.log.Error("event is not told", zap.Error(err))
				continue
			}
			if collection > 0 && !e.Deleted && job.Source != collection && job.Target != collection {
				continue
			}
			event.Restore = job
		default:
			continue
		}
		list = append(list, event)
	}
	return list, nil
}

// tombstoneOf is the tombstone of a change; of one that is gone only the ids.
func tombstoneOf(e meta.Event) (*gc.Tombstone, error) {
	if !e.Deleted {
		return gc.DecodeTombstone(e.KV)
	}
	collection, id, err := keys.LastTwo(e.KV.Key)
	return &gc.Tombstone{Collection: collection, ID: id}, err
}

// jobOf is the restore job of a change; of one that is gone only the id.
func jobOf(e meta.Event) (*copyjob.Job, error) {
	if !e.Deleted {
		return copyjob.DecodeJob(e.KV)
	}
	id, err := keys.LastID(e.KV.Key)
	return &copyjob.Job{ID: id}, err
}

// rolledBackIn returns the collections whose restores were rolled back, by the
// revisions at which they were removed.
func rolledBackIn(changes []meta.Event) map[int64]int64 {
	var targets map[int64]int64
	for _, e := range changes {
		if !strings.HasPrefix(e.KV.Key, keys.JobPrefix) || e.Deleted {
			continue
		}
		if job, err := copyjob.DecodeJob(e.KV); err == nil && (job.State == copyjob.Failed || job.State == copyjob.Canceled) {
			if targets == nil {
				targets = map[int64]int64{}
			}
			targets[e.KV.ModRevision] = job.Target
		}
	}
	return targets
}

// unpinnedIn returns the pins that were removed, not expired, each with its
// revision. The transaction that removes a pin says so in another key, and the
// changes hold whole revisions.
func unpinnedIn(changes []meta.Event) map[int64]PinPlace {
	var unpinned map[int64]PinPlace
	for _, e := range changes {
		rec := &storagev1.Unpin{}
		if e.KV.Key != keys.Unpin || e.Deleted || record.Decode(e.KV, rec) != nil {
			continue
		}
		if unpinned == nil {
			unpinned = make(map[int64]PinPlace)
		}
		unpinned[e.KV.ModRevision] = PinPlace{rec.GetSnapshotId(), rec.GetPinId()}
	}
	return unpinned
}
