//go:build planted_p6

package planted

// P6 plants that a restored collection is ACTIVE with its first task.
const P6 = true
