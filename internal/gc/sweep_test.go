package gc_test

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

// rig is a GC over stores in memory that nobody else works on. Ids up to 1000
// were handed out.
type rig struct {
	*gc.GC
	t     *testing.T
	kv    *meta.Faulty
	store *object.Faulty
	told  map[string]string // reasons by key, of the last sweep
}

// sweeping runs fn in virtual time, with a local clock that is ahead of the
// store's by so much.
func sweeping(t *testing.T, ahead time.Duration, fn func(t *testing.T, r *rig)) {
	t.Helper()
	virtual.Test(t, func(t *testing.T) {
		now := func() time.Time { return time.Now().Add(ahead) }
		r := &rig{t: t, kv: meta.NewFaulty(metamemory.New(metamemory.Options{Now: time.Now})), told: map[string]string{}}
		r.store = object.NewFaulty(objectmemory.New(objectmemory.Options{Now: time.Now}))
		c := catalog.New(catalog.Options{
			KV: r.kv, Now: now, Rand: rand.Reader, Requests: request.NewLeases(r.kv, now, nil), HasStore: func(string) bool { return true },
		})
		if _, err := c.AllocateIDs(t.Context(), request.Token{}, 1000); err != nil {
			t.Fatal(err)
		}
		r.GC = gc.New(gc.Options{
			KV: r.kv, Catalog: c, Stores: map[string]object.Store{"default": r.store}, SnapshotStore: "default",
			Now: now, Rand: rand.Reader, Log: zaptest.NewLogger(t),
		})
		fn(t, r)
	})
}

func (r *rig) put(list ...string) {
	r.t.Helper()
	for _, key := range list {
		if _, err := r.store.Put(r.t.Context(), key, []byte("12345")); err != nil {
			r.t.Fatal(err)
		}
	}
}

func (r *rig) record(key string, value []byte) {
	r.t.Helper()
	if _, err := r.kv.Txn(r.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, value)}}); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) snapshot(id int64, state uint32) {
	r.t.Helper()
	r.record(keys.Snapshot(id), record.Encode(&storagev1.Snapshot{Format: record.Format, CollectionId: 5, Name: "one", State: state}))
}

func (r *rig) objects() []string {
	r.t.Helper()
	var list []string
	for info, err := range r.store.List(r.t.Context(), "") {
		if err != nil {
			r.t.Fatal(err)
		}
		list = append(list, info.Key)
	}
	return list
}

func (r *rig) sweep(o gc.SweepOptions) gc.SweepSummary {
	r.t.Helper()
	clear(r.told)
	o.Emit = func(o gc.Orphan) error {
		r.told[o.Key] = o.Reason
		return nil
	}
	s, err := r.Sweep(r.t.Context(), o)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func (r *rig) want(left ...string) {
	r.t.Helper()
	slices.Sort(left)
	if diff := cmp.Diff(left, r.objects()); diff != "" {
		r.t.Errorf("objects (-want +got):\n%s", diff)
	}
}

// TestSweepKeeps holds that nothing goes that has a record, or that snapshotd has
// not written.
func TestSweepKeeps(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		for state := range uint32(5) { // 0 and 4 are of a newer release
			r.snapshot(10+int64(state), state)
			r.put(manifest.MetadataKey(5, 10+int64(state)))
		}
		r.record(keys.Snapshot(20), []byte("garbage"))
		r.record(keys.Unit(5, 30), record.Encode(&storagev1.Unit{Format: record.Format, Parked: &storagev1.Parked{Store: "default"}}))
		r.record(keys.Unit(5, 31), record.Encode(&storagev1.Unit{Format: record.Format, Segment: &storagev1.Segment{}}))
		r.record(keys.Tomb(5, 32), []byte("garbage"))
		r.record(keys.Job(50), []byte("garbage"))
		known := []string{
			"gc/restore/50/pins-0-0.json", "gc/restore/50/pins-17-3.json",
			manifest.RefsKey(5, 20), "gc/held/5/30", "gc/held/5/31", "gc/held/5/32", "snapshots/identity.json", "gc/epoch/0000000000000000001.json",
			"snapshotd-probe/x", "data/5/0/77/insert/100/1",
		}
		foreign := []string{
			"snapshots/5/99/README", "snapshots/5/99/manifest-01.avro", "snapshots/5/notes.txt", "snapshots/5/99/sub/metadata.json",
			"gc/held/5/x", "gc/held/5/099", "gc/held/README", "gc/README", "gc/epoch/1.json",
			"gc/restore/50/pins-0.json", "gc/restore/050/pins-0-0.json", "gc/restore/50/pins-0-0.json.old", "gc/restore/x/pins-0-0.json",
			"gc/restore/50/pins--1-0.json", "gc/restore/1001/pins-0-0.json",
			"gc/epoch/notes.txt",
			"snapshots/5/1001/metadata.json", // 1001 was not handed out
		}
		r.put(slices.Concat(known, foreign)...)
		before := r.objects()
		time.Sleep(1000 * time.Hour)
		got := r.sweep(gc.SweepOptions{})
		want := gc.SweepSummary{Objects: int64(len(before)) - 2, Foreign: int64(len(foreign))}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("summary (-want +got):\n%s", diff)
		}
		r.want(before...)
		if diff := cmp.Diff(slices.Sorted(slices.Values(foreign)), slices.Sorted(maps.Keys(r.told))); diff != "" {
			t.Errorf("told of (-want +got):\n%s", diff)
		}
	})
}

// TestSweepTakes takes what came late, once it is old by the store's clock.
func TestSweepTakes(t *testing.T) {
	dead := []string{
		manifest.MetadataKey(5, 40), manifest.RefsKey(5, 40), manifest.ManifestKey(5, 40, 0), manifest.ManifestKey(5, 41, 17), "gc/held/5/42",
		"gc/restore/43/pins-0-0.json",
	}
	for name, ahead := range map[string]time.Duration{"clocks agree": 0, "local clock ahead": 50_000 * time.Hour, "local clock behind": -50_000 * time.Hour} {
		t.Run(name, func(t *testing.T) {
			sweeping(t, ahead, func(t *testing.T, r *rig) {
				r.put(dead...)
				r.put("snapshots/5/40/README")
				time.Sleep(24*time.Hour - time.Second)
				if got, want := r.sweep(gc.SweepOptions{}), (gc.SweepSummary{Objects: 7, Waiting: 6, Foreign: 1}); got != want {
					t.Errorf("young: %+v, want %+v", got, want)
				}
				r.want(append([]string{"snapshots/5/40/README"}, dead...)...)
				time.Sleep(time.Second)
				want := gc.SweepSummary{Objects: 7, Deleted: 6, Bytes: 30, Foreign: 1}
				if got := r.sweep(gc.SweepOptions{DryRun: true}); got != want {
					t.Errorf("dry run: %+v, want %+v", got, want)
				}
				r.want(append([]string{"snapshots/5/40/README"}, dead...)...)
				waited := 0
				got := r.sweep(gc.SweepOptions{Wait: func(_ context.Context, n int) error {
					waited += n
					return nil
				}})
				if got != want || waited != 6 {
					t.Errorf("%+v, want %+v; waited for %d", got, want, waited)
				}
				r.want("snapshots/5/40/README")
				if n, bytes := r.Counters().Of(gc.ByOrphan); n != 6 || bytes != 30 {
					t.Errorf("counted %d objects and %d bytes", n, bytes)
				}
			})
		})
	}
}

// TestSweepFloor leaves ids alone that may have been lost, and everything while
// the metadata store is behind.
func TestSweepFloor(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		r.put(manifest.MetadataKey(5, 40), manifest.MetadataKey(5, 50), manifest.MetadataKey(5, 60), "gc/held/5/40")
		time.Sleep(100 * time.Hour)
		r.record(keys.Behind, record.Encode(&storagev1.Behind{Format: record.Format}))
		if _, err := r.Sweep(t.Context(), gc.SweepOptions{}); !errors.Is(err, epoch.ErrRolledBack) {
			t.Errorf("got %v, want ErrBehind", err)
		}
		if n := len(r.objects()); n != 4 {
			t.Fatalf("%d objects", n)
		}
		if _, err := r.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Behind)}}); err != nil {
			t.Fatal(err)
		}
		r.record(keys.Epoch, record.Encode(&storagev1.Epoch{Format: record.Format, Floor: 50}))
		if got, want := r.sweep(gc.SweepOptions{Floor: 60}), (gc.SweepSummary{Objects: 4, Deleted: 1, Bytes: 5, Lost: 3}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		if got, want := r.sweep(gc.SweepOptions{}), (gc.SweepSummary{Objects: 3, Deleted: 1, Bytes: 5, Lost: 2}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		r.want(manifest.MetadataKey(5, 40), "gc/held/5/40")
		r.record(keys.Epoch, []byte("garbage"))
		if _, err := r.Sweep(t.Context(), gc.SweepOptions{}); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("got %v, want ErrUnreadable", err)
		}
	})
}

// TestSweepReadsAfterListing begins a snapshot when the listing is over, and ends
// another's record then.
func TestSweepReadsAfterListing(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		r.snapshot(61, 3)
		r.put(manifest.MetadataKey(5, 60), manifest.MetadataKey(5, 61))
		time.Sleep(100 * time.Hour)
		done := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn && !done {
				done = true
				r.snapshot(60, 1)
				if _, err := r.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(keys.Snapshot(61))}}); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		if got, want := r.sweep(gc.SweepOptions{}), (gc.SweepSummary{Objects: 2, Deleted: 1, Bytes: 5}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		r.want(manifest.MetadataKey(5, 60))
	})
}

// TestSweepPages decides on more than one page, and on more records than one
// transaction reads.
func TestSweepPages(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		var left []string
		for id := range int64(700) {
			r.put(manifest.MetadataKey(5, 100+id), manifest.RefsKey(5, 100+id), catalog.HeldKey(6, 100+id))
			if id%2 == 0 {
				r.snapshot(100+id, 2)
				left = append(left, manifest.MetadataKey(5, 100+id), manifest.RefsKey(5, 100+id))
			}
			if id%3 == 0 {
				r.record(keys.Unit(6, 100+id), nil)
				left = append(left, catalog.HeldKey(6, 100+id))
			}
		}
		time.Sleep(100 * time.Hour)
		got := r.sweep(gc.SweepOptions{})
		if want := int64(2100 - len(left)); got.Objects != 2100 || got.Deleted != want {
			t.Errorf("%+v, want %d deleted", got, want)
		}
		r.want(left...)
	})
}

// TestSweepGoesOn has each call of the stores fail, before and after it took
// effect: nothing is lost, and the next sweep ends the work.
func TestSweepGoesOn(t *testing.T) {
	for _, after := range []bool{false, true} {
		for n := range 12 {
			sweeping(t, 0, func(t *testing.T, r *rig) {
				r.snapshot(60, 2)
				r.put(manifest.MetadataKey(5, 60), manifest.MetadataKey(5, 61), manifest.RefsKey(5, 61), "gc/held/5/62")
				time.Sleep(100 * time.Hour)
				if n < 6 {
					r.store.FailNth("", n, map[bool]object.Fault{false: object.FaultBefore, true: object.FaultAfter}[after])
				} else {
					r.kv.FailNth(n-6, map[bool]meta.Fault{false: meta.Before, true: meta.After}[after])
				}
				_, _ = r.Sweep(t.Context(), gc.SweepOptions{})
				r.store.Plan(nil)
				r.kv.Hook(nil)
				r.sweep(gc.SweepOptions{})
				r.want(manifest.MetadataKey(5, 60))
			})
		}
	}
}

// TestSweepEndsWithEmit ends when who is told says so.
func TestSweepEndsWithEmit(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		r.put("snapshots/a", "snapshots/b")
		stop, told := errors.New("stop"), 0
		_, err := r.Sweep(t.Context(), gc.SweepOptions{Emit: func(gc.Orphan) error {
			told++
			return stop
		}})
		if !errors.Is(err, stop) || told != 1 {
			t.Errorf("told %d, err = %v", told, err)
		}
	})
}

// TestSweepRemovesProbes sweeps what a killed probe left in the bucket: it goes once it
// is a day old by the store's clock, and a dry run leaves it. Other names stay.
func TestSweepRemovesProbes(t *testing.T) {
	sweeping(t, 50_000*time.Hour, func(t *testing.T, r *rig) {
		probe := "snapshotd-probe/" + strings.Repeat("a", 26) + "/"
		all := []string{probe + "created", probe + "trip", "snapshotd-probe/x"}
		r.put(all...)
		time.Sleep(24 * time.Hour)
		r.sweep(gc.SweepOptions{})
		r.want(all...)
		time.Sleep(time.Second)
		r.sweep(gc.SweepOptions{DryRun: true})
		r.want(all...)
		if got, want := r.sweep(gc.SweepOptions{}), (gc.SweepSummary{Deleted: 2, Bytes: 10}); got != want {
			t.Errorf("%+v, want %+v", got, want)
		}
		r.want("snapshotd-probe/x")
	})
}

// TestOrphansOfOwnPrefixes tells of them and deletes nothing.
func TestOrphansOfOwnPrefixes(t *testing.T) {
	sweeping(t, 0, func(t *testing.T, r *rig) {
		r.put(manifest.MetadataKey(5, 60), "snapshots/x")
		time.Sleep(25 * time.Hour)
		r.put(manifest.RefsKey(5, 60))
		type told struct {
			Key       string
			Age       time.Duration
			Deletable bool
			Reason    string
		}
		var got []told
		if err := r.Orphans(t.Context(), gc.OrphanOptions{Emit: func(o gc.Orphan) error {
			got = append(got, told{o.Key, o.Age, o.Deletable, o.Reason})
			return nil
		}}); err != nil {
			t.Fatal(err)
		}
		slices.SortFunc(got, func(a, b told) int { return strings.Compare(a.Key, b.Key) })
		want := []told{
			{manifest.MetadataKey(5, 60), 25 * time.Hour, true, "there is no snapshot 60 any more"},
			{manifest.RefsKey(5, 60), 0, true, "there is no snapshot 60 any more; younger than orphan_grace, which is 24h0m0s"},
			{"snapshots/x", 25 * time.Hour, false, "not a name that snapshotd writes: left alone"},
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		if n := len(r.objects()); n != 3 {
			t.Errorf("%d objects are left", n)
		}
		for _, o := range []gc.OrphanOptions{{Delete: true}, {Delete: true, Collection: catalog.Ref{ID: 5}, Grace: time.Hour - 1}} {
			if err := r.Orphans(t.Context(), o); !errors.Is(err, gc.ErrOrphanOptions) {
				t.Errorf("%+v: got %v, want ErrOrphanOptions", o, err)
			}
		}
	})
}
