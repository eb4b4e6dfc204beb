package catalog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Limits of the registration and the drop of many segments.
const (
	batchIDs      = 61      // ids claimed per transaction, with at most two compares each
	batchBytes    = 1 << 20 // per transaction
	batchInFlight = 8
	fixedCompares = 2                  // of the collection, and of the ids of restores
	dropLookup    = meta.MaxTxnOps / 3 // segments per lookup, with three keys each
)

func isNotFound(err error) bool { return errors.Is(err, ErrCollectionNotFound) }

// ScanSegments calls fn with the segments of a collection that are not dropped,
// in id order, in batches of bounded size, at one revision (0: the newest), which it
// returns. A compacted revision is meta.ErrCompacted. The batch is valid until fn
// returns; fn may keep its segments.
func (c *Catalog) ScanSegments(
	ctx context.Context, collection, revision int64, fn func([]segment.Segment) error,
) (int64, error) {
	var batch []segment.Segment
	return c.ScanRecords(ctx, collection, revision, "", func(kvs []meta.KeyValue) error {
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

// ScanRecords is [Catalog.ScanSegments] with undecoded records, for a [Decoder]. It starts
// behind the key after; empty: with the first record. fn may keep the batch.
func (c *Catalog) ScanRecords(
	ctx context.Context, collection, revision int64, after string, fn func([]meta.KeyValue) error,
) (int64, error) {
	from, to := meta.Prefix(keys.SegmentPrefix(collection))
	if after != "" {
		from = after + "\x00"
	}
	return c.kv.Scan(ctx, from, to, revision, fn)
}

// CountSegments returns the number of segments of a collection that are not dropped, and
// the record of the first one, if any.
func (c *Catalog) CountSegments(ctx context.Context, collection int64) (n int64, first meta.KeyValue, err error) {
	from, to := meta.Prefix(keys.SegmentPrefix(collection))
	res, err := c.kv.Range(ctx, meta.Range{From: from, To: to, Limit: 1})
	if err != nil {
		return 0, meta.KeyValue{}, fmt.Errorf("count segments of collection %d: %w", collection, err)
	}
	if len(res.KVs) > 0 {
		first = res.KVs[0]
	}
	return res.Count, first, nil
}

// Segment returns a segment that is not dropped, and its revision.
func (c *Catalog) Segment(ctx context.Context, ref Ref, id int64) (segment.Segment, int64, error) {
	collection, err := c.Resolve(ctx, ref)
	if err != nil {
		return segment.Segment{}, 0, err
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Get(keys.Collection(collection)), meta.Get(keys.Segment(collection, id)),
	}})
	if err != nil {
		return segment.Segment{}, 0, fmt.Errorf("read segment %d of %s: %w", id, ref, err)
	}
	for _, kv := range res.Ranges[0] {
		// Segments of a restore are hidden until it is published.
		if col, err := DecodeCollection(kv); err != nil || col.State == Restoring {
			return segment.Segment{}, 0, errors.Join(err, col.CheckActive())
		}
	}
	if len(res.Ranges[1]) == 0 {
		return segment.Segment{}, 0, fmt.Errorf("%w: %d of collection %s", ErrSegmentNotFound, id, ref)
	}
	kv := res.Ranges[1][0]
	s, err := DecodeSegment(collection, kv)
	return s, kv.ModRevision, err
}

// Checkpoints returns the checkpoints of a collection's channels in shard order, without
// channels that have none.
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

// Partitions calls fn with a collection's partitions in id order, after the id after,
// until fn returns false; more is then true. It holds one batch of a scan in memory.
func (c *Catalog) Partitions(
	ctx context.Context, collection, after int64, fn func(Partition) bool,
) (more bool, err error) {
	return readUntil(ctx, c.kv, keys.PartitionPrefix(collection), after, decodePartition, fn)
}

// Indexes is Partitions for indexes.
func (c *Catalog) Indexes(ctx context.Context, collection, after int64, fn func(Index) bool) (more bool, err error) {
	return readUntil(ctx, c.kv, keys.IndexPrefix(collection), after, decodeIndex, fn)
}

// errStopScan ends a scan early.
var errStopScan = errors.New("stop the scan")

// readUntil calls fn with the records under a prefix whose keys end in an id, in id order,
// starting behind after, until fn returns false.
func readUntil[T any](
	ctx context.Context, kv meta.KV, prefix string, after int64,
	decode func(meta.KeyValue) (T, error), fn func(T) bool,
) (more bool, err error) {
	from, to := meta.Prefix(prefix)
	if after > 0 {
		from = prefix + keys.ID(after) + "\x00"
	}
	_, err = kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			t, err := decode(kv)
			if err != nil {
				return err
			}
			if !fn(t) {
				return errStopScan
			}
		}
		return nil
	})
	if errors.Is(err, errStopScan) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read %s: %w", prefix, err)
	}
	return false, nil
}

// rules checks segments against their collection.
type rules struct {
	view View
}

// segment checks one segment. The indexes of its existing builds, old, may be dropped.
func (r *rules) segment(field string, s *segment.Segment, old []segment.Build) error {
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
	return r.builds(field+".index_builds", s, old)
}

// added checks a new segment. It refuses one that is FLUSHED with rows but without files
// of rows: snapshots would omit it silently.
func (r *rules) added(field string, s *segment.Segment) error {
	if s.LacksFiles() {
		return invalid(field+".files", lacksFilesText, s.ID, s.Rows)
	}
	return r.segment(field, s, nil)
}

const lacksFilesText = "segment %d is FLUSHED with %d rows, and has no file of rows or deletes: " +
	"snapshots would omit it; add its files, keep it GROWING or SEALED until they are written, or set 0 rows"

// builds checks the segment's builds, and that its paths are distinct.
func (r *rules) builds(field string, s *segment.Segment, old []segment.Build) error {
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
		known := slices.ContainsFunc(old, func(o segment.Build) bool { return o.ID == b.ID && o.Index == b.Index })
		if !known && (x == nil || x.State != Active) {
			return fmt.Errorf("%w: %d of collection %s, in %s", ErrIndexNotFound, b.Index, &r.view.Collection, name)
		}
		if err := r.files(name+".files", b.Files); err != nil {
			return err
		}
	}
	seen := map[FilePath]bool{}
	for f := range s.AllFiles() {
		p := FilePath{f.Root, f.Path}
		if seen[p] {
			name := strings.TrimSuffix(field, ".index_builds") + ".files"
			return invalid(name, "file %q occurs twice in segment %d", f.Path, s.ID)
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
		case f.Checksum.Type == "" && len(f.Checksum.Value) > 0:
			return invalid(name+".checksum.type", "is empty")
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

// newIDs appends the ids of a segment and its builds.
func newIDs(ids []newID, s *segment.Segment) []newID {
	return appendBuilds(append(ids, newID{s.ID, false}), s.Builds)
}

func appendBuilds(ids []newID, builds []segment.Build) []newID {
	for i := range builds {
		ids = append(ids, newID{builds[i].ID, true})
	}
	return ids
}

// checkNew returns an error unless ids may be registered: they are allocated and distinct.
func (c *Catalog) checkNew(ctx context.Context, ids []newID) error {
	if err := checkUnique(ids); err != nil {
		return err
	}
	list := make([]int64, len(ids))
	for i, n := range ids {
		list[i] = n.id
	}
	return c.checkAllocated(ctx, "segment or index build", list...)
}

// checkUnique returns an error when ids are not distinct: the drop of one thing would hide
// the other.
func checkUnique(ids []newID) error {
	seen := make(map[int64]bool, len(ids))
	for _, n := range ids {
		if seen[n.id] {
			return invalid("id", "%d occurs twice; segments and index builds share one range of ids", n.id)
		}
		seen[n.id] = true
	}
	return nil
}

// AddSegments registers segments in atomic batches. It is idempotent by id: an existing
// segment with equal content counts as present. On an error some batches may have been
// written.
func (c *Catalog) AddSegments(
	ctx context.Context, collection int64, segments []segment.Segment,
) (added, present int, err error) {
	if len(segments) == 0 {
		return 0, 0, nil
	}
	if added, present, err = c.addSegments(ctx, collection, segments); err != nil {
		return 0, 0, fmt.Errorf("add segments to collection %d: %w", collection, err)
	}
	return added, present, nil
}

func (c *Catalog) addSegments(
	ctx context.Context, collection int64, segments []segment.Segment,
) (added, present int, err error) {
	view, err := c.At(ctx, collection, 0)
	if err != nil {
		return 0, 0, err
	}
	if err := view.Collection.CheckActive(); err != nil {
		return 0, 0, err
	}
	op, err := record.NewOp(c.rand)
	if err != nil {
		return 0, 0, err
	}
	entries := make([]entry, len(segments))
	r := rules{view}
	seen := make(map[int64]bool, len(segments))
	var ids []newID
	var claims []fileClaim
	for i := range segments {
		e := entry{
			field: fmt.Sprintf("segments[%d]", i), segment: &segments[i], key: keys.Segment(collection, segments[i].ID),
		}
		if err := r.added(e.field, e.segment); err != nil {
			return 0, 0, err
		}
		if seen[e.segment.ID] {
			return 0, 0, invalid(e.field+".id", "%d occurs twice", e.segment.ID)
		}
		seen[e.segment.ID] = true
		ids = newIDs(ids, e.segment)
		claims = fileClaims(claims, collection, e.field, e.segment)
		rec := encodeSegment(collection, e.segment, op)
		rec.RemovedWhole = true // no path was removed yet
		e.value = record.Encode(rec)
		if err := checkSize(rec, e.segment, view.Collection.Roots, e.value, sizes{}); err != nil {
			return 0, 0, err
		}
		entries[i] = e
	}
	if err := c.checkNew(ctx, ids); err != nil {
		return 0, 0, err
	}
	if err := c.checkFileClaims(ctx, collection, claims); err != nil {
		return 0, 0, err
	}
	batches := splitEntries(entries)
	counts := make([]int, len(batches))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	for i, b := range batches {
		group.Go(func() error {
			n, err := c.addBatch(ctx, view, b)
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

// entry is a segment to register, with its record.
type entry struct {
	field   string // of the request
	segment *segment.Segment
	key     string
	value   []byte
}

// split cuts list into parts for one transaction each: at most count items, and at most
// batchBytes unless a single item is larger.
func split[T any](list []T, count int, size func(T) int) [][]T {
	var parts [][]T
	from, bytes := 0, 0
	for i, t := range list {
		if n := size(t); i > from && (i-from == count || bytes+n > batchBytes) {
			parts, from, bytes = append(parts, list[from:i:i]), i, 0
		}
		bytes += size(t)
	}
	return append(parts, list[from:])
}

// splitEntries cuts list into parts for one transaction each, with at most batchIDs ids,
// meta.MaxTxnOps compares (two for each id, one for each block of ids) and batchBytes,
// unless a single segment has more.
func splitEntries(list []entry) [][]entry {
	var parts [][]entry
	from, ids, bytes, blocks := 0, 0, 0, map[int64]bool{}
	for i, e := range list {
		own := newIDs(nil, e.segment)
		added := map[int64]bool{}
		for _, n := range own {
			if b := blockOf(n.id); !blocks[b] {
				added[b] = true
			}
		}
		n := ids + len(own)
		compares := fixedCompares + 2*n + len(blocks) + len(added)
		if i > from && (n > batchIDs || compares > meta.MaxTxnOps || bytes+len(e.value) > batchBytes) {
			parts, from, ids, bytes = append(parts, list[from:i:i]), i, 0, 0
			clear(blocks)
		}
		ids, bytes = ids+len(own), bytes+len(e.value)
		for _, n := range own {
			blocks[blockOf(n.id)] = true
		}
	}
	return append(parts, list[from:])
}

// addBatch writes a batch, checked against view, in one transaction and returns the number
// of segments that it added.
func (c *Catalog) addBatch(ctx context.Context, view View, batch []entry) (int, error) {
	collection := view.Collection.ID
	for attempt := range maxAttempts {
		if attempt > 0 {
			if err := c.pause(ctx, attempt); err != nil {
				return 0, err
			}
			var err error
			if view, err = c.At(ctx, collection, 0); err != nil {
				return 0, err
			}
			if err := view.Collection.CheckActive(); err != nil {
				return 0, err
			}
			r := rules{view}
			for _, e := range batch {
				if err := r.added(e.field, e.segment); err != nil {
					return 0, err
				}
			}
		}
		var ids []newID
		for _, e := range batch {
			ids = newIDs(ids, e.segment)
		}
		unclaimed, claims, err := c.claimOps(ctx, collection, ids)
		if err != nil {
			return 0, err
		}
		txn := meta.Txn{If: append(unclaimed, view.Collection.unchanged()), Then: claims}
		for _, e := range batch {
			txn.Then = append(txn.Then, meta.Put(e.key, e.value))
			txn.Else = append(txn.Else, meta.Get(e.key))
		}
		res, err := c.kv.Txn(ctx, txn)
		if err != nil {
			return 0, err
		}
		if res.Succeeded {
			return len(batch), nil
		}
		rest, err := missing(batch, res.Ranges)
		switch {
		case err != nil || len(rest) == 0:
			return 0, err
		case len(rest) == len(batch):
			if err := c.checkUnclaimed(ctx, collection, ids); err != nil {
				return 0, err
			}
		}
		batch = rest
	}
	return 0, fmt.Errorf("%w: gave up after %d attempts", meta.ErrConflict, maxAttempts)
}

// missing returns the entries of a batch without a record in found, which has a list of at
// most one record for each entry. A record with another content is ErrSegmentExists.
func missing(batch []entry, found [][]meta.KeyValue) ([]entry, error) {
	var rest []entry
	for i, e := range batch {
		if len(found[i]) == 0 {
			rest = append(rest, e)
			continue
		}
		same, err := equalSegments(found[i][0], meta.KeyValue{Key: e.key, Value: e.value})
		if err != nil {
			return nil, err
		}
		if !same {
			return nil, fmt.Errorf("%w: %d with another content; ids are never reused", ErrSegmentExists, e.segment.ID)
		}
	}
	return rest, nil
}

// equalSegments reports whether two records have equal content, apart from the operation
// that wrote them.
func equalSegments(a, b meta.KeyValue) (bool, error) {
	var plain [2][]byte
	for i, kv := range []meta.KeyValue{a, b} {
		rec := &storagev1.Segment{}
		if err := record.Decode(kv, rec); err != nil {
			return false, err
		}
		rec.Op, rec.Removed, rec.RemovedWhole = "", nil, false
		plain[i] = record.Encode(rec)
	}
	return bytes.Equal(plain[0], plain[1]), nil
}

// DropSegments drops segments in atomic batches and returns the number of dropped ones;
// segments that were dropped before do not count, reclaimed ones included. An id that
// never was a segment is ErrSegmentNotFound, before anything is written.
func (c *Catalog) DropSegments(ctx context.Context, ref Ref, ids []int64) (int, error) {
	col, _, err := c.active(ctx, &ref)
	if err != nil {
		return 0, fmt.Errorf("drop segments: %w", err)
	}
	ids = slices.Clone(ids)
	slices.Sort(ids)
	ids = slices.Compact(ids)
	type live struct {
		id   int64
		size int // of the record, and so of the unit
	}
	var found []live
	var missing []int64 // without a record
	for part := range slices.Chunk(ids, dropLookup) {
		// At one revision: a dropped segment moves from one key to the next.
		var gets []meta.Op
		for _, id := range part {
			gets = append(gets, meta.Get(keys.Segment(col.ID, id)), meta.Get(keys.Unit(col.ID, id)),
				meta.Get(keys.TombstonePrefix(col.ID)+keys.ID(id)))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return 0, fmt.Errorf("drop segments of %s: %w", &col, err)
		}
		for i, id := range part {
			switch kvs := res.Ranges[3*i:]; {
			case len(kvs[0]) > 0:
				found = append(found, live{id, len(kvs[0][0].Value)})
			case len(kvs[1]) == 0 && len(kvs[2]) == 0:
				missing = append(missing, id)
			}
		}
	}
	gone, err := c.Gone(ctx, missing) // after the lookup: an id that lost its record since is gone
	if err != nil {
		return 0, fmt.Errorf("drop segments of %s: %w", &col, err)
	}
	for _, id := range missing {
		if !gone[id] {
			return 0, fmt.Errorf("drop segments: %w: %d of collection %s", ErrSegmentNotFound, id, &col)
		}
	}
	dropped := 0
	if len(found) == 0 {
		return 0, nil
	}
	for _, part := range split(found, MaxSegmentChange, func(l live) int { return l.size }) {
		batch := make([]int64, len(part))
		for i := range part {
			batch[i] = part[i].id
		}
		n, err := c.dropBatch(ctx, col.ID, batch)
		if err != nil {
			return dropped, err
		}
		dropped += n
	}
	return dropped, nil
}

// dropBatch drops the segments among ids that still exist.
func (c *Catalog) dropBatch(ctx context.Context, collection int64, ids []int64) (int, error) {
	for len(ids) > 0 {
		_, err := c.Change(ctx, request.Token{}, Ref{ID: collection}, SegmentChange{Drop: ids})
		var gone *segmentNotFoundError
		if !errors.As(err, &gone) {
			return len(ids), err
		}
		ids = slices.DeleteFunc(slices.Clone(ids), func(id int64) bool { return id == gone.segment })
	}
	return 0, nil
}
