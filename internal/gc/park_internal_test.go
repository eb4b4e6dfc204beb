package gc

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// lot is a cluster in memory in which units are parked: the two stores, and
// replicas that each reach them through a Faulty of their own. Its snapshots are
// no more than a record and references.
type lot struct {
	t        *testing.T
	kv       meta.KV
	objects  object.Store
	replicas []*parker
	col      catalog.Collection
	index    int64
	ref      catalog.Ref
}

// parker is one replica.
type parker struct {
	*GC
	cat   *catalog.Catalog
	kv    *meta.Faulty
	store *object.Faulty
}

// inLot runs fn in a bubble of virtual time, with n replicas.
func inLot(t *testing.T, n int, fn func(t *testing.T, l *lot)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		l := &lot{t: t, kv: metamemory.New(metamemory.Options{Now: time.Now}), objects: objectmemory.New(objectmemory.Options{Now: time.Now})}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, n)
		for range n {
			r := &parker{kv: meta.NewFaulty(l.kv), store: object.NewFaulty(l.objects)}
			stores := map[string]object.Store{"default": r.store}
			r.cat = catalog.New(catalog.Options{
				KV: r.kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(r.kv, time.Now, nil),
				HasStore: func(alias string) bool { return alias == "default" }, Held: catalog.ReadHeld(stores),
			})
			r.GC = New(Options{
				KV: r.kv, Catalog: r.cat, Stores: stores, SnapshotStore: "default", Now: time.Now, Rand: rand.Reader, Log: zap.NewNop(),
			})
			go func() { done <- r.Run(ctx) }()
			l.replicas = append(l.replicas, r)
		}
		t.Cleanup(func() {
			cancel()
			for range n {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		})
		cat := l.replicas[0].cat
		var err error
		l.col, err = cat.CreateCollection(t.Context(), request.Token{}, catalog.Collection{
			DB: "db", Name: "c", Channels: []string{"ch"}, Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
			Schema: catalog.Schema{Format: "x", Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}}},
		})
		l.must(err)
		l.ref = catalog.Ref{ID: l.col.ID}
		x, err := cat.CreateIndex(t.Context(), request.Token{}, l.ref, catalog.Index{Name: "x", Field: 100})
		l.must(err)
		l.index = x.ID
		virtual.Wait()
		fn(t, l)
	})
}

func (l *lot) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

func (l *lot) id() int64 {
	l.t.Helper()
	id, err := l.replicas[0].cat.NextID(l.t.Context())
	l.must(err)
	return id
}

// segment is a segment of n files, of ids that its paths have, and of 400 bytes
// besides.
func (l *lot) segment(n int) segment.Segment {
	s := segment.Segment{ID: l.id(), State: segment.Flushed, Rows: 10, DML: segment.Position{Timestamp: 9}, EngineData: bytes.Repeat([]byte{7}, 400)}
	for i := range n {
		f := segment.File{Kind: segment.KindInsert, Field: 100, LogID: int64(i + 1), Size: 10, ETag: fmt.Sprintf("%032x", i), Entries: 10, MaxTimestamp: 8}
		f.Path = catalog.NativePath(l.col.ID, &s, &f)
		s.Files = append(s.Files, f)
	}
	return s
}

func (l *lot) add(list ...segment.Segment) {
	l.t.Helper()
	_, _, err := l.replicas[0].cat.AddSegments(l.t.Context(), l.col.ID, list)
	l.must(err)
}

func (l *lot) swap(s catalog.Swap) {
	l.t.Helper()
	_, err := l.replicas[0].cat.Change(l.t.Context(), request.Token{}, l.ref, s)
	l.must(err)
}

// dropped returns a unit of a segment that was dropped, with its key.
func (l *lot) dropped() (unit int64, key string) {
	l.t.Helper()
	s := l.segment(3)
	l.add(s)
	l.swap(catalog.Swap{Drop: []int64{s.ID}})
	return s.ID, keys.Unit(l.col.ID, s.ID)
}

// snapshot commits a snapshot of refs.
func (l *lot) snapshot(refs *manifest.Refs) int64 {
	l.t.Helper()
	id := l.id()
	digest := manifest.Sum(fmt.Append(nil, "metadata of ", id))
	for _, r := range l.replicas {
		r.Offer(id, digest, refs)
	}
	l.writeSnapshot(id, &storagev1.Snapshot{State: committed, MetadataLength: digest.Length, MetadataSha256: digest.SHA256[:]})
	virtual.Wait() // until it is taken in: not many offers are kept
	return id
}

func (l *lot) dropSnapshot(id int64) {
	l.t.Helper()
	l.writeSnapshot(id, &storagev1.Snapshot{State: deleting})
}

func (l *lot) writeSnapshot(id int64, rec *storagev1.Snapshot) {
	l.t.Helper()
	rec.Format, rec.Name, rec.CollectionId, rec.Store = record.Format, fmt.Sprint("s", id), l.col.ID, "default"
	l.put(keys.Snapshot(id), record.Encode(rec))
	l.put(keys.Generation(l.col.ID), record.Encode(&storagev1.Generation{Format: record.Format, SnapshotId: id}))
}

func (l *lot) put(key string, value []byte) {
	l.t.Helper()
	_, err := l.kv.Txn(l.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, value)}})
	l.must(err)
}

// begin puts the pending key of a create.
func (l *lot) begin() int64 {
	l.t.Helper()
	id := l.id()
	l.put(keys.Pending(l.col.ID, id), record.Encode(&storagev1.Pending{Format: record.Format}))
	return id
}

func (l *lot) read(key string) (kv meta.KeyValue, found bool) {
	l.t.Helper()
	kv, found, _, err := l.kv.Get(l.t.Context(), key)
	l.must(err)
	return kv, found
}

// stub returns the stub at key, nil when the unit there is not parked.
func (l *lot) stub(key string) *storagev1.Unit {
	l.t.Helper()
	kv, found := l.read(key)
	if !found {
		l.t.Fatalf("there is no %s", key)
	}
	rec := &storagev1.Unit{}
	l.must(record.Decode(kv, rec))
	if rec.GetParked() == nil {
		return nil
	}
	return rec
}

// held are the objects of parked units.
func (l *lot) held() []string {
	l.t.Helper()
	list := []string{}
	for info, err := range l.objects.List(l.t.Context(), catalog.HeldPrefix) {
		l.must(err)
		list = append(list, info.Key)
	}
	return list
}

// park parks units, which must all be parked by that.
func (l *lot) park(units ...int64) {
	l.t.Helper()
	n, err := l.replicas[0].park(l.t.Context(), l.col.ID, units, nil)
	l.must(err)
	if n != len(units) {
		l.t.Fatalf("parked %d units, want %d", n, len(units))
	}
}

func (l *lot) reclaim(r *parker, asks ...Ask) []Answer {
	l.t.Helper()
	answers, err := r.Reclaim(l.t.Context(), l.ref, asks, ByCaller, "tester")
	l.must(err)
	return answers
}

// grantedWhole fails unless the unit has gone to its tombstone, with every byte
// of rec, and nothing is left of it elsewhere.
func (l *lot) grantedWhole(unit int64, rec []byte) {
	l.t.Helper()
	if kv, found := l.read(keys.Unit(l.col.ID, unit)); found {
		l.t.Errorf("unit %d is still there: %q", unit, kv.Value)
	}
	kv, found := l.read(keys.Tomb(l.col.ID, unit))
	if !found {
		l.t.Fatalf("unit %d has no tombstone", unit)
	}
	tomb := &storagev1.Tombstone{}
	l.must(record.Decode(kv, tomb))
	if !bytes.Equal(record.Encode(tomb.GetUnit()), rec) {
		l.t.Errorf("the tombstone of unit %d holds another record: %v", unit, tomb)
	}
	if _, err := DecodeTombstone(kv); err != nil {
		l.t.Error(err)
	}
}

// told is what can be asked about asks, paths and units.
func (l *lot) told(asks []Ask, files []catalog.FilePath, units []int64) []string {
	l.t.Helper()
	r := l.replicas[0]
	var list []string
	answers, err := r.Check(l.t.Context(), l.ref, asks)
	l.must(err)
	for i, a := range answers {
		list = append(list, fmt.Sprintf("%v: state %d, held by %v, %v, %d of %d", asks[i], a.State, a.Snapshots, a.Creating, a.LiveIn, a.Holders))
	}
	for _, f := range files {
		owner, found, err := r.cat.FindOwner(l.t.Context(), l.col.ID, f, 0)
		l.must(err)
		list = append(list, fmt.Sprintf("%v belongs to %v %v", f, found, owner))
		s := l.segment(0)
		s.Files = []segment.File{{Kind: segment.KindInsert, Path: f.Path, Size: 10}}
		_, _, err = r.cat.AddSegments(l.t.Context(), l.col.ID, []segment.Segment{s})
		list = append(list, fmt.Sprintf("%v may be registered: %v", f, !errors.Is(err, catalog.ErrFileExists)))
	}
	for _, id := range units {
		kv, _ := l.read(keys.Unit(l.col.ID, id))
		u, err := r.cat.ReadUnit(l.t.Context(), l.col.ID, kv)
		l.must(err)
		list = append(list, fmt.Sprintf("%d is %+v", id, u))
	}
	return list
}

// Nobody can tell a parked unit from one that is not, and it is granted whole.
func TestParkedUnitIsWhole(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		dropped, lives, other := l.segment(3), l.segment(3), l.segment(2)
		b := segment.Build{ID: l.id(), Index: l.index, Field: 100, Params: map[string]string{"p": strings.Repeat("x", 300)}}
		b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", l.col.ID, lives.ID, b.ID), Size: 5}}
		lives.Builds = []segment.Build{b}
		lives.Files = append(lives.Files, segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/%s", l.col.ID, lives.ID, strings.Repeat("s", 300)), Size: 5})
		// One of its files is part of another segment, registered first.
		shared := segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("any/%d/shared", dropped.ID), Size: 7}
		other.Files = append(other.Files, shared)
		l.add(other)
		dropped.Files = append(dropped.Files, segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/own", l.col.ID, dropped.ID), Size: 7})
		l.add(dropped, lives)
		stats := catalog.FilePath{Path: lives.Files[3].Path}
		l.swap(catalog.Swap{Drop: []int64{dropped.ID}, Update: []catalog.Update{{
			Segment: lives.ID, RemoveBuilds: []int64{b.ID}, RemoveFiles: []catalog.FilePath{stats},
		}}})
		from, to := meta.Prefix(keys.UnitPrefix(l.col.ID))
		res, err := l.kv.Range(t.Context(), meta.Range{From: from, To: to})
		l.must(err)
		records := map[int64][]byte{}
		var units []int64
		for _, kv := range res.KVs {
			id, err := keys.LastID(kv.Key)
			l.must(err)
			records[id], units = kv.Value, append(units, id)
		}
		if len(units) != 3 {
			t.Fatalf("%d units, want 3", len(units))
		}
		snap := l.snapshot(&manifest.Refs{Segments: []int64{dropped.ID, lives.ID}, Builds: []int64{b.ID}})
		asks := []Ask{{Segment: dropped.ID}, {Build: b.ID}, {File: stats}, {Segment: lives.ID}}
		files := []catalog.FilePath{{Path: dropped.Files[0].Path}, {Path: dropped.Files[3].Path}, {Path: b.Files[0].Path}, stats, {Path: shared.Path}}
		before := l.told(asks, files, units)
		l.park(units...)
		if n, err := r.park(t.Context(), l.col.ID, units, nil); n != 0 || err != nil {
			t.Errorf("parked %d again, err = %v", n, err)
		}
		for _, id := range units {
			stub := l.stub(keys.Unit(l.col.ID, id))
			data, err := object.ReadAll(t.Context(), l.objects, fmt.Sprintf("gc/held/%d/%d", l.col.ID, id), 1<<20)
			if stub == nil || err != nil || !bytes.Equal(data, records[id]) {
				t.Fatalf("unit %d: stub %v, err = %v, object %q", id, stub, err, data)
			}
			full := &storagev1.Unit{}
			l.must(record.Decode(meta.KeyValue{Value: records[id]}, full))
			if stub.GetKind() != full.GetKind() || stub.GetSegmentId() != full.GetSegmentId() || stub.GetOp() != full.GetOp() ||
				stub.GetDropTime() != full.GetDropTime() || stub.GetSegment() != nil {
				t.Errorf("stub %v of %v", stub, full)
			}
		}
		if diff := cmp.Diff(before, l.told(asks, files, units)); diff != "" {
			t.Errorf("parked it looks different (-full +parked):\n%s", diff)
		}
		r.store.Plan(nil) // and counts from here
		l.reclaim(r, asks[:2]...)
		if n := r.store.Calls(""); n > 0 {
			t.Errorf("%d calls of the object store: a holder is told by the id", n)
		}
		for _, a := range l.reclaim(r, asks[:3]...) {
			if a.State != Dropped || a.Holders != 1 || len(a.Snapshots) != 1 || a.Snapshots[0].ID != snap {
				t.Errorf("got %+v, want it held by %d", a, snap)
			}
		}
		l.dropSnapshot(snap)
		answers := l.reclaim(r, asks...)
		for i, a := range answers[:3] {
			if a.State != Granted || a.Tombstone == nil || a.Tombstone.Unit.Parked {
				t.Fatalf("answer %d is %+v, want a grant", i, a)
			}
			l.grantedWhole(a.Tombstone.ID, records[a.Tombstone.ID])
			kv, _ := l.read(keys.Tomb(l.col.ID, a.Tombstone.ID))
			tomb, err := DecodeTombstone(kv)
			l.must(err)
			if diff := cmp.Diff(tomb.Unit, a.Tombstone.Unit, cmpopts.IgnoreFields(catalog.Unit{}, "Revision")); diff != "" {
				t.Errorf("answered (-tombstone +answer):\n%s", diff)
			}
			n := 0
			for range a.Tombstone.Files(l.col.Roots) {
				n++
			}
			if want := []int{4, 1, 1}[i]; n != want {
				t.Errorf("unit %d has %d files to delete, want %d", a.Tombstone.ID, n, want)
			}
		}
		if got := l.held(); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// A unit that shares a file is granted without it, parked or not.
func TestParkedUnitWithSharedFile(t *testing.T) {
	for _, parked := range []bool{false, true} {
		inLot(t, 1, func(t *testing.T, l *lot) {
			dropped, other := l.segment(2), l.segment(2)
			shared := segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("any/%d/%d/shared", dropped.ID, other.ID), Size: 7}
			dropped.Files, other.Files = append(dropped.Files, shared), append(other.Files, shared)
			// They are registered in one call, which looks at what was there before.
			l.add(dropped, other)
			l.swap(catalog.Swap{Drop: []int64{dropped.ID}})
			if parked {
				l.park(dropped.ID)
			}
			a := l.reclaim(l.replicas[0], Ask{Segment: dropped.ID})[0]
			if a.State != Granted {
				t.Fatalf("parked %v: got %+v, want a grant", parked, a)
			}
			n := 0
			for _, f := range a.Tombstone.Files(l.col.Roots) {
				if n++; f.Path == shared.Path {
					t.Errorf("parked %v: %s is deleted", parked, f.Path)
				}
			}
			if n != 2 {
				t.Errorf("parked %v: %d files are deleted, want 2", parked, n)
			}
		})
	}
}

// A file that a snapshot has as a foreign one holds the unit whose own it is, which
// the stub does not tell.
func TestParkedUnitHeldByAFile(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		s := l.segment(3)
		l.add(s)
		l.swap(catalog.Swap{Drop: []int64{s.ID}})
		l.park(s.ID)
		snap := l.snapshot(&manifest.Refs{Files: []uint64{manifest.FileHash("default", "data/"+s.Files[1].Path)}})
		if a := l.reclaim(l.replicas[0], Ask{Segment: s.ID})[0]; a.State != Dropped || a.Holders != 1 || len(a.Snapshots) != 1 {
			t.Errorf("got %+v, want it held by snapshot %d", a, snap)
		}
		l.dropSnapshot(snap)
		if a := l.reclaim(l.replicas[0], Ask{Segment: s.ID})[0]; a.State != Granted {
			t.Errorf("got %+v, want a grant", a)
		}
	})
}

// What is not worthwhile stays, and what is gone is no error.
func TestNotParked(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		small := l.segment(0)
		small.Rows, small.EngineData = 0, bytes.Repeat([]byte{1}, 150)
		l.add(small)
		l.swap(catalog.Swap{Drop: []int64{small.ID}})
		n, err := r.park(t.Context(), l.col.ID, []int64{small.ID, l.id()}, nil)
		if n != 0 || err != nil || len(l.held()) > 0 || l.stub(keys.Unit(l.col.ID, small.ID)) != nil {
			t.Errorf("parked %d, err = %v, objects %v", n, err, l.held())
		}
		unit, key := l.dropped()
		r.o.SnapshotStore = "none"
		if n, err = r.park(t.Context(), l.col.ID, []int64{unit}, nil); n != 0 || !errors.Is(err, errNoStore) || l.stub(key) != nil {
			t.Errorf("without a store: parked %d, err = %v", n, err)
		}
		r.o.SnapshotStore = "default"
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if n, err = r.park(ctx, l.col.ID, []int64{unit}, nil); n != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("after the end: parked %d, err = %v", n, err)
		}
	})
}

// One that cannot be parked keeps no other from it, and not all errors are told.
func TestParkErrors(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		var units []int64
		for range 12 {
			unit, _ := l.dropped()
			units = append(units, unit)
		}
		bad := fmt.Sprintf("/%d", units[3])
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpPut && strings.HasSuffix(c.Keys[0], bad) {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		n, err := r.park(t.Context(), l.col.ID, units, nil)
		if n != 11 || !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), fmt.Sprintf("park unit %d of collection %d: ", units[3], l.col.ID)) {
			t.Errorf("parked %d, err = %v", n, err)
		}
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGet {
				return meta.Before
			}
			return meta.NoFault
		})
		n, err = r.park(t.Context(), l.col.ID, units, nil)
		r.kv.Hook(nil)
		if n != 0 || !errors.Is(err, meta.ErrUnavailable) || strings.Count(err.Error(), "park unit") != object.MaxJoined || !strings.HasSuffix(err.Error(), "and 4 errors more") {
			t.Errorf("parked %d, err = %v", n, err)
		}
	})
}

// faultAt is a fault of the nth call that park or a decision makes.
type faultAt struct {
	n    int
	kv   meta.Fault
	op   object.Op
	obj  object.Fault
	name string
}

// faults are those of each of the first calls.
func faults(ops ...object.Op) []faultAt {
	var list []faultAt
	for n := range 5 {
		for _, f := range []meta.Fault{meta.Before, meta.After} {
			list = append(list, faultAt{n: n, kv: f, name: fmt.Sprintf("kv call %d, fault %d", n, f)})
		}
	}
	for _, op := range ops {
		for _, f := range []object.Fault{object.FaultBefore, object.FaultAfter, object.FaultFlip, object.FaultTruncate} {
			if op == object.OpGet || f < object.FaultFlip {
				list = append(list, faultAt{op: op, obj: f, name: fmt.Sprintf("%s, fault %d", op, f)})
			}
		}
	}
	return list
}

// plan sets the fault up, and returns what says whether it happened and ends it.
func (f faultAt) plan(r *parker) (end func() bool) {
	if f.op != "" {
		r.store.FailNth(f.op, 0, f.obj)
		return func() bool {
			fired := r.store.Fired() > 0
			r.store.Plan(nil)
			return fired
		}
	}
	r.kv.FailNth(f.n, f.kv, meta.MethodGet, meta.MethodTxn)
	return func() bool {
		fired := r.kv.Fired() > 0
		r.kv.Hook(nil)
		return fired
	}
}

// Whatever fails while a unit is parked, it stays whole, and a repeat parks it.
func TestParkFaults(t *testing.T) {
	fired := 0
	for _, f := range faults(object.OpPut) {
		t.Run(f.name, func(t *testing.T) {
			inLot(t, 1, func(t *testing.T, l *lot) {
				r := l.replicas[0]
				unit, key := l.dropped()
				full, _ := l.read(key)
				end := f.plan(r)
				n, err := r.park(t.Context(), l.col.ID, []int64{unit}, nil)
				happened := end()
				if happened {
					fired++
				}
				if (err != nil) != happened || happened && n != 0 || !happened && n != 1 {
					t.Errorf("parked %d, err = %v, fault %v", n, err, happened)
				}
				kv, _ := l.read(key)
				u, err := r.cat.ReadUnit(t.Context(), l.col.ID, kv)
				if err != nil || len(u.Segment.Files) != 3 || u.Revision != full.ModRevision {
					t.Errorf("got %+v, err = %v", u, err)
				}
				_, err = r.park(t.Context(), l.col.ID, []int64{unit}, nil)
				if err != nil || l.stub(key) == nil {
					t.Fatalf("a repeat did not park it, err = %v", err)
				}
				if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Fatalf("got %+v", a)
				}
				if l.grantedWhole(unit, full.Value); len(l.held()) > 0 {
					t.Errorf("left %v", l.held())
				}
			})
		})
	}
	if fired != 6 {
		t.Errorf("%d faults, want two of each call", fired)
	}
}

// Whatever fails while a parked unit is granted, it is granted whole or not yet.
func TestGrantParkedFaults(t *testing.T) {
	fired := 0
	for _, f := range faults(object.OpGet, object.OpDelete) {
		t.Run(f.name, func(t *testing.T) {
			inLot(t, 1, func(t *testing.T, l *lot) {
				r := l.replicas[0]
				unit, key := l.dropped()
				full, _ := l.read(key)
				l.park(unit)
				virtual.Wait()
				end := f.plan(r)
				_, err := r.Reclaim(t.Context(), l.ref, []Ask{{Segment: unit}}, ByCaller, "tester")
				happened := end()
				if happened {
					fired++
				}
				if err != nil && !happened {
					t.Errorf("without a fault: %v", err)
				}
				if _, parked := l.read(key); parked && (l.stub(key) == nil || len(l.held()) != 1) {
					t.Errorf("it is not granted, and not parked; objects %v", l.held())
				}
				if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Fatalf("got %+v", a)
				}
				l.grantedWhole(unit, full.Value)
				if got := l.held(); len(got) > 0 && f.op != object.OpDelete && f.kv != meta.After {
					t.Errorf("left %v", got)
				}
			})
		})
	}
	if fired < 10 {
		t.Errorf("%d faults", fired)
	}
}

// A unit whose object is gone, or is another, stays, and the error names the
// object. Others are granted.
func TestHeldObjectUnreadable(t *testing.T) {
	for name, harm := range map[string]func(l *lot, key string, data []byte) error{
		"gone": func(l *lot, key string, _ []byte) error { return l.objects.Delete(l.t.Context(), key) },
		"altered": func(l *lot, key string, data []byte) error {
			data[len(data)/2] ^= 1
			_, err := l.objects.Put(l.t.Context(), key, data)
			return err
		},
		"longer": func(l *lot, key string, data []byte) error {
			_, err := l.objects.Put(l.t.Context(), key, append(data, 0))
			return err
		},
		"empty": func(l *lot, key string, _ []byte) error {
			_, err := l.objects.Put(l.t.Context(), key, nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			inLot(t, 1, func(t *testing.T, l *lot) {
				r := l.replicas[0]
				s := l.segment(3)
				s.Files[0].Path = fmt.Sprintf("any/%d/f", s.ID)
				l.add(s)
				l.swap(catalog.Swap{Drop: []int64{s.ID}})
				unit, key := s.ID, keys.Unit(l.col.ID, s.ID)
				good, _ := l.dropped()
				full, _ := l.read(key)
				l.park(unit, good)
				stub, _ := l.read(key)
				held := catalog.HeldKey(l.col.ID, unit)
				l.must(harm(l, held, slices.Clone(full.Value)))
				refused := func(what string, err error) {
					if !errors.Is(err, record.ErrUnreadable) || !strings.Contains(err.Error(), held) || !strings.Contains(err.Error(), `"default"`) {
						t.Errorf("%s: err = %v, want it to name %s", what, err, held)
					}
				}
				_, err := r.Reclaim(t.Context(), l.ref, []Ask{{Segment: unit}}, BySnapshotd, "x")
				refused("reclaim", err)
				_, err = r.Check(t.Context(), l.ref, []Ask{{Segment: unit}})
				refused("check", err)
				_, _, err = r.cat.FindOwner(t.Context(), l.col.ID, catalog.FilePath{Path: s.Files[0].Path}, 0)
				refused("find the owner of a file", err)
				other := l.segment(1)
				other.Files[0].Path = s.Files[0].Path
				_, _, err = r.cat.AddSegments(t.Context(), l.col.ID, []segment.Segment{other})
				refused("register a file", err)
				if kv, _ := l.read(key); !cmp.Equal(kv, stub) {
					t.Errorf("the stub was %v, now it is %v", stub, kv)
				}
				if _, found := l.read(keys.Tomb(l.col.ID, unit)); found {
					t.Error("it has a tombstone")
				}
				// While a snapshot holds it, nobody asks for its object.
				snap := l.snapshot(&manifest.Refs{Segments: []int64{unit}})
				if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Dropped || a.Holders != 1 {
					t.Errorf("got %+v, want it held", a)
				}
				l.dropSnapshot(snap)
				if a := l.reclaim(r, Ask{Segment: good})[0]; a.State != Granted {
					t.Errorf("another unit: got %+v, want a grant", a)
				}
				_, err = l.objects.Put(t.Context(), held, full.Value)
				l.must(err)
				if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Errorf("put back: got %+v, want a grant", a)
				}
				l.grantedWhole(unit, full.Value)
			})
		})
	}
}

// A catalog that cannot read objects takes a parked unit for an error, never for
// one without files.
func TestParkedUnitWithoutReader(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		unit, key := l.dropped()
		l.park(unit)
		kv, _ := l.read(key)
		blind := catalog.New(catalog.Options{KV: l.kv, Now: time.Now, Rand: rand.Reader})
		if _, err := blind.ReadUnit(t.Context(), l.col.ID, kv); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("err = %v", err)
		}
		elsewhere := catalog.New(catalog.Options{KV: l.kv, Now: time.Now, Rand: rand.Reader, Held: catalog.ReadHeld(nil)})
		if _, err := elsewhere.ReadUnit(t.Context(), l.col.ID, kv); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("err = %v", err)
		}
		if _, err := catalog.DecodeUnit(l.col.ID, kv); !errors.Is(err, catalog.ErrParked) {
			t.Errorf("err = %v", err)
		}
	})
}

// What happens between the steps of park decides whether its stub is written.
func TestParkComparesItsPremises(t *testing.T) {
	for name, c := range map[string]struct {
		between func(l *lot, unit int64)
		parked  bool // at the end
		granted bool
	}{
		"another leads":     {between: func(l *lot, _ int64) { l.put(keys.Leader, []byte("another")) }},
		"parked by another": {between: func(l *lot, unit int64) { l.parkBy(1, unit) }, parked: true},
		"granted": {
			between: func(l *lot, unit int64) { l.reclaim(l.replicas[1], Ask{Segment: unit}) }, granted: true,
		},
		"parked and granted": {
			between: func(l *lot, unit int64) {
				l.parkBy(1, unit)
				l.reclaim(l.replicas[1], Ask{Segment: unit})
			}, granted: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			inLot(t, 2, func(t *testing.T, l *lot) {
				r := l.replicas[0]
				unit, key := l.dropped()
				full, _ := l.read(key)
				l.put(keys.Leader, []byte("a"))
				leader, _ := l.read(keys.Leader)
				fence := meta.Unchanged(keys.Leader, leader.ModRevision)
				r.store.Plan(func(call object.Call) object.Fault {
					if call.Op == object.OpPut { // it has been frozen since it read the unit
						c.between(l, unit)
					}
					return object.FaultNone
				})
				n, err := r.park(t.Context(), l.col.ID, []int64{unit}, []meta.Cond{fence})
				if n != 0 || err != nil {
					t.Errorf("parked %d, err = %v", n, err)
				}
				r.store.Plan(nil)
				if c.granted {
					l.grantedWhole(unit, full.Value)
					if got := l.held(); !slices.Equal(got, []string{catalog.HeldKey(l.col.ID, unit)}) {
						t.Errorf("the late object is %v", got)
					}
					return
				}
				if (l.stub(key) != nil) != c.parked {
					t.Errorf("stub %v", l.stub(key))
				}
				if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Errorf("got %+v, want a grant", a)
				}
				l.grantedWhole(unit, full.Value)
			})
		})
	}
}

func (l *lot) parkBy(replica int, unit int64) {
	l.t.Helper()
	if n, err := l.replicas[replica].park(l.t.Context(), l.col.ID, []int64{unit}, nil); n != 1 || err != nil {
		l.t.Errorf("replica %d parked %d, err = %v", replica, n, err)
	}
}

// A unit that moves on while it is decided on is decided on anew.
func TestUnitMovesOnUnderADecision(t *testing.T) {
	inLot(t, 2, func(t *testing.T, l *lot) {
		r, other := l.replicas[0], l.replicas[1]
		unit, key := l.dropped()
		full, _ := l.read(key)
		virtual.Wait()
		n := 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn {
				if n++; n == 2 { // the grant
					l.parkBy(1, unit)
				}
			}
			return meta.NoFault
		})
		if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted || a.Tombstone.Caller != "tester" {
			t.Errorf("got %+v, want a grant", a)
		}
		r.kv.Hook(nil)
		if l.grantedWhole(unit, full.Value); len(l.held()) > 0 {
			t.Errorf("left %v", l.held())
		}

		unit, key = l.dropped()
		full, _ = l.read(key)
		l.park(unit)
		virtual.Wait()
		grant := func(c object.Call) object.Fault {
			if c.Op == object.OpGet && c.NOp == 0 {
				if answers, err := other.Reclaim(t.Context(), l.ref, []Ask{{Segment: unit}}, ByCaller, "other"); err != nil || answers[0].State != Granted {
					t.Errorf("got %+v, err = %v", answers, err)
				}
			}
			return object.FaultNone
		}
		r.store.Plan(grant)
		if a := l.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted || a.Tombstone.Caller != "other" {
			t.Errorf("got %+v, want the grant of the other", a)
		}
		l.grantedWhole(unit, full.Value)

		unit, _ = l.dropped()
		path := fmt.Sprintf("%d/0/%d/%s/100/1", l.col.ID, unit, segment.KindInsert)
		l.park(unit)
		r.store.Plan(grant)
		owner, found, err := r.cat.FindOwner(t.Context(), l.col.ID, catalog.FilePath{Path: path}, 0)
		if err != nil || !found || owner.Unit != unit {
			t.Errorf("got %+v, %v, err = %v; want unit %d, from its tombstone", owner, found, err, unit)
		}
	})
}

// A create holds a unit when it began before the drop, whenever that is parked.
func TestDropRevisionOutlivesParking(t *testing.T) {
	for name, c := range map[string]struct {
		course string // in order: b begin, d drop, p park
		holds  bool
	}{
		"before the drop, parked":                   {"bdp", true},
		"before the drop":                           {"bd", true},
		"after the drop, before it is parked":       {"dbp", false},
		"after it is parked":                        {"dpb", false},
		"two before, one after, and parked at last": {"bbdbp", true},
		"after the drop, and others begin for ever": {"dbpb", false},
		"nobody, parked":                            {"dp", false},
	} {
		t.Run(name, func(t *testing.T) {
			inLot(t, 1, func(t *testing.T, l *lot) {
				r := l.replicas[0]
				s := l.segment(3)
				l.add(s)
				var older []SnapshotHolder
				var drop int64
				for _, step := range c.course {
					switch step {
					case 'b':
						if id := l.begin(); drop == 0 {
							older = append(older, SnapshotHolder{ID: id})
						}
					case 'd':
						l.swap(catalog.Swap{Drop: []int64{s.ID}})
						kv, _ := l.read(keys.Unit(l.col.ID, s.ID))
						drop = kv.ModRevision
					case 'p':
						l.park(s.ID)
						kv, _ := l.read(keys.Unit(l.col.ID, s.ID))
						u, err := r.cat.ReadUnit(t.Context(), l.col.ID, kv)
						if err != nil || u.Revision != drop || kv.ModRevision == drop {
							t.Errorf("dropped at %d, it says %d, err = %v", drop, u.Revision, err)
						}
					}
				}
				a := l.reclaim(r, Ask{Segment: s.ID})[0]
				if !c.holds {
					if a.State != Granted {
						t.Errorf("got %+v, want a grant", a)
					}
					return
				}
				if a.State != Dropped || a.Holders != len(older) || !cmp.Equal(a.Creating, older) {
					t.Errorf("got %+v, want it held by %v", a, older)
				}
			})
		})
	}
}

// To park units does not keep others from registering segments whose ids lie
// around theirs.
func TestParkBesideAddSegments(t *testing.T) {
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		first := l.segment(1)
		_, key := l.dropped()
		last := l.segment(1)
		kv, _ := l.read(key)
		n := 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn {
				n++
				l.put(key, kv.Value) // again, as park does
			}
			return meta.NoFault
		})
		l.add(first, last)
		r.kv.Hook(nil)
		if n == 0 || n > 3 {
			t.Errorf("it took %d transactions", n)
		}
	})
}

// Under a snapshot that holds everything, the metadata store keeps little of what
// compaction leaves.
func TestParkedBytes(t *testing.T) {
	const rounds, bound = 200, 300
	inLot(t, 1, func(t *testing.T, l *lot) {
		r := l.replicas[0]
		live := l.segment(10)
		l.add(live)
		var all []int64
		var most int
		for range rounds {
			// The snapshot of this round holds what lives, and is never dropped.
			l.snapshot(&manifest.Refs{Segments: []int64{live.ID}})
			next := l.segment(10)
			l.swap(catalog.Swap{Drop: []int64{live.ID}, Add: []segment.Segment{next}})
			all, live = append(all, live.ID), next
			if n, err := r.park(t.Context(), l.col.ID, all[len(all)-1:], nil); n != 1 || err != nil {
				t.Fatalf("parked %d, err = %v", n, err)
			}
			bytes, units := 0, 0
			from, to := meta.Prefix(keys.UnitPrefix(l.col.ID))
			_, err := l.kv.Scan(t.Context(), from, to, 0, func(batch []meta.KeyValue) error {
				for _, kv := range batch {
					bytes += len(kv.Key) + len(kv.Value)
					units++
				}
				return nil
			})
			l.must(err)
			if units != len(all) || bytes >= bound*units {
				t.Fatalf("%d units take %d bytes, want less than %d each", units, bytes, bound)
			}
			most = bytes / units
		}
		if len(l.held()) != rounds {
			t.Errorf("%d objects, want %d", len(l.held()), rounds)
		}
		t.Logf("a parked unit takes %d bytes, its key included", most)
		asks := make([]Ask, len(all))
		for i, id := range all {
			asks[i] = Ask{Segment: id}
		}
		for i, a := range l.reclaim(r, asks...) {
			if a.State != Dropped || a.Holders != 1 {
				t.Fatalf("unit %d: %+v, want it held", all[i], a)
			}
		}
	})
}
