package manifest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math"
	"slices"
)

// maxRefsChunk is the maximum number of ids in one record of a references file.
const maxRefsChunk = 65536

// The kinds of ids in a references file. Stored: append only.
const (
	refsSegment = "segment"
	refsBuild   = "build"
	refsFile    = "file"
)

// Refs has the ids that a snapshot references, for protection without reading the manifests.
// Each slice is strictly ascending.
type Refs struct {
	Segments []int64
	Builds   []int64
	// Files has the FileHash of each file whose key does not contain the id of its
	// segment or build.
	Files []uint64
}

// FileHash returns the hash in Refs of the file at key in the store with the alias. Files with
// equal hashes are protected together.
func FileHash(store, key string) uint64 {
	// Neither can contain a NUL.
	sum := sha256.Sum256([]byte(store + "\x00" + key))
	return binary.BigEndian.Uint64(sum[:])
}

type refsRecord struct {
	Kind   string `avro:"kind"`
	Count  int64  `avro:"count"`
	First  int64  `avro:"first"`
	Deltas []byte `avro:"deltas"`
}

// EncodeRefs returns a references file. Ids must be positive.
func EncodeRefs(refs *Refs) ([]byte, error) {
	w := newContainer()
	err := encodeIDs(w, refsSegment, refs.Segments)
	if err == nil {
		err = encodeIDs(w, refsBuild, refs.Builds)
	}
	if err == nil {
		err = encodeRun(w, refsFile, refs.Files)
	}
	if err != nil {
		w.release()
		return nil, fmt.Errorf("encode references: %w", err)
	}
	return w.finish(refsSchema.text), nil
}

func encodeIDs(w *containerWriter, kind string, ids []int64) error {
	if len(ids) > 0 && ids[0] <= 0 {
		return fmt.Errorf("%s id %d", kind, ids[0])
	}
	return encodeRun(w, kind, ids)
}

// encodeRun writes strictly ascending ids in chunks.
func encodeRun[T int64 | uint64](w *containerWriter, kind string, ids []T) error {
	var deltas []byte
	for i := 0; i < len(ids); i += maxRefsChunk {
		chunk := ids[i:min(i+maxRefsChunk, len(ids))]
		if i > 0 && ids[i] <= ids[i-1] {
			return fmt.Errorf("%s %d is out of order", kind, ids[i])
		}
		deltas = deltas[:0]
		for j := 1; j < len(chunk); j++ {
			if chunk[j] <= chunk[j-1] {
				return fmt.Errorf("%s %d is out of order", kind, chunk[j])
			}
			deltas = binary.AppendUvarint(deltas, uint64(chunk[j]-chunk[j-1]))
		}
		datum, err := avroAPI.Marshal(refsSchema.schema, &refsRecord{
			Kind: kind, Count: int64(len(chunk)), First: int64(chunk[0]), Deltas: deltas,
		})
		if err != nil {
			return err
		}
		start := len(w.raw)
		w.raw = append(w.raw, datum...)
		if err := w.added(start); err != nil {
			return err
		}
	}
	return nil
}

// DecodeRefs returns the content of a references file that the metadata describes as want. It
// checks the digest, and the counts, which also bound its memory. Errors wrap ErrCorrupt or
// ErrNewerFormat. It skips unknown kinds of ids, which a later version may add.
func DecodeRefs(data []byte, want RefsFile) (*Refs, error) {
	refs, err := decodeRefs(data, want)
	if err != nil {
		return nil, fmt.Errorf("decode references: %w", err)
	}
	return refs, nil
}

func decodeRefs(data []byte, want RefsFile) (*Refs, error) {
	if err := want.Check(data); err != nil {
		return nil, err
	}
	datums, err := openDatums(data, refsSchema)
	if err != nil {
		return nil, err
	}
	refs := new(Refs)
	for {
		if ok, err := datums.more(); err != nil {
			return nil, err
		} else if !ok {
			break
		}
		var record refsRecord
		if err := datums.decode(&record); err != nil {
			return nil, err
		}
		switch record.Kind {
		case refsSegment:
			refs.Segments, err = appendRun(refs.Segments, &record, want.Segments, math.MaxInt64)
		case refsBuild:
			refs.Builds, err = appendRun(refs.Builds, &record, want.Builds, math.MaxInt64)
		case refsFile:
			refs.Files, err = appendRun(refs.Files, &record, want.Files, math.MaxUint64)
		}
		if err != nil {
			return nil, err
		}
	}
	for _, c := range []struct {
		kind      string
		got, want int64
	}{
		{refsSegment, int64(len(refs.Segments)), want.Segments},
		{refsBuild, int64(len(refs.Builds)), want.Builds},
		{refsFile, int64(len(refs.Files)), want.Files},
	} {
		if c.got != c.want {
			return nil, fmt.Errorf("%w: %d ids of kind %s, want %d", ErrCorrupt, c.got, c.kind, c.want)
		}
	}
	return refs, nil
}

// appendRun appends the ids of a record, which must not exceed highest, up to a total of limit
// ids.
func appendRun[T int64 | uint64](ids []T, r *refsRecord, limit int64, highest uint64) ([]T, error) {
	bad := func(what string) ([]T, error) {
		return nil, fmt.Errorf("%w: run of kind %.20q: %s", ErrCorrupt, r.Kind, what)
	}
	if r.Count <= 0 || r.Count > maxRefsChunk || r.Count-1 > int64(len(r.Deltas)) {
		return bad(fmt.Sprintf("%d ids in %d bytes", r.Count, len(r.Deltas)))
	}
	if int64(len(ids))+r.Count > limit {
		return bad(fmt.Sprintf("more than %d ids", limit))
	}
	id := uint64(r.First)
	if id > highest || (len(ids) > 0 && id <= uint64(ids[len(ids)-1])) || (highest == math.MaxInt64 && id == 0) {
		return bad(fmt.Sprintf("first id %d", r.First))
	}
	ids = append(slices.Grow(ids, int(r.Count)), T(id))
	deltas := r.Deltas
	for range r.Count - 1 {
		gap, n := binary.Uvarint(deltas)
		if n <= 0 || gap == 0 || gap > highest-id {
			return bad(fmt.Sprintf("bad gap after id %d", id))
		}
		deltas = deltas[n:]
		id += gap
		ids = append(ids, T(id))
	}
	if len(deltas) > 0 {
		return bad(fmt.Sprintf("%d bytes after its last gap", len(deltas)))
	}
	return ids, nil
}
