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

// A connection passes three states:
//
//	handshake  accepted: the TLS handshake, and the first bytes of HTTP/2, which a
//	           client sends at once. They have connectTimeout in all, and count
//	           towards no limit of the open ones. When there are as many handshakes
//	           as connections may be open, the oldest makes room for the new one.
//	waiting    the bytes have come, and there are as many open connections as there
//	           may be, in all or of the host: for the rest of connectTimeout
//	open       until either side closes it
//
// A host other than this one gets at most half of the open connections and half of
// the handshakes. What never sends a byte is gone after connectTimeout, however much
// of it there is, and keeps no other host out.

// connectTimeout is how long a connection may take to be open.
const connectTimeout = 3 * time.Second

// preface is how many bytes each client sends first.
const preface = len("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")

// Why a connection is refused.
const (
	refusedLimit     = "limit"     // there are too many in all
	refusedPeer      = "peer"      // its host has too many
	refusedHandshake = "handshake" // it did not open in time, or made room for another
)

var (
	errManyConnections = errors.New("too many connections")
	errManyOfPeer      = errors.New("too many connections of this host")
)

// warnEvery is how often refused connections are worth a line in the log.
const warnEvery = time.Minute

// connections are those of all listeners.
type connections struct {
	max   int
	log   *zap.Logger
	slots chan struct{} // one for each that is open

	gauge   *prometheus.GaugeVec
	refused *prometheus.CounterVec

	mu         sync.Mutex
	handshakes list.List // of *conn, oldest first
	peers      map[netip.Addr]*host
	warned     time.Time
	unwarned   map[string]int // refused since then, by why
}

// host is another host with connections. A nil host is this one.
type host struct {
	addr  netip.Addr
	slots chan struct{} // one for each that is open

	// Under connections.mu.
	handshakes, all int
}

func (p *host) leave() {
	if p != nil {
		<-p.slots
	}
}

func newConnections(maximum int, log *zap.Logger) *connections {
	return &connections{
		max: maximum, log: log, slots: make(chan struct{}, maximum),
		gauge: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "snapshotd_connections", Help: "Connections of the gRPC service: open, or handshake, which are not yet.",
		}, []string{"state"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "snapshotd_connections_refused_total",
			Help: "Connections that were closed before they were open: limit, for max_connections are open; peer, for their host has half of these; handshake, for they sent nothing in time.",
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

// listen returns l with its connections counted. Those within the process are not:
// there is one.
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

// conn is a connection that counts.
type conn struct {
	net.Conn
	all   *connections
	peer  *host
	begun time.Time

	// Under all.mu.
	pending *list.Element // while in handshake
	open    bool
	closed  bool
}

// begin counts raw as a handshake, for which the oldest ends when there are too many.
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
		_ = victim.Close() // it is not needed
		c.refuse(refusedHandshake, victim)
	}
	return n
}

// victim is the oldest handshake when there are too many, in all or of p. The lock must
// be held.
func (c *connections) victim(p *host) *conn {
	tooMany := p != nil && p.handshakes > cap(p.slots)
	if !tooMany && c.handshakes.Len() < c.max {
		return nil
	}
	for e := c.handshakes.Front(); e != nil; e = e.Next() {
		if o := e.Value.(*conn); !tooMany || o.peer == p { //nolint:forcetypeassert // it holds nothing else
			return o
		}
	}
	return nil
}

// peerOf is the other host's address, not valid for this host itself.
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

// admit counts n as open, which it waits for.
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
		n.peer.leave()
		c.refuse(refusedLimit, n)
		return fmt.Errorf("%w: %d are open", errManyConnections, c.max)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if n.closed { // meanwhile
		<-c.slots
		n.peer.leave()
		return net.ErrClosed
	}
	n.open = true
	c.endHandshake(n)
	c.gauge.WithLabelValues("open").Inc()
	return nil
}

// endHandshake counts n as a handshake no longer. The lock must be held.
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
			n.peer.leave()
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

// refuse counts a refused connection, and logs at times how many there were.
func (c *connections) refuse(why string, n *conn) {
	c.refused.WithLabelValues(why).Inc()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unwarned[why]++
	if now := time.Now(); now.Sub(c.warned) >= warnEvery {
		c.log.Warn("connections are refused", zap.Stringer("peer", n.RemoteAddr()), zap.Int("max_connections", c.max), zap.Int("open", len(c.slots)),
			zap.Int("for_limit", c.unwarned[refusedLimit]), zap.Int("for_limit_of_peer", c.unwarned[refusedPeer]),
			zap.Int("without_handshake", c.unwarned[refusedHandshake]))
		c.warned = now
		clear(c.unwarned)
	}
}

// counting are the credentials of connections that count: their handshake ends when
// the client has sent the first bytes of HTTP/2 and there is room.
type counting struct {
	credentials.TransportCredentials
	all *connections
}

func (t *counting) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
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
	case errors.Is(err, io.EOF): // a prober, say
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
	return &replay{secured, first}, info, nil
}

func (t *counting) Clone() credentials.TransportCredentials {
	return &counting{t.TransportCredentials.Clone(), t.all}
}

// replay is a connection of which some bytes were read already.
type replay struct {
	net.Conn
	first []byte
}

func (r *replay) Read(b []byte) (int, error) {
	if len(r.first) == 0 {
		return r.Conn.Read(b)
	}
	n := copy(b, r.first)
	r.first = r.first[n:]
	return n, nil
}
