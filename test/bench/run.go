//go:build linux

package bench

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"time"
)

// The exit codes, besides those of a strict run.
const (
	exitError = 1
	exitUsage = 2
)

// MaxSpread is the spread of a floor above which a run does not judge times that
// were missed, and MinRounds how many rounds it takes to know the spread.
const (
	MaxSpread = 0.10
	MinRounds = 5
)

// errUsage means that a program was called wrongly, which it has said.
var errUsage = errors.New("usage")

// Main is the main function of a benchmark of that name, and ends the process.
// Child is what the program is when it has started itself, and says whether that
// is so; else run is called.
func Main(
	name string,
	child func(ctx context.Context, args []string) (is bool, err error),
	run func(ctx context.Context, args []string) (code int, err error),
) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	is, err := child(ctx, os.Args[1:])
	code := 0
	if !is {
		code, err = run(ctx, os.Args[1:])
	}
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
		code = 0
	case errors.Is(err, errUsage):
		code = exitUsage
	case err != nil:
		fmt.Fprintf(os.Stderr, "%s: %v\n", name, err)
		code = exitError
	}
	os.Exit(code)
}

// Options are the options of every benchmark.
type Options struct {
	Rounds    int
	Bound     time.Duration
	Strict    bool
	Snapshotd string
	Etcd      string // test/bench/etcd
	Dir       string
	Output    string
}

// Flags adds the options to fs. What they hold is their defaults, where these
// differ.
func (o *Options) Flags(fs *flag.FlagSet) {
	fs.IntVar(&o.Rounds, "rounds", 5, "rounds that count; one more is made before them")
	fs.DurationVar(&o.Bound, "bound", o.Bound, "the longest that the run may take")
	fs.BoolVar(&o.Strict, "strict", false, "exit with 1 when a bar is missed, with 3 when one cannot be judged")
	fs.StringVar(&o.Snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.Etcd, "etcd", ".bin/bench-etcd", "test/bench/etcd")
	fs.StringVar(&o.Dir, "dir", os.TempDir(), "where to make the directory of the run")
	fs.StringVar(&o.Output, "o", "", "Markdown file to write the report into")
}

// Parse reads args, and says what is wrong with them, to which check adds.
func Parse(fs *flag.FlagSet, args []string, check func() error) error {
	err := fs.Parse(args) // says so itself
	if errors.Is(err, flag.ErrHelp) {
		return err
	}
	if err == nil {
		if err = check(); err == nil {
			return nil
		}
		fmt.Fprintln(fs.Output(), err)
	}
	return fmt.Errorf("%w: %w", errUsage, err)
}

// Parts are those of a benchmark that are wanted, of an S3 server.
type Parts struct {
	S3   string // versitygw
	Only string

	all []string
}

// Flags adds the options to fs; all are the names of the parts, in their order.
func (p *Parts) Flags(fs *flag.FlagSet, all ...string) {
	p.all = all
	fs.StringVar(&p.S3, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&p.Only, "only", strings.Join(all, ","), "what to measure")
}

// Check says which part there is not.
func (p *Parts) Check() error {
	for part := range strings.SplitSeq(p.Only, ",") {
		if !strings.Contains(","+strings.Join(p.all, ",")+",", ","+part+",") {
			return fmt.Errorf("-only: %q is not one of %s", part, strings.Join(p.all, ", "))
		}
	}
	return nil
}

// Wants says whether a part is wanted.
func (p *Parts) Wants(part string) bool { return strings.Contains(","+p.Only+",", ","+part+",") }

// Part is a part, and what measures it.
type Part struct {
	Name string
	Run  func(context.Context) error
}

// Make makes those of list that are wanted.
func (p *Parts) Make(ctx context.Context, list ...Part) error {
	for _, part := range list {
		if !p.Wants(part.Name) {
			continue
		}
		if err := part.Run(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.Name, err)
		}
	}
	return nil
}

// Run is one run of a benchmark.
type Run struct {
	Report *Report
	Root   string  // a directory that is removed afterwards
	Before float64 // load average

	log   io.Writer
	began time.Time
	names int
}

// Measure calls measure, for no longer than the bound, and writes the report of
// the benchmark of that name. Medians says what its figures are.
func Measure(
	ctx context.Context,
	o *Options,
	name, medians string,
	measure func(context.Context, *Run) error,
) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.Bound, fmt.Errorf("the run took longer than %v", o.Bound))
	defer cancel()
	r := &Run{Report: &Report{Name: name}, Before: Load(), log: os.Stderr, began: time.Now()}
	if r.Root, err = os.MkdirTemp(o.Dir, name+"-"); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(r.Root)) }()
	commit := Commit()
	if err := measure(ctx, r); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		return 0, err
	}
	r.Report.Facts = []string{
		fmt.Sprintf("Commit %s, %s, %s.", commit, Today(), Machine()),
		fmt.Sprintf(
			"Load average %.2f before and %.2f after; the run took %v.",
			r.Before,
			Load(),
			r.Since().Round(time.Second),
		),
		medians,
	}
	return r.Report.Finish(os.Stdout, o.Output, o.Strict)
}

// Since is how long the run has lasted.
func (r *Run) Since() time.Duration { return time.Since(r.began) }

// Say prints the progress of the run.
func (r *Run) Say(format string, args ...any) {
	fmt.Fprintf(r.log, "%6.1fs  %s\n", r.Since().Seconds(), fmt.Sprintf(format, args...))
}

// Name returns a name that is not taken.
func (r *Run) Name() string {
	r.names++
	return fmt.Sprintf("b%d", r.names)
}

// Noise says why a time that was missed cannot be judged, empty: it can. Floors
// are the rounds of what it is measured against, of which least are needed.
func (r *Run) Noise(floors []float64, rounds, least int) string {
	switch spread := Spread(floors); {
	case rounds < least:
		return fmt.Sprintf("fewer than %d rounds", least)
	case r.Before > float64(runtime.NumCPU()):
		return fmt.Sprintf("the load average was %.2f before the run", r.Before)
	case spread > MaxSpread:
		return fmt.Sprintf("floor spread %.0f %%", spread*100)
	}
	return ""
}
