package catalog

import (
	"context"
	"fmt"
	"math"
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

// allocator keeps the replica's stock of ids.
type allocator struct {
	kv    meta.KV
	raise func(ctx context.Context, to int64) error // the ceiling; nil: there is none
	turn  chan struct{}                             // holds one token; who has it may touch stock
	stock IDRange
	mark  atomic.Int64 // every id below it was handed out; grows only
}

func newAllocator(kv meta.KV, raise func(ctx context.Context, to int64) error) *allocator {
	a := &allocator{kv: kv, raise: raise, turn: make(chan struct{}, 1)}
	a.turn <- struct{}{}
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
	behind    error // an epoch.ErrBehind when it has
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
			epoch.ErrBehind, known-1, next-1)
	}
	for { // another reader may have seen a newer one
		old := a.mark.Load()
		if got.rec.GetNext() <= old || a.mark.CompareAndSwap(old, got.rec.GetNext()) {
			return got, nil
		}
	}
}

// plan decides what handing out count ids makes of the record, below the ceiling,
// which it has raised first when they would pass it.
func (a *allocator) plan(ctx context.Context, count int64) (plan, error) {
	for range maxAttempts { // others may use up what was raised
		s, err := a.read(ctx)
		if err != nil {
			return plan{}, err
		}
		if s.behind != nil {
			return plan{}, s.behind
		}
		got, err := take(s.rec, count)
		if err != nil {
			return plan{}, err
		}
		if a.raise == nil || s.rec.GetNext() <= s.rec.GetCeiling() {
			txn := meta.Txn{If: s.unchanged, Then: []meta.Op{meta.Put(keys.IDs, record.Encode(s.rec))}}
			return plan{txn: txn, id: got.First}, nil
		}
		if err := a.raise(ctx, s.rec.GetNext()); err != nil {
			return plan{}, err
		}
	}
	return plan{}, fmt.Errorf("%w: gave up after the id ceiling was raised %d times; nothing was written", ErrConflict, maxAttempts)
}

// AllocateIDs hands out count ids that nobody else gets. It is an epoch.ErrBehind
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
	atAllocate.Before()
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		return c.ids.plan(ctx, count)
	})
	atAllocate.After()
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
