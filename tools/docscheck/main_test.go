package main

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// check writes files into an empty repository and checks them.
func check(t *testing.T, update bool, files map[string]string) (repo, out string, err error) {
	t.Helper()
	repo = t.TempDir()
	for name, text := range files {
		path := filepath.Join(repo, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(md(text)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var b strings.Builder
	c := checker{out: &b, update: update, grace: time.Second}
	err = c.check(t.Context(), repo, nil)
	return repo, b.String(), err
}

const readme = `
'''console
$ greet world
hello world
$ export WORD=kept; mkdir sub; cd sub
$ sh -c 'while [ ! -e ../begin ]; do :; done; echo ready; echo $$ > ../server.pid; exec sleep 300' &
$ touch ../begin; while [ ! -s ../server.pid ]; do :; done; cp ../server.pid "$REPOSITORY"
ready
'''

Text.

'''console
$ echo "$WORD" in $(basename "$PWD"), id $((100000 + $$))
kept in sub, id 12345
$ pwd
/tmp/snapshotd-docs/sub
$ seq 5
1
...
5
$ ls nowhere
...
$ echo $?
2
$ printf 'no newline'
no newline
$ make -s answer
forty-two
$ read -r line || echo no input
no input
$ test -n "$SNAPSHOTD_LISTEN" && test "$SNAPSHOTD_LISTEN" = "$SNAPSHOTCTL_ADDR" && echo "$SNAPSHOTD_LISTEN"
127.0.0.1:7070
'''
`

func TestEndToEnd(t *testing.T) {
	repo, out, err := check(t, false, map[string]string{
		"README.md":      readme,
		"docs/b.md":      "'''console nocheck=needs a cluster\n$ false\n'''\n",
		"docs/a/deep.md": "'''console\n$ echo ${WORD:-a new shell}; ls\na new shell\n'''\n",
		"Makefile":       "answer:\n\t@echo forty-two\n",
		"bin/greet":      "#!/bin/sh\necho hello $1\n",
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{
		"ran  README.md: 13 commands", "skip docs/b.md:1: needs a cluster", "docscheck: 14 commands passed",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("got %s\nwant it to have %q", out, want)
		}
	}
	if strings.Index(out, "README.md") > strings.Index(out, "deep.md") {
		t.Errorf("README.md is not first:\n%s", out)
	}
	var pid int
	data, err := os.ReadFile(filepath.Join(repo, "server.pid"))
	if err != nil {
		t.Fatal(err)
	}
	for _, digit := range strings.TrimSpace(string(data)) {
		pid = pid*10 + int(digit-'0')
	}
	// The server's parent is gone, so it may be a zombie until init sees to it.
	cmdline, _ := os.ReadFile(filepath.Join("/proc", strings.TrimSpace(string(data)), "cmdline"))
	if len(cmdline) > 0 || (!exists("/proc/self") && syscall.Kill(pid, 0) == nil) {
		t.Errorf("the server of the document still runs: %d", pid)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestFailures(t *testing.T) {
	for name, tc := range map[string]struct{ text, want string }{
		"other output":   {"\n'''console\n$ echo other\nthis\n'''\n", "FAIL README.md:3: echo other\n"},
		"silent failure": {"'''console\n$ false\n'''\n", "FAIL README.md:2: false\nexit status 1"},
		"shell ended":    {"'''console\n$ exit 0\n$ true\n'''\n", "the command ended the shell"},
		"left behind": {
			"'''console\n$ setsid sh -c 'trap \"\" TERM; echo >up; while :; do sleep 60; done' >/dev/null 2>&1 &\n" +
				"$ while [ ! -e up ]; do :; done\n'''\n",
			"did not end within",
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, out, err := check(t, false, map[string]string{"README.md": tc.text})
			if err == nil || !strings.Contains(out, tc.want) {
				t.Errorf("err = %v, printed:\n%s\nwant it to have %q", err, out, tc.want)
			}
		})
	}
	if _, _, err := check(t, false, map[string]string{"README.md": "nothing\n"}); err == nil {
		t.Error("a README without commands passed")
	}
}

func TestUpdateWritesOnlyWhatDiffers(t *testing.T) {
	repo, out, err := check(t, true, map[string]string{
		"README.md": "'''console\n$ echo id 123456\nid 999999\n$ pwd\nwrong\n$ echo $SNAPSHOTCTL_ADDR is it\n'''\n",
	})
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	got, err := os.ReadFile(filepath.Join(repo, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	want := md(
		"'''console\n$ echo id 123456\nid 999999\n$ pwd\n/tmp/snapshotd-docs\n$ echo $SNAPSHOTCTL_ADDR is it\n" +
			"127.0.0.1:7950 is it\n'''\n",
	)
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("README.md (-want +got):\n%s", diff)
	}
}
