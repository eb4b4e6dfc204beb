//go:build planted_p8

package planted

// P8 plants that a copy that was answered without an ETag is taken for made.
const P8 = true
