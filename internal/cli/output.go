package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	snapshotdv1 "github.com/snapshotd/snapshotd/api/gen/snapshotd/v1"
)

// callFunc is a unary call of a generated stub.
type callFunc[Req, Resp any] func(context.Context, *Req, ...grpc.CallOption) (*Resp, error)

// print prints a message in the selected format; table renders the table format.
func (a *app) print(msg proto.Message, table func(io.Writer)) error {
	data, err := protojson.Marshal(msg)
	if err != nil {
		return err
	}
	return a.printJSON(data, table)
}

// printValue is print for a value that is not an API message.
func (a *app) printValue(v any, table func(io.Writer)) error {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false) // as protojson
	if err := enc.Encode(v); err != nil {
		return err
	}
	return a.printJSON(bytes.TrimSpace(b.Bytes()), table)
}

func (a *app) printJSON(data []byte, table func(io.Writer)) error {
	var b bytes.Buffer
	switch a.output {
	case formatJSON:
		// protojson varies its white space from build to build.
		if err := json.Indent(&b, data, "", "  "); err != nil {
			return err
		}
		b.WriteByte('\n')
	case formatYAML:
		text, err := toYAML(data)
		if err != nil {
			return err
		}
		b.Write(text)
	default:
		table(&b)
	}
	_, err := a.out.Write(b.Bytes())
	return err
}

// printLine prints a message as one line of JSON or one document of YAML.
func (a *app) printLine(msg proto.Message) error {
	data, err := compactJSON(msg)
	if err != nil {
		return err
	}
	if a.output == formatYAML {
		if data, err = toYAML(data); err != nil {
			return err
		}
		data = append([]byte("---\n"), data...)
	} else {
		data = append(data, '\n')
	}
	_, err = a.out.Write(data)
	return err
}

// compactJSON returns a message as JSON without white space.
func compactJSON(msg proto.Message) ([]byte, error) {
	data, err := protojson.Marshal(msg)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	err = json.Compact(&b, data)
	return b.Bytes(), err
}

// toYAML turns JSON into YAML with sorted keys.
func toYAML(data []byte) ([]byte, error) {
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, err
	}
	var b bytes.Buffer
	enc := yaml.NewEncoder(&b)
	enc.SetIndent(2)
	if err := enc.Encode(v); err != nil {
		return nil, err
	}
	err := enc.Close()
	return b.Bytes(), err
}

// list prints items one by one, in constant memory: as rows of a table, or as the only
// list of an object. close ends it.
type list struct {
	app   *app
	key   string // name of the list within the object
	table *table
	n     int
}

func (a *app) list(key string, header ...string) *list {
	return &list{app: a, key: key, table: newTable(a.out, "", header...)}
}

// add prints one item; cells is its row of the table.
func (l *list) add(msg proto.Message, cells ...any) error {
	l.n++
	if l.app.output == formatTable {
		l.table.row(cells...)
		return nil
	}
	data, err := protojson.Marshal(msg)
	if err != nil {
		return err
	}
	var b bytes.Buffer
	if l.app.output == formatYAML {
		if l.n == 1 {
			fprintf(&b, "%s:\n", l.key)
		}
		data, err = toYAML(slices.Concat([]byte("["), data, []byte("]")))
		b.Write(data)
	} else {
		if l.n == 1 {
			fprintf(&b, "{\n  %q: [\n    ", l.key)
		} else {
			b.WriteString(",\n    ")
		}
		err = json.Indent(&b, data, "    ", "  ")
	}
	if err != nil {
		return err
	}
	_, err = l.app.out.Write(b.Bytes())
	return err
}

// flush prints the rows added so far.
func (l *list) flush() error {
	if l.app.output == formatTable {
		return l.table.flush()
	}
	return nil
}

func (l *list) close() error {
	end := ""
	switch {
	case l.app.output == formatTable:
		return l.table.flush()
	case l.n == 0:
		end = "{}\n"
	case l.app.output == formatJSON:
		end = "\n  ]\n}\n"
	}
	_, err := io.WriteString(l.app.out, end)
	return err
}

// table aligns its rows in columns. Columns keep their positions across flushes,
// unless a later cell is wider.
type table struct {
	out    io.Writer
	indent string
	buf    bytes.Buffer
	tabs   *tabwriter.Writer
	widths []int // maximum width of each column so far
	fresh  bool  // nothing was written since the last flush
}

func newTable(out io.Writer, indent string, header ...string) *table {
	t := &table{out: out, indent: indent, fresh: true}
	t.tabs = tabwriter.NewWriter(&t.buf, 0, 0, 2, ' ', 0)
	cells := make([]any, len(header))
	for i, h := range header {
		cells[i] = h
	}
	t.row(cells...)
	return t
}

func (t *table) row(cells ...any) {
	texts := make([]string, len(cells))
	for i, c := range cells {
		texts[i] = cell(c)
		if i == len(t.widths) {
			t.widths = append(t.widths, 0)
		}
		width := utf8.RuneCountInString(texts[i])
		if last := i == len(cells)-1; t.fresh && !last && width < t.widths[i] {
			texts[i] += strings.Repeat(" ", t.widths[i]-width)
		}
		t.widths[i] = max(t.widths[i], width)
	}
	t.fresh = false
	fprintf(t.tabs, "%s%s\n", t.indent, strings.Join(texts, "\t"))
}

func (t *table) flush() error {
	if err := t.tabs.Flush(); err != nil {
		return err
	}
	t.fresh = true
	_, err := t.out.Write(t.buf.Bytes())
	t.buf.Reset()
	return err
}

// cell formats a value as a cell. An empty string becomes a dash, so that no row ends
// with white space.
func cell(v any) string {
	switch v := v.(type) {
	case *timestamppb.Timestamp:
		return formatTime(v)
	case string:
		if v == "" {
			return "-"
		}
		return clean(v)
	default:
		return clean(fmt.Sprint(v))
	}
}

// keyValues prints pairs of name and value, one per line.
func keyValues(w io.Writer, indent string, pairs ...any) {
	width := 0
	for i := 0; i < len(pairs); i += 2 {
		width = max(width, len(pairs[i].(string)))
	}
	for i := 0; i < len(pairs); i += 2 {
		fprintf(w, "%s%-*s %s\n", indent, width+1, pairs[i].(string)+":", cell(pairs[i+1]))
	}
}

// fprintf prints to a writer in memory or to standard error, without an error to check.
func fprintf(w io.Writer, format string, args ...any) { _, _ = fmt.Fprintf(w, format, args...) }

// clean makes outside text safe for a terminal: it quotes text with control
// characters, which may move the cursor or break a line.
func clean(s string) string {
	if !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return strconv.Quote(s)
	}
	return s
}

// size formats a number of bytes with a unit.
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for units := "KMGTPE"; ; unit++ {
		// 1023.95 would show as 1024.0.
		if f < 1023.95 || unit == len(units)-1 {
			return fmt.Sprintf("%.1f %ciB", f, units[unit])
		}
		f /= 1024
	}
}

// formatTime formats a time; nil becomes a dash.
func formatTime(t *timestamppb.Timestamp) string {
	if t == nil {
		return "-"
	}
	return t.AsTime().UTC().Format(time.RFC3339)
}

// dataTime formats a data timestamp. The maximum is the cut of a channel without an
// end.
func dataTime(t uint64) string {
	if t == 1<<64-1 {
		return "end"
	}
	return strconv.FormatUint(t, 10)
}

// formatMap formats a map on one line.
func formatMap(m map[string]string) string {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		if b.Len() > 0 {
			b.WriteByte(',')
		}
		b.WriteString(clean(k) + "=" + clean(m[k]))
	}
	return b.String()
}

// enumName returns the name of an enum value in lower case, without its prefix.
func enumName(v fmt.Stringer, prefix string) string {
	return strings.ToLower(strings.TrimPrefix(v.String(), prefix))
}

// stateName returns the name of a state as in the documents: COMMITTED.
func stateName(v fmt.Stringer) string { return strings.TrimPrefix(v.String(), "STATE_") }

func renderKey(w io.Writer, r *snapshotdv1.GetKeyResponse) {
	kind := r.GetType()
	if kind == "" {
		kind = "unknown; value in base64"
	}
	keyValues(w, "",
		"key", r.GetKey(),
		"create revision", r.GetCreateRevision(),
		"mod revision", r.GetModRevision(),
		"leased", r.GetLeased(),
		"type", kind,
	)
	var b bytes.Buffer
	if err := json.Indent(&b, []byte(r.GetJson()), "", "  "); err != nil {
		fprintf(w, "%s\n", clean(r.GetJson()))
		return
	}
	fprintf(w, "%s\n", b.String())
}
