//go:build !short

package etcd_test

import (
	"context"
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

func TestEtcd(t *testing.T) {
	metatest.Run(t, func(t *testing.T) metatest.Store { return etcdtest.Shared(t).KV(t) })
}

// A server without RangeStream is read in pages.
func TestEtcdWithoutStream(t *testing.T) {
	old := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	old.WithoutRangeStream()
	kv := open(t, etcd.Options{Endpoints: []string{old.Endpoint()}, Root: "/" + crand.Text()})
	ctx := t.Context()
	const n = 1000 // several pages, the last one full or not
	var at int64
	for i := 0; i < n; {
		var ops []meta.Op
		for ; i < n && len(ops) < meta.MaxTxnOps; i++ {
			ops = append(ops, meta.Put(fmt.Sprintf("/k/%04d", i), []byte("old")))
		}
		res, err := kv.Txn(ctx, meta.Txn{Then: ops})
		if err != nil {
			t.Fatal(err)
		}
		at = res.Revision
	}
	if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/k/0500", nil), meta.Delete("/k/0999")}}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		to   string
		want int
	}{{"/k0", n}, {"/k/0256", 256}, {"/k/0001", 1}, {"/k/0000", 0}} {
		got := 0
		rev, err := kv.Scan(ctx, "/k/", c.to, at, func(kvs []meta.KeyValue) error {
			for _, kv := range kvs {
				if kv.Key != fmt.Sprintf("/k/%04d", got) || string(kv.Value) != "old" {
					t.Fatalf("got %s=%s as key %d", kv.Key, kv.Value, got)
				}
				got++
			}
			return nil
		})
		if err != nil || got != c.want || rev != at {
			t.Errorf("scan to %s: got %d keys at %d, error %v; want %d at %d", c.to, got, rev, err, c.want, at)
		}
	}
	if old.Calls(pb.KV_RangeStream_FullMethodName) == 0 {
		t.Error("no stream was requested")
	}
}

func open(t *testing.T, o etcd.Options) *etcd.Client {
	t.Helper()
	c, err := etcd.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// Clients with two roots on one server do not see each other's keys, even if one root is a
// prefix of the other.
func TestEtcdRoot(t *testing.T) {
	srv := etcdtest.Shared(t)
	root := "/" + crand.Text()
	one, two := srv.KVAt(t, root), srv.KVAt(t, root+"2")
	ctx := t.Context()
	res, err := one.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", []byte("1"))}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := two.Txn(ctx, meta.Txn{
		If:   []meta.Cond{meta.RangeAbsent("/", "0")},
		Then: []meta.Op{meta.Put("/a", []byte("2"))},
	}); err != nil {
		t.Fatal(err)
	}
	want := meta.KeyValue{Key: "/a", Value: []byte("1"), CreateRevision: res.Revision, ModRevision: res.Revision}
	all, err := one.Range(ctx, meta.Range{From: "/", To: "0"})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]meta.KeyValue{want}, all.KVs); diff != "" {
		t.Errorf("keys of the first root (-want +got):\n%s", diff)
	}
	for _, bad := range []string{"/ends/", strings.Repeat("x", 65)} {
		if _, err := etcd.Open(etcd.Options{Endpoints: []string{srv.Endpoint()}, Root: bad}); err == nil {
			t.Errorf("root %q: got no error", bad)
		}
	}
}

func TestEtcdFull(t *testing.T) {
	srv := etcdtest.Start(t)
	kv := srv.KV(t)
	ctx := t.Context()
	metatest.Full(t, kv, func() {
		srv.Stop(t)
		srv.QuotaBytes = 1 // less than an empty database
		srv.Restart(t)     //nolint:contextcheck // of the test
		// The first refused put raises the alarm. Until the client is reconnected
		// the error differs.
		for {
			_, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/fill", nil)}})
			if errors.Is(err, meta.ErrNoSpace) {
				return
			}
			if !errors.Is(err, meta.ErrUnavailable) {
				t.Fatalf("got error %v, want no space", err)
			}
		}
	}, func() {
		srv.Stop(t)
		srv.QuotaBytes = 0
		srv.Restart(t)
		srv.Disarm(t)
	})
}

// The memory store behaves like etcd: the same random transactions, reads and leases have the
// same results and revisions.
func TestEtcdEqualsMemory(t *testing.T) {
	original, twin := etcdtest.Start(t).KV(t), memory.New(memory.Options{})
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	ctx := t.Context()
	both := [2]meta.KV{original, twin}
	leases := [2]map[meta.LeaseID]int{{0: 0}, {0: 0}} // the number of each lease, for comparison
	var ids [][2]meta.LeaseID
	key := func() string { return fmt.Sprintf("/%c", 'a'+rnd.IntN(6)) }
	span := func() (string, string) {
		from := key()
		return from, from[:1] + string(from[1]+byte(1+rnd.IntN(3)))
	}
	newest := int64(1)
	cond := func() meta.Cond {
		c := meta.Cond{
			From: key(), Target: meta.Target(1 + rnd.IntN(2)), Op: meta.Compare(1 + rnd.IntN(3)),
			Revision: max(0, newest-rnd.Int64N(12)),
		}
		if rnd.IntN(3) == 0 {
			c.From, c.To = span()
		}
		if rnd.IntN(3) == 0 {
			c.Revision = 0
		}
		return c
	}
	// ops returns the same operations for both; only lease ids differ.
	ops := func() (out [2][]meta.Op) {
		for range rnd.IntN(4) {
			op := meta.Op{Kind: meta.OpKind(1 + rnd.IntN(3)), From: key()}
			lease := [2]meta.LeaseID{}
			if op.Kind == meta.OpPut {
				op.Value = fmt.Append(nil, rnd.IntN(100))
				if len(ids) > 0 && rnd.IntN(3) == 0 {
					lease = ids[rnd.IntN(len(ids))]
				}
			} else if rnd.IntN(2) == 0 {
				op.From, op.To = span()
			}
			for i := range both {
				op.Lease = lease[i]
				out[i] = append(out[i], op)
			}
		}
		return out
	}
	normal := func(i int, kvs []meta.KeyValue) []meta.KeyValue {
		for k := range kvs {
			kvs[k].Lease = meta.LeaseID(leases[i][kvs[k].Lease])
		}
		return kvs
	}
	class := func(err error) error {
		for _, e := range []error{meta.ErrLeaseNotFound, meta.ErrInvalid, meta.ErrCompacted, meta.ErrUnavailable} {
			if errors.Is(err, e) {
				return e
			}
		}
		return err
	}
	for step := range 1500 {
		var got [2]any
		var what any
		switch n := rnd.IntN(20); {
		case n == 0:
			var id [2]meta.LeaseID
			for i, kv := range both {
				var err error
				if id[i], err = kv.Grant(ctx, time.Hour); err != nil {
					t.Fatal(err)
				}
				leases[i][id[i]] = len(ids) + 1
			}
			ids = append(ids, id)
			what = "grant"
		case n == 1 && len(ids) > 0:
			id := ids[rnd.IntN(len(ids))]
			for i, kv := range both {
				got[i] = class(kv.Revoke(ctx, id[i]))
			}
			what = "revoke"
		case n < 5:
			from, to := span()
			r := meta.Range{From: from, To: to, Revision: max(0, newest-rnd.Int64N(30)), Limit: rnd.IntN(3)}
			for i, kv := range both {
				res, err := kv.Range(ctx, r)
				res.KVs = normal(i, res.KVs)
				got[i] = []any{res, class(err)}
			}
			what = r
		default:
			conds := make([]meta.Cond, rnd.IntN(3))
			for i := range conds {
				conds[i] = cond()
			}
			then, els := ops(), ops()
			for i, kv := range both {
				txn := meta.Txn{If: conds, Then: then[i], Else: els[i]}
				res, err := kv.Txn(ctx, txn)
				for k := range res.Ranges {
					res.Ranges[k] = normal(i, res.Ranges[k])
				}
				if err == nil {
					newest = res.Revision
				}
				got[i] = []any{res, class(err)}
				what = txn
			}
		}
		sameClass := cmp.Comparer(func(a, b error) bool { return a == b }) //nolint:errorlint // classes are values
		if diff := cmp.Diff(got[0], got[1], sameClass); diff != "" {
			t.Fatalf("step %d, %+v (-etcd +memory):\n%s", step, what, diff)
		}
	}
	var events [2][]meta.Event
	for i, kv := range both {
		_, _, end, err := kv.Get(ctx, "/a")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); err != nil {
			t.Fatal(err)
		}
		for w, last := kv.Watch(ctx, "/", "0", 0), int64(0); last <= end; {
			b, err := w.Next()
			if err != nil {
				t.Fatal(err)
			}
			for _, ev := range b.Events {
				ev.KV.Lease = meta.LeaseID(leases[i][ev.KV.Lease])
				events[i] = append(events[i], ev)
			}
			last = b.Revision
		}
	}
	if diff := cmp.Diff(events[0], events[1]); diff != "" {
		t.Errorf("events (-etcd +memory):\n%s", diff)
	}
}

// While the store is lost, calls fail with ErrUnavailable within the request timeout, never
// with the caller's deadline. After its return watches continue.
func TestEtcdLost(t *testing.T) {
	srv := etcdtest.Start(t)
	kv := open(t, etcd.Options{Endpoints: []string{srv.Endpoint()}, Root: "/lost", RequestTimeout: 300 * time.Millisecond})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	lease, err := kv.Grant(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	res, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}})
	if err != nil {
		t.Fatal(err)
	}
	w := kv.Watch(ctx, "/", "0", res.Revision-1)
	if _, err := w.Next(); err != nil {
		t.Fatal(err)
	}
	srv.Stop(t)
	for name, call := range map[string]func(context.Context) error{
		"get":     func(ctx context.Context) error { _, _, _, err := kv.Get(ctx, "/a"); return err },
		"range":   func(ctx context.Context) error { _, err := kv.Range(ctx, meta.Range{From: "/a"}); return err },
		"scan":    func(ctx context.Context) error { _, err := kv.Scan(ctx, "/a", "/b", 0, nil); return err },
		"scan at": func(ctx context.Context) error { _, err := kv.Scan(ctx, "/a", "/b", 2, nil); return err },
		"txn": func(ctx context.Context) error {
			_, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}})
			return err
		},
		"grant":     func(ctx context.Context) error { _, err := kv.Grant(ctx, time.Hour); return err },
		"keepalive": func(ctx context.Context) error { return kv.KeepAlive(ctx, lease) },
		"revoke":    func(ctx context.Context) error { return kv.Revoke(ctx, lease+1) },
	} {
		err := call(ctx)
		var carrier interface{ GRPCStatus() *status.Status }
		if !errors.Is(err, meta.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &carrier) {
			t.Errorf("%s: got error %v, want unavailable", name, err)
		}
		short, cancel := context.WithTimeout(ctx, time.Millisecond)
		<-short.Done()
		if err := call(short); !errors.Is(err, context.DeadlineExceeded) || errors.As(err, &carrier) {
			t.Errorf("%s past the caller's deadline: got error %v", name, err)
		}
		cancel()
	}
	srv.Restart(t)
	for {
		res, err = kv.Txn(ctx, meta.Txn{If: []meta.Cond{meta.Absent("/b")}, Then: []meta.Op{meta.Put("/b", nil)}})
		if err == nil {
			break
		}
		if !errors.Is(err, meta.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	for last := int64(0); last < res.Revision; {
		b, err := w.Next()
		if err != nil {
			t.Fatal(err)
		}
		for _, ev := range b.Events {
			if ev.KV.Key == "/a" {
				t.Errorf("the watch repeated %v", ev)
			}
		}
		last = b.Revision
	}
}

// A closed client ends its watches.
func TestEtcdClose(t *testing.T) {
	c, err := etcd.Open(etcd.Options{Endpoints: []string{etcdtest.Shared(t).Endpoint()}, Root: "/close"})
	if err != nil {
		t.Fatal(err)
	}
	w := c.Watch(t.Context(), "/", "0", 0)
	_, _, rev, err := c.Get(t.Context(), "/a")
	if err != nil {
		t.Fatal(err)
	}
	started := c.Watch(t.Context(), "/", "0", rev)
	done := make(chan error)
	go func() {
		_, err := started.Next()
		done <- err
	}()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("next under way: got error %v, want unavailable", err)
	}
	if _, err := w.Next(); !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("next: got error %v, want unavailable", err)
	}
	if _, _, _, err := c.Get(t.Context(), "/a"); !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("get: got error %v, want unavailable", err)
	}
}

// Stopped scans and ended watches leave no goroutine, although the client stays open.
func TestEtcdLeavesNoGoroutine(t *testing.T) {
	kv := etcdtest.Shared(t).KV(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	_, _, before, err := kv.Get(ctx, "/a")
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		var ops []meta.Op
		for i := range 100 {
			ops = append(ops, meta.Put(fmt.Sprintf("/k/%s%d", crand.Text(), i), make([]byte, 10_000)))
		}
		if _, err := kv.Txn(ctx, meta.Txn{Then: ops}); err != nil {
			t.Fatal(err)
		}
	}
	stop := errors.New("stop")
	for range 10 {
		_, err := kv.Scan(ctx, "/", "0", 0, func([]meta.KeyValue) error {
			for range 20 { // time for the next chunks to arrive
				if _, _, _, err := kv.Get(ctx, "/a"); err != nil {
					t.Fatal(err)
				}
			}
			return stop
		})
		if !errors.Is(err, stop) {
			t.Fatal(err)
		}
		// Progress of an unread watch does not open its stream.
		if err := kv.Watch(ctx, "/", "0", before).Progress(ctx); err != nil {
			t.Fatal(err)
		}
		w := kv.Watch(ctx, "/", "0", before)
		if _, err := w.Next(); err != nil {
			t.Fatal(err)
		}
		if err := w.Progress(ctx); err != nil {
			t.Fatal(err)
		}
	}
	cancel()
	stacks := make([]byte, 4<<20)
	for began := time.Now(); ; runtime.Gosched() {
		text := string(stacks[:runtime.Stack(stacks, true)])
		if !strings.Contains(text, "etcd/client/v3.(*kv).GetStream") &&
			!strings.Contains(text, "internal/store/meta/etcd.(*Client).Watch") &&
			!strings.Contains(text, "grpc.newClientStream") {
			return
		}
		if time.Since(began) > 10*time.Second {
			t.Fatalf("goroutines left:\n%s", text)
		}
	}
}
