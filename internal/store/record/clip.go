package record

import "strings"

// MaxText is how many bytes of a text that may say anything, as an error does, a
// record keeps.
const MaxText = 1024

// Clip returns what is kept of text: no more than most bytes, at least 3, that end
// in "…" when some are left out, and valid UTF-8, for records and messages take
// nothing else.
func Clip(text string, most int) string {
	const more = "…"
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= most {
		return text
	}
	return strings.ToValidUTF8(text[:most-len(more)], "") + more // without the rune that was cut
}
