// Package gotest runs tests of this repository from a program, and says which of
// them failed: that a bug is there is seen by a test that fails, and by nothing
// else. What does not build, and a test that does not end, has seen nothing.
package gotest

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"time"
)

// Spec says which tests are run.
type Spec struct {
	Dir     string   // of the module
	Package string   // such as ./internal/gc
	Run     string   // as go test's -run
	Tags    []string // of the build
	// Timeout bounds the tests, not the build; whole seconds.
	Timeout time.Duration
	// Cached says that a result of the same tests, of the same code, will do.
	Cached bool
}

// Result is what became of the tests. Exactly one of Failed, TimedOut, Broken and
// Passed tells: the first that says something.
type Result struct {
	Failed   []string // tests of the top level that failed, sorted
	TimedOut bool     // a test had not ended in time
	Broken   string   // why there was no test that could fail: it did not build; empty: there was
	Passed   int      // tests of the top level that passed
	Output   string   // the last of what go test and the tests said
	Took     time.Duration
}

// maxOutput bounds Result.Output, in bytes.
const maxOutput = 16 << 10

// Run runs tests to their end. An error is that go test could not be run, or was
// ended by ctx; whatever the tests do is a Result.
func Run(ctx context.Context, s Spec) (Result, error) {
	args := []string{"test", "-json", "-vet=off", "-run", s.Run, "-timeout", s.Timeout.String()}
	if len(s.Tags) > 0 {
		args = append(args, "-tags", strings.Join(s.Tags, ","))
	}
	if !s.Cached {
		args = append(args, "-count=1")
	}
	cmd := exec.CommandContext(ctx, "go", append(args, s.Package)...)
	cmd.Dir = s.Dir
	var out, complaints bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaints
	cmd.WaitDelay = 5 * time.Second
	began := time.Now()
	err := cmd.Run()
	if ctx.Err() != nil {
		return Result{}, fmt.Errorf("go %s: %w", strings.Join(args, " "), ctx.Err())
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return Result{}, fmt.Errorf("run go test: %w", err)
	}
	r, readErr := Read(io.MultiReader(&out, &complaints), err == nil)
	r.Took = time.Since(began)
	return r, readErr
}

// event is one line of go test -json.
type event struct {
	Action      string
	Package     string
	Test        string
	Output      string
	FailedBuild string
}

// Read makes a Result of what go test -json wrote, lines that are no events
// included. ok is whether it ended well. The error is in's.
func Read(in io.Reader, ok bool) (Result, error) {
	var r Result
	var output strings.Builder
	running := map[string]bool{}
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(&output, lines.Text())
			continue
		}
		output.WriteString(e.Output)
		name, _, part := strings.Cut(e.Test, "/")
		switch {
		case strings.HasPrefix(e.Output, "panic: test timed out after"):
			r.TimedOut = true
		case e.FailedBuild != "" || e.Action == "build-fail":
			r.Broken = "it does not build"
		case name == "" || part:
		case e.Action == "run":
			running[name] = true
		case e.Action == "fail":
			delete(running, name)
			r.Failed = append(r.Failed, name)
		case e.Action == "pass":
			delete(running, name)
			r.Passed++
		case e.Action == "skip":
			delete(running, name)
		}
	}
	if r.Output = output.String(); len(r.Output) > maxOutput {
		r.Output = "…" + r.Output[len(r.Output)-maxOutput:]
	}
	if !ok {
		for name := range running { // that a panic has ended
			r.Failed = append(r.Failed, name)
		}
	}
	switch {
	case r.Broken != "" || r.TimedOut:
		r.Failed = nil
	case ok && r.Passed == 0:
		r.Broken = "no test is of that name"
	case !ok && len(r.Failed) == 0:
		r.Broken = "it failed without a test that did"
	}
	slices.Sort(r.Failed)
	r.Failed = slices.Compact(r.Failed)
	return r, lines.Err()
}
