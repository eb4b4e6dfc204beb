// Package etcdtest gives tests a real etcd, in the same process.
package etcdtest

import (
	"context"
	"crypto/rand"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcdserver"
)

// Server is an etcd whose directory goes with the test.
type Server struct {
	// QuotaBytes is the size at which the next Restart makes etcd full.
	QuotaBytes int64

	dir string
	srv *etcdserver.Server // nil while stopped
}

// Start starts a server of tb's own.
func Start(tb testing.TB) *Server {
	tb.Helper()
	// tb.TempDir has the test's name in it, too long for a socket's path.
	dir, err := os.MkdirTemp("", "etcdtest-") //nolint:usetesting // see above
	if err != nil {
		tb.Fatal(err)
	}
	s := &Server{dir: dir}
	tb.Cleanup(func() {
		if s.srv != nil {
			s.Stop(tb)
		}
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	s.Restart(tb)
	return s
}

// Stop ends the server, as a store that is lost. What was written stays.
func (s *Server) Stop(tb testing.TB) {
	tb.Helper()
	if err := s.srv.Close(); err != nil {
		tb.Error(err)
	}
	s.srv = nil
}

// Restart starts a stopped server again, with its data and under its address.
func (s *Server) Restart(tb testing.TB) {
	tb.Helper()
	srv, err := start(tb.Context(), s.dir, s.QuotaBytes)
	if err != nil {
		tb.Fatal(err)
	}
	s.srv = srv
}

// Endpoint returns the server's address, the same after a Restart.
func (s *Server) Endpoint() string { return "unix://" + filepath.Join(s.dir, "etcd.sock") }

// KV opens a client of the server, under a root of its own. It is
// closed with the test.
func (s *Server) KV(tb testing.TB) *etcd.Client {
	tb.Helper()
	return s.KVAt(tb, "/"+rand.Text())
}

// KVAt is KV under a root that the test chooses, so that it can open several
// clients of one store.
func (s *Server) KVAt(tb testing.TB, root string) *etcd.Client {
	tb.Helper()
	c, err := etcd.Open(etcd.Options{Endpoints: []string{s.Endpoint()}, Root: root})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := c.Close(); err != nil {
			tb.Error(err)
		}
	})
	return c
}

// Shared returns the one server of this process, for tests that mind only their
// own keys: revisions are raised by all. It ends with the process; what it
// leaves on disk the next process removes.
func Shared(tb testing.TB) *Server {
	tb.Helper()
	s, err := shared()
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

var shared = sync.OnceValues(func() (*Server, error) {
	parent := filepath.Join(os.TempDir(), "etcdtest-shared")
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, err
	}
	sweep(parent)
	dir, err := os.MkdirTemp(parent, "")
	if err != nil {
		return nil, err
	}
	srv, err := start(context.Background(), dir, 0)
	if err != nil {
		return nil, err
	}
	return &Server{dir: dir, srv: srv}, nil
})

// sweep removes the directories of servers whose process has ended. It lets the
// new ones be, which may not have come to lock theirs.
func sweep(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, "*"))
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || time.Since(info.ModTime()) < time.Minute {
			continue
		}
		lock, err := fileutil.TryLockFile(filepath.Join(dir, etcdserver.LockFile), os.O_WRONLY|os.O_CREATE, 0o600)
		if err != nil {
			continue
		}
		_ = os.RemoveAll(dir) // another process may be at it too
		_ = lock.Close()
	}
}

// start starts a server that is fast and forgetful: it elects itself at once,
// grants leases of a second, and does not wait for the disk.
func start(ctx context.Context, dir string, quotaBytes int64) (*etcdserver.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	return etcdserver.Start(ctx, etcdserver.Config{
		Dir:        dir,
		QuotaBytes: quotaBytes,
		Log:        zap.NewNop(),
		Tune: func(c *embed.Config) {
			c.TickMs = 10
			c.ElectionMs = 100
			c.UnsafeNoFsync = true
			c.BcryptCost = 4 // the least: each login is one
			if quotaBytes > 0 {
				c.QuotaBackendBytes = quotaBytes // without the reserve: what is beyond is etcd's to refuse
			}
		},
	})
}

// Disarm takes back the alarm of a server that was full.
func (s *Server) Disarm(tb testing.TB) {
	tb.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: []string{s.Endpoint()}})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	if _, err := c.AlarmDisarm(tb.Context(), &clientv3.AlarmMember{}); err != nil {
		tb.Fatal(err)
	}
}

// The user that may do everything, once Restrict was called.
const (
	rootUser     = "root"
	rootPassword = "rootpass"
)

// Restrict turns on authentication, with a user who may read and write the keys
// below prefix, and nothing else.
func (s *Server) Restrict(tb testing.TB, user, password, prefix string) {
	tb.Helper()
	c := s.admin(tb, clientv3.Config{})
	ctx := tb.Context()
	for _, do := range []func() error{
		func() error { _, err := c.UserAdd(ctx, rootUser, rootPassword); return err },
		func() error { _, err := c.UserGrantRole(ctx, rootUser, "root"); return err },
		func() error { _, err := c.UserAdd(ctx, user, password); return err },
		func() error { _, err := c.RoleAdd(ctx, user); return err },
		func() error { _, err := c.UserGrantRole(ctx, user, user); return err },
		func() error {
			_, err := c.RoleGrantPermission(ctx, user, prefix, clientv3.GetPrefixRangeEnd(prefix),
				clientv3.PermissionType(clientv3.PermReadWrite))
			return err
		},
		func() error { _, err := c.AuthEnable(ctx); return err },
	} {
		if err := do(); err != nil {
			tb.Fatal(err)
		}
	}
}

// Allow gives the user of Restrict, or takes from it, the right to write below
// prefix; to read stays.
func (s *Server) Allow(tb testing.TB, user, prefix string, write bool) {
	tb.Helper()
	c := s.admin(tb, clientv3.Config{Username: rootUser, Password: rootPassword})
	kind := clientv3.PermRead
	if write {
		kind = clientv3.PermReadWrite
	}
	if _, err := c.RoleGrantPermission(
		tb.Context(),
		user,
		prefix,
		clientv3.GetPrefixRangeEnd(prefix),
		clientv3.PermissionType(kind),
	); err != nil {
		tb.Fatal(err)
	}
}

// Password changes a password after Restrict.
func (s *Server) Password(tb testing.TB, user, password string) {
	tb.Helper()
	c := s.admin(tb, clientv3.Config{Username: rootUser, Password: rootPassword})
	if _, err := c.UserChangePassword(tb.Context(), user, password); err != nil {
		tb.Fatal(err)
	}
}

func (s *Server) admin(tb testing.TB, cfg clientv3.Config) *clientv3.Client {
	tb.Helper()
	cfg.Endpoints, cfg.Logger = []string{s.Endpoint()}, zap.NewNop()
	c, err := clientv3.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return c
}
