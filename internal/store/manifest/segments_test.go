package manifest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// makeSegments returns n segments like those of an engine, with files files each.
func makeSegments(n, files int) []segment.Segment {
	segments := make([]segment.Segment, n)
	for i := range segments {
		id := int64(450_000_000_000+i) * 7
		s := segment.Segment{
			ID: id, Partition: 20, Channel: i % 2, Level: 1, State: segment.Flushed, Rows: 100_000, Sorted: true,
			StorageVersion: 2,
			Start:          segment.Position{Timestamp: segment.Timestamp(id << 18), Opaque: fmt.Appendf(nil, "offset-%d", i)},
			DML: segment.Position{
				Timestamp: segment.Timestamp(id<<18 + 5), Opaque: fmt.Appendf(nil, "offset-%d", i+1),
			},
		}
		for f := range files {
			etag := Sum(fmt.Appendf(nil, "%d/%d", i, f)).SHA256
			s.Files = append(s.Files, segment.File{
				Path: fmt.Sprintf("insert_log/10/20/%d/%d/%d", id, 100+f, id+int64(f)), Kind: segment.KindInsert,
				Size: int64(100_000 + 17*f + i), ETag: fmt.Sprintf("%x", etag[:16]), Entries: 100_000, Field: int64(100 + f),
				LogID:        id + int64(f),
				MinTimestamp: segment.Timestamp(id << 18), MaxTimestamp: segment.Timestamp(id<<18 + 4),
			})
		}
		segments[i] = s
	}
	return segments
}

func encode(t testing.TB, segments []segment.Segment) []byte {
	t.Helper()
	data, err := Encode(segments)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func open(t testing.TB, data []byte) *Reader {
	t.Helper()
	r, err := Open(data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestSegmentsRoundTrip(t *testing.T) {
	text := rapid.StringN(0, 20, 60)
	opaque := rapid.SliceOfN(rapid.Byte(), 0, 40)
	attributes := rapid.MapOfN(text, text, 0, 5)
	timestamp := rapid.Map(rapid.Uint64(), func(v uint64) segment.Timestamp { return segment.Timestamp(v) })
	count := rapid.Int64Min(0)
	small := rapid.IntRange(0, math.MaxInt32)
	position := rapid.Custom(func(t *rapid.T) segment.Position {
		return segment.Position{Timestamp: timestamp.Draw(t, "timestamp"), Opaque: opaque.Draw(t, "opaque")}
	})
	file := rapid.Custom(func(t *rapid.T) segment.File {
		return segment.File{
			Root: small.Draw(t, "root"), Path: text.Draw(t, "path"), Kind: text.Draw(t, "kind"), Size: count.Draw(t, "size"),
			ETag: text.Draw(t, "etag"), Checksum: segment.Checksum{Type: text.Draw(t, "type"), Value: opaque.Draw(t, "value")},
			MinTimestamp: timestamp.Draw(t, "min"), MaxTimestamp: timestamp.Draw(t, "max"), Entries: count.Draw(t, "entries"),
			Field: rapid.Int64().Draw(t, "field"), LogID: rapid.Int64().Draw(t, "log"),
			Attributes: attributes.Draw(t, "attributes"),
		}
	})
	build := rapid.Custom(func(t *rapid.T) segment.Build {
		return segment.Build{
			ID: rapid.Int64().Draw(t, "id"), Index: rapid.Int64().Draw(t, "index"), Field: rapid.Int64().Draw(t, "field"),
			Params: attributes.Draw(t, "params"), Files: rapid.SliceOfN(file, 0, 3).Draw(t, "files"),
		}
	})
	rapid.Check(t, func(t *rapid.T) {
		ids := rapid.SliceOfNDistinct(rapid.Int64Min(1), 0, 6, rapid.ID[int64]).Draw(t, "ids")
		slices.Sort(ids)
		segments := []segment.Segment{}
		for _, id := range ids {
			segments = append(segments, segment.Segment{
				ID: id, Partition: rapid.Int64().Draw(t, "partition"), Channel: small.Draw(t, "channel"),
				Level: small.Draw(t, "level"),
				State: segment.State(small.Draw(t, "state")), Rows: count.Draw(t, "rows"), Start: position.Draw(t, "start"),
				DML:            position.Draw(t, "dml"),
				StorageVersion: rapid.Int64().Draw(t, "version"), Sorted: rapid.Bool().Draw(t, "sorted"),
				CommitTimestamp: timestamp.Draw(t, "commit"), RowCeiling: timestamp.Draw(t, "ceiling"),
				Files: rapid.SliceOfN(file, 0, 4).Draw(t, "files"), Builds: rapid.SliceOfN(build, 0, 3).Draw(t, "builds"),
				EngineData: opaque.Draw(t, "engine"), Attributes: attributes.Draw(t, "attributes"),
			})
		}
		data, err := Encode(segments)
		if err != nil {
			t.Fatal(err)
		}
		r, err := Open(data)
		if err != nil {
			t.Fatal(err)
		}
		got := []segment.Segment{}
		for s, err := r.Next(); err != io.EOF; s, err = r.Next() { //nolint:errorlint // as returned
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, *s)
		}
		if diff := cmp.Diff(segments, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

func TestEmptyIsNil(t *testing.T) {
	s := segment.Segment{
		ID: 1, Start: segment.Position{Opaque: []byte{}}, EngineData: []byte{}, Attributes: map[string]string{},
		Builds: []segment.Build{{Params: map[string]string{}, Files: []segment.File{}}},
		Files:  []segment.File{{Checksum: segment.Checksum{Value: []byte{}}}},
	}
	want := segment.Segment{ID: 1, Builds: []segment.Build{{}}, Files: []segment.File{{}}}
	data := encode(t, []segment.Segment{s})
	if !bytes.Equal(data, encode(t, []segment.Segment{want})) {
		t.Error("empty and nil encode to different bytes")
	}
	if diff := cmp.Diff([]segment.Segment{want}, readAll(t, open(t, data))); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if got := readAll(t, open(t, encode(t, nil))); len(got) != 0 {
		t.Errorf("an empty manifest has %v", got)
	}
}

// TestEncodeIsDeterministic encodes equal input 50 times concurrently, from maps filled in
// different orders.
func TestEncodeIsDeterministic(t *testing.T) {
	segments := makeSegments(300, 5)
	keys := make([]string, 30)
	for i := range keys {
		keys[i] = fmt.Sprintf("key-%d", i)
	}
	withMaps := func(i int) []segment.Segment {
		own := slices.Clone(segments)
		for j := range own {
			own[j].Files = slices.Clone(own[j].Files)
			m := make(map[string]string)
			for k := range keys {
				m[keys[(k*7+i)%len(keys)]] = "v"
			}
			own[j].Attributes, own[j].Files[0].Attributes = m, maps.Clone(m)
			own[j].Builds = []segment.Build{{ID: int64(j), Params: maps.Clone(m)}}
		}
		return own
	}
	want := encode(t, withMaps(0))
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			if got, err := Encode(withMaps(i)); err != nil || !bytes.Equal(got, want) {
				t.Errorf("run %d differs, err = %v", i, err)
			}
		})
	}
	wg.Wait()
}

func TestEncodeRefuses(t *testing.T) {
	file := func(f segment.File) segment.Segment { return segment.Segment{ID: 5, Files: []segment.File{f}} }
	for name, segments := range map[string][]segment.Segment{
		"no id":              {{}},
		"negative id":        {{ID: -1}},
		"same id":            {{ID: 5}, {ID: 5}},
		"descending":         {{ID: 5}, {ID: 4}},
		"negative rows":      {{ID: 5, Rows: -1}},
		"negative level":     {{ID: 5, Level: -1}},
		"channel too large":  {{ID: 5, Channel: math.MaxInt32 + 1}},
		"negative size":      {file(segment.File{Size: -1})},
		"negative entries":   {file(segment.File{Entries: -1})},
		"negative root":      {file(segment.File{Root: -1})},
		"bad file of build":  {{ID: 5, Builds: []segment.Build{{Files: []segment.File{{Size: -1}}}}}},
		"larger than blocks": {{ID: 5, EngineData: make([]byte, maxBlockBytes)}},
	} {
		if _, err := Encode(segments); err == nil || !strings.Contains(err.Error(), "segment ") {
			t.Errorf("%s: err = %v, want one that names the segment", name, err)
		}
	}
}

// TestBlocks encodes blocks that end by number and by size, and records larger than a block.
func TestBlocks(t *testing.T) {
	segments := makeSegments(1000, 1)
	segments[300].EngineData = bytes.Repeat([]byte("large"), blockBytes)
	for i := 500; i < 520; i++ {
		segments[i].EngineData = make([]byte, blockBytes/3)
	}
	data := encode(t, segments)
	if got := readAll(t, open(t, data)); !reflect.DeepEqual(got, segments) { // cmp.Diff is slow for large data
		t.Fatal("the segments read differ from those written")
	}
	c, err := openContainer(data)
	if err != nil {
		t.Fatal(err)
	}
	for i, b := range c.blocks {
		raw, err := b.decompress(nil)
		if err != nil {
			t.Fatal(err)
		}
		if b.records > blockRecords || (len(raw) > blockBytes && b.records > 1) {
			t.Errorf("block %d has %d records, %d bytes", i, b.records, len(raw))
		}
	}
}

func TestSkip(t *testing.T) {
	const n = 1000
	segments := makeSegments(n, 1)
	data := encode(t, segments)
	for _, skip := range []int{0, 1, 127, 128, 129, 256, 500, 999, 1000, 1001, 5000} {
		for _, before := range []int{0, 1, 127, 128, 200} {
			r := open(t, data)
			if r.Count() != n {
				t.Fatalf("Count %d, want %d", r.Count(), n)
			}
			for range before {
				if _, err := r.Next(); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Skip(skip); err != nil {
				t.Fatalf("Skip(%d) after %d: %v", skip, before, err)
			}
			got, want := readAll(t, r), segments[min(before+skip, n):]
			if len(got) != len(want) || (len(want) > 0 && !reflect.DeepEqual(got, want)) {
				t.Fatalf("after %d and Skip(%d): %d segments, want %d; or others", before, skip, len(got), len(want))
			}
			if _, err := r.Next(); err != io.EOF { //nolint:errorlint // as documented
				t.Errorf("at the end: err = %v, want io.EOF", err)
			}
		}
	}
}

// TestSkipDoesNotDecompress skips a block that is not decompressible.
func TestSkipDoesNotDecompress(t *testing.T) {
	segments := makeSegments(300, 1)
	c, err := openContainer(encode(t, segments))
	if err != nil {
		t.Fatal(err)
	}
	clear(c.blocks[0].data) // the input's own memory
	r := &Reader{datums: &datumReader{
		container: c, schema: segmentSchema.schema, shape: segmentSchema.shape,
		avro: open(t, encode(t, nil)).datums.avro,
	}}
	if err := r.Skip(blockRecords); err != nil {
		t.Fatal(err)
	}
	if s, err := r.Next(); err != nil || s.ID != segments[blockRecords].ID {
		t.Errorf("got %v, err = %v", s, err)
	}
}

// read reads a manifest to its end.
func read(data []byte) error {
	r, err := Open(data)
	for err == nil {
		_, err = r.Next()
	}
	if err == io.EOF { //nolint:errorlint // as documented
		return nil
	}
	return err
}

func TestTruncatedManifest(t *testing.T) {
	for name, data := range map[string][]byte{
		"golden": golden(t, "manifest-0.avro"),
		"blocks": encode(t, makeSegments(300, 1)), "empty": encode(t, nil),
	} {
		if err := read(data); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for i := range data {
			if err := read(data[:i:i]); !errors.Is(err, ErrCorrupt) {
				t.Errorf("%s: first %d of %d bytes: err = %v, want ErrCorrupt", name, i, len(data), err)
			}
		}
		if err := read(append(slices.Clone(data), 0)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: an additional byte: err = %v, want ErrCorrupt", name, err)
		}
	}
}

// TestTruncatedDatum truncates a record within a valid frame.
func TestTruncatedDatum(t *testing.T) {
	raw := rawDatums(t, golden(t, "manifest-0.avro"))
	if err := read(frame(segmentSchema.text, 4, raw)); err != nil {
		t.Fatalf("whole: %v", err)
	}
	for i := range raw {
		if err := read(frame(segmentSchema.text, 4, raw[:i])); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d of %d bytes: err = %v, want ErrCorrupt", i, len(raw), err)
		}
	}
	for _, count := range []int{1, 3, 5} {
		if err := read(frame(segmentSchema.text, count, raw)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("4 records declared as %d: err = %v, want ErrCorrupt", count, err)
		}
	}
}

func rawDatums(t testing.TB, data []byte) []byte {
	t.Helper()
	c, err := openContainer(data)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := c.blocks[0].decompress(nil)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// frame writes raw bytes into a valid file of one block.
func frame(schema string, records int, raw []byte) []byte {
	w := newContainer()
	w.records = records
	w.flush(raw)
	return w.finish(schema)
}

func long(n int64) string { return string(binary.AppendVarint(nil, n)) }

// TestHostileFrames reads files with an invalid frame.
func TestHostileFrames(t *testing.T) {
	good := encode(t, makeSegments(3, 1))
	c, err := openContainer(good)
	if err != nil {
		t.Fatal(err)
	}
	entry := func(k, v string) string { return long(int64(len(k))) + k + long(int64(len(v))) + v }
	keys := []string{entry(keyCodec, ocfCodec), entry(keySchema, c.schema), entry(keyFormat, "1"), entry(keyRecords, "3")}
	sync := strings.Repeat("S", syncSize)
	header := func(map_ string) string { return ocfMagic + map_ + sync }
	normal := header(long(4) + strings.Join(keys, "") + long(0))
	payload := string(c.blocks[0].data)
	block := long(3) + long(int64(len(payload))) + payload + sync

	for name, data := range map[string]string{
		"as usual":     normal + block,
		"sized map":    header(long(-4)+long(1)+strings.Join(keys, "")+long(0)) + block,
		"map in parts": header(long(2)+keys[3]+keys[2]+long(2)+keys[1]+keys[0]+long(0)) + block,
		"unknown key":  header(long(5)+strings.Join(keys, "")+entry("user.x", "y")+long(0)) + block,
	} {
		if err := read([]byte(data)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	with := func(i int, e string) string {
		other := slices.Clone(keys)
		other[i] = e
		return header(long(4) + strings.Join(other, "") + long(0))
	}
	bomb := string(zstdEncoder.EncodeAll(make([]byte, maxBlockBytes+1), nil))
	for name, data := range map[string]string{
		"other magic":        "Obj\x02" + normal[4:] + block,
		"2^40 keys":          header(long(1<<40)) + block,
		"-2^63 keys":         header(long(math.MinInt64)+long(1)) + block,
		"key of 2^40 bytes":  header(long(1)+long(1<<40)) + block,
		"negative key":       header(long(1)+long(-1)) + block,
		"key twice":          header(long(5)+strings.Join(keys, "")+keys[0]+long(0)) + block,
		"no schema":          header(long(3)+keys[0]+keys[2]+keys[3]+long(0)) + block,
		"no codec":           with(0, entry("x", ocfCodec)) + block,
		"codec null":         with(0, entry(keyCodec, "null")) + block,
		"no format":          with(2, entry("x", "1")) + block,
		"format 0":           with(2, entry(keyFormat, "0")) + block,
		"fewer records":      with(3, entry(keyRecords, "2")) + block,
		"more records":       with(3, entry(keyRecords, "4")) + block,
		"no block":           normal,
		"block twice":        normal + block + block,
		"no records":         normal + long(0) + block[1:],
		"negative records":   normal + long(-3) + block[1:],
		"2^62 records":       normal + long(1<<62) + block[1:],
		"negative size":      normal + long(3) + long(-1) + payload + sync,
		"-2^63 bytes":        normal + long(3) + long(math.MinInt64) + payload + sync,
		"8 GiB":              normal + long(3) + long(8<<30) + payload + sync,
		"one byte too many":  normal + long(3) + long(int64(len(payload)+1)) + payload + sync,
		"other sync marker":  normal + block[:len(block)-1] + "X",
		"varint without end": normal + strings.Repeat("\xff", 11),
		"not zstd":           normal + long(3) + long(4) + "abcd" + sync,
		"nothing compressed": normal + long(3) + long(0) + sync,
		"bomb":               normal + long(3) + long(int64(len(bomb))) + bomb + sync,
	} {
		if err := read([]byte(data)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}
	var newer *NewerFormatError
	if err := read([]byte(with(2, entry(keyFormat, "2")) + block)); !errors.As(err, &newer) || newer.Found != 2 ||
		newer.Supported != 1 {
		t.Errorf("format 2: err = %v, want a NewerFormatError of 2 and 1", err)
	}
}

// TestHostileDatums reads valid frames with invalid values.
func TestHostileDatums(t *testing.T) {
	// A segment up to its files, and the rest of it.
	head := long(1) + strings.Repeat(long(0), 5) + strings.Repeat(long(0), 4) + long(0) + "\x00" + long(0) + long(0)
	tail := long(0) + long(0) + long(0) + long(0)
	file := long(0) + long(1) + "p" + strings.Repeat(long(0), 11)
	for name, raw := range map[string]string{
		"no files":        head + tail,
		"one file":        head + long(1) + file + tail,
		"files in parts":  head + long(1) + file + long(1) + file + tail,
		"files with size": head + long(-1) + long(int64(len(file))) + file + tail,
	} {
		if err := read(frame(segmentSchema.text, 1, []byte(raw))); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, raw := range map[string]string{
		"10^8 files":         head + long(100_000_000),
		"2^62 files":         head + long(1<<62) + file + tail,
		"-2^63 files":        head + long(math.MinInt64) + long(1) + file + tail,
		"size too small":     head + long(-1) + long(int64(len(file)-1)) + file + tail,
		"size too large":     head + long(-1) + long(int64(len(file)+1)) + file + tail,
		"negative size":      head + long(-1) + long(-1) + file + tail,
		"path of 2^40 bytes": head + long(1) + long(0) + long(1<<40) + file[1:] + tail,
		"negative path":      head + long(1) + long(0) + long(-1) + file[1:] + tail,
		"root of 2^32":       head + long(1) + long(1<<32) + file[1:] + tail,
		"bool of 2":          head[:11] + "\x02" + head[12:] + tail,
		"id 0":               long(0) + head[1:] + tail,
		"negative rows":      head[:5] + long(-1) + head[6:] + tail,
	} {
		if err := read(frame(segmentSchema.text, 1, []byte(raw))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}
	twice := frame(segmentSchema.text, 2, []byte(head+tail+head+tail))
	if err := read(twice); !errors.Is(err, ErrCorrupt) {
		t.Errorf("duplicate segment: err = %v, want ErrCorrupt", err)
	}
}

// TestOtherSchemas reads files written with more and with fewer fields.
func TestOtherSchemas(t *testing.T) {
	segments := goldenSegments()[1:2]
	raw := rawDatums(t, encode(t, segments))
	added := strings.Replace(segmentSchema.text, `"fields":[`, `"fields":[
		{"name":"new1","type":{"type":"map","values":{"type":"array","items":["null","string"]}}},
		{"name":"new2","type":["null",{"type":"enum","name":"E","symbols":["A","B"]},{"type":"fixed","name":"X","size":3}]},
		{"name":"new3","type":"double"},`, 1)
	values := long(1) + long(1) + "k" + long(2) + long(1) + long(1) + "s" + long(0) + long(0) + long(0) + long(2) +
		"xyz" + "12345678"
	if diff := cmp.Diff(segments, readAll(t, open(t, frame(added, 1, append([]byte(values), raw...))))); diff != "" {
		t.Errorf("with unknown fields (-want +got):\n%s", diff)
	}

	const position = `{"type":"record","name":"Position","fields":[{"name":"timestamp","type":"long"}]}`
	older := `{"type":"record","name":"Segment","namespace":"snapshotd.v1","fields":[
		{"name":"id","type":"int"},{"name":"start","type":` + position + `},{"name":"dml","type":"Position"}]}`
	r := open(t, frame(older, 2, []byte(long(5)+long(6)+long(7)+long(8)+long(0)+long(-1))))
	want := []segment.Segment{
		{ID: 5, Start: segment.Position{Timestamp: 6}, DML: segment.Position{Timestamp: 7}},
		{ID: 8, DML: segment.Position{Timestamp: math.MaxUint64}},
	}
	if diff := cmp.Diff(want, readAll(t, r)); diff != "" {
		t.Errorf("with few fields (-want +got):\n%s", diff)
	}

	field := func(typ string) string {
		return strings.Replace(segmentSchema.text, `"fields":[`, `"fields":[{"name":"new","type":`+typ+`},`, 1)
	}
	wide := `"long"`
	for i := range 40 {
		wide = fmt.Sprintf(`{"type":"record","name":"W%d","fields":[{"name":"a","type":%s},{"name":"b","type":%s}]}`, i, wide,
			map[bool]string{true: `"long"`, false: fmt.Sprintf(`"W%d"`, i-1)}[i == 0])
	}
	for name, schema := range map[string]string{
		"nothing":        "",
		"not JSON":       "{",
		"not a record":   `"long"`,
		"another record": refsSchema.text,
		"id a string":    strings.Replace(segmentSchema.text, `"id","type":"long"`, `"id","type":"string"`, 1),
		"recursive":      field(`{"type":"record","name":"R","fields":[{"name":"r","type":["null","R"]}]}`),
		"array of null":  field(`{"type":"array","items":"null"}`),
		"array of empty": field(`{"type":"array","items":{"type":"record","name":"Z","fields":[]}}`),
		"exponential":    field(wide),
		"deep":           field(strings.Repeat(`{"type":"array","items":`, 5000) + `"long"` + strings.Repeat("}", 5000)),
		"deeper":         strings.Repeat("[", 100_000),
		"unknown type":   field(`"decimal128"`),
		"too large":      segmentSchema.text + strings.Repeat(" ", maxHeaderSchema),
	} {
		if err := read(frame(schema, 1, append([]byte(long(0)), raw...))); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}
}

func TestManifestFileOpen(t *testing.T) {
	data := encode(t, makeSegments(3, 1))
	file := ManifestFile{File: "manifest-4.avro", Digest: Sum(data), Segments: 3}
	if _, err := file.Open(data); err != nil {
		t.Fatal(err)
	}
	other := slices.Clone(data)
	other[len(other)/2] ^= 4
	if _, err := file.Open(other); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "SHA-256") {
		t.Errorf("a flipped bit: err = %v, want one about the digest", err)
	}
	file.Segments = 4
	if _, err := file.Open(data); !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "manifest-4.avro") {
		t.Errorf("too few segments: err = %v, want one that names the file", err)
	}
}

// TestFlippedBits reads altered files without a check of their digests. The result is a
// manifest or ErrCorrupt.
func TestFlippedBits(t *testing.T) {
	raw := rawDatums(t, golden(t, "manifest-0.avro"))
	for i := range raw {
		for bit := range 8 {
			raw[i] ^= 1 << bit
			if err := read(frame(segmentSchema.text, 4, raw)); err != nil && !errors.Is(err, ErrCorrupt) {
				t.Errorf("byte %d, bit %d: err = %v, want ErrCorrupt", i, bit, err)
			}
			raw[i] ^= 1 << bit
		}
	}
}

func benchmarkSegments() []segment.Segment { return makeSegments(5000, 12) }

func BenchmarkEncode5000x12(b *testing.B) {
	segments := benchmarkSegments()
	b.ReportAllocs()
	var size int
	for b.Loop() {
		size = len(encode(b, segments))
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(segments)), "ns/segment")
	b.ReportMetric(float64(size)/float64(len(segments)), "bytes/segment")
}

// BenchmarkEncodeDatums5000x12 omits the compression.
func BenchmarkEncodeDatums5000x12(b *testing.B) {
	segments := benchmarkSegments()
	b.ReportAllocs()
	e := segmentEncoders.Get().(*segmentEncoder)
	size := 0
	for b.Loop() {
		w := newContainer()
		size = 0
		for i := range segments {
			w.raw, w.records = w.raw[:0], 0
			if err := e.append(w, &segments[i]); err != nil {
				b.Fatal(err)
			}
			size += len(w.raw)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(segments)), "ns/segment")
	b.ReportMetric(float64(size)/float64(len(segments)), "bytes/segment")
}

func BenchmarkDecode5000x12(b *testing.B) {
	segments := benchmarkSegments()
	data := encode(b, segments)
	b.ReportAllocs()
	for b.Loop() {
		if err := read(data); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(len(segments)), "ns/segment")
}

func TestWriter(t *testing.T) {
	segments := makeSegments(300, 3)
	segments[7].Builds = []segment.Build{{ID: 1, Files: segments[0].Files}, {ID: 2}, {ID: 3, Files: segments[1].Files}}
	segments[8].Builds = []segment.Build{{ID: 4, Params: map[string]string{"a": "b"}}}
	want := encode(t, segments)
	w := NewWriter()
	for i := range segments {
		s := segments[i]
		s.Files = slices.Clone(s.Files)
		if err := w.Add(&s); err != nil {
			t.Fatal(err)
		}
		clear(s.Files) // not retained
	}
	got := w.Finish()
	w.Close()
	w.Close()
	if !bytes.Equal(got, want) {
		t.Error("the writer and Encode make different manifests")
	}
	r, err := Open(got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(segments, readAll(t, r)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}

	bad := NewWriter()
	if err := bad.Add(&segment.Segment{ID: 5}); err != nil {
		t.Fatal(err)
	}
	if err := bad.Add(&segment.Segment{ID: 5}); err == nil {
		t.Error("a duplicate id was accepted")
	}
	bad.Close()
	if again := encode(t, segments); !bytes.Equal(again, want) { // with reused memory
		t.Error("another manifest after an abandoned writer")
	}
	if !bytes.Equal(got, want) {
		t.Error("a finished manifest was changed")
	}
}
