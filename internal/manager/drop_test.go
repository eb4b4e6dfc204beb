package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func TestDropDistinguishesAbsentFromUnreadable(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		settle() // so that the fault hits the drop
		// A store that does not answer must not count as an absent snapshot.
		r.kv.FailNth(0, meta.Before, meta.MethodGet)
		_, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, meta.ErrUnavailable)
		r.kv.Hook(nil)
		for _, ref := range []Ref{{Name: "unknown"}, {ID: s.ID + 1}, {ID: 1 << 50}} {
			if id, err := r.Drop(t.Context(), request.Token{}, ref, 0); id != 0 || err != nil {
				t.Errorf("drop of %v: %d, %v", ref, id, err)
			}
		}
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, s.ID+1)
		wantError(t, err, ErrSnapshotMismatch)
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "a b"}, 0)
		wantError(t, err, catalog.ErrInvalid)
		for range 2 {
			if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, s.ID); err != nil {
				t.Error(err)
			}
		}
		settle()
		_, err = r.Get(t.Context(), Ref{ID: s.ID})
		wantError(t, err, snapshot.ErrExpiredOrDropped)
		_, err = r.Get(t.Context(), Ref{ID: 1 << 50})
		wantError(t, err, snapshot.ErrNeverExisted)
		_, err = r.Get(t.Context(), Ref{Name: "x"})
		wantError(t, err, ErrSnapshotNotFound)
		e.check(r)
		if left := e.objectsUnder("snapshots/"); len(left) != 0 {
			t.Errorf("left %v", left)
		}
	})
}

func TestDropOfPendingIsRefused(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		r.store.Freeze()
		sp := spec(col, "x")
		sp.NoWait = true
		s, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil || s.State != snapshot.Pending {
			t.Fatalf("%v, err = %v", s, err)
		}
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, ErrSnapshotPending)
		if !strings.Contains(errText(err), "x") {
			t.Errorf("%v does not name the create", err)
		}
		_, err = r.Describe(t.Context(), Ref{Name: "x"})
		wantError(t, err, snapshot.ErrNotCommitted)
		if list, _, err := r.List(t.Context(), Filter{}, Place{}, 10); err != nil || len(list) != 0 {
			t.Errorf("a PENDING snapshot is listed: %v, err = %v", list, err)
		}
		r.store.Thaw()
		settle()
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Error(err)
		}
		settle()
		e.check(r)
	})
}

func TestDropOfPinnedIsRefused(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		e.put(keys.PinPrefix(s.ID)+"restore-7", []byte{1})
		_, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, ErrSnapshotPinned)
		if !strings.Contains(errText(err), "restore-7") {
			t.Errorf("%v does not name the pin", err)
		}
		// A pin made between the read and the transaction protects the snapshot.
		if _, err := e.kv.Txn(t.Context(),
			meta.Txn{Then: []meta.Op{meta.Delete(keys.PinPrefix(s.ID) + "restore-7")}}); err != nil {
			t.Fatal(err)
		}
		settle() // so that the leader's first writes do not count as the drop's
		pinned := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn && !pinned {
				pinned = true
				e.put(keys.PinPrefix(s.ID)+"late", []byte{1})
			}
			return meta.NoFault
		})
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, ErrSnapshotPinned)
	})
}

// TestDropPrefixEndsInSlash drops a snapshot whose id is a prefix of another's.
func TestDropPrefixEndsInSlash(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		neighbour := fmt.Sprintf("snapshots/%d/%d6/metadata.json", col.ID, s.ID)
		if _, err := e.objects.Put(t.Context(), neighbour, []byte("keep")); err != nil {
			t.Fatal(err)
		}
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		if left := e.objectsUnder("snapshots/"); !slices.Equal(left, []string{neighbour}) {
			t.Errorf("left %v, want %s alone", left, neighbour)
		}
	})
}

func TestRecordIsDeletedLast(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		e.create(r, col, "x") // the name is free at once
		got, err := r.Get(t.Context(), Ref{ID: s.ID})
		if err != nil || got.State != snapshot.Deleting {
			t.Errorf("the record went before the objects: %v, err = %v", got, err)
		}
		if len(e.objectsUnder(manifest.Dir(col.ID, s.ID))) == 0 {
			t.Fatal("the objects were deleted: the fault did not fire")
		}
		r.store.Plan(nil)
		time.Sleep(2 * time.Minute)
		settle()
		if n := len(e.check(r)); n != 1 {
			t.Errorf("%d snapshots, want 1", n)
		}
	})
}

// TestEachStateIsCleanedOnItsOwn checks that a failure with one snapshot does not stop
// the cleaning of the others.
func TestEachStateIsCleanedOnItsOwn(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		var all []*snapshot.Record
		for i := range 3 {
			all = append(all, e.create(r, col, fmt.Sprintf("s%d", i)))
		}
		stuck := manifest.Dir(col.ID, all[1].ID)
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpList && slices.Contains(c.Keys, stuck) {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		for _, s := range all {
			if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
				t.Fatal(err)
			}
		}
		settle()
		if left := e.keysUnder(keys.SnapshotPrefix); !slices.Equal(left, []string{keys.Snapshot(all[1].ID)}) {
			t.Errorf("left %v", left)
		}
		r.store.Plan(nil)
		time.Sleep(2 * time.Minute)
		settle()
		e.check(r)
	})
}

// TestDropSurvivesEachFailedCall fails every call of a drop and of the cleaning after
// it, before and after its effect.
func TestDropSurvivesEachFailedCall(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n := 0; ; n++ {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				r, other := e.start("a"), e.start("b")
				col, _, _ := e.collection(other, "c")
				s := e.create(other, col, "x")
				settle()
				tok := request.Token{Principal: "local", Method: "DropSnapshot", Value: "t", Hash: []byte{1}}
				r.kv.FailNth(n, fault, meta.MethodGet, meta.MethodRange, meta.MethodTxn, meta.MethodGrant)
				id, err := r.Drop(t.Context(), tok, Ref{Name: "x"}, 0)
				settle()
				fired = r.kv.Fired() > 0
				r.kv.Hook(nil)
				if err != nil {
					wantError(t, err, meta.ErrUnavailable)
					id, err = other.Drop(t.Context(), tok, Ref{Name: "x"}, 0)
				}
				if err != nil || id != s.ID {
					t.Errorf("call %d: the drop ended with %d, %v", n, id, err)
				}
				time.Sleep(5 * time.Minute)
				settle()
				if left := e.check(other); len(left) != 0 {
					t.Errorf("call %d: left %v", n, left)
				}
			})
			if !fired {
				if n < 5 {
					t.Errorf("a drop makes only %d calls", n)
				}
				break
			}
		}
	}
}

// TestThreeReplicas elects, stops, freezes and deposes leaders while snapshots are
// created and dropped.
func TestThreeReplicas(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		replicas := map[string]*testReplica{}
		for _, name := range []string{"a", "b", "c"} {
			replicas[name] = e.start(name)
		}
		leader := func() *testReplica {
			t.Helper()
			settle()
			var leading []string
			for name, r := range replicas {
				if r.Leading() {
					leading = append(leading, name)
				}
			}
			name, err := election.Leader(t.Context(), e.kv, keys.Leader)
			if err != nil || len(leading) != 1 || leading[0] != name {
				t.Fatalf("leading are %v, the key says %q, err = %v", leading, name, err)
			}
			return replicas[name]
		}
		first := leader()
		col, _, _ := e.collection(first, "c")

		// The leader freezes during a removal: it has listed the objects of
		// a dropped snapshot and would next delete the record.
		s := e.create(first, col, "x")
		first.store.Freeze()
		if _, err := first.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		first.kv.Freeze()
		time.Sleep(time.Minute)
		settle()
		if left := e.keysUnder(keys.SnapshotPrefix); len(left) != 0 {
			t.Errorf("the next leader did not clean: %v", left)
		}
		_, _, before, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		first.store.Thaw() // its late deletes are harmless
		first.kv.Thaw()
		second := leader()
		if second == first {
			t.Fatal("a frozen leader still leads")
		}
		for _, kv := range e.written(before) {
			if strings.HasPrefix(kv, "/snapshot/") {
				t.Errorf("the leader that was deposed wrote %s", kv)
			}
		}
		// A leader that stops releases its leadership at once.
		stopped := time.Now()
		second.stop()
		for name, r := range replicas {
			if r == second {
				delete(replicas, name)
			}
		}
		third := leader()
		if waited := time.Since(stopped); waited > 2*time.Second {
			t.Errorf("the change of leaders took %v", waited)
		}
		if third == second {
			t.Error("a stopped replica leads")
		}
		snap := e.create(third, col, "y")
		if _, err := third.Drop(t.Context(), request.Token{}, Ref{ID: snap.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		e.check(third)
	})
}

// written returns the existing keys that were written after a revision.
func (e *env) written(after int64) []string {
	e.t.Helper()
	res, err := e.kv.Range(e.t.Context(), meta.Range{From: "/", To: "0"})
	if err != nil {
		e.t.Fatal(err)
	}
	var list []string
	for _, kv := range res.KVs {
		if kv.ModRevision > after {
			list = append(list, kv.Key)
		}
	}
	return list
}

func TestExpiry(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		sp := spec(col, "short")
		sp.TTL = time.Hour
		if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
			t.Fatal(err)
		}
		sp = spec(col, "pinned")
		sp.ExpireTime = time.Now().Add(30 * time.Minute)
		pinned, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		e.put(keys.PinPrefix(pinned.ID)+"p", []byte{1})
		e.create(r, col, "forever")
		time.Sleep(59 * time.Minute)
		settle()
		if n := len(e.check(r)); n != 3 {
			t.Errorf("%d snapshots before the hour, want 3", n)
		}
		time.Sleep(2 * time.Minute)
		settle()
		var names []string
		for _, s := range e.check(r) {
			names = append(names, s.Name)
		}
		if slices.Sort(names); !slices.Equal(names, []string{"forever", "pinned"}) {
			t.Errorf("after the hour there are %v", names)
		}
	})
}

// skewed is a store with a wrong clock.
type skewed struct {
	object.Store
	by time.Duration
}

func (s skewed) Now(ctx context.Context) (time.Time, error) {
	now, err := s.Store.Now(ctx)
	return now.Add(s.by), err
}

// TestExpiryWithDisagreeingClocks checks that a snapshot expires no earlier than its
// ttl and at most two minutes later, whichever of two clocks is wrong.
func TestExpiryWithDisagreeingClocks(t *testing.T) {
	for _, tc := range []struct {
		by      time.Duration
		expires bool
	}{{-time.Minute, false}, {-10 * time.Minute, true}, {10 * time.Minute, true}, {time.Minute, false}} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", func(o *testOptions) {
				o.Stores = map[string]object.Store{"default": skewed{o.Stores["default"], tc.by}}
			})
			col, _, _ := e.collection(r, "c")
			sp := spec(col, "short")
			sp.TTL = time.Hour
			if _, err := r.Create(t.Context(), request.Token{}, sp); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Hour + 30*time.Second)
			settle()
			list, _, err := r.List(t.Context(), Filter{}, Place{}, 10)
			if err != nil || (len(list) == 0) != tc.expires {
				t.Errorf("store's clock off by %v: left %v, err = %v", tc.by, list, err)
			}
			if skew := r.Stats().ClockSkew; skew != -tc.by {
				t.Errorf("skew %v, want %v", skew, -tc.by)
			}
			time.Sleep(2 * time.Minute)
			settle()
			if list, _, err := r.List(t.Context(), Filter{}, Place{}, 10); err != nil || len(list) != 0 {
				t.Errorf("store's clock off by %v: left after two more minutes %v, err = %v", tc.by, list, err)
			}
		})
	}
}

func TestUpdate(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		first, second := e.create(r, col, "first"), e.create(r, col, "second")
		text, labels, never := "new", map[string]string{"a": "b"}, time.Time{}
		tok := request.Token{Principal: "local", Method: "UpdateSnapshot", Value: "t", Hash: []byte{1}}
		got, err := r.Update(t.Context(), tok, Ref{Name: "first"},
			UpdateSpec{Description: &text, Labels: &labels, ExpireTime: &never, Revision: first.Revision})
		if err != nil || got.Description != "new" || got.Labels["a"] != "b" || got.Revision == first.Revision {
			t.Fatalf("%+v, err = %v", got, err)
		}
		again, err := r.Update(t.Context(), tok, Ref{Name: "first"}, UpdateSpec{Description: &text, Revision: first.Revision})
		if err != nil || again.Revision != got.Revision {
			t.Errorf("repeat: %+v, err = %v", again, err)
		}
		_, err = r.Update(t.Context(), request.Token{}, Ref{Name: "first"},
			UpdateSpec{Description: &text, Revision: first.Revision})
		wantError(t, err, ErrRevisionChanged)
		// An update does not change the position in the list.
		list, _, err := r.List(t.Context(), Filter{}, Place{}, 10)
		if err != nil || len(list) != 2 || list[0].ID != second.ID || list[1].Order != first.Order {
			t.Errorf("list after the update: %v, err = %v", list, err)
		}
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "second"}, 0); err != nil {
			t.Fatal(err)
		}
		_, err = r.Update(t.Context(), request.Token{}, Ref{ID: second.ID}, UpdateSpec{Description: &text})
		if !errors.Is(err, snapshot.ErrNotCommitted) && !errors.Is(err, snapshot.ErrExpiredOrDropped) {
			t.Errorf("update of a dropped snapshot: %v", err)
		}
	})
}

// TestNameIsResolvedOnce moves the name of a snapshot to another one during a drop or
// an update.
func TestNameIsResolvedOnce(t *testing.T) {
	for name, call := range map[string]func(r *testReplica, ctx context.Context) error{
		"drop": func(r *testReplica, ctx context.Context) error {
			_, err := r.Drop(ctx, request.Token{}, Ref{Name: "x"}, 0)
			return err
		},
		"update": func(r *testReplica, ctx context.Context) error {
			text := "meant for the first"
			_, err := r.Update(ctx, request.Token{}, Ref{Name: "x"}, UpdateSpec{Description: &text})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r, other := e.start("a"), e.start("b")
				col, _, _ := e.collection(other, "c")
				e.create(other, col, "x")
				settle()
				var second *snapshot.Record
				var once sync.Once
				r.kv.Hook(func(c meta.Call) meta.Fault {
					if c.Method == meta.MethodTxn {
						once.Do(func() {
							if _, err := other.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
								t.Error(err)
							}
							second = e.create(other, col, "x")
						})
					}
					return meta.NoFault
				})
				err := call(r, t.Context())
				if name == "update" && !errors.Is(err, snapshot.ErrNotCommitted) &&
					!errors.Is(err, snapshot.ErrExpiredOrDropped) || name == "drop" && err != nil {
					t.Errorf("ended with %v", err)
				}
				settle()
				got, err := other.Get(t.Context(), Ref{Name: "x"})
				if err != nil || got.ID != second.ID || got.State != snapshot.Committed || got.Description != "" {
					t.Errorf("the second one is %+v, err = %v", got, err)
				}
			})
		})
	}
}
