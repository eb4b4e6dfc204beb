//go:build crashpoints

package crashpoint

import (
	"os"
	"os/exec"
	"path/filepath"
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

// inChild says that this process is a child that passes both points three times.
const inChild = "CRASHPOINT_CHILD"

// TestChild is the child, and nothing in any other process.
func TestChild(t *testing.T) {
	if os.Getenv(inChild) == "" {
		return
	}
	for range 3 {
		atFirst.Before()
		atFirst.After()
		atSecond.Before()
		atSecond.After()
		if _, err := os.Stdout.WriteString("passed\n"); err != nil {
			t.Fatal(err)
		}
		if name := os.Getenv(FromVariable); name != "" {
			if err := os.WriteFile(name, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// child runs a child, and returns how often it passed, whether it killed itself, and
// what it told.
func child(t *testing.T, env ...string) (passes int, killed bool, told string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestChild$")
	cmd.Env = append(append(os.Environ(), inChild+"=1"), env...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, _ := cmd.Output()
	status := cmd.ProcessState.Sys().(syscall.WaitStatus)
	killed = status.Signaled() && status.Signal() == syscall.SIGKILL
	if !killed && !cmd.ProcessState.Success() {
		t.Fatalf("the child failed: %s %s", out, stderr.String())
	}
	return strings.Count(string(out), "passed"), killed, stderr.String()
}

func TestKill(t *testing.T) {
	for ask, want := range map[string]int{
		"": 3, "test.none:before": 3, "test.first:before": 0, "test.second:after": 0, "test.second:before:2": 1, "test.first:after:3": 2,
		"test.first:after:4": 3,
	} {
		passes, killed, told := child(t, Variable+"="+ask)
		if passes != want || killed != (want < 3) {
			t.Errorf("%q: %d passes, killed %v, want %d passes", ask, passes, killed, want)
		}
		if killed != strings.Contains(told, "crash point "+ask) {
			t.Errorf("%q: it told %q", ask, told)
		}
	}
}

func TestFrom(t *testing.T) {
	for ask, want := range map[string]int{"test.first:before": 1, "test.second:after:2": 2, "test.second:after:3": 3} {
		passes, killed, _ := child(t, Variable+"="+ask, FromVariable+"="+filepath.Join(t.TempDir(), "from"))
		if passes != want || killed != (want < 3) {
			t.Errorf("%q: %d passes, killed %v, want %d passes", ask, passes, killed, want)
		}
	}
}

func TestReached(t *testing.T) {
	name := filepath.Join(t.TempDir(), "reached")
	child(t, Variable+"=test.second:before:2", ReachedVariable+"="+name)
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	const want = "test.first:before\ntest.first:after\ntest.second:before\ntest.second:after\n"
	if diff := cmp.Diff(want, string(text)); diff != "" {
		t.Errorf("what it noted differs (-want +got):\n%s", diff)
	}
}
