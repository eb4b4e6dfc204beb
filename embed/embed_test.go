package embed_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/embed"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// small returns the zero configuration on free ports, in a temporary directory.
func small(t *testing.T) embed.Config {
	t.Helper()
	return embed.Config{DataDir: t.TempDir(), Listen: "127.0.0.1:0", MetricsListen: "127.0.0.1:0", Log: zap.NewNop()}
}

func start(t *testing.T, cfg embed.Config) *embed.Server {
	t.Helper()
	s, err := embed.Start(t.Context(), cfg)
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

func dial(t *testing.T, addr string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func get(t *testing.T, url string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func createCollection(ctx context.Context, conn grpc.ClientConnInterface, name string) error {
	_, err := pb.NewCatalogServiceClient(conn).CreateCollection(ctx, &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Name: name}, Roots: []*pb.Root{{Prefix: name + "/"}},
	})
	return err
}

func names(t *testing.T, conn grpc.ClientConnInterface) string {
	t.Helper()
	resp, err := pb.NewSnapshotServiceClient(conn).ListSnapshots(t.Context(), &pb.ListSnapshotsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var list []string
	for _, s := range resp.GetSnapshots() {
		list = append(list, s.GetName())
	}
	return strings.Join(list, " ")
}

func TestEmbedded(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	cfg := small(t)
	cfg.Log = zap.New(core)
	s := start(t, cfg)
	tcp := dial(t, s.Addr(), insecure.NewCredentials())
	for conn, name := range map[*grpc.ClientConn]string{s.Conn(): "inside", tcp: "outside"} {
		if err := createCollection(t.Context(), conn, name); err != nil {
			t.Fatal(err)
		}
		if _, err := pb.NewSnapshotServiceClient(conn).CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{
			Name: "of-" + name, Collection: &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: name}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	health, err := healthpb.NewHealthClient(tcp).Check(t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("got %v, %v", health, err)
	}
	for path, want := range map[string]string{
		"/metrics":      `snapshotd_snapshots{state="committed"}`,
		"/healthz":      "ok",
		"/debug/pprof/": "goroutine",
	} {
		if code, body := get(t, "http://"+s.MetricsAddr()+path); code != http.StatusOK || !strings.Contains(body, want) {
			t.Errorf("%s: got %d %.200q", path, code, body)
		}
	}
	_, metrics := get(t, "http://"+s.MetricsAddr()+"/metrics")
	for _, name := range []string{
		"snapshotd_leader", "snapshotd_creates_in_flight", "snapshotd_unreadable_records", "snapshotd_clock_skew_seconds",
		`snapshotd_gc_deleted_objects_total{reason="restore"} 0`, `snapshotd_gc_deleted_bytes_total{reason="unit"} 0`,
		"snapshotd_metadata_behind 0",
		`snapshotd_problem_lasts_seconds{problem="election"} 0`,
		`snapshotd_problem_lasts_seconds{problem="restore assignment"} 0`,
		`snapshotd_problem_lasts_seconds{problem="restore worker"} 0`,
		`snapshotd_problem_lasts_seconds{problem="follow snapshots"} 0`,
		`snapshotd_problem_lasts_seconds{problem="follow references"} 0`,
		`snapshotd_problem_lasts_seconds{problem="follow tombstones"} 0`,
		`snapshotd_problem_lasts_seconds{problem="follow restores"} 0`,
		`snapshotd_problem_failures_total{problem="follow workers"} 0`,
		"grpc_server_handled_total", "go_goroutines", "process_open_fds",
	} {
		if !strings.Contains(metrics, "\n"+name) {
			t.Errorf("no metric %s", name)
		}
	}
	started := logs.FilterMessage("started").All()
	if len(started) != 1 || started[0].ContextMap()["listen"] != s.Addr() ||
		started[0].ContextMap()["mode"] != "embedded" {
		t.Errorf("logged %v", started)
	}

	other := cfg
	other.Log = zap.NewNop()
	if _, err := embed.Start(t.Context(), other); !errors.Is(err, embed.ErrInUse) ||
		!strings.Contains(err.Error(), cfg.DataDir) {
		t.Errorf("a second server: got %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := s.Wait(); err != nil {
		t.Error(err)
	}
	if _, err := pb.NewSnapshotServiceClient(s.Conn()).ListSnapshots(t.Context(), &pb.ListSnapshotsRequest{}); err == nil {
		t.Error("no error from a closed server")
	}

	s = start(t, cfg)
	if got := names(t, s.Conn()); !strings.Contains(got, "of-inside") || !strings.Contains(got, "of-outside") {
		t.Errorf("after a restart: %q", got)
	}
	scope := cfg
	scope.NameScope = "collection"
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := embed.Start(t.Context(), scope); err == nil || !strings.Contains(err.Error(), "name_scope") {
		t.Errorf("another name scope: got %v", err)
	}
}

func TestAddressInUse(t *testing.T) {
	first := start(t, small(t))
	cfg := small(t)
	cfg.Listen = first.Addr()
	if _, err := embed.Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "listen") {
		t.Errorf("got %v", err)
	}
	// The failed start has closed its resources.
	cfg.Listen, cfg.MetricsListen = "127.0.0.1:0", "off"
	if s := start(t, cfg); s.MetricsAddr() != "" {
		t.Errorf("metrics at %s", s.MetricsAddr())
	}
}

// TestGrace closes the server during a call that does not end.
func TestGrace(t *testing.T) {
	cfg := small(t)
	cfg.Grace = embed.Duration(10 * time.Millisecond)
	s := start(t, cfg)
	if err := createCollection(t.Context(), s.Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	stream, err := pb.NewCatalogServiceClient(s.Conn()).AddSegments(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&pb.AddSegmentsRequest{Collection: &pb.CollectionRef{
		Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: "c"}},
	}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := stream.CloseAndRecv(); err == nil {
		t.Error("no error from the interrupted call")
	}
}

// TestCluster has two replicas on one etcd and one directory of objects.
func TestCluster(t *testing.T) {
	store := etcdtest.Start(t)
	objects := t.TempDir()
	var servers []*embed.Server
	for _, name := range []string{"a", "b"} {
		cfg := small(t)
		cfg.EtcdEndpoints = []string{store.Endpoint()}
		cfg.ObjectStores = map[string]embed.ObjectStore{"default": {Path: objects}}
		cfg.Replica = name
		servers = append(servers, start(t, cfg))
	}
	// A third replica with another default directory, by configuration or by default,
	// cannot join them.
	for _, stores := range []map[string]embed.ObjectStore{{"default": {Path: t.TempDir()}}, nil} {
		cfg := small(t)
		cfg.EtcdEndpoints, cfg.ObjectStores = []string{store.Endpoint()}, stores
		if _, err := embed.Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), "object store default: ") ||
			!strings.Contains(err.Error(), "all replicas must reach the same store under the same alias") {
			t.Errorf("another directory: got %v", err)
		}
	}
	if err := createCollection(t.Context(), servers[0].Conn(), "c"); err != nil {
		t.Fatal(err)
	}
	for i, s := range servers {
		if _, err := pb.NewSnapshotServiceClient(s.Conn()).CreateSnapshot(t.Context(), &pb.CreateSnapshotRequest{
			Name:       "s" + string(rune('0'+i)),
			Collection: &pb.CollectionRef{Ref: &pb.CollectionRef_Name{Name: &pb.CollectionName{Name: "c"}}},
		}); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range servers {
		if got := names(t, s.Conn()); got != "s1 s0" {
			t.Errorf("got %q", got)
		}
	}
	if err := servers[0].Close(); err != nil {
		t.Error(err)
	}
	info, err := pb.NewAdminServiceClient(servers[1].Conn()).GetServerInfo(t.Context(), &pb.GetServerInfoRequest{})
	if err != nil || info.GetReplica() != "b" {
		t.Errorf("got %v, %v", info, err)
	}
}

// authority is a certificate authority.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	name string
}

func newAuthority(t *testing.T, dir, name string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir, name: name}
	a.key = a.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, a.key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.write(name+".pem", "CERTIFICATE", der)
	return a
}

func (a *authority) newKey() *ecdsa.PrivateKey {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	return key
}

func (a *authority) write(name, kind string, der []byte) {
	if err := os.WriteFile(filepath.Join(a.dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}),
		0o600); err != nil {
		a.t.Fatal(err)
	}
}

// issue writes name.pem and name-key.pem.
func (a *authority) issue(name string, edit func(*x509.Certificate)) tls.Certificate {
	a.t.Helper()
	key := a.newKey()
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	edit(template)
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.write(name+".pem", "CERTIFICATE", der)
	a.write(name+"-key.pem", "PRIVATE KEY", keyDER)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	trusted, other := newAuthority(t, dir, "trusted"), newAuthority(t, dir, "other")
	trusted.issue("server", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	core, logs := observer.New(zapcore.DebugLevel)
	cfg := small(t)
	cfg.Log = zap.New(core)
	cfg.Listen = "0.0.0.0:0" // allowed with TLS
	cfg.TLS = embed.TLS{
		Cert: filepath.Join(dir, "server.pem"), Key: filepath.Join(dir, "server-key.pem"),
		ClientCA: filepath.Join(dir, "trusted.pem"),
	}
	s := start(t, cfg)
	addr := "127.0.0.1" + s.Addr()[strings.LastIndex(s.Addr(), ":"):]
	pool := x509.NewCertPool()
	pool.AddCert(trusted.cert)
	config := func(certs ...tls.Certificate) *tls.Config {
		return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool, ServerName: "localhost", Certificates: certs}
	}
	asIs := func(*x509.Certificate) {}
	good := trusted.issue("client", asIs)
	old := config(good)
	old.MaxVersion = tls.VersionTLS12
	for _, tc := range []struct {
		name  string
		creds credentials.TransportCredentials
		ok    bool
	}{
		{"trusted", credentials.NewTLS(config(good)), true},
		{"none", credentials.NewTLS(config()), false},
		{"TLS 1.2", credentials.NewTLS(old), false},
		{"plaintext", insecure.NewCredentials(), false},
		{"another authority", credentials.NewTLS(config(other.issue("stranger", asIs))), false},
		{"a server's", credentials.NewTLS(config(trusted.issue("not-client", func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}))), false},
		{"expired", credentials.NewTLS(config(trusted.issue("expired",
			func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))), false},
		{"not yet valid", credentials.NewTLS(config(trusted.issue("early",
			func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }))), false},
		{"nameless", credentials.NewTLS(config(trusted.issue("nameless",
			func(c *x509.Certificate) { c.DNSNames, c.Subject = nil, pkix.Name{} }))), false},
	} {
		conn := dial(t, addr, tc.creds)
		_, err := pb.NewAdminServiceClient(conn).GetServerInfo(t.Context(), &pb.GetServerInfoRequest{})
		if (err == nil) != tc.ok {
			t.Errorf("%s: got %v", tc.name, err)
		}
		if code := status.Code(err); !tc.ok && code != codes.Unavailable && code != codes.Unauthenticated {
			t.Errorf("%s: got %v", tc.name, err)
		}
	}
	if n := logs.FilterMessage("call").FilterField(zap.String("principal", "localhost")).Len(); n != 1 {
		t.Errorf("%d calls by the certificate's name", n)
	}
	// The connection within the process needs no certificate.
	if _, err := pb.NewAdminServiceClient(s.Conn()).GetServerInfo(t.Context(), &pb.GetServerInfoRequest{}); err != nil {
		t.Error(err)
	}
}
