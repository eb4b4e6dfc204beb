package manager

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Memory of creates
//
// All creates together hold at most CreateMemory of records and manifests, plus one
// chunk. A create reserves its estimated memory before it begins, and keeps the
// reservation until it has read all of its records. Each record is charged to the
// reservation first, then to the free part of the budget. When the budget is used up,
// the chunk waits for the single overdraft, and then charges nothing more. A chunk that
// was read needs no further memory to be written, except for decoding: a segment with
// many files decodes to far more than its record. A chunk with such a record decodes,
// captures and encodes its segments one after another within a second budget, a quarter
// of CreateMemory.
//
//	waiting                    waits for      released by
//	a create before begin      the budget     creates that end; the waiter holds nothing
//	a chunk being read         the overdraft  the chunk that holds it, which until it is
//	                                          written waits for decoding only
//	a chunk of large records   decoding       chunks being encoded, which wait for no
//	                                          memory
//
// The waits form no cycle: each row waits only for rows below it, and the last row for
// chunks that do not wait.

// segmentMemory is the estimated memory of one segment of a dozen files, in bytes:
// its record, or its part of a manifest.
const segmentMemory = 2 << 10

// The memory of decoding a segment, in bytes.
const (
	decodedFactor = 64      // maximum per byte of the record, reached by files without ETags
	lightRecord   = 8 << 10 // records up to this size are decoded without a charge
)

// recordMemory returns the charge for a record, in bytes: its size, as much again for
// its part of the manifest, and overhead.
func recordMemory(kv meta.KeyValue) int64 { return 2*int64(len(kv.Value)) + 256 }

// createMemory is the memory of all creates of a replica.
type createMemory struct {
	size      int64
	budget    *semaphore.Weighted
	overdraft chan struct{} // holds one token while the overdraft is free

	decodeSize int64
	decoding   *semaphore.Weighted
}

func newCreateMemory(size int64) *createMemory {
	m := &createMemory{
		size: size, budget: semaphore.NewWeighted(size), overdraft: make(chan struct{}, 1), decodeSize: max(1, size/4),
	}
	m.decoding = semaphore.NewWeighted(m.decodeSize)
	m.overdraft <- struct{}{}
	return m
}

// reserve waits until memory for a create of n segments is free. first is the record of
// one of them. The reservation is at most the whole budget.
func (m *createMemory) reserve(ctx context.Context, n int64, first meta.KeyValue) (*reservation, error) {
	need := min(n, chunkSegments*(chunksInFlight+1)) * max(segmentMemory, recordMemory(first))
	need = min(need, (chunksInFlight+1)*2*chunkBytes, m.size)
	if err := m.budget.Acquire(ctx, need); err != nil {
		return nil, fmt.Errorf("%w: not enough memory within the deadline: %w", ErrOverloaded, err)
	}
	return &reservation{memory: m, own: need}, nil
}

// decode waits until memory to decode records one after another is free, and calls
// keepAlive each second meanwhile. end releases the memory. A record that needs more
// than the whole budget gets all of it.
func (m *createMemory) decode(
	ctx context.Context, records []meta.KeyValue, keepAlive func(context.Context) error,
) (end func(), err error) {
	largest := 0
	for i := range records {
		largest = max(largest, len(records[i].Value))
	}
	if largest <= lightRecord {
		return func() {}, nil
	}
	need := min(decodedFactor*int64(largest), m.decodeSize)
	for {
		second, cancel := context.WithTimeout(ctx, time.Second)
		err := m.decoding.Acquire(second, need)
		cancel()
		if err == nil {
			return func() { m.decoding.Release(need) }, nil
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err := keepAlive(ctx); err != nil {
			return nil, err
		}
	}
}

// reservation is the memory of one create.
type reservation struct {
	memory *createMemory
	own    int64 // reserved at the start

	mu    sync.Mutex
	extra int64 // taken from the budget in addition
	used  int64
	read  bool // whether all records are read
}

// allRead returns the unused memory to the budget, now and whenever a chunk ends.
func (r *reservation) allRead() {
	r.mu.Lock()
	r.read = true
	r.mu.Unlock()
	r.refund(0)
}

// end returns all memory to the budget. No chunk may be in use.
func (r *reservation) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory.budget.Release(r.own + r.extra)
	r.own, r.extra = 0, 0
}

// charge charges n bytes. It returns false if the budget does not have them.
func (r *reservation) charge(n int64) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if more := r.used + n - r.own - r.extra; more > 0 {
		if !r.memory.budget.TryAcquire(more) {
			return false
		}
		r.extra += more
	}
	r.used += n
	return true
}

// refund undoes a charge of n bytes.
func (r *reservation) refund(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.used -= n
	if r.read {
		r.own, r.extra = 0, r.own+r.extra
	}
	if spare := min(r.extra, r.own+r.extra-r.used); spare > 0 {
		r.memory.budget.Release(spare)
		r.extra -= spare
	}
}

// chunkMemory is the memory charged for one chunk.
type chunkMemory struct {
	reservation *reservation
	bytes       int64
	overdrawn   bool
}

// add charges n more bytes. While it waits it calls keepAlive each second.
func (c *chunkMemory) add(ctx context.Context, n int64, keepAlive func(context.Context) error) error {
	if c.overdrawn {
		return nil
	}
	if c.reservation.charge(n) {
		c.bytes += n
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.reservation.memory.overdraft:
			c.overdrawn = true
			return nil
		case <-tick.C:
			if err := keepAlive(ctx); err != nil {
				return err
			}
		}
	}
}

// shrink keeps at most n bytes charged.
func (c *chunkMemory) shrink(n int64) {
	if n < c.bytes {
		c.reservation.refund(c.bytes - n)
		c.bytes = n
	}
}

// end returns all memory of the chunk.
func (c *chunkMemory) end() {
	c.shrink(0)
	if c.overdrawn {
		c.overdrawn = false
		c.reservation.memory.overdraft <- struct{}{}
	}
}
