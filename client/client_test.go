package client_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// server returns its errors to successive calls, and then succeeds.
type server struct {
	snapshotdv1.UnimplementedSnapshotServiceServer
	snapshotdv1.UnimplementedCatalogServiceServer
	snapshotdv1.UnimplementedEventServiceServer
	snapshotdv1.UnimplementedReclaimServiceServer
	snapshotdv1.UnimplementedAdminServiceServer

	mu     sync.Mutex
	errs   []error
	calls  int
	events [][]*snapshotdv1.WatchEventsResponse // of each stream
	tokens []string                             // first token of each stream
	jobs   [][]*snapshotdv1.RestoreJob          // of each stream
	jobIDs []int64                              // job id of each stream

	creates []string // token of each create
}

func (s *server) next() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	if len(s.errs) == 0 {
		return nil
	}
	err := s.errs[0]
	s.errs = s.errs[1:]
	return err
}

func (s *server) CreateSnapshot(
	_ context.Context, req *snapshotdv1.CreateSnapshotRequest,
) (*snapshotdv1.CreateSnapshotResponse, error) {
	s.mu.Lock()
	s.creates = append(s.creates, req.GetRequestToken())
	s.mu.Unlock()
	return &snapshotdv1.CreateSnapshotResponse{}, s.next()
}

func (s *server) GetSnapshot(
	context.Context, *snapshotdv1.GetSnapshotRequest,
) (*snapshotdv1.GetSnapshotResponse, error) {
	return &snapshotdv1.GetSnapshotResponse{}, s.next()
}

func (s *server) DropSnapshot(
	context.Context, *snapshotdv1.DropSnapshotRequest,
) (*snapshotdv1.DropSnapshotResponse, error) {
	return &snapshotdv1.DropSnapshotResponse{}, s.next()
}

func (s *server) CheckReferences(
	context.Context, *snapshotdv1.CheckReferencesRequest,
) (*snapshotdv1.CheckReferencesResponse, error) {
	return &snapshotdv1.CheckReferencesResponse{}, s.next()
}

func (s *server) Reclaim(context.Context, *snapshotdv1.ReclaimRequest) (*snapshotdv1.ReclaimResponse, error) {
	return &snapshotdv1.ReclaimResponse{}, s.next()
}

func (s *server) ConfirmReclaimed(
	context.Context, *snapshotdv1.ConfirmReclaimedRequest,
) (*snapshotdv1.ConfirmReclaimedResponse, error) {
	return &snapshotdv1.ConfirmReclaimedResponse{}, s.next()
}

func (s *server) WatchEvents(
	req *snapshotdv1.WatchEventsRequest, stream grpc.ServerStreamingServer[snapshotdv1.WatchEventsResponse],
) error {
	s.mu.Lock()
	s.tokens = append(s.tokens, req.GetResumeToken())
	var msgs []*snapshotdv1.WatchEventsResponse
	if len(s.events) > 0 {
		msgs, s.events = s.events[0], s.events[1:]
	}
	s.mu.Unlock()
	for _, m := range msgs {
		if err := stream.Send(m); err != nil {
			return err
		}
	}
	return s.next()
}

func (s *server) WatchRestore(
	req *snapshotdv1.WatchRestoreRequest, stream grpc.ServerStreamingServer[snapshotdv1.WatchRestoreResponse],
) error {
	s.mu.Lock()
	s.jobIDs = append(s.jobIDs, req.GetJobId())
	var jobs []*snapshotdv1.RestoreJob
	if len(s.jobs) > 0 {
		jobs, s.jobs = s.jobs[0], s.jobs[1:]
	}
	s.mu.Unlock()
	for _, j := range jobs {
		if err := stream.Send(&snapshotdv1.WatchRestoreResponse{Job: j}); err != nil {
			return err
		}
	}
	return s.next()
}

// dial returns a client of s over a connection in memory.
func dial(t *testing.T, s *server, o client.Options) *client.Client {
	t.Helper()
	l := bufconn.Listen(1 << 16)
	g := grpc.NewServer()
	snapshotdv1.RegisterSnapshotServiceServer(g, s)
	snapshotdv1.RegisterCatalogServiceServer(g, s)
	snapshotdv1.RegisterEventServiceServer(g, s)
	snapshotdv1.RegisterReclaimServiceServer(g, s)
	snapshotdv1.RegisterAdminServiceServer(g, s)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	o.Insecure = true
	o.DialOptions = append(o.DialOptions, grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		return l.DialContext(ctx)
	}))
	c, err := client.Dial("passthrough:///memory", o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// apiError returns an error in the form of snapshotd.
func apiError(t *testing.T, code codes.Code, reason string, more ...protoadapt.MessageV1) error {
	t.Helper()
	details := append([]protoadapt.MessageV1{&errdetails.ErrorInfo{Domain: "snapshotd", Reason: reason}}, more...)
	st, err := status.New(code, "no").WithDetails(details...)
	if err != nil {
		t.Fatal(err)
	}
	return st.Err()
}

func TestRetry(t *testing.T) {
	soon := &errdetails.RetryInfo{RetryDelay: durationpb.New(time.Millisecond)}
	get := func(ctx context.Context, c *client.Client) error {
		_, err := c.Snapshots.GetSnapshot(ctx, &snapshotdv1.GetSnapshotRequest{})
		return err
	}
	drop := func(token string) func(context.Context, *client.Client) error {
		return func(ctx context.Context, c *client.Client) error {
			_, err := c.Snapshots.DropSnapshot(ctx, &snapshotdv1.DropSnapshotRequest{RequestToken: token})
			return err
		}
	}
	create := func(ctx context.Context, c *client.Client) error {
		_, err := c.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{RequestToken: "t"})
		return err
	}
	check := func(ctx context.Context, c *client.Client) error {
		_, err := c.Reclaim.CheckReferences(ctx, &snapshotdv1.CheckReferencesRequest{})
		return err
	}
	reclaim := func(ctx context.Context, c *client.Client) error {
		_, err := c.Reclaim.Reclaim(ctx, &snapshotdv1.ReclaimRequest{})
		return err
	}
	confirm := func(ctx context.Context, c *client.Client) error {
		_, err := c.Reclaim.ConfirmReclaimed(ctx, &snapshotdv1.ConfirmReclaimedRequest{})
		return err
	}
	unavailable := apiError(t, codes.Unavailable, "STORE_UNAVAILABLE")
	for _, tc := range []struct {
		name  string
		errs  []error
		call  func(context.Context, *client.Client) error
		calls int
		code  codes.Code
	}{
		{"a read", []error{unavailable}, get, 2, codes.OK},
		{"a check", []error{unavailable}, check, 2, codes.OK},
		{"a request to delete", []error{apiError(t, codes.Unavailable, "REFERENCES_LOADING", soon)}, reclaim, 2, codes.OK},
		{"a confirmation", []error{unavailable}, confirm, 2, codes.OK},
		{"a write with a token", []error{unavailable}, drop("t"), 2, codes.OK},
		{"a write without a token", []error{unavailable}, drop(""), 1, codes.Unavailable},
		{"attempts used up", slices.Repeat([]error{unavailable}, 9), get, 3, codes.Unavailable},
		{"a definite answer", []error{apiError(t, codes.NotFound, "SNAPSHOT_NOT_FOUND")}, get, 1, codes.NotFound},
		{"a conflict", []error{apiError(t, codes.Aborted, "CONFLICT", soon)}, drop(""), 2, codes.OK},
		{"a conflict without advice", []error{apiError(t, codes.Aborted, "CONFLICT")}, drop("t"), 1, codes.Aborted},
		{"another abort", []error{apiError(t, codes.Aborted, "REVISION_CHANGED", soon)}, drop("t"), 1, codes.Aborted},
		{
			"a create that was overtaken",
			[]error{apiError(t, codes.Aborted, "CATALOG_COMPACTED", soon)},
			create, 1,
			codes.Aborted,
		},
		{"a create that was given up", []error{apiError(t, codes.Aborted, "CREATE_ABORTED")}, create, 2, codes.OK},
		{"an unavailable create", []error{unavailable}, create, 2, codes.OK},
		{
			"a wait past the deadline",
			[]error{apiError(t, codes.Unavailable, "STORE_UNAVAILABLE",
				&errdetails.RetryInfo{RetryDelay: durationpb.New(time.Hour)})},
			get, 1, codes.Unavailable,
		},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := &server{errs: tc.errs}
			c := dial(t, s, client.Options{MaxAttempts: 3})
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if err := tc.call(ctx, c); status.Code(err) != tc.code {
				t.Errorf("got %v, want %v", err, tc.code)
			}
			if s.calls != tc.calls {
				t.Errorf("got %d calls, want %d", s.calls, tc.calls)
			}
		})
	}
}

// TestAbortedCreateIsRetried has creates abandoned: each retry uses another token, and a
// repeat under the first token uses the same tokens.
func TestAbortedCreateIsRetried(t *testing.T) {
	aborted, unavailable := apiError(t, codes.Aborted, "CREATE_ABORTED"), apiError(t, codes.Unavailable,
		"STORE_UNAVAILABLE")
	s := &server{errs: []error{aborted, unavailable, aborted, nil, aborted, aborted, nil, aborted, nil}}
	c := dial(t, s, client.Options{})
	create := func(req *snapshotdv1.CreateSnapshotRequest) {
		t.Helper()
		token := req.GetRequestToken()
		if _, err := c.Snapshots.CreateSnapshot(t.Context(), req); err != nil {
			t.Error(err)
		}
		if req.GetRequestToken() != token {
			t.Errorf("the caller's request has token %q, not %q", req.GetRequestToken(), token)
		}
	}
	create(&snapshotdv1.CreateSnapshotRequest{RequestToken: "t"})
	create(&snapshotdv1.CreateSnapshotRequest{RequestToken: "t"})
	create(&snapshotdv1.CreateSnapshotRequest{})
	got := s.creates
	if len(got) != 9 {
		t.Fatalf("calls with %v", got)
	}
	second, third := got[1], got[3]
	want := []string{"t", second, second, third, "t", second, third, "", ""}
	if second == "t" || third == second || third == "t" || !slices.Equal(got, want) {
		t.Errorf("calls with %v, want %v", got, want)
	}
}

func TestErrorDetails(t *testing.T) {
	err := apiError(t, codes.InvalidArgument, "INVALID_REQUEST", &errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: "name", Description: "too long"}},
	})
	for _, err := range []error{err, fmt.Errorf("create x: %w", err)} {
		if got := client.Reason(err); got != "INVALID_REQUEST" {
			t.Errorf("reason of %v: got %q", err, got)
		}
		if diff := cmp.Diff([]client.Violation{{Field: "name", Description: "too long"}},
			client.Violations(err)); diff != "" {
			t.Error(diff)
		}
	}
	foreign, ferr := status.New(codes.Unavailable,
		"no").WithDetails(&errdetails.ErrorInfo{Domain: "example.com", Reason: "X"})
	if ferr != nil {
		t.Fatal(ferr)
	}
	for _, err := range []error{nil, errors.New("x"), foreign.Err()} {
		if got := client.Reason(err); got != "" {
			t.Errorf("reason of %v: got %q", err, got)
		}
		if got := client.Violations(err); got != nil {
			t.Errorf("violations of %v: got %v", err, got)
		}
	}
}

// TestTooLargeForGRPC gives a refusal of gRPC the reason of snapshotd.
func TestTooLargeForGRPC(t *testing.T) {
	c := dial(t, &server{}, client.Options{MaxAttempts: 1})
	_, err := c.Snapshots.CreateSnapshot(t.Context(),
		&snapshotdv1.CreateSnapshotRequest{Description: strings.Repeat("d", 5<<20)})
	if client.Reason(err) != "MESSAGE_TOO_LARGE" || status.Code(err) != codes.ResourceExhausted {
		t.Errorf("a request of 5 MiB: %v", err)
	}
	_, err = c.Admin.GetKey(t.Context(), &snapshotdv1.GetKeyRequest{Key: "/large"})
	if client.Reason(err) != "MESSAGE_TOO_LARGE" {
		t.Errorf("an answer of 5 MiB: %v", err)
	}
	if _, err = c.Admin.GetKey(t.Context(), &snapshotdv1.GetKeyRequest{Key: "/exhausted"}); client.Reason(err) != "" {
		t.Errorf("another limit: %v", err)
	}
}

func TestWatchEvents(t *testing.T) {
	msg := func(token string) *snapshotdv1.WatchEventsResponse {
		return &snapshotdv1.WatchEventsResponse{ResumeToken: token}
	}
	s := &server{
		events: [][]*snapshotdv1.WatchEventsResponse{{msg("a"), msg("b")}, {}, {msg("c")}, {msg("d")}},
		errs: []error{
			nil, // a stream that ends without an error
			apiError(t, codes.Unavailable, "STORE_UNAVAILABLE"),
			status.Error(codes.Unavailable, "closing"),
			apiError(t, codes.OutOfRange, "EVENTS_COMPACTED"),
		},
	}
	c := dial(t, s, client.Options{})
	req := &snapshotdv1.WatchEventsRequest{ResumeToken: "0"}
	var got []string
	err := client.WatchEvents(t.Context(), c.Events, req, func(m *snapshotdv1.WatchEventsResponse) error {
		got = append(got, m.GetResumeToken())
		return nil
	})
	if client.Reason(err) != "EVENTS_COMPACTED" {
		t.Errorf("got %v", err)
	}
	if diff := cmp.Diff([]string{"a", "b", "c", "d"}, got); diff != "" {
		t.Errorf("messages: %s", diff)
	}
	if diff := cmp.Diff([]string{"0", "b", "b", "c"}, s.tokens); diff != "" {
		t.Errorf("tokens: %s", diff)
	}
	if req.GetResumeToken() != "0" {
		t.Errorf("the request was changed: %v", req)
	}
}

func TestWatchEventsEnds(t *testing.T) {
	msg := &snapshotdv1.WatchEventsResponse{ResumeToken: "a"}
	s := &server{events: [][]*snapshotdv1.WatchEventsResponse{{msg}, {msg}}}
	c := dial(t, s, client.Options{})
	enough := status.Error(codes.Unavailable, "the caller's own")
	err := client.WatchEvents(t.Context(), c.Events, &snapshotdv1.WatchEventsRequest{},
		func(*snapshotdv1.WatchEventsResponse) error { return enough })
	if !errors.Is(err, enough) {
		t.Errorf("got %v, want fn's error", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	err = client.WatchEvents(ctx, c.Events, &snapshotdv1.WatchEventsRequest{},
		func(*snapshotdv1.WatchEventsResponse) error {
			cancel()
			return nil
		})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
}

// job returns a restore job in a state, with copied bytes.
func job(state snapshotdv1.RestoreJob_State, done int64) *snapshotdv1.RestoreJob {
	return &snapshotdv1.RestoreJob{Id: 65, State: state, Progress: &snapshotdv1.RestoreProgress{FilesDone: done}}
}

const (
	jobPending   = snapshotdv1.RestoreJob_STATE_PENDING
	jobExecuting = snapshotdv1.RestoreJob_STATE_EXECUTING
	jobCompleted = snapshotdv1.RestoreJob_STATE_COMPLETED
	jobFailed    = snapshotdv1.RestoreJob_STATE_FAILED
	jobCanceled  = snapshotdv1.RestoreJob_STATE_CANCELED
)

func TestWatchRestore(t *testing.T) {
	s := &server{
		jobs: [][]*snapshotdv1.RestoreJob{
			{job(jobPending, 0), job(jobExecuting, 1)},
			{},
			{job(jobExecuting, 2)},
			{job(jobCompleted, 3), job(jobCompleted, 4)}, // messages after the end are ignored
		},
		errs: []error{
			nil, // a stream that ends without an error
			apiError(t, codes.Unavailable, "STORE_UNAVAILABLE"),
			status.Error(codes.Unavailable, "closing"),
		},
	}
	c := dial(t, s, client.Options{})
	var got []int64
	err := client.WatchRestore(t.Context(), c.Snapshots, 65, func(j *snapshotdv1.RestoreJob) error {
		got = append(got, j.GetProgress().GetFilesDone())
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]int64{0, 1, 2, 3}, got); diff != "" {
		t.Errorf("jobs: %s", diff)
	}
	if diff := cmp.Diff([]int64{65, 65, 65, 65}, s.jobIDs); diff != "" {
		t.Errorf("streams: %s", diff)
	}
}

func TestWatchRestoreEnds(t *testing.T) {
	s := &server{
		jobs: [][]*snapshotdv1.RestoreJob{{job(jobExecuting, 0)}, {job(jobCompleted, 0)}, {job(jobExecuting, 0)}},
	}
	c := dial(t, s, client.Options{})
	enough := status.Error(codes.Unavailable, "the caller's own")
	watch := func(ctx context.Context, fn func() error) error {
		return client.WatchRestore(ctx, c.Snapshots, 65, func(*snapshotdv1.RestoreJob) error { return fn() })
	}
	for range 2 { // a running job and an ended one
		if err := watch(t.Context(), func() error { return enough }); !errors.Is(err, enough) {
			t.Errorf("got %v, want fn's error", err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	err := watch(ctx, func() error {
		cancel()
		return nil
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want the context's error", err)
	}
	never := &server{errs: []error{apiError(t, codes.NotFound, "NEVER_EXISTED")}}
	c = dial(t, never, client.Options{})
	if err := watch(t.Context(), func() error { return nil }); client.Reason(err) != "NEVER_EXISTED" ||
		len(never.jobIDs) != 1 {
		t.Errorf("got %v after %d streams, want the server's error after one", err, len(never.jobIDs))
	}
}

func TestWaitRestore(t *testing.T) {
	for _, end := range []snapshotdv1.RestoreJob_State{jobCompleted, jobFailed, jobCanceled} {
		s := &server{jobs: [][]*snapshotdv1.RestoreJob{{job(jobPending, 0), job(jobExecuting, 1)}, {job(end, 2)}}}
		c := dial(t, s, client.Options{})
		got, err := client.WaitRestore(t.Context(), c.Snapshots, 65)
		if err != nil || got.GetState() != end || got.GetProgress().GetFilesDone() != 2 {
			t.Errorf("%v: got %v, error %v", end, got, err)
		}
	}
	s := &server{
		jobs: [][]*snapshotdv1.RestoreJob{{job(jobExecuting, 1)}},
		errs: []error{apiError(t, codes.NotFound, "EXPIRED_OR_DROPPED")},
	}
	c := dial(t, s, client.Options{})
	if _, err := client.WaitRestore(t.Context(), c.Snapshots, 65); client.Reason(err) != "EXPIRED_OR_DROPPED" {
		t.Errorf("got %v, want the server's error", err)
	}
}

func TestRestoreEnded(t *testing.T) {
	for number := range snapshotdv1.RestoreJob_State_name {
		state := snapshotdv1.RestoreJob_State(number)
		want := state == jobCompleted || state == jobFailed || state == jobCanceled
		if got := client.RestoreEnded(job(state, 0)); got != want {
			t.Errorf("%v: got %v, want %v", state, got, want)
		}
	}
	if client.RestoreEnded(nil) {
		t.Error("no job has ended")
	}
}

func TestDialSecurity(t *testing.T) {
	for _, tc := range []struct {
		addr string
		o    client.Options
		want string // part of the error; empty: none
	}{
		{"127.0.0.1:7950", client.Options{}, ""},
		{"127.8.8.8:7950", client.Options{}, ""},
		{"localhost:7950", client.Options{}, ""},
		{"[::1]:7950", client.Options{}, ""},
		{"dns:///localhost:7950", client.Options{}, ""},
		{"unix:///run/snapshotd.sock", client.Options{}, ""},
		{"10.0.0.1:7950", client.Options{}, "plaintext is refused"},
		{"localhost.example.com:7950", client.Options{}, "plaintext is refused"},
		{":7950", client.Options{}, "plaintext is refused"},
		{"10.0.0.1:7950", client.Options{Insecure: true}, ""},
		{"10.0.0.1:7950", client.Options{TLS: true}, ""},
		{"10.0.0.1:7950", client.Options{TLS: true, Insecure: true}, "exclude each other"},
		{"10.0.0.1:7950", client.Options{CAFile: "testdata/none.pem"}, "read certificate authorities"},
		{"10.0.0.1:7950", client.Options{CAFile: "client_test.go"}, "holds no certificate"},
		{"10.0.0.1:7950", client.Options{CertFile: "client.pem"}, "needs its key"},
	} {
		c, err := client.Dial(tc.addr, tc.o)
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s %+v: %v", tc.addr, tc.o, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s %+v: got %v, want %q", tc.addr, tc.o, err, tc.want)
		}
		if c != nil {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

func TestNewRequestToken(t *testing.T) {
	a, b := client.NewRequestToken(), client.NewRequestToken()
	if a == b || len(a) < 20 || len(a) > 128 {
		t.Errorf("got %q and %q", a, b)
	}
}
