//go:build !planted_p7a

package planted

// P7A plants that an object that is there already is taken for the one that was to be written.
const P7A = false
