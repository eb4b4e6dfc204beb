//go:build linux

package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	startTimeout = 30 * time.Second // until a process responds
	stopGrace    = 15 * time.Second
)

// Process is a running child process. The kernel kills it when this process ends.
type Process struct {
	// Stdin and Stdout are pipes to the child.
	Stdin  io.WriteCloser
	Stdout io.Reader

	name  string
	log   string
	cmd   *exec.Cmd
	ended chan struct{}
}

// Command describes a child process.
type Command struct {
	Name string   // in messages
	Args []string // starts with the program
	Env  []string // added to the environment of this process
	Log  string   // file for standard error
	// Pipes gives Process.Stdin and Stdout; without them the output goes to Log.
	Pipes bool
}

// Start starts a child. It runs until Stop, also after the end of ctx.
func Start(ctx context.Context, c Command) (*Process, error) {
	out, err := os.Create(c.Log)
	if err != nil {
		return nil, err
	}
	p := &Process{name: c.Name, log: c.Log, ended: make(chan struct{})}
	p.cmd = exec.CommandContext(context.WithoutCancel(ctx), c.Args[0], c.Args[1:]...) //nolint:gosec // a known program
	p.cmd.Env = append(os.Environ(), c.Env...)
	p.cmd.Stderr = out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if c.Pipes {
		if p.Stdin, err = p.cmd.StdinPipe(); err == nil {
			p.Stdout, err = p.cmd.StdoutPipe()
		}
		if err != nil {
			return nil, errors.Join(err, out.Close())
		}
	} else {
		p.cmd.Stdout = out
	}
	started := make(chan error, 1)
	go func() {
		// Pdeathsig follows the thread that starts the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.ended)
		defer func() { _ = out.Close() }()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_, _ = p.cmd.Process.Wait() // cmd.Wait would close the pipes during a read
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return p, nil
}

// StartSelf starts this program as a child that serves [Process.Call].
func StartSelf(ctx context.Context, dir, what string, args ...string) (*Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return Start(ctx, Command{
		Name: what, Args: append([]string{self, "child", what}, args...), Log: filepath.Join(dir, what+".log"), Pipes: true,
	})
}

// Call sends req to the child as a line of JSON and decodes the response line into
// resp. Out reads from the child's Stdout. The end of ctx kills the child.
func (p *Process) Call(ctx context.Context, out *bufio.Reader, req, resp any) error {
	defer context.AfterFunc(ctx, p.Kill)()
	if err := json.NewEncoder(p.Stdin).Encode(req); err != nil {
		return err
	}
	line, err := out.ReadBytes('\n')
	if err != nil {
		return errors.Join(err, p.ExitError())
	}
	return json.Unmarshal(line, resp)
}

// Pid returns the process id of the child.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// CPUSeconds returns the processor time of the child so far, in seconds, or 0 if
// it is unknown.
func (p *Process) CPUSeconds() float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		return 0
	}
	const hertz = 100 // clock ticks per second on Linux
	rest := string(text[bytes.LastIndexByte(text, ')')+1:])
	fields := strings.Fields(rest) // starts with field 3
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / hertz
}

// Stop sends SIGTERM, and SIGKILL after stopGrace, and waits for the end.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(stopGrace):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// Kill sends SIGKILL.
func (p *Process) Kill() { _ = p.cmd.Process.Kill() }

// ExitError returns the error for an unexpected end of the child, with the end of
// its log.
func (p *Process) ExitError() error {
	text, _ := os.ReadFile(p.log)
	return fmt.Errorf("%s ended: %s", p.name, text[max(0, len(text)-2000):])
}

// WaitHealthy waits until a GET of url returns 200.
func (p *Process) WaitHealthy(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if isHealthy(ctx, url) {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return p.ExitError()
		case <-ctx.Done():
			return fmt.Errorf("%s does not respond: %w", p.name, ctx.Err())
		}
	}
}

func isHealthy(ctx context.Context, url string) bool {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return false
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return false
	}
	_, _ = io.Copy(io.Discard, resp.Body)
	return resp.Body.Close() == nil && resp.StatusCode == http.StatusOK
}

// FreeAddr returns a free loopback address.
func FreeAddr(ctx context.Context) (string, error) {
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// The credentials of the S3 server of a benchmark.
const (
	AccessKeyID     = "benchaccesskeyid"
	SecretAccessKey = "benchsecretaccesskey" //nolint:gosec // for a server on the loopback address
)

// StartS3 starts versitygw, the program at bin, on dir with one bucket. It returns
// its address as host:port.
func StartS3(ctx context.Context, bin, dir, bucket string) (*Process, string, error) {
	data := filepath.Join(dir, "s3")
	if err := os.MkdirAll(filepath.Join(data, bucket), 0o700); err != nil { // a directory is a bucket
		return nil, "", err
	}
	addr, err := FreeAddr(ctx)
	if err != nil {
		return nil, "", err
	}
	args := []string{bin, "--health", "/health", "--keep-alive", "--quiet", "--port", addr, "posix"}
	if probe := filepath.Join(
		dir,
		"attributes",
	); os.WriteFile(probe, nil, 0o600) == nil &&
		syscall.Setxattr(probe, "user.probe", []byte("x"), 0) != nil {
		side := filepath.Join(dir, "s3-metadata") // the file system has no attributes
		if err := os.MkdirAll(side, 0o700); err != nil {
			return nil, "", err
		}
		args = append(args, "--sidecar", side)
	}
	p, err := Start(ctx, Command{
		Name: "versitygw", Args: append(args, data), Log: filepath.Join(dir, "versitygw.log"),
		Env: []string{"ROOT_ACCESS_KEY_ID=" + AccessKeyID, "ROOT_SECRET_ACCESS_KEY=" + SecretAccessKey},
	})
	if err != nil {
		return nil, "", err
	}
	if err := p.WaitHealthy(ctx, "http://"+addr+"/health"); err != nil {
		p.Stop()
		return nil, "", err
	}
	return p, addr, nil
}

// StartEtcd starts test/bench/etcd, the program at bin, on dir. It returns its
// endpoint.
func StartEtcd(ctx context.Context, bin, dir string) (*Process, string, error) {
	p, err := Start(ctx, Command{
		Name: "etcd", Args: []string{bin, filepath.Join(dir, "etcd")}, Log: filepath.Join(dir, "etcd.log"), Pipes: true,
	})
	if err != nil {
		return nil, "", err
	}
	var endpoint string
	if _, err := fmt.Fscanln(p.Stdout, &endpoint); err != nil {
		p.Stop()
		return nil, "", p.ExitError()
	}
	return p, endpoint, nil
}
