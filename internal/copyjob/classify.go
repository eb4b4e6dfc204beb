package copyjob

import (
	"context"
	"errors"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Errors of a copy. All but errNoStore are permanent: another replica may have the
// store.
var (
	errSourceMissing = errors.New("a file of the snapshot is missing")
	errSourceAltered = errors.New("a file of the snapshot was altered")
	errSourceLayout  = errors.New("a file of the snapshot cannot be compared with its record")
	errNoStore       = errors.New("an object store is not configured here")
	errUnreadable    = errors.New("the snapshot cannot be read")
	errMapping       = errors.New("the snapshot does not match the job")
)

// failureClasses maps errors of a task that give its job up to reasons. All other errors
// may pass: the task is tried again, up to the cap. A refusal by a store gives the job up
// at once unless [object.IsPassing] holds.
var failureClasses = []struct {
	err    error
	reason string
	last   bool // only at the last attempt
}{
	{errSourceMissing, "SOURCE_OBJECT_MISSING", false},
	{errSourceAltered, "SOURCE_OBJECT_ALTERED", false},
	{errSourceLayout, "SOURCE_ETAG_LAYOUT", false},
	{errUnreadable, "SNAPSHOT_CORRUPT", false},
	{snapshot.ErrDigest, "SNAPSHOT_CORRUPT", true},
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
// A store that does not answer is no failure of a task. An attempt that ends for
// this reason is tried again, with pauses of up to a minute and without a limit of
// attempts, until the job's deadline or until it has stalled: attempts were
// unanswered for [Options.StallTimeout], and no file of the job was finished in that
// time. Only answers of a store count as failures.
//
//	attempt ends       counts as   next attempt
//	answered, may pass a failure   later; MaxFailures of a task give the job up
//	answered,          a failure   none: the job is given up
//	permanent
//	refused            a refusal   later; refusals in a row for RefusalTimeout give the
//	                               job up by the reason of the refusal
//	not answered       a wait      later; waits in a row for StallTimeout, in which
//	                               no task of the job has finished a file that none
//	                               of its attempts had before, give it up: STALLED
//	worker dies        neither     at once; 200 give the job up
//
// Waits are compared by the times in their records, not with now: a job without a
// worker does not stall. Prepare waits in the same way, within one leader's term.
// Roll back, publish and forget are tried without a limit.

// # Refusals
//
// A refusal that may pass ([object.IsPassing]) is no evidence about the snapshot or
// the target. In phase prepare the store has answered a list of the target's
// prefixes, so it contradicts itself when it answers that the bucket does not exist
// or that the credentials lack a right.
//
//	                 refused, may pass
//	refusals 0 ----------------------------> 1, 2, ...  PENDING, with a pause
//	    ^                                        |  |
//	    |  one more file finished, another       |  |  the pauses in a row add up to
//	    |  answer, no answer                     |  |  RefusalTimeout
//	    +----------------------------------------+  +--> FAILED, and so the job
//
// The task's record counts the refusals in a row, and each refusal has its pause. The
// time for which a task was refused is the sum of these pauses, which the leader
// measures by its elapsed time. No two clocks are compared: the cause of a refusal may
// be a clock that is wrong and is being set.
//
//	worker dies              the next attempt continues with the record's count
//	leader dies              the next leader waits for the whole pause of the record
//	one file of many is      the attempt copies the others, up to maxRefusedCopies
//	refused                  refusals; from then on no more files are finished, and
//	                         the pauses add up
//	refused, then no answer  the count starts again; waits in a row continue, and end
//	                         the job after StallTimeout
//	prepare is refused       the leader measures the time in memory, from the first
//	                         refusal in a row; the next leader starts again
//	roll back is refused     it is tried without a limit
//
// A refusal at the admission, and in a plan, is the result of that call.

// maxPauseTime is the longest pause between two attempts of a task.
const maxPauseTime = time.Minute

// pauseAfter returns the pause of a task after n failures, or n waits in a row.
func pauseAfter(n uint32) time.Duration { return min(maxPauseTime, 100*time.Millisecond<<min(n, 10)) }

// refusedFor returns the least time that a task waited during consecutive refusals: the
// pauses after all but the last.
func refusedFor(refusals uint32) (d time.Duration) {
	for n := uint32(1); n < refusals; n++ {
		d += pauseAfter(n)
	}
	return d
}

// isRefused reports whether a store refused in a way that may pass.
func isRefused(err error) bool {
	return object.IsPassing(err) && (errors.Is(err, object.ErrDenied) || errors.Is(err, object.ErrMisconfigured))
}

// isUnanswered reports whether a store gave no answer, or an unusable one.
func isUnanswered(err error) bool {
	for _, c := range failureClasses {
		if errors.Is(err, c.err) {
			return false
		}
	}
	return errors.Is(err, object.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || meta.Unusable(err)
}

// classify returns the reason by which err gives the job up, and true; or a reason for
// display, and false when err may pass. last is true at the last attempt; for a refusal,
// after the refusal timeout.
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
