package etcd

import (
	"context"
	"errors"
	"sync"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.uber.org/zap"
	"google.golang.org/grpc"
)

// login puts the current password into each login. etcd's client logs in when it is
// opened, when a token is refused, and for each stream, always with the password that
// it was opened with.
//
//	the file holds                 | a login sends
//	the password of the last one   | that
//	another                        | that; when etcd refuses it, the password of the
//	                               | last login that succeeded, for the file may be
//	                               | replaced before the password at etcd is
//	nothing that can be read       | the password of the last login that succeeded
//	another, and both are refused  | both; the call ends with ErrDenied, and the next
//	                               | call reads the file again
//
// A token that died with a restart of etcd costs the call that meets it one login: the
// client repeats the call with the new token, which all calls use from then on.
type login struct {
	read func() (string, error)
	log  *zap.Logger

	mu     sync.Mutex
	last   string // of the last login that succeeded; before that, of the start
	unread bool   // the last reading failed, and the log says so
}

// intercept is the client's interceptor of unary calls.
func (l *login) intercept(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	in, ok := req.(*pb.AuthenticateRequest)
	if !ok || method != pb.Auth_Authenticate_FullMethodName {
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	attempt := func(password string) error {
		return invoke(ctx, method, &pb.AuthenticateRequest{Name: in.GetName(), Password: password}, reply, cc, opts...)
	}
	current, last := l.passwords()
	err := attempt(current)
	if err != nil && current != last && errors.Is(rpctypes.Error(err), rpctypes.ErrAuthFailed) {
		return attempt(last)
	}
	if err == nil && current != last {
		l.succeeded(current)
	}
	return err
}

// passwords returns the password that the file holds and that of the last login that
// succeeded. The file's is the latter when it cannot be read.
func (l *login) passwords() (current, last string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	current, err := l.read()
	if err != nil {
		if !l.unread {
			l.log.Warn("the password for etcd cannot be read: the last one that etcd accepted is used", zap.Error(err))
		}
		current = l.last
	}
	l.unread = err != nil
	return current, l.last
}

func (l *login) succeeded(password string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = password
	l.log.Info("etcd accepted the password that was replaced in its file")
}
