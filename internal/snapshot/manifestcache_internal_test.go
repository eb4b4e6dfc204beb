package snapshot

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestManifestCache checks that the cache of snapshot files is bounded, holds each file
// once, and holds nothing of removed snapshots.
func TestManifestCache(t *testing.T) {
	var c manifestCache
	gone := map[int64]bool{}
	put := func(snapshot int64, key string, size int) {
		c.put(cachedFile{snapshot, key, make([]byte, size)}, func(id int64) bool { return !gone[id] })
	}
	kept := func(want ...string) {
		t.Helper()
		var got []string
		for _, e := range c.entries {
			got = append(got, e.key)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("(-want +got)\n%s", diff)
		}
	}
	put(1, "a", 10)
	put(2, "b", 20)
	put(1, "a", 10)
	kept("b", "a")
	put(3, "c", maxCached-25)
	kept("a", "c")
	if len(c.get("a")) != 10 || c.get("b") != nil {
		t.Error("another file than the one asked for")
	}
	gone[1] = true
	put(2, "b", 1)
	kept("c", "b")
	put(2, "d", maxCached+1)
	kept()
	put(2, "e", 1)
	kept("e")
}
