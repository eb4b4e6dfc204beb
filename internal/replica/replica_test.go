package replica_test

import (
	"context"
	"crypto/rand"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/replica"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/election"
	metamemory "github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/object"
	objectmemory "github.com/snapshotd/snapshotd/internal/store/object/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// part fails when it is sent an error, in Run or in Lead.
type part struct {
	run, lead chan error
	terms     atomic.Int64
}

func newPart() *part { return &part{run: make(chan error), lead: make(chan error)} }

func (p *part) Run(ctx context.Context) error { return receive(ctx, p.run) }

func (p *part) Lead(ctx context.Context, _ election.Term) error {
	p.terms.Add(1)
	return receive(ctx, p.lead)
}

func receive(ctx context.Context, from <-chan error) error {
	select {
	case err := <-from:
		return err
	case <-ctx.Done():
		return nil
	}
}

func newReplica(t *testing.T, kv meta.KV, name string) *replica.Replica {
	t.Helper()
	r, err := replica.New(replica.Options{Shared: replica.Shared{
		KV: kv, Stores: map[string]object.Store{"default": objectmemory.New(objectmemory.Options{Now: time.Now})},
		Catalog:       catalog.New(catalog.Options{KV: kv, Now: time.Now, Rand: rand.Reader}),
		SnapshotStore: "default", Requests: request.NewLeases(kv, time.Now, nil), Replica: name, Now: time.Now,
		Rand: rand.Reader, Log: zaptest.NewLogger(t).Named(name),
	}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestOneReplicaLeads checks that one of two replicas runs the leader's parts, and that the
// other one continues when it stops.
func TestOneReplicaLeads(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		kv := metamemory.New(metamemory.Options{Now: time.Now})
		replicas := []*replica.Replica{newReplica(t, kv, "a"), newReplica(t, kv, "b")}
		parts, ended := []*part{newPart(), newPart()}, make(chan error, 2)
		var stops []context.CancelFunc
		for i, r := range replicas {
			ctx, stop := context.WithCancel(t.Context())
			stops = append(stops, stop)
			go func() { ended <- r.Run(ctx, parts[i]) }()
		}
		virtual.Wait()
		first := 0
		if replicas[1].Leading() {
			first = 1
		}
		for i, r := range replicas {
			if want := i == first; r.Leading() != want || parts[i].terms.Load() > 0 != want {
				t.Errorf("%s leads: %v, in %d terms; want %v", r.Replica, r.Leading(), parts[i].terms.Load(), want)
			}
		}
		name, err := election.Leader(t.Context(), kv, keys.Leader)
		if err != nil || name != replicas[first].Replica {
			t.Errorf("the leader is %q, %v; want %s", name, err, replicas[first].Replica)
		}
		stops[first]()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		virtual.Wait()
		if replicas[first].Leading() || !replicas[1-first].Leading() {
			t.Error("the other replica does not lead")
		}
		stops[1-first]()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestPartFails checks that the error of a leader's part ends the term, not the replica,
// and that the error of another part ends the replica.
func TestPartFails(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		r := newReplica(t, metamemory.New(metamemory.Options{Now: time.Now}), "a")
		p, ended := newPart(), make(chan error, 1)
		go func() { ended <- r.Run(t.Context(), p) }()
		virtual.Wait()
		p.lead <- errors.New("lost")
		time.Sleep(time.Minute)
		if n := p.terms.Load(); n != 2 || !r.Leading() {
			t.Errorf("%d terms, leading %v; want a second term", n, r.Leading())
		}
		broken := errors.New("broken")
		p.run <- broken
		if err := <-ended; !errors.Is(err, broken) {
			t.Errorf("Run ended with %v, want %v", err, broken)
		}
		if r.Leading() {
			t.Error("it leads after its end")
		}
	})
}
