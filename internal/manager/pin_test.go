package manager

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func pinToken(value string) request.Token {
	return request.Token{Principal: "local", Method: "PinSnapshot", Value: value, Hash: []byte{1}}
}

// pin pins a snapshot; 0 means no ttl.
func (e *env) pin(r *testReplica, s *snapshot.Record, ttl time.Duration) *Pin {
	e.t.Helper()
	p, err := r.Pin(e.t.Context(), request.Token{}, Ref{ID: s.ID}, PinSpec{Owner: "job", Reason: "night", TTL: ttl})
	if err != nil {
		e.t.Fatal(err)
	}
	return p
}

// pinRecord returns the stored record of a pin.
func (e *env) pinRecord(p *Pin) (kv meta.KeyValue, found bool) {
	e.t.Helper()
	kv, found, _, err := e.kv.Get(e.t.Context(), keys.Pin(p.Snapshot, p.ID))
	if err != nil {
		e.t.Fatal(err)
	}
	return kv, found
}

func samePin(p, q *Pin) bool {
	return p.Snapshot == q.Snapshot && p.ID == q.ID && p.Owner == q.Owner && p.Reason == q.Reason && p.TTL == q.TTL &&
		p.CreateTime.Equal(q.CreateTime) && p.ExpireTime.Equal(q.ExpireTime) && p.Revision == q.Revision
}

// leased reports whether a lease exists.
func (e *env) leased(id meta.LeaseID) bool {
	e.t.Helper()
	err := e.kv.KeepAlive(e.t.Context(), id)
	if err != nil && !errors.Is(err, meta.ErrLeaseNotFound) {
		e.t.Fatal(err)
	}
	return err == nil
}

func TestPinKeepsASnapshot(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		began := time.Now()
		p, err := r.Pin(t.Context(), request.Token{}, Ref{Name: "x"},
			PinSpec{Owner: "backup-job", Reason: "nightly export", TTL: 90500 * time.Millisecond})
		if err != nil {
			t.Fatal(err)
		}
		if p.Snapshot != s.ID || p.ID == 0 || p.TTL != 91*time.Second || !p.CreateTime.Equal(began) ||
			!p.ExpireTime.Equal(began.Add(p.TTL)) {
			t.Errorf("got %+v", p)
		}
		kv, found := e.pinRecord(p)
		if stored, err := decodePin(kv); err != nil || !found || !samePin(stored, p) ||
			stored.lease != p.lease || stored.op != p.op {
			t.Errorf("stored is %+v, err = %v; want %+v", stored, err, p)
		}
		for _, owner := range []string{"two", "three", "four", "five"} {
			if _, err := r.Pin(t.Context(), request.Token{}, Ref{Name: "x"}, PinSpec{Owner: owner}); err != nil {
				t.Fatal(err)
			}
		}
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, ErrSnapshotPinned)
		want := fmt.Sprintf("snapshot is pinned by %d (backup-job: nightly export until %s), %d (two), %d (three), "+
			"and 2 more; remove the pins first",
			p.ID, p.ExpireTime.Format(time.RFC3339), p.ID+1, p.ID+2)
		if !strings.Contains(errText(err), want) {
			t.Errorf("got %v\nwant %s", err, want)
		}
		for id := p.ID + 1; id <= p.ID+4; id++ {
			if err := r.Unpin(t.Context(), Ref{ID: s.ID}, id); err != nil {
				t.Fatal(err)
			}
		}
		settle()
		if n := r.Stats().Pins; n != 1 {
			t.Errorf("%d pins are counted, want 1", n)
		}
		time.Sleep(p.TTL - time.Millisecond)
		_, err = r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0)
		wantError(t, err, ErrSnapshotPinned)
		time.Sleep(2 * time.Millisecond)
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Errorf("the pin has ended, and the drop says %v", err)
		}
		settle()
		if n := r.Stats().Pins; n != 0 {
			t.Errorf("%d pins are counted, want none", n)
		}
		e.check(r)
	})
}

// TestPinHoldsUpExpiry checks that a snapshot expires at once when its pin ends, in
// either way, and that the cleaner is idle before.
func TestPinHoldsUpExpiry(t *testing.T) {
	for name, end := range map[string]func(r *testReplica, p *Pin) error{
		"removed": func(r *testReplica, p *Pin) error { return r.Unpin(context.Background(), Ref{ID: p.Snapshot}, p.ID) },
		"expired": func(_ *testReplica, p *Pin) error { time.Sleep(time.Until(p.ExpireTime)); return nil },
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				r := e.start("a", func(o *testOptions) { o.CleanInterval = time.Hour })
				col, _, _ := e.collection(r, "c")
				sp := spec(col, "x")
				sp.TTL = time.Hour
				s, err := r.Create(t.Context(), request.Token{}, sp)
				if err != nil {
					t.Fatal(err)
				}
				p := e.pin(r, s, 90*time.Minute)
				time.Sleep(65 * time.Minute)
				settle()
				before := r.kv.Calls()
				for range 100 { // the leader observes each change
					if p, err = r.RenewPin(t.Context(), Ref{ID: s.ID}, p.ID, 0); err != nil {
						t.Fatal(err)
					}
					settle()
				}
				// A renewal reads, grants, writes, revokes, and is observed.
				if calls := r.kv.Calls() - before; calls > 600 {
					t.Errorf("%d calls for 100 renewals: the leader is kept busy", calls)
				}
				before = r.kv.Calls()
				time.Sleep(10 * time.Minute)
				settle()
				if calls := r.kv.Calls() - before; calls > 540 {
					t.Errorf("%d calls in ten minutes at rest", calls)
				}
				if n := len(e.check(r)); n != 1 {
					t.Fatalf("%d snapshots while it is pinned, want 1", n)
				}
				if err := end(r, p); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Millisecond)
				settle()
				if left := e.check(r); len(left) != 0 {
					t.Errorf("the pin is gone, and there is %v", left)
				}
			})
		})
	}
}

func TestInvalidPins(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		fine := PinSpec{Owner: "o"}
		pin := func(ref Ref, spec PinSpec) error {
			_, err := r.Pin(t.Context(), request.Token{}, ref, spec)
			return err
		}
		for field, specs := range map[string][]PinSpec{
			"owner":  {{}, {Owner: strings.Repeat("o", 256)}, {Owner: "\xff"}},
			"reason": {{Owner: "o", Reason: strings.Repeat("r", 257)}, {Owner: "o", Reason: "a\xc0"}},
			"ttl": {
				{Owner: "o", TTL: -1},
				{Owner: "o", TTL: time.Second - 1},
				{Owner: "o", TTL: 30*24*time.Hour + 1},
				{Owner: "o", TTL: 1<<63 - 1},
				{Owner: "o", TTL: -1 << 63},
			},
		} {
			for _, sp := range specs {
				err := pin(Ref{ID: s.ID}, sp)
				if invalid, ok := errors.AsType[*catalog.InvalidError](err); !ok || invalid.Field != field {
					t.Errorf("%+v: got %v, want one about %s", sp, err, field)
				}
			}
		}
		wantError(t, pin(Ref{Name: "none"}, fine), ErrSnapshotNotFound)
		wantError(t, pin(Ref{ID: 1 << 50}, fine), snapshot.ErrNeverExisted)
		wantError(t, pin(Ref{ID: s.ID, Collection: catalog.Ref{ID: col.ID + 1}}, fine), ErrSnapshotMismatch)
		r.store.Freeze()
		sp := spec(col, "pending")
		sp.NoWait = true
		pending, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		wantError(t, pin(Ref{ID: pending.ID}, fine), snapshot.ErrNotCommitted)
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Fatal(err)
		}
		wantError(t, pin(Ref{ID: s.ID}, fine), snapshot.ErrNotCommitted) // DELETING
		wantError(t, pin(Ref{Name: "x"}, fine), ErrSnapshotNotFound)
		r.store.Thaw()
		settle()
		wantError(t, pin(Ref{ID: s.ID}, fine), snapshot.ErrExpiredOrDropped)
		if left := e.keysUnder(keys.AllPinsPrefix); len(left) != 0 {
			t.Errorf("left %v", left)
		}
		e.memory.SetFull(true)
		wantError(t, pin(Ref{ID: pending.ID}, fine), meta.ErrNoSpace)
		e.memory.SetFull(false)
	})
}

func TestPinLimit(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s, other := e.create(r, col, "x"), e.create(r, col, "y")
		for range maxPins {
			e.pin(r, s, 0)
		}
		_, err := r.Pin(t.Context(), request.Token{}, Ref{ID: s.ID}, PinSpec{Owner: "o"})
		wantError(t, err, catalog.ErrLimitExceeded)
		e.pin(r, other, 0)
	})
}

// TestPinToken repeats a pin after its snapshot's name moved to another snapshot, and
// after the pin was removed.
func TestPinToken(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		s := e.create(a, col, "x")
		pin := func(r *testReplica) *Pin {
			p, err := r.Pin(t.Context(), pinToken("t"), Ref{Name: "x"}, PinSpec{Owner: "o", Reason: "r", TTL: time.Hour})
			if err != nil {
				t.Fatal(err)
			}
			return p
		}
		first := pin(a)
		time.Sleep(time.Minute)
		if again := pin(b); !samePin(first, again) {
			t.Errorf("got %+v, then %+v", first, again)
		}
		if n := len(e.keysUnder(keys.AllPinsPrefix)); n != 1 {
			t.Errorf("%d pins", n)
		}
		if err := b.Unpin(t.Context(), Ref{ID: s.ID}, first.ID); err != nil {
			t.Fatal(err)
		}
		if _, err := a.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
			t.Fatal(err)
		}
		e.create(a, col, "x")
		if again := pin(b); !samePin(first, again) {
			t.Errorf("got %+v, then %+v", first, again)
		}
		if n := len(e.keysUnder(keys.AllPinsPrefix)); n != 0 {
			t.Errorf("%d pins", n)
		}
		_, err := a.Pin(t.Context(), request.Token{Principal: "local", Method: "PinSnapshot", Value: "t", Hash: []byte{2}},
			Ref{Name: "x"}, PinSpec{Owner: "o"})
		wantError(t, err, request.ErrReused)
	})
}

// TestPinRetriesAfterConflict changes the preconditions of a pin before its
// transaction.
func TestPinRetriesAfterConflict(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, r *testReplica)
		want   error
	}{
		"updated": {func(t *testing.T, r *testReplica) {
			if _, err := r.Update(t.Context(), request.Token{}, Ref{Name: "x"}, UpdateSpec{Description: new("d")}); err != nil {
				t.Error(err)
			}
		}, nil},
		"dropped": {func(t *testing.T, r *testReplica) {
			if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
				t.Error(err)
			}
		}, snapshot.ErrNotCommitted},
		"pinned under the token": {func(t *testing.T, r *testReplica) {
			if _, err := r.Pin(t.Context(), pinToken("t"), Ref{Name: "x"}, PinSpec{Owner: "o", TTL: time.Hour}); err != nil {
				t.Error(err)
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			inEnv(t, func(t *testing.T, e *env) {
				other := e.start("b")
				settle() // so that it leads
				r := e.start("a")
				col, _, _ := e.collection(other, "c")
				e.create(other, col, "x")
				e.newID(r) // so that the pin's is the first transaction
				settle()
				other.store.Freeze() // a dropped snapshot stays DELETING
				var once sync.Once
				r.kv.Hook(func(c meta.Call) meta.Fault {
					if c.Method == meta.MethodTxn {
						once.Do(func() { tc.change(t, other) })
					}
					return meta.NoFault
				})
				p, err := r.Pin(t.Context(), pinToken("t"), Ref{Name: "x"}, PinSpec{Owner: "o", TTL: time.Hour})
				r.kv.Hook(nil)
				wantError(t, err, tc.want)
				left := e.keysUnder(keys.AllPinsPrefix)
				if tc.want == nil && (len(left) != 1 || left[0] != keys.Pin(p.Snapshot, p.ID)) || tc.want != nil && len(left) != 0 {
					t.Errorf("there are %v, the pin is %+v", left, p)
				}
				other.store.Thaw()
			})
		})
	}
}

// TestFrozenPin freezes a replica between the read of a snapshot and its pin. The
// snapshot is dropped meanwhile, and the late pin fails.
func TestFrozenPin(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		other := e.start("b")
		settle() // so that it leads
		r := e.start("a")
		col, _, _ := e.collection(other, "c")
		s := e.create(other, col, "x")
		e.newID(r)
		settle()
		other.store.Freeze() // the dropped snapshot stays DELETING
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGrant {
				r.kv.Freeze()
			}
			return meta.NoFault
		})
		result := make(chan error, 1)
		go func() {
			_, err := r.Pin(t.Context(), request.Token{}, Ref{ID: s.ID}, PinSpec{Owner: "o", TTL: time.Hour})
			result <- err
		}()
		settle()
		if _, err := other.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Fatal(err)
		}
		r.kv.Hook(nil)
		r.kv.Thaw()
		wantError(t, <-result, snapshot.ErrNotCommitted)
		if left := e.keysUnder(keys.AllPinsPrefix); len(left) != 0 {
			t.Errorf("left %v", left)
		}
		other.store.Thaw()
	})
}

// TestPinAndDropExcludeEachOther races many pins with drops on replicas with slow and
// lost calls. Whatever the answers, a dropped snapshot has no pin, and no acknowledged
// pin was of one.
func TestPinAndDropExcludeEachOther(t *testing.T) {
	var pinned, dropped atomic.Int64
	for seed := range uint64(60) {
		inEnv(t, func(t *testing.T, e *env) {
			other := e.start("c")
			col, _, _ := e.collection(other, "c")
			s := e.create(other, col, "x")
			settle()
			rnd := rand.New(rand.NewPCG(seed, 1)) //nolint:gosec // a test that can be repeated
			var mu sync.Mutex
			roll := func(n int) int {
				mu.Lock()
				defer mu.Unlock()
				return rnd.IntN(n)
			}
			replicas := []*testReplica{e.start("a"), e.start("b")}
			for _, r := range replicas {
				e.newID(r)
				r.kv.Hook(func(c meta.Call) meta.Fault {
					switch c.Method {
					case meta.MethodWatch, meta.MethodNext, meta.MethodProgress:
						return meta.NoFault
					default:
					}
					time.Sleep(time.Duration(roll(20)) * time.Millisecond)
					return []meta.Fault{
						meta.Before, meta.After, meta.NoFault, meta.NoFault, meta.NoFault,
						meta.NoFault, meta.NoFault, meta.NoFault,
					}[roll(8)]
				})
			}
			var wg sync.WaitGroup
			var acknowledged []*Pin
			drop := false
			for i := range 12 {
				r := replicas[i%2]
				wg.Go(func() {
					time.Sleep(time.Duration(roll(60)) * time.Millisecond)
					ttl := []time.Duration{0, time.Hour}[i/2%2]
					tok := request.Token{}
					if i%3 == 0 {
						tok = pinToken(fmt.Sprint("t", i))
					}
					p, err := r.Pin(t.Context(), tok, Ref{ID: s.ID}, PinSpec{Owner: "o", TTL: ttl})
					switch {
					case err == nil:
						mu.Lock()
						acknowledged = append(acknowledged, p)
						mu.Unlock()
					case errors.Is(err, meta.ErrUnavailable), errors.Is(err, snapshot.ErrNotCommitted), errors.Is(err,
						snapshot.ErrExpiredOrDropped):
					default:
						t.Errorf("seed %d: pin: %v", seed, err)
					}
				})
			}
			for i := range 6 {
				r := replicas[i%2]
				wg.Go(func() {
					time.Sleep(time.Duration(roll(60)) * time.Millisecond)
					_, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0)
					switch {
					case err == nil:
						mu.Lock()
						drop = true
						mu.Unlock()
					case errors.Is(err, meta.ErrUnavailable), errors.Is(err, ErrSnapshotPinned):
					default:
						t.Errorf("seed %d: drop: %v", seed, err)
					}
				})
			}
			wg.Wait()
			for _, r := range replicas {
				r.kv.Hook(nil)
			}
			settle()
			now, err := other.reader.Record(t.Context(), s.ID)
			if err != nil {
				t.Fatal(err)
			}
			gone := now == nil || now.State == snapshot.Deleting
			left := e.keysUnder(keys.AllPinsPrefix)
			switch {
			case drop && !gone:
				t.Errorf("seed %d: the drop succeeded, and the snapshot exists", seed)
			case gone && (len(acknowledged) > 0 || len(left) > 0):
				t.Errorf("seed %d: dropped in spite of the acknowledged pins %v; existing pins %v", seed, acknowledged, left)
			case gone:
				dropped.Add(1)
			}
			for _, p := range acknowledged {
				if _, found := e.pinRecord(p); !found {
					t.Errorf("seed %d: pin %d was returned, and does not exist", seed, p.ID)
				}
				pinned.Add(1)
			}
		})
	}
	if pinned.Load() == 0 || dropped.Load() == 0 {
		t.Errorf("%d pins, %d drops: one of them never wins", pinned.Load(), dropped.Load())
	}
}

// TestPinSurvivesEachFailedCall fails every call of a pin, before and after its effect,
// with and without token and ttl.
func TestPinSurvivesEachFailedCall(t *testing.T) {
	for i := range 8 {
		fault, ttl, tok := meta.Before, time.Duration(0), request.Token{}
		if i&1 != 0 {
			fault = meta.After
		}
		if i&2 != 0 {
			ttl = time.Hour
		}
		if i&4 != 0 {
			tok = pinToken("t")
		}
		for n := 0; ; n++ {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				other := e.start("b")
				settle() // so that it leads
				r := e.start("a")
				col, _, _ := e.collection(other, "c")
				s := e.create(other, col, "x")
				settle()
				pin := func(r *testReplica) (*Pin, error) {
					return r.Pin(t.Context(), tok, Ref{Name: "x"}, PinSpec{Owner: "o", TTL: ttl})
				}
				r.kv.FailNth(n, fault, meta.MethodGet, meta.MethodRange, meta.MethodTxn, meta.MethodGrant, meta.MethodRevoke)
				p, err := pin(r)
				fired = r.kv.Fired() > 0
				r.kv.Hook(nil)
				if err != nil {
					wantError(t, err, meta.ErrUnavailable)
					left := e.keysUnder(keys.AllPinsPrefix)
					if len(left) > 0 && !tok.IsSet() {
						t.Errorf("call %d of %d: no pin was returned, but there are %v", n, i, left)
					}
					p, err = pin(other)
				}
				if err != nil {
					t.Fatalf("call %d of %d: %v", n, i, err)
				}
				if left := e.keysUnder(keys.AllPinsPrefix); !slices.Equal(left, []string{keys.Pin(s.ID, p.ID)}) {
					t.Errorf("call %d of %d: there are %v, returned %+v", n, i, left, p)
				}
				if kv, _ := e.pinRecord(p); (kv.Lease != 0) != (ttl > 0) {
					t.Errorf("call %d of %d: under lease %d", n, i, kv.Lease)
				}
			})
			if !fired {
				if n < 4 {
					t.Errorf("a pin makes only %d calls", n)
				}
				break
			}
		}
	}
}

// late is a store that loses the answer to a transaction on a pin and applies it later.
type late struct {
	meta.KV
	mu   sync.Mutex
	lose bool
	held meta.Txn
}

func (l *late) Txn(ctx context.Context, txn meta.Txn) (meta.TxnResult, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lose && slices.ContainsFunc(txn.Then,
		func(op meta.Op) bool { return strings.HasPrefix(op.From, keys.AllPinsPrefix) }) {
		l.lose, l.held = false, txn
		return meta.TxnResult{}, fmt.Errorf("%w: no answer", meta.ErrUnavailable)
	}
	return l.KV.Txn(ctx, txn)
}

func (l *late) set(lose bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lose = lose
}

// land applies the transaction.
func (l *late) land(ctx context.Context) (meta.TxnResult, error) { return l.KV.Txn(ctx, l.held) }

// TestLatePin applies a pin after its call returned without an answer. Without a token
// it must not take effect; with one, it exists when a repeat returns it.
func TestLatePin(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		l := &late{}
		r := e.start("a", func(o *testOptions) { l.KV, o.KV = o.KV, l })
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		pin := func(tok request.Token) (*Pin, error) {
			return r.Pin(t.Context(), tok, Ref{ID: s.ID}, PinSpec{Owner: "o", TTL: time.Hour})
		}
		l.set(true)
		_, err := pin(request.Token{})
		wantError(t, err, meta.ErrUnavailable)
		_, err = l.land(t.Context())
		wantError(t, err, meta.ErrLeaseNotFound)
		if left := e.keysUnder(keys.AllPinsPrefix); len(left) != 0 {
			t.Errorf("left %v", left)
		}
		for _, when := range []string{"before the repeat", "after it"} {
			tok := pinToken(when)
			l.set(true)
			_, err = pin(tok)
			wantError(t, err, meta.ErrUnavailable)
			var p *Pin
			var landed meta.TxnResult
			if when == "after it" {
				p, err = pin(tok)
				wantError(t, err, nil)
				landed, err = l.land(t.Context())
			} else {
				landed, err = l.land(t.Context())
				wantError(t, err, nil)
				p, err = pin(tok)
			}
			wantError(t, err, nil)
			if landed.Succeeded != (when != "after it") {
				t.Errorf("%s: landed %v", when, landed.Succeeded)
			}
			if _, found := e.pinRecord(p); !found {
				t.Errorf("%s: pin %d was returned, and does not exist", when, p.ID)
			}
		}
		if left := e.keysUnder(keys.AllPinsPrefix); len(left) != 2 {
			t.Errorf("there are %v, want two", left)
		}
	})
}

func TestRenewPin(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s, other := e.create(r, col, "x"), e.create(r, col, "y")
		p, forever := e.pin(r, s, time.Minute), e.pin(r, s, 0)
		created := p.CreateTime
		for i, ttl := range []time.Duration{0, 0, time.Hour, 0, 1500 * time.Millisecond} {
			time.Sleep(50 * time.Second)
			old := p
			var err error
			if p, err = r.RenewPin(t.Context(), Ref{Name: "x"}, p.ID, ttl); err != nil {
				t.Fatal(err)
			}
			want := []time.Duration{time.Minute, time.Minute, time.Hour, time.Hour, 2 * time.Second}[i]
			if p.ID != old.ID || p.Owner != "job" || p.Reason != "night" || !p.CreateTime.Equal(created) || p.TTL != want ||
				!p.ExpireTime.Equal(time.Now().Add(want)) || p.Revision <= old.Revision {
				t.Errorf("renewal %d: got %+v", i, p)
			}
			if kv, found := e.pinRecord(p); !found || kv.Lease == old.lease || kv.Lease != p.lease {
				t.Errorf("renewal %d: there is %v, found %v", i, kv, found)
			}
			if e.leased(old.lease) {
				t.Errorf("renewal %d: the old lease lives", i)
			}
		}
		renew := func(ref Ref, id int64, ttl time.Duration) error {
			_, err := r.RenewPin(t.Context(), ref, id, ttl)
			return err
		}
		wantError(t, renew(Ref{ID: s.ID}, forever.ID, time.Hour), ErrPinHasNoTTL)
		wantError(t, renew(Ref{ID: other.ID}, p.ID, 0), ErrPinNotFound)
		wantError(t, renew(Ref{ID: s.ID}, p.ID+1000, 0), ErrPinNotFound)
		wantError(t, renew(Ref{Name: "none"}, p.ID, 0), ErrPinNotFound)
		wantError(t, renew(Ref{ID: 1 << 50}, p.ID, 0), ErrPinNotFound)
		wantError(t, renew(Ref{ID: s.ID, Collection: catalog.Ref{ID: col.ID + 1}}, p.ID, 0), ErrSnapshotMismatch)
		wantError(t, renew(Ref{ID: s.ID}, 0, 0), catalog.ErrInvalid)
		wantError(t, renew(Ref{ID: s.ID}, p.ID, time.Millisecond), catalog.ErrInvalid)
		time.Sleep(2 * time.Second)
		err := renew(Ref{ID: s.ID}, p.ID, 0)
		wantError(t, err, ErrPinNotFound)
		if !strings.Contains(errText(err), "pin it again") {
			t.Errorf("%v does not say what to do", err)
		}
	})
}

// TestRenewalsAtOnce renews a pin concurrently.
func TestRenewalsAtOnce(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		replicas := []*testReplica{e.start("a"), e.start("b")}
		col, _, _ := e.collection(replicas[0], "c")
		p := e.pin(replicas[0], e.create(replicas[0], col, "x"), time.Minute)
		var wg sync.WaitGroup
		var done atomic.Int64
		for i := range 20 {
			wg.Go(func() {
				_, err := replicas[i%2].RenewPin(t.Context(), Ref{ID: p.Snapshot}, p.ID, time.Hour)
				switch {
				case err == nil:
					done.Add(1)
				case !errors.Is(err, meta.ErrConflict):
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if done.Load() == 0 {
			t.Error("no renewal succeeded")
		}
		time.Sleep(59 * time.Minute)
		if kv, found := e.pinRecord(p); !found || kv.Lease == 0 {
			t.Error("the pin is gone")
		}
		time.Sleep(2 * time.Minute)
		if _, found := e.pinRecord(p); found {
			t.Error("the pin outlives its lease")
		}
	})
}

// TestRenewalSurvivesEachFailedCall fails every call of a renewal: the pin lasts as
// long as the call returned.
func TestRenewalSurvivesEachFailedCall(t *testing.T) {
	for _, fault := range []meta.Fault{meta.Before, meta.After} {
		for n := 0; ; n++ {
			fired := false
			inEnv(t, func(t *testing.T, e *env) {
				other := e.start("b")
				settle() // so that it leads
				r := e.start("a")
				col, _, _ := e.collection(other, "c")
				p := e.pin(other, e.create(other, col, "x"), time.Minute)
				settle()
				r.kv.FailNth(n, fault, meta.MethodGet, meta.MethodTxn, meta.MethodGrant, meta.MethodRevoke)
				next, err := r.RenewPin(t.Context(), Ref{Name: "x"}, p.ID, time.Hour)
				fired = r.kv.Fired() > 0
				r.kv.Hook(nil)
				until := p.ExpireTime
				if err == nil {
					until = next.ExpireTime
				} else {
					wantError(t, err, meta.ErrUnavailable)
				}
				time.Sleep(time.Until(until) - time.Second)
				if _, found := e.pinRecord(p); !found {
					t.Errorf("call %d: returned %v, and the pin ended before", n, err)
				}
				if next, err = other.RenewPin(t.Context(), Ref{Name: "x"}, p.ID, 0); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Until(next.ExpireTime) + time.Second)
				if _, found := e.pinRecord(p); found {
					t.Errorf("call %d: the pin outlives its lease", n)
				}
			})
			if !fired {
				if n < 4 {
					t.Errorf("a renewal makes only %d calls", n)
				}
				break
			}
		}
	}
}

// TestLateRenewal applies a renewal after its call returned without an answer: it must
// not end the pin.
func TestLateRenewal(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		l := &late{}
		r := e.start("a", func(o *testOptions) { l.KV, o.KV = o.KV, l })
		col, _, _ := e.collection(r, "c")
		p := e.pin(r, e.create(r, col, "x"), time.Minute)
		l.set(true)
		_, err := r.RenewPin(t.Context(), Ref{ID: p.Snapshot}, p.ID, time.Hour)
		wantError(t, err, meta.ErrUnavailable)
		if res, err := l.land(t.Context()); err != nil || !res.Succeeded {
			t.Fatalf("landed %v, err = %v", res.Succeeded, err)
		}
		time.Sleep(59 * time.Minute)
		if _, found := e.pinRecord(p); !found {
			t.Error("the pin is gone")
		}
		next, err := r.RenewPin(t.Context(), Ref{ID: p.Snapshot}, p.ID, 0)
		if err != nil || next.TTL != time.Hour {
			t.Errorf("got %+v, err = %v", next, err)
		}
	})
}

func TestUnpin(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s, other := e.create(r, col, "x"), e.create(r, col, "y")
		p, q := e.pin(r, s, time.Hour), e.pin(r, other, 0)
		unreadable := keys.Pin(s.ID, p.ID+500)
		e.put(unreadable, []byte{8, 99}) // format 99
		_, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0)
		wantError(t, err, ErrSnapshotPinned)
		if !strings.Contains(errText(err), fmt.Sprintf("%d (its record cannot be read)", p.ID+500)) {
			t.Errorf("%v does not name the pin that cannot be read", err)
		}
		_, err = r.RenewPin(t.Context(), Ref{ID: s.ID}, p.ID+500, 0)
		wantError(t, err, record.ErrUnreadable)
		unpin := func(ref Ref, id int64) error { return r.Unpin(t.Context(), ref, id) }
		for range 2 {
			wantError(t, unpin(Ref{ID: s.ID}, p.ID), nil)
		}
		if e.leased(p.lease) {
			t.Error("the lease lives on")
		}
		wantError(t, unpin(Ref{Name: "x"}, p.ID+500), nil)
		wantError(t, unpin(Ref{Name: "x"}, q.ID), nil) // not a pin of x
		for _, ref := range []Ref{{Name: "none"}, {ID: 1 << 50}} {
			wantError(t, unpin(ref, 5), nil)
		}
		wantError(t, unpin(Ref{ID: s.ID}, -1), catalog.ErrInvalid)
		wantError(t, unpin(Ref{ID: other.ID, Collection: catalog.Ref{ID: col.ID + 1}}, q.ID), ErrSnapshotMismatch)
		if left := e.keysUnder(keys.AllPinsPrefix); !slices.Equal(left, []string{keys.Pin(other.ID, q.ID)}) {
			t.Errorf("left %v", left)
		}
		if _, err := r.Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Error(err)
		}
		wantError(t, unpin(Ref{ID: s.ID}, p.ID), nil)
		settle()
		wantError(t, unpin(Ref{ID: s.ID}, p.ID), nil)
		// A renewal occurs between the read and the removal.
		b := e.start("b")
		between := func(do func()) {
			var once sync.Once
			r.kv.Hook(func(c meta.Call) meta.Fault {
				if c.Method == meta.MethodTxn {
					once.Do(do)
				}
				return meta.NoFault
			})
		}
		p = e.pin(r, other, time.Hour)
		between(func() {
			if p, err = b.RenewPin(t.Context(), Ref{ID: other.ID}, p.ID, 0); err != nil {
				t.Error(err)
			}
		})
		wantError(t, unpin(Ref{ID: other.ID}, p.ID), nil)
		r.kv.Hook(nil)
		if _, found := e.pinRecord(p); found || e.leased(p.lease) {
			t.Errorf("there is the pin: %v, or its lease", found)
		}
		// A removal occurs between the read and a renewal, which must not restore the pin.
		p = e.pin(r, other, time.Hour)
		between(func() { wantError(t, b.Unpin(t.Context(), Ref{ID: other.ID}, p.ID), nil) })
		_, err = r.RenewPin(t.Context(), Ref{ID: other.ID}, p.ID, 0)
		wantError(t, err, ErrPinNotFound)
		r.kv.Hook(nil)
		if _, found := e.pinRecord(p); found {
			t.Error("the renewal brought the pin back")
		}
	})
}

func TestPinsInPages(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		snaps := []*snapshot.Record{e.create(r, col, "x"), e.create(r, col, "y"), e.create(r, col, "z")}
		var all, second []PinPlace
		for i := range 21 {
			p := e.pin(r, snaps[i%3], time.Hour)
			all = append(all, PinPlace{p.Snapshot, p.ID})
			if i%3 == 1 {
				second = append(second, PinPlace{p.Snapshot, p.ID})
			}
		}
		odd := PinPlace{snaps[0].ID, 1 << 40}
		e.put(keys.Pin(odd.Snapshot, odd.ID), []byte{8, 99})
		all = append(all, odd)
		slices.SortFunc(all, func(a, b PinPlace) int {
			return int(a.Snapshot-b.Snapshot)*1000 + int(min(a.ID, 1000)-min(b.ID, 1000))
		})
		settle()           // so that only the pages make calls below
		for i := range 9 { // unreadable
			e.put(fmt.Sprintf("%sx%d", keys.PinPrefix(snaps[1].ID-1), i), nil)
			e.put(fmt.Sprintf("%sx%d", keys.PinPrefix(snaps[2].ID), i), nil)
		}
		for _, tc := range []struct {
			snapshot int64
			want     []PinPlace
		}{{0, all}, {snaps[1].ID, second}, {snaps[2].ID + 1, nil}} {
			for _, limit := range []int{1, 4, 1000} {
				var got []PinPlace
				var after PinPlace
				for {
					before := r.kv.Calls()
					list, more, err := r.Pins(t.Context(), tc.snapshot, after, limit)
					if err != nil || len(list) > limit || more && len(list) == 0 {
						t.Fatalf("%d pins, more = %v, err = %v", len(list), more, err)
					}
					if calls := r.kv.Calls() - before; limit == 4 && calls > 4 {
						t.Errorf("a page costs %d calls", calls)
					}
					for _, p := range list {
						got = append(got, PinPlace{p.Snapshot, p.ID})
						if (PinPlace{p.Snapshot, p.ID}) != odd && (p.Owner != "job" || p.TTL != time.Hour || p.ExpireTime.IsZero()) {
							t.Errorf("got %+v", p)
						}
					}
					if !more {
						break
					}
					after = got[len(got)-1]
				}
				if !slices.Equal(got, tc.want) {
					t.Errorf("pins of %d, %d at a time:\ngot  %v\nwant %v", tc.snapshot, limit, got, tc.want)
				}
			}
		}
	})
}

func TestPinEvents(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		other, _, _ := e.collection(r, "other")
		s := e.create(r, col, "x")
		settle()
		_, _, start, err := e.kv.Get(t.Context(), keys.Format)
		if err != nil {
			t.Fatal(err)
		}
		removed, expires := e.pin(r, s, time.Minute), e.pin(r, s, time.Minute)
		if _, err := r.RenewPin(t.Context(), Ref{ID: s.ID}, expires.ID, 2*time.Minute); err != nil {
			t.Fatal(err)
		}
		if err := r.Unpin(t.Context(), Ref{ID: s.ID}, removed.ID); err != nil {
			t.Fatal(err)
		}
		e.put(keys.Pin(s.ID, 5000), []byte{8, 99}) // unreadable
		time.Sleep(2*time.Minute + time.Second)
		settle()
		forever := e.pin(r, s, 0)
		// A removal is reported for one pin, at its own revision.
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{
			meta.Delete(keys.Pin(s.ID, forever.ID)),
			meta.Put(keys.Unpin, record.Encode(&storagev1.Unpin{
				Format: record.Format, SnapshotId: s.ID,
				PinId: forever.ID + 1,
			})),
		}}); err != nil {
			t.Fatal(err)
		}
		type reported struct {
			typ     ChangeType
			pin     int64
			owner   string
			ttl     time.Duration
			expired bool
		}
		want := []reported{
			{Created, removed.ID, "job", time.Minute, false},
			{Created, expires.ID, "job", time.Minute, false},
			{Updated, expires.ID, "job", 2 * time.Minute, false},
			{Deleted, removed.ID, "", 0, false},
			{Deleted, expires.ID, "", 0, true},
			{Created, forever.ID, "job", 0, false},
			{Deleted, forever.ID, "", 0, true},
		}
		// Pins of all collections are reported, whatever the filter.
		for _, collection := range []int64{0, col.ID, other.ID} {
			var got []reported
			ctx, cancel := context.WithCancel(t.Context())
			err := r.Watch(ctx, start, collection, func(events []Event, _ int64) error {
				for _, e := range events {
					if e.Pin == nil || e.Pin.Snapshot != s.ID {
						t.Errorf("got %+v", e)
						continue
					}
					got = append(got, reported{e.Type, e.Pin.ID, e.Pin.Owner, e.Pin.TTL, e.Expired})
				}
				if len(got) == len(want) {
					cancel()
				}
				return nil
			})
			wantError(t, err, context.Canceled)
			if !slices.Equal(got, want) {
				t.Errorf("got %v\nwant %v", got, want)
			}
		}
	})
}
