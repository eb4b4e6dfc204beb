//go:build crashpoints

package crashpoint

import (
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var (
	atFirst  = New("test.first")
	atSecond = New("test.second")
)

func TestNames(t *testing.T) {
	if diff := cmp.Diff([]string{"test.first", "test.second"}, Names()); diff != "" {
		t.Errorf("names differ (-want +got):\n%s", diff)
	}
}

func TestTakenName(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("the second point of a name was taken")
		}
	}()
	New("test.first")
}

func TestParse(t *testing.T) {
	for text, want := range map[string]where{
		"":                    {},
		"create.begin:before": {"create.begin", "before", 1},
		"create.begin:after":  {"create.begin", "after", 1},
		"create.begin:after:": {},
		"a:after:12":          {"a", "after", 12},
		"a:after:0":           {},
		"a:after:-1":          {},
		"a:after:1:1":         {},
		"a:between":           {},
		":before":             {},
		"a":                   {},
	} {
		got, err := parse(text)
		if got != want || (err != nil) != (want == where{} && text != "") {
			t.Errorf("parse(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
}

// TestKill runs itself as a child that passes both points three times.
func TestKill(t *testing.T) {
	if os.Getenv("CRASHPOINT_CHILD") != "" {
		for range 3 {
			atFirst.Before()
			atFirst.After()
			atSecond.Before()
			atSecond.After()
			os.Stdout.WriteString("passed\n")
		}
		os.Exit(0)
	}
	for ask, passes := range map[string]int{
		"": 3, "test.none:before": 3, "test.first:before": 0, "test.second:after": 0, "test.second:before:2": 1, "test.first:after:3": 2,
		"test.first:after:4": 3,
	} {
		child := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestKill$")
		child.Env = append(os.Environ(), "CRASHPOINT_CHILD=1", Variable+"="+ask)
		var told strings.Builder
		child.Stderr = &told
		out, _ := child.Output()
		status := child.ProcessState.Sys().(syscall.WaitStatus)
		killed := status.Signaled() && status.Signal() == syscall.SIGKILL
		if got := strings.Count(string(out), "passed"); got != passes || killed != (passes < 3) {
			t.Errorf("%q: %d passes, killed %v, want %d passes", ask, got, killed, passes)
		}
		if killed != strings.Contains(told.String(), "crash point "+ask) {
			t.Errorf("%q: it told %q", ask, told.String())
		}
	}
}
