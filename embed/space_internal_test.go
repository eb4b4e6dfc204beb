package embed

import (
	"context"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
)

// TestSpaceAlarm logs each crossing of the alarm once.
func TestSpaceAlarm(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	usage := etcd.Usage{Endpoint: "e", QuotaBytes: 1000}
	s := &space{log: zap.New(core), read: func(context.Context) ([]etcd.Usage, error) { return []etcd.Usage{usage}, nil }}
	for _, c := range []struct {
		counted int64
		want    int // lines of the log, in all
	}{{599, 0}, {600, 1}, {800, 1}, {500, 2}, {700, 3}} {
		usage.CountedBytes = c.counted
		s.update(t.Context())
		if logs.Len() != c.want {
			t.Errorf("at %d of 1000: %d lines, want %d: %v", c.counted, logs.Len(), c.want, logs.All())
		}
	}
}

// TestUnknownSpaceHasNoMetrics leaves out servers that do not answer and unknown quotas.
func TestUnknownSpaceHasNoMetrics(t *testing.T) {
	var list []etcd.Usage
	var err error
	s := &space{log: zap.NewNop(), read: func(context.Context) ([]etcd.Usage, error) { return list, err }}
	one, two := etcd.Usage{Endpoint: "one", SizeBytes: 1, QuotaBytes: 10}, etcd.Usage{
		Endpoint: "two", SizeBytes: 2,
		Full: true,
	}
	for _, c := range []struct {
		list []etcd.Usage
		err  error
		want int // metrics
	}{
		{[]etcd.Usage{one, two}, nil, 7},
		{[]etcd.Usage{one}, nil, 4},
		{nil, meta.ErrUnavailable, 0},
		{[]etcd.Usage{two}, nil, 3},
	} {
		list, err = c.list, c.err
		s.update(t.Context())
		metrics := make(chan prometheus.Metric, 100)
		s.Collect(metrics)
		if len(metrics) != c.want {
			t.Errorf("%+v, %v: %d metrics, want %d", c.list, c.err, len(metrics), c.want)
		}
	}
}

// TestFullSpaceBeforeQuota has the reserve for drops begin below etcd's own quota.
func TestFullSpaceBeforeQuota(t *testing.T) {
	for _, c := range []struct {
		usage etcd.Usage
		want  bool
	}{
		{etcd.Usage{SizeBytes: 899, InUseBytes: 899, QuotaBytes: 1000}, false},
		{etcd.Usage{SizeBytes: 900, InUseBytes: 800, QuotaBytes: 1000}, true},
		{etcd.Usage{SizeBytes: 999, InUseBytes: 700, QuotaBytes: 1000}, false},
		{etcd.Usage{SizeBytes: 100, InUseBytes: 100, QuotaBytes: 1000, Full: true}, true},
		{etcd.Usage{SizeBytes: 900, InUseBytes: 800}, false},
	} {
		s := &space{log: zap.NewNop(), read: nearlyFull(func(context.Context) ([]etcd.Usage, error) {
			return []etcd.Usage{c.usage}, nil
		})}
		s.update(t.Context())
		if s.full() != c.want {
			t.Errorf("%+v: full %v, want %v", c.usage, s.full(), c.want)
		}
	}
}

// TestSlowEtcdStart has etcd take longer than startTimeout to read its data.
func TestSlowEtcdStart(t *testing.T) {
	cfg := Config{DataDir: t.TempDir(), Listen: "127.0.0.1:0", MetricsListen: "off", Log: zap.NewNop()}
	srv, err := Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(filepath.Join(cfg.DataDir, "etcd", "data", "member", "snap", "db"))
	if err != nil {
		t.Fatal(err)
	}
	// etcd waits for the lock on its database.
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	normal := startTimeout
	startTimeout = 2 * time.Second
	defer func() { startTimeout = normal }()
	began := time.Now()
	time.AfterFunc(startTimeout+time.Second, func() { _ = file.Close() })
	srv, err = Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < startTimeout {
		t.Errorf("the server started after %v, before etcd", took)
	}
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
}
