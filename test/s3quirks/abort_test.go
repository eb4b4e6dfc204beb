//go:build !short && linux

package s3quirks_test

import (
	"errors"
	"net/http"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3quirks"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// TestAbortWithStatus200 aborts uploads on servers that respond with 200 instead of
// 204: one aborts the upload, the other does not.
func TestAbortWithStatus200(t *testing.T) {
	for name, quirk := range map[string]s3quirks.Quirk{
		"aborted": s3quirks.RespondsWith(s3fault.AbortMultipartUpload, http.StatusOK),
		"not aborted": func(next s3quirks.Handler) s3quirks.Handler {
			return func(r *s3quirks.Request) *s3fault.Answer {
				if r.Op == s3fault.AbortMultipartUpload {
					return &s3fault.Answer{Status: http.StatusOK, Header: http.Header{}}
				}
				return next(r)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			o := s3test.Bucket(t)
			s3test.Shared(t).BeginUpload(t, o.Bucket, "a/b")
			o.Endpoint, o.MaxAttempts = s3quirks.New(t, o.Endpoint, quirk).URL(), 2
			n, err := s3test.Open(t, o).AbortUploads(t.Context(), "", time.Time{})
			if name == "aborted" && (n != 1 || err != nil) || name != "aborted" && !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("%d aborted, err = %v", n, err)
			}
		})
	}
}
