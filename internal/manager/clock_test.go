package manager

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/hosts"
)

// on configures a replica that runs on a host. With alone, its object store is a
// directory of the host.
func (e *env) on(h *hosts.Host, alone bool) func(*testOptions) {
	h.Boot()
	return func(o *testOptions) {
		o.Now = h.Now
		if alone {
			o.Stores = map[string]object.Store{"default": onHost{o.Stores["default"], h}}
		}
		co := clock.Options{KV: o.KV, Clock: h, Alias: "default", Replica: o.Replica, Log: o.Log}
		if !alone {
			co.Store = o.Stores["default"]
		}
		o.Clock = clock.New(co)
	}
}

// onHost is an object store with the clock of a host.
type onHost struct {
	object.Store
	h *hosts.Host
}

func (s onHost) Now(context.Context) (time.Time, error) { return s.h.Now(), nil }

func (e *env) left(r *testReplica) int {
	e.t.Helper()
	list, _, err := r.List(e.t.Context(), Filter{}, Place{}, 1000)
	if err != nil {
		e.t.Fatal(err)
	}
	return len(list)
}

func (e *env) createTTL(r *testReplica, col catalog.Collection, name string, ttl time.Duration) *snapshot.Record {
	e.t.Helper()
	sp := spec(col, name)
	sp.TTL = ttl
	s, err := r.Create(e.t.Context(), request.Token{}, sp)
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// TestTTLWithSkewedCreatorClock checks that a ttl starts at the trusted reading, not at
// the creating replica's clock.
func TestTTLWithSkewedCreatorClock(t *testing.T) {
	for _, by := range []time.Duration{-24 * time.Hour, -2 * time.Hour, 2 * time.Hour} {
		inEnv(t, func(t *testing.T, e *env) {
			a := e.start("a")
			settle()
			b := e.start("b", e.on(hosts.Off(by), false))
			col, _, _ := e.collection(a, "c")
			e.createTTL(b, col, "short", time.Hour)
			time.Sleep(59 * time.Minute)
			settle()
			if e.left(a) != 1 {
				t.Errorf("off by %v: a snapshot with a ttl of one hour is gone after 59 minutes", by)
			}
			time.Sleep(3 * time.Minute)
			settle()
			if e.left(a) != 0 {
				t.Errorf("off by %v: a snapshot with a ttl of one hour is there after 62 minutes", by)
			}
		})
	}
}

// TestDropTimeWithSkewedClock checks that readers get exactly the tolerance, whichever
// replica drops.
func TestDropTimeWithSkewedClock(t *testing.T) {
	for _, by := range []time.Duration{-2 * time.Hour, 2 * time.Hour} {
		inEnv(t, func(t *testing.T, e *env) {
			a := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
			settle()
			b := e.start("b", e.on(hosts.Off(by), false))
			col, _, _ := e.collection(a, "c")
			gone, _, _ := e.collection(a, "gone")
			s, other := e.segment(a, col, 0, 1, 9), e.segment(a, gone, 0, 1, 9)
			e.addWritten(a, col, s)
			e.addWritten(a, gone, other)
			e.dropSegments(b, col, s.ID)
			if _, err := b.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: gone.ID}, 0); err != nil {
				t.Fatal(err)
			}
			time.Sleep(58 * time.Minute)
			settle()
			if n := len(e.objectsUnder("data/")); n != 2 {
				t.Errorf("off by %v: %d of 2 files are left 58 minutes after the drop", by, n)
			}
			time.Sleep(6 * time.Minute)
			settle()
			if n := len(e.objectsUnder("data/")); n != 0 {
				t.Errorf("off by %v: %d files are left 64 minutes after the drop", by, n)
			}
		})
	}
}

// TestHostClockSteps checks that a host whose clock steps deletes nothing, before and
// after a restart, until RecoverClock.
func TestHostClockSteps(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		r := e.start("a", e.on(h, true))
		col, _, _ := e.collection(r, "c")
		e.createTTL(r, col, "month", 30*24*time.Hour)
		s, later := e.segment(r, col, 0, 1, 9), e.segment(r, col, 0, 1, 9)
		e.addWritten(r, col, s)
		e.add(r, col, later)
		e.checkpoint(r, col, 10, 10)
		e.dropSegments(r, col, s.ID)
		time.Sleep(time.Minute)
		h.Off.Set(365 * 24 * time.Hour) // wrong until NTP steps it back
		time.Sleep(10 * time.Minute)
		settle()
		check := func(when string) {
			t.Helper()
			if snapshots, files := e.left(r), len(e.objectsUnder("data/")); snapshots != 1 || files != 1 {
				t.Fatalf("%s: %d snapshots and %d files are left", when, snapshots, files)
			}
		}
		check("after a step of a year")
		// Calls that need the time fail; others succeed.
		wantUntrusted := func(what string, err error) {
			t.Helper()
			if !errors.Is(err, clock.ErrUntrusted) {
				t.Errorf("%s: %v, want %v", what, err, clock.ErrUntrusted)
			}
		}
		sp := spec(col, "short")
		sp.TTL = time.Hour
		_, err := r.Create(t.Context(), request.Token{}, sp)
		wantUntrusted("create with a ttl", err)
		_, err = r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
			catalog.SegmentChange{Drop: []int64{later.ID}})
		wantUntrusted("drop of a segment", err)
		_, err = r.Pin(t.Context(), request.Token{}, Ref{Name: "month"}, PinSpec{Owner: "me", TTL: time.Hour})
		wantUntrusted("pin with a ttl", err)
		_, err = r.Restore(t.Context(), request.Token{},
			&RestoreSpec{Snapshot: Ref{Name: "month"}, DB: "default", Name: "copy", Timeout: time.Hour})
		wantUntrusted("restore with a timeout", err)
		_, err = r.Collect(t.Context(), collect.CycleOptions{Collection: catalog.Ref{ID: col.ID}})
		wantUntrusted("round", err)
		e.create(r, col, "forever")
		if err := dropByName(t.Context(), r, "forever"); err != nil {
			t.Error(err)
		}
		if !r.Stats().ClockStopped {
			t.Error("the state is not in the stats")
		}
		r.stop()
		r = e.start("b", e.on(h, true))
		time.Sleep(10 * time.Minute)
		settle()
		check("after a restart")
		h.Off.Set(0)
		time.Sleep(10 * time.Minute)
		settle()
		check("after the step back")
		if was, _, err := r.RecoverClock(t.Context()); !was || err != nil {
			t.Fatal(was, err)
		}
		time.Sleep(4 * time.Hour)
		settle()
		if snapshots, files := e.left(r), len(e.objectsUnder("data/")); snapshots != 1 || files != 0 {
			t.Errorf("after recover: %d snapshots and %d files are left", snapshots, files)
		}
		e.dropSegments(r, col, later.ID)
	})
}

func dropByName(ctx context.Context, r *testReplica, name string) error {
	_, err := r.Drop(ctx, request.Token{}, Ref{Name: name}, 0)
	return err
}

// TestDowntimeAndExpiry checks that snapshots that expired during a downtime are
// dropped after it, and that an unexplained gap of the clock expires nothing.
func TestDowntimeAndExpiry(t *testing.T) {
	for days, want := range map[int]int{30: 0, 36: 1} {
		inEnv(t, func(t *testing.T, e *env) {
			h := &hosts.Host{}
			r := e.start("a", e.on(h, true))
			col, _, _ := e.collection(r, "c")
			e.createTTL(r, col, "week", 7*24*time.Hour)
			settle()
			r.stop()
			h.Slept.Add(time.Duration(days) * 24 * time.Hour)
			r = e.start("a", e.on(h, true))
			time.Sleep(10 * time.Minute)
			settle()
			if n := e.left(r); n != want {
				t.Errorf("%d snapshots are left after %d days, want %d", n, days, want)
			}
		})
	}
}

// TestSleepingHost checks that a host continues after it slept for a night.
func TestSleepingHost(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		r := e.start("a", e.on(h, true))
		col, _, _ := e.collection(r, "c")
		e.createTTL(r, col, "hour", time.Hour)
		time.Sleep(time.Minute)
		h.Slept.Set(8 * time.Hour)
		time.Sleep(2 * time.Minute)
		settle()
		if n := e.left(r); n != 0 || r.Stats().ClockStopped {
			t.Errorf("%d snapshots are left, stopped: %v", n, r.Stats().ClockStopped)
		}
	})
}

// TestRestoreDeadlineAndClocks checks that a deadline is stamped and judged by the
// trusted reading when the clocks of the admitting replica and the leader differ.
func TestRestoreDeadlineAndClocks(t *testing.T) {
	for _, off := range []struct{ leader, other time.Duration }{
		{0, -10 * time.Minute},
		{10 * time.Minute, 0},
		{0, 10 * time.Minute},
	} {
		inEnv(t, func(t *testing.T, e *env) {
			a := e.start("a", e.on(hosts.Off(off.leader), false))
			settle()
			b := e.start("b", e.on(hosts.Off(off.other), false))
			col, _, _ := e.collection(a, "c")
			s := e.segment(a, col, 0, 1, 9)
			e.addWritten(a, col, s)
			e.checkpoint(a, col, 10, 10)
			e.create(a, col, "s")
			job, err := b.Restore(t.Context(), request.Token{}, &RestoreSpec{
				Snapshot: Ref{Name: "s"}, DB: "default", Name: "copy", Timeout: 5 * time.Minute,
			})
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(4 * time.Minute)
			settle()
			got, err := a.Jobs.Get(t.Context(), job.ID)
			if err != nil || got.Job.State != copyjob.Completed {
				t.Errorf("%+v: %v, %v", off, got, err)
			}
		})
	}
}

// TestWorkerMeasuresTheClock checks that a worker knows how far its host's clock is off
// before it is registered, also in a replica that measures for no other reason.
func TestWorkerMeasuresTheClock(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		e.start("leader", func(o *testOptions) { o.Parts.Slots = -1 })
		settle()
		r := e.start("a", e.on(hosts.Off(-24*time.Hour), false))
		r.kv.Hook(func(meta.Call) meta.Fault {
			if len(e.keysUnder(keys.WorkerPrefix)) > 0 && r.Stats().ClockSkew == 0 {
				t.Error("the worker is registered, and the clock is not measured")
			}
			return meta.NoFault
		})
		settle()
		time.Sleep(time.Minute)
		settle()
		if n := len(e.keysUnder(keys.WorkerPrefix)); n != 1 {
			t.Errorf("%d workers", n)
		}
		r.kv.Hook(nil)
	})
}

// TestFinishTimeWithSkewedWorkerClock checks that the finish time of a task is the
// trusted reading, by which a stalled job is detected.
func TestFinishTimeWithSkewedWorkerClock(t *testing.T) {
	for _, by := range []time.Duration{-24 * time.Hour, 24 * time.Hour} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", e.on(hosts.Off(by), false))
			col := e.richCollection(r, "c", copyjob.TaskSegments+1)
			s := e.create(r, col, "s")
			var last atomic.Int64 // segment of the second task, whose copy is blocked
			r.store.Plan(func(c object.Call) object.Fault {
				if c.Op == object.OpCopy && strings.Contains(c.Keys[len(c.Keys)-1], fmt.Sprintf("/%d/", last.Load())) {
					return object.FaultBefore
				}
				return object.FaultNone
			})
			job, err := r.Restore(t.Context(), request.Token{}, restoreSpecOf(s))
			if err != nil {
				t.Fatal(err)
			}
			last.Store(job.FirstSegment + copyjob.TaskSegments)
			time.Sleep(time.Minute)
			settle()
			done := 0
			for _, key := range e.keysUnder(keys.TaskPrefix(job.ID)) {
				kv, _, _, err := e.kv.Get(t.Context(), key)
				rec := &storagev1.Task{}
				if err == nil {
					err = record.Decode(kv, rec)
				}
				if err != nil {
					t.Fatal(err)
				}
				if rec.GetFinishTime() == 0 {
					continue
				}
				done++
				if at := record.Time(rec.GetFinishTime()); time.Since(at).Abs() > 2*time.Minute {
					t.Errorf("off by %v: a task was done at %v, and it is %v", by, at, time.Now())
				}
			}
			if done != 1 {
				t.Errorf("%d tasks are done, want the first", done)
			}
			r.store.Plan(nil)
			if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
				t.Errorf("%+v", end.Job)
			}
		})
	}
}

// TestExpiredButPinned checks that pinned snapshots cause no work when they expire,
// until the pin is removed.
func TestExpiredButPinned(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		idle := func(pinned int) int {
			r := e.start(fmt.Sprint("a", pinned), func(o *testOptions) { o.Parts.Collector.Off = true })
			defer r.stop()
			col, _, _ := e.collection(r, fmt.Sprint("c", pinned))
			for i := range pinned {
				s := e.createTTL(r, col, fmt.Sprint("s", i), time.Hour)
				e.put(keys.PinPrefix(s.ID)+"p", []byte{1})
			}
			time.Sleep(2 * time.Hour)
			settle()
			before := r.kv.Calls()
			for i := range 10 {
				e.create(r, col, fmt.Sprintf("new-%d-%d", pinned, i))
				settle()
			}
			time.Sleep(time.Hour)
			settle()
			return r.kv.Calls() - before
		}
		without, with := idle(0), idle(50)
		if with > without+100 { // with one attempt per pass there would be 50
			t.Errorf("%d calls with 50 expired and pinned snapshots, %d without", with, without)
		}
		r := e.start("b", func(o *testOptions) { o.Parts.Collector.Off = true })
		settle()
		n := e.left(r)
		s, err := r.Get(t.Context(), Ref{Name: "s7"})
		if err != nil {
			t.Fatal(err)
		}
		e.remove(keys.PinPrefix(s.ID) + "p")
		settle()
		if e.left(r) != n-1 {
			t.Error("the snapshot stays when its pin is gone")
		}
	})
}

func (e *env) remove(key string) {
	e.t.Helper()
	if _, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
		e.t.Fatal(err)
	}
}

// TestPinExpiresBeforeItsLease checks that a pin ends at its expire_time while its
// lease continues, as after a restart of etcd.
func TestPinExpiresBeforeItsLease(t *testing.T) {
	// again restarts the lease of a pin.
	again := func(t *testing.T, e *env, p *Pin) {
		t.Helper()
		kv, found, _, err := e.kv.Get(t.Context(), keys.Pin(p.Snapshot, p.ID))
		if err != nil || !found {
			t.Fatal(found, err)
		}
		if err := e.kv.KeepAlive(t.Context(), kv.Lease); err != nil {
			t.Fatal(err)
		}
	}
	pinned := func(t *testing.T, e *env, r *testReplica) (*snapshot.Record, *Pin) {
		t.Helper()
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "s")
		p, err := r.Pin(t.Context(), request.Token{}, Ref{ID: s.ID}, PinSpec{Owner: "me", TTL: time.Hour})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Minute)
		again(t, e, p)
		return s, p
	}
	t.Run("the leader removes it", func(t *testing.T) {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a")
			_, p := pinned(t, e, r)
			time.Sleep(3 * time.Minute)
			settle()
			if _, found, _, err := e.kv.Get(t.Context(), keys.Pin(p.Snapshot, p.ID)); found || err != nil {
				t.Errorf("the pin is there: %v, %v", found, err)
			}
		})
	})
	t.Run("readers and a drop do not wait for that", func(t *testing.T) {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", func(o *testOptions) { o.CleanInterval = 24 * time.Hour })
			s, p := pinned(t, e, r)
			if list, _, err := r.Pins(t.Context(), s.ID, PinPlace{}, 10); len(list) != 1 || err != nil {
				t.Fatal(list, err)
			}
			if err := dropByName(t.Context(), r, "s"); !errors.Is(err, ErrSnapshotPinned) {
				t.Fatalf("drop of a pinned snapshot: %v", err)
			}
			time.Sleep(time.Minute)
			if list, _, err := r.Pins(t.Context(), s.ID, PinPlace{}, 10); len(list) != 0 || err != nil {
				t.Errorf("pins: %v, %v", list, err)
			}
			_, err := r.RenewPin(t.Context(), Ref{ID: s.ID}, p.ID, 0)
			wantError(t, err, ErrPinNotFound)
			if err := dropByName(t.Context(), r, "s"); err != nil {
				t.Errorf("drop: %v", err)
			}
		})
	})
}

// TestTokenExpiresBeforeItsLease checks that a request token ends at its expire_time
// while its lease continues.
func TestTokenExpiresBeforeItsLease(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		tok := token("t", "request")
		if _, err := r.Create(t.Context(), tok, spec(col, "s")); err != nil {
			t.Fatal(err)
		}
		there := func() bool {
			kv, found, _, err := e.kv.Get(t.Context(), tok.Key())
			if err != nil {
				t.Fatal(err)
			}
			if found { // as when etcd restarts
				if err := e.kv.KeepAlive(t.Context(), kv.Lease); err != nil {
					t.Fatal(err)
				}
			}
			return found
		}
		time.Sleep(24 * time.Hour)
		settle()
		if !there() {
			t.Error("the record is gone after a day")
		}
		time.Sleep(3 * time.Hour)
		settle()
		if there() {
			t.Error("the record is there after 27 hours")
		}
	})
}

// TestUpdateTTL checks that a ttl set by an update starts at the same time on every
// replica.
func TestUpdateTTL(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		settle()
		b := e.start("b", e.on(hosts.Off(-3*time.Hour), false))
		col, _, _ := e.collection(a, "c")
		s := e.create(a, col, "s")
		ttl := time.Hour
		got, err := b.Update(t.Context(), request.Token{}, Ref{ID: s.ID}, UpdateSpec{TTL: &ttl})
		if err != nil || time.Until(got.ExpireTime.Add(-ttl)).Abs() > time.Minute {
			t.Fatalf("it expires at %v, err = %v", got.ExpireTime, err)
		}
		for _, wrong := range []time.Duration{0, -1, 101 * 366 * 24 * time.Hour} {
			_, err := b.Update(t.Context(), request.Token{}, Ref{ID: s.ID}, UpdateSpec{TTL: &wrong})
			wantError(t, err, catalog.ErrInvalid)
		}
		time.Sleep(63 * time.Minute)
		settle()
		if e.left(a) != 0 {
			t.Error("it is there")
		}
	})
}

// TestClockStepDuringCreate checks that a clock step during a create with a ttl aborts
// the create without remains.
func TestClockStepDuringCreate(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		h := &hosts.Host{}
		r := e.start("a", e.on(h, true))
		col, _, _ := e.collection(r, "c")
		settle()
		r.store.SetLatency(10 * time.Second)
		tok := token("t", "request")
		sp := spec(col, "s")
		sp.TTL = time.Hour
		ended := make(chan error, 1)
		go func() {
			_, err := r.Create(t.Context(), tok, sp)
			ended <- err
		}()
		time.Sleep(5 * time.Second)
		h.Off.Set(time.Hour)
		wantError(t, <-ended, ErrCreateAborted)
		_, err := r.Create(t.Context(), tok, sp)
		wantError(t, err, ErrCreateAborted)
		r.store.SetLatency(0)
		time.Sleep(2 * time.Minute)
		settle()
		if list := e.check(r); len(list) != 0 {
			t.Errorf("left: %v", list)
		}
		e.create(r, col, "s")
	})
}
