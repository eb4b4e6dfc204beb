// Package bench has the common parts of the benchmarks of the whole program: the
// processes that they run, a proxy that counts and delays requests, the
// statistics, and the report.
//
// A benchmark runs every server in a separate process, ends by itself, ends no
// process that it did not start, and removes its files.
package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Median returns the median of values, or 0 without values.
func Median(values []float64) float64 { return Quantile(values, 0.5) }

// Quantile returns the q-quantile of values, interpolated linearly, or 0 without
// values.
func Quantile(values []float64, q float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	at := q * float64(len(sorted)-1)
	i := int(at)
	if i+1 >= len(sorted) {
		return sorted[len(sorted)-1]
	}
	return sorted[i] + (at-float64(i))*(sorted[i+1]-sorted[i])
}

// Spread returns the [Range] of values. Of five or more values it ignores the one
// farthest from the median: one disturbed round does not count, a busy machine
// does.
func Spread(values []float64) float64 {
	if len(values) < 5 {
		return Range(values)
	}
	m := Median(values)
	sorted := slices.Sorted(slices.Values(values))
	if m-sorted[0] > sorted[len(sorted)-1]-m {
		return Range(sorted[1:])
	}
	return Range(sorted[:len(sorted)-1])
}

// Range returns the distance of the minimum and the maximum of values, as a share
// of their median.
func Range(values []float64) float64 {
	m := Median(values)
	if m == 0 {
		return 0
	}
	return (slices.Max(values) - slices.Min(values)) / m
}

// Ratios returns a[i] / b[i] for each i.
func Ratios(a, b []float64) []float64 {
	list := make([]float64, min(len(a), len(b)))
	for i := range list {
		list[i] = a[i] / b[i]
	}
	return list
}

// Load returns the load average of the last minute from /proc/loadavg, or -1.
func Load() float64 {
	data, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return -1
	}
	first, _, _ := strings.Cut(string(data), " ")
	v, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return -1
	}
	return v
}

// LoadText returns [Load] as text.
func LoadText() string { return fmt.Sprintf("%.2f", Load()) }

// Machine returns a line that describes the machine.
func Machine() string {
	cpu, memory := "unknown processor", "unknown memory"
	if data, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				cpu = strings.TrimSpace(value)
				break
			}
		}
	}
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		var kib int64
		if _, err := fmt.Sscanf(string(data), "MemTotal: %d kB", &kib); err == nil {
			memory = fmt.Sprintf("%d GiB", (kib+1<<19)>>20)
		}
	}
	kernel := "unknown kernel"
	if data, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		kernel = "Linux " + strings.TrimSpace(string(data))
	}
	return fmt.Sprintf("%d × %s, %s, %s, %s", runtime.NumCPU(), cpu, memory, kernel, runtime.Version())
}

// Commit returns the commit of the working tree, with "-dirty" after changes.
func Commit() string {
	out, err := exec.Command( //nolint:noctx // ends at once
		"git",
		"describe",
		"--always",
		"--dirty",
		"--abbrev=12",
		"--exclude=*",
	).Output()
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(out))
}

// Wait waits for d, or returns the error of a context that ends before.
func Wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
