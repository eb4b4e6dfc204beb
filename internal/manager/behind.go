package manager

import (
	"context"
	"errors"
	"time"
)

// errNoEpoch means that nobody looks whether the metadata store has gone back in
// time, which only tests ask for.
var errNoEpoch = errors.New("this replica keeps no epoch")

// whileNotBehind has a leader's work done while the metadata store has not gone
// back in time.
func (m *Manager) whileNotBehind(ctx context.Context, work func(ctx context.Context) error) error {
	if m.o.Epoch == nil {
		return work(ctx)
	}
	return m.o.Epoch.Lead(ctx, work)
}

// Behind says why nothing is allocated and deleted: that the metadata store has
// gone back in time, and what to do; empty: it has not, as far as is known.
func (m *Manager) Behind(ctx context.Context) (string, error) {
	if m.o.Epoch == nil {
		return "", nil
	}
	behind, err := m.o.Epoch.RolledBack(ctx)
	if err != nil || behind == nil {
		return "", err
	}
	return behind.Error(), nil
}

// ErrNotReady means that the object store for snapshots has not answered since this
// replica started, so that it is not known whether it is the cluster's, nor whether
// the metadata store has gone back in time. Nothing was written.
var ErrNotReady = errors.New("the object store has not answered since this replica started")

// NotBehind returns an epoch.ErrRolledBack while the metadata store is known to be
// behind the object store: what is decided on it may be wrong. It returns an
// ErrNotReady while that cannot be known.
func (m *Manager) NotBehind(ctx context.Context) error {
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
	behind, err := m.o.Epoch.RolledBack(ctx)
	if err != nil {
		return err
	}
	return behind
}

// Recover ends the state in which the metadata store is behind the object store;
// forced, it does the same where that was not noticed. It returns whether it was, the lowest id that is handed out from now on, and the
// lowest of those that were passed over, equal to it when none was. A repeat is
// success. With an error it may have happened.
func (m *Manager) Recover(ctx context.Context, force bool) (wasBehind bool, next, skippedFrom int64, err error) {
	if m.o.Epoch == nil {
		return false, 0, 0, errNoEpoch
	}
	return m.o.Epoch.Recover(ctx, force)
}

// RecoverClock has the clocks trusted as they are now. It returns whether they were
// not, and the time that lifetimes are judged by. A repeat is success.
func (m *Manager) RecoverClock(ctx context.Context) (wasStopped bool, now time.Time, err error) {
	wasStopped, now, err = m.clock.Recover(ctx)
	if err == nil {
		m.clean.Wake()
	}
	return wasStopped, now, err
}
