package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// How segments are registered in bulk.
const (
	batchSegments = 100     // in one transaction
	batchBytes    = 1 << 20 // in one transaction
	batchInFlight = 8
)

func isNotFound(err error) bool { return errors.Is(err, ErrCollectionNotFound) }

// ScanSegments calls fn with the segments of a collection that are not dropped,
// in id order, in batches of bounded size, at one revision (0: the newest),
// which it returns. A compacted revision is meta.ErrCompacted.
func (c *Catalog) ScanSegments(ctx context.Context, collection, revision int64, fn func([]segment.Segment) error) (int64, error) {
	from, to := meta.Prefix(keys.SegmentPrefix(collection))
	var batch []segment.Segment
	return c.kv.Scan(ctx, from, to, revision, func(kvs []meta.KeyValue) error {
		batch = slices.Grow(batch[:0], len(kvs))
		for _, kv := range kvs {
			s, err := DecodeSegment(collection, kv)
			if err != nil {
				return err
			}
			batch = append(batch, s)
		}
		return fn(batch)
	})
}

// Segment returns a segment that is not dropped, and its revision.
func (c *Catalog) Segment(ctx context.Context, ref Ref, id int64) (segment.Segment, int64, error) {
	collection, err := c.Resolve(ctx, ref)
	if err != nil {
		return segment.Segment{}, 0, err
	}
	kv, found, _, err := c.kv.Get(ctx, keys.Segment(collection, id))
	if err != nil {
		return segment.Segment{}, 0, fmt.Errorf("read segment %d of %s: %w", id, ref, err)
	}
	if !found {
		return segment.Segment{}, 0, fmt.Errorf("%w: %d of collection %s", ErrSegmentNotFound, id, ref)
	}
	s, err := DecodeSegment(collection, kv)
	return s, kv.ModRevision, err
}

// Checkpoints returns the checkpoints of a collection's channels, in shard
// order, those that were never set left out.
func (c *Catalog) Checkpoints(ctx context.Context, ref Ref) ([]Checkpoint, error) {
	col, err := c.Collection(ctx, ref)
	if err != nil {
		return nil, err
	}
	list, err := readAll(ctx, c.kv, keys.ChannelPrefix(col.ID), 0, decodeCheckpoint)
	for i := range list {
		list[i].Channel = col.Channel(list[i].Shard)
	}
	return list, err
}

// Partitions returns a collection's partitions in id order.
func (c *Catalog) Partitions(ctx context.Context, ref Ref) ([]Partition, error) {
	col, err := c.Collection(ctx, ref)
	if err != nil {
		return nil, err
	}
	return readAll(ctx, c.kv, keys.PartitionPrefix(col.ID), 0, decodePartition)
}

// Indexes returns a collection's indexes in id order.
func (c *Catalog) Indexes(ctx context.Context, ref Ref) ([]Index, error) {
	col, err := c.Collection(ctx, ref)
	if err != nil {
		return nil, err
	}
	return readAll(ctx, c.kv, keys.IndexPrefix(col.ID), 0, decodeIndex)
}

// rules check segments against the collection that they are to join.
type rules struct {
	view View
}

func (r *rules) segment(field string, s *segment.Segment) error {
	col := &r.view.Collection
	switch {
	case s.ID <= 0:
		return invalid(field+".id", "%d is not positive", s.ID)
	case s.Channel < 0 || s.Channel >= col.Shards():
		return invalid(field+".shard", "%d, collection %s has shards 0 to %d", s.Channel, col, col.Shards()-1)
	case s.Rows < 0:
		return invalid(field+".rows", "%d is negative", s.Rows)
	case s.Level < 0 || s.Level > 2:
		return invalid(field+".level", "%d is not 0 to 2", s.Level)
	case s.State < segment.Growing || s.State > segment.Importing:
		return invalid(field+".state", "a segment cannot be registered as %v", s.State)
	case len(s.EngineData) > maxEngineData:
		return invalid(field+".engine_data", "%d bytes, at most %d", len(s.EngineData), maxEngineData)
	}
	if s.Partition != defaultPartition {
		p := find(r.view.Partitions, func(p *Partition) bool { return p.ID == s.Partition })
		if p == nil || p.State != Active {
			return fmt.Errorf("%w: %d of collection %s, in %s", ErrPartitionNotFound, s.Partition, col, field)
		}
	}
	if err := r.files(field+".files", s.Files); err != nil {
		return err
	}
	return r.builds(field+".index_builds", s)
}

// builds checks the segment's builds, and that no path occurs twice in it.
func (r *rules) builds(field string, s *segment.Segment) error {
	indexes := map[int64]bool{}
	for i := range s.Builds {
		b := &s.Builds[i]
		name := fmt.Sprintf("%s[%d]", field, i)
		if b.ID <= 0 {
			return invalid(name+".id", "%d is not positive", b.ID)
		}
		if indexes[b.Index] {
			return invalid(name+".index_id", "two builds of index %d in segment %d", b.Index, s.ID)
		}
		indexes[b.Index] = true
		x := find(r.view.Indexes, func(x *Index) bool { return x.ID == b.Index })
		if x == nil || x.State != Active {
			return fmt.Errorf("%w: %d of collection %s, in %s", ErrIndexNotFound, b.Index, &r.view.Collection, name)
		}
		if err := r.files(name+".files", b.Files); err != nil {
			return err
		}
	}
	type path struct {
		root int
		path string
	}
	seen := map[path]bool{}
	for f := range s.AllFiles() {
		p := path{f.Root, f.Path}
		if seen[p] {
			return invalid(field, "file %q occurs twice in segment %d", f.Path, s.ID)
		}
		seen[p] = true
	}
	return nil
}

func (r *rules) files(field string, files []segment.File) error {
	if len(files) > maxSegmentFiles {
		return invalid(field, "%d files, at most %d", len(files), maxSegmentFiles)
	}
	roots := r.view.Collection.Roots
	for i := range files {
		f := &files[i]
		name := fmt.Sprintf("%s[%d]", field, i)
		switch {
		case f.Root < 0 || f.Root >= len(roots):
			return invalid(name+".root", "%d, the collection has roots 0 to %d", f.Root, len(roots)-1)
		case f.Size < 0:
			return invalid(name+".size_bytes", "%d is negative", f.Size)
		case f.Entries < 0 || f.Field < 0 || f.LogID < 0:
			return invalid(name, "entries, field_id and log_id must not be negative")
		case f.Kind == "":
			return invalid(name+".kind", "is empty")
		case f.MinTimestamp > f.MaxTimestamp:
			return invalid(name+".min_timestamp", "is after max_timestamp")
		}
		if err := object.CheckKey(f.Path); err != nil {
			return invalid(name+".path", "%v", err)
		}
		if err := CheckObjectKey(roots[f.Root].Prefix + f.Path); err != nil {
			return invalid(name+".path", "%v", err)
		}
	}
	return nil
}

// newIDs are the ids of segments and builds that a change registers.
func newIDs(segments []segment.Segment) []int64 {
	var ids []int64
	for i := range segments {
		ids = append(ids, segments[i].ID)
		for b := range segments[i].Builds {
			ids = append(ids, segments[i].Builds[b].ID)
		}
	}
	return ids
}

// notDropped finds out, at one revision, that none of ids was dropped, and
// returns the compares that this is still so. An id that was dropped is
// ErrSegmentExists: an id is never used twice.
func (c *Catalog) notDropped(ctx context.Context, collection int64, ids []int64) (conds func(first, last int64) []meta.Cond, err error) {
	if len(ids) == 0 {
		return func(_, _ int64) []meta.Cond { return nil }, nil
	}
	sorted := slices.Clone(ids)
	slices.Sort(sorted)
	var revision int64
	prefixes := []string{keys.UnitPrefix(collection), keys.TombPrefix(collection)}
	for _, prefix := range prefixes {
		from, to := keys.Span(prefix, sorted[0], sorted[len(sorted)-1])
		for {
			res, err := c.kv.Range(ctx, meta.Range{From: from, To: to, KeysOnly: true, Limit: 1000, Revision: revision})
			if err != nil {
				return nil, fmt.Errorf("read dropped units of collection %d: %w", collection, err)
			}
			if revision == 0 {
				revision = res.Revision
			}
			for _, kv := range res.KVs {
				id, err := keys.LastID(kv.Key)
				if err != nil {
					return nil, err
				}
				if _, dropped := slices.BinarySearch(sorted, id); dropped {
					return nil, fmt.Errorf("%w: %d was dropped; an id is never used twice", ErrSegmentExists, id)
				}
			}
			if !res.More {
				break
			}
			from = res.KVs[len(res.KVs)-1].Key + "\x00"
		}
	}
	return func(first, last int64) []meta.Cond {
		var list []meta.Cond
		for _, prefix := range prefixes {
			from, to := keys.Span(prefix, first, last)
			list = append(list, meta.Cond{From: from, To: to, Target: meta.ModRevision, Op: meta.Less, Revision: revision + 1})
		}
		return list
	}, nil
}

// AddSegments registers segments, in atomic batches. It is idempotent by id:
// one that is there with equal content counts as present. On an error some
// batches may have been written.
func (c *Catalog) AddSegments(ctx context.Context, collection int64, segments []segment.Segment) (added, present int, err error) {
	if len(segments) == 0 {
		return 0, 0, nil
	}
	if added, present, err = c.addSegments(ctx, collection, segments); err != nil {
		return 0, 0, fmt.Errorf("add segments to collection %d: %w", collection, err)
	}
	return added, present, nil
}

func (c *Catalog) addSegments(ctx context.Context, collection int64, segments []segment.Segment) (added, present int, err error) {
	view, err := c.At(ctx, collection, 0)
	if err != nil {
		return 0, 0, err
	}
	if view.Collection.State != Active {
		return 0, 0, fmt.Errorf("%w: %s is %v", ErrCollectionNotActive, &view.Collection, view.Collection.State)
	}
	r := rules{view}
	seen := make(map[int64]bool, len(segments))
	for i := range segments {
		field := fmt.Sprintf("segments[%d]", i)
		if err := r.segment(field, &segments[i]); err != nil {
			return 0, 0, err
		}
		if seen[segments[i].ID] {
			return 0, 0, invalid(field+".id", "%d occurs twice", segments[i].ID)
		}
		seen[segments[i].ID] = true
	}
	if err := c.checkHandedOut(ctx, "segment or index build", newIDs(segments)...); err != nil {
		return 0, 0, err
	}
	op, err := c.newOp()
	if err != nil {
		return 0, 0, err
	}
	batches, err := makeBatches(collection, segments, op)
	if err != nil {
		return 0, 0, err
	}
	counts := make([]int, len(batches))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	for i, b := range batches {
		group.Go(func() error {
			n, err := c.addBatch(ctx, collection, b)
			counts[i] = n
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return 0, 0, err
	}
	for _, n := range counts {
		added += n
	}
	return added, len(segments) - added, nil
}

// batch is the segments of one transaction.
type batch struct {
	ids    []int64 // of segments and builds
	keys   []string
	values [][]byte
}

func makeBatches(collection int64, segments []segment.Segment, op string) ([]batch, error) {
	var list []batch
	var cur batch
	size := 0
	for i := range segments {
		s := &segments[i]
		value := record.Encode(encodeSegment(collection, s, op))
		if len(value) > MaxSegmentBytes {
			return nil, fmt.Errorf("%w: segment %d takes %d bytes, at most %d; give it fewer files",
				ErrLimitExceeded, s.ID, len(value), MaxSegmentBytes)
		}
		if len(cur.keys) > 0 && (len(cur.keys) == batchSegments || size+len(value) > batchBytes) {
			list, cur, size = append(list, cur), batch{}, 0
		}
		cur.keys = append(cur.keys, keys.Segment(collection, s.ID))
		cur.values = append(cur.values, value)
		cur.ids = append(cur.ids, newIDs(segments[i:i+1])...)
		size += len(value)
	}
	return append(list, cur), nil
}

// addBatch writes a batch in one transaction and returns how many of its
// segments were not there before.
func (c *Catalog) addBatch(ctx context.Context, collection int64, b batch) (int, error) {
	for attempt := range maxAttempts {
		if attempt > 0 {
			if err := pause(ctx, attempt); err != nil {
				return 0, err
			}
		}
		_, unchanged, err := c.active(ctx, Ref{ID: collection})
		if err != nil {
			return 0, err
		}
		notDropped, err := c.notDropped(ctx, collection, b.ids)
		if err != nil {
			return 0, err
		}
		txn := meta.Txn{If: append(notDropped(slices.Min(b.ids), slices.Max(b.ids)), unchanged)}
		for i, key := range b.keys {
			txn.If = append(txn.If, meta.Absent(key))
			txn.Then = append(txn.Then, meta.Put(key, b.values[i]))
			txn.Else = append(txn.Else, meta.Get(key))
		}
		res, err := c.kv.Txn(ctx, txn)
		if err != nil {
			return 0, err
		}
		if res.Succeeded {
			return len(b.keys), nil
		}
		if b, err = b.without(res.Ranges); err != nil {
			return 0, err
		}
		if len(b.keys) == 0 {
			return 0, nil
		}
	}
	return 0, fmt.Errorf("%w: gave up after %d attempts", ErrConflict, maxAttempts)
}

// without returns the batch without the segments that were found, each of which
// must be equal to the one that it stands beside.
func (b batch) without(found [][]meta.KeyValue) (batch, error) {
	if !slices.ContainsFunc(found, func(kvs []meta.KeyValue) bool { return len(kvs) > 0 }) {
		return b, nil
	}
	rest := batch{ids: b.ids}
	for i, kvs := range found {
		if len(kvs) == 0 {
			rest.keys, rest.values = append(rest.keys, b.keys[i]), append(rest.values, b.values[i])
			continue
		}
		same, err := equalSegments(kvs[0].Value, b.values[i])
		if err != nil {
			return rest, err
		}
		if !same {
			id, _ := keys.LastID(b.keys[i])
			return rest, fmt.Errorf("%w: %d with another content; an id is never used twice", ErrSegmentExists, id)
		}
	}
	return rest, nil
}

// equalSegments says whether two records say the same, whoever wrote them.
func equalSegments(a, b []byte) (bool, error) {
	var plain [2][]byte
	for i, data := range [][]byte{a, b} {
		rec := &storagev1.Segment{}
		if err := record.Decode(meta.KeyValue{Value: data}, rec); err != nil {
			return false, err
		}
		rec.Op = ""
		plain[i] = record.Encode(rec)
	}
	return bytes.Equal(plain[0], plain[1]), nil
}

// DropSegments drops segments in atomic batches and returns how many it
// dropped; those that were dropped before do not count. One that never was
// there is ErrSegmentNotFound, before anything is written.
func (c *Catalog) DropSegments(ctx context.Context, ref Ref, ids []int64) (int, error) {
	col, _, err := c.active(ctx, ref)
	if err != nil {
		return 0, fmt.Errorf("drop segments: %w", err)
	}
	ids = slices.Clone(ids)
	slices.Sort(ids)
	ids = slices.Compact(ids)
	var live []int64
	for part := range slices.Chunk(ids, meta.MaxTxnOps/2) {
		// Units and segments are read at one revision: a drop moves between them.
		var gets []meta.Op
		for _, id := range part {
			gets = append(gets, meta.Get(keys.Segment(col.ID, id)), meta.Get(keys.Unit(col.ID, id)))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return 0, fmt.Errorf("drop segments of %s: %w", &col, err)
		}
		for i, id := range part {
			switch {
			case len(res.Ranges[2*i]) > 0:
				live = append(live, id)
			case len(res.Ranges[2*i+1]) == 0:
				return 0, fmt.Errorf("drop segments: %w: %d of collection %s", ErrSegmentNotFound, id, &col)
			}
		}
	}
	dropped := 0
	for part := range slices.Chunk(live, MaxSwap) {
		n, err := c.dropBatch(ctx, col.ID, part)
		if err != nil {
			return dropped, err
		}
		dropped += n
	}
	return dropped, nil
}

// dropBatch drops those of ids that are still there.
func (c *Catalog) dropBatch(ctx context.Context, collection int64, ids []int64) (int, error) {
	for len(ids) > 0 {
		_, err := c.Change(ctx, request.Token{}, Ref{ID: collection}, Swap{Drop: ids})
		var gone *goneError
		if !errors.As(err, &gone) {
			return len(ids), err
		}
		ids = slices.DeleteFunc(slices.Clone(ids), func(id int64) bool { return id == gone.segment })
	}
	return 0, nil
}
