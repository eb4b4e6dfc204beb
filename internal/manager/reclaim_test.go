package manager

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// addWritten writes the files of segments and registers them.
func (w *testEnv) addWritten(r *testReplica, col catalog.Collection, segments ...segment.Segment) {
	w.t.Helper()
	for i := range segments {
		w.writeFiles(&segments[i])
	}
	w.add(r, col, segments...)
}

func (w *testEnv) writeFiles(s *segment.Segment) {
	w.t.Helper()
	for f := range s.AllFiles() {
		if _, err := w.objects.Put(w.t.Context(), "data/"+f.Path, bytes.Repeat([]byte{1}, int(f.Size))); err != nil {
			w.t.Fatal(err)
		}
	}
}

// dropSegments drops segments of a collection and returns their ids as asks.
func (w *testEnv) dropSegments(r *testReplica, col catalog.Collection, ids ...int64) []gc.Ask {
	w.t.Helper()
	w.swap(r, col, catalog.SegmentChange{Drop: ids})
	asks := make([]gc.Ask, len(ids))
	for i, id := range ids {
		asks[i] = gc.Ask{Segment: id}
	}
	return asks
}

func (w *testEnv) swap(r *testReplica, col catalog.Collection, swap catalog.SegmentChange) {
	w.t.Helper()
	if _, err := r.catalog.Change(w.t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, swap); err != nil {
		w.t.Fatal(err)
	}
}

func (w *testEnv) reclaim(r *testReplica, col catalog.Collection, deleter gc.Deleter, asks ...gc.Ask) []gc.Answer {
	w.t.Helper()
	answers, err := r.GC.Reclaim(w.t.Context(), catalog.Ref{ID: col.ID}, asks, deleter, "tester")
	if err != nil {
		w.t.Fatal(err)
	}
	if len(answers) != len(asks) {
		w.t.Fatalf("%d answers to %d asks", len(answers), len(asks))
	}
	return answers
}

// granted fails unless all answers are grants.
func (w *testEnv) granted(answers []gc.Answer) []*gc.Tombstone {
	w.t.Helper()
	var list []*gc.Tombstone
	for i, a := range answers {
		if a.State != gc.Granted || a.Tombstone == nil || a.Holders != 0 {
			w.t.Fatalf("answer %d is %+v, want a grant", i, a)
		}
		list = append(list, a.Tombstone)
	}
	return list
}

// heldBy fails unless exactly these snapshots hold the unit.
func (w *testEnv) heldBy(a gc.Answer, snapshots ...*snapshot.Record) {
	w.t.Helper()
	if a.State != gc.Dropped || a.Tombstone != nil || a.Holders != len(snapshots) ||
		len(a.Creating) > 0 || len(a.Snapshots) != len(snapshots) {
		w.t.Fatalf("answer is %+v, want it held by %v", a, snapshots)
	}
	for i, s := range snapshots {
		if a.Snapshots[i] != (gc.SnapshotHolder{ID: s.ID, Name: s.Name}) {
			w.t.Errorf("holder %d is %+v, want %s", i, a.Snapshots[i], s)
		}
	}
}

func (w *testEnv) dropSnapshot(r *testReplica, s *snapshot.Record) {
	w.t.Helper()
	if _, err := r.Drop(w.t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
		w.t.Fatal(err)
	}
}

func sameTombstone(a, b *gc.Tombstone) bool {
	return a.ID == b.ID && a.Collection == b.Collection && a.Deleter == b.Deleter && a.Caller == b.Caller &&
		a.GrantTime.Equal(b.GrantTime) && a.Revision == b.Revision
}

// withSpy starts a replica whose grants can be intercepted.
func (w *testEnv) withSpy(name string) (*testReplica, *spy, *int) {
	s, failed := &spy{}, new(int)
	s.failed = func() { *failed++ }
	r := w.start(name, func(o *testOptions) { s.KV, o.KV = o.KV, s })
	return r, s, failed
}

func TestUnitIsReclaimed(t *testing.T) {
	for name, deleter := range map[string]gc.Deleter{"snapshotd": gc.BySnapshotd, "caller": gc.ByCaller} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, w *testEnv) {
				r := w.start("a")
				col, _, x := w.collection(r, "c")
				s := w.segment(r, col, 0, 1, 20)
				b := segment.Build{ID: w.newID(r), Index: x.ID, Field: 100}
				b.Files = []segment.File{{
					Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, s.ID, b.ID),
					Size: 5,
				}}
				s.Builds = []segment.Build{b}
				foreign := segment.File{Kind: segment.KindStats, Path: "shared/stats", Size: 7}
				s.Files = append(s.Files, foreign)
				w.addWritten(r, col, s)
				w.checkpoint(r, col, 100, 100)
				live := w.reclaim(r, col, deleter, gc.Ask{Segment: s.ID})[0]
				if live.State != gc.Live || live.LiveIn != s.ID || live.Holders != 1 {
					t.Errorf("a living segment is %+v", live)
				}
				one := w.create(r, col, "one")
				two := w.create(r, col, "two")
				asks := w.dropSegments(r, col, s.ID)
				w.heldBy(w.reclaim(r, col, deleter, asks...)[0], two, one)
				w.dropSnapshot(r, one)
				w.heldBy(w.reclaim(r, col, deleter, asks...)[0], two)
				if n := len(w.objectsUnder("data/")); n != 3 {
					t.Errorf("%d files, want 3", n)
				}
				w.dropSnapshot(r, two)
				check, err := r.GC.Check(t.Context(), catalog.Ref{ID: col.ID}, asks)
				if err != nil || check[0].State != gc.Dropped || check[0].Holders != 0 {
					t.Errorf("a unit without holders is %+v, err = %v", check, err)
				}
				tomb := w.granted(w.reclaim(r, col, deleter, asks...))[0]
				if tomb.ID != s.ID || tomb.Deleter != deleter || tomb.Caller != "tester" ||
					tomb.Unit.Kind != catalog.UnitSegment || tomb.Revision == 0 {
					t.Errorf("got %+v", tomb)
				}
				if again := w.reclaim(r, col, gc.BySnapshotd, asks...)[0]; deleter == gc.ByCaller &&
					!sameTombstone(again.Tombstone, tomb) {
					t.Errorf("it was %+v, now it is %+v", tomb, again.Tombstone)
				}
				time.Sleep(5 * time.Minute)
				settle()
				if deleter == gc.ByCaller {
					if n := len(w.objectsUnder("data/")); n != 3 {
						t.Errorf("%d files, want 3: the caller deletes them", n)
					}
					if st := r.GC.Stats(); st.Unconfirmed != 1 || st.Oldest != 5*time.Minute || st.Granted != 0 {
						t.Errorf("got %+v", st)
					}
					got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{s.ID, 1 << 40})
					if err != nil || !slices.Equal(got, []gc.Confirmation{gc.Confirmed, gc.NoTombstone}) {
						t.Errorf("got %v, err = %v", got, err)
					}
				} else if got := w.objectsUnder("data/"); !slices.Equal(got, []string{"data/shared/stats"}) {
					t.Errorf("left %v, want the foreign file", got)
				}
				settle()
				if got := w.keysUnder("/gc/tomb/"); len(got) > 0 {
					t.Errorf("left %v", got)
				}
				if st := r.GC.Stats(); st != (gc.Stats{}) {
					t.Errorf("got %+v", st)
				}
				if a := w.reclaim(r, col, deleter, asks...)[0]; a.State != gc.Unknown || a.Holders != 0 {
					t.Errorf("what is gone is %+v", a)
				}
				w.check(r)
			})
		})
	}
}

// TestGrantComparesItsPreconditions checks that a grant compares the generation and the
// pending keys, and is retried when one changed after it was read.
func TestGrantComparesItsPreconditions(t *testing.T) {
	for name, between := range map[string]func(w *testEnv, b *testReplica, col catalog.Collection){
		"a commit": func(w *testEnv, b *testReplica, col catalog.Collection) { w.create(b, col, "x") },
		"a begin": func(w *testEnv, b *testReplica, col catalog.Collection) {
			b.store.Freeze()
			sp := spec(col, "x")
			sp.NoWait = true
			if _, err := b.Create(w.t.Context(), request.Token{}, sp); err != nil {
				w.t.Error(err)
			}
		},
		"a grant": func(w *testEnv, b *testReplica, col catalog.Collection) {
			for _, key := range w.keysUnder(keys.UnitPrefix(col.ID)) {
				id, err := keys.LastID(key)
				if err != nil {
					w.t.Error(err)
				}
				if _, err := b.GC.Reclaim(w.t.Context(), catalog.Ref{ID: col.ID}, []gc.Ask{{Segment: id}},
					gc.ByCaller, "other"); err != nil {
					w.t.Error(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, w *testEnv) {
				b := w.start("b")
				a, spy, failed := w.withSpy("a")
				col, _, _ := w.collection(b, "c")
				w.checkpoint(b, col, 100, 100)
				s := w.segment(b, col, 0, 1, 20)
				w.addWritten(b, col, s)
				asks := w.dropSegments(b, col, s.ID)
				settle()
				spy.before = func() { between(w, b, col) }
				tomb := w.granted(w.reclaim(a, col, gc.ByCaller, asks...))[0]
				if *failed != 1 {
					t.Errorf("%d grants failed, want 1", *failed)
				}
				if want := map[bool]string{true: "other", false: "tester"}[name == "a grant"]; tomb.Caller != want {
					t.Errorf("granted to %s, want %s", tomb.Caller, want)
				}
			})
		})
	}
}

// TestGrantGivesUp checks that a grant fails while snapshots are committed faster than
// it is decided.
func TestGrantGivesUp(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		b := w.start("b")
		a, spy, failed := w.withSpy("a")
		col, _, _ := w.collection(b, "c")
		s := w.segment(b, col, 0, 1, 20)
		w.add(b, col, s)
		w.checkpoint(b, col, 100, 100)
		asks := w.dropSegments(b, col, s.ID)
		n := 0
		var again func()
		again = func() {
			n++
			w.create(b, col, fmt.Sprint("x", n))
			spy.before = again
		}
		spy.before = again
		_, err := a.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, meta.ErrConflict)
		if *failed != 16 || len(w.keysUnder("/gc/tomb/")) > 0 {
			t.Errorf("%d attempts, tombstones %v", *failed, w.keysUnder("/gc/tomb/"))
		}
	})
}

// TestCommitAtEachMomentOfADecision commits a snapshot that began before the drop at
// each moment of a decision: it holds the unit.
func TestCommitAtEachMomentOfADecision(t *testing.T) {
	for call := int64(0); ; call++ {
		reached := true
		inEnv(t, func(t *testing.T, w *testEnv) {
			b := w.start("b")
			settle() // it leads
			a := w.start("a")
			col, _, _ := w.collection(b, "c")
			s := w.segment(b, col, 0, 1, 20)
			w.addWritten(b, col, s)
			w.checkpoint(b, col, 100, 100)
			settle()
			b.store.Freeze()
			created := make(chan error, 1)
			go func() {
				_, err := b.Create(t.Context(), request.Token{}, spec(col, "x"))
				created <- err
			}()
			settle()
			asks := w.dropSegments(a, col, s.ID)
			settle()
			if answer := w.reclaim(a, col, gc.BySnapshotd, asks...)[0]; answer.State != gc.Dropped ||
				answer.Holders != 1 || len(answer.Creating) != 1 {
				t.Errorf("got %+v, want it held by the create", answer)
			}
			var n atomic.Int64
			a.kv.Hook(func(c meta.Call) meta.Fault {
				if c.Method != meta.MethodTxn && c.Method != meta.MethodGet {
					return meta.NoFault
				}
				if n.Add(1) == call+1 {
					b.store.Thaw()
					if err := <-created; err != nil {
						t.Error(err)
					}
					created <- nil
				}
				return meta.NoFault
			})
			answer := w.reclaim(a, col, gc.BySnapshotd, asks...)[0]
			a.kv.Hook(nil)
			if reached = n.Load() > call; !reached {
				b.store.Thaw()
				return
			}
			if answer.State != gc.Dropped || answer.Holders != 1 {
				t.Errorf("at call %d: got %+v, want it held", call, answer)
			}
			settle()
			snap, err := b.Get(t.Context(), Ref{Name: "x"})
			if err != nil {
				t.Fatal(err)
			}
			w.heldBy(w.reclaim(a, col, gc.BySnapshotd, asks...)[0], snap)
		})
		if !reached {
			if call < 2 {
				t.Errorf("a decision makes %d calls", call)
			}
			return
		}
	}
}

// TestOnlyOlderCreatesHold checks that a create that began after the drop does not hold
// the unit, and an older one does.
func TestOnlyOlderCreatesHold(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r, b := w.start("a"), w.start("b")
		col, _, _ := w.collection(r, "c")
		first, second := w.segment(r, col, 0, 1, 20), w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, first, second)
		w.checkpoint(r, col, 100, 100)
		asks := w.dropSegments(r, col, first.ID)
		b.store.Freeze()
		sp := spec(col, "x")
		sp.NoWait = true
		pending, err := b.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		settle()
		asks = append(asks, w.dropSegments(r, col, second.ID)...)
		answers := w.reclaim(r, col, gc.ByCaller, asks...)
		w.granted(answers[:1])
		if a := answers[1]; a.State != gc.Dropped || a.Holders != 1 || len(a.Creating) != 1 ||
			a.Creating[0] != (gc.SnapshotHolder{ID: pending.ID}) || len(a.Snapshots) > 0 {
			t.Errorf("got %+v, want it held by %d", a, pending.ID)
		}
		b.store.Thaw()
		settle()
		snap, err := r.Get(t.Context(), Ref{ID: pending.ID})
		if err != nil {
			t.Fatal(err)
		}
		w.heldBy(w.reclaim(r, col, gc.ByCaller, asks[1])[0], snap)
		for _, s := range w.segments(r, snap) {
			if s.ID != second.ID {
				t.Errorf("the snapshot has segment %d", s.ID)
			}
		}
	})
}

func TestGrantWithoutAnswer(t *testing.T) {
	for name, fault := range map[string]meta.Fault{"before": meta.Before, "after": meta.After} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, w *testEnv) {
				r, b := w.start("a"), w.start("b")
				col, _, _ := w.collection(b, "c")
				s := w.segment(b, col, 0, 1, 20)
				w.add(b, col, s)
				asks := w.dropSegments(b, col, s.ID)
				settle()
				r.kv.FailNth(1, fault, meta.MethodTxn) // after the read
				_, err := r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "first")
				wantError(t, err, meta.ErrUnavailable)
				if r.kv.Fired() != 1 {
					t.Fatalf("%d faults", r.kv.Fired())
				}
				r.kv.Hook(nil)
				want := map[meta.Fault]string{meta.Before: "tester", meta.After: "first"}[fault]
				tomb := w.granted(w.reclaim(r, col, gc.BySnapshotd, asks...))[0]
				if tomb.Caller != want {
					t.Errorf("it is %s's, want %s's", tomb.Caller, want)
				}
			})
		})
	}
}

// TestDuplicateAsksOfOneUnit asks for a unit by both forms, twice: there is one grant.
func TestDuplicateAsksOfOneUnit(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, x := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		b := segment.Build{ID: w.newID(r), Index: x.ID, Field: 100}
		b.Files = []segment.File{{
			Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, s.ID, b.ID),
			Size: 5,
		}}
		s.Builds = []segment.Build{b}
		w.addWritten(r, col, s)
		w.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, RemoveBuilds: []int64{b.ID}}}})
		answers := w.reclaim(r, col, gc.ByCaller, gc.Ask{Build: b.ID},
			gc.Ask{File: catalog.FilePath{Path: b.Files[0].Path}}, gc.Ask{Segment: b.ID},
			gc.Ask{Build: b.ID}, gc.Ask{Build: 1 << 40})
		tombs := w.granted(answers[:4])
		for _, tomb := range tombs {
			if !sameTombstone(tomb, tombs[0]) || tomb.Unit.Kind != catalog.UnitBuild {
				t.Errorf("got %+v and %+v", tomb, tombs[0])
			}
		}
		if answers[4].State != gc.Unknown {
			t.Errorf("got %+v", answers[4])
		}
	})
}

func TestParallelReclaims(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		rs := []*testReplica{w.start("a"), w.start("b")}
		col, _, _ := w.collection(rs[0], "c")
		s := w.segment(rs[0], col, 0, 1, 20)
		w.add(rs[0], col, s)
		asks := w.dropSegments(rs[0], col, s.ID)
		tombs := make([]*gc.Tombstone, 64)
		var wg sync.WaitGroup
		for i := range tombs {
			wg.Go(func() {
				answers, err := rs[i%2].GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, fmt.Sprint(i))
				if err != nil || answers[0].State != gc.Granted {
					t.Errorf("got %+v, err = %v", answers, err)
					return
				}
				tombs[i] = answers[0].Tombstone
			})
		}
		wg.Wait()
		for _, tomb := range tombs {
			if tomb == nil || !sameTombstone(tomb, tombs[0]) {
				t.Errorf("got %+v and %+v", tomb, tombs[0])
			}
		}
	})
}

// TestManyAsks checks that many asks are answered in order, each unit once, also the
// largest ones.
func TestManyAsks(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		var asks []gc.Ask
		var segments []segment.Segment
		for range 1000 {
			segments = append(segments, w.segment(r, col, 0, 1, 20))
		}
		w.add(r, col, segments...)
		ids := make([]int64, len(segments))
		for i := range segments {
			ids[i] = segments[i].ID
		}
		if _, err := r.catalog.DropSegments(t.Context(), catalog.Ref{ID: col.ID}, ids); err != nil {
			t.Fatal(err)
		}
		for i := range 10_000 {
			switch i % 4 {
			case 3:
				asks = append(asks, gc.Ask{Segment: 1<<40 + int64(i)})
			default:
				asks = append(asks, gc.Ask{Segment: ids[(i-i/4)*7%len(ids)]})
			}
		}
		for i, a := range w.reclaim(r, col, gc.ByCaller, asks...) {
			if i%4 == 3 {
				if a.State != gc.Unknown {
					t.Fatalf("answer %d is %+v", i, a)
				}
			} else if a.State != gc.Granted || a.Tombstone.ID != asks[i].Segment {
				t.Fatalf("answer %d is %+v, asked for %+v", i, a, asks[i])
			}
		}
		if n := len(w.keysUnder("/gc/tomb/")); n != 1000 {
			t.Errorf("%d tombstones", n)
		}
		var tombs []int64
		for after, more := int64(0), true; more; {
			var list []*gc.Tombstone
			var err error
			if list, more, err = r.GC.List(t.Context(), col.ID, gc.ByCaller, col.ID, after, 300); err != nil {
				t.Fatal(err)
			}
			for _, tomb := range list {
				tombs = append(tombs, tomb.ID)
			}
			after = tombs[len(tombs)-1]
		}
		slices.Sort(ids)
		if !slices.Equal(tombs, ids) {
			t.Errorf("%d listed, not those that there are", len(tombs))
		}
		confirmed, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, tombs)
		if err != nil || slices.ContainsFunc(confirmed, func(c gc.Confirmation) bool { return c != gc.Confirmed }) ||
			len(w.keysUnder("/gc/tomb/")) > 0 {
			t.Errorf("err = %v", err)
		}
	})
}

// TestLargeUnits grants units of which a transaction holds one or two: one call grants
// all, and memory stays bounded.
func TestLargeUnits(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		var ids []int64
		for range 18 {
			s := w.segment(r, col, 0, 1, 20)
			s.Attributes = map[string]string{"large": strings.Repeat("x", 600<<10)}
			w.add(r, col, s)
			ids = append(ids, s.ID)
		}
		for _, id := range ids {
			w.dropSegments(r, col, id)
		}
		asks := make([]gc.Ask, len(ids))
		for i, id := range ids {
			asks[i] = gc.Ask{Segment: id}
		}
		w.granted(w.reclaim(r, col, gc.ByCaller, asks...))
		list, more, err := r.GC.List(t.Context(), 0, 0, 0, 0, 1000)
		if err != nil || !more || len(list) == 0 || len(list) > 7 {
			t.Errorf("%d in one list, more = %v, err = %v", len(list), more, err)
		}
	})
}

// forget replaces a replica by a new one with empty caches.
func (w *testEnv) forget(r *testReplica, name string) *testReplica {
	w.t.Helper()
	r.stop()
	return w.start(name)
}

func TestUnreadableReferences(t *testing.T) {
	damage := map[string]func(w *testEnv, s *snapshot.Record, key string, data []byte) (repair func()){
		"one bit": func(w *testEnv, _ *snapshot.Record, key string, data []byte) func() {
			bad := slices.Clone(data)
			bad[len(bad)/2] ^= 1
			w.putObject(key, bad)
			return func() { w.putObject(key, data) }
		},
		"missing": func(w *testEnv, _ *snapshot.Record, key string, data []byte) func() {
			if err := w.objects.Delete(w.t.Context(), key); err != nil {
				w.t.Fatal(err)
			}
			return func() { w.putObject(key, data) }
		},
		"metadata": func(w *testEnv, s *snapshot.Record, _ string, _ []byte) func() {
			key := manifest.MetadataKey(s.Collection, s.ID)
			data, err := object.ReadAll(w.t.Context(), w.objects, key, s.Metadata.Length)
			if err != nil {
				w.t.Fatal(err)
			}
			w.putObject(key, data[:len(data)-1])
			w.withoutReferences(s) // else the metadata is not read
			return func() { w.putObject(key, data) }
		},
		"another store": func(w *testEnv, s *snapshot.Record, _ string, _ []byte) func() {
			old := w.record(s)
			w.changeRecord(s, func(r *storagev1.Snapshot) { r.Store = "elsewhere" })
			return func() { // the store of a snapshot never changes
				if _, err := w.kv.Txn(w.t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Snapshot(s.ID))}}); err != nil {
					w.t.Fatal(err)
				}
				w.put(keys.Snapshot(s.ID), old)
			}
		},
		"newer record": func(w *testEnv, s *snapshot.Record, _ string, _ []byte) func() {
			old := w.record(s)
			w.changeRecord(s, func(r *storagev1.Snapshot) { r.Format = 1000 })
			return func() { w.put(keys.Snapshot(s.ID), old) }
		},
	}
	for name, harm := range damage {
		for _, heal := range []string{"repaired", "dropped"} {
			if heal == "dropped" && name != "one bit" && name != "missing" {
				continue // a drop reads the record
			}
			t.Run(name+", "+heal, func(t *testing.T) {
				inEnv(t, func(t *testing.T, w *testEnv) {
					r := w.start("a")
					col, _, _ := w.collection(r, "c")
					other, _, _ := w.collection(r, "other")
					var asks [2][]gc.Ask
					for i, c := range []catalog.Collection{col, other} {
						s := w.segment(r, c, 0, 1, 20)
						w.addWritten(r, c, s)
						w.checkpoint(r, c, 100, 100)
						asks[i] = w.dropSegments(r, c, s.ID)
					}
					s := w.create(r, col, "x")
					key := manifest.RefsKey(col.ID, s.ID)
					data, err := object.ReadAll(t.Context(), w.objects, key, 1<<20)
					if err != nil {
						t.Fatal(err)
					}
					repair := harm(w, s, key, data)
					r = w.forget(r, "b")
					settle()
					_, err = r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks[0], gc.ByCaller, "tester")
					wantError(t, err, gc.ErrUnreadable)
					if !strings.Contains(errText(err), fmt.Sprintf(`snapshot "x" (%d)`, s.ID)) {
						t.Errorf("got %v", err)
					}
					_, err = r.GC.Check(t.Context(), catalog.Ref{ID: col.ID}, asks[0])
					wantError(t, err, gc.ErrUnreadable)
					w.granted(w.reclaim(r, other, gc.ByCaller, asks[1]...))
					if st := r.GC.Stats(); st.Unreadable != 1 || st.Snapshots != 0 || st.Loading != 0 {
						t.Errorf("got %+v", st)
					}
					if heal == "dropped" {
						w.dropSnapshot(r, s)
					} else {
						repair()
						time.Sleep(time.Minute)
					}
					settle()
					if st := r.GC.Stats(); st.Unreadable != 0 {
						t.Errorf("got %+v", st)
					}
					w.granted(w.reclaim(r, col, gc.ByCaller, asks[0]...))
				})
			})
		}
	}
}

// TestReferencesOfALostStore checks that reads of references are retried while the
// store does not answer. After a while the metrics count them as unreadable until they
// are read; callers get an error without the store's text.
func TestReferencesOfALostStore(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s)
		w.checkpoint(r, col, 100, 100)
		snap := w.create(r, col, "x")
		asks := w.dropSegments(r, col, s.ID)
		lost := func(c object.Call) object.Fault {
			if c.Op == object.OpGet {
				return object.FaultBefore
			}
			return object.FaultNone
		}
		b := w.start("b", func(o *testOptions) { o.Stores["default"].(*object.Faulty).Plan(lost) })
		settle()
		if st := b.GC.Stats(); st.Loading != 1 || st.Unreadable != 0 {
			t.Errorf("got %+v", st)
		}
		_, err := b.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, gc.ErrLoading)
		wantError(t, err, object.ErrUnavailable)
		if errors.Is(err, gc.ErrUnreadable) || strings.Contains(errText(err), "dropped") {
			t.Errorf("no answer is a verdict: %v", err)
		}
		began := time.Now()
		_, err = b.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, gc.ErrLoading)
		if d := time.Since(began); d != 0 {
			t.Errorf("it waited %v for a store that does not answer", d)
		}
		if strings.Contains(errText(err), "injected") {
			t.Errorf("it reports %v", err)
		}
		if st := b.GC.Stats(); st.Loading != 0 || st.Unreadable != 1 {
			t.Errorf("got %+v", st)
		}
		b.store.Plan(nil)
		time.Sleep(15 * time.Second)
		settle()
		w.heldBy(w.reclaim(b, col, gc.ByCaller, asks...)[0], snap)
	})
}

func (w *testEnv) putObject(key string, data []byte) {
	w.t.Helper()
	if _, err := w.objects.Put(w.t.Context(), key, data); err != nil {
		w.t.Fatal(err)
	}
}

// record returns the stored record of a snapshot.
func (w *testEnv) record(s *snapshot.Record) []byte {
	w.t.Helper()
	kv, found, _, err := w.kv.Get(w.t.Context(), keys.Snapshot(s.ID))
	if err != nil || !found {
		w.t.Fatal(found, err)
	}
	return kv.Value
}

func (w *testEnv) changeRecord(s *snapshot.Record, change func(*storagev1.Snapshot)) {
	w.t.Helper()
	rec := &storagev1.Snapshot{}
	if err := proto.Unmarshal(w.record(s), rec); err != nil {
		w.t.Fatal(err)
	}
	change(rec)
	data, err := proto.Marshal(rec)
	if err != nil {
		w.t.Fatal(err)
	}
	w.put(keys.Snapshot(s.ID), data)
}

// TestUnparseableRecordBlocksAll checks that a record without a readable collection
// blocks all collections.
func TestUnparseableRecordBlocksAll(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.add(r, col, s)
		asks := w.dropSegments(r, col, s.ID)
		for _, key := range []string{keys.Snapshot(999), keys.SnapshotPrefix + "nonsense"} {
			for _, restart := range []bool{false, true} {
				w.put(key, []byte("nonsense"))
				if restart {
					r = w.forget(r, "b")
				}
				settle()
				_, err := r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
				wantError(t, err, gc.ErrUnreadable)
				if st := r.GC.Stats(); st.Unreadable != 1 {
					t.Errorf("got %+v", st)
				}
				if _, err := w.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
					t.Fatal(err)
				}
				settle()
				if a, err := r.GC.Check(t.Context(), catalog.Ref{ID: col.ID}, asks); err != nil || a[0].Holders != 0 {
					t.Errorf("got %+v, err = %v", a, err)
				}
			}
		}
	})
}

// TestKnownReferencesSurviveANewerRecord checks that loaded references stay valid when
// the record becomes one of a newer release and becomes readable again, at every
// moment.
func TestKnownReferencesSurviveANewerRecord(t *testing.T) {
	inEnv(t, func(_ *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s)
		w.checkpoint(r, col, 100, 100)
		snap := w.create(r, col, "x")
		asks := w.dropSegments(r, col, s.ID)
		settle()
		old := w.record(snap)
		r.store.Plan(func(c object.Call) object.Fault { // nothing can be read again
			if c.Op == object.OpGet {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		w.changeRecord(snap, func(rec *storagev1.Snapshot) { rec.Format = 1000 })
		settle()
		w.heldBy(w.reclaim(r, col, gc.ByCaller, asks...)[0], snap)
		w.put(keys.Snapshot(snap.ID), old)
		settle()
		w.heldBy(w.reclaim(r, col, gc.ByCaller, asks...)[0], snap)
		r.store.Plan(nil)
	})
}

// TestLoadingReferences checks that a call waits for a while and then fails while
// references are being loaded.
func TestLoadingReferences(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		other, _, _ := w.collection(r, "other")
		var asks []gc.Ask
		for _, c := range []catalog.Collection{col, other} {
			s := w.segment(r, c, 0, 1, 20)
			w.add(r, c, s)
			w.checkpoint(r, c, 100, 100)
			asks = append(asks, w.dropSegments(r, c, s.ID)...)
		}
		w.create(r, col, "x")
		b := w.start("b", func(o *testOptions) { o.Stores["default"].(*object.Faulty).Freeze() })
		settle()
		if st := b.GC.Stats(); st.Loading != 1 {
			t.Errorf("got %+v", st)
		}
		began := time.Now()
		_, err := b.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks[:1], gc.ByCaller, "tester")
		wantError(t, err, gc.ErrLoading)
		if d := time.Since(began); d != 10*time.Second {
			t.Errorf("it waited %v", d)
		}
		w.granted(w.reclaim(b, other, gc.ByCaller, asks[1]))
		result := make(chan []gc.Answer, 1)
		go func() {
			answers, err := b.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks[:1], gc.ByCaller, "tester")
			if err != nil {
				t.Error(err)
			}
			result <- answers
		}()
		time.Sleep(5 * time.Second)
		settle()
		b.store.Thaw()
		w.granted(<-result)
	})
}

// TestLaggingFollower checks that a replica without the metadata store's changes gives
// no answers, and continues when they arrive.
func TestLaggingFollower(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		a, b := w.start("a"), w.start("b")
		col, _, _ := w.collection(b, "c")
		s := w.segment(b, col, 0, 1, 20)
		w.addWritten(b, col, s)
		w.checkpoint(b, col, 100, 100)
		settle()
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodNext || c.Method == meta.MethodScan || c.Method == meta.MethodWatch {
				return meta.Before
			}
			return meta.NoFault
		})
		snap := w.create(b, col, "x")
		settle() // a has received the pending changes
		asks := w.dropSegments(b, col, s.ID)
		_, err := a.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, gc.ErrLoading)
		_, _, now, err := w.kv.Get(t.Context(), "/none")
		if err != nil {
			t.Fatal(err)
		}
		if err := w.memory.Compact(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		a.kv.Hook(nil)
		time.Sleep(time.Minute) // its retries become less frequent
		w.heldBy(w.reclaim(a, col, gc.ByCaller, asks...)[0], snap)
		w.dropSnapshot(b, snap)
		w.granted(w.reclaim(a, col, gc.ByCaller, asks...))
	})
}

// TestFailedDeleteIsRetried checks that the tombstone stays until its files are
// deleted.
func TestFailedDeleteIsRetried(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		var ids []int64
		for range 3 {
			s := w.segment(r, col, 0, 1, 20)
			w.addWritten(r, col, s)
			ids = append(ids, s.ID)
		}
		asks := w.dropSegments(r, col, ids...)
		settle()
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		w.granted(w.reclaim(r, col, gc.BySnapshotd, asks...))
		time.Sleep(time.Minute)
		settle()
		if n, st := len(w.keysUnder("/gc/tomb/")), r.GC.Stats(); n != 3 || st.Granted != 3 ||
			st.Unconfirmed != 0 || len(w.objectsUnder("data/")) != 3 {
			t.Errorf("%d tombstones, stats %+v, files %v", n, st, w.objectsUnder("data/"))
		}
		confirmed, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids)
		if err != nil || !slices.Equal(confirmed,
			[]gc.Confirmation{gc.OwnedBySnapshotd, gc.OwnedBySnapshotd, gc.OwnedBySnapshotd}) {
			t.Errorf("got %v, err = %v", confirmed, err)
		}
		r.store.FailNth(object.OpDelete, 0, object.FaultAfter)
		time.Sleep(time.Minute)
		settle()
		if got := append(w.keysUnder("/gc/tomb/"), w.objectsUnder("data/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestZombieLeader checks that a leader deposed during a delete does not confirm it,
// and that its late delete is harmless.
func TestZombieLeader(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		var late *tardy
		a := w.start("a", func(o *testOptions) {
			late = &tardy{Store: o.Stores["default"]}
			o.Stores = map[string]object.Store{"default": late}
		})
		settle()
		b := w.start("b")
		col, _, _ := w.collection(b, "c")
		s, stays := w.segment(b, col, 0, 1, 20), w.segment(b, col, 0, 1, 20)
		w.addWritten(b, col, s, stays)
		asks := w.dropSegments(b, col, s.ID)
		settle()
		if !a.Leading() {
			t.Fatal("a does not lead")
		}
		late.hold()
		b.store.Plan(func(c object.Call) object.Fault { // the next leader cannot delete it either
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		w.granted(w.reclaim(b, col, gc.BySnapshotd, asks...))
		settle()
		a.kv.Freeze()
		time.Sleep(time.Minute)
		settle()
		if !b.Leading() {
			t.Fatal("b does not lead")
		}
		before := w.keysUnder("/gc/tomb/")
		late.release()
		settle()
		a.kv.Thaw()
		settle()
		if got := w.keysUnder("/gc/tomb/"); len(before) != 1 || !slices.Equal(got, before) {
			t.Errorf("the old leader confirmed: %v, before %v", got, before)
		}
		if got := w.objectsUnder("data/"); !slices.Equal(got, []string{"data/" + stays.Files[0].Path}) {
			t.Errorf("files %v", got)
		}
		b.store.Plan(nil)
		time.Sleep(time.Minute)
		settle()
		if got := w.keysUnder("/gc/tomb/"); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// removals observes the transactions that remove tombstones.
type removals struct {
	meta.KV
	before func()               // the first
	ended  func(meta.TxnResult) // it
	once   sync.Once
}

func (r *removals) Txn(ctx context.Context, t meta.Txn) (res meta.TxnResult, err error) {
	removal := slices.ContainsFunc(t.Then, func(op meta.Op) bool {
		return op.Kind == meta.OpDelete && strings.HasPrefix(op.From, keys.AllTombstonesPrefix)
	})
	first := false
	if removal {
		r.once.Do(func() { first = true })
	}
	if !first {
		return r.KV.Txn(ctx, t)
	}
	r.before()
	// The leader has not noticed yet.
	if res, err = r.KV.Txn(context.WithoutCancel(ctx), t); err == nil {
		r.ended(res)
	}
	return res, err
}

// TestRemovalIsFenced checks that a leader that lost its term before it removes a
// tombstone fails.
func TestRemovalIsFenced(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		var refused atomic.Bool
		r := w.start("a", func(o *testOptions) {
			o.KV = &removals{
				KV: o.KV,
				before: func() {
					if _, err := w.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Leader)}}); err != nil {
						t.Error(err)
					}
				},
				ended: func(res meta.TxnResult) { refused.Store(!res.Succeeded) },
			}
		})
		col, _, _ := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s)
		w.granted(w.reclaim(r, col, gc.BySnapshotd, w.dropSegments(r, col, s.ID)...))
		settle()
		if got := w.keysUnder("/gc/tomb/"); !refused.Load() || len(got) != 1 {
			t.Errorf("refused: %v; tombstones %v", refused.Load(), got)
		}
		time.Sleep(time.Minute)
		settle()
		if got := w.keysUnder("/gc/tomb/"); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestPartsOfASegment checks that a replaced build is held by the snapshots that have
// it, and replaced files by those that have their segment.
func TestPartsOfASegment(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, x := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		build := func() segment.Build {
			b := segment.Build{ID: w.newID(r), Index: x.ID, Field: 100}
			// Its path lacks its id, which makes it a foreign file.
			b.Files = []segment.File{{
				Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/v%d", col.ID, s.ID, b.ID),
				Size: 5,
			}}
			return b
		}
		old := build()
		s.Builds = []segment.Build{old}
		w.addWritten(r, col, s)
		w.checkpoint(r, col, 100, 100)
		with := w.create(r, col, "with")
		next := build()
		w.writeFiles(&segment.Segment{Builds: []segment.Build{next}})
		w.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, AddBuilds: []segment.Build{next}}}})
		without := w.create(r, col, "without")
		f := segment.File{
			Kind: segment.KindInsert, Path: fmt.Sprintf("%d/0/%d/insert/100/2", col.ID, s.ID),
			MinTimestamp: 1, MaxTimestamp: 2, Size: 3,
		}
		w.writeFiles(&segment.Segment{Files: []segment.File{f}})
		was := catalog.FilePath{Path: s.Files[0].Path}
		w.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{
			Segment: s.ID, RemoveFiles: []catalog.FilePath{was},
			AddFiles: []segment.File{f},
		}}})
		after := w.create(r, col, "after")

		oldPath := catalog.FilePath{Path: old.Files[0].Path}
		answers := w.reclaim(r, col, gc.ByCaller, gc.Ask{Build: old.ID}, gc.Ask{File: oldPath},
			gc.Ask{File: was}, gc.Ask{Build: next.ID},
			gc.Ask{File: catalog.FilePath{Path: f.Path}}, gc.Ask{File: catalog.FilePath{Path: next.Files[0].Path}},
			gc.Ask{Segment: s.ID})
		w.heldBy(answers[0], with)
		w.heldBy(answers[1], with)
		w.heldBy(answers[2], without, with) // the next snapshot has the segment without the file
		if a := answers[3]; a.State != gc.Unknown || a.Holders != 2 {
			t.Errorf("the build that lives is %+v", a)
		}
		for _, a := range answers[4:] {
			if a.State != gc.Live || a.LiveIn != s.ID || a.Holders != 4 {
				t.Errorf("what lives is %+v", a)
			}
		}
		w.dropSnapshot(r, with)
		tomb := w.granted(w.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: oldPath}))[0]
		if tomb.ID != old.ID || tomb.Unit.Kind != catalog.UnitBuild || tomb.Unit.Segment.ID != s.ID {
			t.Errorf("got %+v", tomb)
		}
		settle()
		w.heldBy(w.reclaim(r, col, gc.ByCaller, gc.Ask{File: was})[0], without)
		w.dropSnapshot(r, without)
		tomb = w.granted(w.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: was}))[0]
		if tomb.Unit.Kind != catalog.UnitFiles || tomb.Unit.Segment.ID != s.ID {
			t.Errorf("got %+v", tomb)
		}
		settle()
		if got, want := w.objectsUnder("data/"), []string{
			"data/" + next.Files[0].Path,
			"data/" + f.Path,
		}; !slices.Equal(got, want) {
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("left %v, want %v", got, want)
			}
		}
		if got := append(w.keysUnder("/gc/tomb/"), w.keysUnder("/catalog/replaced/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
		w.dropSnapshot(r, after)
		// The whole segment is dropped, with its last build.
		w.dropSegments(r, col, s.ID)
		tombs := w.granted(w.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: catalog.FilePath{Path: next.Files[0].Path}},
			gc.Ask{Segment: s.ID}))
		if !sameTombstone(tombs[0], tombs[1]) || tombs[0].Unit.Kind != catalog.UnitSegment {
			t.Errorf("got %+v", tombs)
		}
		settle()
		if got := w.objectsUnder("data/"); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestForeignFileStays checks that a file outside all layouts belongs to every segment
// that has it, and stays when one of them is granted.
func TestForeignFileStays(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, x := w.collection(r, "c")
		owner := w.segment(r, col, 0, 1, 20)
		b := segment.Build{ID: w.newID(r), Index: x.ID, Field: 100}
		b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/f", b.ID), Size: 5}}
		owner.Builds = []segment.Build{b}
		user := w.segment(r, col, 0, 1, 20)
		user.Files = append(user.Files, b.Files[0])
		w.addWritten(r, col, owner, user)
		w.checkpoint(r, col, 100, 100)
		snap := w.create(r, col, "x")
		asks := w.dropSegments(r, col, owner.ID)
		w.heldBy(w.reclaim(r, col, gc.BySnapshotd, asks...)[0], snap)
		w.dropSnapshot(r, snap)
		w.granted(w.reclaim(r, col, gc.BySnapshotd, asks...))
		time.Sleep(5 * time.Minute)
		settle()
		if got, want := w.objectsUnder("data/"), []string{
			"data/" + user.Files[0].Path,
			"data/" + b.Files[0].Path,
		}; !slices.Equal(got, want) {
			t.Errorf("left %v, want %v", got, want)
		}
	})
}

// TestPathsAreNotSharedAndNotUsedTwice checks that a path of another owner cannot be
// registered again.
func TestPathsAreNotSharedAndNotUsedTwice(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		s := w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s)
		refused := func(what string) {
			t.Helper()
			thief := w.segment(r, col, 0, 1, 20)
			thief.Files = append(thief.Files, s.Files[0])
			_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{thief})
			wantError(t, err, catalog.ErrFileExists)
			_, err = r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
				catalog.SegmentChange{Add: []segment.Segment{thief}})
			wantError(t, err, catalog.ErrFileExists)
			plain := w.segment(r, col, 0, 1, 20)
			w.add(r, col, plain)
			_, err = r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, catalog.SegmentChange{
				Update: []catalog.Update{{Segment: plain.ID, AddFiles: s.Files[:1]}},
			})
			wantError(t, err, catalog.ErrFileExists)
			if t.Failed() {
				t.Fatal(what)
			}
		}
		refused("it lives")
		f := segment.File{
			Kind: segment.KindInsert, Path: fmt.Sprintf("%d/0/%d/insert/100/2", col.ID, s.ID),
			MinTimestamp: 1, MaxTimestamp: 2, Size: 3,
		}
		w.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{
			Segment:     s.ID,
			RemoveFiles: []catalog.FilePath{{Path: s.Files[0].Path}}, AddFiles: []segment.File{f},
		}}})
		again := func() {
			t.Helper()
			_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, catalog.SegmentChange{
				Update: []catalog.Update{{Segment: s.ID, AddFiles: s.Files[:1]}},
			})
			wantError(t, err, catalog.ErrFileExists)
		}
		refused("it was taken out")
		again()
		tomb := w.granted(w.reclaim(r, col, gc.ByCaller, gc.Ask{File: catalog.FilePath{Path: s.Files[0].Path}}))[0]
		refused("it is granted")
		again()
		if _, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{tomb.ID}); err != nil {
			t.Fatal(err)
		}
		again() // while the segment exists
		// An output that has a file of an input.
		out := w.segment(r, col, 0, 1, 20)
		out.Files = append(out.Files, f)
		_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
			catalog.SegmentChange{Drop: []int64{s.ID}, Add: []segment.Segment{out}})
		wantError(t, err, catalog.ErrFileExists)
	})
}

// TestReclaimInOtherCollections checks that units of other collections are unknown, and
// that those of a collection being dropped are reclaimed by its id.
func TestReclaimInOtherCollections(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r := w.start("a")
		col, _, _ := w.collection(r, "c")
		other, _, _ := w.collection(r, "other")
		s, lives := w.segment(r, col, 0, 1, 20), w.segment(r, col, 0, 1, 20)
		w.addWritten(r, col, s, lives)
		asks := append(w.dropSegments(r, col, s.ID), gc.Ask{File: catalog.FilePath{Path: s.Files[0].Path}},
			gc.Ask{Segment: lives.ID})
		for _, a := range w.reclaim(r, other, gc.ByCaller, asks...) {
			if a.State != gc.Unknown || a.Holders != 0 {
				t.Errorf("got %+v", a)
			}
		}
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		_, err := r.GC.Reclaim(t.Context(), catalog.Ref{DB: "default", Name: "c"}, asks, gc.ByCaller, "tester")
		wantError(t, err, catalog.ErrCollectionNotFound)
		answers := w.reclaim(r, col, gc.ByCaller, asks...)
		tombs := w.granted(answers) // also that of the segment dropped with it
		if tombs[2].ID != lives.ID || tombs[2].Unit.Kind != catalog.UnitSegment {
			t.Errorf("got %+v", tombs[2])
		}
		got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: other.ID}, []int64{tombs[0].ID})
		if err != nil || got[0] != gc.NoTombstone {
			t.Errorf("got %v, err = %v", got, err)
		}
		for _, want := range []gc.Confirmation{gc.Confirmed, gc.NoTombstone} {
			got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{tombs[0].ID})
			if err != nil || got[0] != want {
				t.Errorf("got %v, err = %v; want %v", got, err, want)
			}
		}
		for _, call := range []func(context.Context, catalog.Ref) error{
			func(ctx context.Context, ref catalog.Ref) error { _, err := r.GC.Check(ctx, ref, asks); return err },
			func(ctx context.Context, ref catalog.Ref) error {
				_, err := r.GC.Confirm(ctx, ref, []int64{1})
				return err
			},
		} {
			wantError(t, call(t.Context(), catalog.Ref{ID: 1 << 40}), catalog.ErrCollectionNotFound)
		}
	})
}

// TestConfirmRaces checks that concurrent confirms succeed, and that a confirm without
// an answer reports that.
func TestConfirmRaces(t *testing.T) {
	inEnv(t, func(t *testing.T, w *testEnv) {
		r, b := w.start("a"), w.start("b")
		col, _, _ := w.collection(b, "c")
		var ids []int64
		for range 3 {
			s := w.segment(b, col, 0, 1, 20)
			w.add(b, col, s)
			ids = append(ids, s.ID)
		}
		w.granted(w.reclaim(b, col, gc.ByCaller, w.dropSegments(b, col, ids...)...))
		settle()
		n := 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn {
				if n++; n == 2 { // after the read
					if _, err := b.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids[:1]); err != nil {
						t.Error(err)
					}
				}
				if n == 6 { // after the second read of the units and the gone ids
					return meta.After
				}
			}
			return meta.NoFault
		})
		_, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids)
		wantError(t, err, meta.ErrUnavailable)
		r.kv.Hook(nil)
		got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids)
		if err != nil || !slices.Equal(got, []gc.Confirmation{gc.NoTombstone, gc.NoTombstone, gc.NoTombstone}) {
			t.Errorf("got %v, err = %v", got, err)
		}
	})
}
