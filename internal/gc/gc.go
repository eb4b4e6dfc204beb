// Package gc decides what may be deleted: it knows what snapshots reference, and
// grants the deletion of what none of them needs.
//
// # Words
//
//	unit        what is deleted as a whole: a dropped segment, an index build
//	            that was replaced or removed, or files that were taken from a
//	            living segment. A unit is held by its index build's id if it is
//	            one, else by its segment's. Files of a living segment are not
//	            held by a snapshot that began after they were taken: see below
//	reference   an id or file that a committed snapshot has in its refs.avro
//	grant       the decision that a unit is deleted; it is never taken back
//	tombstone   a unit that was granted and whose deletion is not confirmed
//	generation  the revision of /gc/gen/<collection>, which every commit of a
//	            snapshot moves
//	deleter     who deletes a granted unit's files: snapshotd, or the caller
//	own file    a file that lies at the place of the unit's segment, see package
//	            catalog. Only own files are deleted with a unit
//
// # States of a unit
//
//	         swap, drop (catalog)         grant                   confirm
//	live ------------------------> unit ---------> tombstone ---------------> gone
//	/catalog/segment/…             /catalog/unit/…   /gc/tomb/…    all files deleted
//
// A segment of a collection that was dropped, which nobody changes any more, is a
// unit where it lies, and goes from there to its tombstone.
//
// # Transactions
//
//	read     at one revision: generation, pending keys of the collection, the
//	         units, their tombstones, the history of the metadata store. The references are looked at after that,
//	         in an index that is at that revision or beyond
//	grant    compares: generation as read; no pending key, or only such as are
//	         younger than every unit's drop; each unit as read, and no tombstone
//	         of it; of a segment of a dropped collection no unit; no /behind
//	         puts: tombstones with the units' records; deletes: the units
//	confirm  (all files are deleted) compares: tombstone as read; when snapshotd
//	         is the deleter, leader's election key
//	         deletes: tombstone, the key that leads to it from its segment, and the
//	         claims to the ids of which it was the last record; puts: that these are
//	         gone. A full store takes the deletes of tombstones alone: then the claims
//	         stay, and keep the ids
//
// # Why a granted unit is not needed
//
// A snapshot captures at a revision at or after the one that put its pending
// key. When that is before the unit's drop, either the pending key is still
// there, and there is no grant; or the snapshot was committed, and moved the
// generation: before the read, so that the index has its references; or after
// it, so that the compare fails; or it was given up and will never commit. When
// the capture is after the drop, it does not see the unit. References of a
// snapshot only go when it is dropped, which is final.
//
// # Files of a living segment
//
// References hold segments, not files. A snapshot does not hold a unit of files that
// were taken from a living segment if it began after that: if the create revision of
// its record is greater than that of the unit's record. Its capture comes after its
// begin and does not see the files.
//
// Restoring etcd from a backup does not harm the comparison: both records are in one
// store, and up to a begin its revisions are those that the creator captured from,
// whatever was lost later. A copy of the records into another store would harm it. So
// it counts only for a snapshot whose record has
//
//	the right begin    begin_revision is the create revision of the record
//	the right history  history is that of /epoch, which each recovery raises
//
// Any other snapshot, such as one of an older release, holds the unit if it has the
// segment. The unit's record needs no such fields: a copy of it is younger than the
// original, and a younger unit is held by more snapshots.
//
// # Failures
//
//	references of one snapshot not read yet, or unreadable
//	                       nothing of its collection is granted. They are read
//	                       again and again; the metric and the log tell
//	snapshot record unreadable
//	                       as above; when not even its collection is known,
//	                       nothing at all is granted
//	references of a snapshot of an earlier release not read yet, or unreadable
//	                       nothing at all is granted: in those releases two
//	                       collections could have one segment
//	a compare fails        read and decide anew, a few times; then ErrConflict
//	grant: no answer       UNAVAILABLE; a repeat finds the tombstones, or the
//	                       units as they were
//	caller dies            its tombstones are listed and counted for ever; who
//	                       comes after it asks again and gets the same grants
//	deleting replica dies  the next leader goes on; deletes may be repeated, for
//	                       keys are not used twice
//	a delete fails         the tombstone stays and is tried again
package gc

import (
	"context"
	"errors"
	"io"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// Errors that callers tell apart.
var (
	ErrLoading    = errors.New("references are still being read")
	ErrUnreadable = errors.New("references of a snapshot cannot be read")
)

// Options are what a GC needs.
type Options struct {
	KV      meta.KV
	Catalog *catalog.Catalog
	Stores  map[string]object.Store // by alias
	// Problems gets what the leader's loops meet. Default: its own.
	Problems *lasting.Problems
	// SnapshotStore is the alias of the store that the records of parked units go
	// to.
	SnapshotStore string
	Now           func() time.Time
	// Clock judges how long ago a thing was dropped. Nil: one over Now and the
	// store for snapshots.
	Clock *clock.Trusted
	Rand  io.Reader
	Log   *zap.Logger
	// LoadWait is how long a call waits for references that are being read
	// before it ends with ErrLoading. Default 10 s.
	LoadWait time.Duration
	// Interval is between looks at tombstones that nothing asked for, and how
	// long an unreadable reference is left alone. Default 1 min.
	Interval time.Duration
	// Replica is the name of this process, for people.
	Replica string
	// CollectorOff says that the leader makes no rounds and no sweeps.
	CollectorOff bool
	// CollectInterval is between rounds of the leader. Default 1 min.
	CollectInterval time.Duration
	// Tolerance is how long ago a thing must have been dropped before a round
	// takes it: readers may still use it for so long. Default 3 h.
	Tolerance time.Duration
	// MaxShare is the share of a collection in use that one round grants at most.
	// Default 0.5.
	MaxShare float64
	// Rate is how many objects of units are deleted in a second. Default 3000,
	// negative: as many as the store takes.
	Rate int
	// OrphanGrace is how old, by its store's clock, an object without a record must
	// be before a sweep deletes it. Default 24 h.
	OrphanGrace time.Duration
	// SweepInterval is between the leader's sweeps, the first of which is a minute
	// after it began to lead. Default 1 h.
	SweepInterval time.Duration
	// UnconfirmedAfter is the age from which a caller's grant is warned about.
	// Default 1 h.
	UnconfirmedAfter time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
	// Ready is closed once references can be read. Nil: they can.
	Ready <-chan struct{}
}

// GC decides what may be deleted, and deletes it when it leads. It is safe for
// concurrent use. All background work happens inside Run and Lead.
type GC struct {
	o     Options
	kv    meta.KV
	log   *zap.Logger
	refs  *index
	tombs *tombs
	rate  *rate.Limiter // of objects that are deleted

	counters Counters
	swept    lastSweep
	stopped  knownStops
	trouble  atomic.Pointer[string] // of the last pass of deletes; nil: none
	problems problems
	last     atomic.Pointer[Summary] // of the rounds that this process made as the leader
}

// New returns a GC. It answers once Run has begun.
func New(o Options) *GC {
	if o.LoadWait == 0 {
		o.LoadWait = 10 * time.Second
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.CollectInterval == 0 {
		o.CollectInterval = time.Minute
	}
	if o.Tolerance == 0 {
		o.Tolerance = 3 * time.Hour
	}
	if o.MaxShare == 0 {
		o.MaxShare = 0.5
	}
	if o.Rate == 0 {
		o.Rate = 3000
	}
	if o.OrphanGrace == 0 {
		o.OrphanGrace = 24 * time.Hour
	}
	if o.SweepInterval == 0 {
		o.SweepInterval = time.Hour
	}
	if o.UnconfirmedAfter == 0 {
		o.UnconfirmedAfter = time.Hour
	}
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{
			KV: o.KV, Clock: clock.Of(o.Now), Store: o.Stores[o.SnapshotStore], Alias: o.SnapshotStore, Replica: o.Replica, Log: o.Log,
		})
	}
	limit := rate.Inf
	if o.Rate > 0 {
		limit = rate.Limit(o.Rate)
	}
	return &GC{
		o: o, kv: o.KV, log: o.Log, refs: newIndex(&o), tombs: newTombs(&o), rate: rate.NewLimiter(limit, deleteBatch),
		problems: newProblems(&o),
	}
}

// Run keeps the references and the list of tombstones current until ctx ends.
// It must be called once.
func (g *GC) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.refs.run(ctx) })
	group.Go(func() error { return g.tombs.follower.Run(ctx) })
	return group.Wait()
}

// Lead makes rounds and sweeps and deletes what was granted to snapshotd, until
// ctx ends or another leads.
func (g *GC) Lead(ctx context.Context, term election.Term) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.deleteGranted(ctx, term.Fence()) })
	if !g.o.CollectorOff {
		group.Go(func() error { return g.collectLoop(ctx, term.Fence()) })
		group.Go(func() error { return g.sweepLoop(ctx) })
	}
	return group.Wait()
}

// Offer tells what a snapshot references that this replica is about to commit
// with metadata of that digest, so that it need not be read again. The refs must
// not be changed any more.
func (g *GC) Offer(snapshot int64, metadata manifest.Digest, refs *manifest.Refs) {
	g.refs.offer(snapshot, metadata, refs)
}

// Stats is the state of protection, for metrics.
type Stats struct {
	Snapshots   int // whose references are known
	Loading     int // whose references are being read
	Unreadable  int // whose references cannot be read: their collections are blocked
	Segments    int // that are referenced, each counted once per collection
	Builds      int
	Granted     int           // tombstones that snapshotd deletes
	Unconfirmed int           // tombstones that callers delete
	Oldest      time.Duration // age of the oldest of the latter
}

// Stats returns the state of protection as this replica sees it.
func (g *GC) Stats() Stats {
	s := g.refs.stats()
	g.tombs.stats(&s, g.o.Clock.Display())
	return s
}

// LastRound returns what the last round came to that this process made as the
// leader, nil when it has made none.
func (g *GC) LastRound() *Summary { return g.last.Load() }
