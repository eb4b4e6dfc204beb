package embed

import (
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// manualServer is a server that checks etcd only at the ticks of a test.
type manualServer struct {
	t         *testing.T
	ticks     chan time.Time
	listeners []net.Listener
	conn      *grpc.ClientConn
	health    healthpb.HealthClient
}

// serve serves until the test ends. change may replace parts before the start.
func serve(t *testing.T, cfg Config, change func(*parts)) *manualServer {
	t.Helper()
	cfg = cfg.complete()
	var open closers
	p, err := openParts(t.Context(), cfg, cfg.Log, &open)
	if err != nil {
		t.Fatal(err)
	}
	s := &manualServer{t: t, ticks: make(chan time.Time)}
	p.ticks = s.ticks
	if change != nil {
		change(p)
	}
	var listen net.ListenConfig
	for range 3 {
		l, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		s.listeners = append(s.listeners, l)
	}
	srv := &Server{done: make(chan struct{})}
	srv.run(t.Context(), cfg, p, s.listeners[0], s.listeners[1], s.listeners[2], open)
	conn, err := grpc.NewClient(s.listeners[0].Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	s.conn, s.health = conn, healthpb.NewHealthClient(conn)
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if err := srv.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// tick makes the server check etcd. It blocks until the server has finished the check
// before.
func (s *manualServer) tick(count int) {
	for range count {
		s.ticks <- time.Time{}
	}
}

// healthz returns the answer of /healthz.
func (s *manualServer) healthz() (code int, body string) {
	s.t.Helper()
	req, err := http.NewRequestWithContext(s.t.Context(), http.MethodGet,
		"http://"+s.listeners[2].Addr().String()+"/healthz", nil)
	if err != nil {
		s.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp.StatusCode, string(text)
}

// state returns the answer of /healthz, and checks that gRPC agrees with it.
func (s *manualServer) state(when string) (code int, body string) {
	s.t.Helper()
	code, body = s.healthz()
	want := healthpb.HealthCheckResponse_SERVING
	if code != http.StatusOK {
		want = healthpb.HealthCheckResponse_NOT_SERVING
	}
	health, err := s.health.Check(s.t.Context(), &healthpb.HealthCheckRequest{})
	if err != nil || health.GetStatus() != want {
		s.t.Errorf("%s: got %v, %v; /healthz answers %s", when, health, err, body)
	}
	return code, body
}

func (s *manualServer) expect(when string, wantCode int, wantBody string) {
	s.t.Helper()
	if code, body := s.state(when); code != wantCode || body != wantBody {
		s.t.Errorf("%s: got %d %q", when, code, body)
	}
}

// await ticks until /healthz answers want.
func (s *manualServer) await(want string) {
	s.t.Helper()
	for range 1000 {
		s.tick(2)
		if _, body := s.healthz(); strings.Contains(body, want) {
			s.tick(1) // the check with this result has finished
			s.state(want)
			return
		}
	}
	_, body := s.state(want)
	s.t.Fatalf("/healthz answers %q, want %q", body, want)
}

// TestEtcdGone has etcd not answer for a while: a single failure changes nothing, two
// in a row do, and after an answer the server serves again.
func TestEtcdGone(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	var faulty *meta.Faulty
	s := serve(t, Config{DataDir: t.TempDir(), Replica: "r", Log: zap.New(core)}, func(p *parts) {
		faulty = meta.NewFaulty(p.kv)
		p.kv = faulty
	})
	const ok, gone = "ok\n", "not serving: etcd does not answer\n"
	s.tick(2)
	s.expect("at first", http.StatusOK, ok)
	faulty.FailNth(0, meta.Before)
	s.tick(3)
	s.expect("after one failure", http.StatusOK, ok)
	faulty.Hook(func(meta.Call) meta.Fault { return meta.Before })
	s.tick(4)
	s.expect("without etcd", http.StatusServiceUnavailable, gone)
	faulty.Hook(nil)
	s.tick(3)
	s.expect("with etcd again", http.StatusOK, ok)
	for message, level := range map[string]zapcore.Level{
		"not serving: etcd does not answer": zapcore.WarnLevel,
		"etcd is usable again: serving":     zapcore.InfoLevel,
	} {
		if got := logs.FilterMessage(message).All(); len(got) != 1 || got[0].Level != level {
			t.Errorf("%q is logged as %v", message, got)
		}
	}
}

// TestOldEtcd has a start fail at an old etcd. A running server does not serve while
// there is one, and does not end.
func TestOldEtcd(t *testing.T) {
	etcd := etcdtest.Shared(t)
	one, two := etcdproxy.Start(t, etcd.Endpoint()), etcdproxy.Start(t, etcd.Endpoint())
	cfg := Config{
		DataDir: t.TempDir(), Replica: "r", Log: zap.NewNop(), Listen: "127.0.0.1:0", MetricsListen: "off",
		EtcdEndpoints: []string{one.Endpoint(), two.Endpoint()}, EtcdRoot: "/" + rand.Text(),
	}
	two.Version("3.4.23")
	if _, err := Start(t.Context(), cfg); !errors.Is(err, meta.ErrTooOld) ||
		!strings.Contains(err.Error(), two.Endpoint()) {
		t.Fatalf("start: got error %v, want one that names %s", err, two.Endpoint())
	}
	two.Stop() // a start ignores a server that does not answer
	s := serve(t, cfg, nil)
	s.await("ok")
	two.Restart(t)
	s.await("not serving: the etcd 3.4.23 at " + two.Endpoint())
	two.Stop()
	two.Version("")
	two.Restart(t)
	s.await("ok")
}

// create makes a collection.
func (s *manualServer) create(name string) error {
	_, err := pb.NewCatalogServiceClient(s.conn).CreateCollection(s.t.Context(), &pb.CreateCollectionRequest{
		Name: &pb.CollectionName{Name: name}, Roots: []*pb.Root{{Prefix: name + "/"}},
	})
	return err
}

// reasonOf returns the reason of a call's error, empty for none.
func reasonOf(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.GetReason()
		}
	}
	return ""
}

// TestEtcdDenies has a user of etcd with rights on the root alone. Without these rights a
// start fails and a running server does not serve.
func TestEtcdDenies(t *testing.T) {
	etcd := etcdtest.Start(t)
	password := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(password, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	etcd.Restrict(t, "snap", "secret", "/snapshotd/")
	cfg := Config{
		DataDir: t.TempDir(), Replica: "r", Log: zap.NewNop(), Listen: "127.0.0.1:0", MetricsListen: "off",
		EtcdEndpoints: []string{etcd.Endpoint()}, EtcdUsername: "snap", EtcdPasswordFile: password,
	}
	elsewhere := cfg
	elsewhere.EtcdRoot = "/other"
	if _, err := Start(t.Context(), elsewhere); !errors.Is(err, meta.ErrDenied) ||
		!strings.Contains(err.Error(), "/other") {
		t.Errorf("start under another root: got error %v, want denied", err)
	}
	s := serve(t, cfg, nil)
	s.await("ok")
	etcd.Allow(t, "snap", "/snapshotd/", false)
	if got := reasonOf(s.create("denied")); got != "METADATA_STORE_DENIED" {
		t.Errorf("a call without the right to write: got reason %q", got)
	}
	s.await("not serving: etcd denies access")
	etcd.Allow(t, "snap", "/snapshotd/", true)
	s.await("ok")
	if err := s.create("granted"); err != nil {
		t.Errorf("a call with the right restored: %v", err)
	}
	etcd.Password(t, "snap", "another")
	began := time.Now()
	if _, err := Start(t.Context(), cfg); !errors.Is(err, meta.ErrDenied) || time.Since(began) > 30*time.Second {
		t.Errorf("start with a wrong password: got error %v after %v, want denied", err, time.Since(began))
	}
	if got := reasonOf(s.create("password")); got != "METADATA_STORE_DENIED" {
		t.Errorf("a call with a wrong password: got reason %q", got)
	}
	// The password at etcd has changed. Once the file has the new one the server serves
	// again, without a restart.
	s.await("not serving: etcd denies access")
	if err := os.WriteFile(password, []byte("another\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.await("ok")
	// A file that changes before the password at etcd denies nothing.
	if err := os.WriteFile(password, []byte("a third\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	etcd.Stop(t)
	etcd.Restart(t)
	s.await("ok")
	etcd.Password(t, "snap", "a third")
	s.await("ok")
}
