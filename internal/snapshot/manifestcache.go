package snapshot

import (
	"slices"
	"sync"
)

// manifestCache keeps the files that were read and checked last, so that the pages of a
// manifest need one read. The content of a key never changes.
type manifestCache struct {
	mu      sync.Mutex
	entries []cachedFile // newest last
}

type cachedFile struct {
	snapshot int64
	key      string
	data     []byte
}

// maxCached is the maximum size of the cache, in bytes.
const maxCached = 32 << 20

func (c *manifestCache) get(key string) []byte {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.entries {
		if e.key == key {
			return e.data
		}
	}
	return nil
}

// put adds a file, and removes files of snapshots that no longer exist and the oldest
// files beyond maxCached.
func (c *manifestCache) put(f cachedFile, lives func(snapshot int64) bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.entries = slices.DeleteFunc(c.entries, func(e cachedFile) bool { return e.key == f.key || !lives(e.snapshot) })
	c.entries = append(c.entries, f)
	size := 0
	for i, e := range slices.Backward(c.entries) {
		if size += len(e.data); size > maxCached {
			c.entries = slices.Delete(c.entries, 0, i+1)
			break
		}
	}
}
