package sim

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/replica"
	trusted "github.com/snapshotd/snapshotd/internal/store/clock"
	"github.com/snapshotd/snapshotd/internal/store/epoch"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// member is one life of a replica.
type member struct {
	index, life int
	*manager.Manager
	parts  *replica.Replica
	cat    *catalog.Catalog
	engine bool // it is no replica: what writes the collections, and deletes what it was granted
	dead   bool // under gate.mu; nothing that it does has an effect
	frozen bool // its calls are not chosen
	clock  clock
	knows  map[int64]bool // snapshots whose references it has written, or read as they are
	// misread is how often it was answered with another content than that of the
	// object. It belongs to the scheduler's goroutine, as knows does.
	misread int
	stop    context.CancelFunc
	ended   chan struct{}
	err     error // of Run, once ended is closed
}

func (m *member) String() string {
	if m.engine {
		return "engine"
	}
	return fmt.Sprintf("r%d.%d", m.index, m.life)
}

// seeded is a source of randomness of its own for each use. It is safe for
// concurrent use.
type seeded struct {
	mu  sync.Mutex
	src *rand.ChaCha8
}

func newSeeded(seed uint64, use string) *seeded {
	var key [32]byte
	copy(key[:], fmt.Sprintf("%d %s", seed, use))
	return &seeded{src: rand.NewChaCha8(key)}
}

func (s *seeded) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.src.Read(p)
}

// options are those of a replica in the run; at leisure when many hours are to
// pass.
func (s *sim) options(leisure bool) replica.Options {
	o := replica.Options{
		Shared: replica.Shared{SnapshotStore: "default", Now: time.Now, Log: zap.NewNop()},
		Slots:  2, CopyInFlight: 3,
		KeepRestores: time.Hour + time.Second + 2*s.profile.clocks, // so that no clock makes it an hour or less
		Collector: collect.Options{
			Tolerance: 2 * time.Minute, OrphanGrace: s.profile.grace, SweepInterval: 10 * time.Minute,
			MaxShare: s.profile.share,
		},
	}
	if leisure {
		o.LeaderTTL, o.Interval, o.Collector.Interval = 10*time.Minute, 10*time.Minute, 10*time.Minute
	}
	return o
}

// manager makes the manager of a replica.
func (s *sim) manager(r *replica.Replica, interval time.Duration) *manager.Manager {
	return manager.New(manager.Options{
		Shared: r.Shared, Snapshots: r.Snapshots, GC: r.GC, Collector: r.Collector, Jobs: r.Jobs,
		Cluster: s.cluster, Release: "sim",
		CleanInterval: interval, MaxCreates: 3,
	})
}

// start begins a life of a replica.
func (s *sim) start(index int, leisure bool) *member {
	s.lives[index]++
	m := &member{index: index, life: s.lives[index], ended: make(chan struct{}), knows: map[int64]bool{}}
	s.setClock(&m.clock, s.profile.clocks)
	kv := &gatedKV{KV: s.kv, g: s.gate, m: m, o: s.oracle, batch: s.profile.batch}
	var store object.Store = &gatedStore{ledger: ledger{s.objects, s.oracle, m}, g: s.gate, m: m}
	random := newSeeded(s.seed, m.String())
	// One number for each life: the order in which goroutines ask must not matter.
	jitter := rand.New(rand.NewPCG(s.seed, uint64(index*1000+m.life))).Float64() //nolint:gosec // a simulation
	spread := func() float64 { return jitter }
	stores := map[string]object.Store{"default": store}
	eo := epoch.Options{KV: kv, Store: store, Cluster: s.cluster.ID, Now: m.clock.now, Rand: random, Jitter: spread}
	if leisure {
		eo.Interval = 10 * time.Minute
	}
	ep := epoch.New(eo)
	co := trusted.Options{
		KV:      kv,
		Clock:   trusted.Of(m.clock.now),
		Store:   store,
		Alias:   "default",
		Replica: fmt.Sprint("r", index),
		Log:     zap.NewNop(),
	}
	if leisure {
		co.Interval = 10 * time.Minute
	}
	tr := trusted.New(co)
	requests := request.NewLeases(kv, m.clock.now, tr.Stamp)
	m.cat = catalog.New(catalog.Options{
		KV:          kv,
		Now:         m.clock.now,
		Stamp:       tr.Stamp,
		Rand:        random,
		Requests:    requests,
		HasStore:    func(a string) bool { return a == "default" },
		ReadSpilled: catalog.ReadSpilled(stores),
		RaiseIDs:    ep.RaiseIDLimit,
		Jitter:      spread,
	})
	o := s.options(leisure)
	o.KV, o.Catalog, o.Stores, o.Requests, o.Epoch = kv, m.cat, stores, requests, ep
	o.Replica, o.Rand, o.Jitter, o.Now, o.Clock = fmt.Sprint("r", index), random, spread, m.clock.now, tr
	var err error
	m.parts, err = replica.New(o)
	s.must(err)
	m.Manager = s.manager(m.parts, o.Interval)
	ctx, cancel := context.WithCancel(never)
	m.stop = cancel
	s.members[index] = m
	s.all = append(s.all, m)
	go func() {
		defer close(m.ended)
		m.err = m.parts.Run(ctx, m.Manager)
	}()
	return m
}

// up are the replicas that live, frozen ones too.
func (s *sim) up() []*member {
	var list []*member
	for _, m := range s.members {
		if m != nil {
			list = append(list, m)
		}
	}
	return list
}

// calm are the replicas that answer.
func (s *sim) calm() []*member {
	var list []*member
	for _, m := range s.up() {
		if !m.frozen {
			list = append(list, m)
		}
	}
	return list
}
