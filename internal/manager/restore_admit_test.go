package manager

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestConcurrentRestoresOfOneName checks that one of many restores to a name wins.
func TestConcurrentRestoresOfOneName(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		s := e.create(a, e.richCollection(a, "c", 8), "one")
		before := e.contents()
		sp := restoreSpecOf(s)
		a.store.SetLatency(time.Second)
		b.store.SetLatency(time.Second)
		var wg sync.WaitGroup
		var mu sync.Mutex
		var won []*copyjob.Job
		for i := range 20 {
			wg.Go(func() {
				job, err := []*testReplica{a, b}[i%2].Restore(t.Context(), noToken, sp)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					won = append(won, job)
					return
				}
				wantError(t, err, catalog.ErrCollectionExists)
			})
		}
		wg.Wait()
		if len(won) != 1 || len(e.jobs()) != 1 {
			t.Fatalf("%d won, %d jobs", len(won), len(e.jobs()))
		}
		// Every other way to take the name fails too.
		ref := catalog.Ref{ID: s.Collection}
		_, err := a.catalog.CreateCollection(t.Context(), noToken, catalog.Collection{
			DB: sp.DB, Name: sp.Name, Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
			Schema: catalog.Schema{Fields: []catalog.Field{{ID: 1, Name: "id", DataType: "Int64", PrimaryKey: true}}},
		})
		wantError(t, err, catalog.ErrCollectionExists)
		_, err = a.catalog.RenameCollection(t.Context(), noToken, ref, sp.DB, sp.Name)
		wantError(t, err, catalog.ErrCollectionExists)
		taken := *sp
		taken.Name = "c"
		_, err = a.Restore(t.Context(), noToken, &taken)
		wantError(t, err, catalog.ErrCollectionExists)
		if end := e.waitEnded(a, won[0].ID); end.Job.State != copyjob.Completed {
			t.Fatalf("%+v", end.Job)
		}
		e.checkRestored(a, before, won[0], sp)
		_, err = a.Restore(t.Context(), noToken, sp)
		wantError(t, err, catalog.ErrCollectionExists)
	})
}

// TestRestoreFeatures restores from a store that cannot copy safely, or whose features are
// unknown: a restore probes the store again and fails by the right reason, a plan writes
// nothing and reports what it can.
func TestRestoreFeatures(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 4), "one")
		sp := restoreSpecOf(s)
		var features probe.Features
		var unknown error
		var tried []bool
		r.o.Features = func(_ context.Context, _ string, again bool) (probe.Features, error) {
			tried = append(tried, again)
			return features, unknown
		}
		for _, c := range []struct {
			unknown, want, never error
		}{
			{nil, ErrStoreUnfit, object.ErrDenied},
			{fmt.Errorf("probe: %w", object.ErrDenied), object.ErrDenied, ErrStoreUnfit},
			{fmt.Errorf("probe: %w", object.ErrUnavailable), object.ErrUnavailable, ErrStoreUnfit},
		} {
			unknown, tried = c.unknown, nil
			plan, err := r.PlanRestore(t.Context(), sp, true)
			if err != nil || len(plan.Conflicts) != 1 || plan.Totals.Files == 0 {
				t.Errorf("%v: the plan is %+v, %v", c.want, plan, err)
			}
			if slices.Contains(tried, true) {
				t.Errorf("%v: a plan probes the store", c.want)
			}
			tried = nil
			_, err = r.Restore(t.Context(), noToken, sp)
			wantError(t, err, c.want)
			if errors.Is(err, c.never) || slices.Contains(tried, false) {
				t.Errorf("%v: got %v, probed again %v", c.want, err, tried)
			}
		}
		features, unknown = probe.Features{ConditionalCopy: true, MultipartCopy: true}, nil
		if end := e.waitEnded(r, e.restore(r, sp).ID); end.Job.State != copyjob.Completed {
			t.Errorf("%+v", end.Job)
		}
	})
}

// TestRestorePins checks that the snapshot is pinned while the job runs.
func TestRestorePins(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 8), "one")
		r.store.SetLatency(time.Second)
		job := e.restore(r, restoreSpecOf(s))
		settle()
		err := dropErr(r, s)
		if !errors.Is(err, ErrSnapshotPinned) || !strings.Contains(err.Error(), fmt.Sprint(job.Pin)) ||
			!strings.Contains(err.Error(), fmt.Sprint(job.ID)) {
			t.Errorf("drop: %v; want pin %d and job %d", err, job.Pin, job.ID)
		}
		wantError(t, r.Unpin(t.Context(), Ref{ID: s.ID}, job.Pin), ErrPinOfRestore)
		_, err = r.RenewPin(t.Context(), Ref{ID: s.ID}, job.Pin, time.Hour)
		wantError(t, err, ErrPinHasNoTTL)
		pins, _, err := r.Pins(t.Context(), s.ID, PinPlace{}, 10)
		if err != nil || len(pins) != 1 || pins[0].Job != job.ID || pins[0].TTL != 0 {
			t.Errorf("pins %+v, err = %v", pins, err)
		}
		for _, kv := range e.keysUnder(keys.AllPinsPrefix) {
			got, _, _, err := e.kv.Get(t.Context(), kv)
			if err != nil || got.Lease != 0 {
				t.Errorf("%s is under lease %d, err = %v", kv, got.Lease, err)
			}
		}
		e.waitEnded(r, job.ID)
		if err := dropErr(r, s); err != nil {
			t.Error(err)
		}
	})
}

// TestRestoringCollectionIsInaccessible checks that the segments of a RESTORING collection
// cannot be read or written, and that the errors name the job.
func TestRestoringCollectionIsInaccessible(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 40), "one")
		sp := restoreSpecOf(s)
		before := e.contents()
		// The first task is registered, the second one is blocked.
		second := fmt.Sprint("/", e.segments(r, s)[39].ID, "/")
		held := make(chan struct{})
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpCopy && strings.Contains(c.Keys[0], second) {
				select {
				case <-held:
				default:
					return object.FaultBefore
				}
			}
			return object.FaultNone
		})
		job := e.restore(r, sp)
		settle()
		ctx := t.Context()
		byName, byID := catalog.Ref{DB: sp.DB, Name: sp.Name}, catalog.Ref{ID: job.Target}
		col, err := r.catalog.Collection(ctx, byName)
		if err != nil || col.State != catalog.Restoring || col.Job != job.ID || col.ID != job.Target {
			t.Fatalf("%+v, err = %v", col, err)
		}
		if n := len(e.keysUnder(keys.SegmentPrefix(job.Target))); n != 32 {
			t.Fatalf("%d segments are registered", n)
		}
		list, _, err := r.catalog.ListCollections(ctx, catalog.ListFilter{}, 0, 10)
		if err != nil || len(list) != 1 || list[0].ID != s.Collection {
			t.Errorf("listed %+v, err = %v", list, err)
		}
		list, _, err = r.catalog.ListCollections(ctx, catalog.ListFilter{States: []catalog.State{catalog.Restoring}}, 0, 10)
		if err != nil || len(list) != 1 || list[0].ID != job.Target {
			t.Errorf("listed %+v, err = %v", list, err)
		}
		another := e.segment(r, col, 0, 1, 2)
		tries := map[string]func(ref catalog.Ref) error{
			"add segments": func(catalog.Ref) error {
				_, _, err := r.catalog.AddSegments(ctx, job.Target, []segment.Segment{another})
				return err
			},
			"change": func(ref catalog.Ref) error {
				_, err := r.catalog.Change(ctx, noToken, ref, catalog.SegmentChange{Drop: []int64{job.FirstSegment}})
				return err
			},
			"drop segments": func(ref catalog.Ref) error {
				_, err := r.catalog.DropSegments(ctx, ref, []int64{job.FirstSegment})
				return err
			},
			"set checkpoints": func(ref catalog.Ref) error {
				_, err := r.catalog.SetCheckpoints(ctx, ref, []catalog.Checkpoint{{Position: segment.Position{Timestamp: 99}}})
				return err
			},
			"create partition": func(ref catalog.Ref) error {
				_, err := r.catalog.CreatePartition(ctx, noToken, ref, catalog.Partition{Name: "new"})
				return err
			},
			"drop partition": func(ref catalog.Ref) error {
				_, err := r.catalog.DropPartition(ctx, noToken, ref, "p0")
				return err
			},
			"create index": func(ref catalog.Ref) error {
				_, err := r.catalog.CreateIndex(ctx, noToken, ref, catalog.Index{Name: "new", Field: 100})
				return err
			},
			"drop index": func(ref catalog.Ref) error {
				_, err := r.catalog.DropIndex(ctx, noToken, ref, "x0")
				return err
			},
			"update": func(ref catalog.Ref) error {
				_, err := r.catalog.UpdateCollection(ctx, noToken, ref, 0, catalog.Patch{Properties: &map[string]string{}})
				return err
			},
			"rename": func(ref catalog.Ref) error {
				_, err := r.catalog.RenameCollection(ctx, noToken, ref, "default", "other")
				return err
			},
			"drop": func(ref catalog.Ref) error {
				_, err := r.catalog.DropCollection(ctx, noToken, ref, 0)
				return err
			},
			"snapshot": func(ref catalog.Ref) error {
				_, err := r.Create(ctx, noToken, CreateSpec{Collection: ref, Name: "two"})
				return err
			},
			"read a segment": func(ref catalog.Ref) error {
				_, _, err := r.catalog.Segment(ctx, ref, job.FirstSegment)
				return err
			},
		}
		for what, try := range tries {
			for _, ref := range []catalog.Ref{byName, byID} {
				err := try(ref)
				named := what == "snapshot" || err != nil && strings.Contains(err.Error(), fmt.Sprintf("job %d", job.ID))
				if !errors.Is(err, catalog.ErrCollectionNotActive) || !named {
					t.Errorf("%s of %s: %v; want job %d", what, ref, err, job.ID)
				}
			}
		}
		close(held)
		if end := e.waitEnded(r, job.ID); end.Job.State != copyjob.Completed {
			t.Fatalf("%+v", end.Job)
		}
		e.checkRestored(r, before, job, sp)
	})
}

// TestPartialRestore restores parts of a snapshot, and with other names.
func TestPartialRestore(t *testing.T) {
	for name, change := range map[string]func(*RestoreSpec){
		"all":              func(*RestoreSpec) {},
		"one partition":    func(sp *RestoreSpec) { sp.Partitions = []string{"p1"} },
		"duplicate names":  func(sp *RestoreSpec) { sp.Partitions = []string{"p1", "p0", "p1"} },
		"no indexes":       func(sp *RestoreSpec) { sp.SkipIndexes = true },
		"one, no indexes":  func(sp *RestoreSpec) { sp.SkipIndexes, sp.Partitions = true, []string{"p0"} },
		"other channels":   func(sp *RestoreSpec) { sp.Channels = []string{"b", "a"} },
		"another database": func(sp *RestoreSpec) { sp.DB = "other" },
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				s := e.create(r, e.richCollection(r, "c", 70), "one")
				sp := restoreSpecOf(s)
				change(sp)
				plan, err := r.PlanRestore(t.Context(), sp, true)
				if err != nil || len(plan.Conflicts) > 0 || plan.MissingCount > 0 {
					t.Fatalf("%+v, err = %v", plan, err)
				}
				job := e.mustComplete(r, sp)
				if plan.Totals != job.Totals || plan.EstimatedTime <= 0 {
					t.Errorf("plan %+v, job %+v", plan, job.Totals)
				}
				got, err := r.Jobs.Get(t.Context(), job.ID)
				if err != nil || got.Done != job.Totals {
					t.Errorf("done %+v of %+v, err = %v", got.Done, job.Totals, err)
				}
				plan, err = r.PlanRestore(t.Context(), sp, false)
				if err != nil || len(plan.Conflicts) != 1 || plan.Totals != job.Totals {
					t.Errorf("%+v, err = %v", plan, err)
				}
			})
		})
	}
}

// TestRestoreTasksWithoutSegments restores a partition with segments in some tasks only.
func TestRestoreTasksWithoutSegments(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, p0, _ := e.collection(r, "c")
		p1, err := r.catalog.CreatePartition(t.Context(), noToken, catalog.Ref{ID: col.ID}, catalog.Partition{Name: "p1"})
		if err != nil {
			t.Fatal(err)
		}
		_, err = r.catalog.CreatePartition(t.Context(), noToken, catalog.Ref{ID: col.ID}, catalog.Partition{Name: "p2"})
		if err != nil {
			t.Fatal(err)
		}
		for i := range 100 {
			seg := e.segment(r, col, 0, 1, 9)
			if seg.Partition = p0.ID; i >= 95 {
				seg.Partition = p1.ID
			}
			e.putFiles(col.ID, &seg)
			e.add(r, col, seg)
		}
		e.checkpoint(r, col, 10, 10)
		s := e.create(r, col, "one")
		for i, want := range []int64{5, 0, 95, 100} {
			sp := restoreSpecOf(s)
			sp.Name, sp.Partitions = fmt.Sprint("copy", i), [][]string{{"p1"}, {"p2"}, {"p0"}, nil}[i]
			if job := e.mustComplete(r, sp); job.Totals.Segments != want || job.Tasks != 4 {
				t.Errorf("%+v", job)
			}
		}
	})
}

// TestRestoreProperties checks that properties of the request are merged into those of the
// snapshot.
func TestRestoreProperties(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col := e.richCollection(r, "c", 2)
		props := map[string]string{"keep": "1", "change": "2", "remove": "3"}
		if _, err := r.catalog.UpdateCollection(t.Context(), noToken, catalog.Ref{ID: col.ID}, 0, catalog.Patch{
			Properties: &props, Attributes: &map[string]string{"x": "y"},
		}); err != nil {
			t.Fatal(err)
		}
		s := e.create(r, col, "one")
		sp := restoreSpecOf(s)
		sp.Properties = map[string]string{"change": "9", "remove": "", "new": "4", "never": ""}
		job := e.mustComplete(r, sp)
		target, err := r.catalog.Collection(t.Context(), catalog.Ref{ID: job.Target})
		want := map[string]string{"keep": "1", "change": "9", "new": "4"}
		if err != nil || !maps.Equal(target.Properties, want) {
			t.Errorf("properties %v, want %v, err = %v", target.Properties, want, err)
		}
		d, err := r.Describe(t.Context(), Ref{ID: s.ID})
		if err != nil || !maps.Equal(d.Metadata.Collection.Properties, props) {
			t.Errorf("the snapshot has %v, err = %v", d, err)
		}
	})
}

// TestRestoreChannels checks that channels are mapped by shard, not by name.
func TestRestoreChannels(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		var channels, others []string
		for i := range 12 {
			channels, others = append(channels, fmt.Sprintf("by-dev_1v%d", i)), append(others, fmt.Sprintf("other_v%d", 11-i))
		}
		col, err := r.catalog.CreateCollection(t.Context(), noToken, catalog.Collection{
			DB: "default", Name: "c", Channels: channels, Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
			Schema: catalog.Schema{Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}}},
		})
		if err != nil {
			t.Fatal(err)
		}
		var at []segment.Timestamp
		for shard := range 12 {
			seg := e.segment(r, col, shard, 1, 9)
			e.putFiles(col.ID, &seg)
			e.add(r, col, seg)
			if shard < 11 { // the last one has no checkpoint
				at = append(at, segment.Timestamp(10+shard))
			}
		}
		e.checkpoint(r, col, at...)
		_, err = r.Create(t.Context(), noToken, spec(col, "none"))
		wantError(t, err, ErrCheckpointMissing)
		e.checkpoint(r, col, append(at, 21)...)
		s := e.create(r, col, "one")
		for i, names := range [][]string{nil, others} {
			sp := restoreSpecOf(s)
			sp.Name, sp.Channels = fmt.Sprint("copy", i), names
			job := e.mustComplete(r, sp)
			cps, err := r.catalog.Checkpoints(t.Context(), catalog.Ref{ID: job.Target})
			if err != nil || len(cps) != 12 {
				t.Fatalf("%+v, err = %v", cps, err)
			}
			for shard, cp := range cps {
				want := channels[shard]
				if names != nil {
					want = names[shard]
				}
				if cp.Shard != shard || cp.Channel != want || cp.Position.Timestamp != segment.Timestamp(10+shard) {
					t.Errorf("%+v at %d, want %s", cp, shard, want)
				}
			}
		}
		for _, wrong := range [][]string{others[:11], append(slices.Clone(others), "more")} {
			sp := restoreSpecOf(s)
			sp.Channels = wrong
			_, err := r.Restore(t.Context(), noToken, sp)
			wantError(t, err, ErrChannelMismatch)
		}
		sp := restoreSpecOf(s)
		sp.Channels = append(slices.Clone(others[:11]), others[0])
		_, err = r.Restore(t.Context(), noToken, sp)
		if _, ok := errors.AsType[*catalog.InvalidError](err); !ok {
			t.Errorf("duplicate channel: %v", err)
		}
	})
}

// TestRestoreWithoutChannels restores collections without channels, with and without a
// checkpoint.
func TestRestoreWithoutChannels(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		for i := range 2 {
			col, err := r.catalog.CreateCollection(t.Context(), noToken, catalog.Collection{
				DB: "default", Name: fmt.Sprint("c", i), Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
				Schema: catalog.Schema{Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}}},
			})
			if err != nil {
				t.Fatal(err)
			}
			seg := e.segment(r, col, 0, 1, 9)
			e.putFiles(col.ID, &seg)
			e.add(r, col, seg)
			if i == 1 {
				e.checkpoint(r, col, 10)
			}
			sp := restoreSpecOf(e.create(r, col, fmt.Sprint("s", i)))
			sp.Name = fmt.Sprint("copy", i)
			e.mustComplete(r, sp)
			sp.Name, sp.Channels = "other", []string{"one"}
			_, err = r.Restore(t.Context(), noToken, sp)
			wantError(t, err, ErrChannelMismatch)
		}
	})
}

// TestRepeatedRestores restores a restored, a dropped, a renamed and an empty collection,
// and a snapshot of a restored one.
func TestRepeatedRestores(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col := e.richCollection(r, "c", 12)
		s := e.create(r, col, "one")
		empty := e.create(r, e.richCollection(r, "empty", 0), "none")
		if _, err := r.catalog.DropCollection(t.Context(), noToken, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		sp := restoreSpecOf(s)
		sp.Name = "c" // the name of the dropped source
		first := e.mustComplete(r, sp)
		if _, err := r.catalog.DropCollection(t.Context(), noToken, catalog.Ref{ID: first.Target}, 0); err != nil {
			t.Fatal(err)
		}
		second := e.mustComplete(r, sp)
		if first.Target == second.Target || second.FirstSegment < first.FirstBuild+first.Builds {
			t.Errorf("%+v after %+v", second, first)
		}
		copied := catalog.Ref{ID: second.Target}
		if _, err := r.catalog.RenameCollection(t.Context(), noToken, copied, "default", "moved"); err != nil {
			t.Fatal(err)
		}
		e.mustComplete(r, sp)
		// A snapshot of the restored collection, including straddling segments.
		moved, err := r.catalog.Collection(t.Context(), catalog.Ref{ID: second.Target})
		if err != nil {
			t.Fatal(err)
		}
		again := e.create(r, moved, "two")
		if again.Totals != s.Totals {
			t.Errorf("a snapshot of the copy holds %+v, that of the source %+v", again.Totals, s.Totals)
		}
		e.mustComplete(r, restoreSpecOf(again))

		none := restoreSpecOf(empty)
		none.Name = "nothing"
		if job := e.mustComplete(r, none); job.Totals != (segment.Totals{}) || job.Tasks != 0 {
			t.Errorf("%+v", job)
		}
	})
}

// TestRestoreToken checks that restores with one token make one job, also after the job
// was forgotten.
func TestRestoreToken(t *testing.T) {
	for _, missing := range []bool{false, true} {
		inEnv(t, func(t *testing.T, e *env) {
			a := e.start("a", func(o *testOptions) { o.Parts.KeepRestores = 10 * time.Minute })
			b := e.start("b", func(o *testOptions) { o.Parts.KeepRestores = 10 * time.Minute })
			s := e.create(a, e.richCollection(a, "c", 8), "one")
			if missing {
				if err := e.objects.Delete(t.Context(), e.objectsUnder("data/")[0]); err != nil {
					t.Fatal(err)
				}
			}
			sp, tok := restoreSpecOf(s), token("t", "one")
			a.store.SetLatency(time.Second)
			b.store.SetLatency(time.Second)
			var wg sync.WaitGroup
			ids := make([]int64, 10)
			for i := range ids {
				wg.Go(func() {
					job, err := []*testReplica{a, b}[i%2].Restore(t.Context(), tok, sp)
					if err != nil {
						t.Errorf("call %d: %v", i, err)
						return
					}
					ids[i] = job.ID
				})
			}
			wg.Wait()
			if len(slices.Compact(ids)) != 1 || len(e.jobs()) != 1 {
				t.Fatalf("jobs %v", ids)
			}
			_, err := a.Restore(t.Context(), token("t", "two"), sp)
			wantError(t, err, request.ErrReused)
			end := e.waitEnded(a, ids[0])
			job, err := b.Restore(t.Context(), tok, sp)
			if err != nil || job.ID != ids[0] || job.Target != end.Job.Target {
				t.Errorf("%+v, err = %v", job, err)
			}
			_, err = b.Restore(t.Context(), token("t", "two"), sp)
			wantError(t, err, request.ErrReused)
			// The token outlives the job.
			time.Sleep(20 * time.Minute)
			settle()
			job, err = b.Restore(t.Context(), tok, sp)
			if err != nil || job.ID != ids[0] || job.Target != end.Job.Target || job.State != end.Job.State {
				t.Errorf("%+v, err = %v", job, err)
			}
			if len(e.jobs()) != 0 {
				t.Errorf("jobs %+v", e.jobs())
			}
		})
	}
}

// TestRestoreJobExpires checks that ended jobs are forgotten after their time.
func TestRestoreJobExpires(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.KeepRestores = time.Hour })
		s := e.create(r, e.richCollection(r, "c", 2), "one")
		job := e.mustComplete(r, restoreSpecOf(s))
		time.Sleep(59 * time.Minute)
		if _, err := r.Jobs.Get(t.Context(), job.ID); err != nil {
			t.Error(err)
		}
		time.Sleep(2 * time.Minute)
		settle()
		_, err := r.Jobs.Get(t.Context(), job.ID)
		wantError(t, err, copyjob.ErrJobNotFound)
		wantError(t, r.NoJob(t.Context(), job.ID), ErrJobForgotten)
		wantError(t, r.NoJob(t.Context(), job.ID+1_000_000), ErrJobNeverExisted)
		_, err = r.Jobs.Cancel(t.Context(), job.ID)
		wantError(t, err, copyjob.ErrJobNotFound)
		_, err = r.Jobs.SetLimits(t.Context(), job.ID, copyjob.Limits{})
		wantError(t, err, copyjob.ErrJobNotFound)
		for _, key := range e.keysUnder("/job/") {
			t.Errorf("%s is left", key)
		}
	})
}

// TestRestoreEvents checks that the target's event follows publish, and that each phase of
// the job has an event.
func TestRestoreEvents(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		s := e.create(r, e.richCollection(r, "c", 4), "one")
		good := e.mustComplete(r, restoreSpecOf(s))
		bad := restoreSpecOf(s)
		bad.Name = "bad"
		if err := e.objects.Delete(t.Context(), e.objectsUnder("data/")[0]); err != nil {
			t.Fatal(err)
		}
		failed := e.mustFail(r, bad, "SOURCE_OBJECT_MISSING", "").Job
		done := errors.New("all reported")
		var reported []string
		// The whole history in one watch.
		_, _, last, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		err = r.Watch(t.Context(), 1, 0, func(events []Event, revision int64) error {
			for _, e := range events {
				switch {
				case e.Collection != nil && e.Collection.ID != s.Collection:
					reported = append(reported, fmt.Sprintf("collection %d %v %v", e.Collection.ID, e.Type, e.Collection.State))
				case e.Restore != nil:
					reported = append(reported, fmt.Sprintf("job %d %v %v %v", e.Restore.ID, e.Type, e.Restore.State, e.Restore.Phase))
				case e.Pin != nil:
					reported = append(reported, fmt.Sprintf("pin %d %v expired %v", e.Pin.ID, e.Type, e.Expired))
				}
			}
			if revision >= last {
				return done
			}
			return nil
		})
		wantError(t, err, done)
		want := func(job *copyjob.Job, more ...string) []string {
			list := []string{
				fmt.Sprintf("job %d %v PENDING admit", job.ID, Created), fmt.Sprintf("pin %d %v expired false", job.Pin, Created),
				fmt.Sprintf("job %d %v EXECUTING prepare", job.ID, Updated),
				fmt.Sprintf("job %d %v EXECUTING copy", job.ID, Updated),
			}
			return append(list, more...)
		}
		all := append(want(good, fmt.Sprintf("job %d %v COMPLETED publish", good.ID, Updated),
			fmt.Sprintf("collection %d %v ACTIVE", good.Target, Created),
			fmt.Sprintf("pin %d %v expired false", good.Pin, Deleted)),
			want(failed, fmt.Sprintf("job %d %v EXECUTING roll back", failed.ID, Updated),
				fmt.Sprintf("job %d %v FAILED roll back", failed.ID, Updated),
				fmt.Sprintf("pin %d %v expired false", failed.Pin, Deleted))...)
		slices.Sort(all) // events of one revision have no order
		slices.Sort(reported)
		if diff := cmp.Diff(all, reported); diff != "" {
			t.Error(diff)
		}
	})
}

// TestRestoreMilvus restores a collection of Milvus's layout, and refuses one with a file
// outside of the layout.
func TestRestoreMilvus(t *testing.T) {
	for _, odd := range []string{"", "insert_log/%d/%d/%d/_data/0.parquet", "somewhere/else"} {
		t.Run(odd, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a")
				ctx := t.Context()
				col, err := r.catalog.CreateCollection(ctx, noToken, catalog.Collection{
					DB: "default", Name: "m", Layout: catalog.LayoutMilvus, Channels: []string{"by-dev-rootcoord-dml_0_1v0"},
					Roots:  []catalog.Root{{Store: "default", Prefix: "files/"}},
					Schema: catalog.Schema{Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}}},
				})
				if err != nil {
					t.Fatal(err)
				}
				ref := catalog.Ref{ID: col.ID}
				p, err := r.catalog.CreatePartition(ctx, noToken, ref, catalog.Partition{Name: "_default"})
				if err != nil {
					t.Fatal(err)
				}
				x, err := r.catalog.CreateIndex(ctx, noToken, ref, catalog.Index{Name: "x", Field: 100})
				if err != nil {
					t.Fatal(err)
				}
				put := func(kind, path string) segment.File {
					info, err := e.objects.Put(ctx, "files/"+path, tenBytes(path))
					if err != nil {
						t.Fatal(err)
					}
					return segment.File{Kind: kind, Path: path, Size: info.Size, ETag: info.ETag, Field: 100}
				}
				for i := range 40 {
					seg := segment.Segment{
						ID: e.newID(r), Partition: p.ID, Level: 1, State: segment.Flushed, Rows: 9, DML: segment.Position{Timestamp: 10},
					}
					at := fmt.Sprintf("%d/%d/%d", col.ID, p.ID, seg.ID)
					if i == 7 { // L0
						seg.Level, seg.Partition = 0, 0
						seg.Files = append(seg.Files, put(segment.KindDelta, fmt.Sprintf("delta_log/%d/-1/%d/8", col.ID, seg.ID)))
						e.add(r, col, seg)
						continue
					}
					build := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
					seg.Files = append(seg.Files,
						put(segment.KindInsert, "insert_log/"+at+"/100/4"), put(segment.KindStats, "stats_log/"+at+"/100/1"),
						put(segment.KindDelta, "delta_log/"+at+"/9"), put(segment.KindBM25, "bm25_stats/"+at+"/102/1"))
					index := fmt.Sprintf("index_files/%d/1/%d/%d/HNSW_0", build.ID, p.ID, seg.ID)
					build.Files = append(build.Files, put(segment.KindIndex, index))
					text := segment.Build{ID: e.newID(r), Index: x.ID, Field: 101}
					text.Files = append(text.Files, put(segment.KindText, fmt.Sprintf("text_log/%d/1/%s/101/a_0", text.ID, at)))
					if i%2 == 0 {
						build = text
					}
					seg.Builds = []segment.Build{build}
					if i == 39 && odd != "" {
						path := fmt.Sprintf(odd, col.ID, p.ID, seg.ID)
						path, _, _ = strings.Cut(path, "%!")
						seg.Files = append(seg.Files, put(segment.KindInsert, path))
					}
					e.add(r, col, seg)
				}
				e.checkpoint(r, col, 10)
				sp := restoreSpecOf(e.create(r, col, "one"))
				// An object that is no file of the snapshot.
				put("", fmt.Sprintf("insert_log/%d/1/2/3/4", col.ID+1))
				if odd == "" {
					e.mustComplete(r, sp)
					sp.Name, sp.SkipIndexes = "bare", true
					e.mustComplete(r, sp)
					sp.Name, sp.SkipIndexes = "failed", false
					key := ""
					for _, k := range e.objectsUnder("files/text_log/") {
						if key == "" && strings.Contains(k, fmt.Sprintf("/1/%d/%d/", col.ID, p.ID)) { // of the first segment
							key = k
						}
					}
					if err := e.objects.Delete(ctx, key); err != nil {
						t.Fatal(err)
					}
					e.mustFail(r, sp, "SOURCE_OBJECT_MISSING", key)
					return
				}
				before := e.contents()
				_, err = r.Restore(ctx, noToken, sp)
				wantError(t, err, ErrLayoutRefused)
				e.checkNoTraces(before)
				plan, err := r.PlanRestore(ctx, sp, false)
				if err != nil || len(plan.Conflicts) != 1 {
					t.Errorf("%+v, err = %v", plan, err)
				}
			})
		})
	}
}

// TestRestoreTargetNotEmpty puts an object under the target's prefix between the admission
// and the first copy. The restore fails with the object's name and does not delete it.
func TestRestoreTargetNotEmpty(t *testing.T) {
	for name, c := range map[string]struct {
		key    string // %d: the target
		reason string // empty: it is COMPLETED
	}{
		"a file of a segment": {"data/%d/1/2/insert/100/1", "TARGET_NOT_EMPTY"},
		"any object":          {"data/%d/x", "TARGET_NOT_EMPTY"},
		"similar prefix":      {"data/%dx/y", ""},
		"another root":        {"elsewhere/%d/x", ""},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				leader := e.start("a")
				settle()
				r := e.start("b", func(o *testOptions) { o.Parts.Slots = -1 })
				s := e.create(r, e.richCollection(r, "c", 12), "one")
				leader.kv.Freeze()
				sp := restoreSpecOf(s)
				before := e.contents()
				job := e.restore(r, sp)
				key := fmt.Sprintf(c.key, job.Target)
				if _, err := e.objects.Put(t.Context(), key, []byte("another's")); err != nil {
					t.Fatal(err)
				}
				before.objects[key] = true
				leader.kv.Thaw()
				end := e.waitEnded(r, job.ID)
				if c.reason == "" {
					if end.Job.State != copyjob.Completed {
						t.Fatalf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
					}
					e.checkRestored(r, before, end.Job, sp)
				} else {
					if end.Job.State != copyjob.Failed || end.Job.Reason != c.reason ||
						!strings.Contains(end.Job.Message, "default/"+key+" ") {
						t.Errorf("ended %v: %s: %s; want %s with %q", end.Job.State, end.Job.Reason, end.Job.Message, c.reason, key)
					}
					e.checkNoTraces(before)
					e.checkNextRestore(r, before, sp) // with other ids
				}
				if diff := cmp.Diff("another's", string(e.readObject(key))); diff != "" {
					t.Errorf("%s (-want +got):\n%s", key, diff)
				}
			})
		})
	}
}
