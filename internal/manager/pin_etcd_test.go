//go:build !short

package manager

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// TestEtcdPinExpires lets leases of pins expire in real time: a renewed pin stays,
// another expires and releases its snapshot.
func TestEtcdPinExpires(t *testing.T) {
	e := inReality(t, etcdtest.Shared(t).KV(t))
	r := e.start("a", func(o *testOptions) { o.Parts.LeaderTTL = 2 * time.Second })
	col, _, _ := e.collection(r, "c")
	s, kept := e.create(r, col, "x"), e.create(r, col, "kept")
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, _, start, err := e.kv.Get(ctx, keys.Format)
	if err != nil {
		t.Fatal(err)
	}
	p, renewed := e.pin(r, s, 2*time.Second), e.pin(r, kept, 2*time.Second)
	if renewed, err = r.RenewPin(ctx, Ref{ID: kept.ID}, renewed.ID, time.Hour); err != nil {
		t.Fatal(err)
	}
	_, err = r.Drop(ctx, request.Token{}, Ref{ID: s.ID}, 0)
	wantError(t, err, ErrSnapshotPinned)
	err = r.Watch(ctx, start, 0, func(events []Event, _ int64) error {
		for _, e := range events {
			if e.Pin == nil || e.Type != Deleted {
				continue
			}
			if e.Pin.ID != p.ID || e.Pin.Snapshot != s.ID || !e.Expired {
				t.Errorf("got %+v of %+v", e, e.Pin)
			}
			return context.Canceled // seen
		}
		return nil
	})
	wantError(t, err, context.Canceled)
	if now := time.Now(); now.Before(p.ExpireTime) {
		t.Errorf("it ended at %v, before %v", now, p.ExpireTime)
	}
	if _, err := r.Drop(ctx, request.Token{}, Ref{ID: s.ID}, 0); err != nil {
		t.Error(err)
	}
	_, err = r.RenewPin(ctx, Ref{ID: s.ID}, p.ID, 0)
	wantError(t, err, ErrPinNotFound)
	_, err = r.Drop(ctx, request.Token{}, Ref{ID: kept.ID}, 0)
	wantError(t, err, ErrSnapshotPinned)
	if kv, found := e.pinRecord(renewed); !found || kv.Lease != renewed.lease {
		t.Errorf("the renewed pin: found %v, under lease %x", found, kv.Lease)
	}
	e.await("the dropped snapshot is removed", func() bool { return len(e.keysUnder(keys.SnapshotPrefix)) == 1 })
}

// TestEtcdPinAndDrop races pins with drops.
func TestEtcdPinAndDrop(t *testing.T) {
	e := inReality(t, etcdtest.Shared(t).KV(t))
	quick := func(o *testOptions) { o.Parts.LeaderTTL = 2 * time.Second }
	replicas := []*testReplica{e.start("a", quick), e.start("b", quick)}
	col, _, _ := e.collection(replicas[0], "c")
	for range 10 {
		s := e.create(replicas[0], col, "x")
		var wg sync.WaitGroup
		pins, drops := make(chan *Pin, 16), make(chan bool, 16)
		for i := range 16 {
			wg.Go(func() {
				if i%4 == 0 {
					_, err := replicas[i/4%2].Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0)
					if err == nil {
						drops <- true
					} else {
						wantError(t, err, ErrSnapshotPinned)
					}
					return
				}
				p, err := replicas[i%2].Pin(t.Context(), request.Token{}, Ref{ID: s.ID}, PinSpec{Owner: "o", TTL: time.Minute})
				if err == nil {
					pins <- p
				} else if !errors.Is(err, snapshot.ErrNotCommitted) && !errors.Is(err, snapshot.ErrExpiredOrDropped) {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if len(pins) > 0 && len(drops) > 0 {
			t.Errorf("%d pins and %d drops of one snapshot succeeded", len(pins), len(drops))
		}
		for len(pins) > 0 {
			p := <-pins
			if err := replicas[0].Unpin(t.Context(), Ref{ID: p.Snapshot}, p.ID); err != nil {
				t.Error(err)
			}
		}
		if _, err := replicas[1].Drop(t.Context(), request.Token{}, Ref{ID: s.ID}, 0); err != nil {
			t.Error(err)
		}
	}
	if left := e.keysUnder(keys.AllPinsPrefix); len(left) != 0 {
		t.Errorf("left %v", left)
	}
	e.await("all are removed", func() bool { return len(e.keysUnder(keys.SnapshotPrefix)) == 0 })
}
