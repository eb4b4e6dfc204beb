package manager

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// taking is a collection with one segment from which files are removed.
type taking struct {
	*env
	r       *testReplica
	col     catalog.Collection
	segment segment.Segment
	n       int
}

func (e *env) taking(r *testReplica) *taking {
	e.t.Helper()
	t := &taking{env: e, r: r}
	t.col, _, _ = e.collection(r, "c")
	t.segment = e.segment(r, t.col, 0, 1, 20)
	t.addWritten(r, t.col, t.segment)
	t.checkpoint(r, t.col, 100, 100)
	return t
}

// replace removes the segment's file, adds another one that is large enough for its
// unit to be spilled, and returns the removed file.
func (t *taking) replace() catalog.FilePath {
	t.t.Helper()
	t.n++
	was := t.segment.Files[0]
	f := was
	f.LogID, f.Attributes = int64(1+t.n), map[string]string{"note": string(bytes.Repeat([]byte("x"), 500))}
	f.Path = catalog.NativePath(t.col.ID, &t.segment, &f)
	t.writeFiles(&segment.Segment{Files: []segment.File{f}})
	taken := catalog.FilePath{Path: was.Path}
	t.swap(t.r, t.col, catalog.SegmentChange{Update: []catalog.Update{{
		Segment: t.segment.ID, RemoveFiles: []catalog.FilePath{taken}, AddFiles: []segment.File{f},
	}}})
	t.segment.Files = []segment.File{f}
	return taken
}

// holders returns the snapshots that hold a removed file, newest first.
func (t *taking) holders(file catalog.FilePath) (ids []int64) {
	t.t.Helper()
	answers, err := t.r.GC.Check(t.t.Context(), catalog.Ref{ID: t.col.ID}, []gc.Ask{{File: file}})
	if err != nil || answers[0].State != gc.Dropped || answers[0].Holders != len(answers[0].Snapshots) {
		t.t.Fatalf("%+v, err = %v", answers, err)
	}
	for _, s := range answers[0].Snapshots {
		ids = append(ids, s.ID)
	}
	return ids
}

func (t *taking) wantHolders(when string, file catalog.FilePath, want ...*snapshot.Record) {
	t.t.Helper()
	var ids []int64
	for _, s := range want {
		ids = append(ids, s.ID)
	}
	if got := t.holders(file); !slices.Equal(got, ids) {
		t.t.Errorf("%s: %v is held by %v, want %v", when, file, got, ids)
	}
}

func (t *taking) wantObject(when string, file catalog.FilePath, want bool) {
	t.t.Helper()
	if got := slices.Contains(t.objectsUnder("data/"), "data/"+file.Path); got != want {
		t.t.Errorf("%s: %v is there: %v, want %v", when, file, got, want)
	}
}

// exclusive returns the number of files that a drop of the snapshot would free.
func (t *taking) exclusive(s *snapshot.Record) int64 {
	t.t.Helper()
	id, u, err := t.r.CheckDrop(t.t.Context(), Ref{ID: s.ID}, 0)
	if err != nil || id != s.ID {
		t.t.Fatalf("check drop: %d, err = %v", id, err)
	}
	return u.ExclusiveFiles
}

// TestTakenFilesAreHeldByOlderSnapshotsAlone checks that files removed from a live
// segment are deleted with the last snapshot that began before the removal, although
// younger snapshots have the segment, spilled or not.
func TestTakenFilesAreHeldByOlderSnapshotsAlone(t *testing.T) {
	for name, wait := range map[string]time.Duration{"full": 0, "spilled": 3 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				c := e.taking(e.start("a", func(o *testOptions) { o.Parts.Collector.Tolerance = time.Hour }))
				c.replace() // so that the next removed file is large enough to be spilled
				old := c.create(c.r, c.col, "old")
				taken := c.replace()
				rolling := c.create(c.r, c.col, "rolling-0")
				time.Sleep(wait)
				settle()
				if spilled := len(c.objectsUnder(catalog.SpillPrefix)); spilled != min(int(wait), 1) {
					t.Fatalf("%d units are spilled", spilled)
				}
				c.wantHolders("at first", taken, old)
				if got := []int64{c.exclusive(old), c.exclusive(rolling)}; !slices.Equal(got, []int64{1, 0}) {
					t.Errorf("files that drops would free: %v", got)
				}
				c.dropSnapshot(c.r, old)
				for i := range 3 {
					next := c.create(c.r, c.col, fmt.Sprint("rolling-", i+1))
					c.dropSnapshot(c.r, rolling)
					rolling = next
				}
				time.Sleep(2 * time.Hour)
				settle()
				c.wantObject("after the tolerance", taken, false)
				if got := slices.Concat(c.keysUnder("/catalog/unit/"), c.objectsUnder(catalog.SpillPrefix)); len(got) > 0 {
					t.Errorf("left %v", got)
				}
				c.check(c.r)
			})
		})
	}
}

// TestTakenFilesAreHeldByWhatBeganBefore checks that a create that began before files
// were removed holds them, whenever it captured.
func TestTakenFilesAreHeldByWhatBeganBefore(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		c := e.taking(e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true }))
		b := e.start("b", func(o *testOptions) { o.Parts.Collector.Off = true })
		b.store.Freeze() // after the capture
		sp := spec(c.col, "slow")
		sp.NoWait = true
		pending, err := b.Create(t.Context(), token("t", "slow"), sp)
		if err != nil {
			t.Fatal(err)
		}
		settle()
		taken := c.replace()
		b.store.Thaw()
		settle()
		slow, err := c.r.Get(t.Context(), Ref{ID: pending.ID})
		if err != nil || slow.State != snapshot.Committed {
			t.Fatalf("%v, err = %v", slow, err)
		}
		c.create(c.r, c.col, "later")
		c.wantHolders("with both", taken, slow)
		c.heldBy(c.reclaim(c.r, c.col, gc.ByCaller, gc.Ask{File: taken})[0], slow)
		c.dropSnapshot(c.r, slow)
		settle()
		c.granted(c.reclaim(c.r, c.col, gc.ByCaller, gc.Ask{File: taken}))
		c.check(c.r)
	})
}

// rewrite changes the stored record of a snapshot.
func (t *taking) rewrite(s *snapshot.Record, change func(*storagev1.Snapshot)) {
	t.t.Helper()
	kv, _, _, err := t.kv.Get(t.t.Context(), keys.Snapshot(s.ID))
	rec := &storagev1.Snapshot{}
	if err == nil {
		err = record.Decode(kv, rec)
	}
	if err != nil {
		t.t.Fatal(err)
	}
	change(rec)
	if _, err := t.kv.Txn(t.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(kv.Key, record.Encode(rec))}}); err != nil {
		t.t.Fatal(err)
	}
	settle()
}

// TestSnapshotOfAnotherHistoryHoldsTakenFiles checks that a snapshot with an unknown,
// another or a wrong history of the metadata store holds all files that the segment
// ever had.
func TestSnapshotOfAnotherHistoryHoldsTakenFiles(t *testing.T) {
	for name, change := range map[string]func(*storagev1.Snapshot){
		"of a release before": func(s *storagev1.Snapshot) { s.History, s.BeginRevision = 0, 0 },
		"without a history":   func(s *storagev1.Snapshot) { s.History = 0 },
		"of an earlier one":   func(s *storagev1.Snapshot) { s.History-- },
		"of a later one":      func(s *storagev1.Snapshot) { s.History++ },
		"that was copied":     func(s *storagev1.Snapshot) { s.BeginRevision-- },
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				c := e.taking(e.start("a", withEpoch, func(o *testOptions) { o.Parts.Collector.Off = true }))
				if _, _, _, err := c.r.Recover(t.Context(), true); err != nil {
					t.Fatal(err)
				}
				taken := c.replace()
				s := c.create(c.r, c.col, "s")
				c.wantHolders("as it is", taken)
				if n := c.exclusive(s); n != 0 {
					t.Errorf("%d files of a segment that lives", n)
				}
				c.rewrite(s, change)
				c.wantHolders("rewritten", taken, s)
				c.heldBy(c.reclaim(c.r, c.col, gc.ByCaller, gc.Ask{File: taken})[0], s)
			})
		})
	}
}

// TestUpdateKeepsTheHistoryOfASnapshot checks that an update does not change the
// history in which a snapshot began.
func TestUpdateKeepsTheHistoryOfASnapshot(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		c := e.taking(e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true }))
		taken := c.replace()
		s := c.create(c.r, c.col, "s")
		labels := map[string]string{"a": "b"}
		if _, err := c.r.Update(t.Context(), request.Token{}, Ref{ID: s.ID}, UpdateSpec{Labels: &labels}); err != nil {
			t.Fatal(err)
		}
		settle()
		c.wantHolders("updated", taken)
		c.granted(c.reclaim(c.r, c.col, gc.ByCaller, gc.Ask{File: taken}))
	})
}

// TestTakenFilesInACopiedStore copies the keys to another metadata store, which gives
// records other create revisions: all copied snapshots hold removed files, before and
// after the recovery, and later ones do not.
func TestTakenFilesInACopiedStore(t *testing.T) {
	for name, revision := range map[string]int64{"lower revision": 0, "higher revision": 10_000} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				off := func(o *testOptions) { o.Parts.Collector.Off = true }
				c := e.taking(e.start("before", withEpoch, off))
				old := c.create(c.r, c.col, "old")
				taken := c.replace()
				young := c.create(c.r, c.col, "young")
				c.wantHolders("before", taken, old)
				settle()
				backup := metatest.Backup(t, e.kv)
				c.r.stop()

				e.goBack(backup, revision)
				c.r = e.start("after", withEpoch, off)
				settle()
				c.wantHolders("copied", taken, young, old)
				if _, _, _, err := c.r.Recover(t.Context(), true); err != nil {
					t.Fatal(err)
				}
				settle()
				again := c.replace()
				c.create(c.r, c.col, "fresh")
				c.wantHolders("recovered", taken, young, old)
				c.wantHolders("taken since", again, young, old)
				c.dropSnapshot(c.r, old)
				c.dropSnapshot(c.r, young)
				settle()
				c.granted(c.reclaim(c.r, c.col, gc.BySnapshotd, gc.Ask{File: taken}, gc.Ask{File: again}))
				settle()
				c.wantObject("at the end", taken, false)
				c.wantObject("at the end", again, false)
			})
		})
	}
}

// TestLateRepeatOfAnAddedFile checks that the late repeat of an update that added a
// file is rejected after the file was removed and deleted.
func TestLateRepeatOfAnAddedFile(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		c := e.taking(e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true }))
		f := c.segment.Files[0]
		f.LogID = 2
		f.Path = catalog.NativePath(c.col.ID, &c.segment, &f)
		e.writeFiles(&segment.Segment{Files: []segment.File{f}})
		add := catalog.SegmentChange{Update: []catalog.Update{{Segment: c.segment.ID, AddFiles: []segment.File{f}}}}
		e.swap(c.r, c.col, add)
		taken := catalog.FilePath{Path: f.Path}
		e.swap(c.r, c.col, catalog.SegmentChange{Update: []catalog.Update{{
			Segment:     c.segment.ID,
			RemoveFiles: []catalog.FilePath{taken},
		}}})
		e.granted(e.reclaim(c.r, c.col, gc.BySnapshotd, gc.Ask{File: taken}))
		time.Sleep(2 * time.Minute)
		settle()
		c.wantObject("reclaimed", taken, false)
		if got := e.keysUnder("/gc/tomb/"); len(got) > 0 {
			t.Fatalf("left %v", got)
		}
		_, err := c.r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: c.col.ID}, add)
		wantError(t, err, catalog.ErrFileExists)
		for _, s := range e.segments(c.r, e.create(c.r, c.col, "s")) {
			for f := range s.AllFiles() {
				c.wantObject("committed", catalog.FilePath{Path: f.Path}, true)
			}
		}
		e.add(c.r, c.col, c.segment) // unchanged: files that it no longer has do not count
	})
}

// TestCreateWithTheIDOfAnother rolls the metadata store back unnoticed, so that it
// allocates the id of a running create again. The second create with the id fails; the
// first is complete.
func TestCreateWithTheIDOfAnother(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		off := func(o *testOptions) { o.Parts.Collector.Off = true }
		c := e.taking(e.start("a", off))
		b := e.start("b", off)
		b.store.Freeze()
		sp := spec(c.col, "first")
		sp.NoWait = true
		first, err := b.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		e.put(keys.IDs, record.Encode(&storagev1.Allocator{Format: record.Format, Next: first.ID}))
		_, err = e.start("c", off).Create(t.Context(), request.Token{}, spec(c.col, "second"))
		wantError(t, err, meta.ErrConflict)
		b.store.Thaw()
		settle()
		got, err := c.r.Get(t.Context(), Ref{Name: "first"})
		if err != nil || got.ID != first.ID || got.State != snapshot.Committed {
			t.Errorf("the first is %+v, err = %v", got, err)
		}
		c.check(c.r)
	})
}

// TestSnapshotOfAnEarlierReleaseHoldsInEveryCollection checks a segment that an earlier
// release registered in two collections, one of which exists only in a snapshot: the
// other does not delete its files, and grants nothing before the snapshot's references
// are loaded.
func TestSnapshotOfAnEarlierReleaseHoldsInEveryCollection(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		off := func(o *testOptions) { o.Parts.Collector.Off = true }
		r := e.start("a", off)
		col, _, x := e.collection(r, "c")
		s, other := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 21, 40)
		b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
		s.Builds = []segment.Build{b}
		e.addWritten(r, col, s)
		e.checkpoint(r, col, 100, 100)
		snap := e.create(r, col, "s")
		e.addWritten(r, col, other)
		gone := e.newID(r) // the other collection with the segment
		from := manifest.Dir(col.ID, snap.ID)
		for _, key := range e.objectsUnder(from) {
			data, err := object.ReadAll(t.Context(), e.objects, key, 1<<20)
			if err != nil {
				t.Fatal(err)
			}
			e.putObject(manifest.Dir(gone, snap.ID)+strings.TrimPrefix(key, from), data)
		}
		asks := e.dropSegments(r, col, s.ID, other.ID) // uses the store's clock
		r.stop()
		kv, _, _, err := e.kv.Get(t.Context(), keys.Snapshot(snap.ID))
		rec := &storagev1.Snapshot{}
		if err == nil {
			err = record.Decode(kv, rec)
		}
		if err != nil {
			t.Fatal(err)
		}
		rec.CollectionId, rec.History, rec.BeginRevision = gone, 0, 0
		e.put(kv.Key, record.Encode(rec))

		frozen := func(o *testOptions) {
			if store, ok := o.Stores["default"].(*object.Faulty); ok {
				store.Freeze()
			}
		}
		r = e.start("b", off, frozen)
		_, err = r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks[1:], gc.BySnapshotd, "tester")
		wantError(t, err, gc.ErrLoading)
		r.store.Thaw()
		settle()
		for i, a := range e.reclaim(r, col, gc.BySnapshotd, asks...) {
			if want := 1 - i; a.Holders != want || (a.State == gc.Granted) != (want == 0) {
				t.Errorf("%v is %+v, want %d holders", asks[i], a, want)
			}
		}
		e.dropSnapshot(r, snap)
		settle()
		e.granted(e.reclaim(r, col, gc.BySnapshotd, asks[0]))
	})
}
