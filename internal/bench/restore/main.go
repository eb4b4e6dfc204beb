//go:build linux

// Command restore measures how fast snapshots are restored, against the bars of
// the project; docs/performance.md says how.
//
// It runs etcd, an S3 server, snapshotd and what it compares that with, each in a
// process of its own, in a directory of its own, and removes all of it at the
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
	bucket   = bench.Bucket
	etcdRoot = bench.EtcdRoot

	// noise is the spread of a floor above which a run does not judge times that
	// were missed, and minRounds how many rounds it takes to know the spread.
	noise     = 0.10
	minRounds = 5
)

// The exit codes.
const (
	exitError = 1
	exitUsage = 2
)

// The parts of a run, in their order.
const (
	partSmall   = "small"
	partMedium  = "medium"
	partSegment = "segment"
	partLarge   = "large"
	partLatency = "latency"
	partMany    = "many"
)

var parts = []string{partSmall, partMedium, partSegment, partLarge, partLatency, partMany}

type options struct {
	rounds    int
	calls     int
	segments  int
	latency   time.Duration
	bound     time.Duration
	strict    bool
	snapshotd string
	etcdBin   string
	s3Bin     string
	rclone    string
	dir       string
	output    string
	profile   string
	only      string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) > 2 && os.Args[1] == "child" {
		if err := child(ctx, os.Args[2], os.Args[3:]); err != nil {
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
		fmt.Fprintln(os.Stderr, "bench-restore:", err)
		code = exitError
	}
	os.Exit(code)
}

// child is what this program is when it has started itself.
func child(ctx context.Context, what string, args []string) error {
	switch {
	case what == "floor" && len(args) == 0:
		return floorChild(ctx, os.Stdin, os.Stdout)
	case what == "s3" && len(args) == 0:
		return memoryS3(ctx, os.Stdin, os.Stdout)
	case what == "many" && len(args) == 2:
		return manyChild(ctx, args[0], args[1], os.Stdin, os.Stdout)
	}
	return fmt.Errorf("unknown child %q", what)
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("bench-restore", flag.ContinueOnError)
	fs.IntVar(&o.rounds, "rounds", 5, "rounds that count; one more is made before them")
	fs.IntVar(&o.calls, "calls", 40, "restores of one segment in a round")
	fs.IntVar(&o.segments, "segments", 100_000, "segments of the large job")
	fs.DurationVar(&o.latency, "latency", 50*time.Millisecond, "what is added to each request for part latency")
	fs.DurationVar(&o.bound, "bound", 15*time.Minute, "the longest that the run may take")
	fs.BoolVar(&o.strict, "strict", false, "exit with 1 when a bar is missed, with 3 when one cannot be judged")
	fs.StringVar(&o.snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.etcdBin, "etcd", ".bin/bench-etcd", "internal/bench/etcd")
	fs.StringVar(&o.s3Bin, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&o.rclone, "rclone", ".bin/rclone", "rclone; empty: without it")
	fs.StringVar(&o.dir, "dir", os.TempDir(), "where to make the directory of the run")
	fs.StringVar(&o.output, "o", "", "Markdown file to write the report into")
	fs.StringVar(&o.profile, "profile", "", "directory for processor profiles of one restore of each part")
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
	if o.rounds < 1 || o.calls < 1 || o.segments < 1 {
		return errors.New("-rounds, -calls and -segments must be positive")
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

	root   string // directory of the run
	etcdAt string
	kv     *etcd.Client
	s3At   string // versitygw
	proxy  *bench.Proxy
	floor  *floor
	names  int

	server *bench.Snapshotd // that runs
	client *client.Client
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

// objects is the directory in which versitygw keeps what has a prefix.
func (r *rig) objects(prefix string) string { return filepath.Join(r.root, "s3", bucket, prefix) }

func run(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.bound, fmt.Errorf("the run took longer than %v", o.bound))
	defer cancel()
	dir, err := os.MkdirTemp(o.dir, "bench-restore-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &rig{options: o, log: stderr, began: time.Now(), root: dir, before: bench.Load(), report: &bench.Report{Name: "bench-restore"}}
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
		fmt.Sprintf("Medians of %d rounds after one that does not count; ratios are taken per round.", o.rounds),
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
	r.etcdAt = endpoint
	if r.kv, err = openEtcd(endpoint, etcdRoot); err != nil {
		return err
	}
	defer func() { _ = r.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, r.s3Bin, r.root, bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	r.s3At = addr
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
		{partSmall, r.small},
		{partMedium, r.medium},
		{partSegment, r.segment},
		{partLarge, r.large},
		{partLatency, r.delayed},
		{partMany, r.many},
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

// serve starts snapshotd on an S3 server, in place of the one that runs.
func (r *rig) serve(ctx context.Context, s3, root string, inFlight int) error {
	r.stop()
	settings := bench.OnS3(s3)
	if inFlight > 0 {
		settings += fmt.Sprintf("copy_in_flight: %d\n", inFlight)
	}
	var err error
	if r.server, err = bench.StartSnapshotd(ctx, r.snapshotd, r.root, r.etcdAt, root, settings); err != nil {
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
// is measured against.
func (r *rig) timed(what, want, got string, ok bool, floors []float64) {
	b := bench.Bar{What: what, Want: want, Got: got, OK: ok, Timed: true}
	switch spread := bench.Spread(floors); {
	case ok: // all the same
	case r.rounds < minRounds:
		b.Noise = fmt.Sprintf("fewer than %d rounds", minRounds)
	case r.before > float64(runtime.NumCPU()):
		b.Noise = fmt.Sprintf("the load average was %.2f before the run", r.before)
	case spread > noise:
		b.Noise = fmt.Sprintf("the floor spread by %.0f %%", spread*100)
	}
	r.report.Bars = append(r.report.Bars, b)
}

// counted adds a bar that it cannot.
func (r *rig) counted(what, want, got string, ok bool) {
	r.report.Bars = append(r.report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok})
}

func openEtcd(endpoint, root string) (*etcd.Client, error) {
	return etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: root})
}
