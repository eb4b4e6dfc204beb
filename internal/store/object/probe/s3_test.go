//go:build !short && linux

package probe_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

func TestS3(t *testing.T) {
	o := s3test.Bucket(t)
	wantGood(t, s3test.Open(t, o), "")
	o.Prefix = "pre/fix/"
	wantGood(t, s3test.Open(t, o), "", "keys of 1024")
}

func TestS3Missing(t *testing.T) {
	o := s3test.Bucket(t)
	p := s3fault.New(t, o.Endpoint)
	o.Endpoint = p.URL()
	s := s3test.Open(t, o)
	strip := func(header string) s3fault.Action {
		return s3fault.StripRequest(header, o.AccessKeyID, string(o.SecretAccessKey))
	}
	p.Plan(s3fault.Rule{Op: s3fault.PutObject, Times: -1, Action: strip("If-None-Match")})
	_, err := probe.Light(t.Context(), s, "")
	p.MustHaveFired(t)
	if !errors.Is(err, probe.ErrMissing) || !strings.Contains(err.Error(), "If-None-Match") {
		t.Errorf("err = %v", err)
	}
	p.Plan(s3fault.Rule{Op: s3fault.GetObject, Times: -1, Action: strip("Range")})
	if _, err := probe.Light(t.Context(), s, ""); err == nil || !strings.Contains(err.Error(), "ranges") {
		t.Errorf("without ranges: err = %v", err)
	}
	p.MustHaveFired(t)
	for _, c := range []struct {
		op   s3fault.Op
		name string
		want probe.Features
	}{
		{s3fault.CopyObject, "conditional copy", probe.Features{MultipartCopy: true}},
		{s3fault.UploadPartCopy, "multipart copy", probe.Features{ConditionalCopy: true}},
	} {
		p.Plan(s3fault.Rule{Op: c.op, Times: -1, Action: strip("X-Amz-Copy-Source-If-Match")})
		report, err := probe.Light(t.Context(), s, "")
		if err != nil || report.Features() != c.want {
			t.Errorf("%s without a condition: %+v, %v, want %+v", c.op, report.Features(), err, c.want)
		}
		for _, check := range report.Checks {
			if check.OK == (check.Name == c.name) || !check.OK && !strings.Contains(check.Detail, "x-amz-copy-source-if-match") {
				t.Errorf("%s without a condition: %+v", c.op, check)
			}
		}
		p.MustHaveFired(t)
	}
	p.Plan(s3fault.Rule{Times: -1, Action: s3fault.Status(403, "AccessDenied")})
	if _, err := probe.Run(t.Context(), s, ""); !errors.Is(err, object.ErrDenied) || errors.Is(err, probe.ErrMissing) {
		t.Errorf("denied: err = %v", err)
	}
	p.Plan()
	for info, err := range s.List(t.Context(), "") {
		t.Errorf("left: %v %v", info.Key, err)
	}
}

// TestS3RefusedCopy makes a server refuse the copies of a probe temporarily: the features
// are then unknown.
func TestS3RefusedCopy(t *testing.T) {
	o := s3test.Bucket(t)
	p := s3fault.New(t, o.Endpoint)
	o.Endpoint = p.URL()
	s := s3test.Open(t, o)
	for code, status := range map[string]int{
		"RequestTimeTooSkewed": 403, "NoSuchBucket": 404, "ExpiredToken": 400, "TemporaryRedirect": 307,
	} {
		p.Plan(s3fault.Rule{Op: s3fault.CopyObject, Times: -1, Action: s3fault.Status(status, code)})
		report, err := probe.Copies(t.Context(), s, "")
		if err != nil {
			t.Fatal(err)
		}
		if report.UnknownCopy() == nil || report.Decided() {
			t.Errorf("%s: features %+v are known", code, report.Features())
		}
		p.MustHaveFired(t)
	}
}
