package manager

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// withEpoch configures rollback detection as the program does.
func withEpoch(o *testOptions) {
	o.Epoch = epoch.New(epoch.Options{
		KV: o.KV, Store: o.Stores[o.SnapshotStore], Cluster: o.Cluster.ID, Now: o.Now, Rand: rand.Reader,
		Log: o.Log.Named("epoch"),
	})
	o.Catalog = catalog.New(catalog.Options{
		KV: o.KV, Now: o.Now, Rand: rand.Reader, Requests: o.Requests,
		HasStore: func(a string) bool { return a == "default" }, RaiseIDs: o.Epoch.RaiseIDLimit,
	})
}

// goBack replaces the metadata store by one restored from a backup.
func (e *env) goBack(backup []meta.KeyValue, revision int64) {
	e.t.Helper()
	kv := metamemory.New(metamemory.Options{Now: e.now})
	metatest.Restore(e.t, kv, backup, revision)
	e.kv, e.memory = kv, kv
}

// TestLeaderAfterMetadataRollback checks that after a metadata rollback no id is
// allocated, no unit is granted and the leader does no work until Recover.
func TestLeaderAfterMetadataRollback(t *testing.T) {
	for name, revision := range map[string]int64{"lower revision": 0, "higher revision": 10_000} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				ctx := t.Context()
				r := e.start("before", withEpoch)
				col, _, _ := e.collection(r, "c")
				one, two := e.segment(r, col, 0, 10, 19), e.segment(r, col, 0, 20, 29)
				e.addWritten(r, col, one, two)
				e.checkpoint(r, col, 100, 100)
				asks := e.dropSegments(r, col, two.ID) // no snapshot holds it
				expiring := spec(col, "expiring")
				expiring.TTL = time.Hour
				s, err := r.Create(ctx, request.Token{}, expiring)
				if err != nil {
					t.Fatal(err)
				}
				settle()
				backup := metatest.Backup(t, e.kv)
				// The store continues and is lost, with all writes since the backup.
				time.Sleep(2 * time.Minute)
				late := e.create(r, col, "late")
				last, err := r.catalog.AllocateIDs(ctx, request.Token{}, 1000)
				if err != nil {
					t.Fatal(err)
				}
				r.stop()

				e.goBack(backup, revision)
				r = e.start("after", withEpoch)
				time.Sleep(2 * time.Hour)
				settle()
				if got, err := r.Get(ctx, Ref{ID: s.ID}); err != nil || got.State != snapshot.Committed {
					t.Errorf("the leader expired what may have been renewed: %v, %v", got, err)
				}
				if !r.Leading() {
					t.Error("no replica leads")
				}
				if why, err := r.Collector.RolledBack(ctx); err != nil || !strings.Contains(why, "snapshotctl recover") {
					t.Errorf("behind: %q, %v", why, err)
				}
				if _, err := r.catalog.AllocateIDs(ctx, request.Token{}, 1); !errors.Is(err, epoch.ErrRolledBack) {
					t.Errorf("allocate: %v", err)
				}
				if _, err := r.Create(ctx, request.Token{}, spec(col, "new")); !errors.Is(err, epoch.ErrRolledBack) {
					t.Errorf("create: %v", err)
				}
				ref := catalog.Ref{ID: col.ID}
				if _, err := r.GC.Reclaim(ctx, ref, asks, gc.BySnapshotd, "tester"); !errors.Is(err, epoch.ErrRolledBack) {
					t.Errorf("reclaim: %v", err)
				}
				if a, err := r.GC.Check(ctx, ref, asks); err != nil || a[0].State != gc.Dropped || a[0].Holders != 0 {
					t.Errorf("check: %v, %v", a, err)
				}
				settle()
				if n := len(e.objectsUnder("snapshots/")); n == 0 {
					t.Error("objects of a snapshot are deleted")
				}

				was, next, _, err := r.Recover(ctx, false)
				if err != nil || !was || next < last.First+last.Count || next <= late.ID {
					t.Errorf("recover: %v, %d, %v; ids up to %d were allocated", was, next, err, last.First+last.Count-1)
				}
				time.Sleep(2 * time.Minute)
				settle()
				if why, err := r.Collector.RolledBack(ctx); why != "" || err != nil {
					t.Errorf("behind: %q, %v", why, err)
				}
				if _, err := r.Get(ctx, Ref{ID: s.ID}); !errors.Is(err, snapshot.ErrExpiredOrDropped) {
					t.Errorf("the leader does not go on: %v", err)
				}
				e.granted(e.reclaim(r, col, gc.BySnapshotd, asks...))
				if id := e.newID(r); id < next {
					t.Errorf("id %d, want %d or more", id, next)
				}
				e.create(r, col, "new")
			})
		})
	}
}

// TestLeaderStopsOnRollback checks that a working leader stops when a rollback is
// detected.
func TestLeaderStopsOnRollback(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		ctx := t.Context()
		r := e.start("a", withEpoch)
		col, _, _ := e.collection(r, "c")
		e.addWritten(r, col, e.segment(r, col, 0, 10, 19))
		e.checkpoint(r, col, 100, 100)
		short := spec(col, "short")
		short.TTL = time.Hour
		s, err := r.Create(ctx, request.Token{}, short)
		if err != nil {
			t.Fatal(err)
		}
		settle()
		e.plantBeat(ctx, r, 1000, 9_000_000)
		time.Sleep(2 * time.Hour)
		settle()
		if got, err := r.Get(ctx, Ref{ID: s.ID}); err != nil || got.State != snapshot.Committed {
			t.Errorf("the leader went on: %v, %v", got, err)
		}
		if _, _, _, err := r.Recover(ctx, false); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Minute)
		settle()
		if _, err := r.Get(ctx, Ref{ID: s.ID}); !errors.Is(err, snapshot.ErrExpiredOrDropped) {
			t.Errorf("the leader does not go on: %v", err)
		}
	})
}

// grantHook calls do once, before the first transaction that puts a tombstone.
type grantHook struct {
	meta.KV
	do func()
}

func (h *grantHook) Txn(ctx context.Context, txn meta.Txn) (meta.TxnResult, error) {
	for _, op := range txn.Then {
		if do := h.do; op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.AllTombstonesPrefix) && do != nil {
			h.do = nil
			do()
		}
	}
	return h.KV.Txn(ctx, txn)
}

// TestGrantComparesRollback detects a rollback between the read of the references and
// the grant.
func TestGrantComparesRollback(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		ctx := t.Context()
		hook := &grantHook{}
		r := e.start("a", func(o *testOptions) { hook.KV, o.KV = o.KV, hook }, withEpoch)
		col, _, _ := e.collection(r, "c")
		one := e.segment(r, col, 0, 10, 19)
		e.addWritten(r, col, one)
		asks := e.dropSegments(r, col, one.ID)
		settle()
		found := false
		hook.do = func() {
			found = true
			e.plantBeat(ctx, r, 1000, 9_000_000)
			wantError(t, r.o.Epoch.Check(ctx), epoch.ErrRolledBack)
		}
		_, err := r.GC.Reclaim(ctx, catalog.Ref{ID: col.ID}, asks, gc.BySnapshotd, "tester")
		if wantError(t, err, epoch.ErrRolledBack); !found {
			t.Error("there was no grant")
		}
		if tombs := e.keysUnder(keys.AllTombstonesPrefix); len(tombs) > 0 {
			t.Errorf("granted: %v", tombs)
		}
	})
}

// plantBeat writes a heartbeat of a metadata store that is ahead.
func (e *env) plantBeat(ctx context.Context, r *testReplica, beat, ceiling int64) {
	e.t.Helper()
	note := fmt.Sprintf(`{"format_version":1,"cluster_id":%q,"beat":"%d","nonce":"x","revision":"1",`+
		`"ceiling":"%d","time":"2026-01-02T03:04:05Z"}`,
		r.o.Cluster.ID, beat, ceiling)
	note = fmt.Sprintf(`%s,"sha256":"%x"}`, strings.TrimSuffix(note, "}"), sha256.Sum256([]byte(note)))
	if _, err := e.objects.Put(ctx, epoch.Prefix+keys.ID(beat)+".json", []byte(note)); err != nil {
		e.t.Fatal(err)
	}
}
