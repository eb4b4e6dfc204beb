package etcdserver

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"
)

// keeper keeps the database below its quota, as far as history and free pages go.
//
// Three sizes count: the file's, what of it is in use, and the quotas. etcd looks at
// the file alone, which never gets smaller by itself: what is deleted stays in the
// history until that is compacted, then its pages are free, and only to defragment
// gives them back. At its own limit etcd raises an alarm, which stays when there is
// room again.
//
//	0 ...... 80 % of quota ...... quota ....... half of the reserve ....... limit
//	  fine   | short: history and | full: Full says so, what grows is       | etcd's
//	         | free pages go      | refused by snapshotd (meta/reserve)     | alarm
//
// At each look, in this order, each step with the sizes after the one before:
//
//	the file is at 80 % of the quota, or the alarm   | compact what is older than History
//	and a tenth of the quota of it is free           | defragment; etcd waits meanwhile
//	alarm, and the file is below half of the reserve | disarm
//
//	it dies, or etcd fails, at                       | what comes of it
//	compact                                          | etcd goes on with it at its start
//	defragment                                       | the old file stays; the next look
//	disarm                                           | the alarm stays; the next look
//
// A reader of a revision that is compacted reads again at a newer one, as with any
// compaction.
type keeper struct {
	etcd    *etcdserver.EtcdServer
	log     *zap.Logger
	quota   int64 // from which on what grows is refused
	limit   int64 // at which etcd itself refuses
	history time.Duration
	full    atomic.Bool

	mu     sync.Mutex // of Look
	points []point    // oldest first; the first is older than history, if any is
}

// point is a revision that was the newest at a time.
type point struct {
	at       time.Time
	revision int64
}

// lookEvery is how often [Server.Run] looks.
const lookEvery = 5 * time.Second

// reserveOf is how much larger etcd's own quota is than the one of snapshotd: an
// eighth of it, and enough for tens of thousands of drops.
func reserveOf(quota int64) int64 { return max(quota/8, 32<<20) }

// plan says what is to be done at these sizes.
type plan struct{ compact, defragment, disarm, full bool }

func (k *keeper) plan(size, inUse int64, alarm bool) plan {
	half := k.quota + (k.limit-k.quota)/2
	short := size >= k.quota/10*8 || alarm
	return plan{
		compact:    short,
		defragment: short && size-inUse >= k.quota/10,
		disarm:     alarm && size < half,
		full:       inUse >= k.quota || size >= half || alarm,
	}
}

// Sizes returns the size of the database's file, how much of it is in use, and the
// quota.
func (s *Server) Sizes() (size, inUse, quota int64) {
	size, inUse = s.keeper.sizes()
	return size, inUse, s.keeper.quota
}

// Full says whether the database is at its quota, as of the last look.
func (s *Server) Full() bool { return s.keeper.full.Load() }

// Run keeps the database below its quota until ctx ends, and then returns nil.
func (s *Server) Run(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for {
		if err := s.Look(ctx); err != nil && ctx.Err() == nil {
			s.keeper.log.Warn("etcd could not be kept below its quota; it is tried again", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Look does what Run does once.
func (s *Server) Look(ctx context.Context) error { return s.keeper.look(ctx) }

func (k *keeper) look(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	revision := k.older(time.Now(), k.etcd.KV().Rev())
	began := k.state()
	if began.compact {
		if err := k.compact(ctx, revision); err != nil {
			return fmt.Errorf("compact at %d: %w", revision, err)
		}
	}
	if k.state().defragment {
		before, _ := k.sizes()
		if err := k.etcd.Defragment(); err != nil {
			return fmt.Errorf("defragment: %w", err)
		}
		after, _ := k.sizes()
		k.log.Warn("etcd was short of room: defragmented", zap.Int64("bytes_before", before), zap.Int64("bytes", after))
	}
	if k.state().disarm {
		for _, a := range k.etcd.Alarms() {
			_, err := k.etcd.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: a.GetMemberID(), Alarm: pb.AlarmType_NOSPACE})
			if err != nil {
				return fmt.Errorf("disarm: %w", err)
			}
		}
		k.log.Warn("etcd has room again: its alarm is taken back")
	}
	if full := k.state().full; k.full.Swap(full) != full {
		size, inUse := k.sizes()
		text := "etcd is below its quota again"
		if full {
			text = "etcd is at its quota: nothing new is taken until something is dropped, or etcd_quota_bytes raised"
		}
		k.log.Warn(text, zap.Int64("bytes", size), zap.Int64("in_use", inUse), zap.Int64("quota", k.quota))
	}
	return nil
}

func (k *keeper) state() plan {
	size, inUse := k.sizes()
	alarm := false
	for _, a := range k.etcd.Alarms() {
		alarm = alarm || a.GetAlarm() == pb.AlarmType_NOSPACE
	}
	return k.plan(size, inUse, alarm)
}

func (k *keeper) sizes() (size, inUse int64) {
	be := k.etcd.Backend()
	return be.Size(), be.SizeInUse()
}

// compact forgets what stood before revision, and waits until its pages are free.
func (k *keeper) compact(ctx context.Context, revision int64) error {
	_, err := k.etcd.Compact(ctx, &pb.CompactionRequest{Revision: revision, Physical: true})
	if err != nil && !errors.Is(err, mvcc.ErrCompacted) {
		return err
	}
	k.etcd.Backend().ForceCommit()
	return nil
}

// older takes note of the newest revision, and returns the newest of those that are
// older than the history that is kept; before there is one, the first.
func (k *keeper) older(now time.Time, newest int64) int64 {
	k.points = append(k.points, point{now, newest})
	for len(k.points) > 1 && now.Sub(k.points[1].at) >= k.history {
		k.points = k.points[1:]
	}
	return k.points[0].revision
}
