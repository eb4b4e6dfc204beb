// Package etcdserver runs etcd inside the process: one member, reachable only from this
// host. The embedded mode and tests use it.
package etcdserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/features"
	"go.uber.org/zap"
)

// ErrInUse means that another server, of this process or another, uses the directory.
var ErrInUse = errors.New("etcd directory in use")

// LockFile is the file in a server's directory that is locked while it runs.
const LockFile = "lock"

const (
	defaultQuotaBytes = 8 << 30
	// maxSocketPath is the kernel's maximum length of a unix socket's path.
	maxSocketPath = 107
)

// Config configures [Start].
type Config struct {
	Dir        string // required; created with mode 0700 if it does not exist
	QuotaBytes int64  // the size of the database from which on [Server.Full] is true; default 8 GiB
	// History is how long old revisions are kept when space is short, default one
	// minute. Otherwise they are kept between one and two hours.
	History time.Duration
	// ClientAddr is the loopback address to listen on, such as 127.0.0.1:2379; port 0
	// selects any port. The default is a unix socket in Dir, or any port of 127.0.0.1 if
	// the socket's path were too long. The socket is accessible only to users with access
	// to Dir, a port to every user of the host.
	ClientAddr string
	Log        *zap.Logger // receives etcd's warnings; default: none
	// Tune modifies etcd's own configuration before the start; for tests.
	Tune func(*embed.Config)
}

// Server is a running etcd.
type Server struct {
	etcd     *embed.Etcd
	endpoint string
	lock     *fileutil.LockedFile
	close    func() error // once
	keeper   keeper
}

// Start starts etcd and returns when it serves, within seconds, or when ctx ends. For a
// directory in use it returns [ErrInUse].
//
// etcd ends the process if its disk fails.
func Start(ctx context.Context, c Config) (*Server, error) {
	if c.QuotaBytes <= 0 {
		c.QuotaBytes = defaultQuotaBytes
	}
	if c.History <= 0 {
		c.History = time.Minute
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	dir, err := filepath.Abs(c.Dir)
	if c.Dir == "" {
		err = errors.New("no directory")
	}
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err != nil {
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	// etcd itself would wait for the end of the other server.
	lock, err := fileutil.TryLockFile(filepath.Join(dir, LockFile), os.O_WRONLY|os.O_CREATE, 0o600)
	if errors.Is(err, fileutil.ErrLocked) {
		err = ErrInUse
	}
	if err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w", dir, err)
	}
	s := &Server{lock: lock}
	if err := s.start(ctx, dir, c); err != nil {
		return nil, fmt.Errorf("start etcd in %s: %w", dir, errors.Join(err, lock.Close()))
	}
	return s, nil
}

func (s *Server) start(ctx context.Context, dir string, c Config) error {
	client, err := clientURL(dir, c.ClientAddr)
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name = "snapshotd"
	cfg.Dir = filepath.Join(dir, "data")
	cfg.ListenClientUrls = []url.URL{client}
	cfg.AdvertiseClientUrls = []url.URL{client}
	// A single member has no peers and does not listen for them; the URL is only a name.
	peer := url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
	cfg.ListenPeerUrls = nil
	cfg.AdvertisePeerUrls = []url.URL{peer}
	cfg.InitialCluster = cfg.Name + "=" + peer.String()
	cfg.QuotaBackendBytes = c.QuotaBytes + reserveOf(c.QuotaBytes)
	cfg.AutoCompactionMode = embed.CompactorModePeriodic
	cfg.AutoCompactionRetention = "1h"
	cfg.EnableGRPCGateway = false
	// Without these, every start renews each lease for its full time.
	gates, ok := cfg.ServerFeatureGate.(interface{ Set(gates string) error })
	if !ok {
		return errors.New("features cannot be set")
	}
	checkpoints := string(features.LeaseCheckpoint) + "=true," + string(features.LeaseCheckpointPersist) + "=true"
	if err := gates.Set(checkpoints); err != nil {
		return err
	}
	warnings := c.Log.WithOptions(zap.IncreaseLevel(max(zap.WarnLevel, c.Log.Level())))
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(warnings)
	if c.Tune != nil {
		c.Tune(cfg)
	}
	if s.etcd, err = embed.StartEtcd(cfg); err != nil {
		return err
	}
	select {
	case <-s.etcd.Server.ReadyNotify():
	case err = <-s.etcd.Err():
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		s.etcd.Close()
		return err
	}
	s.endpoint = endpoint(client)
	s.keeper = keeper{
		etcd: s.etcd.Server, log: c.Log, quota: c.QuotaBytes, limit: cfg.QuotaBackendBytes, history: c.History,
		points: []point{{time.Now(), s.etcd.Server.KV().Rev()}}, // no client has read older revisions
	}
	s.close = sync.OnceValue(func() error {
		s.etcd.Close()
		return s.lock.Close()
	})
	return nil
}

// clientURL returns the address to listen on.
func clientURL(dir, addr string) (url.URL, error) {
	if addr == "" {
		if path := filepath.Join(dir, "etcd.sock"); len(path) <= maxSocketPath {
			// Left by a killed server; the lock excludes a running one.
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				return url.URL{}, err
			}
			return url.URL{Scheme: "unix", Path: path}, nil
		}
		addr = "127.0.0.1:0"
	}
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return url.URL{}, err
	}
	if ip := net.ParseIP(host); ip == nil || !ip.IsLoopback() {
		return url.URL{}, fmt.Errorf("address %s is not a loopback address", addr)
	}
	if port == "0" { // etcd needs a port number; the start fails if another process takes it first
		l, err := net.Listen("tcp", addr) //nolint:noctx // closed immediately
		if err != nil {
			return url.URL{}, err
		}
		addr = l.Addr().String()
		if err := l.Close(); err != nil {
			return url.URL{}, err
		}
	}
	return url.URL{Scheme: "http", Host: addr}, nil
}

// endpoint returns the address for clients.
func endpoint(u url.URL) string {
	if u.Scheme == "unix" {
		return "unix://" + u.Path
	}
	return u.Host
}

// Endpoint returns the address for clients of this host, in the format of etcd's client.
func (s *Server) Endpoint() string { return s.endpoint }

// Err returns a channel that receives the error of a server that ended without Close. Close
// closes the channel.
func (s *Server) Err() <-chan error { return s.etcd.Err() }

// Close stops the server and releases the directory. Repeated calls have no effect.
func (s *Server) Close() error { return s.close() }
