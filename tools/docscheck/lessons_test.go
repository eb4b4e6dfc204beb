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

// TestLessonsNameTheirTests reads docs/lessons.md, whose entries name the tests that
// exclude each defect of another system. A renamed or removed test must not stay there.
func TestLessonsNameTheirTests(t *testing.T) {
	repo := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(repo, "docs", "lessons.md"))
	if err != nil {
		t.Fatal(err)
	}
	entries, problems := checkLessons(repo, string(text))
	for _, problem := range problems {
		t.Errorf("docs/lessons.md:%s", problem)
	}
	if entries < 40 {
		t.Errorf("docs/lessons.md has %d entries, want all lessons", entries)
	}
}

func TestCheckLessons(t *testing.T) {
	for name, tc := range map[string]struct {
		entry string
		want  string // of the only problem; empty is none
	}{
		"one":         {"- a: b\n  *test*: `tools/docscheck.TestMask`", ""},
		"same line":   {"- a: b *test*: `tools/docscheck.TestMask`", ""},
		"subtest":     {"- a: b\n  *test*: `tools/docscheck.TestFailures/other_output`", ""},
		"several":     {"- a: b\n  *test*: `tools/docscheck.TestMask`,\n  `tools/docscheck.TestParse`", ""},
		"planned":     {"- a: b\n  *test*: planned", ""},
		"other words": {"- a: b\n  *test*: see there", "2: no test"},
		"empty":       {"- a: b\n  *test*:", "2: no test"},
		"no label":    {"- a: b `tools/docscheck.TestMask`", "2: no test"},
		"renamed":     {"- a: b\n  *test*: `tools/docscheck.TestMusk`", "2: tools/docscheck has no TestMusk"},
		"last of two": {
			"- a: b\n  *test*: `tools/docscheck.TestMask`,\n  `tools/docscheck.TestMusk`",
			"2: tools/docscheck has no TestMusk",
		},
		"no package": {"- a: b\n  *test*: `internal/nowhere.TestMask`", "2: no package internal/nowhere"},
		"no test":    {"- a: b\n  *test*: `tools/docscheck.mask`", "2: `tools/docscheck.mask` is not of the form"},
		"code":       {"- a `x`: b\n  *test*: `tools/docscheck.TestMask`", ""},
	} {
		t.Run(name, func(t *testing.T) {
			entries, problems := checkLessons(
				filepath.Join("..", ".."), "# Title\n"+tc.entry+"\n\nOther `text`.\n\n| a | table |\n|---|---|\n| x | `y` |\n",
			)
			if entries != 1 {
				t.Errorf("got %d entries, want 1", entries)
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

// checkLessons returns the number of entries and a message for each wrong entry, with
// the line of its start. An entry is a list item with its continuation lines; the names
// of its tests follow the label *test*.
func checkLessons(repo, text string) (entries int, problems []string) {
	lines := strings.Split(text, "\n")
	for i := 0; i < len(lines); i++ {
		if !strings.HasPrefix(lines[i], "- ") {
			continue
		}
		first, entry := i+1, lines[i]
		for i+1 < len(lines) && strings.HasPrefix(lines[i+1], "  ") {
			i++
			entry += " " + strings.TrimSpace(lines[i])
		}
		entries++
		for _, problem := range checkLesson(repo, entry) {
			problems = append(problems, fmt.Sprintf("%d: %s", first, problem))
		}
	}
	return entries, problems
}

// checkLesson returns a message for each wrong test of an entry.
func checkLesson(repo, entry string) (problems []string) {
	_, tests, _ := strings.Cut(entry, "*test*:")
	names := quoted.FindAllString(tests, -1)
	if len(names) == 0 && !slices.Contains(strings.Fields(tests), "planned") {
		return []string{"no test: name one, or write planned"}
	}
	for _, name := range names {
		m := reference.FindStringSubmatch(name)
		if m == nil {
			problems = append(problems, name+" is not of the form `package/path.TestName`")
			continue
		}
		found, err := hasTest(filepath.Join(repo, m[1]), m[2])
		if err != nil {
			problems = append(problems, fmt.Sprintf("no package %s: %v", m[1], err))
		} else if !found {
			problems = append(problems, m[1]+" has no "+m[2])
		}
	}
	return problems
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
		if slices.Contains(functions(parsed), name) {
			return true, nil
		}
	}
	return false, nil
}

// functions returns the names of the functions of a file.
func functions(file *ast.File) []string {
	var names []string
	for _, decl := range file.Decls {
		if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil {
			names = append(names, fn.Name.Name)
		}
	}
	return names
}
