package manager

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/meta/reserve"
	"github.com/snapshotd/snapshotd/internal/store/request"
)

// TestFullStoreCanBeEmptied checks that a metadata store at its quota rejects
// snapshots, segments and collections, and can be emptied: drops, collection and leader
// elections continue.
func TestFullStoreCanBeEmptied(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		full := false
		e.kv = reserve.New(e.kv, func() bool { return full }, keys.RolledBack, keys.Epoch, keys.Clock)
		fast := func(o *testOptions) { o.Parts.Collector.Tolerance, o.Parts.Collector.MaxShare = time.Millisecond, 1 }
		a := e.start("a", fast)
		ctx := t.Context()
		col, _, _ := e.collection(a, "c")
		s := e.segment(a, col, 0, 1, 20)
		e.addWritten(a, col, s)
		e.checkpoint(a, col, 100, 100)
		snap := e.create(a, col, "s")
		settle()

		full = true
		a.stop()
		a = e.start("b", fast) // elected within the remaining space
		time.Sleep(time.Minute)
		settle()
		if !a.Leading() {
			t.Error("there is no leader")
		}
		_, err := a.Create(ctx, request.Token{}, spec(col, "another"))
		wantError(t, err, meta.ErrNoSpace)
		_, _, err = a.catalog.AddSegments(ctx, col.ID, []segment.Segment{e.segment(a, col, 0, 30, 40)})
		wantError(t, err, meta.ErrNoSpace)
		e.dropSnapshot(a, snap)
		e.drops(a, col)
		for range 3 {
			time.Sleep(2 * time.Minute)
			settle()
		}
		left := slices.DeleteFunc(append(e.keysUnder("/catalog/"), e.keysUnder("/snapshot/")...), func(key string) bool {
			return strings.HasPrefix(key, keys.IDs) || strings.HasPrefix(key, keys.GonePrefix) // ids never return
		})
		if len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		if objects := e.objectsUnder("data/"); len(objects) > 0 {
			t.Errorf("objects left: %v", objects)
		}
		full = false
		e.collection(a, "c")
	})
}
