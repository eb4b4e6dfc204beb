//go:build robustness && linux

package robustness

import (
	"net"
	"sync"
	"testing"
	"time"
)

// direction is a way through a link.
type direction int

const (
	there direction = iota // to the server
	back
)

// always is the delay of a link that is cut in one direction.
const always = time.Duration(1<<63 - 1)

// link forwards connections to an address. It can cut, refuse and delay them. It is safe
// for concurrent use, and ends with the test.
type link struct {
	tb   testing.TB
	to   string
	from string

	mu       sync.Mutex
	listener net.Listener // nil while connections are refused
	down     bool
	lag      [2]time.Duration
	held     int           // pieces that lag has held back since heal
	changed  chan struct{} // closed when lag changes
	conns    map[net.Conn]bool
}

func newLink(tb testing.TB, host, to string) *link {
	tb.Helper()
	l := &link{tb: tb, to: to, from: net.JoinHostPort(host, "0"), changed: make(chan struct{}), conns: map[net.Conn]bool{}}
	if err := l.listen(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.refuse() })
	return l
}

func (l *link) addr() string { return l.from }

func (l *link) listen() error {
	listener, err := net.Listen("tcp", l.from)
	if err != nil {
		return err
	}
	l.from = listener.Addr().String()
	l.mu.Lock()
	l.listener = listener
	l.mu.Unlock()
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go l.carry(conn)
		}
	}()
	return nil
}

func (l *link) carry(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	l.mu.Lock()
	if l.down || l.listener == nil {
		l.mu.Unlock()
		return
	}
	l.conns[conn] = true
	l.mu.Unlock()
	defer func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.conns, conn)
	}()
	server, err := net.Dial("tcp", l.to)
	if err != nil {
		return
	}
	defer func() { _ = server.Close() }()
	ended := make(chan struct{})
	var once sync.Once
	end := func() {
		once.Do(func() {
			close(ended)
			_ = conn.Close()
			_ = server.Close()
		})
	}
	var group sync.WaitGroup
	group.Go(func() { defer end(); l.pipe(server, conn, there, ended) })
	group.Go(func() { defer end(); l.pipe(conn, server, back, ended) })
	group.Wait()
}

// piece is data that was read at a moment.
type piece struct {
	data []byte
	at   time.Time
}

// pipe forwards data between connections until one of them ends, each piece with at least
// the lag.
func (l *link) pipe(to, from net.Conn, way direction, ended <-chan struct{}) {
	pieces := make(chan piece, 256)
	go func() {
		defer close(pieces)
		for {
			buf := make([]byte, 32<<10)
			n, err := from.Read(buf)
			if n > 0 {
				select {
				case pieces <- piece{buf[:n], time.Now()}:
				case <-ended:
					return
				}
			}
			if err != nil {
				return
			}
		}
	}()
	for p := range pieces {
		if !l.hold(p, way, ended) {
			return
		}
		if _, err := to.Write(p.data); err != nil {
			return
		}
	}
}

// hold waits until a piece may pass. It returns false when the connection has ended.
func (l *link) hold(p piece, way direction, ended <-chan struct{}) bool {
	counted := false
	for {
		l.mu.Lock()
		lag, changed := l.lag[way], l.changed
		if lag > 0 && !counted {
			l.held++
			counted = true
		}
		l.mu.Unlock()
		left := lag - time.Since(p.at)
		if left <= 0 {
			return true
		}
		timer := time.NewTimer(left)
		select {
		case <-timer.C:
		case <-changed:
		case <-ended:
			timer.Stop()
			return false
		}
		timer.Stop()
	}
}

// hinder delays what the link carries in a direction, until heal.
func (l *link) hinder(way direction, lag time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lag[way] = lag
	close(l.changed)
	l.changed = make(chan struct{})
}

// cut breaks all connections and refuses new ones, until heal. It returns the number of
// broken connections.
func (l *link) cut() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for conn := range l.conns {
		_ = conn.Close()
	}
	return len(l.conns)
}

// refuse is cut with refused connections, as of an address without a listener.
func (l *link) refuse() int {
	l.mu.Lock()
	listener := l.listener
	l.listener = nil
	l.mu.Unlock()
	if listener != nil {
		_ = listener.Close()
	}
	return l.cut()
}

// heal ends cut, refuse and hinder. It returns the number of delayed pieces.
func (l *link) heal() (held int) {
	l.mu.Lock()
	held = l.held
	l.down, l.lag, l.held = false, [2]time.Duration{}, 0
	close(l.changed)
	l.changed = make(chan struct{})
	refused := l.listener == nil
	l.mu.Unlock()
	if refused {
		if err := l.listen(); err != nil { // the address is of this run alone
			l.tb.Error(err)
		}
	}
	return held
}
