package clock

import "github.com/snapshotd/snapshotd/internal/crashpoint"

// The steps that a crash is tried at.
var (
	atNote    = crashpoint.New("clock.note")
	atRecover = crashpoint.New("clock.recover")
)
