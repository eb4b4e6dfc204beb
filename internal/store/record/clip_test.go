package record_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/snapshotd/snapshotd/internal/store/record"
	storagev1 "github.com/snapshotd/snapshotd/internal/store/storagepb/snapshotd/storage/v1"
)

// TestClip holds that a record takes whatever an error says: no more than so much
// of it, and nothing that is no text.
func TestClip(t *testing.T) {
	const most = record.MaxText
	a := func(n int) string { return strings.Repeat("a", n) }
	for name, c := range map[string]struct{ text, want string }{
		"empty":                       {"", ""},
		"short":                       {"it failed: é", "it failed: é"},
		"short and invalid":           {"key \xff\xfe of a\xc3", "key \uFFFD of a\uFFFD"},
		"as long as may be":           {a(most), a(most)},
		"longer":                      {a(most + 1), a(most-3) + "…"},
		"a rune up to the cut":        {a(most-5) + "é" + a(10), a(most-5) + "é…"},
		"a rune across the cut":       {a(most-4) + "é" + a(10), a(most-4) + "…"},
		"a rune across the limit":     {a(most-1) + "é", a(most-3) + "…"},
		"a long rune across the cut":  {a(most-6) + "😀😀", a(most-6) + "…"},
		"made longer by what it says": {a(most-2) + "\xff", a(most-3) + "…"},
		"invalid across the cut":      {a(most-4) + "\xff" + a(10), a(most-4) + "…"},
	} {
		t.Run(name, func(t *testing.T) {
			got := record.Clip(c.text, most)
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if len(got) > most || !utf8.ValidString(got) {
				t.Errorf("%d bytes, valid: %v", len(got), utf8.ValidString(got))
			}
			record.Encode(&storagev1.Round{Format: record.Format, Error: got}) // panics unless it is valid
		})
	}
	if got := record.Clip("abcd", 3); got != "…" {
		t.Errorf("the shortest: %q", got)
	}
}
