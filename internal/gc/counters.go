package gc

import "sync/atomic"

// Reason says why objects were deleted.
type Reason int

// The reasons.
const (
	ByUnit     Reason = iota // a unit was granted
	ByOrphan                 // nothing knew them
	BySnapshot               // they were a snapshot's own
	ByRestore                // they were copies of a restore that did not come to its end
	reasons                  // how many there are
)

// Reasons are all reasons.
func Reasons() []Reason { return []Reason{ByUnit, ByOrphan, BySnapshot, ByRestore} }

// String returns the reason as metrics have it.
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

// Counters count what this process deleted since it started. The zero value is
// ready. It is safe for concurrent use.
type Counters struct {
	of [reasons]struct{ objects, bytes atomic.Int64 }
}

// Add counts objects that the store confirmed as deleted, and their bytes as far
// as they are known. An object that was gone already counts, too: the store does
// not tell.
func (c *Counters) Add(reason Reason, objects, bytes int64) {
	c.of[reason].objects.Add(objects)
	c.of[reason].bytes.Add(bytes)
}

// Of returns what was deleted for a reason.
func (c *Counters) Of(reason Reason) (objects, bytes int64) {
	return c.of[reason].objects.Load(), c.of[reason].bytes.Load()
}

// Counters returns what counts the objects that this process deletes.
func (g *GC) Counters() *Counters { return &g.counters }
