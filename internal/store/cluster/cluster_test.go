package cluster_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

func options() cluster.Options {
	return cluster.Options{Now: time.Now, Rand: rand.Reader, Release: "v1"}
}

// One of several concurrent replicas creates the cluster, and all return the same.
func TestOpen(t *testing.T) {
	kv := memory.New(memory.Options{})
	got := make([]cluster.Cluster, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			var err error
			if got[i], err = cluster.Open(t.Context(), kv, options()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, c := range got[1:] {
		if diff := cmp.Diff(got[0], c); diff != "" {
			t.Errorf("two clusters:\n%s", diff)
		}
	}
	if c := got[0]; len(c.ID) != 32 || len(c.TokenKey) != 32 || c.NameScope != cluster.ScopeCluster {
		t.Errorf("%v", c)
	}
	if other, err := cluster.Open(t.Context(), memory.New(memory.Options{}), options()); err != nil ||
		other.ID == got[0].ID || bytes.Equal(other.TokenKey, got[0].TokenKey) {
		t.Errorf("two clusters are equal: %v", err)
	}
}

func TestNameScope(t *testing.T) {
	kv := memory.New(memory.Options{})
	o := options()
	o.NameScope = cluster.ScopeCollection
	for range 2 {
		if c, err := cluster.Open(t.Context(), kv, o); err != nil || c.NameScope != cluster.ScopeCollection {
			t.Errorf("%v, %v", c.NameScope, err)
		}
	}
	if _, err := cluster.Open(t.Context(), kv, options()); !errors.Is(err, cluster.ErrNameScope) {
		t.Errorf("err = %v, want %v", err, cluster.ErrNameScope)
	}
}

// A cluster with a full store can be opened, so that space can be freed.
func TestOpenFull(t *testing.T) {
	kv := memory.New(memory.Options{})
	want, err := cluster.Open(t.Context(), kv, options())
	if err != nil {
		t.Fatal(err)
	}
	kv.SetFull(true)
	got, err := cluster.Open(t.Context(), kv, options())
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
}

func TestOpenFaults(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n := range 2 {
			f := meta.NewFaulty(memory.New(memory.Options{}))
			f.FailNth(n, fault)
			if _, err := cluster.Open(t.Context(), f, options()); !errors.Is(err, meta.ErrUnavailable) || f.Fired() != 1 {
				t.Errorf("call %d: %v", n, err)
			}
			first, err := cluster.Open(t.Context(), f, options())
			if err != nil {
				t.Fatal(err)
			}
			if again, err := cluster.Open(t.Context(), f, options()); err != nil || again.ID != first.ID {
				t.Errorf("call %d: %v", n, err)
			}
		}
	}
	o := options()
	o.Rand = strings.NewReader("short")
	if _, err := cluster.Open(t.Context(), memory.New(memory.Options{}), o); err == nil {
		t.Error("opened without an id")
	}
}

func TestOpenUnreadable(t *testing.T) {
	kv := memory.New(memory.Options{})
	if _, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(keys.Format, []byte{8, 2})}}); err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Open(t.Context(), kv, options()); !errors.Is(err, record.ErrUnreadable) {
		t.Errorf("err = %v, want %v", err, record.ErrUnreadable)
	}
}
