// Package gotest runs tests of this repository from a program and reports which
// of them failed. Only a test that fails finds a mutant: a build that fails and a
// test that does not end do not.
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
}

// Result is the result of the tests. The first of Failed, TimedOut, Broken and
// Passed that is set decides.
type Result struct {
	Failed   []string // tests of the top level that failed, sorted
	TimedOut bool     // a test had not ended in time
	Broken   string   // why no test ran, such as a build that failed; empty: tests ran
	Passed   int      // tests of the top level that passed
	Output   string   // the end of the output of go test and of the tests that did not pass
	Took     time.Duration
}

// maxOutput bounds Result.Output, in bytes.
const maxOutput = 16 << 10

// Run runs tests to their end. It fails when go test cannot run or ctx ends.
func Run(ctx context.Context, s Spec) (Result, error) {
	args := []string{"test", "-json", "-vet=off", "-count=1", "-run", s.Run, "-timeout", s.Timeout.String()}
	if len(s.Tags) > 0 {
		args = append(args, "-tags", strings.Join(s.Tags, ","))
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

// Read parses the output of go test -json, which may have lines that are no events.
// ok is whether go test exited with 0. The error is that of in.
func Read(in io.Reader, ok bool) (Result, error) {
	var r Result
	var output strings.Builder
	running := map[string]*strings.Builder{} // their output, by test of the top level
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil || e.Action == "" {
			fmt.Fprintln(&output, lines.Text())
			continue
		}
		name, _, part := strings.Cut(e.Test, "/")
		if of := running[name]; of != nil {
			of.WriteString(e.Output)
		} else {
			output.WriteString(e.Output)
		}
		switch {
		case strings.HasPrefix(e.Output, "panic: test timed out after"):
			r.TimedOut = true
		case e.FailedBuild != "" || e.Action == "build-fail":
			r.Broken = "the build failed"
		case name == "" || part:
		case e.Action == "run":
			running[name] = &strings.Builder{}
		case e.Action == "fail":
			if of := running[name]; of != nil {
				output.WriteString(of.String())
			}
			delete(running, name)
			r.Failed = append(r.Failed, name)
		case e.Action == "pass":
			delete(running, name)
			r.Passed++
		case e.Action == "skip":
			delete(running, name)
		}
	}
	if !ok {
		for name, of := range running { // a panic ended them
			output.WriteString(of.String())
			r.Failed = append(r.Failed, name)
		}
	}
	if r.Output = output.String(); len(r.Output) > maxOutput {
		r.Output = "…" + r.Output[len(r.Output)-maxOutput:]
	}
	switch {
	case r.Broken != "" || r.TimedOut:
		r.Failed = nil
	case ok && r.Passed == 0:
		r.Broken = "no test matches"
	case !ok && len(r.Failed) == 0:
		r.Broken = "go test failed without a failed test"
	}
	slices.Sort(r.Failed)
	r.Failed = slices.Compact(r.Failed)
	return r, lines.Err()
}
