//go:build planted_p2

package planted

// P2 plants that files are granted to be deleted under creates that are pending.
const P2 = true
