//go:build linux

package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"os"
	"runtime"
	"runtime/pprof"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
)

// The worker loads the references in a separate process without other work. It
// measures their memory and the speed of lookups.

type job struct {
	Endpoint, Objects string
	Collection        int64
	Snapshots         int
	First, Last       int64 // ids to look up, some of which nothing references
	Checks, Rounds    int
	Seed              uint64
	Profile           string // file for a processor profile of the load; empty: none
}

type result struct {
	Load     float64   // seconds from the start of gc.GC's Run
	CPU      float64   // seconds of processor time that it took
	Heap     int64     // bytes, garbage collected
	Segments int64     // distinct ones
	Builds   int64     // likewise
	Checks   []float64 // seconds of each round
	Held     int       // checks of a round that found a reference

	ChecksCPU []float64 // seconds of processor time of each round
}

func work(ctx context.Context, in io.Reader, out io.Writer) error {
	var j job
	if err := json.NewDecoder(in).Decode(&j); err != nil {
		return err
	}
	kv, err := etcd.Open(etcd.Options{Endpoints: []string{j.Endpoint}, Root: etcdRoot})
	if err != nil {
		return err
	}
	defer func() { _ = kv.Close() }()
	store, err := file.Open( //nolint:contextcheck // opening a directory takes no time
		j.Objects,
		file.Options{Shared: true},
	)
	if err != nil {
		return err
	}
	defer func() { _ = store.Close() }()
	if _, _, _, err := kv.Get(ctx, "/format"); err != nil { // connects
		return err
	}
	g := gc.New(gc.Options{
		KV: kv, Catalog: catalog.New(catalog.Options{KV: kv, Now: time.Now, Rand: rand.Reader}),
		Stores: map[string]object.Store{"default": store}, Now: time.Now, Rand: rand.Reader, Log: zap.NewNop(),
	})
	before := heap()
	if j.Profile != "" {
		f, err := os.Create(j.Profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancel(ctx)
	group, groupCtx := errgroup.WithContext(ctx)
	used := processorTime()
	begin := time.Now()
	group.Go(func() error { return g.Run(groupCtx) })
	group.Go(func() error {
		defer cancel()
		return j.measure(groupCtx, g, begin, used, before, out)
	})
	return group.Wait()
}

func heap() int64 {
	runtime.GC()
	runtime.GC() // what finalizers held
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc) //nolint:gosec // less than 2^63
}

// processorTime returns the processor time of this process, in seconds.
func processorTime() float64 {
	var u syscall.Rusage
	if syscall.Getrusage(syscall.RUSAGE_SELF, &u) != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()).Seconds()
}

func (j *job) measure(ctx context.Context, g *gc.GC, begin time.Time, used float64, before int64, out io.Writer) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for g.Stats().Snapshots < j.Snapshots {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r := result{Load: time.Since(begin).Seconds(), CPU: processorTime() - used}
	pprof.StopCPUProfile()
	r.Heap = heap() - before
	s := g.Stats()
	r.Segments, r.Builds = int64(s.Segments), int64(s.Builds)
	counts, err := g.Counts(ctx, j.Collection)
	if err != nil {
		return err
	}
	random := mathrand.New(mathrand.NewPCG(j.Seed, 1))
	ids := make([]int64, j.Checks)
	for range j.Rounds + 1 {
		for i := range ids {
			ids[i] = j.First + random.Int64N(j.Last-j.First+1)
		}
		r.Held = 0
		at, used := time.Now(), processorTime()
		for _, id := range ids {
			if counts.Segment(id) > 0 {
				r.Held++
			}
		}
		r.Checks = append(r.Checks, time.Since(at).Seconds())
		r.ChecksCPU = append(r.ChecksCPU, processorTime()-used)
	}
	if r.Held == 0 {
		return fmt.Errorf("none of %d ids is referenced", j.Checks)
	}
	r.Checks, r.ChecksCPU = r.Checks[1:], r.ChecksCPU[1:]
	return json.NewEncoder(out).Encode(r)
}
