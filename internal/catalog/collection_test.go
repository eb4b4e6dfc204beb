package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

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

func testCollections(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	want := spec("c")
	want.ID, want.State, want.Layout = e.col.ID, catalog.Active, catalog.LayoutNative
	ignore := cmpopts.IgnoreFields(catalog.Collection{}, "CreateTime", "Revision")
	for _, ref := range []catalog.Ref{{ID: e.col.ID}, {DB: "db", Name: "c"}} {
		got, err := e.Collection(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, ignore); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(e.col, got); diff != "" {
			t.Errorf("what Create returned (-) is not what is there (+):\n%s", diff)
		}
	}
	for _, ref := range []catalog.Ref{{ID: 1 << 60}, {DB: "db", Name: "none"}, {DB: "other", Name: "c"}} {
		if _, err := e.Collection(ctx, ref); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("%v: err = %v, want %v", ref, err, catalog.ErrCollectionNotFound)
		}
	}
	e.refused(t, "a second one", catalog.ErrCollectionExists, func() error {
		_, err := e.CreateCollection(ctx, request.Token{}, spec("c"))
		return err
	})
	other := spec("c")
	other.DB = "other"
	if _, err := e.CreateCollection(ctx, request.Token{}, other); err != nil {
		t.Errorf("the name in another database: %v", err)
	}

	given := spec("given")
	given.ID = 1 << 50
	e.refused(t, "an unallocated id", catalog.ErrIDNotAllocated, func() error {
		_, err := e.CreateCollection(ctx, request.Token{}, given)
		return err
	})
	given.ID = e.col.ID
	e.refused(t, "an id that is taken", catalog.ErrCollectionExists, func() error {
		_, err := e.CreateCollection(ctx, request.Token{}, given)
		return err
	})
	given.ID = e.ids(t, 1)[0]
	if got, err := e.CreateCollection(ctx, request.Token{}, given); err != nil || got.ID != given.ID {
		t.Errorf("a given id: %v, %v", got.ID, err)
	}

	properties, level := map[string]string{"new": "1"}, "Strong"
	changed, err := e.UpdateCollection(ctx, request.Token{}, e.ref, e.col.Revision,
		catalog.Patch{Properties: &properties, Consistency: &level})
	if err != nil {
		t.Fatal(err)
	}
	want.Properties, want.Consistency = properties, level
	if diff := cmp.Diff(want, changed, ignore); diff != "" || changed.Revision <= e.col.Revision {
		t.Errorf("updated at %d (-want +got):\n%s", changed.Revision, diff)
	}
	if got, err := e.Collection(ctx, e.ref); err != nil || !cmp.Equal(changed, got) {
		t.Errorf("got %v, %v; want %v", got, err, changed)
	}
	e.refused(t, "an old revision", catalog.ErrRevisionChanged, func() error {
		_, err := e.UpdateCollection(ctx, request.Token{}, e.ref, e.col.Revision, catalog.Patch{})
		return err
	})

	e.refused(t, "an id that was not meant", catalog.ErrCollectionMismatch, func() error {
		_, err := e.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"}, e.col.ID+1)
		return err
	})
	if id, err := e.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"},
		e.col.ID); err != nil || id != e.col.ID {
		t.Errorf("drop: %d, %v", id, err)
	}
	before := dump(t, kv)
	if id, err := e.DropCollection(ctx, request.Token{}, e.ref, 0); err != nil || id != e.col.ID {
		t.Errorf("drop again by id: %d, %v", id, err)
	}
	if id, err := e.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"}, 0); err != nil || id != 0 {
		t.Errorf("drop again by name: %d, %v", id, err)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("a drop of nothing wrote:\n%s", diff)
	}
	if got, err := e.Collection(ctx, e.ref); err != nil || got.State != catalog.Dropping || got.Name != "c" {
		t.Errorf("dropped: %v, %v", got, err)
	}
	if got, err := e.CreateCollection(ctx, request.Token{}, spec("c")); err != nil || got.ID == e.col.ID {
		t.Errorf("the name is not free: %v, %v", got.ID, err)
	}
}

func TestSpec(t *testing.T) {
	e := newEnv(t, memory.New(memory.Options{}))
	field := func(id int64, name string) catalog.Field { return catalog.Field{ID: id, Name: name} }
	for _, c := range []struct {
		field string // of the error; empty: fine
		edit  func(*catalog.Collection)
	}{
		{"", func(*catalog.Collection) {}},
		{"", func(s *catalog.Collection) { s.Name = longName(255) }},
		{"name.name", func(s *catalog.Collection) { s.Name = longName(256) }},
		{"name.name", func(s *catalog.Collection) { s.Name = "" }},
		{"name.name", func(s *catalog.Collection) { s.Name = "a/b" }},
		{"name.name", func(s *catalog.Collection) { s.Name = ".a" }},
		{"name.name", func(s *catalog.Collection) { s.Name = "a\n" }},
		{"name.db", func(s *catalog.Collection) { s.DB = "é" }},
		{"", func(s *catalog.Collection) { s.Channels = nil }},
		{"channels[2]", func(s *catalog.Collection) { s.Channels = []string{"a", "b", "a"} }},
		{"channels[1]", func(s *catalog.Collection) { s.Channels = []string{"a", ""} }},
		{"channels", func(s *catalog.Collection) { s.Channels = make([]string, catalog.MaxChannels+1) }},
		{"schema.fields[1].id", func(s *catalog.Collection) {
			s.Schema.Fields = []catalog.Field{
				field(1, "a"),
				field(1, "b"),
			}
		}},
		{"schema.fields[1].name", func(s *catalog.Collection) {
			s.Schema.Fields = []catalog.Field{
				field(1, "a"),
				field(2, "a"),
			}
		}},
		{"roots", func(s *catalog.Collection) { s.Roots = nil }},
		{"roots", func(s *catalog.Collection) { s.Roots = make([]catalog.Root, 17) }},
		{"roots[0].store", func(s *catalog.Collection) { s.Roots[0].Store = "unknown" }},
		{"roots[0].store", func(s *catalog.Collection) { s.Roots[0].Store = "" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "snapshots/" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "snapshots/1/" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "gc/" }},
		{"", func(s *catalog.Collection) { s.Roots[0].Prefix = "snapshots2/" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "a" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "/a/" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "a/../b/" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "../" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = "a//" }},
		{"roots[0].prefix", func(s *catalog.Collection) { s.Roots[0].Prefix = longName(512) + "/" }},
		{"roots[1].prefix", func(s *catalog.Collection) {
			s.Roots[1] = catalog.Root{
				Store:  "default",
				Prefix: "data/deep/",
			}
		}},
		{"roots[1].prefix", func(s *catalog.Collection) { s.Roots[1] = catalog.Root{Store: "default"} }},
		{"roots[1].prefix", func(s *catalog.Collection) { s.Roots[1] = s.Roots[0] }},
		{"", func(s *catalog.Collection) { s.Roots[1] = catalog.Root{Store: "default", Prefix: "data2/"} }},
		{"", func(s *catalog.Collection) { s.Roots[0] = catalog.Root{Store: "default", Prefix: "apart/"} }},
	} {
		s := spec("fine")
		c.edit(&s)
		if c.field == "" {
			if _, err := e.CreateCollection(t.Context(), request.Token{}, s); err != nil {
				t.Errorf("%v: %v", s, err)
			}
			if _, err := e.DropCollection(t.Context(), request.Token{}, catalog.Ref{DB: s.DB, Name: s.Name}, 0); err != nil {
				t.Fatal(err)
			}
			continue
		}
		e.refused(t, fmt.Sprint(s), catalog.ErrInvalid, func() error {
			_, err := e.CreateCollection(t.Context(), request.Token{}, s)
			var invalid *catalog.InvalidError
			if errors.As(err, &invalid) && invalid.Field != c.field {
				t.Errorf("%v: field = %q, want %q", err, invalid.Field, c.field)
			}
			return err
		})
	}
	huge := spec("huge")
	huge.Schema.Raw = make([]byte, catalog.MaxRecordBytes)
	e.refused(t, "a huge schema", catalog.ErrLimitExceeded, func() error {
		_, err := e.CreateCollection(t.Context(), request.Token{}, huge)
		return err
	})
}

func testCollectionTokens(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	made, err := e.CreateCollection(ctx, token("create"), spec("t"))
	if err != nil {
		t.Fatal(err)
	}
	level := "Strong"
	updated, err := e.UpdateCollection(ctx, token("update"), catalog.Ref{ID: made.ID}, 0,
		catalog.Patch{Consistency: &level})
	if err != nil {
		t.Fatal(err)
	}
	renamed, err := e.RenameCollection(ctx, token("rename"), catalog.Ref{ID: made.ID}, "db", "t2")
	if err != nil {
		t.Fatal(err)
	}
	part, err := e.CreatePartition(ctx, token("partition"), catalog.Ref{ID: made.ID}, catalog.Partition{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	index, err := e.CreateIndex(ctx, token("index"), catalog.Ref{ID: made.ID}, catalog.Index{Name: "i", Field: 101})
	if err != nil {
		t.Fatal(err)
	}
	if id, err := e.DropPartition(ctx, token("drop partition"), catalog.Ref{ID: made.ID},
		"p"); err != nil || id != part.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := e.DropCollection(ctx, token("drop"), catalog.Ref{DB: "db", Name: "t2"}, 0); err != nil || id != made.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := e.DropCollection(ctx, token("drop none"), catalog.Ref{DB: "db", Name: "t2"}, 0); err != nil || id != 0 {
		t.Fatalf("%d, %v", id, err)
	}
	if _, err := e.CreateCollection(ctx, request.Token{}, spec("t2")); err != nil {
		t.Fatal(err)
	}
	before := dump(t, kv)
	for _, c := range []*catalog.Catalog{e.Catalog, open(kv)} {
		for name, again := range map[string]func() (any, error){
			"create": func() (any, error) { return c.CreateCollection(ctx, token("create"), spec("t")) },
			"update": func() (any, error) {
				return c.UpdateCollection(ctx, token("update"), catalog.Ref{ID: made.ID}, 0, catalog.Patch{Consistency: &level})
			},
			"rename": func() (any, error) {
				return c.RenameCollection(ctx, token("rename"), catalog.Ref{ID: made.ID}, "db", "t2")
			},
			"partition": func() (any, error) {
				return c.CreatePartition(ctx, token("partition"), catalog.Ref{ID: made.ID}, catalog.Partition{Name: "p"})
			},
			"index": func() (any, error) {
				return c.CreateIndex(ctx, token("index"), catalog.Ref{ID: made.ID}, catalog.Index{Name: "i", Field: 101})
			},
			"drop partition": func() (any, error) {
				return c.DropPartition(ctx, token("drop partition"), catalog.Ref{ID: made.ID}, "p")
			},
			"drop": func() (any, error) { return c.DropCollection(ctx, token("drop"), catalog.Ref{DB: "db", Name: "t2"}, 0) },
			"drop none": func() (any, error) {
				return c.DropCollection(ctx, token("drop none"), catalog.Ref{DB: "db", Name: "t2"}, 0)
			},
		} {
			want := map[string]any{
				"create": made, "update": updated, "rename": renamed, "partition": part, "index": index,
				"drop partition": part.ID, "drop": made.ID, "drop none": int64(0),
			}[name]
			got, err := again()
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-first +repeat):\n%s", name, diff)
			}
		}
	}
	reused := token("create")
	reused.Hash = []byte("another")
	if _, err := e.CreateCollection(ctx, reused, spec("another")); !errors.Is(err, request.ErrReused) {
		t.Errorf("err = %v, want %v", err, request.ErrReused)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("repeats wrote (-before +after):\n%s", diff)
	}

	// A large record is not kept with the token; a repeat reads what there is.
	large := spec("large")
	large.Schema.Raw = make([]byte, 700<<10)
	attributes := map[string]string{"x": strings.Repeat("x", 500<<10)}
	first, err := e.CreateCollection(ctx, token("large"), large)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := e.CreateCollection(ctx, token("large"), large); err != nil || !cmp.Equal(first, again) {
		t.Errorf("large, again: %v", err)
	}
	ref := catalog.Ref{ID: first.ID}
	big, err := e.CreatePartition(ctx, token("big"), ref, catalog.Partition{Name: "big", Attributes: attributes})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := e.CreatePartition(ctx, token("big"), ref,
		catalog.Partition{Name: "big", Attributes: attributes}); err != nil || !cmp.Equal(big, again) {
		t.Errorf("big, again: %v", err)
	}
	if _, err := e.DropPartition(ctx, token("drop big"), ref, "big"); err != nil {
		t.Errorf("drop a big partition of a large collection: %v", err)
	}
	attributes["x"] += strings.Repeat("x", 20<<10)
	if _, err := e.CreatePartition(ctx, request.Token{}, ref,
		catalog.Partition{Name: "bigger", Attributes: attributes}); !errors.Is(err, catalog.ErrLimitExceeded) {
		t.Errorf("err = %v, want %v", err, catalog.ErrLimitExceeded)
	}
}

func testCollectionRace(t *testing.T, kv meta.KV) {
	e := newEnv(t, kv)
	var won atomic.Int64
	var wg sync.WaitGroup
	for range 64 {
		c := open(kv)
		wg.Go(func() {
			_, err := c.CreateCollection(t.Context(), request.Token{}, spec("raced"))
			switch {
			case err == nil:
				won.Add(1)
			case !errors.Is(err, catalog.ErrCollectionExists) && !errors.Is(err, meta.ErrConflict):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d made it, want 1", won.Load())
	}
	// Under one token all are one request, and have one result.
	results := make([]catalog.Collection, 16)
	for i := range results {
		c := open(kv)
		wg.Go(func() {
			var err error
			if results[i], err = c.CreateCollection(t.Context(), token("raced"), spec("once")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, got := range results[1:] {
		if diff := cmp.Diff(results[0], got); diff != "" {
			t.Errorf("two results of one request:\n%s", diff)
		}
	}
	list, _, err := e.ListCollections(t.Context(), catalog.ListFilter{}, 0, 100)
	if err != nil || len(list) != 3 {
		t.Errorf("%d collections, %v; want 3", len(list), err)
	}
}

func testListCollections(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	c := open(kv)
	var all, dropped []int64
	for i := range 7 {
		s := spec(fmt.Sprintf("c%d", i))
		s.DB = []string{"even", "odd"}[i%2]
		col, err := c.CreateCollection(ctx, request.Token{}, s)
		if err != nil {
			t.Fatal(err)
		}
		if i == 3 {
			if _, err := c.DropCollection(ctx, request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
				t.Fatal(err)
			}
			dropped = append(dropped, col.ID)
			continue
		}
		all = append(all, col.ID)
	}
	for _, tc := range []struct {
		filter catalog.ListFilter
		want   []int64
	}{
		{catalog.ListFilter{}, all},
		{catalog.ListFilter{DB: "odd"}, []int64{all[1], all[4]}},
		{catalog.ListFilter{DB: "none"}, nil},
		{catalog.ListFilter{States: []catalog.State{catalog.Dropping}}, dropped},
		{catalog.ListFilter{States: []catalog.State{catalog.Dropping}, DB: "even"}, nil},
	} {
		for limit := 1; limit <= 8; limit++ {
			var got []int64
			after, more := int64(0), true
			for more {
				var page []catalog.Collection
				var err error
				if page, more, err = c.ListCollections(ctx, tc.filter, after, limit); err != nil {
					t.Fatal(err)
				}
				if len(page) > limit || more && len(page) != limit {
					t.Fatalf("a page of %d, limit %d, more %v", len(page), limit, more)
				}
				for i := range page {
					got = append(got, page[i].ID)
					after = page[i].ID
				}
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("%v by %d: got %v, want %v", tc.filter, limit, got, tc.want)
			}
		}
	}
}

func testRename(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	if _, err := e.CreateCollection(ctx, request.Token{}, spec("taken")); err != nil {
		t.Fatal(err)
	}
	e.refused(t, "a name that is taken", catalog.ErrCollectionExists, func() error {
		_, err := e.RenameCollection(ctx, request.Token{}, e.ref, "db", "taken")
		return err
	})
	e.refused(t, "no name", catalog.ErrInvalid, func() error {
		_, err := e.RenameCollection(ctx, request.Token{}, e.ref, "db", "a b")
		return err
	})
	for _, to := range []string{"c", "d", "d"} {
		if got, err := e.RenameCollection(ctx, request.Token{}, e.ref, "other",
			to); err != nil || got.Name != to || got.DB != "other" {
			t.Fatalf("renamed to %s: %v, %v", to, got, err)
		}
		if id, err := e.Resolve(ctx, catalog.Ref{DB: "other", Name: to}); err != nil || id != e.col.ID {
			t.Errorf("resolve %s: %d, %v", to, id, err)
		}
	}
	for _, old := range []catalog.Ref{{DB: "db", Name: "c"}, {DB: "other", Name: "c"}} {
		if _, err := e.Resolve(ctx, old); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("resolve %v: %v", old, err)
		}
	}
	// A name moves to another collection while a call resolves it: what is dropped is what
	// has the name.
	var second catalog.Collection
	hooked := &afterResolve{KV: kv, name: keys.CollectionName("other", "d")}
	hooked.do = func() {
		if _, err := e.RenameCollection(ctx, request.Token{}, e.ref, "other", "e"); err != nil {
			t.Error(err)
		}
		s := spec("d")
		s.DB = "other"
		var err error
		if second, err = e.CreateCollection(ctx, request.Token{}, s); err != nil {
			t.Error(err)
		}
	}
	if id, err := open(hooked).DropCollection(ctx, request.Token{}, catalog.Ref{DB: "other", Name: "d"},
		0); err != nil || id != second.ID {
		t.Errorf("dropped %d, %v; want %d", id, err, second.ID)
	}
	if got, err := e.Collection(ctx, e.ref); err != nil || got.State != catalog.Active {
		t.Errorf("the renamed one is %v, %v", got.State, err)
	}
}

// afterResolve does something once, after a key was read.
type afterResolve struct {
	meta.KV
	name string
	do   func()
	once sync.Once
}

func (a *afterResolve) Get(ctx context.Context, key string) (meta.KeyValue, bool, int64, error) {
	kv, found, revision, err := a.KV.Get(ctx, key)
	if key == a.name {
		a.once.Do(a.do)
	}
	return kv, found, revision, err
}

// partsOf reads the partitions or indexes of a collection one by one.
func partsOf[T any](
	ctx context.Context, collection int64, read func(ctx context.Context, collection, after int64, fn func(T) bool) (bool,
		error), id func(T) int64,
) (list []T, err error) {
	after := int64(0)
	for more := true; more; {
		n := 0
		more, err = read(ctx, collection, after, func(part T) bool {
			if n++; n > 1 {
				return false
			}
			list, after = append(list, part), id(part)
			return true
		})
		if err != nil {
			return nil, err
		}
	}
	return list, nil
}

func testPartitions(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	want := []catalog.Partition{}
	for _, name := range []string{"a", "b"} {
		p, err := e.CreatePartition(ctx, request.Token{}, e.ref,
			catalog.Partition{Name: name, Attributes: map[string]string{"k": name}})
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, p)
	}
	if got, err := partsOf(ctx, e.col.ID, e.Partitions,
		func(p catalog.Partition) int64 { return p.ID }); err != nil || !cmp.Equal(want, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(want, got))
	}
	create := func(p catalog.Partition) func() error {
		return func() error {
			_, err := e.CreatePartition(ctx, request.Token{}, e.ref, p)
			return err
		}
	}
	e.refused(t, "a name again", catalog.ErrPartitionExists, create(catalog.Partition{Name: "a"}))
	e.refused(t, "an id again", catalog.ErrPartitionExists, create(catalog.Partition{Name: "c", ID: want[0].ID}))
	e.refused(t, "an unallocated id", catalog.ErrIDNotAllocated, create(catalog.Partition{Name: "c", ID: 1 << 50}))
	e.refused(t, "a negative id", catalog.ErrInvalid, create(catalog.Partition{Name: "c", ID: -1}))
	e.refused(t, "no name", catalog.ErrInvalid, create(catalog.Partition{Name: "c/d"}))

	ids := e.ids(t, 3)
	s := e.makeSegment(ids[0], 2)
	s.Partition = want[0].ID
	if _, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s}); err != nil {
		t.Fatal(err)
	}
	if id, err := e.DropPartition(ctx, request.Token{}, e.ref, "a"); err != nil || id != want[0].ID {
		t.Fatalf("%d, %v", id, err)
	}
	before := dump(t, kv)
	if id, err := e.DropPartition(ctx, request.Token{}, e.ref, "a"); err != nil || id != 0 {
		t.Errorf("drop again: %d, %v", id, err)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("wrote:\n%s", diff)
	}
	want[0].State = catalog.Dropping
	if got, err := partsOf(ctx, e.col.ID, e.Partitions,
		func(p catalog.Partition) int64 { return p.ID }); err != nil || !cmp.Equal(want, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(want, got))
	}
	late := e.makeSegment(ids[1], 1)
	late.Partition = want[0].ID
	e.refused(t, "a segment of a dropped partition", catalog.ErrPartitionNotFound, func() error {
		_, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{late})
		return err
	})
	e.refused(t, "an update in a dropped partition", catalog.ErrPartitionNotFound, func() error {
		return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, Rows: new(int64)}}})
	})
	if err := e.change(ctx, catalog.SegmentChange{Drop: []int64{s.ID}}); err != nil {
		t.Errorf("drop a segment of a dropped partition: %v", err)
	}
	if p, err := e.CreatePartition(ctx, request.Token{}, e.ref,
		catalog.Partition{Name: "a"}); err != nil || p.ID == want[0].ID {
		t.Errorf("the name is not free: %v, %v", p, err)
	}
}

// The partitions and indexes of a collection, which are read together, are bounded
// together, but for small ones.
func testChildrenBytes(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	attributes := func(bytes int) map[string]string { return map[string]string{"k": strings.Repeat("v", bytes)} }
	const each = 500 << 10
	made := 0
	for ; ; made++ {
		var err error
		if name := fmt.Sprint("p", made); made%2 == 0 {
			_, err = e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: name, Attributes: attributes(each)})
		} else {
			_, err = e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: name, Attributes: attributes(each)})
		}
		if errors.Is(err, catalog.ErrLimitExceeded) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if made != (16<<20)/each {
		t.Errorf("%d of %d bytes", made, each)
	}
	e.refused(t, "a large index", catalog.ErrLimitExceeded, func() error {
		_, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "large", Attributes: attributes(each)})
		return err
	})
	if _, err := e.CreatePartition(ctx, request.Token{}, e.ref,
		catalog.Partition{Name: "small", Attributes: attributes(1 << 10)}); err != nil {
		t.Errorf("a small one: %v", err)
	}
}

func testIndexes(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	made, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{
		Name: "i", Field: 101, TypeParams: map[string]string{"dim": "8"}, IndexParams: map[string]string{"M": "16"},
		Attributes: map[string]string{"a": "b"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := partsOf(ctx, e.col.ID, e.Indexes, func(x catalog.Index) int64 { return x.ID }); err != nil ||
		!cmp.Equal([]catalog.Index{made}, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff([]catalog.Index{made}, got))
	}
	e.refused(t, "a name again", catalog.ErrIndexExists, func() error {
		_, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "i"})
		return err
	})
	e.refused(t, "an id again", catalog.ErrIndexExists, func() error {
		_, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "j", ID: made.ID})
		return err
	})
	ids := e.ids(t, 4)
	s := e.makeSegment(ids[0], 2)
	s.Builds = []segment.Build{{ID: ids[1], Index: made.ID, Files: []segment.File{{Kind: segment.KindIndex, Path: "i/0"}}}}
	if _, _, err := e.AddSegments(ctx, e.col.ID, []segment.Segment{s}); err != nil {
		t.Fatal(err)
	}
	if id, err := e.DropIndex(ctx, request.Token{}, e.ref, "i"); err != nil || id != made.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := e.DropIndex(ctx, request.Token{}, e.ref, "i"); err != nil || id != 0 {
		t.Errorf("drop again: %d, %v", id, err)
	}
	e.refused(t, "a build of a dropped index", catalog.ErrIndexNotFound, func() error {
		return e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
			Segment:   s.ID,
			AddBuilds: []segment.Build{{ID: ids[2], Index: made.ID}},
		}}})
	})
	// What the segment has already does not keep it from changing.
	rows := int64(7)
	if err := e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, Rows: &rows}}}); err != nil {
		t.Errorf("update a segment with a build of a dropped index: %v", err)
	}
	if err := e.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
		Segment:      s.ID,
		RemoveBuilds: []int64{ids[1]},
	}}}); err != nil {
		t.Errorf("remove a build of a dropped index: %v", err)
	}
	if got := unitIDs(e.units(t)); !slices.Equal(got, []int64{ids[1]}) {
		t.Errorf("units %v, want %v", got, ids[1])
	}
}

func TestPartitionLimit(t *testing.T) {
	ctx := t.Context()
	e := newEnv(t, memory.New(memory.Options{}))
	for i := range catalog.MaxPartitions {
		if _, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := e.DropPartition(ctx, request.Token{}, e.ref, "0"); err != nil { // still counts
		t.Fatal(err)
	}
	e.refused(t, "one partition too many", catalog.ErrLimitExceeded, func() error {
		_, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "more"})
		return err
	})
	e.refused(t, "one index too many", catalog.ErrLimitExceeded, func() error {
		_, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "more"})
		return err
	})
}

// beforeTxn does something once, before the first transaction that writes a
// segment.
type beforeTxn struct {
	meta.KV
	do   func()
	once sync.Once
}

func (b *beforeTxn) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpPut && (strings.HasPrefix(op.From, "/catalog/segment/") || strings.HasPrefix(op.From,
			"/catalog/unit/"))
	}) {
		b.once.Do(b.do)
	}
	return b.KV.Txn(ctx, t)
}

// No segment joins a partition, and no build an index, that is dropped after
// the segment was checked and before it is written.
func testPartitionDropRace(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	for _, gone := range []bool{false, true} {
		p, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "p"})
		if err != nil {
			t.Fatal(err)
		}
		x, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "i"})
		if err != nil {
			t.Fatal(err)
		}
		drop := func(key string, drop func(context.Context, request.Token, catalog.Ref, string) (int64, error),
			name string,
		) func() {
			return func() {
				if _, err := drop(ctx, request.Token{}, e.ref, name); err != nil {
					t.Error(err)
				}
				if gone { // cleaned up at once, for nothing is in it
					if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
						t.Error(err)
					}
				}
			}
		}
		ids := e.ids(t, 5)
		e.add(t, ids[0])
		inPartition := e.makeSegment(ids[1], 1)
		inPartition.Partition = p.ID
		hooked := open(&beforeTxn{KV: kv, do: drop(keys.Partition(e.col.ID, p.ID), e.DropPartition, "p")})
		if _, _, err := hooked.AddSegments(ctx, e.col.ID, []segment.Segment{inPartition}); !errors.Is(err,
			catalog.ErrPartitionNotFound) {
			t.Errorf("gone = %v: add to a partition that is dropped meanwhile: %v", gone, err)
		}
		hooked = open(&beforeTxn{KV: kv, do: drop(keys.Index(e.col.ID, x.ID), e.DropIndex, "i")})
		if _, err := hooked.Change(ctx, request.Token{}, e.ref, catalog.SegmentChange{Update: []catalog.Update{
			{Segment: ids[0], AddBuilds: []segment.Build{{ID: ids[2], Index: x.ID}}},
		}}); !errors.Is(err, catalog.ErrIndexNotFound) {
			t.Errorf("gone = %v: build of an index that is dropped meanwhile: %v", gone, err)
		}
	}
}

// setState writes a collection's state past the catalog.
func (e *env) setState(t testing.TB, state catalog.State) {
	t.Helper()
	kv, found, _, err := e.kv.Get(t.Context(), keys.Collection(e.col.ID))
	if err != nil || !found {
		t.Fatal(found, err)
	}
	rec := &storagev1.Collection{}
	if err := record.Decode(kv, rec); err != nil {
		t.Fatal(err)
	}
	rec.State = uint32(state)
	if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(kv.Key, record.Encode(rec))}}); err != nil {
		t.Fatal(err)
	}
}

func testNotActive(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	e := newEnv(t, kv)
	ids := e.ids(t, 4)
	e.add(t, ids[0], ids[1])
	if _, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	if _, err := e.CreateIndex(ctx, request.Token{}, e.ref, catalog.Index{Name: "i"}); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(tok request.Token) error{
		"UpdateCollection": func(tok request.Token) error {
			_, err := e.UpdateCollection(ctx, tok, e.ref, 0, catalog.Patch{})
			return err
		},
		"RenameCollection": func(tok request.Token) error {
			_, err := e.RenameCollection(ctx, tok, e.ref, "db", "new")
			return err
		},
		"CreatePartition": func(tok request.Token) error {
			_, err := e.CreatePartition(ctx, tok, e.ref, catalog.Partition{Name: "q"})
			return err
		},
		"CreateIndex": func(tok request.Token) error {
			_, err := e.CreateIndex(ctx, tok, e.ref, catalog.Index{Name: "j"})
			return err
		},
		"DropPartition": func(tok request.Token) error {
			_, err := e.DropPartition(ctx, tok, e.ref, "p")
			return err
		},
		"DropIndex": func(tok request.Token) error {
			_, err := e.DropIndex(ctx, tok, e.ref, "i")
			return err
		},
		"AddSegments": func(request.Token) error {
			_, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[2:]))
			return err
		},
		"AddSegments again": func(request.Token) error {
			_, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[:2]))
			return err
		},
		"DropSegments": func(request.Token) error {
			_, err := e.DropSegments(ctx, e.ref, ids[:1])
			return err
		},
		"SetCheckpoints": func(request.Token) error {
			_, err := e.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{{Position: segment.Position{Timestamp: 5}}})
			return err
		},
		"Change": func(tok request.Token) error {
			_, err := e.Change(ctx, tok, e.ref, catalog.SegmentChange{Drop: ids[:1], Add: e.segments(ids[2:3])})
			return err
		},
		"Update": func(tok request.Token) error {
			_, err := e.Change(ctx, tok, e.ref, catalog.SegmentChange{Update: []catalog.Update{{
				Segment: ids[0],
				Rows:    new(int64),
			}}})
			return err
		},
	}
	for _, state := range []catalog.State{catalog.Restoring, catalog.Dropping} {
		e.setState(t, state)
		for name, call := range calls {
			e.refused(t, fmt.Sprintf("%s while %v", name, state), catalog.ErrCollectionNotActive,
				func() error { return call(request.Token{}) })
			e.refused(t, fmt.Sprintf("%s while %v, with a token", name, state), catalog.ErrCollectionNotActive,
				func() error { return call(token(name)) })
		}
		if state == catalog.Restoring {
			e.refused(t, "drop while restoring", catalog.ErrCollectionNotActive, func() error {
				_, err := e.DropCollection(ctx, request.Token{}, e.ref, 0)
				return err
			})
		}
		// A scan goes on, and so does reading of what is being dropped; what is
		// being restored is its job's alone.
		if got := e.scan(t, 0); !slices.Equal(got, ids[:2]) {
			t.Errorf("scan: %v", got)
		}
		_, _, err := e.Segment(ctx, e.ref, ids[0])
		if restoring := state == catalog.Restoring; errors.Is(err,
			catalog.ErrCollectionNotActive) != restoring || err != nil && !restoring {
			t.Errorf("a segment while %v: err = %v", state, err)
		}
	}
}

// Whatever call fails, the repeat under the same token finds or makes the same
// collection.
func TestCreateCollectionFaults(t *testing.T) {
	var ids []int64
	sweep(t, func(e *env) error {
		got, err := e.CreateCollection(t.Context(), token("x"), spec("x"))
		ids = []int64{got.ID}
		return err
	}, func(*testing.T, *env) {}, func(t *testing.T, e *env) {
		list, _, err := e.ListCollections(t.Context(), catalog.ListFilter{}, e.col.ID, 10)
		if err != nil || len(list) != 1 || list[0].ID != ids[0] {
			t.Errorf("%v, %v; want the one of id %d", list, err, ids[0])
		}
	})
}

// What was written is reported so, though nothing can be read any more.
func TestWrittenIsReported(t *testing.T) {
	ctx := t.Context()
	f := meta.NewFaulty(memory.New(memory.Options{}))
	e := newEnv(t, f)
	for name, do := range map[string]func() (catalog.Collection, error){
		"create": func() (catalog.Collection, error) { return e.CreateCollection(ctx, request.Token{}, spec("x")) },
		"update": func() (catalog.Collection, error) {
			return e.UpdateCollection(ctx, request.Token{}, e.ref, 0, catalog.Patch{})
		},
		"rename": func() (catalog.Collection, error) { return e.RenameCollection(ctx, request.Token{}, e.ref, "db", "y") },
	} {
		written := false
		f.Hook(func(c meta.Call) meta.Fault {
			if written {
				return meta.Before
			}
			written = c.Method == meta.MethodTxn
			return meta.NoFault
		})
		got, err := do()
		f.Hook(nil)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if want, err := e.Collection(ctx, catalog.Ref{ID: got.ID}); err != nil || !cmp.Equal(want, got) {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, cmp.Diff(want, got))
		}
	}
}

// A store that is full takes nothing, drops included, and nothing is half done.
func TestFullStore(t *testing.T) {
	ctx := t.Context()
	kv := memory.New(memory.Options{})
	e := newEnv(t, kv)
	ids := e.ids(t, 200)
	e.add(t, ids[:4]...)
	if _, err := e.CreatePartition(ctx, request.Token{}, e.ref, catalog.Partition{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	kv.SetFull(true)
	for name, do := range map[string]func() error{
		"create": func() error {
			_, err := e.CreateCollection(ctx, request.Token{}, spec("x"))
			return err
		},
		"create with a token": func() error {
			_, err := e.CreateCollection(ctx, token("x"), spec("x"))
			return err
		},
		"drop": func() error {
			_, err := e.DropCollection(ctx, request.Token{}, e.ref, 0)
			return err
		},
		"drop a partition": func() error {
			_, err := e.DropPartition(ctx, request.Token{}, e.ref, "p")
			return err
		},
		"add": func() error {
			_, _, err := e.AddSegments(ctx, e.col.ID, e.segments(ids[4:]))
			return err
		},
		"drop segments": func() error {
			_, err := e.DropSegments(ctx, e.ref, ids[:2])
			return err
		},
		"compact": func() error { return e.change(ctx, catalog.SegmentChange{Drop: ids[:2], Add: e.segments(ids[5:6])}) },
		"checkpoint": func() error {
			_, err := e.SetCheckpoints(ctx, e.ref, []catalog.Checkpoint{{Position: segment.Position{Timestamp: 1}}})
			return err
		},
		"ids": func() error {
			_, err := e.AllocateIDs(ctx, request.Token{}, 1)
			return err
		},
	} {
		e.refused(t, name, meta.ErrNoSpace, do)
	}
	kv.SetFull(false)
	e.add(t, ids[4:]...)
	if n, err := e.DropSegments(ctx, e.ref, ids); err != nil || n != len(ids) {
		t.Errorf("dropped %d, %v", n, err)
	}
}
