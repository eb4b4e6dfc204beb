package admit_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/admit"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// env is a cluster with one object store.
type env struct {
	t       *testing.T
	kv      meta.KV
	objects *object.Faulty
	clock   time.Duration // the replica's, ahead
}

func newEnv(t *testing.T) *env {
	return &env{
		t, metamemory.New(metamemory.Options{Now: time.Now}),
		object.NewFaulty(memory.New(memory.Options{Now: time.Now})), 0,
	}
}

// open is what a start makes.
func (e *env) open(change ...func(*admit.Options)) *admit.Store {
	o := admit.Options{
		Store: e.objects, Alias: "a", KV: e.kv, Cluster: "c1", Fingerprint: []byte("one"),
		Now: func() time.Time { return time.Now().Add(e.clock) }, Rand: rand.Reader, Log: zaptest.NewLogger(e.t),
	}
	for _, c := range change {
		c(&o)
	}
	return admit.New(o)
}

// start has the cluster know the store.
func (e *env) start() {
	e.t.Helper()
	if err := e.open().Attempt(e.t.Context()); err != nil {
		e.t.Fatal(err)
	}
}

// down has the store answer nothing.
func (e *env) down() { e.objects.Plan(func(object.Call) object.Fault { return object.FaultBefore }) }

func (e *env) up() { e.objects.Plan(nil) }

// calls counts the calls that reach the store.
func (e *env) calls(do func()) int {
	before := e.objects.Calls("")
	do()
	return e.objects.Calls("") - before
}

func TestContract(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store {
		s := admit.New(admit.Options{
			Store: memory.New(memory.Options{}), Alias: "a", KV: metamemory.New(metamemory.Options{Now: time.Now}),
			Cluster: "c1",
			Now:     time.Now, Rand: rand.Reader, Log: zaptest.NewLogger(t),
		})
		if err := s.Attempt(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(t.Context(), identity.Key); err != nil { // the suite wants an empty store
			t.Fatal(err)
		}
		return s
	})
}

// A closed store is not touched by any call, and each says that it does not answer.
func TestClosed(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		s, ctx := e.open(), t.Context()
		if n := e.calls(func() {
			_, put := s.Put(ctx, "a", nil)
			_, create := s.Create(ctx, "a", nil)
			_, _, get := s.Get(ctx, "a", 0, -1)
			_, head := s.Head(ctx, "a")
			_, copied := s.Copy(ctx, object.CopyRequest{})
			_, abort := s.AbortUploads(ctx, "", time.Time{})
			_, oldest := s.OldestUpload(ctx, "")
			_, now := s.Now(ctx)
			_, features := s.Features(ctx, true)
			errs := []error{put, create, get, head, copied, abort, oldest, now, features, s.Delete(ctx, "a", "b")}
			for _, err := range s.List(ctx, "") {
				errs = append(errs, err)
			}
			if len(errs) != 11 {
				t.Errorf("%d errors", len(errs))
			}
			for i, err := range errs {
				if !errors.Is(err, object.ErrUnavailable) {
					t.Errorf("call %d: got %v", i, err)
				}
			}
		}); n != 0 {
			t.Errorf("%d calls reached it", n)
		}
	})
}

// A start of a replica whose store is down goes on by itself, without a probe, for
// what one found is remembered.
func TestDownAtTheStart(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.start()
		e.down()
		s := e.open()
		err := s.Attempt(t.Context())
		if !admit.Pending(err) || errors.Is(err, admit.ErrUnknown) {
			t.Errorf("got %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- s.Run(t.Context()) }()
		time.Sleep(10 * time.Minute)
		select {
		case <-s.Ready():
			t.Fatal("a store that does not answer is open")
		case err := <-done:
			t.Fatalf("Run ended: %v", err)
		default:
		}
		e.up()
		if n := e.calls(func() {
			began := time.Now()
			if err := <-done; err != nil {
				t.Error(err)
			}
			if took := time.Since(began); took > time.Minute {
				t.Errorf("it took %v", took)
			}
		}); n != 1 { // the identity
			t.Errorf("%d calls", n)
		}
		<-s.Ready()
		if f, err := s.Features(t.Context(), false); err != nil || f != (probe.Features{
			ConditionalCopy: true,
			MultipartCopy:   true,
		}) {
			t.Errorf("got %+v, %v", f, err)
		}
		if _, err := s.Put(t.Context(), "x", nil); err != nil {
			t.Error(err)
		}
	})
}

// A verdict is of one configuration and of a day; where there is none the probe is
// made, and one that could not find out leaves none.
func TestVerdict(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.objects.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpCopy {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		if err := e.open().Attempt(t.Context()); !admit.Pending(err) || !errors.Is(err, admit.ErrUnknown) {
			t.Errorf("copies that are not answered: got %v", err)
		}
		if _, found, _, err := e.kv.Get(t.Context(), keys.Verdict("a")); found || err != nil {
			t.Errorf("a probe that could not find out left a verdict: %v, %v", found, err)
		}
		e.up()
		for _, c := range []struct {
			name   string
			probed bool
			change func(*admit.Options)
			clock  time.Duration
		}{
			{"first", true, nil, 0},
			{"again", false, nil, 0},
			{"another configuration", true, func(o *admit.Options) { o.Fingerprint = []byte("two") }, 0},
			{"again", false, func(o *admit.Options) { o.Fingerprint = []byte("two") }, 23 * time.Hour},
			{"a day later", true, func(o *admit.Options) { o.Fingerprint = []byte("two") }, 25 * time.Hour},
			{"made in the future", true, func(o *admit.Options) { o.Fingerprint = []byte("two") }, 0},
		} {
			e.clock = c.clock
			n := e.calls(func() {
				s := e.open()
				if c.change != nil {
					s = e.open(c.change)
				}
				if err := s.Attempt(t.Context()); err != nil {
					t.Errorf("%s: %v", c.name, err)
				}
			})
			if (n > 2) != c.probed {
				t.Errorf("%s: %d calls", c.name, n)
			}
		}
	})
}

// A store of another cluster is refused before anything is written there: by an
// attempt, and by Run, which ends.
func TestAnotherStore(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.start()
		var mu sync.Mutex
		var writes []object.Op
		other := object.NewFaulty(memory.New(memory.Options{Now: time.Now}))
		if err := identity.Check(t.Context(), metamemory.New(metamemory.Options{Now: time.Now}), other, "a", "c2",
			rand.Reader); err != nil {
			t.Fatal(err)
		}
		answers := false
		other.Plan(func(c object.Call) object.Fault {
			mu.Lock()
			defer mu.Unlock()
			if !answers {
				return object.FaultBefore
			}
			if !slices.Contains([]object.Op{object.OpGet, object.OpHead, object.OpList, object.OpNow}, c.Op) {
				writes = append(writes, c.Op)
			}
			return object.FaultNone
		})
		s := e.open(func(o *admit.Options) { o.Store, o.Fingerprint = other, []byte("new") })
		if err := s.Attempt(t.Context()); !admit.Pending(err) {
			t.Errorf("got %v", err)
		}
		done := make(chan error, 1)
		go func() { done <- s.Run(t.Context()) }()
		time.Sleep(time.Minute)
		mu.Lock()
		answers = true
		mu.Unlock()
		if err := <-done; !errors.Is(err, identity.ErrOther) {
			t.Errorf("Run: got %v", err)
		}
		if err := s.Attempt(t.Context()); !errors.Is(err, identity.ErrOther) || admit.Pending(err) {
			t.Errorf("Attempt: got %v", err)
		}
		if len(writes) > 0 {
			t.Errorf("it was written to: %v", writes)
		}
	})
}

// What the caller adds is asked last, and keeps the store closed.
func TestCheck(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.start()
		fails := fmt.Errorf("check: %w", object.ErrDenied)
		s := e.open(func(o *admit.Options) { o.Check = func(context.Context) error { return fails } })
		if err := s.Attempt(t.Context()); !errors.Is(err, object.ErrDenied) || admit.Pending(err) {
			t.Errorf("got %v", err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx) }()
		time.Sleep(time.Hour) // a replica that serves goes on
		select {
		case err := <-done:
			t.Errorf("Run ended: %v", err)
		default:
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// refuseWrites has all calls that write end with a fault.
func (e *env) refuseWrites(fault object.Fault) {
	e.objects.Plan(func(c object.Call) object.Fault {
		if slices.Contains([]object.Op{object.OpPut, object.OpCreate, object.OpCopy}, c.Op) {
			return fault
		}
		return object.FaultNone
	})
}

// A store that is known and takes no write is read, listed and deleted from. It takes
// writes once the probe could be made, and none before.
func TestNoWritesAtTheStart(t *testing.T) {
	for name, c := range map[string]struct {
		fault object.Fault
		want  error
	}{
		"full":      {object.FaultFull, object.ErrFull},
		"no answer": {object.FaultBefore, object.ErrUnavailable},
		"denied":    {object.FaultBefore, object.ErrDenied}, // of a policy that lets it read
	} {
		t.Run(name, func(t *testing.T) {
			virtual.Test(t, func(t *testing.T) {
				e, ctx := newEnv(t), t.Context()
				e.start()
				if _, err := e.objects.Put(ctx, "old", nil); err != nil {
					t.Fatal(err)
				}
				e.refuseWrites(c.fault)
				s := e.open(func(o *admit.Options) {
					o.Fingerprint = []byte("two")
					if errors.Is(c.want, object.ErrDenied) {
						o.Store = denying{e.objects}
					}
				})
				if err := s.Attempt(ctx); err != nil {
					t.Fatalf("an attempt: %v", err)
				}
				<-s.Ready()
				if _, err := s.Head(ctx, "old"); err != nil {
					t.Errorf("head: %v", err)
				}
				if err := s.Delete(ctx, "old"); err != nil {
					t.Errorf("delete: %v", err)
				}
				if _, err := s.Now(ctx); err != nil {
					t.Errorf("now: %v", err)
				}
				for _, err := range s.List(ctx, "") {
					if err != nil {
						t.Errorf("list: %v", err)
					}
				}
				if s.NoWrites() == nil {
					t.Error("it says that it takes writes")
				}
				if n := e.calls(func() {
					_, put := s.Put(ctx, "a", nil)
					_, create := s.Create(ctx, "a", nil)
					_, copied := s.Copy(ctx, object.CopyRequest{})
					_, features := s.Features(ctx, false)
					for i, err := range []error{put, create, copied, features} {
						if !errors.Is(err, c.want) {
							t.Errorf("call %d: got %v", i, err)
						}
					}
				}); n != 0 {
					t.Errorf("%d calls reached a store that was not tried out", n)
				}
				done := make(chan error, 1)
				go func() { done <- s.Run(ctx) }()
				time.Sleep(10 * time.Minute)
				e.up()
				began := time.Now()
				if err := <-done; err != nil {
					t.Error(err)
				}
				if took := time.Since(began); took > time.Minute {
					t.Errorf("it took %v", took)
				}
				if _, err := s.Put(ctx, "a", nil); err != nil {
					t.Error(err)
				}
				if f, err := s.Features(ctx, false); err != nil || !f.ConditionalCopy {
					t.Errorf("features: %+v, %v", f, err)
				}
				if err := s.NoWrites(); err != nil {
					t.Errorf("it takes writes, and says %v", err)
				}
			})
		})
	}
}

// denying is a store whose failures to answer are denials.
type denying struct{ *object.Faulty }

func denied(err error) error {
	if errors.Is(err, object.ErrUnavailable) {
		return fmt.Errorf("%w by a policy", object.ErrDenied)
	}
	return err
}

func (d denying) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	info, err := d.Faulty.Put(ctx, key, body)
	return info, denied(err)
}

func (d denying) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	info, err := d.Faulty.Create(ctx, key, body)
	return info, denied(err)
}

func (d denying) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	info, err := d.Faulty.Copy(ctx, r)
	return info, denied(err)
}

// careless is a store that ignores which version is to be copied, until it does not.
type careless struct {
	object.Store
	careful *atomic.Bool
}

func (c careless) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if info, err := c.Head(ctx, r.From); err == nil && !c.careful.Load() {
		r.SourceETag = info.ETag
	}
	return c.Store.Copy(ctx, r)
}

// What a store can do is yes, no, or not known. Not known is no verdict, and neither it
// nor a no stays when the store becomes fit: both are tried again when that is asked for.
func TestFeaturesAreTriedAgain(t *testing.T) {
	for name, c := range map[string]struct {
		unknown    bool
		remembered bool
	}{
		"copies are denied":       {unknown: true},
		"copies are not answered": {unknown: true},
		"copies are not safe":     {remembered: true},
	} {
		t.Run(name, func(t *testing.T) {
			virtual.Test(t, func(t *testing.T) {
				e, ctx := newEnv(t), t.Context()
				e.start()
				var careful atomic.Bool
				fails := false
				s := e.open(func(o *admit.Options) {
					o.Fingerprint = []byte("two")
					switch name {
					case "copies are denied":
						o.Store = denying{e.objects}
					case "copies are not safe":
						o.Store = careless{e.objects, &careful}
					}
				})
				e.objects.Plan(func(call object.Call) object.Fault {
					if fails && call.Op == object.OpCopy {
						return object.FaultBefore
					}
					return object.FaultNone
				})
				if name == "copies are not answered" { // at the start they were not safe
					s = e.open(func(o *admit.Options) { o.Fingerprint, o.Store = []byte("two"), careless{e.objects, &careful} })
				}
				fails = name == "copies are denied"
				if err := s.Attempt(ctx); err != nil {
					t.Fatal(err)
				}
				if name == "copies are not answered" {
					fails = true
					time.Sleep(time.Minute)
					if _, err := s.Features(ctx, true); !errors.Is(err, object.ErrUnavailable) {
						t.Errorf("no answer: got %v", err)
					}
				}
				kv, there, _, err := e.kv.Get(ctx, keys.Verdict("a"))
				if err != nil {
					t.Fatal(err)
				}
				mine := there && bytes.Contains(kv.Value, []byte("two"))
				if name != "copies are not answered" && mine != c.remembered {
					t.Errorf("a verdict is remembered: %v", mine)
				}
				if f, err := s.Features(ctx, false); (err != nil) != c.unknown || f.ConditionalCopy {
					t.Errorf("at first: %+v, %v", f, err)
				}
				if n := e.calls(func() { _, _ = s.Features(ctx, true) }); n != 0 {
					t.Errorf("%d calls at once", n)
				}
				fails = false
				careful.Store(true)
				time.Sleep(time.Minute)
				if f, err := s.Features(ctx, false); (err != nil) != c.unknown || f.ConditionalCopy {
					t.Errorf("not tried again: %+v, %v", f, err)
				}
				if f, err := s.Features(ctx, true); err != nil || !f.ConditionalCopy || !f.MultipartCopy {
					t.Errorf("tried again: %+v, %v", f, err)
				}
				next := e.open(func(o *admit.Options) { o.Fingerprint = []byte("two") })
				if n := e.calls(func() {
					if err := next.Attempt(ctx); err != nil {
						t.Error(err)
					}
				}); n != 1 {
					t.Errorf("the verdict is not remembered: %d calls", n)
				}
			})
		})
	}
}

// A full store that the cluster does not know yet is not admitted: that is a write.
func TestFullAtTheFirstStart(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.refuseWrites(object.FaultFull)
		if err := e.open().Attempt(t.Context()); !errors.Is(err, admit.ErrUnknown) || !errors.Is(err, object.ErrFull) {
			t.Errorf("got %v", err)
		}
	})
}

// A store that fills up says so until a write succeeds, and is logged once.
func TestFillsUp(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e, ctx := newEnv(t), t.Context()
		core, logs := observer.New(zapcore.InfoLevel)
		s := e.open(func(o *admit.Options) { o.Log = zap.New(core) })
		if err := s.Attempt(ctx); err != nil {
			t.Fatal(err)
		}
		e.refuseWrites(object.FaultFull)
		for range 100 {
			if _, err := s.Put(ctx, "a", nil); !errors.Is(err, object.ErrFull) {
				t.Fatalf("got %v", err)
			}
		}
		if err := s.NoWrites(); err == nil || logs.FilterMessageSnippet("refuses writes").Len() != 1 {
			t.Errorf("it says %v, and logs %v", err, logs.All())
		}
		e.up()
		if _, err := s.Put(ctx, "a", nil); err != nil {
			t.Fatal(err)
		}
		if err := s.NoWrites(); err != nil || logs.FilterMessageSnippet("ended: ").Len() != 1 {
			t.Errorf("then it says %v, and logs %v", err, logs.All())
		}
	})
}
