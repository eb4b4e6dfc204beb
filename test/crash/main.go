//go:build linux

// Command crash kills snapshotd at every durable step and audits the result:
// `make crash`.
//
// A case is a step, its side and the number of the pass, on a directory or on a bucket
// of a real S3 server. On a bucket it also kills snapshotd before and after each request
// that changes the bucket. Each case runs on a copy of data that is made once: two
// collections, two snapshots, a spilled unit, a pin, a restored collection. Then
//
//	snapshotd starts, with the point at which it kills itself
//	the operation that reaches the point is requested, with a request token
//	snapshotd dies by SIGKILL at that point; otherwise the case is inconclusive, which
//	is a failure
//	snapshotd starts again
//	the operation is requested with the same token and must succeed, with the answer of
//	the first call if it had one
//	everything is audited, until no work is left
//	a snapshot is taken and a part of it restored; everything is audited again
//	everything is dropped; nothing may be left
//
// The audit compares collections, snapshots, pins, restores and each object of the
// store with a ledger of the harness: each file of a snapshot has the content that the
// harness wrote, each object has an owner, no upload is open, names are unique, no id
// is allocated twice. See audit.go.
//
// A snapshotd that recovers records the points that it reaches. A pair is a case with
// one of them as its second crash: snapshotd dies in the recovery, starts a third time
// and gets the request once more. A seed selects the pairs; -pairs -1 runs all of them,
// which takes hours, or as many as -timeout allows.
//
// A test compares the steps of the scenarios with those of the product and of package
// crashpoint, so a step without a scenario is a failure. A case also fails when its
// recovery reaches a step that no scenario has.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"os/signal"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/snapshotd/snapshotd/test/crashpoint"
)

const (
	crashPatience = time.Minute     // until snapshotd has died
	casePatience  = 5 * time.Minute // of one case
)

// The sides of a point.
const (
	before = crashpoint.Before
	after  = crashpoint.After
)

// The kinds of stores.
const (
	onDirectory = "directory"
	onBucket    = "bucket"
)

// crash is the pass of a point at which snapshotd dies. The zero crash is none.
type crash = crashpoint.Pass

// oneCase is a crash in a scenario, with an optional second crash in its recovery.
type oneCase struct {
	crash
	then  crash
	s     *scenario
	store string
}

func (c oneCase) String() string {
	text := c.store + " " + c.s.name + " " + c.crash.String()
	if c.then != (crash{}) {
		text += " " + c.then.String()
	}
	return text
}

// parseCase parses the result of String.
func parseCase(text string) (oneCase, error) {
	parts := strings.Fields(text)
	if len(parts) < 3 || len(parts) > 4 || parts[0] != onDirectory && parts[0] != onBucket {
		return oneCase{}, fmt.Errorf("%q is not the text of a case", text)
	}
	at := slices.IndexFunc(scenarios, func(s scenario) bool { return s.name == parts[1] })
	if at < 0 {
		return oneCase{}, fmt.Errorf("there is no scenario %q", parts[1])
	}
	c := oneCase{s: &scenarios[at], store: parts[0]}
	var errs [2]error
	c.crash, errs[0] = crashpoint.Parse(parts[2])
	if len(parts) == 4 {
		c.then, errs[1] = crashpoint.Parse(parts[3])
	}
	return c, errors.Join(errs[:]...)
}

// crashes returns the crashes of a scenario on a store.
func (s *scenario) crashes(store string) (list []crash) {
	if s.huge && store == onDirectory {
		return nil
	}
	times := map[string]int{}
	for _, step := range s.steps {
		times[step] = 1
		if slices.Contains(s.twice, step) {
			times[step] = 2
		}
	}
	if store == onBucket {
		maps.Copy(times, s.requests)
	}
	for _, step := range slices.Sorted(maps.Keys(times)) {
		for nth := range times[step] {
			list = append(list, crash{Step: step, Side: before, Nth: nth + 1}, crash{Step: step, Side: after, Nth: nth + 1})
		}
	}
	return list
}

// steps returns the steps that scenarios reach.
func steps() map[string]bool {
	known := map[string]bool{}
	for _, s := range scenarios {
		for _, step := range s.steps {
			known[step] = true
		}
		for step := range s.requests {
			known[step] = true
		}
	}
	return known
}

// planned returns the cases of the steps that match. A quick plan has one case of
// each step and scenario, which the seed chooses.
func planned(match *regexp.Regexp, quick bool, seed uint64) (list []oneCase) {
	choice := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // which cases are tried
	for i := range scenarios {
		s := &scenarios[i]
		var cases []oneCase
		for _, store := range []string{onDirectory, onBucket} {
			for _, at := range s.crashes(store) {
				if match.MatchString(at.Step) {
					cases = append(cases, oneCase{crash: at, s: s, store: store})
				}
			}
		}
		switch {
		case quick && s.quick:
			list = append(list, oneOfEach(cases, choice)...)
		case !quick:
			list = append(list, cases...)
		}
	}
	return list
}

// oneOfEach returns one case of each step.
func oneOfEach(cases []oneCase, choice *rand.Rand) (list []oneCase) {
	of := map[string][]oneCase{}
	for _, c := range cases {
		of[c.Step] = append(of[c.Step], c)
	}
	for _, step := range slices.Sorted(maps.Keys(of)) {
		list = append(list, of[step][choice.IntN(len(of[step]))])
	}
	return list
}

type options struct {
	bin, s3, point, one string
	quick, list         bool
	seed                uint64
	pairs, lanes        int
	timeout             time.Duration
	stdout              io.Writer
}

func main() {
	o := options{stdout: os.Stdout}
	flag.StringVar(&o.bin, "bin", "", "the server with crash points: test/crash/snapshotd")
	flag.StringVar(&o.s3, "s3", ".bin/versitygw", "versitygw")
	flag.StringVar(&o.point, "point", "", "regular expression of the steps to crash at")
	flag.StringVar(&o.one, "case", "", "run this case alone, in the form that a run prints")
	flag.BoolVar(&o.quick, "quick", false, "creates and restores only, one case of each step, and three pairs")
	flag.Uint64Var(&o.seed, "seed", 0, "selects the pairs, and the cases of a quick run; 0: random")
	flag.IntVar(&o.pairs, "pairs", 24, "pairs to run; -1: all")
	flag.BoolVar(&o.list, "list", false, "list the cases and end")
	flag.IntVar(&o.lanes, "lanes", 4*runtime.NumCPU(), "cases that run at once; they mostly wait")
	flag.DurationVar(&o.timeout, "timeout", 25*time.Minute, "of all")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "crash:", err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) error {
	match, err := regexp.Compile(o.point)
	if err != nil {
		return err
	}
	if o.seed == 0 {
		o.seed = rand.Uint64() //nolint:gosec // which cases are tried
	}
	if o.quick && (o.pairs < 0 || o.pairs > quickPairs) {
		o.pairs = quickPairs
	}
	cases := planned(match, o.quick, o.seed)
	if o.one != "" {
		cases, o.pairs = make([]oneCase, 1), 0
		if cases[0], err = parseCase(o.one); err != nil {
			return err
		}
	}
	if len(cases) == 0 {
		return fmt.Errorf("no step matches %q", o.point)
	}
	if o.list {
		for _, c := range cases {
			fmt.Fprintln(o.stdout, c)
		}
		return nil
	}
	began := time.Now()
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	dir, err := os.MkdirTemp("", "snapshotd-crash-")
	if err != nil {
		return err
	}
	r := &runner{options: o, dir: dir, bases: map[string]*env{}}
	fmt.Fprintf(o.stdout, "%d cases, seed %d, in %s\n", len(cases), o.seed, dir)
	if r.buckets, err = startBuckets(ctx, o.s3, dir); err != nil {
		return err
	}
	defer r.buckets.server.Stop()
	if err := r.makeBases(ctx, cases); err != nil {
		return fmt.Errorf("make the base of the cases: %w", err)
	}
	fmt.Fprintf(o.stdout, "prepared in %v\n", time.Since(began).Round(time.Second))
	r.runAll(ctx, cases)
	fmt.Fprintf(o.stdout, "%d of %d cases passed in %v\n", r.passed, len(cases), time.Since(began).Round(time.Second))
	if err := r.runPairs(ctx); err != nil {
		r.failed++
		fmt.Fprintf(o.stdout, "FAIL  pairs: %v\n", err)
	}
	if r.failed > 0 {
		return fmt.Errorf("%d cases failed; their data is in %s", r.failed, dir)
	}
	fmt.Fprintf(o.stdout, "all passed in %v\n", time.Since(began).Round(time.Second))
	r.buckets.server.Stop()
	return os.RemoveAll(dir)
}
