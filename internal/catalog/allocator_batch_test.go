package catalog_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/memory"
	"github.com/snapshotd/snapshotd/internal/store/request"
	"github.com/snapshotd/snapshotd/test/virtual"
)

// slowKV is a store whose transactions take a millisecond each, as etcd's do. It counts
// those that write the allocator's record.
type slowKV struct {
	meta.KV
	writes atomic.Int64
}

func (s *slowKV) Txn(ctx context.Context, t meta.Txn) (meta.TxnResult, error) {
	for _, op := range t.Then {
		if op.Kind == meta.OpPut && op.From == keys.IDs {
			s.writes.Add(1)
		}
	}
	timer := time.NewTimer(time.Millisecond)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return meta.TxnResult{}, ctx.Err()
	case <-timer.C:
	}
	return s.KV.Txn(ctx, t)
}

// A thousand callers of three replicas each get ids, at once, under few transactions.
func TestCallersShareTransactions(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		const callers = 1000
		kv := &slowKV{KV: memory.New(memory.Options{Now: time.Now})}
		replicas := []*catalog.Catalog{open(kv), open(kv), open(kv)}
		got := make([]catalog.IDRange, callers)
		began := time.Now()
		var wg sync.WaitGroup
		for i := range got {
			wg.Go(func() {
				var tok request.Token
				if i%2 == 0 {
					tok = token(fmt.Sprint(i))
				}
				var err error
				if got[i], err = replicas[i%3].AllocateIDs(t.Context(), tok, int64(1+i%7)); err != nil {
					t.Errorf("caller %d: %v", i, err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > time.Second {
			t.Errorf("took %v", took)
		}
		if n := kv.writes.Load(); n > 30 {
			t.Errorf("%d transactions of the allocator's record", n)
		}
		seen := map[int64]int{}
		for i, r := range got {
			for id := r.First; id < r.First+r.Count; id++ {
				if other, twice := seen[id]; twice {
					t.Errorf("%d went to %d and %d", id, other, i)
				}
				seen[id] = i
			}
		}
		for i := 0; i < callers; i += 100 { // from another replica
			if again, err := replicas[(i+1)%3].AllocateIDs(t.Context(), token(fmt.Sprint(i)),
				int64(1+i%7)); err != nil || again != got[i] {
				t.Errorf("repeat of %d: %v, %v; want %v", i, again, err, got[i])
			}
		}
	})
}

// The end of the call that leads a batch, and of one that waits, ends neither of the
// others, and no id goes twice.
func TestLeaderOfABatchEnds(t *testing.T) {
	virtual.Test(t, func(t *testing.T) {
		kv := &slowKV{KV: memory.New(memory.Options{Now: time.Now})}
		c := open(kv)
		results := make([]error, 30)
		got := make([]catalog.IDRange, len(results))
		var wg sync.WaitGroup
		for i := range results {
			ctx := t.Context()
			if i%3 == 0 { // the first of them leads
				limited, cancel := context.WithTimeout(ctx, time.Duration(i)*100*time.Microsecond+500*time.Microsecond)
				defer cancel()
				ctx = limited
			}
			wg.Go(func() { got[i], results[i] = c.AllocateIDs(ctx, request.Token{}, 3) })
			virtual.Wait()
		}
		wg.Wait()
		ended := 0
		seen := map[int64]bool{}
		for i, err := range results {
			if err != nil {
				ended++
				if i%3 != 0 || !errors.Is(err, context.DeadlineExceeded) {
					t.Errorf("caller %d: %v", i, err)
				}
				continue
			}
			if seen[got[i].First] {
				t.Errorf("%v went twice", got[i])
			}
			seen[got[i].First] = true
		}
		if ended == 0 {
			t.Error("no call ended early")
		}
	})
}
