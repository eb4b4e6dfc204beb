//go:build linux

// Command refs measures the cost of the references of snapshots and of the decisions
// of Reclaim against the bars of the project: see docs/performance.md.
//
// It runs etcd and snapshotd in a separate process and directory each, and removes
// the directories at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const etcdRoot = bench.EtcdRoot

type options struct {
	bench.Options

	snapshots int
	segments  int
	share     int
	units     int
	checks    int
	pairs     int
	seed      uint64
	real      bool
	profile   string
}

// replaced returns the number of segments that differ between a snapshot and the
// next.
func (o *options) replaced() int { return max(o.segments*o.share/100, 1) }

func main() { bench.Main("bench-refs", child, run) }

func child(ctx context.Context, args []string) (bool, error) {
	if !slices.Equal(args, []string{"worker"}) {
		return false, nil
	}
	return true, work(ctx, os.Stdin, os.Stdout)
}

func parse(args []string) (*options, error) {
	o := &options{Options: bench.Options{Bound: 14 * time.Minute}}
	fs := flag.NewFlagSet("bench-refs", flag.ContinueOnError)
	o.Flags(fs)
	fs.IntVar(&o.snapshots, "snapshots", 1000, "snapshots of the collection")
	fs.IntVar(&o.segments, "segments", 10_000, "segments per snapshot")
	fs.IntVar(&o.share, "replaced", 10, "percent of the segments that the next snapshot does not have")
	fs.IntVar(&o.units, "units", 10_000, "units of a Reclaim, at most 10000")
	fs.IntVar(&o.checks, "checks", 1_000_000, "segments to look up")
	fs.IntVar(&o.pairs, "pairs", 40, "creates and drops that count, beside many snapshots and beside none")
	fs.Uint64Var(&o.seed, "seed", 1, "seed of random choices")
	fs.BoolVar(
		&o.real,
		"real",
		false,
		"take every snapshot by snapshotd, with compactions in between; takes many minutes",
	)
	fs.StringVar(&o.profile, "profile", "", "file for a processor profile of the load of the references")
	return o, bench.Parse(fs, args, o.check)
}

func (o *options) check() error {
	if o.snapshots < 2 || o.segments < 1 || o.share < 1 || o.share > 100 || o.units < 1 || o.units > 10_000 ||
		o.checks < 1 || o.Rounds < 1 || o.pairs < 1 {
		return errors.New(
			"-snapshots must be 2 at least, -replaced a percentage, -units 10000 at most, and every number positive",
		)
	}
	return nil
}

// env is the environment that the measurements share.
type env struct {
	*options
	*bench.Run
}

func run(ctx context.Context, args []string) (int, error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	medians := fmt.Sprintf(
		"Medians of %d rounds after one that does not count, of %d for creates and drops; ratios are taken per round.",
		o.Rounds,
		o.pairs,
	)
	return bench.Measure(ctx, &o.Options, "bench-refs", medians, func(ctx context.Context, run *bench.Run) error {
		e := &env{options: o, Run: run}
		if err := e.measure(ctx, run.Root); err != nil {
			return err
		}
		e.judge()
		return nil
	})
}

// judge marks the missed bars for time as inconclusive on a busy machine. A passed
// bar stays passed.
func (e *env) judge() {
	for i := range e.Report.Bars {
		if b := &e.Report.Bars[i]; b.Timed && !b.OK {
			b.Noise = e.Noise(nil, 0, 0)
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
	c.etcd, c.at, err = bench.StartEtcd(ctx, o.Etcd, dir)
	return c, err
}

func (c *cluster) objects() string { return filepath.Join(c.dir, "objects") }

// start starts snapshotd and returns before it serves.
func (c *cluster) start(ctx context.Context) error {
	var err error
	if c.server, err = bench.StartSnapshotd(ctx, c.Snapshotd, c.dir, c.at, etcdRoot, fmt.Sprintf(`object_stores:
  default:
    type: file
    path: %s
`, c.objects())); err != nil {
		return err
	}
	if c.client, err = client.Dial(c.server.Listen, client.Options{}); err != nil {
		return err
	}
	c.conn, err = grpc.NewClient(c.server.Listen, grpc.WithTransportCredentials(insecure.NewCredentials()))
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
	return c.server.WaitServing(ctx)
}

// stop stops snapshotd.
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

// close stops snapshotd and etcd.
func (c *cluster) close() {
	c.stop()
	if c.etcd != nil {
		c.etcd.Stop()
	}
}
