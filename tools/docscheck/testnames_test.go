package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var namedTest = regexp.MustCompile("`(?:[\\w/-]+\\.)?((?:Test|Fuzz|Benchmark)[A-Z]\\w*)(?:/[^`]*)?`")

// TestDocumentsNameTests checks that each test that a document names is in the repository.
// TestLessonsNameTheirTests also checks the package.
func TestDocumentsNameTests(t *testing.T) {
	repo := filepath.Join("..", "..")
	known, err := allTests(repo)
	if err != nil {
		t.Fatal(err)
	}
	named := 0
	for _, path := range checkedDocuments(t, repo) {
		text, err := os.ReadFile(filepath.Join(repo, path))
		if err != nil {
			t.Fatal(err)
		}
		for i, line := range strings.Split(string(text), "\n") {
			for _, m := range namedTest.FindAllStringSubmatch(line, -1) {
				if named++; !known[m[1]] {
					t.Errorf("%s:%d: there is no %s", path, i+1, m[1])
				}
			}
		}
	}
	if named < 100 {
		t.Errorf("the documents name %d tests, want more than 100", named)
	}
}

// allTests returns the names of the functions of all test files.
func allTests(repo string) (map[string]bool, error) {
	known := map[string]bool{}
	err := filepath.WalkDir(repo, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && strings.HasPrefix(d.Name(), ".") && d.Name() != "..":
			return filepath.SkipDir
		case !strings.HasSuffix(path, "_test.go"):
			return nil
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		for _, name := range functions(parsed) {
			known[name] = true
		}
		return nil
	})
	return known, err
}
