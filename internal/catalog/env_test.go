package catalog_test

import (
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

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// scenarios are the tests that every store has to pass, so that nothing is only
// proven on the twin.
var scenarios = []struct {
	name string
	run  func(*testing.T, meta.KV)
}{
	{"IDs", testIDs},
	{"Collections", testCollections},
	{"CollectionTokens", testCollectionTokens},
	{"CollectionRace", testCollectionRace},
	{"ListCollections", testListCollections},
	{"Rename", testRename},
	{"Partitions", testPartitions},
	{"ChildrenBytes", testChildrenBytes},
	{"Indexes", testIndexes},
	{"PartitionDropRace", testPartitionDropRace},
	{"NotActive", testNotActive},
	{"AddSegments", testAddSegments},
	{"AddManySegments", testAddManySegments},
	{"DropSegments", testDropSegments},
	{"Compaction", testCompaction},
	{"CompactionIsAtomic", testCompactionIsAtomic},
	{"Update", testUpdate},
	{"Builds", testBuilds},
	{"Checkpoints", testCheckpoints},
	{"ChangeRace", testChangeRace},
	{"ChangeTokens", testChangeTokens},
	{"TimeTravel", testTimeTravel},
	{"Roots", testRoots},
	{"RootRace", testRootRace},
	{"RootReturns", testRootReturns},
}

func TestMemory(t *testing.T) {
	for _, s := range scenarios {
		t.Run(s.name, func(t *testing.T) {
			t.Parallel()
			s.run(t, memory.New(memory.Options{}))
		})
	}
}

// env is a catalog on a store, with one collection c of two channels and two
// roots.
type env struct {
	*catalog.Catalog
	kv  meta.KV
	col catalog.Collection
	ref catalog.Ref
}

// open returns a catalog on kv, as one more replica would.
func open(kv meta.KV) *catalog.Catalog {
	return catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Rand: rand.Reader,
		HasStore: func(alias string) bool { return alias == "default" || alias == "other" },
		Requests: request.NewLeases(kv, time.Now, nil), AllowReserve: true,
	})
}

func spec(name string) catalog.Collection {
	return catalog.Collection{
		DB: "db", Name: name, Channels: []string{"ch0", "ch1"},
		Schema: catalog.Schema{
			Fields: []catalog.Field{
				{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true},
				{ID: 101, Name: "v", DataType: "FloatVector", TypeParams: map[string]string{"dim": "8"}},
			},
			Format: "x", Raw: []byte{0, 255},
		},
		Roots:       []catalog.Root{{Store: "default", Prefix: "data/"}, {Store: "other"}},
		Consistency: "Bounded", Properties: map[string]string{"a": "b"}, Attributes: map[string]string{"c": "d"},
	}
}

func newEnv(t testing.TB, kv meta.KV) *env {
	t.Helper()
	e := &env{Catalog: open(kv), kv: kv}
	col, err := e.CreateCollection(t.Context(), request.Token{}, spec("c"))
	if err != nil {
		t.Fatal(err)
	}
	e.col, e.ref = col, catalog.Ref{ID: col.ID}
	return e
}

// ids allocates n ids.
func (e *env) ids(t testing.TB, n int64) []int64 {
	t.Helper()
	got, err := e.AllocateIDs(t.Context(), request.Token{}, n)
	if err != nil {
		t.Fatal(err)
	}
	list := make([]int64, n)
	for i := range list {
		list[i] = got.First + int64(i)
	}
	return list
}

// makeSegment is a flushed segment of n files in the native layout.
func (e *env) makeSegment(id int64, n int) segment.Segment {
	s := segment.Segment{
		ID: id, Channel: int(id % 2), Level: 1, State: segment.Flushed, Rows: 1000, Sorted: true, StorageVersion: 2,
		Start: segment.Position{Timestamp: segment.Timestamp(id) << 30},
		DML:   segment.Position{Timestamp: segment.Timestamp(id)<<30 + 9, Opaque: []byte("o")},
	}
	for i := range n {
		f := segment.File{
			Kind: segment.KindInsert, Size: 1000 + int64(i), ETag: fmt.Sprintf("%032x", id*1000+int64(i)), Entries: 1000,
			Field: 100 + int64(i), LogID: id*100 + int64(i), MinTimestamp: s.Start.Timestamp,
			MaxTimestamp: s.Start.Timestamp + 5,
		}
		f.Path = catalog.NativePath(e.col.ID, &s, &f)
		s.Files = append(s.Files, f)
	}
	return s
}

func (e *env) segments(ids []int64) []segment.Segment {
	list := make([]segment.Segment, len(ids))
	for i, id := range ids {
		list[i] = e.makeSegment(id, 3)
	}
	return list
}

// add registers one segment per id.
func (e *env) add(t testing.TB, ids ...int64) []segment.Segment {
	t.Helper()
	list := e.segments(ids)
	if added, _, err := e.AddSegments(t.Context(), e.col.ID, list); err != nil || added != len(ids) {
		t.Fatalf("added %d, err = %v; want %d", added, err, len(ids))
	}
	return list
}

// scan returns the ids of the segments at a revision.
func (e *env) scan(t testing.TB, revision int64) []int64 {
	t.Helper()
	ids := []int64{}
	if _, err := e.ScanSegments(t.Context(), e.col.ID, revision, func(batch []segment.Segment) error {
		for i := range batch {
			ids = append(ids, batch[i].ID)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return ids
}

// units returns the dropped units of the collection, by their ids.
func (e *env) units(t testing.TB) map[int64]*storagev1.Unit {
	t.Helper()
	units := map[int64]*storagev1.Unit{}
	from, to := meta.Prefix(keys.UnitPrefix(e.col.ID))
	if _, err := e.kv.Scan(t.Context(), from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			u := &storagev1.Unit{}
			if err := record.Decode(kv, u); err != nil {
				return err
			}
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return err
			}
			units[id] = u
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return units
}

func unitIDs(units map[int64]*storagev1.Unit) []int64 {
	ids := []int64{}
	for id := range units {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// dump returns all that is in the store, values as strings for cmp is slow with
// bytes, but the allocator, whose ids may be spent on what comes to nothing.
func dump(t testing.TB, kv meta.KV) map[string]string {
	t.Helper()
	all := map[string]string{}
	from, to := keys.All()
	if _, err := kv.Scan(t.Context(), from, to, 0, func(kvs []meta.KeyValue) error {
		for _, kv := range kvs {
			if kv.Key != keys.IDs {
				all[kv.Key] = fmt.Sprintf("%d, lease %x: %s", kv.ModRevision, kv.Lease, kv.Value)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// refused asserts that do fails with want and writes nothing.
func (e *env) refused(t testing.TB, what string, want error, do func() error) {
	t.Helper()
	before := dump(t, e.kv)
	if err := do(); !errors.Is(err, want) {
		t.Errorf("%s: err = %v, want %v", what, err, want)
	}
	if diff := cmp.Diff(before, dump(t, e.kv)); diff != "" {
		t.Errorf("%s was refused and wrote (-before +after):\n%s", what, diff)
	}
}

func (e *env) change(ctx context.Context, swap catalog.SegmentChange) error {
	_, err := e.Change(ctx, request.Token{}, e.ref, swap)
	return err
}

func token(value string) request.Token {
	return request.Token{Principal: "p", Method: "m", Value: value, Hash: []byte("hash of " + value)}
}

func sameSegments(t testing.TB, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// sweep fails call 0 of do, then call 1 and so on, before and after it takes
// effect, each time on a new store, until do passes without a fault. After each
// fault do is repeated until it succeeds, and then checked.
func sweep(t *testing.T, do func(*env) error, prepare, check func(*testing.T, *env)) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n := 0; ; n++ {
			f := meta.NewFaulty(memory.New(memory.Options{}))
			e := newEnv(t, f)
			prepare(t, e)
			f.FailNth(n, fault)
			err := do(e)
			fired := f.Fired() > 0
			f.Hook(nil)
			if err != nil && (!fired || !errors.Is(err, meta.ErrUnavailable)) {
				t.Fatalf("fault %d in call %d: %v", fault, n, err)
			}
			for attempt := 0; err != nil; attempt++ {
				if err = do(e); attempt == 3 {
					t.Fatalf("fault %d in call %d: still fails: %v", fault, n, err)
				}
			}
			if check(t, e); t.Failed() {
				t.Fatalf("fault %d in call %d", fault, n)
			}
			if !fired {
				if n < 3 {
					t.Fatalf("only %d calls", n)
				}
				break
			}
		}
	}
}

func longName(n int) string { return strings.Repeat("n", n) }

func mustEncode(rec *storagev1.Segment) []byte {
	if rec.GetFormat() == 0 { // inside a unit
		rec.Format = record.Format
	}
	return record.Encode(rec)
}
