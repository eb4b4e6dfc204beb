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
				inEnv(t, func(_ *testing.T, e *env) { e.damaged(object, damage) })
			})
		}
	}
}

// withoutReferences changes a snapshot's record to the form of an earlier release,
// which described the references only in the metadata.
func (e *env) withoutReferences(s *snapshot.Record) {
	e.t.Helper()
	e.changeRecord(s, func(r *storagev1.Snapshot) { r.References = nil })
}

// TestReadsOfAStart counts the objects that a replica reads at its start before it
// answers: one for each snapshot, and two for a record of an earlier release. A
// requested collection is read first.
func TestReadsOfAStart(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		many, _, _ := e.collection(a, "many")
		few, _, _ := e.collection(a, "few")
		held := e.segment(a, few, 0, 1, 20)
		e.addWritten(a, few, held)
		e.checkpoint(a, few, 100, 100)
		e.checkpoint(a, many, 100, 100)
		e.create(a, few, "one")
		old := e.create(a, few, "two")
		const n = 200
		for i := range n {
			e.create(a, many, fmt.Sprint("m", i))
		}
		asks := e.dropSegments(a, few, held.ID)
		a.stop()
		e.withoutReferences(old)

		var mu sync.Mutex
		reads := map[bool]int{}
		b := e.start("b", func(o *testOptions) {
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

func (e *env) damaged(name string, damage func([]byte) []byte) {
	t, ctx := e.t, e.t.Context()
	often := func(o *testOptions) {
		o.Parts.Collector.Tolerance, o.Parts.Collector.Interval = time.Hour, 10*time.Minute
		o.Parts.Collector.MaxShare = 1
	}
	a := e.start("a", often)
	col, _, _ := e.collection(a, "c")
	other, _, _ := e.collection(a, "other")
	held, free, last := e.segment(a, col, 0, 1, 20), e.segment(a, col, 0, 101, 120), e.segment(a, col, 0, 121, 140)
	elsewhere := e.segment(a, other, 0, 1, 20)
	e.addWritten(a, col, held)
	e.addWritten(a, other, elsewhere)
	e.checkpoint(a, col, 100, 100)
	s := e.create(a, col, "one")
	e.addWritten(a, col, free, last)
	key := manifest.Dir(s.Collection, s.ID) + name
	whole := e.readObject(key)
	if name == manifest.MetadataName { // read only for records of an earlier release
		e.withoutReferences(s)
	}
	a.stop() // drops its cache
	if damage == nil {
		if err := e.objects.Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
	} else {
		e.putObject(key, damage(slices.Clone(whole)))
	}
	b := e.start("b", often)
	prefix := "data/" + strings.SplitAfter(held.Files[0].Path, "/")[0]
	b.store.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpDelete &&
			slices.ContainsFunc(c.Keys, func(k string) bool { return strings.HasPrefix(k, prefix) }) {
			t.Errorf("deleted: %v", c.Keys)
		}
		return object.FaultNone
	})
	asks := e.dropSegments(b, col, held.ID, free.ID)
	e.dropSegments(b, other, elsewhere.ID)
	for _, deleter := range []gc.Deleter{gc.ByCaller, gc.BySnapshotd} {
		_, err := b.GC.Reclaim(ctx, catalog.Ref{ID: col.ID}, asks, deleter, "tester")
		wantError(t, err, gc.ErrUnreadable)
	}
	time.Sleep(2 * time.Hour)
	settle()
	e.drops(b, col)
	time.Sleep(3 * time.Hour)
	settle()
	if st := b.GC.Stats(); st.Unreadable != 1 {
		t.Errorf("it is not counted: %+v", st)
	}
	if got := e.objectsUnder(prefix); len(got) != 3 {
		t.Errorf("of three files there are %v", got)
	}
	if got := e.objectsUnder("data/"); len(got) != 3 {
		t.Errorf("another collection is held up: %v", got)
	}
	b.store.Plan(nil)
	e.putObject(key, whole)
	time.Sleep(2 * time.Hour)
	settle()
	if got := e.objectsUnder(prefix); len(got) != 1 || got[0] != "data/"+held.Files[0].Path {
		t.Errorf("once it was repaired there are %v", got)
	}
}
