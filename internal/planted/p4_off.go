//go:build !planted_p4

package planted

// P4 plants that a grant is taken back when a delete fails.
const P4 = false
