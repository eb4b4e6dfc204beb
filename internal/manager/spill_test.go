package manager

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
)

// TestHeldUnitIsSpilled checks that the leader spills a unit that a snapshot holds
// longer than the tolerance, without a visible difference, and that nothing is left
// after the drop of the snapshot.
func TestHeldUnitIsSpilled(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := e.collection(r, "c")
		dropped, lives := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 21, 40)
		dropped.EngineData = bytes.Repeat([]byte{1}, 1000)
		dropped.Files = append(dropped.Files,
			segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/any", col.ID, dropped.ID), Size: 10})
		e.addWritten(r, col, dropped, lives)
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "one")
		asks := e.dropSegments(r, col, dropped.ID)
		key := keys.Unit(col.ID, dropped.ID)
		size := func() int {
			kv, _, _, err := e.kv.Get(t.Context(), key)
			if err != nil {
				t.Fatal(err)
			}
			return len(kv.Value)
		}
		usage := func() *Usage {
			u, err := r.Usage(t.Context(), Ref{ID: s.ID})
			if err != nil {
				t.Fatal(err)
			}
			return u
		}
		before, full := usage(), size()
		time.Sleep(50 * time.Minute)
		settle()
		if got := e.objectsUnder(catalog.SpillPrefix); len(got) > 0 || size() != full {
			t.Errorf("before the tolerance has passed there is %v", got)
		}
		time.Sleep(20 * time.Minute)
		settle()
		if got := e.objectsUnder(catalog.SpillPrefix); !slices.Equal(got, []string{catalog.SpillKey(col.ID, dropped.ID)}) ||
			size() > 256 {
			t.Fatalf("there is %v, and the record takes %d bytes, which were %d", got, size(), full)
		}
		if diff := cmp.Diff(before, usage()); diff != "" {
			t.Errorf("usage (-before +spilled):\n%s", diff)
		}
		e.heldBy(e.reclaim(r, col, gc.BySnapshotd, asks...)[0], s)
		file := catalog.FilePath{Path: dropped.Files[1].Path}
		e.heldBy(e.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: file})[0], s)
		other := e.segment(r, col, 0, 1, 20)
		other.Files[0].Path = file.Path
		if _, _, err := r.catalog.AddSegments(t.Context(), col.ID,
			[]segment.Segment{other}); !errors.Is(err, catalog.ErrFileExists) {
			t.Errorf("a file of a spilled unit: err = %v", err)
		}
		if _, _, err := r.catalog.AddSegments(t.Context(), col.ID,
			[]segment.Segment{dropped}); !errors.Is(err, catalog.ErrSegmentExists) && !errors.Is(err, catalog.ErrFileExists) {
			t.Errorf("the id of a spilled unit: err = %v", err)
		}
		e.check(r)
		e.dropSnapshot(r, s)
		time.Sleep(5 * time.Minute)
		settle()
		if got, want := e.objectsUnder("data/"), []string{"data/" + lives.Files[0].Path}; !slices.Equal(got, want) {
			t.Errorf("left %v, want %v", got, want)
		}
		if got := append(e.objectsUnder("gc/"),
			append(e.keysUnder("/catalog/unit/"), e.keysUnder("/gc/tomb/")...)...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
		e.check(r)
	})
}

// TestLostHeldObjectStopsItsUnit checks that a unit whose spilled object is lost is
// never granted, until the object is written back.
func TestLostHeldObjectStopsItsUnit(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := e.collection(r, "c")
		lost := e.segment(r, col, 0, 1, 20)
		lost.EngineData = bytes.Repeat([]byte{1}, 1000)
		other := e.segment(r, col, 0, 21, 40) // in the same round
		e.addWritten(r, col, lost, other)
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "one")
		e.dropSegments(r, col, lost.ID, other.ID)
		full, _, _, err := e.kv.Get(t.Context(), keys.Unit(col.ID, lost.ID))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		settle()
		key := catalog.SpillKey(col.ID, lost.ID)
		if err := e.objects.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		e.dropSnapshot(r, s)
		time.Sleep(2 * time.Hour)
		settle()
		if got := e.objectsUnder("data/"); len(got) != 1 || len(e.keysUnder("/catalog/unit/")) != 1 {
			t.Fatalf("left %v and %v, want the unit and its file", got, e.keysUnder("/catalog/unit/"))
		}
		if _, err := e.objects.Put(t.Context(), key, full.Value); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		settle()
		if got := append(e.objectsUnder("data/"), e.keysUnder("/catalog/unit/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}
