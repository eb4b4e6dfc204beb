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
	"github.com/snapshotd/snapshotd/internal/snapshot"
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

// env is a cluster in memory with spilled units: the two stores, and replicas with a
// Faulty over each store. Its snapshots have only a record and references.
type env struct {
	t        *testing.T
	kv       meta.KV
	objects  object.Store
	replicas []*replica
	col      catalog.Collection
	index    int64
	ref      catalog.Ref
}

// replica is one replica.
type replica struct {
	*GC
	cat   *catalog.Catalog
	kv    *meta.Faulty
	store *object.Faulty
}

// inLot runs fn in a bubble of virtual time, with n replicas.
func runEnv(t *testing.T, n int, fn func(t *testing.T, e *env)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		e := &env{t: t, kv: metamemory.New(metamemory.Options{Now: time.Now})}
		e.objects = objectmemory.New(objectmemory.Options{Now: time.Now})
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, n)
		for range n {
			r := &replica{kv: meta.NewFaulty(e.kv), store: object.NewFaulty(e.objects)}
			stores := map[string]object.Store{"default": r.store}
			r.cat = catalog.New(catalog.Options{
				KV: r.kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(r.kv, time.Now, nil),
				HasStore: func(alias string) bool { return alias == "default" }, ReadSpilled: catalog.ReadSpilled(stores),
			})
			r.GC = New(Options{
				KV: r.kv, Catalog: r.cat, Stores: stores, SnapshotStore: "default", Now: time.Now, Rand: rand.Reader,
				Log: zap.NewNop(),
			})
			go func() { done <- r.Run(ctx) }()
			e.replicas = append(e.replicas, r)
		}
		t.Cleanup(func() {
			cancel()
			for range n {
				if err := <-done; err != nil {
					t.Error(err)
				}
			}
		})
		cat := e.replicas[0].cat
		var err error
		e.col, err = cat.CreateCollection(t.Context(), request.Token{}, catalog.Collection{
			DB: "db", Name: "c", Channels: []string{"ch"}, Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
			Schema: catalog.Schema{
				Format: "x", Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}},
			},
		})
		e.must(err)
		e.ref = catalog.Ref{ID: e.col.ID}
		x, err := cat.CreateIndex(t.Context(), request.Token{}, e.ref, catalog.Index{Name: "x", Field: 100})
		e.must(err)
		e.index = x.ID
		virtual.Wait()
		fn(t, e)
	})
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) id() int64 {
	e.t.Helper()
	id, err := e.replicas[0].cat.NextID(e.t.Context())
	e.must(err)
	return id
}

// segment returns a segment of n files at its place, with 400 bytes of engine data.
func (e *env) segment(n int) segment.Segment {
	s := segment.Segment{
		ID: e.id(), State: segment.Flushed, Rows: 10, DML: segment.Position{Timestamp: 9},
		EngineData: bytes.Repeat([]byte{7}, 400),
	}
	for i := range n {
		f := segment.File{
			Kind: segment.KindInsert, Field: 100, LogID: int64(i + 1), Size: 10, ETag: fmt.Sprintf("%032x", i),
			Entries: 10, MaxTimestamp: 8,
		}
		f.Path = catalog.NativePath(e.col.ID, &s, &f)
		s.Files = append(s.Files, f)
	}
	return s
}

func (e *env) add(list ...segment.Segment) {
	e.t.Helper()
	_, _, err := e.replicas[0].cat.AddSegments(e.t.Context(), e.col.ID, list)
	e.must(err)
}

func (e *env) swap(s catalog.SegmentChange) {
	e.t.Helper()
	_, err := e.replicas[0].cat.Change(e.t.Context(), request.Token{}, e.ref, s)
	e.must(err)
}

// dropped drops a new segment, and returns its unit and the unit's key.
func (e *env) dropped() (unit int64, key string) {
	e.t.Helper()
	s := e.segment(3)
	e.add(s)
	e.swap(catalog.SegmentChange{Drop: []int64{s.ID}})
	return s.ID, keys.Unit(e.col.ID, s.ID)
}

// snapshot commits a snapshot with references.
func (e *env) snapshot(held *manifest.Refs) int64 {
	e.t.Helper()
	id := e.id()
	digest := manifest.Sum(fmt.Append(nil, "metadata of ", id))
	for _, r := range e.replicas {
		r.Prime(id, digest, held)
	}
	e.writeSnapshot(id, &storagev1.Snapshot{
		State: uint32(snapshot.Committed), MetadataLength: digest.Length, MetadataSha256: digest.SHA256[:],
	})
	virtual.Wait() // until it is loaded: only few primed references are kept
	return id
}

func (e *env) dropSnapshot(id int64) {
	e.t.Helper()
	e.writeSnapshot(id, &storagev1.Snapshot{State: uint32(snapshot.Deleting)})
}

func (e *env) writeSnapshot(id int64, rec *storagev1.Snapshot) {
	e.t.Helper()
	rec.Format, rec.Name, rec.CollectionId, rec.Store = record.Format, fmt.Sprint("s", id), e.col.ID, "default"
	_, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{
		meta.Put(keys.Snapshot(id), record.Encode(rec)),
		meta.Put(keys.Generation(e.col.ID), record.Encode(&storagev1.Generation{Format: record.Format, SnapshotId: id})),
	}})
	e.must(err)
}

func (e *env) put(key string, value []byte) {
	e.t.Helper()
	_, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, value)}})
	e.must(err)
}

// begin puts the pending key of a create.
func (e *env) begin() int64 {
	e.t.Helper()
	id := e.id()
	e.put(keys.Pending(e.col.ID, id), record.Encode(&storagev1.Pending{Format: record.Format}))
	return id
}

func (e *env) read(key string) (kv meta.KeyValue, found bool) {
	e.t.Helper()
	kv, found, _, err := e.kv.Get(e.t.Context(), key)
	e.must(err)
	return kv, found
}

// stub returns the stub at key, nil if the unit there is full.
func (e *env) stub(key string) *storagev1.Unit {
	e.t.Helper()
	kv, found := e.read(key)
	if !found {
		e.t.Fatalf("missing %s", key)
	}
	rec := &storagev1.Unit{}
	e.must(record.Decode(kv, rec))
	if rec.GetParked() == nil {
		return nil
	}
	return rec
}

// spilled returns the keys of the objects of spilled units.
func (e *env) spilled() []string {
	e.t.Helper()
	list := []string{}
	for info, err := range e.objects.List(e.t.Context(), catalog.SpillPrefix) {
		e.must(err)
		list = append(list, info.Key)
	}
	return list
}

// spill spills units, which must all be full.
func (e *env) spill(units ...int64) {
	e.t.Helper()
	n, err := e.replicas[0].Spill(e.t.Context(), e.col.ID, units, nil)
	e.must(err)
	if n != len(units) {
		e.t.Fatalf("spilled %d units, want %d", n, len(units))
	}
}

func (e *env) reclaim(r *replica, asks ...Ask) []Answer {
	e.t.Helper()
	answers, err := r.Reclaim(e.t.Context(), e.ref, asks, ByCaller, "tester")
	e.must(err)
	return answers
}

// wantTombstone fails unless the unit has moved to its tombstone with every byte of rec.
func (e *env) wantTombstone(unit int64, rec []byte) {
	e.t.Helper()
	if kv, found := e.read(keys.Unit(e.col.ID, unit)); found {
		e.t.Errorf("unit %d is still there: %q", unit, kv.Value)
	}
	kv, found := e.read(keys.Tombstone(e.col.ID, unit))
	if !found {
		e.t.Fatalf("unit %d has no tombstone", unit)
	}
	tomb := &storagev1.Tombstone{}
	e.must(record.Decode(kv, tomb))
	if !bytes.Equal(record.Encode(tomb.GetUnit()), rec) {
		e.t.Errorf("the tombstone of unit %d holds another record: %v", unit, tomb)
	}
	if _, err := DecodeTombstone(kv); err != nil {
		e.t.Error(err)
	}
}

// describe returns the answers of all queries about asks, paths and units.
func (e *env) describe(asks []Ask, files []catalog.FilePath, units []int64) []string {
	e.t.Helper()
	r := e.replicas[0]
	var list []string
	answers, err := r.Check(e.t.Context(), e.ref, asks)
	e.must(err)
	for i, a := range answers {
		list = append(list, fmt.Sprintf("%v: state %d, held by %v, %v, %d of %d",
			asks[i], a.State, a.Snapshots, a.Creating, a.LiveIn, a.Holders))
	}
	for _, f := range files {
		owner, found, err := r.cat.FindOwner(e.t.Context(), e.col.ID, f, 0)
		e.must(err)
		list = append(list, fmt.Sprintf("%v belongs to %v %v", f, found, owner))
		s := e.segment(0)
		s.Files = []segment.File{{Kind: segment.KindInsert, Path: f.Path, Size: 10}}
		_, _, err = r.cat.AddSegments(e.t.Context(), e.col.ID, []segment.Segment{s})
		list = append(list, fmt.Sprintf("%v may be registered: %v", f, !errors.Is(err, catalog.ErrFileExists)))
	}
	for _, id := range units {
		kv, _ := e.read(keys.Unit(e.col.ID, id))
		u, err := r.cat.ReadUnit(e.t.Context(), e.col.ID, kv)
		e.must(err)
		list = append(list, fmt.Sprintf("%d is %+v", id, u))
	}
	return list
}

// A spilled unit answers every query like a full one, and is granted with its full record.
func TestSpilledUnit(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		dropped, live, other := e.segment(3), e.segment(3), e.segment(2)
		b := segment.Build{ID: e.id(), Index: e.index, Field: 100, Params: map[string]string{"p": strings.Repeat("x", 300)}}
		b.Files = []segment.File{{
			Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", e.col.ID, live.ID, b.ID), Size: 5,
		}}
		live.Builds = []segment.Build{b}
		live.Files = append(live.Files, segment.File{
			Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/%s", e.col.ID, live.ID, strings.Repeat("s", 300)), Size: 5,
		})
		// Another segment, registered first, has one of its files.
		shared := segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("any/%d/shared", dropped.ID), Size: 7}
		other.Files = append(other.Files, shared)
		e.add(other)
		dropped.Files = append(dropped.Files, segment.File{
			Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/own", e.col.ID, dropped.ID), Size: 7,
		})
		e.add(dropped, live)
		stats := catalog.FilePath{Path: live.Files[3].Path}
		e.swap(catalog.SegmentChange{Drop: []int64{dropped.ID}, Update: []catalog.Update{{
			Segment: live.ID, RemoveBuilds: []int64{b.ID}, RemoveFiles: []catalog.FilePath{stats},
		}}})
		from, to := meta.Prefix(keys.UnitPrefix(e.col.ID))
		res, err := e.kv.Range(t.Context(), meta.Range{From: from, To: to})
		e.must(err)
		records := map[int64][]byte{}
		var units []int64
		for _, kv := range res.KVs {
			id, err := keys.LastID(kv.Key)
			e.must(err)
			records[id], units = kv.Value, append(units, id)
		}
		if len(units) != 3 {
			t.Fatalf("%d units, want 3", len(units))
		}
		snap := e.snapshot(&manifest.Refs{Segments: []int64{dropped.ID, live.ID}, Builds: []int64{b.ID}})
		asks := []Ask{{Segment: dropped.ID}, {Build: b.ID}, {File: stats}, {Segment: live.ID}}
		files := []catalog.FilePath{
			{Path: dropped.Files[0].Path}, {Path: dropped.Files[3].Path}, {Path: b.Files[0].Path}, stats, {Path: shared.Path},
		}
		before := e.describe(asks, files, units)
		e.spill(units...)
		if n, err := r.Spill(t.Context(), e.col.ID, units, nil); n != 0 || err != nil {
			t.Errorf("spilled %d twice, err = %v", n, err)
		}
		for _, id := range units {
			stub := e.stub(keys.Unit(e.col.ID, id))
			data, err := object.ReadAll(t.Context(), e.objects, fmt.Sprintf("gc/held/%d/%d", e.col.ID, id), 1<<20)
			if stub == nil || err != nil || !bytes.Equal(data, records[id]) {
				t.Fatalf("unit %d: stub %v, err = %v, object %q", id, stub, err, data)
			}
			full := &storagev1.Unit{}
			e.must(record.Decode(meta.KeyValue{Value: records[id]}, full))
			if stub.GetKind() != full.GetKind() || stub.GetSegmentId() != full.GetSegmentId() || stub.GetOp() != full.GetOp() ||
				stub.GetDropTime() != full.GetDropTime() || stub.GetSegment() != nil {
				t.Errorf("stub %v of %v", stub, full)
			}
		}
		if diff := cmp.Diff(before, e.describe(asks, files, units)); diff != "" {
			t.Errorf("answers (-full +spilled):\n%s", diff)
		}
		r.store.Plan(nil) // restarts the count of calls
		e.reclaim(r, asks[:2]...)
		if n := r.store.Calls(""); n > 0 {
			t.Errorf("%d calls of the object store: the id suffices to find a holder", n)
		}
		for _, a := range e.reclaim(r, asks[:3]...) {
			if a.State != Dropped || a.Holders != 1 || len(a.Snapshots) != 1 || a.Snapshots[0].ID != snap {
				t.Errorf("got %+v, want it held by %d", a, snap)
			}
		}
		e.dropSnapshot(snap)
		answers := e.reclaim(r, asks...)
		for i, a := range answers[:3] {
			if a.State != Granted || a.Tombstone == nil || a.Tombstone.Unit.Spilled {
				t.Fatalf("answer %d is %+v, want a grant", i, a)
			}
			e.wantTombstone(a.Tombstone.ID, records[a.Tombstone.ID])
			kv, _ := e.read(keys.Tombstone(e.col.ID, a.Tombstone.ID))
			tomb, err := DecodeTombstone(kv)
			e.must(err)
			if diff := cmp.Diff(tomb.Unit, a.Tombstone.Unit, cmpopts.IgnoreFields(catalog.Unit{}, "Revision")); diff != "" {
				t.Errorf("answered (-tombstone +answer):\n%s", diff)
			}
			n := 0
			for range a.Tombstone.Files(e.col.Roots) {
				n++
			}
			if want := []int{4, 1, 1}[i]; n != want {
				t.Errorf("unit %d has %d files to delete, want %d", a.Tombstone.ID, n, want)
			}
		}
		if got := e.spilled(); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// A unit that shares a file is granted without it, spilled or not.
func TestSpilledUnitWithSharedFile(t *testing.T) {
	for _, spilled := range []bool{false, true} {
		runEnv(t, 1, func(t *testing.T, e *env) {
			dropped, other := e.segment(2), e.segment(2)
			shared := segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("any/%d/%d/shared", dropped.ID, other.ID), Size: 7}
			dropped.Files, other.Files = append(dropped.Files, shared), append(other.Files, shared)
			// They are registered in one call, which compares only earlier registrations.
			e.add(dropped, other)
			e.swap(catalog.SegmentChange{Drop: []int64{dropped.ID}})
			if spilled {
				e.spill(dropped.ID)
			}
			a := e.reclaim(e.replicas[0], Ask{Segment: dropped.ID})[0]
			if a.State != Granted {
				t.Fatalf("spilled %v: got %+v, want a grant", spilled, a)
			}
			n := 0
			for _, f := range a.Tombstone.Files(e.col.Roots) {
				if n++; f.Path == shared.Path {
					t.Errorf("spilled %v: %s is deleted", spilled, f.Path)
				}
			}
			if n != 2 {
				t.Errorf("spilled %v: %d files are deleted, want 2", spilled, n)
			}
		})
	}
}

// A file that a snapshot has as a foreign one holds the unit that owns it. The stub does
// not have the file.
func TestSpilledUnitHeldByFile(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		s := e.segment(3)
		e.add(s)
		e.swap(catalog.SegmentChange{Drop: []int64{s.ID}})
		e.spill(s.ID)
		snap := e.snapshot(&manifest.Refs{Files: []uint64{manifest.FileHash("default", "data/"+s.Files[1].Path)}})
		a := e.reclaim(e.replicas[0], Ask{Segment: s.ID})[0]
		if a.State != Dropped || a.Holders != 1 || len(a.Snapshots) != 1 {
			t.Errorf("got %+v, want it held by snapshot %d", a, snap)
		}
		e.dropSnapshot(snap)
		if a := e.reclaim(e.replicas[0], Ask{Segment: s.ID})[0]; a.State != Granted {
			t.Errorf("got %+v, want a grant", a)
		}
	})
}

// A small record is not spilled, and a missing unit is no error.
func TestNotSpilled(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		small := e.segment(0)
		small.Rows, small.EngineData = 0, bytes.Repeat([]byte{1}, 150)
		e.add(small)
		e.swap(catalog.SegmentChange{Drop: []int64{small.ID}})
		n, err := r.Spill(t.Context(), e.col.ID, []int64{small.ID, e.id()}, nil)
		if n != 0 || err != nil || len(e.spilled()) > 0 || e.stub(keys.Unit(e.col.ID, small.ID)) != nil {
			t.Errorf("spilled %d, err = %v, objects %v", n, err, e.spilled())
		}
		unit, key := e.dropped()
		r.o.SnapshotStore = "none"
		n, err = r.Spill(t.Context(), e.col.ID, []int64{unit}, nil)
		if n != 0 || !errors.Is(err, errNoStore) || e.stub(key) != nil {
			t.Errorf("without a store: spilled %d, err = %v", n, err)
		}
		r.o.SnapshotStore = "default"
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if n, err = r.Spill(ctx, e.col.ID, []int64{unit}, nil); n != 0 || !errors.Is(err, context.Canceled) {
			t.Errorf("after the end: spilled %d, err = %v", n, err)
		}
	})
}

// An error of one unit does not hold up the others, and the error joins only a few.
func TestSpillErrors(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		var units []int64
		for range 12 {
			unit, _ := e.dropped()
			units = append(units, unit)
		}
		bad := fmt.Sprintf("/%d", units[3])
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpPut && strings.HasSuffix(c.Keys[0], bad) {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		n, err := r.Spill(t.Context(), e.col.ID, units, nil)
		want := fmt.Sprintf("spill unit %d of collection %d: ", units[3], e.col.ID)
		if n != 11 || !errors.Is(err, object.ErrUnavailable) || !strings.Contains(err.Error(), want) {
			t.Errorf("spilled %d, err = %v", n, err)
		}
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGet {
				return meta.Before
			}
			return meta.NoFault
		})
		n, err = r.Spill(t.Context(), e.col.ID, units, nil)
		r.kv.Hook(nil)
		if n != 0 || !errors.Is(err, meta.ErrUnavailable) || strings.Count(err.Error(), "spill unit") != object.MaxJoined ||
			!strings.HasSuffix(err.Error(), "and 4 errors more") {
			t.Errorf("spilled %d, err = %v", n, err)
		}
	})
}

// faultAt is a fault of the nth call of a spill or a decision.
type faultAt struct {
	n    int
	kv   meta.Fault
	op   object.Op
	obj  object.Fault
	name string
}

// faults returns the faults of each of the first calls.
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

// plan sets the fault up. The returned function ends it, and returns whether it fired.
func (f faultAt) plan(r *replica) (end func() bool) {
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

// After any fault of a spill the unit is complete, and a repeat spills it.
func TestSpillFaults(t *testing.T) {
	fired := 0
	for _, f := range faults(object.OpPut) {
		t.Run(f.name, func(t *testing.T) {
			runEnv(t, 1, func(t *testing.T, e *env) {
				r := e.replicas[0]
				unit, key := e.dropped()
				full, _ := e.read(key)
				end := f.plan(r)
				n, err := r.Spill(t.Context(), e.col.ID, []int64{unit}, nil)
				happened := end()
				if happened {
					fired++
				}
				if (err != nil) != happened || happened && n != 0 || !happened && n != 1 {
					t.Errorf("spilled %d, err = %v, fault %v", n, err, happened)
				}
				kv, _ := e.read(key)
				u, err := r.cat.ReadUnit(t.Context(), e.col.ID, kv)
				if err != nil || len(u.Segment.Files) != 3 || u.Revision != full.ModRevision {
					t.Errorf("got %+v, err = %v", u, err)
				}
				_, err = r.Spill(t.Context(), e.col.ID, []int64{unit}, nil)
				if err != nil || e.stub(key) == nil {
					t.Fatalf("a repeat did not spill it, err = %v", err)
				}
				if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Fatalf("got %+v", a)
				}
				if e.wantTombstone(unit, full.Value); len(e.spilled()) > 0 {
					t.Errorf("left %v", e.spilled())
				}
			})
		})
	}
	if fired != 6 {
		t.Errorf("%d faults, want two of each call", fired)
	}
}

// After any fault of the grant of a spilled unit it is granted with its full record, or not
// granted.
func TestGrantSpilledFaults(t *testing.T) {
	fired := 0
	for _, f := range faults(object.OpGet, object.OpDelete) {
		t.Run(f.name, func(t *testing.T) {
			runEnv(t, 1, func(t *testing.T, e *env) {
				r := e.replicas[0]
				unit, key := e.dropped()
				full, _ := e.read(key)
				e.spill(unit)
				virtual.Wait()
				end := f.plan(r)
				_, err := r.Reclaim(t.Context(), e.ref, []Ask{{Segment: unit}}, ByCaller, "tester")
				happened := end()
				if happened {
					fired++
				}
				if err != nil && !happened {
					t.Errorf("without a fault: %v", err)
				}
				if _, found := e.read(key); found && (e.stub(key) == nil || len(e.spilled()) != 1) {
					t.Errorf("neither granted nor spilled; objects %v", e.spilled())
				}
				if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Fatalf("got %+v", a)
				}
				e.wantTombstone(unit, full.Value)
				if got := e.spilled(); len(got) > 0 && f.op != object.OpDelete && f.kv != meta.After {
					t.Errorf("left %v", got)
				}
			})
		})
	}
	if fired < 10 {
		t.Errorf("%d faults", fired)
	}
}

// A unit with a missing or altered object stays, and the error names the object. Others
// are granted.
func TestSpilledObjectUnreadable(t *testing.T) {
	for name, harm := range map[string]func(e *env, key string, data []byte) error{
		"gone": func(e *env, key string, _ []byte) error { return e.objects.Delete(e.t.Context(), key) },
		"altered": func(e *env, key string, data []byte) error {
			data[len(data)/2] ^= 1
			_, err := e.objects.Put(e.t.Context(), key, data)
			return err
		},
		"longer": func(e *env, key string, data []byte) error {
			_, err := e.objects.Put(e.t.Context(), key, append(data, 0))
			return err
		},
		"empty": func(e *env, key string, _ []byte) error {
			_, err := e.objects.Put(e.t.Context(), key, nil)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			runEnv(t, 1, func(t *testing.T, e *env) {
				r := e.replicas[0]
				s := e.segment(3)
				s.Files[0].Path = fmt.Sprintf("any/%d/f", s.ID)
				e.add(s)
				e.swap(catalog.SegmentChange{Drop: []int64{s.ID}})
				unit, key := s.ID, keys.Unit(e.col.ID, s.ID)
				good, _ := e.dropped()
				full, _ := e.read(key)
				e.spill(unit, good)
				stub, _ := e.read(key)
				held := catalog.SpillKey(e.col.ID, unit)
				e.must(harm(e, held, slices.Clone(full.Value)))
				refused := func(call string, err error) {
					if !errors.Is(err, record.ErrUnreadable) || !strings.Contains(err.Error(), held) ||
						!strings.Contains(err.Error(), `"default"`) {
						t.Errorf("%s: err = %v, want it to name %s", call, err, held)
					}
				}
				_, err := r.Reclaim(t.Context(), e.ref, []Ask{{Segment: unit}}, BySnapshotd, "x")
				refused("reclaim", err)
				_, err = r.Check(t.Context(), e.ref, []Ask{{Segment: unit}})
				refused("check", err)
				_, _, err = r.cat.FindOwner(t.Context(), e.col.ID, catalog.FilePath{Path: s.Files[0].Path}, 0)
				refused("find the owner of a file", err)
				other := e.segment(1)
				other.Files[0].Path = s.Files[0].Path
				_, _, err = r.cat.AddSegments(t.Context(), e.col.ID, []segment.Segment{other})
				refused("register a file", err)
				if kv, _ := e.read(key); !cmp.Equal(kv, stub) {
					t.Errorf("the stub was %v, now it is %v", stub, kv)
				}
				if _, found := e.read(keys.Tombstone(e.col.ID, unit)); found {
					t.Error("it has a tombstone")
				}
				// While a snapshot holds it, no call reads its object.
				snap := e.snapshot(&manifest.Refs{Segments: []int64{unit}})
				if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Dropped || a.Holders != 1 {
					t.Errorf("got %+v, want it held", a)
				}
				e.dropSnapshot(snap)
				if a := e.reclaim(r, Ask{Segment: good})[0]; a.State != Granted {
					t.Errorf("another unit: got %+v, want a grant", a)
				}
				_, err = e.objects.Put(t.Context(), held, full.Value)
				e.must(err)
				if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Errorf("restored: got %+v, want a grant", a)
				}
				e.wantTombstone(unit, full.Value)
			})
		})
	}
}

// For a catalog that cannot read objects a spilled unit is an error, never one without
// files.
func TestSpilledUnitWithoutReader(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		unit, key := e.dropped()
		e.spill(unit)
		kv, _ := e.read(key)
		blind := catalog.New(catalog.Options{KV: e.kv, Now: time.Now, Rand: rand.Reader})
		if _, err := blind.ReadUnit(t.Context(), e.col.ID, kv); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("err = %v", err)
		}
		elsewhere := catalog.New(catalog.Options{
			KV: e.kv, Now: time.Now, Rand: rand.Reader, ReadSpilled: catalog.ReadSpilled(nil),
		})
		if _, err := elsewhere.ReadUnit(t.Context(), e.col.ID, kv); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("err = %v", err)
		}
		if _, err := catalog.DecodeUnit(e.col.ID, kv); !errors.Is(err, catalog.ErrSpilled) {
			t.Errorf("err = %v", err)
		}
	})
}

// A change between the steps of a spill decides whether its stub is written.
func TestSpillComparesPreconditions(t *testing.T) {
	for name, c := range map[string]struct {
		between func(e *env, unit int64)
		spilled bool // at the end
		granted bool
	}{
		"another leads":      {between: func(e *env, _ int64) { e.put(keys.Leader, []byte("another")) }},
		"spilled by another": {between: func(e *env, unit int64) { e.spillBy(1, unit) }, spilled: true},
		"granted": {
			between: func(e *env, unit int64) { e.reclaim(e.replicas[1], Ask{Segment: unit}) }, granted: true,
		},
		"spilled and granted": {
			between: func(e *env, unit int64) {
				e.spillBy(1, unit)
				e.reclaim(e.replicas[1], Ask{Segment: unit})
			}, granted: true,
		},
	} {
		t.Run(name, func(t *testing.T) {
			runEnv(t, 2, func(t *testing.T, e *env) {
				r := e.replicas[0]
				unit, key := e.dropped()
				full, _ := e.read(key)
				e.put(keys.Leader, []byte("a"))
				leader, _ := e.read(keys.Leader)
				fence := meta.Unchanged(keys.Leader, leader.ModRevision)
				r.store.Plan(func(call object.Call) object.Fault {
					if call.Op == object.OpPut { // after it has read the unit
						c.between(e, unit)
					}
					return object.FaultNone
				})
				n, err := r.Spill(t.Context(), e.col.ID, []int64{unit}, []meta.Cond{fence})
				if n != 0 || err != nil {
					t.Errorf("spilled %d, err = %v", n, err)
				}
				r.store.Plan(nil)
				if c.granted {
					e.wantTombstone(unit, full.Value)
					if got := e.spilled(); !slices.Equal(got, []string{catalog.SpillKey(e.col.ID, unit)}) {
						t.Errorf("the late object is %v", got)
					}
					return
				}
				if (e.stub(key) != nil) != c.spilled {
					t.Errorf("stub %v", e.stub(key))
				}
				if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted {
					t.Errorf("got %+v, want a grant", a)
				}
				e.wantTombstone(unit, full.Value)
			})
		})
	}
}

func (e *env) spillBy(replica int, unit int64) {
	e.t.Helper()
	if n, err := e.replicas[replica].Spill(e.t.Context(), e.col.ID, []int64{unit}, nil); n != 1 || err != nil {
		e.t.Errorf("replica %d spilled %d, err = %v", replica, n, err)
	}
}

// A unit that changes during a decision is decided on again.
func TestUnitChangesDuringDecision(t *testing.T) {
	runEnv(t, 2, func(t *testing.T, e *env) {
		r, other := e.replicas[0], e.replicas[1]
		unit, key := e.dropped()
		full, _ := e.read(key)
		virtual.Wait()
		n := 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn {
				if n++; n == 2 { // the grant
					e.spillBy(1, unit)
				}
			}
			return meta.NoFault
		})
		if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted || a.Tombstone.Caller != "tester" {
			t.Errorf("got %+v, want a grant", a)
		}
		r.kv.Hook(nil)
		if e.wantTombstone(unit, full.Value); len(e.spilled()) > 0 {
			t.Errorf("left %v", e.spilled())
		}

		unit, key = e.dropped()
		full, _ = e.read(key)
		e.spill(unit)
		virtual.Wait()
		grant := func(c object.Call) object.Fault {
			if c.Op == object.OpGet && c.NOp == 0 {
				answers, err := other.Reclaim(t.Context(), e.ref, []Ask{{Segment: unit}}, ByCaller, "other")
				if err != nil || answers[0].State != Granted {
					t.Errorf("got %+v, err = %v", answers, err)
				}
			}
			return object.FaultNone
		}
		r.store.Plan(grant)
		if a := e.reclaim(r, Ask{Segment: unit})[0]; a.State != Granted || a.Tombstone.Caller != "other" {
			t.Errorf("got %+v, want the grant of the other", a)
		}
		e.wantTombstone(unit, full.Value)

		unit, _ = e.dropped()
		path := fmt.Sprintf("%d/0/%d/%s/100/1", e.col.ID, unit, segment.KindInsert)
		e.spill(unit)
		r.store.Plan(grant)
		owner, found, err := r.cat.FindOwner(t.Context(), e.col.ID, catalog.FilePath{Path: path}, 0)
		if err != nil || !found || owner.Unit != unit {
			t.Errorf("got %+v, %v, err = %v; want unit %d, from its tombstone", owner, found, err, unit)
		}
	})
}

// A create holds a unit if it began before the drop, at any time of a spill.
func TestSpillKeepsDropRevision(t *testing.T) {
	for name, c := range map[string]struct {
		course string // in order: b begin, d drop, p spill
		holds  bool
	}{
		"before the drop, spilled":            {"bdp", true},
		"before the drop":                     {"bd", true},
		"after the drop, before the spill":    {"dbp", false},
		"after the spill":                     {"dpb", false},
		"two before, one after, then spilled": {"bbdbp", true},
		"after the drop, and after the spill": {"dbpb", false},
		"none, spilled":                       {"dp", false},
	} {
		t.Run(name, func(t *testing.T) {
			runEnv(t, 1, func(t *testing.T, e *env) {
				r := e.replicas[0]
				s := e.segment(3)
				e.add(s)
				var older []SnapshotHolder
				var drop int64
				for _, step := range c.course {
					switch step {
					case 'b':
						if id := e.begin(); drop == 0 {
							older = append(older, SnapshotHolder{ID: id})
						}
					case 'd':
						e.swap(catalog.SegmentChange{Drop: []int64{s.ID}})
						kv, _ := e.read(keys.Unit(e.col.ID, s.ID))
						drop = kv.ModRevision
					case 'p':
						e.spill(s.ID)
						kv, _ := e.read(keys.Unit(e.col.ID, s.ID))
						u, err := r.cat.ReadUnit(t.Context(), e.col.ID, kv)
						if err != nil || u.Revision != drop || kv.ModRevision == drop {
							t.Errorf("dropped at %d, revision %d, err = %v", drop, u.Revision, err)
						}
					}
				}
				a := e.reclaim(r, Ask{Segment: s.ID})[0]
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

// Spilling does not prevent the registration of segments with adjacent ids.
func TestSpillBesideAddSegments(t *testing.T) {
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		first := e.segment(1)
		_, key := e.dropped()
		last := e.segment(1)
		kv, _ := e.read(key)
		n := 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn {
				n++
				e.put(key, kv.Value) // again, as a spill does
			}
			return meta.NoFault
		})
		e.add(first, last)
		r.kv.Hook(nil)
		if n == 0 || n > 3 {
			t.Errorf("it took %d transactions", n)
		}
	})
}

// Under a snapshot that holds everything, the metadata store keeps few bytes per unit that
// compaction drops.
func TestSpilledBytes(t *testing.T) {
	const swaps, bound = 200, 300
	runEnv(t, 1, func(t *testing.T, e *env) {
		r := e.replicas[0]
		live := e.segment(10)
		e.add(live)
		var all []int64
		var largest int
		for range swaps {
			// This snapshot holds the live segment, and is never dropped.
			e.snapshot(&manifest.Refs{Segments: []int64{live.ID}})
			next := e.segment(10)
			e.swap(catalog.SegmentChange{Drop: []int64{live.ID}, Add: []segment.Segment{next}})
			all, live = append(all, live.ID), next
			if n, err := r.Spill(t.Context(), e.col.ID, all[len(all)-1:], nil); n != 1 || err != nil {
				t.Fatalf("spilled %d, err = %v", n, err)
			}
			bytes, units := 0, 0
			from, to := meta.Prefix(keys.UnitPrefix(e.col.ID))
			_, err := e.kv.Scan(t.Context(), from, to, 0, func(batch []meta.KeyValue) error {
				for _, kv := range batch {
					bytes += len(kv.Key) + len(kv.Value)
					units++
				}
				return nil
			})
			e.must(err)
			if units != len(all) || bytes >= bound*units {
				t.Fatalf("%d units take %d bytes, want less than %d each", units, bytes, bound)
			}
			largest = bytes / units
		}
		if len(e.spilled()) != swaps {
			t.Errorf("%d objects, want %d", len(e.spilled()), swaps)
		}
		t.Logf("a spilled unit takes %d bytes, its key included", largest)
		asks := make([]Ask, len(all))
		for i, id := range all {
			asks[i] = Ask{Segment: id}
		}
		for i, a := range e.reclaim(r, asks...) {
			if a.State != Dropped || a.Holders != 1 {
				t.Fatalf("unit %d: %+v, want it held", all[i], a)
			}
		}
	})
}
