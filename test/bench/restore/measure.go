//go:build linux

package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/snapshotd/snapshotd/test/bench"
)

// The bars.
const (
	minSmall        = 0.85 // of the floor's throughput
	minMedium       = 0.92
	minSmallRclone  = 1.5 // times rclone's
	minMediumRclone = 0.97
	minLarge        = 2 // times the throughput of one request
	maxSegment      = 0.060
	maxSegmentP99   = 0.150
	minDelayed      = 0.88 // of the maximum of the requests in flight
	maxRequests     = 1.02 // for an object
)

// The sizes, in files and segments.
const (
	smallSegments, smallFiles, smallSize    = 50, 60, 64 << 10
	mediumSegments, mediumFiles, mediumSize = 10, 10, 8 << 20
	largeSize                               = 600 << 20
	delayedSegments, delayedFiles           = 200, 60
	delayedSize                             = 1 << 10
	delayedInFlight                         = 64
	firstByte                               = 200 * time.Millisecond
	bytesPerSecond                          = 100 << 20 // of a request
)

// concurrencies are the numbers of concurrent objects of the floor and rclone, of which the
// fastest is used; each is tried up and down.
var concurrencies = []int{8, 16, 32}

// tables in the order of the report
const (
	tableCopy = iota
	tableRequests
	tableOne
	tableDelayed
	tableMany
)

func (e *env) table(i int) *bench.Table {
	if e.Report.Tables == nil {
		e.Report.Tables = []bench.Table{
			{
				Title: "Throughput",
				Head: []string{
					"objects",
					"restore",
					"MiB/s",
					"floor",
					"in flight",
					"spread",
					"ratio",
					"rclone",
					"in flight",
					"spread",
					"ratio",
					"load",
				},
			},
			{Title: "Requests", Head: []string{"objects", "requests", "copies", "lists and reads", "heads", "per object"}},
			{
				Title: "One object, one segment",
				Head:  []string{"restored", "restores", "median", "p99", "one request", "one request / restore", "load"},
			},
			{
				Title: "Latency",
				Head: []string{
					"added per request",
					"objects",
					"in flight",
					"restore",
					"objects/s",
					"of maximum",
					"floor",
					"of maximum",
					"load",
				},
			},
			{
				Title: "A large job",
				Head: []string{
					"segments",
					"files",
					"time",
					"ms/segment",
					"peak heap",
					"job record, bytes",
					"largest task record, bytes",
					"load",
				},
			},
		}
	}
	return &e.Report.Tables[i]
}

// small measures many small objects.
func (e *env) small(ctx context.Context) error {
	return e.throughput(ctx, &class{
		name:     partSmall,
		title:    fmt.Sprintf("%d × 64 KiB", smallSegments*smallFiles),
		segments: smallSegments,
		files:    smallFiles,
		size:     smallSize,
		floor:    minSmall,
		rclone:   minSmallRclone,
		requests: true,
	})
}

// medium measures larger objects.
func (e *env) medium(ctx context.Context) error {
	return e.throughput(ctx, &class{
		name:     partMedium,
		title:    fmt.Sprintf("%d × 8 MiB", mediumSegments*mediumFiles),
		segments: mediumSegments,
		files:    mediumFiles,
		size:     mediumSize,
		floor:    minMedium,
		rclone:   minMediumRclone,
	})
}

// class is a set of objects of one size.
type class struct {
	name, title     string
	segments, files int
	size            int64
	floor, rclone   float64 // the bars
	requests        bool    // counts the requests

	from *captured
}

// variant is a way to copy a class.
type variant struct {
	name string
	run  func(ctx context.Context) (seconds float64, made string, err error)
}

// throughput measures restores of a class, the floor and rclone.
func (e *env) throughput(ctx context.Context, c *class) error {
	if err := e.serve(ctx, e.s3At, etcdRoot, 0); err != nil {
		return err
	}
	var err error
	if c.from, err = e.capture(ctx, e.s3At, c.segments, c.files, c.size); err != nil {
		return err
	}
	floorAt, err := e.best(ctx, c, func(n int) *variant { return e.floorVariant(c, n) })
	if err != nil {
		return err
	}
	variants := []*variant{e.restoreVariant(c), e.floorVariant(c, floorAt)}
	rcloneAt := 0
	if e.rclone != "" {
		other, err := startRclone(ctx, e.rclone, e.Root, e.s3At)
		if err != nil {
			return err
		}
		defer other.process.Stop()
		with := func(n int) *variant { return e.rcloneVariant(c, other, n) }
		if rcloneAt, err = e.best(ctx, c, with); err != nil {
			return err
		}
		variants = append(variants, with(rcloneAt))
	}
	times := make([][]float64, len(variants))
	for round := range e.Rounds + 1 {
		took := make([]float64, len(variants))
		order := []int{0, 1, 2}[:len(variants)]
		if round%2 == 1 {
			slices.Reverse(order)
		}
		for _, i := range order {
			if took[i], err = e.once(ctx, c, variants[i]); err != nil {
				return err
			}
		}
		for i := range variants {
			e.Logf("%s: %s %s", c.title, variants[i].name, bench.Time(took[i]))
			if round > 0 {
				times[i] = append(times[i], took[i])
			}
		}
	}
	if err := e.profiled(ctx, c.name, func() error { _, err := e.once(ctx, c, variants[0]); return err }); err != nil {
		return err
	}
	e.judge(c, times, floorAt, rcloneAt)
	if c.requests {
		return e.count(ctx, c)
	}
	return e.discard(c.from.prefix, c.from.files)
}

// judge adds a row and the bars of a class.
func (e *env) judge(c *class, times [][]float64, floorAt, rcloneAt int) {
	took := bench.Median(times[0])
	floorRatio := bench.Median(bench.Ratios(times[1], times[0]))
	row := []string{
		c.title, bench.Time(took), fmt.Sprintf("%.0f", float64(c.from.bytes)/(1<<20)/took),
		bench.Time(bench.Median(times[1])), strconv.Itoa(floorAt), bench.Percent(bench.Spread(times[1])),
		fmt.Sprintf("%.2f", floorRatio), "", "", "", "", bench.LoadText(),
	}
	e.timed(
		c.title+": throughput / floor",
		fmt.Sprintf("≥ %.2f", c.floor),
		fmt.Sprintf("%.2f", floorRatio),
		floorRatio >= c.floor,
		times[1],
	)
	if len(times) > 2 {
		ratio := bench.Median(bench.Ratios(times[2], times[0]))
		row[7], row[8] = bench.Time(bench.Median(times[2])), strconv.Itoa(rcloneAt)
		row[9] = bench.Percent(bench.Spread(times[2]))
		row[10] = fmt.Sprintf("%.2f", ratio)
		e.timed(
			c.title+": throughput / rclone",
			fmt.Sprintf("≥ %.2f", c.rclone),
			fmt.Sprintf("%.2f", ratio),
			ratio >= c.rclone,
			times[2],
		)
	}
	e.table(tableCopy).Add(row...)
}

// best measures a variant with each number of objects in flight and returns the
// fastest number.
func (e *env) best(ctx context.Context, c *class, with func(inFlight int) *variant) (int, error) {
	sums := map[int]float64{}
	up, down := slices.Clone(concurrencies), slices.Clone(concurrencies)
	slices.Reverse(down)
	for _, n := range append(up, down...) {
		v := with(n)
		took, err := e.once(ctx, c, v)
		if err != nil {
			return 0, err
		}
		e.Logf("%s: %s, %d in flight: %s", c.title, v.name, n, bench.Time(took))
		sums[n] += took
	}
	return slices.MinFunc(concurrencies, func(a, b int) int { return cmp.Compare(sums[a], sums[b]) }), nil
}

// once copies a class, checks that the copy is complete, and removes it.
func (e *env) once(ctx context.Context, c *class, v *variant) (float64, error) {
	took, made, err := v.run(ctx)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", v.name, err)
	}
	return took, e.discard(made, c.from.files)
}

func (e *env) restoreVariant(c *class) *variant {
	return &variant{"restore", func(ctx context.Context) (float64, string, error) {
		took, target, err := e.restore(ctx, c.from)
		return took, fmt.Sprintf("%s%d/", c.from.prefix, target), err
	}}
}

func (e *env) floorVariant(c *class, inFlight int) *variant {
	return &variant{"floor", func(ctx context.Context) (float64, string, error) {
		to := "floor/" + e.Name() + "/"
		res, err := e.floor.do(ctx, job{Op: "copy", S3: e.s3At, Set: c.from.set, Prefix: to, InFlight: inFlight})
		if err != nil {
			return 0, "", err
		}
		return res.Seconds, to, nil
	}}
}

func (e *env) rcloneVariant(c *class, other *rclone, inFlight int) *variant {
	return &variant{"rclone", func(ctx context.Context) (float64, string, error) {
		to := "rclone/" + e.Name() + "/"
		took, err := other.copy(ctx, c.from.prefix+c.from.dir, to+c.from.dir, inFlight)
		return took, to, err
	}}
}

// count counts the requests of a restore.
func (e *env) count(ctx context.Context, c *class) error {
	if err := e.serve(ctx, e.proxy.Addr, etcdRoot, 0); err != nil {
		return err
	}
	e.proxy.Drain()
	if _, err := e.once(ctx, c, e.restoreVariant(c)); err != nil {
		return err
	}
	var copies, reads, heads int
	seen := e.proxy.Drain()
	for _, q := range seen {
		switch q.Method {
		case http.MethodPut:
			copies++
		case http.MethodHead:
			heads++
		case http.MethodGet:
			reads++
		}
	}
	each := float64(len(seen)) / float64(c.from.files)
	e.table(tableRequests).Add(
		c.title,
		strconv.Itoa(len(seen)),
		strconv.Itoa(copies),
		strconv.Itoa(reads),
		strconv.Itoa(heads),
		fmt.Sprintf("%.3f", each),
	)
	e.counted(
		c.title+": requests per object",
		fmt.Sprintf("≤ %.2f", maxRequests),
		fmt.Sprintf("%.3f", each),
		each <= maxRequests,
	)
	return e.discard(c.from.prefix, c.from.files)
}

// segment measures restores of one segment of three small files.
func (e *env) segment(ctx context.Context) error {
	if err := e.serve(ctx, e.s3At, etcdRoot, 0); err != nil {
		return err
	}
	from, err := e.capture(ctx, e.s3At, 1, 3, smallSize)
	if err != nil {
		return err
	}
	const warm = 5
	var times []float64
	for i := range e.Rounds*e.calls + warm {
		took, target, err := e.restore(ctx, from)
		if err != nil {
			return err
		}
		if err := e.discard(fmt.Sprintf("%s%d/", from.prefix, target), from.files); err != nil {
			return err
		}
		if i >= warm {
			times = append(times, took)
		}
	}
	median, p99 := bench.Median(times), bench.Quantile(times, 0.99)
	e.Logf("one segment of 3 files: %s, p99 %s", bench.Time(median), bench.Time(p99))
	e.table(tableOne).Add(
		"a segment of 3 files of 64 KiB",
		strconv.Itoa(len(times)),
		bench.Time(median),
		bench.Time(p99),
		"",
		"",
		bench.LoadText(),
	)
	e.timed(
		"a segment of 3 files: COMPLETED after the call, median",
		"≤ 60 ms",
		bench.Time(median),
		median <= maxSegment,
		nil,
	)
	e.timed("a segment of 3 files: p99", "≤ 150 ms", bench.Time(p99), p99 <= maxSegmentP99, nil)
	return e.profiled(ctx, partSegment, func() error {
		for range 50 {
			if _, _, err := e.restore(ctx, from); err != nil {
				return err
			}
		}
		return nil
	})
}

// large measures an object that is copied in parts, from a store where each
// request takes its time.
func (e *env) large(ctx context.Context) error {
	if err := e.serve(ctx, e.proxy.Addr, etcdRoot, 0); err != nil {
		return err
	}
	from, err := e.capture(ctx, e.s3At, 1, 1, largeSize)
	if err != nil {
		return err
	}
	e.proxy.Pace(pace)
	defer e.proxy.Pace(nil)
	var restores, single []float64
	for round := range e.Rounds + 1 {
		var a, b float64
		steps := []func() error{
			func() error {
				took, target, err := e.restore(ctx, from)
				if err != nil {
					return err
				}
				a = took
				return e.discard(fmt.Sprintf("%s%d/", from.prefix, target), 1)
			},
			func() error {
				to := "floor/" + e.Name() + "/"
				res, err := e.floor.do(ctx, job{Op: "copy", S3: e.proxy.Addr, Set: from.set, Prefix: to, InFlight: 1})
				if err != nil {
					return err
				}
				b = res.Seconds
				return e.discard(to, 1)
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
		e.Logf("600 MiB: restore %s, one request %s", bench.Time(a), bench.Time(b))
		if round > 0 {
			restores, single = append(restores, a), append(single, b)
		}
	}
	ratio := bench.Median(bench.Ratios(single, restores))
	e.table(tableOne).Add("an object of 600 MiB", strconv.Itoa(len(restores)), bench.Time(bench.Median(restores)), "",
		bench.Time(bench.Median(single)), fmt.Sprintf("%.2f", ratio), bench.LoadText())
	e.timed("an object of 600 MiB, 200 ms and 100 MiB/s per request: throughput / one CopyObject", "≥ 2",
		fmt.Sprintf("%.2f", ratio), ratio >= minLarge, single)
	return e.discard(from.prefix, 1)
}

// pace returns the minimum duration of a request: the first byte and its copy.
func pace(q *http.Request) time.Duration {
	var bytes int64
	if q.Header.Get("X-Amz-Copy-Source") != "" {
		bytes = largeSize
		var from, to int64
		if _, err := fmt.Sscanf(q.Header.Get("X-Amz-Copy-Source-Range"), "bytes=%d-%d", &from, &to); err == nil {
			bytes = to - from + 1
		}
	}
	return firstByte + time.Duration(float64(bytes)/bytesPerSecond*float64(time.Second))
}

// delayed measures how well a restore uses its requests in flight when each is slow.
func (e *env) delayed(ctx context.Context) error {
	s3, err := startMemoryS3(ctx, e.Root)
	if err != nil {
		return err
	}
	defer s3.process.Stop()
	const root = etcdRoot + "-delayed"
	if err := e.serve(ctx, s3.at, root, delayedInFlight); err != nil {
		return err
	}
	kv := e.kv
	defer func() { e.kv = kv }()
	if e.kv, err = openEtcd(e.etcdAt, root); err != nil {
		return err
	}
	defer func() { _ = e.kv.Close() }()
	from, err := e.capture(ctx, s3.at, delayedSegments, delayedFiles, delayedSize)
	if err != nil {
		return err
	}
	if err := s3.delay(e.latency); err != nil {
		return err
	}
	var restores, floors []float64
	for round := range e.Rounds + 1 {
		var a, b float64
		steps := []func() error{
			func() error {
				a, _, err = e.restore(ctx, from)
				return err
			},
			func() error {
				res, err := e.floor.do(ctx, job{Op: "copy", S3: s3.at, Set: from.set, Prefix: "floor/", InFlight: delayedInFlight})
				if err == nil {
					b = res.Seconds
				}
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
		e.Logf("%v added: restore %s, floor %s", e.latency, bench.Time(a), bench.Time(b))
		if round > 0 {
			restores, floors = append(restores, a), append(floors, b)
		}
	}
	if err := e.profiled(ctx, partLatency, func() error { _, _, err := e.restore(ctx, from); return err }); err != nil {
		return err
	}
	ideal := float64(from.files) * e.latency.Seconds() / delayedInFlight
	took, floor := bench.Median(restores), bench.Median(floors)
	e.table(tableDelayed).Add(
		e.latency.String(),
		strconv.Itoa(from.files),
		strconv.Itoa(delayedInFlight),
		bench.Time(took),
		fmt.Sprintf(
			"%.0f",
			float64(from.files)/took,
		),
		bench.Percent(ideal/took),
		bench.Time(floor),
		bench.Percent(ideal/floor),
		bench.LoadText(),
	)
	e.timed(
		fmt.Sprintf("%v added per request, %d in flight: share of the maximum", e.latency, delayedInFlight),
		"≥ 88 %",
		bench.Percent(ideal/took),
		ideal/took >= minDelayed,
		floors,
	)
	e.stop()
	return nil
}

// profiled calls fn, with a processor profile of snapshotd if profiles are on.
func (e *env) profiled(ctx context.Context, name string, fn func() error) error {
	if e.profile == "" {
		return nil
	}
	return e.server.Profile(ctx, e.profile, name, 3, fn)
}
