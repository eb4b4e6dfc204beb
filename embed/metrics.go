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
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/admit"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
)

// stats collects the metrics of the manager, the collector and the object stores. The
// names are part of the interface.
type stats struct {
	replica  *replica.Replica
	manager  *manager.Manager
	stores   map[string]*admit.Store
	problems *lasting.Problems
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

var (
	snapshotsDesc  = desc("snapshotd_snapshots", "Snapshots by state, as this replica knows them.", "state")
	leaderDesc     = desc("snapshotd_leader", "1 while this replica runs the background loops.")
	createsDesc    = desc("snapshotd_creates_in_flight", "Creates that this replica runs.")
	unreadable     = desc("snapshotd_unreadable_records", "Snapshot records that this release cannot read.")
	referencesDesc = desc("snapshotd_references",
		"Committed snapshots by the state of their references in this replica: known, loading, or unreadable, "+
			"which keeps their collections from being reclaimed.", "state")
	referenced = desc("snapshotd_referenced_units",
		"Segments and index builds that snapshots reference, each counted once per collection.", "kind")
	tombstonesDesc = desc("snapshotd_tombstones",
		"Granted units whose deletion is not confirmed, by their deleter.", "deleter")
	oldestDesc = desc("snapshotd_unconfirmed_grant_age_seconds",
		"Age of the oldest unit that was granted to a caller who has not confirmed its deletion.")
	pinsDesc     = desc("snapshotd_pins", "Pins, those of restores included.")
	restoresDesc = desc("snapshotd_restore_jobs", "Restore jobs by state.", "state")
	workersDesc  = desc("snapshotd_restore_workers", "Replicas that work on restores.")
	tasksDesc    = desc("snapshotd_restore_tasks_running", "Restore tasks that workers run.")
	refusalsDesc = desc("snapshotd_restore_refusals_total",
		"Attempts of this replica at restore tasks that an object store refused for a reason that may pass: "+
			"an expired token, a right, a clock. They are retried.")
	deletedObjects = desc("snapshotd_gc_deleted_objects_total",
		"Objects that this replica deleted, by reason: of a reclaimed unit, an orphan, a snapshot's own, "+
			"or of a restore that failed or was canceled.", "reason")
	deletedBytes = desc("snapshotd_gc_deleted_bytes_total",
		"Bytes of the objects that this replica deleted, by reason, as far as they were known.", "reason")
	unitsDesc = desc("snapshotd_gc_units",
		"Dropped units that remain, as of the last round of the collector that this replica made as the leader: "+
			"waiting for collect_tolerance, held by snapshots, of these parked, which have their records in the "+
			"object store, and stopped, in collections where the round stopped.", "state")
	stoppedDesc = desc("snapshotd_gc_stopped_collections",
		"Collections in which the last round of the collector that this replica made as the leader stopped, "+
			"because it would have deleted too large a part of them.")
	lastRoundDesc = desc("snapshotd_gc_last_round_timestamp_seconds",
		"End of the last round of the collector that this replica made as the leader, in seconds since 1970.")
	lastSweepDesc = desc("snapshotd_gc_last_sweep_timestamp_seconds",
		"End of the last sweep for objects without a record under snapshotd's own prefixes that this replica "+
			"made as the leader, in seconds since 1970.")
	orphansDesc = desc("snapshotd_gc_orphans",
		"Objects without a record under snapshotd's own prefixes that remain, as of the last sweep that this "+
			"replica made as the leader: waiting for orphan_grace, lost with a metadata store that went back in "+
			"time, or foreign.", "state")
	behindDesc = desc("snapshotd_metadata_behind",
		"1 while the metadata store is older than its records in the object store: nothing is allocated and deleted.")
	storeReadyDesc = desc("snapshotd_object_store_ready",
		"1 once the object store has answered since the start and is known to be the cluster's; "+
			"0: calls that need it are refused.", "store")
	writableDesc = desc("snapshotd_object_store_writable",
		"0 while the object store refuses writes, because it is full or denies them, as last seen; "+
			"reads, drops and the collector continue.", "store")
	lastsDesc = desc("snapshotd_problem_lasts_seconds",
		"Time since which an operation fails at each try; 0: it does not. The log has it once.", "problem")
	failuresDesc = desc("snapshotd_problem_failures_total",
		"Failures of an operation that is retried without a caller.", "problem")
	skewDesc = desc("snapshotd_clock_skew_seconds",
		"How far this host's clock is ahead of the object store's; 0 where that is a directory of this host.")
	clockDesc = desc("snapshotd_clock_stopped",
		"1 while this replica does not trust the clock: one has stepped, and nothing expires and nothing is collected.")
)

// Describe implements prometheus.Collector.
func (s stats) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		snapshotsDesc, leaderDesc, createsDesc, unreadable, skewDesc, clockDesc, referencesDesc, referenced,
		tombstonesDesc, oldestDesc, pinsDesc, restoresDesc, workersDesc, tasksDesc, refusalsDesc,
		deletedObjects, deletedBytes, unitsDesc, stoppedDesc, lastRoundDesc, lastSweepDesc, orphansDesc,
		behindDesc, storeReadyDesc, writableDesc, lastsDesc, failuresDesc,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (s stats) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	now, leading := s.manager.Stats(), s.replica.Leading()
	for _, state := range []snapshot.State{snapshot.Pending, snapshot.Committed, snapshot.Deleting} {
		gauge(snapshotsDesc, float64(now.Snapshots[state]), strings.ToLower(state.String()))
	}
	gauge(leaderDesc, boolGauge(leading))
	pending := notReady(s.stores)
	for alias, store := range s.stores {
		ready := !slices.Contains(pending, alias)
		gauge(storeReadyDesc, boolGauge(ready), alias)
		gauge(writableDesc, boolGauge(ready && store.NoWrites() == nil), alias)
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
	gauge(clockDesc, boolGauge(now.ClockStopped))
	gauge(pinsDesc, float64(now.Pins))
	restores := s.replica.Jobs.Stats()
	for state, n := range restores.Jobs {
		gauge(restoresDesc, float64(n), strings.ToLower(state.String()))
	}
	gauge(workersDesc, float64(restores.Workers))
	gauge(tasksDesc, float64(restores.Running))
	ch <- prometheus.MustNewConstMetric(refusalsDesc, prometheus.CounterValue, float64(restores.Refusals))
	refs := s.replica.GC.Stats()
	gauge(referencesDesc, float64(refs.Snapshots), "known")
	gauge(referencesDesc, float64(refs.Loading), "loading")
	gauge(referencesDesc, float64(refs.Unreadable), "unreadable")
	gauge(referenced, float64(refs.Segments), "segment")
	gauge(referenced, float64(refs.Builds), "index_build")
	gauge(tombstonesDesc, float64(refs.Granted), "snapshotd")
	gauge(tombstonesDesc, float64(refs.Unconfirmed), "caller")
	gauge(oldestDesc, refs.Oldest.Seconds())
	s.collector(ch, gauge, leading)
}

// boolGauge returns 1 for true and 0 for false.
func boolGauge(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// behindTimeout bounds the single read of the metadata store for the metrics.
const behindTimeout = 500 * time.Millisecond

// collector collects the metrics of the collector. Only the leader reports those of
// rounds and sweeps.
func (s stats) collector(ch chan<- prometheus.Metric, gauge func(*prometheus.Desc, float64, ...string), leading bool) {
	counters := s.replica.GC.Counters()
	for _, reason := range gc.Reasons() {
		objects, bytes := counters.Of(reason)
		ch <- prometheus.MustNewConstMetric(deletedObjects, prometheus.CounterValue, float64(objects), reason.String())
		ch <- prometheus.MustNewConstMetric(deletedBytes, prometheus.CounterValue, float64(bytes), reason.String())
	}
	ctx, cancel := context.WithTimeout(context.Background(), behindTimeout)
	defer cancel()
	if reason, err := s.replica.Collector.RolledBack(ctx); err == nil { // otherwise unknown
		gauge(behindDesc, boolGauge(reason != ""))
	}
	if !leading {
		return
	}
	if last := s.replica.Collector.LastCycle(); last != nil {
		gauge(unitsDesc, float64(last.Waiting), "waiting")
		gauge(unitsDesc, float64(last.Held), "held")
		gauge(unitsDesc, float64(last.Spilled), "parked")
		gauge(unitsDesc, float64(last.Stopped), "stopped")
		gauge(stoppedDesc, float64(last.StopCount))
		gauge(lastRoundDesc, seconds(last.End))
	}
	if sweep := s.replica.Collector.SweepStats(); !sweep.End.IsZero() {
		gauge(lastSweepDesc, seconds(sweep.End))
		gauge(orphansDesc, float64(sweep.Waiting), "waiting")
		gauge(orphansDesc, float64(sweep.Lost), "lost")
		gauge(orphansDesc, float64(sweep.Foreign), "foreign")
	}
}

// seconds returns a time as seconds since 1970.
func seconds(t time.Time) float64 { return float64(t.UnixNano()) / 1e9 }

// newRegistry returns a registry with the metrics of the Go process. Each server has
// its own, so that several can run in one process.
func newRegistry() *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// metricsServer returns the HTTP server of the metrics address. Unhealthy returns the
// reason for which the server does not serve, degraded the restrictions of its object
// stores; both return an empty text for none.
func metricsServer(registry *prometheus.Registry, unhealthy, degraded func() string, profiles bool) *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) {
		if reason := unhealthy(); reason != "" {
			http.Error(w, "not serving: "+reason, http.StatusServiceUnavailable)
			return
		}
		text := "ok\n"
		if restrictions := degraded(); restrictions != "" {
			text = "ok, " + restrictions + "\n"
		}
		_, _ = w.Write([]byte(text)) // fails only for a client that is gone
	})
	if profiles {
		mux.HandleFunc("GET /debug/pprof/", pprof.Index)
		mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
		mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
		mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
		mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	}
	return &http.Server{
		Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, MaxHeaderBytes: 16 << 10,
	}
}
