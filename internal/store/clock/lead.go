package clock

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Lead writes the record immediately and then once per interval, until ctx ends. Every write
// compares fence.
func (t *Trusted) Lead(ctx context.Context, fence meta.Cond) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	last := time.Duration(-1) // elapsed at the last record
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		at, err := t.writeRecord(ctx, fence, last)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			t.records.Failed(err)
		default:
			t.records.Passed()
			last = at
		}
		timer.Reset(t.o.Interval)
	}
}

// Follow reads the records of other replicas until ctx ends, so that a process detects a
// clock that is ahead before it leads. With a store's clock it does nothing.
func (t *Trusted) Follow(ctx context.Context) error {
	if t.o.Store != nil {
		return nil
	}
	ticker := time.NewTicker(measureInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if _, err := t.current(ctx); err != nil && ctx.Err() == nil {
			t.o.Log.Warn("clock record not read, retrying", zap.Error(err))
		}
	}
}

// writeRecord measures and writes the record. last is the elapsed time of the previous
// record, negative if there is none. It returns that of the new record.
func (t *Trusted) writeRecord(ctx context.Context, fence meta.Cond, last time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, t.o.Interval)
	defer cancel()
	m, err := t.fresh(ctx)
	if err != nil {
		return last, err
	}
	steady := time.Duration(0)
	if last >= 0 {
		steady = m.at - last
	}
	rec := nextRecord(m, t.o.Replica, steady)
	put := []meta.Op{meta.Put(keys.Clock, record.Encode(rec))}
	res, err := t.o.KV.Txn(ctx, meta.Txn{Name: "clock.note", If: []meta.Cond{m.recordIs, fence}, Then: put})
	if err != nil || !res.Succeeded { // another replica leads, or an operator has recovered the clock
		return last, err
	}
	t.mu.Lock()
	if t.suspect == m.suspect {
		t.suspect = nil
	}
	t.mu.Unlock()
	switch {
	case rec.GetCause() != 0 && !m.recorded:
		t.o.Log.Error("the clock is stopped", zap.Error(m.problem.err()))
	case rec.GetCause() == 0 && m.recorded:
		t.o.Log.Info("the clock is trusted again after a day of steady clocks", zap.Time("reading", m.reading()))
	}
	return m.at, nil
}

// nextRecord returns the record for the measurement. steady is the elapsed time of this
// leader since its previous record.
func nextRecord(m *measurement, replica string, steady time.Duration) *storagev1.Clock {
	rec := &storagev1.Clock{Format: record.Format, Time: record.Nanos(m.reading()), Replica: replica}
	p := m.problem
	if p == nil {
		return rec
	}
	if m.recorded {
		moved := m.suspect != nil || record.Time(m.record.GetTime()).Sub(m.reading()) > Bound+m.slack
		if rec.Steady = m.record.GetSteady() + int64(steady); moved {
			rec.Steady = 0
		}
		if time.Duration(rec.GetSteady()) >= steadyTime {
			rec.Steady = 0
			return rec
		}
		if m.suspect != nil {
			p = m.suspect
		}
	}
	rec.Cause, rec.From, rec.To = uint32(p.cause), record.Nanos(p.from), record.Nanos(p.to)
	return rec
}

// Recover makes the clock trusted with its current time. It returns whether the clock was
// stopped, and the reading. A repeat is a success.
func (t *Trusted) Recover(ctx context.Context) (wasStopped bool, now time.Time, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, time.Time{}, err
		}
		m, err := t.fresh(ctx)
		if err != nil {
			return false, time.Time{}, fmt.Errorf("recover the clock: %w", err)
		}
		rec := &storagev1.Clock{Format: record.Format, Time: record.Nanos(m.reading()), Replica: t.o.Replica}
		put := []meta.Op{meta.Put(keys.Clock, record.Encode(rec))}
		res, err := t.o.KV.Txn(ctx, meta.Txn{Name: "clock.recover", If: []meta.Cond{m.recordIs}, Then: put})
		if err != nil {
			return false, time.Time{}, fmt.Errorf("recover the clock: %w", err)
		}
		if !res.Succeeded {
			continue
		}
		if m.problem != nil {
			t.o.Log.Info("the clock is trusted again by an operator",
				zap.Stringer("was", m.problem), zap.Time("reading", m.reading()))
		}
		t.reset()
		return m.problem != nil, m.reading(), nil
	}
	return false, time.Time{}, fmt.Errorf(
		"recover the clock: %w: gave up after %d attempts",
		meta.ErrConflict,
		maxAttempts,
	)
}

// reset clears the suspicion and the last distrust.
func (t *Trusted) reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.suspect = nil
	if t.last != nil {
		trusted := *t.last
		trusted.problem, trusted.suspect = nil, nil
		t.last = &trusted
	}
}
