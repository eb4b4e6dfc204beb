//go:build linux && !short

package manager

import (
	"net/http"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/s3fault"
)

// TestS3RefusesOneCopy makes an S3 server refuse one copy of a restore in each way that
// may pass, or all of them for longer than the refusal timeout: the restore completes, or
// fails by the right reason and leaves nothing.
func TestS3RefusesOneCopy(t *testing.T) {
	page := &s3fault.Answer{
		Status: 403, Header: http.Header{"Content-Type": {"text/html"}}, Body: []byte("<html>Forbidden</html>"),
	}
	for name, c := range map[string]struct {
		action s3fault.Action
		reason string // of a restore whose copies are all refused; empty: it waits
	}{
		"ExpiredToken":            {s3fault.Status(400, "ExpiredToken"), "OBJECT_STORE_DENIED"},
		"AccessDenied":            {s3fault.Status(403, "AccessDenied"), "OBJECT_STORE_DENIED"},
		"InvalidAccessKeyId":      {s3fault.Status(403, "InvalidAccessKeyId"), "OBJECT_STORE_DENIED"},
		"SignatureDoesNotMatch":   {s3fault.Status(403, "SignatureDoesNotMatch"), "OBJECT_STORE_DENIED"},
		"403 of a proxy":          {s3fault.Instead(page), "OBJECT_STORE_DENIED"},
		"RequestTimeTooSkewed":    {s3fault.Status(403, "RequestTimeTooSkewed"), "OBJECT_STORE_MISCONFIGURED"},
		"NoSuchBucket":            {s3fault.Status(404, "NoSuchBucket"), "OBJECT_STORE_MISCONFIGURED"},
		"TemporaryRedirect":       {s3fault.Status(307, "TemporaryRedirect"), "OBJECT_STORE_MISCONFIGURED"},
		"KMS.DisabledException":   {s3fault.Status(400, "KMS.DisabledException"), "OBJECT_STORE_DENIED"},
		"KMS.ThrottlingException": {s3fault.Status(400, "KMS.ThrottlingException"), ""},
		"KMSThrottling":           {s3fault.Status(400, "KMSThrottling"), ""},
		"ThrottlingException":     {s3fault.Status(400, "ThrottlingException"), ""},
		"PriorRequestNotComplete": {s3fault.Status(400, "PriorRequestNotComplete"), ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e, through, proxy := onS3(t)
			r := e.start("a", func(o *testOptions) {
				o.Stores = map[string]object.Store{"default": through}
				o.Parts.RefusalTimeout, o.Parts.Collector.Off = time.Second, true
			})
			s := e.create(r, e.richCollection(r, "c", 40), "one")
			sp := restoreSpecOf(s)
			if c.reason != "" {
				proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Skip: 20, Times: -1, Action: c.action})
				end := e.mustFail(r, sp, c.reason, "refused for 1")
				proxy.MustHaveFired(t)
				if end.Done.Files > 100 {
					t.Errorf("%+v", end)
				}
			}
			// Twice: the store retries once by itself.
			proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Skip: 27, Times: 2, Action: c.action})
			before := e.contents()
			job := e.restore(r, sp)
			end := e.waitEnded(r, job.ID)
			if proxy.MustHaveFired(t); end.Job.State != copyjob.Completed {
				t.Fatalf("ended %v: %s: %s", end.Job.State, end.Job.Reason, end.Job.Message)
			}
			e.checkRestored(r, before, end.Job, sp)
		})
	}
}

// TestS3RefusesPermanently makes an S3 server refuse one copy in each permanent way: the
// restore fails at once.
func TestS3RefusesPermanently(t *testing.T) {
	e, through, proxy := onS3(t)
	r := e.start("a", func(o *testOptions) {
		o.Stores, o.Parts.Collector.Off = map[string]object.Store{"default": through}, true
	})
	s := e.create(r, e.richCollection(r, "c", 12), "one")
	for code, c := range map[string]struct {
		status int
		reason string
	}{
		"NotImplemented":     {501, "OBJECT_STORE_MISCONFIGURED"},
		"MethodNotAllowed":   {405, "OBJECT_STORE_MISCONFIGURED"},
		"InvalidObjectState": {403, "OBJECT_STORE_DENIED"},
		"InvalidRequest":     {400, "OBJECT_STORE_MISCONFIGURED"},
		"KeyTooLongError":    {400, "LAYOUT_REFUSED"},
		"NoSuchKey":          {404, "SOURCE_OBJECT_MISSING"},
		"PreconditionFailed": {412, "SOURCE_OBJECT_ALTERED"},
	} {
		proxy.Plan(s3fault.Rule{Op: s3fault.CopyObject, Skip: 9, Times: 1, Action: s3fault.Status(c.status, code)})
		began := time.Now()
		e.mustFail(r, restoreSpecOf(s), c.reason, "")
		if proxy.MustHaveFired(t); time.Since(began) > time.Minute {
			t.Errorf("%s: it took %v", code, time.Since(began))
		}
	}
}
