// Package collect reclaims dropped units without a caller: it requests grants for them
// in cycles, and sweeps snapshotd's own prefixes. It also lists the orphans of
// collections and explains single objects.
//
// # A cycle
//
// A cycle costs a scan of the units and of the records of collections, partitions and
// indexes, and no object request; it does not read live segments. For each collection,
// in this order:
//
//	partition, index  the contents of a dropped one are dropped: its segments or
//	                  builds become units. Then its record is removed
//	unit              if it was dropped longer ago than the tolerance and no
//	                  snapshot holds it, it is granted to snapshotd, by the
//	                  transaction of Reclaim. A held one is spilled
//	collection        the segments of one that was dropped longer ago than the
//	                  tolerance are units in place. When nothing is left of it, its
//	                  record is removed
//
// The leader deletes the files of granted units, see [gc.GC.Lead].
//
// A cycle needs no leader: each of its writes compares what it was decided on. So a
// call runs a cycle beside those of the leader.
//
// A cycle that would grant more than a share of a collection in use, from StopUnits
// units on, stops in that collection until an operator decides: an engine's error may
// look like that. A dry run reports each unit that a stop keeps. The units of a dropped
// collection are exempt, for the drop named the collection.
//
// # Failures of a cycle
//
//	one collection's references cannot be read
//	                  the cycle skips the collection
//	one unit's record cannot be read
//	                  the cycle skips the unit
//	process dies      each step is a transaction; the next cycle continues
//	grants outrun deletes
//	                  the tombstones wait, with the bytes that the units had
//
// # Halts
//
// Only the leader knows which of its loops fail, and clients may ask any replica. So
// the leader writes its halts into the record of its last cycle: with each cycle, and
// between cycles when the list has changed. A replica shows them while their writer
// leads.
//
//	report  compares: the leader's election key, no /behind, the record as read
//	        puts: the record with the halts, the cycle as it was
//
//	report: no answer     the next turn compares and writes again
//	leader dies           its list is ignored, since another replica leads, which
//	                      writes its own
//	the list is the same  nothing is written
package collect

import (
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
)

// Options configure a Collector.
type Options struct {
	// Off turns off the cycles and sweeps of the leader.
	Off bool
	// Interval is the time between cycles of the leader. Default 1 min.
	Interval time.Duration
	// Tolerance is the minimum age of a drop before a cycle grants the unit: readers
	// may still use it for that long. Default 3 h.
	Tolerance time.Duration
	// MaxShare is the fraction of a collection in use that one cycle grants at most.
	// Default 0.5.
	MaxShare float64
	// OrphanGrace is the minimum age, by its store's clock, of an object without a
	// record before a sweep deletes it. Default 24 h.
	OrphanGrace time.Duration
	// SweepInterval is the time between the leader's sweeps. The first one starts a
	// minute after it begins to lead. Default 1 h.
	SweepInterval time.Duration
}

// Collector runs cycles and sweeps. It is safe for concurrent use. All background work
// happens inside Lead and ReportHalts.
type Collector struct {
	o              Options
	gc             *gc.GC
	refs           *refs.Index
	kv             meta.KV
	catalog        *catalog.Catalog
	stores         map[string]object.Store // by alias
	clock          *clock.Trusted
	log            *zap.Logger
	replica        string
	reportInterval time.Duration

	all      *lasting.Problems
	problems problems
	stops    loggedStops
	last     atomic.Pointer[Summary] // of the cycles that this process ran as the leader
	swept    lastSweep
}

// problems are those of the leader's loops.
type problems struct {
	cycle, save, report, sweep *lasting.Problem
}

// New returns a Collector over the stores of g.
func New(g *gc.GC, o Options) *Collector {
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.Tolerance == 0 {
		o.Tolerance = 3 * time.Hour
	}
	if o.MaxShare == 0 {
		o.MaxShare = 0.5
	}
	if o.OrphanGrace == 0 {
		o.OrphanGrace = 24 * time.Hour
	}
	if o.SweepInterval == 0 {
		o.SweepInterval = time.Hour
	}
	shared := g.Options()
	add := func(name, text, stops string) *lasting.Problem {
		return shared.Problems.Add(shared.Log, name, text, stops)
	}
	return &Collector{
		o: o, gc: g, refs: g.References(), kv: shared.KV, catalog: shared.Catalog, stores: shared.Stores,
		clock: shared.Clock, log: shared.Log, replica: shared.Replica, reportInterval: shared.Interval / 10,
		all: shared.Problems,
		problems: problems{
			cycle:  add("collect", "gc cycle failed, retrying", "collection of what was dropped"),
			save:   add("note of a round", "gc cycle result not saved", ""),
			report: add("note of halts", "halts not saved", ""),
			sweep:  add("sweep", "sweep failed, retrying with the next one", "deletion of objects without a record"),
		},
	}
}

// LastCycle returns the summary of the last cycle that this process ran as the leader,
// nil without one.
func (c *Collector) LastCycle() *Summary { return c.last.Load() }

// SweepStats is the result of the last sweep of this process, for metrics.
type SweepStats struct {
	SweepSummary
	End   time.Time // zero: there was none yet
	Error string    // empty: none
}

// lastSweep keeps a SweepStats.
type lastSweep struct {
	mu    sync.Mutex
	stats SweepStats
}

// SweepStats returns the result of the last sweep that this process ran as the leader.
func (c *Collector) SweepStats() SweepStats {
	c.swept.mu.Lock()
	defer c.swept.mu.Unlock()
	return c.swept.stats
}

// maxHalts bounds the halts of the record.
const maxHalts = 64

// Halts returns the halts of this process.
func (c *Collector) Halts() []Halt {
	var list []Halt
	for _, s := range c.all.States() {
		if s.Error == "" || s.Stops == "" || len(list) == maxHalts {
			continue
		}
		list = append(list, Halt{
			Name: s.Name, What: s.Stops, Error: record.Clip(s.Error, record.MaxText), Since: s.Since, Replica: c.replica,
			Failures: s.Failed,
		})
	}
	return list
}

// loggedStops are the stops that were logged: a stop is logged when it changes, not in
// each cycle. The zero value is ready. It is safe for concurrent use.
type loggedStops struct {
	mu    sync.Mutex
	stops map[int64]Stop // by collection
}

// update records whether the cycles stop in a collection, and returns true for a new
// or changed stop.
func (l *loggedStops) update(s Stop, stopped bool) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !stopped {
		delete(l.stops, s.Collection)
		return false
	}
	if l.stops[s.Collection] == s {
		return false
	}
	if l.stops == nil {
		l.stops = map[int64]Stop{}
	}
	l.stops[s.Collection] = s
	return true
}
