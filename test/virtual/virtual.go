// Package virtual runs tests in virtual time: testing/synctest, and one thing
// that the race detector needs with it.
package virtual

import (
	"testing"
	"testing/synctest"
)

// Test runs f in a bubble of its own, as [synctest.Test] does: its clock moves
// on when all its goroutines wait, so that a minute costs nothing.
//
// All tests in virtual time go through it (the linter sees to that). A binary
// built with the race detector has one processor once this package is linked
// into it, whatever GOMAXPROCS says: all timers of a bubble share one context of
// the detector, which two processors may use at once, and then the process
// crashes (https://go.dev/issue/78156). What happened before what is followed
// all the same, so races are still found.
func Test(t *testing.T, f func(*testing.T)) {
	t.Helper()
	synctest.Test(t, f)
}

// Wait waits until all goroutines of the bubble but the caller wait durably: see
// [synctest.Wait].
func Wait() { synctest.Wait() }
