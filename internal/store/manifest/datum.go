package manifest

import (
	"bytes"
	_ "embed"
	"encoding/json"
	"fmt"

	"github.com/hamba/avro/v2"
)

//go:embed segment.avsc
var segmentSchemaText string

//go:embed refs.avsc
var refsSchemaText string

// schema is a schema of this package.
type schema struct {
	text   string // its form in files
	schema avro.Schema
	shape  *shape
}

var (
	segmentSchema = mustSchema(segmentSchemaText)
	refsSchema    = mustSchema(refsSchemaText)
)

func mustSchema(text string) schema {
	var compact bytes.Buffer
	if err := json.Compact(&compact, []byte(text)); err != nil {
		panic(err)
	}
	parsed, err := avro.ParseWithCache(compact.String(), "", new(avro.SchemaCache))
	if err != nil {
		panic(err)
	}
	s, err := newShape(parsed)
	if err != nil {
		panic(err)
	}
	return schema{text: compact.String(), schema: parsed, shape: s}
}

// avroConfig leaves the limits of sizes to shape, which is stricter. Arrays are written as one
// block without a size, because some readers do not support sizes.
var avroConfig = avro.Config{
	BlockLength:            maxBlockBytes,
	DisableBlockSizeHeader: true,
	MaxByteSliceSize:       maxBlockBytes,
	MaxSliceAllocSize:      maxBlockBytes,
}

var avroAPI = avroConfig.Freeze()

// datumReader decodes the records of a container one after another.
type datumReader struct {
	container *container
	schema    avro.Schema
	shape     *shape
	avro      *avro.Reader

	next int    // block after the current one
	raw  []byte // the current block; its memory is reused for the next
	rest cursor // the unread part of raw
	left int    // records in rest
}

// openDatums opens a container with records that are readable as want. If it was written with
// another schema, it is read by that schema, and missing fields get want's defaults.
func openDatums(data []byte, want schema) (_ *datumReader, err error) {
	defer recoverCorrupt(&err)
	c, err := openContainer(data)
	if err != nil {
		return nil, err
	}
	r := &datumReader{container: c, schema: want.schema, shape: want.shape}
	if c.schema == want.text {
		r.avro = avro.NewReader(nil, 0, avro.WithReaderConfig(avroAPI))
		return r, nil
	}
	written, err := avro.ParseWithCache(c.schema, "", new(avro.SchemaCache))
	if err != nil {
		return nil, fmt.Errorf("%w: schema: %w", ErrCorrupt, err)
	}
	// Build the shape first: it refuses schemas for which Resolve might not return.
	if r.shape, err = newShape(written); err != nil {
		return nil, err
	}
	if r.schema, err = avro.NewSchemaCompatibility().Resolve(want.schema, written); err != nil {
		return nil, fmt.Errorf("%w: schema: %w", ErrCorrupt, err)
	}
	// hamba caches the decoder of each schema per configuration: with this frozen
	// configuration the cache lives only as long as r.
	r.avro = avro.NewReader(nil, 0, avro.WithReaderConfig(avroConfig.Freeze()))
	return r, nil
}

// more reports whether another record follows, and prepares its block.
func (r *datumReader) more() (bool, error) {
	if r.left > 0 {
		return true, nil
	}
	if len(r.rest.rest) > 0 {
		return false, fmt.Errorf("%w: block %d: %d bytes after its last record", ErrCorrupt, r.next-1, len(r.rest.rest))
	}
	if r.next == len(r.container.blocks) {
		return false, nil
	}
	b := r.container.blocks[r.next]
	raw, err := b.decompress(r.raw)
	if err != nil {
		return false, fmt.Errorf("block %d: %w", r.next, err)
	}
	r.next++
	r.raw, r.rest, r.left = raw, cursor{rest: raw}, b.records
	return true, nil
}

// measure advances past one record and returns its bytes.
func (r *datumReader) measure() ([]byte, error) {
	before := r.rest.rest
	r.rest.items = 0
	if !r.shape.skip(&r.rest) {
		r.rest.rest = nil
		return nil, fmt.Errorf("%w: block %d: bad record", ErrCorrupt, r.next-1)
	}
	r.left--
	return before[:len(before)-len(r.rest.rest)], nil
}

// decode reads the next record into v, a pointer to a struct. The values share no memory with
// the container. Call it only after more has returned true.
func (r *datumReader) decode(v any) (err error) {
	defer recoverCorrupt(&err)
	datum, err := r.measure()
	if err != nil {
		return err
	}
	r.avro.Error = nil
	r.avro.Reset(datum)
	r.avro.ReadVal(r.schema, v)
	if r.avro.Error != nil {
		return fmt.Errorf("%w: block %d: %w", ErrCorrupt, r.next-1, r.avro.Error)
	}
	return nil
}

// skip skips n records, or all remaining ones if there are fewer. It decompresses only the
// block in which it ends.
func (r *datumReader) skip(n int) error {
	for n > 0 {
		if r.left == 0 && len(r.rest.rest) == 0 {
			for r.next < len(r.container.blocks) && r.container.blocks[r.next].records <= n {
				n -= r.container.blocks[r.next].records
				r.next++
			}
			if n == 0 {
				return nil
			}
		}
		if ok, err := r.more(); !ok || err != nil {
			return err
		}
		if _, err := r.measure(); err != nil {
			return err
		}
		n--
	}
	return nil
}

// recoverCorrupt converts a panic of hamba, which corrupt bytes may cause, into an error. It
// must be deferred.
func recoverCorrupt(err *error) {
	if p := recover(); p != nil {
		*err = fmt.Errorf("%w: decoder panicked: %v", ErrCorrupt, p)
	}
}
