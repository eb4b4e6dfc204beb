// Package hosts gives tests the clocks of hosts: their wall clocks may be wrong, and
// the hosts may sleep. It is for tests in virtual time.
package hosts

import (
	"sync/atomic"
	"time"
)

// Host is the clock of a host. It implements the Clock of internal/store/clock. The
// zero Host has the right time; Boot it before its first use.
type Host struct {
	Off   Shift // of the wall clock
	Slept Shift // time that passed on the host alone

	boot atomic.Int64 // in nanoseconds since 1970; 0: not booted
}

// Off returns a host whose wall clock is off by so much.
func Off(by time.Duration) *Host {
	h := &Host{}
	h.Off.Set(by)
	return h
}

// Boot begins the host's elapsed time, unless it has begun.
func (h *Host) Boot() { h.boot.CompareAndSwap(0, time.Now().UnixNano()) }

// Reboot begins the host's elapsed time at a time.
func (h *Host) Reboot(at time.Time) { h.boot.Store(at.UnixNano()) }

// Booted returns when the host's elapsed time began.
func (h *Host) Booted() time.Time { return time.Unix(0, h.boot.Load()) }

// Now is what the wall clock shows.
func (h *Host) Now() time.Time { return time.Now().Add(h.Off.Get() + h.Slept.Get()) }

// Elapsed is the time since the boot, sleep included.
func (h *Host) Elapsed() time.Duration { return time.Since(h.Booted()) + h.Slept.Get() }

// Shift is a duration that a test changes while others read it.
type Shift struct{ d atomic.Int64 }

// Get returns the duration.
func (s *Shift) Get() time.Duration { return time.Duration(s.d.Load()) }

// Set sets the duration.
func (s *Shift) Set(d time.Duration) { s.d.Store(int64(d)) }

// Add adds to the duration.
func (s *Shift) Add(d time.Duration) { s.d.Add(int64(d)) }
