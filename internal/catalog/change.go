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
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Swap is a change of a collection's segments that happens in one transaction:
// a compaction, a flush, a replacement of files, a move of checkpoints.
type Swap struct {
	Drop        []int64
	Add         []segment.Segment
	Update      []Update
	Checkpoints []Checkpoint
}

// Update is a change of one segment. What is nil or empty stays.
type Update struct {
	Segment      int64
	Revision     int64 // that the segment must have; 0: any
	State        segment.State
	Rows         *int64
	DML          *segment.Position
	Sorted       *bool
	RemoveFiles  []FilePath
	AddFiles     []segment.File
	AddBuilds    []segment.Build // one takes the place of an older build of its index
	RemoveBuilds []int64
	EngineData   *[]byte
}

// FilePath names a file of a segment.
type FilePath struct {
	Root int
	Path string
}

// goneError is an ErrSegmentNotFound that knows which.
type goneError struct {
	segment    int64
	collection int64
}

func (e *goneError) Error() string {
	return fmt.Sprintf("%v: %d of collection %d", ErrSegmentNotFound, e.segment, e.collection)
}

func (e *goneError) Is(target error) bool { return target == ErrSegmentNotFound }

// Change carries out a swap and returns the revision at which it happened.
func (c *Catalog) Change(ctx context.Context, tok request.Token, ref Ref, swap Swap) (int64, error) {
	if n := len(swap.Drop) + len(swap.Add) + len(swap.Update); n > MaxSwap {
		return 0, invalid("inputs", "%d inputs, outputs and updates, at most %d in one step; split it into several", n, MaxSwap)
	}
	out, err := c.change(ctx, tok, func(ctx context.Context) (plan, error) {
		p, err := c.planSwap(ctx, &ref, swap)
		if errors.Is(err, errStaleStock) {
			c.ForgetStock(ctx)
			p, err = c.planSwap(ctx, &ref, swap)
		}
		return p, err
	})
	if err != nil {
		return 0, fmt.Errorf("change segments of collection %s: %w", ref, err)
	}
	return out.revision, nil
}

// SetCheckpoints moves checkpoints forward and returns the revision at which
// all of them stood so.
func (c *Catalog) SetCheckpoints(ctx context.Context, ref Ref, checkpoints []Checkpoint) (int64, error) {
	return c.Change(ctx, request.Token{}, ref, Swap{Checkpoints: checkpoints})
}

// errStaleStock means that an id of the replica's stock is gone: a gap was closed that
// it lay in, for the stock was that old.
var errStaleStock = errors.New("stock of ids is too old")

// swapPlan gathers the transaction of a swap.
type swapPlan struct {
	collection int64
	op         string
	now        time.Time // that units are dropped at
	drops      bool      // there is a unit
	rules      rules
	txn        meta.Txn
	newIDs     []newID // that the swap registers
	unitIDs    []int64 // fresh ids for units of replaced files
	taken      []taken
	dropped    []droppedUnit
	claims     []claim // files that must not belong to anything else
}

// droppedUnit is a segment that the swap drops, with where its unit's record is put.
type droppedUnit struct {
	id   int64
	rec  *storagev1.Unit
	then int // in txn.Then
}

// taken is a key that must not be there, and the error when it is.
type taken struct {
	key     string
	compare bool // in the transaction as well; that of a claim has its own compares
	err     func(meta.KeyValue) error
}

func (c *Catalog) planSwap(ctx context.Context, ref *Ref, swap Swap) (plan, error) {
	col, unchanged, err := c.active(ctx, ref)
	if err != nil {
		return plan{}, err
	}
	view := View{Collection: col}
	if len(swap.Add)+len(swap.Update) > 0 { // others need no partition and no index
		if view, err = c.At(ctx, col.ID, 0); err != nil {
			return plan{}, err
		}
	}
	p := &swapPlan{collection: col.ID, rules: rules{view}}
	var stampErr error // of one that turns out to drop something
	if len(swap.Drop)+len(swap.Update) > 0 {
		p.now, stampErr = c.stamp(ctx)
	}
	p.txn.If = []meta.Cond{unchanged}
	if p.op, err = record.NewOp(c.rand); err != nil {
		return plan{}, err
	}
	touched := map[int64]bool{}
	once := func(field string, id int64) error {
		if touched[id] {
			return invalid(field, "segment %d occurs twice", id)
		}
		touched[id] = true
		return nil
	}
	for i, id := range swap.Drop {
		if err := once(fmt.Sprintf("inputs[%d]", i), id); err != nil {
			return plan{}, err
		}
	}
	for i := range swap.Update {
		if err := once(fmt.Sprintf("updates[%d].segment_id", i), swap.Update[i].Segment); err != nil {
			return plan{}, err
		}
	}
	for i := range swap.Add {
		if err := once(fmt.Sprintf("outputs[%d].id", i), swap.Add[i].ID); err != nil {
			return plan{}, err
		}
	}
	current, err := c.readSegments(ctx, col.ID, append(slices.Clone(swap.Drop), updated(swap.Update)...))
	if err != nil {
		return plan{}, err
	}
	for i := range swap.Drop {
		if err := p.drop(current[i]); err != nil {
			return plan{}, err
		}
	}
	for i := range swap.Update {
		if len(swap.Update[i].RemoveFiles) > 0 {
			id, err := c.NextID(ctx)
			if err != nil {
				return plan{}, err
			}
			p.unitIDs = append(p.unitIDs, id)
		}
		if err := p.update(fmt.Sprintf("updates[%d]", i), current[len(swap.Drop)+i], &swap.Update[i]); err != nil {
			return plan{}, err
		}
	}
	for i := range swap.Add {
		if err := p.add(fmt.Sprintf("outputs[%d]", i), &swap.Add[i]); err != nil {
			return plan{}, err
		}
	}
	if p.drops && stampErr != nil {
		return plan{}, fmt.Errorf("the time of the drop: %w", stampErr)
	}
	if err := c.checkTaken(ctx, p); err != nil {
		return plan{}, err
	}
	for _, k := range p.taken {
		if k.compare {
			p.txn.If = append(p.txn.If, meta.Absent(k.key))
		}
	}
	revision, err := c.moveCheckpoints(ctx, p, swap.Checkpoints)
	if err != nil {
		return plan{}, err
	}
	if err := c.checkNew(ctx, p.newIDs); err != nil {
		return plan{}, err
	}
	unclaimed, claims, err := c.claim(ctx, col.ID, p.newIDs)
	if errors.Is(err, ErrIDUsed) {
		if gone, goneErr := c.Gone(ctx, p.unitIDs); goneErr == nil && len(gone) > 0 {
			err = fmt.Errorf("%w: %w", errStaleStock, err)
		}
	}
	if err != nil {
		return plan{}, err
	}
	p.txn.If, p.txn.Then = append(p.txn.If, unclaimed...), append(p.txn.Then, claims...)
	if err := c.checkClaims(ctx, col.ID, p.claims); err != nil {
		return plan{}, err
	}
	if err := c.fit(ctx, p); err != nil {
		return plan{}, err
	}
	return plan{txn: p.txn, id: col.ID, revision: revision}, nil
}

// # Size of a swap
//
// The transaction of a swap holds the records of its outputs and updates, and those
// of its inputs, which become units. 60 inputs may have 60 times MaxSegmentBytes,
// and a transaction takes [meta.MaxTxnBytes]. So the inputs that do not fit are
// parked before it, the largest first:
//
//	put   (no compare) the unit's record, as the object
//	      gc/held/<collection>/<segment>-<digest> of the store of snapshots
//	swap  compares: the segment as read. Puts: the unit's stub; deletes: the segment
//
// What is left is a stub of about 150 bytes for each of them, so any inputs fit,
// and outputs and updates of up to about 1.4 MB together. The key has the record's
// digest, for a swap that is decided again may drop another content: so a key is
// never used for two contents, and a put that comes late harms no other.
//
// A sweep deletes such an object only when there is neither a segment nor a unit
// nor a tombstone of the id, at one revision read after its listing: the segment's
// record is there before the put, and the swap moves it to the unit's.
//
//	put fails, or dies after it    no swap. The object stays until the segment is
//	                               dropped and its unit is gone; then it is swept
//	swap fails by a compare        likewise; decided again, with another object
//	swap: no answer                the unit is parked with its object in place, or
//	                               as above
//	store does not answer          a swap that fits goes on as ever; one that does
//	                               not is refused as UNAVAILABLE
const maxSwapBytes = meta.MaxTxnBytes - 4096

// parksInFlight is how many inputs of a swap are parked at once.
const parksInFlight = 8

// fit parks as many of the segments that a swap drops as is needed for its
// transaction to be small enough.
func (c *Catalog) fit(ctx context.Context, p *swapPlan) error {
	bytes := 0
	for _, cond := range p.txn.If {
		bytes += len(cond.From) + len(cond.To)
	}
	for _, op := range p.txn.Then {
		bytes += len(op.From) + len(op.Value)
	}
	if bytes <= maxSwapBytes || c.hold == nil { // then the store refuses what is too large
		return nil
	}
	size := func(d droppedUnit) int { return len(p.txn.Then[d.then].Value) }
	slices.SortFunc(p.dropped, func(a, b droppedUnit) int { return size(b) - size(a) })
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(parksInFlight)
	for _, d := range p.dropped {
		if bytes <= maxSwapBytes {
			break
		}
		op := &p.txn.Then[d.then]
		full := op.Value
		sum := sha256.Sum256(full)
		stub := proto.CloneOf(d.rec)
		stub.Segment = nil
		stub.Parked = &storagev1.Parked{
			Length: int64(len(full)), Sha256: sum[:], Suffix: hex.EncodeToString(sum[:])[:heldSuffix],
		}
		bytes -= len(full) - 256 // more than a stub takes
		group.Go(func() error {
			key := HeldKeyOf(p.collection, d.id, stub.GetParked())
			store, err := c.hold(groupCtx, key, full)
			if err != nil {
				return fmt.Errorf("park segment %d, which the swap drops, as %s: %w", d.id, key, err)
			}
			stub.Parked.Store = store
			op.Value = record.Encode(stub)
			return nil
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if bytes > maxSwapBytes {
		return fmt.Errorf("%w: the swap takes %d bytes without the segments that it drops, at most %d; split it",
			meta.ErrTooLarge, bytes, maxSwapBytes)
	}
	return nil
}

// checkTaken refuses a swap that would put a key which is there, and which no
// other attempt finds gone: ids are never used twice. Keys that came with a
// change of what the swap was decided on say nothing: it will be decided anew.
func (c *Catalog) checkTaken(ctx context.Context, p *swapPlan) error {
	if len(p.txn.If) > meta.MaxTxnOps {
		return nil // too large, as the store will say
	}
	list := slices.Clip(p.taken)
	for _, n := range p.newIDs {
		for part, key := range []string{keys.OwnerSegment(n.id), keys.OwnerBuild(n.id)} {
			list = append(list, taken{key: key, err: func(kv meta.KeyValue) error { return c.claimed(ctx, p.collection, n, part == 1, kv) }})
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

func updated(updates []Update) []int64 {
	ids := make([]int64, len(updates))
	for i := range updates {
		ids[i] = updates[i].Segment
	}
	return ids
}

// readSegments reads the records of segments that must all be there.
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
			return nil, &goneError{segment: ids[i], collection: collection}
		}
		list[i] = kvs[0]
	}
	return list, nil
}

// unit puts the record of a dropped unit, which must not be there yet: that of
// another would be lost with it, and its files never reclaimed.
func (p *swapPlan) unit(id int64, u *storagev1.Unit) {
	u.Format, u.Op, u.DropTime, p.drops = record.Format, p.op, p.now.UnixNano(), true
	key := keys.Unit(p.collection, id)
	p.txn.Then = append(p.txn.Then, meta.Put(key, record.Encode(u)))
	p.taken = append(p.taken, taken{key, true, func(meta.KeyValue) error {
		return fmt.Errorf("%w: %d stands for something else that was dropped; an id is never used twice", ErrIndexBuildExists, id)
	}})
}

// part puts the record of a unit that was part of a segment which lives on, and
// the key that leads to it from there.
func (p *swapPlan) part(id int64, kind UnitKind, part *segment.Segment) {
	p.unit(id, &storagev1.Unit{Kind: uint32(kind), SegmentId: part.ID, Segment: encodeSegment(p.collection, part, "")})
	p.txn.Then = append(p.txn.Then, meta.Put(keys.Replaced(p.collection, part.ID, id),
		record.Encode(&storagev1.Name{Format: record.Format, Id: id})))
}

func (p *swapPlan) drop(kv meta.KeyValue) error {
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
	p.unit(id, u)
	p.dropped = append(p.dropped, droppedUnit{id, u, len(p.txn.Then) - 1})
	return nil
}

func (p *swapPlan) add(field string, s *segment.Segment) error {
	if err := p.rules.added(field, s); err != nil {
		return err
	}
	key := keys.Segment(p.collection, s.ID)
	if err := p.put(key, s, nil, true, sizes{}); err != nil {
		return err
	}
	p.newIDs = newIDs(p.newIDs, s)
	p.claims = claimsOf(p.claims, p.collection, field, s)
	return nil
}

// put puts the record of a segment, with the hashes of the paths of files that were
// taken from it. It may have as many bytes as it had before, with the room that a
// restore needs; none: it is new.
func (p *swapPlan) put(key string, s *segment.Segment, removed []uint64, whole bool, before sizes) error {
	rec := encodeSegment(p.collection, s, p.op)
	rec.Removed, rec.RemovedWhole = removed, whole
	value := record.Encode(rec)
	if err := checkSize(rec, s, p.rules.view.Collection.Roots, value, before); err != nil {
		return err
	}
	p.txn.Then = append(p.txn.Then, meta.Put(key, value))
	return nil
}

func (p *swapPlan) update(field string, kv meta.KeyValue, u *Update) error {
	s, err := DecodeSegment(p.collection, kv)
	if err != nil {
		return err
	}
	if u.Revision > 0 && u.Revision != kv.ModRevision {
		return fmt.Errorf("%w: segment %d is at %d, not %d; read it again", ErrRevisionChanged, s.ID, kv.ModRevision, u.Revision)
	}
	before := &storagev1.Segment{} // for what a segment does not show
	if err := record.Decode(kv, before); err != nil {
		return err
	}
	for i := range u.AddFiles { // those of builds are looked up with the claims
		if f := &u.AddFiles[i]; slices.Contains(before.GetRemoved(), pathHash(f.Root, f.Path)) {
			return fmt.Errorf("%w: %q, in %s.add_files[%d], was taken from segment %d before; a path is never used twice",
				ErrFileExists, f.Path, field, i, s.ID)
		}
	}
	size := sizesOf(before, &s, p.rules.view.Collection.Roots, len(kv.Value))
	old, lacked := slices.Clone(s.Builds), s.Lacking()
	removed, replaced, err := applyUpdate(field, &s, u)
	if err != nil {
		return err
	}
	if s.Lacking() && !lacked { // those of releases before that were let in go on
		return invalid(field, lackingText, s.ID, s.Rows)
	}
	if err := p.rules.segment(field, &s, old); err != nil {
		return err
	}
	if len(removed) > 0 {
		id := p.unitIDs[len(p.unitIDs)-1]
		p.newIDs = append(p.newIDs, newID{id, true})
		part := partOf(&s)
		part.Files = removed
		p.part(id, UnitFiles, part)
	}
	for _, b := range replaced {
		part := partOf(&s)
		part.Builds = []segment.Build{b}
		p.part(b.ID, UnitBuild, part)
	}
	p.newIDs = appendBuilds(p.newIDs, u.AddBuilds)
	for f := range (&segment.Segment{Files: u.AddFiles, Builds: u.AddBuilds}).AllFiles() {
		p.claims = append(p.claims, claim{field, s.ID, FilePath{f.Root, f.Path}})
	}
	p.txn.If = append(p.txn.If, meta.Unchanged(kv.Key, kv.ModRevision))
	taken, all := withRemoved(before.GetRemoved(), (&segment.Segment{Files: removed, Builds: replaced}).AllFiles())
	return p.put(kv.Key, &s, taken, before.GetRemovedWhole() && all, size)
}

// partOf is a segment record that holds only a part of s, dropped.
func partOf(s *segment.Segment) *segment.Segment {
	return &segment.Segment{ID: s.ID, Partition: s.Partition, Channel: s.Channel, State: segment.Dropped, Disputed: s.Disputed}
}

// canMove holds the legal changes of a segment's state.
var canMove = map[segment.State][]segment.State{
	segment.Growing:   {segment.Sealed, segment.Flushed},
	segment.Sealed:    {segment.Flushed},
	segment.Importing: {segment.Flushed},
}

// applyUpdate changes s and returns what is no longer part of it.
func applyUpdate(field string, s *segment.Segment, u *Update) (removed []segment.File, replaced []segment.Build, err error) {
	if u.State != 0 && u.State != s.State {
		if !slices.Contains(canMove[s.State], u.State) {
			return nil, nil, fmt.Errorf("%w: segment %d is %v and cannot become %v", ErrSegmentState, s.ID, s.State, u.State)
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
		at := slices.IndexFunc(s.Files, func(f segment.File) bool { return f.Root == want.Root && f.Path == want.Path })
		if at < 0 {
			return nil, nil, fmt.Errorf("%w: %q of segment %d, in %s.remove_files[%d]", ErrFileNotFound, want.Path, s.ID, field, i)
		}
		removed = append(removed, s.Files[at])
		s.Files = slices.Delete(s.Files, at, at+1)
	}
	for i := range u.AddFiles {
		f := &u.AddFiles[i]
		if slices.ContainsFunc(s.Files, func(o segment.File) bool { return o.Root == f.Root && o.Path == f.Path }) {
			return nil, nil, fmt.Errorf("%w: %q of segment %d, in %s.add_files[%d]; a path is never used twice", ErrFileExists, f.Path, s.ID, field, i)
		}
		s.Files = append(s.Files, *f)
	}
	for i, id := range u.RemoveBuilds {
		at := slices.IndexFunc(s.Builds, func(b segment.Build) bool { return b.ID == id })
		if at < 0 {
			return nil, nil, fmt.Errorf("%w: build %d of segment %d, in %s.remove_index_builds[%d]", ErrIndexNotFound, id, s.ID, field, i)
		}
		replaced = append(replaced, s.Builds[at])
		s.Builds = slices.Delete(s.Builds, at, at+1)
	}
	for i, b := range u.AddBuilds {
		if slices.ContainsFunc(u.AddBuilds[:i], func(o segment.Build) bool { return o.Index == b.Index }) {
			return nil, nil, invalid(fmt.Sprintf("%s.add_index_builds[%d].index_id", field, i), "two builds of index %d", b.Index)
		}
		if slices.ContainsFunc(s.Builds, func(o segment.Build) bool { return o.ID == b.ID }) ||
			slices.ContainsFunc(replaced, func(o segment.Build) bool { return o.ID == b.ID }) {
			return nil, nil, fmt.Errorf("%w: %d of segment %d; an id is never used twice", ErrIndexBuildExists, b.ID, s.ID)
		}
		if at := slices.IndexFunc(s.Builds, func(o segment.Build) bool { return o.Index == b.Index }); at >= 0 {
			replaced = append(replaced, s.Builds[at])
			s.Builds = slices.Delete(s.Builds, at, at+1)
		}
		s.Builds = append(s.Builds, b)
	}
	// What was removed will be deleted, by its path.
	gone := segment.Segment{Files: removed, Builds: replaced}
	paths := map[FilePath]bool{}
	for f := range gone.AllFiles() {
		paths[FilePath{f.Root, f.Path}] = true
	}
	for f := range s.AllFiles() {
		if paths[FilePath{f.Root, f.Path}] {
			return nil, nil, fmt.Errorf("%w: %q of segment %d, removed and added in %s; a path is never used twice", ErrFileExists, f.Path, s.ID, field)
		}
	}
	return removed, replaced, nil
}

// pathHash is the hash by which a segment's record knows the path of a file that
// was taken from it. Two paths may share one, and then one refuses the other.
func pathHash(root int, path string) uint64 {
	sum := sha256.Sum256(fmt.Appendf(nil, "%d\x00%s", root, path))
	return binary.BigEndian.Uint64(sum[:])
}

// withRemoved adds the hashes of files to a list, which it does not change. A list
// that is too long loses the oldest ones, and is then not all.
func withRemoved(list []uint64, files iter.Seq[*segment.File]) (longer []uint64, all bool) {
	list = slices.Clip(list)
	for f := range files {
		list = append(list, pathHash(f.Root, f.Path))
	}
	return list[max(0, len(list)-maxRemoved):], len(list) <= maxRemoved
}

// moveCheckpoints returns the revision at which it read the checkpoints, 0 when
// the swap has others things to do and no checkpoints.
func (c *Catalog) moveCheckpoints(ctx context.Context, p *swapPlan, checkpoints []Checkpoint) (int64, error) {
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
			// Compared although it stays: all stand so at the revision of the swap.
			p.txn.If = append(p.txn.If, meta.Unchanged(key, kvs[0].ModRevision))
			if cp.Position.Timestamp == old.Position.Timestamp && slices.Equal(cp.Position.Opaque, old.Position.Opaque) {
				continue
			}
		}
		pos := &storagev1.Position{Timestamp: uint64(cp.Position.Timestamp), Opaque: cp.Position.Opaque}
		p.txn.Then = append(p.txn.Then, meta.Put(key, record.Encode(&storagev1.Channel{Format: record.Format, Checkpoint: pos, Op: p.op})))
	}
	return res.Revision, nil
}
