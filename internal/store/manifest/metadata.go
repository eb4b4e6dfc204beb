package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
)

// Limits of metadata.json.
const (
	MaxMetadataBytes = 64 << 20
	maxMetadataDepth = 32
	// maxMetadataObjects bounds the number of objects: one has at least three bytes in
	// JSON and hundreds in memory.
	maxMetadataObjects = 1 << 18
)

// Metadata is the content of metadata.json: with the listed files it describes a snapshot
// completely, except for its state. Ids and data timestamps are strings in JSON, because many
// readers store numbers as float64. Fields may be added; readers skip unknown fields.
type Metadata struct {
	FormatVersion int    `json:"format_version"`
	ClusterID     string `json:"cluster_id"`
	CreatedBy     string `json:"created_by"` // version of the program

	Snapshot   SnapshotInfo   `json:"snapshot"`
	Collection CollectionInfo `json:"collection"`

	Roots      []Root      `json:"roots"`
	Partitions []Partition `json:"partitions"`
	Indexes    []Index     `json:"indexes"`
	Channels   []Channel   `json:"channels"`

	// CatalogRevision is the revision of the metadata store that this metadata describes.
	CatalogRevision int64 `json:"catalog_revision,string"`

	// Manifests are ordered: each continues the previous one. Their numbers ascend, but
	// may start above 0 and have gaps: the manifests of a restarted capture are deleted
	// with the snapshot.
	Manifests []ManifestFile `json:"manifests"`
	Refs      RefsFile       `json:"refs"`
	Totals    Totals         `json:"totals"`
}

// SnapshotInfo is the snapshot itself.
type SnapshotInfo struct {
	ID          int64             `json:"id,string"`
	Name        string            `json:"name"`
	Description string            `json:"description,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
	CreateTime  time.Time         `json:"create_time"` // UTC
}

// CollectionInfo is the collection at the time of the snapshot.
type CollectionInfo struct {
	ID               int64             `json:"id,string"`
	DB               string            `json:"db"`
	Name             string            `json:"name"`
	Schema           Schema            `json:"schema"`
	Shards           int               `json:"shards"`
	ConsistencyLevel string            `json:"consistency_level,omitempty"`
	Properties       map[string]string `json:"properties,omitempty"`
	Layout           string            `json:"layout"`
	Attributes       map[string]string `json:"attributes,omitempty"`
}

// Schema is a collection's schema, as fields and in the engine's own format.
type Schema struct {
	Fields []Field `json:"fields"`
	Format string  `json:"schema_format,omitempty"` // the engine's name of the format of Raw
	Raw    []byte  `json:"schema_raw,omitempty"`    // stored unchanged
}

// Field is one field of a schema.
type Field struct {
	ID           int64             `json:"id,string"`
	Name         string            `json:"name"`
	DataType     string            `json:"data_type"`
	PrimaryKey   bool              `json:"primary_key,omitempty"`
	PartitionKey bool              `json:"partition_key,omitempty"`
	Nullable     bool              `json:"nullable,omitempty"`
	ElementType  string            `json:"element_type,omitempty"`
	TypeParams   map[string]string `json:"type_params,omitempty"`
	Attributes   map[string]string `json:"attributes,omitempty"`
}

// Root is the base of paths. Files refer to it by its number.
type Root struct {
	Number int    `json:"number"`
	Store  string `json:"store"` // alias
	Prefix string `json:"prefix"`
}

// Partition is a partition of the collection.
type Partition struct {
	ID         int64             `json:"id,string"`
	Name       string            `json:"name"`
	Attributes map[string]string `json:"attributes,omitempty"`
}

// Index is an index of the collection. Its builds are in the manifests.
type Index struct {
	ID          int64             `json:"id,string"`
	Name        string            `json:"name"`
	Field       int64             `json:"field,string"`
	TypeParams  map[string]string `json:"type_params,omitempty"`
	IndexParams map[string]string `json:"index_params,omitempty"`
	Attributes  map[string]string `json:"attributes,omitempty"`
}

// Channel is the cut of the snapshot in a virtual channel.
type Channel struct {
	Shard  int               `json:"shard"`
	Name   string            `json:"name,omitempty"`
	Cut    segment.Timestamp `json:"cut,string"`       // exclusive
	Opaque []byte            `json:"opaque,omitempty"` // the engine's handle for the cut
}

// ManifestFile describes one manifest.
type ManifestFile struct { //nolint:revive // metadata name several kinds of file
	File string `json:"file"` // a ManifestName
	Digest
	Segments     int64 `json:"segments"`
	Rows         int64 `json:"rows"`
	Builds       int64 `json:"builds"`
	Files        int64 `json:"files"`         // of the segments and builds in it
	Bytes        int64 `json:"bytes"`         // of those files
	FirstOrdinal int64 `json:"first_ordinal"` // segments in the manifests before it
	FirstBuild   int64 `json:"first_build"`   // builds in the manifests before it
}

// Open checks the digest of data, the content of the file, and its number of segments, and
// returns a reader.
func (m ManifestFile) Open(data []byte) (*Reader, error) {
	if err := m.Check(data); err != nil {
		return nil, fmt.Errorf("open %s: %w", m.File, err)
	}
	r, err := Open(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.File, err)
	}
	if int64(r.Count()) != m.Segments {
		return nil, fmt.Errorf("open %s: %w: %d segments, want %d", m.File, ErrCorrupt, r.Count(), m.Segments)
	}
	return r, nil
}

// RefsFile describes the references, with the numbers of ids in it.
type RefsFile struct {
	File string `json:"file"` // RefsName
	Digest
	Segments int64 `json:"segments"`
	Builds   int64 `json:"builds"`
	Files    int64 `json:"files"`
}

// Totals are sums over all manifests.
type Totals struct {
	Segments   int64 `json:"segments"`
	Rows       int64 `json:"rows"`
	Files      int64 `json:"files"`
	Bytes      int64 `json:"bytes"`
	Builds     int64 `json:"builds"`
	Straddling int64 `json:"straddling"` // segments with a row ceiling
}

// EncodeMetadata returns metadata.json. Equal metadata encode to equal bytes. A format version
// of zero is set to FormatVersion.
func EncodeMetadata(m *Metadata) ([]byte, error) {
	out := *m
	if out.FormatVersion == 0 {
		out.FormatVersion = FormatVersion
	}
	out.Snapshot.CreateTime = out.Snapshot.CreateTime.UTC()
	if err := out.check(); err != nil {
		return nil, fmt.Errorf("encode metadata of snapshot %d: %w", m.Snapshot.ID, err)
	}
	// Empty lists are [] and not null, for other readers.
	out.Roots = orEmpty(out.Roots)
	out.Partitions = orEmpty(out.Partitions)
	out.Indexes = orEmpty(out.Indexes)
	out.Channels = orEmpty(out.Channels)
	out.Manifests = orEmpty(out.Manifests)
	out.Collection.Schema.Fields = orEmpty(out.Collection.Schema.Fields)
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(&out); err != nil {
		return nil, fmt.Errorf("encode metadata of snapshot %d: %w", m.Snapshot.ID, err)
	}
	if b.Len() > MaxMetadataBytes {
		return nil, fmt.Errorf("encode metadata of snapshot %d: %d bytes, at most %d",
			m.Snapshot.ID, b.Len(), MaxMetadataBytes)
	}
	return b.Bytes(), nil
}

func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

// DecodeMetadata returns the content of metadata.json. Errors wrap ErrCorrupt or
// ErrNewerFormat. Lists without elements are empty, not nil.
func DecodeMetadata(data []byte) (*Metadata, error) {
	m, err := decodeMetadata(data)
	if err != nil {
		return nil, fmt.Errorf("decode metadata: %w", err)
	}
	return m, nil
}

func decodeMetadata(data []byte) (*Metadata, error) {
	if len(data) > MaxMetadataBytes {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrCorrupt, len(data), MaxMetadataBytes)
	}
	if err := checkJSON(data); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	// Check the version first: all other fields may differ in a newer one.
	var version struct {
		FormatVersion int `json:"format_version"`
	}
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if err := checkFormat(version.FormatVersion); err != nil {
		return nil, err
	}
	m := new(Metadata)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	m.Snapshot.CreateTime = m.Snapshot.CreateTime.UTC()
	if err := m.check(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	return m, nil
}

// checkJSON refuses JSON that encoding/json accepts but other readers may interpret
// differently: duplicate keys in one object, and deep nesting.
func checkJSON(data []byte) error {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var seen []map[string]bool // the keys of each open object; nil for an array
	isKey, objects := false, 0
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if key, ok := token.(string); ok && isKey {
			keys := seen[len(seen)-1]
			if keys[key] {
				return fmt.Errorf("duplicate key %.40q", key)
			}
			keys[key] = true
			isKey = false
			continue
		}
		switch token {
		case json.Delim('{'):
			if objects++; objects > maxMetadataObjects {
				return fmt.Errorf("more than %d objects", maxMetadataObjects)
			}
			seen = append(seen, make(map[string]bool))
		case json.Delim('['):
			seen = append(seen, nil)
		case json.Delim('}'), json.Delim(']'):
			seen = seen[:len(seen)-1]
		}
		if len(seen) > maxMetadataDepth {
			return fmt.Errorf("nested deeper than %d", maxMetadataDepth)
		}
		isKey = len(seen) > 0 && seen[len(seen)-1] != nil
	}
}

// check returns an error if the parts of m are inconsistent.
func (m *Metadata) check() error {
	if err := checkFormat(m.FormatVersion); err != nil {
		return err
	}
	if m.Snapshot.ID <= 0 || m.Collection.ID <= 0 {
		return fmt.Errorf("snapshot id %d, collection id %d", m.Snapshot.ID, m.Collection.ID)
	}
	if y := m.Snapshot.CreateTime.Year(); y < 0 || y > 9999 {
		return fmt.Errorf("created in year %d", y) // out of the range of RFC 3339
	}
	var numbers []int
	for _, r := range m.Roots {
		if r.Number < 0 || slices.Contains(numbers, r.Number) {
			return fmt.Errorf("root number %d is negative or a duplicate", r.Number)
		}
		numbers = append(numbers, r.Number)
	}
	var sum Totals
	number := -1
	for i, f := range m.Manifests {
		last := number
		_, err := fmt.Sscanf(f.File, "manifest-%d.avro", &number)
		if err != nil || f.File != ManifestName(number) || number <= last {
			return fmt.Errorf("manifest %d has the name %.40q, want manifest-<n>.avro with n above %d", i, f.File, last)
		}
		if f.FirstOrdinal != sum.Segments || f.FirstBuild != sum.Builds {
			return fmt.Errorf("%s begins at segment %d, build %d; want %d, %d",
				f.File, f.FirstOrdinal, f.FirstBuild, sum.Segments, sum.Builds)
		}
		if f.Length < 0 || !add(&sum.Segments, f.Segments) || !add(&sum.Rows, f.Rows) || !add(&sum.Files, f.Files) ||
			!add(&sum.Bytes, f.Bytes) || !add(&sum.Builds, f.Builds) {
			return fmt.Errorf("%s: a number is negative or too large", f.File)
		}
	}
	sum.Straddling = m.Totals.Straddling // not listed per manifest
	if m.Totals != sum || sum.Straddling < 0 || sum.Straddling > sum.Segments {
		return fmt.Errorf("totals %+v, but the sum of the manifests is %+v", m.Totals, sum)
	}
	if r := m.Refs; r.File != RefsName || r.Length < 0 || r.Segments < 0 || r.Builds < 0 || r.Files < 0 {
		return fmt.Errorf("the references want the file %s and no negative number, have %+v", RefsName, r)
	}
	return nil
}

// add adds n to sum. It returns false if n is negative or the sum overflows.
func add(sum *int64, n int64) bool {
	*sum += n
	return n >= 0 && *sum >= 0
}
