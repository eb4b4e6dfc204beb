package manager

import (
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func byCollection(o *testOptions) { o.Cluster.NameScope = cluster.ScopeCollection }

// TestSnapshotsAreFoundByTheirDroppedCollection finds the snapshots of a dropped
// collection by its name, in each call and with each scope of names.
func TestSnapshotsAreFoundByTheirDroppedCollection(t *testing.T) {
	for _, change := range []func(*testOptions){func(*testOptions) {}, byCollection} {
		inEnv(t, func(t *testing.T, e *env) {
			ctx := t.Context()
			r := e.start("a", change)
			col := e.richCollection(r, "c", 6)
			s := e.create(r, col, "one")
			e.drops(r, col)
			time.Sleep(4 * time.Hour)
			settle()
			named := catalog.Ref{DB: "default", Name: "c"}
			ref := Ref{Name: "one", Collection: named}
			list, _, err := r.List(ctx, Filter{Collection: named}, Place{}, 10)
			if err != nil || len(list) != 1 || list[0].ID != s.ID {
				t.Errorf("list: %v, err = %v", list, err)
			}
			if got, err := r.Get(ctx, ref); err != nil || got.ID != s.ID {
				t.Errorf("get: %v, err = %v", got, err)
			}
			if d, err := r.Describe(ctx, ref); err != nil || d.Snapshot.ID != s.ID {
				t.Errorf("describe: %v, err = %v", d, err)
			}
			if _, err := r.Usage(ctx, ref); err != nil {
				t.Errorf("usage: %v", err)
			}
			pin, err := r.Pin(ctx, request.Token{}, ref, PinSpec{Owner: "o"})
			if err != nil {
				t.Fatal(err)
			}
			if err := r.Unpin(ctx, ref, pin.ID); err != nil {
				t.Error(err)
			}
			sp := restoreSpecOf(s)
			sp.Snapshot, sp.Name = ref, "back"
			if _, err := r.PlanRestore(ctx, sp, false); err != nil {
				t.Errorf("plan: %v", err)
			}
			job, err := r.Restore(ctx, request.Token{}, sp)
			if err != nil {
				t.Fatal(err)
			}
			if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
				t.Errorf("restore: %+v", end.Job)
			}
			for _, other := range []string{"d", "C"} {
				_, err := r.Get(ctx, Ref{Name: "one", Collection: catalog.Ref{DB: "default", Name: other}})
				wantError(t, err, catalog.ErrCollectionNotFound)
				_, _, err = r.List(ctx, Filter{Collection: catalog.Ref{DB: "default", Name: other}}, Place{}, 10)
				wantError(t, err, catalog.ErrCollectionNotFound)
			}
			if id, err := r.Drop(ctx, request.Token{}, ref, 0); err != nil || id != s.ID {
				t.Errorf("drop: %d, err = %v", id, err)
			}
			settle()
			_, err = r.Get(ctx, Ref{ID: s.ID})
			wantError(t, err, snapshot.ErrExpiredOrDropped)
		})
	}
}

// TestSeveralCollectionsOfOneName repeatedly drops a collection and makes another of
// its name: the name means the existing one, then the newest, with a note. Nothing
// ambiguous is dropped.
func TestSeveralCollectionsOfOneName(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", byCollection)
		named := catalog.Ref{DB: "default", Name: "c"}
		ref := Ref{Name: "nightly", Collection: named}
		make1 := func(name string) *snapshot.Record {
			col, _, _ := e.collection(r, "c")
			s := e.create(r, col, name)
			e.drops(r, col)
			settle()
			return s
		}
		get := func(ref Ref, want *snapshot.Record, notes int) {
			t.Helper()
			ctx, n := WithNotes(t.Context())
			got, err := r.Get(ctx, ref)
			if err != nil || got.ID != want.ID || len(n.List()) != notes {
				t.Errorf("%s: %v, err = %v, notes %q; want %v and %d notes", ref, got, err, n.List(), want, notes)
			}
		}
		first := make1("nightly")
		get(ref, first, 0)
		second := make1("nightly")
		get(ref, second, 1)
		weekly := make1("weekly")
		get(ref, second, 1)
		get(Ref{Name: "weekly", Collection: named}, weekly, 0)
		ctx, notes := WithNotes(t.Context())
		list, _, err := r.List(ctx, Filter{Collection: named}, Place{}, 10)
		if err != nil || len(list) != 1 || list[0].ID != weekly.ID || len(notes.List()) != 1 ||
			!strings.Contains(notes.List()[0], "3 collections") {
			t.Errorf("list: %v, err = %v, notes %q", list, err, notes.List())
		}
		if _, err := r.Drop(t.Context(), request.Token{}, ref, 0); err == nil ||
			!strings.Contains(errText(err), "2 collections had the name") {
			t.Errorf("drop of one of two: %v", err)
		}

		col, _, _ := e.collection(r, "c")
		get(ref, second, 1) // the existing collection has no snapshot of the name
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "weekly", Collection: named}, 0)
		wantError(t, err, ErrSnapshotMismatch) // it may be a repeat
		third := e.create(r, col, "nightly")
		get(ref, third, 0)
		list, _, err = r.List(t.Context(), Filter{Collection: named}, Place{}, 10)
		if err != nil || len(list) != 1 || list[0].ID != third.ID {
			t.Errorf("list: %v, err = %v", list, err)
		}
		if id, err := r.Drop(t.Context(), request.Token{}, ref, 0); err != nil || id != third.ID {
			t.Errorf("drop: %d, err = %v", id, err)
		}
		_, err = r.Drop(t.Context(), request.Token{}, ref, 0)
		wantError(t, err, ErrSnapshotMismatch)
		for _, s := range []*snapshot.Record{first, second, weekly} {
			if id, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID, Collection: named}, 0); err != nil || id != s.ID {
				t.Errorf("drop by id: %d, err = %v", id, err)
			}
		}
		if id, err := r.Drop(t.Context(), request.Token{}, ref, 0); err != nil || id != 0 {
			t.Errorf("drop of none: %d, err = %v", id, err)
		}
	})
}

// TestNamesDuringRestoreOfTheName finds the snapshots of a dropped collection by its
// name while a restore makes a collection of that name.
func TestNamesDuringRestoreOfTheName(t *testing.T) {
	for _, change := range []func(*testOptions){func(*testOptions) {}, byCollection} {
		inEnv(t, func(t *testing.T, e *env) {
			ctx := t.Context()
			r := e.start("a", change)
			col := e.richCollection(r, "c", 6)
			s, other := e.create(r, col, "one"), e.create(r, col, "two")
			e.drops(r, col)
			settle()
			r.store.Plan(func(c object.Call) object.Fault {
				if c.Op == object.OpCopy {
					return object.FaultBefore
				}
				return object.FaultNone
			})
			sp := restoreSpecOf(s)
			sp.Name = "c"
			job, err := r.Restore(ctx, request.Token{}, sp)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
			named := catalog.Ref{DB: "default", Name: "c"}
			if id, err := r.ResolveCollection(ctx, named); err != nil || id != col.ID {
				t.Errorf("the name stands for collection %d, err = %v; want %d", id, err, col.ID)
			}
			list, _, err := r.List(ctx, Filter{Collection: named}, Place{}, 10)
			if err != nil || len(list) != 2 {
				t.Errorf("list: %v, err = %v", list, err)
			}
			if got, err := r.Get(ctx, Ref{Name: "one", Collection: named}); err != nil || got.ID != s.ID {
				t.Errorf("get: %v, err = %v", got, err)
			}
			if id, err := r.Drop(ctx, request.Token{}, Ref{Name: "two", Collection: named}, 0); err != nil || id != other.ID {
				t.Errorf("drop: %d, err = %v", id, err)
			}
			r.store.Plan(nil)
			if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
				t.Errorf("restore: %+v", end.Job)
			}
			if id, err := r.ResolveCollection(ctx, named); err != nil || id != job.Target {
				t.Errorf("the name stands for collection %d, err = %v; want the one that lives, %d", id, err, job.Target)
			}
		})
	}
}

// TestRestoreIntoADroppedName restores a snapshot into the name of its dropped
// collection, and a snapshot of the target after the first one was dropped.
func TestRestoreIntoADroppedName(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
		col := e.richCollection(r, "c", 6)
		s := e.create(r, col, "one")
		e.drops(r, col)
		sp := restoreSpecOf(s)
		sp.Name = "c"
		if end := e.waitEnded(r, e.restore(r, sp).ID); end.Job.State != copyjob.Completed {
			t.Fatalf("%+v", end.Job)
		}
		e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		back, err := r.catalog.Collection(t.Context(), catalog.Ref{DB: "default", Name: "c"})
		if err != nil {
			t.Fatal(err)
		}
		two := e.create(r, back, "two")
		e.dropSnapshot(r, s)
		e.round(r, collect.CycleOptions{Tolerance: new(time.Duration)})
		time.Sleep(time.Hour)
		settle()
		for _, seg := range e.segments(r, two) {
			for f := range seg.AllFiles() {
				if _, err := e.objects.Head(t.Context(), "data/"+f.Path); err != nil {
					t.Errorf("%s of the restored collection: %v", f.Path, err)
				}
			}
		}
		if end := e.waitEnded(r, e.restore(r, restoreSpecOf(two)).ID); end.Job.State != copyjob.Completed {
			t.Errorf("%+v", end.Job)
		}
	})
}
