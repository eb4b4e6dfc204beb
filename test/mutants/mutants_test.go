package mutants_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/test/mutants"
)

const root = "../.."

// TestPatchesApply checks that each patch applies to the tree, and that each patch
// belongs to a mutant.
func TestPatchesApply(t *testing.T) {
	names := map[string]bool{}
	for _, m := range mutants.All() {
		if names[m.Name+".patch"] {
			t.Errorf("two mutants are called %s", m.Name)
		}
		names[m.Name+".patch"] = true
		patch, err := m.Patch()
		if err != nil {
			t.Errorf("%s: %v", m.Name, err)
			continue
		}
		cmd := exec.Command("git", "apply", "--check", "-")
		cmd.Dir, cmd.Stdin = root, bytes.NewReader(patch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s does not apply, make a new patch: %v\n%s", m.Name, err, out)
		}
	}
	entries, err := os.ReadDir("patches")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !names[e.Name()] {
			t.Errorf("patches/%s belongs to no mutant", e.Name())
		}
	}
}

var (
	testFunc = regexp.MustCompile(`(?m)^func (Test\w+)\(t \*testing\.T\) \{`)
	commit   = regexp.MustCompile(`^[0-9a-f]{7,40}$`)
)

// TestTestsExist checks that each pattern matches a test of its package.
func TestTestsExist(t *testing.T) {
	for _, m := range mutants.All() {
		if m.Fixed != "" && !commit.MatchString(m.Fixed) || m.Breaks == "" || len(m.Tests) == 0 {
			t.Errorf("%s lacks its consequence, its tests, or a valid commit", m.Name)
		}
		for _, tests := range m.Tests {
			files, err := filepath.Glob(filepath.Join(root, tests.Package, "*_test.go"))
			if err != nil {
				t.Fatal(err)
			}
			pattern, _, _ := strings.Cut(tests.Run, "/")
			run, err := regexp.Compile(pattern)
			if err != nil {
				t.Errorf("%s: %v", m.Name, err)
				continue
			}
			found := false
			for _, file := range files {
				data, err := os.ReadFile(file)
				if err != nil {
					t.Fatal(err)
				}
				for _, match := range testFunc.FindAllSubmatch(data, -1) {
					found = found || run.Match(match[1])
				}
			}
			if !found {
				t.Errorf("%s: %s has no test that matches %s", m.Name, tests.Package, tests.Run)
			}
		}
	}
}
