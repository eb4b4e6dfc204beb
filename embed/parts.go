package embed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
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

// parts are the components of a running server.
type parts struct {
	cfg      Config
	log      *zap.Logger
	problems *lasting.Problems
	cluster  cluster.Cluster
	catalog  *catalog.Catalog
	replica  *replica.Replica
	manager  *manager.Manager
	server   *server.Server
	etcdErr  <-chan error                    // nil in a cluster
	etcdRun  func(ctx context.Context) error // nil in a cluster
	space    *space
	history  *history // nil with etcd in this process
	kv       meta.KV
	tooOld   func() string // reason for which an etcd server is not used, or empty
	stores   map[string]*admit.Store
	ticks    <-chan time.Time // of watchEtcd
	web      func(profiles bool, unhealthy func() string) *http.Server
}

// openParts opens all parts except the listeners, and adds their close functions to
// open.
func openParts(ctx context.Context, cfg Config, log *zap.Logger, open *closers) (*parts, error) {
	p := &parts{cfg: cfg, log: log, problems: lasting.New(time.Now)}
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
	p.cluster, err = cluster.Open(ctx, kv, cluster.Options{
		NameScope: cfg.nameScope(), Release: cfg.Version, Now: time.Now, Rand: rand.Reader,
	})
	if err != nil {
		return nil, err
	}
	if p.stores, err = openStores(ctx, cfg, kv, p, open); err != nil {
		return nil, err
	}
	if err := p.openReplica(); err != nil {
		return nil, err
	}
	return p, p.openServer()
}

// newClock returns the source of trusted readings.
func (p *parts) newClock() *clock.Trusted {
	o := clock.Options{
		KV: p.kv, Clock: clock.System{}, Alias: p.cfg.SnapshotStore, Replica: p.cfg.Replica, Log: p.log.Named("clock"),
		MaxDowntime: time.Duration(p.cfg.ClockMaxDowntime), Problems: p.problems,
	}
	if p.cfg.ObjectStores[p.cfg.SnapshotStore].Type == typeS3 { // a directory has the clock of this host
		o.Store = p.stores[p.cfg.SnapshotStore]
	}
	return clock.New(o)
}

// openReplica makes the catalog, the parts of the replica and the manager.
func (p *parts) openReplica() error {
	cfg := &p.cfg
	stores, ready := map[string]object.Store{}, map[string]<-chan struct{}{}
	for alias, s := range p.stores {
		stores[alias], ready[alias] = s, s.Ready()
	}
	trusted := p.newClock()
	requests := request.NewLeases(p.kv, time.Now, trusted.Stamp)
	history := epoch.New(epoch.Options{
		KV: p.kv, Store: stores[cfg.SnapshotStore], Cluster: p.cluster.ID, Now: time.Now, Rand: rand.Reader,
		Log: p.log.Named("epoch"), Problems: p.problems,
	})
	p.catalog = catalog.New(catalog.Options{
		KV: p.kv, Now: time.Now, Stamp: trusted.Stamp, Rand: rand.Reader, Requests: requests, RaiseIDs: history.RaiseIDLimit,
		HasStore:    func(alias string) bool { _, ok := stores[alias]; return ok },
		ReadSpilled: catalog.ReadSpilled(stores), Spill: catalog.WriteSpilled(stores, cfg.SnapshotStore),
		AllowReserve:  cfg.AllowReserveIDs,
		MaxGoneRanges: cfg.GoneIDRanges, GoneGapAge: time.Duration(cfg.GoneIDAge),
	})
	var err error
	p.replica, err = replica.New(replica.Options{
		Shared: replica.Shared{
			KV: p.kv, Catalog: p.catalog, Stores: stores, SnapshotStore: cfg.SnapshotStore, Ready: ready,
			Requests: requests, Epoch: history, Replica: cfg.Replica, Now: time.Now, Clock: trusted, Rand: rand.Reader,
			Log: p.log.Named("manager"), Problems: p.problems,
		},
		LeaderTTL: time.Duration(cfg.LeaderTTL), Rate: cfg.CollectRate,
		Slots: cfg.RestoreSlots, CopyInFlight: cfg.CopyInFlight, KeepRestores: time.Duration(cfg.KeepRestores),
		StallTimeout:   time.Duration(cfg.RestoreStallTimeout),
		RefusalTimeout: time.Duration(cfg.RestoreRefusalTimeout),
		Collector: collect.Options{
			Off: cfg.Collector == collectorOff, Tolerance: time.Duration(cfg.CollectTolerance),
			Interval: time.Duration(cfg.CollectInterval), MaxShare: cfg.CollectMaxShare,
			OrphanGrace: time.Duration(cfg.OrphanGrace), SweepInterval: time.Duration(cfg.SweepInterval),
		},
	})
	if err != nil {
		return err
	}
	p.manager = manager.New(manager.Options{
		Shared: p.replica.Shared, Snapshots: p.replica.Snapshots, GC: p.replica.GC,
		Collector: p.replica.Collector, Jobs: p.replica.Jobs, Cluster: p.cluster, Release: cfg.Version,
		Features: func(ctx context.Context, alias string, again bool) (probe.Features, error) {
			return p.stores[alias].Features(ctx, again)
		},
		CreateTimeout: time.Duration(cfg.CreateTimeout), LeaseTTL: time.Duration(cfg.CreateLeaseTTL),
		MaxCreates: cfg.MaxCreates,
	})
	return nil
}

// openServer makes the gRPC server and the metrics.
func (p *parts) openServer() error {
	config, err := p.cfg.serverTLS(p.log)
	if err != nil {
		return err
	}
	registry := newRegistry()
	registry.MustRegister(stats{p.replica, p.manager, p.stores, p.problems}, p.space)
	p.web = func(profiles bool, unhealthy func() string) *http.Server {
		return metricsServer(registry, unhealthy, func() string { return degraded(p.stores) }, profiles)
	}
	p.server, err = server.New(server.Options{
		Manager: p.manager, GC: p.replica.GC, Collector: p.replica.Collector, Jobs: p.replica.Jobs,
		Catalog: p.catalog, Cluster: p.cluster, KV: p.kv, Log: p.log.Named("rpc"),
		Registry: registry, TLS: config, Version: p.cfg.Version, Replica: p.cfg.Replica, Stores: p.cfg.aliases(),
		SnapshotStore: p.cfg.SnapshotStore, MaxConnections: p.cfg.MaxConnections,
	})
	return err
}

// openMeta connects to etcd. In the embedded mode it starts etcd first.
func openMeta(ctx context.Context, cfg Config, log *zap.Logger, open *closers, p *parts) (meta.KV, error) {
	p.space = &space{log: log}
	full := p.space.full
	o := etcd.Options{
		Endpoints: cfg.EtcdEndpoints, Root: cfg.EtcdRoot, Username: cfg.EtcdUsername, Log: log.Named("etcd-client"),
	}
	if len(cfg.EtcdEndpoints) == 0 {
		srv, err := startEtcd(ctx, cfg, log, open, p)
		if err != nil {
			return nil, err
		}
		full = srv.Full
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
	if len(cfg.EtcdEndpoints) > 0 {
		p.space.read = nearlyFull(kv.Usage)
		p.history = &history{kv: kv, log: log, now: time.Now}
		if cfg.EtcdCompact {
			p.history.compact = kv.Compact
		}
	}
	return reserve.New(kv, full, keys.RolledBack, keys.Epoch, keys.Clock), nil
}

// startEtcd starts etcd in this process.
func startEtcd(
	ctx context.Context, cfg Config, log *zap.Logger, open *closers, p *parts,
) (*etcdserver.Server, error) {
	dir, err := filepath.Abs(filepath.Join(cfg.DataDir, "etcd"))
	if err != nil {
		return nil, fmt.Errorf("data_dir: %w", err)
	}
	slow := time.AfterFunc(10*time.Second, func() {
		log.Info("etcd is reading its data; a large database takes minutes", zap.String("dir", dir))
	})
	defer slow.Stop()
	etcdLog, minLevel := newEtcdLog(log.Named("etcd"))
	minLevel.Store(int32(zapcore.ErrorLevel))
	srv, err := etcdserver.Start(ctx, etcdserver.Config{Dir: dir, QuotaBytes: cfg.EtcdQuotaBytes, Log: etcdLog})
	if errors.Is(err, etcdserver.ErrInUse) {
		return nil, fmt.Errorf("%w: another snapshotd runs on %s; end it, or choose another data_dir", ErrInUse, cfg.DataDir)
	}
	if err != nil {
		return nil, err
	}
	minLevel.Store(int32(zapcore.WarnLevel))
	open.add(func() error {
		minLevel.Store(int32(zapcore.FatalLevel))
		return srv.Close()
	})
	p.etcdErr, p.etcdRun = srv.Err(), srv.Run
	p.space.read = func(context.Context) ([]etcd.Usage, error) {
		u := etcd.Usage{Endpoint: "embedded", Full: srv.Full()}
		u.SizeBytes, u.InUseBytes, u.QuotaBytes = srv.Sizes()
		u.CountedBytes = u.InUseBytes // etcdserver frees unused pages before space gets short
		return []etcd.Usage{u}, nil
	}
	return srv, nil
}
