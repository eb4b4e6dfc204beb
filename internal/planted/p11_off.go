//go:build !planted_p11

package planted

// P11 plants that the age of an object is reckoned by the local clock.
const P11 = false
