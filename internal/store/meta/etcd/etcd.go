// Package etcd implements [meta.KV] on etcd of the releases of [MinimumVersions] and later.
// It exposes no type, error or status of etcd's client.
//
// Older servers are not used: the server's version is read on each connection before any
// call uses that connection; see gate.
//
// Every key is under one root, which callers do not see. Reads are linearizable. Scans are
// streams (etcd 3.7) or pages, at one revision.
//
// etcd's client retries reads until the deadline of the request. It never retries writes, so
// that a failed write took effect at most once.
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

// maxRootBytes keeps a transaction of maximum size within etcd's limits, including roots and
// envelope.
const maxRootBytes = 64

// noKey is a missing key that is read for the revision. It is under the root, where the etcd
// user has the permission to read.
const noKey = "/\x00"

// Options configure [Open]. Zero fields have the documented defaults.
type Options struct {
	Endpoints          []string    // at least one
	Root               string      // prefix of every key, such as "/snapshotd"; no final slash, at most 64 bytes
	TLS                *tls.Config // default: no TLS
	Username, Password string
	// ReadPassword returns the password for each login. If it fails, or
	// etcd refuses the password, the last accepted one is used. Default: Password.
	ReadPassword   func() (string, error)
	DialTimeout    time.Duration // of one connection attempt; default 5 s
	RequestTimeout time.Duration // of one request, and of each step of a scan; default 5 s
	Log            *zap.Logger   // default: none
}

// Client is a [meta.KV] on etcd.
type Client struct {
	o       Options
	etcd    *clientv3.Client
	leases  pb.LeaseClient
	watches pb.WatchClient
	gate    *gate
	ctx     context.Context //nolint:containedctx // ends the watches at Close
	cancel  context.CancelFunc
}

var _ meta.KV = (*Client)(nil)

// Open returns a client, which connects on its first use. With a user name it waits for the
// first response, for at most DialTimeout.
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
		// Pings detect a dead peer; etcd refuses more than one per five seconds.
		DialKeepAliveTime:    10 * time.Second,
		DialKeepAliveTimeout: 5 * time.Second,
		// By default gRPC waits up to two minutes between connection attempts, which
		// delays the return of etcd.
		DialOptions: append(gated, grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second,
			},
			MinConnectTimeout: 3 * time.Second,
		})),
		// The client logs a warning for every error that it returns.
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

// Close ends the client's watches and closes its connections. Calls under way fail.
func (c *Client) Close() error {
	c.cancel()
	c.gate.close()
	if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("close etcd: %v", err) //nolint:errorlint // may have a gRPC status
	}
	return nil
}

func (c *Client) key(k string) string { return c.o.Root + k }

// keyTo returns the options for the end of a range, if any.
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
	return meta.RangeResult{
		KVs: c.kvs(resp.Kvs), More: resp.More, Count: resp.Count, Revision: resp.Header.Revision,
	}, nil
}

// Txn implements [meta.KV].
func (c *Client) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	if err := t.Check(); err != nil {
		return meta.TxnResult{}, err
	}
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	then, other := c.ops(t.Then), c.ops(t.Else)
	onlyCompares := len(then)+len(other) == 0
	if onlyCompares {
		// Without a read, the member that receives the transaction executes it on its own
		// state, which may lag behind.
		read := []clientv3.Op{clientv3.OpGet(c.key(noKey), clientv3.WithCountOnly())}
		then, other = read, read
	}
	resp, err := c.etcd.Txn(rctx).If(c.cmps(t.If)...).Then(then...).Else(other...).Commit()
	if err != nil {
		return meta.TxnResult{}, fmt.Errorf("transaction: %w", mapError(ctx, rctx, err))
	}
	res := meta.TxnResult{Succeeded: resp.Succeeded, Revision: resp.Header.Revision}
	for _, r := range resp.Responses {
		if got := r.GetResponseRange(); got != nil && !onlyCompares {
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
		// Check refuses all others, for which the client panics.
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

// KeepAlive implements [meta.KV]. It does not use the client's KeepAlive, which opens
// streams without a pause while no endpoint is available.
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

// Compact removes the history before revision of the whole etcd, not only of the keys under
// Root.
func (c *Client) Compact(ctx context.Context, revision int64) error {
	rctx, cancel := context.WithTimeout(ctx, c.o.RequestTimeout)
	defer cancel()
	if _, err := c.etcd.Compact(rctx, revision); err != nil {
		return fmt.Errorf("compact at %d: %w", revision, mapError(ctx, rctx, err))
	}
	return nil
}

// requireLeader makes a stream fail instead of wait at a member that is disconnected from
// the others. It replaces the metadata of ctx: the client distinguishes the streams of
// watches by metadata.
func requireLeader(ctx context.Context) context.Context {
	return metadata.NewOutgoingContext(ctx, metadata.Pairs(rpctypes.MetadataRequireLeaderKey, rpctypes.MetadataHasLeader))
}

// mapError maps an error of etcd's client to a class of [meta]. ctx is the caller's context,
// rctx the request's, which may end earlier.
//
// Errors of the client may wrap a gRPC status. A status that reached snapshotd's own clients
// could mark a call as safe to repeat although its write may have happened. So the cause is
// kept as text only.
func mapError(ctx, rctx context.Context, err error) error {
	if cause := ctx.Err(); cause != nil {
		return fmt.Errorf("%w: %v", cause, err) //nolint:errorlint // see above
	}
	if status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) {
		// The server may detect the caller's deadline first.
		request, _ := rctx.Deadline()
		if caller, ok := ctx.Deadline(); ok && !caller.After(request) {
			return fmt.Errorf("%w: %v", context.DeadlineExceeded, err) //nolint:errorlint // see above
		}
	}
	return classOf(err)
}

// classOf is mapError without the check of deadlines.
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

// isDenied reports whether etcd refused a login, or a request for lack of permission. An
// expired token does not count: the client renews it.
func isDenied(err error) bool {
	if err == nil {
		return false
	}
	known := rpctypes.Error(err)
	return errors.Is(known, rpctypes.ErrPermissionDenied) || errors.Is(known, rpctypes.ErrAuthFailed) ||
		errors.Is(known, rpctypes.ErrUserEmpty) || errors.Is(known, rpctypes.ErrUserNotFound) ||
		errors.Is(known, rpctypes.ErrRoleNotFound) || errors.Is(known, rpctypes.ErrAuthNotEnabled)
}
