//go:build linux

// Command gc measures the speed of the collector's deletes, and the cost of a cycle
// with nothing to delete, against the bars of the project: see docs/performance.md.
//
// It runs etcd, an S3 server, snapshotd and the floor in a separate process and
// directory each, and removes the directories at the end.
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

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	// The sizes of the bars of the project.
	allSegments = 100_000
	allLiving   = 1_000_000
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

type options struct {
	bench.Options
	bench.Parts

	segments int
	full     int
	living   int
	held     int
	latency  time.Duration
	objects  string
	profile  string
}

func main() { bench.Main("bench-gc", child, run) }

func child(ctx context.Context, args []string) (bool, error) {
	if !slices.Equal(args, []string{"child", "floor"}) {
		return false, nil
	}
	return true, floorChild(ctx, os.Stdin, os.Stdout)
}

func parse(args []string) (*options, error) {
	o := &options{Options: bench.Options{Bound: 15 * time.Minute}}
	fs := flag.NewFlagSet("bench-gc", flag.ContinueOnError)
	o.Options.Flags(fs)
	o.Parts.Flags(fs, partRounds, partFull, partDropped, partLatency, partIdle, partGrants)
	fs.IntVar(&o.segments, "n", 20_000, "segments that a round deletes, of 12 files each")
	fs.IntVar(&o.full, "full", allSegments, "segments that the one full round deletes")
	fs.IntVar(&o.living, "living", allLiving, "live segments of part idle")
	fs.IntVar(&o.held, "held", 10_000, "dropped segments of part idle that a snapshot holds")
	fs.DurationVar(&o.latency, "latency", 500*time.Millisecond, "delay of each request in part latency")
	fs.StringVar(&o.objects, "objects", "/dev/shm", "parent of the S3 server's directory")
	fs.StringVar(&o.profile, "profile", "", "directory for processor profiles of one round of each part")
	return o, bench.Parse(fs, args, o.check)
}

func (o *options) check() error {
	if o.Rounds < 1 || o.segments < 1 || o.full < 1 || o.held < 1 || o.living < collections {
		return fmt.Errorf("-rounds, -n, -full and -held must be positive, -living at least %d", collections)
	}
	return o.Check()
}

// env is the environment that the measurements share.
type env struct {
	*options
	*bench.Run

	etcd     *bench.Process
	gateway  *bench.Process
	store    string // directory of the S3 server
	etcdAt   string
	kv       *etcd.Client
	s3At     string
	proxy    *bench.Proxy
	floor    *floor
	inFlight int       // concurrent requests of the floor
	floors   []float64 // seconds of the floor in the rounds

	server  *bench.Snapshotd
	serving string // the S3 server of snapshotd
	client  *client.Client
}

// path returns versitygw's directory of a prefix.
func (r *env) path(prefix string) string { return filepath.Join(r.store, "s3", bench.Bucket, prefix) }

func run(ctx context.Context, args []string) (code int, err error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	r := &env{options: o}
	if r.store, err = os.MkdirTemp(o.objects, "bench-gc-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.store)) }()
	medians := fmt.Sprintf(
		"Medians of %d rounds after one that does not count, where more than one is made; ratios are taken per round.",
		o.Rounds,
	)
	return bench.Measure(ctx, &o.Options, "bench-gc", medians, func(ctx context.Context, run *bench.Run) error {
		r.Run = run
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
	r.etcd, r.etcdAt = e, endpoint
	if r.kv, err = etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: bench.EtcdRoot}); err != nil {
		return err
	}
	defer func() { _ = r.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, r.S3, r.store, bench.Bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	r.gateway, r.s3At = gateway, addr
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
		bench.Part{Name: partRounds, Run: r.deletes},
		bench.Part{Name: partFull, Run: r.fullRound},
		bench.Part{Name: partDropped, Run: r.dropped},
		bench.Part{Name: partLatency, Run: r.delayed},
		bench.Part{Name: partIdle, Run: r.idle},
		bench.Part{Name: partGrants, Run: r.grants},
	)
}

// serve restarts snapshotd on an S3 server, without cycles of its own. Rate is the
// limit of deletes per second; negative: no limit.
func (r *env) serve(ctx context.Context, s3 string, rate int) error {
	r.stop()
	r.serving = s3
	settings := bench.OnS3(s3) + fmt.Sprintf("collector: \"off\"\ncollect_rate: %d\n", rate)
	var err error
	if r.server, err = bench.StartSnapshotd(ctx, r.Snapshotd, r.Root, r.etcdAt, bench.EtcdRoot, settings); err != nil {
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
// the comparison, of which least are required.
func (r *env) timed(b bench.Bar, floors []float64, least int) {
	if b.Timed = true; !b.OK {
		b.Noise = r.Noise(floors, len(floors), least)
	}
	r.Report.Bars = append(r.Report.Bars, b)
}

// counted adds a bar that does not depend on it.
func (r *env) counted(b bench.Bar) { r.Report.Bars = append(r.Report.Bars, b) }
