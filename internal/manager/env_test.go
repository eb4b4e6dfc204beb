package manager

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// env is a cluster in memory: the two stores, and replicas that each reach them
// through their own Faulty.
type env struct {
	t       *testing.T
	kv      meta.KV
	memory  *metamemory.Store // the same store if it is the one in memory
	objects object.Store
	now     func() time.Time
	foreign func(key string) bool // objects that are not snapshotd's; nil: none are
}

// testOptions are those of a Manager and of the parts that it runs with. The latter get
// what is shared from the former.
type testOptions struct {
	Options
	Parts replica.Options
}

type testReplica struct {
	*Manager
	*replica.Replica
	kv    *meta.Faulty
	store *object.Faulty
	stop  func()
}

// inEnv runs fn in a bubble of virtual time.
func inEnv(t *testing.T, fn func(t *testing.T, e *env)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		kv := metamemory.New(metamemory.Options{Now: time.Now})
		fn(t, &env{
			t: t, kv: kv, memory: kv, objects: objectmemory.New(objectmemory.Options{Now: time.Now}),
			now: time.Now,
		})
	})
}

func (e *env) start(name string, change ...func(*testOptions)) *testReplica {
	e.t.Helper()
	r := &testReplica{kv: meta.NewFaulty(e.kv), store: object.NewFaulty(e.objects)}
	cl, err := cluster.Open(e.t.Context(), e.kv,
		cluster.Options{NameScope: cluster.ScopeCluster, Release: "test", Now: e.now, Rand: rand.Reader})
	if err != nil {
		e.t.Fatal(err)
	}
	var trusted *clock.Trusted
	requests := request.NewLeases(r.kv, e.now, func(ctx context.Context) (time.Time, error) { return trusted.Stamp(ctx) })
	o := testOptions{Options: Options{Cluster: cl, Release: "test"}}
	o.Shared = replica.Shared{
		KV: r.kv, Stores: map[string]object.Store{"default": r.store}, SnapshotStore: "default",
		Requests: requests, Replica: name, Now: e.now, Rand: rand.Reader, Log: zaptest.NewLogger(e.t).Named(name),
	}
	for _, c := range change {
		c(&o)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{
			KV: o.KV, Clock: clock.Of(o.Now), Store: o.Stores[o.SnapshotStore], Alias: o.SnapshotStore, Replica: name,
			Log: o.Log,
		})
	}
	trusted = o.Clock
	if o.Catalog == nil {
		o.Catalog = catalog.New(catalog.Options{
			KV: o.KV, Now: o.Now, Stamp: o.Clock.Stamp, Rand: o.Rand, Requests: o.Requests,
			HasStore: func(a string) bool { return a == "default" }, ReadSpilled: catalog.ReadSpilled(o.Stores),
			Spill: catalog.WriteSpilled(o.Stores, "default"),
		})
	}
	r.Replica, r.Manager = e.make(o)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Replica.Run(ctx, r.Manager) }()
	stopped := false
	r.stop = func() {
		if stopped {
			return
		}
		stopped = true
		r.kv.Thaw()
		cancel()
		r.store.Thaw()
		if err := <-done; err != nil {
			e.t.Errorf("run %s: %v", name, err)
		}
	}
	e.t.Cleanup(r.stop)
	<-r.running
	return r
}

// atLeisure makes the background loops slower, for tests in which days pass.
func atLeisure(o *testOptions) {
	o.Parts.LeaderTTL, o.CleanInterval, o.Parts.Collector.Interval = 10*time.Minute, 10*time.Minute, 10*time.Minute
}

// make makes a replica that is not run.
func (e *env) make(o testOptions) (*replica.Replica, *Manager) {
	e.t.Helper()
	o.Parts.Shared, o.Parts.Interval = o.Shared, o.CleanInterval
	r, err := replica.New(o.Parts)
	if err != nil {
		e.t.Fatal(err)
	}
	o.Shared, o.Snapshots, o.GC, o.Collector, o.Jobs = r.Shared, r.Snapshots, r.GC, r.Collector, r.Jobs
	return r, New(o.Options)
}

// collection makes a collection with two channels, a partition and an index.
func (e *env) collection(r *testReplica, name string) (catalog.Collection, catalog.Partition, catalog.Index) {
	e.t.Helper()
	ctx := e.t.Context()
	col, err := r.catalog.CreateCollection(ctx, request.Token{}, catalog.Collection{
		DB: "default", Name: name, Channels: []string{"ch-0", "ch-1"},
		Roots:      []catalog.Root{{Store: "default", Prefix: "data/"}},
		Properties: map[string]string{"mmap": "true"}, Consistency: "Bounded",
		Schema: catalog.Schema{
			Format: "test", Raw: []byte{0, 1, 2},
			Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}},
		},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	ref := catalog.Ref{ID: col.ID}
	p, err := r.catalog.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{Name: "p0"})
	if err != nil {
		e.t.Fatal(err)
	}
	x, err := r.catalog.CreateIndex(ctx, request.Token{}, ref, catalog.Index{Name: "x0", Field: 100})
	if err != nil {
		e.t.Fatal(err)
	}
	return col, p, x
}

func (e *env) newID(r *testReplica) int64 {
	e.t.Helper()
	id, err := r.catalog.NextID(e.t.Context())
	if err != nil {
		e.t.Fatal(err)
	}
	return id
}

// segment returns a flushed segment with one file of rows [from, to] on a channel.
func (e *env) segment(
	r *testReplica, col catalog.Collection, channel int, from, to segment.Timestamp,
) segment.Segment {
	s := segment.Segment{
		ID: e.newID(r), Channel: channel, Level: 1, State: segment.Flushed, Rows: int64(to-from) + 1,
		Start: segment.Position{Timestamp: from}, DML: segment.Position{Timestamp: to + 1},
	}
	f := segment.File{
		Kind: segment.KindInsert, Field: 100, LogID: 1, MinTimestamp: from,
		MaxTimestamp: to, Entries: s.Rows, Size: 10,
	}
	f.Path = catalog.NativePath(col.ID, &s, &f)
	s.Files = []segment.File{f}
	return s
}

func (e *env) add(r *testReplica, col catalog.Collection, segments ...segment.Segment) {
	e.t.Helper()
	if _, _, err := r.catalog.AddSegments(e.t.Context(), col.ID, segments); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) checkpoint(r *testReplica, col catalog.Collection, at ...segment.Timestamp) {
	e.t.Helper()
	var list []catalog.Checkpoint
	for shard, ts := range at {
		list = append(list, catalog.Checkpoint{
			Shard:    shard,
			Position: segment.Position{Timestamp: ts, Opaque: []byte{byte(shard)}},
		})
	}
	if _, err := r.catalog.SetCheckpoints(e.t.Context(), catalog.Ref{ID: col.ID}, list); err != nil {
		e.t.Fatal(err)
	}
}

func token(value, about string) request.Token {
	h := sha256.Sum256([]byte(about))
	return request.Token{Principal: "local", Method: "CreateSnapshot", Value: value, Hash: h[:]}
}

func spec(col catalog.Collection, name string) CreateSpec {
	return CreateSpec{Collection: catalog.Ref{ID: col.ID}, Name: name}
}

func (e *env) create(r *testReplica, col catalog.Collection, name string) *snapshot.Record {
	e.t.Helper()
	s, err := r.Create(e.t.Context(), request.Token{}, spec(col, name))
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

// segments reads all segments of a snapshot.
func (e *env) segments(r *testReplica, s *snapshot.Record) []segment.Segment {
	e.t.Helper()
	var list []segment.Segment
	err := r.Segments(e.t.Context(), Ref{ID: s.ID}, 0, func(s *snapshot.Segment) bool {
		if s.Ordinal != int64(len(list)) {
			e.t.Errorf("ordinal %d at place %d", s.Ordinal, len(list))
		}
		list = append(list, s.Segment)
		return true
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return list
}

// keysUnder returns the keys of the metadata store under prefix.
func (e *env) keysUnder(prefix string) []string {
	e.t.Helper()
	from, to := meta.Prefix(prefix)
	res, err := e.kv.Range(e.t.Context(), meta.Range{From: from, To: to})
	if err != nil {
		e.t.Fatal(err)
	}
	var list []string
	for _, kv := range res.KVs {
		list = append(list, kv.Key)
	}
	return list
}

// objectsUnder returns the keys of the object store under prefix.
func (e *env) objectsUnder(prefix string) []string {
	e.t.Helper()
	var list []string
	for info, err := range e.objects.List(e.t.Context(), prefix) {
		if err != nil {
			e.t.Fatal(err)
		}
		list = append(list, info.Key)
	}
	return list
}

// settle waits until the background work is idle.
func settle() { virtual.Wait() }

// check checks the stores at rest: every record is COMMITTED with all its objects and
// their digests, and there are no others.
func (e *env) check(r *testReplica) []*snapshot.Record {
	e.t.Helper()
	ctx := e.t.Context()
	all := Filter{States: []snapshot.State{snapshot.Pending, snapshot.Committed, snapshot.Deleting}}
	list, more, err := r.List(ctx, all, Place{}, 10_000)
	if err != nil || more {
		e.t.Fatalf("list: more = %v, err = %v", more, err)
	}
	names := map[string]bool{}
	objects := map[string]bool{}
	for _, s := range list {
		if s.State != snapshot.Committed {
			e.t.Errorf("snapshot %s is %v at rest", s, s.State)
			continue
		}
		got, err := r.Get(ctx, Ref{Name: s.Name})
		if err != nil || got.ID != s.ID {
			e.t.Errorf("the name of %s stands for %v, err = %v", s, got, err)
		}
		names[keys.SnapshotName(0, s.Name)] = true
		d, err := r.Describe(ctx, Ref{ID: s.ID})
		if err != nil {
			e.t.Errorf("describe %s: %v", s, err)
			continue
		}
		if n := len(e.segments(r, s)); int64(n) != s.Totals.Segments {
			e.t.Errorf("snapshot %s has %d segments, says %d", s, n, s.Totals.Segments)
		}
		dir := manifest.Dir(s.Collection, s.ID)
		objects[dir+manifest.MetadataName], objects[dir+manifest.RefsName] = true, true
		for _, mf := range d.Metadata.Manifests {
			objects[dir+mf.File] = true
		}
		data, err := object.ReadAll(ctx, e.objects, dir+manifest.RefsName, d.Metadata.Refs.Length)
		if err == nil {
			_, err = manifest.DecodeRefs(data, d.Metadata.Refs)
		}
		if err != nil {
			e.t.Errorf("references of %s: %v", s, err)
		}
	}
	for _, key := range e.keysUnder("/snapshot/name/") {
		if !names[key] {
			e.t.Errorf("%s stands for nothing", key)
		}
	}
	for _, key := range e.keysUnder(pendingKeys) {
		e.t.Errorf("%s at rest", key)
	}
	for _, key := range e.objectsUnder("snapshots/") {
		if !objects[key] && key != identity.Key && (e.foreign == nil || !e.foreign(key)) {
			e.t.Errorf("object %s belongs to nothing", key)
		}
	}
	return list
}

func wantError(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func errText(err error) string { return fmt.Sprint(err) }
