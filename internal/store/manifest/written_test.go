package manifest

import (
	"strings"
	"testing"
)

// TestWrittenAs accepts files of a snapshot under their own keys, complete or truncated after
// the first block, and unaltered in the part that the marker covers.
func TestWrittenAs(t *testing.T) {
	refs, err := EncodeRefs(&Refs{Segments: []int64{7, 9}})
	if err != nil {
		t.Fatal(err)
	}
	none, err := EncodeRefs(&Refs{})
	if err != nil {
		t.Fatal(err)
	}
	md, err := EncodeMetadata(&Metadata{
		Snapshot: SnapshotInfo{ID: 5}, Collection: CollectionInfo{ID: 3},
		Refs: RefsFile{File: RefsName},
	})
	if err != nil {
		t.Fatal(err)
	}
	newer := []byte(strings.Replace(string(md), `"format_version": 1`, `"format_version": 99`, 1))
	flip := func(data []byte, at int) []byte {
		data = append([]byte(nil), data...)
		data[at] ^= 1
		return data
	}
	for name, c := range map[string]struct {
		key  string
		data []byte
		want bool
	}{
		"refs":                     {RefsKey(3, 5), refs, true},
		"refs of nothing":          {RefsKey(3, 5), none, true},
		"more follows":             {ManifestKey(3, 5, 0), append(append([]byte(nil), refs...), 2, 9), true},
		"metadata":                 {MetadataKey(3, 5), md, true},
		"metadata of a newer":      {MetadataKey(3, 5), newer, true},
		"metadata of another":      {MetadataKey(3, 6), md, false},
		"metadata that is cut off": {MetadataKey(3, 5), md[:len(md)/2], false},
		"refs with another byte":   {RefsKey(3, 5), flip(refs, len(refs)-syncSize-1), false},
		"another marker":           {RefsKey(3, 5), flip(none, len(none)-1), false},
		"refs that are cut off":    {RefsKey(3, 5), refs[:len(refs)-1], false},
		"of another program":       {RefsKey(3, 5), []byte("this is another program's"), false},
		"nothing":                  {RefsKey(3, 5), nil, false},
		"another key":              {"data/3/5", refs, false},
	} {
		if got := WrittenAs(c.key, c.data); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}
