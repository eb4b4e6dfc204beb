package main

import (
	"cmp"
	"fmt"
	"math"
	"slices"

	"github.com/snapshotd/snapshotd/test/bench"
)

// point is a value at the end of a round. The points of a series belong to one
// process in one role; values of different series are not compared.
type point struct {
	series string
	round  int
	age    int // of the process, in rounds
	value  float64
}

// bound is the limit of a value over the rounds that count.
type bound struct {
	what string
	// slope is the maximum growth per round: the median of the slopes of all pairs of
	// points of a series (Theil and Sen).
	slope float64
	// rise is the maximum difference of the medians of the last and the first third
	// of a series.
	rise   float64
	format func(float64) string
}

const (
	minPairs  = 6     // pairs of points for a slope
	certainty = 1.645 // the 95 % quantile of the normal distribution
)

// judge compares points with a bound. A too steep slope is a miss if it is
// significant at 95 %; otherwise the run is inconclusive.
func judge(b bound, points []point) bench.Bar {
	series := bySeries(points)
	low, slope, pairs := slopes(series)
	rise := math.Inf(-1)
	for _, s := range series {
		rise = max(rise, riseOf(s))
	}
	bar := bench.Bar{
		What: b.what,
		Want: fmt.Sprintf("slope ≤ %s per round, rise ≤ %s", b.format(b.slope), b.format(b.rise)),
		OK:   slope <= b.slope && rise <= b.rise,
	}
	if pairs < minPairs {
		bar.Got, bar.Noise = "-", "too few rounds"
		return bar
	}
	bar.Got = fmt.Sprintf("slope %s, rise %s, of %d rounds", b.format(slope), b.format(rise), rounds(points))
	if rise <= b.rise && slope > b.slope && low <= 0 {
		bar.Noise = "the values vary too much"
	}
	return bar
}

// maximum compares the highest value with a limit.
func maximum(what string, limit float64, format func(float64) string, points []point) bench.Bar {
	bar := bench.Bar{What: what, Want: "≤ " + format(limit), Got: "-"}
	if len(points) == 0 {
		bar.Noise = "too few rounds"
		return bar
	}
	highest := slices.MaxFunc(points, func(a, b point) int { return cmp.Compare(a.value, b.value) }).value
	bar.Got, bar.OK = format(highest), highest <= limit
	return bar
}

// bySeries returns the points of each series in the order of their rounds, without
// the first one: a process that has just started or become leader is not settled.
func bySeries(points []point) [][]point {
	named := map[string][]point{}
	for _, p := range points {
		named[p.series] = append(named[p.series], p)
	}
	var list [][]point
	for _, s := range named {
		slices.SortFunc(s, func(a, b point) int { return cmp.Compare(a.round, b.round) })
		if len(s) > 1 {
			list = append(list, s[1:])
		}
	}
	return list
}

// slopes returns the median of the slopes between any two points of a series, and
// the low end of its confidence interval (Sen).
func slopes(series [][]point) (low, median float64, pairs int) {
	var list []float64
	variance := 0.0
	for _, s := range series {
		for i, a := range s {
			for _, b := range s[i+1:] {
				list = append(list, (b.value-a.value)/float64(b.round-a.round))
			}
		}
		n := float64(len(s))
		variance += n * (n - 1) * (2*n + 5) / 18
	}
	if len(list) == 0 {
		return 0, 0, 0
	}
	slices.Sort(list)
	at := (float64(len(list)) - certainty*math.Sqrt(variance)) / 2
	return list[max(int(at), 0)], bench.Median(list), len(list)
}

func riseOf(s []point) float64 {
	third := max(len(s)/3, 1)
	return bench.Median(values(s[len(s)-third:])) - bench.Median(values(s[:third]))
}

func values(points []point) []float64 {
	list := make([]float64, len(points))
	for i, p := range points {
		list[i] = p.value
	}
	return list
}

// rounds returns the number of rounds of points.
func rounds(points []point) int {
	seen := map[int]bool{}
	for _, p := range points {
		seen[p.round] = true
	}
	return len(seen)
}

func number(v float64) string { return fmt.Sprintf("%.4g", v) }

func kib(v float64) string { return fmt.Sprintf("%.4g KiB", v/1024) }
