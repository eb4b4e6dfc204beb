//go:build !short && linux

package s3quirks_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/internal/testing/s3test"
	"github.com/snapshotd/snapshotd/test/s3quirks"
)

// bucket makes an empty bucket on a server of the profile.
func bucket(t *testing.T, p s3quirks.Profile) *s3.Store {
	t.Helper()
	o := s3test.Bucket(t)
	o.Endpoint = s3quirks.New(t, o.Endpoint, p.Habits()...).URL() + p.Path
	return s3test.Open(t, o)
}

// TestProfiles runs the conformance suite on each profile that snapshotd runs on.
// On the others the light probe of a start refuses the store and names the check.
func TestProfiles(t *testing.T) {
	for _, p := range s3quirks.Profiles {
		t.Run(p.Name, func(t *testing.T) {
			report, err := probe.Light(t.Context(), bucket(t, p), "")
			if p.Unfit != "" {
				definite := errors.Is(err, probe.ErrMissing) || errors.Is(err, object.ErrMisconfigured)
				if !definite || !strings.Contains(err.Error(), p.Unfit) {
					t.Fatalf("the probe says %v, want a definite error that names %q", err, p.Unfit)
				}
				return
			}
			if err != nil {
				t.Fatalf("the probe refuses the store: %v", err)
			}
			if f := report.Features(); !f.ConditionalCopy {
				t.Errorf("features: %+v, want conditional copies", f)
			}
			objecttest.Run(t, func(t *testing.T) object.Store { return bucket(t, p) })
		})
	}
}
