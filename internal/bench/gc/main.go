//go:build linux

// Command gc measures how fast the collector deletes what was dropped, and what a
// round costs in which there is nothing to delete, against the bars of the
// project; docs/performance.md says how.
//
// It runs etcd, an S3 server, snapshotd and what it compares that with, each in a
// process of its own, in directories of its own, and removes all of it at the
// end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/bench"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

const (
	// noise is the spread of a floor above which a run does not judge times that
	// were missed, and minRounds how many rounds it takes to know the spread.
	noise     = 0.10
	minRounds = 5

	// What is measured at most for the bars to be those of the project.
	allSegments = 100_000
	allLiving   = 1_000_000
)

// The exit codes, besides those of a strict run.
const (
	exitError = 1
	exitUsage = 2
)

// The parts of a run, in their order.
const (
	partRounds  = "rounds"
	partFull    = "full"
	partDropped = "dropped"
	partLatency = "latency"
	partIdle    = "idle"
	partGrants  = "grants"
)

var parts = []string{partRounds, partFull, partDropped, partLatency, partIdle, partGrants}

type options struct {
	rounds    int
	segments  int
	full      int
	living    int
	held      int
	latency   time.Duration
	bound     time.Duration
	strict    bool
	snapshotd string
	etcdBin   string
	s3Bin     string
	dir       string
	objects   string
	output    string
	profile   string
	only      string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) == 3 && os.Args[1] == "child" && os.Args[2] == "floor" {
		if err := floorChild(ctx, os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(exitError)
		}
		return
	}
	o, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(exitUsage)
	}
	code, err := run(ctx, o, os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-gc:", err)
		code = exitError
	}
	os.Exit(code)
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("bench-gc", flag.ContinueOnError)
	fs.IntVar(&o.rounds, "rounds", 5, "rounds that count; one more is made before them")
	fs.IntVar(&o.segments, "n", 20_000, "segments that a round deletes, of 12 files each")
	fs.IntVar(&o.full, "full", allSegments, "segments that the one full round deletes")
	fs.IntVar(&o.living, "living", allLiving, "segments that live, for part idle")
	fs.IntVar(&o.held, "held", 10_000, "segments of part idle that were dropped and that a snapshot holds")
	fs.DurationVar(&o.latency, "latency", 500*time.Millisecond, "what is added to each request for part latency")
	fs.DurationVar(&o.bound, "bound", 15*time.Minute, "the longest that the run may take")
	fs.BoolVar(&o.strict, "strict", false, "exit with 1 when a bar is missed, with 3 when one cannot be judged")
	fs.StringVar(&o.snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.etcdBin, "etcd", ".bin/bench-etcd", "internal/bench/etcd")
	fs.StringVar(&o.s3Bin, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&o.dir, "dir", os.TempDir(), "where to make the directory of the run")
	fs.StringVar(&o.objects, "objects", "/dev/shm", "where to make the directory of the S3 server")
	fs.StringVar(&o.output, "o", "", "Markdown file to write the report into")
	fs.StringVar(&o.profile, "profile", "", "directory for processor profiles of one round of each part")
	fs.StringVar(&o.only, "only", strings.Join(parts, ","), "what to measure")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	err := o.check()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	return o, err
}

func (o *options) check() error {
	if o.rounds < 1 || o.segments < 1 || o.full < 1 || o.held < 1 || o.living < collections {
		return fmt.Errorf("-rounds, -n, -full and -held must be positive, -living %d at least", collections)
	}
	for part := range strings.SplitSeq(o.only, ",") {
		if !strings.Contains(","+strings.Join(parts, ",")+",", ","+part+",") {
			return fmt.Errorf("-only: %q is not one of %s", part, strings.Join(parts, ", "))
		}
	}
	return nil
}

func (o *options) wants(part string) bool { return strings.Contains(","+o.only+",", ","+part+",") }

// rig is what the measurements share.
type rig struct {
	*options
	log    io.Writer
	report *bench.Report
	began  time.Time
	before float64 // load

	etcd     *bench.Process
	gateway  *bench.Process
	root     string // directory of the run
	store    string // that of the S3 server
	etcdAt   string
	kv       *etcd.Client
	s3At     string
	proxy    *bench.Proxy
	floor    *floor
	inFlight int       // with which the floor is the fastest
	floors   []float64 // seconds of the floor in the rounds
	names    int

	server  *bench.Snapshotd
	serving string // the S3 server that it has
	client  *client.Client
}

// say tells a person how far the run has come.
func (r *rig) say(format string, args ...any) {
	fmt.Fprintf(r.log, "%6.1fs  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

// name returns a name that is not taken.
func (r *rig) name() string {
	r.names++
	return fmt.Sprintf("b%d", r.names)
}

// path is where versitygw keeps what has a prefix.
func (r *rig) path(prefix string) string { return filepath.Join(r.store, "s3", bench.Bucket, prefix) }

func run(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.bound, fmt.Errorf("the run took longer than %v", o.bound))
	defer cancel()
	r := &rig{options: o, log: stderr, began: time.Now(), before: bench.Load(), report: &bench.Report{Name: "bench-gc"}}
	for _, d := range []struct {
		in string
		to *string
	}{{o.dir, &r.root}, {o.objects, &r.store}} {
		if *d.to, err = os.MkdirTemp(d.in, "bench-gc-"); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(*d.to)) }()
	}
	commit := bench.Commit()
	if err := r.measure(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return 0, err
	}
	r.report.Facts = []string{
		fmt.Sprintf("Commit %s, %s, %s.", commit, bench.Today(), bench.Machine()),
		fmt.Sprintf("Load average %.2f before and %.2f after; the run took %v.", r.before, bench.Load(), time.Since(r.began).Round(time.Second)),
		fmt.Sprintf("Medians of %d rounds after one that does not count, where more than one is made; ratios are taken per round.", o.rounds),
	}
	return r.report.Finish(stdout, o.output, o.strict)
}

// measure starts the servers and makes the parts.
func (r *rig) measure(ctx context.Context) error {
	e, endpoint, err := bench.StartEtcd(ctx, r.etcdBin, r.root)
	if err != nil {
		return err
	}
	defer e.Stop()
	r.etcd, r.etcdAt = e, endpoint
	if r.kv, err = etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: bench.EtcdRoot}); err != nil {
		return err
	}
	defer func() { _ = r.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, r.s3Bin, r.store, bench.Bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	r.gateway, r.s3At = gateway, addr
	if r.proxy, err = bench.StartProxy(ctx, addr); err != nil {
		return err
	}
	defer r.proxy.Close()
	if r.floor, err = startFloor(ctx, r.root); err != nil {
		return err
	}
	defer r.floor.process.Stop()
	defer r.stop()

	for _, part := range []struct {
		name string
		run  func(context.Context) error
	}{
		{partRounds, r.deletes},
		{partFull, r.fullRound},
		{partDropped, r.dropped},
		{partLatency, r.delayed},
		{partIdle, r.idle},
		{partGrants, r.grants},
	} {
		if !r.wants(part.name) {
			continue
		}
		if err := part.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// serve starts snapshotd on an S3 server, in place of the one that runs. It makes
// no rounds by itself, and deletes so many objects in a second; negative: as many
// as the store takes.
func (r *rig) serve(ctx context.Context, s3 string, rate int) error {
	r.stop()
	r.serving = s3
	settings := bench.OnS3(s3) + fmt.Sprintf("collector: \"off\"\ncollect_rate: %d\n", rate)
	var err error
	if r.server, err = bench.StartSnapshotd(ctx, r.snapshotd, r.root, r.etcdAt, bench.EtcdRoot, settings); err != nil {
		return err
	}
	if err := r.server.Serves(ctx); err != nil {
		return err
	}
	r.client, err = client.Dial(r.server.Listen, client.Options{})
	return err
}

// stop ends snapshotd.
func (r *rig) stop() {
	if r.client != nil {
		_ = r.client.Close()
		r.client = nil
	}
	if r.server != nil {
		r.server.Stop()
		r.server = nil
	}
}

// timed adds a bar that a busy machine can miss; floors are the rounds of what it
// is measured against, and least says how many there must be.
func (r *rig) timed(b bench.Bar, floors []float64, least int) {
	b.Timed = true
	switch spread := bench.Spread(floors); {
	case b.OK: // all the same
	case len(floors) < least:
		b.Noise = fmt.Sprintf("fewer than %d rounds", least)
	case r.before > float64(runtime.NumCPU()):
		b.Noise = fmt.Sprintf("the load average was %.2f before the run", r.before)
	case spread > noise:
		b.Noise = fmt.Sprintf("the floor spread by %.0f %%", spread*100)
	}
	r.report.Bars = append(r.report.Bars, b)
}

// counted adds a bar that it cannot.
func (r *rig) counted(b bench.Bar) { r.report.Bars = append(r.report.Bars, b) }
