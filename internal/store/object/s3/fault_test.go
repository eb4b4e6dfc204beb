//go:build !short && linux

package s3_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// env is a store behind a proxy, and the same bucket without the proxy.
type env struct {
	proxy        *s3fault.Proxy
	store, plain *s3.Store
	options      s3.Options
}

func newEnv(t *testing.T, change func(*s3.Options)) *env {
	t.Helper()
	o := s3test.Bucket(t)
	e := &env{proxy: s3fault.New(t, o.Endpoint), plain: s3test.Open(t, o)}
	o.Endpoint = e.proxy.URL()
	o.RequestTimeout = 30 * time.Second // long enough for a busy machine; tests of hanging servers shorten it
	if change != nil {
		change(&o)
	}
	e.options = o
	e.store = s3test.Open(t, o)
	return e
}

func (e *env) put(t *testing.T, key, body string) {
	t.Helper()
	if _, err := e.plain.Put(t.Context(), key, []byte(body)); err != nil {
		t.Fatal(err)
	}
}

// holds returns the content of a key, or "-" if it does not exist.
func (e *env) holds(t *testing.T, key string) string {
	t.Helper()
	body, err := read(t.Context(), e.plain, key)
	if errors.Is(err, object.ErrNotFound) {
		return "-"
	}
	if err != nil {
		t.Fatal(err)
	}
	return body
}

func read(ctx context.Context, s object.Store, key string) (string, error) {
	body, info, err := s.Get(ctx, key, 0, -1)
	if err != nil {
		return "", err
	}
	data, err := io.ReadAll(body)
	if err := errors.Join(err, body.Close()); err != nil {
		return "", err
	}
	if info.Size != int64(len(data)) {
		return "", fmt.Errorf("read %d bytes of %d", len(data), info.Size)
	}
	return string(data), nil
}

func listed(ctx context.Context, s object.Store) (string, error) {
	var keys []string
	for info, err := range s.List(ctx, "") {
		if err != nil {
			return "", err
		}
		keys = append(keys, info.Key)
	}
	return strings.Join(keys, " "), nil
}

// calls are the methods, each with the server operations that it uses. A call returns an
// error or has taken effect, which check verifies. always is verified in both cases.
var calls = []struct {
	name   string
	ops    []s3fault.Op
	parts  bool
	call   func(ctx context.Context, s object.Store) error
	check  func(t *testing.T, e *env)
	always func(t *testing.T, e *env)
}{
	{
		name: "Put", ops: []s3fault.Op{s3fault.PutObject},
		call: func(ctx context.Context, s object.Store) error {
			_, err := s.Put(ctx, "old", []byte("new content"))
			return err
		},
		check: func(t *testing.T, e *env) { wantContent(t, e, "old", "new content") },
	},
	{
		name: "Create", ops: []s3fault.Op{s3fault.PutObject},
		call: func(ctx context.Context, s object.Store) error {
			_, err := s.Create(ctx, "new", []byte("new content"))
			return err
		},
		check: func(t *testing.T, e *env) { wantContent(t, e, "new", "new content") },
	},
	{
		name: "PutParts", parts: true,
		ops: []s3fault.Op{s3fault.CreateMultipartUpload, s3fault.UploadPart, s3fault.CompleteMultipartUpload},
		call: func(ctx context.Context, s object.Store) error {
			_, err := s.Put(ctx, "old", []byte("new content"))
			return err
		},
		check: func(t *testing.T, e *env) { wantContent(t, e, "old", "new content") },
	},
	{
		name: "CreateParts", parts: true,
		ops: []s3fault.Op{s3fault.CreateMultipartUpload, s3fault.UploadPart, s3fault.CompleteMultipartUpload},
		call: func(ctx context.Context, s object.Store) error {
			_, err := s.Create(ctx, "new", []byte("new content"))
			return err
		},
		check: func(t *testing.T, e *env) { wantContent(t, e, "new", "new content") },
	},
	{
		name: "Get", ops: []s3fault.Op{s3fault.GetObject},
		call: func(ctx context.Context, s object.Store) error {
			body, err := read(ctx, s, "old")
			if err == nil && body != "old content" {
				return fmt.Errorf("WRONG: read %q", body)
			}
			return err
		},
	},
	{
		name: "GetRange", ops: []s3fault.Op{s3fault.GetObject},
		call: func(ctx context.Context, s object.Store) error {
			body, info, err := s.Get(ctx, "old", 4, 3)
			if err != nil {
				return err
			}
			data, err := io.ReadAll(body)
			if err := errors.Join(err, body.Close()); err != nil {
				return err
			}
			if len(data) != 3 || info.Size != 11 { // a flipped bit is undetectable in a range
				return fmt.Errorf("WRONG: read %q of %d bytes", data, info.Size)
			}
			return nil
		},
	},
	{
		name: "Head", ops: []s3fault.Op{s3fault.HeadObject},
		call: func(ctx context.Context, s object.Store) error {
			info, err := s.Head(ctx, "old")
			if err == nil && info.Size != 11 {
				return fmt.Errorf("WRONG: size %d", info.Size)
			}
			return err
		},
	},
	{
		name: "HeadMissing", ops: []s3fault.Op{s3fault.HeadObject, s3fault.GetObject},
		call: func(ctx context.Context, s object.Store) error {
			info, err := s.Head(ctx, "missing")
			switch {
			case err == nil:
				return fmt.Errorf("WRONG: %+v", info)
			case errors.Is(err, object.ErrNotFound):
				return nil
			}
			return err
		},
	},
	{
		name: "List", ops: []s3fault.Op{s3fault.ListObjectsV2},
		call: func(ctx context.Context, s object.Store) error {
			keys, err := listed(ctx, s)
			if err == nil && keys != "old other" {
				return fmt.Errorf("WRONG: %s", keys)
			}
			return err
		},
	},
	{
		name: "Delete", ops: []s3fault.Op{s3fault.DeleteObjects},
		call:  func(ctx context.Context, s object.Store) error { return s.Delete(ctx, "old", "missing") },
		check: func(t *testing.T, e *env) { wantContent(t, e, "old", "-"); wantContent(t, e, "other", "other content") },
	},
	{
		name: "Copy", ops: []s3fault.Op{s3fault.CopyObject},
		call:  func(ctx context.Context, s object.Store) error { return copyOld(ctx, s, 0, oldETag) },
		check: func(t *testing.T, e *env) { wantContent(t, e, "copy", "old content") },
		always: func(t *testing.T, e *env) {
			wantContent(t, e, "old", "old content")
			wantNoUploads(t, e)
		},
	},
	{
		name: "CopyParts",
		ops: []s3fault.Op{
			s3fault.HeadObject, s3fault.GetObjectTagging, s3fault.CreateMultipartUpload, s3fault.UploadPartCopy,
			s3fault.CompleteMultipartUpload,
		},
		call:  func(ctx context.Context, s object.Store) error { return copyOld(ctx, s, 1, oldPartsETag) },
		check: func(t *testing.T, e *env) { wantContent(t, e, "copy", "old content") },
		always: func(t *testing.T, e *env) {
			wantContent(t, e, "old", "old content")
			wantNoUploads(t, e)
		},
	},
	{
		name: "AbortUploads", ops: []s3fault.Op{s3fault.ListMultipartUploads},
		call: func(ctx context.Context, s object.Store) error {
			n, err := s.AbortUploads(ctx, "", time.Time{})
			if err == nil && n != 0 {
				return fmt.Errorf("WRONG: %d uploads", n)
			}
			return err
		},
	},
	{
		name: "Now", ops: []s3fault.Op{s3fault.ListObjectsV2},
		call: func(ctx context.Context, s object.Store) error {
			now, err := s.Now(ctx)
			if err == nil && time.Since(now).Abs() > time.Minute {
				return fmt.Errorf("WRONG: %v", now)
			}
			return err
		},
	},
}

// The ETags of "old content", and of a copy of it in one part.
const (
	oldETag      = "0f5f13cf0b14c88bd431ef163b63d68d"
	oldPartsETag = "dea1b4f19d6eeaee7f71436fbd2b43f6-1"
)

// copyOld copies the key "old" to "copy", in parts above a threshold, and checks the result.
func copyOld(ctx context.Context, s object.Store, threshold int64, etag string) error {
	info, err := s.Copy(ctx, object.CopyRequest{
		From: "old", To: "copy", SourceETag: oldETag, Size: 11, Parts: object.CopyParts{Threshold: threshold},
	})
	if err == nil && (info.Key != "copy" || info.Size != 11 || info.ETag != etag ||
		time.Since(info.ModTime).Abs() > time.Minute) {
		return fmt.Errorf("WRONG: %+v", info)
	}
	return err
}

// wantNoUploads checks that no upload is open in the bucket.
func wantNoUploads(t *testing.T, e *env) {
	t.Helper()
	out, err := s3test.Shared(t).Client().ListMultipartUploads(t.Context(),
		&awss3.ListMultipartUploadsInput{Bucket: &e.options.Bucket})
	if err != nil || len(out.Uploads) != 0 {
		t.Errorf("open uploads: %v, %v; requests: %v", out.Uploads, err, e.proxy.Events())
	}
}

func wantContent(t *testing.T, e *env, key, want string) {
	t.Helper()
	if got := e.holds(t, key); got != want {
		t.Errorf("%s holds %q, want %q", key, got, want)
	}
}

// TestFaults injects every fault into every operation of every method, once and permanently.
// A single temporary fault must not fail the call; with a permanent fault the call must fail
// or take effect.
func TestFaults(t *testing.T) {
	always := errors.New("any")
	for _, f := range []struct {
		name   string
		action s3fault.Action
		once   error // the result of a single one; nil: success
		// only selects the operations with this fault.
		only func(op s3fault.Op) bool
	}{
		{name: "SlowDown", action: s3fault.Status(503, "SlowDown")},
		{name: "RetryAfter", action: s3fault.StatusWith(503, "SlowDown", http.Header{"Retry-After": {"0"}})},
		{name: "500", action: s3fault.Status(500, "InternalError")},
		{name: "502 of a proxy", action: s3fault.Instead(&s3fault.Answer{
			Status: 502,
			Body:   []byte("<html>Bad Gateway</html>"),
		})},
		{name: "504", action: s3fault.Instead(&s3fault.Answer{Status: 504})},
		{name: "RequestTimeout", action: s3fault.Status(400, "RequestTimeout"), only: writes},
		{name: "conflict", action: s3fault.Status(409, "ConditionalRequestConflict"), only: writes},
		{name: "directory", action: s3fault.Status(409, "ExistingObjectIsDirectory"), only: writes},
		{name: "reset", action: s3fault.Reset()},
		{name: "lost", action: s3fault.Lost()},
		{name: "500 after", action: s3fault.After(&s3fault.Answer{
			Status: 500, Header: http.Header{},
			Body: []byte("<Error><Code>InternalError</Code></Error>"),
		})},
		{name: "duplicate", action: s3fault.Duplicate(), only: func(op s3fault.Op) bool {
			// A duplicate Create finds a foreign object, and a duplicate upload has an unknown id.
			return op != s3fault.PutObject && op != s3fault.CompleteMultipartUpload && op != s3fault.CreateMultipartUpload
		}},
		{name: "error in 200", action: s3fault.ErrorIn200("InternalError")},
		{name: "empty 200", action: s3fault.Empty200()},
		{name: "HTML in 200", action: s3fault.HTML200()},
		{name: "empty 200 instead", action: s3fault.Instead(&s3fault.Answer{Status: 200})},
		{name: "HTML in 200 instead", action: s3fault.Instead(&s3fault.Answer{
			Status: 200,
			Body:   []byte("<html><body>Welcome</body></html>"),
		})},
		{name: "no ETag", action: s3fault.StripAnswer("ETag"), only: func(op s3fault.Op) bool {
			return op == s3fault.PutObject || op == s3fault.UploadPart || op == s3fault.GetObject || op == s3fault.HeadObject
		}},
		{name: "no ETag in XML", action: s3fault.Edit("no ETag", func(a *s3fault.Answer) bool {
			body := etagElement.ReplaceAll(a.Body, nil)
			fired := len(body) != len(a.Body)
			a.Body = body
			return fired
		}), only: func(op s3fault.Op) bool {
			return op == s3fault.CopyObject || op == s3fault.UploadPartCopy || op == s3fault.CompleteMultipartUpload
		}},
		{name: "truncated", action: s3fault.Truncate(), once: always, only: hasAnswer},
		{name: "short", action: s3fault.Short(), once: always, only: hasAnswer},
		{
			name: "corrupt", action: s3fault.Corrupt(), once: always,
			only: func(op s3fault.Op) bool { return op == s3fault.GetObject },
		},
		{name: "AccessDenied", action: s3fault.Status(403, "AccessDenied"), once: object.ErrDenied},
		{name: "ThrottlingException", action: s3fault.Status(400, "ThrottlingException")},
		{name: "QuotaExceeded", action: s3fault.Status(403, "QuotaExceeded"), once: object.ErrFull},
		{name: "InsufficientStorage", action: s3fault.Status(403, "InsufficientStorage"), once: object.ErrFull},
		{name: "507", action: s3fault.Status(507, "XMinioStorageFull"), once: object.ErrFull},
		{name: "507 without a code", action: s3fault.Status(507, ""), once: object.ErrFull},
		{name: "InvalidAccessKeyId", action: s3fault.Status(403, "InvalidAccessKeyId"), once: object.ErrDenied},
		{name: "ExpiredToken", action: s3fault.Status(400, "ExpiredToken"), once: object.ErrDenied},
		{name: "NoSuchBucket", action: s3fault.Status(404, "NoSuchBucket"), once: object.ErrMisconfigured},
		{name: "RequestTimeTooSkewed", action: s3fault.Status(403, "RequestTimeTooSkewed"), once: object.ErrMisconfigured},
		{name: "wrong region", action: s3fault.StatusWith(301, "PermanentRedirect",
			http.Header{"X-Amz-Bucket-Region": {"eu-test-9"}}), once: object.ErrMisconfigured},
	} {
		t.Run(f.name, func(t *testing.T) {
			for _, c := range calls {
				for _, op := range c.ops {
					if f.only != nil && !f.only(op) {
						continue
					}
					for _, times := range []int{1, -1} {
						t.Run(fmt.Sprintf("%s/%s/%d", c.name, op, times), func(t *testing.T) {
							t.Parallel()
							e := newEnv(t, func(o *s3.Options) {
								o.MaxAttempts = 3
								if c.parts {
									o.MultipartThreshold = 1
								}
							})
							e.put(t, "old", "old content")
							e.put(t, "other", "other content")
							e.proxy.Plan(s3fault.Rule{Op: op, Times: times, Action: f.action})
							err := c.call(t.Context(), e.store)
							missing := c.name == "HeadMissing" && op == s3fault.HeadObject || c.name == "HeadMissing" &&
								(f.name == "truncated" || f.name == "short" || f.name == "no ETag")
							if !missing || e.proxy.Fired() > 0 {
								e.proxy.MustHaveFired(t)
							}
							if err != nil && strings.Contains(err.Error(), "WRONG") {
								t.Error(err)
							}
							if err == nil && c.check != nil {
								c.check(t, e)
							}
							if c.always != nil {
								c.always(t, e)
							}
							if err != nil && !missing {
								wantClear(t, e, err)
							}
							headed := op == s3fault.HeadObject // a GET follows, since a HEAD has no body
							if times == 1 && f.once == nil && err != nil {
								t.Errorf("one fault fails the call: %v", err)
							}
							if op == s3fault.GetObjectTagging && f.name == "AccessDenied" {
								if err != nil || e.proxy.Fired() != 1 {
									t.Errorf("unreadable tags: %d attempts, err = %v", e.proxy.Fired(), err)
								}
								return
							}
							if f.once != nil && !errors.Is(f.once, always) && !headed && !errors.Is(err, f.once) {
								t.Errorf("err = %v, want %v", err, f.once)
							}
							if f.once != nil && !errors.Is(f.once, always) && !headed && e.proxy.Fired() > 1 {
								t.Errorf("%d attempts after a permanent error", e.proxy.Fired())
							}
						})
					}
				}
			}
		})
	}
}

var etagElement = regexp.MustCompile(`<ETag>[^<]*</ETag>`)

func writes(op s3fault.Op) bool {
	return op == s3fault.PutObject || op == s3fault.UploadPart || op == s3fault.CopyObject || op == s3fault.UploadPartCopy
}

func hasAnswer(op s3fault.Op) bool {
	return op != s3fault.PutObject && op != s3fault.UploadPart && op != s3fault.HeadObject
}

// wantClear checks that an error has one kind and the bucket's name, and no credentials.
func wantClear(t *testing.T, e *env, err error) {
	t.Helper()
	if !errors.Is(err, object.ErrUnavailable) && !errors.Is(err, object.ErrFull) && !errors.Is(err, object.ErrDenied) &&
		!errors.Is(err, object.ErrMisconfigured) && !errors.Is(err, object.ErrInvalidKey) {
		t.Errorf("err = %v, of no kind", err)
	}
	if errors.Is(err, object.ErrNotFound) || errors.Is(err, object.ErrExists) ||
		errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		t.Errorf("err = %v, of more than one kind", err)
	}
	if !strings.Contains(err.Error(), e.options.Bucket) {
		t.Errorf("err = %v, without the bucket's name", err)
	}
	if text := err.Error(); strings.Contains(text, s3test.SecretAccessKey) || strings.Contains(text, s3test.AccessKeyID) {
		t.Errorf("credentials in %v", err)
	}
}

// A call without a response ends at its deadlines.
func TestHang(t *testing.T) {
	for _, c := range calls {
		for _, op := range c.ops {
			for name, action := range map[string]s3fault.Action{
				"before": s3fault.Hang(), "after": s3fault.HangAfter(),
				"in body": s3fault.HangInBody(),
			} {
				if name == "in body" && !hasAnswer(op) {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s/%s", c.name, op, name), func(t *testing.T) {
					t.Parallel()
					e := newEnv(t, func(o *s3.Options) {
						o.RequestTimeout, o.MaxAttempts = 200*time.Millisecond, 2
						if c.parts {
							o.MultipartThreshold = 1
						}
					})
					e.put(t, "old", "old content")
					e.put(t, "other", "other content")
					e.proxy.Plan(s3fault.Rule{Op: op, Times: -1, Action: action})
					start := time.Now()
					err := c.call(t.Context(), e.store)
					if took := time.Since(start); took > 20*time.Second {
						t.Errorf("took %v", took)
					}
					if c.name != "HeadMissing" {
						e.proxy.MustHaveFired(t)
					}
					switch {
					case err != nil:
						if strings.Contains(err.Error(), "WRONG") {
							t.Error(err)
						}
						wantClear(t, e, err)
					case c.check != nil:
						c.check(t, e)
					}
					if c.always != nil {
						c.always(t, e)
					}
				})
			}
		}
	}
}

func TestCreateLostResponse(t *testing.T) {
	for _, parts := range []bool{false, true} {
		op := map[bool]s3fault.Op{false: s3fault.PutObject, true: s3fault.CompleteMultipartUpload}[parts]
		for name, action := range map[string]s3fault.Action{
			"lost": s3fault.Lost(), "empty": s3fault.Empty200(),
			"html": s3fault.HTML200(),
		} {
			for _, times := range []int{1, -1} {
				t.Run(fmt.Sprint(op, name, times), func(t *testing.T) {
					e := newEnv(t, func(o *s3.Options) {
						o.MaxAttempts = 2
						if parts {
							o.MultipartThreshold = 1
						}
					})
					e.proxy.Plan(s3fault.Rule{Op: op, Times: times, Action: action})
					info, err := e.store.Create(t.Context(), "k", []byte("mine"))
					if err != nil {
						t.Fatalf("own object: %v", err)
					}
					e.proxy.MustHaveFired(t)
					head, err := e.plain.Head(t.Context(), "k")
					if err != nil || head.ETag != info.ETag || head.Size != info.Size {
						t.Errorf("Create says %+v, Head %+v, %v", info, head, err)
					}
					wantContent(t, e, "k", "mine")

					// The same with a foreign object of the same content.
					e.proxy.Plan(s3fault.Rule{Op: op, Times: times, Action: action})
					if _, err := e.store.Create(t.Context(), "k", []byte("mine")); !errors.Is(err, object.ErrExists) {
						t.Errorf("foreign object: err = %v, want ErrExists", err)
					}
					e.proxy.MustHaveFired(t)
				})
			}
		}
	}
}

// On a server that loses metadata, Create compares the content.
func TestCreateWithoutMetadata(t *testing.T) {
	e := newEnv(t, nil)
	forget := s3fault.Rule{Op: s3fault.HeadObject, Times: -1, Action: s3fault.StripAnswer("X-Amz-Meta-Snapshotd-Write")}
	lose := s3fault.Rule{Op: s3fault.PutObject, Action: s3fault.Lost()}
	e.proxy.Plan(forget, lose)
	if _, err := e.store.Create(t.Context(), "k", []byte("mine")); err != nil {
		t.Error(err)
	}
	e.proxy.MustHaveFired(t)
	e.put(t, "k2", "them")
	e.proxy.Plan(forget, lose)
	if _, err := e.store.Create(t.Context(), "k2", []byte("mine")); !errors.Is(err, object.ErrExists) {
		t.Errorf("err = %v, want ErrExists", err)
	}
	e.proxy.MustHaveFired(t)
}

func TestRedirectIsNotFollowed(t *testing.T) {
	var visited sync.Map
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		visited.Store(r.Method, r.URL.Path)
	}))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 307, 308} {
		for _, c := range calls {
			e := newEnv(t, func(o *s3.Options) {
				if c.parts {
					o.MultipartThreshold = 1
				}
			})
			e.put(t, "old", "old content")
			e.put(t, "other", "other content")
			e.proxy.Plan(s3fault.Rule{Times: -1, Action: s3fault.StatusWith(status, "TemporaryRedirect", http.Header{
				"Location": {elsewhere.URL + "/x"}, "X-Amz-Bucket-Region": {"eu-test-9"},
			})})
			err := c.call(t.Context(), e.store)
			e.proxy.MustHaveFired(t)
			if !errors.Is(err, object.ErrMisconfigured) || !strings.Contains(err.Error(), "eu-test-9") {
				t.Errorf("%d of %s: err = %v", status, c.name, err)
			}
		}
	}
	visited.Range(func(method, path any) bool {
		t.Errorf("followed: %v %v", method, path)
		return true
	})
}

func TestUploadsAreAborted(t *testing.T) {
	e := newEnv(t, func(o *s3.Options) {
		o.MultipartThreshold, o.PartSize = 1, 5<<20
	})
	body := bytes.Repeat([]byte("0123456789abcdef"), 12<<20/16)
	e.proxy.Plan(s3fault.Rule{Op: s3fault.UploadPart, Skip: 1, Times: -1, Action: s3fault.Status(403, "AccessDenied")})
	if _, err := e.store.Put(t.Context(), "big", body); !errors.Is(err, object.ErrDenied) {
		t.Errorf("err = %v", err)
	}
	e.proxy.MustHaveFired(t)
	wantContent(t, e, "big", "-")
	out, err := s3test.Shared(t).Client().ListMultipartUploads(t.Context(),
		&awss3.ListMultipartUploadsInput{Bucket: &e.options.Bucket})
	if err != nil || len(out.Uploads) != 0 {
		t.Errorf("left: %v, %v", out.Uploads, err)
	}
	e.proxy.Plan(s3fault.Rule{Op: s3fault.UploadPart, Skip: 1, Action: s3fault.Reset()})
	if _, err := e.store.Create(t.Context(), "big", body); err != nil {
		t.Fatal(err)
	}
	// A part of the aborted upload may have arrived late.
	if n := e.proxy.Count(s3fault.UploadPart); n < 4 {
		t.Errorf("%d parts sent, want 3 and one retry", n)
	}
	wantContent(t, e, "big", string(body))
	if _, err := e.store.Create(t.Context(), "big", body); !errors.Is(err, object.ErrExists) {
		t.Errorf("err = %v, want ErrExists", err)
	}
}

// TestWrongLists alters the responses to a list.
func TestWrongLists(t *testing.T) {
	edit := func(old, with string) s3fault.Action {
		return s3fault.Edit("replace "+old, func(a *s3fault.Answer) bool {
			changed := bytes.ReplaceAll(a.Body, []byte(old), []byte(with))
			fired := !bytes.Equal(changed, a.Body)
			a.Body = changed
			return fired
		})
	}
	for name, action := range map[string]s3fault.Action{
		"foreign key":   edit("<Key>a/2", "<Key>b/2"),
		"out of order":  edit("<Key>a/2", "<Key>a/0"),
		"duplicate":     edit("<Key>a/2", "<Key>a/1"),
		"no token":      edit("<IsTruncated>false", "<IsTruncated>true"),
		"other bucket":  edit("<Name>test-", "<Name>best-"),
		"missing count": edit("<KeyCount>3", "<KeyCount>4"),
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, nil)
			for _, key := range []string{"a/1", "a/2", "a/3"} {
				e.put(t, key, "x")
			}
			e.proxy.Plan(s3fault.Rule{Op: s3fault.ListObjectsV2, Times: -1, Action: action})
			var last error
			for _, err := range e.store.List(t.Context(), "a/") {
				last = err
			}
			e.proxy.MustHaveFired(t)
			want := object.ErrUnavailable
			if name == "out of order" { // each time: a property of the store
				want = object.ErrMisconfigured
			}
			if !errors.Is(last, want) {
				t.Errorf("err = %v, want %v", last, want)
			}
		})
	}
	t.Run("endless", func(t *testing.T) {
		e := newEnv(t, nil)
		e.proxy.Plan(s3fault.Rule{Op: s3fault.ListObjectsV2, Times: -1, Action: edit(
			"<IsTruncated>false</IsTruncated>", "<IsTruncated>true</IsTruncated>"+
				"<NextContinuationToken>again</NextContinuationToken>")})
		_, err := listed(t.Context(), e.store)
		e.proxy.MustHaveFired(t)
		if !errors.Is(err, object.ErrUnavailable) || e.proxy.Count(s3fault.ListObjectsV2) > 10 {
			t.Errorf("err = %v after %d pages", err, e.proxy.Count(s3fault.ListObjectsV2))
		}
	})
}

func TestDelete(t *testing.T) {
	answer := func(body string) s3fault.Action {
		return s3fault.After(&s3fault.Answer{
			Status: 200, Header: http.Header{"Content-Type": {"application/xml"}},
			Body: []byte(body),
		})
	}
	t.Run("some denied", func(t *testing.T) {
		e := newEnv(t, nil)
		e.proxy.Plan(s3fault.Rule{Op: s3fault.DeleteObjects, Action: answer(
			`<DeleteResult><Deleted><Key>a</Key></Deleted>` +
				`<Error><Key>b</Key><Code>AccessDenied</Code></Error>` +
				`<Error><Key>c</Key><Code>NoSuchKey</Code></Error></DeleteResult>`)})
		err := e.store.Delete(t.Context(), "a", "b", "c")
		e.proxy.MustHaveFired(t)
		if one, ok := errors.AsType[*object.DeleteError](err); !ok || one.Key != "b" || !errors.Is(err, object.ErrDenied) ||
			strings.Count(err.Error(), "delete ") > 2 {
			t.Errorf("err = %v, want b denied", err)
		}
	})
	t.Run("some retried", func(t *testing.T) {
		e := newEnv(t, nil)
		e.put(t, "b", "x")
		e.proxy.Plan(s3fault.Rule{
			Op: s3fault.DeleteObjects,
			Action: s3fault.Instead(&s3fault.Answer{Status: 200, Body: []byte(
				`<DeleteResult><Deleted><Key>a</Key></Deleted><Error><Key>b</Key><Code>SlowDown</Code></Error></DeleteResult>`)}),
		})
		if err := e.store.Delete(t.Context(), "a", "b", "c"); err != nil {
			t.Error(err)
		}
		e.proxy.MustHaveFired(t)
		wantContent(t, e, "b", "-")
	})
	t.Run("page of a proxy", func(t *testing.T) {
		e := newEnv(t, nil)
		e.proxy.Plan(s3fault.Rule{Op: s3fault.DeleteObjects, Action: s3fault.Instead(&s3fault.Answer{
			Status: 404, Body: []byte("<html>default backend - 404</html>"),
		})})
		for range 2 {
			e.put(t, "a", "x")
			if err := e.store.Delete(t.Context(), "a", "missing"); err != nil {
				t.Error(err)
			}
			wantContent(t, e, "a", "-")
		}
		e.proxy.MustHaveFired(t)
		if batches, single := e.proxy.Count(s3fault.DeleteObjects), e.proxy.Count(s3fault.DeleteObject); batches != 2 ||
			single != 2 {
			t.Errorf("%d batches and %d single deletes, want 2 and 2", batches, single)
		}
	})
	t.Run("one by one", func(t *testing.T) {
		e := newEnv(t, nil)
		e.put(t, "a", "x")
		e.put(t, "b", "x")
		e.proxy.Plan(s3fault.Rule{Op: s3fault.DeleteObjects, Times: -1, Action: s3fault.Status(501, "NotImplemented")})
		for range 2 {
			if err := e.store.Delete(t.Context(), "a", "b", "missing"); err != nil {
				t.Error(err)
			}
		}
		e.proxy.MustHaveFired(t)
		if e.proxy.Fired() != 1 || e.proxy.Count(s3fault.DeleteObject) != 6 {
			t.Errorf("%d batches and %d single deletes, want 1 and 6", e.proxy.Fired(), e.proxy.Count(s3fault.DeleteObject))
		}
		wantContent(t, e, "a", "-")
		// A response that is not that of a delete is verified.
		e.put(t, "a", "x")
		e.proxy.Plan(s3fault.Rule{
			Op: s3fault.DeleteObject, Times: -1,
			Action: s3fault.Instead(&s3fault.Answer{Status: 200, Body: []byte("<html>")}),
		})
		if err := e.store.Delete(t.Context(), "a"); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("err = %v, want ErrUnavailable", err)
		}
	})
}

func TestBudget(t *testing.T) {
	e := newEnv(t, func(o *s3.Options) { o.RetryBudget, o.MaxAttempts = 5, 10 })
	e.proxy.Plan(s3fault.Rule{Times: -1, Action: s3fault.Status(503, "SlowDown")})
	for range 10 {
		if _, err := e.store.Now(t.Context()); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("err = %v", err)
		}
	}
	if n := e.proxy.Fired(); n > 20 {
		t.Errorf("%d requests of 10 calls, with a budget of 5 retries", n)
	}
	if n := e.proxy.Fired(); n < 15 {
		t.Errorf("%d requests, so no retry was allowed", n)
	}
	time.Sleep(2 * time.Second)
	e.proxy.Plan(s3fault.Rule{Action: s3fault.Status(503, "SlowDown")})
	if _, err := e.store.Now(t.Context()); err != nil {
		t.Errorf("the budget does not refill: %v", err)
	}
}

func TestUnreachableServer(t *testing.T) {
	o := s3test.Bucket(t)
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	o.Endpoint = "http://" + l.Addr().String()
	_ = l.Close()
	s := s3test.Open(t, o)
	if _, err := s.Now(t.Context()); !errors.Is(err, object.ErrUnavailable) ||
		!strings.Contains(err.Error(), "connection refused") {
		t.Errorf("err = %v", err)
	}
	secure := httptest.NewTLSServer(http.NotFoundHandler())
	defer secure.Close()
	secure.Config.ErrorLog = nil
	o.Endpoint = secure.URL
	if _, err := s3test.Open(t, o).Now(t.Context()); !errors.Is(err, object.ErrMisconfigured) {
		t.Errorf("certificate of an unknown authority: err = %v", err)
	}
}

// TestWrongSettings sends requests with wrong settings to a real server.
func TestWrongSettings(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*s3.Options)
		want   error
	}{
		"bucket":        {func(o *s3.Options) { o.Bucket = "missing-bucket" }, object.ErrMisconfigured},
		"access key id": {func(o *s3.Options) { o.AccessKeyID = "unknownkeyid" }, object.ErrDenied},
		"secret":        {func(o *s3.Options) { o.SecretAccessKey = "wrongcanarysecret" }, object.ErrDenied},
		"owner":         {func(o *s3.Options) { o.ExpectedBucketOwner = "111122223333" }, object.ErrDenied},
		"region":        {func(o *s3.Options) { o.Region = "eu-test-9" }, object.ErrMisconfigured},
	} {
		t.Run(name, func(t *testing.T) {
			o := s3test.Bucket(t)
			c.change(&o)
			s := s3test.Open(t, o)
			for method, call := range map[string]func() error{
				"Put":    func() error { _, err := s.Put(t.Context(), "k", nil); return err },
				"Create": func() error { _, err := s.Create(t.Context(), "k", nil); return err },
				"Get":    func() error { _, _, err := s.Get(t.Context(), "k", 0, -1); return err },
				"Head":   func() error { _, err := s.Head(t.Context(), "k"); return err },
				"Delete": func() error { return s.Delete(t.Context(), "k") },
				"Now":    func() error { _, err := s.Now(t.Context()); return err },
				"List":   func() error { _, err := listed(t.Context(), s); return err },
				"Copy":   func() error { return copyOld(t.Context(), s, 0, "") },
				"Parts":  func() error { return copyOld(t.Context(), s, 1, "") },
				"Abort":  func() error { _, err := s.AbortUploads(t.Context(), "", time.Time{}); return err },
			} {
				err := call()
				if !errors.Is(err, c.want) {
					t.Errorf("%s: err = %v, want %v", method, err, c.want)
				}
				if err != nil && strings.Contains(err.Error(), "canary") {
					t.Errorf("%s: credentials in %v", method, err)
				}
			}
		})
	}
}

// TestSecrets searches errors, logs and formatted values for credentials.
func TestSecrets(t *testing.T) {
	var log bytes.Buffer
	core := zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(&log),
		zapcore.DebugLevel)
	e := newEnv(t, func(o *s3.Options) { o.Log = zap.New(core) })
	for _, action := range []s3fault.Action{
		s3fault.Reset(), s3fault.Status(503, "SlowDown"), s3fault.HTML200(),
		s3fault.Status(403, "SignatureDoesNotMatch"),
	} {
		for _, c := range calls {
			e.proxy.Plan(s3fault.Rule{Times: 2, Action: action})
			if err := c.call(t.Context(), e.store); err != nil && strings.Contains(err.Error(), "canary") {
				t.Errorf("credentials in %v", err)
			}
		}
	}
	secrets := struct{ A, B s3.Secret }{s3test.SecretAccessKey, "canary"}
	printed := fmt.Sprintf("%v %+v %#v %s %q", secrets, secrets, secrets, secrets.A, secrets.B)
	data, err := json.Marshal(secrets)
	if err != nil {
		t.Fatal(err)
	}
	if log.Len() == 0 {
		t.Error("nothing was logged")
	}
	if all := log.String() + printed + string(data); strings.Contains(all, "canary") {
		t.Errorf("credentials in %s", all)
	}
}

// otherAuthority returns a self-signed certificate.
func otherAuthority(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true,
		BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// TestTLS connects through a TLS server, and ignores the proxy and the endpoint of the
// environment.
func TestTLS(t *testing.T) {
	t.Setenv("HTTPS_PROXY", "http://127.0.0.1:1")
	t.Setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
	o := s3test.Bucket(t)
	target, err := url.Parse(o.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	secure := httptest.NewTLSServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = target.Scheme, target.Host, r.In.Host
	}})
	defer secure.Close()
	o.Endpoint, o.CAFile = secure.URL, filepath.Join(t.TempDir(), "ca.pem")
	authority := func(der []byte) {
		t.Helper()
		if err := os.WriteFile(o.CAFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	authority(otherAuthority(t))
	t.Setenv("AWS_ACCESS_KEY_ID", o.AccessKeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", string(o.SecretAccessKey))
	o.AccessKeyID, o.SecretAccessKey = "", ""
	o.MultipartThreshold = 100
	s := s3test.Open(t, o)
	if _, err := s.Put(t.Context(), "k", nil); !errors.Is(err, object.ErrMisconfigured) {
		t.Errorf("a certificate of another authority: %v", err)
	}
	authority(secure.Certificate().Raw) // the store stays open
	for _, body := range []string{"", "small", strings.Repeat("large", 100)} {
		if _, err := s.Put(t.Context(), "k", []byte(body)); err != nil {
			t.Fatal(err)
		}
		if got, err := read(t.Context(), s, "k"); err != nil || got != body {
			t.Errorf("read %q, %v", got, err)
		}
	}
	if err := s.Delete(t.Context(), "k"); err != nil {
		t.Error(err)
	}
}
