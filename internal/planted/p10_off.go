//go:build !planted_p10

package planted

// P10 plants that what is read is not compared with its digest.
const P10 = false
