package catalog

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// Decoder reads the records of segments one after another and reuses its memory. The zero
// value is ready. It is not safe for concurrent use.
type Decoder struct {
	// The record, and the messages in it.
	rec        storagev1.Segment
	start, dml storagev1.Position
	columns    storagev1.Files
	records    []*storagev1.Build

	// The segment.
	files  []segment.File
	builds []segment.Build

	prefix []byte // of native paths
	text   []byte // the segment's ETags and native paths
	ends   []int  // of text after each file
}

// Decode reads a segment's record. The segment's lists of files and of builds are valid
// until the next call; the caller may keep everything else. Decode keeps nothing of kv.
// The error of an unreadable record wraps [record.ErrUnreadable]; that of a bad key does not.
func (d *Decoder) Decode(collection int64, kv meta.KeyValue) (segment.Segment, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return segment.Segment{}, err
	}
	if err := d.parse(kv.Value); err != nil {
		return segment.Segment{}, fmt.Errorf("%w at %s: %w", record.ErrUnreadable, kv.Key, err)
	}
	if format := d.rec.GetFormat(); format != record.Format {
		return segment.Segment{}, fmt.Errorf("%w at %s: format %d, this release reads %d",
			record.ErrUnreadable, kv.Key, format, record.Format)
	}
	s, err := d.segment(collection, id, &d.rec)
	if err != nil {
		return segment.Segment{}, fmt.Errorf("%w at %s: %w", record.ErrUnreadable, kv.Key, err)
	}
	return s, nil
}

// DecodeSegment reads a segment's record. The caller may keep the segment.
func DecodeSegment(collection int64, kv meta.KeyValue) (segment.Segment, error) {
	return new(Decoder).Decode(collection, kv)
}

// reset clears the record and keeps the memory of its columns.
func (d *Decoder) reset() {
	d.rec.Reset()
	d.start.Reset()
	d.dml.Reset()
	c := &d.columns
	root, kind, shared, size, checksum := c.Root[:0], c.Kind[:0], c.PathShared[:0], c.Size[:0], c.ChecksumType[:0]
	from, span, entries, field, log := c.MinTimestamp[:0], c.TimestampSpan[:0], c.Entries[:0], c.Field[:0], c.LogId[:0]
	c.Reset()
	c.Root, c.Kind, c.PathShared, c.Size, c.ChecksumType = root, kind, shared, size, checksum
	c.MinTimestamp, c.TimestampSpan, c.Entries, c.Field, c.LogId = from, span, entries, field, log
}

// parse reads data into d.rec as proto.Unmarshal does, without the operation, which is no
// part of a segment. It leaves rare fields, and fields with an encoding that snapshotd
// does not write, to the proto package, which merges each into the message.
func (d *Decoder) parse(data []byte) error {
	d.reset()
	rec := &d.rec
	for len(data) > 0 {
		f, err := nextField(data)
		if err != nil {
			return err
		}
		data = data[len(f.raw):]
		switch f.tag {
		case 1<<3 | varint:
			rec.Format = uint32(f.value)
		case 2<<3 | varint:
			rec.Partition = int64(f.value)
		case 3<<3 | varint:
			rec.Shard = uint32(f.value)
		case 4<<3 | varint:
			rec.Level = uint32(f.value)
		case 5<<3 | varint:
			rec.State = uint32(f.value)
		case 6<<3 | varint:
			rec.Rows = int64(f.value)
		case 7<<3 | sized:
			rec.Start = &d.start
			err = parsePosition(&d.start, f.bytes)
		case 8<<3 | sized:
			rec.Dml = &d.dml
			err = parsePosition(&d.dml, f.bytes)
		case 9<<3 | varint:
			rec.StorageVersion = int64(f.value)
		case 10<<3 | varint:
			rec.Sorted = f.value != 0
		case 11<<3 | varint:
			rec.CommitTimestamp = f.value
		case 12<<3 | varint:
			rec.RowCeiling = f.value
		case 13<<3 | sized:
			rec.Files = &d.columns
			err = parseFiles(&d.columns, f.bytes)
		case 14<<3 | sized:
			n := len(rec.Builds)
			if n == len(d.records) {
				d.records = append(d.records, &storagev1.Build{})
			}
			rec.Builds = d.records[:n+1]
			err = parseBuild(rec.Builds[n], f.bytes)
		case 17<<3 | sized:
			if !utf8.Valid(f.bytes) {
				err = errNotUTF8
			}
		default:
			err = f.mergeInto(rec)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func parsePosition(p *storagev1.Position, data []byte) error {
	for len(data) > 0 {
		f, err := nextField(data)
		if err != nil {
			return err
		}
		data = data[len(f.raw):]
		switch f.tag {
		case 1<<3 | varint:
			p.Timestamp = f.value
		case 2<<3 | sized:
			p.Opaque = bytes.Clone(f.bytes)
		default:
			err = f.mergeInto(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func parseBuild(b *storagev1.Build, data []byte) error {
	b.Reset()
	for len(data) > 0 {
		f, err := nextField(data)
		if err != nil {
			return err
		}
		data = data[len(f.raw):]
		switch f.tag {
		case 1<<3 | varint:
			b.Id = int64(f.value)
		case 2<<3 | varint:
			b.Index = int64(f.value)
		case 3<<3 | varint:
			b.Field = int64(f.value)
		case 5<<3 | varint:
			b.Files = uint32(f.value)
		default:
			err = f.mergeInto(b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// parseFiles reads data into c, which then refers to parts of data.
func parseFiles(c *storagev1.Files, data []byte) error {
	for len(data) > 0 {
		f, err := nextField(data)
		if err != nil {
			return err
		}
		data = data[len(f.raw):]
		switch f.tag {
		case 1<<3 | varint:
			c.Count = uint32(f.value)
		case 2<<3 | sized:
			c.Root, err = unpack(c.Root, f.bytes)
		case 3<<3 | sized:
			c.Kind, err = unpack(c.Kind, f.bytes)
		case 5<<3 | sized:
			c.PathShared, err = unpack(c.PathShared, f.bytes)
		case 6<<3 | sized:
			c.PathTails = f.bytes
		case 7<<3 | sized:
			c.Size, err = unpack(c.Size, f.bytes)
		case 8<<3 | sized:
			c.Etag16 = f.bytes
		case 9<<3 | sized:
			if !utf8.Valid(f.bytes) {
				return errNotUTF8
			}
			c.Etag = append(c.Etag, string(f.bytes))
		case 11<<3 | sized:
			c.ChecksumType, err = unpack(c.ChecksumType, f.bytes)
		case 12<<3 | sized:
			c.ChecksumValues = bytes.Clone(f.bytes) // files get parts of it
		case 13<<3 | sized:
			c.MinTimestamp, err = unpackSigned(c.MinTimestamp, f.bytes)
		case 14<<3 | sized:
			c.TimestampSpan, err = unpack(c.TimestampSpan, f.bytes)
		case 15<<3 | sized:
			c.Entries, err = unpack(c.Entries, f.bytes)
		case 16<<3 | sized:
			c.Field, err = unpack(c.Field, f.bytes)
		case 17<<3 | sized:
			c.LogId, err = unpackSigned(c.LogId, f.bytes)
		default:
			err = f.mergeInto(c)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// The wire types of records that snapshotd writes.
const (
	varint = uint64(protowire.VarintType)
	sized  = uint64(protowire.BytesType)
)

var errNotUTF8 = errors.New("string field contains invalid UTF-8")

// wireField is a field of a message as it is encoded.
type wireField struct {
	tag   uint64 // number and wire type
	value uint64 // of a varint
	bytes []byte // of a sized field
	raw   []byte // tag and value
}

// nextField reads the first field of data.
func nextField(data []byte) (wireField, error) {
	num, kind, n := protowire.ConsumeTag(data)
	if n < 0 {
		return wireField{}, protowire.ParseError(n)
	}
	f := wireField{tag: protowire.EncodeTag(num, kind)}
	size := 0
	switch kind {
	case protowire.VarintType:
		f.value, size = protowire.ConsumeVarint(data[n:])
	case protowire.BytesType:
		f.bytes, size = protowire.ConsumeBytes(data[n:])
	default:
		size = protowire.ConsumeFieldValue(num, kind, data[n:])
	}
	if size < 0 {
		return wireField{}, protowire.ParseError(size)
	}
	f.raw = data[:n+size]
	return f, nil
}

// mergeInto merges the field into m with the proto package.
func (f *wireField) mergeInto(m proto.Message) error {
	return proto.UnmarshalOptions{Merge: true}.Unmarshal(f.raw, m)
}

// unpack appends the numbers of a packed field.
func unpack[T uint32 | uint64](column []T, data []byte) ([]T, error) {
	column = grow(column, data)
	for len(data) > 0 {
		v, n := uint64(data[0]), 1
		if v >= 0x80 {
			if v, n = protowire.ConsumeVarint(data); n < 0 {
				return nil, protowire.ParseError(n)
			}
		}
		column, data = append(column, T(v)), data[n:]
	}
	return column, nil
}

// unpackSigned is unpack for numbers in zigzag encoding.
func unpackSigned(column []int64, data []byte) ([]int64, error) {
	column = grow(column, data)
	for len(data) > 0 {
		v, n := protowire.ConsumeVarint(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		column, data = append(column, protowire.DecodeZigZag(v)), data[n:]
	}
	return column, nil
}

// grow grows column by the number of varints in data.
func grow[T any](column []T, data []byte) []T {
	if cap(column)-len(column) >= len(data) {
		return column
	}
	n := 0
	for _, b := range data {
		if b < 0x80 { // the last byte of a number
			n++
		}
	}
	return slices.Grow(column, n)
}

// segmentOf returns the segment of a decoded record.
func segmentOf(collection, id int64, rec *storagev1.Segment) (segment.Segment, error) {
	return new(Decoder).segment(collection, id, rec)
}

// segment returns the segment of rec, in the memory of d.
func (d *Decoder) segment(collection, id int64, rec *storagev1.Segment) (segment.Segment, error) {
	s := segment.Segment{
		ID: id, Partition: rec.GetPartition(), Channel: int(rec.GetShard()), Level: int(rec.GetLevel()),
		State: segment.State(rec.GetState()), Rows: rec.GetRows(),
		Start: positionOf(rec.GetStart()), DML: positionOf(rec.GetDml()),
		StorageVersion: rec.GetStorageVersion(), Sorted: rec.GetSorted(),
		CommitTimestamp: segment.Timestamp(rec.GetCommitTimestamp()), RowCeiling: segment.Timestamp(rec.GetRowCeiling()),
		EngineData: rec.GetEngineData(), Attributes: rec.GetAttributes(), Disputed: rec.GetDisputed(),
	}
	files, err := d.decodeFiles(collection, &s, rec.GetFiles())
	if err != nil {
		return s, err
	}
	own := len(files)
	for _, b := range rec.GetBuilds() {
		own -= int(b.GetFiles())
	}
	if own < 0 {
		return s, errors.New("builds have more files than the segment")
	}
	s.Files, files = files[:own:own], files[own:]
	if own == 0 {
		s.Files = nil
	}
	d.builds = d.builds[:0]
	for _, b := range rec.GetBuilds() {
		n := int(b.GetFiles())
		build := segment.Build{ID: b.GetId(), Index: b.GetIndex(), Field: b.GetField(), Params: b.GetParams()}
		if n > 0 {
			build.Files = files[:n:n]
		}
		d.builds, files = append(d.builds, build), files[n:]
	}
	if len(d.builds) > 0 {
		s.Builds = slices.Clip(d.builds)
	}
	return s, nil
}

// decodeFiles returns the files of s and of its builds. They share one string.
func (d *Decoder) decodeFiles(
	collection int64, s *segment.Segment, in *storagev1.Files,
) ([]segment.File, error) {
	n := int(in.GetCount())
	if n == 0 {
		return nil, nil
	}
	if err := checkColumns(in, n); err != nil {
		return nil, err
	}
	if cap(d.files) < n {
		d.files, d.ends = make([]segment.File, n), make([]int, n)
	}
	d.files, d.ends = d.files[:n], d.ends[:n]
	d.text = slices.Grow(d.text[:0], 2*len(in.GetEtag16())+64*n)
	d.text = hex.AppendEncode(d.text, in.GetEtag16())
	d.prefix = appendNativeDir(d.prefix[:0], collection, s)
	tails, sums := in.GetPathTails(), in.GetChecksumValues()
	var lastPath string
	var lastMin segment.Timestamp
	var lastLog int64
	for i := range d.files {
		f := &d.files[i]
		*f = segment.File{
			Root: int(at(in.GetRoot(), i)), Size: int64(at(in.GetSize(), i)), ETag: at(in.GetEtag(), i),
			MinTimestamp: lastMin + segment.Timestamp(at(in.GetMinTimestamp(), i)),
			Entries:      int64(at(in.GetEntries(), i)), Field: int64(at(in.GetField(), i)),
			LogID: lastLog + at(in.GetLogId(), i),
		}
		switch k := int(in.GetKind()[i]); {
		case k >= 1 && k <= len(knownKinds):
			f.Kind = knownKinds[k-1]
		case k >= otherKinds && k-otherKinds < len(in.GetKinds()):
			f.Kind = in.GetKinds()[k-otherKinds]
		default:
			return nil, fmt.Errorf("file %d: no kind %d", i, k)
		}
		f.MaxTimestamp = f.MinTimestamp + segment.Timestamp(at(in.GetTimestampSpan(), i))
		lastMin, lastLog = f.MinTimestamp, f.LogID
		if len(in.GetAttributes()) > 0 {
			f.Attributes = in.GetAttributes()[uint32(i)].GetPairs()
		}
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
			// Bounds each path by the length of a key, so that damage cannot grow it file by file.
			tail, tails, err = cut(tails)
			if err != nil || shared > len(lastPath) || shared+len(tail) > object.MaxKeyBytes {
				return nil, fmt.Errorf("file %d: damaged path", i)
			}
			f.Path = lastPath[:shared] + string(tail)
			lastPath = f.Path
		} else {
			start := len(d.text)
			d.text = appendNative(append(d.text, d.prefix...), f)
			if len(d.text)-start > object.MaxKeyBytes { // of an oversized kind
				return nil, fmt.Errorf("file %d: damaged path", i)
			}
		}
		d.ends[i] = len(d.text)
	}
	d.assignText(len(in.GetEtag16()) > 0, 2*len(in.GetEtag16()))
	return d.files, nil
}

// checkColumns returns an error unless all columns of in have n files or none.
func checkColumns(in *storagev1.Files, n int) error {
	// The column of kinds is never omitted, so a wrong count allocates no memory.
	if n != len(in.GetKind()) {
		return fmt.Errorf("%d files, %d kinds", n, len(in.GetKind()))
	}
	for _, length := range []int{
		len(in.GetRoot()), len(in.GetPathShared()), len(in.GetSize()), len(in.GetEtag()), len(in.GetChecksumType()),
		len(in.GetMinTimestamp()), len(in.GetTimestampSpan()), len(in.GetEntries()), len(in.GetField()), len(in.GetLogId()),
	} {
		if length != 0 && length != n {
			return fmt.Errorf("%d files, a column of %d", n, length)
		}
	}
	if len(in.GetEtag16()) != 0 && len(in.GetEtag16()) != 16*n {
		return fmt.Errorf("%d files, %d bytes of ETags, want 16 for each file or none", n, len(in.GetEtag16()))
	}
	return nil
}

// assignText sets ETags and native paths to parts of one string: 32 digits for each file
// if hasETags, then from the offset from on the paths, each up to its end.
func (d *Decoder) assignText(hasETags bool, from int) {
	text := string(d.text)
	for i, end := range d.ends {
		if hasETags {
			d.files[i].ETag = text[32*i : 32*i+32]
		}
		if end > from {
			d.files[i].Path, from = text[from:end], end
		}
	}
}
