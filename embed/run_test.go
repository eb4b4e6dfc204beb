package embed

import (
	"errors"
	"net"
	"strings"
	"testing"

	"go.uber.org/zap"
	"google.golang.org/grpc/test/bufconn"
)

// brokenListener fails at Accept.
type brokenListener struct{ net.Listener }

var errBroken = errors.New("broken")

func (brokenListener) Accept() (net.Conn, error) { return nil, errBroken }

// TestFailedPartStopsServer has one part fail: Wait returns its error after the end of
// all parts, so that another server can use the directory.
func TestFailedPartStopsServer(t *testing.T) {
	cfg := Config{DataDir: t.TempDir(), Replica: "r", Log: zap.NewNop()}.complete()
	for range 2 {
		var open closers
		p, err := openParts(t.Context(), cfg, cfg.Log, &open)
		if err != nil {
			t.Fatal(err)
		}
		s := &Server{done: make(chan struct{})}
		s.run(t.Context(), cfg, p, brokenListener{bufconn.Listen(1)}, bufconn.Listen(1), nil, open)
		if err := s.Wait(); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "gRPC service: ") {
			t.Errorf("got %v", err)
		}
		if err := s.Close(); !errors.Is(err, errBroken) {
			t.Errorf("after the end: got %v", err)
		}
	}
}
