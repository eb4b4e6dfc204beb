package embed

import (
	"context"
	"net/http"
	"net/http/pprof"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/manager"
	"github.com/snapshotd/snapshotd/internal/store/admit"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
)

// stats shows what the manager is doing. The names are part of the interface.
type stats struct {
	manager *manager.Manager
	stores  map[string]*admit.Store
	// problems are those that last, and those that did.
	problems *lasting.Problems
}

var (
	snapshotsDesc  = prometheus.NewDesc("snapshotd_snapshots", "Snapshots by state, as this replica knows them.", []string{"state"}, nil)
	leaderDesc     = prometheus.NewDesc("snapshotd_leader", "1 while this replica runs the background loops.", nil, nil)
	createsDesc    = prometheus.NewDesc("snapshotd_creates_in_flight", "Creates that this replica works on.", nil, nil)
	unreadable     = prometheus.NewDesc("snapshotd_unreadable_records", "Snapshot records that this release cannot read.", nil, nil)
	referencesDesc = prometheus.NewDesc("snapshotd_references", "Committed snapshots by whether what they reference is known here: known, loading, or unreadable, which keeps their collections from being reclaimed.", []string{"state"}, nil)
	referenced     = prometheus.NewDesc("snapshotd_referenced_units", "Segments and index builds that snapshots reference, each counted once per collection.", []string{"kind"}, nil)
	tombstonesDesc = prometheus.NewDesc("snapshotd_tombstones", "Granted units whose deletion is not confirmed, by who deletes them.", []string{"deleter"}, nil)
	oldestDesc     = prometheus.NewDesc("snapshotd_unconfirmed_grant_age_seconds", "Age of the oldest unit that was granted to a caller who has not confirmed its deletion.", nil, nil)
	pinsDesc       = prometheus.NewDesc("snapshotd_pins", "Pins, those of restores included.", nil, nil)
	restoresDesc   = prometheus.NewDesc("snapshotd_restore_jobs", "Restore jobs by state.", []string{"state"}, nil)
	workersDesc    = prometheus.NewDesc("snapshotd_restore_workers", "Replicas that work on restores.", nil, nil)
	tasksDesc      = prometheus.NewDesc("snapshotd_restore_tasks_running", "Tasks of restores that workers have.", nil, nil)
	refusalsDesc   = prometheus.NewDesc("snapshotd_restore_refusals_total", "Attempts at tasks of restores, by this replica, that an object store refused in a way that may pass: an expired token, a right, a clock. They are made again.", nil, nil)
	deletedObjects = prometheus.NewDesc("snapshotd_gc_deleted_objects_total", "Objects that this replica deleted, by why: of a reclaimed unit, an orphan, a snapshot's own, or of a restore that did not come to its end.", []string{"reason"}, nil)
	deletedBytes   = prometheus.NewDesc("snapshotd_gc_deleted_bytes_total", "Bytes of the objects that this replica deleted, by why, as far as they were known.", []string{"reason"}, nil)
	unitsDesc      = prometheus.NewDesc("snapshotd_gc_units", "Dropped units that stay, as of the last round of the collector that this replica made as the leader: waiting for collect_tolerance, held by snapshots, of these parked, which have their records in the object store, and stopped, in collections where the round stopped.", []string{"state"}, nil)
	stoppedDesc    = prometheus.NewDesc("snapshotd_gc_stopped_collections", "Collections in which the last round of the collector that this replica made as the leader stopped, for it would have deleted too much of them.", nil, nil)
	lastRoundDesc  = prometheus.NewDesc("snapshotd_gc_last_round_timestamp_seconds", "When the last round of the collector ended that this replica made as the leader, in seconds since 1970.", nil, nil)
	lastSweepDesc  = prometheus.NewDesc("snapshotd_gc_last_sweep_timestamp_seconds", "When the last sweep for objects under snapshotd's own prefixes that nothing knows ended that this replica made as the leader, in seconds since 1970.", nil, nil)
	orphansDesc    = prometheus.NewDesc("snapshotd_gc_orphans", "Objects under snapshotd's own prefixes that nothing knows and that stay, as of the last sweep that this replica made as the leader: waiting for orphan_grace, lost with a metadata store that went back in time, or foreign.", []string{"state"}, nil)
	behindDesc     = prometheus.NewDesc("snapshotd_metadata_behind", "1 while the metadata store is older than what it wrote into the object store: nothing is allocated and deleted.", nil, nil)
	storeReadyDesc = prometheus.NewDesc("snapshotd_object_store_ready", "1 once the object store has answered since the start and is known to be the cluster's; 0: calls that need it are refused.", []string{"store"}, nil)
	writableDesc   = prometheus.NewDesc("snapshotd_object_store_writable", "0 while the object store refuses writes, since it is full or denies them, as last seen; reads, drops and the collector go on.", []string{"store"}, nil)
	lastsDesc      = prometheus.NewDesc("snapshotd_problem_lasts_seconds", "For how long something fails at each try; 0: it does not. The log has it once.", []string{"problem"}, nil)
	failuresDesc   = prometheus.NewDesc("snapshotd_problem_failures_total", "How often something failed that is tried again by itself.", []string{"problem"}, nil)
	skewDesc       = prometheus.NewDesc("snapshotd_clock_skew_seconds", "How far this host's clock is ahead of the object store's; 0 where that is a directory of this host.", nil, nil)
	clockDesc      = prometheus.NewDesc("snapshotd_clock_stopped", "1 while this replica does not trust the clock: one has stepped, and nothing expires and nothing is collected.", nil, nil)
)

func (s stats) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		snapshotsDesc, leaderDesc, createsDesc, unreadable, skewDesc, clockDesc, referencesDesc, referenced, tombstonesDesc, oldestDesc, pinsDesc, restoresDesc, workersDesc, tasksDesc, refusalsDesc,
		deletedObjects, deletedBytes, unitsDesc, stoppedDesc, lastRoundDesc, lastSweepDesc, orphansDesc, behindDesc, storeReadyDesc,
		writableDesc, lastsDesc, failuresDesc,
	} {
		ch <- d
	}
}

func (s stats) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	now := s.manager.Stats()
	for _, state := range []manager.State{manager.Pending, manager.Committed, manager.Deleting} {
		gauge(snapshotsDesc, float64(now.Snapshots[state]), strings.ToLower(state.String()))
	}
	leading := 0.
	if now.Leading {
		leading = 1
	}
	gauge(leaderDesc, leading)
	closed := waiting(s.stores)
	for alias, store := range s.stores {
		ready := 1.
		if slices.Contains(closed, alias) {
			ready = 0
		}
		gauge(storeReadyDesc, ready, alias)
		writable := 1.
		if ready == 0 || store.NoWrites() != nil {
			writable = 0
		}
		gauge(writableDesc, writable, alias)
	}
	for _, p := range s.problems.States() {
		lasts := 0.
		if !p.Since.IsZero() {
			lasts = max(time.Since(p.Since).Seconds(), 0)
		}
		gauge(lastsDesc, lasts, p.Name)
		ch <- prometheus.MustNewConstMetric(failuresDesc, prometheus.CounterValue, float64(p.Total), p.Name)
	}
	gauge(createsDesc, float64(now.Creates))
	gauge(unreadable, float64(now.Unreadable))
	gauge(skewDesc, now.ClockSkew.Seconds())
	stopped := 0.
	if now.ClockStopped {
		stopped = 1
	}
	gauge(clockDesc, stopped)
	gauge(pinsDesc, float64(now.Pins))
	restores := s.manager.Jobs().Stats()
	for state, n := range restores.Jobs {
		gauge(restoresDesc, float64(n), strings.ToLower(state.String()))
	}
	gauge(workersDesc, float64(restores.Workers))
	gauge(tasksDesc, float64(restores.Running))
	ch <- prometheus.MustNewConstMetric(refusalsDesc, prometheus.CounterValue, float64(restores.Refusals))
	refs := s.manager.GC().Stats()
	gauge(referencesDesc, float64(refs.Snapshots), "known")
	gauge(referencesDesc, float64(refs.Loading), "loading")
	gauge(referencesDesc, float64(refs.Unreadable), "unreadable")
	gauge(referenced, float64(refs.Segments), "segment")
	gauge(referenced, float64(refs.Builds), "index_build")
	gauge(tombstonesDesc, float64(refs.Granted), "snapshotd")
	gauge(tombstonesDesc, float64(refs.Unconfirmed), "caller")
	gauge(oldestDesc, refs.Oldest.Seconds())
	s.collector(ch, gauge, now.Leading)
}

// behindTimeout bounds the one question that metrics ask of the metadata store.
const behindTimeout = 500 * time.Millisecond

// collector shows what is deleted, and what stays. What the leader alone knows is
// shown by no other replica.
func (s stats) collector(ch chan<- prometheus.Metric, gauge func(*prometheus.Desc, float64, ...string), leading bool) {
	counters := s.manager.GC().Counters()
	for _, reason := range gc.Reasons() {
		objects, bytes := counters.Of(reason)
		ch <- prometheus.MustNewConstMetric(deletedObjects, prometheus.CounterValue, float64(objects), reason.String())
		ch <- prometheus.MustNewConstMetric(deletedBytes, prometheus.CounterValue, float64(bytes), reason.String())
	}
	ctx, cancel := context.WithTimeout(context.Background(), behindTimeout)
	defer cancel()
	if why, err := s.manager.RolledBack(ctx); err == nil { // else nobody knows
		behind := 0.
		if why != "" {
			behind = 1
		}
		gauge(behindDesc, behind)
	}
	if !leading {
		return
	}
	if last := s.manager.Collector().LastCycle(); last != nil {
		gauge(unitsDesc, float64(last.Waiting), "waiting")
		gauge(unitsDesc, float64(last.Held), "held")
		gauge(unitsDesc, float64(last.Spilled), "parked")
		gauge(unitsDesc, float64(last.Stopped), "stopped")
		gauge(stoppedDesc, float64(last.StopCount))
		gauge(lastRoundDesc, seconds(last.End))
	}
	if sweep := s.manager.Collector().SweepStats(); !sweep.End.IsZero() {
		gauge(lastSweepDesc, seconds(sweep.End))
		gauge(orphansDesc, float64(sweep.Waiting), "waiting")
		gauge(orphansDesc, float64(sweep.Lost), "lost")
		gauge(orphansDesc, float64(sweep.Foreign), "foreign")
	}
}

// seconds returns a time as metrics have it.
func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// newRegistry returns a registry with what every Go process shows. It is the
// server's own, so that several can live in one process.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// metricsServer returns what answers on the metrics address. Unhealthy says why
// the server does not serve, or nothing; lacking what object stores it lacks.
func metricsServer(registry *prometheus.Registry, unhealthy, lacking func() string, profiles bool) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if why := unhealthy(); why != "" {
			http.Error(w, "not serving: "+why, http.StatusServiceUnavailable)
			return
		}
		text := "ok\n"
		if what := lacking(); what != "" {
			text = "ok, " + what + "\n"
		}
		_, _ = w.Write([]byte(text)) // the client has gone
	})
	if profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10}
}
