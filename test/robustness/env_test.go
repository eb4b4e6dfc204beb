//go:build robustness && linux

package robustness

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
	"github.com/snapshotd/snapshotd/test/etcdcluster"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/s3fault"
	"github.com/snapshotd/snapshotd/test/s3test"
)

const (
	replicas     = 3
	patience     = time.Minute   // for a success without faults
	defaultQuota = 256 << 20     // bytes of etcd
	age          = 2 * time.Hour // of every object in listings
	root         = "/snapshotd"  // of the replicas' keys in etcd
)

// settings are the settings of every replica. Times are short, so that what takes minutes
// happens in a run. A sweep deletes only objects that are an hour old, so listings
// report that of all.
const settings = `leader_ttl: 2s
create_lease_ttl: 2s
create_timeout: 30s
collect_interval: 1s
collect_tolerance: 1ms
collect_max_share: 1
orphan_grace: 1h
grace: 3s
metrics_listen: "off"
log_level: info
`

// env is the environment of a scenario. It ends with the test.
type env struct {
	tb       testing.TB
	dir      string
	begin    time.Time
	etcd     *etcdcluster.Cluster
	members  []*etcdproxy.Proxy // between the replicas and the members, if any
	store    *awss3.Client      // straight to the S3 server, past the proxy
	bucket   string
	proxy    *s3fault.Proxy
	replicas [replicas]*replica

	mu        sync.Mutex
	deletions []deletion
	fired     map[string]int // faults by what was planned
}

// now is the time since the scenario began.
func (e *env) now() moment { return moment(time.Since(e.begin)) }

// firedAll reports whether each of these faults was counted.
func (e *env) firedAll(planned []string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return !slices.ContainsFunc(planned, func(what string) bool { return e.fired[what] == 0 })
}

// fire counts faults whose effect was observed.
func (e *env) fire(what string, n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fired[what] += n
}

// newEnv starts the servers and waits until each serves. Bin is snapshotd.
func newEnv(tb testing.TB, bin, dir string, quota int64, proxied bool) *env {
	tb.Helper()
	e := &env{tb: tb, dir: dir, begin: time.Now(), fired: map[string]int{}}
	s3 := s3test.Start(tb)
	o := s3.Bucket(tb)
	e.store, e.bucket = s3.Client(), o.Bucket
	e.proxy = s3fault.New(tb, s3.Endpoint())
	e.proxy.Age(age)
	e.proxy.OnRequest(func(a s3fault.ServerRequest) {
		e.mu.Lock()
		defer e.mu.Unlock()
		for _, key := range a.Deletes {
			e.deletions = append(e.deletions, deletion{key, e.now()})
		}
	})
	e.etcd = etcdcluster.StartWithQuota(tb, quota)
	host := randomHost()
	endpoints := e.etcd.Endpoints()
	if proxied {
		for i, member := range endpoints {
			p := etcdproxy.StartAt(tb, member, net.JoinHostPort(host, "0"))
			e.members = append(e.members, p)
			endpoints[i] = p.Endpoint()
		}
	}
	for i := range e.replicas {
		p := &replica{tb: tb, name: fmt.Sprintf("r%d", i), bin: bin}
		var addrs []string
		for _, member := range endpoints {
			l := newLink(tb, host, member)
			p.links = append(p.links, l)
			addrs = append(addrs, fmt.Sprintf("%q", l.addr()))
		}
		p.store = newLink(tb, host, strings.TrimPrefix(e.proxy.URL(), "http://"))
		p.listen = freeAddr(tb, host)
		p.config, p.log = filepath.Join(dir, p.name+".yaml"), filepath.Join(dir, p.name+".log")
		text := fmt.Sprintf(`data_dir: %s
replica: %s
listen: %s
etcd_endpoints: [%s]
object_stores:
  default:
    type: s3
    bucket: %s
    endpoint: http://%s
    path_style: true
%s`, filepath.Join(dir, p.name), p.name, p.listen, strings.Join(addrs, ", "), e.bucket, p.store.addr(), settings)
		if err := os.WriteFile(p.config, []byte(text), 0o600); err != nil {
			tb.Fatal(err)
		}
		c, err := client.Dial(p.listen, client.Options{MaxAttempts: 1})
		if err != nil {
			tb.Fatal(err)
		}
		p.client = c
		tb.Cleanup(func() {
			p.kill()
			_ = c.Close()
		})
		p.start(tb.Context())
		e.replicas[i] = p
	}
	for _, p := range e.replicas {
		e.serves(tb.Context(), p)
	}
	return e
}

// serves waits until a replica answers.
func (e *env) serves(ctx context.Context, p *replica) {
	e.tb.Helper()
	if !e.await(ctx, func(ctx context.Context) bool {
		_, err := p.client.Admin.GetServerInfo(ctx, &snapshotdv1.GetServerInfoRequest{})
		return err == nil
	}) {
		e.tb.Fatalf("%s does not serve: %s", p.name, p.tail())
	}
}

// leads returns the leader that any replica knows, unless it is left out, or nil when the
// context ends first.
func (e *env) leads(ctx context.Context, not ...*replica) *replica {
	var leader *replica
	e.await(ctx, func(ctx context.Context) bool {
		for _, asked := range e.replicas {
			ctx, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
			info, err := asked.client.Admin.GetServerInfo(ctx, &snapshotdv1.GetServerInfoRequest{})
			cancel()
			if err != nil {
				continue
			}
			for _, p := range e.replicas {
				if p.name != info.GetLeader() {
					continue
				}
				leader = p
				for _, n := range not {
					if n == p {
						leader = nil
					}
				}
				if leader != nil {
					return true
				}
			}
		}
		return false
	})
	return leader
}

// await polls until done returns true. It returns false after its patience.
func (e *env) await(ctx context.Context, done func(context.Context) bool) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		each, stop := context.WithTimeout(ctx, 3*time.Second)
		ok := done(each)
		stop()
		if ok {
			return true
		}
		if wait(ctx, 50*time.Millisecond) != nil {
			return false
		}
	}
}

// wait waits, or returns the error of a context that ended before.
func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// replica is a snapshotd that runs, or was killed. Its methods are for one
// goroutine at a time.
type replica struct {
	tb     testing.TB
	name   string
	bin    string
	config string
	log    string
	listen string
	links  []*link // to the members of etcd
	store  *link   // to the S3 server's proxy
	client *client.Client

	cmd   *exec.Cmd     // nil while killed
	ended chan struct{} // closed once it is gone
}

// start starts the process, which outlives ctx, and does not wait until it serves.
func (p *replica) start(ctx context.Context) {
	p.tb.Helper()
	out, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		p.tb.Fatal(err)
	}
	cmd := exec.CommandContext(context.WithoutCancel(ctx), p.bin, "serve", "--config", p.config) // until it is killed
	cmd.Env = append(
		os.Environ(),
		"AWS_ACCESS_KEY_ID="+s3test.AccessKeyID,
		"AWS_SECRET_ACCESS_KEY="+s3test.SecretAccessKey,
		"AWS_CA_BUNDLE=",
	)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// The signal comes when the thread that started the process ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer close(ended)
		defer func() { _ = out.Close() }()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		p.tb.Fatal(err)
	}
	p.cmd, p.ended = cmd, ended
}

// kill ends the process without warning. Killing twice is the same as once.
func (p *replica) kill() {
	if p.cmd != nil {
		_ = p.cmd.Process.Kill()
		<-p.ended
		p.cmd = nil
	}
}

// freeze stops the process, and thaw resumes it.
func (p *replica) freeze() { _ = p.cmd.Process.Signal(syscall.SIGSTOP) }

func (p *replica) thaw() {
	if p.cmd != nil {
		_ = p.cmd.Process.Signal(syscall.SIGCONT)
	}
}

// endedItself reports whether the process ended without a kill.
func (p *replica) endedItself() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

func (p *replica) tail() string {
	text, _ := os.ReadFile(p.log)
	return string(text[max(0, len(text)-3000):])
}

// logged returns the number of lines of the replica's log that contain a text.
func (p *replica) logged(text string) (n int) {
	log, _ := os.ReadFile(p.log)
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

// cut breaks the links of the replica to etcd, and refuses new connections, until heal.
// It returns the number of broken connections.
func (p *replica) cut() (n int) {
	for _, l := range p.links {
		n += l.cut()
	}
	return n
}

// hinder delays what the replica's links to etcd carry in a direction, until heal.
func (p *replica) hinder(way direction, lag time.Duration) {
	for _, l := range p.links {
		l.hinder(way, lag)
	}
}

// heal ends cut and hinder. It returns the number of delayed pieces.
func (p *replica) heal() (held int) {
	for _, l := range p.links {
		held += l.heal()
	}
	return held
}

// randomHost returns a random loopback address. Clients use ports of 127.0.0.1, and could
// take the port of a replica that is down.
func randomHost() string {
	b := make([]byte, 3)
	_, _ = rand.Read(b) // never fails
	for i := range b {
		b[i] = b[i]%254 + 1
	}
	return net.IPv4(127, b[0], b[1], b[2]).String()
}

func freeAddr(tb testing.TB, host string) string {
	tb.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
	if err == nil {
		err = errors.Join(err, l.Close())
	}
	if err != nil {
		tb.Fatal(err)
	}
	return l.Addr().String()
}
