package catalog

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// SegmentChange is a change of a collection's segments in one transaction: a
// compaction, a flush, a replacement of files, a move of checkpoints.
type SegmentChange struct {
	Drop        []int64
	Add         []segment.Segment
	Update      []Update
	Checkpoints []Checkpoint
}

// Update is a change of one segment. Nil and empty fields stay.
type Update struct {
	Segment      int64
	Revision     int64 // expected revision of the segment; 0: any
	State        segment.State
	Rows         *int64
	DML          *segment.Position
	Sorted       *bool
	RemoveFiles  []FilePath
	AddFiles     []segment.File
	AddBuilds    []segment.Build // each replaces an older build of its index
	RemoveBuilds []int64
	EngineData   *[]byte
}

// FilePath names a file of a segment.
type FilePath struct {
	Root int
	Path string
}

// segmentNotFoundError is an ErrSegmentNotFound with the segment.
type segmentNotFoundError struct {
	segment    int64
	collection int64
}

func (e *segmentNotFoundError) Error() string {
	return fmt.Sprintf("%v: %d of collection %d", ErrSegmentNotFound, e.segment, e.collection)
}

func (e *segmentNotFoundError) Is(target error) bool { return target == ErrSegmentNotFound }

// Change executes a segment change and returns its revision.
func (c *Catalog) Change(ctx context.Context, tok request.Token, ref Ref, change SegmentChange) (int64, error) {
	if n := len(change.Drop) + len(change.Add) + len(change.Update); n > MaxSegmentChange {
		return 0, invalid("inputs", "%d inputs, outputs and updates, at most %d in one step; split it into several",
			n, MaxSegmentChange)
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		p, err := c.planChange(ctx, &ref, change)
		if errors.Is(err, errStaleStock) {
			c.ForgetStock(ctx)
			p, err = c.planChange(ctx, &ref, change)
		}
		return p, err
	})
	if err != nil {
		return 0, fmt.Errorf("change segments of collection %s: %w", ref, err)
	}
	return out.revision, nil
}

// SetCheckpoints moves checkpoints forward and returns a revision at which all of them
// have the requested positions.
func (c *Catalog) SetCheckpoints(ctx context.Context, ref Ref, checkpoints []Checkpoint) (int64, error) {
	return c.Change(ctx, request.Token{}, ref, SegmentChange{Checkpoints: checkpoints})
}

// errStaleStock means that an id of the replica's stock is gone: the stock is so old that
// a gap with the id was closed.
var errStaleStock = errors.New("stock of ids is too old")

// changePlan builds the transaction of a segment change.
type changePlan struct {
	collection   int64
	op           string
	now          time.Time // drop time of the units
	drops        bool      // the change makes a unit
	rules        rules
	txn          meta.Txn
	newIDs       []newID // that the change registers
	unitIDs      []int64 // new ids for units of removed files
	reservedKeys []reservedKey
	dropped      []droppedUnit
	fileClaims   []fileClaim // files that must belong to no other segment
}

// droppedUnit is a segment that the change drops, with the put of its unit's record.
type droppedUnit struct {
	id   int64
	rec  *storagev1.Unit
	then int // index of the put in txn.Then
}

// reservedKey is a key that must be absent, and the error when it exists.
type reservedKey struct {
	key     string
	compare bool // in the transaction as well; claims have compares already
	err     func(meta.KeyValue) error
}

// planChange reads the preconditions of a change and returns its transaction.
func (c *Catalog) planChange(ctx context.Context, ref *Ref, change SegmentChange) (plan, error) {
	col, unchanged, err := c.active(ctx, ref)
	if err != nil {
		return plan{}, err
	}
	view := View{Collection: col}
	if len(change.Add)+len(change.Update) > 0 { // drops need no partition and no index
		if view, err = c.At(ctx, col.ID, 0); err != nil {
			return plan{}, err
		}
	}
	p := &changePlan{collection: col.ID, rules: rules{view}}
	var stampErr error // returned only when the change drops something
	if len(change.Drop)+len(change.Update) > 0 {
		p.now, stampErr = c.stamp(ctx)
	}
	p.txn.If = []meta.Cond{unchanged}
	if p.op, err = record.NewOp(c.rand); err != nil {
		return plan{}, err
	}
	if err := change.checkUnique(); err != nil {
		return plan{}, err
	}
	if err := c.planSegments(ctx, p, change); err != nil {
		return plan{}, err
	}
	if p.drops && stampErr != nil {
		return plan{}, fmt.Errorf("read the time of the drop: %w", stampErr)
	}
	if err := c.checkReservedKeys(ctx, p); err != nil {
		return plan{}, err
	}
	for _, k := range p.reservedKeys {
		if k.compare {
			p.txn.If = append(p.txn.If, meta.Absent(k.key))
		}
	}
	revision, err := c.moveCheckpoints(ctx, p, change.Checkpoints)
	if err != nil {
		return plan{}, err
	}
	if err := c.planClaims(ctx, p); err != nil {
		return plan{}, err
	}
	if err := c.spillInputs(ctx, p); err != nil {
		return plan{}, err
	}
	return plan{txn: p.txn, id: col.ID, revision: revision}, nil
}

// checkUnique returns an error when a segment occurs in the change more than once.
func (change *SegmentChange) checkUnique() error {
	seen := map[int64]bool{}
	once := func(field string, id int64) error {
		if seen[id] {
			return invalid(field, "segment %d occurs twice", id)
		}
		seen[id] = true
		return nil
	}
	for i, id := range change.Drop {
		if err := once(fmt.Sprintf("inputs[%d]", i), id); err != nil {
			return err
		}
	}
	for i := range change.Update {
		if err := once(fmt.Sprintf("updates[%d].segment_id", i), change.Update[i].Segment); err != nil {
			return err
		}
	}
	for i := range change.Add {
		if err := once(fmt.Sprintf("outputs[%d].id", i), change.Add[i].ID); err != nil {
			return err
		}
	}
	return nil
}

// planSegments adds the drops, updates and additions of a change to p.
func (c *Catalog) planSegments(ctx context.Context, p *changePlan, change SegmentChange) error {
	ids := slices.Clone(change.Drop)
	for i := range change.Update {
		ids = append(ids, change.Update[i].Segment)
	}
	current, err := c.readSegments(ctx, p.collection, ids)
	if err != nil {
		return err
	}
	for i := range change.Drop {
		if err := p.drop(current[i]); err != nil {
			return err
		}
	}
	for i := range change.Update {
		if len(change.Update[i].RemoveFiles) > 0 {
			id, err := c.NextID(ctx)
			if err != nil {
				return err
			}
			p.unitIDs = append(p.unitIDs, id)
		}
		field, kv := fmt.Sprintf("updates[%d]", i), current[len(change.Drop)+i]
		if err := p.update(field, kv, &change.Update[i]); err != nil {
			return err
		}
	}
	for i := range change.Add {
		if err := p.add(fmt.Sprintf("outputs[%d]", i), &change.Add[i]); err != nil {
			return err
		}
	}
	return nil
}

// planClaims checks the new ids and files of a change, and adds the claims to p.
func (c *Catalog) planClaims(ctx context.Context, p *changePlan) error {
	if err := c.checkNew(ctx, p.newIDs); err != nil {
		return err
	}
	unclaimed, claims, err := c.claimOps(ctx, p.collection, p.newIDs)
	if errors.Is(err, ErrIDUsed) {
		if gone, goneErr := c.Gone(ctx, p.unitIDs); goneErr == nil && len(gone) > 0 {
			err = fmt.Errorf("%w: %w", errStaleStock, err)
		}
	}
	if err != nil {
		return err
	}
	p.txn.If, p.txn.Then = append(p.txn.If, unclaimed...), append(p.txn.Then, claims...)
	return c.checkFileClaims(ctx, p.collection, p.fileClaims)
}

// # Size of a segment change
//
// The transaction of a change holds the records of its outputs and updates, and those
// of its inputs, which become units. 60 inputs may have 60 times MaxSegmentBytes,
// and a transaction takes [meta.MaxTxnBytes]. So the inputs that do not fit are
// spilled before it, the largest first:
//
//	put     (no compare) the unit's record, as the object
//	        gc/held/<collection>/<segment>-<digest> of the store of snapshots
//	change  compares: the segment as read. Puts: the unit's stub; deletes: the segment
//
// A stub takes about 150 bytes, so any inputs fit, with outputs and updates of up to
// about 1.4 MB in total. The key has the record's digest, for a change that is decided
// again may drop another content: a key stands for one content, and a delayed put
// changes no other object.
//
// A sweep deletes such an object only when there is neither a segment nor a unit
// nor a tombstone of the id, at one revision read after its listing: the segment's
// record exists before the put, and the change moves it to the unit's.
//
//	put fails, or the process      no change. The object stays until the segment is
//	dies after it                  dropped and its unit is gone; then it is swept
//	a compare of the change fails  likewise; decided again, with another object
//	change: no answer              the unit is spilled with its object in place, or
//	                               as above
//	store does not answer          a change that fits succeeds as usual; any other is
//	                               refused as UNAVAILABLE
const maxChangeBytes = meta.MaxTxnBytes - 4096

// spillsInFlight is the number of concurrent spills of a change's inputs.
const spillsInFlight = 8

// spillInputs spills dropped segments of a change until its transaction is small enough.
func (c *Catalog) spillInputs(ctx context.Context, p *changePlan) error {
	bytes := 0
	for _, cond := range p.txn.If {
		bytes += len(cond.From) + len(cond.To)
	}
	for _, op := range p.txn.Then {
		bytes += len(op.From) + len(op.Value)
	}
	if bytes <= maxChangeBytes || c.spill == nil { // then the store refuses a larger one
		return nil
	}
	size := func(d droppedUnit) int { return len(p.txn.Then[d.then].Value) }
	slices.SortFunc(p.dropped, func(a, b droppedUnit) int { return size(b) - size(a) })
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(spillsInFlight)
	for _, d := range p.dropped {
		if bytes <= maxChangeBytes {
			break
		}
		op := &p.txn.Then[d.then]
		full := op.Value
		stub := NewStub(full, d.rec)
		stub.Parked.Suffix = hex.EncodeToString(stub.GetParked().GetSha256())[:spillSuffix]
		bytes -= len(full) - 256 // more than a stub takes
		group.Go(func() error {
			key := SpillKeyOf(p.collection, d.id, stub.GetParked())
			store, err := c.spill(groupCtx, key, full)
			if err != nil {
				return fmt.Errorf("spill dropped segment %d as %s: %w", d.id, key, err)
			}
			stub.Parked.Store = store
			op.Value = record.Encode(stub)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if bytes > maxChangeBytes {
		return fmt.Errorf("%w: the change takes %d bytes without its dropped segments, at most %d; split it",
			meta.ErrTooLarge, bytes, maxChangeBytes)
	}
	return nil
}

// checkReservedKeys returns an error when a change would put an existing key that no
// other attempt can find absent: ids are never reused. It ignores keys while a
// precondition of the change is broken, for the change is then decided again.
func (c *Catalog) checkReservedKeys(ctx context.Context, p *changePlan) error {
	if len(p.txn.If) > meta.MaxTxnOps {
		return nil // too large: the store refuses it
	}
	list := slices.Clip(p.reservedKeys)
	for _, n := range p.newIDs {
		for part, key := range []string{keys.OwnerSegment(n.id), keys.OwnerBuild(n.id)} {
			list = append(list, reservedKey{key: key, err: func(kv meta.KeyValue) error {
				return c.claimedError(ctx, p.collection, n, part == 1, kv)
			}})
		}
	}
	for part := range slices.Chunk(list, meta.MaxTxnOps) {
		gets := make([]meta.Op, len(part))
		for i := range part {
			gets[i] = meta.Get(part[i].key)
		}
		res, err := c.kv.Txn(ctx, meta.Txn{If: p.txn.If, Then: gets})
		if err != nil {
			return err
		}
		for i, kvs := range res.Ranges {
			for _, kv := range kvs {
				return part[i].err(kv)
			}
		}
	}
	return nil
}

// readSegments reads the records of segments, all of which must exist.
func (c *Catalog) readSegments(ctx context.Context, collection int64, ids []int64) ([]meta.KeyValue, error) {
	if len(ids) == 0 {
		return nil, nil
	}
	gets := make([]meta.Op, len(ids))
	for i, id := range ids {
		gets[i] = meta.Get(keys.Segment(collection, id))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, err
	}
	list := make([]meta.KeyValue, len(ids))
	for i, kvs := range res.Ranges {
		if len(kvs) == 0 {
			return nil, &segmentNotFoundError{segment: ids[i], collection: collection}
		}
		list[i] = kvs[0]
	}
	return list, nil
}

// putUnit puts the record of a dropped unit, whose key must be absent: the put would
// overwrite another unit, whose files would never be reclaimed.
func (p *changePlan) putUnit(id int64, u *storagev1.Unit) {
	u.Format, u.Op, u.DropTime, p.drops = record.Format, p.op, p.now.UnixNano(), true
	key := keys.Unit(p.collection, id)
	p.txn.Then = append(p.txn.Then, meta.Put(key, record.Encode(u)))
	p.reservedKeys = append(p.reservedKeys, reservedKey{key, true, func(meta.KeyValue) error {
		return fmt.Errorf("%w: %d is the id of another dropped unit; ids are never reused", ErrIndexBuildExists, id)
	}})
}

// putPart puts the record of a unit that was part of a segment that stays, and the key
// from the segment to the unit.
func (p *changePlan) putPart(id int64, kind UnitKind, part *segment.Segment) {
	p.putUnit(id, &storagev1.Unit{
		Kind: uint32(kind), SegmentId: part.ID, Segment: encodeSegment(p.collection, part, ""),
	})
	p.txn.Then = append(p.txn.Then, meta.Put(keys.Replaced(p.collection, part.ID, id),
		record.Encode(&storagev1.Name{Format: record.Format, Id: id})))
}

func (p *changePlan) drop(kv meta.KeyValue) error {
	rec := &storagev1.Segment{}
	if err := record.Decode(kv, rec); err != nil {
		return err
	}
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return err
	}
	p.txn.If = append(p.txn.If, meta.Unchanged(kv.Key, kv.ModRevision))
	p.txn.Then = append(p.txn.Then, meta.Delete(kv.Key))
	rec.State, rec.Removed, rec.RemovedWhole = uint32(segment.Dropped), nil, false
	u := &storagev1.Unit{Kind: uint32(UnitSegment), SegmentId: id, Segment: rec}
	p.putUnit(id, u)
	p.dropped = append(p.dropped, droppedUnit{id, u, len(p.txn.Then) - 1})
	return nil
}

func (p *changePlan) add(field string, s *segment.Segment) error {
	if err := p.rules.added(field, s); err != nil {
		return err
	}
	key := keys.Segment(p.collection, s.ID)
	if err := p.put(key, s, nil, true, sizes{}); err != nil {
		return err
	}
	p.newIDs = newIDs(p.newIDs, s)
	p.fileClaims = fileClaims(p.fileClaims, p.collection, field, s)
	return nil
}

// put puts the record of a segment, with the hashes of the paths that were removed from
// it. Sizes up to before, those of the previous record, are always accepted; before is
// zero for a new segment.
func (p *changePlan) put(key string, s *segment.Segment, removed []uint64, whole bool, before sizes) error {
	rec := encodeSegment(p.collection, s, p.op)
	rec.Removed, rec.RemovedWhole = removed, whole
	value := record.Encode(rec)
	if err := checkSize(rec, s, p.rules.view.Collection.Roots, value, before); err != nil {
		return err
	}
	p.txn.Then = append(p.txn.Then, meta.Put(key, value))
	return nil
}

func (p *changePlan) update(field string, kv meta.KeyValue, u *Update) error {
	s, err := DecodeSegment(p.collection, kv)
	if err != nil {
		return err
	}
	if u.Revision > 0 && u.Revision != kv.ModRevision {
		return fmt.Errorf("%w: segment %d is at %d, not %d; read it again",
			ErrRevisionChanged, s.ID, kv.ModRevision, u.Revision)
	}
	before := &storagev1.Segment{} // with the fields that segment.Segment lacks
	if err := record.Decode(kv, before); err != nil {
		return err
	}
	for i := range u.AddFiles { // checkFileClaims checks those of builds
		if f := &u.AddFiles[i]; slices.Contains(before.GetRemoved(), pathHash(f.Root, f.Path)) {
			return fmt.Errorf("%w: %q, in %s.add_files[%d], was removed from segment %d before; paths are never reused",
				ErrFileExists, f.Path, field, i, s.ID)
		}
	}
	size := sizesOf(before, &s, p.rules.view.Collection.Roots, len(kv.Value))
	old, lackedFiles := slices.Clone(s.Builds), s.LacksFiles()
	removed, replaced, err := applyUpdate(field, &s, u)
	if err != nil {
		return err
	}
	if s.LacksFiles() && !lackedFiles { // earlier releases accepted such segments
		return invalid(field, lacksFilesText, s.ID, s.Rows)
	}
	if err := p.rules.segment(field, &s, old); err != nil {
		return err
	}
	if len(removed) > 0 {
		id := p.unitIDs[len(p.unitIDs)-1]
		p.newIDs = append(p.newIDs, newID{id, true})
		part := partOf(&s)
		part.Files = removed
		p.putPart(id, UnitFiles, part)
	}
	for _, b := range replaced {
		part := partOf(&s)
		part.Builds = []segment.Build{b}
		p.putPart(b.ID, UnitBuild, part)
	}
	p.newIDs = appendBuilds(p.newIDs, u.AddBuilds)
	for f := range (&segment.Segment{Files: u.AddFiles, Builds: u.AddBuilds}).AllFiles() {
		p.fileClaims = append(p.fileClaims, fileClaim{field, s.ID, FilePath{f.Root, f.Path}})
	}
	p.txn.If = append(p.txn.If, meta.Unchanged(kv.Key, kv.ModRevision))
	hashes, all := withRemoved(before.GetRemoved(), (&segment.Segment{Files: removed, Builds: replaced}).AllFiles())
	return p.put(kv.Key, &s, hashes, before.GetRemovedWhole() && all, size)
}

// partOf returns a dropped segment with the ids of s and without files and builds, to
// which the caller adds the removed ones.
func partOf(s *segment.Segment) *segment.Segment {
	return &segment.Segment{
		ID: s.ID, Partition: s.Partition, Channel: s.Channel, State: segment.Dropped, Disputed: s.Disputed,
	}
}

// transitions holds the legal changes of a segment's state.
var transitions = map[segment.State][]segment.State{
	segment.Growing:   {segment.Sealed, segment.Flushed},
	segment.Sealed:    {segment.Flushed},
	segment.Importing: {segment.Flushed},
}

// applyUpdate changes s and returns the files and builds that it removed.
func applyUpdate(
	field string, s *segment.Segment, u *Update,
) (removed []segment.File, replaced []segment.Build, err error) {
	if u.State != 0 && u.State != s.State {
		if !slices.Contains(transitions[s.State], u.State) {
			return nil, nil, fmt.Errorf("%w: segment %d is %v and cannot become %v",
				ErrSegmentState, s.ID, s.State, u.State)
		}
		s.State = u.State
	}
	if u.Rows != nil {
		s.Rows = *u.Rows
	}
	if u.DML != nil {
		s.DML = *u.DML
	}
	if u.Sorted != nil {
		s.Sorted = *u.Sorted
	}
	if u.EngineData != nil {
		s.EngineData = *u.EngineData
	}
	for i, want := range u.RemoveFiles {
		at := slices.IndexFunc(s.Files, func(f segment.File) bool {
			return f.Root == want.Root && f.Path == want.Path
		})
		if at < 0 {
			return nil, nil, fmt.Errorf("%w: %q of segment %d, in %s.remove_files[%d]",
				ErrFileNotFound, want.Path, s.ID, field, i)
		}
		removed = append(removed, s.Files[at])
		s.Files = slices.Delete(s.Files, at, at+1)
	}
	for i := range u.AddFiles {
		f := &u.AddFiles[i]
		if slices.ContainsFunc(s.Files, func(o segment.File) bool {
			return o.Root == f.Root && o.Path == f.Path
		}) {
			return nil, nil, fmt.Errorf("%w: %q of segment %d, in %s.add_files[%d]; paths are never reused",
				ErrFileExists, f.Path, s.ID, field, i)
		}
		s.Files = append(s.Files, *f)
	}
	for i, id := range u.RemoveBuilds {
		at := slices.IndexFunc(s.Builds, func(b segment.Build) bool { return b.ID == id })
		if at < 0 {
			return nil, nil, fmt.Errorf("%w: segment %d has no index build %d, in %s.remove_index_builds[%d]",
				ErrIndexNotFound, s.ID, id, field, i)
		}
		replaced = append(replaced, s.Builds[at])
		s.Builds = slices.Delete(s.Builds, at, at+1)
	}
	for i, b := range u.AddBuilds {
		if slices.ContainsFunc(u.AddBuilds[:i], func(o segment.Build) bool { return o.Index == b.Index }) {
			name := fmt.Sprintf("%s.add_index_builds[%d].index_id", field, i)
			return nil, nil, invalid(name, "two builds of index %d", b.Index)
		}
		if slices.ContainsFunc(s.Builds, func(o segment.Build) bool { return o.ID == b.ID }) ||
			slices.ContainsFunc(replaced, func(o segment.Build) bool { return o.ID == b.ID }) {
			return nil, nil, fmt.Errorf("%w: %d of segment %d; ids are never reused", ErrIndexBuildExists, b.ID, s.ID)
		}
		if at := slices.IndexFunc(s.Builds, func(o segment.Build) bool { return o.Index == b.Index }); at >= 0 {
			replaced = append(replaced, s.Builds[at])
			s.Builds = slices.Delete(s.Builds, at, at+1)
		}
		s.Builds = append(s.Builds, b)
	}
	return removed, replaced, checkRemoved(field, s, &segment.Segment{Files: removed, Builds: replaced})
}

// checkRemoved returns an error when s still has the path of a file of gone: removed files
// are deleted by path.
func checkRemoved(field string, s, gone *segment.Segment) error {
	paths := map[FilePath]bool{}
	for f := range gone.AllFiles() {
		paths[FilePath{f.Root, f.Path}] = true
	}
	for f := range s.AllFiles() {
		if paths[FilePath{f.Root, f.Path}] {
			return fmt.Errorf("%w: %q of segment %d, removed and added in %s; paths are never reused",
				ErrFileExists, f.Path, s.ID, field)
		}
	}
	return nil
}

// pathHash returns the hash that a segment's record keeps of a removed path. Two paths
// with equal hashes exclude each other.
func pathHash(root int, path string) uint64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d\x00%s", root, path))
	return binary.BigEndian.Uint64(sum[:])
}

// withRemoved returns list with the hashes of files appended, without changing it. Above
// maxRemoved it omits the oldest hashes, and all is false.
func withRemoved(list []uint64, files iter.Seq[*segment.File]) (longer []uint64, all bool) {
	list = slices.Clip(list)
	for f := range files {
		list = append(list, pathHash(f.Root, f.Path))
	}
	return list[max(0, len(list)-maxRemoved):], len(list) <= maxRemoved
}

// moveCheckpoints adds the moves of checkpoints to p. It returns the revision at which it
// read the checkpoints, 0 when p has other operations and there are no checkpoints.
func (c *Catalog) moveCheckpoints(
	ctx context.Context, p *changePlan, checkpoints []Checkpoint,
) (int64, error) {
	if len(checkpoints) == 0 && len(p.txn.Then) > 0 {
		return 0, nil
	}
	col := &p.rules.view.Collection
	seen := map[int]bool{}
	gets := []meta.Op{meta.Get(keys.Collection(col.ID))}
	for i, cp := range checkpoints {
		field := fmt.Sprintf("checkpoints[%d]", i)
		if cp.Shard < 0 || cp.Shard >= col.Shards() {
			return 0, invalid(field+".shard", "%d, collection %s has shards 0 to %d", cp.Shard, col, col.Shards()-1)
		}
		if seen[cp.Shard] {
			return 0, invalid(field+".shard", "%d occurs twice", cp.Shard)
		}
		seen[cp.Shard] = true
		gets = append(gets, meta.Get(keys.Channel(col.ID, cp.Shard)))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return 0, fmt.Errorf("read checkpoints of collection %s: %w", col, err)
	}
	for i, cp := range checkpoints {
		key, kvs := keys.Channel(col.ID, cp.Shard), res.Ranges[1+i]
		if len(kvs) == 0 {
			p.txn.If = append(p.txn.If, meta.Absent(key))
		} else {
			old, err := decodeCheckpoint(kvs[0])
			if err != nil {
				return 0, err
			}
			if cp.Position.Timestamp < old.Position.Timestamp {
				return 0, fmt.Errorf("%w: shard %d of %s is at %d, not before %d", ErrCheckpointRegression,
					cp.Shard, col, old.Position.Timestamp, cp.Position.Timestamp)
			}
			// Compared although it stays: all checkpoints hold at the revision of the change.
			p.txn.If = append(p.txn.If, meta.Unchanged(key, kvs[0].ModRevision))
			if cp.Position.Timestamp == old.Position.Timestamp && slices.Equal(cp.Position.Opaque, old.Position.Opaque) {
				continue
			}
		}
		pos := &storagev1.Position{Timestamp: uint64(cp.Position.Timestamp), Opaque: cp.Position.Opaque}
		rec := &storagev1.Channel{Format: record.Format, Checkpoint: pos, Op: p.op}
		p.txn.Then = append(p.txn.Then, meta.Put(key, record.Encode(rec)))
	}
	return res.Revision, nil
}
