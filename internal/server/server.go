// Package server is the gRPC face of snapshotd: it turns messages into calls of
// the manager and the catalog, and their errors into statuses. It decides
// nothing; what a call means is theirs.
//
// Every call passes, outermost first: a request id, one line in the log, the
// metrics, recovery from panics, a deadline, who calls and whether he may, the
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
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Limits on what a client may take.
const (
	maxMessage = 4 << 20 // bytes of a message received
	// hardMessage is what gRPC itself takes, which refuses without a reason and
	// before anything is logged.
	hardMessage = 8 << 20
	// maxSend is what gRPC sends at most, in bytes. What is registered by this release
	// stays beneath maxMessage; segments of older ones may be larger, for clients that
	// take as much.
	maxSend       = 64 << 20
	maxHeaderList = 16 << 10 // bytes of metadata
	maxStreams    = 256      // calls at once on one connection
	// maxExports is how many exports are under way at once. Each holds some 14 MiB
	// for as long as its reader takes, up to sendTimeout a message.
	maxExports = 8
	// exportWait is how long a further one waits for its turn.
	exportWait = 5 * time.Second
)

// Options are what New needs. The zero value of a field means the default
// beside it.
type Options struct {
	Manager *manager.Manager
	Catalog *catalog.Catalog
	Cluster cluster.Cluster
	KV      meta.KV // for looking at records
	Log     *zap.Logger
	// Registry gets the metrics of calls. Default: none does.
	Registry *prometheus.Registry
	// TLS is how connections are secured. Default: not at all.
	TLS *tls.Config

	Version       string   // of this program
	Replica       string   // who answers
	Stores        []string // aliases
	SnapshotStore string   // alias

	// MaxConnections is how many there may be at once, of another host half as many;
	// others wait a little. Default 1024.
	MaxConnections int
}

// Server is the gRPC server. Use New.
type Server struct {
	grpc      *grpc.Server
	health    *health.Server
	log       *zap.Logger
	manager   *manager.Manager
	validator protovalidate.Validator
	conns     *connections
	// stopping ends with Stop, and with it what would not end by itself.
	stopping context.Context //nolint:containedctx // the server's own life, not a call's
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
	s := &Server{log: o.Log, manager: o.Manager, validator: validator, conns: newConnections(o.MaxConnections, o.Log), health: health.NewServer()}
	s.stopping, s.stop = context.WithCancel(context.Background())

	metrics := grpcprom.NewServerMetrics(grpcprom.WithServerHandlingTimeHistogram(
		grpcprom.WithHistogramBuckets([]float64{.001, .005, .01, .05, .1, .5, 1, 5, 10, 60, 300, 900})))
	opts := append(s.chain(metrics),
		grpc.Creds(&counting{transport(o.TLS), s.conns}),
		grpc.ForceServerCodecV2(newCodec()),
		grpc.MaxRecvMsgSize(hardMessage),
		grpc.MaxSendMsgSize(maxSend),
		grpc.MaxHeaderListSize(maxHeaderList),
		grpc.MaxConcurrentStreams(maxStreams),
		grpc.ConnectionTimeout(connectTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			MaxConnectionIdle: 15 * time.Minute,
			// Finds a peer that vanished, whose watch would stay for ever.
			Time: 2 * time.Minute, Timeout: 20 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 10 * time.Second, PermitWithoutStream: true}),
	)
	s.grpc = grpc.NewServer(opts...)

	tokens := sealer{o.Cluster.TokenKey}
	pb.RegisterSnapshotServiceServer(s.grpc, &snapshots{manager: o.Manager, tokens: tokens})
	pb.RegisterCatalogServiceServer(s.grpc, &catalogs{catalog: o.Catalog, tokens: tokens, exports: make(slots, maxExports)})
	pb.RegisterEventServiceServer(s.grpc, &events{manager: o.Manager, catalog: o.Catalog, tokens: tokens})
	pb.RegisterReclaimServiceServer(s.grpc, &reclaims{manager: o.Manager, catalog: o.Catalog, tokens: tokens})
	pb.RegisterCollectorServiceServer(s.grpc, &collectors{manager: o.Manager, snapshotStore: o.SnapshotStore})
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

// SetServing says to health checks whether the server is ready for calls. After
// Stop it never is.
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

// Serve answers the connections of l until Stop, and then returns nil, as it
// does at once after Stop. It may be called for several listeners.
func (s *Server) Serve(l net.Listener) error {
	if err := s.grpc.Serve(s.conns.listen(l)); !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// Stop tells health checks that the end is near, takes no more connections and
// calls, ends the streams that would not end by themselves, and waits for the
// other calls until ctx ends, which ends them too.
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

// requests are all messages that a client may send us.
func requests() ([]proto.Message, error) {
	var list []proto.Message
	for _, file := range []protoreflect.FileDescriptor{
		pb.File_snapshotd_v1_snapshot_service_proto, pb.File_snapshotd_v1_catalog_service_proto,
		pb.File_snapshotd_v1_event_service_proto, pb.File_snapshotd_v1_reclaim_service_proto, pb.File_snapshotd_v1_collector_service_proto,
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

// transport returns how connections are secured. Those from within the process
// never are: what they carry does not leave it.
func transport(config *tls.Config) credentials.TransportCredentials {
	plain := insecure.NewCredentials()
	if config == nil {
		return plain
	}
	return &unlessInside{credentials.NewTLS(config), plain}
}

type unlessInside struct {
	credentials.TransportCredentials
	plain credentials.TransportCredentials
}

func (u *unlessInside) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if conn.LocalAddr().Network() == "bufconn" {
		return u.plain.ServerHandshake(conn)
	}
	return u.TransportCredentials.ServerHandshake(conn)
}

func (u *unlessInside) Clone() credentials.TransportCredentials {
	return &unlessInside{u.TransportCredentials.Clone(), u.plain.Clone()}
}
