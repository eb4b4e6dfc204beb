package memory_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/meta/metatest"
	"github.com/snapshotd/snapshotd/test/virtual"
)

func TestMemory(t *testing.T) {
	metatest.Run(t, func(*testing.T) metatest.Store { return memory.New(memory.Options{}) })
}

func TestMemoryFull(t *testing.T) {
	s := memory.New(memory.Options{})
	metatest.Full(t, s, func() { s.SetFull(true) }, func() { s.SetFull(false) })
}

func TestMemoryEarlyProgress(t *testing.T) {
	s := memory.New(memory.Options{})
	metatest.Overtaken(t, s, s.Overtake)
}

// A lease ends on time in a bubble without calls, and a store with leases and watches does
// not prevent the end of the bubble.
func TestLeaseInBubble(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		ctx := t.Context()
		s := memory.New(memory.Options{})
		began := time.Now()
		lease, err := s.Grant(ctx, 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		res, err := s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.PutLeased("/a", nil, lease), meta.Put("/b", nil)}})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(9 * time.Second)
		if err := s.KeepAlive(ctx, lease); err != nil {
			t.Fatal(err)
		}
		b, err := s.Watch(ctx, "/", "0", res.Revision).Next()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff([]meta.Event{{Deleted: true, KV: meta.KeyValue{Key: "/a", ModRevision: res.Revision + 1}}},
			b.Events); diff != "" {
			t.Errorf("events (-want +got):\n%s", diff)
		}
		if got := time.Since(began); got != 19*time.Second {
			t.Errorf("lease ended after %v, want 19s", got)
		}
		if _, err := s.Grant(ctx, time.Hour); err != nil {
			t.Fatal(err)
		}
	})
}

// With an injected clock, an overdue lease is absent for the next caller.
func TestInjectedClock(t *testing.T) {
	now := time.Now()
	s := memory.New(memory.Options{Now: func() time.Time { return now }})
	ctx := t.Context()
	lease, err := s.Grant(ctx, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Txn(ctx, meta.Txn{Then: []meta.Op{meta.PutLeased("/a", nil, lease)}}); err != nil {
		t.Fatal(err)
	}
	for _, step := range []struct {
		pass time.Duration
		want bool
	}{{0, true}, {time.Hour - 1, true}, {1, false}} {
		now = now.Add(step.pass)
		if _, found, _, err := s.Get(ctx, "/a"); err != nil || found != step.want {
			t.Errorf("%v later: found %v, error %v; want %v", step.pass, found, err, step.want)
		}
	}
}
