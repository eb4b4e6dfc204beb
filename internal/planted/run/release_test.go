package main

import (
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"testing"
)

// TestCheckSettings refuses what was built with the tag of a planted bug.
func TestCheckSettings(t *testing.T) {
	for tags, refused := range map[string]bool{"": false, "short": false, "planted_p1": true, "netgo,planted_p12a": true, "replanted_p1": false} {
		info := &debug.BuildInfo{Settings: []debug.BuildSetting{{Key: "-trimpath", Value: "true"}, {Key: "-tags", Value: tags}}}
		if err := checkSettings("x", info); (err != nil) != refused {
			t.Errorf("%q: err = %v, want refused: %v", tags, err, refused)
		}
	}
	if err := checkSettings("x", &debug.BuildInfo{}); err != nil {
		t.Error(err)
	}
}

// TestCheckPrograms refuses a file that does not say how it was built, and takes
// this test.
func TestCheckPrograms(t *testing.T) {
	other := filepath.Join(t.TempDir(), "x")
	if err := os.WriteFile(other, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkPrograms(io.Discard, []string{other}); err == nil {
		t.Error("a file that is no program is taken for one without bugs")
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkPrograms(io.Discard, []string{self}); err != nil {
		t.Error(err)
	}
	if err := checkPrograms(io.Discard, nil); err == nil {
		t.Error("no program is taken for those that were asked about")
	}
}
