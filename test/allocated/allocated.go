// Package allocated measures what a function takes of the heap, so that a test can
// hold a decoder to a bound.
package allocated

import "runtime"

// Bytes returns how many bytes of the heap were allocated while f ran, whether they
// were freed meanwhile or not. What other goroutines allocate counts as well, so it
// is for tests that run alone.
func Bytes(f func()) uint64 {
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	f()
	runtime.ReadMemStats(&after)
	return after.TotalAlloc - before.TotalAlloc
}
