// Package lasting logs a problem once for as long as it lasts, and counts how often
// it is met. Loops meet the same problem at each turn: a line for each turn hides
// all others.
//
// # States
//
//	      Failed: logged                 Failed with a further cause: logged
//	none ----------------> lasting (n) <---------------------------------+
//	  ^                     |      |  Failed: n is counted up             |
//	  +---------------------+      +-------------------------------------+
//	   Passed: logged with n
//
// A problem that comes back within quietTime of its end with a cause that it had is
// counted without a line, and so is its next end: it comes and goes.
//
// A cause is what an error wraps at its end, such as object.ErrFull: the text around
// it names objects and times, which differ at each turn. Digits are no cause either.
//
// # Failures
//
//	process dies   the next one logs the problem again
//	many causes    those beyond maxCauses of one problem are counted and not logged
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
	maxCauses     = 16  // logged of one problem while it lasts
	maxCauseBytes = 200 // compared of one cause

	quietTime = 10 * time.Minute
)

// Problems are those of one process. The methods are safe for concurrent use.
type Problems struct {
	now func() time.Time

	mu   sync.Mutex
	list []*Problem
}

// New returns Problems without any.
func New(now func() time.Time) *Problems { return &Problems{now: now} }

// Problem is one thing that may fail at each turn of a loop. Its methods are safe
// for concurrent use.
type Problem struct {
	of   *Problems
	name string
	text string
	stop string
	log  *zap.Logger

	mu     sync.Mutex
	since  time.Time // zero: it does not last
	ended  time.Time // the last time; zero: never
	quiet  bool      // it came back soon, and its end is not logged
	err    error
	failed int64 // since then
	total  int64
	causes map[string]bool
}

// State is a problem that lasts, or has lasted.
type State struct {
	Name   string
	Stops  string // what stands still meanwhile; empty: nothing that is deleted or expires
	Error  string // the last one; empty: it does not last
	Since  time.Time
	Failed int64 // how often since then
	Total  int64 // how often since the start
}

// Add adds a problem, or returns the one that has the name. The name labels metrics; text is the line of the log; stops
// says what expiry, removal or collection waits for it, empty for none.
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

// States returns all problems by name, with those that do not last.
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

// State returns how the problem is.
func (p *Problem) State() State {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := State{Name: p.name, Stops: p.stop, Since: p.since, Failed: p.failed, Total: p.total}
	if p.err != nil {
		s.Error = p.err.Error()
	}
	return s
}

// Failed counts a failure, and logs it as a warning when the problem did not last
// yet or has a cause that it did not have.
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
	further := false
	for _, cause := range causes(err) {
		if !p.causes[cause] && len(p.causes) < maxCauses {
			p.causes[cause], further = true, true
		}
	}
	if further {
		p.quiet = false
		p.log.Warn(p.text+"; this is logged once while it lasts", append(fields, zap.Error(err))...)
	}
}

// Passed ends the problem, and logs that when it lasted and its begin was logged.
func (p *Problem) Passed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.since.IsZero() {
		return
	}
	p.ended = p.of.now()
	if !p.quiet {
		p.log.Info("over: "+p.text, zap.Int64("failures", p.failed), zap.Duration("lasted", p.ended.Sub(p.since)))
	}
	p.since, p.err, p.failed = time.Time{}, nil, 0
}

// Note is Failed, or Passed without an error.
func (p *Problem) Note(err error, fields ...zap.Field) {
	if err == nil {
		p.Passed()
		return
	}
	p.Failed(err, fields...)
}

// causes returns the texts of what err wraps at its ends, without digits.
func causes(err error) []string {
	switch wrapped := err.(type) { //nolint:errorlint // the tree of errors is walked
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
