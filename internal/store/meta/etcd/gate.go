package etcd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/balancer"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/serviceconfig"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// gate decides which connections to etcd may be used. It is the client's load balancing
// policy in gRPC: round robin over the connections to supported servers. It decides per
// connection and not per endpoint, because an endpoint may lead to another server after each
// reconnect.
//
//	          connected              version read, supported
//	absent --------------> unknown ---------------------------> open
//	  ^                     |   |  version read, too old
//	  |                     |   +-----------------------------> refused
//	  +------ connection lost, in each state -------------------+
//
// Calls use open connections only. An unknown connection is used for the version request and
// for the login that etcd requires before it, a refused connection for nothing. A failed
// version request is repeated, and the connection stays unknown, also that to a learner,
// which refuses reads and writes until its promotion.
//
//	connections                      | a call
//	an open one                      | uses it, regardless of the others
//	none open, one unknown           | waits for its version
//	none open, one connecting        | waits for it
//	all refused                      | fails with ErrTooOld, not sent
//	none open, some unreachable      | fails with ErrUnavailable, not sent
//	a server is replaced by an       | its connection breaks; the next connection is
//	older one                        | unknown again
type gate struct {
	log     *zap.Logger
	timeout time.Duration   // of one version request
	ctx     context.Context //nolint:containedctx // ends the version requests at Close
	cancel  context.CancelFunc
	queries sync.WaitGroup
	picks   atomic.Uint64

	mu      sync.Mutex
	cc      balancer.ClientConn
	conn    *grpc.ClientConn // nil until the client is created
	members []*member        // one per endpoint, in their order
	closed  bool
	changed chan struct{} // closed and replaced when a member changes
}

// admission is the state of a connection.
type admission int

const (
	unknown admission = iota // also without a connection
	open
	refused
)

// member is the current connection to one endpoint, and its successors.
type member struct {
	addr  string
	sc    balancer.SubConn
	state connectivity.State

	// Of the current connection, whose number is generation.
	generation int
	admission  admission
	version    string
	querying   bool
	lastErr    error // why the connection or its version is missing
	responded  bool  // with a version or an error, at any time since the start
}

// policyName is the gate's name among gRPC's policies, which are found by name and
// configured by JSON, here with the client's number.
const policyName = "snapshotd_etcd_gate"

var (
	gates      sync.Map // of *gate, by number
	gateNumber atomic.Int64

	// gRPC requires the registration of policies during initialization, so this cannot
	// wait for the first client.
	_ = register()
)

func register() bool {
	balancer.Register(gateBuilder{})
	return true
}

type gateBuilder struct{}

type gateConfig struct {
	serviceconfig.LoadBalancingConfig `json:"-"`

	Number int64 `json:"number"`
}

func (gateBuilder) Name() string { return policyName }

func (gateBuilder) ParseConfig(text json.RawMessage) (serviceconfig.LoadBalancingConfig, error) {
	c := &gateConfig{}
	return c, json.Unmarshal(text, c)
}

func (gateBuilder) Build(cc balancer.ClientConn, _ balancer.BuildOptions) balancer.Balancer {
	return &gateBalancer{cc: cc}
}

// gateBalancer is called by gRPC; it finds its gate by the first configuration.
type gateBalancer struct {
	cc   balancer.ClientConn
	gate *gate
}

func (b *gateBalancer) UpdateClientConnState(s balancer.ClientConnState) error {
	if b.gate == nil {
		c, ok := s.BalancerConfig.(*gateConfig)
		if !ok {
			return errors.New("no configuration")
		}
		g, ok := gates.Load(c.Number)
		if !ok {
			return errors.New("no such client")
		}
		b.gate, _ = g.(*gate)
		return b.gate.begin(b.cc, s.ResolverState.Endpoints)
	}
	return nil // endpoints never change
}

func (*gateBalancer) ResolverError(error) {}

func (*gateBalancer) UpdateSubConnState(balancer.SubConn, balancer.SubConnState) {}

func (*gateBalancer) Close() {}

func (*gateBalancer) ExitIdle() {}

func newGate(log *zap.Logger, timeout time.Duration) (*gate, []grpc.DialOption) {
	g := &gate{log: log, timeout: timeout, changed: make(chan struct{})}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	number := gateNumber.Add(1)
	gates.Store(number, g)
	context.AfterFunc(g.ctx, func() { gates.Delete(number) })
	return g, []grpc.DialOption{
		grpc.WithDisableServiceConfig(), // that of etcd's client, which selects round robin
		grpc.WithIdleTimeout(0),         // one balancer for the lifetime of the client
		grpc.WithDefaultServiceConfig(
			`{"loadBalancingConfig": [{"` + policyName + `": {"number": ` + strconv.FormatInt(number, 10) + `}}]}`),
	}
}

// begin connects to all endpoints, and keeps them connected.
func (g *gate) begin(cc balancer.ClientConn, endpoints []resolver.Endpoint) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.cc, g.members = cc, nil
	for _, e := range endpoints {
		m := &member{state: connectivity.Idle}
		var names []string
		for _, a := range e.Addresses {
			names = append(names, a.Addr)
		}
		m.addr = strings.Join(names, ",")
		sc, err := cc.NewSubConn(e.Addresses, balancer.NewSubConnOptions{ //nolint:staticcheck // one fixed address
			StateListener: func(s balancer.SubConnState) { g.stateChanged(m, s) },
		})
		if err != nil {
			return err
		}
		m.sc = sc
		g.members = append(g.members, m)
		sc.Connect()
	}
	g.updateLocked()
	return nil
}

// connected sets the connection for version requests.
func (g *gate) connected(conn *grpc.ClientConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conn = conn
	for _, m := range g.members {
		g.queryLocked(m)
	}
}

// close ends the version requests and waits for their end.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel()
	g.queries.Wait()
}

func (g *gate) stateChanged(m *member, s balancer.SubConnState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := m.state
	m.state = s.ConnectivityState
	if was == connectivity.Ready || m.state == connectivity.Ready {
		// The server of a new connection is unknown.
		m.generation++
		m.admission, m.version, m.querying, m.lastErr = unknown, "", false, nil
	}
	switch m.state {
	case connectivity.Ready:
		g.queryLocked(m)
	case connectivity.TransientFailure:
		m.lastErr, m.responded = s.ConnectionError, true
	case connectivity.Idle, connectivity.Connecting, connectivity.Shutdown:
	}
	g.updateLocked() // before the reconnect: no pick may confuse the next connection with this one
	if m.state == connectivity.Idle {
		m.sc.Connect()
	}
}

// updateLocked gives gRPC a new picker, which also serves the waiting calls.
func (g *gate) updateLocked() {
	close(g.changed)
	g.changed = make(chan struct{})
	p := &picker{gate: g, members: map[*member]int{}}
	state := connectivity.TransientFailure
	for _, m := range g.members {
		switch {
		case m.state == connectivity.Ready && m.admission == open:
			p.open = append(p.open, m.sc)
			p.members[m] = m.generation
			state = connectivity.Ready
		case m.state == connectivity.Ready && m.admission == unknown:
			p.unknown = append(p.unknown, m.sc)
			p.members[m] = m.generation
			p.waits = p.waits || !isDenied(m.lastErr) // after a refused login the version stays unknown
		case m.state == connectivity.Connecting && m.lastErr == nil, m.state == connectivity.Idle && m.lastErr == nil:
			p.waits = true
		}
	}
	if p.waits && state != connectivity.Ready {
		state = connectivity.Connecting
	}
	var errs []string
	for _, m := range g.members {
		if m.lastErr != nil {
			errs = append(errs, m.addr+": "+m.lastErr.Error())
		}
		if isDenied(m.lastErr) && p.err == nil {
			// A policy must not end calls with etcd's own code.
			p.err = status.Error(codes.Unauthenticated, rpctypes.ErrorDesc(m.lastErr))
		}
	}
	if !slices.ContainsFunc(g.members, func(m *member) bool { return m.admission != refused }) && len(g.members) > 0 {
		p.err = status.Error(codes.Unknown, g.oldLocked())
	}
	if p.err == nil { // not a status: a waiting call continues to wait
		p.err = errors.New("no connection to etcd: " + strings.Join(errs, "; "))
	}
	if g.cc != nil && !g.closed {
		g.cc.UpdateState(balancer.State{ConnectivityState: state, Picker: p})
	}
}

// tooOld is part of the text of each error for a server that is too old.
const tooOld = "is too old"

// oldLocked lists the servers that are too old; empty if there are none.
func (g *gate) oldLocked() string {
	var list []string
	for _, m := range g.members {
		if m.admission == refused {
			list = append(list, fmt.Sprintf("the etcd %s at %s %s: at least %s is needed",
				m.version, m.addr, tooOld, MinimumVersions()))
		}
	}
	return strings.Join(list, "; ")
}

// old calls oldLocked with the lock.
func (g *gate) old() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.oldLocked()
}

// check waits until each endpoint has returned its version or an error, and at least one is
// usable.
func (g *gate) check(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	for {
		g.mu.Lock()
		changed, old := g.changed, g.oldLocked()
		all, usable := len(g.members) > 0, false
		var silent []string
		var denied error
		for _, m := range g.members {
			usable = usable || m.admission == open
			all = all && (m.responded || m.admission != unknown)
			if m.admission == unknown {
				silent = append(silent, fmt.Sprintf("%s: %v", m.addr, m.lastErr))
			}
			if isDenied(m.lastErr) {
				denied = m.lastErr
			}
		}
		g.mu.Unlock()
		switch {
		case old != "":
			return fmt.Errorf("%w: %s", meta.ErrTooOld, old)
		case all && usable:
			g.warnSilent(silent)
			return nil
		case all && denied != nil:
			return mapError(ctx, ctx, denied)
		}
		select {
		case <-changed:
			continue
		case <-bounded.Done():
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%w: no etcd returned its version: %s", ctx.Err(), strings.Join(silent, "; "))
		case !usable:
			return fmt.Errorf("%w: no etcd returned its version: %s", meta.ErrUnavailable, strings.Join(silent, "; "))
		}
		g.warnSilent(silent)
		return nil
	}
}

func (g *gate) warnSilent(silent []string) {
	if len(silent) > 0 {
		g.log.Warn("etcd version unknown, retrying; the server is not used before", zap.Strings("endpoints", silent))
	}
}

// queryLocked requests the version of the server of a new connection.
func (g *gate) queryLocked(m *member) {
	if g.closed || g.conn == nil || m.querying || m.state != connectivity.Ready || m.admission != unknown {
		return
	}
	m.querying = true
	generation := m.generation
	// The request must not block gRPC, and serves more than one call. It ends with the
	// connection or the client, whose Close waits for it.
	g.queries.Go(func() { g.query(m, generation) })
}

// errLearner is the error for a server that is not usable before its promotion.
var errLearner = errors.New("it is a learner, and refuses reads and writes until it is promoted")

func (g *gate) query(m *member, generation int) {
	backoff := meta.Backoff{Max: time.Second}
	for {
		resp, err := g.status(g.ctx, m, generation)
		if err == nil && resp.GetIsLearner() {
			err = errLearner
		}
		g.mu.Lock()
		if m.generation != generation || g.closed {
			g.mu.Unlock()
			return
		}
		m.responded = true
		if err == nil {
			m.version, m.admission, m.querying, m.lastErr = resp.GetVersion(), open, false, nil
			if !newEnough(m.version) {
				m.admission = refused
				g.log.Error("etcd is too old and is not used",
					zap.String("endpoint", m.addr), zap.String("version", m.version), zap.String("least", MinimumVersions()))
			}
		} else {
			m.lastErr = err
		}
		g.updateLocked()
		g.mu.Unlock()
		if err == nil || backoff.Wait(g.ctx) != nil {
			return
		}
	}
}

// status requests the status of the server of one connection.
func (g *gate) status(ctx context.Context, m *member, generation int) (*pb.StatusResponse, error) {
	g.mu.Lock()
	conn := g.conn
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, targetKey{}, target{m, generation}), g.timeout)
	defer cancel()
	return pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
}

// target is the connection that a call must use.
type target struct {
	member     *member
	generation int
}

type targetKey struct{}

// picker chooses the connection of a call.
type picker struct {
	gate          *gate
	open, unknown []balancer.SubConn
	members       map[*member]int // of both lists, with the generations of their connections
	waits         bool            // a connection may open soon
	err           error           // else
}

func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	if t, ok := info.Ctx.Value(targetKey{}).(target); ok && info.FullMethodName == pb.Maintenance_Status_FullMethodName {
		if generation, found := p.members[t.member]; !found || generation != t.generation {
			return balancer.PickResult{}, status.Error(codes.Unavailable, "the connection is closed")
		}
		return balancer.PickResult{SubConn: t.member.sc}, nil
	}
	from := p.open
	if len(from) == 0 && info.FullMethodName == pb.Auth_Authenticate_FullMethodName {
		from = p.unknown
	}
	switch {
	case len(from) > 0:
		return balancer.PickResult{SubConn: from[p.gate.picks.Add(1)%uint64(len(from))]}, nil
	case p.waits:
		return balancer.PickResult{}, balancer.ErrNoSubConnAvailable
	}
	return balancer.PickResult{}, p.err
}

// Usage is the space usage of one server.
type Usage struct {
	Endpoint                          string
	SizeBytes, InUseBytes, QuotaBytes int64 // a quota of 0 is unknown
	CountedBytes                      int64 // the part of the size that counts against the quota
	Full                              bool  // the server has raised its space alarm
}

// Usage returns the space usage of each usable server that responds. The error is nil if at
// least one responds.
func (c *Client) Usage(ctx context.Context) ([]Usage, error) {
	var list []Usage
	var errs []error
	for _, m := range c.gate.usable() {
		resp, err := c.gate.status(ctx, m.member, m.generation)
		if err != nil {
			errs = append(errs, fmt.Errorf("status of %s: %w", m.member.addr, mapError(ctx, ctx, err)))
			continue
		}
		isAlarm := func(e string) bool { return strings.Contains(e, pb.AlarmType_NOSPACE.String()) }
		list = append(list, Usage{
			Endpoint: m.member.addr, SizeBytes: resp.GetDbSize(), InUseBytes: resp.GetDbSizeInUse(),
			QuotaBytes: resp.GetDbSizeQuota(), CountedBytes: resp.GetDbSize(),
			Full: slices.ContainsFunc(resp.GetErrors(), isAlarm),
		})
	}
	if len(list) == 0 {
		return nil, errors.Join(errs...)
	}
	return list, nil
}

func (g *gate) usable() (list []target) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		if m.admission == open {
			list = append(list, target{m, m.generation})
		}
	}
	return list
}

// Check connects to all endpoints and waits until each has returned its version or an error.
// A server that is older than [MinimumVersions] is a [meta.ErrTooOld]. Failed version
// requests are repeated, and such servers are not used before; if none succeeds within
// RequestTimeout, the error wraps [meta.ErrUnavailable]. A refused login is a
// [meta.ErrDenied].
func (c *Client) Check(ctx context.Context) error {
	c.etcd.ActiveConnection().Connect()
	if err := c.gate.check(ctx); err != nil {
		return fmt.Errorf("check etcd: %w", err)
	}
	return nil
}

// TooOld lists the connected servers that are older than [MinimumVersions] and are not used;
// empty if there are none.
func (c *Client) TooOld() string { return c.gate.old() }
