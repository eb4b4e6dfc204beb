package keys_test

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// Keys are stored: they must never change.
func TestKeys(t *testing.T) {
	const one, most = "0000000000000000001", "9223372036854775807"
	for got, want := range map[string]string{
		keys.Store("cold"):                 "/store/cold",
		keys.Snapshot(1):                   "/snapshot/rec/" + one,
		keys.Snapshot(math.MaxInt64):       "/snapshot/rec/" + most,
		keys.SnapshotName(0, "n"):          "/snapshot/name/0000000000000000000/n",
		keys.Pending(1, math.MaxInt64):     "/snapshot/pending/" + one + "/" + most,
		keys.PinPrefix(1):                  "/snapshot/pin/" + one + "/",
		keys.Pin(1, 1):                     "/snapshot/pin/" + one + "/" + one,
		keys.Unpin:                         "/snapshot/unpin",
		keys.Generation(1):                 "/gc/gen/" + one,
		keys.Tombstone(1, 1):               "/gc/tomb/" + one + "/" + one,
		keys.Replaced(1, 1, math.MaxInt64): "/catalog/replaced/" + one + "/" + one + "/" + most,
		keys.TombstonePrefix(1):            "/gc/tomb/" + one + "/",
		keys.CollectionName("db", "c"):     "/catalog/name/db/c",
		keys.Collection(1):                 "/catalog/collection/" + one,
		keys.Partition(1, math.MaxInt64):   "/catalog/partition/" + one + "/" + most,
		keys.PartitionName(1, "p"):         "/catalog/partition-name/" + one + "/p",
		keys.Index(1, math.MaxInt64):       "/catalog/index/" + one + "/" + most,
		keys.IndexName(1, "i"):             "/catalog/index-name/" + one + "/i",
		keys.Channel(1, 3):                 "/catalog/channel/" + one + "/0000000000000000003",
		keys.Segment(1, math.MaxInt64):     "/catalog/segment/" + one + "/" + most,
		keys.Unit(1, math.MaxInt64):        "/catalog/unit/" + one + "/" + most,
		keys.Request("p", "M", "t"):        "/request/M/8f4ae97b0bfd0990a97b683a5dfcc6e728389f2ff611e02d0149c97bd1b53f62",
		keys.Format + keys.IDs:             "/format/ids",
		keys.Leader + keys.SnapshotPrefix:  "/election/leader/snapshot/rec/",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// Two requests share a key only when all is equal.
func TestRequestKeys(t *testing.T) {
	seen := map[string]bool{}
	for _, r := range [][3]string{
		{"p", "m", "t"},
		{"q", "m", "t"},
		{"p", "n", "t"},
		{"p", "m", "u"},
		{"pt", "m", ""},
		{"", "m", "pt"},
		{"p", "m", strings.Repeat("/", 2000)},
	} {
		key := keys.Request(r[0], r[1], r[2])
		if seen[key] || len(key) > meta.MaxKeyBytes || strings.Count(key, "/") != 3 {
			t.Errorf("%q: key %q", r, key)
		}
		seen[key] = true
	}
}

// The order of keys is the order of ids, and an id is read back from its key.
func TestOrder(t *testing.T) {
	id := rapid.OneOf(rapid.Int64Range(0, math.MaxInt64), rapid.Int64Range(0, 20), rapid.Just[int64](math.MaxInt64))
	rapid.Check(t, func(t *rapid.T) {
		a, b, first, last := id.Draw(t, "a"), id.Draw(t, "b"), id.Draw(t, "first"), id.Draw(t, "last")
		if (a < b) != (keys.Segment(7, a) < keys.Segment(7, b)) {
			t.Fatalf("%d and %d are in another order", a, b)
		}
		if got, err := keys.LastID(keys.Segment(7, a)); err != nil || got != a {
			t.Fatalf("%d, %v; want %d", got, err, a)
		}
		from, to := keys.Span(keys.SegmentPrefix(7), first, last)
		if in := first <= a && a <= last; first <= last && in != meta.InRange(keys.Segment(7, a), from, to) {
			t.Fatalf("%d in %d to %d: %v", a, first, last, !in)
		}
		if from, to := meta.Prefix(keys.SegmentPrefix(a)); a != b && meta.InRange(keys.Segment(b, first), from, to) {
			t.Fatalf("a segment of %d is in the range of %d", b, a)
		}
		if from, to := keys.All(); !meta.InRange(keys.Segment(a, b), from, to) || !meta.InRange(keys.Format, from, to) {
			t.Fatal("a key is not in the range of all")
		}
	})
	if c, u, err := keys.LastTwo(keys.Tombstone(7, 9)); c != 7 || u != 9 || err != nil {
		t.Errorf("got %d, %d, %v", c, u, err)
	}
	for _, key := range []string{"", "/", "/catalog/segment/1/", "/a/x", "/a/1x", "/a/99999999999999999999"} {
		if id, err := keys.LastID(key); err == nil {
			t.Errorf("%q: id %d", key, id)
		}
	}
}
