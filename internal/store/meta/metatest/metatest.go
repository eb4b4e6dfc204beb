// Package metatest is the conformance suite of [meta.KV]: it tests each sentence of the
// contract on an implementation.
package metatest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Store is a store under test, which can be compacted.
type Store interface {
	meta.KV

	Compact(ctx context.Context, revision int64) error
}

// Decorated is a decorated store that is compacted below the decorator.
type Decorated struct {
	meta.KV

	Inner Store
}

// Compact compacts the inner store.
func (d Decorated) Compact(ctx context.Context, revision int64) error {
	return d.Inner.Compact(ctx, revision)
}

// Run runs the suite, all but [Full] and [Overtaken]. open returns an empty store, or one
// with a separate root, without other writers during the test, since revisions are counted.
func Run(t *testing.T, open func(t *testing.T) Store) {
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"Get", testGet},
		{"Revisions", testRevisions},
		{"Values", testValues},
		{"Range", testRange},
		{"Scan", testScan},
		{"ScanWhileWriting", testScanWhileWriting},
		{"Compares", testCompares},
		{"Phantoms", testPhantoms},
		{"SameKey", testSameKey},
		{"Branches", testBranches},
		{"Limits", testLimits},
		{"Invalid", testInvalid},
		{"Watch", testWatch},
		{"WatchWholeRevisions", testWatchWholeRevisions},
		{"WatchLargeRevisions", testWatchLargeRevisions},
		{"WatchProgress", testWatchProgress},
		{"WatchEnds", testWatchEnds},
		{"Canceled", testCanceled},
		{"Leases", testLeases},
		{"OneWinner", testOneWinner},
		{"Counter", testCounter},
		{"Compaction", testCompaction},
		{"CompactionMidScan", testCompactionMidScan},
	} {
		t.Run(c.name, func(t *testing.T) { c.run(t, newSuite(t, open(t))) })
	}
	// These wait for the clock, so they run in parallel, and count no revisions.
	for _, c := range []struct {
		name string
		run  func(t *testing.T, s *suite)
	}{
		{"LeaseExpiry", testLeaseExpiry},
		{"KeepAlive", testKeepAlive},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			c.run(t, newSuite(t, open(t)))
		})
	}
}

// suite is a store with helpers that end the test on an error.
type suite struct {
	Store
	t   *testing.T
	ctx context.Context //nolint:containedctx // of the test
}

func newSuite(t *testing.T, kv Store) *suite {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return &suite{kv, t, ctx}
}

func (s *suite) txn(t meta.Txn) meta.TxnResult {
	s.t.Helper()
	res, err := s.Txn(s.ctx, t)
	if err != nil {
		s.t.Fatal(err)
	}
	return res
}

// do applies ops without a compare and returns the revision.
func (s *suite) do(ops ...meta.Op) int64 {
	s.t.Helper()
	return s.txn(meta.Txn{Then: ops}).Revision
}

func (s *suite) put(key, value string) int64 {
	s.t.Helper()
	return s.do(meta.Put(key, []byte(value)))
}

func (s *suite) revision() int64 {
	s.t.Helper()
	_, _, rev, err := s.Get(s.ctx, "/none")
	if err != nil {
		s.t.Fatal(err)
	}
	return rev
}

// all returns the keys below "/" with their values, as "key=value".
func (s *suite) all(revision int64) []string {
	s.t.Helper()
	res, err := s.Range(s.ctx, meta.Range{From: "/", To: "0", Revision: revision})
	if err != nil {
		s.t.Fatal(err)
	}
	return pairs(res.KVs)
}

func pairs(kvs []meta.KeyValue) []string {
	out := []string{}
	for _, kv := range kvs {
		out = append(out, kv.Key+"="+string(kv.Value))
	}
	return out
}

func (s *suite) grant(ttl time.Duration) meta.LeaseID {
	s.t.Helper()
	id, err := s.Grant(s.ctx, ttl)
	if err != nil {
		s.t.Fatal(err)
	}
	if id == 0 {
		s.t.Fatal("got lease 0, which is invalid")
	}
	return id
}

func (s *suite) watch(from, to string, after int64) *watch {
	ctx, cancel := context.WithCancel(s.ctx)
	s.t.Cleanup(cancel)
	return &watch{s, s.Watch(ctx, from, to, after), after}
}

// watch checks the invariants of every batch.
type watch struct {
	s    *suite
	w    meta.Watcher
	last int64
}

func (w *watch) next() meta.WatchBatch {
	w.s.t.Helper()
	b, err := w.w.Next()
	if err != nil {
		w.s.t.Fatalf("next after %d: %v", w.last, err)
	}
	for _, ev := range b.Events {
		if ev.KV.ModRevision <= w.last || ev.KV.ModRevision > b.Revision {
			w.s.t.Fatalf("event of revision %d in the batch from %d to %d", ev.KV.ModRevision, w.last, b.Revision)
		}
	}
	if !slices.IsSortedFunc(b.Events, func(x, y meta.Event) int { return int(x.KV.ModRevision - y.KV.ModRevision) }) {
		w.s.t.Fatalf("events out of order: %v", b.Events)
	}
	if b.Revision <= w.last {
		w.s.t.Fatalf("batch of revision %d after %d", b.Revision, w.last)
	}
	w.last = b.Revision
	return b
}

// until collects events until revision is reached.
func (w *watch) until(revision int64) []meta.Event {
	w.s.t.Helper()
	var events []meta.Event
	for w.last < revision {
		events = append(events, w.next().Events...)
	}
	return events
}

// changes writes events as "revision key=value" or "revision key gone", sorted
// within a revision.
func changes(events []meta.Event, base int64) []string {
	out := []string{}
	for _, ev := range events {
		text := fmt.Sprintf("%d %s=%s", ev.KV.ModRevision-base, ev.KV.Key, ev.KV.Value)
		if ev.Deleted {
			text = fmt.Sprintf("%d %s gone", ev.KV.ModRevision-base, ev.KV.Key)
		}
		out = append(out, text)
	}
	slices.SortStableFunc(out, strings.Compare)
	return out
}

func equal(t *testing.T, what string, got, want any) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

// wantErr ends the test unless err is of class want and carries no gRPC status.
func wantErr(t *testing.T, what string, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("%s: got error %v, want %v", what, err, want)
	}
	for e := err; e != nil; e = errors.Unwrap(e) {
		if reflect.ValueOf(e).MethodByName("GRPCStatus").IsValid() {
			t.Errorf("%s: error %v has a gRPC status", what, err)
		}
	}
}

func testGet(t *testing.T, s *suite) {
	_, found, before, err := s.Get(s.ctx, "/a")
	if err != nil || found || before < 1 {
		t.Fatalf("get of a missing key: found %v at %d, error %v; want only a revision", found, before, err)
	}
	rev := s.put("/a", "1")
	s.put("/b", "")
	kv, found, at, err := s.Get(s.ctx, "/a")
	if err != nil || !found {
		t.Fatalf("get: found %v, error %v", found, err)
	}
	equal(t, "get", kv, meta.KeyValue{Key: "/a", Value: []byte("1"), CreateRevision: rev, ModRevision: rev})
	equal(t, "revision", at, rev+1)
	kv, found, _, err = s.Get(s.ctx, "/b")
	if err != nil || !found || kv.Value != nil {
		t.Errorf("get of an empty value: %v, found %v, error %v; want a nil value", kv, found, err)
	}
}

func testRevisions(t *testing.T, s *suite) {
	base := s.revision()
	for _, c := range []struct {
		name string
		txn  meta.Txn
		want int64 // above base
	}{
		{"put", meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}, 1},
		{"the same put", meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}, 2},
		{"three puts", meta.Txn{Then: []meta.Op{meta.Put("/a", nil), meta.Put("/b", nil), meta.Put("/c", nil)}}, 3},
		{"nothing", meta.Txn{}, 3},
		{"get", meta.Txn{Then: []meta.Op{meta.Get("/a")}}, 3},
		{
			"get, and put in the other branch",
			meta.Txn{Then: []meta.Op{meta.Get("/a")}, Else: []meta.Op{meta.Put("/a", nil)}},
			3,
		},
		{"delete of nothing", meta.Txn{Then: []meta.Op{meta.Delete("/x"), meta.DeleteRange("/x", "/z")}}, 3},
		{"delete", meta.Txn{Then: []meta.Op{meta.Delete("/a")}}, 4},
		{"delete of two", meta.Txn{Then: []meta.Op{meta.DeleteRange("/", "0"), meta.Delete("/b")}}, 5},
		{"repeated delete", meta.Txn{Then: []meta.Op{meta.DeleteRange("/", "0")}}, 5},
	} {
		equal(t, c.name, s.txn(c.txn).Revision-base, c.want)
		equal(t, "revision read after "+c.name, s.revision()-base, c.want)
	}
	// A recreated key is new.
	first := s.put("/a", "1")
	second := s.put("/a", "2")
	s.do(meta.Delete("/a"))
	third := s.put("/a", "3")
	for _, want := range []meta.KeyValue{
		{Key: "/a", Value: []byte("1"), CreateRevision: first, ModRevision: first},
		{Key: "/a", Value: []byte("2"), CreateRevision: first, ModRevision: second},
		{Key: "/a", Value: []byte("3"), CreateRevision: third, ModRevision: third},
	} {
		res, err := s.Range(s.ctx, meta.Range{From: "/a", Revision: want.ModRevision})
		if err != nil {
			t.Fatal(err)
		}
		equal(t, "version", res.KVs, []meta.KeyValue{want})
	}
}

func testValues(t *testing.T, s *suite) {
	value := []byte("value")
	s.do(meta.Put("/a", value))
	value[0] = 'X'
	kv, _, _, err := s.Get(s.ctx, "/a")
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "value after the caller changed its slice", string(kv.Value), "value")
	all := make([]byte, 256)
	for i := range all {
		all[i] = byte(i)
	}
	s.do(meta.Put("/bin/\x00\xff", all))
	kv, found, _, err := s.Get(s.ctx, "/bin/\x00\xff")
	if err != nil || !found || !bytes.Equal(kv.Value, all) {
		t.Errorf("bytes: got %q, found %v, error %v", kv.Value, found, err)
	}
}

func testRange(t *testing.T, s *suite) {
	for _, key := range []string{"/d", "/b", "/a/x", "/c", "/a", "/cc"} {
		s.put(key, "of "+key)
	}
	old := s.revision()
	s.do(meta.Delete("/c"), meta.Put("/b", []byte("new")), meta.Put("/e", nil))
	now := s.revision()
	for _, c := range []struct {
		name string
		r    meta.Range
		want []string
		more bool
	}{
		{"all", meta.Range{From: "/", To: "0"}, []string{
			"/a=of /a", "/a/x=of /a/x", "/b=new", "/cc=of /cc", "/d=of /d",
			"/e=",
		}, false},
		{"half open", meta.Range{From: "/b", To: "/d"}, []string{"/b=new", "/cc=of /cc"}, false},
		{"one key, not its prefix", meta.Range{From: "/a"}, []string{"/a=of /a"}, false},
		{"no key", meta.Range{From: "/c"}, []string{}, false},
		{"old", meta.Range{From: "/b", To: "/d", Revision: old}, []string{"/b=of /b", "/c=of /c", "/cc=of /cc"}, false},
		{"one old key", meta.Range{From: "/c", Revision: old}, []string{"/c=of /c"}, false},
		{"limited", meta.Range{From: "/", To: "0", Limit: 2}, []string{"/a=of /a", "/a/x=of /a/x"}, true},
		{"limit not reached", meta.Range{From: "/b", To: "/d", Limit: 2}, []string{"/b=new", "/cc=of /cc"}, false},
		{"keys only", meta.Range{From: "/b", To: "/d", KeysOnly: true}, []string{"/b=", "/cc="}, false},
	} {
		got, err := s.Range(s.ctx, c.r)
		if err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		equal(t, c.name, pairs(got.KVs), c.want)
		equal(t, c.name+": more", got.More, c.more)
		if whole, err := s.Range(s.ctx, meta.Range{From: c.r.From, To: c.r.To, Revision: c.r.Revision}); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		} else {
			equal(t, c.name+": count", got.Count, int64(len(whole.KVs)))
		}
		equal(t, c.name+": revision", got.Revision, now)
	}
	_, err := s.Range(s.ctx, meta.Range{From: "/", To: "0", Revision: now + 100})
	wantErr(t, "range at a revision to come", err, meta.ErrUnavailable)
}

func testScan(t *testing.T, s *suite) {
	scan := func(from, to string, revision int64) ([]string, int64) {
		t.Helper()
		var got []meta.KeyValue
		rev, err := s.Scan(s.ctx, from, to, revision, func(kvs []meta.KeyValue) error {
			if len(kvs) == 0 {
				t.Error("got an empty batch")
			}
			got = append(got, kvs...)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return pairs(got), rev
	}
	got, rev := scan("/", "0", 0)
	equal(t, "scan of nothing", got, []string{})
	equal(t, "its revision", rev, s.revision())
	s.do(meta.Put("/a", []byte("1")), meta.Put("/b", []byte("2")), meta.Put("/c", []byte("3")))
	old := s.revision()
	s.do(meta.Put("/b", nil), meta.Delete("/c"))
	got, rev = scan("/", "0", old)
	equal(t, "old scan", got, []string{"/a=1", "/b=2", "/c=3"})
	equal(t, "its revision", rev, old)
	got, rev = scan("/", "0", 0)
	equal(t, "scan", got, []string{"/a=1", "/b="})
	equal(t, "its revision", rev, s.revision())
	got, _ = scan("/b", "/c", old)
	equal(t, "half open scan", got, []string{"/b=2"})

	stop := errors.New("stop")
	_, err := s.Scan(s.ctx, "/", "0", 0, func([]meta.KeyValue) error { return stop })
	if err != stop { //nolint:errorlint // unchanged
		t.Errorf("got error %v, want fn's", err)
	}
	ctx, cancel := context.WithCancel(s.ctx)
	s.many("/m/", 2000, 100)
	calls := 0
	_, err = s.Scan(ctx, "/m/", "/m0", 0, func([]meta.KeyValue) error { calls++; cancel(); return nil })
	wantErr(t, "scan whose context ends", err, context.Canceled)
	if calls == 0 {
		t.Error("fn was not called")
	}
	_, err = s.Scan(s.ctx, "/", "0", rev+10_000, func([]meta.KeyValue) error { return nil })
	wantErr(t, "scan at a revision to come", err, meta.ErrUnavailable)
}

// many puts n keys below prefix, each with a value of size bytes.
func (s *suite) many(prefix string, n, size int) {
	s.t.Helper()
	value := bytes.Repeat([]byte("v"), size)
	perTxn := min(meta.MaxTxnOps, max(1, meta.MaxTxnBytes/(size+100)))
	for i := 0; i < n; {
		var ops []meta.Op
		for ; i < n && len(ops) < perTxn; i++ {
			ops = append(ops, meta.Put(fmt.Sprintf("%s%06d", prefix, i), value))
		}
		s.do(ops...)
	}
}

func testScanWhileWriting(t *testing.T, s *suite) {
	const n = 12_000
	s.many("/k/", n, 50)
	at := s.revision()
	// A writer that changes, deletes and adds keys during the scan.
	stop := make(chan struct{})
	var writes atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ; i = (i + 7) % n {
			select {
			case <-stop:
				return
			default:
			}
			_, err := s.Txn(s.ctx, meta.Txn{Then: []meta.Op{
				meta.Put(fmt.Sprintf("/k/%06d", i), []byte("changed")),
				meta.Delete(fmt.Sprintf("/k/%06d", n-1-i/7*7-1)),
				meta.Put(fmt.Sprintf("/k/%06d+", i), []byte("added")),
			}})
			if err != nil && !errors.Is(err, meta.ErrInvalid) { // put and delete of one key
				t.Error(err)
				return
			}
			writes.Add(1)
		}
	})
	want, batches := 0, 0
	rev, err := s.Scan(s.ctx, "/k/", "/k0", at, func(kvs []meta.KeyValue) error {
		batches++
		for seen := writes.Load(); writes.Load() < seen+3 && !t.Failed(); { // writes continue between batches
			runtime.Gosched()
		}
		for _, kv := range kvs {
			if kv.Key != fmt.Sprintf("/k/%06d", want) || len(kv.Value) != 50 || kv.ModRevision > at {
				return fmt.Errorf("got %s of revision %d with %d bytes, want key %06d of revision %d at most", kv.Key,
					kv.ModRevision, len(kv.Value), want, at)
			}
			want++
		}
		return nil
	})
	close(stop)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "revision", rev, at)
	equal(t, "keys", want, n)
	if batches < 2 {
		t.Errorf("got %d keys in %d batch, want batches of bounded size", n, batches)
	}
}

func testCompares(t *testing.T, s *suite) {
	create := s.put("/a/1", "")
	mod := s.put("/a/1", "")
	s.put("/a/2", "")
	for _, c := range []struct {
		name string
		cond meta.Cond
		want bool
	}{
		{"absent", meta.Absent("/x"), true},
		{"absent, but present", meta.Absent("/a/1"), false},
		{"present", meta.Present("/a/1"), true},
		{"present, but missing", meta.Present("/x"), false},
		{"range absent", meta.RangeAbsent("/x/", "/x0"), true},
		{"range absent, but present", meta.RangeAbsent("/a/", "/a0"), false},
		{"range absent, half open", meta.RangeAbsent("/a/", "/a/1"), true},
		{"unchanged", meta.Unchanged("/a/1", mod), true},
		{"changed", meta.Unchanged("/a/1", create), false},
		{"unchanged, but missing", meta.Unchanged("/x", mod), false},
		{"same key", meta.SameKey("/a/1", create), true},
		{"another key", meta.SameKey("/a/1", mod), false},
		{"same key, but missing", meta.SameKey("/x", create), false},
		{"all older", meta.Cond{From: "/a/", To: "/a0", Target: meta.ModRevision, Op: meta.Less, Revision: mod + 2}, true},
		{
			"not all older",
			meta.Cond{From: "/a/", To: "/a0", Target: meta.ModRevision, Op: meta.Less, Revision: mod + 1},
			false,
		},
		{
			"all newer",
			meta.Cond{From: "/a/", To: "/a0", Target: meta.CreateRevision, Op: meta.Greater, Revision: create - 1},
			true,
		},
		{
			"not all newer",
			meta.Cond{From: "/a/", To: "/a0", Target: meta.CreateRevision, Op: meta.Greater, Revision: create},
			false,
		},
		{"nothing, older", meta.Cond{From: "/x/", To: "/x0", Target: meta.ModRevision, Op: meta.Less, Revision: 1}, true},
		{"nothing, newer", meta.Cond{From: "/x/", To: "/x0", Target: meta.ModRevision, Op: meta.Greater}, false},
	} {
		equal(t, c.name, s.txn(meta.Txn{If: []meta.Cond{c.cond}}).Succeeded, c.want)
		equal(t, c.name+", and one that holds", s.txn(meta.Txn{If: []meta.Cond{meta.Present("/a/2"), c.cond}}).Succeeded,
			c.want)
		equal(t, c.name+", and one that does not", s.txn(meta.Txn{If: []meta.Cond{c.cond, meta.Absent("/a/2")}}).Succeeded,
			false)
	}
	equal(t, "no compare", s.txn(meta.Txn{}).Succeeded, true)
}

func testPhantoms(t *testing.T, s *suite) {
	read := s.put("/g/1", "")
	older := meta.Cond{From: "/g/", To: "/g0", Target: meta.ModRevision, Op: meta.Less, Revision: read + 1}
	guarded := func() bool {
		return s.txn(meta.Txn{If: []meta.Cond{older}}).Succeeded
	}
	equal(t, "guard at first", guarded(), true)
	s.put("/g/2", "")
	equal(t, "guard after an insert", guarded(), false)
	s.do(meta.Delete("/g/2"))
	equal(t, "guard after the insert is gone", guarded(), true)

	empty := meta.RangeAbsent("/pending/", "/pending0")
	equal(t, "empty", s.txn(meta.Txn{If: []meta.Cond{empty}, Then: []meta.Op{meta.Put("/pending/1", nil)}}).Succeeded,
		true)
	equal(t, "no longer empty", s.txn(meta.Txn{If: []meta.Cond{empty}}).Succeeded, false)
	s.do(meta.DeleteRange("/pending/", "/pending0"))
	equal(t, "empty again", s.txn(meta.Txn{If: []meta.Cond{empty}}).Succeeded, true)
}

func testSameKey(t *testing.T, s *suite) {
	create := s.put("/leader", "a")
	same := meta.Txn{If: []meta.Cond{meta.SameKey("/leader", create)}, Then: []meta.Op{meta.Put("/work", nil)}}
	equal(t, "as put", s.txn(same).Succeeded, true)
	s.put("/leader", "a2")
	equal(t, "put over", s.txn(same).Succeeded, true)
	s.do(meta.Delete("/leader"))
	equal(t, "deleted", s.txn(same).Succeeded, false)
	again := s.put("/leader", "a")
	equal(t, "put again", s.txn(same).Succeeded, false)
	equal(t, "the new one", s.txn(meta.Txn{If: []meta.Cond{meta.SameKey("/leader", again)}}).Succeeded, true)
}

func testBranches(t *testing.T, s *suite) {
	s.do(meta.Put("/a", []byte("1")), meta.Put("/b", []byte("2")))
	txn := meta.Txn{
		If: []meta.Cond{meta.Absent("/done")},
		Then: []meta.Op{
			meta.Get("/a"), meta.Put("/a", []byte("new")), meta.Get("/a"), meta.Put("/done", nil),
			meta.GetRange("/", "0"), meta.DeleteRange("/b", "/c"), meta.GetRange("/", "0"), meta.Get("/none"),
		},
		Else: []meta.Op{meta.Get("/done"), meta.Delete("/a")},
	}
	res := s.txn(txn)
	var got [][]string
	for _, kvs := range res.Ranges {
		got = append(got, pairs(kvs))
	}
	equal(t, "then", got, [][]string{
		{"/a=1"},
		{"/a=new"},
		{"/a=new", "/b=2", "/done="},
		{"/a=new", "/done="},
		{},
	})
	if !res.Succeeded || res.Ranges[1][0].ModRevision != res.Revision || res.Ranges[2][2].CreateRevision != res.Revision {
		t.Errorf("a get after a put: got %v, want it at revision %d", res.Ranges, res.Revision)
	}
	equal(t, "after then", s.all(0), []string{"/a=new", "/done="})
	res = s.txn(txn)
	if res.Succeeded || len(res.Ranges) != 1 {
		t.Errorf("else: got %+v", res)
	}
	equal(t, "after else", s.all(0), []string{"/done="})
}

func testLimits(t *testing.T, s *suite) {
	conds := func(n int) []meta.Cond { return slices.Repeat([]meta.Cond{meta.Absent("/none")}, n) }
	ops := func(n int) []meta.Op {
		var out []meta.Op
		for i := range n {
			out = append(out, meta.Put(fmt.Sprintf("/k%d", i), nil))
		}
		return out
	}
	full := s.txn(meta.Txn{If: conds(meta.MaxTxnOps), Then: ops(meta.MaxTxnOps), Else: ops(meta.MaxTxnOps)})
	equal(t, "lists at the limit", full.Succeeded, true)
	// The longest keys and ranges in every position, and the maximum number of bytes.
	long := "/" + strings.Repeat("k", meta.MaxKeyBytes-4)
	big := meta.Txn{}
	for i := range meta.MaxTxnOps {
		big.If = append(big.If, meta.RangeAbsent(fmt.Sprintf("%s%03d", long, i), fmt.Sprintf("%s%03d", long, i+1)))
		big.Then = append(big.Then, meta.Put(fmt.Sprintf("%s%03d", long, i), nil))
		big.Else = append(big.Else, meta.DeleteRange(fmt.Sprintf("%s%03d", long, i), fmt.Sprintf("%s%03d", long, i+1)))
	}
	size := (2 + 1 + 2) * meta.MaxTxnOps * meta.MaxKeyBytes
	big.Then[0].Value = make([]byte, meta.MaxTxnBytes-size)
	equal(t, "bytes at the limit", s.txn(big).Succeeded, true)
	equal(t, "bytes at the limit, again", s.txn(big).Succeeded, false)
	equal(t, "one value at the limit", s.txn(meta.Txn{Then: []meta.Op{meta.Put("/v",
		make([]byte, meta.MaxTxnBytes-2))}}).Succeeded, true)

	before := s.revision()
	big.Then[0].Value = make([]byte, meta.MaxTxnBytes-size+1)
	for _, c := range []struct {
		name string
		txn  meta.Txn
	}{
		{"compares", meta.Txn{If: conds(meta.MaxTxnOps + 1)}},
		{"then", meta.Txn{Then: ops(meta.MaxTxnOps + 1)}},
		{"else", meta.Txn{Else: ops(meta.MaxTxnOps + 1)}},
		{"bytes", big},
		{"one value", meta.Txn{Then: []meta.Op{meta.Put("/v", make([]byte, meta.MaxTxnBytes-1))}}},
		{"key", meta.Txn{Then: []meta.Op{meta.Put(long+"0000", nil)}}},
		{"compared key", meta.Txn{If: []meta.Cond{meta.Absent(long + "0000")}}},
		{"end of a range", meta.Txn{Then: []meta.Op{meta.DeleteRange("/a", long+"0000")}}},
	} {
		_, err := s.Txn(s.ctx, c.txn)
		wantErr(t, "too much: "+c.name, err, meta.ErrTooLarge)
	}
	_, _, _, err := s.Get(s.ctx, long+"0000")
	wantErr(t, "get of too long a key", err, meta.ErrTooLarge)
	equal(t, "revision after refused transactions", s.revision(), before)
}

func testInvalid(t *testing.T, s *suite) {
	s.put("/a", "1")
	before := s.revision()
	for _, c := range []struct {
		name string
		txn  meta.Txn
	}{
		{"key put twice", meta.Txn{Then: []meta.Op{meta.Put("/a", []byte("2")), meta.Put("/a", []byte("3"))}}},
		{"key put twice in else", meta.Txn{Else: []meta.Op{meta.Put("/a", []byte("2")), meta.Put("/a", []byte("3"))}}},
		{"key put and deleted", meta.Txn{Then: []meta.Op{meta.Put("/a", []byte("2")), meta.Delete("/a")}}},
		{"key deleted and put", meta.Txn{Then: []meta.Op{meta.DeleteRange("/", "0"), meta.Put("/a", []byte("2"))}}},
		{"empty key", meta.Txn{Then: []meta.Op{meta.Put("", nil)}}},
		{"key without a slash", meta.Txn{Then: []meta.Op{meta.Put("a", nil)}}},
		{"compare of a key without a slash", meta.Txn{If: []meta.Cond{meta.Absent("a")}}},
		{"range beyond the keys", meta.Txn{Then: []meta.Op{meta.DeleteRange("/a", "1")}}},
		{"empty compare", meta.Txn{If: []meta.Cond{{}}}},
		{"compare without comparison", meta.Txn{If: []meta.Cond{{From: "/a", Target: meta.ModRevision}}}},
		{"empty operation", meta.Txn{Then: []meta.Op{{}}}},
		{"reversed range", meta.Txn{Then: []meta.Op{meta.DeleteRange("/b", "/a")}}},
		{"empty range", meta.Txn{If: []meta.Cond{meta.RangeAbsent("/b", "/b")}}},
	} {
		_, err := s.Txn(s.ctx, c.txn)
		wantErr(t, c.name, err, meta.ErrInvalid)
	}
	_, _, _, err := s.Get(s.ctx, "")
	wantErr(t, "get of the empty key", err, meta.ErrInvalid)
	_, err = s.Range(s.ctx, meta.Range{From: "/b", To: "/a"})
	wantErr(t, "range", err, meta.ErrInvalid)
	_, err = s.Range(s.ctx, meta.Range{To: "0"})
	wantErr(t, "range from no key", err, meta.ErrInvalid)
	_, err = s.Scan(s.ctx, "/b", "/a", 0, func([]meta.KeyValue) error { return nil })
	wantErr(t, "scan", err, meta.ErrInvalid)
	_, err = s.Scan(s.ctx, "/b", "", 0, func([]meta.KeyValue) error { return nil })
	wantErr(t, "scan without an end", err, meta.ErrInvalid)
	_, err = s.Watch(s.ctx, "/b", "/a", 0).Next()
	wantErr(t, "watch", err, meta.ErrInvalid)
	equal(t, "revision after refused transactions", s.revision(), before)
	equal(t, "keys", s.all(0), []string{"/a=1"})
}

func testWatch(t *testing.T, s *suite) {
	s.put("/w/old", "")
	base := s.revision()
	past := s.watch("/w/", "/w0", base)
	early := s.watch("/w/", "/w0", base+3) // a future revision
	s.put("/w/a", "1")
	s.do(meta.Put("/w/b", []byte("1")), meta.Put("/w/a", []byte("2")), meta.Put("/elsewhere", nil))
	s.put("/elsewhere", "")
	s.do(meta.DeleteRange("/w/a", "/w/z"))
	lease := s.grant(time.Minute)
	s.do(meta.PutLeased("/w/l1", nil, lease), meta.PutLeased("/w/l2", nil, lease))
	if err := s.Revoke(s.ctx, lease); err != nil {
		t.Fatal(err)
	}
	end := s.put("/w0", "")
	end = max(end, s.put("/w/z", "end"))
	want := []string{
		"1 /w/a=1",
		"2 /w/a=2", "2 /w/b=1",
		"4 /w/a gone", "4 /w/b gone", "4 /w/old gone",
		"5 /w/l1=", "5 /w/l2=",
		"6 /w/l1 gone", "6 /w/l2 gone",
		"8 /w/z=end",
	}
	equal(t, "watch", changes(past.until(end), base), want)
	equal(t, "watch from a later revision", changes(early.until(end), base), want[3:])
	equal(t, "watch from the past", changes(s.watch("/w/", "/w0", base).until(end), base), want)
	equal(t, "watch resumed", changes(s.watch("/w/", "/w0", base+4).until(end), base), want[6:])
	equal(t, "watch of one key", changes(s.watch("/w/a", "/w/a\x00", base).until(base+4), base),
		[]string{"1 /w/a=1", "2 /w/a=2", "4 /w/a gone"})

	events := s.watch("/w/", "/w0", base).until(end)
	equal(t, "event", events[0].KV, meta.KeyValue{
		Key: "/w/a", Value: []byte("1"), CreateRevision: base + 1,
		ModRevision: base + 1,
	})
	i := slices.IndexFunc(events, func(ev meta.Event) bool { return ev.KV.Key == "/w/l1" })
	equal(t, "event of a leased key", events[i].KV, meta.KeyValue{
		Key: "/w/l1", CreateRevision: base + 5,
		ModRevision: base + 5, Lease: lease,
	})
	for _, ev := range events {
		if ev.Deleted {
			equal(t, "delete", ev.KV, meta.KeyValue{Key: ev.KV.Key, ModRevision: ev.KV.ModRevision})
		}
	}
}

func testWatchWholeRevisions(t *testing.T, s *suite) {
	const n, perTxn = 2500, 5 // etcd splits a catch-up after 1000 revisions
	base := s.revision()
	live := s.watch("/w/", "/w0", base)
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() {
		for i := range n {
			var ops []meta.Op
			for k := range perTxn {
				ops = append(ops, meta.Put(fmt.Sprintf("/w/%d", k), fmt.Append(nil, i)))
			}
			if _, err := s.Txn(s.ctx, meta.Txn{Then: ops}); err != nil {
				t.Error(err)
				return
			}
		}
	})
	check := func(name string, w *watch) {
		t.Helper()
		next := base
		for next < base+n {
			b := w.next()
			if len(b.Events)%perTxn != 0 {
				t.Fatalf("%s: batch of %d events, want whole revisions of %d", name, len(b.Events), perTxn)
			}
			for i, ev := range b.Events {
				if i%perTxn == 0 {
					next++
				}
				if ev.KV.ModRevision != next {
					t.Fatalf("%s: event of revision %d, want %d", name, ev.KV.ModRevision, next)
				}
			}
		}
	}
	check("live", live)
	check("past", s.watch("/w/", "/w0", base))
}

func testWatchLargeRevisions(t *testing.T, s *suite) {
	const n, perTxn, size = 6, 10, 140_000 // each near the largest message
	base := s.revision()
	for range n {
		var ops []meta.Op
		for k := range perTxn {
			ops = append(ops, meta.Put(fmt.Sprintf("/w/%d", k), make([]byte, size)))
		}
		s.do(ops...)
	}
	w := s.watch("/w/", "/w0", base)
	for seen := 0; seen < n*perTxn; {
		b := w.next()
		if len(b.Events)%perTxn != 0 {
			t.Fatalf("batch of %d events, want whole revisions of %d", len(b.Events), perTxn)
		}
		seen += len(b.Events)
	}
}

func testWatchProgress(t *testing.T, s *suite) {
	base := s.put("/w/a", "")
	w := s.watch("/w/", "/w0", base-1)
	for range 5 {
		s.put("/elsewhere", "")
	}
	target := s.revision()
	// Requests may be dropped, so they are repeated until a response.
	ctx, cancel := context.WithCancel(s.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			if err := w.w.Progress(ctx); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	events := w.until(target)
	cancel()
	wg.Wait()
	equal(t, "events", changes(events, base), []string{"0 /w/a="})
	// Later writes are still delivered.
	next := s.put("/w/b", "")
	equal(t, "later events", changes(w.until(next), next), []string{"0 /w/b="})
}

func testWatchEnds(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(s.ctx)
	w := s.Watch(ctx, "/w/", "/w0", s.revision())
	done := make(chan error)
	go func() {
		_, err := w.Next()
		done <- err
	}()
	cancel()
	wantErr(t, "waiting next", <-done, context.Canceled)
	s.put("/w/a", "")
	_, err := w.Next()
	wantErr(t, "next after the end", err, context.Canceled)
	_, err = s.Watch(ctx, "/w/", "/w0", 0).Next()
	wantErr(t, "watch under an ended context", err, context.Canceled)
	late, cancel := context.WithDeadline(s.ctx, time.Now().Add(-time.Second))
	defer cancel()
	_, err = s.Watch(late, "/w/", "/w0", 0).Next()
	wantErr(t, "watch under a late context", err, context.DeadlineExceeded)
}

func testCanceled(t *testing.T, s *suite) {
	ctx, cancel := context.WithCancel(s.ctx)
	lease, w := s.grant(time.Minute), s.watch("/a", "/b", 0)
	before := s.revision()
	cancel()
	for name, call := range map[string]func() error{
		"get":       func() error { _, _, _, err := s.Get(ctx, "/a"); return err },
		"range":     func() error { _, err := s.Range(ctx, meta.Range{From: "/a"}); return err },
		"scan":      func() error { _, err := s.Scan(ctx, "/a", "/b", 0, nil); return err },
		"txn":       func() error { _, err := s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put("/a", nil)}}); return err },
		"grant":     func() error { _, err := s.Grant(ctx, time.Minute); return err },
		"keepalive": func() error { return s.KeepAlive(ctx, lease) },
		"revoke":    func() error { return s.Revoke(ctx, lease) },
		"progress":  func() error { return w.w.Progress(ctx) },
	} {
		err := call()
		wantErr(t, name, err, context.Canceled)
		if errors.Is(err, meta.ErrUnavailable) {
			t.Errorf("%s: the end of the caller's context is not an error of the store: %v", name, err)
		}
	}
	equal(t, "revision", s.revision(), before)
	if err := s.KeepAlive(s.ctx, lease); err != nil {
		t.Errorf("lease after a canceled revoke: %v", err)
	}
}

func testLeases(t *testing.T, s *suite) {
	one, two := s.grant(time.Minute), s.grant(time.Minute)
	if one == two {
		t.Fatalf("two leases are %x", one)
	}
	s.do(meta.PutLeased("/a", nil, one), meta.PutLeased("/b", nil, one), meta.PutLeased("/c", nil, one),
		meta.PutLeased("/d", nil, one))
	kv, _, _, err := s.Get(s.ctx, "/a")
	if err != nil || kv.Lease != one {
		t.Errorf("got %v, error %v; want lease %x", kv, err, one)
	}
	s.put("/a", "kept")                      // no longer under a lease
	s.do(meta.PutLeased("/b", nil, two))     // under another lease
	s.do(meta.Delete("/c"))                  // and recreated
	before := s.do(meta.Put("/c", []byte{})) // without a lease
	if err := s.Revoke(s.ctx, one); err != nil {
		t.Fatal(err)
	}
	equal(t, "revision after the revoke", s.revision(), before+1)
	equal(t, "keys after the revoke", s.all(0), []string{"/a=kept", "/b=", "/c="})
	if err := s.Revoke(s.ctx, one); err != nil {
		t.Errorf("second revoke: %v", err)
	}
	if err := s.Revoke(s.ctx, 12345); err != nil {
		t.Errorf("revoke of a lease that never existed: %v", err)
	}
	wantErr(t, "keep alive of a revoked lease", s.KeepAlive(s.ctx, one), meta.ErrLeaseNotFound)
	_, err = s.Txn(s.ctx, meta.Txn{Then: []meta.Op{meta.Put("/x", nil), meta.PutLeased("/y", nil, one)}})
	wantErr(t, "put under a revoked lease", err, meta.ErrLeaseNotFound)
	equal(t, "revision after it", s.revision(), before+1)
	equal(t, "keys after it", s.all(0), []string{"/a=kept", "/b=", "/c="})
	res := s.txn(meta.Txn{If: []meta.Cond{meta.Present("/a")}, Else: []meta.Op{meta.PutLeased("/y", nil, one)}})
	equal(t, "revoked lease in the branch that does not run", res.Succeeded, true)
	if err := s.KeepAlive(s.ctx, two); err != nil {
		t.Error(err)
	}
	// A lease without keys ends without a revision.
	three, before := s.grant(time.Minute), s.revision()
	if err := s.Revoke(s.ctx, three); err != nil {
		t.Fatal(err)
	}
	equal(t, "revision after the revoke of an unused lease", s.revision(), before)
}

func testLeaseExpiry(t *testing.T, s *suite) {
	began := time.Now()
	lease := s.grant(10 * time.Millisecond) // rounded up to a second
	rev := s.do(meta.PutLeased("/l/a", nil, lease), meta.PutLeased("/l/b", nil, lease))
	events := s.watch("/l/", "/l0", rev)
	b := events.next()
	if took := time.Since(began); took < time.Second {
		t.Errorf("lease ended after %v, want a second at least", took)
	}
	equal(t, "expiry", changes(b.Events, b.Revision), []string{"0 /l/a gone", "0 /l/b gone"})
	wantErr(t, "keep alive of an expired lease", s.KeepAlive(s.ctx, lease), meta.ErrLeaseNotFound)
	_, err := s.Txn(s.ctx, meta.Txn{Then: []meta.Op{meta.PutLeased("/l/a", nil, lease)}})
	wantErr(t, "put under an expired lease", err, meta.ErrLeaseNotFound)
	equal(t, "keys", s.all(0), []string{})
}

func testKeepAlive(t *testing.T, s *suite) {
	kept, left := s.grant(time.Second), s.grant(time.Second)
	rev := s.do(meta.PutLeased("/l/kept", nil, kept), meta.PutLeased("/l/left", nil, left))
	w := s.watch("/l/", "/l0", rev)
	ctx, cancel := context.WithCancel(s.ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			if err := s.KeepAlive(ctx, kept); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	b := w.next()
	equal(t, "first expiry", changes(b.Events, b.Revision), []string{"0 /l/left gone"})
	cancel()
	wg.Wait()
	last := time.Now()
	b = w.next()
	equal(t, "second expiry", changes(b.Events, b.Revision), []string{"0 /l/kept gone"})
	if took := time.Since(last); took < 500*time.Millisecond {
		t.Errorf("lease ended %v after it was renewed, want about a second", took)
	}
}

func testOneWinner(t *testing.T, s *suite) {
	const n = 64
	var won atomic.Int64
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			res, err := s.Txn(s.ctx, meta.Txn{
				If:   []meta.Cond{meta.Absent("/key")},
				Then: []meta.Op{meta.Put("/key", fmt.Append(nil, i))},
				Else: []meta.Op{meta.Get("/key")},
			})
			switch {
			case err != nil:
				t.Error(err)
			case res.Succeeded:
				won.Add(1)
			case len(res.Ranges) != 1 || len(res.Ranges[0]) != 1:
				t.Errorf("a loser got %v, want the winner", res.Ranges)
			}
		})
	}
	wg.Wait()
	equal(t, "winners", won.Load(), int64(1))
}

func testCounter(t *testing.T, s *suite) {
	const workers, each = 8, 20
	s.put("/n", "0")
	before := s.revision()
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for done := 0; done < each; {
				kv, _, _, err := s.Get(s.ctx, "/n")
				if err != nil {
					t.Error(err)
					return
				}
				var n int
				if _, err := fmt.Sscan(string(kv.Value), &n); err != nil {
					t.Error(err)
					return
				}
				res, err := s.Txn(s.ctx, meta.Txn{
					If:   []meta.Cond{meta.Unchanged("/n", kv.ModRevision)},
					Then: []meta.Op{meta.Put("/n", fmt.Append(nil, n+1))},
				})
				if err != nil {
					t.Error(err)
					return
				}
				if res.Succeeded {
					done++
				}
			}
		})
	}
	wg.Wait()
	equal(t, "counter", s.all(0), []string{fmt.Sprintf("/n=%d", workers*each)})
	equal(t, "revision", s.revision()-before, int64(workers*each))
}

// Full checks which operations a full store refuses. fill makes kv full, free undoes it.
func Full(t *testing.T, kv Store, fill, free func()) {
	s := newSuite(t, kv)
	lease := s.grant(time.Minute)
	s.do(meta.Put("/a", nil), meta.Put("/b", nil), meta.PutLeased("/l", nil, lease))
	fill()
	before := s.revision()
	_, err := s.Txn(s.ctx, meta.Txn{Then: []meta.Op{meta.Put("/x", nil)}})
	wantErr(t, "put", err, meta.ErrNoSpace)
	_, err = s.Txn(s.ctx, meta.Txn{Then: []meta.Op{meta.Delete("/a"), meta.Put("/x", nil)}})
	wantErr(t, "put and delete", err, meta.ErrNoSpace)
	_, err = s.Txn(s.ctx, meta.Txn{Then: []meta.Op{meta.Delete("/a")}, Else: []meta.Op{meta.Put("/x", nil)}})
	wantErr(t, "put in the other branch", err, meta.ErrNoSpace)
	_, err = s.Grant(s.ctx, time.Minute)
	wantErr(t, "grant", err, meta.ErrNoSpace)
	equal(t, "revision after what was refused", s.revision(), before)
	if err := s.KeepAlive(s.ctx, lease); err != nil {
		t.Errorf("keep alive: %v", err)
	}
	if res := s.txn(meta.Txn{If: []meta.Cond{meta.Present("/a")}, Then: []meta.Op{
		meta.Delete("/a"),
		meta.DeleteRange("/b", "/c"),
	}}); !res.Succeeded {
		t.Error("delete: the compare did not hold")
	}
	equal(t, "read", len(s.all(0)) > 0, true)
	if err := s.Revoke(s.ctx, lease); err != nil {
		t.Errorf("revoke: %v", err)
	}
	free()
	s.put("/x", "")
	s.grant(time.Minute)
}

// Overtaken checks a watch that receives a progress report before the changes that it covers.
// overtake switches this behaviour of the store.
func Overtaken(t *testing.T, kv Store, overtake func(on bool)) {
	s := newSuite(t, kv)
	first := s.put("/w/a", "1")
	w := s.watch("/w/", "/w0", first-1)
	equal(t, "events before", changes(w.until(first), first), []string{"0 /w/a=1"})
	overtake(true)
	late := s.put("/w/b", "2")
	for {
		b, err := w.w.Next()
		if err != nil {
			wantErr(t, "overtaken watch", err, meta.ErrWatchBroken)
			break
		}
		if len(b.Events) > 0 {
			t.Fatalf("got %v after the report up to %d", b.Events, b.Revision)
		}
	}
	_, err := w.w.Next()
	wantErr(t, "next after it broke", err, meta.ErrWatchBroken)
	overtake(false)
	equal(t, "events of another watch", changes(s.watch("/w/", "/w0", first).until(late), first),
		[]string{fmt.Sprintf("%d /w/b=2", late-first)})
}

func (s *suite) compact(revision int64) {
	s.t.Helper()
	if err := s.Compact(s.ctx, revision); err != nil {
		s.t.Fatal(err)
	}
}

func testCompaction(t *testing.T, s *suite) {
	s.put("/a", "1")
	gone := s.put("/gone", "1")
	s.put("/a", "2")
	deleted := s.do(meta.Delete("/gone"))
	at := s.put("/a", "3")
	running := s.watch("/", "0", gone)
	equal(t, "events before", changes(running.until(at), gone), []string{"1 /a=2", "2 /gone gone", "3 /a=3"})
	last := s.put("/a", "4")
	s.compact(at)

	_, err := s.Range(s.ctx, meta.Range{From: "/", To: "0", Revision: deleted})
	wantErr(t, "range below", err, meta.ErrCompacted)
	_, err = s.Scan(s.ctx, "/", "0", deleted, func([]meta.KeyValue) error { return nil })
	wantErr(t, "scan below", err, meta.ErrCompacted)
	_, err = s.Watch(s.ctx, "/", "0", gone).Next()
	wantErr(t, "watch below", err, meta.ErrCompacted)
	w := s.Watch(s.ctx, "/", "0", gone)
	for range 2 {
		_, err = w.Next()
		wantErr(t, "next of a watch that ended", err, meta.ErrCompacted)
	}
	equal(t, "range at the revision", s.all(at), []string{"/a=3"})
	equal(t, "range above", s.all(last), []string{"/a=4"})
	equal(t, "newest", s.all(0), []string{"/a=4"})
	equal(t, "watch from the revision", changes(s.watch("/", "0", at).until(last), last), []string{"0 /a=4"})
	equal(t, "running watch", changes(running.until(last), last), []string{"0 /a=4"})
	kv, _, _, err := s.Get(s.ctx, "/a")
	if err != nil || kv.CreateRevision != gone-1 || kv.ModRevision != last {
		t.Errorf("got %v, error %v; want created at %d and written at %d", kv, err, gone-1, last)
	}
	s.do(meta.Put("/gone", nil))
	equal(t, "recreated key", s.all(0), []string{"/a=4", "/gone="})
}

func testCompactionMidScan(t *testing.T, s *suite) {
	const n = 3000
	s.many("/k/", n, 2000)
	at := s.revision()
	s.put("/k/000000", "changed")
	now := s.revision()
	got, compacted := 0, false
	_, err := s.Scan(s.ctx, "/k/", "/k0", at, func(kvs []meta.KeyValue) error {
		got += len(kvs)
		if !compacted {
			compacted = true
			s.compact(now)
		}
		return nil
	})
	// The scan may still complete, but must not return a part as the whole.
	if err == nil {
		equal(t, "keys", got, n)
	} else {
		wantErr(t, "scan", err, meta.ErrCompacted)
	}
}
