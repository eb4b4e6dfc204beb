//go:build linux

// Command crash kills snapshotd at every step that is to be durable, and looks
// whether all is well after that: `make crash`.
//
// A case is a crash point, a side of it and the how manieth time. Each runs on data
// of its own, copied from what is made once at the start: two collections, two
// snapshots, a parked unit, a pin, a restored collection. Then
//
//	snapshotd is started, with the point at which it kills itself
//	the operation that comes by the point is asked for, with a request token
//	snapshotd dies, by SIGKILL at that point and in no other way; if it does not,
//	the case says nothing, which is a failure
//	snapshotd is started again
//	the same operation is asked for with the same token, and has to succeed, with the
//	answer of the first call if that had one
//	everything is looked at, until nothing is left to do
//	a snapshot is taken and a part of it restored; everything is looked at again
//	everything is dropped; all of it has to go
//
// To look at everything is to compare collections, snapshots, pins, restores and each
// object of the store with a ledger of what the harness did: each file of a snapshot
// has the content that the harness wrote, each object belongs to something, names are
// there once, no id is given out twice. See audit.go.
//
// Points enter themselves, so one without a scenario is a failure as well.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1" //nolint:depguard // the harness is a client
	_ "github.com/snapshotd/snapshotd/embed"                  // whose packages enter the points
	"github.com/snapshotd/snapshotd/internal/crashpoint"
)

const (
	crashPatience = time.Minute     // until snapshotd is dead
	casePatience  = 5 * time.Minute // of one case
)

// The sides of a point.
const (
	before = "before"
	after  = "after"
)

// crash is where snapshotd dies.
type crash struct {
	point, side string
	nth         int
}

func (c crash) String() string { return fmt.Sprintf("%s:%s:%d", c.point, c.side, c.nth) }

// oneCase is a crash in a scenario.
type oneCase struct {
	crash
	s *scenario
}

// planned returns the cases of the points that match, and of those that a seed
// chooses when it is quick: one side of each. It is an error when a point has no
// scenario, or a scenario names one that there is not.
func planned(points []string, match *regexp.Regexp, quick bool, seed uint64) ([]oneCase, error) {
	var list []oneCase
	var wrong []error
	choice := rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // which side is tried
	known := map[string]bool{}
	for i := range scenarios {
		s := &scenarios[i]
		for _, point := range s.points {
			if known[point] || !slices.Contains(points, point) {
				wrong = append(wrong, fmt.Errorf("%s is in two scenarios, or is no point", point))
			}
			known[point] = true
			sides := []crash{{point, before, 1}, {point, after, 1}}
			if slices.Contains(s.twice, point) {
				sides = append(sides, crash{point, before, 2}, crash{point, after, 2})
			}
			if quick {
				at := choice.IntN(2)
				sides = sides[at : at+1]
			}
			if match.MatchString(point) && (!quick || s.quick) {
				for _, at := range sides {
					list = append(list, oneCase{at, s})
				}
			}
		}
	}
	for _, point := range points {
		if !known[point] {
			wrong = append(wrong, fmt.Errorf("no scenario comes by %s", point))
		}
	}
	return list, errors.Join(wrong...)
}

// runner runs cases.
type runner struct {
	bin   string
	dir   string
	base  *world
	built time.Time
}

// makeBase makes what the cases begin with.
func (r *runner) makeBase(ctx context.Context) error {
	w := r.world("base")
	if err := os.MkdirAll(w.dir, 0o750); err != nil {
		return err
	}
	if err := w.start(ctx, ""); err != nil {
		return err
	}
	err := w.build(ctx)
	if err == nil {
		var got *api.PinSnapshotResponse
		got, err = w.c().Snapshots.PinSnapshot(ctx, &api.PinSnapshotRequest{
			Snapshot: snapshot(keep), Owner: "harness", Ttl: durationpb.New(time.Hour),
		})
		w.Pin, w.Pins = got.GetPin().GetId(), 1
	}
	if err == nil {
		err = eventually(ctx, func(ctx context.Context) error { return w.audit(ctx, false) })
	}
	r.base, r.built = w, time.Now()
	if err := errors.Join(err, w.s.stop()); err != nil {
		return err
	}
	return w.beats(ctx) // so that there are as many epoch objects as are kept
}

// world returns a world that is empty.
func (r *runner) world(name string) *world {
	return &world{
		ledger: &ledger{
			Collections: map[string][]seg{}, Snapshots: map[string][]seg{}, Restored: map[string]bool{}, Collection: map[string]int64{},
			IDs: map[int64]string{},
		},
		bin: r.bin, dir: filepath.Join(r.dir, name), answers: map[string]any{},
	}
}

// copyTree copies a directory with all that etcd minds.
func copyTree(ctx context.Context, from, to string) error {
	if out, err := exec.CommandContext(ctx, "cp", "-a", from, to).CombinedOutput(); err != nil { //nolint:gosec // our own paths
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}

// run runs a case.
func (r *runner) run(ctx context.Context, c oneCase) error {
	ctx, cancel := context.WithTimeout(ctx, casePatience)
	defer cancel()
	w := r.world(strings.ReplaceAll(c.String(), ":", "-"))
	w.crash, w.settings = c.crash, c.s.settings
	if err := os.MkdirAll(w.dir, 0o750); err != nil {
		return err
	}
	if !c.s.empty {
		w.ledger = r.base.clone()
		if err := copyTree(ctx, filepath.Join(r.base.dir, "data"), filepath.Join(w.dir, "data")); err != nil {
			return err
		}
	}
	defer func() {
		if w.s != nil {
			w.s.kill()
		}
	}()
	if c.s.prepare != nil {
		if err := c.s.prepare(ctx, r, w); err != nil {
			return fmt.Errorf("inconclusive: prepare: %w", err)
		}
	}
	if err := w.die(ctx, c); err != nil {
		return err
	}
	if err := w.start(ctx, ""); err != nil {
		return fmt.Errorf("after the crash: %w", err)
	}
	if err := c.s.op(ctx, w); err != nil {
		return fmt.Errorf("the repeat: %w", err)
	}
	if c.s.after != nil {
		c.s.after(w)
	}
	look := func(when string) error {
		err := eventually(ctx, func(ctx context.Context) error {
			return errors.Join(w.collect(ctx), w.audit(ctx, c.s.orphans))
		})
		if err != nil {
			return fmt.Errorf("%s: %w", when, err)
		}
		return nil
	}
	if err := look("after the repeat"); err != nil {
		return err
	}
	if err := w.goesOn(ctx); err != nil {
		return fmt.Errorf("it does not go on: %w", err)
	}
	if err := look("after it went on"); err != nil {
		return err
	}
	if err := w.dropAll(ctx); err != nil {
		return fmt.Errorf("drop everything: %w", err)
	}
	if err := look("after everything was dropped"); err != nil {
		return err
	}
	if err := w.s.stop(); err != nil {
		return err
	}
	w.s = nil
	return os.RemoveAll(w.dir)
}

// die has snapshotd crash in the operation.
func (w *world) die(ctx context.Context, c oneCase) error {
	w.armed = true
	defer func() { w.armed = false }()
	if err := w.start(ctx, c.String()); err != nil {
		return err
	}
	running, done := w.s.whileRunning(ctx)
	opErr := c.s.op(running, w)
	done()
	if err := w.s.crashed(ctx, crashPatience, c.String()); err != nil {
		return fmt.Errorf("%w; the operation ended with: %v", err, opErr) //nolint:errorlint // beside the point
	}
	return w.s.c.Close()
}

type options struct {
	bin, point  string
	quick, list bool
	seed        uint64
	lanes       int
	timeout     time.Duration
	stdout      io.Writer
}

func main() {
	o := options{stdout: os.Stdout}
	flag.StringVar(&o.bin, "bin", "", "snapshotd, built with the tag crashpoints")
	flag.StringVar(&o.point, "point", "", "regular expression of the points to crash at")
	flag.BoolVar(&o.quick, "quick", false, "creates and restores only, and one side of each point")
	flag.Uint64Var(&o.seed, "seed", 0, "chooses the sides when it is quick; 0: by chance")
	flag.BoolVar(&o.list, "list", false, "list the cases and end")
	flag.IntVar(&o.lanes, "lanes", 2, "how many cases to run at once")
	flag.DurationVar(&o.timeout, "timeout", 12*time.Minute, "of all")
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
	if !crashpoint.Enabled {
		return errors.New("this was built without the tag crashpoints; run make crash")
	}
	match, err := regexp.Compile(o.point)
	if err != nil {
		return err
	}
	if o.seed == 0 {
		o.seed = rand.Uint64() //nolint:gosec // which side is tried
	}
	cases, err := planned(crashpoint.Names(), match, o.quick, o.seed)
	if err != nil {
		return err
	}
	if len(cases) == 0 {
		return fmt.Errorf("no point matches %q", o.point)
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
	r := &runner{bin: o.bin, dir: dir}
	fmt.Fprintf(o.stdout, "%d cases, seed %d, in %s\n", len(cases), o.seed, dir)
	if err := r.makeBase(ctx); err != nil {
		return fmt.Errorf("make what the cases begin with: %w", err)
	}
	failed := r.runAll(ctx, cases, o)
	fmt.Fprintf(o.stdout, "%d of %d cases passed in %v\n", len(cases)-failed, len(cases), time.Since(began).Round(time.Second))
	if failed > 0 {
		return fmt.Errorf("%d cases failed; their data is in %s", failed, dir)
	}
	return os.RemoveAll(dir)
}

// runAll runs the cases, some at once, and returns how many failed.
func (r *runner) runAll(ctx context.Context, cases []oneCase, o options) (failed int) {
	queue := make(chan oneCase)
	var mu sync.Mutex
	var lanes sync.WaitGroup
	for range o.lanes {
		lanes.Go(func() {
			for c := range queue {
				began := time.Now()
				err := r.run(ctx, c)
				mu.Lock()
				took := time.Since(began).Round(100 * time.Millisecond)
				if err == nil {
					fmt.Fprintf(o.stdout, "ok    %-28s %v\n", c, took)
				} else {
					failed++
					fmt.Fprintf(o.stdout, "FAIL  %-28s %v\n      %v\n", c, took, err)
				}
				mu.Unlock()
			}
		})
	}
	// What has to wait for something comes last.
	slices.SortStableFunc(cases, func(a, b oneCase) int { return len(a.s.settings) - len(b.s.settings) })
	for _, c := range cases {
		queue <- c
	}
	close(queue)
	lanes.Wait()
	return failed
}
