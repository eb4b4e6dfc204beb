package catalog

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// knownKinds are the file kinds that take one number instead of their text.
// Stored: append only.
var knownKinds = []string{
	segment.KindInsert, segment.KindDelta, segment.KindStats, segment.KindBM25,
	segment.KindIndex, segment.KindText, segment.KindJSON,
}

// otherKinds is where the numbers of kinds begin that the record spells out.
const otherKinds = 128

// NativePath is where the native layout puts a file, relative to its root. A
// file that lies there needs no path in its record.
func NativePath(collection int64, s *segment.Segment, f *segment.File) string {
	return string(appendNativePath(make([]byte, 0, 96), collection, s, f))
}

func appendNativePath(b []byte, collection int64, s *segment.Segment, f *segment.File) []byte {
	for _, id := range []int64{collection, s.Partition, s.ID} {
		b = strconv.AppendInt(b, id, 10)
		b = append(b, '/')
	}
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

// encodeSegment makes the record of a segment. It does not keep s, but shares
// its slices and maps until it is encoded.
func encodeSegment(collection int64, s *segment.Segment, op string) *storagev1.Segment {
	rec := &storagev1.Segment{
		Format: record.Format, Partition: s.Partition, Shard: uint32(s.Channel), Level: uint32(s.Level), State: uint32(s.State),
		Rows: s.Rows, Start: positionRecord(s.Start), Dml: positionRecord(s.DML), StorageVersion: s.StorageVersion,
		Sorted: s.Sorted, CommitTimestamp: uint64(s.CommitTimestamp), RowCeiling: uint64(s.RowCeiling),
		EngineData: s.EngineData, Attributes: s.Attributes, Op: op,
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
	for i, f := range files {
		out.Root[i] = uint32(f.Root)
		out.Kind[i] = kindNumber(out, f.Kind)
		if f.Path != NativePath(collection, s, f) {
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
	out.Root, out.PathShared, out.ChecksumType = unlessZero(out.Root), unlessZero(out.PathShared), unlessZero(out.ChecksumType)
	out.Size, out.Entries, out.Field = unlessZero(out.Size), unlessZero(out.Entries), unlessZero(out.Field)
	out.MinTimestamp, out.TimestampSpan = unlessZero(out.MinTimestamp), unlessZero(out.TimestampSpan)
	out.LogId = unlessZero(out.LogId)
	return out
}

// unlessZero returns column, or nil when it holds only zeros.
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

// DecodeSegment reads a segment's record.
func DecodeSegment(collection int64, kv meta.KeyValue) (segment.Segment, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return segment.Segment{}, err
	}
	rec := &storagev1.Segment{}
	if err := record.Decode(kv, rec); err != nil {
		return segment.Segment{}, err
	}
	s, err := segmentOf(collection, id, rec)
	if err != nil {
		return segment.Segment{}, fmt.Errorf("%w at %s: %w", record.ErrUnreadable, kv.Key, err)
	}
	return s, nil
}

func segmentOf(collection, id int64, rec *storagev1.Segment) (segment.Segment, error) {
	s := segment.Segment{
		ID: id, Partition: rec.GetPartition(), Channel: int(rec.GetShard()), Level: int(rec.GetLevel()),
		State: segment.State(rec.GetState()), Rows: rec.GetRows(), Start: positionOf(rec.GetStart()), DML: positionOf(rec.GetDml()),
		StorageVersion: rec.GetStorageVersion(), Sorted: rec.GetSorted(),
		CommitTimestamp: segment.Timestamp(rec.GetCommitTimestamp()), RowCeiling: segment.Timestamp(rec.GetRowCeiling()),
		EngineData: rec.GetEngineData(), Attributes: rec.GetAttributes(),
	}
	files, err := decodeFiles(collection, &s, rec.GetFiles())
	if err != nil {
		return s, err
	}
	own := len(files)
	for _, b := range rec.GetBuilds() {
		own -= int(b.GetFiles())
	}
	if own < 0 {
		return s, fmt.Errorf("builds have more files than there are")
	}
	s.Files, files = files[:own:own], files[own:]
	if own == 0 {
		s.Files = nil
	}
	for _, b := range rec.GetBuilds() {
		n := int(b.GetFiles())
		build := segment.Build{ID: b.GetId(), Index: b.GetIndex(), Field: b.GetField(), Params: b.GetParams()}
		if n > 0 {
			build.Files = files[:n:n]
		}
		s.Builds, files = append(s.Builds, build), files[n:]
	}
	return s, nil
}

func decodeFiles(collection int64, s *segment.Segment, in *storagev1.Files) ([]segment.File, error) {
	n := int(in.GetCount())
	if n == 0 {
		return nil, nil
	}
	// The kind of each file is always there, so a false count costs no memory.
	if n != len(in.GetKind()) {
		return nil, fmt.Errorf("%d files, %d kinds", n, len(in.GetKind()))
	}
	for _, length := range []int{
		len(in.GetRoot()), len(in.GetPathShared()), len(in.GetSize()), len(in.GetEtag()), len(in.GetChecksumType()),
		len(in.GetMinTimestamp()), len(in.GetTimestampSpan()), len(in.GetEntries()), len(in.GetField()), len(in.GetLogId()),
	} {
		if length != 0 && length != n {
			return nil, fmt.Errorf("%d files, a column of %d", n, length)
		}
	}
	if len(in.GetEtag16()) != 0 && len(in.GetEtag16()) != 16*n {
		return nil, fmt.Errorf("%d files, %d bytes of etags", n, len(in.GetEtag16()))
	}
	files := make([]segment.File, n)
	etags := hex.EncodeToString(in.GetEtag16())
	native := make([]byte, 0, 64*n)
	ends := make([]int, n)
	tails, sums := in.GetPathTails(), in.GetChecksumValues()
	var lastPath string
	var lastMin segment.Timestamp
	var lastLog int64
	for i := range files {
		f := &files[i]
		f.Root = int(at(in.GetRoot(), i))
		switch k := int(in.GetKind()[i]); {
		case k >= 1 && k <= len(knownKinds):
			f.Kind = knownKinds[k-1]
		case k >= otherKinds && k-otherKinds < len(in.GetKinds()):
			f.Kind = in.GetKinds()[k-otherKinds]
		default:
			return nil, fmt.Errorf("file %d: no kind %d", i, k)
		}
		f.Size = int64(at(in.GetSize(), i))
		if etags != "" {
			f.ETag = etags[32*i : 32*i+32]
		} else {
			f.ETag = at(in.GetEtag(), i)
		}
		f.MinTimestamp = lastMin + segment.Timestamp(at(in.GetMinTimestamp(), i))
		f.MaxTimestamp = f.MinTimestamp + segment.Timestamp(at(in.GetTimestampSpan(), i))
		lastMin = f.MinTimestamp
		f.Entries = int64(at(in.GetEntries(), i))
		f.Field = int64(at(in.GetField(), i))
		f.LogID = lastLog + at(in.GetLogId(), i)
		lastLog = f.LogID
		f.Attributes = in.GetAttributes()[uint32(i)].GetPairs()
		var err error
		if t := int(at(in.GetChecksumType(), i)); t > 0 {
			if t > len(in.GetChecksumTypes()) {
				return nil, fmt.Errorf("file %d: no checksum type %d", i, t)
			}
			f.Checksum.Type = in.GetChecksumTypes()[t-1]
			if f.Checksum.Value, sums, err = cut(sums); err != nil {
				return nil, fmt.Errorf("file %d: checksum: %w", i, err)
			}
		}
		if shared := int(at(in.GetPathShared(), i)) - 1; shared >= 0 {
			var tail []byte
			// A path is never longer than a key; damage must not make it so, file by file.
			if tail, tails, err = cut(tails); err != nil || shared > len(lastPath) || shared+len(tail) > object.MaxKeyBytes {
				return nil, fmt.Errorf("file %d: damaged path", i)
			}
			f.Path = lastPath[:shared] + string(tail)
			lastPath = f.Path
		} else {
			native = appendNativePath(native, collection, s, f)
			ends[i] = len(native)
		}
	}
	paths, from := string(native), 0
	for i, end := range ends {
		if end > 0 {
			files[i].Path = paths[from:end]
			from = end
		}
	}
	return files, nil
}

// at returns the value of file i of a column that is left out when all zero.
func at[T any](column []T, i int) T {
	if len(column) == 0 {
		var zero T
		return zero
	}
	return column[i]
}

// cut takes the first of a row of byte strings, each behind its length.
func cut(data []byte) (first, rest []byte, err error) {
	length, n := binary.Uvarint(data)
	if n <= 0 || length > uint64(len(data)-n) {
		return nil, nil, fmt.Errorf("damaged list of %d bytes", len(data))
	}
	end := n + int(length)
	return data[n:end:end], data[end:], nil
}
