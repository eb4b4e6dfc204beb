// Package replica makes the parts of a replica that work in the background, runs them, and
// decides what runs where.
//
//	in each replica  the indexes of references and tombstones, the tasks of restores,
//	                 the clocks of others, the snapshots of package manager
//	in the leader    the record of the clock, the removal of snapshots, deletes of
//	                 granted units, cycles and sweeps, the steps of restores; and
//	                 meanwhile the report of what stands still
//
// The leader is elected, see package election, and each of its writes compares its
// election key. While a rollback of the metadata store is known, the leader only reports,
// see package epoch.
//
//	a part fails         in each replica: Run ends with its error. In the leader: the
//	                     term ends, and another one begins after a pause
//	the replica is cut   its term ends with its lease, and so do the leader's parts;
//	off from etcd        the others of this replica retry
package replica

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// Shared is what all parts of a replica use.
type Shared struct {
	KV            meta.KV
	Catalog       *catalog.Catalog
	Stores        map[string]object.Store // by alias
	SnapshotStore string                  // alias of the store for snapshots' own objects
	// Ready holds for each alias a channel that is closed once the store is verified to
	// be the cluster's. Until that of SnapshotStore is closed, decisions on lost metadata
	// fail and no references are read; until all are, this replica copies nothing. Nil:
	// all are ready.
	Ready    map[string]<-chan struct{}
	Requests *request.Leases
	// Epoch detects rollbacks of the metadata store. Nil: no detection.
	Epoch   *epoch.Epoch
	Replica string // name of this process, for display
	Now     func() time.Time
	// Clock provides the time that stamps and judges lifetimes. Nil: one over Now and the
	// store for snapshots.
	Clock *clock.Trusted
	Rand  io.Reader
	Log   *zap.Logger
	// Problems records the failures of the background loops. Default: a new one.
	Problems *lasting.Problems
	// Jitter spreads calls to the stores: numbers in [0, 1). Default that of
	// [meta.Backoff].
	Jitter func() float64
}

// Options configure a Replica.
type Options struct {
	Shared

	LeaderTTL time.Duration // of a leader or a worker that is gone; default 10 s
	Interval  time.Duration // between passes over the tombstones; default 1 min
	Rate      int           // deletes of units' files per second; default 3000, negative: unlimited

	Slots        int           // concurrent restore tasks of this replica; default 8, negative: none
	CopyInFlight int           // concurrent object copies of this replica; default 32
	KeepRestores time.Duration // retention of ended restore jobs; default a week
	// StallTimeout is how long a restore waits for a store that does not answer, measured
	// from the last finished file. Default: a day.
	StallTimeout time.Duration
	// RefusalTimeout is how long a restore retries copies that the store refuses for a
	// passing reason. Default: 5 minutes.
	RefusalTimeout time.Duration

	Collector collect.Options
}

// Part is a part of a replica. Both methods return nil when ctx has ended.
type Part interface {
	Run(ctx context.Context) error                      // in each replica
	Lead(ctx context.Context, term election.Term) error // during a term of this replica
}

// Replica has the parts of a replica. It is safe for concurrent use. All background work
// happens inside Run.
type Replica struct {
	Shared // with defaults

	Snapshots *snapshot.Reader
	GC        *gc.GC
	Collector *collect.Collector
	Jobs      *copyjob.Jobs

	election *election.Election
	leading  atomic.Bool
}

// New returns a Replica. It does no work until Run.
func New(o Options) (*Replica, error) {
	store, ok := o.Stores[o.SnapshotStore]
	if !ok {
		return nil, fmt.Errorf("no object store %q is configured for snapshots", o.SnapshotStore)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{
			KV: o.KV, Clock: clock.Of(o.Now), Store: store, Alias: o.SnapshotStore, Replica: o.Replica, Log: o.Log,
		})
	}
	if o.Problems == nil {
		o.Problems = lasting.New(o.Now)
	}
	if o.LeaderTTL == 0 {
		o.LeaderTTL = 10 * time.Second
	}
	r := &Replica{Shared: o.Shared}
	r.GC = gc.New(gc.Options{
		KV: o.KV, Catalog: o.Catalog, Stores: o.Stores, SnapshotStore: o.SnapshotStore, Ready: o.Ready[o.SnapshotStore],
		Now: o.Now, Clock: o.Clock, Rand: o.Rand, Log: o.Log, Jitter: o.Jitter, Problems: o.Problems, Replica: o.Replica,
		Interval: o.Interval, Rate: o.Rate,
	})
	r.Collector = collect.New(r.GC, o.Collector)
	r.Snapshots = snapshot.NewReader(snapshot.ReaderOptions{
		KV: o.KV, Catalog: o.Catalog, Stores: o.Stores, Exists: r.GC.References().Has,
	})
	r.Jobs = copyjob.New(copyjob.Options{
		KV: o.KV, Catalog: o.Catalog, Snapshots: r.Snapshots, Stores: o.Stores, PinStore: o.SnapshotStore,
		Ready: slices.Collect(maps.Values(o.Ready)), Requests: o.Requests, Replica: o.Replica, Now: o.Now, Clock: o.Clock,
		Rand: o.Rand, Log: o.Log, Jitter: o.Jitter, Problems: o.Problems,
		WorkerTTL: o.LeaderTTL, Slots: o.Slots, CopyInFlight: o.CopyInFlight, Keep: o.KeepRestores,
		StallTimeout: o.StallTimeout, RefusalTimeout: o.RefusalTimeout,
		Deleted: func(objects, bytes int64) { r.GC.Counters().Add(gc.ByRestore, objects, bytes) },
	})
	r.election = election.New(election.Options{
		KV: o.KV, Key: keys.Leader, Name: o.Replica, TTL: o.LeaderTTL, Log: o.Log, Rand: o.Jitter, Problems: o.Problems,
	})
	return r, nil
}

// Run runs the parts of the replica, and further ones, until ctx ends. It must be called
// once. It returns nil when ctx ended.
func (r *Replica) Run(ctx context.Context, parts ...Part) error {
	parts = append([]Part{r.GC, r.Jobs}, parts...)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return r.Clock.Follow(ctx) })
	for _, p := range parts {
		group.Go(func() error { return p.Run(ctx) })
	}
	group.Go(func() error {
		return r.election.Run(ctx, func(ctx context.Context, term election.Term) error { return r.lead(ctx, term, parts) })
	})
	err := group.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// lead runs what a leader does until the term ends.
func (r *Replica) lead(ctx context.Context, term election.Term, parts []Part) error {
	r.leading.Store(true)
	defer r.leading.Store(false)
	r.Log.Info("leading", zap.String("replica", r.Replica), zap.Int64("term", term.Create))
	reporting, stop := context.WithCancel(ctx)
	defer stop()
	var reports errgroup.Group
	reports.Go(func() error { return r.Collector.ReportHalts(reporting, term.Fence()) })
	err := r.whileNotRolledBack(ctx, func(ctx context.Context) error {
		leader, ctx := errgroup.WithContext(ctx)
		leader.Go(func() error { return r.Clock.Lead(ctx, term.Fence()) })
		leader.Go(func() error { return r.Collector.Lead(ctx, term) })
		for _, p := range parts {
			leader.Go(func() error { return p.Lead(ctx, term) })
		}
		return leader.Wait()
	})
	stop()
	err = errors.Join(err, reports.Wait())
	r.Log.Info("leadership ended", zap.String("replica", r.Replica), zap.Int64("term", term.Create))
	return err
}

// whileNotRolledBack runs work until ctx ends or a metadata rollback is detected.
func (r *Replica) whileNotRolledBack(ctx context.Context, work func(ctx context.Context) error) error {
	if r.Epoch == nil {
		return work(ctx)
	}
	return r.Epoch.Lead(ctx, work)
}

// Leading reports whether this replica leads.
func (r *Replica) Leading() bool { return r.leading.Load() }
