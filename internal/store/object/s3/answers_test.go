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

// errorsIn200 are ways to write an error into the body of a success. While a
// server works at a copy it sends white space, so that nobody hangs up.
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

// copiesThatAnswerLate are the calls whose operation a server may answer with 200
// before it has done it.
var copiesThatAnswerLate = []struct {
	call string
	op   s3fault.Op
}{
	{"Copy", s3fault.CopyObject},
	{"CopyParts", s3fault.UploadPartCopy},
	{"CopyParts", s3fault.CompleteMultipartUpload},
	{"PutParts", s3fault.CompleteMultipartUpload},
	{"CreateParts", s3fault.CompleteMultipartUpload},
}

// TestErrorsInSuccess answers 200 with an error in the body. What may get better
// is tried again; what does not, is not, and is told for what it is.
func TestErrorsInSuccess(t *testing.T) {
	for _, late := range copiesThatAnswerLate {
		for _, f := range []struct {
			code string
			want error // nil: it is tried again, and then well
		}{
			{"InternalError", nil},
			{"SlowDown", nil},
			{"AccessDenied", object.ErrDenied},
			{"NoSuchBucket", object.ErrMisconfigured},
		} {
			for how, body := range errorsIn200(f.code) {
				t.Run(fmt.Sprintf("%s/%s/%s/%s", late.call, late.op, f.code, how), func(t *testing.T) {
					t.Parallel()
					r, c := newRigOf(t, late.call)
					answer := s3fault.Instead(&s3fault.Answer{Status: 200, Header: http.Header{"Content-Type": {"application/xml"}}, Body: []byte(body)})
					r.proxy.Plan(s3fault.Rule{Op: late.op, Action: answer})
					err := c.call(t.Context(), r.store)
					r.proxy.MustHaveFired(t)
					if f.want == nil && err != nil || f.want != nil && !errors.Is(err, f.want) {
						t.Errorf("err = %v, want %v", err, f.want)
					}
					if n := r.proxy.Count(late.op); f.want != nil && n != 1 {
						t.Errorf("%d attempts at what does not get better", n)
					}
					if err == nil {
						c.check(t, r)
					}
					wantNoUploads(t, r)

					r, c = newRigOf(t, late.call)
					r.proxy.Plan(s3fault.Rule{Op: late.op, Times: -1, Action: answer})
					if err := c.call(t.Context(), r.store); err == nil {
						t.Error("an error for ever is a success")
					}
					r.proxy.MustHaveFired(t)
					if n := r.proxy.Count(late.op); n > 2*r.options.MaxAttempts {
						t.Errorf("%d attempts", n)
					}
					wantNoUploads(t, r)
				})
			}
		}
	}
}

// TestAnswersThatSayNothing answers 200 with what is no result, instead of the
// server or in place of its answer: it is not known then what has happened, and is
// found out. A call that says that it did it has done it.
func TestAnswersThatSayNothing(t *testing.T) {
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
		for _, late := range copiesThatAnswerLate {
			for _, done := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s/%s/%s/done %v", name, late.call, late.op, done), func(t *testing.T) {
					t.Parallel()
					answer := &s3fault.Answer{Status: 200, Header: http.Header{"Content-Type": {"application/xml"}}, Body: []byte(body)}
					action := s3fault.Instead(answer)
					if done {
						action = s3fault.After(answer)
					}
					for _, times := range []int{1, -1} {
						r, c := newRigOf(t, late.call)
						r.proxy.Plan(s3fault.Rule{Op: late.op, Times: times, Action: action})
						err := c.call(t.Context(), r.store)
						r.proxy.MustHaveFired(t)
						switch {
						case err == nil:
							c.check(t, r)
						case times == 1:
							t.Errorf("one such answer is noticed: %v", err)
						case strings.Contains(err.Error(), "WRONG"):
							t.Error(err)
						default:
							wantClear(t, r, err)
						}
						wantNoUploads(t, r)
					}
				})
			}
		}
	}
}

// callOf is one of the calls.
type callOf struct {
	call  func(ctx context.Context, s object.Store) error
	check func(t *testing.T, r *rig)
}

// newRigOf is a rig for one of the calls.
func newRigOf(t *testing.T, name string) (*rig, *callOf) {
	t.Helper()
	for _, c := range calls {
		if c.name != name {
			continue
		}
		r := newRig(t, func(o *s3.Options) {
			o.MaxAttempts = 3
			if c.parts {
				o.MultipartThreshold = 1
			}
		})
		r.put(t, "old", "old content")
		return r, &callOf{c.call, c.check}
	}
	t.Fatalf("there is no call %s", name)
	return nil, nil
}

// TestBodiesThatLie answers a GET with more, less or something else than was
// asked for. A store cannot tell whether the content is what it was; it does tell
// when there is another count of bytes than there should be.
func TestBodiesThatLie(t *testing.T) {
	for name, c := range map[string]struct {
		ranged bool // only of a GET of a range
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
				r := newRig(t, func(o *s3.Options) { o.MaxAttempts = 2 })
				r.put(t, "old", "old content")
				r.proxy.Plan(s3fault.Rule{
					Op: s3fault.GetObject, Times: -1, Action: s3fault.Edit(name, func(a *s3fault.Answer) bool { c.edit(a); return true }),
				})
				from, length := int64(0), int64(-1)
				if ranged {
					from, length = 4, 3
				}
				body, _, err := r.store.Get(t.Context(), "old", from, length)
				if err == nil {
					_, err = io.Copy(io.Discard, body)
					err = errors.Join(err, body.Close())
				}
				r.proxy.MustHaveFired(t)
				if !errors.Is(err, object.ErrUnavailable) {
					t.Errorf("err = %v, want ErrUnavailable", err)
				}
			})
		}
	}
}

// TestHeadsThatLie has a HEAD of the source of a copy in parts lie. What the copy
// is of is for the conditions of its parts to say.
func TestHeadsThatLie(t *testing.T) {
	for name, c := range map[string]struct {
		edit func(a *s3fault.Answer)
		want error // nil: the copy is right
	}{
		"larger":  {func(a *s3fault.Answer) { a.Header.Set("Content-Length", "12") }, object.ErrSourceChanged},
		"smaller": {func(a *s3fault.Answer) { a.Header.Set("Content-Length", "10") }, object.ErrSourceChanged},
		"missing": {func(a *s3fault.Answer) { a.Status = 404 }, object.ErrUnavailable},
		"another": {func(a *s3fault.Answer) { a.Header.Set("ETag", `"00000000000000000000000000000000"`) }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			r, call := newRigOf(t, "CopyParts")
			r.proxy.Plan(s3fault.Rule{
				Op: s3fault.HeadObject, Times: -1, Action: s3fault.Edit(name, func(a *s3fault.Answer) bool { c.edit(a); return true }),
			})
			err := call.call(t.Context(), r.store)
			r.proxy.MustHaveFired(t)
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if err == nil {
				call.check(t, r)
			} else {
				wantContent(t, r, "copy", "-")
			}
			wantNoUploads(t, r)
		})
	}
}

// TestSkewedClock says what to do when the clocks differ, and asks once.
func TestSkewedClock(t *testing.T) {
	for _, c := range calls {
		r := newRig(t, func(o *s3.Options) {
			if c.parts {
				o.MultipartThreshold = 1
			}
		})
		r.put(t, "old", "old content")
		r.put(t, "other", "other content")
		r.proxy.Plan(s3fault.Rule{Times: -1, Action: s3fault.Status(403, "RequestTimeTooSkewed")})
		err := c.call(t.Context(), r.store)
		if !errors.Is(err, object.ErrMisconfigured) || !strings.Contains(err.Error(), "clocks") {
			t.Errorf("%s: err = %v", c.name, err)
		}
		// A HEAD has no body to say why; a GET is asked for it.
		if n := r.proxy.Fired(); n > 2 {
			t.Errorf("%s: %d requests", c.name, n)
		}
	}
}
