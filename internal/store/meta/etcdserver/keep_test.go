//go:build !short

package etcdserver_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/features"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcdserver"
	"github.com/snapshotd/snapshotd/internal/store/meta/reserve"
)

const mib = 1 << 20

func client(t *testing.T, s *etcdserver.Server) *etcd.Client {
	t.Helper()
	c, err := etcd.Open(etcd.Options{Endpoints: []string{s.Endpoint()}, Root: "/test"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

func check(t *testing.T, s *etcdserver.Server) {
	t.Helper()
	if err := s.Look(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// checkUntilSpaceIsFree runs several checks: the newest revision at one check is compacted at
// the second one after it.
func checkUntilSpaceIsFree(t *testing.T, s *etcdserver.Server) {
	t.Helper()
	for i := 0; i < 4 && (i == 0 || s.Full()); i++ {
		check(t, s)
	}
}

// create puts a new key with a record and a name, like a create.
func create(ctx context.Context, kv meta.KV, n int, size int) error {
	key := fmt.Sprintf("/rec/%d", n)
	_, err := kv.Txn(ctx, meta.Txn{
		If:   []meta.Cond{meta.Absent(key)},
		Then: []meta.Op{meta.Put(key, make([]byte, size)), meta.Put(fmt.Sprintf("/name/%d", n), nil)},
	})
	return err
}

// A full database refuses creates and accepts deletes. After space was freed it accepts
// creates, and its file has shrunk.
func TestFullServerCanBeEmptied(t *testing.T) {
	s := start(t, etcdserver.Config{Dir: shortDir(t), QuotaBytes: 10 * mib, History: 1})
	kv := reserve.New(client(t, s), s.Full)
	ctx := t.Context()
	n := 0
	var err error
	for ; err == nil && n < 30; n++ {
		check(t, s)
		err = create(ctx, kv, n, mib)
	}
	if !errors.Is(err, meta.ErrNoSpace) || n < 8 {
		t.Fatalf("create %d: got error %v, want no space at 10 MiB", n, err)
	}
	if !s.Full() {
		t.Error("Full is false")
	}
	if _, err := kv.Grant(ctx, time.Minute); err != nil {
		t.Errorf("grant: %v", err)
	}
	for i := range n - 1 { // a drop, and then a delete
		rec := fmt.Sprintf("/rec/%d", i)
		if _, err := kv.Txn(ctx, meta.Txn{
			If:   []meta.Cond{meta.Present(rec)},
			Then: []meta.Op{meta.Put(rec, []byte("DELETING")), meta.Delete(fmt.Sprintf("/name/%d", i))},
		}); err != nil {
			t.Fatalf("drop %d: %v", i, err)
		}
		if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Delete(rec)}}); err != nil {
			t.Fatalf("delete %d: %v", i, err)
		}
	}
	checkUntilSpaceIsFree(t, s)
	if size, inUse, quota := s.Sizes(); s.Full() || size > 4*mib || inUse > size || quota != 10*mib {
		t.Errorf("full %v with %d bytes, %d in use, quota %d", s.Full(), size, inUse, quota)
	}
	if err := create(ctx, kv, n, mib); err != nil {
		t.Errorf("create with free space: %v", err)
	}
}

// etcd's own alarm is cleared after space was freed by deletes or by a higher quota.
func TestAlarmIsDisarmed(t *testing.T) {
	c := etcdserver.Config{Dir: shortDir(t), QuotaBytes: 8 * mib, History: 1}
	s := start(t, c)
	kv := client(t, s)
	ctx := t.Context()
	fill := func() {
		t.Helper()
		_, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.DeleteRange("/", "0")}})
		for n := 0; err == nil && n < 100; n++ {
			err = create(ctx, kv, n, mib+mib/4)
		}
		if !errors.Is(err, meta.ErrNoSpace) {
			t.Fatalf("got error %v, want no space", err)
		}
	}
	fill()
	check(t, s)
	if _, err := kv.Grant(ctx, time.Minute); !errors.Is(err, meta.ErrNoSpace) {
		t.Fatalf("grant: got error %v, want no space", err)
	}
	if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.DeleteRange("/rec/", "/rec0")}}); err != nil {
		t.Fatal(err)
	}
	checkUntilSpaceIsFree(t, s)
	if _, err := kv.Grant(ctx, time.Minute); err != nil || s.Full() {
		t.Errorf("grant with free space: %v, full %v", err, s.Full())
	}
	fill()
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	c.QuotaBytes = 100 * mib
	s = start(t, c)
	checkUntilSpaceIsFree(t, s)
	if _, err := client(t, s).Grant(ctx, time.Minute); err != nil || s.Full() {
		t.Errorf("grant with a larger quota: %v, full %v", err, s.Full())
	}
}

// The elapsed time of a lease survives restarts.
func TestLeasesAreCheckpointed(t *testing.T) {
	on := map[string]bool{}
	start(t, etcdserver.Config{Dir: shortDir(t), Tune: func(c *embed.Config) {
		on["made"] = c.ServerFeatureGate.Enabled(features.LeaseCheckpoint)
		on["kept"] = c.ServerFeatureGate.Enabled(features.LeaseCheckpointPersist)
	}})
	if !on["made"] || !on["kept"] {
		t.Errorf("checkpoints of leases: %v", on)
	}
}
