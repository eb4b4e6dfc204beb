// Package server implements the gRPC services of snapshotd: it converts messages into
// calls of the packages below it, and their errors into statuses. Permissions, page tokens,
// the limits of connections and the sizes of messages are its own; all else is theirs.
//
// Every call passes, outermost first: a request id, one line in the log, the
// metrics, recovery from panics, a deadline, authentication and authorization, the
// rules of the API, and the table that maps errors to statuses.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"time"

	"buf.build/go/protovalidate"
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Limits of a client.
const (
	maxMessage = 4 << 20 // bytes of a received message
	// hardMessage is gRPC's own limit in bytes. gRPC refuses a larger message without a
	// reason and without a line in the log.
	hardMessage = 8 << 20
	// maxSend is gRPC's limit on a sent message, in bytes. Data registered by this
	// release stay below maxMessage; segments of older releases may be larger, for
	// clients that accept them.
	maxSend       = 64 << 20
	maxHeaderList = 16 << 10 // bytes of metadata
	maxStreams    = 256      // concurrent calls on one connection
	// maxExports is the number of concurrent exports. Each holds some 14 MiB until its
	// client has read all, for up to sendTimeout per message.
	maxExports = 8
	// exportWait is the time that a further export waits for one to end.
	exportWait = 5 * time.Second
)

// Options configures a Server. The zero value of a field means its default.
type Options struct {
	Manager   *manager.Manager
	GC        *gc.GC
	Collector *collect.Collector
	Jobs      *copyjob.Jobs
	Catalog   *catalog.Catalog
	Cluster   cluster.Cluster
	KV        meta.KV // of GetKey
	Log       *zap.Logger
	// Registry gets the metrics of calls. Default: none.
	Registry *prometheus.Registry
	// TLS secures the connections. Default: plaintext.
	TLS *tls.Config

	Version       string   // of the program
	Replica       string   // name of this process
	Stores        []string // aliases
	SnapshotStore string   // alias

	// MaxConnections bounds the open connections; one other host gets half as many.
	// Further connections wait for up to connectTimeout. Default: 1024.
	MaxConnections int
}

// Server is the gRPC server. Create it with New. It is safe for concurrent use.
type Server struct {
	grpc      *grpc.Server
	health    *health.Server
	log       *zap.Logger
	manager   *manager.Manager
	validator protovalidate.Validator
	conns     *connections
	// stopping ends at Stop; it ends streams without an end of their own.
	stopping context.Context //nolint:containedctx // the lifetime of the server, not of a call
	stop     context.CancelFunc
}

// New returns a server that is NOT_SERVING; see SetServing.
func New(o Options) (*Server, error) {
	if o.MaxConnections <= 0 {
		o.MaxConnections = 1024
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	validator, err := newValidator()
	if err != nil {
		return nil, err
	}
	s := &Server{
		log: o.Log, manager: o.Manager, validator: validator, conns: newConnections(o.MaxConnections, o.Log),
		health: health.NewServer(),
	}
	s.stopping, s.stop = context.WithCancel(context.Background())

	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram(
		grpcprom.WithHistogramBuckets([]float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60, 300, 900})))
	opts := append(s.chain(metrics),
		grpc.Creds(&countedCredentials{transport(o.TLS), s.conns}),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(hardMessage),
		grpc.MaxSendMsgSize(maxSend),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: 15 * time.Minute,
			// Ends the watches of peers that disappeared.
			Time: 2 * time.Minute, Timeout: 20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	s.grpc = grpc.NewServer(opts...)

	tokens := pageTokenCodec{o.Cluster.TokenKey}
	pb.RegisterSnapshotServiceServer(s.grpc, &snapshots{manager: o.Manager, jobs: o.Jobs, tokens: tokens})
	pb.RegisterCatalogServiceServer(s.grpc,
		&catalogs{catalog: o.Catalog, tokens: tokens, exports: make(slots, maxExports)})
	pb.RegisterEventServiceServer(s.grpc, &events{manager: o.Manager, catalog: o.Catalog, tokens: tokens})
	pb.RegisterReclaimServiceServer(s.grpc, &reclaims{manager: o.Manager, gc: o.GC, catalog: o.Catalog, tokens: tokens})
	pb.RegisterCollectorServiceServer(s.grpc, &collectors{
		manager: o.Manager, gc: o.GC, collector: o.Collector, snapshotStore: o.SnapshotStore,
	})
	pb.RegisterAdminServiceServer(s.grpc, &admin{
		manager: o.Manager, cluster: o.Cluster, kv: o.KV, tokens: tokens,
		version: o.Version, replica: o.Replica, stores: o.Stores, snapshotStore: o.SnapshotStore,
	})
	healthpb.RegisterHealthServer(s.grpc, s.health)
	reflection.Register(s.grpc)
	s.SetServing(false)

	if o.Registry != nil {
		if err := o.Registry.Register(metrics); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
		if err := s.conns.register(o.Registry); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	metrics.InitializeMetrics(s.grpc)
	return s, nil
}

// SetServing sets the answer of health checks. After Stop it is always NOT_SERVING.
func (s *Server) SetServing(ready bool) {
	state := healthpb.HealthCheckResponse_NOT_SERVING
	if ready {
		state = healthpb.HealthCheckResponse_SERVING
	}
	s.health.SetServingStatus("", state)
	for name := range s.grpc.GetServiceInfo() {
		s.health.SetServingStatus(name, state)
	}
}

// Serve serves the connections of l until Stop and then returns nil; after Stop it
// returns nil immediately. It may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(s.conns.listen(l)); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop sets the health checks to NOT_SERVING, refuses new connections and calls, ends
// watches, and waits for the other calls. The end of ctx ends these as well.
func (s *Server) Stop(ctx context.Context) {
	s.health.Shutdown()
	s.stop()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.grpc.GracefulStop()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		s.grpc.Stop()
		<-done
	}
}

// requests returns the request messages of all methods.
func requests() ([]proto.Message, error) {
	var list []proto.Message
	for _, file := range []protoreflect.FileDescriptor{
		pb.File_snapshotd_v1_snapshot_service_proto, pb.File_snapshotd_v1_catalog_service_proto,
		pb.File_snapshotd_v1_event_service_proto, pb.File_snapshotd_v1_reclaim_service_proto,
		pb.File_snapshotd_v1_collector_service_proto,
		pb.File_snapshotd_v1_admin_service_proto,
	} {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				t, err := protoregistry.GlobalTypes.FindMessageByName(methods.Get(j).Input().FullName())
				if err != nil {
					return nil, err
				}
				list = append(list, t.Zero().Interface())
			}
		}
	}
	return list, nil
}

// transport returns the credentials of connections. Connections within the process
// are plaintext.
func transport(config *tls.Config) credentials.TransportCredentials {
	plain := insecure.NewCredentials()
	if config == nil {
		return plain
	}
	return &localPlaintext{credentials.NewTLS(config), plain}
}

// localPlaintext uses plaintext for connections within the process.
type localPlaintext struct {
	credentials.TransportCredentials
	plain credentials.TransportCredentials
}

func (u *localPlaintext) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if conn.LocalAddr().Network() == "bufconn" {
		return u.plain.ServerHandshake(conn)
	}
	return u.TransportCredentials.ServerHandshake(conn)
}

func (u *localPlaintext) Clone() credentials.TransportCredentials {
	return &localPlaintext{u.TransportCredentials.Clone(), u.plain.Clone()}
}
