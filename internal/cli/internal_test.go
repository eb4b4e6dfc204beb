package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

func TestParseCollection(t *testing.T) {
	name := func(db, name string) *snapshotdv1.CollectionRef {
		return &snapshotdv1.CollectionRef{Ref: &snapshotdv1.CollectionRef_Name{Name: &snapshotdv1.CollectionName{
			Db: db, Name: name,
		}}}
	}
	for s, want := range map[string]*snapshotdv1.CollectionRef{
		"docs": name("", "docs"), "prod/docs": name("prod", "docs"), "7": name("", "7"), "#7": idRef(7),
		"": nil, "/": nil, "/docs": nil, "prod/": nil, "a/b/c": nil, "#": nil, "#0": nil, "#-1": nil, "#+1": nil, "#x": nil,
		"#9223372036854775808": nil,
	} {
		got, err := parseCollection(s)
		if (err != nil) != (want == nil) {
			t.Errorf("%q: %v", s, err)
		}
		if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%q: %s", s, diff)
		}
	}
}

func TestParseTTL(t *testing.T) {
	for s, want := range map[string]time.Duration{
		"36h": 36 * time.Hour, "30d": 720 * time.Hour, "1h30m": 90 * time.Minute,
		"36500d": 36500 * day, "36525d": 36525 * day, "876600h": 876600 * time.Hour,
		"36526d": 0, "876600h1s": 0, "99999999999999999999d": 0, "9999999h": 0, "-30d": 0,
		"": 0, "d": 0, "0d": 0, "0s": 0, "-1h": 0, "1.5d": 0, "5": 0,
	} {
		if got, err := parseTTL(s); got != want || (err == nil) != (want > 0) {
			t.Errorf("%q: got %v, %v", s, got, err)
		}
	}
}

func TestParseTTLNamesTheLimit(t *testing.T) {
	for _, s := range []string{"36526d", "876600h1s", "99999999999999999999d"} {
		if _, err := parseTTL(s); err == nil || !strings.Contains(err.Error(), "at most 100 years, 36525d") {
			t.Errorf("%q: got %v", s, err)
		}
	}
}

func TestParsePositions(t *testing.T) {
	got, err := parsePositions([]string{"0=1,1=18446744073709551615", "2=0"})
	if err != nil || len(got) != 3 || got[1].GetPosition().GetTimestamp() != 1<<64-1 {
		t.Errorf("got %v, %v", got, err)
	}
	for _, s := range []string{"", "0", "0=", "=1", "a=1", "-1=1", "0=-1", "0=1,0=2"} {
		if got, err := parsePositions([]string{s}); err == nil {
			t.Errorf("%q: got %v", s, got)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB", 1<<20 - 1: "1.0 MiB", 5 << 30: "5.0 GiB",
		1<<63 - 1: "8.0 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("%d: got %q, want %q", n, got, want)
		}
	}
}

func TestTableKeepsItsColumns(t *testing.T) {
	var b bytes.Buffer
	tab := newTable(&b, "", "A", "B", "C")
	tab.row("a long cell", 1, "x")
	for range 2 {
		if err := tab.flush(); err != nil {
			t.Fatal(err)
		}
		tab.row("short", 2, "y")
	}
	if err := tab.flush(); err != nil {
		t.Fatal(err)
	}
	want := "A            B  C\na long cell  1  x\nshort        2  y\nshort        2  y\n"
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Error(diff)
	}
}

func TestBatches(t *testing.T) {
	big := strings.Repeat("x", 300<<10)
	huge := strings.Repeat("x", 3<<20)
	segments := func(n int, data string) []*snapshotdv1.Segment {
		return slices.Repeat([]*snapshotdv1.Segment{{Id: 1, EngineData: []byte(data)}}, n)
	}
	for _, tc := range []struct {
		name     string
		segments []*snapshotdv1.Segment
		want     []int
	}{
		{"none", nil, nil},
		{"few", segments(3, ""), []int{3}},
		{"as many as fit", segments(2*maxBatch, ""), []int{maxBatch, maxBatch}},
		{"one more", segments(maxBatch+1, ""), []int{maxBatch, 1}},
		{"by size", segments(7, big), []int{3, 3, 1}},
		{"larger than a message", slices.Concat(segments(1, ""), segments(2, huge), segments(1, "")), []int{1, 1, 1, 1}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []int
			left := tc.segments
			err := sendBatches(func() (*snapshotdv1.Segment, error) {
				if len(left) == 0 {
					return nil, io.EOF
				}
				s := left[0]
				left = left[1:]
				return s, nil
			}, func(b []*snapshotdv1.Segment) error {
				if n := proto.Size(&snapshotdv1.AddSegmentsRequest{Segments: b}); len(b) > 1 && n > 1<<20 {
					t.Errorf("a message of %d bytes", n)
				}
				got = append(got, len(b))
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
	stop := errors.New("stop")
	err := sendBatches(
		func() (*snapshotdv1.Segment, error) { return &snapshotdv1.Segment{Id: 1}, nil },
		func([]*snapshotdv1.Segment) error { return stop },
	)
	if !errors.Is(err, stop) {
		t.Errorf("got %v", err)
	}
}

// TestSegmentLinesRoundTrip checks that add-segments reads the output of export.
func TestSegmentLinesRoundTrip(t *testing.T) {
	want := &snapshotdv1.Segment{
		Id: 1 << 62, PartitionId: 2, Level: snapshotdv1.Segment_LEVEL_L0, State: snapshotdv1.Segment_STATE_GROWING,
		StartPosition: &snapshotdv1.Position{Timestamp: 1<<64 - 1, Opaque: []byte{0, 255}},
		Files: []*snapshotdv1.File{{
			Path: "a/ü\u2028", Kind: "insert", Checksum: &snapshotdv1.Checksum{Type: "SHA256", Value: []byte{1}},
		}},
		EngineData: []byte("\n"),
	}
	line, err := compactJSON(want)
	if err != nil {
		t.Fatal(err)
	}
	r := newSegmentLines("x", io.MultiReader(bytes.NewReader(line), strings.NewReader("\r\n")))
	got, err := r.next()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	if _, err := r.next(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v", err)
	}
}

func TestSegmentLinesTooLong(t *testing.T) {
	r := newSegmentLines("x", io.MultiReader(
		strings.NewReader("{\"id\":1}\n"), strings.NewReader(strings.Repeat(" ", maxLineBytes+1)),
	))
	if _, err := r.next(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.next(); err == nil || err.Error() != "x, line 2: longer than 16.0 MiB" {
		t.Errorf("got %v", err)
	}
}

const declared = `
name: docs
schema:
  fields:
    - {id: 100, name: pk, dataType: Int64, primaryKey: true}
    - {id: 101, name: vec, dataType: FloatVector, typeParams: {dim: 128}}
channels: [docs-0]
roots: [{prefix: engine/}]
layout: native
consistencyLevel: Bounded
properties: {a: "1"}
attributes: {b: "2"}
partitions: [{name: p1, attributes: {tier: hot}}]
indexes: [{name: i1, field: 101, indexParams: {index_type: HNSW}}]
`

func existing() collectionState {
	return collectionState{
		collection: &snapshotdv1.Collection{
			Id: 7, Db: "default", Name: "docs", State: snapshotdv1.Collection_STATE_ACTIVE,
			Schema: &snapshotdv1.Schema{Fields: []*snapshotdv1.Field{
				{Id: 100, Name: "pk", DataType: "Int64", PrimaryKey: true},
				{Id: 101, Name: "vec", DataType: "FloatVector", TypeParams: map[string]string{"dim": "128"}},
			}},
			Channels: []string{"docs-0"}, Roots: []*snapshotdv1.Root{{Store: "default", Prefix: "engine/"}},
			Layout: snapshotdv1.Layout_LAYOUT_NATIVE, ConsistencyLevel: "Bounded",
			Properties: map[string]string{"a": "1"}, Attributes: map[string]string{"b": "2"}, Revision: 5,
		},
		partitions: &snapshotdv1.ListPartitionsResponse{Partitions: []*snapshotdv1.Partition{
			{Id: 1, Name: "p1", State: snapshotdv1.Partition_STATE_ACTIVE, Attributes: map[string]string{"tier": "hot"}},
			{Id: 2, Name: "p2", State: snapshotdv1.Partition_STATE_DROPPING},
		}},
		indexes: &snapshotdv1.ListIndexesResponse{Indexes: []*snapshotdv1.Index{
			{
				Id: 3, Name: "i1", FieldId: 101, State: snapshotdv1.Index_STATE_ACTIVE,
				IndexParams: map[string]string{"index_type": "HNSW"},
			},
		}},
	}
}

func TestDiff(t *testing.T) {
	for _, tc := range []struct {
		name     string
		old, new string // replaced in the declaration
		want     string // the steps, one a line
	}{
		{"equal", "", "", "unchanged collection\nunchanged partition\nunchanged index\n"},
		{"properties", `a: "1"`, `a: "2"`, "updated collection properties\nunchanged partition\nunchanged index\n"},
		{"no properties", `{a: "1"}`, `{}`, "updated collection properties\nunchanged partition\nunchanged index\n"},
		{
			"properties not mentioned", `properties: {a: "1"}`, ``,
			"unchanged collection\nunchanged partition\nunchanged index\n",
		},
		{
			"everything mutable", "consistencyLevel: Bounded\nproperties: {a: \"1\"}\nattributes: {b: \"2\"}",
			"consistencyLevel: Strong\nproperties: {c: \"1\"}\nattributes: {c: \"2\"}",
			"updated collection properties,attributes,consistencyLevel\nunchanged partition\nunchanged index\n",
		},
		{
			"one more partition", "[{name: p1,", "[{name: p3}, {name: p1,",
			"unchanged collection\ncreated partition\nunchanged partition\nunchanged index\n",
		},
		{
			"a partition that is being dropped", "[{name: p1,", "[{name: p2}, {name: p1,",
			"unchanged collection\ncreated partition\nunchanged partition\nunchanged index\n",
		},
		{"only the name", declared, "name: docs", "unchanged collection\n"},
		{"its id", "name: docs\n", "name: docs\nid: 7\n", "unchanged collection\nunchanged partition\nunchanged index\n"},
		{"another id", "name: docs\n", "name: docs\nid: 8\n", "its id is 7, not 8"},
		{"a field", "dim: 128", "dim: 64", `schema: field "vec" (id 101) differs`},
		{
			"fewer fields", "    - {id: 100, name: pk, dataType: Int64, primaryKey: true}\n", "",
			"schema: it has 2 fields, not 1",
		},
		{"channels", "[docs-0]", "[docs-0, docs-1]", `channels are ["docs-0"]`},
		{"no channels", "[docs-0]", "[]", `channels are ["docs-0"]`},
		{"roots", "engine/", "other/", `roots are ["default:engine/"]`},
		{"layout", "layout: native", "layout: milvus", "layout is native"},
		{"a partition's attributes", "tier: hot", "tier: cold", `partition p1: its attributes are "tier=hot"`},
		{"an index's field", "field: 101", "field: 100", "index i1: its field is 101"},
		{"an index's parameters", "HNSW", "FLAT", `index i1: its indexParams are "index_type=HNSW"`},
		{"several", "layout: native", "layout: milvus\nid: 9", "its id is 7, not 9; layout is native"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			text := strings.Replace(declared, tc.old, tc.new, 1)
			ds, err := readDeclarations("x", strings.NewReader(text))
			if err != nil {
				t.Fatal(err)
			}
			p, err := diff(ds[0], existing())
			if err != nil {
				want := "collection default/docs exists and differs in immutable parts: " + tc.want
				if err.Error() != want {
					t.Errorf("got  %v\nwant %s", err, want)
				}
				return
			}
			var b strings.Builder
			for _, s := range p.steps {
				fmt.Fprintln(&b, strings.TrimSpace(s.Action+" "+s.Thing+" "+strings.Join(s.Changed, ",")))
				if (s.request == nil) != (s.Action == unchanged) {
					t.Errorf("%v: request %v", s.outcome, s.request)
				}
			}
			if diff := cmp.Diff(tc.want, b.String()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestDiffCreates(t *testing.T) {
	ds, err := readDeclarations("x", strings.NewReader(declared))
	if err != nil {
		t.Fatal(err)
	}
	p, err := diff(ds[0], collectionState{})
	if err != nil {
		t.Fatal(err)
	}
	has := existing()
	c := has.collection
	want := []proto.Message{
		&snapshotdv1.CreateCollectionRequest{
			Name: &snapshotdv1.CollectionName{Db: "default", Name: "docs"}, Schema: c.GetSchema(), Channels: c.GetChannels(),
			Roots:  c.GetRoots(),
			Layout: c.GetLayout(), ConsistencyLevel: "Bounded", Properties: c.GetProperties(), Attributes: c.GetAttributes(),
		},
		&snapshotdv1.CreatePartitionRequest{Name: "p1", Attributes: map[string]string{"tier": "hot"}},
		&snapshotdv1.CreateIndexRequest{Name: "i1", FieldId: 101, IndexParams: map[string]string{"index_type": "HNSW"}},
	}
	var got []proto.Message
	for _, s := range p.steps {
		got = append(got, s.request)
	}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestReadDeclarationsErrors(t *testing.T) {
	for _, tc := range []struct{ text, want string }{
		{"name: docs\nbogus: 1\n", "x: line 2: field bogus not found"},
		{"name: docs\nschema:\n  fields:\n    - {id: 1, colour: pk}\n", "x: line 4: field colour not found"},
		{"name: docs\npartitions: 5\n", "x: line 2: cannot unmarshal !!int `5`"},
		{"name: [\n", "x: line 1: did not find expected node content"},
		{"db: prod\n", "x: collection 1 has no name"},
		{"", "x declares nothing"},
		{"---\n---\n", "x declares nothing"},
		{"name: a\n---\nname: a\ndb: default\n", "x: collection default/a is declared twice"},
		{"name: a\nlayout: parquet\n", `x: collection default/a: layout "parquet": the layouts are native and milvus`},
		{
			"name: a\npartitions: [{name: p}, {name: q}, {name: p}]\n", "x: collection default/a: partition p is declared twice",
		},
		{"name: a\nindexes: [{field: 1}]\n", "x: collection default/a: a declared index has no name"},
		{"name: a\nschema: {schemaRaw: '!'}\n", "x: collection default/a: schemaRaw is not base64"},
	} {
		_, err := readDeclarations("x", strings.NewReader(tc.text))
		if err == nil || err.Error() != tc.want {
			t.Errorf("%q:\ngot  %v\nwant %s", tc.text, err, tc.want)
		}
		if _, ok := errors.AsType[*usageError](err); !ok {
			t.Errorf("%q: not a usage error", tc.text)
		}
	}
}

// TestApplyLong checks that apply accepts the file in its help.
func TestApplyLong(t *testing.T) {
	var text []string
	for line := range strings.SplitSeq(applyLong, "\n") {
		if inner, ok := strings.CutPrefix(line, "  "); ok {
			text = append(text, inner)
		}
	}
	if _, err := readDeclarations("help", strings.NewReader(strings.Join(text, "\n"))); err != nil {
		t.Error(err)
	}
}

// TestCommandsInTexts checks that the commands in hints and examples exist and accept
// the flags there.
func TestCommandsInTexts(t *testing.T) {
	quoted := regexp.MustCompile("`(snapshotctl [^`]*)`")
	lines := make(map[string]string) // each with its origin
	for reason, hint := range hints {
		for _, m := range quoted.FindAllStringSubmatch(hint, -1) {
			lines[strings.ReplaceAll(m[1], "FIRST", "1")] = "hint for " + reason
		}
	}
	var walk func(*cobra.Command)
	walk = func(cmd *cobra.Command) {
		if cmd.Example == "" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		for line := range strings.SplitSeq(cmd.Example, "\n") {
			_, line, ok := strings.Cut(line, "snapshotctl ")
			if !ok {
				t.Errorf("%s: example %q", cmd.CommandPath(), line)
			}
			line, _, _ = strings.Cut(line, " > ")
			lines["snapshotctl "+line] = "example of " + cmd.CommandPath()
		}
		for _, c := range cmd.Commands() {
			walk(c)
		}
	}
	program := func() *cobra.Command { return Program{}.app(nil, io.Discard, io.Discard).root() }
	walk(program())
	for line, from := range lines {
		words := shellWords(line)[1:]
		cmd, rest, err := program().Find(words)
		if err != nil {
			t.Errorf("%s: %s: %v", from, line, err)
			continue
		}
		if cmd.HasSubCommands() && len(rest) > 0 {
			t.Errorf("%s: %s: no such command", from, line)
			continue
		}
		if err := cmd.ParseFlags(rest); err != nil {
			t.Errorf("%s: %s: %v", from, line, err)
			continue
		}
		if cmd.Flags().Changed("help") {
			continue
		}
		if err := cmd.ValidateArgs(cmd.Flags().Args()); err != nil {
			t.Errorf("%s: %s: %v", from, line, err)
		}
	}
}

// shellWords splits a line like a shell, as far as the texts need it.
func shellWords(line string) []string {
	var words []string
	for i, part := range strings.Split(line, "'") {
		if i%2 == 1 {
			words = append(words, part)
			continue
		}
		words = append(words, strings.Fields(part)...)
	}
	return words
}
