//go:build linux

// Command create measures how fast snapshots are taken, how fast segments are
// registered and how fast snapshots are read, against the bars of the project;
// docs/performance.md says how.
//
// It runs etcd, an S3 server and snapshotd, each in a process of its own, in a
// directory of its own, and removes all of it at the end.
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/bench"
)

const (
	bucket   = "bench"
	etcdRoot = "/snapshotd"

	// noise is the spread of the floor above which a run does not judge times,
	// and minRounds how many rounds it takes to know the spread.
	noise     = 0.10
	minRounds = 5
)

// The exit codes.
const (
	exitError = 1
	exitUsage = 2
)

type options struct {
	sizes         []int
	rounds        int
	referenceMax  int
	listed        int
	window        time.Duration
	clients       int
	latency       time.Duration
	bound         time.Duration
	strict        bool
	snapshotd     string
	etcdBin       string
	s3Bin         string
	dir           string
	output        string
	profile       string
	maxCreates    int
	only          string
	streams       int
	batchSegments int
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) == 4 && os.Args[1] == "worker" {
		if err := work(ctx, os.Args[2], os.Args[3], os.Stdin, os.Stdout); err != nil {
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
		fmt.Fprintln(os.Stderr, "bench-create:", err)
		code = exitError
	}
	os.Exit(code)
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("bench-create", flag.ContinueOnError)
	sizes := fs.String("n", "1000,10000,100000", "numbers of segments")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds that count; one more is made before them")
	fs.IntVar(&o.referenceMax, "reference-max", 10_000, "most segments for which the reference design is measured")
	fs.IntVar(&o.listed, "snapshots", 10_000, "snapshots to list among")
	fs.DurationVar(&o.window, "window", 3*time.Second, "how long clients take snapshots in each measurement")
	fs.IntVar(&o.clients, "clients", 64, "clients that take snapshots at once")
	fs.DurationVar(&o.latency, "latency", 20*time.Millisecond, "what is added to each request to the store for the clients")
	fs.DurationVar(&o.bound, "bound", 14*time.Minute, "the longest that the run may take")
	fs.BoolVar(&o.strict, "strict", false, "exit with 1 when a bar is missed, with 3 when one cannot be judged")
	fs.StringVar(&o.snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.etcdBin, "etcd", ".bin/bench-etcd", "internal/bench/etcd")
	fs.StringVar(&o.s3Bin, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&o.dir, "dir", os.TempDir(), "where to make the directory of the run")
	fs.StringVar(&o.output, "o", "", "Markdown file to write the report into")
	fs.StringVar(&o.profile, "profile", "", "directory for profiles of snapshotd at the largest size")
	fs.IntVar(&o.maxCreates, "max-creates", 0, "snapshotd's --max-creates; 0 leaves its default")
	fs.StringVar(&o.only, "only", "register,create,read,clients", "what to measure; create needs register")
	fs.IntVar(&o.streams, "streams", 4, "streams that register segments at once")
	fs.IntVar(&o.batchSegments, "message", 500, "segments in a message of such a stream")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	for text := range strings.SplitSeq(*sizes, ",") {
		n, err := strconv.Atoi(strings.ReplaceAll(strings.TrimSpace(text), "_", ""))
		if err != nil || n < 1 || n > 500_000 {
			err = fmt.Errorf("-n: %q is not a number from 1 to 500000", text)
			fmt.Fprintln(os.Stderr, err)
			return nil, err
		}
		o.sizes = append(o.sizes, n)
	}
	if o.rounds < 1 || o.clients < 1 || o.streams < 1 || o.batchSegments < 1 || o.listed < 1 {
		err := errors.New("-rounds, -clients, -streams, -message and -snapshots must be positive")
		fmt.Fprintln(os.Stderr, err)
		return nil, err
	}
	return o, nil
}

func (o *options) wants(part string) bool { return strings.Contains(","+o.only+",", ","+part+",") }

// rig is what the measurements share.
type rig struct {
	*options
	log    io.Writer
	report *bench.Report
	began  time.Time

	proxy  *bench.Proxy
	worker *worker
	client *client.Client
	server *bench.Snapshotd
	etcdAt string

	floors []float64 // spread of each floor
	names  int
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

func run(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.bound, fmt.Errorf("the run took longer than %v", o.bound))
	defer cancel()
	dir, err := os.MkdirTemp(o.dir, "bench-create-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &rig{options: o, log: stderr, began: time.Now(), report: &bench.Report{Name: "bench-create"}}
	stop, err := r.start(ctx, dir)
	defer stop()
	if err != nil {
		return 0, err
	}
	before, commit := bench.Load(), bench.Commit()
	if err := r.measure(ctx); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return 0, err
	}
	r.report.Facts = []string{
		fmt.Sprintf("Commit %s, %s, %s.", commit, bench.Today(), bench.Machine()),
		fmt.Sprintf("Load average %.2f before and %.2f after; the run took %v.", before, bench.Load(), time.Since(r.began).Round(time.Second)),
		fmt.Sprintf("Medians of %d rounds after one that does not count; ratios are taken per round.", o.rounds),
	}
	r.judge()
	return r.report.Finish(stdout, o.output, o.strict)
}

func (r *rig) measure(ctx context.Context) error {
	var largest *collection
	for _, n := range r.sizes {
		if !r.wants("register") {
			break
		}
		col, err := r.register(ctx, n)
		if err != nil {
			return fmt.Errorf("register %d segments: %w", n, err)
		}
		largest = &col
		if r.wants("create") {
			if err := r.create(ctx, n, col); err != nil {
				return fmt.Errorf("create of %d segments: %w", n, err)
			}
		}
	}
	if largest != nil {
		if err := r.compacted(ctx); err != nil {
			return err
		}
	}
	if r.wants("read") {
		if err := r.read(ctx); err != nil {
			return fmt.Errorf("read: %w", err)
		}
	}
	if r.wants("clients") {
		if err := r.many(ctx); err != nil {
			return fmt.Errorf("clients: %w", err)
		}
	}
	return nil
}

// judge says of the bars that are about time that they cannot be judged when
// the floor was not steady, or not measured often enough to know.
func (r *rig) judge() {
	why := ""
	switch {
	case len(r.floors) == 0:
		why = "no floor was measured"
	case r.rounds < minRounds:
		why = fmt.Sprintf("fewer than %d rounds", minRounds)
	case slices.Max(r.floors) > noise:
		why = fmt.Sprintf("the floor spread by %.0f %%", slices.Max(r.floors)*100)
	}
	for i := range r.report.Bars {
		if b := &r.report.Bars[i]; b.Timed {
			b.Noise = why
		}
	}
}

// start starts the servers. What it returns ends those that it started.
func (r *rig) start(ctx context.Context, dir string) (stop func(), err error) {
	var ends []func()
	stop = func() {
		for _, end := range slices.Backward(ends) {
			end()
		}
	}
	etcd, endpoint, err := bench.StartEtcd(ctx, r.etcdBin, dir)
	if err != nil {
		return stop, err
	}
	ends = append(ends, etcd.Stop)
	r.etcdAt = endpoint
	s3, addr, err := bench.StartS3(ctx, r.s3Bin, dir, bucket)
	if err != nil {
		return stop, err
	}
	ends = append(ends, s3.Stop)
	if r.proxy, err = bench.StartProxy(ctx, addr); err != nil {
		return stop, err
	}
	ends = append(ends, r.proxy.Close)
	if r.worker, err = startWorker(ctx, dir, endpoint, r.proxy.Addr); err != nil {
		return stop, err
	}
	ends = append(ends, r.worker.process.Stop)
	settings := bench.OnS3(r.proxy.Addr)
	if r.maxCreates > 0 {
		settings += fmt.Sprintf("max_creates: %d\n", r.maxCreates)
	}
	if r.server, err = bench.StartSnapshotd(ctx, r.snapshotd, dir, endpoint, etcdRoot, settings); err != nil {
		return stop, err
	}
	ends = append(ends, r.server.Stop)
	if err = r.server.Serves(ctx); err != nil {
		return stop, err
	}
	if r.client, err = client.Dial(r.server.Listen, client.Options{}); err != nil {
		return stop, err
	}
	ends = append(ends, func() { _ = r.client.Close() })
	return stop, nil
}
