//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/test/crashpoint"
)

// quickPairs is the maximal number of pairs in a quick run.
const quickPairs = 3

// runner runs cases.
type runner struct {
	options
	dir     string
	buckets *buckets
	bases   map[string]*env // what cases are copied from, by kind of store, or huge
	built   time.Time

	mu             sync.Mutex
	count          int // of started cases
	passed, failed int
	missed         int
	found          []oneCase // pairs
}

// makeBases makes the environments that cases are copied from.
func (r *runner) makeBases(ctx context.Context, cases []oneCase) error {
	var errs [2]error
	var both sync.WaitGroup
	for i, store := range []string{onDirectory, onBucket} {
		r.bases[store] = r.env(store, store)
		both.Go(func() { errs[i] = r.makeBase(ctx, r.bases[store]) })
	}
	both.Wait()
	r.built = time.Now()
	if err := errors.Join(
		errs[:]...); err != nil ||
		!slices.ContainsFunc(cases, func(c oneCase) bool { return c.s.huge }) {
		return err
	}
	r.bases[huge] = r.env(huge, onBucket)
	if err := r.bases[huge].copyOf(ctx, r.bases[onBucket]); err != nil {
		return err
	}
	return r.bases[huge].makeHuge(ctx)
}

// makeBase fills an empty environment.
func (r *runner) makeBase(ctx context.Context, e *env) error {
	for _, dir := range []string{e.dir, e.objects()} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	if err := e.start(ctx, start{}); err != nil {
		return err
	}
	err := e.build(ctx)
	if err == nil {
		var got *api.PinSnapshotResponse
		got, err = e.c().Snapshots.PinSnapshot(ctx, &api.PinSnapshotRequest{
			Snapshot: snapshot(keep), Owner: "harness", Ttl: durationpb.New(time.Hour),
		})
		e.Pin, e.Pins = got.GetPin().GetId(), 1
	}
	if err == nil {
		err = eventually(ctx, func(ctx context.Context) error { return e.audit(ctx, false) })
	}
	if err := errors.Join(err, e.s.stop()); err != nil {
		return err
	}
	return e.awaitHeartbeat(ctx) // so that the maximal number of epoch objects exists
}

// env returns an empty environment. Its directory and its bucket have its name.
func (r *runner) env(name, store string) *env {
	e := &env{
		ledger: &ledger{
			Collections: map[string][]seg{},
			Snapshots:   map[string][]seg{},
			Restored:    map[string]bool{},
			Collection:  map[string]int64{},
			IDs:         map[int64]string{},
		},
		bin: r.bin, dir: filepath.Join(r.dir, name), answers: map[string]any{},
	}
	if store == onBucket {
		e.buckets, e.bucket = r.buckets, name
	}
	return e
}

// copyOf fills an empty environment with a copy of another. The files of a bucket are
// hard links: objects are never changed in place.
func (e *env) copyOf(ctx context.Context, base *env) error {
	e.base, e.ledger = base, base.clone()
	if err := os.MkdirAll(e.dir, 0o750); err != nil {
		return err
	}
	if err := copyTree(
		ctx,
		filepath.Join(base.dir, "data"),
		filepath.Join(e.dir, "data"),
	); err != nil ||
		e.buckets == nil {
		return err
	}
	return copyTree(ctx, base.objects(), e.objects(), "--link")
}

// copyTree copies a directory with the attributes that etcd and the S3 server need.
func copyTree(ctx context.Context, from, to string, flags ...string) error {
	args := append(slices.Clone(flags), "--archive", from, to)
	if out, err := exec.CommandContext(ctx, "cp", args...).CombinedOutput(); err != nil { //nolint:gosec // our own paths
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}

// errMissed means that the second crash of a pair did not happen.
var errMissed = errors.New("the recovery did not reach it")

// run runs a case. It returns the points that the recovery reached: none for a pair.
func (r *runner) run(ctx context.Context, c oneCase) (points []crash, err error) {
	ctx, cancel := context.WithTimeout(ctx, casePatience)
	defer cancel()
	r.mu.Lock()
	r.count++
	e := r.env(fmt.Sprintf("case-%d", r.count), c.store)
	r.mu.Unlock()
	e.crashes, e.settings = []crash{c.crash}, c.s.settings
	switch {
	case c.s.empty:
		err = errors.Join(os.MkdirAll(e.dir, 0o750), os.MkdirAll(e.objects(), 0o750))
	case c.s.huge:
		err = e.copyOf(ctx, r.bases[huge])
	default:
		err = e.copyOf(ctx, r.bases[c.store])
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if e.s != nil {
			e.s.kill()
		}
		if err == nil || errors.Is(err, errMissed) {
			err = errors.Join(err, os.RemoveAll(e.dir), os.RemoveAll(e.objects()))
		} else {
			err = fmt.Errorf("%w; its data is in %s", err, e.dir)
		}
	}()
	if c.s.prepare != nil {
		if err := c.s.prepare(ctx, r, e); err != nil {
			return nil, fmt.Errorf("inconclusive: prepare: %w", err)
		}
	}
	if err := e.dieAt(ctx, c.crash, func(ctx context.Context) error { return c.s.op(ctx, e) }); err != nil {
		return nil, err
	}
	e.asked++
	how := start{reached: filepath.Join(e.dir, "reached")}
	if c.then != (crash{}) {
		how = start{}
		if err := e.dieAgain(ctx, c); err != nil {
			return nil, err
		}
		e.asked++
	}
	if err := e.start(ctx, how); err != nil {
		return nil, fmt.Errorf("after the crash: %w", err)
	}
	if err := c.s.op(ctx, e); err != nil {
		return nil, fmt.Errorf("the repeat: %w", err)
	}
	if c.s.after != nil {
		c.s.after(e)
	}
	if err := e.settle(ctx, c.s); err != nil {
		return nil, fmt.Errorf("after the repeat: %w", err)
	}
	if points, err = readCrashes(how.reached); err != nil {
		return nil, err
	}
	return points, e.rest(ctx, c.s)
}

// rest is the end of each case.
func (e *env) rest(ctx context.Context, s *scenario) error {
	if err := e.checkService(ctx); err != nil {
		return fmt.Errorf("the service is impaired: %w", err)
	}
	if err := e.settle(ctx, s); err != nil {
		return fmt.Errorf("after further requests: %w", err)
	}
	if err := e.dropAll(ctx); err != nil {
		return fmt.Errorf("drop everything: %w", err)
	}
	if err := e.settle(ctx, s); err != nil {
		return fmt.Errorf("after everything was dropped: %w", err)
	}
	err := e.s.stop()
	e.s = nil
	return err
}

// settle waits until the audit passes.
func (e *env) settle(ctx context.Context, s *scenario) error {
	return eventually(ctx, func(ctx context.Context) error { return errors.Join(e.collect(ctx), e.audit(ctx, s.orphans)) })
}

// readCrashes reads the points that snapshotd has reached.
func readCrashes(name string) (list []crash, err error) {
	if name == "" {
		return nil, nil
	}
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	known := steps()
	for line := range strings.Lines(string(text)) {
		at, err := crashpoint.Parse(strings.TrimSpace(line))
		if err == nil && !known[at.Step] {
			err = fmt.Errorf("no scenario has the step %s", at.Step)
		}
		if err != nil {
			return nil, err
		}
		list = append(list, at)
	}
	return list, nil
}

// countsFromStart reports whether the passes of a step count from the start instead of
// from the operation: those of aborts do, since a new leader aborts uploads at once.
// The start itself aborts none: the verdict of its probe is stored.
func countsFromStart(at crash) bool { return at.Step == "bucket.abort" }

// dieAt starts snapshotd, which crashes in the operation.
func (e *env) dieAt(ctx context.Context, at crash, op func(context.Context) error) error {
	e.armed = true
	defer func() { e.armed = false }()
	how := start{at: at.String()}
	if strings.HasPrefix(at.Step, "bucket.") && !countsFromStart(at) {
		how.from = filepath.Join(e.dir, fmt.Sprintf("from-%d", e.starts))
	}
	if err := e.start(ctx, how); err != nil {
		return err
	}
	if how.from != "" {
		if err := os.WriteFile(how.from, nil, 0o600); err != nil {
			return err
		}
	}
	running, done := e.s.whileRunning(ctx)
	opErr := op(running)
	done()
	if err := e.s.crashed(ctx, crashPatience, at.String()); err != nil {
		return fmt.Errorf("%w; the operation ended with: %v", err, opErr) //nolint:errorlint // for information
	}
	return e.s.c.Close()
}

// dieAgain starts snapshotd, which crashes in the recovery: in the repeated operation
// or in the work after it. It returns errMissed when no crash happens.
func (e *env) dieAgain(ctx context.Context, c oneCase) error {
	e.crashes, e.armed = append(e.crashes, c.then), true
	ledger := e.ledger
	defer func() { e.ledger, e.armed = ledger, false }()
	if err := e.start(ctx, start{at: c.then.String()}); err != nil {
		return err
	}
	running, done := e.s.whileRunning(ctx)
	defer done()
	err := c.s.op(running, e)
	if err == nil {
		e.ledger = ledger.clone()
		if c.s.after != nil {
			c.s.after(e)
		}
		if err = e.settle(running, c.s); err == nil {
			return errMissed
		}
	}
	if crashed := e.s.crashed(ctx, crashPatience, c.then.String()); crashed != nil {
		return fmt.Errorf("%w; the recovery ended with: %v", crashed, err) //nolint:errorlint // for information
	}
	return e.s.c.Close()
}

// runAll runs cases concurrently and collects the pairs that they find. Cases that
// wait for a minute run beside the others.
func (r *runner) runAll(ctx context.Context, cases []oneCase) {
	// Cases that wait come last.
	slices.SortStableFunc(cases, func(a, b oneCase) int { return len(a.s.settings) - len(b.s.settings) })
	var waiting, others []oneCase
	for _, c := range cases {
		if c.s.huge {
			waiting = append(waiting, c)
		} else {
			others = append(others, c)
		}
	}
	var both sync.WaitGroup
	for _, list := range [][]oneCase{waiting, others} {
		both.Go(func() { _ = r.inLanes(ctx, list) })
	}
	both.Wait()
}

// inLanes runs cases concurrently. When all pairs are to run it starts none that may
// exceed the timeout. It returns the number of started cases.
func (r *runner) inLanes(ctx context.Context, cases []oneCase) (begun int) {
	queue := make(chan oneCase)
	var lanes sync.WaitGroup
	for range r.lanes {
		lanes.Go(func() {
			for c := range queue {
				r.report(ctx, c)
			}
		})
	}
	end, _ := ctx.Deadline()
	for _, c := range cases {
		if r.pairs < 0 && c.then != (crash{}) && time.Until(end) < casePatience {
			break
		}
		queue <- c
		begun++
	}
	close(queue)
	lanes.Wait()
	return begun
}

// report runs a case and prints its result.
func (r *runner) report(ctx context.Context, c oneCase) {
	began := time.Now()
	points, err := r.run(ctx, c)
	took := time.Since(began).Round(100 * time.Millisecond)
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case errors.Is(err, errMissed):
		r.missed++
		fmt.Fprintf(r.stdout, "miss  %-50s %v\n", c, took)
	case err != nil:
		r.failed++
		fmt.Fprintf(r.stdout, "FAIL  %-50s %v\n      %v\n", c, took, err)
	default:
		r.passed++
		fmt.Fprintf(r.stdout, "ok    %-50s %v\n", c, took)
	}
	for _, at := range points {
		if !c.s.huge { // it would wait for another minute
			r.found = append(r.found, oneCase{c.crash, at, c.s, c.store})
		}
	}
}

// runPairs runs the configured number of the pairs that were found. The points of a
// recovery depend on timing, so a pair whose second crash does not happen is replaced
// by another. It fails when more than half are missed.
func (r *runner) runPairs(ctx context.Context) error {
	pairs := slices.SortedFunc(
		slices.Values(r.found),
		func(a, b oneCase) int { return strings.Compare(a.String(), b.String()) },
	)
	rand.New(rand.NewPCG(r.seed, 1)).Shuffle(
		len(pairs),
		func(i, j int) { pairs[i], pairs[j] = pairs[j], pairs[i] },
	) //nolint:gosec // which pairs are tried
	want := len(pairs)
	if r.pairs >= 0 {
		want = min(want, r.pairs)
	}
	passed, begun := r.passed, 0
	for missing := want; missing > 0 && begun < len(pairs); {
		next := pairs[begun:min(begun+missing, len(pairs))]
		n := r.inLanes(ctx, next)
		begun += n
		if missing = want - (begun - r.missed); n < len(next) {
			break // the timeout is near
		}
	}
	fmt.Fprintf(
		r.stdout,
		"of %d pairs %d were started: %d passed, %d were missed\n",
		len(pairs),
		begun,
		r.passed-passed,
		r.missed,
	)
	if r.missed > begun/2 {
		return errors.New("inconclusive: most were missed")
	}
	return nil
}
