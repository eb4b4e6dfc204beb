package embed

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/test/etcdtest"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// TestUncompactedHistoryIsLogged logs an uncompacted etcd once after an hour, again
// after a compaction, and never without writes.
func TestUncompactedHistoryIsLogged(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		kv := memory.New(memory.Options{Now: time.Now})
		h := &history{kv: kv, log: zap.New(core), now: time.Now}
		advance := func(d time.Duration, write bool, want int) {
			t.Helper()
			for range d / time.Minute {
				time.Sleep(time.Minute)
				if write {
					put(t, kv)
				}
				if err := h.update(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			if logs.Len() != want {
				t.Fatalf("%d lines, want %d: %v", logs.Len(), want, logs.All())
			}
		}
		advance(3*time.Hour, false, 0)
		revision := put(t, kv)
		advance(3*time.Hour, true, 1)
		if err := kv.Compact(t.Context(), revision); err != nil {
			t.Fatal(err)
		}
		advance(50*time.Minute, true, 2)
		if h.oldest != revision {
			t.Errorf("the oldest revision is %d, want %d", h.oldest, revision)
		}
		advance(30*time.Minute, true, 3)
	})
}

// TestHistoryIsCompacted compacts to the revision of an hour ago.
func TestHistoryIsCompacted(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		core, logs := observer.New(zapcore.InfoLevel)
		kv := memory.New(memory.Options{Now: time.Now})
		h := &history{kv: kv, log: zap.New(core), now: time.Now, compact: kv.Compact}
		var at []int64
		for range 5 * 60 {
			at = append(at, put(t, kv))
			if err := h.update(t.Context()); err != nil {
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

// TestExternalEtcdIsCompactedOnlyBySetting compacts an external etcd with etcd_compact;
// without, it only logs that nothing compacts it.
func TestExternalEtcdIsCompactedOnlyBySetting(t *testing.T) {
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
				if err := p.history.update(t.Context()); err != nil {
					t.Fatal(err)
				}
				now = now.Add(time.Hour)
			}
			_, err = kv.Range(t.Context(), meta.Range{From: keys.Format, Revision: first})
			if gone := errors.Is(err, meta.ErrCompacted); gone != compacts {
				t.Errorf("read a revision of three hours ago: error %v", err)
			}
			warnings := logs.FilterMessageSnippet("has not been compacted for an hour").Len()
			if warnings > 0 == compacts {
				t.Errorf("%d warnings about a missing compaction: %v", warnings, logs.All())
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
