package catalog

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Ids that are gone
//
// An id whose last record goes is gone, for good: a late repeat of its
// registration, whose files are deleted by then, is refused with ErrIDUsed. Gone
// ids are kept as merged ranges, those of each 4096 ids in one record, also of ids
// of reserved ranges. Ids may be registered in any order, so that an id between
// gone ones may still be.
//
//	confirm   compares: the block as read. Puts: the block with the ids, in the
//	          transaction that removes the tombstone and the claims
//	register  compares: the blocks of its ids as read, none of which has one of them
//	roll back the ids of a restore are claimed as a range until its record goes; by
//	          then all of them are gone
//	close     in a block of more than a bound of ranges, whose last id went longer
//	          ago than the age: the gaps between its gone ids are gone as well. Never
//	          an id above the highest that is gone, or below the lowest
//
// # Failures
//
//	two at once       one of them finds the block changed and reads it again
//	no answer         as of the transaction that it is part of
//	a closed gap has  the replica drops its stock and takes fresh ids, when it next
//	ids of a stock    needs one for files that a segment loses

const (
	goneBits  = 12 // a block has 4096 ids
	goneBlock = 1 << goneBits
)

// Defaults of [Options].
const (
	DefaultMaxGoneRanges = 256
	DefaultGoneGapAge    = 30 * 24 * time.Hour
)

func blockOf(id int64) int64 { return id >> goneBits }

// span is the ids from to to within a block, both included.
type span struct{ from, to int64 }

// block is which ids of a block are gone.
type block struct {
	number int64
	spans  []span // ascending, with at least one id between two
	change time.Time
	// revision is that of its record; 0: there is none.
	revision int64
}

func decodeBlock(number int64, kvs []meta.KeyValue) (*block, error) {
	b := &block{number: number}
	for _, kv := range kvs {
		rec := &storagev1.Gone{}
		if err := record.Decode(kv, rec); err != nil {
			return nil, err
		}
		ranges := rec.GetRanges()
		if len(ranges)%2 != 0 {
			return nil, fmt.Errorf("%w at %s: %d numbers, which are no ranges", record.ErrUnreadable, kv.Key, len(ranges))
		}
		next := number << goneBits
		for i := 0; i < len(ranges); i += 2 {
			from := next + int64(ranges[i])
			next = from + int64(ranges[i+1])
			if next > (number+1)<<goneBits || next <= from {
				return nil, fmt.Errorf("%w at %s: a range that ends beyond the block", record.ErrUnreadable, kv.Key)
			}
			b.spans = append(b.spans, span{from, next - 1})
		}
		b.change, b.revision = record.Time(rec.GetChangeTime()), kv.ModRevision
	}
	return b, nil
}

func (b *block) encode() []byte {
	rec := &storagev1.Gone{Format: record.Format, ChangeTime: record.Nanos(b.change)}
	next := b.number << goneBits
	for _, s := range b.spans {
		rec.Ranges = append(rec.Ranges, uint32(s.from-next), uint32(s.to-s.from+1)) //nolint:gosec // within a block
		next = s.to + 1
	}
	return record.Encode(rec)
}

// unchanged is the compare that the block is as it was read.
func (b *block) unchanged() meta.Cond {
	if b.revision == 0 {
		return meta.Absent(keys.Gone(b.number))
	}
	return meta.Unchanged(keys.Gone(b.number), b.revision)
}

// has says whether an id is gone.
func (b *block) has(id int64) bool {
	_, found := slices.BinarySearchFunc(b.spans, id, func(s span, id int64) int {
		switch {
		case s.to < id:
			return -1
		case s.from > id:
			return 1
		}
		return 0
	})
	return found
}

// add makes the ids from to to gone.
func (b *block) add(from, to int64) {
	merged := make([]span, 0, len(b.spans)+1)
	added := span{from, to}
	for i, s := range b.spans {
		switch {
		case s.to < added.from-1:
			merged = append(merged, s)
		case s.from > added.to+1:
			b.spans = append(append(merged, added), b.spans[i:]...)
			return
		default:
			added = span{min(added.from, s.from), max(added.to, s.to)}
		}
	}
	b.spans = append(merged, added)
}

// close closes the gaps between the ids that are gone when there are more than
// limit ranges, and the last id went age before now or earlier.
func (b *block) close(limit int, age time.Duration, now time.Time) {
	if len(b.spans) > limit && !b.change.IsZero() && now.Sub(b.change) >= age {
		b.spans = []span{{b.spans[0].from, b.spans[len(b.spans)-1].to}}
	}
}

// readBlocks reads the blocks of ids, by their numbers.
func (c *Catalog) readBlocks(ctx context.Context, ids []int64) (map[int64]*block, error) {
	blocks := map[int64]*block{}
	for _, id := range ids {
		blocks[blockOf(id)] = nil
	}
	for part := range slices.Chunk(slices.Sorted(maps.Keys(blocks)), meta.MaxTxnOps) {
		gets := make([]meta.Op, len(part))
		for i, number := range part {
			gets[i] = meta.Get(keys.Gone(number))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return nil, fmt.Errorf("read which ids are gone: %w", err)
		}
		for i, number := range part {
			if blocks[number], err = decodeBlock(number, res.Ranges[i]); err != nil {
				return nil, err
			}
		}
	}
	return blocks, nil
}

// Gone returns those of ids that are gone.
func (c *Catalog) Gone(ctx context.Context, ids []int64) (map[int64]bool, error) {
	gone := map[int64]bool{}
	if len(ids) == 0 {
		return gone, nil
	}
	blocks, err := c.readBlocks(ctx, ids)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if blocks[blockOf(id)].has(id) {
			gone[id] = true
		}
	}
	return gone, nil
}

// notGone looks whether one of ids is gone, and returns the compares that none has
// gone since.
func (c *Catalog) notGone(ctx context.Context, ids []int64) ([]meta.Cond, error) {
	blocks, err := c.readBlocks(ctx, ids)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if blocks[blockOf(id)].has(id) {
			return nil, fmt.Errorf("%w: %d stood for something whose files are deleted; get new ids from AllocateIds", ErrIDUsed, id)
		}
	}
	var conds []meta.Cond
	for _, number := range slices.Sorted(maps.Keys(blocks)) {
		conds = append(conds, blocks[number].unchanged())
	}
	return conds, nil
}

// goneOps returns what a transaction compares and writes that makes ids gone.
func (c *Catalog) goneOps(ctx context.Context, ids []int64) (conds []meta.Cond, ops []meta.Op, err error) {
	blocks, err := c.readBlocks(ctx, ids)
	if err != nil {
		return nil, nil, err
	}
	now, err := c.stamp(ctx)
	if err != nil { // nothing is closed by a clock that cannot be trusted
		now = c.now()
	} else {
		for _, b := range blocks {
			b.close(c.maxGoneRanges, c.goneGapAge, now)
		}
	}
	for _, id := range ids {
		blocks[blockOf(id)].add(id, id)
	}
	for _, number := range slices.Sorted(maps.Keys(blocks)) {
		b := blocks[number]
		b.change = now
		conds, ops = append(conds, b.unchanged()), append(ops, meta.Put(keys.Gone(number), b.encode()))
	}
	return conds, ops, nil
}

// GoneRange calls write with what makes all ids of a range gone, in steps of one
// transaction each. A step that changed nothing, for its compares did not hold, is
// an error of write, and a repeat begins again: what is gone stays so.
func (c *Catalog) GoneRange(ctx context.Context, first, count int64, write func([]meta.Cond, []meta.Op) error) error {
	for from, end := first, first+count; from < end; {
		var numbers []int64
		for id := from; id < end && len(numbers) < meta.MaxTxnOps/2; id = (blockOf(id) + 1) << goneBits {
			numbers = append(numbers, id)
		}
		blocks, err := c.readBlocks(ctx, numbers)
		if err != nil {
			return err
		}
		var conds []meta.Cond
		var ops []meta.Op
		for _, id := range numbers {
			b := blocks[blockOf(id)]
			to := min(end, (b.number+1)<<goneBits) - 1
			b.add(id, to)
			b.change = c.now()
			conds, ops = append(conds, b.unchanged()), append(ops, meta.Put(keys.Gone(b.number), b.encode()))
			from = to + 1
		}
		if err := write(conds, ops); err != nil {
			return err
		}
	}
	return nil
}

// Release returns what a transaction compares and writes that removes the
// tombstones of units, the last records of their ids: the claims go, and the ids
// are gone. [ReleaseSize] says how much that is.
func (c *Catalog) Release(ctx context.Context, units []*Unit) (conds []meta.Cond, ops []meta.Op, err error) {
	var ids []int64
	for _, u := range units {
		ops = append(ops, u.release()...)
		for _, n := range u.ids() {
			ids = append(ids, n.id)
		}
	}
	conds, gone, err := c.goneOps(ctx, ids)
	return conds, append(ops, gone...), err
}

// Parts splits a unit that one transaction cannot release: its index builds, each as
// a unit of its own, and the unit without them, which is released last.
func (u *Unit) Parts() (builds []*Unit, rest *Unit) {
	for i := range u.Segment.Builds {
		part := &Unit{ID: u.Segment.Builds[i].ID, Collection: u.Collection, Kind: UnitBuild}
		part.Segment.ID, part.Segment.Disputed = u.Segment.ID, u.Segment.Disputed
		builds = append(builds, part)
	}
	last := *u
	last.Segment.Builds = nil
	return builds, &last
}

// ReleaseSize is how many compares and operations Release returns for units.
func ReleaseSize(units []*Unit) (conds, ops int) {
	blocks := map[int64]bool{}
	for _, u := range units {
		ops += len(u.release())
		for _, n := range u.ids() {
			blocks[blockOf(n.id)] = true
		}
	}
	return len(blocks), ops + len(blocks)
}
