package manager

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/catalog"
	"github.com/snapshotd/snapshotd/internal/gc"
	"github.com/snapshotd/snapshotd/internal/gc/collect"
	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	"github.com/snapshotd/snapshotd/internal/store/request"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func (e *env) write(list ...string) {
	e.t.Helper()
	for _, key := range list {
		if _, err := e.objects.Put(e.t.Context(), key, []byte("12345")); err != nil {
			e.t.Fatal(err)
		}
	}
}

// collectionAt makes a collection with one channel and a root.
func (e *env) collectionAt(r *testReplica, name, prefix string) catalog.Collection {
	e.t.Helper()
	col, err := r.catalog.CreateCollection(e.t.Context(), request.Token{}, catalog.Collection{
		DB: "default", Name: name, Roots: []catalog.Root{{Store: "default", Prefix: prefix}},
		Schema: catalog.Schema{
			Format: "test", Raw: []byte{1},
			Fields: []catalog.Field{{ID: 100, Name: "id", DataType: "Int64", PrimaryKey: true}},
		},
	})
	if err != nil {
		e.t.Fatal(err)
	}
	return col
}

// nestedCollection makes a collection with a root that contains other roots, as earlier
// releases allowed.
func (e *env) nestedCollection(r *testReplica, name, prefix string) catalog.Collection {
	e.t.Helper()
	col := e.collectionAt(r, name, "apart/")
	kv, _, _, err := e.kv.Get(e.t.Context(), keys.Collection(col.ID))
	if err != nil {
		e.t.Fatal(err)
	}
	rec := &storagev1.Collection{}
	if err := record.Decode(kv, rec); err != nil {
		e.t.Fatal(err)
	}
	rec.Roots[0].Prefix = prefix
	if _, err := e.kv.Txn(e.t.Context(), meta.Txn{Then: []meta.Op{meta.Put(kv.Key, record.Encode(rec))}}); err != nil {
		e.t.Fatal(err)
	}
	if col, err = r.catalog.Collection(e.t.Context(), catalog.Ref{ID: col.ID}); err != nil {
		e.t.Fatal(err)
	}
	return col
}

// orphans returns the reasons of a collection's orphans by key, with a mark for
// deletable ones.
func (e *env) orphans(r *testReplica, col catalog.Collection, o collect.OrphanOptions) map[string]string {
	e.t.Helper()
	reasons := map[string]string{}
	o.Collection = catalog.Ref{ID: col.ID}
	o.Report = func(o collect.Orphan) error {
		mark := ""
		if o.Deletable {
			mark = "! "
		}
		if _, twice := reasons[o.Key]; twice || o.Collection != col.ID || o.Store != "default" || o.Size != 5 {
			e.t.Errorf("got %+v", o)
		}
		reasons[o.Key] = mark + o.Reason
		return nil
	}
	if err := r.Collector.Orphans(e.t.Context(), o); err != nil {
		e.t.Fatal(err)
	}
	return reasons
}

// TestOrphans checks that orphans are distinguished from owned objects, and that only
// orphans are deleted.
func TestOrphans(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, part, _ := e.collection(r, "c") // under data/
		other := e.collectionAt(r, "other", "data/")
		above := e.nestedCollection(r, "above", "")

		live, dropped, granted, held := e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1,
			5), e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1, 5)
		gone := e.newID(r)
		// Files at places that no record refers to.
		live.Files = append(live.Files, segment.File{Kind: segment.KindStats, Path: "shared/stats", Size: 5},
			segment.File{Kind: segment.KindStats, Path: fmt.Sprintf("stats/%d/0/0/1", col.ID), Size: 5})
		e.addWritten(r, col, live, dropped, granted, held)
		theirs := segment.Segment{ID: e.newID(r), State: segment.Flushed, Level: 1, Rows: 1, Files: []segment.File{
			{Kind: segment.KindInsert, Path: fmt.Sprintf("data/%d/0/%d/insert/0/1", col.ID, e.newID(r)), Size: 5},
		}}
		e.write(theirs.Files[0].Path)
		e.add(r, above, theirs)
		e.checkpoint(r, col, 100, 100)
		e.create(r, col, "holder")
		e.dropSegments(r, col, dropped.ID, held.ID)
		young, fresh := e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1, 5)
		e.addWritten(r, col, young, fresh)
		e.granted(e.reclaim(r, col, gc.ByCaller, e.dropSegments(r, col, young.ID)...))

		path := func(id int64) string { return fmt.Sprintf("data/%d/%d/%d/insert/100/1", col.ID, part.ID, id) }
		leftover := []string{path(gone), fmt.Sprintf("data/%d/0/%d/index/%d/100-1", col.ID, gone, gone)}
		left := map[string]string{
			fmt.Sprintf("data/%d/0/%d/insert/100/99", col.ID,
				fresh.ID): fmt.Sprintf("not registered, at the place of segment %d: it stays as long as the "+
				"segment or a snapshot of it", fresh.ID),
			fmt.Sprintf("data/%d/0/%d/index/1", other.ID, gone): "not a path of a segment of the collection: not deleted",
			path(1 << 40): fmt.Sprintf("its id %d was never allocated: not deleted", int64(1)<<40),
			"data/README": "not a path of a segment of the collection: not deleted",
			fmt.Sprintf("data/%d/1099511627776/%d/insert/100/1", col.ID,
				gone): fmt.Sprintf("its id %d was never allocated: not deleted", int64(1)<<40),
		}
		e.write(leftover...)
		for key := range left {
			e.write(key)
		}
		reason := fmt.Sprintf("! no segment, unit or snapshot has it; segment %d does not exist", gone)
		want := map[string]string{
			leftover[0]: reason + "; younger than orphan_grace, which is 24h0m0s",
			leftover[1]: reason + "; younger than orphan_grace, which is 24h0m0s",
		}
		maps.Copy(want, left)
		if diff := cmp.Diff(want, e.orphans(r, col, collect.OrphanOptions{})); diff != "" {
			t.Errorf("young (-want +got):\n%s", diff)
		}
		time.Sleep(2 * time.Hour)
		before := e.objectsUnder("")
		if got := e.orphans(r, col, collect.OrphanOptions{Delete: true, Grace: 3 * time.Hour}); len(got) > 0 {
			t.Errorf("deleted %v", got)
		}
		if got := e.orphans(r, above, collect.OrphanOptions{Delete: true, Grace: time.Hour}); len(got) > 0 {
			t.Errorf("deleted %v", got)
		}
		for _, o := range []collect.OrphanOptions{{LostBelow: gone + 1}} {
			o.Delete, o.Grace = true, time.Hour
			if got := e.orphans(r, col, o); len(got) > 0 {
				t.Errorf("deleted %v below the floor", got)
			}
		}
		if diff := cmp.Diff(before, e.objectsUnder("")); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		want = map[string]string{leftover[0]: reason, leftover[1]: reason}
		if diff := cmp.Diff(want, e.orphans(r, col, collect.OrphanOptions{Delete: true, Grace: time.Hour})); diff != "" {
			t.Errorf("deleted (-want +got):\n%s", diff)
		}
		// The other collection under the same root has its own files.
		theirLeftover := fmt.Sprintf("data/%d/0/%d/index/1", other.ID, gone)
		want = map[string]string{theirLeftover: reason}
		if diff := cmp.Diff(want, e.orphans(r, other, collect.OrphanOptions{Delete: true, Grace: time.Hour})); diff != "" {
			t.Errorf("deleted of the other (-want +got):\n%s", diff)
		}
		leftover = append(leftover, theirLeftover)
		rest := slices.DeleteFunc(before, func(key string) bool { return slices.Contains(leftover, key) })
		if diff := cmp.Diff(rest, e.objectsUnder("")); diff != "" {
			t.Errorf("left (-want +got):\n%s", diff)
		}
	})
}

// TestOrphansOfRestores checks that objects of a running restore are no orphans, and
// those of an ended one are.
func TestOrphansOfRestores(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) { o.Parts.Slots = -1 }) // so that it never ends
		col := e.richCollection(r, "c", 12)
		s := e.create(r, col, "one")
		job := e.restore(r, restoreSpecOf(s))
		time.Sleep(time.Second)
		late := fmt.Sprintf("data/%d/%d/%d/insert/100/1", job.Target, job.FirstPartition, job.FirstSegment)
		index := fmt.Sprintf("data/%d/0/%d/index/%d/100-1", col.ID, e.newID(r), job.FirstBuild)
		e.write(late, index)
		time.Sleep(2 * time.Hour)
		target, err := r.catalog.Collection(t.Context(), catalog.Ref{ID: job.Target})
		if err != nil || target.State != catalog.Restoring {
			t.Fatalf("%+v, err = %v", target, err)
		}
		for _, c := range []catalog.Collection{target, col} {
			if got := e.orphans(r, c, collect.OrphanOptions{Delete: true, Grace: time.Hour}); len(got) > 0 {
				t.Errorf("deleted %v", got)
			}
		}
		if got := e.orphans(r, col, collect.OrphanOptions{}); len(got) > 0 {
			t.Errorf("got %v", got)
		}
		why, err := r.Collector.Explain(t.Context(), "default", index)
		if want := fmt.Sprintf("restore job %d may be writing it: it stays until the job ends", job.ID); err != nil ||
			!why.Kept || why.Reason != want {
			t.Errorf("%+v, want %q, err = %v", why, want, err)
		}
	})
}

// TestOrphansNeedReferences checks that orphans are not listed while references or a
// collection's record are unreadable.
func TestOrphansNeedReferences(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "one")
		key := fmt.Sprintf("data/%d/0/%d/insert/100/1", col.ID, e.newID(r))
		e.write(key)
		time.Sleep(48 * time.Hour)
		if err := e.objects.Delete(t.Context(), manifest.RefsKey(col.ID, s.ID)); err != nil {
			t.Fatal(err)
		}
		r = e.forget(r, "c")
		o := collect.OrphanOptions{Collection: catalog.Ref{ID: col.ID}, Delete: true, Grace: time.Hour}
		if err := r.Collector.Orphans(t.Context(), o); !errors.Is(err, gc.ErrUnreadable) && !errors.Is(err, gc.ErrLoading) {
			t.Errorf("got %v", err)
		}
		if e, err := r.Collector.Explain(t.Context(), "default", key); err != nil || !e.Kept ||
			!strings.Contains(e.Reason, "its holders are unknown") {
			t.Errorf("%+v, err = %v", e, err)
		}
		e.dropSnapshot(r, s)
		time.Sleep(time.Hour)
		bad := keys.Collection(e.newID(r))
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Put(bad, []byte("garbage"))}}); err != nil {
			t.Fatal(err)
		}
		if err := r.Collector.Orphans(t.Context(), o); !errors.Is(err, record.ErrUnreadable) {
			t.Errorf("got %v", err)
		}
		if len(e.objectsUnder(key[:strings.LastIndexByte(key, '/')+1])) != 1 {
			t.Fatal("it is deleted")
		}
		if _, err := e.kv.Txn(t.Context(), meta.Txn{Then: []meta.Op{meta.Delete(bad)}}); err != nil {
			t.Fatal(err)
		}
		if got := e.orphans(r, col, collect.OrphanOptions{Delete: true, Grace: time.Hour}); len(got) != 1 {
			t.Errorf("deleted %v", got)
		}
	})
}

// TestExplain checks the explanation of each kind of object.
func TestExplain(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		live, dropped, held, granted := e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1,
			5), e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1, 5)
		live.Files = append(live.Files, segment.File{Kind: segment.KindStats, Path: "shared/stats", Size: 5})
		e.addWritten(r, col, live, held)
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "one")
		e.addWritten(r, col, dropped, granted)
		e.dropSegments(r, col, dropped.ID, held.ID)
		e.granted(e.reclaim(r, col, gc.ByCaller, e.dropSegments(r, col, granted.ID)...))
		orphan := e.newID(r)
		file := func(s segment.Segment) string { return "data/" + s.Files[0].Path }
		lost, note := manifest.MetadataKey(col.ID, orphan), "gc/epoch/"+keys.ID(1)+".json"
		e.write(fmt.Sprintf("data/%d/0/%d/insert/100/1", col.ID, orphan), "elsewhere/x", lost,
			"snapshots/README", "gc/epoch/1.json", note)
		stray := fmt.Sprintf("data/%d/0/%d/insert/100/99", col.ID, live.ID)
		e.write(stray)
		holder := []gc.SnapshotHolder{{ID: s.ID, Name: "one"}}
		name := fmt.Sprintf("default/c (%d)", col.ID)
		drop := time.Now().UTC().Format(time.RFC3339)
		of := func(s segment.Segment) string { return fmt.Sprintf("file of segment %d of collection %s", s.ID, name) }
		for key, want := range map[string]collect.Explanation{
			file(live): {
				Exists: true, Kept: true, What: of(live), Reason: "the segment is live", Collection: col.ID, Segment: live.ID,
				Snapshots: holder, Holders: 2,
			},
			"data/shared/stats": {
				Exists: true, Kept: true, What: "file of collection " + name, Reason: "1 snapshot references it",
				Collection: col.ID, Snapshots: holder, Holders: 1,
			},
			file(dropped): {
				Exists: true, What: of(dropped),
				Reason:     "dropped at " + drop + ", without holders: the collector deletes it after the tolerance",
				Collection: col.ID, Segment: dropped.ID, Unit: dropped.ID,
			},
			file(held): {
				Exists: true, Kept: true, What: of(held), Reason: "dropped at " + drop + `, held by snapshot "one"`,
				Collection: col.ID, Segment: held.ID, Unit: held.ID, Snapshots: holder, Holders: 1,
			},
			file(granted): {
				Exists: true, What: of(granted),
				Reason:     `the unit was granted to caller "tester" at ` + drop + ", which deletes it",
				Collection: col.ID, Segment: granted.ID, Unit: granted.ID,
			},
			fmt.Sprintf("data/%d/0/%d/insert/100/1", col.ID, orphan): {
				Exists: true, Kept: true, What: "orphan under a root of collection " + name, Collection: col.ID,
				Reason: fmt.Sprintf("no segment, unit or snapshot has it; segment %d does not exist; only a request to "+
					"delete the orphans of the collection deletes it", orphan),
			},
			stray: {
				Exists: true, Kept: true, What: "object under a root of collection " + name, Collection: col.ID,
				Reason: fmt.Sprintf("not registered, at the place of segment %d: it stays as long as the segment "+
					"or a snapshot of it", live.ID),
			},
			"elsewhere/x": {
				Exists: true, Kept: true, What: "foreign object",
				Reason: "under no root of a collection: not deleted",
			},
			"elsewhere/y": {
				Kept: true, What: "foreign object",
				Reason: "No such object. If it existed: under no root of a collection: not deleted",
			},
			lost: {
				Exists: true, Kept: true, What: fmt.Sprintf("object of snapshot %d", orphan),
				Collection: col.ID, Snapshot: orphan,
				Reason: fmt.Sprintf("snapshot %d does not exist; a sweep deletes it in 24h0m0s", orphan),
			},
			manifest.RefsKey(col.ID, s.ID): {
				Exists: true, Kept: true, What: fmt.Sprintf("object of snapshot %d", s.ID), Reason: `snapshot "one" is committed`,
				Collection: col.ID, Snapshot: s.ID, Snapshots: holder, Holders: 1,
			},
			"snapshots/README": {
				Exists: true, Kept: true, What: "foreign object under a prefix of snapshotd's own",
				Reason: "not a name of snapshotd: not deleted",
			},
			"gc/epoch/1.json": {
				Exists: true, Kept: true, What: "foreign object under a prefix of snapshotd's own",
				Reason: "not a name of snapshotd: not deleted",
			},
			note: {
				Exists: true, Kept: true, What: "heartbeat of the metadata store",
				Reason: "the newest two heartbeats stay; they reveal a metadata rollback",
			},
		} {
			got, err := r.Collector.Explain(t.Context(), "default", key)
			if err != nil {
				t.Errorf("%s: %v", key, err)
				continue
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", key, diff)
			}
		}
		_, err := r.Collector.Explain(t.Context(), "nowhere", "x")
		wantError(t, err, object.ErrStoreNotFound)
		_, err = r.Collector.Explain(t.Context(), "default", "../x")
		wantError(t, err, object.ErrInvalidKey)
	})
}

// TestExplainWithoutAllReferences checks that an explanation names a snapshot with
// unreadable references, and does not claim that nothing holds the file.
func TestExplainWithoutAllReferences(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a")
		col, _, _ := e.collection(r, "c")
		live, held, lost, granted := e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1,
			5), e.segment(r, col, 0, 1, 5), e.segment(r, col, 0, 1, 5)
		e.addWritten(r, col, live, held)
		e.checkpoint(r, col, 100, 100)
		s := e.create(r, col, "readable")
		e.addWritten(r, col, lost)
		bad := e.create(r, col, "unreadable")
		e.addWritten(r, col, granted)
		e.granted(e.reclaim(r, col, gc.ByCaller, e.dropSegments(r, col, granted.ID)...))
		e.dropSegments(r, col, held.ID, lost.ID)
		if err := e.objects.Delete(t.Context(), manifest.RefsKey(col.ID, bad.ID)); err != nil {
			t.Fatal(err)
		}
		r = e.forget(r, "b")
		drop := time.Now().UTC().Format(time.RFC3339)
		holder := []gc.SnapshotHolder{{ID: s.ID, Name: "readable"}}
		unread := fmt.Sprintf(`; some holders are unknown: references of a snapshot cannot be read: snapshot `+
			`"unreadable" (%d): `, bad.ID)
		for name, tc := range map[string]struct {
			of   segment.Segment
			want collect.Explanation // without the truncated part of its reason
		}{
			"live": {live, collect.Explanation{
				Kept: true, Reason: "the segment is live" + unread, Snapshots: holder, Holders: 2,
			}},
			"held by one that is readable": {held, collect.Explanation{
				Kept: true, Reason: "dropped at " + drop + `, held by snapshot "readable"` + unread, Unit: held.ID,
				Snapshots: holder, Holders: 1,
			}},
			"held by the other": {lost, collect.Explanation{
				Kept: true, Reason: "dropped at " + drop + ", stays until its holders are known" + unread,
				Unit: lost.ID,
			}},
			"granted": {granted, collect.Explanation{
				Reason: `the unit was granted to caller "tester" at ` + drop + ", which deletes it",
				Unit:   granted.ID,
			}},
		} {
			got, err := r.Collector.Explain(t.Context(), "default", "data/"+tc.of.Files[0].Path)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			if at := strings.Index(got.Reason, unread); at >= 0 {
				got.Reason = got.Reason[:at+len(unread)]
			}
			tc.want.Exists, tc.want.Collection, tc.want.Segment = true, col.ID, tc.of.ID
			tc.want.What = fmt.Sprintf("file of segment %d of collection default/c (%d)", tc.of.ID, col.ID)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
		}
	})
}

// TestExplainUncollectedObjects checks that an explanation names the required action
// where the collector does not delete by itself.
func TestExplainUncollectedObjects(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			o.Parts.Collector.Tolerance, o.Parts.Collector.MaxShare = time.Minute, 0.5
		})
		settle() // so that it leads
		off := e.start("b", func(o *testOptions) { o.Parts.Collector.Off = true })
		col, _, _ := e.collection(r, "c")
		var list []segment.Segment
		var ids []int64
		for range collect.StopUnits {
			s := e.segment(r, col, 0, 1, 5)
			list, ids = append(list, s), append(ids, s.ID)
		}
		e.addWritten(r, col, list...)
		for part := range slices.Chunk(ids, catalog.MaxSegmentChange) {
			e.dropSegments(r, col, part...)
		}
		key := "data/" + list[0].Files[0].Path
		dead := manifest.MetadataKey(col.ID, e.newID(r))
		e.write(dead)
		time.Sleep(5 * time.Minute)
		settle()
		for _, tc := range []struct {
			by        *testReplica
			key, want string
		}{
			{r, key, "the last cycle stopped in this collection: 100 of 100 units and segments are eligible; see " +
				"`snapshotctl gc status`, then `snapshotctl gc run`"},
			{off, key, "the collector is off: `snapshotctl gc run` deletes it after the tolerance"},
			{off, dead, "the collector is off: `snapshotctl gc run --sweep` deletes it"},
		} {
			if e, err := tc.by.Collector.Explain(t.Context(), "default", tc.key); err != nil ||
				!e.Kept || !strings.HasSuffix(e.Reason, tc.want) {
				t.Errorf("%s: %+v, want %q, err = %v", tc.key, e, tc.want, err)
			}
		}
	})
}

// TestLeaderSweeps checks that the leader sweeps late writes by itself, and keeps a
// foreign file beside a snapshot.
func TestLeaderSweeps(t *testing.T) {
	inEnv(t, func(t *testing.T, e *env) {
		r := e.start("a", func(o *testOptions) {
			o.Parts.Collector.OrphanGrace, o.Parts.Collector.SweepInterval = 2*time.Hour, 30*time.Minute
		})
		col, _, _ := e.collection(r, "c")
		e.checkpoint(r, col, 100, 100)
		kept, s := e.create(r, col, "kept"), e.create(r, col, "one")
		dir := manifest.Dir(col.ID, s.ID)
		e.write(dir + "README")
		e.dropSnapshot(r, s)
		settle()
		if diff := cmp.Diff([]string{dir + "README"}, e.objectsUnder(dir)); diff != "" {
			t.Errorf("dropped (-want +got):\n%s", diff)
		}
		if got := e.keysUnder(keys.SnapshotPrefix); !slices.Equal(got, []string{keys.Snapshot(kept.ID)}) {
			t.Errorf("records %v", got)
		}
		if n, _ := r.GC.Counters().Of(gc.BySnapshot); n == 0 {
			t.Error("nothing is counted")
		}
		e.write(dir+"manifest-0.avro", dir+"metadata.json") // written late by a frozen creator
		time.Sleep(2 * time.Minute)
		if st := r.Collector.SweepStats(); st.End.IsZero() || st.Error != "" || st.Waiting != 2 || st.Foreign != 1 {
			t.Errorf("the first sweep: %+v", st)
		}
		time.Sleep(3 * time.Hour)
		if diff := cmp.Diff([]string{dir + "README"}, e.objectsUnder(dir)); diff != "" {
			t.Errorf("swept (-want +got):\n%s", diff)
		}
		if n := len(e.objectsUnder(manifest.Dir(col.ID, kept.ID))); n < 2 {
			t.Errorf("%d objects of a committed snapshot", n)
		}
	})
}
