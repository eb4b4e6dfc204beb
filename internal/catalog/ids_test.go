package catalog_test

import (
	"crypto/rand"
	"errors"
	"math"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func testIDs(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	c := open(kv)
	for _, id := range []int64{-1, 0, 1, math.MaxInt64} {
		if missing, ok, err := c.Allocated(ctx, id); err != nil || ok || missing != id {
			t.Errorf("%d was handed out before any was: %v, %d, %v", id, ok, missing, err)
		}
	}
	for _, count := range []int64{-1, 0, catalog.MaxAllocate + 1} {
		if _, err := c.AllocateIDs(ctx, request.Token{}, count); !errors.Is(err, catalog.ErrInvalid) {
			t.Errorf("allocate %d: err = %v, want %v", count, err, catalog.ErrInvalid)
		}
	}
	first, err := c.AllocateIDs(ctx, token("a"), 10)
	if err != nil || first != (catalog.IDRange{First: 1, Count: 10}) {
		t.Fatalf("got %v, %v", first, err)
	}
	if second, err := c.AllocateIDs(ctx, token("b"), 10); err != nil || second == first {
		t.Fatalf("got %v, %v", second, err)
	}
	for _, replica := range []*catalog.Catalog{c, open(kv)} {
		if again, err := replica.AllocateIDs(ctx, token("a"), 10); err != nil || again != first {
			t.Errorf("repeat: got %v, %v; want %v", again, err, first)
		}
	}
	other := token("a")
	other.Hash = []byte("other")
	if _, err := c.AllocateIDs(ctx, other, 9); !errors.Is(err, request.ErrReused) {
		t.Errorf("err = %v, want %v", err, request.ErrReused)
	}
	if err := c.ReserveIDs(ctx, request.Token{}, catalog.IDRange{First: 15, Count: 10}); !errors.Is(err,
		catalog.ErrIDRangeTaken) {
		t.Errorf("reserve what was handed out: %v", err)
	}
	for range 2 {
		if err := c.ReserveIDs(ctx, request.Token{}, catalog.IDRange{First: 1000, Count: 10}); err != nil {
			t.Errorf("reserve: %v", err)
		}
	}
	for _, bad := range []catalog.IDRange{
		{First: 0, Count: 1},
		{First: -5, Count: 9},
		{First: 9000, Count: 0},
		{First: math.MaxInt64, Count: 1},
	} {
		if err := c.ReserveIDs(ctx, request.Token{}, bad); !errors.Is(err, catalog.ErrInvalid) {
			t.Errorf("reserve %v: err = %v, want %v", bad, err, catalog.ErrInvalid)
		}
	}
	for _, replica := range []*catalog.Catalog{c, open(kv)} {
		for id, want := range map[int64]bool{
			-1: false, 0: false, 1: true, 20: true, 21: false, 999: false, 1000: true,
			1009: true, 1010: false,
		} {
			missing, ok, err := replica.Allocated(ctx, 1, id)
			if err != nil || ok != want || !ok && missing != id {
				t.Errorf("Allocated(%d) = %d, %v, %v; want %v", id, missing, ok, err, want)
			}
		}
	}
}

// Several replicas on one store, whose calls fail after they took effect, never
// allocate an id twice, nor one that is reserved.
func TestIDsAreUnique(t *testing.T) {
	f := meta.NewFaulty(memory.New(memory.Options{}))
	f.Hook(func(c meta.Call) meta.Fault {
		if c.Method == meta.MethodTxn && c.N%7 == 1 { // the reservation among them
			return meta.After
		}
		return meta.NoFault
	})
	reserved := catalog.IDRange{First: 2000, Count: 500}
	if err := open(f).ReserveIDs(t.Context(), request.Token{}, reserved); err != nil && !errors.Is(err,
		meta.ErrUnavailable) {
		t.Fatal(err)
	}
	var mu sync.Mutex
	seen := map[int64]int{}
	var wg sync.WaitGroup
	for worker := range 8 {
		c := open(f)
		for range 2 {
			wg.Go(func() {
				for i := range 100 {
					got := catalog.IDRange{Count: 1}
					var err error
					if i%2 == 0 {
						got.First, err = c.NextID(t.Context())
					} else {
						got, err = c.AllocateIDs(t.Context(), request.Token{}, int64(1+i%5))
					}
					if err != nil {
						if !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, meta.ErrConflict) {
							t.Error(err)
						}
						continue
					}
					mu.Lock()
					for id := got.First; id < got.First+got.Count; id++ {
						if was, twice := seen[id]; twice {
							t.Errorf("%d went to %d and %d", id, was, worker)
						}
						if id >= reserved.First && id < reserved.First+reserved.Count {
							t.Errorf("%d is reserved", id)
						}
						seen[id] = worker
					}
					mu.Unlock()
				}
			})
		}
	}
	wg.Wait()
	if f.Calls() == 0 || f.Fired() == 0 || len(seen) < 1000 {
		t.Errorf("%d ids, %d faults", len(seen), f.Fired())
	}
}

func TestIDsAreUsedUp(t *testing.T) {
	kv := memory.New(memory.Options{})
	if _, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
		meta.Put(keys.IDs, record.Encode(&storagev1.Allocator{Format: record.Format, Next: math.MaxInt64 - 70})),
	}}); err != nil {
		t.Fatal(err)
	}
	c := open(kv)
	last := int64(0)
	for range 64 { // one stock
		id, err := c.NextID(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		last = id
	}
	if last != math.MaxInt64-7 {
		t.Errorf("last id = %d", last)
	}
	if _, err := c.NextID(t.Context()); !errors.Is(err, catalog.ErrLimitExceeded) {
		t.Errorf("err = %v, want %v", err, catalog.ErrLimitExceeded)
	}
	if got, err := c.AllocateIDs(t.Context(), request.Token{}, 6); err != nil || got.First != math.MaxInt64-6 {
		t.Errorf("the last six: %v, %v", got, err)
	}
}

// A range that is reserved by mistake is given back, but for what was registered of
// it; without the permission nothing is reserved or released.
func TestReserveAndRelease(t *testing.T) {
	ctx := t.Context()
	kv := memory.New(memory.Options{})
	e := newEnv(t, kv)
	whole := catalog.IDRange{First: 100_000, Count: 1024}
	deny := catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Rand: rand.Reader,
		Requests: request.NewLeases(kv, time.Now, nil),
	})
	if err := deny.ReserveIDs(ctx, request.Token{}, whole); !errors.Is(err, catalog.ErrReserveNotAllowed) {
		t.Errorf("reserve: err = %v, want %v", err, catalog.ErrReserveNotAllowed)
	}
	if err := e.ReserveIDs(ctx, request.Token{}, catalog.IDRange{First: 2, Count: math.MaxInt64 - 1}); !errors.Is(err,
		catalog.ErrInvalid) {
		t.Errorf("reserve all ids: err = %v, want %v", err, catalog.ErrInvalid)
	}
	if err := e.ReserveIDs(ctx, request.Token{}, whole); err != nil {
		t.Fatal(err)
	}
	if err := deny.ReserveIDs(ctx, request.Token{}, whole); err != nil {
		t.Errorf("reserve what is reserved: %v", err)
	}
	if _, err := deny.ReleaseIDs(ctx, request.Token{}, whole); !errors.Is(err, catalog.ErrReserveNotAllowed) {
		t.Errorf("release: err = %v, want %v", err, catalog.ErrReserveNotAllowed)
	}
	e.add(t, 100_007)
	freed := catalog.IDRange{First: 100_009, Count: 1024 - 9}
	for range 2 { // the second is a repeat
		if got, err := e.ReleaseIDs(ctx, token("release"), whole); err != nil || got != freed {
			t.Errorf("released %v, %v; want %v", got, err, freed)
		}
	}
	for id, want := range map[int64]bool{100_007: true, 100_008: true, 100_009: false, 101_000: false} {
		if _, ok, err := open(kv).Allocated(ctx, id); err != nil || ok != want {
			t.Errorf("Allocated(%d) = %v, %v; want %v", id, ok, err, want)
		}
	}
	if _, _, err := e.AddSegments(ctx, e.col.ID, e.segments([]int64{100_100})); !errors.Is(err,
		catalog.ErrIDNotAllocated) {
		t.Errorf("register an id that was given back: %v", err)
	}
}
