package catalog

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// MaxAllocate is the maximum number of ids per call.
const MaxAllocate = 1_000_000

// stockSize is the number of ids that a replica allocates at a time for its own use. A
// restart loses the rest.
const stockSize = 64

// IDRange holds the ids First to First+Count-1.
type IDRange struct {
	First, Count int64
}

func (r IDRange) last() int64             { return r.First + r.Count - 1 }
func (r IDRange) overlaps(o IDRange) bool { return r.First <= o.last() && o.First <= r.last() }

// Ids come from one record, which each replica changes in transactions that compare
// it. Concurrent calls of a replica share one transaction:
//
//	wait      a call appends its demand to the queue
//	lead      the call that gets the lead token takes all demands from the queue, reads
//	          the record, and writes it once with a range for each; later calls wait
//	          for the next turn
//	answer    each call of the batch has its range, and writes its request token with
//	          it in a transaction of the call
//
// So a replica has one transaction of the record in flight, whatever the number of
// calls, and only other replicas conflict with it. A conflict is no error: the leading
// call tries again until its context ends.
//
//	a replica changed the record  pause, read again, and try again; new demands join
//	the leading call ends         the demands return to the queue, and another of
//	                              them leads; ids may be lost
//	no answer                     an error for the whole batch; ids may be lost
//	a waiting call ends           its demand leaves the queue, or its ids are lost
//	the token exists              a concurrent call used it; ids are lost

// allocator allocates ids, and holds the replica's stock.
type allocator struct {
	kv    meta.KV
	raise func(ctx context.Context, to int64) error // raises the id limit; nil: no limit
	// pause waits between attempts.
	pause func(ctx context.Context, attempt int) error
	turn  chan struct{} // holds one token, which guards stock
	stock IDRange
	mark  atomic.Int64 // every id below it is allocated; only grows

	lead  chan struct{} // holds one token; its holder changes the record
	mu    sync.Mutex
	queue []*demand
}

// demand is a call that waits for ids. The leading call sets got and err, and then closes
// done.
type demand struct {
	count int64
	done  chan struct{}
	got   IDRange
	err   error
}

// maxBatch is the maximum number of ids that one transaction allocates for several calls.
const maxBatch = 16 * MaxAllocate

func newAllocator(
	kv meta.KV, raise func(ctx context.Context, to int64) error, pause func(context.Context, int) error,
) *allocator {
	a := &allocator{kv: kv, raise: raise, pause: pause, turn: make(chan struct{}, 1), lead: make(chan struct{}, 1)}
	a.turn <- struct{}{}
	a.lead <- struct{}{}
	return a
}

// take allocates count ids in rec: the lowest free range of that length.
func take(rec *storagev1.Allocator, count int64) (IDRange, error) {
	first := max(rec.GetNext(), 1)
	for _, r := range rec.GetReserved() {
		reserved := IDRange{r.GetFirst(), r.GetCount()}
		if (IDRange{first, count}).overlaps(reserved) {
			first = reserved.last() + 1
		}
	}
	if first <= 0 || first > math.MaxInt64-count {
		return IDRange{}, fmt.Errorf("%w: no ids left", ErrLimitExceeded)
	}
	rec.Next = first + count
	return IDRange{first, count}, nil
}

// allocation is the allocator's record as read.
type allocation struct {
	rec *storagev1.Allocator
	// unchanged compares that the record is as read, and that no rollback of the
	// metadata store is recorded.
	unchanged  []meta.Cond
	rolledBack error // an epoch.ErrRolledBack after a rollback
}

// read returns the allocator's record, and raises the mark to it.
func (a *allocator) read(ctx context.Context) (allocation, error) {
	known := a.mark.Load() // before the read, which is not older
	res, err := a.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.IDs), meta.Get(keys.RolledBack)}})
	if err != nil {
		return allocation{}, fmt.Errorf("read the id allocator: %w", err)
	}
	got := allocation{
		rec:        &storagev1.Allocator{Format: record.Format, Next: 1},
		unchanged:  []meta.Cond{meta.Absent(keys.IDs), meta.Absent(keys.RolledBack)},
		rolledBack: epoch.Blocked(res.Ranges[1]),
	}
	for _, kv := range res.Ranges[0] {
		if err := record.Decode(kv, got.rec); err != nil {
			return allocation{}, err
		}
		got.unchanged[0] = meta.Unchanged(keys.IDs, kv.ModRevision)
	}
	if next := got.rec.GetNext(); next < known && got.rolledBack == nil {
		got.rolledBack = fmt.Errorf("%w: ids up to %d are allocated, its record ends at %d; "+
			"run `snapshotctl recover` to allocate ids again",
			epoch.ErrRolledBack, known-1, next-1)
	}
	for { // a concurrent read may have seen a newer record
		old := a.mark.Load()
		if got.rec.GetNext() <= old || a.mark.CompareAndSwap(old, got.rec.GetNext()) {
			return got, nil
		}
	}
}

// allocate allocates count ids. It fails with epoch.ErrRolledBack after a rollback of
// the metadata store.
func (a *allocator) allocate(ctx context.Context, count int64) (IDRange, error) {
	d := &demand{count: count, done: make(chan struct{})}
	a.mu.Lock()
	a.queue = append(a.queue, d)
	a.mu.Unlock()
	for {
		select { // first, so that a call with an answer does not lead
		case <-d.done:
			return d.got, d.err
		default:
		}
		select {
		case <-d.done:
		case <-ctx.Done():
			a.mu.Lock()
			a.queue = slices.DeleteFunc(a.queue, func(o *demand) bool { return o == d })
			a.mu.Unlock()
			return IDRange{}, ctx.Err()
		case <-a.lead:
			a.serve(ctx)
			a.lead <- struct{}{}
		}
	}
}

// join moves waiting demands from the queue to batch, as many as fit.
func (a *allocator) join(batch []*demand) []*demand {
	var sum int64
	for _, d := range batch {
		sum += d.count
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	n := 0
	for n < len(a.queue) && (len(batch)+n == 0 || sum+a.queue[n].count <= maxBatch) {
		sum += a.queue[n].count
		n++
	}
	batch = append(batch, a.queue[:n]...)
	a.queue = slices.Clone(a.queue[n:])
	return batch
}

// serve answers one batch of waiting demands, or returns them to the queue when ctx ends
// first.
func (a *allocator) serve(ctx context.Context) {
	var batch []*demand
	for attempt := 0; ; attempt++ {
		batch = a.join(batch)
		if len(batch) == 0 {
			return
		}
		done, err := a.try(ctx, batch)
		if err == nil && !done {
			err = a.pause(ctx, attempt)
		}
		switch {
		case ctx.Err() != nil && !done:
			a.mu.Lock()
			a.queue = slices.Concat(batch, a.queue)
			a.mu.Unlock()
			return
		case done || err != nil:
			for _, d := range batch {
				if d.err == nil {
					d.err = err
				}
				close(d.done)
			}
			return
		}
	}
}

// try makes one attempt to allocate the ranges of batch. done is false when a replica
// changed the record meanwhile.
func (a *allocator) try(ctx context.Context, batch []*demand) (done bool, err error) {
	s, err := a.read(ctx)
	if err != nil {
		return false, err
	}
	if s.rolledBack != nil {
		return false, s.rolledBack
	}
	some := false
	for _, d := range batch {
		d.got, d.err = take(s.rec, d.count)
		some = some || d.err == nil
	}
	if !some {
		return true, nil
	}
	if a.raise != nil && s.rec.GetNext() > s.rec.GetCeiling() {
		if err := a.raise(ctx, s.rec.GetNext()); err != nil && !errors.Is(err, meta.ErrConflict) {
			return false, err
		}
		return false, nil // the record has changed
	}
	res, err := a.kv.Txn(ctx, meta.Txn{If: s.unchanged, Then: []meta.Op{meta.Put(keys.IDs, record.Encode(s.rec))}})
	if err != nil {
		return false, fmt.Errorf("write the id allocator: %w", err)
	}
	return res.Succeeded, nil
}

// AllocateIDs allocates count ids for the caller. It fails with epoch.ErrRolledBack
// after a rollback of the metadata store.
func (c *Catalog) AllocateIDs(ctx context.Context, tok request.Token, count int64) (IDRange, error) {
	if count < 1 || count > MaxAllocate {
		return IDRange{}, invalid("count", "%d is not 1 to %d", count, MaxAllocate)
	}
	return c.allocate(ctx, tok, count)
}

// AllocateRange is [Catalog.AllocateIDs] for snapshotd's own use, with count up to the
// number of ids of a snapshot.
func (c *Catalog) AllocateRange(ctx context.Context, count int64) (IDRange, error) {
	return c.allocate(ctx, request.Token{}, count)
}

func (c *Catalog) allocate(ctx context.Context, tok request.Token, count int64) (IDRange, error) {
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		got, err := c.ids.allocate(ctx, count)
		return plan{id: got.First, txn: meta.Txn{
			Name: "catalog.allocate",
			If:   []meta.Cond{meta.Absent(keys.RolledBack)},
		}}, err
	})
	if err != nil {
		return IDRange{}, fmt.Errorf("allocate ids: %w", err)
	}
	return IDRange{out.id, count}, nil
}

// NextID returns one id of the replica's stock.
func (c *Catalog) NextID(ctx context.Context) (int64, error) {
	a := c.ids
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-a.turn:
	}
	defer func() { a.turn <- struct{}{} }()
	if a.stock.Count == 0 {
		r, err := c.AllocateIDs(ctx, request.Token{}, stockSize)
		if err != nil {
			return 0, err
		}
		a.stock = r
	}
	id := a.stock.First
	a.stock.First++
	a.stock.Count--
	return id, nil
}

// ForgetStock drops the replica's stock of ids, after one of them was found in use. It
// waits for a concurrent NextID.
func (c *Catalog) ForgetStock(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-c.ids.turn:
		c.ids.stock = IDRange{}
		c.ids.turn <- struct{}{}
	}
}

// Allocated reports whether each of ids is allocated or in a reserved range; if not it
// returns the first that is neither. It reads the allocator's record only for ids above
// the mark.
func (c *Catalog) Allocated(ctx context.Context, ids ...int64) (missing int64, ok bool, err error) {
	mark := c.ids.mark.Load()
	var rec *storagev1.Allocator
	for _, id := range ids {
		if id < 1 {
			return id, false, nil
		}
		if id < mark {
			continue
		}
		if rec == nil {
			s, err := c.ids.read(ctx)
			if err != nil {
				return 0, false, err
			}
			rec, mark = s.rec, max(mark, s.rec.GetNext())
		}
		if id >= mark && !isReserved(rec, id) {
			return id, false, nil
		}
	}
	return 0, true, nil
}

// allocateOrCheck returns a new id when id is 0, else id when it is allocated.
func (c *Catalog) allocateOrCheck(ctx context.Context, kind string, id int64) (int64, error) {
	if id == 0 {
		return c.NextID(ctx)
	}
	if id < 0 {
		return 0, invalid("id", "%d is not positive", id)
	}
	return id, c.checkAllocated(ctx, kind, id)
}
