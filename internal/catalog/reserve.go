package catalog

import (
	"context"
	"fmt"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Reserved ranges are part of the allocator's record. Each has a mark,
// unused_from:
//
//	reserve   one transaction that compares the record: adds the range, with the
//	          mark at its first id
//	register  for an id at or above the mark, a transaction that compares the record
//	          raises the mark above the id; then another one registers the id
//	release   one transaction that compares the record: ends the range at the mark
//
// A registration in progress has raised the mark, and the mark never falls, so a
// release never frees an id that is or will be registered.
//
//	no answer to a raise   the registration fails; a mark that is too high wastes ids
//	no answer to a reserve or release
//	                       a repeat under the token returns the outcome

// firstUnreserved is the lowest id that cannot be reserved: half of all ids stay free.
const firstUnreserved = 1 << 62

// usedSteps bounds the number of raises of a range's mark: each raises it by at least
// 1/usedSteps of the range.
const usedSteps = 1024

// reserve adds the reserved range want to rec.
func reserve(rec *storagev1.Allocator, want IDRange) error {
	if want.First >= firstUnreserved || want.Count > firstUnreserved-want.First {
		return invalid("reserve", "the range ends above %d; higher ids cannot be reserved", firstUnreserved-1)
	}
	for i, r := range rec.GetReserved() {
		have := IDRange{r.GetFirst(), r.GetCount()}
		if have == want {
			return nil
		}
		if have.overlaps(want) {
			return fmt.Errorf("%w: %d to %d overlaps the reserved %d to %d", ErrIDRangeTaken,
				want.First, want.last(), have.First, have.last())
		}
		if have.First > want.First {
			return insertReserved(rec, i, want)
		}
	}
	return insertReserved(rec, len(rec.GetReserved()), want)
}

func insertReserved(rec *storagev1.Allocator, at int, want IDRange) error {
	if want.First < rec.GetNext() {
		return fmt.Errorf("%w: %d to %d has allocated ids; those from %d on are free",
			ErrIDRangeTaken, want.First, want.last(), rec.GetNext())
	}
	if len(rec.GetReserved()) >= maxReservedIDs {
		return fmt.Errorf("%w: %d id ranges are reserved already", ErrLimitExceeded, maxReservedIDs)
	}
	rec.Reserved = append(rec.Reserved, nil)
	copy(rec.Reserved[at+1:], rec.Reserved[at:])
	rec.Reserved[at] = &storagev1.IdRange{First: want.First, Count: want.Count, UnusedFrom: want.First}
	return nil
}

// release removes the unused end of the reserved range want from rec, and returns the
// freed ids. None are below Next, which never falls.
func release(rec *storagev1.Allocator, want IDRange) (IDRange, error) {
	for i, r := range rec.GetReserved() {
		have := IDRange{r.GetFirst(), r.GetCount()}
		if have.First != want.First || have.Count > want.Count {
			continue
		}
		end, from := have.last()+1, r.GetUnusedFrom()
		if from == 0 {
			return IDRange{}, fmt.Errorf("%w: %d to %d was reserved by a release that recorded no use; it stays reserved",
				ErrIDRangeTaken, have.First, have.last())
		}
		if end <= rec.GetNext() || from == have.First {
			rec.Reserved = append(rec.GetReserved()[:i:i], rec.GetReserved()[i+1:]...)
		} else {
			r.Count = from - have.First
		}
		from = min(max(from, rec.GetNext()), end)
		return IDRange{from, end - from}, nil
	}
	return IDRange{}, invalid("release", "%d to %d is not a reserved range", want.First, want.last())
}

// use raises the marks in rec for the registration of ids, and reports whether it did.
func use(rec *storagev1.Allocator, ids []int64) (raised bool) {
	for _, r := range rec.GetReserved() {
		have := IDRange{r.GetFirst(), r.GetCount()}
		if r.GetUnusedFrom() == 0 || have.last() < rec.GetNext() {
			continue // it cannot be released
		}
		highest := int64(0)
		for _, id := range ids {
			if id >= r.GetUnusedFrom() && id <= have.last() {
				highest = max(highest, id)
			}
		}
		if highest == 0 {
			continue
		}
		r.UnusedFrom = highest + 1 + min(have.Count/usedSteps, have.last()-highest)
		raised = true
	}
	return raised
}

// ReserveIDs reserves a range for an engine that has used it before. A repeat of the same
// range succeeds, even without Options.AllowReserve.
func (c *Catalog) ReserveIDs(ctx context.Context, tok request.Token, want IDRange) error {
	if want.First < 1 || want.Count < 1 {
		return invalid("reserve", "first and count must be positive")
	}
	_, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		s, err := c.ids.read(ctx)
		if err != nil {
			return plan{}, err
		}
		if s.rolledBack != nil {
			return plan{}, s.rolledBack
		}
		before := len(s.rec.GetReserved())
		if err := reserve(s.rec, want); err != nil {
			return plan{}, err
		}
		p := plan{id: want.First, txn: meta.Txn{If: s.unchanged}}
		if len(s.rec.GetReserved()) == before {
			return p, nil
		}
		if !c.allowReserve {
			return plan{}, ErrReserveNotAllowed
		}
		// After a rollback that loses the range, its ids must not be allocated.
		if end := want.last() + 1; c.ids.raise != nil && end > s.rec.GetCeiling() {
			if err := c.ids.raise(ctx, end); err != nil {
				return plan{}, err
			}
		}
		p.txn.Then = []meta.Op{meta.Put(keys.IDs, record.Encode(s.rec))}
		return p, nil
	})
	if err != nil {
		return fmt.Errorf("reserve ids: %w", err)
	}
	return nil
}

// ReleaseIDs frees the end of a reserved range, above the highest id in use, and returns
// the freed ids; Count is 0 for none.
func (c *Catalog) ReleaseIDs(ctx context.Context, tok request.Token, want IDRange) (IDRange, error) {
	if want.First < 1 || want.Count < 1 {
		return IDRange{}, invalid("release", "first and count must be positive")
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		s, err := c.ids.read(ctx)
		if err != nil {
			return plan{}, err
		}
		if s.rolledBack != nil {
			return plan{}, s.rolledBack
		}
		if !c.allowReserve {
			return plan{}, ErrReserveNotAllowed
		}
		freed, err := release(s.rec, want)
		if err != nil {
			return plan{}, err
		}
		return plan{
			id: want.First, result: encodeReleased(freed),
			txn: meta.Txn{If: s.unchanged, Then: []meta.Op{meta.Put(keys.IDs, record.Encode(s.rec))}},
		}, nil
	})
	if err != nil {
		return IDRange{}, fmt.Errorf("release ids: %w", err)
	}
	freed, err := decodeReleased(tok, out.result)
	if err != nil {
		return IDRange{}, fmt.Errorf("release ids: %w", err)
	}
	return freed, nil
}

// encodeReleased returns the result of a release for a request token: an allocator's
// record with the freed ids.
func encodeReleased(freed IDRange) []byte {
	return record.Encode(&storagev1.Allocator{
		Format: record.Format, Reserved: []*storagev1.IdRange{{First: freed.First, Count: freed.Count}},
	})
}

func decodeReleased(tok request.Token, result []byte) (IDRange, error) {
	rec := &storagev1.Allocator{}
	if err := record.Decode(meta.KeyValue{Key: tok.Key(), Value: result}, rec); err != nil {
		return IDRange{}, err
	}
	if len(rec.GetReserved()) != 1 {
		return IDRange{}, fmt.Errorf("%w: %s has no released ids", record.ErrUnreadable, tok.Key())
	}
	return IDRange{rec.GetReserved()[0].GetFirst(), rec.GetReserved()[0].GetCount()}, nil
}

// use raises the marks of the reserved ranges of ids, which are allocated.
func (a *allocator) use(ctx context.Context, ids []int64) error {
	for attempt := 0; ; attempt++ {
		if err := meta.Pause(ctx, min(attempt, maxAttempts)); err != nil {
			return err
		}
		s, err := a.read(ctx)
		if err != nil {
			return err
		}
		for _, id := range ids {
			if id >= s.rec.GetNext() && !isReserved(s.rec, id) {
				return fmt.Errorf("%w: %d, whose range was released", ErrIDNotAllocated, id)
			}
		}
		if !use(s.rec, ids) {
			return nil
		}
		if s.rolledBack != nil {
			return s.rolledBack
		}
		res, err := a.kv.Txn(ctx, meta.Txn{If: s.unchanged, Then: []meta.Op{meta.Put(keys.IDs, record.Encode(s.rec))}})
		if err != nil {
			return fmt.Errorf("mark reserved ids as used: %w", err)
		}
		if res.Succeeded {
			return nil
		}
	}
}

// checkAllocated returns ErrIDNotAllocated unless ids are allocated, and marks those of
// reserved ranges as used.
func (c *Catalog) checkAllocated(ctx context.Context, kind string, ids ...int64) error {
	missing, ok, err := c.Allocated(ctx, ids...)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: %s %d; allocate ids with AllocateIds", ErrIDNotAllocated, kind, missing)
	}
	mark := c.ids.mark.Load()
	var above []int64
	for _, id := range ids {
		if id >= mark {
			above = append(above, id)
		}
	}
	if len(above) == 0 {
		return nil
	}
	return c.ids.use(ctx, above)
}

func isReserved(rec *storagev1.Allocator, id int64) bool {
	for _, r := range rec.GetReserved() {
		if id >= r.GetFirst() && id-r.GetFirst() < r.GetCount() {
			return true
		}
	}
	return false
}
