//go:build linux

// Package etcdcluster gives tests a real etcd of three members, each in a
// process of its own that a test can kill or stop.
//
// The processes are the test's own program over again, so a package that uses
// the cluster has a TestMain that begins with [Main].
package etcdcluster

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

// Members is how many members a cluster has.
const Members = 3

const (
	// variable makes a process a member, and names it.
	variable   = "ETCDCLUSTER_MEMBER"
	quotaBytes = 256 << 20
	patience   = 30 * time.Second
)

// member is the configuration of a process.
type member struct {
	Name    string
	Dir     string
	Client  string // URL
	Peer    string // URL
	Cluster string // all the members, as etcd has them
	Quota   int64  // bytes
}

// Main is for TestMain to begin with. In a process that is a member it serves
// until the process is killed; else it returns at once.
func Main() {
	text := os.Getenv(variable)
	if text == "" {
		return
	}
	fmt.Fprintln(os.Stderr, serve(text))
	os.Exit(1)
}

func serve(text string) error {
	var m member
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		return err
	}
	client, err := url.Parse(m.Client)
	if err != nil {
		return err
	}
	peer, err := url.Parse(m.Peer)
	if err != nil {
		return err
	}
	cfg := embed.NewConfig()
	cfg.Name, cfg.Dir = m.Name, m.Dir
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{*client}, []url.URL{*client}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{*peer}, []url.URL{*peer}
	cfg.InitialCluster = m.Cluster
	cfg.TickMs, cfg.ElectionMs = 50, 500
	cfg.UnsafeNoFsync = true // what is written outlives the process, if not the host
	cfg.QuotaBackendBytes = m.Quota
	cfg.EnableGRPCGateway = false
	cfg.LogLevel, cfg.LogOutputs = "warn", []string{embed.StdErrLogOutput}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return err
	}
	return <-e.Err()
}

// Cluster is a running cluster. Its methods are for one goroutine at a time.
type Cluster struct {
	dir       string
	members   [Members]member
	processes [Members]*process // nil while killed
	client    *clientv3.Client
}

// process is a member that runs.
type process struct {
	cmd    *exec.Cmd
	ended  chan struct{} // closed when it has
	paused bool
}

// Start starts a cluster of tb's own, which ends with it, and returns when all
// its members serve.
func Start(tb testing.TB) *Cluster {
	tb.Helper()
	return StartWithQuota(tb, quotaBytes)
}

// StartWithQuota is Start with members that are full at so many bytes.
func StartWithQuota(tb testing.TB, quota int64) *Cluster {
	tb.Helper()
	if os.Getenv(variable) != "" {
		tb.Fatal("TestMain does not begin with etcdcluster.Main")
	}
	dir, err := os.MkdirTemp("", "etcdcluster-") //nolint:usetesting // removed after the members have ended
	if err != nil {
		tb.Fatal(err)
	}
	c := &Cluster{dir: dir}
	tb.Cleanup(func() {
		for i := range c.processes {
			c.Kill(i)
		}
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	host := randomHost()
	var all []string
	for i := range c.members {
		name := fmt.Sprintf("m%d", i)
		m := member{
			Name:   name,
			Dir:    filepath.Join(dir, name),
			Client: freeURL(tb, host),
			Peer:   freeURL(tb, host),
			Quota:  quota,
		}
		c.members[i] = m
		all = append(all, name+"="+m.Peer)
	}
	for i := range c.members {
		c.members[i].Cluster = strings.Join(all, ",")
	}
	c.client, err = clientv3.New(clientv3.Config{Endpoints: c.Endpoints(), Logger: zap.NewNop()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.client.Close() })
	for i := range c.members {
		c.run(tb, i)
	}
	for i := range c.members {
		c.serves(tb, i)
	}
	return c
}

// Endpoints returns the addresses of all members, the same after a Restart.
func (c *Cluster) Endpoints() []string {
	list := make([]string, Members)
	for i, m := range c.members {
		list[i] = strings.TrimPrefix(m.Client, "http://")
	}
	return list
}

// Leader returns the member that leads, for which it waits. Those that are
// killed or paused are not asked.
func (c *Cluster) Leader(tb testing.TB) int {
	tb.Helper()
	leader := -1
	await(tb, "a member leads", func(ctx context.Context) bool {
		term := uint64(0)
		for i, p := range c.processes {
			if p == nil || p.paused {
				continue
			}
			s, err := c.status(ctx, i)
			// Of two that think they lead, one has not heard of the other yet.
			if err == nil && s.Leader == s.Header.GetMemberId() && s.RaftTerm > term {
				leader, term = i, s.RaftTerm
			}
		}
		return leader >= 0
	})
	return leader
}

// Kill ends a member without warning. What it wrote stays. Killing twice is the
// same as once.
func (c *Cluster) Kill(i int) {
	if p := c.processes[i]; p != nil {
		_ = p.cmd.Process.Kill()
		<-p.ended
		c.processes[i] = nil
	}
}

// Restart starts a member that was killed, with its data and under its address.
// It returns when the member serves, for which a majority must run.
func (c *Cluster) Restart(tb testing.TB, i int) {
	tb.Helper()
	c.run(tb, i)
	c.serves(tb, i)
}

// RestartAll is Restart of several members, of which none serves without the
// others.
func (c *Cluster) RestartAll(tb testing.TB, members ...int) {
	tb.Helper()
	for _, i := range members {
		c.run(tb, i)
	}
	for _, i := range members {
		c.serves(tb, i)
	}
}

// fillPrefix is that of the keys that [Cluster.Fill] writes.
const fillPrefix = "/etcdcluster-fill/"

// Fill writes until the members take no more, and says whether they were full in
// the end: false when ctx ended first.
func (c *Cluster) Fill(ctx context.Context) (full bool, err error) {
	const each = 512 << 10
	value := strings.Repeat("x", each)
	for i := 0; ; i++ {
		_, err := c.client.Put(ctx, fmt.Sprint(fillPrefix, i), value)
		switch {
		case errors.Is(err, rpctypes.ErrNoSpace):
			return true, nil
		case ctx.Err() != nil:
			return false, nil //nolint:nilerr // the answer reports the end of ctx
		case err != nil:
			return false, err
		}
	}
}

// MakeRoom deletes what Fill wrote, gives its room back and lifts the alarm, as an
// operator does.
func (c *Cluster) MakeRoom(ctx context.Context) error {
	gone, err := c.client.Delete(ctx, fillPrefix, clientv3.WithPrefix())
	if err != nil {
		return err
	}
	if _, err := c.client.Compact(ctx, gone.Header.GetRevision(), clientv3.WithCompactPhysical()); err != nil {
		return err
	}
	for _, endpoint := range c.Endpoints() {
		if _, err := c.client.Defragment(ctx, endpoint); err != nil {
			return err
		}
	}
	_, err = c.client.AlarmDisarm(ctx, &clientv3.AlarmMember{})
	return err
}

// Revoke ends the lease that a key is held by, as a third party that may do so does,
// and returns the id of that lease: 0 when there is no such key, or no lease.
func (c *Cluster) Revoke(ctx context.Context, key string) (lease int64, err error) {
	if lease, err = c.Lease(ctx, key); err != nil || lease == 0 {
		return 0, err
	}
	_, err = c.client.Revoke(ctx, clientv3.LeaseID(lease))
	return lease, err
}

// Lease returns the id of the lease that a key is held by, 0 when there is none.
func (c *Cluster) Lease(ctx context.Context, key string) (int64, error) {
	got, err := c.client.Get(ctx, key)
	if err != nil || len(got.Kvs) == 0 {
		return 0, err
	}
	return got.Kvs[0].Lease, nil
}

// Read returns the keys under a prefix, with what they hold, and the revision.
func (c *Cluster) Read(ctx context.Context, prefix string) (kvs map[string]string, revision int64, err error) {
	got, err := c.client.Get(ctx, prefix, clientv3.WithPrefix())
	if err != nil {
		return nil, 0, err
	}
	kvs = map[string]string{}
	for _, kv := range got.Kvs {
		kvs[string(kv.Key)] = string(kv.Value)
	}
	return kvs, got.Header.GetRevision(), nil
}

// Compact has the members forget all revisions before this one.
func (c *Cluster) Compact(ctx context.Context, revision int64) error {
	_, err := c.client.Compact(ctx, revision, clientv3.WithCompactPhysical())
	return err
}

// Pause stops a member: it keeps its connections, and is silent on them.
func (c *Cluster) Pause(i int) { c.pause(i, true) }

// Resume has a paused member go on as if nothing had been.
func (c *Cluster) Resume(i int) { c.pause(i, false) }

func (c *Cluster) pause(i int, paused bool) {
	p := c.processes[i]
	if p == nil {
		return
	}
	signal := syscall.SIGCONT
	if paused {
		signal = syscall.SIGSTOP
	}
	_ = p.cmd.Process.Signal(signal) // fails only when it has ended
	p.paused = paused
}

// KV opens a client of all members, under a root of its own. It is
// closed with the test.
func (c *Cluster) KV(tb testing.TB) *etcd.Client {
	tb.Helper()
	return c.KVAt(tb, "/"+rand.Text())
}

// KVAt is KV under a root that the test chooses, so that it can open several
// clients of one store.
func (c *Cluster) KVAt(tb testing.TB, root string) *etcd.Client {
	tb.Helper()
	kv, err := etcd.Open(etcd.Options{Endpoints: c.Endpoints(), Root: root, RequestTimeout: 3 * time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := kv.Close(); err != nil {
			tb.Error(err)
		}
	})
	return kv
}

// Shrink gives back the room of all that was deleted from the server at
// endpoint, or written over. The alarm of a server that was full stays.
func Shrink(tb testing.TB, endpoint string) {
	tb.Helper()
	cli, err := clientv3.New(clientv3.Config{Endpoints: []string{endpoint}, Logger: zap.NewNop()})
	if err != nil {
		tb.Fatal(err)
	}
	defer func() { _ = cli.Close() }()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	now, err := cli.Get(ctx, "/")
	if err == nil {
		_, err = cli.Compact(ctx, now.Header.GetRevision(), clientv3.WithCompactPhysical())
	}
	if err == nil {
		_, err = cli.Defragment(ctx, endpoint)
	}
	if err != nil {
		tb.Fatal(err)
	}
}

// run starts a member's process, which lives until Kill or the end of this one.
func (c *Cluster) run(tb testing.TB, i int) {
	tb.Helper()
	if c.processes[i] != nil {
		tb.Fatalf("member %d runs", i)
	}
	text, err := json.Marshal(c.members[i])
	if err != nil {
		tb.Fatal(err)
	}
	program, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := os.OpenFile(c.log(i), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), program) // until it is killed
	cmd.Env = append(os.Environ(), variable+"="+string(text))
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
		tb.Fatal(err)
	}
	c.processes[i] = &process{cmd: cmd, ended: ended}
}

func (c *Cluster) log(i int) string { return filepath.Join(c.dir, c.members[i].Name+".log") }

// serves waits until a member serves and knows who leads.
func (c *Cluster) serves(tb testing.TB, i int) {
	tb.Helper()
	await(tb, fmt.Sprintf("member %d serves", i), func(ctx context.Context) bool {
		select {
		case <-c.processes[i].ended:
			text, _ := os.ReadFile(c.log(i))
			tb.Fatalf("member %d ended: %s", i, text)
		default:
		}
		s, err := c.status(ctx, i)
		return err == nil && s.Leader != 0
	})
}

func (c *Cluster) status(ctx context.Context, i int) (*clientv3.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	return c.client.Status(ctx, c.Endpoints()[i])
}

// await waits for a condition.
func await(tb testing.TB, what string, done func(context.Context) bool) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done(ctx) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			tb.Fatalf("not in time: %s", what)
		}
	}
}

// randomHost returns a loopback address of a cluster's own. The ports of
// 127.0.0.1 are also handed out to clients, which may have taken a member's
// while it was down.
func randomHost() string {
	b := make([]byte, 3)
	_, _ = rand.Read(b) // never fails
	for i := range b {
		b[i] = b[i]%254 + 1
	}
	return net.IP(slices.Concat([]byte{127}, b)).String()
}

func freeURL(tb testing.TB, host string) string {
	tb.Helper()
	l, err := (&net.ListenConfig{}).Listen(tb.Context(), "tcp", net.JoinHostPort(host, "0"))
	if err == nil {
		err = errors.Join(err, l.Close())
	}
	if err != nil {
		tb.Fatal(err)
	}
	return "http://" + l.Addr().String()
}
