package catalog

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// knownKinds are the file kinds that records store as a number. Stored: append only.
var knownKinds = []string{
	segment.KindInsert, segment.KindDelta, segment.KindStats, segment.KindBM25,
	segment.KindIndex, segment.KindText, segment.KindJSON,
}

// otherKinds is the first number of the kinds that a record lists by name.
const otherKinds = 128

// NativePath returns the path of a file in the native layout, relative to its root. A
// record omits this path.
func NativePath(collection int64, s *segment.Segment, f *segment.File) string {
	return string(appendNativePath(make([]byte, 0, 96), collection, s, f))
}

func appendNativePath(b []byte, collection int64, s *segment.Segment, f *segment.File) []byte {
	return appendNative(appendNativeDir(b, collection, s), f)
}

// appendNativeDir appends the common prefix of the native paths of s.
func appendNativeDir(b []byte, collection int64, s *segment.Segment) []byte {
	for _, id := range [...]int64{collection, s.Partition, s.ID} {
		b = strconv.AppendInt(b, id, 10)
		b = append(b, '/')
	}
	return b
}

// appendNative appends the remainder of the native path of f.
func appendNative(b []byte, f *segment.File) []byte {
	b = append(b, f.Kind...)
	b = append(b, '/')
	b = strconv.AppendInt(b, f.Field, 10)
	b = append(b, '/')
	return strconv.AppendInt(b, f.LogID, 10)
}

func positionRecord(p segment.Position) *storagev1.Position {
	if p.Timestamp == 0 && len(p.Opaque) == 0 {
		return nil
	}
	return &storagev1.Position{Timestamp: uint64(p.Timestamp), Opaque: p.Opaque}
}

func positionOf(p *storagev1.Position) segment.Position {
	return segment.Position{Timestamp: segment.Timestamp(p.GetTimestamp()), Opaque: p.GetOpaque()}
}

// encodeSegment returns the record of a segment, which shares the slices and maps of s.
func encodeSegment(collection int64, s *segment.Segment, op string) *storagev1.Segment {
	rec := &storagev1.Segment{
		Format: record.Format, Partition: s.Partition, Shard: uint32(s.Channel), Level: uint32(s.Level),
		State: uint32(s.State),
		Rows:  s.Rows, Start: positionRecord(s.Start), Dml: positionRecord(s.DML), StorageVersion: s.StorageVersion,
		Sorted: s.Sorted, CommitTimestamp: uint64(s.CommitTimestamp), RowCeiling: uint64(s.RowCeiling),
		EngineData: s.EngineData, Attributes: s.Attributes, Op: op, Disputed: s.Disputed,
	}
	for i := range s.Builds {
		b := &s.Builds[i]
		rec.Builds = append(rec.Builds, &storagev1.Build{
			Id: b.ID, Index: b.Index, Field: b.Field, Params: b.Params, Files: uint32(len(b.Files)),
		})
	}
	rec.Files = encodeFiles(collection, s)
	return rec
}

func encodeFiles(collection int64, s *segment.Segment) *storagev1.Files {
	var files []*segment.File
	for f := range s.AllFiles() {
		files = append(files, f)
	}
	n := len(files)
	if n == 0 {
		return nil
	}
	out := &storagev1.Files{
		Count: uint32(n),
		Root:  make([]uint32, n), Kind: make([]uint32, n), PathShared: make([]uint32, n), Size: make([]uint64, n),
		ChecksumType: make([]uint32, n), MinTimestamp: make([]int64, n), TimestampSpan: make([]uint64, n),
		Entries: make([]uint64, n), Field: make([]uint64, n), LogId: make([]int64, n),
	}
	var lastPath string
	var lastMin segment.Timestamp
	var lastLog int64
	allETag16 := true
	dir := appendNativeDir(nil, collection, s)
	var native []byte
	for i, f := range files {
		out.Root[i] = uint32(f.Root)
		out.Kind[i] = kindNumber(out, f.Kind)
		if native = appendNative(append(native[:0], dir...), f); f.Path != string(native) {
			shared := commonPrefix(lastPath, f.Path)
			out.PathShared[i] = uint32(shared) + 1
			out.PathTails = binary.AppendUvarint(out.PathTails, uint64(len(f.Path)-shared))
			out.PathTails = append(out.PathTails, f.Path[shared:]...)
			lastPath = f.Path
		}
		out.Size[i] = uint64(f.Size)
		if allETag16 {
			raw, ok := rawETag(f.ETag)
			if ok {
				out.Etag16 = append(out.Etag16, raw[:]...)
			}
			allETag16 = ok
		}
		if f.Checksum.Type != "" {
			at := slices.Index(out.ChecksumTypes, f.Checksum.Type)
			if at < 0 {
				at = len(out.ChecksumTypes)
				out.ChecksumTypes = append(out.ChecksumTypes, f.Checksum.Type)
			}
			out.ChecksumType[i] = uint32(at) + 1
			out.ChecksumValues = binary.AppendUvarint(out.ChecksumValues, uint64(len(f.Checksum.Value)))
			out.ChecksumValues = append(out.ChecksumValues, f.Checksum.Value...)
		}
		out.MinTimestamp[i] = int64(f.MinTimestamp - lastMin)
		out.TimestampSpan[i] = uint64(f.MaxTimestamp - f.MinTimestamp)
		lastMin = f.MinTimestamp
		out.Entries[i] = uint64(f.Entries)
		out.Field[i] = uint64(f.Field)
		out.LogId[i] = f.LogID - lastLog
		lastLog = f.LogID
		if len(f.Attributes) > 0 {
			if out.Attributes == nil {
				out.Attributes = map[uint32]*storagev1.Attributes{}
			}
			out.Attributes[uint32(i)] = &storagev1.Attributes{Pairs: f.Attributes}
		}
	}
	if !allETag16 {
		out.Etag16 = nil
		out.Etag = make([]string, n)
		for i, f := range files {
			out.Etag[i] = f.ETag
		}
		out.Etag = unlessZero(out.Etag)
	}
	out.Root, out.PathShared = unlessZero(out.Root), unlessZero(out.PathShared)
	out.ChecksumType = unlessZero(out.ChecksumType)
	out.Size, out.Entries, out.Field = unlessZero(out.Size), unlessZero(out.Entries), unlessZero(out.Field)
	out.MinTimestamp, out.TimestampSpan = unlessZero(out.MinTimestamp), unlessZero(out.TimestampSpan)
	out.LogId = unlessZero(out.LogId)
	return out
}

// Growth of a segment's record by a restore, in bytes.
const (
	restoredETag = 48 // an ETag
	restoredIDs  = 80 // the ids of a path, or of the record
)

// restoredSize returns the maximum size of the record of a restored copy of a segment, in
// bytes: each file has an ETag, which is longer than an MD5 after a copy in parts, and
// the ids are longer.
func restoredSize(rec *storagev1.Segment, s *segment.Segment, size int) int {
	files := rec.GetFiles()
	size += restoredIDs*(1+len(s.Builds)) - len(files.GetEtag16())
	for _, etag := range files.GetEtag() {
		size -= len(etag) + 2
	}
	dir := ""
	i := 0
	for f := range s.AllFiles() {
		size += max(restoredETag, len(f.ETag)) + 2
		if at(files.GetPathShared(), i) > 0 { // the record has the path, less the prefix shared with the previous one
			if next := f.Path[:strings.LastIndexByte(f.Path, '/')+1]; next != dir {
				dir, size = next, size+restoredIDs
			}
		}
		i++
	}
	return size
}

// shownSize returns an upper bound of an answer with a segment, or with the store and key
// of its files, before and after a restore, in bytes. Unlike the record, such an answer
// has the full path of each file.
func shownSize(s *segment.Segment, roots []Root) int {
	const (
		fixed  = 256 // of a segment or a build, without strings and files
		header = 5   // tag and length
	)
	size := fixed + len(s.Start.Opaque) + len(s.DML.Opaque) + len(s.EngineData) + shownPairs(s.Attributes)
	for i := range s.Builds {
		size += fixed + shownPairs(s.Builds[i].Params)
	}
	files, objects := 0, 0
	for f := range s.AllFiles() {
		path := header + len(f.Path) + idGrowth(f.Path)
		numbers := 0
		for _, n := range [...]uint64{
			uint64(f.Size), uint64(f.MinTimestamp), uint64(f.MaxTimestamp), uint64(f.Entries), uint64(f.Field), uint64(f.LogID),
		} {
			numbers += 1 + protowire.SizeVarint(n)
		}
		files += header + 2 + path + 2 + len(f.Kind) + numbers + 2 + max(restoredETag, len(f.ETag)) + shownPairs(f.Attributes)
		if f.Checksum.Type != "" {
			files += 6 + len(f.Checksum.Type) + len(f.Checksum.Value)
		}
		objects += header + path + 1 + protowire.SizeVarint(uint64(f.Size))
		if f.Root < len(roots) {
			objects += header + len(roots[f.Root].Store) + len(roots[f.Root].Prefix)
		}
	}
	return size + max(files, objects)
}

// shownPairs returns an upper bound of a map in an answer, in bytes.
func shownPairs(pairs map[string]string) int {
	size := 0
	for k, v := range pairs {
		size += len(k) + len(v) + 12
	}
	return size
}

// idGrowth returns an upper bound of the growth of a path by a restore, which changes the
// ids of its segment, partition, collection and index build, in bytes.
func idGrowth(path string) int {
	const digits, ids = 19, 4 // digits of an id, changed ids in a path
	growth, n := 0, 0
	for element := range strings.SplitSeq(path, "/") {
		if element == "" || strings.Trim(element, "0123456789") != "" {
			continue
		}
		growth += max(0, digits-len(element))
		if n++; n == ids {
			break
		}
	}
	return growth
}

// sizes are the sizes of a segment after a restore, in bytes.
type sizes struct{ record, shown int }

func sizesOf(rec *storagev1.Segment, s *segment.Segment, roots []Root, bytes int) sizes {
	n := restoredSize(rec, s, bytes)
	return sizes{n, shownSize(s, roots)}
}

// checkSize returns ErrLimitExceeded for a segment that is too large, now or once it is
// restored, unless it is no larger than before.
func checkSize(rec *storagev1.Segment, s *segment.Segment, roots []Root, value []byte, before sizes) error {
	size := sizesOf(rec, s, roots, len(value))
	if size.record > max(MaxSegmentBytes, before.record) {
		return fmt.Errorf("%w: segment %d takes %d bytes, %d of them for a restore, at most %d; "+
			"give it fewer files", ErrLimitExceeded, s.ID, size.record, size.record-len(value), MaxSegmentBytes)
	}
	if size.shown > max(MaxShownBytes, before.shown) {
		return fmt.Errorf("%w: an answer with segment %d takes %d bytes, at most %d; "+
			"give it fewer files, or shorter paths", ErrLimitExceeded, s.ID, size.shown, MaxShownBytes)
	}
	return nil
}

// unlessZero returns column, or nil when all its values are zero.
func unlessZero[T comparable](column []T) []T {
	var zero T
	for _, v := range column {
		if v != zero {
			return column
		}
	}
	return nil
}

func kindNumber(out *storagev1.Files, kind string) uint32 {
	if i := slices.Index(knownKinds, kind); i >= 0 {
		return uint32(i) + 1
	}
	i := slices.Index(out.Kinds, kind)
	if i < 0 {
		i = len(out.Kinds)
		out.Kinds = append(out.Kinds, kind)
	}
	return otherKinds + uint32(i)
}

func commonPrefix(a, b string) int {
	n := min(len(a), len(b))
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return n
}

// rawETag returns the 16 bytes of an ETag of 32 lower-case hex digits.
func rawETag(etag string) (raw [16]byte, ok bool) {
	if len(etag) != 32 {
		return raw, false
	}
	if _, err := hex.Decode(raw[:], []byte(etag)); err != nil {
		return raw, false
	}
	return raw, hex.EncodeToString(raw[:]) == etag
}

// at returns the value of file i of a column, which is empty when all values are zero.
func at[T any](column []T, i int) T {
	if len(column) == 0 {
		var zero T
		return zero
	}
	return column[i]
}

// cut returns the first of a sequence of byte strings, each with its length before it.
func cut(data []byte) (first, rest []byte, err error) {
	length, n := binary.Uvarint(data)
	if n <= 0 || length > uint64(len(data)-n) {
		return nil, nil, fmt.Errorf("damaged list of %d bytes", len(data))
	}
	end := n + int(length)
	return data[n:end:end], data[end:], nil
}
