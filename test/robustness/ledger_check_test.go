package robustness

import (
	"crypto/sha256"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// planted is a ledger of two segments, one of which was compacted away from 100 to
// 110 into a third, and of a snapshot of the first two.
func planted() *ledger {
	l := newLedger()
	add := func(id int64, call, ret, removal, removed moment, keys ...string) {
		for _, key := range keys {
			l.files[key] = file{sum: sha256.Sum256([]byte(key)), size: int64(len(key)), segment: id}
		}
		l.segments[id] = &segment{keys: keys, call: call, ret: ret, removal: removal, removed: removed}
	}
	add(65, 10, 20, 100, 110, "data/1/2/65/insert/1/1", "data/1/2/65/insert/1/2")
	add(66, 10, 20, forever, forever, "data/1/2/66/insert/1/1")
	add(67, 100, 110, forever, forever, "data/1/2/67/insert/1/1")
	l.note(func(l *ledger) {
		l.events = []event{
			at(50, 60, begun, "a"),
			at(50, 60, committed, "a"),
			at(300, 310, dropped, idTag(7)),
			at(320, 330, dropped, idTag(12)),
		}
	})
	l.compactions = []compaction{{inputs: []int64{65}, output: 67, call: 100, ret: 110}}
	l.snapshots["a"] = &snapshot{
		tag: "a", name: "n", id: 7, call: 50, ret: 60, committed: true,
		content: map[int64][]string{65: {"data/1/2/65/insert/1/1", "data/1/2/65/insert/1/2"}, 66: {"data/1/2/66/insert/1/1"}},
	}
	l.foreign["data/note"] = stored{size: 1}
	l.restores = []*restore{
		{job: 8, target: 9, name: "r", snapshot: 7, completed: true, keys: map[string]bool{"data/9/2/70/insert/1/1": true}},
	}
	return l
}

// wants checks that the only complaint contains the text, or that there is none when it
// is empty.
func wants(t *testing.T, got []string, want string) {
	t.Helper()
	if want == "" && len(got) == 0 || want != "" && len(got) == 1 && strings.Contains(got[0], want) {
		return
	}
	t.Errorf("got %q, want %q", got, want)
}

func TestHistory(t *testing.T) {
	want := []event{
		at(50, 60, begun, "a"),
		at(50, 60, committed, "a"),
		at(300, 310, dropped, "a"),
		at(320, 330, dropped, ""),
	}
	if diff := cmp.Diff(want, planted().history()); diff != "" {
		t.Error(diff)
	}
}

func TestMisdeeds(t *testing.T) {
	for _, tc := range []struct {
		name string
		key  string
		at   moment
		want string
	}{
		{"a file that a snapshot needs", "data/1/2/65/insert/1/1", 200, "snapshot 7 (n) needs it"},
		{"the same once its drop is asked for", "data/1/2/65/insert/1/1", 350, ""},
		{"a living segment", "data/1/2/67/insert/1/1", 350, "segment 67 lives"},
		{"a committed snapshot's own", "snapshots/1/7/metadata.json", 200, "snapshot 7 (n) is committed"},
		{"the same later", "snapshots/1/7/metadata.json", 350, ""},
		{"of a create that died", "snapshots/1/12/metadata.json", 200, ""},
		{"the identity", "snapshots/identity.json", 200, "no object of a snapshot"},
		{"of a restored collection", "data/9/2/70/insert/1/1", 350, "was restored with it"},
		{"what roll back left", "data/9/2/71/insert/1/1", 350, ""},
		{"an object without an owner", "data/1/2/99/insert/1/1", 350, "it has no owner"},
		{"a foreign note", "data/note", 350, "it is foreign"},
		{"a probe", "snapshotd-probe/1", 350, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := planted()
			l.drops = []drop{
				{name: "n", call: 300, ret: forever},
				{name: "n", id: 6, call: 1, ret: 2},
				{name: "m", call: 1, ret: forever},
			}
			wants(t, l.misdeeds([]deletion{{tc.key, tc.at}}), tc.want)
		})
	}
}

func TestCaptures(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(l *ledger, s *snapshot)
		want   string
	}{
		{"as it should be", func(*ledger, *snapshot) {}, ""},
		{"one is missing", func(_ *ledger, s *snapshot) { delete(s.content, 66) }, "segment 66 is missing"},
		{"a file is missing", func(_ *ledger, s *snapshot) { s.content[65] = s.content[65][:1] }, "segment 65 has files"},
		{"one is unknown", func(_ *ledger, s *snapshot) { s.content[99] = []string{"x"} }, "segment 99 is unknown"},
		{
			"one came later", func(l *ledger, _ *snapshot) { l.segments[66].call, l.segments[66].ret = 70, 80 },
			"segment 66 was registered after it",
		},
		{"one was removed before", func(_ *ledger, s *snapshot) {
			s.call, s.ret = 200, 210
			s.content[67] = []string{"data/1/2/67/insert/1/1"}
			delete(s.content, 65)
			s.content[65] = nil
		}, "segment 65 was removed before it"},
		{"during the compaction, before", func(_ *ledger, s *snapshot) { s.call, s.ret = 90, 120 }, ""},
		{"during the compaction, after", func(_ *ledger, s *snapshot) {
			s.call, s.ret = 90, 120
			delete(s.content, 65)
			s.content[67] = []string{"data/1/2/67/insert/1/1"}
		}, ""},
		{"half of a compaction", func(l *ledger, s *snapshot) {
			l.compactions[0].inputs = []int64{65, 66}
			delete(s.content, 65)
			l.segments[65].removal = 1 // else it is missing, which is another complaint
		}, "it has 1 of the segments"},
		{"another collection's", func(_ *ledger, s *snapshot) { s.collection, s.content = 5, map[int64][]string{} }, ""},
		{"half of what it could have", func(l *ledger, s *snapshot) {
			l.compactions[0].inputs = []int64{65, 66}
			l.segments[65].call, l.segments[65].ret = 55, 80
			delete(s.content, 65)
		}, ""},
		{"both sides", func(_ *ledger, s *snapshot) {
			s.call, s.ret = 90, 120
			s.content[67] = []string{"data/1/2/67/insert/1/1"}
		}, "their compaction 67: true"},
		{"neither side", func(_ *ledger, s *snapshot) { s.call, s.ret = 90, 120; delete(s.content, 65) }, "it has neither"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := planted()
			tc.change(l, l.snapshots["a"])
			wants(t, l.captures(), tc.want)
		})
	}
}

func TestPinned(t *testing.T) {
	for _, tc := range []struct {
		name string
		drop drop
		want string
	}{
		{"while it was pinned", drop{id: 7, call: 110, ret: 190}, "was pinned"},
		{"begun before the pin", drop{id: 7, call: 90, ret: 190}, ""},
		{"after the pin", drop{id: 7, call: 190, ret: 210}, ""},
		{"another", drop{id: 8, call: 110, ret: 190}, ""},
		{"no answer", drop{name: "n", call: 110, ret: forever}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := planted()
			l.pins = []pin{{id: 7, from: 100, to: 200}}
			l.drops = []drop{tc.drop}
			wants(t, l.pinned(), tc.want)
		})
	}
}

func TestLost(t *testing.T) {
	for _, tc := range []struct {
		name  string
		drops []drop
		there bool
		want  string
	}{
		{"it is there", nil, true, ""},
		{"an acknowledged snapshot is lost", nil, false, "is lost"},
		{"it was dropped", []drop{{name: "n", id: 7, call: 100, ret: 110}}, false, ""},
		{"it may have been dropped", []drop{{name: "n", call: 100, ret: forever}}, false, ""},
		{"another was dropped", []drop{{name: "n", id: 6, call: 100, ret: 110}}, false, "is lost"},
		{"it was dropped, and is there", []drop{{name: "n", id: 7, call: 100, ret: 110}}, true, "it was dropped at"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := planted()
			l.drops = tc.drops
			wants(t, l.lost(map[int64]bool{7: tc.there}), tc.want)
		})
	}
}

// TestHarmed accepts files that were harmed behind snapshotd.
func TestHarmed(t *testing.T) {
	l := planted()
	if l.harmedIn(7) {
		t.Error("nothing is harmed")
	}
	l.harmed["data/1/2/66/insert/1/1"] = true
	if !l.harmedIn(7) || l.harmedIn(8) {
		t.Error("snapshot 7 alone is harmed")
	}
	bucket := map[string]stored{"data/note": {size: 1}, "snapshots/1/7/metadata.json": {}, "data/9/2/70/insert/1/1": {}}
	for key, f := range l.files {
		bucket[key] = stored{sum: f.sum, size: f.size}
	}
	delete(bucket, "data/1/2/66/insert/1/1")
	text, _ := l.objects(
		bucket,
		map[int64]bool{7: true},
		map[int64]bool{66: true, 67: true},
		func(int64) bool { return true },
	)
	wants(t, text, "")
}

func TestObjects(t *testing.T) {
	for _, tc := range []struct {
		name    string
		change  func(bucket map[string]stored)
		orphans int
		want    string
	}{
		{"as it should be", func(map[string]stored) {}, 0, ""},
		{
			"a file of a snapshot is missing", func(b map[string]stored) { delete(b, "data/1/2/65/insert/1/1") }, 0,
			"is missing, which snapshot 7",
		},
		{
			"a file of a segment is missing", func(b map[string]stored) { delete(b, "data/1/2/67/insert/1/1") }, 0,
			"is missing, which segment 67",
		},
		{"a foreign note is missing", func(b map[string]stored) { delete(b, "data/note") }, 0, "data/note, which is foreign"},
		{
			"a foreign note has other bytes", func(b map[string]stored) { b["data/note"] = stored{size: 2} }, 0,
			"data/note, which is foreign",
		},
		{"a bit is wrong", func(b map[string]stored) {
			o := b["data/1/2/66/insert/1/1"]
			o.sum[3] ^= 1
			b["data/1/2/66/insert/1/1"] = o
		}, 0, "has other bytes"},
		{
			"the snapshot's own are missing", func(b map[string]stored) { delete(b, "snapshots/1/7/metadata.json") }, 0,
			"no objects of its own",
		},
		{"of a snapshot that is gone", func(b map[string]stored) { b["snapshots/1/12/refs.avro"] = stored{} }, 1, ""},
		{
			"of one that never was", func(b map[string]stored) { b["snapshots/1/1234/refs.avro"] = stored{} }, 0,
			"has no owner",
		},
		{"copied late", func(b map[string]stored) { b["data/9/2/71/insert/1/1"] = stored{} }, 1, ""},
		{"without an owner", func(b map[string]stored) { b["data/1/2/99/insert/1/1"] = stored{} }, 0, "has no owner"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l := planted()
			bucket := map[string]stored{
				"data/note": {
					size: 1,
				},
				"snapshots/identity.json":     {},
				"gc/epoch/1.json":             {},
				"snapshots/1/7/metadata.json": {},
				"data/9/2/70/insert/1/1":      {},
			}
			for key, f := range l.files {
				bucket[key] = stored{sum: f.sum, size: f.size}
			}
			tc.change(bucket)
			got, orphans := l.objects(
				bucket,
				map[int64]bool{7: true},
				map[int64]bool{66: true, 67: true},
				func(id int64) bool { return id < 1000 },
			)
			wants(t, got, tc.want)
			if orphans != tc.orphans {
				t.Errorf("%d orphans, want %d", orphans, tc.orphans)
			}
		})
	}
}
