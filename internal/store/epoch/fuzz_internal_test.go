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

// FuzzNote reads anything as the note of any beat. One that is read is of that beat
// and can be written, and is then the same; anything else is damaged.
func FuzzNote(f *testing.F) {
	sound, err := encode(&note{
		FormatVersion: formatVersion, Cluster: "c", Beat: 7, Nonce: "n", Revision: 12, Ceiling: 1_000_001, Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	})
	if err != nil {
		f.Fatal(err)
	}
	for _, data := range [][]byte{
		nil, sound, sound[:len(sound)-3], slices.Concat(sound, sound), slices.Concat(sound, make([]byte, maxNoteBytes)), slices.Concat(sound, bytes.Repeat([]byte(" "), maxNoteBytes-len(sound))),
		[]byte(`{}`), []byte(`null`), []byte(`{"format_version":2,"beat":"7"}`),
		[]byte(`{"format_version":1,"beat":"7","nonce":"\ud800","revision":"-1"}`), []byte(`{"FORMAT_VERSION":1,"Beat":"7","NONCE":"n","time":"0000-01-01T00:00:00+23:59"}`),
		[]byte(`{"format_version":1,"beat":"7","nonce":"n","time":"9999-12-31T23:59:59-23:59"}`), bytes.Repeat([]byte("["), maxNoteBytes),
	} {
		f.Add(int64(7), data)
	}
	f.Fuzz(func(t *testing.T, beat int64, data []byte) {
		var n *note
		var err error
		// It is read with a bound, so what is longer is one byte longer at most.
		if took := allocated.Bytes(func() { n, err = decode(beat, data) }); took > uint64(64<<10+20*len(data)) {
			t.Errorf("%d bytes took %d bytes of memory", len(data), took)
		}
		if err != nil {
			if n != nil || !errors.Is(err, ErrDamaged) {
				t.Fatalf("%v, err = %v, want ErrDamaged", n, err)
			}
			return
		}
		if n.Beat != beat || n.Nonce == "" || n.Revision < 0 || n.Ceiling < 0 || len(data) > maxNoteBytes {
			t.Fatalf("%+v was read as a note of beat %d", n, beat)
		}
		written, err := encode(n)
		if err != nil {
			t.Fatal(err)
		}
		// The text of a note may be longer in canonical form, by escapes.
		again, err := decode(beat, written)
		if err != nil && len(written) <= maxNoteBytes {
			t.Fatalf("read what was written: %v", err)
		}
		if err == nil && !cmp.Equal(n, again) {
			t.Errorf("(-read +written and read):\n%s", cmp.Diff(n, again))
		}
	})
}

// FuzzBeatOf reads the beat of any key: it is that of the key which the beat has, and
// of no other.
func FuzzBeatOf(f *testing.F) {
	for _, name := range []string{
		"", key(1), key(math.MaxInt64), key(0), "gc/epoch/1.json", "gc/epoch/0000000000000000001", "gc/epoch/+000000000000000001.json",
		"0000000000000000001.json", "gc/epoch/gc/epoch/0000000000000000001.json", "gc/epoch/9999999999999999999.json",
	} {
		f.Add(name, int64(1))
	}
	f.Fuzz(func(t *testing.T, name string, n int64) {
		beat, ok := beatOf(name)
		if ok && (beat < 1 || key(beat) != name) || !ok && beat != 0 {
			t.Errorf("%q: beat %d, %v", name, beat, ok)
		}
		if got, ok := beatOf(key(n)); ok != (n > 0) || ok && got != n {
			t.Errorf("key of beat %d: %d, %v", n, got, ok)
		}
		if m := n ^ 1; n > 0 && m > 0 && (n < m) != (key(n) < key(m)) {
			t.Errorf("beats %d and %d are in another order", n, m)
		}
	})
}
