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
func (e *env) addWritten(r *testReplica, col catalog.Collection, segments ...segment.Segment) {
	e.t.Helper()
	for i := range segments {
		e.writeFiles(&segments[i])
	}
	e.add(r, col, segments...)
}

func (e *env) writeFiles(s *segment.Segment) {
	e.t.Helper()
	for f := range s.AllFiles() {
		if _, err := e.objects.Put(e.t.Context(), "data/"+f.Path, bytes.Repeat([]byte{1}, int(f.Size))); err != nil {
			e.t.Fatal(err)
		}
	}
}

// heldSegment makes a collection whose only segment is dropped and held by a snapshot.
func (e *env) heldSegment(r *testReplica) (catalog.Collection, *snapshot.Record, []gc.Ask) {
	e.t.Helper()
	col, _, _ := e.collection(r, "c")
	s := e.segment(r, col, 0, 1, 20)
	e.addWritten(r, col, s)
	e.checkpoint(r, col, 100, 100)
	snap := e.create(r, col, "x")
	return col, snap, e.dropSegments(r, col, s.ID)
}

// dropSegments drops segments of a collection and returns their ids as asks.
func (e *env) dropSegments(r *testReplica, col catalog.Collection, ids ...int64) []gc.Ask {
	e.t.Helper()
	e.swap(r, col, catalog.SegmentChange{Drop: ids})
	asks := make([]gc.Ask, len(ids))
	for i, id := range ids {
		asks[i] = gc.Ask{Segment: id}
	}
	return asks
}

func (e *env) swap(r *testReplica, col catalog.Collection, swap catalog.SegmentChange) {
	e.t.Helper()
	if _, err := r.catalog.Change(e.t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, swap); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) reclaim(r *testReplica, col catalog.Collection, deleter gc.Deleter, asks ...gc.Ask) []gc.Answer {
	e.t.Helper()
	answers, err := r.GC.Reclaim(e.t.Context(), catalog.Ref{ID: col.ID}, asks, deleter, "tester")
	if err != nil {
		e.t.Fatal(err)
	}
	if len(answers) != len(asks) {
		e.t.Fatalf("%d answers to %d asks", len(answers), len(asks))
	}
	return answers
}

// granted fails unless all answers are grants.
func (e *env) granted(answers []gc.Answer) []*gc.Tombstone {
	e.t.Helper()
	var list []*gc.Tombstone
	for i, a := range answers {
		if a.State != gc.Granted || a.Tombstone == nil || a.Holders != 0 {
			e.t.Fatalf("answer %d is %+v, want a grant", i, a)
		}
		list = append(list, a.Tombstone)
	}
	return list
}

// heldBy fails unless exactly these snapshots hold the unit.
func (e *env) heldBy(a gc.Answer, snapshots ...*snapshot.Record) {
	e.t.Helper()
	if a.State != gc.Dropped || a.Tombstone != nil || a.Holders != len(snapshots) ||
		len(a.Creating) > 0 || len(a.Snapshots) != len(snapshots) {
		e.t.Fatalf("answer is %+v, want it held by %v", a, snapshots)
	}
	for i, s := range snapshots {
		if a.Snapshots[i] != (gc.SnapshotHolder{ID: s.ID, Name: s.Name}) {
			e.t.Errorf("holder %d is %+v, want %s", i, a.Snapshots[i], s)
		}
	}
}

func (e *env) dropSnapshot(r *testReplica, s *snapshot.Record) {
	e.t.Helper()
	if _, err := r.Drop(e.t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
		e.t.Fatal(err)
	}
}

func sameTombstone(a, b *gc.Tombstone) bool {
	return a.ID == b.ID && a.Collection == b.Collection && a.Deleter == b.Deleter && a.Caller == b.Caller &&
		a.GrantTime.Equal(b.GrantTime) && a.Revision == b.Revision
}

// withSpy starts a replica whose grants can be intercepted.
func (e *env) withSpy(name string) (*testReplica, *spy, *int) {
	s, failed := &spy{}, new(int)
	s.failed = func() { *failed++ }
	r := e.start(name, func(o *testOptions) { s.KV, o.KV = o.KV, s })
	return r, s, failed
}

func TestUnitIsReclaimed(t *testing.T) {
	for name, deleter := range map[string]gc.Deleter{"snapshotd": gc.BySnapshotd, "caller": gc.ByCaller} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				col, _, x := e.collection(r, "c")
				s := e.segment(r, col, 0, 1, 20)
				b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
				b.Files = []segment.File{{
					Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, s.ID, b.ID),
					Size: 5,
				}}
				s.Builds = []segment.Build{b}
				foreign := segment.File{Kind: segment.KindStats, Path: "shared/stats", Size: 7}
				s.Files = append(s.Files, foreign)
				e.addWritten(r, col, s)
				e.checkpoint(r, col, 100, 100)
				live := e.reclaim(r, col, deleter, gc.Ask{Segment: s.ID})[0]
				if live.State != gc.Live || live.LiveIn != s.ID || live.Holders != 1 {
					t.Errorf("a living segment is %+v", live)
				}
				one := e.create(r, col, "one")
				two := e.create(r, col, "two")
				asks := e.dropSegments(r, col, s.ID)
				e.heldBy(e.reclaim(r, col, deleter, asks...)[0], two, one)
				e.dropSnapshot(r, one)
				e.heldBy(e.reclaim(r, col, deleter, asks...)[0], two)
				if n := len(e.objectsUnder("data/")); n != 3 {
					t.Errorf("%d files, want 3", n)
				}
				e.dropSnapshot(r, two)
				check, err := r.GC.Check(t.Context(), catalog.Ref{ID: col.ID}, asks)
				if err != nil || check[0].State != gc.Dropped || check[0].Holders != 0 {
					t.Errorf("a unit without holders is %+v, err = %v", check, err)
				}
				tomb := e.granted(e.reclaim(r, col, deleter, asks...))[0]
				if tomb.ID != s.ID || tomb.Deleter != deleter || tomb.Caller != "tester" ||
					tomb.Unit.Kind != catalog.UnitSegment || tomb.Revision == 0 {
					t.Errorf("got %+v", tomb)
				}
				if again := e.reclaim(r, col, gc.BySnapshotd, asks...)[0]; deleter == gc.ByCaller &&
					!sameTombstone(again.Tombstone, tomb) {
					t.Errorf("it was %+v, now it is %+v", tomb, again.Tombstone)
				}
				time.Sleep(5 * time.Minute)
				settle()
				if deleter == gc.ByCaller {
					if n := len(e.objectsUnder("data/")); n != 3 {
						t.Errorf("%d files, want 3: the caller deletes them", n)
					}
					if st := r.GC.Stats(); st.Unconfirmed != 1 || st.Oldest != 5*time.Minute || st.Granted != 0 {
						t.Errorf("got %+v", st)
					}
					got, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{s.ID, 1 << 40})
					if err != nil || !slices.Equal(got, []gc.Confirmation{gc.Confirmed, gc.NoTombstone}) {
						t.Errorf("got %v, err = %v", got, err)
					}
				} else if got := e.objectsUnder("data/"); !slices.Equal(got, []string{"data/shared/stats"}) {
					t.Errorf("left %v, want the foreign file", got)
				}
				settle()
				if got := e.keysUnder("/gc/tomb/"); len(got) > 0 {
					t.Errorf("left %v", got)
				}
				if st := r.GC.Stats(); st != (gc.Stats{}) {
					t.Errorf("got %+v", st)
				}
				if a := e.reclaim(r, col, deleter, asks...)[0]; a.State != gc.Unknown || a.Holders != 0 {
					t.Errorf("what is gone is %+v", a)
				}
				e.check(r)
			})
		})
	}
}

// TestGrantComparesItsPreconditions checks that a grant compares the generation and the
// pending keys, and is retried when one changed after it was read.
func TestGrantComparesItsPreconditions(t *testing.T) {
	for name, between := range map[string]func(e *env, b *testReplica, col catalog.Collection){
		"a commit": func(e *env, b *testReplica, col catalog.Collection) { e.create(b, col, "x") },
		"a begin": func(e *env, b *testReplica, col catalog.Collection) {
			b.store.Freeze()
			sp := spec(col, "x")
			sp.NoWait = true
			if _, err := b.Create(e.t.Context(), request.Token{}, sp); err != nil {
				e.t.Error(err)
			}
		},
		"a grant": func(e *env, b *testReplica, col catalog.Collection) {
			for _, key := range e.keysUnder(keys.UnitPrefix(col.ID)) {
				id, err := keys.LastID(key)
				if err != nil {
					e.t.Error(err)
				}
				if _, err := b.GC.Reclaim(e.t.Context(), catalog.Ref{ID: col.ID}, []gc.Ask{{Segment: id}},
					gc.ByCaller, "other"); err != nil {
					e.t.Error(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				b := e.start("b")
				a, spy, failed := e.withSpy("a")
				col, _, _ := e.collection(b, "c")
				e.checkpoint(b, col, 100, 100)
				s := e.segment(b, col, 0, 1, 20)
				e.addWritten(b, col, s)
				asks := e.dropSegments(b, col, s.ID)
				settle()
				spy.before = func() { between(e, b, col) }
				tomb := e.granted(e.reclaim(a, col, gc.ByCaller, asks...))[0]
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
	inEnv(t, func(t *testing.T, e *env) {
		b := e.start("b")
		a, spy, failed := e.withSpy("a")
		col, _, _ := e.collection(b, "c")
		s := e.segment(b, col, 0, 1, 20)
		e.add(b, col, s)
		e.checkpoint(b, col, 100, 100)
		asks := e.dropSegments(b, col, s.ID)
		n := 0
		var again func()
		again = func() {
			n++
			e.create(b, col, fmt.Sprint("x", n))
			spy.before = again
		}
		spy.before = again
		_, err := a.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, meta.ErrConflict)
		if *failed != 16 || len(e.keysUnder("/gc/tomb/")) > 0 {
			t.Errorf("%d attempts, tombstones %v", *failed, e.keysUnder("/gc/tomb/"))
		}
	})
}

// TestCommitAtEachMomentOfADecision commits a snapshot that began before the drop at
// each moment of a decision: it holds the unit.
func TestCommitAtEachMomentOfADecision(t *testing.T) {
	for call := int64(0); ; call++ {
		reached := true
		inEnv(t, func(t *testing.T, e *env) {
			b := e.start("b")
			settle() // it leads
			a := e.start("a")
			col, _, _ := e.collection(b, "c")
			s := e.segment(b, col, 0, 1, 20)
			e.addWritten(b, col, s)
			e.checkpoint(b, col, 100, 100)
			settle()
			b.store.Freeze()
			created := make(chan error, 1)
			go func() {
				_, err := b.Create(t.Context(), request.Token{}, spec(col, "x"))
				created <- err
			}()
			settle()
			asks := e.dropSegments(a, col, s.ID)
			settle()
			if answer := e.reclaim(a, col, gc.BySnapshotd, asks...)[0]; answer.State != gc.Dropped ||
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
			answer := e.reclaim(a, col, gc.BySnapshotd, asks...)[0]
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
			e.heldBy(e.reclaim(a, col, gc.BySnapshotd, asks...)[0], snap)
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
	inEnv(t, func(t *testing.T, e *env) {
		r, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(r, "c")
		first, second := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, first, second)
		e.checkpoint(r, col, 100, 100)
		asks := e.dropSegments(r, col, first.ID)
		b.store.Freeze()
		sp := spec(col, "x")
		sp.NoWait = true
		pending, err := b.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		settle()
		asks = append(asks, e.dropSegments(r, col, second.ID)...)
		answers := e.reclaim(r, col, gc.ByCaller, asks...)
		e.granted(answers[:1])
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
		e.heldBy(e.reclaim(r, col, gc.ByCaller, asks[1])[0], snap)
		for _, s := range e.segments(r, snap) {
			if s.ID != second.ID {
				t.Errorf("the snapshot has segment %d", s.ID)
			}
		}
	})
}

func TestGrantWithoutAnswer(t *testing.T) {
	for name, fault := range map[string]meta.Fault{"before": meta.Before, "after": meta.After} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r, b := e.start("a"), e.start("b")
				col, _, _ := e.collection(b, "c")
				s := e.segment(b, col, 0, 1, 20)
				e.add(b, col, s)
				asks := e.dropSegments(b, col, s.ID)
				settle()
				r.kv.FailNth(1, fault, meta.MethodTxn) // after the read
				_, err := r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "first")
				wantError(t, err, meta.ErrUnavailable)
				if r.kv.Fired() != 1 {
					t.Fatalf("%d faults", r.kv.Fired())
				}
				r.kv.Hook(nil)
				want := map[meta.Fault]string{meta.Before: "tester", meta.After: "first"}[fault]
				tomb := e.granted(e.reclaim(r, col, gc.BySnapshotd, asks...))[0]
				if tomb.Caller != want {
					t.Errorf("it is %s's, want %s's", tomb.Caller, want)
				}
			})
		})
	}
}

// TestDuplicateAsksOfOneUnit asks for a unit by both forms, twice: there is one grant.
func TestDuplicateAsksOfOneUnit(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, x := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
		b.Files = []segment.File{{
			Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/%d/f", col.ID, s.ID, b.ID),
			Size: 5,
		}}
		s.Builds = []segment.Build{b}
		e.addWritten(r, col, s)
		e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, RemoveBuilds: []int64{b.ID}}}})
		answers := e.reclaim(r, col, gc.ByCaller, gc.Ask{Build: b.ID},
			gc.Ask{File: catalog.FilePath{Path: b.Files[0].Path}}, gc.Ask{Segment: b.ID},
			gc.Ask{Build: b.ID}, gc.Ask{Build: 1 << 40})
		tombs := e.granted(answers[:4])
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
	inEnv(t, func(t *testing.T, e *env) {
		rs := []*testReplica{e.start("a"), e.start("b")}
		col, _, _ := e.collection(rs[0], "c")
		s := e.segment(rs[0], col, 0, 1, 20)
		e.add(rs[0], col, s)
		asks := e.dropSegments(rs[0], col, s.ID)
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
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var asks []gc.Ask
		var segments []segment.Segment
		for range 1000 {
			segments = append(segments, e.segment(r, col, 0, 1, 20))
		}
		e.add(r, col, segments...)
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
		for i, a := range e.reclaim(r, col, gc.ByCaller, asks...) {
			if i%4 == 3 {
				if a.State != gc.Unknown {
					t.Fatalf("answer %d is %+v", i, a)
				}
			} else if a.State != gc.Granted || a.Tombstone.ID != asks[i].Segment {
				t.Fatalf("answer %d is %+v, asked for %+v", i, a, asks[i])
			}
		}
		if n := len(e.keysUnder("/gc/tomb/")); n != 1000 {
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
			len(e.keysUnder("/gc/tomb/")) > 0 {
			t.Errorf("err = %v", err)
		}
	})
}

// TestLargeUnits grants units of which a transaction holds one or two: one call grants
// all, and memory stays bounded.
func TestLargeUnits(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var ids []int64
		for range 18 {
			s := e.segment(r, col, 0, 1, 20)
			s.Attributes = map[string]string{"large": strings.Repeat("x", 600<<10)}
			e.add(r, col, s)
			ids = append(ids, s.ID)
		}
		for _, id := range ids {
			e.dropSegments(r, col, id)
		}
		asks := make([]gc.Ask, len(ids))
		for i, id := range ids {
			asks[i] = gc.Ask{Segment: id}
		}
		e.granted(e.reclaim(r, col, gc.ByCaller, asks...))
		list, more, err := r.GC.List(t.Context(), 0, 0, 0, 0, 1000)
		if err != nil || !more || len(list) == 0 || len(list) > 7 {
			t.Errorf("%d in one list, more = %v, err = %v", len(list), more, err)
		}
	})
}

// forget replaces a replica by a new one with empty caches.
func (e *env) forget(r *testReplica, name string) *testReplica {
	e.t.Helper()
	r.stop()
	return e.start(name)
}

func TestUnreadableReferences(t *testing.T) {
	damage := map[string]func(e *env, s *snapshot.Record, key string, data []byte) (repair func()){
		"one bit": func(e *env, _ *snapshot.Record, key string, data []byte) func() {
			bad := slices.Clone(data)
			bad[len(bad)/2] ^= 1
			e.putObject(key, bad)
			return func() { e.putObject(key, data) }
		},
		"missing": func(e *env, _ *snapshot.Record, key string, data []byte) func() {
			if err := e.objects.Delete(e.t.Context(), key); err != nil {
				e.t.Fatal(err)
			}
			return func() { e.putObject(key, data) }
		},
		"metadata": func(e *env, s *snapshot.Record, _ string, _ []byte) func() {
			key := manifest.MetadataKey(s.Collection, s.ID)
			data, err := object.ReadAll(e.t.Context(), e.objects, key, s.Metadata.Length)
			if err != nil {
				e.t.Fatal(err)
			}
			e.putObject(key, data[:len(data)-1])
			e.withoutReferences(s) // else the metadata is not read
			return func() { e.putObject(key, data) }
		},
		"another store": func(e *env, s *snapshot.Record, _ string, _ []byte) func() {
			old := e.record(s)
			e.changeRecord(s, func(r *storagev1.Snapshot) { r.Store = "elsewhere" })
			return func() { // the store of a snapshot never changes
				if _, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Snapshot(s.ID))}}); err != nil {
					e.t.Fatal(err)
				}
				e.put(keys.Snapshot(s.ID), old)
			}
		},
		"newer record": func(e *env, s *snapshot.Record, _ string, _ []byte) func() {
			old := e.record(s)
			e.changeRecord(s, func(r *storagev1.Snapshot) { r.Format = 1000 })
			return func() { e.put(keys.Snapshot(s.ID), old) }
		},
	}
	for name, harm := range damage {
		for _, heal := range []string{"repaired", "dropped"} {
			if heal == "dropped" && name != "one bit" && name != "missing" {
				continue // a drop reads the record
			}
			t.Run(name+", "+heal, func(t *testing.T) {
				inEnv(t, func(t *testing.T, e *env) {
					r := e.start("a")
					col, _, _ := e.collection(r, "c")
					other, _, _ := e.collection(r, "other")
					var asks [2][]gc.Ask
					for i, c := range []catalog.Collection{col, other} {
						s := e.segment(r, c, 0, 1, 20)
						e.addWritten(r, c, s)
						e.checkpoint(r, c, 100, 100)
						asks[i] = e.dropSegments(r, c, s.ID)
					}
					s := e.create(r, col, "x")
					key := manifest.RefsKey(col.ID, s.ID)
					data, err := object.ReadAll(t.Context(), e.objects, key, 1<<20)
					if err != nil {
						t.Fatal(err)
					}
					repair := harm(e, s, key, data)
					r = e.forget(r, "b")
					settle()
					_, err = r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks[0], gc.ByCaller, "tester")
					wantError(t, err, gc.ErrUnreadable)
					if !strings.Contains(errText(err), fmt.Sprintf(`snapshot "x" (%d)`, s.ID)) {
						t.Errorf("got %v", err)
					}
					_, err = r.GC.Check(t.Context(), catalog.Ref{ID: col.ID}, asks[0])
					wantError(t, err, gc.ErrUnreadable)
					e.granted(e.reclaim(r, other, gc.ByCaller, asks[1]...))
					if st := r.GC.Stats(); st.Unreadable != 1 || st.Snapshots != 0 || st.Loading != 0 {
						t.Errorf("got %+v", st)
					}
					if heal == "dropped" {
						e.dropSnapshot(r, s)
					} else {
						repair()
						time.Sleep(time.Minute)
					}
					settle()
					if st := r.GC.Stats(); st.Unreadable != 0 {
						t.Errorf("got %+v", st)
					}
					e.granted(e.reclaim(r, col, gc.ByCaller, asks[0]...))
				})
			})
		}
	}
}

// TestReferencesOfALostStore checks that reads of references are retried while the
// store does not answer. After a while the metrics count them as unreadable until they
// are read; callers get an error without the store's text.
func TestReferencesOfALostStore(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, snap, asks := e.heldSegment(r)
		lost := func(c object.Call) object.Fault {
			if c.Op == object.OpGet {
				return object.FaultBefore
			}
			return object.FaultNone
		}
		b := e.start("b", func(o *testOptions) { o.Stores["default"].(*object.Faulty).Plan(lost) })
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
		e.heldBy(e.reclaim(b, col, gc.ByCaller, asks...)[0], snap)
	})
}

func (e *env) putObject(key string, data []byte) {
	e.t.Helper()
	if _, err := e.objects.Put(e.t.Context(), key, data); err != nil {
		e.t.Fatal(err)
	}
}

// record returns the stored record of a snapshot.
func (e *env) record(s *snapshot.Record) []byte {
	e.t.Helper()
	kv, found, _, err := e.kv.Get(e.t.Context(), keys.Snapshot(s.ID))
	if err != nil || !found {
		e.t.Fatal(found, err)
	}
	return kv.Value
}

func (e *env) changeRecord(s *snapshot.Record, change func(*storagev1.Snapshot)) {
	e.t.Helper()
	rec := &storagev1.Snapshot{}
	if err := proto.Unmarshal(e.record(s), rec); err != nil {
		e.t.Fatal(err)
	}
	change(rec)
	data, err := proto.Marshal(rec)
	if err != nil {
		e.t.Fatal(err)
	}
	e.put(keys.Snapshot(s.ID), data)
}

// TestUnparseableRecordBlocksAll checks that a record without a readable collection
// blocks all collections.
func TestUnparseableRecordBlocksAll(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.add(r, col, s)
		asks := e.dropSegments(r, col, s.ID)
		for _, key := range []string{keys.Snapshot(999), keys.SnapshotPrefix + "nonsense"} {
			for _, restart := range []bool{false, true} {
				e.put(key, []byte("nonsense"))
				if restart {
					r = e.forget(r, "b")
				}
				settle()
				_, err := r.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
				wantError(t, err, gc.ErrUnreadable)
				if st := r.GC.Stats(); st.Unreadable != 1 {
					t.Errorf("got %+v", st)
				}
				if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(key)}}); err != nil {
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
	inEnv(t, func(_ *testing.T, e *env) {
		r := e.start("a")
		col, snap, asks := e.heldSegment(r)
		settle()
		old := e.record(snap)
		r.store.Plan(func(c object.Call) object.Fault { // nothing can be read again
			if c.Op == object.OpGet {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		e.changeRecord(snap, func(rec *storagev1.Snapshot) { rec.Format = 1000 })
		settle()
		e.heldBy(e.reclaim(r, col, gc.ByCaller, asks...)[0], snap)
		e.put(keys.Snapshot(snap.ID), old)
		settle()
		e.heldBy(e.reclaim(r, col, gc.ByCaller, asks...)[0], snap)
		r.store.Plan(nil)
	})
}

// TestLoadingReferences checks that a call waits for a while and then fails while
// references are being loaded.
func TestLoadingReferences(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "other")
		var asks []gc.Ask
		for _, c := range []catalog.Collection{col, other} {
			s := e.segment(r, c, 0, 1, 20)
			e.add(r, c, s)
			e.checkpoint(r, c, 100, 100)
			asks = append(asks, e.dropSegments(r, c, s.ID)...)
		}
		e.create(r, col, "x")
		b := e.start("b", func(o *testOptions) { o.Stores["default"].(*object.Faulty).Freeze() })
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
		e.granted(e.reclaim(b, other, gc.ByCaller, asks[1]))
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
		e.granted(<-result)
	})
}

// TestLaggingFollower checks that a replica without the metadata store's changes gives
// no answers, and continues when they arrive.
func TestLaggingFollower(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		s := e.segment(b, col, 0, 1, 20)
		e.addWritten(b, col, s)
		e.checkpoint(b, col, 100, 100)
		settle()
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodNext || c.Method == meta.MethodScan || c.Method == meta.MethodWatch {
				return meta.Before
			}
			return meta.NoFault
		})
		snap := e.create(b, col, "x")
		settle() // a has received the pending changes
		asks := e.dropSegments(b, col, s.ID)
		_, err := a.GC.Reclaim(t.Context(), catalog.Ref{ID: col.ID}, asks, gc.ByCaller, "tester")
		wantError(t, err, gc.ErrLoading)
		_, _, now, err := e.kv.Get(t.Context(), "/none")
		if err != nil {
			t.Fatal(err)
		}
		if err := e.memory.Compact(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		a.kv.Hook(nil)
		time.Sleep(time.Minute) // its retries become less frequent
		e.heldBy(e.reclaim(a, col, gc.ByCaller, asks...)[0], snap)
		e.dropSnapshot(b, snap)
		e.granted(e.reclaim(a, col, gc.ByCaller, asks...))
	})
}

// TestFailedDeleteIsRetried checks that the tombstone stays until its files are
// deleted.
func TestFailedDeleteIsRetried(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var ids []int64
		for range 3 {
			s := e.segment(r, col, 0, 1, 20)
			e.addWritten(r, col, s)
			ids = append(ids, s.ID)
		}
		asks := e.dropSegments(r, col, ids...)
		settle()
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		e.granted(e.reclaim(r, col, gc.BySnapshotd, asks...))
		time.Sleep(time.Minute)
		settle()
		if n, st := len(e.keysUnder("/gc/tomb/")), r.GC.Stats(); n != 3 || st.Granted != 3 ||
			st.Unconfirmed != 0 || len(e.objectsUnder("data/")) != 3 {
			t.Errorf("%d tombstones, stats %+v, files %v", n, st, e.objectsUnder("data/"))
		}
		confirmed, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, ids)
		if err != nil || !slices.Equal(confirmed,
			[]gc.Confirmation{gc.OwnedBySnapshotd, gc.OwnedBySnapshotd, gc.OwnedBySnapshotd}) {
			t.Errorf("got %v, err = %v", confirmed, err)
		}
		r.store.FailNth(object.OpDelete, 0, object.FaultAfter)
		time.Sleep(time.Minute)
		settle()
		if got := append(e.keysUnder("/gc/tomb/"), e.objectsUnder("data/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestZombieLeader checks that a leader deposed during a delete does not confirm it,
// and that its late delete is harmless.
func TestZombieLeader(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		var late *tardy
		a := e.start("a", func(o *testOptions) {
			late = &tardy{Store: o.Stores["default"]}
			o.Stores = map[string]object.Store{"default": late}
		})
		settle()
		b := e.start("b")
		col, _, _ := e.collection(b, "c")
		s, stays := e.segment(b, col, 0, 1, 20), e.segment(b, col, 0, 1, 20)
		e.addWritten(b, col, s, stays)
		asks := e.dropSegments(b, col, s.ID)
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
		e.granted(e.reclaim(b, col, gc.BySnapshotd, asks...))
		settle()
		a.kv.Freeze()
		time.Sleep(time.Minute)
		settle()
		if !b.Leading() {
			t.Fatal("b does not lead")
		}
		before := e.keysUnder("/gc/tomb/")
		late.release()
		settle()
		a.kv.Thaw()
		settle()
		if got := e.keysUnder("/gc/tomb/"); len(before) != 1 || !slices.Equal(got, before) {
			t.Errorf("the old leader confirmed: %v, before %v", got, before)
		}
		if got := e.objectsUnder("data/"); !slices.Equal(got, []string{"data/" + stays.Files[0].Path}) {
			t.Errorf("files %v", got)
		}
		b.store.Plan(nil)
		time.Sleep(time.Minute)
		settle()
		if got := e.keysUnder("/gc/tomb/"); len(got) > 0 {
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
	inEnv(t, func(t *testing.T, e *env) {
		var refused atomic.Bool
		r := e.start("a", func(o *testOptions) {
			o.KV = &removals{
				KV: o.KV,
				before: func() {
					if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Leader)}}); err != nil {
						t.Error(err)
					}
				},
				ended: func(res meta.TxnResult) { refused.Store(!res.Succeeded) },
			}
		})
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s)
		e.granted(e.reclaim(r, col, gc.BySnapshotd, e.dropSegments(r, col, s.ID)...))
		settle()
		if got := e.keysUnder("/gc/tomb/"); !refused.Load() || len(got) != 1 {
			t.Errorf("refused: %v; tombstones %v", refused.Load(), got)
		}
		time.Sleep(time.Minute)
		settle()
		if got := e.keysUnder("/gc/tomb/"); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestPartsOfASegment checks that a replaced build is held by the snapshots that have
// it, and replaced files by those that have their segment.
func TestPartsOfASegment(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, x := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		build := func() segment.Build {
			b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
			// Its path lacks its id, which makes it a foreign file.
			b.Files = []segment.File{{
				Kind: segment.KindIndex, Path: fmt.Sprintf("%d/0/%d/index/v%d", col.ID, s.ID, b.ID),
				Size: 5,
			}}
			return b
		}
		old := build()
		s.Builds = []segment.Build{old}
		e.addWritten(r, col, s)
		e.checkpoint(r, col, 100, 100)
		with := e.create(r, col, "with")
		next := build()
		e.writeFiles(&segment.Segment{Builds: []segment.Build{next}})
		e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{Segment: s.ID, AddBuilds: []segment.Build{next}}}})
		without := e.create(r, col, "without")
		f := segment.File{
			Kind: segment.KindInsert, Path: fmt.Sprintf("%d/0/%d/insert/100/2", col.ID, s.ID),
			MinTimestamp: 1, MaxTimestamp: 2, Size: 3,
		}
		e.writeFiles(&segment.Segment{Files: []segment.File{f}})
		was := catalog.FilePath{Path: s.Files[0].Path}
		e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{
			Segment: s.ID, RemoveFiles: []catalog.FilePath{was},
			AddFiles: []segment.File{f},
		}}})
		after := e.create(r, col, "after")

		oldPath := catalog.FilePath{Path: old.Files[0].Path}
		answers := e.reclaim(r, col, gc.ByCaller, gc.Ask{Build: old.ID}, gc.Ask{File: oldPath},
			gc.Ask{File: was}, gc.Ask{Build: next.ID},
			gc.Ask{File: catalog.FilePath{Path: f.Path}}, gc.Ask{File: catalog.FilePath{Path: next.Files[0].Path}},
			gc.Ask{Segment: s.ID})
		e.heldBy(answers[0], with)
		e.heldBy(answers[1], with)
		e.heldBy(answers[2], without, with) // the next snapshot has the segment without the file
		if a := answers[3]; a.State != gc.Unknown || a.Holders != 2 {
			t.Errorf("the build that lives is %+v", a)
		}
		for _, a := range answers[4:] {
			if a.State != gc.Live || a.LiveIn != s.ID || a.Holders != 4 {
				t.Errorf("what lives is %+v", a)
			}
		}
		e.dropSnapshot(r, with)
		tomb := e.granted(e.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: oldPath}))[0]
		if tomb.ID != old.ID || tomb.Unit.Kind != catalog.UnitBuild || tomb.Unit.Segment.ID != s.ID {
			t.Errorf("got %+v", tomb)
		}
		settle()
		e.heldBy(e.reclaim(r, col, gc.ByCaller, gc.Ask{File: was})[0], without)
		e.dropSnapshot(r, without)
		tomb = e.granted(e.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: was}))[0]
		if tomb.Unit.Kind != catalog.UnitFiles || tomb.Unit.Segment.ID != s.ID {
			t.Errorf("got %+v", tomb)
		}
		settle()
		if got, want := e.objectsUnder("data/"), []string{
			"data/" + next.Files[0].Path,
			"data/" + f.Path,
		}; !slices.Equal(got, want) {
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Errorf("left %v, want %v", got, want)
			}
		}
		if got := append(e.keysUnder("/gc/tomb/"), e.keysUnder("/catalog/replaced/")...); len(got) > 0 {
			t.Errorf("left %v", got)
		}
		e.dropSnapshot(r, after)
		// The whole segment is dropped, with its last build.
		e.dropSegments(r, col, s.ID)
		tombs := e.granted(e.reclaim(r, col, gc.BySnapshotd, gc.Ask{File: catalog.FilePath{Path: next.Files[0].Path}},
			gc.Ask{Segment: s.ID}))
		if !sameTombstone(tombs[0], tombs[1]) || tombs[0].Unit.Kind != catalog.UnitSegment {
			t.Errorf("got %+v", tombs)
		}
		settle()
		if got := e.objectsUnder("data/"); len(got) > 0 {
			t.Errorf("left %v", got)
		}
	})
}

// TestForeignFileStays checks that a file outside all layouts belongs to every segment
// that has it, and stays when one of them is granted.
func TestForeignFileStays(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, x := e.collection(r, "c")
		owner := e.segment(r, col, 0, 1, 20)
		b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
		b.Files = []segment.File{{Kind: segment.KindIndex, Path: fmt.Sprintf("index/%d/f", b.ID), Size: 5}}
		owner.Builds = []segment.Build{b}
		user := e.segment(r, col, 0, 1, 20)
		user.Files = append(user.Files, b.Files[0])
		e.addWritten(r, col, owner, user)
		e.checkpoint(r, col, 100, 100)
		snap := e.create(r, col, "x")
		asks := e.dropSegments(r, col, owner.ID)
		e.heldBy(e.reclaim(r, col, gc.BySnapshotd, asks...)[0], snap)
		e.dropSnapshot(r, snap)
		e.granted(e.reclaim(r, col, gc.BySnapshotd, asks...))
		time.Sleep(5 * time.Minute)
		settle()
		if got, want := e.objectsUnder("data/"), []string{
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
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s)
		refused := func(what string) {
			t.Helper()
			thief := e.segment(r, col, 0, 1, 20)
			thief.Files = append(thief.Files, s.Files[0])
			_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{thief})
			wantError(t, err, catalog.ErrFileExists)
			_, err = r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
				catalog.SegmentChange{Add: []segment.Segment{thief}})
			wantError(t, err, catalog.ErrFileExists)
			plain := e.segment(r, col, 0, 1, 20)
			e.add(r, col, plain)
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
		e.swap(r, col, catalog.SegmentChange{Update: []catalog.Update{{
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
		tomb := e.granted(e.reclaim(r, col, gc.ByCaller, gc.Ask{File: catalog.FilePath{Path: s.Files[0].Path}}))[0]
		refused("it is granted")
		again()
		if _, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{tomb.ID}); err != nil {
			t.Fatal(err)
		}
		again() // while the segment exists
		// An output that has a file of an input.
		out := e.segment(r, col, 0, 1, 20)
		out.Files = append(out.Files, f)
		_, err := r.catalog.Change(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
			catalog.SegmentChange{Drop: []int64{s.ID}, Add: []segment.Segment{out}})
		wantError(t, err, catalog.ErrFileExists)
	})
}

// TestReclaimInOtherCollections checks that units of other collections are unknown, and
// that those of a collection being dropped are reclaimed by its id.
func TestReclaimInOtherCollections(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "other")
		s, lives := e.segment(r, col, 0, 1, 20), e.segment(r, col, 0, 1, 20)
		e.addWritten(r, col, s, lives)
		asks := append(e.dropSegments(r, col, s.ID), gc.Ask{File: catalog.FilePath{Path: s.Files[0].Path}},
			gc.Ask{Segment: lives.ID})
		for _, a := range e.reclaim(r, other, gc.ByCaller, asks...) {
			if a.State != gc.Unknown || a.Holders != 0 {
				t.Errorf("got %+v", a)
			}
		}
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		_, err := r.GC.Reclaim(t.Context(), catalog.Ref{DB: "default", Name: "c"}, asks, gc.ByCaller, "tester")
		wantError(t, err, catalog.ErrCollectionNotFound)
		answers := e.reclaim(r, col, gc.ByCaller, asks...)
		tombs := e.granted(answers) // also that of the segment dropped with it
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
	inEnv(t, func(t *testing.T, e *env) {
		r, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		var ids []int64
		for range 3 {
			s := e.segment(b, col, 0, 1, 20)
			e.add(b, col, s)
			ids = append(ids, s.ID)
		}
		e.granted(e.reclaim(b, col, gc.ByCaller, e.dropSegments(b, col, ids...)...))
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
