//go:build linux

package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The bars.
const (
	barSize       = 100_000 // segments
	maxFloor      = 1.6
	maxHeap       = 160 << 20
	maxRequests   = 45
	refSize       = 10_000 // segments
	minReference  = 20
	minRegistered = 20_000 // a second
	maxStored     = 800    // bytes a segment
	maxList       = 0.010  // seconds
	maxGet        = 0.005
	minDelayed    = 16
	minDirect     = 2.5
)

// tables in the order of the report
const (
	tableRegister = iota
	tableCreate
	tableFloor
	tableRead
	tableClients
)

func (e *env) table(i int) *bench.Table {
	if e.Report.Tables == nil {
		e.Report.Tables = []bench.Table{
			{Title: "Registration", Head: []string{"segments", "time", "segments/s", "database in use, bytes/segment", "load"}},
			{
				Title: "Create",
				Head: []string{
					"segments",
					"captured after",
					"writing",
					"total",
					"/ floor",
					"reference /",
					"requests",
					"sent",
					"peak heap",
					"load",
				},
			},
			{
				Title: "Floor and reference",
				Head: []string{
					"segments",
					"read",
					"encode",
					"put",
					"floor",
					"spread",
					"range",
					"read and decode",
					"reference",
					"spread",
				},
			},
			{Title: "Reading", Head: []string{"call", "among", "median", "p99", "load"}},
			{
				Title: "Concurrent clients",
				Head:  []string{"added per request", "1 client, snapshots/s", "many, snapshots/s", "ratio", "load"},
			},
		}
	}
	return &e.Report.Tables[i]
}

// timed adds a bar that depends on the load of the machine.
func (e *env) timed(what, want, got string, ok bool) {
	e.Report.Bars = append(e.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok, Timed: true})
}

// counted adds a bar that does not depend on it.
func (e *env) counted(what, want, got string, ok bool) {
	e.Report.Bars = append(e.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok})
}

func (e *env) inUse(ctx context.Context) (bytes int64, err error) {
	// A transaction counts once etcd has written it, at the latest 100 ms after.
	if err := bench.Wait(ctx, 300*time.Millisecond); err != nil {
		return 0, err
	}
	err = bench.WithEtcd(e.etcdAt, func(cli *clientv3.Client) error {
		st, err := cli.Status(ctx, e.etcdAt)
		if err == nil {
			bytes = st.DbSizeInUse
		}
		return err
	})
	return bytes, err
}

// register registers n segments in a new collection, in each round, and returns
// the last.
func (e *env) register(ctx context.Context, n int) (collection, error) {
	var times, sizes []float64
	var col collection
	for round := range e.Rounds + 1 {
		var took, size float64
		var err error
		if col, took, size, err = e.registerOnce(ctx, n); err != nil {
			return col, err
		}
		e.Logf("registered %d segments in %s", n, bench.Time(took))
		if round > 0 {
			times, sizes = append(times, took), append(sizes, size)
		}
	}
	if e.profile != "" && n == slices.Max(e.sizes) {
		if err := e.profiles(
			ctx,
			"register",
			func() error { _, _, _, err := e.registerOnce(ctx, n); return err },
		); err != nil {
			return col, err
		}
	}
	debug.FreeOSMemory()
	rate, size := float64(n)/bench.Median(times), bench.Median(sizes)
	e.table(tableRegister).Add(
		strconv.Itoa(n),
		bench.Time(bench.Median(times)),
		fmt.Sprintf("%.0f", rate),
		fmt.Sprintf("%.0f", size),
		bench.LoadText(),
	)
	if n == barSize {
		e.timed("register 100 000 segments", "≥ 20 000/s", fmt.Sprintf("%.0f/s", rate), rate >= minRegistered)
		e.counted("etcd database in use per segment", "≤ 800 bytes", fmt.Sprintf("%.0f", size), size <= maxStored)
	}
	return col, nil
}

// registerOnce returns the collection, the seconds that it took, and by how many
// bytes a segment the database grew.
func (e *env) registerOnce(ctx context.Context, n int) (col collection, took, size float64, err error) {
	if col, err = newCollection(ctx, e.client, e.Name()); err != nil {
		return col, 0, 0, err
	}
	list, err := newSegments(ctx, e.client, col, n)
	if err != nil {
		return col, 0, 0, err
	}
	streams := messages(col.id, list, e.streams, e.batchSegments)
	debug.FreeOSMemory() // nothing of the making is left to do
	before, err := e.inUse(ctx)
	if err != nil {
		return col, 0, 0, err
	}
	begin := time.Now()
	if err := e.send(ctx, streams, n); err != nil {
		return col, 0, 0, err
	}
	took = time.Since(begin).Seconds()
	after, err := e.inUse(ctx)
	return col, took, float64(after-before) / float64(n), err
}

func (e *env) send(ctx context.Context, streams [][]*snapshotdv1.AddSegmentsRequest, n int) error {
	group, ctx := errgroup.WithContext(ctx)
	var added atomic.Int64
	for _, list := range streams {
		if len(list) == 0 {
			continue
		}
		group.Go(func() error {
			stream, err := e.client.Catalog.AddSegments(ctx)
			if err != nil {
				return err
			}
			for _, m := range list {
				if err := stream.Send(m); err != nil {
					break // CloseAndRecv returns the cause
				}
			}
			resp, err := stream.CloseAndRecv()
			added.Add(resp.GetAdded())
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	if added.Load() != int64(n) {
		return fmt.Errorf("%d of %d segments were added", added.Load(), n)
	}
	return nil
}

// compacted reports the size of the database after compaction and defragmentation.
func (e *env) compacted(ctx context.Context) error {
	return bench.WithEtcd(e.etcdAt, func(cli *clientv3.Client) error {
		before, err := cli.Status(ctx, e.etcdAt)
		if err != nil {
			return err
		}
		count, err := cli.Get(ctx, etcdRoot+"/catalog/segment/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil {
			return err
		}
		if _, err := cli.Compact(ctx, before.Header.GetRevision(), clientv3.WithCompactPhysical()); err != nil {
			return err
		}
		if _, err := cli.Defragment(ctx, e.etcdAt); err != nil {
			return err
		}
		after, err := cli.Status(ctx, e.etcdAt)
		if err != nil {
			return err
		}
		e.table(tableRegister).Add(fmt.Sprintf("all %d, compacted and defragmented", count.Count), "", "",
			fmt.Sprintf("%.0f", float64(after.DbSize)/float64(count.Count)), bench.LoadText())
		return nil
	})
}

// created is one create, as seen from outside.
type created struct {
	capture, write, all float64 // seconds
	requests            int
	bytes               int64
	id                  int64
}

func (e *env) createOnce(ctx context.Context, col collection, n int) (*created, error) {
	e.proxy.Drain()
	begin := time.Now()
	resp, err := e.client.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
		Collection: ref(col.id), Name: e.Name(), RequestToken: client.NewRequestToken(),
	})
	c := &created{all: time.Since(begin).Seconds()}
	if err != nil {
		return nil, err
	}
	if got := resp.GetSnapshot().GetTotals(); got.GetSegments() != int64(n) || got.GetFiles() != int64(n*files) {
		return nil, fmt.Errorf("a snapshot of %d segments and %d files", got.GetSegments(), got.GetFiles())
	}
	c.id = resp.GetSnapshot().GetId()
	seen := e.proxy.Drain()
	c.requests = len(seen)
	var first, lastManifest, last time.Time
	for _, q := range seen {
		c.bytes += q.Bytes
		if q.Method != http.MethodPut {
			continue
		}
		if first.IsZero() || q.Begin.Before(first) {
			first = q.Begin
		}
		if q.End.After(last) {
			last = q.End
		}
		if strings.Contains(q.Path, "/manifest-") && q.Begin.After(lastManifest) {
			lastManifest = q.Begin
		}
	}
	c.capture, c.write = lastManifest.Sub(begin).Seconds(), last.Sub(first).Seconds()
	return c, nil
}

// create measures creates of a collection of n segments, the floor and, up to a
// size, the reference.
func (e *env) create(ctx context.Context, n int, col collection) error {
	if got, err := e.worker.do(ctx, job{Op: "load", Collection: col.id}); err != nil || got.Segments != n {
		return errors.Join(err, fmt.Errorf("the floor loaded %+v", got))
	}
	// The manifests of a create, which the floor must also produce.
	sample, err := e.createOnce(ctx, col, n)
	if err != nil {
		return err
	}
	desc, err := e.client.Snapshots.DescribeSnapshot(ctx, &snapshotdv1.DescribeSnapshotRequest{
		Snapshot: &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Id{Id: sample.id}},
	})
	if err != nil {
		return err
	}
	var parts []int
	var digests []string
	for _, m := range desc.GetManifests() {
		parts, digests = append(parts, int(m.GetSegments())), append(digests, hex.EncodeToString(m.GetSha256()))
	}

	var subject []*created
	var floors, refs, decodes []*result
	for round := range e.Rounds + 1 {
		steps := []func() error{
			func() error {
				c, err := e.createOnce(ctx, col, n)
				subject = append(subject, c)
				return err
			},
			func() error {
				f, err := e.worker.do(ctx, job{Op: "floor", Manifests: parts, Prefix: fmt.Sprintf("floor/%d/%d", n, round)})
				if err == nil && !slices.Equal(f.Digests, digests) {
					err = errors.New("the floor's manifests are not those of the snapshot")
				}
				floors = append(floors, f)
				return err
			},
		}
		if n <= e.referenceMax {
			steps = append(steps, func() error {
				f, err := e.worker.do(ctx, job{Op: "reference", Prefix: fmt.Sprintf("reference/%d/%d", n, round)})
				refs = append(refs, f)
				return err
			})
		}
		if round%2 == 1 { // each has each other before it
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
		d, err := e.worker.do(ctx, job{Op: "decode"})
		if err != nil {
			return err
		}
		decodes = append(decodes, d)
		c, f := subject[round], floors[round]
		e.Logf("created of %d segments in %s, floor %s (%.2f ×)",
			n, bench.Time(c.all), bench.Time(f.total()), c.all/f.total())
	}
	loaded := bench.LoadText()
	// The readings of the heap take time, so they have separate rounds.
	var heaps []float64
	for range e.Rounds {
		heap, err := e.server.PeakHeap(
			ctx,
			20*time.Millisecond,
			func() error { _, err := e.createOnce(ctx, col, n); return err },
		)
		if err != nil {
			return err
		}
		heaps = append(heaps, heap)
	}
	if e.profile != "" && n == slices.Max(e.sizes) {
		if err := e.profiles(ctx, "create", func() error { _, err := e.createOnce(ctx, col, n); return err }); err != nil {
			return err
		}
	}
	e.reportCreate(n, loaded, subject[1:], floors[1:], decodes[1:], refs[min(1, len(refs)):], heaps)
	return nil
}

func column[T any](list []T, fn func(T) float64) []float64 {
	out := make([]float64, len(list))
	for i, v := range list {
		out[i] = fn(v)
	}
	return out
}

func (e *env) reportCreate(n int, loaded string, subject []*created, floors, decodes, refs []*result, heaps []float64) {
	all := column(subject, func(c *created) float64 { return c.all })
	floor := column(floors, (*result).total)
	reference := column(refs, (*result).total)
	ratio := bench.Median(bench.Ratios(all, floor))
	requests := slices.MaxFunc(subject, func(a, b *created) int { return a.requests - b.requests }).requests
	heap := slices.Max(heaps)
	faster, slow, slowSpread := "", "", ""
	if len(refs) > 0 {
		times := bench.Median(bench.Ratios(reference, all))
		faster, slow = fmt.Sprintf("%.0f ×", times), bench.Time(bench.Median(reference))
		slowSpread = fmt.Sprintf("%.0f %%", bench.Spread(reference)*100)
		if n == refSize {
			e.timed("reference / create of 10 000 segments", "≥ 20 ×", fmt.Sprintf("%.0f ×", times),
				times >= minReference)
		}
	}
	median := func(fn func(*created) float64) string { return bench.Time(bench.Median(column(subject, fn))) }
	stage := func(list []*result, fn func(*result) float64) string {
		return bench.Time(bench.Median(column(list, fn)))
	}
	e.table(tableCreate).Add(
		strconv.Itoa(n),
		median(func(c *created) float64 { return c.capture }),
		median(
			func(c *created) float64 { return c.write },
		),
		bench.Time(bench.Median(all)),
		fmt.Sprintf("%.2f", ratio),
		faster,
		strconv.Itoa(requests),
		bench.MiB(float64(subject[0].bytes)),
		bench.MiB(heap),
		loaded,
	)
	e.table(tableFloor).Add(strconv.Itoa(n),
		stage(floors, func(f *result) float64 { return f.Read }), stage(floors, func(f *result) float64 { return f.Encode }),
		stage(floors, func(f *result) float64 { return f.Put }), bench.Time(bench.Median(floor)),
		fmt.Sprintf("%.0f %%", bench.Spread(floor)*100), fmt.Sprintf("%.0f %%", bench.Range(floor)*100),
		stage(decodes, func(f *result) float64 { return f.Read }), slow, slowSpread)
	if n == barSize {
		e.floors = append(e.floors, bench.Spread(floor))
		e.timed("create of 100 000 segments", "≤ 1.6 × floor", fmt.Sprintf("%.2f ×", ratio), ratio <= maxFloor)
		e.counted("peak heap of that create", "≤ 160 MiB", bench.MiB(heap), heap <= maxHeap)
		e.counted("object requests of that create", "≤ 45", strconv.Itoa(requests), requests <= maxRequests)
	}
	if n == refSize && len(refs) > 0 {
		e.floors = append(e.floors, bench.Spread(reference))
	}
}

func (e *env) get(ctx context.Context, path string) ([]byte, error) {
	return bench.Get(ctx, "http://"+e.server.Metrics+path)
}

// profiles writes profiles of snapshotd while fn runs repeatedly for some seconds.
func (e *env) profiles(ctx context.Context, name string, fn func() error) error {
	const seconds = 8
	if err := os.MkdirAll(e.profile, 0o750); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() {
		data, err := e.get(ctx, fmt.Sprintf("/debug/pprof/profile?seconds=%d", seconds))
		ended <- errors.Join(err, os.WriteFile(filepath.Join(e.profile, name+"-cpu.pprof"), data, 0o600))
	}()
	for begin := time.Now(); time.Since(begin) < seconds*time.Second; {
		if err := fn(); err != nil {
			return err
		}
	}
	if err := <-ended; err != nil {
		return err
	}
	data, err := e.get(ctx, "/debug/pprof/allocs")
	return errors.Join(err, os.WriteFile(filepath.Join(e.profile, name+"-allocs.pprof"), data, 0o600))
}

// emptyCollection makes a collection without segments.
func (e *env) emptyCollection(ctx context.Context) (collection, error) {
	return newCollection(ctx, e.client, e.Name())
}

// read measures the calls that read snapshots, among many.
func (e *env) read(ctx context.Context) error {
	col, err := e.emptyCollection(ctx)
	if err != nil {
		return err
	}
	begin := time.Now()
	made, err := e.manySnapshots(ctx, col)
	if err != nil {
		return err
	}
	e.Logf("made %d snapshots in %s", made, bench.Time(time.Since(begin).Seconds()))
	const samples = 1000
	var list, get [2][]float64 // median and p99 of each round
	for round := range e.Rounds + 1 {
		var l, g []float64
		var err error
		lists := func() error { l, err = e.listSamples(ctx, col, samples); return err }
		gets := func() error { g, err = e.getSamples(ctx, made, samples); return err }
		steps := []func() error{lists, gets}
		if round%2 == 1 {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			if err := step(); err != nil {
				return err
			}
		}
		if round > 0 {
			list[0], list[1] = append(list[0], bench.Median(l)), append(list[1], bench.Quantile(l, 0.99))
			get[0], get[1] = append(get[0], bench.Median(g)), append(get[1], bench.Quantile(g, 0.99))
		}
	}
	l, g := bench.Median(list[1]), bench.Median(get[1])
	e.table(tableRead).Add(
		"ListSnapshots, a page of 100",
		strconv.Itoa(made),
		bench.Time(bench.Median(list[0])),
		bench.Time(l),
		bench.LoadText(),
	)
	e.table(tableRead).Add(
		"GetSnapshot by name",
		strconv.Itoa(made),
		bench.Time(bench.Median(get[0])),
		bench.Time(g),
		bench.LoadText(),
	)
	e.timed(fmt.Sprintf("ListSnapshots, a page of 100 among %d, p99", made), "≤ 10 ms", bench.Time(l), l <= maxList)
	e.timed("GetSnapshot, p99", "≤ 5 ms", bench.Time(g), g <= maxGet)
	return nil
}

// manySnapshots makes snapshots of a collection, fewer than wanted when that
// takes too long.
func (e *env) manySnapshots(ctx context.Context, col collection) (int, error) {
	const longest = 3 * time.Minute
	begin := time.Now()
	group, ctx := errgroup.WithContext(ctx)
	var next, made atomic.Int64
	for range 16 {
		group.Go(func() error {
			for time.Since(begin) < longest {
				i := next.Add(1)
				if i > int64(e.listed) {
					return nil
				}
				if _, err := e.client.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
					Collection: ref(col.id), Name: listedName(i - 1), RequestToken: client.NewRequestToken(),
				}); err != nil {
					return err
				}
				made.Add(1)
			}
			return nil
		})
	}
	err := group.Wait()
	return int(made.Load()), err
}

func listedName(i int64) string { return fmt.Sprintf("listed-%d", i) }

// listSamples lists pages, from the newest snapshot to the oldest and again.
func (e *env) listSamples(ctx context.Context, col collection, samples int) ([]float64, error) {
	var times []float64
	token := ""
	for len(times) < samples {
		begin := time.Now()
		resp, err := e.client.Snapshots.ListSnapshots(ctx, &snapshotdv1.ListSnapshotsRequest{
			Collection: ref(col.id), PageSize: 100, PageToken: token,
		})
		if err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin).Seconds())
		token = resp.GetNextPageToken()
	}
	return times, nil
}

func (e *env) getSamples(ctx context.Context, made, samples int) ([]float64, error) {
	var times []float64
	for i := range samples {
		name := listedName(int64(i * 7919 % made))
		begin := time.Now()
		if _, err := e.client.Snapshots.GetSnapshot(ctx, &snapshotdv1.GetSnapshotRequest{
			Snapshot: &snapshotdv1.SnapshotRef{Ref: &snapshotdv1.SnapshotRef_Name{Name: name}},
		}); err != nil {
			return nil, err
		}
		times = append(times, time.Since(begin).Seconds())
	}
	return times, nil
}

// many measures how many snapshots many clients take at once, of a collection
// each, against one client.
func (e *env) many(ctx context.Context) error {
	const segments = 10
	cols := make([]collection, e.clients)
	for i := range cols {
		var err error
		if cols[i], err = e.emptyCollection(ctx); err != nil {
			return err
		}
		list, err := newSegments(ctx, e.client, cols[i], segments)
		if err != nil {
			return err
		}
		if err := e.send(ctx, messages(cols[i].id, list, 1, segments), segments); err != nil {
			return err
		}
	}
	for _, c := range []struct {
		delay time.Duration
		least float64
		want  string
	}{
		{e.latency, minDelayed, "≥ 16 ×"},
		{0, minDirect, "≥ 2.5 ×"},
	} {
		e.proxy.Delay(c.delay)
		var one, all []float64
		for round := range e.Rounds + 1 {
			var a, b float64
			var err error
			steps := []func() error{
				func() error { a, err = e.rate(ctx, cols[:1]); return err },
				func() error { b, err = e.rate(ctx, cols); return err },
			}
			if round%2 == 1 {
				slices.Reverse(steps)
			}
			for _, step := range steps {
				if err := step(); err != nil {
					return err
				}
			}
			e.Logf("%v added: 1 client %.1f/s, %d clients %.1f/s (%.1f ×)", c.delay, a, len(cols), b, b/a)
			if round > 0 {
				one, all = append(one, a), append(all, b)
			}
		}
		times := bench.Median(bench.Ratios(all, one))
		e.table(tableClients).Add(
			c.delay.String(),
			fmt.Sprintf("%.1f", bench.Median(one)),
			fmt.Sprintf("%.1f", bench.Median(all)),
			fmt.Sprintf("%.1f", times),
			bench.LoadText(),
		)
		e.timed(fmt.Sprintf("%d clients / one client, %v added per request", len(cols), c.delay), c.want,
			fmt.Sprintf("%.1f ×", times), times >= c.least)
	}
	e.proxy.Delay(0)
	return nil
}

// rate returns the snapshots per second of one client per collection, each without
// pause.
func (e *env) rate(ctx context.Context, cols []collection) (float64, error) {
	group, ctx := errgroup.WithContext(ctx)
	base := e.Name()
	var made atomic.Int64
	begin := time.Now()
	for i, col := range cols {
		group.Go(func() error {
			for k := 0; time.Since(begin) < e.window; k++ {
				if _, err := e.client.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
					Collection: ref(col.id), Name: fmt.Sprintf("%s-%d-%d", base, i, k), RequestToken: client.NewRequestToken(),
				}); err != nil {
					return err
				}
				made.Add(1)
			}
			return nil
		})
	}
	err := group.Wait()
	return float64(made.Load()) / time.Since(begin).Seconds(), err
}
