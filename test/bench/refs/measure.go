//go:build linux

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The bars.
const (
	maxLoad    = 5 // seconds
	maxHeap    = 500 << 20
	maxChecks  = 1 // seconds
	maxReclaim = 2 // seconds
	maxRatio   = 1.2
)

// heapInterval is the interval of the readings of snapshotd's metrics.
const heapInterval = 20 * time.Millisecond

// timed adds a bar that depends on the load of the machine.
func (e *env) timed(what, want, got string, ok bool) {
	e.Report.Bars = append(e.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok, Timed: true})
}

// counted adds a bar that does not depend on it.
func (e *env) counted(what, want, got string, ok bool) {
	e.Report.Bars = append(e.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok})
}

func (e *env) measure(ctx context.Context, dir string) error {
	many, err := newCluster(ctx, e.options, filepath.Join(dir, "many"))
	if many != nil {
		defer many.close()
	}
	if err == nil {
		err = many.serve(ctx)
	}
	if err != nil {
		return err
	}
	begin := time.Now()
	fill := e.fillDirectly
	if e.real {
		fill = e.fill
	}
	col, err := fill(ctx, many)
	if err != nil {
		return fmt.Errorf("make %d snapshots: %w", e.snapshots, err)
	}
	filled := time.Since(begin)
	// The units that Reclaim grants: no snapshot has held them.
	spare, err := register(ctx, many.client, col, e.units*(e.Rounds+1), full)
	if err == nil {
		err = bench.DropSegments(ctx, many.client, col.ref(), spare)
	}
	if err != nil {
		return fmt.Errorf("make units to reclaim: %w", err)
	}
	many.stop()
	size, err := bench.Defragment(ctx, many.at)
	if err != nil {
		return err
	}
	refs, err := refsBytes(many.objects())
	if err != nil {
		return err
	}
	e.Logf("made %d snapshots in %v, load %s", e.snapshots, filled.Round(time.Second), bench.LoadText())
	e.Report.Tables = append(e.Report.Tables, bench.Table{
		Title: "Set-up",
		Head: []string{
			"snapshots",
			"segments per snapshot",
			"distinct",
			"created in",
			"refs.avro, bytes/snapshot",
			"etcd database",
			"load",
		},
		Rows: [][]string{{
			strconv.Itoa(e.snapshots), strconv.Itoa(e.segments), strconv.FormatInt(col.referenced, 10),
			filled.Round(time.Second).String(), fmt.Sprintf("%.0f", refs), bench.MiB(float64(size)), bench.LoadText(),
		}},
	})
	if err := e.loads(ctx, many); err != nil {
		return fmt.Errorf("load: %w", err)
	}
	if err := e.checksAlone(ctx, many, col); err != nil {
		return fmt.Errorf("look up: %w", err)
	}
	if err := many.serve(ctx); err != nil {
		return err
	}
	if err := many.quiet(ctx, e.snapshots); err != nil {
		return err
	}
	if err := e.reclaims(ctx, many, col, spare); err != nil {
		return fmt.Errorf("reclaim: %w", err)
	}
	return e.beside(ctx, many, col, filepath.Join(dir, "none"))
}

// refsBytes returns the average size of a references file in dir.
func refsBytes(dir string) (float64, error) {
	list, err := filepath.Glob(filepath.Join(dir, "snapshots", "*", "*", manifest.RefsName))
	if err != nil || len(list) == 0 {
		return 0, errors.Join(err, errors.New("no references"))
	}
	sum := 0.0
	for _, name := range list {
		info, err := os.Stat(name)
		if err != nil {
			return 0, err
		}
		sum += float64(info.Size())
	}
	return sum / float64(len(list)), nil
}

// scrape returns snapshotd's metrics, or nil while it does not respond.
func (c *cluster) scrape(ctx context.Context) []byte {
	text, err := bench.Get(ctx, "http://"+c.server.Metrics+"/metrics")
	if err != nil {
		return nil
	}
	return text
}

// until polls snapshotd's metrics until good returns true. It returns the maximum of
// the heap meanwhile, garbage included, and the processor time since the start, in
// seconds.
func (c *cluster) until(ctx context.Context, good func(text []byte) (bool, error)) (heap, used float64, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Minute, errors.New("snapshotd took longer than a minute"))
	defer cancel()
	tick := time.NewTicker(heapInterval)
	defer tick.Stop()
	for {
		if text := c.scrape(ctx); text != nil {
			now, err := bench.Sum(text, "go_memstats_heap_alloc_bytes")
			if err != nil {
				return heap, used, err
			}
			heap = max(heap, now)
			if used, err = bench.Sum(text, "process_cpu_seconds_total"); err != nil {
				return heap, used, err
			}
			if ok, err := good(text); ok || err != nil {
				return heap, used, err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return heap, used, context.Cause(ctx)
		}
	}
}

// knows returns a condition: the references of n snapshots are known.
func knows(n int) func(text []byte) (bool, error) {
	return func(text []byte) (bool, error) {
		known, err := bench.Sum(text, "snapshotd_references", `state="known"`)
		if err != nil {
			return false, err
		}
		failed, err := bench.Sum(text, "snapshotd_references", `state="unreadable"`)
		if err == nil && failed > 0 {
			err = fmt.Errorf("the references of %.0f snapshots cannot be read", failed)
		}
		return int(known) == n, err
	}
}

// quiet waits until n snapshots are known and none is in deletion.
func (c *cluster) quiet(ctx context.Context, n int) error {
	_, _, err := c.until(ctx, func(text []byte) (bool, error) {
		deleting, err := bench.Sum(text, "snapshotd_snapshots", `state="deleting"`)
		if deleting > 0 || err != nil {
			return false, err
		}
		return knows(n)(text)
	})
	return err
}

// loads measures the time from the start of a replica until the references of all
// snapshots are known.
func (e *env) loads(ctx context.Context, c *cluster) error {
	var times, heaps, uses []float64
	for round := range e.Rounds + 1 {
		begin := time.Now()
		if err := c.start(ctx); err != nil {
			return err
		}
		heap, used, err := c.until(ctx, knows(e.snapshots))
		took := time.Since(begin).Seconds()
		c.stop()
		if err != nil {
			return err
		}
		e.Logf(
			"knew %d snapshots after %s, %s of processor time, heap up to %s, load %s",
			e.snapshots,
			bench.Time(took),
			bench.Time(used),
			bench.MiB(heap),
			bench.LoadText(),
		)
		if round > 0 {
			times, heaps, uses = append(times, took), append(heaps, heap), append(uses, used)
		}
	}
	took, heap := bench.Median(times), slices.Max(heaps)
	e.Report.Tables = append(e.Report.Tables, bench.Table{
		Title: "Start of a replica",
		Head:  []string{"references known after", "spread", "CPU", "peak heap", "load"},
		Rows: [][]string{
			{
				bench.Time(took),
				bench.Percent(bench.Spread(times)),
				bench.Time(bench.Median(uses)),
				bench.MiB(heap),
				bench.LoadText(),
			},
		},
	})
	e.timed(
		fmt.Sprintf("references of %d snapshots of %d segments known", e.snapshots, e.segments),
		"≤ 5 s",
		bench.Time(took),
		took <= maxLoad,
	)
	e.counted("peak heap until all are known", "≤ 500 MiB", bench.MiB(heap), heap <= maxHeap)
	return nil
}

// checksAlone measures the load of the references and lookups in a worker process.
func (e *env) checksAlone(ctx context.Context, c *cluster, col *collection) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	p, err := bench.Start(ctx, bench.Command{
		Name: "worker", Args: []string{self, "worker"}, Log: filepath.Join(c.dir, "worker.log"), Pipes: true,
	})
	if err != nil {
		return err
	}
	defer p.Stop()
	defer context.AfterFunc(ctx, p.Kill)()
	err = json.NewEncoder(p.Stdin).Encode(job{
		Endpoint: c.at, Objects: c.objects(), Collection: col.id, Snapshots: e.snapshots,
		First: col.first, Last: col.last, Checks: e.checks, Rounds: e.Rounds, Seed: e.seed, Profile: e.profile,
	})
	if err != nil {
		return err
	}
	var got result
	if err := json.NewDecoder(p.Stdout).Decode(&got); err != nil {
		return errors.Join(err, p.ExitError())
	}
	if want := col.referenced; got.Segments != want || got.Builds != want {
		return fmt.Errorf("%d segments and %d builds are referenced, want %d", got.Segments, got.Builds, want)
	}
	took := bench.Median(got.Checks)
	e.Logf("looked %d segments up in %s, load %s", e.checks, bench.Time(took), bench.LoadText())
	e.Report.Tables = append(e.Report.Tables, bench.Table{
		Title: "The index alone",
		Head: []string{
			"load time",
			"CPU",
			"heap after GC",
			"bytes/snapshot/segment",
			"lookups",
			"referenced",
			"time",
			"spread",
			"CPU",
			"load",
		},
		Rows: [][]string{
			{
				bench.Time(got.Load),
				bench.Time(got.CPU),
				bench.MiB(float64(got.Heap)),
				fmt.Sprintf("%.1f", float64(got.Heap)/float64(e.snapshots)/float64(e.segments)),
				strconv.Itoa(e.checks),
				bench.Percent(float64(got.Held) / float64(e.checks)),
				bench.Time(took),
				bench.Percent(bench.Spread(got.Checks)),
				bench.Time(bench.Median(got.ChecksCPU)),
				bench.LoadText(),
			},
		},
	})
	e.timed(fmt.Sprintf("%d segment lookups", e.checks), "≤ 1 s", bench.Time(took), took <= maxChecks)
	return nil
}

// requests counts the requests to etcd.
type requests struct{ reads, txns, watch float64 }

func (c *cluster) requests(ctx context.Context) (q requests, err error) {
	text, err := bench.Get(ctx, "http://"+c.at+"/metrics")
	if err != nil {
		return q, err
	}
	for _, s := range []struct {
		to     *float64
		metric string
		method string
	}{
		{&q.reads, "grpc_server_handled_total", "Range"},
		{&q.txns, "grpc_server_handled_total", "Txn"},
		{&q.watch, "grpc_server_msg_received_total", "Watch"},
	} {
		if *s.to, err = bench.Sum(text, s.metric, fmt.Sprintf("grpc_method=%q", s.method)); err != nil {
			return q, err
		}
	}
	return q, nil
}

// asked is the cost of one Reclaim.
type asked struct {
	took float64
	requests
}

func (e *env) reclaimOnce(
	ctx context.Context,
	c *cluster,
	col *collection,
	ids []int64,
	want snapshotdv1.ReclaimResult_Outcome,
) (a asked, err error) {
	req := &snapshotdv1.ReclaimRequest{Collection: col.ref(), Deleter: snapshotdv1.Deleter_DELETER_CALLER}
	for _, id := range ids {
		req.Units = append(req.Units, &snapshotdv1.Unit{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: id}})
	}
	before, err := c.requests(ctx)
	if err != nil {
		return a, err
	}
	begin := time.Now()
	resp, err := c.reclaim.Reclaim(ctx, req)
	a.took = time.Since(begin).Seconds()
	if err != nil {
		return a, err
	}
	after, err := c.requests(ctx)
	if err != nil {
		return a, err
	}
	a.requests = requests{after.reads - before.reads, after.txns - before.txns, after.watch - before.watch}
	for i, got := range resp.GetResults() {
		if got.GetOutcome() != want {
			return a, fmt.Errorf("segment %d: %v, want %v", ids[i], got.GetOutcome(), want)
		}
	}
	return a, nil
}

// confirm confirms the deletes of granted units.
func (e *env) confirm(ctx context.Context, c *cluster, col *collection, ids []int64) (float64, error) {
	begin := time.Now()
	resp, err := c.reclaim.ConfirmReclaimed(
		ctx,
		&snapshotdv1.ConfirmReclaimedRequest{Collection: col.ref(), TombstoneIds: ids},
	)
	took := time.Since(begin).Seconds()
	for _, got := range resp.GetResults() {
		if got.GetOutcome() != snapshotdv1.ConfirmResult_OUTCOME_CONFIRMED {
			return took, fmt.Errorf("tombstone %d: %v", got.GetTombstoneId(), got.GetOutcome())
		}
	}
	return took, err
}

// reclaims measures Reclaim of held units and of units without holders.
func (e *env) reclaims(ctx context.Context, c *cluster, col *collection, spare []int64) error {
	oldest := slices.Sorted(slices.Values(col.dropped)) // of full shape, as the spare ones
	heldIDs := oldest[:min(e.units, len(oldest))]
	var free, held []asked
	var confirms []float64
	for round := range e.Rounds + 1 {
		ids := spare[round*e.units:][:e.units]
		steps := []func() error{
			func() error {
				a, err := e.reclaimOnce(ctx, c, col, ids, snapshotdv1.ReclaimResult_OUTCOME_GRANTED)
				if err != nil {
					return err
				}
				free = append(free, a)
				took, err := e.confirm(ctx, c, col, ids)
				confirms = append(confirms, took)
				return err
			},
			func() error {
				a, err := e.reclaimOnce(ctx, c, col, heldIDs, snapshotdv1.ReclaimResult_OUTCOME_HELD)
				held = append(held, a)
				return err
			},
		}
		if round%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
		e.Logf(
			"reclaim of %d units: granted %s, held %s, load %s",
			e.units,
			bench.Time(free[round].took),
			bench.Time(held[round].took),
			bench.LoadText(),
		)
	}
	t := bench.Table{
		Title: "Reclaim",
		Head: []string{
			"units",
			"result",
			"time",
			"spread",
			"etcd: transactions",
			"reads",
			"progress requests",
			"load",
		},
	}
	for _, k := range []struct {
		name string
		n    int
		list []asked
	}{{"granted", e.units, free[1:]}, {"held", len(heldIDs), held[1:]}} {
		column := func(fn func(asked) float64) []float64 {
			out := make([]float64, len(k.list))
			for i, a := range k.list {
				out[i] = fn(a)
			}
			return out
		}
		median := func(fn func(asked) float64) string { return fmt.Sprintf("%.0f", bench.Median(column(fn))) }
		times := column(func(a asked) float64 { return a.took })
		took := bench.Median(times)
		t.Add(strconv.Itoa(k.n), k.name, bench.Time(took), bench.Percent(bench.Spread(times)),
			median(func(a asked) float64 { return a.txns }), median(func(a asked) float64 { return a.reads }),
			median(func(a asked) float64 { return a.watch }), bench.LoadText())
		e.timed(
			fmt.Sprintf("Reclaim of %d units: %s", k.n, k.name),
			"≤ 2 s",
			bench.Time(took),
			took <= maxReclaim,
		)
	}
	t.Add(
		strconv.Itoa(e.units),
		"confirmed",
		bench.Time(bench.Median(confirms[1:])),
		bench.Percent(bench.Spread(confirms[1:])),
		"",
		"",
		"",
		bench.LoadText(),
	)
	e.Report.Tables = append(e.Report.Tables, t)
	return nil
}

// turn is a create and a drop of its snapshot, in seconds.
type turn struct{ create, created, drop, dropped float64 }

func (c *cluster) turn(ctx context.Context, col *collection, name string, snapshots int) (t turn, err error) {
	// CheckReferences waits until the replica's references are as new as the call.
	known := func() error {
		_, err := c.reclaim.CheckReferences(ctx, &snapshotdv1.CheckReferencesRequest{
			Collection: col.ref(), Units: []*snapshotdv1.Unit{{Unit: &snapshotdv1.Unit_SegmentId{SegmentId: col.live[0]}}},
		})
		return err
	}
	begin := time.Now()
	since := func() float64 { return time.Since(begin).Seconds() }
	id, err := create(ctx, c.client, col, name)
	t.create = since()
	if err == nil {
		err = known()
	}
	t.created = since()
	if err != nil {
		return t, err
	}
	if err := c.quiet(ctx, snapshots+1); err != nil {
		return t, err
	}
	begin = time.Now()
	_, err = c.client.Snapshots.DropSnapshot(ctx, &snapshotdv1.DropSnapshotRequest{
		Snapshot:     &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: id}},
		RequestToken: client.NewRequestToken(),
	})
	t.drop = since()
	if err == nil {
		err = known()
	}
	t.dropped = since()
	if err != nil {
		return t, err
	}
	return t, c.quiet(ctx, snapshots)
}

// beside measures a create and a drop beside all snapshots, and in another cluster
// beside none.
func (e *env) beside(ctx context.Context, many *cluster, col *collection, dir string) error {
	none, err := newCluster(ctx, e.options, dir)
	if none != nil {
		defer none.close()
	}
	if err == nil {
		err = none.serve(ctx)
	}
	if err != nil {
		return err
	}
	other, err := newCollection(ctx, none.client)
	if err != nil {
		return err
	}
	if other.live, err = register(ctx, none.client, other, e.segments, slim); err != nil {
		return err
	}
	var a, b []turn
	for round := range e.pairs + 1 {
		name := fmt.Sprintf("beside%d", round)
		steps := []func() error{
			func() error {
				t, err := many.turn(ctx, col, name, e.snapshots)
				a = append(a, t)
				return err
			},
			func() error {
				t, err := none.turn(ctx, other, name, 0)
				b = append(b, t)
				return err
			},
		}
		if round%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return fmt.Errorf("create and drop: %w", err)
			}
		}
	}
	t := bench.Table{
		Title: fmt.Sprintf("Beside %d snapshots and beside none", e.snapshots),
		Head:  []string{"call", fmt.Sprintf("beside %d", e.snapshots), "beside none", "ratio", "spread beside none", "load"},
	}
	for _, k := range []struct {
		what   string
		of     func(turn) float64
		judged bool
	}{
		{"create", func(t turn) float64 { return t.create }, true},
		{"create, until its references are known", func(t turn) float64 { return t.created }, false},
		{"drop", func(t turn) float64 { return t.drop }, true},
		{"drop, until its references are gone", func(t turn) float64 { return t.dropped }, false},
	} {
		var x, y []float64
		for i := range e.pairs {
			x, y = append(x, k.of(a[i+1])), append(y, k.of(b[i+1]))
		}
		ratio := bench.Median(bench.Ratios(x, y))
		t.Add(
			k.what,
			bench.Time(bench.Median(x)),
			bench.Time(bench.Median(y)),
			fmt.Sprintf("%.2f", ratio),
			bench.Percent(bench.Spread(y)),
			bench.LoadText(),
		)
		if k.judged {
			e.timed(
				fmt.Sprintf("%s beside %d snapshots / beside none", k.what, e.snapshots),
				"≤ 1.20 ×",
				fmt.Sprintf("%.2f ×", ratio),
				ratio <= maxRatio,
			)
		}
	}
	e.Report.Tables = append(e.Report.Tables, t)
	return nil
}
