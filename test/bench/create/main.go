//go:build linux

// Command create measures the speed of creates, registrations and reads of snapshots
// against the bars of the project: see docs/performance.md.
//
// It runs etcd, an S3 server and snapshotd in a separate process and directory each,
// and removes the directories at the end.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	bucket   = "bench"
	etcdRoot = "/snapshotd"
)

// The parts of a run, in their order.
const (
	partRegister = "register"
	partCreate   = "create"
	partRead     = "read"
	partClients  = "clients"
)

type options struct {
	bench.Options
	bench.Parts

	sizes         []int
	referenceMax  int
	listed        int
	window        time.Duration
	clients       int
	latency       time.Duration
	profile       string
	maxCreates    int
	streams       int
	batchSegments int
}

func main() { bench.Main("bench-create", child, run) }

func child(ctx context.Context, args []string) (bool, error) {
	if len(args) != 3 || args[0] != "worker" {
		return false, nil
	}
	return true, work(ctx, args[1], args[2], os.Stdin, os.Stdout)
}

func parse(args []string) (*options, error) {
	o := &options{Options: bench.Options{Bound: 14 * time.Minute}}
	fs := flag.NewFlagSet("bench-create", flag.ContinueOnError)
	o.Options.Flags(fs)
	o.Parts.Flags(fs, partRegister, partCreate, partRead, partClients) // create needs register
	sizes := fs.String("n", "1000,10000,100000", "numbers of segments")
	fs.IntVar(&o.referenceMax, "reference-max", 10_000, "most segments for which the reference design is measured")
	fs.IntVar(&o.listed, "snapshots", 10_000, "snapshots to list among")
	fs.DurationVar(&o.window, "window", 3*time.Second, "how long clients take snapshots in each measurement")
	fs.IntVar(&o.clients, "clients", 64, "clients that take snapshots at once")
	fs.DurationVar(
		&o.latency,
		"latency",
		20*time.Millisecond,
		"what is added to each request to the store for the clients",
	)
	fs.StringVar(&o.profile, "profile", "", "directory for profiles of snapshotd at the largest size")
	fs.IntVar(&o.maxCreates, "max-creates", 0, "snapshotd's --max-creates; 0 leaves its default")
	fs.IntVar(&o.streams, "streams", 4, "streams that register segments at once")
	fs.IntVar(&o.batchSegments, "message", 500, "segments in a message of such a stream")
	return o, bench.Parse(fs, args, func() error { return o.check(*sizes) })
}

func (o *options) check(sizes string) error {
	for text := range strings.SplitSeq(sizes, ",") {
		n, err := strconv.Atoi(strings.ReplaceAll(strings.TrimSpace(text), "_", ""))
		if err != nil || n < 1 || n > 500_000 {
			return fmt.Errorf("-n: %q is not a number from 1 to 500000", text)
		}
		o.sizes = append(o.sizes, n)
	}
	if o.Rounds < 1 || o.clients < 1 || o.streams < 1 || o.batchSegments < 1 || o.listed < 1 {
		return errors.New("-rounds, -clients, -streams, -message and -snapshots must be positive")
	}
	if o.Selected(partCreate) && !o.Selected(partRegister) {
		return fmt.Errorf("-only: %s needs %s", partCreate, partRegister)
	}
	return o.Check()
}

// env is the environment that the measurements share.
type env struct {
	*options
	*bench.Run

	proxy  *bench.Proxy
	worker *worker
	client *client.Client
	server *bench.Snapshotd
	etcdAt string

	floors []float64 // spread of each floor
}

func run(ctx context.Context, args []string) (int, error) {
	o, err := parse(args)
	if err != nil {
		return 0, err
	}
	medians := fmt.Sprintf("Medians of %d rounds after one that does not count; ratios are taken per round.", o.Rounds)
	return bench.Measure(ctx, &o.Options, "bench-create", medians, func(ctx context.Context, run *bench.Run) error {
		e := &env{options: o, Run: run}
		stop, err := e.start(ctx, run.Root)
		defer stop()
		if err != nil {
			return err
		}
		if err := e.measure(ctx); err != nil {
			return err
		}
		e.judge()
		return nil
	})
}

func (e *env) measure(ctx context.Context) error {
	var largest *collection
	for _, n := range e.sizes {
		if !e.Selected(partRegister) {
			break
		}
		col, err := e.register(ctx, n)
		if err != nil {
			return fmt.Errorf("register %d segments: %w", n, err)
		}
		largest = &col
		if e.Selected(partCreate) {
			if err := e.create(ctx, n, col); err != nil {
				return fmt.Errorf("create of %d segments: %w", n, err)
			}
		}
	}
	if largest != nil {
		if err := e.compacted(ctx); err != nil {
			return err
		}
	}
	if e.Selected(partRead) {
		if err := e.read(ctx); err != nil {
			return fmt.Errorf("read: %w", err)
		}
	}
	if e.Selected(partClients) {
		if err := e.many(ctx); err != nil {
			return fmt.Errorf("clients: %w", err)
		}
	}
	return nil
}

// judge marks the bars for time as inconclusive if the floor was unsteady or had too
// few rounds.
func (e *env) judge() {
	why := ""
	switch {
	case len(e.floors) == 0:
		why = "no floor was measured"
	case e.Rounds < bench.MinRounds:
		why = fmt.Sprintf("fewer than %d rounds", bench.MinRounds)
	case slices.Max(e.floors) > bench.MaxSpread:
		why = fmt.Sprintf("floor spread %.0f %%", slices.Max(e.floors)*100)
	}
	for i := range e.Report.Bars {
		if b := &e.Report.Bars[i]; b.Timed {
			b.Noise = why
		}
	}
}

// start starts the servers. Stop stops the started ones, also after an error.
func (e *env) start(ctx context.Context, dir string) (stop func(), err error) {
	var ends []func()
	stop = func() {
		for _, end := range slices.Backward(ends) {
			end()
		}
	}
	etcd, endpoint, err := bench.StartEtcd(ctx, e.Etcd, dir)
	if err != nil {
		return stop, err
	}
	ends = append(ends, etcd.Stop)
	e.etcdAt = endpoint
	s3, addr, err := bench.StartS3(ctx, e.S3, dir, bucket)
	if err != nil {
		return stop, err
	}
	ends = append(ends, s3.Stop)
	if e.proxy, err = bench.StartProxy(ctx, addr); err != nil {
		return stop, err
	}
	ends = append(ends, e.proxy.Close)
	if e.worker, err = startWorker(ctx, dir, endpoint, e.proxy.Addr); err != nil {
		return stop, err
	}
	ends = append(ends, e.worker.process.Stop)
	settings := bench.OnS3(e.proxy.Addr)
	if e.maxCreates > 0 {
		settings += fmt.Sprintf("max_creates: %d\n", e.maxCreates)
	}
	if e.server, err = bench.StartSnapshotd(ctx, e.Snapshotd, dir, endpoint, etcdRoot, settings); err != nil {
		return stop, err
	}
	ends = append(ends, e.server.Stop)
	if err = e.server.WaitServing(ctx); err != nil {
		return stop, err
	}
	if e.client, err = client.Dial(e.server.Listen, client.Options{}); err != nil {
		return stop, err
	}
	ends = append(ends, func() { _ = e.client.Close() })
	return stop, nil
}
