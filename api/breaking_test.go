//go:build !short

// Package api_test checks that the API can't be broken by mistake.
package api_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// TestBreakingIsRefused changes a copy of the contract and requires that the check of
// `make lint` refuses it. A baseline that follows each change, or the wrong input,
// lets everything pass.
func TestBreakingIsRefused(t *testing.T) {
	repo, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	// make knows its targets by their real names.
	if repo, err = filepath.EvalSymlinks(repo); err != nil {
		t.Fatal(err)
	}
	buf := filepath.Join(repo, ".bin", "buf")
	if out, err := command(t, repo, "make", buf); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	field := regexp.MustCompile(`(?m)^(  [\w.]+ )(\w+)( = 1\b)`)
	for _, input := range []struct{ module, baseline string }{
		{"api/proto", "api/baseline.binpb"},
		{"internal/store/proto", "internal/store/proto/baseline.binpb"},
	} {
		t.Run(input.module, func(t *testing.T) {
			dir := t.TempDir()
			for _, part := range []string{"api/proto", "api/third_party", "internal/store/proto"} {
				if err := os.CopyFS(filepath.Join(dir, part), os.DirFS(filepath.Join(repo, part))); err != nil {
					t.Fatal(err)
				}
			}
			config, err := os.ReadFile(filepath.Join(repo, "buf.yaml"))
			if err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "buf.yaml"), config)
			breaking := []string{
				buf, "breaking", input.module,
				"--against", filepath.Join(repo, input.baseline), "--exclude-imports",
			}
			if out, err := command(t, dir, breaking...); err != nil {
				t.Fatalf("the contract as it is: %v\n%s", err, out)
			}

			var file, name string
			err = filepath.WalkDir(filepath.Join(dir, input.module), func(path string, _ fs.DirEntry, err error) error {
				if err != nil || filepath.Ext(path) != ".proto" {
					return err
				}
				text, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				at := field.FindSubmatchIndex(text)
				if at == nil {
					return nil
				}
				file, name = path, string(text[at[4]:at[5]])
				write(t, path, slices.Concat(text[:at[4]], []byte("renamed_"), text[at[4]:]))
				return fs.SkipAll
			})
			if err != nil {
				t.Fatal(err)
			}
			if name == "" {
				t.Fatal("no field to rename")
			}
			out, err := command(t, dir, breaking...)
			if err == nil {
				t.Fatalf("%s: the field %s renamed, and buf breaking passed", file, name)
			}
			if !strings.Contains(out, "renamed_"+name) {
				t.Errorf("buf breaking failed for another reason:\n%s", out)
			}
		})
	}
}

func command(t *testing.T, dir string, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), args[0], args[1:]...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
}
