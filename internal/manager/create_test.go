package manager

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestCreateKeepsEverything(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, p, x := e.collection(r, "c")
		s := e.segment(r, col, 1, 10, 19)
		s.Partition = p.ID
		s.Files = nil
		for i, kind := range []string{
			segment.KindInsert, segment.KindDelta, segment.KindStats,
			segment.KindBM25, segment.KindText, segment.KindJSON, "never-heard-of",
		} {
			f := segment.File{
				Kind: kind, Field: int64(100 + i), LogID: int64(i + 1), Size: int64(1000 + i), ETag: fmt.Sprintf("etag-%d", i),
				Checksum:   segment.Checksum{Type: "CRC64NVME", Value: []byte{1, 2, 3, byte(i)}},
				Attributes: map[string]string{"k": kind},
			}
			f.Path = fmt.Sprintf("foreign/%s/%d", kind, i)
			if kind == segment.KindDelta {
				f.MinTimestamp, f.MaxTimestamp = 12, 18
			}
			s.Files = append(s.Files, f)
		}
		b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100, Params: map[string]string{"m": "16"}}
		b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/0", b.ID), Size: 7, LogID: 1}}
		s.Builds = []segment.Build{b}
		s.EngineData, s.Attributes = []byte{0, 255, 1}, map[string]string{"": "empty key", "a": "b"}
		s.Start.Opaque, s.DML.Opaque = []byte("start"), []byte{0}
		s.Sorted, s.StorageVersion, s.Level = true, 3, 2
		e.add(r, col, s)
		e.checkpoint(r, col, 100, 100)

		sp := spec(col, "one")
		sp.Description, sp.Labels = "for people", map[string]string{"env": "test"}
		snap, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]segment.Segment{s}, e.segments(r, snap)); diff != "" {
			t.Errorf("segment (-registered +captured):\n%s", diff)
		}
		d, err := r.Describe(t.Context(), Ref{Name: "one"})
		if err != nil {
			t.Fatal(err)
		}
		md := d.Metadata
		if md.Snapshot.Description != "for people" || md.Collection.Properties["mmap"] != "true" ||
			md.Collection.ConsistencyLevel != "Bounded" ||
			!bytes.Equal(md.Collection.Schema.Raw, []byte{0, 1, 2}) || md.ClusterID != r.o.Cluster.ID ||
			md.CatalogRevision != snap.CatalogRevision {
			t.Errorf("metadata does not say what was captured: %+v", md)
		}
		if len(md.Partitions) != 1 || md.Partitions[0].Name != "p0" || len(md.Indexes) != 1 ||
			!slices.Equal(snap.Partitions, []int64{p.ID}) {
			t.Errorf("partitions %+v, indexes %+v", md.Partitions, md.Indexes)
		}
		want := []snapshot.Cut{{Shard: 0, Channel: "ch-0", Timestamp: 100}, {Shard: 1, Channel: "ch-1", Timestamp: 100}}
		if diff := cmp.Diff(want, snap.Cuts); diff != "" {
			t.Errorf("cuts (-want +got):\n%s", diff)
		}
		if snap.Totals != (segment.Totals{Segments: 1, Rows: 10, Files: 8, Bytes: 1000*7 + 21 + 7, Builds: 1}) {
			t.Errorf("totals %+v", snap.Totals)
		}
		e.check(r)
	})
}

func TestReferencesCoverSegmentsBuildsAndForeignFiles(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, x := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 2)
		s.Files = append(s.Files, segment.File{Kind: "odd", Path: "elsewhere/odd"})
		b := segment.Build{ID: e.newID(r), Index: x.ID}
		b.Files = []segment.File{
			{Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/1", col.ID, s.ID, b.ID)},
			{Kind: segment.KindIndex, Path: "elsewhere/index"},
		}
		s.Builds = []segment.Build{b}
		e.add(r, col, s)
		e.checkpoint(r, col, 10, 10)
		snap := e.create(r, col, "one")
		d, err := r.Describe(t.Context(), Ref{ID: snap.ID})
		if err != nil {
			t.Fatal(err)
		}
		data, err := object.ReadAll(t.Context(), e.objects, manifest.RefsKey(col.ID, snap.ID), d.Metadata.Refs.Length)
		if err != nil {
			t.Fatal(err)
		}
		refs, err := manifest.DecodeRefs(data, d.Metadata.Refs)
		if err != nil {
			t.Fatal(err)
		}
		files := []uint64{
			manifest.FileHash("default", "data/elsewhere/odd"),
			manifest.FileHash("default", "data/elsewhere/index"),
		}
		slices.Sort(files)
		want := &manifest.Refs{Segments: []int64{s.ID}, Builds: []int64{b.ID}, Files: files}
		if diff := cmp.Diff(want, refs); diff != "" {
			t.Errorf("references (-want +got):\n%s", diff)
		}
	})
}

func TestCreate64OfOneName(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		replicas := []*testReplica{e.start("a"), e.start("b"), e.start("c")}
		col, _, _ := e.collection(replicas[0], "c")
		e.add(replicas[0], col, e.segment(replicas[0], col, 0, 1, 2))
		e.checkpoint(replicas[0], col, 10, 10)
		results := make(chan error, 64)
		for i := range 64 {
			go func() {
				_, err := replicas[i%3].Create(t.Context(), request.Token{}, spec(col, "same"))
				results <- err
			}()
		}
		created := 0
		for range 64 {
			if err := <-results; err == nil {
				created++
			} else {
				wantError(t, err, ErrSnapshotExists)
			}
		}
		if created != 1 {
			t.Errorf("%d creates of one name succeeded", created)
		}
		e.create(replicas[1], col, "next")
		settle()
		if n := len(e.check(replicas[0])); n != 2 {
			t.Errorf("%d snapshots, want 2", n)
		}
	})
}

func TestCreateOfOneNameInTwoCollections(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		scoped := func(o *testOptions) { o.Cluster.NameScope = 2 }
		r := e.start("a", scoped)
		one, _, _ := e.collection(r, "one")
		two, _, _ := e.collection(r, "two")
		s1, s2 := e.create(r, one, "same"), e.create(r, two, "same")
		for _, tc := range []struct {
			col  catalog.Collection
			want int64
		}{{one, s1.ID}, {two, s2.ID}} {
			got, err := r.Get(t.Context(), Ref{Name: "same", Collection: catalog.Ref{DB: "default", Name: tc.col.Name}})
			if err != nil || got.ID != tc.want {
				t.Errorf("same of %s is %v, err = %v; want %d", tc.col.Name, got, err, tc.want)
			}
		}
		_, err := r.Get(t.Context(), Ref{Name: "same"})
		wantError(t, err, catalog.ErrInvalid)
	})
}

func TestCreateRefusesBadInput(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		dropped, _, _ := e.collection(r, "dropped")
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: dropped.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		_, _, before, err := e.kv.Get(t.Context(), "/none")
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{
			"", " ", " padded", "padded ", "a/b", "..", ".hidden",
			"-flag", "naïve", "a\x00b", "a\nb", "\u202eabc", strings.Repeat("x", 256),
		} {
			_, err := r.Create(t.Context(), request.Token{}, spec(col, name))
			if !errors.Is(err, catalog.ErrInvalid) {
				t.Errorf("name %q: %v", name, err)
			}
		}
		bad := spec(col, "x")
		bad.Labels = map[string]string{"k": strings.Repeat("x", 4097)}
		_, err = r.Create(t.Context(), request.Token{}, bad)
		wantError(t, err, catalog.ErrInvalid)
		bad = spec(col, "x")
		bad.MinCut = []catalog.Checkpoint{{Shard: 2}}
		_, err = r.Create(t.Context(), request.Token{}, bad)
		wantError(t, err, catalog.ErrInvalid)
		_, err = r.Create(t.Context(), request.Token{}, CreateSpec{Name: "x", Collection: catalog.Ref{ID: 1 << 40}})
		wantError(t, err, catalog.ErrCollectionNotFound)
		_, err = r.Create(t.Context(), request.Token{},
			CreateSpec{Name: "x", Collection: catalog.Ref{DB: "other", Name: "c"}})
		wantError(t, err, catalog.ErrCollectionNotFound)
		_, err = r.Create(t.Context(), request.Token{}, spec(dropped, "x"))
		wantError(t, err, catalog.ErrCollectionNotActive)
		settle()
		// Only allocations of ids may be left.
		res, err := e.kv.Range(t.Context(), meta.Range{From: "/", To: "0"})
		if err != nil {
			t.Fatal(err)
		}
		var events []string
		for _, kv := range res.KVs {
			if kv.ModRevision > before && kv.Key != keys.IDs {
				events = append(events, kv.Key)
			}
		}
		if len(events) > 0 {
			t.Errorf("bad input wrote %v", events)
		}
	})
}

// restoring sets the state that a restore gives its target.
func (e *env) restoring(col catalog.Collection) {
	e.t.Helper()
	kv, _, _, err := e.kv.Get(e.t.Context(), keys.Collection(col.ID))
	if err != nil {
		e.t.Fatal(err)
	}
	rec := &storagev1.Collection{}
	if err := record.Decode(kv, rec); err != nil {
		e.t.Fatal(err)
	}
	rec.State = uint32(catalog.Restoring)
	e.put(kv.Key, record.Encode(rec))
}

func (e *env) put(key string, value []byte) {
	e.t.Helper()
	if _, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, value)}}); err != nil {
		e.t.Fatal(err)
	}
}

func TestCreateOfRestoringCollectionIsRefused(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.restoring(col)
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, catalog.ErrCollectionNotActive)
	})
}

func TestCreateRacesDropCollection(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		other := e.start("b")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2))
		e.checkpoint(r, col, 10, 10)
		// The collection is dropped between begin and capture: the first read without a scan
		// after the begin transaction is the capture's.
		var once sync.Once
		began := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodRange {
				if len(e.keysUnder(pendingKeys)) > 0 {
					once.Do(func() {
						began = true
						if _, err := other.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
							t.Error(err)
						}
					})
				}
			}
			return meta.NoFault
		})
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, catalog.ErrCollectionNotActive)
		if !began {
			t.Fatal("the collection was not dropped in mid-create")
		}
		r.kv.Hook(nil)
		settle()
		if n := len(e.check(r)); n != 0 {
			t.Errorf("%d snapshots of a collection that was gone", n)
		}
	})
}

func TestSnapshotsOutliveTheirCollection(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 2)
		e.add(r, col, s)
		e.checkpoint(r, col, 10, 10)
		snap := e.create(r, col, "keeps")
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		list, _, err := r.List(t.Context(), Filter{Collection: catalog.Ref{ID: col.ID}}, Place{}, 10)
		if err != nil || len(list) != 1 || list[0].ID != snap.ID {
			t.Errorf("list after the drop: %v, err = %v", list, err)
		}
		d, err := r.Describe(t.Context(), Ref{Name: "keeps"})
		if err != nil || d.Metadata.Collection.Name != "c" {
			t.Errorf("describe after the drop: %+v, err = %v", d, err)
		}
		if diff := cmp.Diff([]segment.Segment{s}, e.segments(r, snap)); diff != "" {
			t.Errorf("segments after the drop (-want +got):\n%s", diff)
		}
	})
}

func TestEmptyCollectionIsAValidSnapshot(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		snap := e.create(r, col, "empty")
		if snap.Totals != (segment.Totals{}) || len(e.segments(r, snap)) != 0 {
			t.Errorf("totals %+v", snap.Totals)
		}
		e.check(r)
	})
}

func TestCreateTokens(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		e.add(a, col, e.segment(a, col, 0, 1, 2))
		e.checkpoint(a, col, 10, 10)
		tok := token("t1", "request 1")

		// While the first call writes, the second joins it on another replica.
		a.store.Freeze()
		first := make(chan *snapshot.Record, 2)
		for _, r := range []*testReplica{a, b} {
			go func() {
				s, err := r.Create(t.Context(), tok, spec(col, "one"))
				if err != nil {
					t.Error(err)
				}
				first <- s
			}()
			settle()
		}
		if n := len(e.keysUnder(pendingKeys)); n != 1 {
			t.Fatalf("%d creates under way, want 1", n)
		}
		noWait := spec(col, "one")
		noWait.NoWait = true
		pending, err := b.Create(t.Context(), tok, noWait)
		if err != nil || pending.State != snapshot.Pending {
			t.Errorf("join without waiting: %v, err = %v", pending, err)
		}
		a.store.Thaw()
		s1, s2 := <-first, <-first
		if s1 == nil || s2 == nil || s1.ID != s2.ID || s1.ID != pending.ID || s1.Revision != s2.Revision ||
			s1.State != snapshot.Committed {
			t.Fatalf("one token made %v, %v and %v", s1, s2, pending)
		}
		// The result remains after the drop of the snapshot.
		if _, err := a.Drop(t.Context(), request.Token{}, Ref{ID: s1.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		again, err := b.Create(t.Context(), tok, spec(col, "one"))
		if err != nil || again.ID != s1.ID || again.State != snapshot.Committed {
			t.Errorf("repeat after the drop: %v, err = %v", again, err)
		}
		_, err = a.Create(t.Context(), token("t1", "request 2"), spec(col, "two"))
		wantError(t, err, request.ErrReused)
		// A day later the token is free.
		time.Sleep(26 * time.Hour)
		settle()
		if s, err := a.Create(t.Context(), token("t1", "request 2"), spec(col, "two")); err != nil || s.ID == s1.ID {
			t.Errorf("a day later: %v, err = %v", s, err)
		}
		e.check(a)
	})
}

func TestFailedCreateCompletesItsToken(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 1, 1, 2))
		e.checkpoint(r, col, 10) // channel 1 has none
		tok := token("t", "r")
		_, err := r.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, err, ErrCheckpointMissing)
		_, again := r.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, again, ErrCheckpointMissing)
		if !strings.Contains(errText(again), `"ch-1"`) {
			t.Errorf("the repeat does not name the channel: %v", again)
		}
		settle()
		e.check(r)
		e.checkpoint(r, col, 10, 10)
		e.create(r, col, "x") // the name is free
	})
}

func TestCreateContinuesWithoutItsCaller(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		r.store.Freeze()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		tok := token("t", "r")
		_, err := r.Create(ctx, tok, spec(col, "x"))
		wantError(t, err, context.DeadlineExceeded)
		r.store.Thaw()
		s, err := r.Create(t.Context(), tok, spec(col, "x"))
		if err != nil || s.State != snapshot.Committed {
			t.Errorf("joined %v, err = %v", s, err)
		}
	})
}

func TestCreatorThatFreezesIsReapedAndFenced(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		e.add(a, col, e.segment(a, col, 0, 1, 2))
		e.checkpoint(a, col, 10, 10)
		tok := token("t", "r")
		a.store.Freeze() // after begin, before the first object
		result := make(chan error, 1)
		go func() {
			_, err := a.Create(t.Context(), tok, spec(col, "x"))
			result <- err
		}()
		settle()
		a.kv.Freeze()
		time.Sleep(3 * time.Minute) // longer than the lease and the leader's
		settle()
		if keys := e.keysUnder("/snapshot/rec/"); len(keys) != 0 {
			t.Errorf("the dead create was not cleaned: %v", keys)
		}
		_, err := b.Create(t.Context(), tok, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		e.create(b, col, "x") // the name is free
		a.kv.Thaw()
		a.store.Thaw()
		wantError(t, <-result, ErrCreateAborted)
		settle()
		all := Filter{States: []snapshot.State{snapshot.Pending, snapshot.Committed, snapshot.Deleting}}
		list, _, err := b.List(t.Context(), all, Place{}, 10)
		if err != nil || len(list) != 1 || list[0].State != snapshot.Committed {
			t.Errorf("after the creator woke up: %v, err = %v", list, err)
		}
	})
}

func TestSlowCreateIsNotAbandoned(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		for range 3 {
			for range 20 {
				e.add(r, col, e.segment(r, col, 0, 1, 2))
			}
		}
		e.checkpoint(r, col, 10, 10)
		r.store.SetLatency(45 * time.Second) // two steps of three quarters of a lease each
		sp := spec(col, "slow")
		sp.Verify = false
		begin := time.Now()
		s, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil || s.State != snapshot.Committed {
			t.Fatalf("slow create: %v, err = %v", s, err)
		}
		if took := time.Since(begin); took < time.Minute {
			t.Errorf("it took only %v", took)
		}
		r.store.SetLatency(0)
		e.check(r)
	})
}

func TestCreateEndsAtItsTimeout(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.CreateTimeout = 5 * time.Minute })
		col, _, _ := e.collection(r, "c")
		r.store.Freeze()
		begin := time.Now()
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		if took := time.Since(begin); took > 6*time.Minute {
			t.Errorf("took %v", took)
		}
		r.store.Thaw()
		settle()
		e.check(r)
	})
}

func TestStoppingReplicaGivesUpItsCreates(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		tok := token("t", "r")
		a.store.Freeze()
		result := make(chan error, 1)
		go func() {
			_, err := a.Create(t.Context(), tok, spec(col, "x"))
			result <- err
		}()
		settle()
		a.stop()
		wantError(t, <-result, ErrCreateAborted)
		_, err := a.Create(t.Context(), request.Token{}, spec(col, "y"))
		wantError(t, err, ErrStopping)
		settle()
		e.create(b, col, "x")
		e.check(b)
	})
}

func TestMinCut(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.checkpoint(r, col, 10)
		sp := spec(col, "x")
		sp.MinCut = []catalog.Checkpoint{
			{Shard: 0, Position: segment.Position{Timestamp: 20}},
			{Shard: 1, Position: segment.Position{Timestamp: 5}},
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		_, err := r.Create(ctx, request.Token{}, sp)
		wantError(t, err, ErrCutNotReached)
		if ctx.Err() != nil {
			t.Error("the answer came after the deadline")
		}
		for _, part := range []string{`"ch-0"`, `"ch-1"`, "10", "20"} {
			if !strings.Contains(errText(err), part) {
				t.Errorf("%v does not name %s", err, part)
			}
		}
		if keys := e.keysUnder("/snapshot/"); len(keys) != 0 {
			t.Errorf("waiting wrote %v", keys)
		}
		result := make(chan *snapshot.Record, 1)
		go func() {
			s, err := r.Create(t.Context(), request.Token{}, sp)
			if err != nil {
				t.Error(err)
			}
			result <- s
		}()
		settle()
		e.memory.Overtake(true) // makes it read again, because its watch may lack changes
		e.checkpoint(r, col, 20, 4)
		e.memory.Overtake(false)
		settle()
		e.checkpoint(r, col, 25, 6)
		s := <-result
		want := []snapshot.Cut{{Shard: 0, Channel: "ch-0", Timestamp: 25}, {Shard: 1, Channel: "ch-1", Timestamp: 6}}
		if !slices.Equal(s.Cuts, want) {
			t.Errorf("cuts %v, want %v", s.Cuts, want)
		}
	})
}

func TestRequireExact(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		straddling, whole := e.segment(r, col, 0, 1, 20), e.segment(r, col, 1, 1, 9)
		e.add(r, col, straddling, whole)
		e.checkpoint(r, col, 10, 10)
		sp := spec(col, "x")
		sp.RequireExact = true
		_, err := r.Create(t.Context(), request.Token{}, sp)
		wantError(t, err, ErrNotExact)
		if !strings.Contains(errText(err), fmt.Sprint(straddling.ID)) ||
			strings.Contains(errText(err), fmt.Sprint(whole.ID)) {
			t.Errorf("the straddling segments are not named: %v", err)
		}
		s := e.create(r, col, "x")
		if s.Totals.Straddling != 1 {
			t.Errorf("%d straddling segments, want 1", s.Totals.Straddling)
		}
		e.checkpoint(r, col, 21, 21)
		sp.Name = "y"
		if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
			t.Error(err)
		}
	})
}

func TestVerify(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 2)
		key := "data/" + s.Files[0].Path
		e.add(r, col, s)
		e.checkpoint(r, col, 10, 10)
		sp := spec(col, "x")
		sp.Verify = true
		_, err := r.Create(t.Context(), request.Token{}, sp)
		wantError(t, err, ErrFileMissing)
		if !strings.Contains(errText(err), key) {
			t.Errorf("%v does not name %s", err, key)
		}
		if _, err := e.objects.Put(t.Context(), key, []byte("short")); err != nil {
			t.Fatal(err)
		}
		_, err = r.Create(t.Context(), request.Token{}, sp)
		wantError(t, err, ErrFileMissing)
		if _, err := e.objects.Put(t.Context(), key, []byte("ten bytes.")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
			t.Error(err)
		}
	})
}

func TestEqualInputMakesEqualManifests(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		for range 30 {
			s := e.segment(r, col, 0, 1, 2)
			s.Attributes = map[string]string{"a": "1", "b": "2", "c": "3", "d": "4"}
			e.add(r, col, s)
		}
		e.checkpoint(r, col, 10, 10)
		var first []byte
		for i := range 20 {
			s := e.create(r, col, fmt.Sprintf("s%d", i))
			d, err := r.Describe(t.Context(), Ref{ID: s.ID})
			if err != nil {
				t.Fatal(err)
			}
			data, err := object.ReadAll(t.Context(), e.objects, manifest.ManifestKey(col.ID, s.ID, 0),
				d.Metadata.Manifests[0].Length)
			if err != nil {
				t.Fatal(err)
			}
			if first == nil {
				first = data
			}
			if !bytes.Equal(first, data) {
				t.Fatalf("manifest %d differs", i)
			}
		}
	})
}

func TestCaptureStartsOverWhenCompacted(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2))
		e.checkpoint(r, col, 10, 10)
		compactions := 0
		compact := func(limit int) {
			compactions = 0
			r.kv.Hook(func(c meta.Call) meta.Fault {
				if c.Method == meta.MethodScan && len(e.keysUnder(pendingKeys)) > 0 && compactions < limit {
					compactions++
					e.put("/noise", nil)
					_, _, now, err := e.kv.Get(t.Context(), "/noise")
					if err == nil {
						err = e.memory.Compact(t.Context(), now)
					}
					if err != nil {
						t.Error(err)
					}
				}
				return meta.NoFault
			})
		}
		compact(2)
		e.create(r, col, "x")
		if compactions != 2 {
			t.Errorf("%d compactions", compactions)
		}
		compact(1000)
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "y"))
		wantError(t, err, ErrCatalogCompacted)
		r.kv.Hook(nil)
		time.Sleep(time.Minute) // the compactions have ended watches too, which begin again after a pause
		settle()
		if n := len(e.check(r)); n != 1 {
			t.Errorf("%d snapshots, want 1", n)
		}
	})
}

// TestCreateSurvivesEachFailedCall fails every metadata call of a create, one after the
// other, before and after its effect. A repeat with the same token must return the same
// snapshot or a final failure without remains.
func TestCreateSurvivesEachFailedCall(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		t.Run(fmt.Sprint(fault), func(t *testing.T) {
			for n := 0; ; n++ {
				if !failOneMetaCall(t, n, fault) {
					if n < 8 {
						t.Errorf("a create makes only %d calls", n)
					}
					return
				}
			}
		})
	}
}

func failOneMetaCall(t *testing.T, n int, fault meta.Fault) (fired bool) {
	inEnv(t, func(t *testing.T, e *env) {
		r, other := e.start("a"), e.start("b")
		col, _, _ := e.collection(other, "c")
		e.add(other, col, e.segment(other, col, 0, 1, 2))
		e.checkpoint(other, col, 10, 10)
		settle()
		r.kv.FailNth(n, fault, meta.MethodGet, meta.MethodRange, meta.MethodScan, meta.MethodTxn,
			meta.MethodGrant, meta.MethodKeepAlive, meta.MethodRevoke)
		tok := token("t", "r")
		s, err := r.Create(t.Context(), tok, spec(col, "x"))
		fired = r.kv.Fired() > 0
		r.kv.Hook(nil)
		again, againErr := other.Create(t.Context(), tok, spec(col, "x"))
		switch {
		case err == nil && (againErr != nil || again.ID != s.ID):
			t.Errorf("call %d: created %v, but the repeat says %v, %v", n, s, again, againErr)
		case againErr == nil:
			if again.State != snapshot.Committed {
				t.Errorf("call %d: the repeat returned %v", n, again.State)
			}
		default:
			if !errors.Is(againErr, ErrCreateAborted) && !errors.Is(againErr, ErrSnapshotExists) {
				t.Errorf("call %d: %v, then %v", n, err, againErr)
			}
			wantUndefined(t, n, err)
		}
		time.Sleep(5 * time.Minute)
		settle()
		e.check(other)
		if _, err := other.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Errorf("call %d: drop: %v", n, err)
		}
		e.create(other, col, "x") // in any case the name is free afterwards
		settle()
		if got := len(e.check(other)); got != 1 {
			t.Errorf("call %d: %d snapshots at the end", n, got)
		}
	})
	return fired
}

// wantUndefined checks that an error without a known outcome is not reported as final.
func wantUndefined(t *testing.T, n int, err error) {
	t.Helper()
	if !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, ErrCreateAborted) {
		t.Errorf("call %d: the first call ended with %v", n, err)
	}
}

// TestCreateSurvivesEachFailedObjectCall does the same with the object store.
func TestCreateSurvivesEachFailedObjectCall(t *testing.T) {
	for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
		for n := range 6 {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				col, _, _ := e.collection(r, "c")
				e.add(r, col, e.segment(r, col, 0, 1, 2))
				e.checkpoint(r, col, 10, 10)
				r.store.FailNth("", n, fault)
				s, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
				if err != nil || s.State != snapshot.Committed {
					t.Errorf("fault %v at call %d: %v, err = %v", fault, n, s, err)
				}
				r.store.Plan(nil)
				settle()
				e.check(r)
			})
		}
	}
}

func TestCreateFailsWhenTheObjectStoreIsLost(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		r.store.Plan(func(object.Call) object.Fault { return object.FaultBefore })
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, ErrCreateAborted)
		r.store.Plan(nil)
		time.Sleep(5 * time.Minute)
		settle()
		e.check(r)
		e.create(r, col, "x")
	})
}

// TestCreateAndAlteredAnswers loses the answer to each object write and alters the
// read-back twice.
func TestCreateAndAlteredAnswers(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2))
		e.checkpoint(r, col, 10, 10)
		seen := map[string]int{}
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op != object.OpCreate && c.Op != object.OpGet {
				return object.FaultNone
			}
			seen[c.Keys[0]+string(c.Op)]++
			switch n := seen[c.Keys[0]+string(c.Op)]; {
			case c.Op == object.OpCreate && n == 1:
				return object.FaultAfter
			case c.Op == object.OpGet && n <= 2:
				return object.FaultFlip
			}
			return object.FaultNone
		})
		e.create(r, col, "x")
		r.store.Plan(nil)
		settle()
		e.check(r)
		if len(seen) < 6 {
			t.Errorf("not all objects were read back: %v", seen)
		}
	})
}

// TestForeignObjectIsNotOverwritten checks that an object of another program under a
// key of a create fails that create only.
func TestForeignObjectIsNotOverwritten(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", withEpoch)
		col, _, _ := e.collection(r, "c")
		next := e.newID(r) + 1
		key := manifest.RefsKey(col.ID, next)
		if _, err := e.objects.Put(t.Context(), key, []byte("foreign")); err != nil {
			t.Fatal(err)
		}
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, object.ErrExists)
		e.create(r, col, "y")
		if behind, err := r.Collector.RolledBack(t.Context()); err != nil || behind != "" {
			t.Errorf("behind: %q, %v", behind, err)
		}
	})
}

// TestReusedIDRaisesAlarm checks that a create that finds an object of snapshotd under
// its new id stops all allocations.
func TestReusedIDRaisesAlarm(t *testing.T) {
	refs, err := manifest.EncodeRefs(&manifest.Refs{Segments: []int64{7}})
	if err != nil {
		t.Fatal(err)
	}
	for name, body := range map[string]func(col, id int64) (string, []byte){
		"refs": func(col, id int64) (string, []byte) { return manifest.RefsKey(col, id), refs },
		"metadata": func(col, id int64) (string, []byte) {
			md, err := manifest.EncodeMetadata(&manifest.Metadata{
				Snapshot: manifest.SnapshotInfo{ID: id}, Collection: manifest.CollectionInfo{ID: col},
				Refs: manifest.RefsFile{File: manifest.RefsName},
			})
			if err != nil {
				t.Fatal(err)
			}
			return manifest.MetadataKey(col, id), md
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", withEpoch)
				col, _, _ := e.collection(r, "c")
				key, data := body(col.ID, e.newID(r)+1)
				if _, err := e.objects.Put(t.Context(), key, data); err != nil {
					t.Fatal(err)
				}
				_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
				wantError(t, err, epoch.ErrRolledBack)
				_, err = r.Create(t.Context(), request.Token{}, spec(col, "y"))
				wantError(t, err, epoch.ErrRolledBack)
				_, err = r.catalog.AllocateIDs(t.Context(), request.Token{}, 1)
				wantError(t, err, epoch.ErrRolledBack)
			})
		})
	}
}

// TestOwnObjectRaisesNoAlarm loses the answer to each object write, and fails or alters
// the read-back. Neither proves that the id was allocated before.
func TestOwnObjectRaisesNoAlarm(t *testing.T) {
	for name, fault := range map[string]object.Fault{"no answer": object.FaultBefore, "altered": object.FaultFlip} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", withEpoch)
				col, _, _ := e.collection(r, "c")
				gets := 0
				r.store.Plan(func(c object.Call) object.Fault {
					switch {
					case len(c.Keys) == 0 || !strings.HasPrefix(c.Keys[0], "snapshots/"):
					case c.Op == object.OpCreate:
						return object.FaultAfter
					case c.Op == object.OpGet && (fault == object.FaultFlip || gets < 2*putAttempts):
						gets++
						return fault
					}
					return object.FaultNone
				})
				_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
				r.store.Plan(nil)
				switch fault {
				case object.FaultFlip:
					wantError(t, err, object.ErrExists)
				default:
					if err != nil {
						t.Error(err)
					}
				}
				if behind, err := r.Collector.RolledBack(t.Context()); err != nil || behind != "" {
					t.Errorf("behind: %q, %v", behind, err)
				}
				e.create(r, col, "y")
			})
		})
	}
}

func TestStoreLostDuringCreate(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2))
		e.checkpoint(r, col, 10, 10)
		var lost atomic.Bool
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodScan && len(e.keysUnder(pendingKeys)) > 0 {
				lost.Store(true)
			}
			if lost.Load() {
				return meta.Before
			}
			return meta.NoFault
		})
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		wantError(t, err, meta.ErrUnavailable)
		if !lost.Load() {
			t.Fatal("the store was not lost")
		}
		_, err = r.Get(t.Context(), Ref{Name: "x"})
		wantError(t, err, meta.ErrUnavailable)
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, meta.ErrUnavailable)
		r.kv.Hook(nil)
		time.Sleep(5 * time.Minute)
		settle()
		if n := len(e.check(r)); n != 0 {
			t.Errorf("%d snapshots", n)
		}
		e.create(r, col, "x")
	})
}

func TestCreateWaitsForItsTurn(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.MaxCreates = 2 })
		col, _, _ := e.collection(r, "c")
		r.store.SetLatency(time.Second)
		done := make(chan error, 6)
		begin := time.Now()
		for i := range 6 {
			go func() {
				_, err := r.Create(t.Context(), request.Token{}, spec(col, fmt.Sprintf("s%d", i)))
				done <- err
			}()
		}
		virtual.Wait()
		if n := r.Stats().Creates; n != 2 {
			t.Errorf("%d creates at once, want 2", n)
		}
		for range 6 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(begin); took < 6*time.Second {
			t.Errorf("6 creates of 2 s, 2 at once, took %v", took)
		}
	})
}

// TestCreatesShareOneMemoryBudget runs creates that each need more than half of the
// budget: they run in turn, and none is given up while it waits.
func TestCreatesShareOneMemoryBudget(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		const weight = 16 << 10
		r := e.start("a", func(o *testOptions) { o.CreateMemory = 45 * 2 * weight })
		col, _, _ := e.collection(r, "c")
		for range 40 {
			s := e.segment(r, col, 0, 1, 2)
			s.EngineData = make([]byte, weight)
			if _, err := rand.Read(s.EngineData); err != nil {
				t.Fatal(err)
			}
			e.add(r, col, s)
		}
		e.checkpoint(r, col, 10, 10)
		small, _, _ := e.collection(r, "small")
		r.store.SetLatency(10 * time.Second)
		done := make(chan error, 5)
		for i := range 5 {
			go func() {
				_, err := r.Create(t.Context(), request.Token{}, spec(col, fmt.Sprintf("s%d", i)))
				done <- err
			}()
		}
		settle()
		if n := len(e.keysUnder(pendingKeys)); n != 1 {
			t.Errorf("%d creates have begun, want 1", n)
		}
		begin := time.Now()
		for range 5 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(begin); took < 5*10*time.Second {
			t.Errorf("five creates that each hold the memory for 10 s took %v", took)
		}
		r.store.SetLatency(0)
		e.create(r, small, "an-empty-one")
		e.check(r)
	})
}
