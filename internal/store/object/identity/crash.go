package identity

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atCreate = crashpoint.New("start.identity")
	atRecord = crashpoint.New("start.store")
)
