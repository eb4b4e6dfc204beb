//go:build planted_p12b

package planted

// P12B plants that a write without an answer is taken for done when any other was.
const P12B = true
