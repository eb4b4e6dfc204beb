//go:build !planted_p1

package planted

// P1 plants that a leader's writes do not compare that it still leads.
const P1 = false
