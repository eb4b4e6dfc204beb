// Run plants each of the bugs of internal/planted in turn, and demands that a test
// finds it:
//
//	run [-only p7] [-for 10m]      all of them, or p7 and, where there are two of it, p7a and p7b
//	run -release bin/snapshotd …   says whether programs are free of them
//
// The layers of tests are asked the cheapest first, until one of them has a test
// that fails. A build that fails, a test that does not end and a pattern without
// tests find nothing. Before, the same tests must pass without any bug, else what
// they say of one is worth nothing. It exits with 1 when a bug was not found, when
// time ran out, or when a program has one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/planted/gotest"
)

func main() {
	only := flag.String("only", "", "a bug, such as p4")
	within := flag.Duration("for", 10*time.Minute, "time for all of it")
	release := flag.Bool("release", false, "look whether the programs that are named were built without a bug")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	var err error
	if *release {
		err = checkPrograms(os.Stdout, flag.Args())
	} else {
		err = plantAll(ctx, os.Stdout, *only, *within)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "planted:", err)
		os.Exit(1)
	}
}

// plantAll plants the bugs that are called only, or all, and says on out what
// found each.
func plantAll(ctx context.Context, out io.Writer, only string, within time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not done within %v", within))
	defer cancel()
	var chosen []bug
	for _, b := range bugs {
		if only == "" || only == b.name || only == strings.TrimRight(b.name, "ab") {
			chosen = append(chosen, b)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("there is no bug %q", only)
	}
	began := time.Now()
	var first []layer // that most bugs need no other than
	for _, b := range chosen {
		first = append(first, b.layers[0])
	}
	if err := sound(ctx, first...); err != nil {
		return orCause(ctx, err)
	}
	fmt.Fprintf(out, "without a bug all pass: %.0f s\n", time.Since(began).Seconds())
	fmt.Fprintf(out, "%-5s %-60s %-9s %-42s %s\n", "bug", "what it breaks", "layer", "found by", "seconds")
	var missed []string
	for _, b := range chosen {
		f, err := plant(ctx, b)
		if err != nil {
			return orCause(ctx, err)
		}
		if f.test == "" {
			missed = append(missed, b.name)
			fmt.Fprintf(out, "%-5s %-60s %-9s %-42s %.0f\n%s\n", b.name, b.breaks, "-", "NOT FOUND", f.took.Seconds(), f.why)
			continue
		}
		fmt.Fprintf(out, "%-5s %-60s %-9s %-42s %.0f\n", b.name, b.breaks, f.layer, f.test, f.took.Seconds())
	}
	fmt.Fprintf(out, "%d of %d bugs found in %.0f s\n", len(chosen)-len(missed), len(chosen), time.Since(began).Seconds())
	if len(missed) > 0 {
		return fmt.Errorf("no test finds %s", strings.Join(missed, ", "))
	}
	return nil
}

// orCause is err, or why ctx ended if that is what err comes of.
func orCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// sound runs the tests of layers without any bug: all of them must pass.
func sound(ctx context.Context, layers ...layer) error {
	type suite struct {
		pkg   string
		short bool
	}
	var order []suite
	patterns := map[suite][]string{}
	for _, l := range layers {
		s := suite{l.pkg, l.short}
		if patterns[s] == nil {
			order = append(order, s)
		}
		patterns[s] = append(patterns[s], l.run)
	}
	for _, s := range order {
		r, err := gotest.Run(ctx, gotest.Spec{
			Package: s.pkg, Run: strings.Join(patterns[s], "|"), Tags: tags(s.short), Timeout: 3 * time.Minute, Cached: true,
		})
		switch {
		case err != nil:
			return err
		case r.Broken != "":
			return fmt.Errorf("without a bug, %s: %s\n%s", s.pkg, r.Broken, r.Output)
		case r.TimedOut || len(r.Failed) > 0:
			return fmt.Errorf("without a bug, tests of %s fail: %v (timed out: %v)\n%s", s.pkg, r.Failed, r.TimedOut, r.Output)
		}
	}
	return nil
}

func tags(short bool, more ...string) []string {
	if short {
		return append([]string{"short"}, more...)
	}
	return more
}

// finding is which test found a bug; no test: none did, and why says more.
type finding struct {
	test, layer string
	took        time.Duration
	why         string
}

// plant asks the layers of a bug one after another.
func plant(ctx context.Context, b bug) (finding, error) {
	began := time.Now()
	var said strings.Builder
	for i, l := range withSimulation(b.layers) {
		r, err := gotest.Run(ctx, gotest.Spec{
			Package: l.pkg, Run: l.run, Tags: tags(l.short, "planted_"+b.name), Timeout: l.timeout(),
		})
		switch {
		case err != nil:
			return finding{}, err
		case len(r.Failed) > 0:
			if i > 0 {
				if err := sound(ctx, l); err != nil {
					return finding{}, err
				}
			}
			test := strings.TrimPrefix(l.pkg, "./internal/") + " " + r.Failed[0]
			if n := len(r.Failed) - 1; n > 0 {
				test += fmt.Sprintf(" +%d", n)
			}
			return finding{test: test, layer: l.name, took: time.Since(began)}, nil
		case r.Broken != "":
			fmt.Fprintf(&said, "%s %s: %s\n%s\n", l.pkg, l.run, r.Broken, r.Output)
		case r.TimedOut:
			fmt.Fprintf(&said, "%s %s: not done within %v\n", l.pkg, l.run, l.timeout())
		default:
			fmt.Fprintf(&said, "%s %s: %d tests passed\n", l.pkg, l.run, r.Passed)
		}
	}
	return finding{took: time.Since(began), why: said.String()}, nil
}

// withSimulation adds the simulation, where there is one, behind all others.
func withSimulation(layers []layer) []layer {
	if _, err := os.Stat(simulation.pkg); errors.Is(err, os.ErrNotExist) {
		return layers
	}
	return append(slices.Clip(layers), simulation)
}
