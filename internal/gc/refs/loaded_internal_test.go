package refs

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// While a loader counts the references of a snapshot it yields the lock. Another loader
// must not take that snapshot again: it would be counted twice, and its collection
// would count as known too early. The scheduler decides whether another goroutine gets
// the lock in between, hence several attempts.
func TestSnapshotIsCountedOnce(t *testing.T) {
	for range 10 {
		countOnce(t)
	}
}

func countOnce(t *testing.T) {
	t.Helper()
	x := New(Options{Log: zap.NewNop(), Now: time.Now, Interval: time.Minute})
	ids := make([]int64, 100*countPart)
	for i := range ids {
		ids[i] = int64(i + 1)
	}
	x.mu.Lock()
	x.ensure(1, &storagev1.Snapshot{CollectionId: 7, State: uint32(snapshot.Committed)})
	x.mu.Unlock()
	e, _ := x.next()
	if e == nil {
		t.Fatal("nothing to load")
	}
	var counted atomic.Bool
	var group sync.WaitGroup
	began := make(chan struct{})
	group.Go(func() { // another loader
		close(began)
		for !counted.Load() {
			if again, _ := x.next(); again != nil {
				t.Errorf("snapshot %d is loaded again", again.id)
				return
			}
		}
	})
	<-began
	x.loaded(e, newSnapshotRefs(&manifest.Refs{Segments: ids}), nil)
	counted.Store(true)
	group.Wait()
	if got := x.Count(7, Query{Segment: 1}); got != 1 {
		t.Errorf("the segment is counted %d times", got)
	}
	if got := len(x.collections[7].missing); got != 0 {
		t.Errorf("%d snapshots are missing", got)
	}
}
