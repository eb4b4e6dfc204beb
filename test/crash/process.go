//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/crashpoint"
)

const (
	startPatience = time.Minute // for a server to answer
	stopPatience  = 30 * time.Second
)

// server is a snapshotd that runs or has ended. It is killed when this process ends.
type server struct {
	c     *client.Client
	addr  string
	cmd   *exec.Cmd
	log   string        // file
	ended chan struct{} // closed once it is gone and state is set
	state *os.ProcessState

	aborted atomic.Int64 // answers of CREATE_ABORTED
}

// start configures the crash points of a server. The zero start has no crash.
type start struct {
	at      string // the crash; empty: none
	from    string // passes count from the creation of this file on; empty: from the start
	reached string // the file that receives the points that are reached; empty: none
}

// startServer starts the program bin on the data directory of a case, with additional
// settings in YAML. It does not wait until the program serves.
func startServer(ctx context.Context, bin, dir, settings string, how start, log string) (*server, error) {
	addr, err := freeAddr(ctx)
	if err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "snapshotd.yaml")
	text := fmt.Sprintf(`data_dir: %s
listen: %s
metrics_listen: "off"
leader_ttl: 2s
create_lease_ttl: 5s
collect_interval: 1s
collect_tolerance: 1ms
collect_max_share: 1
orphan_grace: 1h
grace: 5s
%s`, filepath.Join(dir, "data"), addr, settings)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	out, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	s := &server{addr: addr, log: log, ended: make(chan struct{})}
	s.cmd = exec.CommandContext(
		context.WithoutCancel(ctx),
		bin,
		"-config",
		config,
	) //nolint:gosec // the program that was built for this
	s.cmd.Env = append(os.Environ(),
		crashpoint.Variable+"="+how.at, crashpoint.FromVariable+"="+how.from, crashpoint.ReachedVariable+"="+how.reached)
	s.cmd.Stdout, s.cmd.Stderr = out, out
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error, 1)
	go func() {
		// The end of the thread that started the process sends the signal.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer func() { _ = out.Close() }()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			_ = s.cmd.Wait() // the state holds the result
			s.state = s.cmd.ProcessState
		}
		close(s.ended)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start snapshotd: %w", err)
	}
	if s.c, err = client.Dial(
		addr,
		client.Options{DialOptions: []grpc.DialOption{grpc.WithChainUnaryInterceptor(s.countAborted)}},
	); err != nil {
		s.kill()
		return nil, err
	}
	return s, nil
}

// countAborted counts answers of CREATE_ABORTED. The client hides them: it retries.
func (s *server) countAborted(
	ctx context.Context,
	method string,
	req, reply any,
	cc *grpc.ClientConn,
	invoke grpc.UnaryInvoker,
	opts ...grpc.CallOption,
) error {
	err := invoke(ctx, method, req, reply, cc, opts...)
	if client.Reason(err) == "CREATE_ABORTED" {
		s.aborted.Add(1)
	}
	return err
}

// errEnded means that the server ended during a wait for it.
var errEnded = errors.New("snapshotd has ended")

// serves waits until the server answers.
func (s *server) serves(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	ctx, done := s.whileRunning(ctx)
	defer done()
	_, err := s.c.Admin.GetServerInfo(ctx, &snapshotdv1.GetServerInfoRequest{}, grpc.WaitForReady(true))
	switch {
	case errors.Is(context.Cause(ctx), errEnded):
		return fmt.Errorf("%w: %s", errEnded, s.tail())
	case err != nil:
		return fmt.Errorf("snapshotd does not answer: %w", err)
	}
	return nil
}

// whileRunning returns a context that also ends with the server, with errEnded.
func (s *server) whileRunning(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-s.ended:
			cancel(errEnded)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil) }
}

// crashed waits until the server has killed itself at the point. Any other end, or
// none, is an error: the case is then inconclusive.
func (s *server) crashed(ctx context.Context, patience time.Duration, point string) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-s.ended:
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("inconclusive: %s was not reached in %v", point, patience)
	}
	status, ok := s.state.Sys().(syscall.WaitStatus)
	text, err := os.ReadFile(s.log)
	switch {
	case err != nil:
		return err
	case !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL || !bytes.Contains(text,
		[]byte("crash point "+point)):
		return fmt.Errorf("inconclusive: it did not end at %s: %v: %s", point, s.state, s.tail())
	}
	return nil
}

// stop ends the server with a signal, and kills it when it does not end.
func (s *server) stop() error {
	defer func() { _ = s.c.Close() }()
	_ = s.cmd.Process.Signal(syscall.SIGTERM)
	timer := time.NewTimer(stopPatience)
	defer timer.Stop()
	select {
	case <-s.ended:
	case <-timer.C:
		_ = s.cmd.Process.Kill()
		<-s.ended
		return fmt.Errorf("snapshotd does not end after SIGTERM: %s", s.tail())
	}
	if !s.state.Success() {
		return fmt.Errorf("snapshotd ended with %v: %s", s.state, s.tail())
	}
	return nil
}

// kill kills the server.
func (s *server) kill() {
	_ = s.cmd.Process.Kill()
	<-s.ended
	if s.c != nil {
		_ = s.c.Close()
	}
}

// tail returns the end of the server's log.
func (s *server) tail() string {
	text, _ := os.ReadFile(s.log)
	return string(text[max(0, len(text)-2000):])
}

// addrs counts the addresses that were used.
var addrs atomic.Uint32

// freeAddr returns a free loopback address. Each has a different host, so that servers
// that start at once are not mistaken for one another when a port is reused.
func freeAddr(ctx context.Context) (string, error) {
	n := addrs.Add(1)
	host := fmt.Sprintf("127.%d.%d.%d", 1+os.Getpid()%250, n/250%250, 1+n%250)
	l, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(host, "0"))
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// eventually calls check until it returns nil, and returns its last error after quiet.
func eventually(ctx context.Context, check func(context.Context) error) error {
	return within(ctx, quiet, check)
}

// within is eventually with another bound. Each call has a timeout of quiet, so that
// its error is the state that it found and not a timeout.
func within(ctx context.Context, patience time.Duration, check func(context.Context) error) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		once, cancel := context.WithTimeout(ctx, quiet)
		err := check(once)
		cancel()
		if err == nil {
			return nil
		}
		select {
		case <-timer.C:
			return fmt.Errorf("after %v: %w", patience, err)
		default:
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w; before that: %w", ctx.Err(), err)
		}
	}
}
