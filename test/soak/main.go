//go:build linux

// Command soak shows that memory, goroutines, open files, etcd and the bucket do not grow
// while snapshotd works for a long time: `make soak`.
//
// It runs etcd, an S3 server and three replicas of snapshotd, each a process, in rounds.
// A round makes the same number of each request, in an order that a seed decides and at a
// bounded rate: it writes, compacts, changes and drops segments, takes, pins, reads, drops
// and expires snapshots, makes and cancels restores, opens and closes streams, requests
// collector cycles, sends invalid requests and abandons calls. In each fourth round the
// leader is killed and restarted, or frozen until another leads.
//
// Then the load stops. Everything is dropped except as many segments and snapshots as at
// the end of every round, and once no work is left a sample is taken. So the counted
// values must be equal in all rounds. The first third of the rounds does not count; for
// the rest judge.go decides whether a value grows. The counts of a restarted replica
// start again; the first replica lives as long as the run. Memory is judged for replicas
// that have worked for some rounds, so a run of a few minutes cannot judge it.
//
// It exits with 1 when a bound is broken, with 3 when it cannot decide.
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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/object/s3"
	"github.com/snapshotd/snapshotd/test/bench"
)

const (
	replicas  = 3
	failEvery = 4               // rounds
	grace     = 3 * time.Minute // for the last round
)

// The exit codes of errors.
const (
	exitError = 1
	exitUsage = 2
)

// settings are the settings of every replica: short times, so that expiry and
// sweeps happen within a round.
const settings = `leader_ttl: 2s
create_lease_ttl: 5s
create_timeout: 30s
keep_restores: 1m
collect_interval: 1s
collect_tolerance: 1ms
collect_max_share: 1
sweep_interval: 5s
orphan_grace: 1h
replica: %s
`

type options struct {
	length    time.Duration
	short     bool
	seed      uint64
	snapshotd string
	etcdBin   string
	s3Bin     string
	dir       string
	objects   string
	output    string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	o, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		os.Exit(exitUsage)
	}
	code, err := run(ctx, o, os.Stdout, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, "soak:", err)
		code = exitError
	}
	os.Exit(code)
}

func parse(args []string) (*options, error) {
	o := &options{}
	fs := flag.NewFlagSet("soak", flag.ContinueOnError)
	fs.DurationVar(&o.length, "for", 10*time.Minute, "duration of the run; no round starts that would exceed it")
	fs.BoolVar(&o.short, "short", false, "exit with 0 if a bar is inconclusive")
	fs.Uint64Var(&o.seed, "seed", 0, "seed of the load; 0: random")
	fs.StringVar(&o.snapshotd, "snapshotd", "bin/snapshotd", "the program to run")
	fs.StringVar(&o.etcdBin, "etcd", ".bin/bench-etcd", "test/bench/etcd")
	fs.StringVar(&o.s3Bin, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&o.dir, "dir", os.TempDir(), "parent of the run's directory")
	fs.StringVar(&o.objects, "objects", "/dev/shm", "parent of the S3 server's directory")
	fs.StringVar(&o.output, "o", "", "Markdown file for the report")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if o.seed == 0 {
		o.seed = uint64(time.Now().UnixNano())
	}
	return o, nil
}

// env is the environment of a run.
type env struct {
	*options
	log   io.Writer
	began time.Time
	root  string // directory of the run
	store string // directory of the S3 server

	etcdAt   string
	kv       *etcd.Client
	s3At     string
	bucket   *s3.Store
	replicas [replicas]atomic.Pointer[replica]
	starts   int // of replicas, so far
	now      int // round
	engine   engine

	mu         sync.Mutex
	calls      map[string]int // number of operations by outcome
	unexpected []string       // errors that must not occur
}

// replica is a process of a replica.
type replica struct {
	name   string
	born   int // round
	server *bench.Snapshotd
	client *client.Client
	peak   atomic.Int64 // of its memory since the last sample
}

func (e *env) logf(format string, args ...any) {
	fmt.Fprintf(e.log, "%6.1fs  %s\n", time.Since(e.began).Seconds(), fmt.Sprintf(format, args...))
}

func run(ctx context.Context, o *options, stdout, stderr io.Writer) (code int, err error) {
	bound := o.length + grace
	ctx, cancel := context.WithTimeoutCause(ctx, bound, fmt.Errorf("the run exceeded %v", bound))
	defer cancel()
	e := &env{options: o, log: stderr, began: time.Now(), calls: map[string]int{}}
	for _, d := range []struct {
		in string
		to *string
	}{{o.dir, &e.root}, {o.objects, &e.store}} {
		if *d.to, err = os.MkdirTemp(d.in, "soak-"); err != nil {
			return 0, err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(*d.to)) }()
	}
	e.logf("seed %d", o.seed)
	samples, err := e.rounds(ctx)
	if err != nil {
		return 0, errors.Join(context.Cause(ctx), err)
	}
	code, err = e.report(samples).Finish(stdout, o.output, true)
	if o.short && code == bench.ExitInconclusive {
		code = 0
	}
	return code, err
}

// rounds starts the servers and runs rounds.
func (e *env) rounds(ctx context.Context) (samples []*sample, err error) {
	process, endpoint, err := bench.StartEtcd(ctx, e.etcdBin, e.root)
	if err != nil {
		return nil, err
	}
	defer process.Stop()
	e.etcdAt = endpoint
	if e.kv, err = etcd.Open(etcd.Options{Endpoints: []string{endpoint}, Root: bench.EtcdRoot}); err != nil {
		return nil, err
	}
	defer func() { _ = e.kv.Close() }()
	gateway, addr, err := bench.StartS3(ctx, e.s3Bin, e.store, bench.Bucket)
	if err != nil {
		return nil, err
	}
	defer gateway.Stop()
	e.s3At = addr
	if e.bucket, err = s3.Open(ctx, s3.Options{
		Bucket: bench.Bucket, Endpoint: "http://" + addr, PathStyle: true,
		AccessKeyID: bench.AccessKeyID, SecretAccessKey: bench.SecretAccessKey,
	}); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, e.stopAll()) }()
	for i := range e.replicas {
		if err := e.start(ctx, i); err != nil {
			return nil, err
		}
	}
	if err := e.prepare(ctx); err != nil {
		return nil, fmt.Errorf("prepare: %w", err)
	}
	watching, stop := context.WithCancel(ctx)
	var group sync.WaitGroup
	defer group.Wait()
	defer stop()
	group.Go(func() { e.watchMemory(watching) })

	for n, longest := 0, time.Duration(0); time.Since(e.began)+longest < e.length; n++ {
		begin := time.Now()
		s, err := e.round(ctx, n)
		if err != nil {
			return samples, fmt.Errorf("round %d: %w", n, err)
		}
		samples = append(samples, s)
		longest = max(longest, time.Since(begin))
		e.logf("%s", strings.Join(row(s), "  "))
	}
	return samples, nil
}

// round runs one round and takes its sample.
func (e *env) round(ctx context.Context, n int) (*sample, error) {
	s := &sample{round: n, failed: n%failEvery == failEvery-1}
	e.now = n
	begin := time.Now()
	if err := e.load(ctx, n, s.failed); err != nil {
		return nil, err
	}
	s.load = time.Since(begin)
	if err := e.settle(ctx, n); err != nil {
		return nil, err
	}
	s.idle = time.Since(begin) - s.load
	return s, e.sample(ctx, s)
}

// start starts replica i, and waits until it serves.
func (e *env) start(ctx context.Context, i int) error {
	e.starts++
	p := &replica{name: fmt.Sprintf("r%d.%d", i, e.starts), born: e.now}
	dir := filepath.Join(e.root, p.name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var err error
	if p.server, err = bench.StartSnapshotd(
		ctx,
		e.snapshotd,
		dir,
		e.etcdAt,
		bench.EtcdRoot,
		bench.OnS3(e.s3At)+fmt.Sprintf(settings, p.name),
	); err != nil {
		return err
	}
	if p.client, err = client.Dial(p.server.Listen, client.Options{}); err != nil {
		p.server.Stop()
		return err
	}
	if old := e.replicas[i].Swap(p); old != nil {
		_ = old.client.Close()
	}
	return p.server.WaitServing(ctx)
}

// failOver kills and restarts the leader. The first replica lives as long as the
// run: as leader it is frozen until another replica leads.
func (e *env) failOver(ctx context.Context) error {
	leader, err := e.leader(ctx, "")
	if err != nil {
		return err
	}
	first := e.replicas[0].Load()
	if first.name == leader {
		if err := syscall.Kill(first.server.Pid(), syscall.SIGSTOP); err != nil {
			return err
		}
		_, err = e.leader(ctx, leader)
		return errors.Join(err, syscall.Kill(first.server.Pid(), syscall.SIGCONT))
	}
	for i := range e.replicas {
		if p := e.replicas[i].Load(); p.name == leader {
			p.server.Kill()
			p.server.Stop() // waits for its end
			return e.start(ctx, i)
		}
	}
	return fmt.Errorf("the leader %s is not one of the replicas", leader)
}

// stopAll stops the replicas and returns an error for each that has died before.
func (e *env) stopAll() error {
	var errs []error
	for i := range e.replicas {
		p := e.replicas[i].Load()
		if p == nil {
			continue
		}
		if syscall.Kill(p.server.Pid(), 0) != nil {
			errs = append(errs, p.server.ExitError())
		}
		_ = p.client.Close()
		p.server.Stop()
	}
	return errors.Join(errs...)
}
