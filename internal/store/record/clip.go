package record

import "strings"

// MaxText bounds a free text in a record, such as an error, in bytes.
const MaxText = 1024

// Clip returns text as valid UTF-8, which records and messages require, cut to at most
// limit bytes. A cut text ends in "…". limit is at least 3.
func Clip(text string, limit int) string {
	const more = "…"
	text = strings.ToValidUTF8(text, "\uFFFD")
	if len(text) <= limit {
		return text
	}
	return strings.ToValidUTF8(text[:limit-len(more)], "") + more // without a partial rune
}
