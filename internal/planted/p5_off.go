//go:build !planted_p5

package planted

// P5 plants that a restore's pin is under a lease.
const P5 = false
