package epoch

import (
	"bytes"
	"errors"
	"math"
	"testing"
	"time"

	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

func TestParseMarkKey(t *testing.T) {
	for name, want := range map[string]int64{
		markKey(1):                            1,
		markKey(math.MaxInt64):                math.MaxInt64,
		"gc/epoch/0000000000000000000.json":   0,
		"gc/epoch/1.json":                     0,
		"gc/epoch/0000000000000000001":        0,
		"gc/epoch/0000000000000000001.json.x": 0,
		"gc/epoch/-000000000000000001.json":   0,
		"gc/epoch/+000000000000000001.json":   0,
		"gc/epoch/x/0000000000000000001.json": 0,
		"gc/epoch/readme.json":                0,
	} {
		if got, ok := parseMarkKey(name); got != want || ok != (want > 0) {
			t.Errorf("%s: got %d, %v, want %d", name, got, ok, want)
		}
	}
}

// A mark with one altered digit is damaged.
func TestAlteredMarks(t *testing.T) {
	sound, err := encode(&mark{
		FormatVersion: formatVersion, Cluster: "c", Number: 3, Nonce: "n", Revision: 50, IDLimit: 2_000_000,
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
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

func TestNextIDLimit(t *testing.T) {
	for name, c := range map[string]struct{ current, next, minLimit, want int64 }{
		"first":                {0, 1, 0, 1 + Headroom},
		"enough left":          {1_000_001, 400_000, 0, 1_000_001},
		"few left":             {1_000_001, 600_000, 0, 1_600_000},
		"asked for":            {1_000_001, 5, 1_000_002, 2_000_002},
		"asked for fewer":      {1_000_001, 5, 9, 1_000_001},
		"never lower":          {9_000_000, 5, 8_000_000, 9_000_000},
		"the end":              {5, 5, math.MaxInt64 - 10, math.MaxInt64},
		"next is near the end": {5, math.MaxInt64 - 10, 0, math.MaxInt64},
		"at the end":           {math.MaxInt64, math.MaxInt64, 0, math.MaxInt64},
	} {
		if got := nextIDLimit(c.current, c.next, c.minLimit); got != c.want {
			t.Errorf("%s: got %d, want %d", name, got, c.want)
		}
	}
}

func TestRollbackReason(t *testing.T) {
	for name, c := range map[string]struct {
		done, recovered  int64
		intent           string // nonce; empty: none
		number, revision int64
		nonce, cluster   string
		want             bool // rolled back
	}{
		"done":                           {done: 5, number: 5},
		"older than what is done":        {done: 5, number: 4},
		"intended":                       {done: 5, intent: "n", number: 6, nonce: "n"},
		"done, another is intended":      {done: 5, intent: "n", number: 5, nonce: "m"},
		"intended by another":            {done: 5, intent: "n", number: 6, nonce: "m", want: true},
		"not intended":                   {done: 5, number: 6, want: true},
		"far beyond":                     {done: 5, intent: "n", number: 7, nonce: "n", want: true},
		"nothing is known":               {number: 1, want: true},
		"at the revision":                {done: 5, number: 5, revision: 100},
		"greater revision":               {done: 5, number: 5, revision: 101, want: true},
		"greater revision, intended":     {done: 5, intent: "n", number: 6, nonce: "n", revision: 101, want: true},
		"greater revision, recovered":    {done: 5, recovered: 5, number: 5, revision: 101},
		"greater revision, recovered 4":  {done: 5, recovered: 4, number: 5, revision: 101, want: true},
		"other cluster":                  {done: 5, number: 5, cluster: "other", want: true},
		"other cluster, recovered":       {done: 5, recovered: 5, number: 5, cluster: "other"},
		"recovered, but beyond":          {done: 5, recovered: 5, number: 6, want: true},
		"recovered, beyond and intended": {done: 5, recovered: 5, number: 6, intent: "n", nonce: "n"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &state{revision: 100, epoch: &storagev1.Epoch{Beat: c.done, Recovered: c.recovered}}
			if c.intent != "" {
				s.intent = &mark{Number: c.done + 1, Nonce: c.intent}
			}
			if c.cluster == "" {
				c.cluster = "mine"
			}
			m := &mark{Number: c.number, Revision: c.revision, Nonce: c.nonce, Cluster: c.cluster}
			if reason := rollbackReason(s, m, "mine"); (reason != "") != c.want {
				t.Errorf("got %q, want rolled back %v", reason, c.want)
			}
		})
	}
	if reason := rollbackReason(&state{epoch: &storagev1.Epoch{Beat: 5}}, nil, "mine"); reason != "" {
		t.Errorf("without a mark: got %q", reason)
	}
}

func TestApplyRecovery(t *testing.T) {
	for name, c := range map[string]struct {
		number, next, idLimit, lostBelow int64
		intended                         bool
		mark                             *mark
		want                             [5]int64 // number, recovered, next, idLimit, lostBelow
	}{
		"new": {want: [5]int64{0, 0, 1, 1, 1}},
		"rolled back": {
			number: 3, next: 10, idLimit: 100, mark: &mark{Number: 7, IDLimit: 200},
			want: [5]int64{7, 7, 200, 200, 200},
		},
		"rolled back, intended": {
			number: 3, next: 10, idLimit: 100, intended: true, mark: &mark{Number: 7, IDLimit: 200},
			want: [5]int64{7, 7, 200, 200, 200},
		},
		"by its revision": {
			number: 3, next: 10, idLimit: 100, intended: true, mark: &mark{Number: 3, IDLimit: 100},
			want: [5]int64{4, 4, 100, 100, 100},
		},
		"a higher lostBelow": {
			number: 3, next: 10, idLimit: 100, lostBelow: 300, mark: &mark{Number: 7, IDLimit: 200},
			want: [5]int64{7, 7, 200, 200, 300},
		},
		"forced": {
			number: 3, next: 10, idLimit: 100, lostBelow: 5, mark: &mark{Number: 3, IDLimit: 100},
			want: [5]int64{3, 3, 100, 100, 100},
		},
		"next beyond limits": {
			number: 3, next: 1000, idLimit: 0, mark: &mark{Number: 7, IDLimit: 200},
			want: [5]int64{7, 7, 1000, 1000, 1000},
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := &state{
				epoch: &storagev1.Epoch{Beat: c.number, Floor: c.lostBelow, Intent: []byte("x")},
				ids:   &storagev1.Allocator{Next: c.next, Ceiling: c.idLimit},
			}
			if c.intended {
				s.intent = &mark{Number: c.number + 1}
			}
			applyRecovery(s, c.mark)
			got := [5]int64{s.epoch.GetBeat(), s.epoch.GetRecovered(), s.ids.GetNext(), s.ids.GetCeiling(), s.epoch.GetFloor()}
			if got != c.want || len(s.epoch.GetIntent()) > 0 {
				t.Errorf("got %v, intent %q, want %v", got, s.epoch.GetIntent(), c.want)
			}
		})
	}
}

func TestDecode(t *testing.T) {
	good := `{"format_version":1,"cluster_id":"c","beat":"7","nonce":"n","revision":"3","ceiling":"9",` +
		`"time":"2026-01-02T03:04:05Z","later":1}`
	if m, err := decode(7, []byte(good)); err != nil || m.Number != 7 || m.IDLimit != 9 || m.Revision != 3 {
		t.Errorf("got %v, %v", m, err)
	}
	for name, data := range map[string]string{
		"empty": "", "no JSON": "x", "of another number": `{"format_version":1,"beat":"8","nonce":"n"}`,
		"newer": `{"format_version":2,"beat":"7","nonce":"n"}`, "no nonce": `{"format_version":1,"beat":"7"}`,
		"negative": `{"format_version":1,"beat":"7","nonce":"n","ceiling":"-1"}`,
		"long":     good + string(make([]byte, maxMarkBytes)),
	} {
		if m, err := decode(7, []byte(data)); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: got %v, %v", name, m, err)
		}
	}
}
