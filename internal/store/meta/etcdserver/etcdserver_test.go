//go:build !short

package etcdserver_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcdserver"
)

func start(t *testing.T, c etcdserver.Config) *etcdserver.Server {
	t.Helper()
	s, err := etcdserver.Start(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// use writes or reads a key through a client of s.
func use(t *testing.T, s *etcdserver.Server, ops ...meta.Op) meta.TxnResult {
	t.Helper()
	c, err := etcd.Open(etcd.Options{Endpoints: []string{s.Endpoint()}, Root: "/test"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	}()
	res, err := c.Txn(t.Context(), meta.Txn{Then: ops})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// shortDir returns a directory with a name that is short enough for a socket.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "etcd-") //nolint:usetesting // t.TempDir contains the name of the test
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func TestEtcdServerKeepsData(t *testing.T) {
	c := etcdserver.Config{Dir: filepath.Join(shortDir(t), "made")}
	s := start(t, c)
	if !strings.HasPrefix(s.Endpoint(), "unix://") {
		t.Errorf("endpoint %s, want a socket", s.Endpoint())
	}
	info, err := os.Stat(c.Dir)
	if err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("directory: %v, error %v; want mode 0700", info.Mode(), err)
	}
	use(t, s, meta.Put("/a", []byte("1")))
	for range 2 { // repeated calls have no effect
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	// Leftovers of a killed server do not prevent a start.
	if err := os.WriteFile(filepath.Join(c.Dir, "etcd.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := use(t, start(t, c), meta.Get("/a")).Ranges[0]; len(got) != 1 || string(got[0].Value) != "1" {
		t.Errorf("after a restart: got %v", got)
	}
}

func TestEtcdServerRefuses(t *testing.T) {
	dir := shortDir(t)
	start(t, etcdserver.Config{Dir: dir})
	if s, err := etcdserver.Start(t.Context(), etcdserver.Config{Dir: dir}); !errors.Is(err, etcdserver.ErrInUse) ||
		!strings.Contains(err.Error(), dir) {
		t.Errorf("directory in use: got %v, error %v", s, err)
	}
	for name, c := range map[string]etcdserver.Config{
		"no directory":       {},
		"not a directory":    {Dir: "/dev/null"},
		"not loopback":       {Dir: shortDir(t), ClientAddr: "0.0.0.0:0"},
		"not an address":     {Dir: shortDir(t), ClientAddr: "127.0.0.1"},
		"address of another": {Dir: shortDir(t), ClientAddr: "192.0.2.1:2379"},
	} {
		if _, err := etcdserver.Start(t.Context(), c); err == nil {
			t.Errorf("%s: got no error", name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	late := etcdserver.Config{Dir: shortDir(t)}
	if _, err := etcdserver.Start(ctx, late); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled start: got error %v", err)
	}
	start(t, late) // the directory is unlocked
}

func TestEtcdServerPort(t *testing.T) {
	// A directory whose name is too long for a socket.
	dir := filepath.Join(shortDir(t), strings.Repeat("d", 100))
	s := start(t, etcdserver.Config{Dir: dir})
	if !strings.HasPrefix(s.Endpoint(), "127.0.0.1:") {
		t.Errorf("endpoint %s, want a port of 127.0.0.1", s.Endpoint())
	}
	use(t, s, meta.Put("/a", nil))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again := start(t, etcdserver.Config{Dir: dir, ClientAddr: s.Endpoint()})
	if again.Endpoint() != s.Endpoint() {
		t.Errorf("endpoint %s, want %s", again.Endpoint(), s.Endpoint())
	}
	if got := use(t, again, meta.Get("/a")).Ranges[0]; len(got) != 1 {
		t.Errorf("after a restart: got %v", got)
	}
}
