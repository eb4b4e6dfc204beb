package server

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"
)

// remoteConn is a connection with another remote address.
type remoteConn struct {
	net.Conn
	addr net.Addr
}

func (f remoteConn) RemoteAddr() net.Addr { return f.addr }

// hosts is a listener whose connections have the remote addresses from next, in turn.
type hosts struct {
	net.Listener
	next chan string
}

func (h hosts) Accept() (net.Conn, error) {
	c, err := h.Listener.Accept()
	if err != nil {
		return nil, err
	}
	select {
	case host := <-h.next:
		return remoteConn{c, &net.TCPAddr{IP: net.ParseIP(host), Port: 1}}, nil
	default:
		return c, nil
	}
}

// connServer is a gRPC server that counts its connections.
type connServer struct {
	t        *testing.T
	conns    *connections
	registry *prometheus.Registry
	logs     *observer.ObservedLogs
	addr     string
	next     chan string
}

func newConnServer(t *testing.T, maximum int) *connServer {
	t.Helper()
	core, logs := observer.New(zap.WarnLevel)
	d := &connServer{
		t: t, conns: newConnections(maximum, zap.New(core)), logs: logs, next: make(chan string, 1),
		registry: prometheus.NewRegistry(),
	}
	if err := d.conns.register(d.registry); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.addr = l.Addr().String()
	srv := grpc.NewServer(grpc.Creds(&countedCredentials{insecure.NewCredentials(), d.conns}),
		grpc.ConnectionTimeout(connectTimeout))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	served := make(chan error, 1)
	go func() { served <- srv.Serve(d.conns.listen(hosts{l, d.next})) }()
	t.Cleanup(func() {
		srv.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
		if n := d.value("snapshotd_connections", "open") + d.value("snapshotd_connections", "handshake"); n != 0 ||
			len(d.conns.slots) != 0 || len(d.conns.peers) != 0 {
			t.Errorf("%v connections are left, %d slots, hosts %v", n, len(d.conns.slots), d.conns.peers)
		}
	})
	return d
}

// value returns the value of a metric with one label.
func (d *connServer) value(name, label string) float64 {
	d.t.Helper()
	families, err := d.registry.Gather()
	if err != nil {
		d.t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name && m.GetLabel()[0].GetValue() == label {
				return m.GetGauge().GetValue() + m.GetCounter().GetValue()
			}
		}
	}
	d.t.Errorf("no metric %s of %s", name, label)
	return 0
}

// call connects from host, or from this host if it is empty, and makes a call.
func (d *connServer) call(host string) (*grpc.ClientConn, error) {
	d.t.Helper()
	if host != "" {
		d.next <- host
	}
	c, err := grpc.NewClient(d.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = c.Close() })
	ctx, cancel := context.WithTimeout(d.t.Context(), 10*time.Second)
	defer cancel()
	_, err = healthpb.NewHealthClient(c).Check(ctx, &healthpb.HealthCheckRequest{})
	return c, err
}

// idle opens connections that send nothing until the end of the test.
func (d *connServer) idle(n int) {
	d.t.Helper()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for range n / 8 {
				c, err := net.Dial("tcp", d.addr)
				if err != nil {
					d.t.Error(err)
					return
				}
				d.t.Cleanup(func() { _ = c.Close() })
			}
		})
	}
	wg.Wait()
}

// TestIdleConnectionsExcludeNoClient serves calls among connections that never send a
// byte, ends these in time, and counts them.
func TestIdleConnectionsExcludeNoClient(t *testing.T) {
	d := newConnServer(t, 16)
	d.idle(1000)
	began := time.Now()
	if _, err := d.call(""); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > connectTimeout {
		t.Errorf("a call among idle connections took %v", took)
	}
	if n := d.value("snapshotd_connections", "handshake"); n > 16 {
		t.Errorf("%v handshakes", n)
	}
	if n := d.value("snapshotd_connections_refused_total", refusedHandshake); n < 1000-16-1 {
		t.Errorf("%v refused", n)
	}
	if len(d.logs.FilterMessage("connections refused").All()) == 0 {
		t.Error("no line in the log")
	}
}

// TestConnectionsOfAHost gives another host half of the connections, and frees them when
// they close. The local host may use all.
func TestConnectionsOfAHost(t *testing.T) {
	d := newConnServer(t, 4)
	var open []*grpc.ClientConn
	for range 2 {
		c, err := d.call("192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		open = append(open, c)
	}
	c, err := d.call("::ffff:192.0.2.1")
	_ = c.Close() // so that it does not reconnect from this host
	if n := d.value("snapshotd_connections_refused_total", refusedPeer); n != 1 || status.Code(err) != codes.Unavailable {
		t.Errorf("%v of the host refused: %v", n, err)
	}
	for _, other := range []string{"192.0.2.2", "2001:db8::1"} {
		if _, err := d.call(other); err != nil {
			t.Errorf("another host: %v", err)
		}
	}
	// All four are open: the next waits, and is refused.
	d.next <- "192.0.2.3"
	raw, err := net.Dial("tcp", d.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = raw.Close() }()
	if _, err := fmt.Fprint(raw, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.Read(make([]byte, 1)); err == nil {
		t.Error("no error for a fifth connection")
	}
	if n := d.value("snapshotd_connections_refused_total", refusedLimit); n != 1 {
		t.Errorf("%v refused for the limit", n)
	}
	_ = open[0].Close()
	if _, err := d.call("192.0.2.1"); err != nil {
		t.Errorf("after a close: %v", err)
	}
}
