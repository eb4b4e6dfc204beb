package clock_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/test/hosts"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// env is a pair of stores and the clocks of some hosts.
type env struct {
	t        *testing.T
	kv       *metamemory.Store
	store    *object.Faulty
	storeOff hosts.Shift
	logs     *observer.ObservedLogs
	log      *zap.Logger
}

func inEnv(t *testing.T, fn func(t *testing.T, e *env)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		e := &env{t: t, kv: metamemory.New(metamemory.Options{Now: time.Now})}
		storeNow := func() time.Time { return time.Now().Add(e.storeOff.Get()) }
		e.store = object.NewFaulty(objectmemory.New(objectmemory.Options{Now: storeNow}))
		core, logs := observer.New(zap.InfoLevel)
		e.log, e.logs = zap.New(core), logs
		fn(t, e)
	})
}

// pass advances the time, and waits for due work.
func pass(d time.Duration) {
	time.Sleep(d)
	virtual.Wait()
}

// process returns a process on a host. With store, the object store has a separate clock.
func (e *env) process(h *hosts.Host, replica string, store bool) *clock.Trusted {
	h.Boot()
	o := clock.Options{KV: e.kv, Clock: h, Replica: replica, Log: e.log, Alias: "default"}
	if store {
		o.Store = e.store
	}
	return clock.New(o)
}

// lead makes c lead until stop is called.
func (e *env) lead(c *clock.Trusted) (stop func()) {
	ctx, cancel := context.WithCancel(e.t.Context())
	done := make(chan error, 1)
	go func() { done <- c.Lead(ctx, meta.Absent("/no/such/key")) }()
	virtual.Wait()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			e.t.Error(err)
		}
	}
	e.t.Cleanup(stop)
	return stop
}

func (e *env) judge(c *clock.Trusted) time.Time {
	e.t.Helper()
	now, err := c.Judge(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return now
}

func (e *env) stamp(c *clock.Trusted) time.Time {
	e.t.Helper()
	now, err := c.Stamp(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return now
}

func (e *env) untrusted(c *clock.Trusted, stamps bool) {
	e.t.Helper()
	if _, err := c.Judge(e.t.Context()); !errors.Is(err, clock.ErrUntrusted) ||
		!strings.Contains(err.Error(), "recover --clock") {
		e.t.Errorf("judge: %v, want ErrUntrusted with the remedy", err)
	}
	if _, err := c.Stamp(e.t.Context()); (err == nil) != stamps || err != nil && !errors.Is(err, clock.ErrUntrusted) {
		e.t.Errorf("stamp: %v, want stamps = %v", err, stamps)
	}
}

func near(t *testing.T, got, want time.Time) {
	t.Helper()
	if d := got.Sub(want).Abs(); d > 2*time.Second {
		t.Errorf("reading %v is %v from %v", got, d, want)
	}
}

func TestReadings(t *testing.T) {
	for _, c := range []struct {
		name              string
		own               time.Duration // against the store's clock
		store             bool
		wantStamp, wantBy time.Duration // against the store's clock
	}{
		{"ahead within a minute", 40 * time.Second, true, 40 * time.Second, 0},
		{"behind within a minute", -40 * time.Second, true, 0, -40 * time.Second},
		{"far behind", -2 * time.Hour, true, 0, 0},
		{"far ahead", 10 * time.Minute, true, 0, 0},
		{"alone", 10 * time.Minute, false, 10 * time.Minute, 10 * time.Minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				p := e.process(hosts.Off(c.own), "a", c.store)
				near(t, e.stamp(p), time.Now().Add(c.wantStamp))
				near(t, e.judge(p), time.Now().Add(c.wantBy))
				near(t, p.Display(), time.Now().Add(c.wantStamp))
				if skew := p.Skew(); c.store && (skew-c.own).Abs() > time.Second {
					t.Errorf("skew = %v", skew)
				}
				pass(time.Hour)
				near(t, e.stamp(p), time.Now().Add(c.wantStamp))
				want := 0
				if c.store && c.own.Abs() > time.Minute {
					want = 1
				}
				if n := e.logs.FilterMessageSnippet("over a minute off").Len(); n != want {
					t.Errorf("logged %d times, want %d", n, want)
				}
			})
		})
	}
}

// A lifetime that one replica stamps and another judges never ends early.
func TestReadingsOfTwoReplicas(t *testing.T) {
	offs := []time.Duration{-time.Hour, -50 * time.Second, 0, 50 * time.Second, time.Hour}
	for _, a := range offs {
		for _, b := range offs {
			inEnv(t, func(t *testing.T, e *env) {
				stamp := e.stamp(e.process(hosts.Off(a), "a", true))
				if judge := e.judge(e.process(hosts.Off(b), "b", true)); judge.After(stamp.Add(2 * time.Second)) {
					t.Errorf("%v, %v: judged %v after the stamp", a, b, judge.Sub(stamp))
				}
			})
		}
	}
}

func TestReadingsAreCached(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		p := e.process(&hosts.Host{}, "a", true)
		for range 1000 {
			e.stamp(p)
			e.judge(p)
		}
		if n := e.store.Calls(object.OpNow); n != 1 {
			t.Errorf("%d requests for the store's clock", n)
		}
	})
}

func TestStep(t *testing.T) {
	for _, c := range []struct {
		name       string
		own, other time.Duration // movement of the clocks
		store      bool
		stops      bool
	}{
		{"a year forward", 365 * 24 * time.Hour, 0, false, true},
		{"two minutes forward", 2 * time.Minute, 0, false, true},
		{"two minutes backward", -2 * time.Minute, 0, false, true},
		{"half a minute", 30 * time.Second, 0, false, false},
		{"both clocks of one host", 365 * 24 * time.Hour, 365 * 24 * time.Hour, true, true},
		{"only the store's", 0, time.Hour, true, true},
		{"own clock, steady store", time.Hour, 0, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				h := &hosts.Host{}
				p := e.process(h, "a", c.store)
				stop := e.lead(p)
				e.judge(p)
				h.Off.Add(c.own)
				e.storeOff.Add(c.other)
				if c.store { // else the process detects it immediately
					pass(time.Minute)
				}
				if !c.stops {
					near(t, e.judge(p), time.Now().Add(c.own*time.Duration(map[bool]int{true: 0, false: 1}[c.store])))
					return
				}
				e.untrusted(p, false)
				pass(2 * time.Minute)
				if e.logs.FilterMessage("the clock is stopped").Len() != 1 {
					t.Errorf("logs: %v", e.logs.All())
				}
				if p.Stopped() == "" {
					t.Error("Stopped is empty")
				}
				// The stop is durable, also after the clock steps back.
				stop()
				e.untrusted(e.process(hosts.Off(h.Off.Get()), "b", c.store), false)
			})
		})
	}
}

// steppingClock is the clock of a host that steps by a year before one of the calls of Now.
type steppingClock struct {
	*hosts.Host
	left int // calls of Now before the step
}

func (c *steppingClock) Now() time.Time {
	if c.left--; c.left == -1 {
		c.Off.Set(365 * 24 * time.Hour)
	}
	return c.Host.Now()
}

// TestStepDuringReading steps the clock before each of the times that a reading looks at it.
func TestStepDuringReading(t *testing.T) {
	for name, read := range map[string]func(*clock.Trusted, context.Context) (time.Time, error){
		"stamp": (*clock.Trusted).Stamp, "judge": (*clock.Trusted).Judge,
		"peek": func(c *clock.Trusted, _ context.Context) (time.Time, error) {
			now, ok := c.Peek()
			if !ok {
				return time.Time{}, clock.ErrUntrusted
			}
			return now, nil
		},
	} {
		for n, stepped := 0, true; stepped; n++ {
			inEnv(t, func(t *testing.T, e *env) {
				h := &steppingClock{Host: &hosts.Host{}, left: -1}
				h.Boot()
				c := clock.New(clock.Options{KV: e.kv, Clock: h, Replica: "a", Log: e.log, Alias: "default"})
				defer e.lead(c)()
				e.judge(c)
				h.left = n
				now, err := read(c, t.Context())
				if stepped = h.Off.Get() != 0; err == nil {
					near(t, now, time.Now())
				} else if !errors.Is(err, clock.ErrUntrusted) || !stepped {
					t.Errorf("%s, step before look %d: %v", name, n, err)
				}
				h.left = -1
			})
		}
	}
}

// The sleep of a host is not a step.
func TestSuspend(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		p := e.process(h, "a", false)
		e.lead(p)
		h.Slept.Set(8 * time.Hour)
		near(t, e.judge(p), time.Now().Add(8*time.Hour))
		pass(2 * time.Minute)
		e.judge(p)
	})
}

func TestDowntime(t *testing.T) {
	for _, c := range []struct {
		down  time.Duration // by the wall clock
		stops bool
	}{
		{30 * 24 * time.Hour, false},
		{36 * 24 * time.Hour, true},
		{-30 * time.Second, false},
		{-2 * time.Minute, true},
	} {
		t.Run(c.down.String(), func(t *testing.T) {
			inEnv(t, func(_ *testing.T, e *env) {
				stop := e.lead(e.process(&hosts.Host{}, "a", false))
				stop()
				p := e.process(hosts.Off(c.down), "b", false)
				if !c.stops {
					e.judge(p)
					e.lead(p)
					e.judge(p)
					return
				}
				e.untrusted(p, c.down > 0)
				e.lead(p)
				e.untrusted(p, c.down > 0)
			})
		})
	}
}

func TestRecover(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		p := e.process(h, "a", false)
		if was, _, err := p.Recover(t.Context()); was || err != nil {
			t.Errorf("recover of a running clock: %v, %v", was, err)
		}
		e.lead(p)
		h.Off.Set(time.Hour)
		pass(time.Minute)
		e.untrusted(p, false)
		other := e.process(hosts.Off(time.Hour), "b", false)
		was, now, err := other.Recover(t.Context())
		if !was || err != nil {
			t.Fatal(was, err)
		}
		near(t, now, time.Now().Add(time.Hour))
		near(t, e.judge(p), now)
		if was, _, err := p.Recover(t.Context()); was || err != nil {
			t.Errorf("a repeat: %v, %v", was, err)
		}
		pass(time.Hour)
		e.judge(p)
	})
}

func TestDayOfSteadyClocks(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		p := e.process(h, "a", false)
		stop := e.lead(p)
		h.Off.Set(time.Hour)
		pass(12 * time.Hour)
		h.Off.Set(0) // another step: the day restarts
		pass(13 * time.Hour)
		e.untrusted(p, false)
		// The steady time of a leader counts for the next; the time between leaders does not.
		stop()
		pass(20 * time.Hour)
		p = e.process(&hosts.Host{}, "b", false)
		e.lead(p)
		pass(10 * time.Hour)
		e.untrusted(p, false)
		pass(2 * time.Hour)
		near(t, e.judge(p), time.Now())
		if e.logs.FilterMessageSnippet("a day of steady clocks").FilterLevelExact(zap.InfoLevel).Len() != 1 {
			t.Errorf("logs: %v", e.logs.All())
		}
	})
}

// A process whose counter stopped, as in a paused virtual machine, does not stop others.
func TestPausedProcess(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		e.lead(e.process(&hosts.Host{}, "a", true))
		h := &hosts.Host{}
		p := e.process(h, "b", true)
		e.judge(p)
		pass(time.Hour)
		h.Reboot(h.Booted().Add(time.Hour)) // its elapsed time lacks the hour
		near(t, e.judge(p), time.Now())
	})
}

// Without a store's clock a replica that is ahead of the leader neither stamps nor judges,
// before and after it leads; other replicas do.
func TestAheadOfTheLeader(t *testing.T) {
	for _, c := range []struct {
		by    time.Duration
		stops bool
	}{
		{0, false},
		{50 * time.Second, false},
		{10 * time.Minute, true},
		{10 * time.Hour, true},
		{30 * 24 * time.Hour, true},
	} {
		t.Run(c.by.String(), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				stop := e.lead(e.process(&hosts.Host{}, "a", false))
				h := hosts.Off(c.by)
				p := e.process(h, "b", false)
				ctx, cancel := context.WithCancel(t.Context())
				followed := make(chan error, 1)
				go func() { followed <- p.Follow(ctx) }()
				defer func() {
					cancel()
					if err := <-followed; err != nil {
						t.Error(err)
					}
				}()
				pass(5 * time.Minute)
				if !c.stops {
					near(t, e.judge(p), time.Now().Add(c.by))
					stop()
					e.lead(p)
					near(t, e.judge(p), time.Now().Add(c.by))
					return
				}
				e.untrusted(p, false)
				if _, ok := p.Peek(); ok {
					t.Error("a replica that is ahead returned a reading")
				}
				// After a correction it agrees with the leader; ahead again, it must not lead.
				h.Off.Set(0)
				pass(2 * time.Minute)
				near(t, e.judge(p), time.Now())
				h.Off.Set(c.by)
				pass(2 * time.Minute)
				stop()
				e.lead(p)
				e.untrusted(p, false)
				pass(5 * time.Minute)
				e.untrusted(p, false)
			})
		})
	}
}

func TestSilentStore(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		silent := false
		e.store.Plan(func(object.Call) object.Fault {
			if silent {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		silent = true
		p := e.process(hosts.Off(-time.Hour), "a", true)
		if _, err := p.Stamp(t.Context()); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("stamp without a measurement: %v", err)
		}
		silent = false
		e.stamp(p)
		silent = true
		pass(23 * time.Hour)
		near(t, e.stamp(p), time.Now())
		pass(2 * time.Hour)
		if _, err := p.Stamp(t.Context()); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("stamp by a measurement that is 25 h old: %v", err)
		}
		silent = false
		e.stamp(p)
	})
}

// An unwritten step is not forgotten.
func TestStopWithoutReply(t *testing.T) {
	inEnv(t, func(_ *testing.T, e *env) {
		h := &hosts.Host{}
		kv := meta.NewFaulty(e.kv)
		h.Reboot(time.Now())
		p := clock.New(clock.Options{KV: kv, Clock: h, Replica: "a"})
		e.lead(p)
		h.Off.Set(time.Hour)
		kv.FailNth(0, meta.Before, meta.MethodTxn)
		pass(time.Minute)
		e.untrusted(p, false)
		pass(time.Minute)
		e.untrusted(e.process(hosts.Off(time.Hour), "b", false), false)
	})
}

func TestSystem(t *testing.T) {
	c := clock.System{}
	a := c.Elapsed()
	if b := c.Elapsed(); b < a || a <= 0 {
		t.Errorf("elapsed went from %v to %v", a, b)
	}
	near(t, c.Now(), time.Now())
}
