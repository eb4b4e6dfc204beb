package embed

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/test/etcdtest"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestRoomGetsShort(t *testing.T) {
	core, logs := observer.New(zapcore.InfoLevel)
	usage := etcd.Usage{Endpoint: "e", QuotaBytes: 1000}
	r := &room{log: zap.New(core), read: func(context.Context) ([]etcd.Usage, error) { return []etcd.Usage{usage}, nil }}
	for _, c := range []struct {
		counted int64
		want    int // lines of the log, in all
	}{{599, 0}, {600, 1}, {800, 1}, {500, 2}, {700, 3}} {
		usage.CountedBytes = c.counted
		r.look(t.Context())
		if logs.Len() != c.want {
			t.Errorf("at %d of 1000: %d lines, want %d: %v", c.counted, logs.Len(), c.want, logs.All())
		}
	}
}

// What is not known has no number: that of a server that does not answer, a quota that
// the server does not say, and all when none answers.
func TestRoomIsNotKnown(t *testing.T) {
	var list []etcd.Usage
	var err error
	r := &room{log: zap.NewNop(), read: func(context.Context) ([]etcd.Usage, error) { return list, err }}
	one, two := etcd.Usage{Endpoint: "one", SizeBytes: 1, QuotaBytes: 10}, etcd.Usage{Endpoint: "two", SizeBytes: 2, Full: true}
	for _, c := range []struct {
		list []etcd.Usage
		err  error
		want int // numbers
	}{
		{[]etcd.Usage{one, two}, nil, 7},
		{[]etcd.Usage{one}, nil, 4},
		{nil, meta.ErrUnavailable, 0},
		{[]etcd.Usage{two}, nil, 3},
	} {
		list, err = c.list, c.err
		r.look(t.Context())
		metrics := make(chan prometheus.Metric, 100)
		r.Collect(metrics)
		if len(metrics) != c.want {
			t.Errorf("%+v, %v: %d numbers, want %d", c.list, c.err, len(metrics), c.want)
		}
	}
}

// What is kept for drops begins before etcd's own quota.
func TestRoomIsNearlyFull(t *testing.T) {
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
		r := &room{log: zap.NewNop(), read: nearlyFull(func(context.Context) ([]etcd.Usage, error) { return []etcd.Usage{c.usage}, nil })}
		r.look(t.Context())
		if r.full() != c.want {
			t.Errorf("%+v: full %v, want %v", c.usage, r.full(), c.want)
		}
	}
}

// An etcd that is never compacted is called so after an hour, once, and no longer when
// it moves; one that is not written to is left in peace.
func TestHistoryIsStuck(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		kv := memory.New(memory.Options{Now: time.Now})
		h := &history{kv: kv, log: zap.New(core), now: time.Now}
		look := func(d time.Duration, write bool, want int) {
			t.Helper()
			for range d / time.Minute {
				time.Sleep(time.Minute)
				if write {
					put(t, kv)
				}
				if err := h.look(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if logs.Len() != want {
				t.Fatalf("%d lines, want %d: %v", logs.Len(), want, logs.All())
			}
		}
		look(3*time.Hour, false, 0)
		revision := put(t, kv)
		look(3*time.Hour, true, 1)
		if err := kv.Compact(t.Context(), revision); err != nil {
			t.Fatal(err)
		}
		look(50*time.Minute, true, 2)
		if h.oldest != revision {
			t.Errorf("the oldest revision is %d, want %d", h.oldest, revision)
		}
		look(30*time.Minute, true, 3)
	})
}

// With etcd_compact it is compacted, to an hour ago.
func TestHistoryIsCompacted(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		kv := memory.New(memory.Options{Now: time.Now})
		h := &history{kv: kv, log: zap.New(core), now: time.Now, compact: kv.Compact}
		var at []int64
		for range 5 * 60 {
			at = append(at, put(t, kv))
			if err := h.look(t.Context()); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Minute)
		}
		if n := len(at); h.oldest < at[n-1-60-6] || h.oldest > at[n-1-59] {
			t.Errorf("the oldest revision is %d, want that of an hour ago, %d", h.oldest, at[n-1-60])
		}
		if logs.Len() > 0 {
			t.Errorf("logged: %v", logs.All())
		}
	})
}

// An etcd of others is compacted when etcd_compact says so, and never otherwise: then it
// is said that nothing compacts it.
func TestEtcdOfOthersIsCompactedWhenAsked(t *testing.T) {
	server := etcdtest.Start(t)
	for _, compacts := range []bool{false, true} {
		t.Run(fmt.Sprintf("etcd_compact=%v", compacts), func(t *testing.T) {
			core, logs := observer.New(zapcore.InfoLevel)
			cfg := Config{EtcdEndpoints: []string{server.Endpoint()}, EtcdRoot: "/" + rand.Text(), EtcdCompact: compacts}
			var open closers
			p := &parts{}
			kv, err := openMeta(t.Context(), cfg, zap.New(core), &open, p)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = open.close() }()
			first, now := put(t, kv), time.Now()
			p.history.now = func() time.Time { return now }
			for range 3 {
				put(t, kv)
				if err := p.history.look(t.Context()); err != nil {
					t.Fatal(err)
				}
				now = now.Add(time.Hour)
			}
			_, err = kv.Range(t.Context(), meta.Range{From: keys.Format, Revision: first})
			if gone := errors.Is(err, meta.ErrCompacted); gone != compacts {
				t.Errorf("reading what is three hours old ended with %v", err)
			}
			said := logs.FilterMessageSnippet("has not been compacted for an hour").Len()
			if said > 0 == compacts {
				t.Errorf("it was said %d times that nothing compacts it: %v", said, logs.All())
			}
		})
	}
}

func put(t *testing.T, kv meta.KV) int64 {
	t.Helper()
	res, err := kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(keys.Format, fmt.Append(nil, time.Now()))}})
	if err != nil {
		t.Fatal(err)
	}
	return res.Revision
}

// A start waits for etcd to read its data, however long that takes.
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
		t.Errorf("it started after %v, before etcd could", took)
	}
	if err := srv.Close(); err != nil {
		t.Fatal(err)
	}
}
