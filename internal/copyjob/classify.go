package copyjob

import (
	"errors"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/catalog/layout"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Errors of a copy that will not pass.
var (
	errSourceMissing = errors.New("a file of the snapshot is missing")
	errSourceAltered = errors.New("a file of the snapshot was altered")
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
