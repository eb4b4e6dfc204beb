package manifest

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"math"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// Run with -update to rewrite the golden files of the current format. Files of a released
// format must not change.
var update = flag.Bool("update", false, "write the golden files")

const goldenDir = "testdata/v1"

// goldenSegments has every field set, and unset, at its extremes.
func goldenSegments() []segment.Segment {
	return []segment.Segment{
		{ID: 1},
		{
			ID: 1001, Partition: 20, Channel: 3, Level: 2, State: segment.Flushed, Rows: 100_000,
			Start:          segment.Position{Timestamp: 450_000_000_000_000_001, Opaque: []byte{0, 1, 0xff, 0}},
			DML:            segment.Position{Timestamp: math.MaxUint64, Opaque: []byte("kafka:7")},
			StorageVersion: 2, Sorted: true, CommitTimestamp: 1 << 63, RowCeiling: math.MaxUint64 - 1,
			Files: []segment.File{
				{
					Root: 1, Path: "insert_log/10/20/1001/100/5001", Kind: segment.KindInsert, Size: 1 << 40,
					ETag: "9b2cf535f27731c974343645a3985328-3", Checksum: segment.Checksum{
						Type:  "CRC64NVME",
						Value: []byte{0, 1, 2, 3, 4, 5, 6, 0xff},
					},
					MinTimestamp: 1, MaxTimestamp: math.MaxUint64, Entries: 100_000, Field: 100, LogID: 5001,
					Attributes: map[string]string{"b": "2", "a": "1", "": "no key", "no value": ""},
				},
				{Path: "delta/日本語 with spaces", Kind: segment.KindDelta, Entries: 3},
				{Path: "x", Kind: "a kind of the future"},
				{Path: ""},
			},
			Builds: []segment.Build{
				{
					ID: 900, Index: 30, Field: 101, Params: map[string]string{
						"M": "16", "efConstruction": "200",
						"index_type": "HNSW",
					},
					Files: []segment.File{{Root: 1, Path: "index_files/900/1/20/1001/HNSW_0", Kind: segment.KindIndex, Size: 77}},
				},
				{ID: 901},
			},
			EngineData: bytes.Repeat([]byte{0xde, 0xad, 0}, 100),
			Attributes: map[string]string{"owner": "node-1", "é": "\u0000"},
		},
		{ID: 1002, State: segment.Growing, Start: segment.Position{Opaque: []byte{0}}},
		{
			ID: math.MaxInt64, Partition: -1, Channel: math.MaxInt32, Level: math.MaxInt32, State: 77, Rows: math.MaxInt64,
			StorageVersion: math.MinInt64, Files: []segment.File{{
				Root: math.MaxInt32, Path: "p", Kind: "k", Size: math.MaxInt64, Entries: math.MaxInt64, Field: math.MinInt64,
				LogID: -1,
			}},
		},
	}
}

func goldenRefs() *Refs {
	return &Refs{
		Segments: []int64{1, 1001, 1002, math.MaxInt64},
		Builds:   []int64{900, 901},
		Files:    []uint64{0, 1, FileHash("main", "shared/index/1"), math.MaxUint64},
	}
}

func goldenMetadata(manifestData, refsData []byte) *Metadata {
	var totals segment.Totals
	for _, s := range goldenSegments() {
		s.Rows = min(s.Rows, 1<<40) // keeps the sums in range
		for f := range s.AllFiles() {
			f.Size = min(f.Size, 1<<40)
		}
		totals.Add(&s)
		if s.RowCeiling != 0 {
			totals.Straddling++
		}
	}
	return &Metadata{
		FormatVersion: 1,
		ClusterID:     "6f1c1c2e-7a0b-4a7e-9d0a-0c5f2f3f8b11",
		CreatedBy:     "snapshotd v0.1.0",
		Snapshot: SnapshotInfo{
			ID: 77, Name: "nightly", Description: "before the <upgrade> & after",
			Labels:     map[string]string{"team": "search", "env": "prod"},
			CreateTime: time.Date(2026, 11, 22, 3, 4, 5, 678_901_234, time.UTC),
		},
		Collection: CollectionInfo{
			ID: 10, DB: "default", Name: "documents",
			Schema: Schema{
				Fields: []Field{
					{ID: 100, Name: "pk", DataType: "INT64", PrimaryKey: true, PartitionKey: true},
					{
						ID: math.MaxInt64, Name: "vector", DataType: "ARRAY", ElementType: "FLOAT", Nullable: true,
						TypeParams: map[string]string{"dim": "768"}, Attributes: map[string]string{"a": "b"},
					},
				},
				Format: "milvus.proto.schema.CollectionSchema", Raw: []byte{0, 0xff, 0x10},
			},
			Shards: 2, ConsistencyLevel: "BOUNDED", Properties: map[string]string{"ttl": "0"}, Layout: "milvus",
			Attributes: map[string]string{"x": "y"},
		},
		Roots:      []Root{{0, "main", "files/"}, {1, "cold", ""}},
		Partitions: []Partition{{ID: 20, Name: "_default", Attributes: map[string]string{"p": "q"}}, {ID: 21, Name: "b"}},
		Indexes: []Index{{
			ID: 30, Name: "hnsw", Field: 101, TypeParams: map[string]string{"dim": "768"},
			IndexParams: map[string]string{"metric_type": "L2"}, Attributes: map[string]string{"i": "j"},
		}},
		Channels: []Channel{
			{Shard: 0, Name: "ch-0", Cut: math.MaxUint64, Opaque: []byte{1, 0}},
			{Shard: 1, Cut: 450_000_000_000_000_001},
		},
		CatalogRevision: 1<<62 + 1,
		Manifests: []ManifestFile{{
			File: "manifest-0.avro", Digest: Sum(manifestData), Segments: totals.Segments, Rows: totals.Rows,
			Builds: totals.Builds,
			Files:  totals.Files, Bytes: totals.Bytes,
		}},
		Refs:   RefsFile{File: RefsName, Digest: Sum(refsData), Segments: 4, Builds: 2, Files: 4},
		Totals: Totals(totals),
	}
}

func golden(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(goldenDir, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestGolden checks that this version reads the files of the first release, and writes the
// same bytes unless the format or the compressor is changed on purpose.
func TestGolden(t *testing.T) {
	manifestData, err := Encode(goldenSegments())
	if err != nil {
		t.Fatal(err)
	}
	refsData, err := EncodeRefs(goldenRefs())
	if err != nil {
		t.Fatal(err)
	}
	metadata := goldenMetadata(manifestData, refsData)
	metadataData, err := EncodeMetadata(metadata)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"manifest-0.avro": manifestData, "refs.avro": refsData,
		"metadata.json": metadataData,
	} {
		if *update {
			if err := os.WriteFile(filepath.Join(goldenDir, name), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(golden(t, name), data) {
			t.Errorf("the encoding of %s has changed; if this is intended, keep the old file and add a new one", name)
		}
	}

	m, err := DecodeMetadata(golden(t, "metadata.json"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(metadata, m); diff != "" {
		t.Errorf("metadata (-want +got):\n%s", diff)
	}
	r, err := m.Manifests[0].Open(golden(t, "manifest-0.avro"))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(goldenSegments(), readAll(t, r)); diff != "" {
		t.Errorf("segments (-want +got):\n%s", diff)
	}
	refs, err := DecodeRefs(golden(t, "refs.avro"), m.Refs)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(goldenRefs(), refs); diff != "" {
		t.Errorf("references (-want +got):\n%s", diff)
	}
}

func readAll(t testing.TB, r *Reader) []segment.Segment {
	t.Helper()
	var segments []segment.Segment
	for {
		s, err := r.Next()
		if errors.Is(err, io.EOF) {
			return segments
		}
		if err != nil {
			t.Fatal(err)
		}
		segments = append(segments, *s)
	}
}
