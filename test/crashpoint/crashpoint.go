//go:build unix

// Package crashpoint kills its process at a step of a protocol: before or after a
// write to the metadata store or to an object store.
//
//	p, err := crashpoint.New(os.Getenv)
//	kv = p.KV(kv)
//	store = p.Store(store)
//
// # Points
//
// A point is a step and its side, before or after. These are steps:
//
//	create.commit  each transaction that has a name: see [meta.Txn]
//	create.refs    each write, copy or deletion of objects that [Names] lists, by the
//	               operation and the class of the key
//	elect.resign   the end of a lease, by the transaction that put a key under it
//	bucket.put     each request to a bucket that changes it, by its method and its
//	               parameters
//
// After means that the step was made, not that it succeeded: a transaction whose
// compares fail, or that gets no answer, counts. Each pass counts, in any goroutine.
//
// # Environment
//
//	SNAPSHOTD_CRASH=create.commit:before   kills the process at the first pass
//	SNAPSHOTD_CRASH=create.commit:after:2  kills the process at the second pass
//	SNAPSHOTD_CRASH_FROM=file              passes count from the creation of file on
//	SNAPSHOTD_CRASH_REACHED=file           the first pass of each point adds a line to
//	                                       file: create.commit:before
package crashpoint

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/snapshotd/snapshotd/internal/store/meta"
)

// The environment variables.
const (
	Variable        = "SNAPSHOTD_CRASH"
	FromVariable    = "SNAPSHOTD_CRASH_FROM"
	ReachedVariable = "SNAPSHOTD_CRASH_REACHED"
)

// The sides of a step.
const (
	Before = "before"
	After  = "after"
)

// Pass is a pass of a point. The zero Pass is none.
type Pass struct {
	Step, Side string
	Nth        int // from 1
}

func (p Pass) String() string { return fmt.Sprintf("%s:%s:%d", p.Step, p.Side, p.Nth) }

// Parse reads step:side or step:side:nth. Without nth it is the first pass.
func Parse(text string) (Pass, error) {
	parts := strings.Split(text, ":")
	p, err := Pass{Nth: 1}, error(nil)
	if len(parts) == 3 {
		p.Nth, err = strconv.Atoi(parts[2])
	}
	if len(parts) >= 2 {
		p.Step, p.Side = parts[0], parts[1]
	}
	if err != nil || len(parts) > 3 || p.Step == "" || p.Nth < 1 || p.Side != Before && p.Side != After {
		return Pass{}, fmt.Errorf("%q is not step:before or step:after, with or without :nth", text)
	}
	return p, nil
}

// Points counts the passes of all points, and kills the process at one of them. It
// is safe for concurrent use.
type Points struct {
	crash         Pass   // zero: none
	from, reached string // files; empty: none

	mu       sync.Mutex
	counting bool
	passes   map[string]int          // by step:side
	leases   map[meta.LeaseID]string // the first transaction that put a key under each
}

// New returns the points that the environment configures. It fails when
// SNAPSHOTD_CRASH is set and names no point.
func New(env func(string) string) (*Points, error) {
	p := &Points{
		from: env(FromVariable), reached: env(ReachedVariable), passes: map[string]int{}, leases: map[meta.LeaseID]string{},
	}
	if text := env(Variable); text != "" {
		var err error
		if p.crash, err = Parse(text); err != nil {
			return nil, fmt.Errorf("%s: %w", Variable, err)
		}
	}
	return p, nil
}

// around runs do as a step. An empty name is no step. It does not return when the
// process is killed.
func (p *Points) around(step string, do func()) {
	if step == "" {
		do()
		return
	}
	p.pass(step, Before)
	do()
	p.pass(step, After)
}

func (p *Points) pass(step, side string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.counts() {
		return
	}
	point := step + ":" + side
	p.passes[point]++
	n := p.passes[point]
	if n == 1 {
		p.record(point)
	}
	if at := (Pass{step, side, n}); at == p.crash {
		kill(at)
	}
}

// counts reports whether passes count yet. The caller holds p.mu.
func (p *Points) counts() bool {
	if !p.counting && p.from != "" {
		if _, err := os.Stat(p.from); err != nil {
			return false
		}
	}
	p.counting = true
	return true
}

// record adds a line to the file of points that were reached, if there is one. It
// panics when the file cannot be written: the point would be missed.
func (p *Points) record(line string) {
	if p.reached == "" {
		return
	}
	f, err := os.OpenFile(p.reached, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.WriteString(line + "\n")
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		panic(err)
	}
}

// kill ends the process as a loss of power would: nothing is closed or flushed. It
// never returns. The line that it prints distinguishes this end from another SIGKILL.
func kill(at Pass) {
	fmt.Fprintf(os.Stderr, "crash point %s\n", at)
	_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // until the signal arrives
}
