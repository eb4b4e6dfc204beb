// Package embed runs the whole of snapshotd inside a Go process: the program
// snapshotd is little more than this package.
//
//	cfg := embed.Default()
//	cfg.DataDir = "/var/lib/engine/snapshotd"
//	srv, err := embed.Start(ctx, cfg)
//	if err != nil {
//		return err
//	}
//	defer srv.Close()
//	snapshots := snapshotdv1.NewSnapshotServiceClient(srv.Conn())
//
// With the zero [Config] everything is kept under one directory, etcd included.
// With etcd endpoints any number of processes form a cluster.
package embed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/server"
	"github.com/snapshotd/snapshotd/internal/store/admit"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcdserver"
	"github.com/snapshotd/snapshotd/internal/store/meta/reserve"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// ErrInUse means that another process, or another server of this one, has the
// data directory.
var ErrInUse = errors.New("data directory in use")

const insideBuffer = 1 << 20 // bytes, of a connection within the process

// startTimeout is for a start, once etcd is there: etcd in this process reads its
// data for as long as it takes, which is longer the more there are.
var startTimeout = time.Minute

// Server is a running snapshotd. Use [Start]. Its methods are safe for
// concurrent use.
type Server struct {
	addr, metricsAddr string
	conn              *grpc.ClientConn
	serving           atomic.Bool            // from the start to the stop
	etcdLost          atomic.Pointer[string] // why etcd cannot be used; by watchEtcd
	stop              func()
	done              chan struct{} // closed when everything has ended
	err               error         // why; set before done is closed
}

// Start starts snapshotd and returns when it serves. The end of ctx ends an
// unfinished start, not the server; Close does. Mistakes in the configuration
// are returned all at once. A data directory in use is [ErrInUse].
func Start(ctx context.Context, cfg Config) (_ *Server, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	cfg = cfg.complete()
	if cfg.Replica == "" {
		cfg.Replica = replicaName()
	}
	log := cfg.Log
	if log == nil {
		if log, err = newLog(cfg); err != nil {
			return nil, err
		}
	}
	var open closers
	defer func() {
		if err != nil {
			err = errors.Join(err, open.close())
		}
	}()
	p, err := openParts(ctx, cfg, log, &open)
	if err != nil {
		return nil, err
	}
	// Once in the life of a cluster, and as long as its size takes.
	if err := claimAll(ctx, p.catalog, log); err != nil {
		return nil, err
	}
	s := &Server{done: make(chan struct{})}
	var listen net.ListenConfig
	tcp, err := listen.Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	open.add(ignoreClosed(tcp.Close))
	s.addr = tcp.Addr().String()
	var metrics net.Listener
	if cfg.MetricsListen != "off" {
		if metrics, err = listen.Listen(ctx, "tcp", cfg.MetricsListen); err != nil {
			return nil, fmt.Errorf("metrics_listen: %w", err)
		}
		open.add(ignoreClosed(metrics.Close))
		s.metricsAddr = metrics.Addr().String()
	}
	inside := bufconn.Listen(insideBuffer)
	s.conn, err = grpc.NewClient("passthrough:///snapshotd",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return inside.DialContext(ctx) }),
	)
	if err != nil {
		return nil, fmt.Errorf("connect within the process: %w", err)
	}
	open.add(s.conn.Close)
	s.run(context.WithoutCancel(ctx), cfg, p, tcp, inside, metrics, open)
	log.Info("started",
		zap.String("version", cfg.Version), zap.String("replica", cfg.Replica), zap.String("mode", cfg.mode()),
		zap.String("listen", s.addr), zap.Bool("tls", cfg.TLS != (TLS{})), zap.String("metrics_listen", s.metricsAddr),
		zap.String("data_dir", cfg.DataDir), zap.String("cluster", p.cluster.ID))
	return s, nil
}

// Bounds on what is logged of disputed ids.
const (
	maxDisputes  = 100 // ids that are logged one by one
	maxClaimants = 20  // collections that are named of each
)

// claimAll claims the ids of what was registered before ids were claimed, and logs
// those that are disputed.
func claimAll(ctx context.Context, cat *catalog.Catalog, log *zap.Logger) error {
	disputes, err := cat.ClaimAll(ctx)
	if err != nil {
		return err
	}
	for _, d := range disputes[:min(len(disputes), maxDisputes)] {
		log.Warn("an id is disputed: none of the files of its segment is deleted, in any of the collections",
			zap.Int64("id", d.ID), zap.Bool("index_build", d.Part),
			zap.Int64s("collections", d.Collections[:min(len(d.Collections), maxClaimants)]), zap.Int("claimants", len(d.Collections)))
	}
	if len(disputes) > maxDisputes {
		log.Warn("more ids are disputed", zap.Int("ids", len(disputes)), zap.Int("logged", maxDisputes))
	}
	return nil
}

// mode says where etcd is.
func (c Config) mode() string {
	if len(c.EtcdEndpoints) == 0 {
		return "embedded"
	}
	return "cluster"
}

// parts are what runs.
type parts struct {
	log      *zap.Logger
	problems *lasting.Problems
	cluster  cluster.Cluster
	catalog  *catalog.Catalog
	manager  *manager.Manager
	server   *server.Server
	etcdErr  <-chan error                    // nil in a cluster
	etcdRun  func(ctx context.Context) error // nil in a cluster
	room     *room
	history  *history // nil where etcd is in this process
	kv       meta.KV
	tooOld   func() string // names etcd servers that are not used
	stores   map[string]*admit.Store
	ticks    <-chan time.Time // when to ask etcd whether it is there
	registry func(profiles bool, unhealthy func() string) *http.Server
}

// openParts makes everything that does not listen yet, and adds to open what is
// to be closed.
func openParts(ctx context.Context, cfg Config, log *zap.Logger, open *closers) (*parts, error) {
	p := &parts{log: log, problems: lasting.New(time.Now)}
	kv, err := openMeta(ctx, cfg, log, open, p)
	if err != nil {
		return nil, err
	}
	if cfg.Decorators.KV != nil {
		kv = cfg.Decorators.KV(kv)
	}
	p.kv = kv
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ticker := time.NewTicker(checkEvery)
	open.add(func() error { ticker.Stop(); return nil })
	p.ticks = ticker.C
	p.cluster, err = cluster.Open(ctx, kv, cluster.Options{NameScope: cfg.nameScope(), Release: cfg.Version, Now: time.Now, Rand: rand.Reader})
	if err != nil {
		return nil, err
	}
	if p.stores, err = openStores(ctx, cfg, kv, p, open); err != nil {
		return nil, err
	}
	stores, ready := map[string]object.Store{}, map[string]<-chan struct{}{}
	for alias, s := range p.stores {
		stores[alias], ready[alias] = s, s.Ready()
	}
	timeOptions := clock.Options{
		KV: kv, Clock: clock.System{}, Alias: cfg.SnapshotStore, Replica: cfg.Replica, Log: log.Named("clock"),
		MaxDowntime: time.Duration(cfg.ClockMaxDowntime), Problems: p.problems,
	}
	if cfg.ObjectStores[cfg.SnapshotStore].Type == typeS3 { // a directory has the clock of this host
		timeOptions.Store = stores[cfg.SnapshotStore]
	}
	trusted := clock.New(timeOptions)
	requests := request.NewLeases(kv, time.Now, trusted.Stamp)
	age := epoch.New(epoch.Options{
		KV: kv, Store: stores[cfg.SnapshotStore], Cluster: p.cluster.ID, Now: time.Now, Rand: rand.Reader, Log: log.Named("epoch"),
		Problems: p.problems,
	})
	cat := catalog.New(catalog.Options{
		KV: kv, Now: time.Now, Stamp: trusted.Stamp, Rand: rand.Reader, Requests: requests, RaiseIDs: age.RaiseIDLimit,
		HasStore:    func(alias string) bool { _, ok := stores[alias]; return ok },
		ReadSpilled: catalog.ReadSpilled(stores), Spill: catalog.WriteSpilled(stores, cfg.SnapshotStore), AllowReserve: cfg.AllowReserveIDs,
		MaxGoneRanges: cfg.GoneIDRanges, GoneGapAge: time.Duration(cfg.GoneIDAge),
	})
	p.catalog = cat
	p.manager, err = manager.New(manager.Options{
		Problems: p.problems,
		KV:       kv, Catalog: cat, Cluster: p.cluster, Stores: stores, Ready: ready, SnapshotStore: cfg.SnapshotStore, Requests: requests, Epoch: age,
		Features: func(ctx context.Context, alias string, again bool) (probe.Features, error) {
			return p.stores[alias].Features(ctx, again)
		},
		Replica: cfg.Replica, Release: cfg.Version, Now: time.Now, Clock: trusted, Rand: rand.Reader, Log: log.Named("manager"),
		CreateTimeout: time.Duration(cfg.CreateTimeout), LeaseTTL: time.Duration(cfg.CreateLeaseTTL),
		LeaderTTL: time.Duration(cfg.LeaderTTL), MaxCreates: cfg.MaxCreates,
		RestoreSlots: cfg.RestoreSlots, CopyInFlight: cfg.CopyInFlight, KeepRestores: time.Duration(cfg.KeepRestores),
		RestoreStallTimeout: time.Duration(cfg.RestoreStallTimeout), RestoreRefusalTimeout: time.Duration(cfg.RestoreRefusalTimeout),
		CollectorOff: cfg.Collector == collectorOff, CollectTolerance: time.Duration(cfg.CollectTolerance),
		CollectInterval: time.Duration(cfg.CollectInterval), CollectMaxShare: cfg.CollectMaxShare, CollectRate: cfg.CollectRate,
		OrphanGrace: time.Duration(cfg.OrphanGrace), SweepInterval: time.Duration(cfg.SweepInterval),
	})
	if err != nil {
		return nil, err
	}
	config, err := cfg.serverTLS(log)
	if err != nil {
		return nil, err
	}
	registry := newRegistry()
	registry.MustRegister(stats{p.manager, p.stores, p.problems}, p.room)
	p.registry = func(profiles bool, unhealthy func() string) *http.Server {
		return metricsServer(registry, unhealthy, func() string { return lacking(p.stores) }, profiles)
	}
	p.server, err = server.New(server.Options{
		Manager: p.manager, Catalog: cat, Cluster: p.cluster, KV: kv, Log: log.Named("rpc"), Registry: registry, TLS: config,
		Version: cfg.Version, Replica: cfg.Replica, Stores: cfg.aliases(), SnapshotStore: cfg.SnapshotStore,
		MaxConnections: cfg.MaxConnections,
	})
	return p, err
}

// openMeta connects to etcd, which it starts first in the embedded mode.
func openMeta(ctx context.Context, cfg Config, log *zap.Logger, open *closers, p *parts) (meta.KV, error) {
	p.room = &room{log: log}
	var full func() bool
	o := etcd.Options{Endpoints: cfg.EtcdEndpoints, Root: cfg.EtcdRoot, Username: cfg.EtcdUsername, Log: log.Named("etcd-client")}
	if len(cfg.EtcdEndpoints) == 0 {
		dir, err := filepath.Abs(filepath.Join(cfg.DataDir, "etcd"))
		if err != nil {
			return nil, fmt.Errorf("data_dir: %w", err)
		}
		slow := time.AfterFunc(10*time.Second, func() {
			log.Info("etcd reads its data; of a large database that takes minutes", zap.String("dir", dir))
		})
		defer slow.Stop()
		etcdLog, least := newEtcdLog(log.Named("etcd"))
		least.Store(int32(zapcore.ErrorLevel))
		srv, err := etcdserver.Start(ctx, etcdserver.Config{Dir: dir, QuotaBytes: cfg.EtcdQuotaBytes, Log: etcdLog})
		if errors.Is(err, etcdserver.ErrInUse) {
			return nil, fmt.Errorf("%w: another snapshotd runs on %s; end it, or choose another data_dir", ErrInUse, cfg.DataDir)
		}
		if err != nil {
			return nil, err
		}
		least.Store(int32(zapcore.WarnLevel))
		open.add(func() error {
			least.Store(int32(zapcore.FatalLevel))
			return srv.Close()
		})
		p.etcdErr, p.etcdRun, full = srv.Err(), srv.Run, srv.Full
		p.room.read = func(context.Context) ([]etcd.Usage, error) {
			u := etcd.Usage{Endpoint: "embedded", Full: srv.Full()}
			u.SizeBytes, u.InUseBytes, u.QuotaBytes = srv.Sizes()
			u.CountedBytes = u.InUseBytes // free pages are given back before they are short
			return []etcd.Usage{u}, nil
		}
		o.Endpoints = []string{srv.Endpoint()}
	} else {
		var err error
		if o.TLS, err = cfg.etcdTLS(log); err != nil {
			return nil, fmt.Errorf("etcd_tls: %w", err)
		}
		if o.Password, err = cfg.etcdPassword(); err != nil {
			return nil, fmt.Errorf("etcd_password_file: %w", err)
		}
		o.ReadPassword = cfg.etcdPassword
	}
	kv, err := etcd.Open(o)
	if err != nil {
		return nil, err
	}
	open.add(kv.Close)
	p.tooOld = kv.TooOld
	if err := kv.Check(ctx); err != nil {
		return nil, err
	}
	if err := checkAccess(ctx, kv); err != nil {
		return nil, fmt.Errorf("check the rights at etcd, below %s: %w", cfg.EtcdRoot, err)
	}
	if full != nil {
		return reserve.New(kv, full, keys.RolledBack, keys.Epoch, keys.Clock), nil
	}
	p.room.read = nearlyFull(kv.Usage)
	p.history = &history{kv: kv, log: log, now: time.Now}
	if cfg.EtcdCompact {
		p.history.compact = kv.Compact
	}
	return reserve.New(kv, p.room.full, keys.RolledBack, keys.Epoch, keys.Clock), nil
}

// run starts everything. Whatever ends first ends all, in order: the service is
// said to go, calls under way get their grace, then the loops end, then what
// they stand on is closed.
func (s *Server) run(ctx context.Context, cfg Config, p *parts, tcp, inside, metrics net.Listener, open closers) {
	stop := make(chan struct{})
	s.stop = sync.OnceFunc(func() { close(stop) })
	group, failed := errgroup.WithContext(ctx)
	loops, endLoops := context.WithCancel(ctx)
	group.Go(func() error {
		err := p.manager.Run(loops)
		if err == nil && loops.Err() == nil {
			err = errors.New("ended by itself")
		}
		return wrap("background work", err)
	})
	for _, store := range p.stores {
		group.Go(func() error { return store.Run(loops) })
	}
	if p.etcdRun != nil {
		group.Go(func() error { return p.etcdRun(loops) })
	}
	group.Go(func() error { return wrap("gRPC service", p.server.Serve(tcp)) })
	group.Go(func() error { return wrap("gRPC service within the process", p.server.Serve(inside)) })
	// Before anybody can ask, or the loop that watches etcd say otherwise.
	p.server.SetServing(true)
	s.serving.Store(true)
	var web *http.Server
	if metrics != nil {
		loopback, _ := isLoopback(cfg.MetricsListen) // validated
		web = p.registry(loopback, s.unhealthy)
		group.Go(func() error {
			if err := web.Serve(metrics); !errors.Is(err, http.ErrServerClosed) {
				return wrap("metrics service", err)
			}
			return nil
		})
	}
	group.Go(func() error { s.watchEtcd(loops, p); return nil })
	if p.etcdErr != nil {
		group.Go(func() error {
			select {
			case err := <-p.etcdErr:
				return wrap("etcd", err)
			case <-loops.Done():
				return nil
			}
		})
	}
	group.Go(func() error {
		defer endLoops()
		select {
		case <-stop:
			p.log.Info("stopping", zap.Duration("grace", time.Duration(cfg.Grace)))
		case <-failed.Done():
			p.log.Error("stopping, for a part of the server has ended", zap.Error(context.Cause(failed)))
		}
		s.serving.Store(false)
		grace, cancel := context.WithTimeout(ctx, time.Duration(cfg.Grace))
		defer cancel()
		p.server.Stop(grace)
		if web != nil {
			return web.Close() // whoever reads metrics comes again
		}
		return nil
	})
	go func() { // the last to end, and Wait waits for it
		defer close(s.done)
		err := group.Wait()
		s.err = errors.Join(err, open.close())
	}()
}

func wrap(what string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Addr returns the address of the gRPC service, with the port that it has.
func (s *Server) Addr() string { return s.addr }

// MetricsAddr returns the address of the metrics, empty without.
func (s *Server) MetricsAddr() string { return s.metricsAddr }

// Conn returns a connection that does not leave the process. Its calls pass the
// same checks as all others. It is closed with the server; do not close it.
func (s *Server) Conn() *grpc.ClientConn { return s.conn }

// Wait waits until the server has ended and returns why: nil after Close, or
// the error of the part that failed.
func (s *Server) Wait() error {
	<-s.done
	return s.err
}

// Close ends the server and waits for it: no new calls, Grace for those under
// way, then the rest. It returns what Wait does. Closing twice is the same as
// once.
func (s *Server) Close() error {
	s.stop()
	return s.Wait()
}

// closers are what to close, in the order of opening.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

// close closes the last opened first.
func (c closers) close() error {
	var errs []error
	for _, f := range slices.Backward(c) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// ignoreClosed makes a close of what its user has closed already a success.
func ignoreClosed(f func() error) func() error {
	return func() error {
		if err := f(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// replicaName makes a name that no other process has.
func replicaName() string {
	host, err := os.Hostname()
	if err != nil {
		host = "host"
	}
	host = strings.Map(func(r rune) rune {
		if r == '.' || r == '-' || r >= '0' && r <= '9' || r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' {
			return r
		}
		return '_'
	}, host)
	return fmt.Sprintf("%.64s-%d-%.6s", host, os.Getpid(), strings.ToLower(rand.Text()))
}
