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

	api "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1" //nolint:depguard // the harness is a client
	"github.com/snapshotd/snapshotd/test/crashpoint"
)

// quickPairs is how many pairs a quick run has at most.
const quickPairs = 3

// runner runs cases.
type runner struct {
	options
	dir     string
	buckets *buckets
	bases   map[string]*world // what cases begin with, by the kind of store, or huge
	built   time.Time

	mu             sync.Mutex
	count          int // of cases that were begun
	passed, failed int
	missed         int
	found          []oneCase // pairs
}

// makeBases makes what the cases begin with.
func (r *runner) makeBases(ctx context.Context, cases []oneCase) error {
	var errs [2]error
	var both sync.WaitGroup
	for i, store := range []string{onDirectory, onBucket} {
		r.bases[store] = r.world(store, store)
		both.Go(func() { errs[i] = r.makeBase(ctx, r.bases[store]) })
	}
	both.Wait()
	r.built = time.Now()
	if err := errors.Join(errs[:]...); err != nil || !slices.ContainsFunc(cases, func(c oneCase) bool { return c.s.huge }) {
		return err
	}
	r.bases[huge] = r.world(huge, onBucket)
	if err := r.bases[huge].copyOf(ctx, r.bases[onBucket]); err != nil {
		return err
	}
	return r.bases[huge].makeHuge(ctx)
}

// makeBase fills a world that is empty.
func (r *runner) makeBase(ctx context.Context, w *world) error {
	for _, dir := range []string{w.dir, w.objects()} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			return err
		}
	}
	if err := w.start(ctx, start{}); err != nil {
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
	if err := errors.Join(err, w.s.stop()); err != nil {
		return err
	}
	return w.beats(ctx) // so that there are as many epoch objects as are kept
}

// world returns a world that is empty. Its name is that of its directory, and of its
// bucket.
func (r *runner) world(name, store string) *world {
	w := &world{
		ledger: &ledger{
			Collections: map[string][]seg{}, Snapshots: map[string][]seg{}, Restored: map[string]bool{}, Collection: map[string]int64{},
			IDs: map[int64]string{},
		},
		bin: r.bin, dir: filepath.Join(r.dir, name), answers: map[string]any{},
	}
	if store == onBucket {
		w.buckets, w.bucket = r.buckets, name
	}
	return w
}

// copyOf makes an empty world begin with what another has. The objects of a bucket
// are shared: nobody writes into their files.
func (w *world) copyOf(ctx context.Context, base *world) error {
	w.base, w.ledger = base, base.clone()
	if err := os.MkdirAll(w.dir, 0o750); err != nil {
		return err
	}
	if err := copyTree(ctx, filepath.Join(base.dir, "data"), filepath.Join(w.dir, "data")); err != nil || w.buckets == nil {
		return err
	}
	return copyTree(ctx, base.objects(), w.objects(), "--link")
}

// copyTree copies a directory with all that etcd and the S3 server mind.
func copyTree(ctx context.Context, from, to string, flags ...string) error {
	args := append(slices.Clone(flags), "--archive", from, to)
	if out, err := exec.CommandContext(ctx, "cp", args...).CombinedOutput(); err != nil { //nolint:gosec // our own paths
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}

// errMissed means that the second crash of a pair did not come.
var errMissed = errors.New("the recovery did not come by it")

// run runs a case, and returns where the recovery may crash: none for a pair.
func (r *runner) run(ctx context.Context, c oneCase) (points []crash, err error) {
	ctx, cancel := context.WithTimeout(ctx, casePatience)
	defer cancel()
	r.mu.Lock()
	r.count++
	w := r.world(fmt.Sprintf("case-%d", r.count), c.store)
	r.mu.Unlock()
	w.crashes, w.settings = []crash{c.crash}, c.s.settings
	switch {
	case c.s.empty:
		err = errors.Join(os.MkdirAll(w.dir, 0o750), os.MkdirAll(w.objects(), 0o750))
	case c.s.huge:
		err = w.copyOf(ctx, r.bases[huge])
	default:
		err = w.copyOf(ctx, r.bases[c.store])
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if w.s != nil {
			w.s.kill()
		}
		if err == nil || errors.Is(err, errMissed) {
			err = errors.Join(err, os.RemoveAll(w.dir), os.RemoveAll(w.objects()))
		} else {
			err = fmt.Errorf("%w; its data is in %s", err, w.dir)
		}
	}()
	if c.s.prepare != nil {
		if err := c.s.prepare(ctx, r, w); err != nil {
			return nil, fmt.Errorf("inconclusive: prepare: %w", err)
		}
	}
	if err := w.dieAt(ctx, c.crash, func(ctx context.Context) error { return c.s.op(ctx, w) }); err != nil {
		return nil, err
	}
	w.asked++
	how := start{reached: filepath.Join(w.dir, "reached")}
	if c.then != (crash{}) {
		how = start{}
		if err := w.dieAgain(ctx, c); err != nil {
			return nil, err
		}
		w.asked++
	}
	if err := w.start(ctx, how); err != nil {
		return nil, fmt.Errorf("after the crash: %w", err)
	}
	if err := c.s.op(ctx, w); err != nil {
		return nil, fmt.Errorf("the repeat: %w", err)
	}
	if c.s.after != nil {
		c.s.after(w)
	}
	if err := w.looked(ctx, c.s); err != nil {
		return nil, fmt.Errorf("after the repeat: %w", err)
	}
	if points, err = readCrashes(how.reached); err != nil {
		return nil, err
	}
	return points, w.rest(ctx, c.s)
}

// rest is what a case ends with.
func (w *world) rest(ctx context.Context, s *scenario) error {
	if err := w.goesOn(ctx); err != nil {
		return fmt.Errorf("it does not go on: %w", err)
	}
	if err := w.looked(ctx, s); err != nil {
		return fmt.Errorf("after it went on: %w", err)
	}
	if err := w.dropAll(ctx); err != nil {
		return fmt.Errorf("drop everything: %w", err)
	}
	if err := w.looked(ctx, s); err != nil {
		return fmt.Errorf("after everything was dropped: %w", err)
	}
	err := w.s.stop()
	w.s = nil
	return err
}

// looked waits until all is as the ledger says.
func (w *world) looked(ctx context.Context, s *scenario) error {
	return eventually(ctx, func(ctx context.Context) error { return errors.Join(w.collect(ctx), w.audit(ctx, s.orphans)) })
}

// readCrashes reads what snapshotd has noted of the points that it came by.
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

// countsFromStart says whether requests count from the start, and not from when the
// operation is asked for: aborts do, as the leader makes its own as soon as it leads.
// The start itself makes none, for what its probe found is remembered.
func countsFromStart(at crash) bool { return at.Step == "bucket.abort" }

// dieAt starts snapshotd, which crashes in the operation.
func (w *world) dieAt(ctx context.Context, at crash, op func(context.Context) error) error {
	w.armed = true
	defer func() { w.armed = false }()
	how := start{at: at.String()}
	if strings.HasPrefix(at.Step, "bucket.") && !countsFromStart(at) {
		how.from = filepath.Join(w.dir, fmt.Sprintf("from-%d", w.starts))
	}
	if err := w.start(ctx, how); err != nil {
		return err
	}
	if how.from != "" {
		if err := os.WriteFile(how.from, nil, 0o600); err != nil {
			return err
		}
	}
	running, done := w.s.whileRunning(ctx)
	opErr := op(running)
	done()
	if err := w.s.crashed(ctx, crashPatience, at.String()); err != nil {
		return fmt.Errorf("%w; the operation ended with: %v", err, opErr) //nolint:errorlint // beside the point
	}
	return w.s.c.Close()
}

// dieAgain starts snapshotd, which crashes in the recovery: when it is asked again,
// or in what there is to do after that. It is errMissed when all of that is done.
func (w *world) dieAgain(ctx context.Context, c oneCase) error {
	w.crashes, w.armed = append(w.crashes, c.then), true
	ledger := w.ledger
	defer func() { w.ledger, w.armed = ledger, false }()
	if err := w.start(ctx, start{at: c.then.String()}); err != nil {
		return err
	}
	running, done := w.s.whileRunning(ctx)
	defer done()
	err := c.s.op(running, w)
	if err == nil {
		w.ledger = ledger.clone()
		if c.s.after != nil {
			c.s.after(w)
		}
		if err = w.looked(running, c.s); err == nil {
			return errMissed
		}
	}
	if crashed := w.s.crashed(ctx, crashPatience, c.then.String()); crashed != nil {
		return fmt.Errorf("%w; the recovery ended with: %v", crashed, err) //nolint:errorlint // beside the point
	}
	return w.s.c.Close()
}

// runAll runs cases, some at once, and enters the pairs that they find. Those that
// wait for a minute to pass do so beside the others.
func (r *runner) runAll(ctx context.Context, cases []oneCase) {
	// What has to wait for something comes last.
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

// inLanes runs cases, some at once, but begins no pair that there may be no time for
// when all are asked for. It returns how many it has begun.
func (r *runner) inLanes(ctx context.Context, cases []oneCase) (begun int) {
	queue := make(chan oneCase)
	var lanes sync.WaitGroup
	for range r.lanes {
		lanes.Go(func() {
			for c := range queue {
				r.tell(ctx, c)
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

// tell runs a case and says what came of it.
func (r *runner) tell(ctx context.Context, c oneCase) {
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

// runPairs runs as many of the pairs that were found as are asked for. What a recovery
// comes by depends a little on when things happen: for one whose second crash does not
// come it runs another. Where that is the rule and no exception, it is an error.
func (r *runner) runPairs(ctx context.Context) error {
	pairs := slices.SortedFunc(slices.Values(r.found), func(a, b oneCase) int { return strings.Compare(a.String(), b.String()) })
	rand.New(rand.NewPCG(r.seed, 1)).Shuffle(len(pairs), func(i, j int) { pairs[i], pairs[j] = pairs[j], pairs[i] }) //nolint:gosec // which pairs are tried
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
			break // there is no time left
		}
	}
	fmt.Fprintf(r.stdout, "of %d pairs %d were begun: %d passed, %d were missed\n", len(pairs), begun, r.passed-passed, r.missed)
	if r.missed > begun/2 {
		return errors.New("inconclusive: most were missed")
	}
	return nil
}
