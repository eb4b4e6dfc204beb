package sim

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// ask has a replica do something without faults, and waits for that.
func (s *sim) ask(m *member, what string, do func(ctx context.Context) error) {
	var got error
	s.work.call(m, what, func(ctx context.Context) (string, func()) {
		err := do(ctx)
		return answer(err, "done"), func() { got = err }
	})
	if !s.until(time.Hour, func() bool { return s.work.inFlight() == 0 }) {
		s.wrong("%s does not end", what)
	}
	if got != nil {
		s.wrong("%s: %v", what, got)
	}
}

// finish ends all faults, lets all come to an end, drops everything, and holds
// that nothing is left.
func (s *sim) finish() {
	s.calmDown()
	s.rest(15 * time.Minute) // leases run out, and what is in flight ends
	s.recoverClock()
	if !s.until(2*time.Hour, func() bool {
		for _, job := range s.oracle.jobs {
			if !job.State.Ended() {
				return false
			}
		}
		return true
	}) {
		s.wrong("jobs do not end: %+v", s.oracle.jobs)
	}
	s.atRest()
	s.oracle.lookAround()
	for _, m := range s.up() {
		s.work.list(m)
		s.until(time.Minute, func() bool { return s.work.inFlight() == 0 })
	}
	s.dropAll()
	last := s.alone()
	if !s.until(8*time.Hour, func() bool { return s.oracle.nothingLeft() == "" }) {
		s.wrong("all is dropped, and there is left:\n%s", s.oracle.nothingLeft())
	}
	st := last.parts.GC.Stats()
	if st.Snapshots+st.Loading+st.Unreadable+st.Segments+st.Builds+st.Granted+st.Unconfirmed != 0 {
		s.wrong("all is gone, and there is %+v", st)
	}
	s.note("the end")
}

// recoverClock is what an operator does once the clocks are right.
func (s *sim) recoverClock() {
	m := s.members[0]
	s.ask(m, "recover the clock", func(ctx context.Context) error {
		_, _, err := m.RecoverClock(ctx)
		return err
	})
}

// atRest holds that nothing is under way any more.
func (s *sim) atRest() {
	from, to := meta.Prefix("/snapshot/")
	_, err := s.kv.Scan(never, from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			switch {
			case strings.HasPrefix(kv.Key, "/snapshot/pending/"):
				return fmt.Errorf("%s at rest", kv.Key)
			case strings.HasPrefix(kv.Key, keys.SnapshotPrefix):
				if rec := s.oracle.decode(kv); snapshot.State(rec.GetState()) != snapshot.Committed {
					return fmt.Errorf("snapshot %s is %v at rest", rec.GetName(), snapshot.State(rec.GetState()))
				}
			}
		}
		return nil
	})
	s.must(err)
}

func (s *sim) dropAll() {
	m := s.members[0]
	s.ask(m, "unpin all", func(ctx context.Context) error {
		list, _, err := m.Pins(ctx, 0, manager.PinPlace{}, 1000)
		for _, p := range list {
			err = errors.Join(err, m.Unpin(ctx, manager.Ref{ID: p.Snapshot}, p.ID))
		}
		return err
	})
	for _, id := range slices.Sorted(maps.Keys(s.work.standing())) {
		s.oracle.snapshots[id].dropping = true
		s.ask(m, fmt.Sprint("drop snapshot ", id), func(ctx context.Context) error {
			_, err := m.Drop(ctx, request.Token{}, manager.Ref{ID: id}, 0)
			return err
		})
	}
	for _, id := range slices.Sorted(maps.Keys(s.oracle.cols)) {
		c := s.oracle.cols[id]
		if c.state != catalog.Active {
			continue
		}
		ref := catalog.Ref{ID: id}
		live := slices.Sorted(maps.Keys(c.live))
		s.ask(m, fmt.Sprint("drop collection ", id), func(ctx context.Context) error {
			if len(live) > 0 && id%2 == 0 { // else they are dropped with it
				if _, err := m.cat.DropSegments(ctx, ref, live); err != nil {
					return err
				}
				asks := make([]gc.Ask, len(live))
				for i := range live {
					asks[i].Segment = live[i]
				}
				if _, err := m.parts.GC.Reclaim(ctx, ref, asks, gc.BySnapshotd, "caller"); err != nil {
					return err
				}
			}
			_, err := m.cat.DropCollection(ctx, request.Token{}, ref, 0)
			return err
		})
	}
	s.work.confirm(m)
	s.rest(5 * time.Minute)
	s.ask(m, "collect", func(ctx context.Context) error {
		_, err := m.Collect(ctx, collect.CycleOptions{Force: true})
		return err
	})
}

// alone stops all replicas, and has one begin that is at leisure: many hours are
// to pass.
func (s *sim) alone() *member {
	for _, m := range s.up() {
		m.stop()
		s.until(time.Minute, func() bool {
			select {
			case <-m.ended:
				return true
			default:
				return false
			}
		})
		select {
		case <-m.ended:
			s.must(m.err)
		default:
			s.wrong("%v does not stop", m)
		}
	}
	return s.start(0, true)
}

// sharedFiles are those of a unit that it does not own.
func sharedFiles(collection int64, s *segment.Segment) []string {
	u := catalog.Unit{ID: s.ID, Collection: collection, Segment: *s}
	owned := map[string]bool{}
	for f := range u.Owned() {
		owned[f.Path] = true
	}
	var list []string
	for f := range s.AllFiles() {
		if !owned[f.Path] {
			list = append(list, keyOf(f))
		}
	}
	return list
}
