package manifest_test

import (
	"errors"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/store/manifest"
	"github.com/snapshotd/snapshotd/internal/store/object"
)

func TestKeys(t *testing.T) {
	for _, c := range []struct{ got, want string }{
		{manifest.Dir(7, 42), "snapshots/7/42/"},
		{manifest.MetadataKey(7, 42), "snapshots/7/42/metadata.json"},
		{manifest.ManifestKey(7, 42, 0), "snapshots/7/42/manifest-0.avro"},
		{manifest.ManifestKey(7, math.MaxInt64, 12), "snapshots/7/9223372036854775807/manifest-12.avro"},
		{manifest.RefsKey(7, 42), "snapshots/7/42/refs.avro"},
	} {
		if c.got != c.want {
			t.Errorf("got %s, want %s", c.got, c.want)
		}
	}
	if err := object.CheckPrefix(manifest.Dir(7, 42)); err != nil {
		t.Error(err)
	}
}

func TestDigest(t *testing.T) {
	data := []byte("hello")
	d := manifest.Sum(data)
	if err := d.Check(data); err != nil {
		t.Errorf("Check of equal data: %v", err)
	}
	err := d.Check([]byte("hell"))
	if !errors.Is(err, manifest.ErrCorrupt) || !strings.Contains(err.Error(), "4 bytes, want 5") {
		t.Errorf("Check of shorter data: %v", err)
	}
	err = d.Check([]byte("hellp"))
	want := "want 2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
	if !errors.Is(err, manifest.ErrCorrupt) || !strings.Contains(err.Error(), want) {
		t.Errorf("Check of other data: %v; want %q in it", err, want)
	}
}

// TestDigestDetectsEveryBit flips a bit of each byte of a file of each kind.
func TestDigestDetectsEveryBit(t *testing.T) {
	for _, name := range []string{"manifest-0.avro", "refs.avro", "metadata.json"} {
		data, err := os.ReadFile(filepath.Join("testdata", "v1", name))
		if err != nil {
			t.Fatal(err)
		}
		d := manifest.Sum(data)
		for i := range data {
			data[i] ^= 1 << (i % 8)
			if err := d.Check(data); !errors.Is(err, manifest.ErrCorrupt) {
				t.Errorf("%s: byte %d changed: err = %v", name, i, err)
			}
			data[i] ^= 1 << (i % 8)
		}
	}
}

// TestParseKey parses each key that snapshotd writes, and no other.
func TestParseKey(t *testing.T) {
	type parsed struct {
		Collection, Snapshot int64
		OK                   bool
	}
	for key, want := range map[string]parsed{
		manifest.MetadataKey(7, 42):          {7, 42, true},
		manifest.RefsKey(7, 42):              {7, 42, true},
		manifest.ManifestKey(7, 42, 0):       {7, 42, true},
		manifest.ManifestKey(7, 42, 123):     {7, 42, true},
		"snapshots/identity.json":            {},
		"snapshots/7/42/manifest-01.avro":    {},
		"snapshots/7/42/manifest--1.avro":    {},
		"snapshots/7/42/manifest-+1.avro":    {},
		"snapshots/7/42/manifest-1":          {},
		"snapshots/7/42/manifest-1.avro.bak": {},
		"snapshots/7/42/README":              {},
		"snapshots/7/42/":                    {},
		"snapshots/07/42/metadata.json":      {},
		"snapshots/7/+42/metadata.json":      {},
		"snapshots/7/0/metadata.json":        {},
		"snapshots/-7/42/metadata.json":      {},
		"snapshots/7/42/x/metadata.json":     {},
		"other/7/42/metadata.json":           {},
		"":                                   {},
	} {
		collection, snapshot, ok := manifest.ParseKey(key)
		if got := (parsed{collection, snapshot, ok}); got != want {
			t.Errorf("%q: got %+v, want %+v", key, got, want)
		}
	}
}
