package epoch

import (
	"bytes"
	"errors"
	"math"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/test/allocated"
)

// FuzzMark decodes arbitrary bytes as the mark with an arbitrary number. A decoded mark has
// that number, and is the same after encoding and decoding; anything else is damaged.
func FuzzMark(f *testing.F) {
	sound, err := encode(&mark{
		FormatVersion: formatVersion, Cluster: "c", Number: 7, Nonce: "n", Revision: 12, IDLimit: 1_000_001,
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{
		nil, sound, sound[:len(sound)-3], slices.Concat(sound, sound), slices.Concat(sound, make([]byte, maxMarkBytes)),
		slices.Concat(sound, bytes.Repeat([]byte(" "), maxMarkBytes-len(sound))),
		[]byte(`{}`), []byte(`null`), []byte(`{"format_version":2,"beat":"7"}`),
		[]byte(`{"format_version":1,"beat":"7","nonce":"\ud800","revision":"-1"}`),
		[]byte(`{"FORMAT_VERSION":1,"Beat":"7","NONCE":"n","time":"0000-01-01T00:00:00+23:59"}`),
		[]byte(`{"format_version":1,"beat":"7","nonce":"n","time":"9999-12-31T23:59:59-23:59"}`),
		bytes.Repeat([]byte("["), maxMarkBytes),
	} {
		f.Add(int64(7), data)
	}
	f.Fuzz(func(t *testing.T, number int64, data []byte) {
		var m *mark
		var err error
		// Reads are bounded, so a longer object is longer by one byte at most.
		if took := allocated.Bytes(func() { m, err = decode(number, data) }); took > uint64(64<<10+20*len(data)) {
			t.Errorf("%d bytes took %d bytes of memory", len(data), took)
		}
		if err != nil {
			if m != nil || !errors.Is(err, ErrDamaged) {
				t.Fatalf("%v, err = %v, want ErrDamaged", m, err)
			}
			return
		}
		if m.Number != number || m.Nonce == "" || m.Revision < 0 || m.IDLimit < 0 || len(data) > maxMarkBytes {
			t.Fatalf("%+v was decoded as mark %d", m, number)
		}
		encoded, err := encode(m)
		if err != nil {
			t.Fatal(err)
		}
		// Escapes can make the canonical form longer than the input.
		decoded, err := decode(number, encoded)
		if err != nil && len(encoded) <= maxMarkBytes {
			t.Fatalf("decode the encoded mark: %v", err)
		}
		if err == nil && !cmp.Equal(m, decoded) {
			t.Errorf("(-decoded +encoded and decoded):\n%s", cmp.Diff(m, decoded))
		}
	})
}

// FuzzParseMarkKey parses arbitrary keys: a number is returned only for its canonical key.
func FuzzParseMarkKey(f *testing.F) {
	for _, name := range []string{
		"", markKey(1), markKey(math.MaxInt64), markKey(0), "gc/epoch/1.json", "gc/epoch/0000000000000000001",
		"gc/epoch/+000000000000000001.json", "0000000000000000001.json",
		"gc/epoch/gc/epoch/0000000000000000001.json", "gc/epoch/9999999999999999999.json",
	} {
		f.Add(name, int64(1))
	}
	f.Fuzz(func(t *testing.T, name string, n int64) {
		number, ok := parseMarkKey(name)
		if ok && (number < 1 || markKey(number) != name) || !ok && number != 0 {
			t.Errorf("%q: number %d, %v", name, number, ok)
		}
		if got, ok := parseMarkKey(markKey(n)); ok != (n > 0) || ok && got != n {
			t.Errorf("key of mark %d: %d, %v", n, got, ok)
		}
		if m := n ^ 1; n > 0 && m > 0 && (n < m) != (markKey(n) < markKey(m)) {
			t.Errorf("the keys of marks %d and %d are in another order", n, m)
		}
	})
}
