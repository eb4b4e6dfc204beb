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

// login sets the current password in each login. etcd's client logs in when it is opened,
// after a refused token, and for each stream, always with the initial password.
//
//	the file has                    | a login sends
//	the password of the last login  | that password
//	another password                | that password; if etcd refuses it, the password of
//	                                | the last successful login, since the file may be
//	                                | replaced before etcd's password
//	no readable password            | the password of the last successful login
//	another, and both are refused   | both; the call fails with ErrDenied, and the next
//	                                | call reads the file again
//
// If a restart of etcd invalidates the token, the first call with it costs one login: the
// client repeats the call with the new token, which all later calls use.
type login struct {
	read func() (string, error)
	log  *zap.Logger

	mu     sync.Mutex
	last   string // of the last successful login, or the initial one
	unread bool   // the last read failed, which was logged
}

// intercept is the client's interceptor of unary calls.
func (l *login) intercept(
	ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker,
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

// passwords returns the password of the file and that of the last successful login. If the
// file is unreadable, both are the latter.
func (l *login) passwords() (current, last string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	current, err := l.read()
	if err != nil {
		if !l.unread {
			l.log.Warn("etcd password not read, using the last accepted one", zap.Error(err))
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
	l.log.Info("etcd accepted the new password")
}
