package server

import (
	"container/list"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"google.golang.org/grpc/credentials"
)

// A connection has three states:
//
//	handshake  accepted: the TLS handshake and the first bytes of HTTP/2, which a
//	           client sends immediately. Both must end within connectTimeout, and do
//	           not count as open. When there are as many handshakes as connections
//	           may be open, a new one closes the oldest.
//	waiting    the bytes have arrived, and the limit of open connections, in total or
//	           of the host, is reached: for the rest of connectTimeout
//	open       until either side closes it
//
// Another host gets at most half of the open connections and half of the handshakes.
// A connection that never sends a byte ends after connectTimeout. Any number of these
// excludes no other host.

// connectTimeout is the time within which a connection must be open.
const connectTimeout = 3 * time.Second

// preface is the number of bytes that each client sends first.
const preface = len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

// Reasons to refuse a connection.
const (
	refusedLimit     = "limit"     // too many in total
	refusedPeer      = "peer"      // too many of its host
	refusedHandshake = "handshake" // not open in time, or closed for a newer one
)

var (
	errManyConnections = errors.New("too many connections")
	errManyOfPeer      = errors.New("too many connections of this host")
)

// warnEvery is the minimum time between two warnings about refused connections.
const warnEvery = time.Minute

// connections counts and bounds the connections of all listeners. It is safe for
// concurrent use.
type connections struct {
	max   int
	log   *zap.Logger
	slots chan struct{} // one value per open connection

	gauge   *prometheus.GaugeVec
	refused *prometheus.CounterVec

	mu         sync.Mutex
	handshakes list.List // of *conn, oldest first
	peers      map[netip.Addr]*host
	warned     time.Time
	unwarned   map[string]int // refused since warned, by reason
}

// host is another host with connections. A nil host is this host.
type host struct {
	addr  netip.Addr
	slots chan struct{} // one value per open connection

	// Under connections.mu.
	handshakes, all int
}

func (p *host) release() {
	if p != nil {
		<-p.slots
	}
}

func newConnections(maximum int, log *zap.Logger) *connections {
	return &connections{
		max: maximum, log: log, slots: make(chan struct{}, maximum),
		gauge: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "snapshotd_connections", Help: "Connections of the gRPC service: open, or in the handshake.",
		}, []string{"state"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "snapshotd_connections_refused_total",
			Help: "Connections that were closed before they were open. limit: max_connections are open; " +
				"peer: their host has half of these; handshake: they sent nothing in time.",
		}, []string{"reason"}),
		peers: map[netip.Addr]*host{}, unwarned: map[string]int{},
	}
}

func (c *connections) register(r *prometheus.Registry) error {
	for _, reason := range []string{refusedLimit, refusedPeer, refusedHandshake} {
		c.refused.WithLabelValues(reason)
	}
	for _, state := range []string{"handshake", "open"} {
		c.gauge.WithLabelValues(state)
	}
	return errors.Join(r.Register(c.gauge), r.Register(c.refused))
}

// listen returns a listener that counts the connections of l. The one connection within
// the process does not count.
func (c *connections) listen(l net.Listener) net.Listener {
	if l.Addr().Network() == "bufconn" {
		return l
	}
	return &countedListener{l, c}
}

type countedListener struct {
	net.Listener
	all *connections
}

func (l *countedListener) Accept() (net.Conn, error) {
	raw, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return l.all.begin(raw), nil
}

// conn is a counted connection.
type conn struct {
	net.Conn
	all   *connections
	peer  *host
	begun time.Time

	// Under all.mu.
	pending *list.Element // during the handshake
	open    bool
	closed  bool
}

// begin counts raw as a handshake. If there are too many it closes the oldest.
func (c *connections) begin(raw net.Conn) *conn {
	n := &conn{Conn: raw, all: c, begun: time.Now()}
	c.mu.Lock()
	if addr := peerOf(raw); addr.IsValid() {
		if c.peers[addr] == nil {
			c.peers[addr] = &host{addr: addr, slots: make(chan struct{}, max(c.max/2, 1))}
		}
		n.peer = c.peers[addr]
		n.peer.all++
		n.peer.handshakes++
	}
	victim := c.victim(n.peer)
	n.pending = c.handshakes.PushBack(n)
	c.mu.Unlock()
	c.gauge.WithLabelValues("handshake").Inc()
	if victim != nil {
		_ = victim.Close() // an error has no consequence
		c.refuse(refusedHandshake, victim)
	}
	return n
}

// victim returns the oldest handshake if there are too many, in total or of p. The lock
// must be held.
func (c *connections) victim(p *host) *conn {
	tooMany := p != nil && p.handshakes > cap(p.slots)
	if !tooMany && c.handshakes.Len() < c.max {
		return nil
	}
	for e := c.handshakes.Front(); e != nil; e = e.Next() {
		if o := e.Value.(*conn); !tooMany || o.peer == p { //nolint:forcetypeassert // the only type
			return o
		}
	}
	return nil
}

// peerOf returns the address of another host; for this host it is invalid.
func peerOf(raw net.Conn) netip.Addr {
	tcp, ok := raw.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	addr := tcp.AddrPort().Addr().Unmap().WithZone("")
	if addr.IsLoopback() {
		return netip.Addr{}
	}
	return addr
}

// admit counts n as open. It waits for a free slot until connectTimeout.
func (c *connections) admit(n *conn) error {
	timer := time.NewTimer(time.Until(n.begun.Add(connectTimeout)))
	defer timer.Stop()
	if n.peer != nil {
		select {
		case n.peer.slots <- struct{}{}:
		case <-timer.C:
			c.refuse(refusedPeer, n)
			return fmt.Errorf("%w: %v has %d", errManyOfPeer, n.peer.addr, cap(n.peer.slots))
		}
	}
	select {
	case c.slots <- struct{}{}:
	case <-timer.C:
		n.peer.release()
		c.refuse(refusedLimit, n)
		return fmt.Errorf("%w: %d are open", errManyConnections, c.max)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n.closed {
		<-c.slots
		n.peer.release()
		return net.ErrClosed
	}
	n.open = true
	c.endHandshake(n)
	c.gauge.WithLabelValues("open").Inc()
	return nil
}

// endHandshake removes n from the handshakes. The lock must be held.
func (c *connections) endHandshake(n *conn) {
	if n.pending == nil {
		return
	}
	c.handshakes.Remove(n.pending)
	n.pending = nil
	if n.peer != nil {
		n.peer.handshakes--
	}
	c.gauge.WithLabelValues("handshake").Dec()
}

// Close implements [net.Conn].
func (n *conn) Close() error {
	c := n.all
	c.mu.Lock()
	if !n.closed {
		n.closed = true
		c.endHandshake(n)
		if n.open {
			<-c.slots
			n.peer.release()
			c.gauge.WithLabelValues("open").Dec()
		}
		if n.peer != nil {
			if n.peer.all--; n.peer.all == 0 {
				delete(c.peers, n.peer.addr)
			}
		}
	}
	c.mu.Unlock()
	return n.Conn.Close()
}

// refuse counts a refused connection, and logs the counts at most every warnEvery.
func (c *connections) refuse(reason string, n *conn) {
	c.refused.WithLabelValues(reason).Inc()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unwarned[reason]++
	if now := time.Now(); now.Sub(c.warned) >= warnEvery {
		c.log.Warn("connections refused", zap.Stringer("peer", n.RemoteAddr()),
			zap.Int("max_connections", c.max), zap.Int("open", len(c.slots)),
			zap.Int("for_limit", c.unwarned[refusedLimit]), zap.Int("for_limit_of_peer", c.unwarned[refusedPeer]),
			zap.Int("without_handshake", c.unwarned[refusedHandshake]))
		c.warned = now
		clear(c.unwarned)
	}
}

// countedCredentials are the credentials of counted connections. Their handshake ends
// when the client has sent the first bytes of HTTP/2 and the connection is admitted.
type countedCredentials struct {
	credentials.TransportCredentials
	all *connections
}

func (t *countedCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	secured, info, err := t.TransportCredentials.ServerHandshake(raw)
	n, counts := raw.(*conn)
	if !counts {
		return secured, info, err
	}
	first := make([]byte, preface)
	if err == nil {
		_, err = io.ReadFull(secured, first)
	}
	switch {
	case errors.Is(err, io.EOF): // such as a TCP health check
		return nil, nil, io.EOF
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.all.refuse(refusedHandshake, n)
		return nil, nil, fmt.Errorf("handshake: %w", err)
	case err != nil:
		return nil, nil, fmt.Errorf("handshake: %w", err)
	}
	if err := t.all.admit(n); err != nil {
		return nil, nil, err
	}
	return &replayConn{secured, first}, info, nil
}

func (t *countedCredentials) Clone() credentials.TransportCredentials {
	return &countedCredentials{t.TransportCredentials.Clone(), t.all}
}

// replayConn is a connection that first returns bytes which were already read.
type replayConn struct {
	net.Conn
	first []byte
}

func (r *replayConn) Read(b []byte) (int, error) {
	if len(r.first) == 0 {
		return r.Conn.Read(b)
	}
	n := copy(b, r.first)
	r.first = r.first[n:]
	return n, nil
}
