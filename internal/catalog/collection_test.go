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
	r := newEnv(t, kv)
	want := spec("c")
	want.ID, want.State, want.Layout = r.col.ID, catalog.Active, catalog.LayoutNative
	ignore := cmpopts.IgnoreFields(catalog.Collection{}, "CreateTime", "Revision")
	for _, ref := range []catalog.Ref{{ID: r.col.ID}, {DB: "db", Name: "c"}} {
		got, err := r.Collection(ctx, ref)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, ignore); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if diff := cmp.Diff(r.col, got); diff != "" {
			t.Errorf("what Create returned (-) is not what is there (+):\n%s", diff)
		}
	}
	for _, ref := range []catalog.Ref{{ID: 1 << 60}, {DB: "db", Name: "none"}, {DB: "other", Name: "c"}} {
		if _, err := r.Collection(ctx, ref); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("%v: err = %v, want %v", ref, err, catalog.ErrCollectionNotFound)
		}
	}
	r.refused(t, "a second one", catalog.ErrCollectionExists, func() error {
		_, err := r.CreateCollection(ctx, request.Token{}, spec("c"))
		return err
	})
	other := spec("c")
	other.DB = "other"
	if _, err := r.CreateCollection(ctx, request.Token{}, other); err != nil {
		t.Errorf("the name in another database: %v", err)
	}

	given := spec("given")
	given.ID = 1 << 50
	r.refused(t, "an unallocated id", catalog.ErrIDNotAllocated, func() error {
		_, err := r.CreateCollection(ctx, request.Token{}, given)
		return err
	})
	given.ID = r.col.ID
	r.refused(t, "an id that is taken", catalog.ErrCollectionExists, func() error {
		_, err := r.CreateCollection(ctx, request.Token{}, given)
		return err
	})
	given.ID = r.ids(t, 1)[0]
	if got, err := r.CreateCollection(ctx, request.Token{}, given); err != nil || got.ID != given.ID {
		t.Errorf("a given id: %v, %v", got.ID, err)
	}

	properties, level := map[string]string{"new": "1"}, "Strong"
	changed, err := r.UpdateCollection(ctx, request.Token{}, r.ref, r.col.Revision,
		catalog.Patch{Properties: &properties, Consistency: &level})
	if err != nil {
		t.Fatal(err)
	}
	want.Properties, want.Consistency = properties, level
	if diff := cmp.Diff(want, changed, ignore); diff != "" || changed.Revision <= r.col.Revision {
		t.Errorf("updated at %d (-want +got):\n%s", changed.Revision, diff)
	}
	if got, err := r.Collection(ctx, r.ref); err != nil || !cmp.Equal(changed, got) {
		t.Errorf("got %v, %v; want %v", got, err, changed)
	}
	r.refused(t, "an old revision", catalog.ErrRevisionChanged, func() error {
		_, err := r.UpdateCollection(ctx, request.Token{}, r.ref, r.col.Revision, catalog.Patch{})
		return err
	})

	r.refused(t, "an id that was not meant", catalog.ErrCollectionMismatch, func() error {
		_, err := r.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"}, r.col.ID+1)
		return err
	})
	if id, err := r.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"},
		r.col.ID); err != nil || id != r.col.ID {
		t.Errorf("drop: %d, %v", id, err)
	}
	before := dump(t, kv)
	if id, err := r.DropCollection(ctx, request.Token{}, r.ref, 0); err != nil || id != r.col.ID {
		t.Errorf("drop again by id: %d, %v", id, err)
	}
	if id, err := r.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "db", Name: "c"}, 0); err != nil || id != 0 {
		t.Errorf("drop again by name: %d, %v", id, err)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("a drop of nothing wrote:\n%s", diff)
	}
	if got, err := r.Collection(ctx, r.ref); err != nil || got.State != catalog.Dropping || got.Name != "c" {
		t.Errorf("dropped: %v, %v", got, err)
	}
	if got, err := r.CreateCollection(ctx, request.Token{}, spec("c")); err != nil || got.ID == r.col.ID {
		t.Errorf("the name is not free: %v, %v", got.ID, err)
	}
}

func TestSpec(t *testing.T) {
	r := newEnv(t, memory.New(memory.Options{}))
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
			if _, err := r.CreateCollection(t.Context(), request.Token{}, s); err != nil {
				t.Errorf("%v: %v", s, err)
			}
			if _, err := r.DropCollection(t.Context(), request.Token{}, catalog.Ref{DB: s.DB, Name: s.Name}, 0); err != nil {
				t.Fatal(err)
			}
			continue
		}
		r.refused(t, fmt.Sprint(s), catalog.ErrInvalid, func() error {
			_, err := r.CreateCollection(t.Context(), request.Token{}, s)
			var invalid *catalog.InvalidError
			if errors.As(err, &invalid) && invalid.Field != c.field {
				t.Errorf("%v: field = %q, want %q", err, invalid.Field, c.field)
			}
			return err
		})
	}
	huge := spec("huge")
	huge.Schema.Raw = make([]byte, catalog.MaxRecordBytes)
	r.refused(t, "a huge schema", catalog.ErrLimitExceeded, func() error {
		_, err := r.CreateCollection(t.Context(), request.Token{}, huge)
		return err
	})
}

func testCollectionTokens(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	r := newEnv(t, kv)
	made, err := r.CreateCollection(ctx, token("create"), spec("t"))
	if err != nil {
		t.Fatal(err)
	}
	level := "Strong"
	updated, err := r.UpdateCollection(ctx, token("update"), catalog.Ref{ID: made.ID}, 0,
		catalog.Patch{Consistency: &level})
	if err != nil {
		t.Fatal(err)
	}
	renamed, err := r.RenameCollection(ctx, token("rename"), catalog.Ref{ID: made.ID}, "db", "t2")
	if err != nil {
		t.Fatal(err)
	}
	part, err := r.CreatePartition(ctx, token("partition"), catalog.Ref{ID: made.ID}, catalog.Partition{Name: "p"})
	if err != nil {
		t.Fatal(err)
	}
	index, err := r.CreateIndex(ctx, token("index"), catalog.Ref{ID: made.ID}, catalog.Index{Name: "i", Field: 101})
	if err != nil {
		t.Fatal(err)
	}
	if id, err := r.DropPartition(ctx, token("drop partition"), catalog.Ref{ID: made.ID},
		"p"); err != nil || id != part.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := r.DropCollection(ctx, token("drop"), catalog.Ref{DB: "db", Name: "t2"}, 0); err != nil || id != made.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := r.DropCollection(ctx, token("drop none"), catalog.Ref{DB: "db", Name: "t2"}, 0); err != nil || id != 0 {
		t.Fatalf("%d, %v", id, err)
	}
	if _, err := r.CreateCollection(ctx, request.Token{}, spec("t2")); err != nil {
		t.Fatal(err)
	}
	before := dump(t, kv)
	for _, c := range []*catalog.Catalog{r.Catalog, open(kv)} {
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
	if _, err := r.CreateCollection(ctx, reused, spec("another")); !errors.Is(err, request.ErrReused) {
		t.Errorf("err = %v, want %v", err, request.ErrReused)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("repeats wrote (-before +after):\n%s", diff)
	}

	// A large record is not kept with the token; a repeat reads what there is.
	large := spec("large")
	large.Schema.Raw = make([]byte, 700<<10)
	attributes := map[string]string{"x": strings.Repeat("x", 500<<10)}
	first, err := r.CreateCollection(ctx, token("large"), large)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := r.CreateCollection(ctx, token("large"), large); err != nil || !cmp.Equal(first, again) {
		t.Errorf("large, again: %v", err)
	}
	ref := catalog.Ref{ID: first.ID}
	big, err := r.CreatePartition(ctx, token("big"), ref, catalog.Partition{Name: "big", Attributes: attributes})
	if err != nil {
		t.Fatal(err)
	}
	if again, err := r.CreatePartition(ctx, token("big"), ref,
		catalog.Partition{Name: "big", Attributes: attributes}); err != nil || !cmp.Equal(big, again) {
		t.Errorf("big, again: %v", err)
	}
	if _, err := r.DropPartition(ctx, token("drop big"), ref, "big"); err != nil {
		t.Errorf("drop a big partition of a large collection: %v", err)
	}
	attributes["x"] += strings.Repeat("x", 20<<10)
	if _, err := r.CreatePartition(ctx, request.Token{}, ref,
		catalog.Partition{Name: "bigger", Attributes: attributes}); !errors.Is(err, catalog.ErrLimitExceeded) {
		t.Errorf("err = %v, want %v", err, catalog.ErrLimitExceeded)
	}
}

func testCollectionRace(t *testing.T, kv meta.KV) {
	r := newEnv(t, kv)
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
	list, _, err := r.ListCollections(t.Context(), catalog.ListFilter{}, 0, 100)
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
	r := newEnv(t, kv)
	if _, err := r.CreateCollection(ctx, request.Token{}, spec("taken")); err != nil {
		t.Fatal(err)
	}
	r.refused(t, "a name that is taken", catalog.ErrCollectionExists, func() error {
		_, err := r.RenameCollection(ctx, request.Token{}, r.ref, "db", "taken")
		return err
	})
	r.refused(t, "no name", catalog.ErrInvalid, func() error {
		_, err := r.RenameCollection(ctx, request.Token{}, r.ref, "db", "a b")
		return err
	})
	for _, to := range []string{"c", "d", "d"} {
		if got, err := r.RenameCollection(ctx, request.Token{}, r.ref, "other",
			to); err != nil || got.Name != to || got.DB != "other" {
			t.Fatalf("renamed to %s: %v, %v", to, got, err)
		}
		if id, err := r.Resolve(ctx, catalog.Ref{DB: "other", Name: to}); err != nil || id != r.col.ID {
			t.Errorf("resolve %s: %d, %v", to, id, err)
		}
	}
	for _, old := range []catalog.Ref{{DB: "db", Name: "c"}, {DB: "other", Name: "c"}} {
		if _, err := r.Resolve(ctx, old); !errors.Is(err, catalog.ErrCollectionNotFound) {
			t.Errorf("resolve %v: %v", old, err)
		}
	}
	// A name moves to another collection while a call resolves it: what is dropped is what
	// has the name.
	var second catalog.Collection
	hooked := &afterResolve{KV: kv, name: keys.CollectionName("other", "d")}
	hooked.do = func() {
		if _, err := r.RenameCollection(ctx, request.Token{}, r.ref, "other", "e"); err != nil {
			t.Error(err)
		}
		s := spec("d")
		s.DB = "other"
		var err error
		if second, err = r.CreateCollection(ctx, request.Token{}, s); err != nil {
			t.Error(err)
		}
	}
	if id, err := open(hooked).DropCollection(ctx, request.Token{}, catalog.Ref{DB: "other", Name: "d"},
		0); err != nil || id != second.ID {
		t.Errorf("dropped %d, %v; want %d", id, err, second.ID)
	}
	if got, err := r.Collection(ctx, r.ref); err != nil || got.State != catalog.Active {
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
	r := newEnv(t, kv)
	want := []catalog.Partition{}
	for _, name := range []string{"a", "b"} {
		p, err := r.CreatePartition(ctx, request.Token{}, r.ref,
			catalog.Partition{Name: name, Attributes: map[string]string{"k": name}})
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, p)
	}
	if got, err := partsOf(ctx, r.col.ID, r.Partitions,
		func(p catalog.Partition) int64 { return p.ID }); err != nil || !cmp.Equal(want, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(want, got))
	}
	create := func(p catalog.Partition) func() error {
		return func() error {
			_, err := r.CreatePartition(ctx, request.Token{}, r.ref, p)
			return err
		}
	}
	r.refused(t, "a name again", catalog.ErrPartitionExists, create(catalog.Partition{Name: "a"}))
	r.refused(t, "an id again", catalog.ErrPartitionExists, create(catalog.Partition{Name: "c", ID: want[0].ID}))
	r.refused(t, "an unallocated id", catalog.ErrIDNotAllocated, create(catalog.Partition{Name: "c", ID: 1 << 50}))
	r.refused(t, "a negative id", catalog.ErrInvalid, create(catalog.Partition{Name: "c", ID: -1}))
	r.refused(t, "no name", catalog.ErrInvalid, create(catalog.Partition{Name: "c/d"}))

	ids := r.ids(t, 3)
	s := r.makeSegment(ids[0], 2)
	s.Partition = want[0].ID
	if _, _, err := r.AddSegments(ctx, r.col.ID, []segment.Segment{s}); err != nil {
		t.Fatal(err)
	}
	if id, err := r.DropPartition(ctx, request.Token{}, r.ref, "a"); err != nil || id != want[0].ID {
		t.Fatalf("%d, %v", id, err)
	}
	before := dump(t, kv)
	if id, err := r.DropPartition(ctx, request.Token{}, r.ref, "a"); err != nil || id != 0 {
		t.Errorf("drop again: %d, %v", id, err)
	}
	if diff := cmp.Diff(before, dump(t, kv)); diff != "" {
		t.Errorf("wrote:\n%s", diff)
	}
	want[0].State = catalog.Dropping
	if got, err := partsOf(ctx, r.col.ID, r.Partitions,
		func(p catalog.Partition) int64 { return p.ID }); err != nil || !cmp.Equal(want, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff(want, got))
	}
	late := r.makeSegment(ids[1], 1)
	late.Partition = want[0].ID
	r.refused(t, "a segment of a dropped partition", catalog.ErrPartitionNotFound, func() error {
		_, _, err := r.AddSegments(ctx, r.col.ID, []segment.Segment{late})
		return err
	})
	r.refused(t, "an update in a dropped partition", catalog.ErrPartitionNotFound, func() error {
		return r.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, Rows: new(int64)}}})
	})
	if err := r.change(ctx, catalog.SegmentChange{Drop: []int64{s.ID}}); err != nil {
		t.Errorf("drop a segment of a dropped partition: %v", err)
	}
	if p, err := r.CreatePartition(ctx, request.Token{}, r.ref,
		catalog.Partition{Name: "a"}); err != nil || p.ID == want[0].ID {
		t.Errorf("the name is not free: %v, %v", p, err)
	}
}

// The partitions and indexes of a collection, which are read together, are bounded
// together, but for small ones.
func testChildrenBytes(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	r := newEnv(t, kv)
	attributes := func(bytes int) map[string]string { return map[string]string{"k": strings.Repeat("v", bytes)} }
	const each = 500 << 10
	made := 0
	for ; ; made++ {
		var err error
		if name := fmt.Sprint("p", made); made%2 == 0 {
			_, err = r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: name, Attributes: attributes(each)})
		} else {
			_, err = r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: name, Attributes: attributes(each)})
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
	r.refused(t, "a large index", catalog.ErrLimitExceeded, func() error {
		_, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "large", Attributes: attributes(each)})
		return err
	})
	if _, err := r.CreatePartition(ctx, request.Token{}, r.ref,
		catalog.Partition{Name: "small", Attributes: attributes(1 << 10)}); err != nil {
		t.Errorf("a small one: %v", err)
	}
}

func testIndexes(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	r := newEnv(t, kv)
	made, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{
		Name: "i", Field: 101, TypeParams: map[string]string{"dim": "8"}, IndexParams: map[string]string{"M": "16"},
		Attributes: map[string]string{"a": "b"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := partsOf(ctx, r.col.ID, r.Indexes, func(x catalog.Index) int64 { return x.ID }); err != nil ||
		!cmp.Equal([]catalog.Index{made}, got) {
		t.Errorf("%v (-want +got):\n%s", err, cmp.Diff([]catalog.Index{made}, got))
	}
	r.refused(t, "a name again", catalog.ErrIndexExists, func() error {
		_, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "i"})
		return err
	})
	r.refused(t, "an id again", catalog.ErrIndexExists, func() error {
		_, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "j", ID: made.ID})
		return err
	})
	ids := r.ids(t, 4)
	s := r.makeSegment(ids[0], 2)
	s.Builds = []segment.Build{{ID: ids[1], Index: made.ID, Files: []segment.File{{Kind: segment.KindIndex, Path: "i/0"}}}}
	if _, _, err := r.AddSegments(ctx, r.col.ID, []segment.Segment{s}); err != nil {
		t.Fatal(err)
	}
	if id, err := r.DropIndex(ctx, request.Token{}, r.ref, "i"); err != nil || id != made.ID {
		t.Fatalf("%d, %v", id, err)
	}
	if id, err := r.DropIndex(ctx, request.Token{}, r.ref, "i"); err != nil || id != 0 {
		t.Errorf("drop again: %d, %v", id, err)
	}
	r.refused(t, "a build of a dropped index", catalog.ErrIndexNotFound, func() error {
		return r.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
			Segment:   s.ID,
			AddBuilds: []segment.Build{{ID: ids[2], Index: made.ID}},
		}}})
	})
	// What the segment has already does not keep it from changing.
	rows := int64(7)
	if err := r.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, Rows: &rows}}}); err != nil {
		t.Errorf("update a segment with a build of a dropped index: %v", err)
	}
	if err := r.change(ctx, catalog.SegmentChange{Update: []catalog.Update{{
		Segment:      s.ID,
		RemoveBuilds: []int64{ids[1]},
	}}}); err != nil {
		t.Errorf("remove a build of a dropped index: %v", err)
	}
	if got := unitIDs(r.units(t)); !slices.Equal(got, []int64{ids[1]}) {
		t.Errorf("units %v, want %v", got, ids[1])
	}
}

func TestPartitionLimit(t *testing.T) {
	ctx := t.Context()
	r := newEnv(t, memory.New(memory.Options{}))
	for i := range catalog.MaxPartitions {
		if _, err := r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
		if _, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: fmt.Sprint(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.DropPartition(ctx, request.Token{}, r.ref, "0"); err != nil { // still counts
		t.Fatal(err)
	}
	r.refused(t, "one partition too many", catalog.ErrLimitExceeded, func() error {
		_, err := r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: "more"})
		return err
	})
	r.refused(t, "one index too many", catalog.ErrLimitExceeded, func() error {
		_, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "more"})
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
	r := newEnv(t, kv)
	for _, gone := range []bool{false, true} {
		p, err := r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: "p"})
		if err != nil {
			t.Fatal(err)
		}
		x, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "i"})
		if err != nil {
			t.Fatal(err)
		}
		drop := func(key string, drop func(context.Context, request.Token, catalog.Ref, string) (int64, error),
			name string,
		) func() {
			return func() {
				if _, err := drop(ctx, request.Token{}, r.ref, name); err != nil {
					t.Error(err)
				}
				if gone { // cleaned up at once, for nothing is in it
					if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
						t.Error(err)
					}
				}
			}
		}
		ids := r.ids(t, 5)
		r.add(t, ids[0])
		inPartition := r.makeSegment(ids[1], 1)
		inPartition.Partition = p.ID
		hooked := open(&beforeTxn{KV: kv, do: drop(keys.Partition(r.col.ID, p.ID), r.DropPartition, "p")})
		if _, _, err := hooked.AddSegments(ctx, r.col.ID, []segment.Segment{inPartition}); !errors.Is(err,
			catalog.ErrPartitionNotFound) {
			t.Errorf("gone = %v: add to a partition that is dropped meanwhile: %v", gone, err)
		}
		hooked = open(&beforeTxn{KV: kv, do: drop(keys.Index(r.col.ID, x.ID), r.DropIndex, "i")})
		if _, err := hooked.Change(ctx, request.Token{}, r.ref, catalog.SegmentChange{Update: []catalog.Update{
			{Segment: ids[0], AddBuilds: []segment.Build{{ID: ids[2], Index: x.ID}}},
		}}); !errors.Is(err, catalog.ErrIndexNotFound) {
			t.Errorf("gone = %v: build of an index that is dropped meanwhile: %v", gone, err)
		}
	}
}

// setState writes a collection's state past the catalog.
func (r *env) setState(t testing.TB, state catalog.State) {
	t.Helper()
	kv, found, _, err := r.kv.Get(t.Context(), keys.Collection(r.col.ID))
	if err != nil || !found {
		t.Fatal(found, err)
	}
	rec := &storagev1.Collection{}
	if err := record.Decode(kv, rec); err != nil {
		t.Fatal(err)
	}
	rec.State = uint32(state)
	if _, err := r.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(kv.Key, record.Encode(rec))}}); err != nil {
		t.Fatal(err)
	}
}

func testNotActive(t *testing.T, kv meta.KV) {
	ctx := t.Context()
	r := newEnv(t, kv)
	ids := r.ids(t, 4)
	r.add(t, ids[0], ids[1])
	if _, err := r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.CreateIndex(ctx, request.Token{}, r.ref, catalog.Index{Name: "i"}); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func(tok request.Token) error{
		"UpdateCollection": func(tok request.Token) error {
			_, err := r.UpdateCollection(ctx, tok, r.ref, 0, catalog.Patch{})
			return err
		},
		"RenameCollection": func(tok request.Token) error {
			_, err := r.RenameCollection(ctx, tok, r.ref, "db", "new")
			return err
		},
		"CreatePartition": func(tok request.Token) error {
			_, err := r.CreatePartition(ctx, tok, r.ref, catalog.Partition{Name: "q"})
			return err
		},
		"CreateIndex": func(tok request.Token) error {
			_, err := r.CreateIndex(ctx, tok, r.ref, catalog.Index{Name: "j"})
			return err
		},
		"DropPartition": func(tok request.Token) error {
			_, err := r.DropPartition(ctx, tok, r.ref, "p")
			return err
		},
		"DropIndex": func(tok request.Token) error {
			_, err := r.DropIndex(ctx, tok, r.ref, "i")
			return err
		},
		"AddSegments": func(request.Token) error {
			_, _, err := r.AddSegments(ctx, r.col.ID, r.segments(ids[2:]))
			return err
		},
		"AddSegments again": func(request.Token) error {
			_, _, err := r.AddSegments(ctx, r.col.ID, r.segments(ids[:2]))
			return err
		},
		"DropSegments": func(request.Token) error {
			_, err := r.DropSegments(ctx, r.ref, ids[:1])
			return err
		},
		"SetCheckpoints": func(request.Token) error {
			_, err := r.SetCheckpoints(ctx, r.ref, []catalog.Checkpoint{{Position: segment.Position{Timestamp: 5}}})
			return err
		},
		"Change": func(tok request.Token) error {
			_, err := r.Change(ctx, tok, r.ref, catalog.SegmentChange{Drop: ids[:1], Add: r.segments(ids[2:3])})
			return err
		},
		"Update": func(tok request.Token) error {
			_, err := r.Change(ctx, tok, r.ref, catalog.SegmentChange{Update: []catalog.Update{{
				Segment: ids[0],
				Rows:    new(int64),
			}}})
			return err
		},
	}
	for _, state := range []catalog.State{catalog.Restoring, catalog.Dropping} {
		r.setState(t, state)
		for name, call := range calls {
			r.refused(t, fmt.Sprintf("%s while %v", name, state), catalog.ErrCollectionNotActive,
				func() error { return call(request.Token{}) })
			r.refused(t, fmt.Sprintf("%s while %v, with a token", name, state), catalog.ErrCollectionNotActive,
				func() error { return call(token(name)) })
		}
		if state == catalog.Restoring {
			r.refused(t, "drop while restoring", catalog.ErrCollectionNotActive, func() error {
				_, err := r.DropCollection(ctx, request.Token{}, r.ref, 0)
				return err
			})
		}
		// A scan goes on, and so does reading of what is being dropped; what is
		// being restored is its job's alone.
		if got := r.scan(t, 0); !slices.Equal(got, ids[:2]) {
			t.Errorf("scan: %v", got)
		}
		_, _, err := r.Segment(ctx, r.ref, ids[0])
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
	sweep(t, func(r *env) error {
		got, err := r.CreateCollection(t.Context(), token("x"), spec("x"))
		ids = []int64{got.ID}
		return err
	}, func(*testing.T, *env) {}, func(t *testing.T, r *env) {
		list, _, err := r.ListCollections(t.Context(), catalog.ListFilter{}, r.col.ID, 10)
		if err != nil || len(list) != 1 || list[0].ID != ids[0] {
			t.Errorf("%v, %v; want the one of id %d", list, err, ids[0])
		}
	})
}

// What was written is reported so, though nothing can be read any more.
func TestWrittenIsReported(t *testing.T) {
	ctx := t.Context()
	f := meta.NewFaulty(memory.New(memory.Options{}))
	r := newEnv(t, f)
	for name, do := range map[string]func() (catalog.Collection, error){
		"create": func() (catalog.Collection, error) { return r.CreateCollection(ctx, request.Token{}, spec("x")) },
		"update": func() (catalog.Collection, error) {
			return r.UpdateCollection(ctx, request.Token{}, r.ref, 0, catalog.Patch{})
		},
		"rename": func() (catalog.Collection, error) { return r.RenameCollection(ctx, request.Token{}, r.ref, "db", "y") },
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
		if want, err := r.Collection(ctx, catalog.Ref{ID: got.ID}); err != nil || !cmp.Equal(want, got) {
			t.Errorf("%s: %v (-want +got):\n%s", name, err, cmp.Diff(want, got))
		}
	}
}

// A store that is full takes nothing, drops included, and nothing is half done.
func TestFullStore(t *testing.T) {
	ctx := t.Context()
	kv := memory.New(memory.Options{})
	r := newEnv(t, kv)
	ids := r.ids(t, 200)
	r.add(t, ids[:4]...)
	if _, err := r.CreatePartition(ctx, request.Token{}, r.ref, catalog.Partition{Name: "p"}); err != nil {
		t.Fatal(err)
	}
	kv.SetFull(true)
	for name, do := range map[string]func() error{
		"create": func() error {
			_, err := r.CreateCollection(ctx, request.Token{}, spec("x"))
			return err
		},
		"create with a token": func() error {
			_, err := r.CreateCollection(ctx, token("x"), spec("x"))
			return err
		},
		"drop": func() error {
			_, err := r.DropCollection(ctx, request.Token{}, r.ref, 0)
			return err
		},
		"drop a partition": func() error {
			_, err := r.DropPartition(ctx, request.Token{}, r.ref, "p")
			return err
		},
		"add": func() error {
			_, _, err := r.AddSegments(ctx, r.col.ID, r.segments(ids[4:]))
			return err
		},
		"drop segments": func() error {
			_, err := r.DropSegments(ctx, r.ref, ids[:2])
			return err
		},
		"compact": func() error { return r.change(ctx, catalog.SegmentChange{Drop: ids[:2], Add: r.segments(ids[5:6])}) },
		"checkpoint": func() error {
			_, err := r.SetCheckpoints(ctx, r.ref, []catalog.Checkpoint{{Position: segment.Position{Timestamp: 1}}})
			return err
		},
		"ids": func() error {
			_, err := r.AllocateIDs(ctx, request.Token{}, 1)
			return err
		},
	} {
		r.refused(t, name, meta.ErrNoSpace, do)
	}
	kv.SetFull(false)
	r.add(t, ids[4:]...)
	if n, err := r.DropSegments(ctx, r.ref, ids); err != nil || n != len(ids) {
		t.Errorf("dropped %d, %v", n, err)
	}
}
