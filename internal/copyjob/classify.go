package copyjob

import (
	"context"
	"errors"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Errors of a copy that will not pass.
var (
	errSourceMissing = errors.New("a file of the snapshot is missing")
	errSourceAltered = errors.New("a file of the snapshot was altered")
	errSourceLayout  = errors.New("a file of the snapshot cannot be compared with its record")
	errNoStore       = errors.New("an object store is not configured here")
	errMapping       = errors.New("the snapshot is not what the job was made for")
)

// classes say which errors of a task give its job up, and by which reason. All
// others may pass: the task is tried again, up to the cap.
var classes = []struct {
	err    error
	reason string
	last   bool // only when it was the last try
}{
	{errSourceMissing, "SOURCE_OBJECT_MISSING", false},
	{errSourceAltered, "SOURCE_OBJECT_ALTERED", false},
	{errSourceLayout, "SOURCE_ETAG_LAYOUT", false},
	{ErrSource, "SNAPSHOT_CORRUPT", false},
	{ErrDigest, "SNAPSHOT_CORRUPT", true},
	{errMapping, "INTERNAL", false},
	{object.ErrFull, "STORE_FULL", true}, // space may be freed in time
	{object.ErrDenied, "OBJECT_STORE_DENIED", false},
	{object.ErrMisconfigured, "OBJECT_STORE_MISCONFIGURED", false},
	{object.ErrInvalidKey, "LAYOUT_REFUSED", false},
	{catalog.ErrLimitExceeded, "LIMIT_EXCEEDED", false},
	{meta.ErrTooLarge, "LIMIT_EXCEEDED", false},
}

// # No answer
//
// That a store does not answer is no failure of a task. An attempt that ends for it
// goes back and is tried later, with pauses of up to a minute, however often, until
// the job's deadline or until it has stalled: attempts have gone unanswered for
// [Options.StallTimeout] and no file of the job was finished in that time. Only
// answers of a store count as failures.
//
//	attempt ends       counts as   next attempt
//	answered, passing  a failure   later; MaxFailures of a task give the job up
//	answered, lasting  a failure   none: the job is given up
//	not answered       a wait      later; waits in a row for StallTimeout, in which
//	                               no task of the job has finished a file that none
//	                               of its attempts had before, give it up: STALLED
//	worker dies        neither     at once; 200 give the job up
//
// Waits are compared by the times that their records have, not with now: a job that
// gets no worker does not stall. Preparing waits in the same way, for as long as one
// leader leads. Rolling back, publishing and forgetting are tried for ever.

// maxPauseTime is the longest pause between two attempts of a task.
const maxPauseTime = time.Minute

// pauseAfter is how long a task waits after so many failures, or waits in a row.
func pauseAfter(n uint32) time.Duration { return min(maxPauseTime, 100*time.Millisecond<<min(n, 10)) }

// isUnanswered says whether a store gave no answer, or none of use.
func isUnanswered(err error) bool {
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return false
		}
	}
	return errors.Is(err, object.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || meta.Unusable(err)
}

// classify returns the reason by which err gives the job up, and true; or a
// reason for people, and false when it may pass. It is told whether it was the
// last try.
func classify(err error, last bool) (reason string, permanent bool) {
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.reason, last || !c.last
		}
	}
	var refused *layout.RefusedError
	switch {
	case errors.As(err, &refused):
		return "LAYOUT_REFUSED", true
	case errors.Is(err, object.ErrUnavailable):
		return "OBJECT_STORE_UNAVAILABLE", false
	case meta.Unusable(err):
		return "METADATA_STORE_UNAVAILABLE", false
	}
	return "TASK_FAILED", false
}
