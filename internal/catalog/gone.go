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
// An id whose last record is removed is gone for good: a late repeat of its
// registration, whose files are deleted by then, fails with ErrIDUsed. Gone ids,
// those of reserved ranges included, are stored as merged ranges, one record for
// each 4096 ids. Ids may be registered in any order, so an id between gone ones may
// still be unused.
//
//	confirm   compares: the block as read. Puts: the block with the ids, in the
//	          transaction that removes the tombstone and the claims
//	register  compares: the blocks of its ids as read, none of which has one of them
//	roll back the ids of a restore are claimed as a range until its record is removed;
//	          by then all of them are gone
//	close     in a block with more than MaxGoneRanges ranges, unchanged for GoneGapAge:
//	          the gaps between its gone ids become gone. Never an id above the highest
//	          gone one, or below the lowest
//
// # Failures
//
//	two at once       one of them finds the block changed and reads it again
//	no answer         as for the enclosing transaction
//	a closed gap has  the replica drops its stock and allocates new ids, when it next
//	ids of a stock    needs one for removed files

const goneBits = 12 // a block has 4096 ids

// Defaults of [Options].
const (
	DefaultMaxGoneRanges = 256
	DefaultGoneGapAge    = 30 * 24 * time.Hour
)

func blockOf(id int64) int64 { return id >> goneBits }

// span is the range of ids from..to within a block, both included.
type span struct{ from, to int64 }

// block holds the gone ids of one block.
type block struct {
	number int64
	spans  []span // ascending, at least one id apart
	change time.Time
	// revision is the revision of its record; 0: no record.
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
			return nil, fmt.Errorf("%w at %s: odd number %d of range bounds", record.ErrUnreadable, kv.Key, len(ranges))
		}
		next := number << goneBits
		for i := 0; i < len(ranges); i += 2 {
			from := next + int64(ranges[i])
			next = from + int64(ranges[i+1])
			if next > (number+1)<<goneBits || next <= from {
				return nil, fmt.Errorf("%w at %s: range beyond the end of the block", record.ErrUnreadable, kv.Key)
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

// unchanged returns the compare that the block's record is as read.
func (b *block) unchanged() meta.Cond {
	if b.revision == 0 {
		return meta.Absent(keys.Gone(b.number))
	}
	return meta.Unchanged(keys.Gone(b.number), b.revision)
}

// has reports whether an id is gone.
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

// add makes the ids from..to gone.
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

// close closes the gaps between the gone ids when there are more than limit ranges and the
// last change is at least age before now.
func (b *block) close(limit int, age time.Duration, now time.Time) {
	if len(b.spans) > limit && !b.change.IsZero() && now.Sub(b.change) >= age {
		b.spans = []span{{b.spans[0].from, b.spans[len(b.spans)-1].to}}
	}
}

// readBlocks returns the blocks of ids by number.
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
			return nil, fmt.Errorf("read gone ids: %w", err)
		}
		for i, number := range part {
			if blocks[number], err = decodeBlock(number, res.Ranges[i]); err != nil {
				return nil, err
			}
		}
	}
	return blocks, nil
}

// Gone returns the gone ids among ids.
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

// notGone returns ErrIDUsed when one of ids is gone, else the compares that none has gone
// since.
func (c *Catalog) notGone(ctx context.Context, ids []int64) ([]meta.Cond, error) {
	blocks, err := c.readBlocks(ctx, ids)
	if err != nil {
		return nil, err
	}
	for _, id := range ids {
		if blocks[blockOf(id)].has(id) {
			return nil, fmt.Errorf("%w: the files of %d are deleted; allocate ids with AllocateIds", ErrIDUsed, id)
		}
	}
	var conds []meta.Cond
	for _, number := range slices.Sorted(maps.Keys(blocks)) {
		conds = append(conds, blocks[number].unchanged())
	}
	return conds, nil
}

// goneOps returns the compares and writes that make ids gone.
func (c *Catalog) goneOps(ctx context.Context, ids []int64) (conds []meta.Cond, ops []meta.Op, err error) {
	blocks, err := c.readBlocks(ctx, ids)
	if err != nil {
		return nil, nil, err
	}
	now, err := c.stamp(ctx)
	if err != nil { // without a trusted time no gap is closed
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

// GoneRange calls write with the compares and writes that make all ids of a range gone, in
// one transaction per call. write returns an error when its compares fail, which ends
// GoneRange; a repeat starts again, for gone ids stay gone.
func (c *Catalog) GoneRange(
	ctx context.Context, first, count int64, write func([]meta.Cond, []meta.Op) error,
) error {
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

// Release returns the compares and writes for a transaction that removes the tombstones of
// units, the last records of their ids: the claims are deleted and the ids gone.
// [ReleaseSize] returns their number.
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

// Split splits a unit that is too large to release in one transaction into its index
// builds, a unit each, and the unit without them, which is released last.
func (u *Unit) Split() (builds []*Unit, rest *Unit) {
	for i := range u.Segment.Builds {
		part := &Unit{ID: u.Segment.Builds[i].ID, Collection: u.Collection, Kind: UnitBuild}
		part.Segment.ID, part.Segment.Disputed = u.Segment.ID, u.Segment.Disputed
		builds = append(builds, part)
	}
	last := *u
	last.Segment.Builds = nil
	return builds, &last
}

// ReleaseSize returns the number of compares and operations that Release returns for
// units.
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
