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

// gate decides which connections to etcd may be used. It is the client's load
// balancing policy in gRPC: round robin over the connections whose server has said
// that it is new enough. What counts is the connection, not the endpoint: one name
// may lead to another server after each reconnect.
//
//	          connected              version read, new enough
//	absent --------------> unknown ---------------------------> open
//	  ^                     |   |  version read, too old
//	  |                     |   +-----------------------------> refused
//	  +------ connection lost, in each state -------------------+
//
// Calls go through open connections only, whatever they are; through one that is
// unknown go the question for its version and the login that etcd wants before it
// answers that, and through one that is refused nothing. A question without an
// answer is asked again, and the connection stays unknown; so does that to a learner,
// which refuses reads and writes until it is promoted.
//
//	there is                         | a call
//	an open connection               | takes it, whatever the others are
//	none, and an unknown one         | waits for the verdict
//	none, and one under way          | waits for it
//	none, all are refused            | ends with ErrTooOld, not sent
//	none, some cannot be reached     | ends with ErrUnavailable, not sent
//	a server that is replaced by     | its connection breaks with it; the next one
//	an older one                     | is unknown again
type gate struct {
	log     *zap.Logger
	timeout time.Duration   // of one question
	ctx     context.Context //nolint:containedctx // ends the questions when the client is closed
	cancel  context.CancelFunc
	asking  sync.WaitGroup
	picks   atomic.Uint64

	mu      sync.Mutex
	cc      balancer.ClientConn
	conn    *grpc.ClientConn // nil until the client is made
	members []*member        // one for each endpoint, in their order
	closed  bool
	moved   chan struct{} // closed and replaced when a member changes
}

// verdict is what is known of a connection's server.
type verdict int

const (
	unknown verdict = iota // also where there is no connection
	open
	refused
)

// member is the connection to one endpoint, the present one and those to come.
type member struct {
	addr  string
	sc    balancer.SubConn
	state connectivity.State

	// Of the present connection, the number of which is life.
	life     int
	verdict  verdict
	version  string
	asking   bool
	lastErr  error // why there is no connection, or no verdict
	answered bool  // with a verdict or an error, at any time since the start
}

// policyName is the gate's name among gRPC's policies. They are found by name, and
// what a policy is to know comes as JSON: there the client's number.
const policyName = "snapshotd_etcd_gate"

var (
	gates      sync.Map // of *gate, by number
	gateNumber atomic.Int64

	// gRPC wants policies to be registered before anything else goes on, so this
	// cannot wait for the first client.
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

// gateBalancer is what gRPC calls; it finds its gate with the first configuration.
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
	g := &gate{log: log, timeout: timeout, moved: make(chan struct{})}
	g.ctx, g.cancel = context.WithCancel(context.Background())
	number := gateNumber.Add(1)
	gates.Store(number, g)
	context.AfterFunc(g.ctx, func() { gates.Delete(number) })
	return g, []grpc.DialOption{
		grpc.WithDisableServiceConfig(), // the one of etcd's client, which says round robin
		grpc.WithIdleTimeout(0),         // so that there is one balancer for as long as there is the client
		grpc.WithDefaultServiceConfig(`{"loadBalancingConfig": [{"` + policyName + `": {"number": ` + strconv.FormatInt(number, 10) + `}}]}`),
	}
}

// begin connects to all endpoints, and keeps them connected from then on.
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
		sc, err := cc.NewSubConn(e.Addresses, balancer.NewSubConnOptions{ //nolint:staticcheck // of one address, which it will take for ever
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

// connected gives the gate the connection to ask through.
func (g *gate) connected(conn *grpc.ClientConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.conn = conn
	for _, m := range g.members {
		g.askLocked(m)
	}
}

// close ends the questions and waits for that.
func (g *gate) close() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel()
	g.asking.Wait()
}

func (g *gate) stateChanged(m *member, s balancer.SubConnState) {
	g.mu.Lock()
	defer g.mu.Unlock()
	was := m.state
	m.state = s.ConnectivityState
	if was == connectivity.Ready || m.state == connectivity.Ready {
		// Another connection, so nothing is known of its server.
		m.life++
		m.verdict, m.version, m.asking, m.lastErr = unknown, "", false, nil
	}
	switch m.state {
	case connectivity.Ready:
		g.askLocked(m)
	case connectivity.TransientFailure:
		m.lastErr, m.answered = s.ConnectionError, true
	case connectivity.Idle, connectivity.Connecting, connectivity.Shutdown:
	}
	g.updateLocked() // before it connects again: no pick may take the next connection for this one
	if m.state == connectivity.Idle {
		m.sc.Connect()
	}
}

// updateLocked has gRPC choose again for the calls that wait.
func (g *gate) updateLocked() {
	close(g.moved)
	g.moved = make(chan struct{})
	p := &picker{gate: g, members: map[*member]int{}}
	state := connectivity.TransientFailure
	for _, m := range g.members {
		switch {
		case m.state == connectivity.Ready && m.verdict == open:
			p.open = append(p.open, m.sc)
			p.members[m] = m.life
			state = connectivity.Ready
		case m.state == connectivity.Ready && m.verdict == unknown:
			p.unknown = append(p.unknown, m.sc)
			p.members[m] = m.life
			p.waits = p.waits || !isDenied(m.lastErr) // a login that was refused comes to no verdict
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
			// A policy may not end calls with etcd's own code.
			p.err = status.Error(codes.Unauthenticated, rpctypes.ErrorDesc(m.lastErr))
		}
	}
	if !slices.ContainsFunc(g.members, func(m *member) bool { return m.verdict != refused }) && len(g.members) > 0 {
		p.err = status.Error(codes.Unknown, g.oldLocked())
	}
	if p.err == nil { // no status: a call that waits for a connection goes on to wait
		p.err = errors.New("no connection to etcd: " + strings.Join(errs, "; "))
	}
	if g.cc != nil && !g.closed {
		g.cc.UpdateState(balancer.State{ConnectivityState: state, Picker: p})
	}
}

// tooOld is in the text of each error for a server that is too old.
const tooOld = "is too old"

// oldLocked names the servers that are too old; empty when none is.
func (g *gate) oldLocked() string {
	var list []string
	for _, m := range g.members {
		if m.verdict == refused {
			list = append(list, fmt.Sprintf("the etcd %s at %s %s: at least %s is needed", m.version, m.addr, tooOld, MinimumVersions()))
		}
	}
	return strings.Join(list, "; ")
}

// old is oldLocked.
func (g *gate) old() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.oldLocked()
}

// check waits until each endpoint has answered, or could not be asked once, and at
// least one may be used.
func (g *gate) check(ctx context.Context) error {
	bounded, cancel := context.WithTimeout(ctx, g.timeout)
	defer cancel()
	for {
		g.mu.Lock()
		moved, old := g.moved, g.oldLocked()
		all, usable := len(g.members) > 0, false
		var silent []string
		var denied error
		for _, m := range g.members {
			usable = usable || m.verdict == open
			all = all && (m.answered || m.verdict != unknown)
			if m.verdict == unknown {
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
			g.warnOf(silent)
			return nil
		case all && denied != nil:
			return mapError(ctx, ctx, denied)
		}
		select {
		case <-moved:
			continue
		case <-bounded.Done():
		}
		switch {
		case ctx.Err() != nil:
			return fmt.Errorf("%w: no etcd says its version: %s", ctx.Err(), strings.Join(silent, "; "))
		case !usable:
			return fmt.Errorf("%w: no etcd says its version: %s", meta.ErrUnavailable, strings.Join(silent, "; "))
		}
		g.warnOf(silent)
		return nil
	}
}

func (g *gate) warnOf(silent []string) {
	if len(silent) > 0 {
		g.log.Warn("an etcd does not say its version: it is asked again and not used before", zap.Strings("endpoints", silent))
	}
}

// askLocked asks the server of a new connection for its version.
func (g *gate) askLocked(m *member) {
	if g.closed || g.conn == nil || m.asking || m.state != connectivity.Ready || m.verdict != unknown {
		return
	}
	m.asking = true
	life := m.life
	// gRPC must not be held up, and what waits for the answer is not one call. It
	// ends with the connection or the client, whose Close waits for it.
	g.asking.Go(func() { g.ask(m, life) })
}

// errLearner is the answer of a server that is used once it is promoted.
var errLearner = errors.New("it is a learner, and refuses reads and writes until it is promoted")

func (g *gate) ask(m *member, life int) {
	backoff := meta.Backoff{Max: time.Second}
	for {
		resp, err := g.status(g.ctx, m, life)
		if err == nil && resp.GetIsLearner() {
			err = errLearner
		}
		g.mu.Lock()
		if m.life != life || g.closed {
			g.mu.Unlock()
			return
		}
		m.answered = true
		if err == nil {
			m.version, m.verdict, m.asking, m.lastErr = resp.GetVersion(), open, false, nil
			if !newEnough(m.version) {
				m.verdict = refused
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

// status asks for the status of the server at the end of one very connection.
func (g *gate) status(ctx context.Context, m *member, life int) (*pb.StatusResponse, error) {
	g.mu.Lock()
	conn := g.conn
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithValue(ctx, aimKey{}, aim{m, life}), g.timeout)
	defer cancel()
	return pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
}

// aim is the connection that a call must take.
type aim struct {
	member *member
	life   int
}

type aimKey struct{}

// picker chooses the connection of a call.
type picker struct {
	gate          *gate
	open, unknown []balancer.SubConn
	members       map[*member]int // those, with the numbers of their connections
	waits         bool            // there may be one soon
	err           error           // when there is not
}

func (p *picker) Pick(info balancer.PickInfo) (balancer.PickResult, error) {
	if a, ok := info.Ctx.Value(aimKey{}).(aim); ok && info.FullMethodName == pb.Maintenance_Status_FullMethodName {
		if life, there := p.members[a.member]; !there || life != a.life {
			return balancer.PickResult{}, status.Error(codes.Unavailable, "the connection is gone")
		}
		return balancer.PickResult{SubConn: a.member.sc}, nil
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

// Usage is how much room there is at one server.
type Usage struct {
	Endpoint                          string
	SizeBytes, InUseBytes, QuotaBytes int64 // the quota is 0 where the server does not say it
	CountedBytes                      int64 // what counts against the quota
	Full                              bool  // the server has raised its alarm
}

// Usage asks each server that is connected and may be used for the room that it has,
// and returns that of those that answer. The error is nil when one does.
func (c *Client) Usage(ctx context.Context) ([]Usage, error) {
	var list []Usage
	var errs []error
	for _, m := range c.gate.usable() {
		resp, err := c.gate.status(ctx, m.member, m.life)
		if err != nil {
			errs = append(errs, fmt.Errorf("status of %s: %w", m.member.addr, mapError(ctx, ctx, err)))
			continue
		}
		list = append(list, Usage{
			Endpoint: m.member.addr, SizeBytes: resp.GetDbSize(), InUseBytes: resp.GetDbSizeInUse(), QuotaBytes: resp.GetDbSizeQuota(),
			CountedBytes: resp.GetDbSize(),
			Full:         slices.ContainsFunc(resp.GetErrors(), func(e string) bool { return strings.Contains(e, pb.AlarmType_NOSPACE.String()) }),
		})
	}
	if len(list) == 0 {
		return nil, errors.Join(errs...)
	}
	return list, nil
}

func (g *gate) usable() (list []aim) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, m := range g.members {
		if m.verdict == open {
			list = append(list, aim{m, m.life})
		}
	}
	return list
}

// Versions returns the versions of the servers that are connected, in the order
// of the endpoints; empty where it is not known.
func (c *Client) Versions() []string {
	c.gate.mu.Lock()
	defer c.gate.mu.Unlock()
	var list []string
	for _, m := range c.gate.members {
		list = append(list, m.version)
	}
	return slices.Clip(list)
}

// Check connects to all endpoints and returns when each has said which version of
// etcd it is, or could not be asked. One that is older than [MinimumVersions] is
// [meta.ErrTooOld]. One that does not answer is asked again until it does, and not
// used before; when none has within RequestTimeout the error wraps
// [meta.ErrUnavailable]. A login that is refused is [meta.ErrDenied].
func (c *Client) Check(ctx context.Context) error {
	c.etcd.ActiveConnection().Connect()
	if err := c.gate.check(ctx); err != nil {
		return fmt.Errorf("check etcd: %w", err)
	}
	return nil
}

// TooOld names the connected servers that are older than [MinimumVersions] and
// are not used; empty when there are none.
func (c *Client) TooOld() string { return c.gate.old() }
