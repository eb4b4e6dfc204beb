//go:build oldetcd

package etcd_test

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

// The etcd of Debian 12 is refused. `make old-etcd` downloads it and sets OLD_ETCD.
func TestRealOldEtcd(t *testing.T) {
	program := os.Getenv("OLD_ETCD")
	if program == "" {
		t.Fatal("OLD_ETCD does not name the program of an old etcd")
	}
	var listen net.ListenConfig
	var urls [2]string
	for i := range urls {
		l, err := listen.Listen(t.Context(), "tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		urls[i] = "http://" + l.Addr().String()
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(t.Context(), program, "--data-dir", filepath.Join(t.TempDir(), "etcd"),
		"--listen-client-urls", urls[0], "--advertise-client-urls", urls[0], "--listen-peer-urls", urls[1],
		"--initial-advertise-peer-urls", urls[1], "--initial-cluster", "default="+urls[1], "--log-level", "error")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	kv := open(t, etcd.Options{
		Endpoints: []string{strings.TrimPrefix(urls[0], "http://")}, Root: "/old",
		RequestTimeout: 30 * time.Second,
	})
	if err := kv.Check(t.Context()); !errors.Is(err, meta.ErrTooOld) {
		t.Fatalf("got error %v, want too old", err)
	}
	t.Log(kv.TooOld())
	if err := get(t.Context(), kv); !errors.Is(err, meta.ErrTooOld) {
		t.Errorf("get: got error %v, want too old", err)
	}
}
