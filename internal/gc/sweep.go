package gc

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # A sweep
//
// An object store cannot be fenced: what a process writes that was thought dead
// may land after everything that knew of it is gone. A sweep finds that. It lists
// snapshotd's own prefixes and asks of each object whether there is a record of
// its id:
//
//	snapshots/<collection>/<id>/<file>  a snapshot's record, in whatever state,
//	                                    readable or not
//	gc/held/<collection>/<unit>[-<digest>]
//	                                    a unit's record, a tombstone, or a segment
//	                                    of its id, likewise
//	gc/restore/<job>/pins-<task>-<part>.json
//	                                    a restore job's record, likewise
//	snapshotd-probe/<probe>/<file>      goes when it is older than a day, by the
//	                                    store's clock: a probe takes minutes at most
//	anything else                       is left alone; names under snapshots/ and
//	                                    gc/ that snapshotd does not write are counted
//
// Ids decide, no clock does. A record is written before the first object of its
// id and goes after the last, and ids never return. So an object whose id was
// handed out and has no record at a revision that is read after the listing that
// showed the object will never have one: it is dead. The records must be read
// after the listing, else a snapshot that begins in between looks dead.
//
// The record of a unit that is not parked keeps the object as well: it may be
// about to be parked, and then that very object, however old, becomes its record.
// Nothing is lost by waiting, for the unit's record goes in the end.
//
// Behind that rule stand three more, each enough to stop a delete:
//
//	grace     by the store's clock the object was written longer ago
//	floor     its id is not one that may have been lost when the metadata store
//	          went back in time
//	behind    the metadata store is not known to have gone back in time
//
// # Failures
//
//	a listing or a read fails            the sweep of that store ends with an
//	                                     error, others go on; the next one finds
//	                                     the same
//	an object cannot be deleted          the others are; the error comes at the end
//	process dies, is deposed             what it had decided stays right
//	two sweeps at once                   both are right; a delete may be repeated

// Limits of a sweep.
const (
	sweepPage  = 500 // objects that are decided on together
	sweepGets  = 96  // records that one transaction reads
	sweepUnits = 16  // units whose records, which may be large, it reads
	maxLogged  = 20  // keys of a page that the log names
)

// sweepDelay is how long a new leader waits before its first sweep.
const sweepDelay = time.Minute

// snapshotsPrefix is what the keys of all objects of snapshots begin with, gcPrefix
// those of the collector's.
const (
	snapshotsPrefix = "snapshots/"
	gcPrefix        = "gc/"
)

// Orphan is an object that nothing knows, or that is not what should lie there.
type Orphan struct {
	Store      string // alias
	Key        string
	Size       int64
	ModTime    time.Time     // by the store's clock
	Age        time.Duration // likewise
	Reason     string        // for people
	Deletable  bool          // it may be deleted once it is old enough
	Young      bool          // it is Deletable, and younger than the configured grace period
	Collection int64         // by its key, or under whose root it was looked for; 0: none
}

// SweepOptions say how to sweep.
type SweepOptions struct {
	// Grace is how old, by the store's clock, what is deleted must be. 0: as
	// configured.
	Grace time.Duration
	// Floor is the id below which an object without a record is left alone, if it
	// is higher than what the metadata store says itself.
	Floor  int64
	DryRun bool // delete nothing
	// Emit is told of each object that is dead, lost or foreign, one after
	// another; of one that is deleted once it is. Nil: nobody is. Its error ends
	// the sweep.
	Emit func(Orphan) error
	// Wait is called before n objects are deleted, and its error ends the sweep.
	// Nil: the configured rate alone holds deletes up.
	Wait func(ctx context.Context, n int) error
}

// SweepSummary is what a sweep came to.
type SweepSummary struct {
	Objects int64 // that were looked at
	Deleted int64 // objects that were deleted, or would be
	Bytes   int64 // of those
	Waiting int64 // dead objects that are younger than the grace period
	Lost    int64 // without a record, whose ids may have been lost: left alone
	Foreign int64 // that snapshotd has not written: left alone
	Uploads int64 // unfinished uploads that were aborted
}

// SweepStats is what the last sweep of this process came to, for metrics.
type SweepStats struct {
	SweepSummary
	End   time.Time // zero: there was none yet
	Error string    // empty: it came to its end
}

// lastSweep keeps a SweepStats.
type lastSweep struct {
	mu    sync.Mutex
	stats SweepStats
}

// SweepStats returns what the leader's last sweep came to, if it was this
// process that made it.
func (g *GC) SweepStats() SweepStats {
	g.swept.mu.Lock()
	defer g.swept.mu.Unlock()
	return g.swept.stats
}

// sweepLoop sweeps now and then until ctx ends. Trouble is logged and met again
// later.
func (g *GC) sweepLoop(ctx context.Context) error {
	timer := time.NewTimer(sweepDelay)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		}
		summary, err := g.Sweep(ctx, SweepOptions{})
		if ctx.Err() != nil {
			return nil
		}
		stats := SweepStats{SweepSummary: summary, End: g.o.Clock.Display()}
		if err != nil {
			stats.Error = err.Error()
		}
		g.problems.sweep.Note(err)
		if summary.Deleted+summary.Uploads > 0 {
			g.log.Info("swept what had no record", zap.Int64("objects", summary.Deleted), zap.Int64("bytes", summary.Bytes),
				zap.Int64("uploads", summary.Uploads))
		}
		g.swept.mu.Lock()
		g.swept.stats = stats
		g.swept.mu.Unlock()
		timer.Reset(g.o.SweepInterval)
	}
}

// Sweep deletes the objects under snapshotd's own prefixes, in all stores, whose
// ids have no record, and aborts the uploads that were left unfinished there. It
// is safe to call while others do. The errors of single stores are joined, and
// the summary says what was done all the same; an epoch.ErrRolledBack ends it at once.
func (g *GC) Sweep(ctx context.Context, o SweepOptions) (SweepSummary, error) {
	if o.Grace == 0 {
		o.Grace = g.o.OrphanGrace
	}
	s := &sweep{g: g, o: o}
	// Ages are by the stores' clocks, which may step with that of the host.
	if _, err := g.o.Clock.Judge(ctx); err != nil && !o.DryRun {
		return s.summary, fmt.Errorf("nothing is swept: %w", err)
	}
	var errs []error
	for _, alias := range slices.Sorted(maps.Keys(g.o.Stores)) {
		err := s.store(ctx, alias)
		if err != nil {
			errs = append(errs, fmt.Errorf("sweep store %s: %w", alias, err))
		}
		if ctx.Err() != nil || errors.Is(err, errEmit) || errors.Is(err, epoch.ErrRolledBack) {
			break
		}
	}
	return s.summary, object.Join(errs...)
}

// sweep is one sweep.
type sweep struct {
	g         *GC
	o         SweepOptions
	summary   SweepSummary
	undeleted []error // of pages of the store that is being swept
}

// store sweeps one store. The clock is read before the listing, so that nothing
// is taken for older than it is.
func (s *sweep) store(ctx context.Context, alias string) error {
	store := s.g.o.Stores[alias]
	s.undeleted = nil
	now, err := store.Now(ctx)
	if err != nil {
		return fmt.Errorf("read its clock: %w", err)
	}
	for _, prefix := range []string{snapshotsPrefix, gcPrefix} {
		if err := pages(ctx, store, prefix, sweepPage, func(page []object.Info) error { return s.page(ctx, alias, now, page) }); err != nil {
			return err
		}
		if s.o.DryRun {
			continue
		}
		if prefix == gcPrefix { // where uploads of other names are somebody else's
			prefix = catalog.HeldPrefix
		}
		n, err := store.AbortUploads(ctx, prefix, now.Add(-s.o.Grace))
		s.summary.Uploads += int64(n)
		if err != nil {
			return err
		}
	}
	if !s.o.DryRun {
		if err := s.probes(ctx, store, now); err != nil {
			return err
		}
	}
	return firstOf(s.undeleted)
}

// probes removes what probes of the store left.
func (s *sweep) probes(ctx context.Context, store object.Store, now time.Time) error {
	objects, bytes, uploads, err := probe.RemoveLeft(ctx, store, now)
	s.summary.Deleted += objects
	s.summary.Bytes += bytes
	s.summary.Uploads += int64(uploads)
	s.g.counters.Add(ByOrphan, objects, bytes)
	if err != nil {
		return fmt.Errorf("remove what probes left: %w", err)
	}
	return nil
}

// pages calls fn with the objects under prefix, up to size of them at a time. The
// page is fn's until it returns.
func pages(ctx context.Context, store object.Store, prefix string, size int, fn func([]object.Info) error) error {
	page := make([]object.Info, 0, size)
	for info, err := range store.List(ctx, prefix) {
		if err != nil {
			return err
		}
		if page = append(page, info); len(page) < size {
			continue
		}
		if err := fn(page); err != nil {
			return err
		}
		page = page[:0]
	}
	if len(page) == 0 {
		return nil
	}
	return fn(page)
}

// subject is an object under one of snapshotd's own prefixes. Its id is that of a
// snapshot, of a unit or of a restore job, 0 of none of them.
type subject struct {
	collection, id int64
	unit, job      bool
	own            bool // snapshotd's, but of no id
}

// kind is what the id is of, for people.
func (s subject) kind() string {
	switch {
	case s.unit:
		return "unit"
	case s.job:
		return "restore job"
	}
	return "snapshot"
}

// subjectOf reads a key.
func subjectOf(key string) subject {
	if collection, id, ok := manifest.ParseKey(key); ok {
		return subject{collection: collection, id: id}
	}
	if collection, unit, ok := catalog.ParseHeldKey(key); ok {
		return subject{collection: collection, id: unit, unit: true}
	}
	if job, ok := pinsOf(key); ok {
		return subject{id: job, job: true}
	}
	return subject{own: key == identity.Key || isNote(key)}
}

// pinsOf returns the restore job whose pins of sources an object holds, by its key.
func pinsOf(key string) (job int64, ok bool) {
	rest, ok := strings.CutPrefix(key, catalog.RestorePrefix)
	if !ok {
		return 0, false
	}
	var task int64
	var part int
	if _, err := fmt.Sscanf(rest, "%d/pins-%d-%d.json", &job, &task, &part); err != nil {
		return 0, false
	}
	return job, job > 0 && task >= 0 && part >= 0 && key == catalog.PinsKey(job, task, part)
}

// isNote says whether a key is that of a note of how far the metadata store has
// come.
func isNote(key string) bool {
	digits, isJSON := strings.CutSuffix(strings.TrimPrefix(key, epoch.Prefix), ".json")
	beat, err := strconv.ParseInt(digits, 10, 64)
	return isJSON && err == nil && beat > 0 && key == epoch.Prefix+keys.ID(beat)+".json"
}

// records are the keys of which any one keeps the object.
func (s subject) records() []string {
	switch {
	case s.id == 0:
		return nil
	case s.unit:
		return []string{keys.Unit(s.collection, s.id), keys.Tomb(s.collection, s.id), keys.Segment(s.collection, s.id)}
	case s.job:
		return []string{keys.Job(s.id)}
	}
	return []string{keys.Snapshot(s.id)}
}

// recorded is which records there are, as of after a listing.
type recorded struct {
	there map[string]bool
	floor int64
}

// page decides on listed objects and deletes what is dead of them.
func (s *sweep) page(ctx context.Context, alias string, now time.Time, page []object.Info) error {
	s.summary.Objects += int64(len(page))
	subjects := make([]subject, len(page))
	for i := range page {
		subjects[i] = subjectOf(page[i].Key)
	}
	rec, err := s.g.readRecorded(ctx, subjects)
	if err != nil {
		return err
	}
	rec.floor = max(rec.floor, s.o.Floor)
	var dead []Orphan
	for i := range page {
		o := Orphan{
			Store: alias, Key: page[i].Key, Size: page[i].Size, ModTime: page[i].ModTime, Age: now.Sub(page[i].ModTime),
			Collection: subjects[i].collection,
		}
		v, err := s.g.judge(ctx, subjects[i], rec)
		if err != nil {
			return err
		}
		switch o.Reason = v.reason; {
		case v.fate == stays:
			continue
		case v.fate == foreign:
			s.summary.Foreign++
		case v.fate == lost:
			s.summary.Lost++
		case o.Age < s.o.Grace:
			o.Deletable, o.Young = true, true
			o.Reason += youngerThan(s.o.Grace)
			s.summary.Waiting++
		default:
			o.Deletable = true
			dead = append(dead, o)
			continue
		}
		if err := emitTo(s.o.Emit, o); err != nil {
			return err
		}
	}
	if !s.o.DryRun {
		var deleteErr error
		dead, deleteErr = s.g.deleteOrphans(ctx, dead, s.o.Wait)
		switch {
		case deleteErr == nil:
		case ctx.Err() == nil && len(failedKeys(deleteErr)) > 0: // others go all the same
			s.undeleted = append(s.undeleted, errors.New(record.Clip(deleteErr.Error(), record.MaxText)))
		default:
			err = deleteErr
		}
	}
	for _, o := range dead {
		s.summary.Deleted++
		s.summary.Bytes += o.Size
		if emitErr := emitTo(s.o.Emit, o); emitErr != nil {
			return emitErr
		}
	}
	return err
}

// readRecorded reads which records of subjects there are. It must be called after
// the listing that showed them.
func (g *GC) readRecorded(ctx context.Context, subjects []subject) (*recorded, error) {
	rec := &recorded{there: map[string]bool{}}
	var wanted []string
	limit := sweepGets
	for _, s := range subjects {
		wanted = append(wanted, s.records()...)
		if s.unit {
			limit = 3 * sweepUnits
		}
	}
	slices.Sort(wanted)
	wanted = slices.Compact(wanted)
	for first := true; first || len(wanted) > 0; first = false {
		n := min(limit, len(wanted))
		there, floor, err := g.present(ctx, wanted[:n])
		if err != nil {
			return nil, fmt.Errorf("read records: %w", err)
		}
		maps.Copy(rec.there, there)
		rec.floor = max(rec.floor, floor)
		wanted = wanted[n:]
	}
	return rec, nil
}

// present says which keys there are, all at one revision, and below which id a
// record that is not there may have been lost. It is an epoch.ErrRolledBack while nothing
// of that is to be believed.
func (g *GC) present(ctx context.Context, wanted []string) (there map[string]bool, floor int64, err error) {
	gets := make([]meta.Op, 0, len(wanted)+1)
	gets = append(gets, meta.Get(keys.Epoch))
	for _, key := range wanted {
		gets = append(gets, meta.Get(key))
	}
	res, err := g.kv.Txn(ctx, meta.Txn{If: []meta.Cond{meta.Absent(keys.Behind)}, Then: gets, Else: []meta.Op{meta.Get(keys.Behind)}})
	switch {
	case err != nil:
		return nil, 0, err
	case !res.Succeeded:
		return nil, 0, epoch.Blocked(res.Ranges[0])
	}
	for _, kv := range res.Ranges[0] {
		rec := &storagev1.Epoch{}
		if err := record.Decode(kv, rec); err != nil {
			return nil, 0, err
		}
		floor = rec.GetFloor()
	}
	there = map[string]bool{}
	for i, key := range wanted {
		if len(res.Ranges[1+i]) > 0 {
			there[key] = true
		}
	}
	return there, floor, nil
}

// fate is what becomes of an object.
type fate int

const (
	stays   fate = iota + 1
	dead         // nothing will ever know it
	lost         // without a record, which may have been lost
	foreign      // not written by snapshotd
)

// verdict is a fate and why, for people.
type verdict struct {
	fate   fate
	reason string
}

// judge decides on one object. Only an id that was handed out can be dead: any
// other will be handed out yet, or is of another cluster.
func (g *GC) judge(ctx context.Context, s subject, rec *recorded) (verdict, error) {
	v := decideFate(s, rec)
	if v.fate != dead {
		return v, nil
	}
	_, ok, err := g.o.Catalog.HandedOut(ctx, s.id)
	if err != nil {
		return verdict{}, err
	}
	if !ok {
		return verdict{foreign, fmt.Sprintf("it carries id %d, which was never handed out here: left alone", s.id)}, nil
	}
	return v, nil
}

func decideFate(s subject, rec *recorded) verdict {
	what := s.kind()
	switch {
	case s.own:
		return verdict{stays, "it is snapshotd's own"}
	case s.id == 0:
		return verdict{foreign, "not a name that snapshotd writes: left alone"}
	case slices.ContainsFunc(s.records(), func(key string) bool { return rec.there[key] }):
		return verdict{stays, fmt.Sprintf("%s %d has a record", what, s.id)}
	case s.id < rec.floor:
		return verdict{lost, fmt.Sprintf("the record of %s %d may have been lost when the metadata store went back in time: left alone", what, s.id)}
	}
	return verdict{dead, fmt.Sprintf("there is no %s %d any more", what, s.id)}
}

// youngerThan is the end of the reason of what is too young to be deleted.
func youngerThan(grace time.Duration) string {
	return fmt.Sprintf("; younger than orphan_grace, which is %s", grace)
}

// emitTo tells of an orphan. Its error wraps errEmit: who is told wants to hear no
// more.
func emitTo(emit func(Orphan) error, o Orphan) error {
	if emit == nil {
		return nil
	}
	if err := emit(o); err != nil {
		return fmt.Errorf("%w: %w", errEmit, err)
	}
	return nil
}

// deleteOrphans deletes objects of one store and returns those that are gone,
// also with an error.
func (g *GC) deleteOrphans(ctx context.Context, list []Orphan, wait func(context.Context, int) error) ([]Orphan, error) {
	if len(list) == 0 {
		return nil, nil
	}
	if wait != nil {
		if err := wait(ctx, len(list)); err != nil {
			return nil, err
		}
	}
	names := make([]string, len(list))
	for i := range list {
		names[i] = list[i].Key
	}
	err := g.deleteObjects(ctx, list[0].Store, names)
	if err != nil {
		failed := failedKeys(err)
		if len(failed) == 0 {
			return nil, err
		}
		list = slices.DeleteFunc(list, func(o Orphan) bool { return failed[o.Key] != nil })
		err = fmt.Errorf("%d objects are not deleted: %w", len(failed), err)
	}
	var bytes int64
	for i := range list {
		bytes += list[i].Size
	}
	if len(list) > 0 {
		var first []string
		for _, o := range list[:min(len(list), maxLogged)] {
			first = append(first, o.Key)
		}
		g.log.Info("objects that nothing knew are deleted", zap.String("store", list[0].Store), zap.Int("objects", len(list)),
			zap.Int64("bytes", bytes), zap.Strings("first", first))
	}
	g.counters.Add(ByOrphan, int64(len(list)), bytes)
	return list, err
}
