package election

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atClaim  = crashpoint.New("elect.claim")
	atResign = crashpoint.New("elect.resign")
)
