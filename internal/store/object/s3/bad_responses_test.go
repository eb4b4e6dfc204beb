//go:build !short && linux

package s3_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3fault"
)

// errorsIn200 returns encodings of an error in the body of a success. During a copy a server
// sends white space to keep the connection open.
func errorsIn200(code string) map[string]string {
	const space = " \n \r\n\t   \n"
	body := "<Error><Code>" + code + "</Code><Message>injected</Message><RequestId>1</RequestId></Error>"
	return map[string]string{
		"bare":              body,
		"after space":       space + body,
		"after much space":  strings.Repeat(space, 1000) + body,
		"after declaration": `<?xml version="1.0" encoding="UTF-8"?>` + space + body,
		"with namespace":    strings.Replace(body, "<Error>", `<Error xmlns="http://s3.amazonaws.com/doc/2006-03-01/">`, 1),
	}
}

// lateFailures are the calls with an operation for which a server may send status 200
// before it has executed the operation.
var lateFailures = []struct {
	call string
	op   s3fault.Op
}{
	{"Copy", s3fault.CopyObject},
	{"CopyParts", s3fault.UploadPartCopy},
	{"CopyParts", s3fault.CompleteMultipartUpload},
	{"PutParts", s3fault.CompleteMultipartUpload},
	{"CreateParts", s3fault.CompleteMultipartUpload},
}

// TestErrorsInSuccess responds with 200 and an error in the body. Temporary errors are
// retried; permanent errors are not, and are returned.
func TestErrorsInSuccess(t *testing.T) {
	for _, late := range lateFailures {
		for _, f := range []struct {
			code string
			want error // nil: the retry succeeds
		}{
			{"InternalError", nil},
			{"SlowDown", nil},
			{"AccessDenied", object.ErrDenied},
			{"NoSuchBucket", object.ErrMisconfigured},
		} {
			for how, body := range errorsIn200(f.code) {
				t.Run(fmt.Sprintf("%s/%s/%s/%s", late.call, late.op, f.code, how), func(t *testing.T) {
					t.Parallel()
					e, c := newEnvOf(t, late.call)
					answer := s3fault.Instead(&s3fault.Answer{
						Status: 200, Header: http.Header{"Content-Type": {"application/xml"}},
						Body: []byte(body),
					})
					e.proxy.Plan(s3fault.Rule{Op: late.op, Action: answer})
					err := c.call(t.Context(), e.store)
					e.proxy.MustHaveFired(t)
					if f.want == nil && err != nil || f.want != nil && !errors.Is(err, f.want) {
						t.Errorf("err = %v, want %v", err, f.want)
					}
					if n := e.proxy.Count(late.op); f.want != nil && n != 1 {
						t.Errorf("%d attempts after a permanent error", n)
					}
					if err == nil {
						c.check(t, e)
					}
					wantNoUploads(t, e)

					e, c = newEnvOf(t, late.call)
					e.proxy.Plan(s3fault.Rule{Op: late.op, Times: -1, Action: answer})
					if err := c.call(t.Context(), e.store); err == nil {
						t.Error("a permanent error is a success")
					}
					e.proxy.MustHaveFired(t)
					if n := e.proxy.Count(late.op); n > 2*e.options.MaxAttempts {
						t.Errorf("%d attempts", n)
					}
					wantNoUploads(t, e)
				})
			}
		}
	}
}

// TestMeaninglessResponses responds with 200 and a body without a result, before or after
// the server executes the request: the result is unknown, and the store determines it. A
// call that succeeds has taken effect.
func TestMeaninglessResponses(t *testing.T) {
	result := `<?xml version="1.0" encoding="UTF-8"?><CopyObjectResult><ETag>"0f5f13cf0b14c88bd431ef163b63d68d"</ETag>`
	for name, body := range map[string]string{
		"white space":   " \n\n ",
		"another root":  "<ListBucketResult><Name>x</Name></ListBucketResult>",
		"ends early":    result,
		"ends in a tag": result[:len(result)-3],
		"empty element": "<CopyObjectResult/><CopyPartResult/><CompleteMultipartUploadResult/>",
		"empty ETag":    "<CopyObjectResult><ETag></ETag></CopyObjectResult>",
		"JSON":          `{"ETag":"0f5f13cf0b14c88bd431ef163b63d68d"}`,
		"zeros":         strings.Repeat("\x00", 64),
	} {
		for _, late := range lateFailures {
			for _, done := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%s/done %v", name, late.call, late.op, done), func(t *testing.T) {
					t.Parallel()
					answer := &s3fault.Answer{
						Status: 200, Header: http.Header{"Content-Type": {"application/xml"}},
						Body: []byte(body),
					}
					action := s3fault.Instead(answer)
					if done {
						action = s3fault.After(answer)
					}
					for _, times := range []int{1, -1} {
						e, c := newEnvOf(t, late.call)
						e.proxy.Plan(s3fault.Rule{Op: late.op, Times: times, Action: action})
						err := c.call(t.Context(), e.store)
						e.proxy.MustHaveFired(t)
						switch {
						case err == nil:
							c.check(t, e)
						case times == 1:
							t.Errorf("one such response fails the call: %v", err)
						case strings.Contains(err.Error(), "WRONG"):
							t.Error(err)
						default:
							wantClear(t, e, err)
						}
						wantNoUploads(t, e)
					}
				})
			}
		}
	}
}

// callOf is one of the calls.
type callOf struct {
	call  func(ctx context.Context, s object.Store) error
	check func(t *testing.T, e *env)
}

// newEnvOf returns an env for one of the calls.
func newEnvOf(t *testing.T, name string) (*env, *callOf) {
	t.Helper()
	for _, c := range calls {
		if c.name != name {
			continue
		}
		e := newEnv(t, func(o *s3.Options) {
			o.MaxAttempts = 3
			if c.parts {
				o.MultipartThreshold = 1
			}
		})
		e.put(t, "old", "old content")
		return e, &callOf{c.call, c.check}
	}
	t.Fatalf("unknown call %s", name)
	return nil, nil
}

// TestWrongBodies responds to a GET with more, less or other content than requested. A
// store cannot detect other content of the same length; it detects another length.
func TestWrongBodies(t *testing.T) {
	for name, c := range map[string]struct {
		ranged bool // only for a GET of a range
		edit   func(a *s3fault.Answer)
	}{
		"longer": {false, func(a *s3fault.Answer) { a.Body = append(a.Body, "and more"...) }},
		"longer, by the range": {true, func(a *s3fault.Answer) {
			a.Body = append(a.Body, "and more"...)
			a.Header.Set("Content-Range", "bytes 4-14/19")
		}},
		"another range": {true, func(a *s3fault.Answer) { a.Header.Set("Content-Range", "bytes 5-7/11") }},
		"the whole": {true, func(a *s3fault.Answer) {
			a.Status, a.Body = 200, []byte("old content")
			a.Header.Del("Content-Range")
		}},
		"nothing": {false, func(a *s3fault.Answer) { a.Body = nil }},
		"a page":  {false, func(a *s3fault.Answer) { a.Body = []byte("<html>Welcome</html>") }},
	} {
		for _, ranged := range []bool{false, true} {
			if c.ranged && !ranged {
				continue
			}
			t.Run(fmt.Sprintf("%s, range %v", name, ranged), func(t *testing.T) {
				e := newEnv(t, func(o *s3.Options) { o.MaxAttempts = 2 })
				e.put(t, "old", "old content")
				e.proxy.Plan(s3fault.Rule{
					Op: s3fault.GetObject, Times: -1, Action: s3fault.Edit(name,
						func(a *s3fault.Answer) bool { c.edit(a); return true }),
				})
				from, length := int64(0), int64(-1)
				if ranged {
					from, length = 4, 3
				}
				body, _, err := e.store.Get(t.Context(), "old", from, length)
				if err == nil {
					_, err = io.Copy(io.Discard, body)
					err = errors.Join(err, body.Close())
				}
				e.proxy.MustHaveFired(t)
				if !errors.Is(err, object.ErrUnavailable) {
					t.Errorf("err = %v, want ErrUnavailable", err)
				}
			})
		}
	}
}

// TestWrongHeads alters the HEAD of the source of a copy in parts. The conditions of the
// parts decide which version is copied.
func TestWrongHeads(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(a *s3fault.Answer)
		want error // nil: the copy is correct
	}{
		"larger":  {func(a *s3fault.Answer) { a.Header.Set("Content-Length", "12") }, object.ErrSourceChanged},
		"smaller": {func(a *s3fault.Answer) { a.Header.Set("Content-Length", "10") }, object.ErrSourceChanged},
		"missing": {func(a *s3fault.Answer) { a.Status = 404 }, object.ErrUnavailable},
		"another": {func(a *s3fault.Answer) { a.Header.Set("ETag", `"00000000000000000000000000000000"`) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			e, call := newEnvOf(t, "CopyParts")
			e.proxy.Plan(s3fault.Rule{
				Op: s3fault.HeadObject, Times: -1, Action: s3fault.Edit(name,
					func(a *s3fault.Answer) bool { c.edit(a); return true }),
			})
			err := call.call(t.Context(), e.store)
			e.proxy.MustHaveFired(t)
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if err == nil {
				call.check(t, e)
			} else {
				wantContent(t, e, "copy", "-")
			}
			wantNoUploads(t, e)
		})
	}
}

// TestSkewedClock shows that different clocks fail a call once, with the remedy.
func TestSkewedClock(t *testing.T) {
	for _, c := range calls {
		e := newEnv(t, func(o *s3.Options) {
			if c.parts {
				o.MultipartThreshold = 1
			}
		})
		e.put(t, "old", "old content")
		e.put(t, "other", "other content")
		e.proxy.Plan(s3fault.Rule{Times: -1, Action: s3fault.Status(403, "RequestTimeTooSkewed")})
		err := c.call(t.Context(), e.store)
		if !errors.Is(err, object.ErrMisconfigured) || !strings.Contains(err.Error(), "clocks") {
			t.Errorf("%s: err = %v", c.name, err)
		}
		// A HEAD has no body with the reason, so a GET follows.
		if n := e.proxy.Fired(); n > 2 {
			t.Errorf("%s: %d requests", c.name, n)
		}
	}
}
