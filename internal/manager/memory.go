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
// All creates together hold at most CreateMemory of records and manifests, and one
// chunk more. A create reserves what it is estimated to need before it begins, and
// keeps that until it has read all of its records. What it reads is charged record by record: to its own
// reservation first, then to what is free of the budget. When nothing is free the
// chunk waits for the overdraft, of which there is one, and from then on charges
// nothing. A chunk that was read is written and let go without any further memory but
// that of decoding: a segment of many files is decoded to far more than its record. A
// chunk with such a record decodes, captures and encodes its segments one after another
// within a second budget, a quarter of CreateMemory.
//
//	who waits                 for what           who lets it go
//	a create before it begins the budget         creates that end; holds nothing
//	a chunk that is read      the overdraft      the chunk that has it, which waits
//	                                             for decoding alone until it is written
//	a chunk of heavy records  decoding           chunks that are encoded, which wait
//	                                             for no memory
//
// So waits form no circle: what ends a wait at the bottom of this table waits for none.

// segmentMemory is the estimated memory of one segment of a dozen files, in bytes:
// its record, or its part of a manifest.
const segmentMemory = 2 << 10

// What decoding a segment takes, in bytes.
const (
	decodedFactor = 64      // for each byte of its record, at most: of files without ETags
	lightRecord   = 8 << 10 // records up to this are decoded without a charge
)

// recordMemory is what is charged for a record: its bytes, as many for its part of
// the manifest, and what stands around them.
func recordMemory(kv meta.KeyValue) int64 { return 2*int64(len(kv.Value)) + 256 }

// createMemory is the memory of all creates of a replica.
type createMemory struct {
	size      int64
	budget    *semaphore.Weighted
	overdraft chan struct{} // holds one token while nothing has it

	decodeSize int64
	decoding   *semaphore.Weighted
}

func newCreateMemory(size int64) *createMemory {
	m := &createMemory{size: size, budget: semaphore.NewWeighted(size), overdraft: make(chan struct{}, 1), decodeSize: max(1, size/4)}
	m.decoding = semaphore.NewWeighted(m.decodeSize)
	m.overdraft <- struct{}{}
	return m
}

// reserve waits until there is memory for a create of n segments, of which first is
// one. More than all of it is all of it.
func (m *createMemory) reserve(ctx context.Context, n int64, first meta.KeyValue) (*reservation, error) {
	need := min(n, chunkSegments*(chunksInFlight+1)) * max(segmentMemory, recordMemory(first))
	need = min(need, (chunksInFlight+1)*2*chunkBytes, m.size)
	if err := m.budget.Acquire(ctx, need); err != nil {
		return nil, fmt.Errorf("%w: no memory for it in time: %w", ErrOverloaded, err)
	}
	return &reservation{memory: m, own: need}, nil
}

// decode waits until there is memory to decode records, one after another. While it
// waits it calls alive each second. A record that takes more than all of it takes all.
func (m *createMemory) decode(ctx context.Context, records []meta.KeyValue, alive func(context.Context) error) (end func(), err error) {
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
		if err := alive(ctx); err != nil {
			return nil, err
		}
	}
}

// reservation is the memory of one create.
type reservation struct {
	memory *createMemory
	own    int64 // reserved at the start

	mu    sync.Mutex
	extra int64 // taken from the budget besides
	used  int64
	read  bool // nothing more is read
}

// allRead returns what is not in use, now and whenever a chunk ends.
func (r *reservation) allRead() {
	r.mu.Lock()
	r.read = true
	r.mu.Unlock()
	r.give(0)
}

// end returns all of it. No chunk is in use any more.
func (r *reservation) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory.budget.Release(r.own + r.extra)
	r.own, r.extra = 0, 0
}

// take charges n bytes, if they are there.
func (r *reservation) take(n int64) bool {
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

func (r *reservation) give(n int64) {
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

// charge is the memory of one chunk.
type charge struct {
	of        *reservation
	bytes     int64
	overdrawn bool
}

// add charges n bytes more. While it waits it calls alive each second.
func (c *charge) add(ctx context.Context, n int64, alive func(context.Context) error) error {
	if c.overdrawn {
		return nil
	}
	if c.of.take(n) {
		c.bytes += n
		return nil
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.of.memory.overdraft:
			c.overdrawn = true
			return nil
		case <-tick.C:
			if err := alive(ctx); err != nil {
				return err
			}
		}
	}
}

// shrink keeps at most n bytes charged.
func (c *charge) shrink(n int64) {
	if n < c.bytes {
		c.of.give(c.bytes - n)
		c.bytes = n
	}
}

// end returns all of it.
func (c *charge) end() {
	c.shrink(0)
	if c.overdrawn {
		c.overdrawn = false
		c.of.memory.overdraft <- struct{}{}
	}
}
