//go:build linux

package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/test/bench"
)

// The bounds of the counts in idle state.
const (
	slopeOfCounts = 0.2 // of goroutines, files, keys and objects, per round
	riseOfCounts  = 4
	maxPooled     = 128 // configured connections of a replica to the object store
	warmUp        = 6   // rounds of a replica until its pools are full
	bytesOfToken  = 256 // maximum of the record of a request token in etcd
)

// report judges the samples.
func (e *env) report(samples []*sample) *bench.Report {
	counted := samples[len(samples)/3:]
	rep := &bench.Report{Name: "soak", Facts: []string{
		fmt.Sprintf("Commit %s, %s, %s.", bench.Commit(), bench.Today(), bench.Machine()),
		fmt.Sprintf("Seed %d; %d rounds in %v, of which the last %d count; load average %s after.",
			e.seed, len(samples), time.Since(e.began).Round(time.Second), len(counted), bench.LoadText()),
		"Samples are taken in idle state. Goroutines and files exclude those of pooled connections to the object store " +
			"and of the sampling; heaps are measured after a garbage collection.",
	}}
	rounds := bench.Table{Title: "Rounds", Head: []string{
		"round",
		"load",
		"idle after",
		"keys",
		"bytes",
		"restores",
		"tokens",
		"leases",
		"etcd",
		"objects",
		"replicas: goroutines, files, pooled connections, heap (KiB), memory and its peak (MiB)",
	}}
	for _, s := range samples {
		rounds.Add(row(s)...)
	}
	calls := bench.Table{Title: "Load", Head: []string{"operation and outcome", "times"}}
	for _, name := range slices.Sorted(maps.Keys(e.calls)) {
		calls.Add(name, fmt.Sprint(e.calls[name]))
	}
	rep.Tables = []bench.Table{rounds, calls}

	same := func(what string) bound { return bound{what, slopeOfCounts, riseOfCounts, number} }
	etcd := func(value func(stored) int) []point {
		return pointsOf(counted, func(s *sample) float64 { return float64(value(s.stored)) })
	}
	warm := func(value func(*state) float64) []point {
		return slices.DeleteFunc(pointsOfReplicas(counted, value), func(p point) bool { return p.age < warmUp })
	}
	rep.Bars = []bench.Bar{
		judge(
			same("goroutines of a replica"),
			pointsOfReplicas(counted, func(s *state) float64 { return float64(s.goroutines) }),
		),
		judge(same("open files of a replica"), pointsOfReplicas(counted, func(s *state) float64 { return float64(s.files) })),
		judge(bound{"heap of a replica", 6 << 10, 1 << 20, kib}, warm(func(s *state) float64 { return s.heap })),
		judge(bound{"peak memory of a replica", 512 << 10, 16 << 20, kib}, warm(func(s *state) float64 { return s.peak })),
		maximum(
			"pooled connections of a replica",
			maxPooled,
			number,
			pointsOfReplicas(counted, func(s *state) float64 { return float64(s.pooled) }),
		),
		judge(same("keys in etcd"), etcd(func(s stored) int { return s.keys })),
		judge(bound{"bytes of these keys", 64, 1024, number}, etcd(func(s stored) int { return s.bytes })),
		judge(same("leases"), etcd(func(s stored) int { return s.leases })),
		maximum("keys of restores without a record", 0, number, etcd(func(s stored) int { return s.orphaned })),
		maximum(
			"restores past their removal time",
			0,
			number,
			pointsOf(counted, func(s *sample) float64 { return float64(s.overdue) }),
		),
		maximum("request tokens without a lease", 0, number, etcd(func(s stored) int { return s.unleased })),
		judge(bound{"etcd database without history and request tokens", 1 << 10, 64 << 10, kib},
			pointsOf(counted, func(s *sample) float64 { return float64(s.database - int64(s.stored.tokens*bytesOfToken)) })),
		judge(same("objects"), pointsOf(counted, func(s *sample) float64 { return float64(s.objects) })),
		maximum("unfinished uploads", 0, number, pointsOf(counted, func(s *sample) float64 { return float64(s.uploads) })),
		{What: "unexpected errors", Want: "0", Got: fmt.Sprint(len(e.unexpected)), OK: len(e.unexpected) == 0},
	}
	if _, missed, _ := rep.Count(); missed > 0 && len(counted) > 1 {
		evidence := bench.Table{Title: "Evidence", Head: []string{"growth and errors"}}
		for _, line := range slices.Concat(grownGoroutines(counted), grownStacks(counted[1].stored.classes,
			counted[len(counted)-1].stored.classes), e.unexpected[:min(len(e.unexpected), 20)]) {
			evidence.Add(line)
		}
		rep.Tables = append(rep.Tables, evidence)
	}
	return rep
}

// row returns the row of a sample.
func row(s *sample) []string {
	round := fmt.Sprint(s.round)
	if s.failed {
		round += " (leader failed)"
	}
	list := make([]string, len(s.replicas))
	for i, p := range s.replicas {
		list[i] = fmt.Sprintf(
			"%s: %d, %d, %d, %.0f, %.1f, %.1f",
			p.series,
			p.goroutines,
			p.files,
			p.pooled,
			p.heap/1024,
			p.rss/(1<<20),
			p.peak/(1<<20),
		)
	}
	return []string{
		round,
		bench.Time(s.load.Seconds()),
		bench.Time(s.idle.Seconds()),
		fmt.Sprint(s.stored.keys),
		fmt.Sprint(s.stored.bytes),
		fmt.Sprint(s.stored.jobs),
		fmt.Sprint(s.stored.tokens),
		fmt.Sprint(s.stored.leases),
		kib(float64(s.database)),
		fmt.Sprint(s.objects),
		strings.Join(list, "; "),
	}
}

// leader waits for a leader other than not and returns its name.
func (e *env) leader(ctx context.Context, not string) (string, error) {
	for n := 0; ; n++ {
		each, cancel := context.WithTimeout(ctx, time.Second) // one may be frozen
		info, err := e.replicas[n%replicas].Load().client.Admin.GetServerInfo(each, &api.GetServerInfoRequest{})
		cancel()
		if name := info.GetLeader(); err == nil && name != "" && name != not {
			return name, nil
		}
		if err := bench.Wait(ctx, pollEvery); err != nil {
			return "", err
		}
	}
}
