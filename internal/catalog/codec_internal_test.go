package catalog

import (
	"crypto/sha256"
	"fmt"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func genID() *rapid.Generator[int64] {
	return rapid.OneOf(rapid.Int64Range(1, 1000), rapid.Int64Range(1, math.MaxInt64), rapid.Just[int64](math.MaxInt64))
}

func genTimestamp() *rapid.Generator[segment.Timestamp] {
	return rapid.Custom(func(t *rapid.T) segment.Timestamp {
		return segment.Timestamp(rapid.OneOf(rapid.Uint64(),
			rapid.Uint64Range(450_000_000_000_000_000, 450_000_000_000_900_000),
			rapid.SampledFrom([]uint64{0, 1, math.MaxInt64, math.MaxInt64 + 1, math.MaxUint64})).Draw(t, "timestamp"))
	})
}

func genPosition() *rapid.Generator[segment.Position] {
	return rapid.Custom(func(t *rapid.T) segment.Position {
		return segment.Position{
			Timestamp: genTimestamp().Draw(t, "position"),
			Opaque:    rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "opaque"),
		}
	})
}

func genAttributes() *rapid.Generator[map[string]string] {
	return rapid.OneOf(rapid.Just[map[string]string](nil), rapid.MapOfN(rapid.String(), rapid.String(), 0, 3))
}

func genETag() *rapid.Generator[string] {
	return rapid.OneOf(
		rapid.StringMatching(`[0-9a-f]{32}`), rapid.StringMatching(`[0-9a-f]{32}`), rapid.StringMatching(`[0-9A-F]{32}`),
		rapid.StringMatching(`"[0-9a-f]{32}"`), rapid.StringMatching(`[0-9a-f]{32}-3`), rapid.StringMatching(`[g-z]{32}`),
		rapid.Just(""), rapid.String())
}

// genFiles makes files of s, all with hex ETags or none to be sure of.
func genFiles(t *rapid.T, collection int64, s *segment.Segment, most int) []segment.File {
	hexOnly := rapid.Bool().Draw(t, "hex ETags")
	return rapid.SliceOfN(rapid.Custom(func(t *rapid.T) segment.File {
		f := segment.File{
			Root: rapid.IntRange(0, 15).Draw(t, "root"),
			Kind: rapid.OneOf(rapid.SampledFrom(knownKinds), rapid.SampledFrom([]string{"lance", "vortex"}),
				rapid.String()).Draw(t, "kind"),
			Size: rapid.Int64Range(0, math.MaxInt64).Draw(t, "size"), ETag: genETag().Draw(t, "etag"),
			MinTimestamp: genTimestamp().Draw(t, "min"), MaxTimestamp: genTimestamp().Draw(t, "max"),
			Entries: rapid.Int64Range(0, math.MaxInt64).Draw(t, "entries"), Field: rapid.Int64Range(0, math.MaxInt64).Draw(t,
				"field"),
			LogID: rapid.Int64Range(0, math.MaxInt64).Draw(t, "log id"), Attributes: genAttributes().Draw(t, "attributes"),
		}
		if hexOnly {
			f.ETag = rapid.StringMatching(`[0-9a-f]{32}`).Draw(t, "hex etag")
		}
		if rapid.Bool().Draw(t, "has checksum") {
			f.Checksum.Type = rapid.SampledFrom([]string{"SHA256", "CRC32C", "x"}).Draw(t, "checksum type")
			f.Checksum.Value = rapid.SliceOfN(rapid.Byte(), 0, 32).Draw(t, "checksum")
		}
		if native := NativePath(collection, s, &f); rapid.Bool().Draw(t, "native") && len(native) <= object.MaxKeyBytes {
			f.Path = native
		} else {
			f.Path = rapid.OneOf(rapid.StringMatching(`insert_log/[0-9]{1,5}/[0-9]{1,5}/é?[0-9]{1,3}`),
				rapid.StringN(0, 100, object.MaxKeyBytes)).Draw(t, "path")
		}
		return f
	}), 0, most).Draw(t, "files")
}

func genSegment(t *rapid.T, collection int64) segment.Segment {
	s := segment.Segment{
		ID: genID().Draw(t, "id"), Partition: rapid.OneOf(rapid.Just[int64](0), genID()).Draw(t, "partition"),
		Channel: rapid.IntRange(0, 63).Draw(t, "channel"), Level: rapid.IntRange(0, 2).Draw(t, "level"),
		State: segment.State(rapid.IntRange(1, 5).Draw(t, "state")), Rows: rapid.Int64Range(0, math.MaxInt64).Draw(t, "rows"),
		Start: genPosition().Draw(t, "start"), DML: genPosition().Draw(t, "dml"), StorageVersion: rapid.Int64().Draw(t,
			"version"),
		Sorted: rapid.Bool().Draw(t, "sorted"), CommitTimestamp: genTimestamp().Draw(t,
			"commit"), RowCeiling: genTimestamp().Draw(t, "ceiling"),
		EngineData: rapid.SliceOfN(rapid.Byte(), 0, 30).Draw(t, "engine data"), Attributes: genAttributes().Draw(t,
			"attributes"),
	}
	s.Files = genFiles(t, collection, &s, 6)
	for range rapid.IntRange(0, 3).Draw(t, "builds") {
		s.Builds = append(s.Builds, segment.Build{
			ID: genID().Draw(t, "build"), Index: genID().Draw(t, "index"), Field: rapid.Int64().Draw(t, "field"),
			Params: genAttributes().Draw(t, "params"), Files: genFiles(t, collection, &s, 3),
		})
	}
	return s
}

func segmentKV(collection, id int64, rec *storagev1.Segment) meta.KeyValue {
	return meta.KeyValue{Key: keys.Segment(collection, id), Value: record.Encode(rec)}
}

func TestSegmentRoundTrip(t *testing.T) {
	var decoder Decoder
	rapid.Check(t, func(t *rapid.T) {
		collection := genID().Draw(t, "collection")
		want := genSegment(t, collection)
		kv := segmentKV(collection, want.ID, encodeSegment(collection, &want, "op"))
		got, err := DecodeSegment(collection, kv)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
		checkDecoder(t, &decoder, collection, kv)
		again := segmentKV(collection, got.ID, encodeSegment(collection, &got, "another"))
		if same, err := equalSegments(kv, again); err != nil || !same {
			t.Fatalf("the same segment by another operation: same = %v, err = %v", same, err)
		}
	})
}

// checkDecoder holds decoder, whatever it read before, to reading what the proto
// package reads.
func checkDecoder(t rapid.TB, decoder *Decoder, collection int64, kv meta.KeyValue) {
	t.Helper()
	before := slices.Clone(kv.Value)
	got, err := decoder.Decode(collection, kv)
	id, wantErr := keys.LastID(kv.Key)
	var want segment.Segment
	rec := &storagev1.Segment{}
	if wantErr == nil {
		wantErr = record.Decode(kv, rec)
	}
	if wantErr == nil {
		want, wantErr = segmentOf(collection, id, rec)
	}
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("err = %v, by the proto package %v", err, wantErr)
	}
	if err == nil {
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-by the proto package +got):\n%s", diff)
		}
	}
	if !slices.Equal(before, kv.Value) {
		t.Fatal("the value was changed")
	}
}

// What a decoder gave out does not change when it goes on, but for the lists of
// files and builds.
func TestDecoderLeavesTheRestAlone(t *testing.T) {
	var decoder Decoder
	var got, want []segment.Segment
	for id := range int64(20) {
		s := makeSegment(1, 2+id, 12)
		s.Start.Opaque, s.EngineData, s.Attributes = []byte{byte(id)}, []byte{
			byte(id),
			1,
		}, map[string]string{"id": fmt.Sprint(id)}
		s.Files[1].Path = fmt.Sprintf("x/%d/y", id)
		s.Files[2].Attributes = map[string]string{"id": fmt.Sprint(id)}
		s.Files[3].Checksum = segment.Checksum{Type: fmt.Sprint("T", id), Value: []byte{byte(id)}}
		s.Builds = []segment.Build{{
			ID: 100 + id, Index: 5, Params: map[string]string{"id": fmt.Sprint(id)},
			Files: s.Files[10:],
		}}
		s.Files = s.Files[:10:10]
		want = append(want, s)
		kv := segmentKV(1, s.ID, encodeSegment(1, &s, "op"))
		d, err := decoder.Decode(1, kv)
		if err != nil {
			t.Fatal(err)
		}
		clear(kv.Value) // nothing of it is kept
		d.Files, d.Builds = slices.Clone(d.Files), slices.Clone(d.Builds)
		for i := range d.Builds {
			d.Builds[i].Files = slices.Clone(d.Builds[i].Files)
		}
		got = append(got, d)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A record need not be as we write it: numbers one by one, fields in parts, twice
// or unknown are all the same to the proto package.
func TestDecoderReadsOddRecords(t *testing.T) {
	s := makeSegment(1, 2, 2)
	plain := record.Encode(encodeSegment(1, &s, "op"))
	bytesOf := func(num protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), value)
	}
	numberOf := func(num protowire.Number, value uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), value)
	}
	var decoder Decoder
	for name, odd := range map[string][]byte{
		"nothing":            nil,
		"column of single":   bytesOf(13, slices.Concat(numberOf(3, 1), numberOf(7, 5), numberOf(1, 3))),
		"column in parts":    bytesOf(13, slices.Concat(bytesOf(3, []byte{1}), bytesOf(3, []byte{2}), numberOf(1, 4))),
		"long numbers":       bytesOf(13, slices.Concat(bytesOf(3, []byte{0x81, 0x80, 0}), numberOf(1, 3))),
		"number cut":         bytesOf(13, bytesOf(3, []byte{0x81})),
		"number too long":    bytesOf(13, bytesOf(13, bytesOf(3, []byte(strings.Repeat("\xff", 11))))),
		"field twice":        numberOf(6, 77),
		"position in parts":  slices.Concat(bytesOf(7, numberOf(1, 5)), bytesOf(7, bytesOf(2, []byte("x")))),
		"position with more": bytesOf(8, slices.Concat(numberOf(9, 5), numberOf(2, 3))),
		"build": bytesOf(14, slices.Concat(numberOf(1, 7),
			bytesOf(4, slices.Concat(bytesOf(1, []byte("k")), bytesOf(2, []byte("v")))))),
		"build of garbage": bytesOf(14, []byte{0xff}),
		"wrong wire type":  slices.Concat(bytesOf(6, []byte("x")), numberOf(13, 5)),
		"fixed":            protowire.AppendFixed64(protowire.AppendTag(nil, 6, protowire.Fixed64Type), 5),
		"group": protowire.AppendTag(protowire.AppendTag(nil, 50, protowire.StartGroupType), 50,
			protowire.EndGroupType),
		"end of no group":       protowire.AppendTag(nil, 50, protowire.EndGroupType),
		"unknown":               bytesOf(99, []byte("x")),
		"field 0":               {0, 0},
		"text that is none":     bytesOf(17, []byte{0xff}),
		"kind that is none":     bytesOf(13, bytesOf(4, []byte{0xff})),
		"etag that is none":     bytesOf(13, bytesOf(9, []byte{0xff})),
		"attributes":            bytesOf(16, slices.Concat(bytesOf(1, []byte("k")), bytesOf(2, []byte("v")))),
		"attribute that is bad": bytesOf(16, bytesOf(1, []byte{0xff})),
		"large partition":       numberOf(2, math.MaxUint64),
		"large shard":           numberOf(3, math.MaxUint64-7),
	} {
		t.Run(name, func(t *testing.T) {
			checkDecoder(t, &decoder, 1, meta.KeyValue{Key: keys.Segment(1, 2), Value: slices.Concat(plain, odd)})
		})
	}
}

// makeSegment is a segment as an engine with hybrid timestamps writes it.
func makeSegment(collection, id int64, files int) segment.Segment {
	const now = 450_000_000_000_000_000
	start := segment.Timestamp(now + id<<18)
	s := segment.Segment{
		ID: id, Partition: 450_000_000_000_000_002, Channel: 1, Level: 1, State: segment.Flushed, Rows: 123_456,
		Sorted: true, StorageVersion: 2,
		Start: segment.Position{Timestamp: start}, DML: segment.Position{Timestamp: start + 60_000<<18},
	}
	for i := range files {
		etag := sha256.Sum256(fmt.Append(nil, id, i))
		f := segment.File{
			Kind: segment.KindInsert, Size: 4_000_000 + 31*int64(i)*id%9_000_000, ETag: fmt.Sprintf("%x",
				etag[:16]), Entries: 123_456,
			Field: 100 + int64(i), LogID: id + 1 + int64(i), MinTimestamp: start, MaxTimestamp: start + 59_000<<18,
		}
		if i == files-1 {
			f.Kind, f.Field = segment.KindStats, 100
		}
		f.Path = NativePath(collection, &s, &f)
		s.Files = append(s.Files, f)
	}
	return s
}

// A record is a fifth of the plain size: etcd holds a million of them.
func TestSegmentSize(t *testing.T) {
	const collection = 450_000_000_000_000_001
	s := makeSegment(collection, 450_000_000_000_001_000, 12)
	kv := segmentKV(collection, s.ID, encodeSegment(collection, &s, strings.Repeat("a", 24)))
	got, err := DecodeSegment(collection, kv)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	t.Logf("%d bytes", len(kv.Value))
	if len(kv.Value) > 560 {
		t.Errorf("12 files take %d bytes, want at most 560", len(kv.Value))
	}
}

func TestDecodeDamagedSegment(t *testing.T) {
	s := makeSegment(1, 2, 3)
	s.Files[1].Path = "x/y"
	s.Files[2].Checksum = segment.Checksum{Type: "T", Value: []byte{1}}
	s.Builds = []segment.Build{{ID: 9, Index: 8, Files: []segment.File{{Kind: "k", Path: "p"}}}}
	for name, damage := range map[string]func(*storagev1.Segment){
		"count up":            func(r *storagev1.Segment) { r.Files.Count++ },
		"count down":          func(r *storagev1.Segment) { r.Files.Count-- },
		"count huge":          func(r *storagev1.Segment) { r.Files.Count = math.MaxUint32 },
		"kind 0":              func(r *storagev1.Segment) { r.Files.Kind[0] = 0 },
		"kind unknown":        func(r *storagev1.Segment) { r.Files.Kind[0] = 100 },
		"kind beyond":         func(r *storagev1.Segment) { r.Files.Kind[0] = otherKinds + 1 },
		"kind huge":           func(r *storagev1.Segment) { r.Files.Kind[0] = math.MaxUint32 },
		"column short":        func(r *storagev1.Segment) { r.Files.Size = r.Files.Size[1:] },
		"etags short":         func(r *storagev1.Segment) { r.Files.Etag, r.Files.Etag16 = nil, make([]byte, 17) },
		"etags long":          func(r *storagev1.Segment) { r.Files.Etag = append(r.Files.Etag, "x") },
		"checksum type":       func(r *storagev1.Segment) { r.Files.ChecksumType[0] = 9 },
		"checksum cut":        func(r *storagev1.Segment) { r.Files.ChecksumValues = nil },
		"path shares too far": func(r *storagev1.Segment) { r.Files.PathShared[1] = 5 },
		"path cut":            func(r *storagev1.Segment) { r.Files.PathTails = r.Files.PathTails[:2] },
		"path too long": func(r *storagev1.Segment) {
			r.Files.PathTails = append([]byte{0x81, 8}, make([]byte, object.MaxKeyBytes+1)...)
		},
		"builds of too many files": func(r *storagev1.Segment) { r.Builds[0].Files = 5 },
		"builds of huge files":     func(r *storagev1.Segment) { r.Builds[0].Files = math.MaxUint32 },
		"format":                   func(r *storagev1.Segment) { r.Format = 2 },
	} {
		t.Run(name, func(t *testing.T) {
			rec := encodeSegment(1, &s, "op")
			damage(rec)
			format := rec.Format
			rec.Format = record.Format
			kv := segmentKV(1, 2, rec)
			if format != record.Format {
				kv.Value[1] = byte(format) // the first field
			}
			_, err := DecodeSegment(1, kv)
			if err == nil || !strings.Contains(err.Error(), record.ErrUnreadable.Error()) || !strings.Contains(err.Error(),
				kv.Key) {
				t.Errorf("err = %v, want %v that names the key", err, record.ErrUnreadable)
			}
		})
	}
}

// However many files share however long a path, a record does not blow up.
func TestDecodeIsBounded(t *testing.T) {
	const n = 100_000
	rec := &storagev1.Segment{Format: record.Format, Files: &storagev1.Files{
		Count: n, Kind: make([]uint32, n),
		PathShared: make([]uint32, n),
	}}
	long := strings.Repeat("x", 500_000)
	for i := range n {
		rec.Files.Kind[i] = 1
		rec.Files.PathShared[i] = uint32(len(long)) + 1
	}
	rec.Files.PathShared[0] = 1
	rec.Files.PathTails = append([]byte{0xa0, 0xc2, 0x1e}, long...)
	rec.Files.PathTails = append(rec.Files.PathTails, make([]byte, n-1)...)
	if _, err := DecodeSegment(1, segmentKV(1, 2, rec)); err == nil {
		t.Error("a record of 50 GB of paths was read")
	}
}

func FuzzDecodeSegment(f *testing.F) {
	for _, n := range []int{0, 1, 12} {
		s := makeSegment(1, 2, n)
		f.Add(record.Encode(encodeSegment(1, &s, "op")))
		for i := range s.Files {
			s.Files[i].Path, s.Files[i].ETag, s.Files[i].Kind = fmt.Sprintf("a/%d/b", i), "x-3", "new"
			s.Files[i].Checksum = segment.Checksum{Type: "T", Value: []byte{1, 2}}
		}
		s.Builds = []segment.Build{{ID: 9, Index: 8, Files: s.Files}}
		f.Add(record.Encode(encodeSegment(1, &s, "op")))
	}
	var used Decoder
	f.Fuzz(func(t *testing.T, data []byte) {
		kv := meta.KeyValue{Key: keys.Segment(1, 2), Value: data}
		checkDecoder(t, &used, 1, kv)
		s, err := DecodeSegment(1, kv)
		if err != nil {
			return
		}
		files := 0
		for file := range s.AllFiles() {
			if files++; len(file.Path) > object.MaxKeyBytes+256 {
				t.Fatalf("a path of %d bytes", len(file.Path))
			}
		}
		if files > len(data) {
			t.Fatalf("%d files in %d bytes", files, len(data))
		}
	})
}

// Damage to any column of a large record is an error or another record, never a
// panic.
func TestDamagedColumns(t *testing.T) {
	const n = 100_000
	s := segment.Segment{ID: 2, State: segment.Flushed, Files: make([]segment.File, n)}
	for i := range s.Files {
		s.Files[i] = segment.File{
			Root: i % 2, Path: fmt.Sprintf("p/%d/%d", i/100, i), Kind: []string{
				segment.KindInsert,
				"new",
			}[i%2], Size: int64(i), ETag: fmt.Sprintf("%032x", i),
			Checksum: segment.Checksum{Type: "T", Value: []byte{byte(i)}}, MinTimestamp: segment.Timestamp(i),
			MaxTimestamp: segment.Timestamp(2 * i),
			Entries:      int64(i), Field: int64(i % 7), LogID: int64(n - i),
		}
	}
	rec := encodeSegment(1, &s, "op")
	data := record.Encode(rec)
	got, err := DecodeSegment(1, meta.KeyValue{Key: keys.Segment(1, 2), Value: data})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(s, got) { // cmp takes minutes
		t.Fatal("another segment was read")
	}
	for _, damage := range []func(*storagev1.Files){
		func(f *storagev1.Files) { f.Root = f.Root[:n/2] },
		func(f *storagev1.Files) { f.Kind = f.Kind[:n-1] },
		func(f *storagev1.Files) { f.Kinds = nil },
		func(f *storagev1.Files) { f.PathShared = f.PathShared[1:] },
		func(f *storagev1.Files) { f.PathTails = f.PathTails[:len(f.PathTails)-1] },
		func(f *storagev1.Files) { f.Size = append(f.Size, 1) },
		func(f *storagev1.Files) { f.Etag16 = f.Etag16[1:] },
		func(f *storagev1.Files) { f.ChecksumTypes = nil },
		func(f *storagev1.Files) { f.ChecksumType = f.ChecksumType[1:] },
		func(f *storagev1.Files) { f.ChecksumValues = f.ChecksumValues[:n] },
		func(f *storagev1.Files) { f.MinTimestamp = f.MinTimestamp[1:] },
		func(f *storagev1.Files) { f.TimestampSpan = f.TimestampSpan[1:] },
		func(f *storagev1.Files) { f.Entries = f.Entries[1:] },
		func(f *storagev1.Files) { f.Field = f.Field[1:] },
		func(f *storagev1.Files) { f.LogId = f.LogId[1:] },
	} {
		damaged := encodeSegment(1, &s, "op")
		damage(damaged.Files)
		if _, err := DecodeSegment(1, segmentKV(1, 2, damaged)); err == nil {
			t.Error("damage was not seen")
		}
	}
	s.Files = s.Files[:500]
	data = record.Encode(encodeSegment(1, &s, "op"))
	var used Decoder
	rapid.Check(t, func(t *rapid.T) { // any bytes
		damaged := slices.Clone(data)
		for range rapid.IntRange(1, 3).Draw(t, "bytes") {
			damaged[rapid.IntRange(0, len(data)-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
		}
		checkDecoder(t, &used, 1, meta.KeyValue{Key: keys.Segment(1, 2), Value: damaged})
	})
}

func BenchmarkDecodeSegment(b *testing.B) {
	benchmarkDecode(b, DecodeSegment)
}

// BenchmarkDecoder is one decoder for all records.
func BenchmarkDecoder(b *testing.B) {
	benchmarkDecode(b, new(Decoder).Decode)
}

func benchmarkDecode(b *testing.B, decode func(int64, meta.KeyValue) (segment.Segment, error)) {
	s := makeSegment(1, 450_000_000_000_001_000, 12)
	kv := segmentKV(1, s.ID, encodeSegment(1, &s, strings.Repeat("a", 24)))
	b.ReportAllocs()
	b.ReportMetric(float64(len(kv.Value)), "bytes/record")
	for b.Loop() {
		if _, err := decode(1, kv); err != nil {
			b.Fatal(err)
		}
	}
}
