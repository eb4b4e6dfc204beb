package manager

import (
	"context"
	"errors"
	"fmt"
	"strings"
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
// reader is reported how far it has come.
const bookmarkEvery = 1000

// Watch tells fn what happens to collections, snapshots and pins after revision
// after (0: from now on), in order, without gaps. The first call has no events
// and says from where on events will be reported; later calls without events only
// move the revision. A positive collection restricts it to that collection and
// its snapshots, but removals, of which only ids are known, and pins are always
// reported. It ends with ctx, with fn's first error, or with ErrEventsCompacted.
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
	compacted := func(reported int64) error {
		return fmt.Errorf("%w: revision %d is no longer kept; list what there is and watch from now on", ErrEventsCompacted, reported)
	}
	if after < now { // all replicas answer alike, whatever their feeds hold
		_, err := m.kv.Range(ctx, meta.Range{From: keys.Format, Revision: after + 1, KeysOnly: true})
		if errors.Is(err, meta.ErrCompacted) {
			return compacted(after)
		}
		if err != nil {
			return fmt.Errorf("watch events: %w", err)
		}
	}
	r := m.feed.join(after, collection)
	defer m.feed.leave(r)
	behind := after < now // the reader is reported when it has caught up
	if behind {
		m.feed.want(now)
	}
	reported := after
	for {
		wakeAt := reported + bookmarkEvery
		if behind {
			wakeAt = min(wakeAt, now)
		}
		events, revision, err := m.feed.next(ctx, r, wakeAt)
		if errors.Is(err, meta.ErrCompacted) {
			return compacted(reported)
		}
		if errors.Is(err, meta.ErrWatchBroken) {
			return fmt.Errorf("%w: events up to revision %d may be missing; list what there is and watch from now on", ErrEventsCompacted, reported)
		}
		if err != nil {
			return err
		}
		caughtUp := behind && revision >= now
		if len(events) == 0 && !caughtUp && revision-reported < bookmarkEvery {
			continue
		}
		if len(events) > 0 {
			if err := fn(events, revision); err != nil {
				return err
			}
		}
		if len(events) == 0 || caughtUp {
			if err := fn(nil, revision); err != nil {
				return err
			}
		}
		behind = behind && !caughtUp
		reported = revision
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

// events picks what readers are reported of.
func (m *Manager) events(changes []meta.Event) []Event {
	var list []Event
	unpinned := unpinnedIn(changes)
	rolledBack := rolledBackIn(changes)
	for _, e := range changes {
		event, err := eventOf(e)
		switch {
		case err != nil:
			m.log.Error("event cannot be decoded and is left out", zap.String("key", e.KV.Key), zap.Error(err))
			continue
		case event == nil:
			continue
		case event.Pin != nil && e.Deleted:
			event.Expired = unpinned[e.KV.ModRevision] != PinPlace{event.Pin.Snapshot, event.Pin.ID}
		case event.Collection != nil && e.Deleted && rolledBack[e.KV.ModRevision] == event.Collection.ID:
			continue // readers never got it
		}
		list = append(list, *event)
	}
	return list
}

// eventOf is the event of a change, nil when readers do not get it. Of what is
// gone only ids are known.
func eventOf(e meta.Event) (*Event, error) {
	event := &Event{Type: Updated, Revision: e.KV.ModRevision}
	switch {
	case e.Deleted:
		event.Type = Deleted
	case e.KV.CreateRevision == e.KV.ModRevision:
		event.Type = Created
	}
	var err error
	switch {
	case strings.HasPrefix(e.KV.Key, keys.SnapshotPrefix):
		event.Snapshot, err = snapshotOf(e)
	case strings.HasPrefix(e.KV.Key, keys.CollectionPrefix):
		var col catalog.Collection
		if col.ID, err = keys.LastID(e.KV.Key); err == nil && !e.Deleted {
			col, err = catalog.DecodeCollection(e.KV)
		}
		if !e.Deleted && col.State == catalog.Restoring {
			return nil, err // reported when it is published
		}
		if err == nil && !e.Deleted && catalog.WasPublished(e.KV) {
			event.Type = Created
		}
		event.Collection = &col
	case strings.HasPrefix(e.KV.Key, keys.AllPinsPrefix):
		var p *Pin
		p, err = decodePin(e.KV)
		if p != nil && e.Deleted {
			p, err = &Pin{Snapshot: p.Snapshot, ID: p.ID}, nil
		}
		event.Pin = p
	case strings.HasPrefix(e.KV.Key, keys.AllTombstonesPrefix):
		event.Tombstone, err = tombstoneOf(e)
	case strings.HasPrefix(e.KV.Key, keys.JobPrefix):
		event.Restore, err = jobOf(e)
	default:
		return nil, nil //nolint:nilnil // not reported
	}
	if err != nil {
		return nil, err
	}
	return event, nil
}

// snapshotOf is the snapshot of a change; of one that is gone only the id.
func snapshotOf(e meta.Event) (*Snapshot, error) {
	if !e.Deleted {
		return decode(e.KV)
	}
	id, err := keys.LastID(e.KV.Key)
	return &Snapshot{ID: id}, err
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
