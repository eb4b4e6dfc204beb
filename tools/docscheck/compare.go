package main

import (
	"regexp"
	"slices"
	"strings"
)

// anything is the line that stands for any number of lines.
const anything = "..."

// masks are applied in this order. Each replaces a value that differs from run to run
// by a word for its kind, so that a time may become another time but not a size.
var masks = []struct {
	pattern *regexp.Regexp
	with    string
}{
	// /tmp/docscheck-1234/snapshotd-data
	{regexp.MustCompile(`/tmp/[^\s"',;)\]}]*`), "<tmp>"},
	// 2026-11-22T15:04:05.123Z, 2026-11-22 15:04:05, and the parts alone
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?([.,]\d+)?( ?(Z|UTC|[+-]\d\d:?\d\d))?`), "<time>"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d`), "<date>"},
	{regexp.MustCompile(`\b\d\d:\d\d:\d\d([.,]\d+)?`), "<clock>"},
	// 0b6f1c9e-6a43-4a7d-9f2e-5c1f0c6f3a10
	{regexp.MustCompile(`(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b`), "<id>"},
	// A replica's name: host, process id and a random part.
	{regexp.MustCompile(`\b[A-Za-z0-9][A-Za-z0-9.-]*-\d+-[a-z0-9]{6}\b`), "<replica>"},
	// v0.1.0-3-g3a297d9f4e7b-dirty, or just the digest
	{regexp.MustCompile(`\b(v\d+\.\d+\.\d+(-rc\.?\d+)?-\d+-g)?[0-9a-f]{8,64}(-dirty)?\b`), "<id>"},
	// 127.0.0.1:7070, localhost:7070, [::1]:7070
	{regexp.MustCompile(`(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\]):\d{2,5}\b`), "<address>"},
	// 12 B, 3.4 MiB, 120MB/s
	{regexp.MustCompile(`\b\d+(\.\d+)? ?([KMGTPE]i?)?B(/s)?\b`), "<size>"},
	// catalog revision 12, mod revision: 3
	{regexp.MustCompile(`\b(revision:?)\s+\d+`), "$1 <revision>"},
	// 1h30m, 12.5ms, -45ms
	{regexp.MustCompile(`(?:\B-)?\b(\d+(\.\d+)?(ns|us|µs|ms|s|m|h|d))+\b`), "<duration>"},
	{regexp.MustCompile(`\d+\.\d{3,}`), "<number>"},
	{regexp.MustCompile(`\d{4,}`), "<id>"},
	// The lines of a table and the spaces of its columns; JSON may have spaces after a
	// colon or a comma.
	{regexp.MustCompile(`-{3,}`), "---"},
	{regexp.MustCompile(`\s+`), " "},
	{regexp.MustCompile(`([,:]) `), "$1"},
}

// opaque matches page tokens and the like, which mix cases and digits.
var opaque = regexp.MustCompile(`[A-Za-z0-9_-]{20,}={0,2}`)

// mask replaces values that differ from run to run.
func mask(line string) string {
	line = opaque.ReplaceAllStringFunc(line, func(s string) string {
		if strings.ContainsAny(s, "0123456789") && strings.ToLower(s) != s && strings.ToUpper(s) != s {
			return "<token>"
		}
		return s
	})
	for _, m := range masks {
		line = m.pattern.ReplaceAllString(line, m.with)
	}
	return strings.TrimSpace(line)
}

// matches reports whether the output of a command matches the document.
func matches(want, got []string) bool {
	return matchLines(maskAll(want), maskAll(got))
}

func maskAll(lines []string) []string {
	masked := make([]string, 0, len(lines))
	for _, line := range trimBlank(lines) {
		masked = append(masked, mask(line))
	}
	return masked
}

// matchLines compares masked lines. It backtracks to the latest wildcard only: more
// lines for an earlier one cannot help.
func matchLines(want, got []string) bool {
	w, g := 0, 0
	wildcard, resume := -1, 0
	for g < len(got) {
		switch {
		case w < len(want) && want[w] == anything:
			wildcard, resume = w, g
			w++
		case w < len(want) && want[w] == got[g]:
			w, g = w+1, g+1
		case wildcard >= 0:
			resume++
			w, g = wildcard+1, resume
		default:
			return false
		}
	}
	for w < len(want) && want[w] == anything {
		w++
	}
	return w == len(want)
}

// trimBlank removes blank lines at both ends.
func trimBlank(lines []string) []string {
	blank := func(s string) bool { return strings.TrimSpace(s) == "" }
	for len(lines) > 0 && blank(lines[0]) {
		lines = lines[1:]
	}
	for len(lines) > 0 && blank(lines[len(lines)-1]) {
		lines = lines[:len(lines)-1]
	}
	return lines
}

// showsSomething reports whether the document has any output.
func showsSomething(want []string) bool {
	return slices.ContainsFunc(trimBlank(want), func(s string) bool { return strings.TrimSpace(s) != anything })
}
