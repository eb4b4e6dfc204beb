//go:build !short

package etcd_test

import (
	"context"
	crand "crypto/rand"
	"errors"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

func TestEtcdEarlyProgress(t *testing.T) {
	p := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	kv := open(t, etcd.Options{Endpoints: []string{p.Endpoint()}, Root: "/" + crand.Text()})
	metatest.Overtaken(t, kv, func(on bool) {
		every := 0
		if on {
			every = 1
		}
		p.Overtake(every, 0)
	})
}

// A stream that breaks between an early progress report and its event does not lose the
// event.
func TestEtcdEarlyProgressAndBreak(t *testing.T) {
	p := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	kv := open(t, etcd.Options{Endpoints: []string{p.Endpoint()}, Root: "/" + crand.Text()})
	first := put(t, kv, "/w/a")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	w := kv.Watch(ctx, "/w/", "/w0", first-1)
	if b, err := w.Next(); err != nil || len(b.Events) != 1 {
		t.Fatalf("got %v, error %v", b, err)
	}
	p.Overtake(1, 1)
	put(t, kv, "/w/b")
	var err error
	for err == nil {
		var b meta.WatchBatch
		if b, err = w.Next(); len(b.Events) > 0 {
			t.Errorf("got %v after the report up to %d", b.Events, b.Revision)
		}
	}
	if _, cuts := p.Overtaken(); !errors.Is(err, meta.ErrWatchBroken) || cuts != 1 {
		t.Errorf("got error %v after %d cuts, want a broken watch after one", err, cuts)
	}
}

// A watch whose stream breaks after a progress report continues after its last event. If that
// revision is compacted, the watch cannot exclude missed events.
func TestEtcdBrokenAfterProgress(t *testing.T) {
	srv := etcdtest.Start(t)
	p := etcdproxy.Start(t, srv.Endpoint())
	kv := open(t, etcd.Options{Endpoints: []string{p.Endpoint()}, Root: "/quiet"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for _, compacts := range []bool{false, true} {
		first := put(t, kv, "/w/a")
		w := kv.Watch(ctx, "/w/", "/w0", first-1)
		b, err := w.Next()
		if err != nil {
			t.Fatal(err)
		}
		put(t, kv, "/elsewhere")
		target := put(t, kv, "/elsewhere")
		asking, done := context.WithCancel(ctx)
		asked := make(chan struct{})
		go func() {
			defer close(asked)
			for backoff := (meta.Backoff{Max: 20 * time.Millisecond}); backoff.Wait(asking) == nil; {
				_ = w.Progress(asking)
			}
		}()
		for b.Revision < target {
			if b, err = w.Next(); err != nil || len(b.Events) > 0 {
				t.Fatalf("got %v, error %v; want progress", b, err)
			}
		}
		done()
		<-asked
		p.Stop()
		if compacts {
			if err := srv.KVAt(t, "/quiet").Compact(ctx, target); err != nil {
				t.Fatal(err)
			}
		}
		p.Restart(t)
		if compacts {
			if _, err := w.Next(); !errors.Is(err, meta.ErrCompacted) {
				t.Errorf("got error %v, want compacted", err)
			}
			return
		}
		last := retry(t, kv, "/w/b")
		for b.Revision < last {
			if b, err = w.Next(); err != nil {
				t.Fatal(err)
			}
			for _, ev := range b.Events {
				if ev.KV.Key != "/w/b" {
					t.Errorf("the watch repeated %v", ev)
				}
			}
		}
	}
}

func put(t *testing.T, kv meta.KV, key string) int64 {
	t.Helper()
	res, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, nil)}})
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

// retry puts until a restarted server accepts it.
func retry(t *testing.T, kv meta.KV, key string) int64 {
	t.Helper()
	for {
		res, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(key, nil)}})
		if err == nil {
			return res.Revision
		}
		if !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
}
