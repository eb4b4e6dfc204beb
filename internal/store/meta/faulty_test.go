package meta_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// A Faulty without a plan changes nothing.
func TestFaultyContract(t *testing.T) {
	faulty := func(inner *memory.Store) metatest.Store {
		return metatest.Decorated{KV: meta.NewFaulty(inner), Inner: inner}
	}
	metatest.Run(t, func(*testing.T) metatest.Store { return faulty(memory.New(memory.Options{})) })
	inner := memory.New(memory.Options{})
	metatest.Full(t, faulty(inner), func() { inner.SetFull(true) }, func() { inner.SetFull(false) })
}

func TestFaultyFailsNth(t *testing.T) {
	ctx := t.Context()
	put := func(kv meta.KV, key string) error {
		_, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(key, nil)}})
		return err
	}
	for _, c := range []struct {
		name  string
		plan  func(*meta.Faulty)
		fails int // index of the put that fails
		takes bool
	}{
		{"first, before", func(f *meta.Faulty) { f.FailNth(0, meta.Before) }, 0, false},
		{"third, after", func(f *meta.Faulty) { f.FailNth(2, meta.After) }, 2, true},
		{"second of a method", func(f *meta.Faulty) { f.FailNth(1, meta.Before, meta.MethodGet, meta.MethodTxn) }, 1, false},
		{"of another method", func(f *meta.Faulty) { f.FailNth(0, meta.Before, meta.MethodGrant) }, -1, true},
		{"never", func(f *meta.Faulty) { f.FailNth(4, meta.Before) }, -1, true},
		{"hook", func(f *meta.Faulty) {
			f.Hook(func(c meta.Call) meta.Fault {
				if c.N == 3 && c.Method == meta.MethodTxn {
					return meta.After
				}
				return meta.NoFault
			})
		}, 3, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			store := memory.New(memory.Options{})
			f := meta.NewFaulty(store)
			c.plan(f)
			for i, key := range []string{"/0", "/1", "/2", "/3"} {
				err := put(f, key)
				_, found, _, gerr := store.Get(ctx, key)
				if gerr != nil {
					t.Fatal(gerr)
				}
				want := true
				if i == c.fails {
					want = c.takes
				}
				if errors.Is(err, meta.ErrUnavailable) != (i == c.fails) || found != want {
					t.Errorf("put %d: error %v, took effect %v", i, err, found)
				}
			}
			if want := min(c.fails+1, 1); f.Fired() != want || f.Calls() != 4 {
				t.Errorf("got %d faults in %d calls, want %d in 4", f.Fired(), f.Calls(), want)
			}
		})
	}
}

// A failed watch, and one with a failed Next, has ended.
func TestFaultyWatch(t *testing.T) {
	ctx := t.Context()
	f := meta.NewFaulty(memory.New(memory.Options{}))
	if _, err := f.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); err != nil {
		t.Fatal(err)
	}
	for _, m := range []meta.Method{meta.MethodWatch, meta.MethodNext} {
		for _, fault := range []meta.Fault{meta.Before, meta.After} {
			f.FailNth(0, fault, m)
			w := f.Watch(ctx, "/", "0", 0)
			for range 2 {
				if _, err := w.Next(); !errors.Is(err, meta.ErrUnavailable) {
					t.Errorf("fault %d of %s: got error %v", fault, m, err)
				}
			}
			if f.Fired() != 1 {
				t.Errorf("fault %d of %s did not fire", fault, m)
			}
		}
	}
	f.Hook(nil)
	if b, err := f.Watch(ctx, "/", "0", 0).Next(); err != nil || len(b.Events) != 1 {
		t.Errorf("a new watch: got %v, error %v", b, err)
	}
}

func TestFaultyFreeze(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		store := memory.New(memory.Options{})
		f := meta.NewFaulty(store)
		watched := make(chan error, 1)
		w := f.Watch(ctx, "/", "0", 0)
		go func() {
			_, err := w.Next()
			watched <- err
		}()
		virtual.Wait() // Next is under way
		f.Freeze()
		f.Freeze() // no further effect

		var wg sync.WaitGroup
		var frozen time.Duration
		began := time.Now()
		wg.Go(func() {
			_, err := f.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}})
			frozen = time.Since(began)
			if err != nil {
				t.Errorf("txn: %v", err)
			}
		})
		short, stop := context.WithTimeout(ctx, time.Second)
		defer stop()
		if _, _, _, err := f.Get(short, "/a"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("get while frozen: got error %v, want the context's", err)
		}
		// Writes of others are not received, not even by the call under way.
		if _, err := store.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/b", nil)}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		virtual.Wait()
		if len(watched) > 0 {
			t.Error("next returned while frozen")
		}
		f.Thaw()
		f.Thaw()
		wg.Wait()
		if want := time.Minute + time.Second; frozen != want {
			t.Errorf("txn took %v, want %v", frozen, want)
		}
		if err := <-watched; err != nil {
			t.Errorf("next: %v", err)
		}
	})
}

func TestBackoff(t *testing.T) {
	b := meta.Backoff{Min: time.Second, Max: 5 * time.Second, Rand: func() float64 { return 0 }}
	for range 2 {
		for i, want := range []time.Duration{1, 2, 4, 5, 5} {
			if got := b.Next(); got != want*time.Second {
				t.Errorf("pause %d: got %v, want %v", i, got, want*time.Second)
			}
		}
		b.Reset()
	}
	b.Rand = func() float64 { return 0.5 }
	if got, want := b.Next(), 750*time.Millisecond; got != want {
		t.Errorf("random 0.5: got %v, want %v", got, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := b.Wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want canceled", err)
	}
	var zero meta.Backoff
	if got := zero.Next(); got > 50*time.Millisecond || got < 25*time.Millisecond {
		t.Errorf("default pause %v", got)
	}
}
