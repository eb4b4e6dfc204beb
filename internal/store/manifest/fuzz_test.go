package manifest

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// addSeeds adds the golden file of that name, and parts of it.
func addSeeds(f *testing.F, name string) {
	data, err := os.ReadFile(filepath.Join(goldenDir, name))
	if err != nil {
		f.Fatal(err)
	}
	for _, n := range []int{0, 4, len(data) / 3, len(data) - 1, len(data)} {
		f.Add(data[:n])
	}
}

// FuzzOpenManifest reads anything. What is read can be written and read again.
func FuzzOpenManifest(f *testing.F) {
	addSeeds(f, "manifest-0.avro")
	small, err := Encode(makeSegments(3, 2))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(small)
	f.Add(frame(`{"type":"record","name":"Segment","namespace":"snapshotd.v1","fields":[{"name":"id","type":"long"}]}`, 1, []byte{2}))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Open(data)
		if err != nil {
			checkFuzzed(t, err)
			return
		}
		n := 0
		for {
			s, err := r.Next()
			if err == io.EOF { //nolint:errorlint // as documented
				break
			}
			if err != nil {
				checkFuzzed(t, err)
				return
			}
			if s.ID <= 0 {
				t.Errorf("segment %d", s.ID)
			}
			n++
		}
		if n != r.Count() {
			t.Errorf("%d segments, Count says %d", n, r.Count())
		}
	})
}

// FuzzDecodeDatums reads anything as the records of a sound file, which the
// checks of the frame would else keep out.
func FuzzDecodeDatums(f *testing.F) {
	f.Add(4, rawDatums(f, golden(f, "manifest-0.avro")))
	f.Fuzz(func(t *testing.T, records int, raw []byte) {
		if records < 1 || records > 1000 || len(raw) > 1<<20 {
			t.Skip()
		}
		if err := read(frame(segmentSchema.text, records, raw)); err != nil {
			checkFuzzed(t, err)
		}
	})
}

// FuzzSchema reads records by any schema.
func FuzzSchema(f *testing.F) {
	f.Add(segmentSchema.text, rawDatums(f, golden(f, "manifest-0.avro")))
	f.Add(`{"type":"record","name":"Segment","namespace":"snapshotd.v1","fields":[{"name":"id","type":"int"}]}`, []byte{2, 4, 6, 8})
	f.Fuzz(func(t *testing.T, schema string, raw []byte) {
		if len(raw) > 1<<20 {
			t.Skip()
		}
		if err := read(frame(schema, 4, raw)); err != nil {
			checkFuzzed(t, err)
		}
	})
}

func FuzzDecodeRefs(f *testing.F) {
	addSeeds(f, "refs.avro")
	f.Fuzz(func(t *testing.T, data []byte) {
		_, err := DecodeRefs(data, RefsFile{Digest: Sum(data), Segments: 4, Builds: 2, Files: 4})
		if err != nil {
			checkFuzzed(t, err)
		}
	})
}

// FuzzDecodeMetadata decodes anything. What is decoded encodes to something
// that decodes again.
func FuzzDecodeMetadata(f *testing.F) {
	addSeeds(f, "metadata.json")
	f.Add([]byte(`{"format_version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := DecodeMetadata(data)
		if err != nil {
			checkFuzzed(t, err)
			return
		}
		again, err := EncodeMetadata(m)
		if err != nil {
			t.Fatalf("encode what was decoded: %v", err)
		}
		if _, err := DecodeMetadata(again); err != nil {
			t.Fatalf("decode it again: %v", err)
		}
	})
}

func checkFuzzed(t *testing.T, err error) {
	t.Helper()
	if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrNewerFormat) {
		t.Errorf("err = %v, want ErrCorrupt", err)
	}
}
