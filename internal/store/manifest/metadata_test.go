package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/segment"
)

func TestMetadataRoundTrip(t *testing.T) {
	text := rapid.StringN(0, 20, 60)
	labels := rapid.MapOfN(text, text, 1, 4)
	id := rapid.Int64Min(1)
	rapid.Check(t, func(t *rapid.T) {
		want := goldenMetadata(nil, nil)
		want.Snapshot = SnapshotInfo{
			ID: id.Draw(t, "id"), Name: text.Draw(t, "name"), Description: text.Draw(t, "description"),
			Labels:     labels.Draw(t, "labels"),
			CreateTime: time.Unix(rapid.Int64Range(0, 1<<33).Draw(t, "s"), rapid.Int64Range(0, 999_999_999).Draw(t, "ns")).UTC(),
		}
		want.Collection.Properties = labels.Draw(t, "properties")
		want.Collection.Schema.Raw = rapid.SliceOfN(rapid.Byte(), 1, 30).Draw(t, "raw")
		want.CatalogRevision = rapid.Int64().Draw(t, "revision")
		want.Channels[0].Cut = segment.Timestamp(rapid.Uint64().Draw(t, "cut"))
		data, err := EncodeMetadata(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeMetadata(data)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

func TestEncodeMetadataIsDeterministic(t *testing.T) {
	var first []byte
	for i := range 50 {
		m := goldenMetadata(nil, nil)
		m.Snapshot.Labels = make(map[string]string)
		for k := range 30 {
			m.Snapshot.Labels[fmt.Sprint((k*7+i)%30)] = "v"
		}
		zone := time.FixedZone("somewhere", 3600*(i%12))
		m.Snapshot.CreateTime = m.Snapshot.CreateTime.In(zone)
		m.FormatVersion = i % 2
		data, err := EncodeMetadata(m)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = data
		}
		if !bytes.Equal(data, first) {
			t.Fatalf("run %d differs:\n%s", i, cmp.Diff(string(first), string(data)))
		}
	}
}

// TestMetadataForOtherReaders reads the JSON with float64 numbers.
func TestMetadataForOtherReaders(t *testing.T) {
	data, err := EncodeMetadata(&Metadata{
		Snapshot: SnapshotInfo{ID: math.MaxInt64, CreateTime: time.Unix(0, 1)}, Collection: CollectionInfo{ID: 1},
		Refs: RefsFile{File: RefsName},
	})
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	snapshot := m["snapshot"].(map[string]any)
	if got := snapshot["id"]; got != "9223372036854775807" {
		t.Errorf("id %v", got)
	}
	if got := snapshot["create_time"]; got != "1970-01-01T00:00:00.000000001Z" {
		t.Errorf("create_time %v", got)
	}
	for _, list := range []string{"roots", "partitions", "indexes", "channels", "manifests"} {
		if got, ok := m[list].([]any); !ok || len(got) != 0 {
			t.Errorf("%s: %v, want an empty list", list, m[list])
		}
	}
	for _, word := range []string{"bucket", "endpoint", "null"} {
		if bytes.Contains(data, []byte(word)) {
			t.Errorf("the metadata contain %q", word)
		}
	}
}

func TestDecodeMetadataEvolves(t *testing.T) {
	good := string(golden(t, "metadata.json"))
	later := strings.Replace(good, "{", `{"later": {"a": [1, {"b": null}]},`, 1)
	m, err := DecodeMetadata([]byte(later))
	if err != nil {
		t.Fatalf("with an unknown field: %v", err)
	}
	if m.Snapshot.Name != "nightly" {
		t.Errorf("with an unknown field: %+v", m.Snapshot)
	}

	// A newer version is refused as such, even if no other field is valid.
	_, err = DecodeMetadata([]byte(`{"format_version": 2, "snapshot": []}`))
	var newer *NewerFormatError
	if !errors.Is(err, ErrNewerFormat) || !errors.As(err, &newer) || newer.Found != 2 || newer.Supported != FormatVersion {
		t.Errorf("version 2: err = %v, want a NewerFormatError", err)
	}
	if err == nil || !strings.Contains(err.Error(), "version 2, this program reads up to 1") {
		t.Errorf("err = %v, want both versions in it", err)
	}
	if errors.Is(err, ErrCorrupt) {
		t.Errorf("a newer version counts as corruption: %v", err)
	}
}

func TestDecodeMetadataRefuses(t *testing.T) {
	good := string(golden(t, "metadata.json"))
	replace := func(old, by string) string {
		if !strings.Contains(good, old) {
			t.Fatalf("the golden file lacks %s", old)
		}
		return strings.Replace(good, old, by, 1)
	}
	for name, data := range map[string]string{
		"nothing":            "",
		"null":               "null",
		"array":              "[]",
		"no version":         "{}",
		"version 0":          replace(`"format_version": 1`, `"format_version": 0`),
		"negative version":   replace(`"format_version": 1`, `"format_version": -1`),
		"fractional version": replace(`"format_version": 1`, `"format_version": 1.5`),
		"version in words":   replace(`"format_version": 1`, `"format_version": "1"`),
		"key twice":          replace(`"format_version": 1`, `"format_version": 1, "format_version": 1`),
		"inner key twice":    replace(`"name": "nightly"`, `"name": "nightly", "name": "other"`),
		"byte order mark":    "\ufeff" + good,
		"two values":         good + good,
		"id a number":        replace(`"id": "77"`, `"id": 77`),
		"id 0":               replace(`"id": "77"`, `"id": "0"`),
		"id too large":       replace(`"id": "77"`, `"id": "9223372036854775808"`),
		"cut too large":      replace(`"cut": "18446744073709551615"`, `"cut": "18446744073709551616"`),
		"negative cut":       replace(`"cut": "18446744073709551615"`, `"cut": "-1"`),
		"other file name":    replace(`"file": "manifest-0.avro"`, `"file": "../manifest-0.avro"`),
		"other refs name":    replace(`"file": "refs.avro"`, `"file": "/refs.avro"`),
		"root twice":         replace(`"number": 1`, `"number": 0`),
		"first ordinal":      replace(`"first_ordinal": 0`, `"first_ordinal": 1`),
		"first build":        replace(`"first_build": 0`, `"first_build": 1`),
		"negative rows":      replace(`"rows": 1099511727776`, `"rows": -1`),
		"totals":             replace(`"straddling": 1`, `"straddling": 5`),
		"short SHA-256":      replace(`"sha256": "`, `"sha256": "" , "x": "`),
		"SHA-256 not hex":    replace(`"sha256": "`, `"sha256": "`+strings.Repeat("g", 64)+`", "x": "`),
		"deep":               `{"format_version": 1, "x": ` + strings.Repeat("[", 100) + strings.Repeat("]", 100) + "}",
		"very deep":          strings.Repeat("[", 1_000_000),
		"too large":          good + strings.Repeat(" ", MaxMetadataBytes),
		"NaN":                replace(`"shards": 2`, `"shards": NaN`),
		"huge number":        replace(`"shards": 2`, `"shards": 1e400`),
	} {
		if _, err := DecodeMetadata([]byte(data)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}
	trimmed := strings.TrimRight(good, "\n")
	for i := range trimmed {
		if _, err := DecodeMetadata([]byte(trimmed[:i])); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d of %d bytes: err = %v, want ErrCorrupt", i, len(trimmed), err)
		}
	}
}

func TestMetadataSums(t *testing.T) {
	m := goldenMetadata(nil, nil)
	one := m.Manifests[0]
	two := one
	two.File, two.FirstOrdinal, two.FirstBuild = ManifestName(1), one.Segments, one.Builds
	m.Manifests = append(m.Manifests, two)
	if _, err := EncodeMetadata(m); err == nil {
		t.Error("totals of one manifest for two: no error")
	}
	m.Totals.Segments *= 2
	m.Totals.Rows *= 2
	m.Totals.Files *= 2
	m.Totals.Bytes *= 2
	m.Totals.Builds *= 2
	if _, err := EncodeMetadata(m); err != nil {
		t.Error(err)
	}
	m.Manifests[1].Bytes = math.MaxInt64
	if _, err := EncodeMetadata(m); err == nil {
		t.Error("a sum that overflows: no error")
	}
}
