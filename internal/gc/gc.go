// Package gc decides which units may be deleted: it knows the references of all
// snapshots, and grants the deletion of units without a holder.
//
// # Words
//
//	unit        is deleted as a whole: a dropped segment, an index build that was
//	            replaced or removed, or files that were removed from a live
//	            segment. A unit is held through the id of its index build if it
//	            is one, else through the id of its segment. A snapshot that began
//	            after files were removed from a live segment does not hold them:
//	            see below
//	reference   an id or file in the refs.avro of a committed snapshot
//	grant       the decision that a unit is deleted; it is never revoked
//	tombstone   the record of a unit that was granted and is not confirmed
//	generation  the revision of /gc/gen/<collection>, which every commit of a
//	            snapshot moves
//	deleter     deletes the files of a granted unit: snapshotd, or the caller
//	own file    a file at the place of the unit's segment, see package catalog.
//	            Only own files are deleted with a unit
//
// # States of a unit
//
//	         swap, drop (catalog)         grant                   confirm
//	live ------------------------> unit ---------> tombstone ---------------> gone
//	/catalog/segment/…             /catalog/unit/…   /gc/tomb/…    all files deleted
//
// A segment of a dropped collection never changes any more. It is a unit in place,
// and goes from there to its tombstone.
//
// # Transactions
//
//	read     at one revision: generation, pending keys of the collection, the
//	         units, their tombstones, the history of the metadata store. The
//	         references are examined after that, in an index at that revision or
//	         later
//	grant    compares: generation as read; no pending key, or only keys that are
//	         younger than every unit's drop; each unit as read, and no tombstone
//	         of it; for a segment of a dropped collection no unit; no /behind
//	         puts: tombstones with the units' records; deletes: the units
//	confirm  (all files are deleted) compares: tombstone as read; when snapshotd
//	         is the deleter, leader's election key
//	         deletes: tombstone, the key that leads to it from its segment, and the
//	         claims to the ids of which it was the last record; puts: that these are
//	         gone. A full store accepts only the deletes of tombstones: then the
//	         claims stay, and keep the ids
//
// # A granted unit is not needed
//
// A snapshot captures at a revision at or after the one that put its pending key.
// When that is before the unit's drop, there are three cases. The pending key still
// exists: no grant. Or the snapshot was committed, and moved the generation: before
// the read, so the index has its references, because it waits for the event of the
// generation's own revision; or after it, so the compare fails. Or the create was
// abandoned and will never commit. When the capture is after the drop, it does not see
// the unit. References of a snapshot end only with its drop, which is final.
//
// # Files of a live segment
//
// References name segments, not files. A snapshot does not hold a unit of files that
// were removed from a live segment if it began later: if the create revision of its
// record is greater than that of the unit's record. Its capture comes after its begin
// and does not see the files.
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
// original, and more snapshots hold a younger unit.
//
// # Failures
//
//	references of one snapshot not read yet, or unreadable
//	                       nothing of its collection is granted. They are read
//	                       again and again; the metric and the log report it
//	snapshot record unreadable
//	                       as above; when even its collection is unknown, nothing
//	                       at all is granted
//	references of a snapshot of an earlier release not read yet, or unreadable
//	                       nothing at all is granted: in those releases two
//	                       collections could have one segment
//	a compare fails        read and decide again, a few times; then meta.ErrConflict
//	grant: no answer       UNAVAILABLE; a repeat finds the tombstones, or the
//	                       units as they were
//	caller dies            its tombstones stay listed and counted; a successor
//	                       repeats the call and gets the same grants
//	deleting replica dies  the next leader continues; deletes may be repeated, for
//	                       keys are not used twice
//	a delete fails         the tombstone stays and is tried again
package gc

import (
	"context"
	"io"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"
	"golang.org/x/time/rate"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// deleteBatch is the number of objects in one delete, the maximum of one request of S3.
const deleteBatch = 1000

// Errors of references that are not known.
var (
	ErrLoading    = refs.ErrLoading
	ErrUnreadable = refs.ErrUnreadable
)

// Options configure a GC.
type Options struct {
	KV      meta.KV
	Catalog *catalog.Catalog
	Stores  map[string]object.Store // by alias
	// Problems receives repeated failures. Default: a new list.
	Problems *lasting.Problems
	// SnapshotStore is the alias of the store that gets the records of spilled units.
	SnapshotStore string
	Now           func() time.Time
	// Clock judges ages. Nil: one over Now and the store for snapshots.
	Clock *clock.Trusted
	Rand  io.Reader
	Log   *zap.Logger
	// LoadWait is how long a call waits for references that are being read before it
	// ends with ErrLoading. Default 10 s.
	LoadWait time.Duration
	// Interval is the time between passes over the tombstones, and how long an
	// unreadable reference is left alone. Default 1 min.
	Interval time.Duration
	// Replica is the name of this process.
	Replica string
	// Rate is the number of objects of units that are deleted per second. Default
	// 3000; negative: unlimited.
	Rate int
	// UnconfirmedAfter is the age of a caller's unconfirmed grant above which the
	// log warns. Default 1 h.
	UnconfirmedAfter time.Duration
	// Jitter spreads attempts: numbers in [0, 1). Default that of [meta.Backoff].
	Jitter func() float64
	// Ready is closed once references can be read. Nil: at once.
	Ready <-chan struct{}
}

// GC decides which units may be deleted, and deletes them while it leads. It is safe
// for concurrent use. All background work happens inside Run and Lead.
type GC struct {
	o          Options
	kv         meta.KV
	log        *zap.Logger
	refs       *refs.Index
	tombstones *tombstones
	rate       *rate.Limiter // of deleted objects

	counters    Counters
	deleteError atomic.Pointer[string] // of the last delete pass; nil: none
	deletes     *lasting.Problem
	unconfirmed *lasting.Problem
}

// New returns a GC. It answers once Run has begun.
func New(o Options) *GC {
	if o.LoadWait == 0 {
		o.LoadWait = 10 * time.Second
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.Rate == 0 {
		o.Rate = 3000
	}
	if o.UnconfirmedAfter == 0 {
		o.UnconfirmedAfter = time.Hour
	}
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{
			KV: o.KV, Clock: clock.Of(o.Now), Store: o.Stores[o.SnapshotStore], Alias: o.SnapshotStore,
			Replica: o.Replica, Log: o.Log,
		})
	}
	limit := rate.Inf
	if o.Rate > 0 {
		limit = rate.Limit(o.Rate)
	}
	return &GC{
		o: o, kv: o.KV, log: o.Log, tombstones: newTombstones(&o), rate: rate.NewLimiter(limit, deleteBatch),
		refs: refs.New(refs.Options{
			KV: o.KV, Stores: o.Stores, Now: o.Now, Log: o.Log, LoadWait: o.LoadWait, Interval: o.Interval,
			Jitter: o.Jitter, Ready: o.Ready, Problems: o.Problems,
		}),
		deletes: o.Problems.Add(o.Log, "delete", "delete of granted files failed, retrying",
			"deletion of what was collected"),
		unconfirmed: o.Problems.Add(o.Log, "unconfirmed",
			"granted units are not confirmed; their callers must delete them and call ConfirmReclaimed",
			"deletion of what callers were granted"),
	}
}

// Options returns the options, with their defaults.
func (g *GC) Options() Options { return g.o }

// References returns the index of references.
func (g *GC) References() *refs.Index { return g.refs }

// Run keeps the references and the list of tombstones current until ctx ends.
// It must be called once.
func (g *GC) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.refs.Run(ctx) })
	group.Go(func() error { return g.tombstones.follower.Run(ctx) })
	return group.Wait()
}

// Prime supplies the references of a snapshot that this replica is about to commit
// with metadata of that digest, which saves reading them. r must not change after the
// call.
func (g *GC) Prime(snapshot int64, metadata manifest.Digest, r *manifest.Refs) {
	g.refs.Prime(snapshot, metadata, r)
}

// Stats are counts of references and tombstones, for metrics.
type Stats struct {
	refs.Stats
	Granted     int           // tombstones that snapshotd deletes
	Unconfirmed int           // tombstones that callers delete
	Oldest      time.Duration // age of the oldest tombstone that a caller deletes
}

// Stats returns the counts of this replica.
func (g *GC) Stats() Stats {
	s := Stats{Stats: g.refs.Stats()}
	s.Granted, s.Unconfirmed, s.Oldest = g.tombstones.stats(g.o.Clock.Display())
	return s
}

// Counters returns the counters of the objects that this process deletes.
func (g *GC) Counters() *Counters { return &g.counters }
