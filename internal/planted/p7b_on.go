//go:build planted_p7b

package planted

// P7B plants that an object that is there already is never taken for the one that was to be written.
const P7B = true
