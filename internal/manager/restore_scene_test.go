package manager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// rich makes a collection of two partitions and two indexes with n segments of
// all sorts whose files are there: of all partitions, with builds, with files of
// every kind, some that straddle the cut, which is 10, with ETags that are known
// and that are not.
func (w *testEnv) richCollection(r *replica, name string, n int) catalog.Collection {
	w.t.Helper()
	ctx := w.t.Context()
	col, p0, x0 := w.collection(r, name)
	ref := catalog.Ref{ID: col.ID}
	p1, err := r.catalog.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{Name: "p1", Attributes: map[string]string{"a": "b"}})
	if err != nil {
		w.t.Fatal(err)
	}
	x1, err := r.catalog.CreateIndex(ctx, request.Token{}, ref, catalog.Index{
		Name: "x1", Field: 100, TypeParams: map[string]string{"mmap.enabled": "true", "dim": "8"},
		IndexParams: map[string]string{"index_type": "HNSW"}, Attributes: map[string]string{"c": "d"},
	})
	if err != nil {
		w.t.Fatal(err)
	}
	kinds := []string{segment.KindDelta, segment.KindStats, segment.KindBM25, segment.KindText, segment.KindJSON, "of-an-engine"}
	var list []segment.Segment
	for i := range n {
		to := segment.Timestamp(9)
		if i%5 == 3 {
			to = 15 // straddles
		}
		s := w.segment(r, col, i%2, 1, to)
		s.Partition = []int64{p0.ID, p1.ID, 0}[i%3]
		s.EngineData, s.Attributes = []byte{byte(i), 0}, map[string]string{"i": fmt.Sprint(i)}
		s.Files = append(s.Files, segment.File{
			Kind: kinds[i%len(kinds)], Field: 100, LogID: int64(i), Size: 10, Attributes: map[string]string{"of": fmt.Sprint(i)},
			Checksum: segment.Checksum{Type: "X", Value: []byte{byte(i)}},
		})
		if i%4 == 1 {
			for _, x := range []catalog.Index{x0, x1} {
				s.Builds = append(s.Builds, segment.Build{
					ID: w.newID(r), Index: x.ID, Field: 100, Params: map[string]string{"n": fmt.Sprint(i)},
					Files: []segment.File{{Kind: segment.KindIndex, Field: 100, LogID: int64(i), Size: 10}},
				})
			}
		}
		w.putFiles(col.ID, &s)
		if i%12 < 6 { // the engine did not say
			for f := range s.AllFiles() {
				f.ETag = ""
			}
		}
		list = append(list, s)
	}
	w.add(r, col, list...)
	w.checkpoint(r, col, 10, 10)
	return col
}

// place gives the files of a segment their paths, and writes them.
func (w *testEnv) putFiles(collection int64, s *segment.Segment) {
	w.t.Helper()
	for i := range s.Files {
		s.Files[i].Path = catalog.NativePath(collection, s, &s.Files[i])
	}
	for b := range s.Builds {
		for i := range s.Builds[b].Files {
			f := &s.Builds[b].Files[i]
			f.Path = fmt.Sprintf("%d/%d/%d/index/%d/%d-%d", collection, s.Partition, s.ID, s.Builds[b].ID, f.Field, f.LogID)
		}
	}
	for f := range s.AllFiles() {
		info, err := w.objects.Put(w.t.Context(), "data/"+f.Path, tenBytes(f.Path))
		if err != nil {
			w.t.Fatal(err)
		}
		f.ETag = info.ETag
	}
}

// restoreSpecOf restores a snapshot to default/copy.
func restoreSpecOf(s *Snapshot) *RestoreSpec {
	return &RestoreSpec{Snapshot: Ref{ID: s.ID}, DB: "default", Name: "copy"}
}

func (w *testEnv) restore(r *replica, sp *RestoreSpec) *copyjob.Job {
	w.t.Helper()
	job, err := r.Restore(w.t.Context(), request.Token{}, sp)
	if err != nil {
		w.t.Fatal(err)
	}
	return job
}

// traces is what there is in the stores, to compare with later.
type storeContents struct {
	keys    map[string]bool
	objects map[string]bool
}

func (w *testEnv) contents() storeContents {
	w.t.Helper()
	tr := storeContents{map[string]bool{}, map[string]bool{}}
	for _, key := range w.keysUnder("/") {
		tr.keys[key] = true
	}
	for _, key := range w.objectsUnder("") {
		tr.objects[key] = true
	}
	return tr
}

// passing are keys that come and go, or stay behind, whatever a restore does.
var transientKeys = []string{keys.IDs, "/election/", keys.WorkerPrefix, "/request/", keys.Unpin, keys.JobPrefix, keys.Cycle, keys.OwnerRangePrefix, keys.GonePrefix, keys.Clock}

// nothingSince holds that the stores are as they were before a restore.
func (w *testEnv) checkNoTraces(before storeContents) {
	w.t.Helper()
	after := w.contents()
	ignore := func(key string, _ bool) bool {
		return slices.ContainsFunc(transientKeys, func(p string) bool { return strings.HasPrefix(key, p) })
	}
	maps.DeleteFunc(after.keys, ignore)
	was := maps.Clone(before.keys)
	maps.DeleteFunc(was, ignore)
	if diff := cmp.Diff(was, after.keys); diff != "" {
		w.t.Errorf("keys are left, or gone: %s", diff)
	}
	if diff := cmp.Diff(before.objects, after.objects); diff != "" {
		w.t.Errorf("objects are left, or gone: %s", diff)
	}
}

// reader reads a file of the object store whole.
func (w *testEnv) readObject(key string) []byte {
	w.t.Helper()
	body, _, err := w.objects.Get(w.t.Context(), key, 0, -1)
	if err != nil {
		w.t.Errorf("read %s: %v", key, err)
		return nil
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(body)
	if err != nil {
		w.t.Errorf("read %s: %v", key, err)
	}
	return data
}

// like is a segment without what a restore changes of it.
func comparableSegment(s segment.Segment, partitions, indexes map[int64]string) any {
	type named struct {
		Segment           segment.Segment
		Partition         string
		Indexes, Kinds    []string
		Fields, LogIDs    []int64
		Sizes, Entries    []int64
		Min, Max          []segment.Timestamp
		Checksums, Params []string
	}
	out := named{Partition: partitions[s.Partition]}
	for f := range s.AllFiles() {
		out.Kinds, out.Sizes = append(out.Kinds, f.Kind), append(out.Sizes, f.Size)
		out.Fields, out.LogIDs, out.Entries = append(out.Fields, f.Field), append(out.LogIDs, f.LogID), append(out.Entries, f.Entries)
		out.Min, out.Max = append(out.Min, f.MinTimestamp), append(out.Max, f.MaxTimestamp)
		out.Checksums = append(out.Checksums, fmt.Sprint(f.Checksum, f.Attributes, f.Root))
	}
	for _, b := range s.Builds {
		out.Indexes, out.Params = append(out.Indexes, indexes[b.Index]), append(out.Params, fmt.Sprint(b.Field, b.Params))
	}
	s.ID, s.Partition, s.Files, s.Builds, s.State = 0, 0, nil, nil, 0
	out.Segment = s
	return out
}

// restored holds that a job that is COMPLETED made all that it should, and
// nothing besides. It works with the stores alone.
func (w *testEnv) checkRestored(r *replica, before storeContents, job *copyjob.Job, sp *RestoreSpec) {
	w.t.Helper()
	cat := catalog.New(catalog.Options{KV: w.kv, Now: w.now})
	d, err := r.Describe(w.t.Context(), sp.Snapshot)
	if err != nil {
		w.t.Fatal(err)
	}
	md := d.Metadata
	view, err := cat.At(w.t.Context(), job.Target, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	w.checkTarget(&view, md, sp)

	names, targetNames := map[int64]string{0: ""}, map[int64]string{0: ""}
	for _, p := range md.Partitions {
		names[p.ID] = p.Name
	}
	for _, p := range view.Partitions {
		targetNames[p.ID] = p.Name
	}
	indexes, targetIndexes := map[int64]string{}, map[int64]string{}
	for _, x := range md.Indexes {
		indexes[x.ID] = x.Name
	}
	for _, x := range view.Indexes {
		targetIndexes[x.ID] = x.Name
	}
	var want, got []segment.Segment
	for _, s := range w.segments(r, d.Snapshot) {
		if s.Partition != 0 && len(sp.Partitions) > 0 && !slices.Contains(sp.Partitions, names[s.Partition]) {
			continue
		}
		if sp.SkipIndexes {
			s.Builds = nil
		}
		want = append(want, s)
	}
	if _, err := cat.ScanSegments(w.t.Context(), job.Target, 0, func(batch []segment.Segment) error {
		got = append(got, batch...)
		return nil
	}); err != nil {
		w.t.Fatal(err)
	}
	if len(got) != len(want) {
		w.t.Fatalf("%d segments, want %d", len(got), len(want))
	}
	made := map[string]bool{}
	ids := map[int64]bool{}
	for i := range got {
		if diff := cmp.Diff(comparableSegment(want[i], names, indexes), comparableSegment(got[i], targetNames, targetIndexes)); diff != "" {
			w.t.Errorf("segment %d of segment %d: %s", got[i].ID, want[i].ID, diff)
		}
		if got[i].State != segment.Flushed {
			w.t.Errorf("segment %d is %v", got[i].ID, got[i].State)
		}
		for _, id := range append([]int64{got[i].ID}, buildIDs(&got[i])...) {
			if ids[id] || id <= d.Snapshot.ID {
				w.t.Errorf("id %d is not fresh", id)
			}
			ids[id] = true
		}
		sources := slices.Collect(want[i].AllFiles())
		n := 0
		for f := range got[i].AllFiles() {
			src := sources[n]
			n++
			from, to := view.Collection.Roots[src.Root].Prefix+src.Path, view.Collection.Roots[f.Root].Prefix+f.Path
			if made[to] || from == to {
				w.t.Errorf("%s is there twice", to)
			}
			made[to] = true
			if !bytes.Equal(w.readObject(from), w.readObject(to)) {
				w.t.Errorf("%s is not like %s", to, from)
			}
			if info, err := w.objects.Head(w.t.Context(), to); err != nil || info.ETag != f.ETag || info.Size != f.Size {
				w.t.Errorf("%s: %+v, err = %v; the catalog says ETag %q", to, info, err, f.ETag)
			}
		}
	}
	for _, key := range w.objectsUnder("") {
		if strings.HasPrefix(key, catalog.RestoreDir(job.ID)) { // it goes with the job's record
			continue
		}
		if !made[key] && !before.objects[key] {
			w.t.Errorf("object %s belongs to nothing", key)
		}
	}
	for _, prefix := range []string{"/job/task/", "/job/progress/", "/job/limits/", keys.AssignedPrefix, keys.PinPrefix(job.Snapshot)} {
		for _, key := range w.keysUnder(prefix) {
			w.t.Errorf("%s is left", key)
		}
	}
}

func buildIDs(s *segment.Segment) []int64 {
	var ids []int64
	for i := range s.Builds {
		ids = append(ids, s.Builds[i].ID)
	}
	return ids
}

// likeSource holds that a target is what the snapshot says, less ids and names.
func (w *testEnv) checkTarget(view *catalog.View, md *manifest.Metadata, sp *RestoreSpec) {
	w.t.Helper()
	src, col := &md.Collection, &view.Collection
	if col.State != catalog.Active || col.Job != 0 || col.DB != sp.DB || col.Name != sp.Name || col.ID == src.ID {
		w.t.Errorf("the target is %+v", col)
	}
	if len(sp.Properties) == 0 && !maps.Equal(col.Properties, src.Properties) {
		w.t.Errorf("properties %v, want %v", col.Properties, src.Properties)
	}
	if col.Consistency != src.ConsistencyLevel || col.Schema.Format != src.Schema.Format || !bytes.Equal(col.Schema.Raw, src.Schema.Raw) ||
		!maps.Equal(col.Attributes, src.Attributes) || col.Layout.String() != src.Layout {
		w.t.Errorf("target %+v, source %+v", col, src)
	}
	var fields []manifest.Field
	for _, f := range col.Schema.Fields {
		fields = append(fields, manifest.Field(f))
	}
	if diff := cmp.Diff(src.Schema.Fields, fields); diff != "" {
		w.t.Errorf("schema: %s", diff)
	}
	var roots []manifest.Root
	for i, root := range col.Roots {
		roots = append(roots, manifest.Root{Number: i, Store: root.Store, Prefix: root.Prefix})
	}
	if diff := cmp.Diff(md.Roots, roots); diff != "" {
		w.t.Errorf("roots: %s", diff)
	}
	var channels []string
	checkpoints := map[int]segment.Position{}
	for _, c := range md.Channels {
		if c.Name != "" {
			channels = append(channels, c.Name)
		}
		if c.Cut > 0 && c.Cut < segment.MaxTimestamp {
			checkpoints[c.Shard] = segment.Position{Timestamp: c.Cut, Opaque: c.Opaque}
		}
	}
	if len(sp.Channels) > 0 {
		channels = sp.Channels
	}
	if !slices.Equal(channels, col.Channels) {
		w.t.Errorf("channels %q, want %q", col.Channels, channels)
	}
	for shard, want := range checkpoints {
		if diff := cmp.Diff(want, view.Checkpoints[shard].Position); diff != "" {
			w.t.Errorf("checkpoint of shard %d: %s", shard, diff)
		}
	}
	if len(channels) > 0 && len(view.Checkpoints) != len(checkpoints) {
		w.t.Errorf("checkpoints %v, want %v", view.Checkpoints, checkpoints)
	}
	var parts, gotParts []manifest.Partition
	for _, p := range md.Partitions {
		if len(sp.Partitions) == 0 || slices.Contains(sp.Partitions, p.Name) {
			parts = append(parts, manifest.Partition{Name: p.Name, Attributes: p.Attributes})
		}
	}
	for _, p := range view.Partitions {
		gotParts = append(gotParts, manifest.Partition{Name: p.Name, Attributes: p.Attributes})
		if p.State != catalog.Active {
			w.t.Errorf("partition %s is %v", p.Name, p.State)
		}
	}
	if diff := cmp.Diff(parts, gotParts); diff != "" {
		w.t.Errorf("partitions: %s", diff)
	}
	var indexes, gotIndexes []manifest.Index
	for _, x := range md.Indexes {
		if sp.SkipIndexes {
			break
		}
		x.ID = 0
		x.TypeParams = maps.Clone(x.TypeParams)
		delete(x.TypeParams, "mmap.enabled")
		indexes = append(indexes, x)
	}
	for _, x := range view.Indexes {
		if x.State != catalog.Active {
			w.t.Errorf("index %s is %v", x.Name, x.State)
		}
		gotIndexes = append(gotIndexes, manifest.Index{
			Name: x.Name, Field: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams, Attributes: x.Attributes,
		})
	}
	if diff := cmp.Diff(indexes, gotIndexes); diff != "" {
		w.t.Errorf("indexes: %s", diff)
	}
}

// outcome judges how a restore ended: with everything or with nothing. Then, of
// one that was canceled, it restores to the name again, and drops the snapshot.
func (w *testEnv) checkOutcome(r *replica, before storeContents, end *copyjob.Status, sp *RestoreSpec) {
	w.t.Helper()
	switch end.Job.State {
	case copyjob.Completed:
		w.checkRestored(r, before, end.Job, sp)
		if end.Fraction != 1 || end.Done != end.Job.Totals {
			w.t.Errorf("COMPLETED with %+v", end)
		}
	case copyjob.Failed, copyjob.Canceled:
		w.checkNoTraces(before)
		if end.Fraction >= 1 || end.Job.Reason == "" || end.Job.Message == "" {
			w.t.Errorf("%v with %+v of %+v", end.Job.State, end, end.Job)
		}
	default:
		w.t.Fatalf("it ended %v", end.Job.State)
	}
	if end.Job.State == copyjob.Canceled {
		w.checkNextRestore(r, before, sp)
	}
	if _, err := r.Drop(w.t.Context(), request.Token{}, sp.Snapshot, 0); err != nil {
		w.t.Errorf("drop the snapshot: %v", err)
	}
}

// again restores to a name that a job that is over left free.
func (w *testEnv) checkNextRestore(r *replica, before storeContents, sp *RestoreSpec) {
	w.t.Helper()
	job := w.restore(r, sp)
	if end := w.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
		w.t.Errorf("the next restore ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
		return
	}
	w.checkRestored(r, before, job, sp)
}

// grave is where a replica goes that is killed at a write or a request: from
// then on nothing that it does has an effect. It is stopped by bury.
type killer struct {
	mu    sync.Mutex
	dead  bool
	fired int
	done  chan struct{} // closed when it is dead
}

func newKiller() *killer { return &killer{done: make(chan struct{})} }

func (g *killer) fire(kill bool) {
	g.fired++
	if kill && !g.dead {
		g.dead = true
		close(g.done)
	}
}

// atWrite has the n-th write from now on fail, and kills the replica with it if
// kill is true.
func (g *killer) failWrite(r *replica, n int, fault meta.Fault, kill bool) {
	r.kv.Hook(func(c meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		switch {
		case g.dead:
			return meta.Before
		case c.Method != meta.MethodTxn:
			return meta.NoFault
		}
		if n--; n != -1 {
			return meta.NoFault
		}
		g.fire(kill)
		return fault
	})
	r.store.Plan(func(object.Call) object.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return object.FaultBefore
		}
		return object.FaultNone
	})
}

// atRequest has the n-th request to the object store from now on fail, n+1 and
// all that follow too if times is below 0, and kills the replica with it if kill
// is true.
func (g *killer) failRequest(r *replica, n int, fault object.Fault, times int, kill bool) {
	r.kv.Hook(func(meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return meta.Before
		}
		return meta.NoFault
	})
	r.store.Plan(func(object.Call) object.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.dead {
			return object.FaultBefore
		}
		if n--; n >= 0 || times == 0 {
			return object.FaultNone
		}
		times--
		g.fire(kill)
		return fault
	})
}

func (g *killer) isDead() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.dead
}

func (g *killer) faults() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.fired
}

// lift ends all faults.
func (r *replica) clearFaults() {
	r.kv.Hook(nil)
	r.store.Plan(nil)
}

// endedOrDead waits until the only job there is has ended, or the replica that
// works on it is dead. It is false when the latter.
func (w *testEnv) waitEndedOrDead(g *killer) bool {
	w.t.Helper()
	deadline := time.Now().Add(2 * time.Hour)
	for {
		settle()
		if g.isDead() {
			return false
		}
		if jobs := w.jobs(); len(jobs) > 0 && jobs[len(jobs)-1].State.Ended() {
			return true
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("the job does not end: %+v", w.jobs())
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// copying waits until a task is assigned.
func (w *testEnv) waitAssigned() {
	w.t.Helper()
	for range 1000 {
		settle()
		if len(w.keysUnder(keys.AssignedPrefix)) > 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	w.t.Fatal("no task is assigned")
}

// jobs are the jobs there are.
func (w *testEnv) jobs() []*copyjob.Job {
	w.t.Helper()
	from, to := meta.Prefix(keys.JobPrefix)
	res, err := w.kv.Range(w.t.Context(), meta.Range{From: from, To: to})
	if err != nil {
		w.t.Fatal(err)
	}
	var list []*copyjob.Job
	for _, kv := range res.KVs {
		job, err := copyjob.DecodeJob(kv)
		if err != nil {
			w.t.Fatal(err)
		}
		list = append(list, job)
	}
	return list
}

// definitely restores until there is an answer, with a token.
func (w *testEnv) mustRestore(r *replica, tok request.Token, sp *RestoreSpec) *copyjob.Job {
	w.t.Helper()
	for {
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
		job, err := r.Restore(ctx, tok, sp)
		cancel()
		if err == nil {
			return job
		}
		if !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, object.ErrUnavailable) {
			w.t.Fatal(err)
		}
		time.Sleep(time.Second)
	}
}

// eachOf counts up until fn says that there was nothing any more.
func forEachFault(t *testing.T, limit int, fn func(n int) bool) int {
	t.Helper()
	n := 0
	for ; fn(n); n++ {
		if t.Failed() {
			t.Fatalf("number %d went wrong", n)
		}
		if n == limit {
			t.Fatal("there is no end of them")
		}
	}
	return n
}

var noToken request.Token

// writesFail has all transactions fail from now on.
func failAllWrites(g *killer, r *replica) {
	r.kv.Hook(func(c meta.Call) meta.Fault {
		g.mu.Lock()
		defer g.mu.Unlock()
		if c.Method != meta.MethodTxn {
			return meta.NoFault
		}
		g.fire(false)
		return meta.Before
	})
}

// completes holds that a restore completes and makes all that it should.
func (w *testEnv) mustComplete(r *replica, sp *RestoreSpec) *copyjob.Job {
	w.t.Helper()
	before := w.contents()
	job := w.restore(r, sp)
	end := w.waitEnded(r, job.ID)
	if end.Job.State != copyjob.Completed {
		w.t.Fatalf("it ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
	}
	w.checkRestored(r, before, end.Job, sp)
	return end.Job
}

// fails holds that a restore fails by a reason, with a message that names what is
// to blame, and leaves nothing.
func (w *testEnv) mustFail(r *replica, sp *RestoreSpec, reason, names string) *copyjob.Status {
	w.t.Helper()
	before := w.contents()
	job := w.restore(r, sp)
	end := w.waitEnded(r, job.ID)
	if end.Job.State != copyjob.Failed || end.Job.Reason != reason || !strings.Contains(end.Job.Message, names) {
		w.t.Errorf("it ended %v: %s: %s; want %s with %q", end.Job.State, end.Job.Reason, end.Job.Message, reason, names)
	}
	w.checkNoTraces(before)
	return end
}

func dropErr(r *replica, s *Snapshot) error {
	_, err := r.Drop(context.Background(), noToken, Ref{ID: s.ID}, 0)
	return err
}
