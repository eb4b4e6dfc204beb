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

// Report has the results of a run.
type Report struct {
	Name   string
	Facts  []string // sentences about the run
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

// Bar is the limit of a result.
type Bar struct {
	What, Want, Got string
	OK              bool
	Timed           bool   // depends on the load of the machine
	Noise           string // the reason why the result is inconclusive, or empty
}

// Verdict returns pass, MISS or inconclusive.
func (b Bar) Verdict() string {
	switch {
	case b.Noise != "":
		return "inconclusive"
	case b.OK:
		return "pass"
	}
	return "MISS"
}

// Count returns the number of bars per verdict.
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

// Plain writes the report as text to a terminal.
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

// Markdown returns the report as Markdown.
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

// The exit codes of a strict run.
const (
	exitMissed       = 1
	ExitInconclusive = 3
)

// Finish writes the report to w and, unless file is empty, into a file. It returns
// the exit code: 0, or in a strict run exitMissed or ExitInconclusive for a missed
// or an inconclusive bar.
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

// WriteInto writes the Markdown to a file: between the two marks of this report,
// or as a new file.
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
		return fmt.Errorf("%s has no marks for %s", name, r.Name)
	}
	return os.WriteFile(name, []byte(before+text+after), 0o600)
}

// Time formats seconds.
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

// Percent formats a share.
func Percent(share float64) string { return fmt.Sprintf("%.0f %%", share*100) }

// MiB formats bytes.
func MiB(n float64) string { return fmt.Sprintf("%.1f MiB", n/(1<<20)) }

// Today returns the date, in UTC.
func Today() string { return time.Now().UTC().Format(time.DateOnly) }
