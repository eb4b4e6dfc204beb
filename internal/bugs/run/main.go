// Run undoes the fixes of internal/bugs, one after another and each in a copy of
// the tree, and demands that the test of each fails then:
//
//	run [-only counted] [-for 10m]
//
// Before, all of those tests must pass as the tree is. A patch that does not apply, what
// does not build then and a test that does not end are errors. It exits with 1 when
// a bug came back unseen.
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

	"github.com/snapshotd/snapshotd/internal/bugs"
	"github.com/snapshotd/snapshotd/internal/planted/gotest"
)

func main() {
	only := flag.String("only", "", "the bugs whose names begin with this")
	within := flag.Duration("for", 10*time.Minute, "time for all of it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	err := run(ctx, os.Stdout, ".", *only, *within)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bugs:", err)
		os.Exit(1)
	}
}

// run brings back the bugs whose names begin with only, in copies of the tree at
// root, and says on out what saw each.
func run(ctx context.Context, out io.Writer, root, only string, within time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	scratch, err := os.MkdirTemp("", "snapshotd-bugs-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(scratch) }()
	if err := copyTree(scratch, root); err != nil {
		return fmt.Errorf("copy the tree: %w", err)
	}
	began := time.Now()
	var chosen []bugs.Bug
	for _, b := range bugs.All {
		if strings.HasPrefix(b.Name, only) {
			chosen = append(chosen, b)
		}
	}
	if len(chosen) == 0 {
		return fmt.Errorf("there is no bug %q", only)
	}
	if err := sound(ctx, scratch, chosen); err != nil {
		return err
	}
	fmt.Fprintf(out, "as the tree is all tests pass: %.0f s\n", time.Since(began).Seconds())
	var missed []string
	fmt.Fprintf(out, "%-32s %-8s %-48s %s\n", "bug", "fixed in", "the test that sees it", "seconds")
	for _, b := range chosen {
		why, took, err := bringBack(ctx, scratch, b)
		switch {
		case err != nil:
			return fmt.Errorf("%s: %w", b.Name, err)
		case why != "":
			missed = append(missed, b.Name)
			fmt.Fprintf(out, "%-32s %-8s %-48s %.0f\n%s\n", b.Name, b.Fixed, "NOT SEEN by "+b.Test, took.Seconds(), why)
		default:
			fmt.Fprintf(out, "%-32s %-8s %-48s %.0f\n", b.Name, b.Fixed, strings.TrimPrefix(b.Package, "./internal/")+" "+b.Test, took.Seconds())
		}
	}
	fmt.Fprintf(out, "%d of %d bugs seen in %.0f s\n", len(chosen)-len(missed), len(chosen), time.Since(began).Seconds())
	if len(missed) > 0 {
		return fmt.Errorf("no test sees %s", strings.Join(missed, ", "))
	}
	return nil
}

// testsOf says how the tests of bugs of one package are run.
func testsOf(tree string, list ...bugs.Bug) gotest.Spec {
	names := make([]string, len(list))
	for i, b := range list {
		names[i] = b.Test
	}
	s := gotest.Spec{Dir: tree, Package: list[0].Package, Run: "^(" + strings.Join(names, "|") + ")$", Timeout: 2 * time.Minute}
	if !list[0].Server {
		s.Tags = []string{"short"}
	}
	return s
}

// sound runs the tests of bugs as the tree is: all of them must pass.
func sound(ctx context.Context, tree string, chosen []bugs.Bug) error {
	type suite struct {
		pkg    string
		server bool
	}
	of := map[suite][]bugs.Bug{}
	for _, b := range chosen {
		s := suite{b.Package, b.Server}
		of[s] = append(of[s], b)
	}
	for s, list := range of {
		r, err := gotest.Run(ctx, testsOf(tree, list...))
		switch {
		case err != nil:
			return err
		case r.Passed != len(list) || len(r.Failed) > 0 || r.TimedOut:
			return fmt.Errorf("as the tree is, not all tests of %s pass: %v %s\n%s", s.pkg, r.Failed, r.Broken, r.Output)
		}
	}
	return nil
}

// bringBack undoes a fix, runs its test and puts the fix back. It returns why the
// bug was not seen, if it was not.
func bringBack(ctx context.Context, tree string, b bugs.Bug) (why string, took time.Duration, err error) {
	began := time.Now()
	patch, err := b.Patch()
	if err != nil {
		return "", 0, err
	}
	if err := apply(ctx, tree, patch); err != nil {
		return "", 0, err
	}
	defer func() { err = errors.Join(err, apply(context.WithoutCancel(ctx), tree, patch, "--reverse")) }()
	r, err := gotest.Run(ctx, testsOf(tree, b))
	if err != nil {
		return "", 0, err
	}
	switch {
	case r.Broken != "":
		return "", 0, fmt.Errorf("without the fix: %s\n%s", r.Broken, r.Output)
	case r.TimedOut:
		return "", 0, fmt.Errorf("without the fix %s does not end", b.Test)
	case len(r.Failed) == 0:
		why = b.Test + " passes without the fix"
	}
	return why, time.Since(began), nil
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

// copyTree copies the files of the tree at root, but what git and builds keep
// there. The tools, which are large, are linked to.
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
