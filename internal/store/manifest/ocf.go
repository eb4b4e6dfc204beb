package manifest

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"runtime"
	"strconv"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// The framing of Avro object container files. hamba's implementation is not used: it writes
// the header in the order of a Go map, so that equal input makes different files, and its
// reader allocates the claimed size of a block.
//
// The header's keys have the order avro.codec, avro.schema, snapshotd.format_version,
// snapshotd.records. The last is the number of records in the file, which detects a file that
// is truncated between two blocks. The sync marker, which other writers choose at random, is
// the start of the SHA-256 of the preceding header and the first block's compressed data:
// equal input makes equal files, and the data cannot practically contain its own hash.
const (
	ocfMagic   = "Obj\x01"
	ocfCodec   = "zstandard"
	keyCodec   = "avro.codec"
	keySchema  = "avro.schema"
	keyFormat  = "snapshotd.format_version"
	keyRecords = "snapshotd.records"

	syncSize = 16

	// maxBlockBytes bounds a block after decompression. A block has at least one record,
	// so it bounds a record too.
	maxBlockBytes = 64 << 20
	// blockBytes and blockRecords limit the blocks of a writer. A block ends before it
	// exceeds blockBytes, or when it has blockRecords.
	blockBytes   = 1 << 20
	blockRecords = 128

	// keptBytes is the maximum memory per buffer that a writer keeps for the next one.
	keptBytes = 4 << 20

	maxHeaderKeys   = 64
	maxHeaderKey    = 256
	maxHeaderSchema = 256 << 10
)

// Both are safe for concurrent use of EncodeAll and DecodeAll only. They are created during
// initialization, so that their shared state does not belong to the synctest bubble of the
// first test that uses them.
var (
	zstdEncoder = newEncoder()
	zstdDecoder = newDecoder()
)

func newEncoder() *zstd.Encoder {
	e, err := zstd.NewWriter(nil,
		zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(runtime.GOMAXPROCS(0)),
		// Each worker permanently keeps twice the window. A window of a block is
		// sufficient, because blocks are compressed separately.
		zstd.WithWindowSize(blockBytes))
	if err != nil {
		panic(err) // the options are constants
	}
	e.EncodeAll(nil, nil) // creates the workers
	return e
}

func newDecoder() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecoderMaxMemory(maxBlockBytes), zstd.WithDecoderConcurrency(0))
	if err != nil {
		panic(err) // the options are constants
	}
	return d
}

// containerWriter writes a container. The caller appends a record to raw and then calls
// added.
type containerWriter struct {
	raw        []byte // of the block being filled
	records    int    // in raw
	blocks     []writtenBlock
	compressed []byte // the data of all blocks
}

// writtenBlock is a completed block.
type writtenBlock struct {
	records int
	end     int // of its data in compressed
}

var containerWriters = sync.Pool{New: func() any { return new(containerWriter) }}

// newContainer begins a file.
func newContainer() *containerWriter {
	w := containerWriters.Get().(*containerWriter)
	*w = containerWriter{raw: w.raw[:0], blocks: w.blocks[:0], compressed: w.compressed[:0]}
	return w
}

// added registers one record, which begins at start in raw.
func (w *containerWriter) added(start int) error {
	if n := len(w.raw) - start; n > maxBlockBytes {
		return fmt.Errorf("record of %d bytes, at most %d", n, maxBlockBytes)
	}
	if len(w.raw) > blockBytes && w.records > 0 { // the record begins a new block
		rest := w.raw[start:]
		w.flush(w.raw[:start])
		w.raw = append(w.raw[:0], rest...)
	}
	w.records++
	if w.records == blockRecords || len(w.raw) >= blockBytes {
		w.flush(w.raw)
		w.raw = w.raw[:0]
	}
	return nil
}

func (w *containerWriter) flush(raw []byte) {
	w.compressed = zstdEncoder.EncodeAll(raw, w.compressed)
	w.blocks = append(w.blocks, writtenBlock{w.records, len(w.compressed)})
	w.records = 0
}

// finish returns the file. The writer must not be used again. The number of records is in the
// header, on which the sync marker depends, so the blocks are framed here.
func (w *containerWriter) finish(schema string) []byte {
	if w.records > 0 {
		w.flush(w.raw)
	}
	records := 0
	for _, b := range w.blocks {
		records += b.records
	}
	const (
		headerSize = 256 // without the schema
		frameSize  = 2*binary.MaxVarintLen32 + syncSize
	)
	out := make([]byte, 0, headerSize+len(schema)+frameSize*len(w.blocks)+len(w.compressed))
	out = append(out, ocfMagic...)
	out = binary.AppendVarint(out, 4) // keys
	for _, s := range []string{
		keyCodec, ocfCodec,
		keySchema, schema,
		keyFormat, strconv.Itoa(FormatVersion),
		keyRecords, strconv.Itoa(records),
	} {
		out = binary.AppendVarint(out, int64(len(s)))
		out = append(out, s...)
	}
	out = append(out, 0) // end of the keys
	h := sha256.New()
	h.Write(out)
	if len(w.blocks) > 0 {
		h.Write(w.compressed[:w.blocks[0].end])
	}
	marker := h.Sum(nil)[:syncSize]
	out = append(out, marker...)
	start := 0
	for _, b := range w.blocks {
		out = binary.AppendVarint(out, int64(b.records))
		out = binary.AppendVarint(out, int64(b.end-start))
		out = append(out, w.compressed[start:b.end]...)
		out = append(out, marker...)
		start = b.end
	}
	w.release()
	return out
}

func (w *containerWriter) release() {
	if cap(w.raw) <= keptBytes && cap(w.compressed) <= keptBytes {
		containerWriters.Put(w)
	}
}

// container is a file with valid framing.
type container struct {
	schema  string
	records int
	blocks  []block
}

// block has compressed records.
type block struct {
	records int
	data    []byte
}

// openContainer checks the framing of all of data without decompression. The result refers to
// data.
func openContainer(data []byte) (*container, error) {
	c := &cursor{rest: data}
	if magic, ok := c.take(int64(len(ocfMagic))); !ok || string(magic) != ocfMagic {
		return nil, fmt.Errorf("%w: not an Avro object container file", ErrCorrupt)
	}
	keys, err := readHeader(c)
	if err != nil {
		return nil, err
	}
	sync, ok := c.take(syncSize)
	if !ok {
		return nil, fmt.Errorf("%w: header ends early", ErrCorrupt)
	}
	f := &container{schema: keys[keySchema]}
	version, err := strconv.Atoi(keys[keyFormat])
	if err != nil {
		return nil, fmt.Errorf("%w: format version %.20q", ErrCorrupt, keys[keyFormat])
	}
	if err := checkFormat(version); err != nil {
		return nil, err
	}
	if codec := keys[keyCodec]; codec != ocfCodec {
		return nil, fmt.Errorf("%w: codec %.20q, want %s", ErrCorrupt, codec, ocfCodec)
	}
	for len(c.rest) > 0 {
		b, err := readBlock(c, sync)
		if err != nil {
			return nil, fmt.Errorf("block %d: %w", len(f.blocks), err)
		}
		f.blocks = append(f.blocks, b)
		f.records += b.records
	}
	if declared, err := strconv.Atoi(keys[keyRecords]); err != nil || declared != f.records {
		return nil, fmt.Errorf("%w: %d records, the header has %.20q", ErrCorrupt, f.records, keys[keyRecords])
	}
	return f, nil
}

// isMarked reports whether data begins with the header and the first block of a container
// with the sync marker of finish.
func isMarked(data []byte) bool {
	c := &cursor{rest: data}
	if magic, ok := c.take(int64(len(ocfMagic))); !ok || string(magic) != ocfMagic {
		return false
	}
	if keys, err := readHeader(c); err != nil || keys[keyRecords] == "" {
		return false
	}
	h := sha256.New()
	h.Write(data[:len(data)-len(c.rest)])
	sync, ok := c.take(syncSize)
	if !ok {
		return false
	}
	if len(c.rest) > 0 {
		first, err := readBlock(c, sync)
		if err != nil {
			return false
		}
		h.Write(first.data)
	}
	return bytes.Equal(sync, h.Sum(nil)[:syncSize])
}

// readHeader reads the key-value map of the header. Avro allows several parts, each with an
// optional size.
func readHeader(c *cursor) (map[string]string, error) {
	keys := make(map[string]string)
	for {
		count, ok := c.long()
		if count == 0 && ok {
			return keys, nil
		}
		if count < 0 && ok {
			count = -count
			_, ok = c.long() // bytes; the content is checked below
		}
		if !ok || count < 0 || count > int64(maxHeaderKeys-len(keys)) {
			return nil, fmt.Errorf("%w: header of %d keys", ErrCorrupt, count)
		}
		for range count {
			key, ok := c.sized(maxHeaderKey)
			if !ok {
				return nil, fmt.Errorf("%w: bad key in header", ErrCorrupt)
			}
			value, ok := c.sized(maxHeaderSchema)
			if !ok {
				return nil, fmt.Errorf("%w: bad value of %.40q in header", ErrCorrupt, key)
			}
			if _, ok := keys[string(key)]; ok {
				return nil, fmt.Errorf("%w: duplicate key %.40q in header", ErrCorrupt, key)
			}
			keys[string(key)] = string(value)
		}
	}
}

func readBlock(c *cursor, sync []byte) (block, error) {
	records, ok := c.long()
	// The limit keeps the sum from overflowing. A record has at least a byte after
	// decompression.
	if !ok || records <= 0 || records > maxBlockBytes {
		return block{}, fmt.Errorf("%w: %d records", ErrCorrupt, records)
	}
	data, ok := c.sized(maxBlockBytes)
	if !ok {
		return block{}, fmt.Errorf("%w: bad size", ErrCorrupt)
	}
	if marker, ok := c.take(syncSize); !ok || !bytes.Equal(marker, sync) {
		return block{}, fmt.Errorf("%w: no sync marker at its end", ErrCorrupt)
	}
	return block{records: int(records), data: data}, nil
}

// decompress returns the block's records, in the memory of dst if it is large enough.
func (b block) decompress(dst []byte) ([]byte, error) {
	raw, err := zstdDecoder.DecodeAll(b.data, dst[:0])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if len(raw) < b.records {
		return nil, fmt.Errorf("%w: %d records in %d bytes", ErrCorrupt, b.records, len(raw))
	}
	return raw, nil
}

// cursor reads Avro primitives. Its methods return false if the input is invalid.
type cursor struct {
	rest  []byte
	items int64 // of the skipped arrays and maps in this record
}

func (c *cursor) take(n int64) ([]byte, bool) {
	if n < 0 || n > int64(len(c.rest)) {
		return nil, false
	}
	taken := c.rest[:n:n]
	c.rest = c.rest[n:]
	return taken, true
}

func (c *cursor) long() (int64, bool) {
	if len(c.rest) > 0 && c.rest[0] < 0x80 { // most are small
		b := c.rest[0]
		c.rest = c.rest[1:]
		return int64(b>>1) ^ -int64(b&1), true
	}
	v, n := binary.Varint(c.rest)
	if n <= 0 {
		return 0, false
	}
	c.rest = c.rest[n:]
	return v, true
}

// sized reads a length of at most limit, and as many bytes.
func (c *cursor) sized(limit int64) ([]byte, bool) {
	n, ok := c.long()
	if !ok || n > limit {
		return nil, false
	}
	return c.take(n)
}
