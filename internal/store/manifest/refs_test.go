package manifest

import (
	"encoding/binary"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"pgregory.net/rapid"
)

// describeRefs returns the RefsFile of data with refs.
func describeRefs(data []byte, refs *Refs) RefsFile {
	return RefsFile{
		File: RefsName, Digest: Sum(data),
		Segments: int64(len(refs.Segments)), Builds: int64(len(refs.Builds)), Files: int64(len(refs.Files)),
	}
}

func TestRefsRoundTrip(t *testing.T) {
	ids := rapid.Custom(func(t *rapid.T) []int64 {
		ids := rapid.SliceOfNDistinct(rapid.Int64Min(1), 0, 20, rapid.ID[int64]).Draw(t, "ids")
		slices.Sort(ids)
		return ids
	})
	rapid.Check(t, func(t *rapid.T) {
		files := rapid.SliceOfNDistinct(rapid.Uint64(), 0, 20, rapid.ID[uint64]).Draw(t, "files")
		slices.Sort(files)
		want := &Refs{Segments: ids.Draw(t, "segments"), Builds: ids.Draw(t, "builds"), Files: files}
		data, err := EncodeRefs(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeRefs(data, describeRefs(data, want))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("(-want +got):\n%s", diff)
		}
	})
}

// TestRefsChunks encodes runs that end before, at and after the end of a chunk.
func TestRefsChunks(t *testing.T) {
	for _, n := range []int{maxRefsChunk - 1, maxRefsChunk, maxRefsChunk + 1, 3*maxRefsChunk + 7} {
		want := &Refs{Segments: make([]int64, n), Files: make([]uint64, n)}
		for i := range n {
			want.Segments[i] = int64(i)*3 + 1
			want.Files[i] = uint64(i) * (math.MaxUint64 / uint64(n))
		}
		data, err := EncodeRefs(want)
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeRefs(data, describeRefs(data, want))
		if err != nil {
			t.Fatalf("%d ids: %v", n, err)
		}
		if !slices.Equal(got.Segments, want.Segments) || !slices.Equal(got.Files, want.Files) {
			t.Errorf("%d ids: other ids decoded", n)
		}
		again, err := EncodeRefs(want)
		if err != nil || !slices.Equal(again, data) {
			t.Errorf("%d ids: two encodings differ; err = %v", n, err)
		}
	}
}

func TestEncodeRefsRefuses(t *testing.T) {
	boundary := make([]int64, maxRefsChunk+1)
	for i := range boundary {
		boundary[i] = int64(i + 1)
	}
	boundary[maxRefsChunk] = maxRefsChunk
	for name, refs := range map[string]*Refs{
		"id 0":                {Segments: []int64{0}},
		"negative":            {Builds: []int64{-1, 1}},
		"twice":               {Segments: []int64{1, 1}},
		"descending":          {Builds: []int64{2, 1}},
		"unsigned descending": {Files: []uint64{math.MaxUint64, 0}},
		"between chunks":      {Segments: boundary},
	} {
		if _, err := EncodeRefs(refs); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestDecodeRefsRefuses(t *testing.T) {
	good := golden(t, "refs.avro")
	want := describeRefs(good, goldenRefs())
	for i := range good {
		cut := want
		cut.Digest = Sum(good[:i]) // so that the decoder reads it
		if _, err := DecodeRefs(good[:i:i], cut); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d of %d bytes: err = %v, want ErrCorrupt", i, len(good), err)
		}
	}
	if _, err := DecodeRefs(good[:10], want); !errors.Is(err, ErrCorrupt) ||
		!strings.Contains(err.Error(), "10 bytes, want") {
		t.Errorf("err = %v, want one about the digest", err)
	}
	for name, change := range map[string]func(*RefsFile){
		"segments more": func(f *RefsFile) { f.Segments++ },
		"segments less": func(f *RefsFile) { f.Segments-- },
		"builds more":   func(f *RefsFile) { f.Builds++ },
		"builds less":   func(f *RefsFile) { f.Builds-- },
		"files more":    func(f *RefsFile) { f.Files++ },
		"files less":    func(f *RefsFile) { f.Files = 0 },
	} {
		other := want
		change(&other)
		if _, err := DecodeRefs(good, other); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}

	record := func(kind string, count, first int64, gaps ...uint64) string {
		var deltas []byte
		for _, g := range gaps {
			deltas = binary.AppendUvarint(deltas, g)
		}
		return long(int64(len(kind))) + kind + long(count) + long(first) + long(int64(len(deltas))) + string(deltas)
	}
	decode := func(segments, files int64, records ...string) error {
		data := frame(refsSchema.text, len(records), []byte(strings.Join(records, "")))
		_, err := DecodeRefs(data, RefsFile{Digest: Sum(data), Segments: segments, Files: files})
		return err
	}
	if err := decode(5, 2, record("segment", 2, 1, 1), record("later kind", -7, 0), record("segment", 3, 7, 1, 2),
		record("file", 2, 1, math.MaxUint64-1)); err != nil {
		t.Fatalf("valid records: %v", err)
	}
	for name, err := range map[string]error{
		"no ids":         decode(0, 0, record("segment", 0, 1)),
		"negative count": decode(1, 0, record("segment", -1, 1)),
		"2^62 ids":       decode(1<<62, 0, record("segment", 1<<62, 1, 1, 1)),
		"chunk too large": decode(maxRefsChunk+1, 0, record("segment", maxRefsChunk+1, 1,
			slices.Repeat([]uint64{1}, maxRefsChunk)...)),
		"too few gaps":      decode(3, 0, record("segment", 3, 1, 1)),
		"too many gaps":     decode(2, 0, record("segment", 2, 1, 1, 1)),
		"gap 0":             decode(2, 0, record("segment", 2, 1, 0)),
		"gap overflows":     decode(2, 0, record("segment", 2, 1, math.MaxInt64)),
		"gap wraps":         decode(0, 2, record("file", 2, 1, math.MaxUint64)),
		"id 0":              decode(1, 0, record("segment", 1, 0)),
		"negative id":       decode(1, 0, record("segment", 1, -1)),
		"chunk goes back":   decode(2, 0, record("segment", 1, 5), record("segment", 1, 5)),
		"gap without end":   decode(2, 0, long(7)+"segment"+long(2)+long(1)+long(2)+"\xff\xff"),
		"more than allowed": decode(1, 0, record("segment", 2, 1, 1)),
	} {
		if !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: err = %v, want ErrCorrupt", name, err)
		}
	}
}

func TestFileHash(t *testing.T) {
	// printf 'main\0a/b' | sha256sum
	if got, want := FileHash("main", "a/b"), uint64(0x4375c5bf45bb7da3); got != want {
		t.Errorf("got %#x, want %#x; the hash is stored and must not change", got, want)
	}
	if FileHash("a", "b/c") == FileHash("ab", "/c") || FileHash("a", "b") == FileHash("a", "c") {
		t.Error("two files have one hash")
	}
}
