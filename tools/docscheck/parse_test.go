package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

// md lets tests write code fences with quotes, to fit into raw strings.
func md(s string) string { return strings.ReplaceAll(s, "'''", "```") }

func TestParse(t *testing.T) {
	doc, err := parse("x.md", md(`# Title
'''sh
$ not checked
'''
'''console
$ echo one \
  two
one two

$ cat <<END
> a
>
> b
> END
a

b
$ true
'''
1. In a list:
   '''console
   $ echo three
     three
   '''
'''console nocheck=needs three machines
$ reboot
'''
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []command{
		{line: 6, text: "echo one \\\n  two", want: []string{"one two", ""}, from: 7, to: 9},
		{line: 10, text: "cat <<END\na\n\nb\nEND", want: []string{"a", "", "b"}, from: 14, to: 17},
		{line: 18, text: "true", from: 18, to: 18},
		{line: 22, text: "echo three", want: []string{"  three"}, from: 22, to: 23, indent: "   "},
	}
	if diff := cmp.Diff(want, doc.commands, cmp.AllowUnexported(command{}), cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("commands (-want +got):\n%s", diff)
	}
	skipped := []unchecked{{25, "needs three machines"}}
	if diff := cmp.Diff(skipped, doc.unchecked, cmp.AllowUnexported(unchecked{})); diff != "" {
		t.Errorf("unchecked (-want +got):\n%s", diff)
	}
}

func TestParseReportsEveryMistake(t *testing.T) {
	_, err := parse("x.md", md(`
'''console
stray
$ true
'''
'''console nocheck
$ true
'''
'''console later
'''
'''console
`))
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		"x.md:3: output before the first command",
		"x.md:6: nocheck needs a reason",
		`x.md:9: unknown word after console: "later"`,
		"x.md:11: the fence is not closed",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want it to have %q", err, want)
		}
	}
}

func TestUpdate(t *testing.T) {
	text := md(`'''console
$ a
old
$ b
kept
'''
- '''console
  $ c
  '''
`)
	doc, err := parse("x.md", text)
	if err != nil {
		t.Fatal(err)
	}
	if got := doc.update(nil); got != text {
		t.Errorf("update with nothing: %s", cmp.Diff(text, got))
	}
	want := strings.Replace(text, "old\n", "new\n\nlines\n", 1)
	want = strings.Replace(want, "  $ c\n", "  $ c\n  more\n", 1)
	if got := doc.update(map[int][]string{0: {"new", "", "lines"}, 2: {"more"}}); got != want {
		t.Errorf("update (-want +got):\n%s", cmp.Diff(want, got))
	}
}
