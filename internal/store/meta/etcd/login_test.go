//go:build !short

package etcd_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// handled counts the calls that the etcd servers of this process have completed with one of
// codes, or any code; of one method, or of all for an empty name.
func handled(t *testing.T, method string, codes ...string) (n int) {
	t.Helper()
	families, err := prometheus.DefaultGatherer.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, family := range families {
		if family.GetName() != "grpc_server_handled_total" {
			continue
		}
		for _, metric := range family.GetMetric() {
			counts := true
			for _, label := range metric.GetLabel() {
				switch label.GetName() {
				case "grpc_method":
					counts = counts && (method == "" || label.GetValue() == method)
				case "grpc_code":
					counts = counts && (len(codes) == 0 || slices.Contains(codes, label.GetValue()))
				}
			}
			if counts {
				n += int(metric.GetCounter().GetValue())
			}
		}
	}
	return n
}

// TestDeadTokenIsReplaced restarts an etcd with users, which invalidates its tokens, during
// many calls: each caller gets at most one error for the old token, and continues with a new
// one.
func TestDeadTokenIsReplaced(t *testing.T) {
	const callers = 16
	srv := etcdtest.Start(t)
	srv.Restrict(t, "snap", "secret", "/dead/")
	kv := open(t, etcd.Options{Endpoints: []string{srv.Endpoint()}, Root: "/dead", Username: "snap", Password: "secret"})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lease, err := kv.Grant(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		logins, refused := handled(t, "Authenticate"), handled(t, "", "Unauthenticated", "InvalidArgument",
			"PermissionDenied")
		srv.Stop(t)
		srv.Restart(t)
		var group sync.WaitGroup
		for n := range callers {
			group.Go(func() {
				for range 20 {
					var err error
					switch n % 4 {
					case 0:
						err = get(ctx, kv)
					case 1:
						_, err = kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(fmt.Sprintf("/%d", n), nil)}})
					case 2:
						err = kv.KeepAlive(ctx, lease)
					case 3:
						_, err = kv.Scan(ctx, "/", "0", 0, func([]meta.KeyValue) error { return nil })
					}
					for ; errors.Is(err, meta.ErrUnavailable) && ctx.Err() == nil; err = get(ctx, kv) { // reconnecting
						t.Logf("caller %d: %v", n, err)
					}
					if err != nil {
						t.Errorf("caller %d: %v", n, err)
					}
				}
			})
		}
		group.Wait()
		logins = handled(t, "Authenticate") - logins
		refused = handled(t, "", "Unauthenticated", "InvalidArgument", "PermissionDenied") - refused
		t.Logf("%d logins, %d calls refused", logins, refused)
		// Each stream logs in; of the other calls each caller logs in at most once.
		if streams := callers / 2 * 20; logins > callers+streams+4 || refused > callers+2 {
			t.Errorf("%d logins and %d refused calls of %d callers", logins, refused, callers)
		}
	}
}

// TestPasswordIsReloaded replaces the password of a user, at etcd and in the file, in either
// order: the client continues with the accepted one.
func TestPasswordIsReloaded(t *testing.T) {
	srv := etcdtest.Start(t)
	srv.Restrict(t, "snap", "one", "/again/")
	var mu sync.Mutex
	file, fileErr := "one", error(nil)
	set := func(password string, err error) {
		mu.Lock()
		defer mu.Unlock()
		file, fileErr = password, err
	}
	kv := open(t, etcd.Options{
		Endpoints: []string{srv.Endpoint()}, Root: "/again", Username: "snap", Password: "one",
		ReadPassword: func() (string, error) {
			mu.Lock()
			defer mu.Unlock()
			return file, fileErr
		},
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	want := func(when string, want error) {
		t.Helper()
		err := get(ctx, kv)
		for ; errors.Is(err, meta.ErrUnavailable) && ctx.Err() == nil; err = get(ctx, kv) { // reconnecting
			t.Logf("%s: %v", when, err)
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: got error %v, want %v", when, err, want)
		}
		// Also for a stream and a write.
		if err := kv.KeepAlive(ctx, 1); !errors.Is(err, want) && (want != nil || !errors.Is(err, meta.ErrLeaseNotFound)) {
			t.Errorf("%s: keep alive: got error %v, want %v", when, err, want)
		}
		if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); !errors.Is(err, want) {
			t.Errorf("%s: write: got error %v, want %v", when, err, want)
		}
	}
	want("at the start", nil)
	srv.Password(t, "snap", "two")
	want("replaced at etcd alone", meta.ErrDenied)
	set("two", nil)
	want("replaced in the file too", nil)
	set("three", nil)
	want("replaced in the file first", nil)
	srv.Password(t, "snap", "three")
	want("replaced at etcd too", nil)
	set("", errors.New("the file is gone"))
	srv.Stop(t)
	srv.Restart(t)
	want("the file is gone", nil)
	set("", nil)
	want("the file is empty", nil)

	// A role that is revoked while the client runs is reported as denied, until it is granted.
	srv.Allow(t, "snap", "/again/", false)
	if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); !errors.Is(err, meta.ErrDenied) {
		t.Errorf("write without the permission: got error %v, want denied", err)
	}
	if err := get(ctx, kv); err != nil {
		t.Errorf("read with the permission: %v", err)
	}
	srv.Allow(t, "snap", "/again/", true)
	want("with the right again", nil)
}
