package bugs_test

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/bugs"
)

const root = "../.."

// TestPatchesApply holds that each fix can still be undone as stored.
func TestPatchesApply(t *testing.T) {
	names := map[string]bool{}
	for _, b := range bugs.All {
		names[b.Name+".patch"] = true
		patch, err := b.Patch()
		if err != nil {
			t.Errorf("%s: %v", b.Name, err)
			continue
		}
		cmd := exec.Command("git", "apply", "--check", "-")
		cmd.Dir, cmd.Stdin = root, bytes.NewReader(patch)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s does not apply any more, make it anew: %v\n%s", b.Name, err, out)
		}
	}
	entries, err := os.ReadDir("patches")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !names[e.Name()] {
			t.Errorf("patches/%s is of no bug", e.Name())
		}
	}
}

// TestTestsExist holds that the tests of the list are there under those names.
func TestTestsExist(t *testing.T) {
	for _, b := range bugs.All {
		files, err := filepath.Glob(filepath.Join(root, b.Package, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, file := range files {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			found = found || strings.Contains(string(data), "\nfunc "+b.Test+"(t *testing.T) {")
		}
		if !found {
			t.Errorf("%s: %s has no %s", b.Name, b.Package, b.Test)
		}
		if !regexp.MustCompile(`^[0-9a-f]{7,40}$`).MatchString(b.Fixed) || b.What == "" {
			t.Errorf("%s does not say what it was, or who fixed it", b.Name)
		}
	}
}
