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

// keeper keeps the database below its quota by removing history and free pages.
//
// etcd compares only the size of the file with its quota, and the file never shrinks by
// itself: deleted data stays in the history until a compaction, which frees its pages, and
// only a defragmentation returns them. At its limit etcd raises an alarm, which stays after
// space was freed.
//
//	0 ....... 80 % of quota ....... quota ....... half of the reserve ....... limit
//	  normal  | short: history and  | full: Full is true, snapshotd refuses   | etcd's
//	          | free pages removed  | growing transactions (meta/reserve)     | alarm
//
// Each check executes these steps in order, each with the sizes after the previous one:
//
//	the file is at 80 % of the quota, or the alarm   | compact revisions older than History
//	and a tenth of the quota is free pages           | defragment, which blocks etcd
//	alarm, and the file is below half of the reserve | disarm
//
//	process dies or etcd fails during                | result
//	compact                                          | etcd continues it at its start
//	defragment                                       | the old file stays; the next check
//	disarm                                           | the alarm stays; the next check
//
// Readers of a compacted revision read again at a newer one, as after any compaction.
type keeper struct {
	etcd    *etcdserver.EtcdServer
	log     *zap.Logger
	quota   int64 // from which on growing transactions are refused
	limit   int64 // at which etcd itself refuses
	history time.Duration
	full    atomic.Bool

	mu     sync.Mutex // of Look
	points []point    // oldest first; the first is older than history, if any is
}

// point is the newest revision at a time.
type point struct {
	at       time.Time
	revision int64
}

// checkInterval is the interval of the checks of [Server.Run].
const checkInterval = 5 * time.Second

// reserveOf returns the difference between etcd's own quota and that of snapshotd: an eighth
// of the quota, at least enough for tens of thousands of drops.
func reserveOf(quota int64) int64 { return max(quota/8, 32<<20) }

// plan has the steps for the current sizes.
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

// Sizes returns the size of the database's file, the used part of it, and the quota.
func (s *Server) Sizes() (size, inUse, quota int64) {
	size, inUse = s.keeper.sizes()
	return size, inUse, s.keeper.quota
}

// Full reports whether the database was at its quota at the last check.
func (s *Server) Full() bool { return s.keeper.full.Load() }

// Run keeps the database below its quota until ctx ends, and then returns nil.
func (s *Server) Run(ctx context.Context) error {
	ticker := time.NewTicker(checkInterval)
	defer ticker.Stop()
	for {
		if err := s.Look(ctx); err != nil && ctx.Err() == nil {
			s.keeper.log.Warn("etcd quota check failed, retrying", zap.Error(err))
		}
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
	}
}

// Look runs one check of Run.
func (s *Server) Look(ctx context.Context) error { return s.keeper.check(ctx) }

func (k *keeper) check(ctx context.Context) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	revision := k.compactTo(time.Now(), k.etcd.KV().Rev())
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
		k.log.Warn("etcd was short of space: defragmented", zap.Int64("bytes_before", before), zap.Int64("bytes", after))
	}
	if k.state().disarm {
		for _, a := range k.etcd.Alarms() {
			_, err := k.etcd.Alarm(ctx, &pb.AlarmRequest{
				Action: pb.AlarmRequest_DEACTIVATE, MemberID: a.GetMemberID(), Alarm: pb.AlarmType_NOSPACE,
			})
			if err != nil {
				return fmt.Errorf("disarm: %w", err)
			}
		}
		k.log.Warn("etcd has space again: its alarm was cleared")
	}
	if full := k.state().full; k.full.Swap(full) != full {
		size, inUse := k.sizes()
		text := "etcd is below its quota again"
		if full {
			text = "etcd is at its quota: drop snapshots or collections, or raise etcd_quota_bytes"
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

// compact removes the history before revision, and waits until its pages are free.
func (k *keeper) compact(ctx context.Context, revision int64) error {
	_, err := k.etcd.Compact(ctx, &pb.CompactionRequest{Revision: revision, Physical: true})
	if err != nil && !errors.Is(err, mvcc.ErrCompacted) {
		return err
	}
	k.etcd.Backend().ForceCommit()
	return nil
}

// compactTo records the newest revision, and returns the newest recorded one that is older
// than history, or the first one if none is.
func (k *keeper) compactTo(now time.Time, newest int64) int64 {
	k.points = append(k.points, point{now, newest})
	for len(k.points) > 1 && now.Sub(k.points[1].at) >= k.history {
		k.points = k.points[1:]
	}
	return k.points[0].revision
}
