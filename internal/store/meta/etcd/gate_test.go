//go:build !short

package etcd_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// debian is the version of the etcd of Debian 12.
const debian = "3.4.23"

func get(ctx context.Context, kv meta.KV) error {
	_, _, _, err := kv.Get(ctx, "/a")
	return err
}

// An old server is refused, and receives only the version request, for any call.
func TestOldEtcdIsRefused(t *testing.T) {
	p := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	p.Version(debian)
	kv := open(t, etcd.Options{Endpoints: []string{p.Endpoint()}, Root: "/old"})
	err := kv.Check(t.Context())
	for _, want := range []string{debian, p.Endpoint(), etcd.MinimumVersions()} {
		if !errors.Is(err, meta.ErrTooOld) || !strings.Contains(err.Error(), want) {
			t.Errorf("check: got error %v, want one that names %s", err, want)
		}
	}
	if kv.TooOld() == "" {
		t.Error("TooOld does not list it")
	}
	ctx := t.Context()
	for name, call := range map[string]func() error{
		"get":       func() error { return get(ctx, kv) },
		"scan":      func() error { _, err := kv.Scan(ctx, "/a", "/b", 0, nil); return err },
		"scan at":   func() error { _, err := kv.Scan(ctx, "/a", "/b", 2, nil); return err },
		"txn":       func() error { _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); return err },
		"grant":     func() error { _, err := kv.Grant(ctx, time.Minute); return err },
		"keepalive": func() error { return kv.KeepAlive(ctx, 1) },
		"revoke":    func() error { return kv.Revoke(ctx, 1) },
		"compact":   func() error { return kv.Compact(ctx, 1) },
	} {
		if err := call(); !errors.Is(err, meta.ErrTooOld) || errors.Is(err, meta.ErrUnavailable) {
			t.Errorf("%s: got error %v, want too old", name, err)
		}
	}
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := kv.Watch(short, "/a", "/b", 0).Next(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("watch: got error %v", err)
	}
	if n := p.Used(); n != 0 {
		t.Errorf("%d calls reached the old server", n)
	}
}

// Only endpoints with a supported version are used. A server without a known version is not
// used, and its version request is repeated.
func TestUnknownEtcdIsNotUsed(t *testing.T) {
	srv := etcdtest.Shared(t)
	good, silent := etcdproxy.Start(t, srv.Endpoint()), etcdproxy.Start(t, srv.Endpoint())
	silent.Mute(true)
	kv := open(t, etcd.Options{Endpoints: []string{good.Endpoint(), silent.Endpoint()}, Root: "/unknown"})
	if err := kv.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := get(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
	if n := silent.Used(); n != 0 {
		t.Errorf("%d calls went to a server with an unknown version", n)
	}
	silent.Mute(false)
	for silent.Used() == 0 { // the version request is repeated
		if err := get(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
	// Without a known version calls wait, and then fail with ErrUnavailable.
	alone := open(t, etcd.Options{
		Endpoints: []string{silent.Endpoint()}, Root: "/unknown",
		RequestTimeout: 200 * time.Millisecond,
	})
	silent.Mute(true)
	if err := alone.Check(t.Context()); !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("check: got error %v, want unavailable", err)
	}
	if err := get(t.Context(), alone); !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("get: got error %v, want unavailable", err)
	}
}

// A learner refuses requests, so it is not used before its promotion.
func TestLearnerIsNotUsed(t *testing.T) {
	srv := etcdtest.Shared(t)
	good, learner := etcdproxy.Start(t, srv.Endpoint()), etcdproxy.Start(t, srv.Endpoint())
	learner.Learner(true)
	kv := open(t, etcd.Options{Endpoints: []string{good.Endpoint(), learner.Endpoint()}, Root: "/learner"})
	if err := kv.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := get(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
	if n := learner.Used(); n != 0 {
		t.Errorf("%d calls went to a learner", n)
	}
	learner.Learner(false)
	for learner.Used() == 0 { // the version request is repeated
		if err := get(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
}

// A server that returns with an older version is refused at the reconnect, and used again
// after an upgrade; calls through the other endpoint continue.
func TestVersionIsCheckedAtEachReconnect(t *testing.T) {
	srv := etcdtest.Shared(t)
	one, two := etcdproxy.Start(t, srv.Endpoint()), etcdproxy.Start(t, srv.Endpoint())
	kv := open(t, etcd.Options{Endpoints: []string{one.Endpoint(), two.Endpoint()}, Root: "/again"})
	if err := kv.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	two.Stop()
	two.Version("3.5.7")
	used := two.Used()
	two.Restart(t)
	for kv.TooOld() == "" {
		if err := get(t.Context(), kv); err != nil && !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	for range 20 {
		if err := get(t.Context(), kv); err != nil {
			t.Fatal(err)
		}
	}
	if two.Used() != used {
		t.Errorf("%d calls went to the old server", two.Used()-used)
	}
	one.Stop()
	for { // the supported one is down, and may return
		err := get(t.Context(), kv)
		if errors.Is(err, meta.ErrUnavailable) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	two.Stop()
	two.Version("")
	two.Restart(t)
	for get(t.Context(), kv) != nil {
		if err := t.Context().Err(); err != nil {
			t.Fatal(err)
		}
	}
	if old := kv.TooOld(); old != "" {
		t.Errorf("still called too old: %s", old)
	}
}

// With a user the version request needs a login, which is repeated after each restart of the
// server. Calls and watches report a refused login immediately.
func TestEtcdLogin(t *testing.T) {
	srv := etcdtest.Start(t)
	srv.Restrict(t, "snap", "secret", "/login/")
	kv := open(t, etcd.Options{Endpoints: []string{srv.Endpoint()}, Root: "/login", Username: "snap", Password: "secret"})
	if err := kv.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	until := func(want error) {
		t.Helper()
		for {
			err := get(ctx, kv)
			if errors.Is(err, want) {
				return
			}
			if err != nil && !errors.Is(err, meta.ErrUnavailable) {
				t.Fatalf("got error %v, want %v", err, want)
			}
		}
	}
	until(nil)
	srv.Stop(t)
	srv.Restart(t)
	until(nil)
	if _, err := kv.Scan(ctx, "/a", "/b", 0, func([]meta.KeyValue) error { return nil }); err != nil {
		t.Errorf("scan: %v", err)
	}
	// Every method works with permissions below the root only.
	if _, err := kv.Txn(ctx, meta.Txn{If: []meta.Cond{meta.Absent("/a")}}); err != nil {
		t.Errorf("only compares: %v", err)
	}
	srv.Password(t, "snap", "another")
	srv.Stop(t)
	srv.Restart(t)
	until(meta.ErrDenied)
	if _, err := kv.Watch(ctx, "/", "0", 0).Next(); !errors.Is(err, meta.ErrDenied) {
		t.Errorf("watch: got error %v, want denied", err)
	}
	if _, err := etcd.Open(etcd.Options{
		Endpoints: []string{srv.Endpoint()}, Username: "snap",
		Password: "wrong",
	}); !errors.Is(err, meta.ErrDenied) {
		t.Errorf("open: got error %v, want denied", err)
	}
	srv.Password(t, "snap", "secret")
	for err := get(ctx, kv); err != nil; err = get(ctx, kv) { // the request is repeated within a second
		if !errors.Is(err, meta.ErrDenied) {
			t.Fatal(err)
		}
	}
}

// Usage returns the space of each usable server, and does not query others.
func TestEtcdUsage(t *testing.T) {
	srv := etcdtest.Start(t)
	old := etcdproxy.Start(t, srv.Endpoint())
	kv := open(t, etcd.Options{Endpoints: []string{srv.Endpoint(), old.Endpoint()}, Root: "/usage"})
	if err := kv.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	list, err := kv.Usage(t.Context())
	if err != nil || len(list) != 2 {
		t.Fatalf("got %+v, error %v; want two servers", list, err)
	}
	for _, u := range list {
		if u.Endpoint == "" || u.SizeBytes <= 0 || u.InUseBytes <= 0 || u.InUseBytes > u.SizeBytes || u.QuotaBytes < 1<<30 ||
			u.Full {
			t.Errorf("got %+v", u)
		}
	}
	// An unavailable server does not affect the results of the others.
	old.Mute(true)
	if list, err = kv.Usage(t.Context()); err != nil || len(list) != 1 || list[0].Endpoint != srv.Endpoint() {
		t.Errorf("got %+v, error %v; want the available server", list, err)
	}
	old.Mute(false)
	old.Stop()
	old.Version(debian)
	old.Restart(t)
	for kv.TooOld() == "" {
		if err := get(t.Context(), kv); err != nil && !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if list, err = kv.Usage(t.Context()); err != nil || len(list) != 1 {
		t.Errorf("got %+v, error %v; want one server", list, err)
	}
	// A full server is reported as full.
	srv.Stop(t)
	srv.QuotaBytes = 1
	srv.Restart(t)
	for err = nil; !errors.Is(err, meta.ErrNoSpace); {
		_, err = kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put("/fill", nil)}})
		if err != nil && !errors.Is(err, meta.ErrNoSpace) && !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if list, err = kv.Usage(t.Context()); err != nil || len(list) != 1 || !list[0].Full {
		t.Errorf("full: got %+v, error %v", list, err)
	}
}
