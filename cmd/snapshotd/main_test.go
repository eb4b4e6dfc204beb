package main

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func none(string) (string, bool) { return "", false }

func TestExitCodes(t *testing.T) {
	for _, tc := range []struct {
		args           []string
		code           int
		stdout, stderr string // parts
	}{
		{[]string{"version"}, 0, "snapshotd " + version, ""},
		{[]string{"--version"}, 0, "snapshotd " + version + "\n", ""},
		{[]string{"--help"}, 0, "Exit codes", ""},
		{[]string{"serve", "--help"}, 0, "--data-dir", ""},
		{[]string{"config", "print", "--data-dir", "elsewhere"}, 0, "data_dir: elsewhere", ""},
		{[]string{"config", "print", "--listen", ":1"}, 1, `listen: :1`, "tls.cert"},
		{[]string{"bogus"}, 2, "", "bogus"},
		{[]string{"serve", "--bogus"}, 2, "", "--bogus"},
		{[]string{"serve", "extra"}, 2, "", "extra"},
		{[]string{"serve", "--max-creates", "x"}, 2, "", "max-creates"},
		{[]string{"serve", "--create-timeout", "0s"}, 2, "", "must be at least 1s"},
		{[]string{"config"}, 2, "", "config print"},
		{[]string{"serve", "--config", "/does/not/exist"}, 1, "", "/does/not/exist"},
		{[]string{"serve", "--listen", ":1", "--name-scope", "x"}, 1, "", "name_scope"},
	} {
		var stdout, stderr strings.Builder
		code := run(t.Context(), tc.args, none, &stdout, &stderr)
		if code != tc.code || !strings.Contains(stdout.String(), tc.stdout) || !strings.Contains(stderr.String(), tc.stderr) {
			t.Errorf("%q: got %d\n%s%s", tc.args, code, &stdout, &stderr)
		}
		if lines := strings.Count(stderr.String(), "\n"); tc.code == 1 && lines != 1 {
			t.Errorf("%q: %d lines: %s", tc.args, lines, &stderr)
		}
	}
}

// TestServe runs the server until its context ends, as a signal ends it.
func TestServe(t *testing.T) {
	// The log goes to standard error, which is the process's.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	stderr := os.Stderr
	os.Stderr = w
	defer func() { os.Stderr = stderr }()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	env := func(name string) (string, bool) {
		if name == "SNAPSHOTD_METRICS_LISTEN" {
			return "off", true
		}
		return "", false
	}
	code := make(chan int, 1)
	go func() {
		code <- run(ctx, []string{"serve", "--listen=127.0.0.1:0", "--data-dir", filepath.Join(t.TempDir(), "data")}, env,
			io.Discard, w)
		_ = w.Close()
	}()
	lines := bufio.NewScanner(r)
	var last string
	for lines.Scan() {
		last = lines.Text()
		var line struct{ Msg, Mode string }
		if json.Unmarshal(lines.Bytes(), &line) == nil && line.Msg == "started" {
			if line.Mode != "embedded" {
				t.Errorf("mode %q", line.Mode)
			}
			cancel()
		}
	}
	if got := <-code; got != 0 {
		t.Errorf("exit code %d: %s", got, last)
	}
}
