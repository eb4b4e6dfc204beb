package manager

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// restore restores a committed snapshot.
func (c *course) restore(m *member, s step) {
	id, ok := pickOf(c.committed(), s.C)
	if !ok || len(c.cols)+len(c.underWay()) > 6 {
		return
	}
	n := c.names.Add(1)
	var tok request.Token
	if c.long { // tokens last for a day
		tok = token(fmt.Sprint(n), fmt.Sprint(n))
		tok.Method = "RestoreSnapshot"
	}
	sp := &RestoreSpec{Snapshot: Ref{ID: id}, DB: "default", Name: fmt.Sprint("t", n), SkipIndexes: s.C%4 == 0}
	if s.C%5 == 0 {
		sp.Timeout = 5 * time.Second
	}
	c.call(func(ctx context.Context) { _, _ = m.Restore(ctx, tok, sp) })
}

// collect makes a round for all collections or one.
func (c *course) collect(m *member, s step) {
	o := collect.CycleOptions{DryRun: s.C%5 == 0}
	if s.C%3 == 0 {
		o.Tolerance = new(time.Duration)
	}
	if s.C%2 == 0 {
		o.Collection = catalog.Ref{ID: c.cols[s.A%len(c.cols)].col.ID}
	}
	c.call(func(ctx context.Context) {
		_, _ = m.Collect(ctx, o)
		if s.C%2 == 0 {
			_, _ = m.Collector.Sweep(ctx, collect.SweepOptions{DryRun: s.C%5 == 0})
		}
	})
}

// underWay returns the jobs that have not ended.
func (c *course) underWay() map[int64]*copyjob.Job {
	list := map[int64]*copyjob.Job{}
	for id, job := range c.jobs {
		if !job.State.Ended() {
			list[id] = job
		}
	}
	return list
}

func (c *course) dropCollection(l *ledger) {
	_, err := c.cat.DropCollection(context.Background(), noToken, catalog.Ref{ID: l.col.ID}, 0)
	c.must(err)
	revision := c.revisionOf(keys.Collection(l.col.ID))
	l.dropped = true
	maps.Copy(l.orphans, l.live())
	l.history = append(l.history, state{revision, map[int64]segment.Segment{}})
}

// sawJob follows the jobs. The target of a COMPLETED job holds the content of its
// snapshot and is from then on an ordinary collection.
func (c *course) sawJob(e meta.Event) {
	id, err := keys.LastID(e.KV.Key)
	c.must(err)
	if e.Deleted {
		if old := c.jobs[id]; old == nil || !old.State.Ended() {
			c.wrong("job %d is forgotten, and was %+v", id, old)
		}
		return
	}
	job, err := copyjob.DecodeJob(e.KV)
	c.must(err)
	old := c.jobs[id]
	c.jobs[id] = job
	if old != nil && old.State.Ended() {
		if old.State != job.State {
			c.wrong("job %d was %v and is %v", id, old.State, job.State)
		}
		return
	}
	switch job.State {
	case copyjob.Failed, copyjob.Canceled:
		c.reach.rolledBack.Add(1)
	case copyjob.Completed:
		c.reach.restored.Add(1)
		c.adopt(job, e.KV.ModRevision)
	case copyjob.Pending, copyjob.Executing:
	}
}

// adopt starts a ledger for the target of a restore.
func (c *course) adopt(job *copyjob.Job, revision int64) {
	ctx := context.Background()
	col, err := c.cat.Collection(ctx, catalog.Ref{ID: job.Target})
	c.must(err)
	if col.State != catalog.Active {
		c.wrong("job %d is COMPLETED, and its target is %v", job.ID, col.State)
	}
	want := map[string]bool{}
	for _, s := range c.snapshots[job.Snapshot].segments {
		for i := range s.Files {
			want[string(c.content[keyOf(&s.Files[i])])] = true
		}
		for _, b := range s.Builds {
			for i := range b.Files {
				if !job.SkipIndexes {
					want[string(c.content[keyOf(&b.Files[i])])] = true
				}
			}
		}
	}
	segments, got := map[int64]segment.Segment{}, map[string]bool{}
	_, err = c.cat.ScanSegments(ctx, job.Target, 0, func(batch []segment.Segment) error {
		for _, s := range batch {
			segments[s.ID] = s
			for f := range s.AllFiles() {
				data, there := c.object(keyOf(f))
				if !there {
					c.wrong("job %d is COMPLETED, and %s is not there", job.ID, keyOf(f))
				}
				c.content[keyOf(f)] = data
				got[string(data)] = true
			}
		}
		return nil
	})
	c.must(err)
	if diff := cmp.Diff(want, got); diff != "" {
		c.wrong("job %d has copied: %s", job.ID, diff)
	}
	c.take(col, revision, segments)
}

// sawEnd checks that nothing of a collection is left when its record is removed.
func (c *course) sawEnd(e meta.Event) {
	id, err := keys.LastID(e.KV.Key)
	c.must(err)
	i := slices.IndexFunc(c.cols, func(l *ledger) bool { return l.col.ID == id })
	if i < 0 {
		return // target of a rolled back restore
	}
	l := c.cols[i]
	if !l.dropped {
		c.wrong("collection %d is gone, and was not dropped", id)
	}
	c.finished = append(c.finished, l)
	c.reach.finished.Add(1)
}

// finish ends everything. Afterwards only permanent keys and objects may be left.
func (c *course) finish() {
	ctx := context.Background()
	c.repair()
	for _, m := range c.ever {
		m.thaw()
	}
	for _, m := range c.replicas {
		m.heal()
		c.between(m, nil)
	}
	c.rest(15 * time.Minute) // leases expire, and calls in flight end
	c.flying.Wait()
	for id := range c.underWay() {
		_, _ = c.replicas[0].Jobs.Cancel(ctx, id)
	}
	c.rest(15 * time.Minute)
	if left := c.underWay(); len(left) > 0 {
		c.wrong("jobs do not end: %+v", left)
	}
	c.rightModel()
	m := c.replicas[0]
	c.env.check(m.testReplica)
	for _, p := range c.pins {
		c.must(m.Unpin(ctx, Ref{ID: p.Snapshot}, p.ID))
	}
	for id := range c.committed() {
		_, err := m.Drop(ctx, noToken, Ref{ID: id}, 0)
		c.must(err)
	}
	c.rest(30 * time.Minute)
	c.nothingDropped()
	for i, l := range c.cols {
		if l.dropped {
			continue
		}
		if len(l.live()) > 0 && i%2 == 0 { // the others are dropped with their collection
			c.change(l, catalog.SegmentChange{Drop: slices.Sorted(maps.Keys(l.live()))}, map[int64]segment.Segment{})
			c.reclaim(c.replicas[i%3], l, c.asks(l, 0), gc.BySnapshotd)
		}
		c.rest(0)
		c.dropCollection(l)
	}
	c.rest(time.Minute)
	for _, l := range c.cols {
		c.confirm(m, l, false)
	}
	c.rest(time.Minute)
	// A single, newly started replica does the rest.
	for i := range c.replicas {
		c.replicas[i].heal()
		c.replicas[i].stop()
	}
	c.ending = true
	c.start(0)
	switch {
	case c.long: // tokens last for 25 hours, jobs for a week
		c.rest(8 * 24 * time.Hour)
	default:
		c.rest(26 * time.Hour)
	}
	c.nothingLeft()
}

// nothingDropped checks that no dropped unit is left while collections exist.
func (c *course) nothingDropped() {
	parts, _, err := c.cat.DroppedChildren(context.Background(), 0)
	// Units of a dropped collection are removed with it.
	parts = slices.DeleteFunc(parts, func(p catalog.Child) bool { return c.ledgerOf(p.Collection).dropped })
	if err != nil || len(parts) > 0 {
		c.wrong("dropped partitions and indexes are left: %v, err = %v", parts, err)
	}
	for _, l := range c.cols {
		if len(l.units)+len(l.orphans)+len(l.builds) > 0 {
			c.wrong("dropped units %v, segments %v and builds %v are left of collection %d, which has no snapshots",
				slices.Collect(maps.Keys(l.units)), slices.Collect(maps.Keys(l.orphans)),
				slices.Collect(maps.Keys(l.builds)), l.col.ID)
		}
	}
}

// rightModel checks that the oracle's content of each snapshot is correct.
func (c *course) rightModel() {
	for id, s := range c.committed() {
		files := 0
		err := c.reader.Segments(context.Background(), Ref{ID: id}, 0, func(seg *snapshot.Segment) bool {
			want, ok := s.segments[seg.ID]
			if !ok || len(want.Files) != len(seg.Files) || len(want.Builds) != len(seg.Builds) {
				c.wrong("snapshot %s has segment %d with %d files and builds %v, and should %v: %d files and builds %v",
					s.name, seg.ID, len(seg.Files), buildIDs(&seg.Segment), ok, len(want.Files), buildIDs(&want))
			}
			for f := range seg.AllFiles() {
				files++
				if !s.files[keyOf(f)] {
					c.wrong("snapshot %s has %s", s.name, f.Path)
				}
			}
			return true
		})
		if err != nil || files != len(s.files) {
			c.wrong("snapshot %s has %d files, want %d; err = %v", s.name, files, len(s.files), err)
		}
	}
}

// nothingLeft checks that only permanent keys and objects are left at the end.
func (c *course) nothingLeft() {
	want := map[string]bool{
		keys.Format:           true, // the cluster id, permanent
		keys.IDs:              true, // the allocated ids, permanent
		keys.Epoch:            true, // the last heartbeat
		keys.Leader:           true, // under the lease of the current leader
		keys.Clock:            true, // the last recorded time, overwritten by the next
		keys.Cycle:            true, // the last round, overwritten by the next
		keys.Store("default"): true, // the identity of the store
	}
	optional := map[string]bool{
		keys.Unpin: true, // the last removed pin, overwritten by the next
	}
	workers := 0
	got := map[string]bool{}
	for _, key := range c.env.keysUnder("/") {
		switch {
		case strings.HasPrefix(key, keys.WorkerPrefix): // under the lease of a running replica
			workers++
		case strings.HasPrefix(key, keys.GonePrefix): // the gone ids, permanent
		case !optional[key]:
			got[key] = true
		}
	}
	if diff := cmp.Diff(want, got); diff != "" || workers != 1 {
		c.wrong("keys are left, or gone; workers: %d: %s", workers, diff)
	}
	objects := maps.Clone(c.foreign)
	objects[identity.Key] = true // the identity of the store
	beats := 0
	found := map[string]bool{}
	for _, key := range c.env.objectsUnder("") {
		if strings.HasPrefix(key, epoch.Prefix) &&
			!c.foreign[key] { // the newest two heartbeats
			beats++
			continue
		}
		found[key] = true
	}
	if diff := cmp.Diff(objects, found); diff != "" || beats != 2 {
		c.wrong("objects are left, or gone; beats: %d: %s", beats, diff)
	}
	for key := range c.foreign {
		if data, _ := c.object(key); !bytes.Equal(data, c.content[key]) {
			c.wrong("%s, which is foreign, holds %q", key, data)
		}
	}
	c.nothingDropped()
	if len(c.finished) != len(c.cols) {
		c.wrong("%d of %d collections are gone", len(c.finished), len(c.cols))
	}
	s := c.replicas[0].GC.Stats()
	if s.Snapshots+s.Loading+s.Unreadable+s.Segments+s.Builds+s.Granted+s.Unconfirmed != 0 {
		c.wrong("all is gone, and there is %+v", s)
	}
	swept, lateCopies := c.guard.counts()
	c.reach.swept.Add(swept)
	c.reach.lateCopies.Add(lateCopies)
}
