package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
	"unicode/utf8"
)

const (
	width      = 100 // columns of output
	startWait  = 20 * time.Second
	stopWait   = 20 * time.Second
	removeWait = 10 * time.Second
	copyWait   = 30 * time.Second
	eventWait  = 10 * time.Second
	pollPause  = 20 * time.Millisecond
)

// demo is the state of the demonstration.
type demo struct {
	paint       paint
	dir         string // temporary
	bin         map[string]string
	addr, other string // of the service, and of its metrics
	env         []string
	server      *exec.Cmd
	exited      chan struct{} // closed when the server has exited
	waiting     *exec.Cmd     // the engine that waits for an event

	err    error // the first error; later commands do nothing
	checks int
	failed int
}

func (d *demo) logFile() string  { return filepath.Join(d.dir, "snapshotd.log") }
func (d *demo) eventLog() string { return filepath.Join(d.dir, "engine.log") }
func (d *demo) store() string    { return filepath.Join(d.dir, "data", "objects") }

// prepare finds the programs, a folder and ports.
func (d *demo) prepare(ctx context.Context) (err error) {
	d.bin = map[string]string{}
	for _, name := range []string{"snapshotd", "snapshotctl"} {
		if d.bin[name], err = filepath.Abs(filepath.Join("bin", name)); err != nil {
			return err
		}
		if _, err := os.Stat(d.bin[name]); err != nil {
			return fmt.Errorf("%w; run this by `make demo` in the repository's folder", err)
		}
	}
	if d.dir, err = os.MkdirTemp("", "snapshotd-demo-"); err != nil {
		return err
	}
	d.bin["engine"] = filepath.Join(d.dir, "engine")
	build := exec.CommandContext(ctx, "go", "build", "-o", d.bin["engine"], "./examples/engine")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build examples/engine: %w\n%s", err, out)
	}
	if d.addr, d.other, err = freePorts(ctx); err != nil {
		return err
	}
	d.env = append(os.Environ(), "SNAPSHOTCTL_ADDR="+d.addr)
	return nil
}

// freePorts returns two free addresses.
func freePorts(ctx context.Context) (string, string, error) {
	var listen net.ListenConfig
	a, err := listen.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", "", err
	}
	b, err := listen.Listen(ctx, "tcp", "127.0.0.1:0") // while a is open, so that they differ
	if err != nil {
		return "", "", errors.Join(err, a.Close())
	}
	return a.Addr().String(), b.Addr().String(), errors.Join(a.Close(), b.Close())
}

// start starts the server and returns when it responds.
func (d *demo) start(ctx context.Context) {
	if d.err != nil {
		return
	}
	args := []string{
		"serve", "--data-dir", filepath.Join(d.dir, "data"),
		"--listen", d.addr, "--metrics-listen", d.other, "--leader-ttl", "3s",
	}
	d.show("snapshotd", append(args, "&"))
	log, err := os.OpenFile(d.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		d.err = err
		return
	}
	defer func() { _ = log.Close() }() // the server has its own descriptor
	began := time.Now()
	// Not bound to ctx, which an interrupt ends: the server must end gracefully. For
	// the same reason it gets a separate process group.
	d.server = exec.CommandContext(context.WithoutCancel(ctx), d.bin["snapshotd"], args...)
	d.server.Stdout, d.server.Stderr = log, log
	d.server.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := d.server.Start(); err != nil {
		d.err, d.server = err, nil
		return
	}
	d.exited = make(chan struct{})
	go func() {
		_ = d.server.Wait() // ProcessState has the result
		close(d.exited)
	}()
	d.err = d.poll(ctx, startWait, "a response of the server", func() bool {
		return d.command(ctx, "snapshotctl", "info").Run() == nil
	})
	d.took(began)
}

// kill ends the server without a warning.
func (d *demo) kill() {
	if d.err != nil {
		return
	}
	fmt.Printf("\n%s\n", d.paint.bold("$ kill -9 "+fmt.Sprint(d.server.Process.Pid)))
	began := time.Now()
	d.err = d.server.Process.Kill()
	<-d.exited
	d.took(began)
}

// await starts an engine that waits for a collection, in the background, and returns
// when it misses no event any more.
func (d *demo) await(ctx context.Context, collection string) {
	if d.err != nil {
		return
	}
	args := []string{"--collection", collection, "await"}
	d.show("engine", append(args, "&"))
	log, err := os.Create(d.eventLog())
	if err != nil {
		d.err = err
		return
	}
	defer func() { _ = log.Close() }() // the engine has its own descriptor
	cmd := d.command(ctx, "engine", args...)
	cmd.Stdout, cmd.Stderr = log, log
	if d.err = cmd.Start(); d.err != nil {
		return
	}
	d.waiting = cmd
	d.err = d.poll(ctx, eventWait, "the start of the engine", func() bool {
		output, _ := os.ReadFile(d.eventLog())
		return bytes.Contains(output, []byte("waiting"))
	})
}

// awaited waits for the engine in the background to exit and returns the last line of
// its output.
func (d *demo) awaited() string {
	if d.err != nil {
		return ""
	}
	stop := time.AfterFunc(eventWait, func() { _ = d.waiting.Process.Kill() })
	defer stop.Stop()
	err := d.waiting.Wait()
	d.waiting = nil
	output, readErr := os.ReadFile(d.eventLog())
	if d.err = errors.Join(err, readErr); d.err != nil {
		d.err = fmt.Errorf("the waiting engine: %w\n%s", d.err, output)
		return ""
	}
	fmt.Print(string(output))
	lines := strings.SplitAfter(string(output), "\n")
	return lines[max(0, len(lines)-2)]
}

// poll waits until done is true.
func (d *demo) poll(ctx context.Context, limit time.Duration, what string, done func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for tick := time.NewTicker(pollPause); !done(); {
		select {
		case <-tick.C:
		case <-d.exited:
			return fmt.Errorf("the server exited: %s", d.server.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("wait for %s, at most %s: %w", what, limit, ctx.Err())
		}
	}
	return nil
}

func (d *demo) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	if name == "engine" {
		args = append([]string{"--addr", d.addr, "--store", d.store()}, args...)
	}
	cmd := exec.CommandContext(ctx, d.bin[name], args...)
	cmd.Env = d.env
	return cmd
}

// run runs a command, prints its output and returns it.
func (d *demo) run(ctx context.Context, name string, args ...string) string {
	out, err := d.try(ctx, name, args, true)
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("%s %s: %w", name, strings.Join(args, " "), err)
	}
	return out
}

// read is run for snapshotctl, without printing the output.
func (d *demo) read(ctx context.Context, args ...string) string {
	out, err := d.try(ctx, "snapshotctl", args, false)
	if err != nil && d.err == nil {
		d.err = fmt.Errorf("snapshotctl %s: %w", strings.Join(args, " "), err)
	}
	return out
}

// fails runs a command that must fail, and returns its output.
func (d *demo) fails(ctx context.Context, name string, args ...string) string {
	out, err := d.try(ctx, name, args, true)
	_, exited := errors.AsType[*exec.ExitError](err)
	d.check(exited, "it fails")
	return out
}

func (d *demo) try(ctx context.Context, name string, args []string, show bool) (string, error) {
	if d.err != nil {
		return "", d.err
	}
	d.show(name, args)
	var out, errs bytes.Buffer
	cmd := d.command(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &errs
	began := time.Now()
	err := cmd.Run()
	if show || err != nil {
		for line := range strings.Lines(out.String() + errs.String()) {
			fmt.Println(cut(strings.TrimSuffix(line, "\n")))
		}
	} else {
		fmt.Println(d.paint.dim(fmt.Sprintf("  … %s, read by this program", size(int64(out.Len())))))
	}
	d.took(began)
	if err != nil {
		return out.String() + errs.String(), err
	}
	return out.String(), nil
}

// show prints a command in shell syntax.
func (d *demo) show(name string, args []string) {
	line := "$ " + name
	used := len(line)
	for _, a := range args {
		if a != "&" && strings.ContainsAny(a, " #'&") {
			a = "'" + a + "'"
		}
		if used+1+len(a) > width-2 {
			line, used = line+" \\\n   ", 3
		}
		line, used = line+" "+a, used+1+len(a)
	}
	fmt.Printf("\n%s\n", d.paint.bold(line))
}

func (d *demo) took(began time.Time) {
	fmt.Println(d.paint.dim("  [" + round(time.Since(began)).String() + "]"))
}

// print prints a paragraph.
func (d *demo) print(format string, args ...any) {
	if d.err != nil {
		return
	}
	line := ""
	for word := range strings.FieldsSeq(fmt.Sprintf(format, args...)) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			fmt.Println(line)
			line = ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	fmt.Println(line)
}

// chapter prints a headline.
func (d *demo) chapter(title string) {
	if d.err == nil {
		fmt.Printf("\n%s\n", d.paint.head("── "+title+" "+strings.Repeat("─", width-4-utf8.RuneCountInString(title))))
	}
}

// check prints and counts the result of a check.
func (d *demo) check(ok bool, format string, args ...any) {
	if d.err != nil {
		return
	}
	d.checks++
	text := fmt.Sprintf(format, args...)
	if ok {
		fmt.Println(d.paint.green("  ✓ " + text))
		return
	}
	d.complain("failed: " + text)
}

func (d *demo) complain(text string) {
	d.failed++
	fmt.Println(d.paint.red("  ✗ " + text))
}

// showLog prints the last lines of the server's log.
func (d *demo) showLog() {
	const last = 25
	data, err := os.ReadFile(d.logFile())
	if err != nil {
		return
	}
	lines := strings.Split(strings.TrimRight(string(data), "\n"), "\n")
	fmt.Println("\nThe end of the server's log:")
	for _, line := range lines[max(0, len(lines)-last):] {
		fmt.Println("  " + line)
	}
}

// keep leaves the server running and prints how to use and stop it.
func (d *demo) keep() {
	d.chapter("Kept")
	fmt.Printf(`The server keeps running (process %d). To use it:

  export SNAPSHOTCTL_ADDR=%s
  bin/snapshotctl snapshot list
  %s --addr %s \
    --store %s \
    --collection shop-restored search --seed 7

To stop it and remove everything:

  kill %d && while kill -0 %d 2>/dev/null; do sleep 0.1; done; rm -r %s
`, d.server.Process.Pid, d.addr, d.bin["engine"], d.addr, d.store(), d.server.Process.Pid, d.server.Process.Pid, d.dir)
}

// end stops the server, removes its files, and checks that nothing is left.
func (d *demo) end(ctx context.Context) {
	firstErr := d.err
	d.err = nil // run the remaining steps and checks after an error, too
	d.chapter("Cleaning up")
	if d.waiting != nil { // the demonstration ended before the event
		_ = d.waiting.Process.Kill()
		_ = d.waiting.Wait()
	}
	if d.server != nil {
		fmt.Printf("\n%s\n", d.paint.bold("$ kill -TERM "+fmt.Sprint(d.server.Process.Pid)))
		began := time.Now()
		err := d.server.Process.Signal(syscall.SIGTERM)
		select {
		case <-d.exited:
		case <-time.After(stopWait):
			err = errors.Join(err, fmt.Errorf("still running after %s, killed", stopWait), d.server.Process.Kill())
			<-d.exited
		}
		d.took(began)
		if code := d.server.ProcessState.ExitCode(); err != nil || code != 0 {
			d.showLog()
			d.check(false, "the server ends gracefully (exit code %d, %v)", code, err)
		} else {
			d.check(true, "the server ends gracefully, with exit code 0")
		}
		// Its process group: the server and its children.
		err = syscall.Kill(-d.server.Process.Pid, 0)
		d.check(errors.Is(err, syscall.ESRCH), "processes left: 0")
	}
	for _, addr := range []string{d.addr, d.other} {
		var listen net.ListenConfig
		l, err := listen.Listen(ctx, "tcp", addr)
		if err == nil {
			err = l.Close()
		}
		d.check(err == nil, "port %s is free again", addr)
	}
	d.clean()
	_, err := os.Lstat(d.dir)
	d.check(errors.Is(err, fs.ErrNotExist), "files left: 0 (%s is removed)", d.dir)
	d.err = firstErr
}

func (d *demo) clean() {
	if d.dir == "" {
		return
	}
	if err := os.RemoveAll(d.dir); err != nil {
		d.complain(err.Error())
	}
}

// round rounds a duration for display.
func round(t time.Duration) time.Duration {
	if t < time.Second {
		return t.Round(time.Millisecond)
	}
	return t.Round(10 * time.Millisecond)
}

// cut shortens a long line and marks the cut.
func cut(line string) string {
	if r := []rune(line); len(r) > width {
		return string(r[:width-1]) + "…"
	}
	return line
}

func size(n int64) string {
	switch {
	case n < 1<<10:
		return fmt.Sprintf("%d B", n)
	case n < 1<<20:
		return fmt.Sprintf("%.1f KiB", float64(n)/(1<<10))
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

// paint colours text if it is true.
type paint bool

// colours is true on a terminal without NO_COLOR.
func colours() paint {
	info, err := os.Stdout.Stat()
	_, no := os.LookupEnv("NO_COLOR")
	return paint(err == nil && info.Mode()&fs.ModeCharDevice != 0 && (!no || os.Getenv("NO_COLOR") == ""))
}

func (p paint) wrap(code, s string) string {
	if !p {
		return s
	}
	return "\x1b[" + code + "m" + s + "\x1b[0m"
}

func (p paint) bold(s string) string  { return p.wrap("1", s) }
func (p paint) dim(s string) string   { return p.wrap("2", s) }
func (p paint) head(s string) string  { return p.wrap("1;36", s) }
func (p paint) green(s string) string { return p.wrap("32", s) }
func (p paint) red(s string) string   { return p.wrap("1;31", s) }
