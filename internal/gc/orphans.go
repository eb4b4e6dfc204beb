package gc

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
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
// What lies under the roots of collections is the data of engines, which write
// files before they register them. It is never swept. Orphans shows what nothing
// knows, and deletes of it, when it is told to, what can only be left over.
//
// A file is known when a segment, a unit or a tombstone of any collection that
// has a root there has it, when a committed snapshot of such a collection
// references it, or when a restore that has not ended may be writing it. Roots of
// several collections may be the same or lie inside each other.
//
// It is decided in two steps. Each page of a listing is compared with the records
// that the paths point at, which finds nearly all that is known. The rest is kept
// until there is enough of it, or the listing ends, and is then compared with all
// records: everything that counts is read after the listing that showed a file.
//
// Deletable is what has the path of a segment of the collection in the native
// layout, <collection>/<partition>/<segment>/..., with ids that were handed out
// and are not below the floor, when there is no record of that segment, of a unit
// of it, or of a build of that id, in any of those collections. Anything else may
// be somebody else's, and stays. What another program has put into such a place
// looks the same as what is left over, so a person looks at the list first.

// Limits of a search for orphans.
const (
	orphanPage  = 500    // files that are looked up together
	orphanBatch = 20_000 // files that are kept until they are compared with all records
)

// MinOrphanGrace is how old an orphan must be at least that Orphans deletes.
const MinOrphanGrace = time.Hour

// ErrOrphanOptions means that orphans were to be deleted without naming the
// collection, or with too short a grace period.
var ErrOrphanOptions = errors.New("orphans are not deleted like that")

// OrphanOptions say what orphans are about.
type OrphanOptions struct {
	// Collection is the one whose roots are searched. Zero: snapshotd's own
	// prefixes are, in all stores.
	Collection catalog.Ref
	// Grace is how old, by the store's clock, an orphan must be to be deleted: an
	// hour at least. 0: as configured.
	Grace time.Duration
	// Delete the deletable orphans of the collection that are old enough. Emit is
	// told of those alone then.
	Delete bool
	// Floor is as in SweepOptions.
	Floor int64
	// Emit is told of each orphan, one after another. Its error ends the search.
	// Nil: nobody is.
	Emit func(Orphan) error
	// Wait is as in SweepOptions.
	Wait func(ctx context.Context, n int) error
}

// Orphans lists the objects that nothing knows, and deletes some of them if it is
// told to. It takes as long as a listing of the stores does, and reads the records
// of the collections that share the roots. Nothing is told or deleted on what
// cannot be read: the error is ErrLoading or ErrUnreadable when it is the
// references of a snapshot.
func (g *GC) Orphans(ctx context.Context, o OrphanOptions) error {
	if o.Grace == 0 {
		o.Grace = g.o.OrphanGrace
	}
	own := o.Collection == (catalog.Ref{})
	switch {
	case o.Delete && own:
		return fmt.Errorf("%w: name the collection; what lies under snapshotd's own prefixes is swept by itself", ErrOrphanOptions)
	case o.Delete && o.Grace < MinOrphanGrace:
		return fmt.Errorf("%w: the grace period is %s, at least %s is needed: files are written before they are registered",
			ErrOrphanOptions, o.Grace, MinOrphanGrace)
	case own:
		_, err := g.Sweep(ctx, SweepOptions{Grace: o.Grace, Floor: o.Floor, DryRun: true, Emit: o.Emit})
		if err != nil {
			return fmt.Errorf("list orphans: %w", err)
		}
		return nil
	}
	col, err := g.o.Catalog.Collection(ctx, o.Collection)
	if err != nil {
		return fmt.Errorf("orphans of collection %s: %w", o.Collection, err)
	}
	if o.Delete {
		if _, err := g.o.Clock.Judge(ctx); err != nil { // ages are by clocks that may step with it
			return fmt.Errorf("orphans of collection %s: nothing is deleted: %w", &col, err)
		}
	}
	s := &search{g: g, o: o, col: col}
	for _, root := range col.Roots {
		if err := s.root(ctx, root); err != nil {
			return fmt.Errorf("orphans of collection %s under %s/%s: %w", &col, root.Store, root.Prefix, err)
		}
	}
	return nil
}

// territory is which collections have roots where, as of a revision.
type territory struct {
	revision    int64
	collections []catalog.Collection
	same        map[string]string // alias -> id of the store; two aliases may mean one
}

// readTerritory reads all collections. One that cannot be read may be whose the
// files are, so that it is an error.
func (g *GC) readTerritory(ctx context.Context) (*territory, error) {
	t := &territory{same: map[string]string{}}
	for alias := range g.o.Stores {
		kv, found, _, err := g.kv.Get(ctx, keys.Store(alias))
		if err != nil {
			return nil, fmt.Errorf("read the identity of store %s: %w", alias, err)
		}
		if found {
			t.same[alias] = string(kv.Value)
		}
	}
	from, to := meta.Prefix(keys.CollectionPrefix)
	var err error
	t.revision, err = g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			col, err := catalog.DecodeCollection(kv)
			if err != nil {
				return err
			}
			col.Schema = catalog.Schema{}
			t.collections = append(t.collections, col)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read collections: %w", err)
	}
	return t, nil
}

// unchanged is the compare that no collection was made or changed since. One that
// is gone since claims what nobody else does, which is the safe side.
func (t *territory) unchanged() meta.Cond {
	from, to := meta.Prefix(keys.CollectionPrefix)
	return meta.Cond{From: from, To: to, Target: meta.ModRevision, Op: meta.Less, Revision: t.revision + 1}
}

// isStore says whether two aliases mean the same store.
func (t *territory) isStore(a, b string) bool {
	return a == b || t.same[a] != "" && t.same[a] == t.same[b]
}

// claim is that a collection has a root where an object lies.
type claim struct {
	col  *catalog.Collection
	root int
	path string // relative to the root
}

// over returns the claims on an object, one for each collection: its roots do not
// lie inside each other, unless two aliases mean one store.
func (t *territory) over(alias, key string) []claim {
	var list []claim
	for i := range t.collections {
		for n, root := range t.collections[i].Roots {
			if path, ok := strings.CutPrefix(key, root.Prefix); ok && path != "" && t.isStore(root.Store, alias) {
				list = append(list, claim{&t.collections[i], n, path})
			}
		}
	}
	return list
}

// search is one call of Orphans for a collection.
type search struct {
	g     *GC
	o     OrphanOptions
	col   catalog.Collection
	land  *territory
	kept  []suspect
	alias string
	now   time.Time // by the store's clock, before its listing
}

// suspect is a file that no record was found of yet.
type suspect struct {
	info   object.Info
	claims []claim
}

func (s *search) root(ctx context.Context, root catalog.Root) error {
	store, ok := s.g.o.Stores[root.Store]
	if !ok {
		return fmt.Errorf("%w: %q", errNoStore, root.Store)
	}
	var err error
	if s.now, err = store.Now(ctx); err != nil {
		return fmt.Errorf("read the clock of the store: %w", err)
	}
	s.alias = root.Store
	if err := pages(ctx, store, root.Prefix, orphanPage, func(page []object.Info) error { return s.page(ctx, page) }); err != nil {
		return err
	}
	return s.flush(ctx)
}

// page keeps of listed files those that the records do not have which their paths
// point at.
func (s *search) page(ctx context.Context, page []object.Info) error {
	if s.land == nil {
		var err error
		if s.land, err = s.g.readTerritory(ctx); err != nil {
			return err
		}
	}
	type wanted struct {
		paths []catalog.FilePath
		of    []int // places in page
	}
	byCollection := map[int64]*wanted{}
	for i := range page {
		if catalog.OwnKey(page[i].Key) {
			continue
		}
		for _, c := range s.land.over(s.alias, page[i].Key) {
			w := byCollection[c.col.ID]
			if w == nil {
				w = &wanted{}
				byCollection[c.col.ID] = w
			}
			w.paths, w.of = append(w.paths, catalog.FilePath{Root: c.root, Path: c.path}), append(w.of, i)
		}
	}
	known := make([]bool, len(page))
	for id, w := range byCollection {
		owners, err := s.g.o.Catalog.FindOwners(ctx, id, w.paths)
		if err != nil {
			return err
		}
		for i, owner := range owners {
			known[w.of[i]] = known[w.of[i]] || owner != nil
		}
	}
	for i := range page {
		if !known[i] && !catalog.OwnKey(page[i].Key) {
			s.kept = append(s.kept, suspect{info: page[i]})
		}
	}
	if len(s.kept) >= orphanBatch {
		return s.flush(ctx)
	}
	return nil
}

// flush decides on what was kept, by what is read now, and tells or deletes it.
func (s *search) flush(ctx context.Context) error {
	if len(s.kept) == 0 {
		return nil
	}
	f, err := s.read(ctx)
	if err != nil {
		return err
	}
	var due []Orphan
	for i := range s.kept {
		k := &s.kept[i]
		if f.known[i] {
			continue
		}
		o := Orphan{
			Store: s.alias, Key: k.info.Key, Size: k.info.Size, ModTime: k.info.ModTime, Age: s.now.Sub(k.info.ModTime), Collection: s.col.ID,
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
				due = append(due, o)
			}
			continue
		}
		if err := emitTo(s.o.Emit, o); err != nil {
			return err
		}
	}
	s.kept = s.kept[:0]
	for part := range slices.Chunk(due, sweepPage) {
		gone, err := s.g.deleteOrphans(ctx, part, s.o.Wait)
		for _, o := range gone {
			if err := emitTo(s.o.Emit, o); err != nil {
				return err
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// findings of a flush, all of them read after the listing.
type evidence struct {
	known    []bool  // by place in kept
	jobs     []int64 // likewise, the restore that may be writing it; 0: none
	floor    int64
	recorded map[string]bool // keys of records that there are
}

// read looks for the kept files in all that may know them.
func (s *search) read(ctx context.Context) (*evidence, error) {
	jobs, revision, err := s.refresh(ctx)
	if err != nil {
		return nil, err
	}
	f := &evidence{known: make([]bool, len(s.kept)), jobs: make([]int64, len(s.kept))}
	places := make(map[string]int, len(s.kept))
	collections := map[int64]*catalog.Collection{}
	for i := range s.kept {
		k := &s.kept[i]
		k.claims = s.land.over(s.alias, k.info.Key)
		places[k.info.Key] = i
		for _, c := range k.claims {
			collections[c.col.ID] = c.col
		}
		for id, job := range jobs {
			if s.writes(job, k.info.Key) {
				f.known[i], f.jobs[i] = true, id
			}
		}
	}
	for _, col := range collections {
		if err := s.g.refs.ready(ctx, col.ID, revision); err != nil {
			return nil, err
		}
		if err := s.scan(ctx, col, places, f.known); err != nil {
			return nil, err
		}
	}
	for i := range s.kept {
		if !f.known[i] {
			f.known[i] = s.g.referenced(s.kept[i].info.Key, s.kept[i].claims)
		}
	}
	return f, s.readRecords(ctx, f)
}

// refresh makes sure that the territory is current, and reads the restore jobs
// that have not ended, by their ids.
func (s *search) refresh(ctx context.Context) (jobs map[int64]*storagev1.Job, revision int64, err error) {
	from, to := meta.Prefix(keys.JobPrefix)
	for range maxAttempts {
		res, err := s.g.kv.Txn(ctx, meta.Txn{If: []meta.Cond{s.land.unchanged()}, Then: []meta.Op{meta.GetRange(from, to)}})
		if err != nil {
			return nil, 0, fmt.Errorf("read restore jobs: %w", err)
		}
		if !res.Succeeded {
			if s.land, err = s.g.readTerritory(ctx); err != nil {
				return nil, 0, err
			}
			continue
		}
		jobs = map[int64]*storagev1.Job{}
		for _, kv := range res.Ranges[0] {
			job := &storagev1.Job{}
			if err := record.Decode(kv, job); err != nil {
				return nil, 0, err
			}
			id, err := keys.LastID(kv.Key)
			if err != nil {
				return nil, 0, err
			}
			const completed, canceled = 3, 5 // those that have ended are from the one to the other
			if state := job.GetState(); state < completed || state > canceled {
				jobs[id] = job
			}
		}
		return jobs, res.Revision, nil
	}
	return nil, 0, fmt.Errorf("%w: the collections change all the time", catalog.ErrConflict)
}

// writes says whether a restore may be writing an object: it lies under one of
// its roots, and its path has one of its ids.
func (s *search) writes(job *storagev1.Job, key string) bool {
	for _, root := range job.GetRoots() {
		path, ok := strings.CutPrefix(key, root.GetPrefix())
		if !ok || !s.land.isStore(root.GetStore(), s.alias) {
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

// scan marks which of the files at places a segment, unit or tombstone of the
// collection has. Of a parked unit only the id is looked at, by readRecords: its
// files that do not carry that id are among the references of who holds it.
func (s *search) scan(ctx context.Context, col *catalog.Collection, places map[string]int, known []bool) error {
	var key []byte
	mark := func(seg *segment.Segment) {
		for f := range seg.AllFiles() {
			if f.Root >= len(col.Roots) || !s.land.isStore(col.Roots[f.Root].Store, s.alias) {
				continue
			}
			key = append(append(key[:0], col.Roots[f.Root].Prefix...), f.Path...)
			if at, ok := places[string(key)]; ok {
				known[at] = true
			}
		}
	}
	_, err := s.g.o.Catalog.ScanSegments(ctx, col.ID, 0, func(batch []segment.Segment) error {
		for i := range batch {
			mark(&batch[i])
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the segments of collection %s: %w", col, err)
	}
	// The units come before their tombstones, so that one that is granted
	// meanwhile is found as the one or the other.
	for _, prefix := range []string{keys.UnitPrefix(col.ID), keys.TombPrefix(col.ID)} {
		from, to := meta.Prefix(prefix)
		if _, err := s.g.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
			for _, kv := range batch {
				u, err := unitIn(col.ID, kv)
				if err != nil && !errors.Is(err, catalog.ErrParked) {
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

// unitIn reads a unit from its record or its tombstone.
func unitIn(collection int64, kv meta.KeyValue) (catalog.Unit, error) {
	if strings.HasPrefix(kv.Key, keys.AllTombsPrefix) {
		t, err := DecodeTombstone(kv)
		if err != nil {
			return catalog.Unit{}, err
		}
		return t.Unit, nil
	}
	return catalog.DecodeUnit(collection, kv)
}

// referenced says whether a committed snapshot references a file, or the segment
// or build that it is of by its path. The references must be ready.
func (g *GC) referenced(key string, claims []claim) bool {
	for _, c := range claims {
		for _, w := range wantedOf(c, key) {
			if _, n := g.refs.holders(c.col.ID, w); n > 0 {
				return true
			}
		}
	}
	return false
}

// wantedOf is what a snapshot would reference of a file.
func wantedOf(c claim, key string) []wanted {
	files := slices.Values([]uint64{manifest.FileHash(c.col.Roots[c.root].Store, key)})
	collection, _, id, ok := segment.NativePlace(c.path)
	if ok && collection == c.col.ID {
		list := []wanted{{segment: id, files: files}}
		if build := nativeBuild(c.path); build > 0 {
			list = append(list, wanted{build: build})
		}
		return list
	}
	list := []wanted{{files: files}}
	for _, id := range segment.IDsIn(c.path) {
		list = append(list, wanted{segment: id}, wanted{build: id})
	}
	return list
}

// nativeBuild is what may be the id of a build in a path of the native layout: the
// fifth element. It may be that of a field as well. 0: there is none.
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

// recordsOf are the records that keep a file from being left over: of its segment,
// as a unit or not, of whatever claims the segment's id, and of its build. The prefix is that of the keys of other
// units of the segment.
func recordsOf(collection int64, path string) (list []string, prefix string) {
	_, _, id, _ := segment.NativePlace(path)
	list = []string{keys.Segment(collection, id), keys.Unit(collection, id), keys.Tomb(collection, id), keys.OwnerSegment(id)}
	if build := nativeBuild(path); build > 0 {
		list = append(list, keys.Unit(collection, build), keys.Tomb(collection, build))
	}
	return list, keys.ReplacedPrefix(collection, id)
}

// left returns the path of a file that has the place of a segment's file in the
// collection's native layout.
func (s *search) left(k *suspect) (path string, ok bool) {
	for _, c := range k.claims {
		if c.col.ID != s.col.ID || c.col.Layout != catalog.LayoutNative {
			continue
		}
		if collection, _, _, placed := segment.NativePlace(c.path); placed && collection == s.col.ID {
			return c.path, true
		}
	}
	return "", false
}

// readRecords reads what records there are of the segments and builds whose files
// may be left over, in every collection that has a root there, and the floor.
func (s *search) readRecords(ctx context.Context, f *evidence) error {
	var points, prefixes []string
	for i := range s.kept {
		path, ok := s.left(&s.kept[i])
		if f.known[i] || !ok {
			continue
		}
		for _, c := range s.kept[i].claims {
			list, prefix := recordsOf(c.col.ID, path)
			points, prefixes = append(points, list...), append(prefixes, prefix)
		}
	}
	slices.Sort(points)
	slices.Sort(prefixes)
	f.recorded = map[string]bool{}
	points, prefixes = slices.Compact(points), slices.Compact(prefixes)
	for first := true; first || len(points) > 0; first = false {
		n := min(2*sweepUnits, len(points))
		there, floor, err := s.g.present(ctx, points[:n])
		if err != nil {
			return fmt.Errorf("read segments: %w", err)
		}
		for key := range there {
			f.recorded[key] = true
		}
		f.floor, points = max(f.floor, floor, s.o.Floor), points[n:]
	}
	for part := range slices.Chunk(prefixes, sweepGets) {
		gets := make([]meta.Op, len(part))
		for i, prefix := range part {
			gets[i] = meta.GetRange(meta.Prefix(prefix))
		}
		res, err := s.g.kv.Txn(ctx, meta.Txn{Then: gets})
		if err != nil {
			return fmt.Errorf("read units: %w", err)
		}
		for i, prefix := range part {
			if len(res.Ranges[i]) > 0 {
				f.recorded[prefix] = true
			}
		}
	}
	return nil
}

// unregistered is about a file that has the place of a segment's file, and that
// the segment does not have. It may be about to be registered.
const unregistered = "not registered; it lies where segment %d has its files, and stays as long as that segment or a snapshot of it does"

// judge says why a file that nothing knows is what it is, and whether it may be
// deleted.
func (s *search) judge(ctx context.Context, k *suspect, f *evidence) (reason string, deletable bool, err error) {
	path, ok := s.left(k)
	switch {
	case s.col.Layout != catalog.LayoutNative:
		return fmt.Sprintf("nothing knows it; only files of the native layout can be deleted, and this one is %v: left alone", s.col.Layout), false, nil
	case !ok:
		return "not a path of a segment of the collection: left alone", false, nil
	}
	_, partition, id, _ := segment.NativePlace(path)
	ids := []int64{id}
	if partition > 0 {
		ids = append(ids, partition)
	}
	missing, handedOut, err := s.g.o.Catalog.HandedOut(ctx, ids...)
	if err != nil {
		return "", false, err
	}
	switch {
	case !handedOut:
		return fmt.Sprintf("it carries id %d, which was never handed out: left alone", missing), false, nil
	case id < f.floor:
		return fmt.Sprintf("the record of segment %d may have been lost when the metadata store went back in time: left alone", id), false, nil
	}
	for _, c := range k.claims {
		if c.col.ID != s.col.ID || c.path != path {
			if other, _, _, placed := segment.NativePlace(c.path); placed && other == c.col.ID {
				return fmt.Sprintf("it also has the place of a file of collection %s: left alone", c.col), false, nil
			}
		}
		list, prefix := recordsOf(c.col.ID, path)
		if slices.ContainsFunc(append(list, prefix), func(key string) bool { return f.recorded[key] }) {
			return fmt.Sprintf(unregistered, id), false, nil
		}
	}
	return fmt.Sprintf("no segment, unit or snapshot knows it; segment %d is not there", id), true, nil
}
