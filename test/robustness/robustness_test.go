//go:build robustness && linux

package robustness

import (
	"context"
	"flag"
	"fmt"
	"hash/fnv"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/snapshotd/snapshotd/test/etcdcluster"
)

var (
	timeFlag = flag.Duration("time", 7*time.Minute,
		"about the time of all scenarios; those that have not begun half as much later are INCONCLUSIVE")
	seedFlag = flag.Uint64("seed", 0, "the seed; 0: by the clock")
	onlyFlag = flag.String("only", "", "names of scenarios, separated by commas; default: all")
	quick    = flag.Bool("quick", false, "only the scenarios that find the most, for 90 seconds")
	program  = flag.String("snapshotd", "../../bin/snapshotd", "the program to run")
)

const (
	overhead    = 12 * time.Second // of a scenario, for start and audit
	leastTime   = 8 * time.Second  // of traffic
	overtime    = 90 * time.Second // that is given to faults that have not fired by then
	leastCalls  = 40               // that succeed; a run with fewer says nothing
	quickBound  = 90 * time.Second
	logsMessage = "logs are in %s"
)

// The last line of a run, and its exit status.
const (
	endOK           = "robustness: ok"
	endFailed       = "robustness: FAILED"
	endInconclusive = "robustness: INCONCLUSIVE"

	statusFailed       = 1
	statusInconclusive = 3
)

// end is how the run ends, unless something else fails.
var end = endFailed

func TestMain(m *testing.M) {
	etcdcluster.Main()
	flag.Parse()
	status := m.Run()
	switch {
	case status == 0:
		end = endOK
	case end == endInconclusive:
		status = statusInconclusive
	default:
		end, status = endFailed, statusFailed
	}
	fmt.Fprintln(os.Stdout, end)
	os.Exit(status)
}

// result is a line of the table.
type result struct {
	scenario string
	seed     uint64
	counts   [3]int
	fired    map[string]int
	orphans  int
	verdict  string
	took     time.Duration
}

func TestRobustness(t *testing.T) {
	seed := *seedFlag
	if seed == 0 {
		seed = uint64(time.Now().UnixNano())%1_000_000 + 1
	}
	chosen := scenarios
	if *quick {
		*timeFlag = min(*timeFlag, quickBound)
		chosen = slices.DeleteFunc(slices.Clone(chosen), func(s scenario) bool { return !s.quick })
	}
	if *onlyFlag != "" {
		only := strings.Split(*onlyFlag, ",")
		chosen = slices.DeleteFunc(slices.Clone(scenarios), func(s scenario) bool { return !slices.Contains(only, s.name) })
		if len(chosen) != len(only) {
			t.Fatalf("-only: some of %v are none of the scenarios", only)
		}
	}
	bin := filepath.Join(t.TempDir(), "snapshotd") // a build meanwhile changes nothing
	if err := copyFile(bin, *program); err != nil {
		t.Fatalf("build snapshotd first: %v", err)
	}
	fmt.Fprintf(os.Stdout, "robustness: seed %d, %d scenarios in %v\n", seed, len(chosen), *timeFlag)
	until := time.Now().Add(*timeFlag)
	var results []result
	var inconclusive, failed int
	for i, s := range chosen {
		left := time.Until(until)
		traffic := max(left/time.Duration(len(chosen)-i)-overhead, leastTime)
		res := result{scenario: s.name, seed: seed, verdict: notKnown + "no time was left"}
		if left > -*timeFlag/2 {
			res.verdict = "FAILED to run"
			t.Run(s.name, func(t *testing.T) { run(t, s, seed, bin, traffic, &res) })
		} else {
			t.Errorf("%s: no time was left", s.name)
		}
		if strings.HasPrefix(res.verdict, notKnown) {
			inconclusive++
		} else if res.verdict != verdictOK {
			failed++
		}
		results = append(results, res)
		fmt.Fprintln(os.Stdout, res)
	}
	fmt.Fprintf(
		os.Stdout,
		"\n%-14s %8s %6s %8s %10s %7s %8s  %-34s %s\n",
		"SCENARIO",
		"SEED",
		"OK",
		"REFUSED",
		"NO ANSWER",
		"ORPHANS",
		"SECONDS",
		"FAULTS",
		"VERDICT",
	)
	for _, r := range results {
		fmt.Fprintf(
			os.Stdout,
			"%-14s %8d %6d %8d %10d %7d %8.1f  %-34s %s\n",
			r.scenario,
			r.seed,
			r.counts[success],
			r.counts[refused],
			r.counts[noAnswer],
			r.orphans,
			r.took.Seconds(),
			r.faults(),
			r.verdict,
		)
	}
	if failed == 0 && inconclusive > 0 {
		end = endInconclusive
	}
}

// What a verdict is, or begins with.
const (
	verdictOK = "ok"
	notKnown  = "INCONCLUSIVE: "
)

func (r result) faults() string {
	var list []string
	for _, what := range slices.Sorted(maps.Keys(r.fired)) {
		list = append(list, fmt.Sprintf("%s %d", what, r.fired[what]))
	}
	return strings.Join(list, ", ")
}

func (r result) String() string {
	return fmt.Sprintf("robustness: %s, seed %d: %d ok, %d refused, %d without an answer; %s; %s in %.1f s",
		r.scenario, r.seed, r.counts[success], r.counts[refused], r.counts[noAnswer], r.faults(), r.verdict, r.took.Seconds())
}

// run runs a scenario, and says in res how it ended.
func run(t *testing.T, s scenario, seed uint64, bin string, during time.Duration, res *result) {
	began := time.Now()
	dir, err := os.MkdirTemp("", "robustness-"+s.name+"-") //nolint:usetesting // kept when it fails
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		res.took = time.Since(began)
		if t.Failed() {
			t.Logf(logsMessage, dir)
		} else if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	}()
	quota := int64(defaultQuota)
	if s.quota != 0 {
		quota = s.quota
	}
	e := newEnv(t, bin, dir, quota, s.overtakes)
	tr := &traffic{
		env:        e,
		l:          newLedger(),
		seed:       seed,
		storeFails: s.storeFails,
		wrongHeads: s.wrongHeads,
		overtakes:  s.overtakes,
		errors:     map[string]int{},
		jobs:       map[int64]string{},
	}
	if err := tr.prepare(t.Context()); err != nil {
		t.Fatal(err)
	}
	list := make([]*worker, workers+1) // the last one is for the audit
	for i := range list {
		if list[i], err = tr.newWorker(t.Context(), i, tr.collection); err != nil {
			t.Fatal(err)
		}
	}
	if s.own {
		c, err := tr.newCollection(t.Context(), "own")
		if err != nil {
			t.Fatal(err)
		}
		if tr.own, err = tr.newWorker(t.Context(), len(list), c); err != nil {
			t.Fatal(err)
		}
	}
	hash := fnv.New64()
	_, _ = hash.Write([]byte(s.name)) // never fails
	chance := rand.New(rand.NewPCG(seed, hash.Sum64()))
	life := t.Context() // of the clients, who end what they have begun
	ctx, stop := context.WithTimeout(life, during+overtime)
	defer stop()
	group, _ := errgroup.WithContext(ctx)
	for _, w := range list[:workers] {
		group.Go(func() error { return w.work(life, ctx.Done()) })
	}
	if err := wait(ctx, time.Second); err != nil { // something is there by then
		t.Fatal(err)
	}
	until := time.Now().Add(during)
	for ctx.Err() == nil && (time.Now().Before(until) || !e.firedAll(s.planned)) { // the harm, over and over
		s.harm(ctx, tr, chance)
		tr.round++
		_ = wait(ctx, time.Duration(200+chance.IntN(800))*time.Millisecond)
	}
	e.proxy.Plan()
	stop()
	if err := group.Wait(); err != nil {
		t.Error(err)
	}
	auditor := list[workers]
	err = auditor.settle(t.Context())
	if n := int(tr.swept.Load()); n > 0 {
		e.fire("swept", n)
	}
	res.counts, res.fired = tr.counts, e.fired
	if err != nil {
		t.Errorf("it does not recover: %v", err)
		res.verdict = "BROKEN: it does not recover"
		return
	}
	v, text, orphans, err := auditor.audit(t.Context())
	if err != nil {
		t.Error(err)
		return
	}
	res.orphans = orphans
	for i, line := range text {
		if i == 30 {
			t.Errorf("and %d more", len(text)-i)
			break
		}
		t.Error(line)
	}
	switch v {
	case broken:
		res.verdict = fmt.Sprintf("BROKEN: %d complaints", len(text))
		return
	case undecided:
		res.verdict = notKnown + "a history was not judged in time"
		t.Error(res.verdict)
		return
	case fine:
	}
	if t.Failed() { // for what was said before
		return
	}
	res.verdict = verdictOK
	if tr.counts[success] < leastCalls {
		res.verdict = fmt.Sprintf("%s%d calls succeeded", notKnown, tr.counts[success])
	}
	for _, what := range s.planned {
		if e.fired[what] == 0 {
			res.verdict = notKnown + "did not fire: " + what
		}
	}
	if res.verdict != verdictOK {
		t.Error(res.verdict)
	}
}

func copyFile(to, from string) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer func() { _ = in.Close() }()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o700)
	if err != nil {
		return err
	}
	if _, err = io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}
