// Package manager manages the life of snapshots: it captures collections, lists and
// drops snapshots, and cleans up after creates that were given up.
//
// # Words
//
//	snapshot   a record, and objects of its own under snapshots/<collection>/<id>/
//	capture    the read of a collection at one revision
//	cut        per channel: rows before it are in the snapshot
//	straddling a segment with rows on both sides of the cut
//	pending    the key that shows that a create is alive; it is under the create's
//	           own lease and is never put a second time
//	generation the key that changes when a collection gains references
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
//	commit   compares: record as written by begin, pending key as put by begin (by
//	         its create revision)
//	         puts: record COMMITTED with the digest of the metadata, generation,
//	         result under the request token; deletes: pending key
//	give up  compares: record as read (PENDING)
//	         puts: record DELETING, result; deletes: name key, pending key
//	abandon  as give up, and compares that the pending key is absent. Any replica may
//	         send it: the leader, which also compares its election key, or one that
//	         serves a repeat under the create's token
//	drop     compares: record as read (COMMITTED), no key under its pins
//	         puts: record DELETING; deletes: name key
//	clean    (all objects are deleted) compares: record as read, leader's
//	         election key; deletes: record
//	pin      compares: record as read (COMMITTED), request token absent
//	         puts: pin, with a ttl under a lease of this pin alone, result
//	end pin  (its expire_time has passed by the trusted reading)
//	         compares: pin as read, leader's election key unless sent by a drop
//	         deletes: pin; its lease is then revoked
//	end      (likewise) compares: the request tokens' records as read, leader's
//	tokens   election key; deletes: records
//	renew    compares: pin as read
//	         puts: pin, under another lease; the previous one is then revoked
//	unpin    compares: pin as read
//	         puts: the key that shows watchers that the pin was removed and did not
//	         expire; deletes: pin; its lease is then revoked
//
// Between begin and commit the collection is captured at one revision, at or after
// that of begin, and the manifests are written, the metadata last. Files need no
// check: a reclaimed file leaves the catalog before its first delete, and nothing is
// reclaimed while a pending key exists.
//
// # Failures
//
//	begin: no answer        the record is read back. If it exists: continue. If not:
//	                        begin is sent again, with the same record under the same
//	                        lease, while the lease lasts. Each attempt compares that
//	                        the record is absent, so at most one takes effect. Then
//	                        the lease is revoked, after which no begin can take
//	                        effect any more; UNAVAILABLE
//	capture: compacted      the capture starts again at a newer revision, three times
//	                        in all, under file names that were not used yet
//	capture: no answer      the read continues after the last received record, at the
//	                        same revision, until the create's timeout
//	object write: no answer the object is read back; equal bytes are this create's.
//	                        Else it is written again, until the create's timeout
//	commit: no answer       the record is read back. COMMITTED, or DELETING from
//	                        there: success. DELETING from PENDING: failure. PENDING:
//	                        commit is sent again, with the same record, until the
//	                        create's timeout. Each attempt compares the record as
//	                        begin wrote it, so at most one takes effect
//	commit: refused after   the pending key or the record has changed. The record is
//	one without an answer   read: COMMITTED, or DELETING from there: success.
//	                        PENDING: the pending key is gone and no commit can take
//	                        effect; give up, failure. Absent: UNAVAILABLE
//	commit: still no answer give up, which makes the commit impossible, and only then
//	at the timeout, or when report the failure. Refused: the record is read, as
//	the replica stops       above. No answer: UNAVAILABLE; the lease is revoked, and
//	                        a repeat or the leader abandons the create, or finds
//	                        COMMITTED
//	give up: no answer      UNAVAILABLE; the lease is revoked, the create is abandoned
//	repeat under the token  the pending key exists: the repeat waits for its deletion,
//	of a create under way   with which every create ends. The key is gone and the
//	                        record PENDING: abandon; CREATE_ABORTED. abandon refused:
//	                        another call was first, the token holds the outcome.
//	                        abandon, no answer: UNAVAILABLE, repeat again
//	pin: no answer          the pin is read back. If it exists: success. If not:
//	                        without a token the lease is revoked, as in begin; with
//	                        one it is left to expire, because the pin may take effect
//	                        late, and a repeat then finds it by the token. UNAVAILABLE
//	renew: no answer        the pin is read back. As written: success. Else
//	                        UNAVAILABLE; the new lease is left to expire, because the
//	                        pin may move to it late, and the old one expires with or
//	                        without the pin
//	unpin: no answer        UNAVAILABLE; a repeat finds the pin removed, or removes it
//	lease outlives its pin  etcd restarts the time of leases when it restarts or
//	or token                changes its leader. The leader ends both by the times in
//	                        their records; readers of pins, renewals and drops do not
//	                        wait for that
//	clock is not trusted    nothing expires, pins and tokens end with their leases,
//	                        creates and pins with a ttl fail with CLOCK_UNTRUSTED
//	owner of a pin dies     its lease expires, which deletes the pin and wakes the
//	                        leader; a pin without a ttl has to be removed by a call
//	creator dies, freezes   its lease expires; the leader or a repeat abandons the
//	                        create, the latter also without a leader. When the
//	                        creator continues, its commit fails on the pending key;
//	                        objects that it writes late are under an id without a
//	                        record
//	creator is slow, or     it renews its lease when it makes progress or retries, at
//	waits for a store       most once a second and up to the create timeout, and is
//	                        not abandoned
//	cleaner dies            another leader continues; repeated deletes are harmless,
//	                        and the record is deleted last
//	old leader wakes up     its writes fail on the election key; its deletes are of
//	                        snapshots that are DELETING for good
package manager

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/copyjob"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/cluster"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// maxAttempts is the maximum number of attempts of a small change whose preconditions
// changed.
const maxAttempts = 16

// Options configure a Manager.
type Options struct {
	replica.Shared
	Snapshots *snapshot.Reader
	GC        *gc.GC
	Collector *collect.Collector // of Collect
	Jobs      *copyjob.Jobs
	Cluster   cluster.Cluster
	Release   string // of this program
	// Features returns the features of the store of an alias, or an error of package
	// object while they are unknown. With again, missing and unknown features are probed
	// again, which writes to the store. Nil: each store has all features.
	Features      func(ctx context.Context, alias string, again bool) (probe.Features, error)
	CreateTimeout time.Duration // of a whole create; default 10 min
	LeaseTTL      time.Duration // of a create that makes no progress; default 60 s
	CleanInterval time.Duration // maximum time between passes of the cleaner; default 1 min
	MaxCreates    int           // concurrent creates; default 64
	// CreateMemory bounds the memory of all creates for segments and manifests, in bytes,
	// plus one manifest. A create that needs more than the bound runs alone. Default
	// 128 MiB.
	CreateMemory int64
}

// Manager manages snapshots. It is safe for concurrent use. It is a [replica.Part]: Run
// executes creates, Lead removes what expired, was dropped or abandoned.
type Manager struct {
	o       Options
	kv      meta.KV
	catalog *catalog.Catalog
	clock   *clock.Trusted
	store   object.Store
	log     *zap.Logger

	reader      *snapshot.Reader
	view        *view
	feed        *feed
	checkpoints *checkpointWatch
	clean       *cleaner
	gc          *gc.GC
	collector   *collect.Collector
	jobs        *copyjob.Jobs
	starting    chan *creation
	running     chan struct{} // closed when Run begins
	stopped     chan struct{} // closed when Run ends

	memory  *createMemory
	creates atomic.Int64
}

// setDefaults sets zero options to their defaults.
func (o *Options) setDefaults() {
	if o.CreateTimeout == 0 {
		o.CreateTimeout = 10 * time.Minute
	}
	if o.LeaseTTL == 0 {
		o.LeaseTTL = time.Minute
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
}

// New returns a Manager. It does no work until Run.
func New(o Options) *Manager {
	o.setDefaults()
	m := &Manager{
		o: o, kv: o.KV, catalog: o.Catalog, clock: o.Clock, store: o.Stores[o.SnapshotStore], log: o.Log,
		reader: o.Snapshots, gc: o.GC, collector: o.Collector, jobs: o.Jobs,
		starting: make(chan *creation), running: make(chan struct{}), stopped: make(chan struct{}),
		memory: newCreateMemory(o.CreateMemory),
	}
	m.clean = newCleaner(m)
	m.feed = newFeed(m.kv, m.log, o.Jitter, m.decodeEvents)
	m.checkpoints = newCheckpointWatch(m.kv, m.log, o.Jitter)
	m.view = newView(&m.o, m.clean.Wake)
	return m
}

// Run executes the creates of Create, and follows snapshots and checkpoints, until ctx
// ends, and then returns nil. It must be called once.
func (m *Manager) Run(ctx context.Context) error {
	close(m.running)
	defer close(m.stopped)
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return m.view.run(ctx) })
	group.Go(func() error { return m.feed.Run(ctx) })
	group.Go(func() error { return m.checkpoints.Run(ctx) })
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
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// Lead removes snapshots that expired, were dropped or whose creator is gone, until ctx
// ends.
func (m *Manager) Lead(ctx context.Context, term election.Term) error { return m.clean.Run(ctx, term) }

// Stats are the counts of a replica.
type Stats struct {
	Snapshots    map[snapshot.State]int
	Creates      int // in flight in this replica
	Unreadable   int // snapshot records that this release cannot read
	Pins         int
	ClockSkew    time.Duration
	ClockStopped bool // the clock is not trusted: nothing expires or is collected
}

// Stats returns the counts of this replica, from its cache.
func (m *Manager) Stats() Stats {
	s := Stats{
		Creates:   int(m.creates.Load()),
		ClockSkew: m.clock.Skew(), ClockStopped: m.clock.Stopped() != "",
	}
	s.Snapshots, s.Unreadable, s.Pins = m.view.count()
	return s
}

// ProbeStore probes the features of the store of an alias; the empty alias means the
// store for snapshots. Failed checks, and checks that could not be made, are in the
// report. It returns an error only if no check could be made.
func (m *Manager) ProbeStore(ctx context.Context, alias string) (probe.Report, error) {
	if alias == "" {
		alias = m.o.SnapshotStore
	}
	store, ok := m.o.Stores[alias]
	if !ok {
		return probe.Report{}, fmt.Errorf("%w: %q", object.ErrStoreNotFound, alias)
	}
	report, err := probe.Run(ctx, store, probe.Dir)
	if !report.Made() && err != nil {
		return report, fmt.Errorf("probe store %s: %w", alias, err)
	}
	return report, nil
}

// scope returns the scope of snapshot names of a collection, as in name keys: 0 is the
// cluster.
func (m *Manager) scope(collection int64) int64 {
	if m.o.Cluster.NameScope == cluster.ScopeCollection {
		return collection
	}
	return 0
}

// Get returns a snapshot's record in any state. If there is none it returns, by name,
// ErrSnapshotNotFound; by id, snapshot.ErrExpiredOrDropped if the id was allocated and else
// snapshot.ErrNeverExisted.
func (m *Manager) Get(ctx context.Context, ref Ref) (*snapshot.Record, error) {
	return m.get(ctx, ref, false)
}

func (m *Manager) get(ctx context.Context, ref Ref, strict bool) (*snapshot.Record, error) {
	id, err := m.resolve(ctx, ref, strict)
	if err != nil {
		return nil, err
	}
	s, err := m.reader.Record(ctx, id)
	if err != nil {
		return nil, err
	}
	if s == nil {
		return nil, m.reader.Missing(ctx, id, ref.String())
	}
	if err := m.checkCollection(ctx, s, ref); err != nil {
		return nil, err
	}
	return s, nil
}

// committed returns a snapshot, or an error if it is not COMMITTED.
func (m *Manager) committed(ctx context.Context, ref Ref) (*snapshot.Record, error) {
	s, err := m.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	if err := s.CheckCommitted(); err != nil {
		return nil, err
	}
	return s, nil
}

// List returns up to limit snapshots that match the filter and follow after, newest
// commit first, and whether more exist. It includes all commits before the call.
func (m *Manager) List(
	ctx context.Context, f Filter, after Place, limit int,
) (list []*snapshot.Record, more bool, err error) {
	if len(f.States) == 0 {
		f.States = []snapshot.State{snapshot.Committed}
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

// commitWith sends a transaction that ends an operation and stores its result under the
// operation's token. It returns whether the compares succeeded.
func (m *Manager) commitWith(
	ctx context.Context, tok request.Token, id int64, result []byte, txn meta.Txn,
) (won bool, revision int64, err error) {
	var lease request.Lease
	if tok.IsSet() {
		if lease, err = m.o.Requests.Get(ctx); err != nil {
			return false, 0, err
		}
		txn.If = append(txn.If, tok.Unused()...)
		txn.Then = append(txn.Then, tok.End(lease, id, result)...)
	}
	res, err := m.kv.Txn(ctx, txn)
	if errors.Is(err, meta.ErrLeaseNotFound) {
		m.o.Requests.Forget(ctx, lease)
		return false, 0, nil
	}
	return res.Succeeded, res.Revision, err
}
