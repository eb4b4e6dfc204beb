package clock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

const (
	// Bound is the maximum difference of two correct clocks, and the maximum movement of
	// a clock that is not a step.
	Bound = time.Minute
	// DefaultMaxDowntime is the longest gap that counts as downtime.
	DefaultMaxDowntime = 35 * 24 * time.Hour

	steadyTime      = 24 * time.Hour   // after which a stopped clock is trusted again
	measureInterval = 20 * time.Second // maximum age of a measurement while readings are taken
	storeTimeout    = 10 * time.Second // of a request for the store's clock
	staleAfter      = 24 * time.Hour   // maximum age of the store's clock while it is unavailable
	maxAttempts     = 16
)

// ErrUntrusted means that the time is not known well enough to stamp or to judge a lifetime.
// Its text has the cause and the remedy.
var ErrUntrusted = errors.New("the clock is not trusted")

// remedy is the operator's action for a stopped clock.
const remedy = "nothing expires and nothing is collected until the clocks are correct and " +
	"`snapshotctl recover --clock` was run, or until a day of steady clocks has passed"

// Clock is the clock of a host. Its methods are safe for concurrent use.
type Clock interface {
	// Now returns the wall clock's time. It may step.
	Now() time.Time
	// Elapsed returns the time since a fixed moment. It never steps, and continues while
	// the host sleeps.
	Elapsed() time.Duration
}

// System is the clock of this host.
type System struct{}

// Now implements [Clock].
func (System) Now() time.Time { return time.Now() }

// Elapsed implements [Clock].
func (System) Elapsed() time.Duration { return elapsed() }

// Of returns a Clock whose wall clock is now and whose Elapsed is the runtime's
// monotonic clock, which is virtual in virtual time.
func Of(now func() time.Time) Clock { return &derived{now: now, base: time.Now()} }

type derived struct {
	now  func() time.Time
	base time.Time
}

func (c *derived) Now() time.Time         { return c.now() }
func (c *derived) Elapsed() time.Duration { return time.Since(c.base) }

// Options are the dependencies and settings of a Trusted.
type Options struct {
	KV    meta.KV
	Clock Clock
	// Store is the object store whose clock is compared. Nil: its clock is that of this
	// host, so there is no other clock.
	Store object.Store
	// Alias is the name of Store, for messages.
	Alias string
	// Replica is the name of this process.
	Replica string
	Log     *zap.Logger // default: none
	// MaxDowntime is the longest gap between records that counts as downtime. Default
	// [DefaultMaxDowntime].
	MaxDowntime time.Duration
	// Interval is the time between two records. Default 1 min.
	Interval time.Duration
	// Problems receives repeated failures. Default: a new one.
	Problems *lasting.Problems
}

// Trusted provides the readings for lifetimes. It is safe for concurrent use.
type Trusted struct {
	o    Options
	turn chan struct{} // one token; its holder may measure

	records *lasting.Problem

	mu      sync.Mutex
	last    *measurement // nil before the first
	suspect *step        // unconfirmed by any record
	warned  bool         // the own clock is off, which was logged
}

// New returns a Trusted. It starts no goroutine.
func New(o Options) *Trusted {
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	if o.MaxDowntime == 0 {
		o.MaxDowntime = DefaultMaxDowntime
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.Problems == nil {
		o.Problems = lasting.New(o.Clock.Now)
	}
	t := &Trusted{o: o, turn: make(chan struct{}, 1)}
	t.records = o.Problems.Add(o.Log, "note of the time", "clock record not written, retrying", "")
	t.turn <- struct{}{}
	return t
}

// Stamp returns the time for the start of a lifetime, or an [ErrUntrusted] if the clock
// stepped. It sends requests to the stores only if the last measurement is not recent.
func (t *Trusted) Stamp(ctx context.Context) (time.Time, error) {
	return t.reading(ctx, time.Time.After, gap)
}

// Judge returns the time for the decision whether a lifetime has ended, or an [ErrUntrusted]
// if the clock is stopped.
func (t *Trusted) Judge(ctx context.Context) (time.Time, error) {
	return t.reading(ctx, time.Time.Before, 0)
}

// reading returns the current reading, unless the clock has a problem of another cause than
// tolerated. It measures again if the own clock, as the only one, has stepped since the
// measurement; that measurement has the step as its problem.
func (t *Trusted) reading(
	ctx context.Context, prefer func(own, store time.Time) bool, tolerated cause,
) (time.Time, error) {
	for range maxAttempts {
		m, err := t.current(ctx)
		if err != nil {
			return time.Time{}, err
		}
		if m.problem != nil && m.problem.cause != tolerated {
			return time.Time{}, m.problem.err()
		}
		if now, steady := t.read(m, prefer); steady {
			return now, nil
		}
	}
	return time.Time{}, fmt.Errorf("%w: it steps at each of %d readings; %s", ErrUntrusted, maxAttempts, remedy)
}

// Peek is Judge without requests to the stores: the reading by the last measurement, which
// must be at most some minutes old. It returns false if there is none, or if the clock is not
// trusted.
func (t *Trusted) Peek() (time.Time, bool) {
	t.mu.Lock()
	m := t.last
	t.mu.Unlock()
	if m == nil || m.problem != nil {
		return time.Time{}, false
	}
	if t.o.Clock.Elapsed()-m.at > 2*t.o.Interval+measureInterval {
		return time.Time{}, false
	}
	return t.read(m, time.Time.Before)
}

// moved reports whether the own clock, which shows own at elapsed time at, has stepped
// since the measurement.
func (m *measurement) moved(own time.Time, at time.Duration) bool {
	return own.Add(-at).Sub(m.own).Abs() > Bound
}

// Ensure measures the clocks if they were never measured. It waits for a store that does
// not respond for some seconds, and for those of concurrent calls.
func (t *Trusted) Ensure(ctx context.Context) error {
	t.mu.Lock()
	measured := t.last != nil
	t.mu.Unlock()
	if measured {
		return nil
	}
	_, err := t.current(ctx)
	return err
}

// Display returns the best known time without requests to the stores, for output, logs and
// the times of attempts. Before the first measurement it is the host's clock; see [Trusted.Ensure].
func (t *Trusted) Display() time.Time {
	t.mu.Lock()
	m := t.last
	t.mu.Unlock()
	if m == nil {
		return wall(t.o.Clock)
	}
	now, _ := t.read(m, time.Time.After)
	return now
}

// Elapsed returns the elapsed time of the host's clock.
func (t *Trusted) Elapsed() time.Duration { return t.o.Clock.Elapsed() }

// Skew returns the time by which the own clock was ahead of the store's at the last
// measurement.
func (t *Trusted) Skew() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil {
		return 0
	}
	return t.last.off()
}

// Stopped returns why nothing expired at the last measurement; empty: the clock is trusted.
func (t *Trusted) Stopped() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil || t.last.problem == nil {
		return ""
	}
	return t.last.problem.err().Error()
}

// StoppedSince returns the time of the step that stopped the clock, by that clock; zero if
// the clock is trusted or the time is unknown.
func (t *Trusted) StoppedSince() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil || t.last.problem == nil {
		return time.Time{}
	}
	return t.last.problem.to
}

// read returns the current reading: the own clock if prefer(own, store) is true and both
// clocks agree, else the store's. steady is false if there is no store's clock and the own
// clock has stepped since the measurement: the value that is checked is the one that is
// returned, because a step may come between two reads.
func (t *Trusted) read(m *measurement, prefer func(own, store time.Time) bool) (now time.Time, steady bool) {
	own, at := wall(t.o.Clock), t.o.Clock.Elapsed()
	if m.store.IsZero() {
		return own, !m.moved(own, at)
	}
	store := m.store.Add(at)
	if own.Sub(store).Abs() <= Bound+m.slack && prefer(own, store) {
		return own, true
	}
	return store, true
}

// wall returns the wall clock's time without its monotonic part, so that differences are
// those of the wall clock.
func wall(c Clock) time.Time { return c.Now().Round(0) }

// current returns the last measurement, or a new one if the last is too old, the own clock
// has moved since, or the clock was not trusted.
func (t *Trusted) current(ctx context.Context) (*measurement, error) {
	usable := func() (m *measurement, recent bool) {
		t.mu.Lock()
		defer t.mu.Unlock()
		m = t.last
		if m == nil || m.problem != nil {
			return nil, false
		}
		at := t.o.Clock.Elapsed()
		if m.moved(wall(t.o.Clock), at) {
			return nil, false
		}
		return m, at-m.at < measureInterval
	}
	m, recent := usable()
	if recent {
		return m, nil
	}
	if m != nil { // one call measures, the others use the last measurement
		select {
		case <-t.turn:
		default:
			return m, nil
		}
	} else {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.turn:
		}
	}
	defer func() { t.turn <- struct{}{} }()
	if m, recent := usable(); recent { // measured by a concurrent call
		return m, nil
	}
	return t.measure(ctx)
}

// fresh returns a new measurement.
func (t *Trusted) fresh(ctx context.Context) (*measurement, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.turn:
	}
	defer func() { t.turn <- struct{}{} }()
	return t.measure(ctx)
}
