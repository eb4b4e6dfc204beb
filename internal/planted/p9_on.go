//go:build planted_p9

package planted

// P9 plants that a snapshot is dropped under a restore.
const P9 = true
