// Package gc decides what may be deleted: it knows what snapshots reference, and
// grants the deletion of what none of them needs.
//
// # Words
//
//	unit        what is deleted as a whole: a dropped segment, an index build
//	            that was replaced or removed, or files that were taken from a
//	            living segment. A unit is held by its index build's id if it is
//	            one, else by its segment's
//	reference   an id or file that a committed snapshot has in its refs.avro
//	grant       the decision that a unit is deleted; it is never taken back
//	tombstone   a unit that was granted and whose deletion is not confirmed
//	generation  the revision of /gc/gen/<collection>, which every commit of a
//	            snapshot moves
//	deleter     who deletes a granted unit's files: snapshotd, or the caller
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
//	         units, their tombstones. The references are looked at after that,
//	         in an index that is at that revision or beyond
//	grant    compares: generation as read; no pending key, or only such as are
//	         younger than every unit's drop; each unit as read
//	         puts: tombstones with the units' records; deletes: the units
//	confirm  (all files are deleted) compares: tombstone as read; when snapshotd
//	         is the deleter, leader's election key
//	         deletes: tombstone, and the key that leads to it from its segment
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
// # Failures
//
//	references of one snapshot not read yet, or unreadable
//	                       nothing of its collection is granted. They are read
//	                       again and again; the metric and the log tell
//	snapshot record unreadable
//	                       as above; when not even its collection is known,
//	                       nothing at all is granted
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
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
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
	Now     func() time.Time
	Rand    io.Reader
	Log     *zap.Logger
	// LoadWait is how long a call waits for references that are being read
	// before it ends with ErrLoading. Default 10 s.
	LoadWait time.Duration
	// Interval is between looks at tombstones that nothing asked for, and how
	// long an unreadable reference is left alone. Default 1 min.
	Interval time.Duration
	// UnconfirmedAfter is the age from which a caller's grant is warned about.
	// Default 1 h.
	UnconfirmedAfter time.Duration
}

// GC decides what may be deleted, and deletes it when it leads. It is safe for
// concurrent use. All background work happens inside Run and Lead.
type GC struct {
	o     Options
	kv    meta.KV
	log   *zap.Logger
	refs  *index
	tombs *tombs
}

// New returns a GC. It answers once Run has begun.
func New(o Options) *GC {
	if o.LoadWait == 0 {
		o.LoadWait = 10 * time.Second
	}
	if o.Interval == 0 {
		o.Interval = time.Minute
	}
	if o.UnconfirmedAfter == 0 {
		o.UnconfirmedAfter = time.Hour
	}
	return &GC{o: o, kv: o.KV, log: o.Log, refs: newIndex(&o), tombs: newTombs(&o)}
}

// Run keeps the references and the list of tombstones current until ctx ends.
// It must be called once.
func (g *GC) Run(ctx context.Context) error {
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return g.refs.run(ctx) })
	group.Go(func() error { return g.tombs.follower.Run(ctx) })
	return group.Wait()
}

// Lead deletes what was granted to snapshotd, until ctx ends or another leads.
func (g *GC) Lead(ctx context.Context, term election.Term) error {
	return g.deleteGranted(ctx, term.Fence())
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
	g.tombs.stats(&s, g.o.Now())
	return s
}
