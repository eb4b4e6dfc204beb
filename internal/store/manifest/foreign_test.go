//go:build !short

package manifest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestForeignReader reads the files by tools/avrocat, which uses another Avro library, and
// compares its output with this package.
func TestForeignReader(t *testing.T) {
	dir := t.TempDir()
	avrocat := filepath.Join(dir, "avrocat")
	build := exec.CommandContext(t.Context(), "go", "build", "-C", filepath.Join("..", "..", "..", "tools"), "-o",
		avrocat, "./avrocat")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build avrocat: %v\n%s", err, out)
	}
	cat := func(data []byte) []string {
		file := filepath.Join(dir, "file.avro")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		cmd := exec.CommandContext(t.Context(), avrocat, file)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("avrocat: %v\n%s", err, stderr.Bytes())
		}
		return strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	}

	for name, data := range map[string][]byte{
		"golden":    golden(t, "manifest-0.avro"),
		"generated": encode(t, makeSegments(700, 3)),
	} {
		var want []any
		r := open(t, data)
		for {
			_, err := r.Next()
			if err == io.EOF { //nolint:errorlint // as documented
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, plain(reflect.ValueOf(r.record)))
		}
		compareLines(t, name, want, cat(data))
	}

	var want []any
	r, err := openDatums(golden(t, "refs.avro"), refsSchema)
	if err != nil {
		t.Fatal(err)
	}
	for {
		ok, err := r.more()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			break
		}
		var record refsRecord
		if err := r.decode(&record); err != nil {
			t.Fatal(err)
		}
		want = append(want, plain(reflect.ValueOf(record)))
	}
	compareLines(t, "references", want, cat(golden(t, "refs.avro")))
}

func compareLines(t *testing.T, name string, want []any, lines []string) {
	t.Helper()
	if len(lines) != len(want) {
		t.Fatalf("%s: avrocat returned %d records, want %d", name, len(lines), len(want))
	}
	for i, line := range lines {
		d := json.NewDecoder(strings.NewReader(line))
		d.UseNumber()
		var got any
		if err := d.Decode(&got); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want[i], got); diff != "" {
			t.Fatalf("%s: record %d (-want +got):\n%s", name, i, diff)
		}
	}
}

// plain returns a record in the form that encoding/json decodes from avrocat's output.
func plain(v reflect.Value) any {
	switch v.Kind() {
	case reflect.Struct:
		m := make(map[string]any)
		for i := range v.NumField() {
			m[v.Type().Field(i).Tag.Get("avro")] = plain(v.Field(i))
		}
		return m
	case reflect.Slice:
		if v.Type().Elem().Kind() == reflect.Uint8 {
			text, err := json.Marshal(append([]byte{}, v.Bytes()...))
			if err != nil {
				panic(err)
			}
			return strings.Trim(string(text), `"`)
		}
		list := make([]any, v.Len())
		for i := range list {
			list[i] = plain(v.Index(i))
		}
		return list
	case reflect.Int32, reflect.Int64:
		return json.Number(fmt.Sprint(v.Int()))
	default:
		return v.Interface()
	}
}
