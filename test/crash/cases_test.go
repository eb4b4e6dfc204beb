//go:build linux

package main

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"io/fs"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/test/crashpoint"
)

// namesInSource returns the names of all transactions of the product: the string
// literals that are set as Name of a meta.Txn, or passed as a parameter called step.
func namesInSource(t *testing.T) []string {
	t.Helper()
	names := map[string]bool{}
	err := filepath.WalkDir("../../internal", func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		files, err := filepath.Glob(filepath.Join(dir, "*.go"))
		if err != nil {
			return err
		}
		var parsed []*ast.File
		for _, name := range files {
			if strings.HasSuffix(name, "_test.go") {
				continue
			}
			f, err := parser.ParseFile(gotoken.NewFileSet(), name, nil, 0)
			if err != nil {
				return err
			}
			parsed = append(parsed, f)
		}
		namesInPackage(parsed, names)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return slices.Sorted(maps.Keys(names))
}

var stepName = regexp.MustCompile(`^"[a-z]+\.[a-z]+"$`)

// namesInPackage adds the names of the transactions in a package to names.
func namesInPackage(files []*ast.File, names map[string]bool) {
	steps := map[string]int{} // functions by name, and the place of their parameter step
	for _, f := range files {
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok {
				if at := slices.Index(parameters(fn), "step"); at >= 0 {
					steps[fn.Name.Name] = at
				}
			}
		}
	}
	add := func(e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok && stepName.MatchString(lit.Value) {
			name, _ := strconv.Unquote(lit.Value) // it is a literal
			names[name] = true
		}
	}
	for _, f := range files {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.KeyValueExpr: // of a composite literal
				if key, ok := n.Key.(*ast.Ident); ok && key.Name == "Name" {
					add(n.Value)
				}
			case *ast.AssignStmt: // txn.Name = "create.commit", or cmp.Or(txn.Name, "create.commit")
				left, ok := n.Lhs[0].(*ast.SelectorExpr)
				if !ok || left.Sel.Name != "Name" {
					break
				}
				ast.Inspect(n.Rhs[0], func(n ast.Node) bool {
					if e, ok := n.(ast.Expr); ok {
						add(e)
					}
					return true
				})
			case *ast.CallExpr:
				if at, ok := steps[called(n)]; ok && at < len(n.Args) {
					add(n.Args[at])
				}
			}
			return true
		})
	}
}

// parameters returns the names of a function's parameters.
func parameters(fn *ast.FuncDecl) (names []string) {
	for _, field := range fn.Type.Params.List {
		for _, name := range field.Names {
			names = append(names, name.Name)
		}
	}
	return names
}

// called returns the name of the function that a call calls.
func called(call *ast.CallExpr) string {
	switch fn := call.Fun.(type) {
	case *ast.Ident:
		return fn.Name
	case *ast.SelectorExpr:
		return fn.Sel.Name
	}
	return ""
}

// TestEveryStepHasAScenario compares the steps of the scenarios with those of the
// product and of the decorators.
func TestEveryStepHasAScenario(t *testing.T) {
	inSource := namesInSource(t)
	if len(inSource) < 40 {
		t.Fatalf("found only %d transactions in the source: %v", len(inSource), inSource)
	}
	want := slices.Sorted(slices.Values(append(inSource, crashpoint.Names()...)))
	if diff := cmp.Diff(want, slices.Sorted(maps.Keys(steps()))); diff != "" {
		t.Errorf("the steps of the scenarios differ from those that exist (-exist +scenarios):\n%s", diff)
	}
}

func TestPlanned(t *testing.T) {
	every := regexp.MustCompile("")
	all := planned(every, false, 1)
	for step := range steps() {
		for _, side := range []string{before, after} {
			want := crash{Step: step, Side: side, Nth: 1}
			if !slices.ContainsFunc(all, func(c oneCase) bool { return c.store == onBucket && c.crash == want }) {
				t.Errorf("there is no case %s %s", side, step)
			}
		}
	}
	quick := planned(every, true, 1)
	if len(quick) == 0 || len(quick) > 20 {
		t.Errorf("a quick run has %d cases", len(quick))
	}
	if repeat := planned(every, true, 1); !slices.Equal(quick, repeat) {
		t.Errorf("the same seed chose %v and then %v", quick, repeat)
	}
}

func TestParseCase(t *testing.T) {
	for _, c := range planned(regexp.MustCompile(""), false, 1) {
		for _, then := range []crash{{}, {Step: "elect.claim", Side: after, Nth: 1}} {
			c.then = then
			if got, err := parseCase(c.String()); err != nil || got != c {
				t.Errorf("parseCase(%q) = %v, %v", c, got, err)
			}
		}
	}
	for _, text := range []string{
		"", "bucket create", "disk create create.begin:before:1", "bucket none create.begin:before:1",
		"bucket create create.begin", "bucket create create.begin:before:x",
	} {
		if got, err := parseCase(text); err == nil {
			t.Errorf("parseCase(%q) = %v", text, got)
		}
	}
}
