//go:build !planted_p12a

package planted

// P12A plants that a repeat does not know what its request token stands for.
const P12A = false
