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
	patience  = 30 * time.Second // for a process to answer
	stopGrace = 15 * time.Second
)

// Process is a running child. It is killed when this process ends, in whatever
// way.
type Process struct {
	// Stdin and Stdout are pipes to the child.
	Stdin  io.WriteCloser
	Stdout io.Reader

	name  string
	log   string
	cmd   *exec.Cmd
	ended chan struct{}
}

// Command is what to run.
type Command struct {
	Name string   // for people
	Args []string // the program first
	Env  []string // besides this process's own
	Log  string   // file for standard error
	// Pipes gives Process.Stdin and Stdout; without them the output goes to Log.
	Pipes bool
}

// Start starts a child. It outlives ctx, until Stop.
func Start(ctx context.Context, c Command) (*Process, error) {
	out, err := os.Create(c.Log)
	if err != nil {
		return nil, err
	}
	p := &Process{name: c.Name, log: c.Log, ended: make(chan struct{})}
	p.cmd = exec.CommandContext(context.WithoutCancel(ctx), c.Args[0], c.Args[1:]...) //nolint:gosec // a benchmark's own
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
		// The signal comes when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(p.ended)
		defer func() { _ = out.Close() }()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_, _ = p.cmd.Process.Wait() // Wait of cmd would close the pipes under a reader
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Name, err)
	}
	return p, nil
}

// StartSelf starts this program as a child that answers [Process.Ask].
func StartSelf(ctx context.Context, dir, what string, args ...string) (*Process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return Start(ctx, Command{
		Name: what, Args: append([]string{self, "child", what}, args...), Log: filepath.Join(dir, what+".log"), Pipes: true,
	})
}

// Ask sends the child a line of JSON and reads one. Out reads from its Stdout.
// The end of ctx kills the child.
func (p *Process) Ask(ctx context.Context, out *bufio.Reader, question, answer any) error {
	defer context.AfterFunc(ctx, p.Kill)()
	if err := json.NewEncoder(p.Stdin).Encode(question); err != nil {
		return err
	}
	line, err := out.ReadBytes('\n')
	if err != nil {
		return errors.Join(err, p.Failed())
	}
	return json.Unmarshal(line, answer)
}

// Pid is the child's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Used is the processor time that the child has taken so far, in seconds, or 0.
func (p *Process) Used() float64 {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.Pid()))
	if err != nil {
		return 0
	}
	const hertz = 100 // of the clock ticks of Linux
	rest := string(text[bytes.LastIndexByte(text, ')')+1:])
	fields := strings.Fields(rest) // from the third on
	if len(fields) < 13 {
		return 0
	}
	user, _ := strconv.ParseFloat(fields[11], 64)
	system, _ := strconv.ParseFloat(fields[12], 64)
	return (user + system) / hertz
}

// Stop asks the child to end, and kills it when it does not.
func (p *Process) Stop() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(stopGrace):
		_ = p.cmd.Process.Kill()
		<-p.ended
	}
}

// Kill kills the child without asking.
func (p *Process) Kill() { _ = p.cmd.Process.Kill() }

// Failed is the error of a child that ended by itself, with the end of its log.
func (p *Process) Failed() error {
	text, _ := os.ReadFile(p.log)
	return fmt.Errorf("%s ended: %s", p.name, text[max(0, len(text)-2000):])
}

// Await waits until url answers with 200.
func (p *Process) Await(ctx context.Context, url string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if answers(ctx, url) {
			return nil
		}
		select {
		case <-tick.C:
		case <-p.ended:
			return p.Failed()
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer: %w", p.name, ctx.Err())
		}
	}
}

func answers(ctx context.Context, url string) bool {
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

// The credentials of the S3 server that a benchmark starts.
const (
	AccessKeyID     = "benchaccesskeyid"
	SecretAccessKey = "benchsecretaccesskey" //nolint:gosec // of a server on the loopback address
)

// StartS3 starts versitygw, the program at bin, on dir with a bucket, and
// returns its address as host:port.
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
		side := filepath.Join(dir, "s3-metadata") // where the file system has no attributes
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
	if err := p.Await(ctx, "http://"+addr+"/health"); err != nil {
		p.Stop()
		return nil, "", err
	}
	return p, addr, nil
}

// StartEtcd starts the program of test/bench/etcd at bin, on dir, and
// returns its endpoint.
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
		return nil, "", p.Failed()
	}
	return p, endpoint, nil
}
