package follow_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/follow"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// copied is a handler with a copy that checks its calls.
type copied struct {
	t *testing.T

	mu       sync.Mutex
	kvs      map[string]string
	revision int64
	resets   int
}

func (c *copied) Reset(kvs []meta.KeyValue, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if revision < c.revision {
		c.t.Errorf("reset to %d from %d", revision, c.revision)
	}
	c.kvs, c.revision = make(map[string]string), revision
	c.resets++
	for _, kv := range kvs {
		c.kvs[kv.Key] = string(kv.Value)
	}
}

func (c *copied) Apply(events []meta.Event, revision int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, ev := range events {
		if ev.KV.ModRevision <= c.revision || ev.KV.ModRevision > revision {
			c.t.Errorf("event of %d on the way from %d to %d", ev.KV.ModRevision, c.revision, revision)
		}
		if ev.Deleted {
			delete(c.kvs, ev.KV.Key)
		} else {
			c.kvs[ev.KV.Key] = string(ev.KV.Value)
		}
	}
	c.revision = revision
}

func (c *copied) read(key string) (value string, found bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	value, found = c.kvs[key]
	return value, found
}

// same compares the copy with the store at the copy's revision.
func (c *copied) same(kv meta.KV) {
	c.t.Helper()
	c.mu.Lock()
	got, revision := maps.Clone(c.kvs), c.revision
	c.mu.Unlock()
	want := make(map[string]string)
	_, err := kv.Scan(c.t.Context(), "/f/", "/f0", revision, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			want[kv.Key] = string(kv.Value)
		}
		return nil
	})
	if err != nil {
		c.t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		c.t.Errorf("copy at %d (-want +got):\n%s", revision, diff)
	}
}

func put(t *testing.T, kv meta.KV, ops ...meta.Op) int64 {
	t.Helper()
	res, err := kv.Txn(t.Context(), meta.Txn{Then: ops})
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

// start runs a follower until the test ends, or stop is called.
func start(t *testing.T, kv meta.KV) (f *follow.Follower, c *copied, stop func()) {
	c = &copied{t: t}
	f = follow.New(follow.Options{KV: kv, From: "/f/", To: "/f0", Handler: c})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := f.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return f, c, stop
}

func sync1(t *testing.T, f *follow.Follower, atLeast int64) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if got, err := f.Sync(ctx); err != nil || got < atLeast {
		t.Fatalf("sync: got revision %d, error %v; want %d or more", got, err, atLeast)
	}
}

func TestFollow(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		put(t, store, meta.Put("/f/a", []byte("1")), meta.Put("/f/b", []byte("1")), meta.Put("/g", nil))
		f, c, stop := start(t, store)
		sync1(t, f, 2)
		c.same(store)

		rev := put(t, store, meta.Put("/f/a", []byte("2")), meta.Delete("/f/b"), meta.Put("/f/c", nil))
		sync1(t, f, rev)
		c.same(store)

		// Changes outside of the range raise the revision too, which the watch
		// reports only on request.
		began := time.Now()
		rev = put(t, store, meta.Put("/elsewhere", nil))
		sync1(t, f, rev)
		if took := time.Since(began); took > 0 {
			t.Errorf("sync took %v, want an immediate progress request", took)
		}
		c.same(store)
		if c.resets != 1 {
			t.Errorf("got %d resets, want 1", c.resets)
		}

		stop()
		put(t, store, meta.Put("/f/a", nil))
		if _, err := f.Sync(t.Context()); !errors.Is(err, meta.ErrUnavailable) {
			t.Errorf("sync after the end: got error %v, want unavailable", err)
		}
	})
}

func TestSyncBeforeRun(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		c := &copied{t: t}
		f := follow.New(follow.Options{KV: store, From: "/f/", To: "/f0", Handler: c})
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := f.Sync(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got error %v, want the context's", err)
		}
		synced := make(chan error)
		go func() {
			_, err := f.Sync(t.Context())
			synced <- err
		}()
		virtual.Wait() // Sync waits
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- f.Run(ctx) }()
		if err := <-synced; err != nil {
			t.Errorf("sync: %v", err)
		}
		stop()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
}

// A dropped progress request is repeated.
func TestSyncRepeatsRequests(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		faulty := meta.NewFaulty(store)
		f, _, _ := start(t, faulty)
		sync1(t, f, 1)
		virtual.Wait() // no request is left
		faulty.FailNth(0, meta.Before, meta.MethodProgress)
		began := time.Now()
		rev := put(t, store, meta.Put("/elsewhere", nil))
		sync1(t, f, rev)
		if took := time.Since(began); faulty.Fired() != 1 || took != 50*time.Millisecond {
			t.Errorf("sync took %v with %d requests lost, want 50ms with one", took, faulty.Fired())
		}
	})
}

// After any failed call the copy becomes correct.
func TestAnyCallFails(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n, fired := 0, true; fired; n++ {
			t.Run(fmt.Sprintf("fault %d of call %d", fault, n), func(t *testing.T) {
				fired = false // a failed test ends the loop
				virtual.Test(t, func(t *testing.T) {
					store := memory.New(memory.Options{})
					faulty := meta.NewFaulty(store)
					put(t, store, meta.Put("/f/a", []byte("1")), meta.Put("/f/b", nil))
					faulty.FailNth(n, fault)
					f, c, stop := start(t, faulty)
					for i := range 5 {
						rev := put(t, store, meta.Put(fmt.Sprintf("/f/%d", i), nil), meta.Delete("/f/b"))
						for {
							_, err := f.Sync(t.Context())
							if err == nil {
								break
							}
							if !errors.Is(err, meta.ErrUnavailable) {
								t.Fatal(err)
							}
						}
						if got := f.Revision(); got < rev {
							t.Fatalf("at %d after sync, want %d", got, rev)
						}
						c.same(store)
					}
					stop()
					fired = faulty.Fired() > 0
				})
			})
		}
	}
}

// A follower restarts if its revision was compacted while it was disconnected.
func TestCompactedWhileAway(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		faulty := meta.NewFaulty(store)
		put(t, store, meta.Put("/f/a", []byte("1")), meta.Put("/f/gone", nil))
		f, c, _ := start(t, faulty)
		sync1(t, f, 2)
		// The watch ends, and the next one begins below the compaction.
		faulty.Hook(func(call meta.Call) meta.Fault {
			if call.Method == meta.MethodNext || call.Method == meta.MethodScan {
				return meta.Before
			}
			return meta.NoFault
		})
		put(t, store, meta.Put("/f/b", nil)) // received by the Next under way
		time.Sleep(time.Minute)
		put(t, store, meta.Delete("/f/gone"))
		rev := put(t, store, meta.Put("/f/a", []byte("2")))
		if err := store.Compact(t.Context(), rev); err != nil {
			t.Fatal(err)
		}
		faulty.Hook(nil)
		sync1(t, f, rev)
		c.same(store)
		if c.resets < 2 {
			t.Errorf("got %d resets, want a restart", c.resets)
		}
	})
}

// linearizable runs writers that read their writes, and writes of others, through the copy.
func linearizable(t *testing.T, kv meta.KV, f *follow.Follower, c *copied) {
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 25 {
				key, value := fmt.Sprintf("/f/%d", w), fmt.Sprint(i)
				if _, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
					meta.Put(key, []byte(value)),
					meta.Put("/elsewhere", nil),
				}}); err != nil {
					t.Error(err)
					return
				}
				if _, err := f.Sync(t.Context()); err != nil {
					t.Error(err)
					return
				}
				if got, _ := c.read(key); got != value {
					t.Errorf("read %q after the write of %q and a sync", got, value)
				}
			}
		})
	}
	wg.Wait()
	c.same(kv)
}

func TestSyncIsLinearizable(t *testing.T) {
	store := memory.New(memory.Options{})
	f, c, _ := start(t, store)
	linearizable(t, store, f, c)
}

// An incomplete copy that was reported as complete serves no read before a full read.
func TestEarlyProgress(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		rev := put(t, store, meta.Put("/f/a", nil))
		f, c, _ := start(t, store)
		sync1(t, f, rev)
		store.Overtake(true)
		rev = put(t, store, meta.Put("/f/b", nil))
		store.Overtake(false)
		time.Sleep(time.Nanosecond) // the watch has broken
		if got := f.Revision(); got != 0 {
			t.Errorf("revision %d, want 0", got)
		}
		sync1(t, f, rev)
		c.same(store)
	})
}

// TestProblem checks that a follower that fails is in the list of problems until a watch has
// lasted for a minute, without a change of the range, or has a change.
func TestProblem(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		store := memory.New(memory.Options{})
		faulty := meta.NewFaulty(store)
		problems := lasting.New(time.Now)
		f := follow.New(follow.Options{
			KV: faulty, From: "/f/", To: "/f0", Handler: &copied{t: t}, Problems: problems, Name: "test",
		})
		failing := func(want bool) {
			t.Helper()
			virtual.Wait()
			list := problems.States()
			if len(list) != 1 || list[0].Name != "follow test" || (list[0].Error != "") != want {
				t.Errorf("problems %+v, want it failing: %v", list, want)
			}
		}
		failing(false)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- f.Run(ctx) }()
		failing(false)
		fail := func(method meta.Method) {
			faulty.Hook(func(call meta.Call) meta.Fault {
				if call.Method == method {
					return meta.Before
				}
				return meta.NoFault
			})
			put(t, store, meta.Put("/f/a", nil)) // ends the Next under way
			virtual.Wait()
		}
		for _, method := range []meta.Method{meta.MethodScan, meta.MethodNext} {
			fail(meta.MethodNext)
			fail(method)
			time.Sleep(time.Hour)
			failing(true)
			if s := problems.States()[0]; time.Since(s.Since) < time.Hour-time.Minute {
				t.Errorf("%s: failing since %v, want an hour ago", method, s.Since)
			}
			faulty.Hook(nil)
			time.Sleep(59 * time.Second)
			failing(true)
			time.Sleep(10 * time.Second) // the pause between two attempts, and the rest of the minute
			failing(false)
		}
		fail(meta.MethodNext)
		time.Sleep(time.Hour)
		faulty.Hook(nil)
		time.Sleep(10 * time.Second)
		failing(true)
		put(t, store, meta.Put("/f/a", nil))
		failing(false)
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}
