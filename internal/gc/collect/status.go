package collect

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Status is the state of the collector.
type Status struct {
	LastRound   *Summary      // of the leader; nil: none yet
	Deleting    int           // granted units whose files snapshotd has yet to delete
	Unconfirmed int           // granted units that their callers have not confirmed
	Tolerance   time.Duration // minimum age of a drop before the unit is collected
	MaxShare    float64       // of a collection; a round stops above it
	StopUnits   int           // minimum number of units at which MaxShare applies
	Enabled     bool          // whether the leader makes rounds and sweeps
	Blocked     string        // why nothing is deleted; empty: not blocked
	Clock       string        // why the clock is not trusted; empty: trusted
	Halts       []Halt        // stopped parts of expiry, removal and collection
}

// Status returns the state of the collector. The last round is that of the
// leading replica; the counts are those of this replica's cache.
func (c *Collector) Status(ctx context.Context) (Status, error) {
	s := Status{
		Tolerance: c.o.Tolerance, MaxShare: c.o.MaxShare, StopUnits: StopUnits,
		Enabled: !c.o.Off,
	}
	kv, found, _, err := c.kv.Get(ctx, keys.Cycle)
	if err != nil {
		return s, fmt.Errorf("read the last round: %w", err)
	}
	rec := &storagev1.Round{}
	if found {
		if err := record.Decode(kv, rec); err != nil {
			return s, err
		}
		s.LastRound = DecodeSummary(rec)
	}
	if s.Blocked, err = c.RolledBack(ctx); err != nil {
		return s, err
	}
	_, untrusted := c.clock.Judge(ctx)
	if errors.Is(untrusted, clock.ErrUntrusted) {
		s.Clock = untrusted.Error()
	}
	now := c.gc.Stats()
	if s.Halts, err = c.haltsOf(ctx, rec, s.Blocked, untrusted, now.Unreadable); err != nil {
		return s, err
	}
	s.Deleting, s.Unconfirmed = now.Granted, now.Unconfirmed
	return s, nil
}

// haltsOf returns the stopped work of all replicas, of the leader (from its record) and of
// this replica, which cannot read the references of unreadable snapshots.
func (c *Collector) haltsOf(
	ctx context.Context, rec *storagev1.Round, blocked string, untrusted error, unreadable int,
) ([]Halt, error) {
	const all = "expiry, removal and collection"
	var list []Halt
	leader, err := election.Leader(ctx, c.kv, keys.Leader)
	if err != nil {
		return nil, fmt.Errorf("read the leader: %w", err)
	}
	if leader == "" {
		list = append(list, Halt{Name: "leader", What: all, Error: "no replica leads"})
	}
	if blocked != "" {
		list = append(list, Halt{Name: "metadata behind", What: all, Error: blocked})
	}
	if untrusted != nil && ctx.Err() == nil {
		list = append(list, Halt{
			Name: "clock", What: "expiry and collection", Error: untrusted.Error(), Since: c.clock.StoppedSince(),
			Replica: c.replica,
		})
	}
	if by, replica := DecodeHalts(rec); replica == leader && leader != c.replica {
		list = append(list, by...)
	}
	if unreadable > 0 {
		list = append(list, Halt{
			Name: "references", What: "collection in the collections of unreadable snapshots", Replica: c.replica,
			Error: fmt.Sprintf("the references of %d snapshots cannot be read; the log names them", unreadable),
		})
	}
	return append(list, c.Halts()...), nil
}

// RolledBack returns a text that explains why this cluster allocates and deletes nothing
// after a rollback of the metadata store, and how to recover. It is empty while no
// rollback is known.
func (c *Collector) RolledBack(ctx context.Context) (string, error) {
	behind, err := epoch.RolledBack(ctx, c.kv)
	if err != nil || behind == nil {
		return "", err
	}
	return behind.Error(), nil
}
