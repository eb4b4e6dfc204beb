//go:build !short

package manager

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/etcdtest"
)

// callers is the number of concurrent calls of each kind. The documents promise 1000.
var callers = flag.Int("callers", 200, "calls at once in TestConcurrentCallsDoNotConflict")

// TestConcurrentCallsDoNotConflict makes many concurrent calls that change different
// things, on two replicas. None fails.
func TestConcurrentCallsDoNotConflict(t *testing.T) {
	n := *callers
	e := inReality(t, etcdtest.Shared(t).KV(t))
	rs := []*testReplica{e.start("a"), e.start("b")}
	col := e.richCollection(rs[0], "c", 2)
	s := e.create(rs[0], col, "source")
	first, err := rs[0].catalog.AllocateIDs(t.Context(), noToken, int64(n))
	if err != nil {
		t.Fatal(err)
	}
	tok := func(kind string, i int) request.Token {
		return request.Token{Principal: "p", Method: kind, Value: fmt.Sprint(i), Hash: []byte(kind)}
	}
	for _, kind := range []struct {
		name string
		call func(ctx context.Context, r *testReplica, i int) error
	}{
		{"AllocateIds", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.catalog.AllocateIDs(ctx, tok("AllocateIds", i), 10)
			return err
		}},
		{"CreateCollection", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.catalog.CreateCollection(ctx, tok("CreateCollection", i), catalog.Collection{
				DB: "default", Name: fmt.Sprint("made-", i), Roots: []catalog.Root{{Store: "default", Prefix: "data/"}},
			})
			return err
		}},
		{"AddSegments", func(ctx context.Context, r *testReplica, i int) error {
			seg := segment.Segment{
				ID: first.First + int64(i), State: segment.Growing, Rows: 1,
				Start: segment.Position{Timestamp: 1},
			}
			_, _, err := r.catalog.AddSegments(ctx, col.ID, []segment.Segment{seg})
			return err
		}},
		{"UpdateSegments", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.catalog.Change(ctx, tok("UpdateSegments", i), catalog.Ref{ID: col.ID}, catalog.SegmentChange{
				Update: []catalog.Update{{Segment: first.First + int64(i), Rows: new(int64(2))}},
			})
			return err
		}},
		{"CreatePartition", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.catalog.CreatePartition(ctx, tok("CreatePartition", i), catalog.Ref{ID: col.ID},
				catalog.Partition{Name: fmt.Sprint("p-", i)})
			return err
		}},
		{"PinSnapshot", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.Pin(ctx, tok("PinSnapshot", i), Ref{ID: s.ID}, PinSpec{Owner: "load"})
			return err
		}},
		{"RestoreSnapshot", func(ctx context.Context, r *testReplica, i int) error {
			sp := restoreSpecOf(s)
			sp.Name = fmt.Sprint("restored-", i)
			_, err := r.Restore(ctx, tok("RestoreSnapshot", i), sp)
			return err
		}},
		{"CreateSnapshot", func(ctx context.Context, r *testReplica, i int) error {
			_, err := r.Create(ctx, tok("CreateSnapshot", i), spec(col, fmt.Sprint("snapshot-", i)))
			return err
		}},
	} {
		began := time.Now()
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
				defer cancel()
				errs[i] = kind.call(ctx, rs[i%2], i)
			})
		}
		wg.Wait()
		refused := 0
		for _, err := range errs {
			if err != nil {
				refused++
			}
		}
		if refused > 0 {
			t.Errorf("%s: %d of %d were refused: %.800v", kind.name, refused, n, errors.Join(errs...))
		}
		t.Logf("%s: %d calls in %v", kind.name, n, time.Since(began))
	}
}
