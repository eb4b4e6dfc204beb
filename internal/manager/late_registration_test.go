package manager

import (
	"testing"
	"time"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// TestLateRepeatAfterReclaim checks that a registration that is repeated after its
// segment was dropped and deleted is rejected, and that a late repeat of the drop
// succeeds.
func TestLateRepeatAfterReclaim(t *testing.T) {
	for _, by := range []gc.Deleter{gc.BySnapshotd, gc.ByCaller} {
		inEnv(t, func(t *testing.T, e *env) {
			r := e.start("a", func(o *testOptions) { o.Parts.Collector.Off = true })
			col, _, x := e.collection(r, "c")
			s := e.segment(r, col, 0, 1, 20)
			b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
			s.Builds = []segment.Build{b}
			e.addWritten(r, col, s)
			e.checkpoint(r, col, 100, 100)
			tombs := e.granted(e.reclaim(r, col, by, e.dropSegments(r, col, s.ID)...))
			if by == gc.ByCaller {
				if _, err := r.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{tombs[0].ID}); err != nil {
					t.Fatal(err)
				}
			}
			time.Sleep(10 * time.Minute)
			settle()
			_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{s})
			wantError(t, err, catalog.ErrIDUsed)
			other := e.segment(r, col, 0, 1, 20)
			other.Builds = s.Builds
			_, _, err = r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{other})
			wantError(t, err, catalog.ErrIDUsed)
			if n, err := r.catalog.DropSegments(t.Context(), catalog.Ref{ID: col.ID}, []int64{s.ID}); n != 0 || err != nil {
				t.Errorf("dropped %d again, err = %v", n, err)
			}
			if snap := e.create(r, col, "one"); snap.Totals.Segments != 0 {
				t.Errorf("%+v is in the snapshot", snap.Totals)
			}
		})
	}
}

// TestRegistrationRacesConfirm checks that a registration fails if its id became gone
// after it was decided.
func TestRegistrationRacesConfirm(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r, b := e.start("a"), e.start("b")
		col, _, _ := e.collection(b, "c")
		s, beside := e.segment(b, col, 0, 1, 20), e.segment(b, col, 0, 1, 20)
		e.add(b, col, s)
		tomb := e.granted(e.reclaim(b, col, gc.ByCaller, e.dropSegments(b, col, s.ID)...))[0]
		settle()
		confirmed, txns := false, 0
		r.kv.Hook(func(c meta.Call) meta.Fault {
			if c.Method != meta.MethodTxn {
				return meta.NoFault
			}
			if txns++; txns == 2 { // the gone ids were read
				confirmed = true
				if _, err := b.GC.Confirm(t.Context(), catalog.Ref{ID: col.ID}, []int64{tomb.ID}); err != nil {
					t.Error(err)
				}
			}
			return meta.NoFault
		})
		_, _, err := r.catalog.AddSegments(t.Context(), col.ID, []segment.Segment{s, beside})
		if wantError(t, err, catalog.ErrIDUsed); !confirmed {
			t.Error("nothing raced")
		}
	})
}
