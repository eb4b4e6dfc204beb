package manager

import (
	"context"
	"errors"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/epoch"
)

// errNoEpoch means that this replica does not detect rollbacks of the metadata store.
// Only tests configure that.
var errNoEpoch = errors.New("this replica does not detect rollbacks of the metadata store")

// ErrNotReady means that the object store for snapshots has not answered since this
// replica started. Whether the store is the cluster's, and whether the metadata store
// was rolled back, is therefore unknown. Nothing was written.
var ErrNotReady = errors.New("the object store has not answered since this replica started")

// CheckRollback returns an epoch.ErrRolledBack while the metadata store is known to be
// older than the object store, because decisions on it may be wrong. It returns
// ErrNotReady while that is unknown.
func (m *Manager) CheckRollback(ctx context.Context) error {
	if ready := m.o.Ready[m.o.SnapshotStore]; ready != nil {
		select {
		case <-ready:
		default:
			return ErrNotReady
		}
	}
	if m.o.Epoch == nil {
		return nil
	}
	behind, err := epoch.RolledBack(ctx, m.kv)
	if err != nil {
		return err
	}
	return behind
}

// Recover ends the state in which the metadata store is older than the object store.
// With force it does so even if no rollback was detected. It returns whether the store
// was in that state, the lowest id that is allocated from now on, and the lowest
// skipped id, which equals next if none was skipped. It may be repeated. After an error
// the recovery may have happened.
func (m *Manager) Recover(ctx context.Context, force bool) (wasBehind bool, next, skippedFrom int64, err error) {
	if m.o.Epoch == nil {
		return false, 0, 0, errNoEpoch
	}
	return m.o.Epoch.Recover(ctx, force)
}

// RecoverClock accepts the clocks as they are now. It returns whether they were not
// trusted before, and the time that judges lifetimes. It may be repeated.
func (m *Manager) RecoverClock(ctx context.Context) (wasStopped bool, now time.Time, err error) {
	wasStopped, now, err = m.clock.Recover(ctx)
	if err == nil {
		m.clean.Wake()
	}
	return wasStopped, now, err
}
