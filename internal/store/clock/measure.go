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

// measurement is one measurement of the clocks, with the record read after it.
type measurement struct {
	at    time.Duration // elapsed
	own   time.Time     // own clock at elapsed zero
	store time.Time     // the store's clock at elapsed zero; zero: none
	slack time.Duration // the uncertainty of store
	// fresh is the elapsed time of the measurement of store, which may be before at.
	fresh time.Duration

	record   *storagev1.Clock // nil: none
	recordIs meta.Cond        // the record is unchanged
	suspect  *step
	problem  *step // the reason for distrust; nil: the reading is trusted
	recorded bool  // the record has the problem
}

// authority returns the authority's time at elapsed zero.
func (m *measurement) authority() time.Time {
	if m.store.IsZero() {
		return m.own
	}
	return m.store
}

// reading returns the authority's time at the measurement.
func (m *measurement) reading() time.Time { return m.authority().Add(m.at) }

// off returns the time by which the own clock is ahead of the store's.
func (m *measurement) off() time.Duration {
	if m.store.IsZero() {
		return 0
	}
	return m.own.Sub(m.store)
}

// cause is the reason for a stopped clock. Stored: append only.
type cause uint32

const (
	stepForward cause = iota + 1
	stepBackward
	gap
	ahead
)

// step is a movement of the authority.
type step struct {
	cause    cause
	from, to time.Time
}

func newStep(from, to time.Time) *step {
	if to.Before(from) {
		return &step{stepBackward, from, to}
	}
	return &step{stepForward, from, to}
}

func (s *step) String() string {
	by := s.to.Sub(s.from).Abs().Round(time.Second)
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch s.cause {
	case stepForward:
		return fmt.Sprintf("it stepped forward by %v, from %s to %s", by, at(s.from), at(s.to))
	case stepBackward:
		return fmt.Sprintf("it stepped backward by %v, from %s to %s", by, at(s.from), at(s.to))
	case ahead:
		return fmt.Sprintf("it is %v ahead of the clock of the replica that leads, %s against %s", by, at(s.to), at(s.from))
	case gap:
		return fmt.Sprintf("it is %v after the last record, %s against %s, which exceeds clock_max_downtime",
			by, at(s.to), at(s.from))
	}
	return fmt.Sprintf("it moved by %v, from %s to %s", by, at(s.from), at(s.to)) // a cause of a newer release
}

func (s *step) err() error { return fmt.Errorf("%w: %v; %s", ErrUntrusted, s, remedy) }

// measure measures the clocks and reads the record. The caller holds the turn.
func (t *Trusted) measure(ctx context.Context) (*measurement, error) {
	t.mu.Lock()
	last, suspect := t.last, t.suspect
	t.mu.Unlock()
	next, err := t.readClocks(ctx, last)
	if err != nil {
		return nil, err
	}
	if err := t.readRecord(ctx, next); err != nil {
		return nil, err
	}
	if moved := stepBetween(last, next); moved != nil {
		suspect = moved
	} else if suspect == nil {
		suspect = aheadOfLeader(last, next, &t.o)
	}
	decide(next, suspect, &t.o)
	t.mu.Lock()
	t.last, t.suspect = next, next.suspect
	off := next.off().Abs() > Bound+next.slack
	warn := off && !t.warned
	t.warned = off
	t.mu.Unlock()
	if warn {
		t.o.Log.Warn("the clock of this host is over a minute off; "+
			"using the clock of the object store: correct the clock of this host",
			zap.Duration("ahead", next.off()), zap.String("store", t.o.Alias))
	}
	return next, nil
}

// readClocks reads the clocks. It uses the last measurement of an unavailable store.
func (t *Trusted) readClocks(ctx context.Context, last *measurement) (*measurement, error) {
	next := &measurement{}
	if t.o.Store != nil {
		before := t.o.Clock.Elapsed()
		storeCtx, cancel := context.WithTimeout(ctx, storeTimeout)
		now, err := t.o.Store.Now(storeCtx)
		cancel()
		after := t.o.Clock.Elapsed()
		switch {
		case err == nil:
			// As of the arrival of the response, so that the reading is never ahead of the
			// store.
			next.store, next.fresh = now.Round(0).Add(-after), after
			next.slack = time.Second + after - before
		case last != nil && after-last.fresh < staleAfter:
			next.store, next.fresh, next.slack = last.store, last.fresh, last.slack
		default:
			return nil, fmt.Errorf("read the clock of store %s: %w", t.o.Alias, err)
		}
	}
	next.at = t.o.Clock.Elapsed()
	next.own = wall(t.o.Clock).Add(-next.at)
	return next, nil
}

// readRecord reads the record into m.
func (t *Trusted) readRecord(ctx context.Context, m *measurement) error {
	kv, found, _, err := t.o.KV.Get(ctx, keys.Clock)
	if err != nil {
		return fmt.Errorf("read the clock's record: %w", err)
	}
	if !found {
		m.record, m.recordIs = nil, meta.Absent(keys.Clock)
		return nil
	}
	m.record, m.recordIs = &storagev1.Clock{}, meta.Unchanged(keys.Clock, kv.ModRevision)
	return record.Decode(kv, m.record)
}

// stepBetween returns the step between two measurements, or nil.
func stepBetween(last, next *measurement) *step {
	if last == nil {
		return nil
	}
	moved := next.authority().Sub(last.authority())
	if moved.Abs() <= Bound+last.slack+next.slack {
		return nil
	}
	return newStep(next.reading().Add(-moved), next.reading())
}

// aheadOfLeader returns the step if the reading of next is ahead of a record that another
// replica wrote between the two measurements, else nil. With a store's clock all replicas
// have the same authority.
func aheadOfLeader(last, next *measurement, o *Options) *step {
	if last == nil || next.record == nil || o.Store != nil || last.recordIs == next.recordIs ||
		next.record.GetReplica() == o.Replica {
		return nil
	}
	recorded := record.Time(next.record.GetTime())
	if next.reading().Sub(recorded) <= next.at-last.at+o.Interval+Bound {
		return nil
	}
	return &step{ahead, recorded, next.reading()}
}

// decide sets in m whether its reading is trusted. suspect is an unrecorded step that the
// process saw.
func decide(m *measurement, suspect *step, o *Options) {
	now, recorded := m.reading(), time.Time{}
	if m.record != nil {
		recorded = record.Time(m.record.GetTime())
		since := now.Sub(recorded)
		if suspect != nil && m.record.GetReplica() != o.Replica && since >= -Bound && since <= 2*o.Interval {
			suspect = nil // the counter of this process had stopped
		}
	}
	m.suspect, m.problem, m.recorded = suspect, nil, false
	switch {
	case m.record.GetCause() != 0:
		m.problem = &step{cause(m.record.GetCause()), record.Time(m.record.GetFrom()), record.Time(m.record.GetTo())}
		m.recorded = true
	case suspect != nil:
		m.problem = suspect
	case m.record == nil:
	case recorded.Sub(now) > Bound+m.slack:
		m.problem = newStep(recorded, now)
	case now.Sub(recorded) > o.MaxDowntime:
		m.problem = &step{gap, recorded, now}
	}
}
