//go:build crashpoints

package crashpoint

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// Enabled says whether this program was built with crash points.
const Enabled = true

// The environment variables: where to crash, the file from whose making on passes
// count, and the file that takes the points that were passed.
const (
	Variable        = "SNAPSHOTD_CRASH"
	FromVariable    = "SNAPSHOTD_CRASH_FROM"
	ReachedVariable = "SNAPSHOTD_CRASH_REACHED"
)

// The sides of a step.
const (
	sideBefore = "before"
	sideAfter  = "after"
)

// Point is a step at which a crash is tried. It is safe for concurrent use.
type Point struct {
	name          string
	before, after *atomic.Int64 // how often each was passed
}

// registry is the names of all points.
var registry struct {
	sync.Mutex
	names []string
}

// New enters a point under its name and returns it. It panics when the name is
// taken, which is seen as soon as the program starts.
func New(name string) Point {
	registry.Lock()
	defer registry.Unlock()
	if slices.Contains(registry.names, name) {
		panic("crash point " + name + " is there twice")
	}
	registry.names = append(registry.names, name)
	return Point{name: name, before: new(atomic.Int64), after: new(atomic.Int64)}
}

// Names returns the names of all points, sorted.
func Names() []string {
	registry.Lock()
	defer registry.Unlock()
	return slices.Sorted(slices.Values(registry.names))
}

// Before comes before the step. It may not return.
func (p Point) Before() { p.pass(sideBefore, p.before) }

// After comes after the step. It may not return.
func (p Point) After() { p.pass(sideAfter, p.after) }

func (p Point) pass(side string, count *atomic.Int64) {
	if !counts() {
		return
	}
	n := count.Add(1)
	if n == 1 {
		note(p.name + ":" + side)
	}
	if w := asked(); w.name == p.name && w.side == side && w.nth == n {
		kill(w)
	}
}

// begun is set once passes count.
var begun atomic.Bool

// counts says whether passes count: from the start, or from when there is the file
// that the environment names.
func counts() bool {
	if begun.Load() {
		return true
	}
	if name := os.Getenv(FromVariable); name != "" {
		if _, err := os.Stat(name); err != nil {
			return false
		}
	}
	begun.Store(true)
	return true
}

// note adds a line to the file that the environment names, if it names one. What
// cannot be noted is a panic: it would be missed.
func note(line string) {
	name := os.Getenv(ReachedVariable)
	if name == "" {
		return
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.WriteString(line + "\n")
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		panic(err)
	}
}

// where is where to crash. The zero where is nowhere.
type where struct {
	name, side string
	nth        int64
}

func (w where) String() string { return fmt.Sprintf("%s:%s:%d", w.name, w.side, w.nth) }

// asked returns what the environment asks for. A text that it cannot be is a panic:
// a crash that cannot come must not pass for one that did not.
var asked = sync.OnceValue(func() where {
	w, err := parse(os.Getenv(Variable))
	if err != nil {
		panic(err)
	}
	return w
})

// parse reads name:side or name:side:nth; an empty text is nowhere.
func parse(text string) (where, error) {
	if text == "" {
		return where{}, nil
	}
	parts := strings.Split(text, ":")
	w, err := where{nth: 1}, error(nil)
	if len(parts) == 3 {
		w.nth, err = strconv.ParseInt(parts[2], 10, 64)
	}
	if len(parts) >= 2 {
		w.name, w.side = parts[0], parts[1]
	}
	if err != nil || len(parts) > 3 || w.name == "" || w.nth < 1 || w.side != sideBefore && w.side != sideAfter {
		return where{}, fmt.Errorf("%s: %q is not name:before or name:after, with :nth or without", Variable, text)
	}
	return w, nil
}

// kill ends the process as a loss of power would: nothing is closed, nobody is
// told. It never returns. What it prints first tells this end from another SIGKILL.
func kill(w where) {
	fmt.Fprintf(os.Stderr, "crash point %s\n", w)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // until the signal is there
}
