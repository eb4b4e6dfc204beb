package identity_test

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/memory"
)

func check(t *testing.T, kv meta.KV, s object.Store) error {
	t.Helper()
	return identity.Check(t.Context(), kv, s, "cold", "cluster-1", rand.Reader)
}

// both returns the content of the object and of the key.
func both(t *testing.T, kv meta.KV, s object.Store) (body, id string) {
	t.Helper()
	r, _, err := s.Get(t.Context(), identity.Key, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		t.Fatal(err)
	}
	have, _, _, err := kv.Get(t.Context(), keys.Store("cold"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data), string(have.Value)
}

// A store gets a second alias only after the first one is no longer in use.
func TestTwoAliasesOfOneStore(t *testing.T) {
	named := func(kv meta.KV, s object.Store, alias string, inUse ...string) error {
		return identity.Check(t.Context(), kv, s, alias, "cluster-1", rand.Reader, inUse...)
	}
	kv, s := metamemory.New(metamemory.Options{}), memory.New(memory.Options{})
	inUse := []string{"cold", "warm"}
	for range 2 {
		if err := named(kv, s, "cold", inUse...); err != nil {
			t.Fatal(err)
		}
		if err := named(kv, s, "warm", inUse...); !errors.Is(err, identity.ErrTwice) ||
			!strings.Contains(err.Error(), "cold names the same store") {
			t.Errorf("a second alias: %v", err)
		}
	}
	if err := named(kv, memory.New(memory.Options{}), "warm", inUse...); err != nil {
		t.Errorf("another store: %v", err)
	}
	for _, inUse := range [][]string{{"new"}, {"cold", "new"}} { // a cluster with both recorded continues
		if err := named(kv, s, "new", inUse...); err != nil {
			t.Errorf("a new alias, with %v in use: %v", inUse, err)
		}
	}
	// Both concurrently, in a cluster without either.
	for range 20 {
		kv, s := metamemory.New(metamemory.Options{}), memory.New(memory.Options{})
		errs := make([]error, len(inUse))
		var wg sync.WaitGroup
		for i, alias := range inUse {
			wg.Go(func() { errs[i] = named(kv, s, alias, inUse...) })
		}
		wg.Wait()
		if first, second := errs[0] == nil, errs[1] == nil; first == second ||
			!errors.Is(errors.Join(errs...), identity.ErrTwice) {
			t.Errorf("concurrent: %v", errs)
		}
	}
}

func TestFirstStart(t *testing.T) {
	kv, s := metamemory.New(metamemory.Options{}), memory.New(memory.Options{})
	for range 2 {
		if err := check(t, kv, s); err != nil {
			t.Fatal(err)
		}
	}
	body, id := both(t, kv, s)
	if len(id) != 32 || body != `{"format_version":1,"id":"`+id+`","cluster_id":"cluster-1"}`+"\n" {
		t.Errorf("the object is %q, the key %q", body, id)
	}
	// The same cluster without a record takes the id of the store.
	fresh := metamemory.New(metamemory.Options{})
	if err := check(t, fresh, s); err != nil {
		t.Fatal(err)
	}
	if _, again := both(t, fresh, s); again != id {
		t.Errorf("got %q, want %q", again, id)
	}
}

func TestAnotherStore(t *testing.T) {
	kv, first := metamemory.New(metamemory.Options{}), memory.New(memory.Options{})
	if err := check(t, kv, first); err != nil {
		t.Fatal(err)
	}
	empty, other := memory.New(memory.Options{}), memory.New(memory.Options{})
	if err := check(t, metamemory.New(metamemory.Options{}), other); err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]object.Store{"empty": empty, "other": other} {
		err := check(t, kv, s)
		if !errors.Is(err, identity.ErrOther) {
			t.Fatalf("%s: got %v", name, err)
		}
		for _, want := range []string{
			"object store cold", "wrong directory, bucket or prefix",
			"same store under the same alias",
		} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: no %q in %v", name, want, err)
			}
		}
	}
	// Refused stores are unchanged.
	if _, err := empty.Head(t.Context(), identity.Key); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("the empty store: got %v", err)
	}
}

func TestDamaged(t *testing.T) {
	id := strings.Repeat("0", 32)
	for _, body := range []string{
		"", "{", `{"format_version":2,"id":"` + id + `"}`, `{"format_version":1,"id":""}`,
		`{"format_version":1,"id":"xy"}`,
	} {
		kv, s := metamemory.New(metamemory.Options{}), memory.New(memory.Options{})
		if _, err := s.Put(t.Context(), identity.Key, []byte(body)); err != nil {
			t.Fatal(err)
		}
		if err := check(t, kv, s); err == nil || errors.Is(err, identity.ErrOther) || !strings.Contains(err.Error(), "cold") {
			t.Errorf("%q: got %v", body, err)
		}
		if _, found, _, err := kv.Get(t.Context(), keys.Store("cold")); err != nil || found {
			t.Errorf("%q was recorded: %v", body, err)
		}
	}
}

// meeting is a store whose creates wait for each other, so that all replicas find no object
// before.
type meeting struct {
	object.Store
	all *sync.WaitGroup
}

func (m meeting) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	m.all.Done()
	m.all.Wait()
	return m.Store.Create(ctx, key, body)
}

// TestRace starts replicas concurrently in a new cluster: with one store all start, with two
// stores those of one store start.
func TestRace(t *testing.T) {
	for _, count := range []int{1, 2} {
		kv := metamemory.New(metamemory.Options{})
		var stores []object.Store
		for range count {
			stores = append(stores, memory.New(memory.Options{}))
		}
		const replicas = 4
		var all, ended sync.WaitGroup
		all.Add(replicas)
		errs := make([]error, replicas)
		for i := range replicas {
			ended.Go(func() {
				errs[i] = identity.Check(t.Context(), kv, meeting{stores[i%count], &all}, "cold", "cluster-1", rand.Reader)
			})
		}
		ended.Wait()
		refused := 0
		for i, err := range errs {
			if err != nil {
				refused++
			}
			if err != nil && !errors.Is(err, identity.ErrOther) || (err == nil) != (errs[i%count] == nil) {
				t.Errorf("%d stores: replica %d got %v", count, i, err)
			}
		}
		if want := replicas / 2 * (count - 1); refused != want {
			t.Errorf("%d stores: %d are refused, want %d", count, refused, want)
		}
	}
}

// TestFaults fails each request, before and after it took effect: the check fails, and the
// next one succeeds.
func TestFaults(t *testing.T) {
	for n := range 2 {
		for _, fault := range []meta.Fault{meta.Before, meta.After} {
			kv, s := meta.NewFaulty(metamemory.New(metamemory.Options{})), memory.New(memory.Options{})
			kv.FailNth(n, fault)
			if err := check(t, kv, s); !errors.Is(err, meta.ErrUnavailable) || kv.Fired() != 1 {
				t.Errorf("metadata, call %d: got %v", n, err)
			}
			if err := check(t, kv, s); err != nil {
				t.Errorf("metadata, after call %d: got %v", n, err)
			}
		}
		for _, fault := range []object.Fault{object.FaultBefore, object.FaultAfter} {
			kv, s := metamemory.New(metamemory.Options{}), object.NewFaulty(memory.New(memory.Options{}))
			s.FailNth("", n, fault)
			if err := check(t, kv, s); !errors.Is(err, object.ErrUnavailable) || s.Fired() != 1 {
				t.Errorf("objects, call %d: got %v", n, err)
			}
			if err := check(t, kv, s); err != nil {
				t.Errorf("objects, after call %d: got %v", n, err)
			}
		}
	}
}

// TestAnotherCluster uses one store in two clusters.
func TestAnotherCluster(t *testing.T) {
	s := memory.New(memory.Options{})
	if err := check(t, metamemory.New(metamemory.Options{}), s); err != nil {
		t.Fatal(err)
	}
	err := identity.Check(t.Context(), metamemory.New(metamemory.Options{}), s, "cold", "cluster-2", rand.Reader)
	if !errors.Is(err, identity.ErrOther) || !strings.Contains(err.Error(), "cluster-1") {
		t.Errorf("err = %v, want %v that names cluster-1", err, identity.ErrOther)
	}
}
