package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// listeners are the variables that set the ports of snapshotd and snapshotctl, with
// their defaults. Variables with the same default get the same free port.
var listeners = []struct{ variable, address string }{
	{"SNAPSHOTD_LISTEN", "127.0.0.1:7950"},
	{"SNAPSHOTD_METRICS_LISTEN", "127.0.0.1:7951"},
	{"SNAPSHOTCTL_ADDR", "127.0.0.1:7950"},
	{"VGW_PORT", "127.0.0.1:7070"},
}

const (
	// shownDir is the name of the working folder in updated documents.
	shownDir = "/tmp/snapshotd-docs"
	// marker is the variable that marks the processes of a session.
	marker = "DOCSCHECK_SESSION"
)

var errTimeout = errors.New("timeout")

// A session is the shell of one document.
type session struct {
	id     string
	dir    string
	shown  *strings.Replacer // real values to those in documents
	typed  *strings.Replacer // addresses in documents to the real ones
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	output chan string // lines, and an incomplete one at the end
	status int         // of the last command
}

// start opens a shell for a document. The caller must call end.
func start(ctx context.Context, repo string) (*session, error) {
	dir, err := os.MkdirTemp("", "docscheck-")
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		return nil, err
	}
	work := filepath.Join(dir, "work")
	if err := os.Mkdir(work, 0o755); err != nil {
		return nil, err
	}
	s := &session{id: rand.Text(), dir: dir, output: make(chan string)}
	env, shown, err := environment(ctx, repo, s.id)
	if err != nil {
		return nil, err
	}
	var typed []string
	for i := 0; i < len(shown); i += 2 {
		typed = append(typed, shown[i+1], shown[i])
	}
	s.typed = strings.NewReplacer(typed...)
	s.shown = strings.NewReplacer(append(shown, work, shownDir)...)

	s.cmd = exec.CommandContext(ctx, "bash", "--noprofile", "--norc")
	s.cmd.Dir = work
	s.cmd.Env = env
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.stdin, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	// One pipe for both, to keep their order. It is not exec's pipe: Wait would wait for
	// every process that has it open.
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	s.cmd.Stdout, s.cmd.Stderr = w, w
	err = s.cmd.Start()
	_ = w.Close()
	if err != nil {
		_ = r.Close()
		return nil, err
	}
	go func() { // ends with the last process that has the pipe open
		defer close(s.output)
		defer func() { _ = r.Close() }()
		lines := bufio.NewReader(r)
		for {
			line, err := lines.ReadString('\n')
			s.output <- line
			if err != nil {
				return
			}
		}
	}()
	prelude := fmt.Sprintf("REPOSITORY=%s\n", quote(repo)) +
		`make() { command make -C "$REPOSITORY" "$@"; }` + "\n" +
		`go() { command go -C "$REPOSITORY" "$@"; }` + "\n"
	if _, err := s.run(ctx, prelude); err != nil {
		_ = s.end(0)
		return nil, err
	}
	return s, nil
}

// environment returns the environment of the shell: that of this process without
// variables that would change the output. It also returns pairs of a real address and
// the one in documents.
func environment(ctx context.Context, repo, id string) (env, shown []string, err error) {
	for _, kv := range os.Environ() {
		name, _, _ := strings.Cut(kv, "=")
		// MAKEFLAGS and similar ones belong to the make that runs docscheck.
		if !strings.HasPrefix(name, "SNAPSHOT") && !strings.HasPrefix(name, "MAKE") && name != "MFLAGS" {
			env = append(env, kv)
		}
	}
	env = append(env,
		marker+"="+id,
		"PATH="+strings.Join([]string{filepath.Join(repo, "bin"), filepath.Join(repo, ".bin"), os.Getenv("PATH")}, string(
			os.PathListSeparator,
		)),
		"LC_ALL=C.UTF-8", "TZ=UTC", "NO_COLOR=1", "TERM=dumb",
	)
	free := map[string]string{}
	for _, l := range listeners {
		if free[l.address] == "" {
			if free[l.address], err = freeAddress(ctx); err != nil {
				return nil, nil, err
			}
			shown = append(shown, free[l.address], l.address)
		}
		env = append(env, l.variable+"="+free[l.address])
	}
	return env, shown, nil
}

func freeAddress(ctx context.Context) (string, error) {
	var config net.ListenConfig
	l, err := config.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// run runs one command, sets the session's status and returns the output lines. After
// an error only end may be called.
func (s *session) run(ctx context.Context, text string) ([]string, error) {
	file := filepath.Join(s.dir, "command")
	// The status of the previous command, for `echo $?`.
	script := fmt.Sprintf("(exit %d)\n%s\n", s.status, s.typed.Replace(text))
	if err := os.WriteFile(file, []byte(script), 0o600); err != nil {
		return nil, err
	}
	// A random line marks the end of the output.
	end := rand.Text()
	if _, err := fmt.Fprintf(s.stdin, "source %s </dev/null; printf '\\n%s %%d\\n' $?\n", quote(file), end); err != nil {
		return nil, fmt.Errorf("the shell has exited: %w", err)
	}
	var out bytes.Buffer
	for {
		select {
		case <-ctx.Done():
			return s.lines(out.String()), errTimeout
		case line, ok := <-s.output:
			if !ok {
				return s.lines(out.String()), errors.New("the command ended the shell")
			}
			code, found := strings.CutPrefix(line, end+" ")
			if !found {
				out.WriteString(line)
				continue
			}
			status, err := strconv.Atoi(strings.TrimSpace(code))
			if err != nil {
				return nil, err
			}
			s.status = status
			return s.lines(strings.TrimSuffix(out.String(), "\n")), nil
		}
	}
}

func (s *session) lines(out string) []string {
	out = strings.TrimRight(s.shown.Replace(out), "\n")
	if out == "" {
		return nil
	}
	lines := strings.Split(out, "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " \t\r")
	}
	return lines
}

// end ends the shell and its processes, and removes its folder. Processes that still
// run after the grace period are killed, which is an error.
func (s *session) end(grace time.Duration) error {
	_ = s.stdin.Close()
	go func() { // discard the rest, so that no writer blocks
		for open := true; open; {
			_, open = <-s.output
		}
	}()
	group := s.cmd.Process.Pid
	_ = syscall.Kill(-group, syscall.SIGTERM)
	_ = s.cmd.Wait() // the exit status is irrelevant

	var left []int
	deadline := time.Now().Add(grace)
	for left = s.processes(); len(left) > 0 && time.Now().Before(deadline); left = s.processes() {
		for _, pid := range left { // a process may have started another
			_ = syscall.Kill(pid, syscall.SIGTERM)
		}
		<-time.After(50 * time.Millisecond)
	}
	_ = syscall.Kill(-group, syscall.SIGKILL)
	for _, pid := range left {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	var errs []error
	if len(left) > 0 {
		errs = append(errs, fmt.Errorf("processes %v did not end within %s of SIGTERM", left, grace))
	}
	return errors.Join(append(errs, os.RemoveAll(s.dir))...)
}

// processes returns the running processes of the session, in its process group or not.
// Without /proc it finds none.
func (s *session) processes() []int {
	var found []int
	files, _ := filepath.Glob("/proc/[0-9]*/environ")
	for _, file := range files {
		// For a process that has exited, or a zombie, this reads nothing.
		environ, _ := os.ReadFile(file)
		if !bytes.Contains(environ, []byte(marker+"="+s.id)) {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file))); err == nil {
			found = append(found, pid)
		}
	}
	return found
}

func quote(s string) string {
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
