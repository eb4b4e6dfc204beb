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
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// UnitKind is the kind of a dropped thing. Stored: append only.
type UnitKind int

// The kinds of unit.
const (
	UnitSegment UnitKind = iota + 1 // a segment with its index builds
	UnitBuild                       // an index build of a living segment
	UnitFiles                       // files of a living segment
)

// Unit is a dropped segment, index build or set of files, which is reclaimed as a whole.
type Unit struct {
	ID         int64 // of the segment or build; removed files have a new id
	Collection int64
	Kind       UnitKind
	// Segment is the dropped segment, or the dropped part with the id of its segment.
	Segment segment.Segment
	// Revision is the revision of the drop: the create revision of the unit's key. The
	// drop puts the key, comparing that it is absent; a spill puts it again; the grant
	// deletes it for good.
	Revision int64
	DropTime time.Time
	// Spilled means that Segment has the id only: the record is in the object store. Only
	// StubOf returns such a unit.
	Spilled bool
}

// ErrSpilled means that a unit's record is a stub. [Catalog.ReadUnit] and
// [Catalog.LoadRecord] read the record from the object store.
var ErrSpilled = errors.New("unit is spilled")

// SpillPrefix is the prefix of the objects with the records of spilled units.
const SpillPrefix = "gc/held/"

// SpillKey returns the key of the object with the record of a spilled unit.
func SpillKey(collection, unit int64) string {
	return fmt.Sprintf("%s%d/%d", SpillPrefix, collection, unit)
}

// spillSuffix is the number of digits of the SHA-256 at the end of the key of a record that
// was spilled by the drop of its unit.
const spillSuffix = 16

// SpillKeyOf returns the key of the object with the record of a spilled unit, by its stub.
func SpillKeyOf(collection, unit int64, parked *storagev1.Parked) string {
	if parked.GetSuffix() == "" {
		return SpillKey(collection, unit)
	}
	return SpillKey(collection, unit) + "-" + parked.GetSuffix()
}

// ParseSpillKey returns the unit of an object with a spilled record, by its key.
func ParseSpillKey(key string) (collection, unit int64, ok bool) {
	rest, ok := strings.CutPrefix(key, SpillPrefix)
	if !ok {
		return 0, 0, false
	}
	first, second, _ := strings.Cut(rest, "/")
	second, suffix, _ := strings.Cut(second, "-")
	collection, err1 := strconv.ParseInt(first, 10, 64)
	unit, err2 := strconv.ParseInt(second, 10, 64)
	sum, err := hex.DecodeString(suffix)
	if err != nil || hex.EncodeToString(sum) != suffix || suffix != "" && len(suffix) != spillSuffix {
		return 0, 0, false
	}
	ok = err1 == nil && err2 == nil && collection > 0 && unit > 0 &&
		key == SpillKeyOf(collection, unit, &storagev1.Parked{Suffix: suffix})
	return collection, unit, ok
}

// WriteSpilled returns an Options.Spill that writes to one of stores.
func WriteSpilled(
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

// DecodeUnit reads a unit's record. A stub is ErrSpilled.
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

// UnitOf reads a unit from its record, without the revision. A stub is ErrSpilled, so that
// it is not mistaken for a unit without files.
func UnitOf(collection, id int64, rec *storagev1.Unit) (Unit, error) {
	switch {
	case rec.GetParked() != nil:
		return Unit{}, fmt.Errorf("unit %d of collection %d: %w", id, collection, ErrSpilled)
	case rec.GetSegment() == nil:
		return Unit{}, fmt.Errorf("%w of unit %d of collection %d: no segment in it", record.ErrUnreadable, id, collection)
	}
	s, err := segmentOf(collection, rec.GetSegmentId(), rec.GetSegment())
	if err != nil {
		return Unit{}, fmt.Errorf("unit %d of collection %d: %w", id, collection, err)
	}
	s.Disputed = s.Disputed || rec.GetDisputed()
	return Unit{
		ID: id, Collection: collection, Kind: UnitKind(rec.GetKind()), Segment: s, DropTime: record.Time(rec.GetDropTime()),
	}, nil
}

// StubOf reads a unit from a stub, which has its ids, kind and drop time.
func StubOf(collection, id int64, rec *storagev1.Unit) Unit {
	return Unit{
		ID: id, Collection: collection, Kind: UnitKind(rec.GetKind()),
		Segment:  segment.Segment{ID: rec.GetSegmentId(), State: segment.Dropped, Disputed: rec.GetDisputed()},
		DropTime: record.Time(rec.GetDropTime()), Spilled: true,
	}
}

// NewStub returns the stub of a unit: its record rec without the segment, with the length and
// the digest of full, the encoded record. The caller sets the store, and the suffix of a key
// that has one.
func NewStub(full []byte, rec *storagev1.Unit) *storagev1.Unit {
	sum := sha256.Sum256(full)
	stub := proto.CloneOf(rec)
	stub.Segment = nil
	stub.Parked = &storagev1.Parked{Length: int64(len(full)), Sha256: sum[:]}
	return stub
}

// SpilledReader reads the object at key of the store of an alias, which holds the record of
// a spilled unit, as [object.ReadVerified] does.
type SpilledReader func(ctx context.Context, store, key string, check func([]byte) error) ([]byte, error)

// ReadSpilled returns a SpilledReader of stores, by alias.
func ReadSpilled(stores map[string]object.Store) SpilledReader {
	return func(ctx context.Context, store, key string, check func([]byte) error) ([]byte, error) {
		s, ok := stores[store]
		if !ok {
			return nil, fmt.Errorf("%w: the store is not configured here", record.ErrUnreadable)
		}
		// The limit is that of a record in the metadata store.
		return object.ReadVerified(ctx, s, key, meta.MaxTxnBytes, check)
	}
}

// LoadRecord reads the record of a unit from the object store when rec is a stub, and
// returns any other rec unchanged. It parses only an object with the stub's length and
// digest. A missing or different object is record.ErrUnreadable: the unit must be left
// alone, unless the stub is outdated, for the object is deleted when the unit is granted.
func (c *Catalog) LoadRecord(
	ctx context.Context, collection, id int64, rec *storagev1.Unit,
) (*storagev1.Unit, error) {
	parked := rec.GetParked()
	if parked == nil {
		return rec, nil
	}
	key := SpillKeyOf(collection, id, parked)
	fail := func(err error) (*storagev1.Unit, error) {
		return nil, fmt.Errorf("unit %d of collection %d is spilled: read %s of store %q: %w",
			id, collection, key, parked.GetStore(), err)
	}
	data, err := c.readSpilled(ctx, parked, key)
	if err != nil {
		return fail(err)
	}
	whole := &storagev1.Unit{}
	if err := record.Decode(meta.KeyValue{Key: key, Value: data}, whole); err != nil {
		return fail(err)
	}
	if whole.GetParked() != nil {
		return fail(fmt.Errorf("%w: the object is a stub", record.ErrUnreadable))
	}
	whole.Disputed = whole.GetDisputed() || rec.GetDisputed() // which may be newer
	return whole, nil
}

// readSpilled reads the object of a spilled unit and checks its digest. Another digest and a
// missing object are record.ErrUnreadable.
func (c *Catalog) readSpilled(ctx context.Context, parked *storagev1.Parked, key string) ([]byte, error) {
	if c.readSpill == nil {
		return nil, fmt.Errorf("%w: this process reads no spilled units", record.ErrUnreadable)
	}
	data, err := c.readSpill(ctx, parked.GetStore(), key, func(data []byte) error {
		sum := sha256.Sum256(data)
		if int64(len(data)) == parked.GetLength() && bytes.Equal(sum[:], parked.GetSha256()) {
			return nil
		}
		return fmt.Errorf("%w: %d bytes of SHA-256 %x, want %d of %x",
			record.ErrUnreadable, len(data), sum, parked.GetLength(), parked.GetSha256())
	})
	if errors.Is(err, object.ErrNotFound) {
		return nil, fmt.Errorf("%w: %w", record.ErrUnreadable, err)
	}
	return data, err
}

// ReadUnit reads a unit from kv, its record or its tombstone. It reads the object store
// when the record is a stub; the errors are those of [Catalog.LoadRecord].
func (c *Catalog) ReadUnit(ctx context.Context, collection int64, kv meta.KeyValue) (Unit, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Unit{}, err
	}
	if strings.HasPrefix(kv.Key, keys.AllTombstonesPrefix) {
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
	if rec, err = c.LoadRecord(ctx, collection, id, rec); err != nil {
		return Unit{}, err
	}
	u, err := UnitOf(collection, id, rec)
	u.Revision = kv.CreateRevision
	return u, err
}

// Owned yields the files that the unit owns; see [Owns]. Any other file is foreign, and is
// never deleted with the unit. It panics when the unit is Spilled, for its files are then
// unknown.
func (u *Unit) Owned() iter.Seq[*segment.File] {
	if u.Spilled {
		panic(fmt.Sprintf("files of unit %d: the unit is spilled", u.ID))
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

// Has reports whether the unit has the file. It panics when the unit is Spilled, for its
// files are then unknown.
func (u *Unit) Has(path FilePath) bool {
	if u.Spilled {
		panic(fmt.Sprintf("files of unit %d: the unit is spilled", u.ID))
	}
	return hasFile(&u.Segment, path)
}

// partsInFlight is the number of concurrent reads of spilled units.
const partsInFlight = 8

// Parts calls visit with the units that were removed from segments, whose ids must ascend,
// and are not granted: replaced index builds and removed files. It loads the record of a
// spilled unit when load returns true for its stub, and visits the stub otherwise. It
// calls visit from one goroutine at a time.
func (c *Catalog) Parts(
	ctx context.Context, collection int64, segments []int64, load func(*Unit) bool, visit func(Unit),
) error {
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
		return fmt.Errorf("read the units removed from segments of collection %d: %w", collection, err)
	}
	for part := range slices.Chunk(units, partsInFlight*4) {
		if err := c.readParts(ctx, collection, part, load, visit); err != nil {
			return err
		}
	}
	return nil
}

// readParts is Parts for the units of one transaction.
func (c *Catalog) readParts(
	ctx context.Context, collection int64, units []int64, load func(*Unit) bool, visit func(Unit),
) error {
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
			if !load(&stub) {
				list[i] = &stub
				continue
			}
		}
		group.Go(func() error {
			read, err := c.readUnits(ctx, collection, units[i], kvs)
			if err == nil && len(read) > 0 && read[0].Revision > 0 { // not granted meanwhile
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

// Owner is the segment or unit with a file.
type Owner struct {
	Segment int64 // that has or had the file
	Live    bool  // the segment has it
	Unit    int64 // else the unit with the file
	// Owned means that the segment owns the file, see [Owns]; no other file is deleted.
	Owned bool
}

// FindOwner returns the owner of the file at path among the segments and units whose ids
// are elements of the path, and those of segmentID unless it is 0, at the newest
// revision.
func (c *Catalog) FindOwner(
	ctx context.Context, collection int64, path FilePath, segmentID int64,
) (Owner, bool, error) {
	ids := segment.IDsIn(path.Path)
	if segmentID > 0 {
		ids = append(ids, segmentID)
	}
	found, err := c.readHoldings(ctx, collection, ids, false)
	if err != nil {
		return Owner{}, false, err
	}
	for _, id := range ids {
		if owner, ok := found[id].find(collection, path); ok {
			return owner, true, nil
		}
	}
	return Owner{}, false, nil
}

// holdings are the records of one segment: the segment unless it is dropped, and the units
// of it and of its removed parts, granted ones included.
type holdings struct {
	live  *segment.Segment
	units []Unit
	// With byHash, removed has the hashes of all paths that were removed from the live
	// segment, and units has none of them.
	removed []uint64
	byHash  bool
}

// find returns the owner of the file at path.
func (h *holdings) find(collection int64, path FilePath) (Owner, bool) {
	if h == nil {
		return Owner{}, false
	}
	if h.live != nil && hasFile(h.live, path) {
		return Owner{Segment: h.live.ID, Live: true, Owned: Owns(collection, h.live, path.Path)}, true
	}
	if len(h.removed) > 0 && slices.Contains(h.removed, pathHash(path.Root, path.Path)) {
		return Owner{Segment: h.live.ID}, true
	}
	for i := range h.units {
		if u := &h.units[i]; hasFile(&u.Segment, path) {
			return Owner{Segment: u.Segment.ID, Unit: u.ID, Owned: Owns(collection, &u.Segment, path.Path)}, true
		}
	}
	return Owner{}, false
}

// readHoldings reads the holdings of segments. Ids without records are omitted.
//
// With byHash, it reads no units of a live segment whose record has the hashes of all
// removed paths, so that the number of calls does not grow with the history of the
// segment.
func (c *Catalog) readHoldings(
	ctx context.Context, collection int64, ids []int64, byHash bool,
) (map[int64]*holdings, error) {
	ids = slices.Clone(ids)
	slices.Sort(ids)
	found := map[int64]*holdings{}
	of := func(id int64) *holdings {
		if found[id] == nil {
			found[id] = &holdings{}
		}
		return found[id]
	}
	for part := range slices.Chunk(slices.Compact(ids), meta.MaxTxnOps/4) {
		var gets []meta.Op
		for _, id := range part {
			gets = append(gets, meta.Get(keys.Segment(collection, id)), meta.Get(keys.Unit(collection, id)),
				meta.Get(keys.Tombstone(collection, id)))
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
				rec := &storagev1.Segment{} // with the fields that segment.Segment lacks
				if err := record.Decode(kv, rec); err != nil {
					return nil, err
				}
				of(id).live = &s
				if byHash && rec.GetRemovedWhole() {
					of(id).removed, of(id).byHash = rec.GetRemoved(), true
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
		if err := c.readRemoved(ctx, collection, part, found, of); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// readRemoved adds the units that were removed from segments to their holdings, except for
// segments with byHash.
func (c *Catalog) readRemoved(
	ctx context.Context, collection int64, ids []int64, found map[int64]*holdings, of func(int64) *holdings,
) error {
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
		return fmt.Errorf("read the units removed from segments of collection %d: %w", collection, err)
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

// units reads units by the keys of their segments, granted or not, in one transaction, and
// omits removed ones. It loads partsInFlight spilled ones at a time.
func (c *Catalog) units(ctx context.Context, collection int64, parts []meta.KeyValue) ([]Unit, error) {
	ids, gets := make([]int64, len(parts)), make([]meta.Op, 0, 2*len(parts))
	for i := range parts {
		var err error
		if ids[i], err = keys.LastID(parts[i].Key); err != nil {
			return nil, err
		}
		gets = append(gets, meta.Get(keys.Unit(collection, ids[i])), meta.Get(keys.Tombstone(collection, ids[i])))
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

// unitRecords reads the record and the tombstone of a unit, those that exist.
func (c *Catalog) unitRecords(ctx context.Context, collection, id int64) ([]meta.KeyValue, error) {
	res, err := c.kv.Txn(ctx, meta.Txn{Then: []meta.Op{
		meta.Get(keys.Unit(collection, id)), meta.Get(keys.Tombstone(collection, id)),
	}})
	if err != nil {
		return nil, fmt.Errorf("read unit %d of collection %d: %w", id, collection, err)
	}
	return slices.Concat(res.Ranges...), nil
}

// readUnits reads a unit from kvs, its record and its tombstone as they existed. It reads a
// unit that was granted meanwhile from its tombstone, for the grant deletes the object
// of a spilled unit.
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
		unchanged := slices.EqualFunc(kvs, now, func(a, b meta.KeyValue) bool {
			return a.Key == b.Key && a.ModRevision == b.ModRevision
		})
		if nowErr != nil || unchanged {
			return nil, err
		}
		kvs = now // ends: a unit moves forward through few states
	}
}

// fileClaim is a file that a change adds to a segment.
type fileClaim struct {
	field   string // of the request
	segment int64
	path    FilePath
}

// fileClaims appends the files of s that need a lookup before s may have them. Files at
// the place of s need none: no other segment can have had them.
func fileClaims(claims []fileClaim, collection int64, field string, s *segment.Segment) []fileClaim {
	for f := range s.AllFiles() {
		if !Owns(collection, s, f.Path) {
			claims = append(claims, fileClaim{field, s.ID, FilePath{f.Root, f.Path}})
		}
	}
	return claims
}

// checkFileClaims returns an error for files at the place of another segment, and for files
// of another segment or unit of the collection, whose reclaim deletes them. It reads, and
// compares nothing: a violation is a mistake of the caller, not a race.
func (c *Catalog) checkFileClaims(ctx context.Context, collection int64, claims []fileClaim) error {
	var ids []int64
	for i := range claims {
		cl := &claims[i]
		ids = append(append(ids, segment.IDsIn(cl.path.Path)...), cl.segment)
	}
	if len(ids) == 0 {
		return nil
	}
	found, err := c.readHoldings(ctx, collection, ids, true)
	if err != nil {
		return err
	}
	known := map[int64]bool{}
	for i := range claims {
		cl := &claims[i]
		for _, id := range append(segment.IDsIn(cl.path.Path), cl.segment) {
			owner, ok := found[id].find(collection, cl.path)
			if ok && (!owner.Live || owner.Segment != cl.segment) {
				return fmt.Errorf("%w: %q, in %s, belongs to segment %d and is deleted with it; paths are never reused",
					ErrFileExists, cl.path.Path, cl.field, owner.Segment)
			}
		}
		if err := c.checkPlace(ctx, collection, cl, known); err != nil {
			return err
		}
	}
	return nil
}
