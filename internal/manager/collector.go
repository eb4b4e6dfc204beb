package manager

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// CollectorStatus is the state of the collector.
type CollectorStatus struct {
	LastRound   *collect.Summary // of the leader; nil: none yet
	Deleting    int              // granted units whose files snapshotd has yet to delete
	Unconfirmed int              // granted units that their callers have not confirmed
	Tolerance   time.Duration    // minimum age of a drop before the unit is collected
	MaxShare    float64          // of a collection; a round stops above it
	StopUnits   int              // minimum number of units at which MaxShare applies
	Enabled     bool             // whether the leader makes rounds and sweeps
	Blocked     string           // why nothing is deleted; empty: not blocked
	Clock       string           // why the clock is not trusted; empty: trusted
	Halts       []collect.Halt   // stopped parts of expiry, removal and collection
}

// CollectorStatus returns the state of the collector. The last round is that of the
// leading replica; the counts are those of this replica's cache.
func (m *Manager) CollectorStatus(ctx context.Context) (CollectorStatus, error) {
	s := CollectorStatus{
		Tolerance: m.o.CollectTolerance, MaxShare: m.o.CollectMaxShare, StopUnits: collect.StopUnits,
		Enabled: !m.o.CollectorOff,
	}
	kv, found, _, err := m.kv.Get(ctx, keys.Cycle)
	if err != nil {
		return s, fmt.Errorf("read the last round: %w", err)
	}
	rec := &storagev1.Round{}
	if found {
		if err := record.Decode(kv, rec); err != nil {
			return s, err
		}
		s.LastRound = collect.DecodeSummary(rec)
	}
	if s.Blocked, err = m.RolledBack(ctx); err != nil {
		return s, err
	}
	_, untrusted := m.clock.Judge(ctx)
	if errors.Is(untrusted, clock.ErrUntrusted) {
		s.Clock = untrusted.Error()
	}
	now := m.gc.Stats()
	if s.Halts, err = m.halts(ctx, rec, s.Blocked, untrusted, now.Unreadable); err != nil {
		return s, err
	}
	s.Deleting, s.Unconfirmed = now.Granted, now.Unconfirmed
	return s, nil
}

// halts returns the stopped work of all replicas, of the leader (from its record) and of
// this replica, which cannot read the references of unreadable snapshots.
func (m *Manager) halts(
	ctx context.Context, rec *storagev1.Round, blocked string, untrusted error, unreadable int,
) ([]collect.Halt, error) {
	const all = "expiry, removal and collection"
	var list []collect.Halt
	leader, err := m.Leader(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the leader: %w", err)
	}
	if leader == "" {
		list = append(list, collect.Halt{Name: "leader", What: all, Error: "no replica leads"})
	}
	if blocked != "" {
		list = append(list, collect.Halt{Name: "metadata behind", What: all, Error: blocked})
	}
	if untrusted != nil && ctx.Err() == nil {
		list = append(list, collect.Halt{
			Name: "clock", What: "expiry and collection", Error: untrusted.Error(), Since: m.clock.StoppedSince(),
			Replica: m.o.Replica,
		})
	}
	if by, replica := collect.DecodeHalts(rec); replica == leader && leader != m.o.Replica {
		list = append(list, by...)
	}
	if unreadable > 0 {
		list = append(list, collect.Halt{
			Name: "references", What: "collection in the collections of unreadable snapshots", Replica: m.o.Replica,
			Error: fmt.Sprintf("the references of %d snapshots cannot be read; the log names them", unreadable),
		})
	}
	return append(list, m.collector.Halts()...), nil
}

// AwaitDeleted waits until the files of all units that were granted to snapshotd up to
// granted are deleted, in one collection or, with the zero Ref, in all. That includes
// units granted by other calls. If a file cannot be deleted it waits until ctx ends, and
// returns the error of ctx.
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
