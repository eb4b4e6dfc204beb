package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/clock"
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
	Clock       string        // why the clock is not trusted; empty: it is
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
	if _, err := m.clock.Judge(ctx); errors.Is(err, clock.ErrUntrusted) {
		s.Clock = err.Error()
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
	return m.gc.AwaitDeleted(ctx, only, granted)
}
