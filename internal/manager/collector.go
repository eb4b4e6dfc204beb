package manager

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// CollectorStatus is how the collector is doing.
type CollectorStatus struct {
	LastRound   *gc.Summary   // of the leader; nil: there was none yet
	Deleting    int           // granted units whose files snapshotd has still to delete
	Unconfirmed int           // granted units that their callers have not confirmed
	Tolerance   time.Duration // how long ago a thing must have been dropped
	MaxShare    float64       // of a collection at which a round stops
	StopUnits   int           // from how many units on it does
	Enabled     bool          // the leader makes rounds and sweeps
	Blocked     string        // why nothing is deleted at all; empty: it is
}

// CollectorStatus returns how the collector is doing. The last round is the
// leader's, whichever replica that is; the counts are as this replica sees them.
func (m *Manager) CollectorStatus(ctx context.Context) (CollectorStatus, error) {
	s := CollectorStatus{Tolerance: m.o.CollectTolerance, MaxShare: m.o.CollectMaxShare, StopUnits: gc.StopUnits, Enabled: !m.o.CollectorOff}
	kv, found, _, err := m.kv.Get(ctx, keys.Round)
	if err != nil {
		return s, fmt.Errorf("read the last round: %w", err)
	}
	if found {
		rec := &storagev1.Round{}
		if err := record.Decode(kv, rec); err != nil {
			return s, err
		}
		s.LastRound = roundOf(rec)
	}
	if s.Blocked, err = m.Behind(ctx); err != nil {
		return s, err
	}
	now := m.gc.Stats()
	s.Deleting, s.Unconfirmed = now.Granted, now.Unconfirmed
	return s, nil
}

// roundOf returns what a round came to, by its record.
func roundOf(rec *storagev1.Round) *gc.Summary {
	s := &gc.Summary{
		Replica: rec.GetReplica(), Start: record.Time(rec.GetStartTime()), End: record.Time(rec.GetEndTime()),
		Granted: rec.GetGranted(), Files: rec.GetFiles(), Bytes: rec.GetBytes(),
		Waiting: rec.GetWaiting(), Held: rec.GetHeld(), Parked: rec.GetParked(), Removed: rec.GetRemoved(),
		StopCount: rec.GetStopCount(), Error: rec.GetError(),
	}
	for _, stop := range rec.GetStops() {
		s.Stops = append(s.Stops, gc.Stop{Collection: stop.GetCollectionId(), Due: stop.GetDue(), Total: stop.GetTotal()})
	}
	return s
}

// Looks at what is left to delete.
const (
	firstLook = 20 * time.Millisecond // until the second
	maxLook   = time.Second           // between two
	listLook  = 100                   // tombstones
)

// AwaitDeleted waits until the files of all units are deleted that were granted
// to snapshotd up to a time, in one collection or, with the zero Ref, in all. It
// waits for what other calls were granted, too, and for ever when a file cannot
// be deleted: the end of ctx ends it, with the error of ctx.
func (m *Manager) AwaitDeleted(ctx context.Context, ref catalog.Ref, granted time.Time) error {
	var only int64
	if ref != (catalog.Ref{}) {
		var err error
		if only, err = m.catalog.Resolve(ctx, ref); err != nil {
			return err
		}
	}
	// In key order. What is granted behind the place that was reached was granted
	// too late to count.
	var collection, unit int64
	for look := firstLook; ; {
		list, more, err := m.gc.List(ctx, only, gc.BySnapshotd, collection, unit, listLook)
		if err != nil {
			return err
		}
		waits := slices.IndexFunc(list, func(t *gc.Tombstone) bool { return !t.GrantTime.After(granted) })
		if waits < 0 {
			if !more {
				return nil
			}
			waits = len(list)
		}
		if waits > 0 {
			collection, unit = list[waits-1].Collection, list[waits-1].ID
		}
		if waits == len(list) {
			continue
		}
		timer := time.NewTimer(look)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-timer.C:
		}
		look = min(2*look, maxLook)
	}
}
