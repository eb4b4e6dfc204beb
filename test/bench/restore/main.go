//go:build linux

// Command restore measures the speed of restores against the bars of the project:
// see docs/performance.md.
//
// It runs etcd, an S3 server, snapshotd and the programs of the comparison in a
// separate process and directory each, and removes the directories at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	bucket   = bench.Bucket
	etcdRoot = bench.EtcdRoot
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

type options struct {
	bench.Options
	bench.Parts

	calls    int
	segments int
	latency  time.Duration
	store    string
	rclone   string
	profile  string
}

func main() { bench.Main("bench-restore", child, run) }

func child(ctx context.Context, args []string) (bool, error) {
	if len(args) < 2 || args[0] != "child" {
		return false, nil
	}
	switch what := args[1]; {
	case what == "floor" && len(args) == 2:
		return true, floorChild(ctx, os.Stdin, os.Stdout)
	case what == "s3" && len(args) == 2:
		return true, memoryS3(ctx, os.Stdin, os.Stdout)
	case what == "many" && len(args) == 4:
		return true, manyChild(ctx, args[2], args[3], os.Stdin, os.Stdout)
	default:
		return true, fmt.Errorf("unknown child %q", what)
	}
}

func parse(args []string) (*options, error) {
	o := &options{Options: bench.Options{Bound: 15 * time.Minute}}
	fs := flag.NewFlagSet("bench-restore", flag.ContinueOnError)
	o.Options.Flags(fs)
	o.Parts.Flags(fs, partSmall, partMedium, partSegment, partLarge, partLatency, partMany)
	fs.IntVar(&o.calls, "calls", 40, "restores of one segment in a round")
	fs.IntVar(&o.segments, "segments", 100_000, "segments of the large job")
	fs.DurationVar(&o.latency, "latency", 50*time.Millisecond, "delay of each request in part latency")
	fs.StringVar(&o.store, "objects", "/dev/shm", "parent of the S3 server's directory")
	fs.StringVar(&o.rclone, "rclone", ".bin/rclone", "rclone; empty: no comparison with it")
	fs.StringVar(&o.profile, "profile", "", "directory for processor profiles of one restore of each part")
	return o, bench.Parse(fs, args, o.check)
}

func (o *options) check() error {
	if o.Rounds < 1 || o.calls < 1 || o.segments < 1 {
		return errors.New("-rounds, -calls and -segments must be positive")
	}
	return o.Check()
}

// env is the environment that the measurements share.
type env struct {
	*options
	*bench.Run

	data   string // directory of the S3 server
	etcdAt string
	kv     *etcd.Client
	s3At   string // versitygw
	proxy  *bench.Proxy
	floor  *floor

	server *bench.Snapshotd
	client *client.Client
}

// objects returns versitygw's directory of a prefix.
func (e *env) objects(prefix string) string { return filepath.Join(e.data, "s3", bucket, prefix) }

func run(ctx context.Context, args []string) (int, error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	medians := fmt.Sprintf("Medians of %d rounds after one that does not count; ratios are taken per round.", o.Rounds)
	return bench.Measure(ctx, &o.Options, "bench-restore", medians, func(ctx context.Context, run *bench.Run) (err error) {
		e := &env{options: o, Run: run}
		if e.data, err = os.MkdirTemp(o.store, "bench-restore-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(e.data)) }()
		return e.measure(ctx)
	})
}

// measure starts the servers and runs the parts.
func (e *env) measure(ctx context.Context) error {
	process, endpoint, err := bench.StartEtcd(ctx, e.Etcd, e.Root)
	if err != nil {
		return err
	}
	defer process.Stop()
	e.etcdAt = endpoint
	if e.kv, err = openEtcd(endpoint, etcdRoot); err != nil {
		return err
	}
	defer func() { _ = e.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, e.S3, e.data, bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	e.s3At = addr
	if e.proxy, err = bench.StartProxy(ctx, addr); err != nil {
		return err
	}
	defer e.proxy.Close()
	if e.floor, err = startFloor(ctx, e.Root); err != nil {
		return err
	}
	defer e.floor.process.Stop()
	defer e.stop()

	return e.RunParts(
		ctx,
		bench.Part{Name: partSmall, Run: e.small},
		bench.Part{Name: partMedium, Run: e.medium},
		bench.Part{Name: partSegment, Run: e.segment},
		bench.Part{Name: partLarge, Run: e.large},
		bench.Part{Name: partLatency, Run: e.delayed},
		bench.Part{Name: partMany, Run: e.many},
	)
}

// serve restarts snapshotd on an S3 server.
func (e *env) serve(ctx context.Context, s3, root string, inFlight int) error {
	e.stop()
	settings := bench.OnS3(s3)
	if inFlight > 0 {
		settings += fmt.Sprintf("copy_in_flight: %d\n", inFlight)
	}
	var err error
	if e.server, err = bench.StartSnapshotd(ctx, e.Snapshotd, e.Root, e.etcdAt, root, settings); err != nil {
		return err
	}
	if err := e.server.WaitServing(ctx); err != nil {
		return err
	}
	e.client, err = client.Dial(e.server.Listen, client.Options{})
	return err
}

// stop ends snapshotd.
func (e *env) stop() {
	if e.client != nil {
		_ = e.client.Close()
		e.client = nil
	}
	if e.server != nil {
		e.server.Stop()
		e.server = nil
	}
}

// timed adds a bar that depends on the load of the machine. Floors are the rounds of
// the comparison.
func (e *env) timed(what, want, got string, ok bool, floors []float64) {
	b := bench.Bar{What: what, Want: want, Got: got, OK: ok, Timed: true}
	if !ok {
		b.Noise = e.Noise(floors, e.Rounds, bench.MinRounds)
	}
	e.Report.Bars = append(e.Report.Bars, b)
}

// counted adds a bar that does not depend on it.
func (e *env) counted(what, want, got string, ok bool) {
	e.Report.Bars = append(e.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok})
}

func openEtcd(endpoint, root string) (*etcd.Client, error) {
	return etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: root})
}
