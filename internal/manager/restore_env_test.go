package manager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// filledCollection creates a collection with n segments and writes their files.
func (e *env) filledCollection(r *testReplica, name string, n int) catalog.Collection {
	e.t.Helper()
	col, part, index := e.collection(r, name)
	for i := range n {
		s := e.segment(r, col, i%2, 1, 9)
		if i%3 == 0 {
			s.Partition = part.ID
			s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
		}
		if i%4 == 1 {
			build := segment.Build{ID: e.newID(r), Index: index.ID, Field: 100}
			f := segment.File{Kind: segment.KindIndex, Field: 100, LogID: int64(i), Size: 10}
			f.Path = catalog.NativePath(col.ID, &s, &f)
			build.Files = []segment.File{f}
			s.Builds = []segment.Build{build}
		}
		for f := range s.AllFiles() {
			e.putFile(f.Path)
		}
		e.add(r, col, s)
	}
	e.checkpoint(r, col, 10, 10)
	return col
}

// putFile writes the ten bytes of a file, which depend on its path.
func (e *env) putFile(path string) {
	e.t.Helper()
	if _, err := e.objects.Put(e.t.Context(), "data/"+path, tenBytes(path)); err != nil {
		e.t.Fatal(err)
	}
}

// tenBytes returns ten bytes that depend on the path.
func tenBytes(path string) []byte {
	sum := uint64(14695981039346656037)
	for _, c := range []byte(path) {
		sum = (sum ^ uint64(c)) * 1099511628211
	}
	b := make([]byte, 10)
	for i := range b {
		b[i] = 'a' + byte(sum>>(5*i)&15)
	}
	return b
}

// richCollection creates a collection with two partitions, two indexes and n segments of
// every form, and writes their files: segments in each partition and in none, with builds,
// with files of every kind, some across the cut (10), with and without registered ETags.
func (e *env) richCollection(r *testReplica, name string, n int) catalog.Collection {
	e.t.Helper()
	ctx := e.t.Context()
	col, p0, x0 := e.collection(r, name)
	ref := catalog.Ref{ID: col.ID}
	p1, err := r.catalog.CreatePartition(ctx, request.Token{}, ref, catalog.Partition{
		Name: "p1", Attributes: map[string]string{"a": "b"},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	x1, err := r.catalog.CreateIndex(ctx, request.Token{}, ref, catalog.Index{
		Name: "x1", Field: 100, TypeParams: map[string]string{"mmap.enabled": "true", "dim": "8"},
		IndexParams: map[string]string{"index_type": "HNSW"}, Attributes: map[string]string{"c": "d"},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	kinds := []string{
		segment.KindDelta, segment.KindStats, segment.KindBM25, segment.KindText, segment.KindJSON, "of-an-engine",
	}
	var list []segment.Segment
	for i := range n {
		to := segment.Timestamp(9)
		if i%5 == 3 {
			to = 15 // straddles
		}
		s := e.segment(r, col, i%2, 1, to)
		s.Partition = []int64{p0.ID, p1.ID, 0}[i%3]
		s.EngineData, s.Attributes = []byte{byte(i), 0}, map[string]string{"i": fmt.Sprint(i)}
		s.Files = append(s.Files, segment.File{
			Kind: kinds[i%len(kinds)], Field: 100, LogID: int64(i), Size: 10,
			Attributes: map[string]string{"of": fmt.Sprint(i)}, Checksum: segment.Checksum{Type: "X", Value: []byte{byte(i)}},
		})
		if i%4 == 1 {
			for _, x := range []catalog.Index{x0, x1} {
				s.Builds = append(s.Builds, segment.Build{
					ID: e.newID(r), Index: x.ID, Field: 100, Params: map[string]string{"n": fmt.Sprint(i)},
					Files: []segment.File{{Kind: segment.KindIndex, Field: 100, LogID: int64(i), Size: 10}},
				})
			}
		}
		e.putFiles(col.ID, &s)
		if i%12 < 6 { // not registered
			for f := range s.AllFiles() {
				f.ETag = ""
			}
		}
		list = append(list, s)
	}
	e.add(r, col, list...)
	e.checkpoint(r, col, 10, 10)
	return col
}

// putFiles sets the paths of a segment's files and writes them.
func (e *env) putFiles(collection int64, s *segment.Segment) {
	e.t.Helper()
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
		info, err := e.objects.Put(e.t.Context(), "data/"+f.Path, tenBytes(f.Path))
		if err != nil {
			e.t.Fatal(err)
		}
		f.ETag = info.ETag
	}
}

// restoreSpecOf returns the spec of a restore to default/copy.
func restoreSpecOf(s *snapshot.Record) *RestoreSpec {
	return &RestoreSpec{Snapshot: Ref{ID: s.ID}, DB: "default", Name: "copy"}
}

// restore starts a restore.
func (e *env) restore(r *testReplica, sp *RestoreSpec) *copyjob.Job {
	e.t.Helper()
	job, err := r.Restore(e.t.Context(), request.Token{}, sp)
	if err != nil {
		e.t.Fatal(err)
	}
	return job
}

// mustRestore repeats a restore with its token until it is answered.
func (e *env) mustRestore(r *testReplica, tok request.Token, sp *RestoreSpec) *copyjob.Job {
	e.t.Helper()
	for {
		ctx, cancel := context.WithTimeout(e.t.Context(), time.Minute)
		job, err := r.Restore(ctx, tok, sp)
		cancel()
		if err == nil {
			return job
		}
		if !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, object.ErrUnavailable) {
			e.t.Fatal(err)
		}
		time.Sleep(time.Second)
	}
}

// waitEnded waits for the end of a job.
func (e *env) waitEnded(r *testReplica, id int64) *copyjob.Status {
	e.t.Helper()
	ctx, cancel := context.WithTimeout(e.t.Context(), time.Hour)
	defer cancel()
	var last *copyjob.Status
	if err := r.Jobs.Watch(ctx, id, time.Millisecond, func(s *copyjob.Status) error {
		last = s
		return nil
	}); err != nil {
		e.t.Fatal(err)
	}
	return last
}

// waitAssigned waits until a task is assigned.
func (e *env) waitAssigned() {
	e.t.Helper()
	for range 1000 {
		settle()
		if len(e.keysUnder(keys.AssignedPrefix)) > 0 {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	e.t.Fatal("no task is assigned")
}

// jobs returns all jobs.
func (e *env) jobs() []*copyjob.Job {
	e.t.Helper()
	from, to := meta.Prefix(keys.JobPrefix)
	res, err := e.kv.Range(e.t.Context(), meta.Range{From: from, To: to})
	if err != nil {
		e.t.Fatal(err)
	}
	var list []*copyjob.Job
	for _, kv := range res.KVs {
		job, err := copyjob.DecodeJob(kv)
		if err != nil {
			e.t.Fatal(err)
		}
		list = append(list, job)
	}
	return list
}

func dropErr(r *testReplica, s *snapshot.Record) error {
	_, err := r.Drop(context.Background(), noToken, Ref{ID: s.ID}, 0)
	return err
}

var noToken request.Token

// storeContents has the keys of both stores, to compare them later.
type storeContents struct {
	keys    map[string]bool
	objects map[string]bool
}

// contents returns the keys of both stores.
func (e *env) contents() storeContents {
	e.t.Helper()
	tr := storeContents{map[string]bool{}, map[string]bool{}}
	for _, key := range e.keysUnder("/") {
		tr.keys[key] = true
	}
	for _, key := range e.objectsUnder("") {
		tr.objects[key] = true
	}
	return tr
}

// transientKeys are prefixes of keys that change or stay independently of a restore.
var transientKeys = []string{
	keys.IDs, "/election/", keys.WorkerPrefix, "/request/", keys.Unpin, keys.JobPrefix, keys.Cycle,
	keys.OwnerRangePrefix, keys.GonePrefix, keys.Clock,
}

// checkNoTraces checks that the stores are as they were before a restore.
func (e *env) checkNoTraces(before storeContents) {
	e.t.Helper()
	after := e.contents()
	ignore := func(key string, _ bool) bool {
		return slices.ContainsFunc(transientKeys, func(p string) bool { return strings.HasPrefix(key, p) })
	}
	maps.DeleteFunc(after.keys, ignore)
	was := maps.Clone(before.keys)
	maps.DeleteFunc(was, ignore)
	if diff := cmp.Diff(was, after.keys); diff != "" {
		e.t.Errorf("keys differ: %s", diff)
	}
	if diff := cmp.Diff(before.objects, after.objects); diff != "" {
		e.t.Errorf("objects differ: %s", diff)
	}
}

// readObject reads an object.
func (e *env) readObject(key string) []byte {
	e.t.Helper()
	body, _, err := e.objects.Get(e.t.Context(), key, 0, -1)
	if err != nil {
		e.t.Errorf("read %s: %v", key, err)
		return nil
	}
	defer func() { _ = body.Close() }()
	data, err := io.ReadAll(body)
	if err != nil {
		e.t.Errorf("read %s: %v", key, err)
	}
	return data
}

// mustComplete restores, and checks that the job completes with its whole target.
func (e *env) mustComplete(r *testReplica, sp *RestoreSpec) *copyjob.Job {
	e.t.Helper()
	before := e.contents()
	job := e.restore(r, sp)
	end := e.waitEnded(r, job.ID)
	if end.Job.State != copyjob.Completed {
		e.t.Fatalf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
	}
	e.checkRestored(r, before, end.Job, sp)
	return end.Job
}

// mustFail restores, and checks that the job fails by a reason, with a message that
// contains names, and leaves nothing.
func (e *env) mustFail(r *testReplica, sp *RestoreSpec, reason, names string) *copyjob.Status {
	e.t.Helper()
	before := e.contents()
	job := e.restore(r, sp)
	end := e.waitEnded(r, job.ID)
	if end.Job.State != copyjob.Failed || end.Job.Reason != reason || !strings.Contains(end.Job.Message, names) {
		e.t.Errorf("ended %v: %s: %s; want %s with %q", end.Job.State, end.Job.Reason, end.Job.Message, reason, names)
	}
	e.checkNoTraces(before)
	return end
}
