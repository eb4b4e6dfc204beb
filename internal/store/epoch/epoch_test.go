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

// world is the two stores of a cluster.
type world struct {
	t       testing.TB
	kv      *memory.Store
	objects *objectmemory.Store
}

func newWorld(t testing.TB) *world {
	return &world{t: t, kv: memory.New(memory.Options{}), objects: objectmemory.New(objectmemory.Options{})}
}

// replica reaches both stores through a Faulty of its own.
type replica struct {
	*epoch.Epoch
	kv    *meta.Faulty
	store *object.Faulty
	ids   *catalog.Catalog
}

func (w *world) replica(change ...func(*epoch.Options)) *replica {
	r := &replica{kv: meta.NewFaulty(w.kv), store: object.NewFaulty(w.objects)}
	o := epoch.Options{KV: r.kv, Store: r.store, Cluster: "mine", Now: time.Now, Rand: rand.Reader}
	for _, c := range change {
		c(&o)
	}
	r.Epoch = epoch.New(o)
	r.ids = catalog.New(catalog.Options{
		KV: r.kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(r.kv, time.Now, nil), RaiseIDs: r.Raise, AllowReserve: true,
	})
	return r
}

// restored is the cluster with its metadata store restored from a backup.
func (w *world) restored(backup []meta.KeyValue, revision int64) *world {
	w.t.Helper()
	kv := memory.New(memory.Options{})
	metatest.Restore(w.t, kv, backup, revision)
	return &world{t: w.t, kv: kv, objects: w.objects}
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) records() (*storagev1.Epoch, *storagev1.Allocator, bool) {
	w.t.Helper()
	e, ids := &storagev1.Epoch{}, &storagev1.Allocator{}
	for key, rec := range map[string]record.Message{keys.Epoch: e, keys.IDs: ids} {
		kv, found, _, err := w.kv.Get(w.t.Context(), key)
		if err == nil && found {
			err = record.Decode(kv, rec)
		}
		w.must(err)
	}
	_, behind, _, err := w.kv.Get(w.t.Context(), keys.Behind)
	w.must(err)
	return e, ids, behind
}

func (w *world) history() int64 {
	w.t.Helper()
	res, err := w.kv.Txn(w.t.Context(), meta.Txn{Then: []meta.Op{meta.Get(keys.Epoch)}})
	w.must(err)
	return epoch.History(res.Ranges[0])
}

func (w *world) notes() []string {
	w.t.Helper()
	var list []string
	for info, err := range w.objects.List(w.t.Context(), epoch.Prefix) {
		w.must(err)
		list = append(list, info.Key)
	}
	return list
}

// settled fails unless the stores are as they are when nothing is under way.
func (w *world) settled() {
	w.t.Helper()
	w.must(w.replica().Check(w.t.Context()))
	e, ids, _ := w.records()
	if len(e.GetIntent()) > 0 {
		w.t.Errorf("a beat is under way: %s", e.GetIntent())
	}
	notes := w.notes()
	if len(notes) == 0 || notes[len(notes)-1] != noteKey(e.GetBeat()) || len(notes) > 2 {
		w.t.Fatalf("beat %d is done, and there are %v", e.GetBeat(), notes)
	}
	if n := w.note(e.GetBeat()); n["ceiling"] != fmt.Sprint(ids.GetCeiling()) || n["cluster_id"] != "mine" {
		w.t.Errorf("note %v, ceiling %d", n, ids.GetCeiling())
	}
}

func noteKey(beat int64) string { return fmt.Sprintf("gc/epoch/%019d.json", beat) }

func (w *world) note(beat int64) map[string]any {
	w.t.Helper()
	data, err := object.ReadAll(w.t.Context(), w.objects, noteKey(beat), 1<<20)
	w.must(err)
	var n map[string]any
	w.must(json.Unmarshal(data, &n))
	return n
}

// put writes a note as another would.
func (w *world) put(beat, revision, ceiling int64, cluster string) {
	w.t.Helper()
	body := fmt.Sprintf(`{"format_version":1,"cluster_id":%q,"beat":"%d","nonce":"other","revision":"%d","ceiling":"%d","time":"2026-01-02T03:04:05Z"}`,
		cluster, beat, revision, ceiling)
	_, err := w.objects.Put(w.t.Context(), noteKey(beat), summed(body))
	w.must(err)
}

// summed adds its digest to a note.
func summed(body string) []byte {
	return fmt.Appendf(nil, `%s,"sha256":"%x"}`, strings.TrimSuffix(body, "}"), sha256.Sum256([]byte(body)))
}

func (w *world) allocate(r *replica, count int64) catalog.IDRange {
	w.t.Helper()
	got, err := r.ids.AllocateIDs(w.t.Context(), request.Token{}, count)
	w.must(err)
	return got
}

func wantBehind(t testing.TB, err error) {
	t.Helper()
	if !errors.Is(err, epoch.ErrBehind) || !strings.Contains(err.Error(), "snapshotctl recover") {
		t.Errorf("got error %v, want %v with the way out", err, epoch.ErrBehind)
	}
}

func TestFirstStart(t *testing.T) {
	w := newWorld(t)
	a, b := w.replica(), w.replica()
	w.must(a.Check(t.Context()))
	w.must(b.Check(t.Context()))
	if _, err := w.objects.Head(t.Context(), noteKey(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("a check wrote: %v", err)
	}
	for range 3 {
		w.must(a.Beat(t.Context()))
		w.must(b.Check(t.Context()))
		w.settled()
		w.must(b.Beat(t.Context()))
		w.settled()
	}
	e, ids, behind := w.records()
	if e.GetBeat() != 6 || ids.GetNext() != 1 || ids.GetCeiling() != 1+epoch.Headroom || behind {
		t.Errorf("epoch %v, ids %v, behind %v", e, ids, behind)
	}
	if diff := cmp.Diff([]string{noteKey(5), noteKey(6)}, w.notes()); diff != "" {
		t.Errorf("notes (-want +got):\n%s", diff)
	}
	if floor, err := a.Floor(t.Context()); floor != 0 || err != nil {
		t.Errorf("floor %d, %v", floor, err)
	}
}

// An older release kept no ceiling; the first allocation notes one.
func TestIDsWithoutCeiling(t *testing.T) {
	w := newWorld(t)
	_, err := w.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
		meta.Put(keys.IDs, record.Encode(&storagev1.Allocator{Format: record.Format, Next: 5000})),
	}})
	w.must(err)
	if got := w.allocate(w.replica(), 10); got.First != 5000 {
		t.Errorf("got %v", got)
	}
	if _, ids, _ := w.records(); ids.GetCeiling() < 5010+epoch.Headroom {
		t.Errorf("ids %v", ids)
	}
	w.settled()
}

// Ids pass the ceiling only when a higher one is in the object store.
func TestCeilingComesFirst(t *testing.T) {
	w := newWorld(t)
	r := w.replica()
	w.allocate(r, 1)
	_, before, _ := w.records()
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
		w.must(err)
		if got.First+got.Count > before.GetCeiling() {
			t.Fatalf("got %v, the ceiling is %d", got, before.GetCeiling())
		}
	}
	if r.store.Fired() == 0 {
		t.Error("the ceiling was not met")
	}
	r.store.Plan(nil)
	if got := w.allocate(r, 400_000); got.First >= before.GetCeiling() {
		t.Errorf("got %v", got)
	}
	w.settled()
	// Ranges that an engine reserves are below it as well.
	w.must(r.ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 10}))
	if _, ids, _ := w.records(); ids.GetCeiling() < 1<<40+10 || ids.GetCeiling() > 1<<41 {
		t.Errorf("ceiling %d", ids.GetCeiling())
	}
}

// Each call of each operation fails, before and after it took effect. A repeat
// ends it, and nobody believes that the store is behind.
func TestEveryFault(t *testing.T) {
	ops := map[string]func(*replica, context.Context) error{
		"check": func(r *replica, ctx context.Context) error { return r.Check(ctx) },
		"beat":  func(r *replica, ctx context.Context) error { return r.Beat(ctx) },
		"raise": func(r *replica, ctx context.Context) error { return r.Raise(ctx, 5_000_000) },
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
		for _, behind := range []bool{false, true} {
			if behind && name != "recover" {
				continue
			}
			for _, after := range []bool{false, true} {
				for _, inKV := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s behind=%v after=%v kv=%v", name, behind, after, inKV), func(t *testing.T) {
						for n := 0; ; n++ {
							w := newWorld(t)
							for range 3 {
								w.must(w.replica().Beat(t.Context()))
							}
							w.allocate(w.replica(), 5)
							if behind {
								backup := metatest.Backup(t, w.kv)
								w.must(w.replica().Beat(t.Context()))
								w = w.restored(backup, 0)
							}
							if fired := w.withFault(op, n, after, inKV); !fired {
								if n == 0 {
									t.Fatal("no calls")
								}
								break
							}
							w.must(w.replica().Beat(t.Context()))
							w.settled()
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

func (w *world) withFault(op func(*replica, context.Context) error, n int, after, inKV bool) (fired bool) {
	w.t.Helper()
	r := w.replica()
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
	err := op(r, w.t.Context())
	fired = r.kv.Fired()+r.store.Fired() > 0
	if err != nil && (!fired || !errors.Is(err, meta.ErrUnavailable) && !errors.Is(err, object.ErrUnavailable)) {
		w.t.Fatalf("call %d: %v", n, err)
	}
	if err != nil {
		w.must(op(w.replica(), w.t.Context())) // another replica goes on
	}
	return fired
}

// A replica freezes after each of its calls while others beat on. When it wakes up
// it does no harm.
func TestFrozenBeater(t *testing.T) {
	for _, others := range []int{0, 1, 2, 5} {
		for _, inKV := range []bool{false, true} {
			for n := range 4 {
				t.Run(fmt.Sprintf("%d others, kv=%v, call %d", others, inKV, n), func(t *testing.T) {
					virtual.Test(t, func(t *testing.T) {
						w := newWorld(t)
						frozen := w.replica()
						w.must(frozen.Beat(t.Context()))
						calls := 0
						if inKV {
							frozen.kv.Hook(func(meta.Call) meta.Fault {
								if calls++; calls == n+1 {
									frozen.kv.Freeze()
								}
								return meta.NoFault
							})
						} else {
							// Held back before it reaches the store: a write that comes late.
							store := object.NewFaulty(frozen.store)
							store.Plan(func(object.Call) object.Fault {
								if calls++; calls == n+1 {
									frozen.store.Freeze()
								}
								return object.FaultNone
							})
							frozen.Epoch = epoch.New(epoch.Options{KV: frozen.kv, Store: store, Cluster: "mine", Now: time.Now, Rand: rand.Reader})
						}
						done := make(chan error, 1)
						go func() { done <- frozen.Beat(t.Context()) }()
						virtual.Wait()
						other := w.replica()
						for range others {
							w.must(other.Beat(t.Context()))
							w.must(other.Check(t.Context()))
						}
						frozen.kv.Thaw()
						frozen.store.Thaw()
						w.must(<-done)
						w.must(other.Check(t.Context()))
						w.must(other.Beat(t.Context()))
						w.must(other.Beat(t.Context()))
						w.settled()
					})
				})
			}
		}
	}
}

func TestManyAtOnce(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	seen := map[int64]bool{}
	var wg sync.WaitGroup
	for i := range 4 {
		r := w.replica()
		wg.Go(func() {
			for range 8 {
				if err := r.Beat(t.Context()); err != nil && !errors.Is(err, epoch.ErrConflict) {
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
					if !errors.Is(err, epoch.ErrConflict) && !errors.Is(err, catalog.ErrConflict) {
						t.Errorf("replica %d: %v", i, err)
					}
					continue
				}
				mu.Lock()
				if seen[got.First] {
					t.Errorf("%v was handed out twice", got)
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
	w.must(w.replica().Beat(t.Context()))
	w.settled()
}

func TestWipedBucket(t *testing.T) {
	w := newWorld(t)
	core, logs := observer.New(zap.WarnLevel)
	r := w.replica(func(o *epoch.Options) { o.Log = zap.New(core) })
	w.must(r.Beat(t.Context()))
	w.must(r.Beat(t.Context()))
	w.must(w.objects.Delete(t.Context(), w.notes()...))
	w.must(r.Check(t.Context()))
	if logs.FilterMessageSnippet("lost").Len() != 1 {
		t.Errorf("no warning: %v", logs.All())
	}
	w.must(r.Beat(t.Context()))
	w.settled()
}

func TestForeign(t *testing.T) {
	for name, plant := range map[string]func(w *world){
		"another cluster's beat, beyond": func(w *world) { w.put(9, 1, 5_000_000, "other") },
		"another cluster's beat, below": func(w *world) {
			w.must(w.objects.Delete(w.t.Context(), w.notes()...))
			w.put(2, 1, 5_000_000, "other")
		},
		"the next beat of another":   func(w *world) { w.put(4, 1, 5_000_000, "mine") },
		"a revision that is to come": func(w *world) { w.put(3, 1000, 5_000_000, "mine") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			r := w.replica()
			for range 3 {
				w.must(r.Beat(t.Context()))
			}
			plant(w)
			wantBehind(t, r.Check(t.Context()))
			wantBehind(t, w.replica().Beat(t.Context()))
			was, next, from, err := r.Recover(t.Context(), false)
			if !was || next != 5_000_000 || from != 1 || err != nil {
				t.Errorf("recover: %v, %d, %d, %v", was, next, from, err)
			}
			w.settled()
		})
	}
	// Whoever beats without having checked finds out.
	w := newWorld(t)
	w.must(w.replica().Beat(t.Context()))
	w.put(2, 1, 5_000_000, "mine")
	wantBehind(t, w.replica().Beat(t.Context()))
	if _, _, behind := w.records(); !behind {
		t.Error("it did not say so")
	}
	w = newWorld(t)
	w.must(w.replica().Beat(t.Context()))
	w.put(9, 1, 5_000_000, "mine")
	wantBehind(t, w.replica().Raise(t.Context(), 3_000_000))
	if _, ids, behind := w.records(); !behind || ids.GetCeiling() >= 3_000_000 {
		t.Errorf("behind %v, ids %v", behind, ids)
	}
}

func TestOtherFiles(t *testing.T) {
	w := newWorld(t)
	r := w.replica()
	w.must(r.Beat(t.Context()))
	for _, name := range []string{"readme.txt", "9.json", "0000000000000000009.json.bak"} {
		_, err := w.objects.Put(t.Context(), epoch.Prefix+name, []byte("?"))
		w.must(err)
	}
	w.must(r.Check(t.Context()))
	w.must(r.Beat(t.Context()))
	_, err := w.objects.Put(t.Context(), noteKey(9), []byte("?"))
	w.must(err)
	for what, err := range map[string]error{"check": r.Check(t.Context()), "beat": r.Beat(t.Context())} {
		if !errors.Is(err, epoch.ErrDamaged) || !strings.Contains(err.Error(), noteKey(9)) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, _, behind := w.records(); behind {
		t.Error("a damaged object is not behind")
	}
}

func TestTimeTravel(t *testing.T) {
	for name, revision := range map[string]int64{"lower revision": 0, "higher revision": 10_000} {
		for since := 1; since < 5; since++ { // beats since the backup
			t.Run(fmt.Sprintf("%s, %d beats", name, since), func(t *testing.T) {
				w := newWorld(t)
				r := w.replica()
				w.must(r.Beat(t.Context()))
				w.allocate(r, 100)
				backup := metatest.Backup(t, w.kv)
				var last int64
				for range since {
					last = w.allocate(r, catalog.MaxAllocate/2).First + catalog.MaxAllocate/2
					w.must(r.Beat(t.Context()))
				}
				_, before, _ := w.records()

				w = w.restored(backup, revision)
				r = w.replica()
				wantBehind(t, r.Check(t.Context()))
				wantBehind(t, r.Check(t.Context()))
				wantBehind(t, r.Beat(t.Context()))
				if n := w.history(); n != 1 {
					t.Errorf("history %d before the recovery", n)
				}
				_, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
				wantBehind(t, err)
				_, err = r.ids.NextID(t.Context())
				wantBehind(t, err)
				wantBehind(t, r.ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 5}))
				behind, err := r.Behind(t.Context())
				w.must(err)
				wantBehind(t, behind)
				if _, ok, err := r.ids.HandedOut(t.Context(), 100); !ok || err != nil {
					t.Errorf("what was handed out is known no more: %v, %v", ok, err)
				}

				was, next, from, err := r.Recover(t.Context(), false)
				if !was || next != before.GetCeiling() || from != 101 || err != nil {
					t.Errorf("recover: %v, %d, %d, %v; want next %d", was, next, from, err, before.GetCeiling())
				}
				if floor, err := r.Floor(t.Context()); floor != next || err != nil {
					t.Errorf("floor %d, %v, want %d", floor, err, next)
				}
				w.settled()
				if got := w.allocate(r, 10); got.First < last {
					t.Errorf("got %v, ids up to %d are in use", got, last-1)
				}
				was, again, _, err := w.replica().Recover(t.Context(), false)
				if was || again <= next || err != nil {
					t.Errorf("recover again: %v, %d, %v", was, again, err)
				}
				if n := w.history(); n != 2 {
					t.Errorf("history %d after one recovery, and one without need", n)
				}
				if floor, _ := r.Floor(t.Context()); floor != next {
					t.Errorf("floor %d, want %d", floor, next)
				}
				w.settled()
				if _, _, _, err := r.Recover(t.Context(), true); err != nil || w.history() != 3 {
					t.Errorf("history %d after a forced recovery, %v", w.history(), err)
				}
			})
		}
	}
}

// An unreadable record is of no history: what is compared with it is not equal.
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

// A replica that runs while its store is replaced knows what it has seen.
func TestReplicaOutlivesItsStore(t *testing.T) {
	w := newWorld(t)
	kv := &switched{KV: w.kv}
	ids := catalog.New(catalog.Options{KV: kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(kv, time.Now, nil), AllowReserve: true})
	allocate := func() error {
		_, err := ids.AllocateIDs(t.Context(), request.Token{}, 10)
		return err
	}
	w.must(allocate())
	backup := metatest.Backup(t, w.kv)
	w.must(allocate())
	w.must(allocate())
	kv.KV = w.restored(backup, 0).kv
	wantBehind(t, allocate())
	if _, ok, err := ids.HandedOut(t.Context(), 15); !ok || err != nil {
		t.Errorf("handed out: %v, %v", ok, err)
	}
}

type switched struct{ meta.KV }

// Whatever happened before a backup and since: a store is behind when there was a
// beat since, fine when it never went back, and after a recovery no id is handed out
// twice.
func TestNoIDReturns(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		w := newWorld(t)
		r := w.replica()
		var backup []meta.KeyValue
		var beatThen int64 // that was done or under way at the backup
		var out []catalog.IDRange
		for range rapid.IntRange(5, 40).Draw(rt, "steps") {
			switch rapid.IntRange(0, 6).Draw(rt, "step") {
			case 0, 1:
				got := w.allocate(r, rapid.SampledFrom([]int64{1, 100, 700_000, catalog.MaxAllocate}).Draw(rt, "count"))
				for _, had := range out {
					if got.First < had.First+had.Count && had.First < got.First+got.Count {
						rt.Fatalf("%v was handed out as %v before", got, had)
					}
				}
				out = append(out, got)
			case 2:
				w.must(r.Beat(t.Context()))
			case 3: // a beat that its process does not end
				r.store.FailNth(object.OpCreate, 0, rapid.SampledFrom([]object.Fault{object.FaultBefore, object.FaultAfter}).Draw(rt, "fault"))
				if err := r.Beat(t.Context()); !errors.Is(err, object.ErrUnavailable) {
					rt.Fatal(err)
				}
				r = w.replica()
			case 4:
				backup = metatest.Backup(t, w.kv)
				e, _, _ := w.records()
				if beatThen = e.GetBeat(); len(e.GetIntent()) > 0 {
					beatThen++
				}
			case 5:
				w.must(r.Check(t.Context()))
			case 6:
				if backup == nil {
					continue
				}
				newest := len(w.notes()) > 0 && w.notes()[len(w.notes())-1] > noteKey(beatThen)
				w = w.restored(backup, rapid.SampledFrom([]int64{0, 10_000}).Draw(rt, "revision"))
				r = w.replica()
				if err := r.Check(t.Context()); newest && !errors.Is(err, epoch.ErrBehind) {
					rt.Fatalf("it went unnoticed: %v", err)
				}
				_, _, _, err := r.Recover(t.Context(), true)
				w.must(err)
			}
		}
	})
}

// leader runs Lead, and says whether its work runs.
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
		w := newWorld(t)
		r, other := w.replica(), w.replica()
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		r.store.Plan(func(object.Call) object.Fault { return object.FaultBefore })
		var l leader
		done := make(chan error, 1)
		go func() { done <- r.Lead(ctx, l.work) }()
		l.want(t, "the object store is silent", false, 0)
		r.store.Plan(nil)
		time.Sleep(time.Minute)
		l.want(t, "it answers", true, 1)
		time.Sleep(10 * time.Minute)
		if e, _, _ := w.records(); e.GetBeat() < 10 || e.GetBeat() > 12 {
			t.Errorf("beat %d after 11 minutes", e.GetBeat())
		}
		r.store.Plan(func(object.Call) object.Fault { return object.FaultBefore })
		time.Sleep(10 * time.Minute)
		l.want(t, "silent later", true, 1)
		r.store.Plan(nil)

		// The leader finds out by itself.
		w.put(1000, 1, 5_000_000, "mine")
		time.Sleep(2 * time.Minute)
		l.want(t, "behind", false, 1)
		time.Sleep(time.Hour)
		l.want(t, "behind for long", false, 1)
		if was, _, _, err := other.Recover(ctx, false); !was || err != nil {
			t.Errorf("recover: %v, %v", was, err)
		}
		time.Sleep(time.Second)
		l.want(t, "recovered", true, 2)

		// Another does.
		w.put(2000, 1, 50_000_000, "mine")
		wantBehind(t, other.Check(ctx))
		time.Sleep(time.Second)
		l.want(t, "behind, by another", false, 2)
		if was, _, _, err := other.Recover(ctx, false); !was || err != nil {
			t.Errorf("recover: %v, %v", was, err)
		}
		time.Sleep(time.Second)
		l.want(t, "recovered again", true, 3)
		cancel()
		w.must(<-done)
		l.want(t, "over", false, 3)
		w.settled()
	})
}

// A leader works although the metadata store is full: it frees space.
func TestLeadOfAFullStore(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		w := newWorld(t)
		w.must(w.replica().Beat(t.Context()))
		w.kv.SetFull(true)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var l leader
		done := make(chan error, 1)
		go func() { done <- w.replica().Lead(ctx, l.work) }()
		time.Sleep(10 * time.Minute)
		l.want(t, "full", true, 1)
		w.kv.SetFull(false)
		time.Sleep(10 * time.Minute)
		l.want(t, "no more", true, 1)
		cancel()
		w.must(<-done)
		w.settled()
	})
}

func TestLeadReturnsWorksError(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		w := newWorld(t)
		failed := errors.New("failed")
		if err := w.replica().Lead(t.Context(), func(context.Context) error { return failed }); !errors.Is(err, failed) {
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

func TestAllocationBetween(t *testing.T) {
	w := newWorld(t)
	other := w.replica()
	w.allocate(other, 10)
	var got catalog.IDRange
	kv := &between{KV: w.kv, key: keys.IDs, do: func() { got = w.allocate(other, 10) }}
	w.must(w.replica(func(o *epoch.Options) { o.KV = kv }).Raise(t.Context(), 5_000_000))
	if again := w.allocate(other, 10); got.Count == 0 || again.First < got.First+got.Count {
		t.Errorf("got %v, then %v", got, again)
	}
	w.settled()
}

// What a slow check has seen does not count when the store has recovered since.
func TestRecoverBetween(t *testing.T) {
	w := newWorld(t)
	other := w.replica()
	w.must(other.Beat(t.Context()))
	w.put(9, 1, 5_000_000, "mine")
	recovered := false
	kv := &between{KV: w.kv, key: keys.Behind, do: func() {
		was, _, _, err := other.Recover(t.Context(), false)
		if recovered = was; err != nil {
			t.Error(err)
		}
	}}
	w.must(w.replica(func(o *epoch.Options) { o.KV = kv }).Check(t.Context()))
	if !recovered {
		t.Error("it was not behind")
	}
	w.settled()
}

// The store is found to be behind while ids are being handed out.
func TestBehindBetween(t *testing.T) {
	w := newWorld(t)
	w.allocate(w.replica(), 10)
	kv := &between{KV: w.kv, key: keys.IDs, do: func() {
		w.put(9, 1, 5_000_000, "mine")
		wantBehind(t, w.replica().Check(t.Context()))
	}}
	ids := catalog.New(catalog.Options{KV: kv, Now: time.Now, Rand: rand.Reader, Requests: request.NewLeases(kv, time.Now, nil), AllowReserve: true})
	_, err := ids.AllocateIDs(t.Context(), request.Token{}, 10)
	wantBehind(t, err)
	kv.do = func() { t.Error("it tried") }
	wantBehind(t, ids.ReserveIDs(t.Context(), request.Token{}, catalog.IDRange{First: 1 << 40, Count: 5}))
	if _, rec, _ := w.records(); rec.GetNext() != 11 {
		t.Errorf("ids %v", rec)
	}
}

// A store that is not known to be behind is left as it is, unless it is forced:
// then what carries one of the ids that are passed over is below the floor.
func TestRecoverOfAStoreThatIsFine(t *testing.T) {
	w := newWorld(t)
	r := w.replica()
	w.must(r.Beat(t.Context()))
	_, _, before, err := w.kv.Get(t.Context(), keys.IDs)
	w.must(err)
	was, next, from, err := r.Recover(t.Context(), false)
	if was || next != from || err != nil {
		t.Errorf("recover: %v, %d, %d, %v", was, next, from, err)
	}
	if _, _, after, _ := w.kv.Get(t.Context(), keys.IDs); after != before || len(w.notes()) != 1 {
		t.Errorf("it has written: revision %d, then %d, notes %v", before, after, w.notes())
	}
	was, next, from, err = r.Recover(t.Context(), true)
	if was || next <= from || err != nil {
		t.Errorf("forced: %v, %d, %d, %v", was, next, from, err)
	}
	if floor, err := r.Floor(t.Context()); floor != next || err != nil {
		t.Errorf("the floor is %d, %v, want %d", floor, err, next)
	}
}

// blind is a store that lists nothing of what it has.
type blind struct{ object.Store }

func (blind) List(context.Context, string) iter.Seq2[object.Info, error] {
	return func(func(object.Info, error) bool) {}
}

// TestBlindList shows that a metadata store which went back in time is noticed
// although the object store lists none of the notes.
func TestBlindList(t *testing.T) {
	for _, since := range []int{1, 2, 5, 17} {
		w := newWorld(t)
		cannotList := func(o *epoch.Options) { o.Store = blind{o.Store} }
		r := w.replica(cannotList)
		w.must(r.Beat(t.Context()))
		w.must(r.Check(t.Context()))
		backup := metatest.Backup(t, w.kv)
		for range since {
			w.allocate(r, catalog.MaxAllocate/2)
			w.must(r.Beat(t.Context()))
			w.must(r.Check(t.Context()))
		}
		_, before, _ := w.records()

		w = w.restored(backup, 0)
		r = w.replica(cannotList)
		wantBehind(t, r.Check(t.Context()))
		_, err := r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
		wantBehind(t, err)
		was, next, _, err := r.Recover(t.Context(), false)
		if !was || next != before.GetCeiling() || err != nil {
			t.Errorf("%d beats: recover: %v, %d, %v; want next %d", since, was, next, err, before.GetCeiling())
		}
		w.must(r.Check(t.Context()))
		w.allocate(r, 10)
	}
}

// TestAlarm shows that an id which comes back stops all allocations until a recovery.
func TestAlarm(t *testing.T) {
	w := newWorld(t)
	r := w.replica()
	w.must(r.Beat(t.Context()))
	err := r.Alarm(t.Context(), "snapshots/1/2/refs.avro")
	wantBehind(t, err)
	if !strings.Contains(err.Error(), "snapshots/1/2/refs.avro") {
		t.Errorf("%v does not name the object", err)
	}
	wantBehind(t, r.Alarm(t.Context(), "another"))
	_, err = r.ids.AllocateIDs(t.Context(), request.Token{}, 1)
	wantBehind(t, err)
	if was, _, _, err := r.Recover(t.Context(), false); !was || err != nil {
		t.Errorf("recover: %v, %v", was, err)
	}
	w.allocate(r, 1)
}
