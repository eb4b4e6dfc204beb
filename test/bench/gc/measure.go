//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The bars.
const (
	minRatio = 0.9 // of the floor's throughput
	maxIdle  = 1   // seconds
)

const (
	collections = 10 // of part idle
	livingEach  = 1  // files per segment of part idle

	pollEvery    = 50 * time.Millisecond  // until the end of a round
	heapInterval = 200 * time.Millisecond // of the heap readings
)

// concurrencies are the numbers of concurrent requests of the floor, of which the fastest is
// used; each is tried up and down.
var concurrencies = []int{2, 4, 8}

// tables in the order of the report
const (
	tableDelete = iota
	tableCost
	tableRequests
	tableIdle
	tableGrants
)

func (e *env) table(i int) *bench.Table {
	if e.Report.Tables == nil {
		e.Report.Tables = []bench.Table{
			{
				Title: "Deleting",
				Head: []string{
					"segments",
					"objects",
					"rounds",
					"cycle",
					"objects/s",
					"response",
					"floor",
					"objects/s",
					"in flight",
					"spread",
					"ratio",
					"load",
				},
			},
			{
				Title: "Processor time and memory",
				Head: []string{
					"segments",
					"CPU: snapshotd",
					"etcd",
					"versitygw",
					"floor",
					"its versitygw",
					"peak heap",
					"etcd before",
					"after",
					"load",
				},
			},
			{Title: "Requests", Head: []string{"objects", "requests", "deletes", "others", "per 1000 objects"}},
			{
				Title: "Nothing to delete",
				Head: []string{
					"live segments",
					"held units",
					"registered in",
					"etcd database",
					"cycle",
					"spread",
					"object requests",
					"peak heap",
					"load",
				},
			},
			{
				Title: "Grants alone",
				Head:  []string{"units", "rounds", "time", "grants/s", "spread", "CPU: snapshotd", "etcd", "load"},
			},
		}
	}
	return &e.Report.Tables[i]
}

// took is the cost of the delete of a set.
type took struct {
	seconds               float64 // until the end of the deletes
	answered              float64 // until the response
	client, etcd, gateway float64 // processor time, seconds; client is snapshotd or the floor
}

// collect runs a cycle over a collection that grants its whole set. It returns when
// etcd has no tombstone any more.
func (e *env) collect(ctx context.Context, c *collection) (t took, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	used := func() [3]float64 {
		return [3]float64{e.server.CPUSeconds(), e.etcd.CPUSeconds(), e.gateway.CPUSeconds()}
	}
	before := used()
	begin := time.Now()
	answered := make(chan error, 1)
	go func() {
		err := e.ask(
			ctx,
			&snapshotdv1.CollectRequest{Collection: c.ref, Tolerance: durationpb.New(0), Force: true, Wait: true},
			func(s *snapshotdv1.CollectSummary) error {
				if s.GetGranted() != int64(c.set.Segments) || s.GetFiles() != int64(c.set.Segments*c.set.Each) ||
					s.GetError() != "" {
					return fmt.Errorf("a round of %d segments: %v", c.set.Segments, s)
				}
				return nil
			},
		)
		t.answered = time.Since(begin).Seconds()
		if err != nil {
			cancel(err)
		}
		answered <- err
	}()
	err = e.awaitGone(ctx, c)
	t.seconds = time.Since(begin).Seconds()
	after := used()
	t.client, t.etcd, t.gateway = after[0]-before[0], after[1]-before[1], after[2]-before[2]
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	return t, errors.Join(err, <-answered)
}

// ask calls Collect, reads the stream and checks its summary.
func (e *env) ask(
	ctx context.Context,
	req *snapshotdv1.CollectRequest,
	check func(*snapshotdv1.CollectSummary) error,
) error {
	stream, err := e.client.Collector.Collect(ctx, req)
	if err != nil {
		return err
	}
	var summary *snapshotdv1.CollectSummary
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		summary = cmp.Or(m.GetSummary(), summary)
	}
	if summary == nil {
		return errors.New("the cycle ended without a summary")
	}
	return check(summary)
}

// awaitGone waits until etcd has no key of a set. It polls the last segment, which is
// deleted with the last batch, and then all prefixes: a low load for etcd.
func (e *env) awaitGone(ctx context.Context, c *collection) error {
	last := c.set.First + int64(c.set.Segments) - 1
	tick := time.NewTicker(pollEvery)
	defer tick.Stop()
	for {
		res, err := e.kv.Txn(ctx, meta.Txn{Then: []meta.Op{
			meta.Get(keys.Segment(c.id, last)), meta.Get(keys.Unit(c.id, last)), meta.Get(keys.Tombstone(c.id, last)),
		}})
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(res.Ranges, func(kvs []meta.KeyValue) bool { return len(kvs) > 0 }) {
			gone := true
			for _, prefix := range []string{keys.SegmentPrefix(c.id), keys.UnitPrefix(c.id), keys.TombstonePrefix(c.id)} {
				from, to := meta.Prefix(prefix)
				some, err := e.kv.Range(ctx, meta.Range{From: from, To: to, Limit: 1, KeysOnly: true})
				if err != nil {
					return err
				}
				gone = gone && len(some.KVs) == 0
			}
			if gone {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// made creates a collection with dropped segments; with whole the collection itself
// is dropped.
func (e *env) made(ctx context.Context, segments int, whole, written bool) (*collection, error) {
	c, err := e.newCollection(ctx, segments, filesEach, written)
	if err != nil {
		return nil, err
	}
	if !whole {
		return c, e.dropSegments(ctx, c, segments)
	}
	_, err = e.client.Catalog.DropCollection(
		ctx,
		&snapshotdv1.DropCollectionRequest{Collection: c.ref, RequestToken: client.NewRequestToken()},
	)
	return c, err
}

// once creates a collection, deletes its segments by a cycle, and checks that all
// objects are deleted.
func (e *env) once(ctx context.Context, segments int, whole bool) (took, error) {
	c, err := e.made(ctx, segments, whole, true)
	if err != nil {
		return took{}, err
	}
	// Without it each round has the history of all rounds before it.
	if _, err := bench.Defragment(ctx, e.etcdAt); err != nil {
		return took{}, err
	}
	t, err := e.collect(ctx, c)
	if err != nil {
		return t, err
	}
	return t, errors.Join(e.left(c.set.Prefix), e.forgetFiles(c.set.Prefix))
}

// floorOnce deletes the same number of objects with the floor.
func (e *env) floorOnce(ctx context.Context, segments, inFlight int) (t took, err error) {
	s := set{
		Prefix:     "floor/" + e.Name() + "/",
		Collection: 1,
		Partition:  2,
		First:      1 << 30,
		Segments:   segments,
		Each:       filesEach,
	}
	if err := e.write(ctx, &s); err != nil {
		return t, err
	}
	gateway, used := e.gateway.CPUSeconds(), e.floor.process.CPUSeconds()
	t.seconds, err = e.floor.delete(ctx, job{S3: e.serving, Set: s, InFlight: inFlight})
	if err != nil {
		return t, err
	}
	t.gateway, t.client = e.gateway.CPUSeconds()-gateway, e.floor.process.CPUSeconds()-used
	return t, errors.Join(e.left(s.Prefix), e.forgetFiles(s.Prefix))
}

// best chooses the number of concurrent requests of the floor.
func (e *env) best(ctx context.Context) error {
	if e.inFlight > 0 {
		return nil
	}
	segments := max(e.segments/4, 1)
	sums := map[int]float64{}
	up, down := slices.Clone(concurrencies), slices.Clone(concurrencies)
	slices.Reverse(down)
	for _, n := range append(up, down...) {
		t, err := e.floorOnce(ctx, segments, n)
		if err != nil {
			return err
		}
		e.Logf("floor, %d in flight: %d objects in %s", n, segments*filesEach, bench.Time(t.seconds))
		sums[n] += t.seconds
	}
	e.inFlight = slices.MinFunc(concurrencies, func(a, b int) int { return cmp.Compare(sums[a], sums[b]) })
	return nil
}

// deletes measures cycles over dropped segments of a live collection, in turns with
// the floor.
func (e *env) deletes(ctx context.Context) error {
	if err := e.serve(ctx, e.s3At, -1); err != nil {
		return err
	}
	if err := e.best(ctx); err != nil {
		return err
	}
	var subject, floors []took
	for round := range e.Rounds + 1 {
		a, b, err := e.both(ctx, e.segments, false, round%2 == 1)
		if err != nil {
			return err
		}
		if round > 0 {
			subject, floors = append(subject, a), append(floors, b)
		}
	}
	e.floors = seconds(floors)
	e.judge(fmt.Sprintf("%d", e.segments), e.segments, subject, floors)
	e.cost(strconv.Itoa(e.segments), subject, floors, "", "", "")
	if e.profile != "" {
		c, err := e.made(ctx, e.segments, false, true)
		if err != nil {
			return err
		}
		if err := e.profiled(ctx, partRounds, func() error { _, err := e.collect(ctx, c); return err }); err != nil {
			return err
		}
		if err := errors.Join(e.left(c.set.Prefix), e.forgetFiles(c.set.Prefix)); err != nil {
			return err
		}
	}
	return e.requests(ctx)
}

// both measures the subject and the floor, in the order of floorFirst.
func (e *env) both(ctx context.Context, segments int, whole, floorFirst bool) (a, b took, err error) {
	steps := []func() error{
		func() (err error) { a, err = e.once(ctx, segments, whole); return err },
		func() (err error) { b, err = e.floorOnce(ctx, segments, e.inFlight); return err },
	}
	if floorFirst {
		slices.Reverse(steps)
	}
	for _, step := range steps {
		if err := step(); err != nil {
			return a, b, err
		}
	}
	e.Logf(
		"%d segments: round %s, answered after %s, floor %s: %.2f; processor: snapshotd %s, etcd %s, versitygw %s; "+
			"floor %s, versitygw %s",
		segments,
		bench.Time(a.seconds),
		bench.Time(a.answered),
		bench.Time(b.seconds),
		b.seconds/a.seconds,
		bench.Time(a.client),
		bench.Time(a.etcd),
		bench.Time(a.gateway),
		bench.Time(b.client),
		bench.Time(b.gateway),
	)
	return a, b, nil
}

func seconds(list []took) []float64 { return column(list, func(t took) float64 { return t.seconds }) }

func column(list []took, fn func(took) float64) []float64 {
	out := make([]float64, len(list))
	for i, t := range list {
		out[i] = fn(t)
	}
	return out
}

// row adds a row for rounds, and returns their throughput relative to the floor.
func (e *env) row(what string, segments int, subject, floors []took) (ratio float64) {
	objects := segments * filesEach
	a, b := bench.Median(seconds(subject)), bench.Median(seconds(floors))
	ratio = bench.Median(bench.Ratios(seconds(floors), seconds(subject)))
	e.table(tableDelete).Add(
		what,
		strconv.Itoa(objects),
		strconv.Itoa(len(subject)),
		bench.Time(a),
		rate(objects, a),
		bench.Time(bench.Median(column(subject, func(t took) float64 { return t.answered }))),
		bench.Time(b),
		rate(objects, b),
		strconv.Itoa(e.inFlight),
		bench.Percent(bench.Spread(seconds(floors))),
		fmt.Sprintf("%.2f", ratio),
		bench.LoadText(),
	)
	return ratio
}

// judge adds a row and the bar for rounds.
func (e *env) judge(what string, segments int, subject, floors []took) {
	ratio := e.row(what, segments, subject, floors)
	e.timed(bench.Bar{
		What: fmt.Sprintf("%s segments of %d files: throughput / floor", what, filesEach),
		Want: fmt.Sprintf("≥ %.2f", minRatio), Got: fmt.Sprintf("%.2f", ratio), OK: ratio >= minRatio,
	}, e.floors, bench.MinRounds)
}

func rate(n int, seconds float64) string { return fmt.Sprintf("%.0f", float64(n)/seconds) }

// cost adds a row for processor time and memory of rounds.
func (e *env) cost(what string, subject, floors []took, heap, before, after string) {
	median := func(list []took, fn func(took) float64) string { return bench.Time(bench.Median(column(list, fn))) }
	e.table(tableCost).Add(
		what,
		median(subject, func(t took) float64 { return t.client }),
		median(subject, func(t took) float64 { return t.etcd }),
		median(
			subject,
			func(t took) float64 { return t.gateway },
		),
		median(floors, func(t took) float64 { return t.client }),
		median(floors, func(t took) float64 { return t.gateway }),
		heap,
		before,
		after,
		bench.LoadText(),
	)
}

// requests counts the requests of a round.
func (e *env) requests(ctx context.Context) error {
	if err := e.serve(ctx, e.proxy.Addr, -1); err != nil {
		return err
	}
	c, err := e.made(ctx, e.segments, false, true)
	if err != nil {
		return err
	}
	e.proxy.Drain()
	if _, err := e.collect(ctx, c); err != nil {
		return err
	}
	deletes, seen := 0, e.proxy.Drain()
	for _, q := range seen {
		if q.Method == http.MethodPost || q.Method == http.MethodDelete {
			deletes++
		}
	}
	objects := e.segments * filesEach
	e.table(tableRequests).Add(
		strconv.Itoa(objects),
		strconv.Itoa(len(seen)),
		strconv.Itoa(deletes),
		strconv.Itoa(len(seen)-deletes),
		fmt.Sprintf("%.2f", float64(len(seen))*1000/float64(objects)),
	)
	return errors.Join(e.left(c.set.Prefix), e.forgetFiles(c.set.Prefix))
}

// fullRound measures one large round, with its memory.
func (e *env) fullRound(ctx context.Context) error {
	if err := e.serve(ctx, e.s3At, -1); err != nil {
		return err
	}
	if err := e.best(ctx); err != nil {
		return err
	}
	b, err := e.floorOnce(ctx, e.full, e.inFlight)
	if err != nil {
		return err
	}
	c, err := e.made(ctx, e.full, false, true)
	if err != nil {
		return err
	}
	before, err := bench.Defragment(ctx, e.etcdAt)
	if err != nil {
		return err
	}
	var a took
	heap, err := e.server.PeakHeap(ctx, heapInterval, func() (err error) { a, err = e.collect(ctx, c); return err })
	if err != nil {
		return err
	}
	after, err := bench.Defragment(ctx, e.etcdAt)
	if err != nil {
		return err
	}
	e.Logf(
		"%d segments: round %s, floor %s: %.2f, peak heap %s, etcd %s before and %s after",
		e.full,
		bench.Time(a.seconds),
		bench.Time(b.seconds),
		b.seconds/a.seconds,
		bench.MiB(heap),
		bench.MiB(float64(before)),
		bench.MiB(float64(after)),
	)
	what := strconv.Itoa(e.full)
	e.judge(what, e.full, []took{a}, []took{b})
	e.cost(what, []took{a}, []took{b}, bench.MiB(heap), bench.MiB(float64(before)), bench.MiB(float64(after)))
	return errors.Join(e.left(c.set.Prefix), e.forgetFiles(c.set.Prefix))
}

// dropped measures a round over a dropped collection.
func (e *env) dropped(ctx context.Context) error {
	if err := e.serve(ctx, e.s3At, -1); err != nil {
		return err
	}
	if err := e.best(ctx); err != nil {
		return err
	}
	a, b, err := e.both(ctx, e.segments, true, false)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("dropped collection, %d", e.segments)
	e.judge(what, e.segments, []took{a}, []took{b})
	e.cost(what, []took{a}, []took{b}, "", "", "")
	return nil
}

// delayed measures rounds with slow requests, as of a distant store. The floor has
// the concurrency of snapshotd.
func (e *env) delayed(ctx context.Context) error {
	if err := e.serve(ctx, e.proxy.Addr, -1); err != nil {
		return err
	}
	e.proxy.Delay(e.latency)
	defer e.proxy.Delay(0)
	segments := max(e.segments/4, 1)
	var subject, floors []took
	was := e.inFlight
	defer func() { e.inFlight = was }()
	e.inFlight = concurrencies[len(concurrencies)-1]
	for round := range e.Rounds + 1 {
		a, b, err := e.both(ctx, segments, false, round%2 == 1)
		if err != nil {
			return err
		}
		if round > 0 {
			subject, floors = append(subject, a), append(floors, b)
		}
	}
	e.proxy.Drain() // not reported
	e.row(fmt.Sprintf("%d, %v added to a request", segments, e.latency), segments, subject, floors)
	return nil
}

// idle measures rounds with nothing to delete, among many live segments and some
// held units.
func (e *env) idle(ctx context.Context) error {
	if err := e.serve(ctx, e.proxy.Addr, -1); err != nil {
		return err
	}
	begin := time.Now()
	for i := range collections {
		segments := e.living / collections
		if i == 0 {
			segments += e.held
		}
		c, err := e.newCollection(ctx, segments, livingEach, false)
		if err != nil {
			return err
		}
		if i > 0 {
			continue
		}
		if _, err := e.client.Snapshots.CreateSnapshot(ctx, &snapshotdv1.CreateSnapshotRequest{
			Collection: c.ref, Name: c.name, RequestToken: client.NewRequestToken(),
		}); err != nil {
			return err
		}
		if err := e.dropSegments(ctx, c, e.held); err != nil {
			return err
		}
	}
	registered := time.Since(begin)
	e.Logf("registered %d segments in %v", e.living+e.held, registered.Round(time.Second))
	size, err := bench.Defragment(ctx, e.etcdAt)
	if err != nil {
		return err
	}
	round := func() error {
		return e.ask(
			ctx,
			&snapshotdv1.CollectRequest{Tolerance: durationpb.New(0), Wait: true},
			func(s *snapshotdv1.CollectSummary) error {
				if s.GetGranted() != 0 || s.GetHeld() != int64(e.held) || s.GetError() != "" {
					return fmt.Errorf("a round with nothing to delete: %v", s)
				}
				return nil
			},
		)
	}
	var times []float64
	requests := 0
	for i := range e.Rounds + 1 {
		e.proxy.Drain()
		begin := time.Now()
		if err := round(); err != nil {
			return err
		}
		took := time.Since(begin).Seconds()
		seen := e.proxy.Drain()
		e.Logf("nothing to delete: %s, %d requests", bench.Time(took), len(seen))
		if i > 0 {
			times, requests = append(times, took), max(requests, len(seen))
		}
	}
	heap, err := e.server.PeakHeap(ctx, heapInterval/10, round)
	if err != nil {
		return err
	}
	median := bench.Median(times)
	e.table(tableIdle).Add(
		strconv.Itoa(e.living),
		strconv.Itoa(e.held),
		registered.Round(time.Second).String(),
		bench.MiB(float64(size)),
		bench.Time(median),
		bench.Percent(bench.Spread(times)),
		strconv.Itoa(requests),
		bench.MiB(heap),
		bench.LoadText(),
	)
	what := fmt.Sprintf("nothing to delete among %d live segments and %d held units", e.living, e.held)
	e.timed(bench.Bar{What: what + ": time", Want: "≤ 1 s", Got: bench.Time(median), OK: median <= maxIdle}, nil, 0)
	e.counted(bench.Bar{What: what + ": object requests", Want: "0", Got: strconv.Itoa(requests), OK: requests == 0})
	return e.profiled(ctx, partIdle, func() error {
		for range 5 {
			if err := round(); err != nil {
				return err
			}
		}
		return nil
	})
}

// grants measures the speed of grants with nearly no deletes. It leaves tombstones
// and so runs last.
func (e *env) grants(ctx context.Context) error {
	if err := e.serve(ctx, e.s3At, 1); err != nil {
		return err
	}
	if e.profile != "" {
		c, err := e.made(ctx, e.segments, false, false)
		if err != nil {
			return err
		}
		if err := e.profiled(ctx, partGrants, func() error {
			return e.ask(
				ctx,
				&snapshotdv1.CollectRequest{Collection: c.ref, Tolerance: durationpb.New(0), Force: true},
				func(*snapshotdv1.CollectSummary) error { return nil },
			)
		}); err != nil {
			return err
		}
	}
	var list []took
	for i := range e.Rounds + 1 {
		c, err := e.made(ctx, e.segments, false, false)
		if err != nil {
			return err
		}
		used := [2]float64{e.server.CPUSeconds(), e.etcd.CPUSeconds()}
		begin := time.Now()
		if err := e.ask(
			ctx,
			&snapshotdv1.CollectRequest{Collection: c.ref, Tolerance: durationpb.New(0), Force: true},
			func(s *snapshotdv1.CollectSummary) error {
				if s.GetGranted() != int64(e.segments) || s.GetError() != "" {
					return fmt.Errorf("a round of %d segments: %v", e.segments, s)
				}
				return nil
			},
		); err != nil {
			return err
		}
		t := took{
			seconds: time.Since(begin).Seconds(),
			client:  e.server.CPUSeconds() - used[0],
			etcd:    e.etcd.CPUSeconds() - used[1],
		}
		e.Logf(
			"%d grants in %s; processor: snapshotd %s, etcd %s",
			e.segments,
			bench.Time(t.seconds),
			bench.Time(t.client),
			bench.Time(t.etcd),
		)
		if i > 0 {
			list = append(list, t)
		}
	}
	median := bench.Median(seconds(list))
	e.table(tableGrants).Add(
		strconv.Itoa(e.segments),
		strconv.Itoa(len(list)),
		bench.Time(median),
		rate(e.segments, median),
		bench.Percent(bench.Spread(seconds(list))),
		bench.Time(bench.Median(column(list, func(t took) float64 { return t.client }))),
		bench.Time(bench.Median(column(list, func(t took) float64 { return t.etcd }))),
		bench.LoadText(),
	)
	return nil
}

// profiled calls fn, with a processor profile of snapshotd if profiles are on.
func (e *env) profiled(ctx context.Context, name string, fn func() error) error {
	if e.profile == "" {
		return nil
	}
	return e.server.Profile(ctx, e.profile, name, 5, fn)
}
