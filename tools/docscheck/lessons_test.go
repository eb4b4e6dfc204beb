package main

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestLessonsNameTheirTests reads docs/lessons.md, whose tables name the test that
// excludes each defect of another system. A renamed or removed test must not stay there.
func TestLessonsNameTheirTests(t *testing.T) {
	repo := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(repo, "docs", "lessons.md"))
	if err != nil {
		t.Fatal(err)
	}
	rows, problems := checkLessons(repo, string(text))
	for _, problem := range problems {
		t.Errorf("docs/lessons.md:%s", problem)
	}
	if rows == 0 {
		t.Error("docs/lessons.md has no table with a last column named test")
	}
}

func TestCheckLessons(t *testing.T) {
	const head = "| source | defect | snapshotd | test |\n|---|---|---|---|\n"
	for name, tc := range map[string]struct {
		row  string
		want string // of the only problem; empty is none
	}{
		"one":         {"| a | b | c | `tools/docscheck.TestMask` |", ""},
		"subtest":     {"| a | b | c | `tools/docscheck.TestFailures/other_output` |", ""},
		"several":     {"| a | b | c | `tools/docscheck.TestMask`, `tools/docscheck.TestParse` |", ""},
		"planned":     {"| a | b | c | planned |", ""},
		"other words": {"| a | b | c | see there |", "3: no test"},
		"empty":       {"| a | b | c | |", "3: no test"},
		"renamed":     {"| a | b | c | `tools/docscheck.TestMusk` |", "3: tools/docscheck has no TestMusk"},
		"no package":  {"| a | b | c | `internal/nowhere.TestMask` |", "3: no package internal/nowhere"},
		"no test":     {"| a | b | c | `tools/docscheck.mask` |", "3: `tools/docscheck.mask` is not of the form"},
		"a bar":       {"| a `x\\|y` | b | c | `tools/docscheck.TestMask` |", ""},
	} {
		t.Run(name, func(t *testing.T) {
			rows, problems := checkLessons(
				filepath.Join("..", ".."), head+tc.row+"\n\n| another | table |\n|---|---|\n| x | y |\n",
			)
			if rows != 1 {
				t.Errorf("got %d rows, want 1", rows)
			}
			if tc.want == "" && len(problems) != 0 || tc.want != "" && (len(problems) != 1 || !strings.HasPrefix(
				problems[0], tc.want,
			)) {
				t.Errorf("got problems %q, want %q", problems, tc.want)
			}
		})
	}
}

var (
	quoted    = regexp.MustCompile("`[^`]+`")
	reference = regexp.MustCompile("^`([\\w/-]+)\\.((?:Test|Fuzz|Benchmark|Example)\\w*)(?:/[^`]*)?`$")
)

// checkLessons returns the number of rows and a message for each wrong row.
func checkLessons(repo, text string) (rows int, problems []string) {
	inTable := false // one with tests
	for i, line := range strings.Split(text, "\n") {
		problem := func(format string, args ...any) {
			problems = append(problems, fmt.Sprintf("%d: %s", i+1, fmt.Sprintf(format, args...)))
		}
		line = strings.TrimSpace(line)
		if !strings.HasPrefix(line, "|") {
			inTable = false
			continue
		}
		cells := strings.Split(strings.Trim(strings.ReplaceAll(line, `\|`, ""), "|"), "|")
		last := strings.TrimSpace(cells[len(cells)-1])
		switch {
		case !inTable:
			inTable = strings.EqualFold(last, "test")
			continue
		case strings.Trim(last, "-: ") == "" && strings.Contains(last, "-"):
			continue
		}
		rows++
		named := quoted.FindAllString(last, -1)
		if len(named) == 0 && !slices.Contains(strings.Fields(last), "planned") {
			problem("no test: name one, or write planned")
		}
		for _, name := range named {
			m := reference.FindStringSubmatch(name)
			if m == nil {
				problem("%s is not of the form `package/path.TestName`", name)
				continue
			}
			found, err := hasTest(filepath.Join(repo, m[1]), m[2])
			if err != nil {
				problem("no package %s: %v", m[1], err)
			} else if !found {
				problem("%s has no %s", m[1], m[2])
			}
		}
	}
	return rows, problems
}

// hasTest reports whether a test file in the folder declares the function.
func hasTest(folder, name string) (bool, error) {
	if _, err := os.Stat(folder); err != nil {
		return false, err
	}
	files, err := filepath.Glob(filepath.Join(folder, "*_test.go"))
	if err != nil {
		return false, err
	}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.SkipObjectResolution)
		if err != nil {
			return false, err
		}
		for _, decl := range parsed.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == name {
				return true, nil
			}
		}
	}
	return false, nil
}
