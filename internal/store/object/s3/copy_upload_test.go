//go:build !short && linux

package s3_test

import (
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/internal/testing/s3fault"
)

// TestCopyLeavesNoUploadBesideItsLike completes a copy for which there is no
// answer, over one that an earlier attempt has made: the object is right, and the
// upload, which may not have been completed, is no longer open.
func TestCopyLeavesNoUploadBesideItsLike(t *testing.T) {
	for name, action := range map[string]s3fault.Action{
		"reset": s3fault.Reset(), "error in 200": s3fault.Instead(&s3fault.Answer{Status: 200, Body: []byte("<Error><Code>SlowDown</Code></Error>")}),
		"lost": s3fault.Lost(),
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, func(o *s3.Options) { o.MaxAttempts = 2 })
			r.put(t, "old", "old content")
			if err := copyOld(t.Context(), r.store, 1, oldPartsETag); err != nil {
				t.Fatal(err)
			}
			r.proxy.Plan(s3fault.Rule{Op: s3fault.CompleteMultipartUpload, Times: -1, Action: action})
			if err := copyOld(t.Context(), r.store, 1, oldPartsETag); err != nil {
				t.Error(err)
			}
			r.proxy.MustHaveFired(t)
			wantContent(t, r, "copy", "old content")
			wantNoUploads(t, r)
		})
	}
}
