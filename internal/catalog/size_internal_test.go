package catalog

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// sizedSegment is a segment of builds with files, of a collection with a short id.
func sizedSegment(builds, files int, etag string) *segment.Segment {
	s := &segment.Segment{ID: 7, Partition: 2, State: segment.Flushed, Rows: 5}
	for i := range files {
		f := segment.File{Kind: segment.KindInsert, Field: 100, LogID: int64(i + 1), Size: int64(i), ETag: etag}
		f.Path = NativePath(1, s, &f)
		s.Files = append(s.Files, f)
	}
	for b := range builds {
		build := segment.Build{ID: int64(10 + b), Index: 3, Field: 100}
		for i := range files {
			build.Files = append(build.Files, segment.File{
				Kind: segment.KindIndex, Path: fmt.Sprintf("1/2/7/index/%d/%d", build.ID, i), Size: 9, ETag: etag,
				Checksum: segment.Checksum{Type: "X", Value: []byte{byte(i)}},
			})
		}
		s.Builds = append(s.Builds, build)
	}
	return s
}

// asRestored is what a restore may make of a segment: with long ids, and with ETags
// that are no MD5.
func asRestored(s *segment.Segment) *segment.Segment {
	const long = int64(1) << 62
	r := &segment.Segment{
		ID: long, Partition: long + 1, State: segment.Flushed, Rows: s.Rows,
		RowCeiling: segment.MaxTimestamp,
	}
	etag := strings.Repeat("e", restoredETag)
	for _, f := range s.Files {
		f.ETag = etag
		f.Path = NativePath(long+2, r, &f)
		r.Files = append(r.Files, f)
	}
	for _, b := range s.Builds {
		n := segment.Build{ID: long + b.ID, Index: long, Field: b.Field}
		for _, f := range b.Files {
			f.ETag = etag
			f.Path = fmt.Sprintf("%d/%d/%d/index/%d/%s", long+2, r.Partition, r.ID, n.ID,
				f.Path[strings.LastIndex(f.Path, "/")+1:])
			n.Files = append(n.Files, f)
		}
		r.Builds = append(r.Builds, n)
	}
	return r
}

// TestRestoredSize holds that a record has the room that a restore of it needs, and
// that not much more is allowed for.
func TestRestoredSize(t *testing.T) {
	for _, etag := range []string{
		"", "d41d8cd98f00b204e9800998ecf8427e", "d41d8cd98f00b204e9800998ecf8427e-17",
		strings.Repeat("e", restoredETag),
	} {
		for _, c := range [][2]int{{0, 0}, {0, 1}, {0, 4000}, {1, 1}, {200, 1}, {20, 100}} {
			s := sizedSegment(c[0], c[1], etag)
			rec := encodeSegment(1, s, "op")
			room := restoredSize(rec, s, len(record.Encode(rec)))
			got := len(record.Encode(encodeSegment(int64(1)<<62+2, asRestored(s), "op")))
			if got > room || room > got+got/4+600+200*c[0] {
				t.Errorf("ETag %q, %d builds of %d files: %d bytes restored, %d allowed for", etag, c[0], c[1], got, room)
			}
			if again := restoredSize(encodeSegment(int64(1)<<62+2, asRestored(s), "op"), asRestored(s),
				got); again > room+restoredIDs*(1+3*c[0]) {
				t.Errorf("ETag %q, %d builds of %d files: %d bytes when restored again, %d at first", etag, c[0], c[1], again, room)
			}
		}
	}
}

// TestCheckSize refuses what is too large, unless it was before.
func TestCheckSize(t *testing.T) {
	s := sizedSegment(9, 2200, "")
	rec := encodeSegment(1, s, "op")
	value := record.Encode(rec)
	size := restoredSize(rec, s, len(value))
	if len(value) > 1<<20 || size < MaxSegmentBytes {
		t.Fatalf("%d bytes, %d with room", len(value), size)
	}
	roots := []Root{{Store: "default", Prefix: "data/"}}
	if shown := shownSize(s, roots); shown > MaxShownBytes {
		t.Fatalf("%d bytes are shown: files with short paths are bounded by their record", shown)
	}
	for before, want := range map[int]error{0: ErrLimitExceeded, size - 1: ErrLimitExceeded, size: nil} {
		if err := checkSize(rec, s, roots, value, sizes{record: before}); !errors.Is(err, want) {
			t.Errorf("before %d: %v, want %v", before, err, want)
		}
	}
}

// TestShownSize refuses a segment with long paths that share their beginnings, which
// its record has once and an answer for each file.
func TestShownSize(t *testing.T) {
	roots := []Root{{Store: "default", Prefix: strings.Repeat("r", 499) + "/"}}
	for dir, want := range map[int]error{100: nil, 512: ErrLimitExceeded} {
		s := sizedSegment(0, 4096, "")
		for i := range s.Files {
			s.Files[i].Path = fmt.Sprintf("%s/%d", strings.Repeat("d", dir), i)
		}
		rec := encodeSegment(1, s, "op")
		value := record.Encode(rec)
		if restoredSize(rec, s, len(value)) > MaxSegmentBytes/2 {
			t.Fatalf("a record of %d bytes", len(value))
		}
		if err := checkSize(rec, s, roots, value, sizes{}); !errors.Is(err, want) {
			t.Errorf("directories of %d bytes: %v, want %v", dir, err, want)
		}
		if err := checkSize(rec, s, roots, value, sizes{shown: shownSize(s, roots)}); err != nil {
			t.Errorf("directories of %d bytes, no more than before: %v", dir, err)
		}
	}
}

// TestHeldKeys reads the keys that it writes, and no others.
func TestHeldKeys(t *testing.T) {
	for _, key := range []string{SpillKey(5, 7), SpillKeyOf(5, 7, &storagev1.Parked{Suffix: "0123456789abcdef"})} {
		if collection, unit, ok := ParseSpillKey(key); !ok || collection != 5 || unit != 7 {
			t.Errorf("%s: %d, %d, %v", key, collection, unit, ok)
		}
	}
	for _, key := range []string{
		"gc/held/5", "gc/held/5/", "gc/held/5/x", "gc/held/5/07", "gc/held/5/7-", "gc/held/5/7-0123",
		"gc/held/5/7-0123456789ABCDEF",
		"gc/held/5/7-0123456789abcdeg", "gc/held/5/7-0123456789abcdef-", "gc/held/0/7", "held/5/7", "gc/held/5/7/8",
	} {
		if _, _, ok := ParseSpillKey(key); ok {
			t.Errorf("%s is read", key)
		}
	}
}
