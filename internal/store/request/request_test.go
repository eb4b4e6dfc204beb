package request_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

func token(hash string) request.Token {
	return request.Token{Principal: "p", Method: "m", Value: "v", Hash: []byte(hash)}
}

func TestNoToken(t *testing.T) {
	var none request.Token
	if none.IsSet() || none.Key() != "" || none.Unused() != nil || none.Begin(1) != nil || none.End(request.Lease{ID: 1},
		1, nil) != nil {
		t.Error("no token adds something")
	}
	if got, err := request.Find(t.Context(), memory.New(memory.Options{}), none); got != nil || err != nil {
		t.Errorf("%v, %v", got, err)
	}
}

func TestToken(t *testing.T) {
	ctx := t.Context()
	kv := memory.New(memory.Options{})
	tok := token("h")
	if got, err := request.Find(ctx, kv, tok); got != nil || err != nil {
		t.Fatalf("%v, %v", got, err)
	}
	write := func(ops []meta.Op) int64 {
		t.Helper()
		res, err := kv.Txn(ctx, meta.Txn{If: tok.Unused(), Then: ops})
		if err != nil || !res.Succeeded {
			t.Fatal(res, err)
		}
		return res.Revision
	}
	at := write(tok.Begin(7))
	want := &request.Record{ID: 7, Revision: at, Read: at, Hash: []byte("h")}
	got, err := request.Find(ctx, kv, tok)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if res, err := kv.Txn(ctx, meta.Txn{If: tok.Unused(), Then: tok.Begin(8)}); err != nil || res.Succeeded {
		t.Errorf("a second operation began: %v, %v", res, err)
	}
	if _, err := request.Find(ctx, kv, token("other")); !errors.Is(err, request.ErrReused) {
		t.Errorf("err = %v, want %v", err, request.ErrReused)
	}
	lease, err := kv.Grant(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	res, err := kv.Txn(ctx, meta.Txn{Then: tok.End(request.Lease{ID: lease}, 7, []byte("result"))})
	if err != nil {
		t.Fatal(err)
	}
	want = &request.Record{
		ID: 7, Done: true, Result: []byte("result"), Revision: res.Revision, Read: res.Revision,
		Hash: []byte("h"),
	}
	got, err = request.Find(ctx, kv, tok)
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v (-want +got):\n%s", err, diff)
	}
	if err := kv.Revoke(ctx, lease); err != nil {
		t.Fatal(err)
	}
	if got, err := request.Find(ctx, kv, tok); got != nil || err != nil {
		t.Errorf("after its lease: %v, %v", got, err)
	}
	if _, err := kv.Txn(ctx, meta.Txn{Then: []meta.Op{meta.Put(tok.Key(), []byte("x"))}}); err != nil {
		t.Fatal(err)
	}
	if _, err := request.Find(ctx, kv, tok); !errors.Is(err, record.ErrUnreadable) {
		t.Errorf("err = %v, want %v", err, record.ErrUnreadable)
	}
}

// A record says when it is over, however it ended; without a time its lease does.
func TestExpired(t *testing.T) {
	ctx := t.Context()
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	kv := memory.New(memory.Options{})
	untrusted := errors.New("no time")
	for _, stampErr := range []error{nil, untrusted} {
		l := request.NewLeases(kv, time.Now, func(context.Context) (time.Time, error) { return now, stampErr })
		lease, err := l.Get(ctx)
		if err != nil {
			t.Fatal(err)
		}
		tok := token("h")
		begun := meta.KeyValue{Key: tok.Key(), Value: tok.Begin(1)[0].Value}
		ended, err := request.Complete(begun, lease, []byte("result"))
		if err != nil {
			t.Fatal(err)
		}
		failed, err := request.Fail(begun, lease, "REASON", "text")
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string][]byte{
			"in one": tok.End(lease, 1, nil)[0].Value, "ended": ended.Value, "failed": failed.Value, "under way": begun.Value,
		} {
			record := meta.KeyValue{Key: tok.Key(), Value: value}
			over, err := request.Expired(record, now.Add(25*time.Hour))
			if want := stampErr == nil && name != "under way"; err != nil || over != want {
				t.Errorf("%s, stamped with %v: over after 25 h = %v, %v", name, stampErr, over, err)
			}
			if over, err := request.Expired(record, now.Add(25*time.Hour-1)); err != nil || over {
				t.Errorf("%s: over before that: %v, %v", name, over, err)
			}
		}
	}
}

// A result is kept for a day at least, whenever in its lease's life it came.
func TestLeases(t *testing.T) {
	ctx := t.Context()
	now := time.Now()
	clock := func() time.Time { return now }
	kv := memory.New(memory.Options{Now: clock})
	l := request.NewLeases(kv, clock, nil)
	get := func() request.Lease {
		t.Helper()
		id, err := l.Get(ctx)
		if err != nil {
			t.Fatal(err)
		}
		return id
	}
	first := get()
	now = now.Add(time.Hour - 1)
	if again := get(); again != first {
		t.Errorf("another lease within the hour")
	}
	tok := token("h")
	if _, err := kv.Txn(ctx, meta.Txn{Then: tok.End(first, 1, nil)}); err != nil {
		t.Fatal(err)
	}
	now = now.Add(24 * time.Hour)
	if got, err := request.Find(ctx, kv, tok); err != nil || got == nil {
		t.Errorf("after a day: %v, %v", got, err)
	}
	now = now.Add(time.Hour)
	if got, err := request.Find(ctx, kv, tok); err != nil || got != nil {
		t.Errorf("after its lease: %v, %v", got, err)
	}
	second := get()
	if second == first {
		t.Error("a lease that is old")
	}
	now = now.Add(-time.Minute) // the clock was set back
	third := get()
	if third == second {
		t.Error("a lease of the future")
	}
	l.Forget(ctx, second) // not the one it has
	if get() != third {
		t.Error("forgot another lease")
	}
	l.Forget(ctx, third)
	if get() == third {
		t.Error("forgot nothing")
	}

	f := meta.NewFaulty(kv)
	f.FailNth(0, meta.Before)
	l = request.NewLeases(f, clock, nil)
	if _, err := l.Get(ctx); !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("err = %v", err)
	}
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := l.Get(ctx); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if f.Calls() != 2 {
		t.Errorf("%d grants, want 2", f.Calls())
	}
	// Who waits for another's grant can give up.
	f.Freeze()
	defer f.Thaw()
	now = now.Add(2 * time.Hour)
	over, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := l.Get(over); !errors.Is(err, context.Canceled) {
		t.Errorf("err = %v, want %v", err, context.Canceled)
	}
}
