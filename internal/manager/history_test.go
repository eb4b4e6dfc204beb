package manager

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// history checks all writes to a metadata store, revision by revision.
type history struct {
	t   *testing.T
	now map[string]meta.KeyValue // state before the checked revision

	born      map[int64]bool // snapshots seen
	published map[int64]int  // by job
	granted   map[string]bool
	ended     map[copyjob.State]int
	states    map[string]int // transitions of snapshots
}

func (h *history) wrong(revision int64, format string, args ...any) {
	h.t.Helper()
	h.t.Errorf("revision %d: "+format, append([]any{revision}, args...)...)
}

// judgeHistory follows the store from its first revision.
func (e *env) judgeHistory() *history {
	e.t.Helper()
	h := &history{
		t: e.t, now: map[string]meta.KeyValue{}, born: map[int64]bool{}, published: map[int64]int{},
		granted: map[string]bool{},
		ended:   map[copyjob.State]int{}, states: map[string]int{},
	}
	ctx := e.t.Context()
	_, _, last, err := e.kv.Get(ctx, keys.Format)
	if err != nil {
		e.t.Fatal(err)
	}
	watch := e.kv.Watch(ctx, "/", "0", 0)
	if err := watch.Progress(ctx); err != nil {
		e.t.Fatal(err)
	}
	for {
		batch, err := watch.Next()
		if err != nil {
			e.t.Fatal(err)
		}
		for len(batch.Events) > 0 {
			n := 1
			for n < len(batch.Events) && batch.Events[n].KV.ModRevision == batch.Events[0].KV.ModRevision {
				n++
			}
			h.step(batch.Events[:n])
			batch.Events = batch.Events[n:]
		}
		if batch.Revision >= last {
			return h
		}
	}
}

// step checks the changes of one revision.
func (h *history) step(events []meta.Event) {
	at := events[0].KV.ModRevision
	next := maps.Clone(h.now)
	for _, e := range events {
		if e.Deleted {
			delete(next, e.KV.Key)
		} else {
			next[e.KV.Key] = e.KV
		}
	}
	for _, e := range events {
		switch key := e.KV.Key; {
		case strings.HasPrefix(key, keys.SnapshotPrefix):
			h.snapshot(at, key, next)
		case strings.HasPrefix(key, keys.AllPinsPrefix):
			h.pin(at, e, next)
		case strings.HasPrefix(key, keys.JobPrefix):
			h.job(at, key, next)
		case strings.HasPrefix(key, keys.AllTasksPrefix):
			h.task(at, key, next)
		case strings.HasPrefix(key, keys.CollectionPrefix):
			h.collection(at, key, next)
		case strings.HasPrefix(key, keys.AllTombstonesPrefix) && !e.Deleted:
			if h.granted[key] {
				h.wrong(at, "%s is written again", key)
			}
			h.granted[key] = true
		case strings.HasPrefix(key, keys.AllUnitsPrefix) && !e.Deleted:
			if h.granted[keys.AllTombstonesPrefix+strings.TrimPrefix(key, keys.AllUnitsPrefix)] {
				h.wrong(at, "%s was granted and is back", key)
			}
		}
	}
	h.now = next
}

func stateOf(all map[string]meta.KeyValue, key string) (snapshot.State, *snapshot.Record) {
	kv, ok := all[key]
	if !ok {
		return 0, nil
	}
	s, err := snapshot.Decode(kv)
	if err != nil {
		return -1, nil
	}
	return s.State, s
}

// snapshot checks that a snapshot makes only legal transitions, keeps its committed
// content, has its name until it is dropped, and is never created twice.
func (h *history) snapshot(at int64, key string, next map[string]meta.KeyValue) {
	was, old := stateOf(h.now, key)
	is, s := stateOf(next, key)
	id, err := keys.LastID(key)
	if err != nil {
		h.wrong(at, "%v", err)
	}
	move := fmt.Sprintf("%v to %v", was, is)
	h.states[move]++
	switch {
	case was == 0 && is == snapshot.Pending && !h.born[id], was == snapshot.Pending && is == snapshot.Deleting,
		was == snapshot.Committed && is == snapshot.Deleting, was == snapshot.Deleting && is == 0:
	case was == snapshot.Pending && is == snapshot.Committed:
		if _, ok := h.now[keys.Pending(s.Collection, id)]; !ok {
			h.wrong(at, "snapshot %d is committed, and its creator had lost its lease", id)
		}
	case was == snapshot.Committed && is == snapshot.Committed:
		if s.Metadata != old.Metadata || s.Collection != old.Collection || s.Name != old.Name ||
			s.Totals != old.Totals || s.Store != old.Store {
			h.wrong(at, "snapshot %d was %+v and is %+v", id, old, s)
		}
	default:
		h.wrong(at, "snapshot %d moves from %s", id, move)
	}
	h.born[id] = true
	if s == nil {
		return
	}
	name, named := next[keys.SnapshotName(0, s.Name)]
	owner := &storagev1.Name{}
	if named {
		if err := record.Decode(name, owner); err != nil {
			h.wrong(at, "%v", err)
		}
	}
	if has := named && owner.GetId() == id; has != (is != snapshot.Deleting) {
		h.wrong(at, "snapshot %d is %v, has its name: %v", id, is, has)
	}
	if _, pending := next[keys.Pending(s.Collection, id)]; pending && is != snapshot.Pending {
		h.wrong(at, "snapshot %d is %v, and pending", id, is)
	}
}

// pin checks that a restore's pin has no lease, is removed only with the end of its
// job, and protects its snapshot.
func (h *history) pin(at int64, e meta.Event, next map[string]meta.KeyValue) {
	kv := e.KV
	if e.Deleted {
		kv = h.now[e.KV.Key]
	}
	p, err := decodePin(kv)
	if err != nil {
		h.wrong(at, "%s: %v", e.KV.Key, err)
		return
	}
	if state, _ := stateOf(next, keys.Snapshot(p.Snapshot)); state != snapshot.Committed && !e.Deleted {
		h.wrong(at, "%s is put, and its snapshot is %v", e.KV.Key, state)
	}
	if p.Job == 0 {
		return
	}
	job := jobIn(next, keys.Job(p.Job))
	switch {
	case job == nil:
		h.wrong(at, "%s of job %d, which there is not", e.KV.Key, p.Job)
	case e.Deleted != job.State.Ended():
		h.wrong(at, "%s deleted: %v; job %d is %v", e.KV.Key, e.Deleted, p.Job, job.State)
	case kv.Lease != 0:
		h.wrong(at, "%s hangs on a lease", e.KV.Key)
	}
}

func jobIn(all map[string]meta.KeyValue, key string) *copyjob.Job {
	kv, ok := all[key]
	if !ok {
		return nil
	}
	job, err := copyjob.DecodeJob(kv)
	if err != nil {
		return nil
	}
	return job
}

// job checks that an ended job does not change, that it protects its snapshot until
// then, and that one that did not complete leaves nothing.
func (h *history) job(at int64, key string, next map[string]meta.KeyValue) {
	old, job := jobIn(h.now, key), jobIn(next, key)
	if job == nil {
		if old == nil || !old.State.Ended() {
			h.wrong(at, "%s is gone, and had not ended", key)
		}
		return
	}
	if old != nil && old.State.Ended() {
		h.wrong(at, "job %d was %v and is written", job.ID, old.State)
	}
	if old != nil && old.Phase == copyjob.RollBack && job.State == copyjob.Completed {
		h.wrong(at, "job %d was given up and is COMPLETED", job.ID)
	}
	_, pinned := next[keys.Pin(job.Snapshot, job.Pin)]
	if pinned == job.State.Ended() {
		h.wrong(at, "job %d is %v, its pin is there: %v", job.ID, job.State, pinned)
	}
	if !job.State.Ended() {
		if state, _ := stateOf(next, keys.Snapshot(job.Snapshot)); state != snapshot.Committed {
			h.wrong(at, "job %d is %v, and its snapshot %v", job.ID, job.State, state)
		}
		return
	}
	h.ended[job.State]++
	for other := range next {
		ofTask := strings.HasPrefix(other, keys.TaskPrefix(job.ID))
		ofTarget := strings.HasPrefix(other, "/catalog/") && strings.Contains(other, "/"+keys.ID(job.Target))
		if ofTask || ofTarget && job.State != copyjob.Completed {
			h.wrong(at, "job %d is %v, and %s is there", job.ID, job.State, other)
		}
	}
}

// task checks that a task's attempts increase, that only its assignee ends it, and that
// a finished task does not change.
func (h *history) task(at int64, key string, next map[string]meta.KeyValue) {
	decodeTask := func(all map[string]meta.KeyValue) *storagev1.Task {
		kv, ok := all[key]
		if !ok {
			return nil
		}
		rec := &storagev1.Task{}
		if err := record.Decode(kv, rec); err != nil {
			h.wrong(at, "%v", err)
		}
		return rec
	}
	old, task := decodeTask(h.now), decodeTask(next)
	if old == nil || task == nil {
		return
	}
	done := func(t *storagev1.Task) bool { return copyjob.TaskState(t.GetState()) == copyjob.TaskDone }
	number, id, err := keys.LastTwo(key)
	if err != nil {
		h.wrong(at, "%v", err)
	}
	assignment := keys.Assignment(old.GetWorker(), number, id)
	_, before := h.now[assignment]
	_, after := next[assignment]
	switch {
	case done(old):
		h.wrong(at, "%s was done and is written", key)
	case task.GetAttempt() < old.GetAttempt():
		h.wrong(at, "%s: attempt %d after %d", key, task.GetAttempt(), old.GetAttempt())
	case done(task) && (!before || after || task.GetAttempt() != old.GetAttempt()):
		h.wrong(at, "%s is done by who it was not assigned to: before %v, after %v", key, before, after)
	}
}

// collection checks that a restore's target becomes visible once, in the revision in
// which its job is COMPLETED.
func (h *history) collection(at int64, key string, next map[string]meta.KeyValue) {
	kv, ok := h.now[key]
	if !ok {
		return
	}
	old, err := catalog.DecodeCollection(kv)
	if err != nil || old.State != catalog.Restoring {
		return
	}
	kv, ok = next[key]
	if !ok {
		return
	}
	col, err := catalog.DecodeCollection(kv)
	if err != nil || col.State == catalog.Restoring {
		return
	}
	h.published[old.Job]++
	if job := jobIn(next, keys.Job(old.Job)); job == nil || job.State != copyjob.Completed ||
		col.State != catalog.Active || h.published[old.Job] > 1 {
		h.wrong(at, "collection %d shows as %v, and its job %d is %+v", col.ID, col.State, old.Job, job)
	}
}

// TestHistory checks each revision that a cluster writes while it executes every
// operation.
func TestHistory(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		e.live()
		h := e.judgeHistory()
		if h.ended[copyjob.Completed] < 2 || h.ended[copyjob.Canceled] < 1 || h.ended[copyjob.Failed] < 1 ||
			len(h.granted) < 10 {
			t.Errorf("jobs ended %v, %d grants", h.ended, len(h.granted))
		}
		for _, move := range []string{
			"PENDING to COMMITTED", "PENDING to DELETING",
			"COMMITTED to COMMITTED", "COMMITTED to DELETING",
		} {
			if h.states[move] == 0 {
				t.Errorf("no snapshot went from %s: %v", move, h.states)
			}
		}
	})
}

// TestHistoryOfRaces runs concurrent creates, drops, restores, cancels and drops of
// targets under few names while replicas freeze and die, and checks each revision.
func TestHistoryOfRaces(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	ended, moves := map[copyjob.State]int{}, map[string]int{}
	for range 4 {
		run := random.Uint64()
		inEnv(t, func(t *testing.T, e *env) {
			h := e.race(run)
			if t.Failed() {
				t.Logf("run %d", run)
			}
			for state, n := range h.ended {
				ended[state] += n
			}
			for move, n := range h.states {
				moves[move] += n
			}
		})
	}
	t.Logf("jobs %v, moves %v", ended, moves)
	if ended[copyjob.Completed] == 0 || ended[copyjob.Canceled] == 0 || moves["COMMITTED to DELETING"] == 0 {
		t.Errorf("jobs ended %v, snapshots moved %v", ended, moves)
	}
}

// race is one run. The seed decides the calls and the faults of replicas.
func (e *env) race(seed uint64) *history {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var mu sync.Mutex
	intN := func(n int) int {
		mu.Lock()
		defer mu.Unlock()
		return rnd.IntN(n)
	}
	var rs []*testReplica
	soon := func(o *testOptions) {
		o.Parts.Collector.OrphanGrace, o.Parts.Collector.SweepInterval = time.Hour, 30*time.Minute
	}
	for _, name := range []string{"a", "b", "c"} {
		rs = append(rs, e.start(name, soon))
	}
	col := e.richCollection(rs[0], "c", 40)
	for _, r := range rs {
		r.store.SetLatency(time.Duration(intN(800)) * time.Millisecond)
	}
	ctx := e.t.Context()
	var callers sync.WaitGroup
	for range 6 {
		callers.Go(func() {
			for range 12 {
				time.Sleep(time.Duration(intN(4000)) * time.Millisecond)
				r := rs[intN(3)]
				name := fmt.Sprint("s", intN(2))
				target := fmt.Sprint("t", intN(3))
				// Each may fail; the history shows whether rightly.
				switch intN(6) {
				case 0, 1:
					_, _ = r.Create(ctx, request.Token{}, spec(col, name))
				case 2:
					_, _ = r.Drop(ctx, request.Token{}, Ref{Name: name}, 0)
				case 3, 4:
					_, _ = r.Restore(ctx, request.Token{}, &RestoreSpec{Snapshot: Ref{Name: name}, DB: "default", Name: target})
				case 5:
					if jobs, _, err := r.Jobs.List(ctx, copyjob.Filter{}, 0, 1); err == nil && len(jobs) > 0 && intN(2) == 0 {
						_, _ = r.Jobs.Cancel(ctx, jobs[0].Job.ID)
						continue
					}
					_, _ = r.catalog.DropCollection(ctx, request.Token{}, catalog.Ref{DB: "default", Name: target}, 0)
				}
			}
		})
	}
	for range 4 {
		time.Sleep(time.Duration(intN(8000)) * time.Millisecond)
		r := rs[intN(3)]
		freeze(r)
		time.Sleep(time.Duration(intN(90_000)) * time.Millisecond)
		thaw(r)
	}
	callers.Wait()
	for _, r := range rs {
		r.store.SetLatency(0)
	}
	time.Sleep(3 * time.Hour) // late writes of frozen replicas are swept
	settle()
	h := e.judgeHistory()
	for _, job := range e.jobs() {
		if !job.State.Ended() {
			e.t.Errorf("job %s is %v", job, job.State)
		}
	}
	e.check(rs[0])
	return h
}
