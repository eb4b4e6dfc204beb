package gc

import "sync/atomic"

// Reason is why objects were deleted.
type Reason int

// The reasons.
const (
	ByUnit     Reason = iota // a unit was granted
	ByOrphan                 // no record has them
	BySnapshot               // a snapshot was deleted
	ByRestore                // a restore was rolled back
	reasons                  // the number of reasons
)

// Reasons are all reasons.
func Reasons() []Reason { return []Reason{ByUnit, ByOrphan, BySnapshot, ByRestore} }

// String returns the label of the reason in metrics.
func (r Reason) String() string {
	switch r {
	case ByUnit:
		return "unit"
	case ByOrphan:
		return "orphan"
	case BySnapshot:
		return "snapshot"
	case ByRestore:
		return "restore"
	default:
		return "unknown"
	}
}

// Counters count the objects that this process has deleted since it started. The zero
// value is ready. It is safe for concurrent use.
type Counters struct {
	reasons [reasons]struct{ objects, bytes atomic.Int64 }
}

// Add counts objects that the store confirmed as deleted, and their bytes as far as
// they are known. An object that was gone already counts too: the store makes no
// difference.
func (c *Counters) Add(reason Reason, objects, bytes int64) {
	c.reasons[reason].objects.Add(objects)
	c.reasons[reason].bytes.Add(bytes)
}

// Of returns the objects and bytes that were deleted for a reason.
func (c *Counters) Of(reason Reason) (objects, bytes int64) {
	return c.reasons[reason].objects.Load(), c.reasons[reason].bytes.Load()
}
