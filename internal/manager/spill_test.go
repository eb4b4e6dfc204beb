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
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := w.collection(r, "c")
		dropped, lives := w.segment(r, col, 0, 1, 20), w.segment(r, col, 0, 21, 40)
		dropped.EngineData = bytes.Repeat([]byte{1}, 1000)
		dropped.Files = append(dropped.Files,
			segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("%d/0/%d/any", col.ID, dropped.ID), Size: 10})
		w.addWritten(r, col, dropped, lives)
		w.checkpoint(r, col, 100, 100)
		s := w.create(r, col, "one")
		asks := w.dropSegments(r, col, dropped.ID)
		key := keys.Unit(col.ID, dropped.ID)
		size := func() int {
			kv, _, _, err := w.kv.Get(t.Context(), key)
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
		if got := w.objectsUnder(catalog.SpillPrefix); len(got) > 0 || size() != full {
			t.Errorf("before the tolerance has passed there is %v", got)
		}
		time.Sleep(20 * time.Minute)
		settle()
		if got := w.objectsUnder(catalog.SpillPrefix); !slices.Equal(got, []string{catalog.SpillKey(col.ID, dropped.ID)}) ||
			size() > 256 {
			t.Fatalf("there is %v, and the record takes %d bytes, which were %d", got, size(), full)
		}
		if diff := cmp.Diff(before, usage()); diff != "" {
			t.Errorf("usage (-before +spilled):\n%s", diff)
		}
		w.heldBy(w.reclaim(r, col, gc.BySnapshotd, asks...)[0], s)
		file := catalog.FilePath{Path: dropped.Files[1].Path}
		w.heldBy(w.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: file})[0], s)
		other := w.segment(r, col, 0, 1, 20)
		other.Files[0].Path = file.Path
		if _, _, err := r.catalog.AddSegments(t.Context(), col.ID,
			[]segment.Segment{other}); !errors.Is(err, catalog.ErrFileExists) {
			t.Errorf("a file of a spilled unit: err = %v", err)
		}
		if _, _, err := r.catalog.AddSegments(t.Context(), col.ID,
			[]segment.Segment{dropped}); !errors.Is(err, catalog.ErrSegmentExists) && !errors.Is(err, catalog.ErrFileExists) {
			t.Errorf("the id of a spilled unit: err = %v", err)
		}
		w.check(r)
		w.dropSnapshot(r, s)
		time.Sleep(5 * time.Minute)
		settle()
		if got, want := w.objectsUnder("data/"), []string{"data/" + lives.Files[0].Path}; !slices.Equal(got, want) {
			t.Errorf("left %v, want %v", got, want)
		}
		if got := append(w.objectsUnder("gc/"),
			append(w.keysUnder("/catalog/unit/"), w.keysUnder("/gc/tomb/")...)...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
		w.check(r)
	})
}

// TestLostHeldObjectStopsItsUnit checks that a unit whose spilled object is lost is
// never granted, until the object is written back.
func TestLostHeldObjectStopsItsUnit(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour })
		col, _, _ := w.collection(r, "c")
		lost := w.segment(r, col, 0, 1, 20)
		lost.EngineData = bytes.Repeat([]byte{1}, 1000)
		other := w.segment(r, col, 0, 21, 40) // in the same round
		w.addWritten(r, col, lost, other)
		w.checkpoint(r, col, 100, 100)
		s := w.create(r, col, "one")
		w.dropSegments(r, col, lost.ID, other.ID)
		full, _, _, err := w.kv.Get(t.Context(), keys.Unit(col.ID, lost.ID))
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		settle()
		key := catalog.SpillKey(col.ID, lost.ID)
		if err := w.objects.Delete(t.Context(), key); err != nil {
			t.Fatal(err)
		}
		w.dropSnapshot(r, s)
		time.Sleep(2 * time.Hour)
		settle()
		if got := w.objectsUnder("data/"); len(got) != 1 || len(w.keysUnder("/catalog/unit/")) != 1 {
			t.Fatalf("left %v and %v, want the unit and its file", got, w.keysUnder("/catalog/unit/"))
		}
		if _, err := w.objects.Put(t.Context(), key, full.Value); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Minute)
		settle()
		if got := append(w.objectsUnder("data/"), w.keysUnder("/catalog/unit/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}
