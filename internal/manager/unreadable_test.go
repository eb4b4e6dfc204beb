package manager

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// TestUnreadableReferencesDeleteNothing damages the references of a snapshot in each
// way: no object of that collection is deleted, by request, by the collector or with
// the collection, until they are repaired, and the failure is counted. Other
// collections continue.
func TestUnreadableReferencesDeleteNothing(t *testing.T) {
	for name, damage := range map[string]func([]byte) []byte{
		"missing":  nil,
		"one bit":  func(b []byte) []byte { b[len(b)/2] ^= 1; return b },
		"cut":      func(b []byte) []byte { return b[:len(b)/2] },
		"empty":    func([]byte) []byte { return nil },
		"longer":   func(b []byte) []byte { return append(b, 0) },
		"zeros":    func(b []byte) []byte { return make([]byte, len(b)) },
		"of other": func([]byte) []byte { return []byte(`{"format_version":1}`) },
	} {
		for _, object := range []string{manifest.RefsName, manifest.MetadataName} {
			t.Run(name+" "+object, func(t *testing.T) {
				inEnv(t, func(_ *testing.T, w *testEnv) { w.damaged(object, damage) })
			})
		}
	}
}

// withoutReferences changes a snapshot's record to the form of an earlier release,
// which described the references only in the metadata.
func (w *testEnv) withoutReferences(s *snapshot.Record) {
	w.t.Helper()
	w.changeRecord(s, func(r *storagev1.Snapshot) { r.References = nil })
}

// TestReadsOfAStart counts the objects that a replica reads at its start before it
// answers: one for each snapshot, and two for a record of an earlier release. A
// requested collection is read first.
func TestReadsOfAStart(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		a := w.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		many, _, _ := w.collection(a, "many")
		few, _, _ := w.collection(a, "few")
		held := w.segment(a, few, 0, 1, 20)
		w.addWritten(a, few, held)
		w.checkpoint(a, few, 100, 100)
		w.checkpoint(a, many, 100, 100)
		w.create(a, few, "one")
		old := w.create(a, few, "two")
		const n = 200
		for i := range n {
			w.create(a, many, fmt.Sprint("m", i))
		}
		asks := w.dropSegments(a, few, held.ID)
		a.stop()
		w.withoutReferences(old)

		var mu sync.Mutex
		reads := map[bool]int{}
		b := w.start("b", func(o *testOptions) {
			o.Parts.Collector.Off = true
			store, ok := o.Stores["default"].(*object.Faulty)
			if !ok {
				t.Fatalf("the store is a %T", o.Stores["default"])
			}
			store.SetLatency(time.Second)
			store.Plan(func(c object.Call) object.Fault {
				if c.Op == object.OpGet && strings.HasPrefix(c.Keys[0], "snapshots/") {
					mu.Lock()
					defer mu.Unlock()
					reads[strings.HasPrefix(c.Keys[0], fmt.Sprintf("snapshots/%d/", few.ID))]++
				}
				return object.FaultNone
			})
		})
		began := time.Now()
		if _, err := b.GC.Reclaim(t.Context(), catalog.Ref{ID: few.ID}, asks, gc.ByCaller, "tester"); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 4*time.Second {
			t.Errorf("a collection of two snapshots waited for %v", took)
		}
		time.Sleep(time.Hour)
		settle()
		mu.Lock()
		defer mu.Unlock()
		if reads[true] != 3 || reads[false] != n {
			t.Errorf("read %d objects of two snapshots, one of them old, and %d of %d others", reads[true], reads[false], n)
		}
	})
}

func (w *testEnv) damaged(name string, damage func([]byte) []byte) {
	t, ctx := w.t, w.t.Context()
	often := func(o *testOptions) {
		o.Parts.Collector.Tolerance, o.Parts.Collector.Interval = time.Hour, 10*time.Minute
		o.Parts.Collector.MaxShare = 1
	}
	a := w.start("a", often)
	col, _, _ := w.collection(a, "c")
	other, _, _ := w.collection(a, "other")
	held, free, last := w.segment(a, col, 0, 1, 20), w.segment(a, col, 0, 101, 120), w.segment(a, col, 0, 121, 140)
	elsewhere := w.segment(a, other, 0, 1, 20)
	w.addWritten(a, col, held)
	w.addWritten(a, other, elsewhere)
	w.checkpoint(a, col, 100, 100)
	s := w.create(a, col, "one")
	w.addWritten(a, col, free, last)
	key := manifest.Dir(s.Collection, s.ID) + name
	whole := w.readObject(key)
	if name == manifest.MetadataName { // read only for records of an earlier release
		w.withoutReferences(s)
	}
	a.stop() // drops its cache
	if damage == nil {
		if err := w.objects.Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
	} else {
		w.putObject(key, damage(slices.Clone(whole)))
	}
	b := w.start("b", often)
	prefix := "data/" + strings.SplitAfter(held.Files[0].Path, "/")[0]
	b.store.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpDelete &&
			slices.ContainsFunc(c.Keys, func(k string) bool { return strings.HasPrefix(k, prefix) }) {
			t.Errorf("deleted: %v", c.Keys)
		}
		return object.FaultNone
	})
	asks := w.dropSegments(b, col, held.ID, free.ID)
	w.dropSegments(b, other, elsewhere.ID)
	for _, deleter := range []gc.Deleter{gc.ByCaller, gc.BySnapshotd} {
		_, err := b.GC.Reclaim(ctx, catalog.Ref{ID: col.ID}, asks, deleter, "tester")
		wantError(t, err, gc.ErrUnreadable)
	}
	time.Sleep(2 * time.Hour)
	settle()
	w.drops(b, col)
	time.Sleep(3 * time.Hour)
	settle()
	if st := b.GC.Stats(); st.Unreadable != 1 {
		t.Errorf("it is not counted: %+v", st)
	}
	if got := w.objectsUnder(prefix); len(got) != 3 {
		t.Errorf("of three files there are %v", got)
	}
	if got := w.objectsUnder("data/"); len(got) != 3 {
		t.Errorf("another collection is held up: %v", got)
	}
	b.store.Plan(nil)
	w.putObject(key, whole)
	time.Sleep(2 * time.Hour)
	settle()
	if got := w.objectsUnder(prefix); len(got) != 1 || got[0] != "data/"+held.Files[0].Path {
		t.Errorf("once it was repaired there are %v", got)
	}
}
