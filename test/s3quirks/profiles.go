package s3quirks

import (
	"net/http"
	"regexp"
	"time"

	"github.com/snapshotd/snapshotd/test/s3fault"
)

// Profile is a set of habits that users of a kind of store have reported. It is a
// model for tests, not a statement about any release of the store it is named for.
type Profile struct {
	Name   string
	Habits func() []Habit // fresh ones, for some have state
	// Path is what the endpoint's address ends in, empty or with a leading slash.
	Path string
	// Unfit is part of the message with which the probe refuses the store. Empty:
	// snapshotd runs on it and the conformance suite passes but for Broken.
	Unfit string
	// Broken names the tests of the suite whose promise does not hold.
	Broken []string
}

// Profiles are those that the tests and docs/s3.md know.
var Profiles = []Profile{
	{Name: "AWS", Habits: func() []Habit { return []Habit{Versioned()} }},
	{Name: "R2", Habits: func() []Habit {
		return []Habit{
			RatePerKey(4 * time.Millisecond), // in place of a second, so that the suite ends
			RefusesTags(http.StatusNotImplemented, "NotImplemented"),
		}
	}},
	{Name: "GCS XML", Habits: func() []Habit {
		return []Habit{RewritesAcceptEncoding(), Lacks(s3fault.DeleteObjects)}
	}},
	{Name: "GCS XML without conditions", Unfit: "conditional create", Habits: func() []Habit {
		return []Habit{RewritesAcceptEncoding(), Ignores("If-None-Match")}
	}},
	{Name: "MinIO", Habits: func() []Habit {
		return []Habit{Ignores("If-None-Match", s3fault.CopyObject), Ignores("If-Match", s3fault.DeleteObject)}
	}},
	{Name: "Ceph", Habits: func() []Habit { return []Habit{OtherETags(), WantsContentMD5("InvalidRequest")} }},
	{Name: "HCP", Habits: func() []Habit {
		return []Habit{
			WantsContentMD5("MissingContentMD5"), Answers(s3fault.DeleteObject, http.StatusOK),
			Answers(s3fault.AbortMultipartUpload, http.StatusOK), Lacks(s3fault.ListMultipartUploads),
		}
	}},
	{
		Name: "Supabase", Path: "/storage/v1/s3", Broken: []string{"ListOrder", "ListPrefix", "CopyKeys", "ValidKeys"},
		Habits: func() []Habit {
			return []Habit{UnderPath("/storage/v1/s3"), TakesKeys(regexp.MustCompile(`^[\w/!.*'() &$@=;:+,?-]*$`))}
		},
	},
	{Name: "gateway with other ETags in lists", Unfit: "list after write and delete", Habits: func() []Habit {
		return []Habit{ListsOtherETags()}
	}},
	{Name: "gateway that lists a plus as a space", Unfit: "list in key order", Habits: func() []Habit {
		return []Habit{ListsPlus()}
	}},
	{Name: "gateway that loses deletes", Unfit: "delete of many", Habits: func() []Habit {
		return []Habit{LosesDeletes(regexp.MustCompile(`[+&]`))}
	}},
	{Name: "old gateway", Unfit: "list in key order", Habits: func() []Habit { return []Habit{UnorderedLists()} }},
}
