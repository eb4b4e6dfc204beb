//go:build exact

package sim

import _ "unsafe" // for the linkname

// exact says that the runtime chooses nothing by chance: see exact.sh.
const exact = true

// seedRuntime seeds what the runtime chooses in a bubble.
//
//go:linkname seedRuntime
func seedRuntime(seed uint64)
