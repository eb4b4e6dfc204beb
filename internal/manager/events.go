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
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// progressInterval is the time between two progress requests to the store.
const progressInterval = 200 * time.Millisecond

// bookmarkEvery is the number of revisions without an event after which a reader gets
// its current revision.
const bookmarkEvery = 1000

// Watch calls fn with the changes of collections, snapshots and pins after revision
// after (0: from now on), in order, without gaps. The first call has no events and
// passes the revision after which events are reported; later calls without events only
// advance the revision. A positive collection restricts events to that collection and
// its snapshots; removals, which hold only ids, and pins are always reported. It ends
// with ctx, with fn's first error, or with ErrEventsCompacted.
func (m *Manager) Watch(
	ctx context.Context, after, collection int64, fn func(events []Event, revision int64) error,
) error {
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
		return fmt.Errorf("%w: revision %d is no longer kept; list the current state and watch from now on",
			ErrEventsCompacted, reported)
	}
	if after < now { // checked in the store: all replicas answer alike, whatever their feeds hold
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
	behind := after < now // a call without events reports when the reader has caught up
	if behind {
		m.feed.wantProgress(now)
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
			return fmt.Errorf("%w: events up to revision %d may be missing; list the current state and watch from now on",
				ErrEventsCompacted, reported)
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

// requestProgress repeatedly requests the progress of a watch until ctx ends, because a
// request may be dropped. A failed watch shows in Next.
func requestProgress(ctx context.Context, w meta.Watcher) {
	ticker := time.NewTicker(progressInterval)
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

// decodeEvents returns the events that changes report to readers.
func (m *Manager) decodeEvents(changes []meta.Event) []Event {
	var list []Event
	removed := removedPins(changes)
	targets := rolledBackTargets(changes)
	for _, e := range changes {
		event, err := eventOf(e)
		switch {
		case err != nil:
			m.log.Error("event skipped: it cannot be decoded", zap.String("key", e.KV.Key), zap.Error(err))
			continue
		case event == nil:
			continue
		case event.Pin != nil && e.Deleted:
			event.Expired = removed[e.KV.ModRevision] != PinPlace{event.Pin.Snapshot, event.Pin.ID}
		case event.Collection != nil && e.Deleted && targets[e.KV.ModRevision] == event.Collection.ID:
			continue // its creation was never reported
		}
		list = append(list, *event)
	}
	return list
}

// eventOf returns the event of a change, nil if it is not reported. The event of a
// removal holds only ids.
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

// snapshotOf returns the snapshot of a change; of a removed one only the id.
func snapshotOf(e meta.Event) (*snapshot.Record, error) {
	if !e.Deleted {
		return snapshot.Decode(e.KV)
	}
	id, err := keys.LastID(e.KV.Key)
	return &snapshot.Record{ID: id}, err
}

// tombstoneOf returns the tombstone of a change; of a removed one only the ids.
func tombstoneOf(e meta.Event) (*gc.Tombstone, error) {
	if !e.Deleted {
		return gc.DecodeTombstone(e.KV)
	}
	collection, id, err := keys.LastTwo(e.KV.Key)
	return &gc.Tombstone{Collection: collection, ID: id}, err
}

// jobOf returns the restore job of a change; of a removed one only the id.
func jobOf(e meta.Event) (*copyjob.Job, error) {
	if !e.Deleted {
		return copyjob.DecodeJob(e.KV)
	}
	id, err := keys.LastID(e.KV.Key)
	return &copyjob.Job{ID: id}, err
}

// rolledBackTargets returns the target collections of rolled back restores, by the
// revision of their removal.
func rolledBackTargets(changes []meta.Event) map[int64]int64 {
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

// removedPins returns the pins that were removed and did not expire, by revision. The
// transaction that removes a pin also writes keys.Unpin, and changes hold whole
// revisions.
func removedPins(changes []meta.Event) map[int64]PinPlace {
	var removed map[int64]PinPlace
	for _, e := range changes {
		rec := &storagev1.Unpin{}
		if e.KV.Key != keys.Unpin || e.Deleted || record.Decode(e.KV, rec) != nil {
			continue
		}
		if removed == nil {
			removed = make(map[int64]PinPlace)
		}
		removed[e.KV.ModRevision] = PinPlace{rec.GetSnapshotId(), rec.GetPinId()}
	}
	return removed
}
