package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func TestListFilters(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r, other := e.start("a"), e.start("b")
		one, part, _ := e.collection(r, "one")
		two, err := r.catalog.CreateCollection(t.Context(), request.Token{}, catalog.Collection{
			DB: "second", Name: "one", Roots: []catalog.Root{{Store: "default", Prefix: "two/"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 6 {
			sp := spec(one, fmt.Sprintf("one-%d", i))
			if i%2 == 1 {
				sp = spec(two, fmt.Sprintf("two-%d", i))
			}
			sp.Labels = map[string]string{"n": fmt.Sprint(i % 3), "all": "x"}
			if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
				t.Fatal(err)
			}
		}
		for _, tc := range []struct {
			name string
			f    Filter
			want []string
		}{
			{"all, newest first", Filter{}, []string{"two-5", "one-4", "two-3", "one-2", "two-1", "one-0"}},
			{
				"collection by name",
				Filter{Collection: catalog.Ref{DB: "default", Name: "one"}},
				[]string{"one-4", "one-2", "one-0"},
			},
			{
				"same name in another database",
				Filter{Collection: catalog.Ref{DB: "second", Name: "one"}},
				[]string{"two-5", "two-3", "two-1"},
			},
			{"database", Filter{DB: "second"}, []string{"two-5", "two-3", "two-1"}},
			{"no such database", Filter{DB: "third"}, nil},
			{"partition", Filter{Partition: part.ID}, []string{"one-4", "one-2", "one-0"}},
			{"labels", Filter{Labels: map[string]string{"n": "1", "all": "x"}}, []string{"one-4", "two-1"}},
			{"label that differs", Filter{Labels: map[string]string{"n": "1", "all": "y"}}, nil},
			{"prefix", Filter{NamePrefix: "one-"}, []string{"one-4", "one-2", "one-0"}},
			{"state", Filter{States: []snapshot.State{snapshot.Pending}}, nil},
		} {
			list, more, err := other.List(t.Context(), tc.f, Place{}, 100)
			if err != nil || more {
				t.Errorf("%s: more = %v, err = %v", tc.name, more, err)
			}
			if got := names(list); !slices.Equal(got, tc.want) {
				t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
			}
		}
		_, _, err = r.List(t.Context(), Filter{Collection: catalog.Ref{DB: "default", Name: "none"}}, Place{}, 10)
		wantError(t, err, catalog.ErrCollectionNotFound)
	})
}

func names(list []*snapshot.Record) []string {
	var names []string
	for _, s := range list {
		names = append(names, s.Name)
	}
	return names
}

// TestListPages reads pages while snapshots are created and dropped: snapshots that
// exist throughout are returned once, in order.
func TestListPages(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var stays []string
		for i := range 25 {
			name := fmt.Sprintf("s%02d", i)
			e.create(r, col, name)
			if i%5 != 0 {
				stays = append(stays, name)
			}
		}
		slices.Reverse(stays)
		var seen []string
		var after Place
		for page := 0; ; page++ {
			list, more, err := r.List(t.Context(), Filter{}, after, 4)
			if err != nil {
				t.Fatal(err)
			}
			seen = append(seen, names(list)...)
			if !more {
				break
			}
			after = placeOf(list[len(list)-1])
			if page < 5 { // one is dropped, possibly the last one seen, and one created
				if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: fmt.Sprintf("s%02d", 5*page)}, 0); err != nil {
					t.Fatal(err)
				}
				e.create(r, col, fmt.Sprintf("new%d", page))
			}
		}
		seen = slices.DeleteFunc(seen, func(n string) bool { return !slices.Contains(stays, n) })
		if !slices.Equal(seen, stays) {
			t.Errorf("saw %v\nwant %v", seen, stays)
		}
	})
}

func TestUnreadableRecordIsIgnored(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.create(r, col, "fine")
		key := keys.Snapshot(99)
		e.put(key, []byte{8, 99}) // format 99
		settle()
		list, _, err := r.List(t.Context(), Filter{}, Place{}, 10)
		if err != nil || len(list) != 1 {
			t.Errorf("%v, err = %v", list, err)
		}
		if n := r.Stats().Unreadable; n != 1 {
			t.Errorf("%d unreadable records, want 1", n)
		}
		if got := e.keysUnder(key); len(got) != 1 {
			t.Error("the unreadable record was removed")
		}
		_, err = r.Get(t.Context(), Ref{ID: 99})
		if err == nil {
			t.Error("a record of another format was read")
		}
	})
}

func TestCorruptSnapshotIsReported(t *testing.T) {
	for name, harm := range map[string]func(e *env, key string){
		"missing": func(e *env, key string) { _ = e.objects.Delete(e.t.Context(), key) },
		"altered": func(e *env, key string) {
			info, _ := e.objects.Head(e.t.Context(), key)
			_, _ = e.objects.Put(e.t.Context(), key, make([]byte, info.Size))
		},
		"truncated": func(e *env, key string) { _, _ = e.objects.Put(e.t.Context(), key, []byte("{}")) },
		"longer":    func(e *env, key string) { _, _ = e.objects.Put(e.t.Context(), key, make([]byte, 1<<20)) },
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				col, _, _ := e.collection(r, "c")
				e.add(r, col, e.segment(r, col, 0, 1, 2))
				e.checkpoint(r, col, 10, 10)
				s := e.create(r, col, "x")
				keys := e.objectsUnder("snapshots/")
				harm(e, keys[0]) // manifest-0.avro
				err := r.Segments(t.Context(), Ref{ID: s.ID}, 0, func(*snapshot.Segment) bool { return true })
				wantError(t, err, snapshot.ErrCorrupt)
				s = e.create(r, col, "y")
				keys = e.objectsUnder(fmt.Sprintf("snapshots/%d/%d/", col.ID, s.ID))
				harm(e, keys[1]) // metadata.json
				_, err = r.Describe(t.Context(), Ref{ID: s.ID})
				wantError(t, err, snapshot.ErrCorrupt)
			})
		})
	}
}

func TestEvents(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		other, _, _ := e.collection(a, "other")
		type reported struct {
			typ   ChangeType
			what  string
			state string
		}
		watch := func(r *testReplica, after, collection int64) (<-chan []Event, <-chan int64, context.CancelFunc) {
			ctx, cancel := context.WithCancel(t.Context())
			events, revisions := make(chan []Event, 100), make(chan int64, 100)
			go func() {
				err := r.Watch(ctx, after, collection, func(list []Event, revision int64) error {
					events <- list
					revisions <- revision
					return nil
				})
				if !errors.Is(err, context.Canceled) {
					t.Errorf("watch ended with %v", err)
				}
			}()
			settle()
			return events, revisions, cancel
		}
		collect := func(events <-chan []Event) (list []reported) {
			settle()
			for len(events) > 0 {
				for _, e := range <-events {
					if e.Snapshot != nil {
						list = append(list, reported{e.Type, "snapshot " + e.Snapshot.Name, e.Snapshot.State.String()})
					} else {
						list = append(list, reported{e.Type, "collection " + e.Collection.Name, e.Collection.State.String()})
					}
				}
			}
			return list
		}
		events, revisions, stop := watch(b, 0, col.ID)
		if first := <-events; len(first) != 0 {
			t.Errorf("the first message has events: %v", first)
		}
		start := <-revisions
		e.create(a, other, "elsewhere")
		e.create(a, col, "x")
		if _, err := a.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		if _, err := a.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		want := []reported{
			{Created, "snapshot x", "PENDING"},
			{Updated, "snapshot x", "COMMITTED"},
			{Updated, "snapshot x", "DELETING"},
			{Deleted, "snapshot ", "UNKNOWN"},
			{Updated, "collection c", "DROPPING"},
		}
		got := collect(events)
		if !slices.Equal(got, want) {
			t.Errorf("got %v\nwant %v", got, want)
		}
		stop()
		// Resumed from the first token on another replica, the events are the same.
		events, revisions, stop = watch(a, start, col.ID)
		if again := collect(events); !slices.Equal(again, want) {
			t.Errorf("resumed: got %v\nwant %v", again, want)
		}
		var last int64
		for len(revisions) > 0 {
			r := <-revisions
			if r < last {
				t.Errorf("revision %d after %d", r, last)
			}
			last = r
		}
		stop()
		settle()
		_, _, now, err := e.kv.Get(t.Context(), "/none")
		if err == nil {
			err = e.memory.Compact(t.Context(), now)
		}
		if err != nil {
			t.Fatal(err)
		}
		err = a.Watch(t.Context(), start, 0, func([]Event, int64) error { return nil })
		wantError(t, err, ErrEventsCompacted)
		// So does a watch whose progress was reported too high.
		ended := make(chan error, 1)
		go func() { ended <- a.Watch(t.Context(), 0, 0, func([]Event, int64) error { return nil }) }()
		settle()
		e.memory.Overtake(true)
		e.collection(a, "another")
		wantError(t, <-ended, ErrEventsCompacted)
	})
}

// TestCutIsPerChannel compares captures with an oracle that knows every row. Rows of
// several channels go into segments of all states; at any time a snapshot must hold
// each row before its channel's cut exactly once, and none at or after it.
func TestCutIsPerChannel(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		channels := rapid.IntRange(1, 4).Draw(rt, "channels")
		type row struct {
			channel int
			ts      segment.Timestamp
		}
		rows := map[row]int{}        // number of files with the row
		inFile := map[string][]row{} // by path
		view := &catalog.View{Checkpoints: map[int]catalog.Checkpoint{}}
		var segments []segment.Segment
		for ch := range channels {
			view.Collection.Channels = append(view.Collection.Channels, fmt.Sprintf("v%d", ch))
			next := segment.Timestamp(rapid.IntRange(1, 50).Draw(rt, "start"))
			inFiles := next
			for i := range rapid.IntRange(0, 6).Draw(rt, "segments") {
				s := segment.Segment{
					ID: int64(100*ch + i + 1), Channel: ch, Start: segment.Position{Timestamp: next},
					State: rapid.SampledFrom([]segment.State{segment.Growing, segment.Sealed, segment.Flushed}).Draw(rt, "state"),
				}
				for f := range rapid.IntRange(0, 3).Draw(rt, "files") {
					path := fmt.Sprintf("%d/%d", s.ID, f)
					file := segment.File{Kind: segment.KindInsert, Path: path}
					first := next
					for range rapid.IntRange(1, 5).Draw(rt, "rows") {
						r := row{ch, next}
						rows[r]++
						inFile[path] = append(inFile[path], r)
						next += segment.Timestamp(rapid.IntRange(1, 5).Draw(rt, "gap"))
					}
					if rapid.Bool().Draw(rt, "ranged") {
						file.MinTimestamp, file.MaxTimestamp = first, inFile[path][len(inFile[path])-1].ts
					}
					s.Files = append(s.Files, file)
				}
				s.DML = segment.Position{Timestamp: next}
				inFiles = next
				if rapid.Bool().Draw(rt, "stats") {
					s.Files = append(s.Files, segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("%d/stats", s.ID)})
				}
				segments = append(segments, s)
			}
			// The checkpoint may be anywhere within the rows in files, also inside a segment.
			cut := segment.Timestamp(rapid.IntRange(0, int(inFiles)).Draw(rt, "cut"))
			view.Checkpoints[ch] = catalog.Checkpoint{Shard: ch, Position: segment.Position{Timestamp: cut}}
		}
		c := newCaptureFilter(view)
		shown := map[row]int{}
		for _, s := range segments {
			got, err := c.capture(s)
			if err != nil {
				rt.Fatal(err)
			}
			if !got.included {
				continue
			}
			for _, f := range got.Files {
				for _, r := range inFile[f.Path] {
					if got.RowCeiling == 0 || r.ts < got.RowCeiling {
						shown[r]++
					}
				}
			}
		}
		for r, n := range rows {
			want := 0
			if r.ts < view.Checkpoints[r.channel].Position.Timestamp {
				want = n
			}
			if shown[r] != want {
				rt.Errorf("row %v is shown %d times, want %d; its cut is %d", r, shown[r], want,
					view.Checkpoints[r.channel].Position.Timestamp)
			}
		}
	})
}

func TestCaptureDecides(t *testing.T) {
	file := func(kind string, from, to segment.Timestamp) segment.File {
		return segment.File{Kind: kind, Path: fmt.Sprintf("%s-%d", kind, from), MinTimestamp: from, MaxTimestamp: to}
	}
	v := &catalog.View{
		Partitions:  []catalog.Partition{{ID: 1, State: catalog.Active}, {ID: 2, State: catalog.Dropping}},
		Indexes:     []catalog.Index{{ID: 5, State: catalog.Active}, {ID: 6, State: catalog.Dropping}},
		Checkpoints: map[int]catalog.Checkpoint{0: {Position: segment.Position{Timestamp: 100}}},
	}
	c := newCaptureFilter(v)
	for _, tc := range []struct {
		name    string
		s       segment.Segment
		in      bool
		ceiling segment.Timestamp
		files   int
	}{
		{"whole", segment.Segment{Files: []segment.File{file("insert", 1, 99)}}, true, 0, 1},
		{"ends at the cut", segment.Segment{Files: []segment.File{file("insert", 1, 100)}}, true, 100, 1},
		{"starts at the cut", segment.Segment{
			Start: segment.Position{Timestamp: 100},
			Files: []segment.File{file("insert", 100, 100)},
		}, false, 0, 1},
		{
			"growing with files",
			segment.Segment{State: segment.Growing, Files: []segment.File{file("insert", 1, 50)}},
			true, 0, 1,
		},
		{"growing without files", segment.Segment{State: segment.Growing}, false, 0, 0},
		{"only stats", segment.Segment{Files: []segment.File{file("stats", 0, 0)}}, false, 0, 1},
		{"only deletes", segment.Segment{Files: []segment.File{file("delta", 1, 50)}}, true, 0, 1},
		{"unknown kind counts as data", segment.Segment{
			DML:   segment.Position{Timestamp: 50},
			Files: []segment.File{file("parquet", 0, 0)},
		}, true, 0, 1},
		{"file after the cut is left out", segment.Segment{Files: []segment.File{
			file("insert", 1, 99),
			file("insert", 100, 120), file("stats", 0, 0),
		}}, true, 100, 2},
		{
			"deletes after the cut are left out",
			segment.Segment{Files: []segment.File{file("insert", 1, 99), file("delta", 100, 120)}},
			true, 0, 1,
		},
		{"deletes of an unknown time", segment.Segment{
			Level: 1, DML: segment.Position{Timestamp: 50},
			Files: []segment.File{file("insert", 1, 49), file("delta", 0, 0)},
		}, true, 100, 2},
		{"deletes of an unknown time, alone", segment.Segment{
			DML:   segment.Position{Timestamp: 50},
			Files: []segment.File{file("delta", 0, 0)},
		}, true, 0, 1},
		{"import with deletes after the cut", segment.Segment{
			CommitTimestamp: 99,
			Files:           []segment.File{file("insert", 500, 600), file("delta", 150, 160)},
		}, true, 0, 1},
		{
			"all data after the cut",
			segment.Segment{Files: []segment.File{file("insert", 100, 120), file("stats", 0, 0)}},
			false, 0, 1,
		},
		{"importing", segment.Segment{State: segment.Importing, Files: []segment.File{file("insert", 1, 2)}}, false, 0, 1},
		{"of a partition", segment.Segment{Partition: 1, Files: []segment.File{file("insert", 1, 2)}}, true, 0, 1},
		{
			"of a partition being dropped",
			segment.Segment{Partition: 2, Files: []segment.File{file("insert", 1, 2)}},
			false, 0, 1,
		},
		{"unknown range, ends before", segment.Segment{
			DML:   segment.Position{Timestamp: 100},
			Files: []segment.File{file("insert", 0, 0)},
		}, true, 0, 1},
		{"unknown range, ends after", segment.Segment{
			DML:   segment.Position{Timestamp: 101},
			Files: []segment.File{file("insert", 0, 0)},
		}, true, 100, 1},
		{"unknown range and end", segment.Segment{Files: []segment.File{file("insert", 0, 0)}}, true, 100, 1},
		{
			"lower ceiling is kept",
			segment.Segment{RowCeiling: 40, Files: []segment.File{file("insert", 1, 120)}},
			true, 40, 1,
		},
		{"ceiling of before", segment.Segment{RowCeiling: 40, Files: []segment.File{file("insert", 1, 99)}}, true, 40, 1},
		{
			"commit timestamp before",
			segment.Segment{CommitTimestamp: 99, Files: []segment.File{file("insert", 500, 600)}},
			true, 0, 1,
		},
		{
			"commit timestamp after",
			segment.Segment{CommitTimestamp: 100, Files: []segment.File{file("insert", 1, 2)}},
			false, 0, 1,
		},
	} {
		got, err := c.capture(tc.s)
		in := got.included
		if err != nil || in != tc.in || in && (got.RowCeiling != tc.ceiling || len(got.Files) != tc.files) {
			t.Errorf("%s: in = %v, ceiling %d, %d files, err = %v; want %v, %d, %d", tc.name, in,
				got.RowCeiling, len(got.Files), err,
				tc.in, tc.ceiling, tc.files)
		}
	}
	got, _ := c.capture(segment.Segment{
		Files:  []segment.File{file("insert", 1, 2)},
		Builds: []segment.Build{{ID: 1, Index: 5}, {ID: 2, Index: 6}},
	})
	if len(got.Builds) != 1 || got.Builds[0].ID != 1 {
		t.Errorf("builds %v: that of an index being dropped is out", got.Builds)
	}
	_, err := c.capture(segment.Segment{Channel: 7, Files: []segment.File{file("insert", 1, 2)}})
	wantError(t, err, ErrCheckpointMissing)
	if got, err := c.capture(segment.Segment{Channel: 7}); got.included || err != nil {
		t.Errorf("a segment without data on a channel without a checkpoint: in = %v, err = %v", got.included, err)
	}
	for state, lacking := range map[segment.State]bool{segment.Flushed: true, segment.Growing: false} {
		got, err := c.capture(segment.Segment{State: state, Rows: 5, Files: []segment.File{file("stats", 1, 2)}})
		if got.included || got.lacksFiles != lacking || err != nil {
			t.Errorf("rows without a file, %v: in = %v, lacking = %v, err = %v", state, got.included, got.lacksFiles, err)
		}
	}
}
