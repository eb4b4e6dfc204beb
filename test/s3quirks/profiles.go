package s3quirks

import (
	"net/http"
	"regexp"
	"time"

	"github.com/snapshotd/snapshotd/test/s3fault"
)

// Profile is a set of reported quirks of a kind of store. It is a model for tests,
// not a statement about a release of the store in its name.
type Profile struct {
	Name   string
	Quirks func() []Quirk // new ones per server: some have state
	// Path is the path of the endpoint, empty or with a leading slash.
	Path string
	// Unfit is part of the error of the probe. It is empty if snapshotd supports the
	// store and the conformance suite passes except for Broken.
	Unfit string
	// Broken names the tests of the suite that fail.
	Broken []string
}

// Profiles are the profiles of the tests and of docs/s3.md.
var Profiles = []Profile{
	{Name: "AWS", Quirks: func() []Quirk { return []Quirk{Versioned()} }},
	{Name: "R2", Quirks: func() []Quirk {
		return []Quirk{
			RatePerKey(4 * time.Millisecond), // shorter than the real second, for a short suite
			RefusesTags(http.StatusNotImplemented, "NotImplemented"),
		}
	}},
	{Name: "GCS XML", Quirks: func() []Quirk {
		return []Quirk{RewritesAcceptEncoding(), Lacks(s3fault.DeleteObjects)}
	}},
	{Name: "GCS XML without conditions", Unfit: "conditional create", Quirks: func() []Quirk {
		return []Quirk{RewritesAcceptEncoding(), Ignores("If-None-Match")}
	}},
	{Name: "MinIO", Quirks: func() []Quirk {
		return []Quirk{Ignores("If-None-Match", s3fault.CopyObject), Ignores("If-Match", s3fault.DeleteObject)}
	}},
	{Name: "Ceph", Quirks: func() []Quirk { return []Quirk{OtherETags(), RequiresContentMD5("InvalidRequest")} }},
	{Name: "HCP", Quirks: func() []Quirk {
		return []Quirk{
			RequiresContentMD5("MissingContentMD5"), RespondsWith(s3fault.DeleteObject, http.StatusOK),
			RespondsWith(s3fault.AbortMultipartUpload, http.StatusOK), Lacks(s3fault.ListMultipartUploads),
		}
	}},
	{
		Name: "Supabase", Path: "/storage/v1/s3", Broken: []string{"ListOrder", "ListPrefix", "CopyKeys", "ValidKeys"},
		Quirks: func() []Quirk {
			return []Quirk{UnderPath("/storage/v1/s3"), AllowsKeys(regexp.MustCompile(`^[\w/!.*'() &$@=;:+,?-]*$`))}
		},
	},
	{Name: "gateway with other ETags in lists", Unfit: "list after write and delete", Quirks: func() []Quirk {
		return []Quirk{ListsOtherETags()}
	}},
	{Name: "gateway that lists a plus as a space", Unfit: "list in key order", Quirks: func() []Quirk {
		return []Quirk{ListsPlus()}
	}},
	{Name: "gateway that loses deletes", Unfit: "delete of many", Quirks: func() []Quirk {
		return []Quirk{LosesDeletes(regexp.MustCompile(`[+&]`))}
	}},
	{Name: "old gateway", Unfit: "list in key order", Quirks: func() []Quirk { return []Quirk{UnorderedLists()} }},
}
