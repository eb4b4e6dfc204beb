package manifest

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/test/allocated"
)

// A few kilobytes must not make a reader allocate gigabytes: a block of zeros compresses to
// almost nothing, and decodes to many empty items.
func TestMemoryIsBounded(t *testing.T) {
	const room = 512 << 20
	for name, c := range map[string]struct{ before, items, size, after int }{
		"files":      {13, 4_900_000, 13, 4},
		"builds":     {14, 12_000_000, 5, 3},
		"attributes": {16, 32_000_000, 2, 1},
	} {
		raw := slices.Concat([]byte{2}, make([]byte, c.before), binary.AppendVarint(nil, int64(c.items)),
			make([]byte, c.items*c.size+c.after))
		data := frame(segmentSchema.text, 1, raw)
		var err error
		if took := allocated.Bytes(func() { err = read(data) }); took > room || !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: a file of %d bytes took %d MiB of memory, at most %d; err = %v", name, len(data), took>>20, room>>20,
				err)
		}
	}
	data := []byte(`{"format_version":1,"manifests":[` + strings.Repeat("{},", 4<<20) + `{}]}`)
	var err error
	if took := allocated.Bytes(func() { _, err = DecodeMetadata(data) }); took > room || !errors.Is(err, ErrCorrupt) {
		t.Errorf("metadata of %d bytes took %d MiB of memory, at most %d; err = %v", len(data), took>>20, room>>20, err)
	}
}
