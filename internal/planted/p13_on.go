//go:build planted_p13

package planted

// P13 plants that rolling back leaves unfinished uploads.
const P13 = true
