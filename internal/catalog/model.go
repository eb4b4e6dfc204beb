package catalog

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/snapshotd/snapshotd/internal/segment"
	"github.com/snapshotd/snapshotd/internal/store/keys"
	"github.com/snapshotd/snapshotd/internal/store/meta"
	"github.com/snapshotd/snapshotd/internal/store/object"
	"github.com/snapshotd/snapshotd/internal/store/object/probe"
	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// DefaultDB is the database of names without one, DefaultStore the store of roots without
// one.
const (
	DefaultDB    = "default"
	DefaultStore = "default"
)

// State is the state of a collection, partition or index. Stored: append only.
type State int

// The states of a collection. A partition or index is Active or Dropping, and
// its Dropping is stored as 2.
const (
	Active State = iota + 1
	Restoring
	Dropping
)

func (s State) String() string {
	switch s {
	case Active:
		return "ACTIVE"
	case Restoring:
		return "RESTORING"
	case Dropping:
		return "DROPPING"
	}
	return "UNKNOWN"
}

// childState returns the state of a partition or index from its stored number.
func childState(stored uint32) State {
	if stored == 2 {
		return Dropping
	}
	return Active
}

// Layout is the rule for the paths of restored files. Stored: append only.
type Layout int

// The layouts.
const (
	LayoutNative Layout = iota + 1
	LayoutMilvus
)

func (l Layout) String() string {
	if l == LayoutMilvus {
		return "milvus"
	}
	return "native"
}

// Ref refers to a collection: by ID when positive, else by name.
type Ref struct {
	ID       int64
	DB, Name string
}

func (r Ref) String() string {
	if r.Name != "" {
		return r.DB + "/" + r.Name
	}
	return fmt.Sprintf("%d", r.ID)
}

// Root is a prefix in a configured object store.
type Root struct {
	Store  string // alias
	Prefix string // empty, or ends in "/"
}

// Field is one column of a schema.
type Field struct {
	ID           int64
	Name         string
	DataType     string
	PrimaryKey   bool
	PartitionKey bool
	Nullable     bool
	ElementType  string
	TypeParams   map[string]string
	Attributes   map[string]string
}

// Schema describes the rows: the fields, and the engine's schema.
type Schema struct {
	Fields []Field
	Format string // of Raw
	Raw    []byte // the engine's schema, byte for byte
}

// Collection is a collection without its segments.
type Collection struct {
	ID          int64
	DB          string
	Name        string // kept while DROPPING
	State       State
	Schema      Schema
	Channels    []string // in shard order; empty: one implicit channel
	Roots       []Root
	Layout      Layout
	Consistency string
	Properties  map[string]string
	Attributes  map[string]string
	CreateTime  time.Time
	Job         int64     // its restore job, while Restoring
	DropTime    time.Time // zero: not dropped
	Revision    int64     // of the record; the drop of a partition or index changes it as well
}

// Shards returns the number of channels, the implicit one included.
func (c *Collection) Shards() int { return max(1, len(c.Channels)) }

// Channel returns the name of a shard's channel; empty for the implicit one.
func (c *Collection) Channel(shard int) string {
	if shard < len(c.Channels) {
		return c.Channels[shard]
	}
	return ""
}

func (c *Collection) String() string { return fmt.Sprintf("%s/%s (%d)", c.DB, c.Name, c.ID) }

// Partition is a named part of a collection.
type Partition struct {
	ID         int64
	Name       string
	State      State
	Attributes map[string]string
	CreateTime time.Time
}

// Index is the definition of an index.
type Index struct {
	ID          int64
	Name        string
	Field       int64
	State       State
	TypeParams  map[string]string
	IndexParams map[string]string
	Attributes  map[string]string
	CreateTime  time.Time
}

// Checkpoint is the position of a channel before which all data is in files.
type Checkpoint struct {
	Shard    int
	Channel  string
	Position segment.Position
}

// ownPrefixes are the prefixes that snapshotd reserves in every store.
var ownPrefixes = []string{"snapshots/", "gc/", probe.Dir + "/"}

// CheckObjectKey returns an error unless a file of the data plane may have the key: a valid
// key outside of snapshotd's own prefixes.
func CheckObjectKey(key string) error {
	if err := object.CheckKey(key); err != nil {
		return err
	}
	for _, own := range ownPrefixes {
		if strings.HasPrefix(key, own) {
			return fmt.Errorf("%w %q: %q is reserved for snapshotd", object.ErrInvalidKey, key, own)
		}
	}
	return nil
}

func (c *Catalog) checkRoots(roots []Root) error {
	if len(roots) == 0 || len(roots) > 16 {
		return invalid("roots", "%d roots, want 1 to 16", len(roots))
	}
	for i, r := range roots {
		field := fmt.Sprintf("roots[%d]", i)
		if !c.hasStore(r.Store) {
			return invalid(field+".store", "no object store %q is configured", r.Store)
		}
		if err := object.CheckPrefix(r.Prefix); err != nil {
			return invalid(field+".prefix", "%v", err)
		}
		if len(r.Prefix) > 512 {
			return invalid(field+".prefix", "%d bytes, at most 512", len(r.Prefix))
		}
		for _, own := range ownPrefixes {
			if strings.HasPrefix(r.Prefix, own) {
				return invalid(field+".prefix", "%q is reserved for snapshotd", own)
			}
		}
		for _, other := range roots[:i] {
			nested := strings.HasPrefix(r.Prefix, other.Prefix) || strings.HasPrefix(other.Prefix, r.Prefix)
			if r.Store == other.Store && nested {
				return invalid(field+".prefix", "%q and %q are nested", r.Prefix, other.Prefix)
			}
		}
	}
	return nil
}

func checkSchema(s *Schema) error {
	ids, names := map[int64]bool{}, map[string]bool{}
	for i, f := range s.Fields {
		field := fmt.Sprintf("schema.fields[%d]", i)
		if ids[f.ID] {
			return invalid(field+".id", "%d occurs twice", f.ID)
		}
		if names[f.Name] {
			return invalid(field+".name", "%q occurs twice", f.Name)
		}
		ids[f.ID], names[f.Name] = true, true
	}
	return nil
}

func encodeCollection(c *Collection, op string) *storagev1.Collection {
	rec := &storagev1.Collection{
		Format: record.Format, Db: c.DB, Name: c.Name, State: uint32(c.State),
		Schema:           &storagev1.Schema{Format: c.Schema.Format, Raw: c.Schema.Raw},
		Channels:         c.Channels,
		Layout:           uint32(c.Layout),
		ConsistencyLevel: c.Consistency,
		Properties:       c.Properties,
		Attributes:       c.Attributes,
		CreateTime:       c.CreateTime.UnixNano(),
		Op:               op,
		Catalog:          1,
		JobId:            c.Job,
	}
	if !c.DropTime.IsZero() {
		rec.DropTime = c.DropTime.UnixNano()
	}
	for _, r := range c.Roots {
		rec.Roots = append(rec.Roots, &storagev1.Root{Store: r.Store, Prefix: r.Prefix})
	}
	for _, f := range c.Schema.Fields {
		rec.Schema.Fields = append(rec.Schema.Fields, &storagev1.Field{
			Id: f.ID, Name: f.Name, DataType: f.DataType, PrimaryKey: f.PrimaryKey, PartitionKey: f.PartitionKey,
			Nullable: f.Nullable, ElementType: f.ElementType, TypeParams: f.TypeParams, Attributes: f.Attributes,
		})
	}
	return rec
}

// DecodeCollection reads a collection's record.
func DecodeCollection(kv meta.KeyValue) (Collection, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Collection{}, err
	}
	rec := &storagev1.Collection{}
	if err := record.Decode(kv, rec); err != nil {
		return Collection{}, err
	}
	return collectionOf(id, rec, kv.ModRevision), nil
}

func collectionOf(id int64, rec *storagev1.Collection, revision int64) Collection {
	c := Collection{
		ID: id, DB: rec.GetDb(), Name: rec.GetName(), State: State(rec.GetState()),
		Schema:      Schema{Format: rec.GetSchema().GetFormat(), Raw: rec.GetSchema().GetRaw()},
		Channels:    rec.GetChannels(),
		Layout:      Layout(rec.GetLayout()),
		Consistency: rec.GetConsistencyLevel(),
		Properties:  rec.GetProperties(),
		Attributes:  rec.GetAttributes(),
		CreateTime:  record.Time(rec.GetCreateTime()),
		Job:         rec.GetJobId(),
		DropTime:    record.Time(rec.GetDropTime()),
		Revision:    revision,
	}
	for _, r := range rec.GetRoots() {
		c.Roots = append(c.Roots, Root{Store: r.GetStore(), Prefix: r.GetPrefix()})
	}
	for _, f := range rec.GetSchema().GetFields() {
		c.Schema.Fields = append(c.Schema.Fields, Field{
			ID: f.GetId(), Name: f.GetName(), DataType: f.GetDataType(), PrimaryKey: f.GetPrimaryKey(),
			PartitionKey: f.GetPartitionKey(), Nullable: f.GetNullable(), ElementType: f.GetElementType(),
			TypeParams: f.GetTypeParams(), Attributes: f.GetAttributes(),
		})
	}
	return c
}

func encodePartition(p *Partition, op string) *storagev1.Partition {
	return &storagev1.Partition{
		Format: record.Format, Name: p.Name, State: storedChildState(p.State), Attributes: p.Attributes,
		CreateTime: p.CreateTime.UnixNano(), Op: op,
	}
}

func storedChildState(s State) uint32 {
	if s == Dropping {
		return 2
	}
	return 1
}

func decodePartition(kv meta.KeyValue) (Partition, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Partition{}, err
	}
	rec := &storagev1.Partition{}
	if err := record.Decode(kv, rec); err != nil {
		return Partition{}, err
	}
	return Partition{
		ID: id, Name: rec.GetName(), State: childState(rec.GetState()), Attributes: rec.GetAttributes(),
		CreateTime: record.Time(rec.GetCreateTime()),
	}, nil
}

func encodeIndex(x *Index, op string) *storagev1.Index {
	return &storagev1.Index{
		Format: record.Format, Name: x.Name, Field: x.Field, State: storedChildState(x.State), TypeParams: x.TypeParams,
		IndexParams: x.IndexParams, Attributes: x.Attributes, CreateTime: x.CreateTime.UnixNano(), Op: op,
	}
}

func decodeIndex(kv meta.KeyValue) (Index, error) {
	id, err := keys.LastID(kv.Key)
	if err != nil {
		return Index{}, err
	}
	rec := &storagev1.Index{}
	if err := record.Decode(kv, rec); err != nil {
		return Index{}, err
	}
	return Index{
		ID: id, Name: rec.GetName(), Field: rec.GetField(), State: childState(rec.GetState()),
		TypeParams:  rec.GetTypeParams(),
		IndexParams: rec.GetIndexParams(), Attributes: rec.GetAttributes(), CreateTime: record.Time(rec.GetCreateTime()),
	}, nil
}

func find[T any](list []T, match func(*T) bool) *T {
	if i := slices.IndexFunc(list, func(t T) bool { return match(&t) }); i >= 0 {
		return &list[i]
	}
	return nil
}
