// Package clock decides what time it is where a lifetime depends on it: when a
// snapshot or a pin expires, how long ago a segment was dropped, when a restore
// has to end. A wall clock alone can be wrong by hours and can step; the time
// that a lifetime is stamped with and the time that it is judged by are therefore
// readings of one kind, and a clock that steps stops the judging.
//
// # Words
//
//	own clock  the wall clock of this host
//	elapsed    a clock that only counts: it runs on while the host sleeps
//	           (CLOCK_BOOTTIME) and never steps
//	store      the clock of the object store, where that is another host's
//	authority  the store's clock, or without one the own clock
//	look       a measurement of both clocks against elapsed. Between two looks
//	           the authority is the last measurement plus what has elapsed
//	off        own clock and store are over a minute apart
//	step       the authority moved by over a minute against elapsed
//	note       the key /clock: the reading of the leader's last look, once a minute
//
// # Readings
//
//	stamp  "not before": the later of own clock and store; the store's when the own
//	       clock is off; the own clock where there is no other
//	judge  what is due by it is due: the earlier of the two; else as stamp
//
// The two clocks that a reading chooses from are at most a minute apart, so a
// lifetime that one replica stamped and another judges never ends early, and at
// most two minutes late.
//
// # States
//
//	         step, gap                  recover, a day of steady clocks
//	running ----------> stopped (/clock) -----------------------------> running
//
// While the clock is stopped, Judge fails: nothing expires and nothing is
// collected. Stamp fails as well, unless a gap is the cause: a clock that is ahead
// makes lifetimes longer, never shorter.
//
//	step     two looks of one process differ by more than a minute, forward or
//	         backward; or the authority is more than a minute before the note
//	gap      the first look is more than the longest downtime after the note: no
//	         process ran, or the clock stepped meanwhile. A shorter gap is downtime
//	ahead    without a store's clock: the note changes between two looks, so the
//	         leader wrote it in that time, and the authority is further ahead of it
//	         than that time, the longest write of a note and a minute allow. One of
//	         the two clocks is wrong
//	suspect  a process that saw a step, or is ahead, and does not lead. Its own counter may have
//	         stood still, as in a virtual machine that was paused. It neither stamps
//	         nor judges until a note of another replica agrees with its reading, or it
//	         leads
//	steady   the time without a step, as elapsed in leaders, since the clock stopped
//
// # Transactions
//
//	note     compares: /clock as read, the leader's election key
//	         puts: /clock with the reading; while stopped the cause as before and
//	         the steady time, which a step sets to zero; after a day of it no cause
//	stop     is a note with a cause
//	recover  compares: /clock as read
//	         puts: /clock with the reading and without a cause, also where the clock
//	         is not stopped
//
// # Failures
//
//	store is silent         the last measurement serves for a day. Without one, Stamp
//	                        and Judge fail with the store's error
//	metadata store silent   Stamp and Judge fail once the last look is older than
//	                        lookInterval
//	note: no answer         the next look reads what has become of it
//	stop: no answer         the process remembers the step and does not judge; the
//	                        next note tries again
//	process dies before     the next one compares its first look with the note. A step
//	the stop is written     forward of less than the longest downtime then passes
//	                        for downtime
//	leader is frozen        its note fails on the election key
//	recover: no answer      a repeat finds it done, or does it
//	host sleeps             elapsed runs on: no step
//	two replicas without a  the one whose clock is over a minute before the note
//	store's clock           neither stamps nor judges; nor does one that is ahead. If
//	                        that one comes to lead, its first note stops the clock
//	a replica leads before  its difference from the note of the last leader passes for
//	it has seen two notes   downtime
package clock

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

const (
	// Bound is how far two clocks may be apart before one of them is wrong, and by
	// how much a clock may move before it is a step.
	Bound = time.Minute
	// DefaultMaxDowntime is the longest gap that passes for downtime.
	DefaultMaxDowntime = 35 * 24 * time.Hour

	steadyTime   = 24 * time.Hour   // after which a stopped clock is trusted again
	lookInterval = 20 * time.Second // between looks at most, while readings are taken
	storeTimeout = 10 * time.Second // of a request for the store's clock
	staleAfter   = 24 * time.Hour   // of the store's clock when it does not answer
	maxAttempts  = 16
)

// ErrUntrusted means that the time is not known well enough to stamp or to judge
// a lifetime. Its text names the cause and what to do.
var ErrUntrusted = errors.New("the clock is not trusted")

// ErrConflict means that others noted the time again and again. To try again helps.
var ErrConflict = errors.New("too many concurrent notes of the clock")

// wayOut is what to do about a clock that stopped.
const wayOut = "nothing expires and nothing is collected until the clocks are right and " +
	"`snapshotctl recover --clock` says so, or a day of steady clocks"

// Clock is the clock of a host. Its methods are safe for concurrent use.
type Clock interface {
	// Now returns the wall clock's time. It may step.
	Now() time.Time
	// Elapsed returns the time since a fixed moment. It never steps, and runs on
	// while the host sleeps.
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

// Options are what a Trusted needs.
type Options struct {
	KV    meta.KV
	Clock Clock
	// Store is the object store whose clock is compared. Nil: its clock is that of
	// this host, and there is none to compare with.
	Store object.Store
	// Alias is the name of Store, for messages.
	Alias string
	// Replica is the name of this process.
	Replica string
	Log     *zap.Logger // default: none
	// MaxDowntime is the longest gap without a note that passes for downtime.
	// Default [DefaultMaxDowntime].
	MaxDowntime time.Duration
	// Interval is between two notes. Default 1 min.
	Interval time.Duration
	// Problems gets what fails at each try. Default: its own.
	Problems *lasting.Problems
}

// Trusted gives the readings that lifetimes are stamped and judged by. It is safe
// for concurrent use.
type Trusted struct {
	o    Options
	turn chan struct{} // holds one token; its holder may look

	notes *lasting.Problem

	mu      sync.Mutex
	last    *look // nil before the first
	suspect *step // that no note has confirmed or explained
	warned  bool  // the own clock is off, and the log says so
}

// New returns a Trusted. It does nothing by itself.
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
	t.notes = o.Problems.Add(o.Log, "note of the time", "the time could not be noted; it is tried again", "")
	t.turn <- struct{}{}
	return t
}

// look is what one look found.
type look struct {
	at    time.Duration // elapsed
	own   time.Time     // own clock when elapsed was zero
	store time.Time     // likewise the store's; zero: there is none
	slack time.Duration // how exact the store's is
	// fresh is when the store's clock was measured, which may be before at.
	fresh time.Duration

	note     *storagev1.Clock // nil: there is none
	noteIs   meta.Cond        // that it is as read
	suspect  *step
	problem  *step // why the reading is not trusted; nil: it is
	recorded bool  // the note holds the problem
}

// authority is the clock that a step is a step of, when elapsed was zero.
func (l *look) authority() time.Time {
	if l.store.IsZero() {
		return l.own
	}
	return l.store
}

// reading is the authority's time at the look.
func (l *look) reading() time.Time { return l.authority().Add(l.at) }

// off is how far the own clock is ahead of the store's.
func (l *look) off() time.Duration {
	if l.store.IsZero() {
		return 0
	}
	return l.own.Sub(l.store)
}

// cause is why a clock stopped. Stored: append only.
type cause uint32

const (
	stepForward cause = iota + 1
	stepBackward
	gap
	ahead
)

// step is a move of the authority.
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
		return fmt.Sprintf("it is %v after the last note, %s against %s, and no downtime is that long (clock_max_downtime)",
			by, at(s.to), at(s.from))
	}
	return fmt.Sprintf("it moved by %v, from %s to %s", by, at(s.from), at(s.to)) // by a newer release's rule
}

func (s *step) err() error { return fmt.Errorf("%w: %v; %s", ErrUntrusted, s, wayOut) }

// Stamp returns the time to begin a lifetime with. It is an [ErrUntrusted] when
// the clock stepped. It asks the stores only when the last look is no longer
// recent.
func (t *Trusted) Stamp(ctx context.Context) (time.Time, error) {
	l, err := t.current(ctx)
	if err != nil {
		return time.Time{}, err
	}
	if l.problem != nil && l.problem.cause != gap {
		return time.Time{}, l.problem.err()
	}
	return t.read(l, time.Time.After), nil
}

// Judge returns the time by which a lifetime has ended or not. It is an
// [ErrUntrusted] when the clock is stopped.
func (t *Trusted) Judge(ctx context.Context) (time.Time, error) {
	l, err := t.current(ctx)
	if err != nil {
		return time.Time{}, err
	}
	if l.problem != nil {
		return time.Time{}, l.problem.err()
	}
	return t.read(l, time.Time.Before), nil
}

// Peek is Judge without waiting for a store: the reading by the last look, which
// must be one of the last minutes. It says false when there is none, or the clock
// is not trusted.
func (t *Trusted) Peek() (time.Time, bool) {
	t.mu.Lock()
	l := t.last
	t.mu.Unlock()
	if l == nil || l.problem != nil {
		return time.Time{}, false
	}
	at := t.o.Clock.Elapsed()
	if at-l.at > 2*t.o.Interval+lookInterval || l.store.IsZero() && t.moved(l, at) {
		return time.Time{}, false
	}
	return t.read(l, time.Time.Before), true
}

// moved says whether the own clock has stepped since the look.
func (t *Trusted) moved(l *look, at time.Duration) bool {
	return wall(t.o.Clock).Add(-at).Sub(l.own).Abs() > Bound
}

// Display returns the best time that is known without asking a store, for people
// and for logs. No lifetime depends on it.
func (t *Trusted) Display() time.Time {
	t.mu.Lock()
	l := t.last
	t.mu.Unlock()
	if l == nil {
		return wall(t.o.Clock)
	}
	return t.read(l, time.Time.After)
}

// Elapsed is that of the host's clock.
func (t *Trusted) Elapsed() time.Duration { return t.o.Clock.Elapsed() }

// Skew returns how far the own clock is ahead of the store's, as last seen.
func (t *Trusted) Skew() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil {
		return 0
	}
	return t.last.off()
}

// Stopped says why nothing expires, as last seen; empty: the clock is trusted.
func (t *Trusted) Stopped() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil || t.last.problem == nil {
		return ""
	}
	return t.last.problem.err().Error()
}

// StoppedSince returns when the step was that stopped the clock, by the clock itself;
// zero: it is trusted, or the time is not known.
func (t *Trusted) StoppedSince() time.Time {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.last == nil || t.last.problem == nil {
		return time.Time{}
	}
	return t.last.problem.to
}

// read is the reading now, of own clock and store the one that better says.
func (t *Trusted) read(l *look, better func(a, b time.Time) bool) time.Time {
	own := wall(t.o.Clock)
	if l.store.IsZero() {
		return own
	}
	store := l.store.Add(t.o.Clock.Elapsed())
	if own.Sub(store).Abs() <= Bound+l.slack && better(own, store) {
		return own
	}
	return store
}

// wall is the wall clock's time. Without its monotonic part: differences are those
// of the wall clock.
func wall(c Clock) time.Time { return c.Now().Round(0) }

// current returns the last look, or a new one when that is too old, the own clock
// has moved since, or the clock was not trusted.
func (t *Trusted) current(ctx context.Context) (*look, error) {
	usable := func() (l *look, recent bool) {
		t.mu.Lock()
		defer t.mu.Unlock()
		l = t.last
		if l == nil || l.problem != nil {
			return nil, false
		}
		at := t.o.Clock.Elapsed()
		if t.moved(l, at) {
			return nil, false
		}
		return l, at-l.at < lookInterval
	}
	l, recent := usable()
	if recent {
		return l, nil
	}
	if l != nil { // one looks, the others go on with what there is
		select {
		case <-t.turn:
		default:
			return l, nil
		}
	} else {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-t.turn:
		}
	}
	defer func() { t.turn <- struct{}{} }()
	if l, recent := usable(); recent { // another looked meanwhile
		return l, nil
	}
	return t.look(ctx)
}

// fresh looks in any case.
func (t *Trusted) fresh(ctx context.Context) (*look, error) {
	select {
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-t.turn:
	}
	defer func() { t.turn <- struct{}{} }()
	return t.look(ctx)
}

// look measures the clocks and reads the note. The caller has the turn.
func (t *Trusted) look(ctx context.Context) (*look, error) {
	t.mu.Lock()
	last, suspect := t.last, t.suspect
	t.mu.Unlock()
	next, err := t.measure(ctx, last)
	if err != nil {
		return nil, err
	}
	if err := t.readNote(ctx, next); err != nil {
		return nil, err
	}
	if moved := between(last, next); moved != nil {
		suspect = moved
	} else if suspect == nil {
		suspect = aheadOf(last, next, &t.o)
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
			"the object store's is used in its place: set the clock right",
			zap.Duration("ahead", next.off()), zap.String("store", t.o.Alias))
	}
	return next, nil
}

// measure reads the clocks.
func (t *Trusted) measure(ctx context.Context, last *look) (*look, error) {
	next := &look{}
	if t.o.Store != nil {
		before := t.o.Clock.Elapsed()
		storeCtx, cancel := context.WithTimeout(ctx, storeTimeout)
		now, err := t.o.Store.Now(storeCtx)
		cancel()
		after := t.o.Clock.Elapsed()
		switch {
		case err == nil:
			// As of the answer's arrival, so that the reading is never ahead of the store.
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

// readNote reads the note into l.
func (t *Trusted) readNote(ctx context.Context, l *look) error {
	kv, found, _, err := t.o.KV.Get(ctx, keys.Clock)
	if err != nil {
		return fmt.Errorf("read the last note of the clock: %w", err)
	}
	if !found {
		l.note, l.noteIs = nil, meta.Absent(keys.Clock)
		return nil
	}
	l.note, l.noteIs = &storagev1.Clock{}, meta.Unchanged(keys.Clock, kv.ModRevision)
	return record.Decode(kv, l.note)
}

// between is the step between two looks; nil: there is none.
func between(last, next *look) *step {
	if last == nil {
		return nil
	}
	moved := next.authority().Sub(last.authority())
	if moved.Abs() <= Bound+last.slack+next.slack {
		return nil
	}
	return newStep(next.reading().Add(-moved), next.reading())
}

// aheadOf is how far the reading of next is ahead of a note that another replica wrote
// between two looks; nil: it is not. With a store's clock all replicas read that.
func aheadOf(last, next *look, o *Options) *step {
	if last == nil || next.note == nil || o.Store != nil || last.noteIs == next.noteIs || next.note.GetReplica() == o.Replica {
		return nil
	}
	noted := record.Time(next.note.GetTime())
	if next.reading().Sub(noted) <= next.at-last.at+o.Interval+Bound {
		return nil
	}
	return &step{ahead, noted, next.reading()}
}

// decide says whether the reading of l is trusted, in l. suspect is a step that the
// process saw and that was not noted.
func decide(l *look, suspect *step, o *Options) {
	now, noted := l.reading(), time.Time{}
	if l.note != nil {
		noted = record.Time(l.note.GetTime())
		since := now.Sub(noted)
		if suspect != nil && l.note.GetReplica() != o.Replica && since >= -Bound && since <= 2*o.Interval {
			suspect = nil // the counter of this process stood still
		}
	}
	l.suspect, l.problem, l.recorded = suspect, nil, false
	switch {
	case l.note.GetCause() != 0:
		l.problem = &step{cause(l.note.GetCause()), record.Time(l.note.GetFrom()), record.Time(l.note.GetTo())}
		l.recorded = true
	case suspect != nil:
		l.problem = suspect
	case l.note == nil:
	case noted.Sub(now) > Bound+l.slack:
		l.problem = newStep(noted, now)
	case now.Sub(noted) > o.MaxDowntime:
		l.problem = &step{gap, noted, now}
	}
}

// Lead notes the reading at once and then once a minute, until ctx ends. Every
// write compares fence.
func (t *Trusted) Lead(ctx context.Context, fence meta.Cond) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	from := time.Duration(-1) // elapsed at the last note
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		at, err := t.noteNow(ctx, fence, from)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			t.notes.Failed(err)
		default:
			t.notes.Passed()
			from = at
		}
		timer.Reset(t.o.Interval)
	}
}

// Follow looks at the notes of other replicas until ctx ends, so that a process whose
// clock is ahead of theirs knows it before it leads. With a store's clock there is
// nothing to do.
func (t *Trusted) Follow(ctx context.Context) error {
	if t.o.Store != nil {
		return nil
	}
	ticker := time.NewTicker(lookInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		if _, err := t.current(ctx); err != nil && ctx.Err() == nil {
			t.o.Log.Warn("the notes of the clock could not be read; they are read again", zap.Error(err))
		}
	}
}

// noteNow looks and notes. from is when it did so last, as elapsed, below zero:
// not yet; the return is when it did now.
func (t *Trusted) noteNow(ctx context.Context, fence meta.Cond, from time.Duration) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, t.o.Interval)
	defer cancel()
	l, err := t.fresh(ctx)
	if err != nil {
		return from, err
	}
	steady := time.Duration(0)
	if from >= 0 {
		steady = l.at - from
	}
	rec := nextNote(l, t.o.Replica, steady)
	put := []meta.Op{meta.Put(keys.Clock, record.Encode(rec))}
	res, err := t.o.KV.Txn(ctx, meta.Txn{Name: "clock.note", If: []meta.Cond{l.noteIs, fence}, Then: put})
	if err != nil || !res.Succeeded { // another leads, or an operator recovered
		return from, err
	}
	t.mu.Lock()
	if t.suspect == l.suspect {
		t.suspect = nil
	}
	t.mu.Unlock()
	switch {
	case rec.GetCause() != 0 && !l.recorded:
		t.o.Log.Error("the clock is stopped", zap.Error(l.problem.err()))
	case rec.GetCause() == 0 && l.recorded:
		t.o.Log.Info("the clock is trusted again after a day of steady clocks", zap.Time("reading", l.reading()))
	}
	return l.at, nil
}

// nextNote is the note that follows the look l. steady is the time that has elapsed
// in this leader since the note before.
func nextNote(l *look, replica string, steady time.Duration) *storagev1.Clock {
	rec := &storagev1.Clock{Format: record.Format, Time: record.Nanos(l.reading()), Replica: replica}
	p := l.problem
	if p == nil {
		return rec
	}
	if l.recorded {
		moved := l.suspect != nil || record.Time(l.note.GetTime()).Sub(l.reading()) > Bound+l.slack
		if rec.Steady = l.note.GetSteady() + int64(steady); moved {
			rec.Steady = 0
		}
		if time.Duration(rec.GetSteady()) >= steadyTime {
			rec.Steady = 0
			return rec
		}
		if l.suspect != nil {
			p = l.suspect
		}
	}
	rec.Cause, rec.From, rec.To = uint32(p.cause), record.Nanos(p.from), record.Nanos(p.to)
	return rec
}

// Recover has the clock trusted as it is now. It returns whether it was stopped,
// and the reading. A repeat is success.
func (t *Trusted) Recover(ctx context.Context) (wasStopped bool, now time.Time, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, time.Time{}, err
		}
		l, err := t.fresh(ctx)
		if err != nil {
			return false, time.Time{}, fmt.Errorf("recover the clock: %w", err)
		}
		rec := &storagev1.Clock{Format: record.Format, Time: record.Nanos(l.reading()), Replica: t.o.Replica}
		put := []meta.Op{meta.Put(keys.Clock, record.Encode(rec))}
		res, err := t.o.KV.Txn(ctx, meta.Txn{Name: "clock.recover", If: []meta.Cond{l.noteIs}, Then: put})
		if err != nil {
			return false, time.Time{}, fmt.Errorf("recover the clock: %w", err)
		}
		if !res.Succeeded {
			continue
		}
		if l.problem != nil {
			t.o.Log.Info("the clock is trusted again: an operator says so",
				zap.Stringer("was", l.problem), zap.Time("reading", l.reading()))
		}
		t.forget()
		return l.problem != nil, l.reading(), nil
	}
	return false, time.Time{}, fmt.Errorf("recover the clock: %w: gave up after %d attempts", ErrConflict, maxAttempts)
}

// forget drops the suspicion and the last verdict, so that the next reading looks.
func (t *Trusted) forget() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.suspect = nil
	if t.last != nil {
		trusted := *t.last
		trusted.problem, trusted.suspect = nil, nil
		t.last = &trusted
	}
}
