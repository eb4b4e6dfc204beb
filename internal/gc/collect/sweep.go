package collect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
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
// An object store cannot be fenced: a write of a process that counts as dead may arrive
// after all records of the object are gone. A sweep finds such objects. It lists
// snapshotd's own prefixes and looks up the record of each object's id:
//
//	snapshots/<collection>/<id>/<file>  a snapshot's record, in any state, readable
//	                                    or not
//	gc/held/<collection>/<unit>[-<digest>]
//	                                    a unit's record, a tombstone, or a segment
//	                                    of its id, likewise
//	gc/restore/<job>/pins-<task>-<part>.json
//	                                    a restore job's record, likewise
//	snapshotd-probe/<probe>/<file>      deleted when it is older than a day, by the
//	                                    store's clock: a probe takes minutes at most
//	anything else                       left alone; names under snapshots/ and gc/
//	                                    that snapshotd does not write are counted
//
// Ids decide, no clock does. A record is written before the first object of its id and
// removed after the last, and ids are never reused. So an object whose id was allocated
// and has no record, at a revision that is read after the listing that showed the
// object, will never have one: it is dead. The records must be read after the listing,
// else a snapshot that begins in between looks dead.
//
// The record of a full unit keeps the object as well: the unit may be about to be
// spilled, and then that object, however old, becomes its record. Waiting costs little,
// for the unit's record is removed in the end.
//
// Three more rules each suffice to prevent a delete:
//
//	grace        by the store's clock the object was written longer ago
//	lost ids     its id is not one that may have been lost when the metadata store
//	             went back in time
//	rolled back  the metadata store is not known to have gone back in time
//
// # Failures
//
//	a listing or a read fails            the sweep of that store ends with an
//	                                     error, others continue; the next one finds
//	                                     the same
//	an object cannot be deleted          the others are; the error comes at the end
//	process dies, is deposed             its decisions stay right
//	two sweeps at once                   both are right; a delete may be repeated

// Limits of a sweep.
const (
	sweepPage  = 500 // objects that are decided on together
	sweepGets  = 96  // records that one transaction reads
	sweepUnits = 16  // units whose records, which may be large, it reads
)

// The prefixes of the keys of all objects of snapshots, and of the collector.
const (
	snapshotsPrefix = "snapshots/"
	gcPrefix        = "gc/"
)

// Orphan is an object without a record, or a foreign object under a prefix of
// snapshotd.
type Orphan struct {
	Store      string // alias
	Key        string
	Size       int64
	ModTime    time.Time     // by the store's clock
	Age        time.Duration // likewise
	Reason     string        // for humans
	Deletable  bool          // it may be deleted once it is old enough
	Young      bool          // it is Deletable, and younger than the configured grace period
	Collection int64         // of its key, or of the root that was searched; 0: none
}

// SweepOptions configure a sweep.
type SweepOptions struct {
	// Grace is the minimum age, by the store's clock, of deleted objects. 0: as
	// configured.
	Grace time.Duration
	// LostBelow is the id below which an object without a record is left alone. The
	// one of the metadata store applies if it is higher.
	LostBelow int64
	DryRun    bool // delete nothing
	// Report gets each object that is dead, lost or foreign, one after another; a
	// deleted one after the delete. Its error ends the sweep. Nil: none.
	Report func(Orphan) error
	// Wait is called before n objects are deleted, and its error ends the sweep.
	// Nil: only the configured rate delays deletes.
	Wait func(ctx context.Context, n int) error
}

// SweepSummary is the result of a sweep.
type SweepSummary struct {
	Objects int64 // that were examined
	Deleted int64 // objects that were deleted; in a dry run, that would be
	Bytes   int64 // of those
	Waiting int64 // dead objects that are younger than the grace period
	Lost    int64 // without a record, whose ids may have been lost: left alone
	Foreign int64 // not written by snapshotd: left alone
	Uploads int64 // unfinished uploads that were aborted
}

// Sweep deletes the objects under snapshotd's own prefixes, in all stores, whose ids
// have no record, and aborts the uploads that were left unfinished there. Sweeps may
// run at the same time. The errors of single stores are joined, and the summary covers
// the completed part; an epoch.ErrRolledBack ends the sweep at once.
func (c *Collector) Sweep(ctx context.Context, o SweepOptions) (SweepSummary, error) {
	if o.Grace == 0 {
		o.Grace = c.o.OrphanGrace
	}
	s := &sweep{c: c, o: o}
	// Ages are by the stores' clocks, which may step with that of the host.
	if _, err := c.clock.Judge(ctx); err != nil && !o.DryRun {
		return s.summary, fmt.Errorf("skip sweep: %w", err)
	}
	var errs []error
	for _, alias := range slices.Sorted(maps.Keys(c.stores)) {
		err := s.store(ctx, alias)
		if err != nil {
			errs = append(errs, fmt.Errorf("sweep store %s: %w", alias, err))
		}
		if ctx.Err() != nil || errors.Is(err, errReport) || errors.Is(err, epoch.ErrRolledBack) {
			break
		}
	}
	return s.summary, object.Join(errs...)
}

// sweep is one sweep.
type sweep struct {
	c         *Collector
	o         SweepOptions
	summary   SweepSummary
	undeleted []error // errors of single objects, in the current store
}

// store sweeps one store. The clock is read before the listing, so that no object looks
// older than it is.
func (s *sweep) store(ctx context.Context, alias string) error {
	store := s.c.stores[alias]
	s.undeleted = nil
	now, err := store.Now(ctx)
	if err != nil {
		return fmt.Errorf("read its clock: %w", err)
	}
	for _, prefix := range []string{snapshotsPrefix, gcPrefix} {
		sweepPageOf := func(page []object.Info) error { return s.page(ctx, alias, now, page) }
		if err := listPages(ctx, store, prefix, sweepPage, sweepPageOf); err != nil {
			return err
		}
		if s.o.DryRun {
			continue
		}
		if prefix == gcPrefix { // uploads of other names there are foreign
			prefix = catalog.SpillPrefix
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
	return gc.FirstError(s.undeleted)
}

// probes removes the remains of probes of the store.
func (s *sweep) probes(ctx context.Context, store object.Store, now time.Time) error {
	objects, bytes, uploads, err := probe.RemoveLeft(ctx, store, now)
	s.summary.Deleted += objects
	s.summary.Bytes += bytes
	s.summary.Uploads += int64(uploads)
	s.c.gc.Counters().Add(gc.ByOrphan, objects, bytes)
	if err != nil {
		return fmt.Errorf("remove remains of probes: %w", err)
	}
	return nil
}

// listPages calls fn with the objects under prefix, up to size of them at a time. fn
// must not keep the page.
func listPages(ctx context.Context, store object.Store, prefix string, size int, fn func([]object.Info) error) error {
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

// subject is the meaning of a key under snapshotd's own prefixes. Its id is that of a
// snapshot, a unit or a restore job, or 0.
type subject struct {
	collection, id int64
	unit, job      bool
	own            bool // written by snapshotd, without an id
}

// kind returns the kind of the id, for humans.
func (s subject) kind() string {
	switch {
	case s.unit:
		return "unit"
	case s.job:
		return "restore job"
	}
	return "snapshot"
}

// subjectOf parses a key.
func subjectOf(key string) subject {
	if collection, id, ok := manifest.ParseKey(key); ok {
		return subject{collection: collection, id: id}
	}
	if collection, unit, ok := catalog.ParseSpillKey(key); ok {
		return subject{collection: collection, id: unit, unit: true}
	}
	if job, ok := pinsOf(key); ok {
		return subject{id: job, job: true}
	}
	return subject{own: key == identity.Key || isHeartbeat(key)}
}

// pinsOf returns the restore job of an object with pins of sources, by its key.
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

// isHeartbeat reports whether a key is that of a beat of the epoch.
func isHeartbeat(key string) bool {
	digits, isJSON := strings.CutSuffix(strings.TrimPrefix(key, epoch.Prefix), ".json")
	beat, err := strconv.ParseInt(digits, 10, 64)
	return isJSON && err == nil && beat > 0 && key == epoch.Prefix+keys.ID(beat)+".json"
}

// records returns the keys of records of which each keeps the object.
func (s subject) records() []string {
	switch {
	case s.id == 0:
		return nil
	case s.unit:
		return []string{keys.Unit(s.collection, s.id), keys.Tombstone(s.collection, s.id), keys.Segment(s.collection, s.id)}
	case s.job:
		return []string{keys.Job(s.id)}
	}
	return []string{keys.Snapshot(s.id)}
}

// lookups has the records of subjects, read after a listing.
type lookups struct {
	present   map[string]bool // keys
	lostBelow int64           // a missing record of a lower id may have been lost
}

// page decides on listed objects and deletes the dead ones.
func (s *sweep) page(ctx context.Context, alias string, now time.Time, page []object.Info) error {
	s.summary.Objects += int64(len(page))
	subjects := make([]subject, len(page))
	for i := range page {
		subjects[i] = subjectOf(page[i].Key)
	}
	found, err := s.c.lookUp(ctx, subjects)
	if err != nil {
		return err
	}
	found.lostBelow = max(found.lostBelow, s.o.LostBelow)
	var dead []Orphan
	for i := range page {
		o := Orphan{
			Store: alias, Key: page[i].Key, Size: page[i].Size, ModTime: page[i].ModTime, Age: now.Sub(page[i].ModTime),
			Collection: subjects[i].collection,
		}
		v, err := s.c.judge(ctx, subjects[i], found)
		if err != nil {
			return err
		}
		switch o.Reason = v.reason; {
		case v.disposition == stays:
			continue
		case v.disposition == foreign:
			s.summary.Foreign++
		case v.disposition == lost:
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
		if err := reportOrphan(s.o.Report, o); err != nil {
			return err
		}
	}
	if !s.o.DryRun {
		var deleteErr error
		dead, deleteErr = s.c.deleteOrphans(ctx, dead, s.o.Wait)
		switch {
		case deleteErr == nil:
		case ctx.Err() == nil && len(gc.FailedKeys(deleteErr)) > 0: // the other objects were deleted
			s.undeleted = append(s.undeleted, errors.New(record.Clip(deleteErr.Error(), record.MaxText)))
		default:
			err = deleteErr
		}
	}
	for _, o := range dead {
		s.summary.Deleted++
		s.summary.Bytes += o.Size
		if reportErr := reportOrphan(s.o.Report, o); reportErr != nil {
			return reportErr
		}
	}
	return err
}

// lookUp looks up the records of subjects. It must be called after the listing that
// showed them.
func (c *Collector) lookUp(ctx context.Context, subjects []subject) (*lookups, error) {
	result := &lookups{present: map[string]bool{}}
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
		present, lostBelow, err := c.readPresent(ctx, wanted[:n])
		if err != nil {
			return nil, fmt.Errorf("read the records of objects: %w", err)
		}
		maps.Copy(result.present, present)
		result.lostBelow = max(result.lostBelow, lostBelow)
		wanted = wanted[n:]
	}
	return result, nil
}

// readPresent returns the existing ones of keys, all at one revision, and the id below
// which a missing record may have been lost. While the metadata store is known to have
// gone back in time, it is an epoch.ErrRolledBack.
func (c *Collector) readPresent(
	ctx context.Context, wanted []string,
) (present map[string]bool, lostBelow int64, err error) {
	gets := make([]meta.Op, 0, len(wanted)+1)
	gets = append(gets, meta.Get(keys.Epoch))
	for _, key := range wanted {
		gets = append(gets, meta.Get(key))
	}
	res, err := c.kv.Txn(ctx, meta.Txn{
		If: []meta.Cond{meta.Absent(keys.RolledBack)}, Then: gets, Else: []meta.Op{meta.Get(keys.RolledBack)},
	})
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
		lostBelow = rec.GetFloor()
	}
	present = map[string]bool{}
	for i, key := range wanted {
		if len(res.Ranges[1+i]) > 0 {
			present[key] = true
		}
	}
	return present, lostBelow, nil
}

// disposition is the decision on an object.
type disposition int

const (
	stays   disposition = iota + 1
	dead                // it will never have a record
	lost                // without a record, which may have been lost
	foreign             // not written by snapshotd
)

// verdict is a disposition with its reason, for humans.
type verdict struct {
	disposition disposition
	reason      string
}

// judge decides on one object. Only an allocated id can be dead: any other may still be
// allocated, or is of another cluster.
func (c *Collector) judge(ctx context.Context, s subject, found *lookups) (verdict, error) {
	v := judgeRecords(s, found)
	if v.disposition != dead {
		return v, nil
	}
	_, ok, err := c.catalog.Allocated(ctx, s.id)
	if err != nil {
		return verdict{}, err
	}
	if !ok {
		return verdict{foreign, fmt.Sprintf("its id %d was never allocated in this cluster: not deleted", s.id)}, nil
	}
	return v, nil
}

// judgeRecords decides on one object by its record.
func judgeRecords(s subject, found *lookups) verdict {
	kind := s.kind()
	switch {
	case s.own:
		return verdict{stays, "an object of snapshotd"}
	case s.id == 0:
		return verdict{foreign, "not a name of snapshotd: not deleted"}
	case slices.ContainsFunc(s.records(), func(key string) bool { return found.present[key] }):
		return verdict{stays, fmt.Sprintf("%s %d has a record", kind, s.id)}
	case s.id < found.lostBelow:
		return verdict{lost, fmt.Sprintf(
			"the record of %s %d may have been lost in a metadata rollback: not deleted", kind, s.id)}
	}
	return verdict{dead, fmt.Sprintf("%s %d does not exist", kind, s.id)}
}

// youngerThan is the suffix of the reason of an object that is too young.
func youngerThan(grace time.Duration) string {
	return fmt.Sprintf("; younger than orphan_grace, which is %s", grace)
}

// reportOrphan reports an orphan. Its error wraps errReport, and ends the search.
func reportOrphan(report func(Orphan) error, o Orphan) error {
	if report == nil {
		return nil
	}
	if err := report(o); err != nil {
		return fmt.Errorf("%w: %w", errReport, err)
	}
	return nil
}

// deleteOrphans deletes objects of one store and returns the deleted ones, also with an
// error.
func (c *Collector) deleteOrphans(
	ctx context.Context, list []Orphan, wait func(context.Context, int) error,
) ([]Orphan, error) {
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
	err := c.gc.DeleteObjects(ctx, list[0].Store, names)
	if err != nil {
		failed := gc.FailedKeys(err)
		if len(failed) == 0 {
			return nil, err
		}
		list = slices.DeleteFunc(list, func(o Orphan) bool { return failed[o.Key] != nil })
		err = fmt.Errorf("%d objects not deleted: %w", len(failed), err)
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
		c.log.Info("objects without a record deleted", zap.String("store", list[0].Store),
			zap.Int("objects", len(list)), zap.Int64("bytes", bytes), zap.Strings("first", first))
	}
	c.gc.Counters().Add(gc.ByOrphan, int64(len(list)), bytes)
	return list, err
}
