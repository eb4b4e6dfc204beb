//go:build !planted_p3

package planted

// P3 plants that a collection is captured as it was before the create's pending key.
const P3 = false
