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
func (e *env) path(prefix string) string { return filepath.Join(e.store, "s3", bench.Bucket, prefix) }

func run(ctx context.Context, args []string) (code int, err error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	e := &env{options: o}
	if e.store, err = os.MkdirTemp(o.objects, "bench-gc-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(e.store)) }()
	medians := fmt.Sprintf(
		"Medians of %d rounds after one that does not count, where more than one is made; ratios are taken per round.",
		o.Rounds,
	)
	return bench.Measure(ctx, &o.Options, "bench-gc", medians, func(ctx context.Context, run *bench.Run) error {
		e.Run = run
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
	e.etcd, e.etcdAt = process, endpoint
	if e.kv, err = etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: bench.EtcdRoot}); err != nil {
		return err
	}
	defer func() { _ = e.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, e.S3, e.store, bench.Bucket)
	if err != nil {
		return err
	}
	defer gateway.Stop()
	e.gateway, e.s3At = gateway, addr
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
		bench.Part{Name: partRounds, Run: e.deletes},
		bench.Part{Name: partFull, Run: e.fullRound},
		bench.Part{Name: partDropped, Run: e.dropped},
		bench.Part{Name: partLatency, Run: e.delayed},
		bench.Part{Name: partIdle, Run: e.idle},
		bench.Part{Name: partGrants, Run: e.grants},
	)
}

// serve restarts snapshotd on an S3 server, without cycles of its own. Rate is the
// limit of deletes per second; negative: no limit.
func (e *env) serve(ctx context.Context, s3 string, rate int) error {
	e.stop()
	e.serving = s3
	settings := bench.OnS3(s3) + fmt.Sprintf("collector: \"off\"\ncollect_rate: %d\n", rate)
	var err error
	if e.server, err = bench.StartSnapshotd(ctx, e.Snapshotd, e.Root, e.etcdAt, bench.EtcdRoot, settings); err != nil {
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
// the comparison, of which least are required.
func (e *env) timed(b bench.Bar, floors []float64, least int) {
	if b.Timed = true; !b.OK {
		b.Noise = e.Noise(floors, len(floors), least)
	}
	e.Report.Bars = append(e.Report.Bars, b)
}

// counted adds a bar that does not depend on it.
func (e *env) counted(b bench.Bar) { e.Report.Bars = append(e.Report.Bars, b) }
