//go:build !short && linux

package s3quirks_test

import (
	"errors"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/objecttest"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/s3quirks"
	"github.com/snapshotd/snapshotd/test/s3test"
)

// bucket opens an empty bucket on a server of the profile.
func bucket(t *testing.T, p s3quirks.Profile) *s3.Store {
	t.Helper()
	o := s3test.Bucket(t)
	o.Endpoint = s3quirks.New(t, o.Endpoint, p.Quirks()...).URL() + p.Path
	return s3test.Open(t, o)
}

// TestProfiles runs the conformance suite on each supported profile. On the others
// the light probe fails with the name of the check.
func TestProfiles(t *testing.T) {
	for _, p := range s3quirks.Profiles {
		t.Run(p.Name, func(t *testing.T) {
			report, err := probe.Light(t.Context(), bucket(t, p), "")
			if p.Unfit != "" {
				definite := errors.Is(err, probe.ErrMissing) || errors.Is(err, object.ErrMisconfigured)
				if !definite || !strings.Contains(err.Error(), p.Unfit) {
					t.Fatalf("the probe returns %v, want a definite error with %q", err, p.Unfit)
				}
				return
			}
			if err != nil {
				t.Fatalf("the probe fails: %v", err)
			}
			if f := report.Features(); !f.ConditionalCopy {
				t.Errorf("features: %+v, want conditional copies", f)
			}
			objecttest.RunExcept(t, func(t *testing.T) object.Store { return bucket(t, p) }, p.Broken...)
		})
	}
}

// TestCopyWithRefusedTags copies an object with tags in parts, on servers without
// tags: the copy has no tags.
func TestCopyWithRefusedTags(t *testing.T) {
	for _, c := range []struct {
		status int
		code   string
	}{
		{http.StatusNotImplemented, "NotImplemented"},
		{http.StatusForbidden, "AccessDenied"},
		{http.StatusBadRequest, "InvalidArgument"},
	} {
		t.Run(c.code, func(t *testing.T) {
			o := s3test.Bucket(t)
			s3test.Shared(t).PutTagged(t, o.Bucket, "from", "body", "a=b")
			o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.RefusesTags(c.status, c.code)).URL()
			s := s3test.Open(t, o)
			from, err := s.Head(t.Context(), "from")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Copy(t.Context(), object.CopyRequest{
				From: "from", To: "to", SourceETag: from.ETag, Size: from.Size, Parts: object.CopyParts{Threshold: 1},
			}); err != nil {
				t.Fatalf("copy: %v", err)
			}
			if n, err := s.AbortUploads(t.Context(), "", time.Time{}); err != nil || n != 0 {
				t.Errorf("%d uploads are open, err = %v", n, err)
			}
		})
	}
}

// TestProbeOfUnusualSources probes a server that misreads the names of unusual
// sources. The probe reports it and accepts the store: usual keys can be copied.
func TestProbeOfUnusualSources(t *testing.T) {
	o := s3test.Bucket(t)
	o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.DecodesSourceTwice()).URL()
	report, err := probe.Run(t.Context(), s3test.Open(t, o), "")
	if err != nil || !report.Features().ConditionalCopy {
		t.Fatalf("%+v, err = %v", report.Features(), err)
	}
	for _, c := range report.Checks {
		if unusual := c.Name == "copy of unusual keys"; c.OK == unusual || unusual && !strings.Contains(c.Detail, "another") {
			t.Errorf("%+v", c)
		}
	}
}

// TestProbeOfRestrictedKeys probes a store that rejects some characters in keys: the
// probe accepts the store and reports the rejected keys.
func TestProbeOfRestrictedKeys(t *testing.T) {
	i := slices.IndexFunc(s3quirks.Profiles, func(p s3quirks.Profile) bool { return p.Name == "Supabase" })
	report, err := probe.Run(t.Context(), bucket(t, s3quirks.Profiles[i]), "")
	if err != nil {
		t.Fatal(err)
	}
	reported := 0
	for _, c := range report.Checks {
		if strings.Contains(c.Detail, "refuses some characters") {
			reported++
		}
	}
	if reported < 2 {
		t.Errorf("the report lacks the rejected keys: %+v", report)
	}
}

// TestProfilesAreDocumented compares the table in docs/s3.md with the profiles: one
// row for each, and the failed check of each unfit one.
func TestProfilesAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/s3.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(doc), "\n| profile |")
	table, _, ends := strings.Cut(table, "\n\n")
	if !found || !ends {
		t.Fatal("docs/s3.md has no table of profiles")
	}
	rows := map[string][]string{}
	for _, line := range strings.Split(table, "\n")[2:] {
		cells := strings.Split(strings.Trim(line, "| "), " | ")
		if len(cells) != 5 {
			t.Errorf("%d columns: %s", len(cells), line)
			continue
		}
		rows[cells[0]] = cells
	}
	for _, p := range s3quirks.Profiles {
		cells := rows[p.Name]
		if cells == nil {
			t.Errorf("no row for profile %q", p.Name)
			continue
		}
		delete(rows, p.Name)
		works, fails := cells[3], cells[4]
		switch check, why, _ := strings.Cut(fails, ":"); {
		case p.Unfit == "" && fails != "-", p.Unfit != "" && (check != p.Unfit || strings.TrimSpace(why) == ""):
			t.Errorf("%s: the table has the failure %q, the profile %q", p.Name, fails, p.Unfit)
		case (p.Unfit == "") == (works == "-"):
			t.Errorf("%s: the table has %q as working", p.Name, works)
		case len(p.Broken) > 0 && works == "all":
			t.Errorf("%s: the table has all as working, but %v fail", p.Name, p.Broken)
		case p.Path != "" && !strings.Contains(cells[2], p.Path):
			t.Errorf("%s: the table lacks the path %s", p.Name, p.Path)
		}
	}
	for name := range rows {
		t.Errorf("a row for the unknown profile %q", name)
	}
}

// TestETagsThatAreNoMD5s runs the suite on a store whose ETags have the form of an
// MD5 and are none: the condition still rejects a copy of another version.
func TestETagsThatAreNoMD5s(t *testing.T) {
	o := s3test.Bucket(t)
	o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.OwnETags()).URL()
	s := s3test.Open(t, o)
	report, err := probe.Run(t.Context(), s, "")
	if want := (probe.Features{ConditionalCopy: true, MultipartCopy: true}); err != nil || report.Features() != want {
		t.Fatalf("%+v, err = %v", report, err)
	}
	objecttest.RunExcept(t, func(t *testing.T) object.Store {
		o := s3test.Bucket(t)
		o.Endpoint = s3quirks.New(t, o.Endpoint, s3quirks.OwnETags()).URL()
		return s3test.Open(t, o)
	}, "Copy") // the ETag of a copy differs from that of its source
}
