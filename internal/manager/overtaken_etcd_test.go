//go:build !short

package manager

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/etcd"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdproxy"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// TestEtcdOvertaken runs against an etcd that answers progress requests before it has
// sent the events, and whose streams break: no replica continues without a snapshot
// that it has not received, for lists or for deletes.
func TestEtcdOvertaken(t *testing.T) {
	p := etcdproxy.Start(t, etcdtest.Shared(t).Endpoint())
	kv, err := etcd.Open(etcd.Options{Endpoints: []string{p.Endpoint()}, Root: "/" + rand.Text()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := kv.Close(); err != nil {
			t.Error(err)
		}
	})
	e := inReality(t, kv)
	a := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
	col, _, _ := e.collection(a, "c")
	s := e.segment(a, col, 0, 1, 20)
	e.add(a, col, s)
	e.checkpoint(a, col, 100, 100)
	p.Overtake(7, 12)
	var group sync.WaitGroup
	made := make(chan int, 3)
	for k := range 3 {
		group.Go(func() {
			n := 0
			for i := range 25 {
				_, err := a.Create(t.Context(), request.Token{}, spec(col, fmt.Sprintf("s-%d-%d", k, i)))
				switch {
				case err == nil:
					n++
				case errors.Is(err, meta.ErrUnavailable), errors.Is(err, ErrCreateAborted): // cut off in between
				default:
					t.Error(err)
				}
			}
			made <- n
		})
	}
	all := []*testReplica{a}
	for i := range 6 { // start while snapshots are made
		all = append(all, e.start(fmt.Sprint("b", i), func(o *testOptions) { o.Parts.Collector.Off = true }))
		for range 5 { // ask for progress
			if _, _, err := all[i+1].List(t.Context(), Filter{}, Place{}, 1); err != nil {
				t.Error(err)
			}
		}
	}
	group.Wait()
	close(made)
	want := 0
	for n := range made {
		want += n
	}
	p.Overtake(0, 0)
	if events, cuts := p.Overtaken(); events == 0 || cuts == 0 {
		t.Fatalf("%d answers were overtaken, %d streams cut", events, cuts)
	}
	asks := e.dropSegments(a, col, s.ID)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for _, r := range all {
		for backoff := (meta.Backoff{Max: 100 * time.Millisecond}); ; {
			list, _, err := r.List(ctx, Filter{States: []snapshot.State{snapshot.Committed}}, Place{}, 1000)
			if err != nil {
				t.Fatal(err)
			}
			got, err := r.GC.Check(ctx, catalog.Ref{ID: col.ID}, asks)
			if err == nil && len(list) >= want && got[0].Holders == len(list) {
				break
			}
			if backoff.Wait(ctx) != nil {
				t.Fatalf("%s lists %d of %d snapshots, and knows of %v: %v", r.o.Replica, len(list), want, got, err)
			}
		}
	}
}
