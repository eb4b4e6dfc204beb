//go:build !exact

package sim

// exact says that the runtime chooses nothing by chance: see exact.sh.
const exact = false

// seedRuntime does nothing: the runtime is that of Go.
func seedRuntime(uint64) {}
