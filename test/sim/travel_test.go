package sim

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestMetadataRollback has the metadata store go back in time, as etcd does that is restored
// from a backup, when a beat has noted since how far it had come.
func TestMetadataRollback(t *testing.T) {
	runSeeds(t, func(t *testing.T, seed uint64, reached *reach) *sim {
		t.Helper()
		return runAs(t, seed, reached, (*sim).travel)
	})
}

// past is what is known of a metadata store that went back in time.
type past struct {
	s         *sim
	lost      map[int64]string // ids that stood for something before
	snapshots map[int64]*expectedSnapshot
	there     map[string]bool // objects that there were when it went back
	known     map[int64]bool  // snapshots of which it has a record
	granted   map[string]bool // files whose deletion was granted since: a delete may be repeated, and come late
	recovered bool
	next      int64 // the lowest id that is handed out since
}

// travel is a course: the workload runs, the metadata store goes back to a moment in the
// middle of it, replicas notice that, and an operator recovers it.
func (s *sim) travel() {
	s.work.left /= 2
	s.play()
	then, beat := s.work.revision(), s.beat()
	s.work.left = 20
	s.play()
	for i, m := range s.members {
		if m == nil {
			s.start(i, false)
		} else {
			m.frozen = false
		}
	}
	if !s.until(time.Hour, func() bool { return s.beat() > beat+1 }) { // the next one may have been intended
		s.wrong("there are no two beats in an hour")
	}
	p := s.goBack(then)
	for i := range s.members {
		s.start(i, false)
		virtual.Wait()
	}
	for n := 0; n < 2000 && !s.isBehind(never); n++ {
		s.turn()
	}
	s.thaw()
	if !s.until(time.Hour, func() bool { return s.isBehind(never) }) {
		s.wrong("no replica notices that the metadata store has gone back from beat %d to %d", s.beat(), beat)
	}
	s.askAround()
	s.thaw()
	s.recover(p)
	p.recovered = true
	s.rest(15 * time.Minute)
	if s.isBehind(never) { // a note of the store that is lost landed after the recovery
		s.recover(p)
	}
	s.recoverClock()
	s.rest(time.Hour)
	s.judgeRecovered(p)
	s.note("the end")
}

// thaw begins all that is down or frozen.
func (s *sim) thaw() {
	for i, m := range s.members {
		if m == nil {
			s.start(i, false)
			virtual.Wait()
		} else {
			m.frozen = false
		}
	}
}

func (s *sim) beat() int64 {
	kv, found, _, err := s.kv.Get(never, keys.Epoch)
	s.must(err)
	rec := &storagev1.Epoch{}
	if found {
		s.must(record.Decode(kv, rec))
	}
	return rec.GetBeat()
}

func (s *sim) isBehind(ctx context.Context) bool {
	_, found, _, err := s.kv.Get(ctx, keys.RolledBack)
	s.must(err)
	return found
}

// goBack ends all replicas and rolls the metadata store back to a revision.
func (s *sim) goBack(then int64) *past {
	for _, m := range s.up() {
		s.crash(m)
	}
	virtual.Wait()
	s.oracle.observe()
	before := s.oracle
	p := &past{
		s:         s,
		lost:      before.ids,
		snapshots: before.snapshots,
		there:     map[string]bool{},
		known:     map[int64]bool{},
		granted:   map[string]bool{},
	}
	before.past = p
	for info, err := range s.objects.List(never, "") {
		s.must(err)
		p.there[info.Key] = true
	}
	s.work.stop()
	s.work.flying.Wait()
	s.kv = s.restored(before.log, then)
	s.oracle = newOracle(s)
	s.oracle.past, s.oracle.content, s.oracle.ids = p, before.content, before.ids
	s.work = newWork(s)
	s.work.left = 0
	p.scan(never, keys.SnapshotPrefix, func(kv meta.KeyValue) bool {
		id, err := keys.LastID(kv.Key)
		s.must(err)
		p.known[id] = true
		return false
	})
	s.note("the metadata store goes back to revision %d", then)
	return p
}

// restored is a metadata store of which all was written that was up to a revision.
func (s *sim) restored(log []meta.Event, then int64) *metamemory.Store {
	kv := metamemory.New(metamemory.Options{Now: time.Now})
	leases := map[meta.LeaseID]meta.LeaseID{}
	for len(log) > 0 && log[0].KV.ModRevision <= then {
		revision := log[0].KV.ModRevision
		var txn meta.Txn
		for ; len(log) > 0 && log[0].KV.ModRevision == revision; log = log[1:] {
			e := log[0]
			if e.Deleted {
				txn.Then = append(txn.Then, meta.Delete(e.KV.Key))
				continue
			}
			op := meta.Put(e.KV.Key, e.KV.Value)
			if e.KV.Lease != 0 {
				if leases[e.KV.Lease] == 0 {
					lease, err := kv.Grant(never, time.Minute)
					s.must(err)
					leases[e.KV.Lease] = lease
				}
				op.Lease = leases[e.KV.Lease]
			}
			txn.Then = append(txn.Then, op)
		}
		res, err := kv.Txn(never, txn)
		s.must(err)
		if res.Revision != revision {
			s.wrong("revision %d is restored as %d", revision, res.Revision)
		}
	}
	return kv
}

// askAround makes requests that replicas must refuse now, with faults.
func (s *sim) askAround() {
	var cols []int64
	standing := slices.Sorted(maps.Keys(s.oracle.past.snapshots))
	from, to := meta.Prefix(keys.CollectionPrefix)
	_, err := s.kv.Scan(never, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			id, err := keys.LastID(kv.Key)
			s.must(err)
			cols = append(cols, id)
		}
		return nil
	})
	s.must(err)
	one := func(list []int64) int64 {
		if len(list) == 0 {
			return 1
		}
		return list[s.rng.IntN(len(list))]
	}
	for left := 30; left > 0 || s.work.inFlight() > 0; {
		if s.step > maxSteps {
			s.wrong("there is no end: %v", s.work.underWay())
		}
		if calm := s.calm(); left > 0 && len(calm) > 0 && s.work.inFlight() < maxFlying && s.chance(0.2) {
			left--
			s.forbidden(calm[s.rng.IntN(len(calm))], one(cols), one(standing))
		}
		s.turn()
	}
}

// forbidden has a replica do something of which nothing may come.
func (s *sim) forbidden(m *member, collection, snapshot int64) {
	w := s.work
	ref := catalog.Ref{ID: collection}
	must := func(what string, err error) (string, func()) {
		return answer(err, "done"), func() {
			if err == nil {
				s.wrong("%s, while the metadata store is behind", what)
			}
		}
	}
	switch s.rng.IntN(7) {
	case 0:
		w.call(m, "allocate", func(ctx context.Context) (string, func()) {
			_, err := m.cat.NextID(ctx)
			return must("an id is handed out", err)
		})
	case 1:
		w.call(m, "create", func(ctx context.Context) (string, func()) {
			_, err := m.Create(ctx, request.Token{}, manager.CreateSpec{Collection: ref, Name: w.name("b")})
			return must("a snapshot is created", err)
		})
	case 2:
		w.call(m, "reclaim", func(ctx context.Context) (string, func()) {
			var asks []gc.Ask
			for id := range int64(150) {
				asks = append(asks, gc.Ask{Segment: id + 1})
			}
			_, err := m.parts.GC.Reclaim(ctx, ref, asks[:100], gc.BySnapshotd, "caller")
			return answer(err, "answered"), nil
		})
	case 3:
		w.call(m, "collect", func(ctx context.Context) (string, func()) {
			sum, err := m.Collect(ctx, collect.CycleOptions{Force: true, Tolerance: new(time.Duration)})
			return answer(err, "%d granted", sum.Granted), nil
		})
	case 4:
		w.call(m, "sweep", func(ctx context.Context) (string, func()) {
			sum, err := m.parts.Collector.Sweep(ctx, collect.SweepOptions{})
			return answer(err, "%d deleted", sum.Deleted), nil
		})
	case 5:
		w.call(m, "drop snapshot", func(ctx context.Context) (string, func()) {
			_, err := m.Drop(ctx, request.Token{}, manager.Ref{ID: snapshot}, 0)
			return answer(err, "dropped"), nil
		})
	case 6:
		w.call(m, "restore", func(ctx context.Context) (string, func()) {
			_, err := m.Restore(
				ctx,
				request.Token{},
				&manager.RestoreSpec{Snapshot: manager.Ref{ID: snapshot}, DB: "default", Name: w.name("b")},
			)
			return must("a restore begins", err)
		})
	}
}

// recover is what an operator does until it succeeds.
func (s *sim) recover(p *past) {
	for n := 0; s.isBehind(never); n++ {
		if n > 100 {
			s.wrong("there is no recovering")
		}
		m := s.work.replica()
		s.work.call(m, "recover", func(ctx context.Context) (string, func()) {
			_, next, _, err := m.Recover(ctx, false)
			return answer(err, "next id %d", next), nil
		})
		for s.work.inFlight() > 0 {
			if len(s.calm()) == 0 {
				s.thaw()
			}
			s.turn()
		}
		s.settle()
		s.thaw()
	}
	s.calmDown()
	kv, _, _, err := s.kv.Get(never, keys.IDs)
	s.must(err)
	rec := &storagev1.Allocator{}
	s.must(record.Decode(kv, rec))
	p.next = rec.GetNext()
	for id, what := range p.lost {
		if id >= p.next {
			s.wrong("ids from %d on are handed out after the recovery, and %d was %s", p.next, id, what)
		}
	}
}

// sawTxn holds that no id is handed out and nothing is granted while the metadata
// store is known to be behind.
func (p *past) sawTxn(ctx context.Context, m *member, t *meta.Txn) {
	if m.dead || p.recovered || !p.s.isBehind(ctx) {
		return
	}
	for _, op := range t.Then {
		if op.Kind == meta.OpPut && (op.From == keys.IDs || strings.HasPrefix(op.From, keys.AllTombstonesPrefix)) {
			p.s.wrong("%v puts %s, while the metadata store is behind", m, op.From)
		}
	}
}

// judge checks that nothing is deleted before the recovery, and then nothing that may be
// needed or may belong to the lost store.
func (p *past) judge(ctx context.Context, m *member, list []string) {
	for _, key := range list {
		if m.dead || m.engine { // what it was granted before, and which comes late
			delete(p.there, key)
			continue
		}
		if !p.recovered && p.s.isBehind(ctx) {
			p.s.wrong("%v deletes %s, while the metadata store is behind", m, key)
		}
		if why := p.needed(ctx, key); why != "" {
			p.s.wrong("%v deletes %s: %s", m, key, why)
		}
	}
}

func (p *past) needed(ctx context.Context, key string) string {
	for id, s := range p.snapshots {
		if own := strings.HasPrefix(key, manifest.Dir(s.collection, id)); (own || s.files[key]) && p.stands(ctx, id) {
			return fmt.Sprintf("snapshot %s (%d) has it", s.name, id)
		}
	}
	path, data := strings.CutPrefix(key, "data/")
	switch {
	case strings.HasPrefix(key, epoch.Prefix), p.granted[key]:
		return ""
	case p.isGranted(ctx, key):
		p.granted[key] = true
		return ""
	case data:
		id, _, _, _ := segment.NativePlace(path)
		if p.givenUp(ctx, func(job *copyjob.Job) bool { return job.Target == id }) {
			return ""
		}
		return "it is not granted, nor of a restore that is given up"
	case strings.HasPrefix(key, catalog.RestorePrefix):
		if p.givenUp(ctx, func(job *copyjob.Job) bool { return strings.HasPrefix(key, catalog.RestoreDir(job.ID)) }) {
			p.granted[key] = true // a delete may be repeated, and come late
			return ""
		}
		return "it is not of a restore that is given up or has ended"
	}
	if _, id, ok := manifest.ParseKey(key); ok {
		kv, found, _, err := p.s.kv.Get(ctx, keys.Snapshot(id))
		p.s.must(err)
		if found && snapshot.State(p.s.oracle.decode(kv).GetState()) == snapshot.Deleting {
			p.granted[key] = true // a delete may be repeated, and come late
			return ""
		}
		if p.recovered && !found && id >= p.next {
			return ""
		}
	}
	return "it may be of the store that is lost"
}

func (p *past) stands(ctx context.Context, id int64) bool {
	kv, found, _, err := p.s.kv.Get(ctx, keys.Snapshot(id))
	p.s.must(err)
	return found && snapshot.State(p.s.oracle.decode(kv).GetState()) == snapshot.Committed
}

func (p *past) scan(ctx context.Context, prefix string, fn func(kv meta.KeyValue) bool) (found bool) {
	from, to := meta.Prefix(prefix)
	_, err := p.s.kv.Scan(ctx, from, to, 0, func(batch []meta.KeyValue) error {
		found = found || slices.ContainsFunc(batch, fn)
		return nil
	})
	p.s.must(err)
	return found
}

func (p *past) isGranted(ctx context.Context, key string) bool {
	return p.scan(ctx, keys.AllTombstonesPrefix, func(kv meta.KeyValue) bool {
		t, err := gc.DecodeTombstone(kv)
		p.s.must(err)
		collection, id, err := keys.LastTwo(kv.Key)
		p.s.must(err)
		for f := range t.Unit.Owned() {
			if keyOf(f) == key {
				return true
			}
		}
		return key == catalog.SpillKey(collection, id)
	})
}

func (p *past) givenUp(ctx context.Context, is func(*copyjob.Job) bool) bool {
	return p.scan(ctx, keys.JobPrefix, func(kv meta.KeyValue) bool {
		job, err := copyjob.DecodeJob(kv)
		p.s.must(err)
		return is(job) && (job.State.Ended() || job.Phase == copyjob.RollBack)
	})
}

// judgeRecovered holds that the snapshots that stand have what they had when the
// store went back, that what may be of the lost one is there, and that all goes on.
func (s *sim) judgeRecovered(p *past) {
	for id, snap := range p.snapshots {
		if !p.stands(never, id) {
			continue
		}
		for key := range snap.files {
			if p.there[key] {
				s.oracle.whole(key, "snapshot %s has it", snap.name)
			}
		}
	}
	m := s.members[0]
	s.ask(m, "new collection", func(ctx context.Context) error { return s.work.newCollection(ctx, m, "after") })
	s.ask(m, "create", func(ctx context.Context) error {
		_, err := m.Create(ctx, request.Token{}, manager.CreateSpec{
			Collection: catalog.Ref{DB: "default", Name: "after"}, Name: "after",
		})
		return err
	})
	for range 3 {
		s.ask(m, "allocate", func(ctx context.Context) error {
			_, err := s.work.id(ctx, m)
			return err
		})
	}
	for key := range p.there {
		_, id, ok := manifest.ParseKey(key)
		if _, err := s.objects.Head(never, key); err != nil && ok && !p.known[id] {
			s.wrong("%s may be of the store that is lost, and is gone: %v", key, err)
		}
	}
}
