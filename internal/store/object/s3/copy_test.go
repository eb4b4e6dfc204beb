//go:build !short && linux

package s3_test

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// large is the content of an object with three parts, the last of one byte.
var large = bytes.Repeat([]byte("0123456789abcdef"), 2*object.MinPartSize/16+1)[:2*object.MinPartSize+1]

// putLarge writes large and returns the request to copy it to "copy", part by part.
func (e *env) putLarge(t *testing.T) object.CopyRequest {
	t.Helper()
	info, err := e.plain.Put(t.Context(), "large", large)
	if err != nil {
		t.Fatal(err)
	}
	return object.CopyRequest{
		From: "large", To: "copy", SourceETag: info.ETag, Size: info.Size, InFlight: 1,
		Parts: object.CopyParts{Threshold: 1, PartSize: object.MinPartSize},
	}
}

// wantCopy checks that the copy is correct, or after an error that it is missing or correct.
func (e *env) wantCopy(t *testing.T, err error) {
	t.Helper()
	switch got := e.holds(t, "copy"); {
	case got == "-" && err != nil:
	case got != string(large):
		t.Errorf("the copy has %d bytes other than its source; err = %v", len(got), err)
	}
	wantNoUploads(t, e)
}

// during returns an action that calls do after the server has executed the request, and
// then forwards the response.
func during(do func()) s3fault.Action {
	return s3fault.Edit("during", func(*s3fault.Answer) bool { do(); return true })
}

// A copy sends no unnecessary request.
func TestCopyRequests(t *testing.T) {
	e := newEnv(t, nil)
	e.put(t, "old", "old content")
	e.proxy.Plan()
	if err := copyOld(t.Context(), e.store, 0, oldETag); err != nil {
		t.Fatal(err)
	}
	if events := e.proxy.Events(); len(events) != 1 || events[0].Op != s3fault.CopyObject {
		t.Errorf("a copy in one request sends %v", events)
	}
	request := e.putLarge(t)
	e.proxy.Plan()
	if _, err := e.store.Copy(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	var ops []s3fault.Op
	for _, e := range e.proxy.Events() {
		ops = append(ops, e.Op)
	}
	if diff := cmp.Diff([]s3fault.Op{
		s3fault.HeadObject, s3fault.GetObjectTagging, s3fault.CreateMultipartUpload,
		s3fault.UploadPartCopy, s3fault.UploadPartCopy, s3fault.UploadPartCopy, s3fault.CompleteMultipartUpload,
	}, ops); diff != "" {
		t.Errorf("a copy in parts (-want +got):\n%s", diff)
	}
}

// TestCopyPartsFail makes the second part fail permanently.
func TestCopyPartsFail(t *testing.T) {
	for name, c := range map[string]struct {
		action s3fault.Action
		want   error
	}{
		"denied":       {s3fault.Status(403, "AccessDenied"), object.ErrDenied},
		"down":         {s3fault.Status(503, "SlowDown"), object.ErrUnavailable},
		"denied later": {s3fault.ErrorIn200("AccessDenied"), object.ErrDenied},
		"changed":      {s3fault.Status(412, "PreconditionFailed"), object.ErrSourceChanged},
		"no range":     {s3fault.Status(416, "InvalidRange"), object.ErrUnavailable},
		"gone":         {s3fault.Status(404, "NoSuchKey"), object.ErrNotFound},
		"no upload":    {s3fault.Status(404, "NoSuchUpload"), object.ErrUnavailable},
		"lost":         {s3fault.Lost(), object.ErrUnavailable},
		"HTML":         {s3fault.HTML200(), object.ErrUnavailable},
	} {
		for _, inFlight := range []int{1, 3} {
			t.Run(fmt.Sprint(name, inFlight), func(t *testing.T) {
				t.Parallel()
				e := newEnv(t, func(o *s3.Options) { o.MaxAttempts = 2 })
				request := e.putLarge(t)
				request.InFlight = inFlight
				e.proxy.Plan(s3fault.Rule{Op: s3fault.UploadPartCopy, Skip: 1, Times: -1, Action: c.action})
				_, err := e.store.Copy(t.Context(), request)
				e.proxy.MustHaveFired(t)
				if !errors.Is(err, c.want) || !strings.Contains(err.Error(), "copy large to copy") {
					t.Errorf("err = %v, want %v", err, c.want)
				}
				wantContent(t, e, "copy", "-")
				wantNoUploads(t, e)
			})
		}
	}
}

// TestCopySourceChanges replaces or deletes the source between two parts.
func TestCopySourceChanges(t *testing.T) {
	for name, c := range map[string]struct {
		change func(e *env) error
		want   error
	}{
		"replaced": {func(e *env) error {
			_, err := e.plain.Put(context.Background(), "large", bytes.ToUpper(large))
			return err
		}, object.ErrSourceChanged},
		"cut": {
			func(e *env) error { _, err := e.plain.Put(context.Background(), "large", []byte("x")); return err },
			object.ErrSourceChanged,
		},
		"deleted": {func(e *env) error { return e.plain.Delete(context.Background(), "large") }, object.ErrNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, nil)
			request := e.putLarge(t)
			e.proxy.Plan(s3fault.Rule{Op: s3fault.UploadPartCopy, Action: during(func() {
				if err := c.change(e); err != nil {
					t.Error(err)
				}
			})})
			_, err := e.store.Copy(t.Context(), request)
			e.proxy.MustHaveFired(t)
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			wantContent(t, e, "copy", "-")
			wantNoUploads(t, e)
		})
	}
}

// TestCopyCanceled ends the context while the server executes each request, and while it
// sends no response.
func TestCopyCanceled(t *testing.T) {
	for _, op := range []s3fault.Op{
		s3fault.HeadObject, s3fault.GetObjectTagging, s3fault.CreateMultipartUpload, s3fault.UploadPartCopy,
		s3fault.CompleteMultipartUpload,
	} {
		for _, skip := range []int{0, 1} {
			if skip > 0 && op != s3fault.UploadPartCopy {
				continue
			}
			t.Run(fmt.Sprint(op, skip), func(t *testing.T) {
				e := newEnv(t, nil)
				request := e.putLarge(t)
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				// If Copy does not wait for the response, the proxy counts too late.
				var fired atomic.Bool
				e.proxy.Plan(s3fault.Rule{Op: op, Skip: skip, Action: during(func() { fired.Store(true); cancel() })})
				_, err := e.store.Copy(ctx, request)
				if !fired.Load() {
					t.Errorf("the context did not end; requests: %v", e.proxy.Events())
				}
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("err = %v, want Canceled", err)
				}
				e.wantCopy(t, err)
				if n := e.proxy.Count(s3fault.ListMultipartUploads); n != 0 {
					t.Errorf("%d lists of uploads, so Copy did not wait for a response", n)
				}
			})
		}
	}
	// Several parts are in flight, and one never completes.
	for name, action := range map[string]s3fault.Action{"hang": s3fault.Hang(), "hang after": s3fault.HangAfter()} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, func(o *s3.Options) { o.RequestTimeout = 300 * time.Millisecond })
			request := e.putLarge(t)
			request.InFlight = 3
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			e.proxy.Plan(
				s3fault.Rule{Op: s3fault.UploadPartCopy, Action: action},
				s3fault.Rule{Op: s3fault.UploadPartCopy, Action: during(cancel)},
			)
			_, err := e.store.Copy(ctx, request)
			e.proxy.MustHaveFired(t)
			if !errors.Is(err, context.Canceled) {
				t.Errorf("err = %v, want Canceled", err)
			}
			e.wantCopy(t, err)
			if n := e.proxy.Count(s3fault.ListMultipartUploads); n == 0 {
				t.Error("no list of uploads, although the late part may have recreated the upload")
			}
		})
	}
}

// TestCopyWholeCanceled ends the context while the server copies an object in one request:
// Copy does not return before the response, because until then the server may write the
// target, and does not retry.
func TestCopyWholeCanceled(t *testing.T) {
	for name, c := range map[string]struct {
		answer func(*s3fault.Answer)
		want   error
	}{
		"succeeds": {func(*s3fault.Answer) {}, nil},
		"denied": {
			func(a *s3fault.Answer) { a.Status, a.Body = 403, []byte("<Error><Code>AccessDenied</Code></Error>") },
			context.Canceled,
		},
		"throttled": {
			func(a *s3fault.Answer) { a.Status, a.Body = 503, []byte("<Error><Code>SlowDown</Code></Error>") },
			context.Canceled,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t, nil)
			e.put(t, "old", "old content")
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			returned := make(chan struct{})
			e.proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Action: s3fault.Edit("cancel", func(a *s3fault.Answer) bool {
				cancel()
				timer := time.NewTimer(300 * time.Millisecond)
				defer timer.Stop()
				select {
				case <-returned:
					t.Error("Copy returned during the copy of the server")
				case <-timer.C:
				}
				c.answer(a)
				return true
			})})
			err := copyOld(ctx, e.store, 0, oldETag)
			close(returned)
			e.proxy.MustHaveFired(t)
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if n := e.proxy.Count(s3fault.CopyObject); n != 1 {
				t.Errorf("%d requests", n)
			}
			wantContent(t, e, "copy", "old content")
		})
	}
}

// TestCopyOutlivesItsContextBriefly ends the context of a copy without a response. An attempt
// has three request timeouts; after the end of the context it has one.
func TestCopyOutlivesItsContextBriefly(t *testing.T) {
	const request = 2 * time.Second
	e := newEnv(t, func(o *s3.Options) { o.RequestTimeout = request })
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	e.put(t, "old", "old content")
	returned := make(chan struct{})
	e.proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Action: s3fault.Edit("hold", func(*s3fault.Answer) bool {
		cancel()
		<-returned
		return true
	})})
	began := time.Now()
	err := copyOld(ctx, e.store, 0, oldETag)
	close(returned)
	if took := time.Since(began); took > 5*request/2 {
		t.Errorf("took %v", took)
	}
	if !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v, want Canceled", err)
	}
}

// TestCopyAbortsLast makes one part fail, or the context end, while another is in flight: the
// latter must not arrive after the abort.
func TestCopyAbortsLast(t *testing.T) {
	for _, cancels := range []bool{false, true} {
		t.Run(fmt.Sprint(cancels), func(t *testing.T) {
			e := newEnv(t, nil)
			request := e.putLarge(t)
			request.InFlight = 2
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			failed, aborted := make(chan struct{}), make(chan struct{})
			e.proxy.Plan(
				s3fault.Rule{Op: s3fault.UploadPartCopy, Action: during(func() {
					<-failed
					timer := time.NewTimer(300 * time.Millisecond)
					defer timer.Stop()
					select {
					case <-aborted:
						t.Error("the upload was aborted while a part was in flight")
					case <-timer.C:
					}
				})},
				s3fault.Rule{Op: s3fault.UploadPartCopy, Action: s3fault.Edit("fail", func(a *s3fault.Answer) bool {
					if cancels {
						cancel()
					} else {
						a.Status, a.Body = 403, []byte("<Error><Code>AccessDenied</Code></Error>")
					}
					close(failed)
					return true
				})},
				s3fault.Rule{Op: s3fault.AbortMultipartUpload, Action: during(func() { close(aborted) })},
			)
			if _, err := e.store.Copy(ctx, request); !errors.Is(err, map[bool]error{
				false: object.ErrDenied,
				true:  context.Canceled,
			}[cancels]) {
				t.Errorf("err = %v", err)
			}
			e.proxy.MustHaveFired(t)
			wantContent(t, e, "copy", "-")
			wantNoUploads(t, e)
		})
	}
}

// TestCopyAbortsItsUpload makes the abort of an upload fail as well.
func TestCopyAbortsItsUpload(t *testing.T) {
	denied := s3fault.Rule{Op: s3fault.UploadPartCopy, Times: -1, Action: s3fault.Status(403, "AccessDenied")}
	for name, action := range map[string]s3fault.Action{
		"SlowDown": s3fault.Status(503, "SlowDown"), "lost": s3fault.Lost(), "reset": s3fault.Reset(),
		"HTML":         s3fault.HTML200(),
		"HTML instead": s3fault.Instead(&s3fault.Answer{Status: 200, Body: []byte("<html>")}), "hang": s3fault.Hang(),
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, func(o *s3.Options) { o.RequestTimeout = 300 * time.Millisecond })
			e.put(t, "old", "old content")
			e.proxy.Plan(denied, s3fault.Rule{Op: s3fault.AbortMultipartUpload, Action: action})
			if err := copyOld(t.Context(), e.store, 1, ""); !errors.Is(err, object.ErrDenied) {
				t.Errorf("err = %v, want ErrDenied", err)
			}
			e.proxy.MustHaveFired(t)
			wantNoUploads(t, e)
		})
	}
	t.Run("permanent", func(t *testing.T) {
		e := newEnv(t, func(o *s3.Options) { o.MaxAttempts = 2 })
		e.put(t, "old", "old content")
		e.proxy.Plan(denied, s3fault.Rule{
			Op: s3fault.AbortMultipartUpload, Times: -1,
			Action: s3fault.Status(503, "SlowDown"),
		})
		if err := copyOld(t.Context(), e.store, 1, ""); !errors.Is(err, object.ErrDenied) {
			t.Errorf("err = %v, want ErrDenied", err)
		}
		e.proxy.MustHaveFired(t)
		if n, err := e.store.AbortUploads(t.Context(), "", time.Time{}); n != 0 || !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("AbortUploads: %d, err = %v, want ErrUnavailable", n, err)
		}
		if n, err := e.plain.AbortUploads(t.Context(), "", time.Time{}); n != 1 || err != nil {
			t.Errorf("AbortUploads: %d, %v, want the one that stayed", n, err)
		}
		wantNoUploads(t, e)
	})
	// A duplicated request begins an upload that only a list shows.
	t.Run("begun twice", func(t *testing.T) {
		e := newEnv(t, nil)
		e.put(t, "old", "old content")
		e.proxy.Plan(s3fault.Rule{Op: s3fault.CreateMultipartUpload, Action: s3fault.Duplicate()})
		if err := copyOld(t.Context(), e.store, 1, oldPartsETag); err != nil {
			t.Fatal(err)
		}
		e.proxy.MustHaveFired(t)
		wantContent(t, e, "copy", "old content")
		if n, err := e.store.AbortUploads(t.Context(), "", time.Time{}); n != 1 || err != nil {
			t.Errorf("AbortUploads: %d, %v, want the duplicate", n, err)
		}
		wantNoUploads(t, e)
		wantContent(t, e, "copy", "old content")
	})
	t.Run("list denied", func(t *testing.T) {
		e := newEnv(t, nil)
		e.put(t, "old", "old content")
		e.proxy.Plan(
			s3fault.Rule{Op: s3fault.CreateMultipartUpload, Action: s3fault.Lost()},
			s3fault.Rule{Op: s3fault.ListMultipartUploads, Times: -1, Action: s3fault.Status(403, "AccessDenied")},
		)
		if err := copyOld(t.Context(), e.store, 1, oldPartsETag); err != nil {
			t.Errorf("the copy is correct: %v", err)
		}
		e.proxy.MustHaveFired(t)
	})
}

// TestCopyRestarts loses the upload or a part of it.
func TestCopyRestarts(t *testing.T) {
	for name, c := range map[string]struct {
		rules   []s3fault.Rule
		uploads int
	}{
		"the upload, at a part": {[]s3fault.Rule{{
			Op: s3fault.UploadPartCopy, Skip: 1,
			Action: s3fault.Status(404, "NoSuchUpload"),
		}}, 2},
		"the upload, at the end": {[]s3fault.Rule{{
			Op:     s3fault.CompleteMultipartUpload,
			Action: s3fault.Status(404, "NoSuchUpload"),
		}}, 2},
		"a part": {[]s3fault.Rule{{
			Op:     s3fault.CompleteMultipartUpload,
			Action: s3fault.Status(400, "InvalidPart"),
		}}, 2},
		"a part, in 200": {[]s3fault.Rule{{
			Op: s3fault.CompleteMultipartUpload, Times: 2,
			Action: s3fault.Instead(&s3fault.Answer{Status: 200, Body: []byte("<Error><Code>InvalidPart</Code></Error>")}),
		}}, 2},
		"completion response lost": {[]s3fault.Rule{
			{Op: s3fault.CompleteMultipartUpload, Action: s3fault.Lost()},
			{Op: s3fault.CompleteMultipartUpload, Action: s3fault.Status(404, "NoSuchUpload")},
		}, 1},
		"all responses lost": {[]s3fault.Rule{{
			Op: s3fault.CompleteMultipartUpload, Times: -1,
			Action: s3fault.Lost(),
		}}, 1},
		"completion error in 200": {[]s3fault.Rule{{
			Op: s3fault.CompleteMultipartUpload, Times: -1,
			Action: s3fault.ErrorIn200("InternalError"),
		}}, 1},
		"completion HTML": {[]s3fault.Rule{{
			Op: s3fault.CompleteMultipartUpload, Times: -1,
			Action: s3fault.HTML200(),
		}}, 1},
		"completion empty": {[]s3fault.Rule{{
			Op: s3fault.CompleteMultipartUpload, Times: -1,
			Action: s3fault.Empty200(),
		}}, 1},
		"duplicates": {[]s3fault.Rule{
			{Op: s3fault.UploadPartCopy, Times: -1, Action: s3fault.Duplicate()},
			{Op: s3fault.CompleteMultipartUpload, Action: s3fault.Duplicate()},
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newEnv(t, func(o *s3.Options) { o.MaxAttempts = 2 })
			request := e.putLarge(t)
			e.proxy.Plan(c.rules...)
			info, err := e.store.Copy(t.Context(), request)
			if err != nil {
				t.Fatal(err)
			}
			e.proxy.MustHaveFired(t)
			if n := e.proxy.Count(s3fault.CreateMultipartUpload); n != c.uploads {
				t.Errorf("%d uploads, want %d", n, c.uploads)
			}
			e.wantCopy(t, nil)
			if head, err := e.plain.Head(t.Context(), "copy"); err != nil || head.ETag != info.ETag || head.Size != info.Size ||
				head.SourceETag != request.SourceETag {
				t.Errorf("Copy says %+v, Head %+v, %v", info, head, err)
			}
		})
	}
	t.Run("another object exists", func(t *testing.T) {
		e := newEnv(t, func(o *s3.Options) { o.MaxAttempts = 2 })
		request := e.putLarge(t)
		e.put(t, "copy", string(bytes.ToUpper(large)))
		e.proxy.Plan(
			s3fault.Rule{Op: s3fault.CompleteMultipartUpload, Times: -1, Action: s3fault.Instead(&s3fault.Answer{Status: 200})},
			s3fault.Rule{
				Op: s3fault.HeadObject, Key: regexp.MustCompile("^copy$"), Times: -1,
				Action: s3fault.StripAnswer("X-Amz-Checksum-Crc32"),
			},
		)
		if _, err := e.store.Copy(t.Context(), request); !errors.Is(err, object.ErrUnavailable) ||
			!strings.Contains(err.Error(), "may have been copied") {
			t.Errorf("err = %v, want ErrUnavailable", err)
		}
		e.proxy.MustHaveFired(t)
		wantNoUploads(t, e)
	})
}

// TestCopyIgnoredConditions copies on a server that ignores conditions. A copy of another
// version than the requested one fails.
func TestCopyIgnoredConditions(t *testing.T) {
	e := newEnv(t, nil)
	e.put(t, "old", "new content")
	strip := s3fault.StripRequest("X-Amz-Copy-Source-If-Match", e.options.AccessKeyID, string(e.options.SecretAccessKey))
	for _, threshold := range []int64{0, 1} {
		e.proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Times: -1, Action: strip},
			s3fault.Rule{Op: s3fault.UploadPartCopy, Times: -1, Action: strip})
		request := object.CopyRequest{
			From: "old", To: "copy", SourceETag: oldETag, Size: 11,
			Parts: object.CopyParts{Threshold: threshold},
		}
		_, err := e.store.Copy(t.Context(), request)
		if !errors.Is(err, object.ErrSourceChanged) || !strings.Contains(err.Error(), "ignored the condition") {
			t.Errorf("without the condition: err = %v, want ErrSourceChanged", err)
		}
		e.proxy.Plan()
		if _, err := e.store.Copy(t.Context(), request); !errors.Is(err, object.ErrSourceChanged) {
			t.Errorf("with the condition: err = %v, want ErrSourceChanged", err)
		}
	}
}

// TestCopyWrongChecksum makes a server return another checksum than the source's.
func TestCopyWrongChecksum(t *testing.T) {
	e := newEnv(t, nil)
	if _, err := s3test.Shared(t).Client().PutObject(t.Context(), &awss3.PutObjectInput{
		Bucket: &e.options.Bucket, Key: aws.String("old"), Body: strings.NewReader("old content"),
		ChecksumAlgorithm: "CRC64NVME",
	}); err != nil {
		t.Fatal(err)
	}
	head, err := e.plain.Head(t.Context(), "old")
	if err != nil || !strings.HasPrefix(head.Checksum, "CRC64NVME:") {
		t.Fatalf("%+v, %v", head, err)
	}
	if err := copyOld(t.Context(), e.store, 1, oldPartsETag); err != nil {
		t.Fatal(err)
	}
	if target, err := e.plain.Head(t.Context(), "copy"); err != nil || target.Checksum != head.Checksum ||
		!object.ProvedEqual(head, target) {
		t.Errorf("%+v of %+v, %v", target, head, err)
	}
	_, text, _ := strings.Cut(head.Checksum, ":")
	e.proxy.Plan(s3fault.Rule{
		Op: s3fault.CompleteMultipartUpload, Times: -1,
		Action: s3fault.Edit("checksum", func(a *s3fault.Answer) bool {
			body := bytes.ReplaceAll(a.Body, []byte(text), []byte("AAAAAAAAAAA="))
			fired := !bytes.Equal(body, a.Body)
			a.Body = body
			return fired
		}),
	})
	if err := copyOld(t.Context(), e.store, 1, oldPartsETag); !errors.Is(err, object.ErrUnavailable) ||
		!strings.Contains(err.Error(), "checksum") {
		t.Errorf("err = %v, want ErrUnavailable", err)
	}
	e.proxy.MustHaveFired(t)
	wantNoUploads(t, e)
}

// TestCopyKeepsMetadata compares metadata, headers and tags.
func TestCopyKeepsMetadata(t *testing.T) {
	e := newEnv(t, nil)
	client := s3test.Shared(t).Client()
	put, err := client.PutObject(t.Context(), &awss3.PutObjectInput{
		Bucket: &e.options.Bucket, Key: aws.String("src"), Body: strings.NewReader("tagged"),
		Metadata:    map[string]string{"engine": "milvus 2.6", "x-y": "é & co"},
		ContentType: aws.String("application/x-binlog"), CacheControl: aws.String("max-age=7"),
		ContentEncoding:    aws.String("identity"),
		ContentDisposition: aws.String("attachment"), ContentLanguage: aws.String("eo"),
		Expires: aws.Time(time.Date(2030, 1, 2, 3, 4, 5, 0, time.UTC)),
		Tagging: aws.String("team=a%20b&cost%2Fcenter=7%2B1"),
	})
	if err != nil {
		t.Fatal(err)
	}
	type properties struct {
		Metadata                                          map[string]string
		Type, Cache, Encoding, Disposition, Lang, Expires string
		Tags                                              map[string]string
	}
	look := func(key string) properties {
		head, err := client.HeadObject(t.Context(), &awss3.HeadObjectInput{Bucket: &e.options.Bucket, Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		tags, err := client.GetObjectTagging(t.Context(), &awss3.GetObjectTaggingInput{Bucket: &e.options.Bucket, Key: &key})
		if err != nil {
			t.Fatal(err)
		}
		p := properties{
			maps.Clone(head.Metadata), aws.ToString(head.ContentType), aws.ToString(head.CacheControl),
			aws.ToString(head.ContentEncoding),
			aws.ToString(head.ContentDisposition), aws.ToString(head.ContentLanguage), aws.ToString(head.ExpiresString),
			map[string]string{},
		}
		for _, tag := range tags.TagSet {
			p.Tags[*tag.Key] = *tag.Value
		}
		return p
	}
	request := object.CopyRequest{From: "src", To: "whole", SourceETag: strings.Trim(*put.ETag, `"`), Size: 6}
	if _, err := e.store.Copy(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	want := look("src")
	if len(want.Tags) != 2 || len(want.Metadata) != 2 {
		t.Fatalf("the source has %+v", want)
	}
	if diff := cmp.Diff(want, look("whole")); diff != "" {
		t.Errorf("a copy in one request (-want +got):\n%s", diff)
	}
	request.To, request.Parts.Threshold = "parts", 1
	if _, err := e.store.Copy(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	want.Metadata["snapshotd-source-etag"] = request.SourceETag // stored: never rename
	if diff := cmp.Diff(want, look("parts")); diff != "" {
		t.Errorf("a copy in parts (-want +got):\n%s", diff)
	}

	// A copy of the copy has the ETag of its own source.
	again, err := e.store.Head(t.Context(), "parts")
	if err != nil {
		t.Fatal(err)
	}
	request = object.CopyRequest{
		From: "parts", To: "again", SourceETag: again.ETag, Size: 6,
		Parts: object.CopyParts{Threshold: 1},
	}
	if _, err := e.store.Copy(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	want.Metadata["snapshotd-source-etag"] = again.ETag
	if diff := cmp.Diff(want, look("again")); diff != "" {
		t.Errorf("a copy of a copy in parts (-want +got):\n%s", diff)
	}

	// Unreadable tags are omitted.
	for i, code := range []string{"AccessDenied", "NotImplemented", "MethodNotAllowed", "NoSuchTagSet"} {
		e.proxy.Plan(s3fault.Rule{
			Op: s3fault.GetObjectTagging, Times: -1,
			Action: s3fault.Status([]int{403, 501, 405, 404}[i], code),
		})
		if _, err := e.store.Copy(t.Context(), request); err != nil {
			t.Errorf("%s: %v", code, err)
		}
		e.proxy.MustHaveFired(t)
		if got := look("again"); len(got.Tags) != 0 || got.Type != want.Type {
			t.Errorf("%s: %+v", code, got)
		}
	}
}

// stub is a server of one large object without content. It records the requests.
type stub struct {
	size int64

	mu   sync.Mutex
	seen []*http.Request
	body []string
}

func (s *stub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	s.mu.Lock()
	s.seen, s.body = append(s.seen, r), append(s.body, string(body))
	s.mu.Unlock()
	op, _ := s3fault.Classify(r)
	w.Header().Set("Last-Modified", "Mon, 02 Nov 2026 03:04:05 GMT")
	switch op {
	case s3fault.HeadObject:
		w.Header().Set("ETag", `"source"`)
		w.Header().Set("Content-Length", fmt.Sprint(s.size))
	case s3fault.GetObjectTagging:
		fmt.Fprint(w, "<Tagging><TagSet><Tag><Key>a b</Key><Value>c+d</Value></Tag></TagSet></Tagging>")
	case s3fault.CreateMultipartUpload:
		fmt.Fprint(w, "<InitiateMultipartUploadResult><UploadId>id</UploadId></InitiateMultipartUploadResult>")
	case s3fault.UploadPartCopy:
		fmt.Fprintf(w, "<CopyPartResult><ETag>&quot;part-%s&quot;</ETag></CopyPartResult>", r.URL.Query().Get("partNumber"))
	case s3fault.CompleteMultipartUpload:
		fmt.Fprint(w, "<CompleteMultipartUploadResult><ETag>&quot;made-2&quot;</ETag></CompleteMultipartUploadResult>")
	case s3fault.CopyObject:
		fmt.Fprint(w, "<CopyObjectResult><ETag>&quot;made&quot;</ETag>"+
			"<LastModified>2026-11-02T03:04:05Z</LastModified></CopyObjectResult>")
	default:
		w.WriteHeader(http.StatusNotImplemented)
	}
}

// TestCopyOfFiveGiB checks the requests of copies that are too large for the test's disk.
func TestCopyOfFiveGiB(t *testing.T) {
	const gib = int64(1) << 30
	for _, c := range []struct {
		size, threshold, part int64
		ranges                []string
	}{
		{5*gib - 1, 1 << 50, 3 * gib, nil},
		{5 * gib, 1 << 50, 3 * gib, nil},
		{5*gib + 1, 1 << 50, 3 * gib, []string{"bytes=0-3221225471", "bytes=3221225472-5368709120"}},
		{5*gib + 1, 0, 5 * gib, []string{"bytes=0-5368709119", "bytes=5368709120-5368709120"}},
		{5 * gib, 1, 5 * gib, []string{""}}, // one part: without a range
	} {
		server := &stub{size: c.size}
		listener := httptest.NewServer(server)
		store := s3test.Open(t, s3.Options{
			Bucket: "bucket", Prefix: "pre fix/", Endpoint: listener.URL, PathStyle: true, AccessKeyID: "id",
			SecretAccessKey: "secret",
			SSE:             "aws:kms", KMSKeyID: "key-1", ExpectedBucketOwner: "111122223333",
		})
		info, err := store.Copy(t.Context(), object.CopyRequest{
			From: "a+b", To: "c d", SourceETag: "source", Size: c.size, InFlight: 1,
			Parts: object.CopyParts{Threshold: c.threshold, PartSize: c.part},
		})
		listener.Close()
		want := object.Info{Key: "c d", Size: c.size, ETag: "made", ModTime: time.Date(2026, 11, 2, 3, 4, 5, 0, time.UTC)}
		if c.ranges != nil {
			want.ETag, want.ModTime = "made-2", info.ModTime
		}
		if err != nil || info != want {
			t.Errorf("%d: %+v, %v; want %+v", c.size, info, err, want)
		}
		var ranges []string
		for i, r := range server.seen {
			op, _ := s3fault.Classify(r)
			if got := r.Header.Get("X-Amz-Expected-Bucket-Owner"); got != "111122223333" {
				t.Errorf("%s expects owner %q", op, got)
			}
			switch op { //nolint:exhaustive // the others have nothing to check
			case s3fault.UploadPartCopy, s3fault.CopyObject:
				if got := r.Header.Get("X-Amz-Copy-Source"); got != "bucket/pre%20fix/a%2Bb" {
					t.Errorf("%s of %s", op, got)
				}
				if r.Header.Get("X-Amz-Copy-Source-If-Match") != `"source"` ||
					r.Header.Get("X-Amz-Source-Expected-Bucket-Owner") != "111122223333" {
					t.Errorf("%s with %v", op, r.Header)
				}
			case s3fault.CompleteMultipartUpload:
				for n := range c.ranges {
					if want := fmt.Sprintf("part-%d", n+1); !strings.Contains(server.body[i], want) {
						t.Errorf("completed without %s: %s", want, server.body[i])
					}
				}
			}
			if got := r.Header.Get("X-Amz-Tagging"); op == s3fault.CreateMultipartUpload && got != "a%20b=c%2Bd" {
				t.Errorf("tags %q", got) // servers decode a plus differently
			}
			if op == s3fault.UploadPartCopy {
				ranges = append(ranges, r.Header.Get("X-Amz-Copy-Source-Range"))
			}
			if op == s3fault.CreateMultipartUpload || op == s3fault.CopyObject {
				if r.Header.Get("X-Amz-Server-Side-Encryption") != "aws:kms" ||
					r.Header.Get("X-Amz-Server-Side-Encryption-Aws-Kms-Key-Id") != "key-1" {
					t.Errorf("%s with %v", op, r.Header)
				}
			}
		}
		if !slices.Equal(ranges, c.ranges) {
			t.Errorf("%d bytes: ranges %q, want %q", c.size, ranges, c.ranges)
		}
	}
}

// TestHeadInfo checks the fields that only Head returns.
func TestHeadInfo(t *testing.T) {
	e := newEnv(t, nil)
	e.put(t, "old", "old content")
	for name, c := range map[string]struct {
		header map[string]string
		want   func(*object.Info)
	}{
		"nothing": {map[string]string{}, func(*object.Info) {}},
		"KMS": {
			map[string]string{"X-Amz-Server-Side-Encryption": "aws:kms"},
			func(i *object.Info) { i.OpaqueETag = true },
		},
		"dual KMS": {
			map[string]string{"X-Amz-Server-Side-Encryption": "aws:kms:dsse"},
			func(i *object.Info) { i.OpaqueETag = true },
		},
		"AES256": {map[string]string{"X-Amz-Server-Side-Encryption": "AES256"}, func(*object.Info) {}},
		"a copy": {
			map[string]string{"X-Amz-Meta-Snapshotd-Source-Etag": "abc-2"},
			func(i *object.Info) { i.SourceETag = "abc-2" },
		},
		"SHA256": {
			map[string]string{"X-Amz-Checksum-Sha256": "AAAA"},
			func(i *object.Info) { i.Checksum = "SHA256:AAAA" },
		},
		"CRC32C": {
			map[string]string{"X-Amz-Checksum-Crc32c": "AAAA", "X-Amz-Checksum-Type": "FULL_OBJECT"},
			func(i *object.Info) { i.Checksum = "CRC32C:AAAA" },
		},
		"of parts": {map[string]string{"X-Amz-Checksum-Crc32c": "AAAA-3"}, func(*object.Info) {}},
		"by its type": {
			map[string]string{"X-Amz-Checksum-Crc32c": "AAAA", "X-Amz-Checksum-Type": "COMPOSITE"},
			func(*object.Info) {},
		},
		"strongest": {
			map[string]string{"X-Amz-Checksum-Crc32": "AA", "X-Amz-Checksum-Crc64nvme": "AAAA"},
			func(i *object.Info) { i.Checksum = "CRC64NVME:AAAA" },
		},
	} {
		t.Run(name, func(t *testing.T) {
			e.proxy.Plan(s3fault.Rule{Op: s3fault.HeadObject, Action: s3fault.Edit("headers", func(a *s3fault.Answer) bool {
				for _, sum := range []string{"X-Amz-Checksum-Crc32", "X-Amz-Checksum-Type"} { // those of the object itself
					a.Header.Del(sum)
				}
				for name, value := range c.header {
					a.Header.Set(name, value)
				}
				return true
			})})
			got, err := e.store.Head(t.Context(), "old")
			if err != nil {
				t.Fatal(err)
			}
			want := object.Info{Key: "old", Size: 11, ETag: oldETag, ModTime: got.ModTime}
			c.want(&want)
			if got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
		})
	}
}

// begin begins uploads and leaves them open.
func (e *env) begin(t *testing.T, keys ...string) {
	t.Helper()
	client := s3test.Shared(t).Client()
	for _, key := range keys {
		if _, err := client.CreateMultipartUpload(t.Context(), &awss3.CreateMultipartUploadInput{
			Bucket: &e.options.Bucket,
			Key:    &key,
		}); err != nil {
			t.Fatal(err)
		}
	}
}

func (e *env) abort(t *testing.T, s *s3.Store, prefix string, before time.Time, want int) {
	t.Helper()
	if n, err := s.AbortUploads(t.Context(), prefix, before); n != want || err != nil {
		t.Errorf("%q, begun before %v: %d aborted, %v; want %d", prefix, before, n, err, want)
	}
}

func TestAbortUploads(t *testing.T) {
	e := newEnv(t, nil)
	e.put(t, "a/1", "kept")
	e.begin(t, "a/1", "a/1", "a/2/x", "a/b +%é?", "ab", "b/1")
	e.abort(t, e.store, "c/", time.Time{}, 0)
	e.abort(t, e.store, "a/", time.Now().Add(-time.Hour), 0)
	if at, err := e.store.OldestUpload(t.Context(), "a/"); err != nil || time.Since(at).Abs() > time.Hour {
		t.Errorf("the oldest upload is of %v, err = %v", at, err)
	}
	if at, err := e.store.OldestUpload(t.Context(), "c/"); err != nil || !at.IsZero() {
		t.Errorf("without uploads the oldest is of %v, err = %v", at, err)
	}
	o := e.options
	o.Prefix = "a/2/"
	e.abort(t, s3test.Open(t, o), "", time.Time{}, 1)
	e.abort(t, e.store, "a/", time.Now().Add(time.Hour), 3)
	e.abort(t, e.store, "a/", time.Time{}, 0)
	e.abort(t, e.store, "", time.Time{}, 2)
	wantNoUploads(t, e)
	wantContent(t, e, "a/1", "kept")

	t.Run("unknown upload", func(t *testing.T) {
		e.begin(t, "a", "b")
		e.proxy.Plan(s3fault.Rule{Op: s3fault.AbortMultipartUpload, Action: s3fault.Duplicate()},
			s3fault.Rule{Op: s3fault.AbortMultipartUpload, Action: s3fault.Lost()})
		e.abort(t, e.store, "", time.Time{}, 2)
		e.proxy.MustHaveFired(t)
		wantNoUploads(t, e)
	})
	t.Run("one is denied", func(t *testing.T) {
		e.begin(t, "a", "b", "c")
		e.proxy.Plan(s3fault.Rule{Op: s3fault.AbortMultipartUpload, Action: s3fault.Status(403, "AccessDenied")})
		if n, err := e.store.AbortUploads(t.Context(), "", time.Time{}); n != 2 || !errors.Is(err, object.ErrDenied) {
			t.Errorf("%d, err = %v, want 2 and ErrDenied", n, err)
		}
		e.proxy.MustHaveFired(t)
		e.abort(t, e.plain, "", time.Time{}, 1)
	})
	t.Run("abort without effect", func(t *testing.T) {
		e.begin(t, "a")
		e.proxy.Plan(s3fault.Rule{
			Op: s3fault.AbortMultipartUpload, Times: -1,
			Action: s3fault.Instead(&s3fault.Answer{Status: 204}),
		})
		if _, err := e.store.AbortUploads(t.Context(), "", time.Time{}); !errors.Is(err, object.ErrUnavailable) {
			t.Errorf("err = %v, want ErrUnavailable", err)
		}
		e.proxy.MustHaveFired(t)
		e.abort(t, e.plain, "", time.Time{}, 1)
	})
	t.Run("more than a page", func(t *testing.T) {
		const n = 1050
		var wg sync.WaitGroup
		for w := range 10 {
			wg.Go(func() {
				for i := range n / 10 {
					e.begin(t, fmt.Sprintf("p/%d", (i*10+w)%700)) // up to two of a key
				}
			})
		}
		wg.Wait()
		e.proxy.Plan()
		e.abort(t, e.store, "p/", time.Time{}, n)
		if n := e.proxy.Count(s3fault.ListMultipartUploads); n < 3 {
			t.Errorf("%d lists, so no second page was read", n)
		}
		wantNoUploads(t, e)
	})
	// The second page is read if the first has no match.
	t.Run("a second page", func(t *testing.T) {
		pages := &uploadPages{}
		server := httptest.NewServer(pages)
		defer server.Close()
		s := s3test.Open(t, s3.Options{
			Bucket: "bucket", Endpoint: server.URL, PathStyle: true, AccessKeyID: "id",
			SecretAccessKey: "secret",
		})
		e.abort(t, s, "a/", time.Date(2026, 11, 2, 0, 0, 0, 0, time.UTC), 1)
		want := []string{"GET  ", "GET a/b c 2", "DELETE  ", "GET  ", "GET a/b c 2"}
		if diff := cmp.Diff(want, pages.seen); diff != "" {
			t.Errorf("requests (-want +got):\n%s", diff)
		}
	})
	edit := func(old, with string) s3fault.Action {
		return s3fault.Edit("replace "+old, func(a *s3fault.Answer) bool {
			body := bytes.ReplaceAll(a.Body, []byte(old), []byte(with))
			fired := !bytes.Equal(body, a.Body)
			a.Body = body
			return fired
		})
	}
	for name, action := range map[string]s3fault.Action{
		"other bucket": edit("<Bucket>test-", "<Bucket>best-"),
		"foreign key":  edit("<Key>a/1", "<Key>b/1"),
		"no id":        edit("<UploadId>", "<UploadIdd>"),
		"no end":       edit("<IsTruncated>false", "<IsTruncated>true"),
		"no key":       s3fault.Status(404, "NoSuchKey"),
	} {
		t.Run(name, func(t *testing.T) {
			e := newEnv(t, nil)
			e.begin(t, "a/1")
			e.proxy.Plan(s3fault.Rule{Op: s3fault.ListMultipartUploads, Times: -1, Action: action})
			if _, err := e.store.AbortUploads(t.Context(), "a/", time.Time{}); !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("err = %v, want ErrUnavailable", err)
			}
			e.proxy.MustHaveFired(t)
			left := 1
			if name == "no end" { // uploads of the first page are aborted
				left = 0
			}
			e.abort(t, e.plain, "a/", time.Time{}, left)
		})
	}
}

// uploadPages is a server with two pages of uploads: the first has a recent upload, the
// second an old one until its abort.
type uploadPages struct {
	mu      sync.Mutex
	seen    []string
	aborted bool
}

func (p *uploadPages) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	q := r.URL.Query()
	p.seen = append(p.seen, fmt.Sprintf("%s %s %s", r.Method, q.Get("key-marker"), q.Get("upload-id-marker")))
	list := "<ListMultipartUploadsResult><Bucket>bucket</Bucket><EncodingType>url</EncodingType>%s" +
		"</ListMultipartUploadsResult>"
	switch {
	case r.Method == http.MethodDelete:
		p.aborted = true
		w.WriteHeader(http.StatusNoContent)
	case q.Get("key-marker") == "":
		fmt.Fprintf(w, list, "<IsTruncated>true</IsTruncated><NextKeyMarker>a/b+c</NextKeyMarker>"+
			"<NextUploadIdMarker>2</NextUploadIdMarker>"+
			"<Upload><Key>a/b+c</Key><UploadId>2</UploadId><Initiated>2026-11-02T03:04:05Z</Initiated></Upload>"+
			"<Upload><Key>a/b+c</Key><UploadId>3</UploadId></Upload>")
	case p.aborted:
		fmt.Fprintf(w, list, "<IsTruncated>false</IsTruncated>")
	default:
		fmt.Fprintf(w, list, "<IsTruncated>false</IsTruncated>"+
			"<Upload><Key>a/d</Key><UploadId>1</UploadId><Initiated>2026-11-01T03:04:05Z</Initiated></Upload>")
	}
}

// TestOldETag verifies the ETag constants.
func TestOldETag(t *testing.T) {
	sum := md5.Sum([]byte("old content"))
	parts := md5.Sum(sum[:])
	if got := hex.EncodeToString(sum[:]); got != oldETag {
		t.Error(got)
	}
	if got := hex.EncodeToString(parts[:]) + "-1"; got != oldPartsETag {
		t.Error(got)
	}
}
