package etcd

import (
	"os"
	"strings"
	"testing"
)

func TestNewEnough(t *testing.T) {
	for text, want := range map[string]bool{
		"3.6.14": true, "3.6.15": true, "3.7.1": true, "3.7.3": true, "3.8.0": true, "3.8.0-rc.0": true, "4.0.0": true,
		"v3.7.3":        true,
		"3.6.14+vendor": true, "3.7.2-rc.1": true,
		"3.4.23": false, "3.4.43": false, "3.5.8": false, "3.5.99": false, "3.6.13": false, "3.7.0": false, "2.3.8": false,
		"3.7.1-rc.0": false, "3.7.0-alpha": false, "": false, "3.7": false, "latest": false, "3.7.x": false, "3.7.-1": false,
	} {
		if got := newEnough(text); got != want {
			t.Errorf("%q: new enough %v, want %v", text, got, want)
		}
	}
}

// The documentation has the releases of the code.
func TestMinimumIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	if want := "etcd " + MinimumVersions() + " or later"; !strings.Contains(string(text), want) {
		t.Errorf("docs/operations.md lacks %q", want)
	}
}
