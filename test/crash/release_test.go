//go:build linux && !short

package main

import (
	"bytes"
	"debug/buildinfo"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/crashpoint"
)

var newPoint = regexp.MustCompile(`crashpoint\.New\("([^"]*)"\)`)

// namesInSource returns the names of all points that programs may have.
func namesInSource(t *testing.T) (names []string) {
	t.Helper()
	err := filepath.WalkDir("../..", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != ".." {
			return errorOrSkip(err)
		}
		if !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") || strings.Contains(name, "internal/crashpoint/") {
			return nil
		}
		text, err := os.ReadFile(name)
		for _, found := range newPoint.FindAllSubmatch(text, -1) {
			names = append(names, string(found[1]))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func errorOrSkip(err error) error {
	if err != nil {
		return err
	}
	return fs.SkipDir
}

// TestReleaseHoldsNoPoint builds the programs as `make build` does, and looks for
// what crash points would leave in them.
func TestReleaseHoldsNoPoint(t *testing.T) {
	if crashpoint.Enabled {
		t.Fatal("the tests are built with crash points")
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	const recipe = "\tCGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/ ./cmd/...\n"
	if !strings.Contains(string(makefile), recipe) {
		t.Fatalf("make build does not run what is tested here: %s", recipe)
	}
	names := namesInSource(t)
	if len(names) < 50 {
		t.Fatalf("found only %d points in the source: %v", len(names), names)
	}
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=test", "-o", dir+"/", "./cmd/...")
	build.Dir, build.Env = "../..", append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, program := range []string{"snapshotd", "snapshotctl"} {
		path := filepath.Join(dir, program)
		info, err := buildinfo.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range info.Settings {
			if s.Key == "-tags" && strings.Contains(s.Value, "crashpoints") {
				t.Errorf("%s is built with tags %s", program, s.Value)
			}
		}
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range append(names, "SNAPSHOTD_CRASH", "crash point ") {
			if at := bytes.Index(content, []byte(text)); at >= 0 {
				t.Errorf("%s holds %q: …%q…", program, text, content[max(0, at-20):at+40])
			}
		}
	}
}

// TestEveryPointHasAScenario is what a run begins with as well.
func TestEveryPointHasAScenario(t *testing.T) {
	every := regexp.MustCompile("")
	all, err := planned(namesInSource(t), every, false, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range namesInSource(t) {
		for _, side := range []string{before, after} {
			if !slices.ContainsFunc(all, func(c oneCase) bool { return c.store == onBucket && c.crash == crash{point, side, 1} }) {
				t.Errorf("there is no case %s %s", side, point)
			}
		}
	}
	quick, err := planned(namesInSource(t), every, true, 1)
	if err != nil || len(quick) == 0 || len(quick) > 20 {
		t.Errorf("a quick run has %d cases, %v", len(quick), err)
	}
	again, _ := planned(namesInSource(t), every, true, 1)
	if !slices.Equal(quick, again) {
		t.Errorf("the same seed chose %v and then %v", quick, again)
	}
	if _, err := planned(append(namesInSource(t), "new.point"), every, false, 1); err == nil {
		t.Error("a point without a scenario was not noticed")
	}
	if _, err := planned(namesInSource(t)[1:], every, false, 1); err == nil {
		t.Error("a scenario of a point that there is not was not noticed")
	}
}

func TestParseCase(t *testing.T) {
	all, err := planned(namesInSource(t), regexp.MustCompile(""), false, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range all {
		for _, then := range []crash{{}, {"elect.claim", after, 1}} {
			c.then = then
			if got, err := parseCase(c.String()); err != nil || got != c {
				t.Errorf("parseCase(%q) = %v, %v", c, got, err)
			}
		}
	}
	for _, text := range []string{"", "bucket create", "disk create create.begin:before:1", "bucket none create.begin:before:1", "bucket create create.begin", "bucket create create.begin:before:x"} {
		if got, err := parseCase(text); err == nil {
			t.Errorf("parseCase(%q) = %v", text, got)
		}
	}
}
