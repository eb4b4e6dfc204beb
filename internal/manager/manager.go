// Package manager is the life of snapshots: it captures a collection, lists and
// drops snapshots, and cleans up after those that were given up.
//
// # Words
//
//	snapshot   a record, and objects of its own under snapshots/<collection>/<id>/
//	capture    the read of a collection at one revision
//	cut        per channel: rows before it are in the snapshot
//	straddling a segment with rows on both sides of the cut
//	pending    the key that shows that a create lives; it is under the create's
//	           own lease and is never put a second time
//	generation the key that moves when a collection gains references
//
// # States
//
//	        begin                commit                 drop, expire
//	none ---------> PENDING ------------> COMMITTED --------------+
//	                   |                                          v
//	                   +---- give up, abandon --------------> DELETING ---> none
//	                                                                 clean
//	                                                                (leader)
//
// # Transactions
//
//	begin    compares: name key and record absent, collection as read (ACTIVE),
//	         request token absent
//	         puts: name key, record PENDING, pending key under a lease of this
//	         create alone, request token with the id; gets: the history of the
//	         metadata store, which commit writes into the record
//	commit   compares: record as written by begin, pending key the very one of
//	         begin (by its create revision)
//	         puts: record COMMITTED with the digest of the metadata, generation,
//	         result under the request token; deletes: pending key
//	give up  compares: record as read (PENDING)
//	         puts: record DELETING, result; deletes: name key, pending key
//	abandon  as give up; compares besides: no pending key. Any replica may do it:
//	         the leader, which compares its election key besides, or one that
//	         serves a repeat under the create's token
//	drop     compares: record as read (COMMITTED), nothing under its pins
//	         puts: record DELETING; deletes: name key
//	clean    (all objects are deleted) compares: record as read, leader's
//	         election key; deletes: record
//	pin      compares: record as read (COMMITTED), request token absent
//	         puts: pin, with a ttl under a lease of this pin alone, result
//	end pin  (past its expire_time, by the reading that lifetimes are judged by)
//	         compares: pin as read, leader's election key unless a drop does it
//	         deletes: pin; its lease is then revoked
//	end      (likewise) compares: the request tokens' records as read, leader's
//	tokens   election key; deletes: records
//	renew    compares: pin as read
//	         puts: pin, under another lease; the one before is then revoked
//	unpin    compares: pin as read
//	         puts: the key that tells who watches that it was removed, and has
//	         not expired; deletes: pin; its lease is then revoked
//
// Between begin and commit the collection is captured at one revision, at or
// after that of begin, and the manifests are written, the metadata last. No
// file needs to be looked at: what is reclaimed leaves the catalog before its
// first delete, and nothing is reclaimed while there is a pending key.
//
// # Failures
//
//	begin: no answer        the record is read back. There: go on. Not there: begin
//	                        is sent again, with the same record under the same
//	                        lease, for as long as the lease lasts. Each compares
//	                        that there is no record, so one of them happens at
//	                        most. Then the lease is revoked, after which begin
//	                        cannot happen any more unless it has; UNAVAILABLE
//	capture: compacted      it starts again at a newer revision, three times in
//	                        all, under file names that were not used yet
//	capture: no answer      the read goes on behind the last record that came, at
//	                        the same revision, until the create's timeout
//	object write: no answer the object is read back; equal bytes are ours. Else it
//	                        is written again, until the create's timeout
//	commit: no answer       the record is read back. COMMITTED, or DELETING from
//	                        there: done. DELETING from PENDING: it failed. PENDING:
//	                        commit is sent again, the same record, until the
//	                        create's timeout. Each compares the record as begin
//	                        wrote it, so one of them happens at most
//	commit: refused after   the pending key or the record is another. The record is
//	one without an answer   read: COMMITTED, or DELETING from there: done. PENDING:
//	                        the pending key is gone, no commit can happen any
//	                        more; give up, it failed. Gone: UNAVAILABLE
//	commit: still no answer give up, which makes the commit impossible, and only
//	at the timeout, or when then say that it failed. Refused: the record is read,
//	the replica stops       as above. No answer: UNAVAILABLE, the lease is revoked,
//	                        and a repeat or the leader abandons it, or
//	                        finds COMMITTED
//	give up: no answer      UNAVAILABLE; the lease is ended, it is abandoned
//	repeat under the token  the pending key is there: it waits for the key to go,
//	of a create under way   which every end of a create does. The key is gone and
//	                        the record PENDING: abandon; CREATE_ABORTED. abandon
//	                        refused: another was first, the token says how it
//	                        ended. abandon, no answer: UNAVAILABLE, repeat again
//	pin: no answer          the pin is read back. There: done. Not there: without
//	                        a token the lease is revoked, as in begin; with one it
//	                        is left to run out, for the pin may come late, and a
//	                        repeat then finds it by the token. UNAVAILABLE
//	renew: no answer        the pin is read back. As written: done. Else
//	                        UNAVAILABLE; the new lease is left to run out, for
//	                        the pin may come under it late, and the old one with
//	                        the pin or without it
//	unpin: no answer        UNAVAILABLE; a repeat finds it done, or does it
//	lease outlives its pin  etcd begins leases again when it restarts or another of
//	or token                its members leads. The leader ends both by the time that
//	                        their records say; readers of pins, renewals and drops do
//	                        not wait for that
//	clock is not trusted    nothing expires, pins and tokens end with their leases,
//	                        creates and pins with a ttl end with CLOCK_UNTRUSTED
//	owner of a pin dies     its lease runs out, which deletes the pin and wakes the
//	                        leader; without a ttl somebody has to remove it
//	creator dies, freezes   its lease runs out; the leader abandons it, or a repeat
//	                        does, with a leader or without. When it wakes up,
//	                        commit fails on the pending key; objects that it
//	                        writes late lie under an id that has no record
//	creator is slow, or     it renews its lease when it advances or asks again, at
//	waits for a store       most once a second and up to the create timeout, and is
//	                        left alone
//	cleaner dies            another leader goes on; deletes are harmless when
//	                        repeated, and the record goes last
//	old leader wakes up     its writes fail on the election key; its deletes are
//	                        of snapshots that are DELETING for good
package manager

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
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// maxAttempts bounds how often a small change is decided anew when its
// premises changed.
const maxAttempts = 16

// Options are what a Manager needs.
type Options struct {
	KV            meta.KV
	Catalog       *catalog.Catalog
	Cluster       cluster.Cluster
	Stores        map[string]object.Store // by alias
	SnapshotStore string                  // alias of the store for snapshots' own objects
	// Problems gets what the loops meet. Default: its own.
	Problems *lasting.Problems
	// Features returns what the store of an alias can do; an error of package object
	// while that is not known. With again, what is missing or not known is tried again,
	// which writes. Nil: each store can do all.
	Features func(ctx context.Context, alias string, again bool) (probe.Features, error)
	// Ready holds for each alias a channel that is closed once the store is known to
	// be the cluster's. Until that of SnapshotStore is, NotBehind refuses, and no
	// references are read; until all are, this replica copies nothing. Nil: all are.
	Ready    map[string]<-chan struct{}
	Requests *request.Leases
	// Epoch tells whether the metadata store has gone back in time. Nil: nobody
	// looks.
	Epoch   *epoch.Epoch
	Replica string // name of this process, for people
	Release string // of this program
	Now     func() time.Time
	// Clock gives the time that lifetimes are stamped and judged by. Nil: one over
	// Now and the store for snapshots.
	Clock         *clock.Trusted
	Rand          io.Reader
	Log           *zap.Logger
	CreateTimeout time.Duration // of a create as a whole; default 10 min
	LeaseTTL      time.Duration // of a create that does not advance; default 60 s
	LeaderTTL     time.Duration // of a leader and of a worker that is gone; default 10 s
	CleanInterval time.Duration // between passes of the cleaner that nothing woke; default 1 min
	MaxCreates    int           // at once; default 64
	// CreateMemory bounds what all creates together hold of segments and
	// manifests, in bytes, but for one manifest that may be held besides. A create
	// that needs more than all of it has it for itself. Default 128 MiB.
	CreateMemory int64
	RestoreSlots int           // tasks of restores that this replica works on at once; default 8, negative: none
	CopyInFlight int           // objects that it copies at once; default 32
	KeepRestores time.Duration // how long restore jobs that have ended are kept; default a week
	// RestoreStallTimeout is how long a restore waits for a store that does not answer
	// without a file finished; default a day.
	RestoreStallTimeout time.Duration
	// RestoreRefusalTimeout is how long a restore whose copies the store refuses, by a
	// refusal that may pass, tries them again. Default: 5 minutes.
	RestoreRefusalTimeout time.Duration

	CollectorOff     bool          // the leader makes no rounds of its own; Collect makes one all the same
	CollectTolerance time.Duration // how long ago a thing must have been dropped; default 3 h
	CollectInterval  time.Duration // between rounds of the leader; default 1 min
	CollectMaxShare  float64       // of a collection at which a round stops, above 0 and at most 1; default 0.5
	CollectRate      int           // objects that the collector deletes in a second; default 3000, negative: unlimited
	OrphanGrace      time.Duration // how old an object that nothing knows must be, by its store's clock; default 24 h
	SweepInterval    time.Duration // between looks for such objects; default 1 h
	// Jitter spreads attempts at the stores: numbers in [0, 1). Default that of
	// [meta.Backoff].
	Jitter func() float64
}

// Manager manages snapshots. It is safe for concurrent use. Creates and all
// background work happen inside Run.
type Manager struct {
	o       Options
	kv      meta.KV
	catalog *catalog.Catalog
	clock   *clock.Trusted
	store   object.Store
	log     *zap.Logger

	view      *view
	feed      *feed
	cuts      *cuts
	elect     *election.Election
	clean     *cleaner
	gc        *gc.GC
	collector *collect.Collector
	jobs      *copyjob.Jobs
	starting  chan *creation
	running   chan struct{} // closed when Run begins
	stopped   chan struct{} // closed when Run ends

	memory    *createMemory
	leading   atomic.Bool
	creates   atomic.Int64
	manifests manifestCache
}

// New returns a Manager. It does nothing until Run.
func New(o Options) (*Manager, error) {
	if o.CreateTimeout == 0 {
		o.CreateTimeout = 10 * time.Minute
	}
	if o.LeaseTTL == 0 {
		o.LeaseTTL = time.Minute
	}
	if o.LeaderTTL == 0 {
		o.LeaderTTL = 10 * time.Second
	}
	if o.CleanInterval == 0 {
		o.CleanInterval = time.Minute
	}
	if o.MaxCreates == 0 {
		o.MaxCreates = 64
	}
	if o.CreateMemory == 0 {
		o.CreateMemory = 128 << 20
	}
	if o.CollectTolerance == 0 {
		o.CollectTolerance = 3 * time.Hour
	}
	if o.CollectInterval == 0 {
		o.CollectInterval = time.Minute
	}
	if o.CollectMaxShare == 0 {
		o.CollectMaxShare = 0.5
	}
	if o.CollectRate == 0 {
		o.CollectRate = 3000
	}
	if o.OrphanGrace == 0 {
		o.OrphanGrace = 24 * time.Hour
	}
	if o.SweepInterval == 0 {
		o.SweepInterval = time.Hour
	}
	store, ok := o.Stores[o.SnapshotStore]
	if !ok {
		return nil, fmt.Errorf("no object store %q is configured for snapshots", o.SnapshotStore)
	}
	if o.Clock == nil {
		o.Clock = clock.New(clock.Options{
			KV: o.KV, Clock: clock.Of(o.Now), Store: store, Alias: o.SnapshotStore, Replica: o.Replica, Log: o.Log,
		})
	}
	m := &Manager{
		clock: o.Clock,
		o:     o, kv: o.KV, catalog: o.Catalog, store: store, log: o.Log,
		starting: make(chan *creation), running: make(chan struct{}), stopped: make(chan struct{}),
		memory: newCreateMemory(o.CreateMemory),
	}
	if m.o.Problems == nil {
		m.o.Problems = lasting.New(o.Now)
	}
	m.clean = newCleaner(m)
	m.gc = gc.New(gc.Options{
		Problems: m.o.Problems,
		KV:       o.KV, Catalog: o.Catalog, Stores: o.Stores, SnapshotStore: o.SnapshotStore,
		Now: o.Now, Clock: o.Clock, Rand: o.Rand, Log: o.Log, Interval: o.CleanInterval,
		Replica: o.Replica, Rate: o.CollectRate, Jitter: o.Jitter, Ready: o.Ready[o.SnapshotStore],
	})
	m.collector = collect.New(m.gc, collect.Options{
		Off: o.CollectorOff, Interval: o.CollectInterval, Tolerance: o.CollectTolerance, MaxShare: o.CollectMaxShare,
		OrphanGrace: o.OrphanGrace, SweepInterval: o.SweepInterval,
	})
	m.jobs = copyjob.New(copyjob.Options{
		KV: o.KV, Catalog: o.Catalog, Source: restoreSource{m}, Stores: o.Stores, PinStore: o.SnapshotStore, Requests: o.Requests, Replica: o.Replica,
		Now: o.Now, Clock: o.Clock, Rand: o.Rand, Log: o.Log, WorkerTTL: o.LeaderTTL, Slots: o.RestoreSlots, CopyInFlight: o.CopyInFlight, Keep: o.KeepRestores,
		StallTimeout: o.RestoreStallTimeout, RefusalTimeout: o.RestoreRefusalTimeout,
		Deleted: func(objects, bytes int64) { m.gc.Counters().Add(gc.ByRestore, objects, bytes) },
		Jitter:  o.Jitter,
		Ready:   slices.Collect(maps.Values(o.Ready)),
	})
	m.feed = newFeed(m.kv, m.log, o.Jitter, m.events)
	m.cuts = newCuts(m.kv, m.log, o.Jitter)
	m.view = newView(m.kv, m.log, o.Jitter, m.clean.Wake)
	m.elect = election.New(election.Options{KV: o.KV, Key: keys.Leader, Name: o.Replica, TTL: o.LeaderTTL, Log: o.Log, Rand: o.Jitter})
	return m, nil
}

// Run does the background work, and the creates that Create hands to it, until
// ctx ends. It must be called once. It returns nil when ctx ended.
func (m *Manager) Run(ctx context.Context) error {
	close(m.running)
	defer close(m.stopped)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.view.run(ctx) })
	group.Go(func() error { return m.feed.Run(ctx) })
	group.Go(func() error { return m.cuts.Run(ctx) })
	group.Go(func() error { return m.gc.Run(ctx) })
	group.Go(func() error { return m.jobs.Run(ctx) })
	group.Go(func() error { return m.clock.Follow(ctx) })
	group.Go(func() error {
		return m.elect.Run(ctx, func(ctx context.Context, term election.Term) error {
			m.leading.Store(true)
			defer m.leading.Store(false)
			m.log.Info("leading", zap.String("replica", m.o.Replica), zap.Int64("term", term.Create))
			reporting, stop := context.WithCancel(ctx)
			defer stop()
			var reports errgroup.Group
			reports.Go(func() error { return m.collector.ReportHalts(reporting, term.Fence()) })
			err := m.whileNotBehind(ctx, func(ctx context.Context) error {
				leader, ctx := errgroup.WithContext(ctx)
				leader.Go(func() error { return m.clock.Lead(ctx, term.Fence()) })
				leader.Go(func() error { return m.clean.Run(ctx, term) })
				leader.Go(func() error { return m.gc.Lead(ctx, term) })
				leader.Go(func() error { return m.collector.Lead(ctx, term) })
				leader.Go(func() error { return m.jobs.Lead(ctx, term) })
				return leader.Wait()
			})
			stop()
			err = errors.Join(err, reports.Wait())
			m.log.Info("not leading any more", zap.String("replica", m.o.Replica), zap.Int64("term", term.Create))
			return err
		})
	})
	for range m.o.MaxCreates {
		group.Go(func() error {
			for {
				select {
				case <-ctx.Done():
					return nil
				case c := <-m.starting:
					m.creates.Add(1)
					m.create(ctx, c)
					m.creates.Add(-1)
				}
			}
		})
	}
	err := group.Wait()
	if ctx.Err() != nil && (err == nil || errors.Is(err, context.Canceled)) {
		return nil
	}
	return err
}

// GC returns what decides on deletions. It works while Run does.
func (m *Manager) GC() *gc.GC { return m.gc }

// Collector returns the collector. It works while Run does.
func (m *Manager) Collector() *collect.Collector { return m.collector }

// Stats is what a replica is doing.
type Stats struct {
	Snapshots    map[State]int
	Leading      bool
	Creates      int // in flight here
	Unreadable   int // snapshot records that this release cannot read
	Pins         int
	ClockSkew    time.Duration
	ClockStopped bool // nothing expires and nothing is collected
}

// Stats returns what this replica is doing, from its cache.
func (m *Manager) Stats() Stats {
	s := Stats{Leading: m.leading.Load(), Creates: int(m.creates.Load()), ClockSkew: m.clock.Skew(), ClockStopped: m.clock.Stopped() != ""}
	s.Snapshots, s.Unreadable, s.Pins = m.view.count()
	return s
}

// Leader returns the name of the replica that leads, empty while none does.
func (m *Manager) Leader(ctx context.Context) (string, error) {
	kv, found, _, err := m.kv.Get(ctx, keys.Leader)
	if err != nil || !found {
		return "", err
	}
	return string(kv.Value), nil
}

// ProbeStore finds out what the store of an alias honours; an empty alias is
// the store for snapshots. A check that failed or could not be made is no error but
// in the report, unless none could be made.
func (m *Manager) ProbeStore(ctx context.Context, alias string) (probe.Report, error) {
	if alias == "" {
		alias = m.o.SnapshotStore
	}
	store, ok := m.o.Stores[alias]
	if !ok {
		return probe.Report{}, fmt.Errorf("%w: %q", ErrStoreNotFound, alias)
	}
	report, err := probe.Run(ctx, store, probe.Dir)
	if !report.Made() && err != nil {
		return report, fmt.Errorf("probe store %s: %w", alias, err)
	}
	return report, nil
}

// scope is what a snapshot's name is unique within, as name keys have it.
func (m *Manager) scope(collection int64) int64 {
	if m.o.Cluster.NameScope == cluster.ScopeCollection {
		return collection
	}
	return 0
}

// read returns the record of a snapshot by id, nil when there is none.
func (m *Manager) read(ctx context.Context, id int64) (*Snapshot, error) {
	kv, found, _, err := m.kv.Get(ctx, keys.Snapshot(id))
	if err != nil {
		return nil, fmt.Errorf("read snapshot %d: %w", id, err)
	}
	if !found {
		return nil, nil //nolint:nilnil // there is none
	}
	return decode(kv)
}

// Get returns a snapshot's record, whatever its state. By name it is
// ErrSnapshotNotFound when there is none; by id ErrExpiredOrDropped when the id
// was handed out, else ErrNeverExisted.
func (m *Manager) Get(ctx context.Context, ref Ref) (*Snapshot, error) { return m.get(ctx, ref, false) }

func (m *Manager) get(ctx context.Context, ref Ref, certain bool) (*Snapshot, error) {
	id, err := m.resolve(ctx, ref, certain)
	if err != nil {
		return nil, err
	}
	s, err := m.read(ctx, id)
	if err != nil {
		return nil, err
	}
	if s == nil {
		_, ok, err := m.catalog.Allocated(ctx, id)
		switch {
		case err != nil:
			return nil, err
		case ok:
			return nil, fmt.Errorf("%w: %s", ErrExpiredOrDropped, ref)
		}
		return nil, fmt.Errorf("%w: %s", ErrNeverExisted, ref)
	}
	if err := m.checkCollection(ctx, s, ref); err != nil {
		return nil, err
	}
	return s, nil
}

// committed returns a snapshot that must be COMMITTED.
func (m *Manager) committed(ctx context.Context, ref Ref) (*Snapshot, error) {
	s, err := m.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	if s.State != Committed {
		return nil, fmt.Errorf("%w: %s is %v", ErrSnapshotNotCommitted, s, s.State)
	}
	return s, nil
}

// List returns up to limit snapshots that pass the filter, newest commit first,
// from the first behind after on, and whether there are more. It shows
// everything that was committed before the call.
func (m *Manager) List(ctx context.Context, f Filter, after Place, limit int) (list []*Snapshot, more bool, err error) {
	if len(f.States) == 0 {
		f.States = []State{Committed}
	}
	if f.Collection != (catalog.Ref{}) {
		if f.Collection.ID, err = m.ResolveCollection(ctx, f.Collection); err != nil {
			return nil, false, err
		}
	}
	if err := m.view.sync(ctx); err != nil {
		return nil, false, fmt.Errorf("list snapshots: %w", err)
	}
	list, more = m.view.list(&f, after, limit)
	return list, more, nil
}

// wasFirst looks whether another call with the token took effect while this one
// was being decided: what looks like an error may be that call's doing. The error
// is cause when there was no such call; when that cannot be found out, cause is no
// verdict, and the error is that of the look.
func (m *Manager) wasFirst(ctx context.Context, tok request.Token, cause error) (*request.Record, error) {
	known, err := request.Find(ctx, m.kv, tok)
	if err == nil && known == nil {
		err = cause
	}
	return known, err
}

// commitWith carries out a transaction that ends an operation, with the result
// under the operation's token. It says whether the compares held.
func (m *Manager) commitWith(ctx context.Context, tok request.Token, id int64, result []byte, txn meta.Txn) (won bool, revision int64, err error) {
	var lease request.Lease
	if tok.IsSet() {
		if lease, err = m.o.Requests.Get(ctx); err != nil {
			return false, 0, err
		}
		txn.If = append(txn.If, tok.Absent()...)
		txn.Then = append(txn.Then, tok.End(lease, id, result)...)
	}
	res, err := m.kv.Txn(ctx, txn)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		m.o.Requests.Forget(ctx, lease)
		return false, 0, nil
	}
	return res.Succeeded, res.Revision, err
}
