package collect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/refs"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// # Orphans of collections
//
// The objects under the roots of collections are the data of engines, which write
// files before they register them. They are never swept. Orphans lists objects without
// a record, and deletes leftovers of segments on request.
//
// A file has a record if a segment, a unit or a tombstone of any collection with a root
// above it has it, if a committed snapshot of such a collection references it, or if a
// running restore may be writing it. Roots of several collections may be equal or
// nested.
//
// The decision has two steps. Each page of a listing is compared with the records that
// its paths name, which finds nearly all records. The other files are candidates. Once
// there are enough, or the listing ends, they are compared with all records: every
// lookup that counts is read after the listing that showed the file.
//
// A candidate is deletable if it has the path of a segment of the collection in the
// native layout, <collection>/<partition>/<segment>/..., with ids that were allocated
// and cannot have been lost, and if none of those collections has a record of that
// segment, of a unit of it, or of a build of that id. Any other may be foreign, and
// stays. A foreign object at such a place looks like a leftover, so an operator checks
// the list first.

// Limits of a search for orphans.
const (
	orphanPage  = 500    // files that are looked up together
	orphanBatch = 20_000 // candidates that are compared with all records at once

	refreshAttempts = 16
)

// MinOrphanGrace is the minimum age of an orphan that Orphans deletes.
const MinOrphanGrace = time.Hour

// errNoStore means that no object store of an alias is configured in this process.
var errNoStore = errors.New("object store is not configured here")

// ErrOrphanOptions means a deletion of orphans without a collection, or with too short a
// grace period.
var ErrOrphanOptions = errors.New("invalid orphan deletion request")

// OrphanOptions configure a search for orphans.
type OrphanOptions struct {
	// Collection is the one whose roots are searched. Zero: snapshotd's own prefixes,
	// in all stores.
	Collection catalog.Ref
	// Grace is the minimum age, by the store's clock, of a deleted orphan: an hour at
	// least. 0: as configured.
	Grace time.Duration
	// Delete deletes the deletable orphans of the collection that are old enough. Then
	// Report gets only those.
	Delete bool
	// LostBelow is as in SweepOptions.
	LostBelow int64
	// Report gets each orphan, one after another. Its error ends the search. Nil: none.
	Report func(Orphan) error
	// Wait is as in SweepOptions.
	Wait func(ctx context.Context, n int) error
}

// Orphans lists the objects without a record, and deletes some of them if configured.
// It takes as long as a listing of the stores, and reads the records of the collections
// that share the roots. An unreadable record ends it: the error is gc.ErrLoading or
// gc.ErrUnreadable for the references of a snapshot.
func (c *Collector) Orphans(ctx context.Context, o OrphanOptions) error {
	if o.Grace == 0 {
		o.Grace = c.o.OrphanGrace
	}
	own := o.Collection == (catalog.Ref{})
	switch {
	case o.Delete && own:
		return fmt.Errorf("%w: name the collection; snapshotd's own prefixes are swept by the collector", ErrOrphanOptions)
	case o.Delete && o.Grace < MinOrphanGrace:
		return fmt.Errorf("%w: the grace period is %s, at least %s is needed: files are written before they are registered",
			ErrOrphanOptions, o.Grace, MinOrphanGrace)
	case own:
		_, err := c.Sweep(ctx, SweepOptions{Grace: o.Grace, LostBelow: o.LostBelow, DryRun: true, Report: o.Report})
		if err != nil {
			return fmt.Errorf("list orphans: %w", err)
		}
		return nil
	}
	col, err := c.catalog.Collection(ctx, o.Collection)
	if err != nil {
		return fmt.Errorf("orphans of collection %s: %w", o.Collection, err)
	}
	if o.Delete {
		if _, err := c.clock.Judge(ctx); err != nil { // the stores' clocks may step with it
			return fmt.Errorf("orphans of collection %s: nothing is deleted: %w", &col, err)
		}
	}
	s := &search{c: c, o: o, col: col}
	for _, root := range col.Roots {
		if err := s.root(ctx, root); err != nil {
			return fmt.Errorf("orphans of collection %s under %s/%s: %w", &col, root.Store, root.Prefix, err)
		}
	}
	return nil
}

// search is one call of Orphans for a collection.
type search struct {
	c          *Collector
	o          OrphanOptions
	col        catalog.Collection
	owners     *rootOwners
	candidates []candidate
	alias      string
	now        time.Time // by the store's clock, before its listing
}

// candidate is a file of which no record was found yet.
type candidate struct {
	info   object.Info
	owners []ownership
}

func (s *search) root(ctx context.Context, root catalog.Root) error {
	store, ok := s.c.stores[root.Store]
	if !ok {
		return fmt.Errorf("%w: %q", errNoStore, root.Store)
	}
	var err error
	if s.now, err = store.Now(ctx); err != nil {
		return fmt.Errorf("read the clock of store %s: %w", root.Store, err)
	}
	s.alias = root.Store
	err = listPages(ctx, store, root.Prefix, orphanPage, func(page []object.Info) error { return s.page(ctx, page) })
	if err != nil {
		return err
	}
	return s.flush(ctx)
}

// page adds the listed files to the candidates that are not in the records that their
// paths name.
func (s *search) page(ctx context.Context, page []object.Info) error {
	if s.owners == nil {
		var err error
		if s.owners, err = s.c.readRootOwners(ctx); err != nil {
			return err
		}
	}
	type lookup struct {
		paths  []catalog.FilePath
		places []int // in page
	}
	byCollection := map[int64]*lookup{}
	for i := range page {
		if catalog.OwnKey(page[i].Key) {
			continue
		}
		for _, o := range s.owners.of(s.alias, page[i].Key) {
			l := byCollection[o.col.ID]
			if l == nil {
				l = &lookup{}
				byCollection[o.col.ID] = l
			}
			l.paths = append(l.paths, catalog.FilePath{Root: o.root, Path: o.path})
			l.places = append(l.places, i)
		}
	}
	known := make([]bool, len(page))
	for id, l := range byCollection {
		owners, err := s.c.catalog.FindOwners(ctx, id, l.paths)
		if err != nil {
			return err
		}
		for i, owner := range owners {
			known[l.places[i]] = known[l.places[i]] || owner != nil
		}
	}
	for i := range page {
		if !known[i] && !catalog.OwnKey(page[i].Key) {
			s.candidates = append(s.candidates, candidate{info: page[i]})
		}
	}
	if len(s.candidates) >= orphanBatch {
		return s.flush(ctx)
	}
	return nil
}

// flush decides on the candidates by lookups from now, and reports or deletes them.
func (s *search) flush(ctx context.Context) error {
	if len(s.candidates) == 0 {
		return nil
	}
	f, err := s.lookUp(ctx)
	if err != nil {
		return err
	}
	var old []Orphan
	for i := range s.candidates {
		k := &s.candidates[i]
		if f.known[i] {
			continue
		}
		o := Orphan{
			Store: s.alias, Key: k.info.Key, Size: k.info.Size, ModTime: k.info.ModTime,
			Age: s.now.Sub(k.info.ModTime), Collection: s.col.ID,
		}
		if o.Reason, o.Deletable, err = s.judge(ctx, k, f); err != nil {
			return err
		}
		young := o.Deletable && o.Age < s.o.Grace
		if young && !s.o.Delete {
			o.Young = true
			o.Reason += youngerThan(s.o.Grace)
		}
		if s.o.Delete {
			if o.Deletable && !young {
				old = append(old, o)
			}
			continue
		}
		if err := reportOrphan(s.o.Report, o); err != nil {
			return err
		}
	}
	s.candidates = s.candidates[:0]
	for part := range slices.Chunk(old, sweepPage) {
		deleted, err := s.c.deleteOrphans(ctx, part, s.o.Wait)
		for _, o := range deleted {
			if err := reportOrphan(s.o.Report, o); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fileLookups has the lookups of the candidates, all read after the listing.
type fileLookups struct {
	known     []bool          // by candidate
	jobs      []int64         // likewise, the restore that may be writing it; 0: none
	lostBelow int64           // a missing record of a lower id may have been lost
	present   map[string]bool // keys of records
}

// lookUp looks up the candidates in all records that may have them.
func (s *search) lookUp(ctx context.Context) (*fileLookups, error) {
	jobs, err := s.refresh(ctx)
	if err != nil {
		return nil, err
	}
	f := &fileLookups{known: make([]bool, len(s.candidates)), jobs: make([]int64, len(s.candidates))}
	places := make(map[string]int, len(s.candidates))
	collections := map[int64]*catalog.Collection{}
	for i := range s.candidates {
		k := &s.candidates[i]
		k.owners = s.owners.of(s.alias, k.info.Key)
		places[k.info.Key] = i
		for _, o := range k.owners {
			collections[o.col.ID] = o.col
		}
		for id, job := range jobs {
			if s.mayWrite(job, k.info.Key) {
				f.known[i], f.jobs[i] = true, id
			}
		}
	}
	for _, col := range collections {
		if _, err := s.c.gc.Ready(ctx, col.ID); err != nil {
			return nil, err
		}
		if err := s.scan(ctx, col, places, f.known); err != nil {
			return nil, err
		}
	}
	for i := range s.candidates {
		if !f.known[i] {
			f.known[i] = s.c.referenced(s.candidates[i].info.Key, s.candidates[i].owners)
		}
	}
	return f, s.readRecords(ctx, f)
}

// refresh makes the owners current, and returns the running restore jobs by their ids.
func (s *search) refresh(ctx context.Context) (jobs map[int64]*storagev1.Job, err error) {
	from, to := meta.Prefix(keys.JobPrefix)
	for range refreshAttempts {
		res, err := s.c.kv.Txn(ctx, meta.Txn{
			If: []meta.Cond{s.owners.unchanged()}, Then: []meta.Op{meta.GetRange(from, to)},
		})
		if err != nil {
			return nil, fmt.Errorf("read restore jobs: %w", err)
		}
		if !res.Succeeded {
			if s.owners, err = s.c.readRootOwners(ctx); err != nil {
				return nil, err
			}
			continue
		}
		jobs = map[int64]*storagev1.Job{}
		for _, kv := range res.Ranges[0] {
			job := &storagev1.Job{}
			if err := record.Decode(kv, job); err != nil {
				return nil, err
			}
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return nil, err
			}
			const completed, canceled = 3, 5 // the states of ended jobs are in this range
			if state := job.GetState(); state < completed || state > canceled {
				jobs[id] = job
			}
		}
		return jobs, nil
	}
	return nil, fmt.Errorf("%w: the collections change constantly", meta.ErrConflict)
}

// mayWrite reports whether a restore may be writing an object: it is under one of the
// job's roots, and its path has one of the job's ids.
func (s *search) mayWrite(job *storagev1.Job, key string) bool {
	for _, root := range job.GetRoots() {
		path, ok := strings.CutPrefix(key, root.GetPrefix())
		if !ok || !s.owners.sameStore(root.GetStore(), s.alias) {
			continue
		}
		if slices.ContainsFunc(segment.IDsIn(path), func(id int64) bool {
			return id == job.GetCollectionId() ||
				id >= job.GetFirstSegment() && id-job.GetFirstSegment() < job.GetSegments() ||
				id >= job.GetFirstBuild() && id-job.GetFirstBuild() < job.GetBuilds()
		}) {
			return true
		}
	}
	return false
}

// scan marks the files at places that a segment, unit or tombstone of the collection
// has. Of a spilled unit readRecords looks up only the id: its files without that id
// are among the references of its holders.
func (s *search) scan(ctx context.Context, col *catalog.Collection, places map[string]int, known []bool) error {
	var key []byte
	mark := func(seg *segment.Segment) {
		for f := range seg.AllFiles() {
			if f.Root >= len(col.Roots) || !s.owners.sameStore(col.Roots[f.Root].Store, s.alias) {
				continue
			}
			key = append(append(key[:0], col.Roots[f.Root].Prefix...), f.Path...)
			if at, ok := places[string(key)]; ok {
				known[at] = true
			}
		}
	}
	_, err := s.c.catalog.ScanSegments(ctx, col.ID, 0, func(batch []segment.Segment) error {
		for i := range batch {
			mark(&batch[i])
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the segments of collection %s: %w", col, err)
	}
	// Units are read before tombstones: a unit that is granted meanwhile is found as one
	// or the other.
	for _, prefix := range []string{keys.UnitPrefix(col.ID), keys.TombstonePrefix(col.ID)} {
		from, to := meta.Prefix(prefix)
		if _, err := s.c.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				u, err := decodeUnit(col.ID, kv)
				if err != nil && !errors.Is(err, catalog.ErrSpilled) {
					return err
				}
				mark(&u.Segment)
			}
			return nil
		}); err != nil {
			return fmt.Errorf("read the units of collection %s: %w", col, err)
		}
	}
	return nil
}

// decodeUnit reads a unit from its record or its tombstone.
func decodeUnit(collection int64, kv meta.KeyValue) (catalog.Unit, error) {
	if strings.HasPrefix(kv.Key, keys.AllTombstonesPrefix) {
		t, err := gc.DecodeTombstone(kv)
		if err != nil {
			return catalog.Unit{}, err
		}
		return t.Unit, nil
	}
	return catalog.DecodeUnit(collection, kv)
}

// referenced reports whether a committed snapshot references a file, or the segment or
// build of its path. The references must be ready.
func (c *Collector) referenced(key string, owners []ownership) bool {
	for _, o := range owners {
		for _, q := range fileQueries(o, key) {
			if _, n := c.refs.Holders(o.col.ID, q); n > 0 {
				return true
			}
		}
	}
	return false
}

// fileQueries returns the references that a snapshot may have of a file.
func fileQueries(o ownership, key string) []refs.Query {
	files := slices.Values([]uint64{manifest.FileHash(o.col.Roots[o.root].Store, key)})
	collection, _, id, ok := segment.NativePlace(o.path)
	if ok && collection == o.col.ID {
		list := []refs.Query{{Segment: id, Files: files}}
		if build := nativeBuild(o.path); build > 0 {
			list = append(list, refs.Query{Build: build})
		}
		return list
	}
	list := []refs.Query{{Files: files}}
	for _, id := range segment.IDsIn(o.path) {
		list = append(list, refs.Query{Segment: id}, refs.Query{Build: id})
	}
	return list
}

// nativeBuild returns the fifth element of a path in the native layout. It may be the
// id of a build, or that of a field. 0: there is none.
func nativeBuild(path string) int64 {
	parts := strings.SplitN(path, "/", 6)
	if len(parts) < 6 {
		return 0
	}
	id, err := strconv.ParseInt(parts[4], 10, 64)
	if err != nil || id < 0 || !strings.Contains(parts[5], "-") {
		return 0
	}
	return id
}

// recordsOf returns the keys of records that keep a file: of its segment, as a unit or
// not, of the claim to the segment's id, and of its build. The prefix is that of the
// keys of other units of the segment.
func recordsOf(collection int64, path string) (list []string, prefix string) {
	_, _, id, _ := segment.NativePlace(path)
	list = []string{
		keys.Segment(collection, id), keys.Unit(collection, id), keys.Tombstone(collection, id), keys.OwnerSegment(id),
	}
	if build := nativeBuild(path); build > 0 {
		list = append(list, keys.Unit(collection, build), keys.Tombstone(collection, build))
	}
	return list, keys.ReplacedPrefix(collection, id)
}

// nativePath returns the path of a file at the place of a segment's file in the
// collection's native layout.
func (s *search) nativePath(k *candidate) (path string, ok bool) {
	for _, o := range k.owners {
		if o.col.ID != s.col.ID || o.col.Layout != catalog.LayoutNative {
			continue
		}
		if collection, _, _, placed := segment.NativePlace(o.path); placed && collection == s.col.ID {
			return o.path, true
		}
	}
	return "", false
}

// readRecords looks up the records of the segments and builds whose leftovers the
// candidates may be, in every collection with a root above them.
func (s *search) readRecords(ctx context.Context, f *fileLookups) error {
	var points, prefixes []string
	for i := range s.candidates {
		path, ok := s.nativePath(&s.candidates[i])
		if f.known[i] || !ok {
			continue
		}
		for _, o := range s.candidates[i].owners {
			list, prefix := recordsOf(o.col.ID, path)
			points, prefixes = append(points, list...), append(prefixes, prefix)
		}
	}
	slices.Sort(points)
	slices.Sort(prefixes)
	f.present = map[string]bool{}
	points, prefixes = slices.Compact(points), slices.Compact(prefixes)
	for first := true; first || len(points) > 0; first = false {
		n := min(2*sweepUnits, len(points))
		present, lostBelow, err := s.c.readPresent(ctx, points[:n])
		if err != nil {
			return fmt.Errorf("read segments: %w", err)
		}
		for key := range present {
			f.present[key] = true
		}
		f.lostBelow, points = max(f.lostBelow, lostBelow, s.o.LostBelow), points[n:]
	}
	for part := range slices.Chunk(prefixes, sweepGets) {
		gets := make([]meta.Op, len(part))
		for i, prefix := range part {
			gets[i] = meta.GetRange(meta.Prefix(prefix))
		}
		res, err := s.c.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return fmt.Errorf("read units: %w", err)
		}
		for i, prefix := range part {
			if len(res.Ranges[i]) > 0 {
				f.present[prefix] = true
			}
		}
	}
	return nil
}

// unregistered is the reason of a file at the place of a segment's files that the
// segment does not have. It may be about to be registered.
const unregistered = "not registered, at the place of segment %d: " +
	"it stays as long as the segment or a snapshot of it"

// judge decides whether a file without a record may be deleted, with the reason.
func (s *search) judge(
	ctx context.Context, k *candidate, f *fileLookups,
) (reason string, deletable bool, err error) {
	path, ok := s.nativePath(k)
	switch {
	case s.col.Layout != catalog.LayoutNative:
		return fmt.Sprintf("no record has it; only files of the native layout can be deleted, the layout is %v: not deleted",
			s.col.Layout), false, nil
	case !ok:
		return "not a path of a segment of the collection: not deleted", false, nil
	}
	_, partition, id, _ := segment.NativePlace(path)
	ids := []int64{id}
	if partition > 0 {
		ids = append(ids, partition)
	}
	missing, allocated, err := s.c.catalog.Allocated(ctx, ids...)
	if err != nil {
		return "", false, err
	}
	switch {
	case !allocated:
		return fmt.Sprintf("its id %d was never allocated: not deleted", missing), false, nil
	case id < f.lostBelow:
		return fmt.Sprintf(
			"the record of segment %d may have been lost in a metadata rollback: not deleted", id), false, nil
	}
	for _, o := range k.owners {
		if o.col.ID != s.col.ID || o.path != path {
			if other, _, _, placed := segment.NativePlace(o.path); placed && other == o.col.ID {
				return fmt.Sprintf("also at the place of a file of collection %s: not deleted", o.col), false, nil
			}
		}
		list, prefix := recordsOf(o.col.ID, path)
		if slices.ContainsFunc(append(list, prefix), func(key string) bool { return f.present[key] }) {
			return fmt.Sprintf(unregistered, id), false, nil
		}
	}
	return fmt.Sprintf("no segment, unit or snapshot has it; segment %d does not exist", id), true, nil
}
