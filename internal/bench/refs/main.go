//go:build linux

// Command refs measures what it costs to know what snapshots reference, and to
// decide by it what may be deleted, against the bars of the project;
// docs/performance.md says how.
//
// It runs etcd and snapshotd, each in a process of its own, in a directory of
// its own, and removes all of it at the end.
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
	"syscall"
	"time"

	"google.golang.org/grpc"                      //nolint:depguard // calls that the client does not offer
	"google.golang.org/grpc/credentials/insecure" //nolint:depguard // as above

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1" //nolint:depguard // a benchmark is a client
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/bench"
)

const etcdRoot = bench.EtcdRoot

// The exit codes.
const (
	exitError = 1
	exitUsage = 2
)

type options struct {
	snapshots int
	segments  int
	share     int
	units     int
	checks    int
	rounds    int
	pairs     int
	seed      uint64
	real      bool
	bound     time.Duration
	strict    bool
	snapshotd string
	etcdBin   string
	dir       string
	output    string
	profile   string
}

// replaced is how many segments differ between a snapshot and the next.
func (o *options) replaced() int { return max(o.segments*o.share/100, 1) }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if len(os.Args) == 2 && os.Args[1] == "worker" {
		if err := work(ctx, os.Stdin, os.Stdout); err != nil {
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
		fmt.Fprintln(os.Stderr, "bench-refs:", err)
		code = exitError
	}
	os.Exit(code)
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("bench-refs", flag.ContinueOnError)
	fs.IntVar(&o.snapshots, "snapshots", 1000, "snapshots of the collection")
	fs.IntVar(&o.segments, "segments", 10_000, "segments of each")
	fs.IntVar(&o.share, "replaced", 10, "percent of the segments that the next snapshot does not have")
	fs.IntVar(&o.units, "units", 10_000, "units of a Reclaim, at most 10000")
	fs.IntVar(&o.checks, "checks", 1_000_000, "segments to look up")
	fs.IntVar(&o.rounds, "rounds", 5, "rounds that count; one more is made before them")
	fs.IntVar(&o.pairs, "pairs", 40, "creates and drops that count, beside many snapshots and beside none")
	fs.Uint64Var(&o.seed, "seed", 1, "of what is picked by chance")
	fs.BoolVar(&o.real, "real", false, "have snapshotd take every snapshot, of segments that are compacted in between, which takes many minutes")
	fs.DurationVar(&o.bound, "bound", 14*time.Minute, "the longest that the run may take")
	fs.BoolVar(&o.strict, "strict", false, "exit with 1 when a bar is missed, with 3 when one cannot be judged")
	fs.StringVar(&o.snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.etcdBin, "etcd", ".bin/bench-etcd", "internal/bench/etcd")
	fs.StringVar(&o.dir, "dir", os.TempDir(), "where to make the directory of the run")
	fs.StringVar(&o.output, "o", "", "Markdown file to write the report into")
	fs.StringVar(&o.profile, "profile", "", "file for a processor profile of the load of the references")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if o.snapshots < 2 || o.segments < 1 || o.share < 1 || o.share > 100 || o.units < 1 || o.units > 10_000 ||
		o.checks < 1 || o.rounds < 1 || o.pairs < 1 {
		err := errors.New("-snapshots must be 2 at least, -replaced a percentage, -units 10000 at most, and every number positive")
		fmt.Fprintln(os.Stderr, err)
		return nil, err
	}
	return o, nil
}

// rig is what the measurements share.
type rig struct {
	*options
	log    io.Writer
	report *bench.Report
	began  time.Time
}

// say tells a person how far the run has come.
func (r *rig) say(format string, args ...any) {
	fmt.Fprintf(r.log, "%6.1fs  %s\n", time.Since(r.began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.bound, fmt.Errorf("the run took longer than %v", o.bound))
	defer cancel()
	dir, err := os.MkdirTemp(o.dir, "bench-refs-")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	r := &rig{options: o, log: stderr, began: time.Now(), report: &bench.Report{Name: "bench-refs"}}
	before, commit := bench.Load(), bench.Commit()
	if err := r.measure(ctx, dir); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return 0, err
	}
	r.report.Facts = []string{
		fmt.Sprintf("Commit %s, %s, %s.", commit, bench.Today(), bench.Machine()),
		fmt.Sprintf("Load average %.2f before and %.2f after; the run took %v.", before, bench.Load(), time.Since(r.began).Round(time.Second)),
		fmt.Sprintf("Medians of %d rounds after one that does not count, of %d for creates and drops; ratios are taken per round.", o.rounds, o.pairs),
	}
	r.judge(before)
	return r.report.Finish(stdout, o.output, o.strict)
}

// judge says of the bars about time that were missed that they cannot be judged
// when others kept the machine busy. One that was passed all the same is passed.
func (r *rig) judge(before float64) {
	if before <= float64(runtime.NumCPU()) {
		return
	}
	for i := range r.report.Bars {
		if b := &r.report.Bars[i]; b.Timed && !b.OK {
			b.Noise = fmt.Sprintf("the load average was %.2f before the run", before)
		}
	}
}

// cluster is an etcd and at most one snapshotd.
type cluster struct {
	*options
	dir  string
	etcd *bench.Process
	at   string // etcd's endpoint

	server  *bench.Snapshotd
	client  *client.Client
	conn    *grpc.ClientConn
	reclaim snapshotdv1.ReclaimServiceClient
}

// newCluster starts an etcd.
func newCluster(ctx context.Context, o *options, dir string) (*cluster, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c := &cluster{options: o, dir: dir}
	var err error
	c.etcd, c.at, err = bench.StartEtcd(ctx, o.etcdBin, dir)
	return c, err
}

func (c *cluster) objects() string { return filepath.Join(c.dir, "objects") }

// start starts snapshotd, and does not wait for it to serve.
func (c *cluster) start(ctx context.Context) error {
	var err error
	if c.server, err = bench.StartSnapshotd(ctx, c.snapshotd, c.dir, c.at, etcdRoot, fmt.Sprintf(`object_stores:
  default:
    type: file
    path: %s
`, c.objects())); err != nil {
		return err
	}
	if c.client, err = client.Dial(c.server.Listen, client.Options{}); err != nil {
		return err
	}
	c.conn, err = grpc.NewClient(c.server.Listen, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		return err
	}
	c.reclaim = snapshotdv1.NewReclaimServiceClient(c.conn)
	return nil
}

// serve starts snapshotd and waits until it serves.
func (c *cluster) serve(ctx context.Context) error {
	if err := c.start(ctx); err != nil {
		return err
	}
	return c.server.Serves(ctx)
}

// stop ends snapshotd.
func (c *cluster) stop() {
	if c.conn != nil {
		_, _ = c.conn.Close(), c.client.Close()
		c.conn = nil
	}
	if c.server != nil {
		c.server.Stop()
		c.server = nil
	}
}

// close ends all of the cluster.
func (c *cluster) close() {
	c.stop()
	if c.etcd != nil {
		c.etcd.Stop()
	}
}
