package refs

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"

	"github.com/snapshotd/snapshotd/internal/store/object"
)

// MaxHolders is the number of holders that an answer names.
const MaxHolders = 8

// Holder is a snapshot that holds a unit.
type Holder struct {
	ID   int64
	Name string // empty while it is being created
}

// Query is what a unit may be held by.
type Query struct {
	Segment, Build int64            // one of them, the other 0
	Files          iter.Seq[uint64] // hashes of its files that a snapshot may have as foreign ones; nil: none
	// RemovedAt is the revision at which files were removed from Segment, which is
	// live: a snapshot that began later has the segment without them. 0: the unit is
	// the whole segment or build.
	RemovedAt int64
	// History is that of the metadata store. A snapshot of another history, or of an
	// unknown one, holds the files wherever it has the segment.
	History int64
}

// excludes reports whether the snapshot certainly does not have the files that were
// removed from its segment: it began later, in the same history.
func (q *Query) excludes(e *entry) bool {
	return q.RemovedAt > 0 && e.history > 0 && e.history == q.History && e.began > q.RemovedAt
}

// Ready waits, for LoadWait at most, until the index has all references of a
// collection at a revision or later. generation is that of the collection at this
// revision. It is the revision of the latest commit, and the index waits for the event of
// that commit, because an etcd that is too old reports progress before events. The error
// is ErrLoading or ErrUnreadable when the index cannot answer.
func (x *Index) Ready(ctx context.Context, id, revision, generation int64) error {
	ctx, cancel := context.WithTimeout(ctx, x.o.LoadWait)
	defer cancel()
	if at := x.follower.Revision(); at < revision {
		if _, err := x.follower.Sync(ctx); err != nil {
			return asLoadingErr(ctx, err)
		}
	}
	x.addWaiter(id, 1)
	defer x.addWaiter(id, -1)
	for {
		x.mu.Lock()
		err, changed := x.checkComplete(id), x.changed
		if err == nil && x.received < generation {
			err = fmt.Errorf("%w: the commit at revision %d is not received", ErrLoading, generation)
		}
		x.mu.Unlock()
		if !errors.Is(err, ErrLoading) || errors.Is(err, errNoAnswer) {
			return err
		}
		select {
		case <-ctx.Done():
			return asLoadingErr(ctx, err)
		case <-changed:
		}
	}
}

// addWaiter counts the calls that wait for a collection.
func (x *Index) addWaiter(id int64, n int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.awaited[id] += n; x.awaited[id] == 0 {
		delete(x.awaited, id)
	}
}

// Known is Ready at the revision of the index, without waiting.
func (x *Index) Known(id int64) error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.checkComplete(id)
}

// Has reports whether a committed snapshot is known.
func (x *Index) Has(snapshot int64) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.snapshots[snapshot] != nil
}

// asLoadingErr turns the end of LoadWait into ErrLoading.
func asLoadingErr(ctx context.Context, err error) error {
	if errors.Is(context.Cause(ctx), context.DeadlineExceeded) && !errors.Is(err, ErrLoading) {
		return fmt.Errorf("%w: %w", ErrLoading, err)
	}
	return err
}

// checkComplete returns an error unless all references of a collection are known. The
// lock must be held.
func (x *Index) checkComplete(id int64) error {
	for key, text := range x.unparseable {
		return fmt.Errorf("%w: record %s: %s", ErrUnreadable, key, text)
	}
	if err := x.checkLegacy(id); err != nil {
		return err
	}
	c := x.collections[id]
	if c == nil || len(c.missing) == 0 {
		return nil
	}
	var silent error
	for _, e := range c.entries {
		switch {
		case e.err == nil:
		case storeUnavailable(e.err):
			silent = fmt.Errorf(
				"%w (%w): snapshot %q (%d): %w; nothing of collection %d is reclaimed until the store answers",
				ErrLoading, errNoAnswer, e.name, e.id, clientError(e.err), id)
		default:
			return fmt.Errorf(
				"%w: snapshot %q (%d): %w; nothing of collection %d is reclaimed until it can be read or is dropped",
				ErrUnreadable, e.name, e.id, clientError(e.err), id)
		}
	}
	if silent != nil {
		return silent
	}
	return fmt.Errorf("%w: of %d snapshots of collection %d", ErrLoading, len(c.missing), id)
}

// checkLegacy returns an error unless the references of all snapshots of earlier
// releases in collections other than id are known. The lock must be held.
func (x *Index) checkLegacy(id int64) error {
	n := 0
	var silent error
	for _, e := range x.legacy {
		switch {
		case e.collection == id: // checkComplete covers it
		case e.err != nil && storeUnavailable(e.err):
			silent = fmt.Errorf(
				"%w (%w): snapshot %q (%d), of an earlier release: %w; nothing is reclaimed until the store answers",
				ErrLoading, errNoAnswer, e.name, e.id, clientError(e.err))
		case e.err != nil:
			return fmt.Errorf(
				"%w: snapshot %q (%d), of an earlier release: %w; nothing is reclaimed until it can be read or is dropped",
				ErrUnreadable, e.name, e.id, clientError(e.err))
		default:
			n++
		}
	}
	if silent != nil {
		return silent
	}
	if n > 0 {
		return fmt.Errorf("%w: of %d snapshots of an earlier release", ErrLoading, n)
	}
	return nil
}

// errNoAnswer accompanies an ErrLoading that a call does not wait for: the store has
// not answered for a while.
var errNoAnswer = errors.New("the store does not answer")

// clientError returns the part of err for callers. The text of a store may contain
// addresses; the log has it.
func clientError(err error) error {
	for _, class := range []error{object.ErrUnavailable, object.ErrFull, object.ErrDenied, object.ErrMisconfigured} {
		if errors.Is(err, class) {
			return class
		}
	}
	return err
}

// Holders returns the newest MaxHolders snapshots of a collection that hold q, newest
// first, and the number of all. The index must be ready. A file that a snapshot of
// another collection has as a foreign one is held by a holder without a name. The
// index need not be ready for those, and no transaction compares them: a file should
// be of one collection only.
func (x *Index) Holders(id int64, q Query) (list []Holder, total int) {
	x.mu.Lock()
	defer x.mu.Unlock()
	// A snapshot of an earlier release may have the segment or build in another
	// collection. One of this collection counts below as well.
	foreign := x.legacyRefs.of(q) > 0 || q.hasFile(len(x.foreign), func(hash uint64) bool { return x.foreign[hash] > 0 })
	c := x.collections[id]
	if c == nil {
		if foreign {
			total = 1
		}
		return nil, total
	}
	count := c.counts.of(q)
	if count == 0 && !foreign {
		return nil, 0
	}
	known := count // the total, unless each snapshot must be examined
	if q.RemovedAt > 0 {
		known = 0
	}
	if !foreign {
		q.Files = nil // no snapshot has one
	}
	for _, e := range c.entries {
		if e.refs == nil || !e.holds(q) {
			continue
		}
		if total++; total <= MaxHolders {
			list = append(list, Holder{ID: e.id, Name: e.name})
		} else if !foreign && known > 0 {
			break // the count has the rest
		}
	}
	if foreign {
		total = max(total, 1)
	}
	// A count that is still being subtracted holds until the end of that.
	return list, max(total, known)
}

// Count returns the number of a collection's snapshots that hold q by its segment or
// build. For files that were removed from a segment it examines each snapshot.
func (x *Index) Count(id int64, q Query) int {
	x.mu.Lock()
	defer x.mu.Unlock()
	c := x.collections[id]
	if c == nil {
		return 0
	}
	n := c.counts.of(q)
	if n == 0 || q.RemovedAt == 0 {
		return n
	}
	n = 0
	for _, e := range c.entries {
		if e.refs != nil && e.holdsByID(&q) {
			n++
		}
	}
	return n
}

// Holds reports whether Count is positive, and stops at the first holder.
func (x *Index) Holds(id int64, q Query) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	c := x.collections[id]
	if c == nil || c.counts.of(q) == 0 {
		return false
	}
	return q.RemovedAt == 0 ||
		slices.ContainsFunc(c.entries, func(e *entry) bool { return e.refs != nil && e.holdsByID(&q) })
}

// holdsByID reports whether the snapshot holds q by its segment or build.
func (e *entry) holdsByID(q *Query) bool {
	if q.Build != 0 && e.refs.builds.has(q.Build) {
		return true
	}
	return q.Segment != 0 && !q.excludes(e) && e.refs.segments.has(q.Segment)
}

func (e *entry) holds(q Query) bool {
	if e.holdsByID(&q) {
		return true
	}
	return q.hasFile(len(e.refs.files), func(hash uint64) bool {
		_, found := slices.BinarySearch(e.refs.files, hash)
		return found
	})
}

// hasFile reports whether one of the query's files is among n files. Hashing is the
// expensive part, and n is mostly 0.
func (q *Query) hasFile(n int, among func(hash uint64) bool) bool {
	if n == 0 || q.Files == nil {
		return false
	}
	for hash := range q.Files {
		if among(hash) {
			return true
		}
	}
	return false
}

// Stats is the state of an index, for metrics.
type Stats struct {
	Snapshots  int // with known references
	Loading    int // with references that are being read
	Unreadable int // with unreadable references, which block their collections
	Segments   int // referenced, each counted once per collection
	Builds     int // likewise
}

// Stats returns the state of the index.
func (x *Index) Stats() Stats {
	x.mu.Lock()
	defer x.mu.Unlock()
	s := Stats{Unreadable: len(x.unparseable)}
	for _, e := range x.snapshots {
		switch {
		case e.err != nil:
			s.Unreadable++
		case e.refs != nil:
			s.Snapshots++
		default:
			s.Loading++
		}
	}
	for _, c := range x.collections {
		s.Segments += c.counts.segments.ids
		s.Builds += c.counts.builds.ids
	}
	return s
}
