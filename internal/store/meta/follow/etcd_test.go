//go:build !short

package follow_test

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

func TestEtcdSyncIsLinearizable(t *testing.T) {
	kv := etcdtest.Shared(t).KV(t)
	f, c, _ := start(t, kv)
	linearizable(t, kv, f, c)
}

// The follower is disconnected while etcd compacts unseen revisions; the follower restarts.
func TestEtcdCompactedWhileAway(t *testing.T) {
	srv := etcdtest.Start(t)
	const root = "/follow"
	kv := srv.KVAt(t, root)
	put(t, kv, meta.Put("/f/a", []byte("1")), meta.Put("/f/gone", nil))
	faulty := meta.NewFaulty(kv)
	f, c, _ := start(t, faulty)
	sync1(t, f, 0)

	// The events until then are lost, and the watch is not reopened in time.
	faulty.Freeze()
	faulty.FailNth(0, meta.Before, meta.MethodNext)
	put(t, kv, meta.Delete("/f/gone"))
	rev := put(t, kv, meta.Put("/f/a", []byte("2")))
	if err := kv.Compact(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	faulty.Thaw()
	sync1(t, f, rev)
	c.same(kv)
}

// etcd stops and returns, with changes and a compaction by others before the follower
// reconnects.
func TestEtcdLost(t *testing.T) {
	srv := etcdtest.Start(t)
	kv := srv.KVAt(t, "/follow")
	rev := put(t, kv, meta.Put("/f/a", []byte("1")), meta.Put("/f/gone", nil))
	f, c, _ := start(t, kv)
	sync1(t, f, rev)
	srv.Stop(t)
	short, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := f.Sync(short); err == nil {
		t.Error("sync without a store: got no error")
	}
	srv.Restart(t)
	// A separate client, which need not reconnect first.
	other := srv.KVAt(t, "/follow")
	rev = retry(t, other, meta.Delete("/f/gone"), meta.Put("/f/a", []byte("2")))
	rev = max(rev, retry(t, other, meta.Put("/f/b", nil)))
	if err := other.Compact(t.Context(), rev); err != nil {
		t.Fatal(err)
	}
	for {
		got, err := f.Sync(t.Context())
		if err == nil {
			if got < rev {
				t.Errorf("synced to %d, want %d or more", got, rev)
			}
			break
		}
		if !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	c.same(other)
}

// retry puts until a restarted server accepts it.
func retry(t *testing.T, kv *etcd.Client, ops ...meta.Op) int64 {
	t.Helper()
	for {
		res, err := kv.Txn(t.Context(), meta.Txn{Then: ops})
		if err == nil {
			return res.Revision
		}
		if !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
}

// Progress reports precede their events, and some streams break in between: the follower
// restarts, and misses nothing afterwards.
func TestEtcdEarlyProgress(t *testing.T) {
	p := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	root := "/" + rand.Text()
	kv, err := etcd.Open(etcd.Options{Endpoints: []string{p.Endpoint()}, Root: root})
	if err != nil {
		t.Fatal(err)
	}
	f, c, stop := start(t, kv)
	t.Cleanup(func() {
		stop()
		if err := kv.Close(); err != nil {
			t.Error(err)
		}
	})
	writer := etcdtest.Shared(t).KVAt(t, root)
	sync1(t, f, 0)
	p.Overtake(2, 3)
	var last int64
	for i := range 30 {
		last = put(t, writer, meta.Put(fmt.Sprintf("/f/%d", i), nil))
		sync1(t, f, last)
	}
	p.Overtake(0, 0)
	if _, cuts := p.Overtaken(); cuts != 3 {
		t.Errorf("%d streams were cut, want 3", cuts)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for { // until the last late event is received
		sync1(t, f, last)
		n := 0
		for i := range 30 {
			if _, found := c.read(fmt.Sprintf("/f/%d", i)); found {
				n++
			}
		}
		if n == 30 {
			break
		}
		if err := ctx.Err(); err != nil {
			t.Fatalf("the copy has %d keys of 30: %v", n, err)
		}
	}
	sync1(t, f, 0)
	c.same(writer)
}
