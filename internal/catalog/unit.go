package catalog

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// UnitKind says what was dropped. Stored: append only.
type UnitKind int

// The kinds of unit.
const (
	UnitSegment UnitKind = iota + 1 // a segment with its index builds
	UnitBuild                       // an index build of a living segment
	UnitFiles                       // files of a living segment
)

// Unit is something that was dropped from a collection and is reclaimed as a
// whole.
type Unit struct {
	ID         int64 // that of the segment or build, or one of its own
	Collection int64
	Kind       UnitKind
	// Segment is the segment that was dropped, or what was part of one, under
	// that segment's id.
	Segment segment.Segment
	// Revision is that of the drop. A unit's key is put by the transaction that
	// drops it, which compares that it is not there, and goes with the grant for
	// good; parking puts it again. So this is its create revision.
	Revision int64
	DropTime time.Time
	// Parked says that of Segment only the id is known: the rest lies in the
	// object store. Only StubOf returns such a unit.
	Parked bool
}

// ErrParked means that a unit's record is a stub. [Catalog.ReadUnit] and
// [Catalog.Whole] read what it stands for.
var ErrParked = errors.New("unit is parked")

// HeldPrefix is what the keys of all objects begin with that hold the records of
// parked units.
const HeldPrefix = "gc/held/"

// HeldKey is the object that holds the record of a unit while it is parked.
func HeldKey(collection, unit int64) string {
	return fmt.Sprintf("%s%d/%d", HeldPrefix, collection, unit)
}

// heldSuffix is how many digits of a SHA-256 end the key of a record that was
// parked as its unit was dropped.
const heldSuffix = 16

// HeldKeyOf is the object that holds the record of a parked unit, by its stub.
func HeldKeyOf(collection, unit int64, parked *storagev1.Parked) string {
	if parked.GetSuffix() == "" {
		return HeldKey(collection, unit)
	}
	return HeldKey(collection, unit) + "-" + parked.GetSuffix()
}

// ParseHeldKey returns whose record an object holds, by its key.
func ParseHeldKey(key string) (collection, unit int64, ok bool) {
	rest, ok := strings.CutPrefix(key, HeldPrefix)
	if !ok {
		return 0, 0, false
	}
	first, second, _ := strings.Cut(rest, "/")
	second, suffix, _ := strings.Cut(second, "-")
	collection, err1 := strconv.ParseInt(first, 10, 64)
	unit, err2 := strconv.ParseInt(second, 10, 64)
	sum, err := hex.DecodeString(suffix)
	if err != nil || hex.EncodeToString(sum) != suffix || suffix != "" && len(suffix) != heldSuffix {
		return 0, 0, false
	}
	ok = err1 == nil && err2 == nil && collection > 0 && unit > 0 &&
		key == HeldKeyOf(collection, unit, &storagev1.Parked{Suffix: suffix})
	return collection, unit, ok
}

// WriteHeld returns an Options.Hold that writes to one of stores.
func WriteHeld(
	stores map[string]object.Store, alias string,
) func(ctx context.Context, key string, data []byte) (string, error) {
	return func(ctx context.Context, key string, data []byte) (string, error) {
		s, ok := stores[alias]
		if !ok {
			return "", fmt.Errorf("object store %q is not configured here", alias)
		}
		_, err := s.Put(ctx, key, data)
		return alias, err
	}
}

// DecodeUnit reads a unit's record. That of a parked one is ErrParked.
func DecodeUnit(collection int64, kv meta.KeyValue) (Unit, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Unit{}, err
	}
	rec := &storagev1.Unit{}
	if err := record.Decode(kv, rec); err != nil {
		return Unit{}, err
	}
	u, err := UnitOf(collection, id, rec)
	u.Revision = kv.CreateRevision
	return u, err
}

// UnitOf reads a unit from its record, all but its revision. That of a parked one
// is ErrParked: nobody may take it for a unit without files.
func UnitOf(collection, id int64, rec *storagev1.Unit) (Unit, error) {
	switch {
	case rec.GetParked() != nil:
		return Unit{}, fmt.Errorf("unit %d of collection %d: %w", id, collection, ErrParked)
	case rec.GetSegment() == nil:
		return Unit{}, fmt.Errorf("%w of unit %d of collection %d: it says nothing of the segment", record.ErrUnreadable, id, collection)
	}
	s, err := segmentOf(collection, rec.GetSegmentId(), rec.GetSegment())
	if err != nil {
		return Unit{}, fmt.Errorf("unit %d of collection %d: %w", id, collection, err)
	}
	s.Disputed = s.Disputed || rec.GetDisputed()
	return Unit{ID: id, Collection: collection, Kind: UnitKind(rec.GetKind()), Segment: s, DropTime: record.Time(rec.GetDropTime())}, nil
}

// StubOf reads from the record of a parked unit what that says of it: its ids,
// its kind and the time of its drop.
func StubOf(collection, id int64, rec *storagev1.Unit) Unit {
	return Unit{
		ID: id, Collection: collection, Kind: UnitKind(rec.GetKind()),
		Segment:  segment.Segment{ID: rec.GetSegmentId(), State: segment.Dropped, Disputed: rec.GetDisputed()},
		DropTime: record.Time(rec.GetDropTime()), Parked: true,
	}
}

// ReadHeld returns an Options.Held that reads from stores, by alias.
func ReadHeld(stores map[string]object.Store) func(ctx context.Context, store, key string) ([]byte, error) {
	return func(ctx context.Context, store, key string) ([]byte, error) {
		s, ok := stores[store]
		if !ok {
			return nil, fmt.Errorf("%w: the store is not configured here", record.ErrUnreadable)
		}
		return object.ReadAll(ctx, s, key, meta.MaxTxnBytes) // in the metadata store it was no longer
	}
}

// Whole returns the record of a unit for a stub of it, read from the object
// store; a record that is none it returns as it is. It blocks on the object
// store. Nothing is parsed that does not have the stub's length and digest. An
// object that is not there, or is another, is record.ErrUnreadable: the unit must
// be left alone, unless the stub is not current any more, for the object goes when
// the unit is granted.
func (c *Catalog) Whole(ctx context.Context, collection, id int64, rec *storagev1.Unit) (*storagev1.Unit, error) {
	parked := rec.GetParked()
	if parked == nil {
		return rec, nil
	}
	key := HeldKeyOf(collection, id, parked)
	fail := func(err error) (*storagev1.Unit, error) {
		return nil, fmt.Errorf("unit %d of collection %d is parked: read %s of store %q: %w", id, collection, key, parked.GetStore(), err)
	}
	data, err := c.readHeld(ctx, parked, key)
	if err != nil {
		return fail(err)
	}
	whole := &storagev1.Unit{}
	if err := record.Decode(meta.KeyValue{Key: key, Value: data}, whole); err != nil {
		return fail(err)
	}
	if whole.GetParked() != nil {
		return fail(fmt.Errorf("%w: it is a stub itself", record.ErrUnreadable))
	}
	whole.Disputed = whole.GetDisputed() || rec.GetDisputed() // which may have been found out since
	return whole, nil
}

// readHeld reads the object of a parked unit, twice when the first answer is
// another: the way may be to blame.
func (c *Catalog) readHeld(ctx context.Context, parked *storagev1.Parked, key string) ([]byte, error) {
	if c.held == nil {
		return nil, fmt.Errorf("%w: this process reads no parked units", record.ErrUnreadable)
	}
	var last error
	for range 2 {
		data, err := c.held(ctx, parked.GetStore(), key)
		if errors.Is(err, object.ErrNotFound) {
			return nil, fmt.Errorf("%w: %w", record.ErrUnreadable, err)
		}
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(data)
		if int64(len(data)) == parked.GetLength() && bytes.Equal(sum[:], parked.GetSha256()) {
			return data, nil
		}
		last = fmt.Errorf("%w: %d bytes of SHA-256 %x, want %d of %x", record.ErrUnreadable, len(data), sum, parked.GetLength(), parked.GetSha256())
	}
	return nil, last
}

// ReadUnit reads a unit whole from kv, which is its record or its tombstone. It
// blocks on the object store when the unit is parked; the errors are those of
// [Catalog.Whole].
func (c *Catalog) ReadUnit(ctx context.Context, collection int64, kv meta.KeyValue) (Unit, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Unit{}, err
	}
	if strings.HasPrefix(kv.Key, keys.AllTombsPrefix) {
		rec := &storagev1.Tombstone{}
		if err := record.Decode(kv, rec); err != nil {
			return Unit{}, err
		}
		return UnitOf(collection, id, rec.GetUnit())
	}
	rec := &storagev1.Unit{}
	if err := record.Decode(kv, rec); err != nil {
		return Unit{}, err
	}
	if rec, err = c.Whole(ctx, collection, id, rec); err != nil {
		return Unit{}, err
	}
	u, err := UnitOf(collection, id, rec)
	u.Revision = kv.CreateRevision
	return u, err
}

// Owned yields the unit's files that belong to it alone, as [Owns] decides. Any
// other file is foreign: it may be part of something else as well, and is never
// deleted with the unit. It panics when the unit is Parked, for then nothing is
// known of its files.
func (u *Unit) Owned() iter.Seq[*segment.File] {
	if u.Parked {
		panic(fmt.Sprintf("the files of unit %d are not known: it is parked", u.ID))
	}
	return func(yield func(*segment.File) bool) {
		for f := range u.Segment.AllFiles() {
			if Owns(u.Collection, &u.Segment, f.Path) && !yield(f) {
				return
			}
		}
	}
}

func hasFile(s *segment.Segment, path FilePath) bool {
	for f := range s.AllFiles() {
		if f.Root == path.Root && f.Path == path.Path {
			return true
		}
	}
	return false
}

// Has says whether the file is one of the unit's. It panics when the unit is
// Parked, for then nothing is known of its files.
func (u *Unit) Has(path FilePath) bool {
	if u.Parked {
		panic(fmt.Sprintf("the files of unit %d are not known: it is parked", u.ID))
	}
	return hasFile(&u.Segment, path)
}

// partsInFlight is how many parked parts are read at once.
const partsInFlight = 8

// Parts calls visit with the units that were taken from segments, whose ids must
// ascend, and that are not granted: replaced index builds and files. A unit that is
// parked is read whole where whole says so of its stub, and is left a stub
// otherwise. visit is called by one goroutine at a time.
func (c *Catalog) Parts(ctx context.Context, collection int64, segments []int64, whole func(*Unit) bool, visit func(Unit)) error {
	if len(segments) == 0 {
		return nil
	}
	from := keys.ReplacedPrefix(collection, segments[0])
	_, to := meta.Prefix(keys.ReplacedPrefix(collection, segments[len(segments)-1]))
	var units []int64
	_, err := c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			of, unit, err := keys.LastTwo(kv.Key)
			if err != nil {
				return err
			}
			if _, wanted := slices.BinarySearch(segments, of); wanted {
				units = append(units, unit)
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read what was taken from segments of collection %d: %w", collection, err)
	}
	for part := range slices.Chunk(units, partsInFlight*4) {
		if err := c.readParts(ctx, collection, part, whole, visit); err != nil {
			return err
		}
	}
	return nil
}

// readParts is Parts for a few units.
func (c *Catalog) readParts(ctx context.Context, collection int64, units []int64, whole func(*Unit) bool, visit func(Unit)) error {
	gets := make([]meta.Op, len(units))
	for i, id := range units {
		gets[i] = meta.Get(keys.Unit(collection, id))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return fmt.Errorf("read units of collection %d: %w", collection, err)
	}
	list := make([]*Unit, len(units))
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(partsInFlight)
	for i, kvs := range res.Ranges {
		if len(kvs) == 0 { // granted
			continue
		}
		rec := &storagev1.Unit{}
		if err := record.Decode(kvs[0], rec); err != nil {
			return errors.Join(err, group.Wait())
		}
		if rec.GetParked() != nil {
			stub := StubOf(collection, units[i], rec)
			stub.Revision = kvs[0].CreateRevision
			if !whole(&stub) {
				list[i] = &stub
				continue
			}
		}
		group.Go(func() error {
			read, err := c.readUnits(ctx, collection, units[i], kvs)
			if err == nil && len(read) > 0 && read[0].Revision > 0 { // and was not granted meanwhile
				list[i] = &read[0]
			}
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	for _, u := range list {
		if u != nil {
			visit(*u)
		}
	}
	return nil
}

// Owner is what a file is part of.
type Owner struct {
	Segment int64 // that it is or was part of
	Live    bool  // part of a segment of the collection
	Unit    int64 // else the unit that it was dropped with
	// Owned says that it is that segment's own, see [Owns]: else it is never deleted.
	Owned bool
}

// FindOwner looks for what has the file at path: among the segments and units
// whose ids are elements of the path, and under segmentID besides when that is
// not 0. It reads the store as it is now.
func (c *Catalog) FindOwner(ctx context.Context, collection int64, path FilePath, segmentID int64) (Owner, bool, error) {
	ids := segment.IDsIn(path.Path)
	if segmentID > 0 {
		ids = append(ids, segmentID)
	}
	holdings, err := c.holdings(ctx, collection, ids, false)
	if err != nil {
		return Owner{}, false, err
	}
	for _, id := range ids {
		if owner, found := holdings[id].find(collection, path); found {
			return owner, true, nil
		}
	}
	return Owner{}, false, nil
}

// holding is what there is of one segment: itself if it lives, and the units
// that it is or that were taken from it, granted ones included.
type holding struct {
	live  *segment.Segment
	units []Unit
	// With byHash, taken has the hashes of all paths that were taken from the living
	// segment, and units has none of them.
	taken  []uint64
	byHash bool
}

// find returns what of a collection has the file at path.
func (h *holding) find(collection int64, path FilePath) (Owner, bool) {
	if h == nil {
		return Owner{}, false
	}
	if h.live != nil && hasFile(h.live, path) {
		return Owner{Segment: h.live.ID, Live: true, Owned: Owns(collection, h.live, path.Path)}, true
	}
	if len(h.taken) > 0 && slices.Contains(h.taken, pathHash(path.Root, path.Path)) {
		return Owner{Segment: h.live.ID}, true
	}
	for i := range h.units {
		if u := &h.units[i]; hasFile(&u.Segment, path) {
			return Owner{Segment: u.Segment.ID, Unit: u.ID, Owned: Owns(collection, &u.Segment, path.Path)}, true
		}
	}
	return Owner{}, false
}

// holdings reads what there is of segments. Ids that stand for nothing are left
// out.
//
// With byHash, what was taken from a living segment whose record has the hashes of
// all paths that were is known by these, and no unit of it is read: so the calls do
// not grow with the history of the segment.
func (c *Catalog) holdings(ctx context.Context, collection int64, ids []int64, byHash bool) (map[int64]*holding, error) {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	found := map[int64]*holding{}
	of := func(id int64) *holding {
		if found[id] == nil {
			found[id] = &holding{}
		}
		return found[id]
	}
	for part := range slices.Chunk(slices.Compact(ids), meta.MaxTxnOps/4) {
		var gets []meta.Op
		for _, id := range part {
			gets = append(gets, meta.Get(keys.Segment(collection, id)), meta.Get(keys.Unit(collection, id)),
				meta.Get(keys.Tomb(collection, id)))
		}
		res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return nil, fmt.Errorf("read segments of collection %d: %w", collection, err)
		}
		for i, id := range part {
			got := res.Ranges[3*i : 3*i+3]
			for _, kv := range got[0] {
				s, err := DecodeSegment(collection, kv)
				if err != nil {
					return nil, err
				}
				rec := &storagev1.Segment{} // for what a segment does not show
				if err := record.Decode(kv, rec); err != nil {
					return nil, err
				}
				of(id).live = &s
				if byHash && rec.GetRemovedWhole() {
					of(id).taken, of(id).byHash = rec.GetRemoved(), true
				}
			}
			if kvs := slices.Concat(got[1], got[2]); len(kvs) > 0 {
				list, err := c.readUnits(ctx, collection, id, kvs)
				if err != nil {
					return nil, err
				}
				of(id).units = append(of(id).units, list...)
			}
		}
		if err := c.takenUnits(ctx, collection, part, found, of); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// takenUnits reads the units that were taken from segments, but not of those that
// know them by hash.
func (c *Catalog) takenUnits(ctx context.Context, collection int64, ids []int64, found map[int64]*holding, of func(int64) *holding) error {
	ids = slices.DeleteFunc(slices.Clone(ids), func(id int64) bool { return found[id] != nil && found[id].byHash })
	if len(ids) == 0 {
		return nil
	}
	gets := make([]meta.Op, len(ids))
	for i, id := range ids {
		gets[i] = meta.GetRange(meta.Prefix(keys.ReplacedPrefix(collection, id)))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return fmt.Errorf("read what was taken from segments of collection %d: %w", collection, err)
	}
	for i, id := range ids {
		for parts := range slices.Chunk(res.Ranges[i], partsInFlight*4) {
			list, err := c.units(ctx, collection, parts)
			if err != nil {
				return err
			}
			of(id).units = append(of(id).units, list...)
		}
	}
	return nil
}

// units reads units by the keys that lead to them, granted or not, in one transaction;
// those of them that are gone are left out. Parked ones are read some at a time.
func (c *Catalog) units(ctx context.Context, collection int64, parts []meta.KeyValue) ([]Unit, error) {
	ids, gets := make([]int64, len(parts)), make([]meta.Op, 0, 2*len(parts))
	for i := range parts {
		var err error
		if ids[i], err = keys.LastID(parts[i].Key); err != nil {
			return nil, err
		}
		gets = append(gets, meta.Get(keys.Unit(collection, ids[i])), meta.Get(keys.Tomb(collection, ids[i])))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, fmt.Errorf("read units of collection %d: %w", collection, err)
	}
	lists := make([][]Unit, len(parts))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(partsInFlight)
	for i := range parts {
		kvs := slices.Concat(res.Ranges[2*i], res.Ranges[2*i+1])
		group.Go(func() (err error) {
			lists[i], err = c.readUnits(groupCtx, collection, ids[i], kvs)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return slices.Concat(lists...), nil
}

// unitRecords reads what there is of a unit's record and its tombstone.
func (c *Catalog) unitRecords(ctx context.Context, collection, id int64) ([]meta.KeyValue, error) {
	res, err := c.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.Unit(collection, id)), meta.Get(keys.Tomb(collection, id))}})
	if err != nil {
		return nil, fmt.Errorf("read unit %d of collection %d: %w", id, collection, err)
	}
	return slices.Concat(res.Ranges...), nil
}

// readUnits reads a unit whole from its record and its tombstone, those of them
// that there were. One that was granted meanwhile is read from its tombstone: a
// parked unit's object goes with the grant.
func (c *Catalog) readUnits(ctx context.Context, collection, id int64, kvs []meta.KeyValue) ([]Unit, error) {
	for {
		list := make([]Unit, len(kvs))
		var err error
		for i := 0; i < len(kvs) && err == nil; i++ {
			list[i], err = c.ReadUnit(ctx, collection, kvs[i])
		}
		if err == nil {
			return list, nil
		}
		now, nowErr := c.unitRecords(ctx, collection, id)
		if nowErr != nil || slices.EqualFunc(kvs, now, func(a, b meta.KeyValue) bool { return a.Key == b.Key && a.ModRevision == b.ModRevision }) {
			return nil, err
		}
		kvs = now // a unit only goes on, and not often
	}
}

// claim is a file that something is about to add to a segment.
type claim struct {
	field   string // of the request
	segment int64
	path    FilePath
}

// claimsOf are the files that have to be looked up before they may become part
// of s. Those that lie at its place can only have been its own.
func claimsOf(claims []claim, collection int64, field string, s *segment.Segment) []claim {
	for f := range s.AllFiles() {
		if !Owns(collection, s, f.Path) {
			claims = append(claims, claim{field, s.ID, FilePath{f.Root, f.Path}})
		}
	}
	return claims
}

// checkClaims refuses files that lie at the place of something else, and files that
// belong to something else of the collection: a file of another segment goes when
// that one is reclaimed, and one that was taken from a segment is about to go. It
// looks, and does not compare: this is a mistake, not a race.
func (c *Catalog) checkClaims(ctx context.Context, collection int64, claims []claim) error {
	var ids []int64
	for i := range claims {
		cl := &claims[i]
		ids = append(append(ids, segment.IDsIn(cl.path.Path)...), cl.segment)
	}
	if len(ids) == 0 {
		return nil
	}
	holdings, err := c.holdings(ctx, collection, ids, true)
	if err != nil {
		return err
	}
	known := map[int64]bool{}
	for i := range claims {
		cl := &claims[i]
		for _, id := range append(segment.IDsIn(cl.path.Path), cl.segment) {
			owner, found := holdings[id].find(collection, cl.path)
			if found && (!owner.Live || owner.Segment != cl.segment) {
				return fmt.Errorf("%w: %q, in %s, belongs to segment %d and goes when that does; a path is never used twice",
					ErrFileExists, cl.path.Path, cl.field, owner.Segment)
			}
		}
		if err := c.checkPlace(ctx, collection, cl, known); err != nil {
			return err
		}
	}
	return nil
}
