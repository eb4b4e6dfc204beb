package manager

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// line returns a comparable form of an event.
func line(e *Event) string {
	ids, all := e.concerns()
	id := int64(0)
	switch {
	case e.Snapshot != nil:
		id = e.Snapshot.ID
	case e.Pin != nil:
		id = e.Pin.ID
	case e.Collection != nil:
		id = e.Collection.ID
	}
	return fmt.Sprint(e.Revision, e.Type, ids, all, id)
}

// history returns what a reader of a collection gets after a revision from a watch of
// its own.
func (e *env) history(r *testReplica, after, collection int64) (list []string) {
	e.t.Helper()
	_, _, now, err := e.kv.Get(e.t.Context(), keys.Format)
	if err != nil {
		e.t.Fatal(err)
	}
	from, to := keys.All()
	ctx, cancel := context.WithCancel(e.t.Context())
	defer cancel()
	changes := e.kv.Watch(ctx, from, to, after)
	for at := after; at < now; {
		if err := changes.Progress(ctx); err != nil {
			e.t.Fatal(err)
		}
		b, err := changes.Next()
		if err != nil {
			e.t.Fatal(err)
		}
		for _, e := range appendConcerning(nil, r.decodeEvents(b.Events), &reader{collection: collection}) {
			list = append(list, line(&e))
		}
		at = b.Revision
	}
	return list
}

// TestReadersOfAFeed checks that slow, restricted and resuming readers get the events
// of a watch of their own, each once and in order, with a small ring and a watch that
// breaks.
func TestReadersOfAFeed(t *testing.T) {
	for seed := range uint64(10) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				random := rand.New(rand.NewPCG(seed, 1))
				r := e.start("a")
				r.feed.events = 1 + random.IntN(12)
				col, _, _ := e.collection(r, "c0")
				_, _, first, err := e.kv.Get(t.Context(), keys.Format)
				if err != nil {
					t.Fatal(err)
				}
				var nexts, fails atomic.Int64
				r.kv.Hook(func(c meta.Call) meta.Fault {
					if c.Method == meta.MethodNext && nexts.Add(1)%29 == 0 {
						fails.Add(1)
						return meta.Before
					}
					return meta.NoFault
				})
				type state struct {
					mu   sync.Mutex
					got  []string
					at   int64
					slow time.Duration
					col  int64
				}
				ctx, cancel := context.WithCancel(t.Context())
				var wg sync.WaitGroup
				readers := make([]*state, 12)
				for i := range readers {
					s := &state{slow: time.Duration(random.IntN(3)*random.IntN(900)) * time.Millisecond, at: first}
					if i%3 == 0 {
						s.col = col.ID
					}
					readers[i] = s
					wg.Go(func() {
						for ctx.Err() == nil { // resumes after the watch broke
							_ = r.Watch(ctx, s.at, s.col, func(events []Event, revision int64) error {
								s.mu.Lock()
								for j := range events {
									s.got = append(s.got, line(&events[j]))
								}
								s.at = revision
								s.mu.Unlock()
								time.Sleep(s.slow)
								return nil
							})
							time.Sleep(time.Millisecond)
						}
					})
				}
				for i := range 60 {
					switch random.IntN(3) {
					case 0:
						_, _ = r.catalog.CreateCollection(t.Context(), noToken, catalog.Collection{
							DB: "d", Name: fmt.Sprint("c-", i), Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
						})
					case 1:
						e.create(r, col, fmt.Sprint("s-", i))
					case 2:
						time.Sleep(time.Duration(random.IntN(400)) * time.Millisecond)
					}
				}
				time.Sleep(10 * time.Minute)
				for i, s := range readers {
					s.mu.Lock()
					if diff := cmp.Diff(e.history(r, first, s.col), s.got); diff != "" {
						t.Errorf("reader %d (-want +got):\n%s", i, diff)
					}
					s.mu.Unlock()
				}
				if fails.Load() == 0 {
					t.Error("no watch broke")
				}
				cancel()
				wg.Wait()
			})
		})
	}
}

// TestReadersShareAWatch checks that all readers of a replica share one watch, and are
// not woken by writes that do not concern them.
func TestReadersShareAWatch(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "other")
		e.checkpoint(r, col, 20, 20)
		settle()
		var watches atomic.Int64
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodWatch {
				watches.Add(1)
			}
			return meta.NoFault
		})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var reported atomic.Int64
		var wg sync.WaitGroup
		for i := range 300 {
			wg.Go(func() {
				collection := []int64{col.ID, other.ID}[i%2]
				err := r.Watch(ctx, 0, collection, func(events []Event, _ int64) error {
					reported.Add(int64(len(events)))
					return nil
				})
				if !errors.Is(err, context.Canceled) {
					t.Error(err)
				}
			})
		}
		settle()
		if n := watches.Load(); n != 1 {
			t.Errorf("%d watches", n)
		}
		stand := func() (sum int64) {
			r.feed.mu.Lock()
			defer r.feed.mu.Unlock()
			r.feed.forEachReader(func(r *reader) {
				if !r.idle {
					t.Error("a reader is not idle")
				}
				sum += r.at // changes when the reader is woken
			})
			return sum
		}
		before := stand()
		for range 20 {
			e.add(r, col, e.segment(r, col, 0, 1, 9))
		}
		settle()
		if stand() != before || reported.Load() != 0 {
			t.Errorf("segments woke readers of events; %d were reported", reported.Load())
		}
		e.create(r, col, "s")
		settle()
		if n := reported.Load(); n != 150*2 { // PENDING, COMMITTED
			t.Errorf("reported %d events, want those of one collection", n)
		}
		cancel()
		wg.Wait()
		if len(r.feed.readers) != 0 {
			t.Error("readers are left")
		}
	})
}

// TestSlowReaderIsCompacted checks that a reader gets ErrEventsCompacted when the store
// has compacted the events that it lacks.
func TestSlowReaderIsCompacted(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		r.feed.events = 1
		col, _, _ := e.collection(r, "c")
		reading, read := make(chan struct{}), make(chan struct{})
		ended := make(chan error, 1)
		go func() {
			ended <- r.Watch(t.Context(), 0, 0, func(events []Event, _ int64) error {
				if len(events) > 0 {
					reading <- struct{}{}
					<-read
				}
				return nil
			})
		}()
		settle()
		created := make(chan error, 1)
		go func() {
			_, err := r.Create(t.Context(), noToken, spec(col, "first"))
			created <- err
		}()
		<-reading
		if err := <-created; err != nil {
			t.Fatal(err)
		}
		settle()
		for i := range 3 {
			e.create(r, col, fmt.Sprint("s-", i))
			settle() // else one batch may hold all, and the ring keeps it
		}
		_, _, now, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.memory.Compact(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		close(read)
		go func() {
			for range reading { // events received before
			}
		}()
		wantError(t, <-ended, ErrEventsCompacted)
		close(reading)
	})
}

// TestFeedOfABrokenWatch checks that readers end when the store contradicts an earlier
// answer, because events may be missing, and that a new reader gets all events.
func TestFeedOfABrokenWatch(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		watch := func() (ended chan error, reported *atomic.Int64) {
			ended, reported = make(chan error, 1), &atomic.Int64{}
			go func() {
				ended <- r.Watch(t.Context(), 0, 0, func(events []Event, _ int64) error {
					reported.Add(int64(len(events)))
					return nil
				})
			}()
			settle()
			return ended, reported
		}
		first, _ := watch()
		second, _ := watch()
		e.memory.Overtake(true)
		e.collection(r, "other")
		e.memory.Overtake(false)
		wantError(t, <-first, ErrEventsCompacted)
		wantError(t, <-second, ErrEventsCompacted)
		time.Sleep(time.Minute) // the feed has recovered
		_, reported := watch()
		e.create(r, col, "s")
		settle()
		if reported.Load() != 2 {
			t.Errorf("reported %d events, want PENDING and COMMITTED", reported.Load())
		}
	})
}
