package sim

import (
	"context"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// moved holds that a snapshot's record moves as it may: none, PENDING, COMMITTED,
// DELETING, none, and from PENDING to DELETING at once; and that of a committed one
// nothing changes but what callers may change. rec is nil when the record is gone.
func (o *oracle) moved(id int64, rec *storagev1.Snapshot, revision int64) {
	old := o.states[id]
	from, to := snapshot.State(old.GetState()), snapshot.State(rec.GetState())
	type move struct{ from, to snapshot.State }
	allowed := []move{
		{0, snapshot.Pending},
		{snapshot.Pending, snapshot.Committed},
		{snapshot.Pending, snapshot.Deleting},
		{snapshot.Committed, snapshot.Committed},
		{snapshot.Committed, snapshot.Deleting},
		{snapshot.Deleting, 0},
	}
	if _, was := o.recordGone[id]; was || !slices.Contains(allowed, move{from, to}) {
		o.s.wrong("snapshot %d moves from %v to %v", id, from, to)
	}
	if to == snapshot.Committed && rec.GetCommitRevision() == 0 { // its own
		rec.CommitRevision = revision
	}
	if from == snapshot.Committed {
		fixed := func(rec *storagev1.Snapshot) *storagev1.Snapshot {
			rec = proto.CloneOf(rec)
			rec.State, rec.Op, rec.Description, rec.Labels, rec.ExpireTime, rec.Ttl = 0, "", "", nil, 0, 0
			return rec
		}
		if a, b := fixed(old), fixed(rec); !proto.Equal(a, b) {
			o.s.wrong("snapshot %d was committed as %v, and is %v", id, a, b)
		}
	}
	o.states[id] = rec
}

// due says whether a snapshot may expire now: by the clock of the object store,
// which no reading that lifetimes are judged by is ahead of.
func (o *oracle) due(s *expectedSnapshot) bool {
	if o.wrote[keys.Snapshot(s.id)] == nil {
		return false
	}
	return slices.ContainsFunc(o.s.clock.ever(), func(off time.Duration) bool {
		return !time.Now().Add(off).Before(s.expires)
	})
}

func (o *oracle) sawPin(e meta.Event) {
	key := e.KV.Key
	p := o.pins[key]
	if e.Deleted {
		p.gone = true
		if job := o.jobs[p.job]; p.job != 0 && (job == nil || !job.State.Ended()) {
			o.s.wrong("%s is gone, and job %d goes on", key, p.job)
		}
		return
	}
	rec := &storagev1.Pin{}
	o.s.must(record.Decode(e.KV, rec))
	switch {
	case p == nil:
		p = &pinned{job: rec.GetJobId(), expires: map[int64]int64{}}
		o.pins[key] = p
		o.s.reached.pinned++
	case p.gone:
		o.s.wrong("%s is back", key)
	}
	if p.job != 0 && e.KV.Lease != 0 {
		o.s.wrong("%s is of job %d, and ends with a lease", key, p.job)
	}
	p.expires[e.KV.ModRevision] = rec.GetExpireTime()
}

// sawTask holds that the result of a task is that of its newest attempt, and that
// nothing of a job that has ended changes.
func (o *oracle) sawTask(e meta.Event) {
	key := e.KV.Key
	if e.Deleted {
		delete(o.tasks, key)
		return
	}
	job, _, err := keys.LastTwo(key)
	o.s.must(err)
	rec := &storagev1.Task{}
	o.s.must(record.Decode(e.KV, rec))
	if j := o.jobs[job]; j == nil || j.State.Ended() || j.Phase == copyjob.RollBack {
		o.s.wrong("%s is written, and its job is %+v", key, j)
	}
	if old := o.tasks[key]; old != nil {
		done := copyjob.TaskState(rec.GetState()) == copyjob.TaskDone
		switch {
		case copyjob.TaskState(old.GetState()) == copyjob.TaskDone:
			o.s.wrong("%s was done, and is written again: %v", key, rec)
		case rec.GetAttempt() < old.GetAttempt():
			o.s.wrong("%s is at attempt %d, and was at %d", key, rec.GetAttempt(), old.GetAttempt())
		case done && (rec.GetAttempt() != old.GetAttempt() || rec.GetWorker() != old.GetWorker()):
			o.s.wrong("%s is done by attempt %d of worker %d, and attempt %d of worker %d was to do it", key,
				rec.GetAttempt(), rec.GetWorker(), old.GetAttempt(), old.GetWorker())
		}
	}
	o.tasks[key] = rec
}

// together judges what must change in one revision: the target of a job shows when
// the job is COMPLETED, and not before.
func (o *oracle) together(events []meta.Event) {
	for _, e := range events {
		if !strings.HasPrefix(e.KV.Key, keys.CollectionPrefix) && !strings.HasPrefix(e.KV.Key, keys.JobPrefix) {
			continue
		}
		id, err := keys.LastID(e.KV.Key)
		o.s.must(err)
		job := o.jobs[id]
		if strings.HasPrefix(e.KV.Key, keys.CollectionPrefix) {
			job = o.jobOf(id)
		}
		if job == nil || job.State.Ended() {
			continue
		}
		if c := o.cols[job.Target]; c != nil && c.state != 0 && c.state != catalog.Restoring {
			o.s.wrong("collection %d is %v, and job %d, which restores it, is %v", c.id, c.state, job.ID, job.State)
		}
	}
}

// sawTxn judges a transaction that a replica made: those that only a leader may
// make compare its term, and a grant is made by who knows all references.
func (o *oracle) sawTxn(ctx context.Context, m *member, t *meta.Txn) {
	if o.past != nil {
		o.past.sawTxn(ctx, m, t)
	}
	term := false
	for _, c := range t.If {
		if c.From != keys.Leader {
			continue
		}
		if c.Target != meta.CreateRevision || c.Op != meta.Equal {
			o.s.wrong("%v compares %+v, which another leader's term fulfills", m, c)
		}
		term = term || c.Revision > 0
	}
	for _, op := range t.Then {
		if why := o.leaders(&op); why != "" && !term {
			o.s.wrong("%v %s without being the leader: %+v", m, why, t.If)
		}
		switch {
		case op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.SnapshotPrefix):
			o.wrote[op.From] = m
		case op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.AllTombstonesPrefix):
			collection, id, err := keys.LastTwo(op.From)
			o.s.must(err)
			for _, s := range o.snapshots {
				if s.collection == collection && !s.dropped && !m.knows[s.id] {
					o.s.wrong("%v grants unit %d, and has never read what snapshot %s (%d) references", m, id, s.name, s.id)
				}
			}
		}
	}
}

// leaders returns the action of a transaction that only the leader may take;
// empty: any replica may do it.
func (o *oracle) leaders(op *meta.Op) string {
	switch {
	case op.From == keys.Cycle:
		return "notes a round"
	case op.Kind == meta.OpDelete && strings.HasPrefix(op.From, keys.SnapshotPrefix):
		return "forgets a snapshot"
	case op.Kind == meta.OpDelete && strings.HasPrefix(op.From, keys.JobPrefix):
		return "forgets a job"
	case op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.AssignedPrefix):
		return "assigns a task"
	case op.Kind == meta.OpDelete && strings.HasPrefix(op.From, keys.AllTombstonesPrefix):
		collection, id, err := keys.LastTwo(op.From)
		o.s.must(err)
		if g := o.collection(collection).tombs[id]; g != nil && g.t.Deleter == gc.BySnapshotd {
			return "removes a tombstone"
		}
	case op.Kind == meta.OpPut && strings.HasPrefix(op.From, keys.JobPrefix):
		id, err := keys.LastID(op.From)
		o.s.must(err)
		job, err := copyjob.DecodeJob(meta.KeyValue{Key: op.From, Value: op.Value})
		o.s.must(err)
		if o.jobs[id] != nil && job.Phase != copyjob.RollBack { // any replica may cancel a job
			return "moves a job"
		}
	}
	return ""
}
