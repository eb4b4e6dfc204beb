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
func (r *env) objects(prefix string) string { return filepath.Join(r.data, "s3", bucket, prefix) }

func run(ctx context.Context, args []string) (int, error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	medians := fmt.Sprintf("Medians of %d rounds after one that does not count; ratios are taken per round.", o.Rounds)
	return bench.Measure(ctx, &o.Options, "bench-restore", medians, func(ctx context.Context, run *bench.Run) (err error) {
		r := &env{options: o, Run: run}
		if r.data, err = os.MkdirTemp(o.store, "bench-restore-"); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(r.data)) }()
		return r.measure(ctx)
	})
}

// measure starts the servers and runs the parts.
func (r *env) measure(ctx context.Context) error {
	e, endpoint, err := bench.StartEtcd(ctx, r.Etcd, r.Root)
	if err != nil {
		return err
	}
	defer e.Stop()
	r.etcdAt = endpoint
	if r.kv, err = openEtcd(endpoint, etcdRoot); err != nil {
		return err
	}
	defer func() { _ = r.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, r.S3, r.data, bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	r.s3At = addr
	if r.proxy, err = bench.StartProxy(ctx, addr); err != nil {
		return err
	}
	defer r.proxy.Close()
	if r.floor, err = startFloor(ctx, r.Root); err != nil {
		return err
	}
	defer r.floor.process.Stop()
	defer r.stop()

	return r.RunParts(
		ctx,
		bench.Part{Name: partSmall, Run: r.small},
		bench.Part{Name: partMedium, Run: r.medium},
		bench.Part{Name: partSegment, Run: r.segment},
		bench.Part{Name: partLarge, Run: r.large},
		bench.Part{Name: partLatency, Run: r.delayed},
		bench.Part{Name: partMany, Run: r.many},
	)
}

// serve restarts snapshotd on an S3 server.
func (r *env) serve(ctx context.Context, s3, root string, inFlight int) error {
	r.stop()
	settings := bench.OnS3(s3)
	if inFlight > 0 {
		settings += fmt.Sprintf("copy_in_flight: %d\n", inFlight)
	}
	var err error
	if r.server, err = bench.StartSnapshotd(ctx, r.Snapshotd, r.Root, r.etcdAt, root, settings); err != nil {
		return err
	}
	if err := r.server.WaitServing(ctx); err != nil {
		return err
	}
	r.client, err = client.Dial(r.server.Listen, client.Options{})
	return err
}

// stop ends snapshotd.
func (r *env) stop() {
	if r.client != nil {
		_ = r.client.Close()
		r.client = nil
	}
	if r.server != nil {
		r.server.Stop()
		r.server = nil
	}
}

// timed adds a bar that depends on the load of the machine. Floors are the rounds of
// the comparison.
func (r *env) timed(what, want, got string, ok bool, floors []float64) {
	b := bench.Bar{What: what, Want: want, Got: got, OK: ok, Timed: true}
	if !ok {
		b.Noise = r.Noise(floors, r.Rounds, bench.MinRounds)
	}
	r.Report.Bars = append(r.Report.Bars, b)
}

// counted adds a bar that does not depend on it.
func (r *env) counted(what, want, got string, ok bool) {
	r.Report.Bars = append(r.Report.Bars, bench.Bar{What: what, Want: want, Got: got, OK: ok})
}

func openEtcd(endpoint, root string) (*etcd.Client, error) {
	return etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: root})
}
