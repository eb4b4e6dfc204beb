package embed

import (
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
)

// TestSettingsInDocuments compares the defaults and the bounds in docs/operations.md
// with the table of settings.
func TestSettingsInDocuments(t *testing.T) {
	text, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	row := regexp.MustCompile("^\\| `([a-z_]+)` \\| ([^|]+) \\| (.*) \\|$")
	bounds := regexp.MustCompile(`(\S+) to (\S+)`)
	atLeast := regexp.MustCompile(`at least (\S+)`)
	rows := map[string][]string{}
	for line := range strings.Lines(string(text)) {
		if m := row.FindStringSubmatch(strings.TrimSuffix(line, "\n")); m != nil {
			m[2], m[3] = strings.Trim(m[2], "`"), strings.NewReplacer("`", "", ".", "", ";", "").Replace(m[3])
			rows[m[1]] = m
		}
	}
	c := Default()
	found := 0
	for _, s := range c.settings() {
		m := rows[s.name]
		if m == nil {
			continue
		}
		found++
		if got := boundText(s.fallback); m[2] != got {
			t.Errorf("%s: the default in the document is %s, in the table %s", s.name, m[2], got)
		}
		if b := bounds.FindStringSubmatch(m[3]); b != nil && b[0] != fmt.Sprintf("%s to %s", boundText(s.min),
			boundText(s.max)) &&
			regexp.MustCompile(`^\d`).MatchString(b[1]) && regexp.MustCompile(`^\d`).MatchString(b[2]) {
			t.Errorf("%s: the document has bounds %s, the table %v to %v", s.name, b[0], s.min, s.max)
		}
		if b := atLeast.FindStringSubmatch(m[3]); b != nil && b[1] != boundText(s.min) {
			t.Errorf("%s: the document has a minimum of %s, the table %v", s.name, b[1], s.min)
		}
	}
	if found < 15 {
		t.Errorf("%d settings found in the document", found)
	}
}

// TestSettingTypes checks that the type of each default and bound is that of its field.
func TestSettingTypes(t *testing.T) {
	c := Default()
	for _, s := range c.settings() {
		for _, v := range []any{s.fallback, s.min, s.max} {
			if v != nil && fmt.Sprintf("*%T", v) != fmt.Sprintf("%T", s.value) {
				t.Errorf("%s is a %T and has a %T", s.name, s.value, v)
			}
		}
		if s.help == "" {
			t.Errorf("%s has no help", s.name)
		}
	}
}
