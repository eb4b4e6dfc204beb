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

// The exit codes of errors.
const (
	exitError = 1
	exitUsage = 2
)

// MaxSpread is the maximum spread of a floor, and MinRounds the minimum number of
// rounds, for a missed time to count as missed. Otherwise it is inconclusive.
const (
	MaxSpread = 0.10
	MinRounds = 5
)

// errUsage means invalid arguments, which the program has reported.
var errUsage = errors.New("usage")

// Main is the main function of the benchmark name. It ends the process. Child runs
// the program as a child of itself and returns false for other arguments; then
// Main calls run.
func Main(
	name string,
	child func(ctx context.Context, args []string) (isChild bool, err error),
	run func(ctx context.Context, args []string) (code int, err error),
) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	isChild, err := child(ctx, os.Args[1:])
	code := 0
	if !isChild {
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

// Options are the common options of all benchmarks.
type Options struct {
	Rounds    int
	Bound     time.Duration
	Strict    bool
	Snapshotd string
	Etcd      string // test/bench/etcd
	Dir       string
	Output    string
}

// Flags adds the options to fs. The default of -bound is o.Bound.
func (o *Options) Flags(fs *flag.FlagSet) {
	fs.IntVar(&o.Rounds, "rounds", 5, "rounds that count; one more runs before them")
	fs.DurationVar(&o.Bound, "bound", o.Bound, "maximum duration of the run")
	fs.BoolVar(&o.Strict, "strict", false, "exit with 1 for a missed bar, with 3 for an inconclusive one")
	fs.StringVar(&o.Snapshotd, "snapshotd", "bin/snapshotd", "the program to measure")
	fs.StringVar(&o.Etcd, "etcd", ".bin/bench-etcd", "test/bench/etcd")
	fs.StringVar(&o.Dir, "dir", os.TempDir(), "parent of the run's directory")
	fs.StringVar(&o.Output, "o", "", "Markdown file for the report")
}

// Parse parses args, calls check, and reports an error of either.
func Parse(fs *flag.FlagSet, args []string, check func() error) error {
	err := fs.Parse(args) // reports its error
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

// Parts are the parts of a benchmark with an S3 server, and their selection.
type Parts struct {
	S3   string // versitygw
	Only string

	all []string
}

// Flags adds the options to fs; all are the names of the parts, in their order.
func (p *Parts) Flags(fs *flag.FlagSet, all ...string) {
	p.all = all
	fs.StringVar(&p.S3, "s3", ".bin/versitygw", "versitygw")
	fs.StringVar(&p.Only, "only", strings.Join(all, ","), "parts to measure")
}

// Check returns an error for an unknown part.
func (p *Parts) Check() error {
	for part := range strings.SplitSeq(p.Only, ",") {
		if !strings.Contains(","+strings.Join(p.all, ",")+",", ","+part+",") {
			return fmt.Errorf("-only: %q is not one of %s", part, strings.Join(p.all, ", "))
		}
	}
	return nil
}

// Selected reports whether a part is selected.
func (p *Parts) Selected(part string) bool { return strings.Contains(","+p.Only+",", ","+part+",") }

// Part is a part with its measurement.
type Part struct {
	Name string
	Run  func(context.Context) error
}

// RunParts runs the selected parts of list.
func (p *Parts) RunParts(ctx context.Context, list ...Part) error {
	for _, part := range list {
		if !p.Selected(part.Name) {
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
	Root   string  // a directory that is removed at the end
	Before float64 // load average at the start

	log   io.Writer
	began time.Time
	names int
}

// Measure calls measure, for at most o.Bound, and writes the report of the
// benchmark name. Medians is the sentence that explains its figures.
func Measure(
	ctx context.Context,
	o *Options,
	name, medians string,
	measure func(context.Context, *Run) error,
) (code int, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, o.Bound, fmt.Errorf("the run exceeded %v", o.Bound))
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

// Since returns the time since the start of the run.
func (r *Run) Since() time.Duration { return time.Since(r.began) }

// Logf prints the progress of the run.
func (r *Run) Logf(format string, args ...any) {
	fmt.Fprintf(r.log, "%6.1fs  %s\n", r.Since().Seconds(), fmt.Sprintf(format, args...))
}

// Name returns an unused name.
func (r *Run) Name() string {
	r.names++
	return fmt.Sprintf("b%d", r.names)
}

// Noise returns the reason why a missed time is inconclusive, or an empty string.
// Floors are the rounds of the comparison, of which minRounds are required.
func (r *Run) Noise(floors []float64, rounds, minRounds int) string {
	switch spread := Spread(floors); {
	case rounds < minRounds:
		return fmt.Sprintf("fewer than %d rounds", minRounds)
	case r.Before > float64(runtime.NumCPU()):
		return fmt.Sprintf("the load average was %.2f before the run", r.Before)
	case spread > MaxSpread:
		return fmt.Sprintf("floor spread %.0f %%", spread*100)
	}
	return ""
}
