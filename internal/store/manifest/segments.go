package manifest

import (
	"fmt"
	"io"
	"maps"
	"math"
	"slices"
	"sync"

	"github.com/hamba/avro/v2"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// The records of segment.avsc. Timestamps are reinterpreted, because Avro has no unsigned
// integers, and maps are arrays, because the order of an Avro map is undefined.

type segmentRecord struct {
	ID              int64             `avro:"id"`
	Partition       int64             `avro:"partition"`
	Channel         int32             `avro:"channel"`
	Level           int32             `avro:"level"`
	State           int32             `avro:"state"`
	Rows            int64             `avro:"rows"`
	Start           positionRecord    `avro:"start"`
	DML             positionRecord    `avro:"dml"`
	StorageVersion  int64             `avro:"storage_version"`
	Sorted          bool              `avro:"sorted"`
	CommitTimestamp int64             `avro:"commit_timestamp"`
	RowCeiling      int64             `avro:"row_ceiling_timestamp"`
	Files           []fileRecord      `avro:"files"`
	Builds          []buildRecord     `avro:"builds"`
	EngineData      []byte            `avro:"engine_data"`
	Attributes      []attributeRecord `avro:"attributes"`
}

type positionRecord struct {
	Timestamp int64  `avro:"timestamp"`
	Opaque    []byte `avro:"opaque"`
}

type fileRecord struct {
	Root          int32             `avro:"root"`
	Path          string            `avro:"path"`
	Kind          string            `avro:"kind"`
	Size          int64             `avro:"size"`
	ETag          string            `avro:"etag"`
	ChecksumType  string            `avro:"checksum_type"`
	ChecksumValue []byte            `avro:"checksum_value"`
	MinTimestamp  int64             `avro:"min_timestamp"`
	MaxTimestamp  int64             `avro:"max_timestamp"`
	Entries       int64             `avro:"entries"`
	Field         int64             `avro:"field"`
	LogID         int64             `avro:"log_id"`
	Attributes    []attributeRecord `avro:"attributes"`
}

type buildRecord struct {
	ID     int64             `avro:"id"`
	Index  int64             `avro:"index"`
	Field  int64             `avro:"field"`
	Params []attributeRecord `avro:"params"`
	Files  []fileRecord      `avro:"files"`
}

type attributeRecord struct {
	Key   string `avro:"key"`
	Value string `avro:"value"`
}

// Encode returns a manifest of segments, written by a [Writer].
func Encode(segments []segment.Segment) ([]byte, error) {
	w := NewWriter()
	defer w.Close()
	for i := range segments {
		if err := w.Add(&segments[i]); err != nil {
			return nil, err
		}
	}
	return w.Finish(), nil
}

// Writer writes a manifest segment by segment. Equal segments encode to equal bytes; an empty
// map, slice or byte string equals nil. A Writer is not safe for concurrent use.
type Writer struct {
	file    *containerWriter
	encoder *segmentEncoder
	last    int64 // id
}

// NewWriter begins a manifest. Call Close after use.
func NewWriter() *Writer {
	return &Writer{file: newContainer(), encoder: segmentEncoders.Get().(*segmentEncoder)}
}

// Add adds a segment, which it does not retain. Segments must be added in ascending order of
// their ids, with positive ids and without negative sizes or counts. After an error only
// Close may be called.
func (w *Writer) Add(s *segment.Segment) error {
	err := check(s, w.last)
	if err == nil {
		err = w.encoder.append(w.file, s)
	}
	if err != nil {
		return fmt.Errorf("encode segment %d: %w", s.ID, err)
	}
	w.last = s.ID
	return nil
}

// Finish returns the manifest, which the caller owns. Only Close may be called after it.
func (w *Writer) Finish() []byte {
	data := w.file.finish(segmentSchema.text)
	w.file = nil
	return data
}

// Close releases the writer's memory, also of an unfinished writer. Repeated calls have no
// effect.
func (w *Writer) Close() {
	if w.file != nil {
		w.file.release()
		w.file = nil
	}
	if w.encoder != nil {
		w.encoder.release()
		w.encoder = nil
	}
}

// check returns an error unless s may follow the segment with the id last.
func check(s *segment.Segment, last int64) error {
	switch {
	case s.ID <= 0:
		return fmt.Errorf("id %d", s.ID)
	case s.ID <= last:
		return fmt.Errorf("out of order: after segment %d", last)
	case s.Rows < 0:
		return fmt.Errorf("%d rows", s.Rows)
	case !fitsInt32(s.Channel) || !fitsInt32(s.Level) || !fitsInt32(int(s.State)):
		return fmt.Errorf("channel %d, level %d or state %d is out of range", s.Channel, s.Level, s.State)
	}
	items := len(s.Attributes)
	for i := range s.Builds {
		items += 1 + len(s.Builds[i].Params)
	}
	for f := range s.AllFiles() {
		items += 1 + len(f.Attributes)
		if f.Size < 0 || f.Entries < 0 || !fitsInt32(f.Root) {
			return fmt.Errorf("file %s: %d bytes, %d entries in root %d", f.Path, f.Size, f.Entries, f.Root)
		}
	}
	if items > maxItems {
		return fmt.Errorf("%d files, builds and attributes, at most %d", items, maxItems)
	}
	return nil
}

func fitsInt32(n int) bool { return n >= 0 && n <= math.MaxInt32 }

// segmentEncoder has reusable memory for encoding.
type segmentEncoder struct {
	avro   *avro.Writer
	record segmentRecord
}

var segmentEncoders = sync.Pool{New: func() any {
	return &segmentEncoder{avro: avro.NewWriter(nil, 4096, avro.WithWriterConfig(avroAPI))}
}}

func (e *segmentEncoder) release() {
	// Clear the references of the record, but keep its slices.
	files, builds := e.record.Files, e.record.Builds[:cap(e.record.Builds)]
	clear(files[:cap(files)])
	for i := range builds {
		clear(builds[i].Files[:cap(builds[i].Files)])
		builds[i] = buildRecord{Files: builds[i].Files[:0]}
	}
	e.record = segmentRecord{Files: files[:0], Builds: builds[:0]}
	segmentEncoders.Put(e)
}

// append writes s to w.
func (e *segmentEncoder) append(w *containerWriter, s *segment.Segment) error {
	e.record = segmentRecord{
		ID:              s.ID,
		Partition:       s.Partition,
		Channel:         int32(s.Channel), //nolint:gosec // checked
		Level:           int32(s.Level),   //nolint:gosec // checked
		State:           int32(s.State),   //nolint:gosec // checked
		Rows:            s.Rows,
		Start:           positionRecord{int64(s.Start.Timestamp), s.Start.Opaque},
		DML:             positionRecord{int64(s.DML.Timestamp), s.DML.Opaque},
		StorageVersion:  s.StorageVersion,
		Sorted:          s.Sorted,
		CommitTimestamp: int64(s.CommitTimestamp),
		RowCeiling:      int64(s.RowCeiling),
		Files:           appendFiles(e.record.Files[:0], s.Files),
		Builds:          slices.Grow(e.record.Builds[:0], len(s.Builds))[:len(s.Builds)],
		EngineData:      s.EngineData,
		Attributes:      fromMap(s.Attributes),
	}
	for i := range s.Builds {
		b, r := &s.Builds[i], &e.record.Builds[i]
		*r = buildRecord{
			ID: b.ID, Index: b.Index, Field: b.Field, Params: fromMap(b.Params),
			Files: appendFiles(r.Files[:0], b.Files),
		}
	}
	e.avro.Reset(nil)
	e.avro.Error = nil
	e.avro.WriteVal(segmentSchema.schema, &e.record)
	if e.avro.Error != nil {
		return e.avro.Error
	}
	start := len(w.raw)
	w.raw = append(w.raw, e.avro.Buffer()...)
	return w.added(start)
}

func appendFiles(records []fileRecord, files []segment.File) []fileRecord {
	records = slices.Grow(records, len(files))
	for i := range files {
		f := &files[i]
		records = append(records, fileRecord{
			Root:          int32(f.Root), //nolint:gosec // checked
			Path:          f.Path,
			Kind:          f.Kind,
			Size:          f.Size,
			ETag:          f.ETag,
			ChecksumType:  f.Checksum.Type,
			ChecksumValue: f.Checksum.Value,
			MinTimestamp:  int64(f.MinTimestamp),
			MaxTimestamp:  int64(f.MaxTimestamp),
			Entries:       f.Entries,
			Field:         f.Field,
			LogID:         f.LogID,
			Attributes:    fromMap(f.Attributes),
		})
	}
	return records
}

func fromMap(m map[string]string) []attributeRecord {
	if len(m) == 0 {
		return nil
	}
	records := make([]attributeRecord, 0, len(m))
	for _, k := range slices.Sorted(maps.Keys(m)) {
		records = append(records, attributeRecord{k, m[k]})
	}
	return records
}

// Reader reads the segments of a manifest in order. It is not safe for concurrent use.
type Reader struct {
	datums *datumReader
	record segmentRecord // reused memory
	last   int64         // id
	err    error         // final
}

// Open checks the framing of a whole manifest and returns a reader. The reader retains data
// and decompresses one block at a time. Errors wrap ErrCorrupt or ErrNewerFormat.
func Open(data []byte) (*Reader, error) {
	datums, err := openDatums(data, segmentSchema)
	if err != nil {
		return nil, fmt.Errorf("open manifest: %w", err)
	}
	return &Reader{datums: datums}, nil
}

// Count returns the number of segments in the manifest. The caller compares it with the
// metadata.
func (r *Reader) Count() int { return r.datums.container.records }

// Skip skips the next n segments, or all remaining ones if there are fewer. It decompresses
// only the block in which it ends, if any.
func (r *Reader) Skip(n int) error {
	if r.err != nil && r.err != io.EOF { //nolint:errorlint // Next's own value
		return r.err
	}
	if err := r.datums.skip(n); err != nil {
		r.err = fmt.Errorf("read manifest: %w", err)
		return r.err
	}
	return nil
}

// Next returns the next segment, which the caller owns, or io.EOF after the last. Any other
// error wraps ErrCorrupt, and all later calls return it. Empty maps and slices are nil.
func (r *Reader) Next() (*segment.Segment, error) {
	if r.err != nil {
		return nil, r.err
	}
	s, err := r.read()
	if err == io.EOF { //nolint:errorlint // read's own value
		r.err = err
	} else if err != nil {
		r.err = fmt.Errorf("read manifest: %w", err)
	}
	return s, r.err
}

func (r *Reader) read() (*segment.Segment, error) {
	if ok, err := r.datums.more(); err != nil {
		return nil, err
	} else if !ok {
		return nil, io.EOF
	}
	clear(r.record.Files) // hamba does not reset missing fields
	r.record = segmentRecord{Files: r.record.Files[:0]}
	if err := r.datums.decode(&r.record); err != nil {
		return nil, err
	}
	s := r.record.segment()
	if err := check(s, r.last); err != nil {
		return nil, fmt.Errorf("%w: segment %d: %w", ErrCorrupt, s.ID, err)
	}
	r.last = s.ID
	return s, nil
}

func (r *segmentRecord) segment() *segment.Segment {
	s := &segment.Segment{
		ID:              r.ID,
		Partition:       r.Partition,
		Channel:         int(r.Channel),
		Level:           int(r.Level),
		State:           segment.State(r.State),
		Rows:            r.Rows,
		Start:           r.Start.position(),
		DML:             r.DML.position(),
		StorageVersion:  r.StorageVersion,
		Sorted:          r.Sorted,
		CommitTimestamp: segment.Timestamp(r.CommitTimestamp),
		RowCeiling:      segment.Timestamp(r.RowCeiling),
		Files:           toFiles(r.Files),
		EngineData:      orNil(r.EngineData),
		Attributes:      toMap(r.Attributes),
	}
	s.Builds = slices.Grow(s.Builds, len(r.Builds))
	for _, b := range r.Builds {
		s.Builds = append(s.Builds, segment.Build{
			ID: b.ID, Index: b.Index, Field: b.Field, Params: toMap(b.Params), Files: toFiles(b.Files),
		})
	}
	return s
}

func (p positionRecord) position() segment.Position {
	return segment.Position{Timestamp: segment.Timestamp(p.Timestamp), Opaque: orNil(p.Opaque)}
}

func toFiles(records []fileRecord) []segment.File {
	if len(records) == 0 {
		return nil
	}
	files := make([]segment.File, len(records))
	for i := range records {
		r := &records[i]
		files[i] = segment.File{
			Root:         int(r.Root),
			Path:         r.Path,
			Kind:         r.Kind,
			Size:         r.Size,
			ETag:         r.ETag,
			Checksum:     segment.Checksum{Type: r.ChecksumType, Value: orNil(r.ChecksumValue)},
			MinTimestamp: segment.Timestamp(r.MinTimestamp),
			MaxTimestamp: segment.Timestamp(r.MaxTimestamp),
			Entries:      r.Entries,
			Field:        r.Field,
			LogID:        r.LogID,
			Attributes:   toMap(r.Attributes),
		}
	}
	return files
}

func toMap(records []attributeRecord) map[string]string {
	if len(records) == 0 {
		return nil
	}
	m := make(map[string]string, len(records))
	for _, r := range records {
		m[r.Key] = r.Value
	}
	return m
}

func orNil(b []byte) []byte {
	if len(b) == 0 {
		return nil
	}
	return b
}
