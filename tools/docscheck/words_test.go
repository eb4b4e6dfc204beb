package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

// avoided are words that the code and the documents do without: each has a plainer
// one, which says which component does what. The plural and the possessive count too.
var avoided = regexp.MustCompile(
	`\b((?i:told|tells|somebody|anybody|anew|trouble|reckoned|whoever|hands?)|[Nn]obody)('s)?\b`)

// maxColumns is the longest line of a document, in characters. That of Go files is
// in .golangci.yaml.
const maxColumns = 120

// TestPlainWords reads every file of the repository that is written for people.
// CHANGELOG.md is history, and generated files repeat their sources.
func TestPlainWords(t *testing.T) {
	repo := filepath.Join("..", "..")
	read := 0
	err := filepath.WalkDir(repo, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(repo, path)
		switch base := d.Name(); {
		case err != nil:
			return err
		case d.IsDir() && (base == ".git" || base == ".bin" || base == "bin" || base == "testdata" || base == "third_party"):
			return filepath.SkipDir
		case d.IsDir() || !isProse(filepath.ToSlash(name)):
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		read++
		for _, problem := range checkWords(name, string(text)) {
			t.Error(problem)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if read < 100 {
		t.Errorf("read %d files, want all of the repository", read)
	}
}

func TestCheckWords(t *testing.T) {
	long := strings.Repeat("é", maxColumns)
	for _, tc := range []struct{ file, text, want string }{
		{"a.go", "// The leader assigns the task.\n", ""},
		{"a.go", "ok\n// Nobody is told.\n", "a.go:2: avoid \"Nobody\""},
		{"a.md", "by hand\n", "a.md:1: avoid \"hand\""},
		{"a.go", "handle, handler, handshake, retells\n", ""},
		{"a.md", long + "\n", ""},
		{"a.md", long + "é\n", "a.md:1: the line has 121 characters, want at most 120"},
		{"a.md", "| " + long + " |\n", "a.md:1: the line has 124 characters, want at most 120"},
		{"a.md", "```\n" + long + "é\n```\n", ""},
		{"a.go", long + "é\n", ""},
	} {
		got := checkWords(tc.file, tc.text)
		if tc.want == "" && len(got) > 0 || tc.want != "" && (len(got) == 0 || !strings.HasPrefix(got[0], tc.want)) {
			t.Errorf("checkWords(%q, %q) = %q, want %q", tc.file, tc.text, got, tc.want)
		}
	}
}

// isProse reports whether a file is written for people.
func isProse(name string) bool {
	switch {
	case name == "CHANGELOG.md", name == "tools/docscheck/words_test.go",
		strings.HasSuffix(name, ".pb.go"):
		return false
	case filepath.Base(name) == "Makefile":
		return true
	}
	switch filepath.Ext(name) {
	case ".go", ".md", ".proto", ".sh", ".yaml", ".pml":
		return true
	}
	return false
}

// checkWords returns a message for each line of a file that has an avoided word, or
// is too long. Only fenced blocks may have longer lines: console output cannot be wrapped.
func checkWords(name, text string) []string {
	var problems []string
	fenced := false
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSuffix(line, "\n")
		if word := avoided.FindString(line); word != "" {
			problems = append(problems, name+":"+strconv.Itoa(n)+": avoid "+strconv.Quote(word))
		}
		if filepath.Ext(name) != ".md" {
			continue
		}
		if strings.HasPrefix(line, "```") {
			fenced = !fenced
		}
		if wide := utf8.RuneCountInString(line); wide > maxColumns && !fenced {
			problems = append(problems, fmt.Sprintf("%s:%d: the line has %d characters, want at most %d", name, n, wide,
				maxColumns))
		}
	}
	return problems
}
