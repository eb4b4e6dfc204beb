package manager

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// inFlight is an object store that counts the bytes being written.
type inFlight struct {
	object.Store

	mu        sync.Mutex
	now, most int64
}

// Create implements [object.Store].
func (f *inFlight) Create(ctx context.Context, key string, data []byte) (object.Info, error) {
	f.add(int64(len(data)))
	defer f.add(-int64(len(data)))
	return f.Store.Create(ctx, key, data)
}

func (f *inFlight) add(n int64) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.now += n
	f.most = max(f.most, f.now)
}

// TestLargeSegmentsShareTheMemory takes 64 concurrent snapshots of segments that are
// larger than estimated, all of them or the first. Memory stays within the bound and is
// returned, and no create is given up while it waits longer than its lease.
func TestLargeSegmentsShareTheMemory(t *testing.T) {
	const segments, weight, creates, bound = 100, 16 << 10, 64, 8 << 20
	for _, light := range []int{0, 1} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", func(o *testOptions) { o.CreateMemory, o.CreateTimeout = bound, 24*time.Hour })
			col, _, _ := e.collection(r, "c")
			for i := range segments {
				s := e.segment(r, col, 0, 1, 2)
				if i >= light {
					s.EngineData = make([]byte, weight)
					if _, err := crand.Read(s.EngineData); err != nil {
						t.Fatal(err)
					}
				}
				e.add(r, col, s)
			}
			e.checkpoint(r, col, 10, 10)
			r.store.SetLatency(20 * time.Second)
			held := &inFlight{Store: r.store}
			r.Manager.store = held
			var all sync.WaitGroup
			for i := range creates {
				all.Go(func() {
					if _, err := r.Create(t.Context(), request.Token{}, spec(col, fmt.Sprint("s", i))); err != nil {
						t.Error(err)
					}
				})
			}
			all.Wait()
			one := int64(segments * weight)
			if most := bound + one + bound/10; held.most > most || held.most < one {
				t.Errorf("%d bytes of manifests were held at once, want %d to %d", held.most, one, most)
			}
			t.Logf("light %d: %d bytes of manifests were held at once", light, held.most)
			if !r.memory.budget.TryAcquire(bound) || len(r.memory.overdraft) != 1 {
				t.Error("not all memory was returned")
			}
			r.store.SetLatency(0)
			if n := len(e.check(r)); n != creates {
				t.Errorf("%d snapshots, want %d", n, creates)
			}
		})
	}
}

// TestMemoryIsBoundedAndReturned runs creates of random sizes above their estimates,
// whose chunks are partly charged concurrently: at most the bound and one chunk are
// charged, and all creates end.
func TestMemoryIsBoundedAndReturned(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	const bound, chunkMost = 1000, 300
	virtual.Test(t, func(t *testing.T) {
		m := newCreateMemory(bound)
		var mu sync.Mutex
		var now, most int64
		add := func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			now += n
			most = max(most, now)
		}
		var all sync.WaitGroup
		for i := range 40 {
			rnd := rand.New(rand.NewPCG(seed, uint64(i)))
			all.Go(func() {
				r := &reservation{memory: m, own: int64(rnd.IntN(200))}
				if err := m.budget.Acquire(t.Context(), r.own); err != nil {
					t.Error(err)
					return
				}
				var chunks sync.WaitGroup
				for range 1 + rnd.IntN(5) {
					c := &chunkMemory{reservation: r}
					size := int64(1 + rnd.IntN(chunkMost))
					for left := size; left > 0; {
						n := min(left, int64(1+rnd.IntN(100)))
						if err := c.add(t.Context(), n, func(context.Context) error { return nil }); err != nil {
							t.Error(err)
						}
						add(n)
						left -= n
					}
					pause := time.Duration(rnd.IntN(1000)) * time.Millisecond
					chunks.Go(func() {
						time.Sleep(pause)
						add(size/2 - size) // the records are released, the manifest remains
						c.shrink(size / 2)
						time.Sleep(pause)
						add(-(size / 2))
						c.end()
					})
				}
				chunks.Wait()
				r.end()
			})
		}
		all.Wait()
		if most > bound+chunkMost {
			t.Errorf("%d were held at once, at most %d", most, bound+chunkMost)
		}
		if !m.budget.TryAcquire(bound) || len(m.overdraft) != 1 {
			t.Error("not all memory was returned")
		}
	})
}

// TestLargeSegmentsAreDecodedInTurn lets a create of a segment with many files wait for
// decoding memory longer than its lease; a create of a small segment continues.
func TestLargeSegmentsAreDecodedInTurn(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		light, _, _ := e.collection(r, "light")
		e.add(r, light, e.segment(r, light, 0, 1, 2))
		e.checkpoint(r, light, 10, 10)
		heavy, _, _ := e.collection(r, "heavy")
		s := e.segment(r, heavy, 0, 1, 2)
		for i := range 4000 {
			f := s.Files[0]
			f.LogID = int64(i + 2)
			f.Path = catalog.NativePath(heavy.ID, &s, &f)
			s.Files = append(s.Files, f)
		}
		e.add(r, heavy, s)
		e.checkpoint(r, heavy, 10, 10)
		if !r.memory.decoding.TryAcquire(r.memory.decodeSize) {
			t.Fatal("no memory")
		}
		created := make(chan error, 1)
		go func() {
			_, err := r.Create(t.Context(), request.Token{}, spec(heavy, "h"))
			created <- err
		}()
		e.create(r, light, "l")
		time.Sleep(3 * r.o.LeaseTTL)
		settle()
		if len(created) != 0 {
			t.Fatalf("without memory to decode a create ended with %v", <-created)
		}
		r.memory.decoding.Release(r.memory.decodeSize)
		if err := <-created; err != nil {
			t.Fatal(err)
		}
		if !r.memory.decoding.TryAcquire(r.memory.decodeSize) {
			t.Error("not all memory was returned")
		}
		e.check(r)
	})
}

// TestDecodingIsBounded decodes many chunks concurrently: their memory stays within the
// bound, and a record that exceeds it is decoded alone.
func TestDecodingIsBounded(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		m := newCreateMemory(32 << 20)
		var mu sync.Mutex
		var now, most int64
		add := func(n int64) {
			mu.Lock()
			defer mu.Unlock()
			now += n
			most = max(most, now)
		}
		var all sync.WaitGroup
		for i := range 64 {
			size := []int{lightRecord + 1, 100_000, 1_000_000}[i%3]
			all.Go(func() {
				records := []meta.KeyValue{{Value: make([]byte, 10)}, {Value: make([]byte, size)}}
				end, err := m.decode(t.Context(), records, func(context.Context) error { return nil })
				if err != nil {
					t.Error(err)
					return
				}
				need := min(decodedFactor*int64(size), 8<<20)
				add(need)
				time.Sleep(3 * time.Second)
				add(-need)
				end()
			})
		}
		all.Wait()
		if most > 8<<20 || most < 6<<20 {
			t.Errorf("%d bytes were decoded at once, at most %d", most, 8<<20)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if !m.decoding.TryAcquire(m.decodeSize) {
			t.Error("not all memory was returned")
		}
		if _, err := m.decode(ctx, []meta.KeyValue{{Value: make([]byte, lightRecord+1)}},
			func(context.Context) error { return nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without memory: %v", err)
		}
	})
}

// TestMemoryWaitEndsWithTheCaller checks that a create that waits for memory ends with
// its caller's deadline, and with its lease.
func TestMemoryWaitEndsWithTheCaller(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.CreateMemory = 1 << 20 })
		col, _, _ := e.collection(r, "c")
		for i := range 4 {
			s := e.segment(r, col, 0, 1, 2)
			s.EngineData = make([]byte, min(i, 1)*16<<10)
			e.add(r, col, s)
		}
		e.checkpoint(r, col, 10, 10)
		if !r.memory.budget.TryAcquire(1<<20 - 10<<10) {
			t.Fatal("no memory")
		}
		<-r.memory.overdraft
		begin := time.Now()
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		if took := time.Since(begin); took < r.o.CreateTimeout {
			t.Errorf("it took %v", took)
		}
		done := make(chan error, 1)
		go func() {
			_, err := r.Create(t.Context(), request.Token{}, spec(col, "y"))
			done <- err
		}()
		time.Sleep(3 * time.Minute)
		pending := e.keysUnder(pendingKeys)
		if len(pending) != 1 {
			t.Fatalf("pending: %v", pending)
		}
		kv, _, _, err := e.kv.Get(t.Context(), pending[0])
		if err != nil {
			t.Fatal(err)
		}
		if err := e.kv.Revoke(t.Context(), kv.Lease); err != nil {
			t.Fatal(err)
		}
		wantError(t, <-done, ErrCreateAborted)
		r.memory.overdraft <- struct{}{}
		e.create(r, col, "z")
		settle()
		e.check(r)
	})
}
