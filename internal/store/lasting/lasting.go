// Package lasting logs a repeated problem once until it ends, and counts its occurrences.
// Loops encounter the same problem in each iteration: a line per iteration would hide all
// other lines.
//
// # States
//
//	      Failed: logged                 Failed with a new cause: logged
//	none ----------------> lasting (n) <---------------------------------+
//	  ^                     |      |  Failed: n is incremented           |
//	  +---------------------+      +-------------------------------------+
//	   Passed: logged with n
//
// A problem that returns within quietTime of its end with a known cause is counted without a
// line, and so is its next end.
//
// A cause is the innermost wrapped error, such as object.ErrFull: the text around it has
// objects and times, which differ in each iteration. Digits are ignored.
//
// # Failures
//
//	process dies   the next process logs the problem again
//	many causes    causes beyond maxCauses of one problem are counted and not logged
package lasting

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"go.uber.org/zap"
)

const (
	maxCauses     = 16  // logged causes of one problem until it ends
	maxCauseBytes = 200 // compared bytes of one cause

	quietTime  = 10 * time.Minute
	settleTime = time.Minute
)

// Problems is the set of problems of one process. Its methods are safe for concurrent use.
type Problems struct {
	now func() time.Time

	mu   sync.Mutex
	list []*Problem
}

// New returns an empty set.
func New(now func() time.Time) *Problems { return &Problems{now: now} }

// Problem is one operation that may fail in each iteration of a loop. Its methods are safe for
// concurrent use.
type Problem struct {
	of   *Problems
	name string
	text string
	stop string
	log  *zap.Logger

	mu     sync.Mutex
	since  time.Time // zero: not failing
	ended  time.Time // the last end; zero: never
	quiet  bool      // it returned soon, and its end is not logged
	err    error
	failed int64 // since then
	total  int64
	causes map[string]bool
}

// State is the state of a problem.
type State struct {
	Name   string
	Stops  string // the blocked work, for users, such as "expiry of snapshots"; empty: none
	Error  string // the last error; empty: not failing
	Since  time.Time
	Failed int64 // failures since then
	Total  int64 // failures since the start
}

// Add adds a problem, or returns the existing one with the name. The name labels metrics; text
// is the log message; stops names for users the work that waits for it; empty: none.
func (p *Problems) Add(log *zap.Logger, name, text, stops string) *Problem {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at := slices.IndexFunc(p.list, func(x *Problem) bool { return x.name == name }); at >= 0 {
		return p.list[at]
	}
	if log == nil {
		log = zap.NewNop()
	}
	added := &Problem{of: p, name: name, text: text, stop: stops, log: log}
	p.list = append(p.list, added)
	return added
}

// States returns the states of all problems, sorted by name, including those that are not
// failing.
func (p *Problems) States() []State {
	p.mu.Lock()
	list := slices.Clone(p.list)
	p.mu.Unlock()
	states := make([]State, 0, len(list))
	for _, x := range list {
		states = append(states, x.State())
	}
	slices.SortStableFunc(states, func(a, b State) int { return cmp.Compare(a.Name, b.Name) })
	return states
}

// State returns the current state.
func (p *Problem) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := State{Name: p.name, Stops: p.stop, Since: p.since, Failed: p.failed, Total: p.total}
	if p.err != nil {
		s.Error = p.err.Error()
	}
	return s
}

// Failed counts a failure. It logs a warning if the problem begins or has a new cause.
func (p *Problem) Failed(err error, fields ...zap.Field) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		p.since = p.of.now()
		p.quiet = !p.ended.IsZero() && p.since.Sub(p.ended) < quietTime
		if !p.quiet {
			p.causes = map[string]bool{}
		}
	}
	p.err = err
	p.failed++
	p.total++
	newCause := false
	for _, cause := range causes(err) {
		if !p.causes[cause] && len(p.causes) < maxCauses {
			p.causes[cause], newCause = true, true
		}
	}
	if newCause {
		p.quiet = false
		p.log.Warn(p.text+"; logged once until it ends", append(fields, zap.Error(err))...)
	}
}

// Passed ends the problem. It logs the end if the start was logged.
func (p *Problem) Passed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.pass()
}

// Settle calls Passed in a minute unless Failed or stop is called before. It is for an
// operation that succeeds by not ending, such as a watch.
func (p *Problem) Settle() (stop func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		return func() {}
	}
	total := p.total
	timer := time.AfterFunc(settleTime, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.total == total {
			p.pass()
		}
	})
	return func() { timer.Stop() }
}

// pass ends the problem. The lock must be held.
func (p *Problem) pass() {
	if p.since.IsZero() {
		return
	}
	p.ended = p.of.now()
	if !p.quiet {
		p.log.Info("ended: "+p.text, zap.Int64("failures", p.failed), zap.Duration("lasted", p.ended.Sub(p.since)))
	}
	p.since, p.err, p.failed = time.Time{}, nil, 0
}

// Note calls Failed, or Passed if err is nil.
func (p *Problem) Note(err error, fields ...zap.Field) {
	if err == nil {
		p.Passed()
		return
	}
	p.Failed(err, fields...)
}

// causes returns the texts of the innermost wrapped errors, without digits.
func causes(err error) []string {
	switch wrapped := err.(type) { //nolint:errorlint // walks the error tree
	case interface{ Unwrap() error }:
		if inner := wrapped.Unwrap(); inner != nil {
			return causes(inner)
		}
	case interface{ Unwrap() []error }:
		var list []string
		for _, inner := range wrapped.Unwrap() {
			list = append(list, causes(inner)...)
		}
		if len(list) > 0 {
			return list
		}
	}
	text := strings.Map(func(r rune) rune {
		if r >= '0' && r <= '9' {
			return -1
		}
		return r
	}, fmt.Sprint(err))
	return []string{text[:min(len(text), maxCauseBytes)]}
}
