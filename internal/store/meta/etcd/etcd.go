// Package etcd is the metadata store on etcd, of the releases that
// [MinimumVersions] names and later. No type, error or status of etcd's client
// leaves it.
//
// A server that is older is not used: each connection is asked for the version at
// its other end before any call goes through it; see gate.
//
// Every key lives under one root, which callers do not see. Reads are
// linearizable. A long read streams (etcd 3.7), or else goes page by page, at
// one revision.
//
// Reads are retried by etcd's client until the deadline of the request; writes
// never are, so that one that failed took effect at most once.
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// maxRootBytes keeps a transaction of the greatest size and number of
// operations within what etcd takes, roots and envelope included.
const maxRootBytes = 64

// noKey is a key that is read for the revision alone. It lies among those below
// the root, for which the user at etcd has the right to read.
const noKey = "/\x00"

// Options configure [Open]. The zero value of a field means the default beside
// it.
type Options struct {
	Endpoints          []string    // at least one
	Root               string      // in front of every key; such as "/snapshotd", no slash at the end, at most 64 bytes
	TLS                *tls.Config // default: no TLS
	Username, Password string
	// ReadPassword returns the password again, for each login after the first. When it
	// fails, or etcd refuses what it returns, the last password that etcd accepted is
	// used. Default: Password, which never changes.
	ReadPassword   func() (string, error)
	DialTimeout    time.Duration // of one attempt to connect; default 5 s
	RequestTimeout time.Duration // of one request, and of a scan or watch between two answers it owes; default 5 s
	Log            *zap.Logger   // default: none
}

// Client is a [meta.KV] on etcd.
type Client struct {
	o       Options
	etcd    *clientv3.Client
	leases  pb.LeaseClient
	watches pb.WatchClient
	gate    *gate
	ctx     context.Context //nolint:containedctx // ends the watches when the client is closed
	cancel  context.CancelFunc
}

var _ meta.KV = (*Client)(nil)

// Open returns a client, which connects when it is used. With a user name it
// waits for the first answer, for DialTimeout at the most.
func Open(o Options) (*Client, error) {
	switch {
	case len(o.Endpoints) == 0:
		return nil, errors.New("etcd: no endpoints")
	case len(o.Root) > maxRootBytes:
		return nil, fmt.Errorf("etcd: root of %d bytes, at most %d", len(o.Root), maxRootBytes)
	case strings.HasSuffix(o.Root, "/"):
		return nil, fmt.Errorf("etcd: root %q ends in a slash", o.Root)
	}
	if o.DialTimeout <= 0 {
		o.DialTimeout = 5 * time.Second
	}
	if o.RequestTimeout <= 0 {
		o.RequestTimeout = 5 * time.Second
	}
	if o.Log == nil {
		o.Log = zap.NewNop()
	}
	g, gated := newGate(o.Log, o.RequestTimeout)
	if o.ReadPassword != nil && o.Username != "" {
		l := &login{read: o.ReadPassword, log: o.Log, last: o.Password}
		gated = append(gated, grpc.WithChainUnaryInterceptor(l.intercept))
	}
	cli, err := clientv3.New(clientv3.Config{
		Endpoints:   o.Endpoints,
		TLS:         o.TLS,
		Username:    o.Username,
		Password:    o.Password,
		DialTimeout: o.DialTimeout,
		// A peer that vanished without a word is found out by pings; etcd
		// refuses more than one in five seconds.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// gRPC would wait up to two minutes between attempts to connect, and so
		// find etcd that much later when it is back.
		DialOptions: append(gated, grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 3 * time.Second,
		})),
		// The client warns of every error that it returns as well.
		Logger: o.Log.WithOptions(zap.IncreaseLevel(max(zap.ErrorLevel, o.Log.Level()))),
	})
	if err != nil {
		g.close()
		return nil, fmt.Errorf("open etcd: %w", classOf(err))
	}
	conn := cli.ActiveConnection()
	c := &Client{o: o, etcd: cli, leases: pb.NewLeaseClient(conn), watches: pb.NewWatchClient(conn), gate: g}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	g.connected(conn)
	return c, nil
}

// Close ends the client's watches and drops its connections. Calls under way
// fail.
func (c *Client) Close() error {
	c.cancel()
	c.gate.close()
	if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd: %v", err) //nolint:errorlint // may hold a gRPC status
	}
	return nil
}

func (c *Client) key(k string) string { return c.o.Root + k }

// keyTo returns the options for the end of a range, if there is one.
func (c *Client) keyTo(to string, opts ...clientv3.OpOption) []clientv3.OpOption {
	if to != "" {
		opts = append(opts, clientv3.WithRange(c.o.Root+to))
	}
	return opts
}

func (c *Client) kv(kv *mvccpb.KeyValue) meta.KeyValue {
	return meta.KeyValue{
		Key:            strings.TrimPrefix(string(kv.Key), c.o.Root),
		Value:          kv.Value,
		CreateRevision: kv.CreateRevision,
		ModRevision:    kv.ModRevision,
		Lease:          meta.LeaseID(kv.Lease),
	}
}

func (c *Client) kvs(in []*mvccpb.KeyValue) []meta.KeyValue {
	if len(in) == 0 {
		return nil
	}
	out := make([]meta.KeyValue, len(in))
	for i, kv := range in {
		out[i] = c.kv(kv)
	}
	return out
}

// Get implements [meta.KV].
func (c *Client) Get(ctx context.Context, key string) (kv meta.KeyValue, found bool, revision int64, err error) {
	if err := meta.CheckRange(key, ""); err != nil {
		return meta.KeyValue{}, false, 0, err
	}
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	resp, err := c.etcd.Get(rctx, c.key(key))
	if err != nil {
		return meta.KeyValue{}, false, 0, fmt.Errorf("get %s: %w", key, mapError(ctx, rctx, err))
	}
	if len(resp.Kvs) == 0 {
		return meta.KeyValue{}, false, resp.Header.Revision, nil
	}
	return c.kv(resp.Kvs[0]), true, resp.Header.Revision, nil
}

// Range implements [meta.KV].
func (c *Client) Range(ctx context.Context, r meta.Range) (meta.RangeResult, error) {
	if err := meta.CheckRange(r.From, r.To); err != nil {
		return meta.RangeResult{}, err
	}
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	opts := c.keyTo(r.To, clientv3.WithRev(max(r.Revision, 0)), clientv3.WithLimit(int64(r.Limit)))
	if r.KeysOnly {
		opts = append(opts, clientv3.WithKeysOnly())
	}
	resp, err := c.etcd.Get(rctx, c.key(r.From), opts...)
	if err != nil {
		return meta.RangeResult{}, fmt.Errorf("range %s at %d: %w", r.From, r.Revision, mapError(ctx, rctx, err))
	}
	return meta.RangeResult{KVs: c.kvs(resp.Kvs), More: resp.More, Count: resp.Count, Revision: resp.Header.Revision}, nil
}

// Txn implements [meta.KV].
func (c *Client) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if err := t.Check(); err != nil {
		return meta.TxnResult{}, err
	}
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	then, other := c.ops(t.Then), c.ops(t.Else)
	compares := len(then)+len(other) == 0
	if compares {
		// A transaction without a read etcd answers from where the member is that it
		// reaches, which may be far behind.
		read := []clientv3.Op{clientv3.OpGet(c.key(noKey), clientv3.WithCountOnly())}
		then, other = read, read
	}
	resp, err := c.etcd.Txn(rctx).If(c.cmps(t.If)...).Then(then...).Else(other...).Commit()
	if err != nil {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w", mapError(ctx, rctx, err))
	}
	res := meta.TxnResult{Succeeded: resp.Succeeded, Revision: resp.Header.Revision}
	for _, r := range resp.Responses {
		if got := r.GetResponseRange(); got != nil && !compares {
			res.Ranges = append(res.Ranges, c.kvs(got.Kvs))
		}
	}
	return res, nil
}

func (c *Client) cmps(conds []meta.Cond) []clientv3.Cmp {
	cmps := make([]clientv3.Cmp, len(conds))
	for i, cond := range conds {
		target := clientv3.CreateRevision(c.key(cond.From))
		if cond.Target == meta.ModRevision {
			target = clientv3.ModRevision(c.key(cond.From))
		}
		// Check has refused any other; the client panics on one.
		op := map[meta.Compare]string{meta.Equal: "=", meta.Less: "<", meta.Greater: ">"}[cond.Op]
		cmps[i] = clientv3.Compare(target, op, cond.Revision)
		if cond.To != "" {
			cmps[i] = cmps[i].WithRange(c.o.Root + cond.To)
		}
	}
	return cmps
}

func (c *Client) ops(in []meta.Op) []clientv3.Op {
	ops := make([]clientv3.Op, len(in))
	for i, op := range in {
		switch op.Kind {
		case meta.OpPut:
			ops[i] = clientv3.OpPut(c.key(op.From), string(op.Value), clientv3.WithLease(clientv3.LeaseID(op.Lease)))
		case meta.OpDelete:
			ops[i] = clientv3.OpDelete(c.key(op.From), c.keyTo(op.To)...)
		case meta.OpGet:
			ops[i] = clientv3.OpGet(c.key(op.From), c.keyTo(op.To)...)
		}
	}
	return ops
}

// Grant implements [meta.KV].
func (c *Client) Grant(ctx context.Context, ttl time.Duration) (meta.LeaseID, error) {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	seconds := max(int64((ttl+time.Second-1)/time.Second), 1)
	resp, err := c.etcd.Grant(rctx, seconds)
	if err != nil {
		return 0, fmt.Errorf("grant lease: %w", mapError(ctx, rctx, err))
	}
	return meta.LeaseID(resp.ID), nil
}

// KeepAlive implements [meta.KV]. It does not use the client's own, which opens
// one stream after the other without pause while no endpoint answers.
func (c *Client) KeepAlive(ctx context.Context, id meta.LeaseID) error {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel() // ends the stream
	ttl, err := c.keepAlive(rctx, id)
	if err != nil {
		return fmt.Errorf("keep lease %x alive: %w", id, mapError(ctx, rctx, err))
	}
	if ttl <= 0 {
		return fmt.Errorf("keep lease %x alive: %w", id, meta.ErrLeaseNotFound)
	}
	return nil
}

func (c *Client) keepAlive(ctx context.Context, id meta.LeaseID) (ttl int64, err error) {
	stream, err := c.leases.LeaseKeepAlive(requireLeader(ctx))
	if err != nil {
		return 0, err
	}
	if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: int64(id)}); err != nil {
		return 0, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return 0, err
	}
	return resp.TTL, nil
}

// Revoke implements [meta.KV].
func (c *Client) Revoke(ctx context.Context, id meta.LeaseID) error {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	if _, err := c.etcd.Revoke(rctx, clientv3.LeaseID(id)); err != nil {
		err = mapError(ctx, rctx, err)
		if errors.Is(err, meta.ErrLeaseNotFound) {
			return nil
		}
		return fmt.Errorf("revoke lease %x: %w", id, err)
	}
	return nil
}

// Compact forgets what stood before revision, for the whole of etcd and not
// only for the keys under Root.
func (c *Client) Compact(ctx context.Context, revision int64) error {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	if _, err := c.etcd.Compact(rctx, revision); err != nil {
		return fmt.Errorf("compact at %d: %w", revision, mapError(ctx, rctx, err))
	}
	return nil
}

// requireLeader has a stream fail instead of wait when it meets a member that is
// cut off from the others. It replaces whatever metadata ctx carries: the client
// tells the streams of watches apart by it.
func requireLeader(ctx context.Context) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader))
}

// mapError gives an error of etcd's client one of the classes of [meta]. ctx is
// the caller's context, rctx the request's, which may end sooner.
//
// What the client returns may be, or wrap, a gRPC status: one that got through to
// our own server would tell its client that a call is safe to repeat whose write
// may have happened. So the cause survives as text only.
func mapError(ctx, rctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return fmt.Errorf("%w: %v", cause, err) //nolint:errorlint // see above
	}
	if status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) {
		// The server may notice the end of the caller's time before we do.
		mine, _ := rctx.Deadline()
		if theirs, ok := ctx.Deadline(); ok && !theirs.After(mine) {
			return fmt.Errorf("%w: %v", context.DeadlineExceeded, err) //nolint:errorlint // see above
		}
	}
	return classOf(err)
}

// classOf is mapError without regard to the time that a request had.
func classOf(err error) error {
	class := meta.ErrUnavailable
	switch known := rpctypes.Error(err); {
	case errors.Is(known, rpctypes.ErrCorrupt):
		class = fmt.Errorf("%w: %w", meta.ErrUnavailable, meta.ErrCorrupt)
	case status.Code(err) == codes.Unknown && strings.Contains(err.Error(), tooOld):
		class = meta.ErrTooOld
	case isDenied(err):
		class = meta.ErrDenied
	case errors.Is(known, rpctypes.ErrCompacted):
		class = meta.ErrCompacted
	case errors.Is(known, rpctypes.ErrLeaseNotFound):
		class = meta.ErrLeaseNotFound
	case errors.Is(known, rpctypes.ErrNoSpace):
		class = meta.ErrNoSpace
	case errors.Is(known, rpctypes.ErrTooManyOps), errors.Is(known, rpctypes.ErrRequestTooLarge):
		class = meta.ErrTooLarge
	}
	return fmt.Errorf("%w: %v", class, err) //nolint:errorlint // see above
}

// isDenied says whether etcd refused a request for who asks, or a login. It is no
// answer to a token that has run out: the client gets itself another.
func isDenied(err error) bool {
	if err == nil {
		return false
	}
	known := rpctypes.Error(err)
	return errors.Is(known, rpctypes.ErrPermissionDenied) || errors.Is(known, rpctypes.ErrAuthFailed) ||
		errors.Is(known, rpctypes.ErrUserEmpty) || errors.Is(known, rpctypes.ErrUserNotFound) ||
		errors.Is(known, rpctypes.ErrRoleNotFound) || errors.Is(known, rpctypes.ErrAuthNotEnabled)
}
