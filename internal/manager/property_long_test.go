package manager

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/snapshot"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// longSnapshots is the number of snapshots of the long run, chosen for a few seconds.
const longSnapshots = 300

// usedKeys counts the keys of the metadata store: of dropped units and grants without
// the claims of their ids, of snapshots, and others.
type usedKeys struct {
	Units, UnitBytes, LargestUnit int
	Snapshots                     int
	Other                         []string // keys, without ids
}

func (e *env) used() usedKeys {
	e.t.Helper()
	from, to := keys.All()
	var u usedKeys
	if _, err := e.kv.Scan(e.t.Context(), from, to, 0, func(batch []meta.KeyValue) error {
		for _, kv := range batch {
			switch {
			case strings.HasPrefix(kv.Key, keys.AllUnitsPrefix), strings.HasPrefix(kv.Key, keys.AllTombstonesPrefix):
				u.Units++
				u.UnitBytes += len(kv.Value)
				u.LargestUnit = max(u.LargestUnit, len(kv.Value))
			case strings.HasPrefix(kv.Key, "/snapshot/rec/"), strings.HasPrefix(kv.Key, "/snapshot/name/"):
				u.Snapshots++
			case strings.HasPrefix(kv.Key, "/catalog/owner/"), strings.HasPrefix(kv.Key, keys.GonePrefix):
			default:
				parts := strings.Split(kv.Key, "/")
				if _, err := keys.LastID(kv.Key); err == nil {
					parts[len(parts)-1] = "<id>"
				}
				u.Other = append(u.Other, strings.Join(parts, "/"))
			}
		}
		return nil
	}); err != nil {
		e.t.Fatal(err)
	}
	return u
}

// TestSteadyCompactionUnderSnapshots checks that steady compaction under steady
// snapshots, which hold all replaced segments, costs the metadata store a small stub
// per unit, and that the stubs are removed with the snapshots.
func TestSteadyCompactionUnderSnapshots(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			o.Log = zap.NewNop()
			o.Parts.Collector.Tolerance = time.Minute
		})
		col, _, x := e.collection(r, "c")
		e.checkpoint(r, col, 1000, 1000)
		const files = 8 // per segment: its record is larger than a stub
		segments := func(n int) []segment.Segment {
			var list []segment.Segment
			for range n {
				s := e.segment(r, col, 0, 1, 20)
				s.Files = nil
				for i := range files {
					s.Files = append(s.Files, segment.File{
						Kind: segment.KindInsert, Field: int64(100 + i), LogID: 1, Size: 10, MinTimestamp: 1, MaxTimestamp: 20,
						Entries: 20,
					})
				}
				b := segment.Build{ID: e.newID(r), Index: x.ID, Field: 100}
				b.Files = []segment.File{{Kind: segment.KindIndex, Field: 100, LogID: 1, Size: 10}}
				s.Builds = []segment.Build{b}
				e.putFiles(col.ID, &s)
				list = append(list, s)
			}
			return list
		}
		live := segments(8)
		e.add(r, col, live...)
		var snapshots []*snapshot.Record
		var quarter usedKeys
		for n := range longSnapshots {
			snapshots = append(snapshots, e.create(r, col, fmt.Sprint("s", n)))
			// Three segments are compacted into one, and two are added.
			out := segments(3)
			swap := catalog.SegmentChange{Add: out}
			for _, s := range live[:3] {
				swap.Drop = append(swap.Drop, s.ID)
			}
			if _, err := r.catalog.Change(t.Context(), noToken, catalog.Ref{ID: col.ID}, swap); err != nil {
				t.Fatal(err)
			}
			live = append(live[3:], out...)
			time.Sleep(3 * time.Minute)
			settle()
			if n%10 != 0 {
				continue
			}
			u := e.used()
			// The next round spills the held units.
			if want := 3 * (n + 1); u.Units != want || u.LargestUnit >= 300 {
				t.Fatalf("after snapshot %d: %d units, want %d; the largest takes %d bytes", n, u.Units, want, u.LargestUnit)
			}
			if quarter.Units == 0 && n >= longSnapshots/4 {
				quarter = u
			}
		}
		end := e.used()
		if diff := cmp.Diff(quarter.Other, end.Other); diff != "" {
			t.Errorf("other keys come or go:\n%s", diff)
		}
		if perUnit, was := end.UnitBytes/end.Units, quarter.UnitBytes/quarter.Units; perUnit > was+2 {
			t.Errorf("a unit takes %d bytes, and took %d", perUnit, was)
		}
		if end.Snapshots != 2*longSnapshots {
			t.Errorf("%d keys of snapshots", end.Snapshots)
		}
		if n := len(e.objectsUnder(catalog.SpillPrefix)); n != end.Units {
			t.Errorf("%d units, and %d objects that hold their records", end.Units, n)
		}
		e.check(r)
		t.Logf("%d snapshots, %d units of %d bytes on average", longSnapshots, end.Units, end.UnitBytes/end.Units)

		for _, s := range snapshots {
			e.dropSnapshot(r, s)
		}
		time.Sleep(3 * time.Minute)
		settle()
		// They are most of the collection, so the round must be forced.
		if last := r.Collector.LastCycle(); last == nil || len(last.Stops) != 1 {
			t.Errorf("the last round: %+v", last)
		}
		if _, s := e.round(r,
			collect.CycleOptions{Collection: catalog.Ref{ID: col.ID}, Force: true}); s.Granted != int64(end.Units) {
			t.Errorf("granted: %d of %d", s.Granted, end.Units)
		}
		time.Sleep(time.Minute)
		settle()
		var want []string
		for i := range live {
			for f := range live[i].AllFiles() {
				want = append(want, keyOf(f))
			}
		}
		got := map[string]bool{}
		for _, key := range e.objectsUnder("") {
			got[key] = true
		}
		left := map[string]bool{}
		for _, key := range want {
			left[key] = true
		}
		if diff := cmp.Diff(left, got); diff != "" {
			t.Errorf("objects at the end:\n%s", diff)
		}
		u := e.used()
		if diff := cmp.Diff(quarter.Other, u.Other); diff != "" || u.Units+u.Snapshots > 0 {
			t.Errorf("%d units and %d keys of snapshots are left:\n%s", u.Units, u.Snapshots, diff)
		}
	})
}
