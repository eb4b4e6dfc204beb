package manifest

import (
	"fmt"
	"math"

	"github.com/hamba/avro/v2"
)

// shape is a schema in a form that finds the end of a datum. hamba decodes only data that a
// shape has measured before, because hamba treats the end of the input as the end of a datum,
// trusts the lengths of arrays, and loops or recurses endlessly for some schemas.
type shape struct {
	kind  avro.Type
	size  int64    // of a fixed
	min   int64    // the minimum bytes of a datum
	parts []*shape // fields of a record, branches of a union, items of an array, values of a map
}

// maxShapeNodes bounds the size of a schema with expanded named types.
const maxShapeNodes = 2000

// maxItems bounds the items of all arrays and maps in one record. An empty item takes one or
// two bytes in a file, almost none after compression, and hundreds in memory. A segment's
// record in the catalog has a lower limit.
const maxItems = 1 << 18

// newShape returns the shape of a schema, or an error if it is recursive, too large, or has
// arrays of items without bytes.
func newShape(schema avro.Schema) (*shape, error) {
	nodes := 0
	return buildShape(schema, &nodes, make(map[string]bool))
}

// buildShape counts nodes. open has the enclosing records.
func buildShape(schema avro.Schema, nodes *int, open map[string]bool) (*shape, error) {
	if *nodes++; *nodes > maxShapeNodes {
		return nil, fmt.Errorf("%w: schema of more than %d types", ErrCorrupt, maxShapeNodes)
	}
	s := &shape{kind: schema.Type(), min: 1}
	var parts []avro.Schema
	switch t := schema.(type) {
	case *avro.RefSchema:
		return buildShape(t.Schema(), nodes, open)
	case *avro.RecordSchema:
		if open[t.FullName()] {
			return nil, fmt.Errorf("%w: schema is recursive at %s", ErrCorrupt, t.FullName())
		}
		open[t.FullName()] = true
		defer delete(open, t.FullName())
		s.kind, s.min = avro.Record, 0 // also for an error record
		for _, f := range t.Fields() {
			parts = append(parts, f.Type())
		}
	case *avro.ArraySchema:
		parts = []avro.Schema{t.Items()}
	case *avro.MapSchema:
		parts = []avro.Schema{t.Values()}
	case *avro.UnionSchema:
		parts = t.Types()
	case *avro.FixedSchema:
		s.size, s.min = int64(t.Size()), int64(t.Size())
		if s.size < 0 {
			return nil, fmt.Errorf("%w: fixed of %d bytes", ErrCorrupt, s.size)
		}
	case *avro.NullSchema:
		s.min = 0
	case *avro.PrimitiveSchema:
		s.min = primitiveMin(s.kind)
	case *avro.EnumSchema:
	default:
		return nil, fmt.Errorf("%w: schema has a %s", ErrCorrupt, s.kind)
	}
	for _, p := range parts {
		part, err := buildShape(p, nodes, open)
		if err != nil {
			return nil, err
		}
		s.parts = append(s.parts, part)
		if s.kind == avro.Record {
			s.min += part.min
		}
	}
	if s.kind == avro.Array && s.parts[0].min == 0 {
		return nil, fmt.Errorf("%w: schema has an array of empty items", ErrCorrupt)
	}
	return s, nil
}

func primitiveMin(kind avro.Type) int64 {
	if kind == avro.Float {
		return 4
	}
	if kind == avro.Double {
		return 8
	}
	return 1
}

// skip advances c past one datum and reports whether it is valid: it ends within the input,
// and every count and size in it is correct.
func (s *shape) skip(c *cursor) bool {
	switch s.kind {
	case avro.Null:
		return true
	case avro.Boolean:
		b, ok := c.take(1)
		return ok && b[0] <= 1
	case avro.Int, avro.Enum:
		v, ok := c.long()
		return ok && v >= math.MinInt32 && v <= math.MaxInt32
	case avro.Long:
		_, ok := c.long()
		return ok
	case avro.Float, avro.Double:
		_, ok := c.take(s.min)
		return ok
	case avro.Fixed:
		_, ok := c.take(s.size)
		return ok
	case avro.String, avro.Bytes:
		_, ok := c.sized(maxBlockBytes)
		return ok
	case avro.Union:
		branch, ok := c.long()
		return ok && branch >= 0 && branch < int64(len(s.parts)) && s.parts[branch].skip(c)
	case avro.Record:
		for _, f := range s.parts {
			if !f.skip(c) {
				return false
			}
		}
		return true
	case avro.Array, avro.Map:
		return s.skipItems(c)
	case avro.Error, avro.Ref: // never built by buildShape
	}
	return false
}

func (s *shape) skipItems(c *cursor) bool {
	for {
		count, ok := c.long()
		if !ok || count == 0 {
			return ok
		}
		size := int64(-1)
		if count < 0 {
			count = -count
			if size, ok = c.long(); !ok || size < 0 {
				return false
			}
		}
		before := int64(len(c.rest))
		if count < 0 || count > before { // each has at least a byte
			return false
		}
		if c.items += count; c.items > maxItems {
			return false
		}
		for range count {
			if s.kind == avro.Map {
				if _, ok := c.sized(maxBlockBytes); !ok {
					return false
				}
			}
			if !s.parts[0].skip(c) {
				return false
			}
		}
		if size >= 0 && before-int64(len(c.rest)) != size {
			return false
		}
	}
}
