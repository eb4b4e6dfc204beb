//go:build !short

package manager

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object/file"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// inReality is inEnv on real etcd and files, in real time.
func inReality(t *testing.T, kv meta.KV) *env {
	t.Helper()
	objects, err := file.Open(t.TempDir(), file.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := objects.Close(); err != nil {
			t.Error(err)
		}
	})
	return &env{t: t, kv: kv, objects: objects, now: time.Now}
}

// await watches the records of snapshots until done returns true.
func (e *env) await(what string, done func() bool) {
	e.t.Helper()
	_, _, now, err := e.kv.Get(e.t.Context(), keys.Format)
	if err != nil {
		e.t.Fatal(err)
	}
	from, to := keys.All()
	ctx, cancel := context.WithTimeout(e.t.Context(), 30*time.Second)
	defer cancel()
	changes := e.kv.Watch(ctx, from, to, now)
	for !done() {
		if _, err := changes.Next(); err != nil { // the leader's cleaning causes events, its renewals do not
			e.t.Fatalf("not in time: %s; there are %v: %v", what, e.keysUnder("/snapshot/"), err)
		}
	}
}

func TestEtcdLifecycle(t *testing.T) {
	e := inReality(t, etcdtest.Shared(t).KV(t))
	r := e.start("a", func(o *testOptions) { o.Parts.LeaderTTL = 2 * time.Second })
	col, _, _ := e.collection(r, "c")
	for i := range 3 {
		e.add(r, col, e.segment(r, col, i%2, 1, 20))
	}
	e.checkpoint(r, col, 10, 30)
	results := make(chan error, 64)
	for range 64 {
		go func() {
			_, err := r.Create(t.Context(), request.Token{}, spec(col, "same"))
			results <- err
		}()
	}
	created := 0
	for range 64 {
		if err := <-results; err == nil {
			created++
		} else {
			wantError(t, err, ErrSnapshotExists)
		}
	}
	if created != 1 {
		t.Errorf("%d creates of one name succeeded", created)
	}
	s, err := r.Get(t.Context(), Ref{Name: "same"})
	if err != nil || s.Totals.Segments != 3 || s.Totals.Straddling != 2 || s.Totals.Files != 3 {
		t.Errorf("%+v, err = %v", s, err)
	}
	if _, err := r.Drop(t.Context(), request.Token{}, Ref{Name: "same"}, 0); err != nil {
		t.Fatal(err)
	}
	e.await("the dropped snapshot is removed", func() bool { return len(e.keysUnder(keys.SnapshotPrefix)) == 0 })
	e.check(r)
}

// TestEtcdFrozenCreator lets the lease of a creator expire in real time.
func TestEtcdFrozenCreator(t *testing.T) {
	e := inReality(t, etcdtest.Shared(t).KV(t))
	quick := func(o *testOptions) { o.LeaseTTL, o.Parts.LeaderTTL = 2*time.Second, 2*time.Second }
	a, b := e.start("a", quick), e.start("b", quick)
	col, _, _ := e.collection(a, "c")
	a.store.Freeze()
	result := make(chan error, 1)
	go func() {
		_, err := a.Create(t.Context(), request.Token{}, spec(col, "x"))
		result <- err
	}()
	e.await("the create has begun", func() bool { return len(e.keysUnder(pendingKeys)) == 1 })
	a.kv.Freeze()
	e.await("the dead create is cleaned", func() bool { return len(e.keysUnder(keys.SnapshotPrefix)) == 0 })
	a.kv.Thaw()
	a.store.Thaw()
	wantError(t, <-result, ErrCreateAborted)
	e.create(b, col, "x")
}

// TestEtcdLostAndBack stops and restarts etcd during creates.
func TestEtcdLostAndBack(t *testing.T) {
	server := etcdtest.Start(t)
	e := inReality(t, server.KV(t))
	r := e.start("a", func(o *testOptions) {
		o.LeaseTTL, o.Parts.LeaderTTL, o.CreateTimeout = 6*time.Second, 2*time.Second, 10*time.Second
	})
	col, _, _ := e.collection(r, "c")
	e.create(r, col, "before")
	r.store.Freeze()
	result := make(chan error, 1)
	tok := token("t", "r")
	go func() {
		_, err := r.Create(t.Context(), tok, spec(col, "x"))
		result <- err
	}()
	e.await("the create has begun", func() bool { return len(e.keysUnder(pendingKeys)) == 1 })
	server.Stop(t)
	r.store.Thaw()
	if err := <-result; !errors.Is(err, meta.ErrUnavailable) {
		t.Errorf("etcd is lost, and the create says %v", err)
	}
	_, err := r.Get(t.Context(), Ref{Name: "x"})
	wantError(t, err, meta.ErrUnavailable)
	_, _, err = r.List(t.Context(), Filter{}, Place{}, 1)
	if err == nil {
		t.Error("a list without etcd")
	}
	server.Restart(t)
	e.await("the create is cleaned", func() bool { return len(e.keysUnder(pendingKeys)) == 0 })
	e.await("its record is gone", func() bool { return len(e.keysUnder(keys.SnapshotPrefix)) == 1 })
	_, err = r.Create(t.Context(), tok, spec(col, "x"))
	wantError(t, err, ErrCreateAborted)
	e.create(r, col, "x")
	if n := len(e.check(r)); n != 2 {
		t.Errorf("%d snapshots, want 2", n)
	}
}

// TestEtcdManySegments captures more segments than one manifest holds.
func TestEtcdManySegments(t *testing.T) {
	e := inReality(t, etcdtest.Shared(t).KV(t))
	r := e.start("a", func(o *testOptions) { o.Parts.LeaderTTL = 2 * time.Second })
	col, _, _ := e.collection(r, "c")
	const n = 2*chunkSegments + 10
	ids, err := r.catalog.AllocateIDs(t.Context(), request.Token{}, n)
	if err != nil {
		t.Fatal(err)
	}
	segments := make([]segment.Segment, n)
	for i := range segments {
		s := segment.Segment{
			ID: ids.First + int64(i), Level: 1, State: segment.Flushed, Rows: 1, DML: segment.Position{Timestamp: 5},
			Files: []segment.File{{Kind: segment.KindInsert, Field: 100, LogID: 1, Size: 10, MinTimestamp: 1, MaxTimestamp: 4}},
		}
		s.Files[0].Path = catalog.NativePath(col.ID, &s, &s.Files[0])
		segments[i] = s
	}
	e.add(r, col, segments...)
	e.checkpoint(r, col, 10, 10)
	s := e.create(r, col, "many")
	d, err := r.Describe(t.Context(), Ref{ID: s.ID})
	if err != nil || len(d.Metadata.Manifests) != 3 || s.Totals.Segments != n {
		t.Fatalf("%d manifests, totals %+v, err = %v", len(d.Metadata.Manifests), s.Totals, err)
	}
	// The segments are in order from every start.
	for _, from := range []int64{0, 1, chunkSegments - 1, chunkSegments, 2*chunkSegments + 9, n} {
		next := from
		err := r.Segments(t.Context(), Ref{ID: s.ID}, from, func(s *snapshot.Segment) bool {
			if s.Ordinal != next || s.ID != ids.First+next {
				t.Errorf("from %d: ordinal %d is segment %d", from, s.Ordinal, s.ID)
			}
			next++
			return next < from+3
		})
		if want := min(from+3, n); err != nil || next != want {
			t.Errorf("from %d: ended at %d, err = %v; want %d", from, next, err, want)
		}
	}
	e.check(r)
}
