// Package etcdproxy stands between etcd and its clients and changes its answers: which
// version it has, and the progress of a watch.
package etcdproxy

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// Proxy forwards what it is asked to one etcd. Its methods are safe for concurrent
// use; what they change holds for the calls that come after, and for streams from
// their next message on.
type Proxy struct {
	conn     *grpc.ClientConn
	endpoint string

	version   atomic.Pointer[string]
	mute      atomic.Bool
	learner   atomic.Bool
	every     atomic.Int64 // of so many answers with events one is overtaken; 0: none
	cuts      atomic.Int64
	events    atomic.Int64
	overtaken atomic.Int64
	cut       atomic.Int64
	noStream  atomic.Bool

	mu    sync.Mutex
	calls map[string]int // by method
	srv   *grpc.Server   // nil while stopped
	done  chan struct{}
}

// Start starts a proxy of the etcd at endpoint, which ends with the test.
func Start(tb testing.TB, endpoint string) *Proxy {
	tb.Helper()
	return StartAt(tb, endpoint, "127.0.0.1:0")
}

// StartAt is Start at an address that the test chooses.
func StartAt(tb testing.TB, endpoint, listen string) *Proxy {
	tb.Helper()
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(raw{}), grpc.MaxCallRecvMsgSize(1<<30)))
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{conn: conn, endpoint: listen, calls: map[string]int{}}
	p.Restart(tb)
	tb.Cleanup(func() {
		p.Stop()
		if err := conn.Close(); err != nil {
			tb.Error(err)
		}
	})
	return p
}

// Endpoint returns the address for clients, the same after a Restart.
func (p *Proxy) Endpoint() string { return p.endpoint }

// Stop ends all connections and takes no more. Stopping twice is the same as once.
func (p *Proxy) Stop() {
	p.mu.Lock()
	srv, done := p.srv, p.done
	p.srv = nil
	p.mu.Unlock()
	if srv != nil {
		srv.Stop()
		<-done
	}
}

// Restart serves again after a Stop.
func (p *Proxy) Restart(tb testing.TB) {
	tb.Helper()
	var listen net.ListenConfig
	l, err := listen.Listen(tb.Context(), "tcp", p.endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	srv := grpc.NewServer(grpc.ForceServerCodecV2(raw{}), grpc.UnknownServiceHandler(p.handle), grpc.MaxRecvMsgSize(1<<30),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second})) // that of etcd
	done := make(chan struct{})
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endpoint = l.Addr().String()
	p.srv, p.done = srv, done
	go func() {
		defer close(done)
		_ = srv.Serve(l)
	}()
}

// Version has the server call itself so from now on; empty is what it is.
func (p *Proxy) Version(version string) { p.version.Store(&version) }

// Mute has questions for the version end as if the server were not there.
func (p *Proxy) Mute(mute bool) { p.mute.Store(mute) }

// Learner has the server say that it is a learner.
func (p *Proxy) Learner(learner bool) { p.learner.Store(learner) }

// WithoutRangeStream has the server not know RangeStream, as before etcd 3.7.
func (p *Proxy) WithoutRangeStream() { p.noStream.Store(true) }

// Overtake has answers about progress overtake the events of watches, as in etcd
// before 3.4.25 and 3.5.8: of so many answers with events one follows another that
// says that all of them were sent; 0 for none. So many times the stream breaks
// between the two.
func (p *Proxy) Overtake(every, cuts int) {
	p.cuts.Store(int64(cuts))
	p.every.Store(int64(every))
}

// Overtaken returns how many answers with events were overtaken, and how many
// streams were cut there.
func (p *Proxy) Overtaken() (events, cuts int64) { return p.overtaken.Load(), p.cut.Load() }

// Calls returns how many calls of a method have come.
func (p *Proxy) Calls(method string) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.calls[method]
}

// Used returns how many calls have come that do not ask for the version.
func (p *Proxy) Used() (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for method, count := range p.calls {
		if method != pb.Maintenance_Status_FullMethodName {
			n += count
		}
	}
	return n
}

// handle forwards a call of any kind.
func (p *Proxy) handle(_ any, in grpc.ServerStream) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	method, _ := grpc.MethodFromServerStream(in)
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md.Copy())
	}
	p.mu.Lock()
	p.calls[method]++
	p.mu.Unlock()
	switch {
	case method == pb.Maintenance_Status_FullMethodName && p.mute.Load():
		return status.Error(codes.Unavailable, "muted")
	case method == pb.KV_RangeStream_FullMethodName && p.noStream.Load():
		return status.Error(codes.Unimplemented, "unknown method RangeStream")
	}
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return err
	}
	go func() { // ends with the call
		for {
			var msg frame
			if err := in.RecvMsg(&msg); err != nil {
				if errors.Is(err, io.EOF) {
					_ = out.CloseSend()
				}
				return
			}
			if out.SendMsg(&msg) != nil {
				return
			}
		}
	}()
	for {
		var msg frame
		if err := out.RecvMsg(&msg); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		if err := p.answer(method, in, &msg); err != nil {
			return err
		}
	}
}

// answer passes a message of etcd on, with what is to be false in it.
func (p *Proxy) answer(method string, in grpc.ServerStream, msg *frame) error {
	switch method {
	case pb.Maintenance_Status_FullMethodName:
		resp := &pb.StatusResponse{}
		if err := proto.Unmarshal(msg.data, resp); err != nil {
			return err
		}
		if v := p.version.Load(); v != nil && *v != "" {
			resp.Version = *v
		}
		resp.IsLearner = resp.GetIsLearner() || p.learner.Load()
		return send(in, resp)
	case pb.Watch_Watch_FullMethodName:
		every := p.every.Load()
		if every == 0 {
			break
		}
		resp := &pb.WatchResponse{}
		if err := proto.Unmarshal(msg.data, resp); err != nil {
			return err
		}
		if len(resp.GetEvents()) == 0 || resp.GetFragment() || p.events.Add(1)%every != 0 {
			break
		}
		header := pb.ResponseHeader{
			ClusterId: resp.GetHeader().GetClusterId(),
			MemberId:  resp.GetHeader().GetMemberId(),
			RaftTerm:  resp.GetHeader().GetRaftTerm(),
			Revision:  resp.GetEvents()[len(resp.GetEvents())-1].GetKv().GetModRevision(),
		}
		if err := send(in, &pb.WatchResponse{Header: &header, WatchId: -1}); err != nil {
			return err
		}
		p.overtaken.Add(1)
		if p.cuts.Add(-1) >= 0 {
			p.cut.Add(1)
			return status.Error(codes.Unavailable, "cut")
		}
	}
	return in.SendMsg(msg)
}

func send(in grpc.ServerStream, m proto.Message) error {
	data, err := proto.Marshal(m)
	if err != nil {
		return err
	}
	return in.SendMsg(&frame{data})
}

// frame is a message on the wire.
type frame struct{ data []byte }

// raw is the codec of frames.
type raw struct{}

func (raw) Name() string { return "proto" }

func (raw) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("not a frame: %T", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(f.data)}, nil
}

func (raw) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("not a frame: %T", v)
	}
	f.data = data.Materialize()
	return nil
}
