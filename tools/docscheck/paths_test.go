package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestPathsExist checks that the paths that CONTRIBUTING.md and the files of docs name
// in backquotes exist.
func TestPathsExist(t *testing.T) {
	repo := filepath.Join("..", "..")
	named := 0
	for _, file := range checkedDocuments(t, repo) {
		text, err := os.ReadFile(filepath.Join(repo, file))
		if err != nil {
			t.Fatal(err)
		}
		n, problems := checkPaths(repo, string(text))
		named += n
		for _, problem := range problems {
			t.Errorf("%s:%s", file, problem)
		}
	}
	if named < 20 {
		t.Errorf("found %d paths, want at least those of the map in CONTRIBUTING.md", named)
	}
}

// checkedDocuments returns the paths of CONTRIBUTING.md and of the files of docs.
func checkedDocuments(t *testing.T, repo string) []string {
	t.Helper()
	files := []string{"CONTRIBUTING.md"}
	err := filepath.WalkDir(filepath.Join(repo, "docs"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Ext(path) == ".md" {
			name, _ := filepath.Rel(repo, path)
			files = append(files, name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// TestMapIsComplete checks that the map in CONTRIBUTING.md has every folder of
// internal, test and tools.
func TestMapIsComplete(t *testing.T) {
	repo := filepath.Join("..", "..")
	text, err := os.ReadFile(filepath.Join(repo, "CONTRIBUTING.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, top := range []string{"internal", "test", "tools"} {
		entries, err := os.ReadDir(filepath.Join(repo, top))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range entries {
			if name := top + "/" + e.Name(); e.IsDir() && !strings.Contains(string(text), "`"+name+"`") {
				t.Errorf("CONTRIBUTING.md has no row for %s", name)
			}
		}
	}
}

func TestCheckPaths(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"see `tools/docscheck/doc.go` and `tools/docscheck/`", ""},
		{"a test: `tools/docscheck.TestMask`, `tools/docscheck.TestMask/sub`", ""},
		{"keys: `snapshots/identity.json`, `gc/held/`, `/snapshot/rec/42`", ""},
		{"a command: `go test ./tools/nowhere`", ""},
		{"```\n`tools/nowhere`\n```", ""},
		{"ok\n`tools/nowhere`", "2: no file or folder tools/nowhere"},
		{"`internal/nowhere.TestX`", "1: no file or folder internal/nowhere"},
	} {
		_, problems := checkPaths(filepath.Join("..", ".."), tc.text)
		if got := strings.Join(problems, "; "); got != tc.want {
			t.Errorf("%q: got %q, want %q", tc.text, got, tc.want)
		}
	}
}

var (
	// repoPath matches a path below a folder at the top of the repository, possibly
	// with the name of a test behind it.
	repoPath = regexp.MustCompile("`((?:\\.ci|api|client|cmd|deploy|docs|embed|examples|internal|test|tools)/[\\w./-]+)`")
	testName = regexp.MustCompile(`\.(?:Test|Fuzz|Benchmark|Example)\w*(?:/.*)?$`)
)

// checkPaths returns the number of paths in a document and a message for each path
// that does not exist. It skips fenced blocks.
func checkPaths(repo, text string) (named int, problems []string) {
	fenced := false
	for i, line := range strings.Split(text, "\n") {
		if strings.HasPrefix(strings.TrimSpace(line), "```") {
			fenced = !fenced
		}
		if fenced {
			continue
		}
		for _, m := range repoPath.FindAllStringSubmatch(line, -1) {
			named++
			path := testName.ReplaceAllString(m[1], "")
			if _, err := os.Stat(filepath.Join(repo, path)); err != nil {
				problems = append(problems, fmt.Sprintf("%d: no file or folder %s", i+1, path))
			}
		}
	}
	return named, problems
}
