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

// requestIDKey is the metadata key of the request id, in requests and responses.
const requestIDKey = "x-request-id"

// noteKey is the metadata key of notes on a response, which are meant for people.
const noteKey = "snapshotd-note"

var requestIDRule = regexp.MustCompile(`^[A-Za-z0-9._-]{1,64}$`)

// Deadlines.
const (
	defaultDeadline = time.Minute
	createDeadline  = 15 * time.Minute // of CreateSnapshot without a deadline of the caller
	maxDeadline     = 30 * time.Minute
	maxStream       = time.Hour
	// sendTimeout is the time within which the client must read a message of a stream.
	sendTimeout = time.Minute
)

// call describes a running call.
type call struct {
	id        string // request id
	principal string // set by the authentication
}

type callKey struct{}

// callOf returns the call of ctx.
func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{principal: localPrincipal}
}

// newCall adds a call to ctx, with the caller's request id if it is valid.
func newCall(ctx context.Context) (context.Context, *call) {
	c := &call{}
	ids := metadata.ValueFromIncomingContext(ctx, requestIDKey)
	if len(ids) == 1 && requestIDRule.MatchString(ids[0]) {
		c.id = ids[0]
	} else {
		c.id = rand.Text()
	}
	return context.WithValue(ctx, callKey{}, c), c
}

// stream is a stream with another context.
type stream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // the only way to replace a stream's context
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
	_ = grpc.SetHeader(ctx, metadata.Pairs(requestIDKey, c.id)) // fails only after the end of the call
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

// PostCall logs the call: at level debug if it succeeded and cannot write, at level
// error if the cause is in the server, otherwise at level info.
func (r *reporter) PostCall(err error, took time.Duration) {
	code := status.Code(err)
	fields := []zap.Field{
		zap.String("method", r.method),
		zap.Stringer("code", code),
		zap.Duration("duration", took),
		zap.String("request_id", r.call.id),
		zap.String("principal", r.call.principal),
	}
	se, _ := errors.AsType[*statusError](err)
	if se != nil {
		fields = append(fields, zap.String("reason", se.reason))
	}
	switch code {
	case codes.OK:
		if permissions[r.method] >= write {
			r.log.Info("call", fields...)
		} else {
			r.log.Debug("call", fields...)
		}
	case codes.Internal, codes.Unknown, codes.DataLoss, codes.Unavailable:
		// The client does not get the cause.
		if se != nil && se.cause != nil {
			fields = append(fields, zap.NamedError("err", se.cause))
		}
		r.log.Error("call", fields...)
	default:
		r.log.Info("call", fields...)
	}
}

// recovered converts a panic into an error. The process continues: handlers share no
// state that a panic could leave inconsistent.
func (s *Server) recovered(ctx context.Context, p any) error {
	s.log.Error("panic", zap.Any("panic", p), zap.ByteString("stack", debug.Stack()),
		zap.String("request_id", callOf(ctx).id))
	return toStatusError(fmt.Errorf("panic: %v", p), callOf(ctx).id)
}

// unary sets the deadline, admits the caller, validates the request, and converts the
// handler's error into a status.
func (s *Server) unary(
	ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler,
) (any, error) {
	limit, fallback := maxDeadline, defaultDeadline
	if info.FullMethod == pb.SnapshotService_CreateSnapshot_FullMethodName {
		fallback = createDeadline
	}
	if _, ok := ctx.Deadline(); !ok {
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
		return nil, s.statusError(ctx, info.FullMethod, err)
	}
	for _, text := range notes.List() {
		_ = grpc.SetHeader(ctx, metadata.Pairs(noteKey, text)) // fails only after the end of the call
	}
	return resp, nil
}

// stream does the same for a stream, and validates each received message.
func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	ctx, cancel := context.WithCancelCause(ss.Context())
	defer cancel(nil)
	switch info.FullMethod {
	case pb.CatalogService_AddSegments_FullMethodName, pb.CatalogService_ExportSegments_FullMethodName:
		var end context.CancelFunc
		ctx, end = context.WithTimeout(ctx, maxStream)
		defer end()
	default:
		// The client decides when these end; they must not delay the end of the process.
		defer context.AfterFunc(s.stopping, func() { cancel(manager.ErrStopping) })()
	}
	err := s.admit(ctx, info.FullMethod)
	if err == nil {
		err = handler(srv, &checkedStream{stream{ss, ctx}, s.validate})
	}
	if err != nil {
		return s.statusError(ctx, info.FullMethod, err)
	}
	return nil
}

// admit authenticates and authorizes a call. While a metadata rollback is not recovered it
// refuses calls that write.
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

// statusError converts a handler's error.
func (s *Server) statusError(ctx context.Context, method string, err error) error {
	if errors.Is(err, context.Canceled) && errors.Is(context.Cause(ctx), manager.ErrStopping) {
		err = manager.ErrStopping
	}
	if !strings.HasPrefix(method, "/snapshotd.") {
		// Health and reflection return their own statuses, and call no store.
		if _, ok := status.FromError(err); ok {
			return err
		}
	}
	return toStatusError(err, callOf(ctx).id)
}

// validate checks the size of a message and the rules of the API.
func (s *Server) validate(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return nil
	}
	if hasTooManyElements(m) {
		return errTooMany
	}
	if proto.Size(m) > maxMessage {
		return errTooLarge
	}
	if longestList(m) > maxListLength {
		// No rule allows it. The rules of its elements are not checked.
		if err := protovalidate.Validate(m, protovalidate.WithFilter(ownFieldsOnly(m))); err != nil {
			return err
		}
	}
	if hasMoreThan(maxElementsForAll, m.ProtoReflect()) {
		// A violation takes kilobytes, and each element may have several.
		return s.validator.Validate(m, protovalidate.WithFailFast())
	}
	return s.validator.Validate(m)
}

// maxListLength is the longest list that any rule allows.
const maxListLength = 10_000

// longestList returns the length of the longest of a message's own lists.
func longestList(m proto.Message) int {
	n := 0
	m.ProtoReflect().Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if f.IsList() {
			n = max(n, v.List().Len())
		}
		return true
	})
	return n
}

// ownFieldsOnly restricts a validation to the message's own fields.
func ownFieldsOnly(m proto.Message) protovalidate.FilterFunc {
	whole := m.ProtoReflect().Descriptor()
	return func(_ protoreflect.Message, d protoreflect.Descriptor) bool { return d.Parent() == whole }
}

// checkedStream is a stream that validates received messages, and whose Send and Recv
// end with its context. gRPC's own end only with the connection or the call.
type checkedStream struct {
	stream
	validate func(any) error
}

func (g *checkedStream) RecvMsg(m any) error {
	if err := g.await(0, func() error { return g.ServerStream.RecvMsg(m) }); err != nil {
		return err
	}
	return g.validate(m)
}

func (g *checkedStream) SendMsg(m any) error {
	return g.await(sendTimeout, func() error { return g.ServerStream.SendMsg(m) })
}

// await runs f until its end, the end of the context, or the end of a limit above 0. An f
// that still runs must end after the return of the handler.
func (g *checkedStream) await(limit time.Duration, f func() error) error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	var timeout <-chan time.Time
	if limit > 0 {
		timer := time.NewTimer(limit)
		defer timer.Stop()
		timeout = timer.C
	}
	select {
	case err := <-done:
		if err == nil || errors.Is(err, io.EOF) {
			return err
		}
		return fromStream(err)
	case <-g.ctx.Done():
		return g.ctx.Err()
	case <-timeout:
		return errSlowReader
	}
}

// newValidator returns the validator of the rules in the API.
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
