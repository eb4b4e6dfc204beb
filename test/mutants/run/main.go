// Run puts each mutant of test/mutants into a copy of the tree and requires that
// a test finds it:
//
//	run [-only grant] [-for 15m]
//
// All tests of the chosen mutants must pass on the tree as it is. The tests of a
// mutant run in their order until one fails. A patch that does not apply, a build
// that fails, a pattern without tests, and tests that do not end are errors. It
// exits with 1 when no test finds a mutant or the time is over.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/test/mutants"
	"github.com/snapshotd/snapshotd/test/mutants/gotest"
)

func main() {
	only := flag.String("only", "", "run the mutants whose names begin with this")
	within := flag.Duration("for", 15*time.Minute, "time limit of the whole run")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout, ".", *only, *within)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

// run tests the mutants whose names begin with only, in a copy of the tree at root,
// and prints to out which test found each.
func run(ctx context.Context, out io.Writer, root, only string, within time.Duration) error {
	ctx, cancel := context.WithTimeoutCause(ctx, within, fmt.Errorf("not finished within %v", within))
	defer cancel()
	var chosen []mutants.Mutant
	for _, m := range mutants.All() {
		if strings.HasPrefix(m.Name, only) {
			chosen = append(chosen, m)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("no mutant is called %q", only)
	}
	tree, err := os.MkdirTemp("", "snapshotd-mutants-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(tree) }()
	if err := copyTree(tree, root); err != nil {
		return fmt.Errorf("copy the tree: %w", err)
	}
	began := time.Now()
	if err := sound(ctx, tree, chosen); err != nil {
		return orCause(ctx, err)
	}
	fmt.Fprintf(out, "all tests pass without a mutant: %.0f s\n", time.Since(began).Seconds())
	fmt.Fprintf(out, "%-34s %-8s %-56s %s\n", "mutant", "fixed in", "found by", "seconds")
	var missed []string
	for _, m := range chosen {
		began := time.Now()
		by, why, err := find(ctx, tree, m)
		if err != nil {
			return fmt.Errorf("%s: %w", m.Name, orCause(ctx, err))
		}
		if by == "" {
			missed = append(missed, m.Name)
			by = "NOT FOUND"
		}
		fixed := m.Fixed
		if fixed == "" {
			fixed = "planted"
		}
		fmt.Fprintf(out, "%-34s %-8s %-56s %.0f\n%s", m.Name, fixed, by, time.Since(began).Seconds(), why)
	}
	fmt.Fprintf(
		out,
		"%d of %d mutants found in %.0f s\n",
		len(chosen)-len(missed),
		len(chosen),
		time.Since(began).Seconds(),
	)
	if len(missed) > 0 {
		return fmt.Errorf("no test finds %s", strings.Join(missed, ", "))
	}
	return nil
}

// orCause returns the cause of ctx's end if ctx has ended, and err otherwise.
func orCause(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// suite is one run of go test.
type suite struct {
	pkg    string
	server bool
}

func spec(tree string, s suite, run string) gotest.Spec {
	spec := gotest.Spec{Dir: tree, Package: s.pkg, Run: run, Timeout: 2 * time.Minute}
	if !s.server {
		spec.Tags = []string{"short"}
	}
	return spec
}

// sound runs the first tests of each mutant on the tree as it is.
func sound(ctx context.Context, tree string, chosen []mutants.Mutant) error {
	runs := map[suite][]string{}
	for _, m := range chosen {
		first := m.Tests[0]
		s := suite{first.Package, first.Server}
		runs[s] = append(runs[s], first.Run)
	}
	for s, patterns := range runs {
		if err := passes(ctx, spec(tree, s, strings.Join(patterns, "|"))); err != nil {
			return err
		}
	}
	return nil
}

// passes returns an error unless all tests of s pass.
func passes(ctx context.Context, s gotest.Spec) error {
	r, err := gotest.Run(ctx, s)
	switch {
	case err != nil:
		return err
	case r.Broken != "" || r.TimedOut || len(r.Failed) > 0:
		// The names come last, where the end of a log shows them.
		return fmt.Errorf("%s\ntests of %s fail without a mutant: %v %s", r.Output, s.Package, r.Failed, r.Broken)
	}
	return nil
}

// find applies the patch of m, runs its tests and reverts the patch. It returns
// the test that failed, or why none did.
func find(ctx context.Context, tree string, m mutants.Mutant) (by, why string, err error) {
	patch, err := m.Patch()
	if err != nil {
		return "", "", err
	}
	for i, tests := range m.Tests {
		s := spec(tree, suite{tests.Package, tests.Server}, tests.Run)
		r, err := runPatched(ctx, tree, patch, s)
		switch {
		case err != nil:
			return "", "", err
		case r.Broken != "":
			return "", "", fmt.Errorf("with the mutant, %s: %s\n%s", s.Package, r.Broken, r.Output)
		case r.TimedOut:
			return "", "", fmt.Errorf("with the mutant, %s of %s does not end", s.Run, s.Package)
		case len(r.Failed) > 0:
			if i > 0 {
				if err := passes(ctx, s); err != nil {
					return "", "", err
				}
			}
			by := strings.TrimPrefix(s.Package, "./internal/") + " " + r.Failed[0]
			if n := len(r.Failed) - 1; n > 0 {
				by += fmt.Sprintf(" +%d", n)
			}
			return by, "", nil
		}
		why += fmt.Sprintf("  %s of %s passes\n", s.Run, s.Package)
	}
	return "", why, nil
}

// runPatched runs tests in the tree with the patch.
func runPatched(ctx context.Context, tree string, patch []byte, s gotest.Spec) (r gotest.Result, err error) {
	if err := apply(ctx, tree, patch); err != nil {
		return gotest.Result{}, err
	}
	defer func() { err = errors.Join(err, apply(context.WithoutCancel(ctx), tree, patch, "--reverse")) }()
	return gotest.Run(ctx, s)
}

// apply applies a patch to the tree.
func apply(ctx context.Context, tree string, patch []byte, more ...string) error {
	cmd := exec.CommandContext(ctx, "git", append([]string{"apply"}, append(more, "-")...)...)
	cmd.Dir, cmd.Stdin = tree, bytes.NewReader(patch)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("git apply: %w: %s", err, out)
	}
	return nil
}

// copyTree copies the files of the tree at root without those of git and of builds.
// The folder of built tools, which are large, becomes a symbolic link.
func copyTree(to, root string) error {
	tools, err := filepath.Abs(filepath.Join(root, ".bin"))
	if err != nil {
		return err
	}
	if err := os.Symlink(tools, filepath.Join(to, ".bin")); err != nil {
		return err
	}
	return filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		switch name {
		case ".git", ".bin", "bin", "snapshotd-data":
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		target := filepath.Join(to, name)
		switch {
		case d.IsDir():
			return os.MkdirAll(target, 0o755)
		case !d.Type().IsRegular():
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(target, data, 0o644)
	})
}
