package manager

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/lasting"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestMinCutResolvesNameOnce checks that the collection whose cut a create waits for is
// the one that it captures.
func TestMinCutResolvesNameOnce(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		blue, _, _ := e.collection(r, "c")
		e.checkpoint(r, blue, 100, 100)
		green, err := r.catalog.CreateCollection(t.Context(), request.Token{}, catalog.Collection{
			DB: "default", Name: "green", Channels: []string{"g0", "g1"},
			Roots: []catalog.Root{{Store: "default", Prefix: "green/"}},
		})
		if err != nil {
			t.Fatal(err)
		}
		e.checkpoint(r, green, 5, 5)
		settle()
		done := false
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGrant && !done { // begin
				done = true
				for id, name := range map[int64]string{} {
					_, _ = id, name
				}
				if _, err := r.catalog.RenameCollection(t.Context(), request.Token{}, catalog.Ref{ID: blue.ID},
					"default", "old"); err != nil {
					t.Error(err)
				}
				if _, err := r.catalog.RenameCollection(t.Context(), request.Token{}, catalog.Ref{ID: green.ID},
					"default", "c"); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		sp := CreateSpec{
			Collection: catalog.Ref{DB: "default", Name: "c"}, Name: "x",
			MinCut: []catalog.Checkpoint{{Shard: 0, Position: segment.Position{Timestamp: 50}}},
		}
		s, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Fatal(err)
		}
		if s.Cuts[0].Timestamp < 50 {
			t.Errorf("asked for a cut of 50, got %v of collection %d (awaited %d)", s.Cuts, s.Collection, blue.ID)
		}
	})
}

// TestChannelsWithoutCheckpoint checks that channels without a checkpoint keep their
// names and order.
func TestChannelsWithoutCheckpoint(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		if _, err := r.catalog.SetCheckpoints(t.Context(), catalog.Ref{ID: col.ID},
			[]catalog.Checkpoint{{Shard: 1, Position: segment.Position{Timestamp: 10}}}); err != nil {
			t.Fatal(err)
		}
		s := e.create(r, col, "x")
		d, err := r.Describe(t.Context(), Ref{ID: s.ID})
		if err != nil {
			t.Fatal(err)
		}
		if len(d.Metadata.Channels) != 2 {
			t.Errorf("collection had %v, the snapshot knows %v", col.Channels, d.Metadata.Channels)
		}
	})
}

// TestJoinAfterCompaction checks that a repeat joins a create after a compaction.
func TestJoinAfterCompaction(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		b := e.start("b")
		col, _, _ := e.collection(r, "c")
		tok := token("t", "r")
		r.store.Freeze()
		first := make(chan error, 1)
		go func() { _, err := r.Create(t.Context(), tok, spec(col, "x")); first <- err }()
		settle()
		e.create(b, col, "other") // the store's revision advances
		_, _, now, _ := e.kv.Get(t.Context(), "/none")
		if err := e.memory.Compact(t.Context(), now); err != nil {
			t.Fatal(err)
		}
		second := make(chan error, 1)
		go func() { _, err := b.Create(t.Context(), tok, spec(col, "x")); second <- err }()
		settle()
		r.store.Thaw()
		e1, e2 := <-first, <-second
		if e1 != nil || e2 != nil {
			t.Errorf("first: %v; joined: %v", e1, e2)
		}
	})
}

// TestNoWaitRace checks that a create with NoWait has no data race.
func TestNoWaitRace(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2)) // no checkpoint
		for i := range 20 {
			sp := spec(col, fmt.Sprint("x", i))
			sp.NoWait = true
			s, err := r.Create(t.Context(), request.Token{}, sp)
			if err != nil || s.State != snapshot.Pending {
				t.Error(s, err)
			}
			settle()
		}
	})
}

// TestExactOfOldCeiling checks require_exact on restored segments with a row ceiling.
func TestExactOfOldCeiling(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.segment(r, col, 0, 10, 60)
		s.RowCeiling = 50 // restored from a snapshot with cut 50
		e.add(r, col, s)
		e.checkpoint(r, col, 100, 100)
		sp := spec(col, "x")
		sp.RequireExact = true
		snap, err := r.Create(t.Context(), request.Token{}, sp)
		if err != nil {
			t.Errorf("nothing straddles 100: %v", err)
		} else if snap.Totals.Straddling != 0 {
			t.Errorf("straddling %d", snap.Totals.Straddling)
		}
	})
}

// TestCommitDroppedBeforeReadBack checks that a commit that took effect succeeds
// although the snapshot was dropped before the read-back.
func TestCommitDroppedBeforeReadBack(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		settle()
		tok := token("t", "r")
		// The leader must keep the record, so that it is read back as DELETING.
		for _, r := range []*testReplica{a, b} {
			r.store.Plan(func(c object.Call) object.Fault {
				if c.Op == object.OpDelete {
					return object.FaultBefore
				}
				return object.FaultNone
			})
		}
		var lost, dropped atomic.Bool
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn && len(e.objectsUnder("snapshots/")) == 2 && lost.CompareAndSwap(false, true) {
				return meta.After
			}
			// The first call after the commit has taken effect: the read back, or one that runs beside it.
			if s, err := b.Get(t.Context(), Ref{Name: "x"}); lost.Load() && err == nil && s.State == snapshot.Committed &&
				dropped.CompareAndSwap(false, true) {
				if _, err := b.Drop(t.Context(), request.Token{}, Ref{Name: "x"}, 0); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		_, err := a.Create(t.Context(), tok, spec(col, "x"))
		_, again := b.Create(t.Context(), tok, spec(col, "x"))
		a.kv.Hook(nil)
		a.store.Plan(nil)
		b.store.Plan(nil)
		if !dropped.Load() {
			t.Error("nothing was dropped before the read back")
		}
		if err != nil || again != nil {
			t.Errorf("it was committed, but the call returned %v, and its repeat %v", err, again)
		}
	})
}

// TestUpdateToken checks an update whose token is used by another call while it is
// being decided.
func TestUpdateToken(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		s := e.create(a, col, "x")
		settle()
		text := "new"
		tok := request.Token{Principal: "local", Method: "UpdateSnapshot", Value: "t", Hash: []byte{1}}
		sp := UpdateSpec{Description: &text, Revision: s.Revision}
		n := 0
		b.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGet {
				if n++; n == 2 { // after the read of the token
					if _, err := a.Update(t.Context(), tok, Ref{ID: s.ID}, sp); err != nil {
						t.Error(err)
					}
				}
			}
			return meta.NoFault
		})
		_, err := b.Update(t.Context(), tok, Ref{ID: s.ID}, sp)
		b.kv.Hook(nil)
		if err != nil {
			t.Errorf("the update under this token took effect, the repeat says %v", err)
		}
	})
}

// TestMinCutDropped checks that a wait for a cut ends when the collection is dropped.
func TestMinCutDropped(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		sp := spec(col, "x")
		sp.MinCut = []catalog.Checkpoint{{Shard: 0, Position: segment.Position{Timestamp: 50}}}
		done := make(chan error, 1)
		begin := time.Now()
		go func() { _, err := r.Create(ctx, request.Token{}, sp); done <- err }()
		settle()
		if _, err := r.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
			t.Fatal(err)
		}
		err := <-done
		t.Log(time.Since(begin), err)
		wantError(t, err, catalog.ErrCollectionNotActive)
	})
}

// delayed is a store whose writes take the next delay each.
type delayed struct {
	object.Store
	delays chan time.Duration
}

func (s *delayed) Create(ctx context.Context, key string, body []byte) (object.Info, error) {
	time.Sleep(<-s.delays)
	return s.Store.Create(ctx, key, body)
}

// TestSlowCreate runs a create whose steps are each shorter than the lease but together
// longer, with no step when a renewal has just become due.
func TestSlowCreate(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			delays := make(chan time.Duration, 3)
			delays <- 19 * time.Second
			delays <- 45 * time.Second
			delays <- 45 * time.Second
			o.Stores = map[string]object.Store{"default": &delayed{o.Stores["default"], delays}}
		})
		col, _, _ := e.collection(r, "c")
		e.add(r, col, e.segment(r, col, 0, 1, 2))
		e.checkpoint(r, col, 10, 10)
		_, err := r.Create(t.Context(), request.Token{}, spec(col, "x"))
		if err != nil {
			t.Errorf("no step took longer than 45 s of a lease of 60 s: %v", err)
		}
	})
}

// TestJoinLosesRace repeats a create by its token between begin and commit, and drops
// the collection.
func TestJoinLosesRace(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(a, "c")
		settle()
		tok := token("t", "r")
		done := false
		b.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodGrant && !done {
				done = true
				if _, err := a.Create(t.Context(), tok, spec(col, "x")); err != nil {
					t.Error(err)
				}
				if _, err := a.catalog.DropCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID}, 0); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		_, err := b.Create(t.Context(), tok, spec(col, "x"))
		b.kv.Hook(nil)
		if err != nil {
			t.Errorf("the create under this token took effect, the repeat says %v", err)
		}
	})
}

// TestTruncatedRead checks that one truncated read is retried.
func TestTruncatedRead(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		s := e.create(r, col, "x")
		r.store.FailNth(object.OpGet, 0, object.FaultTruncate)
		_, err := r.Describe(t.Context(), Ref{ID: s.ID})
		_, err2 := r.Describe(t.Context(), Ref{ID: s.ID})
		if errors.Is(err, snapshot.ErrCorrupt) && err2 == nil {
			t.Errorf("one short answer: %v; then fine", err)
		}
	})
}

// TestLeaseGoneBeforeBegin checks the error of a create whose lease expired before its
// begin.
func TestLeaseGoneBeforeBegin(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		settle()
		var stopped atomic.Bool
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodTxn && stopped.CompareAndSwap(false, true) {
				time.Sleep(2 * time.Minute) // the process was stopped after the grant and before the id
			}
			return meta.NoFault
		})
		_, err := a.Create(t.Context(), request.Token{}, spec(col, "x"))
		a.kv.Hook(nil)
		wantError(t, err, ErrCreateAborted)
		t.Logf("%v; lease not found: %v", err, errors.Is(err, meta.ErrLeaseNotFound))
		if errors.Is(err, meta.ErrLeaseNotFound) && !errors.Is(err, ErrCreateAborted) {
			t.Error("that has no row in the server's table: INTERNAL")
		}
	})
}

// TestRenamedInBetween renames the collection between begin and capture.
func TestRenamedInBetween(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		settle()
		done := false
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodRange && len(e.keysUnder(pendingKeys)) > 0 && !done {
				done = true
				if _, err := b.catalog.RenameCollection(t.Context(), request.Token{}, catalog.Ref{ID: col.ID},
					"default", "new"); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		s := e.create(a, col, "x")
		a.kv.Hook(nil)
		d, err := a.Describe(t.Context(), Ref{ID: s.ID})
		if err != nil {
			t.Fatal(err)
		}
		if d.Metadata.Collection.Name != s.CollectionName {
			t.Errorf("the record says %q, the metadata %q", s.CollectionName, d.Metadata.Collection.Name)
		}
	})
}

// TestTransientReadError checks that a passing error of the metadata store does not
// abort a create.
func TestTransientReadError(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		settle()
		done := false
		a.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method == meta.MethodScan && len(e.keysUnder(pendingKeys)) > 0 && !done {
				done = true
				return meta.Before
			}
			return meta.NoFault
		})
		_, err := a.Create(t.Context(), request.Token{}, spec(col, "x"))
		a.kv.Hook(nil)
		if err != nil {
			t.Errorf("one read got no answer: %v", err)
		}
	})
}

// TestHungDelete checks that a store that hangs does not stop the abandoning of dead
// creates.
func TestHungDelete(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		a := e.start("a")
		settle()
		b := e.start("b")
		col, _, _ := e.collection(b, "c")
		one := e.create(b, col, "one")
		// b's create dies
		b.store.Freeze()
		go func() { _, _ = b.Create(t.Context(), request.Token{}, spec(col, "x")) }()
		settle()
		a.store.Freeze() // a leads; its list hangs
		if _, err := a.Drop(t.Context(), request.Token{}, Ref{ID: one.ID}, 0); err != nil {
			t.Fatal(err)
		}
		settle()
		b.kv.Freeze()
		time.Sleep(30 * time.Minute)
		settle()
		if got := e.keysUnder("/snapshot/name/"); len(got) != 0 {
			t.Errorf("after half an hour the dead create still has its name: %v; leading %v", got, a.Leading())
		}
		b.kv.Thaw()
		b.store.Thaw()
	})
}

// TestFarExpiryIsRefused checks that an expiry beyond 2262, which overflows int64
// nanoseconds, is rejected.
func TestFarExpiryIsRefused(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		for _, year := range []int{1999, 2300, 9999} {
			at := time.Date(year, 12, 31, 0, 0, 0, 0, time.UTC)
			sp := spec(col, "x")
			sp.ExpireTime = at
			_, err := r.Create(t.Context(), request.Token{}, sp)
			wantError(t, err, catalog.ErrInvalid)
			s := e.create(r, col, fmt.Sprintf("y%d", year))
			_, err = r.Update(t.Context(), request.Token{}, Ref{ID: s.ID}, UpdateSpec{ExpireTime: &at})
			wantError(t, err, catalog.ErrInvalid)
		}
		far := spec(col, "far")
		far.ExpireTime = time.Now().Add(99 * 365 * 24 * time.Hour)
		if _, err := r.Create(t.Context(), request.Token{}, far); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Hour)
		settle()
		if n := len(e.check(r)); n != 4 {
			t.Errorf("%d snapshots an hour later, want 4", n)
		}
	})
}

// TestLargestRecord checks the size of a record with the maximum of channels,
// partitions and labels.
func TestLargestRecord(t *testing.T) {
	s := &snapshot.Record{
		State: snapshot.Committed, Name: strings.Repeat("n", 255), DB: strings.Repeat("d", 255),
		CollectionName: strings.Repeat("c", 255),
		Description:    strings.Repeat("x", 1024), Labels: map[string]string{}, RequestKey: strings.Repeat("k", 120),
		Op: strings.Repeat("o", 24),
	}
	for i := range 16 {
		s.Labels[fmt.Sprintf("%04d", i)] = strings.Repeat("v", 252)
	}
	for i := range catalog.MaxChannels {
		s.Cuts = append(s.Cuts, snapshot.Cut{
			Shard: i, Channel: strings.Repeat("v", 4096/catalog.MaxChannels),
			Timestamp: segment.MaxTimestamp,
		})
	}
	for i := range int64(catalog.MaxPartitions) {
		s.Partitions = append(s.Partitions, 1<<60+1000*i)
	}
	value := snapshot.Encode(s, s.Op)
	if err := checkRecordSize(value); err != nil {
		t.Error(err)
	}
	got, err := snapshot.Decode(meta.KeyValue{Key: keys.Snapshot(1), Value: value})
	if err != nil || !slices.Equal(got.Partitions, s.Partitions) || len(got.Cuts) != len(s.Cuts) {
		t.Errorf("it does not come back: %v", err)
	}
}

// TestCleanerLogLine checks that no log line grows with the number of snapshots whose
// removal fails.
func TestCleanerLogLine(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		core, logs := observer.New(zap.InfoLevel)
		problems := lasting.New(time.Now)
		r := e.start("a", func(o *testOptions) {
			o.Parts.Collector.Off, o.Log, o.Problems = true, zap.New(core), problems
		})
		col, _, _ := e.collection(r, "c")
		var list []*snapshot.Record
		for i := range 300 {
			list = append(list, e.create(r, col, fmt.Sprint("s", i)))
		}
		settle()
		r.store.Plan(func(c object.Call) object.Fault {
			if c.Op == object.OpDelete {
				return object.FaultBefore
			}
			return object.FaultNone
		})
		for _, s := range list {
			e.dropSnapshot(r, s)
		}
		time.Sleep(5 * time.Minute)
		settle()
		warned := 0
		for _, e := range logs.All() {
			for field, v := range e.ContextMap() {
				if text := fmt.Sprint(v); len(text) > 6<<10 {
					t.Errorf("%q has %d bytes of %s", e.Message, len(text), field)
				}
			}
			if e.Level == zap.WarnLevel {
				warned++
			}
		}
		if warned == 0 {
			t.Error("the log does not warn that no snapshot can be removed")
		}
		// The first pass, which the log shows, may be of fewer snapshots than the last.
		bounded := slices.ContainsFunc(problems.States(), func(s lasting.State) bool {
			return strings.Contains(s.Error, "and 292 errors more") && len(s.Error) <= 6<<10
		})
		if !bounded {
			t.Errorf("no problem counts the snapshots that cannot be removed: %+v", problems.States())
		}
		r.store.Plan(nil)
		time.Sleep(5 * time.Minute)
		settle()
		e.check(r)
	})
}
