package manifest

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/test/allocated"
)

// The memory that a reader may allocate: fixedBytes once, and a factor for each decompressed
// byte. An empty item of an array takes two bytes in a file, or five as a build, and two
// structs when it is read.
const (
	fixedBytes   = 1 << 20
	perByte      = 100
	perByteJSON  = 300
	maxFuzzBytes = 1 << 20
)

// addSeeds adds the golden file with the name, and parts of it.
func addSeeds(f *testing.F, name string) {
	data, err := os.ReadFile(filepath.Join(goldenDir, name))
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range []int{0, 4, len(data) / 3, len(data) - 1, len(data)} {
		f.Add(data[:n])
	}
}

// FuzzOpenManifest reads arbitrary bytes. Valid segments can be written and read again.
func FuzzOpenManifest(f *testing.F) {
	addSeeds(f, "manifest-0.avro")
	small, err := Encode(makeSegments(3, 2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Add(frame(`{"type":"record","name":"Segment","namespace":"snapshotd.v1","fields":[{"name":"id","type":"long"}]}`, 1,
		[]byte{2}))
	f.Fuzz(func(t *testing.T, data []byte) {
		checkManifest(t, data)
	})
}

// checkManifest reads a manifest in all ways, within bounds, and writes it again if it is
// valid.
func checkManifest(t *testing.T, data []byte) {
	t.Helper()
	var segments []segment.Segment
	var err error
	// One block at a time is decompressed, in reused memory.
	room := uint64(fixedBytes + perByte*(len(data)+decompressed(data)))
	if took := allocated.Bytes(func() { segments, err = readWhole(data) }); took > room {
		t.Errorf("%d bytes of a manifest took %d bytes of memory, at most %d", len(data), took, room)
	}
	if err != nil {
		checkFuzzed(t, err)
		return
	}
	for i := range segments {
		if segments[i].ID <= 0 || i > 0 && segments[i].ID <= segments[i-1].ID {
			t.Fatalf("segment %d at %d", segments[i].ID, i)
		}
	}
	r, err := Open(data)
	if err != nil || r.Count() != len(segments) {
		t.Fatalf("%d segments, Count returned %d, %v", len(segments), r.Count(), err)
	}
	if n := len(segments) / 2; n > 0 {
		if err := r.Skip(n); err != nil {
			t.Fatal(err)
		}
		s, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(&segments[n], s) { // cmp is slow
			t.Errorf("segment %d after skipping the previous ones (-want +got):\n%s", n, cmp.Diff(&segments[n], s))
		}
	}
	written, err := Encode(segments)
	if err != nil {
		t.Fatalf("write the segments: %v", err)
	}
	again, err := readWhole(written)
	if err != nil {
		t.Fatalf("read them again: %v", err)
	}
	if !reflect.DeepEqual(segments, again) {
		t.Errorf("(-read +written and read):\n%s", cmp.Diff(segments, again))
	}
}

// readWhole returns all segments of a manifest.
func readWhole(data []byte) ([]segment.Segment, error) {
	r, err := Open(data)
	if err != nil {
		return nil, err
	}
	var all []segment.Segment
	for {
		s, err := r.Next()
		if err == io.EOF { //nolint:errorlint // as documented
			return all, nil
		}
		if err != nil {
			return nil, err
		}
		all = append(all, *s)
	}
}

// decompressed returns the size of the blocks of a file up to the first invalid one, which may
// take the memory of a block as well.
func decompressed(data []byte) int {
	c, err := openContainer(data)
	if err != nil {
		return 0
	}
	n := 0
	for _, b := range c.blocks {
		raw, err := b.decompress(nil)
		if err != nil {
			return n + maxBlockBytes/perByte
		}
		n += len(raw)
	}
	return n
}

// FuzzDecodeDatums reads arbitrary bytes as the records of a valid file, since the checks of
// the frame would refuse most of them. An equal schema with other text, which takes another
// path through the reader, has the same result.
func FuzzDecodeDatums(f *testing.F) {
	f.Add(4, rawDatums(f, golden(f, "manifest-0.avro")))
	// A record with files that have a byte per field, and one with builds.
	f.Add(1, slices.Concat([]byte{2}, make([]byte, 13), binary.AppendVarint(nil, 500), make([]byte, 500*13+4)))
	f.Add(1, slices.Concat([]byte{2}, make([]byte, 14), binary.AppendVarint(nil, 500), make([]byte, 500*5+3)))
	f.Add(1, slices.Concat([]byte{2}, make([]byte, 16), binary.AppendVarint(nil, 500), make([]byte, 500*2+1)))
	// Counts and sizes beyond the data.
	for _, n := range []int64{1 << 20, 1 << 40, 1<<63 - 1, -1 << 63, -(1 << 40)} {
		f.Add(1, slices.Concat([]byte{2}, make([]byte, 13), binary.AppendVarint(nil, n), make([]byte, 100)))
		f.Add(1, slices.Concat([]byte{2}, make([]byte, 6), binary.AppendVarint(nil, n), make([]byte, 100)))
	}
	f.Fuzz(func(t *testing.T, records int, raw []byte) {
		if records < 1 || records > 1000 || len(raw) > maxFuzzBytes {
			return
		}
		checkManifest(t, frame(segmentSchema.text, records, raw))
		plain, errPlain := readWhole(frame(segmentSchema.text, records, raw))
		spaced, errSpaced := readWhole(frame(strings.Replace(segmentSchema.text, ",", " ,", 1), records, raw))
		if (errPlain == nil) != (errSpaced == nil) {
			t.Fatalf("by the schema: %v, by the schema with a space: %v", errPlain, errSpaced)
		}
		if !reflect.DeepEqual(plain, spaced) {
			t.Errorf("(-by the schema +by the schema with a space):\n%s", cmp.Diff(plain, spaced))
		}
	})
}

// FuzzSchema reads records by an arbitrary schema.
func FuzzSchema(f *testing.F) {
	f.Add(segmentSchema.text, rawDatums(f, golden(f, "manifest-0.avro")))
	f.Add(`{"type":"record","name":"Segment","namespace":"snapshotd.v1","fields":[{"name":"id","type":"int"}]}`,
		[]byte{2, 4, 6, 8})
	f.Fuzz(func(t *testing.T, schema string, raw []byte) {
		if len(raw) > maxFuzzBytes {
			return
		}
		if err := read(frame(schema, 4, raw)); err != nil {
			checkFuzzed(t, err)
		}
	})
}

// FuzzDecodeRefs reads arbitrary bytes as references with arbitrary counts. Decoded ids can be
// encoded again with the same counts.
func FuzzDecodeRefs(f *testing.F) {
	data := golden(f, "refs.avro")
	for _, n := range []int{0, 4, len(data) / 3, len(data) - 1, len(data)} {
		f.Add(data[:n], int64(4), int64(2), int64(4))
	}
	f.Add(data, int64(1)<<62, int64(1)<<62, int64(-1))
	f.Fuzz(func(t *testing.T, data []byte, segments, builds, files int64) {
		checkRefs(t, data, RefsFile{Digest: Sum(data), Segments: segments, Builds: builds, Files: files})
	})
}

// FuzzRefsDatums reads arbitrary bytes as the records of a valid references file, with the
// right counts or others.
func FuzzRefsDatums(f *testing.F) {
	f.Add(3, rawDatums(f, golden(f, "refs.avro")), int64(4), int64(2), int64(4))
	for _, n := range []int64{1, 65536, 65537, 1 << 40, -1, -1 << 63} {
		record := slices.Concat([]byte("\x0esegment"), binary.AppendVarint(nil, n), []byte{2, 4, 1, 1})
		f.Add(1, record, n, int64(0), int64(0))
	}
	f.Add(1, slices.Concat([]byte("\x08file\x06"), binary.AppendVarint(nil, -3), []byte{4, 1, 1}), int64(0), int64(0),
		int64(3))
	f.Fuzz(func(t *testing.T, records int, raw []byte, segments, builds, files int64) {
		if records < 1 || records > 1000 || len(raw) > maxFuzzBytes {
			return
		}
		data := frame(refsSchema.text, records, raw)
		checkRefs(t, data, RefsFile{Digest: Sum(data), Segments: segments, Builds: builds, Files: files})
	})
}

func checkRefs(t *testing.T, data []byte, want RefsFile) {
	t.Helper()
	var refs *Refs
	var err error
	room := uint64(fixedBytes + perByte*(len(data)+decompressed(data)))
	if took := allocated.Bytes(func() { refs, err = DecodeRefs(data, want) }); took > room {
		t.Errorf("%d bytes of references took %d bytes of memory, at most %d", len(data), took, room)
	}
	if err != nil {
		checkFuzzed(t, err)
		return
	}
	if len(refs.Segments) != int(want.Segments) || len(refs.Builds) != int(want.Builds) ||
		len(refs.Files) != int(want.Files) {
		t.Fatalf("got %d, %d and %d ids, want %d, %d and %d",
			len(refs.Segments), len(refs.Builds), len(refs.Files), want.Segments, want.Builds, want.Files)
	}
	for name, sorted := range map[string]bool{
		"segments": ascends(refs.Segments), "builds": ascends(refs.Builds), "files": ascends(refs.Files),
	} {
		if !sorted {
			t.Errorf("the ids of %s are not ascending", name)
		}
	}
	written, err := EncodeRefs(refs)
	if err != nil {
		t.Fatalf("write the segments: %v", err)
	}
	want.Digest = Sum(written)
	again, err := DecodeRefs(written, want)
	if err != nil {
		t.Fatalf("read them again: %v", err)
	}
	if diff := cmp.Diff(refs, again, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-read +written and read):\n%s", diff)
	}
}

func ascends[T int64 | uint64](ids []T) bool {
	for i := 1; i < len(ids); i++ {
		if ids[i] <= ids[i-1] {
			return false
		}
	}
	return true
}

// FuzzDecodeMetadata decodes arbitrary bytes. Decoded metadata encode to bytes that decode to
// the same metadata, which encode to the same bytes.
func FuzzDecodeMetadata(f *testing.F) {
	addSeeds(f, "metadata.json")
	f.Add([]byte(`{"format_version":1}`))
	f.Add([]byte(`{"format_version":2}`))
	f.Add([]byte(`{"format_version":1,"partitions":[` + strings.Repeat(`{},`, 20_000) + `{}]}`))
	f.Add([]byte(strings.Repeat(`[`, 100_000)))
	f.Add([]byte(`{"format_version":1,"snapshot":{"id":"1","create_time":"0000-01-01T00:00:00+23:59"},` +
		`"collection":{"id":"1"},"refs":{"file":"refs.avro"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var m *Metadata
		var err error
		room := uint64(fixedBytes + perByteJSON*len(data))
		if took := allocated.Bytes(func() { m, err = DecodeMetadata(data) }); took > room {
			t.Errorf("%d bytes of metadata took %d bytes of memory, at most %d", len(data), took, room)
		}
		if err != nil {
			checkFuzzed(t, err)
			return
		}
		written, err := EncodeMetadata(m)
		if err != nil {
			t.Fatalf("encode the metadata: %v", err)
		}
		again, err := DecodeMetadata(written)
		if err != nil {
			t.Fatalf("decode them again: %v", err)
		}
		if diff := cmp.Diff(m, again, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("(-decoded +encoded and decoded):\n%s", diff)
		}
		if twice, err := EncodeMetadata(again); err != nil || string(twice) != string(written) {
			t.Errorf("equal metadata encode to other bytes, err = %v", err)
		}
	})
}

// FuzzParseKey parses arbitrary keys. A key of a snapshot's file equals the key of its parts,
// and each valid file name makes a valid key.
func FuzzParseKey(f *testing.F) {
	for _, key := range []string{
		"", MetadataKey(1, 2), ManifestKey(1<<63-1, 1<<63-1, 1<<31), RefsKey(3, 4), Dir(1, 2),
		"snapshots/1/2/manifest-01.avro", "snapshots/1/2/manifest--1.avro",
		"snapshots/01/2/metadata.json", "snapshots/0/2/refs.avro", "snapshots/1/+2/refs.avro", "other/1/2/refs.avro",
		"snapshots/1/2/refs.avro/", "snapshots/identity.json",
		"snapshots/1/2/manifest-9223372036854775808.avro", "snapshots/1/2/manifest-1.avro.avro", "snapshots/1/2/manifest-1",
	} {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) {
		collection, snapshot, ok := ParseKey(key)
		if !ok {
			if collection != 0 || snapshot != 0 {
				t.Errorf("%q: %d, %d, false", key, collection, snapshot)
			}
		} else if name, under := strings.CutPrefix(key, Dir(collection, snapshot)); !under || !IsFileName(name) {
			t.Errorf("%q is outside the prefix of its snapshot %d/%d", key, collection, snapshot)
		}
		if c, s, ok := ParseKey(Dir(7, 8) + key); ok != IsFileName(key) || ok && (c != 7 || s != 8) {
			t.Errorf("%q as the name of a file: %d, %d, %v", key, c, s, ok)
		}
	})
}

func checkFuzzed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewerFormat) {
		t.Errorf("err = %v, want ErrCorrupt", err)
	}
}
