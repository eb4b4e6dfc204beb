package epoch_test

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// env is the pair of stores of a cluster.
type env struct {
	t       testing.TB
	kv      *memory.Store
	objects *objectmemory.Store
}

func newEnv(t testing.TB) *env {
	return &env{t: t, kv: memory.New(memory.Options{}), objects: objectmemory.New(objectmemory.Options{})}
}

// replica accesses both stores through separate Faulty decorators.
type replica struct {
	*epoch.Epoch
	kv    *meta.Faulty
	store *object.Faulty
	ids   *catalog.Catalog
}

func (e *env) replica(change ...func(*epoch.Options)) *replica {
	r := &replica{kv: meta.NewFaulty(e.kv), store: object.NewFaulty(e.objects)}
	o := epoch.Options{KV: r.kv, Store: r.store, Cluster: "mine", Now: time.Now, Rand: rand.Reader}
	for _, c := range change {
		c(&o)
	}
	r.Epoch = epoch.New(o)
	r.ids = catalog.New(catalog.Options{
		KV: r.kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(r.kv, time.Now, nil),
		RaiseIDs: r.RaiseIDLimit, AllowReserve: true,
	})
	return r
}

// restored returns the cluster with its metadata store restored from a backup.
func (e *env) restored(backup []meta.KeyValue, revision int64) *env {
	e.t.Helper()
	kv := memory.New(memory.Options{})
	metatest.Restore(e.t, kv, backup, revision)
	return &env{t: e.t, kv: kv, objects: e.objects}
}

func (e *env) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

func (e *env) records() (*storagev1.Epoch, *storagev1.Allocator, bool) {
	e.t.Helper()
	rec, ids := &storagev1.Epoch{}, &storagev1.Allocator{}
	for key, msg := range map[string]record.Message{keys.Epoch: rec, keys.IDs: ids} {
		kv, found, _, err := e.kv.Get(e.t.Context(), key)
		if err == nil && found {
			err = record.Decode(kv, msg)
		}
		e.must(err)
	}
	_, behind, _, err := e.kv.Get(e.t.Context(), keys.RolledBack)
	e.must(err)
	return rec, ids, behind
}

func (e *env) history() int64 {
	e.t.Helper()
	res, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch)}})
	e.must(err)
	return epoch.History(res.Ranges[0])
}

func (e *env) marks() []string {
	e.t.Helper()
	var list []string
	for info, err := range e.objects.List(e.t.Context(), epoch.Prefix) {
		e.must(err)
		list = append(list, info.Key)
	}
	return list
}

// settled fails unless the stores agree and no heartbeat is under way.
func (e *env) settled() {
	e.t.Helper()
	e.must(e.replica().Check(e.t.Context()))
	rec, ids, _ := e.records()
	if len(rec.GetIntent()) > 0 {
		e.t.Errorf("a heartbeat is under way: %s", rec.GetIntent())
	}
	marks := e.marks()
	if len(marks) == 0 || marks[len(marks)-1] != markKey(rec.GetBeat()) || len(marks) > 2 {
		e.t.Fatalf("heartbeat %d is done, the marks are %v", rec.GetBeat(), marks)
	}
	if m := e.mark(rec.GetBeat()); m["ceiling"] != fmt.Sprint(ids.GetCeiling()) || m["cluster_id"] != "mine" {
		e.t.Errorf("mark %v, id limit %d", m, ids.GetCeiling())
	}
}

func markKey(number int64) string { return fmt.Sprintf("gc/epoch/%019d.json", number) }

func (e *env) mark(number int64) map[string]any {
	e.t.Helper()
	data, err := object.ReadAll(e.t.Context(), e.objects, markKey(number), 1<<20)
	e.must(err)
	var m map[string]any
	e.must(json.Unmarshal(data, &m))
	return m
}

// put writes a mark with a nonce that no heartbeat of the test intended.
func (e *env) put(number, revision, idLimit int64, cluster string) {
	e.t.Helper()
	body := fmt.Sprintf(`{"format_version":1,"cluster_id":%q,"beat":"%d","nonce":"other","revision":"%d","ceiling":"%d",`+
		`"time":"2026-01-02T03:04:05Z"}`, cluster, number, revision, idLimit)
	_, err := e.objects.Put(e.t.Context(), markKey(number), withDigest(body))
	e.must(err)
}

// withDigest adds the digest to a mark.
func withDigest(body string) []byte {
	return fmt.Appendf(nil, `%s,"sha256":"%x"}`, strings.TrimSuffix(body, "}"), sha256.Sum256([]byte(body)))
}

func (e *env) allocate(r *replica, count int64) catalog.IDRange {
	e.t.Helper()
	got, err := r.ids.AllocateIDs(e.t.Context(), request.Token{}, count)
	e.must(err)
	return got
}

func wantRolledBack(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, epoch.ErrRolledBack) || !strings.Contains(err.Error(), "snapshotctl recover") {
		t.Errorf("got error %v, want %v with the remedy", err, epoch.ErrRolledBack)
	}
}

func TestFirstStart(t *testing.T) {
	e := newEnv(t)
	a, b := e.replica(), e.replica()
	e.must(a.Check(t.Context()))
	e.must(b.Check(t.Context()))
	if _, err := e.objects.Head(t.Context(), markKey(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a check wrote a mark: %v", err)
	}
	for range 3 {
		e.must(a.Heartbeat(t.Context()))
		e.must(b.Check(t.Context()))
		e.settled()
		e.must(b.Heartbeat(t.Context()))
		e.settled()
	}
	rec, ids, behind := e.records()
	if rec.GetBeat() != 6 || ids.GetNext() != 1 || ids.GetCeiling() != 1+epoch.Headroom || behind {
		t.Errorf("epoch %v, ids %v, behind %v", rec, ids, behind)
	}
	if diff := cmp.Diff([]string{markKey(5), markKey(6)}, e.marks()); diff != "" {
		t.Errorf("marks (-want +got):\n%s", diff)
	}
	if below, err := a.LostBelow(t.Context()); below != 0 || err != nil {
		t.Errorf("lostBelow %d, %v", below, err)
	}
}

// Records of an older release have no id limit; the first allocation sets one.
func TestIDsWithoutLimit(t *testing.T) {
	e := newEnv(t)
	_, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
		meta.Put(keys.IDs, record.Encode(&storagev1.Allocator{Format: record.Format, Next: 5000})),
	}})
	e.must(err)
	if got := e.allocate(e.replica(), 10); got.First != 5000 {
		t.Errorf("got %v", got)
	}
	if _, ids, _ := e.records(); ids.GetCeiling() < 5010+epoch.Headroom {
		t.Errorf("ids %v", ids)
	}
	e.settled()
}

// Ids exceed an id limit only after a mark in the object store has a higher one.
func TestMarkPrecedesIDs(t *testing.T) {
	e := newEnv(t)
	r := e.replica()
	e.allocate(r, 1)
	_, before, _ := e.records()
	r.store.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpCreate {
			return object.FaultBefore
		}
		return object.FaultNone
	})
	for range 20 {
		got, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 400_000)
		if errors.Is(err, object.ErrUnavailable) {
			break
		}
		e.must(err)
		if got.First+got.Count > before.GetCeiling() {
			t.Fatalf("got %v, the id limit is %d", got, before.GetCeiling())
		}
	}
	if r.store.Fired() == 0 {
		t.Error("no allocation reached the id limit")
	}
	r.store.Plan(nil)
	if got := e.allocate(r, 400_000); got.First >= before.GetCeiling() {
		t.Errorf("got %v", got)
	}
	e.settled()
	// Ranges that an engine reserves are below the id limit as well.
	e.must(r.ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 10}))
	if _, ids, _ := e.records(); ids.GetCeiling() < 1<<40+10 || ids.GetCeiling() > 1<<41 {
		t.Errorf("id limit %d", ids.GetCeiling())
	}
}

// Each call of each operation fails, before and after it took effect. A repeat
// succeeds, and no replica reports a rollback.
func TestEveryFault(t *testing.T) {
	ops := map[string]func(*replica, context.Context) error{
		"check":     func(r *replica, ctx context.Context) error { return r.Check(ctx) },
		"heartbeat": func(r *replica, ctx context.Context) error { return r.Heartbeat(ctx) },
		"raise":     func(r *replica, ctx context.Context) error { return r.RaiseIDLimit(ctx, 5_000_000) },
		"recover": func(r *replica, ctx context.Context) error {
			_, _, _, err := r.Recover(ctx, false)
			return err
		},
		"allocate": func(r *replica, ctx context.Context) error {
			_, err := r.ids.AllocateIDs(ctx, request.Token{}, catalog.MaxAllocate)
			return err
		},
	}
	for name, op := range ops {
		for _, rolledBack := range []bool{false, true} {
			if rolledBack && name != "recover" {
				continue
			}
			for _, after := range []bool{false, true} {
				for _, inKV := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s rolledBack=%v after=%v kv=%v", name, rolledBack, after, inKV), func(t *testing.T) {
						for n := 0; ; n++ {
							e := newEnv(t)
							for range 3 {
								e.must(e.replica().Heartbeat(t.Context()))
							}
							e.allocate(e.replica(), 5)
							if rolledBack {
								backup := metatest.Backup(t, e.kv)
								e.must(e.replica().Heartbeat(t.Context()))
								e = e.restored(backup, 0)
							}
							if fired := e.withFault(op, n, after, inKV); !fired {
								if n == 0 {
									t.Fatal("no calls")
								}
								break
							}
							e.must(e.replica().Heartbeat(t.Context()))
							e.settled()
							if t.Failed() {
								t.Fatalf("fault in call %d", n)
							}
						}
					})
				}
			}
		}
	}
}

func (e *env) withFault(op func(*replica, context.Context) error, n int, after, inKV bool) (fired bool) {
	e.t.Helper()
	r := e.replica()
	if inKV {
		fault := meta.Before
		if after {
			fault = meta.After
		}
		r.kv.FailNth(n, fault)
	} else {
		fault := object.FaultBefore
		if after {
			fault = object.FaultAfter
		}
		r.store.FailNth("", n, fault)
	}
	err := op(r, e.t.Context())
	fired = r.kv.Fired()+r.store.Fired() > 0
	if err != nil && (!fired || !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, object.ErrUnavailable)) {
		e.t.Fatalf("call %d: %v", n, err)
	}
	if err != nil {
		e.must(op(e.replica(), e.t.Context())) // another replica repeats it
	}
	return fired
}

// A replica freezes after each of its calls while others send heartbeats. After it
// resumes it does no harm.
func TestFrozenHeartbeat(t *testing.T) {
	for _, others := range []int{0, 1, 2, 5} {
		for _, inKV := range []bool{false, true} {
			for n := range 4 {
				t.Run(fmt.Sprintf("%d others, kv=%v, call %d", others, inKV, n), func(t *testing.T) {
					virtual.Test(t, func(t *testing.T) {
						e := newEnv(t)
						frozen := e.replica()
						e.must(frozen.Heartbeat(t.Context()))
						calls := 0
						if inKV {
							frozen.kv.Hook(func(meta.Call) meta.Fault {
								if calls++; calls == n+1 {
									frozen.kv.Freeze()
								}
								return meta.NoFault
							})
						} else {
							// The write is held back before it reaches the store, and arrives late.
							store := object.NewFaulty(frozen.store)
							store.Plan(func(object.Call) object.Fault {
								if calls++; calls == n+1 {
									frozen.store.Freeze()
								}
								return object.FaultNone
							})
							frozen.Epoch = epoch.New(epoch.Options{
								KV: frozen.kv, Store: store, Cluster: "mine", Now: time.Now, Rand: rand.Reader,
							})
						}
						done := make(chan error, 1)
						go func() { done <- frozen.Heartbeat(t.Context()) }()
						virtual.Wait()
						other := e.replica()
						for range others {
							e.must(other.Heartbeat(t.Context()))
							e.must(other.Check(t.Context()))
						}
						frozen.kv.Thaw()
						frozen.store.Thaw()
						e.must(<-done)
						e.must(other.Check(t.Context()))
						e.must(other.Heartbeat(t.Context()))
						e.must(other.Heartbeat(t.Context()))
						e.settled()
					})
				})
			}
		}
	}
}

func TestConcurrentReplicas(t *testing.T) {
	e := newEnv(t)
	var mu sync.Mutex
	seen := map[int64]bool{}
	var wg sync.WaitGroup
	for i := range 4 {
		r := e.replica()
		wg.Go(func() {
			for range 8 {
				if err := r.Heartbeat(t.Context()); err != nil && !errors.Is(err, meta.ErrConflict) {
					t.Errorf("replica %d: %v", i, err)
				}
				if err := r.Check(t.Context()); err != nil {
					t.Errorf("replica %d: %v", i, err)
				}
			}
		})
		wg.Go(func() {
			for range 8 {
				got, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 300_000)
				if err != nil {
					if !errors.Is(err, meta.ErrConflict) {
						t.Errorf("replica %d: %v", i, err)
					}
					continue
				}
				mu.Lock()
				if seen[got.First] {
					t.Errorf("%v was allocated twice", got)
				}
				seen[got.First] = true
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(seen) < 10 {
		t.Errorf("only %d allocations", len(seen))
	}
	e.must(e.replica().Heartbeat(t.Context()))
	e.settled()
}

func TestWipedBucket(t *testing.T) {
	e := newEnv(t)
	core, logs := observer.New(zap.WarnLevel)
	r := e.replica(func(o *epoch.Options) { o.Log = zap.New(core) })
	e.must(r.Heartbeat(t.Context()))
	e.must(r.Heartbeat(t.Context()))
	e.must(e.objects.Delete(t.Context(), e.marks()...))
	e.must(r.Check(t.Context()))
	if logs.FilterMessageSnippet("lost").Len() != 1 {
		t.Errorf("no warning: %v", logs.All())
	}
	e.must(r.Heartbeat(t.Context()))
	e.settled()
}

func TestForeign(t *testing.T) {
	for name, plant := range map[string]func(e *env){
		"mark of another cluster, beyond": func(e *env) { e.put(9, 1, 5_000_000, "other") },
		"mark of another cluster, below": func(e *env) {
			e.must(e.objects.Delete(e.t.Context(), e.marks()...))
			e.put(2, 1, 5_000_000, "other")
		},
		"unintended next mark": func(e *env) { e.put(4, 1, 5_000_000, "mine") },
		"greater revision":     func(e *env) { e.put(3, 1000, 5_000_000, "mine") },
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t)
			r := e.replica()
			for range 3 {
				e.must(r.Heartbeat(t.Context()))
			}
			plant(e)
			wantRolledBack(t, r.Check(t.Context()))
			wantRolledBack(t, e.replica().Heartbeat(t.Context()))
			was, next, from, err := r.Recover(t.Context(), false)
			if !was || next != 5_000_000 || from != 1 || err != nil {
				t.Errorf("recover: %v, %d, %d, %v", was, next, from, err)
			}
			e.settled()
		})
	}
	// A heartbeat without a preceding check detects the rollback.
	e := newEnv(t)
	e.must(e.replica().Heartbeat(t.Context()))
	e.put(2, 1, 5_000_000, "mine")
	wantRolledBack(t, e.replica().Heartbeat(t.Context()))
	if _, _, behind := e.records(); !behind {
		t.Error("/behind is absent")
	}
	e = newEnv(t)
	e.must(e.replica().Heartbeat(t.Context()))
	e.put(9, 1, 5_000_000, "mine")
	wantRolledBack(t, e.replica().RaiseIDLimit(t.Context(), 3_000_000))
	if _, ids, behind := e.records(); !behind || ids.GetCeiling() >= 3_000_000 {
		t.Errorf("rolled back %v, ids %v", behind, ids)
	}
}

func TestOtherFiles(t *testing.T) {
	e := newEnv(t)
	r := e.replica()
	e.must(r.Heartbeat(t.Context()))
	for _, name := range []string{"readme.txt", "9.json", "0000000000000000009.json.bak"} {
		_, err := e.objects.Put(t.Context(), epoch.Prefix+name, []byte("?"))
		e.must(err)
	}
	e.must(r.Check(t.Context()))
	e.must(r.Heartbeat(t.Context()))
	_, err := e.objects.Put(t.Context(), markKey(9), []byte("?"))
	e.must(err)
	for what, err := range map[string]error{"check": r.Check(t.Context()), "heartbeat": r.Heartbeat(t.Context())} {
		if !errors.Is(err, epoch.ErrDamaged) || !strings.Contains(err.Error(), markKey(9)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, behind := e.records(); behind {
		t.Error("a damaged object counts as a rollback")
	}
}

func TestRestoredBackup(t *testing.T) {
	for name, revision := range map[string]int64{"lower revision": 0, "higher revision": 10_000} {
		for since := 1; since < 5; since++ { // heartbeats since the backup
			t.Run(fmt.Sprintf("%s, %d heartbeats", name, since), func(t *testing.T) {
				e := newEnv(t)
				r := e.replica()
				e.must(r.Heartbeat(t.Context()))
				e.allocate(r, 100)
				backup := metatest.Backup(t, e.kv)
				var last int64
				for range since {
					last = e.allocate(r, catalog.MaxAllocate/2).First + catalog.MaxAllocate/2
					e.must(r.Heartbeat(t.Context()))
				}
				_, before, _ := e.records()

				e = e.restored(backup, revision)
				r = e.replica()
				wantRolledBack(t, r.Check(t.Context()))
				wantRolledBack(t, r.Check(t.Context()))
				wantRolledBack(t, r.Heartbeat(t.Context()))
				if n := e.history(); n != 1 {
					t.Errorf("history %d before the recovery", n)
				}
				_, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
				wantRolledBack(t, err)
				_, err = r.ids.NextID(t.Context())
				wantRolledBack(t, err)
				wantRolledBack(t, r.ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 5}))
				rolledBack, err := epoch.RolledBack(t.Context(), e.kv)
				e.must(err)
				wantRolledBack(t, rolledBack)
				if _, ok, err := r.ids.Allocated(t.Context(), 100); !ok || err != nil {
					t.Errorf("the allocated ids are unknown: %v, %v", ok, err)
				}

				was, next, from, err := r.Recover(t.Context(), false)
				if !was || next != before.GetCeiling() || from != 101 || err != nil {
					t.Errorf("recover: %v, %d, %d, %v; want next %d", was, next, from, err, before.GetCeiling())
				}
				if below, err := r.LostBelow(t.Context()); below != next || err != nil {
					t.Errorf("lostBelow %d, %v, want %d", below, err, next)
				}
				e.settled()
				if got := e.allocate(r, 10); got.First < last {
					t.Errorf("got %v, ids up to %d are in use", got, last-1)
				}
				was, again, _, err := e.replica().Recover(t.Context(), false)
				if was || again <= next || err != nil {
					t.Errorf("recover again: %v, %d, %v", was, again, err)
				}
				if n := e.history(); n != 2 {
					t.Errorf("history %d after one recovery and an unnecessary one", n)
				}
				if below, _ := r.LostBelow(t.Context()); below != next {
					t.Errorf("lostBelow %d, want %d", below, next)
				}
				e.settled()
				if _, _, _, err := r.Recover(t.Context(), true); err != nil || e.history() != 3 {
					t.Errorf("history %d after a forced recovery, %v", e.history(), err)
				}
			})
		}
	}
}

// The history of an unreadable record equals that of no other record.
func TestHistoryOfAnUnreadableRecord(t *testing.T) {
	for want, found := range map[int64][]meta.KeyValue{
		1: nil,
		2: {{Key: keys.Epoch, Value: record.Encode(&storagev1.Epoch{Format: record.Format, History: 1})}},
		0: {{Key: keys.Epoch, Value: []byte("garbage")}},
	} {
		if got := epoch.History(found); got != want {
			t.Errorf("%v is of history %d, want %d", found, got, want)
		}
	}
}

// A replica that runs while its store is replaced detects an id that it has seen.
func TestReplicaOutlivesItsStore(t *testing.T) {
	e := newEnv(t)
	kv := &switched{KV: e.kv}
	ids := catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(kv, time.Now, nil), AllowReserve: true,
	})
	allocate := func() error {
		_, err := ids.AllocateIDs(t.Context(), request.Token{}, 10)
		return err
	}
	e.must(allocate())
	backup := metatest.Backup(t, e.kv)
	e.must(allocate())
	e.must(allocate())
	kv.KV = e.restored(backup, 0).kv
	wantRolledBack(t, allocate())
	if _, ok, err := ids.Allocated(t.Context(), 15); !ok || err != nil {
		t.Errorf("handed out: %v, %v", ok, err)
	}
}

type switched struct{ meta.KV }

// For any course before and after a backup: a check of the restored store reports a
// rollback if a heartbeat followed the backup, a check reports none for a store that never
// went back, and after a recovery no id is allocated twice.
func TestNoIDIsAllocatedTwice(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		e := newEnv(t)
		r := e.replica()
		var backup []meta.KeyValue
		var atBackup int64 // the heartbeat that was done or under way at the backup
		var allocated []catalog.IDRange
		for range rapid.IntRange(5, 40).Draw(rt, "steps") {
			switch rapid.IntRange(0, 6).Draw(rt, "step") {
			case 0, 1:
				got := e.allocate(r, rapid.SampledFrom([]int64{1, 100, 700_000, catalog.MaxAllocate}).Draw(rt, "count"))
				for _, had := range allocated {
					if got.First < had.First+had.Count && had.First < got.First+got.Count {
						rt.Fatalf("%v overlaps the earlier %v", got, had)
					}
				}
				allocated = append(allocated, got)
			case 2:
				e.must(r.Heartbeat(t.Context()))
			case 3: // a heartbeat whose process dies
				faults := rapid.SampledFrom([]object.Fault{object.FaultBefore, object.FaultAfter})
				r.store.FailNth(object.OpCreate, 0, faults.Draw(rt, "fault"))
				if err := r.Heartbeat(t.Context()); !errors.Is(err, object.ErrUnavailable) {
					rt.Fatal(err)
				}
				r = e.replica()
			case 4:
				backup = metatest.Backup(t, e.kv)
				rec, _, _ := e.records()
				if atBackup = rec.GetBeat(); len(rec.GetIntent()) > 0 {
					atBackup++
				}
			case 5:
				e.must(r.Check(t.Context()))
			case 6:
				if backup == nil {
					continue
				}
				newest := len(e.marks()) > 0 && e.marks()[len(e.marks())-1] > markKey(atBackup)
				e = e.restored(backup, rapid.SampledFrom([]int64{0, 10_000}).Draw(rt, "revision"))
				r = e.replica()
				if err := r.Check(t.Context()); newest && !errors.Is(err, epoch.ErrRolledBack) {
					rt.Fatalf("the rollback is undetected: %v", err)
				}
				_, _, _, err := r.Recover(t.Context(), true)
				e.must(err)
			}
		}
	})
}

// leader is the work of a leader, which records whether it runs.
type leader struct {
	mu      sync.Mutex
	working bool
	begun   int
}

func (l *leader) work(ctx context.Context) error {
	l.set(true)
	defer l.set(false)
	<-ctx.Done()
	return nil
}

func (l *leader) set(working bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.working = working; working {
		l.begun++
	}
}

func (l *leader) want(t *testing.T, when string, working bool, begun int) {
	t.Helper()
	virtual.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.working != working || l.begun != begun {
		t.Errorf("%s: working %v, begun %d times, want %v, %d", when, l.working, l.begun, working, begun)
	}
}

func TestLead(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		r, other := e.replica(), e.replica()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r.store.Plan(func(object.Call) object.Fault { return object.FaultBefore })
		var l leader
		done := make(chan error, 1)
		go func() { done <- r.Lead(ctx, l.work) }()
		l.want(t, "the object store is unavailable", false, 0)
		r.store.Plan(nil)
		time.Sleep(time.Minute)
		l.want(t, "it is available", true, 1)
		time.Sleep(10 * time.Minute)
		if rec, _, _ := e.records(); rec.GetBeat() < 10 || rec.GetBeat() > 12 {
			t.Errorf("heartbeat %d after 11 minutes", rec.GetBeat())
		}
		r.store.Plan(func(object.Call) object.Fault { return object.FaultBefore })
		time.Sleep(10 * time.Minute)
		l.want(t, "unavailable later", true, 1)
		r.store.Plan(nil)

		// The leader detects the rollback.
		e.put(1000, 1, 5_000_000, "mine")
		time.Sleep(2 * time.Minute)
		l.want(t, "rolled back", false, 1)
		time.Sleep(time.Hour)
		l.want(t, "rolled back for an hour", false, 1)
		if was, _, _, err := other.Recover(ctx, false); !was || err != nil {
			t.Errorf("recover: %v, %v", was, err)
		}
		time.Sleep(time.Second)
		l.want(t, "recovered", true, 2)

		// Another replica detects it.
		e.put(2000, 1, 50_000_000, "mine")
		wantRolledBack(t, other.Check(ctx))
		time.Sleep(time.Second)
		l.want(t, "rolled back, detected by another replica", false, 2)
		if was, _, _, err := other.Recover(ctx, false); !was || err != nil {
			t.Errorf("recover: %v, %v", was, err)
		}
		time.Sleep(time.Second)
		l.want(t, "recovered again", true, 3)
		cancel()
		e.must(<-done)
		l.want(t, "canceled", false, 3)
		e.settled()
	})
}

// A leader works while the metadata store is full, since its work frees space.
func TestLeadOfAFullStore(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		e.must(e.replica().Heartbeat(t.Context()))
		e.kv.SetFull(true)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var l leader
		done := make(chan error, 1)
		go func() { done <- e.replica().Lead(ctx, l.work) }()
		time.Sleep(10 * time.Minute)
		l.want(t, "full", true, 1)
		e.kv.SetFull(false)
		time.Sleep(10 * time.Minute)
		l.want(t, "not full", true, 1)
		cancel()
		e.must(<-done)
		e.settled()
	})
}

func TestLeadReturnsWorksError(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		e := newEnv(t)
		failed := errors.New("failed")
		if err := e.replica().Lead(t.Context(), func(context.Context) error { return failed }); !errors.Is(err, failed) {
			t.Errorf("got error %v", err)
		}
	})
}

// between calls do once, before the first transaction that puts key.
type between struct {
	meta.KV
	key string
	do  func()
}

func (b *between) Txn(ctx context.Context, txn meta.Txn) (meta.TxnResult, error) {
	for _, op := range txn.Then {
		if do := b.do; op.Kind == meta.OpPut && op.From == b.key && do != nil {
			b.do = nil
			do()
		}
	}
	return b.KV.Txn(ctx, txn)
}

func TestAllocationDuringRaise(t *testing.T) {
	e := newEnv(t)
	other := e.replica()
	e.allocate(other, 10)
	var got catalog.IDRange
	kv := &between{KV: e.kv, key: keys.IDs, do: func() { got = e.allocate(other, 10) }}
	e.must(e.replica(func(o *epoch.Options) { o.KV = kv }).RaiseIDLimit(t.Context(), 5_000_000))
	if again := e.allocate(other, 10); got.Count == 0 || again.First < got.First+got.Count {
		t.Errorf("got %v, then %v", got, again)
	}
	e.settled()
}

// A slow check has no effect if the store has recovered since its read.
func TestRecoveryDuringCheck(t *testing.T) {
	e := newEnv(t)
	other := e.replica()
	e.must(other.Heartbeat(t.Context()))
	e.put(9, 1, 5_000_000, "mine")
	recovered := false
	kv := &between{KV: e.kv, key: keys.RolledBack, do: func() {
		was, _, _, err := other.Recover(t.Context(), false)
		if recovered = was; err != nil {
			t.Error(err)
		}
	}}
	e.must(e.replica(func(o *epoch.Options) { o.KV = kv }).Check(t.Context()))
	if !recovered {
		t.Error("Recover reported no rollback")
	}
	e.settled()
}

// A rollback is detected during an allocation.
func TestRollbackDuringAllocation(t *testing.T) {
	e := newEnv(t)
	e.allocate(e.replica(), 10)
	kv := &between{KV: e.kv, key: keys.IDs, do: func() {
		e.put(9, 1, 5_000_000, "mine")
		wantRolledBack(t, e.replica().Check(t.Context()))
	}}
	ids := catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(kv, time.Now, nil), AllowReserve: true,
	})
	_, err := ids.AllocateIDs(t.Context(), request.Token{}, 10)
	wantRolledBack(t, err)
	kv.do = func() { t.Error("a transaction was sent") }
	wantRolledBack(t, ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 5}))
	if _, rec, _ := e.records(); rec.GetNext() != 11 {
		t.Errorf("ids %v", rec)
	}
}

// Recover changes nothing without a detected rollback, unless it is forced: then the
// skipped ids are below lostBelow.
func TestRecoverWithoutRollback(t *testing.T) {
	e := newEnv(t)
	r := e.replica()
	e.must(r.Heartbeat(t.Context()))
	_, _, before, err := e.kv.Get(t.Context(), keys.IDs)
	e.must(err)
	was, next, from, err := r.Recover(t.Context(), false)
	if was || next != from || err != nil {
		t.Errorf("recover: %v, %d, %d, %v", was, next, from, err)
	}
	if _, _, after, _ := e.kv.Get(t.Context(), keys.IDs); after != before || len(e.marks()) != 1 {
		t.Errorf("Recover wrote: revision %d, then %d, marks %v", before, after, e.marks())
	}
	was, next, from, err = r.Recover(t.Context(), true)
	if was || next <= from || err != nil {
		t.Errorf("forced: %v, %d, %d, %v", was, next, from, err)
	}
	if below, err := r.LostBelow(t.Context()); below != next || err != nil {
		t.Errorf("lostBelow %d, %v, want %d", below, err, next)
	}
}

// unlisted is a store whose lists are empty.
type unlisted struct{ object.Store }

func (unlisted) List(context.Context, string) iter.Seq2[object.Info, error] {
	return func(func(object.Info, error) bool) {}
}

// TestEmptyLists shows that a metadata rollback is detected although the object store
// lists no marks.
func TestEmptyLists(t *testing.T) {
	for _, since := range []int{1, 2, 5, 17} {
		e := newEnv(t)
		cannotList := func(o *epoch.Options) { o.Store = unlisted{o.Store} }
		r := e.replica(cannotList)
		e.must(r.Heartbeat(t.Context()))
		e.must(r.Check(t.Context()))
		backup := metatest.Backup(t, e.kv)
		for range since {
			e.allocate(r, catalog.MaxAllocate/2)
			e.must(r.Heartbeat(t.Context()))
			e.must(r.Check(t.Context()))
		}
		_, before, _ := e.records()

		e = e.restored(backup, 0)
		r = e.replica(cannotList)
		wantRolledBack(t, r.Check(t.Context()))
		_, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
		wantRolledBack(t, err)
		was, next, _, err := r.Recover(t.Context(), false)
		if !was || next != before.GetCeiling() || err != nil {
			t.Errorf("%d heartbeats: recover: %v, %d, %v; want next %d", since, was, next, err, before.GetCeiling())
		}
		e.must(r.Check(t.Context()))
		e.allocate(r, 10)
	}
}

// TestAlarm shows that an id that was allocated twice stops all allocations until a recovery.
func TestAlarm(t *testing.T) {
	e := newEnv(t)
	r := e.replica()
	e.must(r.Heartbeat(t.Context()))
	err := r.Alarm(t.Context(), "snapshots/1/2/refs.avro")
	wantRolledBack(t, err)
	if !strings.Contains(err.Error(), "snapshots/1/2/refs.avro") {
		t.Errorf("%v does not name the object", err)
	}
	wantRolledBack(t, r.Alarm(t.Context(), "another"))
	_, err = r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
	wantRolledBack(t, err)
	if was, _, _, err := r.Recover(t.Context(), false); !was || err != nil {
		t.Errorf("recover: %v, %v", was, err)
	}
	e.allocate(r, 1)
}
