//go:build linux && !short

package manager

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/etcdtest"
	"github.com/snapshotd/snapshotd/test/s3fault"
)

// TestS3Reclaim runs the life of segments on real etcd and S3: captured, compacted,
// held, and deleted when no longer needed; the first delete fails.
func TestS3Reclaim(t *testing.T) {
	e, through, proxy := onS3(t)
	e.kv, e.memory = etcdtest.Shared(t).KV(t), nil
	start := func(name string) *testReplica {
		return e.start(name, func(o *testOptions) {
			o.Stores = map[string]object.Store{"default": through}
			o.Parts.LeaderTTL, o.CleanInterval = 2*time.Second, 2*time.Second
		})
	}
	r := start("a")
	col, _, x := e.collection(r, "c")
	var inputs []segment.Segment
	var ids []int64
	for i := range 50 {
		s := e.segment(r, col, i%2, 1, 20)
		b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
		b.Files = []segment.File{{
			Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, s.ID, b.ID),
			Size: 5,
		}}
		s.Builds = []segment.Build{b}
		inputs, ids = append(inputs, s), append(ids, s.ID)
	}
	e.addWritten(r, col, inputs...)
	e.checkpoint(r, col, 100, 100)
	snap := e.create(r, col, "x")
	out := e.segment(r, col, 0, 1, 20)
	e.writeFiles(&out)
	e.swap(r, col, catalog.SegmentChange{Drop: ids, Add: []segment.Segment{out}})
	asks := make([]gc.Ask, len(ids))
	for i, id := range ids {
		asks[i] = gc.Ask{Segment: id}
	}
	r.stop()
	r = start("b") // reads the references from the store
	for _, a := range e.reclaim(r, col, gc.BySnapshotd, asks...) {
		e.heldBy(a, snap)
	}
	if u, err := r.Usage(t.Context(), Ref{ID: snap.ID}); err != nil ||
		*u != (Usage{ExclusiveFiles: 100, ExclusiveBytes: 750}) {
		t.Errorf("got %+v, err = %v", u, err)
	}
	e.dropSnapshot(r, snap)
	e.await("the snapshot is removed", func() bool { return len(e.keysUnder("/snapshot/")) == 0 })
	callers := e.granted(e.reclaim(r, col, gc.ByCaller, asks[0]))[0]
	proxy.Plan(s3fault.Rule{Times: 1, Action: s3fault.Status(500, "InternalError")})
	tombs := e.granted(e.reclaim(r, col, gc.BySnapshotd, asks...))
	if !sameTombstone(tombs[0], callers) || tombs[0].Deleter != gc.ByCaller {
		t.Errorf("it was %+v, now it is %+v", callers, tombs[0])
	}
	e.await("what snapshotd deletes is gone", func() bool { return len(e.keysUnder("/gc/tomb/")) == 1 })
	if proxy.Fired() == 0 {
		t.Error("the fault met nothing")
	}
	want := []string{"data/" + out.Files[0].Path}
	for f := range inputs[0].AllFiles() {
		want = append(want, "data/"+f.Path)
		if err := e.objects.Delete(t.Context(), "data/"+f.Path); err != nil {
			t.Fatal(err)
		}
	}
	if got := e.objectsUnder("data/"); !slices.Equal(got, want[:1]) {
		t.Errorf("left %v, want %v", got, want[:1])
	}
	if got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids[:1]); err != nil || got[0] != gc.Confirmed {
		t.Errorf("got %v, err = %v", got, err)
	}
	if got := append(e.keysUnder("/gc/tomb/"), e.keysUnder("/catalog/unit/")...); len(got) > 0 {
		t.Errorf("left %v", got)
	}
	e.check(r)
}
