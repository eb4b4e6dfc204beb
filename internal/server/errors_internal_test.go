package server

import (
	"context"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestEverySentinelHasARow reads the sources and fails for an exported error without a
// row in the errorTable.
func TestEverySentinelHasARow(t *testing.T) {
	table := sourceOf(t, "errors.go")
	for _, pkg := range []struct {
		name, dir string
		internal  []string // errors that no client gets
	}{
		{"catalog", "../catalog", []string{"ErrSpilled"}},
		{"manager", "../manager", nil},
		{"snapshot", "../snapshot", []string{"ErrDigest"}},
		{"gc", "../gc", nil},
		{"copyjob", "../copyjob", nil},
		{"epoch", "../store/epoch", nil},
		{"request", "../store/request", nil},
		{"record", "../store/record", nil},
		{"meta", "../store/meta", []string{"ErrLeaseNotFound", "ErrInvalid"}},
		{"object", "../store/object", []string{"ErrSourceChanged", "ErrNotFound", "ErrExists", "ErrInvalidKey"}},
	} {
		names := sentinels(t, pkg.dir)
		if len(names) == 0 {
			t.Errorf("%s: found no errors", pkg.dir)
		}
		for _, name := range names {
			has := strings.Contains(table, "{err: "+pkg.name+"."+name+",") ||
				strings.Contains(table, "err: "+pkg.name+"."+name+", code")
			if has == slices.Contains(pkg.internal, name) {
				t.Errorf("%s.%s: has a row: %v", pkg.name, name, has)
			}
		}
	}
}

// sourceOf returns the rows of a table in a file, as text.
func sourceOf(t *testing.T, name string) string {
	t.Helper()
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, name, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	ast.Inspect(f, func(n ast.Node) bool {
		kv, ok := n.(*ast.KeyValueExpr)
		if !ok {
			return true
		}
		if sel, ok := kv.Value.(*ast.SelectorExpr); ok {
			if key, ok := kv.Key.(*ast.Ident); ok && key.Name == "err" {
				fmt.Fprintf(&out, "{err: %s.%s,\n", sel.X, sel.Sel.Name)
			}
		}
		return true
	})
	return out.String()
}

// sentinels returns the names of the exported errors of a package.
func sentinels(t *testing.T, dir string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.VAR {
				continue
			}
			for _, s := range g.Specs {
				for _, n := range s.(*ast.ValueSpec).Names {
					if strings.HasPrefix(n.Name, "Err") {
						names = append(names, n.Name)
					}
				}
			}
		}
	}
	return names
}

// TestErrorTable converts the error of each row.
func TestErrorTable(t *testing.T) {
	seen := map[string]codes.Code{}
	for _, c := range errorTable {
		if code, ok := seen[c.reason]; ok && code != c.code {
			t.Errorf("%s stands for %v and %v", c.reason, code, c.code)
		}
		seen[c.reason] = c.code
		a := toStatusError(fmt.Errorf("do it: %w", c.err), "id")
		if a.status.Code() != c.code || a.reason != c.reason {
			t.Errorf("%v: got %v %s, want %v %s", c.err, a.status.Code(), a.reason, c.code, c.reason)
		}
		var info *errdetails.ErrorInfo
		var precondition, retry bool
		for _, d := range a.status.Details() {
			switch d := d.(type) {
			case *errdetails.ErrorInfo:
				info = d
			case *errdetails.PreconditionFailure:
				precondition = true
			case *errdetails.RetryInfo:
				retry = d.GetRetryDelay().AsDuration() > 0
			}
		}
		if info.GetReason() != c.reason || info.GetDomain() != "snapshotd" {
			t.Errorf("%v: info %v", c.err, info)
		}
		if precondition != (c.code == codes.FailedPrecondition) || retry != (c.retry > 0) {
			t.Errorf("%v: precondition %v, retry %v", c.err, precondition, retry)
		}
	}
}

// TestUnclassifiedErrors has an error without a row hide its text from the client.
func TestUnclassifiedErrors(t *testing.T) {
	for _, err := range []error{
		errors.New("secret"),
		status.Error(codes.Unavailable, "secret"),
		fmt.Errorf("write: %w", status.Error(codes.Unavailable, "secret")),
		fmt.Errorf("wrapped: %w", newStatusError(nil, codes.NotFound, "SECRET", "secret")),
	} {
		a := toStatusError(err, "req-7")
		if a.status.Code() != codes.Internal || strings.Contains(a.Error(), "secret") ||
			!strings.Contains(a.Error(), "req-7") {
			t.Errorf("%v became %v", err, a.status)
		}
		if !errors.Is(a, err) {
			t.Errorf("%v is not the cause for the log", err)
		}
	}
	own := newStatusError(nil, codes.NotFound, "X", "x")
	if got := toStatusError(own, ""); got != own {
		t.Errorf("a statusError became %v", got)
	}
}

// TestHiddenTexts hides the addresses of stores.
func TestHiddenTexts(t *testing.T) {
	for _, c := range errorTable {
		if c.code != codes.Unavailable && c.code != codes.ResourceExhausted {
			continue
		}
		a := toStatusError(fmt.Errorf("%w: dial tcp 10.1.2.3:2379", c.err), "")
		if c.reason == "STORE_UNAVAILABLE" || c.reason == "STORE_FULL" {
			if strings.Contains(a.Error(), "10.1.2.3") {
				t.Errorf("%s has the text %q", c.reason, a.Error())
			}
		}
	}
}

// TestFullObjectStore has the error name the full place, and no internals.
func TestFullObjectStore(t *testing.T) {
	full := &object.FullError{Place: "directory /data/objects", Lacks: "no space or no inodes are left"}
	a := toStatusError(fmt.Errorf("create snapshot: %w: open /secret: no space left on device", full), "")
	if a.reason != "STORE_FULL" || a.status.Code() != codes.ResourceExhausted {
		t.Errorf("got %s, %v", a.reason, a.status.Code())
	}
	if text := a.Error(); !strings.Contains(text, "directory /data/objects") || strings.Contains(text, "secret") {
		t.Errorf("the text is %q", text)
	}
}

// TestLongAndBrokenText clips texts to valid UTF-8.
func TestLongAndBrokenText(t *testing.T) {
	for letter, minimum := range map[string]int{"e": maxMessageText - 8, "é": maxMessageText/2 - 8} {
		a := toStatusError(fmt.Errorf("%w: \xff%s", catalog.ErrSegmentNotFound, strings.Repeat(letter, 4000)), "")
		if n := len(a.Error()); n > maxMessageText || n < minimum {
			t.Errorf("%d bytes of %s", n, letter)
		}
		if strings.Contains(a.Error(), "\xff") {
			t.Error("not UTF-8")
		}
	}
}

// TestErrorsAreBoundedInTrailers has errors with any text fit into the trailers.
func TestErrorsAreBoundedInTrailers(t *testing.T) {
	for _, letter := range []string{"e", "é", "%", "\xff", "\x00"} {
		long := strings.Repeat(letter, 1<<20)
		list := []error{&catalog.InvalidError{Field: long, Problem: long}}
		for _, c := range errorTable {
			list = append(list, fmt.Errorf("%s: %w", long, c.err), fmt.Errorf("%w: %s", c.err, long))
		}
		for _, err := range list {
			if a := toStatusError(err, "id"); trailerBytes(a.status) > maxTrailer {
				t.Errorf("%.60q takes %d bytes", err, trailerBytes(a.status))
			}
		}
		var fields []*errdetails.BadRequest_FieldViolation
		for range maxViolations {
			fields = append(fields, &errdetails.BadRequest_FieldViolation{Field: clip(long), Description: clip(long)})
		}
		a := invalidRequest(errors.New(long), fields)
		if n := trailerBytes(a.status); n > maxTrailer || len(a.status.Details()) != 2 {
			t.Errorf("violations of %q take %d bytes, %d details", letter, n, len(a.status.Details()))
		}
	}
}

// TestEveryMethodHasAPermission checks all registered methods, those of health and
// reflection included.
func TestEveryMethodHasAPermission(t *testing.T) {
	s, err := New(Options{Cluster: cluster.Cluster{TokenKey: make([]byte, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop(t.Context())
	registered := map[string]bool{}
	for name, info := range s.grpc.GetServiceInfo() {
		for _, m := range info.Methods {
			method := "/" + name + "/" + m.Name
			registered[method] = true
			if permissions[method] == 0 {
				t.Errorf("%s has no row in permissions", method)
			}
		}
	}
	for method := range permissions {
		if !registered[method] {
			t.Errorf("%s has a row but does not exist", method)
		}
	}
	for _, method := range []string{
		"", "/", "snapshotd.v1.SnapshotService/GetSnapshot",
		"//snapshotd.v1.SnapshotService/GetSnapshot", "/snapshotd.v1.SnapshotService/getsnapshot",
	} {
		if err := authorize("client", method); !errors.Is(err, errDenied) {
			t.Errorf("%q: got %v, want denied", method, err)
		}
	}
}

// TestTokens decodes tokens only for their own key, method, filters and count.
func TestTokens(t *testing.T) {
	s := pageTokenCodec{[]byte("key")}
	filters := [32]byte{1}
	token := s.seal("M", filters, 1<<62, -1, 0)
	var a, b, c int64
	if !s.open(token, "M", filters, &a, &b, &c) || a != 1<<62 || b != -1 || c != 0 {
		t.Fatalf("got %d %d %d", a, b, c)
	}
	other := [32]byte{2}
	if s.open(token, "N", filters, &a, &b, &c) || s.open(token, "M", other, &a, &b, &c) ||
		(pageTokenCodec{[]byte("another")}).open(token, "M", filters, &a, &b, &c) || s.open(token, "M", filters, &a, &b) {
		t.Error("decoded the token of another request")
	}
	for i := range token {
		for _, r := range []string{"A", "B", "-", "=", ""} {
			forged := token[:i] + r + token[i+1:]
			if forged != token && s.open(forged, "M", filters, &a, &b, &c) {
				t.Errorf("decoded %q", forged)
			}
		}
	}
}

// TestAwait ends with f, the limit or the context.
func TestAwait(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	g := &checkedStream{stream: stream{ctx: ctx}}
	if err := g.await(0, func() error { return io.EOF }); !errors.Is(err, io.EOF) {
		t.Errorf("got %v", err)
	}
	hang := make(chan error)
	defer close(hang)
	if err := g.await(time.Nanosecond, func() error { return <-hang }); !errors.Is(err, errSlowReader) {
		t.Errorf("got %v", err)
	}
	cancel()
	if err := g.await(0, func() error { return <-hang }); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

// TestZeroPadIDs pads the numbers of a key.
func TestZeroPadIDs(t *testing.T) {
	for in, want := range map[string]string{
		"/snapshot/rec/42":            "/snapshot/rec/0000000000000000042",
		"/catalog/name/default/7a":    "/catalog/name/default/7a",
		"/a//b":                       "/a//b",
		"/x/00000000000000000042/y/1": "/x/00000000000000000042/y/0000000000000000001",
	} {
		if got := zeroPadIDs(in); got != want {
			t.Errorf("%s: got %s", in, got)
		}
	}
}

// fakeStream is a stream with only a context.
type fakeStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // a stream has one
}

func (f fakeStream) Context() context.Context { return f.ctx }

// TestDeadlines checks that a call ends by the time limit of its method and by the deadline
// of its client.
func TestDeadlines(t *testing.T) {
	s, err := New(Options{Cluster: cluster.Cluster{TokenKey: make([]byte, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Stop(t.Context())
	for _, tc := range []struct {
		method string
		client time.Duration // deadline of the client; 0: none
		want   time.Duration // 0: none
	}{
		{pb.SnapshotService_GetSnapshot_FullMethodName, 0, time.Minute},
		{pb.SnapshotService_CreateSnapshot_FullMethodName, 0, 15 * time.Minute},
		{pb.SnapshotService_GetSnapshot_FullMethodName, 2 * time.Minute, 2 * time.Minute},
		{pb.SnapshotService_CreateSnapshot_FullMethodName, time.Minute, time.Minute},
		{pb.SnapshotService_GetSnapshot_FullMethodName, 2 * time.Hour, 30 * time.Minute},
		{pb.CatalogService_AddSegments_FullMethodName, 0, time.Hour},
		{pb.CatalogService_AddSegments_FullMethodName, 2 * time.Hour, time.Hour},
		{pb.CatalogService_ExportSegments_FullMethodName, time.Minute, time.Minute},
		{pb.EventService_WatchEvents_FullMethodName, 0, 0},
		{pb.EventService_WatchEvents_FullMethodName, 2 * time.Hour, 2 * time.Hour},
	} {
		virtual.Test(t, func(t *testing.T) {
			ctx := t.Context()
			// channels stay in the bubble
			s := &Server{log: s.log, manager: &manager.Manager{}, validator: s.validator, stopping: ctx}
			if tc.client > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tc.client)
				defer cancel()
			}
			var got time.Duration
			record := func(ctx context.Context) {
				if d, ok := ctx.Deadline(); ok {
					got = time.Until(d)
				}
			}
			var err error
			if strings.Contains(tc.method, "SnapshotService") {
				_, err = s.unary(ctx, &pb.GetServerInfoRequest{}, &grpc.UnaryServerInfo{FullMethod: tc.method},
					func(ctx context.Context, _ any) (any, error) { record(ctx); return nil, nil }) //nolint:nilnil // unused
			} else {
				err = s.stream(nil, fakeStream{ctx: ctx}, &grpc.StreamServerInfo{FullMethod: tc.method},
					func(_ any, ss grpc.ServerStream) error { record(ss.Context()); return nil })
			}
			if err != nil || got != tc.want {
				t.Errorf("%s with %v: got %v, want %v, %v", tc.method, tc.client, got, tc.want, err)
			}
		})
	}
	_, err = s.unary(t.Context(), nil, &grpc.UnaryServerInfo{FullMethod: "/snapshotd.v1.SnapshotService/New"},
		func(context.Context, any) (any, error) { t.Error("called"); return nil, nil }) //nolint:nilnil // unused
	if status.Code(err) != codes.PermissionDenied {
		t.Errorf("a method without a row: got %v", err)
	}
}
