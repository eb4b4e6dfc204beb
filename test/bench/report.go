package bench

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

// Report is what a run found.
type Report struct {
	Name   string
	Facts  []string // how the run was made, a sentence each
	Tables []Table
	Bars   []Bar
}

// Table is a table of results.
type Table struct {
	Title string
	Head  []string
	Rows  [][]string
}

// Add adds a row.
func (t *Table) Add(cells ...string) { t.Rows = append(t.Rows, cells) }

// Bar is what a result has to reach.
type Bar struct {
	What, Want, Got string
	OK              bool
	Timed           bool   // a busy machine can miss it
	Noise           string // why this run cannot judge it, or empty
}

// Verdict is pass, miss or inconclusive.
func (b Bar) Verdict() string {
	switch {
	case b.Noise != "":
		return "inconclusive"
	case b.OK:
		return "pass"
	}
	return "MISS"
}

// Count returns how many bars have each verdict.
func (r *Report) Count() (passed, missed, inconclusive int) {
	for _, b := range r.Bars {
		switch {
		case b.Noise != "":
			inconclusive++
		case b.OK:
			passed++
		default:
			missed++
		}
	}
	return passed, missed, inconclusive
}

func (r *Report) all() []Table {
	bars := Table{Title: "Bars", Head: []string{"bar", "limit", "measured", "verdict"}}
	for _, b := range r.Bars {
		verdict := b.Verdict()
		if b.Noise != "" {
			verdict += ": " + b.Noise
		}
		bars.Add(b.What, b.Want, b.Got, verdict)
	}
	if len(r.Bars) == 0 {
		return r.Tables
	}
	return append(slices.Clip(r.Tables), bars)
}

// Plain writes the report for a terminal.
func (r *Report) Plain(w io.Writer) {
	for _, f := range r.Facts {
		fmt.Fprintln(w, f)
	}
	for _, t := range r.all() {
		if len(t.Rows) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n%s\n", t.Title)
		width := make([]int, len(t.Head))
		for _, row := range append([][]string{t.Head}, t.Rows...) {
			for i, c := range row {
				width[i] = max(width[i], utf8.RuneCountInString(c))
			}
		}
		for _, row := range append([][]string{t.Head}, t.Rows...) {
			var line strings.Builder
			for i, c := range row {
				line.WriteString("  " + c + strings.Repeat(" ", width[i]-utf8.RuneCountInString(c)))
			}
			fmt.Fprintln(w, strings.TrimRight(line.String(), " "))
		}
	}
}

// Markdown returns the report for a document.
func (r *Report) Markdown() []byte {
	var b bytes.Buffer
	for _, f := range r.Facts {
		fmt.Fprintf(&b, "- %s\n", f)
	}
	for _, t := range r.all() {
		if len(t.Rows) == 0 {
			continue
		}
		fmt.Fprintf(
			&b,
			"\n**%s**\n\n| %s |\n|%s\n",
			t.Title,
			strings.Join(t.Head, " | "),
			strings.Repeat("---|", len(t.Head)),
		)
		for _, row := range t.Rows {
			fmt.Fprintf(&b, "| %s |\n", strings.Join(row, " | "))
		}
	}
	return b.Bytes()
}

// The exit codes of a benchmark that is strict.
const (
	exitMissed       = 1
	ExitInconclusive = 3
)

// Finish writes the report for a terminal, and into a file if one is named, and
// returns the code to exit with: 0 unless strict, when a bar was missed or could
// not be judged.
func (r *Report) Finish(w io.Writer, file string, strict bool) (code int, err error) {
	r.Plain(w)
	passed, missed, inconclusive := r.Count()
	fmt.Fprintf(w, "\n%d passed, %d missed, %d inconclusive\n", passed, missed, inconclusive)
	if file != "" {
		if err := r.WriteInto(file); err != nil {
			return 0, err
		}
	}
	switch {
	case strict && missed > 0:
		code = exitMissed
	case strict && inconclusive > 0:
		code = ExitInconclusive
	}
	return code, nil
}

// WriteInto writes the Markdown to a file: between the two lines that mark the
// place of this report in a document, or all of a file that does not exist.
func (r *Report) WriteInto(name string) error {
	begin, end := "<!-- "+r.Name+": begin -->\n", "<!-- "+r.Name+": end -->\n"
	text := begin + "\n" + string(r.Markdown()) + "\n" + end
	old, err := os.ReadFile(name)
	if os.IsNotExist(err) {
		return os.WriteFile(name, []byte(text), 0o600)
	}
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), begin)
	_, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		return fmt.Errorf("%s has no place for %s", name, r.Name)
	}
	return os.WriteFile(name, []byte(before+text+after), 0o600)
}

// Time writes seconds.
func Time(seconds float64) string {
	switch {
	case seconds >= 10:
		return fmt.Sprintf("%.1f s", seconds)
	case seconds >= 1:
		return fmt.Sprintf("%.2f s", seconds)
	case seconds >= 0.1:
		return fmt.Sprintf("%.0f ms", seconds*1000)
	}
	return fmt.Sprintf("%.1f ms", seconds*1000)
}

// Percent writes a share.
func Percent(share float64) string { return fmt.Sprintf("%.0f %%", share*100) }

// MiB writes bytes.
func MiB(n float64) string { return fmt.Sprintf("%.1f MiB", n/(1<<20)) }

// Today is the date, in UTC.
func Today() string { return time.Now().UTC().Format(time.DateOnly) }
