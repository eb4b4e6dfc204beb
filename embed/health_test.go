package embed

import (
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestEtcdGone has etcd not answer for a while: one failure changes nothing, two
// do, and an answer brings the server back.
func TestEtcdGone(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	cfg := Config{DataDir: t.TempDir(), Replica: "r", Log: zap.New(core)}.complete()
	var open closers
	p, err := openParts(t.Context(), cfg, cfg.Log, &open)
	if err != nil {
		t.Fatal(err)
	}
	faulty, ticks := meta.NewFaulty(p.kv), make(chan time.Time)
	p.kv, p.ticks = faulty, ticks
	var listen net.ListenConfig
	var listeners []net.Listener
	for range 3 {
		l, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		listeners = append(listeners, l)
	}
	s := &Server{done: make(chan struct{})}
	s.run(t.Context(), cfg, p, listeners[0], listeners[1], listeners[2], open)
	conn, err := grpc.NewClient(listeners[0].Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()

	// A tick is taken when the one before has been dealt with.
	tick := func(count int) {
		for range count {
			ticks <- time.Time{}
		}
	}
	look := func(when string, wantCode int, wantBody string, want healthpb.HealthCheckResponse_ServingStatus) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+listeners[2].Addr().String()+"/healthz", nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != wantCode || string(body) != wantBody {
			t.Errorf("%s: got %d %q, %v", when, resp.StatusCode, body, err)
		}
		health, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{})
		if err != nil || health.GetStatus() != want {
			t.Errorf("%s: got %v, %v", when, health, err)
		}
	}
	const ok, gone = "ok\n", "not serving: etcd does not answer\n"
	tick(2)
	look("at first", http.StatusOK, ok, healthpb.HealthCheckResponse_SERVING)
	faulty.FailNth(0, meta.Before)
	tick(3)
	look("after one failure", http.StatusOK, ok, healthpb.HealthCheckResponse_SERVING)
	faulty.Hook(func(meta.Call) meta.Fault { return meta.Before })
	tick(4)
	look("without etcd", http.StatusServiceUnavailable, gone, healthpb.HealthCheckResponse_NOT_SERVING)
	faulty.Hook(nil)
	tick(3)
	look("with etcd again", http.StatusOK, ok, healthpb.HealthCheckResponse_SERVING)
	for message, level := range map[string]zapcore.Level{
		"etcd does not answer: not serving until it does": zapcore.WarnLevel, "etcd answers again: serving": zapcore.InfoLevel,
	} {
		if got := logs.FilterMessage(message).All(); len(got) != 1 || got[0].Level != level {
			t.Errorf("%q is logged as %v", message, got)
		}
	}
}
