package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestCopyTree copies the sources with all that tests read, and neither what git
// nor what builds keep.
func TestCopyTree(t *testing.T) {
	root, to := t.TempDir(), t.TempDir()
	for _, name := range []string{
		"go.mod", "a/bin/x.go", "a/testdata/fuzz/F/1", ".golangci.yaml", ".git/HEAD",
		".bin/buf", "bin/snapshotd", "snapshotd-data/1",
	} {
		file := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := copyTree(to, root); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{
		"go.mod": true, "a/bin/x.go": true, "a/testdata/fuzz/F/1": true, ".golangci.yaml": true, ".bin/buf": true,
		".git/HEAD": false, "bin/snapshotd": false, "snapshotd-data/1": false,
	} {
		data, err := os.ReadFile(filepath.Join(to, name))
		if (err == nil) != want || want && string(data) != name {
			t.Errorf("%s: %q, err = %v, want it copied: %v", name, data, err, want)
		}
	}
}

// TestApply undoes a fix and puts it back.
func TestApply(t *testing.T) {
	tree := t.TempDir()
	file := filepath.Join(tree, "a.go")
	const fixed, broken = "a\nfixed\nb\n", "a\nb\n"
	if err := os.WriteFile(file, []byte(fixed), 0o600); err != nil {
		t.Fatal(err)
	}
	patch := []byte("--- a/a.go\n+++ b/a.go\n@@ -1,3 +1,2 @@\n a\n-fixed\n b\n")
	for _, c := range []struct {
		more []string
		want string
	}{{nil, broken}, {[]string{"--reverse"}, fixed}} {
		if err := apply(t.Context(), tree, patch, c.more...); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.want, string(got)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", c.more, diff)
		}
	}
	if err := apply(t.Context(), tree, patch, "--reverse"); err == nil {
		t.Error("a patch that does not apply is no error")
	}
}
