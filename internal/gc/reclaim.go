package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Limits of one decision.
const (
	maxHolders    = 8         // that are named
	batchUnits    = 40        // three keys of each are read, three compared, two written, in one transaction
	batchBytes    = 768 << 10 // of records in one transaction
	batchInFlight = 8
	maxAttempts   = 16
	listBytes     = 4 << 20 // of records in one answer of List
)

// Ask names a unit: one of its fields is set.
type Ask struct {
	Segment int64
	Build   int64
	File    catalog.FilePath
	// FileSegment is the segment that File is or was part of; 0: found by the
	// path.
	FileSegment int64
}

// Deleter says who deletes. Stored: append only.
type Deleter int

// The deleters.
const (
	BySnapshotd Deleter = iota + 1
	ByCaller
)

// State is what a unit is to the catalog.
type State int

// The states.
const (
	Unknown State = iota + 1 // not registered, or gone
	Live
	Dropped
	Granted
)

// SnapshotHolder is a snapshot that holds a unit.
type SnapshotHolder struct {
	ID   int64
	Name string // empty while it is being created
}

// Answer says what a unit is, and who holds it.
type Answer struct {
	State     State
	Snapshots []SnapshotHolder // that reference it, the newest first
	Creating  []SnapshotHolder // that may come to reference it
	LiveIn    int64            // the segment that it is, or is part of, when it is Live
	Holders   int              // how many hold it; of snapshots only some are named
	Tombstone *Tombstone       // when it is Granted
	unit      *catalog.Unit    // when it is Dropped
}

// Tombstone is a granted unit.
type Tombstone struct {
	ID         int64
	Collection int64
	Unit       catalog.Unit
	Deleter    Deleter
	Caller     string
	GrantTime  time.Time
	Revision   int64 // at which it was granted
}

// Check says who holds units. It is advice: nobody may delete on it. The answers
// are in the order of asks.
func (g *GC) Check(ctx context.Context, ref catalog.Ref, asks []Ask) ([]Answer, error) {
	answers, err := g.decide(ctx, ref, asks, nil)
	if err != nil {
		return nil, fmt.Errorf("check references in collection %s: %w", ref, err)
	}
	return answers, nil
}

// Reclaim grants the units that nobody holds to deleter, for caller. The answers
// are in the order of asks; what is Granted may be deleted. A unit that was
// granted before stays granted as it was. It is an epoch.ErrRolledBack when there is
// something to grant and the metadata store is behind the object store.
func (g *GC) Reclaim(ctx context.Context, ref catalog.Ref, asks []Ask, deleter Deleter, caller string) ([]Answer, error) {
	answers, err := g.decide(ctx, ref, asks, &grant{deleter: deleter, caller: caller})
	if err != nil {
		return nil, fmt.Errorf("reclaim in collection %s: %w", ref, err)
	}
	return answers, nil
}

// grant is what to write of units that nobody holds.
type grant struct {
	deleter Deleter
	caller  string
}

// decide answers asks, and when to is given grants what nobody holds.
func (g *GC) decide(ctx context.Context, ref catalog.Ref, asks []Ask, to *grant) ([]Answer, error) {
	col, err := g.o.Catalog.Collection(ctx, ref)
	if err != nil {
		return nil, err
	}
	units := make([]ask, len(asks)) // by place
	var order []ask                 // each once
	seen := map[ask]bool{}
	if err := g.resolveAll(ctx, &col, asks, units); err != nil {
		return nil, err
	}
	for _, u := range units {
		if !seen[u] {
			seen[u] = true
			order = append(order, u)
		}
	}
	results := make([][]Answer, (len(order)+batchUnits-1)/batchUnits)
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	n := 0
	for part := range slices.Chunk(order, batchUnits) {
		at := n
		n++
		group.Go(func() (err error) {
			results[at], err = g.decideBatch(groupCtx, &col, part, nil, to)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	byAsk := make(map[ask]Answer, len(order))
	for i, a := range order {
		byAsk[a] = results[i/batchUnits][i%batchUnits]
	}
	answers := make([]Answer, len(asks))
	for i := range asks {
		answers[i] = byAsk[units[i]]
	}
	return answers, nil
}

// ask is an Ask whose file was looked for.
type ask struct {
	unit  int64 // id of the unit that it is or would be; 0: nothing in the catalog has the file
	build bool  // asked for as an index build
	live  int64 // the segment that has the file
}

// resolveAll looks for the files among asks, several at once.
func (g *GC) resolveAll(ctx context.Context, col *catalog.Collection, asks []Ask, units []ask) error {
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	for i, a := range asks {
		switch {
		case a.Segment > 0:
			units[i] = ask{unit: a.Segment}
		case a.Build > 0:
			units[i] = ask{unit: a.Build, build: true}
		default:
			group.Go(func() (err error) {
				units[i], err = g.resolve(ctx, col, a)
				return err
			})
		}
	}
	return group.Wait()
}

// resolve looks for a file.
func (g *GC) resolve(ctx context.Context, col *catalog.Collection, a Ask) (ask, error) {
	owner, found, err := g.o.Catalog.FindOwner(ctx, col.ID, a.File, a.FileSegment)
	switch {
	case err != nil:
		return ask{}, err
	case !found:
		return ask{}, nil
	case owner.Live && col.State == catalog.Dropping:
		return ask{unit: owner.Segment}, nil
	case owner.Live:
		return ask{live: owner.Segment}, nil
	}
	return ask{unit: owner.Unit}, nil
}

// premises are what a decision is made on, all read at one revision.
type premises struct {
	revision   int64
	generation int64 // 0: no snapshot was ever committed
	history    int64 // of the metadata store; 0: not known
	pending    []meta.KeyValue
	units      []unitState
	behind     error // nothing is granted: the metadata store has gone back in time
}

type unitState struct {
	live bool          // it is a segment of the collection
	unit *catalog.Unit // of a parked one no more than its stub says, until it is read whole
	kv   meta.KeyValue // of the unit
	rec  *storagev1.Unit
	tomb *Tombstone
	held *heldObject // that the record of a parked unit lies in
}

// around are the reads of what is decided on besides the units.
func around(collection int64) []meta.Op {
	from, to := meta.Prefix(keys.PendingPrefix(collection))
	return []meta.Op{
		meta.Get(keys.Generation(collection)), meta.GetRange(from, to), meta.Get(keys.Behind), meta.Get(keys.Epoch),
	}
}

// premisesOf begins the premises of n units with what around has read.
func premisesOf(res *meta.TxnResult, n int) *premises {
	p := &premises{revision: res.Revision, pending: res.Ranges[1], units: make([]unitState, n)}
	for _, kv := range res.Ranges[0] {
		p.generation = kv.ModRevision
	}
	p.behind = epoch.Blocked(res.Ranges[2])
	p.history = epoch.History(res.Ranges[3])
	return p
}

// readPremises reads what the decision on units is made on.
func (g *GC) readPremises(ctx context.Context, col *catalog.Collection, units []ask) (*premises, error) {
	collection := col.ID
	gets := around(collection)
	first := len(gets)
	for _, u := range units {
		gets = append(gets, meta.Get(keys.Unit(collection, u.unit)), meta.Get(keys.Tomb(collection, u.unit)),
			meta.Get(keys.Segment(collection, u.unit)))
	}
	res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, fmt.Errorf("read units: %w", err)
	}
	p := premisesOf(&res, len(units))
	for i := range units {
		s, got := &p.units[i], res.Ranges[first+3*i:]
		s.live = len(got[2]) > 0
		for _, kv := range got[0] {
			if err := s.read(collection, units[i].unit, kv); err != nil {
				return nil, err
			}
		}
		for _, kv := range got[1] {
			if s.tomb, err = DecodeTombstone(kv); err != nil {
				return nil, err
			}
		}
		if s.live && col.State == catalog.Dropping && s.unit == nil && s.tomb == nil {
			if err := s.droppedWith(col, got[2][0]); err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// place is the key of a unit's record: keys.Unit, or keys.Segment of a segment of
// a dropped collection.
type place func(collection, id int64) string

// readUnits reads as much as it takes to grant units of which it is known where
// their records lie: neither whether they have tombstones nor what else has their
// ids. The grant compares that there is none.
func (g *GC) readUnits(ctx context.Context, col *catalog.Collection, units []ask, lie place) (*premises, error) {
	gets := around(col.ID)
	first := len(gets)
	for _, u := range units {
		gets = append(gets, meta.Get(lie(col.ID, u.unit)))
	}
	res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
	if err != nil {
		return nil, fmt.Errorf("read units: %w", err)
	}
	p := premisesOf(&res, len(units))
	for i := range units {
		s := &p.units[i]
		for _, kv := range res.Ranges[first+i] {
			if kv.Key == keys.Unit(col.ID, units[i].unit) {
				err = s.read(col.ID, units[i].unit, kv)
			} else if col.State == catalog.Dropping {
				err = s.droppedWith(col, kv)
			}
			if err != nil {
				return nil, err
			}
		}
	}
	return p, nil
}

// droppedWith makes a unit of a segment that was dropped with its collection.
// That is for good, so the segment's record, which nobody writes any more, takes
// the place of a unit's.
func (s *unitState) droppedWith(col *catalog.Collection, kv meta.KeyValue) error {
	seg := &storagev1.Segment{}
	if err := record.Decode(kv, seg); err != nil {
		return err
	}
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return err
	}
	seg.State = uint32(segment.Dropped)
	s.kv, s.rec = kv, &storagev1.Unit{Format: record.Format, Kind: uint32(catalog.UnitSegment), SegmentId: id, Segment: seg}
	u, err := catalog.UnitOf(col.ID, id, s.rec)
	if err != nil {
		return err
	}
	u.Revision, s.unit, s.live = col.Revision, &u, false
	return nil
}

// decideBatch answers for units, few enough for one transaction. lie says where
// the records of units lie that are to be granted; nil: it is not known.
func (g *GC) decideBatch(ctx context.Context, col *catalog.Collection, units []ask, lie place, to *grant) ([]Answer, error) {
	for attempt := 0; attempt < maxAttempts; {
		if err := meta.Pause(ctx, attempt); err != nil {
			return nil, err
		}
		var p *premises
		var err error
		if lie != nil {
			p, err = g.readUnits(ctx, col, units, lie)
		} else {
			p, err = g.readPremises(ctx, col, units)
		}
		if err != nil {
			return nil, err
		}
		lie = nil // another attempt reads all of it
		// The generation was read before the references are looked at.
		if err := g.refs.ready(ctx, col.ID, p.revision); err != nil {
			return nil, err
		}
		answers := make([]Answer, len(units))
		var free []int
		twice := map[int]int{} // places of units that were asked for in two ways, with those in free
		for i := range units {
			answers[i] = g.answer(col, units[i], p, &p.units[i])
		}
		moved, err := g.readParked(ctx, col, units, p, answers)
		if err != nil {
			return nil, err
		}
		if moved {
			attempt++
			continue
		}
		for i := range units {
			if answers[i].State != Dropped || answers[i].Holders > 0 {
				continue
			}
			if at := slices.IndexFunc(free, func(j int) bool { return units[j].unit == units[i].unit }); at >= 0 {
				twice[i] = free[at]
			} else {
				free = append(free, i)
			}
		}
		if to == nil || len(free) == 0 {
			return answers, nil
		}
		taken, err := g.grant(ctx, col.ID, p, free, answers, to)
		switch {
		case err != nil:
			return nil, err
		case taken == len(free):
			for i, first := range twice {
				answers[i] = answers[first]
			}
			return answers, nil
		case taken == 0: // with some of them it has come further
			attempt++
		}
	}
	return nil, fmt.Errorf("%w: gave up after %d attempts", catalog.ErrConflict, maxAttempts)
}

// answer decides on one unit. It is a function of what was read, and of the
// references, which are at the same revision or later.
func (g *GC) answer(col *catalog.Collection, a ask, p *premises, s *unitState) Answer {
	switch {
	case s.tomb != nil && s.unit == nil:
		return Answer{State: Granted, Tombstone: s.tomb}
	case s.unit != nil:
		answer := Answer{State: Dropped, unit: s.unit}
		if s.tomb != nil {
			// Two things were registered under one id, which nobody should do. The
			// grant of the first says nothing of this one, which waits for it to end.
			answer.Holders++
		}
		var n int
		answer.Snapshots, n = g.refs.holders(col.ID, heldBy(col, s.unit, p.history))
		answer.Holders += n
		for _, kv := range p.pending {
			// A younger create captures after the drop: it does not see the unit.
			if kv.CreateRevision < s.unit.Revision {
				answer.Holders++
				if id, err := keys.LastID(kv.Key); err == nil && len(answer.Creating) < maxHolders {
					answer.Creating = append(answer.Creating, SnapshotHolder{ID: id})
				}
			}
		}
		return answer
	case a.live != 0 || s.live && !a.build:
		id := max(a.live, a.unit)
		answer := Answer{State: Live, LiveIn: id}
		answer.Snapshots, answer.Holders = g.refs.holders(col.ID, wanted{segment: id})
		answer.Holders++ // the collection itself
		return answer
	}
	// Not in the catalog, but a snapshot may know it: an index build that lives.
	answer := Answer{State: Unknown}
	if a.build {
		answer.Snapshots, answer.Holders = g.refs.holders(col.ID, wanted{build: a.unit})
	}
	return answer
}

// heldBy says which references hold a unit, in a history of the metadata store.
func heldBy(col *catalog.Collection, u *catalog.Unit, history int64) wanted {
	w := wantedOfKind(u.Kind, u.ID, u.Segment.ID, u.Revision, history)
	if u.Parked { // its files are looked at when its id does not hold it
		return w
	}
	w.files = func(yield func(uint64) bool) {
		for f := range u.Owned() {
			if f.Root < len(col.Roots) && !yield(manifest.FileHash(col.Roots[f.Root].Store, col.Roots[f.Root].Prefix+f.Path)) {
				return
			}
		}
	}
	return w
}

// wantedOfKind says which references hold a unit by its id or its segment's, of
// what the head of its record says and its create revision.
func wantedOfKind(kind catalog.UnitKind, unit, segment, dropped, history int64) wanted {
	switch kind {
	case catalog.UnitBuild:
		return wanted{build: unit}
	case catalog.UnitFiles:
		return wanted{segment: segment, taken: dropped, history: history}
	case catalog.UnitSegment:
	}
	return wanted{segment: segment}
}

// grant moves the units that nobody holds to their tombstones, in one
// transaction, and says how many: none when the premises did not hold any more.
// When there is too much for one, the rest is for the next.
func (g *GC) grant(ctx context.Context, collection int64, p *premises, free []int, answers []Answer, to *grant) (int, error) {
	if p.behind != nil {
		return 0, p.behind
	}
	op, err := record.NewOp(g.o.Rand)
	if err != nil {
		return 0, err
	}
	now := g.o.Clock.Display()
	newest := p.units[free[0]].unit.Revision // drop of them all
	txn := meta.Txn{
		Name: "reclaim.grant", If: []meta.Cond{generationIs(collection, p.generation), meta.Absent(keys.Behind)},
	}
	size, taken := 0, free[:0:0]
	for _, i := range free {
		s := &p.units[i]
		if size += s.size(); size > batchBytes && len(taken) > 0 {
			break
		}
		taken = append(taken, i)
		newest = max(newest, s.unit.Revision)
		rec := &storagev1.Tombstone{
			Format: record.Format, Unit: s.rec, Deleter: uint32(to.deleter), Caller: to.caller, GrantTime: now.UnixNano(), Op: op,
		}
		txn.If = append(txn.If, meta.Unchanged(s.kv.Key, s.kv.ModRevision), meta.Absent(keys.Tomb(collection, s.unit.ID)))
		if own := keys.Unit(collection, s.unit.ID); own != s.kv.Key { // it is a segment of a dropped collection
			txn.If = append(txn.If, meta.Absent(own))
		}
		txn.Then = append(txn.Then, meta.Put(keys.Tomb(collection, s.unit.ID), record.Encode(rec)), meta.Delete(s.kv.Key))
		answers[i] = Answer{State: Granted, Tombstone: &Tombstone{
			ID: s.unit.ID, Collection: collection, Unit: *s.unit, Deleter: to.deleter, Caller: to.caller, GrantTime: now,
		}}
	}
	from, end := meta.Prefix(keys.PendingPrefix(collection))
	if len(p.pending) == 0 {
		txn.If = append(txn.If, meta.RangeAbsent(from, end))
	} else { // all there are, and will be, are younger than the last drop
		txn.If = append(txn.If, meta.Cond{From: from, To: end, Target: meta.CreateRevision, Op: meta.Greater, Revision: newest})
	}
	res, err := g.kv.Txn(ctx, txn)
	if err != nil || !res.Succeeded {
		return 0, err
	}
	for _, i := range taken {
		answers[i].Tombstone.Revision = res.Revision
	}
	g.deleteHeld(ctx, p, taken)
	return len(taken), nil
}

// generationIs compares that no snapshot of the collection was committed since
// the generation was read.
func generationIs(collection, revision int64) meta.Cond {
	if revision == 0 {
		return meta.Absent(keys.Generation(collection))
	}
	return meta.Unchanged(keys.Generation(collection), revision)
}

// Confirmation says what became of a tombstone.
type Confirmation int

// What may become of one.
const (
	Confirmed Confirmation = iota + 1
	NoTombstone
	NotTheCallers // it is snapshotd's to delete and confirm
)

// Confirm says that the files of tombstones are deleted by the caller, all of
// them. The answers are in the order of ids.
func (g *GC) Confirm(ctx context.Context, ref catalog.Ref, ids []int64) ([]Confirmation, error) {
	col, err := g.o.Catalog.Collection(ctx, ref)
	if err != nil {
		return nil, fmt.Errorf("confirm in collection %s: %w", ref, err)
	}
	answers := make([]Confirmation, len(ids))
	group, groupCtx := errgroup.WithContext(ctx)
	group.SetLimit(batchInFlight)
	for at := 0; at < len(ids); at += batchUnits {
		end := min(at+batchUnits, len(ids))
		group.Go(func() error { return g.confirmBatch(groupCtx, col.ID, ids[at:end], answers[at:end]) })
	}
	if err := group.Wait(); err != nil {
		return nil, fmt.Errorf("confirm in collection %s: %w", ref, err)
	}
	return answers, nil
}

func (g *GC) confirmBatch(ctx context.Context, collection int64, ids []int64, answers []Confirmation) error {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return err
		}
		var gets []meta.Op
		for _, id := range ids {
			gets = append(gets, meta.Get(keys.Tomb(collection, id)))
		}
		res, err := g.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return err
		}
		var list []*doomed
		for i, kvs := range res.Ranges {
			if len(kvs) == 0 {
				if answers[i] == 0 { // else we confirmed it, and the answer was lost
					answers[i] = NoTombstone
				}
				continue
			}
			t, err := DecodeTombstone(kvs[0])
			if err != nil {
				return err
			}
			if t.Deleter != ByCaller {
				answers[i] = NotTheCallers
				continue
			}
			answers[i] = Confirmed
			list = append(list, &doomed{tombstone: t, kv: kvs[0]})
		}
		changed := false
		for len(list) > 0 && !changed {
			n := removable(list)
			if changed, err = g.remove(ctx, "reclaim.confirm", list[:n], nil); err != nil {
				return err
			}
			list = list[n:]
		}
		if !changed {
			return nil
		}
	}
	return fmt.Errorf("%w: gave up after %d attempts", catalog.ErrConflict, maxAttempts)
}

// removable is how many of the first of some tombstones one transaction removes.
func removable(list []*doomed) int {
	const conds, ops = 2, 2 // besides: of the leader, and of each tombstone
	units := make([]*catalog.Unit, 0, len(list))
	for n, u := range list {
		units = append(units, &u.tombstone.Unit)
		c, o := catalog.ReleaseSize(units)
		if n > 0 && (c+conds+len(units) > meta.MaxTxnOps || o+ops*len(units) > meta.MaxTxnOps) {
			return n
		}
	}
	return len(list)
}

// remove removes tombstones whose files are deleted, in one transaction named step,
// and says when one of them was changed: then it removed none. The claims to the ids of
// their units go with them, and the ids are gone.
func (g *GC) remove(ctx context.Context, step string, list []*doomed, conds []meta.Cond) (changed bool, err error) {
	var units []*catalog.Unit
	txn := meta.Txn{Name: step, If: conds}
	for _, u := range list {
		units = append(units, &u.tombstone.Unit)
		txn.If = append(txn.If, meta.Unchanged(u.kv.Key, u.kv.ModRevision))
		txn.Else = append(txn.Else, meta.Get(u.kv.Key))
	}
	if _, ops := catalog.ReleaseSize(units); ops+2*len(list) > meta.MaxTxnOps { // a single one, of many index builds
		builds, rest := units[0].Parts()
		units = []*catalog.Unit{rest}
		for part := range slices.Chunk(builds, batchUnits) {
			if changed, err := g.release(ctx, txn, list, part); changed || err != nil {
				return changed, err
			}
		}
	}
	for _, u := range list {
		txn.Then = append(txn.Then, u.tombstone.removal()...)
	}
	return g.release(ctx, txn, list, units)
}

// release carries out a transaction about tombstones together with what releases
// the ids of units. It says when one of the tombstones was changed.
func (g *GC) release(ctx context.Context, txn meta.Txn, list []*doomed, units []*catalog.Unit) (changed bool, err error) {
	for attempt := range maxAttempts {
		if err := meta.Pause(ctx, attempt); err != nil {
			return false, err
		}
		conds, ops, err := g.o.Catalog.Release(ctx, units)
		if err != nil {
			return false, err
		}
		full := meta.Txn{
			Name: txn.Name,
			If:   slices.Concat(txn.If, conds), Then: slices.Concat(txn.Then, ops), Else: txn.Else,
		}
		res, err := g.kv.Txn(ctx, full)
		if errors.Is(err, meta.ErrNoSpace) && len(txn.Then) > 0 {
			// A full store takes deletes alone. The claims stay, and keep the ids.
			full.Then = txn.Then
			res, err = g.kv.Txn(ctx, full)
		}
		if err != nil || res.Succeeded {
			return false, err
		}
		for i, u := range list {
			if len(res.Ranges[i]) == 0 || res.Ranges[i][0].ModRevision != u.kv.ModRevision {
				return true, nil
			}
		}
	}
	return true, nil // others lead, or the ids beside go all the time: the next pass tries again
}

// removal is how a tombstone whose files are deleted goes.
func (t *Tombstone) removal() []meta.Op {
	ops := []meta.Op{meta.Delete(keys.Tomb(t.Collection, t.ID))}
	if t.Unit.Kind != catalog.UnitSegment {
		ops = append(ops, meta.Delete(keys.Replaced(t.Collection, t.Unit.Segment.ID, t.ID)))
	}
	return ops
}

// List returns up to limit tombstones behind the one with id after of collection
// afterCollection, in key order, and whether there are more. It returns fewer
// when their records are large, but one at least. A positive collection restricts
// it to that one, a deleter to his.
func (g *GC) List(ctx context.Context, collection int64, deleter Deleter, afterCollection, after int64, limit int) (list []*Tombstone, more bool, err error) {
	from, to := meta.Prefix(keys.AllTombsPrefix)
	if collection > 0 {
		from, to = meta.Prefix(keys.TombPrefix(collection))
	}
	if after > 0 {
		from = keys.Tomb(afterCollection, after) + "\x00"
	}
	size := 0
	_, err = g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			t, err := DecodeTombstone(kv)
			if err != nil {
				return err
			}
			if deleter != 0 && t.Deleter != deleter {
				continue
			}
			if len(list) == limit || len(list) > 0 && size+len(kv.Value) > listBytes {
				more = true
				return errEnough
			}
			size += len(kv.Value)
			list = append(list, t)
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return nil, false, fmt.Errorf("list tombstones: %w", err)
	}
	return list, more, nil
}

// errEnough ends a scan.
var errEnough = errors.New("enough")

// Files yields what there is to delete of a tombstone, with the root that it
// lies under.
func (t *Tombstone) Files(roots []catalog.Root) func(yield func(catalog.Root, *segment.File) bool) {
	return func(yield func(catalog.Root, *segment.File) bool) {
		for f := range t.Unit.Owned() {
			if f.Root < len(roots) && !yield(roots[f.Root], f) {
				return
			}
		}
	}
}

// DecodeTombstone reads a tombstone's record.
func DecodeTombstone(kv meta.KeyValue) (*Tombstone, error) {
	collection, id, err := keys.LastTwo(kv.Key)
	if err != nil {
		return nil, err
	}
	rec := &storagev1.Tombstone{}
	if err := record.Decode(kv, rec); err != nil {
		return nil, err
	}
	t := &Tombstone{
		ID: id, Collection: collection, Deleter: Deleter(rec.GetDeleter()), Caller: rec.GetCaller(),
		GrantTime: time.Unix(0, rec.GetGrantTime()).UTC(), Revision: kv.CreateRevision,
	}
	t.Unit, err = catalog.UnitOf(collection, id, rec.GetUnit())
	return t, err
}

var errNoStore = errors.New("object store is not configured here")

// Counts holds how many committed snapshots of a collection reference a segment,
// an index build or a unit.
type Counts struct {
	refs       *index
	collection int64
	history    int64 // of the metadata store
}

// Counts returns the counts of a collection, of all snapshots that were committed
// before the call. It waits for references that are being read.
func (g *GC) Counts(ctx context.Context, collection int64) (Counts, error) {
	history, now, err := g.readHistory(ctx)
	if err != nil {
		return Counts{}, err
	}
	if err := g.refs.ready(ctx, collection, now); err != nil {
		return Counts{}, err
	}
	return Counts{g.refs, collection, history}, nil
}

// readHistory returns the history of the metadata store, and the revision at which
// it was read.
func (g *GC) readHistory(ctx context.Context) (history, revision int64, err error) {
	res, err := g.kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch)}})
	if err != nil {
		return 0, 0, fmt.Errorf("read the history of the metadata store: %w", err)
	}
	return epoch.History(res.Ranges[0]), res.Revision, nil
}

// Segment returns how many snapshots reference the segment.
func (c Counts) Segment(id int64) int { return c.refs.count(c.collection, wanted{segment: id}) }

// Build returns how many snapshots reference the index build.
func (c Counts) Build(id int64) int { return c.refs.count(c.collection, wanted{build: id}) }

// Unit returns how many snapshots hold the unit by its id or its segment's.
func (c Counts) Unit(u *catalog.Unit) int {
	return c.refs.count(c.collection, wantedOfKind(u.Kind, u.ID, u.Segment.ID, u.Revision, c.history))
}
