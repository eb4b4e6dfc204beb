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

// TestAbortsAnsweredOtherwise aborts uploads on servers that answer with 200 in place
// of 204: one that aborts, and one that only says so.
func TestAbortsAnsweredOtherwise(t *testing.T) {
	for name, habit := range map[string]s3quirks.Habit{
		"aborted": s3quirks.Answers(s3fault.AbortMultipartUpload, http.StatusOK),
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
			o.Endpoint, o.MaxAttempts = s3quirks.New(t, o.Endpoint, habit).URL(), 2
			n, err := s3test.Open(t, o).AbortUploads(t.Context(), "", time.Time{})
			if name == "aborted" && (n != 1 || err != nil) || name != "aborted" && !errors.Is(err, object.ErrUnavailable) {
				t.Errorf("%d aborted, err = %v", n, err)
			}
		})
	}
}
