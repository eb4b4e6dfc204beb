package collect_test

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap/zaptest"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// env is a Collector over stores in memory. Ids up to 1000 are allocated.
type env struct {
	*collect.Collector
	t       *testing.T
	gc      *gc.GC
	kv      *meta.Faulty
	store   *object.Faulty
	reasons map[string]string // by key, of the last sweep
}

// runEnv runs fn in virtual time, with a local clock that is ahead of the store's.
func runEnv(t *testing.T, ahead time.Duration, fn func(t *testing.T, e *env)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		now := func() time.Time { return time.Now().Add(ahead) }
		e := &env{t: t, reasons: map[string]string{}}
		e.kv = meta.NewFaulty(metamemory.New(metamemory.Options{Now: time.Now}))
		e.store = object.NewFaulty(objectmemory.New(objectmemory.Options{Now: time.Now}))
		c := catalog.New(catalog.Options{
			KV: e.kv, Now: now, Rand: rand.Reader, Requests: request.NewLeases(e.kv, now, nil),
			HasStore: func(string) bool { return true },
		})
		if _, err := c.AllocateIDs(t.Context(), request.Token{}, 1000); err != nil {
			t.Fatal(err)
		}
		e.gc = gc.New(gc.Options{
			KV: e.kv, Catalog: c, Stores: map[string]object.Store{"default": e.store}, SnapshotStore: "default",
			Now: now, Rand: rand.Reader, Log: zaptest.NewLogger(t),
		})
		e.Collector = collect.New(e.gc, collect.Options{})
		fn(t, e)
	})
}

func (e *env) put(list ...string) {
	e.t.Helper()
	for _, key := range list {
		if _, err := e.store.Put(e.t.Context(), key, []byte("12345")); err != nil {
			e.t.Fatal(err)
		}
	}
}

func (e *env) record(key string, value []byte) {
	e.t.Helper()
	if _, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, value)}}); err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) snapshot(id int64, state uint32) {
	e.t.Helper()
	e.record(keys.Snapshot(id), record.Encode(&storagev1.Snapshot{
		Format: record.Format, CollectionId: 5, Name: "one", State: state,
	}))
}

func (e *env) objects() []string {
	e.t.Helper()
	var list []string
	for info, err := range e.store.List(e.t.Context(), "") {
		if err != nil {
			e.t.Fatal(err)
		}
		list = append(list, info.Key)
	}
	return list
}

func (e *env) sweep(o collect.SweepOptions) collect.SweepSummary {
	e.t.Helper()
	clear(e.reasons)
	o.Report = func(o collect.Orphan) error {
		e.reasons[o.Key] = o.Reason
		return nil
	}
	s, err := e.Sweep(e.t.Context(), o)
	if err != nil {
		e.t.Fatal(err)
	}
	return s
}

func (e *env) want(left ...string) {
	e.t.Helper()
	slices.Sort(left)
	if diff := cmp.Diff(left, e.objects()); diff != "" {
		e.t.Errorf("objects (-want +got):\n%s", diff)
	}
}

// A sweep deletes no object with a record, and none that snapshotd has not written.
func TestSweepKeeps(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		for state := range uint32(5) { // 0 and 4 are of a newer release
			e.snapshot(10+int64(state), state)
			e.put(manifest.MetadataKey(5, 10+int64(state)))
		}
		e.record(keys.Snapshot(20), []byte("garbage"))
		e.record(keys.Unit(5, 30), record.Encode(&storagev1.Unit{
			Format: record.Format, Parked: &storagev1.Parked{Store: "default"},
		}))
		e.record(keys.Unit(5, 31), record.Encode(&storagev1.Unit{Format: record.Format, Segment: &storagev1.Segment{}}))
		e.record(keys.Tombstone(5, 32), []byte("garbage"))
		e.record(keys.Job(50), []byte("garbage"))
		known := []string{
			"gc/restore/50/pins-0-0.json", "gc/restore/50/pins-17-3.json",
			manifest.RefsKey(5, 20), "gc/held/5/30", "gc/held/5/31", "gc/held/5/32",
			"snapshots/identity.json", "gc/epoch/0000000000000000001.json",
			"snapshotd-probe/x", "data/5/0/77/insert/100/1",
		}
		foreign := []string{
			"snapshots/5/99/README", "snapshots/5/99/manifest-01.avro", "snapshots/5/notes.txt",
			"snapshots/5/99/sub/metadata.json",
			"gc/held/5/x", "gc/held/5/099", "gc/held/README", "gc/README", "gc/epoch/1.json",
			"gc/restore/50/pins-0.json", "gc/restore/050/pins-0-0.json", "gc/restore/50/pins-0-0.json.old",
			"gc/restore/x/pins-0-0.json",
			"gc/restore/50/pins--1-0.json", "gc/restore/1001/pins-0-0.json",
			"gc/epoch/notes.txt",
			"snapshots/5/1001/metadata.json", // 1001 was not allocated
		}
		e.put(slices.Concat(known, foreign)...)
		before := e.objects()
		time.Sleep(1000 * time.Hour)
		got := e.sweep(collect.SweepOptions{})
		want := collect.SweepSummary{Objects: int64(len(before)) - 2, Foreign: int64(len(foreign))}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("summary (-want +got):\n%s", diff)
		}
		e.want(before...)
		if diff := cmp.Diff(slices.Sorted(slices.Values(foreign)), slices.Sorted(maps.Keys(e.reasons))); diff != "" {
			t.Errorf("reported (-want +got):\n%s", diff)
		}
	})
}

// A sweep deletes late objects once they are old by the store's clock.
func TestSweepTakes(t *testing.T) {
	dead := []string{
		manifest.MetadataKey(5, 40), manifest.RefsKey(5, 40), manifest.ManifestKey(5, 40, 0),
		manifest.ManifestKey(5, 41, 17), "gc/held/5/42",
		"gc/restore/43/pins-0-0.json",
	}
	for name, ahead := range map[string]time.Duration{
		"clocks agree": 0, "local clock ahead": 50_000 * time.Hour, "local clock behind": -50_000 * time.Hour,
	} {
		t.Run(name, func(t *testing.T) {
			runEnv(t, ahead, func(t *testing.T, e *env) {
				e.put(dead...)
				e.put("snapshots/5/40/README")
				time.Sleep(24*time.Hour - time.Second)
				young := collect.SweepSummary{Objects: 7, Waiting: 6, Foreign: 1}
				if got := e.sweep(collect.SweepOptions{}); got != young {
					t.Errorf("young: %+v, want %+v", got, young)
				}
				e.want(append([]string{"snapshots/5/40/README"}, dead...)...)
				time.Sleep(time.Second)
				want := collect.SweepSummary{Objects: 7, Deleted: 6, Bytes: 30, Foreign: 1}
				if got := e.sweep(collect.SweepOptions{DryRun: true}); got != want {
					t.Errorf("dry run: %+v, want %+v", got, want)
				}
				e.want(append([]string{"snapshots/5/40/README"}, dead...)...)
				waited := 0
				got := e.sweep(collect.SweepOptions{Wait: func(_ context.Context, n int) error {
					waited += n
					return nil
				}})
				if got != want || waited != 6 {
					t.Errorf("%+v, want %+v; waited for %d", got, want, waited)
				}
				e.want("snapshots/5/40/README")
				if n, bytes := e.gc.Counters().Of(gc.ByOrphan); n != 6 || bytes != 30 {
					t.Errorf("counted %d objects and %d bytes", n, bytes)
				}
			})
		})
	}
}

// A sweep keeps objects whose ids may have been lost, and all objects while the metadata
// store has gone back in time.
func TestSweepLostIDs(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		e.put(manifest.MetadataKey(5, 40), manifest.MetadataKey(5, 50), manifest.MetadataKey(5, 60), "gc/held/5/40")
		time.Sleep(100 * time.Hour)
		e.record(keys.RolledBack, record.Encode(&storagev1.Behind{Format: record.Format}))
		if _, err := e.Sweep(t.Context(), collect.SweepOptions{}); !errors.Is(err, epoch.ErrRolledBack) {
			t.Errorf("got %v, want ErrBehind", err)
		}
		if n := len(e.objects()); n != 4 {
			t.Fatalf("%d objects", n)
		}
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.RolledBack)}}); err != nil {
			t.Fatal(err)
		}
		e.record(keys.Epoch, record.Encode(&storagev1.Epoch{Format: record.Format, Floor: 50}))
		want := collect.SweepSummary{Objects: 4, Deleted: 1, Bytes: 5, Lost: 3}
		if got := e.sweep(collect.SweepOptions{LostBelow: 60}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		want = collect.SweepSummary{Objects: 3, Deleted: 1, Bytes: 5, Lost: 2}
		if got := e.sweep(collect.SweepOptions{}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		e.want(manifest.MetadataKey(5, 40), "gc/held/5/40")
		e.record(keys.Epoch, []byte("garbage"))
		if _, err := e.Sweep(t.Context(), collect.SweepOptions{}); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("got %v, want ErrUnreadable", err)
		}
	})
}

// A snapshot begins, and the record of another is removed, after the listing.
func TestSweepReadsAfterListing(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		e.snapshot(61, 3)
		e.put(manifest.MetadataKey(5, 60), manifest.MetadataKey(5, 61))
		time.Sleep(100 * time.Hour)
		done := false
		e.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn && !done {
				done = true
				e.snapshot(60, 1)
				if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Snapshot(61))}}); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		want := collect.SweepSummary{Objects: 2, Deleted: 1, Bytes: 5}
		if got := e.sweep(collect.SweepOptions{}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		e.want(manifest.MetadataKey(5, 60))
	})
}

// A sweep decides on more than one page, and on more records than one transaction reads.
func TestSweepPages(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		var left []string
		for id := range int64(700) {
			e.put(manifest.MetadataKey(5, 100+id), manifest.RefsKey(5, 100+id), catalog.SpillKey(6, 100+id))
			if id%2 == 0 {
				e.snapshot(100+id, 2)
				left = append(left, manifest.MetadataKey(5, 100+id), manifest.RefsKey(5, 100+id))
			}
			if id%3 == 0 {
				e.record(keys.Unit(6, 100+id), nil)
				left = append(left, catalog.SpillKey(6, 100+id))
			}
		}
		time.Sleep(100 * time.Hour)
		got := e.sweep(collect.SweepOptions{})
		if want := int64(2100 - len(left)); got.Objects != 2100 || got.Deleted != want {
			t.Errorf("%+v, want %d deleted", got, want)
		}
		e.want(left...)
	})
}

// Each call of the stores fails, before and after its effect: no object with a record is
// lost, and the next sweep completes the work.
func TestSweepFaults(t *testing.T) {
	for _, after := range []bool{false, true} {
		for n := range 12 {
			runEnv(t, 0, func(t *testing.T, e *env) {
				e.snapshot(60, 2)
				e.put(manifest.MetadataKey(5, 60), manifest.MetadataKey(5, 61), manifest.RefsKey(5, 61), "gc/held/5/62")
				time.Sleep(100 * time.Hour)
				if n < 6 {
					e.store.FailNth("", n, map[bool]object.Fault{false: object.FaultBefore, true: object.FaultAfter}[after])
				} else {
					e.kv.FailNth(n-6, map[bool]meta.Fault{false: meta.Before, true: meta.After}[after])
				}
				_, _ = e.Sweep(t.Context(), collect.SweepOptions{})
				e.store.Plan(nil)
				e.kv.Hook(nil)
				e.sweep(collect.SweepOptions{})
				e.want(manifest.MetadataKey(5, 60))
			})
		}
	}
}

// An error of Report ends the sweep.
func TestSweepReportError(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		e.put("snapshots/a", "snapshots/b")
		stop, reported := errors.New("stop"), 0
		_, err := e.Sweep(t.Context(), collect.SweepOptions{Report: func(collect.Orphan) error {
			reported++
			return stop
		}})
		if !errors.Is(err, stop) || reported != 1 {
			t.Errorf("reported %d, err = %v", reported, err)
		}
	})
}

// A sweep deletes the remains of a killed probe once they are a day old by the store's
// clock. A dry run keeps them. Other names stay.
func TestSweepRemovesProbes(t *testing.T) {
	runEnv(t, 50_000*time.Hour, func(t *testing.T, e *env) {
		probe := "snapshotd-probe/" + strings.Repeat("a", 26) + "/"
		all := []string{probe + "created", probe + "trip", "snapshotd-probe/x"}
		e.put(all...)
		time.Sleep(24 * time.Hour)
		e.sweep(collect.SweepOptions{})
		e.want(all...)
		time.Sleep(time.Second)
		e.sweep(collect.SweepOptions{DryRun: true})
		e.want(all...)
		if got, want := e.sweep(collect.SweepOptions{}), (collect.SweepSummary{Deleted: 2, Bytes: 10}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		e.want("snapshotd-probe/x")
	})
}

// Orphans of snapshotd's own prefixes are listed and not deleted.
func TestOrphansOfOwnPrefixes(t *testing.T) {
	runEnv(t, 0, func(t *testing.T, e *env) {
		e.put(manifest.MetadataKey(5, 60), "snapshots/x")
		time.Sleep(25 * time.Hour)
		e.put(manifest.RefsKey(5, 60))
		type orphan struct {
			Key       string
			Age       time.Duration
			Deletable bool
			Reason    string
		}
		var got []orphan
		if err := e.Orphans(t.Context(), collect.OrphanOptions{Report: func(o collect.Orphan) error {
			got = append(got, orphan{o.Key, o.Age, o.Deletable, o.Reason})
			return nil
		}}); err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(got, func(a, b orphan) int { return strings.Compare(a.Key, b.Key) })
		want := []orphan{
			{manifest.MetadataKey(5, 60), 25 * time.Hour, true, "snapshot 60 does not exist"},
			{manifest.RefsKey(5, 60), 0, true, "snapshot 60 does not exist; younger than orphan_grace, which is 24h0m0s"},
			{"snapshots/x", 25 * time.Hour, false, "not a name of snapshotd: not deleted"},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if n := len(e.objects()); n != 3 {
			t.Errorf("%d objects are left", n)
		}
		for _, o := range []collect.OrphanOptions{
			{Delete: true}, {Delete: true, Collection: catalog.Ref{ID: 5}, Grace: time.Hour - 1},
		} {
			if err := e.Orphans(t.Context(), o); !errors.Is(err, collect.ErrOrphanOptions) {
				t.Errorf("%+v: got %v, want ErrOrphanOptions", o, err)
			}
		}
	})
}
