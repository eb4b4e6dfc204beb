package planted_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/planted"
)

// all are the switches there are.
var all = map[string]bool{
	"P1": planted.P1, "P2": planted.P2, "P3": planted.P3, "P4": planted.P4, "P5": planted.P5, "P6": planted.P6,
	"P7A": planted.P7A, "P7B": planted.P7B, "P8": planted.P8, "P9": planted.P9, "P10": planted.P10, "P11": planted.P11,
	"P12A": planted.P12A, "P12B": planted.P12B, "P13": planted.P13,
}

// TestPlainBuildHasNone holds that no bug is planted unless a tag asks for it.
func TestPlainBuildHasNone(t *testing.T) {
	for name, on := range all {
		if on {
			t.Errorf("%s is on", name)
		}
	}
}

// declared is what a file of the package says: its build constraint, and the
// value of each constant.
func declared(t *testing.T, file string) (constraint string, values map[string]string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range f.Comments {
		for _, c := range group.List {
			if rest, ok := strings.CutPrefix(c.Text, "//go:build "); ok {
				constraint = rest
			}
		}
	}
	values = map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		if spec, ok := n.(*ast.ValueSpec); ok {
			for i, name := range spec.Names {
				if value, ok := spec.Values[i].(*ast.Ident); ok {
					values[name.Name] = value.Name
				}
			}
		}
		return true
	})
	return constraint, values
}

// TestEachHasItsTag holds that each switch is on under its own tag, and off without.
func TestEachHasItsTag(t *testing.T) {
	for name := range all {
		tag := "planted_" + strings.ToLower(name)
		for file, want := range map[string][2]string{"_on.go": {tag, "true"}, "_off.go": {"!" + tag, "false"}} {
			constraint, values := declared(t, strings.ToLower(name)+file)
			if diff := cmp.Diff(map[string]string{name: want[1]}, values); diff != "" || constraint != want[0] {
				t.Errorf("%s%s is built if %q (-want +got):\n%s", strings.ToLower(name), file, constraint, diff)
			}
		}
	}
	files, err := filepath.Glob("*_o*.go")
	if err != nil || len(files) != 2*len(all) {
		t.Errorf("%d files for %d switches, err = %v", len(files), len(all), err)
	}
}

// TestEachIsUsed holds that each switch stands somewhere in the product, and that
// what make planted runs knows it.
func TestEachIsUsed(t *testing.T) {
	used := map[string]bool{}
	name := regexp.MustCompile(`\bplanted\.(P[0-9]+[A-Z]?)\b`)
	if err := filepath.WalkDir("..", func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "planted" {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		for _, m := range name.FindAllSubmatch(data, -1) {
			used[string(m[1])] = true
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(slices.Sorted(maps.Keys(all)), slices.Sorted(maps.Keys(used))); diff != "" {
		t.Errorf("in the product (-want +got):\n%s", diff)
	}
	data, err := os.ReadFile("run/bugs.go")
	if err != nil {
		t.Fatal(err)
	}
	for name := range all {
		if !strings.Contains(string(data), `{"`+strings.ToLower(name)+`", `) {
			t.Errorf("make planted does not plant %s", name)
		}
	}
}
