package manager

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/identity"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// itself stands in a precondition for the key that is written.
const itself = "itself"

// precondition is the set of compares that a write of a key requires.
type precondition struct {
	kind   meta.OpKind
	prefix string
	// compares are alternatives: a write must make all compares of one of them.
	compares [][]string
}

func (p *precondition) name() string {
	return map[meta.OpKind]string{meta.OpPut: "put of ", meta.OpDelete: "delete of "}[p.kind] + p.prefix
}

const (
	recs       = keys.SnapshotPrefix
	namesOf    = "/snapshot/name/"
	segments   = "/catalog/segment/"
	generation = "/gc/gen/"
	owners     = "/catalog/owner/"
)

// preconditions are those of all writes, matched by the first prefix. Writes of the leader's
// loops compare the leader's key; writes of a worker compare its assignment.
var preconditions = []precondition{
	{meta.OpPut, keys.Format, [][]string{{itself}}},
	{meta.OpPut, keys.IDs, [][]string{{itself, keys.RolledBack}}},
	{meta.OpPut, keys.Epoch, [][]string{{itself, keys.RolledBack}}},
	{meta.OpPut, keys.RolledBack, [][]string{{itself, keys.Epoch}}},
	{meta.OpDelete, keys.RolledBack, [][]string{{itself, keys.Epoch, keys.IDs}}},
	{meta.OpPut, keys.Clock, [][]string{{itself}}},
	{meta.OpPut, keys.Leader, [][]string{{itself}}},
	{meta.OpPut, keys.Store(""), [][]string{{itself}}},

	{meta.OpPut, recs, [][]string{{itself}, {namesOf, keys.CollectionPrefix}}},
	{meta.OpDelete, recs, [][]string{{itself, keys.Leader}}},
	{meta.OpPut, namesOf, [][]string{{itself, keys.CollectionPrefix}}},
	{meta.OpDelete, namesOf, [][]string{{recs}}},
	{meta.OpPut, pendingKeys, [][]string{{namesOf, keys.CollectionPrefix}}},
	{meta.OpDelete, pendingKeys, [][]string{{recs}}},
	{meta.OpPut, generation, [][]string{{recs, pendingKeys}}},
	{meta.OpDelete, generation, [][]string{{
		keys.CollectionPrefix, keys.AllTombstonesPrefix,
		keys.AllUnitsPrefix, segments, pendingKeys, keys.RolledBack,
	}}},
	{meta.OpPut, keys.AllPinsPrefix, [][]string{{recs}, {itself}}},
	{meta.OpDelete, keys.AllPinsPrefix, [][]string{{itself}, {keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, keys.Unpin, [][]string{{keys.AllPinsPrefix}, {keys.JobPrefix, keys.Leader}}},

	{meta.OpPut, "/request/", [][]string{{itself}, {recs}, {keys.JobPrefix, keys.Leader}}},

	{meta.OpDelete, "/request/", [][]string{{itself, keys.Leader}}},

	{meta.OpPut, keys.JobPrefix, [][]string{{itself}, {recs, keys.CollectionPrefix}}},
	{meta.OpDelete, keys.JobPrefix, [][]string{{itself, keys.Leader}}},
	{
		meta.OpPut, keys.AllTasksPrefix,
		[][]string{{keys.JobPrefix, keys.Leader}, {itself, keys.JobPrefix, keys.AssignedPrefix}},
	},
	{meta.OpDelete, keys.AllTasksPrefix, [][]string{{keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, keys.AllProgressPrefix, [][]string{{keys.JobPrefix, keys.AssignedPrefix}}},
	{
		meta.OpDelete, keys.AllProgressPrefix,
		[][]string{{keys.JobPrefix, keys.Leader}, {keys.JobPrefix, keys.AssignedPrefix}},
	},
	{meta.OpPut, keys.LimitsPrefix, [][]string{{keys.JobPrefix}, {recs, keys.CollectionPrefix}}},
	{meta.OpDelete, keys.LimitsPrefix, [][]string{{keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, keys.WorkerPrefix, [][]string{{itself}}},
	{meta.OpPut, keys.AssignedPrefix, [][]string{{keys.JobPrefix, keys.Leader}}},
	{meta.OpDelete, keys.AssignedPrefix, [][]string{{itself}, {keys.JobPrefix, keys.Leader}}},

	{meta.OpPut, keys.AllTombstonesPrefix, [][]string{
		{generation, keys.RolledBack, keys.AllUnitsPrefix, pendingKeys}, {
			generation, keys.RolledBack,
			segments, pendingKeys,
		}, // of a dropped collection
	}},
	{meta.OpDelete, keys.AllTombstonesPrefix, [][]string{{itself}}},
	{meta.OpPut, keys.Cycle, [][]string{{keys.Leader}}},

	{meta.OpPut, "/catalog/name/", [][]string{{itself}}},
	{meta.OpDelete, "/catalog/name/", [][]string{{keys.CollectionPrefix}, {keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, keys.CollectionPrefix, [][]string{{itself}}},
	{meta.OpDelete, keys.CollectionPrefix, [][]string{{itself, keys.RolledBack}, {keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, segments, [][]string{{keys.CollectionPrefix}, {keys.JobPrefix, keys.AssignedPrefix}}},
	{
		meta.OpDelete, segments,
		[][]string{{itself}, {keys.JobPrefix, keys.Leader}, {keys.CollectionPrefix, segments, keys.RolledBack}},
	},
	{meta.OpPut, keys.AllUnitsPrefix, [][]string{{segments}, {itself}}},
	{
		meta.OpDelete, keys.AllUnitsPrefix,
		[][]string{{itself, generation, keys.RolledBack, pendingKeys}, {keys.CollectionPrefix, keys.RolledBack}},
	},
	{meta.OpPut, keys.OwnerRangePrefix, [][]string{{recs, keys.CollectionPrefix, owners}}},
	{meta.OpDelete, keys.OwnerRangePrefix, [][]string{{keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, keys.GonePrefix, [][]string{{itself, keys.AllTombstonesPrefix}, {itself, keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, owners, [][]string{
		{itself, keys.CollectionPrefix, keys.OwnerRangePrefix},
		{keys.JobPrefix, keys.AssignedPrefix},
	}},
	{meta.OpDelete, owners, [][]string{{keys.AllTombstonesPrefix}, {keys.JobPrefix, keys.Leader}}},
	{meta.OpPut, "/catalog/", [][]string{{keys.CollectionPrefix}, {keys.JobPrefix, keys.Leader}, {itself}}},
	{
		meta.OpDelete,
		"/catalog/replaced/",
		[][]string{{keys.AllTombstonesPrefix}, {keys.CollectionPrefix, keys.RolledBack}},
	},
	{meta.OpDelete, "/catalog/", [][]string{
		{itself, keys.RolledBack},
		{itself, keys.CollectionPrefix},
		{keys.CollectionPrefix, keys.RolledBack},
		{keys.JobPrefix, keys.Leader},
	}},
}

// judged is a KV that checks each write against its premises.
type judged struct {
	meta.KV

	mu    sync.Mutex
	wrong map[string]string // by precondition
	seen  map[string]int    // number of writes by precondition
}

// Txn implements [meta.KV].
func (j *judged) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	j.mu.Lock()
	for _, op := range t.Then {
		if op.Kind != meta.OpGet {
			j.judge(&t, op)
		}
	}
	for _, op := range t.Else {
		if op.Kind != meta.OpGet {
			j.wrong[op.From] = "it is written because compares did not hold"
		}
	}
	j.mu.Unlock()
	return j.KV.Txn(ctx, t)
}

func (j *judged) judge(t *meta.Txn, op meta.Op) {
	i := slices.IndexFunc(preconditions, func(p precondition) bool {
		return p.kind == op.Kind &&
			strings.HasPrefix(op.From, p.prefix)
	})
	if i < 0 {
		j.wrong[op.From] = fmt.Sprintf("it is written (%d), and no precondition is known", op.Kind)
		return
	}
	p := preconditions[i]
	j.seen[p.name()]++
	if !slices.ContainsFunc(p.compares, func(all []string) bool {
		return !slices.ContainsFunc(all, func(prefix string) bool { return !compares(t.If, op, prefix) })
	}) {
		j.wrong[p.name()] = fmt.Sprintf("%s is written, and compares %+v; want one of %v", op.From, t.If, p.compares)
	}
}

// compares reports whether one of the compares is on a key under prefix. One on the
// leader's key must compare its creator.
func compares(conds []meta.Cond, op meta.Op, prefix string) bool {
	return slices.ContainsFunc(conds, func(c meta.Cond) bool {
		switch prefix {
		case itself:
			return c.From == op.From || c.To != "" && meta.InRange(op.From, c.From, c.To)
		case keys.Leader:
			return c.From == keys.Leader && c.Target == meta.CreateRevision && c.Op == meta.Equal && c.Revision > 0
		}
		return strings.HasPrefix(c.From, prefix)
	})
}

// TestEveryWriteHasItsPreconditions executes every operation of a cluster and checks
// that each write compares the records that it was decided on: the leader's key in the
// leader's loops, the assignment in workers, and the source records elsewhere.
func TestEveryWriteHasItsPreconditions(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		j := &judged{KV: e.memory, seen: map[string]int{}, wrong: map[string]string{}}
		e.kv = j
		if err := identity.Check(t.Context(), e.kv, e.objects, "default", "test", rand.Reader); err != nil {
			t.Fatal(err)
		}
		e.live()
		e.recovers()
		j.mu.Lock()
		defer j.mu.Unlock()
		for what, text := range j.wrong {
			t.Errorf("%s: %s", what, text)
		}
		for _, p := range preconditions {
			if j.seen[p.name()] == 0 {
				t.Errorf("there was no %s", p.name())
			}
		}
	})
}

// live executes every operation of a cluster, with and without faults.
func (e *env) live() {
	t, ctx := e.t, e.t.Context()
	change := func(o *testOptions) {
		withEpoch(o)
		o.Parts.Collector.Tolerance, o.Parts.Collector.Interval = time.Hour, 10*time.Minute
		o.Parts.Collector.MaxShare, o.Parts.KeepRestores = 1, time.Hour
		o.Parts.StallTimeout = 20 * time.Minute
		o.Catalog = catalog.New(catalog.Options{
			KV: o.KV, Now: o.Now, Rand: o.Rand, Requests: o.Requests, RaiseIDs: o.Epoch.RaiseIDLimit,
			HasStore: func(a string) bool { return a == "default" }, ReadSpilled: catalog.ReadSpilled(o.Stores),
		})
	}
	a, b := e.start("a", change), e.start("b", change)
	col := e.richCollection(a, "c", 40)
	ref := catalog.Ref{ID: col.ID}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}

	// Snapshots: created, updated, pinned, dropped, expired, given up.
	one, err := b.Create(ctx, token("one", "one"), spec(col, "one"))
	must(err)
	text := "described"
	_, err = a.Update(ctx, request.Token{}, Ref{ID: one.ID}, UpdateSpec{Description: &text})
	must(err)
	pin := e.pin(b, one, time.Hour)
	_, err = b.RenewPin(ctx, Ref{ID: one.ID}, pin.ID, 2*time.Hour)
	must(err)
	must(a.Unpin(ctx, Ref{ID: one.ID}, pin.ID))
	soon := spec(col, "soon")
	soon.TTL = time.Minute
	_, err = a.Create(ctx, request.Token{}, soon)
	must(err)
	e.dropSnapshot(b, e.create(a, col, "dropped"))
	b.store.Plan(func(c object.Call) object.Fault {
		if c.Op == object.OpCreate {
			return object.FaultBefore
		}
		return object.FaultNone
	})
	if _, err := b.Create(ctx, token("fails", "fails"), spec(col, "fails")); err == nil {
		t.Error("a snapshot without objects")
	}
	b.store.Plan(nil)
	b.kv.Freeze() // during a create, which the leader abandons
	b.store.Freeze()
	frozen := make(chan error, 1)
	go func() {
		_, err := b.Create(ctx, token("frozen", "frozen"), spec(col, "frozen"))
		frozen <- err
	}()
	b.kv.Thaw()
	settle()
	b.kv.Freeze()
	time.Sleep(3 * time.Minute)
	b.kv.Thaw()
	b.store.Thaw()
	if err := <-frozen; err == nil {
		t.Error("a create that froze")
	}

	// Restores: completed, with limits, canceled during the copy, failed, and with a
	// lost worker.
	sp := restoreSpecOf(one)
	sp.Limits.Requests = 1000
	must(second(b.Restore(ctx, token("restore", "restore"), sp)))
	e.waitEnded(a, e.jobs()[0].ID)
	for _, r := range []*testReplica{a, b} {
		r.store.SetLatency(2 * time.Second)
	}
	sp = restoreSpecOf(one)
	sp.Name = "canceled"
	job := e.restore(b, sp)
	e.waitAssigned()
	_, err = a.Jobs.SetLimits(ctx, job.ID, copyjob.Limits{Requests: 500})
	must(err)
	_, err = a.Jobs.Cancel(ctx, job.ID)
	must(err)
	e.waitEnded(a, job.ID)
	sp.Name = "interrupted"
	job = e.restore(b, sp)
	e.waitAssigned()
	b.kv.Freeze()
	time.Sleep(time.Minute)
	b.kv.Thaw()
	e.waitEnded(a, job.ID)
	for _, r := range []*testReplica{a, b} {
		r.store.SetLatency(0)
	}
	for _, r := range []*testReplica{a, b} {
		failCopies(r)
	}
	sp.Name = "failed"
	e.waitEnded(a, e.restore(b, sp).ID)
	for _, r := range []*testReplica{a, b} {
		r.clearFaults()
	}

	// The catalog, and reclaims: by the engine, by the collector, of spilled units.
	segs := e.segments(a, one)
	e.dropSegments(a, col, segs[0].ID, segs[1].ID)
	replaced := catalog.FilePath{Root: segs[2].Files[1].Root, Path: segs[2].Files[1].Path}
	e.swap(a, col, catalog.SegmentChange{Update: []catalog.Update{{
		Segment:     segs[2].ID,
		RemoveFiles: []catalog.FilePath{replaced},
	}}})
	must(second(a.catalog.DropIndex(ctx, request.Token{}, ref, "x1")))
	must(second(a.catalog.DropPartition(ctx, request.Token{}, ref, "p1")))
	must(second(a.catalog.RenameCollection(ctx, request.Token{}, ref, "default", "renamed")))
	free := e.segment(a, col, 0, 100, 110)
	e.addWritten(a, col, free)
	tombs := e.granted(e.reclaim(a, col, gc.ByCaller, e.dropSegments(a, col, free.ID)...))
	must(second(b.GC.Confirm(ctx, ref, []int64{tombs[0].ID})))
	must(second(e.memory.Txn(ctx, meta.Txn{Then: []meta.Op{ // with a lease that outlasts its expiry
		meta.Put(keys.RequestPrefix+"m/old",
			record.Encode(&storagev1.Request{Format: record.Format, Done: true, ExpireTime: 1})),
	}})))
	time.Sleep(2 * time.Hour)
	e.dropSnapshot(a, one)
	for _, name := range []string{"copy", "interrupted"} {
		must(second(a.catalog.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "default", Name: name}, 0)))
	}
	e.drops(b, col)
	time.Sleep(4 * time.Hour)
	settle()
	if left := e.keysUnder(keys.CollectionPrefix); len(left) > 0 {
		t.Errorf("left: %v; the last round: %+v", left, a.Collector.LastCycle())
	}
}

// recovers rolls the metadata store back, which is detected, and recovers.
func (e *env) recovers() {
	ctx := e.t.Context()
	r := e.start("c", withEpoch)
	e.plantBeat(ctx, r, 1_000_000, 1_000_000)
	if err := r.o.Epoch.Check(ctx); err == nil {
		e.t.Error("the rollback was not detected")
	}
	if _, _, _, err := r.o.Epoch.Recover(ctx, false); err != nil {
		e.t.Error(err)
	}
	e.newID(r)
}
