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
// others may pass: the task is tried again, up to the cap. A class by which a store
// refuses gives the job up at once unless [object.IsPassing] holds.
var failureClasses = []struct {
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
//	refused            a refusal   later; refusals in a row for RefusalTimeout give the
//	                               job up by the reason of the refusal
//	not answered       a wait      later; waits in a row for StallTimeout, in which
//	                               no task of the job has finished a file that none
//	                               of its attempts had before, give it up: STALLED
//	worker dies        neither     at once; 200 give the job up
//
// Waits are compared by the times that their records have, not with now: a job that
// gets no worker does not stall. Preparing waits in the same way, for as long as one
// leader leads. Rolling back, publishing and forgetting are tried for ever.

// # Refusals
//
// A refusal that may pass ([object.IsPassing]) says nothing of the snapshot or the
// target. It follows a list of the target's places that the store answered, in phase
// prepare, so the store contradicts itself when it says that the bucket does not
// exist or that the credentials have no right.
//
//	                 refused, may pass
//	refusals 0 ----------------------------> 1, 2, ...  PENDING, with a pause
//	    ^                                        |  |
//	    |  a file more was finished, another     |  |  the pauses in a row add up to
//	    |  answer, no answer                     |  |  RefusalTimeout
//	    +----------------------------------------+  +--> FAILED, and so the job
//
// The task's record counts the refusals in a row, and each refusal has its pause. So
// the time for which a task was refused is the sum of these pauses, which the leader
// measures by its elapsed time. No two clocks are compared: a refusal may be due to a
// clock that is wrong, and being set.
//
//	worker dies              the next attempt goes on with the record's count
//	leader dies              the next leader waits for the whole pause of the record
//	a file of many is        the attempt copies the others, up to maxRefused refusals;
//	refused                  from then on no file more is finished, and the pauses
//	                         add up
//	refused, then no answer  the count starts again; waits in a row go on, and end
//	                         the job after StallTimeout
//	prepare is refused       the leader measures it in memory, from the first refusal
//	                         in a row on; the next leader starts again
//	roll back is refused     it is tried for ever
//
// A refusal at the admission, and in a plan, is the answer of that call.

// maxPauseTime is the longest pause between two attempts of a task.
const maxPauseTime = time.Minute

// pauseAfter is how long a task waits after so many failures, or waits in a row.
func pauseAfter(n uint32) time.Duration { return min(maxPauseTime, 100*time.Millisecond<<min(n, 10)) }

// refusedFor is for how long a task has waited, at least, that was refused so often in
// a row: the pauses behind all refusals but the last.
func refusedFor(refusals uint32) (d time.Duration) {
	for n := uint32(1); n < refusals; n++ {
		d += pauseAfter(n)
	}
	return d
}

// isRefused says whether a store refused, in a way that may pass.
func isRefused(err error) bool {
	return object.IsPassing(err) && (errors.Is(err, object.ErrDenied) || errors.Is(err, object.ErrMisconfigured))
}

// isUnanswered says whether a store gave no answer, or none of use.
func isUnanswered(err error) bool {
	for _, c := range failureClasses {
		if errors.Is(err, c.err) {
			return false
		}
	}
	return errors.Is(err, object.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || meta.Unusable(err)
}

// classify returns the reason by which err gives the job up, and true; or a
// reason for people, and false when it may pass. It is told whether it was the
// last try; of a refusal, whether the refusal timeout is over.
func classify(err error, last bool) (reason string, permanent bool) {
	for _, c := range failureClasses {
		if errors.Is(err, c.err) {
			return c.reason, last || !c.last && !isRefused(err)
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
