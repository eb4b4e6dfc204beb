package cli

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/client"
)

// declaration is one document of a `catalog apply` file: the desired state of a
// collection. Fields that are nil stay unchanged.
type declaration struct {
	ID               int64             `yaml:"id"`
	DB               string            `yaml:"db"`
	Name             string            `yaml:"name"`
	Schema           *schema           `yaml:"schema"`
	Channels         []string          `yaml:"channels"`
	Roots            []root            `yaml:"roots"`
	Layout           string            `yaml:"layout"`
	ConsistencyLevel *string           `yaml:"consistencyLevel"`
	Properties       map[string]string `yaml:"properties"`
	Attributes       map[string]string `yaml:"attributes"`
	Partitions       []partition       `yaml:"partitions"`
	Indexes          []index           `yaml:"indexes"`
}

type schema struct {
	Fields       []field `yaml:"fields"`
	SchemaFormat string  `yaml:"schemaFormat"`
	SchemaRaw    string  `yaml:"schemaRaw"` // base64
}

type field struct {
	ID           int64             `yaml:"id"`
	Name         string            `yaml:"name"`
	DataType     string            `yaml:"dataType"`
	PrimaryKey   bool              `yaml:"primaryKey"`
	PartitionKey bool              `yaml:"partitionKey"`
	Nullable     bool              `yaml:"nullable"`
	ElementType  string            `yaml:"elementType"`
	TypeParams   map[string]string `yaml:"typeParams"`
	Attributes   map[string]string `yaml:"attributes"`
}

type root struct {
	Store  string `yaml:"store"`
	Prefix string `yaml:"prefix"`
}

type partition struct {
	ID         int64             `yaml:"id"`
	Name       string            `yaml:"name"`
	Attributes map[string]string `yaml:"attributes"`
}

type index struct {
	ID          int64             `yaml:"id"`
	Name        string            `yaml:"name"`
	Field       int64             `yaml:"field"` // its id
	TypeParams  map[string]string `yaml:"typeParams"`
	IndexParams map[string]string `yaml:"indexParams"`
	Attributes  map[string]string `yaml:"attributes"`
}

const applyLong = `Creates and updates collections as FILE declares them; -f - reads standard input.
FILE is YAML, one collection per document. Applying it again changes nothing.

  db: prod                       # default: default
  name: docs
  schema:
    fields:
      - {id: 100, name: pk, dataType: Int64, primaryKey: true}
      - {id: 101, name: vec, dataType: FloatVector, typeParams: {dim: 128}}
  channels: [docs-0, docs-1]     # in shard order
  roots:
    - {store: default, prefix: engine/}
  layout: native                 # or milvus
  consistencyLevel: Bounded
  properties: {mmap.enabled: "true"}
  attributes: {owner: search}
  partitions:
    - name: p1
      attributes: {tier: hot}
  indexes:
    - {name: vec_idx, field: 101, indexParams: {index_type: HNSW}}

Missing collections, partitions and indexes are created. Properties, attributes and
the consistency level are updated if they differ. The immutable parts (schema,
channels, roots, layout, existing partitions and indexes) must match the file, or
nothing is written. Keys that the file omits stay unchanged; nothing is dropped.

More keys: partitionKey, nullable, elementType and attributes of a field;
schemaFormat and schemaRaw (base64) of the schema; typeParams and attributes of an
index; and the id of a collection, partition or index, from
` + "`catalog allocate-ids`" + `.`

func (a *app) catalogApply() *cobra.Command {
	var (
		file   string
		dryRun bool
	)
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Creates and updates collections as a file declares them",
		Long:  applyLong,
		Example: `  snapshotctl catalog apply -f docs.yaml
  snapshotctl catalog apply -f docs.yaml --dry-run
  generate-schema | snapshotctl catalog apply -f -`,
		Args: exactArgs(),
	}
	cmd.Flags().StringVarP(&file, "file", "f", "", "`file` of declarations; - is standard input (required)")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "print the changes without making them")
	cmd.RunE = a.run(func(ctx context.Context, _ []string) error {
		name, r, closeFile, err := a.open(file)
		if err != nil {
			return err
		}
		defer closeFile()
		declared, err := readDeclarations(name, r)
		if err != nil {
			return err
		}
		c, err := a.connect()
		if err != nil {
			return err
		}
		// Every document is planned first, so that one that cannot be applied stops
		// the whole file.
		var todo []plan
		for _, d := range declared {
			a.collection = fullName(d.DB, d.Name, 0)
			p, err := a.planFor(ctx, c, d)
			if err != nil {
				return err
			}
			todo = append(todo, p)
		}
		done := []outcome{}
		for _, p := range todo {
			a.collection = p.name
			for _, s := range p.steps {
				if !dryRun {
					if err = a.runStep(ctx, c, &p, s); err != nil {
						err = fmt.Errorf("%s %s: %w", s.Thing, s.Name, err)
						break
					}
				}
				done = append(done, s.outcome)
			}
			if err != nil {
				break
			}
		}
		return errors.Join(a.printOutcomes(done, dryRun), err)
	})
	return cmd
}

func (a *app) printOutcomes(done []outcome, dryRun bool) error {
	v := map[string]any{"results": done}
	if dryRun {
		v["dryRun"] = true
	}
	return a.printValue(v, func(w io.Writer) {
		if len(done) > 0 { // none if the first step failed
			t := newTable(w, "", "ACTION", "THING", "NAME", "CHANGED")
			for _, o := range done {
				t.row(o.Action, o.Thing, o.Name, strings.Join(o.Changed, ","))
			}
			_ = t.flush() // w is memory
		}
		if dryRun {
			fprintf(w, "dry run: nothing was written\n")
		}
	})
}

// goType matches the names of Go types in errors of the YAML decoder.
var goType = regexp.MustCompile(`( in type| into) (\[\])?cli\.\w+`)

// readDeclarations reads the documents and makes the checks that need no server.
func readDeclarations(name string, r io.Reader) ([]declaration, error) {
	var all []declaration
	dec := yaml.NewDecoder(r)
	dec.KnownFields(true)
	for {
		var d declaration
		err := dec.Decode(&d)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			text := strings.TrimPrefix(err.Error(), "yaml: ")
			if te, ok := errors.AsType[*yaml.TypeError](err); ok {
				text = strings.Join(te.Errors, "; ")
			}
			return nil, usageErrorf("%s: %s", name, goType.ReplaceAllString(text, ""))
		}
		if reflect.ValueOf(d).IsZero() { // an empty document
			continue
		}
		if d.DB == "" {
			d.DB = "default"
		}
		if d.Name == "" {
			return nil, usageErrorf("%s: collection %d has no name", name, len(all)+1)
		}
		what := fullName(d.DB, d.Name, 0)
		if slices.ContainsFunc(all, func(o declaration) bool { return o.DB == d.DB && o.Name == d.Name }) {
			return nil, usageErrorf("%s: collection %s is declared twice", name, what)
		}
		if _, err := layoutOf(d.Layout); err != nil {
			return nil, usageErrorf("%s: collection %s: %w", name, what, err)
		}
		if d.Schema != nil {
			if _, err := base64.StdEncoding.DecodeString(d.Schema.SchemaRaw); err != nil {
				return nil, usageErrorf("%s: collection %s: schemaRaw is not base64", name, what)
			}
		}
		for thing, names := range map[string][]string{
			"partition": partitionNames(d.Partitions), "index": indexNames(d.Indexes),
		} {
			slices.Sort(names)
			for i, n := range names {
				if n == "" {
					return nil, usageErrorf("%s: collection %s: a declared %s has no name", name, what, thing)
				}
				if i > 0 && n == names[i-1] {
					return nil, usageErrorf("%s: collection %s: %s %s is declared twice", name, what, thing, n)
				}
			}
		}
		all = append(all, d)
	}
	if len(all) == 0 {
		return nil, usageErrorf("%s declares nothing", name)
	}
	return all, nil
}

func partitionNames(ps []partition) []string {
	var names []string
	for _, p := range ps {
		names = append(names, p.Name)
	}
	return names
}

func indexNames(is []index) []string {
	var names []string
	for _, i := range is {
		names = append(names, i.Name)
	}
	return names
}

func layoutOf(s string) (snapshotdv1.Layout, error) {
	switch strings.ToLower(strings.TrimPrefix(s, "LAYOUT_")) {
	case "", "native":
		return snapshotdv1.Layout_LAYOUT_NATIVE, nil
	case "milvus":
		return snapshotdv1.Layout_LAYOUT_MILVUS, nil
	}
	return 0, fmt.Errorf("layout %q: the layouts are native and milvus", s)
}

// schema returns the declared schema as a message, empty if none is declared.
func (d *declaration) schema() *snapshotdv1.Schema {
	m := new(snapshotdv1.Schema)
	if d.Schema == nil {
		return m
	}
	m.SchemaFormat = d.Schema.SchemaFormat
	m.SchemaRaw, _ = base64.StdEncoding.DecodeString(d.Schema.SchemaRaw) // checked by readDeclarations
	for _, f := range d.Schema.Fields {
		m.Fields = append(m.Fields, &snapshotdv1.Field{
			Id: f.ID, Name: f.Name, DataType: f.DataType, ElementType: f.ElementType,
			PrimaryKey: f.PrimaryKey, PartitionKey: f.PartitionKey, Nullable: f.Nullable,
			TypeParams: f.TypeParams, Attributes: f.Attributes,
		})
	}
	return m
}

// outcome is the result of one step, as it is printed.
type outcome struct {
	Action  string   `json:"action"` // created, updated or unchanged
	Thing   string   `json:"thing"`  // collection, partition or index
	Name    string   `json:"name"`
	Changed []string `json:"changed,omitempty"`
}

const (
	created   = "created"
	updated   = "updated"
	unchanged = "unchanged"
)

// step is an outcome and its request, which is nil if the outcome is unchanged.
// runStep sets the request's collection.
type step struct {
	outcome
	request proto.Message
}

// plan is the steps for one collection.
type plan struct {
	name  string
	id    int64 // 0: the first step creates it
	steps []step
}

// planFor reads the current state of a collection and returns the plan.
func (a *app) planFor(ctx context.Context, c *client.Client, d declaration) (plan, error) {
	resp, err := unary(ctx, a, c.Catalog.GetCollection, &snapshotdv1.GetCollectionRequest{
		Collection: &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{
			Db: d.DB, Name: d.Name,
		}}},
	})
	if err != nil {
		if _, code := errorText(err); code == codes.NotFound {
			return diff(d, collectionState{})
		}
		return plan{}, err
	}
	h := collectionState{collection: resp.GetCollection()}
	ref := idRef(h.collection.GetId())
	if h.partitions, err = unary(ctx, a, c.AllPartitions, &snapshotdv1.ListPartitionsRequest{
		Collection: ref,
	}); err != nil {
		return plan{}, err
	}
	if h.indexes, err = unary(ctx, a, c.AllIndexes, &snapshotdv1.ListIndexesRequest{Collection: ref}); err != nil {
		return plan{}, err
	}
	return diff(d, h)
}

// diff returns the plan that turns current into d, or an error that lists every
// difference in an immutable part.
func diff(d declaration, current collectionState) (plan, error) {
	p := plan{name: fullName(d.DB, d.Name, 0), id: current.collection.GetId()}
	var immutable []error
	p.steps = append(p.steps, diffCollection(d, current.collection, &immutable))
	for _, want := range d.Partitions {
		p.steps = append(p.steps, diffPartition(p.name, want, current.partitions.GetPartitions(), &immutable))
	}
	for _, want := range d.Indexes {
		p.steps = append(p.steps, diffIndex(p.name, want, current.indexes.GetIndexes(), &immutable))
	}
	if len(immutable) > 0 {
		var parts []string
		for _, err := range immutable {
			parts = append(parts, err.Error())
		}
		return plan{}, &hintError{
			fmt.Errorf("collection %s exists and differs in immutable parts: %s", p.name, strings.Join(parts, "; ")),
			"nothing was written; declare the collection as it exists, or use another name",
		}
	}
	return p, nil
}

func diffCollection(d declaration, current *snapshotdv1.Collection, immutable *[]error) step {
	layout, _ := layoutOf(d.Layout) // checked by readDeclarations
	s := step{outcome: outcome{Action: unchanged, Thing: "collection", Name: fullName(d.DB, d.Name, 0)}}
	var roots []*snapshotdv1.Root
	for _, r := range d.Roots {
		if r.Store == "" {
			r.Store = "default"
		}
		roots = append(roots, &snapshotdv1.Root{Store: r.Store, Prefix: r.Prefix})
	}
	if current == nil {
		s.Action = created
		s.request = &snapshotdv1.CreateCollectionRequest{
			Name: &snapshotdv1.CollectionName{Db: d.DB, Name: d.Name}, Id: d.ID,
			Schema: d.schema(), Channels: d.Channels, Roots: roots, Layout: layout,
			ConsistencyLevel: deref(d.ConsistencyLevel), Properties: d.Properties, Attributes: d.Attributes,
		}
		return s
	}

	differ := func(format string, args ...any) { *immutable = append(*immutable, fmt.Errorf(format, args...)) }
	if d.ID != 0 && d.ID != current.GetId() {
		differ("its id is %d, not %d", current.GetId(), d.ID)
	}
	if d.Schema != nil {
		if what := schemaDiff(d.schema(), current.GetSchema()); what != "" {
			differ("schema: %s", what)
		}
	}
	if d.Channels != nil && !slices.Equal(d.Channels, current.GetChannels()) {
		differ("channels are %q", current.GetChannels())
	}
	if d.Roots != nil && !slices.EqualFunc(roots, current.GetRoots(), func(a, b *snapshotdv1.Root) bool {
		return proto.Equal(a, b)
	}) {
		var parts []string
		for _, r := range current.GetRoots() {
			parts = append(parts, r.GetStore()+":"+r.GetPrefix())
		}
		differ("roots are %q", parts)
	}
	if d.Layout != "" && layout != current.GetLayout() {
		differ("layout is %s", enumName(current.GetLayout(), "LAYOUT_"))
	}

	req := &snapshotdv1.UpdateCollectionRequest{
		UpdateMask: new(fieldmaskpb.FieldMask), ExpectedRevision: current.GetRevision(),
	}
	change := func(path, name string) {
		req.UpdateMask.Paths = append(req.UpdateMask.Paths, path)
		s.Changed = append(s.Changed, name)
	}
	if d.Properties != nil && !maps.Equal(d.Properties, current.GetProperties()) {
		change("properties", "properties")
		req.Properties = d.Properties
	}
	if d.Attributes != nil && !maps.Equal(d.Attributes, current.GetAttributes()) {
		change("attributes", "attributes")
		req.Attributes = d.Attributes
	}
	if d.ConsistencyLevel != nil && *d.ConsistencyLevel != current.GetConsistencyLevel() {
		change("consistency_level", "consistencyLevel")
		req.ConsistencyLevel = *d.ConsistencyLevel
	}
	if len(s.Changed) > 0 {
		s.Action, s.request = updated, req
	}
	return s
}

// schemaDiff describes the first difference of two schemas; empty if they are equal.
func schemaDiff(want, current *snapshotdv1.Schema) string {
	if len(want.GetFields()) != len(current.GetFields()) {
		return fmt.Sprintf("it has %s, not %d", count(len(current.GetFields()), "field"), len(want.GetFields()))
	}
	for i, f := range want.GetFields() {
		if !proto.Equal(f, current.GetFields()[i]) {
			return fmt.Sprintf("field %q (id %d) differs", f.GetName(), f.GetId())
		}
	}
	if want.GetSchemaFormat() != current.GetSchemaFormat() {
		return fmt.Sprintf("schemaFormat is %q", current.GetSchemaFormat())
	}
	if string(want.GetSchemaRaw()) != string(current.GetSchemaRaw()) {
		return "schemaRaw differs"
	}
	return ""
}

func diffPartition(collection string, want partition, current []*snapshotdv1.Partition, immutable *[]error) step {
	s := step{outcome: outcome{Action: unchanged, Thing: "partition", Name: collection + "/" + want.Name}}
	i := slices.IndexFunc(current, func(p *snapshotdv1.Partition) bool {
		return p.GetName() == want.Name && p.GetState() != snapshotdv1.Partition_STATE_DROPPING
	})
	if i < 0 {
		s.Action = created
		s.request = &snapshotdv1.CreatePartitionRequest{Name: want.Name, Id: want.ID, Attributes: want.Attributes}
		return s
	}
	if p := current[i]; want.ID != 0 && want.ID != p.GetId() {
		*immutable = append(*immutable, fmt.Errorf("partition %s: its id is %d, not %d", want.Name, p.GetId(), want.ID))
	} else if want.Attributes != nil && !maps.Equal(want.Attributes, p.GetAttributes()) {
		*immutable = append(*immutable, fmt.Errorf(
			"partition %s: its attributes are %q", want.Name, formatMap(p.GetAttributes()),
		))
	}
	return s
}

func diffIndex(collection string, want index, current []*snapshotdv1.Index, immutable *[]error) step {
	s := step{outcome: outcome{Action: unchanged, Thing: "index", Name: collection + "/" + want.Name}}
	i := slices.IndexFunc(current, func(x *snapshotdv1.Index) bool {
		return x.GetName() == want.Name && x.GetState() != snapshotdv1.Index_STATE_DROPPING
	})
	if i < 0 {
		s.Action = created
		s.request = &snapshotdv1.CreateIndexRequest{
			Name: want.Name, Id: want.ID, FieldId: want.Field,
			TypeParams: want.TypeParams, IndexParams: want.IndexParams, Attributes: want.Attributes,
		}
		return s
	}
	x := current[i]
	differ := func(format string, args ...any) {
		*immutable = append(*immutable, fmt.Errorf("index "+want.Name+": "+format, args...))
	}
	if want.ID != 0 && want.ID != x.GetId() {
		differ("its id is %d, not %d", x.GetId(), want.ID)
	}
	if want.Field != 0 && want.Field != x.GetFieldId() {
		differ("its field is %d", x.GetFieldId())
	}
	for _, m := range []struct {
		name          string
		want, current map[string]string
	}{
		{"typeParams", want.TypeParams, x.GetTypeParams()},
		{"indexParams", want.IndexParams, x.GetIndexParams()},
		{"attributes", want.Attributes, x.GetAttributes()},
	} {
		if m.want != nil && !maps.Equal(m.want, m.current) {
			differ("its %s are %q", m.name, formatMap(m.current))
		}
	}
	return s
}

// runStep makes the request of one step.
func (a *app) runStep(ctx context.Context, c *client.Client, p *plan, s step) error {
	ref, token := idRef(p.id), client.NewRequestToken()
	var err error
	switch req := s.request.(type) {
	case nil:
	case *snapshotdv1.CreateCollectionRequest:
		req.RequestToken = token
		var resp *snapshotdv1.CreateCollectionResponse
		if resp, err = unary(ctx, a, c.Catalog.CreateCollection, req); err == nil {
			p.id = resp.GetCollection().GetId()
		}
	case *snapshotdv1.UpdateCollectionRequest:
		req.Collection, req.RequestToken = ref, token
		_, err = unary(ctx, a, c.Catalog.UpdateCollection, req)
	case *snapshotdv1.CreatePartitionRequest:
		req.Collection, req.RequestToken = ref, token
		_, err = unary(ctx, a, c.Catalog.CreatePartition, req)
	case *snapshotdv1.CreateIndexRequest:
		req.Collection, req.RequestToken = ref, token
		_, err = unary(ctx, a, c.Catalog.CreateIndex, req)
	}
	return err
}

func deref(s *string) string {
	if s == nil {
		return ""
	}
	return *s
}
