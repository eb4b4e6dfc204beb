package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/big"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
	"github.com/snapshotd/snapshotd/test/allocated"
)

// checkUsage fails unless err is a usage error.
func checkUsage(t *testing.T, what string, err error) {
	t.Helper()
	if _, ok := errors.AsType[*usageError](err); !ok {
		t.Errorf("%s: %v (%T) is not a usage error", what, err, err)
	}
}

// FuzzTimeSpan parses any text as a time span. A result is within the limits, and
// formatting and parsing it again returns the same.
func FuzzTimeSpan(f *testing.F) {
	for _, s := range []string{
		"", "1h", "30d", "36525d", "36526d", "1.5d", "-1h", "+1h", "0", "0d", "d", "1d2h", "1e3h", "100000000000h",
		"99999999999999999999d", "1µs", "1ns", "876600h", " 1h", "1h\n",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		d, err := parseTTL(s)
		if err != nil {
			checkUsage(t, s, err)
			if d != 0 {
				t.Errorf("%q: %v and %v", s, d, err)
			}
		} else {
			if d <= 0 || d > maxTTLDays*day {
				t.Errorf("%q is %v", s, d)
			}
			if reparsed, err := parseTTL(d.String()); err != nil || reparsed != d {
				t.Errorf("%q is %v, and that %v, %v", s, d, reparsed, err)
			}
		}
		pin, errPin := parsePinTTL(s, "")
		switch {
		case errPin != nil:
			checkUsage(t, s, errPin)
			if s == "" || err == nil && d >= time.Second && d <= maxPinTTL {
				t.Errorf("%q: %v", s, errPin)
			}
		case s == "":
			if pin != nil {
				t.Error(pin)
			}
		case pin.AsDuration() != d || d < time.Second || d > maxPinTTL || pin.CheckValid() != nil:
			t.Errorf("%q is %v, of a pin %v", s, d, pin)
		}
	})
}

// FuzzTime parses any text as a time. A result is a valid message, and formatting and
// parsing it again returns the same.
func FuzzTime(f *testing.F) {
	for _, s := range []string{
		"", "2030-01-31T00:00:00Z", "2030-01-31T00:00:00+01:00", "2030-02-30T00:00:00Z", "0001-01-01T00:00:00Z",
		"9999-12-31T23:59:59.999999999Z",
		"2030-01-31t00:00:00z", "2030-01-31T24:00:00Z", "2030-01-31T00:00:00,5Z", "2030-01-31T00:00:60Z",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ts, err := parseTime(s)
		if err != nil {
			checkUsage(t, s, err)
			return
		}
		if err := ts.CheckValid(); err != nil {
			t.Fatalf("%q is parsed as a time that no message can hold: %v", s, err)
		}
		reparsed, err := parseTime(ts.AsTime().Format(time.RFC3339Nano))
		if err != nil || !proto.Equal(ts, reparsed) {
			t.Errorf("%q is %v, and that %v, %v", s, ts.AsTime(), reparsed, err)
		}
	})
}

// FuzzByteCount parses any text as a number of bytes, and compares the result with a
// calculation that cannot overflow.
func FuzzByteCount(f *testing.F) {
	for _, s := range []string{
		"", "1", "1B", "1 B", "500KiB", "50 MiB", "8388607TiB", "8388608TiB", "9223372036854775807", "9223372036854775808",
		"0", "-1", "+1", "1KB", "KiB", "1KiBB", "1_000", "0x10", "1e3", "\u00a01B",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := parseBytes(s)
		if err != nil {
			checkUsage(t, s, err)
			if n != 0 {
				t.Errorf("%q: %d and %v", s, n, err)
			}
			return
		}
		if s == "" {
			if n != 0 {
				t.Errorf("nothing is %d", n)
			}
			return
		}
		number, shift := s, uint(0)
		for i, unit := range []string{"B", "KiB", "MiB", "GiB", "TiB"} {
			if rest, ok := strings.CutSuffix(s, unit); ok && (i > 0 || !strings.HasSuffix(rest, "i")) {
				number, shift = rest, uint(10*i)
			}
		}
		want, ok := new(big.Int).SetString(strings.TrimSpace(number), 10)
		if !ok || want.Lsh(want, shift).Cmp(big.NewInt(n)) != 0 || n <= 0 {
			t.Errorf("%q is %d, want %v", s, n, want)
		}
		if reparsed, err := parseBytes(fmt.Sprintf("%dB", n)); err != nil || reparsed != n {
			t.Errorf("%q is %d, and that %d, %v", s, n, reparsed, err)
		}
	})
}

// FuzzArguments parses any text as each kind of argument: a collection, a snapshot, ids,
// labels, positions, a deleter.
func FuzzArguments(f *testing.F) {
	for _, s := range []string{
		"", "docs", "db/docs", "#7", "#", "#0", "#-7", "#+7", "#9223372036854775808", "a/b/c", "/a", "a/", "#07", "1,2",
		"1,,2", ",", "a=b", "=", "a==", "a=b=c",
		"0=1", "0=1,1=18446744073709551615", "2147483648=1", "0=1,0=2", "00=1,0=2", "SNAPSHOTD", "caller", "\xff",
		"\xff=\xff", "ſnapshotd",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if ref, err := parseCollection(s); err != nil {
			checkUsage(t, s, err)
		} else {
			var reparsed string
			switch n := ref.GetName(); {
			case n == nil:
				reparsed = fmt.Sprintf("#%d", ref.GetId())
			case n.GetDb() != "":
				reparsed = n.GetDb() + "/" + n.GetName()
			default:
				reparsed = n.GetName()
			}
			if got, err := parseCollection(reparsed); err != nil || !proto.Equal(got, ref) ||
				ref.GetName() == nil && ref.GetId() <= 0 {
				t.Errorf("%q is %v, and that %v, %v", s, ref, got, err)
			}
		}
		if ref, err := parseSnapshot(s); err != nil {
			checkUsage(t, s, err)
		} else if ref.GetId() <= 0 && ref.GetName() != s {
			t.Errorf("%q is %v", s, ref)
		}
		if ids, err := parseIDs([]string{s}); err != nil {
			checkUsage(t, s, err)
		} else {
			var texts []string
			for _, id := range ids {
				if id <= 0 {
					t.Errorf("%q has id %d", s, id)
				}
				texts = append(texts, fmt.Sprint(id))
			}
			if reparsed, err := parseIDs(texts); err != nil || fmt.Sprint(reparsed) != fmt.Sprint(ids) {
				t.Errorf("%q is %d, and that %d, %v", s, ids, reparsed, err)
			}
		}
		if labels, err := parseLabels([]string{s}); err != nil {
			checkUsage(t, s, err)
		} else {
			for k, v := range labels {
				if k == "" || k+"="+v != s {
					t.Errorf("%q is %q = %q", s, k, v)
				}
			}
		}
		if ps, err := parsePositions([]string{s}); err != nil {
			checkUsage(t, s, err)
		} else {
			seen := map[int32]bool{}
			for _, p := range ps {
				if p.GetShard() < 0 || seen[p.GetShard()] {
					t.Errorf("%q has shard %d", s, p.GetShard())
				}
				seen[p.GetShard()] = true
			}
		}
		if _, err := parseDeleter(s); err != nil {
			checkUsage(t, s, err)
		}
		if cleaned := clean(s); !utf8.ValidString(cleaned) || strings.ContainsFunc(cleaned, func(r rune) bool {
			return !unicode.IsPrint(r)
		}) {
			t.Errorf("%q is shown as %q", s, cleaned)
		}
	})
}

// FuzzSegmentLines reads any data as a file of segments. The result, written like
// `catalog export`, is read back as the same. The batches hold all segments, in order.
func FuzzSegmentLines(f *testing.F) {
	line := `{"id":"7","partitionId":"2","state":"STATE_SEALED","rows":"3",` +
		`"files":[{"path":"a/b","kind":"insert","sizeBytes":"4"}],"attributes":{"k":"v"}}`
	for _, s := range []string{
		"", "\n", " \r\n", line, line + "\n\n" + line + "\r\n", line + line, line[:30], `{"id":"0"}`, `{"id":-1}`,
		`{"id":7.0}`, `{"id":7e0}`, `{"ID":7}`, `{"id":7,"id":8}`, "null", "[]", "\ufeff" + line,
		`{"id":1,"engineData":"!"}`, `{"id":1,"unknown":1}`, `{"id":1,"rows":1e400}`, strings.Repeat("[", 20_000),
		`{"id":1,"attributes":{"\ud800":""}}`, `{"id":1,"indexBuilds":[` + strings.Repeat("{},", 5000) + "{}]}",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var all []*snapshotdv1.Segment
		var err error
		took := allocated.Bytes(func() {
			err = sendBatches(newSegmentLines("file", bytes.NewReader(data)).next, func(batch []*snapshotdv1.Segment) error {
				if len(batch) == 0 || len(batch) > maxBatch {
					t.Errorf("a batch of %d", len(batch))
				}
				all = append(all, batch...)
				return nil
			})
		})
		if took > uint64(1<<20+300*len(data)) {
			t.Errorf("%d bytes took %d bytes of memory", len(data), took)
		}
		if err != nil {
			checkUsage(t, "file", err)
			if !strings.HasPrefix(err.Error(), "file, line ") || strings.Contains(err.Error(), "proto:") {
				t.Errorf("%v: no position", err)
			}
		}
		var out bytes.Buffer
		for _, s := range all {
			if s.GetId() <= 0 {
				t.Errorf("segment %d", s.GetId())
			}
			line, err := compactJSON(s)
			if err != nil {
				t.Fatal(err)
			}
			out.Write(append(line, '\n'))
		}
		reparsed := newSegmentLines("file", &out)
		for i, want := range all {
			if got, err := reparsed.next(); err != nil || !proto.Equal(want, got) {
				t.Fatalf("segment %d: %v became %v, %v", i, want, got, err)
			}
		}
		if _, err := reparsed.next(); !errors.Is(err, io.EOF) {
			t.Errorf("after the last: %v", err)
		}
	})
}

// FuzzDeclarations reads any data as a file for `catalog apply`, in bounded memory, and
// plans it against an empty catalog and against a catalog where it is applied.
func FuzzDeclarations(f *testing.F) {
	const sound = `db: prod
name: docs
schema:
  fields:
    - {id: 100, name: pk, dataType: Int64, primaryKey: true}
  schemaRaw: AQI=
channels: [docs-0]
roots: [{store: default, prefix: engine/}]
layout: milvus
properties: {a: "true"}
partitions: [{name: p1}]
indexes: [{name: i, field: 100}]
`
	bomb := "a: &a [x,x,x,x,x,x,x,x,x]\n"
	for i := range 8 {
		bomb += fmt.Sprintf(
			"%c: &%c [*%c,*%c,*%c,*%c,*%c,*%c,*%c,*%c]\n", 'b'+i, 'b'+i, 'a'+i, 'a'+i, 'a'+i, 'a'+i, 'a'+i, 'a'+i, 'a'+i, 'a'+i,
		)
	}
	for _, s := range []string{
		"", "---\n---\n", sound, sound + "---\n" + sound, "name: a\n---\nname: b\n", "name: [a]", "name: a\nname: b",
		"nam: a", "- a", "name: a\nid: 1e3", "name: a\nlayout: x",
		"name: a\nschema: {schemaRaw: '!'}", "name: a\npartitions: [{}]", "name: a\npartitions: [{name: p},{name: p}]",
		"name: !!binary gA==", "name: a\n<<: {db: x}", "name: &a [*a]", "name: a\nproperties: &a {b: *a}",
		"name: a\nproperties: {? [a] : b}", "name: \x00", "\xff\xfe", bomb,
		"name: a\nid: 0x7fffffffffffffff\nproperties: {1: 2}", "%YAML 9.9\n---\nname: a",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var all []declaration
		var err error
		took := allocated.Bytes(func() { all, err = readDeclarations("file", bytes.NewReader(data)) })
		if took > uint64(16<<20+2000*len(data)) {
			t.Errorf("%d bytes took %d bytes of memory", len(data), took)
		}
		if err != nil {
			checkUsage(t, "file", err)
			if strings.Contains(err.Error(), "cli.") && !strings.Contains(string(data), "cli.") {
				t.Errorf("%v contains the name of a Go type", err)
			}
			return
		}
		for _, d := range all {
			if d.Name == "" || d.DB == "" {
				t.Errorf("%q/%q", d.DB, d.Name)
			}
			p, err := diff(d, collectionState{})
			if err != nil || len(p.steps) != 1+len(d.Partitions)+len(d.Indexes) {
				t.Fatalf("%d steps against an empty catalog, %v", len(p.steps), err)
			}
			for _, s := range p.steps {
				if s.Action != created || s.request == nil {
					t.Errorf("%s %s: %s", s.Thing, s.Name, s.Action)
				}
			}
			checkApplied(t, d, p)
		}
	})
}

// checkApplied plans a declaration again after every step of p is applied.
func checkApplied(t *testing.T, d declaration, p plan) {
	t.Helper()
	current := collectionState{
		collection: &snapshotdv1.Collection{Id: max(d.ID, 1)}, partitions: &snapshotdv1.ListPartitionsResponse{},
		indexes: &snapshotdv1.ListIndexesResponse{},
	}
	for _, s := range p.steps {
		switch r := s.request.(type) {
		case *snapshotdv1.CreateCollectionRequest:
			c := current.collection
			c.Schema, c.Channels, c.Roots, c.Layout = r.GetSchema(), r.GetChannels(), r.GetRoots(), r.GetLayout()
			c.ConsistencyLevel, c.Properties, c.Attributes = r.GetConsistencyLevel(), r.GetProperties(), r.GetAttributes()
			if d.ID < 0 { // the server rejects it
				return
			}
		case *snapshotdv1.CreatePartitionRequest:
			current.partitions.Partitions = append(current.partitions.Partitions, &snapshotdv1.Partition{
				Id: r.GetId(), Name: r.GetName(), Attributes: r.GetAttributes(),
			})
		case *snapshotdv1.CreateIndexRequest:
			current.indexes.Indexes = append(current.indexes.Indexes, &snapshotdv1.Index{
				Id: r.GetId(), Name: r.GetName(), FieldId: r.GetFieldId(), TypeParams: r.GetTypeParams(),
				IndexParams: r.GetIndexParams(), Attributes: r.GetAttributes(),
			})
		default:
			t.Fatalf("%T", r)
		}
	}
	reparsed, err := diff(d, current)
	if err != nil {
		t.Fatalf("applied, but diff fails: %v", err)
	}
	for _, s := range reparsed.steps {
		if s.Action != unchanged || s.request != nil {
			t.Errorf("%s %s is applied, but planned as %s: %v", s.Thing, s.Name, s.Action, s.Changed)
		}
	}
}
