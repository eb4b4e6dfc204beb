package manager

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// comparableSegment returns a segment without the fields that a restore changes.
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
		out.Fields, out.LogIDs = append(out.Fields, f.Field), append(out.LogIDs, f.LogID)
		out.Entries = append(out.Entries, f.Entries)
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

// checkRestored checks that a COMPLETED job made its whole target and nothing else. It
// reads the stores alone.
func (e *env) checkRestored(r *testReplica, before storeContents, job *copyjob.Job, sp *RestoreSpec) {
	e.t.Helper()
	cat := catalog.New(catalog.Options{KV: e.kv, Now: e.now})
	d, err := r.Describe(e.t.Context(), sp.Snapshot)
	if err != nil {
		e.t.Fatal(err)
	}
	md := d.Metadata
	view, err := cat.At(e.t.Context(), job.Target, 0)
	if err != nil {
		e.t.Fatal(err)
	}
	e.checkTarget(&view, md, sp)

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
	for _, s := range e.segments(r, d.Snapshot) {
		if s.Partition != 0 && len(sp.Partitions) > 0 && !slices.Contains(sp.Partitions, names[s.Partition]) {
			continue
		}
		if sp.SkipIndexes {
			s.Builds = nil
		}
		want = append(want, s)
	}
	if _, err := cat.ScanSegments(e.t.Context(), job.Target, 0, func(batch []segment.Segment) error {
		got = append(got, batch...)
		return nil
	}); err != nil {
		e.t.Fatal(err)
	}
	if len(got) != len(want) {
		e.t.Fatalf("%d segments, want %d", len(got), len(want))
	}
	made := map[string]bool{}
	ids := map[int64]bool{}
	for i := range got {
		source := comparableSegment(want[i], names, indexes)
		if diff := cmp.Diff(source, comparableSegment(got[i], targetNames, targetIndexes)); diff != "" {
			e.t.Errorf("segment %d of segment %d: %s", got[i].ID, want[i].ID, diff)
		}
		if got[i].State != segment.Flushed {
			e.t.Errorf("segment %d is %v", got[i].ID, got[i].State)
		}
		for _, id := range append([]int64{got[i].ID}, buildIDs(&got[i])...) {
			if ids[id] || id <= d.Snapshot.ID {
				e.t.Errorf("id %d is not fresh", id)
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
				e.t.Errorf("%s exists twice", to)
			}
			made[to] = true
			if !bytes.Equal(e.readObject(from), e.readObject(to)) {
				e.t.Errorf("%s differs from %s", to, from)
			}
			if info, err := e.objects.Head(e.t.Context(), to); err != nil || info.ETag != f.ETag || info.Size != f.Size {
				e.t.Errorf("%s: %+v, err = %v; the catalog says ETag %q", to, info, err, f.ETag)
			}
		}
	}
	for _, key := range e.objectsUnder("") {
		if strings.HasPrefix(key, catalog.RestoreDir(job.ID)) { // deleted with the job's record
			continue
		}
		if !made[key] && !before.objects[key] {
			e.t.Errorf("object %s has no owner", key)
		}
	}
	for _, prefix := range []string{
		"/job/task/", "/job/progress/", "/job/limits/", keys.AssignedPrefix, keys.PinPrefix(job.Snapshot),
	} {
		for _, key := range e.keysUnder(prefix) {
			e.t.Errorf("%s is left", key)
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

// checkTarget checks that the target equals the snapshot except for ids and names.
func (e *env) checkTarget(view *catalog.View, md *manifest.Metadata, sp *RestoreSpec) {
	e.t.Helper()
	src, col := &md.Collection, &view.Collection
	if col.State != catalog.Active || col.Job != 0 || col.DB != sp.DB || col.Name != sp.Name || col.ID == src.ID {
		e.t.Errorf("the target is %+v", col)
	}
	if len(sp.Properties) == 0 && !maps.Equal(col.Properties, src.Properties) {
		e.t.Errorf("properties %v, want %v", col.Properties, src.Properties)
	}
	if col.Consistency != src.ConsistencyLevel || col.Schema.Format != src.Schema.Format ||
		!bytes.Equal(col.Schema.Raw, src.Schema.Raw) ||
		!maps.Equal(col.Attributes, src.Attributes) || col.Layout.String() != src.Layout {
		e.t.Errorf("target %+v, source %+v", col, src)
	}
	var fields []manifest.Field
	for _, f := range col.Schema.Fields {
		fields = append(fields, manifest.Field(f))
	}
	if diff := cmp.Diff(src.Schema.Fields, fields); diff != "" {
		e.t.Errorf("schema: %s", diff)
	}
	var roots []manifest.Root
	for i, root := range col.Roots {
		roots = append(roots, manifest.Root{Number: i, Store: root.Store, Prefix: root.Prefix})
	}
	if diff := cmp.Diff(md.Roots, roots); diff != "" {
		e.t.Errorf("roots: %s", diff)
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
		e.t.Errorf("channels %q, want %q", col.Channels, channels)
	}
	for shard, want := range checkpoints {
		if diff := cmp.Diff(want, view.Checkpoints[shard].Position); diff != "" {
			e.t.Errorf("checkpoint of shard %d: %s", shard, diff)
		}
	}
	if len(channels) > 0 && len(view.Checkpoints) != len(checkpoints) {
		e.t.Errorf("checkpoints %v, want %v", view.Checkpoints, checkpoints)
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
			e.t.Errorf("partition %s is %v", p.Name, p.State)
		}
	}
	if diff := cmp.Diff(parts, gotParts); diff != "" {
		e.t.Errorf("partitions: %s", diff)
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
			e.t.Errorf("index %s is %v", x.Name, x.State)
		}
		gotIndexes = append(gotIndexes, manifest.Index{
			Name: x.Name, Field: x.Field, TypeParams: x.TypeParams, IndexParams: x.IndexParams, Attributes: x.Attributes,
		})
	}
	if diff := cmp.Diff(indexes, gotIndexes); diff != "" {
		e.t.Errorf("indexes: %s", diff)
	}
}

// checkOutcome checks that a restore ended with everything or with nothing. After a
// canceled one it restores to the same name again. At the end it drops the snapshot.
func (e *env) checkOutcome(r *testReplica, before storeContents, end *copyjob.Status, sp *RestoreSpec) {
	e.t.Helper()
	switch end.Job.State {
	case copyjob.Completed:
		e.checkRestored(r, before, end.Job, sp)
		if end.Fraction != 1 || end.Done != end.Job.Totals {
			e.t.Errorf("COMPLETED with %+v", end)
		}
	case copyjob.Failed, copyjob.Canceled:
		e.checkNoTraces(before)
		if end.Fraction >= 1 || end.Job.Reason == "" || end.Job.Message == "" {
			e.t.Errorf("%v with %+v of %+v", end.Job.State, end, end.Job)
		}
	default:
		e.t.Fatalf("ended %v", end.Job.State)
	}
	if end.Job.State == copyjob.Canceled {
		e.checkNextRestore(r, before, sp)
	}
	if _, err := r.Drop(e.t.Context(), request.Token{}, sp.Snapshot, 0); err != nil {
		e.t.Errorf("drop the snapshot: %v", err)
	}
}

// checkNextRestore restores to the name of an ended job.
func (e *env) checkNextRestore(r *testReplica, before storeContents, sp *RestoreSpec) {
	e.t.Helper()
	job := e.restore(r, sp)
	if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
		e.t.Errorf("the next restore ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
		return
	}
	e.checkRestored(r, before, job, sp)
}
