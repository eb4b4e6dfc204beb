package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

// guard is the object store below all replicas. It checks each delete when it reaches
// the store against the content of both stores, without knowledge of its reason.
type guard struct {
	object.Store
	kv     meta.KV
	reader *Manager // without faults, and not run

	mu       sync.Mutex
	foreign  map[string]bool           // keys that must not change
	granted  map[string]bool           // keys of the files of all tombstones so far
	captured map[int64]map[string]bool // keys of the files of committed snapshots
	wrong    string                    // the first violation
	swept    int64                     // objects of snapshots and units without a record
	late     int64                     // copies of jobs that had ended
}

func newGuard(kv meta.KV, store object.Store) *guard {
	return &guard{
		Store: store, kv: kv, foreign: map[string]bool{}, granted: map[string]bool{},
		captured: map[int64]map[string]bool{},
	}
}

// leave marks an object that must not be changed.
func (g *guard) leave(key string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.foreign[key] = true
}

func (g *guard) isForeign(key string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.foreign[key]
}

// first returns the first violation, empty if there is none.
func (g *guard) first() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.wrong
}

func (g *guard) counts() (swept, late int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.swept, g.late
}

func (g *guard) has(key string) bool {
	_, err := g.Head(context.Background(), key)
	return err == nil
}

func (g *guard) blame(format string, args ...any) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.wrong == "" {
		g.wrong = fmt.Sprintf(format, args...)
	}
}

func (g *guard) Put(ctx context.Context, key string, body []byte) (object.Info, error) {
	if g.isForeign(key) {
		g.blame("%s is overwritten, which is foreign", key)
	}
	return g.Store.Put(ctx, key, body)
}

func (g *guard) Copy(ctx context.Context, r object.CopyRequest) (object.Info, error) {
	if g.isForeign(r.To) {
		g.blame("%s is overwritten, which is foreign", r.To)
	}
	return g.Store.Copy(ctx, r)
}

func (g *guard) Delete(ctx context.Context, list ...string) error {
	if slices.ContainsFunc(list, func(key string) bool { return !isNote(key) || g.isForeign(key) }) {
		n, err := g.needs() //nolint:contextcheck // the oracle looks, whatever becomes of the caller
		if err != nil {
			g.blame("what is needed cannot be read: %v", err)
			return g.Store.Delete(ctx, list...)
		}
		for _, key := range list {
			if why := g.judge(n, key); why != "" {
				g.blame("%s is deleted: %s", key, why)
			}
		}
	}
	return g.Store.Delete(ctx, list...)
}

// isNote reports whether a key is that of a heartbeat of the metadata store, of which a
// surplus is legal and a lack is not: see package epoch.
func isNote(key string) bool { return strings.HasPrefix(key, epoch.Prefix) }

// needs are the files needed at a revision.
type needs struct {
	files     map[string]string // holder by key
	snapshots map[int64]snapshot.State
	units     map[string]bool // keys of the objects of units that are not granted
	jobs      map[int64]*copyjob.Job
}

// needs reads the records that need files, at one revision.
func (g *guard) needs() (*needs, error) {
	ctx := context.Background()
	prefixes := []string{
		keys.SnapshotPrefix, "/catalog/segment/", keys.AllUnitsPrefix,
		keys.AllTombstonesPrefix, keys.JobPrefix,
	}
	txn := meta.Txn{}
	for _, prefix := range prefixes {
		txn.Then = append(txn.Then, meta.GetRange(meta.Prefix(prefix)))
	}
	res, err := g.kv.Txn(ctx, txn)
	if err != nil {
		return nil, err
	}
	n := &needs{
		files: map[string]string{}, snapshots: map[int64]snapshot.State{}, units: map[string]bool{},
		jobs: map[int64]*copyjob.Job{},
	}
	add := func(s *segment.Segment, who string) {
		for f := range s.AllFiles() {
			n.files[keyOf(f)] = who
		}
	}
	for _, kv := range res.Ranges[4] {
		job, err := copyjob.DecodeJob(kv)
		if err != nil {
			return nil, err
		}
		n.jobs[job.Target] = job
	}
	for _, kv := range res.Ranges[0] {
		s, err := snapshot.Decode(kv)
		if err != nil {
			return nil, err
		}
		n.snapshots[s.ID] = s.State
		if s.State == snapshot.Committed {
			if err := g.capture(ctx, s, n); err != nil {
				return nil, err
			}
		}
	}
	for _, kv := range res.Ranges[1] {
		collection, id, err := keys.LastTwo(kv.Key)
		if err != nil {
			return nil, err
		}
		if job := n.jobs[collection]; job != nil && job.Phase == copyjob.RollBack {
			continue
		}
		s, err := catalog.DecodeSegment(collection, kv)
		if err != nil {
			return nil, err
		}
		add(&s, fmt.Sprintf("segment %d of collection %d has it", id, collection))
	}
	for _, kv := range res.Ranges[2] {
		collection, id, err := keys.LastTwo(kv.Key)
		if err != nil {
			return nil, err
		}
		n.units[catalog.SpillKey(collection, id)] = true
		u, err := g.reader.catalog.ReadUnit(ctx, collection, kv)
		if err != nil {
			if now, found, _, getErr := g.kv.Get(ctx, kv.Key); getErr == nil && found && now.ModRevision == kv.ModRevision {
				return nil, err
			}
			continue // granted meanwhile
		}
		add(&u.Segment, fmt.Sprintf("unit %d of collection %d has it and is not granted", id, collection))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, kv := range res.Ranges[3] {
		t, err := gc.DecodeTombstone(kv)
		if err != nil {
			return nil, err
		}
		for f := range t.Unit.Owned() {
			g.granted[keyOf(f)] = true
		}
	}
	return n, nil
}

// capture adds the files of a committed snapshot.
func (g *guard) capture(ctx context.Context, s *snapshot.Record, n *needs) error {
	g.mu.Lock()
	files := g.captured[s.ID]
	g.mu.Unlock()
	if files == nil {
		files = map[string]bool{}
		err := g.reader.Segments(ctx, Ref{ID: s.ID}, 0, func(seg *snapshot.Segment) bool {
			for f := range seg.AllFiles() {
				files[keyOf(f)] = true
			}
			return true
		})
		if errors.Is(err, ErrSnapshotNotFound) || errors.Is(err, snapshot.ErrNotCommitted) { // dropped meanwhile
			return nil
		}
		if err != nil {
			return err
		}
		g.mu.Lock()
		g.captured[s.ID] = files
		g.mu.Unlock()
	}
	for key := range files {
		n.files[key] = fmt.Sprintf("snapshot %s has it", s)
	}
	return nil
}

// judge returns the reason why a key must not be deleted now, empty if it may.
func (g *guard) judge(n *needs, key string) string {
	g.mu.Lock()
	defer g.mu.Unlock()
	path, data := strings.CutPrefix(key, "data/")
	switch {
	case g.foreign[key]:
		return "it is foreign"
	case data && n.files[key] != "":
		return n.files[key]
	case data && g.granted[key]:
		return ""
	case data:
		collection, _, _, _ := segment.NativePlace(path)
		job := n.jobs[collection]
		switch {
		case job != nil && job.State.Ended():
			g.late++
			return ""
		case job != nil && job.Phase == copyjob.RollBack:
			return ""
		}
		return "it was never granted, and is not of a restore that is rolled back"
	case strings.HasPrefix(key, catalog.SpillPrefix):
		if n.units[key] {
			return "its unit is not granted"
		}
		g.swept++
		return ""
	case isNote(key):
		return ""
	case strings.HasPrefix(key, catalog.RestorePrefix):
		for _, job := range n.jobs {
			if strings.HasPrefix(key, catalog.RestoreDir(job.ID)) && !job.State.Ended() && job.Phase != copyjob.RollBack {
				return fmt.Sprintf("job %d copies by it", job.ID)
			}
		}
		return ""
	}
	_, id, ok := manifest.ParseKey(key)
	state, there := n.snapshots[id]
	switch {
	case !ok:
		return "it has no owner"
	case !there:
		g.swept++
		return ""
	case state != snapshot.Deleting:
		return fmt.Sprintf("snapshot %d is %v", id, state)
	}
	return ""
}

// foreignPlaces is the number of kinds of places for foreign objects.
const foreignPlaces = 18

// putForeign writes a foreign object to a place of one kind.
func (c *course) putForeign(kind, n int) {
	l := c.cols[n%len(c.cols)]
	col, unit, snapshot := l.col.ID, l.col.ID, int64(1)
	if id, ok := pickOf(c.snapshots, n); ok {
		snapshot = id
	}
	if id, ok := pickOf(l.live(), n); ok && n%2 == 0 {
		unit = id
	} else if id, ok := pickOf(l.grants, n); ok {
		unit = id
	}
	target, first := col, unit
	if id, ok := pickOf(c.jobs, n); ok {
		target, first = c.jobs[id].Target, c.jobs[id].FirstSegment
	}
	dir := [foreignPlaces]string{
		"", "snapshots/", fmt.Sprintf("snapshots/%d/", col), manifest.Dir(col, snapshot),
		manifest.Dir(col, snapshot) + "more/",
		"gc/", "gc/held/", fmt.Sprintf("gc/held/%d/", col), "gc/epoch/",
		"data/", fmt.Sprintf("data/%d/", col), fmt.Sprintf("data/%d/%d/", col, l.part.ID),
		fmt.Sprintf("data/%d/0/%d/", col, unit), fmt.Sprintf("data/%d/%d/%d/insert/100/", col, l.part.ID, unit),
		fmt.Sprintf("data/%d/", target), fmt.Sprintf("data/%d/0/%d/insert/", target, first),
		// Of another cluster, or with an id that was never allocated.
		fmt.Sprintf("snapshots/%d/%d/", col, int64(1)<<50+c.names.Add(1)), "gc/held/" + fmt.Sprint(int64(1)<<50) + "/",
	}[kind%foreignPlaces]
	key := fmt.Sprintf("%snote-%d", dir, c.names.Add(1))
	switch kind % foreignPlaces {
	case 16:
		key = dir + manifest.MetadataName
	case 17:
		key = fmt.Sprintf("%s%d", dir, int64(1)<<50+c.names.Add(1))
	}
	c.foreign[key] = true
	c.guard.leave(key)
	c.put(key)
}
