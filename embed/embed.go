// Package embed runs snapshotd inside a Go process. The program snapshotd is a thin
// layer over this package.
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
// The zero [Config] keeps all data, etcd included, under one directory. With etcd
// endpoints any number of processes form a cluster.
package embed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/snapshotd/snapshotd/internal/catalog"
)

// ErrInUse reports that another process, or another server of this process, uses the
// data directory.
var ErrInUse = errors.New("data directory in use")

const insideBuffer = 1 << 20 // bytes of the connection within the process

// startTimeout bounds a start from the moment when etcd answers. The start of etcd in
// this process has no bound: it reads all its data.
var startTimeout = time.Minute

// Server is a running snapshotd. Create it with [Start]. Its methods are safe for
// concurrent use.
type Server struct {
	addr, metricsAddr string
	conn              *grpc.ClientConn
	serving           atomic.Bool            // between the start and the stop
	etcdLost          atomic.Pointer[string] // reason, set by watchEtcd; nil: etcd is usable
	stop              func()
	done              chan struct{} // closed after the end of all parts
	err               error         // of the parts; set before done is closed
}

// Start starts snapshotd and returns when it serves. The end of ctx ends an
// unfinished start; only Close ends a started server. All errors of the configuration
// are returned together. A data directory in use is [ErrInUse].
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
	// Runs once in the life of a cluster. Its duration grows with the catalog.
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

// Bounds on the log of disputed ids.
const (
	maxDisputes  = 100 // ids with a line each
	maxClaimants = 20  // collections named per id
)

// claimAll claims the ids of segments and builds that were registered before claims
// existed, and logs the disputed ones.
func claimAll(ctx context.Context, cat *catalog.Catalog, log *zap.Logger) error {
	disputes, err := cat.ClaimAll(ctx)
	if err != nil {
		return err
	}
	for _, d := range disputes[:min(len(disputes), maxDisputes)] {
		log.Warn("disputed id: no file of its segment is deleted, in any of the collections",
			zap.Int64("id", d.ID), zap.Bool("index_build", d.Part),
			zap.Int64s("collections", d.Collections[:min(len(d.Collections), maxClaimants)]),
			zap.Int("claimants", len(d.Collections)))
	}
	if len(disputes) > maxDisputes {
		log.Warn("more disputed ids", zap.Int("ids", len(disputes)), zap.Int("logged", maxDisputes))
	}
	return nil
}

// mode returns "embedded" with etcd in this process, otherwise "cluster".
func (c Config) mode() string {
	if len(c.EtcdEndpoints) == 0 {
		return "embedded"
	}
	return "cluster"
}

// run starts all parts. The first part that ends stops all others, in this order:
// health checks report NOT_SERVING, running calls get the grace time, the loops end,
// and the opened resources are closed.
func (s *Server) run(ctx context.Context, cfg Config, p *parts, tcp, inside, metrics net.Listener, open closers) {
	stop := make(chan struct{})
	s.stop = sync.OnceFunc(func() { close(stop) })
	group, failed := errgroup.WithContext(ctx)
	loops, endLoops := context.WithCancel(ctx)
	group.Go(func() error {
		err := p.replica.Run(loops, p.manager)
		if err == nil && loops.Err() == nil {
			err = errors.New("ended without a stop")
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
	// Before the first health check and the first tick of watchEtcd.
	p.server.SetServing(true)
	s.serving.Store(true)
	var web *http.Server
	if metrics != nil {
		loopback, _ := isLoopback(cfg.MetricsListen) // validated
		web = p.web(loopback, s.unhealthy)
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
			p.log.Error("stopping: a part of the server ended", zap.Error(context.Cause(failed)))
		}
		s.serving.Store(false)
		grace, cancel := context.WithTimeout(ctx, time.Duration(cfg.Grace))
		defer cancel()
		p.server.Stop(grace)
		if web != nil {
			return web.Close() // scrapers retry
		}
		return nil
	})
	go func() { // Wait waits for its end
		defer close(s.done)
		err := group.Wait()
		s.err = errors.Join(err, open.close())
	}()
}

func wrap(part string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s: %w", part, err)
}

// Addr returns the address of the gRPC service, with its actual port.
func (s *Server) Addr() string { return s.addr }

// MetricsAddr returns the address of the metrics; empty: they are off.
func (s *Server) MetricsAddr() string { return s.metricsAddr }

// Conn returns a connection within the process. Its calls pass the same checks as all
// others. The server closes it; do not close it.
func (s *Server) Conn() *grpc.ClientConn { return s.conn }

// Wait waits for the end of the server and returns nil after Close, or the error of
// the part that failed.
func (s *Server) Wait() error {
	<-s.done
	return s.err
}

// Close stops the server and waits for its end: new calls are refused, running calls
// have Grace to finish, then all parts end. It returns the result of Wait. Further
// calls return the same.
func (s *Server) Close() error {
	s.stop()
	return s.Wait()
}

// closers are the close functions of opened resources, in the order of opening.
type closers []func() error

func (c *closers) add(f func() error) { *c = append(*c, f) }

// close closes the resources, the last opened first.
func (c closers) close() error {
	var errs []error
	for _, f := range slices.Backward(c) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// ignoreClosed wraps a close function; closing a closed listener is no error.
func ignoreClosed(f func() error) func() error {
	return func() error {
		if err := f(); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	}
}

// replicaName returns a unique name for this process.
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
