package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"regexp"
	"runtime/debug"
	"strings"
	"time"

	"buf.build/go/protovalidate"
	grpcprom "github.com/grpc-ecosystem/go-grpc-middleware/providers/prometheus"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors"
	"github.com/grpc-ecosystem/go-grpc-middleware/v2/interceptors/recovery"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/manager"
)

// requestIDKey is the metadata key under which a caller may give a request id
// and finds the one that was used.
const requestIDKey = "x-request-id"

// noteKey is the metadata key of remarks on an answer: a person should see them,
// a program need not.
const noteKey = "snapshotd-note"

var requestIDRule = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// Deadlines.
const (
	defaultDeadline = time.Minute
	createDeadline  = 15 * time.Minute // of CreateSnapshot, unless the caller gives another
	maxDeadline     = 30 * time.Minute
	maxStream       = time.Hour
	// sendTimeout is how long a message of a stream may wait for its reader.
	sendTimeout = time.Minute
)

// call is what is known of a call while it runs.
type call struct {
	id        string // request id
	principal string // once authenticated
}

type callKey struct{}

// callOf returns the call that ctx belongs to.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{principal: localPrincipal}
}

// newCall makes the call of ctx with the caller's request id, if it is one.
func newCall(ctx context.Context) (context.Context, *call) {
	c := &call{}
	if given := metadata.ValueFromIncomingContext(ctx, requestIDKey); len(given) == 1 && requestIDRule.MatchString(given[0]) {
		c.id = given[0]
	} else {
		c.id = rand.Text()
	}
	return context.WithValue(ctx, callKey{}, c), c
}

// stream is a stream with another context.
type stream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // the stream's own; there is no other way to hand it on
}

func (s *stream) Context() context.Context { return s.ctx }

// chain returns the interceptors, outermost first.
func (s *Server) chain(metrics *grpcprom.ServerMetrics) []grpc.ServerOption {
	logged := interceptors.CommonReportableFunc(s.report)
	recovered := recovery.WithRecoveryHandlerContext(s.recovered)
	return []grpc.ServerOption{
		grpc.ChainUnaryInterceptor(
			identifyUnary,
			interceptors.UnaryServerInterceptor(logged),
			metrics.UnaryServerInterceptor(),
			recovery.UnaryServerInterceptor(recovered),
			s.unary,
		),
		grpc.ChainStreamInterceptor(
			identifyStream,
			interceptors.StreamServerInterceptor(logged),
			metrics.StreamServerInterceptor(),
			recovery.StreamServerInterceptor(recovered),
			s.stream,
		),
	}
}

func identifyUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	ctx, c := newCall(ctx)
	_ = grpc.SetHeader(ctx, metadata.Pairs(requestIDKey, c.id)) // fails only when the call is over
	return handler(ctx, req)
}

func identifyStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, c := newCall(ss.Context())
	_ = ss.SetHeader(metadata.Pairs(requestIDKey, c.id)) // as above
	return handler(srv, &stream{ss, ctx})
}

// report logs a call when it ends.
func (s *Server) report(ctx context.Context, m interceptors.CallMeta) (interceptors.Reporter, context.Context) {
	return &reporter{log: s.log, method: m.FullMethod(), call: callOf(ctx)}, ctx
}

type reporter struct {
	interceptors.NoopReporter
	log    *zap.Logger
	method string
	call   *call
}

// PostCall writes the line. What went as it should is worth one only when it
// may have changed something.
func (r *reporter) PostCall(err error, took time.Duration) {
	code := status.Code(err)
	fields := []zap.Field{
		zap.String("method", r.method),
		zap.Stringer("code", code),
		zap.Duration("duration", took),
		zap.String("request_id", r.call.id),
		zap.String("principal", r.call.principal),
	}
	a, _ := errors.AsType[*answer](err)
	if a != nil {
		fields = append(fields, zap.String("reason", a.reason))
	}
	switch code {
	case codes.OK:
		if permissions[r.method] >= write {
			r.log.Info("call", fields...)
		} else {
			r.log.Debug("call", fields...)
		}
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.Unavailable:
		// Only here, for the client is not told the cause.
		if a != nil && a.cause != nil {
			fields = append(fields, zap.NamedError("err", a.cause))
		}
		r.log.Error("call", fields...)
	default:
		r.log.Info("call", fields...)
	}
}

// recovered turns a panic into an answer. The process lives: a handler changes
// nothing in it that another would meet.
func (s *Server) recovered(ctx context.Context, p any) error {
	s.log.Error("panic", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()), zap.String("request_id", callOf(ctx).id))
	return toAnswer(fmt.Errorf("panic: %v", p), callOf(ctx).id)
}

// unary sets the deadline, lets the caller in, checks the request, and turns
// the handler's error into an answer.
func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	limit, fallback := maxDeadline, defaultDeadline
	if info.FullMethod == pb.SnapshotService_CreateSnapshot_FullMethodName {
		fallback = createDeadline
	}
	if _, given := ctx.Deadline(); !given {
		limit = fallback
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ctx, notes := manager.WithNotes(ctx)
	resp, err := func() (any, error) {
		if err := s.admit(ctx, info.FullMethod); err != nil {
			return nil, err
		}
		if err := s.validate(req); err != nil {
			return nil, err
		}
		return handler(ctx, req)
	}()
	if err != nil {
		return nil, s.answer(ctx, info.FullMethod, err)
	}
	for _, text := range notes.List() {
		_ = grpc.SetHeader(ctx, metadata.Pairs(noteKey, text)) // fails only when the call is over
	}
	return resp, nil
}

// stream does the same for a stream, whose messages it checks as they come.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	switch info.FullMethod {
	case pb.CatalogService_AddSegments_FullMethodName, pb.CatalogService_ExportSegments_FullMethodName:
		var end context.CancelFunc
		ctx, end = context.WithTimeout(ctx, maxStream)
		defer end()
	default:
		// These last as long as the client likes, so they must not hold up the
		// end of this process.
		defer context.AfterFunc(s.stopping, func() { cancel(manager.ErrStopping) })()
	}
	err := s.admit(ctx, info.FullMethod)
	if err == nil {
		err = handler(srv, &guarded{stream{ss, ctx}, s.validate})
	}
	if err != nil {
		return s.answer(ctx, info.FullMethod, err)
	}
	return nil
}

// admit lets a caller in, or does not. What changes anything waits for somebody to
// recover a metadata store that has gone back in time.
func (s *Server) admit(ctx context.Context, method string) error {
	principal, err := authenticate(ctx)
	if err != nil {
		return err
	}
	callOf(ctx).principal = principal
	if err := authorize(principal, method); err != nil {
		return err
	}
	if permissions[method] == write {
		return s.manager.CheckRollback(ctx)
	}
	return nil
}

// answer turns a handler's error into the answer.
func (s *Server) answer(ctx context.Context, method string, err error) error {
	if errors.Is(err, context.Canceled) && errors.Is(context.Cause(ctx), manager.ErrStopping) {
		err = manager.ErrStopping
	}
	if !strings.HasPrefix(method, "/snapshotd.") {
		// Health and reflection make their own statuses, and ask no store.
		if _, ok := status.FromError(err); ok {
			return err
		}
	}
	return toAnswer(err, callOf(ctx).id)
}

func (s *Server) validate(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	if isOverfull(m) {
		return errTooMany
	}
	if proto.Size(m) > maxMessage {
		return errTooLarge
	}
	if longest(m) > maxThorough {
		// Too long for any rule there is; that is told without looking at each.
		if err := protovalidate.Validate(m, protovalidate.WithFilter(only(m))); err != nil {
			return err
		}
	}
	if hasMoreThan(thoroughElements, m.ProtoReflect()) {
		// A violation takes kilobytes, and each element may have some.
		return s.validator.Validate(m, protovalidate.WithFailFast())
	}
	return s.validator.Validate(m)
}

// maxThorough is how long the longest list may be that every rule is held
// against. It is the longest that any rule allows.
const maxThorough = 10_000

// longest is the length of the longest of a message's own lists.
func longest(m proto.Message) int {
	n := 0
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.IsList() {
			n = max(n, v.List().Len())
		}
		return true
	})
	return n
}

// only lets the rules of the message's own fields count, not of what is in them.
func only(m proto.Message) protovalidate.FilterFunc {
	whole := m.ProtoReflect().Descriptor()
	return func(_ protoreflect.Message, d protoreflect.Descriptor) bool { return d.Parent() == whole }
}

// guarded is a stream that checks what it receives, and whose Send and Recv end
// with its context: gRPC's own end only with the connection or the call.
type guarded struct {
	stream
	validate func(any) error
}

func (g *guarded) RecvMsg(m any) error {
	if err := g.await(0, func() error { return g.ServerStream.RecvMsg(m) }); err != nil {
		return err
	}
	return g.validate(m)
}

func (g *guarded) SendMsg(m any) error {
	return g.await(sendTimeout, func() error { return g.ServerStream.SendMsg(m) })
}

// await runs f, but not for longer than the context, or the limit unless it is
// 0. An f that is left behind ends as soon as the handler has returned, which
// the caller has to see to.
func (g *guarded) await(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	var late <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		late = timer.C
	}
	select {
	case err := <-done:
		if err == nil || errors.Is(err, io.EOF) {
			return err
		}
		return fromStream(err)
	case <-g.ctx.Done():
		return g.ctx.Err()
	case <-late:
		return errSlowReader
	}
}

// newValidator returns the check of the rules that stand in the API.
func newValidator() (protovalidate.Validator, error) {
	messages, err := requests()
	if err != nil {
		return nil, fmt.Errorf("find the requests: %w", err)
	}
	v, err := protovalidate.New(protovalidate.WithMessages(messages...))
	if err != nil {
		return nil, fmt.Errorf("compile the rules of requests: %w", err)
	}
	return v, nil
}
