package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// A document is a file, as lines, with its commands.
type document struct {
	name      string // as printed
	lines     []string
	commands  []command
	unchecked []unchecked
}

// A command is one example: the input and its output.
type command struct {
	line   int    // of the "$ ", counted from 1
	text   string // without the prompts
	want   []string
	from   int // want is lines[from:to] of the document
	to     int
	indent string // of the fence, removed from each line
}

// unchecked is a block that is not run.
type unchecked struct {
	line   int
	reason string
}

// fence matches the start of a block, possibly in a list: the prefix, the marks and the
// info string.
var fence = regexp.MustCompile("^(\\s*(?:(?:[-*]|\\d+\\.) +)?)(```+)([^`]*)$")

const (
	prompt       = "$ "
	continuation = "> "
)

// parse finds the examples in a document. It reports all errors, not only the first.
func parse(name, text string) (*document, error) {
	doc := &document{name: name, lines: strings.Split(text, "\n")}
	var errs []error
	fail := func(line int, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s:%d: %s", name, line, fmt.Sprintf(format, args...)))
	}
	for i := 0; i < len(doc.lines); i++ {
		match := fence.FindStringSubmatch(doc.lines[i])
		if match == nil {
			continue
		}
		indent := strings.Repeat(" ", len(match[1]))
		marks, label := match[2], match[3]
		start := i + 1
		end := start
		for end < len(doc.lines) && strings.TrimSpace(doc.lines[end]) != marks {
			end++
		}
		if end == len(doc.lines) {
			fail(start, "the fence is not closed")
			break
		}
		i = end
		language, info, _ := strings.Cut(strings.TrimSpace(label), " ")
		if language != "console" {
			continue
		}
		switch reason, ok := strings.CutPrefix(strings.TrimSpace(info), "nocheck"); {
		case ok && strings.Trim(reason, "= ") != "":
			doc.unchecked = append(doc.unchecked, unchecked{line: start, reason: strings.Trim(reason, "= ")})
			continue
		case ok:
			fail(start, "nocheck needs a reason: ```console nocheck=REASON")
			continue
		case info != "":
			fail(start, "unknown word after console: %q", info)
			continue
		}
		commands, stray := parseBlock(doc.lines, start, end, indent)
		for _, line := range stray {
			fail(line, "output before the first command; commands start with %q", prompt)
		}
		doc.commands = append(doc.commands, commands...)
	}
	return doc, errors.Join(errs...)
}

// parseBlock reads lines[start:end]. It returns the numbers of the lines without a
// command.
func parseBlock(lines []string, start, end int, indent string) (commands []command, stray []int) {
	for i := start; i < end; i++ {
		line := strings.TrimPrefix(lines[i], indent)
		text, ok := strings.CutPrefix(line, prompt)
		if !ok {
			if strings.TrimSpace(line) != "" {
				stray = append(stray, i+1)
			}
			continue
		}
		c := command{line: i + 1, text: text, indent: indent}
		for i++; i < end; i++ {
			line = strings.TrimPrefix(lines[i], indent)
			// An editor may have removed the space after a bare prompt.
			more, prompted := strings.CutPrefix(line+" ", continuation)
			if !prompted && !strings.HasSuffix(c.text, `\`) {
				break
			}
			if !prompted {
				more = line
			}
			c.text += "\n" + strings.TrimRight(more, " ")
		}
		c.from = i
		for i < end && !strings.HasPrefix(strings.TrimPrefix(lines[i], indent), prompt) {
			c.want = append(c.want, strings.TrimPrefix(lines[i], indent))
			i++
		}
		c.to = i
		i-- // the next command, or the fence
		commands = append(commands, c)
	}
	return commands, stray
}

// update returns the text of the document with the outputs in got, by the number of the
// command.
func (d *document) update(got map[int][]string) string {
	var out []string
	next := 0
	for i, c := range d.commands {
		printed, ok := got[i]
		if !ok {
			continue
		}
		out = append(out, d.lines[next:c.from]...)
		for _, line := range printed {
			if line != "" {
				line = c.indent + line
			}
			out = append(out, line)
		}
		next = c.to
	}
	return strings.Join(append(out, d.lines[next:]...), "\n")
}
