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

// MaxAllocate is the most ids that one call hands out.
const MaxAllocate = 1_000_000

// stockSize is how many ids a replica takes at a time for its own use. A
// restart loses what is left; there are enough.
const stockSize = 64

// IDRange is the ids First to First+Count-1.
type IDRange struct {
	First, Count int64
}

func (r IDRange) last() int64             { return r.First + r.Count - 1 }
func (r IDRange) overlaps(o IDRange) bool { return r.First <= o.last() && o.First <= r.last() }

// Ids come from one record, which each replica changes in transactions that compare
// it. The callers of a replica that wait at the same time share one:
//
//	wait      a call puts its demand into the queue
//	lead      the call that gets the turn takes all demands from the queue, reads
//	          the record, and writes it once with a range for each; callers that
//	          come meanwhile wait for the next turn
//	answer    each call of the batch has its range; a request token is then written
//	          with it, in a transaction of the call's own
//
// So a replica has one transaction of the record under way, however many call it,
// and only other replicas conflict with it. A conflict is no error: the leader tries
// again for as long as its call lasts.
//
//	others changed the record   read again, pause a little, and try again; demands
//	                            that have come since join
//	the leader's call ends      the demands go back into the queue, and another of
//	                            them leads; ids may be lost
//	no answer                   an error for the whole batch; ids may be lost
//	a waiting call ends         its demand leaves the queue, or its ids are lost
//	the token is there          another call with it was first; ids are lost

// allocator keeps the replica's stock of ids.
type allocator struct {
	kv    meta.KV
	raise func(ctx context.Context, to int64) error // the ceiling; nil: there is none
	// pause waits between attempts.
	pause func(ctx context.Context, attempt int) error
	turn  chan struct{} // holds one token; who has it may touch stock
	stock IDRange
	mark  atomic.Int64 // every id below it was handed out; grows only

	lead  chan struct{} // holds one token; who has it changes the record
	mu    sync.Mutex
	queue []*demand
}

// demand is a call that waits for ids. The leader sets what comes after done, and
// then closes done.
type demand struct {
	count int64
	done  chan struct{}
	got   IDRange
	err   error
}

// maxBatch is the most ids that one transaction takes for several calls.
const maxBatch = 16 * MaxAllocate

func newAllocator(kv meta.KV, raise func(ctx context.Context, to int64) error, pause func(context.Context, int) error) *allocator {
	a := &allocator{kv: kv, raise: raise, pause: pause, turn: make(chan struct{}, 1), lead: make(chan struct{}, 1)}
	a.turn <- struct{}{}
	a.lead <- struct{}{}
	return a
}

// take decides what handing out count ids makes of rec, which it changes: the
// lowest free range that is long enough.
func take(rec *storagev1.Allocator, count int64) (IDRange, error) {
	first := max(rec.GetNext(), 1)
	for _, r := range rec.GetReserved() {
		reserved := IDRange{r.GetFirst(), r.GetCount()}
		if (IDRange{first, count}).overlaps(reserved) {
			first = reserved.last() + 1
		}
	}
	if first <= 0 || first > math.MaxInt64-count {
		return IDRange{}, fmt.Errorf("%w: the ids are used up", ErrLimitExceeded)
	}
	rec.Next = first + count
	return IDRange{first, count}, nil
}

// allocation is the allocator's record as it was read.
type allocation struct {
	rec *storagev1.Allocator
	// unchanged holds while the record is as it was read, and the metadata store
	// is not known to have gone back in time.
	unchanged []meta.Cond
	behind    error // an epoch.ErrRolledBack when it has
}

// read returns the allocator's record, and remembers its mark.
func (a *allocator) read(ctx context.Context) (allocation, error) {
	known := a.mark.Load() // before the read, which is not older
	res, err := a.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.IDs), meta.Get(keys.Behind)}})
	if err != nil {
		return allocation{}, fmt.Errorf("read the id allocator: %w", err)
	}
	got := allocation{
		rec:       &storagev1.Allocator{Format: record.Format, Next: 1},
		unchanged: []meta.Cond{meta.Absent(keys.IDs), meta.Absent(keys.Behind)},
		behind:    epoch.Blocked(res.Ranges[1]),
	}
	for _, kv := range res.Ranges[0] {
		if err := record.Decode(kv, got.rec); err != nil {
			return allocation{}, err
		}
		got.unchanged[0] = meta.Unchanged(keys.IDs, kv.ModRevision)
	}
	if next := got.rec.GetNext(); next < known && got.behind == nil {
		got.behind = fmt.Errorf("%w: ids up to %d were handed out, and it says up to %d; nothing is allocated until `snapshotctl recover`",
			epoch.ErrRolledBack, known-1, next-1)
	}
	for { // another reader may have seen a newer one
		old := a.mark.Load()
		if got.rec.GetNext() <= old || a.mark.CompareAndSwap(old, got.rec.GetNext()) {
			return got, nil
		}
	}
}

// allocate hands out count ids. It is an epoch.ErrRolledBack while the metadata store
// is behind the object store.
func (a *allocator) allocate(ctx context.Context, count int64) (IDRange, error) {
	d := &demand{count: count, done: make(chan struct{})}
	a.mu.Lock()
	a.queue = append(a.queue, d)
	a.mu.Unlock()
	for {
		select { // first, so that a call that was served does not lead
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

// join returns batch with the demands that wait, as many as fit.
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

// serve answers the demands that wait, one batch of them. When ctx ends first they
// wait on.
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

// try makes one attempt at ranges for all of batch. It is not done when others
// changed the record meanwhile.
func (a *allocator) try(ctx context.Context, batch []*demand) (done bool, err error) {
	s, err := a.read(ctx)
	if err != nil {
		return false, err
	}
	if s.behind != nil {
		return false, s.behind
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
		if err := a.raise(ctx, s.rec.GetNext()); err != nil && !errors.Is(err, epoch.ErrConflict) {
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

// AllocateIDs hands out count ids that nobody else gets. It is an epoch.ErrRolledBack
// while the metadata store is behind the object store.
func (c *Catalog) AllocateIDs(ctx context.Context, tok request.Token, count int64) (IDRange, error) {
	if count < 1 || count > MaxAllocate {
		return IDRange{}, invalid("count", "%d is not 1 to %d", count, MaxAllocate)
	}
	return c.allocate(ctx, tok, count)
}

// AllocateRange is [Catalog.AllocateIDs] for snapshotd's own use, with as many
// ids as a snapshot may have.
func (c *Catalog) AllocateRange(ctx context.Context, count int64) (IDRange, error) {
	return c.allocate(ctx, request.Token{}, count)
}

func (c *Catalog) allocate(ctx context.Context, tok request.Token, count int64) (IDRange, error) {
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		got, err := c.ids.allocate(ctx, count)
		return plan{id: got.First, txn: meta.Txn{Name: "catalog.allocate", If: []meta.Cond{meta.Absent(keys.Behind)}}}, err
	})
	if err != nil {
		return IDRange{}, fmt.Errorf("allocate ids: %w", err)
	}
	return IDRange{out.id, count}, nil
}

// NextID hands out one id from the replica's stock.
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

// ForgetStock drops the ids that the replica has in stock, since one of them turned
// out to be in use. It waits for a NextID under way.
func (c *Catalog) ForgetStock(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-c.ids.turn:
		c.ids.stock = IDRange{}
		c.ids.turn <- struct{}{}
	}
}

// HandedOut says whether each of ids was handed out or lies in a reserved
// range; if not it returns the first that does not. It reads the allocator only
// when its memory of it does not settle the question.
func (c *Catalog) HandedOut(ctx context.Context, ids ...int64) (missing int64, ok bool, err error) {
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

// freshOrGiven returns id, checked, or a new one when id is 0.
func (c *Catalog) freshOrGiven(ctx context.Context, what string, id int64) (int64, error) {
	if id == 0 {
		return c.NextID(ctx)
	}
	if id < 0 {
		return 0, invalid("id", "%d is not positive", id)
	}
	return id, c.checkHandedOut(ctx, what, id)
}
