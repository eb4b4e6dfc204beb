package epoch

import (
	"bytes"
	"errors"
	"math"
	"testing"
	"time"

	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func TestBeatOf(t *testing.T) {
	for name, want := range map[string]int64{
		key(1):                                1,
		key(math.MaxInt64):                    math.MaxInt64,
		"gc/epoch/0000000000000000000.json":   0,
		"gc/epoch/1.json":                     0,
		"gc/epoch/0000000000000000001":        0,
		"gc/epoch/0000000000000000001.json.x": 0,
		"gc/epoch/-000000000000000001.json":   0,
		"gc/epoch/+000000000000000001.json":   0,
		"gc/epoch/x/0000000000000000001.json": 0,
		"gc/epoch/readme.json":                0,
	} {
		if got, ok := beatOf(name); got != want || ok != (want > 0) {
			t.Errorf("%s: got %d, %v, want %d", name, got, ok, want)
		}
	}
}

// A digit that was altered on the way does not make another note of one.
func TestAlteredNotes(t *testing.T) {
	sound, err := encode(&note{
		FormatVersion: formatVersion, Cluster: "c", Beat: 3, Nonce: "n", Revision: 50, Ceiling: 2_000_000, Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	})
	if err != nil {
		t.Fatal(err)
	}
	want, err := decode(3, sound)
	if err != nil {
		t.Fatal(err)
	}
	for i := range len(sound) - 1 { // the last is a newline
		altered := bytes.Clone(sound)
		altered[i] ^= 1
		if got, err := decode(3, altered); err == nil && *got != *want || err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: got %+v, %v", altered, got, err)
		}
	}
}

func TestCeiling(t *testing.T) {
	for name, c := range map[string]struct{ have, next, raise, want int64 }{
		"first":                {0, 1, 0, 1 + Headroom},
		"room enough":          {1_000_001, 400_000, 0, 1_000_001},
		"ids come near":        {1_000_001, 600_000, 0, 1_600_000},
		"asked for":            {1_000_001, 5, 1_000_002, 2_000_002},
		"asked for less":       {1_000_001, 5, 9, 1_000_001},
		"never lower":          {9_000_000, 5, 8_000_000, 9_000_000},
		"the end":              {5, 5, math.MaxInt64 - 10, math.MaxInt64},
		"next is near the end": {5, math.MaxInt64 - 10, 0, math.MaxInt64},
		"at the end":           {math.MaxInt64, math.MaxInt64, 0, math.MaxInt64},
	} {
		if got := ceiling(c.have, c.next, c.raise); got != c.want {
			t.Errorf("%s: got %d, want %d", name, got, c.want)
		}
	}
}

func TestJudge(t *testing.T) {
	for name, c := range map[string]struct {
		done, recovered int64
		intent          string // nonce; empty: none
		beat, revision  int64
		nonce, cluster  string
		want            bool // behind
	}{
		"done":                           {done: 5, beat: 5},
		"older than what is done":        {done: 5, beat: 4},
		"intended":                       {done: 5, intent: "n", beat: 6, nonce: "n"},
		"done, another is intended":      {done: 5, intent: "n", beat: 5, nonce: "m"},
		"intended by another":            {done: 5, intent: "n", beat: 6, nonce: "m", want: true},
		"not intended":                   {done: 5, beat: 6, want: true},
		"far beyond":                     {done: 5, intent: "n", beat: 7, nonce: "n", want: true},
		"nothing is known":               {beat: 1, want: true},
		"at the revision":                {done: 5, beat: 5, revision: 100},
		"greater revision":               {done: 5, beat: 5, revision: 101, want: true},
		"greater revision, intended":     {done: 5, intent: "n", beat: 6, nonce: "n", revision: 101, want: true},
		"greater revision, recovered":    {done: 5, recovered: 5, beat: 5, revision: 101},
		"greater revision, recovered 4":  {done: 5, recovered: 4, beat: 5, revision: 101, want: true},
		"other cluster":                  {done: 5, beat: 5, cluster: "other", want: true},
		"other cluster, recovered":       {done: 5, recovered: 5, beat: 5, cluster: "other"},
		"recovered, but beyond":          {done: 5, recovered: 5, beat: 6, want: true},
		"recovered, beyond and intended": {done: 5, recovered: 5, beat: 6, intent: "n", nonce: "n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &state{revision: 100, epoch: &storagev1.Epoch{Beat: c.done, Recovered: c.recovered}}
			if c.intent != "" {
				s.intent = &note{Beat: c.done + 1, Nonce: c.intent}
			}
			if c.cluster == "" {
				c.cluster = "mine"
			}
			n := &note{Beat: c.beat, Revision: c.revision, Nonce: c.nonce, Cluster: c.cluster}
			if why := judge(s, n, "mine"); (why != "") != c.want {
				t.Errorf("got %q, want behind %v", why, c.want)
			}
		})
	}
	if why := judge(&state{epoch: &storagev1.Epoch{Beat: 5}}, nil, "mine"); why != "" {
		t.Errorf("without a note: got %q", why)
	}
}

func TestSettle(t *testing.T) {
	for name, c := range map[string]struct {
		beat, next, ceiling, floor int64
		intended                   bool
		n                          *note
		want                       [5]int64 // beat, recovered, next, ceiling, floor
	}{
		"new":                  {want: [5]int64{0, 0, 1, 1, 1}},
		"behind":               {beat: 3, next: 10, ceiling: 100, n: &note{Beat: 7, Ceiling: 200}, want: [5]int64{7, 7, 200, 200, 200}},
		"behind, intended":     {beat: 3, next: 10, ceiling: 100, intended: true, n: &note{Beat: 7, Ceiling: 200}, want: [5]int64{7, 7, 200, 200, 200}},
		"by its revision":      {beat: 3, next: 10, ceiling: 100, intended: true, n: &note{Beat: 3, Ceiling: 100}, want: [5]int64{4, 4, 100, 100, 100}},
		"a higher floor":       {beat: 3, next: 10, ceiling: 100, floor: 300, n: &note{Beat: 7, Ceiling: 200}, want: [5]int64{7, 7, 200, 200, 300}},
		"forced":               {beat: 3, next: 10, ceiling: 100, floor: 5, n: &note{Beat: 3, Ceiling: 100}, want: [5]int64{3, 3, 100, 100, 100}},
		"next beyond ceilings": {beat: 3, next: 1000, ceiling: 0, n: &note{Beat: 7, Ceiling: 200}, want: [5]int64{7, 7, 1000, 1000, 1000}},
	} {
		t.Run(name, func(t *testing.T) {
			s := &state{
				epoch: &storagev1.Epoch{Beat: c.beat, Floor: c.floor, Intent: []byte("x")},
				ids:   &storagev1.Allocator{Next: c.next, Ceiling: c.ceiling},
			}
			if c.intended {
				s.intent = &note{Beat: c.beat + 1}
			}
			settle(s, c.n)
			got := [5]int64{s.epoch.GetBeat(), s.epoch.GetRecovered(), s.ids.GetNext(), s.ids.GetCeiling(), s.epoch.GetFloor()}
			if got != c.want || len(s.epoch.GetIntent()) > 0 {
				t.Errorf("got %v, intent %q, want %v", got, s.epoch.GetIntent(), c.want)
			}
		})
	}
}

func TestDecode(t *testing.T) {
	good := `{"format_version":1,"cluster_id":"c","beat":"7","nonce":"n","revision":"3","ceiling":"9","time":"2026-01-02T03:04:05Z","later":1}`
	if n, err := decode(7, []byte(good)); err != nil || n.Beat != 7 || n.Ceiling != 9 || n.Revision != 3 {
		t.Errorf("got %v, %v", n, err)
	}
	for name, data := range map[string]string{
		"empty": "", "no JSON": "x", "of another beat": `{"format_version":1,"beat":"8","nonce":"n"}`,
		"newer": `{"format_version":2,"beat":"7","nonce":"n"}`, "no nonce": `{"format_version":1,"beat":"7"}`,
		"negative": `{"format_version":1,"beat":"7","nonce":"n","ceiling":"-1"}`,
		"long":     good + string(make([]byte, maxNoteBytes)),
	} {
		if n, err := decode(7, []byte(data)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: got %v, %v", name, n, err)
		}
	}
}
